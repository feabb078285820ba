"""Encoders and composed models as remote code: saved, loaded where vlparts is not installed, saved and loaded again
there, with equal outputs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText

from tests.parts.test_vlm import chat, composed
from tests.tiny import navit, packed_images, picture, text_config, tokenizer, vision_config
from vlparts import NaViTImageProcessor
from vlparts.demo.isolation import run_without

PREAMBLE = """
import importlib.util, sys, json, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
assert importlib.util.find_spec("vlparts") is None
assert importlib.util.find_spec("vlparts_npu") is None
torch.set_num_threads(2)  # as in this process: sums differ with the number of threads
folder, work = Path(sys.argv[1]), Path(sys.argv[2])
"""

ENCODER = (
    PREAMBLE
    + """
from transformers import AutoImageProcessor, AutoModel, pipeline
from PIL import Image
inputs = load_file(work / "inputs.safetensors")
def outputs(folder):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        found = model(inputs["pixel_values"], inputs["image_grid_thw"])
    images = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    pixels = images(Image.open(work / "picture.png"), return_tensors="pt")
    return model, images, {"hidden": found.last_hidden_state, "pooled": found.pooler_output, **pixels}
model, images, first = outputs(folder)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
model.save_pretrained(work / "again"); images.save_pretrained(work / "again")
again, _, second = outputs(work / "again")
assert all(torch.equal(first[name], second[name]) for name in first)
features = pipeline("image-feature-extraction", model=str(work / "again"), trust_remote_code=True)
with torch.no_grad():
    expected = again(first["pixel_values"], first["image_grid_thw"]).last_hidden_state
torch.testing.assert_close(features(Image.open(work / "picture.png"), return_tensors=True), expected)
save_file(first, work / "outputs.safetensors")
"""
)

COMPOSED = (
    PREAMBLE
    + """
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor, pipeline
from PIL import Image
image = Image.open(work / "picture.png")
blocks = [{"type": "image", "image": image}, {"type": "text", "text": "Where is the cat?"}]
chat = [{"role": "user", "content": blocks}]
def outputs(folder, auto=AutoModelForImageTextToText):
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
    with torch.no_grad():
        logits = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return model, processor, {"logits": logits, "tokens": tokens}
model, processor, first = outputs(folder)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
headless = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(headless).__name__ == "VisionLanguageModel"
model.save_pretrained(work / "again"); processor.save_pretrained(work / "again")
_, _, second = outputs(work / "again", AutoModelForMultimodalLM)
assert all(torch.equal(first[name], second[name]) for name in first)
ask = pipeline("image-text-to-text", model=str(work / "again"), trust_remote_code=True)
answer = ask(text=chat, max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
prompt = first["tokens"].shape[1] - 6
assert answer == processor.decode(first["tokens"][0, -6:], skip_special_tokens=True), answer
save_file(first, work / "outputs.safetensors")
"""
)


@pytest.mark.parametrize("changes", [{}, {"merge_layers": [0], "merge_ratio": 0.5}])
def test_an_encoder_and_its_image_processor(bare_python: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    model, processor = navit(**changes), NaViTImageProcessor(patch_size=4)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    patches, grids = packed_images([(3, 5), (1, 1), (2, 7)])
    save_file({"pixel_values": patches, "image_grid_thw": grids}, tmp_path / "inputs.safetensors")
    picture(21, 10).save(tmp_path / "picture.png")
    run_without(bare_python, ENCODER, tmp_path / "model", tmp_path, modules_cache=tmp_path / "code")
    # Loaded from the folder as well, since the memory alignment of weights affects the order of sums.
    with torch.no_grad():
        expected = AutoModel.from_pretrained(tmp_path / "model").eval()(patches, grids)
    found = load_file(tmp_path / "outputs.safetensors")
    assert torch.equal(found["hidden"], expected.last_hidden_state)
    assert torch.equal(found["pooled"], expected.pooler_output)
    pixels = processor(picture(21, 10), return_tensors="pt")
    assert torch.equal(found["pixel_values"], pixels["pixel_values"])
    assert torch.equal(found["image_grid_thw"], pixels["image_grid_thw"])


@pytest.mark.parametrize(
    ("vision", "changes"),
    [
        ("navit", {}),
        ("clip", {}),
        ("navit", {"token_reduction": "resampler", "token_count": 3}),
        ("clip", {"token_reduction": "merge_similar", "token_ratio": 0.5}),
    ],
)
def test_a_composed_model_and_its_processor(
    bare_python: Path, tmp_path: Path, vision: str, changes: dict[str, object]
) -> None:
    model, processor = composed(vision, **changes)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    picture(21, 10).save(tmp_path / "picture.png")
    run_without(bare_python, COMPOSED, tmp_path / "model", tmp_path, modules_cache=tmp_path / "code")
    inputs = processor.apply_chat_template(
        [chat([picture(21, 10)])],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    found = load_file(tmp_path / "outputs.safetensors")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.equal(found["logits"], model(**inputs).logits)
    assert torch.equal(found["tokens"], model.generate(**inputs, max_new_tokens=6, do_sample=False))


def test_a_saved_folder_holds_all_code_and_no_pickle(tmp_path: Path) -> None:
    model, processor = composed()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    heads = {"AutoModelForImageTextToText", "AutoModelForMultimodalLM"}
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", *heads}
    for reference in config["auto_map"].values():
        assert (tmp_path / f"{reference.split('.')[0]}.py").is_file()
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".py", ".safetensors", ".jinja"}
    assert text_config("qwen3", tokenizer()).model_type == config["text_config"]["model_type"]
    assert vision_config("navit").model_type == config["vision_config"]["model_type"]
