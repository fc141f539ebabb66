"""Measuring one GPU: `python -m server.bench.gpu VERB`, on a machine with torch, Triton and nothing else of ours.

    kernels   every kernel beside float64, then beside the device's own ceilings
    table     what a memory in host RAM costs, over none and over the same one resident: the paper's table
    sweep     the engine from 1 to 512 streams: throughput, TTFT, time between tokens, beside their ceilings
    baseline  decode beside the roofline, and beside transformers' continuous batching
    test      tests/gpu and tests/kernels on the device; compute-sanitizer where it is there
    report    the table of docs/gpu.md from the results
    trace     the stored text

Every command watches its own time, goes on where the last one stopped, and files what it found in $OUT/gpu.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.bench.gpu.journal import FILE, HOME
from server.bench.gpu.tables import TABLE_GIB
from server.errors import EngramError

app = typer.Typer(name="gpu", help="Measure one GPU.", no_args_is_help=True, pretty_exceptions_enable=False)

Device = Annotated[str, typer.Option(envvar="DEVICE", help="cuda, or cpu to try the command out")]
Shape = Annotated[str, typer.Option(envvar="SHAPE", help="qwen3-4b, qwen3-8b or tiny")]
Seconds = Annotated[float, typer.Option(envvar="GPU_SECONDS", min=1, help="of wall time that the command may take")]
Out = Annotated[Path, typer.Option(envvar="OUT", help="the folder of results")]
Gib = Annotated[float, typer.Option(envvar="TABLE_GIB", min=0.001, help="of table; 93 are 100 billion parameters")]

Sequences = Annotated[int, typer.Option(envvar="SEQUENCES", min=1, help="at once, at most")]
PairSeconds = Annotated[
    float, typer.Option(envvar="PAIR_SECONDS", min=0.1, help="of measuring each arm beside the other")
]


@app.command()
def kernels(
    device: Device = "cuda",
    shape: Shape = "qwen3-4b",
    seconds: Seconds = 450,
    out: Out = HOME,
    gib: Gib = TABLE_GIB,
    only: Annotated[str, typer.Option(help="only the kernels with this word in their names")] = "",
) -> None:
    """Every kernel beside its formula in float64, then its speed beside ceilings measured in the same run."""
    from server.bench.gpu.kernel_run import run
    from server.bench.gpu.session import Session

    run(Session.open("kernels", device, shape, seconds, out), gib, only)


@app.command()
def table(
    device: Device = "cuda",
    shape: Shape = "qwen3-4b",
    arms: Annotated[str, typer.Option(envvar="ARMS", help="which, with commas between; none named: all")] = "",
    seconds: Seconds = 450,
    out: Out = HOME,
    gib: Gib = TABLE_GIB,
    sequences: Sequences = 512,
    pair_seconds: PairSeconds = 30,
) -> None:
    """What a memory in host RAM costs over none, and over the same rows on the device."""
    from server.bench.gpu.session import Session
    from server.bench.gpu.table_run import chosen, run

    names = chosen(arms)
    run(Session.open("table", device, shape, seconds, out), names, gib, sequences, pair_seconds)


@app.command()
def sweep(
    device: Device = "cuda",
    shape: Shape = "qwen3-4b",
    seconds: Seconds = 450,
    out: Out = HOME,
    gib: Gib = TABLE_GIB,
    sequences: Sequences = 512,
    pair_seconds: PairSeconds = 15,
) -> None:
    """The engine from 1 to 512 streams, each figure beside its ceiling."""
    from server.bench.gpu.session import Session
    from server.bench.gpu.sweep_run import run

    run(Session.open("sweep", device, shape, seconds, out), gib, sequences, pair_seconds)


@app.command()
def baseline(
    device: Device = "cuda",
    shape: Shape = "qwen3-4b",
    seconds: Seconds = 450,
    out: Out = HOME,
    sequences: Sequences = 512,
    pair_seconds: PairSeconds = 10,
) -> None:
    """The dense model beside the roofline, and beside transformers' continuous batching."""
    from server.bench.gpu.baseline_run import run
    from server.bench.gpu.session import Session

    run(Session.open("baseline", device, shape, seconds, out), sequences, pair_seconds)


@app.command()
def test(device: Device = "cuda", seconds: Seconds = 450, out: Out = HOME) -> None:
    """The tests that need a device, the kernels' own compiled for it, and compute-sanitizer."""
    from server.bench.gpu.session import Session
    from server.bench.gpu.test_run import run

    run(Session.open("test", device, "tiny", seconds, out), out)


@app.command()
def report(
    results: Annotated[Path | None, typer.Argument(help="a file of results; default: those in docs/results")] = None,
    save: Annotated[
        bool, typer.Option(help="keep $OUT's results in docs/results and put them into docs/gpu.md")
    ] = False,
    out: Out = HOME,
) -> None:
    """Every figure beside its bar, as docs/gpu.md has them."""
    from server.bench.gpu.journal import read
    from server.bench.gpu.report import PAGE, page, stored
    from server.bench.gpu.report import report as made
    from server.bench.gpu.report import save as keep

    if save:
        typer.echo(f"saved to {keep(out / FILE)}")
        PAGE.write_text(page(PAGE.read_text(), made(stored())))
    typer.echo(made(stored() if results is None else read(results).values()))


@app.command()
def trace(
    remake: Annotated[bool, typer.Option(help="from its texts; needs the default model's tokenizer")] = False,
) -> None:
    """The stored text: how many tokens it has, how many of its n-grams are distinct."""
    from server.bench.gpu.trace import Trace, made, store

    if remake:
        store(made())
    typer.echo(Trace.stored().described())


def main() -> None:
    """Ends with one line and the error's exit code where something is in the way."""
    try:
        app()
    except EngramError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
