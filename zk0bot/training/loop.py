"""The train loop: AdamW on batches that are a pure function of (seed, round, step)."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from zk0bot.errors import DivergedError
from zk0bot.training.memory import MicroBatch
from zk0bot.training.policy import trainable_tensors, valid_entries
from zk0bot.training.processing import Batch, split_batch, to_device
from zk0bot.training.protocol import LearningRate
from zk0bot.training.recording import Ints

BETAS = (0.9, 0.95)
EPS = 1e-8
WEIGHT_DECAY = 1e-10
CLIP_NORM = 10.0
"""AdamW and clipping as in SmolVLA's own preset."""

LossSum = Callable[[nn.Module, Batch], Tensor]
"""Summed loss of a batch on the policy's device."""
Progress = Callable[[int, Tensor], None]
"""Called after each step with the steps done and its loss, still on the device."""


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """One round of one client."""

    steps: int
    batch_size: int
    learning_rate: LearningRate
    proximal_mu: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TrainOutcome:
    """Means over the steps, and the change of each trained tensor on the CPU."""

    update: dict[str, Tensor]
    policy_loss: float
    fedprox_loss: float
    grad_norm: float
    """Before clipping."""
    micro_batch_size: int
    train_s: float


def train_steps(
    policy: nn.Module,
    draw: Callable[[int], Batch],
    plan: TrainPlan,
    *,
    loss_sum: LossSum,
    progress: Progress = lambda step, loss: None,
    micro_batch: MicroBatch | None = None,
) -> TrainOutcome:
    """Train ``policy`` in place; ``draw(step)`` gives the CPU batch of that step.

    ``micro_batch`` says how much of a batch fits at a time, and learns it; the samples of a step
    stay the same. Raises DivergedError, after the last step, when a loss is not finite, and
    MemoryShortError when one sample at a time is too much.

    The loop itself waits for a CUDA device once, after the last step. The forward pass of LeRobot
    waits a few times more: SmolVLM's vision tower finds the places of patches by a boolean mask,
    and SmolVLA copies a scale for each camera and two short masks from pageable memory.
    """
    started = time.monotonic()
    tensors = trainable_tensors(policy)
    parameters = list(tensors.values())
    device = parameters[0].device
    proximal = Proximal(parameters, plan.proximal_mu)
    optimizer = torch.optim.AdamW(
        parameters, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, foreach=True
    )
    records: list[tuple[Tensor, Tensor, Tensor]] = []
    micro_batch = micro_batch or MicroBatch()
    policy.train()
    for step in range(plan.steps):
        batch = draw(step)
        optimizer.param_groups[0]["lr"] = learning_rate_at(plan.learning_rate, step)
        loss = _backward(policy, batch, micro_batch, device, loss_sum)
        fedprox_loss = proximal.add_gradient()
        norm = nn.utils.clip_grad_norm_(parameters, CLIP_NORM, foreach=True)
        optimizer.step()
        records.append((loss, fedprox_loss, norm))
        progress(step + 1, loss)
    means = _means(records)
    return TrainOutcome(
        update=_differences(tensors, proximal.start),
        policy_loss=means[0],
        fedprox_loss=means[1],
        grad_norm=means[2],
        micro_batch_size=micro_batch.size(plan.batch_size),
        train_s=time.monotonic() - started,
    )


class Proximal:
    """FedProx's mu/2 |w - w0|^2, its gradient added to that of the loss, all on the device."""

    def __init__(self, parameters: Sequence[Tensor], mu: float) -> None:
        self.start = [p.detach().clone() for p in parameters]
        self._parameters = parameters
        self._mu = mu
        self._difference = [torch.empty_like(p) for p in parameters] if mu > 0 else []
        self._zero = torch.zeros((), device=parameters[0].device)

    def add_gradient(self) -> Tensor:
        """Add mu (w - w0) to every gradient there is; returns the term's value."""
        if self._mu == 0:
            return self._zero
        with torch.no_grad():
            torch._foreach_copy_(self._difference, list(self._parameters))
            torch._foreach_sub_(self._difference, self.start)
            pairs = zip(self._parameters, self._difference, strict=True)
            pulled = [(p.grad, difference) for p, difference in pairs if p.grad is not None]
            gradients, differences = [g for g, _ in pulled], [d for _, d in pulled]
            torch._foreach_add_(gradients, differences, alpha=self._mu)
            norms = torch.stack(torch._foreach_norm(self._difference))
        return self._mu / 2 * norms.square().sum()


class LossView:
    """The loss of a step for those who watch; a CUDA device is not waited for."""

    def __init__(self, device: torch.device) -> None:
        self._copy = torch.empty((), pin_memory=device.type == "cuda")
        self._arrived: torch.cuda.Event | None = None
        self._value: float | None = None

    def read(self, loss: Tensor) -> float | None:
        """``loss`` itself on the CPU; on CUDA one of an earlier call, None until one has arrived.

        The copy of ``loss`` is under way when this returns; one is under way at a time.
        """
        if loss.device.type != "cuda":
            return float(loss)
        if self._arrived is not None and self._arrived.query():  # type: ignore[no-untyped-call]
            self._value, self._arrived = float(self._copy), None
        if self._arrived is None:
            self._copy.copy_(loss, non_blocking=True)
            self._arrived = torch.cuda.current_stream(loss.device).record_event()
        return self._value


def learning_rate_at(plan: LearningRate, step: int) -> float:
    """Learning rate of a round's local step: linear warm-up, then constant or one cosine over the
    whole run."""
    k = plan.first_step + step
    warmup = min(1.0, (k + 1) / plan.warmup_steps) if plan.warmup_steps else 1.0
    if plan.scheduler == "constant":
        return plan.initial_lr * warmup
    share = 0.5 * (1 + math.cos(math.pi * min(1.0, k / plan.total_steps)))
    return warmup * (plan.eta_min + (plan.initial_lr - plan.eta_min) * share)


def batch_order(num_frames: int, batch_size: int, step: int, seed: Sequence[int]) -> Ints:
    """Places of a step's samples: passes over all frames, each shuffled, one after the other.

    A pure function of its arguments; a frame comes again only when all others have come.
    """
    wanted = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = wanted // num_frames
    orders = {
        epoch: np.random.default_rng([*seed, int(epoch)]).permutation(num_frames)
        for epoch in np.unique(epochs)
    }
    places = [orders[e][k] for e, k in zip(epochs, wanted % num_frames, strict=True)]
    return np.array(places, dtype=np.int64)


@contextmanager
def drawn_ahead(
    draw: Callable[[int], Batch], steps: int, workers: int
) -> Iterator[Callable[[int], Batch]]:
    """``draw``, with the next batches made in threads while the device works on this one.

    For pictures that are decoded from disk. The batches are the same: each is a pure function of
    its step. Steps are asked for in ascending order.
    """
    waiting: dict[int, Future[Batch]] = {}
    with ThreadPoolExecutor(max_workers=workers) as pool:

        def get(step: int) -> Batch:
            for ahead in range(step, min(steps, step + workers + 1)):
                if ahead not in waiting:
                    waiting[ahead] = pool.submit(draw, ahead)
            return waiting.pop(step).result()

        yield get
        pool.shutdown(cancel_futures=True)


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bf16 arithmetic on CUDA, float32 elsewhere; parameters stay float32."""
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()


def _backward(
    policy: nn.Module,
    batch: Batch,
    micro_batch: MicroBatch,
    device: torch.device,
    loss_sum: LossSum,
) -> Tensor:
    """Gradients of the mean loss over ``batch``, and that loss."""
    return micro_batch.run(
        len(batch["action"]), lambda size: _accumulate(policy, batch, size, device, loss_sum)
    )


def _accumulate(
    policy: nn.Module, batch: Batch, micro_size: int, device: torch.device, loss_sum: LossSum
) -> Tensor:
    policy.zero_grad(set_to_none=True)
    count = valid_entries(batch)
    total = torch.zeros((), device=device)
    for part in split_batch(batch, micro_size):
        with autocast(device):
            loss = loss_sum(policy, to_device(part, device)) / count
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total


def _differences(tensors: Mapping[str, Tensor], start: Sequence[Tensor]) -> dict[str, Tensor]:
    pairs = zip(tensors.items(), start, strict=True)
    return {name: (tensor.detach() - origin).cpu() for (name, tensor), origin in pairs}


def _means(records: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[float]:
    """Means of loss, FedProx term and gradient norm; the round's only wait for the device."""
    table = torch.stack([torch.stack(record) for record in records]).float().cpu()
    finite = torch.isfinite(table).all(dim=1)
    if not finite.all():
        step = int((~finite).nonzero()[0])
        raise DivergedError(
            f"training diverged: loss {table[step, 0]:g}, gradient norm {table[step, 2]:g} "
            f"in step {step + 1} of {len(records)}",
            hint="lower initial-lr, or look for outliers in the dataset's states and actions",
        )
    means: list[float] = table.double().mean(dim=0).tolist()
    return means
