"""Completion as shells ask for it, by the shells themselves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("argcomplete", reason="argcomplete is not installed")

BASH = """
eval "$(liar completion bash)"
ask() {
  COMP_LINE="$1"; COMP_POINT=${#1}; COMP_TYPE=9
  read -ra COMP_WORDS <<< "$1"
  [[ "$1" == *" " ]] && COMP_WORDS+=("")
  COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
  # whatever function `complete` was told of
  function=$(complete -p liar | sed 's/.*-F \\([^ ]*\\).*/\\1/')
  "$function" liar "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
  echo "${COMPREPLY[@]}"
}
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A PATH with this `liar` on it."""
    folder = tmp_path_factory.mktemp("bin")
    script = folder / "liar"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m liar_ext "$@"\n')
    script.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def _shell(program, script, path, cwd):
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    done = subprocess.run(
        [program, "-c", script] if program != "bash" else ["bash", "--norc", "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PATH": path, "HOME": str(cwd)},
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bash_completes_commands_options_names_and_files(path, tmp_path):
    (tmp_path / "wiki.txt").write_text("text")
    lines = {
        "liar pr": {"prune"},
        "liar prune --crit": {"--criterion"},
        "liar prune --criterion flap": {"flap", "flap-ifv", "flap-wifn"},
        # the value of a list, behind what is there already
        "liar prune --target ffn,h": {"ffn,heads"},
        "liar prune --calibration wi": {"wiki.txt"},
        "liar completion ": {"bash", "zsh", "fish"},
        # names that are no recipe's
        "liar export small --format g": {"gguf"},
        "liar compare llama --criteria wanda,ob": {"wanda,obs", "wanda,obs-swap"},
        "liar bench serve llama --mode c": {"compile"},
        "liar eval --st": {"--stsb", "--stability"},
    }
    asked = "\n".join(f'ask "{line}"' for line in lines)
    answers = _shell("bash", BASH + asked, path, tmp_path).splitlines()
    assert len(answers) == len(lines)
    for answer, (line, wanted) in zip(answers, lines.items(), strict=True):
        found = set(answer.split())
        assert found >= wanted, line
        if not line.endswith(" "):
            # whatever else there is begins with what was typed
            assert all(word.startswith(line.split()[-1]) for word in found), line


def test_fish_completes_commands_and_names(path, tmp_path):
    script = "liar completion fish | source; complete -C 'liar pr'; complete -C "
    found = _shell("fish", f"{script}'liar prune --criterion fla'", path, tmp_path)
    words = {line.split("\t")[0] for line in found.splitlines()}
    assert {"prune", "flap", "flap-ifv"} <= words


def test_zsh_takes_the_script_and_asks_liar(path, tmp_path):
    script = (
        "autoload -Uz compinit && compinit -u -d dump\n"
        'eval "$(liar completion zsh)"\n'
        "print -r -- ${_comps[liar]}\n"
    )
    assert "argcomplete" in _shell("zsh", script, path, tmp_path)


def test_completion_imports_no_torch(tmp_path):
    code = (
        "import sys, os\n"
        "from liar_ext.cli import main\n"
        "import argcomplete\n"
        "real = os._exit\n"
        "os._exit = lambda code: real(int('torch' in sys.modules))\n"
        "main([])\n"
    )
    with open(tmp_path / "out", "w") as out:
        line = "liar prune --criterion fl"
        env = {**os.environ, "_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
        env |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "words")}
        done = subprocess.run([sys.executable, "-P", "-c", code], env=env, stdout=out, timeout=60)
    assert done.returncode == 0
    assert "flap-ifv" in (tmp_path / "words").read_text()
