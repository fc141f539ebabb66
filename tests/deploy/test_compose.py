"""docker-compose.yml: held to the specification's schema, and to the files and settings it names."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import jsonschema
import pytest
import yaml

from server.settings import FIELDS, variable
from tests.deploy.dashboards import DEPLOY, ROOT


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return content


def test_it_follows_the_compose_specification(compose: dict[str, Any]) -> None:
    schema = files("check_jsonschema").joinpath("builtin_schemas/vendor/compose-spec.json").read_text()
    jsonschema.validate(compose, json.loads(schema))


def test_every_file_it_mounts_is_shipped(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("./deploy"):
                assert (ROOT / source).exists(), source


def test_servers_differ_by_profile_image_and_gpu_alone(compose: dict[str, Any]) -> None:
    cpu, gpu = (dict(compose["services"][f"server-{kind}"]) for kind in ("cpu", "gpu"))
    assert (cpu.pop("profiles"), gpu.pop("profiles")) == (["cpu"], ["gpu"])
    assert (cpu.pop("build")["target"], gpu.pop("build")["target"]) == ("cpu", "cuda")
    assert cpu.pop("image") != gpu.pop("image") and gpu.pop("deploy")
    assert cpu == gpu
    assert cpu["shm_size"] and cpu["mem_limit"]


def test_no_service_comes_up_without_a_key_and_each_gets_the_same(compose: dict[str, Any]) -> None:
    for name in ("server-cpu", "server-gpu", "load"):
        assert compose["services"][name]["environment"]["ENGRAM_API_KEY"].startswith("${ENGRAM_API_KEY:?")
    secret = compose["services"]["prometheus"]["secrets"][0]
    assert compose["secrets"][secret["source"]] == {"environment": "ENGRAM_API_KEY"}
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    inside = config["scrape_configs"][0]["authorization"]["credentials_file"]
    assert secret["target"] == f"/etc/prometheus/{inside}"


def test_its_variables_are_settings(compose: dict[str, Any]) -> None:
    known = {variable(name) for name in FIELDS}
    for name in ("server-cpu", "server-gpu"):
        assert compose["services"][name]["environment"].keys() <= known


def test_prometheus_and_grafana_find_each_other_and_the_server(compose: dict[str, Any]) -> None:
    services = compose["services"]
    targets = yaml.safe_load((DEPLOY / "prometheus/targets-compose/server.yml").read_text())
    assert targets[0]["targets"] == [f"{services['server-cpu']['networks']['default']['aliases'][0]}:8000"]
    provisioned = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())
    assert provisioned["datasources"][0]["url"] == "http://prometheus:9090"
    provider = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/engram.yml").read_text())["providers"][0]
    assert f"./deploy/grafana/dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]


def test_nothing_is_published_beyond_this_machine(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", ())]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)


def test_docker_compose_up_starts_a_server_without_naming_a_profile() -> None:
    lines = (ROOT / ".env").read_text().splitlines()
    assert "COMPOSE_PROFILES=cpu" in lines and not any(line.startswith("ENGRAM_API_KEY") for line in lines)
