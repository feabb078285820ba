"""Run the command line: `python -m vlparts`."""

from vlparts.cli.main import main

main()
