"""What a compression is given, checked and loaded: calibration, tokenizer, device, dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from liar_ext.calibration.batch import Batch, cut_to
from liar_ext.calibration.batches import NO_CALIBRATION, Calibration, make_batches
from liar_ext.calibration.features import feature_batches
from liar_ext.calibration.pairs import pair_batches, start_token
from liar_ext.calibration.sources import read
from liar_ext.checkpoint.reader import read_config
from liar_ext.engine.statistics import least_segments
from liar_ext.errors import InputError
from liar_ext.models import adapter_for, layout, text_config
from liar_ext.ops import backends
from liar_ext.ops.solve import working_dtype
from liar_ext.recipe import Recipe


def load_calibration(folder: Path, model: PreTrainedModel, recipe: Recipe) -> Calibration:
    """The recipe's calibration tokens for the model in `folder`; none where it needs none.

    Raises:
        InputError: no or unusable calibration text, or no tokenizer.
    """
    if not recipe.reads_text:
        return NO_CALIBRATION
    if recipe.calibration is None:
        without = "" if recipe.narrows or not recipe.spans else ", or --span-repair none"
        raise InputError(
            f"--calibration is missing: give a .txt, .jsonl, .csv or token file{without}"
        )
    text = text_config(model.config)
    adapter = adapter_for(model.config)
    if adapter.features is not None:
        found = feature_batches(
            recipe.calibration,
            folder,
            adapter.features.name,
            shape=adapter.features.shape(text),
            length=adapter.features.length(text),
            samples=recipe.samples,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
        )
        return replace(found, batches=fit_to(found.batches, recipe))
    corpus = read(recipe.calibration)
    tokenizer = None if corpus.tokens is not None else load_tokenizer(folder)
    options: dict[str, Any] = {
        "samples": recipe.samples,
        "seq_len": min(recipe.seq_len, adapter.max_positions(text)),
        "batch_size": recipe.batch_size,
        "seed": recipe.seed,
        "vocab_size": text.vocab_size,
    }
    if adapter.then is not None:
        found = pair_batches(corpus, tokenizer, start=start_token(text), **options)
    else:
        found = make_batches(corpus, tokenizer, packed=adapter.decoder, **options)
    return replace(found, batches=fit_to(found.batches, recipe))


def fit_to(batches: Sequence[Batch], recipe: Recipe) -> tuple[Batch, ...]:
    """The batches, cut smaller where too few of them could be held out to choose a ridge.

    Raises:
        InputError: there is only one sequence.
    """
    found = cut_to(batches, least_segments(recipe))
    if recipe.chooses_ridge and len(found) < 2:
        raise InputError(
            f"--ridge {recipe.ridge}: holds out some of the calibration samples, and there is only "
            f"{len(found)}; raise --samples, or give a number"
        )
    return found


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, from local files only.

    Raises:
        InputError: there is none, or transformers cannot use it.
    """
    # with its config given, transformers does not stumble over model_type liar_ext
    config = layout.config_object(layout.base_data(read_config(folder)))
    try:
        # a folder must not be able to run code, nor to ask for it
        return AutoTokenizer.from_pretrained(
            folder, config=config, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        # the library raises whatever a damaged file makes of its parsers, also plain Exception
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{folder}: no usable tokenizer ({reason}); copy tokenizer.json and "
            "tokenizer_config.json there from the model that it was made of"
        ) from error


def check_backends(device: torch.device) -> None:
    """Before any work: what `LIAR_BACKEND` forces has to run here.

    Raises:
        BackendError: it cannot, or the setting means nothing.
    """
    if backends.forced("gram") is not None:
        backends.select("gram", device, torch.float32)
    if backends.forced("solve") is not None:
        backends.select("solve", device, working_dtype("auto", device))


def chosen_backends(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What runs each op on activations of `dtype`; a kernel that failed its self-test is not it."""
    return {
        "gram": backends.select("gram", device, dtype).backend,
        "solve": backends.select("solve", device, working_dtype("auto", device)).backend,
    }


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one. Raises InputError for a forced GPU that is missing."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def compute_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """None is the checkpoint's main one. On a CPU `auto` is float32, exact for bf16 files."""
    if name != "auto":
        return getattr(torch, name)
    return torch.float32 if device.type == "cpu" else None
