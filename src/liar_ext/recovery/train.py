"""Train chosen parameters of a model on windows of tokens; all others stay as they are.

Autograd records from the first trained parameter on, so what lies below it keeps no activations.
Modules stay in the mode that they are in: in eval mode there is no dropout, and the same seed gives
the same weights, also after an interruption.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import accelerate
import torch
from torch import Tensor, nn

from liar_ext.calibration.batch import Batch
from liar_ext.engine.progress import Progress, Silent
from liar_ext.errors import InputError
from liar_ext.recovery.schedule import Schedule
from liar_ext.recovery.state import TrainingState

# entries of the log: enough for a plot, small enough for a report
LOGGED = 100
OPTIMISER = "optimiser"
BEST = "best"
NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Loss:
    """What a batch costs.

    Attributes:
        total: the sum over its terms, a scalar that can be differentiated.
        count: terms, as predicted tokens or elements of hidden states; 0 where there is none.
    """

    total: Tensor
    count: int


@dataclass
class Training:
    """What happened.

    Attributes:
        steps: updates in all; resumed_at: how many of them an earlier run had made.
        log: about a hundred entries: `step`, mean `loss` per term since the one before, `rate`, and
            `gradient_norm`, the largest before clipping.
        held_out: `step` and `loss` per term on the held-out windows, the first before any update.
        kept: after how many updates the parameters are what they are: all, or with `best` the look
            at the held-out windows with the lowest loss, the first of equal ones.
        tokens: valid tokens of all updates; seconds: of this run.
    """

    steps: int
    resumed_at: int = 0
    log: list[dict[str, float]] = field(default_factory=list)
    held_out: list[dict[str, float]] = field(default_factory=list)
    kept: int = 0
    tokens: int = 0
    seconds: float = 0.0


def train(
    model: nn.Module,
    parameters: Sequence[str],
    windows: Batch,
    loss: Callable[[Batch], Loss],
    schedule: Schedule,
    *,
    held_out: Batch | None = None,
    state: TrainingState | None = None,
    progress: Progress | None = None,
    best: bool = False,
) -> Training:
    """AdamW on some parameters, warm-up and cosine, gradients clipped, in place.

    The loss of an update is the sum over all its windows divided by all their terms, so that it
    does not depend on how they are cut into forwards. Trained parameters are float32 inside,
    whatever the model has; where that has 16 bits, forwards run under autocast to bfloat16. Under
    `accelerate launch` or torchrun the forwards of an update are shared by the processes, each with
    a model of its own; only the first one saves.

    Args:
        model: on the device to train on, in the mode to train in.
        parameters: names in the model; those that share a tensor are trained once.
        windows: (n, t) to draw from.
        loss: differentiable in these parameters. May compute with whatever it likes: the whole
            model and the next token, or one layer and what a teacher says.
        held_out: looked at as the schedule says.
        state: where states are kept, and what an earlier run has left there is gone on from.
        best: end with the parameters of the look at the held-out windows with the lowest loss, of
            which a copy is kept on the CPU; else, and where nothing is held out, with the last.
            The look before any update counts: training that only harms is undone.
    Returns:
        what happened; the parameters are trained and in the dtype that they had.
    Raises:
        InputError: no such parameter, nothing to train on, a loss that is not finite or does not
            depend on the parameters, or a state of another training.
    """
    started = time.perf_counter()
    chosen = _chosen(model, parameters)
    device = next(iter(chosen.values())).device
    accelerator = accelerate.Accelerator(cpu=device.type == "cpu")
    with _trainable(model, chosen) as compute:
        run = _Run(chosen, loss, schedule, accelerator, compute, held_out, state, best)
        run.go(windows, progress or Silent())
    run.training.seconds = time.perf_counter() - started
    return run.training


class _Run:
    def __init__(
        self,
        chosen: Mapping[str, nn.Parameter],
        loss: Callable[[Batch], Loss],
        schedule: Schedule,
        accelerator: accelerate.Accelerator,
        compute: Callable[[], AbstractContextManager[Any]],
        held_out: Batch | None,
        state: TrainingState | None,
        best: bool,
    ) -> None:
        self._chosen, self._loss, self._schedule = chosen, loss, schedule
        self._accelerator, self._compute = accelerator, compute
        self._held_out, self._state = held_out, state
        self._optimiser = torch.optim.AdamW(
            chosen.values(),
            lr=schedule.learning_rate,
            betas=schedule.betas,
            weight_decay=schedule.weight_decay,
        )
        self.training = Training(schedule.steps)
        # since the last entry of the log: losses, terms, largest norm of the gradients
        self._since = [0.0, 0.0, 0.0]
        self._best = best and held_out is not None
        # copies of the parameters at the lowest loss so far, never the parameters themselves
        self._lowest, self._copies = math.inf, dict[str, Tensor]()

    def go(self, windows: Batch, progress: Progress) -> None:
        schedule, training = self._schedule, self.training
        self._restore()
        progress.begin(schedule.steps, "training", training.resumed_at)
        order = schedule.order(len(windows.input_ids))
        every = math.ceil(schedule.steps / LOGGED)
        if training.resumed_at == 0:
            self._look(0)
        for step in range(training.resumed_at, schedule.steps):
            self._update(step, windows, order(step))
            done = step + 1
            if done % every == 0 or done == schedule.steps:
                self._note(done)
            if schedule.looks_at(done):
                self._look(done)
            if done % schedule.save_every == 0 and done < schedule.steps:
                self._save(done)
            progress.layer(step)
        if not self._copies:
            training.kept = schedule.steps
        for name, tensor in self._copies.items():
            self._chosen[name].data.copy_(tensor)

    def _update(self, step: int, windows: Batch, forwards: list[list[int]]) -> None:
        """One update; every process has its share of the forwards."""
        accelerator, training = self._accelerator, self.training
        device = next(iter(self._chosen.values())).device
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        self._optimiser.zero_grad()
        for rows in forwards[accelerator.process_index :: accelerator.num_processes]:
            batch = windows.rows(rows)
            with torch.enable_grad(), self._compute():
                found = self._loss(batch)
            if found.count and not found.total.requires_grad:
                raise InputError(
                    "the loss does not depend on the parameters that are to be trained"
                )
            if found.count:
                # not accelerate's: its environment variables, as a launcher sets them, would divide
                # the loss by steps of accumulation or scale it for float16
                found.total.backward()
            # float32 would miscount the elements of hidden states
            sums += sums.new_tensor([float(found.total.detach()), found.count, batch.tokens])
        sums = accelerator.reduce(sums, "sum")
        total, count, tokens = sums.tolist()
        if not (math.isfinite(total) and count):
            what = f"the loss is {total}" if count else "no window has a token to predict"
            raise InputError(
                f"training, step {step + 1}: {what}; "
                + ("lower --lr, or compute in float32" if count else "give longer windows")
            )
        for parameter in self._chosen.values():
            if parameter.grad is None:
                # this process had no share, or the loss does not reach this one
                parameter.grad = torch.zeros_like(parameter)
            if accelerator.num_processes > 1:
                parameter.grad = accelerator.reduce(parameter.grad, "sum")
            parameter.grad /= count
        clip = self._schedule.clip or math.inf
        norm = float(nn.utils.clip_grad_norm_(self._chosen.values(), clip))
        if not math.isfinite(norm):
            raise InputError(
                f"training, step {step + 1}: the norm of the gradients is {norm}; lower --lr, or "
                "compute in float32"
            )
        for group in self._optimiser.param_groups:
            group["lr"] = self._schedule.rate(step)
        self._optimiser.step()
        training.tokens += int(tokens)
        self._since = [self._since[0] + total, self._since[1] + count, max(self._since[2], norm)]

    def _note(self, step: int) -> None:
        total, count, norm = self._since
        rate = self._schedule.rate(step - 1)
        entry = {"step": step, "loss": total / count, "rate": rate, "gradient_norm": norm}
        self.training.log.append(entry)
        self._since = [0.0, 0.0, 0.0]

    @torch.no_grad()
    def _look(self, step: int) -> None:
        """The loss on the held-out windows; the same on every process, which is cheap enough."""
        if self._held_out is None:
            return
        total = count = 0.0
        every = torch.arange(len(self._held_out.input_ids))
        for rows in every.split(self._schedule.batch_size):
            with self._compute():
                found = self._loss(self._held_out.rows(rows))
            total, count = total + float(found.total), count + found.count
        if not math.isfinite(total):
            raise InputError(
                f"training: after {step} steps the loss on held-out windows is {total}; "
                + ("lower --lr, or compute in float32" if step else "check the checkpoint")
            )
        if not count:
            return
        loss = total / count
        self.training.held_out.append({"step": step, "loss": loss})
        if self._best and loss < self._lowest:
            self._lowest, self.training.kept = loss, step
            self._copies = {n: p.detach().to("cpu", copy=True) for n, p in self._chosen.items()}

    def _save(self, step: int) -> None:
        if self._state is None or not self._accelerator.is_main_process:
            return
        tensors: dict[str, Tensor] = {f"parameter/{n}": p for n, p in self._chosen.items()}
        for name, parameter in self._chosen.items():
            for key, value in self._optimiser.state[parameter].items():
                tensors[f"{OPTIMISER}/{key}/{name}"] = value
        tensors |= {f"{BEST}/{name}": tensor for name, tensor in self._copies.items()}
        training = self.training
        numbers = {
            "kept": training.kept,
            "lowest": self._lowest if self._copies else None,
            "log": training.log,
            "held_out": training.held_out,
            "tokens": training.tokens,
            "since": self._since,
        }
        self._state.save(step, tensors, numbers)

    def _restore(self) -> None:
        kept = None if self._state is None else self._state.load()
        if kept is None:
            return
        step, tensors, numbers = kept
        for name, parameter in self._chosen.items():
            before = tensors.get(f"parameter/{name}")
            if before is None or before.shape != parameter.shape:
                # ranks of adapters are found again each time
                raise InputError(
                    f"--resume: {name} has another shape than the state of {step} steps; start "
                    "again with --overwrite instead"
                )
            parameter.data.copy_(before)
            own = self._optimiser.state[parameter]
            for key, value in tensors.items():
                kind, _, rest = key.partition("/")
                which, _, owner = rest.partition("/")
                if kind == OPTIMISER and owner == name:
                    # the count of updates stays on the CPU, as AdamW keeps it
                    own[which] = value if value.dim() == 0 else value.to(parameter.device)
            if f"{BEST}/{name}" in tensors:
                self._copies[name] = tensors[f"{BEST}/{name}"]
        training = self.training
        if self._copies:
            self._lowest, training.kept = numbers["lowest"], numbers["kept"]
        training.resumed_at, training.tokens = step, numbers["tokens"]
        training.log, training.held_out = numbers["log"], numbers["held_out"]
        self._since = numbers["since"]


def _chosen(model: nn.Module, parameters: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters by name, those that share a tensor once.

    Raises:
        InputError: there is none of a name, or no name at all.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, nn.Parameter] = {}
    for name in parameters:
        if name not in known:
            raise InputError(f"{type(model).__name__} has no parameter {name} to train")
        if not any(known[name] is other for other in found.values()):
            found[name] = known[name]
    if not found:
        raise InputError("no parameter is to be trained")
    return found


@contextmanager
def _trainable(
    model: nn.Module, chosen: Mapping[str, nn.Parameter]
) -> Iterator[Callable[[], AbstractContextManager[Any]]]:
    """Only these parameters ask for gradients and are float32 inside; after, all is as before.

    Yields:
        what a forward runs in: autocast to bfloat16 where a parameter of the model has 16 bits.
    """
    asking = {parameter: parameter.requires_grad for parameter in model.parameters()}
    dtypes = {parameter: parameter.dtype for parameter in chosen.values()}
    mine = {id(parameter) for parameter in chosen.values()}
    first = next(iter(chosen.values()))
    # adapters are float32 beside a model that is not
    narrow = any(parameter.dtype in NARROW for parameter in asking)

    def compute() -> AbstractContextManager[Any]:
        if not narrow:
            return nullcontext()
        # of float16 too: gradients of a sum leave its range
        return torch.autocast(first.device.type, dtype=torch.bfloat16)

    try:
        for parameter in asking:
            parameter.requires_grad_(id(parameter) in mine)
        for parameter, dtype in dtypes.items():
            if dtype in NARROW:
                parameter.data = parameter.data.float()
        yield compute
    finally:
        for parameter, dtype in dtypes.items():
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
        for parameter, wanted in asking.items():
            parameter.requires_grad_(wanted)
