"""What choosing the layers that are left out costs and holds, by what a method goes by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel

from liar_ext.checkpoint.reader import tied_names
from liar_ext.costs import Tokens, gradient_tokens, head_flops, layer_flops, passing_numbers
from liar_ext.depth.choice import choice_states
from liar_ext.depth.methods import METHODS
from liar_ext.engine.loss import predicts
from liar_ext.engine.statistics import CHUNK_TOKENS, MOST_SEGMENTS
from liar_ext.errors import InputError
from liar_ext.gradient_memory import layer_graph
from liar_ext.memory_parts import Phase, Sizes, next_layer, phase, shelved
from liar_ext.models import linear
from liar_ext.models.adapter import Adapter, text_config
from liar_ext.ops.cosine import cosine_bytes
from liar_ext.ops.logits import CHUNK_LOGITS
from liar_ext.recipe import Recipe

# what a method may go by that is no loss
OTHERWISE = ("nothing", "weights", "states")


@dataclass(frozen=True)
class ChoicePlan:
    """Attributes:
    flops: of all that is computed; held: bytes of what waits on the shelf of one rank.
    phases: sizes -> what the choice holds at once.
    """

    flops: int
    held: int
    phases: Callable[[Sizes], list[Phase]]


@dataclass(frozen=True)
class _Windows:
    """Those that a method looks at, on the rank with most: positions, of the largest batch, and
    positions whose hidden states wait."""

    positions: int
    batch: int
    states: int


def choice_plan(
    model: PreTrainedModel, adapter: Adapter, recipe: Recipe, tokens: Tokens, ranks: int, item: int
) -> ChoicePlan | None:
    """Of the whole model on `meta`; None where layers go by their places or a list.

    Args:
        item: bytes of a number in the compute dtype.
    Raises:
        InputError: the method goes by a loss, and the model has none.
    """
    if recipe.depth is None or METHODS[recipe.depth].measure is None:
        return None
    needs, layers = METHODS[recipe.depth].needs, len(adapter.layer_list(model)[1])
    if needs in ("losses", "gradients") and not predicts(model, adapter):
        able = ", ".join(name for name, m in METHODS.items() if m.needs in OTHERWISE)
        raise InputError(
            f"--depth {recipe.depth}: {type(model).__name__} makes no logits of the next token "
            f"with a plain head; go by something else, such as {able}"
        )
    every, batch, segments = _positions(recipe, tokens, needs)
    own = -(-segments // ranks) * every // segments
    states = choice_states(recipe, layers, own=own, gradients=own, losses=own)
    hidden = int(text_config(model.config).hidden_size)
    windows = _Windows(own, batch, states)
    made: dict[str, Callable[[Sizes], list[Phase]]] = {
        "weights": lambda sizes: [_reading(sizes, _largest(model, adapter))],
        "states": lambda sizes: [_comparing(sizes, windows, _passing(model, adapter))],
        "losses": lambda sizes: [
            _trying(sizes, windows, _passing(model, adapter)),
            _scoring(sizes, windows, model, back=False),
        ],
        "gradients": lambda sizes: [
            _scoring(sizes, windows, model, back=True),
            _differentiating(sizes, windows, layer_graph(model, adapter, 0)),
        ],
    }
    flops = every * _per_token(model, adapter, recipe, tokens)
    return ChoicePlan(flops, states * hidden * item, made[needs])


def _positions(recipe: Recipe, tokens: Tokens, needs: str) -> tuple[int, int, int]:
    """Tokens that a method looks at, with padding, those of the largest batch, and segments."""
    if needs == "gradients":
        windows = gradient_tokens(tokens, recipe)
        return windows.positions, windows.batch, windows.segments
    if needs == "losses":
        samples = min(recipe.search_samples, tokens.samples)
        every, batches = samples * tokens.seq_len, -(-samples // recipe.batch_size)
        parts = max(1, min(MOST_SEGMENTS, every // CHUNK_TOKENS, batches))
        return every, min(tokens.batch, every), parts
    if needs == "states":
        return tokens.positions, tokens.batch, tokens.segments
    return 0, 1, 1


def _per_token(model: PreTrainedModel, adapter: Adapter, recipe: Recipe, tokens: Tokens) -> int:
    """FLOPs for one token of the windows."""
    assert recipe.depth is not None, "see `choice_plan`"
    method, by_layer = METHODS[recipe.depth], layer_flops(model, adapter, tokens.seq_len)
    whole, layers, head = sum(by_layer), len(by_layer), head_flops(model)
    if method.needs == "weights":
        return 0
    if method.needs == "states":
        return whole
    if method.needs == "gradients":
        # forward; forward again, gradients of what enters and of the weights; three for the head
        return 4 * whole + 3 * head
    steps = range(recipe.drop or 1 if method.repeated else 1)
    # choices that are the same up to a layer share it (`depth.losses`)
    passed = sum((layers - gone) * (layers - gone + 1) // 2 - 1 for gone in steps)
    tried = sum(layers - gone for gone in steps)
    return passed * whole // layers + tried * head


def _passing(model: PreTrainedModel, adapter: Adapter) -> int:
    return passing_numbers(adapter.sites_of(model, 0, tuple(spec.kind for spec in adapter.sites)))


def _largest(model: PreTrainedModel, adapter: Adapter) -> int:
    """Numbers of the largest tensor of a layer."""
    layers = adapter.layer_list(model)[1]
    return max(parameter.numel() for layer in layers for parameter in layer.parameters())


def _reading(sizes: Sizes, largest: int) -> Phase:
    """Weights alone: of a tensor at a time its powers, and a float32 copy where it is none."""
    copies = 4 * largest * (1 if sizes.item == 4 else 2)
    device = {"layer": sizes.layer, "powers": copies}
    return phase(sizes, "weighing layers", device, {"next_layer": next_layer(sizes)})


def _forward(sizes: Sizes, own: _Windows, wide: int) -> tuple[dict[str, int], dict[str, int]]:
    """States that wait, the layer, and a batch on its way through."""
    device, host = shelved(sizes, "choice_states", own.states, own.batch)
    device |= {
        "layer": sizes.layer,
        "attention_masks": sizes.masks * own.positions // max(sizes.positions, 1),
        "passing_batch": own.batch * (wide * sizes.item + 8 * sizes.hidden),
    }
    return device, host | {"next_layer": next_layer(sizes)}


def _comparing(sizes: Sizes, own: _Windows, wide: int) -> Phase:
    device, host = _forward(sizes, own, wide)
    cosines = cosine_bytes(own.batch, sizes.hidden, sizes.item, "cuda" if sizes.cuda else "cpu")
    device["passing_batch"] = max(device["passing_batch"], cosines)
    return phase(sizes, "comparing hidden states of layers", device, host)


def _trying(sizes: Sizes, own: _Windows, wide: int) -> Phase:
    return phase(sizes, "trying without layers", *_forward(sizes, own, wide))


def _scoring(sizes: Sizes, own: _Windows, model: PreTrainedModel, *, back: bool) -> Phase:
    """Losses of the windows; with `back` their gradients."""
    s = sizes
    head = model.get_output_embeddings()
    vocabulary, width = linear.weight(head).shape if head is not None else (0, 0)
    logits = min(max(CHUNK_LOGITS, vocabulary), own.batch * vocabulary)
    device, host = shelved(s, "choice_states", own.states, own.batch)
    # as they are made, in float32, and their log-softmax; gradients of both
    each = (12 if s.item == 4 else 12 + 2 * s.item) if back else (8 if s.item == 4 else 8 + s.item)
    device |= {
        "embeddings": s.outside + (0 if tied_names(model) else vocabulary * width * s.item),
        "logits": logits * each,
        "passing_batch": own.batch * s.hidden * (4 * s.item + 8),
    }
    return phase(s, "losses without layers" if not back else "loss for layers", device, host)


def _differentiating(sizes: Sizes, own: _Windows, graph: tuple[int, int]) -> Phase:
    """The way back through a layer, with the gradients of all its weights."""
    device, host = _forward(sizes, own, 0)
    device |= {
        "graph": own.batch * (graph[0] * sizes.item + graph[1] * 4),
        # as they are made, and float32 sums of them
        "weight_gradients": sizes.layer + sizes.layer * 4 // sizes.item,
    }
    return phase(sizes, "gradients of whole layers", device, host)
