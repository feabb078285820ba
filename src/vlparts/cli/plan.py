"""The command `python -m vlparts plan`: memory, FLOPs and time of a training run, before it is started."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .errors import exit_on_value_error
from .options import TrustRemoteCode

__all__ = ["plan"]


def plan(
    devices: Annotated[int, typer.Option(help="Number of devices.")],
    memory: Annotated[float, typer.Option(help="Memory of a device in GB.")],
    model: Annotated[
        str | None, typer.Option(help="Folder of a composed model, or a preset such as points_1_5_7b.")
    ] = None,
    vision: Annotated[str | None, typer.Option(help="Preset such as navit:small, folder, or JSON file.")] = None,
    text: Annotated[str | None, typer.Option(help="Preset such as moge:small, folder, or JSON file.")] = None,
    projector: Annotated[str | None, typer.Option(help="Name of a projector.")] = None,
    trained: Annotated[
        list[str] | None,
        typer.Option("--train", help="What is trained: vision, text, projector, or a pattern; may be repeated."),
    ] = None,
    freeze: Annotated[
        list[str] | None, typer.Option(help="What is not trained, instead of --train; may be repeated.")
    ] = None,
    capacity: Annotated[int, typer.Option(help="Tokens of a pack.")] = 4096,
    sample_tokens: Annotated[
        float | None, typer.Option(help="Mean tokens of a sample, image tokens included; 1024, or less if packs are.")
    ] = None,
    samples: Annotated[float | None, typer.Option(help="Samples of an epoch; 1e6 without --tokens.")] = None,
    tokens: Annotated[float | None, typer.Option(help="Tokens of an epoch, instead of --samples.")] = None,
    images_per_sample: Annotated[float, typer.Option(help="Mean number of images of a sample.")] = 1.0,
    image_size: Annotated[str, typer.Option(help="Mean size of an image in pixels.")] = "640x480",
    data: Annotated[
        Path | None,
        typer.Option(help="JSON Lines file of records, for the four numbers before; with --model FOLDER."),
    ] = None,
    gradient_accumulation_steps: Annotated[int, typer.Option(help="Packs per optimizer step on each device.")] = 1,
    precision: Annotated[
        str, typer.Option(help="mixed (float32 parameters, bfloat16 autocast), float32, or bfloat16.")
    ] = "mixed",
    optimizer: Annotated[str, typer.Option(help="adamw or muon.")] = "adamw",
    flops: Annotated[float, typer.Option(help="Peak TFLOP/s of a device.")] = 400.0,
    mfu: Annotated[float, typer.Option(help="Share of the peak that training reaches.")] = 0.4,
    margin: Annotated[float, typer.Option(help="Share of the memory that is left free.")] = 0.1,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Estimate memory, FLOPs and time of training a composed model, and suggest how to divide it over devices."""
    names = ("model", "vision", "text", "projector", "freeze", "trust_remote_code")
    given = {name: value for name, value in locals().items() if name in names and value}
    with exit_on_value_error():
        from ..training.scaling.planning import Run, build_model
        from ..training.scaling.planning import plan as make_plan

        settings = {**given, **({"train": trained} if trained else {})}
        for name, value, known in (
            ("precision", precision, ("mixed", "float32", "bfloat16")),
            ("optimizer", optimizer, ("adamw", "muon")),
        ):
            if value not in known:
                raise ValueError(f"`--{name}` must be one of {', '.join(known)}, got {value!r}.")
        if samples is not None and tokens is not None:
            raise ValueError("`--samples` and `--tokens` must not both be given.")
        built, shape = build_model(settings), _Shape(sample_tokens, samples, images_per_sample, _size(image_size))
        if data is not None:
            shape = _measure(data, model, sample_tokens, samples, tokens)
        length = min(1024.0, capacity) if shape.sample_tokens is None else shape.sample_tokens
        count = tokens / length if tokens is not None else 1e6 if shape.samples is None else shape.samples
        run = Run(
            devices=devices,
            memory=memory * 1e9,
            capacity=capacity,
            samples=count,
            sample_tokens=length,
            images_per_sample=shape.images_per_sample,
            image_size=shape.image_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            precision=precision,  # type: ignore[arg-type]
            optimizer=optimizer,
            flops=flops * 1e12,
            mfu=mfu,
            margin=margin,
        )
        result = make_plan(built, run)
    if as_json:
        typer.echo(json.dumps({"run": dataclasses.asdict(run), **dataclasses.asdict(result)}, indent=1))
        return
    console = Console()
    for table in _tables(result):
        console.print(table)
    console.print(Text(result.reason), soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class _Shape:
    sample_tokens: float | None
    samples: float | None
    images_per_sample: float
    image_size: tuple[int, int]


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"`--image-size` must be WIDTHxHEIGHT in pixels, got {text!r}.")
    return int(width), int(height)


def _measure(data: Path, model: str | None, *given: float | None) -> _Shape:
    from ..training.scaling.planning import measure_records

    if any(one is not None for one in given):
        raise ValueError("`--data` replaces --sample-tokens, --samples and --tokens.")
    if model is None or not Path(model).is_dir():
        raise ValueError("`--data` requires `--model` with the folder of a composed model and its processor.")
    return _Shape(*measure_records(data, Path(model)))


def _tables(result: Any) -> list[Table]:
    parameters = Table("parameters", "all", "trained", "active per token")
    for name, row in result.parameters.items():
        parameters.add_row(name, *(_big(row[key]) for key in ("all", "trained", "active")))
    memory = Table("GB of a device", *(f"{one.strategy}, {one.pack.tokens:,} tokens" for one in result.estimates))
    for field in dataclasses.fields(result.estimates[0].memory):
        sizes = (f"{getattr(one.memory, field.name) / 1e9:.1f}" for one in result.estimates)
        memory.add_row(field.name, *sizes)
    last = result.chosen or result.estimates[-1]
    pack, cost = last.pack, last.flops
    time = Table(f"{last.strategy}, packs of {pack.tokens:,} tokens", "")
    rows, columns = pack.grid
    parts = ", ".join(f"{name} {value / cost.total:.0%}" for name, value in cost.by_part.items())
    for name, value in {
        "samples, images in a pack": f"{pack.samples:.1f}, {pack.images:.1f}",
        "patches, tokens of an image": f"{rows} x {columns}, {pack.image_tokens:,}",
        "FLOPs of a pack": _big(cost.total),
        "forward, backward, recomputed": ", ".join(map(_big, (cost.forward, cost.backward, cost.recomputed))),
        "by part": parts,
        "FLOPs of an epoch": _big(last.flops_per_epoch),
        "seconds of a step": f"{last.seconds_per_step:.3g}",
        "steps of an epoch": f"{last.steps_per_epoch:,}",
        "hours of an epoch": f"{last.hours_per_epoch:.3g}",
    }.items():
        time.add_row(name, value)
    return [parameters, memory, time]


def _big(value: float) -> str:
    for limit, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.3g}"
