"""The checkpoints that jobs read, looked at before any job starts."""

from __future__ import annotations

import os

from transformers import PreTrainedModel

from liar_ext.checkpoint.load import resolve
from liar_ext.checkpoint.reader import read_config
from liar_ext.engine.compress import dense_checkpoint
from liar_ext.engine.compression import check_model
from liar_ext.engine.store import InMemory
from liar_ext.errors import InputError
from liar_ext.jobs import BatchJob
from liar_ext.models import adapter_for, layout


class Sources:
    """Called with a job: raises InputError for a source that `liar prune` would refuse.

    Of a folder all that needs no weights: the config, the family, every file and what tensors it
    should have; and whether the model can do what the recipe asks. Of a hub id `config.json` is
    fetched. Each source is read once.
    """

    def __init__(self) -> None:
        self._found: dict[str, PreTrainedModel | InputError] = {}

    def __call__(self, job: BatchJob) -> None:
        if job.reads not in self._found:
            try:
                self._found[job.reads] = _empty(job.source)
            except InputError as error:
                self._found[job.reads] = error
        found = self._found[job.reads]
        if isinstance(found, InputError):
            raise found
        check_model(InMemory(found), job.recipe)


def _empty(source: str) -> PreTrainedModel:
    """The model of a source on `meta`."""
    folder = resolve(source, config_only=True)
    if os.path.isdir(source):
        return dense_checkpoint(folder)[1]
    config = layout.config_object(read_config(folder))
    adapter_for(config)
    return layout.empty_model(config)
