"""What servers ask of composed models, without a server: layers, weights, positions, counts, calls, pickles."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModel, CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig

from tests.parts.openpangu_shaped import CHATS, encode, openpangu, video
from tests.parts.test_fused_vision import composed as fused
from tests.parts.test_vlm import GROUPS, batch, composed
from tests.parts.test_vlm_views import composed as views
from tests.tiny import SIZES, navit_config, picture
from tests.vision_towers import composed_tower
from vlparts import VisionLanguageConfig, VisionLanguageModel
from vlparts.demo.isolation import environment_without, run_without
from vlparts.parts.vlm_serving import check_servable

Composed = tuple[Any, Any]
MODELS: dict[str, Callable[[], Composed]] = {
    "navit": lambda: composed("navit"),
    "clip": lambda: composed("clip", "llama"),
    "siglip2": lambda: composed("siglip2", "qwen2"),
    "windowfree": openpangu,
    "pixtral": lambda: composed_tower("pixtral"),
    "deepencoder": lambda: views("qwen3"),
    "fused": fused,
}
PICTURES = [picture(40, 30), picture(16, 33), picture(20, 70), picture(33, 16)]
every_model = pytest.mark.parametrize("name", MODELS)


class Replaced(nn.Module):
    """A layer as servers put it in place of another: the weights and the function, and no other attribute."""

    def __init__(self, layer: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight, self.bias, self._function = layer.weight, getattr(layer, "bias", None), function

    def forward(self, inputs: Tensor) -> Tensor:
        return self._function(inputs, self.weight, self.bias)


def replace_layers(model: nn.Module) -> int:
    """Replace linear layers, normalisations and the embedding of tokens; returns how many."""
    embeddings, count = model.get_input_embeddings(), 0
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                new = Replaced(layer, nn.functional.linear)
            elif type(layer) is nn.LayerNorm:
                shape, eps = layer.normalized_shape, layer.eps
                new = Replaced(
                    layer, lambda x, weight, bias, s=shape, e=eps: nn.functional.layer_norm(x, s, weight, bias, e)
                )
            elif layer is embeddings:
                new = Replaced(layer, lambda ids, weight, bias: nn.functional.embedding(ids, weight))
            else:
                continue
            setattr(parent, name, new)
            count += 1
    return count


def server_call(processor: Any, **media: Any) -> Any:
    """The inputs as a server asks for them, with a text of nothing but placeholders."""
    text = processor.image_token * len(media.get("images", ())) + (processor.video_token or "") * len(
        media.get("videos", ())
    )
    return processor(text=text, **media, return_text_replacement_offsets=True, return_tensors="pt")


@every_model
def test_replaced_layers_change_nothing(name: str) -> None:
    model, processor = MODELS[name]()
    inputs = encode(processor, CHATS) if name == "windowfree" else batch(processor, GROUPS)
    inputs.pop("mm_token_type_ids", None)
    with torch.no_grad():
        expected = model(**inputs).logits
        assert replace_layers(model) > 10
        torch.testing.assert_close(model(**inputs).logits, expected)


@every_model
def test_no_weight_is_dropped_and_the_model_without_head_reports_none(name: str, tmp_path: Path) -> None:
    model, _ = MODELS[name]()
    patterns = VisionLanguageModel._keys_to_ignore_on_load_unexpected
    keys = {key.removeprefix("model.") for key in model.state_dict()}
    assert "lm_head.weight" in keys
    assert not [key for key in keys for pattern in patterns if re.search(pattern, key)]
    model.save_pretrained(tmp_path)
    found, loading = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["unexpected_keys"]
    assert not loading["missing_keys"]
    assert torch.equal(
        found.get_input_embeddings().weight.detach(), model.model.get_input_embeddings().weight.detach()
    )


@every_model
def test_the_result_of_an_image_depends_on_nothing_else_in_the_call(name: str) -> None:
    """One field after the other, cut as vLLM cuts it: a list or grids per image, others by rows."""
    _, processor = MODELS[name]()
    together = server_call(processor, images=PICTURES)
    sizes = [(one.height, one.width) for one in PICTURES]
    counts = processor._get_num_multimodal_tokens(image_sizes=sizes)
    grid = together.get("image_grid_thw")
    rows = counts["num_image_patches"] if grid is None else grid.prod(-1).tolist()
    assert sum(rows) == len(together["pixel_values"])
    for index, one in enumerate(PICTURES):
        alone = server_call(processor, images=[one])
        for field in processor.image_processor.model_input_names + ["image_view_grid"]:
            if field not in together:
                continue
            value = together[field]
            if isinstance(value, list):
                assert torch.equal(value[index], alone[field][0]), field
            elif field == "image_grid_thw":
                assert torch.equal(value[index], alone[field][0])
            else:
                torch.testing.assert_close(value.split(rows)[index], alone[field], atol=0, rtol=0)
        offsets = alone["text_replacement_offsets"][0]
        assert [offset["replacement"].count(processor.image_token) for offset in offsets] == [
            counts["num_image_tokens"][index]
        ]


@every_model
def test_features_of_fields_as_servers_hold_them(name: str) -> None:
    model, processor = MODELS[name]()
    fields = server_call(processor, images=PICTURES)
    names = [*processor.image_processor.model_input_names, "image_view_grid"]
    given = {field: fields[field] for field in names if field in fields}
    if isinstance(given.get("image_tile_grid"), list):
        given["image_tile_grid"] = torch.stack(given["image_tile_grid"])  # as vLLM stacks what has one shape
    usual = processor(text=processor.image_token * len(PICTURES), images=PICTURES, return_tensors="pt")
    usual = {field: usual[field] for field in processor.image_processor.model_input_names if field in usual}
    if name == "pixtral":  # whose name `image_sizes` is not for the model
        given["spatial_shapes"] = usual["spatial_shapes"] = fields["spatial_shapes"]
    calls = [given]
    if isinstance(given["pixel_values"], list):  # one call for each image, as vLLM does where shapes differ
        calls = [{field: value[index][None] for field, value in given.items()} for index in range(len(PICTURES))]
    with torch.no_grad():
        found = [
            one for call in calls for one in model.model.get_image_features(**call, return_dict=True).pooler_output
        ]
        expected = model.model.get_image_features(**usual, return_dict=True).pooler_output
    assert len(found) == len(PICTURES)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-6 if len(calls) > 1 else 0, rtol=0)


SIDES = st.integers(8, 80)


@settings(max_examples=10)
@given(st.lists(st.tuples(st.integers(1, 3), SIDES, SIDES), min_size=1, max_size=2))
def test_counts_and_sizes_of_videos(sizes: list[tuple[int, int, int]]) -> None:
    _, processor = openpangu()
    videos = [video(frames, width, height) for frames, height, width in sizes]
    together = server_call(processor, videos=videos)
    counts = processor._get_num_multimodal_tokens(video_sizes=sizes)["num_video_tokens"]
    offsets = together["text_replacement_offsets"][0]
    assert [one["replacement"].count(processor.video_token) for one in offsets] == counts
    for index, (one, frames) in enumerate(zip(videos, together["video_grid_thw"].tolist(), strict=True)):
        alone = server_call(processor, videos=[one])
        assert alone["video_grid_thw"].tolist() == [frames]
        rows = together["video_grid_thw"].prod(-1).tolist()
        assert torch.equal(together["pixel_values_videos"].split(rows)[index], alone["pixel_values_videos"])


def test_only_servers_get_budgets_per_video_and_bare_placeholders() -> None:
    _, processor = openpangu()
    videos = [video(2, 64, 64), video(2, 64, 64)]
    marks = processor.vision_start_token + processor.video_token + processor.vision_end_token
    usual = processor(text=marks * 2, videos=videos, return_tensors="pt", return_text_replacement_offsets=True)
    short = {"video_max_total_pixels": 2 * 1024}
    shared = processor(text=marks * 2, videos=videos, return_tensors="pt", videos_kwargs=short)
    own = processor(
        text=marks * 2, videos=videos, return_tensors="pt", videos_kwargs={**short, "video_shared_budget": False}
    )
    assert shared["video_grid_thw"].prod() < own["video_grid_thw"].prod()
    assert usual["video_grid_thw"].shape == (2, 3)
    with pytest.raises(ValueError, match="must have each"):
        processor(text=f"{processor.video_token} and", videos=videos[:1], return_text_replacement_offsets=True)
    with pytest.raises(ValueError, match="must have each"):
        processor(text=processor.video_token, videos=videos[:1])
    _, tiled = MODELS["deepencoder"]()
    alone = tiled(images=PICTURES, return_text_replacement_offsets=True, return_tensors="pt")
    assert alone["image_tile_grid"].shape == (len(PICTURES), 2)


def test_image_and_video_processor_return_other_names() -> None:
    _, processor = openpangu()
    images, videos = processor.image_processor.model_input_names, processor.video_processor.model_input_names
    assert not set(images) & set(videos)
    assert set(images) | set(videos) <= set(processor.model_input_names)
    fields = server_call(processor, images=PICTURES[:1], videos=[video(2)])
    assert set(images) | set(videos) <= set(fields)
    assert processor._get_num_multimodal_tokens()["num_image_tokens"] is None
    assert MODELS["clip"]()[1]._get_num_multimodal_tokens(video_sizes=[(1, 16, 16)])["num_video_tokens"] is None


def test_positions_of_prompts_are_those_of_the_model() -> None:
    model, processor = openpangu()
    for chat in CHATS:
        inputs = encode(processor, [chat])
        grids = {name: inputs.get(name) for name in ("image_grid_thw", "video_grid_thw")}
        expected = model.model.get_multimodal_position_ids(inputs["input_ids"], **grids)
        found, deltas = model.model.get_rope_index(input_ids=inputs["input_ids"], **grids)
        assert torch.equal(found, expected[1:])
        assert deltas.tolist() == [[int(expected[1:].max()) + 1 - inputs["input_ids"].shape[1]]]


def test_positions_with_encoders_of_one_size_need_no_grids() -> None:
    model, processor = openpangu(vision=MODELS["clip"]()[0].config.vision_config)
    text = f"{processor.image_token}one{processor.image_token}{processor.image_token}two"
    inputs = processor(images=PICTURES[:3], text=text, return_tensors="pt")
    expected = model.model.get_multimodal_position_ids(inputs["input_ids"], pixel_values=inputs["pixel_values"])
    found, _ = model.model.get_rope_index(inputs["input_ids"])
    assert torch.equal(found, expected[1:])
    plain = torch.tensor([[5, 6, 7]])
    assert model.model.get_rope_index(plain)[0].tolist() == [[[0, 1, 2]]] * 3


def test_positions_of_padded_encoders_are_unknown_without_grids() -> None:
    model, processor = openpangu(vision=MODELS["siglip2"]()[0].config.vision_config)
    inputs = processor(images=PICTURES[:1], text=processor.image_token, return_tensors="pt")
    with pytest.raises(ValueError, match="`image_grid_thw` must be given"):
        model.model.get_rope_index(inputs["input_ids"])


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (GraniteConfig(**SIZES, logits_scaling=8.0), "logits_scaling"),
        (GraniteConfig(**SIZES, logits_scaling=1.0), ""),
        (CohereConfig(**SIZES, logit_scale=0.1), ""),
        (Gemma2Config(**SIZES, final_logit_softcapping=5.0), ""),
        (LlamaConfig(**SIZES), ""),
    ],
)
def test_text_models_with_factors_that_vllm_leaves_out_are_refused(text: Any, field: str) -> None:
    config = VisionLanguageConfig(vision_config=navit_config(), text_config=text)
    with torch.device("meta"):
        VisionLanguageModel(config)
        config.text_config._attn_implementation = "vllm"
        if not field:
            check_servable(config)
            return
        with pytest.raises(ValueError, match=f"`text_config.{field}` must be 1 .* got 8.0"):
            VisionLanguageModel(config)


def test_configurations_are_pickled_by_value(tmp_path: Path) -> None:
    """As remote code is sent to the engine's process, with all that the modules of the configuration reach."""
    configs = [make()[0].config for make in MODELS.values()]
    module = sys.modules[type(configs[0]).__module__.rpartition(".")[0]]
    cloudpickle.register_pickle_by_value(module)
    try:
        (tmp_path / "configs").write_bytes(cloudpickle.dumps(configs))
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    python = environment_without(tmp_path / "environment")
    loaded = run_without(python, _LOAD, tmp_path / "configs", modules_cache=tmp_path / "modules")
    assert json.loads(loaded) == [json.loads(config.to_json_string(use_diff=False)) for config in configs]


_LOAD = """
import json, pickle, sys
configs = pickle.load(open(sys.argv[1], "rb"))
built = [type(config)(**config.to_dict()) for config in configs]  # checks the fields again
print(json.dumps([json.loads(config.to_json_string(use_diff=False)) for config in built]))
"""


def test_a_view_of_the_image_processor_forwards_everything_else() -> None:
    _, processor = openpangu()
    assert processor.video_processor.patch_size == processor.image_processor.patch_size
    with pytest.raises(AttributeError):
        _ = processor.video_processor.nothing
    assert not hasattr(MODELS["clip"]()[1], "video_processor")


def test_a_model_without_a_placeholder_of_videos_takes_none() -> None:
    """vLLM writes the placeholder into its trial of the encoder if there is a video processor that counts tokens."""
    made = openpangu()[1]
    images_only = type(made)(made.image_processor, made.tokenizer, made.chat_template, image_token=made.image_token)
    assert not hasattr(images_only, "video_processor")
    assert images_only.model_input_names == [name for name in made.model_input_names if "video" not in name]
    assert images_only._get_num_multimodal_tokens(video_sizes=[(2, 64, 64)])["num_video_tokens"] is None
