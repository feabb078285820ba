"""Greedy model soups: models are added to the mean as long as its score does not fall."""

import math
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...journal import Journal, folder_state
from .averaging import check_output, write_mean
from .comparison import check_folders

__all__ = ["GreedySoup", "Trial", "command_evaluator", "greedy_soup"]

_Members = tuple[int, ...]  # positions in the list of folders
PLACE = "{folder}"
"""Placeholder for the folder of the model in a command."""


@dataclass(frozen=True)
class Trial:
    """A model or soup that was evaluated.

    Args:
        folders: The folders whose mean it is.
        score: Its score.
        kept: Whether its last folder is in the soup from then on.
    """

    folders: tuple[str, ...]
    score: float
    kept: bool


@dataclass(frozen=True)
class GreedySoup:
    """A greedy soup.

    Args:
        folders: The folders whose mean it is, in the order in which they were added.
        score: Its score.
        trials: Everything that was evaluated: single models from the best to the worst, then soups in order.
        not_copied: Files of the best model's folder that were not copied, see [`average_folders`].
    """

    folders: tuple[str, ...]
    score: float
    trials: tuple[Trial, ...]
    not_copied: tuple[str, ...] = ()


def greedy_soup(
    folders: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    evaluate: Callable[[Path], float],
    *,
    lower_is_better: bool = False,
    settings: dict[str, Any] | None = None,
    restart: bool = False,
    on_score: Callable[[tuple[str, ...], float], None] | None = None,
) -> GreedySoup:
    """Write the greedy soup of models as a folder (arXiv 2203.05482, recipe 1).

    Every model is evaluated. The soup is the best one at first; then, from the second best to the worst, a model is
    added if the mean of the soup and the model has a score that is not worse than the soup's. Models with equal scores
    are taken in the order given.

    Scores are kept in `output`.work, from which an interrupted run continues, and which is deleted at the end. A mean
    is written there, evaluated and deleted. `soup.json` in the output has all scores.

    Args:
        folders: Local folders of the same model, see [`check_folders`].
        output: A new or empty folder, written as by [`average_folders`]; the other files are those of the best model.
        evaluate: Returns the score of the model in a folder, such as the accuracy on held-out data.
        lower_is_better: Whether a lower score is better.
        settings: What scores depend on besides the folders, as JSON data, such as the command.
        restart: Discard the scores of an earlier run.
        on_score: Called with the folders of each model or soup and its score, also if it was known.

    Returns:
        The soup, and all scores.

    Raises:
        ValueError: If `folders` do not fit together, a score is not a finite number, `output` has files, or
            `output`.work has scores of other settings or other files.
    """
    check_output(output)
    stored = check_folders(folders)
    names = [str(folder) for folder in folders]
    work = _work_folder(Path(output))
    known = {"folders": [folder_state(one.folder) for one in stored], **(settings or {})}
    with Journal(work / "scores.jsonl", known, restart=restart) as journal:
        scores = {tuple(row["members"]): float(row["score"]) for row in journal.rows()}

        def score_of(members: _Members) -> float:
            if members not in scores:
                scores[members] = _evaluate([stored[member] for member in members], work / "mean", evaluate)
                journal.add({"members": members, "score": scores[members]})
            if on_score is not None:
                on_score(tuple(names[member] for member in members), scores[members])
            return scores[members]

        soup, score, trials = _add_greedily(len(names), score_of, lower_is_better)
    named = [Trial(tuple(names[member] for member in one), value, kept) for one, value, kept in trials]
    chosen = tuple(names[member] for member in soup)
    recipe = {
        "recipe": "greedy",
        **(settings or {}),
        "lower_is_better": lower_is_better,
        "folders": chosen,
        "score": score,
        "trials": [asdict(trial) for trial in named],
    }
    left = write_mean([stored[member] for member in soup], [1 / len(soup)] * len(soup), Path(output), recipe)
    shutil.rmtree(work)
    return GreedySoup(chosen, score, tuple(named), tuple(left))


def _add_greedily(
    count: int, score_of: Callable[[_Members], float], lower_is_better: bool
) -> tuple[_Members, float, list[tuple[_Members, float, bool]]]:
    """The members of the greedy soup, its score, and everything that was tried with score and outcome."""
    sign = -1 if lower_is_better else 1
    singles = {index: score_of((index,)) for index in range(count)}
    ranked = sorted(singles, key=lambda index: -sign * singles[index])
    best = singles[ranked[0]]
    soup: _Members = (ranked[0],)
    trials: list[tuple[_Members, float, bool]] = [((index,), singles[index], index == ranked[0]) for index in ranked]
    for index in ranked[1:]:
        trial = (*soup, index)
        score = score_of(trial)
        kept = sign * score >= sign * best
        trials.append((trial, score, kept))
        if kept:
            soup, best = trial, score
    return soup, best, trials


def _work_folder(output: Path) -> Path:
    work = output.with_name(f"{output.name}.work")
    if work.exists() and not (work / "scores.jsonl").is_file():
        raise ValueError(f"`output`: {work} must not exist, or be that of an earlier run.")
    work.mkdir(parents=True, exist_ok=True)
    return work


def _evaluate(members: Sequence[Any], mean: Path, evaluate: Callable[[Path], float]) -> float:
    folder = members[0].folder
    if len(members) > 1:
        shutil.rmtree(mean, ignore_errors=True)
        write_mean(members, [1 / len(members)] * len(members), mean, {"recipe": "mean"})
        folder = mean
    score = evaluate(folder.resolve())
    shutil.rmtree(mean, ignore_errors=True)
    if not isinstance(score, (int, float)) or isinstance(score, bool) or not math.isfinite(score):
        raise ValueError(f"`evaluate` must return a finite number, got {score!r} for {folder}.")
    return float(score)


def command_evaluator(command: str) -> Callable[[Path], float]:
    """Return a function that scores a folder by a command, which prints the score as its last line.

    The command is run without a shell: it is split as a shell does, without expansions. What it writes to the standard
    error is shown.

    Args:
        command: A command with `{folder}` at the place of the folder, such as `python score.py {folder} --quick`.

    Returns:
        A function for [`greedy_soup`]. It raises ValueError with the command if it cannot be run, fails, or prints no
        number.

    Raises:
        ValueError: If the command has no `{folder}`, or quotes that do not end.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"`evaluate` must be a command, got {command!r}: {error}.") from None
    if not any(PLACE in word for word in words):
        raise ValueError(f"`evaluate` must be a command with {PLACE}, got {command!r}.")

    def evaluate(folder: Path) -> float:
        arguments = [word.replace(PLACE, str(folder)) for word in words]
        shown = shlex.join(arguments)
        try:
            done = subprocess.run(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
        except OSError as error:
            raise ValueError(f"The command `{shown}` cannot be run: {error}.") from error
        lines = done.stdout.decode(errors="replace").strip().splitlines()
        last = lines[-1].strip() if lines else ""
        if done.returncode:
            raise ValueError(
                f"The command `{shown}` failed with exit code {done.returncode}; last line: {last!r:.200}."
            )
        try:
            return float(last)
        except ValueError:
            raise ValueError(
                f"The command `{shown}` must print a number as its last line, got {last!r:.200}."
            ) from None

    return evaluate
