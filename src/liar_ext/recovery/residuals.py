"""How much of what a pruned layer lost a low-rank change of it can bring back, rank by rank.

Ours; no training. Layer j of the pruned model makes Ŝ_j of the stream Ŝ_{j−1}; the dense model, up
to the layer that the next kept one was, makes S_j of S_{j−1}. The layer's error is what they add:

    E_j = (S_j − S_{j−1}) − (Ŝ_j − Ŝ_{j−1})

each model on its own path, so that errors of all layers sum to that of the last hidden states. A
linear that writes to the stream (a Site's consumer) with inputs X̂ can take `Σ_{i≤r} σ_i²` of it
with a change of rank r (`ops.reduced_rank`). A layer's gain is that of its consumers, over the
variance of S_j: norms in front of the layers above see errors relative to the stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from liar_ext.calibration.batch import Batch
from liar_ext.depth.config import count_of
from liar_ext.errors import InputError
from liar_ext.models import Site, adapter_for
from liar_ext.ops.cross import CrossMoments, cross
from liar_ext.ops.gram import gram
from liar_ext.ops.moments import Moments
from liar_ext.ops.reduced_rank import recoverable
from liar_ext.report.schema import FILE, read_data

# of the mean square of the inputs; fewer tokens than columns still give finite maps
RIDGE = 1e-3
# sums of this size are accumulated in one pass over the text, further layers in another
GROUP_BYTES = 4 * 1024**3


def kept_layers(folder: Path, dense: dict[str, Any], pruned: dict[str, Any]) -> list[int]:
    """For each layer of a pruned checkpoint, its index in the dense one.

    Args:
        folder: the pruned checkpoint; dense, pruned: `config.json` of both.
    Raises:
        InputError: they have different numbers of layers, and the report does not say which went.
    """
    before, after = count_of(dense), count_of(pruned)
    if before == after:
        return list(range(after))
    report = read_data(folder) if (folder / FILE).exists() else {}
    layers = report.get("layers") or {}
    gone = layers.get("dropped")
    if layers.get("before") != before or layers.get("after") != after or gone is None:
        raise InputError(
            f"--ranks residual: {folder} has {after} layers and --dense {before}, and its {FILE} "
            "does not say which were left out; use --ranks uniform or performance"
        )
    return [layer for layer in range(before) if layer not in set(gone)]


@torch.no_grad()
def gains(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    kept: Sequence[int],
    batches: Sequence[Batch],
    most: Sequence[int],
) -> list[np.ndarray]:
    """What each rank of each layer can bring back, relative to the variance of the stream.

    Args:
        dense, pruned: both in memory, on one device. kept: for each layer of `pruned`, its index in
            `dense`. batches: text. most: the largest rank of interest of each layer.
    Returns:
        of each layer (most + 1,) float64, growing and concave, 0 at rank 0; zeros of one that has
        no attention and no FFN any more.
    Raises:
        InputError: the family's Sites are not known, or hidden states are not finite.
    """
    adapter = adapter_for(pruned.config)
    if not adapter.residual(pruned.config.get_text_config()):
        raise InputError(
            f"--ranks residual: this {adapter.model_type} model {adapter.no_sum}, so that errors "
            "do not add up; use --ranks uniform or performance"
        )
    kinds = tuple(spec.kind for spec in adapter.sites)
    sites = [adapter.sites_of(pruned, index, kinds) for index in range(len(kept))]
    size = max(_bytes(own) for own in sites)
    step = max(GROUP_BYTES // size, 1)
    found = [np.zeros(own + 1) for own in most]
    able = [index for index, own in enumerate(sites) if own]
    for start in range(0, len(able), step):
        group = able[start : start + step]
        sums = {index: _Sums.of(sites[index], pruned) for index in group}
        for batch in batches:
            _add(sums, dense, pruned, kept, sites, batch)
        for index in group:
            found[index] = sums[index].gains(most[index])
    return found


@dataclass
class _Sums:
    """Of one layer: moments of each consumer's inputs with the layer's error, and of the stream."""

    grams: list[Moments]
    crosses: list[CrossMoments]
    count: int
    mean: Tensor
    square: Tensor

    @classmethod
    def of(cls, sites: Sequence[Site], model: PreTrainedModel) -> _Sums:
        device = model.device
        rows = sites[0].weight().shape[0]
        return cls(
            [Moments.zeros(site.columns, device=device) for site in sites],
            [CrossMoments.zeros(rows, site.columns, device=device) for site in sites],
            0,
            torch.zeros(rows, dtype=torch.float64, device=device),
            torch.zeros((), dtype=torch.float64, device=device),
        )

    def add(self, error: Tensor, inputs: Sequence[Tensor], stream: Tensor) -> None:
        for moments, crossed, x in zip(self.grams, self.crosses, inputs, strict=True):
            gram(x, out=moments)
            cross(error, x, out=crossed)
        self.count += len(stream)
        self.mean += stream.double().sum(0)
        self.square += stream.double().square().sum()

    def gains(self, most: int) -> np.ndarray:
        variance = float(self.square - self.mean.square().sum() / max(self.count, 1))
        total = np.zeros(most + 1)
        for moments, crossed in zip(self.grams, self.crosses, strict=True):
            values = recoverable(moments.gram, crossed.cross, RIDGE).cpu().numpy()
            curve = np.concatenate([[0.0], np.cumsum(values)])
            reached = np.minimum(np.arange(most + 1), len(curve) - 1)
            total += curve[reached]
        if not np.isfinite(total).all() or not np.isfinite(variance):
            raise InputError(
                "--ranks residual: hidden states are not finite; check the checkpoints"
            )
        return total / variance if variance > 0 else total


def _bytes(sites: Sequence[Site]) -> int:
    return sum(4 * site.columns * (site.columns + site.weight().shape[0]) for site in sites)


def _add(
    sums: dict[int, _Sums],
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    kept: Sequence[int],
    sites: Sequence[Sequence[Site]],
    batch: Batch,
) -> None:
    wanted = _streams(dense, batch)
    consumers = [site.consumer for index in sums for site in sites[index]]
    with _inputs(consumers) as seen:
        found = _streams(pruned, batch)
    # behind layer j the dense model is where the next kept layer began
    ends = [*kept[1:], len(wanted) - 1]
    starts = [0, *ends[:-1]]
    valid = batch.valid_on(pruned.device)
    for index, own in sums.items():
        made = found[index + 1] - found[index]
        error = wanted[ends[index]] - wanted[starts[index]] - made
        inputs = [_rows(seen[site.consumer], valid) for site in sites[index]]
        own.add(_rows(error, valid), inputs, _rows(wanted[ends[index]], valid))


def _rows(states: Tensor, valid: Tensor | None) -> Tensor:
    flat = states.flatten(0, -2)
    return flat if valid is None else flat[valid]


def _streams(model: PreTrainedModel, batch: Batch) -> list[Tensor]:
    """What enters each layer and what leaves the last, float32, before the final norm."""
    layers = adapter_for(model.config).layer_list(model)[1]
    found: list[Tensor] = []

    def enters(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args[0] if args else kwargs["hidden_states"]).float())

    def leaves(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).float())

    hooks = [layer.register_forward_pre_hook(enters, with_kwargs=True) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(leaves))
    try:
        model.base_model(
            input_ids=batch.input_ids.to(model.device),
            attention_mask=batch.mask_on(model.device),
            use_cache=False,
        )
    finally:
        for hook in hooks:
            hook.remove()
    return found


@contextmanager
def _inputs(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    seen: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen[module] = args[0]

    hooks = [module.register_forward_pre_hook(note) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
