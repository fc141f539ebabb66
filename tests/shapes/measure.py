"""A command for one GPU on one of shapes: `python tests/shapes/measure.py VERB …`; its last line says what it told."""

from __future__ import annotations

import json

from server.bench.gpu import __main__ as commands
from server.bench.gpu import session
from tests.shapes.gpu import GPU, simulated


def main() -> None:
    session.open_device = lambda name: GPU
    with simulated() as told:
        commands.main()
    findings = [{"kind": f.kind, "what": f.what, "stack": f.stack} for f in told.findings]
    print(json.dumps({"findings": findings, "counts": dict(told.counts)}))


if __name__ == "__main__":
    main()
