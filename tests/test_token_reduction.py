"""`reduce_tokens` for composed models and for those of transformers, by what their `forward` takes."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    Lfm2Config,
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Siglip2VisionConfig,
)

from tests.checkpoints.qwen_vl.files import native_model
from tests.parts.openpangu_shaped import CHATS, encode, openpangu
from tests.parts.test_vlm import GROUPS, batch, composed
from tests.tiny import SIZES, order_one
from vlparts import VisionTokenReducer, reduce_tokens

IMAGE, VIDEO, PAD, WORDS = 1, 2, 0, 40
TEXT = {
    **SIZES,
    "num_key_value_heads": 1,
    "vocab_size": WORDS,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
}
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 3, "vision_end_token_id": 4}
QWEN2 = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
QWEN25 = {
    **SIZES,
    "depth": 2,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
    "window_size": 16,
    "fullatt_block_indexes": [1],
}
QWEN25 = {name: value for name, value in QWEN25.items() if name not in ("num_hidden_layers", "num_attention_heads")}
GREEDY = {"max_new_tokens": 5, "do_sample": False}
METHODS = ("keep_all", "average_pool", "merge_similar", "prune_by_norm", "prune_by_attention", "prune_diverse")


def llava() -> Any:
    vision = CLIPVisionConfig(**SIZES, image_size=16, patch_size=4)
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE, image_token_index=IMAGE
    )
    return LlavaForConditionalGeneration(config)


def qwen2() -> Any:
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config={**TEXT, **ROPE}, vision_config=QWEN2, **TOKENS))


def qwen25() -> Any:
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config={**TEXT, **ROPE}, vision_config=QWEN25, **TOKENS)
    )


def lfm2() -> Any:
    vision = Siglip2VisionConfig(**SIZES, num_patches=16, patch_size=4)
    text = Lfm2Config(
        **{**TEXT, "layer_types": ["conv", "full_attention"], "block_ff_dim": 48, "block_auto_adjust_ff_dim": False}
    )
    config = Lfm2VlConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, projector_hidden_size=16, downsample_factor=2
    )
    return Lfm2VlForConditionalGeneration(config)


def internvl() -> Any:
    vision = InternVLVisionConfig(**SIZES, image_size=[16, 16], patch_size=[4, 4])
    config = InternVLConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE, downsample_ratio=0.5
    )
    return InternVLForConditionalGeneration(config)


MODELS = {"llava": llava, "qwen2_vl": qwen2, "qwen2_5_vl": qwen25, "lfm2_vl": lfm2, "internvl": internvl}


def made(kind: str) -> Any:
    torch.manual_seed(0)
    model = order_one(MODELS[kind]()).eval()
    model.generation_config.pad_token_id = PAD
    model.generation_config.suppress_tokens = [IMAGE, VIDEO]
    return model


def inputs_of(kind: str) -> dict[str, Tensor]:
    """Two prompts, padded on the left: the first with two images, the second with one."""
    generator = torch.Generator().manual_seed(0)
    if kind.startswith("qwen"):
        grids = torch.tensor([[1, 4, 8], [1, 4, 4], [1, 8, 8]])
        width = 3 * 2 * 4 * 4
        media = {
            "pixel_values": torch.randn(int(grids.prod(-1).sum()), width, generator=generator),
            "image_grid_thw": grids,
        }
        counts = (grids.prod(-1) // 4).tolist()
    elif kind == "lfm2_vl":
        shapes = torch.tensor([[2, 8], [4, 4], [4, 2]])
        mask = torch.arange(16)[None] < shapes.prod(-1, keepdim=True)
        media = {
            "pixel_values": torch.randn(3, 16, 48, generator=generator),
            "spatial_shapes": shapes,
            "pixel_attention_mask": mask.long(),
        }
        counts = (shapes.prod(-1) // 4).tolist()
    else:
        media = {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator)}
        counts = [4 if kind == "internvl" else 16] * 3
    rows = [[5, 3, *[IMAGE] * counts[0], 4, 6, 3, *[IMAGE] * counts[1], 4, 7, 8], [9, 3, *[IMAGE] * counts[2], 4, 10]]
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    if kind.startswith("qwen"):
        media["mm_token_type_ids"] = (ids == IMAGE).int()
    return {"input_ids": ids, "attention_mask": mask, **media}


def grids_of(kind: str, inputs: dict[str, Tensor]) -> list[tuple[int, int]]:
    if kind.startswith("qwen"):
        return [(rows // 2, columns // 2) for _, rows, columns in inputs["image_grid_thw"].tolist()]
    if kind == "lfm2_vl":
        return [(rows // 2, columns // 2) for rows, columns in inputs["spatial_shapes"].tolist()]
    return [(2, 2) if kind == "internvl" else (4, 4)] * 3


@pytest.mark.parametrize("kind", MODELS)
def test_all_tokens_give_what_the_model_gives(kind: str) -> None:
    model, inputs = made(kind), inputs_of(kind)
    expected = model.generate(**inputs, **GREEDY)[:, -5:]
    for method in METHODS:
        ratio = None if method == "keep_all" else 1.0
        found = model.generate(**reduce_tokens(model, inputs, method, ratio), **GREEDY)[:, -5:]
        assert torch.equal(found, expected), method


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("kind", MODELS)
def test_fewer_tokens_are_put_where_placeholders_are_left(kind: str, method: str) -> None:
    model, inputs = made(kind), inputs_of(kind)
    names = [
        name for name in ("pixel_values", "image_grid_thw", "spatial_shapes", "pixel_attention_mask") if name in inputs
    ]
    features = torch.cat(
        list(model.get_image_features(**{name: inputs[name] for name in names}, return_dict=True).pooler_output)
    )
    reducer = VisionTokenReducer(method, 0.5)
    reduced = reducer(features, grids_of(kind, inputs))
    found = reduce_tokens(model, inputs, method, 0.5)
    assert not {"pixel_values", "image_grid_thw", "spatial_shapes"} & found.keys()
    logits = model(**found).logits
    places = (inputs["input_ids"] == IMAGE).flatten().nonzero().squeeze(1)
    keep = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    keep.view(-1)[places] = False
    keep.view(-1)[places[reduced.kept_index]] = True
    positions = None
    if kind.startswith("qwen"):
        types = (inputs["input_ids"] == IMAGE).int()
        positions, _ = model.model.get_rope_index(
            inputs["input_ids"], types, inputs["image_grid_thw"], attention_mask=inputs["attention_mask"]
        )
    start = 0
    for sample in range(2):
        kept = keep[sample] & inputs["attention_mask"][sample].bool()
        ids = inputs["input_ids"][sample, kept]
        embeds = model.get_input_embeddings()(ids)
        count = int((ids == IMAGE).sum())
        embeds[ids == IMAGE] = reduced.tokens[start : start + count]
        start += count
        extra = {}
        if positions is not None:
            extra["position_ids"] = positions[:, sample : sample + 1, kept]
        alone = model(inputs_embeds=embeds[None], **extra).logits[0]
        mask = found["attention_mask"][sample].bool()
        assert found["input_ids"][sample, mask].tolist() == ids.tolist()
        torch.testing.assert_close(logits[sample, mask], alone, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_generation_continues_step_by_step(kind: str) -> None:
    model = made(kind)
    inputs = reduce_tokens(model, inputs_of(kind), "prune_diverse", 0.5)
    found = model.generate(**inputs, **GREEDY)[:, -5:]
    beams = model.generate(**reduce_tokens(model, inputs_of(kind), "prune_diverse", 0.5), **GREEDY, num_beams=2)
    assert beams.shape[0] == 2
    grown = reduce_tokens(model, inputs_of(kind), "prune_diverse", 0.5)
    for step in range(5):
        logits = model(**grown).logits[:, -1]
        logits[:, [IMAGE, VIDEO]] = -torch.inf
        following = logits.argmax(-1, keepdim=True)
        assert torch.equal(following[:, 0], found[:, step])
        for name, new in (("input_ids", following), ("attention_mask", torch.ones_like(following))):
            grown[name] = torch.cat((grown[name], new), dim=1)
        if "position_ids" in grown:
            last = grown["position_ids"][..., -1:] + 1
            grown["position_ids"] = torch.cat((grown["position_ids"], last), dim=-1)


@pytest.mark.parametrize("vision", ["navit", "clip", "siglip2"])
@pytest.mark.parametrize("method", METHODS)
def test_a_composed_model(method: str, vision: str) -> None:
    """The same as composing it with the reduction after the projector."""
    plain, full = composed(vision)
    options = {} if method == "keep_all" else {"token_ratio": 0.5}
    model, processor = composed(vision, token_reduction=method, token_stage="projector", **options)
    model.load_state_dict(plain.state_dict())
    expected = model.generate(**batch(processor, GROUPS), **GREEDY)[:, -5:]
    found = reduce_tokens(plain, batch(full, GROUPS), method, options.get("token_ratio"))
    assert torch.equal(plain.generate(**found, **GREEDY)[:, -5:], expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_composed_model_with_multimodal_positions_and_videos(method: str) -> None:
    plain, full = openpangu()
    options = {} if method == "keep_all" else {"token_ratio": 0.5}
    model, processor = openpangu(token_reduction=method, **options)
    model.load_state_dict(plain.state_dict())
    expected = model(**encode(processor, CHATS)).logits[:, -1]
    inputs = encode(full, CHATS)
    found = reduce_tokens(plain, inputs, method, options.get("token_ratio"))
    torch.testing.assert_close(plain(**found).logits[:, -1], expected)
    found = reduce_tokens(plain, inputs, method, options.get("token_ratio"))
    assert torch.equal(
        plain.generate(**found, **GREEDY)[:, -5:], model.generate(**encode(processor, CHATS), **GREEDY)[:, -5:]
    )


def test_labels_are_cut_with_the_tokens_and_padded_on_the_right() -> None:
    model, inputs = made("llava"), inputs_of("llava")
    flipped = {name: inputs[name].flip(1) for name in ("input_ids", "attention_mask")}
    labels = torch.where(flipped["attention_mask"].bool(), flipped["input_ids"], -100)
    found = reduce_tokens(model, {**inputs, **flipped, "labels": labels}, "prune_diverse", 0.25)
    expected = torch.where(found["attention_mask"].bool(), found["input_ids"], -100)
    assert torch.equal(found["labels"], expected)
    assert found["attention_mask"][1, -1] == 0
    assert found["attention_mask"][:, 0].all()
    assert torch.isfinite(model(**found).loss)


def test_what_is_refused() -> None:
    inputs = inputs_of("llava")
    model = made("llava")
    with pytest.raises(ValueError, match="`method` must be one that needs no training"):
        reduce_tokens(model, inputs, "pixel_shuffle", 0.25)
    with pytest.raises(ValueError, match="`method` must be one that needs no training"):
        reduce_tokens(model, inputs, "resampler", count=3)
    with pytest.raises(ValueError, match="`inputs` must hold `pixel_values` or `pixel_values_videos`, got neither"):
        reduce_tokens(model, {name: inputs[name] for name in ("input_ids", "attention_mask")}, "keep_all")
    short = {name: inputs[name][:1] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="`inputs` have 32 image tokens, but 48 image features"):
        reduce_tokens(model, {**inputs, **short}, "keep_all")
    text = LlamaForCausalLM(LlamaConfig(**TEXT))
    with pytest.raises(ValueError, match="LlamaForCausalLM must take `mm_encoder_outputs`"):
        reduce_tokens(text, inputs, "keep_all")
    reducing, processor = composed(token_reduction="merge_similar", token_ratio=0.5)
    with pytest.raises(ValueError, match="`model` reduces its tokens itself by 'merge_similar'"):
        reduce_tokens(reducing, batch(processor, GROUPS), "merge_similar", 0.5)
    stacked = native_model("qwen3_vl", torch.float32)
    grids = torch.tensor([[1, 4, 4]])
    width = stacked.model.visual.patch_embed.proj.weight[0].numel()
    ids = torch.full((1, 4), stacked.config.image_token_id)
    stacked.config.text_config.vocab_size = 50
    with pytest.raises(ValueError, match="adds features of images to several layers"):
        reduce_tokens(
            stacked, {"input_ids": ids, "pixel_values": torch.randn(16, width), "image_grid_thw": grids}, "keep_all"
        )
