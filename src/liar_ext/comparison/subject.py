"""Subject: the dense checkpoint in memory, and the pruned copies that are measured beside it."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from liar_ext.checkpoint.load import load
from liar_ext.checkpoint.reader import CheckpointReader, tied_names
from liar_ext.checkpoint.writer import storage_dtype
from liar_ext.comparison.grid import Cell, Grid
from liar_ext.comparison.paired import kept
from liar_ext.engine.budgets import targeted_layers
from liar_ext.engine.compress import held_bytes_of
from liar_ext.engine.compression import Compression, check_possible
from liar_ext.engine.execution import Execution, choose_place, make_shelf
from liar_ext.engine.identity import identity_of, moments_fingerprint
from liar_ext.engine.inputs import (
    check_backends,
    chosen_backends,
    compute_dtype,
    fit_to,
    load_calibration,
    load_tokenizer,
    resolve_device,
)
from liar_ext.engine.judgements import Judgements
from liar_ext.engine.moments_store import MomentsStore
from liar_ext.engine.plain import plain_forward
from liar_ext.engine.source import dense_checkpoint
from liar_ext.engine.store import InMemory
from liar_ext.errors import InputError
from liar_ext.evaluation.limits import limits_of_model
from liar_ext.evaluation.measured import Measure
from liar_ext.evaluation.mode import inference
from liar_ext.evaluation.task import Evaluation
from liar_ext.models import adapter_for, text_config
from liar_ext.models.traced import KEY as TRACE
from liar_ext.models.twin import twin
from liar_ext.recipe import DEFAULT_RIDGE, Recipe
from liar_ext.report import Report

# of folders for what waits on disk, which a killed process leaves
SCRATCH = ".scratch-"


class Subject:
    """One dense model, read when it is first needed, and never changed.

    Attributes:
        calibration: the tokens of all cells; device, dtype: of all computation.
        grid: without the cells that are impossible for this model and calibration.
        evaluations: as given, with windows that the model can take.
    Raises:
        InputError: a checkpoint, calibration or evaluation that cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        grid: Grid,
        evaluations: Sequence[Evaluation],
        execution: Execution,
        trace: bool = False,
    ) -> None:
        base = grid.base
        self.folder, self._execution = folder, execution
        self._judgements = Judgements()
        self.device = resolve_device(base.device)
        check_backends(self.device)
        self._reader, empty, self.left_over = dense_checkpoint(
            folder, grid.targets() if trace else None
        )
        self._adapter = adapter_for(empty.config)
        targeted_layers(InMemory(empty), base)  # refuses layers that the model has not
        limit = self._adapter.max_positions(text_config(empty.config))
        self.evaluations = [e.fitted(limit) for e in evaluations]
        limits = limits_of_model(empty)
        for evaluation in evaluations:
            try:
                evaluation.check(folder, limits, form="{kind}={form}")
            except InputError as error:
                raise InputError(f"--eval {evaluation.name}: {error}") from None
        # hashing has the source to itself while the text is read
        self._reader.start_hashing(threads=max(1, (os.cpu_count() or 1) // 4))
        # as it is without held-out tokens; each cell cuts it as it needs (`fit_to`)
        self.calibration = load_calibration(folder, empty, replace(base, ridge=DEFAULT_RIDGE))
        self.grid = grid.possible(
            lambda recipe: check_possible(
                InMemory(empty), recipe, self.calibration.batches, self.calibration.tokens
            )
        )
        self.dtype = compute_dtype(base.dtype, self.device) or self._reader.main_dtype()
        held = max(
            held_bytes_of(empty, cell.recipe, self.calibration.batches, self.dtype.itemsize, 1)
            for cell in self.grid.cells
        )
        self.place = choose_place(execution.hidden_states, held, self.device)

    def identity(self) -> dict[str, Any]:
        """All that the figures depend on, as JSON data; waits for the sums of the source."""
        found = identity_of(self.grid.base, self._reader, self.calibration, self.device, self.dtype)
        found["recipe"] = self.grid.fixed()
        found["source_sha256"] = self._reader.hashes()
        found["evaluations"] = {e.name: e.identity() for e in self.evaluations}
        return json.loads(json.dumps(found))

    def library(self, folder: Path, identity: dict[str, Any], recipe: Recipe) -> MomentsStore:
        """Moments of the dense path, as `liar prune --moments` keeps them for such a recipe."""
        batches = fit_to(self.calibration.batches, recipe)
        source = identity["source_sha256"]
        return MomentsStore(folder, moments_fingerprint(identity, source, batches, recipe))

    @cached_property
    def model(self) -> PreTrainedModel:
        """The dense model, in the compute dtype, on the device."""
        model = load(self.folder, dtype=self.dtype, device=self.device)
        if TRACE in self._reader.config:
            setattr(model.config, TRACE, self._reader.config[TRACE])
        return model

    @cached_property
    def _measures(self) -> dict[str, Measure]:
        tokenizer = load_tokenizer(self.folder)
        return {evaluation.name: evaluation.on(tokenizer) for evaluation in self.evaluations}

    def _measured(self, model: PreTrainedModel) -> dict[str, Any]:
        """`metrics`, and `units` to pair them by, as JSON data."""
        return kept({name: measure(model, self.model) for name, measure in self._measures.items()})

    def dense(self) -> dict[str, Any]:
        """The dense model's figures, and the seconds of one plain forward of the calibration."""
        measured = self._measured(self.model)
        # the first pass pays for threads and libraries; a batch is enough for that
        plain_forward(self.model, self.calibration.batches[:1], self.device)
        start = time.perf_counter()
        plain_forward(self.model, self.calibration.batches, self.device)
        seconds = time.perf_counter() - start
        tied = tied_names(self.model)
        parameters = sum(p.numel() for n, p in self.model.named_parameters() if n not in tied)
        return {**measured, "parameters": parameters, "forward_seconds": seconds}

    def measure(
        self, cell: Cell, library: MomentsStore | None, forward_seconds: float, scratch: Path
    ) -> dict[str, Any]:
        """One cell: prune a copy, evaluate it, forget it. JSON data.

        Args:
            scratch: folder for what waits on disk, unless the user named another.
        """
        reset_peak()
        scratch = self._execution.scratch or scratch
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=scratch) as temporary:
            model, report = self._pruned(cell.recipe, library, Path(temporary))
        start = time.perf_counter()
        measured = self._measured(model)
        evaluation = time.perf_counter() - start
        residuals = [site.relative_residual for site in report.sites]
        before, after = report.totals["parameters_before"], report.totals["parameters_after"]
        peaks = {name: value for name, value in report.run.items() if name.startswith("peak")}
        return {
            **measured,
            "sparsity_reached": report.totals["sparsity"],
            "parameters_removed": before - after,
            "parameters_after": after,
            "residual": {"mean": sum(residuals) / len(residuals), "max": max(residuals)},
            "ridges": {site.name: site.ridge_used for site in report.sites},
            "layout": report.layout,
            "warnings": report.warnings,
            "seconds": {**report.seconds, "evaluation": evaluation},
            "relative_to_forward": report.seconds["total"] / forward_seconds,
            **peaks,
        }

    def _pruned(
        self, recipe: Recipe, library: MomentsStore | None, scratch: Path
    ) -> tuple[PreTrainedModel, Report]:
        """A pruned model with the weights that its file would have, and the report."""
        dense = {id(parameter) for parameter in self.model.parameters()}
        model = twin(self.model)
        with inference(model):
            run = Compression(InMemory(model), self._reader.config, recipe, self.device, None)
            run.facts["backends"] = chosen_backends(self.device, self.dtype)
            run.facts["hidden_states"] = run.clock.hidden_states = self.place
            run.shelf = make_shelf(self.place, scratch, self.device)
            run.library, run.judgements = library, self._judgements
            batches = fit_to(self.calibration.batches, recipe)
            report = run.run(batches, str(self.folder), self.calibration.to_json())
        for name, parameter in model.named_parameters():
            if id(parameter) not in dense:
                as_stored(name, parameter, self._reader, recipe)
        return model, report


def as_stored(
    name: str, parameter: torch.nn.Parameter, reader: CheckpointReader, recipe: Recipe
) -> None:
    """Round a repaired parameter to the dtype that a checkpoint would keep it in.

    Raises:
        InputError: it does not fit.
    """
    # a bias that was added takes the dtype of its own weight
    like = name if name in reader else f"{name.rpartition('.')[0]}.weight"
    dtype = storage_dtype(recipe.dtype, reader.dtype(like))
    stored = parameter.data.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        raise InputError(
            f"{name}: repaired weights up to {float(parameter.abs().max()):.1e} do not fit "
            f"{dtype}; use --dtype bfloat16 or float32, or a larger --ridge"
        )
    parameter.data = stored.to(parameter.dtype)


def reset_peak() -> None:
    """Make the process's peak memory that of what comes now, where the system can."""
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
