"""Spaces of ``zk0bot tune``: a few settings and the values to be tried, as TOML."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from zk0bot.config.experiment import Experiment, SceneSet, Seeds, Setup, parse_seeds
from zk0bot.config.idle import find_idle
from zk0bot.config.models import PolicyConfig, RunConfig, Settings
from zk0bot.config.paths import configs_dir
from zk0bot.config.run_table import (
    build_run,
    check_run,
    explain,
    find_shipped,
    read_toml,
    refuse_unknown,
    to_text,
)
from zk0bot.config.search import Point, Range, Values, Way, choose_way, draw_points
from zk0bot.config.spelling import kebab
from zk0bot.errors import ConfigError

Objective = Literal["loss", "success"]
DEFAULT = "default"
"""Name of the settings that all trials are held against."""
_MOST_SETTINGS = 8
"""Further primes of a Halton sequence fill a space only after hundreds of points."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One trial: values of the settings in the space, and the whole run."""

    point: Point
    run: RunConfig


class Space(Setup):
    """Settings to be tried on tuning scenes; the best then meets the default on others."""

    objective: Objective = "loss"
    """What is better: a lower held-out loss, or more success."""
    trials: int = Field(8, ge=1, le=99)
    """Points of the space that are tried beside the default; a grid that is no larger, whole."""
    tuning_seeds: Seeds = (100, 101, 102)
    """As seeds, for choosing. None of both."""
    keep_one_in: int = Field(3, ge=2, le=10)
    """After each rung so many trials become one; the next rung gives each so much more."""
    least_rounds: int = Field(0, ge=0)
    """Fewest rounds of a trial; 0: all of them. Fewer cost less, and favour what is fast at
    first."""
    search_seed: int = Field(0, ge=0)
    """Of the points that are drawn."""
    run: RunConfig
    """The default."""
    given: Point
    """What the file says of it, by field name."""
    space: dict[str, Values] = Field(min_length=1, max_length=_MOST_SETTINGS)
    """What is tried, by field name."""

    @model_validator(mode="after")
    def _refuse_what_cannot_be_tuned(self) -> Self:
        if len(set(self.tuning_seeds)) < len(self.tuning_seeds):
            raise ValueError(f"tuning-seeds {list(self.tuning_seeds)} name one twice")
        both = sorted(set(self.seeds) & set(self.tuning_seeds))
        if both:
            raise ValueError(
                f"seeds and tuning-seeds both name {', '.join(map(str, both))}: a seed that took "
                "part in the choice cannot judge it"
            )
        if self.least_rounds > self.run.num_server_rounds:
            raise ValueError(
                f"least-rounds ({self.least_rounds}) is above num-server-rounds "
                f"({self.run.num_server_rounds})"
            )
        return self

    @property
    def way(self) -> Way:
        """How points are chosen."""
        return choose_way(self.space, self.trials)

    @cached_property
    def candidates(self) -> dict[str, Candidate]:
        """The trials by name, without points that come to the default.

        ConfigError for a point that is no run.
        """
        found: list[Candidate] = []
        for point in draw_points(self.space, self.trials, seed=self.search_seed):
            candidate = Candidate(point=point, run=self._build_run(point))
            if _effect(candidate.run) not in [_effect(self.run), *(_effect(c.run) for c in found)]:
                found.append(candidate)
        return {f"trial-{number:02}": candidate for number, candidate in enumerate(found, 1)}

    def _build_run(self, point: Point) -> RunConfig:
        try:
            return build_run({**self.given, **point}, self.clients)
        except ConfigError as error:
            raise ConfigError(
                f"with {describe_point(point)}: {error.message}", hint=error.hint
            ) from None

    def build_experiment(
        self,
        trials: Sequence[str],
        *,
        name: str,
        seeds: Sequence[int],
        scene_set: SceneSet,
        rounds: int = 0,
    ) -> Experiment:
        """The default and these trials, held against each other; 0 rounds: as many as settings say.

        pydantic's ValidationError for settings that cannot be compared.
        """
        update = {"num_server_rounds": rounds or self.run.num_server_rounds}
        runs = {DEFAULT: self.run} | {trial: self.candidates[trial].run for trial in trials}
        setup = {field: getattr(self, field) for field in Setup.model_fields}
        return Experiment(
            **setup | {"name": name, "seeds": tuple(seeds)},
            reference=DEFAULT,
            scene_set=scene_set,
            baselines=(),
            run=self.run.model_copy(update=update),
            settings={key: run.model_copy(update=update) for key, run in runs.items()},
        )


def describe_point(point: Point) -> str:
    """``server-momentum=0.9 local-steps=20``, as ``--set`` takes each."""
    return " ".join(f"{kebab(name)}={to_text(value)}" for name, value in point.items())


def load_space(name: str, *, seeds: str = "") -> Space:
    """The space in a file, or the shipped one of that name.

    ``seeds``, such as ``0-4,7``, replaces those of the file for the comparison at the end. Raises
    ConfigError naming the value, UnknownNameError with the nearest name.
    """
    path = find_shipped(spaces_dir(), "space", name)
    values = read_toml(path, hint="zk0bot tune --list")
    refuse_unknown(values, set(Space.model_fields) - {"name", "given"}, f"key in {path}")
    given = check_run(values.pop("run", {}), f"in table [run] of {path}")
    table = check_run(values.pop("space", {}), f"in table [space] of {path}")
    if seeds:
        values["seeds"] = parse_seeds(seeds)
    clients = values.get("clients", Space.model_fields["clients"].default)
    tables = {
        "name": path.stem,
        "run": build_run(given, clients),
        "given": given,
        "space": _read_space(table, f"table [space] of {path}"),
    }
    try:
        space = Space.model_validate({**values, **tables})
        _refuse_trials(space)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error)}") from None
    except ConfigError as error:
        raise ConfigError(f"table [space] of {path}: {error.message}", hint=error.hint) from None
    return space


class SpaceSummary(Settings):
    """One shipped space."""

    name: str
    description: str
    objective: Objective
    settings: list[str]
    """What is tried."""


class SpaceList(Settings):
    """What ``zk0bot tune --list`` shows."""

    spaces: list[SpaceSummary]

    def to_text(self) -> str:
        """A line for each."""
        return "\n".join(f"{item.name:<22}{item.description}" for item in self.spaces)


def list_spaces() -> list[SpaceSummary]:
    """The shipped ones, by name."""
    loaded = [load_space(path.stem) for path in sorted(spaces_dir().glob("*.toml"))]
    return [
        SpaceSummary(
            name=item.name,
            description=item.description,
            objective=item.objective,
            settings=[kebab(name) for name in item.space],
        )
        for item in loaded
    ]


def spaces_dir() -> Path:
    """Where the shipped spaces lie."""
    return configs_dir() / "spaces"


def _refuse_trials(space: Space) -> None:
    """Raises for trials that cannot be compared, that are all the same, or differ in nothing."""
    if not space.candidates:
        raise ConfigError("every point is the default", hint="give other values than [run] has")
    space.build_experiment(
        list(space.candidates), name=space.name, seeds=space.seeds, scene_set="evaluation"
    )
    for name in space.space:
        lines = [set(find_idle(trial.run, [name])) for trial in space.candidates.values()]
        everywhere = set.intersection(*lines)
        idle = [line for line in everywhere if line.startswith(f"{kebab(name)} ")]
        if idle:
            raise ConfigError(idle[0], hint="set that in [run], or take it out of [space]")


def _effect(run: RunConfig) -> RunConfig:
    """The run with the server's rate spelled out: 0 is the strategy's own."""
    return run.model_copy(update={"server_learning_rate": run.server_rate})


def _read_space(table: Mapping[str, Any], where: str) -> dict[str, Values]:
    if not table:
        raise ConfigError(f"there is nothing to try in {where}", hint=_EXAMPLE)
    if "num_server_rounds" in table:
        raise ConfigError(
            f"num-server-rounds cannot be set in {where}",
            hint="all trials have the same rounds: set it in [run], and least-rounds",
        )
    return {name: _read_values(name, value, where) for name, value in table.items()}


def _read_values(name: str, value: Any, where: str) -> Values:
    """A list of values, or a range, each checked by itself; ConfigError."""
    place = f"{kebab(name)} in {where}"
    kind = _kind_of(name)
    try:
        if isinstance(value, list) and value:
            return tuple(kind.validate_python(item) for item in value)
        if isinstance(value, dict):
            return _read_range(name, value, kind, place)
    except ValidationError as error:
        given = error.errors()[0]["input"]
        told = "" if isinstance(given, dict) else f", got {given!r}"
        raise ConfigError(f"{place}: {explain(error)}{told}", hint=_EXAMPLE) from None
    raise ConfigError(f"{place} is neither a list nor a range: {value!r}", hint=_EXAMPLE)


_EXAMPLE = "server-momentum = [0.5, 0.9], or initial-lr = { low = 1e-3, high = 4e-3, log = true }"


def _read_range(name: str, table: dict[str, Any], kind: TypeAdapter[Any], place: str) -> Range:
    annotation = _field_of(name).annotation
    if annotation not in (int, float):
        raise ConfigError(f"{place} has no range: it is no number", hint=_EXAMPLE)
    refuse_unknown(table, {"low", "high", "log"}, f"key of {place}")
    found = Range.model_validate({**table, "is_whole": annotation is int})
    for end in (found.lowest, found.highest):
        kind.validate_python(end)
    return found


def _kind_of(name: str) -> TypeAdapter[Any]:
    """What one setting may be, whatever the others are."""
    field = _field_of(name)
    kind: Any = field.annotation
    for limit in field.metadata:
        kind = Annotated[kind, limit]
    return TypeAdapter(kind)


def _field_of(name: str) -> Any:
    policy = name.removeprefix("policy.")
    return (PolicyConfig if policy != name else RunConfig).model_fields[policy]
