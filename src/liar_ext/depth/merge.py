"""Layers merged into those before them (LaCo), in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from liar_ext.calibration.batch import Batch
from liar_ext.depth.collapse import Outcome, State, collapse, listed
from liar_ext.depth.merge_facts import layer_facts, merge_facts, mixed_types
from liar_ext.depth.merge_settings import MergeSettings, Schedule
from liar_ext.depth.mixture import HeldSource, Mixture
from liar_ext.depth.surgery import surgery
from liar_ext.depth.trials import Trials
from liar_ext.engine.clock import Clock
from liar_ext.engine.progress import Progress, Silent
from liar_ext.engine.runtime import Runtime
from liar_ext.engine.store import InMemory
from liar_ext.errors import InputError
from liar_ext.evaluation.mode import inference
from liar_ext.models import adapter_for, text_config
from liar_ext.report.text import number

Model = TypeVar("Model", bound=PreTrainedModel)


def merge(
    model: Model,
    batches: Sequence[Batch],
    settings: MergeSettings,
    *,
    progress: Progress | None = None,
) -> tuple[Model, dict[str, Any]]:
    """A model with merged layers; the source stays as it is.

    Args:
        model: a supported transformers model, dense or pruned, on any device.
        batches: the texts that models are compared on, padded or not, as `calibration.make_batches`
            gives them.
        settings: what to do; calibration, texts, device and dtype are not used.
    Returns:
        the new model, of the same class, which shares all tensors with the source but those of
        merged layers, and what was done: `layers`, `merge` and `warnings` of a report.
    Raises:
        InputError: settings that do not fit the model, layers of different shapes, or no merge
            that keeps the model similar enough.
    """
    if not batches:
        raise InputError("no texts to compare models on; give at least one batch")
    path, layers = adapter_for(model.config).layer_list(model)
    check_alike(path, layers, settings.schedule(len(layers)))
    with inference(model):
        runtime = Runtime(InMemory(model), model.device, Clock(model.device), progress or Silent())
        trials = Trials(runtime, batches, HeldSource(layers), settings.similarity, keeps=True)
        try:
            outcome = search(trials, settings)
            inserted = {
                place: trials.made(mixture)
                for place, mixture in enumerate(outcome.state)
                if not mixture.plain
            }
        finally:
            trials.free()
    new = surgery(model, [mixture.base for mixture in outcome.state], inserted)
    return new, {
        "layers": layer_facts(len(layers), outcome),
        "merge": merge_facts(settings, len(layers), outcome, trials.evaluations),
        "warnings": type_warnings(model, outcome.state),
    }


def search(trials: Trials, settings: MergeSettings) -> Outcome:
    """Run the original, then the search; tells every trial."""
    progress, count = trials.runtime.progress, len(trials.runtime.layers)
    bases = settings.schedule(count).bases
    trials.begin(bases)
    progress.begin(len(bases), "merging")

    def asked(state: State, first: int) -> float:
        found = trials.similarity(state, first)
        progress.layer(first)
        gone = _between(state, first, count)
        progress.tell(
            f"layer {first} with {listed(gone)}: similarity {number(found, 4)}, {len(state)} layers"
        )
        return found

    return collapse(count, settings, asked)


def _between(state: Sequence[Mixture], at: int, count: int) -> range:
    """Layers of the source that have no place of their own between two that follow each other."""
    above = state[at + 1].base if at + 1 < len(state) else count
    return range(state[at].base + 1, above)


def check_alike(path: str, layers: nn.ModuleList, schedule: Schedule) -> None:
    """Whether layers can be summed; works on `meta`.

    Args:
        schedule: layers below its `lowest` do not matter.
    Raises:
        InputError: it says which tensor of which layer differs.
    """
    first = schedule.lowest
    shapes = {name: value.shape for name, value in layers[first].named_parameters()}
    for index in range(first + 1, len(layers)):
        own = {name: value.shape for name, value in layers[index].named_parameters()}
        for name in sorted(shapes.keys() | own.keys()):
            if shapes.get(name) == own.get(name):
                continue
            here, there = (
                f"has shape {tuple(found[name])}" if name in found else "is missing"
                for found in (own, shapes)
            )
            raise InputError(
                f"{path}.{index}.{name} {here}, in layer {first} it {there}: layers of different "
                "shapes cannot be merged; merge the dense model and prune the result, or raise "
                "--lowest above what differs"
            )


def type_warnings(model: PreTrainedModel, state: State) -> list[str]:
    """A warning for each merge of layers of different attention types."""
    return mixed_types(getattr(text_config(model.config), "layer_types", None), state)
