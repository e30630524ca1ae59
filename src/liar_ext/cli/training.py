"""Options of a training on a text, for the commands that train something."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping
from typing import Any

from liar_ext.cli.option_table import add_options, given_of
from liar_ext.errors import InputError

# option -> (type, metavar, help, default in words)
TRAINING: dict[str, tuple[Any, str, str, str]] = {
    "steps": (int, "N", "updates", "required with --train"),
    "lr": (float, "F", "learning rate at its height", "default 2e-4"),
    "warmup": (int, "N", "steps until then", "default 3 %% of all"),
    "floor": (float, "F", "at the end, as a fraction of it, by a cosine", "default 0.1"),
    "batch_size": (int, "N", "windows in a forward", "default 8"),
    "accumulation": (int, "N", "forwards in an update", "default 1"),
    "seq_len": (int, "N", "tokens in a window", "default 2048 at most"),
    "weight_decay": (float, "F", "of AdamW", "default 0"),
    "clip": (float, "F", "norm of all gradients at most", "default 1"),
    "held_out": (
        int,
        "N",
        "windows to measure on, not to train on",
        "default 32, a tenth at most",
    ),
    "evaluate_every": (
        int,
        "N",
        "steps between two such measurements",
        "default a tenth of all",
    ),
    "save_every": (int, "N", "steps between two states that --resume goes on from", "default 100"),
}
TEXT = ".txt, .jsonl, .csv, tokens (.npy, .safetensors), datasets"


def add_training(
    group: Any, defaults: Mapping[str, str] | None = None, without: Collection[str] = ()
) -> None:
    """The options but for `--train`, and `--resume`.

    Args:
        group: of a parser; defaults: in words, those that are not the usual ones.
        without: options that the command has in another way.
    """
    options = {
        name: (kind, metavar, f"{text} ({(defaults or {}).get(name, usual)})")
        for name, (kind, metavar, text, usual) in TRAINING.items()
        if name not in without
    }
    add_options(group, options)
    group.add_argument(
        "--resume", action="store_true", help="go on with what an interrupted run left beside DIR"
    )


def training_of(arguments: argparse.Namespace, defaults: Mapping[str, Any] | None = None) -> Any:
    """The TextTraining that the options describe; None without `--train`.

    Args:
        defaults: of a Schedule, where they are not its own.
    Raises:
        InputError: an option of a training without one, or a training without an end.
    """
    from liar_ext.recovery.schedule import Schedule
    from liar_ext.recovery.text import TextTraining

    given = given_of(arguments, TRAINING)
    if arguments.train is None:
        if given:
            option = f"--{next(iter(given)).replace('_', '-')}"
            raise InputError(f"{option}: is of a training; give --train FILE as well")
        return None
    if "steps" not in given:
        raise InputError("--train: for how long? give --steps N")
    own = {name: given.pop(name) for name in ("seq_len", "held_out") if name in given}
    if "lr" in given:
        given["learning_rate"] = given.pop("lr")
    schedule = Schedule(**{**(defaults or {}), **given}, seed=arguments.seed)
    return TextTraining(arguments.train, schedule, **own)


def carried_out(
    command: Callable[..., dict[str, Any]], arguments: argparse.Namespace, asked: Any
) -> dict[str, Any]:
    """The report of a command that may train, with its progress shown and its warnings said.

    Args:
        command: takes source, out and what is asked for.
    """
    from liar_ext.cli.output import Watcher, warn

    with Watcher.of(arguments) as watcher:
        report = command(
            arguments.source,
            arguments.out,
            asked,
            overwrite=arguments.overwrite,
            resume=arguments.resume,
            progress=watcher,
        )
    for text in report["warnings"]:
        warn(arguments, text)
    return report


def trained_line(training: Mapping[str, Any]) -> str | None:
    """What a training did to the loss on held-out windows, for people; None where none were."""
    from liar_ext.report.text import count

    looks = training["held_out"]
    if not looks:
        return None
    kept = next(look for look in looks if look["step"] == training["kept"])
    best = "" if kept is looks[-1] else f" (after {kept['step']} steps, which are kept)"
    return (
        f"trained {count(training['parameters'])} parameters for {training['steps']} steps: "
        f"held-out loss {looks[0]['loss']:.4f} -> {kept['loss']:.4f}{best}"
    )
