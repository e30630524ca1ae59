"""`liar batch JOBS.jsonl`: many compressions, one after another, that share what they can."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liar_ext.cli.options import add_recipe_options, refuse_torchrun, values_of
from liar_ext.cli.prune import add_journal, add_waiting
from liar_ext.errors import InputError, LiarError

if TYPE_CHECKING:
    from rich.table import Table

    from liar_ext.engine.execution import Execution
    from liar_ext.job_queue import Outcome

DESCRIPTION = """Each line of JOBS.jsonl is a JSON object with `source`, `out`, and any fields of a
recipe.json; `name`, `overwrite` and `preset` may be given, too. The recipe options are for all
lines that do not say otherwise. Nothing starts unless every line, and the checkpoint it reads, can
be used. Jobs of the same source and calibration with statistics oneshot need one forward pass
between them."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "batch", help="many compressions in one go", description=DESCRIPTION
    )
    parser.add_argument("jobs", metavar="JOBS.jsonl", help="one job a line")
    add_recipe_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    parser.add_argument(
        "--resume", action="store_true", help="skip what is done, go on with what was interrupted"
    )
    group = parser.add_argument_group("execution")
    add_waiting(group)
    add_journal(group)
    parser.add_argument("--stop-on-error", action="store_true", help="run no job after a failure")
    parser.add_argument(
        "--moments", metavar="DIR", help="for shared statistics (default: .JOBS.moments beside it)"
    )
    parser.add_argument("--keep-moments", action="store_true", help="do not delete them at the end")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def _options(execution: Execution, arguments: argparse.Namespace) -> list[str]:
    """Of every job's `liar prune`."""
    options = ["--hidden-states", execution.hidden_states]
    options += ["--journal-seconds", str(execution.journal_seconds)]
    options += [f"--{name}" for name in ("quiet", "verbose") if getattr(arguments, name)]
    return options if execution.scratch is None else [*options, "--scratch", str(execution.scratch)]


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all jobs.

    Raises:
        InputError: lines that cannot be used, or the batch was interrupted.
        LiarError: some jobs failed. The summary is printed before.
    """
    from liar_ext.cli.output import Watcher, print_table
    from liar_ext.engine.execution import Execution
    from liar_ext.job_queue import Queue
    from liar_ext.job_sources import Sources
    from liar_ext.jobs import JobsError, read_jobs
    from liar_ext.recipe import Recipe

    started = time.perf_counter()
    refuse_torchrun("liar batch starts processes of its own; run it without torchrun")
    # checked here, once, and not by each job
    execution = Execution(
        hidden_states=arguments.hidden_states,
        scratch=arguments.scratch,
        journal_seconds=arguments.journal_seconds,
    )
    file = Path(arguments.jobs)
    defaults = values_of(arguments)
    # what is wrong with the options is no fault of a line
    Recipe.from_json(defaults)
    try:
        jobs = read_jobs(
            file,
            defaults,
            preset=arguments.preset,
            overwrite=arguments.overwrite,
            resume=arguments.resume,
            look=Sources(),
        )
    except JobsError as error:
        if len(error.problems) > 1:
            print(*error.problems, sep="\n", file=sys.stderr)
        raise
    queue = Queue(
        jobs,
        moments=Path(arguments.moments or file.parent / f".{file.stem}.moments"),
        keep_moments=arguments.keep_moments,
        resume=arguments.resume,
        stop_on_error=arguments.stop_on_error,
        options=_options(execution, arguments),
        say=Watcher.of(arguments).tell,
    )
    outcomes = queue.run()
    counts = Counter(outcome.status for outcome in outcomes)
    result = {
        "jobs": [outcome.to_json() for outcome in outcomes],
        "counts": dict(counts),
        "seconds": time.perf_counter() - started,
    }
    if not arguments.json:
        print_table(summary(outcomes))
    missing = len(jobs) - counts["done"] - counts["skipped"]
    if queue.interrupted or counts["failed"]:
        if arguments.json:
            print(json.dumps(result, allow_nan=False), flush=True)
        # the exit code of an interrupted command is that of bad input
        if queue.interrupted:
            raise InputError(
                f"interrupted: {missing} of {len(jobs)} jobs are not done; --resume goes on"
            )
        first = next(outcome for outcome in outcomes if outcome.status == "failed")
        raise LiarError(
            f"{missing} of {len(jobs)} jobs are not done; line {first.job.line}, "
            f"{first.job.name}: {first.error}"
        )
    return result


def summary(outcomes: list[Outcome]) -> Table:
    """One row a job: what became of it, what was removed, and how long it took."""
    from rich.table import Table

    table = Table(title=f"{len(outcomes)} jobs", title_justify="left")
    for name in ("name", "status", "sparsity", "parameters", "seconds", "error"):
        numeric = name in ("sparsity", "parameters", "seconds")
        table.add_column(name, justify="right" if numeric else "left")
    for outcome in outcomes:
        totals = outcome.totals or {}
        sparsity = f"{totals['sparsity']:.3f}" if totals else ""
        ratio = f"{totals['parameters_after'] / totals['parameters_before']:.3f}" if totals else ""
        seconds = f"{outcome.seconds:.1f}" if outcome.seconds else ""
        row = (outcome.job.name, outcome.status, sparsity, ratio, seconds, outcome.error or "")
        table.add_row(*map(_plain, row))
    return table


def _plain(text: str) -> str:
    """Brackets of a name or an error are no markup."""
    from rich.markup import escape

    return escape(text)
