"""What is trained of a checkpoint, on what, and how: all that `liar recover` is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from liar_ext.errors import InputError, unknown_choice
from liar_ext.recovery.rank_search import RankSearch
from liar_ext.recovery.schedule import Schedule

METHODS = ("partial", "lora")
RANKS = ("uniform", "residual", "performance")
# learning rates of the published recipes: 2411.15558 for 8B, LLM-Pruner's for LoRA at 7B
RATES = {"partial": 1e-5, "lora": 1e-4}


@dataclass(frozen=True)
class Recovery:
    """Attributes:

    text: as `--calibration` takes it, or a `.jsonl` of instructions; schedule: how long and fast.
    method: `partial` or `lora`; seq_len, held_out: tokens in a window, and windows that are kept
        apart, a tenth at most.
    last, head, untie, cache_states: of `partial`: layers that are trained; the head as well, and
        with weights of its own where it is tied; states in front of them on disk.
    ranks, rank: of `lora`: how ranks are chosen, and the uniform one, whose parameters are the
        budget of the others. keep_adapter: the adapter beside the merged weights.
    dense: folder of the model before pruning, for ranks by residuals.
    search: for ranks by performance.
    device: auto, cpu or cuda.
    Raises:
        InputError: a value that means nothing, or an option of another method.
    """

    text: str
    schedule: Schedule
    method: str = "partial"
    seq_len: int = 2048
    held_out: int = 32
    last: int = 3
    head: bool = True
    untie: bool = False
    cache_states: bool = False
    ranks: str = "uniform"
    rank: int = 8
    keep_adapter: bool = False
    dense: str | None = None
    search: RankSearch = field(default_factory=RankSearch)
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("ranks", RANKS)):
            if getattr(self, name) not in known:
                raise unknown_choice(f"--{name}", getattr(self, name), known)
        for name, least in (("seq_len", 2), ("held_out", 0), ("last", 1), ("rank", 1)):
            if getattr(self, name) < least:
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"{option} {getattr(self, name)}: must be at least {least}")
        if self.ranks == "residual" and self.dense is None:
            raise InputError(
                "--ranks residual: compares with the model before pruning; give --dense DIR"
            )
        if self.ranks == "performance" and not self.held_out:
            raise InputError(
                "--ranks performance: compares losses on held-out windows; --held-out must be at "
                "least 1"
            )

    def to_json(self) -> dict[str, Any]:
        """What belongs to the method."""
        common = {"method": self.method, "text": self.text, "seq_len": self.seq_len}
        if self.method == "partial":
            own = {n: getattr(self, n) for n in ("last", "head", "untie", "cache_states")}
            return {**common, **own}
        own = {"ranks": self.ranks, "rank": self.rank}
        if self.ranks == "residual":
            own["dense"] = self.dense
        if self.ranks == "performance":
            own["search"] = self.search.to_json()
        return {**common, **own}

    def identity(self, sha256: str) -> dict[str, Any]:
        """All that the trained weights depend on beside the source and the dense model."""
        own = self.to_json()
        for name in ("text", "cache_states", "dense"):
            # the first is its sha256, the second does not change a bit
            own.pop(name, None)
        return {
            "sha256": sha256,
            "recovery": own,
            "held_out": self.held_out,
            "schedule": {**self.schedule.to_json(), "save_every": None},
        }
