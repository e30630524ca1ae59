"""What both stacks of an encoder-decoder are calibrated on, against plain lists of tokens."""

import json

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from liar_ext import InputError
from liar_ext.calibration import Batch, read
from liar_ext.calibration.batch import first_samples
from liar_ext.calibration.pairs import pair_batches, start_token
from liar_ext.calibration.sources import Corpus, TokenIds

START = 0
OPTIONS = {"seed": 0, "vocab_size": 600, "start": START}


def _rows(batches):
    """(source, target) of each sample without padding."""
    return [
        tuple(part.input_ids[row][part.attention_mask[row]].tolist() for part in batch.parts)
        for batch in batches
        for row in range(len(batch.input_ids))
    ]


def _written(folder, records):
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def _record(number):
    words = [f"w{number + i}" for i in range(12)]
    source, target = words[: 1 + number % 4], words[: 1 + number % 3]
    return {"source": " ".join(source), "target": " ".join(target)}


def test_pairs_are_read_with_special_tokens_and_the_decoder_is_shifted(tmp_path, tokenizer):
    records = [_record(number) for number in range(9)]
    corpus = read(_written(tmp_path, records))
    found = pair_batches(corpus, tokenizer, samples=20, seq_len=6, batch_size=4, **OPTIONS)
    # ids of w0 on are 4, 5, ...; [CLS] is 2 and [SEP] is 3
    expected = []
    for record in records:
        source, target = ([4 + int(w[1:]) for w in record[n].split()] for n in ("source", "target"))
        expected.append(([2, *source[:4], 3], [START, 2, *target[:4]]))
    assert sorted(_rows(found.batches)) == sorted(expected)
    assert [len(batch.input_ids) for batch in found.batches] == [4, 4, 1]
    lengths = [len(s) + len(t) for s, t in _rows(found.batches)]
    assert lengths == sorted(lengths, reverse=True)
    assert found.tokens == sum(lengths)
    assert sorted(found.sample_ids) == list(range(9))


def test_labels_shifted_by_transformers_are_what_the_decoder_is_given(tmp_path, tokenizer):
    corpus = read(_written(tmp_path, [_record(7)]))
    found = pair_batches(corpus, tokenizer, samples=1, seq_len=8, batch_size=1, **OPTIONS)
    config = T5Config(d_model=8, d_ff=8, num_layers=1, d_kv=4, num_heads=2, vocab_size=600)
    config.decoder_start_token_id = START
    labels = tokenizer(_record(7)["target"], return_tensors="pt").input_ids
    shifted = T5ForConditionalGeneration(config)._shift_right(labels)
    assert torch.equal(found.batches[0].parts[1].input_ids, shifted)


def test_plain_text_is_cut_in_two_where_the_decoder_goes_on(tokenizer):
    text = " ".join(f"w{i}" for i in range(100))
    corpus = Corpus("memory", "text", "0", (text,))
    found = pair_batches(corpus, tokenizer, samples=50, seq_len=10, batch_size=2, **OPTIONS)
    assert sorted(_rows(found.batches)) == [
        (list(range(4 + b, 14 + b)), [START, *range(14 + b, 23 + b)]) for b in range(0, 100, 20)
    ]
    assert all(batch.cut == 10 and batch.longest == 10 for batch in found.batches)


@pytest.mark.parametrize("shape", [(60,), (3, 20)])
def test_token_files_are_cut_alike(shape):
    ids = torch.arange(60).view(shape)
    corpus = Corpus("memory", "tokens", "0", tokens=TokenIds(ids))
    found = pair_batches(corpus, None, samples=3, seq_len=10, batch_size=3, **OPTIONS)
    assert sorted(_rows(found.batches)) == [
        (list(range(b, b + 10)), [START, *range(b + 10, b + 19)]) for b in (0, 20, 40)
    ]


def test_a_mask_is_refused(tokenizer):
    ids = torch.arange(20).view(2, 10)
    tokens = TokenIds(ids, torch.ones_like(ids, dtype=torch.bool))
    with pytest.raises(InputError, match="attention_mask says nothing of where the decoder begins"):
        pair_batches(
            Corpus("memory", "tokens", "0", tokens=tokens),
            tokenizer,
            samples=2,
            seq_len=4,
            batch_size=2,
            **OPTIONS,
        )


def test_parts_samples_and_rows_keep_where_the_decoder_begins():
    source = Batch(torch.arange(12).view(3, 4), torch.ones(3, 4, dtype=torch.bool))
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]], dtype=torch.bool)
    whole = Batch.of_pair(source, Batch(torch.arange(9).view(3, 3), mask))
    assert (whole.cut, whole.longest, whole.tokens) == (4, 4, 18)
    for part, own in zip(whole.parts, (source.input_ids, torch.arange(9).view(3, 3)), strict=True):
        assert torch.equal(part.input_ids, own)
    (first,) = first_samples([whole], 2)
    assert (first.cut, len(first.input_ids)) == (4, 2)
    short = whole.rows([1, 2])
    assert short.parts[1].input_ids.tolist() == [[3, 4], [6, 7]]


def test_two_fields_of_a_data_set_are_named(tmp_path):
    records = [{"article": f"w{i} w2", "summary": f"w{i}", "id": i} for i in range(4)]
    folder = tmp_path / "news"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(json.dumps(r) for r in records))
    pytest.importorskip("datasets")
    corpus = read(f"{folder}:::article>summary")
    assert corpus.pairs == tuple((r["article"], r["summary"]) for r in records)
    assert len(corpus.documents) == 8


def test_records_of_several_kinds_are_texts_and_no_pairs(tmp_path, tokenizer):
    path = _written(tmp_path, [{"source": "a", "target": "b"}, {"text": "c"}])
    corpus = read(path)
    assert (corpus.pairs, corpus.documents) == ((), ("a", "b", "c"))
    # nothing else is taken silently
    with pytest.raises(InputError, match=f"{path}: line 2: is no pair of texts, and others are"):
        pair_batches(corpus, tokenizer, samples=2, seq_len=4, batch_size=2, **OPTIONS)


def test_pairs_win_over_a_text_beside_them(tmp_path):
    corpus = read(_written(tmp_path, [{"source": "a", "target": "b", "text": "a b"}]))
    assert (corpus.pairs, corpus.documents) == ((("a", "b"),), ("a b",))


def test_what_a_calibration_is_of_is_told(tmp_path, tokenizer):
    pairs = read(_written(tmp_path, [_record(7)]))
    text = Corpus("memory", "text", "0", (" ".join(f"w{i}" for i in range(50)),))
    found = [
        pair_batches(corpus, tokenizer, samples=1, seq_len=8, batch_size=1, **OPTIONS).to_json()
        for corpus in (pairs, text)
    ]
    assert [own["form"] for own in found] == [
        "pairs of texts",
        "windows of text, cut in the middle",
    ]


@pytest.mark.parametrize("shapes", [((4, 3), (2, 3)), ((4, 3), (4, 0)), ((4, 0), (4, 3))])
def test_sources_and_targets_that_are_no_pairs_are_refused(shapes):
    parts = [
        Batch(torch.ones(s, dtype=torch.int64), torch.ones(s, dtype=torch.bool)) for s in shapes
    ]
    with pytest.raises(InputError, match="give as many rows of both, each with a token or more"):
        Batch.of_pair(*parts)


def test_blank_sides_are_left_out(tmp_path):
    pairs = [{"source": "a", "target": " "}, {"source": "b", "target": "c"}]
    blank = read(_written(tmp_path, pairs))
    assert blank.pairs == (("b", "c"),)


def test_the_start_token_is_the_configs():
    config = T5Config(decoder_start_token_id=7)
    assert start_token(config) == 7
    assert start_token(T5Config(pad_token_id=5)) == 5
    with pytest.raises(InputError, match="no decoder_start_token_id; add it"):
        start_token(T5Config(pad_token_id=None))
