"""What one Site holds, counted by hand for a FFN of 300 columns and heads of 128."""

from __future__ import annotations

import inspect

import pytest

from liar_ext.costs import SitePlan
from liar_ext.memory_parts import Sizes
from liar_ext.reconstruction import RECONSTRUCTIONS
from liar_ext.site_memory import SiteBytes

FFN = SitePlan(0, "ffn", "down", 300, 100, 300, 100, outputs=64, producer_rows=600)
HEADS = SitePlan(0, "heads", "o", 8, 6, 128, 96, outputs=64, producer_rows=256, beside=5)


def _of(*, paired: bool = False, chooses: bool = False, judging: int = 0, **changes) -> SiteBytes:
    values = dict.fromkeys(inspect.signature(Sizes).parameters, 1)
    values |= {"cuda": False, "place": "device", "alone": True, "hidden": 64, "item": 2}
    sizes = Sizes(**{**values, "positions": 4096, "batch": 512, **changes})
    return SiteBytes(
        sizes,
        reconstruction=RECONSTRUCTIONS["liar"],
        chooses=chooses,
        paired=paired,
        judging=lambda site: judging,
    )


def test_a_paused_forward_holds_the_inputs_and_what_is_beside_them():
    # the Site's input, what the module was given, and what is added to the output
    assert _of().frame(FFN, 10) == 10 * 2 * (300 + 64 + 64)
    # q, k and v of heads, and what else their attention holds
    assert _of().frame(HEADS, 10) == 10 * 2 * (128 + 64 + 256 + 5)


@pytest.mark.parametrize("chooses", [False, True])
@pytest.mark.parametrize(("paired", "across"), [(False, False), (True, False), (False, True)])
def test_moments_are_a_square_and_with_two_paths_the_drift_beside_it(paired, across, chooses):
    site = SitePlan(**{**vars(FFN), "across": across})
    of = _of(paired=paired, chooses=chooses)
    assert of.two_paths(site) is (paired or across)
    square = 4 * 300 * (300 + 64 * (paired or across))
    assert sum(of.moments(site).values()) == square * (1 + chooses)
    sums = of.sums(site)
    assert sums["float64_sums"] == 0, "one segment is summed in float32 alone"
    assert sums["held_out_sums"] == 2 * square * chooses
    assert ("drift_rows" in of.gram(site)) is (paired or across)
    assert _of(paired=paired, alone=False).sums(site)["float64_sums"] == 2 * square


def test_a_repair_is_the_most_of_what_is_there_one_after_the_other():
    least = _of().repair(FFN)
    # the repaired rows in float64 are there in any case
    assert least >= 8 * 100 * 64
    assert _of(judging=least + 1).repair(FFN) == least + 1
    assert _of(judging=least - 1).repair(FFN) == least
