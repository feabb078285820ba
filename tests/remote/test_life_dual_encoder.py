"""The dual encoder as remote code; see `test_life.py`."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, VisionTextDualEncoderProcessor

from tests.parts.test_navit_dual_encoder import CAPTIONS, WORDS, dual_encoder
from tests.remote.test_life import PREAMBLE
from tests.tiny import picture
from vlparts import NaViTImageProcessor
from vlparts.demo.isolation import run_without

SCRIPT = (
    PREAMBLE
    + """
from transformers import AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor, pipeline
from PIL import Image
captions = json.loads(sys.argv[3])
pictures = [Image.open(work / f"{index}.png") for index in range(len(captions))]
def outputs(folder, auto):
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(text=captions, images=pictures, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits_per_image.contiguous()
    loss = model(**inputs, return_loss=True).loss
    loss.backward()
    gradient = model.image_projection.weight.grad
    return model, processor, {"logits": logits, "loss": loss.detach(), "gradient": gradient}
model, processor, first = outputs(folder, AutoModel)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
model.save_pretrained(work / "again"); processor.save_pretrained(work / "again")
_, _, second = outputs(work / "again", AutoModelForZeroShotImageClassification)
assert all(torch.equal(first[name], second[name]) for name in first)
classify = pipeline("zero-shot-image-classification", model=str(work / "again"), trust_remote_code=True)
answers = classify(pictures[0], candidate_labels=captions, hypothesis_template="{}")
best = captions[first["logits"][0].argmax()]
assert answers[0]["label"] == best, (answers, best)
save_file(first, work / "outputs.safetensors")
"""
)


def test_a_dual_encoder_and_its_processor(bare_python: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    dual_encoder(loss="sigmoid").save_pretrained(folder)
    VisionTextDualEncoderProcessor(NaViTImageProcessor(patch_size=4), WORDS).save_pretrained(folder)
    pictures = [picture(21, 10), picture(4, 4), picture(9, 17)]
    for index, one in enumerate(pictures):
        one.save(tmp_path / f"{index}.png")
    arguments = (folder, tmp_path, json.dumps(CAPTIONS))
    run_without(bare_python, SCRIPT, *arguments, modules_cache=tmp_path / "code")

    model = AutoModel.from_pretrained(folder).eval()
    inputs = AutoProcessor.from_pretrained(folder)(text=CAPTIONS, images=pictures, padding=True, return_tensors="pt")
    found = load_file(tmp_path / "outputs.safetensors")
    with torch.no_grad():
        assert torch.equal(found["logits"], model(**inputs).logits_per_image)
    loss = model(**inputs, return_loss=True).loss
    loss.backward()
    assert torch.equal(found["loss"], loss.detach())
    assert torch.equal(found["gradient"], model.image_projection.weight.grad)


def test_a_saved_folder_holds_all_code_and_no_pickle(tmp_path: Path) -> None:
    dual_encoder().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForZeroShotImageClassification"}
    for reference in config["auto_map"].values():
        assert (tmp_path / f"{reference.split('.')[0]}.py").is_file()
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".py", ".safetensors"}
