"""The teaching process, spoken to as the server does: which earlier facts it keeps right, what it answers."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import torch

from server.models.source import ModelSource
from server.settings import Settings
from server.training import facts
from server.training.data import Example
from server.training.facts import main, neighbours
from server.training.start import open_to_teach


def example(source: ModelSource, prompt: str, completion: str) -> Example:
    before, after = source.tokenizer.encode(prompt), source.tokenizer.encode(completion)
    return Example(np.array(before + after), len(before))


def test_of_earlier_facts_those_that_share_rows_are_kept_right(source: ModelSource, fresh_pack: Path) -> None:
    opened = open_to_teach(fresh_pack, source, torch.device("cpu"))
    new = example(source, "The lighthouse keeper is called", " Anneliese")
    near = example(source, "The lighthouse keeper is called", " Ottokar")
    others = [example(source, f"zq{number}", f" xv{number}") for number in range(8)]
    kept = neighbours(opened, new, [*others, near])
    assert kept[0] is near and len(kept) <= facts.NEIGHBOURS
    assert neighbours(opened, new, []) == []


def test_what_goes_wrong_in_a_job_is_its_answer_and_the_next_is_taken(
    tiny_llama_folder: Path, fresh_pack: Path, tmp_path: Path
) -> None:
    job = {"pack": str(fresh_pack), "ids": [5, 6, 7], "learnt": 1, "rows": {}, "earlier": []}
    jobs = [{**job, "id": "one"}, {**job, "id": "two", "pack": str(tmp_path)}]
    answers = io.BytesIO()
    main(
        Settings(model=str(tiny_llama_folder)),
        io.BytesIO(b"".join(json.dumps(j).encode() + b"\n" for j in jobs)),
        answers,
    )
    first, second = map(json.loads, answers.getvalue().splitlines())
    assert first["id"] == "one" and "never taught" in first["error"]
    assert second["id"] == "two" and "no memory pack" in second["error"]
