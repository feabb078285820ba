"""Compose a vision-language model from parts."""

import os
from collections.abc import Iterable
from copy import deepcopy
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from .image_processors import (
    PathLike,
    check_image_processor,
    default_image_processor,
    fit_to_blocks,
    load_image_processor,
    output_size,
    read_image_processor_config,
    show_whole_image,
)
from .parts.chat_placeholders import end_of_turn_id
from .parts.configuration_vlm import VisionLanguageConfig
from .parts.modeling_vlm import VisionLanguageForConditionalGeneration
from .parts.part_models import PART_MODELS, model_from_config
from .parts.processing_vlm import VisionLanguageProcessor
from .parts.utils import mark_initialized
from .parts.vlm_features import get_square_grid, pixel_layout
from .parts.vlm_inputs import build_head
from .parts.vlm_projector_types import projector_names
from .parts.vlm_projectors import build_projector
from .parts.vlm_reduction import build_reducer
from .text_probe import check_text_model
from .vision_loading import load_vision

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def compose(
    vision: PreTrainedModel | PreTrainedConfig | PathLike,
    text: PreTrainedModel | PreTrainedConfig | PathLike,
    projector: str = "mlp2_gelu",
    *,
    image_token_id: int | None = None,
    video_token_id: int | None = None,
    projector_options: dict[str, Any] | None = None,
    token_reduction: str | None = None,
    token_ratio: float | None = None,
    token_count: int | None = None,
    trust_remote_code: bool = False,
    **config_changes: Any,
) -> VisionLanguageForConditionalGeneration:
    """Build a vision-language model from a vision encoder and a text model.

    Models and checkpoints keep their weights; the modules of given models are shared, not copied. Configurations give
    new weights. The projector is always new. Generation options are a copy of the text model's, whose
    `suppress_tokens` are extended by the placeholders, since no image belongs to a generated one. The settings of the
    image processor in the vision encoder's folder are kept in `config.image_processor`, for [`compose_processor`].

    Args:
        vision: A vision encoder, its configuration, or the folder of a checkpoint; ours, your own, or native of a type
            in `vlm_towers.VISION_TOWERS`. Of a whole model (CLIP, Siglip2, Qwen2.5-VL) its encoder is used. Pooling
            heads are not built; a given model keeps those that it has.
        text: A decoder-only text model with or without its head, its configuration, or the folder of a checkpoint.
        projector: Name of a registered projector.
        image_token_id: Id of the image placeholder; [`compose_processor`] sets it too.
        video_token_id: Id of the video placeholder; [`compose_processor`] sets it too.
        projector_options: Options of the projector, such as `{"hidden_size": 3584}` of "multi_tap_merger".
        token_reduction: Method by which each image gets fewer tokens, such as "merge_similar"; see [`TokenReduction`].
        token_ratio: Share of the tokens of an image that is left.
        token_count: Number of tokens of an image that are left.
        trust_remote_code: Passed to `from_pretrained` when a folder is loaded.
        **config_changes: Further fields of [`VisionLanguageConfig`].

    Returns:
        The model, in evaluation mode if only the projector is new.

    Raises:
        ValueError: If an argument has another type, `vision` is another native model, the parts do not fit together,
            or the text model would not compute what it computes alone; see
            [`check_text_model`][vlparts.text_probe.check_text_model].
    """
    if projector not in projector_names():
        raise ValueError(f"`projector` must be one of {', '.join(projector_names())}, got {projector!r}.")
    encoder = load_vision(vision, trust_remote_code)
    source = vision.name_or_path if isinstance(vision, PreTrainedModel) else vision
    if isinstance(source, (str, os.PathLike)) and str(source):
        config_changes.setdefault("image_processor", read_image_processor_config(source))
    if isinstance(text, (str, os.PathLike)):
        text = _load_text(text, trust_remote_code)
    language_model, head = _text_model(text)
    pixel_layout(encoder)  # raises a ValueError if the encoder takes no images
    config = VisionLanguageConfig(
        vision_config=encoder.config,
        text_config=language_model.config,
        projector_type=projector,
        projector_options=projector_options,
        image_token_id=image_token_id,
        video_token_id=video_token_id,
        token_reduction=token_reduction,
        token_ratio=token_ratio,
        token_count=token_count,
        dtype=language_model.dtype,
        **config_changes,
    )
    config.vision_config = encoder.config  # A given model keeps its options.
    with torch.device("meta"):
        model = VisionLanguageForConditionalGeneration(config)
    built, classes = type(model.model.language_model).__name__, [one.__name__ for one in type(language_model).__mro__]
    if built not in classes:
        raise ValueError(f"`text` {classes[0]} cannot be composed: a saved model would be loaded with a {built}.")
    model.model.vision_tower = encoder
    model.model.language_model = language_model
    model.model.projector = _new_weights(model, build_projector(config))
    reducer = build_reducer(config)
    if reducer is not None:
        model.model.token_reducer = _new_weights(model, reducer)
    if head is None:
        head = _new_weights(model, build_head(config))
    model.lm_head = cast(nn.Linear, head)
    model.tie_weights()
    mark_initialized(model)
    check_text_model(model, text)
    generation_config = getattr(text, "generation_config", None)
    if generation_config is not None:
        model.generation_config = deepcopy(generation_config)
    suppress_tokens(model, (image_token_id, video_token_id))
    return model


def compose_processor(
    model: VisionLanguageForConditionalGeneration,
    tokenizer: Any,
    image_processor: Any = None,
    *,
    center_crop: bool = False,
    trust_remote_code: bool = False,
    chat_template: str | dict[str, str] | None = None,
    pad_token: str | None = None,
    image_token: str = "<image>",
    video_token: str | None = None,
    vision_start_token: str | None = None,
    vision_end_token: str | None = None,
) -> VisionLanguageProcessor:
    """Build the processor of a composed model.

    Adds missing tokens to the tokenizer, resizes the model's embeddings if the vocabulary has outgrown them, and sets
    `config.image_token_id` and `config.video_token_id`. The ids of all four tokens are added to the `suppress_tokens`
    of generation, in place of placeholders that the model had before.

    The beginning, end and padding ids of the text configuration and of generation become those of the tokenizer.
    Further end-of-sequence ids that they have are kept, and the token with which the chat template ends an assistant
    turn ends generation too. A tokenizer without padding token gets that of the model, or `<pad>`, a token of its own,
    since losses often ignore all tokens with the padding id.

    Args:
        model: The composed model.
        tokenizer: A tokenizer, or the folder of one.
        image_processor: An image processor, or the folder of one, used as it is. The default is the one that came with
            the vision encoder's folder (`config.image_processor`), and for a new encoder one with the size of its
            configuration and the statistics of the published checkpoints of its family.
        center_crop: Whether to keep the centre crop of the default image processor. It cuts the edges of an image off,
            where regions cannot be; otherwise both sides are resized to the size of the crop, and the model sees all
            of the image. See [`as_seen`] for coordinates with a crop.
        trust_remote_code: Passed to `from_pretrained` when an image processor or a tokenizer is loaded.
        chat_template: Jinja template, used as it is; [`with_placeholders`] extends that of a text model. The default
            is the tokenizer's with the placeholders, see [`VisionLanguageProcessor`].
        pad_token: Padding token; None for that of the tokenizer.
        image_token: Placeholder of an image.
        video_token: Placeholder of a video; None for a model without videos.
        vision_start_token: Token before the placeholder of a video; see [`VisionLanguageProcessor`].
        vision_end_token: Token after it. Both or neither are given.

    Returns:
        The processor.

    Raises:
        ValueError: If the placeholders are the same, only one of `vision_start_token` and `vision_end_token` is given,
            the image processor cannot be loaded, is unknown, or does not fit the vision encoder, or there is no
            default for `chat_template`. The tokenizer may have new tokens then; the model is unchanged.
    """
    layout, vision = pixel_layout(model.model.vision_tower), model.config.vision_config
    reduction = model.config.reduction
    if isinstance(image_processor, (str, os.PathLike)):
        image_processor = load_image_processor(image_processor, trust_remote_code)
    elif image_processor is None:
        image_processor = (
            default_image_processor(layout, vision, model.config.merge_size)
            if model.config.image_processor is None
            else load_image_processor(model.config.image_processor, trust_remote_code)
        )
        fit_to_blocks(image_processor, vision, model.config.merge_size)
        if not center_crop:
            show_whole_image(image_processor)
    check_image_processor(image_processor, vision, model.config.merge_size)
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code)
    vocabulary, tokens = tokenizer.get_vocab(), (image_token, video_token, vision_start_token, vision_end_token)
    missing = [token for token in tokens if token is not None and token not in vocabulary]
    if missing:
        tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
    if pad_token is not None or tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": pad_token or _pad_token(model, tokenizer)})
    processor = VisionLanguageProcessor(
        image_processor,
        tokenizer,
        chat_template=chat_template,
        spatial_merge_size=model.config.merge_size,
        image_seq_length=_square_tokens(model, image_processor) if layout == "square" else None,
        patch_size=vision.patch_size if layout == "padded" else None,
        image_token=image_token,
        video_token=video_token,
        vision_start_token=vision_start_token,
        vision_end_token=vision_end_token,
        token_reduction=None if reduction is None else reduction.to_dict(),
    )
    if len(tokenizer) > model.config.text_config.vocab_size:
        has_values = not model.lm_head.weight.is_meta
        model.resize_token_embeddings(len(tokenizer), mean_resizing=has_values)
    previous = (model.config.image_token_id, model.config.video_token_id)
    model.config.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
    if video_token is not None:
        model.config.video_token_id = tokenizer.convert_tokens_to_ids(video_token)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in tokens if token is not None]
    suppress_tokens(model, [*ids, model.config.video_token_id], previous)
    _align_special_tokens(model, tokenizer, end_of_turn_id(tokenizer, processor.chat_template))
    return processor


def suppress_tokens(
    model: VisionLanguageForConditionalGeneration, ids: Iterable[int | None], previous: Iterable[int | None] = ()
) -> None:
    """Exclude tokens from generation, since no image or video belongs to a generated placeholder.

    Args:
        model: The model, whose `generation_config.suppress_tokens` is set.
        ids: The ids to exclude, in addition to those that are excluded already; None is ignored.
        previous: Ids that are no longer excluded.
    """
    excluded = set(model.generation_config.suppress_tokens or ()).difference(previous)
    model.generation_config.suppress_tokens = sorted(excluded.union(one for one in ids if one is not None)) or None


def _load_text(folder: PathLike, trust_remote_code: bool) -> PreTrainedModel:
    """Load a text model with its head, or without one if it has no class for text alone."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    _check_text_config(config, type(config).__name__)
    remote = getattr(config, "auto_map", None) or {}
    has_head = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in remote
    auto = AutoModelForCausalLM if has_head else AutoModel
    return auto.from_pretrained(folder, trust_remote_code=trust_remote_code)


def _text_model(text: Any) -> tuple[PreTrainedModel, nn.Module | None]:
    config, name = getattr(text, "config", text), type(text).__name__
    if not isinstance(config, PreTrainedConfig) or not isinstance(text, (PreTrainedModel, PreTrainedConfig)):
        raise ValueError(f"`text` must be a model, a configuration or a folder, got {name}.")
    _check_text_config(config, name)
    if config.model_type not in PART_MODELS and type(config) not in MODEL_MAPPING:
        raise ValueError(f"`text` {name} cannot be composed: AutoModel has no model of its {type(config).__name__}.")
    if isinstance(text, PreTrainedConfig):
        return model_from_config(text), None
    base = text.base_model
    if base is text:  # Llama4ForCausalLM names its base model otherwise than its attribute
        base = next((one for one in text.children() if isinstance(one, PreTrainedModel)), text)
    return base, text.get_output_embeddings()


def _check_text_config(config: PreTrainedConfig, name: str) -> None:
    parts = [one for one in ("text_config", "vision_config", "audio_config") if getattr(config, one, None) is not None]
    if parts:
        raise ValueError(
            f"`text` must be a text model alone, got {name}, which has {' and '.join(parts)}; pass the text model "
            "inside it."
        )
    missing = [one for one in ("vocab_size", "hidden_size") if not hasattr(config, one)]
    if missing:
        raise ValueError(f"`text` must be a text model, got {name}, whose configuration has no {missing[0]}.")


def _new_weights(model: PreTrainedModel, module: ModuleT) -> ModuleT:
    module.apply(model._init_weights)
    return module.to(model.config.dtype)


def _pad_token(model: VisionLanguageForConditionalGeneration, tokenizer: Any) -> str:
    """The padding token of the model, or "<pad>" if it has none that is a special token."""
    for config in (model.generation_config, model.config.text_config):
        index = getattr(config, "pad_token_id", None)
        if index in tokenizer.all_special_ids:  # Another one, as of a default, would be lost in decoded answers.
            return tokenizer.convert_ids_to_tokens(index)
    return "<pad>"


def _align_special_tokens(
    model: VisionLanguageForConditionalGeneration, tokenizer: Any, end_of_turn: int | None
) -> None:
    """Give the model the special tokens of its tokenizer, so that transformers' Trainer has nothing to align."""
    text, generation = model.config.text_config, model.generation_config
    for name in ("bos_token_id", "pad_token_id"):
        if getattr(tokenizer, name) is not None:
            setattr(text, name, getattr(tokenizer, name))
            setattr(generation, name, getattr(tokenizer, name))
    if tokenizer.eos_token_id is not None:
        previous = getattr(text, "eos_token_id", None)
        text.eos_token_id = _united(tokenizer.eos_token_id, *(previous if isinstance(previous, list) else ()))
    previous = generation.eos_token_id
    others = previous if isinstance(previous, list) else [previous]
    generation.eos_token_id = _united(tokenizer.eos_token_id, *others, end_of_turn)


def _united(*ids: int | None) -> int | list[int] | None:
    """The ids without None and repetitions; a single one without a list."""
    kept = list(dict.fromkeys(one for one in ids if one is not None))
    return kept if len(kept) > 1 else next(iter(kept), None)


def _square_tokens(model: VisionLanguageForConditionalGeneration, image_processor: Any) -> int:
    size = output_size(image_processor, model.config.vision_config)
    grid = get_square_grid(model.model.vision_tower, *size)
    rows, columns = (side // model.config.merge_size for side in grid)
    reduction = model.config.reduction
    return rows * columns if reduction is None else reduction.count_tokens(rows, columns)
