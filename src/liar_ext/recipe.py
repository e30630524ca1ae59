"""Recipe: everything needed to repeat one compression, frozen and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from liar_ext.errors import InputError, did_you_mean, unknown_choice

VERSION = 1
# what `--ridge auto` chooses from
RIDGES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
DEFAULT_RIDGE = 1e-4
DEFAULT_SPARSITY = 0.3
AUTO = "auto"
KINDS = ("ffn", "heads")
# numbers of at least 1
WHOLE = (
    *("samples", "seq_len", "batch_size", "gradient_samples", "policy_steps"),
    *("search_samples", "search_evaluations", "round_to"),
)
CHOICES = {
    "budget": ("parameters", "flops", "latency"),
    "bias": ("auto", "always", "never"),
    "target_signal": ("local", "dense", "stream"),
    "statistics": ("sequential", "oneshot"),
    "span_repair": ("liar", "none"),
    "refit": ("pruned", "all"),
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
}


@dataclass(frozen=True)
class Recipe:
    """One compression.

    Attributes:
        sparsity: fraction of the targeted Sites' budget to remove, in (0, 1). By default 0.3, and
            0, which leaves widths as they are, where layers are dropped.
        budget: what that counts: `parameters`, `flops` of one token at the length of the
            calibration's sequences, or `latency`, seconds that were measured.
        latency: the file with them, that `liar bench latency` wrote; for that budget only.
        target: kinds of Site: `ffn`, `heads`.
        criterion, allocation, reconstruct: names in the registries.
        calibration: file, dataset name, or None when batches are handed over in memory.
        samples: windows (decoders) or texts (encoders); seq_len: tokens of each at most.
        batch_size: sequences that go through a layer together.
        gradient_samples: of them, the first that criteria which need a loss take gradients of.
        policy_steps: steps of the search for masks of criteria that learn a policy.
        search_samples: of them, the first that searching allocations compare models on.
        search_evaluations: models that these try at most, on all of those windows; on a part of
            them they count as that part.
        ridge: λ of the least squares, relative to the mean variance of the Site's columns; `auto`
            chooses from `RIDGES`, Site by Site, by tokens held out of a first fit.
        bias: may the repair add an intercept? `auto`: where the layer has a bias already.
        target_signal: what the repair aims at: `local`, what the dense consumer makes of the
            present inputs; `dense`, what it made of the dense model's; `stream`, that and what has
            drifted in the residual stream beside it (both only `sequential`).
        statistics: `sequential` (inputs from the pruned path) or `oneshot` (dense path).
        round_to: FFN widths become multiples of this.
        empty: Sites may lose all their units, and layers with it their attention or FFN.
        layers: half-open range of layers to prune, or None for all.
        depth: how layers are chosen that are left out, a name in `depth.METHODS`, or None; drop:
            how many. Widths are pruned in the layers that stay.
        drop_layers: instead of both, these layers of the source.
        span_repair: `liar` folds what the least squares can predict of left-out layers into the
            last consumer in front of them; `none` leaves it.
        refit: which consumers are fitted: `pruned`, those that lose columns or stand in for layers;
            `all`, every one behind the first of these too, to make up on the dense model's path
            for what is lost in front (not with a local target).
        device, dtype: where and in what to compute; `auto` computes in float32 on a CPU and in the
            checkpoint's dtype elsewhere, and writes the checkpoint's dtype.
        seed: of calibration sampling and of random methods.
    """

    # None is the default, which depends on whether layers are dropped; a number from then on
    sparsity: float = cast("float", None)
    budget: str = "parameters"
    latency: str | None = None
    target: tuple[str, ...] = ("ffn",)
    criterion: str = "wanda"
    allocation: str = "uniform"
    reconstruct: str = "liar"
    calibration: str | None = None
    samples: int = 128
    seq_len: int = 2048
    batch_size: int = 8
    gradient_samples: int = 16
    policy_steps: int = 256
    search_samples: int = 16
    search_evaluations: int = 200
    ridge: float | str = DEFAULT_RIDGE
    bias: str = "auto"
    target_signal: str = "local"
    statistics: str = "sequential"
    round_to: int = 1
    empty: bool = False
    layers: tuple[int, int] | None = None
    depth: str | None = None
    drop: int | None = None
    drop_layers: tuple[int, ...] | None = None
    span_repair: str = "liar"
    refit: str = "pruned"
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        # imported here: the registries import torch, and a Recipe is often only read
        from liar_ext.allocation import ALLOCATIONS
        from liar_ext.criteria import CRITERIA
        from liar_ext.depth.methods import check_depth
        from liar_ext.reconstruction import RECONSTRUCTIONS

        check_depth(self)
        given: float | None = self.sparsity
        if given is None:
            object.__setattr__(self, "sparsity", 0.0 if self.shortens else DEFAULT_SPARSITY)
        number = isinstance(self.sparsity, int | float) and not isinstance(self.sparsity, bool)
        if not (number and (0 < self.sparsity < 1 or (self.shortens and self.sparsity == 0))):
            zero = ", or 0 to leave widths as they are" if self.shortens else ""
            raise InputError(
                f"--sparsity {self.sparsity!r}: must be a number above 0 and below 1, e.g. "
                f"0.3{zero}"
            )
        target: Any = self.target  # JSON and callers may hand over a string or a list
        kinds = target.split(",") if isinstance(target, str) else target
        object.__setattr__(self, "target", tuple(kinds))
        unknown = [kind for kind in self.target if kind not in KINDS]
        if unknown or not self.target or len(set(self.target)) != len(self.target):
            near = "".join(did_you_mean(kind, KINDS) for kind in unknown[:1])
            raise InputError(
                f"--target {','.join(self.target) or '(empty)'}: choose from {', '.join(KINDS)}, "
                f"each once, separated by commas{near}"
            )
        for name, registry in (
            ("criterion", CRITERIA),
            ("allocation", ALLOCATIONS),
            ("reconstruct", RECONSTRUCTIONS),
        ):
            _check_choice(name, getattr(self, name), tuple(registry))
        for name, choices in CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        for name in WHOLE:
            value = getattr(self, name)
            if not _is_whole(value) or value < 1:
                raise InputError(f"--{_flag(name)} {value}: must be a whole number of at least 1")
        if not isinstance(self.empty, bool):
            raise InputError(f"--empty {self.empty}: must be true or false")
        if self.empty and ALLOCATIONS[self.allocation].equal:
            raise InputError(
                f"--empty with --allocation {self.allocation}, which gives all layers the same "
                "width; choose one that tells them apart: levels, influence, spdy, segments"
            )
        if not _is_whole(self.seed) or not 0 <= self.seed < 2**63:
            raise InputError(f"--seed {self.seed}: must be a whole number of at least 0")
        for name, what in (("calibration", "a file or a data set name"), ("latency", "a file")):
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
                object.__setattr__(self, name, value)
            if not (value is None or isinstance(value, str)):
                raise InputError(f"--{name} {value}: must be {what}")
        if (self.budget == "latency") != (self.latency is not None):
            raise InputError(
                f"--latency {self.latency}: is for --budget latency only, and --budget is "
                f"{self.budget}"
                if self.latency is not None
                else "--budget latency needs --latency FILE; make one with: "
                "liar bench latency SRC --out FILE"
            )
        number = isinstance(self.ridge, int | float) and not isinstance(self.ridge, bool)
        if self.ridge != AUTO and not (number and 0 <= float(self.ridge) < math.inf):
            raise InputError(
                f"--ridge {self.ridge}: must be a number of at least 0, e.g. 1e-3, or auto"
            )
        if self.layers is not None and self.shortens:
            raise InputError(
                f"--layers {':'.join(map(str, self.layers))} with layers that are left out: drop "
                "them first, then prune some of those that stay"
            )
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
            ends = self.layers
            if len(ends) != 2 or not all(map(_is_whole, ends)) or not 0 <= ends[0] < ends[1]:
                raise InputError(
                    f"--layers {':'.join(map(str, ends))}: must be START:STOP with "
                    "0 <= START < STOP"
                )
        if RECONSTRUCTIONS[self.reconstruct].needs_bias and self.bias == "never":
            raise InputError(
                f"--reconstruct {self.reconstruct} works through biases and --bias is never; "
                "use --bias auto or another reconstruction"
            )
        if self.refit == "all" and not self.paired:
            raise InputError(
                "--refit all with --target-signal local: a consumer that keeps all its columns has "
                "nothing to make up for on the path that is being pruned; add --target-signal "
                "stream, or dense"
            )
        if self.paired:
            aim = f"--target-signal {self.target_signal}"
            if self.statistics == "oneshot":
                raise InputError(
                    f"{aim} with --statistics oneshot: inputs are the dense path's "
                    "there, so it is the same as local; use --statistics sequential, or local"
                )
            if not RECONSTRUCTIONS[self.reconstruct].follows:
                able = ", ".join(name for name, r in RECONSTRUCTIONS.items() if r.follows)
                raise InputError(
                    f"{aim} with --reconstruct {self.reconstruct}, which cannot aim at "
                    f"the dense model's; use --reconstruct {able}, or local"
                )

    @property
    def narrows(self) -> bool:
        """Whether widths are pruned."""
        return self.sparsity > 0

    @property
    def shortens(self) -> bool:
        """Whether layers are left out."""
        return self.depth is not None or self.drop_layers is not None

    @property
    def spans(self) -> bool:
        """Whether what left-out layers did is to be repaired."""
        return self.shortens and self.span_repair != "none"

    @property
    def reads_text(self) -> bool:
        """Whether calibration tokens are needed: not to leave out layers by their place or size."""
        from liar_ext.depth.methods import METHODS

        blind = self.depth is None or METHODS[self.depth].needs in ("nothing", "weights")
        return self.narrows or self.spans or not blind

    @property
    def paired(self) -> bool:
        """Whether the dense path goes beside the pruned one."""
        return self.target_signal != "local"

    @property
    def chooses_ridge(self) -> bool:
        """Whether tokens are held out, to choose the ridge of each Site."""
        from liar_ext.reconstruction import RECONSTRUCTIONS

        return self.ridge == AUTO and RECONSTRUCTIONS[self.reconstruct].sweep is not None

    @property
    def first_ridge(self) -> float:
        """The ridge before any is chosen: of criteria that look ahead to the repair."""
        return DEFAULT_RIDGE if self.ridge == AUTO else float(self.ridge)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data: tuples are lists, so that what is read back compares equal."""
        data: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return {"version": VERSION, **data}

    @classmethod
    def from_json(cls, data: Any, origin: str = "recipe") -> Recipe:
        """Build from parsed JSON; unknown keys and versions are rejected."""
        if not isinstance(data, dict):
            raise InputError(f"{origin}: must be a JSON object, not {type(data).__name__}")
        values = dict(data)
        version = values.pop("version", VERSION)
        if version != VERSION:
            raise InputError(f"{origin}: version {version}; this release reads version {VERSION}")
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - names)
        if unknown:
            raise InputError(
                f"{origin}: unknown key {', '.join(unknown)}; known: {', '.join(sorted(names))}"
            )
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise InputError(f"{origin}: {error}") from error

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"--recipe {path}: cannot be read as JSON ({error})") from error
        return cls.from_json(data, str(path))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise unknown_choice(f"--{_flag(name)}", value, choices)
