"""Read a Hugging Face folder tensor by tensor, read-only, with everything checked up front."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from liar_ext.errors import InputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1} | {
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# names that only old checkpoints use, and the ones modules have had since
LEGACY = ((".LayerNorm.weight", ".LayerNorm.gamma"), (".LayerNorm.bias", ".LayerNorm.beta"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint; InputError names the file and what is wrong."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing; {path.parent} is not a complete checkpoint") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: must hold a JSON object, not {type(data).__name__}")
    return data


class CheckpointReader:
    """The tensors of a folder's safetensors files.

    Attributes:
        folder: the checkpoint; config: its `config.json`.
    Raises:
        InputError: no or truncated or corrupt safetensors, an index that names what is not there,
            or only pickle files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / "config.json")
        if "model_type" not in self.config:
            raise InputError(f"{folder / 'config.json'}: no model_type; not a transformers model")
        self._files: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        index = folder / INDEX
        # the order in which transformers looks, for folders that have both
        if (folder / SINGLE).exists():
            self._where = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        elif index.exists():
            self._open_index(index)
        else:
            raise InputError(_nothing_to_read(folder))
        self._names: dict[str, str] = {}

    def _open_index(self, index: Path) -> None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{index}: no weight_map; download the index again")
        for name, file in weight_map.items():
            if not isinstance(file, str):
                raise InputError(f"{index}: {name} is in {file!r}, which is no file name")
            if file not in self._files and not (self.folder / file).exists():
                raise InputError(f"{self.folder / file}: missing; {INDEX} names it")
            if name not in self._open(file).keys():  # noqa: SIM118  (safe_open is no mapping)
                raise InputError(f"{self.folder / file}: has no tensor {name}, but {INDEX} says so")
            self._where[name] = file

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self.folder / file
            try:
                self._files[file] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"{path}: truncated or corrupt safetensors file ({error}); download it again"
                ) from error
        return self._files[file]

    def bind(self, model: PreTrainedModel) -> list[str]:
        """Match the files to the parameters and persistent buffers of an (empty) model.

        Returns:
            tensors of the files that the model does not have.
        Raises:
            InputError: a tensor is missing or its shape contradicts the config.
        """
        tied = tied_names(model)
        prefix = model.base_model_prefix
        missing = []
        renamed: dict[str, str] | None = None
        for name, expected in model.state_dict().items():
            found = next((c for c in _candidates(name, prefix) if c in self._where), None)
            if found is None and name not in tied:
                # only here: the usual names need no knowledge of a release's renamings
                renamed = _library_names(model, list(self._where)) if renamed is None else renamed
                found = renamed.get(name)
            if found is None:
                if name not in tied:
                    missing.append(name)
                continue
            shape = tuple(self._slice(found).get_shape())
            if shape != tuple(expected.shape):
                raise InputError(
                    f"{self.folder}: {found} has shape {shape}, config.json implies "
                    f"{tuple(expected.shape)}; the config does not belong to these weights"
                )
            self._names[name] = found
        if missing:
            raise InputError(
                f"{self.folder}: {len(missing)} tensors of {type(model).__name__} are not in the "
                f"checkpoint, first {missing[0]}; check architectures and num_hidden_layers in "
                "config.json, or complete the download"
            )
        # buffers that modules now make themselves (position ids, causal masks) are no loss
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        buffers = {c for name, _ in model.named_buffers() for c in _candidates(name, prefix)}
        left_over = set(self._where) - set(self._names.values()) - buffers
        return sorted(n for n in left_over if not any(re.search(p, n) for p in ignored))

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def get(self, name: str) -> Tensor:
        """The tensor of a model parameter, on the CPU in the file's dtype."""
        stored = self._names[name]
        try:
            return self._open(self._where[stored]).get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.folder}: {stored} cannot be read ({error})") from error

    def dtypes(self) -> dict[str, str]:
        """The dtype of each model parameter as safetensors names it (`BF16`)."""
        return {name: self._slice(own).get_dtype() for name, own in self._names.items()}

    def main_dtype(self) -> torch.dtype:
        """The floating dtype most parameters have: layers run in one dtype.

        Raises:
            InputError: none is a float, so the weights are quantised.
        """
        counts = Counter(DTYPES[name] for name in self.dtypes().values() if name in DTYPES)
        if not counts:
            raise InputError(
                f"{self.folder}: no float tensors; quantised weights are not supported"
            )
        return counts.most_common(1)[0][0]

    def bytes(self) -> int:
        """Bytes of the tensors that belong to the model."""
        return sum(
            math.prod(self._slice(stored).get_shape())
            * DTYPE_BYTES[self._slice(stored).get_dtype()]
            for stored in set(self._names.values())
        )

    def _slice(self, stored: str) -> Any:
        return self._open(self._where[stored]).get_slice(stored)


def tied_names(model: PreTrainedModel) -> set[str]:
    """Parameters that are another one's alias when the config ties embeddings."""
    config = model.config.get_text_config()
    if not (getattr(config, "tie_word_embeddings", False) or model.config.tie_word_embeddings):
        return set()
    return set(getattr(model, "_tied_weights_keys", None) or ())


def _candidates(name: str, prefix: str) -> list[str]:
    """How a checkpoint may call a parameter: as the model, or with or without the base prefix."""
    names = [name, f"{prefix}.{name}"]
    if name.startswith(f"{prefix}."):
        names.append(name.removeprefix(f"{prefix}."))
    for new, old in LEGACY:
        names += [n.removesuffix(new) + old for n in names if n.endswith(new)]
    return names


def _library_names(model: PreTrainedModel, stored: list[str]) -> dict[str, str]:
    """Model name -> stored name, by the renamings transformers itself applies when it loads.

    Nested models (LLaVA) are stored under the names they had before transformers 5.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:
        return {}  # an older release: the missing names are then reported as they are
    rules = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    expected = model.state_dict()
    prefix = model.base_model_prefix
    return {rename_source_key(name, rules, [], prefix, expected)[0]: name for name in stored}


def _nothing_to_read(folder: Path) -> str:
    pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    if not pickles:
        return f"{folder}: neither {SINGLE} nor {INDEX}; give a folder with safetensors weights"
    return (
        f"{folder}: only pickle weights ({pickles[0]}), which can run code when loaded and are "
        "refused; if you trust them, convert once with AutoModel.from_pretrained(DIR)"
        ".save_pretrained(NEW) in a sandbox (torch loads them with weights_only=True)"
    )
