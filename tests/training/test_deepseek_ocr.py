"""Training of a small DeepSeek-OCR: packs of views, exact resuming, and the published stages."""

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from torch.nn.functional import cross_entropy
from transformers import set_seed

from tests.tiny import order_one
from tests.training.making import losses, settings, weights, write_records
from tests.training.test_resuming import Cut
from vlparts import DeepEncoderImageProcessor
from vlparts.training.building import build, conversation_texts, select_parameters
from vlparts.training.config import TrainConfig
from vlparts.training.dataset import SampleDataset, collate_packed
from vlparts.training.encoding import SampleEncoder
from vlparts.training.recipe import load_recipe, run_recipe
from vlparts.training.sources import open_source
from vlparts.training.train import train

WORDS = ("cat", "dog", "fox", "hen")
SMALL: dict[str, Any] = {
    "vision": {"preset": "deepencoder:deepencoder_tiny"},
    "text": {"preset": "moge:tiny"},
    "projector": "deepseek_ocr",
    "chat_template": "deepseek_ocr",
    "image_processor": {"base_size": 64, "tile_size": 64, "untiled_size": 64, "max_tiles": 4},
}


def page(folder: Path, index: int) -> dict[str, Any]:
    """A record of a page with a word, with its box for every second one; pages of odd thirds have tiles."""
    word = WORDS[index % len(WORDS)]
    width, height = [(64, 48), (130, 64), (100, 150)][index % 3]
    image = Image.new("RGB", (width, height), "white")
    place = (random.Random(index).randrange(30), random.Random(index).randrange(30))
    ImageDraw.Draw(image).text(place, word, fill="black")
    image.save(folder / f"{index}.png")
    answer: dict[str, Any] = {"markdown": word}
    if index % 2:
        box = [*place, place[0] + 20, place[1] + 12]
        answer = {"blocks": [{"type": "text", "box": box, "text": word}]}
    return {"page": f"{index}.png", **answer}


def config_for(folder: Path, count: int = 6, **changes: Any) -> TrainConfig:
    """Settings of a run over pages, and one record of text alone."""
    if not (folder / "train.jsonl").exists():
        words = {"messages": [{"role": "user", "content": "cat "}, {"role": "assistant", "content": "dog"}]}
        write_records(folder / "train.jsonl", [words, *(page(folder, index) for index in range(count))])
    return settings(folder, **{**SMALL, "learning_rate": 3e-3, **changes})


def built(config: TrainConfig) -> tuple[Any, Any, SampleDataset]:
    """The model and processor of a run before training, and its samples."""
    set_seed(config.seed)
    source = open_source(config.data)
    model, processor = build(config, conversation_texts(source.lines()))
    return model, processor, SampleDataset(source, SampleEncoder(processor, config.data.parent), progress=False)


@pytest.mark.parametrize(("count", "steps"), [(12, 6), pytest.param(100, 24, marks=pytest.mark.slow)])
def test_a_run_with_packs_learns_and_goes_on_to_the_bit(tmp_path: Path, count: int, steps: int) -> None:
    """Pages with and without tiles, with and without boxes, beside a record of text alone."""
    options = {"count": count, "capacity": 600, "max_steps": steps, "save_steps": steps // 2}
    whole = train(config_for(tmp_path, output=tmp_path / "whole", **options))
    assert losses(whole)[-1] < 0.9 * losses(whole)[0]
    if steps > 20:
        assert losses(whole)[-1] < 0.6 * losses(whole)[0]
    with pytest.raises(InterruptedError):
        train(config_for(tmp_path, output=tmp_path / "cut", **options), callbacks=[Cut(2 * steps // 3)])
    resumed = train(config_for(tmp_path, output=tmp_path / "cut", resume=True, **options))
    assert losses(resumed) == losses(whole)
    ours, theirs = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_pack_has_the_loss_and_the_gradients_of_its_samples_alone(tmp_path: Path) -> None:
    """In float64, with tiles of several counts, and samples of text alone between images."""
    model, _, data = built(config_for(tmp_path, text={"preset": "moge:tiny", "router_aux_loss_coef": 0.0}))
    model = order_one(model).double().eval()
    model.set_attn_implementation({"text_config": "vlparts_packed"})
    model.set_experts_implementation("eager")  # the default has no float64
    samples = [sample for (sample,) in (data[[index]] for index in (1, 0, 3, 2, 4, 6))]
    tiles = [sample.images["image_tile_grid"].tolist() for sample in samples if sample.images]
    assert [[0, 0]] in tiles
    assert len({tuple(one[0]) for one in tiles}) == 3
    batch = collate_packed([samples])
    assert batch["image_tile_grid"].tolist() == [grid for one in tiles for grid in one]
    assert len(batch["image_grid_thw"]) == sum(rows * columns + 1 for ((rows, columns),) in tiles)

    def gradients(batches: list[dict[str, Any]]) -> tuple[float, dict[str, torch.Tensor]]:
        """The summed loss of batches, in float64, which the model's own loss is not, and its gradients."""
        model.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for one in batches:
            logits = model(**{name: value for name, value in one.items() if name != "labels"}, use_cache=False).logits
            loss = loss + cross_entropy(logits[0, :-1], one["labels"][0, 1:], reduction="sum")
        loss.backward()
        return float(loss.detach()), {name: one.grad.clone() for name, one in model.named_parameters()}

    batch["pixel_values"] = batch["pixel_values"].double()
    alone = [collate_packed([[sample]]) for sample in samples]
    for one in alone:
        if "pixel_values" in one:
            one["pixel_values"] = one["pixel_values"].double()
    (packed, ours), (separate, theirs) = gradients([batch]), gradients(alone)
    assert abs(packed - separate) < 1e-10 * abs(separate)
    assert separate > 10
    for name, value in theirs.items():
        # Tables of positions are resampled in float32, as in the published model.
        tolerance = 1e-6 if name.endswith("position_embedding") else 1e-10
        assert (ours[name] - value).abs().max() <= tolerance * value.abs().max(), name
    assert ours["model.vision_tower.sam.layers.0.mlp.fc1.weight"].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["model.vision_tower.sam.*"], r"model\.vision_tower\.sam\."),
        (["vision", "*.mlp.gate.*"], r"model\.vision_tower\.|model\.language_model\.layers\.\d\.mlp\.gate\."),
        (["projector", "text"], r"model\.projector\.|model\.language_model\.|lm_head\."),
    ],
)
def test_exactly_what_is_frozen_stays(tmp_path: Path, names: list[str], wanted: str) -> None:
    config = config_for(tmp_path, freeze=names, max_steps=3, capacity=600, weight_decay=0.1)
    model, _, _ = built(config)
    frozen = {name for name, one in model.named_parameters() if not one.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if re.match(wanted, name)}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = train(config).model.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == set(before) - frozen


UNKNOWN = {
    "model.vision_tower.sma.*": "the nearest known names are model.vision_tower.sam.",
    "sam.*": r"the nearest known names are model\.vision_tower\.sam\.\*",
    "model.vision_tower.sam": r"the nearest known names are model\.vision_tower\.sam\.\*",
    "*.nothing_like_it.*": "the nearest known names are vision, projector, text",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_pattern_without_a_parameter_lists_near_names(tmp_path: Path, name: str) -> None:
    model, _, _ = built(config_for(tmp_path))
    assert len(select_parameters(model, ["*"], "freeze")) == len(dict(model.named_parameters()))
    with pytest.raises(ValueError, match=f"`freeze` .* matches no parameter; {UNKNOWN[name]}"):
        select_parameters(model, [name], "freeze")


def test_tied_weights_are_frozen_by_each_of_their_names(tmp_path: Path) -> None:
    model, _ = build(settings(tmp_path, text={"preset": "qwen3:tiny"}), ["cat"])
    found = select_parameters(model, ["lm_head.weight"], "freeze")
    assert list(found) == ["model.language_model.embed_tokens.weight", "lm_head.weight"]


def test_the_mode_of_the_image_processor(tmp_path: Path) -> None:
    config = config_for(tmp_path, image_processor={"mode": "tiny"})
    _, processor, data = built(config)
    assert processor.image_processor.base_size == 512
    assert len(data[[1]][0]) == 8 * (8 + 1) + 1 + len(processor.tokenizer("\nFree OCR.cat")["input_ids"]) + 1
    processor.image_processor.save_pretrained(tmp_path / "processor")
    again = DeepEncoderImageProcessor.from_pretrained(tmp_path / "processor", mode="base", untiled_size=9)
    wanted = DeepEncoderImageProcessor(mode="base", untiled_size=9).to_dict()
    assert {name: value for name, value in again.to_dict().items() if name != "auto_map"} == wanted
    for options, message in (({"mode": "huge"}, "`mode` must be one of tiny"), ({"base_size": 65}, "a multiple of 4")):
        with pytest.raises(ValueError, match=f"`image_processor` .*{message}"):
            build(config_for(tmp_path, image_processor=options), ["cat"])


def test_a_schedule_by_steps(tmp_path: Path) -> None:
    options = {"learning_rate_steps": [[0.5, 0.3], [0.8, 0.1]], "max_steps": 10, "warmup_ratio": 0.2}
    result = train(config_for(tmp_path, **options))
    rates = [line["learning_rate"] / 3e-3 for line in result.log if "learning_rate" in line]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0, 0.3, 0.3, 0.3, 0.1, 0.1])
    with pytest.raises(ValueError, match="`learning_rate_steps` replaces 'lr_scheduler_type' in `trainer`"):
        train(config_for(tmp_path, output=tmp_path / "other", trainer={"lr_scheduler_type": "linear"}, **options))
    for steps in ([[0.8, 0.1], [0.5, 0.3]], [[0.5, 0.1], [0.5, 0.3]]):
        with pytest.raises(ValueError, match="must have ascending fractions"):
            config_for(tmp_path, learning_rate_steps=steps)
    for steps in ([[1.0, 0.1]], [[0.0, 0.1]], [[0.5, -1]], [[0.5]]):
        with pytest.raises(ValueError, match="learning_rate_steps"):
            config_for(tmp_path, learning_rate_steps=steps)


def test_the_published_stages(tmp_path: Path) -> None:
    """With all that is published, run with small parts."""
    small = config_for(tmp_path)
    shared = {"gradient_accumulation_steps": 1, "max_steps": 2, "weight_decay": 0.1, "data": str(small.data)}
    parts = {"vision": small.vision, "image_processor": small.image_processor}
    changes = {
        "output": str(tmp_path / "out"),
        "defaults.trainer": small.trainer,
        **{f"{stage}.{name}": value for stage in ("encoder", "model") for name, value in shared.items()},
        **{f"{stage}.text": small.text for stage in ("encoder", "model")},
        **{f"encoder.{name}": value for name, value in parts.items()},
        "model.image_processor": small.image_processor,
        "model.epochs": 1,
    }
    run_recipe(load_recipe("deepseek_ocr", changes))
    before, after = weights(tmp_path / "out" / "encoder"), weights(tmp_path / "out" / "model")
    same = {name for name in before if before[name].shape == after[name].shape}
    kept = {name for name in same if torch.equal(before[name], after[name])}
    assert {name for name in kept if name.startswith("model.vision_tower.")} == {
        name for name in before if name.startswith("model.vision_tower.sam.")
    }
    assert "model.vision_tower.sam.compress2.weight" in kept
