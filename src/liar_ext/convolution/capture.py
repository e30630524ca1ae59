"""What passes chosen places of a network while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

Place = tuple[nn.Module, Literal["input", "output"]]


class _SeenAll(Exception):
    """Everything that was asked for has passed: the rest of the forward is not needed."""


@torch.no_grad()
def captured(
    call: Callable[[Tensor], Any], x: Tensor, places: Mapping[str, Place]
) -> dict[str, Tensor]:
    """Run a network up to the last of some places.

    Args:
        call: the network; x: (n, channels, h, w).
        places: modules, and whether what goes in or what comes out is wanted.
    Returns:
        the tensors, by the names of their places.
    """
    seen: dict[str, Tensor] = {}

    def note(name: str, value: Tensor) -> None:
        seen[name] = value
        if len(seen) == len(places):
            raise _SeenAll

    def before(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: note(name, args[0])

    def after(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, args, output: note(name, output)

    with ExitStack() as stack:
        for name, (module, which) in places.items():
            if which == "input":
                handle = module.register_forward_pre_hook(before(name))
            else:
                handle = module.register_forward_hook(after(name))
            stack.callback(handle.remove)
        try:
            call(x)
        except _SeenAll:
            return seen
    missing = ", ".join(sorted(places.keys() - seen.keys()))
    raise RuntimeError(f"the network ended without passing {missing}")
