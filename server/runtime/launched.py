"""What a launched decode step will give: its tokens, on their way to the host. Knows tensors and events only."""

from __future__ import annotations

import torch
from torch import Tensor


class Launched:
    """A step on its way. `logits[B, V]` in fp32 are the graph's own: valid until the next launch."""

    def __init__(self, host: Tensor, logits: Tensor, done: torch.cuda.Event | None) -> None:
        self._host, self._done, self.logits = host, done, logits
        self._tokens: list[int] | None = None

    def tokens(self) -> list[int]:
        """[B] the sampled ids, without dummies. Waits for the step."""
        if self._tokens is None:
            if self._done is not None:
                self._done.synchronize()
            self._tokens = self._host.tolist()
        return self._tokens


class Turn:
    """A host copy of a step's tokens; two take turns, so that a step may be launched before the last one is read."""

    def __init__(self, most: int, pinned: bool) -> None:
        self.host = torch.zeros(most, dtype=torch.int64, pin_memory=pinned)
        self.done = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]
        self.launched: Launched | None = None

    def finish(self) -> None:
        """Before the copy is written again: whoever has not read its tokens yet gets them."""
        if self.launched is not None:
            self.launched.tokens()
