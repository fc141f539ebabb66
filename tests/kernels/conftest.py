"""Kernels run through Triton's interpreter (`tests/conftest.py` asks for it); those in C, in `cpu/`, as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


def missing() -> str | None:
    """Why kernels cannot be interpreted here; None if they can."""
    try:
        import triton
    except ImportError:
        return "Triton is not installed; pip install 'engram-server[gpu]'"
    if version(triton.__version__) < (3, 7) and version(np.__version__) >= (2, 4):
        return f"the interpreter of Triton {triton.__version__} does not run with NumPy {np.__version__}"
    return None


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without this, references would be compared with themselves."""
    reason = missing()
    for item in items:
        if Path(__file__).parent in item.path.parents and Path(__file__).with_name("cpu") not in item.path.parents:
            # Triton 3.6's own, once per scalar
            item.add_marker(pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"))
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
