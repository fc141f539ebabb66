"""Closed loop: `locust -f loadtest/locustfile.py [USER …] --host http://127.0.0.1:8000 -u 8 -r 8`.

Without names all kinds of users run side by side; with names only those, such as `Streaming`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # Locust knows only this file's own folder

from loadtest.users import Chat, Completion, Mixed, Streaming, StreamingChat

__all__ = ["Chat", "Completion", "Mixed", "Streaming", "StreamingChat"]
