"""Help that can be followed, and errors that say what may have been meant."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest

from liar_ext import allocation, criteria, depth, presets, recipe, reconstruction
from liar_ext.bench import BENCHMARKS
from liar_ext.cli import GROUPS, build_parser, main
from liar_ext.cli.examples import EXAMPLES, FIRST_STEPS
from liar_ext.cli.options import NAMES
from liar_ext.engine.shelf import PLACES

PARSER = build_parser([])
COMMANDS = [name for group in PARSER.groups.values() for name, _ in group]
LINES = [line for lines in (FIRST_STEPS, *EXAMPLES.values()) for line, _ in lines]


def _error(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def _help(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_every_command_is_in_a_group_and_its_line_in_the_help(capsys):
    text = _help([], capsys)
    assert len(COMMANDS) == sum(map(len, GROUPS.values())) == len(set(COMMANDS))
    for title, commands in PARSER.groups.items():
        assert f"\n{title}:\n" in text
        for name, line in commands:
            assert re.search(rf"^  {name} +{re.escape(line[:20])}", text, re.M)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_at_the_end_of_its_help(name, capsys):
    text = _help([name], capsys)
    _, _, examples = text.partition("\nexamples:\n")
    assert all(line in examples for line, _ in EXAMPLES[name])
    assert f"liar {name}" in examples


@pytest.mark.parametrize("line", LINES)
def test_every_example_can_be_typed(line):
    inner = re.search(r"\$\((.*)\)", line)
    words = shlex.split((inner[1] if inner else line).partition(" | ")[0].partition(" > ")[0])
    assert words[0] == "liar"
    found = build_parser(words).parse_args(words[1:])
    assert callable(found.run)


def test_help_of_commands_is_wrapped_at_the_width_of_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    # an example is a line to copy, and is never broken
    lines = _help([], capsys).partition("\nexamples:")[0].splitlines()
    assert max(map(len, lines)) <= 60


def test_help_imports_no_torch():
    code = "import sys; from liar_ext.cli import main\ntry: main(['prune', '--help'])\n"
    code += "except SystemExit: pass\nsys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, timeout=60)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["prnue"], "did you mean prune?"),
        (["bench", "grma"], "did you mean gram?"),
        (["prune", "m", "--out", "o", "--sparsty", "0.3"], "did you mean --sparsity?"),
        (["prune", "m", "--out", "o", "--criterio=wanda", "--sed=1"], "did you mean --seed?"),
        (["completion", "bsh"], "did you mean bash?"),
    ],
)
def test_what_may_have_been_meant_is_said(arguments, meant, capsys):
    assert meant in _error(arguments, capsys)


def test_the_help_that_an_error_names_is_that_of_the_command(capsys):
    error = _error(["prune", "m", "--out", "o", "--sparsty", "0.3"], capsys)
    assert error.endswith("(see liar prune --help)")


@pytest.mark.parametrize(
    ("option", "value", "meant"),
    [
        ("--criterion", "wnada", "wanda"),
        ("--allocation", "unifrom", "uniform"),
        ("--reconstruct", "Liar", "liar"),
        ("--target", "fnn", "ffn"),
        ("--depth", "short-gpt", "shortgpt"),
        ("--dtype", "bfloat", "bfloat16"),
        ("--preset", "bets", "best"),
        ("--hidden-states", "dsk", "disk"),
    ],
)
def test_a_misspelt_value_is_answered_with_the_nearest_name(
    inputs, tmp_path, capsys, option, value, meant
):
    place = ["prune", str(inputs.llama), "--out", str(tmp_path / "o"), "--drop", "1"]
    drop = place if option == "--depth" else place[:-2]
    assert main([*drop, "--calibration", str(inputs.text), option, value]) == 2
    assert f"did you mean {meant}?" in capsys.readouterr().err


def test_what_is_like_no_name_is_not_guessed(capsys):
    assert "did you mean" not in _error(["xyzzy"], capsys)


def test_the_names_in_help_and_completion_are_those_of_the_registries():
    """Written down again, because registries import torch."""
    assert set(NAMES["criterion"]) == set(criteria.CRITERIA)
    assert set(NAMES["allocation"]) == set(allocation.ALLOCATIONS)
    assert set(NAMES["reconstruct"]) == set(reconstruction.RECONSTRUCTIONS)
    assert set(NAMES["depth"]) == set(depth.methods.METHODS)
    assert set(NAMES["preset"]) == set(presets.PRESETS)
    assert set(NAMES["hidden_states"]) == {"auto", *PLACES}
    assert NAMES["target"] == recipe.KINDS
    for name, choices in recipe.CHOICES.items():
        assert set(NAMES[name]) == set(choices), name


@pytest.mark.parametrize(
    "words",
    [[name] for name in COMMANDS if name != "bench"] + [["bench", name] for name in BENCHMARKS],
    ids=" ".join,
)
def test_every_command_can_be_quiet_or_verbose_and_not_both(words, capsys):
    text = _help(words, capsys)
    assert "-q, --quiet" in text and "-v, --verbose" in text
