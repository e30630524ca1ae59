"""`liar grow`: a checkpoint with more layers, all of it or nothing."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from liar_ext.calibration.sources import read
from liar_ext.checkpoint.load import resolve
from liar_ext.checkpoint.reader import CheckpointReader, left_over_warnings, parameter_count
from liar_ext.checkpoint.shards import ShardWriter, TensorSpec
from liar_ext.checkpoint.writer import check_output, copy_other_files, output_folder, write_json
from liar_ext.depth.config import count_of, remapped
from liar_ext.depth.grow.mlp import HYPER_PARAMETERS, MlpOptions
from liar_ext.depth.grow.placement import check_gaps, check_neighbours, places
from liar_ext.depth.grow.predictors import PREDICTORS
from liar_ext.depth.grow.report import card
from liar_ext.depth.grow.training import train_layers
from liar_ext.depth.grow.write import Growing, Places, check_learnable, write_layers
from liar_ext.depth.report import layer_report
from liar_ext.depth.shorten import specs_of
from liar_ext.depth.surgery import check_places, layer_list
from liar_ext.engine.inputs import resolve_device
from liar_ext.engine.progress import Progress, Silent
from liar_ext.errors import InputError, UnsupportedModelError, unknown_choice
from liar_ext.models import adapter_for, layout, text_config
from liar_ext.recovery.keeping import check_unfinished, keeping, made_of, ready, state_folder
from liar_ext.recovery.language import next_token_loss
from liar_ext.recovery.state import TrainingState
from liar_ext.recovery.text import TextTraining, Trained, write_again
from liar_ext.report.schema import FILE, calibration_of
from liar_ext.seeds import SEEDS


@dataclass(frozen=True)
class Growth:
    """What is inserted where, and how.

    Attributes:
        gaps: by the layer below; predictor: a key of `PREDICTORS`.
        options: of the predictor `mlp`; seed: of what it draws.
        training: of the new layers; None for none.
        device: auto, cpu or cuda.
    """

    gaps: tuple[int, ...]
    predictor: str = "mlp"
    options: MlpOptions = field(default_factory=lambda: HYPER_PARAMETERS["paper"])
    seed: int = 0
    training: TextTraining | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.predictor not in PREDICTORS:
            raise unknown_choice("--predictor", self.predictor, PREDICTORS)
        if not 0 <= self.seed < SEEDS:
            raise InputError(f"--seed {self.seed}: must be 0 to {SEEDS - 1}")

    def to_json(self) -> dict[str, Any]:
        """All that the new layers depend on beside the source and a training."""
        learned = {"options": asdict(self.options)} if self.predictor == "mlp" else {}
        return {"gaps": list(self.gaps), "predictor": self.predictor, "seed": self.seed, **learned}


def grow(
    source: str | Path,
    out: str | Path,
    growth: Growth,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the checkpoint of a model with layers inserted; the source is only read.

    Layers that were there go from file to file, as they are. A new layer is of the kind of the one
    below it. The result is as stock as the source: `from_pretrained` loads it.

    Args:
        source: folder or hub id, dense or pruned; out: folder to make.
        overwrite: replace `out` if it exists, once the new one is complete.
        resume: go on with the training that an interrupted run has left beside `out`.
    Returns:
        what `out/liar_report.json` says.
    Raises:
        InputError: a gap that is not there or between layers of two kinds, nothing to learn from, a
            text that cannot be used, or anything else; `out` is then as it was.
        Interrupted: by Ctrl-C, after a state of the training was saved.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    folder, out = resolve(source), Path(out)
    check_output(out, folder, overwrite=overwrite)
    if resume and growth.training is None:
        raise InputError("--resume goes on with a training; give --train FILE as before")
    check_unfinished(out, overwrite=overwrite, resume=resume)
    device = resolve_device(growth.device)
    plan = _planned(folder, growth)
    training, corpus = growth.training, None
    if training is not None:
        # whether it predicts next tokens at all
        next_token_loss(plan.model)
        corpus = read(training.text)
    learned = {} if training is None or corpus is None else training.identity(corpus)
    state = TrainingState(
        state_folder(out),
        {"source": made_of(plan.reader, device), "growth": growth.to_json(), **learned},
    )
    ready(state, resume=resume)
    with keeping(state), output_folder(out, folder, overwrite=overwrite) as made:
        writer = ShardWriter(made, plan.specs)
        try:
            how = Growing(
                PREDICTORS[growth.predictor], growth.options, growth.seed, plan.silenced, device
            )
            facts = write_layers(plan.reader, writer, plan.places, how, progress)
            writer.finish()
        finally:
            writer.close()
        write_json(made / "config.json", plan.config)
        copy_other_files(folder, made)
        trained = Trained()
        if training is not None and corpus is not None:
            trained = train_layers(
                *(made, plan.places.parameters(), corpus, training),
                device=growth.device,
                state=state,
                progress=progress,
            )
            write_again(made, plan.specs, trained.tensors)
        report = layer_report(
            source,
            layers=plan.layers(),
            growth={**growth.to_json(), "matrices": facts},
            training=trained.facts or None,
            before=plan.before,
            model=plan.model,
            bytes_after=sum(spec.bytes for spec in plan.specs),
            # the text that these weights have seen last
            calibration=trained.calibration or calibration_of(folder),
            warnings=plan.warnings,
            seconds=time.perf_counter() - started,
            config=plan.config,
            device=device,
        )
        write_json(made / FILE, report)
        (made / "README.md").write_text(card(report), encoding="utf-8")
    state.remove()
    return report


@dataclass(frozen=True)
class _Plan:
    """What is known before anything is computed.

    Attributes:
        reader: bound to the grown model; model: that, on `meta`; config: its `config.json`.
        places: of its layers; silenced: see `Growing`; specs: all of its tensors.
        before: parameters and bytes of the source.
    """

    reader: CheckpointReader
    model: PreTrainedModel
    config: dict[str, Any]
    places: Places
    silenced: frozenset[str]
    specs: list[TensorSpec]
    before: tuple[int, int]
    warnings: list[str]

    def layers(self) -> dict[str, Any]:
        """Which went where, for the report."""
        return {
            "before": len(self.places.layers),
            "after": len(self.places.kept),
            "inserted_after": sorted(self.places.new),
            "inserted": sorted(self.places.new.values()),
        }


def _planned(folder: Path, growth: Growth) -> _Plan:
    """All checks of a source and of what is to be inserted; no weight is read.

    Raises:
        InputError: as `grow`, but for the text.
    """
    reader = CheckpointReader(folder)
    count = count_of(reader.config)
    check_gaps(growth.gaps, count)
    predictor = PREDICTORS[growth.predictor]
    kept, new = places(count, growth.gaps)
    dense = layout.empty(reader.config)
    path, layers = layer_list(dense)
    check_neighbours(layers, text_config(dense.config).to_dict(), growth.gaps)
    config = remapped(reader.config, kept)
    model = layout.empty(config)
    check_places(path, layers, kept, model, {})
    where = Places(path, layers, kept, new)
    check_learnable(where, predictor)
    silenced = _silenced(dense) if predictor.silent else frozenset()
    left_over = reader.bind(dense)
    before = parameter_count(dense), reader.bytes()
    reader.keep_layers(path, kept)
    reader.bind(model)
    specs = specs_of(reader, model)
    warnings = left_over_warnings(left_over, dense)
    return _Plan(reader, model, config, where, silenced, specs, before, warnings)


def _silenced(model: PreTrainedModel) -> frozenset[str]:
    """The modules of a layer that add to the residual stream.

    Raises:
        InputError: the family does not say which, or a layer without them would not be silent.
    """
    try:
        adapter = adapter_for(model.config)
    except UnsupportedModelError as error:
        raise InputError(f"--predictor identity: {error}") from error
    if not adapter.silent(text_config(model.config)):
        raise InputError(
            f"--predictor identity: this {adapter.model_type} model {adapter.no_sum}, so that a "
            "layer cannot be silenced; use average or copy"
        )
    return frozenset(spec.consumer for spec in adapter.sites)
