"""`--ridge auto`: of a grid, the weakest ridge that does on tokens that its fit has not seen.

It does if its error there is at most `SLACK` times the least of the grid: the mean squared error
alone asks for more ridge than perplexity.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from liar_ext.engine.ranks import Ranks
from liar_ext.errors import NumericalError
from liar_ext.ops.drift import Sample
from liar_ext.ops.held_out import HeldOut, held_out_bytes
from liar_ext.ops.interpolate import repair_bytes
from liar_ext.recipe import RIDGES
from liar_ext.reconstruction import Reconstruction, Task

# measured on the demo model, FFN 50 %: with 4096 tokens the least held-out error (ridge 0.3 to 1)
# has 1.8 % more perplexity than ridges up to 1e-2, whose error is 1.1 times that; with 1024 tokens
# 10.9 % more than 1e-2, with errors of 1.5 to 2.9 times; with 768 tokens 6.7 % more than 0.1, with
# 1.4 to 2.1 times, and there 1e-4, with 2.9 to 26 times, is 10.6 % worse than 0.1
SLACK = 2.0


@dataclass(frozen=True)
class Choice:
    """Attributes: `ridge`; `errors`: by ridge, the held-out relative residual of its fit, of those
    that hold."""

    ridge: float
    errors: dict[float, float]


def choose(task: Task, held: Sample, reconstruction: Reconstruction, ranks: Ranks) -> Choice:
    """The least ridge of `RIDGES` with at most `SLACK` times the least held-out error.

    Args:
        task: of all tokens, with this rank's rows; held: statistics of those that are held out.
        reconstruction: one that has a ridge.
    Raises:
        InputError: nothing is held out, or everything.
        NumericalError: not even the largest ridge holds.
    """
    assert reconstruction.sweep is not None, "asked of what has a ridge"
    fitted = Sample(task.moments, task.drift) - held
    judge = HeldOut(fitted, held, task.weight, task.keep, task.drop, task.intercept)
    fit = reconstruction.sweep(replace(task, moments=fitted.moments, drift=fitted.drift))
    grid = sorted(RIDGES, reverse=True)
    found = torch.full((len(grid) + 1,), torch.inf, dtype=torch.float64, device=task.keep.device)
    found[-1] = judge.dense
    for position, ridge in enumerate(grid):
        try:
            change = fit(ridge)
        except NumericalError:
            change = None
        if change is None:
            break
        found[position] = judge.error(change)
        del change
    # every rank has the energies of its rows, or all of them
    found = ranks.broadcast(found) if reconstruction.whole else ranks.sum_(found)
    *errors, dense = found.tolist()
    relative = {
        ridge: max(error, 0.0) / max(dense, torch.finfo(torch.float64).tiny)
        for ridge, error in zip(grid, errors, strict=True)
        if error < torch.inf
    }
    if not relative:
        raise NumericalError(f"--ridge auto: no ridge up to {grid[0]:g} gives a usable fit")
    enough = SLACK * min(relative.values())
    return Choice(min(ridge for ridge, error in relative.items() if error <= enough), relative)


def choice_bytes(kept: int, dropped: int, rows: int, *, own: int, drift: bool = False) -> int:
    """Most bytes that `choose` holds beside its arguments, for the rows of W that this rank has.

    Args:
        own: what one repair holds; drift: whether the target is the dense path's output.
    """
    columns = kept + dropped
    fitted = 4 * columns * (columns + (rows if drift else 0))
    # with right sides `C_SM W_Mᵀ`, as for W without any rows, whatever is cheapest for one repair
    one = max(own, repair_bytes(kept, dropped, 0, rows))
    return fitted + one + held_out_bytes(kept, dropped, rows)
