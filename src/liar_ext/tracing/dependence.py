"""Which rows of which linears make which columns of a consumer, and the units that this leaves.

A *unit* is a connected component of the dependency between rows of the producers and columns of the
consumer: an FFN neuron, a head, a key/value head with its query heads (LLM-Pruner, arXiv
2305.11627, groups layers by such a graph; here it is read off values instead of an autograd trace).

The component of one column is found by going to and fro: gradients say which rows a set of columns
depends on, a forward says which columns a set of rows reaches. From the first component follows a
hypothesis: all units are equal runs of rows and columns, in order. Then log2(units) pairs of
forwards prove it: in each, the rows of all units whose number has that bit set (or not) say
something else, and exactly the columns of these units have to change. Two units differ in some bit,
so a column that depended on another unit would change in a forward where it must not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from liar_ext.errors import InputError
from liar_ext.models.site import Kind, Producer, SiteSpec
from liar_ext.tracing.probe import NOT_CALLED, LayerProbe, Seen, changed, changed_tokens
from liar_ext.tracing.stand_ins import TOKENS

# forwards back and forth before a component must be complete
_ROUNDS = 8


class NoSite(InputError):
    """A consumer whose input is made inside the layer, and that cannot lose columns; says why."""


@dataclass(frozen=True)
class Units:
    """The units of a consumer.

    Attributes:
        spec: without attributes and config fields.
        rows: by producer, (units, rows of a unit); columns: (units, columns of a unit); int64.
        head_dim: columns of one query head; 1 for an FFN.
    """

    spec: SiteSpec
    rows: dict[str, Tensor]
    columns: Tensor
    head_dim: int


@dataclass(frozen=True)
class Graph:
    """What reaches what without passing another linear.

    Attributes:
        into: for each linear, the linears whose outputs it is given something of.
        inner: the linears that are given nothing of the layer's input directly.
        to_output: the linears that reach the layer's output directly.
        odd: linears that cannot be looked at, and why.
        residual: the output is the input and the sum of what reaches it directly.
    """

    into: dict[str, tuple[str, ...]]
    inner: tuple[str, ...]
    to_output: frozenset[str]
    odd: dict[str, str]
    residual: bool


def graph(probe: LayerProbe) -> Graph:
    """Everything by one forward: in experiment i linear i says something else, in the last the
    layer's input is another."""
    paths = list(probe.linears)
    count = len(paths) + 2
    said = {
        path: torch.cat([probe.base(path, int(row == i)) for row in range(count)])
        for i, path in enumerate(paths, 1)
    }
    hidden = torch.cat([probe.hidden(int(row == count - 1)) for row in range(count)])
    with torch.no_grad():
        seen = probe.run(count, said, hidden)
    for path, how in seen.odd.items():
        if how == NOT_CALLED:
            raise InputError(f"{path} {how}, so what it does is not known")
    into, inner = {}, []
    for path, x in seen.inputs.items():
        hit = changed(x, x[:1]).any(1).tolist()
        into[path] = tuple(name for i, name in enumerate(paths, 1) if hit[i])
        if not hit[-1]:
            inner.append(path)
    reached = changed(seen.output, seen.output[:1]).any(1).tolist()
    to_output = frozenset(name for i, name in enumerate(paths, 1) if reached[i])
    total = hidden[:1] + sum(said[name][:1] for name in sorted(to_output))
    same_width = all(probe.widths[name] == hidden.shape[-1] for name in to_output)
    residual = same_width and not bool(changed(seen.output[:1], total).any())
    return Graph(into, tuple(inner), to_output, seen.odd, residual)


def units(probe: LayerProbe, found: Graph, consumer: str) -> Units:
    """The units of an inner linear.

    Raises:
        NoSite: it has none, or they are laid out as a `SiteSpec` cannot say.
    """
    producers = found.into[consumer]
    if not producers:
        raise NoSite(f"{consumer}: no linear of the layer makes its columns")
    for path in producers:
        if path in found.odd:
            raise NoSite(f"{consumer}: {path}, which makes its columns, {found.odd[path]}")
        users = [name for name, sources in found.into.items() if path in sources]
        users += ["the layer's output"] if path in found.to_output else []
        others = [name for name in users if name != consumer]
        if others:
            raise NoSite(f"{consumer}: {path}, which makes its columns, also reaches {others[0]}")
    first_columns, first_rows = _component(probe, consumer, producers, column=0)
    width = _inputs(probe, 1, consumer, {}).shape[-1]
    per_unit = first_columns.numel()
    if per_unit == width:
        raise NoSite(_all_one(probe, consumer, producers))
    if not torch.equal(first_columns, torch.arange(per_unit)) or width % per_unit:
        raise NoSite(f"{consumer}: the columns of a unit are not one run of equal length")
    count = width // per_unit
    rows, declared = {}, []
    for path in producers:
        runs = _runs(first_rows[path])
        rows[path] = _spread(runs, count)
        declared += _declared(path, runs, count, probe.widths[path], consumer)
    columns = torch.arange(width).reshape(count, per_unit)
    _prove(probe, consumer, rows, columns)
    mixes = _mixes_tokens(probe, consumer, rows)
    kind = _kind(consumer, per_unit, mixes)
    head = _head_width(probe, consumer, rows, per_unit) if kind == "heads" else 1
    spec = SiteSpec(kind, consumer, tuple(declared), columns_per_unit=per_unit)
    return Units(spec, rows, columns, head)


def _component(
    probe: LayerProbe, consumer: str, producers: Sequence[str], column: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Columns and rows, sorted, that are connected with a column."""
    columns = torch.tensor([column])
    rows: dict[str, Tensor] = {}
    for _ in range(_ROUNDS):
        gradients = _gradients(probe, consumer, producers, columns)
        rows = {p: (g != 0).any(0).any(0).nonzero().flatten() for p, g in gradients.items()}
        reached = _reached(probe, consumer, rows)
        if torch.equal(reached, columns):
            return columns, rows
        columns = torch.cat([reached, columns]).unique()
    raise NoSite(f"{consumer}: what its columns depend on does not close after {_ROUNDS} steps")


def _gradients(
    probe: LayerProbe, consumer: str, producers: Sequence[str], columns: Tensor, token: int = -1
) -> dict[str, Tensor]:
    """Of a weighted sum of columns (of all tokens, or one) in each producer: (1, T, rows)."""
    said = {path: probe.base(path).requires_grad_() for path in producers}
    with torch.enable_grad():
        x = _inputs(probe, 1, consumer, said)[..., columns]
        weights = probe.base(consumer, 1)[0, 0, :1] + torch.arange(x.numel()).reshape(x.shape) % 7
        weighted = x * weights
        total = weighted.sum() if token < 0 else weighted[:, token].sum()
        found = torch.autograd.grad(total, list(said.values()), allow_unused=True)
    return {
        path: torch.zeros_like(said[path]) if g is None else g
        for path, g in zip(producers, found, strict=True)
    }


def _reached(probe: LayerProbe, consumer: str, rows: Mapping[str, Tensor]) -> Tensor:
    """Columns that change when these rows say something else, sorted."""
    said = {p: _altered(probe, p, [torch.empty(0, dtype=torch.int64), r]) for p, r in rows.items()}
    with torch.no_grad():
        x = _inputs(probe, 2, consumer, said)
    return changed(x[1:], x[:1])[0].nonzero().flatten()


def _altered(probe: LayerProbe, path: str, rows: Sequence[Tensor]) -> Tensor:
    """(B, T, out): in experiment i the rows `rows[i]` say something else."""
    said = probe.base(path).repeat(len(rows), 1, 1)
    other = probe.base(path, 1)[0]
    for i, own in enumerate(rows):
        said[i, :, own] = other[:, own]
    return said


def _inputs(probe: LayerProbe, count: int, consumer: str, said: Mapping[str, Tensor]) -> Tensor:
    seen: Seen = probe.run(count, said)
    return seen.inputs[consumer]


def _prove(probe: LayerProbe, consumer: str, rows: Mapping[str, Tensor], columns: Tensor) -> None:
    """Exactly the columns of the units that say something else change, in every coded forward."""
    count = columns.shape[0]
    bits = max(1, math.ceil(math.log2(count)))
    numbers = torch.arange(count)
    chosen = [(numbers >> bit) % 2 == value for bit in range(bits) for value in (0, 1)]
    none = torch.zeros(count, dtype=torch.bool)
    groups = [none, *chosen]
    said = {
        path: _altered(probe, path, [own[group].flatten() for group in groups])
        for path, own in rows.items()
    }
    with torch.no_grad():
        x = _inputs(probe, len(groups), consumer, said)
    hit = changed(x, x[:1])
    for group, got in zip(groups, hit, strict=True):
        expected = torch.zeros_like(got)
        expected[columns[group].flatten()] = True
        if not torch.equal(got, expected):
            wrong = int((got != expected).nonzero()[0])
            raise NoSite(
                f"{consumer}: column {wrong} does not depend on its unit alone; the units are not "
                "equal runs in order"
            )


def _mixes_tokens(probe: LayerProbe, consumer: str, rows: Mapping[str, Tensor]) -> bool:
    """Whether what producers say of a token reaches the consumer's input at another.

    Raises:
        NoSite: tokens are not where they were.
    """
    row, token = 1, TOKENS // 2
    said = {}
    for path in rows:
        said[path] = probe.base(path).repeat(3, 1, 1)
        said[path][row, token] = probe.base(path, 1)[0, token]
    with torch.no_grad():
        x = _inputs(probe, 3, consumer, said)
    hit = changed_tokens(x, x[:1]).any(-1)
    if bool(hit[0].any()) or bool(hit[2].any()) or not bool(hit[row, token]):
        raise NoSite(f"{consumer}: its input has the tokens in another order than the layer's")
    return int(hit[row].sum()) > 1


def _kind(consumer: str, per_unit: int, mixes: bool) -> Kind:
    if mixes and per_unit > 1:
        return "heads"
    if not mixes and per_unit == 1:
        return "ffn"
    what = "mix tokens" if mixes else "do not mix tokens"
    raise NoSite(
        f"{consumer}: units of {per_unit} columns that {what} are neither neurons nor heads"
    )


def _head_width(probe: LayerProbe, consumer: str, rows: Mapping[str, Tensor], per_unit: int) -> int:
    """Columns of one query head: those that the queries behind column 0 reach.

    Queries are the rows that a column at a token depends on at that token only.
    """
    token = TOKENS - 1
    gradients = _gradients(probe, consumer, list(rows), torch.tensor([0]), token)
    queries = {}
    for path, gradient in gradients.items():
        now, before = gradient[0, token] != 0, (gradient[0, :token] != 0).any(0)
        queries[path] = (now & ~before).nonzero().flatten()
    reached = _reached(probe, consumer, queries)
    size = reached.numel()
    if size and torch.equal(reached, torch.arange(size)) and per_unit % size == 0:
        return size
    return per_unit


def _runs(rows: Tensor) -> list[tuple[int, int]]:
    """Sorted numbers as (start, length) of runs without a gap."""
    if not rows.numel():
        return []
    ends = ((rows[1:] - rows[:-1]) > 1).nonzero().flatten() + 1
    parts = torch.tensor_split(rows, ends)
    return [(int(part[0]), part.numel()) for part in parts]


def _spread(runs: Sequence[tuple[int, int]], count: int) -> Tensor:
    """Rows of each unit, if those of the first are `runs` and the others follow: (count, rows)."""
    unit = torch.arange(count)[:, None]
    return torch.cat([start + unit * n + torch.arange(n) for start, n in runs], 1)


def _declared(
    path: str, runs: Sequence[tuple[int, int]], count: int, rows: int, consumer: str
) -> list[Producer]:
    """The runs as parts of the linear, which they have to tile."""
    places = sorted((start, start + n * count) for start, n in runs)
    ends = [0, *(stop for _, stop in places)]
    if [start for start, _ in places] != ends[:-1] or ends[-1] != rows:
        raise NoSite(
            f"{consumer}: the rows of its units in {path} are not equal runs, one after the other"
        )
    step = math.gcd(*(stop - start for start, stop in places), rows)
    return [
        Producer(path, start // step, rows // step, (stop - start) // step)
        for start, stop in places
    ]


def _all_one(probe: LayerProbe, consumer: str, producers: Sequence[str]) -> str:
    """Why all columns are one unit: a norm over all of a producer's rows, if there is one."""
    widths = {probe.widths[path] for path in producers}
    for name, module in probe.layer.named_modules():
        inside = name.rpartition(".")[0]
        if "norm" not in type(module).__name__.lower() or not consumer.startswith(f"{inside}."):
            continue
        if any(p.numel() in widths for p in module.parameters(recurse=False)):
            return f"{consumer}: {name} normalises over all units at once, so none can go alone"
    return f"{consumer}: all its columns are one unit: they depend on common rows"
