"""What is printed where: terminals, logs, `--quiet` and `--verbose`."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest

from liar_ext.cli import env, main, output
from liar_ext.cli.output import Verbosity, Watcher
from liar_ext.report.text import time_left

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


@pytest.fixture
def prune(inputs, tmp_path):
    out = ["--out", str(tmp_path / "small"), "--calibration", str(inputs.text)]
    return ["prune", str(inputs.llama), *out, "--samples", "32", "--seq-len", "32"]


def _run(arguments, **environment):
    """Both streams of a real process that has no terminal."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "liar_ext", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done


def _on_a_terminal(arguments, code=None, **environment) -> str:
    """What a terminal of 100 columns is sent, by `liar` or by a program."""
    reader, writer = pty.openpty()
    env = {**os.environ, "COLUMNS": "100", "TERM": "xterm-256color", **environment}
    program = ["-m", "liar_ext", *arguments] if code is None else ["-c", code]
    process = subprocess.Popen(
        [sys.executable, "-P", *program],
        stdin=subprocess.DEVNULL,
        stdout=writer,
        stderr=writer,
        env=env,
    )
    os.close(writer)
    found = b""
    while True:
        try:
            part = os.read(reader, 4096)
        except OSError:
            break
        if not part:
            break
        found += part
    assert process.wait(120) == 0, found
    return found.decode()


def test_a_log_has_lines_without_control_characters_frames_or_cut_words(prune):
    done = _run(prune)
    for text in (done.stdout, done.stderr):
        assert not CONTROL.search(text)
        assert not re.search("[─-╿]", text), "frames"
        assert not any(line != line.rstrip() for line in text.splitlines())
    # the whole path, on one line
    assert f"{prune[1]}: loads with transformers" in done.stdout.splitlines()
    assert re.search(r"^  parameters +\S+ +\S+ +0\.\d+$", done.stdout, re.M)
    assert "layer   1 ffn" in done.stderr


def test_quiet_says_the_result_and_nothing_else(prune, capsys):
    assert main([*prune, "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "written: " in captured.out


def test_quiet_still_says_errors(prune, capsys):
    assert main([*prune, "--quiet", "--sparsity", "2"]) == 2
    assert capsys.readouterr().err.startswith("error: --sparsity 2")


def test_quiet_says_no_warnings(inputs, tmp_path, capsys):
    evaluate = ["eval", str(tmp_path / "small"), "--text", str(inputs.text), "--seq-len", "32"]
    prune = ["prune", str(inputs.llama), "--out", str(tmp_path / "small"), "--samples", "32"]
    assert main([*prune, "--seq-len", "32", "--calibration", str(inputs.text)]) == 0
    capsys.readouterr()
    assert main(evaluate) == 0
    assert "warning: " in capsys.readouterr().err
    assert main([*evaluate, "-q"]) == 0
    assert capsys.readouterr().err == ""


def test_verbose_says_what_is_decided_and_every_number_of_a_site(prune, capsys):
    assert main([*prune, "--verbose", "--preset", "fast"]) == 0
    error = capsys.readouterr().err
    assert "recipe: " in error and "seq_len 32" in error
    assert re.search(r"48 -> \d+ columns; ridge [\d.e-]+; condition ", error)
    assert re.search(r"gram \d\.\d\d s", error)
    assert re.search(r"^took \d+\.\d\d s$", error, re.M)


def test_verbose_does_not_mute_libraries(monkeypatch, capsys):
    for option, said in (("--verbose", None), ("--quiet", "error")):
        monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
        assert main(["env", "--json", option]) == 0
        assert os.environ.get("TRANSFORMERS_VERBOSITY") == said


def test_a_terminal_gets_a_bar_with_the_time_left_and_a_rule(prune):
    text = _on_a_terminal(prune)
    assert "\x1b[" in text and "──" in text
    assert re.search(r"pruning.*\d/2", text)


# what a command shows, without the seconds that torch takes to import
SHOW = """
from rich.table import Table
from liar_ext.cli.output import Watcher, print_table
with Watcher() as watcher:
    watcher.begin(2, "pruning")
    watcher.layer(0)
    watcher.warn("look out")
table = Table("name", "value", title="a title")
table.add_row("a", "1")
print_table(table)
"""


def test_no_color_has_no_colours():
    for no_color, coloured in (("", True), ("1", False)):
        text = _on_a_terminal([], code=SHOW, NO_COLOR=no_color)
        assert "warning: look out" in text and "──" in text
        found = [int(code) for codes in re.findall(r"\x1b\[([\d;]+)m", text)
                 for code in codes.split(";")]  # fmt: skip
        # bold, dim and italics may be
        assert any(30 <= code <= 49 or code >= 90 for code in found) is coloured


def test_a_dumb_terminal_is_sent_plain_lines():
    text = _on_a_terminal([], code=SHOW, TERM="dumb").replace("\r\n", "\n")
    assert text == "warning: look out\na title\n  name   value\n --------------\n  a      1\n"


def test_without_a_terminal_long_runs_say_how_long_they_take(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Watcher() as watcher:
        watcher.begin(10, "pruning", done=4)
        for layer in range(4, 10):
            now[0] += 10.0
            watcher.layer(layer)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "pruning: goes on, 4 of 10 are done",
        # 15 s apart at least; the last one is no news
        "pruning: 6 of 10, 10 s each, about 40 s left",
        "pruning: 8 of 10, 10 s each, about 20 s left",
    ]


def test_a_width_that_is_asked_for_holds_for_files_too(monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    assert output.console().width == 70
    monkeypatch.delenv("COLUMNS")
    assert output.console().width == output.NO_WIDTH


def test_verbosity_of_a_command_without_the_options_is_normal():
    class Nothing:
        pass

    assert Verbosity.of(Nothing()) == Verbosity.NORMAL


def test_a_reader_that_has_enough_is_no_error():
    """As `liar env | head -1`: no traceback, not even at exit."""
    pytest.importorskip("argcomplete", reason="argcomplete is not installed")
    words = [sys.executable, "-P", "-m", "liar_ext", "completion", "bash"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


def test_the_time_left_is_what_the_rest_takes_at_the_same_rate():
    assert time_left(2, 10, 30.0) == ", about 2 min 0 s left"
    assert time_left(0, 10, 0.0) == time_left(10, 10, 30.0) == ""


def test_an_interrupt_while_something_is_finalised_comes_again(monkeypatch, capsys):
    class Finalised:
        def __del__(self):
            raise KeyboardInterrupt

    def run(arguments):
        Finalised()
        time.sleep(5)

    monkeypatch.setattr(env, "run", run)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    began = time.perf_counter()
    try:
        assert main(["env"]) == 2
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.perf_counter() - began < 4
    assert capsys.readouterr().err == "error: interrupted; nothing was written\n"
