"""Criteria by name. To add one: a file beside this, a line here, a page in docs/methods/."""

from liar_ext.criteria.base import Columns, Criterion, unit_scores
from liar_ext.criteria.flap import FLAP
from liar_ext.criteria.magnitude import MAGNITUDE
from liar_ext.criteria.random import RANDOM
from liar_ext.criteria.wanda import WANDA

CRITERIA: dict[str, Criterion] = {c.name: c for c in (MAGNITUDE, WANDA, FLAP, RANDOM)}

__all__ = ["CRITERIA", "Columns", "Criterion", "unit_scores"]
