"""Requests per second of vLLM on CPU against `generate` in batches, with the same model and the same requests.

`python -m tests.serving.measure PYTHON`: PYTHON is the interpreter of vLLM's environment. The model has new weights,
and every answer the same length. Both sides get as many threads as there are cores. Prints a table in Markdown, with
the load of the machine.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

REQUESTS, NEW_TOKENS = 32, 32
BATCHES = (1, 8)
SIDES = (112, 224)
QUESTION = "Which colours?"


def make(folder: Path) -> None:
    """Save a model of 30 million parameters, its processor and the requests."""
    from transformers import Qwen3Config

    from vlparts import NaViTConfig, NaViTImageProcessor, compose, compose_processor
    from vlparts.training.tokenizer import train_tokenizer

    tokenizer = train_tokenizer([QUESTION, "user\n", "assistant\n"])
    widths = {"hidden_size": 256, "intermediate_size": 1024}
    vision = NaViTConfig(
        **widths, num_hidden_layers=6, num_attention_heads=4, patch_size=14, spatial_merge_size=2, pooling="none"
    )
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    text = Qwen3Config(**sizes, **heads, vocab_size=len(tokenizer), max_position_embeddings=1024)
    model = compose(vision, text).eval()
    area = {"shortest_edge": 28 * 28, "longest_edge": 224 * 224}
    processor = compose_processor(model, tokenizer, NaViTImageProcessor(patch_size=14, merge_size=2, size=area))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    rng, prompts = random.Random(0), []
    for index in range(REQUESTS):
        colour = tuple(rng.randrange(256) for _ in range(3))
        Image.new("RGB", (rng.randint(*SIDES), rng.randint(*SIDES)), colour).save(folder / f"{index}.png")
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        chat = [{"role": "user", "content": content}]
        prompts.append(processor.apply_chat_template(chat, add_generation_prompt=True))
    (folder / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")


def read(folder: Path) -> tuple[list[str], list[Image.Image]]:
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    return prompts, [Image.open(folder / f"{index}.png").convert("RGB") for index in range(len(prompts))]


def time_generate(folder: Path, batch: int) -> dict[str, Any]:
    """Seconds of `generate`, with those of the processor, and the tokens."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import vlparts  # noqa: F401

    prompts, images = read(folder)
    started = time.perf_counter()
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    ready = time.perf_counter() - started
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}

    def answer(first: int) -> list[list[int]]:
        part = slice(first, first + batch)
        single = [[image] for image in images[part]]
        inputs = processor(text=prompts[part], images=single, padding=True, return_tensors="pt")
        with torch.no_grad():
            return model.generate(**inputs, **options)[:, -NEW_TOKENS:].tolist()

    answer(0)
    started = time.perf_counter()
    tokens = [row for first in range(0, REQUESTS, batch) for row in answer(first)]
    return {"ready": ready, "seconds": time.perf_counter() - started, "tokens": tokens}


def time_vllm(folder: Path, batch: int) -> dict[str, Any]:
    """Seconds of vLLM, which gets all requests at once and runs at most `batch` of them, and the tokens."""
    started = time.perf_counter()
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(folder),
        trust_remote_code=True,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=batch,
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        enforce_eager=True,
        limit_mm_per_prompt={"image": 1},
    )
    ready = time.perf_counter() - started
    prompts, images = read(folder)
    requests = [
        {"prompt": prompt, "multi_modal_data": {"image": image}} for prompt, image in zip(prompts, images, strict=True)
    ]
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, ignore_eos=True)
    engine.generate(requests[:batch], sampling, use_tqdm=False)
    started = time.perf_counter()
    made = engine.generate(requests, sampling, use_tqdm=False)
    seconds = time.perf_counter() - started
    return {"ready": ready, "seconds": seconds, "tokens": [list(one.outputs[0].token_ids) for one in made]}


def run(python: str, way: str, folder: Path, batch: int) -> dict[str, Any]:
    """Run one side in a process of its own."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV") if way == "vllm" else ()
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment.update(
        HF_HUB_OFFLINE="1",
        HF_MODULES_CACHE=str(folder / "modules"),
        OMP_NUM_THREADS=str(os.cpu_count()),
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_NO_USAGE_STATS="1",
    )
    path = folder / "result.json"
    command = [python, "-P", __file__, "--way", way, "--folder", str(folder), "--batch", str(batch), python]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python", help="interpreter of vLLM's environment")
    parser.add_argument("--way", choices=("generate", "vllm"), help="measure one side in this process")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--batch", type=int)
    options = parser.parse_args()
    if options.way:
        measure = time_generate if options.way == "generate" else time_vllm
        found = measure(options.folder, options.batch)
        (options.folder / "result.json").write_text(json.dumps(found), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch))
        print("| way | at most at a time | ready after s | requests per s | tokens per s | same tokens | load |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        expected = None
        for batch in BATCHES:
            for way, python in (("generate", sys.executable), ("vllm", options.python)):
                found = run(python, way, Path(scratch), batch)
                expected = expected or found["tokens"]
                same = sum(mine == theirs for mine, theirs in zip(found["tokens"], expected, strict=True))
                rate = REQUESTS / found["seconds"]
                cells = [way, batch, f"{found['ready']:.0f}", f"{rate:.2f}", f"{rate * NEW_TOKENS:.0f}"]
                cells += [f"{same}/{REQUESTS}", f"{os.getloadavg()[0]:.1f}"]
                print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
