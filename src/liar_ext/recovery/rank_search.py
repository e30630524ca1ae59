"""Ranks found by training with them: a small network learns how well a choice of ranks does.

Source: RankAdaptor (2406.15734). A few choices are tried first; then, round by round, the network
that was fitted to all that were tried picks from proposals the one that it thinks best, which is
then trained for real. Every answer is on disk before the next question.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.checkpoint.journal import check_identity
from liar_ext.errors import InputError

Ranks = tuple[int, ...]
# ranks over the uniform one, as the paper has 2 to 12 beside 8
FACTORS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
WIDTH, DEPTH, RATE, EPOCHS = 32, 3, 1e-2, 200


@dataclass(frozen=True)
class RankSearch:
    """Attributes:

    initial: choices that are tried before anything is predicted, the uniform one first; rounds:
        choices after them.
    proposals: to pick from in each round, half of them at random, half changes of good ones.
    steps: updates of each trial.
    """

    initial: int = 8
    rounds: int = 8
    proposals: int = 64
    steps: int = 30

    def __post_init__(self) -> None:
        for name, least in (("initial", 2), ("rounds", 0), ("proposals", 2), ("steps", 1)):
            if getattr(self, name) < least:
                raise InputError(f"--trial-{name} {getattr(self, name)}: must be at least {least}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class TrialJournal:
    """Losses by ranks, a line of JSON each, the first line being what they depend on.

    Raises:
        InputError: it is of another search, or damaged. A line that a killed process left
            half-written is removed.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self._path = path
        self._losses: dict[Ranks, float] = {}
        data = path.read_bytes() if path.exists() else b""
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(path, whole)
        lines = data[:whole].splitlines()
        advice = "start again with --overwrite instead of --resume"
        try:
            if lines:
                check_identity(json.loads(lines[0])["identity"], dict(identity), path)
            for line in lines[1:]:
                entry = json.loads(line)
                loss = entry["loss"]
                self._losses[tuple(entry["ranks"])] = math.inf if loss is None else float(loss)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: cannot be read ({error}); {advice}") from error
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"identity": dict(identity)})

    def __len__(self) -> int:
        return len(self._losses)

    def get(self, ranks: Ranks) -> float | None:
        return self._losses.get(ranks)

    def add(self, ranks: Ranks, loss: float) -> None:
        self._losses[ranks] = loss
        self._append({"ranks": list(ranks), "loss": loss if math.isfinite(loss) else None})

    def _append(self, entry: Mapping[str, Any]) -> None:
        with open(self._path, "ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def trials_in(path: Path) -> int:
    """How many a journal has; 0 if there is none."""
    return max(path.read_bytes().count(b"\n") - 1, 0) if path.exists() else 0


def grid(rank: int) -> tuple[int, ...]:
    """The ranks that a layer may have beside a uniform one."""
    return tuple(sorted({max(round(factor * rank), 1) for factor in FACTORS}))


def search(
    ask: Callable[[int, Ranks], float],
    costs: Sequence[int],
    rank: int,
    how: RankSearch,
    seed: int,
) -> list[tuple[Ranks, float]]:
    """Ask for the loss of choices of ranks that cost no more than a uniform one.

    Which are asked for depends on the seed and the answers alone. Ends early where no choice is
    left that was not tried.

    Args:
        ask: (number of the trial, ranks) -> loss on held-out windows after a short training.
        costs: of one rank in each layer; rank: the uniform one.
    Returns:
        every choice with its loss, in the order in which they were asked for.
    """
    allowed, budget = grid(rank), rank * sum(costs)
    uniform = (rank,) * len(costs)
    tried: dict[Ranks, float] = {}

    def draw(generator: torch.Generator) -> Ranks:
        start = torch.randint(len(allowed), (len(costs),), generator=generator)
        return _fitted([allowed[at] for at in start.tolist()], allowed, costs, budget, generator)

    generator = torch.Generator().manual_seed(seed)
    first = [uniform]
    for _ in range(50 * how.initial):
        if len(first) == how.initial:
            break
        if (found := draw(generator)) not in first:
            first.append(found)
    for ranks in first:
        tried[ranks] = ask(len(tried), ranks)
    for number in range(how.rounds):
        # of the round alone: what an answer was does not change how many numbers were drawn
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number + 1)
        proposals = _proposals(tried, draw, allowed, costs, budget, how.proposals, generator)
        if not proposals:
            break
        predict = fitted(list(tried), list(tried.values()), allowed, seed + number)
        chosen = proposals[int(predict(proposals).argmin())]
        tried[chosen] = ask(len(tried), chosen)
    return list(tried.items())


def fitted(
    choices: Sequence[Ranks], losses: Sequence[float], allowed: Sequence[int], seed: int
) -> Callable[[Sequence[Ranks]], Tensor]:
    """The performance model: ranks, each scaled to 0 ... 1, -> loss, standardised.

    Three hidden layers of 32, ReLU, mean squared error, Adam 1e-2, 200 epochs, all choices in a
    batch; weights from the seed. What did not train (an infinite loss) counts as the worst that
    did.
    """
    low, span = min(allowed), max(max(allowed) - min(allowed), 1)

    def scaled(of: Sequence[Ranks]) -> Tensor:
        return (torch.tensor(of, dtype=torch.float32) - low) / span

    finite = [loss for loss in losses if math.isfinite(loss)] or [0.0]
    known = torch.tensor([loss if math.isfinite(loss) else max(finite) for loss in losses])
    wanted = (known - known.mean()) / known.std(correction=0).clamp(min=1e-12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widths = [len(choices[0]), *[WIDTH] * DEPTH]
        parts: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            parts += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        model = nn.Sequential(*parts, nn.Linear(WIDTH, 1))
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE)
    inputs = scaled(choices)
    with torch.enable_grad():
        for _ in range(EPOCHS):
            optimiser.zero_grad()
            (model(inputs)[:, 0] - wanted).square().mean().backward()
            optimiser.step()

    def predict(of: Sequence[Ranks]) -> Tensor:
        with torch.no_grad():
            return model(scaled(of))[:, 0]

    return predict


def _proposals(
    tried: Mapping[Ranks, float],
    draw: Callable[[torch.Generator], Ranks],
    allowed: Sequence[int],
    costs: Sequence[int],
    budget: int,
    count: int,
    generator: torch.Generator,
) -> list[Ranks]:
    """Choices that were not tried: at random, and changes of the best third of those that were."""
    parents = sorted(tried, key=lambda ranks: tried[ranks])[: max(len(tried) // 3, 1)]
    found: dict[Ranks, None] = {}
    for attempt in range(20 * count):
        if len(found) == count:
            break
        if attempt % 2:
            made = draw(generator)
        else:
            ranks = list(parents[_below(len(parents), generator)])
            # one layer in expectation, and one for sure
            sure = _below(len(ranks), generator)
            for layer in range(len(ranks)):
                if layer == sure or _below(len(ranks), generator) == 0:
                    ranks[layer] = allowed[_below(len(allowed), generator)]
            made = _fitted(ranks, allowed, costs, budget, generator)
        if made not in tried:
            found[made] = None
    return list(found)


def _fitted(
    ranks: Sequence[int],
    allowed: Sequence[int],
    costs: Sequence[int],
    budget: int,
    generator: torch.Generator,
) -> Ranks:
    """The nearest choice at random that spends the budget: a step down in some layer while it costs
    too much, then steps up while one fits."""
    places = [allowed.index(rank) for rank in ranks]

    def cost() -> int:
        return sum(c * allowed[at] for c, at in zip(costs, places, strict=True))

    while cost() > budget:
        able = [layer for layer, at in enumerate(places) if at > 0]
        places[able[_below(len(able), generator)]] -= 1
    while True:
        spare = budget - cost()
        able = [
            layer
            for layer, at in enumerate(places)
            if at + 1 < len(allowed) and costs[layer] * (allowed[at + 1] - allowed[at]) <= spare
        ]
        if not able:
            return tuple(allowed[at] for at in places)
        places[able[_below(len(able), generator)]] += 1


def _below(number: int, generator: torch.Generator) -> int:
    return int(torch.randint(number, (), generator=generator))
