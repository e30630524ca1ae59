"""Loss and accuracy of a network, and the refitting of its segments from pairs of activations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from liar_ext.convolution.capture import Place, captured
from liar_ext.convolution.chain import Chain, Segment
from liar_ext.convolution.images import Images
from liar_ext.convolution.network import (
    Weights,
    fused,
    get_weights,
    located,
    set_weights,
)
from liar_ext.convolution.repair import refit
from liar_ext.errors import InputError


@dataclass(frozen=True)
class Quality:
    """Attributes: mean cross-entropy in nats, and the share of images that are right."""

    loss: float
    accuracy: float

    def to_json(self) -> dict[str, float | None]:
        """A loss that is not finite is None: JSON has no such number."""
        loss = self.loss if math.isfinite(self.loss) else None
        return {"loss": loss, "accuracy": self.accuracy}


@torch.no_grad()
def quality(model: PreTrainedModel, images: Images, batch_size: int) -> Quality:
    """Loss and accuracy on images; the loss may be infinite where a network is broken."""
    device = next(model.parameters()).device
    loss, right = 0.0, 0
    for batch in images.batches(batch_size):
        batch = batch.to(device)
        logits = model(pixel_values=batch.pixels).logits.double()
        loss += float(functional.cross_entropy(logits, batch.labels, reduction="sum"))
        right += int((logits.argmax(1) == batch.labels).sum())
    mean = loss / len(images)
    return Quality(mean if math.isfinite(mean) else math.inf, right / len(images))


@dataclass(frozen=True, eq=False)
class Dense:
    """The network that is left as it is, and what segments are refitted from.

    Attributes:
        model: batch norms of the chain folded in, each node its own segment.
        batches: calibration images, on the device.
        patches: see `FuseSettings`.
    """

    model: PreTrainedModel
    chain: Chain
    weights: Weights
    batches: Sequence[Images]
    patches: int
    seed: int

    def replaced(self, plan: Sequence[Segment]) -> PreTrainedModel:
        """The network with another plan, not repaired."""
        return fused(self.model, self.chain, self.weights, plan)

    def around(self, segment: Segment) -> list[Segment]:
        """The plan of a single segment, all other nodes for themselves."""
        dense = self.chain.dense
        return [*dense[: segment.start], segment, *dense[segment.end :]]

    def repair(
        self, model: PreTrainedModel, plan: Sequence[Segment], segment: Segment
    ) -> dict[str, Any] | None:
        """Refit a segment of a model with a plan, in place, to the dense network's activations.

        What lies before it in the model is as it is: repaired in order, each segment makes good
        what those before it could not.

        Returns:
            what `repair.refit` found; None where there is no convolution.
        """
        merged, _ = located(model, self.chain, plan)[segment]
        if merged.shape.empty:
            return None
        conv, facts = refit(
            get_weights(merged),
            self._pairs(model, plan, segment),
            images=sum(len(batch) for batch in self.batches),
            patches=self.patches,
            seed=self.seed,
        )
        set_weights(merged, conv)
        return facts

    def parameters(
        self, model: PreTrainedModel, plan: Sequence[Segment], segment: Segment
    ) -> list[str]:
        """Names of the parameters of a segment's convolution."""
        merged, _ = located(model, self.chain, plan)[segment]
        mine = {id(parameter) for parameter in merged.parameters()}
        return [name for name, value in model.named_parameters() if id(value) in mine]

    def _pairs(
        self, model: PreTrainedModel, plan: Sequence[Segment], segment: Segment
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What enters a segment, and what it should say."""
        merged, residual = located(model, self.chain, plan)[segment]
        block = self.chain.inside(segment)
        own: dict[str, Place] = {"x": (merged, "input")}
        if residual is not None and block is not None and block.end == segment.end:
            own["shortcut"] = (residual.shortcut, "output")
        wanted = {"y": self._before_activation(segment.end)}
        for batch in self.batches:
            here = captured(model, batch.pixels, own)
            there = captured(self.model, batch.pixels, wanted)["y"]
            yield here["x"], there - here["shortcut"] if "shortcut" in here else there

    def _before_activation(self, boundary: int) -> Place:
        """Where the dense network has what stands in front of a boundary's activation."""
        dense = self.chain.dense
        merged, residual = located(self.model, self.chain, dense)[dense[boundary - 1]]
        block = self.chain.inside(dense[boundary - 1])
        if residual is not None and block is not None and block.end == boundary:
            return residual.activation, "input"
        return merged.activation, "input"


def input_shapes(dense: Dense, size: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """(channels, h, w) at each boundary but the last, for images (channels, h, w)."""
    found = located(dense.model, dense.chain, dense.chain.dense)
    places: Mapping[str, Place] = {
        str(segment.start): (merged, "input") for segment, (merged, _) in found.items()
    }
    first = next(dense.model.parameters())
    x = torch.zeros(1, *size, device=first.device, dtype=first.dtype)
    try:
        seen = captured(dense.model, x, places)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"--images: the network cannot take images of {tuple(size)} ({reason})"
        ) from error
    return {int(name): tuple(tensor.shape[1:]) for name, tensor in seen.items()}
