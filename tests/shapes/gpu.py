"""A GPU of shapes alone: CUDA tensors without values, host tensors as they are, and what a real one would mind.

    operator ─ all on the host ──────────────── computed as ever
             ├ all on the device ─────────────── its shapes, by torch's FakeTensorMode
             ├ from device to host ───────────── zeros, and a wait if it is one
             └ some here, some there ─────────── a finding
    launch   ─ of a Triton kernel ────────────── its arguments, not its work

Needs a torch that is built for CUDA, and no device. `simulated` changes torch and Triton for the whole process, so that
it belongs in one of its own. What it cannot see: values, races, time.
"""

from __future__ import annotations

import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

GPU = torch.device("cuda", 0)
ROOMS = ("/server/", "/kernels/")
aten = torch.ops.aten


def missing() -> str | None:
    """Why no device can be simulated here; None if one can."""
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    if torch.cuda.is_available():
        return "a real one is here: make gpu-test"
    return None


@dataclass(frozen=True, slots=True)
class Finding:
    """`kind`: mixed, sync, capture, host argument; `stack`: our functions, the innermost first."""

    kind: str
    what: str
    stack: tuple[str, ...]


@dataclass(slots=True)
class Told:
    """What happened: findings, how often; what was launched, by kernel and what Triton compiles it for; counts of
    captures and replays."""

    findings: Counter[Finding] = field(default_factory=Counter)
    launches: dict[tuple[str, str], int] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    capturing: bool = False

    def find(self, kind: str, what: object) -> None:
        frames = [f for f in reversed(traceback.extract_stack()) if any(room in f.filename for room in ROOMS)]
        stack = tuple(f"{f.filename.rpartition('/')[2]}:{f.lineno} {f.name}" for f in frames[:6])
        self.findings[Finding(kind, str(what)[:200], stack)] += 1

    def wait(self, what: object) -> None:
        """The host waits: never within a capture."""
        self.find("capture" if self.capturing else "sync", what)


class Simulation(TorchDispatchMode):
    """One a thread; all share `told`, the fake mode and the lock, since that mode knows one thread at a time."""

    def __init__(self, told: Told, fake: FakeTensorMode, pinned: set[int], lock: Any) -> None:
        super().__init__()
        self.told, self.fake, self.pinned, self.lock = told, fake, pinned, lock

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self.lock:
            return self._dispatch(func, args, dict(kwargs or {}))

    def _dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        flat, _ = tree_flatten((args, kwargs))
        tensors = [each for each in flat if isinstance(each, torch.Tensor)]
        device = next((each for each in flat if isinstance(each, torch.device)), None)
        to_device = device is not None and device.type == "cuda"
        if not to_device and not any(on_device(each) for each in tensors):
            return self._on_host(func, args, kwargs)
        if kwargs.get("generator") is not None:
            kwargs["generator"] = None
        if composite(func):
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        if func is aten._local_scalar_dense.default:
            self.told.wait(func)
            return torch.zeros((), dtype=args[0].dtype).item()
        if func in (aten._to_copy.default, aten.copy_.default):
            moved = self._moved(func, args, kwargs, to_device)
            if moved is not None:
                return moved
        elif any(each.dim() and not on_device(each) for each in tensors) and func is not aten.lift_fresh.default:
            self.told.find("mixed", func)
        try:
            with self.fake:
                return func(*args, **kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException):
            self.told.wait(func)
            return self._of_any_length(func, args)

    def _on_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        pinned = kwargs.pop("pin_memory", None)
        made = func(*args, **kwargs)
        if pinned:
            self.pinned.add(made.untyped_storage().data_ptr())
        return made

    def _moved(self, func: Any, args: Any, kwargs: Any, to_device: bool) -> Any:
        """A copy between host and device; None for one within the device."""
        target, source = (args[0], args[1]) if func is aten.copy_.default else (None, args[0])
        waits = not kwargs.get("non_blocking", args[2] if target is not None and len(args) > 2 else False)
        if target is not None and not on_device(target):
            if waits or not self.is_pinned(target):
                self.told.wait(func)
            return target
        if target is None and not to_device and kwargs.get("device") is not None:
            self.told.wait(func)
            return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        if on_device(source):
            return None
        if self.told.capturing and (waits or not self.is_pinned(source)):
            self.told.find("capture", func)
        if target is not None:
            torch.broadcast_shapes(source.shape, target.shape)
            return target
        with self.fake:
            return torch.empty(source.shape, dtype=kwargs.get("dtype") or source.dtype, device=GPU)

    def _of_any_length(self, func: Any, args: Any) -> Any:
        """Where values decide how many there are: none were found; a mask lets all through."""
        with self.fake:
            if func is aten.nonzero.default:
                return torch.zeros(0, args[0].dim(), dtype=torch.int64, device=GPU)
            if func is aten.index_put_.default:
                return args[0]
            assert func is aten.index.Tensor, func
            places: list[Any] = []
            for index in args[1]:
                masked = index is not None and index.dtype == torch.bool
                each = [torch.zeros(index.numel(), dtype=torch.int64, device=GPU)] * index.dim() if masked else [index]
                places += each
            return func(args[0], places)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.pinned


def on_device(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda"


def composite(func: Any) -> bool:
    """Whether the operator is made of others, which inference mode has not taken it apart into."""
    whole = (aten._to_copy.default, aten.copy_.default)
    key = "CompositeImplicitAutograd"
    return (
        func.namespace == "aten"
        and func not in whole
        and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)
    )


# ── streams, events, graphs ────────────────────────────────────────────────────────────────────────────────────────


class Stream:
    """Work on it is over at once; what matters is which one is the current."""

    device = GPU

    def __init__(self, *arguments: object, **named: object) -> None:
        self.waited: list[Any] = []

    def wait_stream(self, other: Stream) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        assert event.recorded, "waits for an event that nothing recorded"

    def record_event(self, event: Any = None) -> Any:
        event = event or SimpleNamespace(recorded=True, synchronize=lambda: None, query=lambda: True)
        event.recorded = True
        return event

    def synchronize(self) -> None:
        pass


def patch_cuda(told: Told) -> None:
    """torch.cuda, as far as the project uses it."""
    local, default, cuda = threading.local(), Stream(), torch.cuda

    def current(device: object = None) -> Stream:
        return getattr(local, "stream", default)

    def waits(*arguments: object) -> None:
        told.counts["waits"] += 1
        if told.capturing:
            told.find("capture", "a wait for the device")

    class Event:
        recorded = False

        def __init__(self, *arguments: object, **named: object) -> None:
            pass

        def record(self, stream: Stream | None = None) -> None:
            self.recorded = True

        def query(self) -> bool:
            return True

        def elapsed_time(self, later: Event) -> float:
            return 1.0

        synchronize = waits

    class CUDAGraph:
        def capture_begin(self, *arguments: object, **named: object) -> None:
            assert not told.capturing
            told.capturing, self.stream = True, current()
            told.counts["captures"] += 1

        def capture_end(self) -> None:
            assert told.capturing and current() is self.stream, "a capture ends on the stream it began on"
            told.capturing = False

        def replay(self) -> None:
            told.counts["replays"] += 1

    @contextmanager
    def on(stream: Stream | None) -> Iterator[None]:
        before, local.stream = current(), stream or current()
        yield
        local.stream = before

    @contextmanager
    def captured(graph: CUDAGraph, *arguments: object, **named: object) -> Iterator[None]:
        with on(Stream()):
            graph.capture_begin()
            yield
            graph.capture_end()

    generator = torch.Generator
    properties = dict(
        name="of shapes", multi_processor_count=132, total_memory=80 << 30, major=9, minor=0, L2_cache_size=50 << 20,
        uuid="0",
    )  # fmt: skip
    replaced: dict[str, Any] = {
        "Stream": Stream, "Event": Event, "CUDAGraph": CUDAGraph, "current_stream": current, "stream": on,
        "graph": captured, "set_stream": lambda stream: setattr(local, "stream", stream), "synchronize": waits,
        "empty_cache": lambda: None, "_lazy_init": lambda: None, "graph_pool_handle": lambda: (0, 1),
        "mem_get_info": lambda device=None: (70 << 30, 80 << 30), "current_device": lambda: 0,
        "get_device_capability": lambda device=None: (9, 0), "get_device_name": lambda device=None: "of shapes",
        "get_device_properties": lambda device=None: SimpleNamespace(**properties),
    }  # fmt: skip
    for name, value in replaced.items():
        setattr(cuda, name, value)
    torch.Generator = lambda device="cpu": generator("cpu")  # type: ignore[assignment, misc]
    torch.Tensor.record_stream = lambda tensor, stream: None  # type: ignore[method-assign]


# ── kernels ────────────────────────────────────────────────────────────────────────────────────────────────────────


def patch_kernels(told: Told, is_pinned: Any, reads_host: frozenset[str]) -> None:
    """Launches are written down. `reads_host`: arguments that may be registered host memory."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import jit

    backend = CUDABackend(GPUTarget("cuda", 90, 32))

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool = False, **named: Any) -> None:
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | named
        for name, value in given.items():
            if (
                isinstance(value, torch.Tensor)
                and not on_device(value)
                and not (name in reads_host and is_pinned(value))
            ):
                told.find("host argument", f"{kernel.__name__}.{name}")
        sizes = grid(given) if callable(grid) else grid
        assert all(size > 0 for size in sizes) and all(size < 1 << 16 for size in sizes[1:]), (kernel.__name__, sizes)
        stand_ins = {
            name: Pointer(value) if isinstance(value, torch.Tensor) else value for name, value in given.items()
        }
        binder = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
        key = kernel.__name__, repr(binder(**stand_ins)[1])
        told.launches[key] = told.launches.get(key, 0) + 1

    jit.JITFunction.run = run


class Pointer:
    """A tensor as Triton looks at it: a type and an address, here that of its offset."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype, self._address = tensor.dtype, tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self._address


@contextmanager
def simulated(reads_host: frozenset[str] = frozenset({"table", "cached", "words"})) -> Iterator[Told]:
    """Within it device 0 is one of shapes, on this thread and on those it starts."""
    told, pinned, lock = Told(), set[int](), threading.RLock()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    patch_cuda(told)
    with fake:  # lets tensors be on a device that is not there
        pass
    torch._C._set_only_lift_cpu_tensors(True)

    def mode() -> Simulation:
        return Simulation(told, fake, pinned, lock)

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        pinned.add(copy.untyped_storage().data_ptr())
        return copy

    def device_of(tensor: Any) -> torch.device:
        """Within an operator tensors are without a device, on the thread that computes it."""
        inside = tensor.fake_mode.in_kernel_invocation and lock._is_owned()  # type: ignore[attr-defined]
        return torch.device("meta") if inside else tensor.fake_device

    run = threading.Thread.run

    def run_simulated(thread: threading.Thread) -> None:
        with mode():
            run(thread)

    FakeTensor.device = property(device_of)  # type: ignore[assignment]
    torch.Tensor.pin_memory = pin  # type: ignore[method-assign, assignment]
    threading.Thread.run = run_simulated  # type: ignore[method-assign]
    with mode() as first:
        patch_kernels(told, first.is_pinned, reads_host)
        from server.cache import cuda_memory

        cuda_memory.register = lambda address, nbytes: pinned.add(address)
        cuda_memory.unregister = lambda address: None
        yield told
