"""Models and Trainer options that the weighted loss does not support raise."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from transformers import LlavaModel, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.training.test_weighted_loss_native import composed, step
from tests.training.weighted_making import VOCABULARY, arguments, llama, padded
from vlparts.training.weighted_loss import WeightedLossTrainer


class OwnLoss(nn.Module):
    """A model that passes no further arguments to its loss."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.config, self.loss_function = inner, inner.config, inner.loss_function

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
        outputs = self.inner(input_ids=input_ids, attention_mask=attention_mask)
        loss = self.loss_function(outputs.logits, labels, VOCABULARY)
        return CausalLMOutputWithPast(loss=loss, logits=outputs.logits)


def test_a_model_that_drops_the_weights_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`loss_weights` did not reach the loss of OwnLoss"):
        step(tmp_path, OwnLoss(llama()), padded, "sample")


class Narrow(OwnLoss):
    """A model whose forward takes no further arguments."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
        raise NotImplementedError


REFUSED: dict[str, tuple[Any, dict[str, Any], dict[str, Any], str]] = {
    "preset": (llama, {"preset": "mean"}, {}, "`preset` must be one of token, sample"),
    "mix": (llama, {"preset": "token", "mix": 0.5}, {}, "`mix` belongs to `preset='token'` already"),
    "exponent": (llama, {"length_exponent": -1.0}, {}, "`length_exponent` must be a finite number of at least 0"),
    "function": (llama, {"compute_loss_func": print}, {}, "`compute_loss_func` computes another loss"),
    "smoothing": (llama, {}, {"label_smoothing_factor": 0.1}, "`label_smoothing_factor` computes another loss"),
    "headless": (
        lambda: LlavaModel(composed("llava").config),
        {},
        {},
        "`model` must take `labels`, .* LlavaModel.forward",
    ),
    "narrow": (
        lambda: Narrow(llama()),
        {},
        {},
        r"`loss_weights` or \*\*kwargs; Narrow.forward takes input_ids, labels",
    ),
    "encoder and decoder": (
        lambda: T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
        {},
        {},
        "`model` must be a decoder with .* got T5ForConditionalGeneration",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_models_and_options_raise(tmp_path: Path, case: str) -> None:
    model, options, changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        WeightedLossTrainer(model(), arguments(tmp_path, **changes), data_collator=padded, **options)
