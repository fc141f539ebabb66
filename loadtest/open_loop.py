"""Open loop: requests arrive at random (Poisson), however many are still being answered.

`locust -f loadtest/open_loop.py --host http://127.0.0.1:8000 --arrivals 2` sends two a second on average. A closed loop
hides a slow server, because its users then ask less; here the queue shows.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # Locust knows only this file's own folder

import gevent
from gevent.pool import Pool
from locust import events, task

from loadtest.prompts import mixed_length, passage
from loadtest.users import COMPLETIONS, Client

MOST_IN_FLIGHT = 1024


@events.init_command_line_parser.add_listener
def flags(parser: Any) -> None:
    parser.add_argument("--arrivals", type=float, default=1.0, help="requests per second, on average")


class Arrivals(Client):
    """One user that sends for all. When as many as it may have are in flight, the next one is reported as failed."""

    fixed_count = 1
    concurrency = MOST_IN_FLIGHT

    def on_start(self) -> None:
        super().on_start()
        self.pool = Pool(MOST_IN_FLIGHT)

    def on_stop(self) -> None:
        self.pool.join(timeout=30)

    @task
    def arrive(self) -> None:
        gevent.sleep(self.draw.expovariate(self.environment.parsed_options.arrivals))
        prompt = passage(mixed_length(self.draw, self.words, 600), self.draw)
        body = self.body(mixed_length(self.draw, self.max_tokens, 256), prompt=prompt, ignore_eos=True)
        if self.pool.full():
            full = RuntimeError(f"{MOST_IN_FLIGHT} requests are in flight already")
            fire = self.environment.events.request.fire
            fire(request_type="POST", name="arrival", response_time=0, response_length=0, exception=full, context={})
        else:
            self.pool.spawn(self.streamed, COMPLETIONS, "arrival", **body)
