"""Gradients of the calibration loss, for the criteria that judge by them.

One pass over the dense model before anything is pruned, backward layer by layer (`backward`). No
parameter has a gradient: those of gates and weights follow from what the linears of a Site are
given and what the loss makes of it (`ops.saliency`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from liar_ext.calibration.batch import Batch
from liar_ext.criteria import CRITERIA
from liar_ext.engine.backward import BackwardPass
from liar_ext.engine.calls import layer_output
from liar_ext.engine.frozen import frozen
from liar_ext.engine.runtime import Runtime
from liar_ext.engine.shelf import Item
from liar_ext.errors import InputError
from liar_ext.models import Site, linear
from liar_ext.ops.saliency import UnitGradients, WeightGradients, gate_gradients, taylor_sums
from liar_ext.recipe import Recipe

if TYPE_CHECKING:
    from liar_ext.engine.keeper import Keeper

_FILE = "gradients"

SiteGradients = dict[tuple[int, str], UnitGradients]


@dataclass
class GradientPass:
    """Gradients with respect to gates on the units of the targeted Sites, and Taylor sums.

    Attributes:
        recipe: its first `gradient_samples` calibration windows are what the loss is of.
        targets: the layers that are pruned.
        facts: for the report.
    """

    runtime: Runtime
    batches: Sequence[Batch]
    recipe: Recipe
    targets: range
    facts: dict[str, Any] = field(default_factory=dict)
    name = "gradients"

    def __post_init__(self) -> None:
        recipe = self.recipe
        self._pass = BackwardPass(
            self.runtime,
            self.batches,
            recipe.gradient_samples,
            self.targets.start,
            f"--criterion {recipe.criterion}",
            [name for name, other in CRITERIA.items() if not other.differentiates],
            facts=self.facts,
        )
        self._weights = CRITERIA[recipe.criterion].needs == "weight_gradients"
        self._gates: dict[tuple[int, str], dict[int, Tensor]] = {}
        self._taylor: dict[tuple[int, str], dict[str, Tensor]] = {}

    @torch.no_grad()
    def results(self, keeper: Keeper | None) -> SiteGradients:
        """By layer and kind, on the CPU, the same on every rank; those that an earlier run has
        kept, if any.

        Raises:
            InputError: there is nothing to predict, or the loss or a gradient is NaN or infinite.
        """
        kept = None if keeper is None else keeper.aside(_FILE)
        if kept is not None:
            self.facts = kept[1]
            return _unflattened(kept[0])
        found = self._run()
        if keeper is not None:
            with self.runtime.clock.phase("write"):
                keeper.put_aside(_FILE, _flattened(found), self.facts)
        return found

    def _run(self) -> SiteGradients:
        with frozen(self.runtime.model):
            self._pass.run(self._backward)
        return self._gathered()

    def _backward(self, index: int, entered: Mapping[int, Item], upstream: dict[int, Item]) -> None:
        """Through one layer, all batches of this rank; `upstream` goes on to what entered it."""
        sites: list[Site] = []
        if index in self.targets:
            sites = self.runtime.sites(index, self.recipe.target)
        with self.runtime.clock.phase("backward"):
            taps = _Taps(self.runtime.layers[index], sites, self._weights)
            sums = {path: self._sums(taps.modules[path]) for path in taps.weights}
        for number, item in entered.items():
            with self.runtime.clock.phase("backward"):
                states = self._batch(index, number, item, upstream[number], taps, sums)
            with self.runtime.clock.phase("hold"):
                for used in (item, upstream[number]):
                    used.free()
                upstream[number] = self.runtime.shelf.put(states)
        if sums:
            with self.runtime.clock.phase("backward"):
                for own in sums.values():
                    self.runtime.ranks.sum_(own.total)
                    self.runtime.ranks.sum_(own.squares)
                for site in sites:
                    self._taylor[index, site.kind] = self._reduced(site, sums)

    def _batch(
        self,
        index: int,
        number: int,
        entered: Item,
        upstream: Item,
        taps: _Taps,
        sums: Mapping[str, WeightGradients],
    ) -> Tensor:
        """One batch: gates and weight gradients from it, and the gradient of what entered."""
        batch, call = self._pass.windows[number], self._pass.stream.call(number, index)
        part = batch.parts[self.runtime.layers.stack(index)]
        mask = part.mask_on(self.runtime.device)
        hidden = entered.fetch().detach().requires_grad_()
        with torch.enable_grad(), taps.recording():
            output = layer_output(self.runtime.layers[index], hidden, call)
        given = [taps.given[site.spec.consumer] for site in taps.sites]
        made = [taps.made[path] for path in sums]
        # nobody needs what enters the first targeted layer
        first = index == self.targets.start
        wanted = [*given, *made, *([] if first else [hidden])]
        found = list(torch.autograd.grad(output, wanted, upstream.fetch()))
        entering = hidden.new_empty(0) if first else found.pop()
        length = len(batch.input_ids)
        scale = 1 / self._pass.counts[number].clamp(min=1).double()
        for site, x, gradient in zip(taps.sites, given, found[: len(given)], strict=True):
            rows = gate_gradients(
                _by_example(x, length), _by_example(gradient, length), site.columns_per_unit, mask
            )
            gates = self._gates.setdefault((index, site.kind), {})
            gates[number] = rows.cpu() * scale[:, None]
        for path, gradient in zip(sums, found[len(given) :], strict=True):
            x = _by_example(taps.given[path], length)
            sums[path].add(x, _by_example(gradient, length), scale, mask)
        taps.clear()
        return entering

    def _sums(self, module: nn.Module) -> WeightGradients:
        # as of Moments: float64 where there is something to add up whose order may change
        dtype = torch.float32 if self._pass.stream.alone else torch.float64
        return WeightGradients(linear.weight(module), dtype)

    def _reduced(self, site: Site, sums: Mapping[str, WeightGradients]) -> dict[str, Tensor]:
        """Taylor sums of a Site's units, over its consumer's columns and its producers' rows."""
        examples = sum(len(batch.input_ids) for batch in self._pass.windows)

        def means(path: str) -> tuple[Tensor, Tensor]:
            return sums[path].total / examples, sums[path].squares / examples

        total, squares = means(site.spec.consumer)
        columns = taylor_sums(site.weight().T, total.T, squares.T)
        found = {form: site.per_unit(values) for form, values in columns.items()}
        rows: dict[str, dict[str, Tensor]] = {}
        for producer in site.spec.producers:
            if producer.path not in rows:
                weight = linear.weight(site.module.get_submodule(producer.path))
                rows[producer.path] = taylor_sums(weight, *means(producer.path))
            for form, values in rows[producer.path].items():
                found[form] = found[form] + site.rows_of(producer, values).sum(1)
        return {form: values.cpu() for form, values in found.items()}

    def _gathered(self) -> SiteGradients:
        """Examples of all ranks in the order of the batches."""
        parts = self.runtime.ranks.gather(self._gates)
        found: SiteGradients = {}
        for index in self.targets:
            for site in self.runtime.sites(index, self.recipe.target):
                key = index, site.kind
                rows = {n: r for part in parts for n, r in part.get(key, {}).items()}
                gates = torch.cat([rows[number] for number in sorted(rows)])
                found[key] = UnitGradients(gates, self._taylor.get(key, {}))
                for values in (gates, *found[key].taylor.values()):
                    if not bool(torch.isfinite(values).all()):
                        raise InputError(
                            f"{site.name}: gradients of the loss are NaN or infinite; compute in "
                            "a wider type with --dtype"
                        )
        self._gates, self._taylor = {}, {}
        return found


class _Taps:
    """What linears of Sites are given and give in a forward with autograd.

    Attributes:
        sites: whose consumers' inputs are wanted; weights: paths of the linears whose outputs are,
            too. modules: by path.
        given, made: by path, while `recording` or since.
    """

    def __init__(self, layer: nn.Module, sites: Sequence[Site], weights: bool) -> None:
        self.sites = sites
        consumers = [site.spec.consumer for site in sites]
        producers = [p.path for site in sites for p in site.spec.producers] if weights else []
        paths = list(dict.fromkeys((*consumers, *producers)))
        self.modules = {path: layer.get_submodule(path) for path in paths}
        self.weights = paths if weights else []
        self.given: dict[str, Tensor] = {}
        self.made: dict[str, Tensor] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        def hook_of(path: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                self.given[path], self.made[path] = args[0], output

            return hook

        handles = [m.register_forward_hook(hook_of(path)) for path, m in self.modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def clear(self) -> None:
        """Let go of a batch's graph."""
        self.given, self.made = {}, {}


def _by_example(tensor: Tensor, examples: int) -> Tensor:
    """(b, t, n), also of the (b · t, n) that some families make for their FFN."""
    return tensor.detach().reshape(examples, -1, tensor.shape[-1])


def _flattened(found: SiteGradients) -> dict[str, Tensor]:
    tensors = {}
    for (layer, kind), gradients in found.items():
        tensors[f"{layer}.{kind}.gates"] = gradients.gates
        for form, values in gradients.taylor.items():
            tensors[f"{layer}.{kind}.{form}"] = values
    return tensors


def _unflattened(tensors: Mapping[str, Tensor]) -> SiteGradients:
    parts: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, values in tensors.items():
        layer, kind, what = name.split(".")
        parts.setdefault((int(layer), kind), {})[what] = values
    return {key: UnitGradients(part.pop("gates"), part) for key, part in parts.items()}
