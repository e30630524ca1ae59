"""Parts of what the passes before pruning hold, by hand."""

from __future__ import annotations

import inspect

from liar_ext.gradient_memory import GradientSizes, gradient_phases
from liar_ext.memory_parts import Sizes
from liar_ext.search_costs import SearchSizes, search_phases


def sizes(**changes: int) -> Sizes:
    """Of small numbers; all windows have 1000 positions."""
    values = dict.fromkeys(inspect.signature(Sizes).parameters, 1)
    values |= {"cuda": False, "place": "disk", "alone": True, "positions": 1000, "batch": 50}
    return Sizes(**{**values, **changes})


def test_attention_masks_of_their_windows_are_in_memory():
    gradients = GradientSizes(1, 200, 50, 0, 10, 1, 1, 1, 0, 0, True)
    search = SearchSizes({}, 0, 1, 300, 50, 10, 0, [], 1)
    for masks in (0, 5000):
        s = sizes(masks=masks)
        back = gradient_phases(s, gradients)[1].device
        assert back.get("attention_masks", 0) == masks // 5
        # beside those of all windows, from which levels are made
        through = search_phases(s, search)[0].device
        assert through.get("attention_masks", 0) == masks + 2 * (3 * masks // 10)
