"""openPangu-Embedded against transformers' Llama with the same weights, and three-axis positions against loops."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.parts.mrope_oracle import IMAGE_ID, Layout, batch_of, logits_in_loops
from tests.tiny import order_one
from vlparts import PanguEmbeddedConfig, PanguEmbeddedForCausalLM, PanguEmbeddedModel
from vlparts.parts.rope_multimodal import get_multimodal_position_ids, interleave_axes

PRESETS = ["tiny", "tiny_mrope"]
SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "eos_token_id": None}
AXES = {
    "tiny": [0] * 8,
    "interleaved": interleave_axes([2, 3, 3]),
    "one after the other": [0, 0, 1, 1, 1, 2, 2, 2],
}
ROPE = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]}


def pangu(preset: str = "tiny_mrope", **changes: Any) -> PanguEmbeddedForCausalLM:
    """A small model with weights of order one."""
    config = PanguEmbeddedConfig.from_preset(preset, **{**SIZES, **changes})
    return order_one(PanguEmbeddedForCausalLM(config)).eval()


def llama_like(model: PanguEmbeddedForCausalLM) -> LlamaForCausalLM:
    """Transformers' Llama with the weights of `model`, whose keys are the same."""
    fields = model.config.to_dict()
    for name in ("model_type", "architectures", "auto_map", "rope_parameters"):
        fields.pop(name, None)
    theta = model.config.rope_parameters["rope_theta"]
    llama = LlamaForCausalLM(LlamaConfig(**fields, rope_parameters={"rope_type": "default", "rope_theta": theta}))
    llama.to(next(model.parameters()).dtype)
    llama.load_state_dict(model.state_dict(), strict=True)
    return llama.train(model.training)


def tokens(samples: int = 2, length: int = 9) -> Tensor:
    return torch.randint(3, SIZES["vocab_size"], (samples, length))


LAYOUT = [("text", (3,)), ("image", (1, 2, 3)), ("text", (2,)), ("image", (1, 3, 1)), ("text", (2,))]
OTHER = [("image", (1, 1, 2)), ("text", (4,))]


def multimodal(*layouts: list, padding: list[tuple[int, int]] | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """Tokens and mask, and the positions `(3, B, S)`, of texts with images."""
    inputs, positions = batch_of([Layout(one) for one in layouts], padding or [(0, 0)] * len(layouts))
    return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}, positions


def with_places(positions: Tensor, mask: Tensor) -> Tensor:
    """Positions `(4, B, S)` with the place in the text in front, as generation passes them."""
    return torch.cat(((mask.cumsum(-1) - 1).clamp(min=0)[None], positions))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_loss_and_gradients_equal_llama(preset: str, dtype: torch.dtype) -> None:
    # Llama normalises float64 in float32, and we do not.
    near: dict[str, float] = {} if dtype == torch.float32 else {"atol": 1e-6, "rtol": 1e-5}
    model = pangu(preset).to(dtype)
    llama, input_ids = llama_like(model), tokens()
    ours, theirs = (one(input_ids, labels=input_ids, use_cache=False) for one in (model, llama))
    torch.testing.assert_close(ours.logits, theirs.logits, **near)
    torch.testing.assert_close(ours.loss, theirs.loss, **near)
    gradients = [
        torch.autograd.grad(one.loss, list(two.parameters())) for one, two in ((ours, model), (theirs, llama))
    ]
    for (name, _), mine, other in zip(model.named_parameters(), *gradients, strict=True):
        torch.testing.assert_close(mine, other, msg=lambda text, name=name: f"{name}: {text}", **near)


def test_the_loss_is_divided_as_in_llama() -> None:
    model, input_ids = pangu(), tokens()
    labels = input_ids.masked_fill(torch.arange(9) < 4, -100)
    ours, theirs = (one(input_ids, labels=labels, num_items_in_batch=7).loss for one in (model, llama_like(model)))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "no cache"])
def test_generate_equals_llama(preset: str, options: dict[str, Any]) -> None:
    model, input_ids = pangu(preset), tokens(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, **options}
    assert torch.equal(model.generate(input_ids, **options), llama_like(model).generate(input_ids, **options))


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_equal_positions_on_all_axes_are_plain_rope(rows: int) -> None:
    model, input_ids = pangu(), tokens()
    positions = torch.arange(4, 13).expand(2, -1)
    expected = llama_like(model)(input_ids, position_ids=positions, use_cache=False).logits
    if rows > 2:
        positions = positions.expand(rows, -1, -1)
    torch.testing.assert_close(model(input_ids, position_ids=positions, use_cache=False).logits, expected)


@pytest.mark.parametrize("kind", ["interleaved", "one after the other"])
def test_three_axes_equal_loops_over_heads_and_tokens(kind: str) -> None:
    model = pangu(rope_parameters={**ROPE, "mrope_interleaved": kind == "interleaved"}).double()
    inputs, positions = multimodal(LAYOUT)
    logits = model(inputs["input_ids"], position_ids=positions).logits[0]
    expected = logits_in_loops(model, inputs["input_ids"][0], positions[:, 0], AXES[kind])
    # The angles are float32.
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(logits)
    gradients = [torch.autograd.grad((one * weights).sum(), list(model.parameters())) for one in (logits, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_each_axis_changes_the_outcome() -> None:
    model = pangu()
    inputs, positions = multimodal(LAYOUT)
    expected = model(**inputs, position_ids=positions).logits
    for axis in range(3):
        moved = positions.clone()
        moved[axis, :, 5] += 1
        assert (model(**inputs, position_ids=moved).logits - expected).abs().max() > 1e-3


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", [[(2, 0), (12, 0)], [(0, 1), (0, 0)], [(1, 1), (3, 0)]])
def test_padding_changes_nothing(implementation: str, padding: list[tuple[int, int]]) -> None:
    model = pangu()
    model.set_attn_implementation(implementation)
    inputs, positions = multimodal(LAYOUT, OTHER, padding=padding)
    together = model(**inputs, position_ids=with_places(positions, inputs["attention_mask"])).logits
    for sample, layout in enumerate((LAYOUT, OTHER)):
        alone, places = multimodal(layout)
        expected = model(**alone, position_ids=places).logits[0]
        kept = inputs["attention_mask"][sample].bool()
        torch.testing.assert_close(together[sample, kept], expected, atol=1e-4, rtol=1e-4)


def test_a_cache_changes_nothing() -> None:
    """The prompt at once, then token by token at the places that the delta gives."""
    model = pangu()
    inputs, positions = multimodal([*LAYOUT, ("text", (3,))])
    input_ids, prompt = inputs["input_ids"], inputs["input_ids"].shape[1] - 3
    expected = model(input_ids, position_ids=positions, use_cache=False).logits
    grids = {"image_grid_thw": torch.tensor([[1, 2, 3], [1, 3, 1]])}
    known, deltas = get_multimodal_position_ids(input_ids[:, :prompt], image_token_id=IMAGE_ID, **grids)
    outputs = model(input_ids[:, :prompt], position_ids=known, use_cache=True)
    logits = [outputs.logits]
    for place in range(prompt, prompt + 3):
        following = (place + deltas).expand(3, -1, -1)
        cache = outputs.past_key_values
        outputs = model(input_ids[:, place, None], position_ids=following, past_key_values=cache, use_cache=True)
        logits.append(outputs.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-4, rtol=1e-4)


def test_positions_after_a_cache_are_counted() -> None:
    model, input_ids = pangu("tiny"), tokens()
    expected = model(input_ids, use_cache=False).logits
    cache = model(input_ids[:, :5], use_cache=True).past_key_values
    torch.testing.assert_close(
        model(input_ids[:, 5:], past_key_values=cache).logits, expected[:, 5:], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_generation_takes_positions_of_four_rows(options: dict[str, Any]) -> None:
    """With and without a cache, and in a padded batch as alone."""
    model = pangu()
    options = {"max_new_tokens": 5, "do_sample": False, **options}
    inputs, positions = multimodal(LAYOUT, OTHER, padding=[(0, 0), (10, 0)])
    rows = with_places(positions, inputs["attention_mask"])
    found = model.generate(**inputs, position_ids=rows, **options)
    assert torch.equal(found, model.generate(**inputs, position_ids=rows, use_cache=False, **options))
    alone, places = multimodal(OTHER)
    expected = model.generate(**alone, position_ids=with_places(places, alone["attention_mask"]), **options)
    assert torch.equal(found[1, -5:], expected[0, -5:])


@pytest.mark.parametrize("rows", [2, 4])
def test_texts_in_one_row_do_not_see_each_other(rows: int) -> None:
    """By places that start anew, without a mask and a cache."""
    model = pangu()
    parts = [multimodal(LAYOUT), multimodal(OTHER)]
    if rows == 2:
        parts = [(one, torch.arange(one["input_ids"].shape[1]).expand(3, 1, -1)) for one, _ in parts]
    input_ids = torch.cat([one["input_ids"] for one, _ in parts], dim=1)
    positions = torch.cat([with_places(places, one["attention_mask"]) for one, places in parts], dim=2)
    positions = positions[0] if rows == 2 else positions
    together = model(input_ids, position_ids=positions, use_cache=False).logits
    apart = [model(one["input_ids"], position_ids=places, use_cache=False).logits for one, places in parts]
    torch.testing.assert_close(together, torch.cat(apart, dim=1), atol=1e-4, rtol=1e-4)


def test_embeddings_in_place_of_tokens() -> None:
    model = pangu()
    inputs, positions = multimodal(LAYOUT)
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    expected = model(inputs["input_ids"], position_ids=positions).logits
    assert torch.equal(model(inputs_embeds=embedded, position_ids=positions).logits, expected)
    last = model(inputs["input_ids"], position_ids=positions, logits_to_keep=2).logits
    torch.testing.assert_close(last, expected[:, -2:])


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = pangu().train()
    inputs, positions = multimodal(LAYOUT)

    def gradients() -> list[Tensor]:
        outputs = model(**inputs, position_ids=positions, labels=inputs["input_ids"], use_cache=False)
        return list(torch.autograd.grad(outputs.loss, list(model.parameters())))

    expected = gradients()
    model.gradient_checkpointing_enable()
    for mine, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_hidden_states_and_attention_weights_are_recorded() -> None:
    model = pangu()
    model.set_attn_implementation("eager")
    outputs = model(tokens(), output_hidden_states=True, output_attentions=True)
    assert [tuple(one.shape) for one in outputs.hidden_states] == [(2, 9, 32)] * 3
    assert [tuple(one.shape) for one in outputs.attentions] == [(2, 4, 9, 9)] * 2


def test_bfloat16_is_near_float32() -> None:
    model = pangu()
    inputs, positions = multimodal(LAYOUT)
    expected = model(**inputs, position_ids=positions).logits
    logits = model.to(torch.bfloat16)(**inputs, position_ids=positions).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).pow(2).mean().sqrt() < 0.1 * expected.pow(2).mean().sqrt()


@pytest.mark.parametrize("rows", [None, 2, 3, 4])
def test_compiles_in_one_graph(rows: int | None) -> None:
    torch.compiler.reset()
    model = pangu(num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for layouts in ([LAYOUT], [OTHER, LAYOUT]):
        inputs, positions = multimodal(*layouts)
        all_rows = with_places(positions, inputs["attention_mask"])
        chosen = {None: None, 2: all_rows[0], 3: positions, 4: all_rows}[rows]
        arguments = {**inputs, "position_ids": chosen, "use_cache": False}
        torch.testing.assert_close(compiled(**arguments).logits, model(**arguments).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_saved_is_what_is_loaded(preset: str, tmp_path: Path) -> None:
    model = pangu(preset)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is PanguEmbeddedForCausalLM
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found = loaded.get_parameter(name) if name in model.state_dict() else loaded.get_buffer(name)
        assert torch.equal(found, tensor), name
    headless = AutoModel.from_pretrained(tmp_path)
    assert type(headless) is PanguEmbeddedModel
    input_ids = tokens()
    torch.testing.assert_close(loaded(input_ids).logits, model(input_ids).logits)
    torch.testing.assert_close(loaded.lm_head(headless(input_ids).last_hidden_state), loaded(input_ids).logits)


def test_keys_are_those_of_llama() -> None:
    keys = list(pangu().state_dict())
    assert keys == list(llama_like(pangu()).state_dict())
    assert {name for name in keys if name.endswith("bias")} == {
        f"model.layers.{layer}.self_attn.{name}_proj.bias" for layer in (0, 1) for name in "qkvo"
    }


def test_tied_embeddings() -> None:
    model = PanguEmbeddedForCausalLM(PanguEmbeddedConfig.from_preset("tiny", tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_plans_of_parallelism_are_those_of_llama() -> None:
    model = pangu()
    llama = llama_like(model)
    assert model.tp_plan == llama.tp_plan
    assert model.tp_plan["model.layers.*.self_attn.o_proj"] == "rowwise"
    assert model.pp_plan == llama.pp_plan


@pytest.mark.parametrize("shape", [(9,), (2, 8), (2, 2, 9), (5, 2, 9), (3, 2, 8), (1, 3, 2, 9)])
def test_positions_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`position_ids` must have shape \(samples, 9\), \(3, samples, 9\) or \(4"):
        pangu()(tokens(), position_ids=torch.zeros(shape, dtype=torch.int64))


def test_three_axes_need_sections() -> None:
    with pytest.raises(ValueError, match=r"if `rope_parameters` has no 'mrope_section', got \(3, 2, 9\)"):
        pangu("tiny")(tokens(), position_ids=torch.zeros(3, 2, 9, dtype=torch.int64))


def test_tokens_or_embeddings_but_not_both() -> None:
    model = pangu()
    for arguments in ({}, {"input_ids": tokens(), "inputs_embeds": torch.zeros(2, 9, 32)}):
        with pytest.raises(ValueError, match="Exactly one of `input_ids` and `inputs_embeds` must be given"):
            model(**arguments)
