"""Tuning: trials on tuning scenes, rung by rung; the winner and the default on others.

Who goes on is decided from the cells alone, so that tuning that was killed goes on where it was.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from zk0bot.config.experiment import Experiment
from zk0bot.config.space import DEFAULT, Space
from zk0bot.files import write_json, write_text
from zk0bot.ops.bench import (
    CELLS,
    BenchOptions,
    alone,
    describe_time,
    do_cells,
    draw,
    look_at_machine,
)
from zk0bot.ops.compare import MOST_HOURS
from zk0bot.ops.compare_plan import choose_left, list_cells, refuse_what_does_not_fit
from zk0bot.ops.demo import View, refuse_unwritable
from zk0bot.ops.machine import Machine
from zk0bot.ops.process import count_cores
from zk0bot.ops.tune_plan import Search, estimate_tuning, foresee, plan_rungs, search
from zk0bot.report.cell import Cell, load_cells
from zk0bot.report.tuning import (
    BEST_NAME,
    MARKDOWN_NAME,
    TUNING_NAME,
    Progress,
    Tuning,
    build_best,
    build_markdown,
    build_tuning,
)


def tune(machine: Machine, space: Space, options: BenchOptions, view: View) -> Tuning:
    """Do the trials that are left, then hold the best against the default; write the tables.

    Raises ConfigError for what does not fit this machine, SessionExistsError while a comparison or
    other tuning runs below the same state root. A cell that fails is told in the result, and its
    trial goes no further. However it ends, nothing that it started is left running.
    """
    refuse_unwritable(options.output)
    desk = _Desk(machine=machine, options=options, view=view)
    demand = estimate_tuning(
        foresee(space, desk.load, again=options.again),
        desk.load,
        count_cores(),
        again=options.again,
    )
    supply = look_at_machine(options.output)
    refuse_what_does_not_fit(demand, supply, most_hours=MOST_HOURS, is_agreed=options.is_agreed)
    if demand.time_s:
        view.phase(f"{space.name}: by estimate {describe_time(demand.time_s)} in all")
    with alone(machine):
        search(space, desk.do)
    return read_tuning(machine, space, options.output)


def read_tuning(machine: Machine, space: Space, output: Path) -> Tuning:
    """Write JSON, Markdown, chart and the best settings as far as it is done; also meanwhile."""
    refuse_unwritable(output)
    folder = output.absolute()
    found = search(space, lambda experiment: _load(folder, experiment))
    result = build_tuning(space, build_progress(space, found), str(folder))
    write_json(folder / TUNING_NAME, result)
    write_text(folder / MARKDOWN_NAME, build_markdown(result))
    (folder / BEST_NAME).unlink(missing_ok=True)  # of another winner
    if result.verdict in ("better", "not told apart"):
        write_text(folder / BEST_NAME, build_best(space, result.winner))
    if any(rung.scores for rung in result.rungs):
        draw(machine, folder)
    return result


def build_progress(space: Space, found: Search) -> Progress:
    """What the report needs to know of a search."""
    return Progress(
        rungs=[stage.comparison for stage in found.rungs],
        rounds=[stage.experiment.run.num_server_rounds for stage in found.rungs],
        num_rungs=len(plan_rungs(space)),
        winner=found.winner,
        final=found.final.comparison if found.final else None,
    )


@dataclass(frozen=True, kw_only=True)
class _Desk:
    """Cells of experiments, done or loaded."""

    machine: Machine
    options: BenchOptions
    view: View

    def load(self, experiment: Experiment) -> Mapping[str, Cell]:
        return _load(self.options.output, experiment)

    def do(self, experiment: Experiment) -> Mapping[str, Cell]:
        """All cells of the experiment, those that are left done first."""
        specs = list_cells(experiment)
        left = choose_left(specs, self.load(experiment), again=self.options.again)
        if left:
            names = ", ".join(name for name in experiment.settings if name != DEFAULT)
            self.view.phase(
                f"{experiment.name}: {names}; {left[0].run.num_server_rounds} rounds, seeds "
                f"{', '.join(map(str, experiment.seeds))}"
            )
            do_cells(self.machine, experiment, left, self.options.output, self.view)
        return self.load(experiment)


def _load(output: Path, experiment: Experiment) -> Mapping[str, Cell]:
    return load_cells(output / CELLS, list_cells(experiment))
