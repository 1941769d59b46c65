import threading
from pathlib import Path

import pytest

from zk0bot.config.models import RunConfig
from zk0bot.errors import TrainerError
from zk0bot.report.comparison import ComparisonPlan, ComparisonProgress, ComparisonResult
from zk0bot.training.comparison import compare
from zk0bot.training.protocol import (
    AssessRequest,
    AssessResult,
    BaselineRequest,
    DatasetLoss,
    DatasetStatistics,
    DescribeRequest,
    FeatureStatistics,
    InitRequest,
    InitResult,
    Message,
    NodeDescription,
    Request,
    SectorResult,
    TrainAloneRequest,
    TrainAloneResult,
)

OWNERS = {"local_red": "/red", "local_blue": "/blue"}


def build_statistics(mean: float, count: int) -> DatasetStatistics:
    moments = FeatureStatistics(count=count, mean=[mean], std=[1.0], min=[-9.0], max=[9.0])
    return {"observation.state": moments, "action": moments}


STATISTICS = {"/red": build_statistics(0.0, 100), "/blue": build_statistics(4.0, 300)}


class Trainers:
    """Answers as trainers do, and keeps what each was asked; ``broken`` fails."""

    def __init__(self, broken: str = "") -> None:
        self.asked: dict[str, list[Message]] = {}
        self._broken = broken
        self._lock = threading.Lock()

    def __call__[A: Message](
        self, directory: Path, request: Request, answer: type[A], /, *, deadline_s: float
    ) -> A:
        with self._lock:
            self.asked.setdefault(str(directory), []).append(request)
        if str(directory) == self._broken and not isinstance(request, DescribeRequest):
            raise TrainerError("out of memory")
        result = self._answer(str(directory), request)
        assert isinstance(result, answer)
        return result

    def _answer(self, directory: str, request: Message) -> Message:
        if isinstance(request, DescribeRequest):
            return NodeDescription(
                dataset_id="1", num_episodes=70, num_train_frames=1,
                num_heldout_frames=1, base_hash="b" * 64, statistics=STATISTICS[directory],
                device="cpu", zk0bot_version="0",
            )  # fmt: skip
        if isinstance(request, TrainAloneRequest):
            return TrainAloneResult(
                weights_path=f"{directory}/alone", statistics=STATISTICS[directory], loss=1,
                num_steps=request.steps,
            )  # fmt: skip
        if isinstance(request, InitRequest):
            return InitResult(
                weights_path="/server/init", base_hash="b", num_parameters=1, num_trainable=1
            )
        assert isinstance(request, AssessRequest | BaselineRequest)
        is_policy = isinstance(request, AssessRequest)
        losses = [
            DatasetLoss(dataset_name=uri, evaldata_id=k, loss=float(k), num_examples=1 + 2 * k)
            for k, uri in enumerate(request.datasets)
        ]
        return AssessResult(
            datasets=losses if is_policy else [],
            rollouts=[SectorResult(sector="left", successes=3, episodes=4)],
            videos=[request.rollout.video_dir]
            if request.rollout and request.rollout.videos
            else [],
        )


def build_plan(**changes: object) -> ComparisonPlan:
    run = RunConfig(num_server_rounds=3, local_steps=7, seed=5, eval_datasets=("sim:a", "sim:b"))
    values: dict[str, object] = {
        "run": run, "evaluator_dir": "/server", "owners": OWNERS, "scenes_per_sector": 4,
        "first_seed": 1_900_000,
    }  # fmt: skip
    return ComparisonPlan.model_validate(values | changes)


def compared(trainers: Trainers, **changes: object) -> ComparisonResult:
    return compare(build_plan(**changes), lambda progress: None, ask=trainers)


def test_the_federated_policy_is_tried_with_the_exact_pooled_statistics() -> None:
    trainers = Trainers()
    result = compared(trainers, federated_weights="/w", films={"federated": "/films"})

    (request,) = [r for r in trainers.asked["/server"] if isinstance(r, AssessRequest)]
    assert request.statistics["action"].mean == [3.0]
    assert request.statistics["action"].count == 400
    assert request.weights_path == "/w"
    score = result.policies["federated"]
    assert (score.per_sector["left"].successes, score.per_sector["left"].episodes) == (3, 4)
    assert score.heldout_loss == pytest.approx(0.75)
    assert score.videos == ["/films"]
    assert score.alone_s is None


def test_an_owner_alone_trains_as_long_as_in_the_run_and_keeps_its_own_statistics() -> None:
    trainers = Trainers()
    result = compared(trainers, with_alone=True)

    _, alone, tried = trainers.asked["/red"]
    assert isinstance(alone, TrainAloneRequest)
    assert alone.steps == alone.learning_rate.total_steps == 21
    assert isinstance(tried, AssessRequest)
    assert tried.weights_path == "/red/alone"
    assert tried.statistics == STATISTICS["/red"]
    assert set(result.policies) == set(OWNERS)
    assert result.policies["local_red"].alone_s is not None


def test_all_policies_meet_the_same_scenes() -> None:
    trainers = Trainers()
    result = compared(
        trainers, with_alone=True, with_baselines=True, with_untrained=True, federated_weights="/w"
    )
    rollouts = [
        request.rollout
        for requests in trainers.asked.values()
        for request in requests
        if isinstance(request, AssessRequest | BaselineRequest)
    ]

    assert len(rollouts) == 6
    assert {(r.first_seed, r.scenes_per_sector) for r in rollouts if r} == {(1_900_000, 4)}
    assert list(result.policies)[:2] == ["mean_trajectory", "mean_trajectory_per_task"]
    assert result.policies["mean_trajectory"].heldout_loss is None


def test_baselines_need_no_owner() -> None:
    trainers = Trainers()
    compared(trainers, owners={}, with_baselines=True)
    assert list(trainers.asked) == ["/server"]


def test_a_trainer_that_fails_ends_the_comparison_with_its_error() -> None:
    with pytest.raises(TrainerError, match="out of memory"):
        compared(Trainers(broken="/blue"), with_alone=True)


def test_progress_names_the_policy_and_the_step() -> None:
    said: list[ComparisonProgress] = []
    compare(build_plan(owners={"local_red": "/red"}, with_alone=True), said.append, ask=Trainers())
    assert [(p.policy, p.step) for p in said] == [
        ("local_red", "training alone"), ("local_red", "trying"), ("local_red", "done"),
    ]  # fmt: skip
