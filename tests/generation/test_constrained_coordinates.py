"""Constrained generation: with any scores, the generated text is readable."""

import re
from functools import cache

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList

from tests.tokenizers_made import made
from vlparts.generation import CoordinateLogitsProcessor
from vlparts.parts.tokenization_coordinates import PaddedCoordinateTokenizer

MARKERS = {"box_start": "[b]", "box_end": "[/b]", "point_start": "[p]", "point_end": "[/p]"}
PROMPT = 3
PAIR = r"\((\d{3}),(\d{3})\)"
PATTERNS = {"point": PAIR, "box": f"{PAIR},{PAIR}", "quad": ",".join([PAIR] * 4)}


@cache
def tokenizer(markers: bool = False, locations: str | None = None) -> PaddedCoordinateTokenizer:
    names = MARKERS if markers else None
    return PaddedCoordinateTokenizer.from_tokenizer(made("bytes"), markers=names, location_tokens=locations)


def processor(words: PaddedCoordinateTokenizer, **options: object) -> CoordinateLogitsProcessor:
    options = {"prompt_length": PROMPT, "eos_token_id": words.eos_token_id, **options}
    return CoordinateLogitsProcessor(words.coordinate_token_ids(), **options)


def generate(
    words: PaddedCoordinateTokenizer, constraint: CoordinateLogitsProcessor, seed: int, steps: int, rows: int = 4
) -> list[list[int]]:
    """Sample from random scores that favour coordinates; each row is cut at its end token."""
    generator = torch.Generator().manual_seed(seed)
    preference = torch.zeros(len(words))
    ids = words.coordinate_token_ids()
    preference[[ids.opening, ids.comma, ids.closing, *ids.digits, *ids.locations[::50], *ids.markers.values()]] = 4.0
    tokens = torch.randint(0, len(words), (rows, PROMPT), generator=generator)
    for _ in range(steps):
        scores = torch.randn(rows, len(words), generator=generator) * 2 + preference
        allowed = constraint(tokens, scores)
        assert (allowed > -torch.inf).any(1).all()
        kept = allowed > -torch.inf
        assert torch.equal(allowed[kept], scores[kept])
        chosen = torch.multinomial(allowed.softmax(1), 1, generator=generator)
        tokens = torch.cat([tokens, chosen], 1)
    return [until_end(row, words.eos_token_id) for row in tokens[:, PROMPT:].tolist()]


def until_end(row: list[int], end: int) -> list[int]:
    return row[: row.index(end)] if end in row else row


def check_boxes(text: str, levels: int, ordered: bool) -> int:
    """Every parenthesis belongs to a pair of a box with codes in range; returns the number of boxes."""
    boxes = re.findall(PATTERNS["box"], text)
    assert "(" not in re.sub(PATTERNS["box"], "", text)
    for x1, y1, x2, y2 in (map(int, box) for box in boxes):
        assert max(x1, y1, x2, y2) < levels
        assert not ordered or (x1 <= x2 and y1 <= y2)
    return len(boxes)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), levels=st.sampled_from([1, 7, 100, 512, 1000]), ordered=st.booleans())
def test_free_text_holds_whole_boxes_alone(seed: int, levels: int, ordered: bool) -> None:
    words = tokenizer()
    options = {"levels": levels, "ordered": ordered, "forbidden": words.token_ids_with("("), "max_length": PROMPT + 80}
    rows = generate(words, processor(words, **options), seed, steps=80)
    assume(sum(check_boxes(words.decode(row), levels, ordered) for row in rows) > 0)  # fails if no example has a box


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_markers_enclose_whole_regions_of_their_kind(seed: int) -> None:
    words = tokenizer(markers=True)
    rows = generate(words, processor(words, max_length=PROMPT + 90), seed, steps=90)
    marked = rf"\[b\]{PATTERNS['box']}\[/b\]|\[p\]{PATTERNS['point']}\[/p\]"
    texts = [words.decode(row) for row in rows]
    assume(any(re.search(marked, text) for text in texts))  # fails if no example has a region
    for row, text in zip(rows, texts, strict=True):
        # Markers are counted as tokens: text may spell "[b]" with other ones.
        markers = [token for token in row if token in words.coordinate_token_ids().markers.values()]
        assert len(re.findall(marked, text)) == len(markers) / 2


@pytest.mark.parametrize(("kind", "label"), [("point", 0), ("box", 0), ("quad", 0), ("box", 6)])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_an_answer_is_a_label_one_region_and_the_end(kind: str, label: int, seed: int) -> None:
    words = tokenizer()
    options = {"mode": "answer", "kinds": [kind], "max_label_tokens": label, "forbidden": words.token_ids_with("(")}
    rows = generate(words, processor(words, **options), seed, steps=48)
    length = {"point": 9, "box": 19, "quad": 39}[kind]
    for row in rows:
        assert re.fullmatch(rf"[^(]*{PATTERNS[kind]}", words.decode(row))
        assert length <= len(row) <= length + label


@pytest.mark.parametrize("locations", ["rex", "kosmos"])
@pytest.mark.parametrize("markers", [False, True])
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_location_tokens(locations: str, markers: bool, seed: int) -> None:
    words = tokenizer(markers, locations)
    ids = words.coordinate_token_ids()
    rows = generate(words, processor(words, kinds=["box"], max_length=PROMPT + 40), seed, steps=40)
    size = 4 if locations == "rex" else 2
    found = 0
    for row in rows:
        codes = [ids.locations.index(token) if token in ids.locations else None for token in row]
        runs = "".join("." if code is None else "#" for code in codes)
        assert all(len(run) % size == 0 for run in re.findall("#+", runs))
        places = [place for place in range(len(codes)) if codes[place] is not None][::size]
        found += len(places)
        for place in places:
            box = codes[place : place + size]
            if locations == "kosmos":
                box = [box[0] % 32, box[0] // 32, box[1] % 32, box[1] // 32]
            assert box[0] <= box[2]
            assert box[1] <= box[3]
            if markers:
                assert (row[place - 1], row[place + size]) == (ids.markers["box_start"], ids.markers["box_end"])
    assume(found > 0)  # fails if no example has a region


def model(words: PaddedCoordinateTokenizer) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(words), initializer_range=1.0, **special)).eval()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 3}, {"do_sample": True, "top_k": 5}])
def test_generate(options: dict) -> None:
    words = tokenizer(markers=True)
    constraint = processor(words, mode="answer", kinds=["box"], max_label_tokens=4)
    prompt = torch.randint(0, len(words), (2, PROMPT), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "max_new_tokens": 30}
    tokens = model(words).generate(**inputs, logits_processor=LogitsProcessorList([constraint]), **options)
    assert len(tokens) == 2 * options.get("num_return_sequences", 1)
    for row in tokens[:, PROMPT:].tolist():
        assert words.eos_token_id in row
        text = words.decode(until_end(row, words.eos_token_id))
        assert re.search(rf"\[b\]{PATTERNS['box']}\[/b\]$", text)


def spell(words: PaddedCoordinateTokenizer, text: str) -> list[int]:
    """Tokens of an unfinished region, one per character, as for any other text here."""
    ids = words.coordinate_token_ids()
    table = {"(": ids.opening, ",": ids.comma, ")": ids.closing, **dict(zip("0123456789", ids.digits, strict=True))}
    return [table[one] if one in table else words.convert_tokens_to_ids(one) for one in text]


def allowed(constraint: CoordinateLogitsProcessor, words: PaddedCoordinateTokenizer, text: str) -> set[int]:
    """The tokens that may follow the text, after a prompt of three tokens."""
    tokens = torch.tensor([[0] * PROMPT + spell(words, text)])
    return set(torch.nonzero(constraint(tokens, torch.zeros(1, len(words)))[0] > -torch.inf)[:, 0].tolist())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(", "0123456"),
        ("(6", "012345"),
        ("(65", "012"),
        ("(652", ","),
        ("(200,100)", ","),
        ("(200,100),", "("),
        ("(200,100),(", "23456"),
        ("(200,100),(2", "0123456789"),
        ("(219,100),(2", "123456789"),
        ("(219,100),(21", "9"),
        ("(219,100),(3", "0123456789"),
        ("(219,100),(300,", "123456"),
        ("(219,652),(300,65", "2"),
        ("(219,652),(300,652", ")"),
    ],
)
def test_digits_keep_to_the_range_and_the_order(text: str, expected: str) -> None:
    words = tokenizer()
    assert allowed(processor(words, levels=653), words, text) == set(spell(words, expected))


def test_after_a_broken_region_only_the_end_is_left() -> None:
    words = tokenizer()
    assert allowed(processor(words), words, "(900,100),(1") == {words.eos_token_id}


def test_the_prompt_is_ignored_and_nothing_follows_the_end() -> None:
    words = tokenizer()
    ids = words.coordinate_token_ids()
    constraint = processor(words, prompt_length=2, mode="answer")
    scores = torch.randn(2, len(words))
    tokens = torch.tensor([[ids.opening, 5], [ids.opening, words.eos_token_id]])
    assert (constraint(tokens, scores)[0] > -torch.inf).nonzero().tolist() == [[ids.opening]]
    ended = torch.tensor([[ids.opening, 5, words.eos_token_id, 7], [ids.opening, 5, 7, words.eos_token_id]])
    assert (constraint(ended, scores) > -torch.inf).nonzero()[:, 1].tolist() == [words.eos_token_id] * 2


def test_rows_and_order_do_not_matter() -> None:
    words = tokenizer(markers=True)
    texts = ["[b](123,4", "[p](12", "plain te", "[b](123,456),(7"]
    rows = [words(text, add_special_tokens=False)["input_ids"] for text in texts]
    tokens = torch.tensor([[0] * (PROMPT + 20 - len(row)) + row for row in rows])
    constraint = processor(words)
    scores = torch.randn(4, len(words))
    together = constraint(tokens, scores)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(constraint(tokens[order], scores[order]), together[order])
    for row in range(4):
        assert torch.equal(constraint(tokens[row : row + 1], scores[row : row + 1])[0], together[row])


def test_scores_that_exclude_all_fitting_tokens_become_equal() -> None:
    words = tokenizer()
    ids = words.coordinate_token_ids()
    scores = torch.full((1, len(words)), -torch.inf)
    scores[0, 5] = 1.0
    found = processor(words, mode="answer")(torch.zeros(1, PROMPT, dtype=torch.int64), scores)
    assert found[0, ids.opening] == 0.0
    assert (found > -torch.inf).sum() == 1


def test_a_region_that_does_not_fit_is_not_started() -> None:
    words = tokenizer()
    opening = words.coordinate_token_ids().opening
    text = "ab"
    length = len(text)
    assert opening in allowed(processor(words, max_length=PROMPT + length + 19), words, text)
    assert opening not in allowed(processor(words, max_length=PROMPT + length + 18), words, text)
    label = processor(words, mode="answer", max_label_tokens=9, max_length=PROMPT + length + 19)
    assert allowed(label, words, text) == {opening}
    late = processor(words, mode="answer", max_label_tokens=9, max_length=PROMPT + 19)
    assert allowed(late, words, text) == {words.eos_token_id}
