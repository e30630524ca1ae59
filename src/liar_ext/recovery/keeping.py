"""The states of a training beside the output that it is for: found, refused, and spoken of."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from liar_ext.checkpoint.reader import CheckpointReader
from liar_ext.environment import environment
from liar_ext.errors import InputError, Interrupted, LiarError
from liar_ext.recovery.rank_search import TrialJournal
from liar_ext.recovery.state import TrainingState


def state_folder(out: Path) -> Path:
    """Where the training of the layers of `out` keeps what it can go on from."""
    out = Path(os.path.abspath(out))
    return out.parent / f".{out.name}.train"


def made_of(reader: CheckpointReader, device: torch.device) -> dict[str, Any]:
    """What new weights depend on beside what is asked for, as JSON data."""
    here = environment(device)
    return {
        "config": hashlib.sha256(json.dumps(reader.config).encode()).hexdigest(),
        "files": reader.sizes(),
        "versions": {name: here[name] for name in ("liar_ext", "torch", "transformers")},
        "device": device.type,
    }


def check_unfinished(out: Path, *, overwrite: bool, resume: bool) -> None:
    """Before anything is computed, and before it is known of which training a state would be.

    Raises:
        InputError: one is there, and neither to be gone on from nor to be given up.
    """
    state = TrainingState(state_folder(out), {})
    if (left := state.left()) and not (overwrite or resume):
        raise InputError(
            f"--out {out}: an unfinished training is in {state.folder} ({left}); --resume "
            "goes on with it, --overwrite starts again"
        )


def ready(state: TrainingState, *, resume: bool) -> None:
    """Make sure that a state is what is asked for: of this training, or none.

    Raises:
        InputError: to go on from a state of another training, or from a search for other ranks.
    """
    if resume:
        if state.load() is None and state.trials.exists():
            TrialJournal(state.trials, state.identity)
    elif state.left():
        state.remove()


@contextmanager
def keeping(state: TrainingState) -> Iterator[None]:
    """Says of what goes wrong how much of the training is kept."""
    try:
        yield
    except BaseException as error:
        if not (left := state.left()):
            raise
        kept = f"{left} of training are kept, --resume goes on"
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(
                f"interrupted; {kept}, and deleting {state.folder} gives up"
            ) from error
        if not isinstance(error, LiarError):
            error.add_note(kept)
        elif "--resume" not in str(error):
            error.args = (f"{error}; {kept} from there",)
        raise
