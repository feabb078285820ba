"""Folders that do not hold the same model are refused, with the differences."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints.files import write_folder, write_json
from tests.checkpoints.soup.making import CONFIG, folder, tensors
from vlparts.checkpoints.soup import average_folders, check_folders


def test_names_versions_and_options_of_training_may_differ(tmp_path: Path) -> None:
    other = {
        "transformers_version": "5.0.0",
        "_name_or_path": "b",
        "torch_dtype": "float32",
        "use_cache": False,
        "text_config": {"layers": 2, "attention_dropout": 0.1, "hidden_dropout_prob": 0.5},
        "initializer_range": 0.1,
    }
    paths = [folder(tmp_path / "a", 0), folder(tmp_path / "b", 1, other)]
    assert [stored.folder for stored in check_folders(paths)] == paths


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "model type": ({"config": {"model_type": "other"}}, "config.json has model_type 'other' instead of 'any'."),
    "nested field": (
        {"config": {"text_config": {"layers": 3, "width": 5}}},
        "config.json has text_config.layers 3 instead of 2, text_config.width 5 instead of missing.",
    ),
    "section": (
        {"config": {"text_config": None}},
        "text_config None instead of missing, text_config.layers missing instead of 2.",
    ),
    "null or missing": ({"config": {"new": None}}, "new None instead of missing"),
    "further tensor": ({"z": torch.zeros(1)}, "further tensors: z."),
    "shape": ({"a.weight": torch.zeros(5, 7)}, "other shapes: a.weight (5, 7) instead of (7, 5)."),
    "dtype": ({"a.weight": torch.zeros(7, 5).half()}, "other dtypes: a.weight F16 instead of F32."),
    "many": ({f"z{index}": torch.zeros(1) for index in range(9)}, "further tensors: z0, z1, z2, z3, z4, and 4 more."),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_other_models_are_refused(tmp_path: Path, name: str) -> None:
    changes, message = DIFFERENT[name]
    paths = [folder(tmp_path / "a", 0), folder(tmp_path / "b", 1), folder(tmp_path / "c", 2, **changes)]
    with pytest.raises(ValueError, match="`folders` must hold the same model, but .*c differs from .*a: ") as caught:
        average_folders(paths, tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_all_differences_are_named(tmp_path: Path) -> None:
    other = tensors(1, z=torch.zeros(1))
    del other["b.weight"], other["mask"]
    paths = [folder(tmp_path / "a", 0), write_folder(tmp_path / "b", other, {**CONFIG, "hidden_size": 5})]
    with pytest.raises(ValueError, match="same model") as caught:
        check_folders(paths)
    assert str(caught.value).endswith(
        "config.json has hidden_size 5 instead of 4; missing tensors: b.weight, mask; further tensors: z."
    )


def test_integers_must_be_equal(tmp_path: Path) -> None:
    paths = [
        folder(tmp_path / "a", 0),
        folder(tmp_path / "b", 1, positions=torch.arange(1, 7), mask=torch.tensor([True, True])),
    ]
    with pytest.raises(
        ValueError, match="equal tensors where they are not of a floating-point dtype, .* in .*"
    ) as one:
        check_folders(paths)
    assert "mask" in str(one.value)
    assert "positions" in str(one.value)


def test_other_vocabularies(tmp_path: Path) -> None:
    paths = [folder(tmp_path / "a", 0), folder(tmp_path / "b", 1)]
    for path, token in zip(paths, ("x", "y"), strict=True):
        write_json(path / "tokenizer.json", {"version": token, "model": {"vocab": {"a": 0}}})
        (path / "merges.txt").write_text("a b", encoding="utf-8")
    check_folders(paths)
    (paths[1] / "merges.txt").write_text("b a", encoding="utf-8")
    write_json(paths[1] / "tokenizer.json", {"model": {"vocab": {"a": 1}}})
    with pytest.raises(ValueError, match="other tokens in merges.txt, tokenizer.json."):
        check_folders(paths)


def test_folders_without_a_model(tmp_path: Path) -> None:
    good = folder(tmp_path / "a", 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="`folders` must have at least one folder, got none"):
        check_folders([])
    with pytest.raises(ValueError, match="`folders` must be local folders with a config.json, got .*empty"):
        check_folders([good, tmp_path / "empty"])
    write_json(tmp_path / "empty" / "config.json", {})
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"`folders`: .*empty: .* Pickled weights are not read"):
        check_folders([good, tmp_path / "empty"])


def test_quantized_weights_and_indices_without_tensors(tmp_path: Path) -> None:
    quantized = folder(tmp_path / "a", 0, {"quantization_config": {"bits": 4}})
    with pytest.raises(ValueError, match="`folders` must have weights that are not quantized, got .*a"):
        check_folders([quantized])
    path = folder(tmp_path / "b", 0)
    index = json.loads((path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    index["weight_map"]["gone"] = "model-00001-of-00003.safetensors"
    write_json(path / "model.safetensors.index.json", index)
    with pytest.raises(ValueError, match="`folders`: .*b has an index with tensors that no file has: gone"):
        check_folders([path])
