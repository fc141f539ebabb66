"""The rooms' rule: imports run one way, and what a room must not know it never loads."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import server.api

ROOT = Path(__file__).parents[1]
ORDER = ("kernels", "cache", "memory", "models", "runtime", "api")  # each may import those before it
ON_TOP = ("bench", "training", "commands", "loadtest", "cli", "options", "__main__")
GROUND = (
    "errors",
    "settings",
    "metrics",
    "view",
    "batch",
    "logs",
    "json_text",
    "",
)  # "" is the package itself: its version
FOREIGN = {"fastapi", "starlette", "uvicorn", "pydantic", "locust", "transformers"}
MODULES = sorted(p for room in ("server", "kernels", "loadtest") for p in (ROOT / room).rglob("*.py"))


def room_of(module: str) -> str:
    """`server.cache.hot_rows` → cache, `kernels.gate` → kernels, `server.settings` → settings."""
    parts = module.split(".")
    return parts[0] if parts[0] != "server" else (parts[1] if len(parts) > 1 else "")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """Absolute names of all imports in a file, those inside functions included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; rooms are named in full"
            # `from server import cache` names a room by its alias, `from server.cache import x` by its module
            found |= {f"server.{a.name}" for a in node.names} if node.module == "server" else {str(node.module)}
    return found


def ours(imports: set[str]) -> set[str]:
    rooms = {room_of(name) for name in imports if name.split(".")[0] in ("server", "kernels", "loadtest")}
    return {room for room in rooms if not room.startswith("__version")}


def allowed(room: str) -> set[str]:
    if room in GROUND:
        return set(GROUND)
    if room in ORDER:
        return {*GROUND, *ORDER[: ORDER.index(room) + 1]}
    return {*GROUND, *ORDER, *ON_TOP}


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_a_room_imports_only_what_lies_below(path: Path) -> None:
    room = room_of(module_of(path))
    assert room in {*GROUND, *ORDER, *ON_TOP}, f"{path} stands in no known room"
    assert ours(imports_of(path)) <= allowed(room)


@pytest.mark.parametrize("path", [p for p in MODULES if room_of(module_of(p)) in {*GROUND, *ORDER[:-1]}], ids=module_of)
def test_nothing_at_runtime_and_below_knows_the_web_or_transformers(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports_of(path)} & FOREIGN


def loaded_by(*modules: str) -> set[str]:
    """Top-level packages in sys.modules of a fresh interpreter that imported these modules."""
    code = f"import sys, {', '.join(modules)}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_api_process_loads_no_torch() -> None:
    modules = [module.name for module in pkgutil.walk_packages(server.api.__path__, "server.api.")]
    assert "torch" not in loaded_by("server.api", "server.runtime.client", "server.runtime.messages", *modules)


def test_the_engine_process_loads_no_web_framework() -> None:
    loaded = loaded_by("server.runtime.process")
    assert "torch" in loaded
    assert not loaded & FOREIGN


def test_the_command_line_loads_no_verb() -> None:
    assert not loaded_by("server.cli") & {"torch", "numpy", "yaml", *FOREIGN}
