"""Passage: how a model is entered and left around its layers, by its own code."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from liar_ext.calibration.batch import Batch
from liar_ext.engine.calls import (
    ENCODED,
    LayerCall,
    given,
    last_hidden,
    left,
    record_calls,
    recorded,
)
from liar_ext.models import Adapter
from liar_ext.models.adapter import Decoder
from liar_ext.models.chain import Chain


class Passage:
    """Around one stack of layers.

    Attributes:
        layers: in the order in which they run.
    """

    def __init__(self, model: PreTrainedModel, adapter: Adapter) -> None:
        self.layers: Chain = adapter.chain(model)
        self.adapter, self.backbone = adapter, adapter.backbone(model)[1]

    @property
    def needed(self) -> list[int]:
        """The layers that have to be open to `enter`."""
        return self.layers.starts if self.adapter.hands_on else []

    def enter(self, batch: Batch, device: torch.device) -> tuple[Tensor, list[LayerCall]]:
        """What enters the first layer (b, t, d), and how each layer is called (`record_calls`)."""
        own = self.adapter
        return record_calls(
            self.backbone,
            self.layers,
            batch,
            device,
            own.options,
            own.returns,
            hands_on=own.hands_on,
        )

    def leave(self, batch: Batch, device: torch.device, final: Tensor) -> Tensor:
        """What the backbone makes of its last layer's output, for the head."""
        own = self.adapter
        return last_hidden(
            self.backbone, self.layers, batch, device, own.options, final, own.returns
        )


class TwoStacks(Passage):
    """Around an encoder and a decoder, with hidden states of both (`calls.LayerCall`)."""

    def __init__(self, model: PreTrainedModel, adapter: Adapter, decoder: Decoder) -> None:
        super().__init__(model, adapter)
        (_, self._encoding), (_, self._decoding) = self.layers.stacks
        self._encoder: nn.Module = self.backbone.get_encoder()  # type: ignore[operator]
        self._decoder = self.backbone.get_submodule(decoder.path)
        self._between = decoder.between

    def enter(self, batch: Batch, device: torch.device) -> tuple[Tensor, list[LayerCall]]:
        own = self.adapter
        source, target = batch.parts
        states, calls = recorded(
            self._encoder,
            self._encoding,
            given(self.backbone, source, device),
            own.returns,
            hands_on=own.hands_on,
        )
        entering, others = recorded(
            self._decoder,
            self._decoding,
            self._beside(source, target, device, states),
            own.returns,
            hands_on=own.hands_on,
        )
        cut, length = batch.cut, batch.input_ids.shape[1]
        for call in calls:
            call.span = (0, cut)
        # the model's own may be without weights when the layers are run
        others[0].ahead = copy.deepcopy(self.backbone.get_submodule(self._between))
        for call in others:
            call.span, call.dtype = (cut, length), states.dtype
            call.args = tuple(ENCODED if value is states else value for value in call.args)
            call.kwargs = {n: ENCODED if v is states else v for n, v in call.kwargs.items()}
        return torch.cat((states, entering), 1), [*calls, *others]

    def leave(self, batch: Batch, device: torch.device, final: Tensor) -> Tensor:
        """Of the decoder's tokens alone."""
        source, target = batch.parts
        inputs = self._beside(source, target, device, final[:, : batch.cut])
        own = final[:, batch.cut :]
        return left(self._decoder, self._decoding, inputs, own, self.adapter.returns)

    def _beside(
        self, source: Batch, target: Batch, device: torch.device, encoded: Tensor
    ) -> dict[str, Any]:
        return {
            **given(self.backbone, target, device),
            **self.adapter.options,
            "encoder_hidden_states": encoded,
            "encoder_attention_mask": source.mask_on(device),
        }


def passage_of(model: PreTrainedModel, adapter: Adapter) -> Passage:
    """The one that a model needs."""
    if adapter.then is None:
        return Passage(model, adapter)
    return TwoStacks(model, adapter, adapter.then)
