"""What a measurement of one model gives: named figures with their uncertainty, and the facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from liar_ext.evaluation.estimate import Difference, Estimate, difference

if TYPE_CHECKING:
    from liar_ext.calibration.sources import Corpus


@dataclass(frozen=True, eq=False)
class Measured:
    """One evaluation of one model.

    Attributes:
        estimates: by metric; the first is the one that the evaluation is about.
        unit: what there is one pseudo-value of, in the plural.
        details: further JSON data.
        reference: figures of the dense model where the evaluation is of two models.
    """

    estimates: Mapping[str, Estimate]
    unit: str
    details: Mapping[str, Any]
    reference: Mapping[str, Estimate] = field(default_factory=dict)

    @property
    def metric(self) -> str:
        return next(iter(self.estimates))

    def to_json(self) -> dict[str, Any]:
        """`metric`, `value`, `standard_error`, `confidence_interval`, `estimates`, and details."""
        main = self.estimates[self.metric]
        found = {
            "metric": self.metric,
            **main.to_json(),
            **self.details,
            "estimates": {name: one.to_json() for name, one in self.estimates.items()},
        }
        if self.reference:
            found["reference"] = {name: one.to_json() for name, one in self.reference.items()}
        return found

    def minus(self, dense: Mapping[str, Estimate], paired: bool = True) -> dict[str, Difference]:
        """The differences from a dense model's figures, of the metrics that both have."""
        return {
            name: difference(dense[name], one, self.unit, paired)
            for name, one in self.estimates.items()
            if name in dense
        }


class Readable(Protocol):
    """What is read of a source: texts, questions or pairs."""

    def corpus(self) -> Corpus:
        """Its texts, for `calibration.overlap`."""


class Measure(Protocol):
    """An evaluation whose texts are tokens already: a function on models."""

    @property
    def key(self) -> str:
        """A digest of what models are measured on: figures of two models are of pairs of units
        where it is the same."""

    def __call__(self, model: nn.Module, dense: Dense | None = None) -> Measured:
        """Measure a model.

        Args:
            dense: of `kl` alone: the model to compare with, or what is recorded of it.
        Raises:
            InputError: the model, or the texts, cannot be evaluated.
        """


class Recording(Protocol):
    """A measure of two models that need not be in memory together."""

    def record(self, dense: nn.Module, folder: Path) -> Callable[[int, Tensor], Tensor]:
        """What the measure takes for `dense`, with states on disk; see `agreement.recorded`."""


Dense = nn.Module | Callable[[int, Tensor], Tensor]
