"""What `--resume` refuses, by name: another recipe, source, text or version, and damaged files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from liar_families import tree_hash, write_tokens
from liar_kill import Bench, Work, compress, contents
from safetensors.torch import load_file, save_file

import liar_ext
from liar_ext import InputError
from liar_ext.engine.execution import Execution


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench.make(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def left(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Work:
    """Work that was killed after two of four layers; tests go on from copies."""
    root = tmp_path_factory.mktemp("left")
    source = shutil.copytree(bench.source, root / "dense")
    tokens = shutil.copyfile(bench.tokens, root / "tokens.npy")
    recipe = bench.recipe(calibration=str(tokens))
    work = Work(source, root / "out", recipe)
    assert compress(work, at="journal written", nth=2).killed
    return work


@pytest.fixture
def unfinished(left: Work, tmp_path: Path) -> Work:
    work = replace(left, source=tmp_path / "dense", out=tmp_path / "out").resumed()
    shutil.copytree(left.source, work.source)
    shutil.copytree(left.job.folder, work.job.folder)
    return work


def refused(work: Work, *, overwrite: bool = False) -> str:
    """The message; what was kept is as it was."""
    before = tree_hash(work.job.folder / "output"), work.job.journal.path.read_bytes()
    with pytest.raises(InputError) as caught:
        liar_ext.compress(
            work.source, work.out, work.recipe, execution=work.execution, overwrite=overwrite
        )
    assert (tree_hash(work.job.folder / "output"), work.job.journal.path.read_bytes()) == before
    assert not work.out.exists()
    return str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"sparsity": 0.25},
        {"target": ("ffn",)},
        {"criterion": "flap"},
        {"allocation": "global"},
        {"reconstruct": "none"},
        {"calibration": "TOKENS"},
        {"samples": 20},
        {"seq_len": 20},
        {"batch_size": 4},
        {"ridge": 1e-3},
        {"bias": "always"},
        {"statistics": "oneshot"},
        {"round_to": 8},
        {"layers": (0, 3)},
        {"device": "cpu"},
        {"dtype": "bfloat16"},
        {"seed": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_recipe_is_refused_by_name(unfinished, change, tmp_path):
    (name, value), *_ = change.items()
    if value == "TOKENS":
        value = str(write_tokens(tmp_path / "tokens.npy"))
    recipe = replace(unfinished.recipe, **{name: value})
    message = refused(replace(unfinished, recipe=recipe))
    assert message.startswith(f"--resume: recipe.{name} is ")
    assert message.endswith("restore it, or start again with --overwrite instead")


def test_another_text_under_the_same_name_is_refused(unfinished):
    tokens = Path(unfinished.recipe.calibration)
    before = tokens.read_bytes()
    try:
        write_tokens(tokens, seed=2)
        assert refused(unfinished).startswith("--resume: calibration.corpus_sha256 is ")
    finally:
        tokens.write_bytes(before)


def test_other_weights_of_the_same_size_are_refused(unfinished):
    path = unfinished.source / "model.safetensors"
    tensors = load_file(path)
    # of a layer that the earlier run has dealt with
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="--resume: source_sha256.model.safetensors is"):
        liar_ext.compress(
            unfinished.source, unfinished.out, unfinished.recipe, execution=unfinished.execution
        )
    assert unfinished.job.journal.progress() == "2 of 4 layers pruned", "no entry was added"
    assert not unfinished.out.exists()


def test_another_config_is_refused(unfinished):
    path = unfinished.source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-5}))
    assert refused(unfinished).startswith("--resume: source.config is ")


@pytest.mark.parametrize("name", ["liar_ext", "torch", "transformers"])
def test_other_versions_are_refused(unfinished, name):
    path = unfinished.job.journal.path
    entry = json.loads(path.read_text())
    entry["identity"]["versions"][name] = "0.0.1"
    path.write_text(json.dumps(entry))
    message = refused(unfinished)
    assert message.startswith(f"--resume: versions.{name} is ")
    assert '"0.0.1" in ' in message


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _of_layer_0(folder: Path) -> None:
    path = folder / "output" / "model.safetensors"
    header = path.read_bytes()
    size = int.from_bytes(header[:8], "little")
    entry = json.loads(header[8 : 8 + size])["model.layers.0.mlp.down_proj.weight"]
    _flip(path, 8 + size + entry["data_offsets"][1] - 3)


def _truncated(folder: Path) -> None:
    path = folder / "output" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _hidden(change: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: change(next(folder.glob("hidden-*")) / "1")


def _journal(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "journal.json").write_text(text)


def _without_sites(folder: Path) -> None:
    path = folder / "journal.json"
    entry = json.loads(path.read_text())
    del entry["sites"]
    path.write_text(json.dumps(entry))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_of_layer_0, "--resume: layer 0 in .*/output is not what the earlier run wrote"),
        (_truncated, "--resume: .*model.safetensors: is not the file that this run would make"),
        (
            lambda folder: (folder / "output" / "model.safetensors").unlink(),
            "--resume: .*model.safetensors: missing",
        ),
        (_hidden(Path.unlink), "hidden-prune-2/1, hidden states .* cannot be read .*No such file"),
        (_hidden(lambda path: path.write_bytes(b"1")), "hidden-prune-2/1.* not what that run"),
        (_hidden(lambda path: _flip(path, 5)), "hidden-prune-2/1.* not what that run wrote"),
        (
            lambda folder: next(folder.glob("hidden-*/findings.safetensors")).unlink(),
            "findings.safetensors, .* cannot be read",
        ),
        (_journal("{"), "journal.json: cannot be read .*--overwrite instead of --resume"),
        (_journal("[]"), "journal.json: written by another release; .*--overwrite"),
        (_journal('{"version": 9}'), "journal.json: written by another release"),
        (_without_sites, "journal.json: damaged, sites is missing"),
    ],
    ids=[
        *("layer", "truncated", "shard-gone", "hidden-gone", "hidden-short"),
        *("hidden-flipped", "findings-gone"),
        *("journal", "list", "release", "key"),
    ],
)
def test_what_is_damaged_is_refused_and_overwrite_starts_again(bench, unfinished, damage, says):
    damage(unfinished.job.folder)
    with pytest.raises(InputError, match=says) as caught:
        liar_ext.compress(
            unfinished.source, unfinished.out, unfinished.recipe, execution=unfinished.execution
        )
    assert "are kept" not in str(caught.value)
    again = replace(unfinished, execution=Execution(journal_seconds=0), overwrite=True)
    assert compress(again).done
    expected, found = (contents(f) for f in (bench.whole(bench.recipe()), again.out))
    assert found["model.safetensors"] == expected["model.safetensors"]
    assert [path.name for path in again.out.parent.glob(".out*")] == []


def test_an_unfinished_run_is_not_touched_without_a_word(unfinished):
    plain = replace(unfinished, execution=Execution(journal_seconds=0))
    assert refused(plain) == (
        f"--out {plain.out}: an unfinished run is in {plain.job.folder} (2 of 4 layers pruned); "
        "--resume goes on with it, --overwrite starts again"
    )
