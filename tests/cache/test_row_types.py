"""Row types against formulas written out here in float64, byte by byte."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from server.cache.row_types import ROW_TYPES, BlockFloat8, Float8, Int8, Plain, RowType, row_type
from server.errors import TableError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def e4m3(code: int) -> float:
    """Sign, 4 exponent bits of bias 7, 3 mantissa bits; all ones is NaN."""
    sign, exponent, mantissa = (-1.0 if code & 0x80 else 1.0), code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def e8m0(code: int) -> float:
    return math.nan if code == 255 else 2.0 ** (code - 127)


def rounded(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """float64 → float32 → dtype, the order the row types promise."""
    return torch.from_numpy(values).float().to(dtype)


def decoded(kind: RowType, raw: np.ndarray, dim: int, dtype: torch.dtype) -> torch.Tensor:
    out = torch.full((len(raw), dim), 7.0, dtype=dtype)
    kind.decode(torch.from_numpy(raw), out)
    return out


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def all_codes(values: int) -> np.ndarray:
    """[256 / values, values]: every byte once."""
    return np.arange(256, dtype=np.uint8).reshape(-1, values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 0.0371, 3.0])
def test_every_float8_byte_decodes_to_its_value_times_the_tensors_scale(scale: float, dtype: torch.dtype) -> None:
    codes = all_codes(64)
    want = np.vectorize(e4m3)(codes.astype(int)) * float(np.float32(scale))
    assert_same(decoded(Float8(scale), codes, 64, dtype), rounded(want, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_float8_byte_decodes_under_every_block_scale(dtype: torch.dtype) -> None:
    codes, scales = (grid.ravel() for grid in np.meshgrid(np.arange(256), np.arange(256)))
    codes, scales = codes.reshape(-1, 32), scales.reshape(-1, 32)[:, :1]
    want = np.vectorize(e4m3)(codes) * np.vectorize(e8m0)(scales)
    raw = np.concatenate([codes, scales], axis=1).astype(np.uint8)
    with np.errstate(over="ignore"):
        assert_same(decoded(BlockFloat8(), raw, 32, dtype), rounded(want, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 0.00317, 1e30])
def test_every_int8_byte_decodes_to_its_value_times_the_rows_scale(scale: float, dtype: torch.dtype) -> None:
    codes = all_codes(32)
    scales = (np.arange(1, 9, dtype=np.float32) * np.float32(scale)).reshape(-1, 1)
    want = codes.view(np.int8).astype(np.float64) * scales
    raw = np.concatenate([codes, scales.view(np.uint8)], axis=1)
    assert_same(decoded(Int8(), raw, 32, dtype), rounded(want, dtype))


def test_every_bfloat16_pattern_decodes_to_the_float32_it_is_the_head_of() -> None:
    patterns = np.arange(1 << 16, dtype=np.uint32)
    want = torch.from_numpy((patterns << 16).view(np.float32).reshape(-1, 64).copy())
    raw = patterns.astype("<u2").reshape(-1, 64).view(np.uint8)
    assert_same(decoded(Plain(torch.bfloat16), raw, 64, torch.float32), want)


def test_every_float16_pattern_decodes_as_numpy_reads_it() -> None:
    patterns = np.arange(1 << 16, dtype="<u2").reshape(-1, 64)
    want = torch.from_numpy(patterns.view(np.float16).astype(np.float32))
    assert_same(decoded(Plain(torch.float16), patterns.view(np.uint8), 64, torch.float32), want)


@pytest.mark.parametrize("name", ROW_TYPES)
def test_padding_after_a_row_is_not_read(name: str) -> None:
    kind = row_type(name, 0.5)
    rows = np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32)
    raw = kind.encode(rows)
    padded = np.concatenate([raw, np.full((5, 16), 0xFF, np.uint8)], axis=1)
    assert raw.shape[1] == kind.row_bytes(64)
    assert_same(decoded(kind, padded, 64, torch.float32), decoded(kind, raw, 64, torch.float32))


@pytest.mark.parametrize("name", ROW_TYPES)
def test_decoding_then_encoding_gives_the_same_values(name: str) -> None:
    kind = row_type(name)
    rows = np.random.default_rng(2).normal(size=(50, 64)).astype(np.float32)
    once = decoded(kind, kind.encode(rows), 64, torch.float32)
    twice = decoded(kind, kind.encode(once.numpy()), 64, torch.float32)
    # int8: absmax / 127 · 127 may differ from absmax by one float32 rounding, and so may each value.
    torch.testing.assert_close(twice, once, rtol=3e-7 if name == "int8" else 0, atol=0)


def test_int8_encoding_is_off_by_at_most_half_a_scale() -> None:
    rows = np.random.default_rng(3).normal(size=(200, 64)).astype(np.float32)
    scale = np.abs(rows).max(axis=1, keepdims=True).astype(np.float64) / 127
    error = np.abs(decoded(Int8(), Int8().encode(rows), 64, torch.float32).double().numpy() - rows)
    assert (error <= scale * 0.5 * (1 + 1e-5)).all()  # 1e-5: the scale itself is rounded to float32


def test_float8_encoding_takes_the_nearest_value_and_of_two_the_even_one() -> None:
    values = np.array(sorted({e4m3(code) for code in range(256)} - {math.nan}, key=float))
    values = values[np.isfinite(values)]
    middles = (values[:-1] + values[1:]) / 2
    points = np.concatenate([values, middles, middles * 1.001, middles * 0.999, [500.0, -1e9]])
    points = np.resize(points, (len(points) + 31) // 32 * 32).astype(np.float32).reshape(-1, 32)
    got = Float8().encode(points)
    for point, code in zip(points.ravel().tolist(), got.ravel().tolist(), strict=True):
        distances = [(abs(e4m3(c) - point), c & 1) for c in range(256) if not math.isnan(e4m3(c))]
        assert (abs(e4m3(code) - point), code & 1) == min(distances)


@pytest.mark.parametrize("absmax", [1e-30, 3.0, 448.0, 449.0, 1e20])
def test_block_scale_is_the_smallest_power_of_two_without_overflow(absmax: float) -> None:
    rows = np.zeros((1, 64), np.float32)
    rows[0, 40] = -absmax
    raw = BlockFloat8().encode(rows)
    scale = e8m0(int(raw[0, 64 + 1]))
    assert absmax / scale <= 448 < absmax / scale * 2
    got = decoded(BlockFloat8(), raw, 64, torch.float32)
    assert abs(got[0, 40].item() + absmax) <= absmax / 16  # half a step of 3 mantissa bits
    assert got.count_nonzero() == 1


@pytest.mark.parametrize("name", ROW_TYPES)
def test_a_row_of_zeros_stays_zero(name: str) -> None:
    kind = row_type(name)
    assert decoded(kind, kind.encode(np.zeros((2, 32), np.float32)), 32, torch.float32).count_nonzero() == 0


@pytest.mark.parametrize("name", ["int8", "float8_e4m3", "float8_e4m3_e8m0"])
def test_a_scaled_type_refuses_values_that_are_not_finite(name: str) -> None:
    rows = np.zeros((3, 32), np.float32)
    rows[1, 5] = np.nan
    with pytest.raises(TableError, match="row 1 .* not finite"):
        row_type(name).encode(rows)


def test_block_scales_need_a_dimension_of_whole_blocks() -> None:
    with pytest.raises(TableError, match="divisible by 32; this table's is 48"):
        BlockFloat8().row_bytes(48)


def test_an_unknown_row_type_is_named_beside_the_known_ones() -> None:
    with pytest.raises(TableError, match="'int4' is no row type.*bfloat16"):
        row_type("int4")
