"""Tuning on a machine where no federation starts: what was done counts, the rest is told."""

import json
from pathlib import Path

import pytest
from fake_cells import build_cell
from fake_host import Watcher, build_hostless_machine

from zk0bot.config.experiment import Experiment
from zk0bot.config.load import Sources, load_run
from zk0bot.config.space import DEFAULT, Space, load_space
from zk0bot.errors import ConfigError, SessionExistsError
from zk0bot.files import private_dir, try_locked
from zk0bot.ops.bench import BenchOptions
from zk0bot.ops.compare_plan import list_cells
from zk0bot.ops.machine import Machine
from zk0bot.ops.process import find_started
from zk0bot.ops.specs import helpers_dir
from zk0bot.ops.tune import read_tuning, tune
from zk0bot.ops.tune_plan import build_final, build_rung, plan_rungs
from zk0bot.report.cell import Cell, save_cell

CHOSEN = "trial-02"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return build_hostless_machine(tmp_path / "z")


@pytest.fixture
def _large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zk0bot.ops.tune.refuse_what_does_not_fit", lambda *a, **k: None)


@pytest.fixture
def space() -> Space:
    return load_space("smoke")


def save(output: Path, experiment: Experiment, losses: dict[str, float]) -> dict[Path, int]:
    """Cells of these rows, as if they had been run, with the times of their files."""
    specs = [spec for spec in list_cells(experiment) if spec.row in losses]
    for spec in specs:
        save_cell(output / "cells", build_cell(spec, loss=losses[spec.row] + 0.001 * spec.seed))
    paths = [output / "cells" / spec.file_name for spec in specs]
    return {path: path.stat().st_mtime_ns for path in paths}


def first_rung(space: Space) -> Experiment:
    return build_rung(space, plan_rungs(space)[0], list(space.candidates), number=1)


@pytest.mark.usefixtures("_large_machine")
def test_what_a_rung_has_chosen_is_tried_again_on_other_scenes(
    machine: Machine, space: Space, tmp_path: Path
) -> None:
    output, watcher = tmp_path / "out", Watcher()
    done = save(output, first_rung(space), {DEFAULT: 0.3, "trial-01": 0.4, CHOSEN: 0.2})

    result = tune(machine, space, BenchOptions(output=output), watcher)

    assert (result.winner, result.verdict, result.is_complete) == (CHOSEN, "unfinished", False)
    assert {(m.row, m.seed) for m in result.missing} == {
        (row, seed) for row in (DEFAULT, CHOSEN) for seed in (0, 1)
    }
    assert all("tmux has gone fishing" in m.reason for m in result.missing)
    assert watcher.lines[1] == "smoke, fresh scenes: trial-02; 2 rounds, seeds 0, 1"
    assert {path: path.stat().st_mtime_ns for path in done} == done, "done once, never again"
    assert find_started(helpers_dir(machine.paths)) == []


@pytest.mark.usefixtures("_large_machine")
def test_a_rung_that_was_interrupted_is_finished_first(
    machine: Machine, space: Space, tmp_path: Path
) -> None:
    output, watcher = tmp_path / "out", Watcher()
    save(output, first_rung(space), {DEFAULT: 0.3, CHOSEN: 0.2})

    result = tune(machine, space, BenchOptions(output=output), watcher)

    assert "1 of 3 cells to do" in watcher.lines[2]
    assert result.winner == CHOSEN, "the trial that did not start goes no further"
    assert "Out because a run failed (--again tries anew): trial-01." in result.sentences


@pytest.mark.usefixtures("_large_machine")
def test_what_failed_is_left_alone_unless_asked_for_again(
    machine: Machine, space: Space, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    for spec in list_cells(first_rung(space)):
        save_cell(output / "cells", Cell(spec=spec, state="failed", reason="no quorum"))

    result = tune(machine, space, BenchOptions(output=output), Watcher())
    assert {m.reason for m in result.missing} == {"no quorum"}
    assert result.sentences[0] == "The default itself has failed: without it nothing can be judged."
    result = tune(machine, space, BenchOptions(output=output, again=True), Watcher())
    assert all("tmux has gone fishing" in m.reason for m in result.missing)


def test_a_finished_tuning_starts_nothing_and_says_what_to_copy(
    machine: Machine, space: Space, tmp_path: Path
) -> None:
    output, watcher = tmp_path / "out", Watcher()
    save(output, first_rung(space), {DEFAULT: 0.3, "trial-01": 0.4, CHOSEN: 0.2})
    save(output, build_final(space, CHOSEN), {DEFAULT: 0.31, CHOSEN: 0.25})

    result = tune(machine, space, BenchOptions(output=output), watcher)

    assert watcher.lines == []
    assert (result.verdict, result.settings) == ("better", {"initial-lr": 0.002})
    assert json.loads((output / "tuning.json").read_text())["winner"] == CHOSEN
    assert "| trial-02 |" in (output / "tuning.md").read_text()
    assert (output / "tuning.png").stat().st_size > 10_000
    best = load_run(Sources(file=output / "best.toml"), env={}).config
    owners = {"min_fit_clients": best.min_fit_clients}
    assert best == space.candidates[CHOSEN].run.model_copy(update=owners)


def test_settings_of_an_earlier_winner_do_not_stay(
    machine: Machine, space: Space, tmp_path: Path
) -> None:
    (tmp_path / "best.toml").write_text("[run]\n")
    save(tmp_path, first_rung(space), {DEFAULT: 0.1, "trial-01": 0.4, CHOSEN: 0.2})
    result = read_tuning(machine, space, tmp_path)
    assert (result.verdict, result.settings) == ("default", {})
    assert not (tmp_path / "best.toml").exists()


def test_hours_of_work_are_refused_before_anything_starts(machine: Machine, tmp_path: Path) -> None:
    watcher = Watcher()
    options = BenchOptions(output=tmp_path / "out")
    with pytest.raises(ConfigError, match="the experiment takes about"):
        tune(machine, load_space("server", seeds="0-40"), options, watcher)
    assert watcher.lines == []
    assert not machine.paths.root.exists()


@pytest.mark.usefixtures("_large_machine")
def test_tuning_and_comparisons_do_not_disturb_each_other(
    machine: Machine, space: Space, tmp_path: Path
) -> None:
    private_dir(machine.paths.root)
    with (
        try_locked(machine.paths.root / "compare.lock"),
        pytest.raises(SessionExistsError, match="a comparison or tuning runs already"),
    ):
        tune(machine, space, BenchOptions(output=tmp_path / "out"), Watcher())
