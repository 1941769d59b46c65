"""The demonstration's report: one HTML file that fetches nothing from anywhere.

The chart lies inside it; videos are linked by relative path, so the folder can be moved as a whole.
"""

import base64
from html import escape
from pathlib import Path
from urllib.parse import quote

from zk0bot.files import write_text
from zk0bot.report.demo import (
    FEDERATED,
    DemoResult,
    Film,
    ModelResult,
    SectorCount,
    build_home_sentence,
    build_label,
    build_summary,
    ordered,
    rate_of,
)

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --line: #d8d8d8; --soft: #f4f5f7;
  --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #16181b; --line: #3a3d42; --soft: #22252a; --accent: #56b4e9; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.verdict { border-left: .4rem solid var(--accent); background: var(--soft); padding: .6rem 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); }
td small { opacity: .7; } tr.federated { font-weight: 600; background: var(--soft); }
img { max-width: 100%; background: #fff; border-radius: .4rem; }
.films { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: 1rem; }
figure { margin: 0; } video { width: 100%; border-radius: .4rem; background: #000; }
figcaption { font-size: .85rem; opacity: .8; }
"""


def write_page(path: Path, result: DemoResult, *, chart: Path) -> None:
    """Write the report to ``path``, atomically, with the PNG at ``chart`` inside."""
    write_text(path, build_page(result, chart_png=chart.read_bytes()))


def build_page(result: DemoResult, *, chart_png: bytes) -> str:
    """The whole document. Every text from outside is escaped."""
    image = base64.b64encode(chart_png).decode()
    sections = [
        "<h1>Three robot owners, one policy</h1>",
        _verdict(result),
        f'<img src="data:image/png;base64,{image}" alt="Closed-loop success of every policy in '
        'each part of the table, and the held-out loss by round">',
        "<h2>Success in closed loop</h2>",
        _table(result),
        "<p><small>Brackets: Wilson's 95 % interval. Bold: the owner's own part of the table. "
        "Loss: held-out, in the units of each policy's own normalisation, so that of an owner "
        "alone does not compare with the federated one.</small></p>",
        _films(result.films),
        "<h2>How it was done</h2>",
        _facts(result),
    ]
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>zk0bot demo, seed {result.seed}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _verdict(result: DemoResult) -> str:
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in result.reasons)
    home = escape(build_home_sentence(result))
    return (
        f'<div class="verdict"><strong>{escape(result.verdict)}</strong><ul>{reasons}</ul>'
        f"{f'<p>{home}</p>' if home else ''}</div>"
    )


def _table(result: DemoResult) -> str:
    models = ordered(result.results)
    sectors = list(models[0][1].per_sector) if models else []
    head = "".join(f"<th>{escape(text)}</th>" for text in ("", *sectors, "all", "held-out loss"))
    rows = "\n".join(_table_row(name, model, result.home.get(name)) for name, model in models)
    return f'<div class="scroll"><table><tr>{head}</tr>\n{rows}\n</table></div>'


def _table_row(name: str, model: ModelResult, home: str | None) -> str:
    cells = [_cell(count, is_home=sector == home) for sector, count in model.per_sector.items()]
    loss = "-" if model.heldout_loss is None else f"{model.heldout_loss:.3f}"
    mark = ' class="federated"' if name == FEDERATED else ""
    whole = _cell(model, is_home=False)
    label = escape(build_label(name))
    return f"<tr{mark}><td>{label}</td>{''.join(cells)}{whole}<td>{loss}</td></tr>"


def _cell(count: ModelResult | SectorCount, *, is_home: bool) -> str:
    rate = rate_of(count)
    share = f"{100 * rate.value:.0f} %"
    shown = f"<b>{share}</b>" if is_home else share
    interval = f"{rate.successes}/{rate.episodes} [{100 * rate.low:.0f}-{100 * rate.high:.0f}]"
    return f"<td>{shown} <small>{interval}</small></td>"


def _films(films: list[Film]) -> str:
    if not films:
        return ""
    figures = "\n".join(
        f'<figure><video controls loop muted playsinline preload="metadata" '
        f'src="{escape(quote(film.path))}"></video>'
        f"<figcaption>{escape(film.caption)}</figcaption></figure>"
        for film in films
    )
    return f'<h2>To watch</h2>\n<div class="films">\n{figures}\n</div>'


def _facts(result: DemoResult) -> str:
    facts = build_summary(result)[-2:]
    phases = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.phases_s.items())
    files = [f"{name}: {path}" for name, path in result.files.items()]
    items = "".join(f"<li>{escape(text)}</li>" for text in (*facts, f"Phases: {phases}.", *files))
    return f"<ul>{items}</ul>"
