"""The device measured on: whether it will do, and the report that stands beside every figure.

One clear line for each thing that is in the way: no GPU, one too old, no Triton. Knows nothing of what is measured.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from kernels import language
from server.bench.paired import machine
from server.errors import SettingsError

ROOT = Path(__file__).parents[3]
OLDEST = (8, 0)  # Ampere: bf16, and the capability that kernels are compiled for ahead of time
TRY = "to try the command without one: --device cpu --shape tiny"


def open_device(name: str) -> torch.device:
    """Raises SettingsError for a device that is not there or will not do."""
    if name == "cpu":
        return torch.device("cpu")
    there = torch.cuda.is_available()
    refused = refusal(
        torch.__version__,
        (torch.cuda.get_device_name(), torch.cuda.get_device_capability()) if there else None,
        language.available,
    )
    if refused is not None:
        raise SettingsError(refused)
    return torch.device("cuda", torch.cuda.current_device())


def refusal(torch_version: str, gpu: tuple[str, tuple[int, int]] | None, triton: bool) -> str | None:
    """Why nothing can be measured here; None if it can. `gpu`: name and compute capability."""
    if gpu is None:
        return f"no CUDA device is usable by torch {torch_version}; {TRY}"
    name, capability = gpu
    if capability < OLDEST:
        return (
            f"{name} has compute capability {capability[0]}.{capability[1]} and {OLDEST[0]}.{OLDEST[1]} or newer is "
            f"needed; {TRY}"
        )
    if not triton:
        return f"Triton is not installed beside torch {torch_version}, and every kernel is written in it; {TRY}"
    return None


def report(device: torch.device) -> dict[str, Any]:
    """What a figure needs beside it: machine, GPU, driver, link, versions, commit, command."""
    found: dict[str, Any] = {
        **machine(),
        "gpu": "cpu",
        "triton": version("triton"),
        "transformers": version("transformers"),
        "commit": commit(),
        "command": shlex.join(["python", "-m", "server.bench.gpu", *sys.argv[1:]]),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / (1 << 30), 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_mib": properties.L2_cache_size >> 20,
            "cuda": torch.version.cuda,
            **link(device),
        }
    return found


def link(device: torch.device) -> dict[str, Any]:
    """Driver and host link by NVML; empty, with the reason, where it does not answer."""
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            properties: Any = torch.cuda.get_device_properties(device)
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}".encode())
            return {
                "driver": text(pynvml.nvmlSystemGetDriverVersion()),
                "pcie": {
                    "generation": pynvml.nvmlDeviceGetCurrPcieLinkGeneration(handle),
                    "width": pynvml.nvmlDeviceGetCurrPcieLinkWidth(handle),
                    "most_generation": pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle),
                    "most_width": pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle),
                },
            }
        finally:
            pynvml.nvmlShutdown()
    except Exception as error:  # NVML is a convenience: whatever it lacks is no reason not to measure
        return {"driver": f"NVML does not answer: {type(error).__name__}: {error}"}


def text(value: bytes | str) -> str:
    """NVML's strings, of whichever kind its release returns."""
    return value.decode() if isinstance(value, bytes) else value


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """The git commit, with a digest of the sources where they differ from it, or without git."""
    try:
        ran = [
            subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True, timeout=30)
            for words in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--", "server", "kernels"))
        ]
    except (OSError, subprocess.SubprocessError):
        return f"files-{digest()}"
    return ran[0].stdout.strip() + (f"+{digest()}" if ran[1].stdout.strip() else "")


def digest() -> str:
    """Of all sources."""
    made = hashlib.sha256()
    for path in sorted([*(ROOT / "server").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]):
        made.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return made.hexdigest()[:12]


def memory_available() -> int:
    """Bytes of host memory that may be taken, the cgroup's limit heeded."""
    from server.runtime.host import available_memory

    return available_memory()


def processors() -> int:
    return len(os.sched_getaffinity(0))
