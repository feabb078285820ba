"""Packs per second, time to the first pack and memory of a stream, against data that is measured before.

    PYTHONPATH=. python tests/benchmarks/bench_streaming.py --records 200000 --packs 500 --workers 2

Each side is a process of its own with an empty cache, which opens a JSON Lines file of records with small images and
takes packs from a DataLoader. Memory is the largest resident memory of the process plus that of one worker.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.utils.data import DataLoader

CAPACITY = 4096
WORDS = ("where", "is", "the", "small", "red", "cat", "under", "a", "table", "and", "what", "colour", "has", "it")


def write(folder: Path, count: int) -> Path:
    """A JSON Lines file of records, and the images that they share."""
    from tests.tiny import picture

    for index in range(64):
        picture(160 + 16 * (index % 8), 120 + 8 * (index // 8), seed=index).save(folder / f"{index}.jpg")
    words = random.Random(0)
    path = folder / "data.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for index in range(count):
            question, answer = (" ".join(words.choices(WORDS, k=words.randrange(5, 60))) for _ in range(2))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"image": f"{index % 64}.jpg", "messages": turns}) + "\n")
    return path


def loader(side: str, path: Path, workers: int) -> DataLoader[Any]:
    """The packs of a side."""
    from tests.training.making import processor_for

    from vlparts.training.dataset import PackSampler, SampleDataset
    from vlparts.training.encoding import SampleEncoder
    from vlparts.training.sources import open_source
    from vlparts.training.stream import PackStream
    from vlparts.training.stream_source import StreamSource

    encoder = SampleEncoder(processor_for(), path.parent, max_length=CAPACITY)
    if side == "stream":
        source = StreamSource(open_source(path, streaming=True), encoder, seed=0)
        stream = PackStream([source], CAPACITY)
        return DataLoader(stream, batch_size=None, num_workers=workers, collate_fn=lambda pack: pack.samples)
    data = SampleDataset(open_source(path), encoder, progress=False)
    sampler = PackSampler(data.lengths, CAPACITY)
    return DataLoader(data, batch_size=None, sampler=sampler, num_workers=workers, collate_fn=lambda pack: pack)


def endless(packs: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from packs


def measure(side: str, path: Path, packs: int, workers: int) -> dict[str, float]:
    """Seconds to the first pack, packs and tokens per second after it, and memory in MiB."""
    import vlparts.training.train  # noqa: F401  # not measured

    start = time.perf_counter()
    found = endless(loader(side, path, workers))
    next(found)
    first = time.perf_counter()
    tokens = sum(len(sample) for _ in range(packs) for sample in next(found))
    seconds = time.perf_counter() - first
    del found
    memory = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    )
    return {
        "seconds to the first pack": first - start,
        "packs per second": packs / seconds,
        "tokens per second": tokens / seconds,
        "tokens per pack": tokens / packs,
        "MiB": memory / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--packs", type=int, default=500)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--side", choices=("stream", "measured"))
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options.data, options.packs, options.workers)))
        return
    with TemporaryDirectory() as folder:
        path = write(Path(folder), options.records)
        for side in ("stream", "measured"):
            numbers = ["--packs", str(options.packs), "--workers", str(options.workers)]
            done = subprocess.run(
                [sys.executable, __file__, "--side", side, "--data", str(path), *numbers],
                env={**os.environ, "HF_DATASETS_CACHE": f"{folder}/{side}"},
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            found = json.loads(done.stdout.splitlines()[-1])
            print(f"{side}: " + ", ".join(f"{value:.4g} {name}" for name, value in found.items()))


if __name__ == "__main__":
    main()
