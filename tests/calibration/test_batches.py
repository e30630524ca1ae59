"""make_batches: windows for decoders, padded sentences for encoders."""

import json
import logging

import pytest
import torch

from liar_ext.calibration import batches as module
from liar_ext.calibration.batch import Batch
from liar_ext.calibration.batches import Calibration, check_enough, make_batches
from liar_ext.calibration.sources import Corpus, TokenIds
from liar_ext.errors import InputError

VOCABULARY = 504


def text_corpus(*documents, kind="jsonl"):
    return Corpus("corpus", kind, "abc", tuple(documents))


def words(*numbers):
    return " ".join(f"w{n}" for n in numbers)


def make(corpus, tokenizer, **changes):
    options = {
        "packed": True,
        "samples": 3,
        "seq_len": 5,
        "batch_size": 2,
        "seed": 0,
        "vocab_size": VOCABULARY,
    }
    return make_batches(corpus, tokenizer, **(options | changes))


def rows(calibration):
    return [row.tolist() for batch in calibration.batches for row in batch.input_ids]


def test_packed_windows_tile_the_joined_documents_without_padding(tokenizer):
    corpus = text_corpus(words(*range(8)), words(*range(8, 17)))
    made = make(corpus, tokenizer, samples=10)
    # 17 words are three windows of 5; the last two words are dropped, nothing is added
    assert sorted(rows(made)) == [[4 + i for i in range(s, s + 5)] for s in (0, 5, 10)]
    assert (made.samples, made.requested, made.tokens, len(made.batches)) == (3, 10, 15, 2)
    assert all(batch.attention_mask.all() for batch in made.batches)


def test_windows_are_drawn_without_replacement_by_the_seed(tokenizer):
    corpus = text_corpus(words(*range(200)))
    first, again, other = (make(corpus, tokenizer, samples=9, seed=s) for s in (1, 1, 2))
    assert rows(first) == rows(again)
    assert rows(first) != rows(other)
    assert len({tuple(row) for row in rows(first)}) == 9
    assert rows(first) == [[4 + 5 * i + j for j in range(5)] for i in first.sample_ids]


def test_more_samples_with_the_same_seed_keep_the_earlier_ones(tokenizer):
    corpus = text_corpus(words(*range(200)))
    few, many = (make(corpus, tokenizer, samples=n) for n in (4, 8))
    assert rows(many)[:4] == rows(few)


def test_text_shorter_than_one_window_says_what_there_is_and_what_is_needed(tokenizer):
    with pytest.raises(InputError, match=r"3 tokens, and one window needs 5.*--seq-len"):
        make(text_corpus(words(1, 2, 3)), tokenizer)


def test_pieces_cut_between_words_give_the_same_stream(tokenizer, monkeypatch):
    corpus = text_corpus(words(*range(90)), "\n".join(words(i, i + 1) for i in range(40)))
    whole = make(corpus, tokenizer, samples=99)
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 23)
    assert len(module._pieces(corpus.documents)) > 20
    assert "".join(module._pieces(corpus.documents)) == "\n\n".join(corpus.documents)
    assert rows(make(corpus, tokenizer, samples=99)) == rows(whole)


def test_a_text_without_spaces_is_still_cut(monkeypatch):
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 4)
    assert module._pieces(["abcdefghij"]) == ["abcd", "efgh", "ij"]


def test_a_large_text_is_tokenised_only_as_far_as_needed(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 1000)
    seen = []
    real = module.encode

    def counting(text, *args, **kwargs):
        seen.append(len(text))
        return real(text, *args, **kwargs)

    monkeypatch.setattr(module, "encode", counting)
    corpus = text_corpus(*[words(*range(500))] * 100)
    first = make(corpus, tokenizer)
    assert sum(seen) < 3000 < len(corpus.documents[0]) * 100
    assert first.samples == 3
    assert rows(first) == rows(make(corpus, tokenizer))


def test_a_wrong_guess_of_token_length_costs_more_pieces_not_samples(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 500)
    # one token of 100 characters: the four characters a token of the guess are far off
    corpus = text_corpus(*["x" * 100] * 300)
    assert make(corpus, tokenizer, samples=20).samples == 20


def test_a_long_text_gives_no_warning_about_its_length(tokenizer, caplog, recwarn, capfd):
    with caplog.at_level(logging.DEBUG):
        make(text_corpus(words(*range(300))), tokenizer)
        make(text_corpus(*[words(*range(30))] * 5), tokenizer, packed=False)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert "longer than" not in "".join(capfd.readouterr())


def test_sentences_are_truncated_sorted_and_padded_to_the_longest_of_the_batch(tokenizer):
    corpus = text_corpus(words(0), words(*range(20)), words(1, 2), words(3))
    made = make(corpus, tokenizer, packed=False, samples=9, seq_len=6)
    wide, narrow = made.batches
    assert wide.input_ids.tolist() == [[2, 4, 5, 6, 7, 3], [2, 5, 6, 3, 0, 0]]
    assert wide.attention_mask.tolist() == [[True] * 6, [True] * 4 + [False] * 2]
    assert narrow.input_ids.shape == (2, 3)
    assert (made.tokens, made.samples) == (6 + 4 + 3 + 3, 4)


def test_sentences_are_drawn_by_the_seed(tokenizer):
    corpus = text_corpus(*[words(i) for i in range(50)])
    first, again, other = (
        make(corpus, tokenizer, packed=False, samples=10, seed=s) for s in (1, 1, 2)
    )
    assert rows(first) == rows(again) == [[2, 4 + i, 3] for i in first.sample_ids]
    assert sorted(rows(first)) != sorted(rows(other))


def test_lines_of_a_text_file_are_an_encoders_sentences(tokenizer):
    made = make(text_corpus("w1\n\nw2 w3\n", kind="text"), tokenizer, packed=False)
    assert rows(made) == [[2, 6, 7, 3], [2, 5, 3]] or rows(made) == [[2, 6, 7, 3], [2, 5, 3, 0]]


@pytest.mark.parametrize("packed", [True, False])
def test_a_token_stream_needs_no_tokenizer(packed):
    corpus = Corpus("ids", "tokens", "abc", tokens=TokenIds(torch.arange(17)))
    made = make(corpus, None, packed=packed, samples=9)
    assert sorted(rows(made)) == [list(range(s, s + 5)) for s in (0, 5, 10)]


def test_token_windows_keep_their_mask_and_lose_shared_padding():
    ids = torch.arange(1, 13).view(3, 4)
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    corpus = Corpus("ids", "tokens", "abc", tokens=TokenIds(ids, mask))
    made = make(corpus, None, samples=9, seq_len=3, batch_size=1)
    assert rows(made) == [[5, 6, 7], [9, 10], [1]]
    assert made.tokens == 6


def test_windows_without_valid_tokens_after_truncation_are_left_out():
    ids = torch.ones(2, 4, dtype=torch.int64)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    corpus = Corpus("ids", "tokens", "abc", tokens=TokenIds(ids, mask))
    made = make(corpus, None, samples=9, seq_len=2)
    assert (made.samples, made.sample_ids) == (1, (1,))
    corpus = Corpus("ids", "tokens", "abc", tokens=TokenIds(ids[:1], mask[:1]))
    with pytest.raises(InputError, match="no calibration tokens"):
        make(corpus, None, samples=9, seq_len=2)


@pytest.mark.parametrize("packed", [True, False])
def test_ids_outside_the_vocabulary_are_refused(tokenizer, packed):
    with pytest.raises(InputError, match="token id 103 is outside the model's vocabulary of 103"):
        make(text_corpus(words(*range(90, 100))), tokenizer, packed=packed, vocab_size=103,
             samples=9, seq_len=10 if packed else 99)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"samples": 0}, "--samples 0"),
        ({"seq_len": 1}, "--seq-len 1"),
        ({"batch_size": 0}, "--batch-size 0"),
    ],
)
def test_numbers_below_their_minimum_name_the_flag(tokenizer, changes, fragment):
    with pytest.raises(InputError, match=fragment):
        make(text_corpus(words(*range(20))), tokenizer, **changes)


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(InputError, match="needs a tokenizer"):
        make(text_corpus("a"), None)


def test_an_encoder_needs_a_pad_token(tokenizer):
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="no pad token"):
        make(text_corpus("w1"), bare, packed=False)


def test_the_report_repeats_the_choice_and_is_json(tokenizer):
    corpus = text_corpus("a line that is long enough for the sketch " + words(*range(40)))
    made = make(corpus, tokenizer)
    report = json.loads(json.dumps(made.to_json()))
    assert report["source"] == "corpus"
    assert report["sha256"] == "abc"
    assert (report["samples"], report["tokens"], report["seq_len"], report["seed"]) == (3, 15, 5, 0)
    assert report["sample_ids"] == list(made.sample_ids)
    assert len(report["sketch"]) == 1


def test_a_batch_checks_its_tensors():
    ids = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(InputError, match="int64"):
        Batch(ids.int(), ids.bool())
    with pytest.raises(InputError, match="bool"):
        Batch(ids, ids)
    with pytest.raises(InputError, match="bool"):
        Batch(ids, ids.bool()[:1])
    assert Batch(ids, torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()).tokens == 3


def test_a_calibration_without_tokens_is_refused():
    with pytest.raises(InputError, match="no calibration tokens"):
        Calibration((), "x", "abc", 0, 5, 3, (), ())


def test_too_few_tokens_for_the_width_name_the_numbers_and_the_flags():
    with pytest.raises(InputError, match=r"99 calib.*100 columns.*at least 100.*1000 rec.*--samp"):
        check_enough(99, 100)
    assert check_enough(500, 100) is None
    for tokens in (100, 499):
        assert f"only {tokens}" in check_enough(tokens, 100)


def test_held_out_tokens_are_not_fitted_to():
    """A fifth of them: 125 leave 100."""
    assert check_enough(625, 100, 125) is None
    warned = check_enough(624, 100, 125)
    assert (
        "only 624 calibration tokens for 100 columns: 125 are held out for --ridge auto" in warned
    )
    assert "at least 126 are needed and 1251 recommended" in warned
    assert "only 125" in check_enough(125, 100, 25)
    with pytest.raises(InputError, match="124 calibration tokens .*25 are held out .*at least 126"):
        check_enough(124, 100, 25)
