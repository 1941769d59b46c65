import math

import pytest

from zk0bot.records import Verdict
from zk0bot.report.verdict import RoundOutcome, find_best_round, judge


def build_outcome(number: int, **changes: object) -> RoundOutcome:
    values: dict[str, object] = {
        "round": number, "accepted": 3, "asked": 3, "update_norm": 0.5, "finite": True,
    }  # fmt: skip
    return RoundOutcome(**(values | changes))  # type: ignore[arg-type]


def judged(
    outcomes: list[RoundOutcome], *, losses: dict[int, float] | None = None, planned: int = 2
) -> Verdict:
    return judge(
        outcomes,
        planned_rounds=planned,
        min_clients=2,
        worse_margin=0.02,
        losses={0: 2.0, 2: 0.1} if losses is None else losses,
    )


def test_a_clean_run_is_completed_without_reasons() -> None:
    verdict = judged([build_outcome(1), build_outcome(2)])

    assert verdict == Verdict(
        state="completed", reasons=[], initial_loss=2.0, final_loss=0.1, best_round=2
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"accepted": 1}, "round 2: 1 updates accepted, 2 needed"),
        ({"update_norm": 0.0}, "round 2: the model did not move"),
        ({"finite": False}, "round 2: the model is not finite"),
        ({"update_norm": math.nan}, "round 2: the model is not finite"),
    ],
)
def test_one_bad_round_fails_the_run(changes: dict[str, object], reason: str) -> None:
    verdict = judged([build_outcome(1), build_outcome(2, **changes)])

    assert verdict.state == "failed"
    assert verdict.reasons[0] == reason


def test_a_run_without_any_round_is_not_completed() -> None:
    verdict = judged([], losses={0: 2.0})

    assert verdict.state == "failed"
    assert verdict.reasons[0] == "0 of 2 rounds done; missing: 1, 2"
    assert verdict.final_loss is None


def test_a_loss_above_round_zero_fails_beyond_the_margin_and_warns_within_it() -> None:
    rounds = [build_outcome(1), build_outcome(2)]

    assert judged(rounds, losses={0: 1.0, 2: 1.03}).state == "failed"
    assert judged(rounds, losses={0: 1.0, 2: 1.01}).state == "completed-with-warnings"
    assert judged(rounds, losses={0: 1.0, 2: 0.99}).state == "completed"


def test_a_loss_that_is_not_finite_fails_and_is_not_reported_as_a_number() -> None:
    verdict = judged([build_outcome(1), build_outcome(2)], losses={0: 1.0, 2: math.nan})

    assert verdict.state == "failed"
    assert verdict.reasons == ["round 2: the held-out loss is nan"]
    assert verdict.final_loss is None


def test_a_lost_client_above_the_quorum_is_a_warning_that_names_it() -> None:
    lost = build_outcome(2, accepted=2, failures=["blue: reply after the deadline"])
    verdict = judged([build_outcome(1), lost])

    assert verdict.state == "completed-with-warnings"
    assert verdict.reasons == ["round 2: 2 of 3 updates used: blue: reply after the deadline"]


def test_a_run_that_was_never_evaluated_carries_a_warning() -> None:
    verdict = judged([build_outcome(1), build_outcome(2)], losses={})

    assert verdict.state == "completed-with-warnings"
    assert "not measured" in verdict.reasons[0]


def test_an_earlier_round_that_was_better_is_named() -> None:
    rounds = [build_outcome(1), build_outcome(2)]
    verdict = judged(rounds, losses={0: 2.0, 1: 0.1, 2: 0.2})

    assert verdict.state == "completed-with-warnings"
    assert verdict.best_round == 1
    assert "round 1" in verdict.reasons[0]


def test_best_round_ignores_losses_that_are_not_finite() -> None:
    assert find_best_round({0: 2.0, 5: math.nan, 10: 0.5, 15: 0.5}) == 10
    assert find_best_round({}) is None
