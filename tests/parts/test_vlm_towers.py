"""Native vision encoders in composed models: features, gradients, and what is refused."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
    ResNetConfig,
    SamConfig,
    SamModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTModel,
    YolosConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

import vlparts
from tests.tiny import SIZES, order_one, picture, text_config, tokenizer
from tests.vision_towers import FAMILIES, PREFIXES, UNUSED, by_hand, composed_tower, merge, native_config
from vlparts.parts.vlm_projectors import register_projector
from vlparts.parts.vlm_towers import VISION_TOWERS

IMAGES = [picture(20, 12), picture(12, 28), picture(16, 16)]
TEXT_INPUTS = ("input_ids", "attention_mask")
# One of each kind of input and output; the others are slow tests.
QUICK = {
    "clip_vision_model",
    "dinov3_vit",
    "internvl_vision",
    "kimi_k25_vision",
    "llama4_vision_model",
    "paddleocr_vl_vision",
    "pixtral",
    "qwen2_5_vl_vision",
    "qwen2_vl_vision",
    "qwen3_vl_vision",
    "sam_vision_model",
    "siglip2_vision_model",
    "siglip_vision_model",
    "swin",
    "video_llama_3_vision",
}
TEXTS = ["<image> is <image>", "Where is <image>?"]


def inputs_of(processor: object, images: list = IMAGES, texts: list = TEXTS) -> dict:
    return dict(processor(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt"))


def test_the_table_is_the_tested_list() -> None:
    assert sorted(VISION_TOWERS) == FAMILIES


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in FAMILIES]
)
def test_features_logits_gradients_and_generation(kind: str) -> None:
    """The encoder by hand, image by image, then the projector, then the text model."""
    model, processor = composed_tower(kind)
    inputs = inputs_of(processor)
    merge_size = model.config.merge_size
    found = model.get_image_features(**{name: inputs[name] for name in inputs if name not in TEXT_INPUTS})
    expected = [
        model.model.projector.projection(tokens)
        for tokens in by_hand(model.model.vision_tower, inputs, merge_size, kind)
    ]
    assert len(found.pooler_output) == len(expected) == len(IMAGES)
    for mine, theirs in zip(found.pooler_output, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-4)
    placeholders = inputs["input_ids"] == model.config.image_token_id
    assert placeholders.sum() == sum(map(len, expected))
    counted = processor._get_num_multimodal_tokens([(image.height, image.width) for image in IMAGES])
    assert counted["num_image_tokens"] == [len(tokens) for tokens in expected]

    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    embeddings[placeholders] = torch.cat(expected)
    hidden = model.model.language_model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])
    outputs = model(**inputs, labels=inputs["input_ids"])
    real = inputs["attention_mask"] != 0
    torch.testing.assert_close(
        outputs.logits[real], model.lm_head(hidden.last_hidden_state)[real], rtol=1e-3, atol=1e-3
    )

    outputs.loss.backward()
    used = {name: value.grad is not None for name, value in model.model.vision_tower.named_parameters()}
    for name in used:
        assert used[name] != name.startswith(UNUSED.get(kind, " ")), name
    assert kind not in UNUSED or not all(used.values())
    others = [name for name, value in model.named_parameters() if "vision_tower" not in name and value.grad is None]
    assert others == []
    tokens = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert tokens.shape[1] <= inputs["input_ids"].shape[1] + 2


def test_tokens_of_one_image_depend_on_no_other() -> None:
    """Also in the second sample of a batch, and with beams."""
    for kind in ("qwen2_vl_vision", "qwen2_5_vl_vision", "qwen3_vl_vision", "pixtral"):
        model, processor = composed_tower(kind)
        alone = inputs_of(processor, IMAGES[2:], TEXTS[1:])
        for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 2}):
            tokens = model.generate(**inputs_of(processor), max_new_tokens=3, **options)
            expected = model.generate(**alone, max_new_tokens=3, **options)
            assert tokens[1, -3:].tolist() == expected[0, -3:].tolist()


@pytest.mark.parametrize("kind", ["qwen2_5_vl_vision", "pixtral", "sam_vision_model"])
def test_multimodal_positions_follow_the_merged_grids(kind: str) -> None:
    words = tokenizer()
    text = text_config("qwen2", words)
    text = CONFIG_MAPPING["qwen2_vl_text"](
        **SIZES,
        num_key_value_heads=1,
        vocab_size=len(words),
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    )
    model = vlparts.compose(vision=native_config(kind), text=text, spatial_merge_size=2)
    processor = vlparts.compose_processor(model, words)
    if kind == "qwen2_5_vl_vision":
        processor.image_processor.size = {"shortest_edge": 64, "longest_edge": 4096}
    inputs = inputs_of(processor, IMAGES[:1], ["<image>?"])
    names = ("image_grid_thw", "pixel_values", "spatial_shapes")
    grids = {name: inputs[name] for name in names if name in inputs}
    positions = model.model.get_multimodal_position_ids(inputs["input_ids"], **grids)
    rows, columns = {"qwen2_5_vl_vision": (2, 2), "pixtral": (2, 3), "sam_vision_model": (2, 2)}[kind]
    expected = [[row, column] for row in range(rows) for column in range(columns)]
    assert positions[2:, 0, : rows * columns].T.tolist() == expected
    assert order_one(model).eval().generate(**inputs, max_new_tokens=2).shape[0] == 1


def test_videos_of_a_qwen_tower_are_encoded_frame_by_frame() -> None:
    model, processor = composed_tower("qwen2_5_vl_vision")
    pixels = inputs_of(processor)["pixel_values"]
    grid = torch.tensor([[2, 2, 4]])
    found = model.get_video_features(pixels[:16], grid).pooler_output
    alone = model.get_image_features(pixels[:16], torch.tensor([[1, 2, 4], [1, 2, 4]])).pooler_output
    torch.testing.assert_close(found[0], torch.cat(alone))


@pytest.mark.parametrize(
    "config",
    [
        ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]),
        ViTMAEConfig(**SIZES),
        YolosConfig(**SIZES, image_size=[16, 16]),
    ],
)
def test_other_native_encoders_are_refused(config: object) -> None:
    """Before they are built: their outputs are no patches, or not those of the whole image."""
    message = (
        f"`vision` {type(config).__name__} of type '{config.model_type}' .* expected one of type aimv2_vision_model"
    )
    with pytest.raises(ValueError, match=message):
        vlparts.compose(vision=config, text=text_config("qwen3", tokenizer()))


class OwnEncoder(PreTrainedModel):
    """An encoder that is not native, with any number of tokens before the patches."""

    config_class = CLIPVisionConfig

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__(config)
        self.embedding = torch.nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> object:
        from transformers.modeling_outputs import BaseModelOutput

        rows = self.embedding(pixel_values).flatten(2).transpose(1, 2)
        prefix = rows.new_full((len(rows), self.config.num_prefix_tokens_returned, rows.shape[2]), 1e6)
        return BaseModelOutput(last_hidden_state=torch.cat((prefix, rows), 1))


def own_config(**fields: object) -> CLIPVisionConfig:
    class OwnConfig(CLIPVisionConfig):
        model_type = "own_encoder"

    return OwnConfig(**SIZES, image_size=16, patch_size=4, num_prefix_tokens_returned=1, **fields)


def test_an_own_encoder_says_how_many_tokens_precede_the_patches() -> None:
    from vlparts.parts.vlm_features import encode_images

    pixels = torch.randn(2, 3, 16, 16)
    encoder = OwnEncoder(own_config(num_prefix_tokens=1))
    _, (features,), counts = encode_images(encoder, pixels, None, None, None, layer=-1, merge_size=1)
    assert counts.tolist() == [16, 16]
    assert features.abs().max() < 1e3
    encoder = OwnEncoder(own_config())
    with pytest.raises(
        ValueError, match=r"returned features of shape \(2, 17, 32\) .* expected \(images, 16, width\)"
    ):
        encode_images(encoder, pixels, None, None, None, layer=-1, merge_size=1)


def test_hidden_states_of_an_encoder_that_merges_are_refused() -> None:
    with pytest.raises(
        StrictDataclassError, match="`vision_feature_layer` must be -1 for a vision encoder of type 'qwen2_5_vl"
    ):
        composed_tower("qwen2_5_vl_vision", vision_feature_layer=0)


def test_a_grid_that_is_not_that_of_the_patches_is_refused() -> None:
    model, processor = composed_tower("qwen3_vl_vision")
    inputs = inputs_of(processor)
    with pytest.raises(ValueError, match="describes 48 patches, but `pixel_values` holds 64"):
        model.get_image_features(inputs["pixel_values"], torch.tensor([[1, 8, 6]]))
    with pytest.raises(ValueError, match=r"`pixel_values` must have shape \(any, 96\), got \(64, 48\)"):
        model.get_image_features(inputs["pixel_values"][:, :48], inputs["image_grid_thw"])
    model, processor = composed_tower("pixtral")
    with pytest.raises(ValueError, match=r"`spatial_shapes\[0\]` must hold at most the 8 rows and 6 columns"):
        model.get_image_features(inputs_of(processor)["pixel_values"], spatial_shapes=torch.full((3, 2), 10))


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind == "dinov3_vit" else pytest.param(kind, marks=pytest.mark.slow)
        for kind in PREFIXES
        if VISION_TOWERS[kind].has_layers
    ],
)
def test_hidden_states_of_images_of_one_size(kind: str) -> None:
    model, processor = composed_tower(kind, vision_feature_layer=1)
    pixels = inputs_of(processor)["pixel_values"]
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[1]
    for mine, rows in zip(model.get_image_features(pixels).pooler_output, hidden, strict=True):
        patches = merge(rows[PREFIXES[kind] :], 4, 4, model.config.merge_size)
        torch.testing.assert_close(mine, model.model.projector.projection(patches))


def test_hidden_states_of_pixtral() -> None:
    model, processor = composed_tower("pixtral", vision_feature_layer=1)
    inputs = inputs_of(processor)
    found = model.get_image_features(inputs["pixel_values"], spatial_shapes=inputs["spatial_shapes"]).pooler_output
    tower = model.model.vision_tower
    sizes = inputs["spatial_shapes"] * 4
    hidden = tower(inputs["pixel_values"], sizes, output_hidden_states=True).hidden_states[1][0]
    first = hidden[: int(inputs["spatial_shapes"][0].prod())].view(2, 2, 3, 2, 32).transpose(1, 2)
    torch.testing.assert_close(found[0], model.model.projector(first.reshape(-1, 32)))


WHOLE = {
    "clip": lambda: CLIPConfig(vision_config={**SIZES, "image_size": 16, "patch_size": 4}),
    "siglip": lambda: SiglipConfig(vision_config={**SIZES, "image_size": 16, "patch_size": 4}),
    "sam": lambda: SamConfig(vision_config=native_config("sam_vision_model").to_dict()),
    "qwen2_5_vl": lambda: CONFIG_MAPPING["qwen2_5_vl"](vision_config=native_config("qwen2_5_vl_vision").to_dict()),
    "sam2": lambda: CONFIG_MAPPING["sam2"](
        vision_config={"backbone_config": native_config("sam2_hiera_det_model").to_dict()}
    ),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_the_vision_part_of_a_whole_configuration_is_taken(kind: str) -> None:
    model = vlparts.compose(vision=WHOLE[kind](), text=text_config("qwen3", tokenizer()))
    vision = WHOLE[kind]().vision_config
    vision = getattr(vision, "backbone_config", None) or vision
    assert model.config.vision_config.model_type == vision.model_type
    assert model.model.vision_tower.config is model.config.vision_config


def test_the_vision_part_of_a_whole_model_is_taken() -> None:
    vision = {**SIZES, "image_size": 16, "patch_size": 4}
    text = text_config("qwen3", tokenizer())
    sam = SamModel(WHOLE["sam"]())
    assert vlparts.compose(vision=sam, text=text).model.vision_tower is sam.vision_encoder
    classifier = ViTForImageClassification(CONFIG_MAPPING["vit"](**vision))
    assert vlparts.compose(vision=classifier, text=text).model.vision_tower is classifier.vit
    projected = CLIPVisionModelWithProjection(CLIPVisionConfig(**vision))
    assert vlparts.compose(vision=projected, text=text).model.vision_tower is projected.vision_model


def test_the_vision_part_of_a_whole_folder_is_taken(tmp_path: object) -> None:
    text = text_config("qwen3", tokenizer())
    config = WHOLE["siglip"]()
    config.text_config = type(config.text_config)(**SIZES, vocab_size=20)
    whole = order_one(SiglipModel(config))
    whole.save_pretrained(tmp_path)
    tower = vlparts.compose(vision=tmp_path, text=text).model.vision_tower
    expected = {n: v for n, v in whole.vision_model.named_parameters() if not n.startswith("head.")}
    found = dict(tower.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("kind", ["metaclip_2_vision_model", "qwen2_vl_vision", "sam_vision_model"])
def test_folders_of_encoders_that_automodel_does_not_know(kind: str, tmp_path: object) -> None:
    text = text_config("qwen3", tokenizer())
    tower = order_one(vlparts.compose(vision=native_config(kind), text=text).model.vision_tower)
    tower.save_pretrained(tmp_path)
    loaded = vlparts.compose(vision=tmp_path, text=text).model.vision_tower
    assert type(loaded) is type(tower)
    for (name, mine), theirs in zip(loaded.named_parameters(), tower.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_a_given_model_keeps_its_pooling_head_and_a_loaded_one_has_none(tmp_path: object) -> None:
    """Folders of earlier versions hold heads too."""
    text = text_config("qwen3", tokenizer())
    for tower in (
        SiglipVisionModel(native_config("siglip_vision_model")),
        ViTModel(native_config("vit")),
    ):
        model = order_one(vlparts.compose(vision=tower, text=text))
        assert model.model.vision_tower is tower
        assert getattr(tower.config, "vision_use_head", True)
        model.save_pretrained(tmp_path)
        for loader in (vlparts.VisionLanguageForConditionalGeneration, vlparts.VisionLanguageModel):
            loaded, info = loader.from_pretrained(tmp_path, output_loading_info=True)
            assert not info["unexpected_keys"]
            assert not info["missing_keys"]
            assert not [name for name, _ in loaded.named_parameters() if ".head." in name or ".pooler." in name]
        pixels = torch.randn(1, 3, 16, 16)
        found = loaded.eval().get_image_features(pixels).pooler_output[0]
        torch.testing.assert_close(found, model.eval().get_image_features(pixels).pooler_output[0])


def test_a_given_configuration_is_left_alone() -> None:
    config = native_config("siglip_vision_model")
    model = vlparts.compose(vision=config, text=text_config("qwen3", tokenizer()))
    assert config.vision_use_head
    assert not model.config.vision_config.vision_use_head


def test_the_image_processor_of_a_pixtral_folder_cuts_whole_blocks(tmp_path: object) -> None:
    words = tokenizer()
    vlparts.compose(
        vision=native_config("pixtral"), text=text_config("qwen3", words)
    ).model.vision_tower.save_pretrained(tmp_path)
    sizes = {"size": {"longest_edge": 40}, "patch_size": {"height": 4, "width": 4}}
    PixtralImageProcessorPil(**sizes, image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    model = vlparts.compose(vision=tmp_path, text=text_config("qwen3", words), spatial_merge_size=2)
    processor = vlparts.compose_processor(model, words)
    assert list(processor.image_processor.image_mean) == [0.1, 0.2, 0.3]
    inputs = inputs_of(processor, [picture(20, 12)], ["<image>"])
    assert inputs["spatial_shapes"].tolist() == [[4, 6]]
    assert model(**inputs).logits.shape[1] == 6
    with pytest.raises(ValueError, match="`image_processor` has patch_size=.* but the model has 8"):
        vlparts.compose_processor(model, words, PixtralImageProcessorPil(**sizes))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_the_parts_of_a_native_model_compute_what_it_computes(family: str) -> None:
    """With a projector that changes nothing: order of the tokens, placeholders, positions on three axes."""
    register_projector("identity", NoProjection)
    words = tokenizer()
    text = {
        **SIZES,
        "num_key_value_heads": 1,
        "vocab_size": len(words),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        "pad_token_id": None,
    }
    widths = {"hidden_size": 32} if family == "qwen2_vl" else {"out_hidden_size": 32}
    vision = native_config(f"{family}_vision", **widths).to_dict()
    config = CONFIG_MAPPING[family](
        vision_config=vision, text_config=text, image_token_id=words.convert_tokens_to_ids("<image>")
    )
    native = order_one(AutoModelForImageTextToText.from_config(config)).eval()
    model = vlparts.compose(vision=native, text=native.model.language_model, projector="identity")
    model.lm_head.weight = native.lm_head.weight
    processor = vlparts.compose_processor(model.eval(), words)
    processor.image_processor.size = {"shortest_edge": 64, "longest_edge": 4096}
    inputs = inputs_of(processor)
    placeholders = inputs["input_ids"] == model.config.image_token_id
    assert model.config.image_token_id == config.image_token_id
    expected = native(**inputs, mm_token_type_ids=placeholders.int()).logits
    real = inputs["attention_mask"] != 0
    torch.testing.assert_close(model(**inputs).logits[real], expected[real], rtol=1e-4, atol=1e-4)


class NoProjection(torch.nn.Identity):
    """Features as they are."""
