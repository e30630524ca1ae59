"""Passes over the dense model before anything is pruned, by what a criterion needs.

To add one: a class with the fields of these in a file beside this, a line here, and one in
`prior_costs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from liar_ext.criteria import Prior
from liar_ext.engine.gradients import GradientPass
from liar_ext.engine.policy import PolicyPass

if TYPE_CHECKING:
    from liar_ext.engine.keeper import Keeper


class PriorPass(Protocol):
    """Attributes: `name` in the report's `run`; `facts` for it, once there are results."""

    name: str
    facts: dict[str, Any]

    def results(self, keeper: Keeper | None) -> Mapping[tuple[int, str], Prior]:
        """What is found of each targeted Site, by layer and kind, the same on every rank."""


# by `Criterion.needs`
PASSES: dict[str, type[GradientPass] | type[PolicyPass]] = {
    "gradients": GradientPass,
    "weight_gradients": GradientPass,
    "policy": PolicyPass,
}
