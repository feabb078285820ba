"""A Python environment with everything that this one has, but for one package.

For showing that a checkpoint needs nothing of ours: what its own folder does not hold cannot be imported there.
"""

import os
import site
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path


def environment_without(folder: Path, package: str = "vlparts") -> Path:
    """Make a virtual environment that holds links to the installed packages, but for those named like `package`.

    Args:
        folder: Where the environment goes.
        package: What to leave out: every entry of the site-packages folders whose name contains it.

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
    """Run a script in such an environment, isolated from this process' paths and from the network.

    Args:
        python: What [`environment_without`] returned.
        script: The script, or its text after "-c".
        *arguments: Arguments of the script.
        modules_cache: Folder for the code that transformers copies out of checkpoints.
        timeout: Seconds after which to give up.

    Returns:
        What the script printed.

    Raises:
        RuntimeError: If it failed or took too long; with its error output.
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
        raise RuntimeError(f"{python} did not end within {timeout} seconds:\n{_text(error.stderr)}") from None
    if done.returncode:
        raise RuntimeError(f"{python} ended with status {done.returncode}:\n{done.stderr}")
    return done.stdout


def _text(output: bytes | str | None) -> str:
    """What a process had written when it was stopped: bytes whatever was asked for, and None for nothing."""
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""
