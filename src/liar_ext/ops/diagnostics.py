"""How a system was solved: the record that every solve returns and the report keeps."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import torch
from torch import Tensor

# eight lines of the ladder of about 100 characters each, and the rest
RECORD_BYTES = 4096


@dataclass(frozen=True)
class Diagnostics:
    """How one system was solved.

    Attributes:
        ridge: relative ridge asked for; `ridge_used`: the one that held.
        strength: absolute λ that was added to the diagonal.
        condition: 2-norm condition of the Jacobi-scaled, ridged matrix, by power iteration.
        backward_error: `‖AZ−B‖ / (‖A‖‖Z‖+‖B‖)`, on random combinations of the columns where there
            are many of them.
        dead: kept columns without variance, excluded with `Q = 0`.
        precision: of the factorisation that was used.
        steps: one line for each thing that had to be raised or repeated; empty when none.
        pivot: smallest pivot of that factorisation (the scaled matrix has a unit diagonal).
        iterations: of an iterative method, else None.
    """

    ridge: float
    ridge_used: float
    strength: float
    condition: float
    backward_error: float
    dead: int
    precision: str
    steps: tuple[str, ...] = ()
    pivot: float = 1.0
    iterations: int | None = None

    def encode(self) -> Tensor:
        """As a CPU uint8 tensor of fixed length: what a torch operator can return."""
        text = json.dumps(dataclasses.asdict(self)).encode()
        if len(text) > RECORD_BYTES:
            raise RuntimeError(f"diagnostics of {len(text)} bytes, the record holds {RECORD_BYTES}")
        return torch.tensor(list(text.ljust(RECORD_BYTES)), dtype=torch.uint8)

    @classmethod
    def decode(cls, record: Tensor) -> Diagnostics:
        """What `encode` made."""
        data = json.loads(bytes(record.tolist()))
        return cls(**{**data, "steps": tuple(data["steps"])})
