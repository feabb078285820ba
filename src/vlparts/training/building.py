"""Builds or loads the model and processor of a training run from its settings."""

import difflib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig

from ..composition import compose, compose_processor
from ..coordinates.codec import encode
from ..coordinates.regions import Region
from ..parts.chat_templates import DEEPSEEK_OCR_CHAT_TEMPLATE, POINTS_CHAT_TEMPLATE, POINTS_VISION_TOKENS
from ..parts.modeling_vlm import VisionLanguageForConditionalGeneration
from ..parts.part_configs import config_from_dict
from ..parts.processing_vlm import VisionLanguageProcessor
from .config import COMPOSITION_FIELDS, PARTS, REDUCTION_FIELDS, TrainConfig
from .presets import config_from_preset, preset_names
from .records import Line, PageRecord, Record, RegionBlock, TextBlock
from .tokenizer import train_tokenizer

# Arguments of `compose_processor` by the name of a chat template.
_TEMPLATES: dict[str, dict[str, Any]] = {
    "deepseek_ocr": {"chat_template": DEEPSEEK_OCR_CHAT_TEMPLATE},
    "points": {"chat_template": POINTS_CHAT_TEMPLATE, **POINTS_VISION_TOKENS},
}


def build(
    config: TrainConfig, texts: Iterable[str], weights: bool = True
) -> tuple[VisionLanguageForConditionalGeneration, VisionLanguageProcessor]:
    """Build or load the composed model and processor that the settings describe.

    Args:
        config: The settings.
        texts: Texts to train a tokenizer on, if one is needed.
        weights: False for a model on the meta device: folders need no weights.

    Returns:
        The model and its processor.

    Raises:
        ValueError: If a setting names a preset, folder, file or option that does not exist, or a checkpoint or
            configuration that cannot be loaded.
    """
    if config.model is not None:
        given = [f"`{name}`" for name in COMPOSITION_FIELDS if name in config.model_fields_set]
        if given:
            raise ValueError(f"`model` replaces {', '.join(given)}; expected only one of the two.")
        model = load_model(VisionLanguageForConditionalGeneration, config.model, "model", weights=weights)
        processor = load(VisionLanguageProcessor, config.model, "model")
    else:
        with nullcontext() if weights else torch.device("meta"):
            model, processor = _compose(config, texts, weights)
    if config.image_processor:
        processor.image_processor = with_options(processor.image_processor, config.image_processor)
    choose_trained(model, config)
    return model, processor


def conversation_texts(lines: Iterable[Line]) -> Iterator[str]:
    """Yield the texts of the records for training a tokenizer; coordinates are those of an image of one pixel."""
    for line in lines:
        if isinstance(line.record, PageRecord):
            yield from _page_texts(line.record)
        else:
            yield from _message_texts(line.record)


def _page_texts(record: PageRecord) -> Iterator[str]:
    yield from (part["text"] for part in record.user_content if part["type"] == "text")
    try:
        yield record.answer((1, 1), on_outside="clamp")
    except ValueError:  # as below
        return


def _message_texts(record: Record) -> Iterator[str]:
    for message in record.messages:
        yield f"{message.role}\n"
        for block in message.content:
            if isinstance(block, TextBlock):
                yield block.text
            elif isinstance(block, RegionBlock):
                region = block.region()
                origin = Region(region.kind, ((0.0, 0.0),) * len(region.points), region.label)
                try:
                    yield encode([origin], (1, 1))
                except ValueError:  # a label that the format cannot write; reported when the record is encoded
                    continue


def _compose(
    config: TrainConfig, texts: Iterable[str], weights: bool
) -> tuple[VisionLanguageForConditionalGeneration, VisionLanguageProcessor]:
    """Compose a new model and its processor from the parts that the settings name."""
    vision = make_tower(config, "vision", config.vision, weights)
    text, tokenizer = make_text(config, texts, AutoModelForCausalLM, weights)
    reduction = {name: getattr(config, name) for name in REDUCTION_FIELDS}
    with config_errors("projector" if config.token_reduction is None else "token_reduction"):
        model = compose(
            vision=vision,
            text=text,
            projector=config.projector,
            projector_options=config.projector_options,
            **reduction,
        )
    template = _read_template(config.chat_template)
    return model, compose_processor(model, tokenizer, trust_remote_code=config.trust_remote_code, **template)


def make_tower(config: TrainConfig, argument: str, spec: Any, weights: bool, loader: Any = AutoModel) -> Any:
    """The configuration of a tower, or its model loaded from a folder.

    Args:
        config: The settings.
        argument: "vision" or "text".
        spec: The setting of that name, or fields of a configuration.
        weights: False for a model on the meta device.
        loader: Auto class of the model.

    Raises:
        ValueError: As for [`build`].
    """
    found = _resolve(spec, argument)
    if isinstance(found, dict):
        return _config_from_fields(found, argument)
    return load_model(loader, found, argument, {"trust_remote_code": config.trust_remote_code}, weights)


def make_text(config: TrainConfig, texts: Iterable[str], loader: Any, weights: bool) -> tuple[Any, Any]:
    """The text model, as [`make_tower`], and its tokenizer, which is trained on `texts` if there is none."""
    options = {"trust_remote_code": config.trust_remote_code}
    text = _resolve(config.text, "text")
    if config.tokenizer is not None:
        tokenizer = load(AutoTokenizer, config.tokenizer, "tokenizer", options)
    elif isinstance(text, dict):
        tokenizer = train_tokenizer(texts)
    else:
        tokenizer = load(AutoTokenizer, text, "text", options)
    spec = _add_tokenizer_fields(text, tokenizer) if isinstance(text, dict) else config.text
    return make_tower(config, "text", spec, weights, loader), tokenizer


def _read_template(path: Path | None) -> dict[str, Any]:
    if path is None or str(path) in _TEMPLATES:
        return _TEMPLATES.get(str(path), {})
    try:
        return {"chat_template": path.read_text(encoding="utf-8")}
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"`chat_template` must be a file with a Jinja template or {', '.join(_TEMPLATES)}, got {path}: {error}"
        ) from None


def _resolve(spec: str | dict[str, Any], argument: str) -> dict[str, Any] | Path:
    """Resolve a setting to the fields of a configuration (with a "preset", if named) or to a checkpoint folder."""
    if isinstance(spec, dict):
        return dict(spec)
    if spec in preset_names(argument):
        return {"preset": spec}
    path = Path(spec)
    if path.is_dir():
        return path
    if path.is_file():
        try:
            fields = json.loads(path.read_text(encoding="utf-8-sig"))
        except RecursionError:
            raise ValueError(f"`{argument}` {spec} has values that are nested too deeply to be read.") from None
        except ValueError as error:
            raise ValueError(f"`{argument}` {spec} is not valid JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ValueError(f"`{argument}` {spec} must hold a mapping, got {type(fields).__name__}.")
        return fields
    presets = ", ".join(preset_names(argument))
    raise ValueError(f"`{argument}` must be one of {presets}, a folder or a JSON file, got {spec!r}.")


def _config_from_fields(fields: dict[str, Any], argument: str) -> PreTrainedConfig:
    preset = fields.pop("preset", None)
    with config_errors(argument):
        if preset is None:
            return config_from_dict(fields, argument)
        return config_from_preset(str(preset), fields, argument)


@contextmanager
def config_errors(argument: str) -> Iterator[None]:
    """Re-raise validation errors of configurations as ValueError that names the argument."""
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(f"`{argument}`: {' '.join(str(error).split())}") from error


def _add_tokenizer_fields(fields: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Add the special token ids and vocabulary size of a tokenizer; a larger `vocab_size` is kept."""
    size = fields.get("vocab_size", len(tokenizer))
    if size < len(tokenizer):
        raise ValueError(
            f"`text` has vocab_size={size}; expected at least the {len(tokenizer)} tokens of the tokenizer."
        )
    ids = {name: getattr(tokenizer, name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")}
    return {**fields, **ids, "vocab_size": size}


def load(loader: Any, folder: Path, argument: str, options: dict[str, Any] | None = None) -> Any:
    """Call `loader.from_pretrained` on a local folder; model ids of the Hub are refused."""
    if not folder.is_dir():
        raise ValueError(f"`{argument}` must be a folder, got {folder}.")
    try:
        return loader.from_pretrained(folder, local_files_only=True, **(options or {}))
    except (OSError, ValueError) as error:
        raise ValueError(f"`{argument}` {folder} cannot be loaded: {error}") from error


def load_model(
    loader: Any, folder: Path, argument: str, options: dict[str, Any] | None = None, weights: bool = True
) -> Any:
    """Load a model from a local folder; without `weights`, only its configuration, for a model on the meta device."""
    if weights:
        return load(loader, folder, argument, options)
    config = load(AutoConfig, folder, argument, options)
    with torch.device("meta"):
        return loader.from_config(config, **(options or {})) if hasattr(loader, "from_config") else loader(config)


def with_options(image_processor: Any, options: dict[str, Any]) -> Any:
    """A copy of an image processor with other options."""
    for name in options:
        if name not in image_processor.valid_kwargs.__annotations__:
            raise ValueError(f"`image_processor` has no option {name!r}.")
    try:
        return type(image_processor).from_dict(image_processor.to_dict(), **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`image_processor` {options}: {error}") from None


def select_parameters(model: nn.Module, names: Iterable[str], argument: str) -> dict[str, nn.Parameter]:
    """Select parameters of a composed model by part or by name.

    Args:
        model: The model.
        names: "vision", "projector", "text" (with the language head), or patterns of the names of parameters, in which
            `*` matches any characters, such as "model.vision_tower.sam.*".
        argument: Name of `names` in error messages.

    Returns:
        The selected parameters by name, in the model's order. Those that share a tensor are selected together.

    Raises:
        ValueError: If a name matches no parameter; lists the nearest ones.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: set[int] = set()
    for name in names:
        patterns = PARTS.get(name, (name,))
        matched = {id(one) for key, one in parameters.items() if any(fnmatchcase(key, each) for each in patterns)}
        if not matched:
            near = ", ".join(_nearest_names(model, name))
            raise ValueError(f"`{argument}` {name!r} matches no parameter; the nearest known names are {near}.")
        found |= matched
    return {key: one for key, one in parameters.items() if id(one) in found}


def _nearest_names(model: nn.Module, name: str) -> list[str]:
    """Names of parts, and patterns of modules, that are near to a name as a whole or in the last word."""
    modules = [f"{module}.*" for module, _ in model.named_modules() if module]
    near = difflib.get_close_matches(name, [*PARTS, *modules], n=3)
    last = {module.removesuffix(".*").rpartition(".")[2]: module for module in reversed(modules)}
    words = difflib.get_close_matches(name.strip("*.").rpartition(".")[2], last, n=1)
    return [*dict.fromkeys([*near, *(last[word] for word in words)])] or list(PARTS)


def choose_trained(model: nn.Module, config: TrainConfig) -> None:
    """Turn gradients off for what `train` and `freeze` leave out.

    Raises:
        ValueError: If a name matches no parameter, or nothing is left to train.
    """
    if config.train:
        chosen = set(map(id, select_parameters(model, config.train, "train").values()))
        frozen = [one for one in model.parameters() if id(one) not in chosen]
    else:
        frozen = [*select_parameters(model, config.freeze, "freeze").values()]
    for parameter in frozen:
        parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"`freeze` must leave parameters to train, got {config.freeze}.")
