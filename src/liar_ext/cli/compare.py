"""`liar compare SRC --out DIR`: every combination of methods and sparsities on one model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liar_ext.cli.evaluate import LEAST, add_harness, harness_options
from liar_ext.cli.options import add_recipe_options, recipe_of, refuse_torchrun
from liar_ext.cli.prune import add_trace, add_waiting
from liar_ext.errors import InputError, LiarError
from liar_ext.evaluation.task import METRICS, WINDOWED, Evaluation, known

if TYPE_CHECKING:
    from rich.table import Table

DESCRIPTION = """Prune SRC in every combination of the axes, evaluate each, and write tables and
plots. The model is read once and stays in memory; no pruned model is written. An axis that is not
given has one value, the default of `liar prune` or that of --recipe."""

# axis -> (metavar, help)
AXES = {
    "sparsities": ("F,F", "fractions of the targeted budget to remove"),
    "targets": ("KINDS;KINDS", 'separated by semicolons, e.g. "ffn;heads;ffn,heads"'),
    "criteria": ("NAME,NAME", "what to keep"),
    "allocations": ("NAME,NAME", "how many where"),
    "reconstructions": ("NAME,NAME", "how to repair"),
    "ridges": ("F,F", "λ relative to the mean variance of a Site's columns"),
    "target_signals": ("NAME,NAME", "what the repair aims at"),
}
# of whole layers
LAYERS = ("depth", "drop", "drop_layers", "span_repair")
# recipe fields that are axes only; a ridge and a target signal may also be fixed by their own
VARIED = ("sparsity", "target", "criterion", "allocation", "reconstruct")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "compare", help="a grid of methods and sparsities, measured", description=DESCRIPTION
    )
    parser.add_argument("source", metavar="SRC", help="folder or hub id; it is only read")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the result")
    group = parser.add_argument_group("axes")
    for name, (metavar, text) in AXES.items():
        group.add_argument(f"--{name.replace('_', '-')}", metavar=metavar, help=text)
    for name in VARIED:
        # known, so that the axis can be named
        group.add_argument(f"--{name}", help=argparse.SUPPRESS)
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--eval",
        action="append",
        default=[],
        metavar="KIND=FILE",
        help="; ".join(f"{kind}={m.form}: {m.help}" for kind, m in METRICS.items())
        + "; may be given several times",
    )
    group.add_argument("--eval-seq-len", type=int, metavar="N", help="as --seq-len of `liar eval`")
    group.add_argument(
        "--eval-windows", type=int, metavar="N", help="of a text the first N windows (default all)"
    )
    group.add_argument("--eval-batch-size", type=int, default=8, metavar="N", help="default 8")
    add_harness(group, "eval-")
    add_recipe_options(parser, without=(*VARIED, *LAYERS))
    group = parser.add_argument_group("execution")
    add_waiting(group)
    group.add_argument(
        "--keep-moments", action="store_true", help="leave DIR/moments for `liar prune --moments`"
    )
    add_trace(parser)
    parser.add_argument("--resume", action="store_true", help="go on with what is in DIR")
    parser.add_argument("--overwrite", action="store_true", help="start again in DIR")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all cells.

    Raises:
        InputError: bad input, or another one than that of what is resumed.
        LiarError: some cells failed. The result is written and printed before.
    """
    from liar_ext.calibration.sources import refuse_missing_path
    from liar_ext.cli.output import Watcher, print_table
    from liar_ext.comparison.grid import make_grid, parse_axis
    from liar_ext.comparison.run import compare
    from liar_ext.engine.execution import Execution

    refuse_torchrun("liar compare is one process; run it without torchrun")
    given = {name: getattr(arguments, name) for name in AXES}
    axes = {name: parse_axis(name, text) for name, text in given.items() if text is not None}
    _refuse_twice(arguments, axes)
    if arguments.empty and "allocations" in axes:
        # of the base recipe, which must not be uniform then; every cell has its own
        arguments.allocation = "levels"
    base = recipe_of(arguments, _instead(axes))
    grid = make_grid(base, axes)
    if base.calibration is None:
        raise InputError("--calibration is missing: give a .txt, .jsonl, .csv or token file")
    refuse_missing_path(base.calibration)
    result = compare(
        arguments.source,
        arguments.out,
        grid,
        evaluations_of(arguments),
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        keep_moments=arguments.keep_moments,
        execution=Execution(hidden_states=arguments.hidden_states, scratch=arguments.scratch),
        trace=arguments.trace,
        say=Watcher.of(arguments).tell,
    )
    if not arguments.json:
        print_table(summary(result))
        print(f"written: {Path(arguments.out) / 'comparison.md'}")
    if result["counts"]["failed"]:
        if arguments.json:
            print(json.dumps(result, allow_nan=False), flush=True)
        failed = [cell for cell in result["cells"] if cell["status"] == "failed"]
        raise LiarError(
            f"{len(failed)} of {len(result['cells'])} cells failed, the first: {failed[0]['error']}"
        )
    return result


def _refuse_twice(arguments: argparse.Namespace, axes: Mapping[str, Sequence[Any]]) -> None:
    """Raises InputError for a field that has an axis and an option of its own, or an axis only."""
    from liar_ext.comparison.grid import AXES as FIELDS

    for axis, name in FIELDS.items():
        if name in VARIED and getattr(arguments, name) is not None:
            raise InputError(f"--{name}: liar compare has --{axis} for it; one value is a list too")
    for axis in axes:
        if getattr(arguments, FIELDS[axis], None) is not None:
            many, one = (f"--{name.replace('_', '-')}" for name in (axis, FIELDS[axis]))
            raise InputError(f"{many} with {one}: both say which; give {many} all values")


def _instead(axes: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """What a preset should know of the axes: whether anything there can aim where it would."""
    from liar_ext.reconstruction import RECONSTRUCTIONS

    names = axes.get("reconstructions", ())
    able = [name for name in names if name in RECONSTRUCTIONS and RECONSTRUCTIONS[name].follows]
    return {"reconstruct": [*able, *names][0]} if names else {}


def evaluations_of(arguments: argparse.Namespace) -> list[Evaluation]:
    """What `--eval` and its options say."""
    from liar_ext.calibration.sources import refuse_missing_path

    for name, least in (*LEAST.items(), ("seq_len", 2)):
        name = f"eval_{name}"
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if not arguments.eval:
        raise InputError(f"--eval is missing: give {known(form='{kind}={form}')}")
    found = []
    for text in arguments.eval:
        kind, equals, path = text.partition("=")
        if kind not in METRICS or not (equals and path):
            raise InputError(f"--eval {text}: give {known(form='{kind}={form}')}")
        try:
            if kind != "lm-eval":
                refuse_missing_path(METRICS[kind].source(path))
        except InputError as error:
            raise InputError(f"--eval {kind}={error}") from None
        if arguments.eval.count(text) > 1:
            raise InputError(f"--eval {text}: is given twice")
        one = Evaluation(kind, path, arguments.eval_seq_len, arguments.eval_batch_size)
        if kind in WINDOWED:
            one = replace(one, windows=arguments.eval_windows)
        if kind == "lm-eval":
            one = replace(one, **harness_options(arguments, "eval_"))
        found.append(one)
    return found


def summary(result: dict[str, Any]) -> Table:
    """The best cell of each target, allocation and sparsity, and the dense model."""
    from rich.table import Table

    from liar_ext.comparison.tables import groups
    from liar_ext.report.text import number, short_name, signed

    evaluations = result["evaluations"]
    # what tells them apart: the file only where there are several
    names = {
        name: short_name(name) if len(evaluations) > 1 else evaluation["metric"]
        for name, evaluation in evaluations.items()
    }
    table = Table(title=f"{result['source']}: the best of each sparsity", title_justify="left")
    columns = "pruned", "sparsity", "evaluation", "value", "− dense (95 %)", "criterion", "repair"
    for name in (*columns, "residual"):
        numeric = name in ("sparsity", "value", "− dense (95 %)", "residual")
        table.add_column(name, justify="right" if numeric else "left")
    for name, measured in result["dense"]["metrics"].items():
        table.add_row("dense", "", names[name], number(measured["value"], 5), *[""] * 4)
    for group in groups(result):
        table.add_section()
        for sparsity in dict.fromkeys(cell["sparsity"] for cell in group.cells):
            done = [c for c in group.cells if c["sparsity"] == sparsity and c["status"] == "done"]
            for name, evaluation in evaluations.items():
                where = (group.title, f"{sparsity:g}", names[name])
                if not done:
                    table.add_row(*where, "failed", *[""] * 4)
                    continue
                values = [cell["metrics"][name]["value"] for cell in done]
                value = max(values) if evaluation["higher"] else min(values)
                best = done[values.index(value)]
                change = best["difference"][name][best["metrics"][name]["metric"]]
                shown = number(value, 5), signed(change), best["criterion"], best["variant"]
                table.add_row(*where, *shown, f"{best['residual']['mean']:.4f}")
    return table
