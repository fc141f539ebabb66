"""Every kernel compiled to cubin for sm_80 and sm_90 without a GPU, by Triton's own ptxas: `python -m kernels.aot`.

What the interpreter cannot see shows here: an operator that this Triton lacks, code that ptxas rejects, loads that lost
their width because an address lost its alignment, and registers that do not suffice. Prints one line a kernel and
target; exit status 1 on a failure.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "0")  # see kernels/language.py

from kernels import (
    gated_product,
    memory_gate,
    ngram_hash,
    paged_attention,
    reads,
    rms_norm,
    rotary,
    row_lookup,
    row_patch,
    sampling,
    short_conv,
    stem_rows,
)

CAPABILITIES = (80, 90)


@dataclass(frozen=True)
class Case:
    """A kernel as it is launched: the types of its arguments in order, its constants, the width its loads must have,
    the warps of a program; `stack`: bytes a thread may spill."""

    name: str
    kernel: Any
    types: tuple[str, ...]
    constants: dict[str, Any]
    vector: str | None = None
    warps: int = 4
    stack: int = 0


def cases() -> Iterator[Case]:
    yield Case(
        "ngram_hash",
        ngram_hash.hash_kernel,
        ("*i64",) * 9 + ("i32", "i64", "i64", "i64", "i64"),
        dict(
            PAD=2,
            N=3,
            ORDERS=2,
            ORDER_MASK=0b1100,
            HEADS=8,
            HEADS_PADDED=8,
            COMPRESSED=True,
            OLDEST_FIRST=False,
            BLOCK=64,
        ),
    )
    yield from lookups()
    yield from bare_reads()
    yield Case(
        "row_patch",
        row_patch.patch_kernel,
        ("*bf16", "*i64", "*i64", "*i64", "*bf16"),
        dict(COLUMNS=16, PADDED=16, D=256, BLOCK=256, N=4096, HALVINGS=13, SCOPES=2, ROW_BITS=40),
        vector="ld.global.v4",
    )
    gate = dict(HC=1, H=1280, BLOCK=2048, DEAD=True, ZERO_IS_PLUS=False)
    for conv in (False, True):
        yield Case(
            f"memory_gate{' with convolution' * conv}",
            memory_gate.gate_kernel,
            ("*fp32", "*bf16", "*bf16", "*fp32", "*fp32", "*bf16" if conv else "*fp32", "*i64", "*i1", "*fp32")
            + ("i32",) * 4
            + ("fp32",) * 3,
            {**gate, "CONV": conv},
            vector="ld.global.v",
        )
    yield Case(
        "short_conv",
        short_conv.conv_kernel,
        ("*fp32", "*fp32", "*bf16", "*fp32", "*bf16", "*i64", "*i64", "*i64", "*i1") + ("i32",) * 5,
        dict(HC=1, H=1280, K=4, BLOCK=512, DEAD=True),
    )
    yield Case(
        "stem_rows",
        stem_rows.stem_kernel,
        ("*bf16", "*bf16", "*i64", "*bf16", "i32", "i32"),
        dict(F=9728, BLOCK=1024),
        vector="ld.global.v4",
    )
    yield Case(
        "rms_norm",
        rms_norm.norm_kernel,
        ("*fp32", "*bf16", "*fp32", "*bf16", "fp32"),
        dict(H=2560, BLOCK=4096, ADD=True),
        vector="ld.global.v4",
    )
    yield Case(
        "rotary, with norms", rotary.rotary_kernel, ("*bf16", "*fp32", "*i64", "*fp32", "i32", "fp32"),
        dict(N=40, HALF=64, BLOCK_N=64, BLOCK=64, NORM=True),
    )  # fmt: skip
    yield Case(
        "gated_product",
        gated_product.product_kernel,
        ("*bf16", "*bf16"),
        dict(F=9728, BLOCK=1024, GELU=True),
        vector="ld.global.v4",
    )
    yield Case(
        "sampling",
        sampling.sample_kernel,
        ("*fp32", "*fp32", "*i64", "*fp32", "*fp32", "*i64", "*i64", "*i64", "*fp32", "*i32", "i32", "i32"),
        dict(FILTER=True, LIST=4096, BLOCK=4096),
        vector="ld.global.v4",
        warps=sampling.WARPS,
        stack=16,  # under Triton 3.6
    )
    yield Case(
        "write_kv", paged_attention.write_kernel, ("*bf16", "*i64", "*bf16", "i32"), dict(WIDTH=2048, BLOCK=2048),
        vector="ld.global.v4",
    )  # fmt: skip
    heads = dict(D=128, DP=128, KV_HEADS=8, WIDEN=False)
    yield Case(
        "paged decode",
        paged_attention.decode_kernel,
        ("*bf16", "*bf16", "*i64", "*i64", "*fp32", "*fp32", "i32", "i32", "i32", "i32", "fp32"),
        {**heads, "GROUP": 4, "GP": 16, "SPLIT": 512, "BLOCK": 64},
        vector="ld.global.v4",
    )
    yield Case(
        "paged decode, joined",
        paged_attention.join_kernel,
        ("*fp32", "*fp32", "*bf16", "i32"),
        dict(D=128, DP=128, SP=8, HEADS=32),
    )
    yield Case(
        "paged prefill",
        paged_attention.prefill_kernel,
        ("*bf16", "*bf16", "*i64", "*i64", "*i64", "*bf16", "i32", "i32", "i32", "i32", "fp32"),
        {**heads, "HEADS": 32, "BLOCK_Q": 64, "BLOCK": 64},
        stack=64,  # on sm_80: a few registers of 255
    )


def bare_reads() -> Iterator[Case]:
    """Rows of 80 bytes, the paper's 80 values in fp8."""
    yield Case("sum of words", reads.sum_kernel, ("*i32", "*i32", "i32"), dict(BLOCK=1024), vector="ld.global.v4")
    yield Case(
        "copy of rows",
        reads.rows_kernel,
        ("*i32", "*i64", "*i32", "i32"),
        dict(WORDS=20, WORDS_PADDED=32, ROWS=16),
        vector="ld.global.v4",
    )


def lookups() -> Iterator[Case]:
    """Rows of 256 values, 8 heads, as the paper's and DeepSeek's tables have them; strides that 16 divides. STEM's."""
    ngrams = dict(ORDERS=2, ORDERS_PADDED=2, HEADS=8, D=256, WAYS=32, WAYS_PADDED=32, HEADS_PADDED=8, BLOCK=256)
    token = dict(ORDERS=1, ORDERS_PADDED=1, HEADS=1, D=9728, WAYS=16, WAYS_PADDED=16, HEADS_PADDED=1, BLOCK=4096)
    for kind, number in row_lookup.KINDS.items():
        stored, stride = ("*bf16", 256) if kind == "plain" else ("*u8", 256 if kind == "float8_e4m3" else 272)
        yield lookup_case(f"{kind} rows", stored, {**ngrams, "KIND": number, "STRIDE": stride})
    yield lookup_case("a token's row", "*bf16", {**token, "KIND": 0, "STRIDE": 9728})


def lookup_case(what: str, stored: str, constants: dict[str, Any]) -> Case:
    return Case(
        f"row_lookup of {what}",
        row_lookup.lookup_kernel,
        (stored, stored, *("*i64",) * 5, "*i1", "*bf16", "*i64", "i32", "i32", "fp32"),
        {**constants, "CACHED": True, "MASKED": True},
        vector="ld.global.v4.b32",
    )


def compiled(case: Case, capability: int) -> Any:
    """Triton's compiled kernel, with `.asm["ptx"]` and `.asm["cubin"]`. Raises what Triton or ptxas raise."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [name for name in case.kernel.arg_names if name not in case.constants]
    signature = dict(zip(names, case.types, strict=True)) | dict.fromkeys(case.constants, "constexpr")
    places = {name: index for index, name in enumerate(case.kernel.arg_names)}
    # As a launch specialises: addresses, strides and vocabularies that 16 divides, but for what `jit_for_any` names.
    attrs = {
        (places[name],): [["tt.divisibility", 16]]
        for name, kind in zip(names, case.types, strict=True)
        if not case.kernel.params[places[name]].do_not_specialize
        and (kind.startswith("*") or (kind == "i32" and (name.endswith("stride") or name == "vocab")))
    }
    source = ASTSource(case.kernel, signature, {(places[n],): v for n, v in case.constants.items()}, attrs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": case.warps})


def usage(cubin: bytes) -> dict[str, int]:
    """Registers a thread ("REG") and bytes of its stack ("STACK"), where registers that did not suffice are spilled to;
    empty where Triton brings no tool to ask."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(count) for name, count in re.findall(r"\b(REG|STACK):(\d+)", told)}


def check(case: Case, capability: int, say: Callable[[str], None] = print) -> bool:
    try:
        assembly = compiled(case, capability).asm
    except Exception as error:
        say(f"FAILED  {case.name}, sm_{capability}: {type(error).__name__}: {str(error).strip()[:400]}")
        return False
    if case.vector is not None and case.vector not in assembly["ptx"]:
        say(f"FAILED  {case.name}, sm_{capability}: no {case.vector} in its PTX; a load lost its width")
        return False
    used = usage(assembly["cubin"])
    words = f"{len(assembly['cubin']):,} bytes, {used.get('REG', '?')} registers"
    if used.get("STACK", 0) > case.stack:
        say(f"FAILED  {case.name}, sm_{capability}: {words}, {used['STACK']} bytes of stack; registers are spilled")
        return False
    say(f"ok      {case.name}, sm_{capability}: {words}")
    return True


def main() -> int:
    import triton

    print(f"Triton {triton.__version__}")
    results = [check(case, capability) for case in cases() for capability in CAPABILITIES]
    print(f"{sum(results)} of {len(results)} compiled")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
