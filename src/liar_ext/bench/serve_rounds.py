"""The rounds of `liar bench serve`: one workload, all models by turns.

Every round runs every model once, in another order each time, so that a slow minute of the machine
hits all of them alike, and ratios are of times that were taken together. Before anything is timed,
what is timed has to give what transformers gives.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from liar_ext.bench.measure import peak_bytes
from liar_ext.bench.serve_entries import compare, entry, measured, whole
from liar_ext.bench.serve_lanes import Lane, compiling, lane, settled, why_not
from liar_ext.bench.serve_models import Served
from liar_ext.bench.serve_prompts import Work, drawn
from liar_ext.bench.serve_work import Ceilings
from liar_ext.errors import is_out_of_memory

# the first rounds pay for threads, libraries and clocks that rise
WARM_UP_ROUNDS, WARM_UP_SECONDS = 2, 1.0


@dataclass
class Turn:
    """A model that takes part in the rounds.

    Attributes:
        held: bytes of the GPU before the lane, which may keep a cache and graphs.
        cache_bytes: keys and values that a token reads on average.
        rounds: seconds of its phases.
    """

    served: Served
    row: dict[str, Any]
    lane: Lane
    held: int
    cache_bytes: float
    rounds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def runs(self) -> bool:
        return self.row["reason"] is None


class Rounds:
    """One workload, of all models in all modes.

    Attributes:
        problems: what was wrong or did not fit, in words.
    """

    def __init__(
        self,
        models: Sequence[Served],
        work: Work,
        modes: tuple[str, ...],
        repeats: int,
        device: torch.device,
        ceilings: Ceilings,
    ) -> None:
        self._models, self._work, self._modes, self._repeats = models, work, modes, repeats
        self._device, self._ceilings = device, ceilings
        self.problems: list[str] = []

    def run(
        self, loading: Sequence[Mapping[str, Any]], peaks: Sequence[Sequence[int]]
    ) -> list[dict[str, Any]]:
        """Rows, the dense model's first in each mode.

        Args:
            loading: see `serve_probe.measured`, of each model; peaks: of each in this workload, or
                nothing.
        """
        vocabulary = min(model.outline.vocabulary for model in self._models)
        ids = drawn(self._work.batch, self._work.prompt, vocabulary, self._device)
        rows: list[dict[str, Any]] = []
        turns: list[Turn] = []
        with compiling(self._modes):
            for mode in self._modes:
                for number, served in enumerate(self._models):
                    row = entry(served, self._work, mode, loading[number], None)
                    rows.append(row)
                    turn = self._ready(served, row, ids)
                    if turn is not None:
                        self._memory(turn, loading[number], peaks[number])
                        turns.append(turn)
            self._rounds(turns)
        for turn in turns:
            if turn.runs:
                measured(turn.row, turn.served, turn.rounds, turn.cache_bytes, self._ceilings)
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
            turn = Turn(served, row, own, held, own.cache_bytes())
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
        return turn

    def _held(self) -> int:
        cuda = self._device.type == "cuda"
        return torch.cuda.memory_allocated(self._device) if cuda else 0

    def _memory(self, turn: Turn, loading: Mapping[str, Any], peaks: Sequence[int]) -> None:
        row = turn.row
        if self._device.type == "cuda":
            try:
                on_top = self._held() - turn.held
                more = peak_bytes(turn.lane.round, self._device)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._lacks_memory(row)
                return
            assert more is not None
            row["peak_memory_bytes"] = turn.served.own_bytes + on_top + more
        elif row["mode"] == "eager" and peaks:
            row["process_peak_bytes"] = peaks[0]
            row["peak_memory_bytes"] = peaks[0] - loading["base_bytes"]

    def _rounds(self, turns: Sequence[Turn]) -> None:
        started, warm, done = time.perf_counter(), 0, 0
        shuffled, order = random.Random(0), list(turns)
        while done < self._repeats:
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
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self.problems.append(
            f"{self._named(row)}: out of memory; lower --batch or --prompt, or give fewer models"
        )

    def _named(self, row: Mapping[str, Any]) -> str:
        return (
            f"{row['name']} ({row['mode']}, batch {self._work.batch}, prompt {self._work.prompt})"
        )
