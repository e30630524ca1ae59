"""Encoders with heads on the command line: pruned folders keep them, and eval measures them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from liar_squad import articles, write_squad
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from liar_ext.checkpoint.load import load
from liar_ext.cli import main

WORDS = "the a list dict returns value of object string new with and is to key map file open"
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "initializer_range": 0.3,
}
LABELS = {
    "id2label": {0: "positive", 1: "negative"},
    "label2id": {"positive": 0, "negative": 1},
}


def dense_of(inputs, folder, family):
    torch.manual_seed(0)
    vocabulary = json.loads((inputs.bert / "config.json").read_text())["vocab_size"]
    if family == "distilbert":
        sizes = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
        config = DistilBertConfig(vocab_size=vocabulary, initializer_range=0.3, **sizes, **LABELS)
        model = DistilBertForSequenceClassification(config)
    elif family == "roberta":
        config = RobertaConfig(vocab_size=vocabulary, pad_token_id=0, **SIZES, **LABELS)
        model = RobertaForSequenceClassification(config)
    else:
        config = BertConfig(vocab_size=vocabulary, **SIZES, **LABELS)
        model = BertForSequenceClassification(config)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(inputs.bert / file, folder / file)
    return folder


def write_sst2(path, count=60):
    generator = torch.Generator().manual_seed(0)
    words = WORDS.split()
    rows = torch.randint(len(words), (count, 6), generator=generator).tolist()
    lines = [f"{' '.join(words[i] for i in row)}\t{row[0] % 2}" for row in rows]
    path.write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    return f"sst2={path}"


def evaluated(capsys, *arguments):
    assert main(["eval", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_a_pruned_classifier_keeps_its_head_and_labels(inputs, tmp_path, capsys, family):
    dense = dense_of(inputs, tmp_path / "dense", family)
    out = tmp_path / "small"
    place = ["--out", str(out), "--calibration", str(inputs.text), "--target", "ffn,heads"]
    sizes = ["--samples", "32", "--seq-len", "32", "--sparsity", "0.5"]
    assert main(["prune", str(dense), *place, *sizes]) == 0
    capsys.readouterr()
    one, other = load(dense), load(out)
    assert type(one) is type(other)
    assert other.config.id2label == {0: "positive", 1: "negative"}
    head = {n: p for n, p in one.named_parameters() if "classifier" in n or "pooler" in n}
    assert len(head) >= 2
    for name, parameter in head.items():
        assert torch.equal(parameter, other.get_parameter(name)), name
    result = evaluated(capsys, out, "--glue", write_sst2(tmp_path / "dev.tsv"), "--dense", dense)
    assert (result["metric"], result["task"], result["examples"]) == ("accuracy", "sst2", 60)
    assert result["label_order"] == ["positive", "negative"]
    assert result["difference"]["accuracy"]["paired"] is True
    ids = torch.randint(4, 20, (3, 9))
    with torch.no_grad():
        assert (one(input_ids=ids).logits - other(input_ids=ids).logits).abs().max() > 0


@pytest.mark.parametrize("version", ["1.1", "v2.0"])
def test_a_pruned_reader_answers_with_its_head(inputs, tmp_path, capsys, version):
    torch.manual_seed(0)
    vocabulary = json.loads((inputs.bert / "config.json").read_text())["vocab_size"]
    dense, out = tmp_path / "dense", tmp_path / "small"
    BertForQuestionAnswering(BertConfig(vocab_size=vocabulary, **SIZES)).save_pretrained(dense)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(inputs.bert / file, dense / file)
    place = ["--out", str(out), "--calibration", str(inputs.text), "--target", "ffn,heads"]
    sizes = ["--samples", "32", "--seq-len", "32", "--sparsity", "0.5"]
    assert main(["prune", str(dense), *place, *sizes]) == 0
    capsys.readouterr()
    one, other = load(dense), load(out)
    assert type(other) is BertForQuestionAnswering
    assert torch.equal(one.qa_outputs.weight, other.qa_outputs.weight)
    file = write_squad(tmp_path / "dev.json", articles(version=version))
    given = ["--squad", file, "--seq-len", "48", "--null-threshold", "0.1", "--dense", str(dense)]
    result = evaluated(capsys, out, *given)
    assert (result["metric"], result["questions"], result["stride"]) == ("f1", 12, 16)
    assert set(result["difference"]) == {"f1", "exact_match"}
    assert ("null_threshold" in result) is (version == "v2.0")
    assert main(["eval", str(out), *given]) == 0
    assert f"12 questions of version {result['squad_version']} in" in capsys.readouterr().out


def test_a_grid_has_glue(inputs, tmp_path, capsys):
    dense = dense_of(inputs, tmp_path / "dense", "bert")
    name = f"glue={write_sst2(tmp_path / 'dev.tsv')}"
    place = ["--out", str(tmp_path / "grid"), "--calibration", str(inputs.text)]
    sizes = ["--samples", "32", "--seq-len", "32", "--sparsities", "0.5"]
    assert main(["compare", str(dense), *place, *sizes, "--eval", name]) == 0
    result = json.loads((tmp_path / "grid" / "comparison.json").read_text())
    assert 0 <= result["cells"][0]["metrics"][name]["value"] <= 100


def test_a_classifier_in_the_table_is_beside_the_dense_one(inputs, tmp_path, capsys):
    dense = dense_of(inputs, tmp_path / "dense", "bert")
    spec = write_sst2(tmp_path / "dev.tsv")
    assert main(["eval", str(dense), "--glue", spec, "--dense", str(dense)]) == 0
    out = capsys.readouterr().out
    assert "accuracy, %" in out and "60 examples; 95 % Wilson score over examples" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{llama}", "--glue", "{glue}"], "a llama model is evaluated with --text"),
        (["{bert}", "--glue", "{glue}"], "BertModel has not the head that glue is about"),
        (["{bert}", "--glue", "sst9={tmp}/dev.tsv"], "'sst9' is no task of GLUE"),
        (["{llama}", "--squad", "{tmp}/dev.tsv"], "a llama model is evaluated with --text"),
        (["{bert}", "--squad", "{tmp}/dev.tsv"], "BertModel has not the head that squad is about"),
        (
            ["{bert}", "--glue", "{glue}", "--null-threshold", "1"],
            "--null-threshold: is of --squad",
        ),
        (["{bert}", "--text", "{text}"], "a bert model is evaluated with --stsb"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_models_that_glue_is_not_for_are_refused(inputs, tmp_path, capsys, arguments, says):
    places = {name: str(getattr(inputs, name)) for name in ("llama", "bert", "text")}
    places |= {"glue": write_sst2(tmp_path / "dev.tsv"), "tmp": str(tmp_path)}
    assert main(["eval", *(argument.format(**places) for argument in arguments)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and says in line
