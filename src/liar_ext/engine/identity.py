"""What the result of a compression depends on, and the library of Moments that goes by it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from typing import Any

import torch

from liar_ext.calibration.batch import Batch
from liar_ext.calibration.batches import Calibration
from liar_ext.checkpoint.job import Job
from liar_ext.checkpoint.reader import CheckpointReader
from liar_ext.checkpoint.store import CheckpointStore
from liar_ext.engine.budgets import targeted_layers
from liar_ext.engine.execution import Execution
from liar_ext.engine.inputs import chosen_backends
from liar_ext.engine.provenance import SourceSums
from liar_ext.engine.ranks import Ranks
from liar_ext.engine.statistics import least_segments, segments
from liar_ext.environment import environment
from liar_ext.errors import InputError
from liar_ext.latency import LatencyTable
from liar_ext.models import adapter_for
from liar_ext.recipe import Recipe
from liar_ext.survey import needs_tokens


def identity_of(
    recipe: Recipe,
    reader: CheckpointReader,
    calibration: Calibration,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Everything that the result depends on, as JSON data."""
    tokens = hashlib.sha256()
    for batch in calibration.batches:
        for tensor in (batch.input_ids, batch.attention_mask, *(batch.features or {}).values()):
            tokens.update(json.dumps(list(tensor.shape)).encode())
            tokens.update(tensor.contiguous().numpy().tobytes())
        if batch.cut:
            tokens.update(f"cut {batch.cut}".encode())
    here = environment(device)
    measured = {} if recipe.latency is None else {"latency": LatencyTable.read(recipe.latency)}
    return {
        "recipe": recipe.to_json(),
        **{name: table.sha256 for name, table in measured.items()},
        "source": {
            "config": hashlib.sha256(json.dumps(reader.config).encode()).hexdigest(),
            **{file: found["size"] for file, found in reader.sizes().items()},
        },
        "calibration": {
            "source": calibration.source,
            "corpus_sha256": calibration.sha256,
            "tokens_sha256": tokens.hexdigest(),
        },
        "versions": {name: here[name] for name in ("liar_ext", "torch", "transformers")},
        "compute": {
            "device": device.type,
            "dtype": str(dtype).removeprefix("torch."),
            **chosen_backends(device, dtype),
        },
    }


def moments_fingerprint(
    identity: dict[str, Any],
    source: dict[str, str],
    batches: Sequence[Batch],
    recipe: Recipe,
    dropped: Sequence[int] | None = None,
) -> dict[str, Any]:
    """All that Moments of the dense path depend on.

    Args:
        dropped: layers that are left out of it, if any are.
        identity: of `identity_of`; source: sha256 of its files; batches: as the recipe has them.
    """
    found = {name: identity[name] for name in ("versions", "compute")}
    # the tokens, under whatever name they were read
    found["calibration"] = identity["calibration"]["tokens_sha256"]
    parts = segments(batches, least_segments(recipe))
    if parts != segments(batches):
        # float32 sums of other segments have other roundings
        found["segments"] = parts[-1] + 1
    found["source"] = {"config": identity["source"]["config"], **source}
    if dropped is not None:
        found["dropped"] = list(dropped)
    return found


def library_of(
    job: Job,
    execution: Execution,
    recipe: Recipe,
    identity: dict[str, Any],
    store: CheckpointStore,
    sums: SourceSums,
    ranks: Ranks,
    batches: Sequence[Batch],
    dropped: Sequence[int] | None,
) -> Any:
    """Moments on disk: where the user wants them, or where they save a second pass.

    Only those of the dense path can be used again, so `--statistics oneshot` only.

    Raises:
        InputError: a folder of Moments was given, and statistics are sequential.
    """
    if recipe.statistics != "oneshot":
        if execution.moments is not None:
            raise InputError(
                "--moments: sequential statistics depend on what was pruned before and cannot be "
                "used again; give --statistics oneshot too"
            )
        return None
    from liar_ext.engine.moments_store import MomentsStore

    folder = execution.moments
    if folder is None:
        if not needs_tokens(recipe):
            return None
        adapter = adapter_for(store.model.config)
        columns = [
            site.columns
            for index in targeted_layers(store, recipe)
            for site in adapter.sites_of(store.model, index, recipe.target)
        ]
        folder = job.folder / "moments"
        # what an interrupted run has begun with, it goes on with
        wanted = folder.exists()
        if not wanted and job.journal.read() is None:
            # with twice the room: the output is to fit as well
            room = shutil.disk_usage(job.folder).free
            sizes = columns * (2 if recipe.chooses_ridge else 1)
            wanted = 2 * MomentsStore.bytes_needed(sizes) <= room
        if not ranks.broadcast(wanted):
            return None
    fingerprint = moments_fingerprint(identity, sums.get(), batches, recipe, dropped)
    if ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        MomentsStore(folder, fingerprint)
    ranks.barrier()
    return MomentsStore(folder, fingerprint)
