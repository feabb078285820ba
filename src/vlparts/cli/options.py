"""Options that several commands have: where and how a model is loaded."""

from typing import Annotated

import typer

__all__ = ["DType", "Device", "TrustRemoteCode"]

Device = Annotated[str | None, typer.Option(help="Device, such as cuda; by default an accelerator if any.")]
DType = Annotated[str, typer.Option(help="Type of the weights, such as bfloat16; auto for that of the files.")]
TrustRemoteCode = Annotated[bool, typer.Option(help="Run code that is in the folder of the model.")]
