"""Balance loss of experts over a whole optimizer step, with all its micro-batches and processes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from transformers.modeling_utils import PreTrainedModel

from ..parts.moe_losses import balance_loss, find_balance_loss
from ..parts.moe_routing import expert_counts, get_token_mask
from ..parts.packed_samples import sequence_bounds

__all__ = ["StepBalance", "balances_sequences"]


def balances_sequences(model: PreTrainedModel) -> bool:
    """Whether a causal language model adds the mean balance loss of sequences to its loss."""
    config = model.config.get_text_config()
    return getattr(config, "router_aux_loss_form", None) == "sequence" and config.router_aux_loss_coef > 0


class StepBalance:
    """Balance loss of one optimizer step (arXiv 2501.11873), as the model itself would compute it for the whole step.

    The load of an expert is a ratio of counts, so the mean of the balance losses of micro-batches is not that of the
    step. [`count`] every micro-batch, then [`all_reduce`]. The sum of [`loss`] over all micro-batches and processes is
    the balance loss of the step.

    With `router_aux_loss_form="sequence"` sequences are counted instead of choices, and a micro-batch has the weight
    of its sequences, so that the loss of the step is the mean over all its sequences.

    Args:
        model: The causal language model, composed or not.

    Attributes:
        by_sequence: Whether sequences are counted, which needs no router logits.
        coefficient: Coefficient of the balance loss.

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
        self.by_sequence = balances_sequences(model)
        self._counts: list[Tensor] = []

    @torch.no_grad()
    def count(self, inputs: Mapping[str, Any], router_logits: tuple[Tensor, ...] = ()) -> None:
        """Add the choices, or the sequences, of a micro-batch.

        Args:
            inputs: Inputs of the model.
            router_logits: `(T, E)` of each layer, from the outputs of the model; not needed for sequences.
        """
        if self.by_sequence:
            counts = [_count_sequences(inputs)]
        else:
            pools = self._pools(router_logits, inputs.get("attention_mask"))
            counts = [expert_counts(self._chosen(logits), logits.shape[1], mask) for logits, mask in pools]
        self._counts = [a + b for a, b in zip(self._counts, counts, strict=True)] if self._counts else counts

    def all_reduce(self, device: torch.device | None = None) -> None:
        """Sum the counts over processes; call it once, after the last micro-batch.

        Args:
            device: Device of the process group's backend. Default: that of the counts.
        """
        self._counts = [counts.to(device or counts.device) for counts in self._counts]
        if dist.is_available() and dist.is_initialized():
            for counts in self._counts:
                dist.all_reduce(counts)

    def share(self, inputs: Mapping[str, Any]) -> float:
        """Compute the share of a micro-batch in the sequences of the step; 0 if there are none."""
        (total,) = self._counts
        return int(_count_sequences(inputs)) / max(int(total), 1)

    def loss(self, inputs: Mapping[str, Any], router_logits: tuple[Tensor, ...]) -> Tensor:
        """Compute the share of a micro-batch in the loss of the step, with its coefficient, of shape `()`."""
        if self.by_sequence:
            shape, *sequences = _sequence_inputs(inputs)
            loss = self.text.get_balance_loss(router_logits, shape[0], *sequences)
            return loss * (self.coefficient * self.share(inputs))
        attention_mask = inputs.get("attention_mask")
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


def _sequence_inputs(inputs: Mapping[str, Any]) -> tuple[tuple[int, int], Any, Tensor | None, Tensor | None]:
    """B and S, and the inputs that determine the sequences."""
    tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    return (
        (tokens.shape[0], tokens.shape[1]),
        inputs.get("attention_mask"),
        inputs.get("position_ids"),
        inputs.get("cu_seq_lens_q"),
    )


def _count_sequences(inputs: Mapping[str, Any]) -> Tensor:
    """Count the sequences of a batch that have a real token, of shape `()` int64."""
    shape, attention_mask, *sequences = _sequence_inputs(inputs)
    bounds = sequence_bounds(shape, attention_mask, *sequences)
    mask = get_token_mask(attention_mask, shape[1])
    if mask is None:
        return (bounds.diff() > 0).sum()
    real = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
    return (real[bounds.to(real.device)].diff() > 0).sum()
