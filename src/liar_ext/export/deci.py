"""`--format deci`, experimental: per-layer FFN widths as DeciLM's `block_configs` have them.

What vLLM (`nemotron_nas.py`), SGLang and TensorRT-LLM (`modeling_nemotron_nas.py`) make of a block:
the FFN's width is int(2 · ffn_mult · hidden size / 3), rounded up to a multiple of 256; query heads
are the config's, in all layers; KV heads are these over `n_heads_in_group`. Pruning removes query
heads with their KV head, so heads are padded with zeros to the widest layer's, FFN widths to their
next multiple of 256, and absent blocks are blocks of zeros.
"""

from __future__ import annotations

import copy
import math
import shutil
import time
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from liar_ext.checkpoint.reader import CheckpointReader, left_over_warnings, parameter_count
from liar_ext.checkpoint.writer import check_output, copy_other_files, output_folder, write_json
from liar_ext.engine.progress import Progress, Silent
from liar_ext.errors import InputError
from liar_ext.export import configuration_liar_deci
from liar_ext.export.padded import write_padded
from liar_ext.export.report import export_card, export_report
from liar_ext.export.source import source_folder
from liar_ext.export.widened import Widened
from liar_ext.export.widths import Widths, uneven
from liar_ext.models import layout, text_config
from liar_ext.models.adapter import plain_head_dim
from liar_ext.report.schema import FILE

STEP = 256
FAMILIES = ("llama", "mistral")
ARCHITECTURE, MODEL_TYPE = "DeciLMForCausalLM", "nemotron-nas"
NOTE = (
    "Experimental: written to what the code of vLLM, SGLang and TensorRT-LLM reads; none of them "
    "was started on it. FFN widths are padded with zeros to multiples of {step}, {ffn}, and KV "
    "heads to {heads} in all layers."
)


def export_deci(
    source: str | Path,
    out: str | Path,
    widths: Widths = Widths(),
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a checkpoint of per-layer FFN widths for servers that know `DeciLMForCausalLM`.

    Args:
        source: folder or hub id of a per-layer pruned LLaMA or Mistral; out: folder to make.
        widths: `to` is of the heads; FFN widths are per layer, multiples of 256.
        overwrite: replace `out` if it exists, once the new one is complete.
    Returns:
        what `out/liar_report.json` says.
    Raises:
        InputError: another family, biases, a sliding window, or widths that are equal anyway;
            `out` is then as it was.
    """
    started = time.perf_counter()
    folder, out = source_folder(source), Path(out)
    check_output(out, folder, overwrite=overwrite)
    reader = CheckpointReader(folder)
    narrow = layout.empty(reader.config)
    warnings = left_over_warnings(reader.bind(narrow), narrow)
    _check(reader.config, text_config(narrow.config), folder)
    before = layout.read(narrow)
    base = text_config(layout.config_object(layout.base_data(reader.config)))
    after = _units(before, base, widths)
    warnings += uneven(after[0], widths)
    config = deci_config(reader.config, after)
    note = NOTE.format(
        step=math.lcm(STEP, widths.tensor_parallel),
        ffn=" ".join(str(layer["ffn"]) for layer in after),
        heads=after[0]["heads"],
    )
    # the same layers as this package's own, to have their tensors; they may be wider than before
    data = _widest(reader.config, after)
    data[layout.KEY] = {**reader.config[layout.KEY], "layers": after}
    wide = layout.build({**data, "model_type": layout.KEY})
    tensors = Widened(reader, narrow, wide)
    watcher = progress or Silent()
    watcher.begin(len(before), "pad")
    with output_folder(out, folder, overwrite=overwrite) as made:
        write_padded(made, tensors, watcher)
        copy_other_files(folder, made)
        write_json(made / "config.json", config)
        code = Path(configuration_liar_deci.__file__)
        shutil.copyfile(code, made / code.name)
        report = export_report(
            source,
            folder,
            "deci",
            totals={
                "parameters_before": parameter_count(narrow),
                "parameters_after": parameter_count(wide),
                "bytes_before": reader.bytes(),
                "bytes_after": sum(spec.bytes for spec in tensors.specs),
            },
            config=config,
            warnings=warnings,
            seconds=time.perf_counter() - started,
            export={
                "layers": {"before": before, "after": after},
                "loads_with": "servers that have DeciLMForCausalLM, with --trust-remote-code",
                "note": note,
            },
        )
        write_json(made / FILE, report)
        (made / "README.md").write_text(
            export_card(report, (), None, "with per-layer FFN widths, as DeciLM", note),
            encoding="utf-8",
        )
    return report


def deci_config(data: dict[str, Any], units: list[dict[str, int]]) -> dict[str, Any]:
    """The `config.json`: LLaMA's, with a block for each layer.

    Args:
        data: of the source; units: of each layer, with the same heads everywhere.
    """
    base = layout.base_data(data)
    config = layout.config_object(base)
    group = config.num_attention_heads // config.num_key_value_heads
    new = copy.deepcopy(base)
    new |= {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "auto_map": {"AutoConfig": "configuration_liar_deci.LiarDeciConfig"},
        "head_dim": plain_head_dim(config),
        "num_attention_heads": units[0]["heads"] * group,
        "num_key_value_heads": units[0]["heads"],
        "intermediate_size": max(layer["ffn"] for layer in units),
        "block_configs": [
            {
                "attention": {
                    "no_op": False,
                    "n_heads_in_group": group,
                    "replace_with_linear": False,
                },
                "ffn": {
                    "no_op": False,
                    "ffn_mult": ffn_mult(layer["ffn"], config.hidden_size),
                    "replace_with_linear": False,
                },
            }
            for layer in units
        ],
    }
    new.pop("sliding_window", None)
    return new


def ffn_mult(width: int, hidden_size: int) -> float:
    """The multiplier that a server makes this width of, a multiple of 256."""
    # half a column less: int() cuts, and what is left is rounded up to the multiple
    return 1.5 * (width - 0.5) / hidden_size


def ffn_width(multiplier: float, hidden_size: int) -> int:
    """What servers make of a multiplier."""
    return -(-int(2 * multiplier * hidden_size / 3) // STEP) * STEP


def _units(
    before: list[dict[str, int]], config: PretrainedConfig, widths: Widths
) -> list[dict[str, int]]:
    """Units of each layer: the same heads everywhere, FFN widths that `ffn_mult` can say."""
    dense, step = config.num_key_value_heads, widths.tensor_parallel
    group = config.num_attention_heads // dense
    least = max(layer["heads"] for layer in before)
    least = dense if widths.to == "dense" else -(-least // step) * step
    # LlamaConfig takes no other numbers of heads
    fitting = (n for n in range(least, dense, step) if config.hidden_size % (n * group) == 0)
    heads = next(fitting, dense)
    # of which every device has a whole number of columns
    ffn = math.lcm(STEP, step)
    return [{"heads": heads, "ffn": max(-(-layer["ffn"] // ffn), 1) * ffn} for layer in before]


def _widest(data: dict[str, Any], units: list[dict[str, int]]) -> dict[str, Any]:
    """The dense config, wide enough for these layers."""
    base = copy.deepcopy(layout.base_data(data))
    config = layout.config_object(base)
    base["head_dim"] = plain_head_dim(config)
    base["intermediate_size"] = max(layer["ffn"] for layer in units)
    return base


def against(data: dict[str, Any], config: PretrainedConfig) -> str | None:
    """Why a per-layer folder cannot be written as DeciLM, or None.

    Args:
        data: its `config.json`; config: of its layers.
    """
    biased = data[layout.KEY].get("added_biases") or [
        flag for flag in ("attention_bias", "mlp_bias") if getattr(config, flag, False)
    ]
    if config.model_type not in FAMILIES or hasattr(config, "liar_ext_trace"):
        return f"it is a {config.model_type}; DeciLM is LLaMA"
    if biased:
        return f"it has biases ({', '.join(biased)}), and servers differ in which they read"
    if getattr(config, "sliding_window", None) is not None:
        return f"it attends to a sliding window of {config.sliding_window}"
    return None


def _check(data: dict[str, Any], config: PretrainedConfig, folder: Path) -> None:
    if layout.KEY not in data:
        raise InputError(
            f"{folder}: loads in stock transformers, and where a server takes its family; there is "
            "nothing that deci would add"
        )
    if (reason := against(data, config)) is not None:
        raise InputError(
            f"{folder}: cannot be written as DeciLM: {reason}; use liar export --format padded"
        )
