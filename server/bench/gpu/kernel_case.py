"""A kernel beside its formula in float64 and beside what its bytes would take at best: one case, and how it is judged.

    poison ─ work ─ deviation from float64, in tolerances (≤ 1 passes; 0 for what must agree to the bit)
           └ work, many times ─→ seconds ─→ bytes moved per second ─→ share of the ceiling

Outputs that a kernel allocates come from memory filled with NaN, so that what it leaves out shows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from server.bench.gpu.models import DIM, HEADS, ORDERS
from server.models.config import ModelConfig

BITS = "to the bit"


@dataclass(frozen=True, slots=True)
class Sizes:
    """What cases are sized by: a model, T tokens of a step, B sequences of C tokens of context each, cached rows."""

    model: ModelConfig
    dtype: torch.dtype
    tokens: int
    sequences: int
    context: int
    device: torch.device
    generator: torch.Generator
    cache_bytes: int = 1 << 20

    @property
    def memory_width(self) -> int:
        return len(ORDERS) * HEADS * DIM

    @property
    def rounding(self) -> float:
        """Of one value rounded once, relative, with room for the fp32 sums before: one unit in the last place."""
        return 2.0**-8 if self.dtype == torch.bfloat16 else 1e-5

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        made = torch.randn(*shape, generator=self.generator, device=self.device)
        return made.to(dtype or self.dtype)

    def integers(self, most: int, *shape: int) -> Tensor:
        return torch.randint(0, most, shape, generator=self.generator, device=self.device)


@dataclass(frozen=True, slots=True)
class Case:
    """`work` may change its inputs: `fresh` puts them back. `deviation()` follows one `work` after `fresh`.

    `tolerance`: with its reason. `moved`: bytes read and written at least. `ceiling`: the bandwidth it is set beside,
    over `of` bytes where that bandwidth does not count all that is moved.
    """

    fresh: Callable[[], object]
    work: Callable[[], object]
    deviation: Callable[[], float]
    tolerance: str
    moved: int
    ceiling: str = "copy"
    of: int = 0

    @property
    def ideal_bytes(self) -> int:
        return self.of or self.moved

    @property
    def limit(self) -> float:
        return 0.0 if self.tolerance.startswith(BITS) else 1.0


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch hands out uninitialised holds NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # operators without a deterministic form are used all the same
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


def judged(case: Case) -> float:
    """The deviation of one run on poisoned memory."""
    with poisoned():
        case.fresh()
        case.work()
    return case.deviation()


def off(got: Tensor, expected: Tensor, rtol: float, atol: float) -> float:
    """The largest |got - expected| over atol + rtol · |expected|; infinite where one of them is NaN."""
    error = (got.double() - expected).abs() / (atol + rtol * expected.abs())
    return float(error.nan_to_num(nan=float("inf")).max())


def different(got: Tensor, expected: Tensor) -> float:
    """How many values differ in their bits."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    return float((got.contiguous().view(words) != expected.contiguous().view(words)).sum())


def paged_table(sizes: Sizes, block_size: int) -> Tensor:
    """block_table[B, N]: every sequence has blocks of its own, scattered; block 0 is nobody's."""
    pages = -(-sizes.context // block_size)
    order = torch.randperm(sizes.sequences * pages, generator=sizes.generator, device=sizes.device) + 1
    return order.view(sizes.sequences, pages)
