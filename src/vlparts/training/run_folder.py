"""The folder of a training run: whether it can be written to, and the checkpoint in it to resume from."""

import json
import logging
import os
import re
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from .config import TrainConfig

__all__ = ["check_output", "find_checkpoint"]

logger = logging.getLogger(__name__)


def check_output(output: Path) -> None:
    """Raise ValueError unless it is a folder that can be written to, or can be made one. Nothing is made here."""
    existing = next(one for one in (output, *output.parents, Path("/")) if os.path.lexists(one))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        reason = "cannot be written to" if existing.is_dir() else "is no folder"
        raise ValueError(
            f"`output` must be a folder, or a path where one can be made, got {str(output)!r}, where {existing} "
            f"{reason}."
        )


def find_checkpoint(config: TrainConfig) -> Path | None:
    """The last complete checkpoint in `output` if `resume` is on and there is one, otherwise None.

    Unfinished checkpoints are logged as a warning and not used.

    Raises:
        ValueError: If there are checkpoints and `resume` is off, or none and it is on.
    """
    names = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in config.output.glob("checkpoint-*"))
    found = {int(match[1]): path for match, path in names if match}
    if not config.resume:
        if found:
            raise ValueError(f"`output` {config.output} contains checkpoints; set `resume`, or choose another folder.")
        return None
    if not found:
        raise ValueError(f"`output` {config.output} contains no checkpoint to resume from.")
    complete = [step for step, path in found.items() if _is_complete(path)]
    unfinished = ", ".join(found[step].name for step in sorted(found.keys() - set(complete)))
    start = f"The run resumes from {found[max(complete)].name}" if complete else "The run starts from the beginning"
    if unfinished:
        logger.warning("`output` %s contains unfinished checkpoints: %s. %s.", config.output, unfinished, start)
    return found[max(complete)] if complete else None


def _is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has a complete state of the Trainer, which is written last."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return True
