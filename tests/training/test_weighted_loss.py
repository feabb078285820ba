"""`vlparts train` with weights: records, packs, batches, evaluation, resuming."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from tests.parts.test_moge import moge
from tests.tiny import SIZES, order_one
from tests.training.making import example, losses, settings, weights, write_records
from tests.training.weighted_making import VOCABULARY, Rows, arguments, padded
from vlparts import PanguEmbeddedConfig, PanguEmbeddedForCausalLM
from vlparts.losses.weights import PRESETS
from vlparts.training.building import build, conversation_texts
from vlparts.training.config import TrainConfig, load_config
from vlparts.training.dataset import PaddedCollator, SampleDataset, SampleWeights, collate_packed
from vlparts.training.encoding import Sample, SampleEncoder
from vlparts.training.records import RecordError, read_records
from vlparts.training.sources import open_source
from vlparts.training.train import train
from vlparts.training.weighted_inputs import WeightedCollator
from vlparts.training.weighted_loss import WeightedLossTrainer

FIELD = "importance"


def weighted_settings(folder: Path, scale: float = 1.0, count: int = 12, **changes: Any) -> TrainConfig:
    """A run over records of which some have a weight, one of them 0."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [example(index, None if index % 3 == 1 else folder) for index in range(count)]
    for index, row in enumerate(rows):
        if index % 4 != 2:
            row[FIELD] = scale * (0.0 if index == 5 else 0.5 + index / 4)
        elif scale != 1:
            row[FIELD] = scale
    write_records(folder / "train.jsonl", rows)
    return settings(folder, count, **{"sample_weight_field": FIELD, "loss": "openpangu_mix", **changes})


def build_again(config: TrainConfig) -> tuple[nn.Module, list[Sample]]:
    """The model as it was before training, and every sample."""
    from transformers import set_seed

    set_seed(config.seed)
    source = open_source(config.data, sample_weight_field=config.sample_weight_field)
    model, processor = build(config, conversation_texts(source.lines()))
    data = SampleDataset(source, SampleEncoder(processor, config.data.parent), progress=False)
    return model.eval(), data[range(len(data))]


def expected(config: TrainConfig) -> float:
    """The oracle: every sample alone, and the formula written out."""
    model, samples = build_again(config)
    mix, exponent = PRESETS[config.loss or "token"]
    mix = mix if config.mix is None else config.mix
    found = []
    for sample in samples:
        with torch.no_grad():
            logits = model(sample.input_ids[None], **sample.images).logits[0, :-1].double()
        part = nn.functional.cross_entropy(logits, sample.labels[1:], reduction="sum")
        found.append((sample.weight, float(part), int((sample.labels[1:] != -100).sum())))
    by_sample = sum(a * x / n for a, x, n in found) / sum(a for a, _, _ in found)
    by_token = sum(a * n**-exponent * x for a, x, n in found) / sum(a * n ** (1 - exponent) for a, _, n in found)
    return mix * by_sample + (1 - mix) * by_token


LAYOUTS: dict[str, dict[str, Any]] = {
    "one pack": {"capacity": 2000},
    "packs": {"capacity": 100, "gradient_accumulation_steps": 50},
    "a batch": {"capacity": 2000, "packing": False},
    "batches": {"capacity": 100, "packing": False, "gradient_accumulation_steps": 50},
}


@pytest.mark.parametrize(
    ("loss", "layout"), [*((loss, "packs") for loss in (*PRESETS, None)), ("openpangu_mix", "batches")]
)
def test_the_first_step_has_the_loss_of_the_formula(tmp_path: Path, loss: str | None, layout: str) -> None:
    """An epoch is one step, so that every sample is in it; the evaluation over the same samples comes to the same."""
    changes = {"eval_data": tmp_path / "train.jsonl", "learning_rate": 1e-12, **LAYOUTS[layout]}
    config = weighted_settings(tmp_path, loss=loss, **changes)
    result = train(config)
    assert result.steps == 1
    wanted = expected(config)
    assert abs(losses(result)[0] - wanted) < 1e-5
    assert abs(losses(result, "eval_loss")[0] - wanted) < 1e-5


def test_steps_do_not_depend_on_packing(tmp_path: Path) -> None:
    options = {"mix": 0.3, "epochs": 2, "trainer": {"max_grad_norm": 0.0}, "learning_rate": 1e-3}
    runs = {
        name: train(weighted_settings(tmp_path, output=tmp_path / name, **options, **changes))
        for name, changes in LAYOUTS.items()
    }
    for name, result in runs.items():
        torch.testing.assert_close(losses(result), losses(runs["one pack"]), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(weights(tmp_path / name), weights(tmp_path / "one pack"), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("changes", [{"capacity": 100, "gradient_accumulation_steps": 3}, {"packing": False}])
def test_token_averaging_is_the_default(tmp_path: Path, changes: dict[str, Any]) -> None:
    changes = {"epochs": 2, "learning_rate": 1e-3, "eval_data": tmp_path / "train.jsonl", **changes}
    default = train(settings(tmp_path, **changes))
    token = train(settings(tmp_path, loss="token", output=tmp_path / "token", **changes))
    for key in ("loss", "eval_loss"):
        torch.testing.assert_close(losses(token, key), losses(default, key), atol=1e-6, rtol=1e-6)


def test_the_scale_of_weights_does_not_matter(tmp_path: Path) -> None:
    changes = {"capacity": 100, "max_steps": 4, "learning_rate": 1e-3}
    one, many = (train(weighted_settings(tmp_path / str(scale), scale, 12, **changes)) for scale in (1.0, 1000.0))
    torch.testing.assert_close(losses(one), losses(many), atol=1e-5, rtol=1e-5)


def test_nothing_with_weight_is_a_loss_of_zero(tmp_path: Path) -> None:
    result = train(weighted_settings(tmp_path, scale=0.0, capacity=100, eval_data=tmp_path / "train.jsonl"))
    assert set(losses(result)) == set(losses(result, "eval_loss")) == {0.0}
    assert all(line["grad_norm"] == 0 for line in result.log if "grad_norm" in line)


class Cut(TrainerCallback):
    """Ends a run after a step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise InterruptedError


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2, "save_steps": 2},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"packing": False}, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_cut_off_goes_on_to_the_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    def config(output: str, **more: Any) -> TrainConfig:
        fields = {"epochs": 3, "capacity": 100, "save_steps": 3, "output": tmp_path / output, **changes}
        return weighted_settings(tmp_path, **fields, **more)

    whole = train(config("whole"))
    with pytest.raises(InterruptedError):
        train(config("cut"), callbacks=[Cut()])
    resumed = train(config("cut", resume=True))
    assert losses(resumed) == losses(whole)
    ours, theirs = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_saved_model_has_no_trace_of_the_loss(tmp_path: Path) -> None:
    train(weighted_settings(tmp_path, max_steps=1))
    train(settings(tmp_path / "plain", max_steps=1))
    ours, plain = (
        json.loads((folder / "output" / "config.json").read_text(encoding="utf-8"))
        for folder in (tmp_path, tmp_path / "plain")
    )
    assert ours == plain


def text_model(name: str) -> nn.Module:
    if name == "moge":
        return moge("eager", vocab_size=VOCABULARY, router_aux_loss_coef=0.0)
    special = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    return order_one(PanguEmbeddedForCausalLM(PanguEmbeddedConfig(**SIZES, num_key_value_heads=1, **special)))


@pytest.mark.parametrize("name", ["moge", "pangu_embedded"])
def test_own_text_models(tmp_path: Path, name: str) -> None:
    """Micro-batches add up to the loss of one batch."""
    found = []
    for batch, accumulated in ((8, 1), (2, 4)):
        model = text_model(name).double()
        changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        trainer = WeightedLossTrainer(
            model,
            arguments(tmp_path, **changes),
            train_dataset=Rows(),
            data_collator=WeightedCollator(padded),
            preset="sample",
        )
        trainer.train()
        found.append(trainer.state.log_history[0]["loss"])
    assert abs(found[0] - found[1]) < 1e-6


def test_samples_carry_their_weights_into_batches(tmp_path: Path) -> None:
    config = weighted_settings(tmp_path)
    samples = build_again(config)[1]
    assert [one.weight for one in samples[:6]] == [0.5, 0.75, 1.0, 1.25, 1.5, 0.0]
    for collator in (collate_packed, PaddedCollator(0)):
        batch = SampleWeights(collator)([samples[:2], samples[5:]])
        assert batch["sample_weights"].tolist() == [one.weight for one in samples[:2] + samples[5:]]
        assert set(batch) == {*collator([samples]), "sample_weights"}


BROKEN = {
    "-0.5": r"`importance` must be a finite number of at least 0, got -0\.5",
    "NaN": "NaN is not a valid number",
    "1e999": "Number 1e999 is too large",
    '"1"': "`importance` must be a finite number of at least 0, got '1'",
    "true": "`importance` must be a finite number of at least 0, got True",
    "null": "`importance` must be a finite number of at least 0, got None",
    "[1]": r"`importance` must be a finite number of at least 0, got \[1\]",
    "1" + 400 * "0": "`importance` must be a finite number of at least 0, got 1000",
}


@pytest.mark.parametrize("weight", BROKEN)
def test_a_broken_weight_is_an_error_of_its_line(tmp_path: Path, weight: str) -> None:
    rows = [json.dumps({**example(index), FIELD: 1}) for index in range(3)]
    rows[1] = rows[1].replace(f'"{FIELD}": 1', f'"{FIELD}": {weight}')
    (tmp_path / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    with pytest.raises(RecordError, match=rf"train\.jsonl, line 2: {BROKEN[weight]}"):
        read_records(tmp_path / "train.jsonl", sample_weight_field=FIELD)
    found = read_records(tmp_path / "train.jsonl", "skip", sample_weight_field=FIELD)
    assert [line.number for line in found.lines] == [1, 3]


def test_a_weight_without_the_setting_is_an_unknown_field(tmp_path: Path) -> None:
    path = write_records(tmp_path / "train.jsonl", [{**example(0), FIELD: 1}])
    with pytest.raises(RecordError, match=f"line 1: {FIELD}: Extra inputs are not permitted"):
        read_records(path)


def test_a_field_that_no_record_has_is_misspelt(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`sample_weight_field` 'weihgt' is in no record of .*train\.jsonl"):
        train(settings(tmp_path, sample_weight_field="weihgt"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "mean"}, "`loss`: Value error, must be one of token, sample, square, openpangu_mix, got 'mean'"),
        ({"mix": 0.5}, "`mix` requires loss='openpangu_mix', got loss=None"),
        ({"mix": 0.5, "loss": "square"}, "`mix` requires loss='openpangu_mix', got loss='square'"),
        ({"mix": 1.5, "loss": "openpangu_mix"}, "`mix`: Input should be less than or equal to 1"),
        ({"mix": -1, "loss": "openpangu_mix"}, "`mix`: Input should be greater than or equal to 0"),
        (
            {"sample_weight_field": "messages"},
            "`sample_weight_field`: .*records have already, got 'messages'",
        ),
        ({"sample_weight_field": ""}, "`sample_weight_field`: String should have at least 1 character"),
    ],
)
def test_invalid_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(None, {"data": "a", "output": "b", **changes})
