"""fisher, fisher-rearranged: the Fisher information of gates on units (arXiv 2204.09656).

    F = Σ_b g_b g_bᵀ,   g_b = ∂L_b/∂m at m = 1

`fisher` ranks by the diagonal. `fisher-rearranged` then lowers `(1 − m)ᵀ F (1 − m)` over the whole
block by the paper's greedy exchange, the number of units being what it is.

A mini-batch b is one window: it has as many predictions as it has tokens, where the paper's
examples have one label each, and the choice does not depend on `--batch-size`.
"""

import torch
from torch import Tensor

from liar_ext.criteria.base import Criterion, Evidence


def score(evidence: Evidence) -> Tensor:
    return evidence.gates.square().sum(0)


def rearrange(gates: Tensor, dropped: int) -> Tensor:
    """The units to drop, (dropped,) int64, by greedy exchange.

    Each unit that stays, the least important first, joins those that go, and of them the one
    comes back without which `‖Σ_u g_u‖²` is smallest.

    Args:
        gates: g, (batches, units) float64.
    """
    order = gates.square().sum(0).argsort(stable=True)
    vectors = gates.T.contiguous()[order]
    squares = vectors.square().sum(1)
    # one place more, for the unit that joins; after each exchange the last place is free again
    going = torch.arange(dropped + 1)
    total = vectors[:dropped].sum(0)
    held, held_squares = vectors[: dropped + 1].clone(), squares[: dropped + 1].clone()
    for joins in range(dropped, len(order)):
        going[-1], held[-1], held_squares[-1] = joins, vectors[joins], squares[joins]
        total = total + vectors[joins]
        # ‖total − g_r‖² without ‖total‖²
        leaves = int((held_squares - 2 * (held @ total)).argmin())
        total = total - held[leaves]
        going[leaves], held[leaves] = joins, vectors[joins]
        held_squares[leaves] = squares[joins]
    return order[going[:-1]]


def choose(evidence: Evidence) -> Tensor:
    # thousands of tiny steps: a GPU would only wait for the next one
    gates = evidence.gates.cpu()
    assert evidence.keep is not None
    stays = torch.ones(gates.shape[1], dtype=torch.bool)
    dropped = gates.shape[1] - evidence.keep
    if dropped and evidence.keep:
        going = rearrange(gates, dropped)
        stays[going] = False
        by_rank = gates.square().sum(0).argsort(stable=True)[:dropped]
        before, after = (float(gates[:, u].sum(1).square().sum()) for u in (by_rank, going))
        moved = dropped - int(torch.isin(going, by_rank).sum())
        if moved and before:
            evidence.remarks.append(
                f"selection: {moved} exchanges lowered the Fisher loss by {1 - after / before:.2%}"
            )
    return stays.nonzero().flatten().to(evidence.site.weight().device)


FISHER = Criterion("fisher", score, needs="gradients")
FISHER_REARRANGED = Criterion("fisher-rearranged", score, needs="gradients", choose=choose)
