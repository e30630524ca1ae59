"""Examples in documents are run, and what they print is what the document says."""

from __future__ import annotations

import ast
import inspect
import re

import pytest
from liar_docs import ROOT, commands, differences, executed, fences, run

import liar_ext
from liar_ext import ops

API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
PUBLIC = [name for name in liar_ext.__all__ if name not in ("__version__", "ops")]


def test_docs_tutorial_does_what_it_says(tmp_path):
    names: dict[str, object] = {}
    printed: list[str] = []
    problems = []
    for language, body in fences(TUTORIAL):
        if language == "console":
            for command, wanted in commands(body):
                found = differences(run(command, tmp_path), wanted)
                problems += [f"{command}: {problem}" for problem in found]
        elif language == "python":
            printed = executed(body, tmp_path, names)
        elif language == "text":
            problems += differences(printed, body.splitlines())
    assert problems == []


def test_docs_api_examples_run(tmp_path):
    names: dict[str, object] = {}
    printed: list[str] = []
    ran = 0
    for language, body in fences(API):
        if language == "python":
            printed, ran = executed(body, tmp_path, names), ran + 1
        elif language == "text":
            assert differences(printed, body.splitlines()) == []
    assert ran >= len(PUBLIC) - 4, "errors share one example"


@pytest.mark.parametrize("name", PUBLIC)
def test_docs_api_has_every_public_name(name):
    assert re.search(rf"^### .*`{name}`", API, re.M)
    # and uses it in an example
    assert any(re.search(rf"\bliar_ext\.{name}\b", body) for _, body in fences(API))


@pytest.mark.parametrize("name", ops.__all__)
def test_docs_api_has_every_op(name):
    assert re.search(rf"^\| .*`{name}`", API, re.M)


def test_docs_api_names_nothing_that_is_not_public():
    named = re.findall(r"\bliar_ext\.(\w+)", API)
    assert set(named) <= {*liar_ext.__all__, "demo"}
    assert set(re.findall(r"\bliar_ext\.ops\.(\w+)", API)) <= set(ops.__all__)
    for heading in re.findall(r"^### (.*)$", API, re.M):
        assert set(re.findall(r"`(\w+)`", heading)) <= set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_docs_every_public_name_is_typed_and_has_a_docstring(name):
    public = getattr(liar_ext, name)
    assert inspect.getdoc(public)
    if inspect.isfunction(public):
        signature = inspect.signature(public)
        parameters = [p for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD]
        assert all(p.annotation is not p.empty for p in parameters)
        assert signature.return_annotation is not signature.empty


def test_docs_type_checkers_see_what_is_resolved_on_first_use():
    """`__getattr__` finds names; checkers read the imports under TYPE_CHECKING, and py.typed."""
    tree = ast.parse((ROOT / "src" / "liar_ext" / "__init__.py").read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name for n in guarded.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert seen == {*PUBLIC, "ops"}
    assert (ROOT / "src" / "liar_ext" / "py.typed").exists()


@pytest.mark.parametrize(
    ("printed", "wanted", "same"),
    [
        (["perplexity 66.1"], ["perplexity 66.0"], True),
        (["perplexity 66.1"], ["perplexity 50.0"], False),
        (["took 3.10 s"], ["took 9.99 s"], True),
        (["took 310 ms, 12%"], ["took 1.2 s, 14%"], True),
        (["accuracy 1"], ["perplexity 1"], False),
        (["a", "b", "c"], ["a", "…", "c"], True),
        (["a", "c"], ["a", "…", "c"], True),
        (["a", "b"], ["a", "…", "c"], False),
        (["a", "b"], ["a"], False),
        (["a"], ["a", "b"], False),
        (["a", "b"], ["…"], True),
        ([], [], True),
    ],
)
def test_docs_are_compared_as_they_say(printed, wanted, same):
    assert (differences(printed, wanted) == []) is same
