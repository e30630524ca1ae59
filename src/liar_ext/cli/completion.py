"""`liar completion SHELL`, and what is offered where a value is asked for."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from typing import Any

from liar_ext.cli.options import NAMES
from liar_ext.errors import InputError

SHELLS = ("bash", "zsh", "fish")
# argcomplete sets this in the process that answers
ASKED = "_ARGCOMPLETE"
# what options beside the recipe's may be, by command and by dest; as `NAMES`, written down because
# the registries import torch: tests hold the two together
OWN: dict[str, dict[str, tuple[str, ...]]] = {
    "merge": {
        "rule": ("telescope", "rdsc", "mean"),
        "norms": ("auto", "base", "rule"),
        "similarity": ("flat", "token"),
        "weights": ("auto", "memory", "disk"),
    },
    "fuse": {"repair": ("liar", "none"), "importance": ("loss", "accuracy", "paper")},
    "recover": {
        "method": ("partial", "lora"),
        "ranks": ("uniform", "residual", "performance"),
    },
    "replace": {
        "network": ("layer", "layers", "swiglu", "mlp"),
        "loss": ("mse", "lm"),
        "loss_tokens": ("plain", "normalised"),
        "init": ("inherit", "random"),
        "keep": ("best", "last"),
    },
    "grow": {
        "predictor": ("mlp", "ridge", "average", "copy", "identity"),
        "hyper_parameters": ("paper", "code"),
    },
    "layers": {
        "measures": ("influence", "angle", "magnitude-l1", "magnitude-l2", "taylor", "loss"),
    },
    "compare": {
        "criteria": NAMES["criterion"],
        "allocations": NAMES["allocation"],
        "reconstructions": NAMES["reconstruct"],
        "target_signals": NAMES["target_signal"],
    },
    "export": {
        "format": ("padded", "onnx", "gguf", "deci"),
        "to": ("widest", "dense"),
        "outtype": ("f32", "f16", "bf16"),
    },
    "bench serve": {"mode": ("eager", "compile")},
}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "completion",
        help="completion of commands, options and names, for a shell",
        description="Print what a shell needs to complete commands, options, names of methods and "
        "paths. It asks `liar` itself, so that it is never out of date.",
    )
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    try:
        import argcomplete
    except ImportError as error:
        raise InputError("completion needs argcomplete: pip install argcomplete") from error

    print(argcomplete.shellcode(["liar"], shell=arguments.shell))


def asked_about() -> list[str] | None:
    """The words of the line that a shell wants to be completed; None where none does."""
    return os.environ.get("COMP_LINE", "").split() if ASKED in os.environ else None


def answer(parser: argparse.ArgumentParser) -> None:
    """Print what could stand at the cursor, and end. Nothing but names is imported for it."""
    import argcomplete

    for leaf in _all(parser):
        own = OWN.get(leaf.prog.removeprefix("liar "), {})
        for action in leaf._actions:
            if names := own.get(action.dest) or NAMES.get(action.dest):
                action.completer = _listed(names)  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser, always_complete_options="long")


def _listed(names: Iterable[str]) -> Callable[..., list[str]]:
    """Also of a value that is a list, behind its last comma."""

    def complete(prefix: str, **_: Any) -> list[str]:
        before, comma, _last = prefix.rpartition(",")
        given = before.split(",")
        return [f"{before}{comma}{name}" for name in names if name not in given]

    return complete


def _all(parser: argparse.ArgumentParser) -> Iterable[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _all(child)
