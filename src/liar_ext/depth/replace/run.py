"""`liar replace`: a checkpoint with a window of layers replaced by fewer, all of it or nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from liar_ext.calibration.sources import read
from liar_ext.checkpoint.load import resolve
from liar_ext.checkpoint.reader import CheckpointReader, left_over_warnings, parameter_count
from liar_ext.checkpoint.shards import TensorSpec
from liar_ext.checkpoint.writer import check_output, copy_other_files, output_folder, write_json
from liar_ext.depth.config import remapped
from liar_ext.depth.replace.network import NETWORKS, check_network, networked, random_weights
from liar_ext.depth.replace.report import card
from liar_ext.depth.replace.settings import Replacement
from liar_ext.depth.replace.training import train_on_states, train_on_tokens
from liar_ext.depth.replace.window import Window, check_length, choose_window
from liar_ext.depth.report import layer_report
from liar_ext.depth.shorten import copy_tensors, shortened_checkpoint, specs_of
from liar_ext.depth.surgery import layer_list
from liar_ext.engine.inputs import resolve_device
from liar_ext.engine.progress import Progress, Silent
from liar_ext.errors import InputError, UnsupportedModelError
from liar_ext.models import adapter_for, known_adapter, layout, text_config
from liar_ext.recovery.keeping import check_unfinished, keeping, made_of, ready, state_folder
from liar_ext.recovery.language import next_token_loss
from liar_ext.recovery.state import TrainingState
from liar_ext.recovery.text import draw, write_again
from liar_ext.report.schema import FILE


def replace_layers(
    source: str | Path,
    out: str | Path,
    asked: Replacement,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the checkpoint of a model with a window replaced; the source is only read.

    All other layers go from file to file, as they are. What stands in are ordinary layers of the
    model, so that the result is as stock as the source: `from_pretrained` loads it.

    Args:
        source: folder or hub id, dense or pruned; out: folder to make.
        overwrite: replace `out` if it exists, once the new one is complete.
        resume: go on with the training that an interrupted run has left beside `out`.
    Returns:
        what `out/liar_report.json` says.
    Raises:
        InputError: a window that does not fit, a text that cannot be used, a model whose layers
            depend on their place, or anything else; `out` is then as it was.
        Interrupted: by Ctrl-C, after a state of the training was saved.
    Source:
        LLM-Streamline (Chen et al., 2024, arXiv 2403.19135).
    """
    started = time.perf_counter()
    progress = progress or Silent()
    folder, out = resolve(source), Path(out)
    check_output(out, folder, overwrite=overwrite)
    check_unfinished(out, overwrite=overwrite, resume=resume)
    device = resolve_device(asked.device)
    reader = CheckpointReader(folder)
    dense = layout.empty(reader.config)
    path, layers = layer_list(dense)
    check_length(asked, len(layers))
    _check_trainable(dense, asked.loss)
    check_network(asked.network, dense)
    remapped(reader.config, range(len(layers)))  # refuses what cannot be moved, by name
    left_over = reader.bind(dense)
    before = parameter_count(dense), reader.bytes()
    corpus = read(asked.training.text)
    looked_at = asked.samples if asked.window is None else 0
    drawn = draw(folder, dense, asked.training, corpus, least=looked_at)
    began = time.perf_counter()
    window = choose_window(asked, reader, dense, len(layers), drawn.windows, out, progress)
    chosen = time.perf_counter()
    short_reader, short = shortened_checkpoint(reader, dense, window.kept)
    if not NETWORKS[asked.network].attention:
        short_reader.config = networked(short_reader.config, short, window.trained)
        short = layout.empty(short_reader.config)
    config = short_reader.config
    state = TrainingState(
        state_folder(out),
        {
            "source": made_of(reader, device),
            "replacement": {**asked.to_json(), "window": [window.span[0], window.span[-1]]},
            **asked.training.identity(corpus),
        },
    )
    ready(state, resume=resume)
    with keeping(state), output_folder(out, folder, overwrite=overwrite) as made:
        specs = specs_of(short_reader, short)
        copy_tensors(made, short_reader, specs)
        write_json(made / "config.json", config)
        copy_other_files(folder, made)
        first = _first_weights(asked, short, path, window, specs)
        if first:
            write_again(made, specs, first)
        ends: dict[str, Any] = {"state": state, "progress": progress}
        if asked.loss == "mse":
            trained = train_on_states(
                reader, dense, window, path, drawn, asked, first=first, **ends
            )
        else:
            trained = train_on_tokens(made, window, path, drawn, asked, **ends)
        write_again(made, specs, trained.tensors)
        ended = time.perf_counter()
        report = layer_report(
            source,
            layers=window.to_json(),
            replacement=asked.to_json(),
            training=trained.facts,
            before=before,
            model=short,
            bytes_after=sum(spec.bytes for spec in specs),
            # the text that these weights have seen last
            calibration=trained.calibration,
            warnings=left_over_warnings(left_over, dense),
            seconds=ended - started,
            seconds_by={"choose": chosen - began, "train": trained.facts["seconds"]},
            config=config,
            device=device,
        )
        write_json(made / FILE, report)
        (made / "README.md").write_text(card(report), encoding="utf-8")
    state.remove()
    return report


def _first_weights(
    asked: Replacement,
    model: PreTrainedModel,
    path: str,
    window: Window,
    specs: Sequence[TensorSpec],
) -> dict[str, Tensor]:
    """What stands in begins with these instead of what it inherits, in the dtype of the files."""
    if asked.init == "inherit":
        return {}
    deviation = float(getattr(text_config(model.config), "initializer_range", 0.02))
    adapter = known_adapter(text_config(model.config))
    neutral = 1.0 if adapter is None else adapter.neutral_norm
    dtypes = {spec.name: spec.dtype for spec in specs}
    found = {}
    for place in window.trained:
        layer = model.get_submodule(f"{path}.{place}")
        seed = asked.training.schedule.seed + place
        weights = random_weights(layer, deviation, seed, neutral)
        for name, value in weights.items():
            full = f"{path}.{place}.{name}"
            found[full] = value.to(dtypes[full])
    return found


def _check_trainable(model: PreTrainedModel, loss: str) -> None:
    """Whether windows of a text are what the model reads, and whether it has this loss.

    Raises:
        InputError: an encoder; with `lm`, a model without a head that predicts.
    """
    if loss == "lm":
        next_token_loss(model)
        return
    try:
        decoder = adapter_for(model.config).decoder
    except UnsupportedModelError:
        decoder = model.can_generate()
    if not decoder:
        raise InputError(
            f"{type(model).__name__} is no decoder; only layers of decoders can be replaced"
        )
