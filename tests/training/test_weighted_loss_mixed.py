"""WeightedLossTrainer as a mixin of other Trainers: TRL's computes its loss without the model's loss function."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer

from tests.training.weighted_making import Rows, arguments, assert_same, expected_loss, llama, oracle, padded
from vlparts.training.weighted_inputs import WeightedCollator
from vlparts.training.weighted_loss import WeightedLossTrainer

MICRO_BATCHES = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}


class SFTTrainer(Trainer):
    """What TRL's class does, as far as the loss is concerned; tests/training_libraries.py has the class itself."""

    __module__ = "trl.trainer.sft_trainer"
    aux_loss_enabled = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """A loss from the logits of a forward pass without labels."""
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


class OwnLoss(SFTTrainer):
    """The same loss in a class that is not TRL's."""

    __module__ = __name__
    compute_loss = SFTTrainer.compute_loss


class Noted(Trainer):
    """A Trainer that adds to `compute_loss` and keeps the model's loss."""

    calls = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Count the calls."""
        self.calls += 1
        return super().compute_loss(*args, **kwargs)


def mixed(base: type[Trainer]) -> Any:
    return type("Mixed", (WeightedLossTrainer, base), {})


def trained(folder: Path, base: type[Trainer], data: Any = None, collator: Any = None, **changes: Any) -> Any:
    model = llama()
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    trainer = mixed(base)(
        model=model,
        args=arguments(folder, **{**MICRO_BATCHES, **changes}),
        train_dataset=data or Rows(),
        data_collator=collator or WeightedCollator(padded),
        preset="square",
    )
    loss = trainer.train().training_loss
    rate = trainer.args.learning_rate
    after = dict(model.named_parameters())
    return trainer, (loss, {name: (one - after[name].detach()) / rate for name, one in before.items()})


@pytest.mark.parametrize("base", [SFTTrainer, Noted])
def test_a_step_of_a_mixed_trainer_has_the_loss_of_the_formula(tmp_path: Path, base: type[Trainer]) -> None:
    trainer, found = trained(tmp_path, base)
    assert_same(found, oracle(llama(), "square"))
    assert getattr(trainer, "calls", 3) == 3
    wanted = expected_loss(trainer.model, [Rows()[index] for index in range(8)], "square").item()
    assert abs(trainer.evaluate(Rows())["eval_loss"] - wanted) < 1e-6


def test_another_trainer_that_computes_its_own_loss_raises(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"did not reach the loss of Llama.*OwnLoss.compute_loss must return the loss"
    ):
        trained(tmp_path, OwnLoss)


class Columns(Rows):
    """Rows with names of columns, as the datasets library gives them."""

    column_names = ("input_ids", "labels", "sample_weight")


@pytest.mark.parametrize("fields", [("sample_weight", "token_weights"), ("importance", "token_weights")])
def test_weights_that_no_batch_has_raise(tmp_path: Path, fields: tuple[str, str]) -> None:
    def without(features: Any) -> dict[str, Tensor]:
        return padded([{name: one[name] for name in ("input_ids", "labels")} for one in features])

    data: Any = Columns(token_weights=False)
    if fields[0] == "sample_weight":
        with pytest.raises(
            ValueError, match="`train_dataset` has the column 'sample_weight', but its batches have no"
        ):
            trained(tmp_path, Trainer, data, without)
        with pytest.raises(
            ValueError, match="`train_dataset` has the column 'sample_weight', but its batches have no"
        ):
            trained(tmp_path, Trainer, [data[index] for index in range(8)], without)
    trained(tmp_path, Trainer, data, WeightedCollator(without, *fields))
