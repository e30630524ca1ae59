"""Stability: the formula, the repository's number, and weights that do not overflow."""

import math

import numpy as np
import pytest
import torch

from liar_ext.errors import InputError
from liar_ext.evaluation.stability import effective_sample_size, item_weights, stability

NAN = math.nan


def booleans(*values):
    return torch.tensor(values, dtype=torch.bool)


# spreads 0, ln 2 and ln 4: weights 1/7, 2/7 and 4/7
THREE = torch.tensor(
    [[5.0, 5.0], [1.0, 1.0 + 2 * math.log(2)], [3.0, 3.0 + 2 * math.log(4)]], dtype=torch.float64
)


def test_the_hand_example_tells_intended_from_legacy():
    assert item_weights(THREE).tolist() == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    # both right, one right, both wrong: the first and the last agree
    dense, pruned = booleans(1, 1, 0), booleans(1, 0, 0)
    assert stability(THREE, dense, pruned) == pytest.approx(5 / 7)
    # two agree, so the repository adds the weights of the first two
    assert stability(THREE, dense, pruned, legacy=True) == pytest.approx(3 / 7)


@pytest.mark.parametrize(
    ("dense", "pruned", "intended", "legacy"),
    [
        ((1, 0, 1), (1, 0, 1), 7, 7),
        ((1, 0, 1), (0, 1, 0), 0, 0),
        ((0, 0, 1), (1, 1, 1), 4, 1),
        ((0, 0, 1), (0, 0, 0), 3, 3),
    ],
)
def test_all_none_and_some_agree(dense, pruned, intended, legacy):
    dense, pruned = booleans(*dense), booleans(*pruned)
    assert stability(THREE, dense, pruned) == pytest.approx(intended / 7)
    assert stability(THREE, dense, pruned, legacy=True) == pytest.approx(legacy / 7)


def test_it_is_the_published_definition_in_numpy():
    """Options of 2 to 5, in the order and with the population deviation of numpy.std."""
    rng = np.random.default_rng(0)
    rows = [rng.uniform(1, 8, size=rng.integers(2, 6)) for _ in range(50)]
    right = rng.integers(0, 2, size=(2, 50)).astype(bool)
    weights = np.exp([np.std(row) for row in rows])
    weights /= weights.sum()
    padded = torch.full((50, 5), NAN, dtype=torch.float64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = torch.from_numpy(row)
    got = stability(padded, *torch.from_numpy(right))
    assert got == pytest.approx(weights[right[0] == right[1]].sum(), rel=1e-12)
    legacy = stability(padded, *torch.from_numpy(right), legacy=True)
    assert legacy == pytest.approx(weights[: (right[0] == right[1]).sum()].sum(), rel=1e-12)
    assert effective_sample_size(item_weights(padded)) == pytest.approx(1 / (weights**2).sum())


@pytest.mark.parametrize("largest", [700.0, 709.0, 711.0, 1e4, 1e100])
def test_large_spreads_do_not_overflow(largest):
    rows = [[0.0, 2.0], [0.0, 2 * largest], [0.0, 2 * (largest - 1)]]
    scores = torch.tensor(rows, dtype=torch.float64)
    weights = item_weights(scores)
    assert float(weights.sum()) == pytest.approx(1)
    if largest < 1e10:
        assert float(weights[1] / weights[2]) == pytest.approx(math.e)
        assert float(weights[0]) < 1e-300
    agree = stability(scores, booleans(1, 1, 1), booleans(0, 1, 1))
    assert agree == pytest.approx(1)
    if largest > 710:
        with np.errstate(over="ignore"):
            assert np.isinf(np.exp(np.float64(largest))), "without the shift they would"


def test_float32_scores_are_weighed_in_float64():
    low, high = THREE.float(), THREE.float().double()
    assert torch.equal(item_weights(low), item_weights(high))


def test_effective_sample_size_counts_equal_weights_and_single_ones():
    assert effective_sample_size(torch.full((8,), 1 / 8)) == pytest.approx(8)
    assert effective_sample_size(torch.tensor([1.0, 0.0])) == 1
    assert effective_sample_size(item_weights(THREE)) == pytest.approx(49 / 21)


def test_equal_options_weigh_the_same():
    assert item_weights(torch.ones(4, 3)).tolist() == [0.25] * 4


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        (torch.ones(0, 2), r"shape \(0, 2\)"),
        (torch.ones(3), r"shape \(3,\)"),
        (torch.tensor([[1.0, 2.0], [1.0, NAN]]), "item 1 has 1 scores"),
        (
            torch.tensor([[1.0, 2.0], [1.0, math.inf]]),
            r"item 1 is (nan|inf), its scores \[1.0, inf",
        ),
    ],
)
def test_bad_scores_are_refused(scores, says):
    with pytest.raises(InputError, match=says):
        item_weights(scores)


@pytest.mark.parametrize("bad", [booleans(1, 0), torch.tensor([1, 0, 1])])
def test_answers_of_another_shape_or_type_are_refused(bad):
    with pytest.raises(InputError, match="pruned_correct is torch.*give 3 booleans"):
        stability(THREE, booleans(1, 1, 0), bad)
