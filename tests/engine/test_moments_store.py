"""Moments on disk: the same bits come back, or an error says which file or setting is to blame."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from liar_ext.engine import moments_file
from liar_ext.engine.moments_store import MomentsStore
from liar_ext.errors import InputError
from liar_ext.ops.moments import Moments

FINGERPRINT = {"source": {"model.safetensors": "ab"}, "calibration": {"sha256": "cd"}, "dtype": "x"}


def _moments(columns: int, dtype: torch.dtype = torch.float32) -> Moments:
    moments = Moments.zeros(columns, dtype=dtype)
    x = torch.randn(2 * columns, columns, dtype=dtype)
    moments.count += x.shape[0]
    moments.sum += x.sum(0, dtype=torch.float64)
    moments.gram.copy_(x.T @ x)
    # what is above the diagonal is unspecified, and must not reach the file
    upper = torch.ones(columns, columns, dtype=torch.bool).triu(1)
    moments.gram[upper] = float("nan")
    return moments


@pytest.fixture
def store(tmp_path):
    return MomentsStore(tmp_path / "moments", FINGERPRINT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("columns", [1, 7, 48, 129])
@pytest.mark.parametrize("block", [1, 4096, None], ids=["a row", "some rows", "one block"])
def test_the_triangle_comes_back_bit_by_bit(store, monkeypatch, columns, dtype, block):
    if block is not None:
        monkeypatch.setattr(moments_file, "BLOCK_BYTES", block)
    moments = _moments(columns, dtype)
    assert not store.has(3, "ffn")
    store.save(3, "ffn", moments)
    found = store.load(3, "ffn")
    assert found.gram.dtype == dtype
    assert found.complete and found.order is None and not found.mirrored
    assert torch.equal(found.count, moments.count) and found.count.dtype == torch.int64
    assert torch.equal(found.sum, moments.sum)
    lower = torch.ones(columns, columns, dtype=torch.bool).tril()
    assert torch.equal(found.gram[lower], moments.gram[lower])
    assert not found.gram[~lower].any()


def test_column_statistics_are_those_of_the_moments_without_reading_the_triangle(
    store, monkeypatch
):
    moments = _moments(31)
    store.save(0, "heads", moments)
    monkeypatch.setattr(moments_file.SiteFile, "gram", None)
    found = store.load_columns(0, "heads")
    for name in ("mean", "diagonal", "variance"):
        assert torch.equal(getattr(found, name)(), getattr(moments, name)())


def test_the_file_is_safetensors_half_the_square_in_size(store):
    moments = _moments(64)
    store.save(0, "ffn", moments)
    path = store.folder / "layer-0000-ffn.safetensors"
    stored = load_file(path)
    assert stored["gram"].numel() == 64 * 65 // 2
    rows, columns = torch.tril_indices(64, 64)
    assert torch.equal(stored["gram"], moments.gram[rows, columns])
    needed = MomentsStore.bytes_needed([64])
    assert needed <= path.stat().st_size < needed + 1024

    def size(n: int, item: int) -> int:
        """Count, sums and squares in 8 bytes each, the triangle, two sha256."""
        return 8 + 2 * 8 * n + item * n * (n + 1) // 2 + 64

    assert needed == size(64, 4)
    assert MomentsStore.bytes_needed([64, 7], torch.float64) == size(64, 8) + size(7, 8)
    assert sorted(p.name for p in store.folder.iterdir()) == [path.name, "moments.json"]


def test_complete_needs_every_site(store):
    store.save(0, "ffn", _moments(5))
    assert store.complete([(0, "ffn")])
    assert not store.complete([(0, "ffn"), (1, "ffn")])
    assert not store.has(0, "heads")


def test_saving_again_replaces(store):
    store.save(0, "ffn", _moments(5))
    again = _moments(5)
    store.save(0, "ffn", again)
    assert torch.equal(store.load(0, "ffn").sum, again.sum)


@pytest.mark.parametrize(
    "moments",
    [
        Moments.zeros(6, keep=torch.tensor([0, 1, 2])),
        Moments.zeros(6, keep=torch.tensor([5, 4, 3, 2, 1, 0])),
        Moments.zeros(6, dtype=torch.bfloat16),
    ],
    ids=["a panel", "another order", "bfloat16"],
)
def test_what_is_not_the_whole_triangle_is_refused(store, moments):
    with pytest.raises(ValueError, match="whole triangle|bfloat16"):
        store.save(0, "ffn", moments)
    assert not store.has(0, "ffn")


def _flip(path, offset):
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("offset", [0, 9, 60, 300, 700, 1000, -1], ids=lambda o: f"byte {o}")
def test_a_flipped_bit_is_noticed_and_named(store, offset):
    store.save(2, "ffn", _moments(24))
    path = store.folder / "layer-0002-ffn.safetensors"
    _flip(path, offset)
    with pytest.raises(InputError, match=f"{path}.*delete it"):
        store.load(2, "ffn")


def test_every_flipped_byte_is_noticed(store):
    store.save(2, "ffn", _moments(3))
    path = store.folder / "layer-0002-ffn.safetensors"
    whole = path.read_bytes()
    good = store.load(2, "ffn")
    for offset in range(len(whole)):
        _flip(path, offset)
        try:
            found = store.load(2, "ffn")
        except InputError:
            pass
        else:
            # a header has blanks and metadata that say nothing about the tensors
            assert torch.equal(found.gram, good.gram) and torch.equal(found.sum, good.sum), offset
            assert offset < len(whole) - MomentsStore.bytes_needed([3])
        path.write_bytes(whole)


@pytest.mark.parametrize("left", [0, 5, 100, 1200])
def test_a_truncated_file_is_noticed_and_named(store, left):
    store.save(2, "ffn", _moments(24))
    path = store.folder / "layer-0002-ffn.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    for read in (store.load, store.load_columns):
        with pytest.raises(InputError, match=f"{path}: truncated"):
            read(2, "ffn")


def test_a_file_in_another_sites_place_is_noticed(store):
    store.save(0, "ffn", _moments(9))
    path = store.folder / "layer-0000-ffn.safetensors"
    path.rename(store.folder / "layer-0001-ffn.safetensors")
    with pytest.raises(InputError, match="layer-0001-ffn"):
        store.load(1, "ffn")
    with pytest.raises(InputError, match="layer-0000-ffn.*missing"):
        store.load(0, "ffn")


def test_the_same_fingerprint_opens_the_folder_again(store):
    moments = _moments(9)
    store.save(0, "ffn", moments)
    again = MomentsStore(store.folder, dict(reversed(FINGERPRINT.items())))
    assert torch.equal(again.load(0, "ffn").sum, moments.sum)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calibration": {"sha256": "ef"}}, "made with calibration.sha256 cd, this run has ef"),
        ({"dtype": None}, "made with dtype x, this run has null"),
        ({"versions": {"torch": "3"}}, "made with versions.torch absent, this run has 3"),
    ],
    ids=["nested", "null", "new key"],
)
def test_another_fingerprint_is_refused_with_both_values(store, change, message):
    with pytest.raises(InputError, match=message) as caught:
        MomentsStore(store.folder, FINGERPRINT | change)
    assert str(store.folder) in str(caught.value)
    assert "give another folder, or delete this one" in str(caught.value)


def test_a_folder_that_holds_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=r"holds thesis.tex"):
        MomentsStore(tmp_path, FINGERPRINT)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"version": 99, "fingerprint": {}})])
def test_a_damaged_moments_json_is_refused(store, text):
    (store.folder / "moments.json").write_text(text)
    with pytest.raises(InputError, match="moments.json"):
        MomentsStore(store.folder, FINGERPRINT)


def test_a_full_disk_leaves_no_file_and_says_how_much_is_needed(store, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("liar_ext.checkpoint.shards.os.posix_fallocate", full)
    needed = MomentsStore.bytes_needed([24])
    with pytest.raises(InputError, match=f"No space left.*needs {needed:,} bytes"):
        store.save(0, "ffn", _moments(24))
    assert [path.name for path in store.folder.iterdir()] == ["moments.json"]


def test_what_others_ask_for_is_the_union_of_their_sites(tmp_path):
    folder = tmp_path / "moments"
    MomentsStore.ask(folder, [(("ffn",), None), (("ffn", "heads"), (2, 4))])
    store = MomentsStore(folder, FINGERPRINT)
    assert [store.wanted(layer) for layer in (0, 2, 3, 4)] == [
        ("ffn",),
        ("ffn", "heads"),
        ("ffn", "heads"),
        ("ffn",),
    ]
    assert MomentsStore(tmp_path / "other", FINGERPRINT).wanted(0) == ()


def test_delete_removes_what_stores_wrote_and_nothing_else(store):
    store.save(0, "ffn", _moments(4))
    (store.folder / ".layer-0001-ffn-killed").mkdir()
    (store.folder / "note.txt").write_text("mine")
    MomentsStore.delete(store.folder)
    assert [path.name for path in store.folder.iterdir()] == ["note.txt"]
    (store.folder / "note.txt").unlink()
    MomentsStore.delete(store.folder)
    MomentsStore.delete(store.folder)
    assert not store.folder.exists()


@pytest.mark.gpu
def test_moments_of_a_gpu_come_back_on_it(store):
    moments = _moments(129)
    on_gpu = Moments(moments.count.cuda(), moments.sum.cuda(), moments.gram.cuda())
    store.save(0, "ffn", on_gpu)
    found = store.load(0, "ffn", "cuda")
    assert found.gram.is_cuda and found.sum.is_cuda and found.count.is_cuda
    assert torch.equal(found.gram.cpu(), moments.gram.tril().nan_to_num())
