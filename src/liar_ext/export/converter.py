"""llama.cpp's own converter: where it is, and running it in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from liar_ext.errors import InputError
from liar_ext.export import _run_converter

NAME = "convert_hf_to_gguf.py"


def find_converter(given: str | None) -> Path:
    """The converter: `given`, or the one on PATH.

    Args:
        given: the file, or a folder of llama.cpp's sources.
    Raises:
        InputError: there is none.
    """
    if given is None:
        found = shutil.which(NAME)
        if found is None:
            raise InputError(
                f"--format gguf: no {NAME} on PATH; give --converter PATH, a checkout of llama.cpp "
                "(the source package of llama-cpp-python on PyPI has one, in vendor/llama.cpp)"
            )
        return Path(found).resolve()
    path = Path(given).expanduser()
    path = path / NAME if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"--converter {given}: no {NAME} there")
    return path.resolve()


def convert(
    converter: Path, folder: Path, file: Path, arguments: Sequence[str], pre: str | None
) -> None:
    """Make a GGUF file of a stock folder.

    Args:
        pre: llama.cpp's name of the tokenizer's pre-tokenizer; None leaves it to llama.cpp's list.
    Raises:
        InputError: the converter fails; says why, as far as it says so itself.
    """
    command = [
        *(sys.executable, "-P", str(Path(_run_converter.__file__)), str(converter), pre or ""),
        *(str(folder), "--outfile", str(file), *arguments),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=dict(os.environ), check=False
    )
    if done.returncode or not file.is_file():
        raise InputError(f"{converter}: {_reason(done.stderr or done.stdout, folder, pre)}")


def _reason(said: str, folder: Path, pre: str | None) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = lines[-1] if lines else "said nothing"
    if "pre-tokenizer was not recognized" in last:
        known = (
            "tokenizer.json is of GPT-2's: --pre-tokenizer gpt-2"
            if is_gpt2(folder)
            else "say which of llama.cpp's it is (src/llama-vocab.cpp) with --pre-tokenizer NAME"
        )
        return f"does not know this tokenizer's pre-tokenizer, by a hash; {known}"
    if last.startswith("ModuleNotFoundError"):
        return f"needs a package that is not installed here ({last})"
    return f"failed ({last[:200]})"


def is_gpt2(folder: Path) -> bool:
    """Whether a folder's tokenizer splits text as GPT-2's does, whatever its vocabulary."""
    try:
        data: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    own = data.get("pre_tokenizer") or {}
    return (
        data.get("normalizer") is None
        and own.get("type") == "ByteLevel"
        and own.get("use_regex", True)
        and not own.get("add_prefix_space", True)
    )
