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
from server.runtime import runner as runner_module
from server.runtime.engine import Engine


class StepTimers:
    """Seconds by part since the start, and the number of steps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.steps = 0

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - begun

        return wrapper

    def milliseconds(self) -> dict[str, float]:
        """Per step: matmul, attention, elementwise, sampling, scheduling (and batch building), total."""
        s = self.seconds
        per_step = 1e3 / max(self.steps, 1)
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
    linears = [m for m in model.modules() if isinstance(m, (Linear, PackedLinear))]
    for linear in linears:
        linear.forward = timers.timed("matmul", linear.forward)  # type: ignore[method-assign]
    attention_forward, sample = runner.attention.forward, runner_module.sample
    runner.attention.forward = timers.timed("attention", attention_forward)  # type: ignore[method-assign]
    model.forward = timers.timed("forward", model.forward)  # type: ignore[method-assign]
    model.logits = timers.timed("logits", model.logits)  # type: ignore[method-assign]
    runner_module.sample = timers.timed("sampling", sample)
    step = timers.timed("step", engine.step)

    def counted() -> Any:
        timers.steps += 1
        return step()

    engine.step = counted  # type: ignore[method-assign]
    try:
        yield timers
    finally:
        for holder, name in [(model, "forward"), (model, "logits"), (engine, "step"), (runner.attention, "forward")]:
            delattr(holder, name)
        for linear in linears:
            del linear.forward
        runner_module.sample = sample
