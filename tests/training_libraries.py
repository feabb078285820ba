"""The training code with TRL, which the session `libraries` installs, and image streams over datasets."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from torch import nn
from torch.utils.data import DataLoader
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, DataCollatorForVisionLanguageModeling

from tests.tiny import order_one, picture, text_config, tokenizer, vision_config
from tests.training.weighted_making import Rows, arguments, assert_same, expected_loss, llama, oracle
from vlparts import NaViTImageProcessor, compose, compose_processor
from vlparts.training.images.collator import PackedImageCollator
from vlparts.training.images.packing import PackedImageDataset
from vlparts.training.images.stream import PackedImageStream
from vlparts.training.weighted_inputs import WeightedCollator
from vlparts.training.weighted_loss import WeightedLossTrainer


class WeightedSFTTrainer(WeightedLossTrainer, SFTTrainer):
    """The mixin of the page."""


KEPT = (
    "output_dir",
    "use_cpu",
    "report_to",
    "disable_tqdm",
    "save_strategy",
    "max_grad_norm",
    "optim",
    "learning_rate",
    "lr_scheduler_type",
    "train_sampling_strategy",
    "dataloader_pin_memory",
)


def sft_arguments(folder: Path, **changes: Any) -> SFTConfig:
    """The arguments of the other tests, for one step of three micro-batches."""
    plain = arguments(folder)
    steps = {"num_train_epochs": 1, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}
    fixed = {"bf16": False, "gradient_checkpointing": False, **steps}
    return SFTConfig(**{**{name: getattr(plain, name) for name in KEPT}, **fixed, **changes})


def columns(data: Rows) -> Dataset:
    rows = [data[index] for index in range(len(data))]
    listed = [{name: torch.as_tensor(value).tolist() for name, value in one.items()} for one in rows]
    return Dataset.from_list(listed)


def words() -> Any:
    made = tokenizer()
    made.pad_token = made.pad_token or made.eos_token
    return made


def vision_language() -> tuple[nn.Module, Any]:
    made = words()
    model = compose(vision=vision_config("navit"), text=text_config("llama", made))
    return order_one(model.double()), compose_processor(model, made)


def conversations() -> Dataset:
    """Records of one image each, in TRL's form."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Where is cat {index}?"},
                {"role": "assistant", "content": "here" * (1 + index)},
            ],
            "images": [picture(12 + 4 * index, 8, seed=index)],
            "sample_weight": 0.5 + index,
        }
        for index in range(6)
    ]
    return Dataset.from_list(rows)


@pytest.mark.parametrize("preset", ["token", "sample", "openpangu_mix"])
def test_sft_of_a_native_model_has_the_loss_of_the_formula(tmp_path: Path, preset: str) -> None:
    model, data = llama(), Rows(token_weights=False)
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    trainer = WeightedSFTTrainer(
        model=model,
        args=sft_arguments(tmp_path),
        train_dataset=columns(data),
        eval_dataset=columns(data),
        data_collator=WeightedCollator(DataCollatorForLanguageModeling(pad_token_id=0)),
        processing_class=words(),
        preset=preset,
    )
    wanted = expected_loss(llama(), [data[index] for index in range(len(data))], preset).item()
    assert abs(trainer.evaluate()["eval_loss"] - wanted) < 1e-6
    loss = trainer.train().training_loss
    after = dict(model.named_parameters())
    gradients = {name: (one - after[name].detach()) / trainer.args.learning_rate for name, one in before.items()}
    assert_same((loss, gradients), oracle(llama(), preset, data))


def test_sft_of_a_composed_model(tmp_path: Path) -> None:
    model, processor = vision_language()
    data = conversations()
    trainer = WeightedSFTTrainer(
        model=copy.deepcopy(model),
        args=sft_arguments(tmp_path, max_length=None),
        train_dataset=data,
        eval_dataset=data,
        data_collator=WeightedCollator(DataCollatorForVisionLanguageModeling(processor, max_length=None)),
        processing_class=processor,
        preset="sample",
    )
    total = 0.0
    for row in data:
        one = trainer.data_collator.collator([{"messages": row["messages"], "images": row["images"]}])
        with torch.no_grad():
            total += row["sample_weight"] * model.eval()(**one).loss.item()
    wanted = total / sum(data["sample_weight"])
    assert abs(trainer.evaluate()["eval_loss"] - wanted) < 1e-6
    assert abs(trainer.train().training_loss - wanted) < 1e-6
    moved = dict(trainer.model.named_parameters())
    assert all(
        not torch.equal(one, moved[name])
        for name, one in model.model.vision_tower.named_parameters(prefix="model.vision_tower")
    )


def test_packing_that_drops_the_weights_raises(tmp_path: Path) -> None:
    trainer = WeightedSFTTrainer(
        model=llama(),
        args=sft_arguments(tmp_path, packing=True, packing_strategy="wrapped", max_length=32),
        train_dataset=columns(Rows(token_weights=False)),
        data_collator=WeightedCollator(DataCollatorForLanguageModeling(pad_token_id=0)),
        processing_class=words(),
    )
    with pytest.raises(ValueError, match="`train_dataset` has the column 'sample_weight', but its batches have no"):
        trainer.train()


def test_weights_without_a_collator_for_them_raise(tmp_path: Path) -> None:
    trainer = WeightedSFTTrainer(
        model=llama(),
        args=sft_arguments(tmp_path),
        train_dataset=columns(Rows(token_weights=False)),
        processing_class=words(),
    )
    with pytest.raises(ValueError, match="Wrap the `data_collator` in WeightedCollator"):
        trainer.train()


def test_another_loss_of_sft_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`loss_type` computes another loss"):
        WeightedSFTTrainer(
            model=llama(),
            args=sft_arguments(tmp_path, loss_type="dft"),
            train_dataset=columns(Rows()),
            processing_class=words(),
        )


PROCESSOR = NaViTImageProcessor(patch_size=4)


def shards_of_images(shards: int) -> IterableDataset:
    """60 images, in this many shards."""
    rows = [{"image": picture(8 + 4 * (index % 5), 12), "label": index} for index in range(60)]
    return Dataset.from_list(rows).to_iterable_dataset(num_shards=shards)


@pytest.mark.parametrize("divide", [None, "stream", "items"])
@pytest.mark.parametrize("shards", [1, 3, 4])
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("processes", [1, 2])
def test_an_iterable_dataset_has_every_image_once(
    divide: str | None, shards: int, workers: int, processes: int
) -> None:
    labels: list[int] = []
    for rank in range(processes):
        items = split_dataset_by_node(shards_of_images(shards), rank=rank, world_size=processes)
        options = {"image_key": "image", "label_key": "label", "divide": divide, "world_size": processes}
        stream = PackedImageStream(items, PROCESSOR, 60, 5, **options)
        loader = DataLoader(stream, None, num_workers=workers, collate_fn=PackedImageCollator(60, 5))
        found = torch.cat([batch["labels"] for batch in loader])
        labels += found[found >= 0].tolist()
    assert sorted(labels) == list(range(60))


def test_datasets_of_the_wrong_kind_raise() -> None:
    with pytest.raises(ValueError, match="`dataset` must be a map-style dataset, got IterableDataset"):
        PackedImageDataset(shards_of_images(1), PROCESSOR, "image", "label")
    with pytest.raises(ValueError, match="`divide` must not be 'items' for a Dataset"):
        PackedImageStream(conversations(), PROCESSOR, 60, divide="items")
