"""`liar eval SRC`: perplexity of a decoder, STS-B correlation of an encoder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from liar_ext.errors import InputError


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="perplexity or STS-B of a dense or pruned folder",
        description="Measure quality. Works on every folder `liar prune` writes and on dense ones.",
    )
    parser.add_argument("source", metavar="SRC", help="folder or hub id")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", metavar="FILE", help="perplexity on this text (decoders)")
    what.add_argument("--stsb", metavar="FILE.csv", help="Spearman x 100 (encoders)")
    parser.add_argument("--seq-len", type=int, metavar="N", help="window (default 2048 at most)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda")
    parser.add_argument(
        "--dtype", default="auto", metavar="NAME", help="auto, float32, bfloat16, float16"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from liar_ext.checkpoint.load import load, resolve
    from liar_ext.engine.inputs import compute_dtype, load_tokenizer, resolve_device
    from liar_ext.environment import environment
    from liar_ext.evaluation.task import Evaluation
    from liar_ext.models import adapter_for, text_config
    from liar_ext.recipe import CHOICES

    for name in ("device", "dtype"):
        if getattr(arguments, name) not in CHOICES[name]:
            raise InputError(
                f"--{name} {getattr(arguments, name)}: choose from {', '.join(CHOICES[name])}"
            )
    for name in ("seq_len", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    given = Path(arguments.text or arguments.stsb)
    if not given.is_file():
        raise InputError(f"{given}: no such file")
    device = resolve_device(arguments.device)
    folder = resolve(arguments.source)
    model = load(folder, dtype=compute_dtype(arguments.dtype, device), device=device)
    adapter = adapter_for(model.config)
    if adapter.decoder != (arguments.text is not None):
        needed = "--text" if adapter.decoder else "--stsb"
        raise InputError(f"{folder}: a {adapter.model_type} model is evaluated with {needed}")
    limit = adapter.max_positions(text_config(model.config))
    evaluation = Evaluation(
        "text" if adapter.decoder else "stsb",
        arguments.text or arguments.stsb,
        min(arguments.seq_len or 2048, limit),
        arguments.batch_size,
    )
    measured = evaluation.on(load_tokenizer(folder))(model)
    result = {"source": str(arguments.source), **measured, "environment": environment(device)}
    _warn_of_overlap(folder, given)
    if not arguments.json:
        error = result["standard_error"]
        spread = "" if error is None else f" ± {error:.4g}"
        print(f"{result['metric']} {result['value']:.4f}{spread}  ({result['dataset']})")
    return result


def _warn_of_overlap(folder: Path, evaluated: Path) -> None:
    """Say so when a pruned model is evaluated on the text it was calibrated on."""
    from liar_ext.calibration.overlap import warning
    from liar_ext.calibration.sources import read
    from liar_ext.report.schema import calibration_of

    calibration = calibration_of(folder)
    if calibration is None:
        return
    message = warning(calibration, read(str(evaluated)))
    if message is not None:
        print(f"warning: {message}", file=sys.stderr)
