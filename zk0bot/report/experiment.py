"""The result of an experiment: every figure from its cells, and what they allow to say."""

import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from zk0bot.config.experiment import Experiment
from zk0bot.config.spelling import kebab
from zk0bot.records import Record
from zk0bot.report.cell import Cell, CellKind, CellSpec, describe_changes
from zk0bot.report.figure import Interval, mean_of, percent, plus_minus, to_interval
from zk0bot.report.matrix import Matrix, build_matrix
from zk0bot.report.matrix_text import build_matrix_markdown, build_matrix_tables
from zk0bot.report.paired import (
    LEVEL,
    Difference,
    Outcomes,
    adjust,
    compare_means,
    compare_rates,
    estimate_rate,
)
from zk0bot.version import __version__

COMPARISON_NAME = "comparison.json"
MARKDOWN_NAME = "comparison.md"
CHART_NAME = "comparison.png"
NOT_YET = "not done yet"
_WIDTH = 80


class Gap(Record):
    """A paired difference from the reference."""

    value: float
    low: float
    high: float
    p: float
    """Two-sided, adjusted after Holm for all rows of the table."""

    @property
    def is_real(self) -> bool:
        """Whether chance alone would bring it in fewer than 1 of 20 experiments."""
        return self.p < LEVEL


class Row(Record):
    """One setting or baseline, all its seeds together."""

    name: str
    kind: CellKind
    seeds: list[int]
    """Those that are done."""
    success: Interval
    per_sector: dict[str, float]
    """Success by part of the table."""
    loss: Interval | None = None
    """Held-out; None for a policy that predicts no noise."""
    is_loss_comparable: bool = True
    """False for a policy with normalisation statistics of its own."""
    success_gap: Gap | None = None
    loss_gap: Gap | None = None
    steps: int = 0
    """Optimizer steps in one place: of a client, an owner alone, or all data in one place."""
    rounds: int = 0
    rounds_to_reference: list[int | None] = Field(default_factory=list)
    """First evaluated round, by seed, whose loss is not above the reference's last; None: none."""
    bytes_up: float = 0.0
    """Mean of the seeds, all clients together, as ``bytes_down``."""
    bytes_down: float = 0.0
    cpu_s: float = 0.0
    """Mean of the seeds, of training."""
    losses: dict[int, float] = Field(default_factory=dict)
    """Mean held-out loss by round."""
    verdicts: dict[str, int] = Field(default_factory=dict)
    """How often its runs ended so."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Of a run, what differs from the experiment's common settings."""


class Missing(Record):
    """A cell without figures."""

    row: str
    seed: int
    reason: str


class Comparison(Record):
    """``comparison.json``."""

    name: str
    description: str
    reference: str
    parts: str
    clients: int
    seeds: list[int]
    scenes: int
    """In all parts of the table together."""
    scene_set: str
    cells: int
    missing: list[Missing]
    rows: list[Row]
    sentences: list[str]
    matrix: Matrix | None = None
    """None: the experiment asks for none."""
    version: str = __version__
    elapsed_s: float
    """Sum over the cells."""
    output_dir: str

    @property
    def is_complete(self) -> bool:
        return not self.missing

    def to_text(self) -> str:
        """Both tables and what they allow to say; at most 80 columns but for paths."""
        parts = [self._heading(), build_success_table(self), build_cost_table(self)]
        parts.append("\n".join(_wrap(sentence) for sentence in self.sentences))
        if self.matrix is not None:
            parts += build_matrix_tables(self.matrix)
            parts.append("\n".join(_wrap(sentence) for sentence in self.matrix.sentences))
        if self.missing:
            lines = [_wrap(f"{m.row}, seed {m.seed}: {m.reason}") for m in self.missing]
            parts.append("\n".join([f"{len(self.missing)} cells have no figures:", *lines]))
        parts.append(f"results in {self.output_dir}")
        return "\n\n".join(part for part in parts if part)

    def _heading(self) -> str:
        return _wrap(
            f"{self.name}: {self.description or 'no description'}. Seeds "
            f"{', '.join(map(str, self.seeds))}; {self.scenes} scenes ({self.scene_set} set); "
            f"differences from {self.reference}."
        )


def build_comparison(
    experiment: Experiment,
    specs: Sequence[CellSpec],
    cells: Mapping[str, Cell],
    output_dir: str,
) -> Comparison:
    """The tables of what is done so far; ``cells`` by key."""
    names = list(dict.fromkeys(spec.row for spec in specs))
    done = {key: cell for key, cell in cells.items() if cell.state == "done"}
    groups = {name: _Group([s for s in specs if s.row == name], done, experiment) for name in names}
    groups = {name: group for name, group in groups.items() if group.cells}
    reference = groups.get(experiment.reference)
    rows = [group.build_row(name, reference) for name, group in groups.items()]
    rows = _adjust(rows)
    return Comparison(
        name=experiment.name,
        description=experiment.description,
        reference=experiment.reference,
        parts=experiment.parts,
        clients=experiment.clients,
        seeds=list(experiment.seeds),
        scenes=3 * experiment.scenes,
        scene_set=experiment.scene_set,
        cells=len(specs),
        missing=[_describe_missing(spec, cells) for spec in specs if spec.key not in done],
        rows=rows,
        sentences=build_sentences(rows, experiment),
        matrix=build_matrix(specs, done),
        elapsed_s=sum(cell.elapsed_s for cell in cells.values()),
        output_dir=output_dir,
    )


class _Group:
    """The finished cells of one row."""

    def __init__(
        self, specs: Sequence[CellSpec], done: Mapping[str, Cell], experiment: Experiment
    ) -> None:
        self.experiment = experiment
        self.cells = {spec.seed: done[spec.key] for spec in specs if spec.key in done}
        self._is_seedless = specs[0].kind == "mean-trajectory"

    def build_row(self, name: str, reference: "_Group | None") -> Row:
        """Raw p-values stand where adjusted ones belong: see ``_adjust``."""
        first = next(iter(self.cells.values()))
        is_rival = reference is not None and reference is not self
        losses = self.losses()
        return Row(
            name=name,
            kind=first.spec.kind,
            seeds=sorted(self.cells),
            success=to_interval(estimate_rate(self._own_outcomes())),
            per_sector=self._per_sector(),
            loss=mean_of(list(losses.values())),
            is_loss_comparable=self.is_loss_comparable,
            success_gap=self._success_gap(reference) if is_rival and reference else None,
            loss_gap=self._loss_gap(reference) if is_rival and reference else None,
            steps=first.spec.steps,
            rounds=first.traffic.rounds if first.traffic else 0,
            rounds_to_reference=self._rounds_to(reference) if reference else [],
            bytes_up=self._mean(lambda cell: cell.traffic.bytes_up if cell.traffic else 0),
            bytes_down=self._mean(lambda cell: cell.traffic.bytes_down if cell.traffic else 0),
            cpu_s=self._mean(_cpu_s),
            losses=self._loss_curve(),
            verdicts=self._verdicts(),
            settings=self._settings(first),
        )

    @property
    def is_loss_comparable(self) -> bool:
        """Losses are in units of the policy's own normalisation."""
        return next(iter(self.cells.values())).spec.kind != "alone"

    def outcomes(self) -> Outcomes:
        """Seeds x scenes of the experiment; a policy without a seed has the same with each."""
        scenes = 3 * self.experiment.scenes
        table = np.full((len(self.experiment.seeds), scenes), np.nan)
        for place, seed in enumerate(self.experiment.seeds):
            cell = next(iter(self.cells.values())) if self._is_seedless else self.cells.get(seed)
            if cell is not None and cell.trial is not None:
                table[place] = [o for sector in cell.trial.outcomes.values() for o in sector]
        return table

    def losses(self) -> dict[int, float]:
        """Held-out loss by seed, where it was measured."""
        found = {seed: cell.trial.heldout_loss for seed, cell in self.cells.items() if cell.trial}
        return {seed: loss for seed, loss in found.items() if loss is not None}

    def _own_outcomes(self) -> Outcomes:
        return self.outcomes()[:1] if self._is_seedless else self.outcomes()

    def _success_gap(self, reference: "_Group") -> Gap | None:
        ours, theirs = self.outcomes(), reference.outcomes()
        if np.isnan(ours - theirs).all():
            return None
        return _to_gap(compare_rates(ours, theirs))

    def _loss_gap(self, reference: "_Group") -> Gap | None:
        ours, theirs = self.losses(), reference.losses()
        seeds = sorted(set(ours) & set(theirs))
        if not (self.is_loss_comparable and reference.is_loss_comparable):
            return None
        found = compare_means([ours[s] for s in seeds], [theirs[s] for s in seeds])
        return _to_gap(found) if found else None

    def _rounds_to(self, reference: "_Group") -> list[int | None]:
        goals = {seed: _final_loss(cell) for seed, cell in reference.cells.items()}
        return [
            find_round(cell.traffic.losses, goal)
            for seed, cell in sorted(self.cells.items())
            if cell.traffic and (goal := goals.get(seed)) is not None
        ]

    def _per_sector(self) -> dict[str, float]:
        trials = [cell.trial for cell in self.cells.values() if cell.trial]
        return {
            sector: float(np.mean([trial.outcomes[sector] for trial in trials]))
            for sector in trials[0].outcomes
        }

    def _loss_curve(self) -> dict[int, float]:
        curves = [cell.traffic.losses for cell in self.cells.values() if cell.traffic]
        common = set.intersection(*map(set, curves)) if curves else set()
        return {number: float(np.mean([c[number] for c in curves])) for number in sorted(common)}

    def _verdicts(self) -> dict[str, int]:
        ends = [cell.traffic.verdict for cell in self.cells.values() if cell.traffic]
        return {end: ends.count(end) for end in sorted(set(ends))}

    def _settings(self, cell: Cell) -> dict[str, Any]:
        if cell.spec.kind != "federated":
            return {}
        common = self.experiment.run.model_dump(mode="json")
        own = cell.spec.run.model_dump(mode="json")
        ignored = {"seed", "output_dir", "eval_datasets", "checkpoint_interval"}  # of all cells
        return {k: v for k, v in describe_changes(common, own).items() if k not in ignored}

    def _mean(self, figure: Callable[[Cell], float]) -> float:
        return statistics.fmean(figure(cell) for cell in self.cells.values())


def find_round(losses: Mapping[int, float], goal: float) -> int | None:
    """The first evaluated round with at most this loss."""
    return next((number for number in sorted(losses) if losses[number] <= goal), None)


def build_success_table(comparison: Comparison) -> str:
    """Success and loss with their intervals, and what differs from the reference."""
    if not comparison.rows:
        return ""
    lines = [
        "Success in % and held-out loss [95 % interval]; * a real difference",
        f"{'':<18}{'success':<15}{'difference':<19}{'loss':<13}difference",
    ]
    for row in comparison.rows:
        cells = (
            f"{row.name:<18.17}",
            f"{percent(row.success):<15}",
            f"{_gap_in_points(row):<19}",
            f"{_loss(row):<13}",
            _gap_of_loss(row),
        )
        lines.append("".join(cells).rstrip())
    if any(not row.is_loss_comparable for row in comparison.rows):
        lines.append("(loss) is in units of an owner's own normalisation: not comparable")
    return "\n".join(lines)


def build_cost_table(comparison: Comparison) -> str:
    """Rounds, traffic and processor time, means of the seeds."""
    if not comparison.rows:
        return ""
    lines = [
        f"{'':<20}{'steps':>6}{'rounds':>8}{'to ref.':>9}{'MB up':>9}{'MB down':>9}{'CPU-s':>8}"
    ]
    for row in comparison.rows:
        if row.kind in ("mean-trajectory", "untrained"):
            continue
        is_run = row.kind == "federated"
        cells = (
            f"{row.name:<20.19}",
            f"{row.steps:>6}",
            f"{row.rounds if is_run else '-':>8}",
            f"{describe_rounds(row) if is_run else '-':>9}",
            f"{row.bytes_up / 1e6 if is_run else 0:>9.1f}",
            f"{row.bytes_down / 1e6 if is_run else 0:>9.1f}",
            f"{row.cpu_s:>8.1f}",
        )
        lines.append("".join(cells))
    if len(lines) == 1:
        return ""
    lines.append(
        "to ref.: rounds to the reference's last loss, median; bytes: of all clients;\n"
        "CPU: of training, in runs with all processes but the server's evaluator"
    )
    return "\n".join(lines)


def describe_rounds(row: Row) -> str:
    """Median over the seeds; ``>20`` where most seeds do not get there, ``-`` if unknown."""
    if not row.rounds_to_reference:
        return "-"
    infinite = row.rounds + 1
    found = [infinite if number is None else number for number in row.rounds_to_reference]
    median = statistics.median_high(found)
    return f">{row.rounds}" if median == infinite else str(median)


def build_sentences(rows: Sequence[Row], experiment: Experiment) -> list[str]:
    """What differs from the reference for real, and what does not."""
    sentences = []
    rivals = [row for row in rows if row.success_gap]
    real = [row for row in rivals if row.success_gap and row.success_gap.is_real]
    for row in real:
        gap = row.success_gap
        assert gap is not None
        how = "better" if gap.value > 0 else "worse"
        sentences.append(
            f"{row.name} is {how} than {experiment.reference} by {100 * abs(gap.value):.1f} points "
            f"(p = {gap.p:.3g} after Holm)."
        )
    rest = [row.name for row in rivals if row not in real]
    if rest:
        sentences.append(
            f"In success not told apart from {experiment.reference}: {', '.join(rest)}."
        )
    lower = [row.name for row in rows if row.loss_gap and row.loss_gap.is_real
             and row.loss_gap.value < 0]  # fmt: skip
    if lower:
        sentences.append(f"A lower held-out loss for real: {', '.join(lower)}.")
    if len(experiment.seeds) < 3:
        sentences.append(
            f"{len(experiment.seeds)} seed{'s' if len(experiment.seeds) > 1 else ''}: the figures "
            "say little about other seeds; --seeds 0-4 does."
        )
    failed = [f"{row.name} ({count})" for row in rows for end, count in row.verdicts.items()
              if end == "failed"]  # fmt: skip
    if failed:
        sentences.append(f"Runs that ended as failed, by their held-out loss: {', '.join(failed)}.")
    return sentences


def build_markdown(comparison: Comparison) -> str:
    """``comparison.md``: what the terminal shows, and the settings."""
    lines = [
        f"# {comparison.name}",
        "",
        comparison.description,
        "",
        f"Reference: {comparison.reference}. Owners: {comparison.clients}, parts "
        f"{comparison.parts}. Seeds: {', '.join(map(str, comparison.seeds))}. Scenes: "
        f"{comparison.scenes} ({comparison.scene_set} set). zk0bot {comparison.version}.",
        "",
        f"![success and loss]({CHART_NAME})",
        "",
        *build_markdown_table(comparison),
    ]
    lines += ["", *(f"- {sentence}" for sentence in comparison.sentences)]
    lines += [f"- no figures: {m.row}, seed {m.seed}: {m.reason}" for m in comparison.missing]
    if comparison.matrix is not None and comparison.matrix.rows:
        lines += build_matrix_markdown(comparison.matrix)
    changed = [row for row in comparison.rows if row.settings]
    lines += ["", "## Settings that differ from the common ones", ""] if changed else []
    lines += [f"- {row.name}: {_settings(row.settings)}" for row in changed]
    return "\n".join(lines) + "\n"


def build_markdown_table(comparison: Comparison) -> list[str]:
    """A line for each row, with a heading."""
    header = ("", "success", "difference", "p", "loss", "difference", "rounds", "to ref.",
              "MB up", "MB down", "CPU-s")  # fmt: skip
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for row in comparison.rows:
        is_run = row.kind == "federated"
        cells = (
            row.name,
            percent(row.success),
            _gap_in_points(row),
            f"{row.success_gap.p:.3g}" if row.success_gap else "",
            _loss(row),
            _gap_of_loss(row),
            str(row.rounds) if is_run else "",
            describe_rounds(row) if is_run else "",
            f"{row.bytes_up / 1e6:.1f}" if is_run else "",
            f"{row.bytes_down / 1e6:.1f}" if is_run else "",
            f"{row.cpu_s:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{kebab(key)} = {value}" for key, value in settings.items())


def _adjust(rows: Sequence[Row]) -> list[Row]:
    """``rows`` with p-values adjusted, those of success and of loss each among themselves."""
    for field in ("success_gap", "loss_gap"):
        gaps = [getattr(row, field) for row in rows]
        adjusted = iter(adjust([gap.p for gap in gaps if gap]))
        gaps = [gap and gap.model_copy(update={"p": next(adjusted)}) for gap in gaps]
        pairs = zip(rows, gaps, strict=True)
        rows = [row.model_copy(update={field: gap}) for row, gap in pairs]
    return list(rows)


def _describe_missing(spec: CellSpec, cells: Mapping[str, Cell]) -> Missing:
    cell = cells.get(spec.key)
    reason = cell.reason if cell else NOT_YET
    return Missing(row=spec.row, seed=spec.seed, reason=reason)


def _final_loss(cell: Cell) -> float | None:
    """Of the run's own evaluations, else as the referee measured it."""
    if cell.traffic and cell.traffic.losses:
        return cell.traffic.losses[max(cell.traffic.losses)]
    return cell.trial.heldout_loss if cell.trial and cell.spec.kind != "alone" else None


def _cpu_s(cell: Cell) -> float:
    if cell.traffic:
        return cell.traffic.cpu_s
    return cell.trial.cpu_s if cell.trial else 0.0


def _to_gap(found: Difference) -> Gap:
    return Gap(value=found.value, low=found.low, high=found.high, p=found.p)


def _gap_in_points(row: Row) -> str:
    gap = row.success_gap
    if gap is None:
        return ""
    star = "*" if gap.is_real else ""
    return f"{100 * gap.value:+.1f}{star} [{100 * gap.low:+.0f},{100 * gap.high:+.0f}]"


def _loss(row: Row) -> str:
    if row.loss is None:
        return "-"
    if not row.is_loss_comparable:
        return f"({row.loss.value:.3f})"
    return plus_minus(row.loss, 3)


def _gap_of_loss(row: Row) -> str:
    gap = row.loss_gap
    if gap is None:
        return ""
    star = "*" if gap.is_real else ""
    half = (gap.high - gap.low) / 2
    return f"{gap.value:+.3f}{star}±{half:.3f}"


def _wrap(sentence: str) -> str:
    return "\n".join(textwrap.wrap(sentence, _WIDTH - 2, subsequent_indent="  "))
