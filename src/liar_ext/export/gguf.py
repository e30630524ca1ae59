"""`--format gguf`: a file for llama.cpp. What stock transformers loads goes through llama.cpp's own
converter; per-layer widths of LLaMA's kin are written as its `deci` architecture."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liar_ext.checkpoint.reader import CheckpointReader, left_over_warnings, parameter_count
from liar_ext.checkpoint.writer import check_output, copy_other_files, output_folder, write_json
from liar_ext.engine.progress import Progress, Silent
from liar_ext.errors import InputError
from liar_ext.export.converter import convert, find_converter
from liar_ext.export.gguf_layers import ARCHITECTURE, check_deci, needs_deci, write_deci
from liar_ext.export.report import export_card, export_report
from liar_ext.export.source import source_folder
from liar_ext.models import layout, text_config
from liar_ext.report.schema import FILE
from liar_ext.report.text import short_name

TYPES = ("f32", "f16", "bf16")


@dataclass(frozen=True)
class GgufOptions:
    """Attributes:
        converter: llama.cpp's `convert_hf_to_gguf.py` or a folder with it; None looks on PATH.
        outtype: f32, f16 or bf16, of matrices.
        pre_tokenizer: llama.cpp's name of it, for tokenizers that are not in its list.
    Raises:
        InputError: another type.
    """

    converter: str | None = None
    outtype: str = "f16"
    pre_tokenizer: str | None = None

    def __post_init__(self) -> None:
        if self.outtype not in TYPES:
            raise InputError(
                f"--outtype {self.outtype}: must be one of {', '.join(TYPES)}; "
                "llama-quantize makes the others"
            )


def export_gguf(
    source: str | Path,
    out: str | Path,
    options: GgufOptions = GgufOptions(),
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a GGUF file; the source is only read.

    Args:
        source: folder or hub id, dense or pruned, a language model; out: folder to make.
        overwrite: replace `out` if it exists, once the new one is complete.
    Returns:
        what `out/liar_report.json` says.
    Raises:
        InputError: no converter, one that fails, or a model that llama.cpp has no architecture
            for; `out` is then as it was.
    """
    started = time.perf_counter()
    folder, out = source_folder(source), Path(out)
    check_output(out, folder, overwrite=overwrite)
    converter = find_converter(options.converter)
    reader = CheckpointReader(folder)
    model = layout.empty(reader.config)
    warnings = left_over_warnings(reader.bind(model), model)
    listed = needs_deci(text_config(model.config), per_layer=layout.KEY in reader.config)
    file = f"model-{options.outtype}.gguf"
    # before anything is computed
    layers = check_deci(reader) if listed else None
    if listed and importlib.util.find_spec("gguf") is None:
        raise InputError("--format gguf: gguf is not installed; pip install 'liar-ext[gguf]'")
    with output_folder(out, folder, overwrite=overwrite) as made:
        if layers is None:
            arguments = ["--outtype", options.outtype]
            convert(converter, folder, made / file, arguments, options.pre_tokenizer)
        else:
            with tempfile.TemporaryDirectory(dir=made) as beside:
                vocabulary = _vocabulary(folder, Path(beside), converter, source, options)
                write_deci(made / file, vocabulary, layers, options.outtype, progress or Silent())
        count = parameter_count(model)
        report = export_report(
            source,
            folder,
            "gguf",
            totals={
                "parameters_before": count,
                "parameters_after": count if layers is None else parameter_count(layers.wide),
                "bytes_before": reader.bytes(),
                "bytes_after": (made / file).stat().st_size,
            },
            config=reader.config,
            warnings=warnings,
            seconds=time.perf_counter() - started,
            export={
                "file": file,
                "outtype": options.outtype,
                "architecture": ARCHITECTURE if listed else "the converter's",
                "pre_tokenizer": options.pre_tokenizer,
                "loads_with": "llama.cpp",
            },
        )
        write_json(made / FILE, report)
        (made / "README.md").write_text(_card(report), encoding="utf-8")
    return report


def _vocabulary(
    folder: Path, beside: Path, converter: Path, source: str | Path, options: GgufOptions
) -> Path:
    """A GGUF file with the tokenizer and the dense config, by the converter.

    Args:
        beside: an empty folder to work in.
    """
    stock = beside / "stock"
    stock.mkdir()
    copy_other_files(folder, stock)
    reader = CheckpointReader(folder)
    write_json(stock / "config.json", layout.base_data(reader.config))
    file = beside / "vocabulary.gguf"
    arguments = ["--vocab-only", "--model-name", short_name(str(source))]
    convert(converter, stock, file, arguments, options.pre_tokenizer)
    return file


def _card(report: dict[str, Any]) -> str:
    what = report["export"]
    how = (
        f"It is of llama.cpp's architecture `{ARCHITECTURE}`, which has lists of widths, one for "
        "each layer."
        if what["architecture"] == ARCHITECTURE
        else "It was written by llama.cpp's `convert_hf_to_gguf.py`."
    )
    return export_card(
        report,
        ("gguf",),
        "gguf",
        "for llama.cpp",
        f'`{what["file"]}`. {how}\n\n```\nllama-cli -m {what["file"]} -p "..."\n```',
    )
