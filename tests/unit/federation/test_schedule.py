"""One learning-rate curve over all rounds; each node its own stream of batches."""

import pytest

from zk0bot.config.models import RunConfig
from zk0bot.federation.schedule import learning_rate, node_seed, steps_per_round


def test_rounds_continue_one_curve() -> None:
    config = RunConfig(num_server_rounds=4, local_steps=20)
    parts = [learning_rate(config, round_, 20) for round_ in (1, 2, 4)]
    assert [part.first_step for part in parts] == [0, 20, 60]
    assert {part.total_steps for part in parts} == {80}


@pytest.mark.parametrize(("epochs", "frames", "steps"), [(0, 100, 20), (1, 100, 4), (3, 33, 6)])
def test_epochs_count_instead_of_steps(epochs: int, frames: int, steps: int) -> None:
    config = RunConfig(local_steps=20, local_epochs=epochs, batch_size=32)
    assert steps_per_round(config, frames) == steps


def test_nodes_draw_different_batches_and_repeat_them() -> None:
    assert node_seed(0, "red") != node_seed(0, "green")
    assert node_seed(0, "red") != node_seed(1, "red")
    assert node_seed(7, "red") == node_seed(7, "red")
