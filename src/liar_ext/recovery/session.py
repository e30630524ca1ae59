"""What a training that makes a checkpoint does before and after: what an earlier one has left, what
is kept when something goes wrong, and the trained tensors in the dtype of the files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from liar_ext.checkpoint.reader import CheckpointReader
from liar_ext.checkpoint.shards import ShardWriter, TensorSpec
from liar_ext.errors import InputError, Interrupted, LiarError
from liar_ext.recovery.state import TrainingState


def state_folder(out: Path) -> Path:
    """Where the training of `out` keeps what it can go on from."""
    out = Path(os.path.abspath(out))
    return out.parent / f".{out.name}.train"


def check_state(
    state: TrainingState, out: Path, trains: bool, *, overwrite: bool, resume: bool
) -> None:
    """What to do with an unfinished training that is there, or is not.

    Args:
        trains: whether this run trains at all.
    Raises:
        InputError: there is one, and neither option says what to do with it; or nothing to resume.
    """
    if resume and not trains:
        raise InputError("--resume goes on with a training; give --train FILE as before")
    if resume:
        # before anything is made again
        state.load()
        return
    left = state.left()
    if left and not overwrite:
        raise InputError(
            f"--out {out}: an unfinished training is in {state.folder} ({left}); --resume "
            "goes on with it, --overwrite starts again"
        )
    if left:
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


def stored_tensors(
    model: PreTrainedModel, folder: Path, parameters: Sequence[str]
) -> dict[str, Tensor]:
    """Trained parameters by name, on the CPU in the dtype that they have in the files.

    Raises:
        InputError: one does not fit that dtype.
    """
    known = dict(model.named_parameters())
    stored = CheckpointReader(folder)
    stored.bind(model)
    return {name: fitting(name, known[name].detach(), stored.dtype(name)) for name in parameters}


def fitting(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A trained tensor on the CPU in a dtype of a file.

    Raises:
        InputError: it has values that the dtype does not hold.
    """
    found = value.to("cpu", dtype)
    if not bool(torch.isfinite(found).all()):
        raise InputError(
            f"{name}: trained weights do not fit {dtype}; lower --lr, or convert "
            "the checkpoint to bfloat16 or float32 first"
        )
    return found


def write_again(made: Path, specs: Sequence[TensorSpec], tensors: Mapping[str, Tensor]) -> None:
    """The trained tensors to their places; the files have all others already."""
    writer = ShardWriter(made, specs, create=False)
    try:
        writer.mark_written(spec.name for spec in specs)
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish()
    finally:
        writer.close()
