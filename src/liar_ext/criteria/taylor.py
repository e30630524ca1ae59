"""taylor-vector, -first, -second, -mixed: LLM-Pruner's importances (arXiv 2305.11627).

Sums over the weights of the consumer's columns and of the producers' rows, see `ops.saliency`; the
sums of all that is coupled are added up for a unit, as in the paper's code.
"""

from collections.abc import Callable

from torch import Tensor

from liar_ext.criteria.base import Criterion, Evidence
from liar_ext.ops.saliency import TAYLOR_FORMS


def _sums(form: str) -> Callable[[Evidence], Tensor]:
    return lambda evidence: evidence.taylor(form)


TAYLORS = tuple(
    Criterion(f"taylor-{form}", _sums(form), needs="weight_gradients") for form in TAYLOR_FORMS
)
