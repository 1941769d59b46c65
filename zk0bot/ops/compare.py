"""The referee: trains and tries every cell of an experiment, and draws its tables.

Each finished cell is a file, so that a comparison that was killed goes on where it was.
"""

from pathlib import Path

from zk0bot.config.experiment import Experiment
from zk0bot.files import write_json, write_text
from zk0bot.ops.bench import CELLS, BenchOptions, alone, do_cells, draw, look_at_machine
from zk0bot.ops.compare_plan import choose_left, estimate, list_cells, refuse_what_does_not_fit
from zk0bot.ops.demo import View, refuse_unwritable
from zk0bot.ops.machine import Machine
from zk0bot.ops.process import count_cores
from zk0bot.report.cell import load_cells
from zk0bot.report.experiment import (
    COMPARISON_NAME,
    MARKDOWN_NAME,
    Comparison,
    build_comparison,
    build_markdown,
)

MOST_HOURS = 1.0
"""Longer work starts only with the operator's word."""


def compare(
    machine: Machine, experiment: Experiment, options: BenchOptions, view: View
) -> Comparison:
    """Do the cells that are left, and write the tables of all of them.

    Raises ConfigError for an experiment that does not fit this machine, SessionExistsError while
    another comparison runs below the same state root. A cell that fails is told in the result.
    However it ends, nothing that it started is left running.
    """
    refuse_unwritable(options.output)
    specs = list_cells(experiment)
    left = choose_left(specs, load_cells(options.output / CELLS, specs), again=options.again)
    refuse_what_does_not_fit(
        estimate(left, experiment.clients, count_cores()),
        look_at_machine(options.output),
        most_hours=MOST_HOURS,
        is_agreed=options.is_agreed,
    )
    with alone(machine):
        do_cells(machine, experiment, left, options.output, view)
    return read_comparison(machine, experiment, options.output)


def read_comparison(machine: Machine, experiment: Experiment, output: Path) -> Comparison:
    """Write JSON, Markdown and chart of what is done so far, also while it is being done."""
    refuse_unwritable(output)
    folder, specs = output.absolute(), list_cells(experiment)
    cells = load_cells(folder / CELLS, specs)
    result = build_comparison(experiment, specs, cells, str(folder))
    write_json(folder / COMPARISON_NAME, result)
    write_text(folder / MARKDOWN_NAME, build_markdown(result))
    if result.rows:
        draw(machine, folder)
    return result
