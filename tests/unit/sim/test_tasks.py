import itertools

import pytest

from zk0bot.errors import UnknownNameError
from zk0bot.sim.tasks import (
    SEEDS_PER_TASK,
    TASKS,
    evaluation_scenes,
    get_sector,
    get_task,
    training_seed,
    tuning_scenes,
)

RESERVED = {scene.seed for scene in (*evaluation_scenes(1000), *tuning_scenes(1000))}


def test_thirds_are_disjoint_and_cover_what_the_wide_sectors_cover() -> None:
    thirds = [task.third for task in TASKS]
    for left, right in itertools.pairwise(thirds):
        assert left.high == right.low
    assert thirds[0].low == min(task.wide.low for task in TASKS)
    assert thirds[-1].high == max(task.wide.high for task in TASKS)


def test_wide_sectors_are_sixty_per_cent_and_hold_their_own_third() -> None:
    whole = TASKS[-1].third.high - TASKS[0].third.low
    for task in TASKS:
        assert (task.wide.high - task.wide.low) / whole == pytest.approx(0.6)
        assert task.wide.low <= task.third.low < task.third.high <= task.wide.high


def test_evaluation_scenes_put_each_colour_into_its_own_third() -> None:
    scenes = evaluation_scenes(2)
    assert [scene.seed for scene in scenes] == [900000, 900001, 901000, 901001, 902000, 902001]
    assert all(scene.sector == scene.task.third for scene in scenes)


@pytest.mark.parametrize("task", TASKS)
def test_training_never_meets_an_evaluation_or_tuning_seed(task) -> None:
    indices = (*range(0, SEEDS_PER_TASK, 500), SEEDS_PER_TASK - 1)
    for seed in (*range(50), 123_456):
        assert RESERVED.isdisjoint(training_seed(task, seed=seed, index=i) for i in indices)


def test_evaluation_and_tuning_seeds_are_all_different() -> None:
    assert len(RESERVED) == 6000


def test_every_task_seed_and_index_has_a_seed_of_its_own() -> None:
    seeds = [
        training_seed(task, seed=seed, index=index)
        for task in TASKS
        for seed in range(4)
        for index in range(0, SEEDS_PER_TASK, 10_000)
    ]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("index", [-1, SEEDS_PER_TASK])
def test_an_index_that_would_run_into_the_next_task_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match="out of range"):
        training_seed(TASKS[0], seed=0, index=index)


def test_more_scenes_than_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="1001"):
        evaluation_scenes(1001)


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError) as caught:
        get_task("touch-rad")
    assert caught.value.hint == "did you mean 'touch-red'?"


def test_an_unknown_sector_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError) as caught:
        get_sector("wider", TASKS[0])
    assert caught.value.hint == "did you mean 'wide'?"
