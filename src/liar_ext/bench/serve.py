"""`liar bench serve`: how fast models answer, dense and pruned ones by turns in one process.

What is asked for, and what comes out: `serve_rounds` measures.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from liar_ext.alignment import round_to_for
from liar_ext.bench import Keep, serve_probe
from liar_ext.bench.measure import copy_rate, machine_state, matmul_rate
from liar_ext.bench.result import head
from liar_ext.bench.serve_lanes import MODES
from liar_ext.bench.serve_models import Outline, Served, Source, outline, own_dtype, serve, sources
from liar_ext.bench.serve_prompts import Work, workloads
from liar_ext.bench.serve_rounds import Rounds
from liar_ext.bench.serve_table import print_result
from liar_ext.bench.serve_work import Ceilings, sizes
from liar_ext.cli.output import Watcher
from liar_ext.engine.inputs import compute_dtype, resolve_device
from liar_ext.environment import environment
from liar_ext.errors import InputError, OutOfMemory, is_out_of_memory, unknown_choice
from liar_ext.latency import disturbances
from liar_ext.recipe import KINDS, Recipe

VERSION = 1
MEMORY = {
    "cpu": "peak resident memory of a process of its own, less what it held before the model",
    "cuda": "the model's tensors and the most that torch allocated on top of them in a round",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `liar bench serve`."""
    parser.add_argument("dense", metavar="DENSE", help="what the others are compared with")
    parser.add_argument(
        "pruned",
        metavar="PRUNED",
        nargs="*",
        help="folders, hub ids, or SRC@F: the shape of SRC pruned to equal widths at sparsity F, "
        "with random weights",
    )
    parser.add_argument(
        "--random",
        action="store_true",
        help="read configs only, and give all models random weights: speed does not depend on them",
    )
    for name, default, text in (
        ("batch", "1,8", "sequences at a time"),
        ("prompt", None, "tokens of a prompt, or of an encoder's sentences"),
        ("mode", "eager", f"of {', '.join(MODES)}"),
    ):
        shown = default or "128,512, or what the models take"
        parser.add_argument(
            f"--{name}", default=default, metavar="LIST", help=f"{text} (default {shown})"
        )
    parser.add_argument(
        "--new-tokens", type=int, default=32, metavar="N", help="generated (default 32)"
    )
    parser.add_argument("--repeats", type=int, default=15, metavar="N", help="rounds (default 15)")
    parser.add_argument("--target", metavar="KINDS", help="of SRC@F (default ffn,heads)")
    parser.add_argument(
        "--round-to",
        default="1",
        metavar="N",
        help="of SRC@F: N, auto, or what align wrote",
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda")
    parser.add_argument(
        "--dtype", default="auto", metavar="NAME", help="auto, float32, bfloat16, float16"
    )
    parser.add_argument("--note", default="", help="a remark kept in the result")


@dataclass(frozen=True)
class Asked:
    """The options, checked."""

    models: list[Source]
    batches: tuple[int, ...]
    prompts: tuple[int, ...] | None
    modes: tuple[str, ...]
    new_tokens: int
    repeats: int
    target: tuple[str, ...]
    round_to: int
    device: torch.device
    dtype: torch.dtype | None


def asked(arguments: argparse.Namespace) -> Asked:
    """Raises InputError for options that mean nothing."""
    modes = tuple(dict.fromkeys(part.strip() for part in arguments.mode.split(",")))
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise unknown_choice("--mode", unknown[0], MODES)
    if arguments.repeats < 1:
        raise InputError(f"--repeats {arguments.repeats}: must be at least 1")
    # checks the names
    wanted = Recipe(
        target=KINDS if arguments.target is None else arguments.target,
        device=arguments.device,
        dtype=arguments.dtype,
    )
    models = sources([arguments.dense, *arguments.pruned], arguments.random)
    device = resolve_device(wanted.device)
    shapes = [model for model in models if model.sparsity is not None]
    if not shapes and (arguments.round_to != "1" or arguments.target is not None):
        raise InputError("--round-to and --target are of shapes, as in SRC@0.5, and there is none")
    return Asked(
        models,
        _numbers("batch", arguments.batch),
        None if arguments.prompt is None else _numbers("prompt", arguments.prompt),
        modes,
        arguments.new_tokens,
        arguments.repeats,
        wanted.target,
        min(
            (round_to_for(arguments.round_to, own.folder, wanted.device) for own in shapes),
            default=1,
        ),
        device,
        compute_dtype(wanted.dtype, device),
    )


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(
            f"--{option} {text}: must be whole numbers, separated by commas"
        ) from error


def execute(arguments: argparse.Namespace, keep: Keep = lambda result: None) -> dict[str, Any]:
    """Measure and print; `problems` of the result names what is wrong or did not fit.

    Raises:
        InputError: a model or a workload that cannot be.
        OutOfMemory: not even the models fit.
    """
    ask, before = asked(arguments), machine_state()
    with Watcher() as progress, torch.no_grad():
        # all of them before any is loaded, which may take minutes
        known = [outline(own, target=ask.target, round_to=ask.round_to) for own in ask.models]
        works = workloads(known, ask.batches, ask.prompts, ask.new_tokens)
        # a pruned checkpoint may have been written in another dtype: like is compared with like
        dtype = ask.dtype or own_dtype(known[0])
        # while this process holds none of them
        loading = [_loading(own, works, ask, dtype, progress) for own in known]
        models: list[Served] = []
        for own in known:
            progress.tell(f"loading {own.name}")
            models.append(_served(own, ask, dtype, len(models) + 1))
        versions = environment(ask.device)
        ceilings = Ceilings(matmul_rate(dtype, ask.device), copy_rate(ask.device))
        entries: list[dict[str, Any]] = []
        problems = [
            f"{own.name} in a process of its own: {facts['reason']}"
            for own, facts in zip(known, loading, strict=True)
            if "reason" in facts
        ]

        def found() -> dict[str, Any]:
            times = [e[f"{p}_s"] for e in entries for p in ("prefill", "decode") if e[f"{p}_s"]]
            quantiles = {name: [own[name] for own in times] for name in ("p20", "p80")}
            return {
                **head("serve", ask.device, before, arguments.note),
                "version": VERSION,
                "environment": versions,
                "dense": models[0].name,
                "repeats": ask.repeats,
                "attention": models[0].model.config._attn_implementation,
                "memory": MEMORY[ask.device.type],
                "ceilings": {"flops": ceilings.flops, "copy_bytes": ceilings.bytes},
                "models": [_facts(model, own) for model, own in zip(models, loading, strict=True)],
                "entries": entries,
                "doubts": disturbances([{"seconds": quantiles}], "times"),
                "problems": problems,
            }

        progress.begin(len(works), "workloads")
        for at, work in enumerate(works):
            peaks = [own["peaks"][at : at + 1] if own.get("peaks") else [] for own in loading]
            rounds = Rounds(models, work, ask.modes, ask.repeats, ask.device, ceilings)
            entries += rounds.run(loading, peaks)
            problems += rounds.problems
            keep(found())
            progress.layer(at)
        result = found()
        for text in result["doubts"]:
            progress.warn(text)
    print_result(result)
    return result


def _served(known: Outline, ask: Asked, dtype: torch.dtype, number: int) -> Served:
    try:
        return serve(known, ask.device, dtype)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"out of memory with the weights of {known.name}, model {number} of "
            f"{len(ask.models)}; all are in memory at once: give fewer, or a smaller --dtype"
        ) from error


def _loading(
    known: Outline, works: Sequence[Work], ask: Asked, dtype: torch.dtype, progress: Watcher
) -> dict[str, Any]:
    if ask.device.type == "cuda" and known.source.random:
        # no file to read, and torch tells what is allocated
        return {"peaks": []}
    progress.tell(f"{known.name} in a process of its own: loading, and memory")
    return serve_probe.measured(
        known.source.to_json(),
        [work.to_json() for work in works],
        device=ask.device.type,
        dtype=str(dtype).removeprefix("torch."),
        round_to=ask.round_to,
        target=ask.target,
    )


def _facts(served: Served, loading: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": served.name,
        "path": served.outline.source.given,
        "random": served.outline.source.random,
        "class": type(served.model).__name__,
        "parameters": served.parameters,
        "parts": sizes(served),
        "widths": served.outline.widths,
        "file_bytes": served.file_bytes,
        **{name: own for name, own in loading.items() if name != "peaks"},
    }
