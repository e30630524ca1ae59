"""Write a Hugging Face folder: complete under its name, or not at all."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from liar_ext.errors import InputError
from liar_ext.report.schema import FILE as REPORT

SHARD_BYTES = 2 * 1024**3
# weights are rewritten, reports of an earlier compression do not describe this one
NOT_COPIED = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx"),
    *(".onnx_data", ".gguf", ".tflite", ".ot", ".npz"),
)
# a folder is made before it is locked
YOUNG_SECONDS = 60.0
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
REWRITTEN = (
    *("config.json", "README.md", "recipe.json", REPORT, "report.html"),
    "liar_search.jsonl",
)


@contextmanager
def output_folder(out: Path, source: Path | None, *, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling of `out` to write into; renamed to `out` if the block succeeds.

    On any exception, Ctrl-C included, the temporary folder is removed and `out` is as before.

    Raises:
        InputError: `out` exists (without `overwrite`), overlaps the source, or cannot be made.
    """
    check_output(out, source, overwrite=overwrite)
    out = Path(os.path.abspath(out))
    sweep(out)
    made = [p for p in out.parents if not p.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror})") from error
    lock = _locked(temporary)
    try:
        with writing(out, temporary):
            yield temporary
            usual_permissions(temporary)
            put_in_place(temporary, out)
    finally:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(temporary, ignore_errors=True)
        if not out.exists():
            # somebody else may have put something there; that must not hide the first error
            with suppress(OSError):
                for parent in made:
                    parent.rmdir()


def sweep(out: Path) -> None:
    """Remove what processes that were killed have left of this output: folders that nobody holds a
    lock on, where the file system has locks, and that are not just being made."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime < YOUNG_SECONDS:
                continue
            if (lock := _locked(folder)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _locked(folder: Path) -> int | None:
    """A lock on a folder until it is closed; None where another process has it, or none is to be
    had."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


@contextmanager
def writing(out: Path, folder: Path) -> Iterator[None]:
    """Turn what goes wrong with files in `folder`, on the way to `out`, into an InputError."""
    try:
        yield
    except OSError as error:
        # a write that fails halfway may name no file
        mine = error.filename is not None and Path(error.filename).is_relative_to(folder)
        if mine or error.errno in DISK_IS_FULL:
            raise InputError(f"--out {out}: writing failed ({error.strerror})") from error
        raise


def check_output(out: Path, source: Path | None, *, overwrite: bool) -> None:
    """Raise InputError if `out` may not be written; touches nothing.

    `overwrite` replaces what this package wrote, and empty folders: never somebody's home.
    """
    if str(out) in ("", "."):
        raise InputError(f"--out {str(out)!r}: is the working folder; give a new folder")
    out = Path(os.path.realpath(out))
    if source is not None:
        origin = Path(os.path.realpath(source))
        if out == origin or out.is_relative_to(origin) or origin.is_relative_to(out):
            raise InputError(f"--out {out}: overlaps the source {origin}; give another folder")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; give a folder name")
    if out.exists() and not overwrite:
        raise InputError(f"--out {out}: exists; give another folder or --overwrite")
    if out.exists() and any(out.iterdir()) and not (out / REPORT).exists():
        raise InputError(
            f"--out {out}: holds no {REPORT}, so it is not a result of `liar prune`; "
            "--overwrite does not replace it, give another folder"
        )
    parent = out.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"--out {out}: {parent} is not a folder this user can write to")


def usual_permissions(folder: Path) -> None:
    """mkdtemp makes private folders; the result gets what plain writing would."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def put_in_place(temporary: Path, out: Path) -> None:
    """Rename a complete folder to `out`; what is there is removed after."""
    if not out.exists():
        temporary.rename(out)
        return
    # a folder cannot be replaced in one step: move the old one aside, and back if that fails
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
    try:
        out.rename(old / out.name)
        temporary.rename(out)
    except BaseException:
        if not out.exists():
            (old / out.name).rename(out)
        raise
    finally:
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def copy_other_files(source: Path, target: Path) -> None:
    """Tokenizer, generation config, licences and the like: not weights nor what is rewritten."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        weights = path.suffix in NOT_COPIED or path.name.endswith(".index.json")
        if hidden or path.is_dir() or weights or str(relative) in REWRITTEN:
            continue
        (target / relative.parent).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / relative)


def storage_dtype(name: str, stored: torch.dtype) -> torch.dtype:
    """The dtype `--dtype` asks for, or the one the checkpoint has."""
    return stored if name == "auto" else getattr(torch, name)
