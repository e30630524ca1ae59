"""The sketch that recognises a calibration text in an evaluation."""

from pathlib import Path

import pytest
import torch

from liar_ext.calibration.overlap import SKETCH_SIZE, overlap, sketch, warning
from liar_ext.calibration.sources import Corpus, TokenIds, read

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def lines(start, stop, kind="long"):
    tail = "and it goes on until it is a long line" if kind == "long" else "short enough"
    return [f"line number {i} {tail}" for i in range(start, stop)]


def corpus(documents, sha256="0", name="text"):
    return Corpus(name, "text", sha256, tuple(documents))


@pytest.mark.parametrize("kind", ["long", "short"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 1.0])
def test_the_estimate_is_within_four_standard_errors(kind, share):
    known = lines(0, 20_000, kind)
    other = lines(20_000 - int(share * 20_000), 40_000, kind)
    estimate = overlap(sketch(known), ["\n".join(other)])
    assert abs(estimate - share) <= 4 * (share * (1 - share) / SKETCH_SIZE) ** 0.5


def test_the_sketch_has_a_fixed_size_and_ignores_order_repeats_and_whitespace():
    known = lines(0, 2000)
    made = sketch(["\n".join(known)])
    assert len(made) == SKETCH_SIZE
    assert made == sorted(made)
    assert all(len(value) == 16 for value in made)
    assert made == sketch([line.replace(" ", " \t") + "\r" for line in reversed(known)] + known)


def test_short_lines_count_only_where_there_are_few_long_ones():
    long, short = lines(0, 1000), lines(0, 100, "short")
    assert sketch(long + short) == sketch(long)
    assert sketch(long[:10] + short) != sketch(long[:10])
    assert len(sketch(short)) == 100


def test_lines_below_twenty_characters_never_count():
    assert sketch(["= Heading =", "short"]) == []
    assert overlap([], lines(0, 10)) == 0


def test_token_files_are_compared_by_windows():
    ids = torch.randint(0, 1000, (64 * 20,), generator=torch.Generator().manual_seed(0))
    stream = Corpus("s", "tokens", "0", tokens=TokenIds(ids))
    half = Corpus("h", "tokens", "1", tokens=TokenIds(ids[:640].view(5, 128)))
    assert overlap(sketch(half), stream) == 1
    assert overlap(sketch(stream), half) == 0.5
    padded = torch.zeros(5, 130, dtype=torch.int64)
    padded[:, :128] = ids[:640].view(5, 128)
    mask = torch.arange(130) < 128
    masked = Corpus("m", "tokens", "2", tokens=TokenIds(padded, mask.repeat(5, 1)))
    assert sketch(masked) == sketch(half)


def test_the_warning_covers_the_same_file_and_shared_lines_and_nothing_else():
    known = {"source": "calib.txt", "sha256": "1", "sketch": sketch(lines(0, 1000))}
    assert "is the text the model was calibrated on" in warning(known, corpus(["x"], "1", "e.txt"))
    shared = warning(known, corpus(lines(500, 3000), name="e.txt"))
    assert "% of the calibration lines (calib.txt) occur in e.txt" in shared
    assert warning(known, corpus(lines(1000, 3000))) is None


def test_a_report_without_the_keys_warns_of_nothing():
    assert warning({}, corpus(lines(0, 10))) is None
    assert warning({"sketch": None}, corpus(lines(0, 10))) is None


@pytest.mark.skipif(not DATA.exists(), reason="../shared/data is not in this checkout")
def test_wikitext_valid_and_test_are_told_apart_and_sts_splits_are_not():
    valid, test = (read(str(DATA / "wikitext2" / f"{n}.txt")) for n in ("valid", "test"))
    assert warning({"sketch": sketch(valid), "sha256": valid.sha256}, test) is None
    assert overlap(sketch(valid), valid) == 1
    # the STS-B splits share about 2 % of their sentences
    train, dev = (read(str(DATA / "stsb" / f"{n}.csv")) for n in ("train", "dev"))
    assert 0.01 < overlap(sketch(train), dev) < 0.06
