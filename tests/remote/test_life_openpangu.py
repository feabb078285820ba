"""A model of openPangu-VL's shape as remote code, with an image and a video; see `test_life.py`."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.parts.openpangu_shaped import encode, openpangu, user, video
from tests.remote.test_life import PREAMBLE
from tests.tiny import picture
from vlparts import VisionLanguageProcessor, WindowFreeViTImageProcessor
from vlparts.demo.isolation import run_without

OPENPANGU = (
    PREAMBLE
    + """
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
from PIL import Image
image, *frames = (Image.open(work / f"{index}.png") for index in range(3))
blocks = [{"type": "image", "image": image}, {"type": "video", "video": frames}, {"type": "text", "text": "Where?"}]
def outputs(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": blocks}]],
        tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
    with torch.no_grad():
        logits = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return model, processor, {"logits": logits, "tokens": tokens, **inputs}
model, processor, first = outputs(folder)
parts = [model, model.model.vision_tower, model.model.language_model, processor, processor.image_processor]
assert all(type(part).__module__.startswith("transformers_modules.") for part in parts), parts
headless = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(headless).__name__ == "VisionLanguageModel"
model.save_pretrained(work / "again"); processor.save_pretrained(work / "again")
_, _, second = outputs(work / "again")
assert all(torch.equal(first[name], second[name]) for name in first)
save_file(first, work / "outputs.safetensors")
"""
)


def test_a_model_of_openpangus_shape(bare_python: Path, tmp_path: Path) -> None:
    model, processor = openpangu()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    image, frames = picture(48, 40), video(2)
    for index, one in enumerate([image, *frames]):
        one.save(tmp_path / f"{index}.png")
    run_without(bare_python, OPENPANGU, tmp_path / "model", tmp_path, modules_cache=tmp_path / "code")
    found = load_file(tmp_path / "outputs.safetensors")
    inputs = encode(processor, [user(image, frames, question="Where?")])
    assert all(torch.equal(found[name], inputs[name]) for name in inputs)
    # Loaded from the folder as well, since the memory alignment of weights affects the order of sums.
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.equal(found["logits"], model(**inputs).logits)
    assert torch.equal(found["tokens"], model.generate(**inputs, max_new_tokens=6, do_sample=False))


def test_its_folder_is_read_here_without_remote_code(tmp_path: Path) -> None:
    model, processor = openpangu()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["text_config"]["model_type"] == "vlparts_pangu_embedded"
    assert config["vision_config"]["model_type"] == "vlparts_windowfree"
    found = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(found, VisionLanguageProcessor)
    assert isinstance(found.image_processor, WindowFreeViTImageProcessor)
    assert found.video_token_id == model.config.video_token_id
