"""What the demonstration asks of the trainers after a run, and what comes back: files and lines.

The terminal tower writes the plan and reads the result; ``zk0bot.training.comparison`` does it.
"""

from pydantic import Field

from zk0bot.config.models import RunConfig
from zk0bot.records import Record
from zk0bot.report.demo import SectorCount


class ComparisonPlan(Record):
    """Policies to try on the same scenes. Folders are those of warm trainers."""

    run: RunConfig
    """The federated run: its policy, seed, steps, schedule and evaluation sets."""
    evaluator_dir: str
    """The server's own warm process."""
    owners: dict[str, str] = Field(default_factory=dict)
    """Folder of each owner's trainer by the name of the policy it trains alone."""
    with_baselines: bool = False
    """The two mean trajectories; they need no owner and no run."""
    with_untrained: bool = False
    federated_weights: str = ""
    """Trained tensors of the finished run; empty: that policy is left out."""
    with_alone: bool = False
    """Let each owner train by itself for as many steps as it had in the run."""
    scenes_per_sector: int = Field(ge=1)
    first_seed: int = Field(ge=0)
    """Of the scenes; training and tuning never use them."""
    films: dict[str, str] = Field(default_factory=dict)
    """Folder for videos by the name of the policy to film."""
    films_per_sector: int = 1


class PolicyScore(Record):
    """One policy on all scenes."""

    per_sector: dict[str, SectorCount]
    heldout_loss: float | None
    videos: list[str] = Field(default_factory=list)
    alone_s: tuple[float, float] | None = None
    """Unix times between which the policy was trained alone."""
    evaluation_s: tuple[float, float]
    """Unix times between which it was tried."""


class ComparisonResult(Record):
    """Scores by the policy's name."""

    policies: dict[str, PolicyScore]


class ComparisonProgress(Record):
    """One line of the process's stdout."""

    policy: str
    step: str
    """``training alone``, ``trying`` or ``done``."""
