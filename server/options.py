"""What several verbs of the command line share: argument types, and how lists of numbers are written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.errors import SettingsError
from server.settings import FIELDS

ModelArgument = Annotated[str, typer.Argument(help=FIELDS["model"].metadata["help"])]
ModelOption = Annotated[str, typer.Option(help=FIELDS["model"].metadata["help"])]
JsonFile = Annotated[Path | None, typer.Option("--json", help="write the figures to this file")]


def numbers(flag: str, text: str) -> tuple[int, ...]:
    """(1, 15) from "1,15". Raises SettingsError."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise SettingsError(f"{flag} is {text!r}; write whole numbers with commas between, such as 1,15") from None
