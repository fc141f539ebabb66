"""A machine with torch, Triton, transformers and rich, and without what the API and the test suite need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
ABSENT = {
    "fastapi", "starlette", "pydantic", "pydantic_core", "uvicorn", "uvloop", "httptools", "gguf", "locust",
    "llguidance", "hypothesis", "psutil",
}  # fmt: skip

SITE = f"""
import sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {ABSENT!r} else super().find_spec(name, path, target)

sys.meta_path = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
"""


def run(
    folder: Path, *words: str, without: str = "", timeout: float = 240, **variables: str
) -> subprocess.CompletedProcess[str]:
    """`python *words` in `folder`, on such a machine; `without` one more package."""
    site = folder / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(SITE.replace("{'", f"{{'{without}', '", 1) if without else SITE)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{site}:{ROOT}", "OMP_NUM_THREADS": "1", "COLUMNS": "160", **variables}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )
