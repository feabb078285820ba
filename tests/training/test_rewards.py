"""Rewards of answers with coordinates."""

import copy
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import tokenizer
from vlparts.coordinates.codec import decode, encode
from vlparts.coordinates.metrics.iou import paired_box_iou
from vlparts.coordinates.regions import Region
from vlparts.training.rewards import format_reward, iou_reward, point_in_box_reward

SIZE = (1000, 1000)
FULL, HALF, FAR = (0, 0, 100, 100), (0, 0, 100, 50), (600, 600, 800, 800)


def near(value: float | None) -> Any:
    """About this reward: boxes are rounded when they are written."""
    return None if value is None else pytest.approx(value, abs=0.01)


def written(*regions: tuple[int, ...], labels: list[str] | None = None) -> str:
    """Boxes and points in openPangu's format."""
    named = labels or [None] * len(regions)
    made = [
        Region.box(*one, label) if len(one) == 4 else Region.point(*one, label)
        for one, label in zip(regions, named, strict=True)
    ]
    return encode(made, SIZE)


def one(reward: Any, answer: Any, boxes: Any, **columns: Any) -> float | None:
    """The reward of one answer."""
    (value,) = reward([answer], boxes=[boxes], image_size=[SIZE], **columns)
    return value


@pytest.mark.parametrize(
    ("predicted", "boxes", "expected"),
    [
        ([FULL], [FULL], 1.0),
        ([HALF], [FULL], 0.5),
        ([FAR], [FULL], 0.0),
        ([FULL, FAR], [FAR, FULL], 1.0),
        ([FULL], [FULL, FAR], 0.5),  # one is missing
        ([FULL, FULL], [FULL], 0.5),  # one too many
        ([HALF, FAR], [FULL, FAR], 0.75),
        ([], [FULL], 0.0),
        ([FULL], [], 0.0),
        ([], [], 1.0),
        ([(50, 50)], [FULL], 0.0),  # a point in the box is no box
        ([FULL, (50, 50)], [FULL], 0.5),
    ],
)
def test_iou(predicted: list[tuple[int, ...]], boxes: list[tuple[int, ...]], expected: float) -> None:
    assert one(iou_reward(), written(*predicted), boxes) == near(expected)


@pytest.mark.parametrize(
    ("predicted", "boxes", "expected"),
    [
        ([(50, 50)], [FULL], 1.0),
        ([(500, 50)], [FULL], 0.0),
        ([(700, 700), (50, 50)], [FULL, FAR], 1.0),
        ([(50, 50), (60, 60)], [FULL, FAR], 0.5),  # both are in one box
        ([(50, 50)], [FULL, FAR], 0.5),
        ([FULL], [FULL], 0.0),
        ([], [], 1.0),
    ],
)
def test_points(predicted: list[tuple[int, ...]], boxes: list[tuple[int, ...]], expected: float) -> None:
    assert one(point_in_box_reward(), written(*predicted), boxes) == expected


def test_labels_count_if_there_is_a_column() -> None:
    answer = written(FULL, FAR, labels=["cat", "dog"])
    columns: dict[str, Any] = {"labels": [["dog", "dog"]]}
    assert one(iou_reward(), answer, [FULL, FAR], **columns) == near(1)
    assert one(iou_reward(labels="labels"), answer, [FULL, FAR], **columns) == near(0.5)
    assert one(iou_reward(labels="names"), answer, [FULL, FAR], names=[["cat", "dog"]]) == near(1)
    assert one(point_in_box_reward(labels="labels"), written((50, 50), labels=["cat"]), [FULL], labels=[["cat"]]) == 1


boxes = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 10), st.integers(1, 10)).map(
        lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
    ),
    max_size=4,
)


@given(boxes, boxes, st.randoms(use_true_random=False))
def test_iou_is_that_of_the_best_pairs(predicted: list[Any], truth: list[Any], random: Any) -> None:
    size = (20, 20)
    answer = encode([Region.box(*box) for box in predicted], size)
    reread = [region.xyxy for region in decode(answer, size).regions]
    (reward,) = iou_reward()([answer], boxes=[truth], image_size=[size])
    less, more = sorted((reread, truth), key=len)
    sums = [
        sum(paired_box_iou(list(less), list(chosen)).tolist()) if less else 0.0
        for chosen in permutations(more, len(less))
    ]
    assert reward == pytest.approx(max(sums) / len(more) if more else 1.0)
    random.shuffle(predicted)
    random.shuffle(truth)
    answer = encode([Region.box(*box) for box in predicted], size)
    assert iou_reward()([answer], boxes=[truth], image_size=[size]) == pytest.approx([reward])


CUT_OFF = written(FULL) + "\n(600,6"


@pytest.mark.parametrize(("on_malformed", "expected"), [("zero", 0.0), ("skip", 1.0), ("none", None)])
def test_a_malformed_answer(on_malformed: str, expected: float | None) -> None:
    assert decode(CUT_OFF, SIZE, on_error="collect").errors
    assert one(iou_reward(on_malformed=on_malformed), CUT_OFF, [FULL]) == near(expected)
    outside = "(000,000),(200,2000)"
    assert one(iou_reward(on_malformed=on_malformed), outside, [FULL]) == (None if on_malformed == "none" else 0.0)


@given(st.text(st.sampled_from("(),0123456789 \nab<think>/"), max_size=40))
def test_any_text_has_rewards_from_0_to_1(text: str) -> None:
    for make in (iou_reward, point_in_box_reward):
        for thinking in (False, True):
            value = one(make(skip_thinking=thinking), text, [FULL])
            assert value is not None
            assert 0 <= value <= 1
    for options in ({}, {"kind": "box"}, {"exact": False}):
        assert format_reward(**options)([text], image_size=[SIZE])[0] in (0.0, 1.0)


def test_a_row_without_boxes_has_no_reward() -> None:
    columns = {"boxes": [None, [FULL]], "image_size": [SIZE, SIZE]}
    assert iou_reward()([written(FULL)] * 2, **columns) == [None, near(1)]


@pytest.mark.parametrize(
    ("answer", "kind", "exact", "loose"),
    [
        (written(FULL), None, 1, 1),
        (written(FULL, labels=["cat"]), "box", 1, 1),
        (f" {written(FULL, FAR)}\n", "box", 1, 1),
        (written(FULL), "point", 0, 0),
        (written(FULL, (3, 4)), "box", 0, 0),
        ("It is here: " + written(FULL) + ".", "box", 0, 1),
        (written(FULL).replace(",(", ", ("), "box", 0, 0),
        (CUT_OFF, None, 0, 0),
        ("A cat.", None, 0, 0),
        ("", None, 0, 0),
    ],
)
def test_format(answer: str, kind: str | None, exact: float, loose: float) -> None:
    assert format_reward(kind=kind)([answer], image_size=[SIZE]) == [exact]
    assert format_reward(kind=kind, exact=False)([answer], image_size=[SIZE]) == [loose]


def test_another_format() -> None:
    answer = encode([Region.box(10, 20, 110, 220, "cat")], SIZE, "qwen2_5_vl")
    assert one(iou_reward("qwen2_5_vl"), answer, [(10, 20, 110, 220)]) == near(1)
    assert one(iou_reward(), answer, [(10, 20, 110, 220)]) == 0
    assert format_reward("qwen2_5_vl")([answer], image_size=[SIZE]) == [1.0]
    loose = format_reward("qwen2_5_vl", exact=False)
    assert loose([f"```json\n{answer}\n```"], image_size=[SIZE]) == [1.0]


def test_reasoning_is_left_out_on_request() -> None:
    answer = f"<think>{written(FAR)}</think>\n{written(FULL)}"
    assert one(iou_reward(), answer, [FULL]) == near(0.5)
    assert one(iou_reward(skip_thinking=True), answer, [FULL]) == near(1)
    assert format_reward(skip_thinking=True)([answer], image_size=[SIZE]) == [1.0]
    assert format_reward()([answer], image_size=[SIZE]) == [0.0]


@pytest.mark.parametrize(
    "completion",
    [
        [{"role": "assistant", "content": written(FULL)}],
        [{"role": "assistant", "content": "No."}, {"role": "assistant", "content": written(FULL)}],
        [{"role": "assistant", "content": [{"type": "text", "text": written(FULL)}]}],
    ],
)
def test_the_answer_is_the_last_message(completion: Any) -> None:
    assert one(iou_reward(), completion, [FULL]) == near(1)


def test_a_message_without_text_is_an_empty_answer() -> None:
    assert one(iou_reward(), [{"role": "assistant", "content": None}], [FULL]) == 0


def test_special_tokens_are_read_by_a_tokenizer() -> None:
    """TRL leaves them out of the text."""
    words = tokenizer()
    words.add_special_tokens({"extra_special_tokens": ["<|box_start|>", "<|box_end|>"]})
    answer = encode([Region.box(*FULL)], SIZE, "qwen2_vl")
    ids = [*words(answer, add_special_tokens=False)["input_ids"], words.eos_token_id]
    text = words.decode(ids, skip_special_tokens=True)
    assert "<|box_start|>" not in text
    assert one(iou_reward("qwen2_vl"), text, [FULL], completion_ids=[ids]) == 0
    assert one(iou_reward("qwen2_vl", tokenizer=words), text, [FULL], completion_ids=[ids]) == near(1)
    exact = format_reward("qwen2_vl", kind="box", tokenizer=words)
    padded = [*ids, words.eos_token_id]
    assert exact([text] * 3, image_size=[SIZE] * 3, completion_ids=[ids, padded, []]) == [1.0, 1.0, 0.0]


def test_names_and_copies() -> None:
    rewards = [iou_reward(), format_reward(kind="box"), point_in_box_reward("molmo")]
    assert [reward.__name__ for reward in rewards] == ["iou_reward", "format_reward", "point_in_box_reward"]
    again = copy.deepcopy(rewards[0])  # as pickle
    assert one(again, written(HALF), [FULL]) == one(rewards[0], written(HALF), [FULL])


def test_all_other_arguments_of_a_trainer_are_ignored() -> None:
    given_by_trainer = {"prompts": ["?"], "completion_ids": [[1]], "trainer_state": None, "format": ["x"]}
    assert one(iou_reward(), written(FULL), [FULL], **given_by_trainer) == near(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: iou_reward("nonsense"), "`format` must be"),
        (lambda: iou_reward(on_malformed="raise"), "`on_malformed` must be one of 'zero', 'skip', 'none', got"),
        (lambda: format_reward(kind="circle"), "`kind` must be one of"),
        (
            lambda: iou_reward()([""], boxes=[[FULL]]),
            "`image_size` of iou_reward is the column 'image_size', which the dataset lacks; it has 'boxes'",
        ),
        (lambda: iou_reward(boxes="truth")([""], image_size=[SIZE]), "`boxes` of iou_reward is the column 'truth'"),
        (lambda: iou_reward(labels="x")([""], boxes=[[]], image_size=[SIZE]), "`labels` of iou_reward is the column"),
        (
            lambda: one(iou_reward(labels="labels"), "", [FULL], labels=[["a", "b"]]),
            "`labels` must have one label per box, got 2 for 1",
        ),
        (lambda: one(iou_reward(), "", [(1, 2, 3)]), r"`boxes` must be lists of x1, y1, x2, y2, got \(1, 2, 3\)"),
        (lambda: one(iou_reward(), "", FULL), "`boxes` must be lists of x1, y1, x2, y2, got 0"),
        (lambda: iou_reward()([""], boxes=[[]], image_size=[[SIZE, SIZE]]), "`image_size` must be"),
        (lambda: iou_reward()([""], boxes=[[]], image_size=[None]), "`image_size` must be"),
        (lambda: one(iou_reward(), [], [FULL]), r"`completions` must be texts or lists of messages, got \[\]"),
        (lambda: one(iou_reward(), 3, [FULL]), "`completions` must be texts or lists of messages, got 3"),
        (lambda: iou_reward()(["", ""], boxes=[[]], image_size=[SIZE] * 2), "`boxes` must have 2 values, got 1"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
