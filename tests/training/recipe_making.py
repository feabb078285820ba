"""A small recipe of three stages: a dual encoder, the projector, the whole model."""

from pathlib import Path
from typing import Any

import yaml

from tests.training.making import TEXT, VISION, example, write_records
from vlparts.training.recipe import Recipe, load_recipe


def write_data(folder: Path, count: int = 8) -> None:
    """Records of chats about images, their captions without a text of the user, and chats without images."""
    folder.mkdir(parents=True, exist_ok=True)
    chats = [example(index, folder) for index in range(count)]
    captions = [
        {"image": row["image"], "messages": [turn("user", ""), turn("assistant", f"picture {index}")]}
        for index, row in enumerate(chats)
    ]
    write_records(folder / "chats.jsonl", chats)
    write_records(folder / "captions.jsonl", captions)
    write_records(folder / "texts.jsonl", [example(index) for index in range(4)])


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def fields(folder: Path) -> dict[str, Any]:
    """The content of the recipe's file."""
    data = {name: str(folder / f"{name}.jsonl") for name in ("chats", "captions", "texts")}
    return {
        "output": str(folder / "out"),
        "defaults": {
            "trainer": {"use_cpu": True, "disable_tqdm": True},
            "logging_steps": 1,
            "save_steps": 2,
            "capacity": 200,
            "learning_rate": 1e-2,
            "max_steps": 4,
        },
        "stages": {
            "encoder": {
                "kind": "dual_encoder",
                "data": data["captions"],
                "vision": dict(VISION),
                "text": dict(TEXT),
                "max_items": 4,
                "dual_encoder": {"projection_dim": 16},
            },
            "projector": {
                "text": dict(TEXT),
                "data": data["captions"],
                "train": ["projector"],
                "template": "continuation",
            },
            "instruction": {
                "data": {data["chats"]: 0.7, data["texts"]: 0.3},
                "learning_rates": {"vision": 1e-3},
                "prompts": ["What is it?"],
            },
        },
    }


def write_recipe(folder: Path, content: dict[str, Any]) -> Path:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return folder / "recipe.yaml"


def small_recipe(folder: Path, output: str = "out", **changes: Any) -> Recipe:
    """The recipe, with its data written if there is none."""
    if not (folder / "chats.jsonl").exists():
        write_data(folder)
    path = write_recipe(folder, fields(folder))
    return load_recipe(path, {"output": str(folder / output), **changes})
