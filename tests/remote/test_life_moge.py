"""The mixture of experts as remote code; see `test_life.py`."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.parts.test_moge import moge, tokens
from tests.remote.test_life import PREAMBLE
from tests.tiny import tokenizer
from vlparts.demo.isolation import run_without

MIXTURE = (
    PREAMBLE
    + """
from transformers import AutoModel, AutoModelForCausalLM, pipeline
inputs = load_file(work / "inputs.safetensors")
def outputs(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert model.config._experts_implementation == "grouped_mm"
    with torch.no_grad():
        found = model(**inputs, labels=inputs["input_ids"], output_router_logits=True)
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return model, {"logits": found.logits, "balance": found.aux_loss, "tokens": generated}
model, first = outputs(folder)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
model.set_experts_implementation("eager")
torch.testing.assert_close(model(**inputs).logits, first["logits"])
headless = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(headless).__name__ == "MoGEModel"
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


def test_a_mixture_of_experts(bare_python: Path, tmp_path: Path) -> None:
    words = tokenizer()
    moge(mlp_only_layers=[0], vocab_size=len(words)).save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    inputs = {"input_ids": tokens(), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    inputs["attention_mask"][0, :3] = 0
    save_file(inputs, tmp_path / "inputs.safetensors")
    run_without(bare_python, MIXTURE, tmp_path / "model", tmp_path, modules_cache=tmp_path / "code")
    found = load_file(tmp_path / "outputs.safetensors")
    # Loaded from the folder as well, since the memory alignment of weights affects the order of sums.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        outputs = model(**inputs, output_router_logits=True)
    assert torch.equal(found["logits"], outputs.logits)
    assert torch.equal(found["balance"], outputs.aux_loss)
    assert torch.equal(found["tokens"], model.generate(**inputs, max_new_tokens=4, do_sample=False))
