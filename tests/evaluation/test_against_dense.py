"""Stability of a pruned model against plain calls of both models, and what cannot be compared."""

import gc
import json
import shutil
import weakref

import numpy as np
import pytest
import torch
from liar_choices import DEMO, RECORDS, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from liar_ext.cli import main
from liar_ext.errors import InputError
from liar_ext.evaluation import against_dense as module
from liar_ext.evaluation.against_dense import against_dense
from liar_ext.evaluation.choices import read_choices

PLAIN = [
    {"context": "Return a new", "choices": ["list with the items", "is of and"], "answer": 0},
    {
        "context": "If the file is not",
        "choices": ["open", "found, raise an error", "a"],
        "answer": 1,
    },
    {"context": "This function returns", "choices": ["the the", "a string"], "answer": 1},
    {"question": "What is x?", "choices": ["a dict", "an error", "a list", "None"], "answer": 3},
    {"context": "The default value", "choices": ["is None.", "of if"], "answer": 0},
    {"context": "Remove and return the", "choices": ["last item", "in for"], "answer": 1},
]


@pytest.fixture(scope="module")
def dropped(tmp_path_factory):
    """The demo model without its first layer and one more: it answers much otherwise."""
    out = tmp_path_factory.mktemp("dropped") / "small"
    assert main(["prune", str(DEMO), "--out", str(out), "--drop-layers", "0,3"]) == 0
    return out


@pytest.fixture
def files(tmp_path):
    return [
        write_jsonl(tmp_path / "plain.jsonl", *PLAIN),
        write_jsonl(tmp_path / "arc.jsonl", RECORDS["arc"], {**RECORDS["arc"], "answerKey": "3"}),
    ]


def evaluated(capsys, *arguments):
    assert main(["eval", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def losses_of(model, tokenizer, item):
    """Mean loss of each option's text over its tokens, one plain call an option."""
    found = []
    for continuation in item.continuations():
        ids = tokenizer(item.context + continuation, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss
        # transformers takes the mean of the tokens that are predicted
        found.append(float(loss) * (ids.shape[1] - 1) / ids.shape[1])
    return found


def test_the_command_line_gives_what_plain_calls_and_numpy_give(dropped, files, capsys):
    result = evaluated(capsys, dropped, "--stability", *files, "--dense", DEMO, "--batch-size", "3")
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (DEMO, dropped)
    ]
    wanted = []
    for file in files:
        items = read_choices(file).items
        scores = [[losses_of(model, tokenizer, i) for i in items] for model in models]
        right = np.array(
            [
                [int(np.argmin(s)) == i.answer for s, i in zip(of, items, strict=True)]
                for of in scores
            ]
        )
        agree = right[0] == right[1]
        one = {"agreement": agree.mean(), "accuracy_ppl": right.mean(1)}
        for name, scale in (("by_loss", np.array), ("by_perplexity", np.exp)):
            weights = np.exp([np.std(scale(row)) for row in scores[0]])
            weights /= weights.sum()
            one[name] = {
                "stability": weights[agree].sum(),
                "legacy": weights[: agree.sum()].sum(),
                "effective_sample_size": 1 / (weights**2).sum(),
            }
        wanted.append(one)
    assert any(0 < one["agreement"] < 1 for one in wanted), "the models must differ somewhere"
    first = wanted[0]["by_loss"]
    assert abs(first["stability"] - first["legacy"]) > 1e-3, "and so must the two numbers"
    for one, got in zip(wanted, result["sets"], strict=True):
        assert got["agreement"] == pytest.approx(100 * one["agreement"])
        for who, accuracy in zip(("dense", "pruned"), one["accuracy_ppl"], strict=True):
            assert got[who]["accuracy_ppl"] == pytest.approx(100 * accuracy)
        for name in ("by_loss", "by_perplexity"):
            want = {**one[name]}
            want["stability"], want["legacy"] = 100 * want["stability"], 100 * want["legacy"]
            # perplexities of some hundred carry float32 losses with their relative error
            assert got[name] == pytest.approx(want, rel=2e-3)
    for place, name in ((result, "by_loss"), (result["by_perplexity"], "by_perplexity")):
        values = [one[name] for one in wanted]
        for key in ("stability", "legacy"):
            assert place[key] == pytest.approx(100 * np.mean([v[key] for v in values]), rel=2e-3)
        size = 4 / sum(1 / v["effective_sample_size"] for v in values)
        assert place["effective_sample_size"] == pytest.approx(size, rel=2e-3)
    assert (result["metric"], result["value"]) == ("stability", result["stability"])
    assert result["items"] == 8
    assert result["dense"]["source"] == str(DEMO)
    assert result["pruned"]["accuracy"] == np.mean(
        [s["pruned"]["accuracy"] for s in result["sets"]]
    )


def test_the_accuracies_are_those_of_eval_choices(dropped, files, capsys):
    together = evaluated(capsys, dropped, "--stability", files[0], "--dense", DEMO)
    for who, folder in (("dense", DEMO), ("pruned", dropped)):
        alone = evaluated(capsys, folder, "--choices", files[0])
        got = together["sets"][0][who]
        assert {key: alone[key] for key in got if key != "seconds"} == {
            key: value for key, value in got.items() if key != "seconds"
        }
        assert alone["value"] == together[who]["accuracy"]


def test_a_model_agrees_with_itself(files, capsys):
    result = evaluated(capsys, DEMO, "--stability", *files, "--dense", DEMO)
    assert result["agreement"] == result["stability"] == result["legacy"] == pytest.approx(100)
    assert result["by_perplexity"]["stability"] == pytest.approx(100)


def test_one_model_is_in_memory_at_a_time(dropped, files, monkeypatch):
    load, loaded = module.load, []

    def watched(folder, **options):
        gc.collect()
        assert all(reference() is None for reference in loaded), "the one before is still there"
        model = load(folder, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(module, "load", watched)
    against_dense(DEMO, dropped, [read_choices(file) for file in files])
    assert len(loaded) == 2


def test_the_table_names_what_was_compared(dropped, files, capsys):
    arguments = ["eval", str(dropped), "--stability", *files, "--dense", str(DEMO)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for text in ("8 items, mean of 2 sets", "stability by spread of loss", "effective items"):
        assert text in " ".join(out.split())


def test_contexts_are_cut_to_what_both_models_take(dropped, tmp_path, capsys):
    short = tmp_path / "short"
    shutil.copytree(dropped, short)
    config = json.loads((short / "config.json").read_text())
    config["max_position_embeddings"] = 12
    (short / "config.json").write_text(json.dumps(config))
    file = write_jsonl(tmp_path / "a.jsonl", {**PLAIN[0], "context": "Return a new list " * 8})
    for arguments in ((short, "--dense", DEMO), (DEMO, "--dense", short)):
        result = evaluated(capsys, *arguments, "--stability", file)
        assert result["sets"][0]["dense"]["truncated"] == 1
    result = evaluated(capsys, DEMO, "--dense", DEMO, "--stability", file, "--seq-len", "10")
    assert result["sets"][0]["dense"]["truncated"] == 1
    result = evaluated(capsys, DEMO, "--dense", DEMO, "--stability", file)
    assert result["sets"][0]["dense"]["truncated"] == 0


@pytest.fixture
def lowercase(dropped, tmp_path):
    """The dropped model with a tokenizer that cuts capitals otherwise."""
    folder = tmp_path / "lowercase"
    shutil.copytree(dropped, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_tokenizers_that_cut_a_question_differently_are_refused(lowercase, files, tmp_path):
    with pytest.raises(InputError, match=r"plain.jsonl: line 1: the tokenizers of .* cut this"):
        against_dense(DEMO, lowercase, [read_choices(files[0])])
    same = write_jsonl(tmp_path / "low.jsonl", {**PLAIN[0], "context": "return a new"})
    assert against_dense(DEMO, lowercase, [read_choices(same)])["items"] == 1


def test_encoders_and_no_sets_are_refused(dropped, files, tmp_path):
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48}
    config = BertConfig(num_hidden_layers=1, num_attention_heads=4, **sizes)
    BertModel(config).save_pretrained(tmp_path / "bert")
    sets = [read_choices(files[0])]
    for pair in ((DEMO, tmp_path / "bert"), (tmp_path / "bert", dropped)):
        with pytest.raises(InputError, match="bert: a bert model has no stability.*with --stsb"):
            against_dense(*pair, sets)
    with pytest.raises(InputError, match="--stability is missing"):
        against_dense(DEMO, dropped, [])
