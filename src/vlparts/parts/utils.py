"""Helpers shared by many parts: presets, Auto classes, the ignore index, checks of integers."""

import math
import operator
from collections.abc import Iterable, Iterator
from copy import deepcopy
from typing import TYPE_CHECKING, Any, ClassVar, Self, Unpack

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import TransformersKwargs

if TYPE_CHECKING:
    ForwardKwargs = Any  # mypy does not read transformers
else:
    ForwardKwargs = Unpack[TransformersKwargs]
    """Options of a forward pass; tools read from the annotation that `output_attentions` is among them."""

IGNORE_INDEX = -100
"""Label of a token or an image that losses ignore, as in PyTorch and transformers."""

# What transformers passes to every model, and what batches of packed images say of their images beside the inputs.
# Models that are checkpointed get `use_cache=False`.
_MODEL_KWARGS = frozenset(
    {*TransformersKwargs.__annotations__, "return_dict", "use_cache", "image_mask", "indices", "labels"}
)


def refuse_second_derivative(what: str) -> None:
    """Refuse `create_graph=True` in the backward pass of a `torch.autograd.Function` that is differentiable once.

    PyTorch's `once_differentiable` raises no error where the gradient of the output needs none itself, as at the end
    of the graph: the gradients are then returned without a graph, as if their derivatives were zero.

    Args:
        what: Subject of the error message, with its verb, such as "The losses are".

    Raises:
        RuntimeError: If gradients are recorded, which PyTorch does in a backward pass with `create_graph=True` only.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{what} differentiable once; got `create_graph=True`.")


def add_auto_classes(model: PreTrainedModel, **classes: type[PreTrainedModel]) -> None:
    """Add classes of the model's own file to `config.auto_map` before the model is saved.

    transformers writes only the Auto class that a model is registered for. With this, `AutoModel` also finds the model
    without its head in the same folder.

    Args:
        model: The model. Nothing happens if it is not registered for an Auto class, since its code is not saved then.
        **classes: Model classes by the name of their Auto class.
    """
    if model._auto_class is None:
        return
    module = type(model).__module__.split(".")[-1]
    auto_map = getattr(model.config, "auto_map", None) or {}
    model.config.auto_map = auto_map | {
        name: f"{module}.{model_class.__name__}" for name, model_class in classes.items()
    }


def mark_initialized(model: nn.Module) -> None:
    """Mark the modules of a model as initialised, so that `post_init` and `init_weights` change no weight.

    transformers marks the modules of models that it builds or loads. Models that are put together of such parts, or
    filled tensor by tensor, need this call at the end. Modules on the meta device have no weights and are not marked.

    Args:
        model: The model with all weights.
    """
    for module in model.modules():
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if not any(tensor.is_meta for tensor in tensors):
            module._is_hf_initialized = True  # type: ignore[assignment]


class SubmodelInitializationMixin:
    """Initialize the models that a composed model holds as they initialize themselves.

    transformers initializes all modules of a model by the rules of the outermost class. Under a class from outside
    transformers it skips modules without weights of their own, although the rule of a native model may compute weights
    and buffers of their children there: these would stay uninitialized where a file does not hold them.
    """

    def initialize_weights(self) -> None:
        """Initialize all weights and buffers that were not loaded."""
        for submodel in _submodels(self):
            submodel.initialize_weights()
        super().initialize_weights()  # type: ignore[misc]


def _submodels(module: Any) -> Iterator[PreTrainedModel]:
    """Return the outermost models inside of a module."""
    for child in module.children():
        if isinstance(child, PreTrainedModel):
            yield child
        else:
            yield from _submodels(child)


def activation_dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """Return the dtype of a module's activations: that of its first floating-point parameter of 16 bits or more.

    Quantized layers hold integers, float8, or no parameter.

    Args:
        module: The module.
        default: Dtype if the module has no such parameter.
    """
    dtypes = (parameter.dtype for parameter in module.parameters())
    return next((dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1), default)


_SERVERS = {"vllm": "vLLM", "vllm_mla": "vLLM", "sglang": "SGLang"}


def server_of(config: PreTrainedConfig) -> str | None:
    """Return the server that runs a text model with this configuration, "vLLM" or "SGLang", or None.

    Servers mark it by their attention implementation. The tokens of several requests are one row then, and the
    server's attention keeps them apart.
    """
    return _SERVERS.get(config._attn_implementation)


def slice_for_logits(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Select the hidden states `(B, kept, H)` from which logits are computed.

    Args:
        hidden_states: `(B, S, H)`.
        logits_to_keep: Number of positions at the end, 0 for all; or the indices of the positions.
    """
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    return hidden_states[:, kept]


class NamedPresets:
    """Mixin that gives a configuration class `presets` and `from_preset`.

    Attributes:
        named_presets: Fields of each preset that differ from the defaults.
    """

    named_presets: ClassVar[dict[str, dict[str, Any]]] = {}

    @classmethod
    def presets(cls) -> tuple[str, ...]:
        """Return the names of the presets."""
        return tuple(cls.named_presets)

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> Self:
        """Build the configuration of a preset.

        Args:
            name: One of [`presets`].
            **changes: Fields that replace those of the preset.

        Raises:
            ValueError: If there is no preset of this name.
        """
        if name not in cls.named_presets:
            raise ValueError(f"`name` must be one of {', '.join(cls.named_presets)}, got {name!r}.")
        return cls(**{**deepcopy(cls.named_presets[name]), **changes})


def positive_integer(value: object, name: str) -> int:
    """Return `value` as a Python int.

    Args:
        value: Any integer type; not a bool.
        name: Name of the argument in an error message.

    Raises:
        ValueError: If it is not an integer of at least 1.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or number < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
    return number


def check_minimum(config: PreTrainedConfig, minimum: int, *names: str) -> None:
    """Check that fields of a configuration are at least `minimum`.

    Raises:
        ValueError: If one is smaller.
    """
    for name in names:
        if getattr(config, name) < minimum:
            raise ValueError(f"`{name}` must be at least {minimum}, got {getattr(config, name)}.")


def check_encoder_kwargs(kwargs: Iterable[str]) -> None:
    """Check that further keyword arguments of an encoder are known, though it may not use them.

    They are those that transformers defines for every model, and `image_mask`, `indices` and `labels` of batches.

    Args:
        kwargs: Their names.

    Raises:
        ValueError: If one is another, such as a misspelled one, which would have no effect.
    """
    unknown = [name for name in kwargs if name not in _MODEL_KWARGS]
    if unknown:
        raise ValueError(
            f"`kwargs` must be among {', '.join(sorted(_MODEL_KWARGS))}, got {', '.join(unknown)}; an encoder has no "
            "such argument."
        )


def check_finite(config: PreTrainedConfig, *names: str, positive: bool = False) -> None:
    """Check that fields of a configuration are finite numbers of at least 0; None is skipped.

    Args:
        config: The configuration.
        *names: Names of the fields.
        positive: Whether 0 is excluded.

    Raises:
        ValueError: If one is negative, infinite, NaN, or 0 with `positive`.
    """
    for name in names:
        check_finite_number(name, getattr(config, name), positive=positive)


def check_finite_number(name: str, value: Any, *, positive: bool = False, signed: bool = False) -> None:
    """Check that a number is finite, and at least 0 unless `signed`, or above 0 if `positive`; None is skipped.

    Raises:
        ValueError: If it is not.
    """
    if value is None:
        return
    finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not finite or not (signed or value > 0 or (value == 0 and not positive)):
        bound = "" if signed else " above 0" if positive else " of at least 0"
        raise ValueError(f"`{name}` must be a finite number{bound}, got {value!r}.")


def check_shape(name: str, tensor: Tensor, *expected: int | None) -> None:
    """Check the shape of an input.

    Args:
        name: Name of the argument in an error message.
        tensor: The input.
        *expected: Length of each axis; None for any.

    Raises:
        ValueError: If the shape is another.
    """
    sizes = zip(tensor.shape, expected, strict=False)
    if tensor.ndim != len(expected) or any(wanted not in (size, None) for size, wanted in sizes):
        written = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"`{name}` must have shape ({written}), got {tuple(tensor.shape)}.")


def check_token_inputs(
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    *,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    past_key_values: Cache | None = None,
    vocab_size: int | None = None,
    width: int | None = None,
) -> None:
    """Check the inputs of a text model, except while compiling: which are given, their shapes, the range of ids.

    Args:
        input_ids: `(B, S)` integers. Their range is checked on the CPU only, since reading them from an accelerator
            would wait for it.
        inputs_embeds: `(B, S, width)`.
        attention_mask: `(B, cached + S)`; masks of more axes, and other objects, are left to the text model.
        position_ids: `(B, S)` or `(axes, B, S)`; B may be 1.
        past_key_values: Cache, whose tokens precede the others in `attention_mask`.
        vocab_size: Number of embeddings; None if unknown.
        width: Width of the embeddings; None if unknown.

    Raises:
        ValueError: If both or none of ids and embeddings are given, a shape or a type is another, or an id is out of
            range.
    """
    if (input_ids is None) == (inputs_embeds is None):
        given = "both" if input_ids is not None else "none"
        raise ValueError(f"Exactly one of `input_ids` and `inputs_embeds` must be given, got {given}.")
    if torch.compiler.is_compiling():
        return
    if input_ids is not None:
        check_shape("input_ids", input_ids, None, None)
        _check_ids(input_ids, vocab_size)
        samples, tokens = input_ids.shape
    else:
        assert inputs_embeds is not None
        check_shape("inputs_embeds", inputs_embeds, None, None, width)
        samples, tokens = inputs_embeds.shape[:2]
    if position_ids is not None:
        rows = 1 if position_ids.ndim > 1 and position_ids.shape[-2] == 1 else samples
        check_shape("position_ids", position_ids, *[None] * (position_ids.ndim == 3), rows, tokens)
    if isinstance(attention_mask, Tensor) and attention_mask.ndim < 3:
        cached = _cached_tokens(past_key_values)
        columns = max(tokens, attention_mask.shape[-1]) if cached is None else cached + tokens
        check_shape("attention_mask", attention_mask, samples, columns)


def _cached_tokens(past_key_values: Cache | None) -> int | None:
    """Number of tokens in a cache; None if it does not tell, or has the number on the device (static caches)."""
    if past_key_values is None:
        return 0
    if past_key_values.is_compileable:
        return None
    try:
        return past_key_values.get_seq_length()
    except ValueError:  # a cache of linear attention alone
        return None


def _check_ids(input_ids: Tensor, vocab_size: int | None) -> None:
    if input_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"`input_ids` must be int32 or int64, got {input_ids.dtype}.")
    if vocab_size is None or input_ids.device.type != "cpu" or not input_ids.numel():
        return
    lowest, highest = int(input_ids.min()), int(input_ids.max())
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(f"`input_ids` must be between 0 and {vocab_size - 1}, got {lowest} to {highest}.")
