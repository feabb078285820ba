"""The windowed ban on n-grams where users meet it: batches, beams, streamers, and the pipeline of a saved model."""

from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, TextIteratorStreamer, TextStreamer, pipeline

from tests.parts.test_vlm_generation import banned_by_loops
from tests.parts.test_vlm_views import composed
from tests.tiny import picture

LETTERS = ["Ġ", "a", "b", "c", "d"]
SIZE, WINDOW, LENGTH = 2, 5, 24  # four pairs of the window ban at most four of five tokens
BAN = {"no_repeat_ngram_size": SIZE, "no_repeat_ngram_window_size": WINDOW}
PLAIN = {"max_new_tokens": LENGTH, "do_sample": False}
IMAGES = [[picture(150, 90), picture(40, 40)], [picture(60, 130)], []]
PROMPTS = ["<image> and <image>", "what is <image>", "no image"]


@pytest.fixture(scope="module")
def made() -> tuple[Any, Any]:
    """A model with DeepSeek-OCR's encoder whose answers are words of four letters, and its processor."""
    model, processor = composed("qwen3")
    kept = letter_ids(processor)
    model.generation_config.suppress_tokens = [one for one in range(len(processor.tokenizer)) if one not in kept]
    return model, processor


def letter_ids(processor: Any) -> list[int]:
    return processor.tokenizer.convert_tokens_to_ids(LETTERS)


def prompt(processor: Any, samples: list[int]) -> Any:
    images = [IMAGES[one] for one in samples]
    given = {"images": images} if any(images) else {}
    return processor(text=[PROMPTS[one] for one in samples], padding=True, return_tensors="pt", **given)


def greedy(model: Any, processor: Any, inputs: Any, allowed: set[int]) -> list[int]:
    """The answer to one prompt: all tokens so far through the model, and the ban in loops."""
    kept, answer = letter_ids(processor), []
    inputs = dict(inputs)
    for _ in range(LENGTH):
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[0, -1]
        left = [one for one in kept if one not in banned_by_loops(answer, SIZE, WINDOW, allowed)]
        answer.append(max(left, key=lambda one, logits=logits: float(logits[one])))
        inputs["input_ids"] = torch.cat((inputs["input_ids"], torch.tensor([answer[-1:]])), dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return answer


def repeats(answer: list[int], allowed: set[int]) -> bool:
    """Whether a token of the answer is one that its predecessors ban."""
    return any(token in banned_by_loops(answer[:at], SIZE, WINDOW, allowed) for at, token in enumerate(answer))


@pytest.mark.parametrize("allowed", [(), ("a",)])
def test_a_padded_batch_answers_as_its_prompts_alone(made: tuple[Any, Any], allowed: tuple[str, ...]) -> None:
    model, processor = made
    ids = processor.tokenizer.convert_tokens_to_ids(list(allowed))
    inputs = prompt(processor, [0, 1])
    assert (inputs["attention_mask"][1, :1] == 0).all()
    start = inputs["input_ids"].shape[1]
    options = BAN | ({"no_repeat_ngram_allowed_ids": ids} if ids else {})
    for given in (options, {"generation_config": GenerationConfig(**options)}):
        found = model.generate(**inputs, **PLAIN, **given)[:, start:].tolist()
        assert found != model.generate(**inputs, **PLAIN)[:, start:].tolist()
        for row, answer in enumerate(found):
            assert answer == greedy(model, processor, prompt(processor, [row]), set(ids))


@pytest.mark.parametrize("samples", [[0, 1], [2]])
def test_beams_repeat_nothing(made: tuple[Any, Any], samples: list[int]) -> None:
    model, processor = made
    options = {**PLAIN, "num_beams": 3, "num_return_sequences": 2}
    inputs = prompt(processor, samples)
    start = inputs["input_ids"].shape[1]
    plain = model.generate(**inputs, **options)[:, start:].tolist()
    assert all(repeats(answer, set()) for answer in plain)
    found = model.generate(**inputs, **options, **BAN)[:, start:].tolist()
    assert len(found) == 2 * len(samples)
    assert not any(repeats(answer, set()) for answer in found)
    for row, sample in enumerate(samples):
        alone = prompt(processor, [sample])
        answers = model.generate(**alone, **options, **BAN)[:, alone["input_ids"].shape[1] :].tolist()
        assert found[2 * row : 2 * row + 2] == answers


@pytest.mark.parametrize("sample", [0, 2])
@pytest.mark.parametrize("banned", [True, False])
def test_streamed_text_is_the_text(
    made: tuple[Any, Any], sample: int, banned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = made
    inputs = prompt(processor, [sample])
    options = PLAIN | (BAN if banned else {})
    answer = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    assert repeats(answer.tolist(), set()) != banned
    text = processor.tokenizer.decode(answer, skip_special_tokens=True)

    capsys.readouterr()
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    assert torch.equal(model.generate(**inputs, **options, streamer=streamer)[0, -LENGTH:], answer)
    assert capsys.readouterr().out == text + "\n"

    pieces = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True)
    thread = Thread(target=model.generate, kwargs={**inputs, **options, "streamer": pieces})
    thread.start()
    assert "".join(pieces) == text
    thread.join()


def test_the_pipeline_of_a_saved_model(made: tuple[Any, Any], tmp_path: Path) -> None:
    """Options as arguments and from the folder; the text and the stream of an answer."""
    model, processor = made
    model.save_pretrained(tmp_path / "plain")
    processor.save_pretrained(tmp_path / "plain")
    inputs = prompt(processor, [1])
    answer = model.generate(**inputs, **PLAIN, **BAN)[0, inputs["input_ids"].shape[1] :]
    text = processor.tokenizer.decode(answer, skip_special_tokens=True)
    question = {"images": IMAGES[1], "text": PROMPTS[1], "return_full_text": False}

    ask = pipeline("image-text-to-text", model=str(tmp_path / "plain"))
    assert ask(**question, generate_kwargs={**PLAIN, **BAN})[0]["generated_text"] == text
    assert ask(**question, generate_kwargs=dict(PLAIN))[0]["generated_text"] != text
    pieces = TextIteratorStreamer(ask.tokenizer, skip_prompt=True, skip_special_tokens=True)
    ask(**question, generate_kwargs={**PLAIN, **BAN, "streamer": pieces})
    assert "".join(pieces) == text

    for name, value in BAN.items():
        setattr(ask.model.generation_config, name, value)
    ask.model.save_pretrained(tmp_path / "banned")
    processor.save_pretrained(tmp_path / "banned")
    ask = pipeline("image-text-to-text", model=str(tmp_path / "banned"))
    assert ask(**question, generate_kwargs=dict(PLAIN))[0]["generated_text"] == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"no_repeat_ngram_window_size": 5},
            "`no_repeat_ngram_window_size` needs `no_repeat_ngram_size`, got 5 without it",
        ),
        (
            {"no_repeat_ngram_allowed_ids": [3], "no_repeat_ngram_size": 2},
            r"`no_repeat_ngram_allowed_ids` needs `no_repeat_ngram_window_size`, got \[3\] without it",
        ),
    ],
)
def test_options_that_would_have_no_effect(made: tuple[Any, Any], options: dict[str, Any], message: str) -> None:
    model, processor = made
    with pytest.raises(ValueError, match=message):
        model.generate(**prompt(processor, [2]), **PLAIN, **options)


def test_the_ban_of_a_configuration_can_be_switched_off(made: tuple[Any, Any]) -> None:
    model, processor = made
    inputs = prompt(processor, [2])
    options = {**BAN, "no_repeat_ngram_allowed_ids": [3]}
    config = GenerationConfig(**options, suppress_tokens=model.generation_config.suppress_tokens)
    plain = model.generate(**inputs, **PLAIN)
    assert not torch.equal(model.generate(**inputs, **PLAIN, generation_config=config), plain)
    config.no_repeat_ngram_size = None
    assert torch.equal(model.generate(**inputs, **PLAIN, generation_config=config), plain)
