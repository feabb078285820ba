"""Recipes: training stages in order, each of which starts from the result of the one before.

A recipe is a YAML file:

```yaml
output: model                     # each stage has a folder in it
defaults: {seed: 1}               # settings of all stages
stages:
  encoder:                        # its settings are those of `TrainConfig`
    kind: dual_encoder
    data: captions.jsonl
  projector:
    text: qwen                    # composes a new model with the vision encoder of the stage before
    data: captions.jsonl
    train: [projector]
  instruction:                    # trains the model of the stage before further
    data: {chats.jsonl: 0.8, pages.jsonl: 0.2}
```
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from accelerate import PartialState
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, model_validator
from transformers import TrainerCallback

from ..journal import Journal
from ..run_log import RECIPE
from .config import COMPOSITION_FIELDS, UNSET, TrainConfig, check_config, read_yaml
from .dual_encoder import VISION, save_vision_tower
from .packed_trainer import pack_sampler
from .preparation import Prepared, open_data, prepare
from .run_folder import check_output
from .stream import PackStream
from .train import train

__all__ = [
    "RECIPES",
    "Recipe",
    "RecipeResult",
    "StagePlan",
    "StageResult",
    "check_recipe",
    "load_recipe",
    "run_recipe",
]

RECIPES = {file.stem: file for file in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}
"""Recipes of published models by name."""
_OF_THE_RUN = ("output", "resume")
_MERGED = ("trainer", "image_processor")
_OF_A_STAGE = (*_OF_THE_RUN, "model", "kind", *COMPOSITION_FIELDS)


class Recipe(BaseModel):
    """Training stages in order.

    The first stage composes a model, trains `model` further, or trains a dual encoder. Each further stage trains the
    model of the stage before, or with `text` composes a new one with the vision encoder of the stage before.

    Args:
        output: Folder of the recipe; the result of each stage is in a folder with its name in it.
        stages: Settings of each stage by its name, as of [`TrainConfig`], without `output` and `resume`. Only the
            first stage has `model` and `vision`, or may be a dual encoder.
        defaults: Settings of all stages that do not have them, except those of the model. Entries of `trainer` and
            `image_processor` are defaults one by one.
    """

    model_config = ConfigDict(extra="forbid")

    output: Path
    stages: dict[str, dict[str, Any]]
    defaults: dict[str, Any] = {}
    _configs: dict[str, TrainConfig] = PrivateAttr()

    @model_validator(mode="after")
    def _check_stages(self) -> "Recipe":
        if not self.stages:
            raise ValueError("`stages` must have at least one stage")
        self._configs = {}
        _refuse(self.defaults, _OF_A_STAGE, "`defaults`", "they belong to a stage or to the recipe")
        before: TrainConfig | None = None
        for name, fields in self.stages.items():
            if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name) or name == "defaults":
                raise ValueError(f"`stages`: the name of a stage must be letters, digits, - and _, got {name!r}")
            _refuse(fields, _OF_THE_RUN, f"Stage `{name}`", "the recipe sets them")
            if before is not None:
                _refuse(fields, ("model", "vision"), f"Stage `{name}`", "they come from the stage before")
                _check_continued(name, fields, before)
            settings = {**self.defaults, **fields, "output": self.output / name}
            for option in _MERGED:
                common, own = self.defaults.get(option), fields.get(option)
                if isinstance(common, dict) and isinstance(own, dict):
                    settings[option] = {**common, **own}
            before = self._configs[name] = check_config(settings, f"settings of stage `{name}`")
        return self

    @property
    def configs(self) -> dict[str, TrainConfig]:
        """The settings of each stage, without the model that it starts from."""
        return self._configs


def _refuse(fields: dict[str, Any], names: tuple[str, ...], where: str, reason: str) -> None:
    given = [f"`{name}`" for name in names if name in fields]
    if given:
        raise ValueError(f"{where} must not have {', '.join(given)}: {reason}")


def _check_continued(name: str, fields: dict[str, Any], before: TrainConfig) -> None:
    if fields.get("kind") == "dual_encoder":
        raise ValueError(f"Stage `{name}`: only the first stage can be a dual encoder")
    if "text" in fields:
        return
    if before.kind == "dual_encoder":
        raise ValueError(f"Stage `{name}` must have `text`: it composes a model with the encoder of the stage before")
    _refuse(fields, COMPOSITION_FIELDS, f"Stage `{name}`", "it trains the model of the stage before; add `text`")


def load_recipe(path: str | Path, changes: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe from a YAML file and override some of it.

    Args:
        path: The file, or one of [`RECIPES`].
        changes: Values by "output", "defaults.FIELD" or "STAGE.FIELD", such as `{"projector.learning_rate": 1e-3}`;
            further names go into a mapping, such as "projector.trainer.bf16".

    Raises:
        ValueError: If the file cannot be read, or a setting is unknown, missing, left to the user, or out of range;
            names the stage and the setting.
    """
    fields = read_yaml(RECIPES.get(str(path), Path(path)), "recipe")
    for key, value in (changes or {}).items():
        _change(fields, key, value)
    if fields.get("output", UNSET) == UNSET:
        raise ValueError(f"`recipe` {path} must have an `output`, or one must be given.")
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        reasons = [
            f"`{'.'.join(map(str, one['loc']))}`: {one['msg']}"
            if one["loc"]
            else one["msg"].removeprefix("Value error, ").removesuffix(".")
            for one in error.errors()
        ]
        raise ValueError(f"`recipe` {path}: {'; '.join(reasons)}.") from None


def _change(fields: dict[str, Any], key: str, value: Any) -> None:
    names = key.split(".")
    stages = fields.get("stages")
    known = [*stages] if isinstance(stages, dict) else []
    if len(names) > 1 and names[0] in known:
        names = ["stages", *names]
    elif names != ["output"] and (len(names) == 1 or names[0] != "defaults"):
        raise ValueError(f"{key!r} must be output, defaults.FIELD or STAGE.FIELD; the stages are {', '.join(known)}.")
    *path, last = names
    for name in path:
        if not isinstance(fields.setdefault(name, {}), dict):
            raise ValueError(f"{key!r} must name a setting in a mapping, but {name} is {fields[name]!r}.")
        fields = fields[name]
    fields[last] = value


@dataclass(frozen=True)
class StagePlan:
    """What a stage of a recipe does.

    Args:
        name: Name of the stage.
        config: Its settings.
        parameters: Number of parameters of the model.
        trained: Number of those that are trained.
        samples: Number of samples of an epoch; unknown with `streaming`, as the next two.
        longest: Tokens of the longest sample.
        tokens: Tokens of the first epoch.
        steps: Number of optimizer steps.
    """

    name: str
    config: TrainConfig
    parameters: int
    trained: int
    samples: int | None
    longest: int | None
    tokens: int | None
    steps: int


def check_recipe(recipe: Recipe) -> list[StagePlan]:
    """Check all stages of a recipe without training.

    Models are built on the meta device, and every record is encoded as in training, or with `streaming` those of the
    first pack. Nothing is written.

    Args:
        recipe: The recipe.

    Returns:
        What each stage does.

    Raises:
        ValueError: If a stage cannot run, with its name; if `output` cannot be a folder, or has results of another
            recipe or of none.
    """
    check_output(recipe.output)
    if (recipe.output / RECIPE).exists():
        Journal(recipe.output / RECIPE, _settings(recipe)).close()
    else:
        for config in recipe.configs.values():
            if config.output.exists() and (not config.output.is_dir() or any(config.output.iterdir())):
                raise ValueError(f"`output` {recipe.output} has {config.output.name} that is not of this recipe.")
    with TemporaryDirectory() as scratch:
        return [*_plans(recipe, Path(scratch))]


def _plans(recipe: Recipe, scratch: Path) -> Iterator[StagePlan]:
    """Plan the stages; each leaves its model without weights, from which the next one starts."""
    before: TrainConfig | None = None
    for name, config in recipe.configs.items():
        with _errors_of(name):
            _check_weights(config)
            run = prepare(_start(config, before), weights=False)
        yield _plan(name, config, run)
        before = config.model_copy(update={"output": scratch / name})
        run.model.config.save_pretrained(before.output)
        run.processor.save_pretrained(before.output)
        if config.kind == "dual_encoder":
            save_vision_tower(run.model, run.processor, before.output / VISION, weights=False)


def _plan(name: str, config: TrainConfig, run: Prepared) -> StagePlan:
    parameters = [*run.model.parameters()]
    steps, samples, longest, tokens = _plan_data(config, run)
    return StagePlan(
        name=name,
        config=config,
        parameters=sum(one.numel() for one in parameters),
        trained=sum(one.numel() for one in parameters if one.requires_grad),
        samples=samples,
        longest=longest,
        tokens=tokens,
        steps=steps,
    )


def _plan_data(config: TrainConfig, run: Prepared) -> tuple[int, int | None, int | None, int | None]:
    """The steps, and the number of samples of an epoch, the longest one, and all their tokens."""
    if isinstance(run.data, PackStream):
        pack = next(iter(run.data))
        if pack.error is not None:
            raise pack.error
        return config.max_steps, None, None, None
    sampler = pack_sampler(run.data, config.capacity, config.max_items, run.args)
    steps = math.ceil(len(sampler) / (run.args.world_size * config.gradient_accumulation_steps))
    lengths = [run.data.lengths[sample] for pack in sampler for sample in pack]
    steps = run.args.max_steps if run.args.max_steps > 0 else math.ceil(config.epochs * steps)
    return steps, len(lengths), max(run.data.lengths), sum(lengths)


@contextmanager
def _errors_of(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Stage `{name}`: {error}") from error


def _check_weights(config: TrainConfig) -> None:
    """Raise ValueError for a folder of a model without weights, which a model on the meta device does not notice."""
    for argument in ("vision", "text", "model"):
        given = getattr(config, argument)
        folder = Path(given) if isinstance(given, (str, Path)) else None
        if folder is not None and folder.is_dir() and not any(folder.glob("*.safetensors")):
            raise ValueError(f"`{argument}` {folder} must have weights, got no *.safetensors in it.")


def _start(config: TrainConfig, before: TrainConfig | None) -> TrainConfig:
    """The settings with the model, or the vision encoder, of the stage before."""
    if before is None:
        return config
    if "text" not in config.model_fields_set:
        return config.model_copy(update={"model": before.output})
    folder = before.output / VISION if before.kind == "dual_encoder" else before.output
    return config.model_copy(update={"vision": str(folder)})


@dataclass(frozen=True)
class StageResult:
    """Result of a stage.

    Args:
        name: Name of the stage.
        folder: Folder of the trained model and its processor.
        steps: Number of optimizer steps.
        log: The Trainer's log history, one mapping per entry.
        skipped: Error messages of the skipped records.
    """

    name: str
    folder: Path
    steps: int
    log: list[dict[str, Any]]
    skipped: list[str]


@dataclass(frozen=True)
class RecipeResult:
    """Result of a recipe.

    Args:
        folder: Folder of the model of the last stage.
        stages: Result of each stage.
    """

    folder: Path
    stages: list[StageResult]


def run_recipe(
    recipe: Recipe,
    callbacks: list[TrainerCallback] | None = None,
    on_stage: Callable[[str, bool], None] | None = None,
) -> RecipeResult:
    """Run the stages of a recipe in order, after all were checked.

    If it is called again after an interruption, finished stages are kept and the unfinished one resumes from its last
    complete checkpoint, with the same losses and weights as without the interruption. `recipe.jsonl` in the folder of
    the recipe has its settings and the log of each finished stage. Runs in one process, or in several under
    `accelerate launch` or `torchrun`.

    Args:
        recipe: The recipe.
        callbacks: Further callbacks for the Trainer of each stage.
        on_stage: Called before each stage with its name, and whether it was finished before.

    Raises:
        ValueError: As for [`check_recipe`], before anything is trained or written.
    """
    path, settings = recipe.output / RECIPE, _settings(recipe)
    state = PartialState()
    with state.main_process_first():  # of several processes one checks the recipe and makes the journal
        if not path.exists():
            check_recipe(recipe)
            recipe.output.mkdir(parents=True, exist_ok=True)
        journal = Journal(path, settings)
    results: list[StageResult] = []
    before: TrainConfig | None = None
    with journal:
        rows = {row["stage"]: row for row in journal.rows()}
        for name, config in recipe.configs.items():
            row = rows.get(name)
            if on_stage is not None:
                on_stage(name, row is not None)
            if row is None:
                resume = any(config.output.glob("checkpoint-*"))
                with _errors_of(name):
                    done = train(_start(config, before).model_copy(update={"resume": resume}), callbacks)
                row = {"stage": name, "steps": done.steps, "log": done.log, "skipped": done.skipped}
                if state.is_main_process:
                    journal.add(row)
            results.append(StageResult(name, config.output, row["steps"], row["log"], row["skipped"]))
            before = config
    return RecipeResult(results[-1].folder, results)


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What the results depend on: the settings of each stage, and digests of its records."""
    found: dict[str, Any] = {"stages": [*recipe.configs]}
    for name, config in recipe.configs.items():
        fields = config.model_dump(mode="json", exclude=set(_OF_THE_RUN))
        found |= {f"{name}.{field}": value for field, value in fields.items()}
        for data in (*config.shares, *([config.eval_data] if config.eval_data else [])):
            if isinstance(data, Path):  # other data is among the settings
                with _errors_of(name):
                    found[f"{name}: {data}"] = _content(config, data)
    return found


def _content(config: TrainConfig, path: Path) -> str | None:
    """Digest of a file of records, or what identifies other data and streams."""
    if path.is_file() and not config.streaming:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return open_data(config, path, streaming=config.streaming).identity
