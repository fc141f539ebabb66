"""`serve`: the API server, and what it says to the person who started it once it is ready."""

from __future__ import annotations

import json

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from server.api.serve import run
from server.runtime.client import EngineClient
from server.settings import Settings


def serve(settings: Settings) -> None:
    """Serves until a signal. Raises EngramError if it cannot start."""
    console = Console()
    console.print(f"[dim]loading {escape(settings.model)} …[/dim]")
    run(settings, lambda client: announce(console, settings, client))


def announce(console: Console, settings: Settings, client: EngineClient) -> None:
    """The start-up report, and a command that asks for an answer when pasted."""
    report = Table(show_header=False, box=None, pad_edge=False)
    report.add_column(style="bold")
    report.add_column(overflow="fold")
    for name, value in client.ready.report:
        report.add_row(escape(name), escape(value))
    report.add_row("models", escape(", ".join(name for name, _ in client.ready.models)))
    console.print(report)
    console.print("\nready; ask it something:\n", style="bold green")
    print(curl(settings), flush=True)  # not through rich: a wrapped line would not paste


def curl(settings: Settings) -> str:
    """One line of shell that streams an answer."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)
    message = {"role": "user", "content": "What is the capital of France? Answer in a sentence."}
    body = json.dumps({"messages": [message], "stream": True, "max_tokens": 32, "temperature": 0})
    scheme = "https" if settings.ssl_certfile else "http"
    url = f"{scheme}://{host}:{settings.port}/v1/chat/completions"
    key = " -H 'Authorization: Bearer YOUR-KEY'" if settings.api_key or settings.api_keys_file else ""
    return f"curl -N {url} -H 'Content-Type: application/json'{key} -d '{body}'"
