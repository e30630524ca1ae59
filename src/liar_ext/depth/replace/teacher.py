"""The whole model as the teacher of what stands in for a window: run as far as its end, no further.

No state is kept from step to step: those of all tokens would be terabytes for a training that a
model of 7B needs. What enters a window is made again each time, without gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from liar_ext.calibration.batch import Batch
from liar_ext.checkpoint.load import fill
from liar_ext.checkpoint.reader import CheckpointReader, tied_names
from liar_ext.depth.shorten import shortened_checkpoint
from liar_ext.depth.surgery import layer_list
from liar_ext.engine.calls import LayerCall
from liar_ext.errors import UnsupportedModelError
from liar_ext.models import adapter_for


@dataclass(frozen=True)
class Passage:
    """A batch on its way through a window.

    Attributes:
        entering, leaving: hidden states (b, t, d) in front of its first layer and behind its last;
            behind the last of all layers, in front of the final norm.
        calls: how the model calls the first layers of the window.
    """

    entering: Tensor
    leaving: Tensor
    calls: tuple[LayerCall, ...]


class Teacher:
    """Runs a model on batches until they have left a window.

    Masks, positions and whatever else a layer is called with come from the model itself: a layer
    that is called without a mask attends to what follows, unless its attention is SDPA.
    """

    def __init__(self, model: PreTrainedModel, window: range, called: int) -> None:
        """
        Args:
            model: with the layers of the window, on its device; layers behind it are not run.
            window: layers; called: how many of its first ones' calls are wanted.
        """
        self._model = model
        self.layers = layer_list(model)[1]
        self._window, self._called = window, called
        try:
            self._options = adapter_for(model.config).options
        except UnsupportedModelError:
            self._options = {"use_cache": False}

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Passage:
        states: list[Tensor] = []
        calls: list[LayerCall] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, call = _taken(args, kwargs)
            if not states:
                # a copy: a layer may write to its input
                states.append(hidden.clone())
            calls.append(call)

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            raise _Left(output[0] if isinstance(output, tuple | list) else output)

        window = self._window
        handles = [
            self.layers[index].register_forward_pre_hook(enter, with_kwargs=True)
            for index in window[: self._called]
        ]
        handles.append(self.layers[window[-1]].register_forward_hook(leave))
        device = next(self.layers.parameters()).device
        try:
            # in its own dtype, whatever the training computes in
            with torch.autocast(device.type, enabled=False):
                self._model(
                    input_ids=batch.input_ids.to(device),
                    attention_mask=batch.mask_on(device),
                    **self._options,
                )
        except _Left as left:
            return Passage(states[0], left.states, tuple(calls))
        finally:
            for handle in handles:
                handle.remove()
        raise RuntimeError(f"the model did not run its layer {window[-1]}")


class _Left(Exception):
    """The window is behind: the rest of the model is not needed."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def _taken(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, LayerCall]:
    """The hidden states of a call of a layer, and its other arguments."""
    if "hidden_states" in kwargs:
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        return kwargs["hidden_states"], LayerCall(args, rest)
    return args[0], LayerCall(args[1:], dict(kwargs))


def read_teacher(
    reader: CheckpointReader,
    dense: PreTrainedModel,
    window: range,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    """The model as far as a window goes, read from the files: no layer above it, no head.

    Args:
        reader: of all layers; dense: their model on `meta`.
    """
    own, model = shortened_checkpoint(reader, dense, range(window.stop))
    fill(model, own, dtype, device, without=_head(model))
    return model.eval()


def _head(model: PreTrainedModel) -> set[str]:
    """The parameters that only logits need."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        return set()
    own = {name for name, module in model.named_modules() if module is head}
    found = {f"{path}.{name}" for path in own for name, _ in head.named_parameters()}
    return found - set(tied_names(model))
