"""Learning rates and weight decays of parts, and what `train` and `freeze` leave out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.training.making import settings
from vlparts.training.building import build
from vlparts.training.config import TrainConfig
from vlparts.training.optimizers import Rates
from vlparts.training.train import train


class Groups(TrainerCallback):
    """Keeps the rates of each parameter by its name, before the first step."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        names = {id(value): name for name, value in model.named_parameters()}
        self.rates = {
            names[id(one)]: (group["initial_lr"], group["weight_decay"])
            for group in optimizer.param_groups
            for one in group["params"]
        }


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_part_has_its_rates(tmp_path: Path, optimizer: str) -> None:
    groups = Groups()
    config = settings(
        tmp_path,
        max_steps=2,
        optimizer=optimizer,
        train=["projector", "text", "model.vision_tower.layers.1.*"],
        learning_rates={"projector": 2e-3, "model.vision_tower.*": 1e-4},
        weight_decays={"model.language_model.layers.*": 0.3, "vision": 0.0},
        weight_decay=0.1,
    )
    before = {name: value.clone() for name, value in build(config, ["cat"])[0].named_parameters()}
    result = train(config, callbacks=[groups])
    trained = {name for name, value in result.model.named_parameters() if value.requires_grad}
    assert set(groups.rates) == trained
    assert not [name for name in trained if name.startswith("model.vision_tower.") and ".layers.1." not in name]
    for name, (rate, decay) in groups.rates.items():
        part = name.split(".")[1]
        assert rate == {"projector": 2e-3, "vision_tower": 1e-4}.get(part, 1e-2), name
        decays = 0.3 if name.startswith("model.language_model.layers.") else 0.0 if part == "vision_tower" else 0.1
        assert decay == (0.0 if "norm" in name or name.endswith("bias") else decays), name
    moved = {
        name
        for name, value in result.model.named_parameters()
        if before[name].shape == value.shape and not torch.equal(before[name], value)
    }
    assert moved <= trained
    assert {name for name in trained if not name.startswith(("model.language_model.embed", "lm_head"))} <= moved


def test_the_same_rate_by_name_is_the_same_training(tmp_path: Path) -> None:
    """Groups do not change what an optimizer computes."""
    plain = train(settings(tmp_path, max_steps=3, weight_decay=0.1))
    named = {"learning_rates": {"vision": 1e-2, "text": 1e-2}, "weight_decays": {"projector": 0.1}}
    other = train(settings(tmp_path, max_steps=3, weight_decay=0.1, output=tmp_path / "other", **named))
    theirs = other.model.state_dict()
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-7, msg=name)


def model_of(folder: Path, **changes: Any) -> Any:
    return build(settings(folder, **changes), ["cat"])[0]


def test_train_is_the_complement_of_freeze(tmp_path: Path) -> None:
    first = model_of(tmp_path, train=["projector", "text"])
    second = model_of(tmp_path, freeze=["vision"])
    chosen = [[name for name, one in model.named_parameters() if one.requires_grad] for model in (first, second)]
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) < len([*first.named_parameters()])


def test_what_is_shared_is_trained_by_either_name(tmp_path: Path) -> None:
    model = model_of(
        tmp_path,
        text={
            "preset": "qwen3:tiny",
            "num_hidden_layers": 1,
        },
        train=["lm_head.*"],
    )
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert [name for name, one in model.named_parameters() if one.requires_grad] == [
        "model.language_model.embed_tokens.weight"
    ]


def test_rates_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = model_of(tmp_path, train=["projector"])
    for rates, message in (
        ({"text": 1.0}, "`learning_rates` 'text' matches no parameter that is trained"),
        ({"model.none.*": 1.0}, "`learning_rates` 'model.none.*' matches no parameter; the nearest"),
        ({"projector": 1.0, "*.bias": 2.0}, r"`learning_rates` gives .*bias two values, 1 and 2 by '\*\.bias'"),
    ):
        with pytest.raises(ValueError, match=message):
            Rates(0.1, 0.1, rates, {}).groups(model, [])
    assert Rates(0.1, 0.1, {"projector": 1.0, "*.bias": 1.0}, {}).groups(model, []) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": ["vision"], "freeze": ["text"]}, "`train` and `freeze` must not both be given"),
        ({"train": ["all"]}, "must be vision, projector, text, or patterns of names of parameters, got 'all'"),
        ({"learning_rates": {"all": 1.0}}, "got 'all'"),
        ({"learning_rates": {"vision": 0.0}}, "greater than 0"),
        ({"weight_decays": {"vision": -1.0}}, "greater than or equal to 0"),
        ({"max_steps": 1, "max_tokens": 1}, "`max_tokens` and `max_steps` must not both be given"),
        ({"template": "continuation", "prompts": ["a"]}, "`prompts` requires template='chat'"),
        ({"template": "plain"}, "'chat' or 'continuation'"),
        ({"prompts": [" "]}, "pattern"),
        ({"data": {}}, "must be a file, or files with their shares, got none"),
        ({"data": {"a": 0.0}}, "greater than 0"),
        ({"dual_encoder": {"loss": "sigmoid"}}, "`dual_encoder` requires kind='dual_encoder'"),
        ({"kind": "dual_encoder", "projector": "linear", "loss": "token"}, "takes no `projector`, `loss`"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"data": "a", "output": "b", **changes})
