"""The way of a kernel's arguments to a device and back, by a copy on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.kernels.on_device import launched


@dataclass(frozen=True)
class Pair:
    first: torch.Tensor
    scale: float


def test_what_a_kernel_writes_comes_back_through_every_view() -> None:
    wide = torch.arange(12.0).view(3, 4)
    seen: list[torch.Tensor] = []

    def kernel(left: torch.Tensor, pair: Pair, others: dict[str, torch.Tensor]) -> tuple[torch.Tensor, None]:
        assert left.stride() == (4, 1) and left.untyped_storage().data_ptr() == pair.first.untyped_storage().data_ptr()
        assert left.data_ptr() != wide.data_ptr()
        left.fill_(-1)
        pair.first.mul_(pair.scale)
        seen.append(others["none"])
        return left + 1, None

    told = launched(kernel, "cpu")(wide[:, :2], Pair(wide[:, 2:], 2.0), {"none": torch.empty(0)})
    assert torch.equal(told[0], torch.zeros(3, 2)) and told[1] is None
    assert wide.tolist() == [[-1, -1, 4, 6], [-1, -1, 12, 14], [-1, -1, 20, 22]]
    assert seen[0].numel() == 0
