"""The two ways of training a pruned model a little: its last layers, or adapters on all of them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from liar_ext.calibration.batch import Batch
from liar_ext.checkpoint.load import load, resolve
from liar_ext.checkpoint.reader import CheckpointReader
from liar_ext.engine.progress import Progress
from liar_ext.errors import InputError
from liar_ext.models import text_config
from liar_ext.recovery.adapters import Targets, adapted, changes, targets_of
from liar_ext.recovery.entering import Entering
from liar_ext.recovery.language import next_token_loss
from liar_ext.recovery.rank_budget import allocate
from liar_ext.recovery.rank_search import Ranks, TrialJournal, search
from liar_ext.recovery.residuals import gains, kept_layers
from liar_ext.recovery.settings import Recovery
from liar_ext.recovery.state import TrainingState
from liar_ext.recovery.text import Drawn, fitting
from liar_ext.recovery.train import Training, train
from liar_ext.recovery.upper import first_trained, untied, upper_parameters
from liar_ext.report.schema import FILE, read_data

# of the text that is trained on, to compare the dense and the pruned model on
RESIDUAL_WINDOWS = 128
# an adapter of a layer has at most so many times the uniform rank
MOST = 4


@dataclass(frozen=True)
class Subject:
    """What is trained, and where its training is kept.

    Attributes:
        folder: the source; model: of it, on the device, in eval mode.
        state: of the training; its folder has all else that is to be gone on from.
    """

    folder: Path
    model: PreTrainedModel
    recovery: Recovery
    drawn: Drawn
    state: TrainingState
    progress: Progress


@dataclass
class Outcome:
    """Attributes:

    training: what happened; parameters: how many were trained.
    tensors: of the result by name, on the CPU in the dtype of the files, where they are not those
        of the source.
    facts: what belongs to the method, for a report.
    """

    training: Training
    parameters: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)


def partial(subject: Subject, scratch: Path) -> Outcome:
    """The last layers, what is behind them, and the head.

    Args:
        scratch: folder for hidden states, which can be lost.
    """
    model, recovery = subject.model, subject.recovery
    stored = _stored(subject)
    own_head = untied(model) if recovery.untie else None
    layers = text_config(model.config).num_hidden_layers
    first = first_trained(layers, recovery.last)
    names = upper_parameters(model, recovery.last, head=recovery.head)
    loss = next_token_loss(model)
    facts: dict[str, Any] = {"trained_layers": list(range(first, layers))}
    with open(scratch / "states", "w+b") as file:
        entering = None
        if first:
            entering = Entering(model, first, file if recovery.cache_states else None)
            loss = entering.under(loss)
        found = _train(subject, names, loss)
        if entering is not None:
            facts |= {"windows_below": entering.runs, "state_bytes": entering.bytes}
    (scratch / "states").unlink()
    known = dict(model.named_parameters())
    if own_head is not None:
        # of the embeddings that it is a copy of
        embeddings = model.get_input_embeddings().weight
        stored[own_head] = next(stored[n] for n, p in known.items() if p is embeddings)
    tensors = {name: fitting(name, known[name].detach(), stored[name]) for name in names}
    facts["names"] = names
    return Outcome(found, sum(t.numel() for t in tensors.values()), tensors, facts)


def low_rank(subject: Subject, adapter: Path | None) -> Outcome:
    """Adapters on all linears of all layers, merged into them.

    Args:
        adapter: folder to write them to as well, as PEFT does.
    """
    model, recovery = subject.model, subject.recovery
    targets = targets_of(model)
    stored = _stored(subject)
    ranks, facts = _ranks(subject, targets)
    seed = recovery.schedule.seed
    with adapted(model, targets, ranks, seed) as (wrapped, names):
        found = _train(subject, names, next_token_loss(model))
        added = changes(model)
        if adapter is not None:
            wrapped.save_pretrained(adapter, save_embedding_layers=False)
    reader = CheckpointReader(subject.folder)
    reader.bind(model)
    tensors = {}
    for name, change in added.items():
        # in float32 at least, and rounded once
        before = reader.get(name)
        wide = torch.promote_types(before.dtype, torch.float32)
        tensors[name] = fitting(name, before.to(wide) + change, stored[name])
    return Outcome(found, targets.parameters(ranks), tensors, {"ranks": list(ranks), **facts})


def _train(subject: Subject, names: list[str], loss: Callable[[Batch], Any]) -> Training:
    drawn = subject.drawn
    return train(
        *(subject.model, names, drawn.windows, loss, subject.recovery.schedule),
        held_out=drawn.held_out,
        state=subject.state,
        progress=subject.progress,
    )


def _stored(subject: Subject) -> dict[str, torch.dtype]:
    """The dtype of each parameter in the files."""
    reader = CheckpointReader(subject.folder)
    reader.bind(subject.model)
    names = (name for name, _ in subject.model.named_parameters())
    return {name: reader.dtype(name) for name in names if name in reader}


def _ranks(subject: Subject, targets: Targets) -> tuple[Ranks, dict[str, Any]]:
    recovery = subject.recovery
    if recovery.ranks == "uniform":
        return targets.everywhere([recovery.rank] * len(targets.able)), {}
    if recovery.ranks == "residual":
        return _by_residuals(subject, targets)
    return _by_performance(subject, targets)


def _by_residuals(subject: Subject, targets: Targets) -> tuple[Ranks, dict[str, Any]]:
    model, recovery = subject.model, subject.recovery
    assert recovery.dense is not None
    folder = resolve(recovery.dense)
    _refuse_other(subject.folder, folder)
    kept = kept_layers(
        subject.folder, CheckpointReader(folder).config, CheckpointReader(subject.folder).config
    )
    dense = load(folder, dtype=model.dtype, device=model.device)
    for name in ("hidden_size", "vocab_size"):
        own, other = (getattr(text_config(m.config), name) for m in (model, dense))
        if own != other:
            raise InputError(
                f"--dense {recovery.dense}: its {name} is {other}, and {own} in {subject.folder}; "
                "give the model that this one was pruned from"
            )
    most = [min(own, MOST * recovery.rank) for own in targets.largest]
    windows = subject.drawn.windows
    places = torch.arange(min(len(windows.input_ids), RESIDUAL_WINDOWS))
    batches = [windows.rows(part) for part in places.split(recovery.schedule.batch_size)]
    found = gains(dense, model, kept, batches, most)
    del dense
    budget = recovery.rank * sum(targets.costs)
    able = targets.able
    own_costs = [targets.costs[layer] for layer in able]
    ranks = targets.everywhere(allocate([found[layer] for layer in able], own_costs, budget))
    told = [float(own[rank]) for own, rank in zip(found, ranks, strict=True)]
    return ranks, {
        "budget": budget,
        "recoverable": {
            "at_rank": told,
            "at_uniform": [float(own[min(recovery.rank, len(own) - 1)]) for own in found],
            "at_most": [float(own[-1]) for own in found],
        },
    }


def _refuse_other(pruned: Path, dense: Path) -> None:
    """Raises InputError where `--dense` was pruned itself, and not what this one was made from."""
    if not (dense / FILE).exists() or not (pruned / FILE).exists():
        return
    source = read_data(pruned).get("source")
    if source is None or Path(source).expanduser().resolve() != dense.resolve():
        raise InputError(
            f"--dense {dense}: was pruned itself, and {pruned} was made from {source}; give the "
            "model that this one was pruned from"
        )


def _by_performance(subject: Subject, targets: Targets) -> tuple[Ranks, dict[str, Any]]:
    recovery, state = subject.recovery, subject.state
    how, schedule = recovery.search, recovery.schedule
    short = replace(schedule, steps=how.steps, evaluate_every=how.steps)
    journal = TrialJournal(state.trials, state.identity)
    model, loss = subject.model, next_token_loss(subject.model)

    def ask(number: int, own_ranks: Ranks) -> float:
        ranks = targets.everywhere(own_ranks)
        known = journal.get(ranks)
        if known is not None:
            return known
        own = TrainingState(
            state.folder / f"trial-{number:04d}", {**state.identity, "ranks": list(ranks)}
        )
        with adapted(model, targets, ranks, schedule.seed) as (_, names):
            try:
                told = train(
                    *(model, names, subject.drawn.windows, loss, short),
                    held_out=subject.drawn.held_out,
                    state=own,
                    progress=subject.progress,
                )
                found = told.held_out[-1]["loss"]
            except InputError as error:
                if "lower --lr" not in str(error):
                    raise
                # these ranks do not train at this rate; others may
                found = math.inf
        journal.add(ranks, found)
        own.remove()
        subject.progress.tell(f"trial {number + 1}: ranks {list(ranks)}, held-out loss {found:.4f}")
        return found

    costs = [targets.costs[layer] for layer in targets.able]
    found = search(ask, costs, recovery.rank, how, schedule.seed)
    tried = [(targets.everywhere(own), value) for own, value in found]
    ranks, best = min(tried, key=lambda entry: entry[1])
    if not math.isfinite(best):
        raise InputError("--ranks performance: no choice of ranks could be trained; lower --lr")
    for left in state.folder.glob("trial-*"):
        shutil.rmtree(left, ignore_errors=True)
    return ranks, {
        "budget": recovery.rank * sum(targets.costs),
        "trials": [
            {"ranks": list(own), "loss": value if math.isfinite(value) else None}
            for own, value in tried
        ],
    }
