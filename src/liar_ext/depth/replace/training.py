"""What stands in for a window is trained: on the whole model's hidden states, or on next tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from liar_ext.calibration.batch import Batch
from liar_ext.checkpoint.load import load
from liar_ext.checkpoint.reader import CheckpointReader
from liar_ext.depth.replace.loss import state_error
from liar_ext.depth.replace.network import NETWORKS, remove_attention
from liar_ext.depth.replace.settings import Replacement
from liar_ext.depth.replace.teacher import Teacher, read_teacher
from liar_ext.depth.replace.window import Window
from liar_ext.engine.calls import layer_output
from liar_ext.engine.inputs import compute_dtype, resolve_device
from liar_ext.engine.progress import Progress
from liar_ext.models import adapter_for
from liar_ext.recovery.language import next_token_loss
from liar_ext.recovery.state import TrainingState
from liar_ext.recovery.text import Drawn, Trained, train_on_text
from liar_ext.recovery.train import Loss


def window_loss(
    teacher: Teacher, stand_ins: nn.ModuleList, *, normalised: bool = False
) -> Callable[[Batch], Loss]:
    """The error of what stands in for a window: `state_error` of its output to the teacher's.

    Nothing below or above it is differentiated, and nothing above is run.
    """

    def loss(batch: Batch) -> Loss:
        passage = teacher(batch)
        states = passage.entering
        for layer, call in zip(stand_ins, passage.calls, strict=True):
            states = layer_output(layer, states, call)
        valid = batch.valid_on(states.device)
        return state_error(states, passage.leaving, valid, normalised=normalised)

    return loss


def trainable(layer: nn.Module) -> list[str]:
    """The parameters of a layer that have elements: the norm of absent attention has none."""
    return [name for name, parameter in layer.named_parameters() if parameter.numel()]


def train_on_states(
    reader: CheckpointReader,
    dense: PreTrainedModel,
    window: Window,
    path: str,
    drawn: Drawn,
    asked: Replacement,
    *,
    first: Mapping[str, Tensor],
    state: TrainingState,
    progress: Progress,
) -> Trained:
    """Train copies of the window's first layers to make of what enters it what leaves it.

    Args:
        reader, dense: of the source, on `meta`; path: of its list of layers.
        first: weights to begin with instead of the layers', by their names in the result.
    Returns:
        with, in its facts, `nothing`: the loss on held-out windows if nothing stood in.
    """
    device = resolve_device(asked.device)
    dtype = compute_dtype("auto", device) or reader.main_dtype()
    model = read_teacher(reader, dense, window.span, dtype=dtype, device=device)
    teacher = Teacher(model, window.span, window.count)
    stand_ins = nn.ModuleList([copy.deepcopy(teacher.layers[at]) for at in window.trained])
    if not NETWORKS[asked.network].attention:
        for layer in stand_ins:
            remove_attention(layer, adapter_for(dense.config))
    names = {
        f"{at}.{name}": f"{path}.{window.trained[at]}.{name}"
        for at, layer in enumerate(stand_ins)
        for name in trainable(layer)
    }
    own = dict(stand_ins.named_parameters())
    for name, place in names.items():
        if place in first:
            own[name].data.copy_(first[place])
    normalised = asked.loss_tokens == "normalised"
    schedule = asked.training.schedule
    trained = train_on_text(
        stand_ins,
        names,
        reader,
        drawn,
        window_loss(teacher, stand_ins, normalised=normalised),
        schedule,
        state=state,
        progress=progress,
        best=asked.keep == "best",
    )
    if drawn.held_out is not None:
        trained.facts["nothing"] = _nothing(
            teacher, drawn.held_out, schedule.batch_size, normalised
        )
    return trained


@torch.no_grad()
def _nothing(teacher: Teacher, held_out: Batch, size: int, normalised: bool) -> float:
    """The loss of what enters the window in the place of what leaves it: the window left out."""
    total = count = 0.0
    ids, mask = held_out.input_ids, held_out.attention_mask
    for rows in torch.arange(len(ids)).split(size):
        batch = Batch(ids[rows], mask[rows])
        passage = teacher(batch)
        valid = batch.valid_on(passage.entering.device)
        found = state_error(passage.entering, passage.leaving, valid, normalised=normalised)
        total, count = total + float(found.total), count + found.count
    return total / max(count, 1)


def train_on_tokens(
    folder: Path,
    window: Window,
    path: str,
    drawn: Drawn,
    asked: Replacement,
    *,
    state: TrainingState,
    progress: Progress,
) -> Trained:
    """Train what stands in on the next token, through the shortened model in `folder`.

    All other layers are frozen; those below the window keep no activations.
    """
    device = resolve_device(asked.device)
    model = load(folder, dtype=compute_dtype("auto", device), device=device)
    stored = CheckpointReader(folder)
    stored.bind(model)
    names = [
        f"{path}.{at}.{name}"
        for at in window.trained
        for name in trainable(model.get_submodule(f"{path}.{at}"))
    ]
    return train_on_text(
        model,
        {name: name for name in names},
        stored,
        drawn,
        next_token_loss(model),
        asked.training.schedule,
        state=state,
        progress=progress,
        best=asked.keep == "best",
    )
