"""The calibration tokens of a plan: how many there are, and whether they are enough."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from liar_ext.calibration.batches import check_enough, tokens_needed
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
from liar_ext.models import adapter_for, text_config
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
        shapes = [batch.input_ids.shape for batch in found.batches]
        return Tokens(
            found.tokens,
            positions=sum(shape.numel() for shape in shapes),
            samples=found.samples,
            seq_len=max(shape[1] for shape in shapes),
            batch=max(shape.numel() for shape in shapes),
            segments=segments(found.batches, least_segments(recipe))[-1] + 1,
            counted=True,
            held_out=held_out_tokens(found.batches, recipe),
        )
    length = adapter.window(text_config(model.config), recipe.seq_len)
    if not recipe.reads_text:
        return Tokens(0, 0, 0, length, 1, 1, True)
    total = recipe.samples * length
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
    return Tokens(total, total, recipe.samples, length, batch * length, parts, False, held)


def tokens_needed_by(sites: Sequence[SitePlan], tokens: Tokens, recipe: Recipe) -> dict[str, Any]:
    """Tokens that the widest Site needs, and what is wrong with those there are."""
    solved = [s for s in sites if s.across or RECONSTRUCTIONS[recipe.reconstruct].solves]
    if not solved:
        return {"minimum": 1, "recommended": 1, "problem": None}
    width = max(site.columns_before for site in solved)
    try:
        problem = check_enough(tokens.tokens, width, tokens.held_out)
    except InputError as error:
        problem = str(error)
    least, recommended = tokens_needed(width, tokens.tokens, tokens.held_out)
    return {"minimum": least, "recommended": recommended, "problem": problem}
