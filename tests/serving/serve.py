"""Serves a folder of `models.py` with vLLM and compares its answers with those of `generate`.

Runs in the environment of vLLM, where vlparts is not installed: `python -m tests.serving.serve FOLDER RESULTS
SETTINGS`. SETTINGS is JSON, by name: `engine`, arguments of `vllm.LLM`; `answers`, the answers of `expected.json` to
compare with; `ways`, some methods of `Engine`, or "stream" alone for `vllm serve`. RESULTS gets for each setting the
seconds until the engine was ready, the number of tokens of prompts from its cache, and a row for each request and way;
or an error.
"""

import argparse
import gc
import importlib.util
import json
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.serving.http_requests import TOP, Answer, stream, with_files, with_images
from tests.serving.vllm_process import running_server

LIMITS = {"max_model_len": 512, "max_num_seqs": 8, "seed": 0}
NEW_TOKENS = 12
Record = dict[str, Any]


def engine_options(records: list[Record], options: dict[str, Any]) -> dict[str, Any]:
    limits = {kind: max(len(record[f"{kind}s"]) for record in records) for kind in ("image", "video")}
    given = {kind: limit for kind, limit in limits.items() if limit}
    return {**LIMITS, "trust_remote_code": True, "limit_mm_per_prompt": given, **options["engine"]}


def prompt_of(record: Record, folder: Path) -> dict[str, Any]:
    """The request as text with placeholders, and the media."""
    media: dict[str, list] = {"image": [Image.open(folder / name) for name in record["images"]]}
    media["video"] = [
        np.stack([np.asarray(Image.open(folder / name)) for name in names]) for names in record["videos"]
    ]
    return {"prompt": record["prompt"], "multi_modal_data": {kind: items for kind, items in media.items() if items}}


class Engine:
    """`vllm.LLM`, and the ways to give it requests."""

    def __init__(self, folder: Path, records: list[Record], options: dict[str, Any]) -> None:
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest

        self.folder = folder
        self.engine = LLM(model=str(folder), **engine_options(records, options))
        self.sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, logprobs=TOP)
        self.adapter = (
            LoRARequest("adapter", 1, str(folder / "adapter")) if "enable_lora" in options["engine"] else None
        )
        self.cached_tokens = 0

    def batch(self, records: list[Record]) -> list[Answer]:
        prompts = [prompt_of(record, self.folder) for record in records]
        made = self.engine.generate(prompts, self.sampling, use_tqdm=False, lora_request=self.adapter)
        return [self.read(one) for one in made]

    def alone(self, records: list[Record]) -> list[Answer]:
        return [self.batch([record])[0] for record in records]

    def chat(self, records: list[Record]) -> list[Answer]:
        conversations = []
        for record in records:
            images = [Image.open(self.folder / name) for name in record["images"]]
            blocks = [{"type": "image_pil", "image_pil": image} for image in images]
            conversations.append(with_images(record["conversation"], blocks))
        made = self.engine.chat(conversations, self.sampling, use_tqdm=False, lora_request=self.adapter)
        return [self.read(one) for one in made]

    def read(self, made: Any) -> Answer:
        self.cached_tokens += made.num_cached_tokens or 0
        tokens = list(made.outputs[0].token_ids)
        logprobs = [{token: one.logprob for token, one in step.items()} for step in made.outputs[0].logprobs]
        return tokens, logprobs, len(made.prompt_token_ids)


def compare(way: str, record: Record, expected: Record, found: Answer) -> dict[str, Any]:
    """Compare an answer with that of `generate`; tokens between which `generate` is undecided are the same."""
    tokens, logprobs, prompt_tokens = found
    gap, tied = 0.0, False
    for token, mine, wanted, theirs in zip(tokens, logprobs, expected["tokens"], expected["logprobs"], strict=False):
        gap = max([gap, *(abs(value - theirs[str(one)]) for one, value in mine.items() if str(one) in theirs)])
        if token != wanted:
            tied = theirs.get(str(token)) == theirs[str(wanted)]
            break
    return {
        "way": way,
        "request": record["name"],
        "same": (tied or tokens == expected["tokens"]) and prompt_tokens == expected["prompt_tokens"],
        "gap": gap,
        "found": {"tokens": tokens, "prompt_tokens": prompt_tokens},
        "expected": {"tokens": expected["tokens"], "prompt_tokens": expected["prompt_tokens"]},
    }


def run(folder: Path, records: list[Record], options: dict[str, Any]) -> dict[str, Any]:
    """Ask in all ways of a setting."""
    rows: list[dict[str, Any]] = []

    def add(way: str, asked: list[Record], answers: list[Answer]) -> None:
        for record, answer in zip(asked, answers, strict=True):
            rows.append(compare(way, record, record["answers"][options["answers"]], answer))

    as_files = [record for record in records if not record["videos"]]  # a conversation takes videos as encoded files
    started, cached = time.perf_counter(), 0
    if options["ways"] == ["stream"]:
        with running_server(folder, engine_options(records, options)) as client:
            ready = time.perf_counter() - started
            for record in as_files:
                messages = with_files(record["conversation"], [folder / name for name in record["images"]])
                add("stream", [record], [stream(client, messages, NEW_TOKENS)])
    else:
        engine = Engine(folder, records, options)
        ready = time.perf_counter() - started
        for way in options["ways"]:
            asked = as_files if way == "chat" else records
            add(way, asked, getattr(engine, way)(asked))
        cached = engine.cached_tokens
    return {"ready_s": ready, "cached_tokens": cached, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("settings", type=json.loads)
    given = parser.parse_args()
    if importlib.util.find_spec("vlparts") is not None:
        raise SystemExit("vlparts is installed here; the folder's own code would not be used.")
    from vllm.distributed import cleanup_dist_env_and_memory

    records = json.loads((given.folder / "expected.json").read_text(encoding="utf-8"))
    results: dict[str, dict[str, Any]] = {}
    for name, options in given.settings.items():
        try:
            results[name] = run(given.folder, records, options)
        except Exception:
            results[name] = {"error": traceback.format_exc().splitlines()[-12:], "rows": []}
        given.results.write_text(json.dumps(results), encoding="utf-8")
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
