"""The search: the published loop, and the highest threshold with which so many layers go."""

from __future__ import annotations

import hashlib
import itertools
import math

import pytest

from liar_ext import InputError
from liar_ext.depth import MergeSettings
from liar_ext.depth.collapse import collapse

COUNT = 9


def similar(state, seed=0):
    """A number in (−1, 1) that any change of the model changes."""
    digest = hashlib.sha256(f"{seed} {state}".encode()).digest()
    return int.from_bytes(digest[:6]) / 2**47 - 1


def published(count, settings, threshold):
    """Algorithm 1, as specified, on lists of what each layer is made of; no limit of layers."""
    schedule = settings.schedule(count)
    model = [(layer,) for layer in range(count)]
    similarities = []
    at = schedule.highest - schedule.combine
    while at >= schedule.lowest:
        most = min(schedule.combine - 1, len(model) - at - 1)
        merged = [*model[:at], sum(model[at : at + most + 1], ()), *model[at + most + 1 :]]
        similarities.append(tree(merged))
        if similar(tree(merged)) > threshold:
            model = merged
            at -= schedule.interval
            if at >= len(model):
                at = len(model) - 1 - schedule.combine
        else:
            at -= 1
    return model


def tree(groups):
    return tuple(tuple(group) for group in groups)


def groups_of(state, count):
    """Layers that have gone into each layer of a model."""
    ends = [layer.base for layer in state[1:]] + [count]
    return tree(range(layer.base, end) for layer, end in zip(state, ends, strict=True))


@pytest.mark.parametrize("threshold", [-0.9, -0.3, 0.2, 0.6])
@pytest.mark.parametrize(
    ("combine", "lowest", "highest", "interval"),
    [(2, 0, 8, 1), (3, 0, 9, 1), (4, 1, 8, 2), (3, 2, 9, 3), (9, 0, 9, 1)],
)
def test_it_is_the_published_loop(combine, lowest, highest, interval, threshold):
    settings = MergeSettings(
        combine=combine, lowest=lowest, highest=highest, interval=interval, threshold=threshold
    )
    expected = published(COUNT, settings, threshold)
    asked = []

    def similarity(state, first):
        asked.append(state)
        # below `first` nothing differs
        assert groups_of(state, COUNT)[:first] == tree([i] for i in range(first))
        return similar(groups_of(state, COUNT))

    if len(expected) == COUNT:
        with pytest.raises(InputError, match="no merge is above --threshold"):
            collapse(COUNT, settings, similarity)
        return
    found = collapse(COUNT, settings, similarity)
    assert groups_of(found.state, COUNT) == tree(expected)
    assert len(asked) == len(set(asked)) == len(found.accepted) + len(found.refused)


def test_equal_to_the_threshold_is_not_above_it():
    settings = MergeSettings(combine=2, threshold=0.5, lowest=3, highest=6)
    values = {4: 0.5, 3: math.nextafter(0.5, 1)}
    found = collapse(6, settings, lambda state, first: values[first])
    assert [trial.base for trial in found.accepted] == [3]
    assert [trial.base for trial in found.refused] == [4]


def test_what_is_not_a_number_is_refused():
    settings = MergeSettings(combine=2, threshold=-0.99, highest=6)
    found = collapse(6, settings, lambda state, first: math.nan if first % 2 else 0.0)
    assert [trial.base for trial in found.accepted] == [4, 2, 0]
    with pytest.raises(InputError, match="their similarities are not finite"):
        collapse(6, settings, lambda state, first: math.nan)


@pytest.mark.parametrize("drop", range(1, 6))
@pytest.mark.parametrize("combine", [2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_without_a_threshold_the_highest_one_is_found(seed, combine, drop):
    settings = MergeSettings(combine=combine, drop=drop, interval=1, highest=7)
    asked = []

    def similarity(state, first):
        asked.append(state)
        return similar(state, seed)

    found = collapse(7, settings, similarity)
    assert len(found.state) == 7 - drop
    assert len(asked) == len(set(asked)), "each model once"

    def at(threshold):
        """The same, under a given one."""
        given = MergeSettings(
            combine=combine, drop=drop, interval=1, highest=7, threshold=threshold
        )
        try:
            return collapse(7, given, lambda state, _: similar(state, seed)).state
        except InputError:
            return None

    assert at(found.threshold) == found.state
    # a threshold that refuses any of its merges lets other numbers of layers go
    least = min(trial.similarity for trial in found.accepted)
    higher = sorted({similar(state, seed) for state in asked if similar(state, seed) >= least})
    middles = [(a + b) / 2 for a, b in itertools.pairwise([*higher, 1.0])]
    assert all(at(t) is None for t in (*higher, *middles))


def test_the_last_merge_takes_in_no_more_than_asked():
    settings = MergeSettings(combine=4, drop=5, interval=3, highest=9)
    found = collapse(9, settings, lambda state, first: 0.9)
    assert [len(trial.absorbed) for trial in found.accepted] == [3, 2]
    assert len(found.state) == 4


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"threshold": 0.99},
            r"no merge is above --threshold 0.99: the highest is 0.5, layer 2 with 3, 4; give a "
            "lower one, or --drop N",
        ),
        (
            {"threshold": 0.45, "drop": 5},
            r"--drop 5: 2 go, no other merge is above --threshold 0.45: the highest is 0.4, "
            "layer 1 with 2, 5; give a lower one, or none",
        ),
        (
            {"drop": 6, "lowest": 2},
            r"--drop 6: with every merge accepted 4 layers go; raise --combine 3 or --highest 7, "
            "or lower --lowest 2 or --interval 1",
        ),
    ],
)
def test_what_cannot_be_had_is_said_with_what_can(fields, words):
    settings = MergeSettings(**{"combine": 3, "highest": 7, "interval": 1, **fields})
    values = {4: 0.3, 3: 0.2, 2: 0.5, 1: 0.4, 0: 0.1}
    with pytest.raises(InputError, match=words):
        collapse(7, settings, lambda state, first: values[first])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"combine": 7}, "--combine 7: the model has 6 layers"),
        ({"combine": 1}, "--combine 1: must be a whole number of at least 2"),
        ({"lowest": 4, "highest": 4}, "--lowest 4 with --highest 4: must be below it"),
        ({"lowest": 5, "highest": 3}, "--lowest 5 with --highest 3: must be below it"),
        ({"highest": 7}, "--highest 7: the model has 6 layers"),
        ({"lowest": -1}, "--lowest -1: must be a whole number of at least 0"),
        ({"combine": 4, "lowest": 1, "highest": 4}, "there are 3 layers from --lowest 1 to"),
        ({"interval": 0}, "--interval 0: must be a whole number of at least 1"),
        ({"threshold": -1}, "--threshold -1: is a cosine; must be above -1 and at most 1"),
        ({"threshold": 1.01}, "--threshold 1.01: is a cosine"),
        ({"threshold": math.nan}, "--threshold nan: is a cosine"),
        ({"drop": 6}, "--drop 6: of 6 layers at least one stays"),
        ({"drop": 0}, "--drop 0: must be a whole number of at least 1"),
        ({"rule": "sum"}, "--rule sum: choose from rdsc, telescope, mean"),
        ({"norms": "last"}, "--norms last: choose from auto, base, rule"),
        ({"similarity": "cka"}, "--similarity cka: choose from flat, token"),
        ({"texts": 0}, "--texts 0: must be a whole number of at least 1"),
        ({"texts": None}, "--texts None: must be"),
        ({"seq_len": 1}, "--seq-len 1: must be a whole number of at least 2"),
        ({"device": "tpu"}, "--device tpu: choose from"),
    ],
)
def test_settings_that_make_no_sense(fields, words):
    with pytest.raises(InputError, match=words):
        MergeSettings(**fields).schedule(6)


def test_a_single_layer_has_nothing_to_merge():
    with pytest.raises(InputError, match="the model has 1 layer; there is nothing to merge"):
        MergeSettings().schedule(1)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (2, (2, 0, 2, 1)),
        (3, (2, 0, 2, 1)),
        (5, (2, 0, 4, 1)),
        (12, (2, 0, 11, 1)),
        (24, (3, 0, 23, 1)),
        (32, (4, 0, 31, 2)),  # the paper's LLaMA-7B
        (40, (4, 0, 39, 2)),
    ],
)
def test_defaults_are_the_papers_in_proportion(count, expected):
    found = MergeSettings().schedule(count)
    assert (found.combine, found.lowest, found.highest, found.interval) == expected
    assert found.threshold == 0.65
    assert MergeSettings(drop=1).schedule(count).threshold is None
