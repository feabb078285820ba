"""Serves every composition of `models.py` with vLLM and compares its answers with those of `generate`.

`python -m tests.serving.vllm_serving PYTHON [NAME...]`: PYTHON is the interpreter of vLLM's environment. Models are
made here, with vlparts, and served there, without it, from the code in their folders. Fails if an answer or the number
of tokens of a prompt differs. `--table FILE` writes the table of the documentation.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.serving.models import COMPOSITIONS, is_made, make
from tests.serving.vllm_process import vllm_environment

ALL_WAYS = ["batch", "alone", "chat"]
CACHED = {"enable_prefix_caching": True, "block_size": 32}
EAGER = {"dtype": "float32", "enforce_eager": True}
# Each is one start of an engine: arguments of `vllm.LLM`, the answers to compare with, and the ways to ask. Those with
# `processes` run the engine in a process of its own, as vLLM does by default.
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {"engine": {**EAGER, **CACHED}, "ways": ALL_WAYS},
    "bfloat16": {"engine": {**EAGER, **CACHED, "dtype": "bfloat16"}, "answers": "bfloat16", "ways": ALL_WAYS},
    "no prefix cache": {"engine": {**EAGER, "enable_prefix_caching": False}, "ways": ["batch", "alone"]},
    "chunked prefill": {"engine": {**EAGER, "max_num_batched_tokens": 16}, "ways": ["batch", "alone"]},
    "compiled": {"engine": {"dtype": "float32"}, "ways": ["batch"]},
    "LoRA": {"engine": {**EAGER, "enable_lora": True}, "answers": "adapter", "ways": ALL_WAYS},
    "own process": {"engine": EAGER, "ways": ["batch"], "processes": True},
    "streamed": {"engine": EAGER, "ways": ["stream"], "processes": True},
}
QUICK = {"navit_qwen3": ["float32"]}


def serve(python: str, name: str, folder: Path, settings: list[str]) -> dict[str, dict[str, Any]]:
    """Run `serve.py` on a composition, once for the settings in its own process and once for the others."""
    plan = {setting: {"answers": "float32", **SETTINGS[setting]} for setting in settings}
    if "LoRA" in plan:
        plan["LoRA"] = {**plan["LoRA"], "engine": {**plan["LoRA"]["engine"], **COMPOSITIONS[name].adapter_options}}
    results: dict[str, dict[str, Any]] = {}
    for processes in (False, True):
        chosen = {setting: one for setting, one in plan.items() if one.get("processes", False) == processes}
        if chosen:
            results |= _run(python, folder, chosen, processes)
    return results


def _run(python: str, folder: Path, chosen: dict[str, dict[str, Any]], processes: bool) -> dict[str, dict[str, Any]]:
    kind = "processes" if processes else "process"
    log, path = folder / f"{kind}.log", folder / f"{kind}.json"
    path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        environment = vllm_environment(Path(scratch), processes=processes)
        command = [python, "-P", "-m", "tests.serving.serve", str(folder), str(path), json.dumps(chosen)]
        with log.open("w", encoding="utf-8") as file:
            subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False)
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
    ended = {"error": ["The process ended:", *last], "rows": []}
    return {name: found.get(name, ended) for name in chosen}


def summary(results: dict[str, Any] | None) -> str:
    """The cell of the table: how many answers are the same, and the largest gap of log-probabilities."""
    if results is None:
        return ""
    if "error" in results:
        return "failed"
    rows = results["rows"]
    return f"{sum(row['same'] for row in rows)}/{len(rows)}, {max(row['gap'] for row in rows):.0e}"


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown with a row for each composition and a column for each setting."""
    settings = [setting for setting in SETTINGS if any(setting in results for results in found.values())]
    lines = [["composition", "vision encoder", "projector", "text model", *settings]]
    for name, results in found.items():
        one = COMPOSITIONS[name]
        text = one.text.__name__.removesuffix("Config")
        parts = [name, type(one.vision()).__name__.removesuffix("Config"), f"`{one.projector}`", text]
        lines.append([*parts, *(summary(results.get(setting)) for setting in settings)])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def report(name: str, setting: str, results: dict[str, Any]) -> bool:
    """Print the outcome, and return whether everything is the same."""
    start = f", ready after {results['ready_s']:.0f} s" if "ready_s" in results else ""
    cached = f", {results['cached_tokens']} tokens from the cache" if results.get("cached_tokens") else ""
    print(f"{name}, {setting}: {summary(results)}{start}{cached}", flush=True)
    for line in results.get("error", ()):
        print(f"    {line}", flush=True)
    different = [row for row in results["rows"] if not row["same"]]
    for row in different:
        print(f"    {row['way']}, {row['request']}: {row['found']}, expected {row['expected']}", flush=True)
    return not different and "error" not in results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python", help="interpreter of vLLM's environment")
    parser.add_argument("names", nargs="*", help=f"compositions, of {', '.join(COMPOSITIONS)}; all by default")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, help="by default all")
    parser.add_argument("--quick", action="store_true", help="a selection for every change")
    parser.add_argument("--folder", type=Path, help="keeps the models, and uses those that are there")
    parser.add_argument("--table", type=Path, help="file for the table, in Markdown")
    options = parser.parse_args()
    plan = QUICK if options.quick else dict.fromkeys(options.names or COMPOSITIONS, list(SETTINGS))
    found: dict[str, dict[str, Any]] = {}
    same = True
    with tempfile.TemporaryDirectory() as scratch:
        for name, settings in plan.items():
            folder = (options.folder or Path(scratch)).resolve() / name
            settings = options.settings or settings
            kinds = {SETTINGS[setting].get("answers", "float32"): None for setting in settings}
            if not is_made(folder, kinds):
                make(name, folder, kinds)
            found[name] = serve(options.python, name, folder, settings)
            for setting, results in found[name].items():
                same = report(name, setting, results) and same
    print(table(found))
    if options.table:
        options.table.write_text(table(found), encoding="utf-8")
    if not same:
        raise SystemExit("Some answers differ.")


if __name__ == "__main__":
    main()
