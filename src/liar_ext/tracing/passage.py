"""The whole model, without weights: streamed against its own forward, pruned against masked.

Linears have surrogates (`stand_ins.surrogates`), so that the model's own code runs from tokens to
last hidden states at its real widths. What the engine takes for granted is checked on it: that
layers follow each other, that what the model passes beside the hidden states does not depend on
them, and that pruned layers give what the dense ones give when the same columns are looked away
from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from liar_ext.calibration.batch import Batch
from liar_ext.engine.calls import last_hidden, layer_output, record_calls
from liar_ext.errors import InputError
from liar_ext.models import linear
from liar_ext.models.site import Site
from liar_ext.tracing.dependence import Units
from liar_ext.tracing.removal import EQUAL, kept_sets
from liar_ext.tracing.stand_ins import (
    HOST,
    TOKENS,
    Cut,
    Skeleton,
    answering,
    by_path,
    full_batch,
    surrogates,
    without_weights,
)

# config fields that state a longest sequence: MPT's tables of slopes end at max_seq_len
_LENGTHS = ("max_position_embeddings", "max_seq_len", "max_sequence_length", "n_positions")
# positions are tried out up to that length
_LONGEST_TRIED = 8192
# RoBERTa's begin behind the padding token's number
_MOST_OFFSET = 8


def own_forward(model: nn.Module, batch: Batch, options: Mapping[str, bool]) -> Tensor:
    """Last hidden states (b, t, d) by the model's own code, under whatever answers for linears."""
    with torch.no_grad():
        mask = batch.mask_on(HOST)
        found = model(input_ids=batch.input_ids, attention_mask=mask, **options)[0]
    if found.dim() != 3 or found.shape[:2] != batch.input_ids.shape:
        raise InputError(
            f"its last hidden states are {tuple(found.shape)} for {tuple(batch.input_ids.shape)} "
            "tokens"
        )
    return found


def is_causal(skeleton: Skeleton) -> bool:
    """Whether no token sees what comes after it: the model generates."""
    ids = skeleton.ids(2)
    ids[1, -1] = ids[1, 0]
    with answering(skeleton.linears, surrogates(skeleton.linears)):
        found = own_forward(skeleton.model, full_batch(ids), skeleton.options)
    differs = (found[0] - found[1]).abs().amax(-1) > EQUAL * float(found.abs().max())
    if not bool(differs[-1]):
        raise InputError("its last hidden states do not depend on the last token")
    return not bool(differs[:-1].any())


def check_streaming(skeleton: Skeleton) -> None:
    """Layer by layer with recorded arguments, as the engine goes: the same bits as at once.

    Raises:
        InputError: they are not, so this model cannot be streamed.
    """
    ids = skeleton.ids(2)
    padded = torch.ones(ids.shape, dtype=torch.bool)
    padded[1, TOKENS // 2 :] = False
    for batch in (full_batch(ids), Batch(ids, padded)):
        with torch.no_grad(), answering(skeleton.linears, surrogates(skeleton.linears)):
            expected = own_forward(skeleton.model, batch, skeleton.options)
            parts = (skeleton.model, skeleton.layers, batch, HOST, skeleton.options)
            states, calls = record_calls(*parts, skeleton.returns)
            if len(calls) != len(skeleton.layers):
                raise InputError(f"{len(calls)} calls of {len(skeleton.layers)} layers")
            for layer, call in zip(skeleton.layers, calls, strict=True):
                states = layer_output(layer, states, call)
            got = last_hidden(*parts, states, skeleton.returns)
        valid = batch.attention_mask
        if not torch.equal(got[valid], expected[valid]):
            raise InputError(
                "its layers do not simply follow each other: one after the other they give other "
                "hidden states than the model's own forward"
            )


def check_pruned(skeleton: Skeleton, units: Sequence[Mapping[str, Units]]) -> None:
    """Every layer without some units, against the dense model without their columns.

    Args:
        units: of each layer, by the consumer's path in it.
    Raises:
        InputError: the two differ.
    """
    pruned = without_weights(type(skeleton.model), skeleton.model.config)
    layers = cast(nn.ModuleList, pruned.get_submodule(skeleton.path))
    masked: dict[str, Cut] = {}
    removed: dict[str, Cut] = {}
    for index, found in enumerate(units):
        for own in found.values():
            sets = kept_sets(own.columns.shape[0])
            keep = sets[index % len(sets)]
            prefix = f"{skeleton.path}.{index}."
            _cut(prefix, skeleton, own, keep, masked, removed)
            Site(own.spec, index, layers[index], own.head_dim).shrink(keep)
    ids = full_batch(skeleton.ids(1))
    with answering(skeleton.linears, surrogates(skeleton.linears, masked)):
        expected = own_forward(skeleton.model, ids, skeleton.options)
    smaller = by_path(pruned)
    with answering(smaller, surrogates(smaller, removed)):
        got = own_forward(pruned, ids, skeleton.options)
    error = float((got - expected).abs().max()) / float(expected.abs().max())
    if not error <= EQUAL:
        raise InputError(
            f"without units it gives other hidden states than with their columns set to zero "
            f"({error:.1e} of their size)"
        )


def _cut(
    prefix: str,
    skeleton: Skeleton,
    found: Units,
    keep: Tensor,
    masked: dict[str, Cut],
    removed: dict[str, Cut],
) -> None:
    """Add the cuts of one Site's linears."""
    shapes = {}
    for path in (found.spec.consumer, *found.rows):
        shape = linear.weight(skeleton.model.get_submodule(prefix + path)).shape
        shapes[path] = (shape[0], shape[1])
    consumer, columns = found.spec.consumer, found.columns[keep].flatten()
    masked[prefix + consumer] = Cut(shapes[consumer], columns=columns, masked=True)
    removed[prefix + consumer] = Cut(shapes[consumer], columns=columns)
    for path, rows in found.rows.items():
        kept = rows[keep].flatten().sort().values
        removed[prefix + path] = Cut(shapes[path], rows=kept)


def longest_input(skeleton: Skeleton) -> int | None:
    """Tokens that the model takes; None where its config states no limit.

    What the config states is tried out where there is a table of positions: some begin to count
    behind the padding token.

    Raises:
        InputError: it does not run at the length that its config states.
    """
    config = skeleton.model.config
    limits = {name: getattr(config, name, None) for name in _LENGTHS}
    held = [(name, value) for name, value in limits.items() if type(value) is int and value > 0]
    if not held:
        return None
    field, stated = held[0]
    vocabulary = skeleton.model.get_input_embeddings()
    tables = [
        module.num_embeddings
        for module in skeleton.model.modules()
        if isinstance(module, nn.Embedding) and module is not vocabulary
    ]
    if stated > _LONGEST_TRIED or not any(stated <= size <= stated + 64 for size in tables):
        return stated
    token = int(skeleton.ids(1)[0, 0])
    for length in range(stated, max(stated - _MOST_OFFSET, 0), -1):
        batch = full_batch(torch.full((1, length), token))
        try:
            with torch.no_grad(), answering(skeleton.linears, surrogates(skeleton.linears)):
                record_calls(
                    skeleton.model, skeleton.layers, batch, HOST, skeleton.options, skeleton.returns
                )
        except (IndexError, RuntimeError):
            continue
        return length
    raise InputError(f"it does not run on {field}={stated} tokens")


def head_is_plain(skeleton: Skeleton) -> bool:
    """Whether logits are what the output embedding makes of the last hidden states, and no more.

    Criteria that need a loss compute it like that; some families scale or bound their logits.
    """
    model_class = transformers.AutoModelForCausalLM._model_mapping[type(skeleton.model.config)]
    model = without_weights(cast("type[PreTrainedModel]", model_class), skeleton.model.config)
    head = model.get_output_embeddings()
    given: dict[str, Tensor] = {}
    linears = by_path(model)
    path = next((path for path, module in linears.items() if module is head), None)
    backbone = model.get_submodule(model.base_model_prefix)
    if path is None:
        return False
    answer = surrogates(linears)

    def listening(name: str, x: Tensor) -> Tensor:
        y = answer(name, x)
        if name == path:
            given["x"], given["y"] = x, y
        return y

    with torch.no_grad(), answering(linears, listening):
        logits = model(input_ids=skeleton.ids(1), **skeleton.options).logits
        last = backbone(input_ids=skeleton.ids(1), **skeleton.options)[0]
    if "x" not in given or given["x"].shape != last.shape:
        return False
    return torch.equal(given["x"], last) and torch.equal(logits, given["y"])
