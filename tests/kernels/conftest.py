"""Kernels run through Triton's interpreter (`tests/conftest.py` asks for it), or compiled where there is a GPU; those
in C, in `cpu/`, as they are.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.language import interpreting
from tests.kernels.on_device import launched

COMPILED = torch.cuda.is_available() and not interpreting


def missing() -> str | None:
    """Why kernels cannot be interpreted here; None if they can."""
    try:
        import triton
    except ImportError:
        return "Triton is not installed; pip install 'engram-server[gpu]'"
    if COMPILED:
        return None
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


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    """On a GPU, the kernels that a test is given as parameters run there."""
    if COMPILED and hasattr(pyfuncitem, "callspec"):
        for name, given in pyfuncitem.callspec.params.items():
            pyfuncitem.funcargs[name] = on_gpu(given)


def on_gpu(given: object) -> object:
    if isinstance(given, tuple):
        return tuple(on_gpu(each) for each in given)
    return launched(given, "cuda") if callable(given) and not isinstance(given, type) else given
