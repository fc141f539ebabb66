"""What the API knows of the attached memories: where they lie, which edits are theirs, whether facts fit them.

Read from each pack's config.json, torch-free. Knows folders; nothing of tables or of who asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.errors import Conflict, NotFound, PackError, RequestError
from server.json_text import parsed
from server.memory.identity import content_key


@dataclass(frozen=True, slots=True)
class AttachedFolder:
    """`content`: the key of its edits. `by_token`: rows are addressed by token ids, so that redirects concern it."""

    name: str
    folder: Path
    content: str
    config: dict[str, Any]

    @classmethod
    def of(cls, name: str, folder: Path) -> AttachedFolder:
        """Raises PackError for a folder without a config."""
        try:
            config = parsed((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PackError(f"{folder} is no memory pack: its config.json cannot be read: {error}") from None
        if not isinstance(config, dict):
            raise PackError(f"{folder}/config.json holds a {type(config).__name__}; a config is needed")
        return cls(name, folder.resolve(), content_key(folder), config)

    @property
    def by_token(self) -> bool:
        return self.config.get("kind") == "stem"

    @property
    def takes_facts(self) -> bool:
        paper = self.config.get("form", "paper") == "paper" and self.config.get("branches", 1) == 1
        return self.config.get("kind") == "engram" and "format_version" in self.config and paper

    def check_takes_facts(self) -> None:
        """Raises Conflict for a memory that facts cannot be taught to, or that knows nothing yet."""
        if not self.takes_facts:
            raise Conflict(
                f"memory {self.name!r} takes no facts: it is no Engram pack of the form 'paper' on one stream",
                param="memory",
            )
        if not self.config.get("trained_steps"):
            raise Conflict(
                f"memory {self.name!r} was never taught (trained_steps is 0): its rows change nothing, however they "
                f"are edited; teach it first: engram-server train",
                param="memory",
            )


class AttachedFolders:
    """By name, as the server's flags and the admin's calls attach them."""

    def __init__(self, specs: tuple[str, ...]) -> None:
        self._named: dict[str, AttachedFolder] = {}
        for spec in specs:
            given, separator, path = spec.rpartition("=")
            folder = Path(path)
            self.add(given if separator else folder.resolve().name, folder)

    def add(self, name: str, folder: Path) -> None:
        self._named[name] = AttachedFolder.of(name, folder)

    def remove(self, name: str) -> None:
        self._named.pop(name, None)

    @property
    def contents(self) -> frozenset[str]:
        return frozenset(each.content for each in self._named.values())

    def of_content(self, content: str) -> AttachedFolder | None:
        return next((each for each in self._named.values() if each.content == content), None)

    def any_by_token(self, names: tuple[str, ...] | None = None) -> bool:
        return any(each.by_token for each in self._named.values() if names is None or each.name in names)

    def choose(self, name: str | None) -> AttachedFolder:
        """The memory of this name, or the only one that takes facts. Raises NotFound, Conflict or RequestError."""
        if name is not None:
            if name not in self._named:
                raise NotFound(
                    f"no memory {name[:200]!r} is attached; there are {', '.join(self._named) or 'none'}",
                    param="memory",
                )
            return self._named[name]
        able = [each for each in self._named.values() if each.takes_facts]
        if not able:
            raise Conflict("no memory that takes facts is attached; attach an Engram pack: --memory", param="memory")
        if len(able) > 1:
            raise RequestError(
                f"several memories take facts: {', '.join(e.name for e in able)}; name one", param="memory"
            )
        return able[0]
