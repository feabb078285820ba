"""The weighted loss in transformers' Trainer, for native models too."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_utils import unwrap_peft_model

from ..losses.causal_lm import weighted_causal_lm_loss
from ..losses.normalizer import LossNormalizer
from ..losses.weights import Denominators, resolve_mix, weigh_tokens
from .weighted_evaluation import EvaluationSums
from .weighted_inputs import WEIGHT_INPUTS, WeightedLabels, take_weights, without_samples

__all__ = ["WeightedLossTrainer"]

_KEPT = ("loss_weights", "sample_weights", "token_weights")


class NotedLoss:
    """The loss `vlparts_weighted`, which notes whether weights have reached it.

    Attributes:
        reached: Whether it was called with weights since this was last set to False.
    """

    def __init__(self) -> None:
        self.reached = False

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """[`weighted_causal_lm_loss`]."""
        self.reached = self.reached or kwargs.get("loss_weights") is not None
        return weighted_causal_lm_loss(*args, **kwargs)


class WeightedLossTrainer(Trainer):
    """transformers' Trainer with the weighted loss; also a mixin: `class Mine(WeightedLossTrainer, SomeTrainer)`.

    The denominators of the loss are those of a whole optimiser step, over its micro-batches and all processes. So one
    step has the same loss and gradients however its samples are packed, split and spread. Each micro-batch goes to the
    model with `loss_weights` `(B, S)`, the final weight of each token, and the model's loss is their sum times the
    tokens' cross-entropies. What else a batch may hold stands at [`take_weights`]; [`WeightedCollator`] brings it.

    The loss of an evaluation is the same form over the whole evaluation set, on the cross-entropy alone. A balance
    loss that a model with experts adds is added once for each micro-batch and process, as Trainer itself does it.

    Args:
        *args: As for Trainer.
        preset: "token", "sample", "square" or "openpangu_mix", in place of the next two.
        mix: Share of sample averaging, from 0 to 1; see [`weigh_tokens`].
        length_exponent: See [`weigh_tokens`].
        **kwargs: As for Trainer.

    Raises:
        ValueError: If an option makes no sense, if the model's loss is not the cross-entropy of next tokens, or if the
            Trainer is to compute another one.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        preset: str | None = None,
        mix: float | None = None,
        length_exponent: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.mix, self.length_exponent = resolve_mix(preset, mix, length_exponent)
        self._noted_loss = NotedLoss()
        self._evaluation: EvaluationSums | None = None
        super().__init__(*args, **kwargs)
        for name, unwanted in (
            ("compute_loss_func", self.compute_loss_func is not None),
            ("label_smoothing_factor", self.args.label_smoothing_factor != 0),
            ("use_liger_kernel", self.args.use_liger_kernel),
            ("parallelism_config", self.get_cp_size() * self.get_sp_size() > 1),
        ):
            if unwanted:
                raise ValueError(f"`{name}` computes the loss in another way; WeightedLossTrainer cannot weigh it.")
        self._set_loss()

    def _set_loss(self) -> None:
        """Give the model the weighted loss; a model that was built anew for another trial has lost it."""
        model = unwrap_peft_model(self.accelerator.unwrap_model(self.model))
        loss = getattr(model, "loss_function", None)
        if loss is self._noted_loss:
            return
        known = loss in (ForCausalLMLoss, weighted_causal_lm_loss) or isinstance(loss, NotedLoss)
        if not known or getattr(model.config, "is_encoder_decoder", False):
            raise ValueError(
                "`model` must be trained on next tokens with transformers' ForCausalLMLoss, got "
                f"{type(model).__name__}."
            )
        parameters = inspect.signature(model.forward).parameters
        takes_weights = "loss_weights" in parameters or any(one.kind == one.VAR_KEYWORD for one in parameters.values())
        if "labels" not in parameters or not takes_weights:
            raise ValueError(
                "`model` must take `labels`, and `loss_weights` or **kwargs; "
                f"{type(model).__name__}.forward takes {', '.join(parameters)}."
            )
        # Not `loss_type`: Trainer's count of tokens goes by it.
        model.loss_function = self._noted_loss

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the weights among the dataset's columns."""
        super()._set_signature_columns_if_needed()
        names = [*WEIGHT_INPUTS, *getattr(self.data_collator, "fields", ())]
        self._signature_columns += [name for name in names if name not in self._signature_columns]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Trainer's, which leaves weights as precise as they are."""
        weights = {name: inputs[name] for name in _KEPT if inputs.get(name) is not None}
        prepared = super()._prepare_inputs({name: inputs[name] for name in inputs if name not in weights})
        return {**prepared, **{name: torch.as_tensor(one).to(self.args.device) for name, one in weights.items()}}

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of a step, with their weights in it."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._set_loss()
        normalizer = LossNormalizer(mix=self.mix, length_exponent=self.length_exponent)
        taken = [self._take(batch) for batch in batches]
        for _, found in taken:
            normalizer.add(found.labels, **found.options)
        normalizer.all_reduce(device=device)
        return [{**inputs, "loss_weights": self._weigh(found, normalizer)} for inputs, found in taken], count

    def _take(self, batch: Any) -> tuple[dict[str, Any], WeightedLabels]:
        inputs, found = take_weights(batch)
        if found is None:
            raise ValueError(f"A batch must hold `labels` or `shift_labels`, got {', '.join(map(str, batch))}.")
        return inputs, found

    def _weigh(self, found: WeightedLabels, normalizer: Denominators | None = None) -> Tensor:
        """Weights of a batch, `(B, S)` float32, or float64 for a model in it; on the CPU."""
        weights = weigh_tokens(
            found.labels,
            mix=self.mix,
            length_exponent=self.length_exponent,
            normalizer=normalizer,
            dtype=torch.float64,
            **found.options,
        )
        double = next(self.model.parameters()).dtype == torch.float64
        return weights.weights.view(found.labels.shape).to(torch.float64 if double else torch.float32)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's loss with weights, such that its mean over processes is that of the step.

        A batch that did not come with a step, as in evaluation, is divided by its own weights.
        """
        found = None
        if inputs.get("loss_weights") is None:
            inputs, found = self._take(inputs)
            inputs = {**inputs, "loss_weights": self._weigh(found).to(self.args.device)}
        self._noted_loss.reached = False
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if not self._noted_loss.reached:
            raise ValueError(
                f"The weights did not reach the loss of {type(self.model).__name__}, which computes it without "
                "`self.loss_function` or does not pass **kwargs on to it."
            )
        if found is None:
            # Gradients are averaged over processes, and losses over DataParallel's devices.
            loss = loss * (self.accelerator.num_processes * max(1, self.args.n_gpu))
        elif self._evaluation is not None:
            self._evaluation.add(_logits(outputs), self._counted(found), inputs.get("shift_labels") is not None)
        return (loss, outputs) if return_outputs else loss

    def _counted(self, found: WeightedLabels) -> WeightedLabels:
        """An evaluation batch without what its process was given again, to have as much as others."""
        state, size = self.accelerator.gradient_state, self.args.eval_batch_size
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return found
        kept = max(0, state.remainder - self.args.process_index * size)
        return found if kept >= size else without_samples(found, kept, size)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Trainer's; where there are no labels, the model does not get the weights either."""
        if inputs.get("labels") is None:
            inputs = take_weights(inputs)[0]
        return super().prediction_step(model, inputs, *args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Trainer's, with the weighted loss over the whole set in place of a mean over batches."""
        self._set_loss()
        self._evaluation = sums = EvaluationSums(self.mix, self.length_exponent)
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            self._evaluation = None
        sums.all_reduce(self.args.device)
        if f"{metric_key_prefix}_loss" in output.metrics:
            output.metrics[f"{metric_key_prefix}_loss"] = sums.compute()
        return output


def _logits(outputs: Any) -> Tensor:
    logits = outputs.get("logits") if isinstance(outputs, dict) else None
    if logits is None:
        raise ValueError(f"The model must return `logits` in evaluation, got {type(outputs).__name__} without.")
    return logits
