"""Which of several exact forms of an operation is the fastest on this processor: measured at its first use.

A measurement takes some ten milliseconds. It is kept in the user's cache folder, for this processor, version of
PyTorch and number of threads, so that later processes take the same forms and round alike. The environment variable
`VLPARTS_CALIBRATE=0` switches measurements off; PyTorch's own form is used then.
"""

import hashlib
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

VARIABLE = "VLPARTS_CALIBRATE"

# How many times as fast as PyTorch's own form another must be to be used; measurements differ by some percent.
MIN_SPEEDUP = 1.1

# Runs of each form, in turn, of which the median counts; fewer once they have taken the time, in seconds.
ROUNDS = 7
MIN_ROUNDS = 3
ROUNDS_SECONDS = 0.05
# A form this many times as slow as the fastest is run in the first rounds only: what it takes out of the cache slows
# the next one.
DROP_RATIO = 1.5

# Fields of /proc/cpuinfo that name a processor.
PROCESSOR_FIELDS = ("vendor_id", "cpu family", "model", "model name", "stepping", "cache size", "flags", "Features")

Trial = Callable[[], Any]

_chosen: dict[tuple[str, int], str] = {}
_lock = threading.RLock()  # measuring one form may need the choice for another


def fastest_form(name: str, forms: Sequence[str], make_trials: Callable[[], Mapping[str, Trial]]) -> str:
    """Return the name of the fastest form, measured before or now.

    Args:
        name: What is measured, for example "float32 layer, 4 rows".
        forms: Names of the forms, PyTorch's own first.
        make_trials: Makes a call of each form.

    Returns:
        The fastest form if it is at least [`MIN_SPEEDUP`] times as fast as the first, otherwise the first.
    """
    key = name, torch.get_num_threads()
    if key not in _chosen:
        with _lock:
            if key not in _chosen:
                _chosen[key] = _choose(name, forms, make_trials)
    return _chosen[key]


def calibrations() -> list[dict[str, Any]]:
    """Return the measurements for this processor, version of PyTorch and number of threads, by name.

    Returns:
        Per measurement: "name", "chosen" and "seconds", the time of each form.
    """
    found = [_read(path) for path in sorted(_folder().glob("*.json"))]
    return sorted((one for one in found if one), key=lambda one: str(one["name"]))


def is_switched_off() -> bool:
    """Whether `VLPARTS_CALIBRATE` is 0."""
    return os.environ.get(VARIABLE, "1") == "0"


def forget_choices() -> None:
    """Forget what this process has chosen; the files stay."""
    _chosen.clear()


def _choose(name: str, forms: Sequence[str], make_trials: Callable[[], Mapping[str, Trial]]) -> str:
    if is_switched_off():
        return forms[0]
    path = _folder() / f"{name.replace(' ', '_').replace(',', '')}.json"
    known = _read(path, forms)
    if known is not None:
        return str(known["chosen"])
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        trials = make_trials()
        seconds = _measure(trials)
        chosen = _pick(seconds, forms[0])
        if chosen != forms[0]:  # once more, since something else may have held the processor
            again = _measure({name: trials[name] for name in (forms[0], chosen)})
            seconds.update({name: min(one, seconds[name]) for name, one in again.items()})
            chosen = _pick(seconds, forms[0])
    _write(path, {"name": name, "chosen": chosen, "seconds": seconds})
    known = _read(path, forms)  # of another process, if that was earlier
    return chosen if known is None else str(known["chosen"])


def _pick(seconds: Mapping[str, float], first: str) -> str:
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] * MIN_SPEEDUP <= seconds[first] else first


def _measure(trials: Mapping[str, Trial]) -> dict[str, float]:
    """Time the forms in turn; returns the median for each, which unlike the minimum holds the price of memory."""
    for trial in trials.values():  # the first call may compile
        trial()
    times: dict[str, list[float]] = {name: [] for name in trials}
    begin = time.perf_counter()
    for turn in range(ROUNDS):
        best = min(map(statistics.median, times.values())) if turn >= MIN_ROUNDS else float("inf")
        for name, trial in trials.items():
            if turn >= MIN_ROUNDS and statistics.median(times[name]) > DROP_RATIO * best:
                continue
            start = time.perf_counter()
            trial()
            times[name].append(time.perf_counter() - start)
        if turn + 1 >= MIN_ROUNDS and time.perf_counter() - begin > ROUNDS_SECONDS:
            break
    return {name: statistics.median(found) for name, found in times.items()}


@cache
def _machine() -> str:
    """What a measurement depends on besides the number of threads, as a short digest."""
    text = [torch.__version__, torch.backends.cpu.get_cpu_capability(), *_processor()]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


def _processor() -> Iterator[str]:
    """Description of the first processor."""
    yield platform.machine()
    info = Path("/proc/cpuinfo")
    if not info.exists():
        yield platform.processor()
        return
    first = info.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    for line in first.splitlines():
        if line.partition(":")[0].strip() in PROCESSOR_FIELDS:
            yield line


def _folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "vlparts" / "cpu" / f"{_machine()}-{torch.get_num_threads()}"


def _read(path: Path, forms: Sequence[str] = ()) -> dict[str, Any] | None:
    """A measurement, of these forms if some are given; None if there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        is_sound = found["chosen"] in found["seconds"] and set(forms or found["seconds"]) == {*found["seconds"]}
        return found if is_sound and found["name"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, measurement: dict[str, Any]) -> None:
    """Write a file, whole and unless there is one; without such a folder each process measures for itself."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", encoding="utf-8") as file:
            json.dump(measurement, file)
            file.flush()
            if _read(path, list(measurement["seconds"])) is None:
                path.unlink(missing_ok=True)
                os.link(file.name, path)
    except OSError:
        return
