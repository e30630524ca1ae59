"""Linear stand-ins for left-out layers, side by side on the demo LLaMA.

    python benchmarks/span_maps.py          # writes benchmarks/results/span-maps-demo.json

For every window of layers a … b−1 behind the first: nothing; what this package does, `W' x` with W'
fitted on the inputs x of the consumer in front (`--span-repair liar`); ReplaceMe's map of that
consumer's output (arXiv 2505.02819), `T W x`; and a map of the hidden state, `h + A h`, which is a
further d × d matrix in the model and cannot be folded. All by least squares in float64 on the same
tokens of the dense model. Independent of the package but for moving layers: a check of it as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

import liar_ext
from liar_ext.demo import CALIBRATION, HELDOUT, MODEL
from liar_ext.depth.surgery import surgery
from liar_ext.environment import environment
from liar_ext.evaluation.perplexity import perplexity, tokenize

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "span-maps-demo.json"
LENGTH, WINDOWS, EVALUATED, RIDGE = 256, 128, 128, 1e-4


def solved(inputs: Tensor, target: Tensor, ridge: float = RIDGE) -> Tensor:
    """The M with the least `‖inputs Mᵀ − target‖²/T + λ‖M‖²`, λ relative to the mean square."""
    gram = inputs.T @ inputs / len(inputs)
    strength = ridge * gram.diag().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram + strength, inputs.T @ target / len(inputs)).T


@torch.no_grad()
def heard(model: PreTrainedModel, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states before each layer and behind the last, and the inputs of each consumer."""
    layers = model.model.layers
    states: list[list[Tensor]] = [[] for _ in range(len(layers) + 1)]
    inputs: list[list[Tensor]] = [[] for _ in layers]
    hooks = []
    for index, layer in enumerate(layers):
        hooks.append(
            layer.register_forward_pre_hook(lambda m, args, i=index: states[i].append(args[0]))
        )
        hooks.append(
            layer.mlp.down_proj.register_forward_pre_hook(
                lambda m, args, i=index: inputs[i].append(args[0])
            )
        )
    hooks.append(layers[-1].register_forward_hook(lambda m, args, out: states[-1].append(out)))
    for batch in tokens.split(16):
        model.model(batch)
    for hook in hooks:
        hook.remove()

    def flat(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).flatten(0, 1).double()

    return [flat(own) for own in states], [flat(own) for own in inputs]


def main() -> None:
    model = liar_ext.load(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokens = tokenize(Path(CALIBRATION).read_text(), tokenizer)
    tokens = tokens[: WINDOWS * LENGTH].view(-1, LENGTH)
    held_out = tokenize(Path(HELDOUT).read_text(), tokenizer)[: EVALUATED * LENGTH]
    states, inputs = heard(model, tokens)
    count = len(inputs)

    def measure(own: PreTrainedModel) -> float:
        return float(perplexity(own, held_out, LENGTH, batch_size=16).perplexity)

    @torch.no_grad()
    def row(start: int, stop: int) -> dict[str, Any]:
        kept = [*range(start), *range(stop, count)]
        short = surgery(model, kept)
        consumer = short.model.layers[start - 1].mlp.down_proj
        dense, x = consumer.weight, inputs[start - 1]
        target = states[stop] - states[start]
        found: dict[str, Any] = {"layers": list(range(start, stop)), "nothing": measure(short)}
        maps = {
            "inputs": dense.double() + solved(x, target),
            "outputs": dense.double() + solved(x @ dense.double().T, target, 0.0) @ dense.double(),
        }
        for name, weight in maps.items():
            consumer.weight = torch.nn.Parameter(weight.float())
            found[name] = measure(short)
        consumer.weight = dense
        change = solved(states[start], target).float()
        behind = [*short.model.layers, short.model.norm][start]
        handle = behind.register_forward_pre_hook(
            lambda m, args: (args[0] + args[0] @ change.T, *args[1:])
        )
        found["hidden state"] = measure(short)
        handle.remove()
        print(found, flush=True)
        return found

    windows = [(a, a + n) for n in (1, 2, 3) for a in range(1, count - n + 1)]
    result = {
        "benchmark": "span-maps",
        "command": "python benchmarks/span_maps.py",
        "dense": measure(model),
        "calibration_tokens": tokens.numel(),
        "ridge": RIDGE,
        "rows": [row(*window) for window in windows],
        "environment": environment(),
    }
    OUT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
