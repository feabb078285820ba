"""The window-free encoder as remote code; see `test_life.py`."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from tests.remote.test_life import ENCODER
from tests.tiny import WINDOWED, picture, windowfree
from vlparts import WindowFreeViTImageProcessor
from vlparts.demo.isolation import run_without

OUTPUTS = ENCODER.replace('"pooled": found.pooler_output', '"taps": torch.stack(found.feature_maps)')


VARIANTS = {
    "full": {},
    "hybrid": {"attention_pattern": WINDOWED},
    "positions": {"position_grid_size": 3, "patch_bias": True, "norm_type": "layer_norm", "final_norm": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_encoder_and_its_image_processor(bare_python: Path, tmp_path: Path, variant: str) -> None:
    model = windowfree(**VARIANTS[variant], feature_layers=[-1, -3])
    processor = WindowFreeViTImageProcessor(patch_size=4, size={"shortest_edge": 256, "longest_edge": 4096})
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    grids = torch.tensor([[1, 4, 6], [2, 2, 2]])
    pixels = torch.randint(0, 256, (32, 48), dtype=torch.uint8)
    save_file({"pixel_values": pixels, "image_grid_thw": grids}, tmp_path / "inputs.safetensors")
    picture(41, 60).save(tmp_path / "picture.png")
    run_without(bare_python, OUTPUTS, tmp_path / "model", tmp_path, modules_cache=tmp_path / "code")
    # Loaded from the folder as well, since the memory alignment of weights affects the order of sums.
    with torch.no_grad():
        expected = AutoModel.from_pretrained(tmp_path / "model").eval()(pixels, grids)
    found = load_file(tmp_path / "outputs.safetensors")
    assert torch.equal(found["taps"], torch.stack(expected.feature_maps))
    again = processor(picture(41, 60), return_tensors="pt")
    assert found["pixel_values"].dtype == torch.uint8
    assert torch.equal(found["pixel_values"], again["pixel_values"])
    assert torch.equal(found["image_grid_thw"], again["image_grid_thw"])
