import pytest
from pydantic import ValidationError

from zk0bot.config.models import PolicyConfig
from zk0bot.training.protocol import (
    FeatureStatistics,
    LearningRate,
    NodeDescription,
    PolicySpec,
    TrainRequest,
)

REQUEST = TrainRequest(
    spec=PolicySpec(policy=PolicyConfig(), seed=0),
    base_hash="b" * 64,
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


@pytest.mark.parametrize(
    "change",
    [
        {"local_steps": 10**7},
        {"batch_size": 2**20},
        {"seed": 2**64},
        {"eval_batches": 10**9},
        {"proximal_mu": float("inf")},
        {"run_id": "../../.ssh"},
        {"run_id": "r" * 100},
        {"base_hash": "\x1b[2J"},
    ],
    ids=str,
)
def test_an_order_beyond_all_measure_is_no_order(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TrainRequest.model_validate({**REQUEST.model_dump(), **change})


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": 10**5},
        {"chunk_size": 10**6},
        {"state_dim": 10**6},
        {"cameras": [f"c{k}" for k in range(9)]},
        {"cameras": ["../front"]},
        {"model_revision": "../../refs"},
        {"model_revision": "a" * 200},
        {"model_name": "m" * 2000},
    ],
    ids=lambda change: str(change)[:30],
)
def test_a_policy_beyond_all_measure_is_no_policy(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PolicyConfig.model_validate(change)


@pytest.mark.parametrize("revision", ["", "main", "v2.1", "refs/pr/1", "a" * 40])
def test_a_revision_has_a_hub_s_form(revision: str) -> None:
    assert PolicyConfig(model_revision=revision).model_revision == revision


@pytest.mark.parametrize(
    "change",
    [
        {"mean": [float("nan")]},
        {"max": [float("inf")]},
        {"min": [-1e300]},
        {"std": [-1.0]},
        {"mean": [0.0, 0.0]},
        {"mean": [], "std": [], "min": [], "max": []},
        {name: [1.0] * 1000 for name in ("mean", "std", "min", "max")},
        {"count": 0},
    ],
    ids=lambda change: str(change)[:30],
)
def test_moments_are_those_of_data(change: dict[str, object]) -> None:
    good = {"count": 1, "mean": [0.0], "std": [1.0], "min": [-1.0], "max": [1.0]}
    FeatureStatistics.model_validate(good)
    with pytest.raises(ValidationError):
        FeatureStatistics.model_validate({**good, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"device": "cpu\x1b]0;owned\x07"},
        {"zk0bot_version": "<script>alert(1)</script>"},
        {"dataset_id": "a/../b"},
        {"num_train_frames": 10**12},
        {"statistics": {f"f{'x' * k}": None for k in range(9)}},
    ],
    ids=lambda change: str(change)[:30],
)
def test_what_a_node_says_of_itself_has_a_form(change: dict[str, object]) -> None:
    good = {
        "dataset_id": "1", "num_episodes": 1, "num_train_frames": 1, "num_heldout_frames": 1,
        "base_hash": "b" * 64, "statistics": None, "device": "cpu", "zk0bot_version": "0.1.0",
    }  # fmt: skip
    NodeDescription.model_validate(good)
    with pytest.raises(ValidationError):
        NodeDescription.model_validate({**good, **change})
