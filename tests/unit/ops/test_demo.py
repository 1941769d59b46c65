import dataclasses
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from fake_host import FakeHost, NoHost

from zk0bot.config.paths import Paths
from zk0bot.errors import ConfigError, ServiceError, SessionExistsError
from zk0bot.files import write_json
from zk0bot.ops.child import Child
from zk0bot.ops.demo import (
    Bar,
    build_kept_notice,
    build_result,
    demo_root,
    run_demo,
    stop_all,
    union_s,
)
from zk0bot.ops.demo_plan import DemoOptions
from zk0bot.ops.host import Pane
from zk0bot.ops.machine import Machine
from zk0bot.ops.specs import ProcessSpec, Surroundings, helper_process
from zk0bot.records import RunRecord, Verdict
from zk0bot.report.comparison import PolicyScore
from zk0bot.report.demo import SectorCount


class Silent:
    """Nobody watches."""

    def phase(self, text: str) -> None: ...

    def bars(self, bars: Sequence[Bar]) -> None: ...

    def run(self, run: RunRecord) -> None: ...


def build_machine(tmp_path: Path, host: NoHost) -> Machine:
    surroundings = Surroundings(python=Path(sys.executable), env={"PATH": os.environ["PATH"]})
    return Machine(paths=Paths(tmp_path), host=host, surroundings=surroundings, secrets={})


def build_score(*successes: int, loss: float | None = None, at: float = 0) -> PolicyScore:
    sectors = zip(("left", "middle", "right"), successes, strict=True)
    counts = {sector: SectorCount(successes=n, episodes=40) for sector, n in sectors}
    return PolicyScore(per_sector=counts, heldout_loss=loss, evaluation_s=(at, at + 1))


def build_run(folder: Path, **changes: object) -> RunRecord:
    values = {
        "run_id": "r", "state": "completed", "num_rounds": 20, "rounds_done": 20,
        "bytes_up": 70, "bytes_down": 80, "output_dir": str(folder),
        "verdict": Verdict(state="completed"),
    }  # fmt: skip
    return RunRecord.model_validate(values | changes)


def build_spec(tmp_path: Path, program: str) -> ProcessSpec:
    return ProcessSpec(
        name="helper",
        argv=(sys.executable, "-c", program),
        env={},
        cwd=tmp_path,
        log_path=tmp_path / "logs" / "helper.log",
    )


def test_overlapping_spans_count_once() -> None:
    assert union_s([(10, 12), (0, 4), (3, 5), (11, 11.5)]) == pytest.approx(7)
    assert union_s([]) == 0


def test_the_result_is_drawn_from_the_run_and_its_output_tree(tmp_path: Path) -> None:
    for client, seconds in (("red", 0.5), ("blue", 0.75)):
        write_json(tmp_path / "clients" / client / "round_1.json", {"train_s": seconds})
    losses = {"0": {"server_policy_loss": 2.0}, "20": {"server_policy_loss": 0.1}}
    write_json(tmp_path / "server" / "policy_loss_history.json", losses)
    (tmp_path / "models" / "checkpoint_round_20").mkdir(parents=True)
    video = tmp_path / "evaluate" / "demo" / "federated" / "client_0" / "rollout_1.mp4"
    write_json(video.with_suffix(".json"), {"success": True})
    federated = build_score(38, 38, 38).model_copy(update={"videos": [str(video)]})

    result = build_result(
        DemoOptions(),
        build_run(tmp_path),
        {"federated": federated, "local_red": build_score(40, 20, 0)},
        [4.0],
    )

    assert result.verdict == "completed"
    assert (result.bytes_up, result.bytes_down) == (70, 80)
    assert result.loss_curve == {0: 2.0, 20: 0.1}
    assert (result.round_s, result.train_s) == ([4.0], [0.75])
    assert result.files["checkpoint"] == "models/checkpoint_round_20"
    assert result.films[0].path == "evaluate/demo/federated/client_0/rollout_1.mp4"
    assert result.films[0].caption == "federated, left third: touched the cube"


def test_a_failed_run_gives_a_failed_demonstration_with_its_reason(tmp_path: Path) -> None:
    run = build_run(
        tmp_path, state="failed", verdict=Verdict(state="failed", reasons=["no quorum"])
    )
    result = build_result(DemoOptions(), run, {"mean_trajectory": build_score(0, 12, 0)}, [])

    assert result.verdict == "failed"
    assert "no quorum" in result.reasons
    assert "no quorum" in result.to_text()


def test_a_second_demonstration_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    keep = tmp_path / "server" / "runs" / "keep.json"
    write_json(keep, {})
    options = DemoOptions(output=tmp_path / "outputs")

    with pytest.raises(SessionExistsError):
        run_demo(build_machine(tmp_path, NoHost("zk0-server")), options, Silent())
    assert keep.exists()


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    options = DemoOptions(output=tmp_path / "file" / "outputs")

    with pytest.raises(ConfigError, match="cannot write"):
        run_demo(build_machine(tmp_path, NoHost()), options, Silent())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_start_that_fails_says_why_and_restores_signal_handling(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    options = DemoOptions(output=tmp_path / "outputs")

    with pytest.raises(ServiceError, match="gone fishing"):
        run_demo(build_machine(tmp_path, NoHost()), options, Silent())
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_stopping_where_nothing_runs_is_no_error(tmp_path: Path) -> None:
    assert stop_all(build_machine(tmp_path, NoHost())).stopped == []
    assert demo_root(tmp_path) == tmp_path / "demo"


def test_helpers_of_a_demonstration_that_was_killed_are_ended(tmp_path: Path) -> None:
    machine = build_machine(tmp_path, NoHost())
    spec = helper_process(machine.paths, machine.surroundings, "forgotten", "timeit")
    sleep = (sys.executable, "-c", "import time; time.sleep(600)")
    child = Child.start(spec.model_copy(update={"argv": sleep}))
    stopped = stop_all(machine).stopped
    assert child.process.wait(10) == -signal.SIGTERM
    assert [report.pids for report in stopped] == [[child.process.pid]]
    assert stopped[0].to_text() == "stopped helpers: left-over processes (1 processes)"


def test_the_notice_of_a_kept_demonstration_can_be_typed_into_zsh(tmp_path: Path) -> None:
    host = FakeHost()
    host.running["zk0-server"] = {"gateway": Pane(name="gateway", pid=1)}
    machine = dataclasses.replace(build_machine(tmp_path, NoHost()), host=host)
    assert "attach-session -t '=zk0-server:'\n" in build_kept_notice(machine)


def test_a_helper_that_fails_shows_the_end_of_its_log(tmp_path: Path) -> None:
    child = Child.start(build_spec(tmp_path, "import sys; sys.exit('the plan is torn')"))
    child.process.wait(20)

    with pytest.raises(ServiceError, match=r"exit status 1.*\n.*the plan is torn"):
        child.is_done()


def test_a_helper_ends_with_its_owner(tmp_path: Path) -> None:
    child = Child.start(build_spec(tmp_path, "import time; time.sleep(600)"))
    assert not child.is_done()

    child.end()

    assert child.process.returncode == -signal.SIGTERM
    child.end()
