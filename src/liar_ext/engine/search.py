"""Searcher: the level database, the oracle over it, and the search of an allocation on both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from liar_ext.allocation import Allocation, Budget
from liar_ext.allocation.base import width_grid
from liar_ext.allocation.levels import levels
from liar_ext.allocation.search import Candidate, Problem, Search
from liar_ext.calibration.batch import Batch, first_samples
from liar_ext.engine.judgements import Judgements
from liar_ext.engine.keeper import Keeper, Position
from liar_ext.engine.ledger import FILE, SearchLedger
from liar_ext.engine.level_store import FiledLevels, HeldLevels, Key, Levels, check_room
from liar_ext.engine.measure import Measured, Measurer
from liar_ext.engine.oracle import ModelOracle
from liar_ext.engine.repair import Repairer
from liar_ext.engine.runtime import Runtime
from liar_ext.errors import InputError
from liar_ext.models import Site
from liar_ext.recipe import KINDS, Recipe
from liar_ext.report.text import size

FOLDER = "levels"
_DONE = "search"
# widths of a Site with more units; Tyr-the-Pruner begins with 9
LEVELS = 12
_PRIME = 1_000_003


@dataclass
class Searcher:
    """Finds widths by trying whole models; see `ModelOracle` and `allocation.search`.

    Attributes:
        batches, recipe: as of the driver.
        measurer: takes Moments of the dense path; repairer: makes levels of them.
        enter: puts the hidden states that enter the first layer into the measurer's stream.
        keeper: keeps what an interrupted run goes on from, with it the levels and what was tried.
        judgements: has levels that another compression of the model made.
        facts: for the report.
    """

    runtime: Runtime
    batches: Sequence[Batch]
    recipe: Recipe
    measurer: Measurer
    repairer: Repairer
    enter: Callable[[], None]
    keeper: Keeper | None
    judgements: Judgements | None
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._store: Levels = HeldLevels()
        if self.keeper is not None:
            self._store = FiledLevels(self.keeper.folder / FOLDER)

    def check_room(self, budgets: Mapping[Key, Budget]) -> None:
        """Say what the levels take, before anything is computed.

        Raises:
            InputError: there is no room for them.
        """
        if self.runtime.ranks.rank or self.facts:
            return
        needed = self._bytes(self._grids(budgets))
        folder = None if self.keeper is None else self.keeper.folder
        if folder is None and self.judgements is not None:
            self._store = self.judgements.levels(self.recipe, needed)
        where = "memory" if folder is None else f"{folder / FOLDER} until it is over"
        self.runtime.progress.tell(f"search: its levels take {size(needed)} in {where}")
        check_room(folder, needed, self._store.bytes)

    def remember(self) -> None:
        """If an earlier run has searched, what it found is known."""
        found = None if self.keeper is None else self.keeper.aside(_DONE)
        if found is not None:
            self.facts = found[1]
            # it may have been killed before they were gone
            self._discard()

    def wanted(
        self, allocation: Allocation, budgets: Mapping[Key, Budget], position: Position
    ) -> list[float]:
        """Kept units of each Site, in the order of `budgets`.

        Args:
            position: after the survey, to go on from; the levels and what was tried are kept
                beside it.

        Raises:
            InputError: no model that was tried has a finite loss; as of the search.
        """
        assert allocation.search is not None
        if not self.facts:
            self._search(allocation.search, budgets, position)
        return [float(units) for units in self.facts["best"]]

    def _search(self, search: Search, budgets: Mapping[Key, Budget], position: Position) -> None:
        grids = self._grids(budgets)
        ledger = self._opened(position)
        windows = first_samples(self.batches, self.recipe.search_samples)
        count = samples_of(windows)
        problem = problem_of(self.recipe, budgets, count)

        @cache
        def prepare() -> None:
            self._build(grids)
            label, spent = f"searching ({self.recipe.allocation})", int(ledger.spent(count))
            self.runtime.progress.begin(self.recipe.search_evaluations, label, spent)

        oracle = ModelOracle(
            runtime=self.runtime,
            windows=windows,
            sites=[(key, budget.units) for key, budget in budgets.items()],
            levels=self._store,
            ledger=ledger,
            prepare=prepare,
        )
        try:
            best = search(problem, oracle)
        finally:
            oracle.free()
        self._say(ledger, best, count)
        self.facts["levels_bytes"] = self._bytes(grids)
        self.facts |= self._noted(grids)
        if self.keeper is not None:
            self.keeper.put_aside(_DONE, {}, self.facts)
        self._discard()

    def _discard(self) -> None:
        """The levels are not needed any more, and the output may need their room."""
        self.runtime.ranks.barrier()
        if self.runtime.ranks.rank == 0:
            self._store.discard()

    def _opened(self, position: Position) -> SearchLedger:
        """What was tried: with the journal, or in memory without one."""
        if self.keeper is None:
            return SearchLedger(None)
        file = self.keeper.folder / FILE
        if self.runtime.ranks.rank == 0 and self.keeper.resumed is None:
            # of a run that was killed before anything said what it was
            self._store.discard()
            file.unlink(missing_ok=True)
        self.runtime.ranks.barrier()
        # from here on a run that is interrupted finds what there is
        self.keeper.keep(position, {}, now=True)
        ledger = SearchLedger(file if self.runtime.ranks.rank == 0 else None)
        # all ranks know the same
        known = self.runtime.ranks.broadcast(list(ledger.items()))
        if self.runtime.ranks.rank:
            for candidate, windows, loss in known:
                ledger.add([candidate], windows, [loss])
        return ledger

    def _grids(self, budgets: Mapping[Key, Budget]) -> dict[Key, tuple[int, ...]]:
        return {key: level_grid(budget, self.recipe.round_to) for key, budget in budgets.items()}

    def _bytes(self, grids: Mapping[Key, tuple[int, ...]]) -> int:
        return sum(level_bytes(site, grids[site.layer, site.kind]) for site in self._sites(grids))

    def _sites(self, grids: Mapping[Key, tuple[int, ...]]) -> list[Site]:
        layers = dict.fromkeys(layer for layer, _ in grids)
        return [site for layer in layers for site in self.measurer.sites(layer)]

    def _build(self, grids: Mapping[Key, tuple[int, ...]]) -> None:
        """Levels that are not there yet, from one pass over the dense model."""
        missing = {
            key: [units for units in widths[:-1] if not self._store.has(key, units)]
            for key, widths in grids.items()
        }
        # ranks look at one disk, but not at the same time
        missing = self.runtime.ranks.broadcast({key: own for key, own in missing.items() if own})
        if not missing:
            return
        if self.measurer.needed(0):
            self.enter()
        stop = max(layer for layer, _ in missing) + 1
        self.runtime.progress.begin(stop, "making levels")
        for index in range(stop):
            self.runtime.open(index)
            if any(layer == index for layer, _ in missing):
                found = self.measurer.dense(index)
                for site in self.measurer.sites(index):
                    key = index, site.kind
                    measured = found.pop(site.kind)
                    if key in missing:
                        self._make(site, measured, grids[key][:-1], missing[key])
            else:
                self.measurer.pass_on(index)
            self.runtime.close(index)
            self.runtime.progress.layer(index)
        self.measurer.leave()

    def _make(
        self, site: Site, measured: Measured, widths: Sequence[int], missing: Sequence[int]
    ) -> None:
        """The missing ones of all widths of a Site, which are the same whichever are missing."""
        place = 2 * site.layer + KINDS.index(site.kind)
        self.repairer.generator.manual_seed((self.recipe.seed * _PRIME + place) % 2**63)
        descending = sorted(widths, reverse=True)
        kept, notes = self.repairer.selections(site, measured.moments, descending)
        notes = [*measured.notes, *notes]
        for units, keep in zip(descending, kept, strict=True):
            if units not in missing:
                continue
            level = self.repairer.level(site, measured.moments, keep, notes, held=measured.held)
            with self.runtime.clock.phase("write"):
                if self.runtime.ranks.rank == 0 or self.keeper is None:
                    self._store.save((site.layer, site.kind), units, level)
                self.runtime.ranks.barrier()

    def _noted(self, grids: Mapping[Key, tuple[int, ...]]) -> dict[str, Any]:
        """How many levels had to be made otherwise than asked, and the first note of the first."""
        every = [
            (site, units, self._store.notes((site.layer, site.kind), units))
            for site in self._sites(grids)
            for units in grids[site.layer, site.kind][:-1]
        ]
        noted = [(site, units, notes[0]) for site, units, notes in every if notes]
        found: dict[str, Any] = {"levels": len(every), "levels_noted": len(noted)}
        if noted:
            site, units, note = noted[0]
            found["first_note"] = f"{site.name} at {units} of {site.units} units: {note}"
            self.runtime.progress.tell(
                f"search: notes on {len(noted)} of {len(every)} levels: {found['first_note']}"
            )
        return found

    def _say(self, ledger: SearchLedger, best: Candidate, count: int) -> None:
        whole = [loss for _, windows, loss in ledger.items() if windows == count]
        if not any(math.isfinite(loss) for loss in whole):
            raise InputError(
                f"--allocation {self.recipe.allocation}: none of the {len(whole)} models that were "
                "tried has a finite loss; check the checkpoint, or compute in a wider type with "
                "--dtype"
            )
        self.facts = {
            "windows": count,
            # some on a part of the windows, some of these on all of them, too
            "tried": len({candidate for candidate, _, _ in ledger.items()}),
            "tried_on_all_windows": len(whole),
            # of the dense model it is 0
            "first_loss": whole[0] if math.isfinite(whole[0]) else None,
            "best_loss": ledger.get(best, count),
            "best": list(best),
        }


def samples_of(batches: Sequence[Batch]) -> int:
    return sum(len(batch.input_ids) for batch in batches)


def problem_of(recipe: Recipe, budgets: Mapping[Key, Budget], windows: int) -> Problem:
    """What a search is to solve, on so many windows."""
    return Problem(
        list(budgets.values()),
        recipe.sparsity,
        [level_grid(budget, recipe.round_to) for budget in budgets.values()],
        recipe.search_evaluations,
        recipe.seed,
        windows=windows,
        layers=[layer for layer, _ in budgets],
    )


def level_grid(budget: Budget, round_to: int) -> tuple[int, ...]:
    """Widths of a Site that a search may try, ascending, the last one dense."""
    allowed = width_grid(budget, round_to)

    def nearest(wish: int) -> int:
        return min(allowed, key=lambda units: (abs(units - wish), units))

    none = [] if budget.least else [0]
    return tuple(sorted({*none, *(nearest(wish) for wish in levels(budget.units, LEVELS))}))


def level_bytes(site: Site, widths: Sequence[int]) -> int:
    """Of a Site's levels: units, weights and perhaps a bias each; the dense one needs none."""
    weight = site.weight()
    outputs, each = weight.shape[0], weight.element_size()
    return sum(
        8 * units + each * outputs * (units * site.columns_per_unit + 1) for units in widths[:-1]
    )
