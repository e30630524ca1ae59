"""Runtime: a model that is opened layer by layer, and what any work on it needs around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from liar_ext.calibration.batch import Batch
from liar_ext.engine.clock import Clock
from liar_ext.engine.loss import predicts
from liar_ext.engine.passage import passage_of
from liar_ext.engine.progress import Progress, Silent
from liar_ext.engine.ranks import Ranks
from liar_ext.engine.shelf import DeviceShelf, Shelf
from liar_ext.engine.store import LayerStore
from liar_ext.engine.stream import Stream
from liar_ext.errors import InputError
from liar_ext.models import Site, adapter_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Runtime:
    """What the driver and the passes over its model share.

    Attributes:
        store: the weights; device, clock, progress: where, how long, who watches.
        ranks: the processes that share the work.
        shelf: where hidden states and paused forwards wait.
        model, adapter, layers: of the store; passage: how its layers are entered and left.
    """

    store: LayerStore
    device: torch.device
    clock: Clock
    progress: Progress = field(default_factory=Silent)
    ranks: Ranks = field(default_factory=Ranks.single)
    shelf: Shelf = field(default_factory=DeviceShelf)

    def __post_init__(self) -> None:
        self.model: PreTrainedModel = self.store.model
        self.adapter = adapter_for(self.model.config)
        self.passage = passage_of(self.model, self.adapter)
        self.layers = self.passage.layers

    @property
    def predicts(self) -> bool:
        """Whether the model has a loss of the next token (`loss.predicts`)."""
        return predicts(self.model, self.adapter)

    def sites(self, index: int, kinds: tuple[str, ...]) -> list[Site]:
        """Those of a layer, in forward order."""
        return self.adapter.sites_of(self.model, index, kinds)

    def layer_name(self, index: int) -> str:
        return self.layers.path(index)

    def open(self, index: int) -> None:
        """Make a layer available.

        Raises:
            InputError: NaN or infinite weights, by the name of the tensor.
        """
        self.open_again(index)
        with self.clock.phase("load"):
            for name, parameter in self.layers[index].named_parameters():
                if not bool(torch.isfinite(parameter).all()):
                    raise InputError(
                        f"{self.layer_name(index)}.{name}: has NaN or infinite weights; "
                        "the checkpoint is damaged"
                    )

    def open_again(self, index: int) -> None:
        """`open` of a layer that has been looked at before."""
        with self.clock.phase("load"):
            self.store.open(index)

    def close(self, index: int) -> None:
        """A layer is not needed for now; as the dense model has it."""
        self.store.close(index, final=False)

    @contextmanager
    def head(self) -> Iterator[nn.Module]:
        """What runs after the layers is available; the module that makes logits."""
        with self.clock.phase("load"):
            self.store.open_head()
        yield self.adapter.head(self.model)
        self.store.close_head()

    def stream(
        self,
        batches: Sequence[Batch],
        *,
        ranks: Ranks | None = None,
        least: int = 1,
        made: type[Stream] = Stream,
    ) -> Stream:
        """A stream of hidden states of a class; the arguments are that of `Stream`."""
        return made(
            batches,
            self.layers,
            device=self.device,
            shelf=self.shelf,
            ranks=ranks or self.ranks,
            clock=self.clock,
            least=least,
            specs=self.adapter.sites,
            scale=self.adapter.scale,
        )

    def embed(self, stream: Stream) -> None:
        """Hidden states of a stream enter the first layer."""
        with self.clock.phase("load"):
            self.store.open_outside()
            for index in self.passage.needed:
                self.store.open(index, aside=True)
        stream.embed(self.passage)
        for index in self.passage.needed:
            self.close(index)
        self.store.close_outside()

    def last_hidden(self, batch: Batch, final: Tensor) -> Tensor:
        """What the backbone makes of its last layer's output; with `head`, for its final norm."""
        return self.passage.leave(batch, self.device, final)
