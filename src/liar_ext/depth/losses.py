"""The loss of a model without some of its layers, for many choices of them at once.

All choices go through the layers together: a layer is read once, and choices that are the same up
to there share their hidden states. To leave out each of L layers once takes L (L + 1) / 2 − 1
forwards of a layer, not the L (L − 1) of as many models; what waits are the states of the choices
that differ so far.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from liar_ext.calibration.batch import Batch
from liar_ext.engine.loss import NO_TARGET, loss_sum, next_tokens
from liar_ext.engine.runtime import Runtime
from liar_ext.engine.shelf import Item, free_all
from liar_ext.errors import InputError

_States = dict[int, Item]


@torch.no_grad()
def losses_without(
    runtime: Runtime, batches: Sequence[Batch], choices: Sequence[Collection[int]]
) -> list[float]:
    """Mean cross-entropy of the next token, in nats, of the model without each choice of layers.

    Args:
        choices: layers that are left out; none is the whole model.
    Raises:
        InputError: the model has no loss of the next token, or there is nothing to predict.
    """
    if not runtime.predicts:
        raise InputError(
            f"loss without layers: {type(runtime.model).__name__} makes no logits of the next "
            "token with a plain head; go by hidden states instead, such as --depth shortgpt"
        )
    stream = runtime.stream(batches)
    runtime.embed(stream)
    layers = len(runtime.layers)
    runtime.progress.begin(layers, "trying without layers")
    wanted = [frozenset(choice) for choice in choices]
    # hidden states by the layers that were left out on the way there
    states: dict[frozenset[int], _States] = {frozenset(): stream.hidden}
    for index in range(layers):
        ahead = {frozenset(c for c in choice if c <= index) for choice in wanted}
        runtime.open(index)
        later: dict[frozenset[int], _States] = {}
        # those that pass by keep their states; the others' are freed once nobody passes by
        for left in list(states):
            if left in ahead:
                stream.hidden = states[left]
                later[left] = stream.through(index, (), onward=True)
            if left | {index} in ahead:
                later[left | {index}] = states[left]
            else:
                free_all(states[left])
        runtime.close(index)
        states = later
        runtime.progress.layer(index)
    stream.hidden = {}
    total = torch.zeros(len(states), 2, dtype=torch.float64, device=runtime.device)
    names = sorted(states, key=sorted)
    with runtime.head() as head:
        for at, left in enumerate(names):
            for number, item in states[left].items():
                batch = stream.batch(number)
                targets = next_tokens(batch).to(runtime.device)
                with runtime.clock.phase("forward"):
                    last = runtime.last_hidden(batch, item.fetch())
                    total[at, 0] += loss_sum(head, last, targets)
                    total[at, 1] += (targets != NO_TARGET).sum()
            free_all(states[left])
    runtime.ranks.sum_(total)
    if not bool(total[:, 1].all()):
        raise InputError(
            "loss without layers: the calibration windows have no next token to predict; give "
            "longer ones"
        )
    found = dict(zip(names, (total[:, 0] / total[:, 1]).tolist(), strict=True))
    return [found[choice] for choice in wanted]
