"""The image classifier as remote code, with a pipeline; see `test_life.py`."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from tests.remote.test_life import PREAMBLE
from tests.tiny import navit_config, order_one, packed_images, picture
from vlparts import NaViTForImageClassification, NaViTImageProcessor
from vlparts.demo.isolation import run_without

OPTIONS = [
    {},
    {"pooling": "class_token", "num_register_tokens": 2, "rotary_theta": 100.0, "position_kind": "sinusoidal"},
]

CLASSIFIER = (
    PREAMBLE
    + """
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline
from PIL import Image
inputs = load_file(work / "inputs.safetensors")
def outputs(folder):
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        return model, {"logits": model(**inputs).logits}
model, first = outputs(folder)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "NaViTModel"
model.save_pretrained(work / "again")
AutoImageProcessor.from_pretrained(folder, trust_remote_code=True).save_pretrained(work / "again")
_, second = outputs(work / "again")
assert torch.equal(first["logits"], second["logits"])
classify = pipeline("image-classification", model=str(work / "again"), trust_remote_code=True)
answer = classify(Image.open(work / "picture.png"), top_k=4)
assert sorted(one["label"] for one in answer) == ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"], answer
save_file(first, work / "outputs.safetensors")
"""
)


@pytest.mark.parametrize("options", OPTIONS, ids=["default", "class token"])
def test_a_classifier(bare_python: Path, tmp_path: Path, options: dict) -> None:
    model = order_one(NaViTForImageClassification(navit_config(num_labels=4, **options))).eval()
    model.save_pretrained(tmp_path / "model")
    NaViTImageProcessor(patch_size=4).save_pretrained(tmp_path / "model")
    patches, grids = packed_images([(3, 5), (1, 1), (2, 7)])
    keep_index = torch.tensor([0, 3, 14, 15, 20, 29])
    inputs = {"pixel_values": patches[keep_index], "image_grid_thw": grids, "keep_index": keep_index}
    save_file(inputs, tmp_path / "inputs.safetensors")
    picture(21, 10).save(tmp_path / "picture.png")
    run_without(bare_python, CLASSIFIER, tmp_path / "model", tmp_path, modules_cache=tmp_path / "code")
    # Loaded from the folder as well, since the memory alignment of weights affects the order of sums.
    with torch.no_grad():
        expected = AutoModelForImageClassification.from_pretrained(tmp_path / "model").eval()(**inputs).logits
    assert torch.equal(load_file(tmp_path / "outputs.safetensors")["logits"], expected)
