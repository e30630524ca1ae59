"""`liar eval SRC`: perplexity and multiple choice of decoders, STS-B correlation of encoders, the
stability of pruned decoders."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liar_ext.errors import InputError, unknown_choice
from liar_ext.evaluation.task import METRICS, Evaluation, known

if TYPE_CHECKING:
    from rich.table import Table

    from liar_ext.calibration.sources import Corpus


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="perplexity, STS-B, multiple choice or stability of a dense or pruned folder",
        description="Measure quality. Works on every folder `liar prune` writes and on dense ones.",
    )
    parser.add_argument("source", metavar="SRC", help="folder or hub id")
    what = parser.add_mutually_exclusive_group(required=True)
    for kind, metric in METRICS.items():
        what.add_argument(f"--{kind}", metavar=metric.file, help=metric.help)
    what.add_argument(
        "--stability",
        nargs="+",
        metavar="FILE.jsonl",
        help="share of multiple-choice questions that SRC and --dense both answer right or both "
        "wrong, weighted by how decided --dense is, percent; the mean of several files",
    )
    parser.add_argument("--dense", metavar="SRC", help="of --stability: what SRC was pruned from")
    parser.add_argument(
        "--seq-len",
        type=int,
        metavar="N",
        help="window of a text (default 2048 at most), tokens of a question with an answer "
        "(default: what the model takes)",
    )
    parser.add_argument(
        "--windows", type=int, metavar="N", help="of a text the first N windows (default all)"
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda")
    parser.add_argument(
        "--dtype", default="auto", metavar="NAME", help="auto, float32, bfloat16, float16"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from liar_ext.recipe import CHOICES

    for name in ("device", "dtype"):
        if getattr(arguments, name) not in CHOICES[name]:
            raise unknown_choice(f"--{name}", getattr(arguments, name), CHOICES[name])
    if arguments.windows is not None and arguments.text is None:
        raise InputError("--windows: is of --text only")
    for name in ("seq_len", "batch_size", "windows"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if (arguments.stability is None) != (arguments.dense is None):
        raise InputError("--stability and --dense go together: what to ask, and whom to agree with")
    return _measure(arguments) if arguments.stability is None else _compare(arguments)


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One metric of one model."""
    from liar_ext.checkpoint.load import load, resolve
    from liar_ext.engine.inputs import compute_dtype, load_tokenizer, resolve_device
    from liar_ext.environment import environment
    from liar_ext.evaluation.limits import limits_of

    kind = next(kind for kind in METRICS if getattr(arguments, kind) is not None)
    path = getattr(arguments, kind)
    evaluation = Evaluation(kind, path, arguments.seq_len, arguments.batch_size, arguments.windows)
    if not (evaluation.metric.data_sets or Path(path).is_file()):
        raise InputError(f"{path}: no such file")
    device = resolve_device(arguments.device)
    folder = resolve(arguments.source)
    limits = limits_of(folder)
    if limits.decoder != evaluation.metric.decoder:
        raise InputError(
            f"{folder}: a {limits.model_type} model is evaluated with "
            f"{known(decoder=limits.decoder)}"
        )
    evaluation = evaluation.fitted(limits.positions)
    # what is wrong with the file is found before the weights are read
    measure = evaluation.on(load_tokenizer(folder))
    model = load(folder, dtype=compute_dtype(arguments.dtype, device), device=device)
    result = {
        "source": str(arguments.source),
        **measure(model),
        "environment": environment(device),
    }
    _warn_of_overlap(arguments, folder, [evaluation.corpus])
    if not arguments.json:
        error = result["standard_error"]
        spread = "" if error is None else f" ± {error:.4g}"
        print(f"{result['metric']} {result['value']:.4f}{spread}  ({result['dataset']})")
        if kind == "choices":
            print(_choices_line(result))
    return result


def _compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Stability of one model against another."""
    from liar_ext.checkpoint.load import resolve
    from liar_ext.cli.output import print_table
    from liar_ext.engine.inputs import compute_dtype, resolve_device
    from liar_ext.environment import environment
    from liar_ext.evaluation.against_dense import against_dense
    from liar_ext.evaluation.choices import read_choices

    for path in arguments.stability:
        if arguments.stability.count(path) > 1:
            raise InputError(f"--stability {path}: is given twice")
    device = resolve_device(arguments.device)
    pruned, dense = resolve(arguments.source), resolve(arguments.dense)
    sets = [read_choices(path) for path in arguments.stability]
    found = against_dense(
        dense,
        pruned,
        sets,
        seq_len=arguments.seq_len,
        batch_size=arguments.batch_size,
        device=device,
        dtype=compute_dtype(arguments.dtype, device),
    )
    found["dense"]["source"], found["pruned"]["source"] = arguments.dense, arguments.source
    result = {
        "source": str(arguments.source),
        "metric": "stability",
        "value": found["stability"],
        # an error of a weighted share that one item may dominate would promise too much
        "standard_error": None,
        "dataset": ", ".join(arguments.stability),
        **found,
        "environment": environment(device),
    }
    _warn_of_overlap(arguments, pruned, [each.corpus for each in sets])
    if not arguments.json:
        print_table(_stability_table(result))
    return result


def _choices_line(result: dict[str, Any]) -> str:
    """The other two accuracies and what to hold all three against."""
    parts = []
    for name, label in (("norm", "by length"), ("ppl", "by text loss")):
        error = result[f"standard_error_{name}"]
        spread = "" if error is None else f" ± {error:.4g}"
        parts.append(f"{label} {result[f'accuracy_{name}']:.4f}{spread}")
    cut = f", {result['truncated']} of them cut to fit" if result["truncated"] else ""
    parts.append(f"chance {result['chance']:.4f}; {result['items']} {result['format']} items{cut}")
    return ", ".join(parts)


def _stability_table(result: dict[str, Any]) -> Table:
    from rich.table import Table

    sets = len(result["sets"])
    of = f"{result['items']} items" + (f", mean of {sets} sets" if sets > 1 else "")
    table = Table(title=f"{result['source']} against {result['dense']['source']}: {of}")
    table.title_justify = "left"
    for name in ("percent", "dense", "pruned"):
        table.add_column(name, justify="left" if name == "percent" else "right")
    for name, label in (
        ("accuracy_ppl", "accuracy by text loss"),
        ("accuracy", "accuracy"),
        ("accuracy_norm", "accuracy by length"),
    ):
        table.add_row(label, *(f"{result[who][name]:.2f}" for who in ("dense", "pruned")))
    table.add_section()
    table.add_row("both right or both wrong", "", f"{result['agreement']:.2f}")
    for label, weighted in (("loss", result), ("perplexity", result["by_perplexity"])):
        table.add_section()
        table.add_row(f"stability by spread of {label}", "", f"{weighted['stability']:.2f}")
        table.add_row("  first items (legacy)", "", f"{weighted['legacy']:.2f}")
        table.add_row("  effective items", "", f"{weighted['effective_sample_size']:.1f}")
    return table


def _warn_of_overlap(
    arguments: argparse.Namespace, folder: Path, evaluated: Iterable[Callable[[], Corpus]]
) -> None:
    """Say so when a pruned model is evaluated on the text it was calibrated on."""
    from liar_ext.calibration.overlap import warning
    from liar_ext.cli.output import warn
    from liar_ext.report.schema import calibration_of

    calibration = calibration_of(folder)
    if calibration is None:
        return
    for corpus in evaluated:
        message = warning(calibration, corpus())
        if message is not None:
            warn(arguments, message)
