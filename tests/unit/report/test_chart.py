import math
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from zk0bot.errors import DataError
from zk0bot.files import write_json
from zk0bot.report.__main__ import main
from zk0bot.report.chart import BLUE, draw_demo, draw_policy_loss, draw_round_metrics
from zk0bot.report.demo import DemoResult, ModelResult
from zk0bot.report.history import (
    RoundMetrics,
    load_policy_losses,
    load_round_metrics,
    to_policy_loss_history,
)

BuildResults = Callable[..., dict[str, ModelResult]]
BuildResult = Callable[[dict[str, ModelResult]], DemoResult]


def count_pixels(path: Path, colour: str) -> int:
    wanted = tuple(bytes.fromhex(colour.removeprefix("#")))
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = image.convert("RGB")
        return sum(
            n
            for n, found in pixels.getcolors(pixels.width * pixels.height) or []
            if found == wanted
        )


def build_metrics(number: int) -> RoundMetrics:
    return RoundMetrics(
        round=number, num_clients=3, avg_policy_loss=2 / number, avg_client_loss=2 / number,
        param_update_norm=0.5,
    )  # fmt: skip


def test_better_federated_success_makes_longer_blue_bars(
    tmp_path: Path, build_results: BuildResults, build_result: BuildResult
) -> None:
    good = build_result(build_results())
    bad = build_result(build_results(federated=good.results["untrained"]))
    draw_demo(tmp_path / "good.png", good)
    draw_demo(tmp_path / "bad.png", bad)

    assert count_pixels(tmp_path / "good.png", BLUE) > 5 * count_pixels(tmp_path / "bad.png", BLUE)


@pytest.mark.parametrize("rounds", [0, 1, 12])
def test_round_charts_draw_from_the_first_round_on(tmp_path: Path, rounds: int) -> None:
    path = tmp_path / "server" / "federated_metrics.png"
    draw_round_metrics(path, [build_metrics(n) for n in range(1, rounds + 1)])

    assert (count_pixels(path, BLUE) > 0) == (rounds > 0)


@pytest.mark.parametrize("losses", [{}, {0: 1.0}, {0: 2.4, 5: math.nan, 10: 0.1}])
def test_a_loss_curve_draws_whatever_was_measured(tmp_path: Path, losses: dict[int, float]) -> None:
    draw_policy_loss(tmp_path / "loss.png", losses)

    assert (count_pixels(tmp_path / "loss.png", BLUE) > 0) == bool(losses)
    assert [entry.name for entry in tmp_path.iterdir()] == ["loss.png"]


def test_history_files_read_back_and_name_the_damaged_one(tmp_path: Path) -> None:
    path = tmp_path / "policy_loss_history.json"
    write_json(path, to_policy_loss_history({10: 0.5, 0: 2.0}))
    assert list(load_policy_losses(path).items()) == [(0, 2.0), (10, 0.5)]

    metrics = tmp_path / "federated_metrics.json"
    write_json(metrics, [build_metrics(2).model_dump(), build_metrics(1).model_dump()])
    assert [entry.round for entry in load_round_metrics(metrics)] == [1, 2]
    write_json(metrics, [{"round": 1}])
    with pytest.raises(DataError, match="federated_metrics"):
        load_round_metrics(metrics)


def test_the_command_turns_a_result_into_chart_and_page(
    tmp_path: Path, build_results: BuildResults, build_result: BuildResult
) -> None:
    write_json(tmp_path / "demo.json", build_result(build_results()))

    main([str(tmp_path)])

    assert count_pixels(tmp_path / "demo.png", BLUE) > 0
    assert "red alone" in (tmp_path / "report.html").read_text()
