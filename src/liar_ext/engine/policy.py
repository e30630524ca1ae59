"""Which units to keep, learned from losses of masked models: forward passes only (`ops.policy`).

A pass before anything is pruned. Forward once through the dense model: the scores that the search
starts from, what enters the first layer that is pruned, and what the model says of each batch. Then
step after step: the masks of a step go through the layers together, so that each layer is read once
whatever their number; what is masked is the consumers' inputs, and no weight changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import cos, isfinite, pi
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from liar_ext.calibration.batch import Batch
from liar_ext.criteria import CRITERIA, Evidence, unit_scores
from liar_ext.engine.calls import layer_output
from liar_ext.engine.gates import gated
from liar_ext.engine.keeper import beginning
from liar_ext.engine.loss import NO_TARGET, loss_sum, next_tokens
from liar_ext.engine.ranks import Ranks
from liar_ext.engine.runtime import Runtime
from liar_ext.engine.shelf import Item
from liar_ext.engine.statistics import SiteColumns, valid_rows
from liar_ext.errors import InputError
from liar_ext.models import Site
from liar_ext.ops.policy import Policy, initial
from liar_ext.recipe import Recipe

if TYPE_CHECKING:
    from liar_ext.engine.keeper import Keeper

# of a step. The paper has 2; what counts is how many there are together, and a step reads the model
MASKS = 8
# the first step moves a probability so far for a loss of one deviation; falls as a cosine
STEP_SIZE = 0.05
_FILE = "policy"
# of steps, whose mean losses are reported
_SHARE = 10


@dataclass
class PolicyPass:
    """Keep probabilities of the units of the targeted Sites.

    Every rank has all batches and all probabilities, and masks of its own of each step.

    Attributes:
        batches: the calibration; a step has one of them, in turn.
        recipe: its sparsity is what the search is told to remove, of each kind.
        targets: the layers that are pruned.
        facts: for the report.
    """

    runtime: Runtime
    batches: Sequence[Batch]
    recipe: Recipe
    targets: range
    facts: dict[str, Any] = field(default_factory=dict)
    name = "policy"

    def __post_init__(self) -> None:
        self._alone = Ranks.single(self.runtime.device)
        self._stream = self.runtime.stream(self.batches, ranks=self._alone)
        # in the order in which masks are laid out
        self._places = {
            (index, site.kind): site.units for index in self.targets for site in self._sites(index)
        }
        # what enters the first targeted layer, and what the dense model makes of each batch
        self._entering: dict[int, Item] = {}
        self._dense: dict[int, float] = {}
        self._wanted: dict[int, Item] = {}
        # a batch of windows of one token has no loss of the next one
        self._judged = [
            number
            for number, batch in enumerate(self.batches)
            if not self.runtime.predicts or bool((next_tokens(batch) != NO_TARGET).any())
        ]

    @torch.no_grad()
    def results(self, keeper: Keeper | None) -> dict[tuple[int, str], Tensor]:
        """Scores (`Policy.scores`) by layer and kind, (units,) float64 on the CPU, the same on
        every rank; goes on from where an earlier run was, if one was.

        Raises:
            InputError: there is nothing to predict; the dense model's loss or states are NaN or
                infinite, or those of all masks of many steps.
        """
        if not self._judged:
            raise InputError(
                "--criterion policy: the calibration windows have no next token to predict; give "
                "longer ones"
            )
        kept = None if keeper is None else keeper.aside(_FILE)
        policy, losses = (None, []) if kept is None else _restored(kept[0])
        if policy is None or len(losses) < self.recipe.policy_steps:
            # other GPUs may find others
            scores = self.runtime.ranks.broadcast(self._measure())
            policy = policy or self._started(scores)
            self._learn(policy, losses, keeper)
            for item in (*self._entering.values(), *self._wanted.values()):
                item.free()
        self.facts = self._said(losses)
        return self._by_site(policy.scores())

    def _sites(self, index: int) -> list[Site]:
        return self.runtime.sites(index, self.recipe.target)

    def _measure(self) -> dict[tuple[int, str], Tensor]:
        """One dense forward of all batches: unit scores of Wanda, and what losses are compared
        with."""
        self.runtime.embed(self._stream)
        layers = len(self.runtime.layers)
        self.runtime.progress.begin(layers, "measuring the dense model")
        scores: dict[tuple[int, str], Tensor] = {}
        for index in range(layers):
            self.runtime.open(index)
            sites = self._sites(index) if index in self.targets else []
            taps = [(site, SiteColumns(site.columns, self.runtime.device)) for site in sites]
            later = self._stream.through(index, taps, onward=True)
            for site, tap in taps:
                evidence = Evidence(site, tap.finish(self._alone))
                scores[index, site.kind] = unit_scores(site, CRITERIA["wanda"].score(evidence))
            self.runtime.close(index)
            if index == self.targets.start:
                self._entering, self._stream.hidden = self._stream.hidden, later
            else:
                self._stream.advance(later)
            self.runtime.progress.layer(index)
        self._compare()
        return {key: own.cpu() for key, own in scores.items()}

    def _compare(self) -> None:
        """What the dense model makes of each batch."""
        if not self.runtime.predicts:
            self._wanted, self._stream.hidden = self._stream.hidden, {}
            for number, item in self._wanted.items():
                rows = self._last_rows(number, item.fetch())
                if not bool(torch.isfinite(rows).all()):
                    raise InputError(
                        "--criterion policy: the dense model's last hidden states are NaN or "
                        "infinite; check the checkpoint, or compute in a wider type with --dtype"
                    )
            return
        with self.runtime.head() as head:
            for number in self._judged:
                item = self._stream.hidden[number]
                loss = self._dense[number] = self._next_token_loss(head, number, item)
                if not isfinite(loss):
                    raise InputError(
                        "--criterion policy: the dense model's loss on the calibration windows is "
                        f"{loss}; check the checkpoint, or compute in a wider type with --dtype"
                    )
        self._stream.advance({})

    def _started(self, scores: Mapping[tuple[int, str], Tensor]) -> Policy:
        share = 1 - self.recipe.sparsity
        keep = {}
        for kind in self.recipe.target:
            own = [_standardised(scores[key]) for key in self._places if key[1] == kind]
            keep[kind] = initial(torch.cat(own), share)
        return Policy(keep, share, torch.Generator().manual_seed(self.recipe.seed))

    def _learn(self, policy: Policy, losses: list[list[float]], keeper: Keeper | None) -> None:
        """The steps that are left; `losses` of all masks of each grow with them."""
        done, steps = len(losses), self.recipe.policy_steps
        # a run that is killed in the pass begins again as this one did
        start = beginning(self.recipe.seed)
        self.runtime.progress.begin(steps, "learning masks", done)
        for step in range(done, steps):
            masks = policy.draw(MASKS)
            found = self._losses(self._judged[step % len(self._judged)], masks)
            size = STEP_SIZE * (1 + cos(pi * step / steps)) / 2
            policy.step(torch.tensor(found, dtype=torch.float64), masks, size)
            losses.append(found)
            failed = _failed(losses)
            # every batch in turn, or all of the search
            if failed == min(len(self._judged), steps):
                raise InputError(
                    f"--criterion policy: no mask of the last {failed} steps has a finite loss; "
                    "lower --sparsity, or compute in a wider type with --dtype"
                )
            if keeper is not None:
                with self.runtime.clock.phase("write"):
                    keeper.keep_midway(start, _FILE, *self._stored(policy, losses))
            self.runtime.progress.layer(step)
        if keeper is not None:
            with self.runtime.clock.phase("write"):
                keeper.put_aside(_FILE, *self._stored(policy, losses))

    def _losses(self, number: int, masks: Mapping[str, Tensor]) -> list[float]:
        """Of the masked models on one batch, the same on every rank."""
        mine = self.runtime.ranks.share(MASKS)
        states: dict[int, Item] = {}
        by_site = self._by_site(masks)
        for index in range(self.targets.start, len(self.runtime.layers)):
            self.runtime.open_again(index)
            sites = self._sites(index) if index in self.targets else []
            with gated(sites) as gates:
                for mask in mine:
                    gates.values = [
                        by_site[index, site.kind][mask].to(self.runtime.device) for site in sites
                    ]
                    states[mask] = self._through(index, number, states.get(mask))
            self.runtime.close(index)
        own = {}
        with self.runtime.head() if self.runtime.predicts else nullcontext() as head:
            for mask, item in states.items():
                own[mask] = self._loss(head, number, item)
                item.free()
        every = {
            mask: loss for part in self.runtime.ranks.gather(own) for mask, loss in part.items()
        }
        return [every[mask] for mask in range(MASKS)]

    def _through(self, index: int, number: int, before: Item | None) -> Item:
        with self.runtime.clock.phase("hold"):
            states = (before or self._entering[number]).fetch()
        with self.runtime.clock.phase("forward"):
            after = layer_output(
                self.runtime.layers[index], states, self._stream.call(number, index)
            )
        with self.runtime.clock.phase("hold"):
            if before is not None:
                before.free()
            return self.runtime.shelf.put(after)

    def _loss(self, head: nn.Module | None, number: int, item: Item) -> float:
        """How much worse than the dense model: nats a token, or the relative error of the last
        hidden states."""
        if head is not None:
            return self._next_token_loss(head, number, item) - self._dense[number]
        with self.runtime.clock.phase("hold"):
            found, wanted = item.fetch(), self._wanted[number].fetch()
        with self.runtime.clock.phase("forward"):
            rows = self._last_rows(number, wanted).double()
            error = (self._last_rows(number, found).double() - rows).square().sum()
            return float(error / rows.square().sum())

    def _last_rows(self, number: int, states: Tensor) -> Tensor:
        """What left the last layer, of the valid tokens that it reads, (tokens, d)."""
        last = len(self.runtime.layers) - 1
        own = self._stream.own(number, last, states)
        return valid_rows(own, self._stream.valid(number, last))

    def _next_token_loss(self, head: nn.Module, number: int, item: Item) -> float:
        batch = self.batches[number]
        targets = next_tokens(batch)
        predicted = int((targets != NO_TARGET).sum())
        with self.runtime.clock.phase("hold"):
            final = item.fetch()
        with self.runtime.clock.phase("forward"):
            last = self.runtime.last_hidden(batch, final)
            return float(loss_sum(head, last, targets.to(self.runtime.device))) / predicted

    def _by_site(self, values: Mapping[str, Tensor]) -> dict[tuple[int, str], Tensor]:
        """Each Site's part of (..., units of all layers) by kind."""
        found: dict[tuple[int, str], Tensor] = {}
        at = dict.fromkeys(values, 0)
        for (index, kind), units in self._places.items():
            found[index, kind] = values[kind][..., at[kind] : at[kind] + units].contiguous()
            at[kind] += units
        return found

    def _stored(
        self, policy: Policy, losses: list[list[float]]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"keep.{kind}": keep for kind, keep in policy.keep.items()}
        tensors |= {f"start.{kind}": start for kind, start in policy.start.items()}
        tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
        tensors["generator"] = policy.generator.get_state()
        tensors["state"] = torch.tensor(
            [policy.share, policy.baseline, policy.spread], dtype=torch.float64
        )
        return tensors, {}

    def _said(self, losses: list[list[float]]) -> dict[str, Any]:
        """Mean losses of the first and the last steps, beside the dense model's; None where none is
        finite."""
        found = torch.tensor(losses, dtype=torch.float64)
        part = max(1, len(found) // _SHARE)
        return {
            "steps": len(found),
            "masks": found.numel(),
            "dropped": int((~found.isfinite()).sum()),
            "loss": "next token" if self.runtime.predicts else "last hidden states",
            "first": _mean(found[:part]),
            "last": _mean(found[-part:]),
        }


def _mean(losses: Tensor) -> float | None:
    """Of those that are finite, if any is."""
    finite = losses[losses.isfinite()]
    return float(finite.mean()) if len(finite) else None


def _failed(losses: Sequence[Sequence[float]]) -> int:
    """The last steps in a row in which no mask had a finite loss, also those of an earlier run."""
    return next(
        (n for n, own in enumerate(reversed(losses)) if any(map(isfinite, own))), len(losses)
    )


def _standardised(scores: Tensor) -> Tensor:
    """Zeros where all scores are equal."""
    spread = float(scores.std()) if len(scores) > 1 else 0.0
    return (scores - scores.mean()) / spread if spread > 0 else torch.zeros_like(scores)


def _restored(tensors: Mapping[str, Tensor]) -> tuple[Policy, list[list[float]]]:
    def named(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}

    generator = torch.Generator()
    generator.set_state(tensors["generator"])
    share, baseline, spread = tensors["state"].tolist()
    losses = tensors["losses"].tolist()
    return Policy(named("keep."), share, generator, baseline, spread, named("start.")), losses
