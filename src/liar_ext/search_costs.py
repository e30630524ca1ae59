"""What a searching allocation costs: FLOPs, disk and memory, counted from shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from liar_ext.allocation import ALLOCATIONS, Budget
from liar_ext.allocation.search import TOGETHER, Call
from liar_ext.costs import (
    SitePlan,
    Tokens,
    head_flops,
    layer_flops,
    producer_rows,
    solve_flops,
    unit_costs,
)
from liar_ext.criteria import CRITERIA
from liar_ext.engine.level_store import Key
from liar_ext.engine.loss import predicts
from liar_ext.engine.oracle import together
from liar_ext.engine.search import level_bytes, level_grid
from liar_ext.memory_parts import Phase, Sizes, next_layer, phase, shelved
from liar_ext.models import linear
from liar_ext.models.adapter import Adapter
from liar_ext.ops.logits import CHUNK_LOGITS
from liar_ext.recipe import Recipe

# hidden states of all windows that wait: one for each candidate that goes with the others, since
# what enters a layer is freed once no candidate needs it, and what leaves it just now; what enters
# the first layer and what the dense model ends with, and the same of shares of the windows, at most
# as much again
STATES = TOGETHER + 5


@dataclass(frozen=True)
class SearchSizes:
    """Of a search; bytes unless said otherwise.

    Attributes:
        flops: by what they are for, as `costs.compression_flops` has them; `search` are those of
            the models that are tried.
        disk: of all levels; level: of the largest one.
        positions: tokens of the windows of one rank, with padding; batch: of the largest batch.
        vocabulary: rows of the output embedding, 0 without one; head: its numbers, 0 if tied.
        levels: of the Sites of the layer that needs most, as they are repaired.
        passes: how often all layers are read, where candidates do not run out.
    """

    flops: Mapping[str, int]
    disk: int
    level: int
    positions: int
    batch: int
    vocabulary: int
    head: int
    levels: Sequence[SitePlan]
    passes: int

    def reads(self, recipe: Recipe) -> str:
        """How often layers are read for candidates, in words."""
        return (
            f"--allocation {recipe.allocation} reads the layers about {self.passes} times, and a "
            f"level of each Site for every candidate: where they do not fit in the file cache, "
            "--search-evaluations is what to lower"
        )

    @property
    def states(self) -> int:
        """Positions whose hidden states wait."""
        return STATES * self.positions


def search_sizes(
    model: PreTrainedModel,
    adapter: Adapter,
    recipe: Recipe,
    tokens: Tokens,
    known: Mapping[Key, Budget],
    tied: bool,
    ranks: int,
) -> SearchSizes | None:
    """Of a dense model on `meta`; None for allocations that do not search.

    Args:
        known: of every targeted Site; tied: the output embedding is the input's.
    """
    calls = ALLOCATIONS[recipe.allocation].calls
    if calls is None:
        return None
    samples = min(recipe.search_samples, tokens.samples)
    positions, layers = samples * tokens.row, adapter.chain(model)
    by_layer = layer_flops(model, adapter, tokens.seq_len, tokens.shares)
    first, stop = min(layer for layer, _ in known), max(layer for layer, _ in known) + 1
    gram = solve = disk = level = targeted = 0
    widest: dict[str, SitePlan] = {}
    plans: dict[str, list[SitePlan]] = {}
    for (index, kind), budget in known.items():
        (site,) = adapter.sites_of(model, index, (kind,))
        share = tokens.shares[layers.stack(index)]
        each = unit_costs(site, adapter.decoder, tokens.seq_len)["flops"]
        targeted += round(share * site.units * each)
        widths = level_grid(budget, recipe.round_to)
        disk += level_bytes(site, widths)
        level = max(level, *(level_bytes(site, (units, 0)) for units in widths[:-1]), 0)
        n, outputs, rows = site.columns, site.weight().shape[0], producer_rows(site)
        gram += round(share * n**2 * tokens.tokens)
        own = [
            SitePlan(
                index, kind, site.name, site.units, u, n, u * site.columns_per_unit, outputs, rows
            )
            for u in widths[:-1]
        ]
        local = replace(recipe, target_signal="local")
        solve += sum(solve_flops(s, local) for s in own)
        if not own:
            continue  # a single unit
        dropped = [n - s.columns_after for s in own]
        solve += CRITERIA[recipe.criterion].selections_flops(n, outputs, dropped)
        if kind not in widest or n > widest[kind].columns_before:
            widest[kind], plans[kind] = own[0], own
    head = model.get_output_embeddings() if predicts(model, adapter) else None
    # the dense model once; layers in front of the first targeted one are passed once
    compared = 0 if head is None else 2 * head_flops(model, tokens.shares)
    smaller = sum(by_layer[first:]) - recipe.sparsity * targeted
    tried = recipe.search_evaluations * (smaller + compared)
    return SearchSizes(
        {
            "forward": tokens.positions * sum(by_layer[:stop]),
            "gram": gram,
            "solve": solve,
            "search": int(positions * (sum(by_layer) + tried)),
        },
        disk,
        level,
        -(-positions // ranks),
        min(tokens.batch, positions),
        0 if head is None else linear.weight(head).shape[0],
        0 if head is None or tied else linear.weight(head).numel(),
        [plan for own in plans.values() for plan in own],
        _passes(calls(recipe.search_evaluations, len(known), samples), samples),
    )


def _passes(calls: Sequence[Call], windows: int) -> int:
    """How often the layers are read: by groups of candidates, and once for the dense model with
    each number of windows."""
    asked = [(count, round(share * windows)) for count, share in calls]
    groups = sum(-(-count // together(windows, own)) for count, own in asked)
    return groups + len({own for _, own in asked})


def search_held_bytes(recipe: Recipe, windows: int, hidden: int, item: int) -> int:
    """Bytes of what waits on the shelf in a search; 0 for allocations that do not search.

    Args:
        windows: tokens of its windows, with padding; hidden: width of the hidden states.
    """
    searching = ALLOCATIONS[recipe.allocation].search is not None
    return STATES * windows * hidden * item if searching else 0


def search_phases(sizes: Sizes, own: SearchSizes) -> list[Phase]:
    """Candidates on their way through a layer, and their comparison with the dense model."""
    s, entering = sizes, own.batch * sizes.hidden * sizes.item
    device, host = shelved(s, "candidate_states", own.states, own.batch)
    through = device | {
        "layer": s.layer,
        "candidate_layer": s.layer,
        "level": own.level,
        # of the stream that levels were made of, of these windows, and of shares of them
        "attention_masks": s.masks + 2 * (s.masks * own.positions // s.positions),
        # queries, keys and values or both factors of an FFN, and the float32 copies of a norm
        "passing_batch": own.batch
        * max((3 * site.columns_before for site in own.levels), default=0)
        * s.item
        + 8 * own.batch * s.hidden,
    }
    logits = min(max(CHUNK_LOGITS, own.vocabulary), own.batch * own.vocabulary)
    compared = device | {
        "embeddings": s.outside + own.head * s.item,
        # of both models as they are made, in float32, and their log-softmax; the products
        "logits": logits * 20,
        "passing_batch": 4 * entering + 8 * own.batch * s.hidden,
    }
    return [
        phase(s, "candidates through a layer", through, host | {"next_layer": next_layer(s)}),
        phase(s, "comparing candidates", compared, host),
    ]
