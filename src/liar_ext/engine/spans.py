"""Layers that are left out, and what the consumer in front of a gap can say in their place.

With layers a … b−1 gone, the stream behind layer a−1 is short of what they added, `h_b − h_a`. The
last consumer of layer a−1 adds to the same stream, so least squares can fold what its inputs x̂
predict of it into its weights, and nothing is added to the model:

    minimise  E‖W' x̂_S + b' − (W x + b + h_b − h_a)‖² + λ‖W' − W_S‖²

That is `ops.drift` with `h_b − h_a` on top of the drift, so dropped columns and left-out layers are
repaired by one solve. ReplaceMe (arXiv 2505.02819) maps the consumer's output instead, `T W x`: of
rank d where this has that of the columns, and of W itself only what T leaves.

The stream behind the gap is the dense model's where the target is (`dense`, `stream`), else what
the left-out layers make of the present one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from liar_ext.calibration.batch import Batch
from liar_ext.engine.residual_stream import ResidualStream
from liar_ext.engine.runtime import Runtime
from liar_ext.engine.shelf import Item, free_all
from liar_ext.engine.stream import Stream, Visit
from liar_ext.models import Site


class LeftOut:
    """Layers of a whole model that are not in the one that is pruned.

    Attributes:
        gaps: which are missing behind a layer of the other, by its index there.

    Args:
        runtime: of the whole model, with the same ranks, shelf and device.
    """

    def __init__(self, runtime: Runtime, gaps: Mapping[int, range]) -> None:
        self._runtime, self.gaps = runtime, dict(gaps)
        self._stream: Stream | None = None

    def start(self, batches: Sequence[Batch], least: int) -> None:
        """The calibration tokens of the other model, cut into the same segments."""
        self._batches, self._least = batches, least
        # or the layer behind each gap would be read, and stay in memory until the next gap
        self._runtime.store.expect(layer for gap in self.gaps.values() for layer in gap)

    def through(self, index: int, states: Mapping[int, Item]) -> dict[int, Item]:
        """What leaves the gap behind layer `index`, from what enters it, by batch; that stays."""
        stream = self._entered()
        stream.hidden = dict(states)
        for layer in self.gaps[index]:
            self._runtime.open(layer)
            later = stream.through(layer, (), onward=True)
            self._runtime.close(layer)
            if layer != self.gaps[index].start:
                free_all(stream.hidden)
            stream.hidden = later
        found, stream.hidden = stream.hidden, {}
        return found

    def _entered(self) -> Stream:
        """How the whole model calls its layers, from a run through the embeddings."""
        if self._stream is None:
            self._stream = self._runtime.stream(self._batches, least=self._least)
            self._runtime.embed(self._stream)
            self._stream.advance({})
        return self._stream


class LocalSpans(ResidualStream):
    """One path, and at the layers in front of gaps a second one, from what enters them.

    There the Sites aim at the stream that the dense layer, and the left-out ones behind it, make of
    the present hidden states.
    """

    def parted(self, index: int) -> bool:
        return self.left_out is not None and index in self.left_out.gaps

    def stopping(self, index: int, sites: Sequence[Site], visit: Visit, *, onward: bool) -> None:
        if self.parted(index):
            super().stopping(index, sites, visit, onward=onward)
            self._part({})
        else:
            Stream.stopping(self, index, sites, visit, onward=onward)
