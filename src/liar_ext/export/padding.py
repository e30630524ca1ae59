"""Zero units: a layer with fewer units as one with more, the same function.

A unit whose producer rows are zero gives what zeros give, and whose consumer columns are zero adds
nothing, whatever that is. What a width of its own is kept for beside these (a norm over all heads)
would see the zeros: such a tensor has another shape in the wider model, and is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from liar_ext.errors import InputError
from liar_ext.models import adapter_for
from liar_ext.models.adapter import Adapter
from liar_ext.models.site import SiteSpec


@dataclass(frozen=True)
class Widening:
    """What makes a tensor of the narrow model one of the wide model.

    Attributes:
        dim: along which zeros are put in; parts: equal runs along it, in shares (1, 1, 1 for q, k
            and v that are fused), each of which gets its zeros behind it.
    """

    dim: int
    parts: tuple[int, ...] = (1,)

    def pieces(self, narrow: Tensor, shape: Sequence[int]) -> Iterator[Tensor]:
        """The parts and their zeros, in order along `dim`; their concatenation has this shape.

        Raises:
            ValueError: widths that are no multiples of the parts.
        """
        total = sum(self.parts)
        own, wanted = narrow.shape[self.dim], shape[self.dim]
        if own % total or wanted % total:
            raise ValueError(f"{own} and {wanted} are not {total} equal runs")
        for part, share in zip(
            narrow.split([own // total * share for share in self.parts], self.dim),
            self.parts,
            strict=True,
        ):
            yield part
            zeros = list(narrow.shape)
            zeros[self.dim] = (wanted - own) // total * share
            yield narrow.new_zeros(zeros)

    def __call__(self, narrow: Tensor, shape: Sequence[int]) -> Tensor:
        """The tensor of the wide model."""
        return torch.cat(list(self.pieces(narrow, shape)), self.dim).contiguous()


def widenings(model: PreTrainedModel) -> dict[str, Widening]:
    """How the tensors of all Sites are widened, by name in the model.

    Args:
        model: the wide one: its layers have all Sites.
    """
    adapter = adapter_for(model.config)
    path, layers = adapter.layer_list(model)
    found: dict[str, Widening] = {}
    for index, layer in enumerate(layers):
        for spec in adapter.sites:
            for name, own in _of_site(spec, layer).items():
                found[f"{path}.{index}.{name}"] = own
    return found


def _of_site(spec: SiteSpec, layer: nn.Module) -> dict[str, Widening]:
    found: dict[str, Widening] = {}
    shares: dict[str, list[tuple[int, int, int]]] = {}
    for producer in spec.producers:
        run = producer.segment, producer.length, producer.segments
        shares.setdefault(producer.path, []).append(run)
    for path, runs in shares.items():
        runs.sort()
        parts = tuple(length for _, length, _ in runs)
        if sum(parts) != runs[0][2]:
            raise InputError(
                f"{path}: has rows that are not the Site's; it cannot be padded exactly"
            )
        transposed = isinstance(layer.get_submodule(path), Conv1D)
        found[f"{path}.weight"] = Widening(1 if transposed else 0, parts)
        found[f"{path}.bias"] = Widening(0, parts)
    transposed = isinstance(layer.get_submodule(spec.consumer), Conv1D)
    found[f"{spec.consumer}.weight"] = Widening(0 if transposed else 1)
    return found


def absent_values(model: PreTrainedModel, gone: Sequence[Mapping[str, int]]) -> dict[str, float]:
    """Tensors of blocks that the narrow model does not have: name in the wide model -> its value.

    Weights and biases of linears are zero; what else there is (norms) may be anything finite, and
    is 1 where it multiplies.

    Args:
        model: the wide one; gone: units of each layer of the narrow one.
    """
    adapter = adapter_for(model.config)
    path, layers = adapter.layer_list(model)
    found: dict[str, float] = {}
    for index, (layer, units) in enumerate(zip(layers, gone, strict=True)):
        for spec in _gone(adapter, units):
            assert spec.block is not None
            consumer = f"{spec.consumer}.bias"
            for name, parameter in layer.named_parameters():
                inside = name.startswith((f"{spec.block.path}.", f"{spec.block.norm}."))
                # a bias that the consumer has left is in the files
                if inside and name != consumer:
                    scales = parameter.ndim == 1 and name.endswith("weight")
                    found[f"{path}.{index}.{name}"] = 1.0 if scales else 0.0
    return found


def _gone(adapter: Adapter, units: Mapping[str, int]) -> list[SiteSpec]:
    return [spec for spec in adapter.sites if spec.block is not None and not units[spec.kind]]
