"""The command line. A verb's module is imported only when the verb is called, so `--help` answers at once.

`serve`'s flags are the fields of `server.settings.Settings`; nothing about them is written here. What goes wrong on
purpose (an EngramError) becomes one line on stderr and the error's own exit code. Knows no verb's work.
"""

from __future__ import annotations

import sys
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any

import typer

from server import __version__
from server.errors import EngramError, SettingsError
from server.settings import DEFAULT_MODEL, FIELDS, flag, resolve

app = typer.Typer(
    name="engram-server",
    help="Serve language models that look things up instead of computing them.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(
    name="bench", help="Measure this machine; every experiment alternates its arms.", no_args_is_help=True
)
app.add_typer(bench)

ROW_TYPES = "auto|float32|float16|bfloat16|int8|float8_e4m3|float8_e4m3_e8m0"
DTYPES = "|".join(FIELDS["dtype"].metadata["choices"])
ModelArgument = Annotated[str, typer.Argument(help=FIELDS["model"].metadata["help"])]
SIZES = (("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10))

JsonFile = Annotated[Path | None, typer.Option("--json", help="write the figures to this file")]


def print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    pass


def serve(config: Path | None = None, **flags: object) -> None:
    """Serve a model over the OpenAI API.

    Every flag is a variable too: --max-num-seqs is ENGRAM_MAX_NUM_SEQS.

    It is also a key of the YAML file that --config names: max-num-seqs.

    Flags win over variables, variables over the file. Sizes may be written 512M or 2GiB.
    """
    settings = resolve(flags, config)
    from server.commands.serve import serve

    serve(settings)


def serve_signature() -> Signature:
    """`serve`'s parameters, one per setting; all default to None, "not given", so that a variable or file may speak."""
    config = Annotated[Path | None, typer.Option("--config", help="YAML file of settings", rich_help_panel="config")]
    annotations: dict[str, Any] = {"config": config, **{name: option(name) for name in FIELDS}}
    return Signature(
        [Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=kind) for name, kind in annotations.items()]
    )


def option(name: str) -> Any:
    """A setting as a typer option. Its value arrives as text; `settings.typed` reads it and words the error."""
    default, metadata, spelling = FIELDS[name].default, FIELDS[name].metadata, flag(name)
    kind: Any = str | None
    if isinstance(default, bool):
        kind, spelling = bool | None, f"{spelling}/--no-{spelling[2:]}"
    elif isinstance(default, tuple):
        kind = list[str] | None
    shown = default_text(name)
    return Annotated[
        kind,
        typer.Option(
            spelling,
            help=metadata["help"] + (f" (default {shown})" if shown else ""),
            metavar=value_text(name),
            show_default=False,
            rich_help_panel=metadata["group"],
        ),
    ]


def default_text(name: str) -> str:
    """A setting's default as one would type it; "" for none."""
    default: Any = FIELDS[name].default
    if FIELDS[name].metadata["size"] and default:
        return next((f"{default // unit}{mark}" for mark, unit in SIZES if default % unit == 0), str(default))
    if isinstance(default, tuple):
        return ",".join(default)
    return "" if default == "" or isinstance(default, bool) else str(default)


def value_text(name: str) -> str | None:
    """What a setting's value looks like, for help and documentation; None for a switch."""
    default, metadata = FIELDS[name].default, FIELDS[name].metadata
    if isinstance(default, bool):
        return None
    if metadata["choices"]:
        return "|".join(metadata["choices"])
    if metadata["size"]:
        return "SIZE"
    return {int: "INTEGER", float: "SECONDS"}.get(type(default), "TEXT")


signature = serve_signature()
serve.__signature__ = signature  # type: ignore[attr-defined]
serve.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
app.command()(serve)


def plan(model: str, config: Path | None = None, **flags: object) -> None:
    """Say what goes where, in bytes, and why, before anything is loaded: weights, KV cache, staging, memory tables.

    Takes the flags of serve that decide it. What does not fit is refused, with the flag and the value that would.
    """
    settings = resolve({"model": model, **flags}, config)
    from server.commands.plan import plan

    plan(settings)


PLANNED = tuple(name for name in FIELDS if name != "model" and FIELDS[name].metadata["group"] != "http")
signature = Signature(
    [
        Parameter("model", Parameter.POSITIONAL_OR_KEYWORD, default=DEFAULT_MODEL, annotation=ModelArgument),
        *(serve_signature().parameters[name] for name in ("config", *PLANNED)),
    ]
)
plan.__signature__ = signature  # type: ignore[attr-defined]
plan.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
app.command()(plan)


@app.command()
def convert(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="folder to write, new or empty")],
    dtype: Annotated[str, typer.Option(help="type of the weights; auto: the model's own", metavar=DTYPES)] = "auto",
) -> None:
    """Write a model as a plain Hugging Face folder (a GGUF is dequantised)."""
    from server.commands.convert import convert

    convert(model, out, dtype)
    typer.echo(f"wrote {out}")


@app.command()
def attach(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="folder of the new pack")],
    layers: Annotated[str, typer.Option(help="layers that read the memory, as 1,15")] = "1,15",
    rows: Annotated[int, typer.Option(min=1, help="base rows per head and order")] = 20_000,
    dim: Annotated[int, typer.Option(min=1, help="values per row")] = 64,
    heads: Annotated[int, typer.Option(min=1, help="heads per order")] = 8,
    orders: Annotated[str, typer.Option(help="lengths of the n-grams that are looked up, as 2,3")] = "2,3",
    seed: Annotated[int, typer.Option(min=0, help="of the hash constants and the fresh rows")] = 0,
    dtype: Annotated[str, typer.Option(help="type of the rows", metavar="bfloat16|float16|float32")] = "bfloat16",
    stem: Annotated[
        str | None, typer.Option(help="make a STEM pack instead: layers whose up-projection it replaces, as 9,13,17")
    ] = None,
    calibrate: Annotated[Path | None, typer.Option(help="text that the STEM rows are made from (with --stem)")] = None,
) -> None:
    """Make a memory pack for a model: a fresh Engram, an exact no-op until it is taught; or STEM rows from a text."""
    if (stem is None) != (calibrate is None):
        raise SettingsError("--stem and --calibrate belong together: give the layers and a text to read")
    if stem is not None and calibrate is not None:
        from server.commands.attach_stem import attach_stem

        attach_stem(model=model, out=out, layers=numbers("--stem", stem), calibrate=calibrate, dtype=dtype)
        typer.echo(f"wrote {out}")
        return
    chosen = {"layers": numbers("--layers", layers), "orders": numbers("--orders", orders)}
    from server.commands.attach import attach

    attach(model=model, out=out, rows=rows, dim=dim, heads=heads, seed=seed, dtype=dtype, **chosen)
    typer.echo(f"wrote {out}")


def numbers(flag: str, text: str) -> tuple[int, ...]:
    """(1, 15) from "1,15". Raises SettingsError."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise SettingsError(f"{flag} is {text!r}; write whole numbers with commas between, such as 1,15") from None


@app.command()
def pack(
    source: Annotated[Path, typer.Argument(help="pack whose tables are written anew", metavar="IN")],
    out: Annotated[Path, typer.Option(help="folder of the new pack")],
    layout: Annotated[
        str, typer.Option(help="packed: values and scale in one aligned row", metavar="packed|apart")
    ] = "packed",
    dtype: Annotated[str, typer.Option(help="type of the rows; auto: as they are", metavar=ROW_TYPES)] = "auto",
) -> None:
    """Write a pack's tables in another layout or row type. Run again, it goes on after the last finished table."""
    from server.commands.pack import pack

    pack(source=source, out=out, layout=layout, dtype=dtype)
    typer.echo(f"wrote {out}")


@app.command()
def convert_stem(
    source: Annotated[Path, typer.Argument(help="checkpoint folder of the reference repository", metavar="IN")],
    out: Annotated[Path, typer.Option(help="folder of the new pack")],
    dtype: Annotated[str, typer.Option(help="type of the rows", metavar="bfloat16|float16|float32")] = "bfloat16",
) -> None:
    """Make a STEM pack of a checkpoint's stem_shards. Unpickles tensors only; the server itself never does."""
    from server.commands.convert_stem import convert_stem

    convert_stem(source=source, out=out, dtype=dtype)
    typer.echo(f"wrote {out}")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="pack, adapter or checkpoint folder")],
    json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="read every row and look for NaN and infinity")] = False,
) -> None:
    """Say what a folder holds: family, layers, heads, rows, bytes. Reads headers only, unless asked to verify."""
    from server.commands.inspect import inspect

    inspect(path=path, json=json, verify=verify)


@bench.command()
def decode(
    model: Annotated[str, typer.Option(help=FIELDS["model"].metadata["help"])] = DEFAULT_MODEL,
    steps: Annotated[int, typer.Option(min=8, help="steps of each arm at each concurrency")] = 48,
    json: JsonFile = None,
) -> None:
    """The decode step beside transformers' on the same weights, in turns."""
    from server.bench.decode import run

    run(model=model, steps=steps, json=json)


@bench.command()
def memory(
    model: Annotated[str, typer.Option(help=FIELDS["model"].metadata["help"])] = DEFAULT_MODEL,
    turns: Annotated[int, typer.Option(min=16, help="steps of each arm")] = 150,
    json: JsonFile = None,
) -> None:
    """What an attached memory costs a step, and how much of a slow table its prefetch hides."""
    from server.bench.memory import run

    run(model=model, turns=turns, json=json)


BenchFolder = Annotated[Path | None, typer.Option("--dir", help="where to build it; default: the cache folder")]
KeepPack = Annotated[bool, typer.Option("--keep", help="keep what was built for the next time")]


@bench.command()
def cold(
    model: Annotated[str, typer.Option(help=FIELDS["model"].metadata["help"])] = DEFAULT_MODEL,
    rounds: Annotated[int, typer.Option(min=1, help="measurements of each arm, at most")] = 5,
    dir: BenchFolder = None,
    keep: KeepPack = False,
    json: JsonFile = None,
) -> None:
    """What the first answer after a cold start waits for, beside what the disk can do. Writes 9 GB and removes them."""
    from server.bench.cold import run

    run(model=model, rounds=rounds, folder=dir, keep=keep, json=json)


@bench.command()
def limit(
    model: Annotated[str, typer.Option(help=FIELDS["model"].metadata["help"])] = DEFAULT_MODEL,
    seconds: Annotated[int, typer.Option(min=5, help="how long the load lasts")] = 240,
    dir: BenchFolder = None,
    keep: KeepPack = False,
    json: JsonFile = None,
) -> None:
    """A table four times --host-memory-limit under load, beside the same table in RAM. Needs 4 GB of disk and RAM."""
    from server.bench.limit import run

    run(model=model, seconds=seconds, folder=dir, keep=keep, json=json)


def main() -> None:
    """Entry point of `engram-server` and `python -m server`."""
    try:
        app(prog_name="engram-server")
    except EngramError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"error: unexpected {what}; python -X dev -m server shows where", file=sys.stderr)
        sys.exit(EngramError.exit_code)
