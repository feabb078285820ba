"""Recipes: what a stage starts from, the plan, and recipes that are refused before anything is trained."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.making import TEXT, losses, saved_parts, weights, write_records
from tests.training.recipe_making import fields, small_recipe, turn, write_data, write_recipe
from vlparts.training.recipe import RECIPES, Recipe, check_recipe, load_recipe, run_recipe
from vlparts.training.train import train


def test_each_stage_starts_from_the_one_before(tmp_path: Path) -> None:
    """What a stage does not train is to the bit what the stage before left, and a stage is a run of `train`."""
    changes = {"defaults.max_steps": 2, "instruction.max_steps": -1, "instruction.epochs": 1.5}
    recipe = small_recipe(tmp_path, **changes)
    plans = check_recipe(recipe)
    result = run_recipe(recipe)
    out = tmp_path / "out"
    assert result.folder == out / "instruction"
    assert sorted(path.name for path in out.iterdir()) == ["encoder", "instruction", "projector", "recipe.jsonl"]
    tower, first, second = (weights(out / one) for one in ("encoder/vision", "projector", "instruction"))
    whole = weights(out / "encoder")
    names = {name.removeprefix("vision_model.") for name in whole if name.startswith("vision_model.")}
    assert tower.keys() == {name for name in names if not name.startswith("pooling.")} < names
    for name, value in tower.items():
        assert torch.equal(value, whole[f"vision_model.{name}"]), name
        assert torch.equal(value, first[f"model.vision_tower.{name}"]), name
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    assert any(name.startswith("model.vision_tower.") for name in moved)
    assert any(name.startswith("model.projector.") for name in moved)
    assert [stage.steps for stage in result.stages] == [plan.steps for plan in plans]
    assert plans[2].steps > 2
    config = recipe.configs["instruction"]
    alone = train(config.model_copy(update={"model": tmp_path / "out" / "projector", "output": tmp_path / "alone"}))
    assert losses(alone) == [line["loss"] for line in result.stages[2].log if "loss" in line]


def test_the_plan_is_what_is_trained(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    encoder, projector, instruction = check_recipe(recipe)
    assert not (tmp_path / "out").exists()
    assert encoder.trained == encoder.parameters
    assert projector.trained == 32 * 32 * 2 + 32 * 2
    assert instruction.trained == instruction.parameters == projector.parameters
    assert (encoder.samples, projector.samples, instruction.samples) == (8, 8, 12)
    assert 0 < instruction.longest <= instruction.tokens / 12 * 2


def test_models_of_folders_are_checked_without_their_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data(tmp_path)
    vision, text = saved_parts(tmp_path, "navit")
    content = fields(tmp_path)
    del content["stages"]["encoder"]
    content["stages"]["projector"] |= {"vision": str(vision), "text": str(text)}
    recipe = load_recipe(write_recipe(tmp_path, content))
    monkeypatch.setattr("safetensors.safe_open", None)
    trained = [plan.trained for plan in check_recipe(recipe)]
    assert trained[0] < trained[1]


def test_a_new_language_model_keeps_the_vision_encoder(tmp_path: Path) -> None:
    write_data(tmp_path)
    content = fields(tmp_path)
    stages = content["stages"]
    shared = {"data": stages["encoder"]["data"], "max_steps": 1}
    first = {"vision": stages["encoder"]["vision"], "text": {**TEXT, "hidden_size": 64}, **shared}
    content["stages"] = {"compact": first, "large": {"text": dict(TEXT), "freeze": ["vision"], **shared}}
    recipe = load_recipe(write_recipe(tmp_path, content))
    assert len(check_recipe(recipe)) == 2
    run_recipe(recipe)
    before, after = weights(tmp_path / "out/compact"), weights(tmp_path / "out/large")
    names = [name for name in before if name.startswith("model.vision_tower.")]
    assert len(names) > 10
    assert all(torch.equal(before[name], after[name]) for name in names)
    assert after["lm_head.weight"].shape[1] == 32


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "setting": (
        {"instruction.learning_rat": 1},
        "`instruction`: `learning_rat`: Extra .* `learning_rate`",
    ),
    "value": ({"projector.epochs": -1}, "`projector`: `epochs`: Input should be greater than 0"),
    "left to the user": ({"projector.text": "???"}, "`projector`: `text` must be set"),
    "output of a stage": ({"projector.output": "x"}, "`projector` must not have `output`: the recipe sets"),
    "resume": ({"defaults.resume": True}, "`defaults` must not have `resume`"),
    "model of a later stage": (
        {"instruction.model": "x"},
        "`instruction` must not have `model`: they come from",
    ),
    "text of all": ({"defaults.text": "qwen3:tiny"}, "`defaults` must not have `text`"),
    "projector alone": (
        {"instruction.projector": "linear"},
        "`instruction` must not have `projector`: .* add `text`",
    ),
    "late encoder": ({"instruction.kind": "dual_encoder"}, "`instruction`: only the first stage can be a dual"),
    "stage": (
        {"nothing.epochs": 1},
        "must be output, defaults.FIELD or STAGE.FIELD; the stages are encoder, projector",
    ),
    "field": ({"epochs": 1}, "'epochs' must be output, defaults.FIELD or STAGE.FIELD"),
    "train and freeze": ({"projector.freeze": ["text"]}, "`projector`: `train` and `freeze` must not both"),
    "template of a dual encoder": (
        {"encoder.template": "chat"},
        "`encoder`: kind='dual_encoder' takes no `template`",
    ),
    "missing records": (
        {"instruction.data": "none.jsonl"},
        "`instruction`: `data` must be a JSON Lines file, got .*none.jsonl",
    ),
    "name to train": (
        {"projector.train": ["model.nothing.*"]},
        "`projector`: `train` 'model.nothing.*' matches no",
    ),
    "name of a rate": (
        {"instruction.learning_rates": {"model.none.*": 1.0}},
        "`instruction`: `learning_rates` 'model.none.*' matches no parameter",
    ),
    "rate of what is frozen": (
        {"projector.learning_rates": {"text": 1.0}},
        "`projector`: `learning_rates` 'text' matches no parameter that is trained",
    ),
    "two rates": (
        {"instruction.weight_decays": {"text": 0.1, "lm_head.*": 0.2}},
        "`instruction`: `weight_decays` gives lm_head.weight two values, 0.1 and 0.2",
    ),
    "capacity": (
        {"instruction.capacity": 30},
        r"`instruction`: .*chats.jsonl, line \d+: The sample has \d+ tokens",
    ),
    "capacity of pairs": (
        {"encoder.capacity": 9},
        r"`encoder`: .*captions.jsonl, line 1: The pair has \d+ patches",
    ),
    "folder": ({"projector.text": "none"}, "`projector`: `text` must be one of .*, a folder or a JSON file"),
    "folder without weights": ({"projector.text": "bare"}, "`projector`: `text` bare must have weights"),
    "field of the Trainer": ({"instruction.trainer.none": 1}, "`instruction`: `trainer` must contain fields of"),
    "share": ({"instruction.data": "tiny share"}, "`instruction`: `data` has a share of 1e-06 .* for file 2"),
    "options of the dual encoder": (
        {"encoder.dual_encoder": {"none": 1}},
        "`encoder`: `dual_encoder` must have options among chunk_size, .*, got none",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare").mkdir()
    changes, message = REFUSED[name]
    if changes.get("instruction.data") == "tiny share":
        changes = {"instruction.data": {"chats.jsonl": 1.0, "texts.jsonl": 1e-6}}
    monkeypatch.setattr("vlparts.training.recipe.train", None)
    with pytest.raises(ValueError, match=message):
        run_recipe(small_recipe(tmp_path, **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "none.png", "messages": [turn("user", "a"), turn("assistant", "b")]}, "none.png does not exist"),
        ({"messages": []}, "line 1: messages"),
    ],
)
def test_records_of_the_last_stage_are_checked_first(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    recipe = small_recipe(tmp_path)
    write_records(tmp_path / "texts.jsonl", [row])
    with pytest.raises(ValueError, match=f"Stage `instruction`: .*{message}"):
        run_recipe(recipe)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    (tmp_path / "out" / "projector").mkdir(parents=True)
    (tmp_path / "out" / "projector" / "mine").touch()
    with pytest.raises(ValueError, match="`output` .* has projector that is not of this recipe"):
        run_recipe(recipe)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["projector"]


FILES: dict[str, tuple[str, str]] = {
    "no mapping": ("[1]", "must hold a mapping, got list"),
    "no stages": ("output: a", "`stages`: Field required"),
    "empty": ("output: a\nstages: {}", "`stages` must have at least one stage"),
    "no output": ("stages: {a: {}}", "must have an `output`, or one must be given"),
    "unknown key": ("output: a\nstages: {}\nstage: {}", "`stage`: Extra inputs are not permitted"),
    "stage that is no mapping": ("output: a\nstages: {a: 1}", "`stages.a`: Input should be a valid dictionary"),
    "name of a stage": ("output: a\nstages: {a/b: {}}", "the name of a stage must be letters, .* got 'a/b'"),
    "repeated stage": ("output: a\nstages:\n  a: {data: x}\n  a: {data: y}", "the key 'a' occurs twice"),
    "no data": ("output: a\nstages: {a: {}}", "settings of stage `a`: `data`: Field required"),
    "encoder without text": (
        "output: a\nstages: {a: {kind: dual_encoder, data: x}, b: {data: x}}",
        "Stage `b` must have `text`: it composes",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_recipes_are_refused(tmp_path: Path, name: str) -> None:
    text, message = FILES[name]
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_recipe(tmp_path / "recipe.yaml")


def test_settings_of_a_stage_come_before_the_defaults(tmp_path: Path) -> None:
    changes = {"instruction.max_steps": 9, "instruction.trainer.max_grad_norm": 0.5, "defaults.seed": 4}
    first, _, last = small_recipe(tmp_path, **changes).configs.values()
    assert (first.max_steps, last.max_steps, first.seed, last.seed) == (4, 9, 4, 4)
    assert last.trainer == {"use_cpu": True, "disable_tqdm": True, "max_grad_norm": 0.5}
    assert first.trainer == {"use_cpu": True, "disable_tqdm": True}


def test_recipes_that_are_shipped() -> None:
    assert list(RECIPES) == ["deepseek_ocr", "llava_1_5", "openpangu_vl", "points_1_5"]
    for name in RECIPES:
        with pytest.raises(ValueError, match=rf"`recipe` {name}: .* stage `\w+`: .*`data`.* must be set"):
            load_recipe(name, {"output": "out"})


def published(name: str, folder: Path, **changes: Any) -> Recipe:
    """A published recipe with everything set that it leaves to the user."""
    first, second = (f"{folder}/{one}.jsonl" for one in ("captions", "chats"))
    given = {
        "deepseek_ocr": {
            "encoder.data": first,
            "encoder.text": dict(TEXT),
            "model.data": second,
            "model.text": dict(TEXT),
            "model.epochs": 1,
        },
        "llava_1_5": {
            "projector.data": first,
            "projector.vision": "navit:tiny",
            "projector.text": dict(TEXT),
            "instruction.data": {first: 0.5, second: 0.5},
        },
        "openpangu_vl": {
            "pretraining.data": first,
            "pretraining.train": ["projector"],
            "pretraining.learning_rate": 1e-4,
            "pretraining.weight_decay": 0.1,
            "pretraining.warmup_ratio": 0.1,
            "pretraining.max_tokens": 1000,
            "pretraining.capacity": 4096,
            "pretraining.gradient_accumulation_steps": 2,
            "pretraining.mix": 0.5,
        },
        "points_1_5": {
            "pretraining.data": first,
            "pretraining.prompts": ["Describe it."],
            "pretraining.vision": {"preset": "windowfree:qwen2_vl_vit", "num_hidden_layers": 1},
            "pretraining.text": dict(TEXT),
            "instruction.data": second,
        },
    }
    return load_recipe(name, {"output": str(folder / "out"), **given[name], **changes})


def test_the_published_values(tmp_path: Path) -> None:
    first, second = published("points_1_5", tmp_path).configs.values()
    assert (first.learning_rate, first.weight_decay, first.max_tokens) == (2e-4, 0, 2_100_000_000)
    assert (second.learning_rate, second.weight_decay, second.max_tokens) == (2e-5, 0.1, 2_300_000_000)
    assert (first.train, second.train) == (["projector"], ["projector", "text"])
    assert {(one.capacity, one.gradient_accumulation_steps) for one in (first, second)} == {(4096, 32)}
    first, second = published("llava_1_5", tmp_path).configs.values()
    assert (first.learning_rate, first.gradient_accumulation_steps, first.template) == (1e-3, 256, "continuation")
    assert (second.learning_rate, second.gradient_accumulation_steps, second.template) == (2e-5, 128, "chat")
    first, second = published("deepseek_ocr", tmp_path).configs.values()
    assert (first.vision, first.projector) == ("deepencoder:deepseek_ocr", "deepseek_ocr")
    assert (first.epochs, first.capacity, first.learning_rate) == (2, 4096, 5e-5)
    assert (first.gradient_accumulation_steps, second.gradient_accumulation_steps) == (1280, 640)
    assert (second.capacity, second.learning_rate) == (8192, 3e-5)
    assert second.learning_rate_steps


def test_published_recipes_can_run(tmp_path: Path) -> None:
    """At full size where new weights are possible, since a check needs no memory for them."""
    write_data(tmp_path, 2)
    points = published("points_1_5", tmp_path, **{"pretraining.max_tokens": 10**5, "instruction.max_tokens": 10**5})
    first, second = check_recipe(points)
    assert first.trained < second.trained < second.parameters
    assert first.steps == -(-(10**5) // first.tokens)  # an epoch is a step here
    plans = check_recipe(published("llava_1_5", tmp_path))
    assert [plan.steps for plan in plans] == [1, 1]
