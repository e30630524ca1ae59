"""Continual pre-training of inserted layers alone: the layers that were there are frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from liar_ext.calibration.sources import Corpus
from liar_ext.checkpoint.load import load
from liar_ext.engine.inputs import compute_dtype, load_tokenizer, resolve_device
from liar_ext.engine.progress import Progress
from liar_ext.errors import InputError
from liar_ext.models import text_config
from liar_ext.recovery.language import next_token_loss, windows_of
from liar_ext.recovery.schedule import Schedule
from liar_ext.recovery.session import stored_tensors
from liar_ext.recovery.state import TrainingState
from liar_ext.recovery.train import train


@dataclass(frozen=True)
class LayerTraining:
    """How new layers are trained.

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


@dataclass
class Trained:
    """Attributes:
    tensors: of the new layers, on the CPU in the dtype that they were read in.
    facts: for the report; calibration: what it says of the text.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)


def train_layers(
    folder: Path,
    parameters: Sequence[str],
    corpus: Corpus,
    training: LayerTraining,
    *,
    device: str,
    state: TrainingState,
    progress: Progress,
) -> Trained:
    """Train some parameters of a checkpoint on the next tokens of a text; writes nothing.

    The model is in eval mode, without dropout. On a CPU it is float32, elsewhere what the files
    have; what is trained is float32 until the end.

    Raises:
        InputError: as `windows_of`, `next_token_loss` and `train`.
    """
    place = resolve_device(device)
    model = load(folder, dtype=compute_dtype("auto", place), device=place)
    positions = getattr(text_config(model.config), "max_position_embeddings", None)
    seq_len = min(training.seq_len, positions or training.seq_len)
    schedule = training.schedule
    tokenizer = None if corpus.tokens is not None else load_tokenizer(folder)
    windows, held_out, drawn = windows_of(
        corpus,
        tokenizer,
        model,
        wanted=schedule.steps * schedule.windows,
        held_out=training.held_out,
        seq_len=seq_len,
        seed=schedule.seed,
    )
    found = train(
        model,
        parameters,
        windows,
        next_token_loss(model),
        schedule,
        held_out=held_out,
        state=state,
        progress=progress,
    )
    tensors = stored_tensors(model, folder, parameters)
    facts = {
        **asdict(found),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "windows": len(windows.input_ids),
        "held_out_windows": 0 if held_out is None else len(held_out.input_ids),
        "seq_len": seq_len,
        "schedule": schedule.to_json(),
        "device": str(place),
    }
    return Trained(tensors, facts, drawn.to_json())
