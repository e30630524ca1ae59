"""Who will load a pruned model, and why nobody simpler can."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from liar_ext.allocation import ALLOCATIONS
from liar_ext.models import layout
from liar_ext.models.adapter import Adapter
from liar_ext.recipe import Recipe
from liar_ext.report.loading import auto_class


def loader_of(
    model: PreTrainedModel,
    adapter: Adapter,
    recipe: Recipe,
    dense: dict[str, Any],
    before: list[dict[str, int]],
    added_biases: list[str],
) -> dict[str, Any]:
    """Who will load the result: `stock`, the layout, the class or the reason why not."""
    after = layout.read(model)
    pairs = list(zip(after, before, strict=True))
    changed = [s for s in adapter.sites if any(a[s.kind] != b[s.kind] for a, b in pairs)]
    unstated = [s.kind for s in changed if s.config_fields is None]
    unflagged = [s.kind for s in adapter.sites if s.kind in added_biases and s.bias_flag is None]
    family = f"a {adapter.model_type} config"
    reason = None
    if not ALLOCATIONS[recipe.allocation].equal:
        reason = f"--allocation {recipe.allocation} gives every layer its own width"
    elif any(len({widths[s.kind] for widths in after}) > 1 for s in changed):
        reason = "the widths differ between layers"
    elif unstated:
        reason = f"{family} cannot state fewer {' or '.join(unstated)}"
    elif unflagged:
        reason = f"{family} cannot state the biases added to {' and '.join(unflagged)}"
    values = None if reason else layout.equal_values(model, before)
    config = layout.describe(dense, adapter, after, values, added_biases)
    name = layout.loader_of(config, dense)
    stock = name.startswith("stock")
    if not stock and reason is None:
        reason = f"{family} rejects these widths"
    return {
        "stock": stock,
        "layout": name,
        "with": f"transformers.{auto_class(config)}" if stock else "liar_ext.load",
        "why_not_stock": reason,
    }
