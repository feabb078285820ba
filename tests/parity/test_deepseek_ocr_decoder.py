"""The decoder of DeepSeek-OCR against transformers' `UnlimitedOcrTextModel`, whose window is longer than the text."""

import pytest
import torch
from transformers.models.unlimited_ocr.configuration_unlimited_ocr import UnlimitedOcrTextConfig
from transformers.models.unlimited_ocr.modeling_unlimited_ocr import UnlimitedOcrTextModel

from tests.tiny import order_one
from vlparts import MoGEConfig, MoGEForCausalLM, MoGEModel

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 3,
}


def test_published_parameters() -> None:
    with torch.device("meta"):
        model = MoGEForCausalLM(MoGEConfig.from_preset("deepseek_ocr"))
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == 2_934_734_080
    embeddings = model.model.embed_tokens.weight.numel()
    assert round((model.num_activated_parameters() - embeddings) / 1e6, 1) == 574.1


@pytest.mark.parametrize("experts", ["eager", "vlparts_sorted", "vlparts_merged"])
def test_equals_the_native_decoder(experts: str) -> None:
    native_config = UnlimitedOcrTextConfig(
        **SMALL, n_routed_experts=8, n_shared_experts=2, sliding_window=64, max_position_embeddings=128
    )
    native = order_one(UnlimitedOcrTextModel(native_config)).double().eval()
    native.set_experts_implementation("eager")
    config = MoGEConfig.from_preset(
        "deepseek_ocr", **SMALL, num_experts=8, shared_expert_intermediate_size=32, head_dim=8
    )
    model = MoGEModel(config).double().eval()
    model.load_state_dict(
        {name.replace("shared_experts", "shared_expert"): x for name, x in native.state_dict().items()}
    )
    model.set_experts_implementation(experts)
    ids = torch.randint(0, 96, (2, 20))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    # The native norms and softmax are in float32.
    expected = native(ids, attention_mask=mask, position_ids=positions, output_router_logits=True)
    found = model(ids, attention_mask=mask, position_ids=positions, output_router_logits=True)
    torch.testing.assert_close(found.last_hidden_state[0, 7:], expected.last_hidden_state[0, 7:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.last_hidden_state[1], expected.last_hidden_state[1], atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(found.router_logits, expected.router_logits, strict=True):
        torch.testing.assert_close(mine[7:].float(), theirs[7:].float(), atol=1e-5, rtol=1e-5)
