"""Rows of samples of very different lengths, and models and Trainers in float64, for tests of the weighted loss."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from tests.tiny import SIZES, order_one
from vlparts.losses.weights import PRESETS

VOCABULARY = 40


class Rows(Dataset):
    """Samples: ids and labels of 3 to 12 tokens, the first ones of each without loss, and two kinds of weights."""

    def __init__(self, count: int = 8, **fields: bool) -> None:
        self.fields = {"sample_weight": True, "token_weights": True, **fields}
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        length = 3 + (5 * index) % 10
        ids = torch.randint(2, VOCABULARY, (length,), generator=generator)
        labels = ids.clone()
        labels[: index % 3] = -100
        found = {"input_ids": ids, "labels": labels}
        if self.fields["sample_weight"]:
            found["sample_weight"] = 0.0 if index == 3 else 0.5 + float(torch.rand((), generator=generator))
        if self.fields["token_weights"]:
            found["token_weights"] = torch.rand(length, generator=generator)
        return found


def padded(features: Sequence[Mapping[str, Any]], left: bool = False) -> dict[str, Tensor]:
    """One row for each feature."""
    side = "left" if left else "right"

    def pad(name: str, value: int) -> Tensor:
        rows = [one[name] for one in features]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)

    ids = [torch.ones_like(one["input_ids"]) for one in features]
    mask = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_side=side)
    return {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100), "attention_mask": mask}


def padded_left(features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """One row for each feature, padding first."""
    return padded(features, left=True)


def one_row(features: Sequence[Mapping[str, Any]], lengths: bool = True) -> dict[str, Any]:
    """All features in one row."""
    sizes = [len(one["input_ids"]) for one in features]
    row: dict[str, Any] = {name: torch.cat([one[name] for one in features])[None] for name in ("input_ids", "labels")}
    row["position_ids"] = torch.cat([torch.arange(size) for size in sizes])[None]
    if lengths:
        bounds = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
        row |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        row |= {"max_length_q": max(sizes), "max_length_k": max(sizes)}
    return row


def one_row_by_positions(features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All features in one row, told apart by positions alone."""
    return one_row(features, lengths=False)


def llama(**changes: Any) -> LlamaForCausalLM:
    """A tiny native Llama in float64, with weights of order one."""
    config = LlamaConfig(
        **{
            **SIZES,
            "num_key_value_heads": 1,
            "vocab_size": VOCABULARY,
            "pad_token_id": 0,
            "use_cache": False,
            **changes,
        }
    )
    return order_one(LlamaForCausalLM(config).double())


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Plain gradient descent, whose steps show gradients as they are."""
    fields: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 3,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**fields, **changes})


def expected_loss(model: nn.Module, samples: Sequence[Mapping[str, Any]], preset: str) -> Tensor:
    """The oracle: every sample alone through the model, and the formula written out."""
    mix, exponent = PRESETS[preset]
    by_sample, by_token, all_samples, all_tokens = 0.0, 0.0, 0.0, 0.0
    for sample in samples:
        ids, labels = sample["input_ids"], sample["labels"][1:]
        a = float(sample.get("sample_weight", 1.0))
        b = torch.as_tensor(sample.get("token_weights", torch.ones(len(ids)))).double()[1:] * (labels != -100)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        losses = -logits.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
        size = float(b.sum())
        if size > 0:
            by_sample = by_sample + a * (b * losses).sum() / size
            by_token = by_token + a * size**-exponent * (b * losses).sum()
            all_samples += a
            all_tokens += a * size ** (1 - exponent)
    return torch.as_tensor(mix * by_sample / all_samples + (1 - mix) * by_token / all_tokens)


def oracle(model: nn.Module, preset: str, data: Rows | None = None) -> tuple[float, dict[str, Tensor]]:
    """The loss of all samples in one step by its formula, and the gradients."""
    data = data or Rows()
    loss = expected_loss(model, [data[index] for index in range(len(data))], preset)
    names, parameters = zip(*((name, one) for name, one in model.named_parameters() if one.requires_grad), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    return loss.item(), dict(zip(names, gradients, strict=True))


def assert_same(found: tuple[float, dict[str, Tensor]], wanted: tuple[float, dict[str, Tensor]]) -> None:
    """Check that losses and gradients are equal."""
    assert abs(found[0] - wanted[0]) < 1e-6
    assert max(float(one.abs().max()) for one in wanted[1].values()) > 1e-2
    torch.testing.assert_close(found[1], wanted[1], atol=5e-7, rtol=1e-5)  # norms work in float32
