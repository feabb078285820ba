"""The numbers of processes over which grouped experts can be distributed."""

from types import SimpleNamespace

import pytest
from transformers import LlamaConfig
from transformers.distributed import DistributedConfig

from tests.tiny import navit_config
from vlparts import MoGEConfig, MoGEForCausalLM, MoGEModel, VisionLanguageForConditionalGeneration, compose
from vlparts.parts.moe_experts import check_whole_groups


def processes(size: int) -> DistributedConfig:
    return DistributedConfig(tp_size=size, ep_size=size)


@pytest.mark.parametrize("kind", [MoGEModel, MoGEForCausalLM, VisionLanguageForConditionalGeneration])
@pytest.mark.parametrize("size", [3, 8])
def test_parts_of_groups_are_refused(kind: type, size: int) -> None:
    """Before any weight is spread."""
    config = MoGEConfig.from_preset("tiny")  # 8 experts in 4 groups
    composed = kind is VisionLanguageForConditionalGeneration
    model = compose(vision=navit_config(), text=config) if composed else kind(config)
    with pytest.raises(ValueError, match=f"`ep_size` must divide `num_expert_groups`, 4, .*got {size}"):
        kind.maybe_distribute_model(model, processes(size), None)
    for whole in (None, processes(2), processes(4), DistributedConfig()):
        assert kind.maybe_distribute_model(model, whole, None) is model


def test_other_configurations_may_have_any_number() -> None:
    check_whole_groups(LlamaConfig(), processes(3))
    check_whole_groups(MoGEConfig.from_preset("tiny"), SimpleNamespace())
    with pytest.raises(ValueError, match="`num_expert_groups`, 1, .*got 2"):
        check_whole_groups(MoGEConfig.from_preset("tiny", num_expert_groups=1), processes(2))
