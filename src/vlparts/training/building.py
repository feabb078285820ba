"""From settings to a model and its processor."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig

from ..composition import compose, compose_processor
from ..coordinates.codec import encode
from ..coordinates.regions import Region
from ..parts.modeling_vlm import VisionLanguageForConditionalGeneration
from ..parts.part_configs import config_from_dict
from ..parts.processing_vlm import VisionLanguageProcessor
from .config import TrainConfig
from .presets import config_from_preset, preset_names
from .records import RecordFile, RegionBlock, TextBlock
from .tokenizer import train_tokenizer

_PARTS_OF_A_MODEL = ("vision", "text", "projector", "projector_options", "tokenizer")


def build(
    config: TrainConfig, texts: Iterable[str]
) -> tuple[VisionLanguageForConditionalGeneration, VisionLanguageProcessor]:
    """Build or load what the settings ask for.

    Args:
        config: The settings.
        texts: Texts to train a tokenizer on, where one is needed.

    Returns:
        The model and its processor.

    Raises:
        ValueError: If a setting names nothing that exists.
    """
    if config.model is not None:
        given = [f"`{name}`" for name in _PARTS_OF_A_MODEL if name in config.model_fields_set]
        if given:
            raise ValueError(f"`model` comes in place of {', '.join(given)}; give one or the other.")
        model = _load(VisionLanguageForConditionalGeneration, config.model, "model")
        processor = _load(VisionLanguageProcessor, config.model, "model")
    else:
        model, processor = _composed(config, texts)
    _set_options(processor.image_processor, config.image_processor)
    _freeze(model, config.freeze)
    return model, processor


def conversation_texts(records: RecordFile) -> Iterable[str]:
    """What the records look like as text, for training a tokenizer; places are all written as zeros."""
    for line in records.lines:
        for message in line.record.messages:
            yield f"{message.role}\n"
            for block in message.content:
                if isinstance(block, TextBlock):
                    yield block.text
                elif isinstance(block, RegionBlock):
                    region = block.region()
                    origin = Region(region.kind, ((0.0, 0.0),) * len(region.points), region.label)
                    try:
                        yield encode([origin], (1, 1))
                    except ValueError:  # a label that cannot be written; encoding the record will say so
                        continue


def _composed(
    config: TrainConfig, texts: Iterable[str]
) -> tuple[VisionLanguageForConditionalGeneration, VisionLanguageProcessor]:
    """A new model from the parts that the settings name."""
    options = {"trust_remote_code": config.trust_remote_code}
    vision: Any = _described(config.vision, "vision")
    vision = (
        _configuration(vision, "vision") if isinstance(vision, dict) else _load(AutoModel, vision, "vision", options)
    )
    text: Any = _described(config.text, "text")
    if config.tokenizer is not None:
        tokenizer = _load(AutoTokenizer, config.tokenizer, "tokenizer", options)
    elif isinstance(text, dict):
        tokenizer = train_tokenizer(texts)
    else:
        tokenizer = _load(AutoTokenizer, text, "text", options)
    if isinstance(text, dict):
        text = _configuration(_for_tokenizer(text, tokenizer), "text")
    else:
        text = _load(AutoModelForCausalLM, text, "text", options)
    with _named("projector"):
        model = compose(
            vision=vision, text=text, projector=config.projector, projector_options=config.projector_options
        )
    return model, compose_processor(model, tokenizer)


def _described(spec: str | dict[str, Any], argument: str) -> dict[str, Any] | Path:
    """Fields of a configuration with their presets filled in, or the folder of a checkpoint."""
    if isinstance(spec, dict):
        return dict(spec)
    if spec in preset_names(argument):
        return {"preset": spec}
    path = Path(spec)
    if path.is_dir():
        return path
    if path.is_file():
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"`{argument}` {spec} is not valid JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ValueError(f"`{argument}` {spec} must hold a mapping, got {type(fields).__name__}.")
        return fields
    presets = ", ".join(preset_names(argument))
    raise ValueError(f"`{argument}` must be one of {presets}, a folder or a JSON file, got {spec!r}.")


def _configuration(fields: dict[str, Any], argument: str) -> PreTrainedConfig:
    preset = fields.pop("preset", None)
    with _named(argument):
        if preset is None:
            return config_from_dict(fields, argument)
        return config_from_preset(str(preset), fields, argument)


@contextmanager
def _named(argument: str) -> Iterator[None]:
    """What configurations raise on fields that make no sense is no ValueError and does not say where they stood."""
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(f"`{argument}`: {' '.join(str(error).split())}") from error


def _for_tokenizer(fields: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """A text model's fields with its tokenizer's ids and size; a larger vocabulary may be given."""
    size = fields.get("vocab_size", len(tokenizer))
    if size < len(tokenizer):
        raise ValueError(f"`text` has a vocab_size of {size}, but the tokenizer has {len(tokenizer)} tokens.")
    ids = {name: getattr(tokenizer, name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")}
    return {**fields, **ids, "vocab_size": size}


def _load(kind: Any, folder: Path, argument: str, options: dict[str, Any] | None = None) -> Any:
    """`kind.from_pretrained` for a folder, never for a name in the network."""
    if not folder.is_dir():
        raise ValueError(f"`{argument}` {folder} is no folder.")
    try:
        return kind.from_pretrained(folder, local_files_only=True, **(options or {}))
    except (OSError, ValueError) as error:
        raise ValueError(f"`{argument}` {folder} cannot be loaded: {error}") from error


def _set_options(image_processor: Any, options: dict[str, Any]) -> None:
    for name, value in options.items():
        if name not in image_processor.valid_kwargs.__annotations__:
            raise ValueError(f"`image_processor` has no option {name!r}.")
        setattr(image_processor, name, value)


def _freeze(model: VisionLanguageForConditionalGeneration, parts: Sequence[str]) -> None:
    modules = {
        "vision": [model.model.vision_tower],
        "text": [model.model.language_model, model.lm_head],
        "projector": [model.model.projector],
    }
    for part in parts:
        for module in modules[part]:
            module.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"`freeze` leaves no weights to train, got {list(parts)}.")
