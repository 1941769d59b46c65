"""What is written about runs, clients and processes: one typed record each, read by every view.

JSON keys are these field names: a promise to scripts.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

RunState = Literal[
    "waiting", "running", "degraded", "recovering", "completed", "completed-with-warnings",
    "failed", "stopped",
]  # fmt: skip
CHECKPOINT = "checkpoint_round_"
"""Before the round in the name of a checkpoint's folder."""
FINAL_STATES: frozenset[RunState] = frozenset(
    {"completed", "completed-with-warnings", "failed", "stopped"}
)
USABLE_STATES: frozenset[RunState] = frozenset({"completed", "completed-with-warnings"})
"""Final states of a run whose model is one to go on with."""
RUN_EXIT_CODES: dict[RunState, int] = {
    "completed": 0,
    "completed-with-warnings": 3,
    "failed": 4,
    "stopped": 5,
}
"""Exit status of ``zk0bot run`` by the verdict."""

MAX_COUNT = 10**9
"""Of rounds and steps in what a node reports."""

SessionPhase = Literal["idle", "settling", "running", "resting"]
"""settling: enough clients are here, others get a little time; resting: between two sessions."""
ClientPhase = Literal["waiting", "sending", "training", "done", "late", "failed", "lost"]
Outcome = Literal["asked", "accepted", "clipped", "refused", "late", "lost", "sits-out"]
"""What the server made of a node's part in a round."""


def now() -> datetime:
    """The present moment, in UTC."""
    return datetime.now(UTC)


class Record(BaseModel):
    """Base of every record: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ClientProgress(Record):
    """One node in the round under way."""

    node_id: str
    """Flower's node id, as text."""
    name: str
    """The name its owner gave, else ``client-`` and the start of its dataset id."""
    phase: ClientPhase = "waiting"
    step: int = 0
    steps: int = 0
    loss: float | None = None
    reason: str = ""
    """Why it is late or failed."""


class Verdict(Record):
    """Whether a finished run can be trusted, and why."""

    state: RunState
    reasons: list[str] = Field(default_factory=list)
    initial_loss: float | None = None
    """Held-out loss before round 1."""
    final_loss: float | None = None
    best_round: int | None = None
    """Round whose evaluated checkpoint has the lowest held-out loss."""


class RunRecord(Record):
    """A zk0bot run, as ``run``, ``runs`` and ``status`` show it."""

    run_id: str
    state: RunState = "waiting"
    since: datetime = Field(default_factory=now)
    """When the state was entered."""
    reason: str = ""
    """What the state waits for or why it ended."""
    phase: str = ""
    """What the server does now, such as ``waiting for clients`` or ``evaluating``."""
    num_rounds: int
    round: int = 0
    """Round under way, or the last one finished; 0 before the first."""
    rounds_done: int = 0
    clients: list[ClientProgress] = Field(default_factory=list)
    bytes_up: int = 0
    """Tensor bytes that clients sent to the server in this run."""
    bytes_down: int = 0
    """Tensor bytes that the server sent to clients in this run."""
    num_updates: int = 0
    """Replies that ``bytes_up`` is the size of."""
    float32_bytes: int = 0
    """What one such reply has in float32: four times the numbers that are trained."""
    queued_at: datetime | None = None
    """When it was put into the queue; None once its turn has come."""
    started_at: datetime = Field(default_factory=now)
    updated_at: datetime = Field(default_factory=now)
    eta_s: float | None = None
    loss: float | None = None
    """Newest held-out loss."""
    success: float | None = None
    """Newest closed-loop success rate."""
    flower_run_ids: list[str] = Field(default_factory=list)
    """Flower's runs that carried this one, in their order; more than one after a recovery."""
    output_dir: str = ""
    last_checkpoint: str = ""
    """Folder of the newest checkpoint; empty before the first."""
    best_checkpoint: str = ""
    """Folder of the checkpoint with the lowest held-out loss; empty before the first."""
    verdict: Verdict | None = None

    @property
    def is_final(self) -> bool:
        return self.state in FINAL_STATES


def round_of(checkpoint: str) -> int:
    """The round of a checkpoint by its folder's name; 0 for another name."""
    number = Path(checkpoint).name.removeprefix(CHECKPOINT)
    return int(number) if number.isdecimal() else 0


class FlowerRuns(Record):
    """``flower.json`` in a run's folder: Flower's runs that carried it, in their order."""

    flower_run_ids: list[str] = Field(default_factory=list)


class SessionsState(Record):
    """``sessions.json`` at a server with ``[sessions]``: what it waits for, what it has done."""

    phase: SessionPhase = "idle"
    reason: str = ""
    """What is waited for, such as ``1 of 2 clients``; in ``running``: for which run."""
    since: datetime = Field(default_factory=now)
    """When the phase was entered."""
    present: int = 0
    """Clients that are here."""
    needed: int = 0
    """Clients that a session needs."""
    run_id: str = ""
    """Run of the session under way, or of the last one; empty before the first."""
    sessions_done: int = 0
    """Sessions that were published."""
    failures: int = 0
    """Sessions that failed since one was published."""
    clients: dict[str, str] = Field(default_factory=dict)
    """Data tokens of those that were here when the last session began, by fingerprint."""
    published_run: str = ""
    """Run whose weights are published; empty: none yet."""
    stored: list[str] = Field(default_factory=list)
    """Runs of sessions whose checkpoints are there, the oldest first."""


class Published(Record):
    """``published/published.json`` at a server: what ``published/current`` leads to."""

    run_id: str
    round: int
    """Round of the checkpoint."""
    loss: float | None = None
    """Its held-out loss; None: not measured."""
    checkpoint: str
    """Folder of the checkpoint."""
    at: datetime = Field(default_factory=now)


class NodeProgress(Record):
    """What a node's egress hop reports while it trains; numbers only, nothing about the data."""

    run_id: str = Field(default="", pattern=r"^[A-Za-z0-9_.+-]{0,64}$")
    round: int = Field(ge=0, le=MAX_COUNT, default=0)
    phase: Literal["loading", "ready", "training", "evaluating", "failed"] = "ready"
    step: int = Field(ge=0, le=MAX_COUNT, default=0)
    steps: int = Field(ge=0, le=MAX_COUNT, default=0)
    loss: float | None = Field(allow_inf_nan=False, default=None)
    data_token: str = Field("", pattern=r"^[0-9a-f]{0,64}$")
    """Changes with the dataset, and says nothing else without the node's key; empty: not loaded."""
    has_order: bool | None = None
    """An order of the server's has come in and the reply has not left yet; None: not said."""


class OrderPart(NamedTuple):
    """What tells an order to train from others."""

    run_id: str
    round: int
    created_at: float
    """By the server's clock, in seconds since 1970."""


class RoundNotice(Record):
    """What the server tells one node of its part in a round; numbers and the server's own words.

    The ServerApp writes it to ``Paths.notice``, the gateway answers the node's reports with it, and
    the egress hop keeps it in ``notice.json`` for this node's owner.
    """

    run_id: str = Field(pattern=r"^[A-Za-z0-9_.+-]{0,64}$")
    round: int = Field(ge=0, le=MAX_COUNT)
    outcome: Outcome = "asked"
    reason: str = Field("", max_length=500)
    """Why, unless it was accepted."""
    is_open: bool = True
    """Whether an update of this round is still wanted; false: work on it may stop."""
    at: datetime = Field(default_factory=now)

    def ends(self, part: OrderPart) -> bool:
        """Whether work on this order may stop: its round is over, or another has begun.

        All times are the server's; what it said before it sent the order is not about it.
        """
        if self.at.timestamp() <= part.created_at:
            return False
        if self.run_id != part.run_id:
            return True
        return self.round > part.round or (self.round == part.round and not self.is_open)


class TrainerState(Record):
    """``trainer.json`` in a trainer's private folder: what the warm process does now."""

    state: Literal["loading", "ready", "working", "failed"]
    detail: str = ""
    """Such as ``making data``, ``loading dataset``, ``training``; shown to this machine's owner."""
    done: int = 0
    total: int = 0
    """Progress of ``detail``; a total of 0: not countable."""
    pid: int = 0
    dataset_id: str = ""
    name: str = ""
    data: str = ""
    """Fingerprint of the dataset."""
    features: str = ""
    """Which features of frozen layers are kept, where and why; empty: not chosen yet."""
    refusal: str = ""
    """Why the last order was not done; empty: it was."""
    error_code: str = ""
    error_message: str = ""
    error_hint: str | None = None
    updated_at: datetime = Field(default_factory=now)


class RestartRecord(Record):
    """What the supervisor knows of one process."""

    restarts: int = 0
    last_exit_status: int | None = None
    """Minus the number of the signal that ended it."""
    last_exit_at: datetime | None = None
    stopped_at: datetime | None = None
    """When it, or a process that it had forked, was last ended because somebody had stopped it."""


class SupervisorRecord(Record):
    """``supervisor.json`` in a service's folder; processes by name."""

    pid: int
    services: dict[str, RestartRecord] = Field(default_factory=dict)
    updated_at: datetime = Field(default_factory=now)


class LinkState(Record):
    """``link.json`` in a client's folder, written by its egress hop."""

    node_id: str = ""
    """Empty until the SuperNode is registered with the server."""
    upstream: str
    last_answer_at: datetime | None = None
    """When the server last answered; None: never."""
    error: str = ""
    """Why the server did not answer, if so; while resting, until when."""
    is_resting: bool = False
    """The owner's hours or bytes per day keep this node from the server now."""
    waiting: int = 0
    """Replies that are not at the server yet."""
    held: int = 0
    """Replies that the owner's policy held back, since this process was started."""
    bytes_up: int = 0
    bytes_down: int = 0


class Membership(Record):
    """``membership.json`` in a node's identity folder: where and as whom it is enrolled."""

    server: str
    """HOST:PORT of the server's gateway."""
    node: str
    """This node's name at the server."""
    fingerprint: str
    """Of this node's public key."""
    trust: Literal["pinned", "system", "loopback"] = "pinned"
    """How the server's certificate is checked: by the CA in ``ca.crt`` beside this file, by the
    certificates of the system, or not at all (plain HTTP to a server on this machine)."""
    invite_id: str = ""
    """Of the join code; empty without one."""
    enrolled_at: datetime = Field(default_factory=now)


class Presence(Record):
    """An enrolled node as the gateway sees it."""

    name: str
    fingerprint: str
    node_id: str = ""
    """Flower's id, as text; empty until the SuperLink knows the node."""
    last_seen: datetime | None = None
    """Last authenticated request; None: not since the server was started."""
    data_token: str = Field("", pattern=r"^[0-9a-f]{0,64}$")
    """Changes with the node's dataset and says nothing else of it; empty: not told."""
    has_order: bool | None = None
    """By the node's last report to this gateway; None: there was none."""
    empty_pulls: int = Field(0, ge=0)
    """Times that the SuperLink had no order for the node, since this gateway was started."""


class PresenceList(Record):
    """``presence.json`` at the server: every enrolled node that is not revoked."""

    nodes: list[Presence] = Field(default_factory=list)


class GatewayHealth(Record):
    """What ``GET /v1/zk0/health`` at the server's gateway answers."""

    zk0bot_version: str
    flwr_version: str
    superlink_ok: bool
