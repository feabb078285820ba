"""transformers' Trainer with the weighted loss, for the models of vlparts and of transformers."""

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Trainer
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_utils import unwrap_peft_model

from ..losses._distributed import sum_over_processes
from ..losses.causal_lm import weighted_causal_lm_loss
from ..losses.normalizer import LossNormalizer
from ..losses.weights import Denominators, resolve_mix, weigh_tokens
from .weighted_inputs import WEIGHT_INPUTS, WeightedLabels, ignore_repeated, take_weights

__all__ = ["WeightedLossTrainer"]

_KEEP_DTYPE = ("loss_weights", "sample_weights", "token_weights")


class _TrackedLoss:
    """[`weighted_causal_lm_loss`] that records whether it received weights.

    Attributes:
        received_weights: True if it was called with weights since this was last set to False.
    """

    def __init__(self) -> None:
        self.received_weights = False

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the loss."""
        self.received_weights = self.received_weights or kwargs.get("loss_weights") is not None
        return weighted_causal_lm_loss(*args, **kwargs)


class _Undivided(NamedTuple):
    """Denominators of 1."""

    samples: Tensor
    tokens: Tensor


class _EvaluationSums:
    """Accumulates the numerators and denominators of the weighted loss over an evaluation set.

    Args:
        mix: See [`weigh_tokens`].
        length_exponent: See [`weigh_tokens`].
    """

    def __init__(self, mix: float, length_exponent: float) -> None:
        self.mix, self.length_exponent = mix, length_exponent
        self._sums = torch.zeros(4, dtype=torch.float64)

    def add(self, logits: Tensor, targets: WeightedLabels, shifted: bool = False) -> None:
        """Add a batch.

        Args:
            logits: `(B, S, V)`.
            targets: Its labels and weights.
            shifted: Whether the labels are already shifted.
        """
        one = torch.ones((), dtype=torch.float64)
        undivided = _Undivided(one, one)
        for part, mix in enumerate((1.0, 0.0)):  # the sample average, then the token average
            weights = weigh_tokens(
                targets.labels,
                mix=mix,
                length_exponent=self.length_exponent,
                normalizer=undivided,
                dtype=torch.float64,
                **targets.options,
            )
            if mix == self.mix or 0 < self.mix < 1:
                loss = weighted_causal_lm_loss(
                    logits,
                    None if shifted else targets.labels,
                    logits.shape[-1],
                    shift_labels=targets.labels if shifted else None,
                    loss_weights=weights.weights.view(targets.labels.shape),
                )
                self._sums[part] += loss.detach().cpu()
            self._sums[part + 2] += weights.total_samples if mix else weights.total_tokens

    def all_reduce(self, device: torch.device) -> None:
        """Sum over processes.

        Args:
            device: Device of the process group's backend.
        """
        self._sums = sum_over_processes(self._sums, device=device)

    def compute(self) -> float:
        """Return the loss over all batches added; 0 if nothing has weight."""
        by_sample, by_token, samples, tokens = self._sums.tolist()
        loss = self.mix * by_sample / samples if samples else 0.0
        return loss + ((1 - self.mix) * by_token / tokens if tokens else 0.0)


class WeightedLossTrainer(Trainer):
    """transformers' Trainer with the weighted loss; also a mixin: `class Mine(WeightedLossTrainer, SomeTrainer)`.

    The loss is normalized over a whole optimizer step, with all its micro-batches and processes. So the loss and
    gradients of a step do not depend on how its samples are packed and distributed. Each micro-batch is passed to the
    model with `loss_weights` `(B, S)`, the final weight of each token; the model's loss is the sum of the tokens'
    cross-entropies times these weights. See [`take_weights`] for the weights that a batch may contain, and
    [`WeightedCollator`] for a collator that adds them.

    The evaluation loss is the same weighted cross-entropy over the whole evaluation set. A balance loss of experts is
    added once per micro-batch and process in training, as in Trainer itself, and not in evaluation.

    Args:
        *args: Passed to Trainer.
        preset: "token", "sample", "square" or "openpangu_mix", instead of the next two.
        mix: Share of sample averaging, from 0 to 1; see [`weigh_tokens`].
        length_exponent: See [`weigh_tokens`].
        **kwargs: Passed to Trainer.

    Raises:
        ValueError: If an option is invalid, the model's loss is not the next-token cross-entropy, or the Trainer is
            configured to compute another loss.
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
        self._tracked_loss = _TrackedLoss()
        self._evaluation: _EvaluationSums | None = None
        super().__init__(*args, **kwargs)
        for name, unwanted in (
            ("compute_loss_func", self.compute_loss_func is not None),
            ("label_smoothing_factor", self.args.label_smoothing_factor != 0),
            ("use_liger_kernel", self.args.use_liger_kernel),
            ("parallelism_config", self.get_cp_size() * self.get_sp_size() > 1),
        ):
            if unwanted:
                raise ValueError(f"`{name}` computes another loss; WeightedLossTrainer does not support it.")
        self._set_loss()

    def _set_loss(self) -> None:
        """Set the model's loss function; called again before use, since `model_init` may have built a new model."""
        model = unwrap_peft_model(self.accelerator.unwrap_model(self.model))
        loss = getattr(model, "loss_function", None)
        if loss is self._tracked_loss:
            return
        supported = loss in (ForCausalLMLoss, weighted_causal_lm_loss) or isinstance(loss, _TrackedLoss)
        if not supported or getattr(model.config, "is_encoder_decoder", False):
            raise ValueError(
                f"`model` must be a decoder with transformers' ForCausalLMLoss, got {type(model).__name__}."
            )
        parameters = inspect.signature(model.forward).parameters
        takes_weights = "loss_weights" in parameters or any(one.kind == one.VAR_KEYWORD for one in parameters.values())
        if "labels" not in parameters or not takes_weights:
            raise ValueError(
                "`model` must take `labels`, and `loss_weights` or **kwargs; "
                f"{type(model).__name__}.forward takes {', '.join(parameters)}."
            )
        # Not `loss_type`, by which Trainer decides how to count tokens.
        model.loss_function = self._tracked_loss

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns of the dataset with weights."""
        super()._set_signature_columns_if_needed()
        names = [*WEIGHT_INPUTS, *getattr(self.data_collator, "fields", ())]
        self._signature_columns += [name for name in names if name not in self._signature_columns]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Prepare the inputs as Trainer does, but move weights to the device without casting them."""
        weights = {name: inputs[name] for name in _KEEP_DTYPE if inputs.get(name) is not None}
        prepared = super()._prepare_inputs({name: inputs[name] for name in inputs if name not in weights})
        return {**prepared, **{name: torch.as_tensor(one).to(self.args.device) for name, one in weights.items()}}

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Return the micro-batches of a step with their final weights, normalized over the step."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._set_loss()
        normalizer = LossNormalizer(mix=self.mix, length_exponent=self.length_exponent)
        taken = [self._take(batch) for batch in batches]
        for _, targets in taken:
            normalizer.add(targets.labels, **targets.options)
        normalizer.all_reduce(device=device)
        return [{**inputs, "loss_weights": self._weigh(targets, normalizer)} for inputs, targets in taken], count

    def _take(self, batch: Any) -> tuple[dict[str, Any], WeightedLabels]:
        inputs, targets = take_weights(batch)
        if targets is None:
            raise ValueError(f"A batch must have `labels` or `shift_labels`, got {', '.join(map(str, batch))}.")
        return inputs, targets

    def _weigh(self, targets: WeightedLabels, normalizer: Denominators | None = None) -> Tensor:
        """Final weights of a batch, `(B, S)` float32, or float64 for a float64 model; on the CPU."""
        weights = weigh_tokens(
            targets.labels,
            mix=self.mix,
            length_exponent=self.length_exponent,
            normalizer=normalizer,
            dtype=torch.float64,
            **targets.options,
        )
        double = next(self.model.parameters()).dtype == torch.float64
        return weights.weights.view(targets.labels.shape).to(torch.float64 if double else torch.float32)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the model's weighted loss, scaled so that its mean over processes is the loss of the step.

        A batch that is not part of a step, as in evaluation, is normalized by itself.
        """
        targets = None
        if inputs.get("loss_weights") is None:
            inputs, targets = self._take(inputs)
            inputs = {**inputs, "loss_weights": self._weigh(targets).to(self.args.device)}
        self._tracked_loss.received_weights = False
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if not self._tracked_loss.received_weights:
            raise ValueError(
                f"`loss_weights` did not reach the loss of {type(self.model).__name__}; its forward must call "
                "`self.loss_function` and pass **kwargs to it."
            )
        if targets is None:
            # Gradients are averaged over processes, and losses over DataParallel's devices.
            loss = loss * (self.accelerator.num_processes * max(1, self.args.n_gpu))
        elif self._evaluation is not None:
            self._evaluation.add(
                _logits(outputs), self._without_repeated(targets), inputs.get("shift_labels") is not None
            )
        return (loss, outputs) if return_outputs else loss

    def _without_repeated(self, targets: WeightedLabels) -> WeightedLabels:
        """Ignore samples of an evaluation batch that the loader repeats to give all processes equally many."""
        state, size = self.accelerator.gradient_state, self.args.eval_batch_size
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return targets
        kept = max(0, state.remainder - self.args.process_index * size)
        return targets if kept >= size else ignore_repeated(targets, kept, size)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Run Trainer's prediction step; without labels, weights are not passed to the model."""
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
        """Run Trainer's evaluation loop, with the weighted loss over the whole set instead of a mean over batches."""
        self._set_loss()
        self._evaluation = sums = _EvaluationSums(self.mix, self.length_exponent)
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
        raise ValueError(f"`model` must return `logits` in evaluation, got {type(outputs).__name__} without them.")
    return logits
