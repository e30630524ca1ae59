"""Searcher: the level database, the oracle over it, and the search of an allocation on both."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from liar_ext.allocation import Allocation, Budget
from liar_ext.allocation.base import width_grid
from liar_ext.allocation.levels import levels
from liar_ext.allocation.search import Candidate, Problem
from liar_ext.calibration.batches import Batch, first_samples
from liar_ext.engine.clock import Clock
from liar_ext.engine.keeper import Keeper, Position
from liar_ext.engine.ledger import FILE, SearchLedger
from liar_ext.engine.level_store import FiledLevels, HeldLevels, Key, Levels, check_room
from liar_ext.engine.measure import Measured, Measurer
from liar_ext.engine.oracle import ModelOracle
from liar_ext.engine.progress import Progress
from liar_ext.engine.ranks import Ranks
from liar_ext.engine.repair import Repairer
from liar_ext.engine.shelf import Shelf
from liar_ext.engine.store import LayerStore
from liar_ext.models import Site
from liar_ext.recipe import KINDS, Recipe

FOLDER = "levels"
# widths of a Site with more units; Tyr-the-Pruner begins with 9
LEVELS = 12
_PRIME = 1_000_003


@dataclass
class Searcher:
    """Finds widths by trying whole models; see `ModelOracle` and `allocation.search`.

    Attributes:
        store, batches, recipe, device, shelf, ranks, clock, progress: as of the driver.
        measurer: takes Moments of the dense path; repairer: makes levels of them.
        enter: puts the hidden states that enter the first layer into the measurer's stream.
        open_layer: opens a layer and checks it.
        facts: for the report.
    """

    store: LayerStore
    batches: Sequence[Batch]
    recipe: Recipe
    device: torch.device
    shelf: Shelf
    ranks: Ranks
    clock: Clock
    progress: Progress
    measurer: Measurer
    repairer: Repairer
    enter: Callable[[], None]
    open_layer: Callable[[int], None]
    facts: dict[str, Any] = field(default_factory=dict)

    def wanted(
        self,
        allocation: Allocation,
        budgets: Mapping[Key, Budget],
        keeper: Keeper | None,
        position: Position,
    ) -> list[float]:
        """Kept units of each Site, in the order of `budgets`.

        Args:
            position: after the survey, to go on from; the levels and what was tried are kept
                beside it.

        Raises:
            InputError: no room for the levels; as of the search.
        """
        assert allocation.search is not None
        grids = {key: level_grid(budget, self.recipe.round_to) for key, budget in budgets.items()}
        store, ledger = self._opened(grids, keeper, position)
        self._build(store, grids)
        windows = first_samples(self.batches, self.recipe.search_samples)
        problem = Problem(
            list(budgets.values()),
            self.recipe.sparsity,
            list(grids.values()),
            self.recipe.search_evaluations,
            self.recipe.seed,
        )
        self.progress.begin(self.recipe.search_evaluations, f"searching ({allocation.name})")
        oracle = ModelOracle(
            store=self.store,
            windows=windows,
            sites=[(key, budget.units) for key, budget in budgets.items()],
            levels=store,
            ledger=ledger,
            device=self.device,
            shelf=self.shelf,
            ranks=self.ranks,
            clock=self.clock,
            progress=self.progress,
            open_layer=self.open_layer,
        )
        try:
            best: Candidate = allocation.search(problem, oracle)
        finally:
            oracle.free()
        self._say(ledger, best, windows)
        return [float(units) for units in best]

    def _opened(
        self, grids: Mapping[Key, tuple[int, ...]], keeper: Keeper | None, position: Position
    ) -> tuple[Levels, SearchLedger]:
        """Where levels and losses are kept: with the journal, or in memory without one."""
        if keeper is None:
            return HeldLevels(), SearchLedger(None)
        folder, file = keeper.folder / FOLDER, keeper.folder / FILE
        if self.ranks.rank == 0:
            if keeper.resumed is None:
                # of a run that was killed before anything said what it was
                shutil.rmtree(folder, ignore_errors=True)
                file.unlink(missing_ok=True)
            needed = sum(
                level_bytes(site, grids[site.layer, site.kind]) for site in self._sites(grids)
            )
            check_room(keeper.folder, needed, folder.glob("*") if folder.exists() else ())
        self.ranks.barrier()
        # from here on a run that is interrupted finds what there is
        keeper.keep(position, {}, now=True)
        ledger = SearchLedger(file if self.ranks.rank == 0 else None)
        # all ranks know the same
        known = self.ranks.broadcast(list(ledger.items()))
        if self.ranks.rank:
            for candidate, windows, loss in known:
                ledger.add([candidate], windows, [loss])
        return FiledLevels(folder), ledger

    def _sites(self, grids: Mapping[Key, tuple[int, ...]]) -> list[Site]:
        layers = dict.fromkeys(layer for layer, _ in grids)
        return [site for layer in layers for site in self.measurer.sites(layer)]

    def _build(self, store: Levels, grids: Mapping[Key, tuple[int, ...]]) -> None:
        """Levels that are not there yet, from one pass over the dense model."""
        missing = [
            (key, units)
            for key, widths in grids.items()
            for units in widths[:-1]
            if not store.has(key, units)
        ]
        # ranks look at one disk, but not at the same time
        missing = self.ranks.broadcast(missing)
        if not missing:
            return
        if self.measurer.needed(0):
            self.enter()
        layers = {key[0] for key, _ in missing}
        self.progress.begin(max(layers) + 1, "making levels")
        for index in range(max(layers) + 1):
            self.open_layer(index)
            if index in layers:
                found = self.measurer.dense(index)
                for site in self.measurer.sites(index):
                    own = [units for key, units in missing if key == (index, site.kind)]
                    self._make(store, site, found.pop(site.kind), own)
            else:
                self.measurer.pass_on(index)
            self.store.close(index, final=False)
            self.progress.layer(index)
        self.measurer.leave()

    def _make(self, store: Levels, site: Site, measured: Measured, widths: Sequence[int]) -> None:
        for units in widths:
            # the same draws whichever others are there already
            place = 2 * site.layer + KINDS.index(site.kind)
            seed = (self.recipe.seed * _PRIME + place) * _PRIME + units
            self.repairer.generator.manual_seed(seed % 2**63)
            level = self.repairer.level(site, measured.moments, units, held=measured.held)
            with self.clock.phase("write"):
                if self.ranks.rank == 0 or isinstance(store, HeldLevels):
                    store.save((site.layer, site.kind), units, level)
                self.ranks.barrier()

    def _say(self, ledger: SearchLedger, best: Candidate, windows: Sequence[Batch]) -> None:
        count = sum(len(batch.input_ids) for batch in windows)
        whole = [(candidate, loss) for candidate, n, loss in ledger.items() if n == count]
        self.facts = {
            "windows": count,
            "tried": len(ledger),
            "tried_on_all_windows": len(whole),
            "first_loss": whole[0][1],
            "best_loss": ledger.get(best, count),
            "best": list(best),
        }


def level_grid(budget: Budget, round_to: int) -> tuple[int, ...]:
    """Widths of a Site that a search may try, ascending, the last one dense."""
    allowed = width_grid(budget, round_to)

    def nearest(wish: int) -> int:
        return min(allowed, key=lambda units: (abs(units - wish), units))

    return tuple(sorted({nearest(wish) for wish in levels(budget.units, LEVELS)}))


def level_bytes(site: Site, widths: Sequence[int]) -> int:
    """Of a Site's levels: units, weights and perhaps a bias each; the dense one needs none."""
    weight = site.weight()
    outputs, each = weight.shape[0], weight.element_size()
    return sum(
        8 * units + each * outputs * (units * site.columns_per_unit + 1) for units in widths[:-1]
    )
