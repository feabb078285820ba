"""A model of two encoders and tiled images as remote code; see `test_life.py`."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.parts.test_fused_vision import IMAGES, TEXTS, composed
from tests.remote.test_life import PREAMBLE
from vlparts.demo.isolation import run_without

SCRIPT = (
    PREAMBLE
    + """
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor
from PIL import Image
model = AutoModelForImageTextToText.from_pretrained(folder / "model", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder / "model", trust_remote_code=True)
images = [[Image.open(work / f"{sample}{index}.png") for index in range(2 - sample)] for sample in range(2)]
texts = json.loads((work / "texts.json").read_text())
inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
encoder = AutoModel.from_pretrained(folder / "encoder", trust_remote_code=True).eval()
pixels = AutoImageProcessor.from_pretrained(folder / "encoder", trust_remote_code=True)(images[0], return_tensors="pt")
assert type(encoder).__module__.startswith("transformers_modules."), type(encoder).__module__
with torch.no_grad():
    found = {"logits": model(**inputs).logits, "hidden": encoder(pixels["pixel_values"]).last_hidden_state}
save_file(found, work / "outputs.safetensors")
"""
)


def test_an_encoder_its_image_processor_and_a_composed_model(bare_python: Path, tmp_path: Path) -> None:
    model, processor = composed()
    encoder, folder = model.model.vision_tower, tmp_path / "saved"
    for part in (model, processor):
        part.save_pretrained(folder / "model")
    for part in (encoder, processor.image_processor):
        part.save_pretrained(folder / "encoder")
    for sample, images in enumerate(IMAGES):
        for index, image in enumerate(images):
            image.save(tmp_path / f"{sample}{index}.png")
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS), encoding="utf-8")
    run_without(bare_python, SCRIPT, folder, tmp_path, modules_cache=tmp_path / "code")
    found = load_file(tmp_path / "outputs.safetensors")
    inputs = processor(images=IMAGES, text=TEXTS, padding=True, return_tensors="pt")
    pixels = processor.image_processor(IMAGES[0], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(found["logits"], model(**inputs).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found["hidden"], encoder(pixels).last_hidden_state, rtol=1e-4, atol=1e-4)
