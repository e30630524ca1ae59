"""Compression: the driver between a dense config and a Report, whatever holds the weights."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from liar_ext.allocation import Budget
from liar_ext.calibration.batch import Batch, shares
from liar_ext.calibration.batches import check_enough, of_stack
from liar_ext.checkpoint.reader import parameter_count
from liar_ext.checkpoint.writer import write_json
from liar_ext.engine.budgets import budgets, longest, targeted_layers
from liar_ext.engine.clock import Clock
from liar_ext.engine.driver import Driver
from liar_ext.engine.inputs import fit_to
from liar_ext.engine.judgements import Judgements
from liar_ext.engine.keeper import Keeper
from liar_ext.engine.progress import Progress, Silent
from liar_ext.engine.ranks import Ranks
from liar_ext.engine.runtime import Runtime
from liar_ext.engine.search import samples_of
from liar_ext.engine.shelf import DeviceShelf, Shelf
from liar_ext.engine.statistics import held_out_tokens
from liar_ext.engine.store import LayerStore
from liar_ext.environment import environment
from liar_ext.latency import LatencyTable
from liar_ext.models import adapter_for, layout
from liar_ext.recipe import CHOICES, Recipe
from liar_ext.reconstruction import RECONSTRUCTIONS
from liar_ext.report import Report
from liar_ext.report.card import model_card
from liar_ext.report.schema import FILE, SiteReport

if TYPE_CHECKING:
    from liar_ext.engine.moments_store import MomentsStore
    from liar_ext.engine.spans import LeftOut

# asked and achieved sparsity may differ by this much before it is worth a warning
SPARSITY_TOLERANCE = 0.02


class Compression:
    """One run of the driver, from a dense config to a Report.

    Attributes:
        clock: where the time goes; shelf, left_out, library, keeper, judgements: see `Driver`.
        layers: for the report.
        facts: for the `run` field of the report.
    """

    def __init__(
        self,
        store: LayerStore,
        dense: dict[str, Any],
        recipe: Recipe,
        device: torch.device,
        progress: Progress | None,
        ranks: Ranks | None = None,
    ) -> None:
        self.clock = Clock(device)
        self.shelf: Shelf = DeviceShelf()
        self.left_out: LeftOut | None = None
        self.layers: dict[str, Any] = {}
        self.library: MomentsStore | None = None
        self.keeper: Keeper | None = None
        self.judgements: Judgements | None = None
        self.facts: dict[str, Any] = {}
        self._ranks = ranks or Ranks.single(device)
        self._store = store
        self._dense = dense
        self._recipe = recipe
        self._device = device
        self._progress = progress or Silent()
        self._warnings: list[str] = []

    def warn(self, message: str) -> None:
        self._warnings.append(message)
        self._progress.warn(message)

    def run(self, batches: Sequence[Batch], source: str, calibration: dict[str, Any]) -> Report:
        started = time.perf_counter()
        model, recipe = self._store.model, self._recipe
        adapter = adapter_for(model.config)
        tokens = sum(batch.tokens for batch in batches)
        few = few_tokens(self._store, recipe, batches, tokens)
        if few is not None:
            self.warn(few)
        before = layout.read(model)
        length = longest(batches)
        table = None if recipe.latency is None else LatencyTable.read(recipe.latency)
        costs = {
            counts: budgets(self._store, recipe, length, counts)
            for counts in CHOICES["budget"]
            if counts != "latency" or table is not None
        }
        parameters = parameter_count(model)
        runtime = Runtime(
            self._store, self._device, self.clock, self._progress, self._ranks, self.shelf
        )
        driver = Driver(
            runtime,
            batches,
            recipe,
            left_out=self.left_out,
            library=self.library,
            keeper=self.keeper,
            judgements=self.judgements,
        )
        self._reset_peak()
        driver.run()
        sizes = {counts: _sizes(driver.sites, own) for counts, own in costs.items()}
        self._warnings += driver.warnings
        targeted, left = sizes[recipe.budget]
        achieved = (targeted - left) / targeted if recipe.narrows else 0.0
        if table is not None:
            for text in table.warnings(recipe.target, recipe.round_to):
                self.warn(text)
        if abs(achieved - recipe.sparsity) > SPARSITY_TOLERANCE:
            self.warn(
                f"asked for sparsity {recipe.sparsity:.3f}, got {achieved:.3f}: the widths that "
                "units and --round-to allow come no closer"
            )
        for site in driver.sites:
            self._warnings += [f"{site.name}: {step}" for step in site.steps]
        config = layout.describe(
            self._dense,
            adapter,
            layout.read(model),
            layout.equal_values(model, before),
            driver.added_biases,
        )
        return Report(
            source=source,
            recipe=recipe.to_json(),
            sites=driver.sites,
            totals={
                "parameters_before": parameters,
                "parameters_after": parameter_count(model),
                **{
                    f"site_{counts}_{when}": size
                    for counts, own in sizes.items()
                    for when, size in zip(("before", "after"), own, strict=True)
                },
                "sparsity_asked": recipe.sparsity,
                "sparsity": achieved,
            },
            seconds={**self.clock.seconds, "total": time.perf_counter() - started},
            calibration=calibration,
            environment=environment(self._device),
            layout=layout.loader_of(config, self._dense),
            config=config,
            layers=self.layers,
            latency={} if table is None else table.to_json(),
            warnings=self._warnings,
            run={
                "ranks": self._ranks.size,
                "resumed_at": None if self.keeper is None else self.keeper.resumed,
                **self.facts,
                **driver.facts,
                **self._peak(),
            },
        )

    def _reset_peak(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def _peak(self) -> dict[str, int]:
        """Most bytes that were in use at once: of the process, and of torch on a GPU."""
        found = {"peak_host_bytes": peak_host_bytes()}
        if self._device.type == "cuda":
            found["peak_device_bytes"] = torch.cuda.max_memory_allocated(self._device)
        return found


def few_tokens(
    store: LayerStore,
    recipe: Recipe,
    batches: Sequence[Batch],
    tokens: int,
) -> str | None:
    """Whether `tokens` are few for the repairs of a recipe: a warning, or None.

    Raises:
        InputError: they are too few.
    """
    adapter = adapter_for(store.model.config)
    solves = RECONSTRUCTIONS[recipe.reconstruct].solves
    targets = targeted_layers(store, recipe) if solves else ()
    repaired = [(index, recipe.target) for index in targets]
    if recipe.spans:
        # nobody knows yet which
        every = range(len(adapter.chain(store.model)))
        repaired += [(index, (adapter.sites[-1].kind,)) for index in every]
    if not repaired:
        return None
    layers, read = adapter.chain(store.model), shares(batches)
    # of each stack, which has its own tokens
    widest = dict.fromkeys(range(len(read)), 0)
    for index, kinds in repaired:
        for site in adapter.sites_of(store.model, index, kinds):
            stack = layers.stack(index) if len(read) > 1 else 0
            widest[stack] = max(widest[stack], site.columns)
    held = held_out_tokens(batches, recipe)
    worst = max(widest, key=lambda stack: widest[stack] / read[stack])
    own = round(tokens * read[worst])
    whose = of_stack(worst, len(read), tokens)
    return check_enough(own, widest[worst], round(held * read[worst]), whose)


def check_model(store: LayerStore, recipe: Recipe, left_out: LeftOut | None = None) -> Driver:
    """Refuse what a recipe cannot do with a model, whatever the calibration; works on `meta`.

    Args:
        left_out: layers that are not in the model, whose effect is to be repaired.
    Returns:
        a driver without calibration tokens, to ask more of.
    Raises:
        InputError: as a compression would.
    """
    host = torch.device("cpu")
    return Driver(Runtime(store, host, Clock(host)), (), recipe, left_out=left_out)


def check_possible(
    store: LayerStore, recipe: Recipe, batches: Sequence[Batch], tokens: int
) -> None:
    """Refuse what a recipe cannot do with a model and its calibration, from shapes alone.

    Args:
        store: works on `meta`; batches: as they are without tokens that are held out.
    Raises:
        InputError: as a compression would, before it computes anything.
    """
    own = fit_to(batches, recipe)
    driver = check_model(store, recipe)
    few_tokens(store, recipe, own, tokens)
    driver.check(budgets(store, recipe, longest(own)), samples_of(own))


def peak_host_bytes() -> int:
    """Most memory that was resident at once since this process began, in bytes."""
    try:
        return _status("VmHWM")
    except (OSError, StopIteration):
        # it counts what the process that started this one held; in KiB, and in bytes on macOS
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def resident_host_bytes() -> int:
    """Memory of this process that is resident now, in bytes; where the system does not say, 0."""
    try:
        return _status("VmRSS")
    except (OSError, StopIteration):
        return 0


def _status(name: str) -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        found = next(line for line in lines if line.startswith(f"{name}:"))
    return int(found.split()[1]) * 1024


def _sizes(
    sites: Sequence[SiteReport], costs: Mapping[tuple[int, str], Budget]
) -> tuple[float, float]:
    """What all targeted Sites cost, before and after; whole numbers of parameters and FLOPs.

    A Site that only stands in for layers is none of them, and as wide as before.
    """
    sites = [site for site in sites if (site.layer, site.kind) in costs]
    whole = all(budget.prices is None for budget in costs.values())
    before = sum(budget.price(budget.units) for budget in costs.values())
    after = sum(costs[site.layer, site.kind].price(site.units_after) for site in sites)
    return (int(before), int(after)) if whole else (before, after)


def write_records(folder: Path, report: Report) -> None:
    write_json(folder / "config.json", report.config)
    write_json(folder / "recipe.json", report.recipe)
    write_json(folder / FILE, report.to_json())
    (folder / "README.md").write_text(model_card(report), encoding="utf-8")
