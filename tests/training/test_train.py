"""Whole training runs of small models: losses, saving, other parts, and what is refused."""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    TrainerCallback,
)

from tests.tiny import order_one, picture, vision_config
from tests.training.making import TEXT, VISION, example, losses, saved_parts, settings, weights, write_records
from vlparts.training.building import build
from vlparts.training.collators import PaddedCollator, collate_packed
from vlparts.training.config import TrainConfig
from vlparts.training.dataset import SampleDataset
from vlparts.training.encoding import SampleEncoder
from vlparts.training.records import RecordError
from vlparts.training.sources import open_source
from vlparts.training.train import train


class Seen(TrainerCallback):
    """Keeps the weights before every step, and the ids of every batch that the model gets."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.register_forward_pre_hook(self.keep, with_kwargs=True)

    def keep(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if model.training:
            self.batches.append(kwargs)


def test_a_packed_run_has_the_losses_of_a_padded_one(tmp_path: Path) -> None:
    """One pack holds all samples, so that each step sees the same ones."""
    options = {"capacity": 2000, "max_steps": 3, "trainer": {"max_grad_norm": 0.0}}
    packed = train(settings(tmp_path, **options))
    padded = train(settings(tmp_path, packing=False, output=tmp_path / "padded", **options))
    torch.testing.assert_close(losses(packed), losses(padded), atol=1e-5, rtol=1e-5)
    assert losses(packed)[2] < losses(packed)[0] - 0.1
    torch.testing.assert_close(weights(tmp_path / "output"), weights(tmp_path / "padded"), atol=1e-4, rtol=1e-4)


def test_the_loss_is_the_mean_over_all_answers(tmp_path: Path) -> None:
    """The oracle encodes, pads and scores every sample alone."""
    config = settings(tmp_path, capacity=2000, max_steps=1)
    result = train(config)
    fresh = build_again(config)
    total, count = 0.0, 0
    for sample in fresh[1]:
        with torch.no_grad():
            logits = fresh[0](sample.input_ids[None], **sample.images).logits[0].double()
        wanted = sample.labels[1:] != -100
        picked = logits[:-1].log_softmax(-1)[wanted].gather(1, sample.labels[1:][wanted][:, None])
        total, count = total - float(picked.sum()), count + int(wanted.sum())
    assert abs(losses(result)[0] - total / count) < 1e-5


def build_again(config: TrainConfig) -> tuple[Any, list[Any]]:
    """The model as it was before training, and every sample."""
    from transformers import set_seed

    from vlparts.training.building import conversation_texts

    set_seed(config.seed)
    source = open_source(config.data)
    model, processor = build(config, conversation_texts(source.lines()))
    data = SampleDataset(source, SampleEncoder(processor, config.data.parent), progress=False)
    return model.eval(), data[range(len(data))]


@pytest.mark.parametrize("vision", ["navit", "clip", "siglip2"])
@pytest.mark.parametrize("text", ["llama", "qwen2", "qwen3"])
def test_a_row_has_the_gradients_of_a_batch(tmp_path: Path, vision: str, text: str) -> None:
    """With weights of order one, for every kind of tower and text model."""
    visions = {"navit": VISION, "clip": vision_config("clip").to_dict(), "siglip2": vision_config("siglip2").to_dict()}
    config = settings(tmp_path, vision=visions[vision], text={**TEXT, "model_type": text})
    model, samples = build_again(config)
    model = order_one(model).train()
    rows = {"vlparts_packed": collate_packed([samples]), "sdpa": PaddedCollator(0)([samples])}
    gradients = {}
    for name, batch in rows.items():
        model.set_attn_implementation({"text_config": name})
        model.zero_grad()
        model(**batch).loss.backward()
        gradients[name] = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert len(gradients["sdpa"]) > 20
    torch.testing.assert_close(gradients["vlparts_packed"], gradients["sdpa"], atol=1e-4, rtol=1e-3)


def test_epochs_bring_every_sample_once_in_another_order(tmp_path: Path) -> None:
    seen = Seen()
    result = train(settings(tmp_path, epochs=2, capacity=120), callbacks=[seen])
    half = len(seen.batches) // 2
    assert result.steps == len(seen.batches) == 2 * half > 4
    epochs = []
    for batches in (seen.batches[:half], seen.batches[half:]):
        rows = [
            tuple(batch["input_ids"][0, start:end].tolist())
            for batch in batches
            for start, end in torch.stack([batch["cu_seq_lens_q"][:-1], batch["cu_seq_lens_q"][1:]], 1).tolist()
        ]
        epochs.append(rows)
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert len(set(epochs[0])) == 12


def test_it_learns_one_small_batch_by_heart_and_answers(tmp_path: Path) -> None:
    rows = [example(index, tmp_path) for index in range(3)]
    rows.append(example(4))
    write_records(tmp_path / "train.jsonl", rows)
    result = train(settings(tmp_path, max_steps=80, capacity=1000, logging_steps=10, learning_rate=2e-2))
    assert losses(result)[-1] < 0.01
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "output").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "output")
    for model in (result.model.eval(), loaded):
        for index, row in enumerate(rows):
            blocks: list[dict[str, Any]] = [{"type": "text", "text": row["messages"][0]["content"]}]
            if "image" in row:
                image = picture(12 + 4 * (index % 4), 8 + 4 * (index % 3), seed=index)
                blocks.insert(0, {"type": "image", "image": image})
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": blocks}],
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                add_generation_prompt=True,
            )
            tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            assert processor.decode(tokens) == answer_of(row) + "<|im_end|>"


def answer_of(row: dict[str, Any]) -> str:
    """The answer of a record, its region written by the format itself."""
    from vlparts.coordinates.codec import encode
    from vlparts.coordinates.regions import Region

    content = row["messages"][1]["content"]
    if isinstance(content, str):
        return content
    index = int(row["image"].removesuffix(".png"))
    size = (12 + 4 * (index % 4), 8 + 4 * (index % 3))
    return content[0] + encode([Region.box(*content[1]["box"], label=content[1]["label"])], size)


def test_the_saved_folder_holds_weights_code_and_processor_and_no_pickle(tmp_path: Path) -> None:
    result = train(settings(tmp_path, max_steps=1))
    output = tmp_path / "output"
    files = {path.name for path in output.iterdir() if path.is_file()}
    assert {"model.safetensors", "config.json", "modeling_vlm.py", "processing_vlm.py", "tokenizer.json"} <= files
    assert {Path(name).suffix for name in files} == {".json", ".jsonl", ".py", ".safetensors", ".jinja"}
    saved = weights(output)
    for name, value in result.model.state_dict().items():
        assert torch.equal(saved[name], value), name
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    heads = {"AutoModelForImageTextToText", "AutoModelForMultimodalLM"}
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", *heads}
    assert config.get("use_cache") is not False
    assert "vlparts_packed" not in json.dumps(config)


def test_the_text_model_keeps_no_cache_while_it_trains(tmp_path: Path) -> None:
    seen = Seen()
    train(settings(tmp_path, max_steps=1), callbacks=[seen])
    assert seen.batches[0]["use_cache"] is False


def test_evaluation_is_in_the_log(tmp_path: Path) -> None:
    write_records(tmp_path / "eval.jsonl", [example(index, tmp_path) for index in range(20, 25)])
    result = train(settings(tmp_path, eval_data=tmp_path / "eval.jsonl", max_steps=4, eval_steps=3))
    found = {line["step"]: line["eval_loss"] for line in result.log if "eval_loss" in line}
    assert list(found) == [3, 4]  # every third step, and the last one
    assert found[4] != found[3]


def test_evaluation_without_a_step_of_its_own_comes_at_the_end(tmp_path: Path) -> None:
    result = train(settings(tmp_path, eval_data=tmp_path / "train.jsonl", max_steps=2))
    assert [line["step"] for line in result.log if "eval_loss" in line] == [2]


@pytest.mark.parametrize("changes", [{"capacity": 90}, {"max_items": 1}, {"packing": False}, {"capacity": 2000}])
def test_the_evaluation_loss_does_not_depend_on_packing(tmp_path: Path, changes: dict[str, Any]) -> None:
    """It is the mean over all tokens of all answers, with whatever samples they share a pack."""
    config = settings(tmp_path, eval_data=tmp_path / "train.jsonl", max_steps=1, learning_rate=1e-9, **changes)
    oracle = train(settings(tmp_path, capacity=2000, max_steps=1, output=tmp_path / "oracle"))
    assert abs(losses(train(config), "eval_loss")[0] - losses(oracle)[0]) < 1e-5


@pytest.mark.parametrize("part", ["vision", "text", "projector"])
def test_frozen_parts_stay_as_they_are(tmp_path: Path, part: str) -> None:
    config = settings(tmp_path, freeze=[part], max_steps=2, weight_decay=0.1)
    before = {name: value.clone() for name, value in build_again(config)[0].state_dict().items()}
    after = train(config).model.state_dict()
    prefix = {"vision": "model.vision_tower.", "text": "model.language_model.", "projector": "model.projector."}[part]
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    prefixes = (prefix, "lm_head.") if part == "text" else (prefix,)
    frozen = {name for name in before if name.startswith(prefixes)}
    assert frozen
    assert not moved & frozen
    assert set(before) - frozen - moved == set()


def test_every_part_frozen_is_refused(tmp_path: Path) -> None:
    config = settings(tmp_path, freeze=["vision", "text", "projector"])
    with pytest.raises(ValueError, match="`freeze` must leave parameters to train"):
        train(config)


def test_skipped_records_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [example(index, tmp_path) for index in range(6)]
    rows[1] = {**rows[1], "image": "nothing.png"}
    rows[4] = {"messages": []}
    write_records(tmp_path / "train.jsonl", rows)
    write_records(tmp_path / "eval.jsonl", [rows[0], rows[1]])
    with pytest.raises(RecordError, match=r"train\.jsonl, line 5: messages"):
        train(settings(tmp_path))
    config = settings(tmp_path, on_error="skip", eval_data=tmp_path / "eval.jsonl", max_steps=1)
    with caplog.at_level(logging.WARNING, logger="vlparts"):
        result = train(config)
    assert [reason.partition(": ")[0].rpartition("/")[2] for reason in result.skipped] == [
        "train.jsonl, line 2",
        "train.jsonl, line 5",
        "eval.jsonl, line 2",
    ]
    assert "Skipped 3 records. First: " in caplog.text
    named = (tmp_path / "output" / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["skipped"] for line in named] == result.skipped


def test_damaged_pixels_under_skip_are_named_in_the_output(tmp_path: Path) -> None:
    rows = [example(index, tmp_path) for index in range(6)]
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:60])
    write_records(tmp_path / "train.jsonl", rows)
    with pytest.raises(RecordError, match=r"train\.jsonl, line 4: Image .*3\.png cannot be read"):
        train(settings(tmp_path))
    (reason,) = train(settings(tmp_path, on_error="skip", output=tmp_path / "skipped", epochs=2)).skipped
    assert "line 4: Image" in reason


def test_a_dataset_trains_as_its_file_does(tmp_path: Path) -> None:
    rows = [example(index) for index in range(6)]
    write_records(tmp_path / "train.jsonl", rows)
    plain = train(settings(tmp_path, max_steps=2))
    other = settings(tmp_path, max_steps=2, data=Dataset.from_list(rows), output=tmp_path / "other")
    assert losses(train(other)) == losses(plain)


def test_a_label_that_cannot_be_written_is_an_error_of_its_line(tmp_path: Path) -> None:
    """Also where a tokenizer is trained on the labels before any record is encoded."""
    rows = [example(index, tmp_path) for index in range(3)]
    rows[1]["messages"][1]["content"][1]["label"] = " cat "
    write_records(tmp_path / "train.jsonl", rows)
    with pytest.raises(RecordError, match="line 2: Label ' cat ' of a box"):
        train(settings(tmp_path))
    assert len(train(settings(tmp_path, on_error="skip", max_steps=1)).skipped) == 1


def test_samples_longer_than_a_pack_are_errors_of_their_line(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"line 1: The sample has \d+ tokens .* expected at most 20\. Raise"):
        train(settings(tmp_path, capacity=20))


def test_an_output_with_checkpoints_is_not_overwritten(tmp_path: Path) -> None:
    train(settings(tmp_path, max_steps=1))
    with pytest.raises(ValueError, match="`output` .*output contains checkpoints; set `resume`, or"):
        train(settings(tmp_path, max_steps=1))


@pytest.mark.parametrize("kind", ["file", "below a file", "dangling", "looping", "locked", "cannot be made"])
def test_outputs_that_cannot_be_folders_are_refused_before_records_are_read(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "looping").symlink_to("looping")
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path / "locked")
    output = {"below a file": "file/out", "cannot be made": "locked/of/out"}.get(kind, kind)
    config = settings(tmp_path / "in", output=tmp_path / output)
    monkeypatch.setattr("vlparts.training.preparation.open_source", None)
    for resume in (False, True):
        with pytest.raises(ValueError, match="`output` must be a folder, or a path where one can be made, got "):
            train(config.model_copy(update={"resume": resume}))
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_resuming_needs_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-best1").mkdir()  # not one of ours
    for output in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ValueError, match="`output` .* contains no checkpoint to resume from"):
            train(settings(tmp_path, resume=True, output=output))


@pytest.mark.parametrize("state", [None, "", '{"epoch": 1.0, "glob'])
def test_a_checkpoint_that_was_not_finished_is_passed_over(
    tmp_path: Path, state: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A run may be killed while it saves; `trainer_state.json` is what Trainer writes last."""
    train(settings(tmp_path, max_steps=4, save_steps=2))
    (tmp_path / "output" / "checkpoint-4" / "trainer_state.json").unlink()
    if state is not None:
        (tmp_path / "output" / "checkpoint-4" / "trainer_state.json").write_text(state, encoding="utf-8")
    result = train(settings(tmp_path, max_steps=4, save_steps=2, resume=True))
    assert [line["step"] for line in result.log if "loss" in line] == [1, 2, 3, 4]
    assert "unfinished checkpoints: checkpoint-4." in caplog.text


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = train(settings(tmp_path, max_steps=4, save_steps=2, output=tmp_path / "whole"))
    for step in (2, 10):
        (tmp_path / "output" / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / "output" / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="`output` .* contains checkpoints; set `resume`"):
        train(settings(tmp_path, max_steps=4, save_steps=2))
    caplog.clear()
    resumed = train(settings(tmp_path, max_steps=4, save_steps=2, resume=True))
    assert "unfinished checkpoints: checkpoint-2, checkpoint-10. The run starts from the beginning." in caplog.text
    assert losses(resumed) == losses(whole)
    assert len(losses(resumed)) == 4
    ours, theirs = weights(tmp_path / "output"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again = train(settings(tmp_path, max_steps=6, save_steps=2, resume=True))
    assert again.steps == 6
    assert losses(again)[:4] == losses(whole)


@pytest.mark.parametrize("source", ["configurations", "folders"])
def test_a_run_warns_of_nothing(tmp_path: Path, source: str, caplog: pytest.LogCaptureFixture) -> None:
    parts = {}
    if source == "folders":
        vision, text = saved_parts(tmp_path, "clip")
        parts = {"vision": str(vision), "text": str(text)}
    logging.getLogger("transformers").propagate = True
    try:
        with caplog.at_level(logging.WARNING), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(settings(tmp_path, max_steps=2, eval_data=tmp_path / "train.jsonl", **parts))
    finally:
        logging.getLogger("transformers").propagate = False
    ours = [record.getMessage() for record in caplog.records if record.name.startswith(("transformers", "vlparts"))]
    assert ours == []
    assert [str(one.message) for one in caught if issubclass(one.category, (UserWarning, FutureWarning))] == []


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"dataloader_num_workers": 1}, {"bf16": True}])
def test_fields_of_the_trainer(tmp_path: Path, options: dict[str, Any]) -> None:
    plain = train(settings(tmp_path, max_steps=2))
    other = train(settings(tmp_path, max_steps=2, output=tmp_path / "other", trainer=options))
    tolerance = 0.05 if "bf16" in options else 1e-6
    torch.testing.assert_close(losses(other), losses(plain), atol=tolerance, rtol=tolerance)
