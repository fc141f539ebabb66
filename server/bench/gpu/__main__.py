"""Measuring one GPU: `python -m server.bench.gpu VERB`, on a machine with torch, Triton and little else.

    kernels   every kernel beside float64, then beside the device's own ceilings
    table     what a memory in host RAM costs, over none and over the same one resident: the paper's table
    sweep     the engine from 1 to 512 streams: throughput, TTFT, time between tokens, beside their ceilings
    baseline  decode beside the roofline, and beside transformers' continuous batching
    test      tests/gpu and tests/kernels on the device; compute-sanitizer where it is there
    report    the table of docs/gpu.md from the results
    trace     the stored text

Every command watches its own time, goes on where the last one stopped, and files what it found in $OUT/gpu.json. The
standard library reads the command line: newer releases of typer bring pydantic, which such a machine need not have.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.bench.gpu.journal import FILE, HOME
from server.bench.gpu.tables import TABLE_GIB
from server.errors import EngramError

Arguments = argparse.Namespace


@dataclass(frozen=True, slots=True)
class Flag:
    """`variable`: of the environment, whose value counts where the flag is not given."""

    kind: Callable[[str], Any]
    default: Any
    variable: str
    help: str


FLAGS = {
    "device": Flag(str, "cuda", "DEVICE", "cuda, or cpu to try the command out"),
    "shape": Flag(str, "qwen3-4b", "SHAPE", "qwen3-4b, qwen3-8b or tiny"),
    "seconds": Flag(float, 450.0, "GPU_SECONDS", "of wall time that the command may take"),
    "out": Flag(Path, HOME, "OUT", "the folder of results"),
    "gib": Flag(float, TABLE_GIB, "TABLE_GIB", "of table; 93 are 100 billion parameters"),
    "sequences": Flag(int, 512, "SEQUENCES", "at once, at most"),
    "pair-seconds": Flag(float, None, "PAIR_SECONDS", "of measuring each arm beside the other"),
    "arms": Flag(str, "", "ARMS", "which, with commas between; none named: all"),
    "only": Flag(str, "", "ONLY", "only the kernels with this word in their names"),
}
COMMON = ("device", "shape", "seconds", "out")


def kernels(given: Arguments) -> None:
    """Every kernel beside its formula in float64, then its speed beside ceilings measured in the same run."""
    from server.bench.gpu.kernel_run import run

    run(session("kernels", given), given.gib, given.only)


def table(given: Arguments) -> None:
    """What a memory in host RAM costs over none, and over the same rows on the device."""
    from server.bench.gpu.table_run import chosen, run

    arms = chosen(given.arms)
    run(session("table", given), arms, given.gib, given.sequences, given.pair_seconds or 30.0)


def sweep(given: Arguments) -> None:
    """The engine from 1 to 512 streams, each figure beside its ceiling."""
    from server.bench.gpu.sweep_run import run

    run(session("sweep", given), given.gib, given.sequences, given.pair_seconds or 15.0)


def baseline(given: Arguments) -> None:
    """The dense model beside the roofline, and beside transformers' continuous batching."""
    from server.bench.gpu.baseline_run import run

    run(session("baseline", given), given.sequences, given.pair_seconds or 10.0)


def test(given: Arguments) -> None:
    """The tests that need a device, the kernels' own compiled for it, and compute-sanitizer."""
    from server.bench.gpu.test_run import run

    given.shape = "tiny"
    run(session("test", given), given.out)


def report(given: Arguments) -> None:
    """Every figure beside its bar, as docs/gpu.md has them."""
    from server.bench.gpu.journal import read
    from server.bench.gpu.report import PAGE, page, save, stored
    from server.bench.gpu.report import report as made

    if given.save:
        print(f"saved to {save(given.out / FILE)}")
        PAGE.write_text(page(PAGE.read_text(), made(stored())))
    print(made(stored() if given.results is None else read(given.results).values()))


def trace(given: Arguments) -> None:
    """The stored text: how many tokens it has, how many of its n-grams are distinct."""
    from server.bench.gpu.trace import Trace, made, store

    if given.remake:
        store(made())
    print(Trace.stored().described())


VERBS: dict[Callable[[Arguments], None], tuple[str, ...]] = {
    kernels: (*COMMON, "gib", "only"),
    table: (*COMMON, "arms", "gib", "sequences", "pair-seconds"),
    sweep: (*COMMON, "gib", "sequences", "pair-seconds"),
    baseline: (*COMMON, "sequences", "pair-seconds"),
    test: ("device", "seconds", "out"),
    report: ("out",),
    trace: (),
}


def session(verb: str, given: Arguments) -> Any:
    from server.bench.gpu.session import Session

    return Session.open(verb, given.device, given.shape, given.seconds, given.out)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m server.bench.gpu", description="Measure one GPU.")
    verbs = made.add_subparsers(metavar="VERB", required=True)
    for verb, names in VERBS.items():
        own = verbs.add_parser(verb.__name__, help=verb.__doc__, description=verb.__doc__)
        own.set_defaults(verb=verb)
        for name in names:
            flag = FLAGS[name]
            default = os.environ.get(flag.variable) or flag.default
            words = f"{flag.help} [{flag.variable}={default}]".replace("%", "%%")
            own.add_argument(f"--{name}", type=flag.kind, default=default, help=words)
        if verb is report:
            own.add_argument("results", type=Path, nargs="?", help="a file of results; default: those in docs/results")
            own.add_argument("--save", action="store_true", help="keep $OUT's results, and fill in docs/gpu.md")
        if verb is trace:
            own.add_argument("--remake", action="store_true", help="from its texts, by the default model's tokenizer")
    return made


def main() -> None:
    """Ends with one line and the error's exit code where something is in the way."""
    given = parser().parse_args()
    try:
        given.verb(given)
    except EngramError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
