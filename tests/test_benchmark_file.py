"""Files of benchmarks that options take: what is none ends in a line that says how to make one."""

from __future__ import annotations

import hashlib
import json

import pytest

from liar_ext import InputError
from liar_ext.alignment import wanted
from liar_ext.benchmark_file import read_benchmark
from liar_ext.latency import LatencyTable

ALIGN = "; make one with: liar bench align --out FILE"
LATENCY = "; make one with: liar bench latency SRC --out FILE"
READERS = {
    "align": (lambda path: wanted(path, "cpu"), "--round-to", "result of liar bench align", ALIGN),
    "latency": (LatencyTable.read, "--latency", "table of latencies", LATENCY),
}
FILES = {
    "damaged": (b"{", "cannot be read as JSON ("),
    "no text": (b"\xff\xfe\xfa", "cannot be read as JSON ("),
    "a list": (b"[1]", "is no {what}"),
    "of another benchmark": (b'{"benchmark": "gram", "version": 1}', "is no {what}"),
    "of another release": (b'{"benchmark": "{name}", "version": 9}', "version 9; this release"),
    "without a version": (b'{"benchmark": "{name}"}', "version None; this release"),
    "missing": (None, "no such file"),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("case", FILES)
def test_every_option_refuses_them_alike(tmp_path, name, case):
    reader, option, what, how = READERS[name]
    content, says = FILES[case]
    path = tmp_path / "file.json"
    if content is not None:
        path.write_bytes(content.replace(b"{name}", name.encode()))
    with pytest.raises(InputError) as found:
        reader(str(path))
    message = str(found.value)
    assert message.startswith(f"{option} {path}: ")
    assert says.replace("{what}", what) in message
    assert message.endswith(how)
    assert "\n" not in message


def test_what_is_one_comes_with_its_bytes(tmp_path, monkeypatch):
    data = {"benchmark": "x", "version": 2, "more": "ä"}
    (tmp_path / "f.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    monkeypatch.setenv("HOME", str(tmp_path))
    words = {"benchmark": "x", "version": 2, "what": "x", "how": "make one"}
    found, content = read_benchmark("~/f.json", "--x", **words)
    assert found == data
    expected = hashlib.sha256((tmp_path / "f.json").read_bytes()).hexdigest()
    assert hashlib.sha256(content).hexdigest() == expected
