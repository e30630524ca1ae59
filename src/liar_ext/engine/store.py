"""LayerStore: where the weights of a layer come from and where they go.

The driver walks one module tree in both cases. In memory the weights are always there; from a
checkpoint, a layer is on `meta` except between `open` and `close`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from transformers import PreTrainedModel


class LayerStore(Protocol):
    """Attributes: `model`, the module tree."""

    model: PreTrainedModel

    def open_outside(self) -> None:
        """Make everything that runs before the layers available (embeddings)."""

    def close_outside(self) -> None:
        """The embeddings are not needed any more."""

    def open_head(self) -> None:
        """Make everything that runs after the layers available, and the embeddings."""

    def close_head(self) -> None:
        """Neither is needed any more."""

    def prepare(self, widths: list[dict[str, int]], added_biases: list[str], done: int) -> None:
        """The result's widths are known: units of every Site, layer by layer, and the kinds whose
        consumers get a bias. Layers below `done` were closed as final by an earlier run."""

    def expect(self, layers: Iterable[int]) -> None:
        """From here on only these are opened, from the first to the last of them, so no other one
        has to be read ahead; until the next call. Without one all are."""

    def open(self, index: int, *, aside: bool = False) -> None:
        """Make layer `index` available; `aside` from the order in which layers are read ahead."""

    def close(self, index: int, *, final: bool) -> None:
        """Give layer `index` up; `final` if it is as it shall be written."""

    def written(self) -> dict[str, str]:
        """Digests of the layers that are on disk, by layer."""


class InMemory:
    """A model whose weights stay where they are."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def open_outside(self) -> None: ...
    def close_outside(self) -> None: ...
    def open_head(self) -> None: ...
    def close_head(self) -> None: ...
    def prepare(self, widths: list[dict[str, int]], added_biases: list[str], done: int) -> None: ...
    def expect(self, layers: Iterable[int]) -> None: ...
    def open(self, index: int, *, aside: bool = False) -> None: ...
    def close(self, index: int, *, final: bool) -> None: ...

    def written(self) -> dict[str, str]:
        return {}
