"""A small training for tests, and, as a script, one rank of it under torchrun.

`liar_training.py FOLDER`: rank r leaves the parameters that it ends with in FOLDER/r.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from liar_depth import build
from liar_families import probe_tokens

from liar_ext.calibration import Batch
from liar_ext.recovery import Schedule, Training, TrainingState, next_token_loss, train

TRAINED = ("model.layers.3.", "model.layers.5.")


def windows(count: int = 12, length: int = 16) -> Batch:
    ids = probe_tokens(batch=count, length=length)
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool))


def chosen(model: torch.nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if name.startswith(TRAINED)]


def schedule(**fields: int | float) -> Schedule:
    given = {"steps": 6, "learning_rate": 1e-2, "batch_size": 2, "accumulation": 2, "warmup": 2}
    return Schedule(**{**given, **fields})  # type: ignore[arg-type]


def trained(
    name: str = "llama",
    state: TrainingState | None = None,
    **fields: int | float,
) -> tuple[torch.nn.Module, Training]:
    model = build(name)
    told = train(
        model,
        chosen(model),
        windows(),
        next_token_loss(model),
        schedule(**fields),
        held_out=windows(3, 16),
        state=state,
    )
    return model, told


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    state = TrainingState(folder / "state", {"seed": 0})
    model, told = trained(state=state, accumulation=3, save_every=2)
    found = {"model": model.state_dict(), "log": told.log, "tokens": told.tokens}
    torch.save(found, folder / f"{rank}.pt")
