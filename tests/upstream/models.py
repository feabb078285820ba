"""transformers' `ModelTesterMixin` over the models of `vlparts`; run by the nox session `upstream`."""

import inspect
import unittest
from typing import Any

import torch
from transformers import PreTrainedConfig

from tests.upstream.loading import GenerationTesterMixin, load
from tests.upstream.setups import BATCH, SETUPS, Setup

ModelTesterMixin = load("test_modeling_common").ModelTesterMixin


class Tester:
    """Gives a configuration and inputs, in the form that the mixin expects."""

    batch_size = BATCH

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        parameters = inspect.signature(setup.model.forward).parameters
        self.is_training = "labels" in parameters or "return_loss" in parameters
        config = setup.config()
        if hasattr(config, "vision_config"):
            self.vision_config = config.vision_config.to_dict()
        self.text_config = config.get_text_config()
        self.hidden_size = self.text_config.hidden_size
        self.num_hidden_layers = self.text_config.num_hidden_layers
        self.num_attention_heads = self.text_config.num_attention_heads
        self.seq_length = next(iter(self.prepare_config_and_inputs_for_common()[1].values())).shape[1]

    def get_config(self) -> PreTrainedConfig:
        return self.setup.config()

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Any]]:
        torch.manual_seed(0)
        return self.setup.config(), self.setup.inputs()


def make_case(name: str, setup: Setup) -> type[unittest.TestCase]:
    """Return the test class of a set-up."""

    def set_up(self: Any) -> None:
        self.model_tester = Tester(setup)

    generates = any(model.can_generate() for model in setup.models)
    bases = (ModelTesterMixin, *[GenerationTesterMixin] * generates, unittest.TestCase)
    return type(
        name, bases, {"__module__": __name__, "all_model_classes": setup.models, "setUp": set_up, **setup.options}
    )


globals().update({name: make_case(name, setup) for name, setup in SETUPS.items()})
