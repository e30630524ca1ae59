"""A second module tree over the same tensors."""

from __future__ import annotations

import copy
import itertools
from typing import TypeVar

from torch import nn

Tree = TypeVar("Tree", bound=nn.Module)


def twin(module: Tree) -> Tree:
    """A module tree of its own over the same tensors.

    Pruning replaces tensors and writes into none, so a pruned twin costs the memory of what is
    left of the pruned layers, and the original stays as it is.
    """
    shared = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})
