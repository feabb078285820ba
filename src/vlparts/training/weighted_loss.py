"""transformers' Trainer with the weighted loss, for the models of vlparts and of transformers."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Trainer
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_utils import unwrap_peft_model

from ..losses.causal_lm import weighted_causal_lm_loss
from ..losses.normalizer import LossNormalizer, sum_over_processes
from ..losses.weights import Denominators, resolve_mix, weigh_tokens
from .step_balance import StepBalance, balances_sequences
from .weighted_inputs import WEIGHT_INPUTS, WeightedLabels, ignore_repeated, take_weights

__all__ = ["WeightedLossTrainer"]

_KEEP_DTYPE = ("loss_weights", "sample_weights", "token_weights")


class _TrackedLoss:
    """[`weighted_causal_lm_loss`] that records its results with weights.

    Attributes:
        results: One scalar per call with weights since this was last cleared; several under DataParallel.
    """

    def __init__(self) -> None:
        self.results: list[Tensor] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the loss."""
        loss = weighted_causal_lm_loss(*args, **kwargs)
        if kwargs.get("loss_weights") is not None:
            self.results.append(loss)
        return loss.clone()  # transformers' models add their balance loss in place


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

    What the model adds to its loss in training, such as the balance loss of experts, is averaged over the
    micro-batches and processes of a step (Trainer itself adds it up). The load of an expert is a ratio of counts, so
    this mean differs from the balance loss of the whole step, which `balance_over="step"` computes. With
    `router_aux_loss_form="sequence"` the balance loss is the mean over all sequences of the step in either case. The
    evaluation loss is the weighted cross-entropy over the whole evaluation set, without such terms.

    `compute_loss` of `SomeTrainer` must call the model with its inputs and return the model's loss. TRL's `SFTTrainer`
    computes its loss without the model's loss function, so its `compute_loss` is replaced, which also adds the entropy
    and the accuracy of tokens to the log.

    Args:
        *args: Passed to Trainer.
        preset: "token", "sample", "square" or "openpangu_mix", instead of the next two.
        mix: Share of sample averaging, from 0 to 1; see [`weigh_tokens`].
        length_exponent: See [`weigh_tokens`].
        balance_over: "micro_batch", or "step" for the balance loss of a whole step, see [`StepBalance`]. It takes a
            further forward pass over each micro-batch, without gradients and dropout, to count the choices of experts;
            with `router_aux_loss_form="sequence"` it has no effect and takes none.
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
        balance_over: str = "micro_batch",
        **kwargs: Any,
    ) -> None:
        if balance_over not in ("micro_batch", "step"):
            raise ValueError(f"`balance_over` must be 'micro_batch' or 'step', got {balance_over!r}.")
        self.mix, self.length_exponent = resolve_mix(preset, mix, length_exponent)
        self.balance_over = balance_over
        self._balance: StepBalance | None = None
        self._tracked_loss = _TrackedLoss()
        self._evaluation: _EvaluationSums | None = None
        self._given_columns = _column_names(super().__init__, args, kwargs)
        super().__init__(*args, **kwargs)
        for name, unwanted in (
            ("compute_loss_func", self.compute_loss_func is not None),
            ("label_smoothing_factor", self.args.label_smoothing_factor != 0),
            ("use_liger_kernel", self.args.use_liger_kernel),
            ("parallelism_config", self.get_cp_size() * self.get_sp_size() > 1),
            ("loss_type", self._replaces_sft and getattr(self.args, "loss_type", "nll") not in ("nll", "chunked_nll")),
        ):
            if unwanted:
                raise ValueError(f"`{name}` computes another loss; WeightedLossTrainer does not support it.")
        self._set_loss()
        if balance_over == "step":
            StepBalance(self._plain_model())  # raises for a model without a balance loss

    def _plain_model(self) -> Any:
        """The model without wrappers."""
        return unwrap_peft_model(self.accelerator.unwrap_model(self.model))

    def _set_loss(self) -> None:
        """Set the model's loss function; called again before use, since `model_init` may have built a new model."""
        model = self._plain_model()
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
        for batch in batches:
            self._check_columns_kept(batch)
        taken = [self._take(batch) for batch in batches]
        for _, targets in taken:
            normalizer.add(targets.labels, **targets.options)
        normalizer.all_reduce(device=device)
        if self.balance_over == "step" or balances_sequences(self._plain_model()):
            self._balance = self._count_balanced([inputs for inputs, _ in taken], device)
        return [{**inputs, "loss_weights": self._weigh(targets, normalizer)} for inputs, targets in taken], count

    @torch.no_grad()
    def _count_balanced(self, batches: list[dict[str, Any]], device: torch.device) -> StepBalance:
        """Count the choices of experts, or the sequences, in the micro-batches of a step."""
        balance, model = StepBalance(self._plain_model()), self.model_wrapped
        if balance.by_sequence:
            for batch in batches:
                balance.count(batch)
            balance.all_reduce(device)
            return balance
        model.eval()
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name not in ("labels", "shift_labels")}
            options = {"output_router_logits": True, "use_cache": False}
            with self.compute_loss_context_manager():
                outputs = model(**{**self._prepare_inputs(inputs), **options})
            balance.count(batch, outputs.router_logits)
        model.train()
        balance.all_reduce(device)
        return balance

    def _check_columns_kept(self, batch: Any) -> None:
        """Raise for weights of the training dataset that are not in its batches."""
        columns = getattr(self.data_collator, "fields", ("sample_weight", "token_weights"))
        for column, name in zip(columns, ("sample_weights", "token_weights"), strict=True):
            if column in self._given_columns and batch.get(name) is None:
                raise ValueError(
                    f"`train_dataset` has the column {column!r}, but its batches have no {name!r}. Wrap the "
                    "`data_collator` in WeightedCollator, and do not pack samples in a Trainer that drops the column."
                )

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
        balance = self._balance if targets is None else None
        if balance is not None:
            inputs = {**inputs, "output_router_logits": True}
        self._tracked_loss.results.clear()
        loss, outputs = self._compute_model_loss(model, inputs)
        if not self._tracked_loss.results:
            raise ValueError(
                f"`loss_weights` did not reach the loss of {type(self.model).__name__}; its forward must call "
                "`self.loss_function` and pass **kwargs to it, and "
                f"{self._next_compute_loss().__name__}.compute_loss must return the loss of that forward."
            )
        if targets is None:
            loss = self._scale(loss, balance, outputs, inputs)
        elif self._evaluation is not None:
            self._evaluation.add(
                _logits(outputs), self._without_repeated(targets), inputs.get("shift_labels") is not None
            )
        self._tracked_loss.results.clear()  # they hold the graph, with which the model could not be copied
        return (loss, outputs) if return_outputs else loss

    def _compute_model_loss(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """Compute the loss and outputs of the model."""
        if not self._replaces_sft:
            return super().compute_loss(model, inputs, return_outputs=True)
        # As SFTTrainer does: composed models read the request for router logits from their inputs alone.
        options = {"use_cache": False, **({"output_router_logits": True} if self.aux_loss_enabled else {})}
        return Trainer.compute_loss(self, model, {**inputs, **options}, return_outputs=True)

    @classmethod
    def _next_compute_loss(cls) -> type[Any]:
        """The class whose `compute_loss` follows ours."""
        order = cls.__mro__
        return next(one for one in order[order.index(WeightedLossTrainer) + 1 :] if "compute_loss" in vars(one))

    @property
    def _replaces_sft(self) -> bool:
        owner = self._next_compute_loss()
        return owner.__name__ == "SFTTrainer" and owner.__module__.startswith("trl.")

    def _scale(self, loss: Tensor, balance: StepBalance | None, outputs: Any, inputs: dict[str, Any]) -> Tensor:
        """Scale the loss of a micro-batch so that the sum over a step's micro-batches is right after averaging.

        Gradients are averaged over processes, and losses over DataParallel's devices.
        """
        weighted, processes = self._tracked_loss.results, self.accelerator.num_processes
        total = torch.stack([one.to(loss.device) for one in weighted]).sum()
        added = loss.sum() - total
        if balance is not None:
            added = added - balance.coefficient * outputs["aux_loss"].sum()
            total = total + balance.loss(inputs, outputs["router_logits"]).to(total)
        micro_batches = getattr(self, "current_gradient_accumulation_steps", 1)
        return total * processes + added / (max(1, self.args.n_gpu) * micro_batches)

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


def _column_names(initialize: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[str]:
    """Names of the columns of the `train_dataset` among a Trainer's arguments; empty if they are unknown."""
    try:
        arguments = inspect.signature(initialize).bind_partial(*args, **kwargs).arguments
    except TypeError:  # raised again, with its message, by the Trainer
        return set()
    data = {**arguments, **kwargs}.get("train_dataset")
    if isinstance(data, list) and data and isinstance(data[0], Mapping):
        return set(data[0])
    return set(getattr(data, "column_names", None) or ())


def _logits(outputs: Any) -> Tensor:
    logits = outputs.get("logits") if isinstance(outputs, dict) else None
    if logits is None:
        raise ValueError(f"`model` must return `logits` in evaluation, got {type(outputs).__name__} without them.")
    return logits
