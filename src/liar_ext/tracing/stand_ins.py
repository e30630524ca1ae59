"""A backbone at its real widths without weights: what its linears say is put there.

Between two linears a transformers layer is a fixed function: norms, activations, attention. To see
what depends on what, the output of each linear can be a free variable. So no weight is needed, and
nothing is narrowed: a layer of a 70B model costs a few tokens of activations in float64.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import accelerate
import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from liar_ext.calibration.batch import Batch
from liar_ext.engine.calls import LayerCall, record_calls
from liar_ext.errors import InputError
from liar_ext.models import linear
from liar_ext.tracing.attempt import attempt

HOST = torch.device("cpu")
# above that a parameter outside the linears is a weight after all (fused experts)
MOST_VALUES = 1 << 26
TOKENS = 6

# path of a linear, its input -> its output
Answer = Callable[[str, Tensor], Tensor]


@dataclass
class Skeleton:
    """A headless model in float64 without weights.

    Attributes:
        model: linears on `meta`; norms have random values, embeddings random rows.
        path: of the layer list; layers: the list.
        options: what the forward is given beside tokens.
        returns: entries of the tuple or list that a layer gives back; 0 is neither.
    """

    model: PreTrainedModel
    path: str
    layers: nn.ModuleList
    options: dict[str, bool]
    returns: int = 0
    _known: dict[int, tuple[Tensor, list[LayerCall]]] = field(default_factory=dict)

    @property
    def linears(self) -> dict[str, nn.Module]:
        """All linears by their path in the model."""
        return by_path(self.model)

    def ids(self, count: int) -> Tensor:
        """(count, TOKENS) int64, the same in each row, and no padding token."""
        config = self.model.config
        pad = getattr(config, "pad_token_id", None)
        usable = [i for i in range(1, config.vocab_size) if i != pad][: 2 * TOKENS]
        if len(usable) < TOKENS:
            raise InputError(f"a vocabulary of {config.vocab_size} is too small to trace with")
        return torch.tensor(usable[-TOKENS:]).repeat(count, 1)

    def call(self, count: int, index: int) -> tuple[Tensor, LayerCall]:
        """What enters layer `index` on `count` equal rows of tokens: (count, T, d), and beside."""
        if count not in self._known:
            self._known[count] = self._record(count, self.layers)
        states, calls = self._known[count]
        return states, calls[index]

    def _record(self, count: int, layers: nn.ModuleList) -> tuple[Tensor, list[LayerCall]]:
        batch = full_batch(self.ids(count))
        with torch.no_grad(), answering(self.linears, surrogates(self.linears)):
            return record_calls(self.model, layers, batch, HOST, self.options, self.returns)

    def learn_returns(self) -> None:
        """See what the first layer gives back; its call needs no layer before it."""
        first = self.layers[:1]
        states, (call,) = self._record(1, first)
        with torch.no_grad(), answering(self.linears, surrogates(self.linears)):
            output = self.layers[0](states, *call.args, **call.kwargs)
        self.returns = len(output) if isinstance(output, tuple | list) else 0


def full_batch(ids: Tensor) -> Batch:
    """Tokens without padding."""
    return Batch(ids, torch.ones(ids.shape, dtype=torch.bool))


def skeleton(config: PretrainedConfig, attention: str | None = None) -> Skeleton:
    """The skeleton of the headless model of a config.

    Args:
        attention: an implementation of it; None is what transformers takes by default.
    Raises:
        InputError: it has none, no list of equal layers, or parameters that only weights could
            fill.
    """
    mapping = transformers.AutoModel._model_mapping
    if type(config) not in mapping:
        raise InputError("transformers has no headless model for it (AutoModel)")
    if attention is not None:
        config = copy.deepcopy(config)
        config._attn_implementation = attention
    with attempt("made from its config"):
        model = without_weights(cast("type[PreTrainedModel]", mapping[type(config)]), config)
    path, layers = layer_list(model)
    every = [id(each) for layer in layers for each in linear.linears(layer)]
    if len(set(every)) < len(every):
        raise InputError("its layers share linears, so none can be pruned alone")
    # encoders of decoder classes keep keys and values as well, unless they are told not to
    found = Skeleton(model, path, layers, {"use_cache": False})
    with attempt("its first layer, run alone"):
        try:
            found.learn_returns()
        except TypeError:
            found.options = {}
            found.learn_returns()
    return found


def without_weights(
    model_class: type[PreTrainedModel], config: PretrainedConfig
) -> PreTrainedModel:
    """A model in float64 with linears on `meta` and everything else filled.

    Raises:
        InputError: a parameter that is no linear's is too large to be anything but a weight.
    """
    with no_init_weights(), accelerate.init_empty_weights(include_buffers=False):
        model = model_class(copy.deepcopy(config))
    model = model.double().eval()
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, nn.Embedding):
            value = _overlapping_rows(name, parameter)
        elif module in linear.linears(module):
            continue
        elif parameter.numel() > MOST_VALUES:
            raise InputError(f"{name} has {parameter.numel():,} values and is no linear's weight")
        else:
            value = values_of(name, tuple(parameter.shape))
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    return model


def layer_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The largest ModuleList, by parameters, of layers of one class that hold linears."""
    found: list[tuple[int, str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if len({type(layer) for layer in module}) == 1 and linear.linears(module[0]):
            found.append((sum(p.numel() for p in module.parameters()), path, module))
    if not found:
        raise InputError(f"{type(model).__name__} has no list of equal layers with linears in them")
    # of two of a size the outer one, which comes first
    _, path, layers = max(found, key=lambda entry: entry[0])
    return path, layers


def by_path(module: nn.Module) -> dict[str, nn.Module]:
    """The linears inside a module by their path in it."""
    own = {id(each) for each in linear.linears(module)}
    return {path: each for path, each in module.named_modules() if id(each) in own}


@contextmanager
def answering(linears: Mapping[str, nn.Module], answer: Answer) -> Iterator[None]:
    """These linears say what `answer` says."""

    def forward(path: str) -> Callable[[Tensor], Tensor]:
        return lambda x: answer(path, x)

    try:
        for path, module in linears.items():
            module.forward = forward(path)
        yield
    finally:
        for module in linears.values():
            del module.forward


@dataclass(frozen=True)
class Cut:
    """What is left of a linear of `shape` (out, in): numbers of its rows and columns; None is all.

    `masked`: the other columns are still there and are looked away from.
    """

    shape: tuple[int, int]
    rows: Tensor | None = None
    columns: Tensor | None = None
    masked: bool = False


def surrogates(linears: Mapping[str, nn.Module], cuts: Mapping[str, Cut] | None = None) -> Answer:
    """Linears with one nonzero weight in each row or column, where the other is longer.

    `y_i = Σ_{k ≡ i mod out} w_k x_{k mod in} + b_i`, with w and b that only the path decides; a cut
    leaves the terms of the rows and columns that it keeps. Enough to let everything that enters a
    model show at its end, at the cost of a vector.
    """
    known: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def answer(path: str, x: Tensor) -> Tensor:
        if path not in known:
            shape = tuple(linear.weight(linears[path]).shape)
            known[path] = _terms(path, (cuts or {}).get(path, Cut((shape[0], shape[1]))))
        row, column, weights, bias = known[path]
        y = bias.to(x.dtype).expand(*x.shape[:-1], -1).clone()
        return y.index_add(-1, row, x[..., column] * weights.to(x.dtype))

    return answer


def _terms(path: str, cut: Cut) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and input of each term, its weight, and the bias."""
    out, into = cut.shape
    k = torch.arange(max(out, into))
    row, column, bias = k % out, k % into, values_of(f"{path}.bias", (out,)) - 1
    weights = values_of(path, (k.numel(),)) * (1 - 2 * (k % 3 == 0).double())
    if cut.rows is not None:
        place, kept = _places(row, cut.rows, out)
        row, column, weights, bias = place[kept], column[kept], weights[kept], bias[cut.rows]
    if cut.columns is not None:
        place, kept = _places(column, cut.columns, into)
        row, weights = row[kept], weights[kept]
        column = column[kept] if cut.masked else place[kept]
    return row, column, weights, bias


def _places(numbers: Tensor, kept: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The place of each number among those that are kept, and whether it is one."""
    places = torch.full((count,), -1)
    places[kept] = torch.arange(kept.numel())
    return places[numbers], places[numbers] >= 0


def values_of(name: str, shape: tuple[int, ...], round_: int = 0) -> Tensor:
    """Uniform in [0.5, 1.5), float64, the same for a name: positive, so that no ReLU is shut."""
    seed = hashlib.sha256(f"{name}/{round_}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(seed[:7], "big"))
    return 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)


def _overlapping_rows(name: str, parameter: Tensor) -> Tensor:
    """A table whose row i is the run of a vector that begins at i: all differ, in little memory."""
    count, width = parameter.shape
    return values_of(name, (count + width,)).as_strided((count, width), (1, 1))
