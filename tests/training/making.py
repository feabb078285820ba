"""Small models, tokenizers and files of records for the tests of training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, CLIPVisionModel, PreTrainedTokenizerFast, Siglip2VisionModel

from tests.tiny import SIZES, order_one, picture, text_config, tokenizer, vision_config
from vlparts import NaViTModel, compose, compose_processor
from vlparts.coordinates import Region
from vlparts.training.config import TrainConfig
from vlparts.training.records import Record
from vlparts.training.train import TrainResult

WORDS = ["Where is the cat?", "It is here: cat(001,234),(567,899)", "user\n", "assistant\n", "You see.", "system"]


def metaspace_tokenizer(*, prefix_first: bool = True, bos: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer in the manner of Llama's: "▁" for a space and before the first word, <s> before everything."""
    built = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    scheme = "first" if prefix_first else "never"
    built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    built.decoder = decoders.Metaspace(prepend_scheme=scheme, split=False)
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<image>"]
    built.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    if bos:
        built.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=["<|im_start|>", "<image>"],
        clean_up_tokenization_spaces=False,
    )


TOKENIZERS = {
    "byte level": tokenizer,
    "metaspace": metaspace_tokenizer,
    "metaspace without bos": lambda: metaspace_tokenizer(bos=False),
    "metaspace without prefix": lambda: metaspace_tokenizer(prefix_first=False),
}


def processor_for(vision: str = "navit", words: PreTrainedTokenizerFast | None = None, **options: Any) -> Any:
    """The processor of a small composed model."""
    words = words or tokenizer()
    return compose_processor(compose(vision_config(vision), text_config("qwen3", words)), words, **options)


def save(folder: Path, name: str, image: Image.Image | None = None, **options: Any) -> str:
    """Save an image (a random one by default) and return its name."""
    (image or picture(20, 12)).save(folder / name, **options)
    return name


def write_records(path: Path, records: list[Any]) -> Path:
    """Write a JSON Lines file."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def example(index: int, folder: Path | None = None) -> dict[str, Any]:
    """A record about one random image that is saved in `folder`, or a record of text alone where there is none."""
    if folder is None:
        answer: Any = "cat" * (1 + index % 3)
        image = {}
    else:
        name = f"{index}.png"
        width, height = 12 + 4 * (index % 4), 8 + 4 * (index % 3)
        save(folder, name, picture(width, height, seed=index))
        answer = ["at ", {"label": "cat", "box": [index % 5, 1, 8 + index % 4, 7]}]
        image = {"image": name}
    question = f"Where is cat {index}?"
    return {**image, "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


VISION = {"model_type": "vlparts_navit", **SIZES, "patch_size": 4, "max_grid_size": 8}
TEXT = {"model_type": "qwen3", **SIZES, "num_key_value_heads": 1, "head_dim": 16}


def settings(folder: Path, count: int = 12, **changes: Any) -> TrainConfig:
    """Settings for a run of a small model over a file of `count` records, every third of text alone."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "train.jsonl").exists():
        rows = [example(index, None if index % 3 == 1 else folder) for index in range(count)]
        write_records(folder / "train.jsonl", rows)
    fields: dict[str, Any] = {
        "data": folder / "train.jsonl",
        "output": folder / "output",
        "vision": VISION,
        "text": TEXT,
        "capacity": 200,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        **changes,
    }
    trainer = {"use_cpu": True, "disable_tqdm": True, **changes.get("trainer", {})}
    return TrainConfig(**{**fields, "trainer": trainer})


def saved_parts(folder: Path, kind: str) -> tuple[Path, Path]:
    """Folders of a vision checkpoint and of a text checkpoint with its tokenizer."""
    towers: dict[str, Callable[[], Any]] = {
        "clip": lambda: CLIPVisionModel(vision_config("clip")),
        "siglip2": lambda: Siglip2VisionModel(vision_config("siglip2")),
        "navit": lambda: NaViTModel(vision_config("navit")),
    }
    words = tokenizer()
    order_one(towers[kind]()).save_pretrained(folder / "vision")
    order_one(AutoModelForCausalLM.from_config(text_config("llama", words))).save_pretrained(folder / "text")
    words.save_pretrained(folder / "text")
    return folder / "vision", folder / "text"


def losses(result: TrainResult, key: str = "loss") -> list[float]:
    """What the log of a run holds under `key`."""
    return [line[key] for line in result.log if key in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a saved model."""
    return load_file(folder / "model.safetensors")


def about_image(path: str, region: Region) -> Record:
    """A record whose answer is one region of an image."""
    answer = {"label": region.label, region.kind: [value for point in region.points for value in point]}
    question = {"role": "user", "content": "Where is the cat?"}
    return Record.model_validate({"image": path, "messages": [question, {"role": "assistant", "content": answer}]})
