"""A checkpoint: everything a run needs to go on as if it had never stopped, in one safetensors file.

    rows.<layer>.<name>    masters and moments of the taught rows (`rows.py`)
    module.<index>         projections, norms, convolution, in the memory's own order
    adam.<index>.<name>    their optimiser's moments and step counts
    metadata               the step, and a stamp of model, pack, data and settings that it belongs to

It is written beside the last one, synced and renamed: a full disk or a kill leaves the last one as it was. Nothing
random is stored, since everything random is drawn from (seed, step).
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from server.errors import PackError
from server.training.loop import Trainer

CHECKPOINT = "checkpoint.safetensors"


def save(folder: Path, trainer: Trainer, stamp: str, history: list[dict[str, float]]) -> None:
    """Raises PackError if the disk is full or the folder cannot be written; the last checkpoint is then still there."""
    metadata = {"step": str(trainer.step), "stamp": stamp, "history": json.dumps(history)}
    path, partial = folder / CHECKPOINT, folder / f".{CHECKPOINT}.partial"
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors_of(trainer).items()}, partial, metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        what = "the disk is full" if full else str(error)
        kept = "the last checkpoint is unharmed" if path.exists() else "there is no earlier one"
        raise PackError(f"{path} could not be written: {what}; {kept}. Make room and run the command again") from None


def restore(folder: Path, trainer: Trainer, stamp: str) -> list[dict[str, float]]:
    """Brings the trainer to where the folder's checkpoint is, if there is one; returns the curves so far.

    Raises PackError for a checkpoint of another model, pack, data or settings, and for a damaged one.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return []
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("stamp") != stamp:
                raise PackError(
                    f"{path} belongs to a run with another model, pack, data or settings: remove {folder}, choose "
                    "another --out, or run that command again"
                )
            found = {name: file.get_tensor(name) for name in sorted(file.keys())}
        fill(trainer, found)
        trainer.step = int(metadata["step"])
        history: list[dict[str, float]] = json.loads(metadata["history"])
        return history
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise PackError(f"{path} is damaged: {error}; remove {folder} to begin anew") from None


def tensors_of(trainer: Trainer) -> dict[str, Tensor]:
    found = {
        f"rows.{layer}.{name}": tensor
        for layer, rows in trainer.memory.rows.items()
        for name, tensor in rows.state().items()
    }
    for index, parameter in enumerate(trainer.memory.parameters()):
        found[f"module.{index}"] = parameter.detach()
        state = trainer.optimiser.state.get(parameter, {}) if trainer.optimiser is not None else {}
        found |= {f"adam.{index}.{name}": value for name, value in state.items()}
    return found


@torch.no_grad()
def fill(trainer: Trainer, found: dict[str, Tensor]) -> None:
    for layer, rows in trainer.memory.rows.items():
        rows.restore({name: found[f"rows.{layer}.{name}"] for name in rows.state()})
    for index, parameter in enumerate(trainer.memory.parameters()):
        parameter.copy_(found[f"module.{index}"])
        prefix = f"adam.{index}."
        state = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
        if state and trainer.optimiser is not None:
            trainer.optimiser.state[parameter] = {
                name: value if name == "step" else value.to(parameter.device) for name, value in state.items()
            }
