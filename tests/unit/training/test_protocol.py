import pytest
from pydantic import ValidationError

from zk0bot.config.models import PolicyConfig
from zk0bot.training.protocol import LearningRate, PolicySpec, TrainRequest

REQUEST = TrainRequest(
    spec=PolicySpec(policy=PolicyConfig(), seed=0),
    base_hash="",
    run_id="run",
    round=1,
    weights_path="weights",
    statistics=None,
    local_steps=1,
    batch_size=8,
    learning_rate=LearningRate(
        scheduler="constant",
        initial_lr=1e-3,
        eta_min=0,
        warmup_steps=0,
        first_step=0,
        total_steps=1,
    ),
    proximal_mu=0,
    seed=0,
)


@pytest.mark.parametrize("change", [{"local_steps": 0}, {"local_epochs": 1}])
def test_an_order_says_its_steps_and_nothing_else(change: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        TrainRequest.model_validate({**REQUEST.model_dump(), **change})
