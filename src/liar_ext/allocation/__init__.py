"""Allocations by name. To add one: a file beside this, a line here, a page in docs/methods/."""

from liar_ext.allocation.alpha import ALPHA
from liar_ext.allocation.base import Allocation, Budget, check_reachable
from liar_ext.allocation.besa import BESA
from liar_ext.allocation.evolution import EVOLUTION
from liar_ext.allocation.global_ranking import GLOBAL
from liar_ext.allocation.influence import INFLUENCE
from liar_ext.allocation.kwon import KWON
from liar_ext.allocation.level_swaps import LEVEL_SWAPS
from liar_ext.allocation.levels import BY_LEVELS
from liar_ext.allocation.ranked import RANKED
from liar_ext.allocation.rl_pruner import RL_PRUNER
from liar_ext.allocation.segments import SEGMENTS
from liar_ext.allocation.spdy import SPDY
from liar_ext.allocation.uniform import UNIFORM

ALLOCATIONS: dict[str, Allocation] = {
    a.name: a
    for a in (
        *(UNIFORM, GLOBAL, RANKED, ALPHA, INFLUENCE, BY_LEVELS, BESA, KWON),
        *(SPDY, LEVEL_SWAPS, EVOLUTION, RL_PRUNER, SEGMENTS),
    )
}

__all__ = ["ALLOCATIONS", "Allocation", "Budget", "check_reachable"]
