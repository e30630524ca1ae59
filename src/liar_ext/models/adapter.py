"""Adapter: what a model family declares so that everything else can work on Sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from liar_ext.errors import InputError, UnsupportedModelError
from liar_ext.models.chain import Chain
from liar_ext.models.site import Site, SiteSpec
from liar_ext.ops.logits import PLAIN, Shape, shaped


@dataclass(frozen=True)
class Features:
    """What a model reads that reads no tokens.

    Attributes:
        name: of the argument of its forward.
        shape: config -> of one sample.
        length: config -> hidden states that it makes of one.
    """

    name: str
    shape: Callable[[PretrainedConfig], tuple[int, ...]]
    length: Callable[[PretrainedConfig], int]


@dataclass(frozen=True)
class Decoder:
    """The second stack of an encoder-decoder, which reads what the first one makes of its tokens.

    Attributes:
        path: of the stack in the backbone; layers: of its list of layers in the stack.
        sites: of its layers, of the kinds that those of the encoder have.
        between: what is between the encoder's last layer and the decoder, in the backbone.
        across: linears of a layer that read the encoder's tokens.
    """

    path: str
    layers: str
    sites: tuple[SiteSpec, ...]
    between: str
    across: tuple[str, ...]


def plain_head_dim(config: PretrainedConfig) -> int:
    """`head_dim` where the config states it, else hidden size / heads."""
    stated = getattr(config, "head_dim", None)
    return stated or config.hidden_size // config.num_attention_heads


@dataclass(frozen=True)
class Adapter:
    """One model family.

    Attributes:
        model_type: `config.model_type` this adapter serves.
        layers: path of the layer list inside the backbone (the headless model).
        sites: the Sites of a layer in the order in which a forward pass reaches them; none where
            they depend on the config, see `variant`.
        decoder: True for causal language models (packed calibration), False for encoders.
        head_dim: config -> width of one head.
        explicit: config -> fields to state explicitly before widths change, because their
            default is derived from a width (`head_dim = hidden_size / num_attention_heads`).
        max_positions: config -> longest sequence the model takes.
        residual: config -> whether a layer's output is the sum of its input and its consumers'
            outputs: the norms are in front (pre-norm).
        scale: what a consumer's output is multiplied by before it is added, where it is.
        no_sum: what is between the consumers and the residual stream where `residual` says no, as
            the end of "this model ...".
        variant: config -> fields of this object that the config decides, as Sites whose fused
            projections depend on numbers of heads; `of` puts them in.
        refuse: config -> reason why this variant cannot be pruned, or None.
        refused: kind of Site that the family has and that cannot be pruned -> why.
        returns: entries of the tuple that a layer gives back, hidden states first; 0 where it gives
            back hidden states alone.
        takes: further arguments of a forward; None is the same for all decoders, see `options`.
        plain_head: logits are what the output embedding makes of the last hidden states, or
            `logits` of that.
        logits: see `ops.logits`.
        neutral_norm: the weight of a norm that scales by nothing: 0 where it adds 1 to it.
        note: of the family, for the table of families.
        traced: its Sites were found by running layers, see `liar_ext.tracing`.
        features: what the backbone reads that reads no tokens; None for those that do.
        part: of an encoder-decoder the stack that this is, whose layers are pruned.
        encoder_decoder: stacks of both kinds are pruned; then: the second one, where a model has
            it. What is said here of layers is of the first.
        hands_on: the first layer of a stack gives back, beside its hidden states, what the model
            hands to all others.
        alias: another model_type with the same modules and weight names, for head counts that
            this family's own config validation rejects.
    """

    model_type: str
    layers: str
    sites: tuple[SiteSpec, ...]
    decoder: bool
    head_dim: Callable[[PretrainedConfig], int] = plain_head_dim
    max_positions: Callable[[PretrainedConfig], int] = lambda config: config.max_position_embeddings
    explicit: Callable[[PretrainedConfig], dict[str, Any]] = lambda config: {}
    residual: Callable[[PretrainedConfig], bool] = lambda config: False
    scale: float = 1.0
    no_sum: str = "has norms behind its attention and FFN (post-norm)"
    variant: Callable[[PretrainedConfig], Mapping[str, Any]] = lambda config: {}
    refuse: Callable[[PretrainedConfig], str | None] = lambda config: None
    refused: Mapping[str, str] = field(default_factory=dict)
    returns: int = 0
    takes: Mapping[str, bool] | None = None
    plain_head: bool = True
    logits: Shape = PLAIN
    neutral_norm: float = 1.0
    note: str = ""
    traced: bool = False
    features: Features | None = None
    part: str | None = None
    encoder_decoder: bool = False
    then: Decoder | None = None
    hands_on: bool = False
    alias: str | None = None

    def of(self, config: PretrainedConfig) -> Adapter:
        """The adapter of a model with this (text) config."""
        return replace(self, **self.variant(config))

    def check_targets(self, kinds: tuple[str, ...]) -> None:
        """Raises UnsupportedModelError where a kind of Site cannot be pruned in this family."""
        for kind in kinds:
            if kind in self.refused:
                able = ", ".join(spec.kind for spec in self.sites)
                raise UnsupportedModelError(
                    f"--target {kind}: the {kind} of this {self.model_type} model cannot be "
                    f"pruned: {self.refused[kind]}; choose from {able}"
                )

    def silent(self, config: PretrainedConfig) -> bool:
        """Whether a layer whose consumers say nothing gives back its input: what they say is added
        to it, as it is or normed."""
        alone = all(spec.block is not None for spec in self.sites)
        return self.residual(config) or (alone and not self.refused)

    def head(self, model: PreTrainedModel) -> nn.Module:
        """What makes logits of last hidden states: its output embedding and what comes behind."""
        return shaped(model.get_output_embeddings(), self.logits)

    @property
    def options(self) -> dict[str, Any]:
        """Further arguments of a forward: decoders would otherwise keep keys and values."""
        if self.takes is not None:
            return dict(self.takes)
        return {"use_cache": False} if self.decoder else {}

    def window(self, config: PretrainedConfig, asked: int) -> int:
        """Hidden states of a calibration sample, where windows of `asked` tokens are wanted."""
        if self.features is not None:
            return self.features.length(config)
        return min(asked, self.max_positions(config))

    def backbone(self, model: PreTrainedModel) -> tuple[str, nn.Module]:
        """The headless model inside `model` and its path ('' when it is `model` itself)."""
        for path, module in model.named_modules():
            config = getattr(module, "config", None)
            if getattr(config, "model_type", None) != self.model_type:
                continue
            if self.part is not None and path.rpartition(".")[2] not in ("", self.part):
                # another stack of the same kind
                continue
            if isinstance(module, PreTrainedModel) and _has_submodule(module, self.layers):
                return path, module
        where = f"{self.part}.{self.layers}" if self.part else self.layers
        raise InputError(f"{type(model).__name__} has no {self.model_type} layers at {where}")

    def chain(self, model: PreTrainedModel) -> Chain:
        """The layers of `model`, of both stacks where it has two."""
        path, backbone = self.backbone(model)
        lists = [self.layers]
        if self.then is not None:
            lists.append(f"{self.then.path}.{self.then.layers}")
        stacks = []
        for own in lists:
            layers = backbone.get_submodule(own)
            if not isinstance(layers, nn.ModuleList):
                raise InputError(f"{path}.{own} is a {type(layers).__name__}, not a ModuleList")
            stacks.append((f"{path}.{own}".lstrip("."), layers))
        return Chain(stacks)

    def layer_list(self, model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
        """The layers of `model` and their full path, for what works on one list.

        Raises:
            UnsupportedModelError: it has two.
        """
        self.check_one_stack()
        return self.chain(model).stacks[0]

    def check_one_stack(self) -> None:
        """Raises UnsupportedModelError where there are two."""
        if self.then is not None:
            raise UnsupportedModelError(
                f"a {self.model_type} model has two stacks of layers, its encoder's and its "
                "decoder's, and this works on one; its widths can be pruned (liar prune, plan)"
            )

    def specs(self, stack: int) -> tuple[SiteSpec, ...]:
        """The Sites of a layer of a stack."""
        return self.then.sites if stack and self.then is not None else self.sites

    def sites_of(self, model: PreTrainedModel, layer: int, kinds: tuple[str, ...]) -> list[Site]:
        """The Sites of one layer, restricted to `kinds`, in forward order; none where all units of
        one are gone."""
        chain = self.chain(model)
        head_dim = self.head_dim(text_config(model.config))
        path, module = chain.path(layer), chain[layer]
        return [
            Site(spec, layer, module, head_dim, f"{path}.{spec.consumer}")
            for spec in self.specs(chain.stack(layer))
            if spec.kind in kinds and not spec.absent(module)
        ]


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config that describes the layers: `config` itself or its nested text config."""
    return config.get_text_config()


def stated_dtype(config: PretrainedConfig) -> torch.dtype:
    """What a config says of the weights of the layers; a nested one may leave it to the outer."""
    for part in (text_config(config), config):
        found = getattr(part, "dtype", None)
        if isinstance(found, torch.dtype):
            return found
    return torch.float32


def _has_submodule(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
