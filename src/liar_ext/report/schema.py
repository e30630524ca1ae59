"""Report: what one compression did, as plain data. Written as `liar_report.json`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from liar_ext.errors import InputError

FILE = "liar_report.json"
# `kind` in the reports of folders that were not pruned, Site by Site
LAYERS, CONVOLUTIONS, RECOVERED, EXPORTED = "layers", "convolutions", "recovered", "exported"
OTHERS = {
    LAYERS: "whole layers that were left out, merged or inserted",
    CONVOLUTIONS: "a convolutional network with fewer convolutions",
    RECOVERED: "a model that `liar recover` has trained",
    EXPORTED: "a folder that `liar export` has written for another engine",
}
VERSION = 1


@dataclass
class SiteReport:
    """One Site.

    Attributes:
        relative_residual: mean squared error of the repaired consumer's output over the variance
            of the dense one's, on the calibration tokens. The dense one gets the same inputs; with
            `--target-signal dense` it gets those of the dense model, so that what layers before
            did to the inputs counts; with `stream` what the residual stream in front of it lost is
            part of that output: both are of the dense stream behind the Site less the present
            stream in front of it.
        ridge, ridge_used: relative λ asked for and used; steps: what was raised or repeated.
        condition, backward_error, dead_columns, precision: see `ops.diagnostics.Diagnostics`.
        iterations: of an iterative reconstruction.
        held_out: where the ridge was chosen, the mean squared error on held-out tokens of fits to
            the others, over the variance of the dense output there, by ridge; those that hold.
        remarks: what a criterion says of its selection.
        across: layers of the source that were left out behind this one, and that the Site stands in
            for; `relative_residual` is then of the stream behind them.
        seconds: by phase.
    """

    layer: int
    kind: str
    name: str
    units_before: int
    units_after: int
    columns_before: int
    columns_after: int
    bias_added: bool
    relative_residual: float
    ridge: float | None = None
    ridge_used: float | None = None
    condition: float | None = None
    backward_error: float | None = None
    dead_columns: int | None = None
    precision: str | None = None
    iterations: int | None = None
    held_out: dict[str, float] = field(default_factory=dict)
    steps: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    across: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Report:
    """One compression.

    Attributes:
        source: the dense checkpoint; recipe: as JSON; sites: what happened to each, by the layers
            of the result.
        totals: parameters and bytes before and after; the same of the targeted Sites, with the
            FLOPs of one token at the calibration's sequence length and, where the budget is in
            seconds, the latency that its table predicts; `sparsity` in whichever of them the
            recipe budgets, as it was asked for and as it is.
        seconds: by phase, and `total`.
        calibration: source, hash, samples, tokens, seed.
        environment: versions and device.
        layout: `stock`, or `liar_ext` if only `liar_ext.load` can load the result.
        config: the `config.json` of the result.
        layers: where layers were left out, how many there were and are, which went, and what was
            measured of them (`depth.choice.LayerChoice`).
        latency: the table of a budget in seconds: its sha256, device, dtype, workload, versions.
        source_files: sha256 of the source's weight files (the hub shows the same sums).
        run: how it ran and what does not show in the result: ranks, the layer that it was resumed
            at, where hidden states were, backends, peak memory.
    """

    source: str
    recipe: dict[str, Any]
    sites: list[SiteReport]
    totals: dict[str, Any]
    seconds: dict[str, float]
    calibration: dict[str, Any]
    environment: dict[str, Any]
    layout: str
    config: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    layers: dict[str, Any] = field(default_factory=dict)
    latency: dict[str, Any] = field(default_factory=dict)
    source_files: dict[str, str] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any], origin: str = FILE) -> Report:
        """Raises InputError on another version or missing fields."""
        if not isinstance(data, dict) or data.get("version") != VERSION:
            found = data.get("version") if isinstance(data, dict) else None
            raise InputError(f"{origin}: version {found!r}; this release reads {VERSION}")
        if (kind := data.get("kind")) in OTHERS:
            raise InputError(
                f"{origin}: of {OTHERS[kind]}; README.md beside it says what there is to say"
            )
        try:
            sites = [SiteReport(**site) for site in data["sites"]]
            return cls(**{**data, "sites": sites})
        except (TypeError, KeyError) as error:
            raise InputError(f"{origin}: not a report of this release ({error})") from error

    @classmethod
    def read(cls, folder: str | Path) -> Report:
        """The report of an output folder."""
        return cls.from_json(read_data(folder), str(Path(folder) / FILE))


def read_data(folder: str | Path) -> Any:
    """The JSON data of an output folder's report, of whatever kind."""
    path = Path(folder) / FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{folder}: no {FILE}; give a folder that `liar prune` has written"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error


def calibration_of(folder: str | Path) -> dict[str, Any] | None:
    """What a folder's model was calibrated on, or trained on after that; None of a dense one, or
    where layers were left out of or inserted into one without a text."""
    if not (Path(folder) / FILE).exists():
        return None
    data = read_data(folder)
    if isinstance(data, dict) and data.get("kind") in (LAYERS, RECOVERED, EXPORTED):
        return data.get("calibration")
    return Report.read(folder).calibration or None
