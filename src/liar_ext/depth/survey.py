"""What is measured of the layers of a checkpoint, without leaving any out: `liar layers`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from liar_ext.calibration.batch import Batch
from liar_ext.calibration.batches import NO_CALIBRATION
from liar_ext.checkpoint.load import resolve
from liar_ext.checkpoint.store import CheckpointStore, Placement
from liar_ext.depth.choice import measure
from liar_ext.depth.methods import MEASURES
from liar_ext.depth.states import turns
from liar_ext.engine.clock import Clock
from liar_ext.engine.execution import Execution, choose_place, make_shelf
from liar_ext.engine.inputs import compute_dtype, load_calibration, resolve_device
from liar_ext.engine.progress import Progress, Silent
from liar_ext.engine.runtime import Runtime
from liar_ext.engine.source import dense_checkpoint
from liar_ext.environment import environment
from liar_ext.errors import InputError, unknown_choice
from liar_ext.models import adapter_for, text_config
from liar_ext.recipe import Recipe


def layer_survey(
    source: str | Path,
    recipe: Recipe,
    measures: Sequence[str] = ("influence", "angle"),
    spans: Sequence[int] = (1,),
    *,
    execution: Execution | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures of every layer, and of spans of them where they are defined for spans.

    All that goes by hidden states, of all spans, is one pass.

    Args:
        source: folder or hub id, dense; recipe: its calibration, device and dtype are used.
        measures: names in `MEASURES`; spans: lengths, for those that have spans.
    Returns:
        JSON data: `measured`, by name, by length of the span (`"1"` for a layer) a list by first
        layer; `calibration`, `seconds`, `environment`.
    Raises:
        InputError: an unknown measure, a span that does not fit, or a measure that the model or
            the calibration does not have.
    """
    started = time.perf_counter()
    execution = execution or Execution()
    unknown = [name for name in measures if name not in MEASURES]
    if unknown or not measures:
        raise unknown_choice("--measures", ",".join(unknown) or "(empty)", MEASURES)
    folder = resolve(source)
    device = resolve_device(recipe.device)
    reader, model, _ = dense_checkpoint(folder)
    layers = len(adapter_for(model.config).layer_list(model)[1])
    for span in spans:
        if not 1 <= span <= layers:
            raise InputError(f"--spans {span}: the model has {layers} layers")
    tokens = any(MEASURES[name].needs not in ("nothing", "weights") for name in measures)
    calibration = load_calibration(folder, model, recipe) if tokens else NO_CALIBRATION
    dtype = compute_dtype(recipe.dtype, device) or reader.main_dtype()
    positions = sum(batch.input_ids.numel() for batch in calibration.batches)
    waiting = max(_waiting(name, layers, max(spans)) for name in measures) * positions
    held = waiting * int(text_config(model.config).hidden_size) * dtype.itemsize
    place = choose_place(execution.hidden_states, held, device)
    with ExitStack() as opened:
        scratch = Path(opened.enter_context(TemporaryDirectory(dir=execution.scratch)))
        clock = Clock(device)
        store = CheckpointStore(model, reader, Placement(scratch, device, dtype, recipe.dtype))
        runtime = Runtime(
            opened.enter_context(store),
            device,
            clock,
            progress or Silent(),
            shelf=make_shelf(place, scratch, device),
        )
        found = _measured(runtime, recipe, calibration.batches, measures, spans)
    return {
        "source": str(source),
        "layers": layers,
        "measured": found,
        "calibration": calibration.to_json(),
        "seconds": {**clock.seconds, "total": time.perf_counter() - started},
        "environment": environment(device),
    }


def _measured(
    runtime: Runtime,
    recipe: Recipe,
    batches: Sequence[Batch],
    measures: Sequence[str],
    spans: Sequence[int],
) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {}
    by_states = [name for name in measures if MEASURES[name].needs == "states"]
    if by_states:
        turned = turns(runtime, batches, spans)
        for name in by_states:
            found[name] = {str(s): [getattr(t, name) for t in turned[s]] for s in spans}
    for name in measures:
        if name not in by_states:
            found[name] = {"1": measure(name, runtime, recipe, batches)}
    return {name: found[name] for name in measures}


def _waiting(name: str, layers: int, span: int) -> int:
    """Hidden states of a token that wait on the shelf at most."""
    needs = MEASURES[name].needs
    if needs == "states":
        return span + 1
    return layers + 1 if needs in ("gradients", "losses") else 0
