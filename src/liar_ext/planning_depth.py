"""What a plan knows of layers that are left out: the model without them, and what stands in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from liar_ext.costs import SitePlan, held_beside, producer_rows
from liar_ext.depth.choice import LayerChoice, without_looking
from liar_ext.depth.config import remapped
from liar_ext.depth.methods import METHODS
from liar_ext.depth.surgery import check_places
from liar_ext.engine.clock import Clock
from liar_ext.engine.driver import Driver
from liar_ext.engine.runtime import Runtime
from liar_ext.engine.spans import LeftOut
from liar_ext.engine.store import InMemory
from liar_ext.models import layout
from liar_ext.models.adapter import Adapter
from liar_ext.recipe import Recipe


@dataclass(frozen=True)
class Shortened:
    """A model without some layers, on `meta`.

    Attributes:
        choice: which are left out; known: before anything is measured.
        config: its `config.json`; model: of it; stored: dtype of each of its tensors in the files.
        left_out: what is repaired, None where nothing is.
    """

    choice: LayerChoice
    known: bool
    config: dict[str, Any]
    model: PreTrainedModel
    stored: dict[str, str]
    left_out: LeftOut | None

    def to_json(self) -> dict[str, Any]:
        own = self.choice
        return {
            "before": own.layers,
            "after": len(own.kept),
            "dropped": list(own.dropped) if self.known else None,
        }


def shortened(
    dense: Mapping[str, Any],
    whole: PreTrainedModel,
    adapter: Adapter,
    stored: Mapping[str, str],
    recipe: Recipe,
    notes: list[str],
) -> Shortened:
    """Without the layers that a recipe leaves out; where only a measurement will tell which those
    are, without as many.

    Args:
        dense: `config.json` of the whole model; stored: dtype of each of its tensors.
        notes: one is added where layers are assumed.
    Raises:
        InputError: as the compression would.
    """
    path, layers = adapter.layer_list(whole)
    known = without_looking(recipe, len(layers), adapter.hands_on)
    choice = known or _assumed(recipe, len(layers))
    if known is None:
        notes.append(
            f"--depth {recipe.depth} measures which layers go: "
            f"{', '.join(map(str, choice.dropped))} assumed. Sizes do not depend on it; what "
            "stands in for layers is fitted once for each gap"
        )
    config = remapped(dict(dense), choice.kept)
    model = layout.empty(config)
    check_places(path, layers, choice.kept, model, {})
    left_out = None
    if recipe.spans:
        host = torch.device("cpu")
        left_out = LeftOut(Runtime(InMemory(whole), host, Clock(host)), choice.gaps)
    renamed = _renamed(stored, path, choice.kept)
    return Shortened(choice, known is not None, config, model, renamed, left_out)


def _assumed(recipe: Recipe, layers: int) -> LayerChoice:
    """The last ones in one piece; of a method that takes each by itself every other one from the
    end, so that there are as many gaps as there can be."""
    assert recipe.depth is not None, "see `Recipe.shortens`"
    order = range(layers - 1, 0, -1 if METHODS[recipe.depth].window else -2)
    others = [layer for layer in range(layers - 1, -1, -1) if layer not in order]
    return LayerChoice(layers, tuple(sorted([*order, *others][: recipe.drop])))


def _renamed(stored: Mapping[str, str], path: str, kept: Sequence[int]) -> dict[str, str]:
    """By the names that tensors have in the model of the layers that stay."""
    start = f"{path}."
    found = {name: dtype for name, dtype in stored.items() if not name.startswith(start)}
    for name, dtype in stored.items():
        if name.startswith(start):
            layer, _, rest = name.removeprefix(start).partition(".")
            if int(layer) in kept:
                found[f"{start}{kept.index(int(layer))}.{rest}"] = dtype
    return found


def fitted(
    model: PreTrainedModel,
    adapter: Adapter,
    driver: Driver,
    gaps: Mapping[int, range],
    length: int,
) -> list[SitePlan]:
    """The Sites that keep all their columns and are fitted: in front of gaps, and with `--refit
    all` those behind a change. `length`: of the longest calibration sequence."""
    found: list[SitePlan] = []
    layers = adapter.chain(model)
    for index, kinds in driver.beside.items():
        own = kinds if index not in driver.targets else set(kinds) - set(driver.recipe.target)
        found += [
            SitePlan(
                index,
                site.kind,
                site.name,
                *(site.units, site.units, site.columns, site.columns),
                outputs=site.weight().shape[0],
                producer_rows=producer_rows(site),
                across=index in gaps and site.kind == adapter.sites[-1].kind,
                beside=held_beside(model, site, length),
                stack=layers.stack(index),
            )
            for site in adapter.sites_of(model, index, tuple(own))
        ]
    return found


def dense_path(
    by_layer: Sequence[int],
    whole: Sequence[int],
    driver: Driver,
    left_out: LeftOut | None,
) -> tuple[int, int]:
    """The layers that a compression runs, and FLOPs of one token on a dense path beside them.

    Args:
        by_layer: FLOPs of one token in each layer of the model; whole: of the one with all layers.
    """
    recipe, beside = driver.recipe, driver.beside
    gaps = {} if left_out is None else left_out.gaps
    stop = max([driver.targets.stop, *(index + 1 for index in beside)])
    across = sum(whole[layer] for gap in gaps.values() for layer in gap)
    if recipe.paired:
        # with Sites that are only fitted there are two paths from the first layer on
        start = 0 if beside else driver.targets.start
        return stop, sum(by_layer[start:stop]) + across
    return stop, sum(by_layer[index] for index in gaps) + across
