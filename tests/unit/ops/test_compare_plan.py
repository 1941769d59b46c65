import hashlib
import json

import pytest

from zk0bot.config.experiment import Experiment, load_experiment
from zk0bot.errors import ConfigError
from zk0bot.ops.compare_plan import (
    Demand,
    Supply,
    build_clients,
    choose_left,
    default_output,
    estimate,
    list_cells,
    refuse_what_does_not_fit,
)
from zk0bot.report.cell import Cell, CellSpec
from zk0bot.sim.pairs import PAIRS
from zk0bot.sim.spec import parse_sim_uri
from zk0bot.sim.tasks import EVALUATION_SEED, TUNING_SEED
from zk0bot.version import __version__

SUPPLY = Supply(memory_gib=16, disk_gib=50, cores=2)


@pytest.fixture
def experiment() -> Experiment:
    return load_experiment("smoke", seeds="0-1")


def cells_of(experiment: Experiment, row: str) -> list[CellSpec]:
    return [spec for spec in list_cells(experiment) if spec.row == row]


def test_every_row_has_a_cell_for_each_seed_but_what_knows_none(experiment: Experiment) -> None:
    rows = [(spec.row, spec.seed) for spec in list_cells(experiment)]
    assert rows[:7] == [
        ("mean-trajectory", 0), ("untrained", 0), ("alone/red", 0), ("alone/blue", 0),
        ("centralised", 0), ("fedavg", 0), ("fedavgm", 0),
    ]  # fmt: skip
    assert rows[7:] == [(row, 1) for row, _ in rows[1:7]]
    assert len({spec.key for spec in list_cells(experiment)}) == len(rows)


def test_all_take_the_same_steps_and_are_tried_alike(experiment: Experiment) -> None:
    specs = list_cells(experiment)
    assert {spec.steps for spec in specs if spec.row not in ("mean-trajectory", "untrained")} == {6}
    assert {(spec.scenes_per_sector, spec.first_scene) for spec in specs} == {(1, EVALUATION_SEED)}
    assert len({tuple(spec.eval_datasets) for spec in specs}) == 1
    (run,) = {spec.run.eval_datasets for spec in specs if spec.kind == "federated"}
    assert list(run) == specs[0].eval_datasets


def test_the_pool_holds_every_owners_data_and_one_alone_its_own(experiment: Experiment) -> None:
    central, alone = cells_of(experiment, "centralised")[1], cells_of(experiment, "alone/red")[1]
    uri = "sim:touch-red?sector=wide&episodes=16&seed=1"
    assert alone.datasets == {"red": uri}
    assert central.datasets["red"] == uri
    assert set(central.datasets) == {"red", "blue"}
    clients = build_clients(experiment, 1)
    assert {name: config.dataset_uri for name, config in clients.items()} == central.datasets


def test_more_steps_in_one_place_are_those_of_all_owners(experiment: Experiment) -> None:
    long = experiment.model_copy(update={"baselines": ("centralised-long",)})
    assert {spec.steps for spec in cells_of(long, "centralised-long")} == {12}


def measuring_sets(experiment: Experiment) -> set[str]:
    return {
        uri
        for spec in list_cells(experiment)
        for uri in (*spec.eval_datasets, *(spec.matrix.sets if spec.matrix else ()))
    }


def test_settings_are_tuned_on_other_scenes(experiment: Experiment) -> None:
    reported = experiment.model_copy(update={"matrix": True})
    tuning = reported.model_copy(update={"scene_set": "tuning"})
    assert {spec.first_scene for spec in list_cells(tuning)} == {TUNING_SEED}
    assert measuring_sets(tuning).isdisjoint(measuring_sets(reported))
    for spec in list_cells(tuning):
        assert spec.matrix is not None
        assert set(spec.eval_datasets) < set(spec.matrix.sets)


def test_a_changed_setting_makes_its_own_cells_anew_and_no_others(experiment: Experiment) -> None:
    slower = experiment.settings["fedavg"].model_copy(update={"initial_lr": 1e-3})
    changed = experiment.model_copy(update={"settings": experiment.settings | {"fedavg": slower}})
    before = {spec.key for spec in list_cells(experiment)}
    anew = [spec for spec in list_cells(changed) if spec.key not in before]
    assert [(spec.row, spec.seed) for spec in anew] == [("fedavg", 0), ("fedavg", 1)]


def test_how_often_a_run_is_evaluated_makes_no_other_policy_anew(experiment: Experiment) -> None:
    rarely = experiment.run.model_copy(update={"eval_frequency": 2})
    changed = experiment.model_copy(update={"run": rarely})
    assert cells_of(changed, "centralised") == cells_of(experiment, "centralised")


def test_a_matrix_makes_cells_anew_and_without_one_they_are_what_they_were(
    experiment: Experiment,
) -> None:
    plain = experiment.model_copy(update={"matrix": False})
    with_matrix = experiment.model_copy(update={"matrix": True})
    keys = [{spec.key for spec in list_cells(part)} for part in (plain, with_matrix)]
    assert keys[0].isdisjoint(keys[1])
    spec = list_cells(plain)[0]
    content = spec.model_dump(mode="json", exclude={"matrix"}) | {"version": __version__}
    content["run"].pop("output_dir")
    text = json.dumps(content, sort_keys=True)
    assert spec.key == hashlib.sha256(text.encode()).hexdigest()[:16]
    times = [estimate(list_cells(part), 2, 2).time_s for part in (plain, with_matrix)]
    assert times[0] < times[1]


def test_every_policy_meets_all_owners_and_all_pairs(experiment: Experiment) -> None:
    with_matrix = experiment.model_copy(update={"matrix": True})
    alone, central = (cells_of(with_matrix, row)[1] for row in ("alone/red", "centralised"))
    assert alone.matrix == central.matrix
    assert alone.matrix is not None
    assert alone.matrix.owners == central.datasets
    assert {parse_sim_uri(uri).seed for uri in alone.matrix.owners.values()} == {1}
    pairs = [(spec.task.name, spec.sector) for spec in map(parse_sim_uri, alone.matrix.sets)]
    assert pairs == [(pair.task.name, pair.place) for pair in PAIRS]
    assert set(alone.eval_datasets) < set(alone.matrix.sets)


def test_what_is_done_is_not_done_again_and_what_failed_only_when_asked(
    experiment: Experiment,
) -> None:
    done, failed, *rest = list_cells(experiment)
    cells = {
        done.key: Cell(spec=done, state="done"),
        failed.key: Cell(spec=failed, state="failed", reason="no quorum"),
    }
    assert choose_left([done, failed, *rest], cells, again=False) == rest
    assert choose_left([done, failed, *rest], cells, again=True) == [failed, *rest]


def test_an_estimate_grows_with_the_work(experiment: Experiment) -> None:
    specs = list_cells(experiment)
    part, whole = (estimate(cells, 2, 2) for cells in (specs[:3], specs))
    assert part.time_s < whole.time_s
    assert part.memory_gib < whole.memory_gib
    assert estimate([], 2, 2).time_s == 0


@pytest.mark.parametrize(
    ("demand", "message"),
    [
        (Demand(memory_gib=20, disk_gib=1, time_s=60), "20.0 GiB of memory, 16.0 are free"),
        (Demand(memory_gib=2, disk_gib=60, time_s=60), "60.0 GiB of disk, 50.0 are free"),
        (Demand(memory_gib=2, disk_gib=1, time_s=36_000), "about 10.0 hours"),
    ],
)
def test_what_does_not_fit_is_refused(demand: Demand, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        refuse_what_does_not_fit(demand, SUPPLY, most_hours=1, is_agreed=False)


def test_hours_of_work_can_be_agreed_to_but_no_missing_memory() -> None:
    long = Demand(memory_gib=2, disk_gib=1, time_s=36_000)
    refuse_what_does_not_fit(long, SUPPLY, most_hours=1, is_agreed=True)
    with pytest.raises(ConfigError, match="memory"):
        refuse_what_does_not_fit(
            Demand(memory_gib=20, disk_gib=1, time_s=1), SUPPLY, most_hours=1, is_agreed=True
        )


def test_results_go_where_the_same_command_finds_them_again(experiment: Experiment) -> None:
    assert str(default_output(experiment)) == "outputs/compare-smoke"


@pytest.mark.parametrize("name", ["rules", "codecs", "rounds"])
def test_shipped_experiments_share_the_cells_they_have_in_common(name: str) -> None:
    done = {spec.key for spec in list_cells(load_experiment("strategies"))}
    experiment = load_experiment(name)
    shared = {spec.row for spec in list_cells(experiment) if spec.key in done}
    assert {experiment.reference, "untrained"} <= shared
