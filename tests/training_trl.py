"""Composed models in TRL's trainers, which the session `libraries` installs: SFT, DPO and GRPO, with images."""

import copy
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.chat_template_utils import get_training_chat_template, is_chat_template_stop_token_trained
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from tests import tiny_texts
from tests.tiny import order_one, picture, text_config, tokenizer, vision_config
from tests.training.weighted_making import arguments, assert_same
from vlparts import compose, compose_processor
from vlparts.parts.chat_templates import DEEPSEEK_OCR_CHAT_TEMPLATE
from vlparts.training.dataset import PaddingFreeCollator
from vlparts.training.rewards import format_reward, iou_reward
from vlparts.training.weighted_inputs import WeightedCollator
from vlparts.training.weighted_loss import WeightedLossTrainer

RATE = 0.1
KEPT = ("use_cpu", "report_to", "disable_tqdm", "save_strategy", "max_grad_norm", "optim", "lr_scheduler_type")


class WeightedSFTTrainer(WeightedLossTrainer, SFTTrainer):
    """The mixin of the page."""


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    """Arguments for one step of plain gradient descent, without dropout or mixed precision."""
    plain = arguments(folder)
    fixed = {"bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False, "learning_rate": RATE}
    steps = {"max_steps": 1, "output_dir": str(folder)}
    return {**{name: getattr(plain, name) for name in KEPT}, **fixed, **steps, **changes}


def words() -> Any:
    made = tokenizer()
    made.pad_token = made.pad_token or made.eos_token
    return made


def vision_language(vision: str = "navit", text: str = "llama", made: Any = None) -> tuple[nn.Module, Any]:
    """A composed model in float64, and its processor."""
    made = made or words()
    model = compose(vision=vision_config(vision), text=text_config(text, made))
    sides = {"size": {"height": 16, "width": 16}, "crop_size": {"height": 16, "width": 16}}
    images = CLIPImageProcessorPil(**sides) if vision == "clip" else None
    return order_one(model.double()), compose_processor(model, made, images)


def conversations(turns: int = 2) -> Dataset:
    """Six records of one image and several turns."""
    rows = []
    for index in range(6):
        messages = []
        for turn in range(turns):
            messages.append({"role": "user", "content": f"Where is cat {turn}?" + "!" * index})
            messages.append({"role": "assistant", "content": "here" * (1 + (2 * index + turn) % 4)})
        images = [picture(12 + 4 * index, 8, seed=index)]
        rows.append({"messages": messages, "images": images, "sample_weight": 0.5 + index})
    return Dataset.from_list(rows)


def answers(messages: list[dict[str, str]], end: str) -> str:
    return "".join(one["content"] + end for one in messages if one["role"] == "assistant")


def gradients_of(trainer: Any, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of a step of plain gradient descent."""
    after = dict(trainer.model.named_parameters())
    return {name: (one - after[name].detach()) / RATE for name, one in before.items()}


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def wanted_gradients(model: nn.Module, loss: Tensor) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss.backward()
    found = {name: torch.zeros_like(one) if one.grad is None else one.grad for name, one in model.named_parameters()}
    return loss.item(), found


def log_probs(model: nn.Module, processor: Any, prompt: list[Any], completion: list[int], image: Any) -> Tensor:
    """Log-probabilities of the tokens of a completion, for one sample alone."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": prompt[0]["content"]}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    tail = torch.tensor([completion])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tail], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    logits = model(**inputs).logits[0, -len(completion) - 1 : -1]
    return logits.log_softmax(-1).gather(1, tail[0, :, None])[:, 0]


@pytest.fixture(params=["chatml", "deepseek_ocr", "qwen3"])
def templated(request: pytest.FixtureRequest) -> tuple[Any, Any, str]:
    """A model, its processor, and the end of an assistant's turn, for each kind of chat template."""
    made, end = words(), words().eos_token
    if request.param == "deepseek_ocr":
        made.add_special_tokens({"bos_token": "<bos>"})
        made.chat_template = DEEPSEEK_OCR_CHAT_TEMPLATE
    if request.param == "qwen3":  # of a text model, with TRL's marks, extended by placeholders
        made.add_special_tokens({"extra_special_tokens": ["<|im_end|>"]}, replace_extra_special_tokens=False)
        made.chat_template = qwen3_template(made)
        end = "<|im_end|>\n"
    return *vision_language(made=made), end


def qwen3_template(made: Any) -> str:
    """TRL's template of Qwen3 with marks, which replaces the published one."""
    import trl

    published = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    made.chat_template = published.read_text(encoding="utf-8")
    return get_training_chat_template(made)


def test_assistant_only_loss(tmp_path: Path, templated: tuple[Any, Any, str]) -> None:
    """Labels are the answers and the ends of their turns, the loss is their mean; also after saving."""
    model, processor, end = templated
    processor.save_pretrained(tmp_path / "saved")
    again = type(processor).from_pretrained(tmp_path / "saved")
    assert again.chat_template == processor.chat_template
    data, before = conversations(), parameters(model)
    trainer = SFTTrainer(
        model=copy.deepcopy(model),
        args=SFTConfig(**options(tmp_path, per_device_train_batch_size=6), max_length=None, assistant_only_loss=True),
        train_dataset=data,
        processing_class=again,
    )
    assert trainer.chat_template is None  # the processor's own
    assert is_chat_template_stop_token_trained(again)
    rows = [{name: row[name] for name in ("messages", "images")} for row in data]
    batch = trainer.data_collator(copy.deepcopy(rows))
    for row, labels in zip(rows, batch["labels"], strict=True):
        written = again.tokenizer.decode(labels[labels != -100])
        assert written.replace("<think>\n\n</think>\n\n", "") == answers(row["messages"], end)
    logits = model(**{name: one for name, one in batch.items() if name != "labels"}).logits[:, :-1]
    target = batch["labels"][:, 1:]
    losses = -logits.log_softmax(-1).gather(2, target.clamp(min=0)[..., None])[..., 0]
    loss = trainer.train().training_loss
    assert_same((loss, gradients_of(trainer, before)), wanted_gradients(model, losses[target != -100].mean()))


@pytest.mark.parametrize(("vision", "text"), [("navit", "llama"), ("clip", "qwen3"), ("siglip2", "qwen2")])
def test_samples_in_one_row_have_the_loss_of_padded_ones(tmp_path: Path, vision: str, text: str) -> None:
    """TRL itself refuses `padding_free` with images."""
    model, processor = vision_language(vision, text)
    collator = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)
    found = []
    for one in (collator, PaddingFreeCollator(collator)):
        trainer = SFTTrainer(
            model=copy.deepcopy(model),
            args=SFTConfig(
                **options(tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=2),
                max_length=None,
                assistant_only_loss=True,
            ),
            train_dataset=conversations(),
            data_collator=one,
            processing_class=processor,
        )
        loss = trainer.train().training_loss
        found.append((loss, gradients_of(trainer, parameters(model))))
    row = trainer.data_collator([{name: one[name] for name in ("messages", "images")} for one in conversations()])
    assert row["input_ids"].shape[0] == 1
    assert "attention_mask" not in row
    assert_same(*found)


def test_the_weighted_loss_of_answers_with_images(tmp_path: Path) -> None:
    """The mean over samples, each with the mean over its answers, whether padded or in one row."""
    model, processor = vision_language()
    data, before = conversations(), parameters(model)
    total = torch.zeros((), dtype=torch.float64)
    collator = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)
    for row in data:
        one = collator([{"messages": row["messages"], "images": row["images"]}])
        total = total + row["sample_weight"] * model(**one).loss
    wanted = wanted_gradients(model, total / sum(data["sample_weight"]))
    for one in (collator, PaddingFreeCollator(collator)):
        trainer = WeightedSFTTrainer(
            model=copy.deepcopy(model),
            args=SFTConfig(
                **options(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3),
                max_length=None,
                assistant_only_loss=True,
            ),
            train_dataset=data,
            data_collator=WeightedCollator(one),
            processing_class=processor,
            preset="sample",
        )
        loss = trainer.train().training_loss
        assert_same((loss, gradients_of(trainer, before)), wanted)


def preferences() -> Dataset:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Where is cat {index}?"}],
            "chosen": [{"role": "assistant", "content": "here" * (1 + index)}],
            "rejected": [{"role": "assistant", "content": "there" * (1 + index % 2)}],
            "images": [picture(12 + 4 * index, 8, seed=index)],
        }
        for index in range(3)
    ]
    return Dataset.from_list(rows)


@pytest.mark.parametrize("vision", ["navit", "clip"])
def test_dpo(tmp_path: Path, vision: str) -> None:
    model, processor = vision_language(vision)
    reference = order_one(copy.deepcopy(model), seed=1)
    data, before, beta = preferences(), parameters(model), 0.3
    trainer = DPOTrainer(
        model=copy.deepcopy(model),
        ref_model=copy.deepcopy(reference),
        args=DPOConfig(**options(tmp_path, per_device_train_batch_size=3), beta=beta, max_length=None),
        train_dataset=data,
        processing_class=processor,
    )
    loss = trainer.train().training_loss
    total = torch.zeros((), dtype=torch.float64)
    for row in data:
        ratios = []
        for answer in ("chosen", "rejected"):
            text = row[answer][0]["content"] + processor.tokenizer.eos_token + "\n"
            ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            given = (processor, row["prompt"], ids, row["images"][0])
            with torch.no_grad():
                other = log_probs(reference, *given).sum()
            ratios.append(log_probs(model, *given).sum() - other)
        total = total - nn.functional.logsigmoid(beta * (ratios[0] - ratios[1])) / len(data)
    assert_same((loss, gradients_of(trainer, before)), wanted_gradients(model, total))


class Recorder:
    """A reward that remembers what it was asked about."""

    __name__ = "recorder"

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def __call__(self, completions: Any, completion_ids: Any, prompts: Any, **columns: Any) -> list[float]:
        rewards = [float(len(set(ids))) for ids in completion_ids]
        images = columns.get("images") or [[one] for one in columns["image"]]
        given = zip(prompts, completion_ids, images, rewards, strict=True)
        names = ("prompt", "ids", "images", "reward")
        self.rows += [dict(zip(names, one, strict=True)) for one in given]
        return rewards


def questions() -> Dataset:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Where is cat {index}?" + "!" * index}],
            "images": [picture(12 + 4 * index, 8, seed=index)],
            "image_size": [12 + 4 * index, 8],
            "boxes": [[0, 0, 4 + index, 8]],
        }
        for index in range(3)
    ]
    return Dataset.from_list(rows)


@pytest.mark.parametrize("vision", ["navit", "clip"])
def test_grpo(tmp_path: Path, vision: str) -> None:
    """The step is that of a loss computed one sample at a time, though TRL shuffles and slices the images."""
    model, processor = vision_language(vision)
    before, recorder = parameters(model), Recorder()
    trainer = GRPOTrainer(
        model=copy.deepcopy(model),
        reward_funcs=[recorder, iou_reward(), format_reward()],
        args=GRPOConfig(
            **options(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=6),
            num_generations=4,
            max_completion_length=6,
            loss_type="grpo",
            scale_rewards="none",
            logging_steps=1,
        ),
        train_dataset=questions(),
        processing_class=processor,
    )
    trainer.train()
    assert len(recorder.rows) == 12
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, 12, 4):
        group = recorder.rows[start : start + 4]
        texts = {part["text"] for row in group for part in row["prompt"][0]["content"] if part["type"] == "text"}
        assert len(texts) == 1
        prompt = [{"role": "user", "content": texts.pop()}]
        mean = sum(row["reward"] for row in group) / 4
        for row in group:
            one = log_probs(model, processor, prompt, row["ids"], row["images"][0])
            total = total - (row["reward"] - mean) * one.mean() / 12
    _, wanted = wanted_gradients(model, total)
    found = gradients_of(trainer, before)
    for name, one in wanted.items():
        torch.testing.assert_close(found[name], one, atol=1e-5, rtol=1e-4, msg=name)
    (log,) = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert {"rewards/iou_reward/mean", "rewards/format_reward/mean"} <= log.keys()


def text_kinds() -> Iterator[tuple[str, PreTrainedConfig]]:
    for kind in ("cohere", "falcon_h1", "gemma2", "granite", "hyperclovax", "llama", "minicpm3", "phi"):
        yield kind, tiny_texts.tiny_text_config(kind)


@pytest.mark.parametrize(("kind", "config"), [*text_kinds()])
def test_the_fused_head_of_trl_is_the_models_own(kind: str, config: PreTrainedConfig) -> None:
    """Scales, biases and soft caps of text models, which TRL reads from their configurations."""
    model = order_one(compose(vision=vision_config("navit"), text=config).double()).eval()
    ids = torch.arange(3, 23).view(2, 10)
    own = model(input_ids=ids, labels=ids).loss
    add_fused_lm_head(model)
    fused = model(input_ids=ids, labels=ids, fused_lm_head=True)
    torch.testing.assert_close(fused.loss, own)


def test_trainers_load_a_saved_folder(tmp_path: Path) -> None:
    """DPO loads its reference model from there."""
    model, processor = vision_language()
    model.float().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    trainer = DPOTrainer(
        model=str(tmp_path / "model"),
        args=DPOConfig(**options(tmp_path / "out", per_device_train_batch_size=3), max_length=None),
        train_dataset=preferences(),
    )
    assert type(trainer.ref_model) is type(model)
    assert abs(trainer.train().training_loss - torch.log(torch.tensor(2.0)).item()) < 1e-6  # both are the same


@pytest.mark.slow
@pytest.mark.timeout(900)  # it trains, and evaluates in two further processes
def test_the_example_runs(tmp_path: Path) -> None:
    """In small: a model of two steps, whose answers are not well-formed."""
    script = Path(__file__).parents[1] / "docs" / "examples" / "grpo_boxes.py"
    small = ["--sft-steps", "2", "--grpo-steps", "1", "--images", "40", "10"]
    done = subprocess.run(
        [sys.executable, script, *small],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (row,) = re.findall(r"^\W+0\W+0\.\d{3}\W+0\.\d{3}\W.*$", done.stdout, re.MULTILINE)
    assert row.count("%") == 4
