"""Samples have the images that the processor makes, for every vision encoder."""

from pathlib import Path

import pytest
import torch

from tests.tiny import picture
from tests.vision_towers import FAMILIES, STRANGERS, composed_tower
from vlparts.training.collators import collate_packed
from vlparts.training.encoding import SampleEncoder
from vlparts.training.records import Record

SIZES = ((24, 16), (16, 32), (20, 20))


@pytest.mark.parametrize("kind", sorted({*FAMILIES, *STRANGERS}))
def test_images_of_a_pack_are_those_of_a_batch(kind: str) -> None:
    """Images of different sizes, two in one sample and one in another."""
    model, processor = composed_tower(kind)
    pictures = [picture(*size, seed=number) for number, size in enumerate(SIZES)]
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
    records = [Record.model_validate({"images": some, "messages": turns}) for some in (pictures[:2], pictures[2:])]
    encoder = SampleEncoder(processor, Path())
    row = collate_packed([[encoder(record) for record in records]])
    text = processor.image_token * len(pictures)
    batch = processor(images=pictures, text=text, return_tensors="pt")
    found = {name for name in row if name in batch and name not in ("input_ids", "position_ids")}
    assert "pixel_values" in found
    for name in found:
        torch.testing.assert_close(row[name], batch[name], atol=0, rtol=0)
    assert (row["input_ids"] == processor.image_token_id).sum() == (
        batch["input_ids"] == processor.image_token_id
    ).sum()
    model.set_attn_implementation({"text_config": "vlparts_packed"})
    with torch.no_grad():
        assert torch.isfinite(model(**row, use_cache=False).loss)
