"""The table of docs/gpu.md, from results: every figure beside its bar, "not measured" where nobody did.

    build/gpu/gpu.json ─ save ─→ docs/results/GPU-DATE.json ─ written ─→ docs/gpu.md, between its two marks

Only runs on a GPU count; of several with the same configuration the latest does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.bench.gpu.baseline_run import BATCHES, PEER_BAR
from server.bench.gpu.device import ROOT
from server.bench.gpu.journal import FORMAT, read
from server.bench.gpu.kernel_run import HITS_BAR, MISSES_BAR
from server.bench.gpu.session import met
from server.bench.gpu.sweep_run import CONCURRENCY, HOST_AT, HOST_BAR, LAYERS_AT, LAYERS_BAR, OVERHEAD_BAR, host_share
from server.bench.gpu.table_run import BARS, OVER_NONE, OVER_RESIDENT, SEQUENCES
from server.bench.gpu.tables import TABLE_GIB
from server.bench.paired import write_json
from server.errors import SettingsError

RESULTS, PAGE = ROOT / "docs/results", ROOT / "docs/gpu.md"
BEGIN, END = "<!-- results: make gpu-report -->", "<!-- end of results -->"
SHAPES = ("qwen3-4b", "qwen3-8b")
NOT_MEASURED = "not measured"

Runs = list[Mapping[str, Any]]
Found = tuple[float, str] | None  # the figure, and how it is written


@dataclass(frozen=True, slots=True)
class Row:
    """A figure that has a bar. `find` looks among the runs of one GPU and shape."""

    words: str
    bar: float
    least: bool
    find: Callable[[Runs], Found]

    def cell(self, runs: Runs) -> str:
        found = self.find(runs)
        if found is None:
            return NOT_MEASURED
        value, shown = found
        return f"{shown}, {met(value, self.bar, least=self.least)}"


def figures(runs: Runs, verb: str, **config: Any) -> Mapping[str, Any] | None:
    """Of the latest run with this verb and, among others, these values."""
    wanted = [
        run
        for run in runs
        if run["verb"] == verb and all(run["config"].get(name) == value for name, value in config.items())
    ]
    return max(wanted, key=lambda run: run["device"]["date"])["figures"] if wanted else None


def paired(name: str, verb: str, **config: Any) -> Callable[[Runs], Found]:
    def find(runs: Runs) -> Found:
        found = figures(runs, verb, **config)
        if found is None:
            return None
        measured, gib = found[name], found["table_gib"]
        low, high = measured["ci95"]
        smaller = "" if gib >= 0.99 * TABLE_GIB or name != "arm_over_none" else f" with {gib:.0f} GiB"
        return measured["median"], f"{measured['median']:.4f} [{low:.4f}, {high:.4f}]{smaller}"

    return find


def value(of: Callable[[Mapping[str, Any]], float], verb: str, **config: Any) -> Callable[[Runs], Found]:
    def find(runs: Runs) -> Found:
        found = figures(runs, verb, **config)
        try:
            return None if found is None else (of(found), f"{of(found):.3f}")
        except KeyError:  # of a kernel that was wrong there is no speed
            return None

    return find


def over_peer(runs: Runs) -> Found:
    ours, theirs = (figures(runs, "baseline", engine=engine, requests=SEQUENCES) for engine in ("ours", "transformers"))
    if ours is None or theirs is None:
        return None
    ratio = ours["tokens_per_s"] / theirs["tokens_per_s"]
    return ratio, f"{ratio:.2f}"


def captured(runs: Runs) -> Found:
    """A step that waits for the host cannot be captured whole; those with staged rows are cut."""
    whole = [run["figures"].get("arms", {}) for run in runs if run["config"].get("arm") != "staged"]
    graphs = [arm["graphs"] * (arm["parts"] == 1) for arms in whole for arm in arms.values() if "parts" in arm]
    return (float(min(graphs)), f"{min(graphs)} graphs") if graphs else None


def host(runs: Runs) -> Found:
    turned, streamed = (figures(runs, "sweep", part=part, concurrency=HOST_AT) for part in ("turns", "streams"))
    if turned is None or streamed is None:
        return None
    share = host_share(dict(turned), dict(streamed))
    return share, f"{share:.2f}"


def rows() -> list[Row]:
    made = [
        Row(f"{arm} over none, {SEQUENCES} sequences, at least {BARS['none']}", BARS["none"], True,
            paired("arm_over_none", "table", arm=arm, sequences=SEQUENCES))
        for arm in OVER_NONE
    ]  # fmt: skip
    made += [
        Row(f"{arm} over resident, {SEQUENCES} sequences, at least {BARS['resident']}", BARS["resident"], True,
            paired("arm_over_resident", "table", arm=arm, sequences=SEQUENCES))
        for arm in OVER_RESIDENT
    ]  # fmt: skip
    made += [
        Row(f"memory over none at {count}, at least {OVERHEAD_BAR}", OVERHEAD_BAR, True,
            paired("arm_over_none", "sweep", part="turns", concurrency=count))
        for count in CONCURRENCY
    ]  # fmt: skip
    made += [
        Row(f"decode at {count}: of the roofline, at least {bar}", bar, True,
            value(lambda found: found["share"], "baseline", decode=count))
        for count, bar in BATCHES.items()
    ]  # fmt: skip
    lookups = (("misses", "of a bare row read", MISSES_BAR), ("hits", "of device bandwidth", HITS_BAR))
    made += [
        Row(f"lookup, {name}: {words}, at least {bar}", bar, True,
            value(lambda found: found["share"], "kernels", case=f"lookup, {name}"))
        for name, words, bar in lookups
    ]  # fmt: skip
    peer = f"over transformers' continuous batching, {SEQUENCES} requests, at least {PEER_BAR}"
    layers = value(lambda found: 1 - found["arm_over_none"]["median"], "sweep", part="turns", concurrency=LAYERS_AT)
    return [
        *made,
        Row(peer, PEER_BAR, True, over_peer),
        Row(f"memory layers at {LAYERS_AT}, at most {LAYERS_BAR} of a step", LAYERS_BAR, False, layers),
        Row(f"host over device time at {HOST_AT}, at most {HOST_BAR}", HOST_BAR, False, host),
        Row("decode steps captured whole: no wait for the host in them", 1.0, True, captured),
    ]


def report(runs: Iterable[Mapping[str, Any]]) -> str:
    """Markdown: a table for every GPU, or one without figures."""
    gpus: dict[str, Runs] = {}
    for run in runs:
        if run["device"]["gpu"] != "cpu":
            gpus.setdefault(run["device"]["gpu"], []).append(run)
    return "\n".join(table(gpu, known) for gpu, known in gpus.items()) if gpus else table("No GPU yet", [])


def table(gpu: str, runs: Runs) -> str:
    shaped = [[run for run in runs if run["config"].get("shape") == shape] for shape in SHAPES]
    lines = [f"### {gpu}", "", f"| figure and bar | {' | '.join(SHAPES)} |", "|---|" + "---|" * len(SHAPES)]
    lines += [f"| {row.words} | {' | '.join(row.cell(known) for known in shaped)} |" for row in rows()]
    return "\n".join([*lines, "", *machines(runs)])


def machines(runs: Runs) -> list[str]:
    """What the figures were measured with."""
    words = {
        f"{d.get('driver', '?')} (driver), torch {d['torch']}, Triton {d['triton']}, commit `{d['commit']}`, "
        f"PCIe {d.get('pcie', {}).get('generation', '?')} x{d.get('pcie', {}).get('width', '?')}, {d['date'][:10]}"
        for d in (run["device"] for run in runs)
    }
    return [*(f"- {each}" for each in sorted(words)), ""] if words else []


def stored(folder: Path = RESULTS) -> list[Mapping[str, Any]]:
    """All runs of the results kept in the repository."""
    files = [path for path in sorted(folder.glob("*.json")) if is_ours(path)]
    return [run for path in files for run in read(path).values()]


def is_ours(path: Path) -> bool:
    """Whether a file of results is of this kind; other experiments keep theirs in the same folder."""
    return f'"format": {FORMAT}' in path.read_text()[:200] and '"runs"' in path.read_text()[:400]


def save(source: Path, folder: Path = RESULTS) -> Path:
    """Keeps a file of results, named by its GPU and latest date. Raises SettingsError if nothing in it is of a GPU."""
    runs = {key: run for key, run in read(source).items() if run["device"]["gpu"] != "cpu"}
    if not runs:
        raise SettingsError(f"{source} holds no figure of a GPU; nothing is saved")
    latest = max(runs.values(), key=lambda run: str(run["device"]["date"]))["device"]
    name = re.sub(r"[^a-z0-9]+", "-", str(latest["gpu"]).lower()).strip("-")
    path = folder / f"{name}-{latest['date'][:10]}.json"
    write_json(path, {"format": FORMAT, "runs": read(path) | runs})
    return path


def page(text: str, results: str) -> str:
    """The page with its table replaced. Raises SettingsError if it has no marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SettingsError(f"{PAGE} has lost its marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{results.rstrip()}\n\n{END}{after}"
