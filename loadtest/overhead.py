"""What an offloaded memory costs over HTTP, with its error bar: `make overhead`.

Three servers over one model stay up and are asked in turns by one Locust user (`arms.py`):

    none       no memory                       what the memory costs at all
    resident   --placement device              the table on the device
    offload    --placement mapped              the table in its file: what is claimed to cost nothing more

All are held to the same processors and threads. Exit code 0 if the 95 % interval of offload over resident lies under
`--bound` at every width, 1 if it lies above at one, 2 if neither can be said; then the claim is the step-level one of
`engram-server bench offload`, which resolves more, and its newest figure is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, Python knows only this file's own folder

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from loadtest import figures
from loadtest.plot import plot
from server.bench.http_streams import free_port
from server.bench.paired import machine, write_json
from server.settings import DEFAULT_MODEL

ARMS: dict[str, tuple[str, ...]] = {
    "none": (),
    "resident": ("--placement", "device"),
    "offload": ("--placement", "mapped"),
}
ROOT = Path(__file__).parents[1]
READY_SECONDS = 300.0
# More cores than this: the last one is Locust's alone.
SHARED_CORES = 3


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="overhead", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--memory", type=Path, help="pack; default: one made for the model under OUT")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "overhead")
    parser.add_argument("--seconds", type=float, default=240.0, help="how long to measure, after the first round")
    parser.add_argument("--bound", type=float, default=3.0, help="percent")
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 8], help="requests at once")
    parser.add_argument("--words", type=int, default=48, help="length of a prompt")
    parser.add_argument("--tokens", type=int, default=32, help="length of an answer")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="further flags of every server")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    options, console = arguments(given), Console()
    options.out.mkdir(parents=True, exist_ok=True)
    records = options.out / "records.jsonl"
    records.unlink(missing_ok=True)
    pack = options.memory or default_pack(options.model, options.out / "pack")
    with contextlib.ExitStack() as servers:
        console.print(f"[dim]starting {', '.join(options.arms)} …[/dim]")
        ports = {arm: servers.enter_context(server_of(arm, pack, options)) for arm in options.arms}
        before = {arm: totals(port) for arm, port in ports.items()}
        console.print(f"[dim]asking in turns for {options.seconds:.0f} s …[/dim]")
        drive(ports, records, options)
        spent = {arm: difference(before[arm], totals(port)) for arm, port in ports.items()}
    result = summary(figures.turns(records), spent, options)
    write_json(options.out / "overhead.json", result)
    write_csv(options.out / "overhead.csv", figures.turns(records))
    plot(figures.turns(records), options.bound / 100, options.out / "overhead.png")
    show(console, result)
    return int(result["exit_code"])


# ── servers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def default_pack(model: str, folder: Path) -> Path:
    """A fresh pack: it changes no answer, but every token reads its rows."""
    if not (folder / "config.json").exists():
        subprocess.run([sys.executable, "-m", "server", "attach", model, "--out", str(folder)], cwd=ROOT, check=True)
    return folder


@contextlib.contextmanager
def server_of(arm: str, pack: Path, options: argparse.Namespace) -> Iterator[int]:
    """An arm's server, ready; yields its port. Raises SystemExit if it does not come up."""
    cores = sorted(os.sched_getaffinity(0))
    cores = cores[:-1] if len(cores) > SHARED_CORES else cores
    memory = () if arm == "none" else ("--memory", str(pack), *ARMS[arm])
    port, log = free_port(), options.out / f"{arm}.log"
    flags = ("--model", options.model, "--port", str(port), "--threads", str(len(cores)), *memory, *options.serve)
    environment = {**os.environ, "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "2000")}  # several share the cores
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "server", "serve", *flags],
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=out,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),  # inherited by the engine's process
        )
    try:
        wait_until_ready(process, port, log)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
            return
        time.sleep(0.2)
    raise SystemExit(f"a server did not get ready; {log} ends with: {log.read_text(errors='replace')[-500:]}")


def drive(ports: dict[str, int], records: Path, options: argparse.Namespace) -> None:
    """Runs Locust until the time is over."""
    plan = {
        "arms": {arm: f"http://127.0.0.1:{port}" for arm, port in ports.items()},
        "records": str(records.resolve()),
        **{name: getattr(options, name) for name in ("widths", "words", "tokens", "seconds", "seed")},
    }
    path = options.out / "plan.json"
    path.write_text(json.dumps(plan), encoding="utf-8")
    locust = (
        "-m",
        "locust",
        "-f",
        "loadtest/arms.py",
        "--headless",
        "-u",
        "1",
        "--only-summary",
        "--exit-code-on-error",
    )
    command = [sys.executable, *locust, "0", "--host", next(iter(plan["arms"].values())), "--plan", str(path)]
    with (options.out / "locust.log").open("wb") as log:
        subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=True)
    if not records.exists():
        raise SystemExit(f"no round was finished; see {options.out / 'locust.log'}, or give more --seconds")


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def totals(port: int) -> dict[str, float]:
    """Sums of what the server counts, over all labels but the tier."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name + (f"/{sample.labels['tier']}" if "tier" in sample.labels else "")
            sums[name] = sums.get(name, 0.0) + sample.value
    return sums


def difference(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


def memory_use(spent: dict[str, float]) -> dict[str, float] | None:
    """Hit rate of the device, stall as a share of step time and of fetch time; None if no rows were read."""
    rows, steps = spent.get("engram_memory_rows_total", 0.0), spent["engram_step_seconds_total"]
    if not rows:
        return None
    stall = spent["engram_memory_stall_seconds_total"]
    fetch = spent.get("engram_memory_fetch_seconds_sum", 0.0)  # a table on the device is not fetched
    return {
        "rows": rows,
        "hit_rate": spent["engram_memory_hits_total/device"] / rows,
        "stall_share": stall / steps,
        "overlap": 1 - stall / fetch if fetch else 1.0,
        "bytes_read": spent["engram_memory_bytes_total"],
    }


def summary(
    taken: list[figures.Turn], spent: dict[str, dict[str, float]], options: argparse.Namespace
) -> dict[str, Any]:
    measured = figures.overheads(taken)
    found = {
        "experiment": "overhead",
        "machine": machine(),
        "model": options.model,
        "bound_percent": options.bound,
        "rounds": len({turn.round for turn in taken}),
        "overhead": {pair: {str(w): r.as_json() for w, r in of_pair.items()} for pair, of_pair in measured.items()},
        "latency": figures.latencies(taken),
        "memory": {arm: memory_use(totals) for arm, totals in spent.items()},
        "same_text_offload_and_resident": figures.same_texts(taken, "offload", "resident"),
        "exit_code": figures.verdict(measured.get("offload over resident", {}), options.bound / 100),
    }
    claim = figures.step_level_claim([ROOT / "build" / "bench", ROOT / "docs" / "results"])
    if claim is not None:
        found["step_level"] = {"file": os.path.relpath(claim[0], ROOT), "offload_over_resident": claim[1]}
    return found


def write_csv(path: Path, taken: list[figures.Turn]) -> None:
    """One line per turn."""
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(("round", "arm", "width", "seconds", "ttft_mean_s", "inter_token_mean_s", "tokens"))
        for turn in taken:
            means = (sum(turn.ttfts) / len(turn.ttfts), sum(turn.gaps) / max(len(turn.gaps), 1))
            lines.writerow((turn.round, turn.arm, turn.width, turn.seconds, *means, len(turn.gaps) + len(turn.ttfts)))


def show(console: Console, result: dict[str, Any]) -> None:
    rows = Table(title=f"overhead, {result['model']}, {result['rounds']} rounds")
    for column in ("", "at once", "overhead", "95 %"):
        rows.add_column(column, justify="right")
    for pair, of_pair in result["overhead"].items():
        for width, each in of_pair.items():
            low, high = each["ci95"]
            rows.add_row(pair, width, f"{each['median'] - 1:+.1%}", f"{low - 1:+.1%} to {high - 1:+.1%}")
    console.print(rows)
    times = Table(title="milliseconds")
    for column in ("arm", "at once", "TTFT p50", "p95", "between tokens p50", "p95", "p99", "tokens/s"):
        times.add_column(column, justify="right")
    for arm, widths in result["latency"].items():
        for width, each in widths.items():
            first, gaps = each["ttft_ms"], each["inter_token_ms"]
            shown = (first["p50"], first["p95"], gaps["p50"], gaps["p95"], gaps["p99"], each["tokens_per_s"])
            times.add_row(arm, str(width), *(f"{value:.1f}" for value in shown))
    console.print(times)
    for arm, use in result["memory"].items():
        if use is not None:
            console.print(
                f"{arm}: {use['rows']:,.0f} rows, device hit rate {use['hit_rate']:.1%}, stall "
                f"{use['stall_share']:.2%} of step time, {use['overlap']:.1%} of fetching hidden"
            )
    verdicts = ("lies under", "lies above", "cannot be told from")
    console.print(f"offload over resident {verdicts[result['exit_code']]} the bound of {result['bound_percent']:g} %")
    if result["exit_code"] == figures.UNCLEAR:
        show_claim(console, result)


def show_claim(console: Console, result: dict[str, Any]) -> None:
    if "step_level" not in result:
        console.print("step by step in one process resolves more: engram-server bench offload")
        return
    shown = ", ".join(
        f"{width} at once {1 - each['median']:+.1%} ({1 - each['ci95'][1]:+.1%} to {1 - each['ci95'][0]:+.1%})"
        for width, each in result["step_level"]["offload_over_resident"].items()
    )
    console.print(
        f"step by step in one process (bench offload, {result['step_level']['file']}), throughput lost: {shown}"
    )


if __name__ == "__main__":
    sys.exit(main())
