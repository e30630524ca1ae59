"""Parts of what a compression holds at once: sizes they are made of, phases, the largest one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

# which flag lowers a part
FLAGS = {
    "hidden_states": "--hidden-states {elsewhere}, fewer --samples or a shorter --seq-len",
    "paused_forwards": "--hidden-states {elsewhere}, fewer --samples or a shorter --seq-len",
    "gradient_states": "--hidden-states {elsewhere}, fewer --gradient-samples or a shorter "
    "--seq-len",
    "choice_states": "--hidden-states {elsewhere}, fewer --samples or --search-samples",
    "policy_states": "--hidden-states {elsewhere}, fewer --samples or a shorter --seq-len",
    "unit_gradients": "fewer --gradient-samples",
    "graph": "a smaller --batch-size or a shorter --seq-len",
    "dense_outputs": "--hidden-states {elsewhere}, fewer --samples or --target-signal local",
    "passing_batch": "a smaller --batch-size or a shorter --seq-len",
    "attention_masks": "a shorter --seq-len",
    "statistics_of_other_sites": "--statistics sequential",
}


@dataclass(frozen=True)
class Weights:
    """Bytes of a dense model's weights.

    Attributes:
        item: of a number in the compute dtype. hidden: width of the hidden states, in numbers.
        outside: of embeddings and whatever is beside the layers, in the compute dtype;
            outside_read: of the largest of them as it is stored, if that is another dtype.
        layer: the largest layer in the compute dtype; read: as it is stored; pinned: that, each
            tensor rounded up to a power of two; largest: its largest tensor as it is stored, if
            that is another dtype.
        layers: how many. handed: numbers that a first layer hands on, for each pair of tokens.
    """

    item: int
    hidden: int
    outside: int
    outside_read: int
    layer: int
    read: int
    pinned: int
    largest: int
    layers: int
    handed: int


@dataclass(frozen=True)
class Sizes(Weights):
    """What the phases are made of; bytes unless said otherwise.

    Attributes:
        cuda: computes beside the host's memory.
        place: where hidden states and paused forwards wait: device, host or disk.
        process: interpreter, libraries, calibration tokens.
        written: the largest pruned layer as it is stored.
        ranks: how many.
        positions: tokens of this rank, with padding; batch: of its largest batch.
        masks: of the attention masks of all batches.
        alone: there is one segment of tokens.
    """

    cuda: bool
    place: str
    process: int
    written: int
    ranks: int
    positions: int
    batch: int
    masks: int
    alone: bool


@dataclass(frozen=True)
class Phase:
    """Attributes: name; parts in the memory of the device, and in the host's beside a GPU."""

    name: str
    device: dict[str, int]
    host: dict[str, int]

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


def phase(sizes: Sizes, name: str, device: dict[str, int], host: dict[str, int]) -> Phase:
    """A phase of these parts: on a CPU all are in the same memory, and those without bytes go."""
    host = {"process": sizes.process} | host
    if not sizes.cuda:
        device, host = host | device, {}
    device, host = ({k: v for k, v in part.items() if v} for part in (device, host))
    return Phase(name, device, host)


def with_host_part(sizes: Sizes, phase: Phase, name: str, size: int) -> Phase:
    """A phase with one more part in the host's memory."""
    if sizes.cuda:
        return replace(phase, host=phase.host | {name: size})
    return replace(phase, device=phase.device | {name: size})


def next_layer(sizes: Sizes) -> int:
    """Bytes of the layer that is read ahead."""
    # a pinned block is kept for the next tensor of its size: those of the open layer, too
    following = 2 * sizes.pinned if sizes.cuda else sizes.read
    return following if sizes.layers > 1 else following - sizes.read


def shelved(
    sizes: Sizes, name: str, positions: int, batch: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Hidden states of so many positions that wait, by batches: parts on the device and the host.

    Elsewhere than on the device, what enters something and what leaves it is there.
    """
    row = sizes.hidden * sizes.item
    if sizes.place == "device":
        return {name: positions * row}, {}
    pinned = -(-positions // batch) * power_of_two(batch * row)
    return {name: 2 * batch * row}, {name: pinned} if sizes.place == "host" else {}


def power_of_two(size: int) -> int:
    """What torch takes for `size` bytes of page-locked memory."""
    return 1 << max(size - 1, 0).bit_length()


def peak(phases: Sequence[Phase]) -> tuple[Phase, Phase]:
    """The phases with most bytes on the device, and on the host; on a CPU the same one twice."""
    device = max(phases, key=lambda phase: phase.device_bytes)
    host = max(phases, key=lambda phase: phase.host_bytes)
    return device, host if host.host else device


def advice(phase: Phase, elsewhere: str) -> str | None:
    """Which flag lowers the largest part of a phase that one can lower, if it is a tenth of all.

    Args:
        elsewhere: further places for hidden states.
    """
    parts = [name for name in phase.device if name in FLAGS]
    if not elsewhere:
        parts = [name for name in parts if "elsewhere" not in FLAGS[name]]
    largest = max(parts, key=phase.device.__getitem__, default=None)
    if largest is None or 10 * phase.device[largest] < phase.device_bytes:
        return None
    return FLAGS[largest].format(elsewhere=elsewhere)


def resident_bytes() -> int:
    """Bytes of this process that are in memory now."""
    with open("/proc/self/status", encoding="ascii") as lines:
        found = dict(line.split(":", 1) for line in lines)
    return int(found["VmRSS"].split()[0]) * 1024
