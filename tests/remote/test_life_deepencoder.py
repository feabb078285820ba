"""DeepSeek-OCR's encoder, and a model composed with it, as remote code; see `test_life.py`."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from tests.parts.test_vlm_views import composed
from tests.tiny import order_one, picture
from vlparts import DeepEncoderConfig, DeepEncoderImageProcessor, DeepEncoderModel
from vlparts.demo.isolation import run_without

ENCODER = """
import sys, torch
from pathlib import Path
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel
folder, files = sys.argv[1], Path(sys.argv[2])
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = load_file(files / "inputs.safetensors")
with torch.no_grad():
    found = model(**inputs)
image = processor(Image.open(files / "picture.png"), return_tensors="pt")
save_file({"tokens": found.last_hidden_state, "index": found.view_index, **image}, files / "outputs.safetensors")
"""
COMPOSED = """
import sys, torch
from pathlib import Path
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, files = sys.argv[1], Path(sys.argv[2])
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(images=[Image.open(files / "picture.png")], text=["what is <image>"], return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
save_file({"logits": logits, "ids": inputs["input_ids"]}, files / "outputs.safetensors")
"""


def test_an_encoder_and_its_image_processor(bare_python: Path, tmp_path: Path) -> None:
    model = order_one(DeepEncoderModel(DeepEncoderConfig.from_preset("deepencoder_tiny"))).eval()
    processor = DeepEncoderImageProcessor(base_size=128, tile_size=64, untiled_size=64)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    grids, tiles = torch.tensor([[1, 4, 4], [1, 4, 4], [1, 8, 8]]), torch.tensor([[1, 2]])
    inputs = {"pixel_values": torch.rand(96, 768), "image_grid_thw": grids, "tile_grid": tiles}
    save_file(inputs, tmp_path / "inputs.safetensors")
    picture(150, 90).save(tmp_path / "picture.png")
    run_without(bare_python, ENCODER, tmp_path / "model", tmp_path, modules_cache=tmp_path / "code")
    found = load_file(tmp_path / "outputs.safetensors")
    with torch.no_grad():
        expected = AutoModel.from_pretrained(tmp_path / "model").eval()(**inputs)
    assert torch.equal(found["tokens"], expected.last_hidden_state)
    assert torch.equal(found["index"], expected.view_index)
    for name, tensor in processor(picture(150, 90), return_tensors="pt").items():
        assert torch.equal(found[name], tensor), name


def test_a_composed_model(bare_python: Path, tmp_path: Path) -> None:
    model, processor = composed("moge")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    image = picture(150, 90)
    image.save(tmp_path / "picture.png")
    run_without(bare_python, COMPOSED, tmp_path / "model", tmp_path, modules_cache=tmp_path / "code")
    found = load_file(tmp_path / "outputs.safetensors")
    inputs = processor(images=[image], text=["what is <image>"], return_tensors="pt")
    assert torch.equal(found["ids"], inputs["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(found["logits"], model(**inputs).logits, atol=1e-5, rtol=1e-5)
