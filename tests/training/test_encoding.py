"""Encoding of records: labels, prompts that equal those of inference, and images that cannot be used."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.chat_styles import STYLES, styled_tokenizer
from tests.tiny import picture, save_turned
from tests.training.making import TOKENIZERS, processor_for, save
from vlparts.coordinates.codec import decode
from vlparts.parts.utils import IGNORE_INDEX
from vlparts.training.encoding import Sample, SampleEncoder, join_images
from vlparts.training.records import Record

PROCESSOR = processor_for()
IMAGE = {"type": "image"}
BOX = {"label": "cat", "box": [2, 3, 20, 15]}
USER = {"role": "user", "content": "Where is the cat?"}
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "text alone": {"messages": [USER, {"role": "assistant", "content": "It is here."}]},
    "one image": {"image": "a.png", "messages": [USER, {"role": "assistant", "content": "It is here."}]},
    "answers that begin and end with space": {
        "image": "a.png",
        "messages": [
            USER,
            {"role": "assistant", "content": "  It is\n"},
            {"role": "user", "content": "\n\nYou see. "},
            {"role": "assistant", "content": "\n\n here."},
        ],
    },
    "an empty answer": {"messages": [USER, {"role": "assistant", "content": ""}]},
    "turns, images and a system turn": {
        "images": ["a.png", "b.png"],
        "messages": [
            {"role": "system", "content": "You see."},
            USER,
            {"role": "assistant", "content": "It is here."},
            {"role": "user", "content": ["is the cat", " here?"]},
            {"role": "assistant", "content": ["It ", "is."]},
        ],
    },
    "images placed by blocks": {
        "images": ["a.png", "b.png"],
        "messages": [
            {"role": "system", "content": ["You see ", IMAGE]},
            {"role": "assistant", "content": "It is here."},
            {"role": "user", "content": ["Where ", IMAGE, " is it?"]},
            {"role": "assistant", "content": "here"},
        ],
    },
    "an answer to nothing": {
        "image": "a.png",
        "messages": [
            {"role": "assistant", "content": "It is here."},
            USER,
            {"role": "assistant", "content": "here"},
        ],
    },
    "a turn after the last answer": {
        "messages": [USER, {"role": "assistant", "content": "It is here."}, USER],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images")
    save(path, "a.png", picture(24, 12, 1))
    save(path, "b.png", picture(16, 20, 2))
    return path


def record(**fields: Any) -> Record:
    return Record.model_validate(fields)


def about(content: Any, *paths: str) -> Record:
    return record(images=paths, messages=[USER, {"role": "assistant", "content": content}])


def spans_of(sample: Sample) -> list[tuple[int, int]]:
    """Begin and end of each span of tokens with loss."""
    in_loss = torch.nn.functional.pad((sample.labels != IGNORE_INDEX).long(), (1, 1)).diff()
    return list(
        zip((in_loss == 1).nonzero().flatten().tolist(), (in_loss == -1).nonzero().flatten().tolist(), strict=True)
    )


def answers_of(sample: Sample, processor: Any = PROCESSOR) -> list[str]:
    """The texts of the spans with loss, each decoded after the tokens before it."""
    ids, decode_ids = sample.input_ids.tolist(), processor.tokenizer.decode
    return [decode_ids(ids[:end]).removeprefix(decode_ids(ids[:begin])) for begin, end in spans_of(sample)]


def words_of(message: Any) -> str:
    return "".join(block.text for block in message.content)


@pytest.mark.parametrize("words", TOKENIZERS)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_loss_covers_the_answers_with_their_end_tokens(folder: Path, name: str, words: str) -> None:
    processor = processor_for(words=TOKENIZERS[words]())
    given_record = record(**CONVERSATIONS[name])
    sample = SampleEncoder(processor, folder)(given_record)
    in_loss = sample.labels != IGNORE_INDEX
    assert torch.equal(sample.labels[in_loss], sample.input_ids[in_loss])
    expected = [words_of(message) for message in given_record.messages if message.role == "assistant"]
    end = processor.tokenizer.eos_token
    texts = answers_of(sample, processor)
    assert [text.removesuffix(end) for text in texts] == expected
    assert all(text.endswith(end) for text in texts)


def inference_chat(given_record: Record, folder: Path) -> list[dict[str, Any]]:
    """The record as the messages that a user would write to ask the model."""
    images = iter(Image.open(folder / path) for path in given_record.all_images)
    placed = any(block.type == "image" for m in given_record.messages for block in m.content)
    chat = []
    for message in given_record.messages:
        blocks: list[dict[str, Any]] = []
        if message.role == "user" and not placed:
            blocks += [{"type": "image", "image": image} for image in images]
        for block in message.content:
            blocks.append(
                {"type": "image", "image": next(images)}
                if block.type == "image"
                else {"type": "text", "text": block.text}
            )
        chat.append({"role": message.role, "content": blocks})
    return chat


@pytest.mark.parametrize("vision", ["navit", "clip", "siglip2"])
@pytest.mark.parametrize("words", TOKENIZERS)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_prompt_equals_that_of_inference(folder: Path, name: str, words: str, vision: str) -> None:
    """For each answer: the ids before it, and the pixels, are those of `apply_chat_template` at inference."""
    processor = processor_for(vision, TOKENIZERS[words]())
    given_record = record(**CONVERSATIONS[name])
    sample = SampleEncoder(processor, folder)(given_record)
    chat = inference_chat(given_record, folder)
    turns = [index for index, message in enumerate(chat) if message["role"] == "assistant"]
    for (begin, _), turn in zip(spans_of(sample), turns, strict=True):
        if turn == 0:
            continue  # nothing was asked
        asked = processor.apply_chat_template(
            chat[:turn], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        assert asked["input_ids"][0].tolist() == sample.input_ids[:begin].tolist()
    if given_record.all_images:
        for key, value in sample.images.items():
            assert torch.equal(asked[key], value), key


def test_image_placeholders_in_an_answer_have_no_loss(folder: Path) -> None:
    sample = SampleEncoder(PROCESSOR, folder)(about(["Here: ", IMAGE, " is it"], "a.png"))
    places = sample.input_ids == PROCESSOR.image_token_id
    assert places.sum() == 6 * 3
    assert (sample.labels[places] == IGNORE_INDEX).all()
    assert answers_of(sample) == ["Here: ", " is it<|im_end|>"]


STYLED = {name: styled_tokenizer(style) for name, style in STYLES.items()}
UNMARKED = {f"{name} unmarked": styled_tokenizer(style.without_marks()) for name, style in STYLES.items()}
DIALOGUE = {
    "images": ["a.png", "b.png"],
    "messages": [
        {"role": "user", "content": ["Where ", IMAGE, " is it?"]},
        {"role": "assistant", "content": ["It ", "is here."]},
        {"role": "user", "content": ["And ", IMAGE, "?"]},
        {"role": "assistant", "content": "here"},
    ],
}


@pytest.mark.parametrize("style", ["default", *STYLED, *UNMARKED])
def test_the_loss_covers_the_tokens_that_the_template_marks(folder: Path, style: str) -> None:
    """Also if the marks are taken out of the template."""
    name = style.removesuffix(" unmarked")
    marked = PROCESSOR if style == "default" else processor_for(words=STYLED[name])
    processor = processor_for(words=UNMARKED[style]) if style in UNMARKED else marked
    given_record = record(**DIALOGUE)
    sample = SampleEncoder(processor, folder)(given_record)
    inputs = processor.apply_chat_template(
        inference_chat(given_record, folder),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        chat_template=marked.chat_template,
    )
    length = len(sample)  # the sample ends with the last answer
    assert torch.equal(inputs["input_ids"][0, :length], sample.input_ids)
    assert torch.equal(inputs["assistant_masks"][0, :length].bool(), sample.labels != IGNORE_INDEX)
    assert not inputs["assistant_masks"][0, length:].any()
    end = "<|im_end|>" if style == "default" else STYLES[name].end
    assert answers_of(sample, processor) == [f"It is here.{end}", f"here{end}"]


def test_marks_that_leave_out_a_part_of_an_answer_are_followed(folder: Path) -> None:
    words = styled_tokenizer(STYLES["mistral"])
    marked = "{% generation %}{{- message['content'].split('#')[-1] + eos_token }}{% endgeneration %}"
    words.chat_template = words.chat_template.replace(
        '{% generation %}{{- message["content"] + eos_token }}{% endgeneration %}',
        "{{- message['content'].split('#')[0] + '#' }}" + marked,
    )
    processor = processor_for(words=words)
    sample = SampleEncoder(processor, folder)(about("It is #here.", "a.png"))
    assert answers_of(sample, processor) == ["here.</s>"]


@pytest.mark.parametrize(("vision", "tokens"), [("navit", [18, 20]), ("clip", [16, 16]), ("siglip2", [3 * 5, 4 * 4])])
def test_each_image_has_as_many_placeholders_as_features(folder: Path, vision: str, tokens: list[int]) -> None:
    processor = processor_for(vision)
    content = ["First ", IMAGE, " and then ", IMAGE]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "here"}]
    sample = SampleEncoder(processor, folder)(record(images=["a.png", "b.png"], messages=messages))
    places = (sample.input_ids == processor.image_token_id).long()
    assert [len(run) for run in "".join(map(str, places.tolist())).split("0") if run] == tokens


@given(
    boxes=st.lists(
        st.tuples(st.integers(0, 19), st.integers(0, 11), st.integers(1, 20), st.integers(1, 12)).map(
            lambda b: (min(b[0], b[2] - 1), min(b[1], b[3] - 1), b[2], b[3])
        ),
        min_size=1,
        max_size=4,
    ),
    points=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 12)), max_size=3),
)
def test_regions_in_pixels_come_back(folder: Path, boxes: list, points: list) -> None:
    """A code covers at most a thousandth of the image, so a coordinate comes back to that."""
    blocks = [{"label": f"b{i}x", "box": box} for i, box in enumerate(boxes)]
    blocks += [{"label": f"p{i}x", "point": point} for i, point in enumerate(points)]
    sample = SampleEncoder(PROCESSOR, folder)(about(blocks, "a.png"))
    (text,) = answers_of(sample)
    found = decode(text.removesuffix("<|im_end|>"), (24, 12))
    assert [region.label for region in found.regions] == [block["label"] for block in blocks]
    for region, block in zip(found.regions, blocks, strict=True):
        wanted = np.array(block.get("box") or block["point"], dtype=float).reshape(-1, 2)
        assert np.abs(np.array(region.points) - wanted).max() <= 24 / 1000


def test_regions_lie_in_the_image_that_they_name(folder: Path) -> None:
    """The same pixels are other shares of an image of another size; neighbours of one image share a separator."""
    blocks = [
        {"label": "cat", "box": [0, 0, 9, 12]},
        {"label": "dog", "box": [0, 0, 9, 12], "image": 1},
        {"point": [4, 4], "image": 1},
        {"point": [4, 4]},
    ]
    (text,) = answers_of(SampleEncoder(PROCESSOR, folder)(about(blocks, "a.png", "b.png")))
    regions = decode(text.removesuffix("<|im_end|>"), (1000, 1000)).regions
    assert [region.label for region in regions] == ["cat", "dog", None, None]
    ends = [region.points[-1] for region in regions]
    expected = [(9 / 24, 12 / 12), (9 / 16, 12 / 20), (4 / 16, 4 / 20), (4 / 24, 4 / 12)]
    assert np.abs(np.array(ends) / 1000 - np.array(expected)).max() < 2e-3


def test_a_region_outside_its_image(folder: Path) -> None:
    outside = [{"label": "in", "box": [1, 1, 2, 2]}, {"label": "out", "box": [15, -3, 28, 6]}]
    with pytest.raises(ValueError, match=r"leaves the image of size \(24, 12\)"):
        SampleEncoder(PROCESSOR, folder)(about(outside, "a.png"))
    (text,) = answers_of(SampleEncoder(PROCESSOR, folder, on_outside="clamp")(about(outside, "a.png")))
    _, clamped = decode(text.removesuffix("<|im_end|>"), (24, 12)).regions
    assert np.abs(np.array(clamped.xyxy) - (15, 0, 24, 6)).max() <= 24 / 1000
    (text,) = answers_of(SampleEncoder(PROCESSOR, folder, on_outside="skip")(about(outside, "a.png")))
    assert [one.label for one in decode(text.removesuffix("<|im_end|>"), (24, 12)).regions] == ["in"]


def test_unknown_choices_are_errors_before_any_record(folder: Path) -> None:
    with pytest.raises(ValueError, match="on_outside.* must be one of 'raise', 'clamp', 'skip', got 'cut'"):
        SampleEncoder(PROCESSOR, folder, on_outside="cut")
    with pytest.raises(ValueError, match="no_such_format"):
        SampleEncoder(PROCESSOR, folder, coordinate_format="no_such_format")


def test_a_conversation_that_the_template_refuses_is_an_error(folder: Path) -> None:
    processor = processor_for(chat_template="{{ raise_exception('no system turns') }}")
    with pytest.raises(ValueError, match="The chat template cannot render the conversation: no system turns"):
        SampleEncoder(processor, folder)(about("here"))


@pytest.mark.parametrize("text", ["see <image>", "<image>"])
def test_a_placeholder_in_the_text_is_an_error(folder: Path, text: str) -> None:
    for paths in ([], ["a.png"]):
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "no"}]
        message = f"The conversation has {len(paths) + 1} <image> tokens for {len(paths)} images"
        with pytest.raises(ValueError, match=message):
            SampleEncoder(PROCESSOR, folder)(record(images=paths, messages=messages))


def test_an_image_after_the_last_answer_is_an_error(folder: Path) -> None:
    messages = [{"role": "assistant", "content": "no"}, {"role": "user", "content": ["see ", IMAGE]}]
    with pytest.raises(ValueError, match="The chat template placed 0 of 1 images before the last assistant turn"):
        SampleEncoder(PROCESSOR, folder)(record(image="a.png", messages=messages))


def test_a_template_that_rewrites_turns_is_an_error(folder: Path) -> None:
    processor = processor_for(
        chat_template="{{ messages | length }}{% for m in messages %}{{ m['role'] }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        SampleEncoder(processor, folder)(record(**CONVERSATIONS["turns, images and a system turn"]))


def test_a_sample_that_is_too_long_is_an_error(folder: Path) -> None:
    length = len(SampleEncoder(PROCESSOR, folder)(about("here", "a.png")))
    assert len(SampleEncoder(PROCESSOR, folder, max_length=length)(about("here", "a.png"))) == length
    with pytest.raises(
        ValueError,
        match=rf"has {length} tokens \(18 of them for images\); expected at most {length - 1}\.",
    ):
        SampleEncoder(PROCESSOR, folder, max_length=length - 1)(about("here", "a.png"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(tmp_path: Path, orientation: int) -> None:
    """What the file holds is the upright image turned back; boxes are in pixels of the upright one."""
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    upright = picture(24, 12)
    stored = upright.transpose(Image.Transpose(turns[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path, "a.png", stored, exif=exif)
    sample = SampleEncoder(PROCESSOR, tmp_path)(about({"box": [0, 0, 24, 6]}, "a.png"))
    assert sample.images["image_grid_thw"].tolist() == [[1, 3, 6]]
    (text,) = answers_of(sample)
    assert np.abs(np.array(decode(text[: -len("<|im_end|>")], (24, 12)).regions[0].xyxy) - (0, 0, 24, 6)).max() < 0.05


def truncated(path: Path, kind: str, share: float) -> None:
    picture(40, 40).save(path, kind)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_regions_refer_to_the_upright_image(tmp_path: Path, orientation: int) -> None:
    """The trainer and the processor see the same pixels of a file, and its upright size decides the codes."""
    path = save_turned(picture(24, 16), tmp_path / "a.png", orientation)
    sample = SampleEncoder(PROCESSOR, tmp_path)(about([BOX], "a.png"))
    for image in (picture(24, 16), Image.open(path), str(path)):
        inputs = PROCESSOR(images=[image], text=[PROCESSOR.image_token], return_tensors="pt")
        assert torch.equal(sample.images["pixel_values"], inputs["pixel_values"])
    save(tmp_path, "b.png", picture(24, 16))
    assert torch.equal(sample.input_ids, SampleEncoder(PROCESSOR, tmp_path)(about([BOX], "b.png")).input_ids)


def test_the_pixel_limit_is_an_argument(tmp_path: Path) -> None:
    save(tmp_path, "a.png", picture(24, 16))
    SampleEncoder(PROCESSOR, tmp_path, max_image_pixels=384)(about("here", "a.png"))
    with pytest.raises(ValueError, match=r"a\.png has more than 383 pixels; pass a larger `max_image_pixels`"):
        SampleEncoder(PROCESSOR, tmp_path, max_image_pixels=383)(about("here", "a.png"))


BROKEN: dict[str, tuple[Any, str]] = {
    "missing": (lambda path: None, "does not exist"),
    "a folder": (lambda path: path.mkdir(), "cannot be read"),
    "not an image": (lambda path: path.write_bytes(b"<html>no</html>" * 20), "cannot be read"),
    "JPEG cut at half": (lambda path: truncated(path, "JPEG", 0.5), "cannot be read"),
    "500 times as wide as high": (lambda path: picture(500, 1).save(path, "PNG"), "aspect ratio of 500.0"),
    "floats": (lambda path: Image.fromarray(np.full((9, 9), 9, np.float32)).save(path, "TIFF"), "values of 9..9"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_image_that_cannot_be_used_is_named(tmp_path: Path, name: str) -> None:
    make, reason = BROKEN[name]
    save(tmp_path, "good.png")
    make(tmp_path / "bad.img")
    with pytest.raises(ValueError, match=reason) as caught:
        SampleEncoder(PROCESSOR, tmp_path)(about("here", "good.png", "bad.img"))
    assert str(tmp_path / "bad.img") in str(caught.value)
    assert "good.png" not in str(caught.value)


def test_an_image_of_one_pixel(tmp_path: Path) -> None:
    save(tmp_path, "a.png", Image.new("RGB", (1, 1), (255, 0, 0)))
    for vision in ("navit", "clip", "siglip2"):
        processor = processor_for(vision)
        pixels = SampleEncoder(processor, tmp_path)(about({"point": [1, 1]}, "a.png")).images["pixel_values"]
        wide = processor.image_processor(Image.new("RGB", (16, 16), (255, 0, 0)), return_tensors="pt")["pixel_values"]
        assert (pixels.min(), pixels.max()) == (wide.min(), wide.max())


def modes() -> dict[str, tuple[Image.Image, tuple[int, int, int]]]:
    """Images of every mode in one colour, and the colour that the model should see."""
    grey16 = Image.fromarray(np.full((12, 24), 32896, dtype=np.uint16))
    palette = Image.new("P", (24, 12), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    return {
        "RGB": (Image.new("RGB", (24, 12), (10, 200, 30)), (10, 200, 30)),
        "L": (Image.new("L", (24, 12), 128), (128, 128, 128)),
        "1": (Image.new("1", (24, 12), 1), (255, 255, 255)),
        "P": (palette, (10, 200, 30)),
        "RGBA": (Image.new("RGBA", (24, 12), (0, 0, 255, 255)), (0, 0, 255)),
        "RGBA transparent": (Image.new("RGBA", (24, 12), (0, 0, 255, 0)), (255, 255, 255)),
        "LA": (Image.new("LA", (24, 12), (0, 51)), (204, 204, 204)),
        "I;16": (grey16, (128, 128, 128)),
        "CMYK": (Image.new("CMYK", (24, 12), (255, 0, 255, 0)), (0, 255, 0)),
    }


@pytest.mark.parametrize("vision", ["navit", "clip", "siglip2"])
@pytest.mark.parametrize("mode", modes())
def test_images_of_every_mode(tmp_path: Path, mode: str, vision: str) -> None:
    image, colour = modes()[mode]
    save(tmp_path, "a.tif", image)
    processor = processor_for(vision)
    sample = SampleEncoder(processor, tmp_path)(about("here", "a.tif"))
    expected = processor.image_processor(Image.new("RGB", (24, 12), colour), return_tensors="pt")
    assert set(expected) == set(sample.images)
    for key, value in sample.images.items():
        torch.testing.assert_close(value, expected[key], msg=lambda text, key=key: f"{key}: {text}")


def test_kept_patches_are_counted_through_all_images() -> None:
    grids = [torch.tensor([[1, 2, 3]]), torch.tensor([[1, 1, 2], [1, 2, 2]]), torch.tensor([[1, 1, 1]])]
    kept = [torch.tensor([0, 4]), torch.tensor([1, 3]), torch.tensor([0])]
    images = [{"image_grid_thw": one, "image_keep_index": index} for one, index in zip(grids, kept, strict=True)]
    assert join_images(images)["image_keep_index"].tolist() == [0, 4, 7, 9, 12]


def test_outputs_with_other_names_are_not_joined() -> None:
    one = {"pixel_values": torch.zeros(2, 3), "image_grid_thw": torch.ones(1, 3)}
    joined = join_images([one, one])
    assert {name: tuple(value.shape) for name, value in joined.items()} == {
        "pixel_values": (4, 3),
        "image_grid_thw": (2, 3),
    }
    with pytest.raises(ValueError, match="must have the same names, got .*'pixel_values'.* and .*'extra'"):
        join_images([one, {**one, "extra": torch.zeros(1)}])
