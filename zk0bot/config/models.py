"""Every setting, validated. Loading and precedence are in ``load.py``."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from zk0bot.config.coding import CodecName, Coding, LayerName
from zk0bot.config.rules import Rule, RuleName
from zk0bot.config.spelling import kebab
from zk0bot.config.strategies import STRATEGIES, StrategyName, readers_of

Statistics = Literal["pooled", "local"]
NormGate = Literal["clip", "refuse", "off"]
SchedulerType = Literal["constant", "cosine", "cosine_warm_restarts", "reduce_on_plateau"]
MAX_MU = 1.0
"""The largest mu of the FedProx paper (arXiv:1812.06127), above which adaptive-mu does not go."""
LONGEST_WINDOW = 50
"""Rounds that a rule looks back."""
TrainedPart = Literal["expert", "lora", "lora-lerobot", "all"]
SessionStart = Literal["news", "clients", "data", "always"]
LeakMode = Literal["off", "warn", "refuse"]
OptimizerState = Literal["reset", "keep"]
LoraAggregation = Literal["exact", "factors"]
CacheKind = Literal["auto", "off", "vision", "prefix"]
ModuleName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.]{0,127}$")]
CameraName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$")]


class Settings(BaseModel):
    """Base of every settings group: immutable, an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PolicyConfig(Settings):
    """Which policy is trained. Sent to every node, so that all build the same one.

    The upper bounds are far above any honest policy: what a server asks for must fit a node.
    """

    model_name: str = Field("tiny", min_length=1, max_length=1024)
    """``tiny`` (built offline), a hub id such as ``lerobot/smolvla_base``, or a local folder."""
    model_revision: str = Field("", max_length=128, pattern=r"^$|^[\w-]+([./][\w-]+)*$")
    """Commit, tag or branch of a hub id; empty: its main branch."""
    cameras: tuple[CameraName, ...] = Field(("front",), min_length=1, max_length=8)
    """Camera names the policy sees, in order; a node maps its own names onto these."""
    image_size: int = Field(64, ge=16, le=1024)
    """Side of the square images the policy works on, in pixels."""
    state_dim: int = Field(6, ge=1, le=256)
    """Joints read: five in degrees and the gripper from 0 to 100 on an SO-101."""
    action_dim: int = Field(6, ge=1, le=256)
    chunk_size: int = Field(20, ge=1, le=1000)
    """Actions predicted at once."""
    n_action_steps: int = Field(10, ge=1, le=1000)
    """Actions executed before the policy is asked again."""
    num_inference_steps: int = Field(10, ge=1, le=1000)
    """Flow-matching steps per chunk at inference."""
    trained_part: TrainedPart = "all"
    """``expert``: the action expert and projections. ``lora``: adapters on the expert's attention,
    some projections in full. ``lora-lerobot``: adapters where LeRobot puts them by default.
    ``all``: vision and text layers too."""
    lora_rank: int = Field(16, ge=1, le=1024)
    """Rank of each adapter."""
    lora_alpha: float = Field(32.0, gt=0, le=1e6, allow_inf_nan=False)
    """Adapters count alpha / rank times."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of an adapter's inputs that are dropped in training."""
    lora_targets: tuple[ModuleName, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj"), max_length=32
    )
    """Linear layers of the expert that get an adapter, by the end of their names; ``lora`` only."""
    lora_full_modules: tuple[ModuleName, ...] = Field(
        ("state_proj", "action_out_proj"), max_length=32
    )
    """Layers outside the towers that are trained in full beside the adapters; ``lora`` only."""

    @property
    def has_adapters(self) -> bool:
        """Whether LoRA adapters are trained."""
        return self.trained_part in ("lora", "lora-lerobot")

    @model_validator(mode="after")
    def _refuse_steps_beyond_the_chunk(self) -> Self:
        if self.n_action_steps > self.chunk_size:
            raise ValueError(
                f"n-action-steps ({self.n_action_steps}) is above chunk-size ({self.chunk_size})"
            )
        return self


class RunConfig(Settings):
    """One federated run. Field names are zk0's run-configuration keys in snake_case."""

    num_server_rounds: int = Field(20, ge=1)
    """Rounds of local training and aggregation."""
    model_name: str = "tiny"
    """``tiny``, a hub id such as ``lerobot/smolvla_base``, or a local folder."""
    min_fit_clients: int = Field(2, ge=1)
    """Clients that must be connected before a round starts, and accepted updates it needs."""
    fraction_fit: float = Field(1.0, gt=0, le=1)
    """Share of connected nodes asked to train each round; never fewer than min-fit-clients."""
    local_steps: int = Field(20, ge=1)
    """Optimizer steps of each client in each round; ignored when local-epochs is set."""
    local_epochs: int = Field(0, ge=0)
    """Passes over the client's training frames in each round; 0: count local-steps instead."""
    batch_size: int = Field(32, ge=1)
    """Samples per optimizer step; kept by accumulation when memory is short."""
    initial_lr: float = Field(2e-3, gt=0)
    """Peak learning rate of the clients' AdamW."""
    scheduler_type: SchedulerType = "cosine"
    """Learning rate over all rounds: cosine down to eta-min, cosine_warm_restarts, constant, or
    reduce_on_plateau of the held-out loss; the first steps warm up."""
    warmup_steps: int = Field(50, ge=0)
    """Optimizer steps of linear warm-up, counted over the whole run."""
    round_warmup_steps: int = Field(0, ge=0)
    """Optimizer steps of linear warm-up in every round, besides warmup-steps; 0: none."""
    eta_min: float = Field(2e-4, ge=0)
    """Learning rate at the end of the cosine, and what no rule goes below."""
    cosine_warm_restarts_t_0: int = Field(15, ge=1)
    """Rounds until the first restart of cosine_warm_restarts."""
    cosine_warm_restarts_t_mult: float = Field(1.2, ge=1, le=100, allow_inf_nan=False)
    """How many times as long as the last each next cycle is."""
    stall_patience: int = Field(5, ge=1, le=LONGEST_WINDOW)
    """Rounds without a lower held-out loss after which reduce_on_plateau halves."""
    adaptive_lr_enabled: bool = False
    """Raise the rate of clients with a high loss; lower all when the loss stalls or rises."""
    high_loss_multiplier: float = Field(2.0, gt=1, allow_inf_nan=False)
    """A client's loss is high above so many times the mean of the clients in its last round."""
    lr_boost_factor: float = Field(1.15, ge=1, le=10)
    """What the rate of such a client is multiplied by; 1: nothing is raised."""
    adjustment_window: int = Field(5, ge=0, le=LONGEST_WINDOW)
    """Rounds whose losses say whether learning stalls or diverges; 0: nothing is lowered."""
    adaptive_mu_enabled: bool = False
    """Raise proximal-mu when the clients' losses lie far apart."""
    loss_std_threshold: float = Field(1.2, gt=0, allow_inf_nan=False)
    """Standard deviation of the clients' losses in a round above which mu is raised."""
    mu_adjust_factor: float = Field(1.05, gt=1, le=10)
    """What mu is multiplied by then, up to 1."""
    mu_min: float = Field(0.001, ge=0, le=MAX_MU)
    """Lowest mu with adaptive-mu-enabled."""
    spike_threshold: float = Field(0.5, ge=0, allow_inf_nan=False)
    """Rise of the loss in one round above which adaptive rules wait a round; 0: they never do."""
    max_adjust_factor: float = Field(1.05, ge=1, le=100)
    """Most that an adaptive rule multiplies or divides by at a time before round 20."""
    strategy: StrategyName = "fedavgm"
    """fedavg: weighted mean. fedprox: plus a proximal term. fedavgm: outer Nesterov. fedadam,
    fedyogi, fedadagrad: adaptive. scaffold: corrected gradients. Robust rules: fedtrimmedavg,
    fedmedian, krum, multikrum."""
    server_learning_rate: float = Field(0.0, ge=0, le=100)
    """Learning rate of the server's optimizer; 0: the strategy's own, which is 0.7 of fedavgm, 0.1
    of fedadam and fedadagrad, 0.01 of fedyogi, 1 of scaffold."""
    server_momentum: float = Field(0.9, ge=0, lt=1)
    """Outer Nesterov momentum of fedavgm."""
    server_beta_1: float = Field(0.9, ge=0, lt=1)
    """Share of the first moment that fedadam and fedyogi keep each round."""
    server_beta_2: float = Field(0.99, ge=0, lt=1)
    """Share of the second moment that fedadam and fedyogi keep each round."""
    server_tau: float = Field(1e-3, gt=0, le=1e3)
    """How little fedadam, fedyogi and fedadagrad adapt: added to the root of the second moment."""
    aggregation: RuleName | Literal["auto"] = "auto"
    """Rule with any strategy that names none, but scaffold: mean, trimmed-mean, median, krum or
    multi-krum. auto: the one that strategy names, else mean."""
    beta: float = Field(0.2, gt=0, lt=0.5)
    """Share of the updates that the trimmed mean cuts off at either end, number by number."""
    num_malicious_nodes: int = Field(1, ge=1)
    """Bad updates that krum and multi-krum reckon with in each round."""
    num_nodes_to_select: int = Field(0, ge=0)
    """Updates that multi-krum averages; 0: all but num-malicious-nodes."""
    norm_gate: NormGate = "clip"
    """What becomes of an update far larger than the others' or its node's own: clip scales it down,
    refuse leaves it out, off lets it pass."""
    proximal_mu: float = Field(0.0, ge=0)
    """Weight of FedProx's term mu/2 |w - global|^2; used by fedprox."""
    optimizer_state: OptimizerState = "reset"
    """What clients do with AdamW's moments between rounds."""
    lora_aggregation: LoraAggregation = "exact"
    """exact: mean of the adapters' products. factors: mean of each factor, which is another."""
    codec: CodecName = "float32"
    """Form of the updates on the wire: float32, bfloat16, int8, int4, topk-int8 or topk-2bit. What
    the last four leave out, a node adds to its next update."""
    codec_down: CodecName = "float32"
    """Form of the global weights on their way to the nodes. float32, bfloat16: whole. Others: as a
    change of what a node holds, and whole where it holds something else."""
    topk_fraction: float = Coding.model_fields["topk_fraction"].default
    """Share of an update's numbers that a topk codec sends, the largest ones."""
    codec_block: int = Coding.model_fields["block"].default
    """Numbers that share a scale with int8 and int4."""
    codec_exempt: tuple[LayerName, ...] = Coding.model_fields["exempt"].default
    """Layers that travel as bfloat16 or better, whatever the codec."""
    image_augmentation: bool = False
    """Train on pictures with changed colours, sharpness and place; features are not cached then."""
    statistics: Statistics = "pooled"
    """pooled: all train and evaluate with agreed statistics. local: each client with its own."""
    eval_frequency: int = Field(5, ge=0)
    """Rounds between evaluations; round 0 and the last are evaluated too. 0: never."""
    eval_batches: int = Field(0, ge=0)
    """Batches of each evaluation set that are used; 0: all frames."""
    eval_datasets: tuple[str, ...] = ()
    """URIs of the server's own evaluation sets; none: the loss is the clients' held-out mean."""
    leak_check: LeakMode = "warn"
    """Whether an episode that measures, at the server or a client, is trained on at any client.
    warn: the verdict says so. refuse: such a client does not take part. off: nobody is asked."""
    eval_scenes: int = Field(0, ge=0)
    """Closed-loop scenes per part of the simulated table at each evaluation; 0: none."""
    checkpoint_interval: int = Field(10, ge=0)
    """Rounds between checkpoints; the last round always has one. 0: only the last."""
    round_deadline_s: float = Field(600.0, gt=0)
    """A round closes then, with the updates it has."""
    close_fraction: float = Field(1.0, gt=0, le=1)
    """Once this share of the nodes asked have sent good updates (never fewer than
    min-fit-clients), the others get round-grace-s more."""
    round_grace_s: float = Field(30.0, ge=0)
    """How long stragglers are waited for after that; then they are told to stop."""
    wait_deadline_s: float = Field(600.0, gt=0)
    """How long a run waits for min-fit-clients before it fails."""
    rejoin_grace_s: float = Field(60.0, ge=0)
    """How long a round waits for clients that took part in the last one, or in this one, and are
    gone now."""
    max_refusals: int = Field(3, ge=0)
    """A client sits out after so many refused updates in a row; 0: never."""
    worse_margin: float = Field(0.02, ge=0)
    """Held-out loss may end this share above round 0 before the run counts as failed."""
    seed: int = Field(0, ge=0)
    """Seed of initial weights, sampling and flow noise."""
    start_from: str = Field("", pattern=r"^[A-Za-z0-9_.+-]{0,64}$")
    """Run whose best weights by held-out loss are the initial ones; empty: those of model-name."""
    output_dir: str = "outputs"
    """Folder that gets ``<YYYY-MM-DD_HH-MM-SS>/`` with results."""
    policy: PolicyConfig = PolicyConfig()
    """Shape of the policy; from the preset of model-name."""

    @property
    def curve(self) -> Literal["constant", "cosine"]:
        """The curve of a round's learning rate, that the server shifts and scales."""
        return "cosine" if self.scheduler_type.startswith("cosine") else "constant"

    @property
    def follows_heldout_loss(self) -> bool:
        """Whether a learning rule needs the held-out loss of every round."""
        adapts = self.adaptive_lr_enabled or self.adaptive_mu_enabled
        return self.scheduler_type == "reduce_on_plateau" or (adapts and self.eval_frequency == 1)

    @property
    def coding(self) -> Coding:
        """How updates travel."""
        return self._coding(self.codec)

    @property
    def coding_down(self) -> Coding:
        """How the global weights travel."""
        return self._coding(self.codec_down)

    def _coding(self, codec: CodecName) -> Coding:
        return Coding(
            codec=codec,
            topk_fraction=self.topk_fraction,
            block=self.codec_block,
            exempt=self.codec_exempt,
        )

    @property
    def rule(self) -> Rule:
        """How the updates of a round become one."""
        named = STRATEGIES[self.strategy].rule or "mean"
        return Rule(
            name=named if self.aggregation == "auto" else self.aggregation,
            beta=self.beta,
            num_malicious=self.num_malicious_nodes,
            num_selected=self.num_nodes_to_select,
        )

    @property
    def server_rate(self) -> float:
        """``server_learning_rate``, or the strategy's own."""
        return self.server_learning_rate or STRATEGIES[self.strategy].server_learning_rate

    @model_validator(mode="after")
    def _refuse_rules_that_cannot_work(self) -> Self:
        rule = self.rule
        if self.strategy == "scaffold" and rule.name != "mean":
            raise ValueError(
                f"strategy=scaffold and aggregation={self.aggregation} do not fit: corrections sum "
                "to zero over the clients in their mean only; leave aggregation out, or set "
                "strategy to fedavg"
            )
        if self.strategy == "scaffold" and (self.codec, self.codec_down) != ("float32", "float32"):
            raise ValueError(
                f"strategy=scaffold sends its variates in float32, codec is {self.codec} and "
                f"codec-down {self.codec_down}: leave both out, or set another strategy"
            )
        if (STRATEGIES[self.strategy].rule or rule.name) != rule.name:
            raise ValueError(
                f"strategy={self.strategy} and aggregation={self.aggregation} are two rules: leave "
                "aggregation out, or set strategy to fedavg"
            )
        if self.min_fit_clients < rule.fewest:
            raise ValueError(
                f"{rule.explain()} needs {rule.fewest} updates in each round, min-fit-clients is "
                f"{self.min_fit_clients}: set min-fit-clients={rule.fewest}, or another rule"
            )
        is_exact = self.policy.has_adapters and self.lora_aggregation == "exact"
        if is_exact and rule.name in ("trimmed-mean", "median"):
            raise ValueError(
                f"{rule.name} knows no exact mean of adapters: set lora-aggregation=factors"
            )
        if is_exact and not STRATEGIES[self.strategy].is_linear:
            raise ValueError(
                f"strategy={self.strategy} moves each number at a rate of its own, so products of "
                "adapters have no exact mean: set lora-aggregation=factors, or strategy=fedavgm"
            )
        return self

    @model_validator(mode="after")
    def _refuse_server_settings_without_effect(self) -> Self:
        for name in ("learning_rate", "momentum", "beta_1", "beta_2", "tau"):
            setting = f"server_{name}"
            readers = readers_of(setting)
            is_set = getattr(self, setting) != type(self).model_fields[setting].default
            if is_set and self.strategy not in readers:
                raise ValueError(
                    f"{kebab(setting)} has an effect with strategy="
                    f"{' or '.join(readers)} only: leave it out"
                )
        return self

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        if self.proximal_mu > 0 and self.strategy != "fedprox":
            raise ValueError("proximal-mu has an effect with strategy=fedprox only")
        if self.strategy == "fedprox" and self.proximal_mu == 0:
            raise ValueError("strategy=fedprox needs proximal-mu above 0")
        if self.statistics == "local" and (self.eval_datasets or self.eval_scenes):
            raise ValueError(
                "statistics=local leaves the server none to evaluate with: no eval-datasets or "
                "eval-scenes"
            )
        if self.eta_min > self.initial_lr:
            raise ValueError("eta-min is above initial-lr")
        return self

    @model_validator(mode="after")
    def _refuse_learning_rules_that_cannot_work(self) -> Self:
        is_plateau = self.scheduler_type == "reduce_on_plateau"
        if is_plateau and self.eval_frequency != 1:
            raise ValueError(
                "scheduler-type=reduce_on_plateau follows the held-out loss of every round, "
                f"eval-frequency is {self.eval_frequency}: set eval-frequency=1"
            )
        if is_plateau and self.adaptive_lr_enabled and self.adjustment_window:
            raise ValueError(
                "scheduler-type=reduce_on_plateau and adaptive-lr-enabled both lower the rate of a "
                "run that stalls: set adjustment-window=0, or another scheduler-type"
            )
        if self.adjustment_window == 1:
            raise ValueError("adjustment-window=1 shows no trend: set 2 or more, or 0 for none")
        if self.adaptive_mu_enabled and self.strategy != "fedprox":
            raise ValueError(
                f"adaptive-mu-enabled has no effect with strategy={self.strategy}: set "
                "strategy=fedprox and proximal-mu, or adaptive-mu-enabled=false"
            )
        if self.adaptive_mu_enabled and self.proximal_mu > MAX_MU:
            raise ValueError(
                f"proximal-mu={self.proximal_mu:g} is above {MAX_MU:g}, the most that "
                "adaptive-mu-enabled goes to: lower it, or set adaptive-mu-enabled=false"
            )
        if not self.local_epochs and self.round_warmup_steps > self.local_steps:
            raise ValueError(
                f"round-warmup-steps={self.round_warmup_steps} is above "
                f"local-steps={self.local_steps}: no round would come to its learning rate"
            )
        return self


class SessionsConfig(Settings):
    """Runs that a server starts by itself: the table ``[sessions]`` of its file."""

    when: SessionStart = "news"
    """What starts the next one. news: a client that was not in the last one, or other data at one.
    clients, data: one of the two. always: nothing but cooldown-s."""
    min_fit_clients: int = Field(0, ge=0)
    """Clients that must be here; 0: as the run's settings say."""
    rounds: int = Field(0, ge=0)
    """Rounds of each session; 0: as the run's settings say."""
    settle_s: float = Field(10.0, ge=0)
    """With enough clients, how long others are waited for."""
    cooldown_s: float = Field(60.0, ge=0)
    """Least time between two sessions; doubled with each failure in a row, up to an hour."""
    keep: int = Field(10, ge=0)
    """Sessions whose checkpoints stay, the newest; figures and plots of all do. 0: all."""
    config: str = ""
    """TOML file with the run's settings; empty: the tables run and policy of the same file."""
    run: RunConfig = RunConfig()
    """The run's settings as they were read; not for hand-written files."""


class ServerConfig(Settings):
    """The server machine."""

    host: str = ""
    """Address that the gateway listens on; empty: 127.0.0.1, or 0.0.0.0 with public-hosts."""
    port: int = Field(9092, ge=1, le=65535)
    """Port that clients reach (the gateway)."""
    superlink_port: int = Field(9091, ge=1, le=65535)
    """Flower's SuperLink; loopback only."""
    public_hosts: tuple[str, ...] = ()
    """Names and addresses under which clients reach this machine; the first is in join codes."""
    tls_cert: str = ""
    """Own certificate chain (PEM) for the public port; empty: one of zk0bot's private CA."""
    tls_key: str = ""
    """Private key of tls-cert."""
    insecure: bool = False
    """Plain HTTP and no join codes: on loopback addresses only."""
    start_deadline_s: float = Field(120.0, gt=0)
    """``server start`` fails after this long without a passing health check."""
    sessions: SessionsConfig | None = None
    """Runs that this server starts by itself; none without the table ``[sessions]``."""

    @property
    def listen_host(self) -> str:
        """Where the gateway listens."""
        return self.host or ("0.0.0.0" if self.public_hosts else "127.0.0.1")

    @property
    def address(self) -> str:
        """HOST:PORT that clients reach, and that join codes name."""
        return f"{self.public_hosts[0] if self.public_hosts else self.listen_host}:{self.port}"

    @model_validator(mode="after")
    def _refuse_half_a_certificate(self) -> Self:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("tls-cert and tls-key belong together: give both or none")
        if self.insecure and (self.tls_cert or self.public_hosts):
            raise ValueError("insecure is for loopback only: no tls-cert and no public-hosts")
        return self


class ClientConfig(Settings):
    """One client on a robot owner's machine."""

    server: str = ""
    """HOST:PORT of the server's gateway; empty: the one that this client has joined."""
    dataset_uri: str = ""
    """``hf:owner/name``, ``owner/name``, ``local:/path`` or ``sim:TASK``."""
    name: str = ""
    """What the server calls this client; empty: ``client-`` and part of the dataset id."""
    episodes: str = ""
    """Episodes to use, such as ``0-39,45``; empty: all."""
    revision: str = ""
    """Revision pin of a hub dataset."""
    rename_cameras: dict[str, str] = Field(default_factory=dict)
    """This dataset's camera name to the policy's, where they differ."""
    model_folders: tuple[str, ...] = ()
    """Folders on this machine that a server may name as model-name; others only by hub id."""
    heldout_episodes: int = Field(10, ge=0)
    """Last episodes kept for evaluation; never trained on."""
    episode_marks: bool = True
    """Tell the server marks of this client's episodes, by which it finds those that measure; they
    show nothing, but whoever holds an episode can tell that it is here."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to train; auto: CUDA when there is one."""
    cache: CacheKind = "auto"
    """Features of frozen layers that are kept on this machine: vision: of each picture; prefix: of
    picture and instruction, faster and larger; auto: what fits."""
    cache_gib: float = Field(50.0, gt=0)
    """Most that such features may take on the disk, of all clients here together."""
    first_port: int = Field(8080, ge=1, le=65000)
    """First loopback port tried for the SuperNode and the egress hop."""
    insecure: bool = False
    """Plain HTTP to a server on this machine that was started so."""
    max_upload_mbit: float = Field(0.0, ge=0)
    """Megabits per second that replies may take of the link; 0: no limit."""
    max_bytes_per_day: int = Field(0, ge=0)
    """Bytes sent and received between two midnights, local time; 0: no limit."""
    hours: str = Field("", pattern=r"^$|^[0-2][0-9]:[0-5][0-9]-[0-2][0-9]:[0-5][0-9]$")
    """Local time in which this node takes orders, such as 22:00-07:00; empty: always."""
    leave_after_round: int = Field(0, ge=0)
    """Take no order of a run after this round; 0: no limit."""
    gpu_only_when_idle: bool = False
    """Decline to train while another program uses the GPU."""
    forbid: tuple[str, ...] = ()
    """Patterns of tensor and metric names that must not leave, such as ``statistics*``."""
    start_deadline_s: float = Field(300.0, gt=0)
    """``client start`` fails after this long without a passing health check."""
