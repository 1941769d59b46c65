"""Figures of a demonstration, as the tests of its views need them."""

from collections.abc import Callable

import pytest

from zk0bot.report.demo import (
    DemoResult,
    ModelResult,
    SectorCount,
    build_model_result,
    judge_demo,
)

SECTORS = ("left", "middle", "right")
HOME = {"local_red": "left", "local_green": "middle", "local_blue": "right"}


def build_model(*successes: int, loss: float | None = None) -> ModelResult:
    counts = {
        sector: SectorCount(successes=n, episodes=40)
        for sector, n in zip(SECTORS, successes, strict=True)
    }
    return build_model_result(counts, loss)


def build_results(**changes: ModelResult) -> dict[str, ModelResult]:
    results = {
        "federated": build_model(36, 38, 36, loss=0.12),
        "untrained": build_model(0, 1, 0, loss=2.4),
        "mean_trajectory": build_model(0, 12, 0),
        "mean_trajectory_per_task": build_model(11, 10, 15),
        "local_red": build_model(40, 24, 0, loss=0.1),
        "local_green": build_model(2, 39, 17, loss=0.1),
        "local_blue": build_model(0, 23, 38, loss=0.1),
    }
    return results | changes


def build_result(results: dict[str, ModelResult]) -> DemoResult:
    judgement = judge_demo(results, run_state="completed", run_reasons=[])
    return DemoResult(
        seed=3, hard=False, rounds=20, local_steps=20, elapsed_s=280.4, phases_s={"data": 30.0},
        results=results, home=HOME, loss_curve={0: 2.4, 20: 0.12}, bytes_up=72_638_880,
        bytes_down=72_638_880, verdict=judgement.state, reasons=judgement.reasons,
    )  # fmt: skip


@pytest.fixture(name="build_model")
def _build_model() -> Callable[..., ModelResult]:
    """40 scenes in each part of the table; the arguments are the successes."""
    return build_model


@pytest.fixture(name="build_results")
def _build_results() -> Callable[..., dict[str, ModelResult]]:
    """Figures as hoped for; keyword arguments replace some."""
    return build_results


@pytest.fixture(name="build_result")
def _build_result() -> Callable[[dict[str, ModelResult]], DemoResult]:
    return build_result
