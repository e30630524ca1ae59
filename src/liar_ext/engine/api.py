"""`liar_ext.prune`, `liar_ext.compress`, `liar_ext.save`: the driver between inputs and outputs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from liar_ext.calibration.batches import Batch, Calibration, check_enough, make_batches
from liar_ext.calibration.sources import read
from liar_ext.checkpoint.load import resolve
from liar_ext.checkpoint.reader import CheckpointReader, read_json, tied_names
from liar_ext.checkpoint.store import CheckpointStore
from liar_ext.checkpoint.writer import (
    CheckpointWriter,
    check_output,
    copy_other_files,
    output_folder,
    write_json,
)
from liar_ext.engine.clock import Clock
from liar_ext.engine.driver import Driver, budgets, targeted_layers
from liar_ext.engine.progress import Progress, Silent
from liar_ext.engine.store import InMemory, LayerStore
from liar_ext.environment import environment
from liar_ext.errors import InputError
from liar_ext.evaluation.mode import inference
from liar_ext.models import adapter_for, layout, text_config
from liar_ext.ops import backends
from liar_ext.ops.solve import working_dtype
from liar_ext.recipe import Recipe
from liar_ext.reconstruction import RECONSTRUCTIONS
from liar_ext.report import Report
from liar_ext.report.card import model_card
from liar_ext.report.schema import FILE

# asked and achieved sparsity may differ by this much before it is worth a warning
SPARSITY_TOLERANCE = 0.02


def prune(
    model: PreTrainedModel,
    batches: Iterable[Batch | Mapping[str, Tensor] | Tensor],
    recipe: Recipe,
    *,
    progress: Progress | None = None,
) -> Report:
    """Prune a model in memory, in place.

    Args:
        model: a supported transformers model; it stays on its device and in its dtype.
        batches: calibration tokens: `Batch`, a mapping with `input_ids` and optionally
            `attention_mask`, or a (b, t) tensor of ids.
        recipe: what to do; its calibration, device and dtype fields are not used.
    Returns:
        the Report. `model.config` is updated; write the model with `liar_ext.save`.
    Raises:
        InputError: an unsupported model, too few tokens, NaN or infinite weights or activations.
            A failure after the first Site leaves the model partly pruned.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"a {type(model).__name__} is no transformers model")
    if hasattr(model.config, layout.KEY):
        raise InputError("this model has shapes of its own already; prune the dense model instead")
    adapter_for(model.config)
    vocabulary = text_config(model.config).vocab_size
    prepared = tuple(_batch(batch, vocabulary) for batch in batches)
    if not prepared:
        raise InputError("no calibration batches; give at least one")
    check_backends(model.device)
    calibration = {
        "source": "memory",
        "samples": sum(b.input_ids.shape[0] for b in prepared),
        "tokens": sum(b.tokens for b in prepared),
    }
    # the class that is here, whatever checkpoint it was made from: the folder is loaded as it
    dense = model.config.to_dict() | {"architectures": [type(model).__name__]}
    with inference(model):
        job = _Job(InMemory(model), dense, recipe, model.device, progress)
        report = job.run(prepared, str(model.name_or_path or type(model).__name__), calibration)
    layout.update(model.config, report.config)
    return report


def compress(
    source: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Prune a checkpoint into a new folder, layer by layer; the source is only read.

    Args:
        source: folder or hub id; out: folder to make.
        overwrite: replace `out` if it exists, once the new one is complete.
    Returns:
        the Report, as in `out/liar_report.json`.
    Raises:
        InputError: anything in the input that cannot be used; `out` is then as it was.
    """
    started = time.perf_counter()
    folder = resolve(source)
    check_output(Path(out), folder, overwrite=overwrite)
    device = resolve_device(recipe.device)
    check_backends(device)
    reader = CheckpointReader(folder)
    if layout.KEY in reader.config:
        raise InputError(
            f"{folder}: pruned already, to shapes of its own; start from the dense one"
        )
    config = layout.config_object(reader.config)
    adapter = adapter_for(config)  # refuses by name, before the reader trips over tensor names
    model = layout.empty_model(config)
    left_over = reader.bind(model)
    layers = adapter.layer_list(model)[0] + "."
    beyond = [name for name in left_over if layers in name]
    if beyond:
        raise InputError(
            f"{folder}: {beyond[0]} and {len(beyond) - 1} more tensors of the layers are not in "
            f"{type(model).__name__}; check num_hidden_layers in config.json"
        )
    calibration = load_calibration(folder, model, recipe)
    with output_folder(Path(out), folder, overwrite=overwrite) as temporary:
        writer = CheckpointWriter(temporary)
        store = CheckpointStore(
            model,
            reader,
            writer,
            device=device,
            compute_dtype=compute_dtype(recipe.dtype, device),
            dtype=recipe.dtype,
        )
        job = _Job(store, reader.config, recipe, device, progress)
        if left_over:
            job.warn(
                f"{len(left_over)} tensors of the source are no part of {type(model).__name__} "
                f"and were left out, first {left_over[0]}"
            )
        report = job.run(calibration.batches, str(source), calibration.to_json())
        with job.clock.phase("write"):
            store.finish()
            copy_other_files(folder, temporary)
        if recipe.dtype != "auto":
            report.config["dtype"] = recipe.dtype
            report.config.pop("torch_dtype", None)
        report.totals |= {"bytes_before": reader.bytes(), "bytes_after": writer.bytes}
        report.seconds = {**job.clock.seconds, "total": time.perf_counter() - started}
        _write_records(temporary, report)
    return report


def save(
    model: PreTrainedModel, out: str | Path, report: Report, *, overwrite: bool = False
) -> None:
    """Write a model pruned by `prune` as a folder, as `compress` would.

    Tokenizer files are the caller's to save beside it.
    """
    with output_folder(Path(out), None, overwrite=overwrite) as temporary:
        writer = CheckpointWriter(temporary)
        tied = tied_names(model)
        for name, tensor in model.state_dict().items():
            if name not in tied:
                writer.add(name, tensor)
        writer.finish()
        if model.can_generate():
            model.generation_config.save_pretrained(temporary)
        _write_records(temporary, report)


def load_calibration(folder: Path, model: PreTrainedModel, recipe: Recipe) -> Calibration:
    """The recipe's calibration tokens for the model in `folder`.

    Raises:
        InputError: no or unusable calibration text, or no tokenizer.
    """
    if recipe.calibration is None:
        raise InputError("--calibration is missing: give a .txt, .jsonl, .csv or token file")
    corpus = read(recipe.calibration)
    text = text_config(model.config)
    adapter = adapter_for(model.config)
    tokenizer = None if corpus.tokens is not None else load_tokenizer(folder)
    return make_batches(
        corpus,
        tokenizer,
        packed=adapter.decoder,
        samples=recipe.samples,
        seq_len=min(recipe.seq_len, adapter.max_positions(text)),
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        vocab_size=text.vocab_size,
    )


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, from local files only."""
    # with its config given, transformers does not stumble over model_type liar_ext
    config = layout.config_object(layout.base_data(read_json(folder / "config.json")))
    try:
        return AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder}: no usable tokenizer ({reason})") from error


def check_backends(device: torch.device) -> None:
    """Before any work: what `LIAR_BACKEND` forces has to run here.

    Raises:
        BackendError: it cannot, or the setting means nothing.
    """
    if backends.forced("gram") is not None:
        backends.select("gram", device, torch.float32)
    if backends.forced("solve") is not None:
        backends.select("solve", device, working_dtype("auto", device))


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one. Raises InputError for a forced GPU that is missing."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def compute_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """None is the checkpoint's main one. On a CPU `auto` is float32, exact for bf16 files."""
    if name != "auto":
        return getattr(torch, name)
    return torch.float32 if device.type == "cpu" else None


def _write_records(folder: Path, report: Report) -> None:
    write_json(folder / "config.json", report.config)
    write_json(folder / "recipe.json", report.recipe)
    write_json(folder / FILE, report.to_json())
    (folder / "README.md").write_text(model_card(report), encoding="utf-8")


def _batch(batch: Batch | Mapping[str, Tensor] | Tensor, vocabulary: int) -> Batch:
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Batch):
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(ids, Tensor):
            raise InputError(
                f"a calibration batch is a {type(batch).__name__}; give a Batch, a tensor of token "
                "ids, or a mapping with input_ids"
            )
        mask = batch.get("attention_mask")
        ones = torch.ones(ids.shape, dtype=torch.bool)
        batch = Batch(ids.cpu(), ones if mask is None else mask.cpu().bool())
    if batch.input_ids.numel() and not 0 <= int(batch.input_ids.max()) < vocabulary:
        raise InputError(
            f"token id {int(batch.input_ids.max())} is outside the model's vocabulary of "
            f"{vocabulary}; use the model's own tokenizer"
        )
    return batch


class _Job:
    """One run of the driver, from a dense config to a Report."""

    def __init__(
        self,
        store: LayerStore,
        dense: dict[str, Any],
        recipe: Recipe,
        device: torch.device,
        progress: Progress | None,
    ) -> None:
        self.clock = Clock(device)
        self._store = store
        self._dense = dense
        self._recipe = recipe
        self._device = device
        self._progress = progress or Silent()
        self._warnings: list[str] = []

    def warn(self, message: str) -> None:
        self._warnings.append(message)
        self._progress.warn(message)

    def run(self, batches: Sequence[Batch], source: str, calibration: dict[str, Any]) -> Report:
        started = time.perf_counter()
        model, recipe = self._store.model, self._recipe
        adapter = adapter_for(model.config)
        if RECONSTRUCTIONS[recipe.reconstruct].solves:
            columns = [
                site.columns
                for index in targeted_layers(self._store, recipe)
                for site in adapter.sites_of(model, index, recipe.target)
            ]
            few = check_enough(int(calibration["tokens"]), max(columns, default=0))
            if few is not None:
                self.warn(few)
        before = layout.read(model)
        costs = budgets(self._store, recipe)
        parameters = _parameters(model)
        driver = Driver(self._store, batches, recipe, self._device, self._progress, self.clock)
        driver.run()
        removed = sum(
            (site.units_before - site.units_after) * costs[site.layer, site.kind].cost
            for site in driver.sites
        )
        targeted = sum(budget.units * budget.cost for budget in costs.values())
        achieved = removed / targeted
        if abs(achieved - recipe.sparsity) > SPARSITY_TOLERANCE:
            self.warn(
                f"asked for sparsity {recipe.sparsity:.3f}, got {achieved:.3f}: the widths that "
                "units and --round-to allow come no closer"
            )
        for site in driver.sites:
            self._warnings += [f"{site.name}: {step}" for step in site.steps]
        config = layout.describe(
            self._dense,
            adapter,
            layout.read(model),
            layout.equal_values(model, before),
            driver.added_biases,
        )
        return Report(
            source=source,
            recipe=recipe.to_json(),
            sites=driver.sites,
            totals={
                "parameters_before": parameters,
                "parameters_after": _parameters(model),
                "site_parameters_before": targeted,
                "site_parameters_after": targeted - removed,
                "sparsity_asked": recipe.sparsity,
                "sparsity": achieved,
            },
            seconds={**self.clock.seconds, "total": time.perf_counter() - started},
            calibration=calibration,
            environment=environment(self._device),
            layout=layout.loader_of(config, self._dense),
            config=config,
            warnings=self._warnings,
        )


def _parameters(model: PreTrainedModel) -> int:
    tied = tied_names(model)
    return sum(p.numel() for name, p in model.named_parameters() if name not in tied)
