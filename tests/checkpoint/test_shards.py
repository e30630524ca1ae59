"""Files made up front and filled in place: what stock readers see, and what survives a kill."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from liar_families import FAMILIES, outputs
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from liar_ext import InputError
from liar_ext.checkpoint import shards as shards_module
from liar_ext.checkpoint.reader import INDEX, SINGLE
from liar_ext.checkpoint.shards import (
    ShardWriter,
    TensorDigest,
    TensorSpec,
    digest_of,
    plan_shards,
)
from liar_ext.checkpoint.writer import output_folder

DTYPES = (
    *(torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.bool),
    *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)
SHAPES = ((), (1,), (3, 5), (0, 4), (7, 1, 11))


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bits, NaN among them: a copy of bytes must not care. Bools are 0 or 1."""
    count = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    bits = torch.randint(
        high, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return bits.view(dtype).reshape(shape)


def every_kind() -> dict[str, Tensor]:
    """All dtypes and odd shapes, narrow and wide ones mixed so that packing would misalign them."""
    return {
        f"t.{str(dtype).removeprefix('torch.')}.{'x'.join(map(str, shape))}": random_tensor(
            shape, dtype, seed
        )
        for seed, (shape, dtype) in enumerate((s, d) for s in SHAPES for d in DTYPES)
    }


def specs_of(tensors: dict[str, Tensor]) -> list[TensorSpec]:
    return [TensorSpec(n, tuple(t.shape), t.dtype) for n, t in tensors.items()]


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit by bit: NaN is not equal to itself, and float8 has no comparison."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def load_folder(folder: Path) -> dict[str, Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("shard_bytes", [1 << 30, 700, 1], ids=["one", "several", "one each"])
def test_every_dtype_and_shape_comes_back(shard_bytes, tmp_path):
    tensors = every_kind()
    shards = ShardWriter(tmp_path, specs_of(tensors), shard_bytes=shard_bytes)
    for name, tensor in random.Random(0).sample(sorted(tensors.items()), len(tensors)):
        shards.write(name, tensor)
    shards.finish()
    found = load_folder(tmp_path)
    assert found.keys() == tensors.keys() == set(shards.names)
    assert all(same(found[name], tensor) for name, tensor in tensors.items())
    assert shards.bytes == sum(t.nbytes for t in tensors.values())
    assert set(shards.files) == {path.name for path in tmp_path.glob("*.safetensors")}
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_every_tensor_begins_at_a_multiple_of_its_width(tmp_path):
    tensors = every_kind()
    ShardWriter(tmp_path, specs_of(tensors), shard_bytes=500).close()
    for path in tmp_path.iterdir():
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        assert length % 8 == 0
        for name, entry in json.loads(raw[8 : 8 + length]).items():
            if name != "__metadata__":
                assert entry["data_offsets"][0] % tensors[name].dtype.itemsize == 0


def test_shards_are_filled_in_the_given_order_and_the_index_says_so(tmp_path):
    tensors = {f"t{i}": torch.full((25,), i, dtype=torch.float32) for i in range(7)}
    tensors["large"] = torch.zeros(1000)
    tensors["last"] = torch.zeros(3)
    shards = ShardWriter(tmp_path, specs_of(tensors), shard_bytes=300)
    for name, tensor in tensors.items():
        shards.write(name, tensor)
    shards.finish()
    assert shards.files == tuple(f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6))
    parts = [["t0", "t1", "t2"], ["t3", "t4", "t5"], ["t6"], ["large"], ["last"]]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 4712}
    assert list(index["weight_map"].items()) == [
        (name, file) for file, part in zip(shards.files, parts, strict=True) for name in part
    ]
    for file, part in zip(shards.files, parts, strict=True):
        assert load_file(tmp_path / file).keys() == set(part)


def test_within_a_shard_wide_elements_come_first_and_equal_ones_stay_in_order():
    dtypes = [torch.int8, torch.float64, torch.float16, torch.int8, torch.bfloat16, torch.float64]
    specs = [TensorSpec(str(i), (1,), dtype) for i, dtype in enumerate(dtypes)]
    assert [[s.name for s in shard] for shard in plan_shards(specs, 100)] == [list("152403")]
    assert plan_shards([], 100) == [[]]


def test_no_tensors_make_one_empty_file(tmp_path):
    ShardWriter(tmp_path, []).finish()
    assert load_file(tmp_path / SINGLE) == {}


@pytest.mark.parametrize("shard_bytes", [1 << 30, 9000], ids=["single", "sharded"])
def test_stock_transformers_reads_the_folder(shard_bytes, tmp_path):
    family = FAMILIES["llama-mha"]
    model = family.build()
    model.save_pretrained(tmp_path)
    (tmp_path / SINGLE).unlink()
    tensors = dict(model.state_dict())
    shards = ShardWriter(tmp_path, specs_of(tensors), shard_bytes=shard_bytes)
    for name, tensor in tensors.items():
        shards.write(name, tensor)
    shards.finish()
    assert (tmp_path / INDEX).exists() == (shard_bytes == 9000)
    assert torch.equal(outputs(family.auto.from_pretrained(tmp_path).eval()), outputs(model))


def test_files_have_their_full_size_and_space_before_anything_is_written(tmp_path):
    specs = [TensorSpec("a", (1 << 20,), torch.float32), TensorSpec("b", (3,), torch.int8)]
    ShardWriter(tmp_path, specs).close()
    found = (tmp_path / SINGLE).stat()
    assert found.st_size > (4 << 20) + 3
    assert found.st_blocks * 512 >= 4 << 20, "reserved, not a hole"
    assert load_file(tmp_path / SINGLE)["a"].count_nonzero() == 0


def test_threads_write_interleaved(tmp_path):
    tensors = {f"t{i}": random_tensor((1000 + i,), torch.bfloat16, i) for i in range(64)}
    shards = ShardWriter(tmp_path, specs_of(tensors), shard_bytes=20_000)
    barrier = threading.Barrier(8)

    def some(first: int) -> None:
        barrier.wait()
        for index in range(first, 64, 8):
            pieces = tensors[f"t{index}"].split(7)
            shards.write_pieces(f"t{index}", pieces)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(some, range(8)))
    shards.finish()
    found = load_folder(tmp_path)
    assert all(same(found[name], tensor) for name, tensor in tensors.items())


def test_processes_write_into_the_same_shards(tmp_path):
    """Two writers of one folder, as two ranks have them; one finishes."""
    tensors = every_kind()
    specs = specs_of(tensors)
    first = ShardWriter(tmp_path, specs, shard_bytes=700)
    second = ShardWriter(tmp_path, specs, shard_bytes=700, create=False)
    for index, (name, tensor) in enumerate(tensors.items()):
        (first, second)[index % 2].write(name, tensor)
    names = list(tensors)
    second.sync(names[1::2])
    with pytest.raises(RuntimeError, match="never written, first " + names[1]):
        first.finish()
    first.mark_written(names[1::2])
    first.finish()
    second.close()
    found = load_folder(tmp_path)
    assert all(same(found[name], tensor) for name, tensor in tensors.items())


RESUMED = """
import os, signal, sys
from pathlib import Path
import torch
from liar_ext.checkpoint.shards import ShardWriter, TensorSpec
specs = [TensorSpec(f"t{i}", (1000,), torch.float32) for i in range(6)]
shards = ShardWriter(Path(sys.argv[1]), specs, shard_bytes=9000)
for i in range(3):
    shards.write(f"t{i}", torch.full((1000,), float(i + 1)))
shards.sync()
shards._write(shards._places["t3"].file, memoryview(b"torn"), shards._places["t3"].begin + 5)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_that_was_killed_goes_on_in_its_files(tmp_path):
    killed = subprocess.run([sys.executable, "-c", RESUMED, str(tmp_path)])
    assert killed.returncode == -signal.SIGKILL
    tensors = {f"t{i}": torch.full((1000,), float(i + 1)) for i in range(6)}
    done = ["t0", "t1", "t2"]
    shards = ShardWriter(tmp_path, specs_of(tensors), shard_bytes=9000, create=False)
    assert shards.digest(done) == digest_of((name, tensors[name]) for name in done)
    assert shards.digest(["t3"]) != digest_of([("t3", tensors["t3"])])
    shards.mark_written(done)
    for name in ("t3", "t4", "t5"):
        shards.write(name, tensors[name])
    shards.finish()
    found = load_folder(tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_files_of_another_plan_are_refused_and_left_as_they_are(tmp_path):
    specs = [TensorSpec("a", (4, 6), torch.float32), TensorSpec("b", (5,), torch.float32)]
    ShardWriter(tmp_path, specs).close()
    before = files_in(tmp_path)
    others = {
        "size": [specs[0], TensorSpec("b", (6,), torch.float32)],
        "shape": [TensorSpec("a", (6, 4), torch.float32), specs[1]],
        "dtype": [specs[0], TensorSpec("b", (5,), torch.int32)],
        "order": specs[::-1],
        "name": [specs[0], TensorSpec("c", (5,), torch.float32)],
    }
    for why, other in others.items():
        with pytest.raises(InputError, match=r"/model\.safetensors: is not the file") as caught:
            ShardWriter(tmp_path, other, create=False)
        assert "\n" not in str(caught.value), why
    with pytest.raises(InputError, match=r"model-00001-of-00002\.safetensors: missing"):
        ShardWriter(tmp_path, specs, shard_bytes=100, create=False)
    assert files_in(tmp_path) == before
    # killed between making the file and writing its header
    (tmp_path / SINGLE).write_bytes(bytes(len(before[SINGLE])))
    with pytest.raises(InputError, match="is not the file"):
        ShardWriter(tmp_path, specs, create=False)
    with pytest.raises(InputError, match="nowhere"):
        ShardWriter(tmp_path / "nowhere", specs, create=False)


def test_a_folder_that_may_not_be_written_is_one_line(tmp_path, monkeypatch):
    specs = [TensorSpec("a", (4,), torch.float32)]
    ShardWriter(tmp_path, specs).close()

    def refuse(path: Path, *_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InputError, match=r"model\.safetensors: permission denied; run as"):
        ShardWriter(tmp_path, specs, create=False)


def test_remaking_forgets_what_was_there(tmp_path):
    specs = [TensorSpec("a", (4,), torch.float32)]
    shards = ShardWriter(tmp_path, specs)
    shards.write("a", torch.ones(4))
    shards.finish()
    ShardWriter(tmp_path, specs).close()
    assert torch.equal(load_file(tmp_path / SINGLE)["a"], torch.zeros(4))


def test_the_digest_of_tensors_is_that_of_the_files(tmp_path, monkeypatch):
    """However the bytes are cut: while writing, in pieces, from memory or read again."""
    monkeypatch.setattr(shards_module, "READ_BLOCK", 13)
    tensors = every_kind()
    names = random.Random(1).sample(sorted(tensors), len(tensors))
    shards = ShardWriter(tmp_path, specs_of(tensors), shard_bytes=700)
    on_the_way = TensorDigest()
    for index, name in enumerate(names):
        if index % 2:
            shards.write(name, tensors[name], on_the_way)
        else:
            shards.write_pieces(name, tensors[name].reshape(-1).split(3), on_the_way)
    expected = digest_of((name, tensors[name]) for name in names)
    assert shards.digest(names) == on_the_way.hexdigest() == expected
    assert shards.digest(names[::-1]) != expected
    again = ShardWriter(tmp_path, specs_of(tensors), shard_bytes=700, create=False)
    assert again.digest(names) == expected


def test_the_digest_is_the_documented_sum():
    """Kept stable: a digest in a manifest of an interrupted run is compared by the next release."""
    raw = b'["w", "F32", [2, 1]]\n' + bytes.fromhex("0000803f00000040")
    assert digest_of([("w", torch.tensor([[1.0], [2.0]]))]) == hashlib.sha256(raw).hexdigest()


def test_name_dtype_and_shape_are_part_of_the_digest():
    zeros = torch.zeros(6)
    variants = [
        [("a", zeros)],
        [("b", zeros)],
        [("a", zeros.view(2, 3))],
        [("a", zeros.view(torch.int32))],
        [("a", zeros[:3]), ("a", zeros[3:])],
        [("a", zeros), ("e", zeros[:0])],
        [],
    ]
    assert len({digest_of(variant) for variant in variants}) == len(variants)


def test_views_and_parameters_are_written_as_the_values_they_have(tmp_path):
    base = torch.arange(24, dtype=torch.float32).view(4, 6)
    tensors = {
        "transposed": base.T,
        "column": base[:, 3],
        "expanded": base[:1, :1].expand(3, 5),
        "parameter": torch.nn.Parameter(base),
    }
    shards = ShardWriter(tmp_path, specs_of(tensors))
    for name, tensor in tensors.items():
        shards.write(name, tensor)
    assert shards.digest(list(tensors)) == digest_of(tensors.items())
    shards.finish()
    found = load_folder(tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_on_a_gpu_are_written(tmp_path):
    tensor = torch.randn(1001, 33, device="cuda", dtype=torch.bfloat16)
    shards = ShardWriter(tmp_path, specs_of({"a": tensor}))
    shards.write("a", tensor)
    assert shards.digest(["a"]) == digest_of([("a", tensor)]) == digest_of([("a", tensor.cpu())])
    shards.finish()
    assert torch.equal(load_file(tmp_path / SINGLE)["a"], tensor.cpu())


def test_a_large_tensor_is_written_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "PIECE_BYTES", 10)
    tensor = torch.arange(101, dtype=torch.float32)
    shards = ShardWriter(tmp_path, specs_of({"a": tensor}))
    sizes = []
    real = os.pwrite

    def pwrite(handle: int, raw: memoryview, offset: int) -> int:
        sizes.append(len(raw))
        return real(handle, raw, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    shards.write("a", tensor)
    assert set(sizes) == {8, 4}
    shards.finish()
    assert torch.equal(load_file(tmp_path / SINGLE)["a"], tensor)


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.zeros(2, 3), r"a: is torch.float32 \(2, 3\), but was planned as .*\(3, 2\)"),
        (torch.zeros(3, 2).double(), r"a: is torch.float64 \(3, 2\), but was planned"),
        (torch.zeros(6), "a: is torch.float32"),
    ],
    ids=["shape", "dtype", "rank"],
)
def test_what_was_not_planned_is_refused(tensor, says, tmp_path):
    shards = ShardWriter(tmp_path, [TensorSpec("a", (3, 2), torch.float32)])
    with pytest.raises(ValueError, match=says):
        shards.write("a", tensor)
    with pytest.raises(RuntimeError, match="1 tensors were never written, first a"):
        shards.finish()


@pytest.mark.parametrize(
    ("lengths", "says"),
    [((3, 2), "20 of its 24 bytes"), ((3, 4), "exceed its 24 bytes"), ((), "0 of its 24 bytes")],
    ids=["too few", "too many", "none"],
)
def test_pieces_must_add_up_and_spare_the_neighbours(lengths, says, tmp_path):
    tensors = {name: torch.full((6,), 7.0) for name in "abc"}
    shards = ShardWriter(tmp_path, specs_of(tensors))
    for name, tensor in tensors.items():
        shards.write(name, tensor)
    with pytest.raises(ValueError, match=says):
        shards.write_pieces("b", (torch.zeros(n) for n in lengths))
    with pytest.raises(ValueError, match="a piece is torch.float64"):
        shards.write_pieces("b", [torch.zeros(6, dtype=torch.float64)])
    assert shards.digest(["a", "c"]) == digest_of((n, tensors[n]) for n in "ac")
    with pytest.raises(RuntimeError, match="first b"):
        shards.finish()


def test_plans_that_no_file_can_hold_are_refused(tmp_path):
    spec = TensorSpec("a", (1,), torch.float32)
    for specs, says in (
        ([spec, spec], "a: a name twice"),
        ([TensorSpec("__metadata__", (1,), torch.float32)], "__metadata__"),
        ([TensorSpec("a", (1,), torch.complex128)], "a: safetensors has no torch.complex128"),
    ):
        with pytest.raises(ValueError, match=says):
            ShardWriter(tmp_path, specs)
    with pytest.raises(ValueError, match="shard_bytes is 0"):
        ShardWriter(tmp_path, [spec], shard_bytes=0)
    with pytest.raises(ValueError, match="b: is no tensor"):
        ShardWriter(tmp_path, [spec]).mark_written(["b"])


def test_a_disk_that_cannot_hold_the_files_shows_before_any_work(tmp_path, monkeypatch):
    real = os.posix_fallocate
    calls = []

    def full(handle: int, offset: int, size: int) -> None:
        calls.append(size)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    specs = [TensorSpec(f"t{i}", (100,), torch.float32) for i in range(5)]
    with pytest.raises(OSError, match="No space left") as caught:
        ShardWriter(tmp_path, specs, shard_bytes=400)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "model-00003-of-00005.safetensors")
    assert list(tmp_path.iterdir()) == [], "what was reserved is given back"
    calls[:] = [0, 0]
    with (
        pytest.raises(InputError, match="--out .*out: writing failed .No space left"),
        output_folder(tmp_path / "out", None, overwrite=False) as folder,
    ):
        ShardWriter(folder, specs, shard_bytes=400)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_is_really_too_small(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        specs = [TensorSpec(f"t{i}", (100_000,), torch.float32) for i in range(5)]
        with pytest.raises(OSError, match="No space left on device.*model-00003-of-00005"):
            ShardWriter(tmp_path, specs, shard_bytes=400_000)
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_cannot_reserve_gets_files_with_holes(code, tmp_path, monkeypatch):
    def unsupported(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    shards = ShardWriter(tmp_path, [TensorSpec("a", (1000,), torch.float32)])
    shards.write("a", torch.ones(1000))
    shards.finish()
    assert torch.equal(load_file(tmp_path / SINGLE)["a"], torch.ones(1000))


@pytest.mark.parametrize("operation", ["pwrite", "fdatasync", "fsync"])
def test_errors_name_the_file(operation, tmp_path, monkeypatch):
    shards = ShardWriter(tmp_path, [TensorSpec("a", (1000,), torch.float32)])
    shards.mark_written(["a"])

    def fail(*_: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, operation, fail)
    act = {"fdatasync": shards.sync, "fsync": shards.finish}
    with pytest.raises(OSError, match="quota") as caught:
        act.get(operation, lambda: shards.write("a", torch.ones(1000)))()
    assert (caught.value.errno, caught.value.filename) == (errno.EDQUOT, str(tmp_path / SINGLE))
    if operation == "pwrite":
        with pytest.raises(RuntimeError, match="never written"):
            shards.finish()


def test_short_writes_and_reads_go_on_where_they_stopped(tmp_path, monkeypatch):
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda h, raw, at: write(h, raw[:7], at))
    monkeypatch.setattr(os, "preadv", lambda h, to, at: read(h, [to[0][:5]], at))
    tensors = every_kind()
    shards = ShardWriter(tmp_path, specs_of(tensors))
    for name, tensor in tensors.items():
        shards.write(name, tensor)
    assert shards.digest(list(tensors)) == digest_of(tensors.items())
    shards.finish()
    found = load_folder(tmp_path)
    assert all(same(found[name], tensor) for name, tensor in tensors.items())


def test_a_write_that_takes_nothing_is_no_endless_loop(tmp_path, monkeypatch):
    shards = ShardWriter(tmp_path, [TensorSpec("a", (10,), torch.float32)])
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(OSError, match="Input/output error"):
        shards.write("a", torch.ones(10))


def test_sync_touches_only_the_files_of_the_names(tmp_path, monkeypatch):
    tensors = {f"t{i}": torch.ones(10) for i in range(4)}
    shards = ShardWriter(tmp_path, specs_of(tensors), shard_bytes=40)
    synced = []
    monkeypatch.setattr(
        os, "fdatasync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}"))
    )
    shards.sync(["t2", "t0"])
    assert [Path(path).name for path in synced] == [shards.files[0], shards.files[2]]
    shards.sync()
    assert len(synced) == 6
    shards.sync([])
    assert len(synced) == 6


def open_descriptors(folder: Path) -> int:
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
    return sum(str(os.readlink(p)).startswith(str(folder)) for p in links if p.is_symlink())


def test_descriptors_are_given_back(tmp_path):
    specs = [TensorSpec(f"t{i}", (10,), torch.float32) for i in range(4)]
    shards = ShardWriter(tmp_path, specs, shard_bytes=40)
    assert open_descriptors(tmp_path) == 4
    shards.close()
    shards.close()
    assert open_descriptors(tmp_path) == 0
    with pytest.raises(RuntimeError, match="is closed already"):
        shards.write("t0", torch.ones(10))
    with pytest.raises(InputError):
        ShardWriter(tmp_path, [*specs[:3], TensorSpec("x", (10,), torch.float32)], create=False)
    assert open_descriptors(tmp_path) == 0, "of a folder that was refused"
    forgotten = ShardWriter(tmp_path, specs, shard_bytes=40)
    del forgotten
    assert open_descriptors(tmp_path) == 0, "of a run that failed"


def test_a_file_truncated_meanwhile_is_named(tmp_path):
    shards = ShardWriter(tmp_path, [TensorSpec("a", (100,), torch.float32)])
    shards.write("a", torch.ones(100))
    os.truncate(tmp_path / SINGLE, 300)
    with pytest.raises(InputError, match=r"model\.safetensors: ends at byte 300"):
        shards.digest(["a"])


def test_the_plan_depends_on_the_specs_alone(tmp_path):
    tensors = every_kind()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shards = ShardWriter(tmp_path / name, specs_of(tensors), shard_bytes=300)
        for key, tensor in sorted(tensors.items(), reverse=name == "b"):
            shards.write(key, tensor)
        shards.finish()
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b")
