"""The filter of a file of records: what is kept, how lines stay as they are, and runs that continue after a kill."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.training.filtering.making import Knowing, asked, language_model
from vlparts.journal import Journal
from vlparts.training.filtering import compute_perplexities, filter_records, scored_text, select_lowest
from vlparts.training.filtering.output import _line_with_scores
from vlparts.training.filtering.texts import open_record
from vlparts.training.records import RecordError, read_records

ROOT = Path(__file__).parents[3]
ANSWERS = [f"It is a {colour} cat{'!' * index}" for index, colour in enumerate(["red", "blue", "grey", "a" * 30] * 5)]
RECORDS = [asked(f"What is number {index}?", answer) for index, answer in enumerate(ANSWERS)]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(folder: Path, rows: list[Any] | None = None, model: Any = None, **options: Any) -> Any:
    """Filter rows, written to `data.jsonl`, to `out.jsonl` and `report.jsonl`."""
    if rows is not None:
        write(folder / "data.jsonl", rows)
    found, words = language_model()
    options = {"batch_size": 2, "report": folder / "report.jsonl", "progress": False, **options}
    return filter_records(folder / "data.jsonl", folder / "out.jsonl", model or found, words, **options)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def kept_lines(folder: Path) -> list[int]:
    return [row["line"] for row in read(folder / "report.jsonl") if row["kept"]]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_records_of_lowest_perplexity_are_kept(tmp_path: Path, batch_size: int) -> None:
    summary = run(tmp_path, RECORDS, keep=0.3, batch_size=batch_size)
    values = [one.value for one in compute_perplexities(*language_model(), ANSWERS)]
    expected = select_lowest(values, 0.3).tolist()
    assert len(expected) == summary.kept == 6
    assert summary.dropped == {"perplexity": 14}
    assert kept_lines(tmp_path) == [index + 1 for index in expected]
    for index, row in zip(expected, read(tmp_path / "out.jsonl"), strict=True):
        scores = row.pop("filter_scores")
        assert row == RECORDS[index]
        assert scores["perplexity"] == pytest.approx(values[index], rel=1e-5)
        assert scores["tokens"] == len(language_model()[1](ANSWERS[index])["input_ids"]) - 1
    assert summary.max_perplexity == pytest.approx(max(values[index] for index in expected), rel=1e-5)
    assert [row["perplexity"] for row in read(tmp_path / "report.jsonl")] == pytest.approx(values, rel=1e-5)


def test_a_fifth_is_kept_by_default(tmp_path: Path) -> None:
    assert run(tmp_path, RECORDS).kept == 4


def test_an_absolute_limit(tmp_path: Path) -> None:
    values = sorted(row["perplexity"] for row in read_report(tmp_path, keep=1))
    assert run(tmp_path, max_perplexity=values[6]).kept == 7
    assert run(tmp_path, max_perplexity=1).kept == 0


def read_report(folder: Path, **options: Any) -> list[dict[str, Any]]:
    run(folder, RECORDS, **options)
    return read(folder / "report.jsonl")


def test_all_turns_can_be_scored(tmp_path: Path) -> None:
    texts = [scored_text(open_record(row), "all") for row in RECORDS]
    expected = [one.value for one in compute_perplexities(*language_model(), texts)]
    assert [row["perplexity"] for row in read_report(tmp_path, text="all")] == pytest.approx(expected, rel=1e-5)


LINES = [
    '{"image":"a.png", "n": 1.50, "messages": [{"role":"user","content":"\\u00fc?"},'
    '{"role":"assistant","content":"a cat"}]}\n',
    '  {"id": "7", "images": [], "conversations": [{"from": "gpt", "value": "two cats"}], "e": 1E5 }\r\n',
    "\n",
    '{"filter_scores" : {"old": 1.0, "tokens": 9}, "messages": [{"role": "assistant", "content": "ü }"}], "z": {}}',
]


def test_no_other_character_changes(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(b"\xef\xbb\xbf" + "".join(LINES).encode())
    assert run(tmp_path, keep=1).kept == 3
    texts = [json.dumps({"old": 1.0, **row["filter_scores"]}) for row in read(tmp_path / "out.jsonl")]
    first, second, third = (tmp_path / "out.jsonl").read_bytes().decode().splitlines(keepends=True)
    new = [text.replace('"old": 1.0, ', "") for text in texts]
    assert first == LINES[0].replace("]}\n", f'], "filter_scores": {new[0]}}}\n')
    assert second == LINES[1].replace(" }\r\n", f' , "filter_scores": {new[1]}}}\r\n')
    assert third == LINES[3].replace('{"old": 1.0, "tokens": 9}', texts[2]) + "\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{ }", '{ "filter_scores": {"a": 1}}\n'),
        (
            '{"filter\\u005fscores": {} , "b": {"filter_scores": {}}}',
            '{"filter\\u005fscores": {"a": 1} , "b": {"filter_scores": {}}}\n',
        ),
        ('{"b": {"filter_scores": {}}}', '{"b": {"filter_scores": {}}, "filter_scores": {"a": 1}}\n'),
    ],
)
def test_scores_get_their_place_in_a_line(line: str, expected: str) -> None:
    assert _line_with_scores(line, json.loads(line), {"a": 1}) == expected
    assert _line_with_scores(line, json.loads(line), {}) == f"{line}\n"


def test_training_reads_the_output_and_keeps_the_scores(tmp_path: Path) -> None:
    run(tmp_path, [*RECORDS, {"id": 1, "conversations": [{"from": "gpt", "value": "two cats"}]}], keep=1)
    lines = read_records(tmp_path / "out.jsonl").lines
    assert len(lines) == 21
    assert [line.scores for line in lines] == [row["filter_scores"] for row in read(tmp_path / "out.jsonl")]
    write(tmp_path / "bad.jsonl", [{**RECORDS[0], "filter_scores": [1]}])
    with pytest.raises(RecordError, match="line 1: filter_scores: Expected an object, got list."):
        read_records(tmp_path / "bad.jsonl")


def test_the_output_can_be_filtered_again(tmp_path: Path) -> None:
    run(tmp_path, RECORDS, keep=1)
    (tmp_path / "out.jsonl").rename(tmp_path / "data.jsonl")
    (tmp_path / "out.jsonl.perplexity.jsonl").unlink()
    run(tmp_path, model=Knowing({}), drop_answerable=True)
    assert {tuple(row["filter_scores"]) for row in read(tmp_path / "out.jsonl")} == {
        ("perplexity", "tokens", "answers")
    }


@pytest.mark.parametrize("policy", ["drop", "keep"])
def test_records_without_text(tmp_path: Path, policy: str) -> None:
    rows = [asked("What?", ""), *RECORDS[:4], asked("Where?", {"box": [1, 2, 3, 4]}), asked("What?", "x")]
    summary = run(tmp_path, rows, keep=0.5, on_empty=policy)
    assert summary.empty == 3
    assert summary.notes == [f"line {line}: The text has no token to score." for line in (1, 6, 7)]
    assert summary.kept == (5 if policy == "keep" else 2)
    assert summary.dropped == ({"perplexity": 2} if policy == "keep" else {"perplexity": 2, "empty": 3})
    empty = [row for row in read(tmp_path / "report.jsonl") if row["perplexity"] is None]
    assert [row["line"] for row in empty] == [1, 6, 7]
    assert all(row["kept"] == (policy == "keep") and row["tokens"] == 0 for row in empty)


def test_invalid_records_stop_the_run_before_any_is_scored(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"data.jsonl, line 3: messages: Tuple should have at least"):
        run(tmp_path, [RECORDS[0], "\n", {"messages": []}])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl"]


def test_invalid_records_can_be_skipped(tmp_path: Path) -> None:
    rows = [RECORDS[0], "{\n", {"messages": []}, RECORDS[1], "[" * 100_000 + "\n"]
    summary = run(tmp_path, rows, on_error="skip", keep=1)
    assert (summary.kept, summary.dropped) == (2, {"invalid": 3})
    assert [note.partition(":")[0] for note in summary.notes] == ["line 2", "line 3", "line 5"]
    report = read(tmp_path / "report.jsonl")
    assert report[1]["error"].startswith("Not valid JSON")
    assert [row.get("reason") for row in report] == [None, "invalid", "invalid", None, "invalid"]
    with pytest.raises(RecordError, match="expected at least one valid record, got none"):
        run(tmp_path, ["{\n"], on_error="skip", restart=True)


def test_texts_that_are_too_long_are_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model()[0].config, "max_position_embeddings", 40)
    rows = [RECORDS[0], asked("What?", "0" * 41)]
    with pytest.raises(RecordError, match="line 2: The text has 41 tokens, more than the 40"):
        run(tmp_path, rows)
    assert run(tmp_path, rows, max_length=40, keep=1).kept == 2


KNOWN = {"What is number 1?": "it is a blue cat", "What is number 2?": "a dog", "Its colour?": "Red", "it": "a cat"}


def test_records_that_need_no_image_are_dropped(tmp_path: Path) -> None:
    two = asked("What is it?", "A cat.")
    two["messages"] = two["messages"] + [{"role": "user", "content": "Its colour?"}]
    rows = [
        *RECORDS[:3],
        {**two, "messages": two["messages"] + [{"role": "assistant", "content": "red."}]},
        {**two, "messages": two["messages"] + [{"role": "assistant", "content": "blue"}]},
        asked("What is it?", "A cat.", None),
        asked("What is it?", {"label": "a cat", "box": [1, 2, 3, 4]}),
    ]
    model = Knowing(KNOWN)
    summary = run(tmp_path, rows, model, drop_answerable=True)
    report = read(tmp_path / "report.jsonl")
    assert [row.get("reason") for row in report] == [None, "answerable", None, "answerable", None, None, None]
    assert [row.get("answers") for row in report] == [
        ["zzz"], ["it is a blue cat"], ["a dog"], ["a cat", "Red"], ["a cat", "Red"], None, None,
    ]  # fmt: skip
    assert (summary.kept, summary.dropped, summary.max_perplexity) == (5, {"answerable": 2}, None)
    assert len(model.prompts) == 7
    assert [row.get("filter_scores", {}).get("answers") for row in read(tmp_path / "out.jsonl")] == [
        ["zzz"], ["a dog"], ["a cat", "Red"], None, None,
    ]  # fmt: skip


def test_only_records_of_low_perplexity_are_asked(tmp_path: Path) -> None:
    model = Knowing({"What": "nothing"})
    summary = run(tmp_path, RECORDS, model, keep=0.25, drop_answerable=True)
    assert summary.kept == len(model.prompts) == 5
    assert [set(row["filter_scores"]) for row in read(tmp_path / "out.jsonl")] == [
        {"perplexity", "tokens", "answers"}
    ] * 5


KILLED = """
import os, sys
from pathlib import Path
from tests.training.filtering.test_filter_records import run
from vlparts.journal import Journal
add, left = Journal.add, int(sys.argv[2])
def counted(self, row):
    global left
    if not left:
        self._file.write('{"line": [1, ')
        self._file.flush()
        os._exit(77)
    left -= 1
    add(self, row)
Journal.add = counted
run(Path(sys.argv[1]), keep=0.5, drop_answerable=True, max_new_tokens=3)
"""


CUT: dict[str, Any] = {"keep": 0.5, "drop_answerable": True, "max_new_tokens": 3}  # 10 and 5 batches


def assert_continues(cut: Path, whole: Path, batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run in `cut`, which has finished some batches, computes the others and ends as a whole one."""
    calls: list[int] = []
    for name in ("score_batch", "answer_batch"):
        original = getattr(sys.modules["vlparts.training.filtering.passes"], name)
        monkeypatch.setattr(
            f"vlparts.training.filtering.passes.{name}",
            lambda *args, original=original: calls.append(1) or original(*args),
        )
    assert not (cut / "out.jsonl").exists()
    run(cut, RECORDS, **CUT)
    assert len(calls) == 15 - batches
    run(whole, RECORDS, **CUT)
    for name in ("out.jsonl", "report.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("batches", [0, 4, 10, 14])
def test_an_interrupted_run_continues_at_its_batch(
    tmp_path: Path, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [None] * batches
    add = Journal.add
    for name in ("cut", "whole"):
        (tmp_path / name).mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", lambda self, row: left.pop() or add(self, row))
        with pytest.raises(IndexError):
            run(tmp_path / "cut", RECORDS, **CUT)
    assert_continues(tmp_path / "cut", tmp_path / "whole", batches, monkeypatch)


def test_a_killed_run_continues_at_its_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed within a line of the journal of answers."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    write(cut / "data.jsonl", RECORDS)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, cut, "12"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 77, done.stderr
    assert_continues(cut, whole, 12, monkeypatch)


def test_other_thresholds_use_the_same_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, RECORDS, keep=0.5)
    monkeypatch.setattr("vlparts.training.filtering.passes.score_batch", None)
    assert run(tmp_path, keep=0.25).kept == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "all"}, "text: 'assistant', now 'all'"),
        ({"batch_size": 3}, "batch_size: 2, now 3"),
        ({"max_length": 30}, "max_length: None, now 30"),
        ({"settings": {"model": "b"}}, "model: 'a', now 'b'"),
        ({"settings": {}}, "model: 'a', now None"),
    ],
)
def test_results_of_other_settings_are_not_mixed(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    run(tmp_path, RECORDS, settings={"model": "a"})
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(ValueError, match="has results of a run with other settings") as caught:
        run(tmp_path, **{"settings": {"model": "a"}, **changes})
    assert message in str(caught.value)
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert run(tmp_path, **{"settings": {"model": "a"}, **changes}, restart=True).kept == 4


def test_other_records_or_other_questions_are_not_mixed(tmp_path: Path) -> None:
    run(tmp_path, RECORDS, keep=0.5, drop_answerable=True, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"perplexity.jsonl has results of a run with other settings \(data: "):
        run(tmp_path, RECORDS[1:], keep=0.5)
    with pytest.raises(ValueError, match=r"answers.jsonl has results .* \(keep: 0.5, now 0.6\)"):
        run(tmp_path, RECORDS, keep=0.6, drop_answerable=True, max_new_tokens=2)


def test_files_that_are_no_journals(tmp_path: Path) -> None:
    for content, message in (('{"a": 1}\n', "must be the journal of an earlier run"), ("a\n", "line 1 is not a line")):
        (tmp_path / "out.jsonl.perplexity.jsonl").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            run(tmp_path, RECORDS)
        assert (tmp_path / "out.jsonl.perplexity.jsonl").read_text(encoding="utf-8") == content


def test_a_model_without_numbers_is_an_error_of_the_line(tmp_path: Path) -> None:
    class Broken(Knowing):
        def __call__(self, **inputs: Any) -> Any:
            output = self.model(**inputs)
            output.logits = output.logits * float("nan")
            return output

    with pytest.raises(ValueError, match=r"data.jsonl, line \d+: `model` must give a finite perplexity, got nan."):
        run(tmp_path, RECORDS, Broken({}))
    assert not (tmp_path / "out.jsonl").exists()


def test_a_question_that_the_template_refuses_is_an_error_of_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_model()[1], "chat_template", "{{ raise_exception('no') }}")
    with pytest.raises(RecordError, match=r"data.jsonl, line 1: The chat template cannot render the question: no"):
        run(tmp_path, RECORDS, drop_answerable=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 2}, "`keep` must be a number above 0 and at most 1, got 2"),
        ({"keep": 0.2, "max_perplexity": 5}, "Only one of `keep` and `max_perplexity` may be given"),
        ({"max_perplexity": 0.5}, "`max_perplexity` must be a finite number of at least 1, got 0.5"),
        ({"max_perplexity": float("inf")}, "`max_perplexity` must be a finite number"),
        ({"text": "user"}, "`text` must be one of assistant, all, got 'user'"),
        ({"on_empty": "skip"}, "`on_empty` must be one of drop, keep, got 'skip'"),
        ({"on_error": "drop"}, "`on_error` must be one of raise, skip, got 'drop'"),
        ({"batch_size": 0}, "`batch_size` must be an integer of at least 1, got 0"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be an integer of at least 1, got 0"),
        ({"report": "data.jsonl"}, "`report` must be a file of its own, got data.jsonl, which is data"),
        ({"report": "out.jsonl"}, "`report` must be a file of its own, got out.jsonl, which is output"),
        ({"report": "none/report.jsonl"}, "`report` must be a file in an existing folder"),
    ],
)
def test_invalid_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(Path(), RECORDS, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_paths_that_do_not_fit(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", RECORDS)
    with pytest.raises(ValueError, match="`output` must be a file of its own, got .*, which is data"):
        filter_records(data, data, *language_model())
    with pytest.raises(ValueError, match="`data` must be a JSON Lines file, got none.jsonl"):
        filter_records("none.jsonl", tmp_path / "out.jsonl", *language_model())
