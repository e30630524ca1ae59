"""Which width all layers are padded to, and the stock config that states it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from liar_ext.errors import InputError
from liar_ext.models import adapter_for, layout
from liar_ext.models.adapter import Adapter
from liar_ext.models.site import SiteSpec

TARGETS = ("widest", "dense")


@dataclass(frozen=True)
class Widths:
    """What is asked for.

    Attributes:
        to: `widest`, the widest layer's width, or `dense`, the width before pruning. Where a config
            cannot state another width than the dense one, it is that in either case.
        round_to: FFN widths are multiples of it.
        tensor_parallel: FFN widths and heads (KV heads where they are grouped) divide among so many
            devices.
    Raises:
        InputError: another word, or a number below 1.
    """

    to: str = "widest"
    round_to: int = 1
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        if self.to not in TARGETS:
            raise InputError(f"--to {self.to}: must be one of {', '.join(TARGETS)}")
        for name in ("round_to", "tensor_parallel"):
            if getattr(self, name) < 1:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{flag} {getattr(self, name)}: must be 1 or more")


def stock_config(
    data: dict[str, Any], narrow: PreTrainedModel, widths: Widths
) -> tuple[dict[str, Any], list[dict[str, int]]]:
    """The `config.json` of the padded model, and units of each of its layers.

    Args:
        data: the narrow model's `config.json`; narrow: it on `meta`.
    Raises:
        InputError: no stock config states it: biases that the family has no flag for, or a dense
            width that is not known.
    """
    adapter = adapter_for(narrow.config)
    _check_biases(data, adapter)
    base = layout.base_data(data)
    before = layout.read(narrow)
    dense = layout.read(layout.empty_model(layout.config_object(base)))
    if layout.KEY not in data and widths.to == "dense":
        raise InputError(
            "--to dense: this folder loads in stock transformers, and its config.json does not "
            "know the width before pruning; use --to widest, with --round-to or --tensor-parallel"
        )
    ffn = _target("ffn", before, dense, adapter, widths, known=layout.KEY in data)
    for heads in _heads(before, dense, adapter, widths, known=layout.KEY in data):
        units = {"ffn": ffn, "heads": heads}
        each: dict[str, int] = {spec.kind: units[spec.kind] for spec in adapter.sites}
        own = [each] * len(before)
        values = _values(narrow, adapter, each, dense[0])
        found = layout.describe(base, adapter, own, values, [])
        if layout.KEY not in found:
            return found, own
    raise InputError(
        f"config.json ({base['model_type']}): no stock config states layers of equal width here; "
        "load this folder with liar_ext.load"
    )


def uneven(units: dict[str, int], widths: Widths) -> list[str]:
    """What to say of widths that are not as asked for: the dense one is never exceeded."""
    asked = (
        ("--round-to", widths.round_to, ["ffn"]),
        ("--tensor-parallel", widths.tensor_parallel, ["ffn", "heads"]),
    )
    return [
        f"{flag} {number}: {kind} is {units[kind]}, the width before pruning, which {number} does "
        "not divide"
        for flag, number, kinds in asked
        for kind in kinds
        if units.get(kind, 0) % number
    ]


def _check_biases(data: dict[str, Any], adapter: Adapter) -> None:
    added = (data.get(layout.KEY) or {}).get("added_biases") or []
    if added:
        raise InputError(
            f"its {' and '.join(added)} consumers were given biases, and a stock "
            f"{adapter.model_type} config has no flag for them: prune again with --bias never, or "
            "load this folder with liar_ext.load"
        )


def _spec(adapter: Adapter, kind: str) -> SiteSpec | None:
    return next((spec for spec in adapter.sites if spec.kind == kind), None)


def _target(
    kind: str,
    before: list[dict[str, int]],
    dense: list[dict[str, int]],
    adapter: Adapter,
    widths: Widths,
    *,
    known: bool,
) -> int:
    """Units of a kind that all layers get.

    Raises:
        InputError: dense layers are not of one width.
    """
    spec = _spec(adapter, kind)
    if spec is None:
        return 0
    most = {layer[kind] for layer in dense}
    if len(most) > 1:
        raise InputError(
            f"config.json: its layers were of several widths before they were pruned ({kind}: "
            f"{', '.join(map(str, sorted(most)))}), which no stock config states"
        )
    dense_units = most.pop()
    if known and (widths.to == "dense" or spec.config_fields is None):
        return dense_units
    wanted = max(layer[kind] for layer in before)
    step = widths.tensor_parallel
    if kind == "ffn":
        # both are to divide it
        step = widths.round_to * step if widths.round_to % step else widths.round_to
    found = max(-(-wanted // step), 1) * step
    if not known and spec.config_fields is None and found != wanted:
        raise InputError(
            f"config.json: a stock {adapter.model_type} config cannot state other {kind} than it "
            f"has ({wanted}), so they cannot be padded"
        )
    # the dense width is always one that the family runs at
    return min(found, dense_units) if known else found


def _heads(
    before: list[dict[str, int]],
    dense: list[dict[str, int]],
    adapter: Adapter,
    widths: Widths,
    *,
    known: bool,
) -> Iterator[int]:
    """Numbers of heads to try: a family may accept some only, as divisors of the hidden size."""
    least = _target("heads", before, dense, adapter, widths, known=known)
    yield least
    if known:
        step = widths.tensor_parallel
        yield from range(least + step, dense[0].get("heads", 0), step)
        if least < dense[0].get("heads", 0):
            yield dense[0]["heads"]


def _values(
    narrow: PreTrainedModel, adapter: Adapter, units: dict[str, int], dense: dict[str, int]
) -> dict[str, Any]:
    """Config fields for these units."""
    values: dict[str, Any] = {}
    for spec in adapter.sites:
        if spec.config_fields is None or units[spec.kind] == dense[spec.kind]:
            continue
        site = _site(narrow, adapter, spec)
        columns = units[spec.kind] * site.columns_per_unit
        stated = {
            "units": units[spec.kind],
            "columns": columns,
            "query_heads": columns // site.head_dim,
        }
        values |= {name: stated[what] for name, what in spec.config_fields.items()}
    return values


def _site(narrow: PreTrainedModel, adapter: Adapter, spec: SiteSpec) -> Any:
    """A Site of this kind; some layers may have none."""
    for index in range(len(adapter.layer_list(narrow)[1])):
        if found := adapter.sites_of(narrow, index, (spec.kind,)):
            return found[0]
    # of none, its width is stated by the dense model
    base = layout.empty_model(narrow.config)
    return adapter.sites_of(base, 0, (spec.kind,))[0]
