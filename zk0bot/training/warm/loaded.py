"""The policy that a warm trainer holds: built once for a spec, given other weights per request."""

import logging
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor

from zk0bot.config.models import PolicyConfig
from zk0bot.config.paths import Paths
from zk0bot.errors import ModelError
from zk0bot.training.adapters.base_delta import BaseDelta
from zk0bot.training.adapters.base_store import Stand
from zk0bot.training.adapters.lora import adapted_layers
from zk0bot.training.adapters.residual import Parcel, split_parcel
from zk0bot.training.data.meta import Ints
from zk0bot.training.evaluation import StepProgress, action_error, mean_loss
from zk0bot.training.features.prefix import can_split, frozen_flow_loss_sum, is_frozen
from zk0bot.training.held import HeldWeights
from zk0bot.training.loop import LossSum
from zk0bot.training.memory import MicroBatch
from zk0bot.training.model.folder import TINY_NAME, refuse_foreign_model
from zk0bot.training.model.policy import (
    base_hash,
    build_policy,
    flow_loss_sum,
    load_trainable,
    read_tensors,
    trainable_tensors,
)
from zk0bot.training.processing import Feed
from zk0bot.training.protocol import (
    VARIATE,
    DatasetStatistics,
    EvaluateRequest,
    PolicySpec,
    TrainRequest,
    WeightsForm,
)
from zk0bot.training.warm.reporter import Reporter
from zk0bot.wire.blob import MAGIC, is_coded, open_plain

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoadedPolicy:
    """A policy built from a spec; its trained tensors change with every request."""

    spec: PolicySpec
    policy: SmolVLAPolicy
    base_hash: str
    initial: dict[str, Tensor]
    """Its trained tensors as built."""
    base: BaseDelta
    """Moves the layers under its adapters."""
    loss_sum: LossSum
    training: MicroBatch = field(default_factory=MicroBatch)
    """What fits with gradients."""
    evaluation: MicroBatch = field(default_factory=MicroBatch)
    """What fits without."""

    def mean_loss(
        self, feed: Feed, frames: Ints, progress: StepProgress = lambda k, n: None
    ) -> float:
        """As ``evaluation.mean_loss``."""
        return mean_loss(
            self.policy,
            feed,
            frames,
            progress,
            loss_sum=self.loss_sum,
            micro_batch=self.evaluation,
        )

    def action_error(
        self, feed: Feed, statistics: DatasetStatistics, frames: Ints
    ) -> tuple[dict[str, float], list[float]]:
        """As ``evaluation.action_error``."""
        return action_error(self.policy, feed, statistics, frames, micro_batch=self.evaluation)


class PolicyKeeper:
    """Builds the policy of a spec, and keeps the last one."""

    def __init__(
        self,
        paths: Paths,
        device: torch.device,
        reporter: Reporter,
        *,
        model_folders: Collection[str] | None,
        base_dir: Path | None = None,
        held: HeldWeights | None = None,
        loss_sum: LossSum | None = None,
    ) -> None:
        """``model_folders``: those that a server may name; None: this is the server's process.
        In ``base_dir`` a node keeps what it received of a run's base delta, in ``held`` the last
        weights.
        ``loss_sum``: None: the fastest that is exact for the policy.
        """
        self.device = device
        self._paths = paths
        self._reporter = reporter
        self._model_folders = model_folders
        self._base_dir = base_dir
        self._held = held
        self._loss_sum = loss_sum
        self._loaded: LoadedPolicy | None = None

    def get(self, spec: PolicySpec) -> LoadedPolicy:
        """The policy of ``spec``, kept from the last request or built.

        Its trained tensors are those of the last request. Raises ModelError, and
        ModelNotAllowedError for a folder that a server may not name.
        """
        if self._model_folders is not None:
            refuse_foreign_model(spec.policy, self._model_folders)
        if self._loaded is None or self._loaded.spec != spec:
            self.forget()
            self._reporter.set_state("working", f"building {spec.policy.model_name}")
            torch.set_num_threads(_num_threads(spec.policy, self.device))
            self._loaded = self._build(spec)
        return self._loaded

    def get_with(self, spec: PolicySpec, weights_path: Path) -> LoadedPolicy:
        """The policy of ``spec`` with the trained tensors and the base delta of a file."""
        loaded = self.get(spec)
        trained, parcel = _read_weights(weights_path)
        loaded.base.set(parcel)
        load_trainable(loaded.policy, trained)
        return loaded

    def get_for(self, request: TrainRequest | EvaluateRequest) -> LoadedPolicy:
        """The policy with the weights of an order, its base where the run's is.

        Raises ModelError where the base model has another hash, BaseOutdatedError where this node
        lacks changes that the run's base has seen.
        """
        loaded = self.get(request.spec)
        if request.base_hash != loaded.base_hash:
            raise ModelError(
                f"this machine has another base model: hash {loaded.base_hash[:12]}, the run's is "
                f"{request.base_hash[:12]}",
                hint="use the same model-name, revision and zk0bot version as the server",
            )
        trained, parcel = self._receive(Path(request.weights_path), request.weights_form)
        stand = Stand(
            version=request.base_version, chain=request.base_chain, sum_digest=request.base_sum
        )
        loaded.base.follow(request.run_id, stand, parcel)
        load_trainable(loaded.policy, trained)
        return loaded

    def get_initial(self, spec: PolicySpec) -> LoadedPolicy:
        """The policy of ``spec`` as it was built."""
        loaded = self.get(spec)
        loaded.base.reset()
        load_trainable(loaded.policy, loaded.initial)
        return loaded

    def forget(self) -> None:
        """Free the policy's memory."""
        self._loaded = None

    def _receive(self, path: Path, form: WeightsForm) -> tuple[dict[str, Tensor], Parcel]:
        """The tensors of an order; WeightsOutdatedError where it changes what is not held."""
        if self._held is None or form.result is None:
            return _read_weights(path)
        if form.held is None:
            tensors = _read_tensors(path)
            self._held.keep_whole({name: t.numpy() for name, t in tensors.items()}, form)
        else:
            followed = self._held.follow(path.read_bytes(), form)
            tensors = {name: torch.from_numpy(value) for name, value in followed.items()}
        return _split(tensors)

    def _build(self, spec: PolicySpec) -> LoadedPolicy:
        policy = build_policy(spec, self._paths)
        number = base_hash(policy)
        initial = {k: p.detach().clone() for k, p in trainable_tensors(policy).items()}
        return LoadedPolicy(
            spec=spec,
            policy=policy.to(self.device),
            base_hash=number,
            initial=initial,
            base=BaseDelta(adapted_layers(policy), self._base_dir),
            loss_sum=self._loss_sum or _choose_loss(policy),
        )


def _read_weights(path: Path) -> tuple[dict[str, Tensor], Parcel]:
    """Trained tensors and changes of the base; UpdateError for bytes that make no sense.

    The server's variate, which ``training/variates.py`` reads, may lie there, too.
    """
    return _split({n: t for n, t in _read_tensors(path).items() if not n.startswith(VARIATE)})


def _read_tensors(path: Path) -> dict[str, Tensor]:
    return _read_coded(path) if _is_coded(path) else read_tensors(path)


def _split(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Parcel]:
    trained, parcel = split_parcel({name: tensor.numpy() for name, tensor in tensors.items()})
    return {name: tensors[name] for name in trained}, parcel


def _is_coded(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return is_coded(file.read(len(MAGIC)))
    except OSError:
        return False  # reading it as safetensors says why


def _read_coded(path: Path) -> dict[str, Tensor]:
    found = open_plain(path.read_bytes())
    return {name: torch.from_numpy(value) for name, value in found.items()}


def _choose_loss(policy: SmolVLAPolicy) -> LossSum:
    return frozen_flow_loss_sum if can_split(policy) and is_frozen(policy) else flow_loss_sum


def _num_threads(policy: PolicyConfig, device: torch.device) -> int:
    """One for the tiny model: more spend their time waiting for each other."""
    if policy.model_name == TINY_NAME:
        return 1
    if device.type == "cpu":
        logger.warning("%s trains on the CPU: this takes very long", policy.model_name)
    return os.cpu_count() or 1
