"""openPangu-VL's processor from its files, alone and with the model."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.checkpoints.files import write_json
from tests.checkpoints.openpangu_vl.files import PREPROCESSOR, all_tensors, changed, write_folder
from tests.tiny import picture, tokenizer
from vlparts import WindowFreeViTConfig, WindowFreeViTImageProcessor, WindowFreeViTModel
from vlparts.checkpoints.openpangu_vl import model_from_openpangu_vl, processor_from_openpangu_vl, to_openpangu_vl

TOKENS = {"image_token": 19, "video_token": 32, "vision_start_token": 18, "vision_end_token": 20}
CODE = """
from transformers import PreTrainedTokenizerFast


class PanguTokenizer(PreTrainedTokenizerFast):
    is_custom = True
"""


def pangu_tokenizer(left_out: int | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer with openPangu's special tokens."""
    known = tokenizer()
    numbers = [9, 10, 18, 19, 20, 32]
    known.add_special_tokens(
        {"extra_special_tokens": ["<s>", *(f"[unused{number}]" for number in numbers if number != left_out)]}
    )
    return known


def with_ids(known: PreTrainedTokenizerFast) -> dict[str, Any]:
    """A config.json with the tokenizer's ids."""
    ids = {f"{name}_id": known.convert_tokens_to_ids(f"[unused{number}]") for name, number in TOKENS.items()}
    return changed(**ids, eos_token_id=known.convert_tokens_to_ids("[unused10]"), vocab_size=len(known))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with a tokenizer that needs no code."""
    known = pangu_tokenizer()
    config = with_ids(known)
    write_folder(tmp_path / "in", all_tensors(config), config)
    known.save_pretrained(tmp_path / "in")
    write_json(tmp_path / "in" / "preprocessor_config.json", PREPROCESSOR)
    return tmp_path / "in"


def test_images_videos_and_turns(folder: Path) -> None:
    """A picture of 16 x 24 pixels is 2 x 3 tokens; frames have 512 to 2048 pixels, here 16 x 32: 2 x 4 tokens."""
    processor = processor_from_openpangu_vl(folder)
    content = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "cat"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text.startswith("<s>[unused9]系统：[unused10][unused9]用户：[unused18][unused19][unused20]")
    video = [picture(32, 16, seed) for seed in range(2)]
    inputs = processor(text=text, images=[picture(48, 32)], videos=[video], return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 8, 12]]
    assert inputs["video_grid_thw"].tolist() == [[2, 4, 8]]
    assert inputs["pixel_values"].dtype == torch.uint8
    tokens = inputs["input_ids"][0].tolist()
    assert (tokens.count(processor.image_token_id), tokens.count(processor.video_token_id)) == (24, 16)


def test_model_answers_from_the_image(folder: Path) -> None:
    model, processor = model_from_openpangu_vl(folder, dtype=torch.float32), processor_from_openpangu_vl(folder)
    text = "<s>[unused9]用户：[unused18][unused19][unused20]Where?[unused10][unused9]助手："
    inputs = processor(text=text, images=[picture(48, 32)], return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    answer = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert answer.shape == (1, length + 3)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
        other = model(**{**inputs, "pixel_values": 255 - inputs["pixel_values"]}).logits[0, -1]
    assert int(answer[0, length]) == int(
        logits.index_fill(0, torch.tensor(model.config.text_config.eos_token_id), -9e9).argmax()
    )
    assert float((logits[:20] - other[:20]).abs().max()) > 1e-3


def test_fields_of_the_image_processor(folder: Path) -> None:
    """Each published field has a value of its own here."""
    fields = {**PREPROCESSOR, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
    write_json(folder / "preprocessor_config.json", {**fields, "any_res_dynamic_video_pixels": False})
    images = processor_from_openpangu_vl(folder).image_processor
    assert type(images) is WindowFreeViTImageProcessor
    expected = {
        "size": {"shortest_edge": 1024, "longest_edge": 16384},
        "patch_size": 4,
        "merge_size": 2,
        "temporal_patch_size": 1,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "resample": 2,
        "do_rescale": False,
        "do_normalize": False,
        "video_dynamic_pixels": False,
        "video_max_total_pixels": 8192,
        "video_min_total_pixels": 256,
        "video_max_frame_pixels": 2048,
        "video_min_frame_pixels": 512,
    }
    written = json.loads(images.to_json_string())
    assert {name: written[name] for name in expected} == expected


@pytest.mark.parametrize("nested", [False, True])
def test_fields_in_processor_config(folder: Path, nested: bool) -> None:
    before = processor_from_openpangu_vl(folder).image_processor.to_dict()
    (folder / "preprocessor_config.json").unlink()
    write_json(folder / "processor_config.json", {"image_processor": PREPROCESSOR} if nested else PREPROCESSOR)
    assert processor_from_openpangu_vl(folder).image_processor.to_dict() == before


def test_ignored_fields_are_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="vlparts.checkpoints"):
        processor_from_openpangu_vl(folder)
    assert not caplog.records
    write_json(folder / "preprocessor_config.json", {**PREPROCESSOR, "sharpen": 2, "crop_size": None})
    with caplog.at_level(logging.WARNING, logger="vlparts.checkpoints"):
        processor_from_openpangu_vl(folder)
    assert [record.getMessage() for record in caplog.records] == [
        "Ignored, since the image processor has no such options: sharpen."
    ]


def test_written_folder_has_the_encoder_fields_and_default_sizes(tmp_path: Path) -> None:
    encoder = WindowFreeViTModel(WindowFreeViTConfig.from_preset("hybrid_tiny", image_mean=[0.5, 0.25, 0.0]))
    to_openpangu_vl(encoder, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert written == {
        **PREPROCESSOR,
        "patch_size": 8,
        "image_mean": [0.5, 0.25, 0.0],
        "image_std": pytest.approx(PREPROCESSOR["image_std"]),
        "min_pixels": 50176,
        "max_pixels": 3312400,
        "any_res_max_video_total_pixels": 11239424,
        "any_res_min_video_total_pixels": 100352,
        "any_res_max_frame_pixels": 200704,
        "any_res_min_frame_pixels": 100352,
    }


def test_tokenizer_code_runs_only_if_trusted(folder: Path) -> None:
    (folder / "tokenization_openpangu.py").write_text(CODE, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    reference = "tokenization_openpangu.PanguTokenizer"
    write_json(path, {**config, "tokenizer_class": "PanguTokenizer", "auto_map": {"AutoTokenizer": [None, reference]}})
    with pytest.raises(ValueError, match="trust_remote_code"):
        processor_from_openpangu_vl(folder)
    assert processor_from_openpangu_vl(folder, trust_remote_code=True).tokenizer.is_custom


def test_missing_and_invalid_fields(folder: Path) -> None:
    path = folder / "preprocessor_config.json"
    write_json(path, {name: value for name, value in PREPROCESSOR.items() if name not in ("max_pixels", "merge_size")})
    with pytest.raises(ValueError, match="`folder` must have max_pixels, merge_size for its image processor"):
        processor_from_openpangu_vl(folder)
    write_json(path, {**PREPROCESSOR, "image_std": [1.0]})
    with pytest.raises(ValueError, match="`image_std`"):
        processor_from_openpangu_vl(folder)
    path.unlink()
    with pytest.raises(ValueError, match="must have one of preprocessor_config.json, processor_config.json, got"):
        processor_from_openpangu_vl(folder)


def test_tokenizers_of_other_models(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", {**config, "video_token_id": 3})
    with pytest.raises(ValueError, match=r"video_token_id is 3, but \[unused32\] is \d+"):
        processor_from_openpangu_vl(folder)
    (folder / "config.json").unlink()
    assert processor_from_openpangu_vl(folder).video_token == "[unused32]"
    pangu_tokenizer(left_out=18).save_pretrained(folder)
    with pytest.raises(ValueError, match=re.escape("no token '[unused18]'")):
        processor_from_openpangu_vl(folder)
