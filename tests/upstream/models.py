"""transformers' `ModelTesterMixin` over the models of `vlparts`; run by the nox session `upstream`."""

import copy
import inspect
import unittest
from typing import Any

import torch
from transformers import PreTrainedConfig

from tests.upstream.loading import GenerationTesterMixin, load
from tests.upstream.setups import BATCH, SETUPS, Setup
from vlparts import NaViTDualEncoder

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
        inputs = setup.inputs()
        self.seq_length = inputs["input_ids"].shape[1] if "input_ids" in inputs else len(inputs["pixel_values"])

    def get_config(self) -> PreTrainedConfig:
        return self.setup.config()

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Any]]:
        torch.manual_seed(0)
        return self.setup.config(), self.setup.inputs()


def make_case(name: str, setup: Setup) -> type[unittest.TestCase]:
    """Return the test class of a set-up."""

    def set_up(self: Any) -> None:
        self.model_tester = Tester(setup)

    def prepare(
        self: Any, inputs_dict: dict[str, Any], model_class: type, return_labels: bool = False
    ) -> dict[str, Any]:
        inputs = copy.deepcopy(inputs_dict)
        if return_labels and setup.model is NaViTDualEncoder:
            inputs["return_loss"] = True
        elif return_labels:
            shape = inputs["input_ids"].shape if "input_ids" in inputs else (BATCH,)
            inputs["labels"] = torch.zeros(shape, dtype=torch.int64)
        return inputs

    content = {"__module__": __name__, "all_model_classes": (setup.model,), "setUp": set_up, **setup.options}
    bases = (ModelTesterMixin, *[GenerationTesterMixin] * setup.model.can_generate(), unittest.TestCase)
    return type(name, bases, {**content, "_prepare_for_class": prepare})


globals().update({name: make_case(name, setup) for name, setup in SETUPS.items()})
