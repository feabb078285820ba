"""`python -m vlparts train --recipe`: the plan of a recipe, its stages, and a summary."""

import os
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["train_recipe"]


def train_recipe(
    console: Console, path: Path, output: Path | None, changes: list[str], check: bool, given: list[str]
) -> None:
    """Run the stages of a recipe, or only check them.

    Args:
        console: Console for the plan and the summary.
        path: YAML file, or name of a published recipe.
        output: Folder, in place of the recipe's.
        changes: Settings to override, as "STAGE.FIELD=VALUE" with a YAML value.
        check: Only check the recipe and show its plan.
        given: Names of other options that were given.

    Raises:
        ValueError: If there are other options, or the recipe cannot run.
    """
    from ..training.recipe import check_recipe, load_recipe, run_recipe

    if given:
        raise ValueError(
            f"`--recipe` takes --output, --set and --check only, got {', '.join(sorted(given))}; change a setting by "
            "`--set STAGE.FIELD=VALUE`, or that of all stages by `--set defaults.FIELD=VALUE`."
        )
    overridden: dict[str, Any] = dict(map(_parse_change, changes))
    recipe = load_recipe(path, overridden if output is None else {**overridden, "output": str(output)})
    if int(os.environ.get("RANK", "0")) != 0:  # only the first process reports
        console = Console(quiet=True)
    if check:
        console.print(_plan_table(check_recipe(recipe)))
        return
    names = [*recipe.configs]

    def announce(name: str, finished: bool) -> None:
        console.rule(f"Stage {names.index(name) + 1} of {len(names)}: {name}{', finished before' if finished else ''}")

    result = run_recipe(recipe, on_stage=announce)
    for stage in result.stages:
        for reason in stage.skipped:
            console.print(f"skipped: {reason}", soft_wrap=True, highlight=False, markup=False)
    console.print(_summary_table(result))
    console.print(f"Model in {result.folder}.", soft_wrap=True, highlight=False, markup=False)


def _parse_change(text: str) -> tuple[str, Any]:
    from ..training.config import parse_yaml

    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"`--set` must be STAGE.FIELD=VALUE, got {text!r}.")
    try:
        return name, parse_yaml(value)
    except yaml.YAMLError as error:
        raise ValueError(f"`--set` {name} must have a YAML value, got {value!r}: {error}") from None


def _plan_table(plans: list[Any]) -> Table:
    table = Table("stage", "trained", "parameters", "records", "samples", "longest", "steps", "learning rate")
    for plan in plans:
        config = plan.config
        trained = ", ".join(config.train) or "all" + "".join(f" but {name}" for name in config.freeze)
        total = sum(config.shares.values())
        files = [f"{path.name} {share / total:.0%}" for path, share in config.shares.items()]
        rates = [f"{config.learning_rate:g}", *(f"{name} {rate:g}" for name, rate in config.learning_rates.items())]
        table.add_row(
            plan.name,
            Text(trained),
            f"{plan.trained:,} of {plan.parameters:,}",
            Text("\n".join(files)),
            "streamed" if plan.samples is None else f"{plan.samples:,}",
            f"{config.capacity:,} at most" if plan.longest is None else f"{plan.longest:,} of {config.capacity:,}",
            f"{plan.steps:,}",
            Text("\n".join(rates)),
        )
    return table


def _summary_table(result: Any) -> Table:
    table = Table("stage", "steps", "first loss", "last loss", "evaluation loss", "folder")
    for stage in result.stages:
        losses = [line["loss"] for line in stage.log if "loss" in line]
        evaluated = [line["eval_loss"] for line in stage.log if "eval_loss" in line]
        shown = [f"{one:.4f}" for one in (*losses[:1], *losses[-1:])] or ["", ""]
        last = f"{evaluated[-1]:.4f}" if evaluated else ""
        table.add_row(stage.name, f"{stage.steps:,}", *shown, last, Text(str(stage.folder)))
    return table
