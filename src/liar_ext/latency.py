"""The table that `liar bench latency` measures: seconds of one Site at some numbers of kept units.

A file is JSON. What a budget needs of it is checked here; the rest says where it came from.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from liar_ext.allocation import Budget
from liar_ext.allocation.prices import Prices
from liar_ext.benchmark_file import read_benchmark
from liar_ext.errors import InputError
from liar_ext.models import Site, adapter_for, linear, text_config

VERSION = 1
HOW = "make one with: liar bench latency SRC --out FILE"
MODES = ("prefill", "decode")
# more than this between p20 and p80 is other work on the machine
QUIET = 1.25
# values in the 16 bytes that matrix products on tensor cores read at once
ALIGNED = 8
# in this order in a file, and in what is said of it
SHAPE = ("kind", "units", "columns", "inputs", "rows", "outputs", "attention")
# what of a file a report repeats
_ORIGIN = (
    "model_type",
    "device",
    "device_type",
    "dtype",
    "attention",
    "workload",
    "environment",
    "date",
)


def shape_of(site: Site, config: PretrainedConfig) -> dict[str, Any]:
    """What the time of a dense Site depends on, as JSON data.

    `inputs` and `rows` are those of its producers together. Heads have the type of attention of
    their layer, where the config of a model tells several apart.
    """
    producers = {p.path: site.module.get_submodule(p.path) for p in site.spec.producers}
    weights = [linear.weight(module) for module in producers.values()]
    types = getattr(text_config(config), "layer_types", None)
    return {
        "kind": site.kind,
        "units": site.units,
        "columns": site.columns,
        "inputs": weights[0].shape[1],
        "rows": sum(weight.shape[0] for weight in weights),
        "outputs": site.weight().shape[0],
        "attention": types[site.layer] if types and site.kind == "heads" else None,
    }


@dataclass(frozen=True)
class Workload:
    """What a forward works on.

    Attributes:
        mode: `prefill`, `batch` sequences of `seq_len` tokens at once; `decode`, the next token of
            each after `seq_len` that are in the cache.
    Raises:
        ValueError: another mode, or a number below 1.
    """

    mode: str
    batch: int
    seq_len: int

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r}: must be {' or '.join(MODES)}")
        for name, value in (("batch", self.batch), ("seq_len", self.seq_len)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} {value!r}: must be a whole number of at least 1")

    def check(self, model: PreTrainedModel) -> None:
        """Raises InputError for what the model cannot do."""
        adapter = adapter_for(model.config)
        if self.mode == "decode" and not adapter.decoder:
            raise InputError(
                f"--mode decode: a {adapter.model_type} model generates no tokens; use prefill"
            )
        limit = adapter.max_positions(text_config(model.config)) - (self.mode == "decode")
        if self.seq_len > limit:
            raise InputError(
                f"--seq-len {self.seq_len}: the model takes {limit} tokens at most here"
            )

    @property
    def tokens(self) -> int:
        """Of each sequence that a forward computes."""
        return 1 if self.mode == "decode" else self.seq_len


def disturbances(tables: Sequence[Mapping[str, Any]], what: str = "widths") -> list[str]:
    """What speaks against the figures of a file, in words.

    Args:
        tables: each with lists `p20` and `p80` in `seconds`; what: of which there is a time each.
    """
    spreads = [
        p80 / p20
        for table in tables
        for p20, p80 in zip(table["seconds"]["p20"], table["seconds"]["p80"], strict=True)
    ]
    loud = [spread for spread in spreads if spread > QUIET]
    if not loud:
        return []
    return [
        f"{len(loud)} of {len(spreads)} {what} vary: p80 is up to {max(loud):.2f} times p20; "
        "measure again while nothing else runs"
    ]


@dataclass(frozen=True)
class LatencyTable:
    """One file, read.

    Attributes:
        path: as it was given; sha256: of the file.
        origin: model type, device, dtype, workload and versions that it was measured with.
        prices: monotone seconds, by shape.
        doubts: what speaks against them, in words.
    """

    path: str
    sha256: str
    origin: dict[str, Any]
    prices: dict[tuple[Any, ...], Prices]
    doubts: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: str | Path) -> LatencyTable:
        """Raises InputError for a file that is missing, damaged or no such table."""
        where = f"--latency {path}"
        data, content = read_benchmark(
            path,
            where,
            benchmark="latency",
            version=VERSION,
            what="table of latencies",
            how=HOW,
        )
        try:
            origin = {name: data[name] for name in _ORIGIN}
            Workload(**origin["workload"])
            prices = _prices_by_shape(data["tables"])
            doubts = tuple(disturbances(data["tables"]))
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise InputError(f"{where}: is damaged ({said}); {HOW}") from error
        return cls(str(path), hashlib.sha256(content).hexdigest(), origin, prices, doubts)

    def budget(self, site: Site, config: PretrainedConfig) -> Budget:
        """A dense Site's units and their seconds.

        Raises:
            InputError: the table is of another model, or has no Site of this shape.
        """
        model_type = text_config(config).model_type
        if self.origin["model_type"] != model_type:
            raise InputError(
                f"--latency {self.path}: was measured for {self.origin['model_type']}, and this is "
                f"a {model_type} model; {HOW}"
            )
        shape = shape_of(site, config)
        prices = self.prices.get(tuple(shape.values()))
        if prices is None:
            wanted = _shown(shape)
            own = [_shown(dict(zip(SHAPE, known, strict=True))) for known in self.prices]
            raise InputError(
                f"--latency {self.path}: has no {wanted}, as {site.name} is; it has "
                f"{'; '.join(own) or 'nothing'}; {HOW}"
            )
        return Budget(site.kind, site.units, prices.secant, prices=prices)

    def warnings(self, target: Sequence[str], round_to: int) -> list[str]:
        """Why the result may take longer than the table says."""
        found = [f"--latency {self.path}: {text}" for text in self.doubts]
        if self.origin["device_type"] != "cuda" or "ffn" not in target or not round_to % ALIGNED:
            return found
        return [
            *found,
            f"--round-to {round_to}: a GPU is slower at widths that are no multiple of {ALIGNED} "
            f"than the --latency table says; give --round-to {ALIGNED} or a multiple of it",
        ]

    def to_json(self) -> dict[str, Any]:
        """For a report."""
        return {"sha256": self.sha256, **self.origin}


def _prices_by_shape(tables: Any) -> dict[tuple[Any, ...], Prices]:
    found: dict[tuple[Any, ...], Prices] = {}
    for table in tables:
        shape, prices = _prices_of(table)
        if shape in found:
            raise ValueError(f"{_shown(dict(zip(SHAPE, shape, strict=True)))} is there twice")
        found[shape] = prices
    if not found:
        raise ValueError("it has no tables")
    return found


def _prices_of(table: Any) -> tuple[tuple[Any, ...], Prices]:
    shape = tuple(table["shape"][name] for name in SHAPE)
    units, seconds = table["units"], table["seconds"]["p50"]
    kind, dense = shape[:2]
    if not all(isinstance(u, int) and not isinstance(u, bool) for u in (dense, *units)):
        raise ValueError(f"the units of {kind} are not whole numbers")
    if units != sorted(set(units)) or not units or (units[0], units[-1]) != (1, dense):
        raise ValueError(f"the units of {kind} do not rise from 1 to {dense}")
    times = [float(value) for value in seconds]
    if len(times) != len(units) or not all(math.isfinite(t) and t > 0 for t in times):
        raise ValueError(f"{kind} does not have a time above 0 for each number of units")
    return shape, Prices.smoothed(units, times)


def _shown(shape: Mapping[str, Any]) -> str:
    attention = f", {shape['attention']}" if shape["attention"] else ""
    return (
        f"{shape['kind']} of {shape['units']} units ({shape['inputs']} inputs, {shape['columns']} "
        f"columns, {shape['outputs']} outputs{attention})"
    )
