"""What Gram matrices and cross moments share: which kernel runs, on what, and how many tokens.

float16 and bfloat16 go through the tensor cores as they are. float32 is split by `pack` into three
bfloat16 planes and becomes six products of them (relative error below 1e-6, and at most a sixth of
the bfloat16 rate, against a fifteenth for float32 without tensor cores on a GPU such as the H100,
by its data sheet); products in TF32 keep 11 bits and are not an option.

A tensor core truncates its running sum to float32, an error of one sign where the terms have one,
as on every diagonal. The kernels therefore add it to a second sum in registers, rounded to nearest,
every `flush_tokens` tokens, and that one to the matrix once for each launch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from liar_ext.errors import BackendError
from liar_ext.kernels import pack as packing
from liar_ext.kernels import runtime
from liar_ext.kernels.config import DTYPES, KERNELS, ProductConfig, config_for, fastest_kernel

# tokens per launch, and bytes of packed copies: the register sum of one launch rounds 128 times at
# 512 tokens per flush, and reading and writing the matrix once for so many tokens is below 1 %
TOKENS = 65536
PACKED_BYTES = 2**30

# the interpreter's time is per step, not per element. A flush every second step and bands of two
# rows, so that small matrices go through every branch
INTERPRETED = ProductConfig(block=64, block_t=64, warps=4, stages=1, flush=2, group=2)
INTERPRETED_PLANES = ProductConfig(block=64, block_t=64, warps=4, stages=1, flush=1, group=2)

# forces a kernel, as LIAR_BACKEND forces a backend
VARIABLE = "LIAR_GRAM_KERNEL"


@dataclass(frozen=True)
class Plan:
    """How a product is computed.

    Attributes:
        kernel: one of `KERNELS`.
        config: its launch parameters.
        planes: 3 for float32, else 1.
        packs: operands are copied by `pack` first (which also applies the mask).
        tokens: per launch.
    """

    kernel: str
    config: ProductConfig
    planes: int
    packs: bool
    tokens: int


def forced_kernel() -> str | None:
    """The kernel that `LIAR_GRAM_KERNEL` names, or None.

    Raises:
        BackendError: it names no kernel.
    """
    name = os.environ.get(VARIABLE, "").strip()
    if name and name not in KERNELS:
        raise BackendError(f"{VARIABLE}={name}: not a kernel; use one of {', '.join(KERNELS)}")
    return name or None


def plan(
    operands: list[Tensor],
    masked: bool,
    ordered: bool,
    kernel: str | None = None,
    config: ProductConfig | None = None,
) -> Plan:
    """Choose kernel, configuration and copies for a product of `operands` (T, n), of one dtype.

    From compute capability 9.0 on the kernel that was timed to be the faster one on this device, or
    descriptors if none was; except that a mask alone goes to the pointer kernel, which applies it
    in its loads, where descriptors would need a packed copy.

    Args:
        kernel: one of `KERNELS` to force it; None for `LIAR_GRAM_KERNEL` or the best one.
        config: launch parameters, or None for the committed ones.
    Raises:
        BackendError: a forced kernel cannot run here, or the GPU or the dtype has none.
    """
    x = operands[0]
    dtype = str(x.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise BackendError(f"no product kernel for {x.dtype}: use one of {', '.join(DTYPES)}")
    if kernel is not None and kernel not in KERNELS:
        raise BackendError(f"no product kernel {kernel!r}: use one of {', '.join(KERNELS)}")
    forced = kernel or forced_kernel()
    interpreted = runtime.interprets(x.device)
    architecture = 10**6 if interpreted else runtime.capability(x.device)
    if forced == "descriptor" and architecture < 90:
        raise BackendError(
            f"the descriptor kernel needs compute capability 9.0 or newer; {x.device} has "
            f"{architecture / 10:.1f}: use pointer"
        )
    planes = 3 if x.dtype == torch.float32 else 1
    must_pack = ordered or planes == 3 or not all(_is_aligned(operand) for operand in operands)
    if forced is not None:
        chosen = forced
    elif interpreted or architecture < 90 or (masked and not must_pack):
        chosen = "pointer"
    else:
        name = runtime.device_name(x.device)
        chosen = fastest_kernel(dtype, x.shape[1], name) or "descriptor"
    packs = must_pack or (chosen == "descriptor" and masked)
    columns = max(operand.shape[1] for operand in operands)
    if config is None:
        config = _config(chosen, dtype, columns, architecture, x.device, interpreted)
    tokens = TOKENS
    if packs:
        row = sum(packing.padded(operand.shape[1]) for operand in operands) * planes * 2
        step = config.flush_tokens
        tokens = max(min(TOKENS, PACKED_BYTES // row) // step * step, step)
    return Plan(chosen, config, planes, packs, tokens)


def _config(
    kernel: str,
    dtype: str,
    columns: int,
    architecture: int,
    device: torch.device,
    interpreted: bool,
) -> ProductConfig:
    if interpreted:
        return INTERPRETED_PLANES if dtype == "float32" else INTERPRETED
    try:
        return config_for(kernel, dtype, columns, architecture, runtime.device_name(device))
    except ValueError as error:
        raise BackendError(f"{error}; set LIAR_BACKEND=torch") from error


def _is_aligned(x: Tensor) -> bool:
    """Both kernels read it in place: whole rows of 16-byte groups, which do not overlap.

    And not too far apart: in the pointer kernel, offsets within a step of tokens have 32 bits.
    """
    return (
        x.stride(1) == 1
        and x.shape[1] % packing.ALIGN == 0
        and x.stride(0) % packing.ALIGN == 0
        and x.shape[1] <= x.stride(0) < 2**23
        and x.data_ptr() % 16 == 0
    )


def mask_bytes(token_mask: Tensor | None) -> Tensor | None:
    """(T,) uint8 that is not zero for valid tokens."""
    return None if token_mask is None else token_mask.bool().contiguous().view(torch.uint8)


def launch(
    chosen: Plan, x: Tensor, y: Tensor, mask: Tensor | None, out: Tensor, triangle: bool
) -> None:
    """`out += Σ x yᵀ` for (planes, T, width) operands as the kernels take them.

    Raises:
        BackendError: the kernel could not be launched. There is no second try with the other one.
    """
    # each module decorates a kernel, and the descriptor one needs a newer Triton interface
    from liar_ext.kernels import gram_descriptor, gram_pointer

    run = {"pointer": gram_pointer.launch, "descriptor": gram_descriptor.launch}[chosen.kernel]
    try:
        run(x, y, mask, out, triangle, chosen.config)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        other = next(name for name in KERNELS if name != chosen.kernel)
        raise BackendError(
            f"the {chosen.kernel} kernel failed with {chosen.config}: {error}; "
            f"{VARIABLE}={other} runs the other one"
        ) from error
