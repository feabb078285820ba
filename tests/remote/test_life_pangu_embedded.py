"""The openPangu language model as remote code; see `test_life.py`."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.parts.test_pangu_embedded import LAYOUT, OTHER, multimodal, pangu, with_places
from tests.remote.test_life import PREAMBLE
from tests.tiny import tokenizer
from vlparts.demo.isolation import run_without

LANGUAGE_MODEL = (
    PREAMBLE
    + """
from transformers import AutoModel, AutoModelForCausalLM, pipeline
inputs = load_file(work / "inputs.safetensors")
def outputs(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        logits = model(**inputs).logits
    return model, {"logits": logits, "tokens": model.generate(**inputs, max_new_tokens=4, do_sample=False)}
model, first = outputs(folder)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
headless = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(headless).__name__ == "PanguEmbeddedModel"
model.save_pretrained(work / "again")
_, second = outputs(work / "again")
assert all(torch.equal(first[name], second[name]) for name in first)
write = pipeline("text-generation", model=str(folder), trust_remote_code=True)
tokens = write.tokenizer("Where is", return_tensors="pt").input_ids
row = model.generate(tokens, max_new_tokens=4, do_sample=False)[0]
expected = write.tokenizer.decode(row, skip_special_tokens=True)
answer = write("Where is", max_new_tokens=4, do_sample=False)[0]["generated_text"]
assert answer == expected, (answer, expected)
save_file(first, work / "outputs.safetensors")
"""
)


@pytest.mark.parametrize("preset", ["tiny", "tiny_mrope"])
def test_a_language_model(bare_python: Path, tmp_path: Path, preset: str) -> None:
    words = tokenizer()
    pangu(preset, vocab_size=len(words)).save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    inputs, positions = multimodal(LAYOUT, OTHER, padding=[(0, 0), (10, 0)])
    rows = with_places(positions, inputs["attention_mask"])
    inputs["position_ids"] = (rows[0] if preset == "tiny" else rows).contiguous()
    save_file(inputs, tmp_path / "inputs.safetensors")
    run_without(bare_python, LANGUAGE_MODEL, tmp_path / "model", tmp_path, modules_cache=tmp_path / "code")
    found = load_file(tmp_path / "outputs.safetensors")
    # Loaded from the folder as well, since the memory alignment of weights affects the order of sums.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.equal(found["logits"], model(**inputs).logits)
    assert torch.equal(found["tokens"], model.generate(**inputs, max_new_tokens=4, do_sample=False))
