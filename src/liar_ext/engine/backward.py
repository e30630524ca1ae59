"""The loss of the next token, backward through a model that is opened layer by layer.

Forward layer by layer, keeping what enters each; the loss; then the layers in reverse, each
computed once more, with autograd, from what entered it. One layer's weights and one batch's graph
are in memory at a time. What is wanted of a layer is its visitor's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from liar_ext.calibration.batch import Batch, first_samples
from liar_ext.engine.loss import NO_TARGET, loss_gradient, next_tokens
from liar_ext.engine.runtime import Runtime
from liar_ext.engine.shelf import Item, free_all
from liar_ext.errors import InputError


class Visit(Protocol):
    """What is done with a layer that is open on the way back, all batches of this rank."""

    def __call__(self, index: int, entered: Mapping[int, Item], upstream: dict[int, Item]) -> None:
        """Take the gradients of a layer.

        Args:
            entered: what entered it, by batch; it is freed here.
            upstream: the gradient of each batch's summed loss with respect to its output; it
                becomes that with respect to what entered, where a layer in front is wanted.
        """


@dataclass
class BackwardPass:
    """The calibration loss, backward down to one layer.

    Attributes:
        batches: calibration tokens; samples: their first windows that the loss is of.
        first: the layer that it ends at; asked: the option that wants it, for messages.
        stream: of these windows; counts: predicted tokens of each example, by batch.
        facts: for the report.
    Raises:
        InputError: the model has no loss of the next token.
    """

    runtime: Runtime
    batches: Sequence[Batch]
    samples: int
    first: int
    asked: str
    instead: Sequence[str]
    counts: dict[int, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _refuse_without_loss(self.runtime, self.asked, self.instead)
        self.windows = first_samples(self.batches, self.samples)
        self.stream = self.runtime.stream(self.windows)

    @torch.no_grad()
    def run(self, visit: Visit) -> None:
        """Every layer from the last to `first`.

        Raises:
            InputError: there is nothing to predict, or the loss is NaN or infinite.
        """
        entered = self._forward()
        upstream = self._loss()
        for index in reversed(range(self.first, len(self.runtime.layers))):
            self.runtime.open(index)
            visit(index, entered.pop(index), upstream)
            self.runtime.close(index)
            self.runtime.progress.layer(index)
        free_all(upstream)

    def _forward(self) -> dict[int, dict[int, Item]]:
        """What enters each layer from `first` on; the last output is the stream's hidden states."""
        self.runtime.embed(self.stream)
        layers = len(self.runtime.layers)
        self.runtime.progress.begin(2 * layers - self.first, "gradients")
        entered: dict[int, dict[int, Item]] = {}
        for index in range(layers):
            self.runtime.open(index)
            later = self.stream.through(index, (), onward=True)
            self.runtime.close(index)
            if index in range(self.first, layers):
                entered[index], self.stream.hidden = self.stream.hidden, later
            else:
                self.stream.advance(later)
            self.runtime.progress.layer(index)
        return entered

    def _loss(self) -> dict[int, Item]:
        """The gradient of each batch's summed loss with respect to the last layer's output.

        Summed, not averaged, so that half precision has something to hold; what is averaged is
        divided at the end.
        """
        with self.runtime.clock.phase("load"):
            self.runtime.store.open_head()
        head = self.runtime.adapter.head(self.runtime.model)
        upstream: dict[int, Item] = {}
        total = torch.zeros(2, dtype=torch.float64, device=self.runtime.device)
        for number, item in self.stream.hidden.items():
            batch = self.windows[number]
            targets = next_tokens(batch)
            self.counts[number] = (targets != NO_TARGET).sum(1)
            with self.runtime.clock.phase("backward"):
                final = item.fetch().detach().requires_grad_()
                with torch.enable_grad():
                    last = self.runtime.last_hidden(batch, final)
                gradient, loss = loss_gradient(head, last.detach(), targets.to(self.runtime.device))
                (own,) = torch.autograd.grad(last, final, gradient)
                total += torch.stack((loss, self.counts[number].sum().to(loss)))
                del final, last, gradient
            with self.runtime.clock.phase("hold"):
                item.free()
                upstream[number] = self.runtime.shelf.put(own)
        self.stream.hidden = {}
        self.runtime.store.close_head()
        loss_sum, predicted = self.runtime.ranks.sum_(total).tolist()
        self._check_loss(loss_sum, int(predicted))
        self.facts |= {
            "samples": sum(len(batch.input_ids) for batch in self.windows),
            "predicted_tokens": int(predicted),
            "loss": loss_sum / predicted,
        }
        return upstream

    def _check_loss(self, loss: float, predicted: int) -> None:
        if not predicted:
            raise InputError(
                f"{self.asked}: the first {self.samples} calibration windows have no "
                "next token to predict; give longer ones, or more with --gradient-samples"
            )
        if not torch.isfinite(torch.tensor(loss)):
            raise InputError(
                f"{self.asked}: the loss on the calibration windows is {loss}; check the "
                "checkpoint, or compute in a wider type with --dtype"
            )


def _refuse_without_loss(runtime: Runtime, asked: str, instead: Sequence[str]) -> None:
    if runtime.predicts:
        return
    model, adapter = runtime.model, runtime.adapter
    reason = "has no language-model head" if adapter.plain_head else "scales or bounds its logits"
    if not adapter.decoder and adapter.then is None:
        reason = "is an encoder, which predicts none"
    raise InputError(
        f"{asked}: needs the loss of the next token, and {type(model).__name__} "
        f"{reason}; these need no loss: {', '.join(instead)}"
    )
