"""Moments: additive, defined on the lower triangle, read back in the natural order."""

from __future__ import annotations

import pytest
import torch
from liar_testing import assert_close_rms

from liar_ext.ops import Moments, gram_reference

X = torch.randn(50, 9, generator=torch.Generator().manual_seed(1)) + 0.5
KEEP = torch.tensor([7, 0, 3, 4])
DROP = torch.tensor([1, 2, 5, 6, 8])
SECOND = X.double().T @ X.double() / 50


def with_poisoned_upper(moments: Moments) -> Moments:
    moments.gram[torch.ones_like(moments.gram, dtype=torch.bool).triu(1)] = torch.nan
    return moments


def test_moments_of_two_chunks_are_the_sum_of_their_moments():
    both = gram_reference(X[:20]) + gram_reference(X[20:])
    whole = gram_reference(X)
    assert both.count.item() == 50
    assert_close_rms(both.sum, whole.sum, 1e-14)
    assert_close_rms(both.gram.tril(), whole.gram.tril(), 1e-14)


def test_mean_second_and_variance_read_only_the_lower_triangle():
    moments = with_poisoned_upper(gram_reference(X))
    every = torch.arange(9)
    assert_close_rms(moments.mean(), X.double().mean(0), 1e-14)
    assert_close_rms(moments.second(every, every), SECOND, 1e-14)
    assert_close_rms(moments.diagonal(), SECOND.diagonal(), 1e-14)
    assert_close_rms(moments.variance(), X.double().var(0, correction=0), 1e-13)


def test_kept_moments_give_the_blocks_that_a_repair_needs():
    moments = with_poisoned_upper(gram_reference(X, keep=KEEP))
    assert moments.gram.shape == (9, 4)
    assert not moments.complete
    assert_close_rms(moments.second(KEEP, KEEP), SECOND[KEEP][:, KEEP], 1e-14)
    assert_close_rms(moments.second(DROP, KEEP), SECOND[DROP][:, KEEP], 1e-14)
    assert_close_rms(moments.second(KEEP, DROP), SECOND[KEEP][:, DROP], 1e-14)


def test_kept_moments_refuse_the_dropped_block_and_the_diagonal():
    moments = gram_reference(X, keep=KEEP)
    with pytest.raises(ValueError, match="dropped × dropped"):
        moments.second(DROP, DROP)
    with pytest.raises(ValueError, match="whole triangle"):
        moments.diagonal()


def test_a_permutation_of_all_columns_reads_back_in_the_natural_order():
    order = torch.randperm(9)
    moments = with_poisoned_upper(gram_reference(X, keep=order))
    assert moments.complete
    assert_close_rms(moments.diagonal(), SECOND.diagonal(), 1e-14)
    assert_close_rms(moments.second(DROP, KEEP), SECOND[DROP][:, KEEP], 1e-14)


def test_the_mirror_follows_a_later_accumulation():
    moments = gram_reference(X[:20])
    every = torch.arange(9)
    moments.second(every, every)
    more = gram_reference(X[20:])
    moments.gram += more.gram.tril()
    moments.count += more.count
    moments.mirrored = False
    assert_close_rms(moments.second(every, every), SECOND, 1e-14)


def test_mirroring_crosses_its_blocks():
    columns = 1100
    lower = torch.randn(columns, columns).tril()
    moments = Moments.zeros(columns)
    moments.count += 1
    moments.gram.copy_(lower)
    every = torch.arange(columns)
    assert_close_rms(moments.second(every, every), lower + lower.tril(-1).T, 1e-7)


def test_no_tokens_give_zeros_and_not_nan():
    moments = gram_reference(X[:0])
    assert moments.mean().tolist() == [0.0] * 9
    assert moments.variance().tolist() == [0.0] * 9


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Moments.zeros(8, dtype=torch.float64), "moments of shapes"),
        (Moments.zeros(9, dtype=torch.float64, keep=KEEP), "moments of shapes"),
        (Moments.zeros(9, dtype=torch.float64, keep=torch.arange(9).flip(0)), "column orders"),
    ],
)
def test_moments_that_do_not_fit_are_not_added(other, message):
    with pytest.raises(ValueError, match=message):
        gram_reference(X) + other
