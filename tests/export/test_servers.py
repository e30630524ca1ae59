"""Which engines load what: the config fields that they read, and what is said where they do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from liar_export import shrunk
from liar_families import FAMILIES, write_tokens

import liar_ext
from liar_ext import InputError, Recipe
from liar_ext.checkpoint.writer import write_json
from liar_ext.cli import main
from liar_ext.export.padded import export_padded
from liar_ext.export.servers import check, devices
from liar_ext.export.widths import Widths
from liar_ext.report.schema import EXPORTED, FILE

PER_LAYER = [{"heads": 1, "ffn": 20}, {"heads": 3, "ffn": 33}]
UNIFORM = [{"heads": 2, "ffn": 20}] * 2


def _engines(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["engine"]: row for row in check(folder)["engines"]}


def _small(name: str, folder: Path, widths: Any, biases: tuple[str, ...] = ()) -> Path:
    return shrunk(FAMILIES[name].build(), folder, widths, biases)


def _loads(folder: Path) -> str:
    """One letter for each: yes, no, unknown."""
    return "".join(row["loads"][0] for row in check(folder)["engines"])


# transformers, vLLM, SGLang, TensorRT-LLM, llama.cpp, ONNX Runtime
@pytest.mark.parametrize(
    ("name", "widths", "biases", "loads"),
    [
        ("llama-mha", UNIFORM, (), "yyyuyy"),  # heads · head_dim is not the hidden size
        ("llama-mha", [{"heads": 4, "ffn": 20}] * 2, (), "yyyyyy"),
        ("llama-gqa-biases", UNIFORM, (), "yynuyy"),
        ("mistral-gqa", UNIFORM, (), "yyyuyy"),
        ("qwen2", UNIFORM, (), "ynuuyy"),
        ("qwen2", [{"heads": 4, "ffn": 20}] * 2, (), "yyuuyy"),
        ("qwen3", UNIFORM, (), "yyuuyy"),
        ("llama-mha", PER_LAYER, (), "nnnnyy"),
        ("mistral-gqa", PER_LAYER, ("ffn",), "nnnnyy"),
        ("mistral-sliding", PER_LAYER, (), "nnnnny"),
        ("qwen3", PER_LAYER, (), "nnnnny"),
        ("gpt2", PER_LAYER, (), "nnnnny"),
        ("bert", PER_LAYER, (), "nnnnny"),
        ("opt", [{"heads": 4, "ffn": 20}] * 2, (), "yuuuuy"),
    ],
)
def test_every_engine_has_a_verdict(
    name: str, widths: Any, biases: tuple[str, ...], loads: str, tmp_path: Path
):
    small = _small(name, tmp_path / "small", widths, biases)
    assert _loads(small) == loads
    for engine, row in _engines(small).items():
        assert row["reason"], engine
        assert row["source"] or row["loads"] == "unknown", engine
        assert bool(row["instead"]) == (row["loads"] == "no"), engine


def test_the_way_out_is_one(tmp_path: Path):
    small = _small("qwen2", tmp_path / "small", PER_LAYER)
    assert _engines(small)["vLLM"]["instead"] == "liar export --format padded --to dense"
    export_padded(small, tmp_path / "dense", Widths(to="dense"))
    assert _engines(tmp_path / "dense")["vLLM"]["loads"] == "yes"
    small = _small("llama-tied", tmp_path / "tied", PER_LAYER)
    way = "liar export --format padded, or --format deci (experimental)"
    assert _engines(small)["SGLang"]["instead"] == way
    export_padded(small, tmp_path / "padded")
    assert _engines(tmp_path / "padded")["SGLang"]["loads"] == "yes"


def test_biases_without_a_flag_are_named(tmp_path: Path):
    small = _small("mistral-gqa", tmp_path / "small", UNIFORM, ("heads", "ffn"))
    row = _engines(small)["vLLM"]
    assert "no flag for the biases of its heads and ffn" in row["reason"]
    assert "--bias never" in row["instead"]


def test_biases_that_an_engine_would_leave_out_are_a_no(tmp_path: Path):
    small = _small("llama-tied", tmp_path / "small", UNIFORM, ("heads", "ffn"))
    assert "without a word" in _engines(small)["SGLang"]["reason"]
    assert _engines(small)["vLLM"]["loads"] == "yes"


@pytest.mark.parametrize(
    ("heads", "groups", "ffn", "expected"),
    [
        (8, 4, 64, (1, 2, 4, 8)),  # 8: each KV head on two devices
        (8, 8, 36, (1, 2, 4)),
        (6, 3, 33, (1, 3)),
        (7, 7, 64, (1, 7)[:1]),
        (16, 1, 1024, (1, 2, 4, 8, 16)),
        (12, 4, 48, (1, 2, 4, 12)),  # 6 is no multiple of 4, nor 4 of 6
    ],
)
def test_numbers_of_devices(heads: int, groups: int, ffn: int, expected: tuple[int, ...]):
    config = transformers.LlamaConfig(
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=ffn,
        hidden_size=16 * heads,
    )
    assert devices(config) == expected


def _fields(name: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """`config.json` of a uniformly pruned model, by the command's own way."""
    FAMILIES[name].build().save_pretrained(folder / "dense")
    recipe = Recipe(
        calibration=str(write_tokens(folder / "tokens.npy")),
        sparsity=0.5,
        samples=24,
        seq_len=24,
        batch_size=8,
        ridge=1e-4,
        target=("ffn", "heads"),
        **changes,
    )
    liar_ext.compress(folder / "dense", folder / "small", recipe)
    return json.loads((folder / "small" / "config.json").read_text())


def test_uniform_outputs_state_every_field_that_servers_read(tmp_path: Path):
    """The fields that vLLM's llama.py reads of a config, where a default would be of the dense
    widths."""
    found = _fields("llama-tied", tmp_path, bias="always")
    assert found["architectures"] == ["LlamaForCausalLM"]
    assert (
        found["num_attention_heads"] * 2
        == FAMILIES["llama-tied"].build().config.num_attention_heads
    )
    assert found["head_dim"] == 8
    assert found["num_key_value_heads"] == 2
    assert found["intermediate_size"] == 24
    assert found["attention_bias"] is True
    assert found["mlp_bias"] is True
    assert found["tie_word_embeddings"] is True
    assert {"hidden_size", "num_hidden_layers", "vocab_size", "rms_norm_eps"} <= set(found)
    assert found["hidden_act"] == "silu"


def test_the_command(tmp_path: Path, capsys: Any):
    small = _small("llama-mha", tmp_path / "small", PER_LAYER)
    assert main(["export", str(small), "--check"]) == 0
    said = capsys.readouterr().out
    for engine in ("transformers", "vLLM", "SGLang", "TensorRT-LLM", "llama.cpp", "ONNX Runtime"):
        assert engine in said
    assert main(["export", str(small), "--check", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["loads"] for row in found["engines"]] == ["no"] * 4 + ["yes"] * 2
    assert main(["export", str(small), "--check", "--out", str(tmp_path / "o")]) == 2
    assert "--check: writes nothing" in capsys.readouterr().err
    with pytest.raises(InputError, match="no such folder"):
        check(tmp_path / "none")


@pytest.mark.parametrize("command", [["--check"], ["--out", "OUT", "--format", "padded"]])
@pytest.mark.parametrize("form", ["deci", "gguf", "onnx"])
def test_what_was_written_for_an_engine_is_named_and_its_source_too(
    form: str, command: list[str], tmp_path: Path, capsys: Any
):
    # no loader says that of them: some have no weights that it reads, some a config it does not
    report = {"kind": EXPORTED, "format": form, "source": "small"}
    report["export"] = {"loads_with": "that engine"}
    write_json(tmp_path / FILE, report)
    out = str(tmp_path / "out")
    assert (
        main(["export", str(tmp_path), *(out if word == "OUT" else word for word in command)]) == 2
    )
    said = capsys.readouterr().err
    assert f"was written by `liar export --format {form}`, for that engine; give" in said
    assert "give the folder that it was made from (small)" in said


def test_a_padded_folder_is_a_checkpoint_and_is_checked(tmp_path: Path):
    export_padded(_small("llama-mha", tmp_path / "small", PER_LAYER), tmp_path / "wide")
    assert _loads(tmp_path / "wide")[0] == "y"


def test_a_misspelt_format_is_answered_with_the_nearest(tmp_path: Path, capsys: Any):
    assert main(["export", "small", "--out", str(tmp_path / "out"), "--format", "ggfu"]) == 2
    assert "--format ggfu: choose from padded, onnx, gguf, deci; did you mean gguf?" in (
        capsys.readouterr().err
    )
