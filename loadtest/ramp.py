"""Closed loop in stages: 1, 2, 4, … users, each for `--stage` seconds, up to `--most` users; then it ends.

`locust -f loadtest/ramp.py --headless --host http://127.0.0.1:8000 --most 32 --stage 20` finds where latency turns up.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # Locust knows only this file's own folder

from locust import LoadTestShape, events

from loadtest.users import Streaming

__all__ = ["Ramp", "Streaming"]


@events.init_command_line_parser.add_listener
def flags(parser: Any) -> None:
    parser.add_argument("--most", type=int, default=32, help="users of the last stage, at most")
    parser.add_argument("--stage", type=float, default=20.0, help="seconds of each stage")


class Ramp(LoadTestShape):
    def tick(self) -> tuple[int, float] | None:
        """(users, users started per second) of now; None at the end."""
        options = self.runner.environment.parsed_options
        users = 1 << int(self.get_run_time() // options.stage)
        return (users, float(users)) if users <= options.most else None
