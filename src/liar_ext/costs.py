"""FLOPs, bytes and seconds of one compression, counted from shapes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from liar_ext.allocation import ALLOCATIONS
from liar_ext.models import Site, linear
from liar_ext.models.adapter import Adapter, text_config
from liar_ext.recipe import Recipe
from liar_ext.reconstruction import RECONSTRUCTIONS

# both dtypes are measured within one second, first calls included
MEASURE_SECONDS = 0.3
MEASURE_SIZE = {"cpu": 512, "cuda": 8192}


@dataclass(frozen=True)
class SitePlan:
    """One Site: widths as in the report, and the rows of its consumer and of its producers."""

    layer: int
    kind: str
    name: str
    units_before: int
    units_after: int
    columns_before: int
    columns_after: int
    outputs: int
    producer_rows: int


@dataclass(frozen=True)
class Tokens:
    """The calibration tokens.

    Attributes:
        tokens: valid ones; positions: with padding.
        samples: sequences; seq_len: tokens of the longest.
        counted: False when they are assumed from the recipe.
    """

    tokens: int
    positions: int
    samples: int
    seq_len: int
    counted: bool


def layer_flops(model: PreTrainedModel, adapter: Adapter, length: int) -> list[int]:
    """Forward FLOPs of each layer for one token of a sequence of `length`.

    Linears and the two attention products; norms, activations and softmax are not counted.
    """
    # causal attention reads half of the sequence on average
    context = (length + 1) / 2 if adapter.decoder else length
    found = []
    for index, layer in enumerate(adapter.layer_list(model)[1]):
        linears = [m for m in layer.modules() if isinstance(m, nn.Linear | Conv1D)]
        attended = sum(site.columns for site in adapter.sites_of(model, index, ("heads",)))
        found.append(int(2 * sum(m.weight.numel() for m in linears) + 4 * attended * context))
    return found


def head_flops(model: PreTrainedModel) -> int:
    """FLOPs of the output embedding for one token; 0 without one."""
    head = model.get_output_embeddings()
    return 0 if head is None else 2 * head.weight.numel()


def compression_flops(
    sites: Sequence[SitePlan], tokens: Tokens, forward: int, recipe: Recipe
) -> dict[str, int]:
    """FLOPs of one compression by what they are for.

    Args:
        forward: of one token through the layers that the compression runs.
    Returns:
        `forward`; `gram`, `n² T` for the triangle; `solve`, `s³/3 + 2 s² min(m, out)` and folding
        the result into the weight; `residual`, the report's diagnostic.
    """
    solves = RECONSTRUCTIONS[recipe.reconstruct].solves
    passes = 2 if ALLOCATIONS[recipe.allocation].needs_scores else 1
    solve = 0
    for s in sites:
        dropped = s.columns_before - s.columns_after
        if solves and dropped:
            solve += s.columns_after**3 // 3 + 2 * s.columns_after**2 * min(dropped, s.outputs)
            solve += 2 * s.outputs * s.columns_after * dropped
    return {
        "forward": passes * tokens.positions * forward,
        "gram": sum(s.columns_before**2 for s in sites) * tokens.tokens,
        "solve": solve,
        "residual": sum(2 * s.outputs * s.columns_before**2 for s in sites),
    }


def weight_bytes(model: PreTrainedModel, adapter: Adapter, item: int) -> dict[str, int]:
    """Bytes of the weights held at once: what runs before the layers, and the largest layer."""
    backbone = adapter.backbone(model)[1]
    layers = [_parameters(layer) for layer in adapter.layer_list(model)[1]]
    return {"embeddings": (_parameters(backbone) - sum(layers)) * item, "layer": max(layers) * item}


def held_bytes(
    model: PreTrainedModel, adapter: Adapter, recipe: Recipe, positions: int, item: int
) -> int:
    """Bytes of what waits on the shelf: hidden states, and the forwards that stand at one Site.

    A forward that stands at a Site holds the Site's input, the layer's input, what is added to the
    Site's output (for an FFN), and what its module was given.
    """
    if recipe.statistics != "sequential":
        # what enters a layer and what leaves it
        return 2 * positions * text_config(model.config).hidden_size * item
    hidden = text_config(model.config).hidden_size
    widest = 0
    for site in adapter.sites_of(model, 0, recipe.target):
        beside = producer_rows(site) if site.kind == "heads" else hidden
        widest = max(widest, site.columns + beside + hidden)
    return positions * (hidden + widest) * item


def producer_rows(site: Site) -> int:
    """Rows of the linears that make a Site's columns."""
    modules = {p.path: site.module.get_submodule(p.path) for p in site.spec.producers}
    return sum(linear.weight(module).shape[0] for module in modules.values())


def activation_bytes(
    sites: Sequence[SitePlan], tokens: Tokens, hidden: int, item: int, recipe: Recipe
) -> dict[str, int]:
    """Bytes of activations, statistics and solve at the Site that needs most.

    The inputs of one Site are held for all tokens, because every forward is paused there.
    """
    solves = RECONSTRUCTIONS[recipe.reconstruct].solves
    needs = []
    for s in sites:
        n, kept = s.columns_before, s.columns_after
        right = min(n - kept, s.outputs)
        # system, centred copy, scaled copy and factor; cross block; right side, solution, scratch
        system = 4 * kept**2 + kept * (n - kept) + 3 * kept * right if solves else 0
        # a paused forward keeps its normed input, and its residual stream or its q, k and v
        frames = hidden + (s.producer_rows if s.kind == "heads" else hidden)
        needs.append(
            {
                "site_inputs": tokens.positions * n * item,
                "paused_forwards": tokens.positions * frames * item,
                "moments": 4 * n**2,
                "solve": 8 * (system + 2 * s.outputs * n),
            }
        )
    worst = max(needs, key=lambda need: sum(need.values()))
    return {"hidden_states": tokens.positions * hidden * item, **worst}


def measure(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of square matmuls for each phase, on this machine as it is loaded now.

    The forward pass computes in `dtype`; the Gram does so on a GPU and in float32 on a CPU; the
    solve is float64.
    """
    wanted = {"forward": dtype, "solve": torch.float64}
    wanted["gram"] = dtype if device.type == "cuda" else torch.float32
    rates = {kind: _matmul_rate(device, kind) for kind in set(wanted.values())}
    return {phase: rates[kind] for phase, kind in wanted.items()}


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    n = MEASURE_SIZE[device.type]
    # zeros draw less power than data, and a GPU would clock higher for them
    a = torch.randn(n, n, device=device).to(dtype)
    out = a @ a  # the first call pays for threads and libraries
    done, elapsed, start = 0, 0.0, time.perf_counter()
    while elapsed < MEASURE_SECONDS:
        torch.mm(a, a, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        done, elapsed = done + 1, time.perf_counter() - start
    return done * 2 * n**3 / elapsed


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
