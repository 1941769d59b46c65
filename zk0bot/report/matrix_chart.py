"""``matrix.png``: heat maps of each policy with each task and on each owner's held-out episodes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.patches import Rectangle

from zk0bot.report.chart import INK, VERMILLION, Axes, build_figure, save
from zk0bot.report.figure import Interval
from zk0bot.report.matrix import Matrix
from zk0bot.report.matrix_text import COVERED

_CELL_INCHES = 0.42
_DARK = 0.55
"""Part of the colour scale above which numbers are white."""


def draw_matrix(path: Path, matrix: Matrix) -> None:
    """Success by pair, framed where nobody has trained; action error by owner."""
    has_heldout = any(row.heldout for row in matrix.rows)
    height = _CELL_INCHES * (1 + len(matrix.rows)) + 1.6
    figure = build_figure(width=16 if has_heldout else 11, height=height)
    widths = (len(matrix.columns), len(matrix.clients) + 0.8)
    grid = figure.add_gridspec(1, 2 if has_heldout else 1,
                               width_ratios=widths if has_heldout else None)  # fmt: skip
    _draw_success(figure.add_subplot(grid[0, 0]), matrix)
    if has_heldout:
        _draw_errors(figure.add_subplot(grid[0, 1]), matrix)
    save(figure, path)


def _draw_success(axes: Axes, matrix: Matrix) -> None:
    rates = [[score.success for score in row.tasks] for row in matrix.rows]
    _draw_map(axes, rates, scale=1.0, factor=100, digits=0)
    labels = [f"{c.task.removeprefix('touch-')}\n{c.place}\n({COVERED[c.trained_on]})"
              for c in matrix.columns]  # fmt: skip
    _label(axes, matrix, labels)
    for place, column in enumerate(matrix.columns):
        if column.trained_on.startswith("unseen"):
            frame = Rectangle((place - 0.48, -0.48), 0.96, len(matrix.rows) - 0.04, fill=False,
                              edgecolor=VERMILLION, linewidth=2.5)  # fmt: skip
            axes.add_patch(frame)
    axes.set_title("Success in % [95 % interval] with each colour in each part of the table (of "
                   "which owners trained on); framed: nobody did", loc="left", fontsize=10,
                   color=INK)  # fmt: skip


def _draw_errors(axes: Axes, matrix: Matrix) -> None:
    nothing: list[Interval | None] = [None] * len(matrix.clients)
    errors = [[score.arm_error for score in row.heldout] or nothing for row in matrix.rows]
    found = [error.value for row in errors for error in row if error]
    _draw_map(axes, errors, scale=max(found), factor=1, digits=1)
    _label(axes, matrix, [f"{client}'s\nepisodes" for client in matrix.clients])
    axes.tick_params(labelleft=False)
    axes.set_title("Action error in degrees, held out", loc="left", fontsize=10, color=INK)


def _draw_map(
    axes: Axes,
    figures: Sequence[Sequence[Interval | None]],
    *,
    scale: float,
    factor: float,
    digits: int,
) -> None:
    values = [[np.nan if f is None else f.value / scale for f in row] for row in figures]
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1.1, aspect="auto")
    for y, row in enumerate(figures):
        for x, figure in enumerate(row):
            if figure is None:
                axes.text(x, y, "-", ha="center", va="center", color=INK)
                continue
            colour = "white" if figure.value / scale > _DARK else INK
            axes.text(x, y, _describe(figure, factor, digits), ha="center", va="center",
                      fontsize=8.5, color=colour)  # fmt: skip


def _label(axes: Axes, matrix: Matrix, columns: Sequence[str]) -> None:
    axes.set_xticks(range(len(columns)), columns, fontsize=9)
    axes.set_yticks(range(len(matrix.rows)), [row.name for row in matrix.rows])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _describe(figure: Interval, factor: float, digits: int) -> str:
    value = f"{factor * figure.value:.{digits}f}"
    if figure.low is None or figure.high is None:
        return value
    low = max(0.0, figure.low)  # of an error with few seeds, Student's may lie below
    return f"{value} [{factor * low:.{digits}f}-{factor * figure.high:.{digits}f}]"
