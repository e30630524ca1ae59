"""What an interrupted training goes on from: safetensors and JSON, no pickles."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from liar_ext.checkpoint.journal import check_identity, sync_path, sync_tree
from liar_ext.errors import InputError
from liar_ext.recovery.rank_search import trials_in

VERSION = 1
PREFIX = "step-"
TENSORS, NUMBERS = "state.safetensors", "state.json"
TRIALS = "trials.jsonl"


@dataclass(frozen=True)
class TrainingState:
    """States of one training in a folder of their own; the last one counts.

    Attributes:
        folder: made when the first state is saved.
        identity: all that the result depends on, as JSON data; one with another must not go on
            from here.
    """

    folder: Path
    identity: Mapping[str, Any]

    def save(self, step: int, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Keep the state after `step` updates, and forget those before.

        A state has its name once all of it is on the disk.
        """
        name = f"{PREFIX}{step:09d}"
        temporary = self.folder / f".{name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(
            {n: t.detach().cpu().contiguous() for n, t in tensors.items()}, temporary / TENSORS
        )
        data = {"version": VERSION, "step": step, "identity": self.identity, **numbers}
        (temporary / NUMBERS).write_text(json.dumps(data, allow_nan=False), encoding="utf-8")
        sync_tree(temporary)
        before = self._states()
        # the same step again, from a run that went on from an earlier one
        shutil.rmtree(self.folder / name, ignore_errors=True)
        os.rename(temporary, self.folder / name)
        sync_path(self.folder)
        for old in before:
            if old.name != name:
                shutil.rmtree(old, ignore_errors=True)

    def load(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """The last state: updates, tensors on the CPU, numbers; None if there is none.

        Raises:
            InputError: it cannot be read, or is of a training of another identity.
        """
        states = self._states()
        if not states:
            return None
        last = states[-1]
        advice = "start again with --overwrite instead of --resume"
        try:
            numbers = json.loads((last / NUMBERS).read_text(encoding="utf-8"))
            if numbers.get("version") != VERSION:
                raise InputError(f"{last}: written by another release; {advice}")
            check_identity(numbers["identity"], dict(self.identity), last / NUMBERS)
            return numbers["step"], load_file(last / TENSORS), numbers
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise InputError(f"{last}: cannot be read ({error}); {advice}") from error

    def steps(self) -> int:
        """Updates of the last state; 0 if there is none."""
        states = self._states()
        return int(states[-1].name.removeprefix(PREFIX)) if states else 0

    def left(self) -> str:
        """What an earlier run has left here, in words; empty if there is nothing."""
        if steps := self.steps():
            return f"{steps} steps"
        if self.trials.exists():
            return f"{trials_in(self.trials)} trials"
        return ""

    @property
    def trials(self) -> Path:
        """Where a search for ranks keeps what it has tried."""
        return self.folder / TRIALS

    def remove(self) -> None:
        """Forget all states."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _states(self) -> list[Path]:
        return sorted(self.folder.glob(f"{PREFIX}*"))
