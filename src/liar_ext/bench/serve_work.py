"""What a forward has to do, from shapes: why a model is less faster than it is smaller.

Of the two phases, `prefill` is the prompt of all sequences and `decode` one further token of each.
Multiplications are those of matrices: linears of the layers, attention's two products, the head.
Bytes are those of weights, which are read once, and of the keys and values that attention reads;
activations are not counted. Time has a bound: the larger of multiplications over the measured rate
of a large product and bytes over that of a large copy. What is over it goes with launches, Python,
norms, softmax, and with products that are too small for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from liar_ext.bench.serve_models import Served
from liar_ext.costs import head_flops, layer_flops
from liar_ext.models import adapter_for, linear

PARTS = ("layers", "attention", "head")
# a share of a bound below this is worth a word
SMALL = 0.02


@dataclass(frozen=True)
class Ceilings:
    """What the device can do, measured in the same run.

    Attributes:
        flops: of a large product in the dtype, a second; bytes: of a large copy, read and written.
    """

    flops: float
    bytes: float

    def bound(self, work: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """The least seconds that this work takes, what sets them, and the parts' shares of it."""
        sides = {
            "compute": ({part: n / self.flops for part, n in work["flops"].items()}),
            "memory": ({part: n / self.bytes for part, n in work["bytes"].items()}),
        }
        by = max(sides, key=lambda side: sum(sides[side].values()))
        seconds = sum(sides[by].values())
        shares = {part: own / seconds for part, own in sides[by].items()} if seconds else {}
        return {"seconds": seconds, "by": by, "shares": shares}


def sizes(served: Served) -> dict[str, int]:
    """Parameters: of the embeddings (of ids and positions), of a head of its own, of all else."""
    model = served.model
    head = model.get_output_embeddings()
    # positions may be a subclass
    tables = {
        id(module.weight): module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Embedding)
    }
    own = 0 if head is None or id(head.weight) in tables else head.weight.numel()
    embeddings = sum(tables.values())
    return {
        "embeddings": embeddings,
        "head": own,
        "layers": served.parameters - embeddings - own,
    }


def work_of(
    served: Served, batch: int, tokens: int, new_tokens: int, cache_bytes: float
) -> dict[str, dict[str, dict[str, float]]] | None:
    """Phase -> `flops` and `bytes` -> part -> how much; None without an adapter, for then nobody
    knows what attention is, or without a Site of heads.

    Args:
        tokens: of a prompt, or of a sentence; new_tokens: 0 for an encoder.
        cache_bytes: keys and values that a token reads on average, of all sequences.
    """
    if served.outline.widths is None:
        return None
    model = served.model
    adapter = adapter_for(model.config)
    if all(spec.kind != "heads" for spec in adapter.sites):
        # nor where heads cannot be pruned, and no Site says how wide they are
        return None
    size = next(model.parameters()).element_size()
    layers = adapter.layer_list(model)[1]
    weights = [linear.weight(module).numel() for own in layers for module in linear.linears(own)]
    products = 2 * sum(weights)
    attended = sum(layer_flops(model, adapter, tokens)) - products
    head = head_flops(model)
    read = {"layers": sum(weights) * size, "head": head // 2 * size}
    # the first new token comes from the prompt's forward, whose last hidden states alone reach the
    # head; an encoder's head, if it has one, sees all of them
    seen = 1 if new_tokens else tokens
    found = {
        "prefill": {
            "flops": {
                "layers": float(batch * tokens * products),
                "attention": float(batch * tokens * attended),
                "head": float(batch * seen * head),
            },
            "bytes": {**read, "attention": 0.0},
        }
    }
    if new_tokens:
        # a token attends to all that came before it, and not to half on average
        at = tokens + new_tokens / 2
        over = sum(layer_flops(model, adapter, 2 * round(at))) - products
        found["decode"] = {
            "flops": {
                "layers": float(batch * products),
                "attention": float(batch * over),
                "head": float(batch * head),
            },
            "bytes": {**read, "attention": cache_bytes},
        }
    return found


def why(
    phase: str, entry: Mapping[str, Any], dense: Mapping[str, Any], parameters: float
) -> str | None:
    """In words, why a speed-up is below the ratio of the parameters; None where it is not, or where
    nothing is known.

    Args:
        entry, dense: with `speedup` (the first) and `bound` of each phase.
        parameters: the dense model's over this one's.
    """
    own = entry["speedup"][phase]
    if own["high"] >= parameters or not (entry["bound"] and dense["bound"]):
        return None
    mine, theirs = entry["bound"][phase], dense["bound"][phase]
    allowed = theirs["seconds"] / mine["seconds"]
    what = "multiplies" if mine["by"] == "compute" else "reads"
    names = {"layers": "the layers' linears", "attention": "attention", "head": "the head"}
    if mine["by"] == "memory":
        names["attention"] = "keys and values"
    parts = [f"{names[p]} {s:.0%}" for p, s in mine["shares"].items() if s >= SMALL]
    text = (
        f"parameters promise {parameters:.2f} times, measured {own['median']:.2f}. Of what it "
        f"{what}: {', '.join(parts)}, which allows {allowed:.2f} times"
    )
    if theirs["of_bound"] > 1:
        return f"{text}; its weights come from the caches, faster than from memory"
    if own["high"] < allowed:
        text += (
            f". {1 - mine['of_bound']:.0%} of its time ({1 - theirs['of_bound']:.0%} of the dense "
            "model's) goes with launches, Python, norms, softmax and small products"
        )
    return text
