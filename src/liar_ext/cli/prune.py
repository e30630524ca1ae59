"""`liar prune SRC --out DIR`: compress a checkpoint, on one process or under `torchrun`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from liar_ext.cli.options import (
    add_recipe_options,
    drops_alone,
    planned_recipe,
    recipe_of,
    refuse_torchrun,
)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "prune",
        help="make a smaller checkpoint",
        description="Compress a local Hugging Face folder or hub id into a new folder. Under "
        "torchrun, calibration samples, solves and writing are shared by its processes.",
    )
    parser.add_argument("source", metavar="SRC", help="folder or hub id; it is only read")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    add_recipe_options(parser)
    add_execution_options(parser)
    add_trace(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace DIR when it exists")
    parser.add_argument("--dry-run", action="store_true", help="say what would happen, and stop")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.set_defaults(run=run)


def add_execution_options(parser: argparse.ArgumentParser) -> None:
    """How it runs; nothing here changes the result."""
    group = parser.add_argument_group("execution")
    group.add_argument(
        "--resume", action="store_true", help="go on with what an interrupted run left beside DIR"
    )
    add_journal(group)
    add_places(group)


def add_trace(parser: argparse.ArgumentParser) -> None:
    """`liar plan`, `liar compare` and `liar bench latency` have this, too."""
    parser.add_argument(
        "--trace",
        action="store_true",
        help="of a family without an adapter, find the Sites by running its layers (liar trace)",
    )


def add_waiting(group: Any) -> None:
    """Where hidden states wait; `liar plan` and `liar batch` have these, too."""
    group.add_argument(
        "--hidden-states",
        metavar="PLACE",
        default="auto",
        help="where hidden states and paused forwards wait: device, host (pinned memory), disk, or "
        "auto, the first with room (default auto)",
    )
    group.add_argument(
        "--scratch",
        metavar="FOLDER",
        type=Path,
        help="for --hidden-states disk; default beside DIR",
    )


def add_journal(group: Any) -> None:
    """How often the journal is written; `liar batch` has this, too."""
    group.add_argument(
        "--journal-seconds",
        type=float,
        metavar="S",
        default=30.0,
        help="least time between two journal entries; 0 is one after every layer (default 30)",
    )


def add_places(group: Any) -> None:
    """Where what does not fit into memory goes; `liar plan` has these, too."""
    add_waiting(group)
    group.add_argument(
        "--moments",
        metavar="FOLDER",
        type=Path,
        help="keep the statistics here, and use those that are there (--statistics oneshot)",
    )


def execution_of(arguments: argparse.Namespace) -> Any:
    from liar_ext.engine.execution import Execution

    return Execution(
        hidden_states=arguments.hidden_states,
        scratch=arguments.scratch,
        journal_seconds=arguments.journal_seconds,
        resume=arguments.resume,
        moments=arguments.moments,
    )


def run(arguments: argparse.Namespace) -> dict[str, Any] | None:
    if drops_alone(arguments) and not arguments.dry_run:
        return _drop(arguments)
    execution = execution_of(arguments)
    if arguments.dry_run:
        from liar_ext.checkpoint.load import resolve
        from liar_ext.checkpoint.writer import check_output
        from liar_ext.cli import plan

        source = resolve(arguments.source, config_only=True)
        check_output(Path(arguments.out), source, overwrite=arguments.overwrite)
        return plan.show(
            arguments.source,
            planned_recipe(arguments),
            execution,
            as_json=arguments.json,
            out=Path(arguments.out),
            trace=arguments.trace,
        )
    from liar_ext.cli.output import Watcher, print_table, summary
    from liar_ext.engine.allocator import steady_allocator
    from liar_ext.engine.compress import compress
    from liar_ext.engine.progress import Silent
    from liar_ext.engine.ranks import Ranks

    recipe = recipe_of(arguments)
    # so that memory is what `liar plan` says
    steady_allocator()
    with Ranks.from_environment(recipe.device) as ranks:
        first = ranks.rank == 0
        with Watcher.of(arguments) if first else Silent() as watcher:
            if first and arguments.verbose:
                _tell_recipe(watcher, recipe)
            report = compress(
                arguments.source,
                arguments.out,
                recipe,
                overwrite=arguments.overwrite,
                progress=watcher,
                execution=execution,
                ranks=ranks,
                trace=arguments.trace,
            )
    if not first:
        # one report, from one rank
        arguments.json = False
        return None
    if not arguments.json:
        print_table(summary(report))
        print(f"written: {arguments.out}")
    return {"out": arguments.out, **report.to_json()}


def _tell_recipe(watcher: Any, recipe: Any) -> None:
    """What is not the default of the recipe, presets and all."""
    from dataclasses import fields

    usual = {field.name: field.default for field in fields(recipe)}
    found = {name: value for name, value in vars(recipe).items() if value != usual[name]}
    watcher.detail("recipe: " + ", ".join(f"{name} {value}" for name, value in found.items()))


def _drop(arguments: argparse.Namespace) -> dict[str, Any]:
    """`--drop-layers` alone: no recipe, nothing to compute."""
    from liar_ext.cli.output import warn
    from liar_ext.depth.drop import drop_layers
    from liar_ext.depth.methods import parse_layers
    from liar_ext.report.text import count, size

    refuse_torchrun("--drop-layers is one process; run it without torchrun")
    dropped = parse_layers(arguments.drop_layers)
    report = drop_layers(arguments.source, arguments.out, dropped, overwrite=arguments.overwrite)
    for text in report["warnings"]:
        warn(arguments, text)
    if not arguments.json:
        layers, totals = report["layers"], report["totals"]
        print(
            f"layers {layers['before']} -> {layers['after']}, parameters "
            f"{count(totals['parameters_before'])} -> {count(totals['parameters_after'])}, "
            f"{size(totals['bytes_before'])} -> {size(totals['bytes_after'])}, "
            f"{report['seconds']:.1f} s"
        )
        print(f"written: {arguments.out}")
    return {"out": arguments.out, **report}
