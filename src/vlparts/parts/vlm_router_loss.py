"""The balance loss of a text model with experts inside a composed model: of ours, or of transformers' own.

Shapes: B samples, S tokens of each, T = B * S, E experts.
"""

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

__all__ = ["asks_for_router_logits", "balances_every_loss", "text_balance_loss"]


def asks_for_router_logits(text_model: PreTrainedModel, asked: bool | None) -> bool:
    """Whether the logits of the text model's routers are asked for, which are outputs then.

    Args:
        text_model: The text model without its head.
        asked: The argument `output_router_logits`; None for that of the text model's configuration.

    Raises:
        ValueError: If they are, and the text model has no balance loss that is known.
    """
    asked = getattr(text_model.config, "output_router_logits", False) if asked is None else asked
    if asked and not hasattr(text_model, "get_balance_loss"):
        _native_function(text_model)
    return bool(asked)


def balances_every_loss(text_model: PreTrainedModel) -> bool:
    """Whether the balance loss is part of the loss even where router logits are not asked for.

    It is for a model with `get_balance_loss`, as ours, if its `router_aux_loss_coef` is above 0. transformers' own
    models add theirs where router logits are asked for and nowhere else, under their own heads and here.
    """
    return hasattr(text_model, "get_balance_loss") and text_model.config.router_aux_loss_coef > 0


def text_balance_loss(text_model: PreTrainedModel, router_logits: tuple[Tensor, ...], attention_mask: Any) -> Tensor:
    """The balance loss as the text model's own head computes it, without padding.

    Args:
        text_model: The text model without its head.
        router_logits: `(T, E)` of each layer with experts.
        attention_mask: `(B, past + S)`, 0 at padding. None, or a mask that is already prepared, says nothing.

    Returns:
        The loss, of shape `()`, without its coefficient.

    Raises:
        ValueError: If the text model has no balance loss that is known, or did not record the logits.
    """
    if hasattr(text_model, "get_balance_loss"):
        return text_model.get_balance_loss(router_logits, attention_mask)
    if router_logits is None:
        raise ValueError(f"`router_logits` must be a tuple, got None: {type(text_model).__name__} records none.")
    mask = None
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        mask = attention_mask[:, -(len(router_logits[0]) // len(attention_mask)) :]
    config = text_model.config
    return _native_function(text_model)(
        router_logits, num_experts=config.num_experts, top_k=config.num_experts_per_tok, attention_mask=mask
    )


def _native_function(text_model: PreTrainedModel) -> Callable[..., Tensor]:
    """`load_balancing_loss_func` of the file of a native model; each file of transformers has its own."""
    # The class itself may be a subclass from elsewhere: of the user, or of FSDP.
    files = [sys.modules.get(kind.__module__) for kind in type(text_model).__mro__]
    functions = (getattr(file, "load_balancing_loss_func", None) for file in files)
    function = next((one for one in functions if one is not None), None)
    fields = ("router_aux_loss_coef", "num_experts", "num_experts_per_tok")
    if function is None or any(getattr(text_model.config, name, None) is None for name in fields):
        raise ValueError(
            f"`output_router_logits` must not be True for a text model without a balance loss, got "
            f"{type(text_model).__name__}."
        )
    return function
