"""Tests that need a GPU, with kernels compiled: TRITON_INTERPRET=0 in the environment, since tests set it otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernels import language


def missing() -> str | None:
    """Why nothing can be tested here; None if it can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not language.available or language.interpreting:
        return "kernels are not compiled here; install Triton and set TRITON_INTERPRET=0"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    for item in items:
        if Path(__file__).parent in item.path.parents and reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
