"""`liar_ext.prune`, `liar_ext.save`: a model that is in memory already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from liar_ext.calibration.batch import Batch
from liar_ext.calibration.features import check_features
from liar_ext.checkpoint.reader import parameter_count, tied_names
from liar_ext.checkpoint.shards import ShardWriter, TensorSpec
from liar_ext.checkpoint.writer import output_folder
from liar_ext.depth.choice import choose
from liar_ext.depth.config import remapped
from liar_ext.depth.surgery import adopt, surgery
from liar_ext.engine.clock import Clock
from liar_ext.engine.compression import Compression, few_tokens, write_records
from liar_ext.engine.inputs import check_backends, chosen_backends, fit_to
from liar_ext.engine.paths import paths_for
from liar_ext.engine.progress import Progress, Silent
from liar_ext.engine.runtime import Runtime
from liar_ext.engine.source import with_trace
from liar_ext.engine.spans import LeftOut
from liar_ext.engine.store import InMemory
from liar_ext.errors import InputError
from liar_ext.evaluation.mode import inference
from liar_ext.models import Adapter, adapter_for, layout, text_config
from liar_ext.models.traced import KEY as TRACE
from liar_ext.recipe import Recipe
from liar_ext.report import Report

# of an encoder-decoder
_DECODER = "decoder_input_ids"


def prune(
    model: PreTrainedModel,
    batches: Iterable[Batch | Mapping[str, Tensor] | Tensor],
    recipe: Recipe,
    *,
    progress: Progress | None = None,
    trace: bool = False,
) -> Report:
    """Prune a model in memory, in place.

    Args:
        model: a supported transformers model; it stays on its device and in its dtype.
        batches: calibration tokens: `Batch`, a mapping with `input_ids` and optionally
            `attention_mask`, or a (b, t) tensor of ids; of a model that reads something else, that:
            a mapping with `pixel_values` (b, c, h, w) or `input_features` (b, mel, frames), or the
            tensor; of an encoder-decoder a mapping with `decoder_input_ids`, too (and optionally
            `decoder_attention_mask`).
        recipe: what to do; its calibration, device and dtype fields are not used. One that leaves
            out layers puts modules of its own in the place of the model's.
        trace: of a family without an adapter, find the Sites by running its layers.
    Returns:
        the Report. `model.config` is updated; write the model with `liar_ext.save`.
    Raises:
        InputError: an unsupported model, too few tokens, NaN or infinite weights or activations.
            A failure after the first Site leaves the model partly pruned.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"a {type(model).__name__} is no transformers model")
    if hasattr(model.config, layout.KEY):
        raise InputError("this model has shapes of its own already; prune the dense model instead")
    _adopt(model, recipe, trace)
    adapter = adapter_for(model.config)
    prepared = tuple(_batch(batch, adapter, text_config(model.config)) for batch in batches)
    if not prepared:
        raise InputError("no calibration batches; give at least one")
    prepared = fit_to(prepared, recipe)
    check_backends(model.device)
    calibration = {
        "source": "memory",
        "samples": sum(b.input_ids.shape[0] for b in prepared),
        "tokens": sum(b.tokens for b in prepared),
    }
    # the class that is here, whatever checkpoint it was made from: the folder is loaded as it
    dense = model.config.to_dict() | {"architectures": [type(model).__name__]}
    name, parameters = str(model.name_or_path or type(model).__name__), parameter_count(model)
    short, choice = model, None
    with inference(model):
        clock = Clock(model.device)
        if recipe.shortens:
            whole = Runtime(InMemory(model), model.device, clock, progress or Silent())
            paths_for(recipe, whole.adapter, model.config)  # refuses by name
            few_tokens(whole.store, recipe, prepared, sum(b.tokens for b in prepared))
            choice = choose(recipe, whole, prepared)
            # another tree over the same tensors: the model stays whole until all is done
            dense, short = remapped(dense, choice.kept), surgery(model, choice.kept)
        run = Compression(InMemory(short), dense, recipe, model.device, progress)
        run.clock = clock
        # the embeddings' dtype is that of a model in memory
        run.facts["backends"] = chosen_backends(model.device, model.dtype)
        if choice is not None:
            run.layers = choice.to_json()
            run.left_out = LeftOut(whole, choice.gaps) if recipe.spans else None
        report = run.run(prepared, name, calibration)
    report.totals["parameters_before"] = parameters
    layout.update(short.config, report.config)
    layout.place_in_cache(short)
    if short is not model:
        adopt(model, short.train(model.training))
    return report


def save(
    model: PreTrainedModel, out: str | Path, report: Report, *, overwrite: bool = False
) -> None:
    """Write a model pruned by `prune` as a folder, as `compress` would.

    Tokenizer files are the caller's to save beside it.
    """
    with output_folder(Path(out), None, overwrite=overwrite) as temporary:
        tied = tied_names(model)
        tensors = {n: tensor for n, tensor in model.state_dict().items() if n not in tied}
        specs = [TensorSpec(n, tuple(t.shape), t.dtype) for n, t in tensors.items()]
        writer = ShardWriter(temporary, specs)
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish()
        if model.can_generate():
            model.generation_config.save_pretrained(temporary)
        write_records(temporary, report)


def _adopt(model: PreTrainedModel, recipe: Recipe, trace: bool) -> None:
    """Put what a trace says into the model's config, or refuse one of earlier."""
    if not trace and hasattr(model.config, TRACE):
        raise InputError("this model's Sites were traced; give trace=True to trace them again")
    if trace:
        data = with_trace(model.config.to_dict(), recipe.target)
        if TRACE in data:
            setattr(model.config, TRACE, data[TRACE])


def _tokens(ids: Tensor, mask: Tensor | None) -> Batch:
    ones = torch.ones(ids.shape, dtype=torch.bool)
    return Batch(ids.cpu(), ones if mask is None else mask.cpu().bool())


def _batch(
    batch: Batch | Mapping[str, Tensor] | Tensor, adapter: Adapter, config: PretrainedConfig
) -> Batch:
    features = adapter.features
    name = "input_ids" if features is None else features.name
    if isinstance(batch, Tensor):
        batch = {name: batch}
    if not isinstance(batch, Batch):
        ids = batch.get(name) if isinstance(batch, Mapping) else None
        if not isinstance(ids, Tensor):
            raise InputError(
                f"a calibration batch is a {type(batch).__name__}; give a Batch, a tensor of "
                f"{name}, or a mapping with {name}"
            )
        if features is not None:
            check_features("a calibration batch", name, ids, features.shape(config))
            return Batch.of_features({name: ids.cpu()}, features.length(config))
        mapping, batch = batch, _tokens(ids, batch.get("attention_mask"))
        if adapter.then is not None and isinstance(own := mapping.get(_DECODER), Tensor):
            batch = Batch.of_pair(batch, _tokens(own, mapping.get("decoder_attention_mask")))
    if name not in (batch.features or {"input_ids"}):
        raise InputError(f"a Batch has no {name}, which {adapter.model_type} reads")
    if adapter.then is None and batch.cut:
        raise InputError(
            f"a calibration batch is a pair, and this {adapter.model_type} model has no decoder; "
            "give what its encoder reads"
        )
    if adapter.then is not None and not batch.cut:
        raise InputError(
            f"a calibration batch has no {_DECODER}, which {adapter.model_type} needs; give a "
            "mapping with them, or a Batch.of_pair"
        )
    vocabulary = config.vocab_size if features is None else None
    if vocabulary and batch.input_ids.numel() and not 0 <= int(batch.input_ids.max()) < vocabulary:
        raise InputError(
            f"token id {int(batch.input_ids.max())} is outside the model's vocabulary of "
            f"{vocabulary}; use the model's own tokenizer"
        )
    return batch
