"""Overheads and verdicts of made-up records with known answers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from loadtest.figures import OVER, UNCLEAR, UNDER, overheads, paired, same_texts, step_level_claim, turns, verdict

ARMS = {"none": 0.9, "resident": 1.0, "offload": 1.0}


def record(number: int, arm: str, width: int, seconds: float, text: str = "a") -> dict[str, Any]:
    answers = [{"sent": 10.0, "arrivals": [10 + seconds / 2, 10 + seconds], "text": text} for _ in range(width)]
    return {"round": number, "arm": arm, "width": width, "answers": answers}


def written(path: Path, slower: float, rounds: int, noise: float = 0.002) -> Path:
    """Rounds in which a machine's speed drifts by 50 % and offload takes `slower` times resident's time."""
    draw, lines = random.Random(0), []
    for number in range(rounds):
        speed = 1 + 0.5 * number / rounds
        for width in (1, 8):
            for arm, factor in ARMS.items():
                factor *= slower if arm == "offload" else 1.0
                lines.append(record(number, arm, width, speed * factor * (1 + draw.gauss(0, noise))))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("slower", "rounds", "noise", "expected"),
    [
        (1.01, 40, 0.002, UNDER),
        (1.06, 40, 0.002, OVER),
        (1.01, 40, 0.1, UNCLEAR),
        (1.03, 40, 0.02, UNCLEAR),
        (1.06, 4, 0.002, UNCLEAR),  # too few rounds to say anything
    ],
)
def test_the_verdict_needs_the_whole_interval_on_one_side(
    slower: float, rounds: int, noise: float, expected: int, tmp_path: Path
) -> None:
    measured = overheads(turns(written(tmp_path / "records", slower, rounds, noise)))
    assert verdict(measured["offload over resident"], 0.03) == expected


def test_pairing_by_round_takes_the_drift_out(tmp_path: Path) -> None:
    measured = overheads(turns(written(tmp_path / "records", 1.01, 40)))
    assert set(measured) == {"offload over resident", "offload over none", "resident over none"}
    assert measured["offload over resident"][8].median == pytest.approx(1.01, abs=0.002)  # the noise of a pair
    assert measured["resident over none"][1].median == pytest.approx(1 / 0.9, abs=0.002)


@pytest.mark.parametrize("rounds", [1, 2, 11, 12, 60])
def test_the_interval_holds_the_median_however_few_the_rounds(rounds: int) -> None:
    draw = random.Random(1)
    measured = paired([1 + draw.gauss(0, 0.1) for _ in range(rounds)], [1.0] * rounds)
    assert measured.ci95[0] <= measured.median <= measured.ci95[1] and measured.pairs == rounds


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    draw, covered = random.Random(2), 0
    for _ in range(200):
        ratios = [1.01 * (1 + draw.gauss(0, 0.05)) for _ in range(24)]
        low, high = paired(ratios, [1.0] * 24).ci95
        covered += low <= 1.01 <= high
    assert 181 <= covered <= 200  # at least 95 % of 200, less three standard deviations of a count


def test_one_width_above_the_bound_is_enough() -> None:
    from server.bench.paired import Ratio

    fine, slow = Ratio(1.0, (0.99, 1.01), 20), Ratio(1.1, (1.05, 1.2), 20)
    assert verdict({1: fine, 8: slow}, 0.03) == OVER
    assert verdict({}, 0.03) == UNCLEAR


def test_a_round_that_was_cut_short_counts_for_no_arm(tmp_path: Path) -> None:
    path = written(tmp_path / "records", 1.01, 10)
    path.write_text(path.read_text() + json.dumps(record(10, "none", 1, 1.0)) + "\n")
    assert {turn.round for turn in turns(path)} == set(range(10))


def test_answers_are_compared_prompt_by_prompt(tmp_path: Path) -> None:
    path = tmp_path / "records"
    lines = [record(0, "resident", 2, 1.0), record(0, "offload", 2, 1.0)]
    lines[1]["answers"][0]["text"] = "b"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert same_texts(turns(path), "offload", "resident") == 0.5
    assert same_texts(turns(path), "offload", "none") is None


def test_the_step_level_claim_is_the_first_folders_newest_result(tmp_path: Path) -> None:
    built, stored = tmp_path / "build", tmp_path / "results"
    for folder in (built, stored):
        folder.mkdir()
    assert step_level_claim([built, stored]) is None
    claim = {"1": {"median": 0.997, "ci95": [0.99, 1.0]}}
    (stored / "offload-cpu.json").write_text(json.dumps({"ratios": {"offload_over_resident": {"throughput": claim}}}))
    (built / "offload.json").write_text("{}")
    assert step_level_claim([built, stored]) == (stored / "offload-cpu.json", claim)
