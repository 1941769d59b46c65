"""What a run looks like: plain lines, the live picture, the result."""

import io
import os

import pytest
from rich.console import Console

from zk0bot.cli.live import follow, render
from zk0bot.cli.show import Show
from zk0bot.cli.view import RunView, list_changes
from zk0bot.records import ClientProgress, RunRecord, Verdict

TRAINING = RunRecord(
    run_id="20260102-030405-abcd",
    state="running",
    phase="training",
    num_rounds=20,
    round=3,
    rounds_done=2,
    clients=[
        ClientProgress(node_id="1", name="red", phase="training", step=5, steps=20, loss=0.31251),
        ClientProgress(node_id="2", name="green", phase="failed", reason="out of memory"),
    ],
    bytes_up=2_400_000,
    bytes_down=812,
    eta_s=200.0,
    loss=0.25,
    output_dir="/out/2026",
)
FINAL = TRAINING.model_copy(
    update={
        "state": "completed-with-warnings",
        "phase": "",
        "rounds_done": 20,
        "round": 20,
        "success": 0.9,
        "clients": [],
        "verdict": Verdict(
            state="completed-with-warnings",
            reasons=["green failed in 3 rounds"],
            initial_loss=0.5,
            final_loss=0.25,
            best_round=20,
        ),
    }
)


def test_plain_lines_tell_round_and_clients() -> None:
    assert list_changes(None, TRAINING) == [
        "round 3 of 20, training, held-out loss 0.2500, 2.4 MB up, 812 B down, 3m20s left",
        "  red: training, step 5 of 20, loss 0.3125",
        "  green: failed, out of memory",
    ]


def test_plain_lines_come_only_for_what_is_new() -> None:
    red = TRAINING.clients[0]
    stepped = TRAINING.model_copy(
        update={"clients": [red.model_copy(update={"step": 6}), TRAINING.clients[1]]}
    )
    assert list_changes(TRAINING, stepped) == []
    done = red.model_copy(update={"phase": "done"})
    ended = TRAINING.model_copy(update={"clients": [done, TRAINING.clients[1]]})
    assert list_changes(stepped, ended) == ["  red: done, loss 0.3125"]


def test_the_result_says_verdict_losses_traffic_and_where() -> None:
    assert RunView(FINAL).to_text() == (
        "run 20260102-030405-abcd: completed-with-warnings\n"
        "  green failed in 3 rounds\n"
        "  held-out loss 0.5000 before round 1, 0.2500 at the end, best in round 20\n"
        "  closed-loop success 90%\n"
        "  2.4 MB up, 812 B down\n"
        "  results in /out/2026"
    )
    assert RunView(FINAL).model_dump(mode="json")["verdict"]["best_round"] == 20


def test_the_live_picture_fits_80_columns_and_shows_every_client() -> None:
    screen = io.StringIO()
    Console(file=screen, width=80, force_terminal=True, color_system=None).print(render(TRAINING))
    lines = [" ".join(line.split()) for line in screen.getvalue().splitlines()]
    assert lines == [
        "run 20260102-030405-abcd running",
        "━" * 6,  # the rest of the bar needs colour
        "round 3 of 20, training, held-out loss 0.2500, 2.4 MB up, 812 B down, 3m20s left",
        "red ━━━━ training, step 5 of 20, loss 0.3125",
        "green failed, out of memory",
    ]


def test_following_in_a_pipe_ends_with_the_final_record(capsys: object) -> None:
    assert not os.isatty(1)
    assert follow(Show(), iter([TRAINING, FINAL])) == FINAL


def test_a_growing_download_is_one_line_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    show = Show()
    for size in range(3):
        show.waiting(f"the trainer: downloading owner/name: {size} MiB")
        show.waiting(f"the trainer: downloading owner/name: {size} MiB")
    assert capsys.readouterr().err == "waiting for the trainer: downloading owner/name: 0 MiB\n"
