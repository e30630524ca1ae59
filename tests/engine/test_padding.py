"""Padded batches: valid tokens are found once, and no statistic waits for a GPU to find them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from liar_families import FAMILIES
from torch.utils._python_dispatch import TorchDispatchMode

import liar_ext
from liar_ext import Recipe
from liar_ext.calibration.batch import Batch
from liar_ext.engine.ranks import Ranks
from liar_ext.engine.statistics import SiteColumns, SiteMoments, SitePairs, StateSimilarity
from liar_ext.ops import gram_reference, row_cosines_reference

CPU = torch.device("cpu")


class Watching(TorchDispatchMode):
    """Counts operations that wait for a GPU: for a value, or for how many entries there are."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if by_mask or name in ("nonzero", "masked_select", "_local_scalar_dense", "unique", "item"):
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


def batch(rows: int = 5, length: int = 9) -> Batch:
    ids = torch.arange(rows * length).view(rows, length)
    mask = torch.arange(length) < torch.tensor([9, 7, 4, 1, 6])[:rows, None]
    return Batch(ids, mask)


def test_positions_are_those_of_the_mask():
    padded = batch()
    found = padded.valid_on(CPU)
    assert found.tolist() == padded.attention_mask.flatten().nonzero().flatten().tolist()
    assert found.dtype == torch.int64
    whole = Batch(padded.input_ids, torch.ones_like(padded.attention_mask))
    assert whole.valid_on(CPU) is None


def test_the_watch_sees_what_a_mask_does():
    x, mask = torch.randn(45, 7), batch().attention_mask.flatten()
    with Watching() as watch:
        x[mask]
    assert sum(watch.waits.values()) > 0


@pytest.mark.parametrize("chunk", [10, 4096], ids=["at once", "gathered"])
def test_statistics_of_padded_batches_wait_for_nothing(chunk, monkeypatch):
    monkeypatch.setattr("liar_ext.engine.statistics.CHUNK_TOKENS", chunk)
    # the torch version, which is what runs where no kernel of the package does
    monkeypatch.setenv("LIAR_BACKEND", "torch")
    padded = batch()
    x = torch.randn(5, 9, 7)
    local, dense = torch.randn(5, 9, 3), torch.randn(5, 9, 3)
    valid = padded.valid_on(CPU)
    options = {"dtype": torch.float32, "alone": False}
    moments, columns = SiteMoments(7, CPU, **options), SiteColumns(7, CPU)
    pairs, similarity = SitePairs(3, 7, CPU, **options), StateSimilarity(CPU)
    with Watching() as watch:
        for segment in (0, 0, 1):
            moments.add(x, valid, segment)
            columns.add(x, valid, segment)
            pairs.add_pair(x, local, dense, valid, segment)
            similarity.add(local, dense, valid, segment)
    assert not watch.waits
    kept = x.flatten(0, 1)[padded.attention_mask.flatten()]
    expected = gram_reference(kept.repeat(3, 1))
    ranks = Ranks.single()
    found, sample = moments.finish(ranks), pairs.finish_pair(ranks)
    for own in (found, sample.moments):
        assert int(own.count) == int(expected.count)
        assert torch.allclose(own.gram.double().tril(), expected.gram.tril(), rtol=1e-5, atol=1e-5)
    assert torch.allclose(columns.finish(ranks).mean(), kept.double().mean(0))
    pair = (part.flatten(0, 1)[padded.attention_mask.flatten()] for part in (local, dense))
    cosines = row_cosines_reference(*pair)
    # each is rounded to float32
    turn = similarity.finish(ranks)
    assert turn.influence == pytest.approx(1 - float(cosines.mean()), abs=2.0**-24)


def test_a_compression_finds_the_valid_tokens_of_a_batch_once(monkeypatch):
    asked: Counter[int] = Counter()
    real = Batch.valid_on

    def counted(self, device):
        asked[id(self)] += 1
        return real(self, device)

    monkeypatch.setattr(Batch, "valid_on", counted)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(4):
        ids = torch.randint(90, (6, 16), generator=generator)
        lengths = torch.randint(8, 17, (6, 1), generator=generator)
        batches.append(Batch(ids, torch.arange(16) < lengths))
    recipe = Recipe(samples=24, seq_len=16, batch_size=6, target=("ffn", "heads"))
    liar_ext.prune(FAMILIES["bert"].build(), batches, recipe)
    assert list(asked.values()) == [1] * 4
