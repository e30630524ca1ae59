"""Parameters of a checkpoint trained on a text: how, on which windows, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from liar_ext.calibration.batch import Batch
from liar_ext.calibration.batches import Calibration
from liar_ext.calibration.sources import Corpus
from liar_ext.checkpoint.reader import CheckpointReader
from liar_ext.checkpoint.shards import ShardWriter, TensorSpec
from liar_ext.engine.inputs import load_tokenizer
from liar_ext.engine.progress import Progress
from liar_ext.errors import InputError
from liar_ext.models import text_config
from liar_ext.recovery.language import windows_of
from liar_ext.recovery.schedule import Schedule
from liar_ext.recovery.state import TrainingState
from liar_ext.recovery.train import Loss, train


@dataclass(frozen=True)
class TextTraining:
    """How parameters are trained on a text.

    Attributes:
        text: as `--calibration` takes it; schedule: how long and how fast.
        seq_len: tokens in a window, at most what the model takes.
        held_out: windows that are kept apart to measure on, a tenth of the text at most.
    """

    text: str
    schedule: Schedule
    seq_len: int = 2048
    held_out: int = 32

    def __post_init__(self) -> None:
        for name, least in (("seq_len", 2), ("held_out", 0)):
            if getattr(self, name) < least:
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"{option} {getattr(self, name)}: must be at least {least}")

    def identity(self, corpus: Corpus) -> dict[str, Any]:
        return {
            "sha256": corpus.sha256,
            "seq_len": self.seq_len,
            "held_out": self.held_out,
            "schedule": {**self.schedule.to_json(), "save_every": None},
        }


@dataclass(frozen=True)
class Drawn:
    """The windows of a training.

    Attributes:
        windows: (n, t) to train on; held_out: (m, t), to measure on, or None.
        calibration: what a report says of both; left_out: records that make no window.
    """

    windows: Batch
    held_out: Batch | None
    calibration: Calibration
    left_out: int = 0


def window_length(model: PreTrainedModel, seq_len: int) -> int:
    """Tokens of a window: what is asked for, or what the model takes where that is less."""
    positions = getattr(text_config(model.config), "max_position_embeddings", None)
    return min(seq_len, positions or seq_len)


def draw(
    folder: Path, model: PreTrainedModel, training: TextTraining, corpus: Corpus, least: int = 0
) -> Drawn:
    """The windows for a model, which may be on `meta`.

    Args:
        folder: with its tokenizer; least: windows that something else than the training looks at.
    Raises:
        InputError: as `windows_of`, or no tokenizer.
    """
    schedule = training.schedule
    found = windows_of(
        corpus,
        None if corpus.tokens is not None else load_tokenizer(folder),
        model,
        wanted=max(schedule.steps * schedule.windows, least),
        held_out=training.held_out,
        seq_len=window_length(model, training.seq_len),
        seed=schedule.seed,
    )
    return Drawn(*found)


@dataclass
class Trained:
    """Attributes:
    tensors: by their names in the checkpoint, on the CPU in the dtype that they have there.
    facts: for the report; calibration: what it says of the text.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)


def train_on_text(
    model: nn.Module,
    parameters: Mapping[str, str],
    stored: CheckpointReader,
    drawn: Drawn,
    loss: Callable[[Batch], Loss],
    schedule: Schedule,
    *,
    state: TrainingState,
    progress: Progress,
    best: bool = False,
) -> Trained:
    """Train some parameters on these windows; writes nothing but states.

    Args:
        model: on its device, in the mode to train in.
        parameters: name in the model -> name in the checkpoint that `stored` reads.
        best: see `train`.
    Raises:
        InputError: as `train`, or what was trained does not fit the checkpoint's dtype.
    """
    found = train(
        model,
        list(parameters),
        drawn.windows,
        loss,
        schedule,
        held_out=drawn.held_out,
        state=state,
        progress=progress,
        best=best,
    )
    known = dict(model.named_parameters(remove_duplicate=False))
    tensors = {
        name: fitting(name, known[own].detach(), stored.dtype(name))
        for own, name in parameters.items()
    }
    held_out = drawn.held_out
    facts = {
        **asdict(found),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "windows": len(drawn.windows.input_ids),
        "held_out_windows": 0 if held_out is None else len(held_out.input_ids),
        "seq_len": drawn.calibration.seq_len,
        "schedule": schedule.to_json(),
        "device": str(next(iter(known.values())).device),
    }
    return Trained(tensors, facts, drawn.calibration.to_json())


def fitting(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A trained tensor on the CPU in a dtype of a file.

    Raises:
        InputError: it has values that the dtype does not hold.
    """
    found = value.to("cpu", dtype)
    if not bool(torch.isfinite(found).all()):
        raise InputError(
            f"{name}: trained weights do not fit {dtype}; lower --lr, or convert the checkpoint to "
            "bfloat16 or float32 first"
        )
    return found


def write_again(made: Path, specs: Sequence[TensorSpec], tensors: Mapping[str, Tensor]) -> None:
    """Tensors to their places in files that are complete without them."""
    writer = ShardWriter(made, specs, create=False)
    try:
        writer.mark_written(spec.name for spec in specs)
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish()
    finally:
        writer.close()
