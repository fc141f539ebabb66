"""Users: what a client of the server does, one class each. The model's name is asked for once per user.

A closed loop: each user waits for its answer before it asks again, so that N users are N requests in flight.
`open_loop.py` has requests arrive whether or not earlier ones are answered.
"""

from __future__ import annotations

import os
import random
from typing import Any

from locust import constant, task
from locust.contrib.fasthttp import FastHttpUser

from loadtest.prompts import mixed_length, passage, question
from loadtest.streams import ask, report

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


class Client(FastHttpUser):
    """What all users share: a key from ENGRAM_API_KEY, a model, draws that repeat from run to run."""

    abstract = True
    wait_time = constant(0)
    network_timeout = connection_timeout = 600.0
    words, max_tokens = 48, 32

    def on_start(self) -> None:
        key = os.environ.get("ENGRAM_API_KEY")
        if key:
            self.client.auth_header = f"Bearer {key}"
        self.draw = random.Random(f"{type(self).__name__} {self.environment.runner.user_count}")
        self.model = self.client.get("/v1/models").json()["data"][0]["id"]

    def body(self, max_tokens: int | None = None, **fields: Any) -> dict[str, Any]:
        return {"model": self.model, "max_tokens": max_tokens or self.max_tokens, "temperature": 0, **fields}

    def streamed(self, path: str, name: str, **body: Any) -> None:
        timing = ask(self, path, body, name)
        if timing is not None:
            report(self, timing, name)


class Completion(Client):
    """Waits for whole answers."""

    @task
    def complete(self) -> None:
        self.client.post(COMPLETIONS, json=self.body(prompt=passage(self.words, self.draw)), name="completion")


class Chat(Client):
    """Asks questions and waits for whole answers."""

    @task
    def chat(self) -> None:
        messages = [{"role": "user", "content": question(self.draw)}]
        self.client.post(CHAT, json=self.body(messages=messages), name="chat")


class Streaming(Client):
    """Reads completions token by token."""

    @task
    def stream(self) -> None:
        body = self.body(prompt=passage(self.words, self.draw), ignore_eos=True)
        self.streamed(COMPLETIONS, "stream", **body)


class StreamingChat(Client):
    """Reads answers to questions token by token."""

    @task
    def stream(self) -> None:
        self.streamed(CHAT, "chat stream", **self.body(messages=[{"role": "user", "content": question(self.draw)}]))


class Mixed(Client):
    """Streams with prompts and answers of mixed lengths."""

    @task
    def stream(self) -> None:
        prompt = passage(mixed_length(self.draw, self.words, 600), self.draw)
        body = self.body(mixed_length(self.draw, self.max_tokens, 256), prompt=prompt, ignore_eos=True)
        self.streamed(COMPLETIONS, "mixed", **body)
