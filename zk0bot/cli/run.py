"""``zk0bot run``."""

from typing import Annotated

import typer

from zk0bot.cli.live import follow
from zk0bot.cli.option import ConfigFile, JsonFlag, Settings, build_command, build_machine, get_show
from zk0bot.cli.view import RunView
from zk0bot.config.load import Sources, load_run
from zk0bot.ops.runs import submit_run, watch
from zk0bot.records import RUN_EXIT_CODES

app = build_command()


@app.command()
def run(
    ctx: typer.Context,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds of training and aggregation.")
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Watch the run to its end.")
    ] = True,
    config: ConfigFile = None,
    set_: Settings = None,
    json: JsonFlag = False,
) -> None:
    """Run rounds of federated training with the clients that are connected.

    The exit status is the verdict's: 0 completed, 3 with warnings, 4 failed, 5 stopped. Ctrl-C
    ends the view, not the run.
    """
    show = get_show(ctx)
    flags = {"num_server_rounds": rounds}
    loaded = load_run(Sources(file=config, flags=flags, pairs=tuple(set_ or ())))
    show.notices(loaded.notices)
    machine = build_machine(show)
    record = submit_run(machine, loaded.config)
    if not stream:
        show.result(RunView(record))
        return
    try:
        record = follow(show, watch(machine, record.run_id))
    except KeyboardInterrupt:
        show.note(f"run {record.run_id} goes on; zk0bot stop ends it, zk0bot status shows it")
        raise
    show.result(RunView(record))
    raise typer.Exit(RUN_EXIT_CODES[record.state])
