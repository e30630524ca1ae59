"""What each segment is worth and takes: the two tables that a plan is made of (LayerMerge,
2406.12837, section 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from liar_ext.bench.measure import interleave
from liar_ext.convolution.chain import Segment
from liar_ext.convolution.images import Images
from liar_ext.convolution.journal import TableFile
from liar_ext.convolution.latency import (
    ROUNDS,
    Work,
    call_of,
    network_call,
    seconds_of,
    works_of,
)
from liar_ext.convolution.measure import Dense, Quality, input_shapes, quality
from liar_ext.convolution.plan import Option
from liar_ext.convolution.settings import FuseSettings
from liar_ext.convolution.training import finetune
from liar_ext.engine.progress import Progress

STOCK, FOLDED = "network stock", "network folded"
# what a network is said to add to the loss whose loss is not finite: JSON has no infinity
BROKEN = 1e6


def worth(kind: str, found: Quality, dense: Quality) -> float:
    """I of a segment from what the network makes of the held-out images with it alone replaced.

    `loss`: what it adds to the loss, negative. `accuracy`: what it adds to the accuracy. `paper`:
    `exp(accuracy − dense accuracy)`, which is about 1 for a segment that does no harm: a plan of
    more segments is worth more by their number alone.
    """
    if kind == "loss":
        return -(found.loss - dense.loss)
    change = found.accuracy - dense.accuracy
    return math.exp(change) if kind == "paper" else change


def is_dense(dense: Dense, segment: Segment) -> bool:
    """Whether a segment is a node as it was."""
    return segment in dense.chain.dense


def measure_importance(
    dense: Dense,
    segments: Sequence[Segment],
    held_out: Images,
    settings: FuseSettings,
    table: TableFile,
    progress: Progress,
) -> Quality:
    """Put each segment into the network alone, refit it, train it if asked, and look.

    Returns:
        what the dense network has; each segment's is in the table.
    """
    reached = quality(dense.model, held_out, settings.batch_size)
    asked = [s for s in segments if not is_dense(dense, s)]
    left = [s for s in asked if s.key not in table.importance]
    progress.begin(len(asked), "importance", len(asked) - len(left))
    for number, segment in enumerate(left, len(asked) - len(left)):
        found = _measured(dense, segment, held_out, settings, reached)
        table.add({"segment": segment.key, "importance": found})
        progress.layer(number)
    return reached


def _measured(
    dense: Dense, segment: Segment, held_out: Images, settings: FuseSettings, reached: Quality
) -> dict[str, Any]:
    plan = dense.around(segment)
    model = dense.replaced(plan)
    facts = dense.repair(model, plan, segment) if settings.repair == "liar" else None
    if settings.table_steps:
        finetune(
            *(model, dense.batches, settings, settings.table_steps),
            only=dense.parameters(model, plan, segment),
        )
    found = quality(model, held_out, settings.batch_size)
    loss = found.loss if math.isfinite(found.loss) else reached.loss + BROKEN
    return {"kept": list(segment.kept), "loss": loss, "accuracy": found.accuracy, "repair": facts}


def measure_latency(
    dense: Dense,
    stock: PreTrainedModel,
    segments: Sequence[Segment],
    size: Sequence[int],
    settings: FuseSettings,
    table: TableFile,
    progress: Progress,
) -> dict[Segment, list[Work]]:
    """Time all there is to time: every round has each work once, and the whole network as it came
    (`STOCK`) and with its batch norms folded in (`FOLDED`). Samples are in the table.

    Returns:
        what each segment costs.
    Raises:
        InputError: what the table has already is of something else.
    """
    sizes = input_shapes(dense, size)
    works = {segment: works_of(dense.chain, segment, sizes) for segment in segments}
    every = {work.name: work for found in works.values() for work in found}
    # before anything is made of what is there, or added to it
    table.check([s for s in segments if not is_dense(dense, s)], [*every, STOCK, FOLDED])
    first, batch = next(dense.model.parameters()), settings.batch_size
    done = sum(len(part[FOLDED]) for part in table.rounds)
    progress.begin(settings.repeats, "latency", min(done, settings.repeats))
    if done >= settings.repeats:
        return works
    calls = {name: call_of(work, batch, first.device, first.dtype) for name, work in every.items()}
    calls[STOCK] = network_call(stock, size, batch)
    calls[FOLDED] = network_call(dense.model, size, batch)
    while done < settings.repeats:
        rounds = min(ROUNDS, settings.repeats - done)
        table.add({"latency": interleave(calls, rounds, first.device)})
        for number in range(done, done + rounds):
            progress.layer(number)
        done += rounds
    return works


def options_of(
    dense: Dense,
    works: dict[Segment, list[Work]],
    reached: Quality,
    settings: FuseSettings,
    table: TableFile,
) -> list[Option]:
    """The tables as the programme takes them."""
    samples = table.samples()
    found = []
    for segment, own in works.items():
        if is_dense(dense, segment):
            there = reached
        else:
            entry = table.importance[segment.key]
            there = Quality(entry["loss"], entry["accuracy"])
        value = worth(settings.importance, there, reached)
        found.append(Option(*segment.key, value, seconds_of(own, samples)))
    return found
