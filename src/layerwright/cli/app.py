"""The application: all commands, in the order in which a job uses them."""

from __future__ import annotations

import typer

from layerwright.cli import changing, deciding, showing
from layerwright.cli.bench_mq import bench_mq
from layerwright.cli.depth import depth
from layerwright.cli.growing import grow
from layerwright.cli.init import init
from layerwright.cli.place import place
from layerwright.cli.scaling import scaling
from layerwright.cli.serve import serve
from layerwright.cli.shape import shape

__all__ = ["app"]

app = typer.Typer(
    name="layerwright",
    help="Engineer neural networks one layer at a time.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    pass


for _command in (
    deciding.check,
    deciding.inspect,
    depth,
    deciding.plan,
    place,
    bench_mq,
    changing.apply,
    changing.tune,
    showing.measure,
    changing.export,
    changing.optimize,
    serve,
    grow,
    shape,
    init,
    showing.report,
    showing.recipes,
    showing.systems,
    showing.study,
):
    app.command()(_command)

app.add_typer(scaling, name="scaling")
