"""DeepSeek-OCR at full size, on random weights in the published layout: loading and generation, ours and native.

`python tests/benchmarks/full_deepseek_ocr.py make FOLDER` writes 6.7 GB. `load FOLDER RESULTS` loads the model, and
`run FOLDER RESULTS --mode base --side ours` generates 32 tokens for an image in a mode; `--side native` does the same
with transformers' `UnlimitedOcr`, which reads the same folder, with a window longer than the context. Each appends one
line of JSON to RESULTS, and a cell that is there already is not measured again, so every call is one process and a
stopped series continues. `show RESULTS` prints the tables.

The time to the first token is that of `generate` from pixels, with the encoder; images are prepared before. Rates are
those of the 31 tokens after it. The logits of the first token are kept beside RESULTS and compared.
"""

import argparse
import json
import math
import os
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timing import machine_line, print_table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, UnlimitedOcrConfig, UnlimitedOcrForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from vlparts import DeepEncoderConfig, MoGEConfig, VisionLanguageConfig, VisionLanguageForConditionalGeneration
from vlparts.checkpoints.deepseek_ocr import model_from_deepseek_ocr, processor_from_deepseek_ocr
from vlparts.checkpoints.deepseek_ocr.config import IMAGE_TOKEN_ID, published_config
from vlparts.checkpoints.deepseek_ocr.names import get_slices
from vlparts.moe import set_experts_implementation

MODES = ("tiny", "small", "base", "large", "gundam")
SIDES = ("ours", "native")
SPECIAL = {"<s>": 0, "</s>": 1, "<image>": IMAGE_TOKEN_ID, "<td>": 128821, "</td>": 128822}
FILE = "model-00001-of-000001.safetensors"
WINDOW = 4096  # tokens of the native window, more than any prompt here
NEW_TOKENS = 32


def make(folder: Path) -> None:
    """Write config.json, a tokenizer with 129,280 words, and one file of weights, tensor by tensor."""
    folder.mkdir()
    config = VisionLanguageConfig(
        vision_config=DeepEncoderConfig.from_preset("deepseek_ocr", clip_patch_embedding=14),
        text_config=MoGEConfig.from_preset("deepseek_ocr"),
        projector_type="deepseek_ocr",
        image_token_id=IMAGE_TOKEN_ID,
    )
    with torch.device("meta"):
        model = VisionLanguageForConditionalGeneration(config)
    own = model.state_dict()
    shapes = {name: tuple(part.of(own).shape) for name, part in get_slices(model).items()}
    (folder / "config.json").write_text(json.dumps(published_config(config)), encoding="utf-8")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(shapes, FILE)}), encoding="utf-8"
    )
    write_weights(folder / FILE, shapes)
    words = {f"w{index}": index for index in range(config.text_config.vocab_size)}
    words = {word: index for word, index in words.items() if index not in SPECIAL.values()} | SPECIAL
    made = Tokenizer(models.WordLevel(words, unk_token="w2"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="w2", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>", "<td>", "</td>"]})
    tokenizer.save_pretrained(folder)


def write_weights(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write random bfloat16 tensors such that activations are of order one, with one tensor in memory at a time.

    Their values are parts of one table of normal numbers, since drawing three billion takes minutes.
    """
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(2**24 + 129_280 * 1280, generator=generator)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            first = int(torch.randint(2**24, (), generator=generator))
            values = table[first : first + math.prod(shape)]
            if len(shape) == 1:
                values = 0.02 * values + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
            elif "embed_tokens" not in name:
                values = values * math.prod(shape[1:]) ** -0.5
            file.write(values.bfloat16().view(torch.int16).numpy().tobytes())


def native_config(folder: Path) -> UnlimitedOcrConfig:
    """The native configuration, whose defaults are the published sizes, with attention to the whole context."""
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return UnlimitedOcrConfig(
        text_config={"sliding_window": WINDOW, "max_position_embeddings": fields["max_position_embeddings"]},
        image_token_id=IMAGE_TOKEN_ID,
    )


def load_model(folder: Path, side: str, experts: str) -> Any:
    """The model of a side; "default" keeps the implementation of experts that transformers chooses."""
    if side == "ours":
        model: Any = model_from_deepseek_ocr(folder)
    else:
        model = UnlimitedOcrForConditionalGeneration.from_pretrained(
            folder, config=native_config(folder), dtype=torch.bfloat16
        ).eval()
    if experts != "default":
        set_experts_implementation(model, experts)
    return model


class Memory:
    """Samples this process's memory every 5 ms: all of it, and without pages of files, which the system can drop."""

    def __init__(self) -> None:
        self.peak = self.peak_anonymous = 0.0
        self._running = True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, float]:
        """The peaks in GB."""
        self._running = False
        self._thread.join()
        return {"peak_gb": self.peak, "peak_without_files_gb": self.peak_anonymous}

    def _watch(self) -> None:
        while self._running:
            lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
            fields = dict(line.split(":", 1) for line in lines)
            size, anonymous = (int(fields[name].split()[0]) * 1024 / 1e9 for name in ("VmRSS", "RssAnon"))
            self.peak, self.peak_anonymous = max(self.peak, size), max(self.peak_anonymous, anonymous)
            time.sleep(0.005)


def load(folder: Path, side: str, experts: str) -> dict[str, Any]:
    """Seconds and memory of loading, from the disk (the system's copy of the file is dropped) and again."""
    with (folder / FILE).open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    memory, begin = Memory(), time.perf_counter()
    model = load_model(folder, side, experts)
    seconds = time.perf_counter() - begin
    peaks = memory.stop()
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) / 1e9
    del model
    begin = time.perf_counter()
    load_model(folder, side, experts)
    return {"seconds": seconds, "seconds_cached": time.perf_counter() - begin, "model_gb": size, **peaks}


class Clock(BaseStreamer):
    """Times at which tokens arrive; the first call holds the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Record the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing."""


def inputs_of(folder: Path, mode: str, side: str) -> dict[str, Any]:
    """The inputs for an image of noise, which is 2 x 3 tiles (rows x columns) in mode "gundam"."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (615, 909, 3), generator=generator, dtype=torch.uint8)
    processor = processor_from_deepseek_ocr(folder, mode=mode)
    inputs = dict(
        processor(images=[[Image.fromarray(pixels.numpy())]], text=["<image> Free OCR"], return_tensors="pt")
    )
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    if side == "ours":
        return inputs
    grids = inputs.pop("image_grid_thw")
    views = [
        patches.view(int(rows), int(columns), 3, 16, 16).permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2)
        for patches, (_, rows, columns) in zip(
            inputs.pop("pixel_values").split(grids.prod(1).tolist()), grids, strict=True
        )
    ]
    tiles = inputs.pop("image_tile_grid", None)
    native = {name: inputs[name] for name in ("input_ids", "attention_mask")} | {"pixel_values": views[-1][None]}
    if len(views) > 1:
        native["pixel_values_local"] = torch.stack(views[:-1])
        native["num_local_patches"] = [len(views) - 1]
        native["patches_grid"] = [tiles[0].flip(0).tolist()]
    return native


@torch.inference_mode()
def run(folder: Path, mode: str, side: str, experts: str, logits_file: Path) -> dict[str, Any]:
    """Time to the first token, and tokens per second after it."""
    model = load_model(folder, side, experts)
    inputs = inputs_of(folder, mode, side)
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    options |= {"no_repeat_ngram_size": 30, "no_repeat_ngram_window_size": 90, "suppress_tokens": [IMAGE_TOKEN_ID]}
    if side == "native":
        for name, value in options.items():
            setattr(model.generation_config, name, value)
        options = {}
    clock, memory, begin = Clock(), Memory(), time.perf_counter()
    outputs = model.generate(**inputs, **options, streamer=clock, output_logits=True, return_dict_in_generate=True)
    assert len(clock.times) == NEW_TOKENS + 1, clock.times
    torch.save(outputs.logits[0].float(), logits_file)
    prompt = inputs["input_ids"].shape[1]
    return {
        "first_token": clock.times[1] - begin,
        "tokens_per_second": (NEW_TOKENS - 1) / (clock.times[-1] - clock.times[1]),
        "prompt": prompt,
        "tokens": outputs.sequences[0, prompt : prompt + 4].tolist(),
        **memory.stop(),
    }


def show(results: Path) -> None:
    """Print the tables."""
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if row["command"] == "load":
            print(row)
    header = ["mode", "prompt", *(f"{side}, {what}" for side in SIDES for what in ("first token, s", "tokens/s"))]
    table = []
    for mode in MODES:
        found = {row["side"]: row for row in rows if row["command"] == "run" and row["mode"] == mode}
        if len(found) == len(SIDES):
            logits = [torch.load(logits_path(results, mode, side)) for side in SIDES]
            error = (logits[0] - logits[1]).square().mean().sqrt() / logits[1].square().mean().sqrt()
            figures = [found[side][name] for side in SIDES for name in ("first_token", "tokens_per_second")]
            table.append([mode, found["ours"]["prompt"], *figures, f"{float(error):.3f}"])
    print_table([*header, "difference of logits"], table)


def logits_path(results: Path, mode: str, side: str) -> Path:
    """Where the logits of a cell's first token are kept."""
    return results.with_name(f"{results.stem}-{mode}-{side}.pt")


def main() -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["make", "load", "run", "show"])
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="the folder, then the file of results")
    parser.add_argument("--mode", default="base", choices=MODES)
    parser.add_argument("--side", default="ours", choices=SIDES)
    parser.add_argument("--experts", default="default", help="an implementation of experts")
    arguments = parser.parse_args()
    if arguments.command == "make":
        return make(arguments.paths[0])
    results = arguments.paths[-1]
    if arguments.command == "show":
        return show(results)
    cell = {"command": arguments.command, "side": arguments.side, "experts": arguments.experts}
    if arguments.command == "run":
        cell["mode"] = arguments.mode
    done = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []
    if any(cell.items() <= row.items() for row in done):
        return print("measured already:", cell)
    folder = arguments.paths[0]
    if arguments.command == "load":
        figures = load(folder, arguments.side, arguments.experts)
    else:
        figures = run(
            folder,
            arguments.mode,
            arguments.side,
            arguments.experts,
            logits_path(results, arguments.mode, arguments.side),
        )
    row = {**cell, **figures, "machine": machine_line()}
    with results.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps({**cell, **figures}))
    return None


if __name__ == "__main__":
    sys.exit(main())
