"""The command `python -m vlparts ocr` on 100 pages: what a small model reads, its speed, and runs that are killed.

`python tests/benchmarks/bench_ocr.py WORK` trains a small model into `WORK/model`, unless it is there, draws 50 images
and a PDF of 50 pages with one to two lines of large text that it has not seen, and runs the command over them. With
`--kill` it kills further runs at random times until one ends, and compares all files of the two outputs.
`--batch-size` and `--steps` are those of the command and of the training.
"""

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from line_reader import draw_page, train
from timing import machine_line

JOURNAL = ".vlparts_ocr.jsonl"
PAGES = 50


def draw(folder: Path) -> dict[tuple[str, int], str]:
    """Draw the documents; returns the answers of a perfect model by name and page."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [draw_page(seed) for seed in range(PAGES)]
    for index, (page, _) in enumerate(images):
        page.save(folder / f"image{index:02}.png")
    report = [draw_page(PAGES + seed) for seed in range(PAGES)]
    first, *others = (page for page, _ in report)
    first.save(folder / "report.pdf", save_all=True, append_images=others, resolution=144, quality=95)
    answers = {(f"image{index:02}", 1): text for index, (_, text) in enumerate(images)}
    return answers | {("report", number): text for number, (_, text) in enumerate(report, 1)}


def start(work: Path, output: Path, batch_size: int) -> subprocess.Popen[str]:
    """Start the command."""
    command = [sys.executable, "-m", "vlparts", "ocr", str(work / "in"), "--model", str(work / "model")]
    command += ["--output", str(output), "--batch-size", str(batch_size), "--device", "cpu"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def score(output: Path, answers: dict[tuple[str, int], str]) -> str:
    """How many words, and whole texts of pages without coordinates, are right."""
    read = {}
    for line in (output / JOURNAL).read_text().splitlines():
        row = json.loads(line)
        if "answer" in row:
            read[row["document"], row["page"]] = row["answer"]

    def text(answer: str) -> str:
        return re.sub(r"<\|det\|>.*?<\|/det\|>", "", answer)

    words = [(found, word) for key in answers for found, word in _words(read[key], answers[key])]
    right = sum(text(read[key]) == text(answers[key]) for key in answers)
    return f"{sum(a == b for a, b in words)} of {len(words)} words and {right} of {len(answers)} pages are right"


def _words(read: str, truth: str) -> list[tuple[str | None, str]]:
    found, words = (re.findall(r"^(?:# )?([a-z]+)$", text, re.MULTILINE) for text in (read, truth))
    return [(found[index] if index < len(found) else None, word) for index, word in enumerate(words)]


def contents(folder: Path) -> dict[str, bytes]:
    """All files of an output."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def killed(work: Path, batch_size: int, seed: int) -> None:
    """Kill runs at random times until one ends, and compare its files with those of the run that was not killed."""
    output, chance = work / "killed", random.Random(seed)
    shutil.rmtree(output, ignore_errors=True)
    done = [0]
    while True:
        process = start(work, output, batch_size)
        while process.poll() is None and _count_done(output) == done[-1]:
            time.sleep(0.05)
        time.sleep(chance.uniform(0.0, 20.0))
        process.kill()
        message = process.communicate()[1]
        if process.returncode == 0:
            break
        done.append(_count_done(output))
    equal = contents(output) == contents(work / "whole")
    print(f"killed when {done[1:]} pages were done; all {len(contents(output))} files are equal: {equal}")
    print(message.strip())


def _count_done(output: Path) -> int:
    """Number of complete lines of pages in the journal."""
    path = output / JOURNAL
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return sum(b'"answer"' in line and line.endswith(b"\n") for line in lines)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, nargs="?", default=Path(tempfile.gettempdir()) / "bench_ocr")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--kill", action="store_true")
    arguments = parser.parse_args()
    print(machine_line())
    if not (arguments.work / "model" / "config.json").exists():
        for part in train(arguments.steps):
            part.save_pretrained(arguments.work / "model")
    answers = draw(arguments.work / "in")
    shutil.rmtree(arguments.work / "whole", ignore_errors=True)
    process = start(arguments.work, arguments.work / "whole", arguments.batch_size)
    print(process.communicate()[1].strip())
    print(score(arguments.work / "whole", answers))
    if arguments.kill:
        killed(arguments.work, arguments.batch_size, 0)


if __name__ == "__main__":
    main()
