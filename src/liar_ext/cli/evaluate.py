"""`liar eval SRC`: what a dense or pruned model is worth, alone or beside the dense one."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liar_ext.errors import InputError, unknown_choice
from liar_ext.evaluation.task import METRICS, WINDOWED, Evaluation, known

if TYPE_CHECKING:
    from liar_ext.evaluation.beside import Result
    from liar_ext.evaluation.measured import Readable


LEAST = {"seq_len": 1, "batch_size": 1, "windows": 1, "num_fewshot": 0, "limit": 1}
HARNESS = {"num_fewshot": "shots", "limit": "limit", "include_path": "include_path"}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="quality of a dense or pruned folder, alone or beside the dense one",
        description="Measure quality. Works on every folder `liar prune` writes and on dense ones. "
        "Options of what is measured may be given several times, and together.",
    )
    parser.add_argument("source", metavar="SRC", help="folder or hub id")
    what = parser.add_argument_group("what is measured")
    for kind, metric in METRICS.items():
        if metric.option is not None:
            what.add_argument(
                metric.option,
                dest=kind,
                action="append",
                default=[],
                metavar=metric.form,
                help=metric.help,
            )
    what.add_argument(
        "--stability",
        nargs="+",
        metavar="FILE.jsonl",
        help="share of multiple-choice questions that SRC and --dense both answer right or both "
        "wrong, weighted by how decided --dense is, percent; the mean of several files",
    )
    beside = parser.add_argument_group("beside the dense model")
    beside.add_argument(
        "--dense", metavar="SRC", help="what SRC was pruned from: measured too, with differences"
    )
    beside.add_argument(
        "--against",
        metavar="SRC",
        help="of --text: divergence from this model's next-token distributions, top-1 agreement "
        "with it, and both perplexities",
    )
    beside.add_argument(
        "--one-at-a-time",
        action="store_true",
        help="of --against: one model in memory, hidden states of the other on disk (by itself "
        "where both do not fit)",
    )
    beside.add_argument(
        "--scratch", type=Path, metavar="DIR", help="folder for them (default: the system's)"
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--seq-len",
        type=int,
        metavar="N",
        help="window of a text (default 2048 at most), tokens of a question with an answer "
        "(default: what the model takes)",
    )
    how.add_argument(
        "--windows", type=int, metavar="N", help="of a text the first N windows (default all)"
    )
    how.add_argument(
        "--null-threshold",
        type=float,
        metavar="F",
        help="of --squad: how much better than the best answer none has to be (default 0)",
    )
    add_harness(how)
    how.add_argument("--batch-size", type=int, default=8, metavar="N")
    how.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda")
    how.add_argument(
        "--dtype", default="auto", metavar="NAME", help="auto, float32, bfloat16, float16"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def add_harness(group: Any, prefix: str = "") -> None:
    """Options of tasks of the harness, as those of another command with a prefix."""
    of = "of lm-eval: "
    group.add_argument(
        f"--{prefix}num-fewshot", type=int, metavar="N", help=of + "examples in front of a question"
    )
    group.add_argument(
        f"--{prefix}limit", type=int, metavar="N", help=of + "documents of a task at most"
    )
    group.add_argument(
        f"--{prefix}include-path", metavar="DIR", help=of + "folder of further tasks, as YAML"
    )


def harness_options(arguments: argparse.Namespace, prefix: str = "") -> dict[str, Any]:
    """What `add_harness` has been given, as fields of an Evaluation."""
    return {field: getattr(arguments, prefix + name) for name, field in HARNESS.items()}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from liar_ext.recipe import CHOICES

    for name in ("device", "dtype"):
        if getattr(arguments, name) not in CHOICES[name]:
            raise unknown_choice(f"--{name}", getattr(arguments, name), CHOICES[name])
    for name, least in LEAST.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    evaluations = _evaluations(arguments)
    if arguments.stability is None and not evaluations:
        raise InputError(f"nothing to measure: give {known()} or --stability")
    if arguments.stability is not None:
        if evaluations or arguments.against:
            raise InputError("--stability: is not allowed with other measurements; run it alone")
        if arguments.dense is None:
            raise InputError(
                "--stability and --dense go together: what to ask, and whom to agree with"
            )
        return _stability(arguments)
    return _measure(arguments, evaluations)


def _evaluations(arguments: argparse.Namespace) -> list[Evaluation]:
    """What is asked for, in the order of the metrics."""
    found = []
    for kind, metric in METRICS.items():
        # texts are read for a divergence where there is a model to diverge from
        given = getattr(arguments, kind, []) if metric.option is not None else []
        if kind == "text" and arguments.against is not None:
            kind = "kl"
        for path in given:
            if given.count(path) > 1:
                raise InputError(f"{metric.option} {path}: is given twice")
            one = Evaluation(kind, path, arguments.seq_len, arguments.batch_size)
            if kind in WINDOWED:
                one = replace(one, windows=arguments.windows)
            if kind == "squad" and arguments.null_threshold is not None:
                one = replace(one, null_threshold=arguments.null_threshold)
            if kind == "lm-eval":
                one = replace(one, **harness_options(arguments))
            found.append(one)
    if arguments.windows is not None and not arguments.text:
        raise InputError("--windows: is of --text only")
    if arguments.null_threshold is not None and not arguments.squad:
        raise InputError("--null-threshold: is of --squad only")
    for name in HARNESS:
        if getattr(arguments, name) is not None and not getattr(arguments, "lm-eval"):
            raise InputError(f"--{name.replace('_', '-')}: is of --lm-eval only")
    if arguments.against is not None:
        if not arguments.text:
            raise InputError("--against: is of --text; give a text to compare on")
        if arguments.dense is not None:
            raise InputError("--against and --dense: both name the dense model; give one of them")
        if len(found) > len(arguments.text):
            raise InputError("--against: is not allowed with other measurements than --text")
    elif arguments.one_at_a_time or arguments.scratch is not None:
        raise InputError("--one-at-a-time and --scratch: are of --against only")
    return found


def _measure(arguments: argparse.Namespace, evaluations: list[Evaluation]) -> dict[str, Any]:
    from liar_ext.checkpoint.load import resolve
    from liar_ext.cli.evaluation_table import show
    from liar_ext.engine.inputs import compute_dtype, resolve_device
    from liar_ext.environment import environment
    from liar_ext.evaluation.beside import evaluate

    device = resolve_device(arguments.device)
    folder = resolve(arguments.source)
    dense = arguments.dense or arguments.against
    results = evaluate(
        folder,
        evaluations,
        dense=None if dense is None else resolve(dense),
        device=device,
        dtype=compute_dtype(arguments.dtype, device),
        one_at_a_time=True if arguments.one_at_a_time else None,
        scratch=arguments.scratch,
    )
    found = [result.to_json(arguments.source, dense) for result in results]
    if not arguments.json:
        show(found)
    _warn_of_figures(arguments, results)
    _warn_of_overlap(arguments, folder, [result.source for result in results])
    about = {"environment": environment(device)}
    if len(found) == 1:
        return {**found[0], **about}
    return {"source": str(arguments.source), "evaluations": found, **about}


def _stability(arguments: argparse.Namespace) -> dict[str, Any]:
    """Stability of one model against another."""
    from liar_ext.checkpoint.load import resolve
    from liar_ext.cli.evaluation_table import stability_table
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
    if not arguments.json:
        print_table(stability_table(result))
    _warn_of_overlap(arguments, pruned, sets)
    return result


def _warn_of_figures(arguments: argparse.Namespace, results: Iterable[Result]) -> None:
    """What one has to know of figures that were measured otherwise than one may think."""
    from liar_ext.cli.output import warn

    for result in results:
        own, asked = result.evaluation, arguments.seq_len
        used = result.model.details.get("seq_len", own.length)
        if asked is not None and used is not None and used < asked:
            warn(arguments, f"--seq-len {asked}: {own.name} was measured with {used}, all it takes")
        if result.model.details.get("label_order_from") == "assumed":
            order = ", ".join(result.model.details["label_order"])
            warn(
                arguments,
                f"{own.name}: the model's labels have no names, and are taken to be {order}; where "
                "they are not, figures mean nothing: set label2id in config.json",
            )


def _warn_of_overlap(
    arguments: argparse.Namespace, folder: Path, evaluated: Iterable[Readable]
) -> None:
    """Say so when a pruned model is evaluated on the text it was calibrated on."""
    from liar_ext.calibration.overlap import warning
    from liar_ext.cli.output import warn
    from liar_ext.report.schema import calibration_of

    calibration = calibration_of(folder)
    if calibration is None:
        return
    for source in evaluated:
        try:
            message = warning(calibration, source.corpus())
        except InputError as error:
            # everything is measured: a source without any text must not lose it
            message = f"whether this text was calibrated on is not known ({error})"
        if message is not None:
            warn(arguments, message)
