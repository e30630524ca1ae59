"""What a merge of layers works on, from folder to folder: checked before a layer is run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from liar_ext.calibration.batches import Calibration, make_batches
from liar_ext.calibration.sources import read
from liar_ext.checkpoint.reader import CheckpointReader, parameter_count
from liar_ext.depth.config import remapped
from liar_ext.depth.merge import check_alike
from liar_ext.depth.merge_settings import MergeSettings, Schedule
from liar_ext.engine.execution import HELD_SHARE, Execution, choose_place, free_bytes
from liar_ext.engine.inputs import compute_dtype, load_tokenizer, resolve_device
from liar_ext.engine.source import with_trace
from liar_ext.errors import InputError, unknown_choice
from liar_ext.models import adapter_for, check_reads_tokens, layout, text_config
from liar_ext.recipe import KINDS
from liar_ext.report.text import size

WEIGHTS = ("auto", "memory", "disk")


@dataclass(frozen=True)
class Subject:
    """A checkpoint whose layers can be merged, and all that a merge of them needs to know.

    Attributes:
        config: of the result's family: the source's, without a trace.
        reader, model: bound to each other; the model is on `meta`. path, layers: of its layers.
        texts: what models are compared on.
        weights: where the layers are: `memory`, or `disk`, where each is read when it is run.
        hidden_states: where these wait.
        needs: bytes of the layers and what is beside them in memory, of one layer, and of what
            waits.
    """

    folder: Path
    config: dict[str, Any]
    reader: CheckpointReader
    model: PreTrainedModel
    left_over: list[str]
    path: str
    layers: nn.ModuleList
    settings: MergeSettings
    texts: Calibration
    device: torch.device
    dtype: torch.dtype
    weights: str
    hidden_states: str
    needs: dict[str, int]


def opened(
    folder: Path,
    settings: MergeSettings,
    execution: Execution,
    *,
    weights: str = "auto",
    trace: bool = False,
) -> Subject:
    """Check everything that can be checked before a layer is run.

    Raises:
        InputError: see `merge_layers`.
    """
    if weights not in WEIGHTS:
        raise unknown_choice("--weights", weights, WEIGHTS)
    device = resolve_device(settings.device)
    reader = CheckpointReader(folder)
    config = reader.config
    if trace:
        if layout.KEY in config:
            raise InputError(f"{folder}: has shapes of its own; --trace is for dense models")
        reader.config = with_trace(config, KINDS)
    model = layout.empty(reader.config)
    adapter = adapter_for(model.config)
    check_reads_tokens(model.config, "liar merge")
    left_over = reader.bind(model)
    path, layers = adapter.layer_list(model)
    schedule = settings.schedule(len(layers))
    check_alike(path, layers, schedule)
    remapped(config, range(len(layers)))  # refuses what cannot be moved, by name
    texts = load_texts(folder, model, settings)
    dtype = compute_dtype(settings.dtype, device) or reader.main_dtype()
    needs = _needs(model, layers, schedule, texts, dtype)
    free = free_bytes(device)
    if weights == "memory" and needs["weights"] > free:
        raise InputError(
            f"--weights memory: all layers take {size(needs['weights'])}, {size(free)} are free; "
            "use --weights disk, which holds one at a time"
        )
    if weights == "auto":
        weights = "memory" if needs["weights"] <= HELD_SHARE * free else "disk"
    held = needs["hidden_states"] + (needs["weights"] if weights == "memory" else 0)
    place = choose_place(execution.hidden_states, held, device)
    return Subject(
        folder,
        config,
        reader,
        model,
        left_over,
        path,
        layers,
        settings,
        texts,
        device,
        dtype,
        weights,
        place,
        needs,
    )


def load_texts(folder: Path, model: PreTrainedModel, settings: MergeSettings) -> Calibration:
    """The texts that models are compared on, each with its special tokens, padded on the right.

    A text is a line of a `.txt`, a record of other files, or a window of a token file.

    Raises:
        InputError: no or unusable text, or no tokenizer.
    """
    if settings.calibration is None:
        raise InputError("--calibration is missing: give a .txt, .jsonl, .csv or token file")
    corpus = read(settings.calibration)
    text = text_config(model.config)
    tokenizer = None
    if corpus.tokens is None:
        tokenizer = load_tokenizer(folder)
        # positions count from the left; what is padded with does not matter, it is masked
        tokenizer.padding_side = "right"
        if tokenizer.pad_token_id is None:
            known = tokenizer.eos_token or tokenizer.unk_token
            tokenizer.pad_token = known or tokenizer.convert_ids_to_tokens(0)
    return make_batches(
        corpus,
        tokenizer,
        packed=False,
        samples=settings.texts,
        seq_len=min(settings.seq_len, adapter_for(model.config).max_positions(text)),
        batch_size=settings.batch_size,
        seed=settings.seed,
        vocab_size=text.vocab_size,
    )


def _needs(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    schedule: Schedule,
    texts: Calibration,
    dtype: torch.dtype,
) -> dict[str, int]:
    """Bytes of all weights, with merged ones, if they are in memory; of one layer; of what waits:
    states in front of each base, at the end, and on both sides of a layer."""
    layer = max(sum(p.numel() for p in each.parameters()) for each in layers)
    bases = len(schedule.bases)
    # merged layers: those that were accepted, and the one that is tried
    most = -(-bases // schedule.interval)
    most = 1 + (most if schedule.drop is None else min(most, schedule.drop))
    positions = sum(batch.input_ids.numel() for batch in texts.batches)
    state = positions * text_config(model.config).hidden_size
    return {
        "weights": (parameter_count(model) + most * layer) * dtype.itemsize,
        "layer": layer * dtype.itemsize,
        "hidden_states": (bases + 3) * state * dtype.itemsize,
    }
