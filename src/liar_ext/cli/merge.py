"""`liar merge SRC --out DIR`: layers merged into those before them (LaCo)."""

from __future__ import annotations

import argparse
from typing import Any

from liar_ext.cli.option_table import Options, add_options, given_of
from liar_ext.cli.options import refuse_torchrun
from liar_ext.cli.prune import add_trace, add_waiting

# of MergeSettings. its defaults are said here again: to import it takes seconds, which help should
# not
OPTIONS: Options = {
    "rule": (
        str,
        "NAME",
        "what the merged layer is: telescope (LaCo's code), rdsc (its paper), mean "
        "(default telescope)",
    ),
    "norms": (
        str,
        "HOW",
        "weights of norms: base (the first layer's), rule (as all else), auto (as the rule's "
        "source has it; default auto)",
    ),
    "drop": (int, "N", "let exactly N layers go, by a threshold that is found or given"),
    "threshold": (
        float,
        "T",
        "accept a merge if last hidden states are more similar than this (default 0.65 without "
        "--drop)",
    ),
    "combine": (int, "C", "layers that one merge makes one of (default 4 of 32 in proportion)"),
    "lowest": (int, "L", "lowest layer that takes others in (default 0)"),
    "highest": (int, "H", "the first merge ends below this layer (default the last one)"),
    "interval": (int, "I", "step down after a merge (default 2 of 32 in proportion)"),
    "similarity": (
        str,
        "NAME",
        "cosine of a text's tokens as one vector (flat), or mean of theirs (token) (default flat)",
    ),
    "calibration": (str, "TEXT", ".txt, .jsonl, .csv, tokens (.npy, .safetensors), datasets name"),
    "texts": (int, "D", "lines, or records, that models are compared on (default 10)"),
    "seq_len": (int, "N", "tokens of each at most (default 128)"),
    "batch_size": (int, "N", "texts at a time (default 8)"),
    "seed": (int, "N", "of the choice of texts (default 0)"),
    "device": (str, "NAME", "auto, cpu, cuda (default auto)"),
    "dtype": (
        str,
        "NAME",
        "of computing: auto, float32, bfloat16, float16 (default auto); files keep theirs",
    ),
}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "merge",
        help="merge layers into those before them",
        description="Make a checkpoint with fewer layers: from the top down, layers are merged "
        "into the one before them where the model's last hidden states stay similar to the "
        "original's (LaCo). Tensors of other layers go from file to file.",
    )
    parser.add_argument("source", metavar="SRC", help="folder or hub id; it is only read")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    group = parser.add_argument_group("merge")
    add_options(group, OPTIONS)
    group = parser.add_argument_group("execution")
    group.add_argument(
        "--weights",
        metavar="PLACE",
        default="auto",
        help="where layers are while models are compared: memory, disk (read when they are run), "
        "or auto, memory if they fit (default auto)",
    )
    add_waiting(group)
    add_trace(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace DIR when it exists")
    parser.add_argument("--dry-run", action="store_true", help="say what would happen, and stop")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from liar_ext.cli.output import Watcher, warn
    from liar_ext.depth.merge_folder import merge_layers, merge_plan
    from liar_ext.depth.merge_settings import MergeSettings
    from liar_ext.engine.execution import Execution

    refuse_torchrun("liar merge is one process; run it without torchrun")
    settings = MergeSettings(**given_of(arguments, OPTIONS))
    execution = Execution(hidden_states=arguments.hidden_states, scratch=arguments.scratch)
    where = arguments.source, arguments.out, settings
    how = {
        "overwrite": arguments.overwrite,
        "execution": execution,
        "weights": arguments.weights,
        "trace": arguments.trace,
    }
    if arguments.dry_run:
        plan = merge_plan(*where, **how)
        for text in plan["warnings"]:
            warn(arguments, text)
        if not arguments.json:
            print("\n".join(plan_lines(plan)))
        return plan
    with Watcher.of(arguments) as watcher:
        report = merge_layers(*where, progress=watcher, **how)
    if not arguments.json:
        print("\n".join(report_lines(report)))
        print(f"written: {arguments.out}")
    return {"out": arguments.out, **report}


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """What `--dry-run` says, for people."""
    from liar_ext.report.text import size

    merge, run, needs = plan["merge"], plan["run"], plan["bytes"]
    bases = plan["bases"]
    until = f", until {merge['drop']} layers are gone" if merge["drop"] is not None else ""
    threshold = merge["threshold"]
    above = "a threshold that is found" if threshold is None else f"{threshold:g}"
    walk = "" if threshold is not None else " in one walk down; a threshold takes several"
    return [
        f"{plan['source']}: {plan['layers']} layers; rule {merge['rule']}, norms {merge['norms']}",
        f"{merge['combine']} layers become one at layers {bases[0]} to {bases[-1]}, downwards, "
        f"{merge['interval']} down after each merge{until}",
        f"accepted: {merge['similarity']} similarity above {above}, on "
        f"{plan['calibration']['samples']} texts, {plan['calibration']['tokens']:,} tokens",
        f"at most {len(bases)} trials, {plan['layer_evaluations_at_most']} layers run{walk}",
        f"weights: {run['weights']} ({size(needs['weights'])} of all, {size(needs['layer'])} of a "
        f"layer); hidden states: {run['hidden_states']} ({size(needs['hidden_states'])}); "
        f"{run['device']}, {run['dtype']}",
    ]


def report_lines(report: dict[str, Any]) -> list[str]:
    """What was done, for people."""
    from liar_ext.depth.collapse import listed
    from liar_ext.report.text import count, number, size

    layers, merge, totals = report["layers"], report["merge"], report["totals"]
    runs = merge["layer_evaluations"]
    return [
        *(
            f"layer {step['layer']} took in {listed(step['with'])}: similarity "
            f"{number(step['similarity'], 4)}"
            for step in merge["accepted"]
        ),
        f"layers {layers['before']} -> {layers['after']}, parameters "
        f"{count(totals['parameters_before'])} -> {count(totals['parameters_after'])}, "
        f"{size(totals['bytes_before'])} -> {size(totals['bytes_after'])}, "
        f"{report['seconds']:.1f} s; threshold {number(merge['threshold'], 4)}",
        f"layers run: {runs['done']}; {runs['whole']} with whole models, {runs['published']} with "
        "the original beside each",
    ]
