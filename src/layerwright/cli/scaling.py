"""`layerwright scaling`: laws fitted to one's own training runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from layerwright.cli.console import emit, say, show_table
from layerwright.cli.options import Json, Seed
from layerwright.core.errors import InputError

__all__ = ["scaling"]

scaling = typer.Typer(help="Scaling laws from your own training runs.", no_args_is_help=True)

Law = Annotated[
    str, typer.Option("--law", help="N, D, C (flops), ND (Kaplan), NS (with steps) or chinchilla (with a floor).")
]
Further = Annotated[
    bool, typer.Option("--allow-extrapolation", help="Answer beyond 100 times the largest run, or from poor fits.")
]


@scaling.command()
def fit(
    runs: Annotated[Path, typer.Argument(metavar="RUNS", help=".csv or .jsonl with n_params, tokens, loss, ...")],
    law: Law = "ND",
    irreducible: Annotated[
        str, typer.Option("--irreducible", help="A loss that no run falls below: zero, fit, or a number.")
    ] = "zero",
    at: Annotated[
        str | None, typer.Option("--at", help="Predict there, such as n_params=1e8,tokens=2e9.", metavar="INPUTS")
    ] = None,
    flops: Annotated[
        float | None, typer.Option("--flops", help="Divide this much compute between size and data.")
    ] = None,
    batch_tokens: Annotated[float | None, typer.Option("--batch-tokens", help="Of a batch, for the law NS.")] = None,
    bootstrap: Annotated[int, typer.Option("--bootstrap", min=0, help="Resamplings of the runs.")] = 500,
    page: Annotated[Path | None, typer.Option("--out", "-o", help="Write a page with the curves (.html).")] = None,
    allow_extrapolation: Further = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Fit a law to training runs, with intervals; predict a loss, or divide compute.

    Example: `layerwright scaling fit runs.csv --law chinchilla --at n_params=1e8,tokens=2e9 --flops 1e18`
    """
    from layerwright.theory.scaling import RunTable, allocate_compute, fit_law

    floor: Any = irreducible if irreducible in ("zero", "fit") else _number("irreducible", irreducible)
    inputs = _inputs(at) if at else None
    table = RunTable.from_records(runs)
    found = fit_law(table, law, irreducible=floor, bootstrap=bootstrap, seed=seed)
    told = found.predict(allow_extrapolation=allow_extrapolation, **inputs) if inputs else None
    split = (
        allocate_compute(found, flops, batch=batch_tokens, allow_extrapolation=allow_extrapolation) if flops else None
    )
    if page is not None:
        from layerwright.report.scaling import write_scaling

        write_scaling(found, table, page, told=told, inputs=inputs)
    if json:
        data = found.to_data() | {"runs": len(table)}
        if told is not None:
            data["prediction"] = {"inputs": inputs, "loss": told.loss, "low": told.low, "high": told.high}
        emit(data | ({"allocation": split.to_data()} if split else {}))
        return
    rows = [[name, value, *found.interval(name)] for name, value in found.params.items()]
    show_table(f"{law}: {len(table)} runs", ["", "value", "95 % from", "to"], rows, left=1)
    say(f"deviation of a run around the law: {found.noise:.2%} of its loss")
    if not found.identified:
        say(f"not identified: {'; '.join(found.reasons)}")
    if told is not None:
        say(f"loss at {at}: {told.loss:.4f} [{told.low:.4f}, {told.high:.4f}], {told.reach:.3g}x the largest run")
    if split is not None:
        low, high = split.n_params_interval
        more = f", batches of {split.batch_tokens:.3g} tokens, {split.steps:.3g} steps" if split.batch_tokens else ""
        say(
            f"with {flops:.3g} operations: {split.n_params:.3g} parameters [{low:.3g}, {high:.3g}], {split.tokens:.3g} "
            f"tokens{more}: loss {split.loss:.4f} [{split.low:.4f}, {split.high:.4f}]"
        )
        say(f"note: {split.caution}")
    if page is not None:
        say(f"written to {page}")


@scaling.command()
def design(
    budget: Annotated[float, typer.Argument(metavar="FLOPS", help="Operations of all runs together.")],
    runs: Annotated[int, typer.Option("--runs", min=1, help="How many.")] = 12,
    law: Annotated[str, typer.Option("--law", help="ND or chinchilla.")] = "ND",
    json: Json = False,
) -> None:
    """Which small runs determine a law best within a budget of compute.

    Example: `layerwright scaling design 1e15 --runs 12`
    """
    from layerwright.theory.scaling import plan_runs

    rows = plan_runs(budget, runs, law)
    if json:
        emit(rows)
        return
    show_table("Runs", ["n_params", "tokens", "flops"], [list(row.values()) for row in rows], left=0)


def _inputs(text: str) -> dict[str, Any]:
    """``a=1,b=2`` as a mapping."""
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, sign, value = part.partition("=")
        if not sign:
            raise InputError(f"at: got {part!r}, expected name=number, such as n_params=1e8")
        found[name.strip()] = _number(name.strip(), value)
    return found


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"{name}: got {text!r}, expected a number") from error
