"""magnitude and its variants: norms of a unit's own weights; needs no data.

`magnitude` is `‖W_:,j‖₂` of the consumer's column (mag-sp of FLAP's code), `-producer` the norm of
the rows that make the unit, `-both` their sum; `-l1` takes absolute values instead of squares.
Producer norms are per unit: the rows of keys and values belong to all columns of a group.
"""

from collections.abc import Callable

from torch import Tensor

from liar_ext.criteria.base import Criterion
from liar_ext.models.site import Site


def _consumer(site: Site, order: int) -> Tensor:
    return site.weight().double().norm(order, dim=0)


def _producer(site: Site, order: int) -> Tensor:
    """Sum over the linears of the norm of each unit's rows, (units,)."""
    blocks = site.producer_rows()
    total = blocks[0].new_zeros(site.units, dtype=blocks[0].double().dtype)
    for rows in blocks:
        total = total + rows.double().flatten(1).norm(order, dim=1)
    return total


def _both(site: Site, order: int) -> Tensor:
    return site.per_unit(_consumer(site, order)) + _producer(site, order)


def _criterion(name: str, of: Callable[[Site, int], Tensor], order: int) -> Criterion:
    return Criterion(name, lambda evidence: of(evidence.site, order), needs="weights")


MAGNITUDES = tuple(
    _criterion(f"magnitude{part}{suffix}", of, order)
    for part, of in (("", _consumer), ("-producer", _producer), ("-both", _both))
    for suffix, order in (("", 2), ("-l1", 1))
)
