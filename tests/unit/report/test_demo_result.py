from collections.abc import Callable
from html.parser import HTMLParser

import pytest

from zk0bot.report.demo import (
    DemoResult,
    Film,
    ModelResult,
    build_home_sentence,
    build_summary,
    build_table,
    judge_demo,
    ordered,
)
from zk0bot.report.page import build_page

BuildModel = Callable[..., ModelResult]
BuildResults = Callable[..., dict[str, ModelResult]]
BuildResult = Callable[[dict[str, ModelResult]], DemoResult]


def test_parts_of_the_table_add_up(build_model: BuildModel) -> None:
    model = build_model(1, 2, 3)
    assert (model.successes, model.episodes) == (6, 120)


def test_separated_from_everyone_is_completed_and_says_by_how_much(
    build_results: BuildResults,
) -> None:
    judgement = judge_demo(build_results(), run_state="completed", run_reasons=[])

    assert judgement.state == "completed"
    assert "Federated 92 [85-95] is above red alone 53 [44-62]." in judgement.reasons


def test_an_overlapping_interval_is_a_warning(
    build_model: BuildModel, build_results: BuildResults
) -> None:
    results = build_results(local_red=build_model(36, 36, 32))
    judgement = judge_demo(results, run_state="completed", run_reasons=[])

    assert judgement.state == "completed-with-warnings"
    assert any("not separated from red alone" in reason for reason in judgement.reasons)


@pytest.mark.parametrize("successes", [(36, 38, 36), (40, 40, 40)])
def test_a_rival_that_is_as_good_or_better_fails(
    successes: tuple[int, int, int], build_model: BuildModel, build_results: BuildResults
) -> None:
    results = build_results(local_green=build_model(*successes))
    assert judge_demo(results, run_state="completed", run_reasons=[]).state == "failed"


def test_a_failed_run_is_never_completed_whatever_the_figures(build_results: BuildResults) -> None:
    judgement = judge_demo(build_results(), run_state="failed", run_reasons=["no quorum"])

    assert judgement.state == "failed"
    assert judgement.reasons == ["the run ended as failed", "no quorum"]


def test_warnings_of_the_run_stay_visible(build_results: BuildResults) -> None:
    judgement = judge_demo(
        build_results(), run_state="completed-with-warnings", run_reasons=["round 2: lost blue"]
    )
    assert judgement.state == "completed-with-warnings"
    assert judgement.reasons[0] == "round 2: lost blue"


def test_without_owners_alone_the_gain_is_not_claimed(
    build_results: BuildResults, build_result: BuildResult
) -> None:
    results = {name: r for name, r in build_results().items() if not name.startswith("local")}
    judgement = judge_demo(results, run_state="completed", run_reasons=[])

    assert judgement.state == "completed-with-warnings"
    assert "not measured" in judgement.reasons[0]
    assert build_home_sentence(build_result(results)) == ""


def test_the_sentence_about_specialists_follows_the_figures(
    build_model: BuildModel, build_results: BuildResults, build_result: BuildResult
) -> None:
    worse = build_results(federated=build_model(30, 30, 30))
    better = build_results(federated=build_model(40, 40, 40))
    equal = build_results(federated=build_model(39, 39, 39))

    assert build_home_sentence(build_result(worse)) == (
        "In its own part of the table a specialist is still better: "
        "98 [93-99] alone, 75 [67-82] federated."
    )
    assert build_home_sentence(build_result(better)).startswith("Not even in its own part")
    assert "exactly as good" in build_home_sentence(build_result(equal))


def test_the_table_fits_a_terminal_and_marks_homes(
    build_model: BuildModel, build_results: BuildResults, build_result: BuildResult
) -> None:
    table = build_table(build_result(build_results(local_red=build_model(40, 40, 40))))

    assert max(map(len, table.splitlines())) <= 80
    assert "red alone       100 [91-100]* 100 [91-100]" in table
    assert table.splitlines()[-1].split() == [
        "federated", "90", "[77-96]", "95", "[83-99]", "90", "[77-96]", "92", "[85-95]", "0.120",
    ]  # fmt: skip


def test_views_keep_one_order(build_results: BuildResults) -> None:
    names = [name for name, _ in ordered(build_results())]
    assert names[0] == "untrained"
    assert names[-1] == "federated"


def test_the_summary_gives_measured_bytes(
    build_results: BuildResults, build_result: BuildResult
) -> None:
    assert any("72.6 MB" in line for line in build_summary(build_result(build_results())))


class Nesting(HTMLParser):
    """Raises AssertionError when an element is closed that is not the open one."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_with_and_without_films(
    build_result: BuildResult, build_results: BuildResults
) -> None:
    result = build_result(build_results())
    film = Film(path="a.mp4", caption="red alone")
    for films in ([], [film, film]):
        page = build_page(result.model_copy(update={"films": films}), chart_png=b"")
        nesting = Nesting()
        nesting.feed(page)
        assert nesting.open == []
        assert page.count("<video") == len(films)


def test_the_page_escapes_everything_and_fetches_nothing(
    build_results: BuildResults, build_result: BuildResult
) -> None:
    result = build_result(build_results()).model_copy(
        update={
            "reasons": ["<script>alert(1)</script>"],
            "films": [Film(path='evaluate/a b"/<x>.mp4', caption="<img src=x>")],
            "files": {"<b>": "<i>"},
        }
    )
    page = build_page(result, chart_png=b"\x89PNG")

    for raw in ("<script", "<img src=x", '"/<x>', "<b></b>", "<i>", "http"):
        assert raw not in page
    assert 'src="evaluate/a%20b%22/%3Cx%3E.mp4"' in page
    assert "data:image/png;base64,iVBORw==" in page
