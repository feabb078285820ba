"""A processor and a model for runs over documents: answers that depend on the page only, without any weights."""

from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature

END = 0
MARK = "<|ref|>image<|/ref|><|det|>[[100, 100, 500, 500]]<|/det|>\n"


class StubProcessor:
    """Reads the size and the mean level of an image. It refuses images of `refused` pixels in width.

    `alive` has the images that it was given and that still exist, by id; `most_alive` is their largest number.
    """

    tokenizer = SimpleNamespace(decode=lambda ids, **options: bytes(ids).decode())

    def __init__(self, refused: int = 0) -> None:
        self.refused = refused
        self.alive: WeakValueDictionary[int, Image.Image] = WeakValueDictionary()
        self.most_alive = 0

    def apply_chat_template(self, conversations: list[Any], **options: Any) -> BatchFeature:
        images = [part["image"] for (turn,) in conversations for part in turn["content"] if part["type"] == "image"]
        for image in images:
            if image.width == self.refused:
                raise ValueError(f"an image of {image.width} pixels is refused")
            self.alive[id(image)] = image
        self.most_alive = max(self.most_alive, len(self.alive))
        read = [[*image.size, *(round(sum(level) / 2) for level in image.getextrema())] for image in images]
        return BatchFeature({"input_ids": torch.zeros(len(images), 1, dtype=torch.int64), "read": torch.tensor(read)})


class StubModel:
    """Writes what the processor read, with a figure unless `marks` is False; calls `before` with its turn, from 1."""

    device, dtype = torch.device("cpu"), torch.float32
    generation_config = SimpleNamespace(eos_token_id=END)

    def __init__(self, marks: bool = False, before: Any = None) -> None:
        self.marks, self.before, self.turn = marks, before, 0

    def generate(self, input_ids: Any, read: Any, **options: Any) -> torch.Tensor:
        self.turn += 1
        if self.before is not None:
            self.before(self.turn)
        texts = [f"{MARK if self.marks else ''}{row}" for row in read.tolist()]
        rows = [[END, *text.encode(), END] for text in texts]
        return torch.tensor([row + [END] * (max(map(len, rows)) - len(row)) for row in rows])
