"""Bad input: one line beginning `error:`, exit code 2, nothing written, nothing lost."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from liar_ext.cli import main

SIZES = ["--samples", "32", "--seq-len", "32"]


def _tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail; its one line of error."""
    try:
        code = main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert code == 2, error
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]


@pytest.fixture
def source(inputs, tmp_path) -> Path:
    """A copy of the tiny LLaMA, to break."""
    return Path(shutil.copytree(inputs.llama, tmp_path / "source"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--sparsity", "0"], "--sparsity 0.0: must be"),
        (["--sparsity", "1"], "--sparsity 1.0: must be"),
        (["--sparsity", "-0.3"], "--sparsity -0.3: must be"),
        (["--sparsity", "nan"], "--sparsity nan: must be"),
        (["--sparsity", "much"], "--sparsity"),
        (["--criterion", "obsv"], "wanda, flap, flap-ifv, flap-wifn, rcpu"),
        (["--allocation", "x"], "uniform, global"),
        (["--reconstruct", "x"], "none, bias, mask-tuning, rotation, rotation-scaled, admm, liar"),
        (["--target", "ffn,embeddings"], "ffn, heads"),
        (["--target", ""], "ffn, heads"),
        (["--bias", "maybe"], "auto, always, never"),
        (["--statistics", "x"], "sequential, oneshot"),
        (["--dtype", "int8"], "bfloat16"),
        (["--ridge", "-1"], "--ridge -1.0"),
        (["--ridge", "inf"], "--ridge inf"),
        (["--samples", "0"], "--samples 0"),
        (["--round-to", "0"], "--round-to 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--layers", "1"], "START:STOP"),
        (["--layers", "1:9"], "the model has 2 layers"),
        (["--reconstruct", "bias", "--bias", "never"], "--bias is never"),
        (["--calibration", "missing.txt"], "missing.txt"),
        (["--recipe", "missing.json"], "missing.json"),
        (["--no-such-option"], "--no-such-option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_options_say_what_is_possible(inputs, tmp_path, capsys, options, says):
    arguments = ["prune", str(inputs.llama), "--out", str(tmp_path / "out"), *SIZES]
    if "--calibration" not in options:
        arguments += ["--calibration", str(inputs.text)]
    assert says in _run([*arguments, *options], capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_forced_gpu_that_is_not_there(inputs, tmp_path, capsys):
    arguments = ["prune", str(inputs.llama), "--out", str(tmp_path / "out"), "--device", "cuda"]
    assert "no CUDA device" in _run([*arguments, "--calibration", str(inputs.text)], capsys)


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _corrupt(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


def _remove(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _pickle(folder: Path) -> None:
    _remove(folder)
    torch.save({}, folder / "pytorch_model.bin")


def _bad_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _config(change: dict) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

    return edit


def _weight(value: float) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
        save_file(tensors, path, metadata={"format": "pt"})

    return edit


def _no_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_truncate, "truncated or corrupt"),
        (_corrupt, "truncated or corrupt"),
        (_remove, "neither model.safetensors nor"),
        (_pickle, "pickle"),
        (_bad_index, "model-00002-of-00002.safetensors: missing"),
        (_config({"intermediate_size": 40}), "config does not belong to these weights"),
        (_config({"num_hidden_layers": 3}), "not in the checkpoint"),
        (_config({"model_type": "mixtral"}), "supported: bert"),
        (_config({"model_type": "nonsense"}), "nonsense"),
        (_config({"quantization_config": {"quant_method": "gptq"}}), "quantised"),
        (_weight(float("nan")), "model.layers.1.mlp.up_proj.weight: has NaN"),
        (_weight(float("inf")), "model.layers.1.mlp.up_proj.weight: has NaN or infinite"),
        (_no_tokenizer, "; copy tokenizer.json and tokenizer_config.json there from"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: missing"),
    ],
    ids=[
        "truncated",
        "corrupt",
        "missing",
        "pickle",
        "index",
        "width",
        "layers",
        "moe",
        "unknown",
        "quantised",
        "nan",
        "inf",
        "tokenizer",
        "json",
        "config",
    ],
)
def test_damaged_checkpoints_are_refused_and_left_alone(
    inputs, source, tmp_path, capsys, damage, says
):
    damage(source)
    before = _tree(source)
    out = tmp_path / "out"
    arguments = ["prune", str(source), "--out", str(out), "--calibration", str(inputs.text), *SIZES]
    assert says in _run(arguments, capsys)
    assert _tree(source) == before
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_activations_that_overflow_name_the_layer(inputs, source, tmp_path, capsys):
    path = source / "model.safetensors"
    tensors = load_file(path)
    for name in ("gate_proj", "up_proj"):
        tensors[f"model.layers.1.mlp.{name}.weight"].fill_(1e30)
    save_file(tensors, path, metadata={"format": "pt"})
    arguments = ["prune", str(source), "--out", str(tmp_path / "out"), *SIZES]
    error = _run([*arguments, "--calibration", str(inputs.text)], capsys)
    assert "model.layers.1.mlp.down_proj" in error
    assert "NaN or infinite activations" in error
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("text", ["", "the a list"], ids=["empty", "short"])
def test_empty_or_short_calibration(inputs, tmp_path, capsys, text):
    file = tmp_path / "text.txt"
    file.write_text(text)
    arguments = ["prune", str(inputs.llama), "--out", str(tmp_path / "out"), *SIZES]
    assert "text.txt" in _run([*arguments, "--calibration", str(file)], capsys)
    assert not (tmp_path / "out").exists()


def test_too_few_tokens_for_the_width_says_how_many_are_needed(inputs, tmp_path, capsys):
    arguments = ["prune", str(inputs.llama), "--out", str(tmp_path / "out")]
    error = _run(
        [*arguments, "--calibration", str(inputs.text), "--samples", "1", "--seq-len", "32"], capsys
    )
    assert "32" in error
    assert "48" in error
    assert "--samples" in error


@pytest.mark.parametrize("where", ["inside", "same", "around", "file", "unwritable"])
def test_output_places_that_cannot_be(inputs, source, tmp_path, capsys, where):
    (tmp_path / "file").write_text("mine")
    out = {
        "inside": source / "out",
        "same": source,
        "around": tmp_path,
        "file": tmp_path / "file",
        "unwritable": Path("/proc/liar"),
    }[where]
    before = _tree(tmp_path)
    arguments = ["prune", str(source), "--out", str(out), "--overwrite", *SIZES]
    assert "--out" in _run([*arguments, "--calibration", str(inputs.text)], capsys)
    assert _tree(tmp_path) == before


def test_a_full_disk_leaves_no_trace(inputs, tmp_path, capsys, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    before = _tree(inputs.llama)
    arguments = ["prune", str(inputs.llama), "--out", str(tmp_path / "out"), *SIZES]
    error = _run([*arguments, "--calibration", str(inputs.text)], capsys)
    assert "No space left on device" in error
    assert list(tmp_path.iterdir()) == []
    assert _tree(inputs.llama) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_an_interrupt_in_the_middle_leaves_no_trace(inputs, tmp_path, number):
    # a real process; it stops itself at the second layer, where writing has begun
    script = (
        "import os, signal, sys\n"
        # a shell that starts tests in the background leaves SIGINT ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from liar_ext.checkpoint.store import CheckpointStore\n"
        "real = CheckpointStore.open\n"
        "def open_(self, index):\n"
        f"    if index == 1: os.kill(os.getpid(), {int(number)})\n"
        "    return real(self, index)\n"
        "CheckpointStore.open = open_\n"
        "from liar_ext.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    before = _tree(inputs.llama)
    arguments = ["prune", str(inputs.llama), "--out", str(tmp_path / "out"), *SIZES]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments, "--calibration", str(inputs.text)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ},
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == "error: interrupted; nothing was written"
    assert list(tmp_path.iterdir()) == []
    assert _tree(inputs.llama) == before


TOKENIZERS = {
    "damaged": ("tokenizer.json", "{"),
    "of something else": ("tokenizer.json", '{"a": 1}'),
    "a list": ("tokenizer_config.json", "[]"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_is_none_is_to_be_copied_again(inputs, source, capsys, case):
    name, text = TOKENIZERS[case]
    (source / name).write_text(text)
    error = _run(["eval", str(source), "--text", str(inputs.text)], capsys)
    assert error.startswith(f"error: {source}: no usable tokenizer (")
    assert "; copy tokenizer.json and tokenizer_config.json there from" in error


CONFIGS = {
    "missing": (None, "missing; ", "complete the download, or give the folder that has this file"),
    "broken": ("{", "cannot be read as JSON (", "; download it again, or mend it there"),
    "list": ("[1]", "must hold a JSON object, not list", "; download it again"),
    "other": ("{}", "no model_type, so this is not a transformers model", "; give a folder that"),
    "number": ('{"model_type": 3}', "model_type 3 is no name, so", "; give a folder that"),
}
READERS = {
    "prune": ["prune", "{source}", "--out", "{out}", "--calibration", "{text}"],
    "eval": ["eval", "{source}", "--text", "{text}"],
    "trace": ["trace", "{source}"],
    "grow": ["grow", "{source}", "--out", "{out}", "--layers", "3"],
    "serve": ["bench", "serve", "{source}"],
    "preset": ["plan", "{source}", "--preset", "best", "--calibration", "{text}"],
}


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_is_none_names_the_file_and_the_next_step(
    inputs, source, tmp_path, capsys, case, command
):
    text, what, step = CONFIGS[case]
    (source / "config.json").unlink()
    if text is not None:
        (source / "config.json").write_text(text)
    places = {"source": str(source), "out": str(tmp_path / "out"), "text": str(inputs.text)}
    error = _run([word.format(**places) for word in READERS[command]], capsys)
    assert error.startswith(f"error: {source / 'config.json'}: {what}")
    assert step in error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["eval", "{llama}", "--stsb", "{stsb}"], "evaluated with --text"),
        (["eval", "{bert}", "--text", "{text}"], "evaluated with --stsb"),
        (["eval", "{llama}", "--text", "nowhere.txt"], "nowhere.txt"),
        (["eval", "{llama}", "--text", "{text}", "--seq-len", "0"], "--seq-len 0"),
        (["eval", "nowhere/at/all", "--text", "{text}"], "nowhere/at/all"),
        (["eval", "{llama}"], "--text"),
        (["eval", "./nowhere", "--text", "{text}"], "or a hub id, OWNER/NAME"),
        (["report", "{llama}"], "liar_report.json"),
        (["report", "nowhere"], "nowhere"),
        (["plan", "{llama}", "--sparsity", "7"], "--sparsity 7.0"),
        (["bench", "gram", "--json", "nowhere/at/all.json"], "--json"),
        (["prune"], "SRC"),
        (["shrink"], "shrink"),
        ([], "COMMAND"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_other_commands_fail_the_same_way(inputs, capsys, arguments, says):
    places = {name: str(getattr(inputs, name)) for name in ("llama", "bert", "text", "stsb")}
    assert says in _run([argument.format(**places) for argument in arguments], capsys)


def test_importing_the_command_line_is_quick():
    # help and errors must not wait for torch and transformers
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import liar_ext.cli"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert " torch\n" not in done.stderr, "torch is imported"
