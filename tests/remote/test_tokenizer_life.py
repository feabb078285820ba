"""The coordinate tokenizer as remote code; see `test_life.py`."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.remote.test_life import PREAMBLE
from tests.tiny import tokenizer
from tests.tokenizers_made import made
from vlparts import NaViTImageProcessor, VisionLanguageProcessor
from vlparts.demo.isolation import run_without
from vlparts.parts.tokenization_coordinates import PaddedCoordinateTokenizer

TEXT = "The cat<|box_start|>(012,345),(678,999)<|box_end|>, a dog at(000,123)x and 12345 (12,34).\n"
MARKERS = {"box_start": "<|box_start|>", "box_end": "<|box_end|>"}

SCRIPT = (
    PREAMBLE
    + """
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast
text = (work / "text.txt").read_text(encoding="utf-8")
def outputs(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert type(tokenizer).__module__.startswith("transformers_modules."), type(tokenizer).__module__
    ids = tokenizer(text)["input_ids"]
    coordinates = tokenizer.coordinate_token_ids()
    found = [ids, tokenizer.decode(ids), tokenizer.coordinate_format, tokenizer.tokens_per_box]
    return tokenizer, found + [list(coordinates.digits), coordinates.markers]
tokenizer, first = outputs(folder)
if (folder / "processor_config.json").exists():
    holder = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert type(holder.tokenizer).__name__ == type(tokenizer).__name__
    holder.save_pretrained(work / "again")
else:
    tokenizer.save_pretrained(work / "again")
assert PreTrainedTokenizerFast.from_pretrained(folder)(text)["input_ids"] == first[0]
_, second = outputs(work / "again")
assert first == second, (first, second)
(work / "outputs.json").write_text(json.dumps(first), encoding="utf-8")
"""
)


def live(python: Path, tmp_path: Path, words: PaddedCoordinateTokenizer) -> None:
    """Run the script and compare what it found with what the tokenizer gives here."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    run_without(python, SCRIPT, tmp_path / "model", tmp_path, modules_cache=tmp_path / "code")
    ids, text, stored, per_box, digits, markers = json.loads((tmp_path / "outputs.json").read_text(encoding="utf-8"))
    expected = words.coordinate_token_ids()
    assert ids == words(TEXT)["input_ids"]
    assert text == words.decode(ids)
    assert (stored, per_box) == (words.coordinate_format, words.tokens_per_box)
    assert (tuple(digits), markers) == (expected.digits, expected.markers)


@pytest.mark.parametrize("kind", ["bytes, three digits", "llama", "t5", "wordpiece"])
def test_a_tokenizer_alone(bare_python: Path, tmp_path: Path, kind: str) -> None:
    words = PaddedCoordinateTokenizer.from_tokenizer(made(kind), markers=MARKERS)
    words.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["auto_map"] == {"AutoTokenizer": ["tokenization_coordinates.PaddedCoordinateTokenizer", None]}
    live(bare_python, tmp_path, words)


def test_a_tokenizer_inside_a_processor(bare_python: Path, tmp_path: Path) -> None:
    words = PaddedCoordinateTokenizer.from_tokenizer(tokenizer(), markers=MARKERS)
    processor = VisionLanguageProcessor(NaViTImageProcessor(patch_size=4), words)
    processor.save_pretrained(tmp_path / "model")
    assert type(AutoTokenizer.from_pretrained(tmp_path / "model")) is PaddedCoordinateTokenizer
    live(bare_python, tmp_path, words)
