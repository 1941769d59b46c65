"""The bench on which cells of an experiment are done, one after the other.

Two lanes work at once: one federation after the other, one for each seed, and a warm process that
trains what is not federated and tries every policy. All of it lives below a state root of its own.
Each finished cell is a file, so that work that was killed goes on where it was.
"""

import contextlib
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Lock

import psutil

from zk0bot.config.experiment import Experiment
from zk0bot.errors import DataError, RunError, ServiceError, SessionExistsError, Zk0Error
from zk0bot.files import private_dir, read_record, try_locked, write_json
from zk0bot.ops import record, runs
from zk0bot.ops.child import Child
from zk0bot.ops.compare_plan import (
    START_DEADLINE_S,
    Supply,
    build_clients,
    estimate,
    estimate_cell,
    list_cells,
)
from zk0bot.ops.demo import Bar, View, stop_all
from zk0bot.ops.interrupt import undisturbed
from zk0bot.ops.local_federation import POLL_S, LocalFederation
from zk0bot.ops.machine import Machine
from zk0bot.ops.process import count_cores
from zk0bot.ops.specs import SERVER_SESSION, helper_process, helpers_dir
from zk0bot.ops.state import find_trainer
from zk0bot.records import RunRecord
from zk0bot.report.cell import Cell, CellPlan, CellSpec, Traffic, Trial, load_cells, save_cell
from zk0bot.report.history import load_policy_losses

CELLS = "cells"


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What the person who starts a comparison or tuning may choose."""

    output: Path
    again: bool = False
    """Do cells anew that failed."""
    is_agreed: bool = False
    """Start hours of work."""


def do_cells(
    machine: Machine, experiment: Experiment, left: Sequence[CellSpec], folder: Path, view: View
) -> None:
    """Do the cells that are ``left`` of an experiment; each becomes a file in ``folder``/cells.

    Within ``alone``. A cell that fails is told in its file. However it ends, nothing that it
    started is left running.
    """
    specs = list_cells(experiment)
    bench = _Bench(
        machine=machine,
        experiment=experiment,
        folder=folder.absolute(),
        view=view,
        cores=count_cores(),
        total=len(specs),
        cells=load_cells(folder / CELLS, specs),
    )
    try:
        bench.do(list(left))
    finally:
        with undisturbed():
            bench.close()


def draw(machine: Machine, folder: Path) -> None:
    """The chart of the figures in ``folder``, by a process of its own."""
    spec = helper_process(
        machine.paths, machine.surroundings, "report", "zk0bot.report", str(folder)
    )
    child = Child.start(spec)
    try:
        while not child.is_done():
            time.sleep(POLL_S)
    finally:
        child.end()


def compare_root(root: Path) -> Path:
    """The state root of comparisons and tuning."""
    return root / "compare"


@contextlib.contextmanager
def alone(machine: Machine) -> Iterator[None]:
    """One comparison or tuning at a time; what one that was killed has left is ended first.

    SessionExistsError while another runs below the same state root.
    """
    private_dir(machine.paths.root)
    with try_locked(machine.paths.root / "compare.lock") as is_ours:
        if not is_ours:
            raise SessionExistsError(
                f"a comparison or tuning runs already (state in {machine.paths.root})",
                hint="wait for its end, or set ZK0BOT_HOME to another folder",
            )
        stop_all(machine)
        yield


def look_at_machine(folder: Path) -> Supply:
    """What is free here, on the disk of ``folder``."""
    return Supply(
        memory_gib=psutil.virtual_memory().available / 2**30,
        disk_gib=psutil.disk_usage(str(folder)).free / 2**30,
        cores=count_cores(),
    )


class _StoppedError(Exception):
    """Another lane has failed, or the operator has had enough."""


@dataclass(frozen=True, kw_only=True)
class _Trained:
    """A federated run that waits to be tried."""

    spec: CellSpec
    weights: Path
    traffic: Traffic
    elapsed_s: float


@dataclass
class _Bench:
    """One comparison under way."""

    machine: Machine
    experiment: Experiment
    folder: Path
    view: View
    cores: int
    total: int
    """Cells of the experiment."""
    cells: dict[str, Cell]
    _left: list[CellSpec] = field(default_factory=list)
    _trained: SimpleQueue[_Trained] = field(default_factory=SimpleQueue)
    _news: SimpleQueue[Cell] = field(default_factory=SimpleQueue)
    _doing: dict[str, Bar] = field(default_factory=dict)
    _children: list[Child] = field(default_factory=list)
    _federation: LocalFederation | None = None
    _stop: Event = field(default_factory=Event)
    _lock: Lock = field(default_factory=Lock)
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2))
    _begun: float = field(default_factory=time.monotonic)

    def do(self, left: list[CellSpec]) -> None:
        """Do these cells; returns when each is done or has failed."""
        if not left:
            return
        self._left = left
        for spec in left:
            self.cells.pop(spec.key, None)  # what failed
        self.view.phase(
            f"{self.experiment.name}: {len(left)} of {self.total} cells to do, by estimate "
            f"{describe_time(self._left_s())}"
        )
        shutil.rmtree(self._referee_dir, ignore_errors=True)
        self._start_child("referee", "zk0bot.training.warm.trainer",
                          "--dir", str(self._referee_dir), "--role", "server")  # fmt: skip
        federated = self._pool.submit(self._federate, [s for s in left if s.kind == "federated"])
        tried = self._pool.submit(
            self._try_all, deque(s for s in left if s.kind != "federated"), federated
        )
        while not (federated.done() and tried.done()):
            for lane in (federated, tried):
                if lane.done():
                    lane.result()
            self._show()
            time.sleep(POLL_S)
        federated.result()
        tried.result()
        self._show()

    def close(self) -> None:
        """End everything, whatever state it is in."""
        self._stop.set()
        for child in list(self._children):
            child.end()
        if self._federation is not None:
            self._federation.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
        stop_all(self.machine)  # what a lane has started as the interrupt came

    def _federate(self, specs: list[CellSpec]) -> None:
        """A federation for each seed; its runs one after the other."""
        for seed in dict.fromkeys(spec.seed for spec in specs):
            own = [spec for spec in specs if spec.seed == seed]
            try:
                self._federate_seed(seed, own)
            except Zk0Error as error:
                self._check_stop()
                waiting = [spec for spec in own if not self._has(spec)]
                for spec in waiting:
                    self._fail(spec, f"its federation does not work: {error.message}", 0.0)
        self._doing.pop("run", None)

    def _federate_seed(self, seed: int, specs: list[CellSpec]) -> None:
        paths = self.machine.paths
        for folder in (paths.server_dir, paths.clients_dir):
            shutil.rmtree(folder, ignore_errors=True)
        clients = build_clients(self.experiment, seed)
        federation = LocalFederation(self.machine, clients, start_deadline_s=START_DEADLINE_S)
        self._federation = federation
        try:
            self._doing["run"] = Bar(name="run", detail=f"starting a federation, seed {seed}")
            federation.open(self._check_stop)
            federation.wait(self._check_stop)
            for spec in specs:
                self._run(federation, spec)
        finally:
            federation.close()

    def _run(self, federation: LocalFederation, spec: CellSpec) -> None:
        """One run; its policy then waits to be tried. A failure is the cell's."""
        began = time.monotonic()
        try:
            traffic, weights = self._carry_out(federation, spec)
        except (RunError, DataError) as error:
            self._check_stop()
            self._fail(spec, error.message, time.monotonic() - began)
            return
        elapsed_s = time.monotonic() - began
        self._trained.put(
            _Trained(spec=spec, weights=weights, traffic=traffic, elapsed_s=elapsed_s)
        )

    def _carry_out(self, federation: LocalFederation, spec: CellSpec) -> tuple[Traffic, Path]:
        """Raises RunError for a run that has not all its rounds."""
        paths = self.machine.paths
        before = federation.cpu_s()
        config = spec.run.model_copy(update={"output_dir": str(self.folder / "runs")})
        run = self._watch(runs.submit_run(self.machine, config), spec)
        cpu_s = max(0.0, federation.cpu_s() - before)
        reasons = run.verdict.reasons if run.verdict else [run.reason]
        weights = paths.evaluator_dir / "weights" / f"round_{run.num_rounds}.safetensors"
        if run.rounds_done < run.num_rounds or not weights.is_file():
            raise RunError(f"the run ended as {run.state}: {'; '.join(reasons)}")
        kept = private_dir(paths.root / "weights") / f"{spec.key}.safetensors"
        shutil.copyfile(weights, kept)  # the next run writes its own there
        history = Path(run.output_dir) / "server" / "policy_loss_history.json"
        return Traffic(
            rounds=run.rounds_done,
            bytes_up=run.bytes_up,
            bytes_down=run.bytes_down,
            cpu_s=cpu_s,
            losses=load_policy_losses(history) if history.is_file() else {},
            verdict=run.state,
            reasons=reasons,
        ), kept

    def _watch(self, run: RunRecord, spec: CellSpec) -> RunRecord:
        """The run's final record; ServiceError where its server is gone."""
        while not run.is_final:
            self._check_stop()
            self._doing["run"] = Bar(
                name="run",
                detail=f"{spec.row}, seed {spec.seed}: {run.phase or run.state}",
                done=run.rounds_done,
                total=run.num_rounds,
            )
            if not self.machine.host.panes(SERVER_SESSION):
                raise ServiceError("the server has gone", hint="look at its logs")
            time.sleep(POLL_S)
            run = record.get_run(self.machine.paths, run.run_id)
        return run

    def _try_all(self, alone: deque[CellSpec], federated: "Future[None]") -> None:
        """Try what comes out of runs first, then train and try the rest."""
        while True:
            self._check_stop()
            is_last = federated.done()
            try:
                self._try_trained(self._trained.get(timeout=0 if alone else POLL_S))
                continue
            except Empty:
                if not alone and is_last:
                    break
            if alone:
                self._try(alone.popleft())
        self._doing.pop("referee", None)

    def _try_trained(self, trained: _Trained) -> None:
        self._try(
            trained.spec,
            weights=str(trained.weights),
            traffic=trained.traffic,
            elapsed_s=trained.elapsed_s,
        )
        trained.weights.unlink()

    def _try(
        self,
        spec: CellSpec,
        *,
        weights: str = "",
        traffic: Traffic | None = None,
        elapsed_s: float = 0.0,
    ) -> None:
        began = time.monotonic()
        self._doing["referee"] = Bar(name="referee", detail=f"{spec.row}, seed {spec.seed}")
        try:
            trial = self._judge(spec, weights)
        except Zk0Error as error:
            self._check_stop()
            self._fail(spec, error.message, elapsed_s + time.monotonic() - began)
            return
        elapsed_s += time.monotonic() - began
        self._finish(
            Cell(spec=spec, state="done", trial=trial, traffic=traffic, elapsed_s=elapsed_s)
        )

    def _judge(self, spec: CellSpec, weights: str) -> Trial:
        folder = helpers_dir(self.machine.paths)
        plan, answer = folder / "judge.plan.json", folder / "judge.result.json"
        answer.unlink(missing_ok=True)
        write_json(
            plan,
            CellPlan(spec=spec, referee_dir=str(self._referee_dir), weights_path=weights),
        )
        child = self._start_child(
            "judge", "zk0bot.training.judging", "--plan", str(plan), "--result", str(answer)
        )
        while not child.is_done():
            self._check_stop()
            self._refuse_dead_referee()
            time.sleep(POLL_S)
        with self._lock:
            self._children.remove(child)
        return read_record(answer, Trial)

    def _refuse_dead_referee(self) -> None:
        """It ends only with the comparison."""
        for child in self._children:
            if child.spec.name == "referee" and child.is_done():
                raise ServiceError("the referee has ended", hint=f"log: {child.spec.log_path}")

    def _fail(self, spec: CellSpec, reason: str, elapsed_s: float) -> None:
        self._finish(Cell(spec=spec, state="failed", reason=reason, elapsed_s=elapsed_s))

    def _finish(self, cell: Cell) -> None:
        save_cell(self.folder / CELLS, cell)
        with self._lock:
            self.cells[cell.spec.key] = cell
        self._news.put(cell)

    def _has(self, spec: CellSpec) -> bool:
        with self._lock:
            return spec.key in self.cells

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise _StoppedError

    def _start_child(self, name: str, module: str, *arguments: str) -> Child:
        spec = helper_process(
            self.machine.paths, self.machine.surroundings, name, module, *arguments
        )
        with self._lock:
            self._check_stop()
            child = Child.start(spec, self.machine.secrets)
            self._children.append(child)
        return child

    def _show(self) -> None:
        """A line for each finished cell, and a bar for what is under way."""
        with contextlib.suppress(Empty):
            while True:
                self.view.phase(describe_cell(self._news.get_nowait()))
        done = sum(self._has(spec) for spec in self._left)
        cells = Bar(
            name="cells",
            detail=f"{describe_time(self._left_s())} left",
            done=done,
            total=len(self._left),
        )
        referee = self._doing.get("referee")
        state = find_trainer(self._referee_dir)
        if referee is not None and state is not None and state.state == "working":
            detail = f"{referee.detail}: {state.detail}"
            referee = Bar(name="referee", detail=detail, done=state.done, total=state.total)
        bars = (cells, self._doing.get("run"), referee)
        self.view.bars([bar for bar in bars if bar is not None])

    def _left_s(self) -> float:
        """By the estimate at first, then by how long what is done has taken."""
        sizes = {s.key: estimate_cell(s, self.experiment.clients, self.cores) for s in self._left}
        done = sum(sizes[spec.key] for spec in self._left if self._has(spec))
        left = sum(sizes.values()) - done
        if not done:
            return estimate(self._left, self.experiment.clients, self.cores).time_s
        return (time.monotonic() - self._begun) * left / done

    @property
    def _referee_dir(self) -> Path:
        return self.machine.paths.root / "referee"


def describe_cell(cell: Cell) -> str:
    """One line about a finished cell."""
    head = f"{cell.spec.row}, seed {cell.spec.seed}"
    if cell.trial is None:
        return f"{head}: failed: {cell.reason}"
    outcomes = [won for sector in cell.trial.outcomes.values() for won in sector]
    loss = cell.trial.heldout_loss
    told = "" if loss is None else f", held-out loss {loss:.4f}"
    return f"{head}: {sum(outcomes)} of {len(outcomes)} scenes{told}"


def describe_time(seconds: float) -> str:
    """Roughly, so that it does not change all the time."""
    if seconds < 60:
        return "less than a minute"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
