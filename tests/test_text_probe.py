"""Every text model of transformers computes in a composed model what it computes alone, or is refused by name."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2VLTextConfig,
    Qwen3VLTextConfig,
)

from tests.parts.test_packed_samples import GIVEN, IDS, alone
from tests.tiny import SIZES, navit_config, order_one
from tests.tiny_texts import KINDS, tiny_text_config
from vlparts import VisionLanguageForConditionalGeneration, compose
from vlparts.parts.configuration_vlm import HEAD_RULES

COMPOSITE = "must be a text model alone"
NOT_SAVED = "a saved model would be loaded with a"
HEAD = "its head has parameters besides a linear layer's"
NO_CACHE = "its forward does not take .*`past_key_values`"
REFUSED = {
    **dict.fromkeys(
        (
            *("dots3_note", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_assistant", "gemma4_unified"),
            *("gemma4_unified_assistant", "git", "got_ocr2", "llama4", "mllama", "moss_transcribe_diarize"),
            *("phi4_multimodal", "qwen3_5", "qwen3_5_moe", "qwen4_exp"),
        ),
        COMPOSITE,
    ),
    **dict.fromkeys(("blt", "musicgen", "musicgen_melody"), "whose configuration has no (vocab|hidden)_size"),
    "trocr": "AutoModel has no model of its TrOCRConfig",
    **dict.fromkeys(
        (
            *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus"),
            *("plbart", "prophetnet", "whisper"),
        ),
        NOT_SAVED,
    ),
    **dict.fromkeys(
        (
            *("bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert"),
            *("modernbert-decoder", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta"),
            *("xlm-roberta-xl", "xmod"),
        ),
        HEAD,
    ),
    "bert-generation": "its head has a bias",
    **dict.fromkeys(
        (*("falcon_mamba", "mamba", "mamba2", "openai-gpt", "reformer", "rwkv", "xlm", "xlnet", "xlstm"),),
        NO_CACHE,
    ),
    "cpmant": "its forward does not take `inputs_embeds`, `attention_mask`",
    **dict.fromkeys(("gemma3n_text", "gemma4_text"), "its layers take embeddings of `input_ids`"),
    "deepseek_v4": "its forward in the composed model fails with AttributeError",
    **dict.fromkeys(("inkling_text", "inkling2_text", "recurrent_gemma"), "its own class computes other logits"),
}
EQUAL = [kind for kind in KINDS if kind not in REFUSED]
FAST = {*HEAD_RULES, "bert", "gemma", "inkling_text", "llama4_text", "mamba", "opt", "trocr"}
SHORT = {"bloom", "falcon_h1", "gpt2", "lfm2", "olmo_hybrid", "phi"}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}


def marked(kinds: Iterable[str], fast: set[str]) -> list[Any]:
    """The kinds, with those that the fast run leaves out marked as slow."""
    return [kind if kind in fast else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


def own_model(config: PreTrainedConfig) -> PreTrainedModel:
    return order_one(AutoModelForCausalLM.from_config(config)).eval()


def composed(text: Any) -> VisionLanguageForConditionalGeneration:
    return compose(vision=navit_config(), text=text, projector="linear").eval()


def assert_computes_as(own: PreTrainedModel, model: VisionLanguageForConditionalGeneration) -> None:
    """Logits from ids and from embeddings, of all and of the last positions, and the loss."""
    ids = torch.tensor([[5, 6, 7, 8], [5, 9, 6, 10]])
    alone = own(input_ids=ids, labels=ids)
    found = model(input_ids=ids, labels=ids)
    torch.testing.assert_close(found.logits, alone.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.loss, alone.loss.view(()))
    torch.testing.assert_close(model(input_ids=ids, logits_to_keep=2).logits, found.logits[:, -2:])
    embeds = order_one(torch.nn.Embedding(64, model.config.text_config.hidden_size))(ids)
    expected = own(inputs_embeds=embeds.clone()).logits
    torch.testing.assert_close(model(inputs_embeds=embeds.clone()).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", marked(EQUAL, FAST))
@torch.no_grad()
def test_every_text_model_computes_what_it_computes_alone(kind: str) -> None:
    own = own_model(tiny_text_config(kind))
    assert_computes_as(own, composed(own))


@pytest.mark.parametrize("kind", marked([kind for kind in KINDS if kind in REFUSED], FAST))
def test_every_other_text_model_is_refused(kind: str) -> None:
    config = tiny_text_config(kind)
    is_large = REFUSED[kind] == COMPOSITE or kind.startswith("musicgen")
    text = config if is_large else own_model(config)
    with pytest.raises(ValueError, match=REFUSED[kind]):
        composed(text)


@pytest.mark.parametrize("kind", marked(EQUAL, SHORT))
@torch.no_grad()
def test_every_text_model_keeps_packed_samples_apart(kind: str) -> None:
    model = composed(own_model(tiny_text_config(kind)))
    expected = alone(model)
    for name in ("positions", "boundaries", "both"):
        torch.testing.assert_close(model(input_ids=IDS, **GIVEN[name]).logits, expected, atol=1e-4, rtol=1e-4)


def test_the_page_counts_the_text_models() -> None:
    """docs/vlm.md names all of them for this version of transformers."""
    page = (Path(__file__).parents[1] / "docs" / "vlm.md").read_text(encoding="utf-8")
    section = page[page.index("## Text models") : page.index("## Errors")]
    assert f"{len(EQUAL)} of the {len(KINDS)} model types" in " ".join(section.split())
    missing = [kind for kind in REFUSED if f"`{kind}`" not in section]
    assert missing == []


@pytest.mark.parametrize("kind", ["cohere", "gemma2", "granite", "gptj", "minicpm3", "phi"])
@torch.no_grad()
def test_the_text_model_may_be_a_configuration_or_have_no_head(kind: str, tmp_path: Path) -> None:
    config = tiny_text_config(kind)
    own = own_model(config)
    for text in (config, own.base_model):
        model = composed(text)
        own.base_model.load_state_dict(model.model.language_model.state_dict())
        own.get_output_embeddings().load_state_dict(model.lm_head.state_dict())
        assert_computes_as(own, model)
    model.save_pretrained(tmp_path)
    assert_computes_as(own, VisionLanguageForConditionalGeneration.from_pretrained(tmp_path).eval())


def test_a_placeholder_among_embeddings_is_found_after_their_factor() -> None:
    """FalconH1 multiplies the embeddings of `input_ids`, not `inputs_embeds`."""
    model = composed(own_model(tiny_text_config("falcon_h1")))
    model.config.image_token_id = 3
    ids = torch.tensor([[5, 3, 3, 8]])
    mask = model.model.get_placeholder_mask(None, model.model.embed_tokens(ids))
    assert mask.tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("text_class", [Qwen2VLTextConfig, Qwen3VLTextConfig])
def test_text_models_of_vision_language_models_are_composed(text_class: type[PreTrainedConfig]) -> None:
    """They have no class for text alone, so their head is new."""
    sizes = {**SIZES, "num_key_value_heads": 1, "vocab_size": 64, "head_dim": 16}
    model = composed(text_class(**sizes, rope_parameters=dict(ROPE)))
    ids = torch.tensor([[5, 6, 7]])
    expected = model.lm_head(model.model.language_model(input_ids=ids).last_hidden_state)
    torch.testing.assert_close(model(input_ids=ids).logits, expected)


def test_folders_without_a_text_model_alone_are_refused_before_loading(tmp_path: Path) -> None:
    tiny_text_config("gemma3").save_pretrained(tmp_path / "composed")
    with pytest.raises(ValueError, match="must be a text model alone, got Gemma3Config, .* pass the text model"):
        composed(tmp_path / "composed")
    sizes = {**SIZES, "num_key_value_heads": 1, "vocab_size": 64}
    text = AutoModel.from_config(Qwen2VLTextConfig(**sizes, rope_parameters=dict(ROPE)))
    text.save_pretrained(tmp_path / "text")
    assert type(composed(tmp_path / "text").model.language_model) is type(text)


def test_an_error_of_the_text_model_is_named_at_composition() -> None:
    wrong = {**ROPE, "mrope_section": [16, 24, 24]}
    config = Qwen2VLTextConfig(**SIZES, num_key_value_heads=1, vocab_size=64, rope_parameters=wrong)
    with pytest.raises(ValueError, match="`text` Qwen2VLTextModel cannot be composed: its forward fails with Runtime"):
        composed(config)


def test_gemma4_without_embeddings_per_layer_is_composed() -> None:
    changes = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 64}
    config = type(tiny_text_config("gemma4_text"))(**{**tiny_text_config("gemma4_text").to_dict(), **changes})
    own = own_model(config)
    with torch.no_grad():
        assert_computes_as(own, composed(own))


def test_a_decoder_with_attention_in_both_directions_is_refused() -> None:
    class Backward(LlamaForCausalLM):
        def forward(self, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    text = order_one(Backward(LlamaConfig(**SIZES, vocab_size=64)))
    for layer in text.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(ValueError, match="`text` Backward cannot be composed: a later token changes the output of"):
        composed(text)
    with pytest.raises(ValueError, match="`text` BertLMHeadModel cannot be composed: its head has parameters"):
        composed(BertConfig(**SIZES, vocab_size=64))
    with pytest.raises(ValueError, match="`text` BertLMHeadModel cannot be composed: its head has parameters"):
        composed(BertLMHeadModel(BertConfig(**SIZES, vocab_size=64)).bert)


def test_another_path_to_logits_is_refused() -> None:
    class Doubled(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.logits = 1.5 * outputs.logits
            return outputs

    text = Doubled(LlamaConfig(**SIZES, vocab_size=64))
    with pytest.raises(ValueError, match=r"`text` Doubled cannot be composed: its own class computes other logits \("):
        composed(text)
    composed(text.model)  # whose own class is transformers'


def test_the_check_changes_nothing_and_leaves_models_without_weights_alone() -> None:
    text = AutoModelForCausalLM.from_config(tiny_text_config("llama"))
    text.train()
    text.model.layers[0].eval()
    before = [module.training for module in text.modules()]
    compose(vision=navit_config(), text=text)
    assert [module.training for module in text.modules()] == before
    assert not text.model._forward_hooks
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tiny_text_config("gemma2"))
        assert compose(vision=navit_config(), text=empty).lm_head.weight.is_meta
        with pytest.raises(ValueError, match="its head has parameters"):
            compose(vision=navit_config(), text=tiny_text_config("bert"))
