"""Which layers are replaced."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel

from liar_ext.calibration.batch import Batch
from liar_ext.checkpoint.reader import CheckpointReader
from liar_ext.checkpoint.store import CheckpointStore, Placement
from liar_ext.depth.choice import choose
from liar_ext.depth.methods import METHODS, placed
from liar_ext.depth.replace.settings import DEPTHS, Replacement
from liar_ext.engine.clock import Clock
from liar_ext.engine.execution import choose_place, make_shelf
from liar_ext.engine.inputs import compute_dtype, resolve_device
from liar_ext.engine.progress import Progress
from liar_ext.engine.runtime import Runtime
from liar_ext.errors import InputError, UnsupportedModelError
from liar_ext.models import adapter_for, text_config
from liar_ext.recipe import Recipe


@dataclass(frozen=True)
class Window:
    """Layers of a model, of which the first few stay in place, to be trained.

    Attributes:
        layers: of the model; span: those that are replaced, by their indices; count: how many stand
            in for them.
        measured: what it was chosen by, of each window by its first layer.
    """

    layers: int
    span: range
    count: int
    measured: dict[str, list[float]] = field(default_factory=dict)

    @property
    def trained(self) -> range:
        """The layers that stand in, by their places in the result and in the source."""
        return self.span[: self.count]

    @property
    def kept(self) -> tuple[int, ...]:
        """For each layer of the result, the layer of the source that it is or begins as."""
        gone = self.span[self.count :]
        return tuple(layer for layer in range(self.layers) if layer not in gone)

    def to_json(self) -> dict[str, Any]:
        return {
            "before": self.layers,
            "after": len(self.kept),
            "replaced": list(self.span),
            "trained": list(self.trained),
            "measured": self.measured,
        }


def check_length(asked: Replacement, layers: int) -> int:
    """How long the window is in a model of so many layers.

    Raises:
        InputError: it does not fit, or is no longer than what stands in for it.
    """
    count = asked.stand_ins
    stand = f"{count} layer{'s' * (count > 1)}"
    if asked.window is None:
        assert asked.drop is not None, "see Replacement"
        if asked.drop + count > layers:
            most = layers - count
            raise InputError(
                f"--drop {asked.drop}: {stand} stand{'s' * (count == 1)} in for "
                f"{asked.drop + count}, and the model has {layers}; "
                + (f"at most {most} can go" if most > 0 else "none can go")
            )
        return asked.drop + count
    first, last = asked.window
    if last >= layers:
        raise InputError(
            f"--window {first}-{last}: the model has {layers} layers, 0 to {layers - 1}"
        )
    length = last - first + 1
    if length <= count:
        raise InputError(
            f"--window {first}-{last}: {stand} in the place of {length} saves nothing; give a "
            "longer window"
        )
    return length


def choose_window(
    asked: Replacement,
    reader: CheckpointReader,
    model: PreTrainedModel,
    layers: int,
    windows: Batch,
    beside: Path,
    progress: Progress,
) -> Window:
    """The window that is asked for.

    Args:
        reader, model: of the source, bound to each other, on `meta`; layers: of it.
        windows: of the training; the choice looks at the first ones.
        beside: the output, or what will be it: hidden states wait there if memory has no room.
    Raises:
        InputError: as `check_length`; the method needs hidden states, and the family has no
            adapter that says how to run it layer by layer.
    """
    length = check_length(asked, layers)
    count = asked.stand_ins
    if asked.window is not None:
        return Window(layers, range(asked.window[0], asked.window[1] + 1), count)
    if length == layers:
        return Window(layers, range(layers), count)
    if METHODS[asked.depth].measure is None:
        dropped = placed(asked.depth, layers, length, 0)
        return Window(layers, range(dropped[0], dropped[-1] + 1), count)
    try:
        adapter_for(model.config)
    except UnsupportedModelError as error:
        blind = [name for name in DEPTHS if METHODS[name].measure is None]
        raise UnsupportedModelError(
            f"--depth {asked.depth}: {error}; give --window A-B, or --depth {', '.join(blind)}"
        ) from error
    size = asked.training.schedule.batch_size
    ids, mask = (t[: asked.samples] for t in (windows.input_ids, windows.attention_mask))
    batches = [Batch(*pair) for pair in zip(ids.split(size), mask.split(size), strict=True)]
    return _chosen(asked, reader, model, length, batches, beside, progress)


def _chosen(
    asked: Replacement,
    reader: CheckpointReader,
    model: PreTrainedModel,
    length: int,
    batches: Sequence[Batch],
    beside: Path,
    progress: Progress,
) -> Window:
    """By the hidden states of the whole model, a layer in memory at a time."""
    device = resolve_device(asked.device)
    dtype = compute_dtype("auto", device) or reader.main_dtype()
    positions = sum(batch.input_ids.numel() for batch in batches)
    width = int(text_config(model.config).hidden_size)
    place = choose_place("auto", (length + 1) * positions * width * dtype.itemsize, device)
    recipe = Recipe(sparsity=0, depth=asked.depth, drop=length, span_repair="none")
    with ExitStack() as opened:
        scratch = Path(opened.enter_context(_scratch(beside if place == "disk" else None)))
        store = CheckpointStore(model, reader, Placement(scratch, device, dtype, "auto"))
        shelf = make_shelf(place, scratch, device)
        runtime = Runtime(opened.enter_context(store), device, Clock(device), progress, shelf=shelf)
        found = choose(recipe, runtime, batches)
    span = range(found.dropped[0], found.dropped[-1] + 1)
    return Window(found.layers, span, asked.stand_ins, found.measured)


def _scratch(beside: Path | None) -> TemporaryDirectory[str]:
    """A folder for what waits on disk; of other places, one that nothing is put into."""
    if beside is None:
        return TemporaryDirectory()
    parent = next(p for p in Path(os.path.abspath(beside)).parents if p.exists())
    try:
        return TemporaryDirectory(prefix=".liar-ext-replace-", dir=parent)
    except OSError as error:
        raise InputError(f"{parent}: hidden states cannot wait there ({error.strerror})") from error
