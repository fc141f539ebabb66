"""Kernels' tests on a GPU: what a test hands to a kernel goes to the device first, and comes back after.

Tests make their tensors on the CPU. Views stay views: a storage is copied once, strides and offsets are kept, and
whatever the kernel wrote, in place and beside, is copied back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def launched(kernel: Callable[..., Any], device: str) -> Callable[..., Any]:
    """`kernel` for tensors on the CPU, run on the device."""

    def call(*args: Any, **named: Any) -> Any:
        sent = Sent(device)
        result = kernel(*sent.there(args), **sent.there(named))
        sent.back()
        return home(result)

    return call


class Sent:
    """The tensors of one call, by storage: on the CPU and on the device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.storages: dict[int, tuple[Tensor, Tensor]] = {}

    def there(self, value: Any) -> Any:
        """The value with every tensor in it on the device, dataclasses, tuples, lists and dicts included."""
        if isinstance(value, Tensor):
            return self._tensor(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return dataclasses.replace(value, **self.there(fields))
        if isinstance(value, dict):
            return {key: self.there(each) for key, each in value.items()}
        return type(value)([self.there(each) for each in value]) if isinstance(value, (tuple, list)) else value

    def back(self) -> None:
        for host, there in self.storages.values():
            host.copy_(there)

    def _tensor(self, tensor: Tensor) -> Tensor:
        if not tensor.numel():
            return tensor.to(self.device)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.storages:
            host = torch.empty(0, dtype=torch.uint8).set_(storage)
            self.storages[storage.data_ptr()] = host, host.to(self.device, copy=True)
        there = self.storages[storage.data_ptr()][1].untyped_storage()
        made = torch.empty(0, dtype=tensor.dtype, device=self.device)
        return made.set_(there, tensor.storage_offset(), tensor.size(), tensor.stride())


def home(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.cpu()
    return type(result)(home(each) for each in result) if isinstance(result, (tuple, list)) else result
