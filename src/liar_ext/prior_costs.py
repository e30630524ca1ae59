"""What a pass before pruning costs and holds, by what the criterion needs (`engine.passes`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel

from liar_ext.costs import Tokens, gradient_flops, gradient_held_bytes
from liar_ext.criteria import CRITERIA
from liar_ext.engine.policy import MASKS
from liar_ext.gradient_memory import gradient_phases, gradient_sizes
from liar_ext.memory_parts import Phase, Sizes
from liar_ext.models.adapter import Adapter
from liar_ext.policy_memory import policy_flops, policy_held_bytes, policy_phases, policy_sizes
from liar_ext.recipe import Recipe


@dataclass(frozen=True)
class PriorPlan:
    """Attributes:
    flops: by what they are called in a plan.
    held: bytes of what waits on the shelf of one rank.
    phases: sizes -> what the pass holds at once.
    part: what its results are called among the parts of all phases; kept: their bytes, in the
        host's memory to the end; gathered: how many times that while the pass runs.
    """

    flops: dict[str, int]
    held: int
    phases: Callable[[Sizes], list[Phase]]
    part: str
    kept: int
    gathered: int


def prior_plan(
    model: PreTrainedModel,
    adapter: Adapter,
    recipe: Recipe,
    tokens: Tokens,
    ranks: int,
    item: int,
    units: int,
) -> PriorPlan | None:
    """Of a dense model on `meta`; None for criteria that need no such pass.

    Args:
        item: bytes of a number in the compute dtype; units: of all targeted Sites.
    """
    criterion = CRITERIA[recipe.criterion]
    if criterion.needs == "policy":
        own = policy_sizes(model, adapter, recipe, tokens, ranks)
        return PriorPlan(
            {"learning": policy_flops(model, adapter, recipe, tokens)},
            policy_held_bytes(model, recipe, tokens.positions, item),
            lambda sizes: policy_phases(sizes, own),
            "probabilities",
            8 * units,
            # masks as they are drawn and by Site
            1 + 3 * MASKS,
        )
    sizes_of = gradient_sizes(model, adapter, recipe, tokens, ranks)
    if sizes_of is None:
        return None
    return PriorPlan(
        {"gradients": gradient_flops(model, adapter, recipe, tokens)},
        gradient_held_bytes(model, adapter, recipe, sizes_of.positions, item),
        lambda sizes: gradient_phases(sizes, sizes_of),
        "unit_gradients",
        8 * min(recipe.gradient_samples, tokens.samples) * units,
        # twice when ranks put theirs together
        2,
    )
