import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from zk0bot.cli.app import app
from zk0bot.cli.demo_view import DemoView, build_bars
from zk0bot.cli.show import Show
from zk0bot.ops.demo import Bar
from zk0bot.records import RunRecord


def build_run(**changes: object) -> RunRecord:
    values: dict[str, object] = {
        "run_id": "r1", "state": "running", "num_rounds": 20, "rounds_done": 4, "round": 5,
        "phase": "training", "loss": 0.5, "eta_s": 61.0,
    }  # fmt: skip
    return RunRecord.model_validate(values | changes)


def test_a_number_of_owners_that_does_not_fit_is_refused_as_json(tmp_path: Path) -> None:
    arguments = ["demo", "--clients", "7", "--output", str(tmp_path), "--json"]
    result = CliRunner().invoke(app, arguments)

    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert error["code"] == "bad_config"
    assert "--clients 7" in error["message"]


def test_the_home_of_an_output_folder_is_found(home: Path) -> None:
    (home / "file").touch()
    result = CliRunner().invoke(app, ["demo", "--output=~/file/x", "--json"])

    assert result.exit_code == 2
    assert f"cannot write to {home}/file/x" in json.loads(result.stdout)["error"]["message"]


@pytest.mark.parametrize("value", ["0", "-1", "abc"])
def test_rounds_that_are_no_positive_number_are_refused(value: str) -> None:
    result = CliRunner().invoke(app, ["demo", "--rounds", value])

    assert result.exit_code == 2
    assert "--rounds" in result.stderr


def test_stop_where_nothing_runs_says_so() -> None:
    result = CliRunner().invoke(app, ["demo", "--stop"])

    assert result.exit_code == 0
    assert result.stdout == "no demonstration is running\n"


def test_in_a_pipe_there_is_a_line_for_each_change_and_no_more(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with DemoView(Show()) as view:
        view.phase("Starting")
        for done in (0, 1, 2, 20, 21, 70):
            view.bars([Bar(name="red", detail="making data", done=done, total=70)])
        view.run(build_run())
        view.run(build_run(loss=0.4))
        view.run(build_run(rounds_done=5))
    captured = capsys.readouterr()

    assert captured.out == ""
    assert captured.err.splitlines() == [
        "Starting",
        "  red: making data 0/70",
        "  red: making data 20/70",
        "  red: making data 70/70",
        "  round 5 of 20, training, held-out loss 0.5000, 0 B up, 0 B down, 1m01s left",
        "  round 5 of 20, training, held-out loss 0.5000, 0 B up, 0 B down, 1m01s left",
    ]


def test_in_a_terminal_each_owner_has_a_bar() -> None:
    console = Console(file=io.StringIO(), width=78, force_terminal=False)
    bars = [
        Bar(name="red", detail="making data", done=7, total=70),
        Bar(name="blue", detail="starting"),
    ]
    console.print(build_bars(bars))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()

    assert len(lines) == 2
    assert lines[0].split()[0] == "red"
    assert "7/70" in lines[0]
    assert lines[1].split() == ["blue", "starting"]


def test_the_live_display_leaves_the_terminal_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with DemoView(Show()) as view:
        view.phase("Starting")
        view.bars([Bar(name="red", detail="making data", done=1, total=70)])

    assert "Starting" in terminal.getvalue()
    assert terminal.getvalue().endswith(("\x1b[2K", "\x1b[?25h", "\n"))
