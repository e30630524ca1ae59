"""The model card of a checkpoint with a window of layers replaced."""

from __future__ import annotations

from typing import Any

from liar_ext.depth.replace.network import NETWORKS
from liar_ext.depth.report import layer_card
from liar_ext.report.text import number


def card(report: dict[str, Any]) -> str:
    """`README.md`, from what the report says."""
    layers, asked = report["layers"], report["replacement"]
    gone, trained = layers["replaced"], layers["trained"]
    many = len(trained) > 1
    stand = f"layers {trained[0]} to {trained[-1]}" if many else f"layer {trained[0]}"
    return layer_card(
        report,
        ("pruned", "layer-replacement"),
        f"with {layers['after']} of its {layers['before']} layers",
        f"Layers {gone[0]} to {gone[-1]}, counted from 0, were replaced by {stand} "
        f"(LLM-Streamline, arXiv 2403.19135), which {_begun(asked, many)} and "
        f"{'were' if many else 'was'} then trained alone; the other layers are as they were."
        f"\n\n{_training(report['training'], asked['loss'])}",
    )


def _begun(asked: dict[str, Any], many: bool) -> str:
    without = "" if NETWORKS[asked["network"]].attention else " without its attention"
    if asked["init"] == "random":
        return f"began at random{without and ' without attention'}"
    return f"began as {'those' if many else 'that layer'} of the source{without}"


def _training(training: dict[str, Any], loss: str) -> str:
    aim = (
        "the hidden states behind these layers in the source"
        if loss == "mse"
        else "the next tokens of a text"
    )
    told = f"Trained on {aim}, {training['steps']} steps, {training['tokens']:,} tokens."
    looks = training["held_out"]
    if not looks:
        return told + " Its quality was not measured."
    kept = next(look for look in looks if look["step"] == training["kept"])
    unit = "squared error an element" if loss == "mse" else "nats a token"
    return (
        f"{told} On {training['held_out_windows']} windows of that text that were held out, the "
        f"loss was {number(looks[0]['loss'], 4)} ({unit}) before and {number(kept['loss'], 4)} "
        f"after {kept['step']} steps, whose weights these are. Nothing else was measured."
    )
