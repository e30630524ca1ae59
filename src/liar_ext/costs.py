"""FLOPs and seconds of one compression, counted from shapes, and what waits meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from liar_ext.models import Site, linear
from liar_ext.models.adapter import Adapter, text_config
from liar_ext.ops.gram import gram
from liar_ext.ops.interpolate import Repair, costs, repair
from liar_ext.ops.moments import Moments
from liar_ext.ops.residual import residual_energies
from liar_ext.recipe import Recipe
from liar_ext.reconstruction import RECONSTRUCTIONS

# for each of four rates, beside the first call; about two seconds together
MEASURE_SECONDS = 0.3
# columns, and tokens of a Gram: as large as that allows, because rates grow with them
MEASURE_SIZE = {"cpu": (1536, 4096), "cuda": (8192, 16384)}


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
        batch: positions of the largest batch; segments: of tokens, see `engine.statistics`.
        counted: False when they are assumed from the recipe.
    """

    tokens: int
    positions: int
    samples: int
    seq_len: int
    batch: int
    segments: int
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
    sites: Sequence[SitePlan],
    tokens: Tokens,
    forward: int,
    recipe: Recipe,
    passes: int,
    pruned: int,
) -> dict[str, int]:
    """FLOPs of one compression by what they are for.

    Args:
        forward: of one token through the layers that the compression runs.
        passes: of forwards through them.
        pruned: of one token through those that are pruned.
    Returns:
        `forward`; `gram`, `n² T` for the triangle; `solve`, see `ops.interpolate.costs`;
        `residual`, the report's diagnostic, `out (n² + s²)`. With `--target-signal dense` the dense
        path goes beside through the pruned layers, each consumer is called once more, `2 out n`,
        and so are the products of the drift.
    """
    solves = RECONSTRUCTIONS[recipe.reconstruct].solves
    paired = recipe.target_signal == "dense"
    consumers = sum(2 * s.outputs * s.columns_before for s in sites) if paired else 0
    beside = pruned + consumers if paired else 0
    return {
        "forward": tokens.positions * (passes * forward + beside),
        "gram": (sum(s.columns_before**2 for s in sites) + consumers) * tokens.tokens,
        "solve": sum(solve_flops(s, paired) for s in sites) if solves else 0,
        "residual": sum(residual_flops(s) for s in sites),
    }


def solve_flops(site: SitePlan, paired: bool = False) -> int:
    """Of the cheapest way to the repaired rows of a Site; 0 where nothing is dropped.

    Args:
        paired: the target is the dense path's: `ops.drift` has one way, and all Sites go it.
    """
    kept, dropped = site.columns_after, site.columns_before - site.columns_after
    ways = costs(kept, dropped, site.outputs, False)
    if paired:
        return int(ways["fold first"])
    return int(min(ways.values())) if dropped else 0


def residual_flops(site: SitePlan) -> int:
    return site.outputs * (site.columns_before**2 + site.columns_after**2)


def held_bytes(
    model: PreTrainedModel, adapter: Adapter, recipe: Recipe, positions: int, item: int
) -> int:
    """Bytes of what waits on the shelf: hidden states, and the forwards that stand at one Site.

    A forward that stands at a Site holds the Site's input, the layer's input, what is added to the
    Site's output (for an FFN), and what its module was given. With `--target-signal dense` there
    are hidden states of two paths, and the dense outputs of the layer's Sites.
    """
    if recipe.statistics != "sequential":
        # what enters a layer and what leaves it
        return 2 * positions * text_config(model.config).hidden_size * item
    hidden = text_config(model.config).hidden_size
    widest = outputs = 0
    for site in adapter.sites_of(model, 0, recipe.target):
        beside = producer_rows(site) if site.kind == "heads" else hidden
        widest = max(widest, site.columns + beside + hidden)
        outputs += site.weight().shape[0]
    dense = hidden + outputs if recipe.target_signal == "dense" else 0
    return positions * (hidden + widest + dense) * item


def producer_rows(site: Site) -> int:
    """Rows of the linears that make a Site's columns."""
    modules = {p.path: site.module.get_submodule(p.path) for p in site.spec.producers}
    return sum(linear.weight(module).shape[0] for module in modules.values())


def measure(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of each phase by its own kernels, on this machine.

    The forward pass is a matmul in `dtype`; statistics are a Gram of values in `dtype`; a solve is
    a repair that keeps half of the columns, and the residual is that of its result.
    """
    n, tokens = MEASURE_SIZE[device.type]
    # zeros draw less power than data, and a GPU would clock higher for them
    x = torch.randn(tokens, n, device=device).to(dtype)
    square = x[:n].contiguous()
    moments = Moments.zeros(n, device=device)
    weight = torch.randn(n // 2, n, device=device).to(dtype)
    keep, drop = torch.arange(n, device=device).split(n // 2)
    found: list[Repair] = []

    def solve() -> None:
        found[:] = [repair(moments, weight, keep, drop, ridge=1e-2)]

    def residual() -> None:
        residual_energies(moments, weight, keep, found[0].weight, found[0].shift)

    own = SitePlan(0, "", "", n, n // 2, n, n // 2, n // 2, n)
    with torch.no_grad():
        return {
            "forward": _rate(device, 2 * n**3, lambda: torch.mm(square, square)),
            "gram": _rate(device, tokens * n**2, lambda: gram(x, out=moments)),
            "solve": _rate(device, solve_flops(own), solve),
            "residual": _rate(device, residual_flops(own), residual),
        }


def _rate(device: torch.device, flops: int, call: Callable[[], object]) -> float:
    """By the fastest call: whatever else runs now need not run then."""
    call()  # the first call pays for threads and libraries
    best, start = float("inf"), time.perf_counter()
    while (began := time.perf_counter()) - start < MEASURE_SECONDS:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return flops / best
