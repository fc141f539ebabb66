"""Where a step's time goes: matmul, attention, elementwise, sampling, scheduling, by timers set from outside.

Wraps the model's own parts while it measures and takes the wrappers off afterwards. Elementwise is what is left of
the forward pass: norms, rotary, SiLU, embedding.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from server.models.layers import Linear
from server.models.prepack import PackedLinear
from server.models.quantize import QuantizedLinear
from server.runtime.engine import Engine


class StepTimers:
    """Seconds and calls by part since the start."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - begun
                self.calls[part] += 1

        return wrapper

    def milliseconds(self) -> dict[str, float]:
        """Per step: matmul, attention, elementwise, sampling, scheduling (and batch building), total."""
        s = self.seconds
        per_step = 1e3 / max(self.calls["step"], 1)
        parts = {
            "matmul": s["matmul"],
            "attention": s["attention"],
            "elementwise": s["forward"] + s["logits"] - s["matmul"] - s["attention"],
            "sampling": s["sampling"],
            "scheduling": s["step"] - s["forward"] - s["logits"] - s["sampling"],
            "total": s["step"],
        }
        return {name: value * per_step for name, value in parts.items()}


@contextmanager
def step_timers(engine: Engine) -> Iterator[StepTimers]:
    """Times every step of `engine` inside the block."""
    timers = StepTimers()
    model, runner = engine.runner.model, engine.runner
    quantised = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    inner = {id(m.many) for m in quantised}
    linears = [m for m in model.modules() if isinstance(m, (Linear, PackedLinear)) and id(m) not in inner]
    parts: list[tuple[Any, str, str]] = [
        *((linear, "forward", "matmul") for linear in (*quantised, *linears)),
        (runner.attention, "forward", "attention"),
        (model, "forward", "forward"),
        (model, "logits", "logits"),
        (runner, "sample", "sampling"),
        (engine, "step", "step"),
    ]
    before = [(holder, dict(vars(holder))) for holder, _, _ in parts]
    for holder, name, part in parts:
        setattr(holder, name, timers.timed(part, getattr(holder, name)))
    try:
        yield timers
    finally:
        for (holder, name, _), (_, attributes) in zip(parts, before, strict=True):
            if name in attributes:
                setattr(holder, name, attributes[name])
            else:
                delattr(holder, name)
