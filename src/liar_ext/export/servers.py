"""Which engines load a folder, and why the others do not: rules on its config, each with where it
was read or run.

A rule says `yes` only of what follows from the engine's own code or was run by this project's
tests; what was not looked up is `unknown`. Engines change: they were read in November 2026.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from liar_ext.checkpoint.reader import CheckpointReader
from liar_ext.errors import InputError
from liar_ext.export.deci import against
from liar_ext.export.gguf_layers import needs_deci, obstacle
from liar_ext.export.source import source_folder
from liar_ext.models import adapter_for, layout, text_config

YES, NO, UNKNOWN = "yes", "no", "unknown"
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
MOST_DEVICES = 16
PAD = "liar export --format padded"
DENSE = f"{PAD} --to dense"
DECI = ", or --format deci (experimental)"


@dataclass(frozen=True)
class Facts:
    """What the rules go by.

    Attributes:
        model_type: of the layers; config: their config, of a per-layer model the dense one.
        decoder: it is a causal language model.
        per_layer: only `liar_ext.load` knows its widths.
        added: kinds with biases that its family has no flag for.
        odd_heads: heads · head size is not the hidden size.
        reader: of the folder.
    """

    model_type: str
    config: PretrainedConfig
    decoder: bool
    per_layer: bool
    added: tuple[str, ...]
    odd_heads: bool
    reader: CheckpointReader

    @property
    def biased(self) -> bool:
        """Its consumers of attention have biases by a flag."""
        return bool(getattr(self.config, "attention_bias", False))

    @property
    def ffn_biased(self) -> bool:
        return bool(getattr(self.config, "mlp_bias", False))


@dataclass(frozen=True)
class Verdict:
    """Attributes:
    engine: its name; loads: yes, no or unknown.
    reason: why; source: where that was read, or the test that ran it.
    instead: what to do where it does not load.
    tensor_parallel: numbers of devices, up to 16, that the widths divide among; None where the
        engine has no such thing, or nothing is known.
    """

    engine: str
    loads: str
    reason: str
    source: str
    instead: str = ""
    tensor_parallel: tuple[int, ...] | None = None


def check(source: str | Path) -> dict[str, Any]:
    """What each engine makes of a folder, as JSON data; no weights are read.

    Raises:
        InputError: the folder cannot be used.
    """
    folder = source_folder(source)
    facts = _facts(CheckpointReader(folder), folder)
    verdicts = [rule(facts) for rule in ENGINES]
    return {"source": str(source), "engines": [asdict(verdict) for verdict in verdicts]}


def devices(config: PretrainedConfig) -> tuple[int, ...]:
    """Numbers of devices that the widths divide among, as vLLM, SGLang and TensorRT-LLM split them:
    query heads and FFN evenly; KV heads evenly, or each on several devices."""
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    ffn = config.intermediate_size
    return tuple(
        count
        for count in range(1, MOST_DEVICES + 1)
        if heads % count == 0
        and ffn % count == 0
        and (groups % count == 0 if groups >= count else count % groups == 0)
    )


def _facts(reader: CheckpointReader, folder: Path) -> Facts:
    own = reader.config.get(layout.KEY) or {}
    if "convolutions" in own:
        raise InputError(f"{folder}: is a convolutional network; no engine here runs those")
    config = text_config(layout.config_object(layout.base_data(reader.config)))
    adapter = adapter_for(config)
    head_dim = adapter.head_dim(config)
    return Facts(
        model_type=config.model_type,
        config=config,
        decoder=adapter.decoder,
        per_layer=bool(own),
        added=tuple(own.get("added_biases") or ()),
        odd_heads=config.num_attention_heads * head_dim != config.hidden_size,
        reader=reader,
    )


def _per_layer(facts: Facts, engine: str, what: str, source: str) -> Verdict | None:
    """The verdict of engines that know one width for all layers; None where there is one."""
    if not facts.per_layer:
        return None
    if facts.added:
        return Verdict(
            engine,
            NO,
            f"{what}, and its config has no flag for the biases of its {' and '.join(facts.added)}",
            source,
            "prune again with --bias never; ONNX Runtime takes this one",
        )
    fits = engine != "transformers" and against(facts.reader.config, facts.config) is None
    return Verdict(engine, NO, what, source, PAD + DECI * fits)


def _transformers(facts: Facts) -> Verdict:
    engine, run = "transformers", "run: tests/models/test_round_trip.py, tests/export"
    what = "its classes build equal layers, of the width that the config states"
    if (found := _per_layer(facts, engine, what, run)) is not None:
        return replace(found, instead=f"liar_ext.load, or {found.instead}")
    return Verdict(engine, YES, "a stock checkpoint", run)


def _vllm(facts: Facts) -> Verdict:
    engine, models = "vLLM", "read: vllm/model_executor/models"
    what = "its LLaMA, Mistral and Qwen classes read one width from the config"
    kind = facts.model_type
    if (found := _per_layer(facts, engine, what, f"{models}/llama.py")) is not None:
        # there the size of a head is what it was
        dense = kind == "qwen2" and found.instead == PAD
        return replace(found, instead=DENSE) if dense else found
    if kind not in LLAMA_LIKE:
        return Verdict(engine, UNKNOWN, f"its class for {kind} was not looked up", "")
    file = f"{models}/{'llama' if kind == 'mistral' else kind}.py"
    if kind == "qwen2" and facts.odd_heads:
        return Verdict(
            engine,
            NO,
            "its Qwen2 class takes hidden size / heads for the size of a head, whatever head_dim "
            "says",
            file,
            "prune FFN alone, or with --allocation global and then " + DENSE,
        )
    if kind == "qwen3" and facts.biased:
        return Verdict(
            engine,
            NO,
            "its Qwen3 class has no bias on o_proj, and leaves one in the files out without a word",
            file,
            "prune again with --bias never",
        )
    reads = "head_dim, num_key_value_heads, intermediate_size"
    flags = ", attention_bias and mlp_bias" if kind == "llama" else ""
    return Verdict(engine, YES, f"it reads {reads}{flags}", file, "", devices(facts.config))


def _sglang(facts: Facts) -> Verdict:
    engine, file = "SGLang", "read: sglang/srt/models/llama.py"
    what = "its classes read one width from the config"
    if (found := _per_layer(facts, engine, what, file)) is not None:
        return found
    if facts.model_type not in ("llama", "mistral"):
        return Verdict(engine, UNKNOWN, f"its class for {facts.model_type} was not looked up", "")
    if facts.ffn_biased:
        return Verdict(
            engine,
            NO,
            "its FFN has no biases, and it leaves those in the files out without a word",
            file,
            "prune again with --bias never",
        )
    return Verdict(
        engine,
        YES,
        "it reads head_dim, num_key_value_heads, intermediate_size and attention_bias",
        file,
        "",
        devices(facts.config),
    )


def _tensorrt(facts: Facts) -> Verdict:
    engine, file = "TensorRT-LLM", "read: tensorrt_llm/_torch/models/modeling_llama.py"
    what = "its classes read one width from the config"
    if (found := _per_layer(facts, engine, what, file)) is not None:
        return found
    if facts.model_type not in ("llama", "mistral"):
        return Verdict(engine, UNKNOWN, f"its class for {facts.model_type} was not looked up", "")
    if facts.odd_heads or facts.biased or facts.ffn_biased:
        return Verdict(
            engine, UNKNOWN, "what it does with head_dim and biases was not looked up", ""
        )
    return Verdict(
        engine,
        YES,
        "it reads num_attention_heads, num_key_value_heads and intermediate_size",
        file,
        "",
        devices(facts.config),
    )


def _llama_cpp(facts: Facts) -> Verdict:
    engine, run = "llama.cpp", "run: tests/export/test_llama_cpp.py"
    command = "liar export --format gguf"
    if not facts.per_layer:
        if facts.model_type == "qwen3" and facts.biased:
            return Verdict(
                engine,
                NO,
                "its architecture qwen3 has no bias on o_proj",
                "read: llama.cpp/src/models/qwen3.cpp",
                "prune again with --bias never",
            )
        if needs_deci(facts.config, per_layer=False):
            return Verdict(engine, YES, f"as its architecture deci: {command}", run)
        if facts.model_type in LLAMA_LIKE:
            return Verdict(engine, YES, f"by its own converter: {command}", run)
        return Verdict(
            engine, UNKNOWN, f"its converter was not tried on {facts.model_type}: {command}", ""
        )
    # of the model, whose config says nothing of a family that was traced
    if (reason := obstacle(layout.empty(facts.reader.config).config)) is not None:
        instead = f"{PAD}, then {command}" if not facts.added else "prune with --bias never"
        return Verdict(
            engine, NO, f"its architecture with per-layer widths, deci, is no match: {reason}",
            "read: llama.cpp/src/models/deci.cpp", instead,
        )  # fmt: skip
    return Verdict(
        engine, YES, f"as its architecture deci, widths and biases and all: {command}", run
    )


def _onnx(facts: Facts) -> Verdict:
    if adapter_for(facts.config).hands_on:
        what = "liar export --format onnx makes no graph of layers that hand position biases on"
        return Verdict("ONNX Runtime", NO, what, "run: liar export --format onnx")
    return Verdict(
        "ONNX Runtime",
        YES,
        "a graph has the shapes that it has: liar export --format onnx, which compares the two",
        "run: tests/export/test_onnx.py",
    )


ENGINES: tuple[Callable[[Facts], Verdict], ...] = (
    _transformers,
    _vllm,
    _sglang,
    _tensorrt,
    _llama_cpp,
    _onnx,
)
