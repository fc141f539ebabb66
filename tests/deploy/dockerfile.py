"""A Dockerfile's stages and instructions, read well enough for ours: no heredocs, no escapes but line ends."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Stage:
    """`lines`: (instruction, arguments), parents' not included."""

    name: str
    parent: str
    lines: list[tuple[str, str]] = field(default_factory=list)


def stages(path: Path) -> dict[str, Stage]:
    text = re.sub(r"^\s*#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, Stage] = {}
    for line in text.splitlines():
        instruction, _, arguments = line.strip().partition(" ")
        if instruction == "FROM":
            parent, _, name = arguments.partition(" AS ")
            stage = found[name] = Stage(name, parent)
        elif instruction and found:
            stage.lines.append((instruction, arguments.strip()))
    return found


def chain(all_stages: dict[str, Stage], name: str) -> list[tuple[str, str]]:
    """The instructions of a stage after those of all it stands on."""
    stage = all_stages[name]
    return (chain(all_stages, stage.parent) if stage.parent in all_stages else []) + stage.lines
