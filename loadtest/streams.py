"""One streamed answer as a client sees it: when each token came, and what Locust is told about it.

    sent ──── TTFT ────▶ token ── ITL ──▶ token ── ITL ──▶ token

TTFT, ITL (one per gap) and tokens/s become entries of their own beside the request's, in Locust's tables, files and
web page; the figure of "tokens/s" stands in the column of milliseconds. Tokens are counted by `return_token_ids`,
since an event without text is not sent and one may carry two tokens.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

from locust.contrib.fasthttp import FastHttpUser

EVENT_END = b"\n\n"
DATA = b"data: "


@dataclass(slots=True)
class Timing:
    """`sent` and `arrivals` (one per token) in seconds of one clock; `text`: the answer."""

    sent: float
    arrivals: list[float] = field(default_factory=list)
    text: str = ""

    @property
    def ttft(self) -> float:
        return self.arrivals[0] - self.sent

    @property
    def total(self) -> float:
        return self.arrivals[-1] - self.sent

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]


def ask(user: FastHttpUser, path: str, body: dict[str, Any], name: str) -> Timing | None:
    """Sends the request and reads its events to the end; None if it failed, which Locust has been told then."""
    body = {**body, "stream": True, "return_token_ids": True}
    timing = Timing(time.perf_counter())
    with user.client.post(path, json=body, name=name, stream=True, catch_response=True) as response:
        if response.status_code != 200:
            response.failure(f"status {response.status_code}")
            return None
        error = read_events(response.stream, timing)
        response.request_meta["response_time"] = (time.perf_counter() - timing.sent) * 1e3
        response.request_meta["response_length"] = len(timing.text)
        if error or not timing.arrivals:
            response.failure(error or "no token came")
            return None
        response.success()
    return timing


def read_events(stream: Any, timing: Timing) -> str:
    """Fills `timing`; returns what an error event says, or ""."""
    while event := stream.readline(EVENT_END):
        now = time.perf_counter()
        if not event.startswith(DATA) or event.startswith(b"data: [DONE]"):
            continue
        content = json.loads(event[len(DATA) :])
        if "error" in content:
            return str(content["error"]["message"])
        for choice in content["choices"]:
            timing.arrivals += [now] * len(choice.get("token_ids") or ())
            timing.text += choice.get("text") or choice.get("delta", {}).get("content") or ""
    return ""


def report(user: FastHttpUser, timing: Timing, name: str) -> None:
    """Locust's entries of one answer."""
    fire = user.environment.events.request.fire

    def entry(kind: str, value: float) -> None:
        fire(request_type=kind, name=name, response_time=value, response_length=0, exception=None, context={})

    entry("TTFT", timing.ttft * 1e3)
    for gap in timing.gaps:
        entry("ITL", gap * 1e3)
    if len(timing.arrivals) > 1:
        entry("tokens/s", len(timing.gaps) / (timing.arrivals[-1] - timing.arrivals[0]))
