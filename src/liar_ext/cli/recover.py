"""`liar recover SRC --out DIR`: a pruned checkpoint, trained a little."""

from __future__ import annotations

import argparse
from typing import Any

from liar_ext.cli.option_table import Options, add_options, given_of
from liar_ext.cli.options import refuse_torchrun
from liar_ext.cli.training import TEXT, TRAINING, add_training, carried_out
from liar_ext.errors import InputError, unknown_choice

# of the training, in words
DEFAULTS = {"lr": "default 1e-5 for partial, 1e-4 for lora"}
PARTIAL: Options = {
    "last": (int, "K", "layers that are trained, counted from the end (default 3)"),
}
LORA: Options = {
    "ranks": (str, "NAME", "uniform; residual (by what a layer lost, no training; needs --dense); "
        "performance (RankAdaptor: short trainings and a model of them); default uniform"),
    "rank": (int, "R", "of every layer, alpha 2R; others spend as many parameters (default 8)"),
    "dense": (str, "DIR", "the model before pruning, for --ranks residual"),
}  # fmt: skip
TRIALS: Options = {
    "initial": (int, "N", "choices that are tried first (default 8)"),
    "rounds": (int, "N", "and after them, one in each round (default 8)"),
    "proposals": (int, "N", "that a round picks from (default 64)"),
    "steps": (int, "N", "updates of each trial (default 30)"),
}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "recover",
        help="train a pruned checkpoint a little",
        description="Train the last layers and the head of a checkpoint (partial), or low-rank "
        "adapters that are merged into it (lora). The result loads as the source does.",
    )
    parser.add_argument("source", metavar="SRC", help="folder or hub id; it is only read")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--train",
        required=True,
        metavar="TEXT",
        help=f"{TEXT}; a .jsonl with prompt and "
        "response, or instruction, input and output: the answers alone are learned",
    )
    parser.add_argument("--steps", required=True, type=int, metavar="N", help="updates")
    parser.add_argument(
        "--method", default="partial", metavar="NAME", help="partial or lora (default partial)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda")
    # required, and said above
    add_training(parser.add_argument_group("training"), DEFAULTS, without=("steps",))
    partial = parser.add_argument_group("--method partial")
    add_options(partial, PARTIAL)
    partial.add_argument(
        "--untie", action="store_true", help="of tied embeddings, give the head weights of its own"
    )
    partial.add_argument("--no-head", action="store_true", help="leave the head as it is")
    partial.add_argument(
        "--cache-states",
        action="store_true",
        help="keep what enters the first trained layer on disk: layers below run once for a window",
    )
    lora = parser.add_argument_group("--method lora (needs peft)")
    add_options(lora, LORA)
    lora.add_argument(
        "--keep-adapter", action="store_true", help="PEFT's adapter for SRC in DIR/adapter as well"
    )
    add_options(parser.add_argument_group("--ranks performance"), TRIALS, "trial_")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR when it exists")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    refuse_torchrun("liar recover is one process; run it without torchrun")
    from liar_ext.recovery.run import recover
    from liar_ext.report.text import count

    report = carried_out(recover, arguments, recovery_of(arguments))
    if not arguments.json:
        training = report["training"]
        told = f"trained {count(training['parameters'])} parameters for {training['steps']} steps"
        if looks := training["held_out"]:
            told += f": held-out loss {looks[0]['loss']:.4f} -> {looks[-1]['loss']:.4f}"
        print(f"{told}, {report['seconds']:.1f} s")
        if "ranks" in training:
            print(f"ranks: {', '.join(map(str, training['ranks']))}")
        print(f"written: {arguments.out}")
    return {"out": arguments.out, **report}


def recovery_of(arguments: argparse.Namespace) -> Any:
    """The Recovery that the options describe.

    Raises:
        InputError: an option that means nothing, or is of another method.
    """
    from liar_ext.recipe import CHOICES
    from liar_ext.recovery.rank_search import RankSearch
    from liar_ext.recovery.schedule import Schedule
    from liar_ext.recovery.settings import METHODS, RATES, Recovery

    method, seed = arguments.method, arguments.seed
    if arguments.device not in CHOICES["device"]:
        raise unknown_choice("--device", arguments.device, CHOICES["device"])
    if method not in METHODS:
        raise unknown_choice("--method", method, METHODS)
    of_partial = given_of(arguments, [*PARTIAL, "untie", "no_head", "cache_states"])
    of_lora = given_of(arguments, [*LORA, "keep_adapter"])
    of_trials = given_of(arguments, [f"trial_{name}" for name in TRIALS])
    for owner, given in (("partial", of_partial), ("lora", of_lora | of_trials)):
        if given and owner != method:
            raise InputError(f"{_flag(given)}: is of --method {owner}, not of {method}")
    for name, owner in (("dense", "residual"), *((name, "performance") for name in of_trials)):
        if name in of_lora | of_trials and of_lora.get("ranks") != owner:
            raise InputError(f"{_flag({name: None})}: is of --ranks {owner}")
    # these two are of the windows
    schedule = given_of(
        arguments, [n for n in TRAINING if n not in ("steps", "seq_len", "held_out")]
    )
    schedule["learning_rate"] = schedule.pop("lr", RATES[method])
    if of_partial.pop("no_head", False):
        of_partial["head"] = False
    trials = {name.removeprefix("trial_"): value for name, value in of_trials.items()}
    return Recovery(
        arguments.train,
        Schedule(arguments.steps, **schedule, seed=seed),
        method=method,
        device=arguments.device,
        search=RankSearch(**trials),
        **given_of(arguments, ("seq_len", "held_out")),
        **of_partial,
        **of_lora,
    )


def _flag(given: dict[str, Any]) -> str:
    return f"--{next(iter(given)).replace('_', '-')}"
