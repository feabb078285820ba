"""Runs scripts in a virtual environment with the installed packages except one.

It shows that a checkpoint can be loaded where vlparts is not installed.
"""

import os
import site
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path


def environment_without(folder: Path, package: str = "vlparts") -> Path:
    """Create a virtual environment with links to the installed packages, except one.

    Args:
        folder: Folder of the environment.
        package: Every entry of the site-packages folders whose name contains this string is left out.

    Returns:
        Path of the environment's Python.
    """
    venv.EnvBuilder(with_pip=False, symlinks=os.name != "nt").create(folder)
    scheme = {"base": str(folder), "platbase": str(folder)}
    target = Path(sysconfig.get_path("purelib", "venv", vars=scheme))
    for source in dict.fromkeys([*site.getsitepackages(), site.getusersitepackages()]):
        if source not in sys.path:
            continue
        for entry in sorted(Path(source).iterdir()):
            link = target / entry.name
            if package not in entry.name and not link.exists():
                link.symlink_to(entry, target_is_directory=entry.is_dir())
    return Path(sysconfig.get_path("scripts", "venv", vars=scheme)) / ("python.exe" if os.name == "nt" else "python")


def run_without(
    python: Path,
    script: str | Path,
    *arguments: str | Path,
    modules_cache: Path,
    timeout: float | None = None,
) -> str:
    """Run a script in an isolated environment, without the paths of this process and without the network.

    Args:
        python: Path of the environment's Python, as returned by [`environment_without`].
        script: Path of a script, or source code as a string.
        *arguments: Arguments of the script.
        modules_cache: Folder for the code that transformers copies from checkpoints.
        timeout: Time limit in seconds; None for no limit.

    Returns:
        The standard output.

    Raises:
        RuntimeError: If the script fails or exceeds the time limit; with its standard error.
    """
    environment = {**os.environ, "HF_MODULES_CACHE": str(modules_cache), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    try:
        done = subprocess.run(
            [
                str(python),
                "-I",
                *([str(script)] if isinstance(script, Path) else ["-c", script]),
                *map(str, arguments),
            ],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{python} did not finish within {timeout} seconds:\n{_text(error.stderr)}") from None
    if done.returncode:
        raise RuntimeError(f"{python} exited with status {done.returncode}:\n{done.stderr}")
    return done.stdout


def _text(output: bytes | str | None) -> str:
    """Decode the output of a stopped process, which is bytes even in text mode, and None if empty."""
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""
