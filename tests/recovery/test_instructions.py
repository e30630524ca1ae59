"""Instructions: which records there are, and that the answers alone are learned."""

from __future__ import annotations

import json

import pytest
import torch
from liar_depth import build

import liar_ext
from liar_ext import InputError
from liar_ext.calibration.sources import Corpus
from liar_ext.demo import MODEL
from liar_ext.engine.inputs import load_tokenizer
from liar_ext.recovery import next_token_loss
from liar_ext.recovery.instructions import (
    Instructions,
    alpaca_prompt,
    read_training,
    windows_of_instructions,
)

RECORDS = [
    {"instruction": "Name a river.", "input": "", "output": "The Danube is one of them."},
    {"instruction": "Add.", "input": "2 and 3", "output": "5"},
    {"instruction": "What is snow?", "input": "", "output": "Frozen water that falls in winter."},
    {"instruction": "Say yes", "input": "", "output": "yes"},
    {"instruction": "Translate", "input": "the house", "output": "la maison, of the French"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def drawn(found, tokenizer, **changes):
    sizes = {"wanted": 10, "held_out": 0, "seq_len": 64, "seed": 0, "vocab_size": 4096}
    return windows_of_instructions(found, tokenizer, **{**sizes, **changes})


def test_prompts_are_masked_as_labels_of_transformers(tmp_path, tokenizer):
    """By hand: prompt and answer as token ids, and -100 where the prompt is."""
    found = read_training(write(tmp_path / "a.jsonl", RECORDS))
    assert isinstance(found, Instructions)
    batch = drawn(found, tokenizer).windows
    model = liar_ext.load(MODEL, dtype=torch.float32)
    total, count = torch.zeros(()), 0
    lengths = []
    for record in RECORDS:
        asked = tokenizer(alpaca_prompt(record["instruction"], record["input"]))["input_ids"]
        answered = [*tokenizer(record["output"])["input_ids"], tokenizer.eos_token_id]
        lengths.append(len(asked + answered))
        labels = torch.tensor([[-100] * len(asked) + answered])
        ids = torch.tensor([asked + answered])
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss * len(answered)
        count += len(answered)
    assert batch.input_ids.shape == (5, max(lengths))
    assert sorted(batch.attention_mask.sum(1).tolist()) == sorted(lengths)
    with torch.no_grad():
        loss = next_token_loss(model)(batch)
        # in parts, each without what is padding for all of it
        parts = [next_token_loss(model)(batch.rows(rows)) for rows in ([0, 1], [2], [3, 4])]
    assert loss.count == count == sum(part.count for part in parts)
    torch.testing.assert_close(loss.total, total, rtol=1e-5, atol=0)
    torch.testing.assert_close(sum(part.total for part in parts), total, rtol=1e-5, atol=0)


def test_fields_of_both_formats(tmp_path):
    pairs = [{"prompt": "Q: 1+1?\nA:", "response": " 2", "id": 7}]
    found = read_training(write(tmp_path / "p.jsonl", pairs))
    assert found.pairs == (("Q: 1+1?\nA:", " 2"),)
    assert found.corpus.documents == ("Q: 1+1?\nA: 2",)
    found = read_training(write(tmp_path / "a.jsonl", RECORDS[1:2]))
    assert found.pairs == (
        ("### Instruction:\nAdd.\n\n### Input:\n2 and 3\n\n### Response:\n", "5"),
    )
    without = [{"instruction": "Add.", "output": "5"}]
    found = read_training(write(tmp_path / "w.jsonl", without))
    assert found.pairs == (("### Instruction:\nAdd.\n\n### Response:\n", "5"),)
    text = read_training(write(tmp_path / "t.jsonl", [{"text": "plain", "prompt": "x"}]))
    assert isinstance(text, Corpus)


def test_records_are_held_out_and_seeds_draw_others(tmp_path, tokenizer):
    found = read_training(write(tmp_path / "a.jsonl", RECORDS * 4))
    one = drawn(found, tokenizer, wanted=6, held_out=2)
    assert (len(one.windows.input_ids), len(one.held_out.input_ids)) == (6, 2)
    assert one.calibration.samples == 8
    assert one.calibration.sample_ids != drawn(found, tokenizer, seed=1).calibration.sample_ids
    # not enough for both: a tenth
    few = drawn(found, tokenizer, wanted=30, held_out=9)
    assert (len(few.windows.input_ids), len(few.held_out.input_ids)) == (18, 2)


def test_long_ones_are_cut_and_prompts_without_an_answer_left_out(tmp_path, tokenizer):
    long = {"instruction": "word " * 80, "input": "", "output": "no"}
    found = read_training(write(tmp_path / "a.jsonl", [*RECORDS, long]))
    cut = drawn(found, tokenizer, seq_len=24)
    assert cut.windows.input_ids.shape[1] == 24
    assert cut.left_out >= 1
    assert bool(cut.windows.answers.any(1).all())
    with pytest.raises(InputError, match="every prompt alone has 8 tokens or more"):
        drawn(found, tokenizer, seq_len=8)


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([RECORDS[0], {"instruction": "x"}], "line 2: field 'output' is missing; every record"),
        ([RECORDS[0], [1]], r"line 2: expected an object, got \[1\]"),
        ([{"prompt": "x", "response": 3}], "line 1: field 'response' is not a string"),
        ([{"prompt": "x", "response": " "}], "line 1: field 'response' is empty"),
        ([{"instruction": "a", "output": "b", "input": 1}], "line 1: field 'input' is not a str"),
    ],
)
def test_records_that_cannot_be_used(tmp_path, records, words):
    with pytest.raises(InputError, match=words):
        read_training(write(tmp_path / "a.jsonl", records))


def test_a_tokenizer_of_another_model(tmp_path, tokenizer):
    found = read_training(write(tmp_path / "a.jsonl", RECORDS))
    size = build("llama").config.vocab_size
    with pytest.raises(InputError, match="is outside the model's vocabulary of 97"):
        drawn(found, tokenizer, vocab_size=size)
    with pytest.raises(InputError, match="text needs a tokenizer"):
        drawn(found, None)
    one = read_training(write(tmp_path / "b.jsonl", RECORDS[:1]))
    with pytest.raises(InputError, match="one record, and some are held out"):
        drawn(one, tokenizer, held_out=1)
