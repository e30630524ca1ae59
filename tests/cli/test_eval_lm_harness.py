"""`liar eval --lm-eval` on tasks of local files, against the harness itself and `--choices`.

These need the package lm-eval, which the pinned environment has not: its thirty dependencies are
for other tasks. `pip install lm-eval==0.4.13` runs them.
"""

from __future__ import annotations

import importlib.util
import json
import random
import sys

import pytest

from liar_ext.checkpoint.load import load
from liar_ext.cli import main
from liar_ext.demo import HELDOUT, MODEL
from liar_ext.engine.inputs import load_tokenizer

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="needs the package lm-eval",
)

METRICS = """
output_type: multiple_choice
validation_split: validation
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
# the prompts of the harness's own files for these data sets
PROMPTS = {
    "piqa": r"""
doc_to_text: "Question: {{goal}}\nAnswer:"
doc_to_target: label
doc_to_choice: "{{[sol1, sol2]}}"
""",
    "arc": r"""
doc_to_text: "Question: {{question}}\nAnswer:"
doc_to_target: "{{choices.label.index(answerKey)}}"
doc_to_choice: "{{choices.text}}"
""",
}


def records(kind, count=24, seed=0):
    """Questions in the fields of a data set: which of some words go on in the held-out text?"""
    words = HELDOUT.read_text().split()
    generator = random.Random(seed)
    for _ in range(count):
        start = generator.randrange(len(words) - 40)
        question = " ".join(words[start : start + 12])
        texts = [" ".join(words[start + 12 : start + 12 + generator.randint(2, 6)])]
        for _ in range(1 if kind == "piqa" else 3):
            other = generator.randrange(len(words) - 40)
            texts.append(" ".join(words[other : other + generator.randint(2, 6)]))
        order = list(range(len(texts)))
        generator.shuffle(order)
        shuffled, answer = [texts[i] for i in order], order.index(0)
        if kind == "piqa":
            yield {"goal": question, "sol1": shuffled[0], "sol2": shuffled[1], "label": answer}
        else:
            labels = ["A", "B", "C", "D"]
            choices = {"text": shuffled, "label": labels}
            yield {"question": question, "choices": choices, "answerKey": labels[answer]}


@pytest.fixture
def tasks(tmp_path):
    """A folder of tasks as YAML, beside the data sets' own files."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for kind in PROMPTS:
        data = tmp_path / f"{kind}.jsonl"
        data.write_text("".join(json.dumps(r) + "\n" for r in records(kind)))
        source = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    validation: {data}\n"
        (folder / f"{kind}.yaml").write_text(
            f"task: local_{kind}\n{source}{PROMPTS[kind]}{METRICS}"
        )
    (folder / "group.yaml").write_text(
        "group: local_both\ntask:\n  - local_piqa\n  - local_arc\n"
        "aggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n"
    )
    return folder


@pytest.fixture
def small(tmp_path):
    out = tmp_path / "small"
    assert main(["prune", str(MODEL), "--out", str(out), "--drop-layers", "0,3"]) == 0
    return out


def evaluated(capsys, *arguments):
    assert main(["eval", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


@needs_harness
@pytest.mark.parametrize("kind", ["piqa", "arc"])
def test_choices_and_the_harness_agree_on_the_same_file(tasks, tmp_path, capsys, kind):
    ours = evaluated(capsys, MODEL, "--choices", tmp_path / f"{kind}.jsonl")
    theirs = evaluated(capsys, MODEL, "--lm-eval", f"local_{kind}", "--include-path", tasks)
    assert 0 < ours["accuracy"] < 100
    for name, metric in (("accuracy", "acc"), ("accuracy_norm", "acc_norm")):
        one, other = ours["estimates"][name], theirs["estimates"][f"local_{kind} {metric}"]
        assert other["value"] == pytest.approx(one["value"] / 100)
        assert other["standard_error"] == pytest.approx(one["standard_error"] / 100)


@needs_harness
def test_a_pruned_model_gets_what_the_harness_gives_it(tasks, small, capsys):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    options = ["--include-path", tasks, "--num-fewshot", "2", "--limit", "16"]
    names = "local_piqa,local_arc"
    result = evaluated(capsys, small, "--lm-eval", names, *options, "--dense", MODEL)
    for folder, found in ((small, result), (MODEL, result["dense"])):
        direct = lm_eval.simple_evaluate(
            HFLM(pretrained=load(folder).float(), tokenizer=load_tokenizer(folder), batch_size=3),
            tasks=names.split(","),
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            num_fewshot=2,
            limit=16,
            bootstrap_iters=1000,
        )["results"]
        for task in names.split(","):
            for metric in ("acc", "acc_norm"):
                own = found["estimates"][f"{task} {metric}"]
                assert own["value"] == pytest.approx(direct[task][f"{metric},none"])
                want = direct[task][f"{metric}_stderr,none"]
                assert own["standard_error"] == pytest.approx(want)
    assert result["tasks"]["local_arc"] == {"version": 1.0, "num_fewshot": 2, "samples": 16}
    mean = result["estimates"]["mean of 2 tasks"]
    parts = [result["estimates"][f"{task} acc"] for task in names.split(",")]
    assert result["value"] == mean["value"] == pytest.approx(sum(p["value"] for p in parts) / 2)
    squares = sum(part["standard_error"] ** 2 for part in parts)
    assert mean["standard_error"] == pytest.approx(squares**0.5 / 2)
    change = result["difference"]["mean of 2 tasks"]
    assert change["paired"] is True
    assert change["value"] == pytest.approx(result["value"] - result["dense"]["value"])


@needs_harness
def test_a_group_is_the_mean_of_its_documents(tasks, capsys):
    options = ["--include-path", tasks]
    result = evaluated(capsys, MODEL, "--lm-eval", "local_both", *options)["estimates"]
    parts = [result[f"local_{kind} acc"] for kind in PROMPTS]
    group = result["local_both acc"]
    assert group["value"] == pytest.approx(sum(part["value"] for part in parts) / 2)
    assert group["interval_method"].startswith("95 % Wilson")


@needs_harness
def test_a_grid_measures_tasks(tasks, tmp_path, capsys):
    place = ["--out", str(tmp_path / "grid"), "--calibration", str(HELDOUT), "--samples", "16"]
    measured = ["--eval", "lm-eval=local_piqa", "--eval-include-path", str(tasks)]
    sizes = ["--seq-len", "128", "--sparsities", "0.5", "--eval-limit", "8"]
    assert main(["compare", str(MODEL), *place, *measured, *sizes]) == 0
    result = json.loads((tmp_path / "grid" / "comparison.json").read_text())
    assert 0 <= result["cells"][0]["metrics"]["lm-eval=local_piqa"]["value"] <= 1
    assert result["evaluations"]["lm-eval=local_piqa"]["limit"] == 8


@needs_harness
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["local_piqa,"], "a task has no name"),
        (["local_piqa", "--include-path", "no/such"], "--include-path no/such: no such folder"),
        (["local_lost", "--include-path", "{tasks}"], "local_lost: the tasks cannot be loaded"),
        (["local_piqa", "--limit", "0"], "--limit 0: must be at least 1"),
        (["local_piqa", "--num-fewshot", "-1"], "--num-fewshot -1: must be at least 0"),
    ],
)
def test_what_the_harness_cannot_do_is_one_line(tasks, capfd, options, says):
    lost = (tasks / "piqa.yaml").read_text().replace("piqa.jsonl", "gone.jsonl")
    (tasks / "lost.yaml").write_text(lost.replace("local_piqa", "local_lost"))
    given = [option.format(tasks=tasks) for option in options]
    assert main(["eval", str(MODEL), "--lm-eval", *given]) == 2
    assert f"{says}" in capfd.readouterr().err.strip().splitlines()[-1]


@needs_harness
@pytest.mark.slow
def test_an_unknown_task_is_named(capsys):
    """Reads all of the harness's own files first."""
    assert main(["eval", str(MODEL), "--lm-eval", "piqua"]) == 2
    assert "--lm-eval piqua: no such task, group or tag" in capsys.readouterr().err


def test_without_the_package_it_is_named(monkeypatch, capsys):
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["eval", str(MODEL), "--lm-eval", "piqa"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: --lm-eval: needs the package 'lm-eval' (pip install")


def test_its_options_are_of_it_alone(inputs, capsys):
    assert main(["eval", str(MODEL), "--text", str(inputs.text), "--limit", "3"]) == 2
    assert "--limit: is of --lm-eval only" in capsys.readouterr().err
    assert main(["eval", str(inputs.bert), "--lm-eval", "piqa"]) == 2
    assert "a bert model is evaluated with --stsb" in capsys.readouterr().err
