"""One view of the two linear layers of transformers: `nn.Linear` and GPT-2's `Conv1D`.

`Conv1D` stores its weight as (in, out); everything else in this package speaks of (out, in).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def linears(module: nn.Module) -> list[nn.Module]:
    """All linear layers inside a module, in its own order."""
    return [m for m in module.modules() if isinstance(m, nn.Linear | Conv1D)]


def weight(module: nn.Module) -> Tensor:
    """The weight as (out, in); a view, so writing to it writes to the module."""
    data = _stored(module).detach()
    return data.T if isinstance(module, Conv1D) else data


def bias(module: nn.Module) -> Tensor | None:
    """The bias (out,), or None."""
    parameter = cast("nn.Parameter | None", module.bias)
    return None if parameter is None else parameter.detach()


def set_weight(module: nn.Module, value: Tensor) -> None:
    """Replace the weight by `value` (out, in), keeping dtype, device and the storage order."""
    old = _stored(module)
    stored = value.T if isinstance(module, Conv1D) else value
    stored = stored.to(device=old.device, dtype=old.dtype).contiguous()
    module.weight = nn.Parameter(stored, requires_grad=old.requires_grad)
    names = ("nf", "nx") if isinstance(module, Conv1D) else ("out_features", "in_features")
    for name, size in zip(names, value.shape, strict=True):
        setattr(module, name, size)


def set_bias(module: nn.Module, value: Tensor) -> None:
    """Replace or create the bias (out,)."""
    like = _stored(module)
    stored = value.to(device=like.device, dtype=like.dtype).contiguous()
    module.bias = nn.Parameter(stored, requires_grad=like.requires_grad)


def keep_rows(module: nn.Module, rows: Tensor) -> None:
    """Keep the output features `rows` of weight and bias."""
    rows = rows.to(_stored(module).device)
    old = bias(module)
    set_weight(module, weight(module).index_select(0, rows))
    if old is not None:
        set_bias(module, old.index_select(0, rows))


def add_zero_bias(module: nn.Module) -> None:
    """Give the module a bias of zeros if it has none: the function does not change."""
    if bias(module) is None:
        set_bias(module, torch.zeros(weight(module).shape[0]))


def fed(module: nn.Module, x: Tensor) -> Tensor:
    """What to call a linear with in the place of its input (..., columns).

    The input itself, but for a `Conv1D` that has no columns any more, which cannot be called: its
    weight becomes one row of zeros, in place, and what it is called with one column of them.
    """
    if x.shape[-1] or not isinstance(module, Conv1D):
        return x
    if not module.weight.shape[0]:
        set_weight(module, torch.zeros(weight(module).shape[0], 1))
    return x.new_zeros(*x.shape[:-1], 1)


def _stored(module: nn.Module) -> nn.Parameter:
    return cast(nn.Parameter, module.weight)
