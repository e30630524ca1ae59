"""DeciLM's block configs: what servers read of them are the widths of the tensors beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from liar_export import shrunk
from liar_families import FAMILIES, probe_tokens, randomise, tree_hash
from safetensors.torch import load_file
from transformers import PreTrainedModel

import liar_ext
from liar_ext.checkpoint.writer import write_json
from liar_ext.cli import main
from liar_ext.export.deci import export_deci, ffn_mult, ffn_width
from liar_ext.export.widths import Widths
from liar_ext.models import layout

# as for padded folders: norms round to float32
TOLERANCE = 8 * 2**-24
WIDTHS = [{"heads": 1, "ffn": 100}, {"heads": 3, "ffn": 300}]


def _dense() -> PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=400,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=6,
        max_position_embeddings=64,
    )
    config.architectures = ["LlamaForCausalLM"]
    return randomise(transformers.LlamaForCausalLM(config))


def _as_a_server(folder: Path, beside: Path) -> PreTrainedModel:
    """The model that a server builds: widths by its own reading of `block_configs`."""
    data = json.loads((folder / "config.json").read_text())
    heads, layers = data["num_attention_heads"], []
    for block in data["block_configs"]:
        multiplier = block["ffn"]["ffn_mult"]
        width = int(2 * multiplier * data["hidden_size"] / 3)
        width = width if width % 256 == 0 else width + 256 - width % 256
        layers.append({"heads": heads // block["attention"]["n_heads_in_group"], "ffn": width})
    own = {name: data[name] for name in data if name not in ("auto_map", "block_configs")}
    own[layout.KEY] = {
        "version": layout.VERSION,
        "base_model_type": "llama",
        "layers": layers,
        "added_biases": [],
    }
    beside.mkdir()
    write_json(beside / "config.json", own | {"architectures": ["LlamaForCausalLM"]})
    (beside / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return liar_ext.load(beside)


@torch.no_grad()
def _same(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    wanted = expected.double()(probe_tokens()).logits
    assert float(wanted.std()) > 1e-3
    off = found.double()(probe_tokens()).logits - wanted
    assert float(off.abs().max()) <= TOLERANCE * float(wanted.abs().max())


@pytest.mark.parametrize("to", ["widest", "dense"])
def test_what_a_server_builds_is_the_pruned_function(to: str, tmp_path: Path):
    small = shrunk(_dense(), tmp_path / "small", WIDTHS)
    before = tree_hash(small)
    report = export_deci(small, tmp_path / "deci", Widths(to=to))
    assert tree_hash(small) == before, "the source was modified"
    _same(_as_a_server(tmp_path / "deci", tmp_path / "server"), liar_ext.load(small))
    heads = 3 if to == "widest" else 4
    assert report["export"]["layers"]["after"] == [
        {"heads": heads, "ffn": 256},
        {"heads": heads, "ffn": 512},
    ]
    assert "none of them was started" in (tmp_path / "deci" / "README.md").read_text()


def test_absent_blocks_are_zeros(tmp_path: Path):
    widths = [{"heads": 2, "ffn": 0}, {"heads": 0, "ffn": 300}]
    small = shrunk(_dense(), tmp_path / "small", widths)
    export_deci(small, tmp_path / "deci")
    _same(_as_a_server(tmp_path / "deci", tmp_path / "server"), liar_ext.load(small))
    stored = load_file(tmp_path / "deci" / "model.safetensors")
    assert not stored["model.layers.0.mlp.up_proj.weight"].any()
    assert not stored["model.layers.1.self_attn.o_proj.weight"].any()


@pytest.mark.parametrize("hidden", [48, 192, 2048, 4096, 5120, 8192])
def test_every_width_has_a_multiplier(hidden: int):
    for width in range(256, 256 * 150, 256):
        assert ffn_width(ffn_mult(width, hidden), hidden) == width


def test_the_config_class_beside_it_has_attributes(tmp_path: Path):
    small = shrunk(_dense(), tmp_path / "small", WIDTHS)
    export_deci(small, tmp_path / "deci")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "deci", trust_remote_code=True)
    block = config.block_configs[1]
    assert ffn_width(block.ffn.ffn_mult, config.hidden_size) == 512
    assert not block.attention.no_op
    assert not hasattr(block.ffn, "intermediate_size")
    assert config.head_dim == 6
    config.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["block_configs"][1] == dict(block)
    # stock classes never take it for a model of theirs
    with pytest.raises(ValueError, match="trust_remote_code|custom code"):
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "deci", trust_remote_code=False
        )


def test_heads_that_no_config_takes_become_more(tmp_path: Path):
    widths = [{"heads": 1, "ffn": 100}, {"heads": 2, "ffn": 300}]
    report = export_deci(
        shrunk(_dense(), tmp_path / "small", widths), tmp_path / "a", Widths(tensor_parallel=4)
    )
    assert report["export"]["layers"]["after"][0]["heads"] == 4
    # what was asked for is not what was made
    assert "multiples of 256, 256 512, and KV heads to 4" in report["export"]["note"]


@pytest.mark.parametrize(
    ("name", "widths", "biases", "reason"),
    [
        ("qwen2", [{"heads": 1, "ffn": 20}, {"heads": 3, "ffn": 33}], (), "it is a qwen2"),
        ("mistral-gqa", [{"heads": 1, "ffn": 20}, {"heads": 3, "ffn": 33}], ("ffn",), "biases"),
        ("llama-gqa-biases", [{"heads": 1, "ffn": 20}, {"heads": 3, "ffn": 33}], (), "biases"),
        ("mistral-sliding", [{"heads": 1, "ffn": 20}, {"heads": 3, "ffn": 33}], (), "window of 8"),
        ("llama-mha", [{"heads": 2, "ffn": 20}] * 2, (), "nothing that deci would add"),
    ],
)
def test_what_it_cannot_be_is_refused_by_name(
    name: str, widths: Any, biases: tuple[str, ...], reason: str, tmp_path: Path, capsys: Any
):
    small = shrunk(FAMILIES[name].build(), tmp_path / "small", widths, biases)
    command = ["export", str(small), "--out", str(tmp_path / "out"), "--format", "deci"]
    assert main(command) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_round_to_is_no_option_here(tmp_path: Path, capsys: Any):
    small = shrunk(_dense(), tmp_path / "small", WIDTHS)
    command = ["export", str(small), "--out", str(tmp_path / "out"), "--format", "deci"]
    assert main([*command, "--round-to", "64"]) == 2
    assert "--round-to: is of --format padded; leave it out" in capsys.readouterr().err
