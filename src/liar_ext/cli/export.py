"""`liar export SRC --out DIR --format NAME`: a folder that another engine loads."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from liar_ext.cli.options import refuse_torchrun
from liar_ext.errors import InputError, unknown_choice

DESCRIPTION = """Write SRC for another engine: padded, one width in all layers by zero units, for
whatever loads stock checkpoints; onnx, a graph for ONNX Runtime (needs
liar-ext[onnx]); gguf, a file for llama.cpp; deci
(experimental), per-layer FFN widths for servers that know DeciLM. SRC is only read."""

# of which formats, option -> what argparse is told; None is what the format itself defaults to
OPTIONS: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {
    ("padded", "deci"): {
        "to": {
            "metavar": "WIDTH",
            "help": "widest (the widest layer's) or dense (before pruning) (default widest); of "
            "deci the heads'",
        },
        "tensor_parallel": {
            "type": int,
            "metavar": "N",
            "help": "FFN widths and KV heads divide among N devices",
        },
    },
    ("padded",): {
        "round_to": {"type": int, "metavar": "N", "help": "FFN widths are multiples of N"},
    },
    ("onnx",): {
        "no_past": {
            "action": "store_true",
            "default": None,
            "help": "of a decoder, logits of whole sequences, without keys and values going in and "
            "out",
        },
    },
    ("gguf",): {
        "converter": {
            "metavar": "PATH",
            "help": "llama.cpp's convert_hf_to_gguf.py, or its folder (default: the one on PATH)",
        },
        "outtype": {"metavar": "TYPE", "help": "f32, f16 or bf16 (default f16)"},
        "pre_tokenizer": {
            "metavar": "NAME",
            "help": "llama.cpp's name of it, where its list does not know the tokenizer",
        },
    },
}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "export", help="write a model for another engine", description=DESCRIPTION
    )
    parser.add_argument("source", metavar="SRC", help="folder or hub id; it is only read")
    parser.add_argument("--out", metavar="DIR", help="folder to make")
    parser.add_argument(
        "--check",
        action="store_true",
        help="say which engines load SRC, and why the others do not; nothing is written",
    )
    parser.add_argument("--format", metavar="NAME", help=f"{', '.join(FORMATS)}")
    for formats, options in OPTIONS.items():
        group = parser.add_argument_group(f"--format {' or '.join(formats)}")
        for name, settings in options.items():
            group.add_argument(f"--{name.replace('_', '-')}", **settings)
    parser.add_argument("--overwrite", action="store_true", help="replace DIR when it exists")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from liar_ext.cli.output import Watcher

    refuse_torchrun("liar export is one process; run it without torchrun")
    if arguments.check:
        return _check(arguments)
    if arguments.format is None:
        raise InputError(f"--format: give one of {', '.join(FORMATS)}")
    if arguments.format not in FORMATS:
        raise unknown_choice("--format", arguments.format, FORMATS)
    if arguments.out is None:
        raise InputError("--out: give a folder to make")
    given = _given(arguments)
    function, settings = FORMATS[arguments.format](given)
    with Watcher() as watcher:
        report = function(
            arguments.source,
            arguments.out,
            **settings,
            overwrite=arguments.overwrite,
            progress=watcher,
        )
    if not arguments.json:
        print("\n".join(report_lines(report)))
        print(f"written: {arguments.out}")
    return {"out": arguments.out, **report}


def _check(arguments: argparse.Namespace) -> dict[str, Any]:
    from liar_ext.export.servers import check

    if arguments.out is not None or arguments.format is not None:
        raise InputError("--check: writes nothing; leave out --out and --format")
    found = check(arguments.source)
    if not arguments.json:
        print("\n".join(verdict_lines(found)))
    return found


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of a format that were given.

    Raises:
        InputError: one is another format's.
    """
    found: dict[str, Any] = {}
    for formats, options in OPTIONS.items():
        own = {name: getattr(arguments, name) for name in options}
        own = {name: value for name, value in own.items() if value is not None}
        if own and arguments.format not in formats:
            flag = f"--{next(iter(own)).replace('_', '-')}"
            raise InputError(f"{flag}: is of --format {' or '.join(formats)}; leave it out")
        found |= own
    return found


# a format's options, by name -> its function and what that is called with
def _padded(given: dict[str, Any]) -> tuple[Callable[..., dict[str, Any]], dict[str, Any]]:
    from liar_ext.export.padded import export_padded
    from liar_ext.export.widths import Widths

    return export_padded, {"widths": Widths(**given)}


def _deci(given: dict[str, Any]) -> tuple[Callable[..., dict[str, Any]], dict[str, Any]]:
    from liar_ext.export.deci import export_deci
    from liar_ext.export.widths import Widths

    return export_deci, {"widths": Widths(**given)}


def _onnx(given: dict[str, Any]) -> tuple[Callable[..., dict[str, Any]], dict[str, Any]]:
    from liar_ext.export.onnx import export_onnx

    return export_onnx, {"past": not given.get("no_past", False)}


def _gguf(given: dict[str, Any]) -> tuple[Callable[..., dict[str, Any]], dict[str, Any]]:
    from liar_ext.export.gguf import GgufOptions, export_gguf

    return export_gguf, {"options": GgufOptions(**given)}


FORMATS = {"padded": _padded, "onnx": _onnx, "gguf": _gguf, "deci": _deci}


def verdict_lines(found: dict[str, Any]) -> list[str]:
    """What `--check` found, for people."""
    lines = []
    for row in found["engines"]:
        lines.append(f"{row['engine']}: {row['loads']}, {row['reason']}")
        if row["instead"]:
            lines.append(f"    instead: {row['instead']}")
        if row["tensor_parallel"]:
            lines.append(f"    on {_listed(row['tensor_parallel'])}")
        if row["source"]:
            lines.append(f"    {row['source']}")
    return lines


def _listed(devices: list[int]) -> str:
    if list(devices) == [1]:
        return "1 device only: heads, KV heads or FFN divide among no others"
    return f"{', '.join(map(str, devices))} devices (tensor parallel, up to 16)"


def report_lines(report: dict[str, Any]) -> list[str]:
    """What was done, for people."""
    from liar_ext.report.text import count, size

    totals, what = report["totals"], report["export"]
    lines = [f"warning: {text}" for text in report["warnings"]]
    for kind, own in (what.get("units") or {}).items():
        lines.append(f"{kind}: {' '.join(map(str, own['before']))} -> {own['after']} in all layers")
    lines.append(
        f"parameters {count(totals['parameters_before'])} -> {count(totals['parameters_after'])}, "
        f"{size(totals['bytes_before'])} -> {size(totals['bytes_after'])}; loads with "
        f"{what['loads_with']}"
    )
    if compared := what.get("compared"):
        lines.append(
            f"compared with transformers on {compared['tokens']} tokens: max abs "
            f"{compared['max_abs']:.2g}, rms relative {compared['rms_relative']:.2g} "
            f"(largest {compared['largest']:.3g})"
        )
    if "note" in what:
        lines.append(what["note"])
    return lines
