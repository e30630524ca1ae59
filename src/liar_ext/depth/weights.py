"""How large the weights of each layer are: a pass over the checkpoint without tokens."""

from __future__ import annotations

import torch

from liar_ext.engine.runtime import Runtime


@torch.no_grad()
def magnitudes(runtime: Runtime, power: int) -> list[float]:
    """`Σ |w|^power` over all parameters of each layer, float64 sums.

    Args:
        power: 1 or 2.
    """
    layers = len(runtime.layers)
    runtime.progress.begin(layers, "weighing layers")
    found = []
    for index in range(layers):
        runtime.open(index)
        with runtime.clock.phase("gram"):
            total = torch.zeros((), dtype=torch.float64, device=runtime.device)
            for parameter in runtime.layers[index].parameters():
                values = parameter.float()
                powers = values.abs() if power == 1 else values.square()
                # by rows: a float64 copy of a whole matrix is not needed, and a float32 sum of one
                # would lose digits
                total += (
                    powers.flatten(1).sum(1).double().sum()
                    if powers.dim() > 1
                    else (powers.double().sum())
                )
            found.append(float(total))
        runtime.close(index)
        runtime.progress.layer(index)
    return found
