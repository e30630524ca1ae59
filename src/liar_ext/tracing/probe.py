"""One layer whose linears are free variables: what each is given, for what the others say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from liar_ext.engine.calls import LayerCall, layer_output
from liar_ext.errors import InputError
from liar_ext.models import linear
from liar_ext.tracing.stand_ins import TOKENS, answering, by_path, values_of

# relative to the largest value; what does not depend has the same bits, or nearly so
SAME = 1e-9
NOT_CALLED = "is not called in a forward"


@dataclass
class Seen:
    """Attributes:
    inputs: of each linear that is called once and given one row for each token: (B, T, in), in
        the order of the calls.
    output: of the layer, (B, T, d).
    odd: linears that are called otherwise, and how.
    """

    output: Tensor
    inputs: dict[str, Tensor] = field(default_factory=dict)
    odd: dict[str, str] = field(default_factory=dict)


class LayerProbe:
    """A layer that runs on B rows of T tokens at once, each row an experiment of its own.

    Args:
        call: B -> what enters the layer on B equal rows of tokens, and what is passed beside.
    """

    def __init__(self, layer: nn.Module, call: Callable[[int], tuple[Tensor, LayerCall]]) -> None:
        self.layer, self.call = layer, call
        self._width = call(1)[0].shape[-1]
        self.linears = by_path(layer)
        self.widths = {p: linear.weight(m).shape[0] for p, m in self.linears.items()}

    def base(self, path: str, round_: int = 0) -> Tensor:
        """What a linear says where nothing else is asked: (1, T, out); another for each round."""
        return values_of(path, (1, TOKENS, self.widths[path]), round_)

    def hidden(self, round_: int = 0) -> Tensor:
        return values_of("hidden", (1, TOKENS, self._width), round_) - 1

    def run(self, count: int, said: Mapping[str, Tensor], hidden: Tensor | None = None) -> Seen:
        """One forward.

        Args:
            count: B.
            said: (B or 1, T, out) by linear; the others say their base.
            hidden: (B or 1, T, d); None is the base.
        Raises:
            InputError: the layer does not run like this.
        """
        seen = Seen(torch.empty(0))
        called: set[str] = set()
        grid = (count, TOKENS)

        def answer(path: str, x: Tensor) -> Tensor:
            if path in called:
                seen.odd[path] = "is called more than once in a forward"
                seen.inputs.pop(path, None)
            called.add(path)
            if x.shape[:-1].numel() != count * TOKENS:
                said_so = f"is given {tuple(x.shape)} for {count} x {TOKENS} tokens"
                seen.odd.setdefault(path, said_so)
                return values_of(path, (*x.shape[:-1], self.widths[path]))
            if path not in seen.odd:
                seen.inputs[path] = x.reshape(*grid, -1)
            value = said.get(path)
            value = self.base(path) if value is None else value
            return value.expand(*grid, -1).clone().reshape(*x.shape[:-1], value.shape[-1])

        states = (self.hidden() if hidden is None else hidden).expand(*grid, -1).clone()
        call = self.call(count)[1]
        try:
            with answering(self.linears, answer):
                seen.output = layer_output(self.layer, states, call)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise InputError(f"{type(self.layer).__name__} does not run: {reason}") from error
        for path in self.linears.keys() - called:
            seen.odd[path] = NOT_CALLED
        if not isinstance(seen.output, Tensor) or seen.output.shape != states.shape:
            raise InputError(f"{type(self.layer).__name__} does not give back hidden states")
        if not bool(torch.isfinite(seen.output).all()):
            raise InputError(f"{type(self.layer).__name__} gives NaN or infinite values")
        return seen


def changed(values: Tensor, base: Tensor) -> Tensor:
    """Which columns differ, for each experiment, in some token: (B, columns) of (B, T, columns)."""
    return changed_tokens(values, base).any(1)


def changed_tokens(values: Tensor, base: Tensor) -> Tensor:
    """The same token by token: (B, T, columns)."""
    scale = float(base.abs().max().clamp_min(1e-30))
    return (values - base).abs() > SAME * scale
