"""The locustfile of `overhead.py`: one user that asks all arms the same, in turns, and notes when tokens came.

    round   prompt A:   resident, none, offload      one request each
            prompts B:  offload, none, resident      a wave of 8 each       order drawn anew every time

A server that nobody asks costs nothing, so each has the machine to itself while it answers. The first round is not
written: caches and threads are cold then. The plan (`--plan FILE`) names the servers and what to ask.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # Locust knows only this file's own folder

import gevent
from locust import events, task
from locust.contrib.fasthttp import FastHttpUser

from loadtest.prompts import passage
from loadtest.streams import Timing, ask, report


@events.init_command_line_parser.add_listener
def flags(parser: Any) -> None:
    parser.add_argument("--plan", required=True, help="JSON file: arms, widths, words, tokens, seconds, seed, records")


class Alternating(FastHttpUser):
    fixed_count = 1
    concurrency = 64
    network_timeout = connection_timeout = 600.0

    def on_start(self) -> None:
        self.plan = json.loads(Path(self.environment.parsed_options.plan).read_text(encoding="utf-8"))
        self.draw = random.Random(self.plan["seed"])
        self.ends, self.round = 0.0, 0

    @task
    def take_turns(self) -> None:
        if self.round == 1:
            self.ends = time.monotonic() + self.plan["seconds"]
        for width in self.plan["widths"]:
            prompts = [passage(self.plan["words"], self.draw) for _ in range(width)]
            for arm in self.draw.sample(sorted(self.plan["arms"]), len(self.plan["arms"])):
                self.ask_together(arm, width, prompts)
        self.round += 1
        if self.ends and time.monotonic() > self.ends:
            self.environment.runner.quit()

    def ask_together(self, arm: str, width: int, prompts: list[str]) -> None:
        url, name = self.plan["arms"][arm] + "/v1/completions", f"{arm}, {width} at once"
        body = {"max_tokens": self.plan["tokens"], "temperature": 0, "ignore_eos": True}
        jobs = [gevent.spawn(ask, self, url, {**body, "prompt": prompt}, name) for prompt in prompts]
        gevent.joinall(jobs)
        timings: list[Timing] = [job.value for job in jobs if job.value is not None]
        if self.round == 0 or len(timings) < width:
            return
        for timing in timings:
            report(self, timing, name)
        record = {"round": self.round, "arm": arm, "width": width, "answers": [answer(timing) for timing in timings]}
        with open(self.plan["records"], "a", encoding="utf-8") as records:
            records.write(json.dumps(record) + "\n")


def answer(timing: Timing) -> dict[str, Any]:
    return {"sent": timing.sent, "arrivals": timing.arrivals, "text": timing.text}
