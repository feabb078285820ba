"""Folders of published models: JSON that cannot be used, and folders that are written in one piece or not at all."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints.files import read_folder, write_folder, write_json
from tests.checkpoints.openpangu_vl import files as openpangu_vl
from tests.checkpoints.pangu_pro_moe import files as pangu_pro_moe
from vlparts import MoGEConfig, MoGEForCausalLM, WindowFreeViTConfig, WindowFreeViTModel
from vlparts.checkpoints._folder import new_folder
from vlparts.checkpoints.openpangu_vl import encoder_from_openpangu_vl, model_from_openpangu_vl, to_openpangu_vl
from vlparts.checkpoints.pangu_pro_moe import model_from_pangu_pro_moe, to_pangu_pro_moe
from vlparts.checkpoints.vit import from_vit

FAMILIES: dict[str, tuple[Callable[..., Any], Any]] = {
    "Pangu Pro MoE": (model_from_pangu_pro_moe, pangu_pro_moe),
    "openPangu-VL": (model_from_openpangu_vl, openpangu_vl),
    "openPangu-VL's encoder": (encoder_from_openpangu_vl, openpangu_vl),
}
families = pytest.mark.parametrize("family", FAMILIES)
DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
WRITERS: dict[str, Callable[..., None]] = {
    "Pangu Pro MoE": lambda *args, **options: to_pangu_pro_moe(
        MoGEForCausalLM(MoGEConfig.from_preset("tiny")), *args, **options
    ),
    "openPangu-VL": lambda *args, **options: to_openpangu_vl(
        WindowFreeViTModel(WindowFreeViTConfig.from_preset("hybrid_tiny")), *args, **options
    ),
}
writers = pytest.mark.parametrize("writer", WRITERS)


def published_folder(family: str, folder: Path) -> Path:
    files = FAMILIES[family][1]
    return write_folder(folder, files.all_tensors(), files.TINY)


@families
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_values_that_are_nested_too_deeply(tmp_path: Path, family: str, name: str) -> None:
    folder = published_folder(family, tmp_path / "in")
    (folder / name).write_text(DEEP, encoding="utf-8")
    with pytest.raises(ValueError, match=f"`folder` has a {name} whose values are nested too deeply to be read"):
        FAMILIES[family][0](folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (DEEP, "`source` has a config.json whose values are nested too deeply to be read"),
        ("{", "`source` has a config.json that is no JSON"),
        ("[1]", "`source` must have a config.json with one JSON object, got list"),
        ('{"architectures": 5}', "`source` must have one of ViTModel, .*, got 5"),
        ('{"architectures": [["ViTModel"]]}', "`source` must have one of ViTModel, .*, got .'ViTModel'."),
    ],
)
def test_configurations_of_other_encoders(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        from_vit(tmp_path)


@families
@pytest.mark.parametrize("named", [5, "PanguProMoEForCausalLM", [["OpenPanguVL"]], {"OpenPanguVL": 1}])
def test_architectures_that_are_no_names(tmp_path: Path, family: str, named: Any) -> None:
    folder = published_folder(family, tmp_path / "in")
    write_json(folder / "config.json", {**FAMILIES[family][1].TINY, "architectures": named})
    with pytest.raises(ValueError, match="`folder` must have the architectures .*, got "):
        FAMILIES[family][0](folder)


NO_NUMBERS: list[Any] = ["10000", [1], {"a": 1}, True, float("nan"), float("inf")]
# Numeric fields by family and section, in which the values above are no numbers of the expected kind.
NUMBERS: dict[str, tuple[str, ...]] = {
    "Pangu Pro MoE": ("rope_theta", "rms_norm_eps", "initializer_range", "attention_dropout"),
    "openPangu-VL": (
        "rope_theta",
        "rope_scaling.factor",
        "rope_scaling.original_max_position_embeddings",
        "rope_parameters.rope_theta",
        "rms_norm_eps",
        "initializer_range",
        "attention_dropout",
        "image_token_id",
        "video_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
        "vision_config.rms_norm_eps",
        "vision_config.out_hidden_size",
    ),
    "openPangu-VL's encoder": ("vision_config.rms_norm_eps", "vision_config.num_heads", "vision_config.depth"),
}


def write_field(folder: Path, config: dict[str, Any], field: str, value: Any) -> None:
    """Write config.json with a field, or with one of a section, set to a value."""
    config = json.loads(json.dumps(config))
    section, _, name = field.rpartition(".")
    if section == "rope_parameters":
        config["rope_parameters"] = {**config.pop("rope_scaling"), "rope_theta": config.pop("rope_theta")}
    (config[section] if section else config)[name] = value
    write_json(folder / "config.json", config)


@families
def test_fields_that_are_no_numbers(tmp_path: Path, family: str) -> None:
    folder = published_folder(family, tmp_path / "in")
    for field in NUMBERS[family]:
        for value in NO_NUMBERS:
            write_field(folder, FAMILIES[family][1].TINY, field, value)
            with pytest.raises(ValueError, match=rf"`folder` .*\b{field.rpartition('.')[2]}\b"):
                FAMILIES[family][0](folder)


@pytest.mark.parametrize("value", [1000, 1000.5])
@pytest.mark.parametrize("family", ["Pangu Pro MoE", "openPangu-VL"])
def test_integers_are_numbers_too(tmp_path: Path, family: str, value: float) -> None:
    folder = published_folder(family, tmp_path / "in")
    write_field(folder, FAMILIES[family][1].TINY, "rope_theta", value)
    config = FAMILIES[family][0](folder).config
    assert getattr(config, "text_config", config).rope_parameters["rope_theta"] == value


@pytest.mark.parametrize(
    ("family", "field", "value", "message"),
    [
        ("Pangu Pro MoE", "rope_theta", "1e4", "whose rope_theta is a finite number, got '1e4'."),
        ("openPangu-VL", "vision_start_token_id", 1.5, "whose vision_start_token_id is an integer, got 1.5."),
        (
            "openPangu-VL",
            "vision_config.out_hidden_size",
            24.0,
            "whose out_hidden_size is an integer in vision_config, got 24.0.",
        ),
        ("openPangu-VL", "rope_scaling.rope_type", [1], "whose rope_type is a known one in rope_parameters, got [1]."),
        ("openPangu-VL", "rope_scaling.rope_type", "x", "whose rope_type is a known one in rope_parameters, got 'x'."),
        ("Pangu Pro MoE", "hidden_act", "x", "whose hidden_act is a known one, got 'x'."),
        ("openPangu-VL", "hidden_act", "x", "whose hidden_act is a known one in text_config, got 'x'."),
        ("openPangu-VL's encoder", "vision_config.hidden_act", [], "is a known one in vision_config, got []."),
    ],
)
def test_messages_of_fields_that_do_not_fit(tmp_path: Path, family: str, field: str, value: Any, message: str) -> None:
    folder = published_folder(family, tmp_path / "in")
    write_field(folder, FAMILIES[family][1].TINY, field, value)
    with pytest.raises(ValueError) as caught:
        FAMILIES[family][0](folder)
    assert str(caught.value).startswith("`folder` must have a config.json ")
    assert str(caught.value).endswith(message)


@pytest.mark.parametrize("value", [[1], -1.0])
def test_rotary_bases_that_do_not_fit(tmp_path: Path, value: Any) -> None:
    folder = published_folder("openPangu-VL", tmp_path / "in")
    write_field(folder, FAMILIES["openPangu-VL"][1].TINY, "rope_theta", value)
    with pytest.raises(ValueError, match="`folder` has a config.json .* `rope_theta` must be a finite number above 0"):
        FAMILIES["openPangu-VL"][0](folder)


@pytest.mark.parametrize("family", ["openPangu-VL", "openPangu-VL's encoder"])
@pytest.mark.parametrize("value", [["1"], [[1]], [True], [0.5]])
def test_indices_of_layers_that_are_no_integers(tmp_path: Path, family: str, value: list[Any]) -> None:
    folder = published_folder(family, tmp_path / "in")
    write_field(folder, openpangu_vl.TINY, "vision_config.fullatt_block_indexes", value)
    with pytest.raises(ValueError, match="a list of integers as fullatt_block_indexes, got "):
        FAMILIES[family][0](folder)


@pytest.mark.parametrize("family", ["Pangu Pro MoE", "openPangu-VL"])
def test_a_byte_order_mark_is_accepted(tmp_path: Path, family: str) -> None:
    folder = published_folder(family, tmp_path / "in")
    write_json(folder / "generation_config.json", {"max_new_tokens": 7, "top_p": 0.5})
    for path in folder.glob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    model = FAMILIES[family][0](folder)
    model = getattr(model, "model", model) if not hasattr(model, "generation_config") else model
    assert (model.generation_config.max_new_tokens, model.generation_config.top_p) == (7, 0.5)


@pytest.mark.parametrize("family", ["Pangu Pro MoE", "openPangu-VL"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "`folder` must have a generation_config.json with one JSON object, got list"),
        ("{", "`folder` has a generation_config.json that is no JSON"),
        (DEEP, "`folder` has a generation_config.json whose values are nested too deeply to be read"),
        ('{"max_new_tokens": "many"}', "`folder` has a generation_config.json whose fields do not fit: "),
        ('{"watermarking_config": 5}', "`folder` has a generation_config.json whose fields do not fit: "),
        (
            '{"suppress_tokens": "abc"}',
            "generation_config.json whose suppress_tokens are a list of integers, got 'abc'",
        ),
        ('{"suppress_tokens": [1, true]}', "suppress_tokens are a list of integers, got .1, True."),
    ],
)
def test_generation_options_that_cannot_be_used(tmp_path: Path, family: str, content: str, message: str) -> None:
    folder = published_folder(family, tmp_path / "in")
    for weights in folder.glob("*.safetensors*"):
        weights.unlink()  # the options are read before the weights
    (folder / "generation_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        FAMILIES[family][0](folder)


def test_an_image_processor_that_is_no_object(tmp_path: Path) -> None:
    folder = published_folder("openPangu-VL", tmp_path / "in")
    write_json(folder / "preprocessor_config.json", {"image_processor": [1]})
    with pytest.raises(ValueError, match="a preprocessor_config.json whose image_processor is an object, got .1."):
        model_from_openpangu_vl(folder)


@writers
@pytest.mark.parametrize(
    "size", [None, 0, -1, 1.5, True, "", "5", "0GB", "-1GB", "nanGB", "infGB", "0.0001KB", "5GiB", "5 gigabytes"]
)
def test_sizes_of_files_that_are_none(tmp_path: Path, writer: str, size: Any) -> None:
    with pytest.raises(ValueError, match="`max_shard_size` must be a positive integer or text like") as caught:
        WRITERS[writer](tmp_path / "out", max_shard_size=size)
    assert str(caught.value).endswith(f"got {size!r}.")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [1, "1.5KB", " 2 kb ", ".5MB", "1TB"])
def test_sizes_of_files(tmp_path: Path, size: int | str) -> None:
    WRITERS["openPangu-VL"](tmp_path / "out", max_shard_size=size)
    assert read_folder(tmp_path / "out")


@writers
@pytest.mark.parametrize("kind", ["dangling", "looping", "below a dangling link", "below a file", "link to a file"])
def test_paths_that_cannot_be_folders(tmp_path: Path, writer: str, kind: str) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    target = {"dangling": "nothing", "looping": "link", "link to a file": "file"}.get(kind, "nothing")
    (tmp_path / "link").symlink_to(tmp_path / target)
    path = {"below a dangling link": tmp_path / "link" / "out", "below a file": tmp_path / "file" / "out"}
    with pytest.raises(ValueError, match="`folder` must be (new or empty|a path of folders), got "):
        WRITERS[writer](path.get(kind, tmp_path / "link"))
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


@writers
@pytest.mark.parametrize("place", ["new", "new/of/new", "empty"])
def test_nothing_is_left_of_a_folder_that_could_not_be_written(
    tmp_path: Path, writer: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    module = {"Pangu Pro MoE": "pangu_pro_moe", "openPangu-VL": "openpangu_vl"}[writer]
    monkeypatch.setattr(f"vlparts.checkpoints.{module}.conversion.write_config", broken)
    with pytest.raises(OSError, match="No space left"):
        WRITERS[writer](tmp_path / place)
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


@writers
def test_a_model_with_generation_options_that_cannot_be_saved(tmp_path: Path, writer: str) -> None:
    if writer == "openPangu-VL":
        model = model_from_openpangu_vl(published_folder("openPangu-VL", tmp_path / "in"))
        write: Callable[..., None] = to_openpangu_vl
    else:
        model, write = MoGEForCausalLM(MoGEConfig.from_preset("tiny")), to_pangu_pro_moe
    model.generation_config.do_sample = False
    model.generation_config.temperature = 0.5
    with pytest.raises(ValueError, match="temperature"):
        write(model, tmp_path / "out")
    assert not any("out" in path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize("place", ["new", "new/of/new", "empty", "link", "."])
def test_a_folder_has_all_files_at_its_end(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An existing folder stays the same one, also behind a link or as the working directory."""
    work = tmp_path / "work"
    (work / "empty").mkdir(parents=True) if place != "." else work.mkdir()
    if place == "link":
        (work / "link").symlink_to("empty")
    monkeypatch.chdir(work)
    before = os.stat(place).st_ino if os.path.exists(place) else None
    with new_folder(place) as path:
        for name in ("config.json", "a.safetensors", "z.json"):
            write_json(path / name, {"name": name})
            assert not (Path(place) / name).exists()
    assert before in (None, os.stat(place).st_ino)
    assert sorted(os.listdir(place)) == ["a.safetensors", "config.json", "z.json"]
    assert json.loads((Path(place) / "z.json").read_text(encoding="utf-8")) == {"name": "z.json"}
    (work / "plain").mkdir()
    assert stat.S_IMODE(os.stat(place).st_mode) == stat.S_IMODE(os.stat(work / "plain").st_mode)
    assert not list(work.rglob("*.tmp"))
