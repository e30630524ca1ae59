"""First-order importance of whole layers: `Σ |w ∂L/∂w|` over a layer's parameters.

Reassessing Layer Pruning (arXiv 2411.15558) after LLM-Pruner (2305.11627): how much the loss would
change, to first order, if each parameter went by itself. L is the mean loss of the next token over
the windows, so a window of more tokens counts more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from liar_ext.calibration.batch import Batch
from liar_ext.depth.methods import METHODS
from liar_ext.engine.backward import BackwardPass
from liar_ext.engine.calls import layer_output
from liar_ext.engine.runtime import Runtime
from liar_ext.engine.shelf import Item
from liar_ext.recipe import Recipe


def taylor(runtime: Runtime, batches: Sequence[Batch], recipe: Recipe) -> list[float]:
    """Of each layer; its first `gradient_samples` windows are what the loss is of.

    Beside the layer that is open its gradient is in memory, float32.
    """
    asked = f"--depth {recipe.depth}" if recipe.depth else "--measures taylor"
    instead = [name for name, m in METHODS.items() if m.needs not in ("gradients", "losses")]
    backward = BackwardPass(runtime, batches, recipe.gradient_samples, 0, asked, instead)
    found: dict[int, float] = {}

    def visit(index: int, entered: Mapping[int, Item], upstream: dict[int, Item]) -> None:
        layer = runtime.layers[index]
        own = [parameter for parameter in layer.parameters() if parameter.is_floating_point()]
        sums = [torch.zeros(p.shape, dtype=torch.float32, device=p.device) for p in own]
        for number, item in entered.items():
            with runtime.clock.phase("backward"):
                hidden = item.fetch().detach().requires_grad_()
                call = backward.stream.call(number, index)
                with torch.enable_grad(), _asking(own):
                    output = layer_output(layer, hidden, call)
                    entering, *gradients = torch.autograd.grad(
                        output, [hidden, *own], upstream[number].fetch(), allow_unused=True
                    )
                for total, gradient in zip(sums, gradients, strict=True):
                    if gradient is not None:
                        total += gradient
            with runtime.clock.phase("hold"):
                item.free()
                upstream[number].free()
                upstream[number] = runtime.shelf.put(entering)
        with runtime.clock.phase("backward"):
            found[index] = _first_order(own, sums, runtime)

    backward.run(visit)
    predicted = backward.facts["predicted_tokens"]
    return [found[index] / predicted for index in range(len(runtime.layers))]


def _first_order(own: Sequence[nn.Parameter], sums: Sequence[Tensor], runtime: Runtime) -> float:
    total = torch.zeros((), dtype=torch.float64, device=runtime.device)
    for parameter, gradient in zip(own, sums, strict=True):
        runtime.ranks.sum_(gradient)
        total += (parameter.float() * gradient).abs_().sum(dtype=torch.float64)
    return float(total)


class _asking:
    """Parameters ask for gradients inside."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = [p for p in parameters if not p.requires_grad]

    def __enter__(self) -> None:
        for parameter in self._parameters:
            parameter.requires_grad_(True)

    def __exit__(self, *exception: object) -> None:
        for parameter in self._parameters:
            parameter.requires_grad_(False)
