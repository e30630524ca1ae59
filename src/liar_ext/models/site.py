"""Site: one prunable structure in one layer, described by data and changed by one function."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from liar_ext.models import absent, linear, own_config
from liar_ext.models.absent import Block

Kind = Literal["ffn", "heads"]


@dataclass(frozen=True)
class Producer:
    """A linear whose output rows make the columns of a Site.

    Attributes:
        path: module path inside the layer.
        segment, segments: which of `segments` equal runs of rows it is, for fused projections
            (GPT-2's `c_attn` holds q, k and v as segments 0, 1 and 2 of 3).
        length: how many of these runs it is, from `segment` on: with grouped-query attention a
            fused projection has more rows of q than of k. Units are equal runs of these rows, in
            order; what is fused head by head (GPT-NeoX) is one run with q, k and v of a head in it.
    """

    path: str
    segment: int = 0
    segments: int = 1
    length: int = 1


@dataclass(frozen=True)
class SiteSpec:
    """A Site as a family declares it, for every layer alike.

    Attributes:
        kind: `ffn` (the unit is one neuron) or `heads` (one head; with grouped-query attention,
            one KV head with all its query heads).
        consumer: path of the linear whose input columns are removed.
        producers: the linears whose rows make those columns.
        attributes: integers that a module keeps of its own width: (path, attribute, what), where
            what is `units`, `columns` or `query_heads` (columns / head_dim); `config.FIELD` is what
            it reads of its config in a forward, and gets an `OwnConfig` for.
        config_fields: config fields that state the width: name -> `units`, `columns` or
            `query_heads` (columns / head_dim). None when stock transformers cannot express
            another width than the dense one.
        bias_flag: config flag that gives the consumer a bias, or None.
        bias_filler: paths of the linears that the same flag gives a bias, too.
        columns_per_unit: of the consumer; None where the narrowest producer has one head of rows
            for each unit.
        block: what goes when no unit stays; None where no module is all of the Site.
        held: hidden states that a forward which stands there holds beside what one of a LLaMA does
            (`costs.held_beside`).
    """

    kind: Kind
    consumer: str
    producers: tuple[Producer, ...]
    attributes: tuple[tuple[str, str, str], ...] = ()
    config_fields: dict[str, str] | None = None
    bias_flag: str | None = None
    bias_filler: tuple[str, ...] = ()
    columns_per_unit: int | None = None
    block: Block | None = None
    held: int = 0

    def absent(self, layer: nn.Module) -> bool:
        """Whether a layer has no unit of it: there is no Site."""
        return absent.is_absent(layer, self.block)


@dataclass
class Site:
    """A `SiteSpec` bound to one layer module. Widths are read from the module: never stale."""

    spec: SiteSpec
    layer: int
    module: nn.Module
    head_dim: int
    name: str = field(default="")

    @property
    def kind(self) -> Kind:
        return self.spec.kind

    @property
    def consumer(self) -> nn.Module:
        return self.module.get_submodule(self.spec.consumer)

    @property
    def columns(self) -> int:
        return linear.weight(self.consumer).shape[1]

    @property
    def units(self) -> int:
        """Columns for an FFN; the rows of the narrowest producer in heads for attention."""
        if self.spec.columns_per_unit is not None:
            return self.columns // self.spec.columns_per_unit
        if self.kind == "ffn":
            return self.columns
        return min(self._rows(p) for p in self.spec.producers) // self.head_dim

    @property
    def columns_per_unit(self) -> int:
        return self.columns // self.units

    @property
    def unit_weights(self) -> int:
        """Weights that go with one unit: multiplications of a token in the linears."""
        total = self.columns_per_unit * linear.weight(self.consumer).shape[0]
        for producer in self.spec.producers:
            module = self.module.get_submodule(producer.path)
            total += self._rows(producer) // self.units * linear.weight(module).shape[1]
        return total

    @property
    def unit_parameters(self) -> int:
        """Weights and biases that go with one unit."""
        total = self.unit_weights
        for producer in self.spec.producers:
            if linear.bias(self.module.get_submodule(producer.path)) is not None:
                total += self._rows(producer) // self.units
        return total

    def weight(self) -> Tensor:
        """Consumer weight (out, columns)."""
        return linear.weight(self.consumer)

    def bias(self) -> Tensor | None:
        return linear.bias(self.consumer)

    def producer_rows(self) -> list[Tensor]:
        """Rows of each producer by unit, (units, rows of a unit, in)."""
        return [
            self.rows_of(producer, linear.weight(self.module.get_submodule(producer.path)))
            for producer in self.spec.producers
        ]

    def rows_of(self, producer: Producer, whole: Tensor) -> Tensor:
        """A producer's part of what its linear has a row of for each output, by unit.

        Args:
            whole: (rows of the linear, ...).
        Returns:
            (units, rows of a unit, ...).
        """
        first = self._first_row(producer)
        own = whole[first : first + self._rows(producer)]
        return own.reshape(self.units, -1, *whole.shape[1:])

    def unit_columns(self, units: Tensor) -> Tensor:
        """Columns of the given units, (len(units) · columns_per_unit,) int64, in unit order."""
        return _expand(units, self.columns_per_unit)

    def per_unit(self, columns: Tensor) -> Tensor:
        """Sum a per-column quantity (columns,) over each unit, (units,)."""
        return columns.reshape(self.units, -1).sum(1)

    def shrink(
        self, keep: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> None:
        """Keep the units `keep` (sorted int64) and drop the rest, physically.

        Without any the block goes, and with it the Site: it must not be asked for anything later.

        Args:
            weight: repaired consumer weight (out, kept columns); None keeps the old columns.
            bias: repaired consumer bias (out,); None leaves the bias as it is.
        """
        columns = self.unit_columns(keep)
        kept_rows: dict[str, list[Tensor]] = {}
        for producer in self.spec.producers:
            rows = self._rows(producer)
            chosen = _expand(keep, rows // self.units) + self._first_row(producer)
            kept_rows.setdefault(producer.path, []).append(chosen)
        if weight is None:
            weight = self.weight().index_select(1, columns.to(self.weight().device))
        for path, parts in kept_rows.items():
            linear.keep_rows(self.module.get_submodule(path), torch.cat(parts))
        linear.set_weight(self.consumer, weight)
        if bias is not None:
            linear.set_bias(self.consumer, bias)
        widths = self._widths()
        for path, attribute, what in self.spec.attributes:
            module = self.module.get_submodule(path)
            own = attribute.removeprefix(own_config.PREFIX)
            put = setattr if own == attribute else own_config.set_field
            put(module, own, widths[what])
        if not keep.numel():
            assert self.spec.block is not None, "see `budgets`"
            absent.remove(self.module, self.spec.block, self.spec.consumer)

    def add_biases(self, *, filler: bool) -> None:
        """Give the consumer (and with `filler` its config flag's other linears) a zero bias."""
        linear.add_zero_bias(self.consumer)
        for path in self.spec.bias_filler if filler else ():
            linear.add_zero_bias(self.module.get_submodule(path))

    def config_values(self) -> dict[str, Any]:
        """Values of `config_fields` for the present widths."""
        widths = self._widths()
        return {name: widths[what] for name, what in (self.spec.config_fields or {}).items()}

    def _widths(self) -> dict[str, int]:
        return {
            "units": self.units,
            "columns": self.columns,
            "query_heads": self.columns // self.head_dim,
        }

    def _rows(self, producer: Producer) -> int:
        return self._run_of_rows(producer) * producer.length

    def _first_row(self, producer: Producer) -> int:
        return self._run_of_rows(producer) * producer.segment

    def _run_of_rows(self, producer: Producer) -> int:
        module = self.module.get_submodule(producer.path)
        return linear.weight(module).shape[0] // producer.segments


def _expand(units: Tensor, width: int) -> Tensor:
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()
