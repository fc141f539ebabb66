"""Settings: one value each, from a flag, a variable or the file, and words for what does not fit."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import SettingsError
from server.settings import FIELDS, Settings, from_environment, from_file, parse_size, resolve, variable


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FIELDS:
        monkeypatch.delenv(variable(name), raising=False)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "engram.yaml"


def test_nothing_given_is_the_defaults() -> None:
    assert resolve({}) == Settings()
    assert resolve(dict.fromkeys(FIELDS)) == Settings()


def test_flags_win_over_variables_and_variables_over_the_file(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text("port: 1\nmax-num-seqs: 2\nblock_size: 3\n")
    monkeypatch.setenv("ENGRAM_PORT", "10")
    monkeypatch.setenv("ENGRAM_MAX_NUM_SEQS", "20")
    settings = resolve({"port": "100"}, config)
    assert (settings.port, settings.max_num_seqs, settings.block_size) == (100, 20, 3)


def test_every_field_can_be_given_as_the_text_of_its_default() -> None:
    """A variable holds text only; the text of a default must read back as the default, type included."""
    texts = {
        variable(f.name): ",".join(f.default) if isinstance(f.default, tuple) else str(f.default)
        for f in fields(Settings)
    }
    read = from_environment(texts)
    assert read == {f.name: f.default for f in fields(Settings)}
    assert {name: type(value) for name, value in read.items()} == {n: type(f.default) for n, f in FIELDS.items()}


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("prefetch: on", "prefetch", "on"),  # YAML 1.1 reads on and off as booleans
        ("prefix-cache: off", "prefix_cache", "off"),
        ("in-process: true", "in_process", True),
        ("kv-bytes: 512M", "kv_bytes", 512 << 20),
        ("kv-bytes: 1048576", "kv_bytes", 1 << 20),
        ("memory: [a=x, b=y]", "memory", ("a=x", "b=y")),
        ("memory: packs/wordnet", "memory", ("packs/wordnet",)),
        ("drain-seconds: 2", "drain_seconds", 2.0),
    ],
)
def test_the_file_speaks_plain_yaml(config: Path, text: str, name: str, value: Any) -> None:
    config.write_text(text)
    assert getattr(resolve({}, config), name) == value


@pytest.mark.parametrize("text", ["", "# nothing set yet\n"])
def test_an_empty_file_sets_nothing(config: Path, text: str) -> None:
    config.write_text(text)
    assert from_file(config) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"prot: 8000", "'prot', which is no setting; did you mean port?"),
        (b"zzz: 1", "engram-server serve --help lists the names"),
        (b"port: eight", "port in .*engram.yaml is 'eight'; it must be a whole number"),
        (b"port: [", "not valid YAML"),
        (b"- port", "holds a list"),
        (b"\xff\xfe\xff", "cannot be read"),
        (b"port: !!python/object/apply:os.getcwd []", "not valid YAML"),
        (b"port: 2024-99-99", "not valid YAML: month"),
        (b"port: !!int x", "not valid YAML"),
        (b"port: !!bool x", "not valid YAML"),
        (b"port: 0x" + b"f" * 4000, "not valid YAML"),
        (b"port: " + b"[" * 5000, "deeper than 8 levels"),
        (b"memory: &a [x, x]\npacks-dir: *a", "an alias"),
        (b'"a\\nb": 1', "which is no setting"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(config: Path, content: bytes, message: str) -> None:
    config.write_bytes(content)
    with pytest.raises(SettingsError, match=message) as refused:
        resolve({}, config)
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_named(config: Path) -> None:
    with pytest.raises(SettingsError, match=r"engram\.yaml cannot be read"):
        resolve({}, config)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("port", "x", "--port is 'x'; it must be a whole number"),
        ("port", "65536", "--port is 65536; it must be at most 65535"),
        ("port", "-1", "--port is -1; it must not be negative"),
        ("kv_bytes", "lots", "--kv-bytes is 'lots'; write bytes or a number with K, M, G or T"),
        ("drain_seconds", "nan", "--drain-seconds is nan; it must not be negative"),
        ("drain_seconds", "soon", "--drain-seconds is 'soon'; it must be a number"),
        ("dtype", "float8", "--dtype is 'float8'; it must be one of auto, bfloat16"),
        ("max_num_seqs", "0", "--max-num-seqs is 0; it must be at least 1"),
        ("in_process", "maybe", "--in-process is 'maybe'; it must be true or false"),
    ],
)
def test_a_value_that_does_not_fit_names_the_flag_and_what_it_needs(name: str, text: str, message: str) -> None:
    with pytest.raises(SettingsError) as refused:
        resolve({name: text})
    assert message in str(refused.value)


def test_a_wrong_variable_is_named_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes sets ENGRAM_PORT=tcp://… beside a service called engram; the message must lead there."""
    monkeypatch.setenv("ENGRAM_PORT", "tcp://10.0.0.1:8000")
    with pytest.raises(SettingsError, match=r"ENGRAM_PORT is 'tcp://10\.0\.0\.1:8000'"):
        resolve({})


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("17", 17),
        ("64b", 64),
        ("1k", 1 << 10),
        ("512M", 512 << 20),
        ("2GiB", 2 << 30),
        ("2 gb", 2 << 30),
        ("1.5G", 3 << 29),
        ("1T", 1 << 40),
        (4096, 4096),
    ],
)
def test_sizes_read_as_people_write_them(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_refused_in_one_line(text: str) -> None:
    try:
        assert isinstance(parse_size(text), int)
    except SettingsError as refused:
        assert len(str(refused).splitlines()) == 1
