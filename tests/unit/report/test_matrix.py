"""The matrix and its scores, from cells."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from zk0bot.config.models import RunConfig
from zk0bot.report.cell import (
    Cell,
    CellKind,
    CellSpec,
    MatrixSpec,
    MatrixTrial,
    PairScore,
    SetMetrics,
    SetScore,
    Trial,
)
from zk0bot.report.interval import build_rate
from zk0bot.report.matrix import Matrix, MatrixRow, build_matrix, find_places
from zk0bot.report.matrix_chart import draw_matrix
from zk0bot.report.matrix_text import build_matrix_markdown, build_matrix_tables, describe_score
from zk0bot.sim.pairs import PAIRS

OVERLAPPING = {c: f"sim:touch-{c}?sector=wide&seed=0" for c in ("red", "green", "blue")}
DISJOINT = {c: f"sim:touch-{c}?sector=third&seed=0" for c in ("red", "green", "blue")}
TWO = {c: OVERLAPPING[c] for c in ("red", "blue")}
SCENES = 20
Share = Callable[[str, str], float]


def build_score(loss: float, degrees: float) -> SetScore:
    errors = {"shoulder_pan.pos": degrees, "elbow_flex.pos": 3 * degrees, "gripper.pos": 50.0}
    return SetScore(
        dataset_name="sim:touch-red", evaldata_id=0, loss=loss, num_examples=200,
        metrics=SetMetrics(action_error=errors, action_error_by_step=[degrees]),
    )  # fmt: skip


def build_trial(owners: dict[str, str], share: Share, *, has_loss: bool) -> MatrixTrial:
    pairs = []
    for pair in PAIRS:
        rate = share(pair.task.colour, pair.place.name)
        loss = 0.1 if rate > 0.5 else 0.3
        pairs.append(
            PairScore(
                task=pair.task.name,
                place=pair.place.name,
                outcomes=[bool(won) for won in np.arange(SCENES) < rate * SCENES],
                recorded=build_score(loss, 2.0) if has_loss else None,
            )
        )
    heldout = {name: build_score(0.2, 1.5) for name in owners} if has_loss else {}
    return MatrixTrial(heldout=heldout, pairs=pairs)


def build_cells(
    owners: dict[str, str], rows: dict[str, tuple[CellKind, Share]], seeds: int = 3
) -> tuple[list[CellSpec], dict[str, Cell]]:
    specs, cells = [], {}
    for name, (kind, share) in rows.items():
        for seed in range(seeds):
            spec = CellSpec(
                row=name, kind=kind, seed=seed, run=RunConfig(), eval_datasets=[], first_scene=0,
                scenes_per_sector=SCENES, matrix=MatrixSpec(owners=owners, sets=[]),
            )  # fmt: skip
            matrix = build_trial(owners, share, has_loss=kind != "mean-trajectory")
            trial = Trial(outcomes={}, matrix=matrix)
            specs.append(spec)
            cells[spec.key] = Cell(spec=spec, state="done", trial=trial)
    return specs, cells


def half_as_good(colour: str, place: str) -> float:
    """At home 80 %, elsewhere 40 %, where nobody has trained at the side 30 %."""
    home = {"red": "left", "green": "middle", "blue": "right"}[colour]
    far = {("red", "right"), ("blue", "left")}
    return 0.8 if place == home else 0.3 if (colour, place) in far else 0.4


def build(owners: dict[str, str], share: Share = half_as_good, seeds: int = 3) -> Matrix:
    specs, cells = build_cells(owners, {"federated": ("federated", share)}, seeds)
    found = build_matrix(specs, cells)
    assert found is not None
    return found


@pytest.fixture
def full() -> Matrix:
    rows: dict[str, tuple[CellKind, Share]] = {
        "mean-per-task": ("mean-trajectory", lambda colour, place: 0.1),
        "alone/red": ("alone", lambda colour, place: float(colour == "red" and place == "left")),
        "a-name-of-17-char": ("federated", half_as_good),
        "never": ("federated", lambda colour, place: 0.0),
    }
    found = build_matrix(*build_cells(OVERLAPPING, rows))
    assert found is not None
    return found


def row_of(matrix: Matrix, name: str) -> MatrixRow:
    return next(row for row in matrix.rows if row.name == name)


def test_the_score_is_success_unseen_over_success_seen_at_the_same_places() -> None:
    found = build(OVERLAPPING).rows[0].generalisation["unseen-pair"]
    assert found.places == ["left", "right"]
    assert (found.seen.value, found.unseen.value) == pytest.approx((0.8, 0.3))
    score = found.generalisation_score
    assert score is not None
    assert score.low is not None
    assert score.high is not None
    assert score.value == pytest.approx(0.375)
    assert 0.1 < score.low < 0.375 < score.high < 0.8
    assert describe_score(found).startswith("0.37 [0.22-0.6")


def test_two_unseen_colours_at_one_place_are_averaged() -> None:
    abroad = {"red": 0.1, "green": 0.3, "blue": 0.5}
    home = {"red": "left", "green": "middle", "blue": "right"}
    matrix = build(DISJOINT, lambda c, place: 0.8 if home[c] == place else abroad[c])
    found = matrix.rows[0].generalisation["unseen-pair"]
    assert found.places == ["left", "middle", "right"]
    assert found.unseen.value == pytest.approx((0.4 + 0.3 + 0.2) / 3)
    assert found.seen.value == pytest.approx(0.8)


def test_a_task_without_an_owner_has_a_score_of_its_own() -> None:
    matrix = build(TWO)
    found = matrix.rows[0].generalisation["unseen-task"]
    assert found.places == ["left", "right"]  # nobody has trained on the whole of the middle
    assert found.unseen.value == pytest.approx(0.4)
    assert matrix.rows[0].generalisation["unseen-pair"].unseen.value == pytest.approx(0.3)


def test_the_loss_ratio_is_the_geometric_mean_over_the_seeds() -> None:
    specs, cells = build_cells(OVERLAPPING, {"federated": ("federated", half_as_good)}, 2)
    first = cells[specs[0].key]
    assert first.trial is not None
    assert first.trial.matrix is not None
    pairs = [
        pair.model_copy(update={"recorded": build_score(0.9 if n in (2, 6) else 0.1, 1.0)})
        for n, pair in enumerate(first.trial.matrix.pairs)
    ]
    matrix = first.trial.matrix.model_copy(update={"pairs": pairs})
    trial = first.trial.model_copy(update={"matrix": matrix})
    cells[specs[0].key] = first.model_copy(update={"trial": trial})
    found = build_matrix(specs, cells)
    assert found is not None
    ratio = found.rows[0].generalisation["unseen-pair"].loss_ratio
    assert ratio is not None
    assert ratio.value == pytest.approx(math.sqrt(9 * 3))
    assert ratio.low is not None
    assert ratio.high is not None
    assert math.sqrt(ratio.low * ratio.high) == pytest.approx(ratio.value)


def test_where_nothing_is_unseen_there_is_no_score_and_the_report_says_so() -> None:
    everywhere = {
        f"{c}-{p}": f"sim:touch-{c}?sector={p}"
        for c in ("red", "green", "blue")
        for p in ("left", "middle", "right")
    }
    matrix = build(everywhere)
    assert matrix.rows[0].generalisation == {}
    assert {c.trained_on for c in matrix.columns} == {"seen"}
    assert matrix.sentences == [
        "No generalisation score for places where no owner has the task's colour: there are none.",
        "No generalisation score for tasks that no owner has: there are none.",
    ]
    assert "Generalisation" not in "".join(build_matrix_tables(matrix))


def test_places_that_nobody_has_whole_give_no_score() -> None:
    matrix = build({"green": "sim:touch-green?sector=wide-right"})
    assert find_places(matrix.columns, "unseen-pair") == []
    assert "no owner has trained on the whole of any of these places" in matrix.sentences[0]


def test_success_has_an_interval_that_counts_scenes_once_where_seeds_agree() -> None:
    scores = build(OVERLAPPING).rows[0].tasks
    red_left = scores[0]
    assert (red_left.task, red_left.place, red_left.num_scenes) == ("touch-red", "left", SCENES)
    plain = build_rate(16, SCENES)
    assert red_left.success.low == pytest.approx(plain.low, abs=0.03)
    assert red_left.success.high == pytest.approx(plain.high, abs=0.03)


def test_errors_are_degrees_of_the_arm_without_the_gripper() -> None:
    (red, *_) = build(OVERLAPPING).rows[0].heldout
    assert (red.client_id, red.arm_error.value) == ("red", 3.0)
    assert red.loss.value == pytest.approx(0.2)
    assert red.metrics["action_error"]["gripper.pos"] == 50.0


def test_nothing_that_succeeds_where_it_was_trained_gives_no_score(full: Matrix) -> None:
    found = row_of(full, "never").generalisation["unseen-pair"]
    assert (found.generalisation_score, describe_score(found)) == (None, "-")
    alone = row_of(full, "alone/red").generalisation["unseen-pair"]
    assert describe_score(alone).startswith("0.00 [0.00-0.")


def test_a_policy_without_a_loss_has_success_alone(full: Matrix) -> None:
    row = row_of(full, "mean-per-task")
    assert row.heldout == []
    assert all(score.loss is score.arm_error is None for score in row.tasks)
    assert row.generalisation["unseen-pair"].loss_ratio is None


def test_seeds_that_are_missing_are_left_out() -> None:
    specs, cells = build_cells(OVERLAPPING, {"federated": ("federated", half_as_good)})
    del cells[specs[1].key]
    found = build_matrix(specs, cells)
    assert found is not None
    assert found.rows[0].seeds == [0, 2]
    empty = build_matrix(specs, {})
    assert empty is not None
    assert (empty.rows, build_matrix_tables(empty)) == ([], [])


def test_an_experiment_that_asks_for_none_has_none() -> None:
    specs, _ = build_cells(OVERLAPPING, {"federated": ("federated", half_as_good)})
    assert build_matrix([spec.model_copy(update={"matrix": None}) for spec in specs], {}) is None


def test_one_seed_has_intervals_of_success_alone() -> None:
    row = build(OVERLAPPING, seeds=1).rows[0]
    assert row.heldout[0].arm_error.low is None
    assert row.tasks[0].success.low is not None
    ratio = row.generalisation["unseen-pair"].loss_ratio
    assert ratio is not None
    assert (ratio.value, ratio.low) == (pytest.approx(3.0), None)


def lines_of(matrix: Matrix) -> Iterator[str]:
    for table in build_matrix_tables(matrix):
        yield from table.splitlines()


def test_tables_fit_the_screen_and_keep_their_columns(full: Matrix) -> None:
    lines = list(lines_of(full))
    assert max(map(len, lines)) <= 80
    (covered,) = [line for line in lines if line.startswith("trained on  ")]
    assert covered.split()[2:] == [
        "all", "part", "none", "part", "all", "part", "none", "part", "all",
    ]  # fmt: skip
    (federated,) = [line for line in lines if line.startswith("a-name-of-17-cha ")]
    assert federated.split()[1:] == ["80", "40", "30", "40", "80", "40", "30", "40", "80"]
    assert federated.index("80") + 2 == covered.index("all") + 3
    assert any("(0.200)" in line for line in lines if line.startswith("alone/red"))


def test_markdown_has_every_interval(full: Matrix) -> None:
    text = "\n".join(build_matrix_markdown(full))
    assert "red, right (none)" in text
    assert text.count("\n| alone/red |") == 4
    assert text.count("\n| mean-per-task |") == 2  # it predicts no noise
    assert "6.00±0.00; (0.100±0.000)" not in text
    assert "4.00±0.00; (0.100±0.000)" in text
    assert "4.00±0.00; 0.100±0.000" in text
    assert all(line.count("|") in (0, 5, 6, 11) for line in text.splitlines())


def test_the_heat_map_is_drawn_with_and_without_losses(tmp_path: Path, full: Matrix) -> None:
    mean = full.model_copy(update={"rows": [row_of(full, "mean-per-task")]})
    for number, matrix in enumerate((full, mean)):
        path = tmp_path / f"{number}.png"
        draw_matrix(path, matrix)
        assert path.stat().st_size > 10_000
