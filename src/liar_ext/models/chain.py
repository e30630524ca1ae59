"""Chain: the layers of a model in the order in which they run, whatever lists hold them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from torch import nn


class Chain:
    """One list of layers, or of an encoder-decoder both, the encoder's first.

    Replacing a layer replaces it in the model.

    Args:
        stacks: the path of each list in the model, and the list.
    """

    def __init__(self, stacks: Sequence[tuple[str, nn.ModuleList]]) -> None:
        self.stacks = tuple(stacks)
        self._places = [
            (path, layers, index) for path, layers in stacks for index in range(len(layers))
        ]
        self._prefixes = {
            f"{path}.{index}": place for place, (path, _, index) in enumerate(self._places)
        }

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> nn.Module:
        _, layers, place = self._places[index]
        return layers[place]

    def __setitem__(self, index: int, layer: nn.Module) -> None:
        _, layers, place = self._places[index]
        layers[place] = layer

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[index] for index in range(len(self)))

    @property
    def starts(self) -> list[int]:
        """The first layer of each list."""
        return [*accumulate((len(layers) for _, layers in self.stacks[:-1]), initial=0)]

    def path(self, index: int) -> str:
        """Of a layer in the model."""
        path, _, place = self._places[index]
        return f"{path}.{place}"

    def stack(self, index: int) -> int:
        """0 for a layer of the first list, 1 for one of the second."""
        return [path for path, _ in self.stacks].index(self._places[index][0])

    def layer_of(self, name: str) -> int | None:
        """The layer that a tensor or module of the model is in; None for one that is in none."""
        for path, _ in self.stacks:
            if name.startswith(f"{path}."):
                place = name.removeprefix(f"{path}.").partition(".")[0]
                return self._prefixes.get(f"{path}.{place}")
        return None
