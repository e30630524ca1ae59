"""The calibration tokens of a plan: how many there are, and whether they are enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from liar_ext.calibration.batch import shares
from liar_ext.calibration.batches import check_enough, of_stack, tokens_needed
from liar_ext.calibration.pairs import INSTEAD, WINDOWS
from liar_ext.calibration.sources import refuse_missing_path
from liar_ext.costs import SitePlan, Tokens
from liar_ext.engine.inputs import load_calibration
from liar_ext.engine.statistics import (
    CHUNK_TOKENS,
    MOST_SEGMENTS,
    held_out,
    held_out_tokens,
    least_segments,
    segments,
)
from liar_ext.errors import InputError
from liar_ext.models import Adapter, adapter_for, text_config
from liar_ext.recipe import Recipe
from liar_ext.reconstruction import RECONSTRUCTIONS


def tokens_of(
    folder: Path, model: PreTrainedModel, recipe: Recipe, complete: bool, notes: list[str]
) -> Tokens:
    """Counted from a local calibration file where there is one, else what the recipe allows; none
    where it needs none."""
    adapter = adapter_for(model.config)
    if recipe.calibration is not None:
        refuse_missing_path(recipe.calibration)
    counted = complete and recipe.reads_text and recipe.calibration is not None
    # a folder is a data set, but for models that read images or sound
    if counted and (
        Path(str(recipe.calibration)).is_file()
        or (adapter.features is not None and Path(str(recipe.calibration)).is_dir())
    ):
        found = load_calibration(folder, model, recipe)
        if found.form == WINDOWS:
            notes.append(f"warning: calibrated on {WINDOWS}; {INSTEAD}")
        shapes = [batch.input_ids.shape for batch in found.batches]
        return Tokens(
            found.tokens,
            positions=sum(shape.numel() for shape in shapes),
            samples=found.samples,
            seq_len=max(batch.longest for batch in found.batches),
            batch=max(shape.numel() for shape in shapes),
            segments=segments(found.batches, least_segments(recipe))[-1] + 1,
            counted=True,
            held_out=held_out_tokens(found.batches, recipe),
            shares=shares(found.batches),
        )
    length = adapter.window(text_config(model.config), recipe.seq_len)
    if not recipe.reads_text:
        return Tokens(0, 0, 0, length, 1, 1, True)
    stacks = len(adapter.chain(model).stacks)
    total = recipe.samples * length * stacks
    short = "" if adapter.decoder else "; an encoder's texts are mostly much shorter"
    notes.append(
        f"calibration not counted: {recipe.samples} samples of {length} tokens assumed{short}"
    )
    least = least_segments(recipe)
    # batches are cut smaller where there would be fewer
    batch = min(recipe.batch_size, -(-recipe.samples // least))
    parts = min(MOST_SEGMENTS, max(total // CHUNK_TOKENS, least), -(-recipe.samples // batch))
    parts = max(1, parts)
    held = total * len(held_out(parts)) // parts if recipe.chooses_ridge else 0
    return Tokens(
        *(total, total, recipe.samples, length, batch * length * stacks, parts, False, held),
        shares=(1 / stacks,) * stacks,
    )


def features_bytes(model: PreTrainedModel, adapter: Adapter, tokens: Tokens) -> int:
    """Bytes of what a model is calibrated on that reads no tokens, which waits in float32; tokens
    themselves are next to nothing."""
    if adapter.features is None:
        return 0
    sample = math.prod(adapter.features.shape(text_config(model.config)))
    return tokens.samples * sample * torch.float32.itemsize


def tokens_needed_by(sites: Sequence[SitePlan], tokens: Tokens, recipe: Recipe) -> dict[str, Any]:
    """Tokens that the widest Site needs, and what is wrong with those there are."""
    solved = [s for s in sites if s.across or RECONSTRUCTIONS[recipe.reconstruct].solves]
    if not solved:
        return {"minimum": 1, "recommended": 1, "problem": None}
    # where stacks read other tokens, the Site that has fewest for its columns
    worst = max(solved, key=lambda site: site.columns_before / tokens.shares[site.stack])
    share = tokens.shares[worst.stack]
    width = worst.columns_before
    own, held = round(tokens.tokens * share), round(tokens.held_out * share)
    whose = of_stack(worst.stack, len(tokens.shares), tokens.tokens)
    try:
        problem = check_enough(own, width, held, whose)
    except InputError as error:
        problem = str(error)
    # of all tokens, so that the stack which has fewest has these
    least, recommended = (math.ceil(number / share) for number in tokens_needed(width, own, held))
    return {"minimum": least, "recommended": recommended, "problem": problem}
