"""`liar bench serve`: how fast models answer, dense and pruned ones by turns in one process.

Every workload (batch, tokens, mode) is one after another; within it every round runs every model
once, in another order each time, so that a slow minute of the machine hits all of them alike, and
ratios are of times that were taken together. Before anything is timed, what is timed has to give
what transformers gives.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from liar_ext.alignment import round_to_for
from liar_ext.bench import Keep, serve_probe
from liar_ext.bench.measure import copy_rate, machine_state, matmul_rate, peak_bytes
from liar_ext.bench.result import head
from liar_ext.bench.serve_entries import compare, entry, measured, whole
from liar_ext.bench.serve_lanes import MODES, Lane, compiling, lane, settled, why_not
from liar_ext.bench.serve_models import Outline, Served, Source, outline, serve, sources
from liar_ext.bench.serve_prompts import Work, drawn, workloads
from liar_ext.bench.serve_table import print_result
from liar_ext.bench.serve_work import Ceilings, sizes
from liar_ext.cli.output import Watcher
from liar_ext.engine.inputs import compute_dtype, resolve_device
from liar_ext.environment import environment
from liar_ext.errors import InputError, OutOfMemory, is_out_of_memory
from liar_ext.latency import disturbances
from liar_ext.recipe import KINDS, Recipe

VERSION = 1
# the first rounds pay for threads, libraries and clocks that rise
WARM_UP_ROUNDS, WARM_UP_SECONDS = 2, 1.0
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
        raise InputError(f"--mode {unknown[0]}: unknown; choose from {', '.join(MODES)}")
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
        round_to_for(arguments.round_to, shapes[0].folder, wanted.device) if shapes else 1,
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
        models: list[Served] = []
        for own in known:
            progress.tell(f"loading {own.name}")
            models.append(_served(own, ask, models))
        loading = [_loading(model, works, ask, progress) for model in models]
        versions = environment(ask.device)
        ceilings = Ceilings(matmul_rate(models[0].model.dtype, ask.device), copy_rate(ask.device))
        entries: list[dict[str, Any]] = []
        problems: list[str] = []

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
            bench = Bench(models, work, ask, ceilings, loading, at)
            entries += bench.run()
            problems += bench.problems
            keep(found())
            progress.layer(at)
        result = found()
        for text in result["doubts"]:
            progress.warn(text)
    print_result(result)
    return result


def _served(known: Outline, ask: Asked, others: Sequence[Served]) -> Served:
    # a pruned checkpoint may have been written in another dtype: like is compared with like
    dtype = others[0].model.dtype if others else ask.dtype
    try:
        return serve(known, ask.device, dtype)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"out of memory with the weights of {known.name}, model {len(others) + 1} of "
            f"{len(ask.models)}; all are in memory at once: give fewer, or a smaller --dtype"
        ) from error


def _loading(
    served: Served, works: Sequence[Work], ask: Asked, progress: Watcher
) -> dict[str, Any]:
    if ask.device.type == "cuda" and served.outline.source.random:
        # no file to read, and torch tells what is allocated
        return {"peaks": []}
    progress.tell(f"{served.name} in a process of its own: loading, and memory")
    return serve_probe.measured(
        served.outline.source.to_json(),
        [work.to_json() for work in works],
        device=ask.device.type,
        dtype=str(served.model.dtype).removeprefix("torch."),
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


@dataclass
class Turn:
    """A model that takes part in the rounds.

    Attributes:
        held: bytes of the GPU before the lane, which may keep a cache and graphs.
        rounds: seconds of its phases.
    """

    served: Served
    row: dict[str, Any]
    lane: Lane
    held: int
    rounds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def runs(self) -> bool:
        return self.row["reason"] is None


class Bench:
    """One workload, of all models in all modes.

    Attributes:
        problems: what was wrong or did not fit, in words.
    """

    def __init__(
        self,
        models: Sequence[Served],
        work: Work,
        ask: Asked,
        ceilings: Ceilings,
        loading: Sequence[Mapping[str, Any]],
        at: int,
    ) -> None:
        self._models, self._work, self._ask, self._ceilings = models, work, ask, ceilings
        self._loading, self._at = loading, at
        self.problems: list[str] = []

    def run(self) -> list[dict[str, Any]]:
        """Rows, the dense model's first in each mode."""
        vocabulary = min(model.outline.vocabulary for model in self._models)
        ids = drawn(self._work.batch, self._work.prompt, vocabulary, self._ask.device)
        rows: list[dict[str, Any]] = []
        turns: list[Turn] = []
        with compiling(self._ask.modes):
            for mode in self._ask.modes:
                for number, served in enumerate(self._models):
                    row = entry(served, self._work, mode, self._loading[number], None)
                    rows.append(row)
                    turn = self._ready(served, row, ids)
                    if turn is not None:
                        self._memory(turn, number)
                        turns.append(turn)
            self._rounds(turns)
        for turn in turns:
            if turn.runs:
                cache = getattr(turn.lane, "cache_bytes", lambda: 0.0)()
                measured(turn.row, turn.served, turn.rounds, cache, self._ceilings)
        self._compare(turns)
        return rows

    def _ready(self, served: Served, row: dict[str, Any], ids: torch.Tensor) -> Turn | None:
        """Compiled where that is asked for, and checked; None with a reason in the row."""
        held = self._held()
        try:
            own = lane(served.model, served.outline.kind, ids, self._work.new_tokens, row["mode"])
            row["compile_s"] = own.compile_s
            with settled(row["mode"]):
                row["check"] = own.check()
        except Exception as error:
            if is_out_of_memory(error):
                self._lacks_memory(row)
                return None
            if row["mode"] != "compile":
                raise
            row["reason"] = f"cannot be compiled: {why_not(error)}"
            return None
        if not row["check"]["ok"]:
            row["reason"] = "is not what transformers computes"
            self.problems.append(f"{self._named(row)}: {row['reason']}: {row['check']}")
            return None
        return Turn(served, row, own, held)

    def _held(self) -> int:
        cuda = self._ask.device.type == "cuda"
        return torch.cuda.memory_allocated(self._ask.device) if cuda else 0

    def _memory(self, turn: Turn, number: int) -> None:
        row, loading = turn.row, self._loading[number]
        if self._ask.device.type == "cuda":
            try:
                on_top = self._held() - turn.held
                more = peak_bytes(turn.lane.round, self._ask.device)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._lacks_memory(row)
                return
            assert more is not None
            row["peak_memory_bytes"] = turn.served.own_bytes + on_top + more
        elif row["mode"] == "eager" and loading.get("peaks"):
            row["process_peak_bytes"] = loading["peaks"][self._at]
            row["peak_memory_bytes"] = loading["peaks"][self._at] - loading["base_bytes"]

    def _rounds(self, turns: Sequence[Turn]) -> None:
        started, warm, done = time.perf_counter(), 0, 0
        shuffled, order = random.Random(0), list(turns)
        while done < self._ask.repeats:
            timed = warm >= WARM_UP_ROUNDS and time.perf_counter() - started >= WARM_UP_SECONDS
            # nobody is always after the same one
            shuffled.shuffle(order)
            for turn in order:
                if not turn.runs:
                    continue
                try:
                    with settled(turn.row["mode"]):
                        found = turn.lane.round()
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                    self._lacks_memory(turn.row)
                    continue
                for phase, seconds in found.items() if timed else ():
                    turn.rounds.setdefault(phase, []).append(seconds)
            warm, done = warm + 1, done + timed
        for turn in turns:
            if turn.runs:
                turn.rounds = whole(turn.rounds, self._work)

    def _compare(self, turns: Sequence[Turn]) -> None:
        dense = {t.row["mode"]: t for t in turns if t.served is self._models[0] and t.runs}
        for turn in turns:
            base = dense.get(turn.row["mode"])
            if turn.runs and base is not None and turn is not base:
                compare(turn.row, turn.rounds, base.row, base.rounds)

    def _lacks_memory(self, row: dict[str, Any]) -> None:
        row["reason"] = "out of memory"
        if self._ask.device.type == "cuda":
            torch.cuda.empty_cache()
        self.problems.append(
            f"{self._named(row)}: out of memory; lower --batch or --prompt, or give fewer models"
        )

    def _named(self, row: Mapping[str, Any]) -> str:
        return (
            f"{row['name']} ({row['mode']}, batch {self._work.batch}, prompt {self._work.prompt})"
        )
