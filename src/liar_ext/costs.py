"""FLOPs and seconds of one compression, counted from shapes, and what waits meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from liar_ext.allocation import Budget
from liar_ext.criteria import CRITERIA
from liar_ext.engine.statistics import CHUNK_TOKENS, MOST_SEGMENTS
from liar_ext.latency import LatencyTable
from liar_ext.models import Site, adapter_for, linear
from liar_ext.models.adapter import Adapter, text_config
from liar_ext.ops.held_out import held_out_flops
from liar_ext.ops.interpolate import costs
from liar_ext.recipe import RIDGES, Recipe
from liar_ext.reconstruction import RECONSTRUCTIONS


@dataclass(frozen=True)
class SitePlan:
    """One Site: widths as in the report, and the rows of its consumer and of its producers.

    Attributes:
        across: it stands in for layers that are left out behind it.
        stack: of layers that it is in, see `Tokens.shares`.
        beside: numbers for a token that a forward paused there holds beside what one of a LLaMA
            does, see `held_beside`.
    """

    layer: int
    kind: str
    name: str
    units_before: int
    units_after: int
    columns_before: int
    columns_after: int
    outputs: int
    producer_rows: int
    across: bool = False
    beside: int = 0
    stack: int = 0


@dataclass(frozen=True)
class Tokens:
    """The calibration tokens.

    Attributes:
        tokens: valid ones; positions: with padding; held_out: of the valid ones, to choose ridges.
        samples: sequences; seq_len: tokens of the longest.
        batch: positions of the largest batch; segments: of tokens, see `engine.statistics`.
        counted: False when they are assumed from the recipe.
        shares: of the tokens that each stack of layers reads.
    """

    tokens: int
    positions: int
    samples: int
    seq_len: int
    batch: int
    segments: int
    counted: bool
    held_out: int = 0
    shares: tuple[float, ...] = (1.0,)

    @property
    def row(self) -> int:
        """Tokens of a sample, at most, of all stacks."""
        return self.seq_len * len(self.shares)


def layer_flops(
    model: PreTrainedModel, adapter: Adapter, length: int, shares: Sequence[float] = (1.0,)
) -> list[int]:
    """Forward FLOPs of each layer for one token of a sequence of `length`.

    Linears and the two attention products; norms, activations and softmax are not counted.

    Args:
        shares: of the tokens, those that the layers of each stack read.
    """
    found = []
    layers = adapter.chain(model)
    for index, layer in enumerate(layers):
        weights = sum(linear.weight(module).numel() for module in linear.linears(layer))
        attended = sum(site.columns for site in adapter.sites_of(model, index, ("heads",)))
        each = 2 * weights + attended * _attention_flops(adapter.decoder, length)
        stack = layers.stack(index)
        over = 0 if adapter.then is None or not stack else 2 * _across(layer, adapter.then.across)
        found.append(round(shares[stack] * (each - over) + shares[0] * over))
    return found


def _across(layer: nn.Module, paths: Sequence[str]) -> int:
    """Weights of the linears that read the tokens of the stack before."""
    return sum(linear.weight(layer.get_submodule(path)).numel() for path in paths)


def unit_costs(site: Site, decoder: bool, length: int) -> dict[str, int]:
    """What goes with one unit of a Site, by what a budget counts.

    Returns:
        `parameters`: weights and biases; `flops`: what `layer_flops` falls by, of one token in a
        sequence of `length`.
    """
    flops = 2 * site.unit_weights
    if site.kind == "heads":
        flops += site.columns_per_unit * _attention_flops(decoder, length)
    return {"parameters": site.unit_parameters, "flops": flops}


def pricing(
    model: PreTrainedModel, adapter: Adapter, recipe: Recipe, length: int, counts: str
) -> Callable[[Site], Budget]:
    """What a budget makes of a Site of the dense model, which may be on `meta`.

    Args:
        length: of the longest calibration sequence.
        counts: a key of `unit_costs`, or `latency`.
    Raises:
        InputError: the recipe's latency table cannot be read; and from what is returned, it does
            not know the Site.
    """
    least = 0 if recipe.empty else 1
    if counts == "latency":
        assert recipe.latency is not None, "the recipe has seen to that"
        table = LatencyTable.read(recipe.latency)
        return lambda site: replace(table.budget(site, model.config), least=least)
    return lambda site: Budget(
        site.kind, site.units, unit_costs(site, adapter.decoder, length)[counts], least=least
    )


def _attention_flops(decoder: bool, length: int) -> int:
    """Of scores and values, for one column of the queries and one token.

    Causal attention reads half of the sequence on average, (length + 1) / 2 tokens.
    """
    return 2 * (length + 1) if decoder else 4 * length


def head_flops(model: PreTrainedModel, shares: Sequence[float] = (1.0,)) -> int:
    """FLOPs of the output embedding for one token; 0 without one.

    Args:
        shares: as of `layer_flops`; logits are of the last stack's tokens.
    """
    head = model.get_output_embeddings()
    return 0 if head is None else round(2 * head.weight.numel() * shares[-1])


def compression_flops(
    sites: Sequence[SitePlan],
    tokens: Tokens,
    forward: int,
    recipe: Recipe,
    *,
    passes: int,
    grams: int,
    survey: int,
    beside: int,
) -> dict[str, int]:
    """FLOPs of one compression by what they are for.

    Args:
        forward: of one token through the layers that the compression runs.
        passes: of forwards through them; grams: Moments of each Site that are made.
        survey: what a survey makes of its statistics.
        beside: of one token through the layers of a dense path that goes beside; 0 without one.
    Returns:
        `forward`; `gram`, `n² T` for the triangle; `solve`, of the repair (for `liar`, see
        `ops.interpolate.costs`), of the fits that choose its ridge, and of what the criterion and
        the survey compute; `residual`, the report's diagnostic, `out (n² + s²)`. With
        `--target-signal dense` or `stream` the dense path goes beside, each consumer is called
        once more, `2 out n`, and so are the products of the drift; with `local` the same at Sites
        that stand in for layers.
    """
    judged = sum(
        CRITERIA[recipe.criterion].flops(
            s.columns_before, s.outputs, s.columns_before - s.columns_after
        )
        for s in sites
    )
    consumers = sum(
        tokens.shares[s.stack] * 2 * s.outputs * s.columns_before
        for s in sites
        if recipe.paired or s.across
    )
    squares = grams * sum(tokens.shares[s.stack] * s.columns_before**2 for s in sites)
    return {
        "forward": round(tokens.positions * (passes * forward + beside + consumers)),
        "gram": round((squares + consumers) * tokens.tokens),
        "solve": judged + survey + sum(solve_flops(s, recipe) for s in sites),
        "residual": sum(residual_flops(s) for s in sites),
    }


def solve_flops(site: SitePlan, recipe: Recipe) -> int:
    """Of the repaired rows of a Site; 0 where there is nothing to repair."""
    kept, dropped = site.columns_after, site.columns_before - site.columns_after
    if recipe.paired or site.across:
        # one way (`ops.drift`), and what is kept whole has drifted, too
        one = int(costs(kept, dropped, site.outputs, False)["fold first"])
    elif not dropped:
        return 0
    else:
        one = RECONSTRUCTIONS[recipe.reconstruct].flops(kept, dropped, site.outputs)
    if not recipe.chooses_ridge:
        return one
    judge, error = held_out_flops(kept, dropped, site.outputs)
    # a fit by `C_SM W_Mᵀ`, whatever is cheapest for one repair
    fit = kept**3 // 3 + 2 * kept**2 * site.outputs
    return one + judge + len(RIDGES) * (fit + error)


def residual_flops(site: SitePlan) -> int:
    return site.outputs * (site.columns_before**2 + site.columns_after**2)


def gradient_tokens(tokens: Tokens, recipe: Recipe) -> Tokens:
    """The windows that gradients are taken of, as full as the longest."""
    samples = min(recipe.gradient_samples, tokens.samples)
    positions = samples * tokens.row
    batches = -(-samples // recipe.batch_size)
    return Tokens(
        positions,
        positions,
        samples,
        tokens.seq_len,
        min(tokens.batch, positions),
        max(1, min(MOST_SEGMENTS, positions // CHUNK_TOKENS, batches)),
        tokens.counted,
        shares=tokens.shares,
    )


def gradient_flops(model: PreTrainedModel, adapter: Adapter, recipe: Recipe, tokens: Tokens) -> int:
    """Of the gradient pass; 0 for criteria that need none.

    A forward; from the first targeted layer on another one and the gradients of its inputs, which
    cost as much; the same three times for the head; and those of the weights of targeted Sites.
    """
    criterion = CRITERIA[recipe.criterion]
    if not criterion.differentiates:
        return 0
    windows = gradient_tokens(tokens, recipe)
    by_layer = layer_flops(model, adapter, windows.seq_len, windows.shares)
    start, stop = recipe.layers or (0, len(by_layer))
    each = sum(by_layer) + 2 * sum(by_layer[start:]) + 3 * head_flops(model, windows.shares)
    if criterion.needs == "weight_gradients":
        layers = adapter.chain(model)
        for index in range(start, stop):
            own = site_weights(model, adapter, recipe, index)
            each += round(2 * own * windows.shares[layers.stack(index)])
    return windows.positions * each


def site_weights(model: PreTrainedModel, adapter: Adapter, recipe: Recipe, layer: int) -> int:
    """Weights of the linears of a layer's targeted Sites."""
    linears = {
        path: site.module.get_submodule(path)
        for site in adapter.sites_of(model, layer, recipe.target)
        for path in (site.spec.consumer, *(p.path for p in site.spec.producers))
    }
    return sum(linear.weight(module).numel() for module in linears.values())


def gradient_held_bytes(
    model: PreTrainedModel, adapter: Adapter, recipe: Recipe, positions: int, item: int
) -> int:
    """Bytes of what waits on the shelf in the gradient pass; 0 for criteria that need none.

    What enters each layer from the first targeted one on, and what leaves the last.
    """
    if not CRITERIA[recipe.criterion].differentiates:
        return 0
    return kept_states(model, adapter, recipe) * positions * _hidden(model) * item


def kept_states(model: PreTrainedModel, adapter: Adapter, recipe: Recipe) -> int:
    """How many times the hidden states of its windows the gradient pass keeps."""
    return len(adapter.chain(model)) + 1 - (recipe.layers or (0,))[0]


def held_beside(model: PreTrainedModel, site: Site, length: int) -> int:
    """Numbers for a token that a forward holds at a Site because of how its family is written: a
    fused projection is there beside what is made of its parts; attention that is written out
    (`eager`) keeps its weights until the layer is left; and what the family says (`SiteSpec.held`).

    Args:
        length: of the longest sequence.
    """
    paths = {producer.path for producer in site.spec.producers}
    rows = producer_rows(site)
    apart = 3 if site.kind == "heads" else max(1, rows // site.columns)
    found = rows if len(paths) < apart else 0
    if getattr(model.config, "_attn_implementation", None) == "eager":
        heads = [
            own.columns // own.head_dim
            for own in adapter_for(model.config).sites_of(model, site.layer, ("heads",))
        ]
        stated = getattr(text_config(model.config), "num_attention_heads", 0)
        found += max([*heads, stated]) * length
    return found + site.spec.held * _hidden(model)


def held_bytes(
    model: PreTrainedModel,
    adapter: Adapter,
    recipe: Recipe,
    positions: int,
    item: int,
    length: int,
) -> int:
    """Bytes of what waits on the shelf: hidden states, and the forwards that stand at one Site.

    A forward that stands at a Site holds the Site's input, the layer's input, what is added to the
    Site's output (for an FFN), and what its module was given. With `--target-signal dense` or
    `stream` there are hidden states of two paths, and what the layer's Sites aim at; where layers
    are left out, those in front of them and behind.
    """
    hidden = _hidden(model)
    if recipe.statistics != "sequential":
        # what enters a layer and what leaves it
        return 2 * positions * hidden * item
    widest = outputs = 0
    every = [spec.kind for spec in adapter.sites]
    kinds = {*(recipe.target if recipe.narrows else ()), *(every[-1:] if recipe.spans else ())}
    if recipe.refit == "all":
        kinds.update(every)
    for site in adapter.sites_of(model, 0, tuple(kinds)):
        beside = producer_rows(site) if site.kind == "heads" else hidden
        more = held_beside(model, site, length)
        widest = max(widest, site.columns + beside + hidden + more)
        outputs += site.weight().shape[0]
    dense = hidden + outputs if recipe.paired or recipe.spans else 0
    dense += hidden if recipe.spans else 0
    return positions * (hidden + widest + dense) * item


def _hidden(model: PreTrainedModel) -> int:
    return int(text_config(model.config).hidden_size)


def producer_rows(site: Site) -> int:
    """Rows of the linears that make a Site's columns."""
    modules = {p.path: site.module.get_submodule(p.path) for p in site.spec.producers}
    return sum(linear.weight(module).shape[0] for module in modules.values())


def passing_numbers(sites: Sequence[Site]) -> int:
    """Numbers that a forward of a layer with these Sites has for a token beside the residual
    stream, at most.

    Queries, keys and values, the queries turned, and what attention gives; of an FFN its
    activation, the other factor and the product.
    """
    return max(
        3 * site.columns + (producer_rows(site) + site.columns if site.kind == "heads" else 0)
        for site in sites
    )
