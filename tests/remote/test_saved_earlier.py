"""Folders that were saved by an earlier commit go on loading: they carry their own code, and call operations by name.

`saved/d4d1de7.zip` holds a NaViT and a composed model (NaViT and Qwen3) with their processors, written by
`save_pretrained` at that commit, and inputs with the outputs that they had there.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vlparts.demo.isolation import run_without

ARCHIVE = Path(__file__).parent / "saved" / "d4d1de7.zip"

CHECK = """
import sys, torch
from pathlib import Path
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor
folder = Path(sys.argv[1])

def check(model, inputs, outputs, found):
    # transformers prefers registered classes to those of the folder.
    origin = "vlparts." if "vlparts.registration" in sys.modules else "transformers_modules."
    assert type(model).__module__.startswith(origin), type(model).__module__
    for name in outputs:
        assert torch.allclose(found[name], inputs[name], rtol=1e-4, atol=1e-4), name

def encode():
    expected, options = load_file(folder / "navit_expected.safetensors"), {"trust_remote_code": True}
    model = AutoModel.from_pretrained(folder / "navit", **options).eval()
    images = AutoImageProcessor.from_pretrained(folder / "navit", **options)
    pixels = images(Image.open(folder / "picture.png"), return_tensors="pt")
    with torch.no_grad():
        found = model(**pixels)
    found = {"hidden": found.last_hidden_state, "pooled": found.pooler_output, "pixel_values": pixels["pixel_values"]}
    check(model, expected, found, found)

def generate():
    expected, options = load_file(folder / "vlm_expected.safetensors"), {"trust_remote_code": True}
    model = AutoModelForImageTextToText.from_pretrained(folder / "vlm", **options).eval()
    processor = AutoProcessor.from_pretrained(folder / "vlm", **options)
    image = Image.open(folder / "picture.png")
    blocks = [{"type": "image", "image": image}, {"type": "text", "text": "Where is the cat?"}]
    inputs = processor.apply_chat_template([{"role": "user", "content": blocks}], tokenize=True, return_dict=True,
                                           return_tensors="pt", add_generation_prompt=True)
    with torch.no_grad():
        logits = model(**inputs).logits
    check(model, expected, ["logits"], {"logits": logits})
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), expected["tokens"])
"""

BOTH = "encode()\ngenerate()\n"
# The present library in the same process, after code of the past has defined operations of the same names.
PRESENT = """
import vlparts
model = vlparts.NaViTModel(vlparts.NaViTConfig.from_preset("tiny")).eval()
images = vlparts.NaViTImageProcessor(patch_size=model.config.patch_size)
inputs = images(Image.open(folder / "picture.png"), return_tensors="pt")
assert model(**inputs).last_hidden_state.isfinite().all()
model(**inputs).pooler_output.sum().backward()
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(folder)
    return folder


def test_it_loads_without_vlparts(bare_python: Path, saved: Path, tmp_path: Path) -> None:
    run_without(bare_python, CHECK + BOTH, saved, modules_cache=tmp_path)


@pytest.mark.parametrize(
    "script",
    [CHECK + BOTH, "import vlparts\n" + CHECK + BOTH, CHECK + BOTH + PRESENT + BOTH],
    ids=["its own code", "the classes of today", "its own code, then those of today"],
)
def test_it_loads_with_vlparts(saved: Path, tmp_path: Path, script: str) -> None:
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, str(saved)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
