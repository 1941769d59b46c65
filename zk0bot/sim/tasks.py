"""What is asked of the arm, where the cube lies, and which random numbers belong to which use.

Angles are seen from above at the shoulder's axis: 0 is straight ahead, positive is to the arm's
left, which is the right of the ``front`` picture.
"""

from dataclasses import dataclass

from zk0bot.errors import UnknownNameError

REACH_M = (0.18, 0.31)
"""Distance of a cube's centre from the shoulder's axis; cubes lie uniformly by area."""

EVALUATION_SEED = 900_000
TUNING_SEED = 700_000
SEEDS_PER_SECTOR = 1000
SEEDS_PER_TASK = 100_000


@dataclass(frozen=True, kw_only=True)
class Sector:
    """A part of the table: between two angles in radians, ``low`` < ``high``."""

    name: str
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Task:
    """One instruction, the cube it is about, and the parts of the table its owner has.

    ``third`` is disjoint from the other owners'; ``wide`` is 60 % of the table and overlaps them.
    """

    name: str
    colour: str
    rgb: tuple[float, float, float]
    index: int
    third: Sector
    wide: Sector

    @property
    def instruction(self) -> str:
        return f"Touch the {self.colour} cube."


TASKS: tuple[Task, ...] = (
    Task(
        name="touch-red",
        colour="red",
        rgb=(0.86, 0.10, 0.10),
        index=0,
        third=Sector(name="left", low=-0.75, high=-0.25),
        wide=Sector(name="wide-left", low=-0.75, high=0.15),
    ),
    Task(
        name="touch-green",
        colour="green",
        rgb=(0.10, 0.62, 0.20),
        index=1,
        third=Sector(name="middle", low=-0.25, high=0.25),
        wide=Sector(name="wide-middle", low=-0.45, high=0.45),
    ),
    Task(
        name="touch-blue",
        colour="blue",
        rgb=(0.10, 0.28, 0.85),
        index=2,
        third=Sector(name="right", low=0.25, high=0.75),
        wide=Sector(name="wide-right", low=-0.15, high=0.75),
    ),
)

SECTORS: dict[str, Sector] = {
    sector.name: sector for task in TASKS for sector in (task.third, task.wide)
}


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One starting situation: a task, a part of the table, and the seed of all its chance."""

    task: Task
    sector: Sector
    seed: int


def get_task(name: str) -> Task:
    """The task called ``name``; UnknownNameError with the nearest one otherwise."""
    for task in TASKS:
        if task.name == name:
            return task
    raise UnknownNameError.of("simulated task", name, (task.name for task in TASKS))


def get_sector(name: str, task: Task) -> Sector:
    """A sector by its name, or by ``third`` or ``wide`` for the task's own."""
    if name == "third":
        return task.third
    if name == "wide":
        return task.wide
    if name not in SECTORS:
        raise UnknownNameError.of("sector", name, (*SECTORS, "third", "wide"))
    return SECTORS[name]


def evaluation_scenes(per_sector: int, *, first_seed: int = EVALUATION_SEED) -> list[Scene]:
    """For every task ``per_sector`` scenes in its own third: the reported ones, never trained on.

    Ordered by task. ValueError for more scenes than a sector has seeds.
    """
    if not 0 <= per_sector <= SEEDS_PER_SECTOR:
        raise ValueError(f"per_sector is {per_sector}, not 0 to {SEEDS_PER_SECTOR}")
    return [
        Scene(task=task, sector=task.third, seed=first_seed + SEEDS_PER_SECTOR * task.index + i)
        for task in TASKS
        for i in range(per_sector)
    ]


def tuning_scenes(per_sector: int) -> list[Scene]:
    """As ``evaluation_scenes``, from other seeds: for choosing settings."""
    return evaluation_scenes(per_sector, first_seed=TUNING_SEED)


def training_seed(task: Task, *, seed: int, index: int) -> int:
    """The seed of a training episode: one for each (task, dataset seed, index).

    Modulo a million it lies in 100 000 to 399 999: no tuning or evaluation seed does.
    """
    if seed < 0 or not 0 <= index < SEEDS_PER_TASK:
        raise ValueError(f"seed {seed} or index {index} is out of range")
    return 1_000_000 * seed + SEEDS_PER_TASK * (task.index + 1) + index
