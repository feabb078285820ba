"""Records per second and memory of the pass over all records before training, against encoding each of them.

    python tests/benchmarks/bench_prepass.py --records 1000000 --num-proc 2

The records have a question, an answer and one of a few image files. Start 1 measures them, start 2 finds the cache of
start 1. Each start is a process of its own, which also plans the packs. The old way is a loop that encodes records.
Memory is the largest sum over the processes of a start (private memory and their share of common memory), from which
that of a start with 1,000 records is subtracted.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

IMAGES = 64
WORDS = "where is the small red cat under a table near the window and what colour has it"


def write(folder: Path, count: int) -> Path:
    """A JSON Lines file of records, and the images that they share."""
    from tests.tiny import picture

    folder.mkdir(parents=True, exist_ok=True)
    for index in range(IMAGES):
        picture(160 + 16 * (index % 8), 120 + 8 * (index // 8), seed=index).save(folder / f"{index}.jpg")
    words = random.Random(0)
    path = folder / f"{count}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for index in range(count):
            question, answer = (" ".join(words.choices(WORDS.split(), k=words.randrange(5, 60))) for _ in range(2))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"image": f"{index % IMAGES}.jpg", "messages": turns}) + "\n")
    return path


def encoder(folder: Path) -> Any:
    """The encoder of a small composed model."""
    from tests.training.making import processor_for

    from vlparts.training.encoding import SampleEncoder
    from vlparts.training.tokenizer import train_tokenizer

    # Its tokens are whole words, as those of large vocabularies are.
    words = train_tokenizer([f"{WORDS} {WORDS}", "user\n", "assistant\n"])
    return SampleEncoder(processor_for(words=words), folder, max_length=4096)


def start(path: Path, num_proc: int | None) -> dict[str, float]:
    """What `vlparts train` does before the first step, without a model: seconds of its parts."""
    from vlparts.training.dataset import PackSampler, SampleDataset
    from vlparts.training.sources import open_source

    made = encoder(path.parent)
    times = [time.perf_counter()]
    source = open_source(path)
    times.append(time.perf_counter())
    data = SampleDataset(source, made, progress=False, num_proc=num_proc)
    times.append(time.perf_counter())
    sampler = PackSampler(data.lengths, 4096)
    times.append(time.perf_counter())
    for _ in sampler:
        break
    times.append(time.perf_counter())
    names = ("index", "measure", "plan", "epoch")
    return {name: after - before for name, before, after in zip(names, times, times[1:], strict=False)}


def encode_all(path: Path) -> float:
    """Seconds of the old way."""
    from vlparts.training.records import read_records

    made = encoder(path.parent)
    begin = time.perf_counter()
    for line in read_records(path).lines:
        made(line.record, line.number)
    return time.perf_counter() - begin


def watched(arguments: list[str]) -> tuple[dict[str, float], float]:
    """The output of a start in a process of its own, and the largest memory of the process and its children in MiB."""
    process = subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True)
    root, largest = psutil.Process(process.pid), 0
    while process.poll() is None:
        total = 0
        for one in [root, *root.children(recursive=True)] if root.is_running() else []:
            try:
                total += one.memory_full_info().pss
            except psutil.Error:  # it ended meanwhile
                continue
        largest = max(largest, total)
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(process.returncode)
    assert process.stdout is not None
    return json.loads(process.stdout.read().splitlines()[-1]), largest / 2**20


def main() -> None:
    """Run the benchmark, or one start in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--num-proc", type=int, default=2)
    parser.add_argument("--old", type=int, default=2_000, help="Records of the old way.")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.start is not None:
        print(json.dumps(start(given.start, given.num_proc)))
        return
    with TemporaryDirectory() as scratch:
        os.environ["HF_DATASETS_CACHE"] = str(Path(scratch) / "cache")
        paths = {count: write(Path(scratch) / "data", count) for count in (1_000, given.old, given.records)}
        options = ["--num-proc", str(given.num_proc), "--start"]
        _, small = watched([*options, str(paths[1_000])])
        for number in (1, 2):
            times, memory = watched([*options, str(paths[given.records])])
            rate = given.records / (times["index"] + times["measure"])
            parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in times.items())
            print(f"start {number}: {rate:,.0f} records/s, {memory - small:.0f} MiB more than 1,000 records ({parts})")
        print(f"old way: {given.old / encode_all(paths[given.old]):,.0f} records/s in one process")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
