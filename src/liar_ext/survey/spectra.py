"""spectra: how heavy-tailed the eigenvalue spectra of a layer's linears are; reads weights only.

With λ_1 ≤ … ≤ λ_N the eigenvalues of `W Wᵀ` (of the smaller side), the tail above λ_i is taken for
a power law, `p(λ) ∝ λ^−α`, whose Hill estimate is

    α_i = 1 + n / (Σ_{k ≥ i} ln λ_k − n ln λ_i)        n = N − i + 1 values from λ_i on

Where the tail begins is chosen as AlphaPruning does (arXiv 2410.10912, `xmin_peak`): near the peak
of the histogram of log λ, and there by the least Kolmogorov–Smirnov distance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liar_ext.criteria import Criterion
from liar_ext.models import linear
from liar_ext.models.site import Site
from liar_ext.survey.base import Reads, Survey, View

BINS = 100
# the tail begins between these multiples of the left edge of the fullest bin. The published code
# compares eigenvalues with the logarithm of the lower one, which leaves it out for edges below 1;
# the paper means this
LOWEST, HIGHEST = 0.95, 1.5
# eigenvalues that differ by so much of the largest are equal
_EQUAL = 1e-9


def spectrum(weight: Tensor) -> Tensor:
    """Eigenvalues of `W Wᵀ` above the rounding of the largest, ascending, float64."""
    matrix = weight.detach().double()
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    values = torch.linalg.eigvalsh(matrix @ matrix.T)
    floor = values[-1] * len(values) * torch.finfo(torch.float64).eps
    return values[values > floor]


def hill(values: Tensor) -> float:
    """The exponent α of the tail of a spectrum; NaN where it has none.

    Args:
        values: positive eigenvalues, ascending, (N,) float64. There is no tail in fewer than two,
            nor where all of them are equal.
    """
    count = len(values)
    if count < 2 or float(values[-1] - values[0]) <= _EQUAL * float(values[-1]):
        return float("nan")
    logs = values.log10()
    bins = logs.cpu().histc(BINS)
    # the first of equal ones, which argmax does not promise
    fullest = int((bins == bins.max()).nonzero()[0])
    edge = 10.0 ** float(logs[0] + (logs[-1] - logs[0]) * fullest / BINS)
    # the last one alone is no tail
    inside = (values[:-1] >= LOWEST * edge) & (values[:-1] <= HIGHEST * edge)
    starts = inside.nonzero().flatten().tolist() or range(count - 1)
    found = [_tail(values[start:]) for start in starts]
    return min((f for f in found if f is not None), default=(0.0, float("nan")))[1]


def _tail(tail: Tensor) -> tuple[float, float] | None:
    """Distance of a tail from its power law, and the exponent; None where all are equal."""
    count = len(tail)
    ratios = tail / tail[0]
    excess = float(ratios.log().sum())
    # the last one as it is for all of them in `hill`: of rounding any exponent could come
    if float(ratios[-1]) - 1 <= _EQUAL:
        return None
    alpha = 1 + count / excess
    empirical = torch.arange(count, dtype=tail.dtype, device=tail.device) / count
    return float((1 - ratios.pow(1 - alpha) - empirical).abs().max()), alpha


def reads(criterion: Criterion) -> Reads:
    return "weights"


def measure(view: View) -> Tensor:
    """The exponent of each linear of the layer, in the order of its modules."""
    found = [hill(spectrum(linear.weight(m))) for m in linear.linears(view.site.module)]
    return torch.tensor(found, dtype=torch.float64)


def costs(site: Site, criterion: Criterion) -> tuple[int, int]:
    flops = most = 0
    for module in linear.linears(site.module):
        small, large = sorted(linear.weight(module).shape)
        # the product, and the reduction to a tridiagonal matrix
        flops += 2 * small**2 * large + 4 * small**3 // 3
        # W in float64, the product, and its copy that is reduced
        most = max(most, 8 * (small * large + 2 * small**2))
    return flops, most


SPECTRA = Survey("spectra", "reading spectra", reads, measure, whole_layer=True, costs=costs)
