"""What the search for masks costs and holds (`engine.policy`), counted from shapes."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from liar_ext.checkpoint.reader import tied_names
from liar_ext.costs import Tokens, head_flops, layer_flops, passing_numbers
from liar_ext.criteria import CRITERIA
from liar_ext.engine.loss import predicts
from liar_ext.engine.policy import MASKS
from liar_ext.memory_parts import Phase, Sizes, next_layer, phase, power_of_two
from liar_ext.models import linear
from liar_ext.models.adapter import Adapter, text_config
from liar_ext.ops.logits import CHUNK_LOGITS
from liar_ext.recipe import Recipe


def policy_flops(model: PreTrainedModel, adapter: Adapter, recipe: Recipe, tokens: Tokens) -> int:
    """One forward of all windows, and of a batch for each mask from the first pruned layer on."""
    by_layer = layer_flops(model, adapter, tokens.seq_len, tokens.shares)
    head = head_flops(model, tokens.shares) if predicts(model, adapter) else 0
    start = (recipe.layers or (0,))[0]
    masked = recipe.policy_steps * MASKS * tokens.batch * (sum(by_layer[start:]) + head)
    return tokens.positions * (sum(by_layer) + head) + masked


def policy_held_bytes(model: PreTrainedModel, recipe: Recipe, positions: int, item: int) -> int:
    """Of what waits on the shelf of each rank, which has all windows; 0 without a policy.

    What enters the first pruned layer, and in the dense forward what enters a layer and leaves it.
    """
    if CRITERIA[recipe.criterion].needs != "policy":
        return 0
    return 3 * positions * int(text_config(model.config).hidden_size) * item


@dataclass(frozen=True)
class PolicySizes:
    """Of the search on one rank, which has all windows.

    Attributes:
        positions: of all windows; batch: of the largest batch; masks: of a step, on one rank.
        widest: numbers that a forward has for a token beside the residual stream, at most.
        columns: of the widest targeted Site.
        head, vocabulary: numbers and rows of an output embedding, 0 for a tied one, and for none
            where no token is predicted.
    """

    positions: int
    batch: int
    masks: int
    widest: int
    columns: int
    head: int
    vocabulary: int


def policy_sizes(
    model: PreTrainedModel, adapter: Adapter, recipe: Recipe, tokens: Tokens, ranks: int
) -> PolicySizes:
    """Of a dense model on `meta`."""
    first = (recipe.layers or (0,))[0]
    sites = adapter.sites_of(model, first, tuple(spec.kind for spec in adapter.sites))
    vocabulary = width = 0
    if predicts(model, adapter):
        vocabulary, width = linear.weight(model.get_output_embeddings()).shape
    return PolicySizes(
        positions=tokens.positions,
        batch=tokens.batch,
        masks=-(-MASKS // ranks),
        # gates are on when all but one are gone
        widest=passing_numbers(sites),
        columns=max(site.columns for site in sites if site.kind in recipe.target),
        head=0 if tied_names(model) else vocabulary * width,
        vocabulary=vocabulary,
    )


def policy_phases(sizes: Sizes, own: PolicySizes) -> list[Phase]:
    """The dense forward, the masked ones, and the loss."""
    s, row = sizes, sizes.hidden * sizes.item
    batches = -(-own.positions // own.batch)
    # what the layer is given and gives, and what the residual stream is beside
    passing = own.batch * (own.widest + 2 * s.hidden) * s.item

    def waiting(times: int, more: int) -> tuple[dict[str, int], dict[str, int]]:
        """All windows so many times, and so many states of one batch."""
        if s.place == "device":
            return {"policy_states": (times * own.positions + more * own.batch) * row}, {}
        pinned = (times * batches + more) * power_of_two(own.batch * row)
        host = {"policy_states": pinned} if s.place == "host" else {}
        return {"policy_states": 2 * own.batch * row}, host

    following = {"next_layer": next_layer(s)}
    layer = {"layer": s.layer, "attention_masks": s.masks}
    # squares of a consumer's input, for the scores
    scores = own.batch * own.columns * (4 if s.item == 4 else 8)
    device, host = waiting(3, 0)
    dense = device | layer | {"passing_batch": passing + scores}
    found = [phase(s, "measuring the dense model", dense, host | following)]
    device, host = waiting(1 if own.vocabulary else 2, own.masks)
    masked = device | layer | {"passing_batch": passing}
    found.append(phase(s, "learning masks", masked, host | following))
    if own.vocabulary:
        logits = min(max(CHUNK_LOGITS, own.vocabulary), own.batch * own.vocabulary)
        loss = device | {
            "embeddings": s.outside + own.head * s.item,
            # as they are made, in float32, and their log-softmax
            "logits": logits * (8 if s.item == 4 else 8 + s.item),
            "passing_batch": 3 * own.batch * row + 8 * own.batch * s.hidden,
        }
        found.append(phase(s, "loss of masked models", loss, host))
    return found
