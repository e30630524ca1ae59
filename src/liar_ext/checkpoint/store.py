"""CheckpointStore: a layer's weights are in memory only while the driver works on it.

One thread reads the next layer while this one is computed, another writes the one before: at most
three layers are in memory, of which one is in the compute dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from liar_ext.checkpoint.buffers import fill_buffers
from liar_ext.checkpoint.matching import computed_in, tied_names
from liar_ext.checkpoint.reader import CheckpointReader
from liar_ext.checkpoint.shards import ShardWriter, TensorDigest, TensorSpec
from liar_ext.checkpoint.writer import storage_dtype
from liar_ext.engine.ranks import Ranks
from liar_ext.errors import InputError
from liar_ext.models import adapter_for, layout

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Placement:
    """Where and as what a CheckpointStore computes and writes.

    Attributes:
        output: folder for the weights.
        device, compute_dtype: of open layers; None is the checkpoint's main dtype.
        dtype: of the files, as in a Recipe.
        ranks: layers are written by turns.
        done: digests of the layers that an earlier run wrote, by layer.
    """

    output: Path
    device: torch.device
    compute_dtype: torch.dtype | None
    dtype: str
    ranks: Ranks = field(default_factory=Ranks.single)
    done: dict[str, str] = field(default_factory=dict)


class CheckpointStore:
    """LayerStore over safetensors files.

    Buffers go from file to file, those of the layers too: what is computed with is a copy.

    Attributes:
        model: the module tree, on `meta` but for what is open.
        writer: the output's files, from `prepare` on.
    """

    def __init__(
        self, model: PreTrainedModel, reader: CheckpointReader, placement: Placement
    ) -> None:
        self.model = model
        self.writer: ShardWriter | None = None
        self._reader, self._place = reader, placement
        self._compute_dtype = placement.compute_dtype or reader.main_dtype()
        adapter = adapter_for(model.config)
        self._layers = adapter.chain(model)
        self._backbone_path, self._backbone = adapter.backbone(model)
        # names by layer, as in the source: pruning adds biases to the tree
        self._names = [
            [f"{self._layers.path(index)}.{name}" for name, _ in layer.named_parameters()]
            for index, layer in enumerate(self._layers)
        ]
        self._buffers = {name for name, _ in model.named_buffers()}
        self._written: dict[str, str | Future[str]] = dict(placement.done)
        self._reads = ThreadPoolExecutor(1, "liar-ext-read")
        self._writes = ThreadPoolExecutor(1, "liar-ext-write")
        self._last = -1
        self._expected: frozenset[int] | None = None
        self._next: tuple[int, Future[dict[str, Tensor]]] | None = None
        self._writing: Future[str] | None = None
        self._order: dict[str, int] = {}

    def open_outside(self) -> None:
        alike = []
        for name, full, _ in self._outside():
            if full in self._reader:
                self._set(self._backbone, name, full, self._reader.get(full))
            else:
                alike.append((name, tied_names(self.model)[full]))
        for name, source in alike:
            _assign(self._backbone, name, self.model.get_parameter(source))
        # those of the layers as well: they are small and stay
        fill_buffers(self.model, self._reader, self._place.device, self._compute_dtype)

    def close_outside(self) -> None:
        for name, _, parameter in self._outside():
            _assign(self._backbone, name, parameter.detach().to("meta"))

    def open_head(self) -> None:
        self.open_outside()
        tied = tied_names(self.model)
        for head, name, full in self._head():
            if full in tied:
                head.weight = self.model.get_input_embeddings().weight
            else:
                self._set(head, name, full, self._reader.get(full))

    def close_head(self) -> None:
        for head, name, _ in self._head():
            _assign(head, name, head.get_parameter(name).detach().to("meta"))
        self.close_outside()

    def prepare(self, widths: list[dict[str, int]], added_biases: list[str], done: int) -> None:
        """Make the output's files, or find them again, with layers below `done` as written.

        Raises:
            InputError: they are not as the earlier run left them.
        """
        ranks, resumed = self._place.ranks, done > 0
        specs = self._specs(widths, added_biases)
        try:
            if ranks.rank == 0:
                self.writer = ShardWriter(self._place.output, specs, create=not resumed)
        except InputError as error:
            # made files raise OSError
            raise InputError(f"--resume: {error}") from error
        ranks.barrier()
        if self.writer is None:
            self.writer = ShardWriter(self._place.output, specs, create=False)
        self._order = {name: position for position, name in enumerate(self.writer.names)}
        by_layer = self._by_layer(specs)
        for index in range(done):
            # every rank marks all of them and looks at its share
            self.writer.mark_written(by_layer[index])
            if not self._mine(index):
                continue
            if self.writer.digest(by_layer[index]) != self._place.done.get(str(index)):
                raise InputError(
                    f"--resume: layer {index} in {self._place.output} is not what the earlier run "
                    "wrote; start again with --overwrite instead"
                )

    def expect(self, layers: Iterable[int]) -> None:
        self._expected, self._last = frozenset(layers), -1
        if self._next is not None and self._next[0] not in self._expected:
            # or it would stay in memory until a layer is opened
            self._next[1].cancel()
            self._next = None

    def open(self, index: int, *, aside: bool = False) -> None:
        tensors = self._read(index) if aside else self._take(index)
        if not aside:
            self._read_ahead(index)
        layer = self._layers[index]
        prefix = f"{self._layers.path(index)}."
        for full in self._names[index]:
            self._set(layer, full.removeprefix(prefix), full, tensors.pop(full))

    def _read_ahead(self, index: int) -> None:
        """What comes after a layer that is opened now."""
        # a layer once more, or one before the last, is one on the way back
        following = index + 1 if index > self._last else index - 1
        self._last = index
        wanted = self._expected is None or following in self._expected
        if wanted and 0 <= following < len(self._layers):
            self._next = following, self._reads.submit(self._read, following)

    def close(self, index: int, *, final: bool) -> None:
        layer, prefix = self._layers[index], f"{self._layers.path(index)}."
        mine = final and self._mine(index)
        stored: list[tuple[str, Tensor]] = []
        for name, parameter in list(layer.named_parameters()):
            if final:
                tensor = self._as_stored(prefix + name, parameter.detach())
                if mine:
                    # from a GPU the writing thread fetches it, while the next layer is computed
                    stored.append((prefix + name, tensor))
            _assign(layer, name, parameter.detach().to("meta"))
        if final and self.writer is not None:
            names = [prefix + name for name, _ in layer.named_parameters()]
            kept = [n for n in self._buffers if n.startswith(prefix) and n in self._order]
            if mine:
                stored += [(full, self._copied(full, self._reader.get(full))) for full in kept]
                self._wait()
                self._writing = self._writes.submit(self._write, stored)
                self._written[str(index)] = self._writing
            else:
                self.writer.mark_written([*names, *kept])

    def written(self) -> dict[str, str]:
        """Digests of the layers that are on disk, after those under way are there, too."""
        self._wait()
        found = {
            index: value if isinstance(value, str) else value.result()
            for index, value in self._written.items()
        }
        self._written = dict(found)
        return found

    def finish(self) -> None:
        """Copy everything outside the layers from file to file, and complete the files."""
        assert self.writer is not None, "prepare comes first"
        self._wait()
        ranks = self._place.ranks
        outside = [n for n in self.writer.names if self._layers.layer_of(n) is None]
        for position, name in enumerate(outside):
            if self._mine(position):
                self.writer.write_pieces(
                    name, (self._copied(name, p) for p in self._reader.pieces(name))
                )
            else:
                self.writer.mark_written([name])
        if ranks.rank:
            self.writer.sync()
        ranks.barrier()
        if ranks.rank == 0:
            self.writer.finish()
        ranks.barrier()

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the threads; what they are at is finished first."""
        self._reads.shutdown(cancel_futures=True)
        self._writes.shutdown(cancel_futures=True)
        if self.writer is not None:
            self.writer.close()

    def _specs(self, widths: list[dict[str, int]], added_biases: list[str]) -> list[TensorSpec]:
        """The output's tensors in the model's order."""
        specs = []
        for name, shape in layout.shapes(self.model.config, widths, added_biases).items():
            known = name in self._reader
            # a bias that was added takes the dtype of its own weight
            like = name if known else f"{name.removesuffix('bias')}weight"
            if known or (self._layers.layer_of(name) is not None and like in self._reader):
                specs.append(TensorSpec(name, shape, self._stored_dtype(like)))
        return specs

    def _by_layer(self, specs: list[TensorSpec]) -> list[list[str]]:
        """Names as `close` writes them."""
        found: list[list[str]] = [[] for _ in self._layers]
        for spec in specs:
            if (index := self._layers.layer_of(spec.name)) is not None:
                found[index].append(spec.name)
        return found

    def _stored_dtype(self, name: str) -> torch.dtype:
        dtype = self._reader.dtype(name)
        return storage_dtype(self._place.dtype, dtype) if dtype in FLOATS else dtype

    def _as_stored(self, full: str, tensor: Tensor) -> Tensor:
        """A layer's parameter in the dtype of its file."""
        like = full if full in self._reader else f"{full.rpartition('.')[0]}.weight"
        dtype = self._stored_dtype(like)
        stored = tensor.to(dtype)
        if not bool(torch.isfinite(stored).all()):
            raise InputError(
                f"{full}: repaired weights up to {float(tensor.abs().max()):.1e} do not "
                f"fit {dtype}; use --dtype bfloat16 or float32, or a larger --ridge"
            )
        return stored

    def _copied(self, name: str, piece: Tensor) -> Tensor:
        """A piece of what is not computed with, in the dtype of its file."""
        if not piece.is_floating_point():
            return piece
        stored = piece.to(self._stored_dtype(name))
        # buffers may mean infinity: bounds, masks
        if name not in self._buffers and not bool(torch.isfinite(stored).all()):
            raise InputError(f"{name}: has NaN or infinite weights; the checkpoint is damaged")
        return stored

    def _write(self, tensors: list[tuple[str, Tensor]]) -> str:
        assert self.writer is not None
        digest = TensorDigest()
        for name, tensor in sorted(tensors, key=lambda entry: self._order[entry[0]]):
            self.writer.write(name, tensor, digest)
        self.writer.sync(name for name, _ in tensors)
        tensors.clear()
        return digest.hexdigest()

    def _mine(self, index: int) -> bool:
        """Ranks write by turns: a layer is written while the next ones are computed."""
        return index % self._place.ranks.size == self._place.ranks.rank

    def _wait(self) -> None:
        """One layer is written at a time; raises what went wrong with it."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _read(self, index: int) -> dict[str, Tensor]:
        pin = self._place.device.type == "cuda"
        return {full: self._reader.get(full, pin=pin) for full in self._names[index]}

    def _take(self, index: int) -> dict[str, Tensor]:
        waiting, self._next = self._next, None
        if waiting is not None:
            found = waiting[1].result()
            if waiting[0] == index:
                return found
        return self._read(index)

    def _outside(self) -> list[tuple[str, str, nn.Parameter]]:
        """The backbone's parameters outside its layers and its head, where that is in it: name in
        it, name in the model, itself."""
        named = [
            (name, f"{self._backbone_path}.{name}".lstrip("."), parameter)
            for name, parameter in self._backbone.named_parameters()
        ]
        head = {full for _, _, full in self._head()}
        return [
            entry
            for entry in named
            if self._layers.layer_of(entry[1]) is None and entry[1] not in head
        ]

    def _head(self) -> list[tuple[nn.Module, str, str]]:
        """Parameters of the output embedding: it, name in it, name in the model."""
        head = self.model.get_output_embeddings()
        path = next((path for path, module in self.model.named_modules() if module is head), "")
        if head is None:
            return []
        return [(head, name, f"{path}.{name}") for name, _ in head.named_parameters()]

    def _set(self, module: nn.Module, name: str, full: str, tensor: Tensor) -> None:
        if tensor.dtype not in FLOATS:
            raise InputError(
                f"{full}: is {tensor.dtype}, quantised; prune the original first, then quantise"
            )
        dtype = computed_in(self.model, full, self._compute_dtype)
        _assign(module, name, tensor.to(self._place.device, dtype))


def _assign(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))
