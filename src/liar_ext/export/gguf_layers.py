"""Per-layer widths as llama.cpp's `deci` architecture has them: LLaMA's layers, each with heads,
KV heads and FFN of its own.

llama.cpp reads `attention.head_count`, `attention.head_count_kv` and `feed_forward_length` as
lists, one number a layer, and optional biases of q, k, v, o, gate, up and down
(`src/models/deci.cpp`). Query and key rows are in its order: the halves that the rotation pairs are
interleaved, where transformers has them one behind the other. What its graph does not do: a layer
with attention and no FFN gives its input back unchanged, and one without attention has no bias; so
absent blocks are written as small blocks of zeros.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from liar_ext.checkpoint.reader import CheckpointReader
from liar_ext.engine.progress import Progress
from liar_ext.errors import InputError
from liar_ext.export.widened import Widened
from liar_ext.models import layout
from liar_ext.models.adapter import plain_head_dim

ARCHITECTURE = "deci"
FAMILIES = ("llama", "mistral", "qwen2")
# one KV group, and a width that blocks of quantised weights divide
ZERO_UNITS = {"heads": 1, "ffn": 32}
# of the rotation: a factor for each frequency says all there is
ROPE = ("linear", "llama3")


def needs_deci(config: PretrainedConfig, *, per_layer: bool) -> bool:
    """Whether a model's own architecture in llama.cpp cannot have its widths: layers that differ,
    or Qwen2's with fewer heads than the hidden size has room for (`src/models/qwen2.cpp`)."""
    odd = config.num_attention_heads * plain_head_dim(config) != config.hidden_size
    return per_layer or (config.model_type == "qwen2" and odd)


@dataclass(frozen=True)
class Layers:
    """A model that `deci` can be.

    Attributes:
        reader: bound to `narrow`; narrow, wide: on `meta`; the wide one has all blocks.
    """

    reader: CheckpointReader
    narrow: PreTrainedModel
    wide: PreTrainedModel


def check_deci(reader: CheckpointReader) -> Layers:
    """Whether `deci` is the same function.

    Raises:
        InputError: it is not; says why, and the way out.
    """
    narrow = layout.empty(reader.config)
    reader.bind(narrow)
    config = narrow.config
    if (reason := obstacle(config)) is not None:
        raise InputError(
            f"{reader.folder}: llama.cpp's per-layer architecture ({ARCHITECTURE}) cannot be this "
            f"model: {reason}; use liar export --format padded first, then --format gguf of that"
        )
    if layout.KEY not in reader.config:
        return Layers(reader, narrow, narrow)
    data = copy.deepcopy(reader.config)
    own = data[layout.KEY]
    own["layers"] = [
        {kind: units or ZERO_UNITS[kind] for kind, units in layer.items()}
        for layer in own["layers"]
    ]
    return Layers(reader, narrow, layout.build(data))


def write_deci(
    file: Path, vocabulary: Path, layers: Layers, outtype: str, progress: Progress
) -> None:
    """Write the model, a tensor at a time.

    Args:
        vocabulary: a GGUF file without tensors that the converter has made of the dense config and
            the tokenizer; what it says is kept but for the widths.
        outtype: f32, f16 or bf16, of matrices; vectors are float32.
    Raises:
        InputError: weights that do not fit the type.
    """
    import gguf

    writer = gguf.GGUFWriter(str(file), ARCHITECTURE)
    _keep_fields(writer, vocabulary)
    _add_widths(writer, layers.wide, outtype)
    tensors = Widened(layers.reader, layers.narrow, layers.wide)
    progress.begin(len(layout.read(layers.wide)), "write")
    factors = _rope_factors(layers.wide.config)
    _announce(writer, tensors, factors, outtype, len(layout.read(layers.wide)))
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    _write_tensors(writer, tensors, plain_head_dim(layers.wide.config), outtype, progress)
    writer.close()


def _add_widths(writer: Any, model: PreTrainedModel, outtype: str) -> None:
    import gguf

    config, units = model.config, layout.read(model)
    head_dim = plain_head_dim(config)
    group = config.num_attention_heads // config.num_key_value_heads
    writer.add_head_count([layer["heads"] * group for layer in units])
    writer.add_head_count_kv([layer["heads"] for layer in units])
    writer.add_feed_forward_length([layer["ffn"] for layer in units])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}
    writer.add_file_type(gguf.LlamaFileType[types[outtype]])


def _announce(
    writer: Any, tensors: Widened, factors: Tensor | None, outtype: str, layers: int
) -> None:
    """The beginning of the file: what tensors follow, in their order."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DECI, layers)
    if factors is not None:
        values = factors.numpy()
        writer.add_tensor_info("rope_freqs.weight", values.shape, values.dtype, values.nbytes)
    for spec in tensors.specs:
        name = names.get_name(spec.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise InputError(f"{spec.name}: llama.cpp's {ARCHITECTURE} has no such tensor")
        like = _stored(torch.empty(spec.shape, dtype=spec.dtype, device="meta"), outtype)
        kind = gguf.GGMLQuantizationType[_kind(spec.shape, outtype)]
        size = like.numel() * like.itemsize
        writer.add_tensor_info(name, spec.shape, _numpy_type(like), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _write_tensors(
    writer: Any, tensors: Widened, head_dim: int, outtype: str, progress: Progress
) -> None:
    last = -1
    for spec in tensors.specs:
        tensor, layer = tensors.tensor(spec), tensors.layer_of(spec.name)
        if ".self_attn.q_proj." in spec.name or ".self_attn.k_proj." in spec.name:
            tensor = interleaved(tensor, head_dim)
        stored = _stored(tensor, outtype)
        if not bool(torch.isfinite(stored).all()):
            raise InputError(
                f"{spec.name}: weights up to {float(tensor.abs().max()):.1e} do not fit "
                f"{stored.dtype}; use --outtype bf16 or f32"
            )
        writer.write_tensor_data(_array(stored))
        if layer is not None and layer > last:
            progress.layer(layer)
            last = layer


def interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k, (heads · head_dim, ...), with the two halves of each head interleaved."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape).contiguous()


def obstacle(config: PretrainedConfig) -> str | None:
    """Why `deci` is another function, or None."""
    if config.model_type not in FAMILIES or hasattr(config, "liar_ext_trace"):
        return f"it is a {config.model_type}, and {ARCHITECTURE} is LLaMA with or without biases"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}, not silu"
    types = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True)
    if window is not None and used and window < config.max_position_embeddings:
        return f"it attends to a sliding window of {window}"
    if types - {"full_attention"} and used:
        return f"its layers attend in several ways ({', '.join(sorted(types))})"
    rope = config.rope_parameters
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "only a part of each head is rotated"
    if rope.get("rope_type", "default") not in ("default", *ROPE):
        return f"its rotation is scaled by {rope['rope_type']}"
    return None


def _rope_factors(config: PretrainedConfig) -> Tensor | None:
    """What llama.cpp divides each frequency by, (head_dim / 2,) float32; None where nothing is."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    dim = plain_head_dim(config)
    plain = rope["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    scaled, attention = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    assert attention == 1.0, "neither scales the scores"
    return (plain / scaled.double()).float().contiguous()


def _keep_fields(writer: Any, vocabulary: Path) -> None:
    """What the converter says of the tokenizer and of the model, under this architecture."""
    import gguf

    reader = gguf.GGUFReader(str(vocabulary))
    prefix = f"{reader.fields['general.architecture'].contents()}."
    own = (
        *("attention.head_count", "attention.head_count_kv", "feed_forward_length"),
        *("attention.key_length", "attention.value_length", "rope.dimension_count"),
        # scaling is in the factors
        *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
    )
    dropped = {"general.architecture", "general.file_type", *(prefix + name for name in own)}
    for name, entry in reader.fields.items():
        if name.startswith("GGUF.") or name in dropped:
            continue
        new = ARCHITECTURE + name[len(prefix) - 1 :] if name.startswith(prefix) else name
        element = entry.types[1] if len(entry.types) > 1 else None
        writer.add_key_value(new, entry.contents(), entry.types[0], sub_type=element)


def _kind(shape: tuple[int, ...], outtype: str) -> str:
    return "F32" if len(shape) == 1 else outtype.upper()


def _stored(tensor: Tensor, outtype: str) -> Tensor:
    types = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    return tensor.to(torch.float32 if tensor.ndim == 1 else types[outtype])


def _numpy_type(tensor: Tensor) -> Any:
    import numpy as np

    # numpy has no bfloat16: its bytes are those of an integer, and its kind is said beside
    return {torch.float32: np.dtype("float32"), torch.float16: np.dtype("float16")}.get(
        tensor.dtype, np.dtype("int16")
    )


def _array(tensor: Tensor) -> Any:
    whole = tensor.contiguous()
    return (whole.view(torch.int16) if whole.dtype == torch.bfloat16 else whole).numpy()
