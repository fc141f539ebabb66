"""Launches of every size share one compilation: what Triton would compile them for, read without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

LAUNCHES = """
import json
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import jit
from kernels import ngram_hash, paged_attention, row_lookup

seen = {}

def run(kernel, *arguments, grid, warmup=False, **named):
    binder = jit.create_function_from_signature(kernel.signature, kernel.params, CUDABackend(GPUTarget("cuda", 90, 32)))
    seen.setdefault(kernel.__name__, set()).add(repr(binder(*arguments, **named)[1]))

jit.JITFunction.run = run
for module in (ngram_hash, paged_attention, row_lookup):
    module.runs_on = lambda tensor: True

def ints(*shape):
    return torch.zeros(*shape, dtype=torch.int64)

cache = torch.zeros(9, 16, 2 * 2 * 32)
form = row_lookup.RowFormat("plain", 32, 64)
constants = ngram_hash.HashConstants(ints(1, 3), ints(1, 2, 4), ints(1, 2, 4), None, (2, 3), 100, 0, 0, False)
for sequences in (1, 2, 3, 16, 17):
    for pages in (1, 3, 16):
        for first in (0, 1):
            table, lengths = ints(sequences + 1, pages)[first:], ints(sequences + 1)[first:]
            query = torch.zeros(2 * len(table), 4, 32)
            paged_attention.prefill(query, cache, table, ints(len(table) + 2)[1:], lengths, 2, 2)
            paged_attention.decode(query[: len(table)], cache, table, lengths, 2)
    lanes = ints(3, sequences)
    rows, mix = ngram_hash.ngram_rows(ints(4, 64), lanes[1], lanes[2], 2, constants)
    sees = torch.zeros(2, sequences, dtype=torch.bool)
    out = torch.zeros(sequences, 8 * 32, dtype=torch.bfloat16)
    row_lookup.lookup(
        torch.zeros(50, 64, dtype=torch.uint8), form, rows[0], mix[0], ints(2), None, out, ints(2, 2), 8, sees[1]
    )
print(json.dumps({name: len(kinds) for name, kinds in seen.items()}))
"""


def test_a_kernel_is_compiled_once_for_all_batches_and_lengths() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", "-c", LAUNCHES]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    once = dict.fromkeys(("prefill_kernel", "decode_kernel", "join_kernel", "hash_kernel", "lookup_kernel"), 1)
    assert json.loads(done.stdout) == once
