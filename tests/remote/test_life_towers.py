"""Composed models with native vision encoders as remote code, of families with different inputs and outputs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.remote.test_life import PREAMBLE
from tests.tiny import picture
from tests.vision_towers import FAMILIES, composed_tower
from vlparts.demo.isolation import run_without

# The encoder's class is looked up, images are padded, the features are a map.
FEW = ("qwen2_vl_vision", "pixtral", "sam_vision_model")
TEXTS = ["<image> is <image>", "Where is <image>?"]

SCRIPT = (
    PREAMBLE
    + """
from transformers import AutoModelForImageTextToText, AutoProcessor
from PIL import Image
images = [Image.open(work / f"{index}.png") for index in range(3)]
texts, found = json.loads((work / "texts.json").read_text()), {}
for path in sorted(folder.iterdir()):
    model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
    inputs = processor(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt")
    with torch.no_grad():
        found[path.name] = model(**inputs).logits
    model.generate(**inputs, max_new_tokens=2)
save_file(found, work / "outputs.safetensors")
"""
)


@pytest.mark.parametrize(
    "kinds", [FEW, pytest.param(tuple(kind for kind in FAMILIES if kind not in FEW), marks=pytest.mark.slow)]
)
def test_native_vision_encoders_load_without_vlparts(
    bare_python: Path, tmp_path: Path, kinds: tuple[str, ...]
) -> None:
    images = [picture(20, 12), picture(12, 28), picture(16, 16)]
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS), encoding="utf-8")
    folder, expected = tmp_path / "models", {}
    for kind in kinds:
        model, processor = composed_tower(kind)
        model.save_pretrained(folder / kind)
        processor.save_pretrained(folder / kind)
        inputs = processor(images=images, text=TEXTS, padding=True, padding_side="left", return_tensors="pt")
        with torch.no_grad():
            expected[kind] = model(**inputs).logits
    run_without(bare_python, SCRIPT, folder, tmp_path, modules_cache=tmp_path / "code")
    found = load_file(tmp_path / "outputs.safetensors")
    assert sorted(found) == sorted(kinds)
    for kind in kinds:
        torch.testing.assert_close(found[kind], expected[kind], rtol=1e-3, atol=1e-3)
