"""Which tensors of the files are those of a model, and which are left over."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from liar_ext.checkpoint.names import candidates, library_names
from liar_ext.errors import InputError

# buffers that old checkpoints hold, of every layer, and that the model now makes for itself: left
# out where the model has one of that name anywhere, as transformers does (Pythia, first LLaMAs)
MOVED = ("rotary_emb.inv_freq", "position_ids")


@dataclass(frozen=True)
class KeptLayers:
    """A model of some layers of the files.

    Attributes:
        path: of the list of layers in the model; indices: for each of its layers, that in the
            files.
    """

    path: str
    indices: tuple[int, ...]

    def stored_name(self, name: str) -> str:
        """The name that a tensor of the model has where all layers are in the files."""
        if not name.startswith(f"{self.path}."):
            return name
        at, _, rest = name.removeprefix(f"{self.path}.").partition(".")
        return f"{self.path}.{self.indices[int(at)]}.{rest}"


def matched(
    model: PreTrainedModel,
    stored: Mapping[str, tuple[int, ...]],
    folder: Path,
    *,
    kept: KeptLayers | None,
    whole: Mapping[str, str],
) -> dict[str, str]:
    """The stored name of every parameter and persistent buffer of an (empty) model; of what is
    tied to another one none is needed.

    Args:
        stored: the shapes of the files' tensors; folder: of the files, for messages.
        kept: which layers of the files the model has; None for all.
        whole: what was found for the model of all layers, for names that only transformers' own
            rules explain.
    Raises:
        InputError: a tensor is missing or its shape contradicts the config.
    """
    tied = tied_names(model)
    found: dict[str, str] = {}
    missing = []
    rules: tuple[dict[str, str], dict[str, str]] | None = None
    for name, expected in model.state_dict().items():
        own = name if kept is None else kept.stored_name(name)
        there = next((c for c in candidates(own, model.base_model_prefix) if c in stored), None)
        if there is None:
            there = whole.get(own)
        if there is None and name not in tied and kept is None:
            # only here: the usual names need no knowledge of a release's renamings
            rules = library_names(model, list(stored)) if rules is None else rules
            there = rules[0].get(name)
        if there is None:
            if name not in tied:
                missing.append(name)
            continue
        if stored[there] != tuple(expected.shape):
            raise InputError(
                f"{folder}: {there} has shape {stored[there]}, config.json implies "
                f"{tuple(expected.shape)}; the config does not belong to these weights"
            )
        found[name] = there
    for name in [name for name in missing if name in tied.values()]:
        # as transformers does: what it is tied to stands for it
        alike = next((own for own, of in tied.items() if of == name and own in found), None)
        if alike is not None:
            found[name] = found[alike]
            missing.remove(name)
    _refuse_missing(model, missing, {} if rules is None else rules[1], folder)
    return found


def _refuse_missing(
    model: PreTrainedModel, missing: Collection[str], computed: Mapping[str, str], folder: Path
) -> None:
    for name in missing:
        if name in computed:
            raise InputError(
                f"{folder}: {name} is not in the checkpoint, which has {computed[name]} "
                "instead, stored in another layout (fused or transposed) that only "
                "transformers takes apart: load it with from_pretrained, then liar_ext.prune "
                "and liar_ext.save"
            )
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} tensors of {type(model).__name__} are not in the "
            f"checkpoint, first {next(iter(missing))}; check architectures and num_hidden_layers "
            "in config.json, or complete the download"
        )


def left_over(
    model: PreTrainedModel,
    stored: Collection[str],
    used: Collection[str],
    kept: KeptLayers | None,
) -> list[str]:
    """The tensors of the files that a model does not have, sorted.

    Args:
        stored: all in the files; used: those that were matched; kept: as for `matched`.
    """
    prefix = model.base_model_prefix
    # buffers that modules now make themselves (position ids, causal masks) are no loss
    made = [name for name, _ in model.named_buffers()]
    ignored = [
        *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
        *(rf"{re.escape(end)}$" for end in MOVED if any(name.endswith(end) for name in made)),
    ]
    buffers = {c for name in made for c in candidates(name, prefix)}
    found = set(stored) - set(used) - buffers
    if kept is not None:
        # what is of layers that are not kept is no loss
        out = tuple(candidates(f"{kept.path}.", prefix))
        found = {name for name in found if not name.startswith(out)}
    return sorted(n for n in found if not any(re.search(p, n) for p in ignored))


def computed_in(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """What a parameter is computed in where the others are in `dtype`: float32 for those that its
    class keeps so in float16 (T5's `wo`, whose outputs pass what float16 can hold), as transformers
    loads them."""
    wide = getattr(model, "_keep_in_fp32_modules", None) or ()
    kept = dtype == torch.float16 and not set(wide).isdisjoint(name.split("."))
    return torch.float32 if kept else dtype


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Parameters that are another one's alias, and whose: as transformers knows it of the model and
    the models in it, by their configs."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})
