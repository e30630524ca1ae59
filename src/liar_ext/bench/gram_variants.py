"""What `liar bench gram` compares: our backends and kernels, and what a user has without us."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from liar_ext.bench import backends_of
from liar_ext.bench.measure import variable
from liar_ext.ops import Moments, _native_gram, backends, gram
from liar_ext.ops.gram import gram_accumulate

BASELINE = "x.T @ x"
QUACK = "quack"
# what LIAR_GRAM_KERNEL can force inside the triton backend
KERNELS = ("pointer", "descriptor")


@dataclass(frozen=True)
class Setting:
    """How the Hopper kernel is launched: arguments of `_native_gram.gram_sm90`, 0 for a default."""

    tile: int
    cluster: int
    period: int = 0

    @property
    def name(self) -> str:
        return f"{self.tile}x{self.cluster}" + (f":{self.period}" if self.period else "")


# no user can ask for these: they say whether what the kernel chooses by itself is right
SETTINGS = tuple(
    Setting(tile, cluster, period)
    for tile, cluster in ((128, 1), (256, 1), (256, 2))
    for period in (0, 12)
)


@dataclass(frozen=True)
class Variant:
    """One of our implementations.

    Attributes:
        backend: what LIAR_BACKEND forces. kernel: value of LIAR_GRAM_KERNEL, or None.
        chosen: a user who forces nothing gets this one.
        setting: the Hopper kernel itself is called, with this and on whole triangles only.
    """

    backend: str
    kernel: str | None = None
    chosen: bool = False
    setting: Setting | None = None

    @property
    def name(self) -> str:
        kernel = self.kernel if self.setting is None else self.setting.name
        return self.backend if kernel is None else f"{self.backend}:{kernel}"

    @contextmanager
    def forced(self) -> Iterator[None]:
        with (
            variable("LIAR_BACKEND", f"gram={self.backend}"),
            variable("LIAR_GRAM_KERNEL", self.kernel),
        ):
            yield

    def accumulate(
        self, x: Tensor, token_mask: Tensor | None = None, out: Moments | None = None
    ) -> Moments:
        if self.setting is not None:
            made = Moments.zeros(x.shape[1], device=x.device) if out is None else out
            return _launch(x, made, self.setting)
        with self.forced():
            if out is None or out.complete or out.order is not None:
                return gram(x, token_mask, out)
            # the kept columns of x come first, which Moments cannot say: the operator underneath
            gram_accumulate(x, token_mask, None, out.gram, out.sum, out.count)
            return out


def usable(
    names: Sequence[str] | None, device: torch.device, dtype: torch.dtype
) -> tuple[list[Variant], dict[str, str]]:
    """The variants that run on `device` with `dtype`, and why the others do not.

    Args:
        names: backends, or None for all that run and can be fast.
    Raises:
        InputError: a backend of `names` cannot run here.
    """
    running, absent = backends_of.running("gram", names, device, dtype)
    automatic = backends_of.automatic("gram", device, dtype)
    found = [Variant(backend, chosen=backend == automatic) for backend in running]
    if "triton" in running:
        found += [Variant("triton", kernel) for kernel in KERNELS]
    if "cuda" in (names or backends.NAMES):
        found += settings(device, dtype)
    return found, absent


def settings(device: torch.device, dtype: torch.dtype) -> list[Variant]:
    """The Hopper kernel with each of `SETTINGS`, where it runs and reads 16-bit values in place."""
    if dtype not in _native_gram.DTYPES or _native_gram.unavailable(device, dtype) is not None:
        return []
    return [Variant("cuda", setting=setting) for setting in SETTINGS]


def _launch(x: Tensor, out: Moments, setting: Setting) -> Moments:
    out.count.add_(x.shape[0])
    out.mirrored = False
    options = {"tile": setting.tile, "cluster": setting.cluster, "period": setting.period}
    _native_gram.gram_sm90(x, out.gram, out.sum, **options)
    return out


def product_only(x: Tensor, gram: Tensor) -> None:
    """`gram += XᵀX` (n, n) by the Triton kernels without column sums: to see what these cost."""
    from liar_ext.kernels import products, runtime
    from liar_ext.kernels.pack import pack_padded

    with runtime.on_device(x.device):
        chosen = products.plan([x], masked=False, ordered=False)
        for part in x.split(chosen.tokens):
            operand = pack_padded(part, planes=chosen.planes) if chosen.packs else part[None]
            products.launch(chosen, operand, operand, None, gram, triangle=True)


def quack(device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | str:
    """The symmetric product of `quack-kernels` on x (T, n), or why it cannot be called."""
    if device.type != "cuda":
        return "its kernels need a GPU"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it multiplies 16-bit values, not {dtype}"
    try:
        product = importlib.import_module("quack.gemm_interface").gemm_symmetric
    except ModuleNotFoundError:
        return "quack-kernels is not installed"
    except Exception as error:
        # it registers operators and compiles on import: any failure there is its own
        return f"quack-kernels does not load: {type(error).__name__}: {error}"

    def symmetric(x: Tensor) -> Tensor:
        result: Tensor = product(x.T, x, out_dtype=torch.float32)
        return result

    return symmetric
