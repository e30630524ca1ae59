"""What enters the first trained layer: layers below run once for a window, or once in all.

Nothing below the first trained layer depends on what is trained. Its states are computed without
autograd, each window by itself, so that they are the same to the bit whatever other windows are in
the forward, and kept as they are: training with and without the file gives the same weights.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from liar_ext.calibration.batch import Batch
from liar_ext.depth.surgery import layer_list
from liar_ext.errors import UnsupportedModelError
from liar_ext.recovery.train import Loss


class _Reached(Exception):
    """The first trained layer was about to run."""


class Entering:
    """States in front of a layer.

    Args:
        model: on its device; first: of the layer, 1 or more.
        file: to keep the states in, open for reading and writing, empty; None keeps none. They are
            in the dtype that the model computes in.
    Attributes:
        runs: windows that went through the layers below; bytes: in the file.
    """

    def __init__(self, model: PreTrainedModel, first: int, file: IO[bytes] | None = None) -> None:
        self._model, self._first, self._file = model, first, file
        self._layers = layer_list(model)[1]
        # by the tokens of a window: where its states are in the file, their shape and dtype
        self._places: dict[bytes, tuple[int, torch.Size, torch.dtype]] = {}
        self._tuple = 0
        self.runs = self.bytes = 0

    def under(self, loss: Callable[[Batch], Loss]) -> Callable[[Batch], Loss]:
        """The same loss, computed from the first trained layer on."""

        def upper(batch: Batch) -> Loss:
            states = self.of(batch)
            with self._standing_in(states):
                return loss(batch)

        return upper

    @torch.no_grad()
    def of(self, batch: Batch) -> Tensor:
        """(b, t, d) on the model's device; zero where the batch has padding on the right."""
        found = [self._window(batch.rows([row])) for row in range(len(batch.input_ids))]
        states = found[0].new_zeros(len(found), batch.input_ids.shape[1], found[0].shape[-1])
        for row, own in enumerate(found):
            states[row, : len(own)] = own
        return states

    def _window(self, window: Batch) -> Tensor:
        """(t, d) of one window without padding on its right."""
        if self._file is None:
            return self._run(window)
        tokens = window.input_ids.numpy().tobytes() + window.attention_mask.numpy().tobytes()
        key = hashlib.blake2b(tokens, digest_size=16).digest()
        if key not in self._places:
            states = self._run(window)
            self._places[key] = self.bytes, states.shape, states.dtype
            raw = states.cpu().contiguous().view(torch.uint8).numpy().tobytes()
            self._file.seek(self.bytes)
            self._file.write(raw)
            self.bytes += len(raw)
            return states
        at, shape, dtype = self._places[key]
        raw_again = bytearray(shape.numel() * dtype.itemsize)
        self._file.seek(at)
        if self._file.readinto(raw_again) != len(raw_again):  # type: ignore[attr-defined]
            raise OSError(None, "kept hidden states were cut off", os.fspath(self._file.name))
        return torch.frombuffer(raw_again, dtype=dtype).view(shape).to(self._model.device)

    def _run(self, window: Batch) -> Tensor:
        model, entering = self._model, self._layers[self._first]
        found: list[Tensor] = []

        def stop(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise _Reached

        def note(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._tuple = len(output) if isinstance(output, tuple) else 0
            if self._tuple and any(part is not None for part in output[1:]):
                raise UnsupportedModelError(
                    f"--method partial: layers of {type(model).__name__} give more than hidden "
                    "states to the next one; use --method lora"
                )

        hooks = [
            entering.register_forward_pre_hook(stop, with_kwargs=True),
            self._layers[self._first - 1].register_forward_hook(note),
        ]
        try:
            model(
                input_ids=window.input_ids.to(model.device),
                attention_mask=window.mask_on(model.device),
                use_cache=False,
            )
        except _Reached:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        self.runs += 1
        return found[0][0]

    @contextmanager
    def _standing_in(self, states: Tensor) -> Iterator[None]:
        """The layers below say what is known of them; the model itself prepares what the layers
        above are given."""
        told = (states, *[None] * (self._tuple - 1)) if self._tuple else states
        below = self._layers[: self._first]
        for layer in below:
            layer.forward = lambda *args, **kwargs: told
        try:
            yield
        finally:
            for layer in below:
                del layer.forward
