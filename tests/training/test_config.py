"""Settings from YAML files and changes to them."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from vlparts.training.config import TrainConfig, load_config

# A value other than the default for every field, or in ALTERNATIVES for one that excludes others.
VALUES: dict[str, Any] = {
    "data": {Path("train.jsonl"): 0.5, Path("more.jsonl"): 1.5},
    "output": "model",
    "eval_data": "eval.jsonl",
    "vision": {"preset": "navit:tiny", "depth": 3},
    "text": "folder",
    "model": "composed",
    "tokenizer": "words",
    "columns": {"images": "pictures"},
    "ignore_columns": ["url"],
    "num_proc": 2,
    "check_pixels": True,
    "chat_template": "chat.jinja",
    "projector": "linear",
    "projector_options": {},
    "token_reduction": "resampler",
    "token_ratio": 0.5,
    "token_count": 4,
    "token_options": {"num_heads": 2},
    "freeze": ["vision"],
    "image_processor": {"size": {"shortest_edge": 4}},
    "max_image_pixels": 10**6,
    "dpi": 72.0,
    "coordinate_format": "padded",
    "prompts": ["What is it?"],
    "capacity": 10,
    "max_items": 3,
    "packing": False,
    "epochs": 2.5,
    "max_steps": 7,
    "optimizer": "muon",
    "learning_rate": 0.5,
    "learning_rate_steps": [(0.5, 0.1)],
    "learning_rates": {"vision": 0.1},
    "warmup_ratio": 0.5,
    "weight_decay": 0.5,
    "weight_decays": {"*.bias": 0.1},
    "gradient_accumulation_steps": 2,
    "loss": "openpangu_mix",
    "mix": 0.25,
    "sample_weight_field": "weight",
    "seed": 3,
    "save_steps": 2,
    "eval_steps": 2,
    "logging_steps": 2,
    "resume": True,
    "on_error": "skip",
    "on_outside": "clamp",
    "cache": True,
    "metrics": False,
    "trust_remote_code": True,
    "trainer": {"max_grad_norm": 0.5},
}
ALTERNATIVES: list[dict[str, Any]] = [
    {"train": ["model.*"]},
    {"max_tokens": 5},
    {"streaming": True, "max_steps": 3, "shuffle_buffer": 5, "tokenizer_records": 7},
    {"template": "continuation"},
    {"kind": "dual_encoder", "dual_encoder": {"loss": "sigmoid"}},
]


def written(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def as_yaml(values: dict[str, Any]) -> str:
    data = {str(path): share for path, share in VALUES["data"].items()}
    return yaml.safe_dump({**values, "learning_rate_steps": [[0.5, 0.1]], "data": data, "output": "model"})


def test_every_setting_can_stand_in_a_file(tmp_path: Path) -> None:
    assert set(VALUES) | {name for one in ALTERNATIVES for name in one} == set(TrainConfig.model_fields)
    defaults = TrainConfig(data="a", output="b")
    for values in (VALUES, *ALTERNATIVES):
        config = load_config(written(tmp_path, as_yaml(values)), {})
        for name, value in values.items():
            assert getattr(config, name) == (Path(value) if isinstance(getattr(config, name), Path) else value), name
            assert getattr(config, name) != getattr(defaults, name), name


def test_changes_come_before_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, as_yaml(VALUES))
    assert load_config(path, {"seed": 9, "output": Path("x")}) == load_config(path, {}).model_copy(
        update={"seed": 9, "output": Path("x")}
    )


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "+1e-4", "0.0001"])
def test_numbers_with_exponents_are_numbers(tmp_path: Path, text: str) -> None:
    """Plain YAML reads 1e-4 as a text, also deep inside `trainer`, where nothing would turn it back."""
    path = written(tmp_path, f"data: a\noutput: b\ntrainer: {{adam_epsilon: {text}, list: [{text}]}}")
    trainer = load_config(path, {}).trainer
    assert trainer == {"adam_epsilon": 1e-4, "list": [1e-4]}


@pytest.mark.parametrize("text", ["1e", "e5", "1e5x", "'1e5'", "1e-4-1"])
def test_other_texts_stay_texts(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, f"data: a\noutput: b\nprojector: {text}")
    assert load_config(path, {}).projector == text.strip("'")


def test_an_empty_file_leaves_everything_to_the_changes(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, ""), {"data": "a", "output": "b"}) == load_config(
        None, {"data": "a", "output": "b"}
    )


def test_a_setting_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    for text in ("data: a\noutput: b\nseed: 1\nseed: 2", "data: a\noutput: b\ntrainer: {seed: 1, seed: 1}"):
        with pytest.raises(ValueError, match="`config` .* cannot be read: the key 'seed' occurs twice"):
            load_config(written(tmp_path, text), {})


def test_a_setting_that_is_left_to_the_user_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "data: ???\noutput: b\ntext: ???")
    with pytest.raises(ValueError, match="Invalid training settings: `data`, `text` must be set; the file leaves"):
        load_config(path, {})
    assert load_config(path, {"data": "a", "text": "c"}).text == "c"


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`config` .*settings\.yaml cannot be read"):
        load_config(written(tmp_path, "data: !!python/object/apply:os.getcwd []"), {})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("capacity", 0),
        ("max_items", 0),
        ("epochs", 0),
        ("epochs", float("nan")),
        ("learning_rate", -1),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("warmup_ratio", 1),
        ("warmup_ratio", -0.1),
        ("weight_decay", -0.1),
        ("gradient_accumulation_steps", 0),
        ("save_steps", 0),
        ("eval_steps", 0),
        ("logging_steps", 0),
        ("max_steps", -2),
        ("optimizer", "sgd"),
        ("freeze", "vision"),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_settings_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}`: "):
        load_config(None, {"data": "a", "output": "b", name: value})
