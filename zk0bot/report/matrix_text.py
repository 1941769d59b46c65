"""The matrix for people: tables of at most 80 columns, and Markdown with all intervals."""

from collections.abc import Sequence

from zk0bot.report.figure import Interval, percent, plus_minus
from zk0bot.report.matrix import (
    MATRIX_CHART_NAME,
    TITLES,
    UNSEEN,
    Generalisation,
    HeldoutScore,
    Matrix,
    MatrixRow,
    TaskScore,
    Unseen,
    colour_of,
)
from zk0bot.sim.pairs import Coverage

COVERED: dict[Coverage, str] = {
    "seen": "all", "part": "part", "unseen-pair": "none", "unseen-task": "never",
}  # fmt: skip
"""How much of a place any owner has trained on with a colour, for people."""


def build_matrix_tables(matrix: Matrix) -> list[str]:
    """Success by pair, action error by owner, generalisation: at most 80 columns."""
    if not matrix.rows:
        return []
    tables = [_build_success_table(matrix)]
    if any(row.heldout for row in matrix.rows):
        tables.append(_build_heldout_table(matrix))
    for unseen in UNSEEN:
        if any(unseen in row.generalisation for row in matrix.rows):
            tables.append(_build_generalisation_table(matrix, unseen))
    return tables


def build_matrix_markdown(matrix: Matrix) -> list[str]:
    """The same with all intervals, as lines of Markdown."""
    lines = ["", "## Every policy with every task", "", f"![matrix]({MATRIX_CHART_NAME})", ""]
    heads = [f"{colour_of(c.task)}, {c.place} ({COVERED[c.trained_on]})" for c in matrix.columns]
    rows = [[row.name, *(percent(score.success) for score in row.tasks)] for row in matrix.rows]
    lines += _to_markdown(["success in %", *heads], rows)
    measured = [row for row in matrix.rows if row.heldout]
    errors = [[row.name, *(_describe_error(row, score) for score in row.tasks)] for row in measured]
    lines += ["", *_to_markdown(["recorded: degrees; loss", *heads], errors)]
    heldout = [
        [row.name, *(_describe_error(row, score) for score in row.heldout)] for row in measured
    ]
    lines += ["", *_to_markdown(["held out: degrees; loss", *matrix.clients], heldout)]
    for unseen in UNSEEN:
        found = [(row.name, row.generalisation.get(unseen)) for row in matrix.rows]
        cells = [
            [name, percent(g.seen), percent(g.unseen), describe_score(g), _describe_ratio(g)]
            for name, g in found
            if g
        ]
        if cells:
            head = [TITLES[unseen], "seen", "unseen", "score", "loss ratio"]
            lines += ["", *_to_markdown(head, cells)]
    return [*lines, "", *(f"- {sentence}" for sentence in matrix.sentences)]


def describe_score(found: Generalisation) -> str:
    """Such as ``0.79 [0.65-0.92]``; ``-`` where nothing seen succeeds."""
    score = found.generalisation_score
    if score is None or score.low is None:
        return "-"
    end = f"{score.high:.2f}" if score.high is not None else "?"
    return f"{score.value:.2f} [{score.low:.2f}-{end}]"


def _build_success_table(matrix: Matrix) -> str:
    colours = dict.fromkeys(colour_of(column.task) for column in matrix.columns)
    each = len(matrix.columns) // len(colours)
    heads = [
        " " * 17 + "".join(f"{' ' + colour:<{7 * each}}" for colour in colours),
        " " * 17 + "".join(f"{column.place:>7}" for column in matrix.columns),
        f"{'trained on':<17}" + "".join(f"{COVERED[c.trained_on]:>7}" for c in matrix.columns),
    ]
    lines = [
        f"{row.name:<17.16}" + "".join(f"{100 * s.success.value:>7.0f}" for s in row.tasks)
        for row in matrix.rows
    ]
    return "\n".join(
        [
            "Success in % with each colour in each part of the table",
            *map(str.rstrip, heads),
            *lines,
            "trained on: how much of the place by any owner; never: nobody has the colour",
        ]
    )


def _build_heldout_table(matrix: Matrix) -> str:
    lines = [
        "Action error in degrees ± and loss on each owner's held-out episodes",
        (" " * 18 + "".join(f"{client:<20.19}" for client in matrix.clients)).rstrip(),
    ]
    for row in matrix.rows:
        if not row.heldout:
            continue
        cells = [
            f"{plus_minus(score.arm_error, 1):<11}{_describe_loss(row, score.loss):<9}"
            for score in row.heldout
        ]
        lines.append((f"{row.name:<18.17}" + "".join(cells)).rstrip())
    if any(row.kind == "alone" and row.heldout for row in matrix.rows):
        lines.append("(loss) is in units of an owner's own normalisation; degrees compare")
    return "\n".join(lines)


def _build_generalisation_table(matrix: Matrix, unseen: Unseen) -> str:
    lines = [
        f"Generalisation: {TITLES[unseen]}",
        f"{'':<18}{'seen':<16}{'unseen':<16}{'score':<18}loss ratio",
    ]
    for row in matrix.rows:
        found = row.generalisation.get(unseen)
        if found is None:
            continue
        cells = (
            f"{row.name:<18.17}",
            f"{percent(found.seen):<16}",
            f"{percent(found.unseen):<16}",
            f"{describe_score(found):<18}",
            _describe_ratio(found),
        )
        lines.append("".join(cells).rstrip())
    return "\n".join(lines)


def _describe_loss(row: MatrixRow, loss: Interval, *, with_width: bool = False) -> str:
    """In brackets where it is in units of one owner's normalisation."""
    figure = plus_minus(loss, 3) if with_width else f"{loss.value:.3f}"
    return f"({figure})" if row.kind == "alone" else figure


def _describe_ratio(found: Generalisation) -> str:
    return plus_minus(found.loss_ratio, 2) if found.loss_ratio else "-"


def _describe_error(row: MatrixRow, score: HeldoutScore | TaskScore) -> str:
    assert score.loss is not None, "a policy with a loss has one everywhere"
    assert score.arm_error is not None, "a policy with a loss has one everywhere"
    loss = _describe_loss(row, score.loss, with_width=True)
    return f"{plus_minus(score.arm_error, 2)}; {loss}"


def _to_markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
