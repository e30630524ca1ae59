"""Texts of the field's data sets: their formats, what they are joined to, and what is refused."""

import gzip
import json
import random

import pytest
import torch

from liar_ext.errors import InputError
from liar_ext.evaluation.texts import read_text, tokens_of

# as the files are: a blank line is " \n", headings and lines have a space on both sides
WIKITEXT = " \n = Title = \n \n The first line . \n The <unk> one . \n \n"
PTB = " no it was n't black monday \n but while the <unk> N points \n"


def documents(count, seed=0):
    generator = random.Random(seed)
    words = [f"w{i}" for i in range(60)]
    return [" ".join(generator.choices(words, k=generator.randint(3, 40))) for _ in range(count)]


def write_c4(path, texts):
    raw = "".join(
        json.dumps({"text": text, "timestamp": "2019-04-25", "url": "http://x"}) + "\n"
        for text in texts
    ).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return str(path)


def joined(text):
    return text.protocol.join.join(text.documents)


def test_a_plain_file_is_its_text(tmp_path):
    (tmp_path / "a.txt").write_text(WIKITEXT)
    text = read_text(str(tmp_path / "a.txt"))
    assert (joined(text), text.protocol.name) == (WIKITEXT, "plain")


@pytest.mark.parametrize("suffix", ["raw", "tokens", "txt"])
def test_wikitext_is_joined_as_the_hubs_rows_are(tmp_path, suffix):
    """The hub has a row a line: with its end, and "" where the line is blank."""
    (tmp_path / f"wiki.test.{suffix}").write_text(WIKITEXT)
    rows = [line + "\n" if line.strip() else "" for line in WIKITEXT.split("\n")[:-1]]
    text = read_text(f"wikitext2={tmp_path}/wiki.test.{suffix}")
    assert joined(text) == "\n\n".join(rows)
    assert "\n\n = Title = \n\n\n\n\n The first line . \n" in joined(text)


def test_a_parquet_of_the_hub_gives_the_same(tmp_path):
    pandas = pytest.importorskip("pandas")
    (tmp_path / "wiki.txt").write_text(WIKITEXT)
    rows = [line + "\n" if line.strip() else "" for line in WIKITEXT.split("\n")[:-1]]
    pandas.DataFrame({"text": rows}).to_parquet(tmp_path / "test.parquet")
    one, other = (read_text(f"wikitext2={tmp_path}/{n}") for n in ("wiki.txt", "test.parquet"))
    assert joined(one) == joined(other)


def test_a_data_set_gives_the_same_as_its_file(tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "wiki.txt").write_text(WIKITEXT)
    rows = [line + "\n" if line.strip() else "" for line in WIKITEXT.split("\n")[:-1]]
    split = datasets.Dataset.from_dict({"text": rows})
    datasets.DatasetDict({"test": split}).save_to_disk(tmp_path / "wikitext")
    one, other = (read_text(f"wikitext2={tmp_path}/{n}") for n in ("wiki.txt", "wikitext"))
    assert joined(one) == joined(other)
    with pytest.raises(InputError, match="no split 'validation'"):
        read_text(f"wikitext2={tmp_path}/wikitext::validation")


@pytest.mark.parametrize(("name", "join"), [("ptb", " "), ("ptb-lines", "\n\n")])
def test_penn_treebank_lines_are_stripped_and_joined(tmp_path, name, join):
    (tmp_path / "ptb.test.txt").write_text(PTB)
    want = join.join(["no it was n't black monday", "but while the <unk> N points"])
    assert joined(read_text(f"{name}={tmp_path}/ptb.test.txt")) == want


def test_a_protocol_whose_data_set_is_a_script_needs_a_file():
    for name in ("ptb", "ptb-lines"):
        with pytest.raises(InputError, match=f"{name}: names no source; give {name}=FILE"):
            read_text(name)


@pytest.mark.parametrize("name", ["c4.json.gz", "c4.json", "c4.jsonl"])
def test_c4_is_its_first_1100_documents_and_256_windows(tmp_path, tokenizer, name):
    texts = documents(1200)
    text = read_text(f"c4={write_c4(tmp_path / name, texts)}")
    assert joined(text) == " ".join(texts[:1100])
    ids = tokens_of(text, tokenizer, 16)
    # [CLS] w... [SEP], as the whole text is tokenised at once
    want = tokenizer(" ".join(texts[:1100]))["input_ids"][: 256 * 16]
    assert ids.tolist() == want
    facts = text.describe(ids, tokenizer)
    assert facts["documents"] == 1100
    assert facts["special_tokens"] == {"of": "the whole text", "in_front": [2], "behind": [3]}


def test_c4_sampled_draws_as_gptq_does(tmp_path, tokenizer):
    texts = documents(50)
    text = read_text(f"c4-sampled={write_c4(tmp_path / 'c4.json.gz', texts)}")
    random.seed(0)
    want = []
    for _ in range(256):
        while True:
            ids = tokenizer(texts[random.randint(0, len(texts) - 1)])["input_ids"]
            if len(ids) > 24:
                break
        start = random.randint(0, len(ids) - 24 - 1)
        want += ids[start : start + 24]
    before = random.getstate()
    assert tokens_of(text, tokenizer, 24).tolist() == want
    assert random.getstate() == before, "the process's own random numbers are left alone"
    with pytest.raises(InputError, match="no document with more than 500 tokens"):
        tokens_of(text, tokenizer, 500)


def test_what_stands_around_a_text_is_described(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("w1 w2 w3")
    text = read_text(str(tmp_path / "a.txt"))
    ids = tokens_of(text, tokenizer, 2)
    assert torch.equal(ids, torch.tensor([2, 5, 6, 7, 3]))
    assert text.describe(ids, tokenizer)["stream_tokens"] == 5


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("nowhere.txt", "nowhere.txt: no such file; give FILE, or PROTOCOL=FILE with plain, wiki"),
        ("wikitext3={tmp}/wiki.txt", "no such file; give FILE, or PROTOCOL=FILE"),
        ("wikitext2={tmp}/nowhere.txt", "nowhere.txt: no such file or folder"),
        ("wikitext2=", "wikitext2=: names no source"),
        ("c4-sampled", "names no source"),
        ("{tmp}/empty.txt", "the file is empty"),
        ("{tmp}/blank.txt", "no text found"),
        ("{tmp}/latin.txt", "line 1: byte 0xe9 is not valid UTF-8"),
        ("c4={tmp}/cut.json.gz", "cut.json.gz: not a whole gzip file"),
        ("c4={tmp}/notgzip.json.gz", "not a whole gzip file"),
        ("c4={tmp}/cut.json", "cut.json: line 4: not valid JSON"),
        ("c4={tmp}/wiki.txt", "wiki.txt: c4 reads .json, .jsonl, .json.gz or .parquet"),
        ("c4={tmp}/other.json", "record 1: no text field 'text' (found body)"),
    ],
)
def test_what_is_no_text_is_one_line(tmp_path, spec, says):
    (tmp_path / "wiki.txt").write_text(WIKITEXT)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    whole = gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in documents(900)).encode())
    (tmp_path / "cut.json.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "notgzip.json.gz").write_bytes(b"text")
    lines = (json.dumps({"text": t}) + "\n" for t in documents(4))
    (tmp_path / "cut.json").write_text("".join(lines)[:-9])
    (tmp_path / "other.json").write_text('{"body": "x"}\n')
    with pytest.raises(InputError) as caught:
        read_text(spec.format(tmp=tmp_path))
    assert says in str(caught.value)
