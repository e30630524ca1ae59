"""LaCo by brute force: whole copies of a plain transformers model, run again text by text."""

from __future__ import annotations

import copy

import torch

from liar_ext.calibration import Batch
from liar_ext.depth.rules import merge_reference, norm_names
from liar_ext.depth.surgery import layer_list

LENGTHS = (11, 9, 6, 4)


def texts(count=len(LENGTHS)):
    """Ids of texts of different lengths, longer than the sliding windows of the tiny models."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 96, (n,), generator=generator) for n in LENGTHS[:count]]


def padded(ids, pad=7):
    """Two batches, padded on the right with an id that is a valid one as well."""
    batches = []
    for group in (ids[:3], ids[3:]):
        longest = max(map(len, group))
        rows = [torch.cat([row, torch.full((longest - len(row),), pad)]) for row in group]
        mask = [torch.arange(longest) < len(row) for row in group]
        batches.append(Batch(torch.stack(rows), torch.stack(mask)))
    return batches


@torch.no_grad()
def last_states(model, ids):
    """Of each text alone, without padding or mask."""
    options = {} if "Bert" in type(model).__name__ else {"use_cache": False}
    return [model.base_model(row.unsqueeze(0), **options)[0][0].double() for row in ids]


def similarity(kind, wanted, found):
    """Mean over texts of what torch says."""
    pairs = list(zip(wanted, found, strict=True))
    if kind == "flat":
        own = [torch.cosine_similarity(h.flatten(), k.flatten(), dim=0) for h, k in pairs]
    else:
        own = [torch.cosine_similarity(h, k, dim=1).mean() for h, k in pairs]
    return float(torch.stack(own).mean())


@torch.no_grad()
def merged_copy(model, base, count, rule, norms_by):
    """A copy in which a layer has taken in `count` layers behind it."""
    model = copy.deepcopy(model)
    _, layers = layer_list(model)
    parts = [dict(layer.named_parameters()) for layer in layers[base : base + count + 1]]
    new = merge_reference(rule, parts, norm_names(layers[base]), norms_by)
    for name, parameter in parts[0].items():
        parameter.copy_(new[name])
    del layers[base + 1 : base + count + 1]
    model.config.num_hidden_layers = len(layers)
    types = getattr(model.config, "layer_types", None)
    if types:
        model.config.layer_types = [*types[: base + 1], *types[base + count + 1 :]]
    return model


def brute_force(model, ids, settings):
    """Algorithm 1, as specified.

    Returns:
        the model, what was accepted and what was refused: (base, layers taken in, similarity).
    """
    _, layers = layer_list(model)
    schedule = settings.schedule(len(layers))
    wanted = last_states(model, ids)
    accepted, refused = [], []
    at = schedule.highest - schedule.combine
    while at >= schedule.lowest:
        count = min(schedule.combine - 1, len(layer_list(model)[1]) - at - 1)
        tried = merged_copy(model, at, count, settings.rule, settings.norms)
        found = similarity(settings.similarity, wanted, last_states(tried, ids))
        if found > schedule.threshold:
            accepted.append((at, count, found))
            model = tried
            at -= schedule.interval
            if at >= len(layer_list(model)[1]):
                at = len(layer_list(model)[1]) - 1 - schedule.combine
        else:
            refused.append((at, count, found))
            at -= 1
    return model, accepted, refused
