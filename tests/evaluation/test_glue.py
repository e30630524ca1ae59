"""GLUE against scikit-learn, SciPy and plain calls of transformers: formats, labels, refusals."""

import csv
import json

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics
from transformers import BertConfig, BertForSequenceClassification

from liar_ext.errors import InputError
from liar_ext.evaluation.glue import GlueMeasure, label_order, label_order_from, read_glue
from liar_ext.evaluation.glue_metrics import ESTIMATES
from liar_ext.evaluation.glue_names import TASKS
from liar_ext.evaluation.task import Evaluation

# rows as the distributed files have them: header, then columns; {a}, {b} are texts, {y} the label
TSV = {
    "cola": (None, "gj04\t{y}\t\t{a}"),
    "sst2": ("sentence\tlabel", "{a}\t{y}"),
    "mrpc": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        "{y}\t702876\t702977\t{a}\t{b}",
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tmain-captions\tMSRvid\t2012test\t0001\tnone\tnone\t{a}\t{b}\t{y}",
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "201359\t303345\t303346\t{a}\t{b}\t{y}",
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
        "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\t63735\t63735n\tslate\t( x )\t( y )\t(ROOT)\t(ROOT)\t{a}\t{b}\tneutral\t{y}",
    ),
    "qnli": ("index\tquestion\tsentence\tlabel", "0\t{a}\t{b}\t{y}"),
    "rte": ("index\tsentence1\tsentence2\tlabel", "0\t{a}\t{b}\t{y}"),
    "wnli": ("index\tsentence1\tsentence2\tlabel", "0\t{a}\t{b}\t{y}"),
}
TSV["mnli-mm"] = TSV["mnli"]
# what a row says of a label: names in three tasks
SPELLED = {"mnli", "mnli-mm", "qnli", "rte"}


def examples(name, count=40, seed=0):
    generator = np.random.default_rng(seed)
    task = TASKS[name]
    for _ in range(count):
        texts = [
            " ".join(f"w{i}" for i in generator.integers(0, 90, generator.integers(1, 9)))
            for _ in range(2)
        ]
        # a quotation mark is a letter in these files
        texts[0] += ' "w1'
        if task.names:
            yield texts, int(generator.integers(len(task.names)))
        else:
            yield texts, round(float(generator.uniform(0, 5)), 3)


def write_tsv(path, name, rows):
    header, row = TSV[name]
    lines = [] if header is None else [header]
    for (a, b), y in rows:
        spelled = TASKS[name].names[y] if name in SPELLED else y
        lines.append(row.format(a=a, b=b, y=spelled))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{name}={path}"


def write_jsonl(path, name, rows):
    fields = TASKS[name].fields
    with path.open("w") as file:
        for index, (texts, y) in enumerate(rows):
            record = dict(zip(fields, texts, strict=False)) | {"label": y, "idx": index}
            file.write(json.dumps(record) + "\n")
    return f"{name}={path}"


def classifier(labels, **names):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.5,
        num_labels=labels,
        **names,
    )
    return BertForSequenceClassification(config).eval()


def plain_guesses(model, pair_tokenizer, rows, pairs):
    """One call of the model an example, no padding."""
    found = []
    for texts, _ in rows:
        given = texts if pairs else texts[:1]
        batch = pair_tokenizer(*given, return_tensors="pt")
        with torch.no_grad():
            found.append(model(**batch).logits[0].numpy())
    return np.array(found)


def sklearn_of(name, labels, guessed):
    """GLUE's own metric code: what these functions of scikit-learn and SciPy return."""
    found = {
        "cola": lambda: {"matthews": metrics.matthews_corrcoef(labels, guessed)},
        "mrpc": lambda: {
            "accuracy": metrics.accuracy_score(labels, guessed),
            "f1": metrics.f1_score(labels, guessed),
        },
        "stsb": lambda: {
            "pearson": stats.pearsonr(guessed, labels).statistic,
            "spearman": stats.spearmanr(guessed, labels).statistic,
        },
    }
    found["qqp"] = found["mrpc"]
    return found.get(name, lambda: {"accuracy": metrics.accuracy_score(labels, guessed)})()


@pytest.mark.parametrize("name", TASKS)
def test_every_task_gets_what_its_reference_metrics_give(tmp_path, pair_tokenizer, name):
    task, rows = TASKS[name], list(examples(name))
    model = classifier(max(1, len(task.names)))
    logits = plain_guesses(model, pair_tokenizer, rows, len(task.fields) == 2)
    # no label is guessed always
    shift = np.median(logits, 0)
    with torch.no_grad():
        model.classifier.bias -= torch.tensor(shift)
    logits = logits - shift
    guessed = logits.argmax(1) if task.names else logits[:, 0]
    assert len(set(guessed.tolist())) > 1
    want = sklearn_of(name, [y for _, y in rows], guessed)
    spec = write_tsv(tmp_path / "dev.tsv", name, rows)
    found = GlueMeasure(Evaluation("glue", spec, batch_size=7), pair_tokenizer)(model)
    assert set(found.estimates) == set(want)
    assert found.metric == task.metrics[0]
    for metric, value in want.items():
        # pearson: float32 logits of padded batches
        assert found.estimates[metric].value == pytest.approx(100 * value, abs=1e-3), metric
    # the hub's fields hold the same
    other = read_glue(write_jsonl(tmp_path / "dev.jsonl", name, rows))
    one = read_glue(spec)
    assert one.texts == other.texts
    np.testing.assert_array_equal(one.labels, other.labels)


def test_a_parquet_of_the_hub_gives_the_same(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("datasets")
    rows = list(examples("rte"))
    frame = pandas.DataFrame([{"sentence1": a, "sentence2": b, "label": y} for (a, b), y in rows])
    frame.to_parquet(tmp_path / "validation.parquet")
    one = read_glue(f"rte={tmp_path}/validation.parquet")
    other = read_glue(write_tsv(tmp_path / "dev.tsv", "rte", rows))
    assert one.texts == other.texts
    np.testing.assert_array_equal(one.labels, other.labels)


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews", "pearson", "spearman"])
def test_pseudo_values_are_of_figures_without_each_example(metric):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 30)
    guessed = np.where(generator.random(30) < 0.7, labels, 1 - labels)
    reference = {
        "accuracy": metrics.accuracy_score,
        "f1": metrics.f1_score,
        "matthews": metrics.matthews_corrcoef,
        "pearson": lambda a, b: stats.pearsonr(a, b).statistic,
        "spearman": lambda a, b: stats.spearmanr(a, b).statistic,
    }[metric]
    if metric in ("pearson", "spearman"):
        labels = labels + generator.random(30).round(1)
        guessed = guessed + generator.random(30)
    found = ESTIMATES[metric](labels, guessed)
    value = 100 * reference(labels, guessed)
    without = [
        100 * reference(np.delete(labels, i), np.delete(guessed, i)) for i in range(len(labels))
    ]
    assert found.value == pytest.approx(value)
    np.testing.assert_allclose(found.units, 30 * value - 29 * np.array(without), atol=1e-8)


def test_the_error_of_f1_is_that_of_many_samples():
    """2000 samples of 200 examples: the spread of F1 over them has a relative error of 1.6 %."""
    generator = np.random.default_rng(0)
    values, errors = [], []
    for _ in range(2000):
        labels = (generator.random(200) < 0.4).astype(int)
        guessed = np.where(generator.random(200) < 0.8, labels, 1 - labels)
        one = ESTIMATES["f1"](labels, guessed)
        values.append(one.value)
        errors.append(one.standard_error)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.06)


@pytest.mark.parametrize(
    ("names", "order"),
    [
        ({}, [0, 1, 2]),
        ({"label2id": {"CONTRADICTION": 0, "NEUTRAL": 1, "ENTAILMENT": 2}}, [2, 1, 0]),
        ({"id2label": {0: "contradiction", 1: "entailment", 2: "neutral"}}, [1, 2, 0]),
        ({"label2id": {"0": 0, "1": 1, "2": 2}}, [0, 1, 2]),
    ],
)
def test_labels_are_in_the_order_that_the_config_names(names, order):
    config = BertConfig(num_labels=3)
    for name, value in names.items():
        setattr(config, name, value)
    assert label_order(TASKS["mnli"], config) == order


def test_an_order_that_is_assumed_is_said(tmp_path, pair_tokenizer):
    for names, said in ((None, "assumed"), (["not_entailment", "entailment"], "config")):
        config = BertConfig(num_labels=2)
        if names is not None:
            config.label2id = {name: place for place, name in enumerate(names)}
            config.id2label = dict(enumerate(names))
        assert label_order_from(config) == said


def test_a_head_with_its_labels_the_other_way_round_is_read_by_name(tmp_path, pair_tokenizer):
    rows = list(examples("sst2"))
    spec = write_tsv(tmp_path / "dev.tsv", "sst2", rows)
    plain = GlueMeasure(Evaluation("glue", spec), pair_tokenizer)(classifier(2))
    names = {"positive": 0, "negative": 1}
    turned = classifier(2, id2label={0: "positive", 1: "negative"}, label2id=names)
    found = GlueMeasure(Evaluation("glue", spec), pair_tokenizer)(turned)
    assert found.estimates["accuracy"].value == pytest.approx(
        100 - plain.estimates["accuracy"].value
    )
    assert found.to_json()["label_order"] == ["positive", "negative"]


@pytest.mark.parametrize(
    ("task", "names", "says"),
    [
        ("sst2", {"num_labels": 3}, "the model's head has 3 labels and sst2 has 2 labels"),
        ("stsb", {"num_labels": 2}, "has 2 labels and stsb has one, a score"),
        ("rte", {"label2id": {"yes": 0, "no": 1}}, "labels are yes, no and those of rte entail"),
        (
            "sst2",
            {
                "id2label": {0: "positive", 1: "negative"},
                "label2id": {"negative": 0, "positive": 1},
            },
            "label2id says",
        ),
        ("sst2", {"label2id": {"negative": 0, "positive": 0}}, "set label2id in config.json"),
        ("sst2", {"label2id": {"LABEL_1": 0, "LABEL_0": 1}}, "set label2id in config.json"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(task, names, says):
    config = BertConfig(num_labels=names.pop("num_labels", 2))
    for name, value in names.items():
        setattr(config, name, value)
    with pytest.raises(InputError, match=says):
        label_order(TASKS[task], config)


def test_long_texts_are_cut_and_counted(tmp_path, pair_tokenizer):
    rows = [((" ".join(["w1"] * 40), "w2"), 0), (("w1", "w2"), 1)]
    spec = write_tsv(tmp_path / "dev.tsv", "rte", rows)
    found = GlueMeasure(Evaluation("glue", spec, seq_len=16), pair_tokenizer)
    assert found.rows.truncated == 1
    assert [len(row["input_ids"]) for row in found.rows.ids] == [16, 5]
    with pytest.raises(InputError, match="--seq-len 4: the tokenizer adds 3 special tokens"):
        GlueMeasure(Evaluation("glue", spec, seq_len=4), pair_tokenizer)


@pytest.mark.parametrize(
    ("spec", "text", "says"),
    [
        ("sst3={file}", "x", "'sst3' is no task of GLUE (cola, sst2,"),
        ("{file}", "x", "; give TASK="),
        ("sst2=", "x", "names no source"),
        ("sst2=no/such.tsv", "x", "no/such.tsv: no such file or folder"),
        ("sst2={file}", "", "the file is empty"),
        ("sst2={file}", "sentence\tlabel\n", "no examples"),
        ("sst2={file}", "text\tlabel\na\t1\n", "no column 'sentence' (found text, label)"),
        ("sst2={file}", "sentence\na\n", "no column 'label'"),
        ("sst2={file}", "sentence\tlabel\na\t1\nb", "line 3: 1 columns of 2; the file is cut off"),
        ("sst2={file}", "sentence\tlabel\na\t-1\n", "line 2: label '-1' is none of negative"),
        ("sst2={file}", "sentence\tlabel\na\t2\n", "a number from 0 to 1; test splits have no"),
        ("rte={file}", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n", "'maybe' is none"),
        (
            "stsb={file}",
            TSV["stsb"][0] + "\n" + TSV["stsb"][1].format(a="a", b="b", y="high"),
            "score 'high' is no number",
        ),
        ("sst2={jsonl}", '{"text": "a", "label": 1}', "line 1: no field 'sentence' (found text"),
        ("sst2={jsonl}", '{"sentence": "a", "label": 1', "line 1: not valid JSON"),
        ("sst2={jsonl}", '{"sentence": 3, "label": 1}', "field 'sentence' is 3; give a text"),
        ("sst2={jsonl}", '{"sentence": "a", "label": null}', "label None is none of"),
    ],
)
def test_what_is_no_set_is_one_line(tmp_path, spec, text, says):
    places = {"file": tmp_path / "dev.tsv", "jsonl": tmp_path / "dev.jsonl"}
    for path in places.values():
        path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_glue(spec.format(**places))
    assert says in str(caught.value)


def test_rows_are_those_of_a_csv_reader_without_quotes(tmp_path):
    rows = list(examples("qqp"))
    spec = write_tsv(tmp_path / "dev.tsv", "qqp", rows)
    with open(tmp_path / "dev.tsv", newline="") as file:
        want = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    found = read_glue(spec)
    assert found.texts == tuple((row["question1"], row["question2"]) for row in want)
    assert found.labels.tolist() == [int(row["is_duplicate"]) for row in want]
