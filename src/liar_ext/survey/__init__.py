"""Surveys by name, as allocations ask for them. To add one: a file beside this, a line here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from liar_ext.allocation import ALLOCATIONS
from liar_ext.criteria import CRITERIA
from liar_ext.survey.base import Block, Learn, Reads, Survey, View
from liar_ext.survey.besa import BESA
from liar_ext.survey.influence import INFLUENCE
from liar_ext.survey.levels import LEVELS
from liar_ext.survey.scores import SCORES
from liar_ext.survey.spectra import SPECTRA

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from liar_ext.costs import Tokens
    from liar_ext.models import Adapter
    from liar_ext.recipe import Recipe

SURVEYS: dict[str, Survey] = {s.name: s for s in (SCORES, SPECTRA, INFLUENCE, LEVELS, BESA)}


def survey_of(recipe: Recipe) -> Survey | None:
    """The survey that a recipe's allocation asks for, if any."""
    name = ALLOCATIONS[recipe.allocation].survey
    return None if name is None else SURVEYS[name]


def reads_of(recipe: Recipe) -> Reads | None:
    """What that survey reads; None without one."""
    survey = survey_of(recipe)
    return None if survey is None else survey.reads(CRITERIA[recipe.criterion])


def needs_tokens(recipe: Recipe) -> bool:
    """Whether there is a survey, and it runs the model."""
    return reads_of(recipe) not in (None, "weights")


def survey_costs(
    model: PreTrainedModel, adapter: Adapter, recipe: Recipe, layers: range
) -> tuple[int, int]:
    """FLOPs of what a survey makes of its statistics, and the most bytes that this holds."""
    survey, criterion = survey_of(recipe), CRITERIA[recipe.criterion]
    flops = most = 0
    if survey is None:
        return flops, most
    for index in layers:
        sites = adapter.sites_of(model, index, recipe.target)
        for site in sites[:1] if survey.whole_layer else sites:
            own, held = survey.costs(site, criterion)
            flops, most = flops + own, max(most, held)
    return flops, most


def learning_flops(
    model: PreTrainedModel,
    adapter: Adapter,
    recipe: Recipe,
    by_layer: Sequence[int],
    tokens: Tokens,
    layers: range,
) -> int:
    """FLOPs of the forwards of single layers that a survey learns from.

    Args:
        by_layer: of a token in each layer.
    """
    survey, flops = survey_of(recipe), 0
    if survey is None:
        return flops
    for index in layers:
        one, every = survey.passes(len(adapter.sites_of(model, index, recipe.target)))
        flops += by_layer[index] * (one * tokens.batch + every * tokens.positions)
    return flops


__all__ = [
    "SURVEYS",
    "Block",
    "Learn",
    "Reads",
    "Survey",
    "View",
    "learning_flops",
    "needs_tokens",
    "reads_of",
    "survey_costs",
    "survey_of",
]
