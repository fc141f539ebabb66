"""What the shipped dashboard and rules ask Prometheus, as plain lists."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "engram.json"
RULES = DEPLOY / "prometheus" / "alerts.yml"
# Rows of panels that are empty on a healthy server without a GPU.
MAY_BE_EMPTY = ("Errors", "GPU")


@dataclass(frozen=True)
class Query:
    """One expression of a panel, and the row it stands in."""

    row: str
    panel: str
    expr: str

    def __str__(self) -> str:
        return f"{self.row}: {self.panel}: {self.expr}"

    def filled(self, interval: str) -> str:
        """Grafana's variables put in, as it would for all servers and tables."""
        return (
            self.expr.replace("$__rate_interval", interval).replace('"$instance"', '".*"').replace('"$table"', '".*"')
        )


def dashboard() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return content


def queries() -> list[Query]:
    row, found = "", []
    for panel in dashboard()["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
        found += [Query(row, panel["title"], target["expr"]) for target in panel.get("targets", ())]
    return found


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
