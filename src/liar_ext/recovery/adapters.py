"""Low-rank adapters (LoRA) on the linears of all layers, by PEFT, with a rank for each layer."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from liar_ext.depth.surgery import layer_list
from liar_ext.errors import InputError
from liar_ext.models import linear

NAME = "default"
# scaling of an adapter is alpha / rank: the same for every rank
ALPHA = 2


@dataclass(frozen=True)
class Targets:
    """What adapters are put on.

    Attributes:
        path: of the list of layers; linears: names of the modules, layer by layer.
        costs: parameters of an adapter of rank 1 in each layer, Σ (in + out) over its linears.
            0 of a layer that has lost its attention and its FFN: it has none.
        largest: the rank beyond which no linear of a layer gains anything.
        transposed: weights are stored as (in, out), as GPT-2 does.
    """

    path: str
    linears: tuple[tuple[str, ...], ...]
    costs: tuple[int, ...]
    largest: tuple[int, ...]
    transposed: bool

    @property
    def able(self) -> tuple[int, ...]:
        """The layers that have a linear."""
        return tuple(layer for layer, own in enumerate(self.linears) if own)

    def everywhere(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """Ranks of the `able` layers as ranks of all, 0 of the others."""
        own = dict(zip(self.able, ranks, strict=True))
        return tuple(own.get(layer, 0) for layer in range(len(self.linears)))

    def parameters(self, ranks: Sequence[int]) -> int:
        return sum(rank * cost for rank, cost in zip(ranks, self.costs, strict=True))


def targets_of(model: PreTrainedModel) -> Targets:
    """All linears of all layers, attention and FFN; `model` may be on `meta`.

    Raises:
        InputError: no layer has any, or they are stored in two ways.
    """
    path, layers = layer_list(model)
    names, costs, largest = [], [], []
    kinds = set()
    for index, layer in enumerate(layers):
        found = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        shapes = [linear.weight(module).shape for module in found.values()]
        kinds |= {isinstance(module, Conv1D) for module in found.values()}
        names.append(tuple(f"{path}.{index}.{name}" for name in found))
        costs.append(sum(sum(shape) for shape in shapes))
        largest.append(max((min(shape) for shape in shapes), default=0))
    if not kinds:
        raise InputError(f"{path}: has no linear that an adapter can be put on")
    if len(kinds) > 1:
        raise InputError(f"{path}: has linears of two kinds; adapters need one")
    return Targets(path, tuple(names), tuple(costs), tuple(largest), kinds == {True})


def patterns(path: str, ranks: Sequence[int]) -> dict[str, int]:
    """A regular expression for the modules of each layer, and its rank.

    PEFT matches these at the end of a name and behind any dotted prefix; dots are escaped and the
    index ends with one, so that layer 1 is not layer 11.
    """
    return {rf"{re.escape(f'{path}.{index}.')}.+": rank for index, rank in enumerate(ranks) if rank}


def peft_config(targets: Targets, ranks: Sequence[int]) -> Any:
    """PEFT's `LoraConfig` for a rank in each layer; a layer of rank 0 has no adapter.

    Raises:
        InputError: PEFT is not installed, or ranks are no ranks of these layers.
    """
    idle = [rank for rank, own in zip(ranks, targets.linears, strict=False) if not own]
    if len(ranks) != len(targets.linears) or min(ranks) < 0 or not any(ranks) or any(idle):
        raise InputError(f"ranks {list(ranks)}: the model has {len(targets.linears)} layers")
    by_layer = patterns(targets.path, ranks)
    usual = max(set(ranks) - {0}, key=list(ranks).count)
    return peft().LoraConfig(
        r=usual,
        lora_alpha=ALPHA * usual,
        target_modules=[
            name for own, rank in zip(targets.linears, ranks, strict=True) if rank for name in own
        ],
        rank_pattern=by_layer,
        alpha_pattern={pattern: ALPHA * rank for pattern, rank in by_layer.items()},
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=targets.transposed,
        task_type="CAUSAL_LM",
    )


@contextmanager
def adapted(
    model: PreTrainedModel, targets: Targets, ranks: Sequence[int], seed: int
) -> Iterator[tuple[Any, list[str]]]:
    """The model with adapters that change nothing yet; taken off again in the end.

    `A` is uniform in ±1/√in, `B` is zero, as PEFT's own, but drawn on the CPU: the seed gives the
    same on every device. Both are float32, whatever the model is.

    Yields:
        PEFT's model around `model`, and the names of the adapters' parameters in `model`.
    Raises:
        InputError: as `peft_config`; or PEFT has put adapters elsewhere.
    """
    config = peft_config(targets, ranks)
    asking = {name: p.requires_grad for name, p in model.named_parameters()}
    with warnings.catch_warnings():
        # of transformers, about what PEFT asks it
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = peft().get_peft_model(model, config, adapter_name=NAME)
    try:
        generator = torch.Generator().manual_seed(seed)
        names = []
        for name, parameter in model.named_parameters():
            if f".lora_A.{NAME}." not in name and f".lora_B.{NAME}." not in name:
                continue
            names.append(name)
            parameter.data = parameter.data.float()
            if ".lora_A." in name:
                drawn = torch.empty(parameter.shape)
                nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
                parameter.data.copy_(drawn)
        found = {name for name, _ in _adapters(model)}
        # the config has shorter names by now
        wanted = {n for own, r in zip(targets.linears, ranks, strict=True) if r for n in own}
        if found != wanted:
            raise InputError(
                f"PEFT has put adapters on {len(found)} modules where {len(wanted)} are linears of "
                f"layers, as {next(iter(found ^ wanted))}"
            )
        yield wrapped, names
    finally:
        wrapped.unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(asking[name])


@torch.no_grad()
def changes(model: PreTrainedModel) -> dict[str, Tensor]:
    """What the adapters add to each weight, `α/r B A`, float32 on the CPU, in the layout of the
    file; by the weight's name without adapters."""
    return {
        f"{name}.weight": module.get_delta_weight(NAME).float().cpu()
        for name, module in _adapters(model)
    }


def ranks_in(model: PreTrainedModel) -> dict[str, int]:
    """The rank of every adapter that a model has, by the name of its module."""
    return {name: int(module.r[NAME]) for name, module in _adapters(model)}


def _adapters(model: PreTrainedModel) -> list[tuple[str, Any]]:
    layer = peft().tuners.lora.LoraLayer
    return [(name, module) for name, module in model.named_modules() if isinstance(module, layer)]


def peft() -> Any:
    """The package.

    Raises:
        InputError: it is not installed.
    """
    try:
        import peft as found
    except ImportError as error:
        raise InputError(
            "--method lora: needs the package 'peft'; install it (pip install 'liar-ext[recover]', "
            "or pip install peft), or use --method partial"
        ) from error
    return found
