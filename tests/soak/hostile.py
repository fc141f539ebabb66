"""Requests that nobody should send, as bytes for a socket: wrong JSON, wrong values, wrong HTTP.

`Hostile.request` gives one at a time, from a seeded generator; `how` says what was done to it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/v1/memory/packs")
DEEP = 50_000
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63) - 1,
    10**400,
    0.5,
    -0.0,
    1e308,
    5e-324,
    "",
    "x",
    "\x00",
    "\ud800",
    "\u202e",
    "🙂" * 300,
    "a" * 20_000,
    [],
    {},
    [[]],
    [None],
    [{}],
    [1, "a"],
    [[1], ["a"]],
    {"a": 1},
    {"": {"": {}}},
    {"type": "json_object"},
    {"json": {"$ref": "#"}},
    {"regex": "(a+)+$" * 20},
    "{{ 7 * 7 }}",
    "{% for x in range(9**9) %}",
    "{{ ''.__class__.__mro__ }}",
    "../../etc/passwd",
    "%s%n",
    "' OR 1=1 --",
    "<script>",
    "NaN",
    float("inf"),
    float("nan"),
)
FIELDS = [
    "model",
    "prompt",
    "messages",
    "n",
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "stop",
    "seed",
    "logprobs",
    "top_logprobs",
    "echo",
    "stream",
    "stream_options",
    "logit_bias",
    "stop_token_ids",
    "memory",
    "cache_salt",
    "response_format",
    "structured_outputs",
    "best_of",
    "suffix",
    "tools",
    "tool_choice",
    "chat_template_kwargs",
    "tokens",
    "add_special_tokens",
    "continue_final_message",
    "return_token_ids",
    "max_completion_tokens",
    "name",
    "path",
    "user",
    "presence_penalty",
    "repetition_penalty",
    "timings",
    "__class__",
    "constructor",
    "model_extra",
]


class Hostile:
    """One client's stream of requests."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.kinds: tuple[Callable[[], bytes], ...] = (
            self.wrong_values,
            self.wrong_values,
            self.wrong_values,
            self.nested_values,
            self.truncated,
            self.flipped,
            self.deep,
            self.huge_number,
            self.no_text,
            self.wrong_type,
            self.wrong_length,
            self.bad_chunks,
            self.head_flood,
            self.wrong_head,
            self.wrong_path,
            self.two_at_once,
            self.noise,
        )

    def request(self) -> tuple[str, bytes]:
        kind = self.rng.choice(self.kinds)
        return kind.__name__, kind()

    def pause(self) -> float:
        """Seconds between the halves of a request that is sent slowly; most are sent at once."""
        return self.rng.choice((0.05, 0.3, 3.0)) if self.rng.random() < 0.01 else 0.0

    # ── bodies ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def body(self, path: str) -> dict[str, Any]:
        """A valid one, small."""
        made: dict[str, dict[str, Any]] = {
            "/v1/completions": {"prompt": "a b", "max_tokens": self.rng.randint(0, 3)},
            "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
            "/tokenize": {"prompt": "a b"},
            "/detokenize": {"tokens": [1, 2]},
            "/v1/memory/packs": {"name": "x", "path": "y"},
        }
        return {**made[path], "stream": self.rng.random() < 0.3}

    def wrong_values(self) -> bytes:
        path = self.rng.choice(PATHS)
        body = self.body(path)
        for _ in range(self.rng.randint(1, 4)):
            body[self.rng.choice((*body, *FIELDS))] = self.rng.choice(VALUES)
        return post(path, json.dumps(body).encode())

    def nested_values(self) -> bytes:
        rng = self.rng
        message = {"role": rng.choice(("user", "system", "tool", "", 5)), "content": rng.choice(VALUES)}
        message |= {rng.choice(("name", "reasoning", "tool_calls", "__init__", "content")): rng.choice(VALUES)}
        inner: Any = rng.choice(VALUES)
        for _ in range(rng.randint(0, 30)):
            inner = [inner] if rng.random() < 0.5 else {rng.choice(FIELDS): inner}
        body = self.body("/v1/chat/completions") | {"messages": [message] * rng.choice((1, 2, 300))}
        body |= {rng.choice(FIELDS): inner, "memory": rng.choice(({"enabled": inner}, {"redirect": [inner]}, inner))}
        return post("/v1/chat/completions", json.dumps(body).encode())

    def truncated(self) -> bytes:
        path = self.rng.choice(PATHS)
        text = json.dumps(self.body(path)).encode()
        return post(path, text[: self.rng.randrange(len(text))])

    def flipped(self) -> bytes:
        path = self.rng.choice(PATHS)
        text = bytearray(json.dumps(self.body(path)).encode())
        for _ in range(self.rng.randint(1, 4)):
            text[self.rng.randrange(len(text))] = self.rng.randrange(256)
        return post(path, bytes(text))

    def deep(self) -> bytes:
        path, depth = self.rng.choice(PATHS), self.rng.choice((30, 300, 3000, DEEP))
        opening, closing = self.rng.choice(((b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]")))
        middle = opening * depth + b"1" + closing * (depth if self.rng.random() < 0.7 else 0)
        return post(path, b'{"%s": %s}' % (self.rng.choice(FIELDS).encode(), middle))

    def huge_number(self) -> bytes:
        rng = self.rng
        number = rng.choice(
            ("9" * 5000, "1e999", "-1e-999", "0." + "3" * 3000, "1" + "0" * 400, "0x10", "01", "+1", "NaN")
        )
        path = rng.choice(PATHS)
        body = json.dumps({**self.body(path), rng.choice(FIELDS): "@"}).replace('"@"', number)
        return post(path, body.encode())

    def no_text(self) -> bytes:
        path = self.rng.choice(PATHS)
        text = json.dumps(self.body(path))
        spoiled = self.rng.choice(
            (
                b"\xff\xfe" + text.encode("utf-16-le"),
                b"\xef\xbb\xbf" + text.encode(),
                text.replace("a", "\\ud800").encode(),
                text.encode().replace(b"a", b"\xc0\xaf"),
                text.encode().replace(b"a", b"\xed\xa0\x80"),
                text.encode().replace(b" ", b"\x00"),
                b"",
                b"\x00" * 1000,
            )
        )
        return post(path, spoiled)

    # ── HTTP ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def wrong_type(self) -> bytes:
        kind = self.rng.choice(
            ("text/plain", "multipart/form-data; boundary=x", "", "application/json; charset=\xff", "a" * 9000)
        )
        path = self.rng.choice(PATHS)
        return post(path, json.dumps(self.body(path)).encode(), f"Content-Type: {kind}")

    def wrong_length(self) -> bytes:
        length = self.rng.choice(
            ("-1", "abc", "5, 5", "99999999999999999999", "1e3", "0", "", "+5", "5\r\nContent-Length: 6")
        )
        return head("POST", self.rng.choice(PATHS), f"Content-Length: {length}") + b'{"prompt": "a"}'

    def bad_chunks(self) -> bytes:
        chunks = self.rng.choice(
            (
                b"zz\r\n",
                b"5\r\nab",
                b"ffffffffffffffff\r\na",
                b"1;" + b"x" * 9000 + b"\r\na\r\n0\r\n\r\n",
                b"0\r\nX: y\r\n\r\n",
                b"-1\r\n",
            )
        )
        more = self.rng.choice(((), ("Content-Length: 5",)))
        return head("POST", self.rng.choice(PATHS), "Transfer-Encoding: chunked", *more) + chunks

    def head_flood(self) -> bytes:
        rng = self.rng
        count, size = rng.choice(((500, 10), (1, 300_000), (40, 8000), (127, 1), (5000, 1)))
        lines = [f"X-{number}: {'y' * size}" for number in range(count)]
        return head("GET", rng.choice(("/health", *PATHS)), *lines)

    def wrong_head(self) -> bytes:
        rng = self.rng
        lines = (
            "Expect: 100-continue",
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Connection: \x01",
            "X Y: z",
            "X-Request-Id: a\tb",
            "X-Request-Id: " + "i" * 500,
            "Authorization: Bearer ",
            "Authorization: \xff",
            "Range: bytes=0-",
            "Accept: \x7f",
            "Origin: null",
            "Accept-Encoding: gzip;q=9",
            "Content-Encoding: gzip",
            "Host: a\r\nHost: b",
            "Cookie: " + "c" * 4000,
        )
        method = rng.choice(
            ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "CONNECT", "BREW", "get")
        )
        version = rng.choice(("HTTP/1.1", "HTTP/1.0", "HTTP/0.9", "HTTP/9.9", "", "ICAP/1.0"))
        return head(
            method, rng.choice(("/", "/health", *PATHS)), *rng.sample(lines, rng.randint(1, 4)), version=version
        )

    def wrong_path(self) -> bytes:
        path = self.rng.choice(
            (
                "/v1/models/../../etc/passwd",
                "/v1/models/%00",
                "/v1/models/%ff%fe",
                "//",
                "/v1/models/" + "a" * 20_000,
                "*",
                "http://x/",
                "/v1/memory/packs/..%2f..%2fetc",
                "/v1/completions?" + "a=b&" * 2000,
                "/%",
                "/\xff",
                "/docs/../..",
                "/v1/completions/",
                "/metrics?x[]=1",
                "/openapi.json#x",
                "/static/../server/cli.py",
                "/static/%2e%2e/cli.py",
            )
        )
        return head(self.rng.choice(("GET", "POST", "DELETE")), path)

    def two_at_once(self) -> bytes:
        """Pipelined, the second one wrong more often than not."""
        return self.wrong_values().replace(b"Connection: close\r\n", b"") + self.rng.choice(self.kinds[:5])()

    def noise(self) -> bytes:
        rng = self.rng
        return rng.choice(
            (
                rng.randbytes(rng.randint(1, 2000)),
                b"\x16\x03\x01\x02\x00\x01" + rng.randbytes(100),
                b"\r\n" * 500,
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                b"GET",
                b"GET / HTTP/1.1\r\nHost",
            )
        )


def head(method: str, path: str, *lines: str, version: str = "HTTP/1.1") -> bytes:
    text = "\r\n".join((f"{method} {path} {version}", "Host: x", "Connection: close", *lines, "", ""))
    return text.encode("latin-1", "replace")


def post(path: str, body: bytes, kind: str = "Content-Type: application/json") -> bytes:
    return head("POST", path, kind, f"Content-Length: {len(body)}") + body
