"""Padded folders: stock transformers loads them, and the function is the pruned model's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from liar_export import shrunk
from liar_families import FAMILIES, UNLISTED, Family, probe_tokens, randomise, tree_hash
from liar_stock import stock
from safetensors.torch import load_file
from transformers import PreTrainedModel

import liar_ext
from liar_ext import InputError
from liar_ext.cli import main
from liar_ext.export.padded import export_padded
from liar_ext.export.padding import Widening
from liar_ext.export.widths import Widths
from liar_ext.tracing import trace

# float64, but for the norms of LLaMA's kin and the softmax, which round to float32 whatever comes
# in: sums that differ in the last place of float64 may round to another float32 (6e-8) at each of
# them, of which there are at most 4 a layer. What is not zero, or in a wrong place, is off by 1e-2
TOLERANCE = 8 * 2**-24
NARROW = [{"heads": 1, "ffn": 20}, {"heads": 3, "ffn": 33}]


@torch.no_grad()
def _outputs(model: PreTrainedModel) -> torch.Tensor:
    found = model.double().eval()(input_ids=probe_tokens())
    return found.logits if "logits" in found else found.last_hidden_state


def _same(padded: PreTrainedModel, pruned: PreTrainedModel) -> None:
    expected, found = _outputs(pruned), _outputs(padded)
    assert float(expected.std()) > 1e-3, "outputs that do not vary show nothing"
    assert float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


@pytest.mark.parametrize(
    ("name", "to"),
    [
        *((name, "widest") for name in FAMILIES if name != "llava"),
        *((name, "dense") for name in ("llama-gqa-biases", "mistral-sliding", "gpt2", "bert")),
    ],
)
def test_stock_transformers_computes_the_pruned_function(name: str, to: str, tmp_path: Path):
    family = FAMILIES[name]
    small = shrunk(family.build(), tmp_path / "small", NARROW)
    before = tree_hash(small)
    report = export_padded(small, tmp_path / "padded", Widths(to=to))
    assert tree_hash(small) == before, "the source was modified"
    pruned = liar_ext.load(small)
    # nothing of the checkpoint is lost or made up: `stock` fails on any word about its weights
    _same(stock(family, tmp_path / "padded"), pruned)
    _same(liar_ext.load(tmp_path / "padded"), pruned)
    ffn = report["export"]["units"]["ffn"]
    assert ffn["before"] == [20, 33]
    if to == "dense":
        assert report["totals"]["parameters_after"] == family.build().num_parameters()
    elif name != "bloom":
        assert ffn["after"] == 33
    else:
        # its config states no width of the FFN
        assert ffn["after"] == 4 * report["config"]["hidden_size"]
    assert "no FLOPs" in report["export"]["note"]
    card = (tmp_path / "padded" / "README.md").read_text()
    assert "no FLOPs" in card
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "transformers"
    assert report["config"]["model_type"] in front["tags"]


@pytest.mark.parametrize("name", ["phi", "falcon", "glm", "modernbert", "bloom"])
def test_traced_families_too(name: str, tmp_path: Path):
    family = UNLISTED[name]
    model = family.build()
    model.config.update({"liar_ext_trace": trace(model.config).family.to_json()})
    heads = name != "bloom"
    widths = [u if heads else {"ffn": u["ffn"]} for u in NARROW]
    small = shrunk(model, tmp_path / "small", widths)
    export_padded(small, tmp_path / "padded", Widths(to="dense"))
    _same(stock(family, tmp_path / "padded"), liar_ext.load(small))


@pytest.mark.parametrize("name", ["llama-gqa-biases", "qwen3", "gpt2", "opt"])
def test_absent_attention_and_ffn_become_zero_blocks(name: str, tmp_path: Path):
    family = FAMILIES[name]
    widths = [{"heads": 2, "ffn": 0 if name != "opt" else 9}, {"heads": 0, "ffn": 20}]
    small = shrunk(family.build(), tmp_path / "small", widths)
    export_padded(small, tmp_path / "padded")
    loaded, pruned = stock(family, tmp_path / "padded"), liar_ext.load(small)
    _same(loaded, pruned)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    ids = probe_tokens(2, 9)
    assert torch.equal(loaded.generate(ids, **options), pruned.generate(ids, **options))


def test_widths_are_rounded_and_divide_among_devices(tmp_path: Path):
    small = shrunk(FAMILIES["mistral-gqa"].build(), tmp_path / "small", NARROW)
    report = export_padded(small, tmp_path / "a", Widths(round_to=8, tensor_parallel=4))
    assert report["export"]["units"]["ffn"]["after"] == 40
    assert report["export"]["units"]["heads"]["after"] == 4
    assert report["warnings"] == []
    # never beyond the dense width, 48, which does not divide by 32
    report = export_padded(small, tmp_path / "b", Widths(round_to=32))
    assert report["export"]["units"]["ffn"]["after"] == 48
    assert "48" in report["warnings"][0]
    # a folder that loads anywhere can be rounded up too
    report = export_padded(tmp_path / "a", tmp_path / "c", Widths(round_to=64))
    assert report["export"]["units"]["ffn"]["after"] == 64
    _same(stock(FAMILIES["mistral-gqa"], tmp_path / "c"), liar_ext.load(small))


def test_more_heads_than_the_widest_where_the_family_takes_no_fewer(tmp_path: Path):
    # 3 KV groups are 6 heads, which LlamaConfig does not accept at 32; with biases Mistral cannot
    # stand in
    family = FAMILIES["llama-gqa-biases"]
    assert family.build().config.attention_bias
    report = export_padded(shrunk(family.build(), tmp_path / "small", NARROW), tmp_path / "padded")
    assert report["export"]["units"]["heads"] == {"before": [1, 3], "after": 4}


def test_added_biases_stay_where_the_family_has_a_flag(tmp_path: Path):
    family = FAMILIES["llama-tied"]
    kinds = ["heads", "ffn"]
    narrow = [{"heads": 1, "ffn": 20}, {"heads": 2, "ffn": 33}]
    small = shrunk(family.build(), tmp_path / "small", narrow, kinds)
    export_padded(small, tmp_path / "padded")
    loaded = stock(family, tmp_path / "padded")
    assert loaded.config.attention_bias and loaded.config.mlp_bias
    _same(loaded, liar_ext.load(small))


def test_many_small_files_and_all_dtypes_are_kept(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr("liar_ext.export.widened.PIECE_BYTES", 64)
    family = FAMILIES["llama-gqa-biases"]
    widths = [{"heads": 2, "ffn": 0}, {"heads": 0, "ffn": 20}]
    small = shrunk(family.build().to(torch.bfloat16), tmp_path / "small", widths)
    export_padded(small, tmp_path / "padded")
    made = load_file(tmp_path / "padded" / "model.safetensors")
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}
    assert not made["model.layers.1.self_attn.q_proj.weight"].any()
    assert bool((made["model.layers.0.post_attention_layernorm.weight"] == 1).all())


def test_zeros_go_behind_every_part_of_a_fused_projection():
    narrow = torch.arange(1.0, 9).reshape(8, 1)
    wide = Widening(0, (2, 1, 1))(narrow, (12, 1)).flatten().tolist()
    assert wide == [1, 2, 3, 4, 0, 0, 5, 6, 0, 7, 8, 0]
    with pytest.raises(ValueError, match="equal runs"):
        Widening(0, (2, 1, 1))(narrow, (13, 1))


def _error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    try:
        code = main(["export", *arguments])
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(lines) == 1
    return lines[0]


def test_what_cannot_be_exact_or_is_no_request_is_refused(tmp_path: Path, capsys: Any):
    mistral = FAMILIES["mistral-gqa"].build
    biased = shrunk(mistral(), tmp_path / "biased", NARROW, ["ffn"])
    small = shrunk(mistral(), tmp_path / "small", NARROW)
    even = shrunk(mistral(), tmp_path / "even", [NARROW[0]] * 2)
    out = tmp_path / "out"
    options = ["--out", str(out), "--format", "padded"]
    for arguments, says in (
        ([str(biased), *options], "ffn consumers were given biases.*--bias never"),
        ([str(even), *options], "nothing to pad"),
        ([str(even), *options, "--to", "dense"], "does not know the width before pruning"),
        ([str(small), *options, "--to", "thin"], "--to thin: must be one of widest, dense"),
        ([str(small), *options, "--round-to", "0"], "--round-to 0: must be 1 or more"),
        ([str(small), *options, "--tensor-parallel", "-2"], "--tensor-parallel -2"),
        ([str(small), "--out", str(out)], "--format: give one of padded"),
        ([str(small), "--out", str(out), "--format", "tensorrt"], "--format tensorrt: choose"),
        ([str(small), "--format", "padded"], "--out: give a folder"),
        ([str(small), "--out", str(small), "--format", "padded"], "overlaps the source"),
        ([str(tmp_path / "none"), *options], "no such folder"),
        ([str(small), *options, "--no-past"], "--no-past: is of --format onnx; leave it out"),
        ([str(small), *options, "--outtype", "f32"], "--outtype: is of --format gguf"),
    ):
        found = _error(arguments, capsys)
        assert re.search(says, found), found
        assert not out.exists()
    assert not list(tmp_path.glob(".*")), "temporary folders remain"


def test_the_command_says_what_it_did_and_that_nothing_is_faster(tmp_path: Path, capsys: Any):
    small = shrunk(FAMILIES["qwen2"].build(), tmp_path / "small", NARROW)
    options = ["--out", str(tmp_path / "out"), "--format", "padded"]
    assert main(["export", str(small), *options]) == 0
    said = capsys.readouterr().out
    assert "ffn: 20 33 -> 33 in all layers" in said
    assert "no FLOPs" in said
    assert main(["export", str(small), *options, "--overwrite", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["kind"] == "exported"
    assert report["totals"]["parameters_after"] > report["totals"]["parameters_before"]


def test_a_tensor_that_is_no_sites_is_refused_by_name(tmp_path: Path, monkeypatch: Any):
    small = shrunk(FAMILIES["qwen2"].build(), tmp_path / "small", NARROW)
    monkeypatch.setattr("liar_ext.export.widened.widenings", lambda model: {})
    with pytest.raises(InputError, match="q_proj.weight: would be .* zeros there would change"):
        export_padded(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_width_that_the_config_states_is_the_widest_and_another_the_dense_one(tmp_path: Path):
    config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    config.architectures = ["GPT2LMHeadModel"]
    family = Family("gpt2", lambda: None, transformers.AutoModelForCausalLM, True)
    small = shrunk(
        randomise(transformers.GPT2LMHeadModel(config)),
        tmp_path / "small",
        [{"heads": 2, "ffn": 32}, {"heads": 3, "ffn": 64}],
    )
    export_padded(small, tmp_path / "padded")
    made = json.loads((tmp_path / "padded" / "config.json").read_text())
    assert (made["n_inner"], made["n_head"]) == (64, 4)
    _same(stock(family, tmp_path / "padded"), liar_ext.load(small))
