"""``python -m zk0bot.report DIR``: draw chart and report from ``DIR/demo.json``.

A process of its own, so that the command line never loads matplotlib.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from zk0bot.files import read_record
from zk0bot.report.chart import draw_demo
from zk0bot.report.demo import CHART_NAME, PAGE_NAME, RESULT_NAME, DemoResult
from zk0bot.report.page import write_page


def main(arguments: Sequence[str]) -> None:
    (folder,) = map(Path, arguments)
    result = read_record(folder / RESULT_NAME, DemoResult)
    draw_demo(folder / CHART_NAME, result)
    write_page(folder / PAGE_NAME, result, chart=folder / CHART_NAME)


if __name__ == "__main__":
    main(sys.argv[1:])
