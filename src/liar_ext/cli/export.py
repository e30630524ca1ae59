"""`liar export SRC --out DIR --format NAME`: a folder that another engine loads."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from liar_ext.cli.options import refuse_torchrun
from liar_ext.errors import InputError

DESCRIPTION = """Write SRC for another engine: padded, one width in all layers by zero units, for
whatever loads stock checkpoints; onnx, a graph for ONNX Runtime; gguf, a file for llama.cpp; deci
(experimental), per-layer FFN widths for servers that know DeciLM. SRC is only read."""


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
    padded = parser.add_argument_group("--format padded, and of heads deci")
    padded.add_argument(
        "--to",
        metavar="WIDTH",
        default="widest",
        help="widest (the widest layer's) or dense (before pruning) (default widest)",
    )
    padded.add_argument(
        "--round-to", type=int, metavar="N", default=1, help="FFN widths are multiples of N"
    )
    padded.add_argument(
        "--tensor-parallel",
        type=int,
        metavar="N",
        default=1,
        help="FFN widths and KV heads divide among N devices",
    )
    onnx = parser.add_argument_group("--format onnx (needs liar-ext[onnx])")
    onnx.add_argument(
        "--no-past",
        action="store_true",
        help="of a decoder, logits of whole sequences, without keys and values going in and out",
    )
    gguf = parser.add_argument_group("--format gguf (per-layer widths need liar-ext[gguf])")
    gguf.add_argument(
        "--converter",
        metavar="PATH",
        help="llama.cpp's convert_hf_to_gguf.py, or its folder (default: the one on PATH)",
    )
    gguf.add_argument(
        "--outtype", metavar="TYPE", default="f16", help="f32, f16 or bf16 (default f16)"
    )
    gguf.add_argument(
        "--pre-tokenizer",
        metavar="NAME",
        help="llama.cpp's name of it, where its list does not know the tokenizer",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DIR when it exists")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    refuse_torchrun("liar export is one process; run it without torchrun")
    if arguments.check:
        return _check(arguments)
    if arguments.format is None:
        raise InputError(f"--format: give one of {', '.join(FORMATS)}")
    if arguments.format not in FORMATS:
        raise InputError(f"--format {arguments.format}: must be one of {', '.join(FORMATS)}")
    if arguments.out is None:
        raise InputError("--out: give a folder to make")
    report = FORMATS[arguments.format](arguments)
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


def _padded(arguments: argparse.Namespace) -> dict[str, Any]:
    from liar_ext.cli.output import Watcher
    from liar_ext.export.padded import export_padded
    from liar_ext.export.widths import Widths

    widths = Widths(arguments.to, arguments.round_to, arguments.tensor_parallel)
    with Watcher() as watcher:
        return export_padded(
            arguments.source,
            arguments.out,
            widths,
            overwrite=arguments.overwrite,
            progress=watcher,
        )


def _onnx(arguments: argparse.Namespace) -> dict[str, Any]:
    from liar_ext.cli.output import Watcher
    from liar_ext.export.onnx import export_onnx

    with Watcher() as watcher:
        return export_onnx(
            arguments.source,
            arguments.out,
            past=not arguments.no_past,
            overwrite=arguments.overwrite,
            progress=watcher,
        )


def _gguf(arguments: argparse.Namespace) -> dict[str, Any]:
    from liar_ext.cli.output import Watcher
    from liar_ext.export.gguf import GgufOptions, export_gguf

    options = GgufOptions(arguments.converter, arguments.outtype, arguments.pre_tokenizer)
    with Watcher() as watcher:
        return export_gguf(
            arguments.source,
            arguments.out,
            options,
            overwrite=arguments.overwrite,
            progress=watcher,
        )


def _deci(arguments: argparse.Namespace) -> dict[str, Any]:
    from liar_ext.cli.output import Watcher
    from liar_ext.export.deci import export_deci
    from liar_ext.export.widths import Widths

    widths = Widths(arguments.to, arguments.round_to, arguments.tensor_parallel)
    with Watcher() as watcher:
        return export_deci(
            arguments.source,
            arguments.out,
            widths,
            overwrite=arguments.overwrite,
            progress=watcher,
        )


FORMATS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "padded": _padded,
    "onnx": _onnx,
    "gguf": _gguf,
    "deci": _deci,
}


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
