"""How little spans of layers turn their hidden states: one pass over the model, layer by layer.

What leaves the last layer is compared as the layer leaves it, in front of the model's final norm
(`hidden_states[-1]` of transformers is behind it, and would make the last span look worse).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import torch

from liar_ext.calibration.batch import Batch
from liar_ext.engine.runtime import Runtime
from liar_ext.engine.shelf import Item, free_all
from liar_ext.engine.statistics import StateSimilarity, Turn


@torch.no_grad()
def turns(
    runtime: Runtime, batches: Sequence[Batch], spans: Sequence[int]
) -> dict[int, list[Turn]]:
    """Of every span of so many layers, by its length and then by its first layer.

    The states that enter the last `max(spans)` layers wait on the shelf, no others.

    Args:
        spans: lengths, 1 to the number of layers.
    """
    stream = runtime.stream(batches)
    runtime.embed(stream)
    layers, longest = len(runtime.layers), max(spans)
    found: dict[int, list[Turn]] = {span: [] for span in spans}
    # what entered the layers up to the present one, the last of them last
    entered: deque[Mapping[int, Item]] = deque()
    runtime.progress.begin(layers, "comparing hidden states")
    for index in range(layers):
        runtime.open(index)
        later = stream.through(index, (), onward=True)
        runtime.close(index)
        entered.append(stream.hidden)
        for span in spans:
            if span <= len(entered):
                similarity = StateSimilarity(runtime.device)
                for number in stream.batches:
                    with runtime.clock.phase("hold"):
                        before, after = entered[-span][number].fetch(), later[number].fetch()
                    with runtime.clock.phase("gram"):
                        similarity.add(
                            before, after, stream.valid(number, index), stream.segment(number)
                        )
                found[span].append(similarity.finish(runtime.ranks))
        if len(entered) == longest:
            free_all(entered.popleft())
        stream.hidden = later
        runtime.progress.layer(index)
    for states in entered:
        free_all(states)
    stream.advance({})
    return found
