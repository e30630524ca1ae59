"""CheckpointStore: a layer's weights are in memory only while the driver works on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from liar_ext.checkpoint.reader import CheckpointReader
from liar_ext.checkpoint.writer import CheckpointWriter, storage_dtype
from liar_ext.errors import InputError
from liar_ext.models import adapter_for

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class CheckpointStore:
    """LayerStore over safetensors files.

    Attributes:
        model: the module tree, on `meta` but for what is open.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reader: CheckpointReader,
        writer: CheckpointWriter | None,
        *,
        device: torch.device,
        compute_dtype: torch.dtype | None,
        dtype: str,
    ) -> None:
        self.model = model
        self._reader = reader
        self._writer = writer
        self._device = device
        self._compute_dtype = compute_dtype or reader.main_dtype()
        self._dtype = dtype
        self._stored: dict[str, torch.dtype] = {}
        adapter = adapter_for(model.config)
        self._layers_path, self._layers = adapter.layer_list(model)
        self._backbone_path, self._backbone = adapter.backbone(model)

    def open_outside(self) -> None:
        for name, full, _ in self._outside():
            self._load(self._backbone, name, full)
        for name, buffer in self.model.named_buffers():
            _set(self.model, name, buffer.to(self._device), parameter=False)

    def close_outside(self) -> None:
        for name, _, parameter in self._outside():
            _set(self._backbone, name, parameter.detach().to("meta"))

    def open(self, index: int) -> None:
        layer = self._layers[index]
        for name, _ in list(layer.named_parameters()):
            self._load(layer, name, f"{self._layers_path}.{index}.{name}")

    def close(self, index: int, *, final: bool) -> None:
        layer = self._layers[index]
        for name, parameter in list(layer.named_parameters()):
            if final and self._writer is not None:
                full = f"{self._layers_path}.{index}.{name}"
                # a bias that was added takes the dtype of its own weight
                own = full if full in self._stored else full.rpartition(".")[0] + ".weight"
                dtype = storage_dtype(self._dtype, self._stored[own])
                stored = parameter.to(dtype)
                if not bool(torch.isfinite(stored).all()):
                    raise InputError(
                        f"{full}: repaired weights up to {float(parameter.abs().max()):.1e} do not "
                        f"fit {dtype}; use --dtype bfloat16 or float32, or a larger --ridge"
                    )
                self._writer.add(full, stored)
            _set(layer, name, parameter.detach().to("meta"))

    def finish(self) -> None:
        """Copy everything outside the layers from file to file."""
        assert self._writer is not None
        for name in self.model.state_dict():
            if not name.startswith(f"{self._layers_path}.") and name in self._reader:
                tensor = self._reader.get(name)
                if tensor.is_floating_point():
                    tensor = tensor.to(storage_dtype(self._dtype, tensor.dtype))
                    if not bool(torch.isfinite(tensor).all()):
                        raise InputError(
                            f"{name}: has NaN or infinite weights; the checkpoint is damaged"
                        )
                self._writer.add(name, tensor)
        self._writer.finish()

    def _outside(self) -> list[tuple[str, str, nn.Parameter]]:
        """The backbone's parameters outside its layers: name in it, name in the model, itself."""
        named = [
            (name, f"{self._backbone_path}.{name}".lstrip("."), parameter)
            for name, parameter in self._backbone.named_parameters()
        ]
        return [entry for entry in named if not entry[1].startswith(f"{self._layers_path}.")]

    def _load(self, module: nn.Module, name: str, full: str) -> None:
        tensor = self._reader.get(full)
        if tensor.dtype not in FLOATS:
            raise InputError(
                f"{full}: is {tensor.dtype}, quantised; prune the original first, then quantise"
            )
        self._stored[full] = tensor.dtype
        _set(module, name, tensor.to(self._device, self._compute_dtype))


def _set(module: nn.Module, name: str, value: Tensor, *, parameter: bool = True) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if parameter:
        setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
    else:
        owner._buffers[leaf] = value
