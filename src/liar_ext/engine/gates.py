"""Gates on the units of Sites: what multiplies their columns of the consumers' inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from liar_ext.models import Site


class Gates:
    """Those of some Sites of a layer while `gated` is open.

    Attributes:
        values: (units,) of each Site in order, on the device; with `requires_grad`, autograd goes
            through them. None is no gates: the layer is as it is.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = sites
        self.values: Sequence[Tensor] | None = None

    def applied(self, place: int, x: Tensor) -> Tensor:
        """`x` (..., columns) of a Site's consumer with its gates on, in the dtype of `x`."""
        if self.values is None:
            return x
        gate = self.values[place].to(x.dtype)
        return x * gate.repeat_interleave(self.sites[place].columns_per_unit)


@contextmanager
def gated(sites: Sequence[Site]) -> Iterator[Gates]:
    """Gates that forwards through these Sites' layer get, as long as it is open."""
    gates = Gates(sites)

    def hook_of(place: int) -> object:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (gates.applied(place, args[0]), *args[1:])

        return hook

    handles = [
        site.consumer.register_forward_pre_hook(hook_of(place))  # type: ignore[arg-type]
        for place, site in enumerate(sites)
    ]
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()
