"""A model at one workload in one mode: checked against transformers' own results, then timed.

A decoder runs as `generate` has it: the prompt in one forward that keeps keys and values, then a
forward for every further token, the most likely one each time. `eager` grows a `DynamicCache`;
`compile` fills a `StaticCache` with the prompt, eagerly, and decodes with `torch.compile` of the
whole model, in the mode that transformers compiles in by itself. An encoder's forward is
compiled whole.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StaticCache

from liar_ext.bench.stopwatch import Stopwatch
from liar_ext.caches import cache_option

MODES = ("eager", "compile")
# CUDA graphs on a GPU: what `generate` compiles with (`CompileConfig`)
OPTIONS: dict[str, Any] = {"mode": "reduce-overhead"}
# models in a run, each with graphs of its own; PyTorch would go on eagerly, silently, after eight
GRAPHS = 1024
# runs until CUDA graphs are recorded and none is built any more: of a window of attention that is
# full, and of positions that a family counts in Python, there is another graph than of the first
SETTLING = 3
CONTIGUOUS: dict[str, Any] = {"memory_format": torch.contiguous_format}


class Lane(Protocol):
    """What runs by turns.

    Attributes:
        compile_s: seconds until the first compiled result; None where nothing is compiled.
    """

    compile_s: float | None

    def check(self) -> dict[str, Any]:
        """Compare with transformers: `ok`, and what was compared."""

    def round(self) -> dict[str, float]:
        """Seconds of each phase, once."""

    def cache_bytes(self) -> float:
        """Keys and values that a token reads on average, of all sequences."""


class Decoding:
    """Greedy generation of `new_tokens` tokens after a prompt.

    Args:
        ids: (batch, prompt) int64, on the model's device.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor, new_tokens: int, mode: str) -> None:
        self._model, self._ids, self._new = model, ids, new_tokens
        self._watch = Stopwatch(ids.device)
        self._step: Callable[..., Any] = model
        self._static: StaticCache | None = None
        self._options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            # as `generate` does: of a prompt, the logits behind its last token alone
            self._options["logits_to_keep"] = 1
        self._cache = cache_option(model)
        self.compile_s: float | None = None
        if mode == "compile":
            length = ids.shape[1] + new_tokens
            self._static = StaticCache(config=model.config, max_cache_len=length)
            self._step = torch.compile(model, **OPTIONS)
            begun = time.perf_counter()
            self.tokens(2)
            self._watch.wait()
            self.compile_s = time.perf_counter() - begun
            for _ in range(SETTLING):
                self.tokens(new_tokens)

    @property
    def cache(self) -> Any:
        """An empty one."""
        if self._static is None:
            return DynamicCache(config=self._model.config)
        self._static.reset()
        return self._static

    def prefill(self, cache: Any) -> Tensor:
        """The next token of each sequence (batch, 1)."""
        return _next(self._model(self._ids, **{self._cache: cache}, **self._options))

    def decode(self, token: Tensor, cache: Any) -> Tensor:
        """The same after one more token."""
        if self._static is not None:
            # what a CUDA graph gives back is overwritten by its next run
            torch.compiler.cudagraph_mark_step_begin()
        return _next(self._step(token, **{self._cache: cache}, **self._options))

    def tokens(self, count: int, forced: Tensor | None = None) -> Tensor:
        """Generated ids (batch, count).

        Args:
            forced: ids to go on with instead of those that were generated.
        """
        cache = self.cache
        found = [self.prefill(cache)]
        for at in range(1, count):
            # a slice has other strides, for which a compiled model would be compiled again
            given = found[-1] if forced is None else forced[:, at - 1 : at].clone(**CONTIGUOUS)
            found.append(self.decode(given, cache))
        return torch.cat(found, 1)

    def check(self) -> dict[str, Any]:
        """The tokens are those of `model.generate`.

        All of them, where both round alike. A compiled model does not, and neither does an
        attention kernel that `generate` has chosen otherwise for its mask; then another token may
        be preferred where two are as good. So given the reference's tokens, each choice has to be
        the reference's or within `rounding` of it, of which `gap` and `bound` say how much that is.
        """
        expected, logits = reference(self._model, self._ids, self._new)
        found = self.tokens(self._new)
        if bool((found == expected).all()):
            return {"tokens": found.numel(), "same": found.numel(), "ok": True}
        # behind a token that differs everything may: what came before is the reference's now
        found = self.tokens(self._new, expected)
        gap = float((logits.amax(-1) - logits.gather(-1, found[..., None])[..., 0]).max())
        bound = rounding(self._model) * float(logits.abs().max())
        same = int((found == expected).sum())
        return {
            "tokens": found.numel(),
            "same": same,
            "gap": gap,
            "bound": bound,
            "ok": gap <= bound,
        }

    def round(self) -> dict[str, float]:
        """Seconds of the prompt, and of each further token on average."""
        cache = self.cache
        self._watch.wait()
        begun = time.perf_counter()
        token = self.prefill(cache)
        self._watch.wait()
        filled = time.perf_counter()
        for _ in range(1, self._new):
            token = self.decode(token, cache)
        self._watch.wait()
        ended = time.perf_counter()
        return {"prefill": filled - begun, "decode": (ended - filled) / (self._new - 1)}

    def cache_bytes(self) -> float:
        """Measured on a cache behind the prompt."""
        cache = DynamicCache(config=self._model.config)
        self._model(self._ids, **{self._cache: cache}, **self._options)
        parts = [getattr(own, name, None) for own in cache.layers for name in ("keys", "values")]
        held = sum(p.numel() * p.element_size() for p in parts if isinstance(p, Tensor))
        if self._static is not None:
            # attention goes over all places, filled or not
            return held * (self._ids.shape[1] + self._new) / self._ids.shape[1]
        return held * (self._ids.shape[1] + self._new / 2) / self._ids.shape[1]


class Encoding:
    """One forward of sentences of one length.

    Args:
        ids: (batch, length) int64, on the model's device.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor, mode: str) -> None:
        self._model, self._ids = model, ids
        self._mask = torch.ones_like(ids)
        self._watch = Stopwatch(ids.device)
        self._call: Callable[..., Any] = model
        self.compile_s: float | None = None
        if mode == "compile":
            self._call = torch.compile(model, **OPTIONS)
            begun = time.perf_counter()
            self._forward()
            self._watch.wait()
            self.compile_s = time.perf_counter() - begun
            for _ in range(SETTLING):
                self._forward()

    def _forward(self) -> Tensor:
        if self._call is not self._model:
            torch.compiler.cudagraph_mark_step_begin()
        found: Tensor = self._call(input_ids=self._ids, attention_mask=self._mask)[0]
        return found

    def check(self) -> dict[str, Any]:
        """Each sentence of a batch comes out as it does by itself, without padding and eagerly."""
        found = self._forward().double()
        alone = [
            self._model(input_ids=own[None], attention_mask=torch.ones_like(own[None]))[0]
            for own in self._ids
        ]
        expected = torch.cat(alone).double()
        error = float((found - expected).norm() / expected.norm())
        bound = rounding(self._model)
        return {"sentences": len(alone), "error": error, "bound": bound, "ok": error <= bound}

    def round(self) -> dict[str, float]:
        self._watch.wait()
        begun = time.perf_counter()
        self._forward()
        self._watch.wait()
        return {"prefill": time.perf_counter() - begun}

    def cache_bytes(self) -> float:
        return 0.0


def rounding(model: PreTrainedModel) -> float:
    """How far apart, relatively, two orders of the same sums may be: a unit of rounding in each
    of some 16 products and sums of a layer, which add up as independent errors do."""
    layers = int(model.config.get_text_config().num_hidden_layers)
    return torch.finfo(model.dtype).eps * math.sqrt(16 * layers)


def reference(model: PreTrainedModel, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What `model.generate` says: ids (batch, count), logits (batch, count, vocabulary)."""
    # its type says that it is a tensor
    generate: Any = model.generate
    with _plain(model):
        found = generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return found.sequences[:, ids.shape[1] :], torch.stack(found.logits, 1).float()


@contextmanager
def _plain(model: PreTrainedModel) -> Iterator[None]:
    """Greedy, without an end and without penalties: what a folder's generation_config.json says
    would come on top of any that is given."""
    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=None, bos_token_id=0, pad_token_id=0
    )
    try:
        yield
    finally:
        model.generation_config = own


def _next(output: Any) -> Tensor:
    # a copy in float32, as `generate` compares: of 16-bit logits many are equal, and which of them
    # comes first depends on the type
    logits: Tensor = output.logits[:, -1, :].to(copy=True, dtype=torch.float32)
    return logits.argmax(-1, keepdim=True)


def lane(model: PreTrainedModel, kind: str, ids: Tensor, new_tokens: int, mode: str) -> Lane:
    """A model ready for a workload; with `compile` it has been compiled.

    Raises:
        Exception: whatever keeps torch.compile from it, see `why_not`.
    """
    if kind == "decoder":
        return Decoding(model, ids, new_tokens, mode)
    return Encoding(model, ids, mode)


@contextmanager
def compiling(modes: tuple[str, ...]) -> Iterator[None]:
    """A workload: graphs of an earlier one are dropped, and PyTorch keeps one for every model."""
    if "compile" not in modes:
        yield
        return
    import torch._dynamo

    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=GRAPHS, accumulated_recompile_limit=GRAPHS):
        yield


def settled(mode: str) -> Any:
    """While this lasts nothing may be compiled: it would be timed."""
    if mode != "compile":
        return nullcontext()
    return torch.compiler.set_stance("fail_on_recompile")


def why_not(error: BaseException) -> str:
    """In a line, why something could not be compiled."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {' '.join(first.split())[:200]}".rstrip(": ")
