"""`liar recover`: a checkpoint that was trained a little, all of it or nothing."""

from __future__ import annotations

import copy
import datetime
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from liar_ext.calibration.sources import Corpus
from liar_ext.checkpoint.load import load, resolve
from liar_ext.checkpoint.reader import (
    CheckpointReader,
    left_over_warnings,
    parameter_count,
    tied_names,
)
from liar_ext.checkpoint.shards import ShardWriter, TensorSpec
from liar_ext.checkpoint.writer import check_output, copy_other_files, output_folder, write_json
from liar_ext.depth.config import count_of
from liar_ext.engine.inputs import compute_dtype, load_tokenizer, resolve_device
from liar_ext.engine.progress import Progress, Silent
from liar_ext.environment import environment
from liar_ext.errors import InputError
from liar_ext.models import layout, text_config
from liar_ext.recovery.adapters import peft, targets_of
from liar_ext.recovery.card import card
from liar_ext.recovery.instructions import (
    Instructions,
    read_training,
    windows_of_instructions,
)
from liar_ext.recovery.keeping import check_unfinished, keeping, made_of, ready, state_folder
from liar_ext.recovery.language import next_token_loss
from liar_ext.recovery.methods import Outcome, Subject, low_rank, partial
from liar_ext.recovery.residuals import kept_layers
from liar_ext.recovery.settings import Recovery
from liar_ext.recovery.state import TrainingState
from liar_ext.recovery.text import Drawn, TextTraining, draw, window_length
from liar_ext.recovery.upper import check_head, first_trained
from liar_ext.report.schema import FILE, RECOVERED, read_data

VERSION = 1
ADAPTER = "adapter"


def recover(
    source: str | Path,
    out: str | Path,
    recovery: Recovery,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a checkpoint that was trained a little; the source is only read.

    The result has the tensors, shapes and dtypes of the source, and loads as it does; with `untie`
    it has a head of its own. Trained tensors are float32 until the end. The model is in eval mode:
    no dropout, and the same seed gives the same files, also after an interruption.

    Args:
        source: folder or hub id, dense or pruned; out: folder to make.
        overwrite: replace `out` if it exists, once the new one is complete.
        resume: go on with the training, or the search, that an interrupted run has left beside
            `out`.
    Returns:
        what `out/liar_report.json` says.
    Raises:
        InputError: a model without a next token, a head that is tied, a text that cannot be used,
            PEFT missing, or anything else; `out` is then as it was.
        Interrupted: by Ctrl-C, after a state of the training was saved.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    folder, out = resolve(source), Path(out)
    check_output(out, folder, overwrite=overwrite)
    check_unfinished(out, overwrite=overwrite, resume=resume)
    device = resolve_device(recovery.device)
    plan = _planned(folder, recovery)
    text = read_training(recovery.text)
    corpus = text.corpus if isinstance(text, Instructions) else text
    state = TrainingState(
        state_folder(out),
        {"source": made_of(plan.reader, device), **plan.dense, **recovery.identity(corpus.sha256)},
    )
    ready(state, resume=resume)
    model = load(folder, dtype=compute_dtype("auto", device), device=device)
    drawn = _drawn(folder, model, text, recovery)
    subject = Subject(folder, model, recovery, drawn, state, progress)
    with (
        keeping(state),
        output_folder(out, folder, overwrite=overwrite) as made,
        _scratch(made) as scratch,
    ):
        # first, so that a disk that is full says so before anything is trained
        writer = ShardWriter(made, plan.specs)
        try:
            if recovery.method == "partial":
                outcome = partial(subject, scratch)
            else:
                outcome = low_rank(subject, scratch / ADAPTER if recovery.keep_adapter else None)
            for spec in plan.specs:
                if spec.name in outcome.tensors:
                    writer.write(spec.name, outcome.tensors[spec.name])
                else:
                    writer.write_pieces(spec.name, plan.reader.pieces(spec.name))
            writer.finish()
        finally:
            writer.close()
        write_json(made / "config.json", plan.config)
        copy_other_files(folder, made)
        # of the source, if it has any: it belongs to other weights
        shutil.rmtree(made / ADAPTER, ignore_errors=True)
        if recovery.method == "lora" and recovery.keep_adapter:
            shutil.move(scratch / ADAPTER, made / ADAPTER)
        report = {
            "version": VERSION,
            "kind": RECOVERED,
            "source": str(source),
            "date": datetime.date.today().isoformat(),
            "layers": plan.previous.get("layers") or {},
            "totals": plan.totals,
            "recovery": recovery.to_json(),
            "training": _facts(outcome, subject, device.type),
            # the text that these weights have seen last
            "calibration": drawn.calibration.to_json(),
            "warnings": plan.warnings + _left_out(drawn, recovery),
            "seconds": time.perf_counter() - started,
            "config": plan.config,
            "environment": environment(device),
        }
        write_json(made / FILE, report)
        (made / "README.md").write_text(card(report), encoding="utf-8")
    state.remove()
    return report


@dataclass(frozen=True)
class _Plan:
    """What is known before anything is computed.

    Attributes:
        config: `config.json` of the result; specs: all of its tensors.
        dense: what identifies the dense model, where one is compared with.
        previous: what the source's report says.
    """

    reader: CheckpointReader
    config: dict[str, Any]
    specs: list[TensorSpec]
    totals: dict[str, int]
    dense: dict[str, Any]
    previous: dict[str, Any]
    warnings: list[str]


def _planned(folder: Path, recovery: Recovery) -> _Plan:
    """All checks of a source and of what is to be trained of it; no weight is read.

    Raises:
        InputError: as `recover`, but for the text.
    """
    reader = CheckpointReader(folder)
    model = layout.empty(reader.config)
    left_over = reader.bind(model)
    next_token_loss(model)
    config, dense = reader.config, {}
    if recovery.method == "partial":
        check_head(model, head=recovery.head, untie=recovery.untie)
        first_trained(count_of(reader.config), recovery.last)
        if recovery.untie:
            config = _untied(config)
    else:
        peft()
        targets_of(model)
        if recovery.ranks == "residual":
            other = CheckpointReader(resolve(str(recovery.dense)))
            kept_layers(folder, other.config, reader.config)
            dense = {"dense": other.sizes()}
    specs = [
        TensorSpec(name, reader.shape(name), reader.dtype(name))
        for name in model.state_dict()
        if name in reader
    ]
    result = model
    if recovery.untie:
        result = layout.empty(config)
        known = {spec.name for spec in specs}
        embeddings = _name_of(model, model.get_input_embeddings())
        for name, tensor in result.state_dict().items():
            if name not in known:
                specs.append(TensorSpec(name, tuple(tensor.shape), reader.dtype(embeddings)))
    previous = read_data(folder) if (folder / FILE).exists() else {}
    totals = {
        "parameters_before": parameter_count(model),
        "parameters_after": parameter_count(result),
        "bytes_before": reader.bytes(),
        "bytes_after": sum(spec.bytes for spec in specs),
    }
    warnings = left_over_warnings(left_over, model)
    return _Plan(reader, config, specs, totals, dense, previous, warnings)


def _untied(config: dict[str, Any]) -> dict[str, Any]:
    """The same `config.json` for a model whose head is not its embeddings."""
    found = copy.deepcopy(config)
    found["tie_word_embeddings"] = False
    if isinstance(found.get("text_config"), dict):
        found["text_config"]["tie_word_embeddings"] = False
    if tied_names(layout.empty(found)):
        raise InputError(
            f"--untie: {config['model_type']} models cannot have a head of their own; use --no-head"
        )
    return found


def _name_of(model: PreTrainedModel, module: Any) -> str:
    return next(f"{name}.weight" for name, own in model.named_modules() if own is module)


def _drawn(
    folder: Path, model: PreTrainedModel, text: Corpus | Instructions, recovery: Recovery
) -> Drawn:
    schedule, seq_len, held_out = recovery.schedule, recovery.seq_len, recovery.held_out
    if not isinstance(text, Instructions):
        return draw(folder, model, TextTraining(recovery.text, schedule, seq_len, held_out), text)
    return windows_of_instructions(
        text,
        load_tokenizer(folder),
        wanted=schedule.steps * schedule.windows,
        held_out=held_out,
        seq_len=window_length(model, seq_len),
        seed=schedule.seed,
        vocab_size=text_config(model.config).vocab_size,
    )


@contextmanager
def _scratch(made: Path) -> Iterator[Path]:
    """A folder beside the one that is made, for what may be lost."""
    with tempfile.TemporaryDirectory(prefix=f"{made.name}.scratch-", dir=made.parent) as folder:
        yield Path(folder)


def _facts(outcome: Outcome, subject: Subject, device: str) -> dict[str, Any]:
    drawn, schedule = subject.drawn, subject.recovery.schedule
    return {
        **asdict(outcome.training),
        **outcome.facts,
        "parameters": outcome.parameters,
        "windows": len(drawn.windows.input_ids),
        "held_out_windows": 0 if drawn.held_out is None else len(drawn.held_out.input_ids),
        "seq_len": drawn.calibration.seq_len,
        "schedule": schedule.to_json(),
        "device": device,
    }


def _left_out(drawn: Drawn, recovery: Recovery) -> list[str]:
    if not drawn.left_out:
        return []
    return [
        f"{recovery.text}: {drawn.left_out} records were left out, whose prompt alone has "
        f"{drawn.calibration.seq_len} tokens or more"
    ]
