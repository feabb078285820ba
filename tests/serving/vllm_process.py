"""The environment of vLLM's processes, and `vllm serve` with a client.

Imported on both sides, by the tests and in the environment of vLLM.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PATIENCE = 7200  # seconds; nothing here is slow because it hangs, but a busy machine is
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; without it vLLM reserves nine tenths of the memory
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENGINE_READY_TIMEOUT_S": str(PATIENCE),
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(PATIENCE),
    "VLLM_NO_USAGE_STATS": "1",
}


def vllm_environment(scratch: Path, path: Sequence[Path] = (), *, processes: bool = False) -> dict[str, str]:
    """Return the variables of a process of vLLM.

    Args:
        scratch: Folder for the modules of transformers and the caches of vLLM.
        path: Folders of packages that vLLM's environment does not have.
        processes: Whether the engine runs in a process of its own, as it does by default.
    """
    hidden = ("PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV")
    return {
        **{name: value for name, value in os.environ.items() if name not in hidden},
        **SETTINGS,
        "HF_MODULES_CACHE": str(scratch / "modules"),
        "PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT])),  # the last for this package
        "VLLM_CACHE_ROOT": str(scratch / "cache"),
        **({} if processes else {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}),
    }


def command_line(options: dict[str, Any]) -> list[str]:
    """Arguments of `vllm.LLM` as those of `vllm serve`."""
    arguments: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            arguments += [f"--{flag}", *value]
        else:
            arguments += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return arguments


def free_port() -> int:
    """Return a port that is free now; another process may take it before it is used."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def running_server(folder: Path, options: dict[str, Any]) -> Iterator[Any]:
    """Start `vllm serve` in an environment of vLLM and yield a client, for which the model has the name "served".

    Raises:
        RuntimeError: If the server ends before it is ready.
    """
    from openai import APIConnectionError, OpenAI

    port = free_port()
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "served", *command_line(options)]
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    server = subprocess.Popen(command, env=environment)
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=PATIENCE)
    try:
        while True:
            try:
                client.models.list()
                break
            except APIConnectionError:
                if server.poll() is not None:
                    raise RuntimeError("The server did not start.") from None
                time.sleep(0.5)
        yield client
    finally:
        server.terminate()
        server.wait()
