"""The result of tuning: what each trial did on the tuning scenes, and the winner on fresh ones."""

import json
import shlex
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from zk0bot.config.models import RunConfig
from zk0bot.config.run_table import to_text
from zk0bot.config.search import Way
from zk0bot.config.space import DEFAULT, Objective, Space, describe_point
from zk0bot.config.spelling import kebab
from zk0bot.records import Record
from zk0bot.report.experiment import (
    NOT_YET,
    Comparison,
    Gap,
    Missing,
    Row,
    build_markdown_table,
    build_success_table,
)
from zk0bot.report.figure import Interval
from zk0bot.version import __version__

TUNING_NAME = "tuning.json"
MARKDOWN_NAME = "tuning.md"
CHART_NAME = "tuning.png"
BEST_NAME = "best.toml"
Verdict = Literal["unfinished", "default", "better", "worse", "not told apart"]
"""default: nothing did better on the tuning scenes. The next three: of the winner on fresh ones."""
_WIDTH = 80
_NAME_WIDTH = 12
_SCORE_WIDTH = 9
_FIGURE_WIDTH = 26


class Score(Record):
    """One trial on one rung."""

    success: Interval
    loss: Interval | None
    """Held-out."""
    is_complete: bool
    """Whether all seeds have figures; else it does not go on."""


class RungResult(Record):
    """Trials with the same rounds and seeds."""

    rounds: int
    seeds: list[int]
    trials: list[str]
    scores: dict[str, Score]
    """Of those that have figures."""


class Tuning(Record):
    """``tuning.json``."""

    name: str
    description: str
    objective: Objective
    way: Way
    default: dict[str, Any]
    """The default's values of the settings that are tried, by setting."""
    points: dict[str, dict[str, Any]]
    """Those of each trial."""
    clients: int
    parts: str
    scenes: int
    """In all parts of the table together; as many of each kind."""
    tuning_seeds: list[int]
    seeds: list[int]
    num_rungs: int
    rungs: list[RungResult]
    """Those that have begun."""
    winner: str = ""
    tuning_gap: float | None = None
    """Objective of the winner above the default's where both were chosen from; flattered."""
    fresh_gap: Gap | None = None
    """The same on scenes and seeds that no choice has seen; None with one seed and loss."""
    fresh: Comparison | None = None
    verdict: Verdict = "unfinished"
    settings: dict[str, Any] = Field(default_factory=dict)
    """The winner's values; none where the default has won."""
    missing: list[Missing]
    sentences: list[str]
    version: str = __version__
    output_dir: str

    @property
    def is_complete(self) -> bool:
        return self.verdict != "unfinished"

    def to_text(self) -> str:
        """Trials, winner and default on both kinds of scenes; at most 80 columns but for paths."""
        parts = [
            self._heading(),
            build_trial_table(self),
            build_gain_table(self),
            build_success_table(self.fresh) if self.fresh else "",
            "\n".join(_wrap(sentence) for sentence in self.sentences),
            self._failures(),
            build_command(self),
            f"results in {self.output_dir}",
        ]
        return "\n\n".join(part for part in parts if part)

    def _heading(self) -> str:
        return _wrap(
            f"{self.name}: {self.description or 'no description'}. {len(self.points)} trials "
            f"({self.way}) for {_figure_name(self.objective)}; {self.scenes} tuning scenes, seeds "
            f"{_join(self.tuning_seeds)}; then {self.scenes} fresh ones, seeds "
            f"{_join(self.seeds)}."
        )

    def _failures(self) -> str:
        if not self.missing:
            return ""
        lines = [_wrap(f"{m.row}, seed {m.seed}: {m.reason}") for m in self.missing]
        return "\n".join(["Without figures:", *lines])


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a search has come: the comparison of each rung that has begun, and of the end."""

    rungs: Sequence[Comparison]
    rounds: Sequence[int]
    """Of each of these rungs."""
    num_rungs: int
    winner: str
    final: Comparison | None


def build_tuning(space: Space, progress: Progress, output_dir: str) -> Tuning:
    """The tables of what is done so far."""
    result = Tuning(
        name=space.name,
        description=space.description,
        objective=space.objective,
        way=space.way,
        default={kebab(name): _read_value(space.run, name) for name in space.space},
        points={
            name: {kebab(key): value for key, value in trial.point.items()}
            for name, trial in space.candidates.items()
        },
        clients=space.clients,
        parts=space.parts,
        scenes=3 * space.scenes,
        tuning_seeds=list(space.tuning_seeds),
        seeds=list(space.seeds),
        num_rungs=progress.num_rungs,
        rungs=[_build_rung(c, r) for c, r in zip(progress.rungs, progress.rounds, strict=True)],
        winner=progress.winner,
        fresh=progress.final,
        missing=_list_missing([*progress.rungs, *filter(None, [progress.final])]),
        sentences=[],
        output_dir=output_dir,
    )
    return _conclude(result)


def build_trial_table(tuning: Tuning) -> str:
    """A line for each trial: its score on each rung it came to, and its settings."""
    if not any(rung.scores for rung in tuning.rungs):
        return ""
    goal = "lower" if tuning.objective == "loss" else "higher"
    lines = [f"On tuning scenes: {_figure_name(tuning.objective)} by rung, {goal} is better"]
    for name, texts in (
        ("rounds", [str(rung.rounds) for rung in tuning.rungs]),
        ("seeds", [str(len(rung.seeds)) for rung in tuning.rungs]),
    ):
        lines.append(f"{name:<{_NAME_WIDTH}}" + "".join(f"{t:>{_SCORE_WIDTH}}" for t in texts))
    indent = " " * (_NAME_WIDTH + _SCORE_WIDTH * len(tuning.rungs) + 3)
    for name in order_trials(tuning):
        scores = "".join(f"{_score(tuning, rung, name):>{_SCORE_WIDTH}}" for rung in tuning.rungs)
        mark = "*" if name == tuning.winner else " "
        settings = describe_point(tuning.points.get(name, tuning.default))
        wrapped = _fill(settings, max(_WIDTH - len(indent), 24)) or [""]
        lines.append(f"{name:<{_NAME_WIDTH}}{scores} {mark} {wrapped[0]}".rstrip())
        lines += [indent + part for part in wrapped[1:]]
    if tuning.winner:
        lines.append("* the winner")
    return "\n".join(lines)


def order_trials(tuning: Tuning) -> list[str]:
    """Default and trials: who came far first, then by score there; without any figure, last."""

    def place(name: str) -> tuple[int, float]:
        for number, rung in reversed(list(enumerate(tuning.rungs, 1))):
            if name in rung.scores:
                return -number, _sign(tuning) * _value(tuning, rung.scores[name])
        return 0, 0.0

    return sorted([DEFAULT, *tuning.points], key=place)


def build_gain_table(tuning: Tuning) -> str:
    """Winner and default where they were chosen, and where they were not."""
    rows = {row.name: row for row in tuning.fresh.rows} if tuning.fresh else {}
    if not {DEFAULT, tuning.winner} <= set(rows):
        return ""
    last = tuning.rungs[-1]
    lines = [
        f"{_figure_name(tuning.objective).capitalize()} [95 % interval]; * a real difference",
        f"{'':<{_NAME_WIDTH}}{'tuning scenes':<{_FIGURE_WIDTH}}fresh scenes",
    ]
    for name in (DEFAULT, tuning.winner):
        both = _interval(tuning, last.scores[name]), _interval(tuning, rows[name])
        lines.append(f"{name:<{_NAME_WIDTH}}{both[0]:<{_FIGURE_WIDTH}}{both[1]}")
    gap = describe_gap(tuning)
    lines.append(
        f"{'difference':<{_NAME_WIDTH}}{_signed(tuning, tuning.tuning_gap):<{_FIGURE_WIDTH}}{gap}"
    )
    return "\n".join(lines)


def describe_gap(tuning: Tuning) -> str:
    """The fresh difference with its interval; ``-`` where one seed gives none."""
    gap = tuning.fresh_gap
    if gap is None:
        return "-"
    star = "*" if gap.is_real else ""
    low, high = (_signed(tuning, end) for end in (gap.low, gap.high))
    unit = "" if tuning.objective == "loss" else " points"
    return f"{_signed(tuning, gap.value)}{star} [{low}, {high}]{unit}"


def build_command(tuning: Tuning) -> str:
    """The winner's settings to copy; nothing where the default has won or is better."""
    if tuning.verdict not in ("better", "not told apart"):
        return ""
    pairs = [f"--set={key}={shlex.quote(to_text(value))}" for key, value in tuning.settings.items()]
    text = " \\\n    ".join(_fill(" ".join(pairs), _WIDTH - 18))
    how = "To use it" if tuning.verdict == "better" else "To use it all the same"
    return (
        f"{how}:\n  zk0bot run {text}\n"
        "or, with all other settings of the trials:\n  zk0bot run --config "
        f"{shlex.quote(str(Path(tuning.output_dir) / BEST_NAME))}"
    )


def build_best(space: Space, trial: str) -> str:
    """``best.toml``: every setting of the trial that the space's file names."""
    values = {**space.given, **space.candidates[trial].point}
    policy = {k: v for k, v in values.items() if k.startswith("policy.")}
    lines = [f"# {trial} of {space.name}, chosen by zk0bot {__version__}", "[run]"]
    lines += [f"{kebab(k)} = {json.dumps(v)}" for k, v in values.items() if k not in policy]
    if policy:
        lines += ["", "[policy]"]
    lines += [f"{kebab(k.removeprefix('policy.'))} = {json.dumps(v)}" for k, v in policy.items()]
    return "\n".join(lines) + "\n"


def build_markdown(tuning: Tuning) -> str:
    """``tuning.md``: what the terminal shows."""
    lines = [
        f"# {tuning.name}",
        "",
        tuning.description,
        "",
        f"{len(tuning.points)} trials ({tuning.way}), objective: {_figure_name(tuning.objective)}. "
        f"Owners: {tuning.clients}, parts {tuning.parts}. Scenes: {tuning.scenes} for tuning with "
        f"seeds {_join(tuning.tuning_seeds)}, {tuning.scenes} fresh with seeds "
        f"{_join(tuning.seeds)}. zk0bot {tuning.version}.",
        "",
        f"![scores by trial]({CHART_NAME})",
        "",
    ]
    for text in (build_trial_table(tuning), build_gain_table(tuning), build_command(tuning)):
        lines += ["```", text, "```", ""] if text else []
    if tuning.fresh and tuning.fresh.rows:
        lines += ["On fresh scenes:", "", *build_markdown_table(tuning.fresh), ""]
    lines += [f"- {sentence}" for sentence in tuning.sentences]
    lines += [f"- no figures: {m.row}, seed {m.seed}: {m.reason}" for m in tuning.missing]
    return "\n".join(lines) + "\n"


def _read_value(run: RunConfig, name: str) -> Any:
    if name == "server_learning_rate":
        return run.server_rate
    policy = name.removeprefix("policy.")
    return getattr(run if policy == name else run.policy, policy)


def _build_rung(comparison: Comparison, rounds: int) -> RungResult:
    names = {row.name for row in comparison.rows} | {m.row for m in comparison.missing}
    return RungResult(
        rounds=rounds,
        seeds=comparison.seeds,
        trials=sorted(names),
        scores={
            row.name: Score(
                success=row.success,
                loss=row.loss,
                is_complete=row.seeds == sorted(comparison.seeds),
            )
            for row in comparison.rows
        },
    )


def _list_missing(comparisons: Iterable[Comparison]) -> list[Missing]:
    """Each once: a cell may belong to two rungs."""
    found: list[Missing] = []
    for comparison in comparisons:
        found += [missing for missing in comparison.missing if missing not in found]
    return found


def _conclude(tuning: Tuning) -> Tuning:
    """With verdict, gaps and sentences."""
    if not tuning.winner:
        return _with_sentences(tuning, _explain_unfinished(tuning))
    if tuning.winner == DEFAULT:
        told = "Nothing better than the default was found: no trial did better on tuning scenes."
        return _with_sentences(tuning.model_copy(update={"verdict": "default"}), [told])
    fresh = tuning.fresh
    assert fresh is not None, "a winner that is not the default is tried again"
    gap = _find_gap(tuning, fresh)
    scores = tuning.rungs[-1].scores
    ours, theirs = (_value(tuning, scores[name]) for name in (tuning.winner, DEFAULT))
    tuning = tuning.model_copy(
        update={
            "tuning_gap": ours - theirs,
            "fresh_gap": gap,
            "verdict": _judge(tuning, gap) if fresh.is_complete else "unfinished",
            "settings": tuning.points[tuning.winner],
        }
    )
    return _with_sentences(tuning, _explain_winner(tuning))


def _find_gap(tuning: Tuning, fresh: Comparison) -> Gap | None:
    for row in fresh.rows:
        if row.name == tuning.winner:
            return row.loss_gap if tuning.objective == "loss" else row.success_gap
    return None


def _with_sentences(tuning: Tuning, sentences: Sequence[str]) -> Tuning:
    kept = (DEFAULT, tuning.winner)
    failed = sorted({m.row for m in tuning.missing if m.row not in kept and m.reason != NOT_YET})
    told = [f"Out because a run failed (--again tries anew): {_join(failed)}."] if failed else []
    return tuning.model_copy(update={"sentences": [*sentences, *told]})


def _judge(tuning: Tuning, gap: Gap | None) -> Verdict:
    if gap is None or not gap.is_real:
        return "not told apart"
    return "better" if _sign(tuning) * gap.value < 0 else "worse"


def _explain_unfinished(tuning: Tuning) -> list[str]:
    failed = [m for m in tuning.missing if m.row == DEFAULT and m.reason != NOT_YET]
    if failed:
        return ["The default itself has failed: without it nothing can be judged."]
    return [f"Rung {len(tuning.rungs)} of {tuning.num_rungs} is under way: no winner yet."]


def _explain_winner(tuning: Tuning) -> list[str]:
    name = tuning.winner
    if tuning.verdict == "unfinished":
        return [f"{name} has won on the tuning scenes; its comparison on others is not done."]
    figure = _figure_name(tuning.objective)
    gap = describe_gap(tuning)
    p = f" (p = {tuning.fresh_gap.p:.3g})" if tuning.fresh_gap else ""
    sentences = {
        "better": f"{name} is better than the default on fresh scenes: {figure} {gap}{p}.",
        "worse": f"Nothing better than the default was found: {name} is worse on fresh scenes, "
        f"{figure} {gap}{p}.",
        "not told apart": f"Nothing better than the default was found: {name} is not told apart "
        f"from it on fresh scenes, {figure} {gap}{p}.",
    }
    told = [sentences[tuning.verdict]]
    told.append(
        f"On tuning scenes the difference was {_signed(tuning, tuning.tuning_gap)}: the best of "
        f"{len(tuning.points) + 1} by the same figures, hence flattered; believe the fresh one."
    )
    if len(tuning.seeds) < 3:
        told.append("So few seeds say little about others: --seeds 0-4 does.")
    return told


def _value(tuning: Tuning, score: Score | Row) -> float:
    if tuning.objective == "success":
        return score.success.value
    return score.loss.value if score.loss else float("inf")


def _sign(tuning: Tuning) -> int:
    """Times a figure: lower is better."""
    return 1 if tuning.objective == "loss" else -1


def _score(tuning: Tuning, rung: RungResult, name: str) -> str:
    score = rung.scores.get(name)
    if score is None:
        return "failed" if name in rung.trials and tuning.winner else ""
    value = _value(tuning, score)
    text = f"{value:.4f}" if tuning.objective == "loss" else f"{100 * value:.1f} %"
    return text if score.is_complete else f"({text})"


def _interval(tuning: Tuning, score: Score | Row) -> str:
    found = score.loss if tuning.objective == "loss" else score.success
    if found is None:
        return "-"
    scale, digits = (1, 4) if tuning.objective == "loss" else (100, 1)
    value = f"{scale * found.value:.{digits}f}"
    if found.low is None or found.high is None:
        return value
    return f"{value} [{scale * found.low:.{digits}f}, {scale * found.high:.{digits}f}]"


def _signed(tuning: Tuning, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:+.4f}" if tuning.objective == "loss" else f"{100 * value:+.1f}"


def _figure_name(objective: Objective) -> str:
    return "held-out loss" if objective == "loss" else "success"


def _join(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def _fill(words: str, width: int) -> list[str]:
    """Lines whose words are whole."""
    return textwrap.wrap(words, width, break_long_words=False, break_on_hyphens=False)


def _wrap(sentence: str) -> str:
    return "\n  ".join(_fill(sentence, _WIDTH - 2))
