"""Reading and writing folders: what is refused, what is found, what is left when it fails."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import torch
from liar_families import FAMILIES, outputs, tree_hash, write_tokens
from safetensors.torch import load_file, save_file

import liar_ext
from liar_ext import InputError, Recipe
from liar_ext.checkpoint import store, writer
from liar_ext.checkpoint.reader import CheckpointReader
from liar_ext.checkpoint.shards import ShardWriter
from liar_ext.checkpoint.writer import check_output, output_folder
from liar_ext.models import layout


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    FAMILIES["llama-mha"].build().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def recipe(tmp_path: Path, **changes) -> Recipe:
    values = {"calibration": str(write_tokens(tmp_path / "t.npy")), "seq_len": 24, "samples": 24}
    return Recipe(**{**values, "sparsity": 0.5, **changes})


def rewrite(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def shard(folder: Path, parts: int = 3) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for part in range(parts):
        name = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        mine = {k: v for i, (k, v) in enumerate(tensors.items()) if i % parts == part}
        save_file(mine, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_windows_that_the_model_cuts_are_a_warning(dense, tmp_path):
    limit = json.loads((dense / "config.json").read_text())["max_position_embeddings"]
    tokens = str(write_tokens(tmp_path / "long.npy", samples=4, length=2 * limit))
    for length, warned in ((limit, False), (limit + 1, True)):
        asked = recipe(tmp_path, seq_len=length, samples=2, reconstruct="none", calibration=tokens)
        report = liar_ext.compress(dense, tmp_path / f"out-{length}", asked)
        said = [line for line in report.warnings if line.startswith("--seq-len")]
        assert bool(said) == warned
        assert report.calibration["seq_len"] == limit
    assert str(limit) in said[0]


def test_sharded_and_single_files_hold_the_same_model(dense):
    expected = outputs(liar_ext.load(dense))
    assert torch.equal(expected, outputs(FAMILIES["llama-mha"].build()))
    shard(dense)
    assert torch.equal(outputs(liar_ext.load(dense)), expected)


def test_a_missing_shard_and_a_wrong_index_are_named(dense):
    shard(dense)
    (dense / "model-00002-of-00003.safetensors").rename(dense / "elsewhere")
    with pytest.raises(InputError, match=r"model-00002-of-00003\.safetensors: missing"):
        CheckpointReader(dense)
    (dense / "elsewhere").rename(dense / "model-00002-of-00003.safetensors")
    index = dense / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["extra.weight"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"has no tensor extra\.weight"):
        CheckpointReader(dense)
    data["weight_map"]["extra.weight"] = 5
    index.write_text(json.dumps(data))
    with pytest.raises(InputError, match="extra.weight is in 5"):
        CheckpointReader(dense)
    index.write_text("{}")
    with pytest.raises(InputError, match="no weight_map"):
        CheckpointReader(dense)


def test_of_two_sets_of_weights_the_one_that_transformers_takes_is_read(dense):
    tensors = load_file(dense / "model.safetensors")
    shard(dense)
    other = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(other, dense / "model.safetensors", metadata={"format": "pt"})
    stock = FAMILIES["llama-mha"].auto.from_pretrained(dense).state_dict()
    mine = liar_ext.load(dense).state_dict()
    assert torch.equal(stock["lm_head.weight"], other["lm_head.weight"])
    assert all(torch.equal(tensor, stock[name]) for name, tensor in mine.items())


def test_names_without_the_base_prefix_are_found(tmp_path):
    """GPT-2's own checkpoint is stored as `h.0...` and loaded as `transformer.h.0...`."""
    family = FAMILIES["gpt2"]
    family.build().save_pretrained(tmp_path / "gpt2")
    rewrite(tmp_path / "gpt2", lambda t: {k.removeprefix("transformer."): v for k, v in t.items()})
    assert torch.equal(outputs(liar_ext.load(tmp_path / "gpt2")), outputs(family.build()))


def test_names_with_a_prefix_too_many_and_legacy_norms_are_found(tmp_path):
    """A headless BERT from a headed checkpoint that still says gamma and beta."""
    family = FAMILIES["bert"]
    family.build().save_pretrained(tmp_path / "bert")

    def old(name: str) -> str:
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        return "bert." + name.replace("LayerNorm.bias", "LayerNorm.beta")

    rewrite(tmp_path / "bert", lambda t: {old(k): v for k, v in t.items()})
    assert torch.equal(outputs(liar_ext.load(tmp_path / "bert")), outputs(family.build()))


@pytest.mark.parametrize("stored", [True, False], ids=["stored twice", "stored once"])
def test_tied_embeddings_stay_tied(stored, tmp_path):
    family = FAMILIES["llama-tied"]
    family.build().save_pretrained(tmp_path / "dense")
    if stored:
        rewrite(
            tmp_path / "dense",
            lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()},
        )
    report = liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe(tmp_path))
    model = liar_ext.load(tmp_path / "small")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert report.totals["parameters_after"] == model.num_parameters()


def test_tensors_the_model_does_not_have_are_left_out_with_a_warning(dense, tmp_path):
    rewrite(dense, lambda t: t | {"adapter.weight": torch.ones(3)})
    report = liar_ext.compress(dense, tmp_path / "small", recipe(tmp_path))
    assert any("adapter.weight" in line for line in report.warnings)
    assert "adapter.weight" not in load_file(tmp_path / "small" / "model.safetensors")


def test_buffers_of_older_releases_are_no_loss(tmp_path):
    FAMILIES["bert"].build().save_pretrained(tmp_path / "bert")
    rewrite(tmp_path / "bert", lambda t: t | {"embeddings.position_ids": torch.arange(64)[None]})
    report = liar_ext.compress(tmp_path / "bert", tmp_path / "small", recipe(tmp_path))
    assert not any("left out" in line for line in report.warnings)


def test_the_writer_shards_and_stock_reads_the_shards(dense, tmp_path, monkeypatch):
    one = liar_ext.compress(dense, tmp_path / "one", recipe(tmp_path))
    monkeypatch.setattr(store, "ShardWriter", functools.partial(ShardWriter, shard_bytes=9000))
    liar_ext.compress(dense, tmp_path / "many", recipe(tmp_path))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 3
    assert files == {path.name for path in (tmp_path / "many").glob("*.safetensors")}
    assert index["metadata"]["total_size"] == one.totals["bytes_after"]
    for name in files:
        size = sum(
            v.numel() * v.element_size() for v in load_file(tmp_path / "many" / name).values()
        )
        assert size <= 12416, "only a tensor larger than a shard may exceed it"
    expected = outputs(liar_ext.load(tmp_path / "one"))
    assert torch.equal(outputs(liar_ext.load(tmp_path / "many")), expected)
    stock = FAMILIES["llama-mha"].auto.from_pretrained(tmp_path / "many").eval()
    assert torch.equal(outputs(stock), expected)


def test_other_files_are_copied_and_reports_of_another_run_are_not(dense, tmp_path):
    (dense / "tokenizer.json").write_text("{}")
    (dense / "1_Pooling").mkdir()
    (dense / "1_Pooling" / "config.json").write_text("[1]")
    (dense / "pytorch_model.bin").write_bytes(b"pickle")
    (dense / "liar_report.json").write_text("old")
    (dense / ".cache").mkdir()
    (dense / ".cache" / "x").write_text("hidden")
    liar_ext.compress(dense, tmp_path / "small", recipe(tmp_path))
    out = tmp_path / "small"
    assert (out / "tokenizer.json").read_text() == "{}"
    assert (out / "1_Pooling" / "config.json").read_text() == "[1]"
    assert not (out / "pytorch_model.bin").exists()
    assert not (out / ".cache").exists()
    assert json.loads((out / "liar_report.json").read_text())["source"] == str(dense)


def test_files_have_usual_permissions(dense, tmp_path):
    liar_ext.compress(dense, tmp_path / "small", recipe(tmp_path))
    plain = tmp_path / "plain"
    plain.write_text("")
    expected = stat.S_IMODE(plain.stat().st_mode)
    for path in (tmp_path / "small").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == expected, path.name


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_the_old_output_as_it_was(
    dense, tmp_path, monkeypatch, error
):
    out = tmp_path / "small"
    liar_ext.compress(dense, out, recipe(tmp_path))
    before, source = tree_hash(out), tree_hash(dense)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises((InputError, KeyboardInterrupt)):
        liar_ext.compress(dense, out, recipe(tmp_path, sparsity=0.25), overwrite=True)
    assert tree_hash(out) == before
    assert tree_hash(dense) == source
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "small", "t.npy"]


def test_a_rename_that_fails_puts_the_old_output_back(dense, tmp_path, monkeypatch):
    out = tmp_path / "small"
    liar_ext.compress(dense, out, recipe(tmp_path))
    before = tree_hash(out)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == "output":
            raise OSError(5, "Input/output error", str(self))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(InputError, match="Input/output"):
        liar_ext.compress(dense, out, recipe(tmp_path), overwrite=True)
    assert tree_hash(out) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "small", "t.npy"]


def test_an_old_output_that_cannot_be_moved_stays_and_nothing_else(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "liar_report.json").write_text("x")

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(16, "Device or resource busy", str(self))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="busy"), output_folder(out, None, overwrite=True):
        pass
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == [
        "out",
        "out/liar_report.json",
    ]


def test_a_full_disk_is_told_even_when_the_error_names_no_file(dense, tmp_path, monkeypatch):
    """`write` fails without a file name, unlike `open`."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="small: writing failed .No space left"):
        liar_ext.compress(dense, tmp_path / "small", recipe(tmp_path))
    assert not (tmp_path / "small").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("kilobytes", [40, 100, 132])
def test_a_disk_that_is_really_full(dense, tmp_path, kilobytes):
    """40 KiB do not hold the weights (113 KiB), 132 not the report beside them."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        for name in ("adapter.json", "tokenizer.json"):
            (dense / name).write_bytes(b"x" * 30_000)
        with pytest.raises(InputError, match="No space left"):
            liar_ext.compress(dense, disk / "small", recipe(tmp_path))
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_repaired_weights_that_a_dtype_cannot_hold_are_refused(tmp_path):
    """A neuron a thousand times its kept neighbour: its repair overflows float16."""
    model = FAMILIES["llama-mha"].build()
    with torch.no_grad():
        mlp = model.model.layers[1].mlp
        for unit in range(0, 48, 2):
            mlp.gate_proj.weight[unit + 1] = mlp.gate_proj.weight[unit]
            mlp.up_proj.weight[unit + 1] = 1e-3 * mlp.up_proj.weight[unit]
            mlp.down_proj.weight[:, unit] = 100.0
            mlp.down_proj.weight[:, unit + 1] = 3e4
    model.half().save_pretrained(tmp_path / "dense")
    settings = recipe(tmp_path, criterion="magnitude", ridge=0.0)
    with pytest.raises(InputError, match="layers.1.mlp.down_proj.weight: repaired weights up to"):
        liar_ext.compress(tmp_path / "dense", tmp_path / "small", settings)
    wide = Recipe.from_json({**settings.to_json(), "dtype": "bfloat16"})
    liar_ext.compress(tmp_path / "dense", tmp_path / "small", wide)
    assert outputs(liar_ext.load(tmp_path / "small")).isfinite().all()


def test_links_do_not_hide_that_output_and_source_are_one(dense, tmp_path):
    (tmp_path / "link").symlink_to(dense)
    with pytest.raises(InputError, match="overlaps the source"):
        check_output(tmp_path / "link" / "out", dense, overwrite=True)
    with pytest.raises(InputError, match="overlaps the source"):
        check_output(dense, tmp_path / "link", overwrite=True)


def test_an_output_folder_appears_only_when_complete(tmp_path):
    out = tmp_path / "deep" / "out"
    with output_folder(out, None, overwrite=False) as temporary:
        (temporary / "file").write_text("x")
        assert not out.exists()
    assert (out / "file").read_text() == "x"
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_what_a_killed_process_left_goes_with_the_next_one(tmp_path, monkeypatch):
    out = tmp_path / "out"
    left, other = tmp_path / ".out.partial-1", tmp_path / ".out2.partial-1"
    for folder in (left, other):
        folder.mkdir()
        (folder / "file").write_text("x")
    with output_folder(out, None, overwrite=False):
        # it may be just being made
        assert left.exists()
    monkeypatch.setattr(writer, "YOUNG_SECONDS", -1.0)
    with output_folder(tmp_path / "out3", None, overwrite=False) as mine:
        # what somebody works on stays
        writer.sweep(tmp_path / "out3")
        assert mine.exists()
    with output_folder(out, None, overwrite=True):
        assert not left.exists()
    assert other.exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 9}, "version 9"),
        ({"layers": [{"heads": 4, "ffn": 24}]}, "lists 1 layers"),
        ({"layers": [{"heads": 4, "ffn": -1}, {"heads": 4, "ffn": 24}]}, "ffn -1"),
        # a layer may have no FFN, and this one has
        ({"layers": [{"heads": 4, "ffn": 0}, {"heads": 4, "ffn": 48}]}, "has shape"),
        ({"layers": [{"heads": 9, "ffn": 24}, {"heads": 4, "ffn": 24}]}, "heads 9"),
        ({"layers": [{"heads": 4, "ffn": 23}, {"heads": 4, "ffn": 24}]}, "has shape"),
    ],
    ids=str,
)
def test_a_damaged_layout_is_refused(change, says, dense, tmp_path):
    out = tmp_path / "small"
    liar_ext.compress(dense, out, recipe(tmp_path, layers=(0, 1)))
    assert layout.read(liar_ext.load(out)) == [{"heads": 4, "ffn": 24}, {"heads": 4, "ffn": 48}]
    path = out / "config.json"
    data = json.loads(path.read_text())
    data["liar_ext"] |= change
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=says):
        liar_ext.load(out)


@pytest.mark.parametrize("where", ["nowhere", "./nowhere", "/nowhere", "a/b/c"])
def test_a_source_that_is_not_there_is_named(where, monkeypatch):
    with pytest.raises(InputError, match="no such folder"):
        liar_ext.load(where)


def test_a_hub_name_that_cannot_be_reached_is_one_line():
    with pytest.raises(InputError, match="hub repository") as caught:
        liar_ext.load("nobody/nothing-at-all")
    assert "\n" not in str(caught.value)


def test_the_source_may_be_read_only(dense, tmp_path):
    for path in dense.iterdir():
        path.chmod(0o444)
    dense.chmod(0o555)
    try:
        liar_ext.compress(dense, tmp_path / "small", recipe(tmp_path))
    finally:
        dense.chmod(0o755)
    shutil.rmtree(dense)
    assert outputs(liar_ext.load(tmp_path / "small")).isfinite().all()


def test_mixed_dtypes_run_in_the_main_one_and_are_written_each_in_its_own(tmp_path):
    model = FAMILIES["llama-mha"].build().to(torch.bfloat16)
    for layer in model.model.layers:
        layer.input_layernorm.float()
    model.save_pretrained(tmp_path / "dense")
    liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe(tmp_path))
    stored = load_file(tmp_path / "small" / "model.safetensors")
    assert stored["model.layers.0.input_layernorm.weight"].dtype == torch.float32
    assert stored["model.layers.0.mlp.down_proj.weight"].dtype == torch.bfloat16
    loaded = liar_ext.load(tmp_path / "small")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert outputs(loaded).isfinite().all()


def test_tensors_of_integers_are_refused_as_quantised(dense, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    rewrite(dense, lambda t: t | {name: t[name].to(torch.int8)})
    with pytest.raises(InputError, match=f"{name}: is torch.int8, quantised"):
        liar_ext.compress(dense, tmp_path / "small", recipe(tmp_path))


def test_nan_outside_the_layers_is_found_as_well(dense, tmp_path):
    def damage(tensors):
        tensors["model.norm.weight"][3] = float("nan")
        return tensors

    rewrite(dense, damage)
    with pytest.raises(InputError, match="model.norm.weight: has NaN"):
        liar_ext.compress(dense, tmp_path / "small", recipe(tmp_path))
    assert not (tmp_path / "small").exists()


def test_layers_that_the_config_does_not_count_are_an_error(dense, tmp_path):
    path = dense / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 1}))
    with pytest.raises(InputError, match="model.layers.1.*num_hidden_layers"):
        liar_ext.compress(dense, tmp_path / "small", recipe(tmp_path))


def test_overwrite_spares_what_prune_did_not_write(dense, tmp_path):
    out = tmp_path / "documents"
    out.mkdir()
    (out / "thesis.txt").write_text("years")
    with pytest.raises(InputError, match="not a result of `liar prune`"):
        liar_ext.compress(dense, out, recipe(tmp_path), overwrite=True)
    assert (out / "thesis.txt").read_text() == "years"


def test_parents_made_for_a_run_that_fails_go_again(dense, tmp_path):
    config = json.loads((dense / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    with pytest.raises(InputError, match="0:2"):
        liar_ext.compress(dense, tmp_path / "a" / "b" / "out", recipe(tmp_path, layers=(0, 9)))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("neighbour", [False, True], ids=["alone", "with a neighbour"])
def test_a_failure_removes_the_parents_it_made_unless_they_are_in_use(neighbour, tmp_path):
    out = tmp_path / "a" / "b" / "out"

    def fail() -> None:
        with output_folder(out, None, overwrite=False):
            if neighbour:
                (tmp_path / "a" / "other").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    left = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))]
    assert left == (["a", "a/other"] if neighbour else [])
