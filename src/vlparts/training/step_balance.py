"""Balance loss of experts over a whole optimizer step, with all its micro-batches and processes."""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from transformers.modeling_utils import PreTrainedModel

from ..parts.moe_losses import balance_loss, find_balance_loss
from ..parts.moe_routing import expert_counts

__all__ = ["StepBalance"]


class StepBalance:
    """Balance loss of one optimizer step (arXiv 2501.11873), as the model itself would compute it for the whole step.

    The load of an expert is a ratio of counts, so the mean of the balance losses of micro-batches is not that of the
    step. [`count`] every micro-batch, then [`all_reduce`]. The sum of [`loss`] over all micro-batches and processes is
    the balance loss of the step.

    Args:
        model: The causal language model, composed or not.

    Raises:
        ValueError: If the model adds no balance loss to its loss.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.config = model.config.get_text_config()
        self.text = model.get_decoder()
        self.coefficient = getattr(self.config, "router_aux_loss_coef", None) or 0.0
        # Ours add the loss whenever there is a coefficient, native models if they are told to return router logits.
        self.is_native = not hasattr(self.text, "get_balance_loss")
        if not self.coefficient or (self.is_native and not getattr(self.config, "output_router_logits", False)):
            raise ValueError(
                "`balance_over='step'` requires a model with a balance loss: `router_aux_loss_coef` above 0 and, in "
                f"models of transformers, `output_router_logits=True`, got {type(model).__name__}."
            )
        find_balance_loss(self.text)  # raises for a model whose balance loss is unknown
        self._counts: list[Tensor] = []

    @torch.no_grad()
    def count(self, router_logits: tuple[Tensor, ...], attention_mask: Any = None) -> None:
        """Add the choices of a micro-batch.

        Args:
            router_logits: `(T, E)` of each layer, from the outputs of the model.
            attention_mask: `(B, S)`, 0 at padding; or None.
        """
        pools = self._pools(router_logits, attention_mask)
        counts = [expert_counts(self._chosen(logits), logits.shape[1], mask) for logits, mask in pools]
        self._counts = [a + b for a, b in zip(self._counts, counts, strict=True)] if self._counts else counts

    def all_reduce(self) -> None:
        """Sum the counts over processes; call it once, after the last micro-batch."""
        if dist.is_available() and dist.is_initialized():
            for counts in self._counts:
                dist.all_reduce(counts)

    def loss(self, router_logits: tuple[Tensor, ...], attention_mask: Any = None) -> Tensor:
        """Compute the share of a micro-batch in the loss of the step, with its coefficient, of shape `()`."""
        losses = [
            balance_loss(
                logits,
                self._chosen(logits),
                scoring="softmax" if self.is_native else self.config.scoring,
                form="global",
                token_mask=mask,
                counts=counts,
                group="local",
            )
            for (logits, mask), counts in zip(self._pools(router_logits, attention_mask), self._counts, strict=True)
        ]
        # transformers' loss counts each of the chosen experts, ours the share of each token.
        factor = self.config.num_experts_per_tok if self.is_native else 1
        return torch.stack(losses).mean() * (self.coefficient * factor)

    def _chosen(self, logits: Tensor) -> Tensor:
        if self.is_native:
            return logits.detach().topk(self.config.num_experts_per_tok, dim=-1).indices
        return self.text.get_chosen_experts(logits)

    def _pools(self, router_logits: tuple[Tensor, ...], attention_mask: Any) -> list[tuple[Tensor, Tensor | None]]:
        """Logits and masks of what is balanced together: each layer in our models, all layers in transformers'."""
        layers = [one.to(router_logits[0].device) for one in router_logits]
        mask = None
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            mask = attention_mask.to(layers[0].device).bool().flatten()
        if not self.is_native:
            return [(one, mask) for one in layers]
        return [(torch.cat(layers), None if mask is None else mask.repeat(len(layers)))]
