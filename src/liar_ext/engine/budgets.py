"""What a recipe may take from each Site, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from liar_ext.allocation import Budget
from liar_ext.calibration.batch import Batch
from liar_ext.costs import pricing
from liar_ext.engine.level_store import Key
from liar_ext.engine.store import LayerStore
from liar_ext.errors import InputError
from liar_ext.models import adapter_for, text_config
from liar_ext.recipe import Recipe


def budgets(
    store: LayerStore, recipe: Recipe, length: int, counts: str | None = None
) -> dict[tuple[int, str], Budget]:
    """Units and costs of every targeted Site, from shapes alone (works on `meta`).

    Args:
        length: of the longest calibration sequence.
        counts: what the recipe could budget; None for what it does.
    Raises:
        InputError: Sites may lose all their units, and the model has none that can.
        UnsupportedModelError: a kind of Site cannot be pruned in this family.
    """
    adapter = adapter_for(store.model.config)
    adapter.check_targets(recipe.target)
    if recipe.empty:
        _check_empty(store, recipe)
    budget = pricing(store.model, adapter, recipe, length, counts or recipe.budget)
    found: dict[Key, Budget] = {
        (index, site.kind): budget(site)
        for index in targeted_layers(store, recipe)
        for site in adapter.sites_of(store.model, index, recipe.target)
    }
    if recipe.empty and (first := _counting(store, found)) is not None:
        found[first] = replace(found[first], least=1)
    return found


def _check_empty(store: LayerStore, recipe: Recipe) -> None:
    config = store.model.config
    adapter = adapter_for(config)
    able = [spec.kind for spec in adapter.sites if spec.block is not None]
    for spec in adapter.sites:
        if spec.kind in recipe.target and spec.block is None:
            instead = "leave it out of --target" if able else "leave --empty out"
            why = "" if adapter.residual(text_config(config)) else f" (it {adapter.no_sum})"
            raise InputError(
                f"--empty: {spec.kind} of this {adapter.model_type} model is no module that can "
                f"go{why}; {instead}"
            )


def _counting(store: LayerStore, known: Mapping[Key, Budget]) -> Key | None:
    """The heads that have to stay: of a decoder's first layer, whose cache counts the tokens, where
    no other layer of its type is sure to have some (`models.absent`)."""
    config = store.model.config
    adapter = adapter_for(config)
    layers = len(adapter.chain(store.model))
    types = getattr(text_config(config), "layer_types", None) or [None] * layers
    like = [index for index in range(layers) if types[index] == types[0]]
    sure = any((index, "heads") not in known for index in like)
    return None if sure or not adapter.decoder else (0, "heads")


def longest(batches: Sequence[Batch]) -> int:
    """Tokens of the longest calibration sequence."""
    return max((batch.longest for batch in batches), default=1)


def targeted_layers(store: LayerStore, recipe: Recipe) -> range:
    """The layers to prune.

    Raises:
        InputError: `--layers` reaches past the model.
    """
    if not recipe.narrows:
        return range(0)
    count = len(adapter_for(store.model.config).chain(store.model))
    start, stop = recipe.layers or (0, count)
    if stop > count:
        raise InputError(f"--layers {start}:{stop}: the model has {count} layers (0:{count})")
    return range(start, stop)
