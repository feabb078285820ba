"""From settings to a model and its processor."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig

from ..composition import compose, compose_processor
from ..parts.configuration_navit import NaViTConfig
from ..parts.coordinates import encode
from ..parts.modeling_vlm import VisionLanguageForConditionalGeneration
from ..parts.processing_vlm import VisionLanguageProcessor
from ..parts.regions import Region
from ..parts.vision_parts import VISION_PARTS, config_from_dict
from .config import TrainConfig
from .records import RecordFile, RegionBlock, TextBlock
from .tokenizer import train_tokenizer

_TEXT_PRESETS: dict[str, dict[str, Any]] = {
    "qwen3:tiny": {
        "model_type": "qwen3",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
}


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
        model = VisionLanguageForConditionalGeneration.from_pretrained(config.model)
        processor = VisionLanguageProcessor.from_pretrained(config.model)
    else:
        vision = _resolve(config.vision, "vision")
        text = _resolve(config.text, "text")
        tokenizer = _tokenizer(config, text, texts)
        if isinstance(text, PreTrainedConfig):
            text.vocab_size = len(tokenizer)
            for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
                setattr(text, name, getattr(tokenizer, name))
        model = compose(
            vision=vision, text=text, projector=config.projector, trust_remote_code=config.trust_remote_code
        )
        processor = compose_processor(model, tokenizer)
    for name, value in config.image_processor.items():
        if not hasattr(processor.image_processor, name):
            raise ValueError(f"`image_processor` has no option {name!r}.")
        setattr(processor.image_processor, name, value)
    for part in config.freeze:
        modules = {"vision": "vision_tower", "text": "language_model", "projector": "projector"}
        getattr(model.model, modules[part]).requires_grad_(False)
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
                    yield encode([origin], (1, 1))


def _resolve(spec: str | dict[str, Any], argument: str) -> PreTrainedConfig | str:
    """A configuration, or the folder of a checkpoint."""
    if isinstance(spec, dict):
        return _from_fields(dict(spec), argument)
    if argument == "text" and spec in _TEXT_PRESETS:
        return config_from_dict(_TEXT_PRESETS[spec], argument)
    if argument == "vision" and spec.removeprefix("navit:") in NaViTConfig.presets():
        return NaViTConfig.from_preset(spec.removeprefix("navit:"))
    path = Path(spec)
    if path.is_dir():
        return spec
    if path.is_file():
        return _from_fields(json.loads(path.read_text(encoding="utf-8")), argument)
    presets = _TEXT_PRESETS if argument == "text" else [f"navit:{name}" for name in NaViTConfig.presets()]
    raise ValueError(f"`{argument}` must be one of {', '.join(presets)}, a folder or a JSON file, got {spec!r}.")


def _from_fields(fields: dict[str, Any], argument: str) -> PreTrainedConfig:
    preset = fields.pop("preset", None)
    if preset is None:
        return config_from_dict(fields, argument)
    if argument == "text":
        if preset not in _TEXT_PRESETS:
            raise ValueError(f"`text` preset must be one of {', '.join(_TEXT_PRESETS)}, got {preset!r}.")
        return config_from_dict({**_TEXT_PRESETS[preset], **fields}, argument)
    part, _, name = preset.partition(":")
    config = VISION_PARTS.get(f"vlparts_{part}", (None,))[0]
    if config is None:
        raise ValueError(f"`vision` preset must start with the name of a part, such as 'navit:tiny', got {preset!r}.")
    return config.from_preset(name, **fields)


def _tokenizer(config: TrainConfig, text: PreTrainedConfig | str, texts: Iterable[str]) -> Any:
    if config.tokenizer is not None:
        return AutoTokenizer.from_pretrained(config.tokenizer)
    if isinstance(text, str):
        return AutoTokenizer.from_pretrained(text, trust_remote_code=config.trust_remote_code)
    return train_tokenizer(texts)
