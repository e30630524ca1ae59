"""Bytes that the gradient pass holds at once, as `memory` has them of everything else."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from liar_ext.checkpoint.reader import tied_names
from liar_ext.costs import Tokens, gradient_tokens, kept_states, producer_rows, site_weights
from liar_ext.criteria import CRITERIA
from liar_ext.memory_parts import Phase, Sizes, next_layer, phase, power_of_two
from liar_ext.models import linear
from liar_ext.models.adapter import Adapter
from liar_ext.ops.logits import CHUNK_LOGITS
from liar_ext.recipe import Recipe
from liar_ext.survey import survey_of


@dataclass(frozen=True)
class GradientSizes:
    """Of the gradient pass of one rank.

    Attributes:
        kept: how many times the hidden states of `positions` tokens wait; batch: of the largest
            batch.
        head, vocabulary: numbers and rows of an output embedding; head is 0 for a tied one.
        graph: numbers in the compute dtype that autograd keeps for a token of a layer, and
            `wide`, numbers in float32.
        widest: columns of the widest targeted Site.
        weights: of the targeted Sites of a layer whose gradients are summed, largest: of one
            linear; alone: as float32 sums.
    """

    kept: int
    positions: int
    batch: int
    head: int
    vocabulary: int
    graph: int
    wide: int
    widest: int
    weights: int
    largest: int
    alone: bool

    @property
    def states(self) -> int:
        """Positions whose hidden states wait."""
        return self.kept * self.positions


def gradient_sizes(
    model: PreTrainedModel, adapter: Adapter, recipe: Recipe, tokens: Tokens, ranks: int
) -> GradientSizes | None:
    """Of a dense model on `meta`; None for criteria that need no gradients."""
    criterion = CRITERIA[recipe.criterion]
    head = model.get_output_embeddings()
    if not criterion.differentiates or head is None:
        return None
    windows = gradient_tokens(tokens, recipe)
    first = (recipe.layers or (0,))[0]
    targeted = adapter.sites_of(model, first, recipe.target)
    asked = criterion.needs == "weight_gradients"
    hidden = max(site.weight().shape[0] for site in targeted)
    graph, wide = layer_graph(model, adapter, first)
    if asked:
        for site in targeted:
            # what the linears are given and give, unless it is there already
            graph += 2 * hidden + (producer_rows(site) if site.kind == "heads" else 0)
    vocabulary, width = linear.weight(head).shape
    return GradientSizes(
        kept=kept_states(model, adapter, recipe),
        positions=-(-windows.segments // ranks) * windows.positions // windows.segments,
        batch=windows.batch,
        head=0 if tied_names(model) else vocabulary * width,
        vocabulary=vocabulary,
        graph=graph,
        wide=wide,
        widest=max(site.columns for site in targeted),
        weights=site_weights(model, adapter, recipe, first) if asked else 0,
        largest=max(site.weight().numel() for site in targeted) if asked else 0,
        alone=windows.segments <= 1,
    )


def layer_graph(model: PreTrainedModel, adapter: Adapter, layer: int) -> tuple[int, int]:
    """Numbers that autograd keeps for a token of a layer: in the compute dtype, and in float32."""
    sites = adapter.sites_of(model, layer, tuple(spec.kind for spec in adapter.sites))
    hidden = max(site.weight().shape[0] for site in sites)
    # the two sums of the residual stream; queries, keys and values as attention gets them, and what
    # it gives; what goes into an FFN's activation and comes out, its other factor, the product
    graph = 2 * hidden
    for site in sites:
        graph += producer_rows(site) + site.columns + (site.columns if site.kind == "ffn" else 0)
    # a norm's input and what it is divided by, of two norms
    return graph, 4 * hidden


def learning_graph(
    model: PreTrainedModel, adapter: Adapter, recipe: Recipe, layer: int
) -> tuple[int, int] | None:
    """`layer_graph` where a survey learns with gradients; zeros where it only measures, None where
    it does not learn."""
    survey = survey_of(recipe)
    if survey is None or survey.learn is None:
        return None
    slopes, _ = survey.passes(len(recipe.target))
    return layer_graph(model, adapter, layer) if slopes else (0, 0)


def gradient_phases(sizes: Sizes, own: GradientSizes) -> list[Phase]:
    """The loss, and the way back through a layer."""
    s, row = sizes, sizes.hidden * sizes.item
    device: dict[str, int] = {}
    host: dict[str, int] = {}
    if s.place == "device":
        device["gradient_states"] = own.states * row
    elif s.place == "host":
        batches = -(-own.positions // own.batch)
        host["gradient_states"] = own.kept * batches * power_of_two(own.batch * row)
    entering = own.batch * row
    logits = min(max(CHUNK_LOGITS, own.vocabulary), own.batch * own.vocabulary)
    loss = device | {
        "embeddings": s.outside + own.head * s.item,
        # as they are made, in float32, their log-softmax, and the gradients of both
        "logits": logits * (12 if s.item == 4 else 12 + 2 * s.item),
        "passing_batch": 4 * entering + 8 * own.batch * s.hidden,
    }
    back = device | {
        "layer": s.layer,
        "attention_masks": s.masks * own.positions // s.positions,
        "passing_batch": 3 * entering,
        "graph": own.batch * (own.graph * s.item + own.wide * 4),
        # gradients on their way, and the products of a Site's inputs with theirs
        "backward": own.batch * own.widest * (3 * s.item + 12),
        "weight_gradients": own.weights * 2 * (4 if own.alone else 8) + own.largest * 8,
    }
    if s.place != "device":
        for part in (loss, back):
            part["gradient_states"] = 2 * entering
    return [
        phase(s, "gradients of the loss", loss, host),
        phase(s, "gradients of a layer", back, host | {"next_layer": next_layer(s)}),
    ]
