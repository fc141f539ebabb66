"""The dashboard and the alert rules ask for series that exist, with labels they have."""

from __future__ import annotations

import re
from itertools import combinations

import pytest
import yaml

from server import metrics
from tests.deploy.dashboards import DEPLOY, ROOT, Query, dashboard, queries, rules

EXPORTED = {
    name: series
    for series in metrics.ALL
    for name in (
        [f"{series.name}{suffix}" for suffix in ("_bucket", "_sum", "_count")]
        if series.kind == "histogram"
        else [series.name]
    )
}
# Labels that Prometheus or a histogram adds.
EVERYWHERE = {"instance", "job", "model_name", "le"}
ASKED = [*queries(), *(Query("alert", rule["alert"], rule["expr"]) for rule in rules())]


@pytest.mark.parametrize("query", ASKED, ids=str)
def test_every_series_named_is_exported_and_every_label_is_its_own(query: Query) -> None:
    names = set(re.findall(r"\bengram_\w+", query.expr))
    assert names <= EXPORTED.keys()
    known = EVERYWHERE.union(*(EXPORTED[name].labels for name in names))
    labels = set(re.findall(r'(\w+)\s*=~?\s*"', query.expr))
    for grouped in re.findall(r"by \(([^)]*)\)", query.expr):
        labels |= {label.strip() for label in grouped.split(",")}
    assert labels <= known


def test_the_panels_show_every_series_there_is_or_one_derived_from_it() -> None:
    """What is exported and shown nowhere is listed here, with the reason."""
    shown = {EXPORTED[name] for query in ASKED for name in re.findall(r"\bengram_\w+", query.expr)}
    elsewhere = {
        metrics.CACHE_CONFIG,  # for gateways
        metrics.WAITING,  # by reason
        metrics.PROMPT_TOKENS,  # by source
        metrics.PROMPT_TOKENS_CACHED,
        metrics.UNKNOWN_FIELDS,
        metrics.LONGEST_GENERATION,
        metrics.MAX_TOKENS,
        metrics.CHOICES,
        metrics.PREFILL_TOKENS,
        metrics.TIME_PER_TOKEN,  # between two tokens says the same, token by token
        metrics.INFERENCE,  # prefill and decode
        metrics.HTTP_SECONDS,
        metrics.HOT_LIST_AGE,
    }
    assert set(metrics.ALL) - shown <= elsewhere


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y, (one, other)
        assert one["x"] + one["w"] <= 24


def test_panels_and_variables_use_the_provisioned_datasource() -> None:
    provisioned = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())
    uid = provisioned["datasources"][0]["uid"]
    content = dashboard()
    targets = [target for panel in content["panels"] for target in panel.get("targets", ())]
    for user in [*targets, *content["templating"]["list"]]:
        assert user["datasource"] == {"type": "prometheus", "uid": uid}


def test_every_alert_says_in_the_documentation_what_it_means_and_what_to_do() -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    for rule in rules():
        section = page.partition(f"### {rule['alert']}\n")[2].partition("\n##")[0]
        assert "Means:" in section and "Do:" in section, rule["alert"]
