"""Reading without a mapping: what is read, and every way in which a file can change under a run."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from liar_ext import InputError
from liar_ext.checkpoint import identity as identity_module
from liar_ext.checkpoint.reader import CheckpointReader

DTYPES = (
    *(torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.bool),
    *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)
CHANGED = r"was replaced or changed while it was being read; leave the checkpoint"


class Bag(nn.Module):
    """What `bind` needs of a model: a state dict of any names and dtypes."""

    base_model_prefix = "model"

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self._tensors = tensors
        text = type("Config", (), {"tie_word_embeddings": False})()
        text.get_text_config = lambda: text
        self.config = text

    def state_dict(self, *_: object, **__: object) -> dict[str, Tensor]:  # type: ignore[override]
        return self._tensors


def some_tensors() -> dict[str, Tensor]:
    """Every dtype, with odd sizes, no elements and no dimensions among them."""
    tensors = {}
    for seed, dtype in enumerate(DTYPES):
        for shape in ((5, 7), (), (0, 3), (1,), (129,)):
            count = torch.Size(shape).numel() * dtype.itemsize
            high = 2 if dtype == torch.bool else 256
            generator = torch.Generator().manual_seed(seed)
            bits = torch.randint(high, (count,), dtype=torch.uint8, generator=generator)
            name = f"{str(dtype).removeprefix('torch.')}.{'x'.join(map(str, shape))}"
            tensors[name] = bits.view(dtype).reshape(shape)
    return tensors


def write_folder(folder: Path, parts: dict[str, dict[str, Tensor]]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for file, tensors in parts.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(parts) > 1:
        weight_map = {name: file for file, tensors in parts.items() for name in tensors}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards, `b` with elements of four bytes in order."""
    a = {f"a.{name}": tensor for name, tensor in some_tensors().items()}
    parts = {"a.safetensors": a, "b.safetensors": {"b": torch.arange(300.0).view(20, 15)}}
    write_folder(tmp_path / "model", parts)
    return tmp_path / "model"


def bound(folder: Path) -> CheckpointReader:
    reader = CheckpointReader(folder)
    stored = {}
    for file in reader.files():
        stored |= load_file(folder / file)
    reader.bind(Bag(stored))  # type: ignore[arg-type]
    return reader


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit by bit: NaN is not equal to itself, and float8 has no comparison."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def replace(path: Path) -> None:
    """Same size, same modification time, other content, another file."""
    old = path.stat()
    other = path.with_name("other")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    other.write_bytes(raw)
    os.utime(other, ns=(old.st_atime_ns, old.st_mtime_ns))
    os.replace(other, path)


def rewrite(path: Path) -> None:
    """The same file, in place."""
    before = path.stat().st_mtime_ns
    while path.stat().st_mtime_ns == before:  # clocks of file systems tick in milliseconds
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x07")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


CHANGES = pytest.mark.parametrize("change", [replace, rewrite, truncate], ids=lambda c: c.__name__)


def test_tensors_are_those_that_safetensors_loads(folder):
    reader = bound(folder)
    expected = load_file(folder / "a.safetensors") | load_file(folder / "b.safetensors")
    assert reader.dtypes().keys() == expected.keys()
    for name, tensor in expected.items():
        assert same(reader.get(name), tensor), name
        assert reader.shape(name) == tuple(tensor.shape)
        assert reader.dtype(name) == tensor.dtype
    assert reader.bytes() == sum(tensor.nbytes for tensor in expected.values())
    assert "b" in reader
    assert "nothing" not in reader


@pytest.mark.parametrize("limit", [1, 8, 100, 1 << 20])
def test_pieces_are_the_tensor_in_order(limit, folder):
    reader = bound(folder)
    for name in reader.dtypes():
        whole = reader.get(name)
        pieces = list(reader.pieces(name, limit))
        assert all(p.dim() == 1 and p.dtype == whole.dtype for p in pieces)
        assert all(0 < p.nbytes <= max(limit, whole.itemsize) for p in pieces)
        joined = torch.cat([p.view(torch.uint8) for p in pieces]) if pieces else torch.empty(0)
        assert torch.equal(joined, whole.reshape(-1).view(torch.uint8)), name


def test_a_tensor_owns_its_memory(folder):
    reader = bound(folder)
    first = reader.get("b")
    first.zero_()
    assert torch.equal(reader.get("b"), torch.arange(300.0).view(20, 15))
    shutil.rmtree(folder)
    assert first.count_nonzero() == 0


def test_no_file_stays_mapped_or_open(folder):
    reader = bound(folder)
    tensors = [reader.get(name) for name in reader.dtypes()]
    list(reader.pieces("b", 100))
    reader.hashes()
    assert str(folder) not in Path("/proc/self/maps").read_text()
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    assert not [p for p in links if os.path.islink(p) and str(folder) in os.readlink(p)]
    assert len(tensors) > 50


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_does_not_grow_with_what_was_read(tmp_path):
    size = 16 << 20
    tensors = {f"w{i}": torch.full((size,), i, dtype=torch.uint8) for i in range(12)}
    write_folder(tmp_path / "large", {"model.safetensors": tensors})
    del tensors
    reader = CheckpointReader(tmp_path / "large")
    reader.bind(Bag({f"w{i}": torch.empty(size, device="meta") for i in range(12)}))
    reader.get("w0")
    before = resident()
    for i in range(12):
        assert reader.get(f"w{i}")[-1] == i
        assert sum(int(piece[0]) for piece in reader.pieces(f"w{i}", size // 4)) == 4 * i
    # malloc keeps what was freed, a tensor or two; a mapping would have all twelve resident
    assert resident() - before < 5 * size


def test_without_cuda_pinning_is_left_out(folder):
    assert bound(folder).get("b", pin=True).is_pinned() == torch.cuda.is_available()


@CHANGES
def test_a_file_that_changed_is_noticed_by_get(change, folder):
    reader = bound(folder)
    reader.get("b")
    change(folder / "b.safetensors")
    with pytest.raises(InputError, match=rf"b\.safetensors: {CHANGED}") as caught:
        reader.get("b")
    assert "\n" not in str(caught.value)
    reader.get("a.float32.5x7")  # the other file is as it was


@CHANGES
def test_a_file_that_changed_is_noticed_by_pieces(change, folder):
    reader = bound(folder)
    if change is not replace:  # an open file is still there, whatever has its name
        pieces = reader.pieces("b", 400)
        next(pieces)
        change(folder / "b.safetensors")
        with pytest.raises(InputError, match=CHANGED + r"|ends at byte"):
            list(pieces)
    else:
        change(folder / "b.safetensors")
    with pytest.raises(InputError, match=CHANGED):
        list(reader.pieces("b", 400))


@CHANGES
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_file_that_changed_is_noticed_by_hashes(when, change, folder):
    reader = bound(folder)
    if when == "after":
        reader.hashes()
    change(folder / "b.safetensors")
    for _ in range(2):
        with pytest.raises(InputError, match=rf"b\.safetensors: {CHANGED}"):
            reader.hashes()


def test_a_file_that_changes_while_it_is_hashed_is_noticed(folder, monkeypatch):
    reader = bound(folder)
    real = identity_module.read_into

    def read_into(path: Path, handle: int, buffer: memoryview, offset: int) -> None:
        real(path, handle, buffer, offset)
        if path.name == "b.safetensors" and offset == 0:
            rewrite(path)

    monkeypatch.setattr(identity_module, "read_into", read_into)
    with pytest.raises(InputError, match=CHANGED):
        reader.hashes()


def test_a_file_replaced_between_its_validation_and_its_header_is_noticed(folder, monkeypatch):
    from liar_ext.checkpoint import reader as reader_module

    real = reader_module.safe_open

    def safe_open(path: Path, **options: object) -> object:
        replace(path)
        return real(path, **options)

    monkeypatch.setattr(reader_module, "safe_open", safe_open)
    with pytest.raises(InputError, match=CHANGED):
        CheckpointReader(folder)


def test_a_read_that_comes_up_short_says_where(folder, monkeypatch):
    """A network file system may say nothing of a truncation until the data ends."""
    reader = bound(folder)
    real = os.preadv

    def preadv(handle: int, buffers: list[memoryview], offset: int) -> int:
        return real(handle, [buffers[0][:100]], offset) if offset < 700 else 0

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(InputError, match=r"b\.safetensors: ends at byte 7\d\d, before the 1200"):
        reader.get("b")


def test_reads_that_return_less_are_continued(folder, monkeypatch):
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda h, to, at: real(h, [to[0][:7]], at))
    assert torch.equal(bound(folder).get("b"), torch.arange(300.0).view(20, 15))


def test_a_disk_error_is_one_line(folder, monkeypatch):
    reader = bound(folder)

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    for act in (lambda: reader.get("b"), lambda: list(reader.pieces("b")), reader.hashes):
        with pytest.raises(InputError, match=r"safetensors: cannot be read at byte .*Input/output"):
            act()


def test_a_file_that_is_gone_is_named(folder):
    reader = bound(folder)
    (folder / "b.safetensors").unlink()
    with pytest.raises(InputError, match=r"b\.safetensors: was removed"):
        reader.get("b")
    with pytest.raises(InputError, match=r"b\.safetensors: was removed"):
        reader.hashes()


def deny(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Path, flags: int, *rest: int) -> int:
        if str(path).endswith(".safetensors"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.parametrize("when", ["at first", "later"])
def test_files_that_may_not_be_read_are_one_line(when, folder, monkeypatch):
    says = r"\.safetensors: permission denied; run as a user who may read it, or chmod"
    if when == "at first":
        deny(monkeypatch)
        with pytest.raises(InputError, match="a" + says):
            CheckpointReader(folder)
    else:
        reader = bound(folder)
        deny(monkeypatch)
        with pytest.raises(InputError, match="b" + says):
            reader.get("b")
        with pytest.raises(InputError, match=says):
            reader.hashes()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("file", ["config.json", "b.safetensors"])
def test_a_file_without_read_permission_is_named(file, folder):
    (folder / file).chmod(0)
    with pytest.raises(InputError, match=f"{file}: permission denied"):
        CheckpointReader(folder)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda raw: raw[:-1], "truncated or corrupt"),
        (lambda raw: raw[:100], "truncated or corrupt"),
        (lambda raw: raw[:3], "truncated or corrupt"),
        (lambda raw: b"", "truncated or corrupt"),
        (lambda raw: raw[:8] + b"x" + raw[9:], "truncated or corrupt"),
        (lambda raw: b"\xff" * 8 + raw[8:], "truncated or corrupt"),
    ],
    ids=["last byte", "in the header", "in the length", "empty", "no JSON", "absurd length"],
)
def test_damaged_files_are_refused_at_once(damage, says, folder):
    path = folder / "b.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=rf"b\.safetensors: {says} safetensors file .*again"):
        CheckpointReader(folder)


def test_dtypes_that_torch_does_not_have_are_refused_when_read(tmp_path):
    """Packed 4-bit floats: the folder opens, so that the message can name the tensor."""
    write_folder(tmp_path / "model", {"model.safetensors": {"w": torch.ones(4)}})
    path = tmp_path / "model" / "model.safetensors"
    header = b'{"w":{"dtype":"F4","shape":[2,16],"data_offsets":[0,16]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    reader = CheckpointReader(tmp_path / "model")
    reader.bind(Bag({"w": torch.empty(2, 16)}))
    assert reader.bytes() == 16
    for act in (reader.get, reader.dtype, lambda name: list(reader.pieces(name))):
        with pytest.raises(InputError, match=r"model\.safetensors: w is F4, quantised"):
            act("w")


@pytest.mark.parametrize("threads", [1, 4])
def test_hashes_are_sha256_of_the_whole_files(threads, folder, monkeypatch):
    monkeypatch.setattr(identity_module, "HASH_BLOCK", 100)
    reader = bound(folder)
    reader.start_hashing(threads)
    reader.start_hashing(threads)
    expected = {
        file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in reader.files()
    }
    assert reader.hashes() == reader.hashes() == expected
    assert list(expected) == ["a.safetensors", "b.safetensors"]
    with pytest.raises(ValueError, match="threads is 0"):
        bound(folder).start_hashing(0)


def test_sizes_are_what_the_files_had(folder):
    reader = CheckpointReader(folder)
    expected = {}
    for file in ("a.safetensors", "b.safetensors"):
        found = (folder / file).stat()
        expected[file] = {"size": found.st_size, "mtime_ns": found.st_mtime_ns}
    assert reader.sizes() == expected
    rewrite(folder / "b.safetensors")
    assert reader.sizes() == expected


def hashing_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "liar-ext-sha256"]


def wait_until(true: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def test_hashing_can_be_stopped_at_once_and_begun_again(tmp_path):
    """256 GiB, all of it a hole: reading it would take minutes."""
    write_folder(tmp_path / "model", {"model.safetensors": {"w": torch.ones(4)}})
    path = tmp_path / "model" / "model.safetensors"
    size = 256 << 30
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    try:
        os.truncate(path, 8 + len(header) + size)
        reader = CheckpointReader(tmp_path / "model")
    except (OSError, InputError) as error:
        pytest.skip(f"no file of 256 GiB here ({error})")
    reader.start_hashing()
    assert wait_until(lambda: len(hashing_threads()) == 1)
    assert all(thread.daemon for thread in hashing_threads()), "an exit waits for no daemon"
    waiting: list[Exception] = []

    def wait() -> None:
        try:
            reader.hashes()
        except RuntimeError as error:
            waiting.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.05)
    reader.stop_hashing()
    thread.join(10)
    assert "hashing was stopped" in str(waiting[0])
    assert wait_until(lambda: not hashing_threads())
    reader.stop_hashing()
    os.truncate(path, 8 + len(header))
    with pytest.raises(InputError, match=CHANGED):
        reader.hashes()
