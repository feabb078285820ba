"""How commands end where the user is to mend something: with the message alone, and exit code 2."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text

__all__ = ["mistakes"]


@contextmanager
def mistakes() -> Iterator[None]:
    """Show a ValueError as `error: message` and leave with exit code 2."""
    try:
        yield
    except ValueError as error:
        message = Text.assemble(("error: ", "bold red"), str(error))
        Console(stderr=True).print(message, soft_wrap=True, highlight=False)
        raise typer.Exit(2) from None
