"""read(spec): every kind of source, and what is refused."""

import builtins
import hashlib
import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from liar_ext.calibration import sources
from liar_ext.calibration.sources import Corpus, TokenIds, csv_rows, read
from liar_ext.errors import InputError


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def refused(spec, *fragments, **kwargs):
    with pytest.raises(InputError) as caught:
        read(spec, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message
    return message


def test_txt_is_one_document_and_hashes_the_bytes_of_the_file(tmp_path):
    raw = "\ufeffone\n\ntwo é\n".encode()
    spec = write(tmp_path / "a.txt", raw)
    corpus = read(spec)
    assert corpus.documents == ("one\n\ntwo é\n",)
    assert (corpus.name, corpus.kind, corpus.complete) == (spec, "text", True)
    assert corpus.sha256 == hashlib.sha256(raw).hexdigest()


def test_a_text_file_gives_an_encoder_one_sentence_for_each_line(tmp_path):
    assert read(write(tmp_path / "a.txt", "one\r\n \n two\n")).sentences() == ("one", "two")


def test_jsonl_takes_text_then_a_sentence_pair_then_the_only_string(tmp_path):
    records = [
        {"text": "a", "other": "x"},
        {"sentence1": "b", "sentence2": "c", "label": "x"},
        {"id": 3, "body": "d\u2028e"},
        {"text": "  "},
    ]
    lines = "\n".join(json.dumps(r, ensure_ascii=False) for r in records)
    corpus = read(write(tmp_path / "a.jsonl", lines + "\n\n"))
    assert corpus.documents == ("a", "b", "c", "d\u2028e")
    assert corpus.sentences() == corpus.documents


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("3", "expected an object"),
        ('{"text": 3}', "'text' is not a string"),
        ('{"a": "x", "b": "y"}', "found a, b"),
        ('{"a": 1}', "found a"),
        ("{}", "found none"),
        (r'{"text": "\ud800"}', "surrogate"),
    ],
    ids=["json", "deep", "object", "type", "two strings", "no string", "empty", "surrogate"],
)
def test_a_bad_jsonl_line_is_named(tmp_path, line, fragment):
    refused(write(tmp_path / "a.jsonl", '{"text": "x"}\n\n' + line), "line 3", fragment)


def test_csv_takes_every_value_of_every_text_column(tmp_path):
    spec = write(tmp_path / "a.csv", 'one,"two, ""2""",5.0\r\n3,"fo\nur",0.5\r\nx,y,1\r\n')
    assert read(spec).documents == ("one", 'two, "2"', "3", "fo\nur", "x", "y")


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ("a,b,1\nc,2\n", "line 2: 2 columns"),
        ('a,b,1\n"c,d,2\n', "line 2: not valid CSV"),
        ("sentence1,sentence2,score\na,b,1\nc,d,2\n", "header ('score'"),
        ("1,2\n", "every column is numeric"),
        ("\n", "no rows"),
    ],
    ids=["ragged", "quote", "header", "numeric", "blank"],
)
def test_a_bad_csv_is_refused(tmp_path, content, fragment):
    refused(write(tmp_path / "a.csv", content), fragment)


def test_csv_rows_carry_their_line_numbers(tmp_path):
    path = write(tmp_path / "a.csv", 'a,"b\nc"\n\nd,e\n')
    assert csv_rows(path) == [(2, ["a", "b\nc"]), (4, ["d", "e"])]


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64])
def test_npy_streams_and_windows_become_int64(tmp_path, dtype):
    for array in (np.arange(6, dtype=dtype), np.arange(6, dtype=dtype).reshape(2, 3)):
        np.save(tmp_path / "a.npy", array)
        corpus = read(str(tmp_path / "a.npy"))
        assert corpus.kind == "tokens"
        assert corpus.documents == ()
        assert corpus.tokens.input_ids.dtype == torch.int64
        assert corpus.tokens.input_ids.tolist() == array.tolist()
        assert corpus.tokens.attention_mask is None


def test_safetensors_windows_keep_their_mask(tmp_path):
    ids, mask = torch.tensor([[1, 2], [3, 0]]), torch.tensor([[1, 1], [1, 0]])
    save_file({"input_ids": ids, "attention_mask": mask, "x": ids + 0}, tmp_path / "a.safetensors")
    tokens = read(str(tmp_path / "a.safetensors")).tokens
    assert tokens.input_ids.equal(ids)
    assert tokens.attention_mask.equal(mask.bool())


@pytest.mark.parametrize(
    ("array", "fragment"),
    [
        (np.zeros((2, 2, 2), int), "shape (2, 2, 2)"),
        (np.zeros(0, int), "shape (0,)"),
        (np.ones(3), "float64"),
        (np.array([1, -2]), "-2 is negative"),
        (np.array([2**63 + 1], np.uint64), "negative"),
        (np.array([{"a": 1}], object), "allow_pickle"),
    ],
    ids=["3-D", "empty", "float", "negative", "uint64", "pickle"],
)
def test_a_bad_npy_is_refused(tmp_path, array, fragment):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    refused(str(tmp_path / "a.npy"), "a.npy", fragment)


@pytest.mark.parametrize("name", ["a.npy", "a.safetensors"])
def test_a_token_file_of_garbage_is_refused(tmp_path, name):
    refused(write(tmp_path / name, b"\x80garbage"), name, "not a")


def test_an_npz_named_npy_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.arange(3))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    refused(str(tmp_path / "a.npy"), "not integers")


@pytest.mark.parametrize(
    ("tensors", "fragment"),
    [
        ({"ids": torch.ones(2, dtype=torch.int64)}, "no tensor 'input_ids' (found ids)"),
        ({"input_ids": torch.ones(2)}, "input_ids is torch.float32"),
        (
            {"input_ids": torch.ones(2, 2, dtype=torch.int64), "attention_mask": torch.ones(2, 2)},
            "attention_mask is torch.float32",
        ),
        (
            {
                "input_ids": torch.ones(2, 2, dtype=torch.int64),
                "attention_mask": torch.ones(2, 3, dtype=torch.int64),
            },
            "attention_mask has shape (2, 3)",
        ),
        (
            {
                "input_ids": torch.ones(2, 2, dtype=torch.int64),
                "attention_mask": torch.tensor([[1, 1], [0, 0]]),
            },
            "window 1 has no valid token",
        ),
    ],
    ids=["missing", "float ids", "float mask", "shape", "blank window"],
)
def test_bad_safetensors_are_refused(tmp_path, tensors, fragment):
    save_file(tensors, tmp_path / "a.safetensors")
    refused(str(tmp_path / "a.safetensors"), fragment)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.npy", "a.safetensors"])
def test_an_empty_file_is_refused(tmp_path, name):
    refused(write(tmp_path / name, b""), name, "is empty")


@pytest.mark.parametrize(("name", "text"), [("a.txt", " \n\t"), ("a.jsonl", '{"text": ""}')])
def test_a_source_without_text_is_refused(tmp_path, name, text):
    refused(write(tmp_path / name, text), name, "no text found")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_bytes_that_are_not_utf8_are_refused_with_their_line(tmp_path, name):
    refused(write(tmp_path / name, b"ok\nn\xe9"), "line 2", "0xe9", "UTF-8")


@pytest.mark.parametrize("name", ["a.json", "a.bin", "a.parquet", "a", "a.TXT2"])
def test_a_file_of_another_kind_is_refused(tmp_path, name):
    refused(write(tmp_path / name, "x"), "cannot read a", ".jsonl")


def test_an_unreadable_file_is_refused(tmp_path, monkeypatch):
    spec = write(tmp_path / "a.txt", "x")

    def deny(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", deny)
    refused(spec, "Permission denied")


@pytest.mark.parametrize(
    "spec",
    ["./missing", "/missing/folder", "~/missing", "missing.txt", "data/missing.jsonl", "m.json",
     "../m:train", "a.csv:b"],
)  # fmt: skip
def test_a_missing_path_is_never_taken_for_a_hub_name(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(spec, f"{spec}: no such file")


def test_a_home_path_is_expanded(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", "x")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("~/a.txt").documents == ("x",)


@pytest.mark.parametrize("spec", ["", ":train", "a:b:c:d:e"])
def test_a_malformed_spec_is_refused(spec):
    refused(spec)


def test_a_file_takes_no_data_set_parts(tmp_path):
    refused(write(tmp_path / "a.txt", "x") + ":train", "takes no ':' parts")


def test_a_missing_datasets_package_is_an_error_that_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("owner/name", "pip install datasets")


def test_files_need_no_datasets_package(tmp_path, monkeypatch):
    real = builtins.__import__

    def guarded(name, *args, **kwargs):
        assert name != "datasets"
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guarded)
    assert read(write(tmp_path / "a.txt", "x")).documents == ("x",)


def test_an_unknown_name_is_one_line_that_names_it(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fail(*args, **kwargs):
        raise ConnectionError("no\nroute")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    refused("owner/name", "owner/name: neither an existing path", "no route")


def test_the_parts_of_a_data_set_spec_reach_the_loader(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load(name, config, *, split, streaming):
        calls.append((name, config, split, streaming))
        return iter([{"text": "a", "body": "b"}])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("o/n").documents == ("a",)
    assert read("o/n:c").documents == ("a",)
    assert read("o/n::validation:body").documents == ("b",)
    assert calls == [
        ("o/n", None, "train", True),
        ("o/n", "c", "train", True),
        ("o/n", None, "validation", True),
    ]
    refused("o/n:::nope", "record 1", "'nope' is missing (found text, body)")


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", '{"text": "ab"}\n{"text": " "}\n{"text": "c"}\n')
    return folder


def test_a_local_data_folder_is_read_with_the_datasets_package(data_folder):
    corpus = read(str(data_folder))
    assert (corpus.kind, corpus.documents, corpus.complete) == ("dataset", ("ab", "c"), True)
    assert corpus.sha256 == hashlib.sha256(b"ab\0c\0").hexdigest()
    refused(f"{data_folder}::nope", "nope")


def test_parquet_and_saved_folders_are_read_too(tmp_path, data_folder):
    import datasets

    made = datasets.Dataset.from_dict({"text": ["x", "y"], "other": ["z", "z"]})
    (tmp_path / "pq").mkdir()
    made.to_parquet(tmp_path / "pq" / "train.parquet")
    made.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"test": made}).save_to_disk(tmp_path / "both")
    assert read(str(tmp_path / "pq")).documents == ("x", "y")
    assert read(str(tmp_path / "saved")).documents == ("x", "y")
    assert read(f"{tmp_path}/both::test:other").documents == ("z", "z")
    refused(str(tmp_path / "both"), "no split 'train', available: test")


def test_a_large_data_set_is_read_only_as_far_as_needed(data_folder):
    corpus = read(str(data_folder), max_characters=1)
    assert corpus.documents == ("ab",)
    assert not corpus.complete


MODELS = {
    "config": ("config.json", '{"model_type": "llama"}', "config.json has model_type 'llama'"),
    "weights": ("model-00001-of-00002.safetensors", "", "it has model-00001-of-00002.safetensors"),
    "adapter": ("adapter_model.safetensors", "", "it has adapter_model.safetensors"),
}


@pytest.mark.parametrize("case", MODELS)
def test_the_folder_of_a_model_is_no_data_set(data_folder, monkeypatch, case):
    """Its JSON would be read as records."""
    name, text, why = MODELS[case]
    write(data_folder / name, text)
    # nor does it take the package to say so
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(str(data_folder), f"the folder of a model ({why}), and no data set; give a .txt,")
    refused(f"{data_folder}::train", f"({why})")


def test_a_data_set_may_have_a_config_and_tokens_of_its_own(data_folder):
    write(data_folder / "config.json", '{"made_by": "us"}')
    write(data_folder / "tokens.safetensors", "")
    assert read(str(data_folder)).documents == ("ab", "c")


def test_a_folder_without_data_is_refused(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "empty").mkdir()
    refused(str(tmp_path / "empty"), "cannot be read as a data set")


def test_a_corpus_has_text_or_tokens():
    with pytest.raises(InputError, match="no text"):
        Corpus("x", "text", "0")
    with pytest.raises(InputError, match="no text"):
        Corpus("x", "text", "0", ("a",), TokenIds(torch.tensor([1])))


def test_a_mask_needs_windows():
    with pytest.raises(InputError, match="2-D windows"):
        TokenIds(torch.tensor([1]), torch.tensor([True]))


def test_the_list_of_readable_files_is_in_the_docstring():
    for suffix in sources.READABLE:
        assert suffix in read.__doc__
