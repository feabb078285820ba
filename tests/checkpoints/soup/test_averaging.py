"""The mean of folders: against float64, to the bit where models are equal, file by file as the first folder."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from tests.checkpoints.files import assert_same_bytes, read_folder, write_json
from tests.checkpoints.soup.making import SHAPES, folder, folders
from tests.tiny import order_one, text_config, tokenizer, vision_config
from vlparts import compose, compose_processor
from vlparts.checkpoints.soup import average_folders
from vlparts.checkpoints.soup.averaging import _mean

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def rounding(dtype: torch.dtype, values: list[Tensor]) -> Tensor:
    """Bound of the error of a mean: float32 roundings of the largest values, and one to the dtype."""
    largest = torch.stack([value.double().abs() for value in values]).amax(0)
    wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    return largest * (2 * (len(values) + 2) * wide.eps + torch.finfo(dtype).eps / 2) + torch.finfo(dtype).tiny


@pytest.mark.parametrize("weights", [None, [1, 2, 5], [0.25, 0.0, 0.75]])
def test_the_mean_is_that_of_float64(tmp_path: Path, weights: list[float] | None) -> None:
    paths = folders(tmp_path, 3)
    assert average_folders(paths, tmp_path / "out", weights=weights) == []
    models, found = [read_folder(path) for path in paths], read_folder(tmp_path / "out")
    assert found.keys() == models[0].keys()
    shares = [one / sum(weights or [1] * 3) for one in weights or [1] * 3]
    for name, mean in found.items():
        values = [model[name] for model in models]
        assert (mean.dtype, mean.shape) == (values[0].dtype, values[0].shape)
        if name not in SHAPES:
            assert torch.equal(mean, values[0])
            continue
        expected = sum(share * value.double() for share, value in zip(shares, values, strict=True))
        assert ((mean.double() - expected).abs() <= rounding(mean.dtype, values)).all(), name


def test_a_model_of_weight_0_counts_for_nothing(tmp_path: Path) -> None:
    """Also if it is broken; the files are still those of the first folder."""
    broken = folder(tmp_path / "broken", 0, **{"a.weight": torch.full((7, 5), float("nan"))})
    paths = [folder(tmp_path / str(seed), seed, shards=2) for seed in (1, 2)]
    average_folders([broken, *paths], tmp_path / "out", weights=[0, 1, 1])
    average_folders(paths, tmp_path / "mean")
    assert_same_bytes(read_folder(tmp_path / "out"), read_folder(tmp_path / "mean"))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3


def bits(tensor: Tensor) -> list[int]:
    return list(tensor.contiguous().view(torch.uint8).numpy().tobytes())


FLOATS = st.floats(-1e4, 1e4, width=16) | st.sampled_from([float("inf"), float("-inf"), float("nan"), -0.0])


@given(
    st.lists(FLOATS, min_size=1, max_size=5),
    st.sampled_from(DTYPES),
    st.lists(st.floats(0.01, 10), min_size=1, max_size=7),
)
def test_the_mean_of_equal_models_is_the_model_to_the_bit(
    values: list[float], dtype: torch.dtype, weights: list[float]
) -> None:
    """Also infinities, NaN and the sign of zero, and with weights that have no exact sum."""
    tensor = torch.tensor(values, dtype=torch.float64).to(dtype)
    shares = [one / sum(weights) for one in weights]
    assert bits(_mean(tensor, (tensor.clone() for _ in weights[1:]), shares)) == bits(tensor)


@given(
    st.integers(1, 6).flatmap(
        lambda count: st.lists(
            st.lists(st.floats(-1e4, 1e4, width=16), min_size=count, max_size=count), min_size=2, max_size=5
        )
    ),
    st.sampled_from(DTYPES),
    st.randoms(),
)
def test_the_order_of_models_changes_roundings_only(
    values: list[list[float]], dtype: torch.dtype, random: Any
) -> None:
    models = [torch.tensor(row, dtype=torch.float64).to(dtype) for row in values]
    shares = [1 / len(models)] * len(models)
    expected = torch.stack([model.double() for model in models]).mean(0)
    random.shuffle(models)
    mean = _mean(models[0], iter(models[1:]), shares)
    assert ((mean.double() - expected).abs() <= rounding(dtype, models)).all()


def test_accumulation_is_wider_than_the_tensors() -> None:
    """512 means of bfloat16 values near 256, whose sum bfloat16 cannot hold."""
    models = [torch.tensor([256.0 + 2 * (index % 2)], dtype=torch.bfloat16) for index in range(512)]
    models[0], models[1] = torch.tensor([254.0]).bfloat16(), torch.tensor([260.0]).bfloat16()
    assert _mean(models[0], iter(models[1:]), [1 / 512] * 512).item() in (256.0, 258.0)
    assert _mean(torch.tensor([1.0]), iter([torch.tensor([1 + 2**-20])]), [0.5, 0.5]).item() == 1 + 2**-21


@pytest.mark.parametrize("count", [1, 3])
def test_the_mean_of_one_model_is_the_model(tmp_path: Path, count: int) -> None:
    path = folder(tmp_path / "a", 0)
    average_folders([path] * count, tmp_path / "out")
    for name in ("model-00001-of-00003.safetensors", "model.safetensors.index.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (path / name).read_bytes()
    assert_same_bytes(read_folder(tmp_path / "out"), read_folder(path))


def test_files_index_and_metadata_are_those_of_the_first(tmp_path: Path) -> None:
    paths = folders(tmp_path, 3)
    average_folders(paths, tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == sorted([*(path.name for path in paths[0].iterdir()), "soup.json"])
    for path in paths[0].glob("*.safetensors"):
        with safe_open(path, "pt") as first, safe_open(tmp_path / "out" / path.name, "pt") as mean:
            assert first.keys() == mean.keys()
            assert first.metadata() == mean.metadata() == {"format": "pt"}
    assert json.loads((tmp_path / "out" / "soup.json").read_text()) == {
        "recipe": "mean",
        "folders": [str(path) for path in paths],
        "weights": [1 / 3] * 3,
    }


def test_large_tensors_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlparts.checkpoints.soup.averaging.PIECE", 16)
    paths = folders(tmp_path, 2)
    average_folders(paths, tmp_path / "pieces")
    monkeypatch.undo()
    average_folders(paths, tmp_path / "whole")
    assert_same_bytes(read_folder(tmp_path / "pieces"), read_folder(tmp_path / "whole"))


def test_other_files_are_copied_from_the_first(tmp_path: Path) -> None:
    paths = folders(tmp_path, 2)
    copied = ["tokenizer.json", "modeling_any.py", "preprocessor_config.json", "generation_config.json", "LICENSE"]
    left = ["README.md", "optimizer.pt", "training_args.bin", "trainer_state.json", "adapter.safetensors", ".git"]
    for index, path in enumerate(paths):
        for name in [*copied, *left] if index == 0 else ["extra.json"]:
            write_json(path / name, {"added_tokens": [], "index": index})
    for name in ("additional_chat_templates", "checkpoint-5"):
        (paths[0] / name).mkdir()
        write_json(paths[0] / name / "tool.jinja", {})
    assert average_folders(paths, tmp_path / "out") == sorted([*left, "checkpoint-5"])
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found >= {*copied, "additional_chat_templates", "config.json"}
    assert not found & {*left, "checkpoint-5", "extra.json"}
    assert (tmp_path / "out" / "additional_chat_templates" / "tool.jinja").is_file()


def test_saved_models_are_averaged_as_their_parameters(tmp_path: Path) -> None:
    words = tokenizer()
    models = [order_one(AutoModelForCausalLM.from_config(text_config("qwen3", words)), seed) for seed in range(2)]
    for index, model in enumerate(models):
        model.save_pretrained(tmp_path / str(index), max_shard_size="20KB")
        words.save_pretrained(tmp_path / str(index))
    average_folders([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    mean = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, value in mean.named_parameters():
        expected = (models[0].get_parameter(name) + models[1].get_parameter(name)) / 2
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)


def test_a_composed_model_comes_with_its_code_and_processor(tmp_path: Path) -> None:
    words = tokenizer()
    for seed in range(2):
        torch.manual_seed(seed)
        model = compose(vision_config("navit"), text_config("qwen3", words))
        order_one(model, seed).save_pretrained(tmp_path / str(seed))
        compose_processor(model, words).save_pretrained(tmp_path / str(seed))
    assert average_folders([tmp_path / "0", tmp_path / "1"], tmp_path / "out") == []
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "soup.json", *(path.name for path in (tmp_path / "0").iterdir()),
    }  # fmt: skip
    assert (tmp_path / "out" / "modeling_vlm.py").is_file()
    mean = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    first = read_folder(tmp_path / "0")["model.language_model.norm.weight"]
    second = read_folder(tmp_path / "1")["model.language_model.norm.weight"]
    torch.testing.assert_close(mean.model.language_model.norm.weight, (first + second) / 2, rtol=0, atol=1e-6)
    AutoProcessor.from_pretrained(tmp_path / "out")


MEASURED = """
import resource, sys
from vlparts.checkpoints.soup import average_folders
average_folders(sys.argv[1:2], sys.argv[-1] + "-warm")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
average_folders(sys.argv[2:-1], sys.argv[-1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_memory_depends_neither_on_the_size_nor_on_the_number_of_models(tmp_path: Path) -> None:
    """Four models of one tensor of 32 MiB need less than one of them."""
    small = folder(tmp_path / "small", 0)
    paths = [tmp_path / str(index) for index in range(4)]
    for index, path in enumerate(paths):
        path.mkdir()
        write_json(path / "config.json", {})
        save_file({"a": torch.full((2**23,), float(index))}, path / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, small, *paths, tmp_path / "out"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 2**25
    assert read_folder(tmp_path / "out")["a"].unique().tolist() == [1.5]


@pytest.mark.parametrize(
    "weights", [[1], [1, 2, 3], [1, -1], [0, 0], [1, float("nan")], [1, float("inf")], [1, True], ["1", 1], []]
)
def test_weights_that_do_not_fit(tmp_path: Path, weights: list[Any]) -> None:
    with pytest.raises(ValueError, match="`weights` must be 2 finite numbers of at least 0, not all of them 0, got"):
        average_folders(folders(tmp_path, 2), tmp_path / "out", weights=weights)
    assert not (tmp_path / "out").exists()


def test_an_output_with_files_is_left_alone(tmp_path: Path) -> None:
    paths = folders(tmp_path, 2)
    before = read_folder(paths[0])
    for output in (paths[0], paths[0] / "config.json"):
        with pytest.raises(ValueError, match="`output` must be a new or empty folder, got"):
            average_folders(paths, output)
    assert_same_bytes(read_folder(paths[0]), before)


def test_nothing_is_left_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise OSError("No space left on device")

    paths = folders(tmp_path, 2)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("vlparts.checkpoints.soup.averaging.write_json", broken)
    with pytest.raises(OSError, match="No space left"):
        average_folders(paths, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


@settings(max_examples=20)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_weights_count_like_repeated_folders(counts: list[int]) -> None:
    models = [torch.randn(5, generator=torch.Generator().manual_seed(index)) for index in range(len(counts))]
    repeated = [model for model, count in zip(models, counts, strict=True) for _ in range(count)]
    weighted = _mean(models[0], iter(models[1:]), [count / sum(counts) for count in counts])
    plain = _mean(repeated[0], iter(repeated[1:]), [1 / len(repeated)] * len(repeated))
    torch.testing.assert_close(weighted, plain, rtol=0, atol=1e-5)
