"""Exit of commands on invalid input: the message without a traceback, and exit code 2."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text

__all__ = ["exit_on_value_error"]


@contextmanager
def exit_on_value_error() -> Iterator[None]:
    """Print a ValueError as `error: message` to standard error and exit with code 2."""
    try:
        yield
    except ValueError as error:
        message = Text.assemble(("error: ", "bold red"), str(error))
        Console(stderr=True).print(message, soft_wrap=True, highlight=False)
        raise typer.Exit(2) from None
