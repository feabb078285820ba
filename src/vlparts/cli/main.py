"""Command line: `python -m vlparts demo | train | evaluate | plan | show | data | soup | coordinates | ocr | info`."""

import importlib.metadata
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .coordinates import app as coordinates_app
from .data import app as data_app
from .errors import exit_on_value_error
from .evaluate import evaluate
from .ocr import ocr
from .plan import plan
from .recipe import train_recipe
from .soup import soup

app = typer.Typer(help="Vision-language parts for transformers.", no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(coordinates_app, name="coordinates")
app.add_typer(data_app, name="data")
show_app = typer.Typer(help="Pictures.", no_args_is_help=True)
app.add_typer(show_app, name="show")
app.command()(evaluate)
app.command()(ocr)
app.command()(plan)
app.command()(soup)
console = Console()


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"vlparts {importlib.metadata.version('vlparts')}")
        raise typer.Exit


@app.callback()
def run_app(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Vision-language parts for transformers."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for data, checkpoint, metrics and pictures.")] = Path(
        "vlparts-demo"
    ),
    minutes: Annotated[float, typer.Option(help="Total time in minutes.")] = 5.0,
    seed: Annotated[int, typer.Option(help="Seed of the weights and the order of samples.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Number of training steps, instead of --minutes.")] = None,
    digits: Annotated[int, typer.Option(help="Digits per image, 1 to 4; more are harder.")] = 1,
    text: Annotated[str, typer.Option(help="Preset of the text model, such as moge:small.")] = "qwen3:tiny",
) -> None:
    """Compose a model, train it to locate digits in photographs, save it, and evaluate it without vlparts."""
    from ..demo.data import Task
    from ..demo.run import run_demo

    with exit_on_value_error():
        task = Task(digits=digits)
        run_demo(out, minutes=minutes, seed=seed, steps=steps, console=console, task=task, text=text)


@app.command()
def train(
    data: Annotated[
        Path | None,
        typer.Option(help="Training records: JSON Lines, Parquet or Arrow, or WebDataset tars like 'shards/*.tar'."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for checkpoints and the trained model.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; options override them.")] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="YAML file of training stages, or a name such as points_1_5; for --output, --set, --check."),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="STAGE.FIELD=VALUE: a setting of a stage of the recipe; may be repeated."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check the recipe and show its plan, without training.")
    ] = False,
    eval_data: Annotated[Path | None, typer.Option(help="Evaluation records, as for --data.")] = None,
    num_proc: Annotated[
        int | None, typer.Option(help="Processes that measure the records before training; by default none.")
    ] = None,
    check_pixels: Annotated[
        bool | None, typer.Option(help="Decode all images before training, not only their headers.")
    ] = None,
    ignore_columns: Annotated[
        list[str] | None,
        typer.Option("--ignore-column", help="Column or field of the data that is not used; may be repeated."),
    ] = None,
    vision: Annotated[str | None, typer.Option(help="Preset such as navit:tiny, folder, or JSON file.")] = None,
    text: Annotated[str | None, typer.Option(help="Preset such as qwen3:tiny, folder, or JSON file.")] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of a composed model to train further.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of a tokenizer.")] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="File of a Jinja chat template, or deepseek_ocr for its plain format.")
    ] = None,
    projector: Annotated[str | None, typer.Option(help="Name of a projector.")] = None,
    token_reduction: Annotated[
        str | None, typer.Option(help="Method that leaves fewer tokens of an image, such as merge_similar.")
    ] = None,
    token_ratio: Annotated[float | None, typer.Option(help="Share of the tokens that is left.")] = None,
    token_count: Annotated[int | None, typer.Option(help="Number of tokens of an image that are left.")] = None,
    trained: Annotated[
        list[str] | None,
        typer.Option(
            "--train", help="What is trained: vision, text, projector, or a pattern of names; may be repeated."
        ),
    ] = None,
    freeze: Annotated[
        list[str] | None, typer.Option(help="What is not trained, instead of --train; may be repeated.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="chat, or continuation for the plain contents of the turns.")
    ] = None,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", help="Text of the user for records without one; may be repeated.")
    ] = None,
    max_image_pixels: Annotated[
        int | None, typer.Option(help="Largest number of pixels of an image file; by default Pillow's limit.")
    ] = None,
    dpi: Annotated[float | None, typer.Option(help="Dots per inch for pages of PDF files, by default 144.")] = None,
    capacity: Annotated[int | None, typer.Option(help="Tokens of a pack.")] = None,
    max_items: Annotated[
        int | None,
        typer.Option(
            "--max-items", "--batch-size", help="Maximum number of samples in a pack or, with --no-packing, a batch."
        ),
    ] = None,
    gradient_accumulation_steps: Annotated[
        int | None, typer.Option(help="Packs or batches per optimizer step on each process.")
    ] = None,
    packing: Annotated[bool | None, typer.Option(help="Pack samples, or pad them to a batch.")] = None,
    streaming: Annotated[
        bool | None, typer.Option(help="Read the data while training, without a pass beforehand; for --max-steps.")
    ] = None,
    shuffle_buffer: Annotated[
        int | None, typer.Option(help="Records in the shuffle buffer of each reader, with --streaming.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Number of optimizer steps, instead of --epochs.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Number of tokens, instead of --epochs.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw or muon.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    loss: Annotated[str | None, typer.Option(help="token, sample, square or openpangu_mix.")] = None,
    mix: Annotated[float | None, typer.Option(help="Share of sample averaging in openpangu_mix, 0 to 1.")] = None,
    sample_weight_field: Annotated[
        str | None, typer.Option(help="Field of the records with their loss weight.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the weights and the order of samples.")] = None,
    save_steps: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    resume: Annotated[bool | None, typer.Option(help="Resume from the last checkpoint in --output.")] = None,
    on_error: Annotated[str | None, typer.Option(help="Policy for invalid records: raise or skip.")] = None,
    on_outside: Annotated[
        str | None, typer.Option(help="Policy for regions outside their image: raise, clamp or skip.")
    ] = None,
    trust_remote_code: Annotated[
        bool | None, typer.Option(help="Run code that comes with the folders that are loaded.")
    ] = None,
) -> None:
    """Train a composed model on conversations about images, or the stages of a recipe."""
    given: dict[str, Any] = {
        name: value
        for name, value in locals().items()
        if name not in ("config", "recipe", "changes", "check") and value not in (None, [])
    }
    if "trained" in given:
        given["train"] = given.pop("trained")
    from ..training.config import load_config
    from ..training.train import train as run

    with exit_on_value_error():
        if recipe is not None:
            others = [*given.keys() - {"output"}, *([] if config is None else ["config"])]
            return train_recipe(console, recipe, output, changes or [], check, others)
        if changes or check:
            raise ValueError("`--set` and `--check` must be given with `--recipe` only.")
        result = run(load_config(config, given))
    if int(os.environ.get("RANK", "0")) == 0:  # only the first process reports
        for reason in result.skipped:
            console.print(f"skipped: {reason}", soft_wrap=True, highlight=False, markup=False)
        console.print(f"{result.steps} steps, {len(result.skipped)} records skipped.")


@show_app.command("run")
def show_run(
    folder: Annotated[Path, typer.Argument(help="Output of a training run or a recipe, also while it runs.")],
    output: Annotated[Path | None, typer.Option(help="Picture; by default run.png in the folder.")] = None,
) -> None:
    """Draw losses, learning rate, speed, packing and router load of a training run."""
    from ..show import run

    path = folder / "run.png" if output is None else output
    with exit_on_value_error():
        run(folder, path)
    typer.echo(path)


@app.command()
def info(
    self_check: Annotated[
        bool, typer.Option("--self-check", help="Compare kernels of backends with PyTorch.")
    ] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Show which forms of the CPU kernels were measured and chosen.")
    ] = False,
) -> None:
    """Show versions, registered parts, and backends with the reason if one is not active."""
    from ..backends import backend_status, check_backends
    from ..registration import PARTS

    table = Table("package", "version")
    for package in ("vlparts", "torch", "transformers", "accelerate", "peft", "torch_npu"):
        try:
            table.add_row(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            table.add_row(package, "not installed")
    console.print(table)
    table = Table("part", "classes")
    for part in PARTS:
        classes = [part.config, *part.models.values(), part.image_processor, part.processor]
        table.add_row(part.config.model_type, ", ".join(found.__name__ for found in classes if found is not None))
    console.print(table)
    table = Table("backend", "active", "reason")
    for status in backend_status().values():
        table.add_row(status.name, "yes" if status.active else "no", Text(status.reason))
    console.print(table)
    if kernels:
        _show_measured_kernels()
    if not self_check:
        return
    table = Table("backend", "kernel", "self-check")
    results = check_backends()
    for backend, checked in results.items():
        for kernel, error in checked.items():
            table.add_row(backend, kernel, Text(f"switched off: {error}" if error else "passed"))
    console.print(table)
    if not results:
        console.print("No active backend has kernels to check.")
    if any(error for checked in results.values() for error in checked.values()):
        raise typer.Exit(1)


def _show_measured_kernels() -> None:
    from ..kernels.cpu.calibration import VARIABLE, calibrations, is_switched_off

    found = calibrations()
    if is_switched_off():
        console.print(f"{VARIABLE}=0: PyTorch's own forms are used, and nothing is measured.")
    elif not found:
        console.print("Nothing measured yet: the forms of a CPU kernel are measured when it is first used.")
    table = Table("CPU kernel", "chosen", "milliseconds")
    for one in found:
        times = ", ".join(f"{form} {1e3 * seconds:.2f}" for form, seconds in one["seconds"].items())
        table.add_row(one["name"], one["chosen"], times)
    if found:
        console.print(table)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
