"""Keeper: after a layer, what an interrupted compression goes on from.

Hidden states go to files, then the journal names them, then those before them are removed. A kill
at any moment leaves a journal whose files are all there, and what it says is exact: layers that are
repeated give the same bits again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from liar_ext.checkpoint.job import Job
from liar_ext.checkpoint.journal import check_identity, sync_path
from liar_ext.engine.provenance import SourceSums
from liar_ext.engine.ranks import Ranks
from liar_ext.engine.shelf import Item, restored
from liar_ext.engine.store import LayerStore
from liar_ext.errors import InputError
from liar_ext.report.schema import SiteReport

# (layer, kind) -> kept units
Widths = dict[tuple[int, str], int]
FINDINGS = "findings.safetensors"
# keeping may take this share of the time
_SHARE = 0.05


@dataclass
class Position:
    """Where a compression is.

    Attributes:
        stage: `survey` while there is one, then `prune`.
        layer: the next one.
        widths: kept units of each targeted Site, once they are known.
        findings: of the Sites that the survey has been at; notes: what the report is to say of
            them.
        sites: reports of those that are pruned.
        generator: state of the random generator, None for that of the seed.
    """

    stage: Literal["survey", "prune"]
    layer: int = 0
    widths: Widths = field(default_factory=dict)
    findings: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    notes: dict[tuple[int, str], list[str]] = field(default_factory=dict)
    sites: list[SiteReport] = field(default_factory=list)
    generator: Tensor | None = None


def beginning(seed: int) -> Position:
    """Where a compression begins."""
    return Position("survey", generator=torch.Generator().manual_seed(seed).get_state())


class Keeper:
    """Writes journal entries for one job, and reads the one there is.

    Args:
        store: what writes the layers: an entry waits until they are on disk.
        identity: see `journal`; the sums of the source's files are added when they are known.
        seconds: least time between two entries; 0 is an entry after every layer.
        since: when the run began that the first entry is to be of, as `time.monotonic` has it.
        source: what is read.
    Attributes:
        resumed: layers that an earlier run had done, None if there was none.
    """

    def __init__(
        self,
        job: Job,
        store: LayerStore,
        identity: dict[str, Any],
        *,
        seconds: float,
        layers: int,
        ranks: Ranks,
        source: SourceSums,
        since: float | None = None,
    ) -> None:
        self._job, self._store, self._identity, self._ranks = job, store, identity, ranks
        self._source = source
        self._least = self._wait = seconds
        self._layers = layers
        self._last = time.monotonic() if since is None else since
        self._entry = job.journal.read()
        self.resumed: int | None = None if self._entry is None else self._entry["layer"]

    def found(self) -> Position | None:
        """Where the earlier run was, or None."""
        entry = self._entry
        if entry is None:
            return None
        return Position(
            entry["stage"],
            entry["layer"],
            {(layer, kind): units for layer, kind, units in entry["widths"]},
            self._findings(self._job.folder / entry["folder"] / FINDINGS),
            {(layer, kind): notes for layer, kind, notes in entry["notes"]},
            [SiteReport(**site) for site in entry["sites"]],
            torch.tensor(list(bytes.fromhex(entry["generator"])), dtype=torch.uint8),
        )

    def _findings(self, path: Path) -> dict[tuple[int, str], Tensor]:
        try:
            stored = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"--resume: {path}, the survey of an earlier run, cannot be read ({error}); "
                "start again with --overwrite instead"
            ) from error
        keys = {name: name.partition(".") for name in stored}
        return {(int(keys[n][0]), keys[n][2]): found for n, found in stored.items()}

    def put_aside(self, name: str, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
        """Keep what is computed once, before the first entry: with that, a later run finds it.

        What had the name before is replaced at once: a kill leaves the one or the other.

        Args:
            tensors: the same on every rank, on the CPU; facts: JSON data.
        """
        if self._ranks.rank == 0:
            path = self._job.folder / f"{name}.safetensors"
            new = path.with_suffix(".tmp")
            save_file(dict(tensors), new, metadata={"facts": json.dumps(facts)})
            sync_path(new)
            os.replace(new, path)
            sync_path(self._job.folder)

    def keep_midway(
        self, start: Position, name: str, tensors: Mapping[str, Tensor], facts: dict[str, Any]
    ) -> None:
        """If it is time for an entry, put aside how far a pass before the layers is, and write one.

        Args:
            start: where a compression begins.
        """
        if self._due():
            self.put_aside(name, tensors, facts)
            self._keep(start, {})

    def aside(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What an earlier run has put aside, or None.

        Raises:
            InputError: it cannot be read.
        """
        path = self._job.folder / f"{name}.safetensors"
        if not self._ranks.broadcast(self._entry is not None and path.exists()):
            return None
        try:
            with safe_open(path, framework="pt") as stored:
                facts = json.loads(stored.metadata()["facts"])
            return load_file(path), facts
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"--resume: {path}, {name} of an earlier run, cannot be read ({error}); "
                "start again with --overwrite instead"
            ) from error

    def hidden(self, batches: Sequence[int], device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """All hidden states of these batches that were kept, by their names in `Stream.kept`.

        Raises:
            InputError: a file is missing or of another size.
        """
        assert self._entry is not None
        if not self._entry["hidden"]:
            raise InputError(
                "--resume: the earlier run needed no forward pass, for its statistics were in a "
                "--moments folder; give that folder again"
            )
        known, paths = self._entry["hidden"], {str(number): [str(number)] for number in batches}
        for name in known:
            number, dash, _ = name.partition("-")
            if dash and number in paths:
                paths[number].append(name)
        for name in (name for names in paths.values() for name in names):
            path = self._job.folder / self._entry["folder"] / name
            try:
                if _digest(path) != known[name]["sha256"]:
                    raise OSError("it is not what that run wrote")
                yield name, restored(path, known[name], device)
            except (OSError, KeyError) as error:
                raise InputError(
                    f"--resume: {path}, hidden states of an earlier run, cannot be read "
                    f"({error}); start again with --overwrite instead"
                ) from error

    def source_sums(self) -> dict[str, str]:
        """sha256 of the source's files; waits for them.

        Raises:
            InputError: they are not what the earlier run read.
        """
        sums = self._source.get()
        if self._entry is not None:
            known = self._entry["identity"]["source_sha256"]
            check_identity(
                {"source_sha256": known}, {"source_sha256": sums}, self._job.journal.path
            )
        return sums

    @property
    def folder(self) -> Path:
        """What is put here is there for a later run, once there is an entry."""
        return self._job.folder

    def keep(self, position: Position, hidden: Mapping[str, Item], *, now: bool = False) -> None:
        """Write an entry if it is time for one, or `now`; everything that it names is on disk
        first."""
        if self._due(now):
            self._keep(position, hidden)

    def _due(self, now: bool = False) -> bool:
        """Whether an entry is to be written, the same on every rank."""
        # rank 0 has the clock
        if not self._ranks.broadcast(now or time.monotonic() - self._last >= self._wait):
            return False
        # an entry without the sums could not be told from one of another checkpoint: until they are
        # known nothing is kept, unless every layer is to be
        return not self._least or now or all(self._ranks.gather(self._source.ready()))

    def _keep(self, position: Position, hidden: Mapping[str, Item]) -> None:
        assert position.generator is not None, "the driver sets it"
        sums = self.source_sums()
        digests = self._store.written()
        self._ranks.barrier()
        # from here on it is this run's own disk that takes time, not a wait for others
        began = time.monotonic()
        name = f"hidden-{position.stage}-{position.layer}"
        folder = self._job.folder / name
        if self._ranks.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed here
            folder.mkdir()
        self._ranks.barrier()
        mine = {}
        for state, item in hidden.items():
            path = folder / state
            mine[state] = item.save(path)
            sync_path(path)
            mine[state]["sha256"] = _digest(path)
        every: list[tuple[dict[str, Any], dict[str, str]]] = self._ranks.gather((mine, digests))
        entry = {
            "stage": position.stage,
            "layer": position.layer,
            "layers": self._layers,
            "identity": self._identity | {"source_sha256": sums},
            "widths": [[*key, units] for key, units in position.widths.items()],
            "notes": [[*key, notes] for key, notes in position.notes.items()],
            "sites": [asdict(site) for site in position.sites],
            "generator": bytes(position.generator.tolist()).hex(),
            "folder": name,
            "hidden": {number: data for part, _ in every for number, data in part.items()},
            "written": {layer: digest for _, part in every for layer, digest in part.items()},
        }
        if self._ranks.rank == 0:
            found = {f"{layer}.{kind}": f for (layer, kind), f in position.findings.items()}
            save_file(found, folder / FINDINGS)
            sync_path(folder / FINDINGS)
            sync_path(folder)
            self._job.journal.write(entry)
            for old in self._job.folder.glob("hidden-*"):
                if old.name != name:
                    shutil.rmtree(old, ignore_errors=True)
        self._ranks.barrier()
        self._entry = entry
        self._last = time.monotonic()
        # where the disk is slow, entries are rarer
        self._wait = max(self._least, (self._last - began) / _SHARE) if self._least else 0.0


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
