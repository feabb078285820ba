"""Settings of a training run, from Python, a YAML file or the command line."""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..documents.pages import DPI
from ..losses.weights import PRESETS
from .record_formats import FIELDS

PARTS = {
    "vision": ("model.vision_tower.*",),
    "projector": ("model.projector.*",),
    "text": ("model.language_model.*", "lm_head.*"),
}
"""Parts of a composed model, and the patterns of the names of their parameters."""
SETTINGS = {file.stem: file for file in sorted((Path(__file__).parent / "settings").glob("*.yaml"))}
"""Settings of published training stages by name."""
_Fraction = Annotated[float, Field(gt=0, lt=1)]
_Factor = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class TrainConfig(BaseModel):
    """Settings of [`train`].

    Args:
        data: JSON Lines file of training records.
        output: Folder for checkpoints and the trained model.
        eval_data: JSON Lines file of evaluation records, if any.
        vision: Vision encoder: a preset such as "navit:tiny" (a part and its preset), a checkpoint folder, the JSON
            file of a configuration, or a mapping of its fields with a "model_type" or a "preset".
        text: Text model: a preset such as "qwen3:tiny", a checkpoint folder, or a configuration as for `vision`.
        model: Folder of a composed model to train further, instead of `vision` and `text`.
        tokenizer: Folder of a tokenizer. By default that of the text model; for a new text model, one is trained on
            the texts of `data`.
        chat_template: File of a Jinja chat template, for a tokenizer that has none and for which ChatML is no default;
            or "deepseek_ocr" for the plain format of DeepSeek-OCR, "points" for the ChatML of POINTS1.5, whose image
            tokens have a start and an end.
        projector: Name of a projector.
        projector_options: Options of the projector, such as `{"hidden_size": 3584}` of "multi_tap_merger".
        freeze: What is not trained: "vision", "text" (with the language head), "projector", or patterns of names of
            parameters, such as "model.vision_tower.sam.*".
        image_processor: Options that override those of the image processor, such as `{"size": {...}}` or
            `{"mode": "base"}`.
        max_image_pixels: Largest number of pixels of an image file or a page; None for Pillow's limit, 178,956,970.
        dpi: Dots per inch at which pages of PDF files are drawn.
        coordinate_format: Name of a coordinate format; None for the default.
        capacity: Tokens of a pack (one micro-batch on one process), image tokens included. Longer samples raise.
        max_items: Maximum number of samples in a pack; None for no limit.
        packing: Pack samples into one row with attention within each sample; False pads them to a batch instead.
        epochs: Passes over the data.
        max_steps: Optimizer steps; overrides `epochs` if positive.
        optimizer: "adamw", or "muon": Muon for the weight matrices of layers and AdamW for the rest, which learns
            faster from random weights.
        learning_rate: Peak learning rate. It falls along a cosine to 0, or as `lr_scheduler_type` in `trainer` says.
        learning_rate_steps: A schedule by steps instead: pairs of a fraction of all optimizer steps and the factor of
            the peak learning rate from there on, such as `[[0.8, 0.316], [0.9, 0.1]]`.
        warmup_ratio: Fraction of the steps with linear warmup.
        weight_decay: Decoupled weight decay.
        gradient_accumulation_steps: Micro-batches per optimizer step.
        loss: Weighting of tokens and samples: "token" (tokens equally), "sample" (samples equally), "square" (samples
            by the square root of their number of tokens), or "openpangu_mix" (a mix of the first two). None is
            Trainer's mean over tokens, and the same as "token" if samples have weights.
        mix: Share of "sample" in "openpangu_mix", from 0 to 1; None for 0.5.
        sample_weight_field: Field of the records that holds their loss weight, a number of at least 0. Records without
            it have the weight 1.
        seed: Seed of the weights and the order of samples.
        save_steps: Steps between checkpoints.
        eval_steps: Steps between evaluations.
        logging_steps: Steps between log lines.
        resume: Resume from the last checkpoint in `output`.
        on_error: "raise" on a broken record, or "skip" it and report it.
        on_outside: Policy for a region outside its image: "raise", "clamp" it to the image, or "skip" it.
        cache: Keep encoded samples in memory.
        trust_remote_code: Passed to `from_pretrained` when folders are loaded.
        trainer: Further fields of transformers' TrainingArguments, except those with a setting of their own.
    """

    model_config = ConfigDict(extra="forbid")

    data: Path
    output: Path
    eval_data: Path | None = None
    vision: str | dict[str, Any] = "navit:tiny"
    text: str | dict[str, Any] = "qwen3:tiny"
    model: Path | None = None
    tokenizer: Path | None = None
    chat_template: Path | None = None
    projector: str = "mlp2_gelu"
    projector_options: dict[str, Any] | None = None
    freeze: list[str] = []
    image_processor: dict[str, Any] = {}
    max_image_pixels: int | None = Field(default=None, ge=1)
    dpi: float = Field(default=DPI, gt=0, allow_inf_nan=False)
    coordinate_format: str | None = None
    capacity: int = Field(default=2048, ge=1)
    max_items: int | None = Field(default=None, ge=1)
    packing: bool = True
    epochs: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    max_steps: int = Field(default=-1, ge=-1)
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(default=1e-4, gt=0, allow_inf_nan=False)
    learning_rate_steps: list[tuple[_Fraction, _Factor]] = []
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    weight_decay: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    loss: str | None = None
    mix: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    sample_weight_field: str | None = Field(default=None, min_length=1)
    seed: int = Field(default=0, ge=0, lt=2**32)
    save_steps: int = Field(default=500, ge=1)
    eval_steps: int = Field(default=500, ge=1)
    logging_steps: int = Field(default=10, ge=1)
    resume: bool = False
    on_error: Literal["raise", "skip"] = "raise"
    on_outside: Literal["raise", "clamp", "skip"] = "raise"
    cache: bool = False
    trust_remote_code: bool = False
    trainer: dict[str, Any] = {}

    @field_validator("loss")
    @classmethod
    def _check_loss(cls, value: str | None) -> str | None:
        if value is not None and value not in PRESETS:
            raise ValueError(f"must be one of {', '.join(PRESETS)}, got {value!r}")
        return value

    @field_validator("sample_weight_field")
    @classmethod
    def _check_sample_weight_field(cls, value: str | None) -> str | None:
        if value in FIELDS:
            raise ValueError(f"must not be a field that records have already, got {value!r}")
        return value

    @field_validator("freeze")
    @classmethod
    def _check_freeze(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in PARTS and not {".", "*"} & set(name):
                raise ValueError(f"must be {', '.join(PARTS)}, or patterns of names of parameters, got {name!r}")
        return value

    @field_validator("learning_rate_steps")
    @classmethod
    def _check_learning_rate_steps(cls, value: list[tuple[float, float]]) -> list[tuple[float, float]]:
        fractions = [fraction for fraction, _ in value]
        if fractions != sorted(set(fractions)):
            raise ValueError(f"must have ascending fractions, got {fractions}")
        return value

    @model_validator(mode="after")
    def _check_mix(self) -> "TrainConfig":
        if self.mix is not None and self.loss != "openpangu_mix":
            raise ValueError(f"`mix` requires loss='openpangu_mix', got loss={self.loss!r}")
        return self


def load_config(path: str | Path | None, changes: dict[str, Any]) -> TrainConfig:
    """Read settings from a YAML file and override some of them.

    Args:
        path: YAML file with the fields of [`TrainConfig`], or one of [`SETTINGS`], or None.
        changes: Fields that override those of the file.

    Raises:
        ValueError: If the file cannot be read or is not a mapping, or a field is unknown, missing or out of range;
            names the field.
    """
    fields: Any = {}
    if path is not None:
        file = SETTINGS.get(str(path), Path(path))
        try:
            fields = yaml.load(file.read_text(encoding="utf-8-sig"), Loader=_Loader) or {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"`config` {path} cannot be read: {error}") from None
        if not isinstance(fields, dict):
            raise ValueError(f"`config` {path} must hold a mapping, got {type(fields).__name__}.")
    try:
        return TrainConfig.model_validate({**fields, **changes})
    except ValidationError as error:
        reasons = "; ".join(
            f"`{'.'.join(map(str, one['loc']))}`: {one['msg']}{_nearest_name(one)}" for one in error.errors()
        )
        raise ValueError(f"Invalid training settings: {reasons}.") from None


def _nearest_name(error: Any) -> str:
    """The end of the message for an unknown setting: the known one with the nearest name, if one is near."""
    if error["type"] != "extra_forbidden":
        return ""
    near = difflib.get_close_matches(str(error["loc"][-1]), TrainConfig.model_fields, n=1)
    return f"; the nearest known name is `{near[0]}`" if near else ""


class _Loader(yaml.SafeLoader):
    """Safe loader that reads 1e-4 as a float, as YAML 1.2 does, and not only 1.0e-4."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)
