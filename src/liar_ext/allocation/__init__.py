"""Allocations by name. To add one: a file beside this, a line here, a page in docs/methods/."""

from liar_ext.allocation.base import Allocation, Budget
from liar_ext.allocation.global_ranking import GLOBAL
from liar_ext.allocation.uniform import UNIFORM

ALLOCATIONS: dict[str, Allocation] = {a.name: a for a in (UNIFORM, GLOBAL)}

__all__ = ["ALLOCATIONS", "Allocation", "Budget"]
