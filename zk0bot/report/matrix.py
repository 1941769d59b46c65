"""Every policy on each owner's held-out episodes and with each colour in each part of the table,
and how well it does where nobody has trained.

Letters: S seeds, N scenes of a pair, C scenes of several.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
from pydantic import Field

from zk0bot.records import Record
from zk0bot.report.cell import Cell, CellKind, CellSpec, MatrixTrial, PairScore, SetScore
from zk0bot.report.figure import Interval, mean_of, to_interval
from zk0bot.report.paired import Estimate, Outcomes, estimate_mean, estimate_rate, estimate_ratio
from zk0bot.sim.pairs import PAIRS, Coverage, find_coverage
from zk0bot.sim.spec import parse_sim_uri

MATRIX_CHART_NAME = "matrix.png"
Unseen = Literal["unseen-pair", "unseen-task"]
UNSEEN: tuple[Unseen, ...] = get_args(Unseen)
TITLES: dict[Unseen, str] = {
    "unseen-pair": "places where no owner has the task's colour",
    "unseen-task": "tasks that no owner has",
}


class Column(Record):
    """A task in a third of the table."""

    task: str
    place: str
    trained_on: Coverage
    """By all owners of the federation together, whoever trained the policy."""


class HeldoutScore(Record):
    """A policy on one owner's held-out episodes; means of the seeds, each with its own data."""

    client_id: str
    num_examples: int
    """Frames of one seed."""
    loss: Interval
    """In units of the policy's own normalisation."""
    metrics: dict[str, dict[str, float]]
    """``action_error`` by joint."""
    arm_error: Interval
    """Mean action error of the joints of the arm, in degrees: comparable between all policies."""


class TaskScore(Record):
    """A policy with one task in one third; the seeds together."""

    task: str
    place: str
    success: Interval
    num_scenes: int
    """Of one seed."""
    loss: Interval | None = None
    """On recorded episodes of the same, as ``arm_error``."""
    arm_error: Interval | None = None


class Generalisation(Record):
    """A policy where no owner has trained, against where one has, at the same places."""

    places: list[str]
    """Those that have both; each counts the same."""
    seen: Interval
    """Success."""
    unseen: Interval
    generalisation_score: Interval | None
    """``unseen`` / ``seen``; 1: as good where nobody has trained. None where ``seen`` is 0."""
    loss_ratio: Interval | None = None
    """Loss on recorded episodes, unseen / seen, geometric mean of the seeds; it has no unit."""


class MatrixRow(Record):
    """One policy; the seeds together."""

    name: str
    kind: CellKind
    seeds: list[int]
    heldout: list[HeldoutScore]
    tasks: list[TaskScore]
    """In the order of the columns."""
    generalisation: dict[Unseen, Generalisation] = Field(default_factory=dict)


class Matrix(Record):
    """``matrix`` in ``comparison.json``."""

    clients: list[str]
    columns: list[Column]
    rows: list[MatrixRow]
    sentences: list[str]


def build_matrix(specs: Sequence[CellSpec], done: Mapping[str, Cell]) -> Matrix | None:
    """The matrix of the cells that are done, by key; None where the experiment asks for none."""
    owners = next((spec.matrix.owners for spec in specs if spec.matrix), None)
    if owners is None:
        return None
    columns = _build_columns(list(owners.values()))
    groups: dict[str, list[Cell]] = {}
    for spec in specs:
        if spec.key in done:
            groups.setdefault(spec.row, []).append(done[spec.key])
    return Matrix(
        clients=list(owners),
        columns=columns,
        rows=[_build_row(name, cells, columns) for name, cells in groups.items()],
        sentences=_build_sentences(columns),
    )


def find_places(columns: Sequence[Column], unseen: Unseen) -> list[str]:
    """Where one colour was trained on in the whole place, and another not at all."""
    found = {kind: {c.place for c in columns if c.trained_on == kind} for kind in ("seen", unseen)}
    places = dict.fromkeys(column.place for column in columns)
    return [place for place in places if place in found["seen"] & found[unseen]]


def colour_of(task: str) -> str:
    """``red`` of ``touch-red``."""
    return task.removeprefix("touch-")


def _build_columns(uris: Sequence[str]) -> list[Column]:
    data = [parse_sim_uri(uri) for uri in uris]
    return [
        Column(task=pair.task.name, place=pair.place.name, trained_on=find_coverage(pair, data))
        for pair in PAIRS
    ]


def _build_row(name: str, cells: Sequence[Cell], columns: Sequence[Column]) -> MatrixRow:
    trials = [cell.trial.matrix for cell in cells if cell.trial and cell.trial.matrix]
    found = {unseen: _generalise(trials, columns, unseen) for unseen in UNSEEN}
    return MatrixRow(
        name=name,
        kind=cells[0].spec.kind,
        seeds=sorted(cell.spec.seed for cell in cells),
        heldout=[_sum_up_heldout(client, trials) for client in trials[0].heldout],
        tasks=[_sum_up_pair(column, trials) for column in columns],
        generalisation={unseen: figures for unseen, figures in found.items() if figures},
    )


def _sum_up_heldout(client: str, trials: Sequence[MatrixTrial]) -> HeldoutScore:
    scores = [trial.heldout[client] for trial in trials]
    return HeldoutScore(
        client_id=client,
        num_examples=scores[0].num_examples,
        loss=_mean([score.loss for score in scores]),
        metrics={"action_error": _mean_errors(scores)},
        arm_error=_mean([_arm_error(score) for score in scores]),
    )


def _sum_up_pair(column: Column, trials: Sequence[MatrixTrial]) -> TaskScore:
    scores = [_find(trial, column) for trial in trials]
    recorded = [score.recorded for score in scores if score.recorded]
    return TaskScore(
        task=column.task,
        place=column.place,
        success=to_interval(estimate_rate(_outcomes(trials, [column]))),
        num_scenes=len(scores[0].outcomes),
        loss=mean_of([score.loss for score in recorded]),
        arm_error=mean_of([_arm_error(score) for score in recorded]),
    )


def _generalise(
    trials: Sequence[MatrixTrial], columns: Sequence[Column], unseen: Unseen
) -> Generalisation | None:
    """Success S,C in scenes whose cubes lie the same, averaged over the colours of each kind."""
    places = find_places(columns, unseen)
    if not places:
        return None
    kinds = {
        kind: [
            [c for c in columns if c.place == place and c.trained_on == kind] for place in places
        ]
        for kind in ("seen", unseen)
    }
    rates = {
        kind: estimate_rate(np.hstack([_outcomes(trials, group) for group in groups]))
        for kind, groups in kinds.items()
    }
    score = estimate_ratio(rates[unseen], rates["seen"])
    return Generalisation(
        places=places,
        seen=to_interval(rates["seen"]),
        unseen=to_interval(rates[unseen]),
        generalisation_score=_to_open_interval(score) if score else None,
        loss_ratio=_loss_ratio(trials, kinds[unseen], kinds["seen"]),
    )


def _outcomes(trials: Sequence[MatrixTrial], columns: Sequence[Column]) -> Outcomes:
    """Success S,N, mean of ``columns``, which are of one place."""
    table: Outcomes = np.mean(
        [[_find(trial, column).outcomes for trial in trials] for column in columns], axis=0
    )
    return table


def _loss_ratio(
    trials: Sequence[MatrixTrial],
    unseen: Sequence[Sequence[Column]],
    seen: Sequence[Sequence[Column]],
) -> Interval | None:
    pairs = [(_mean_loss(trial, unseen), _mean_loss(trial, seen)) for trial in trials]
    logs = [math.log(above / below) for above, below in pairs if above and below]
    if not logs:
        return None
    found = estimate_mean(logs)
    if found is None:
        return Interval(value=math.exp(logs[0]))
    ends = Estimate(value=math.exp(found.value), low=math.exp(found.low), high=math.exp(found.high))
    return to_interval(ends)


def _mean_loss(trial: MatrixTrial, groups: Sequence[Sequence[Column]]) -> float:
    """0 for a policy without a loss."""
    by_place = [
        np.mean([score.loss if (score := _find(trial, column).recorded) else 0 for column in group])
        for group in groups
    ]
    return float(np.mean(by_place))


def _find(trial: MatrixTrial, column: Column) -> PairScore:
    return next(
        score for score in trial.pairs if (score.task, score.place) == (column.task, column.place)
    )


def _arm_error(score: SetScore) -> float:
    """Degrees; the gripper, which has other units, is left out."""
    errors = score.metrics.action_error
    return float(np.mean([e for joint, e in errors.items() if not joint.startswith("gripper")]))


def _mean_errors(scores: Sequence[SetScore]) -> dict[str, float]:
    errors = [score.metrics.action_error for score in scores]
    return {joint: float(np.mean([one[joint] for one in errors])) for joint in errors[0]}


def _mean(values: Sequence[float]) -> Interval:
    found = mean_of(values)
    assert found is not None, "a row has a seed"
    return found


def _to_open_interval(score: Estimate) -> Interval:
    return Interval(
        value=score.value, low=score.low, high=score.high if math.isfinite(score.high) else None
    )


def _build_sentences(columns: Sequence[Column]) -> list[str]:
    """Which pairs nobody has trained on, and what cannot be said therefore."""
    sentences = []
    for unseen in UNSEEN:
        found = [f"{colour_of(c.task)} {c.place}" for c in columns if c.trained_on == unseen]
        places = find_places(columns, unseen)
        what = TITLES[unseen]
        if not found:
            sentences.append(f"No generalisation score for {what}: there are none.")
        elif not places:
            sentences.append(
                f"No generalisation score for {what} ({', '.join(found)}): no owner has trained on "
                "the whole of any of these places."
            )
        else:
            sentences.append(f"Score for {what} ({', '.join(found)}), at {', '.join(places)}.")
    return sentences
