from pathlib import Path

import pytest
from fake_host import Watcher, build_hostless_machine

from zk0bot.config.experiment import Experiment, load_experiment
from zk0bot.errors import SessionExistsError
from zk0bot.files import private_dir, try_locked
from zk0bot.ops.bench import BenchOptions, describe_cell, describe_time
from zk0bot.ops.compare import compare
from zk0bot.ops.compare_plan import list_cells
from zk0bot.ops.machine import Machine
from zk0bot.ops.process import find_started
from zk0bot.ops.specs import helpers_dir
from zk0bot.report.cell import Cell, Trial, load_cells, save_cell


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return build_hostless_machine(tmp_path / "z")


@pytest.fixture(autouse=True)
def _large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits is tested with the plan."""
    monkeypatch.setattr("zk0bot.ops.compare.refuse_what_does_not_fit", lambda *a, **k: None)


@pytest.fixture
def experiment() -> Experiment:
    return load_experiment("smoke").model_copy(update={"baselines": (), "matrix": False})


def done_cell(experiment: Experiment) -> Cell:
    outcomes = {name: [True] for name in ("left", "middle", "right")}
    trial = Trial(outcomes=outcomes, heldout_loss=0.25)
    return Cell(spec=list_cells(experiment)[0], state="done", trial=trial)


def test_a_federation_that_does_not_start_fails_its_cells_and_leaves_nothing(
    machine: Machine, experiment: Experiment, tmp_path: Path
) -> None:
    before = done_cell(experiment)
    output = tmp_path / "out"
    save_cell(output / "cells", before)
    watcher = Watcher()

    result = compare(machine, experiment, BenchOptions(output=output), watcher)

    assert [(m.row, m.reason) for m in result.missing] == [
        ("fedavgm", "its federation does not work: tmux has gone fishing")
    ]
    assert [row.name for row in result.rows] == ["fedavg"]
    assert any("fedavgm, seed 0: failed" in line for line in watcher.lines)
    assert find_started(helpers_dir(machine.paths)) == []
    cells = load_cells(output / "cells", list_cells(experiment))
    assert sorted(cell.state for cell in cells.values()) == ["done", "failed"]


def test_what_failed_is_left_alone_unless_asked_for_again(
    machine: Machine, experiment: Experiment, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    for spec in list_cells(experiment):
        save_cell(output / "cells", Cell(spec=spec, state="failed", reason="no quorum"))
    watcher = Watcher()

    result = compare(machine, experiment, BenchOptions(output=output), watcher)
    assert (watcher.lines, len(result.missing)) == ([], 2)
    result = compare(machine, experiment, BenchOptions(output=output, again=True), watcher)
    assert {m.reason for m in result.missing} == {
        "its federation does not work: tmux has gone fishing"
    }


def test_a_second_comparison_is_refused_and_disturbs_nothing(
    machine: Machine, experiment: Experiment, tmp_path: Path
) -> None:
    private_dir(machine.paths.root)
    options = BenchOptions(output=tmp_path / "out")
    with (
        try_locked(machine.paths.root / "compare.lock"),
        pytest.raises(SessionExistsError, match="a comparison or tuning runs already"),
    ):
        compare(machine, experiment, options, Watcher())


def test_a_finished_cell_is_one_line(experiment: Experiment) -> None:
    assert describe_cell(done_cell(experiment)) == (
        "fedavg, seed 0: 3 of 3 scenes, held-out loss 0.2500"
    )


def test_times_are_rough() -> None:
    assert [describe_time(s) for s in (3, 119, 5400)] == ["less than a minute", "2 min", "1.5 h"]
