"""A live server under clients that ask all kinds of things and leave when they like: no leak, no 5xx."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.live import Live, live_server

CLIENTS = 16
LEAVE, NONSENSE = 0.2, 0.05
# Growth after the warm-up that is no leak: allocator arenas, and httptools' and the metrics' own buffers.
GROWTH = 64 << 20
# Of torch and of oneDNN: compiled primitives kept, one a matrix shape and token count, 1,024 each by default. With so
# few the caches are full when the warm-up ends, and what grows after it is a leak.
CACHES = {"LRU_CACHE_CAPACITY": "16", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
WORDS = ["the", "river", "한글", "of", "memory", "🙂", "flows", "under", "12345", "bridges", "def", "f(x):", "return"]


def request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A path and a valid body."""
    text = " ".join(rng.choices(WORDS, k=rng.choice([1, 5, 40, 200])))
    body: dict[str, Any] = {
        "max_tokens": rng.randint(1, 48),
        "temperature": rng.choice([0, 0.7, 1.3]),
        "stream": rng.random() < 0.6,
        "n": rng.choice([1, 1, 1, 3]),
    }
    if rng.random() < 0.3:
        body |= {"stop": ["e", "한"], "seed": 7}
    if rng.random() < 0.3:
        body |= {"top_k": 20, "top_p": 0.9, "presence_penalty": 0.5, "logit_bias": {"5": -3}}
    if rng.random() < 0.5:
        return "/v1/completions", {**body, "prompt": text}
    return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text}]}


def spoiled(rng: random.Random, body: dict[str, Any]) -> dict[str, Any]:
    """The body with one thing wrong that must be a 400."""
    wrong = {"max_tokens": -1, "temperature": "hot", "n": 0, "top_p": 2, "logit_bias": {"x": 1}, "stop": [[]]}
    name = rng.choice(sorted(wrong))
    return {**body, name: wrong[name]}


async def client(url: str, seed: int, deadline: float, seen: Counter[str]) -> None:
    rng = random.Random(seed)
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        while time.monotonic() < deadline:
            path, body = request(rng)
            if rng.random() < NONSENSE:
                answer = await http.post(path, json=spoiled(rng, body))
                assert answer.status_code == 400, answer.text
                assert answer.json()["error"]["message"]
                seen["refused"] += 1
            else:
                seen[await ask(http, path, body, rng.randint(1, 10) if rng.random() < LEAVE else None)] += 1


async def ask(http: httpx.AsyncClient, path: str, body: dict[str, Any], patience: int | None) -> str:
    """Reads the answer to its end, or leaves after `patience` lines or as many hundredths of a second."""
    try:
        if not body["stream"]:
            answer = await http.post(path, json=body, timeout=60 if patience is None else patience / 100)
            assert answer.status_code == 200, answer.text
            return "answered"
        async with http.stream("POST", path, json=body) as answer:
            assert answer.status_code == 200, await answer.aread()
            last = ""
            async for line in answer.aiter_lines():
                last = line or last
                if patience is not None and (patience := patience - 1) == 0:
                    return "left"
            assert last == "data: [DONE]"
            return "streamed"
    except httpx.TimeoutException:  # a patience of hundredths of a second may end while connecting
        assert patience is not None
        return "left"


async def campaign(live: Live, seconds: float, seed: int) -> Counter[str]:
    seen: Counter[str] = Counter()
    deadline = time.monotonic() + seconds
    await asyncio.gather(*(client(live.url, seed * CLIENTS + i, deadline, seen) for i in range(CLIENTS)))
    return seen


def at_rest(live: Live) -> dict[str, float]:
    """Gauges that are not zero although nobody asks for anything any more."""
    names = ("engram_num_requests_running", "engram_num_requests_waiting", "engram_kv_cache_usage_perc")
    for _ in range(50):
        busy = {name: value for name, value in live.gauges().items() if name.startswith(names) and value}
        if not busy:
            break
        time.sleep(0.1)
    return busy


@pytest.fixture(autouse=True)
def small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, capacity in CACHES.items():
        monkeypatch.setenv(name, capacity)


@pytest.mark.timeout(1200)
def test_random_clients_leave_no_trace(soak_seconds: float, tiny_llama_folder: Path, tmp_path: Path) -> None:
    flags = [
        "--model",
        str(tiny_llama_folder),
        "--kv-bytes",
        "8M",
        "--max-num-seqs",
        "12",
        "--max-model-len",
        "1024",
        "--threads",
        "1",
    ]
    with live_server(tmp_path / "log", *flags, "--log-level", "warning") as live:
        total = asyncio.run(campaign(live, min(20.0, soak_seconds / 4), seed=0))  # buffers reach their size
        resident, deadline, turn = live.resident_bytes(), time.monotonic() + soak_seconds, 0
        while time.monotonic() < deadline:
            turn += 1
            total += asyncio.run(campaign(live, min(60.0, deadline - time.monotonic()), seed=turn))
            assert at_rest(live) == {}
            assert live.process.poll() is None
        assert live.resident_bytes() - resident < GROWTH
        assert all(total[kind] for kind in ("answered", "streamed", "left", "refused")), total
        print(dict(total))
    assert "Traceback" not in (tmp_path / "log").read_text()


STREAMS, REQUESTS = 64, 1000


async def crowd(live: Live, seen: Counter[str]) -> None:
    """REQUESTS streams, STREAMS at a time; every fifth client leaves in the middle."""
    left = iter(range(REQUESTS))

    async def client(number: int) -> None:
        rng = random.Random(number)
        async with httpx.AsyncClient(base_url=live.url, timeout=600) as http:
            for _ in left:
                path, body = request(rng)
                patience = rng.randint(1, 20) if rng.random() < LEAVE else None
                seen[await ask(http, path, {**body, "stream": True}, patience)] += 1

    await asyncio.gather(*(client(number) for number in range(STREAMS)))


@pytest.mark.timeout(1200)
def test_a_crowd_of_streams_leaves_no_trace(tiny_llama_folder: Path, tmp_path: Path) -> None:
    flags = ["--model", str(tiny_llama_folder), "--kv-bytes", "8M", "--max-num-seqs", "64", "--max-model-len", "1024"]
    with live_server(tmp_path / "log", *flags, "--threads", "1", "--log-level", "warning") as live:
        resident, files = [], [live.open_files(seconds=2)]
        for _ in range(3):
            seen: Counter[str] = Counter()
            asyncio.run(crowd(live, seen))
            assert sum(seen.values()) == REQUESTS and REQUESTS / 10 < seen["left"] < REQUESTS / 3, seen
            assert at_rest(live) == {}
            resident.append(live.resident_bytes())
            files.append(live.open_files(files[0]))
        print(dict(seen), [size >> 20 for size in resident], files)
        assert resident[-1] - resident[0] < GROWTH and max(files) <= files[0]
    assert "Traceback" not in (tmp_path / "log").read_text()
