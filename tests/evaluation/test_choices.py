"""Multiple-choice sets are read from files and data sets, and belong to one format."""

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
from liar_choices import DEMO, RECORDS, write_jsonl

from liar_ext.errors import InputError
from liar_ext.evaluation.choices import read_choices


@pytest.fixture
def piqa(tmp_path):
    other = {**RECORDS["piqa"], "label": 1}
    return write_jsonl(tmp_path / "piqa.jsonl", RECORDS["piqa"], other)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The package `datasets`, which writes to this test's folder alone."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def test_a_file_is_read_in_order_with_its_digest_and_its_chance(piqa, tmp_path):
    found = read_choices(piqa)
    assert (found.name, found.format) == (piqa, "piqa")
    assert [item.answer for item in found.items] == [0, 1]
    assert [item.where for item in found.items] == [f"{piqa}: line {n}" for n in (1, 2)]
    assert found.sha256 == hashlib.sha256(Path(piqa).read_bytes()).hexdigest()
    assert found.chance == 0.5
    arc = {**RECORDS["arc"], "choices": {"text": ["a", "b"], "label": ["1", "2"]}}
    several = write_jsonl(tmp_path / "arc.jsonl", RECORDS["arc"], arc)
    assert read_choices(several).chance == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_its_texts_are_known_to_the_overlap_check(piqa):
    corpus = read_choices(piqa).corpus()
    assert corpus.sha256 == read_choices(piqa).sha256
    assert corpus.documents[:2] == ("To open a file,", "call open with its name.")


def test_blank_lines_do_not_count_but_keep_their_numbers(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + json.dumps(RECORDS["mmlu"]) + "\n\n")
    (item,) = read_choices(str(path)).items
    assert item.where.endswith("line 2")


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_parquet_and_arrow_files_are_read_as_their_json_is(cache, tmp_path, suffix):
    records = [RECORDS["arc"], {**RECORDS["arc"], "answerKey": "3"}]
    written = cache.Dataset.from_list(records)
    path = tmp_path / f"arc.{suffix}"
    if suffix == "parquet":
        written.to_parquet(str(path))
    else:
        written.save_to_disk(str(tmp_path / "saved"))
        (shard,) = (tmp_path / "saved").glob("*.arrow")
        shard.rename(path)
    found = read_choices(str(path))
    from_json = read_choices(write_jsonl(tmp_path / "arc.jsonl", *records))
    assert [i.choices for i in found.items] == [i.choices for i in from_json.items]
    assert [i.answer for i in found.items] == [0, 2]
    assert found.items[1].where == f"{path}: record 2"
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_class_labels_and_splits_of_a_saved_data_set(cache, tmp_path):
    features = cache.Features(
        {
            **{name: cache.Value("string") for name in ("goal", "sol1", "sol2")},
            "label": cache.ClassLabel(names=["0", "1"]),
        }
    )
    splits = {
        name: cache.Dataset.from_list([{**RECORDS["piqa"], "label": label}], features=features)
        for name, label in (("train", 0), ("validation", 1))
    }
    folder = tmp_path / "piqa"
    cache.DatasetDict(splits).save_to_disk(str(folder))
    (item,) = read_choices(str(folder)).items
    assert item.answer == 1, "the validation split is the default"
    first, second = (read_choices(f"{folder}::{split}") for split in ("train", "validation"))
    assert first.items[0].answer == 0
    assert first.sha256 != second.sha256
    with pytest.raises(InputError, match="no split 'test'"):
        read_choices(f"{folder}::test")


def test_a_damaged_parquet_file_is_refused(cache, tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 and nothing of it")
    with pytest.raises(InputError, match=r"a\.parquet: cannot be read as parquet"):
        read_choices(str(path))


def test_without_the_datasets_package_json_is_read_and_the_rest_says_so(
    piqa, tmp_path, monkeypatch
):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    assert len(read_choices(piqa).items) == 2
    (tmp_path / "a.parquet").write_bytes(b"x")
    with pytest.raises(InputError, match="needs the package 'datasets'.*or give a .jsonl file"):
        read_choices(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "no records; give one multiple-choice question a line"),
        ([RECORDS["arc"], RECORDS["piqa"]], "line 2: a piqa record, and .*line 1 is arc; give"),
        ([RECORDS["arc"], "text"], "line 2: expected an object, got 'text'"),
        ([RECORDS["arc"], {**RECORDS["arc"], "answerKey": "9"}], "line 2: answerKey '9'"),
    ],
    ids=["empty", "mixed", "no object", "out of range"],
)
def test_a_bad_file_is_refused(tmp_path, lines, says):
    with pytest.raises(InputError, match=says) as caught:
        read_choices(write_jsonl(tmp_path / "a.jsonl", *lines))
    assert str(caught.value).startswith(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a.csv", "cannot read a .csv file; give .jsonl, .parquet, .arrow"),
        ("missing.jsonl", "no such file or folder"),
        ("a.csv:x", "a file takes no ':' parts"),
    ],
)
def test_another_file_or_none_is_refused(tmp_path, name, says):
    (tmp_path / "a.csv").write_text("a,b\n")
    with pytest.raises(InputError, match=says):
        read_choices(str(tmp_path / name))


def test_broken_json_and_an_empty_name_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("{")
    with pytest.raises(InputError, match="line 1: not valid JSON"):
        read_choices(str(tmp_path / "a.jsonl"))
    with pytest.raises(InputError, match="is not a source"):
        read_choices("")


def test_the_example_makes_questions_of_a_text_whose_answers_are_its_own(tmp_path):
    file = Path(__file__).resolve().parents[2] / "examples" / "continuations.py"
    spec = importlib.util.spec_from_file_location("liar_continuations", file)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    held_out = DEMO.parent / "heldout.txt"
    outs = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for out in outs:
        script.main([str(held_out), str(out)])
    assert outs[0].read_bytes() == outs[1].read_bytes()
    found = read_choices(str(outs[0]))
    assert (found.format, len(found.items), found.chance) == ("plain", 495, 0.25)
    text = " ".join(held_out.read_text().split())
    for item in found.items:
        assert len(set(item.choices)) == 4
        assert f"{item.context} {item.choices[item.answer]}" in text
    assert {item.answer for item in found.items} == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="0 different endings"):
        script.questions("too short")
