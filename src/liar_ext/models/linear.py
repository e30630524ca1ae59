"""One view of the two linear layers of transformers: `nn.Linear` and GPT-2's `Conv1D`.

`Conv1D` stores its weight as (in, out); everything else in this package speaks of (out, in).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def weight(module: nn.Module) -> Tensor:
    """The weight as (out, in); a view, so writing to it writes to the module."""
    data = module.weight.detach()
    return data.T if isinstance(module, Conv1D) else data


def set_weight(module: nn.Module, value: Tensor) -> None:
    """Replace the weight by `value` (out, in), keeping dtype, device and the storage order."""
    old = module.weight
    stored = value.T if isinstance(module, Conv1D) else value
    module.weight = nn.Parameter(
        stored.to(device=old.device, dtype=old.dtype).contiguous(), requires_grad=old.requires_grad
    )
    out_features, in_features = value.shape
    if isinstance(module, Conv1D):
        module.nf, module.nx = out_features, in_features
    else:
        module.out_features, module.in_features = out_features, in_features


def set_bias(module: nn.Module, value: Tensor) -> None:
    """Replace or create the bias (out,)."""
    like = module.weight
    trainable = like.requires_grad if module.bias is None else module.bias.requires_grad
    module.bias = nn.Parameter(
        value.to(device=like.device, dtype=like.dtype).contiguous(), requires_grad=trainable
    )


def keep_rows(module: nn.Module, rows: Tensor) -> None:
    """Keep the output features `rows` of weight and bias."""
    rows = rows.to(module.weight.device)
    bias = None if module.bias is None else module.bias.detach()
    set_weight(module, weight(module).index_select(0, rows))
    if bias is not None:
        set_bias(module, bias.index_select(0, rows))


def add_zero_bias(module: nn.Module) -> None:
    """Give the module a bias of zeros if it has none: the function does not change."""
    if module.bias is None:
        set_bias(module, torch.zeros(weight(module).shape[0], device=module.weight.device))
