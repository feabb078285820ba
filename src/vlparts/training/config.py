"""Settings of a training run, from Python, a YAML file or the command line."""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from datasets import Dataset, IterableDataset
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    InstanceOf,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from ..documents.pages import DPI
from ..losses.weights import PRESETS
from .record_formats import FIELDS

PARTS = {
    "vision": ("model.vision_tower.*", "vision_model.*"),
    "projector": ("model.projector.*", "model.token_reducer.*", "image_projection.*", "text_projection.*"),
    "text": ("model.language_model.*", "lm_head.*", "text_model.*"),
}
"""Parts of a composed model and of a dual encoder, and the patterns of the names of their parameters."""
REDUCTION_FIELDS = ("token_reduction", "token_ratio", "token_count", "token_options")
"""Settings of how a composed model reduces its vision tokens."""
COMPOSITION_FIELDS = (
    "vision",
    "text",
    "projector",
    "projector_options",
    *REDUCTION_FIELDS,
    "tokenizer",
    "chat_template",
)
"""Settings of a new composed model; `model` replaces them."""
UNSET = "???"
"""Value of a setting that a file leaves to the user."""
_COMPOSED_ONLY = (
    "model",
    "eval_data",
    "projector",
    "projector_options",
    *REDUCTION_FIELDS,
    "chat_template",
    "template",
    "prompts",
    "coordinate_format",
    "on_outside",
    "packing",
    "loss",
    "mix",
    "sample_weight_field",
)
_Fraction = Annotated[float, Field(gt=0, lt=1)]
_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class TrainConfig(BaseModel):
    """Settings of [`train`].

    Args:
        kind: What is trained: a "composed" model, or a "dual_encoder" of images and captions, whose settings `vision`,
            `text`, `tokenizer` and `dual_encoder` give its towers; see [`vlparts.training.dual_encoder`].
        data: Training records: a JSON Lines file, a Parquet or Arrow file or folder, WebDataset tar shards (a file, a
            folder or a pattern), or in Python a `datasets.Dataset`, or with `streaming` an `IterableDataset`; see
            [`open_source`][vlparts.training.sources]. Or
            several files with the shares of their samples in an epoch, such as `{"ocr.jsonl": 0.7, "general.jsonl":
            0.3}`; see [`Mixture`][vlparts.training.dataset.Mixture].
        output: Folder for checkpoints and the trained model.
        eval_data: Evaluation records, if any, as for `data`.
        columns: Names that the data has for fields of records, by the names of ours, such as `{"images": "pictures"}`.
        ignore_columns: Names of columns, fields or extensions of the data that are not used.
        num_proc: Number of processes that measure the records before training; None for the training process alone.
        check_pixels: Decode all images before training. Otherwise damaged pixels are found when a record is used.
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
        token_reduction: Method by which each image gets fewer tokens, such as "merge_similar"; None for all tokens.
        token_ratio: Share of the tokens of an image that is left.
        token_count: Number of tokens of an image that are left.
        token_options: Options of the method.
        dual_encoder: Fields of `NaViTDualEncoderConfig` for a dual encoder, such as `{"loss": "sigmoid"}`.
        train: What is trained, if not all: "vision", "text" (with the language head), "projector" (of a dual encoder,
            its projections), or patterns of names of parameters, such as "model.vision_tower.layers.2?.*".
        freeze: What is not trained, instead of `train`.
        image_processor: Options that override those of the image processor, such as `{"size": {...}}` or
            `{"mode": "base"}`.
        max_image_pixels: Largest number of pixels of an image file or a page; None for Pillow's limit, 178,956,970.
        dpi: Dots per inch at which pages of PDF files are drawn.
        coordinate_format: Name of a coordinate format; None for the default.
        template: "chat" for the chat template of the model, or "continuation" for the plain contents of the turns, as
            in pretraining; the model keeps its chat template.
        prompts: Texts of the user for records without one, such as captions and pages: one is drawn for each record,
            by `seed` and its line. By default there is none, and pages have the prompts of DeepSeek-OCR.
        capacity: Tokens of a pack (one micro-batch on one process), image tokens included. Longer samples raise.
        max_items: Maximum number of samples in a pack; None for no limit.
        packing: Pack samples into one row with attention within each sample; False pads them to a batch instead.
        streaming: Read the data in order while training, without a pass over it beforehand, see
            [`PackStream`][vlparts.training.stream.PackStream]. Requires `max_steps`. `data` may be too large to be
            listed, and broken records are found when they are reached.
        shuffle_buffer: Records in the shuffle buffer of each of the sources of `data` on each reader (process or
            DataLoader worker), with `streaming`.
        tokenizer_records: Number of records at the start of each of the sources of `data` on which a tokenizer is
            trained, and in which `sample_weight_field` must occur, with `streaming`.
        epochs: Passes over the data.
        max_steps: Optimizer steps; overrides `epochs` if positive.
        max_tokens: Tokens to train on, image tokens included, instead of `epochs` or `max_steps`: as many steps as are
            needed for them.
        optimizer: "adamw", or "muon": Muon for the weight matrices of layers and AdamW for the rest, which learns
            faster from random weights.
        learning_rate: Peak learning rate. It falls along a cosine to 0, or as `lr_scheduler_type` in `trainer` says.
        learning_rate_steps: A schedule by steps instead: pairs of a fraction of all optimizer steps and the factor of
            the peak learning rate from there on, such as `[[0.8, 0.316], [0.9, 0.1]]`.
        learning_rates: Peak learning rates of parts or of patterns of names, as for `train`, such as
            `{"vision": 1e-5}`. All other parameters have `learning_rate`.
        warmup_ratio: Fraction of the steps with linear warmup.
        weight_decay: Decoupled weight decay; biases and the weights of norms have none.
        weight_decays: Weight decays of parts or of patterns of names, likewise.
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
        metrics: Also log losses by task and answer length, speed, packing and router load; see
            [`vlparts.training.metrics`].
        resume: Resume from the last checkpoint in `output`.
        on_error: "raise" on a broken record, or "skip" it and report it.
        on_outside: Policy for a region outside its image: "raise", "clamp" it to the image, or "skip" it.
        cache: Keep encoded samples in memory.
        trust_remote_code: Passed to `from_pretrained` when folders are loaded.
        trainer: Further fields of transformers' TrainingArguments, except those with a setting of their own.
    """

    model_config = ConfigDict(extra="forbid")

    kind: Literal["composed", "dual_encoder"] = "composed"
    data: Path | InstanceOf[Dataset] | InstanceOf[IterableDataset] | dict[Path, _Positive]
    output: Path
    eval_data: Path | InstanceOf[Dataset] | None = None
    columns: dict[str, str] = {}
    ignore_columns: list[str] = []
    num_proc: int | None = Field(default=None, ge=1)
    check_pixels: bool = False
    vision: str | dict[str, Any] = "navit:tiny"
    text: str | dict[str, Any] = "qwen3:tiny"
    model: Path | None = None
    tokenizer: Path | None = None
    chat_template: Path | None = None
    projector: str = "mlp2_gelu"
    projector_options: dict[str, Any] | None = None
    token_reduction: str | None = None
    token_ratio: float | None = None
    token_count: int | None = None
    token_options: dict[str, Any] | None = None
    dual_encoder: dict[str, Any] = {}
    train: list[str] = []
    freeze: list[str] = []
    image_processor: dict[str, Any] = {}
    max_image_pixels: int | None = Field(default=None, ge=1)
    dpi: float = Field(default=DPI, gt=0, allow_inf_nan=False)
    coordinate_format: str | None = None
    template: Literal["chat", "continuation"] = "chat"
    prompts: list[Annotated[str, Field(pattern=r"\S")]] = []
    capacity: int = Field(default=2048, ge=1)
    max_items: int | None = Field(default=None, ge=1)
    packing: bool = True
    streaming: bool = False
    shuffle_buffer: int = Field(default=1000, ge=1)
    tokenizer_records: int = Field(default=10_000, ge=1)
    epochs: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    max_steps: int = Field(default=-1, ge=-1)
    max_tokens: int | None = Field(default=None, ge=1)
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: _Positive = 1e-4
    learning_rate_steps: list[tuple[_Fraction, _NotNegative]] = []
    learning_rates: dict[str, _Positive] = {}
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    weight_decay: _NotNegative = 0.01
    weight_decays: dict[str, _NotNegative] = {}
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    loss: str | None = None
    mix: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    sample_weight_field: str | None = Field(default=None, min_length=1)
    seed: int = Field(default=0, ge=0, lt=2**32)
    save_steps: int = Field(default=500, ge=1)
    eval_steps: int = Field(default=500, ge=1)
    logging_steps: int = Field(default=10, ge=1)
    metrics: bool = True
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

    @field_validator("data")
    @classmethod
    def _check_data(cls, value: Any) -> Any:
        if value == {}:
            raise ValueError("must be a file, or files with their shares, got none")
        return value

    @field_validator("columns")
    @classmethod
    def _check_columns(cls, value: dict[str, str]) -> dict[str, str]:
        unknown = [name for name in value if name not in FIELDS]
        if unknown:
            raise ValueError(f"must have fields of records as keys, {', '.join(sorted(FIELDS))}, got {unknown[0]!r}")
        return value

    @field_serializer("data", "eval_data", when_used="json")
    def _serialize_data(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {str(path): share for path, share in value.items()}
        if isinstance(value, IterableDataset):
            return repr(value)
        return value._fingerprint if isinstance(value, Dataset) else value

    @field_validator("train", "freeze", "learning_rates", "weight_decays")
    @classmethod
    def _check_names(cls, value: list[str] | dict[str, float]) -> list[str] | dict[str, float]:
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
    def _check_together(self) -> "TrainConfig":
        if self.mix is not None and self.loss != "openpangu_mix":
            raise ValueError(f"`mix` requires loss='openpangu_mix', got loss={self.loss!r}")
        if self.train and self.freeze:
            raise ValueError("`train` and `freeze` must not both be given, since each is what the other is not")
        if self.max_tokens is not None and self.max_steps > 0:
            raise ValueError("`max_tokens` and `max_steps` must not both be given")
        self._check_streaming()
        if self.prompts and self.template == "continuation":
            raise ValueError("`prompts` requires template='chat'; the contents of turns alone have no prompt")
        if self.kind == "dual_encoder":
            given = [f"`{name}`" for name in _COMPOSED_ONLY if name in self.model_fields_set]
            if given:
                raise ValueError(f"kind='dual_encoder' takes no {', '.join(given)}")
        elif self.dual_encoder:
            raise ValueError("`dual_encoder` requires kind='dual_encoder'")
        return self

    def _check_streaming(self) -> None:
        if not self.streaming:
            for name in ("shuffle_buffer", "tokenizer_records"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"`{name}` requires `streaming`")
            return
        if self.max_tokens is not None:
            raise ValueError("`streaming` takes no `max_tokens`: the steps for them are unknown; set `max_steps`")
        if self.max_steps < 1:
            raise ValueError("`streaming` requires `max_steps`: the steps of `epochs` are unknown until they are done")
        for name in ("cache", "check_pixels", "num_proc"):
            if getattr(self, name) and self.eval_data is None:
                raise ValueError(f"`streaming` takes `{name}` for `eval_data` only, got none")

    @property
    def shares(self) -> dict[Path | Dataset | IterableDataset, float]:
        """The training records with their shares."""
        return {**self.data} if isinstance(self.data, dict) else {self.data: 1.0}


def load_config(path: str | Path | None, changes: dict[str, Any]) -> TrainConfig:
    """Read settings from a YAML file and override some of them.

    Args:
        path: YAML file with the fields of [`TrainConfig`], or None.
        changes: Fields that override those of the file.

    Raises:
        ValueError: If the file cannot be read or is not a mapping, or a field is unknown, missing or out of range;
            names the field.
    """
    return check_config({**({} if path is None else read_yaml(Path(path), "config")), **changes}, "training settings")


def read_yaml(path: Path, argument: str) -> dict[str, Any]:
    """Read a mapping from a YAML file.

    Args:
        path: The file.
        argument: Name of `path` in error messages.

    Raises:
        ValueError: If the file cannot be read, is not a mapping, or has a key twice.
    """
    try:
        fields = parse_yaml(path.read_text(encoding="utf-8-sig")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"`{argument}` {path} cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"`{argument}` {path} must hold a mapping, got {type(fields).__name__}.")
    return fields


def parse_yaml(text: str) -> Any:
    """Parse a YAML document with floats as in YAML 1.2; a key that occurs twice raises `yaml.YAMLError`."""
    return yaml.load(text, Loader=_Loader)


def check_config(fields: dict[str, Any], what: str) -> TrainConfig:
    """Build settings from their fields.

    Args:
        fields: The fields.
        what: What they are, for the error message.

    Raises:
        ValueError: If a field is unknown, missing, [`UNSET`] or out of range; names all of them.
    """
    unset = [f"`{name}`" for name, value in fields.items() if value == UNSET]
    if unset:
        raise ValueError(f"Invalid {what}: {', '.join(unset)} must be set; the file leaves the choice to you.")
    try:
        return TrainConfig.model_validate(fields)
    except ValidationError as error:
        reasons = "; ".join(
            f"`{'.'.join(map(str, one['loc']))}`: {one['msg']}{_nearest_name(one)}"
            if one["loc"]
            else one["msg"].removeprefix("Value error, ")
            for one in error.errors()
        )
        raise ValueError(f"Invalid {what}: {reasons}.") from None


def _nearest_name(error: Any) -> str:
    """The end of the message for an unknown setting: the known one with the nearest name, if one is near."""
    if error["type"] != "extra_forbidden":
        return ""
    near = difflib.get_close_matches(str(error["loc"][-1]), TrainConfig.model_fields, n=1)
    return f"; the nearest known name is `{near[0]}`" if near else ""


class _Loader(yaml.SafeLoader):
    """Safe loader that reads 1e-4 as a float, as YAML 1.2 does, and not only 1.0e-4; repeated keys are errors."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of a node."""
        keys = [key.value for key, _ in node.value]
        repeated = [key for key in keys if isinstance(key, str) and keys.count(key) > 1]
        if repeated:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {repeated[0]!r} occurs twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)
