"""The experiments as verbs: `engram-server bench …`. An experiment's module is imported when it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.options import JsonFile, ModelOption, numbers
from server.settings import DEFAULT_MODEL

bench = typer.Typer(
    name="bench", help="Measure this machine; every experiment alternates its arms.", no_args_is_help=True
)


@bench.command()
def decode(
    model: ModelOption = DEFAULT_MODEL,
    steps: Annotated[int, typer.Option(min=8, help="steps of each arm at each concurrency")] = 48,
    json: JsonFile = None,
) -> None:
    """The decode step beside transformers' on the same weights, in turns."""
    from server.bench.decode import run

    run(model=model, steps=steps, json=json)


@bench.command()
def memory(
    model: ModelOption = DEFAULT_MODEL,
    turns: Annotated[int, typer.Option(min=16, help="steps of each arm")] = 150,
    json: JsonFile = None,
) -> None:
    """What an attached memory costs a step, and how much of a slow table its prefetch hides."""
    from server.bench.memory import run

    run(model=model, turns=turns, json=json)


@bench.command()
def cache(
    model: Annotated[str, typer.Option(help="whose tokenizer cuts the real text")] = DEFAULT_MODEL,
    json: JsonFile = None,
) -> None:
    """The hit rate of the hot rows beside the best possible, on Zipf traces, after a drift, and on real text."""
    from server.bench.cache import run

    run(model=model, json=json)


@bench.command()
def offload(
    model: ModelOption = DEFAULT_MODEL,
    parameters: Annotated[int, typer.Option(min=1_000_000, help="of the table")] = 10_000_000_000,
    seconds: Annotated[
        float | None,
        typer.Option(min=1, help="of measuring at each concurrency; default: 60 at 1, 110 at 8, 340 at 32 sequences"),
    ] = None,
    json: JsonFile = None,
) -> None:
    """What a table in host memory costs beside the same table on the device, and beside none."""
    from server.bench.offload import run

    run(model=model, parameters=parameters, seconds=seconds, json=json)


BenchFolder = Annotated[Path | None, typer.Option("--dir", help="where to build it; default: the cache folder")]
KeepPack = Annotated[bool, typer.Option("--keep", help="keep what was built for the next time")]


@bench.command()
def cold(
    model: ModelOption = DEFAULT_MODEL,
    rounds: Annotated[int, typer.Option(min=1, help="measurements of each arm, at most")] = 5,
    dir: BenchFolder = None,
    keep: KeepPack = False,
    json: JsonFile = None,
) -> None:
    """What the first answer after a cold start waits for, beside what the disk can do. Writes 9 GB and removes them."""
    from server.bench.cold import run

    run(model=model, rounds=rounds, folder=dir, keep=keep, json=json)


@bench.command()
def limit(
    model: ModelOption = DEFAULT_MODEL,
    seconds: Annotated[int, typer.Option(min=5, help="how long the load lasts")] = 240,
    dir: BenchFolder = None,
    keep: KeepPack = False,
    json: JsonFile = None,
) -> None:
    """A table four times --host-memory-limit under load, beside the same table in RAM. Needs 4 GB of disk and RAM."""
    from server.bench.limit import run

    run(model=model, seconds=seconds, folder=dir, keep=keep, json=json)


@bench.command("train")
def bench_train(
    model: ModelOption = DEFAULT_MODEL,
    layers: Annotated[str, typer.Option(help="layers that read the memory, as 1,10")] = "1,10",
    turns: Annotated[int, typer.Option(min=8, help="steps of each arm")] = 16,
    json: JsonFile = None,
) -> None:
    """A training step beside transformers with hooks, in turns."""
    from server.bench.train import run

    run(model=model, layers=numbers("--layers", layers), turns=turns, json=json)


@bench.command("edits")
def bench_edits(
    model: ModelOption = DEFAULT_MODEL,
    memory: Annotated[Path | None, typer.Option(help="a taught pack; default: the shipped one")] = None,
    facts: Annotated[int, typer.Option(min=1, help="facts to teach")] = 50,
    seconds: Annotated[float, typer.Option(min=1, help="of alternating steps")] = 60.0,
    json: JsonFile = None,
) -> None:
    """Facts taught one by one: completed, cost, what they disturb; and what 10,000 edits of others cost a step."""
    from server.bench.edits import run

    run(model, memory, facts, seconds, json)


@bench.command("stem")
def bench_stem(
    model: ModelOption = DEFAULT_MODEL,
    turns: Annotated[int, typer.Option(min=16, help="steps of each arm at each number of sequences")] = 160,
    json: JsonFile = None,
) -> None:
    """What STEM rows in place of a third of the up-projections gain a step, and what Engram besides costs."""
    from server.bench.stem import run

    run(model=model, turns=turns, json=json)


@bench.command()
def http(
    model: ModelOption = DEFAULT_MODEL,
    seconds: Annotated[int, typer.Option(min=5, help="seconds of each loaded part")] = 60,
    json: JsonFile = None,
) -> None:
    """What HTTP adds to a first token, and what the server does at five times its capacity."""
    from server.bench.http import run

    run(model=model, seconds=seconds, json=json)


@bench.command()
def quantized(
    model: ModelOption = DEFAULT_MODEL,
    turns: Annotated[int, typer.Option(min=16, help="steps of each arm")] = 60,
    json: JsonFile = None,
) -> None:
    """The decode step with int8 and int4 weights beside the plain one, and their perplexity."""
    from server.bench.quantized import run

    run(model=model, turns=turns, json=json)


@bench.command("facts")
def bench_facts(
    model: ModelOption = DEFAULT_MODEL,
    memory: Annotated[Path | None, typer.Option(help="a taught pack; default: the shipped one")] = None,
    facts: Annotated[int, typer.Option(min=1, help="facts to teach")] = 50,
    each: Annotated[int, typer.Option(min=1, help="facts between two quiet windows")] = 5,
    seconds: Annotated[float, typer.Option(min=1, help="of each quiet window")] = 8.0,
    json: JsonFile = None,
) -> None:
    """Facts taught over HTTP while 8 streams decode: what the streams keep, how long each takes, if it is known."""
    from server.bench.facts import run

    run(model=model, memory=memory, facts=facts, each=each, seconds=seconds, json=json)


@bench.command()
def peers(
    model: ModelOption = DEFAULT_MODEL,
    vllm: Annotated[Path | None, typer.Option(help="the Python of the environment that holds vLLM's CPU build")] = None,
    llama_server: Annotated[Path | None, typer.Option(help="llama.cpp's llama-server")] = None,
    llama_model: Annotated[Path | None, typer.Option(help="the same weights as a .gguf file, for llama.cpp")] = None,
    memory: Annotated[bool, typer.Option(help="one more arm: ours with a memory attached")] = True,
    rounds: Annotated[int, typer.Option(min=1, help="turns of each server")] = 3,
    tokens: Annotated[int, typer.Option(min=8, help="new tokens per stream")] = 48,
    json: JsonFile = None,
) -> None:
    """Our HTTP server beside vLLM's CPU build and llama.cpp, in turns: throughput, TTFT, time between tokens."""
    from server.bench.peers import run

    run(
        model=model,
        vllm_python=vllm,
        llama_server=llama_server,
        llama_model=llama_model,
        memory=memory,
        rounds=rounds,
        tokens=tokens,
        json=json,
    )
