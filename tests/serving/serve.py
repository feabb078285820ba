"""Serves a folder of `models.py` with vLLM and compares its answers with those of `generate`.

Runs in the environment of vLLM, where vlparts is not installed: `python -P serve.py FOLDER RESULTS SETTINGS`. SETTINGS
is JSON, by name: `engine`, arguments of `vllm.LLM`; `answers`, the answers of `expected.json` to compare with; `ways`,
some methods of `Engine`, or "stream" alone for the OpenAI-compatible server. RESULTS gets for each setting the seconds
until the engine was ready, the number of tokens of prompts from its cache, and a row for each request and way; or an
error.
"""

import argparse
import base64
import gc
import importlib.util
import json
import mimetypes
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

LIMITS = {"max_model_len": 512, "max_num_seqs": 8, "seed": 0}
SERVER_TIMEOUT = 900  # seconds; a busy machine takes minutes
NEW_TOKENS = 12
TOP = 5
Record = dict[str, Any]
# Tokens, the log-probabilities of the likeliest tokens of each step, and the number of tokens of the prompt.
Answer = tuple[list[int], list[dict[int, float]], int]


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


def with_images(record: Record, blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The request as a conversation, in which these blocks take the places of the images."""
    rest = iter(blocks)
    return [
        {**turn, "content": [next(rest) if block["type"] == "image" else block for block in turn["content"]]}
        for turn in record["conversation"]
    ]


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
            conversations.append(with_images(record, [{"type": "image_pil", "image_pil": image} for image in images]))
        made = self.engine.chat(conversations, self.sampling, use_tqdm=False, lora_request=self.adapter)
        return [self.read(one) for one in made]

    def read(self, made: Any) -> Answer:
        self.cached_tokens += made.num_cached_tokens or 0
        tokens = list(made.outputs[0].token_ids)
        logprobs = [{token: one.logprob for token, one in step.items()} for step in made.outputs[0].logprobs]
        return tokens, logprobs, len(made.prompt_token_ids)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def running_server(folder: Path, options: dict[str, Any]) -> Iterator[Any]:
    """Start vLLM's OpenAI-compatible server and yield a client of it."""
    from openai import APIConnectionError, OpenAI

    port = free_port()
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "served"]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        command += [flag] if value is True else [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    server = subprocess.Popen(command)
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        deadline = time.monotonic() + SERVER_TIMEOUT
        while True:
            try:
                client.models.list()
                break
            except APIConnectionError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("The server did not start.") from None
                time.sleep(0.5)
        yield client
    finally:
        server.terminate()
        server.wait()


def stream(client: Any, folder: Path, record: Record) -> Answer:
    """Ask the server, with images as data URLs, and collect the answer from the stream."""
    urls = []
    for name in record["images"]:
        data = base64.b64encode((folder / name).read_bytes()).decode()
        urls.append(f"data:{mimetypes.guess_type(name)[0]};base64,{data}")
    messages = with_images(record, [{"type": "image_url", "image_url": {"url": url}} for url in urls])
    events = client.chat.completions.create(
        model="served",
        messages=messages,
        temperature=0.0,
        max_completion_tokens=NEW_TOKENS,
        logprobs=True,
        top_logprobs=TOP,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_token_ids": True, "return_tokens_as_token_ids": True},
    )
    tokens: list[int] = []
    logprobs: list[dict[int, float]] = []
    prompt_tokens = 0
    for event in events:
        for choice in event.choices:
            tokens += getattr(choice, "token_ids", None) or []
            if choice.logprobs is not None and choice.logprobs.content:
                steps = [step.top_logprobs for step in choice.logprobs.content]
                logprobs += [{int(one.token.removeprefix("token_id:")): one.logprob for one in step} for step in steps]
        if event.usage is not None:
            prompt_tokens = event.usage.prompt_tokens
    return tokens, logprobs, prompt_tokens


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
            add("stream", as_files, [stream(client, folder, record) for record in as_files])
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
