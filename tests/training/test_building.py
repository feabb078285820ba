"""What the settings of a run can name: parts, folders, files, tokenizers; and what is refused."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from tests.chat_styles import STYLES, styled_tokenizer
from tests.tiny import SIZES, WINDOWED, order_one, picture, text_config, tokenizer
from tests.training.making import TEXT, VISION, losses, saved_parts, settings, weights
from vlparts import WindowFreeViTImageProcessor
from vlparts.parts.chat_placeholders import with_placeholders
from vlparts.training.building import build
from vlparts.training.config import TrainConfig
from vlparts.training.train import train

FLAT = {"drop_redundant_patches": True}


@pytest.mark.parametrize("kind", ["clip", "siglip2", "navit"])
def test_folders_of_checkpoints_keep_their_weights(tmp_path: Path, kind: str) -> None:
    vision, text = saved_parts(tmp_path, kind)
    config = settings(tmp_path, vision=str(vision), text=str(text), freeze=["vision", "text"], max_steps=2)
    saved = [weights(vision), weights(text)]
    result = train(config)
    ours = result.model.model
    for module, before in ((ours.vision_tower, saved[0]), (ours.language_model, saved[1])):
        parameters = dict(module.named_parameters())
        assert len(parameters) > 10
        for name, value in parameters.items():
            assert torch.equal(value, before.get(name, before.get(f"model.{name}"))), name


def test_json_files_and_mappings_of_configurations(tmp_path: Path) -> None:
    (tmp_path / "vision.json").write_text(json.dumps(VISION), encoding="utf-8")
    (tmp_path / "text.json").write_text(json.dumps(TEXT), encoding="utf-8-sig")  # with a byte order mark
    files = {"vision": str(tmp_path / "vision.json"), "text": str(tmp_path / "text.json")}
    from_files = train(settings(tmp_path, max_steps=1, **files))
    from_mappings = train(settings(tmp_path, max_steps=1, output=tmp_path / "other"))
    assert losses(from_files) == losses(from_mappings)
    presets = {
        "vision": {"preset": "navit:tiny", "num_hidden_layers": 1, "patch_size": 4},
        "text": {"preset": "qwen3:tiny", "num_hidden_layers": 1},
    }
    model, _ = build(settings(tmp_path, **presets), ["cat"])
    assert model.config.vision_config.num_hidden_layers == model.config.text_config.num_hidden_layers == 1
    assert model.config.vision_config.patch_size == 4
    named, _ = build(settings(tmp_path, vision="navit:tiny", text="qwen3:tiny"), ["cat"])
    assert named.config.vision_config.hidden_size == model.config.vision_config.hidden_size
    assert named.config.text_config.hidden_size == model.config.text_config.hidden_size


@pytest.mark.parametrize("packing", [True, False])
def test_a_model_of_openpangu_vls_shape(tmp_path: Path, packing: bool) -> None:
    """Raw pixels, two taps and positions of three axes, in packs and in padded batches."""
    shape = {
        "vision": {"preset": "windowfree:hybrid_tiny", "patch_size": 4, "attention_pattern": WINDOWED},
        "text": {"preset": "pangu_embedded:tiny_mrope"},
        "projector": "multi_tap_merger",
        "projector_options": {"hidden_size": 32},
        "image_processor": {"size": {"shortest_edge": 64, "longest_edge": 256}},
        "learning_rate": 3e-3,
    }
    result = train(settings(tmp_path, max_steps=8, packing=packing, **shape))
    assert losses(result)[-1] < losses(result)[0]
    assert type(result.processor.image_processor) is WindowFreeViTImageProcessor


def test_a_composed_model_can_be_trained_further(tmp_path: Path) -> None:
    train(settings(tmp_path, max_steps=3))
    fields = {"data": tmp_path / "train.jsonl", "model": tmp_path / "output", "capacity": 2000, "max_steps": 1}
    options = {"trainer": {"use_cpu": True, "disable_tqdm": True}, "logging_steps": 1}
    further = train(TrainConfig(output=tmp_path / "further", learning_rate=1e-9, **fields, **options))
    torch.testing.assert_close(weights(tmp_path / "further"), weights(tmp_path / "output"), atol=1e-7, rtol=1e-6)
    assert losses(further)[0] < losses(train(settings(tmp_path, output=tmp_path / "new", max_steps=1)))[0]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(
    "reduction",
    [
        {"token_reduction": "merge_similar", "token_ratio": 0.5},
        {"token_reduction": "resampler", "token_count": 3, "train": ["projector"]},
    ],
)
def test_a_model_with_fewer_vision_tokens(tmp_path: Path, reduction: dict, packing: bool) -> None:
    result = train(settings(tmp_path, max_steps=8, packing=packing, learning_rate=3e-3, **reduction))
    assert losses(result)[-1] < losses(result)[0]
    assert result.model.config.token_reduction == reduction["token_reduction"]
    trained = [name for name, one in result.model.named_parameters() if one.requires_grad]
    if "train" in reduction:
        assert {name.split(".")[1] for name in trained} == {"projector", "token_reducer"}
    with pytest.raises(ValueError, match="`model` replaces .*`token_reduction`, `token_"):
        train(settings(tmp_path, output=tmp_path / "other", model=tmp_path, **reduction))


def test_redundant_patches_are_dropped_in_training(tmp_path: Path) -> None:
    options = {"image_processor": {**FLAT, "token_budget": 5}}
    result = train(settings(tmp_path, max_steps=8, learning_rate=3e-3, **options))
    assert losses(result)[-1] < losses(result)[0]
    with pytest.raises(ValueError, match="depends on its pixels with `drop_redundant_patches`"):
        train(settings(tmp_path, output=tmp_path / "other", max_steps=1, image_processor={**FLAT}))
    streamed = train(settings(tmp_path, output=tmp_path / "more", max_steps=2, streaming=True, image_processor=FLAT))
    assert len(losses(streamed)) == 2


def test_a_composed_model_takes_no_other_parts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`model` replaces `vision`, `text`; expected only one of the two"):
        train(settings(tmp_path, model=tmp_path))


def test_a_tokenizer_of_ones_own(tmp_path: Path) -> None:
    words = tokenizer()
    words.add_tokens(["catcat"])
    words.save_pretrained(tmp_path / "words")
    result = train(settings(tmp_path, tokenizer=tmp_path / "words", max_steps=1))
    assert result.processor.tokenizer.get_vocab() == words.get_vocab()
    assert result.model.config.text_config.vocab_size == len(words)


def test_a_vocabulary_size_that_is_given_is_kept(tmp_path: Path) -> None:
    result = train(settings(tmp_path, text={**TEXT, "vocab_size": 512}, max_steps=1))
    assert result.model.lm_head.weight.shape[0] == result.model.config.text_config.vocab_size == 512
    with pytest.raises(ValueError, match=r"`text` has vocab_size=100; expected at least the \d+ tokens"):
        train(settings(tmp_path, text={**TEXT, "vocab_size": 100}, output=tmp_path / "other"))


def test_options_of_the_image_processor(tmp_path: Path) -> None:
    small = {"size": {"shortest_edge": 16, "longest_edge": 64}, "image_mean": [0.0, 0.0, 0.0]}
    result = train(settings(tmp_path, image_processor=small, max_steps=1))
    loaded = AutoProcessor.from_pretrained(tmp_path / "output").image_processor
    for processor in (result.processor.image_processor, loaded):
        inputs = processor(picture(40, 40), return_tensors="pt")
        assert inputs["image_grid_thw"].tolist() == [[1, 2, 2]]
        assert inputs["pixel_values"].min() >= 0
    for name in ("sizes", "preprocess", "save_pretrained"):
        with pytest.raises(ValueError, match=f"`image_processor` has no option '{name}'"):
            build(settings(tmp_path, image_processor={name: 1}), ["cat"])


def test_a_coordinate_format_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nonsense"):
        train(settings(tmp_path, coordinate_format="nonsense", on_error="skip"))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "vision preset": ({"vision": "navit:none"}, "`vision` must be one of navit:.*, a folder or a JSON file"),
    "text preset": ({"text": "qwen3:none"}, "`text` must be one of qwen3:tiny, .*, a folder or a JSON file"),
    "vision preset in a mapping": ({"vision": {"preset": "navit:none"}}, "got 'navit:none'"),
    "vision preset of no part": (
        {"vision": {"preset": "none:tiny"}},
        "`vision` preset must be one of navit:.*'none:tiny'",
    ),
    "vision preset that is no text": ({"vision": {"preset": 5}}, "`vision` preset must be one of navit:tiny, .*'5'"),
    "text preset in a mapping": ({"text": {"preset": "none"}}, "`text` preset must be one of qwen3:.*, got 'none'"),
    "mapping without a kind": ({"text": {"hidden_size": 3}}, "`text` must have a 'model_type'"),
    "mapping of an unknown kind": ({"vision": {"model_type": "none"}}, "`vision` must have a 'model_type'"),
    "field of the wrong type": ({"text": {**TEXT, "hidden_size": "wide"}}, "`text`: .*'hidden_size'"),
    "inconsistent fields": ({"vision": {**VISION, "num_attention_heads": 5}}, "`vision`: .*num_attention_heads"),
    "text as vision": ({"vision": TEXT}, "`vision`"),
    "JSON file of a list": ({"vision": "list.json"}, r"`vision` list\.json must hold a mapping, got list"),
    "JSON file that is none": ({"text": "broken.json"}, r"`text` broken\.json is not valid JSON"),
    "folder without a checkpoint": ({"text": "empty"}, "`text` empty cannot be loaded"),
    "vision folder without a checkpoint": ({"vision": "empty"}, "`vision` empty cannot be loaded"),
    "model that is missing": ({"model": "none", "only": True}, "`model` must be a folder, got none"),
    "model folder without a checkpoint": ({"model": "empty", "only": True}, "`model` empty cannot be loaded"),
    "tokenizer that is missing": ({"tokenizer": "none"}, "`tokenizer` must be a folder, got none"),
    "tokenizer folder without one": ({"tokenizer": "empty"}, "`tokenizer` empty cannot be loaded"),
    "projector": ({"projector": "none"}, "`projector`:? .*must be one of linear, mlp2_gelu, .*got 'none'"),
    "trainer field": ({"trainer": {"no_such_field": 1}}, "`trainer`.*no_such_field"),
    "field that has its own setting": ({"trainer": {"output_dir": "x"}}, "`trainer` must not contain 'output_dir'"),
    "batch size": (
        {"trainer": {"per_device_train_batch_size": 2}},
        "`trainer` must not contain 'per_device_train_",
    ),
    "evaluation file": ({"eval_data": "none.jsonl"}, r"`eval_data` must be a JSON Lines file, got none\.jsonl"),
    "training file": ({"data": "none.jsonl"}, r"`data` must be a JSON Lines file, got none\.jsonl"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.json").write_text("[]", encoding="utf-8")
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    changes, message = REFUSED[name]
    config = settings(tmp_path, **{key: value for key, value in changes.items() if key != "only"})
    if "only" in changes:
        config = TrainConfig(data=config.data, output=config.output, model=config.model, trainer=config.trainer)
    with pytest.raises(ValueError, match=message):
        train(config)


def test_a_text_model_without_packed_attention_is_refused_by_name(tmp_path: Path) -> None:
    bloom = {"model_type": "bloom", "hidden_size": 32, "n_layer": 1, "n_head": 2}
    with pytest.raises(
        ValueError, match="`text` BloomModel does not support custom attention functions.*set packing=False"
    ):
        train(settings(tmp_path, text=bloom))
    assert train(settings(tmp_path, text=bloom, packing=False, max_steps=1)).steps == 1


def test_a_tokenizer_without_padding_can_be_padded(tmp_path: Path) -> None:
    """Llama's tokenizers have no padding token; it gets one."""
    vision, text = saved_parts(tmp_path, "navit")
    words = tokenizer()
    words.pad_token = None
    words.save_pretrained(text)
    options = {"vision": str(vision), "text": str(text), "capacity": 2000, "max_steps": 1}
    padded = train(settings(tmp_path, packing=False, **options))
    packed = train(settings(tmp_path, output=tmp_path / "packed", **options))
    torch.testing.assert_close(losses(padded), losses(packed), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("style", [None, "llama3", "mistral"])
def test_the_trainer_has_no_special_tokens_to_align(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, style: str | None
) -> None:
    vision, text = saved_parts(tmp_path, "navit")
    words = tokenizer() if style is None else styled_tokenizer(STYLES[style])
    words.save_pretrained(text)
    order_one(AutoModelForCausalLM.from_config(text_config("llama", words))).save_pretrained(text)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        result = train(settings(tmp_path, vision=str(vision), text=str(text), capacity=2000, max_steps=1))
    finally:
        logger.removeHandler(caplog.handler)
    assert not [one for one in caplog.messages if "PAD/BOS/EOS" in one]
    saved = AutoTokenizer.from_pretrained(tmp_path / "output")
    assert saved.pad_token_id == result.model.generation_config.pad_token_id
    assert saved.pad_token_id == result.model.config.text_config.pad_token_id


def test_a_tokenizer_without_template_needs_one(tmp_path: Path) -> None:
    vision, text = saved_parts(tmp_path, "navit")
    words = styled_tokenizer(STYLES["gemma"])
    template, words.chat_template, words.eos_token = words.chat_template, None, None
    words.save_pretrained(text)
    order_one(AutoModelForCausalLM.from_config(text_config("llama", words))).save_pretrained(text)
    options = {"vision": str(vision), "text": str(text), "capacity": 2000, "max_steps": 1}
    with pytest.raises(ValueError, match="`chat_template` must be given: the tokenizer has none"):
        train(settings(tmp_path, **options))
    file = tmp_path / "chat.jinja"
    with pytest.raises(
        ValueError,
        match="`chat_template` must be a file with a Jinja template or deepseek_ocr, points, got .*chat.jinja",
    ):
        train(settings(tmp_path, chat_template=file, **options))
    file.write_text(with_placeholders(template, {"image": "<image>"}), encoding="utf-8")
    result = train(settings(tmp_path, chat_template=file, **options))
    assert result.processor.chat_template == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("packing", [True, False])
def test_the_chat_template_of_points(tmp_path: Path, packing: bool) -> None:
    """The published prompt, with its image tokens, in packs and in padded batches."""
    result = train(settings(tmp_path, chat_template="points", packing=packing, max_steps=1))
    processor, words = result.processor, result.processor.tokenizer
    assert result.model.config.image_token_id == words.convert_tokens_to_ids("<|image_pad|>")
    assert losses(result)[0] < 20
    blocks = [{"type": "image", "image": picture(20, 12)}, {"type": "text", "text": "cat?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": blocks}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    pads = "<|image_pad|>" * processor.count_image_tokens(inputs, 0)
    expected = f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>\ncat?<|im_end|>\n<|im_start|>assistant\n"
    assert list(inputs["input_ids"][0]) == words(expected, add_special_tokens=False)["input_ids"]
    assert result.model.generation_config.eos_token_id == words.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("packing", [True, False])
def test_tiles_of_two_encoders(tmp_path: Path, packing: bool) -> None:
    """Images of several views each, in packs and in padded batches."""
    encoder = {"model_type": "clip_vision_model", **SIZES, "image_size": 16, "patch_size": 4}
    vision = {"model_type": "vlparts_fused_vision", "general_config": encoder}
    config = settings(tmp_path, vision=vision, projector="fused_mlp2_gelu", packing=packing, capacity=400, max_steps=2)
    result = train(config)
    assert type(result.processor.image_processor).__name__ == "CattyImageProcessor"
    assert len(losses(result)) == 2
    assert all(0 < loss < 20 for loss in losses(result))
