"""Which nodes take part: each describes itself once and is admitted or refused.

A node's name is the one under which it is enrolled, and a node that is not enrolled is asked
nothing.
"""

import logging
import math
import random
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from flwr.app import RecordDict

from zk0bot.config.models import RunConfig
from zk0bot.config.spelling import kebab
from zk0bot.errors import UpdateError
from zk0bot.federation.leaks import LeakCheck
from zk0bot.federation.member import Member
from zk0bot.federation.messages import unpack
from zk0bot.federation.schedule import steps_per_round
from zk0bot.federation.transport import Courier
from zk0bot.training.data.statistics import ACTION, STATE
from zk0bot.training.protocol import (
    MAX_STEPS,
    DatasetStatistics,
    DescribeRequest,
    NodeDescription,
    PolicySpec,
)
from zk0bot.version import __version__

logger = logging.getLogger(__name__)
ASK_AGAIN_S = 10.0
SILENT_S = 25.0
"""A node that was not heard for so long has vanished; a living one is heard every ten seconds."""


@dataclass
class Cohort:
    """Members by node id, and why others were refused."""

    config: RunConfig
    spec: PolicySpec
    base_hash: str
    find_name: Callable[[int], str | None]
    """The name under which a node is enrolled; None when it is not."""
    members: dict[int, Member] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    failed: dict[int, tuple[str, float]] = field(default_factory=dict)
    """Why a node could not be asked or did not describe itself, and when; it is asked again."""
    silent_s: Callable[[int], float] = lambda _: 0.0
    """Seconds since a node was last heard."""
    clock: Callable[[], float] = time.monotonic
    asked: set[int] = field(default_factory=set)
    """Nodes whose description is on its way."""
    leaks: LeakCheck = field(default_factory=LeakCheck)
    refusals: dict[str, int] = field(default_factory=dict)
    """How often in a row each client's update was refused."""

    def look_around(self, courier: Courier, keep: Collection[int] = ()) -> list[int]:
        """Online nodes, after asking newcomers and taking in what has arrived.

        Late replies are dropped, but for nodes in ``keep``, whose replies are still wanted.
        """
        online = courier.nodes()
        self.take_answers(courier)
        self.forget_absent(online)
        courier.drop_late(online, keep=self.asked | set(keep))
        self.ask_newcomers(courier, online)
        return online

    def node_of(self, name: str) -> int | None:
        """The id under which a member is known; None before it has described itself."""
        return next((n for n, member in self.members.items() if member.name == name), None)

    def is_silent(self, name: str) -> bool:
        """Whether a member was not heard for so long that it counts as gone for now."""
        node_id = self.node_of(name)
        return node_id is not None and self.silent_s(node_id) > SILENT_S

    def note_outcome(self, name: str, *, is_refused: bool) -> None:
        """Count refusals in a row."""
        self.refusals[name] = self.refusals.get(name, 0) + 1 if is_refused else 0

    def sits_out(self, name: str) -> bool:
        """Whether so many updates of a client were refused in a row that it is asked no more."""
        return 0 < self.config.max_refusals <= self.refusals.get(name, 0)

    def ask_newcomers(self, courier: Courier, online: list[int]) -> None:
        """Ask nodes that are not known yet to describe themselves."""
        request = DescribeRequest(
            spec=self.spec,
            statistics=self.config.statistics,
            image_augmentation=self.config.image_augmentation,
            mark_key=self.leaks.mark_key,
        )
        deadline_s = self.config.wait_deadline_s
        for node_id in online:
            if node_id in self.members or node_id in self.refused or courier.is_busy(node_id):
                continue
            if node_id in self.failed and self.clock() - self.failed[node_id][1] < ASK_AGAIN_S:
                continue
            if self.find_name(node_id) is None:
                logger.warning("node %s is not enrolled", node_id)
                self.failed[node_id] = (f"node {node_id} is not enrolled", self.clock())
                continue
            why = courier.send(node_id, "query", request, group="0", deadline_s=deadline_s)
            if why:
                logger.warning("node %s not asked: %s", node_id, why)
            else:
                self.asked.add(node_id)

    def take_answers(self, courier: Courier) -> None:
        """Admit or refuse the nodes whose descriptions have arrived; forget those that left."""
        for reply in courier.poll(sorted(self.asked)):
            self.asked.discard(reply.node_id)
            if reply.content is None:
                logger.warning("node %s did not describe itself: %s", reply.node_id, reply.failure)
                name = self.find_name(reply.node_id) or f"node {reply.node_id}"
                self.failed[reply.node_id] = (f"{name}: {reply.failure}", self.clock())
                continue
            self.failed.pop(reply.node_id, None)
            if why := self._admit(reply.node_id, reply.content):
                logger.warning("node %s refused: %s", reply.node_id, why)
                self.refused[reply.node_id] = why

    def is_settled(self) -> bool:
        """Whether every node that was asked has answered."""
        return not self.asked

    def forget_absent(self, online: list[int]) -> None:
        """Stop waiting for the descriptions of nodes that left; who comes back is asked anew."""
        self.asked.intersection_update(online)
        self.refused = {n: why for n, why in self.refused.items() if n in online}
        self.failed = {n: why for n, why in self.failed.items() if n in online}

    def available(self, courier: Courier, online: list[int]) -> list[str]:
        """Names of the members that are online, owe nothing and need not sit out."""
        free = [n for n in online if n in self.members and not courier.is_busy(n)]
        names = [self.members[n].name for n in free if self.silent_s(n) <= SILENT_S]
        return sorted(name for name in names if not self.sits_out(name))

    def choose(self, available: list[str], round_: int) -> list[str]:
        """The share fraction-fit of them, never fewer than min-fit-clients; a function of seed."""
        wanted = math.ceil(self.config.fraction_fit * len(available))
        wanted = min(len(available), max(wanted, self.config.min_fit_clients))
        return sorted(random.Random(f"{self.config.seed}/{round_}").sample(available, wanted))

    def objections(self) -> list[str]:
        """Why nodes that are there do not take part."""
        sitting = [
            f"{name}: {count} updates in a row were refused"
            for name, count in sorted(self.refusals.items())
            if self.sits_out(name)
        ]
        return [*self.refused.values(), *(why for why, _ in self.failed.values()), *sitting]

    def _admit(self, node_id: int, content: RecordDict) -> str:
        """Empty when the node is now a member, else why not."""
        if (name := self.find_name(node_id)) is None:
            return f"node {node_id}: is no longer enrolled"
        try:
            member = Member(name=name, description=unpack(content, NodeDescription))
        except UpdateError as error:
            return f"{name}: {error.message}"
        if why := self._objection(member):
            return f"{name}: {why}"
        self._retire(name)
        self.members[node_id] = member.without_marks()
        logger.info("node %s is %s", node_id, name)
        return ""

    def _retire(self, name: str) -> None:
        """Forget the node id under which a client that enrolled again was known before."""
        former = [n for n, member in self.members.items() if member.name == name]
        for node_id in former:
            del self.members[node_id]
            self.refused[node_id] = f"{name}: came back under another node id"

    def _objection(self, member: Member) -> str:
        description = member.description
        if description.zk0bot_version != __version__:
            return f"runs zk0bot {description.zk0bot_version}, the server {__version__}"
        for name in ("codec", "codec_down"):
            if (codec := getattr(self.config, name)) not in description.codecs:
                key = kebab(name)
                return f"does not know {key}={codec}: update it, or set {key}=float32"
        if description.base_hash != self.base_hash:
            return "holds another base model than the server"
        others = [other for other in self.members.values() if other.name != member.name]
        if any(other.slug == member.slug for other in others):
            return "another client's name differs only in signs; enrol it under another name"
        if description.num_train_frames < 1:
            return "has no training frames"
        if steps_per_round(self.config, description.num_train_frames) > MAX_STEPS:
            return f"has more training frames than {MAX_STEPS} steps of a round can go through"
        if self.config.statistics == "pooled" and description.statistics is None:
            return "sent no statistics, which this run pools"
        if self.config.statistics == "local" and description.statistics is not None:
            return "sent statistics, which this run leaves at home"
        statistics, num_frames = description.statistics, description.num_train_frames
        if statistics is not None and (doubt := self._doubt(statistics, num_frames)):
            return doubt
        return self.leaks.examine(member)

    def _doubt(self, found: DatasetStatistics, num_frames: int) -> str:
        """Why these statistics cannot be those of so many training frames; empty: they can."""
        policy = self.spec.policy
        widths = {STATE: policy.state_dim, ACTION: policy.action_dim}
        if {name: len(moments.mean) for name, moments in found.items()} != widths:
            return "sent statistics of other features than the policy has"
        if any(moments.count != num_frames for moments in found.values()):
            return "sent statistics of other frames than it trains on"
        return ""
