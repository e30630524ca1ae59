"""`--format onnx`: one graph for ONNX Runtime, of any widths, compared with the model it is of."""

from __future__ import annotations

import importlib.util
import io
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from liar_ext.checkpoint.load import load
from liar_ext.checkpoint.reader import CheckpointReader, left_over_warnings, parameter_count
from liar_ext.checkpoint.writer import check_output, copy_other_files, output_folder, write_json
from liar_ext.engine.progress import Progress, Silent
from liar_ext.errors import InputError
from liar_ext.export.onnx_graph import Graph, cached_graph, plain_graph
from liar_ext.export.report import export_card, export_report
from liar_ext.export.source import source_folder
from liar_ext.models import adapter_for, layout, text_config
from liar_ext.report.schema import FILE

NAME = "model.onnx"
NEEDS = ("onnx", "onnxscript", "onnxruntime")
# a protobuf file cannot be larger than 2 GiB: weights go beside it
INLINE_BYTES = 1 << 30
# float32 products whose sums are in another order are off by about 1e-6 of the largest output, deep
# models by ten times that; a graph that is not the model is off by its size
GATE = 1e-3


def export_onnx(
    source: str | Path,
    out: str | Path,
    *,
    past: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a model as one ONNX graph in float32, with batch and length free.

    Widths that differ from layer to layer are like any others there. The model is in memory, in
    float32, twice while the graph is written. The graph is run once and compared before the folder
    appears.

    Args:
        source: folder or hub id, dense or pruned; out: folder to make.
        past: of a decoder with a head, keys and values go in and out; False is logits of whole
            sequences.
        overwrite: replace `out` if it exists, once the new one is complete.
    Returns:
        what `out/liar_report.json` says; under `export` how far the graph is from the model.
    Raises:
        InputError: a package is missing, torch cannot trace the model, or the graph is not the
            model; `out` is then as it was.
    """
    started = time.perf_counter()
    _check_packages()
    folder, out = source_folder(source), Path(out)
    check_output(out, folder, overwrite=overwrite)
    watcher = progress or Silent()
    watcher.begin(4, "export")
    reader = CheckpointReader(folder)
    adapter_for(layout.config_object(layout.base_data(reader.config))).check_one_stack()
    model = load(folder, dtype=torch.float32)
    left_out = left_over_warnings(reader.bind(model), model)
    watcher.layer(0)
    decoder = adapter_for(model.config).decoder and model.get_output_embeddings() is not None
    with output_folder(out, folder, overwrite=overwrite) as made, _quiet():
        graph = cached_graph(model) if decoder and past else plain_graph(model)
        program = _traced(graph, folder)
        watcher.layer(1)
        large = sum(p.numel() * p.itemsize for p in model.parameters()) > INLINE_BYTES
        program.save(str(made / NAME), external_data=large)
        del program
        watcher.layer(2)
        difference = compare(model, graph, made / NAME)
        watcher.layer(3)
        if not difference["max_abs"] <= GATE * difference["largest"]:
            raise InputError(
                f"{folder}: the graph is not the model: outputs up to {difference['largest']:.3g} "
                f"are off by {difference['max_abs']:.3g}; please report the model type "
                f"({model.config.model_type})"
            )
        copy_other_files(folder, made)
        write_json(made / "config.json", reader.config)
        count = parameter_count(model)
        report = export_report(
            source,
            folder,
            "onnx",
            totals={
                "parameters_before": count,
                "parameters_after": count,
                "bytes_before": reader.bytes(),
                "bytes_after": sum(p.stat().st_size for p in made.glob(f"{NAME}*")),
            },
            config=reader.config,
            warnings=left_out,
            seconds=time.perf_counter() - started,
            export={
                "file": NAME,
                "inputs": list(graph.names),
                "outputs": list(graph.outputs),
                "past": bool(graph.cache),
                "compared": difference,
                "loads_with": "ONNX Runtime",
            },
        )
        write_json(made / FILE, report)
        (made / "README.md").write_text(_card(report), encoding="utf-8")
    return report


def compare(model: PreTrainedModel, graph: Graph, file: Path) -> dict[str, Any]:
    """How far ONNX Runtime is from the model: on whole sequences and, with a cache, in two steps.

    Returns:
        `tokens` compared, `max_abs`, `rms_relative` and the `largest` output of the model.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    text = text_config(model.config)
    length = min(24, adapter_for(model.config).max_positions(text))
    tokens = torch.randint(0, text.vocab_size, (2, length), generator=generator)
    mask = torch.ones_like(tokens)
    if not graph.cache:
        # the first sequence is the shorter one
        mask[0, length - length // 3 :] = 0
        inputs = {"input_ids": tokens, "attention_mask": mask}
        if "token_type_ids" in graph.names:
            inputs["token_type_ids"] = torch.zeros_like(tokens)
        with torch.no_grad():
            wanted = model(**inputs, return_dict=True)
        (found, *_) = session.run(
            list(graph.outputs), {name: value.numpy() for name, value in inputs.items()}
        )
        expected = wanted[graph.outputs[0]].numpy()
        if found.ndim == 3:
            # what stands at padding means nothing
            found, expected = found[mask.bool().numpy()], expected[mask.bool().numpy()]
        return _difference([found], [expected], int(mask.sum()))
    # another batch than the one that was traced, its first sequence padded on the left
    padded, seen = torch.cat([tokens, tokens[:1].flip(1)]), torch.ones(3, length, dtype=torch.int64)
    seen[0, : length // 3] = 0
    places = (seen.cumsum(1) - 1).clamp(min=0)
    own = {"position_ids": places} if "position_ids" in graph.names else {}
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits.numpy()
        beside = model(padded, attention_mask=seen, use_cache=False, **own).logits.numpy()
    masked = _run(session, graph, padded, 0, None, seen, places)[0]
    valid = seen.bool().numpy()
    whole = _run(session, graph, tokens, 0, None)[0]
    half = length // 2
    first = _run(session, graph, tokens[:, :half], 0, None)
    second = _run(session, graph, tokens[:, half:], half, first[1:])
    return _difference(
        [whole, first[0], second[0], masked[valid]],
        [expected, expected[:, :half], expected[:, half:], beside[valid]],
        2 * tokens.numel() + int(seen.sum()),
    )


def _run(
    session: Any,
    graph: Graph,
    tokens: torch.Tensor,
    past: int,
    kept: Sequence[Any] | None,
    mask: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
) -> list[Any]:
    """Logits, keys and values of these tokens behind `past` others.

    Args:
        mask, places: (b, t) int64, of what is padded; None where nothing is.
    """
    batch, length = tokens.shape
    if mask is None or places is None:
        mask = torch.ones(batch, past + length, dtype=torch.int64)
        places = torch.arange(past, past + length).expand(batch, length)
    named = {
        "input_ids": tokens.numpy(),
        "attention_mask": mask.numpy(),
        "position_ids": np.ascontiguousarray(places.numpy()),
    }
    named = {name: named[name] for name in graph.names if name in named}
    if kept is None:
        kept = [np.zeros((batch, heads, 0, width), np.float32) for heads, width in graph.cache]
    named |= dict(zip(graph.names[-len(graph.cache) :], kept, strict=True))
    return list(session.run(list(graph.outputs), named))


def _difference(found: list[Any], expected: list[Any], tokens: int) -> dict[str, Any]:
    pairs = list(zip(found, expected, strict=True))
    off = sum(float(np.square(a.astype(np.float64) - b).sum()) for a, b in pairs)
    size = sum(float(np.square(b.astype(np.float64)).sum()) for _, b in pairs)
    return {
        "tokens": tokens,
        "max_abs": max(float(np.abs(a - b).max()) for a, b in pairs),
        "rms_relative": (off / size) ** 0.5 if size else 0.0,
        "largest": max(float(np.abs(b).max()) for b in expected),
    }


def _traced(graph: Graph, folder: Path) -> Any:
    try:
        return torch.onnx.export(
            graph.module,
            graph.inputs,
            dynamo=True,
            dynamic_shapes=graph.shapes,
            input_names=list(graph.names),
            output_names=list(graph.outputs),
            verbose=False,
        )
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise InputError(f"{folder}: torch cannot write it as ONNX ({reason})") from error


def _check_packages() -> None:
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"--format onnx: {', '.join(missing)} not installed; pip install 'liar-ext[onnx]'"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx tells its progress, and warns of what it renames and of packages it misses."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _card(report: dict[str, Any]) -> str:
    what = report["export"]
    compared = what["compared"]
    how = (
        "`past_key_values.N.key` and `.value` are the `present.N` of the call before, of length 0 "
        "in the first one; `attention_mask` covers both."
        if what["past"]
        else "It takes whole sequences and has no cache."
    )
    return export_card(
        report,
        ("onnx",),
        "onnx",
        "for ONNX Runtime",
        f"`{NAME}` in float32, with batch and length free. {how}\n\n"
        f"On {compared['tokens']} tokens ONNX Runtime is {compared['max_abs']:.2g} off "
        f"transformers at most, {compared['rms_relative']:.2g} rms relative; the largest output "
        f"is {compared['largest']:.3g}.",
    )
