"""Laws, their fits and what follows from them, on runs made from known constants."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn

from layerwright.core.calibration import Calibration
from layerwright.core.errors import InputError
from layerwright.theory.scaling import (
    LAWS,
    BatchLaw,
    LawFit,
    Run,
    RunTable,
    allocate_compute,
    count_params,
    critical_batch,
    data_needed,
    early_stop_step,
    fit_law,
    minimum_steps,
    noise_scale,
    plan_runs,
    suggest_shape,
    training_flops,
)
from layerwright.theory.scaling.laws import published


def made(law: str, count: int = 30, noise: float = 0.0, seed: int = 0, **constants: float) -> list[Run]:
    """Runs whose losses follow `law` with the published constants."""
    form = LAWS[law]
    draw = numpy.random.default_rng(seed)
    n = numpy.exp(draw.uniform(math.log(1e5), math.log(1e8), count))
    d = numpy.exp(draw.uniform(math.log(1e6), math.log(1e10), count))
    s = numpy.exp(draw.uniform(math.log(1e3), math.log(1e5), count))
    columns = {"n_params": n, "tokens": d, "steps": s, "flops": 6 * n * d}
    theta = form.theta(constants or published(law))
    logs = numpy.log([columns[name] for name in form.inputs])
    losses = numpy.exp(form.log_loss(theta, logs) + draw.normal(0, noise, count))
    return [
        Run(float(n[i]), float(d[i]), float(losses[i]), steps=float(s[i]), batch_tokens=1000.0) for i in range(count)
    ]


def exact(law: str, **constants: float) -> LawFit:
    """A fit that has the published constants."""
    form = LAWS[law]
    theta = form.theta(constants or published(law))
    largest = dict.fromkeys((*form.inputs, "flops"), 1e30)
    return LawFit(form, theta, theta[None], numpy.zeros(30), largest, 1.0, 0.0)


@pytest.mark.parametrize("name", [*LAWS, "ND, floor"])
def test_derivatives_against_differences(name: str) -> None:
    form = LAWS[name.partition(",")[0]]
    if "floor" in name:
        form = type(form)(form.name, form.inputs, form.form, floor=True)
    draw = numpy.random.default_rng(0)
    theta = numpy.concatenate([draw.uniform(0.1, 0.5, len(form.inputs)), draw.uniform(1, 3, form.parameters)])
    theta = theta[: form.parameters]
    logs = draw.uniform(2, 12, (len(form.inputs), 5))
    _, slopes = form.gradient(theta, logs)
    for place in range(form.parameters):
        step = numpy.zeros(form.parameters)
        step[place] = 1e-6
        difference = (form.log_loss(theta + step, logs) - form.log_loss(theta - step, logs)) / 2e-6
        numpy.testing.assert_allclose(slopes[:, place], difference, rtol=1e-6, atol=1e-9)


def test_the_joint_law_has_the_others_as_limits() -> None:
    constants = published("ND")
    n, d = 3e7, 2e9
    value = ((constants["N_c"] / n) ** (0.076 / 0.103) + constants["D_c"] / d) ** 0.103
    fit = exact("ND")
    assert fit.predict(n_params=n, tokens=d).loss == pytest.approx(value, rel=1e-12)
    assert fit.predict(n_params=n, tokens=1e60, allow_extrapolation=True).loss == pytest.approx(
        (constants["N_c"] / n) ** 0.076
    )
    assert fit.predict(n_params=1e80, tokens=d, allow_extrapolation=True).loss == pytest.approx(
        (constants["D_c"] / d) ** 0.103
    )


@pytest.mark.parametrize("law", ["N", "D", "C", "ND", "NS"])
def test_known_constants_are_found(law: str) -> None:
    fit = fit_law(made(law), law, bootstrap=50)
    for name, value in published(law).items():
        assert math.log(fit.params[name]) == pytest.approx(math.log(value), rel=1e-4, abs=1e-6)
    assert fit.identified and float(numpy.abs(fit.residuals).max()) < 1e-6


def test_intervals_hold_the_constants() -> None:
    inside = []
    for seed in range(6):
        fit = fit_law(made("ND", noise=0.005, seed=seed), "ND", bootstrap=200, seed=seed)
        for name in ("alpha_N", "alpha_D"):
            low, high = fit.interval(name)
            inside.append(low <= published("ND")[name] <= high)
            assert abs(fit.params[name] / published("ND")[name] - 1) < 0.08
        assert 0.003 < fit.noise < 0.008
    assert sum(inside) >= 9


def test_units_of_the_inputs_change_scales_alone() -> None:
    runs = made("ND", noise=0.005)
    millions = [Run(r.n_params, r.tokens / 1e6, r.loss) for r in runs]
    first, second = fit_law(runs, bootstrap=0), fit_law(millions, bootstrap=0)
    assert first.params["alpha_D"] == pytest.approx(second.params["alpha_D"], rel=1e-4)
    assert first.params["D_c"] / second.params["D_c"] == pytest.approx(1e6, rel=1e-2)


def test_a_floor_is_found_where_there_is_one() -> None:
    constants = {"alpha_N": 0.34, "N_c": 5e7, "alpha_D": 0.28, "D_c": 2e9, "L_inf": 1.2}
    runs = made("chinchilla", 40, 0.003, **constants)
    fit, none = fit_law(runs, "chinchilla", bootstrap=200), fit_law(runs, "ND", bootstrap=0)
    low, high = fit.interval("L_inf")
    assert low <= 1.2 <= high and fit.params["L_inf"] == pytest.approx(1.2, rel=0.1)
    assert fit.aicc < none.aicc - 10
    given = fit_law(made("N", **published("N")), "N", irreducible=0.5, bootstrap=0)
    assert given.params["L_inf"] == pytest.approx(0.5)


def test_an_outlier_moves_a_robust_fit_little() -> None:
    runs = made("N", noise=0.001)
    runs[3] = Run(runs[3].n_params, runs[3].tokens, runs[3].loss * 1.5)
    robust, plain = (fit_law(runs, "N", robust=kind, bootstrap=0).params["alpha_N"] for kind in ("huber", "none"))
    assert abs(robust - 0.076) < 0.2 * abs(plain - 0.076)


def test_resampling_keeps_repetitions_together() -> None:
    runs = [Run(r.n_params, r.tokens, r.loss * (1 + 0.001 * k), seed=k) for r in made("N", 8) for k in range(3)]
    table = RunTable.from_records(runs)
    assert len(set(table.groups().tolist())) == 8
    fit = fit_law(table, "N", bootstrap=30)
    assert fit.samples.shape == (30, 2)
    assert numpy.array_equal(fit.samples, fit_law(table, "N", bootstrap=30).samples)


def test_what_the_data_does_not_support_is_refused() -> None:
    fit = fit_law(made("ND", noise=0.003), bootstrap=100)
    far = {"n_params": 1e10, "tokens": 1e12}
    with pytest.raises(InputError, match="beyond the largest run"):
        fit.predict(**far)
    told = fit.predict(allow_extrapolation=True, **far)
    near = fit.predict(n_params=1e8, tokens=1e10)
    assert told.reach > 100 > near.reach and told.low < told.loss < told.high
    assert (told.high - told.low) / told.loss > (near.high - near.low) / near.loss
    flat = [Run(r.n_params, r.tokens, 3.0 + 0.1 * math.sin(7 * i)) for i, r in enumerate(made("ND"))]
    poor = fit_law(flat, bootstrap=100)
    assert not poor.identified
    with pytest.raises(InputError, match="not identified"):
        poor.predict(n_params=1e6, tokens=1e8)
    with pytest.raises(InputError, match="do not support"):
        allocate_compute(poor, 1e15)


def test_the_best_size_in_closed_form() -> None:
    """Kaplan et al. (2020), appendix B: ``C = 6 B* Nc Sc k^(-1/aB) (aN/aS)^(-1/aS) A^-(1/aN + 1/aB + 1/aS)``, doubled here
    since at the critical batch twice the least compute is spent.
    """
    constants = published("NS")
    an, ns, asteps, sc = constants["alpha_N"], constants["N_c"], constants["alpha_S"], constants["S_c"]
    batch = BatchLaw(2e8, 0.21)
    flops = 1e21
    ratio = an / asteps
    total = 1 / an + 1 / 0.21 + 1 / asteps
    front = 12 * 2e8 * ns * sc * (1 + ratio) ** (-1 / 0.21) * ratio ** (-1 / asteps)
    a = (flops / front) ** (-1 / total)
    found = allocate_compute(exact("NS"), flops, batch=batch)
    assert found.n_params == pytest.approx(ns * a ** (-1 / an), rel=1e-4)
    assert found.loss == pytest.approx(a * (1 + ratio), rel=1e-6)
    assert found.batch_tokens == pytest.approx(batch(found.loss), rel=1e-6)
    assert found.steps is not None and found.batch_tokens is not None
    assert 6 * found.n_params * found.batch_tokens * found.steps == pytest.approx(flops)
    assert minimum_steps(found.steps, found.batch_tokens, batch(found.loss)) == pytest.approx(found.steps / 2)


def test_the_best_size_against_a_numeric_minimum() -> None:
    fit = exact("chinchilla", alpha_N=0.34, N_c=4.7e7, alpha_D=0.28, D_c=2.1e9, L_inf=1.7)
    found = allocate_compute(fit, 1e19)
    best = minimize_scalar(
        lambda n: fit.predict(n_params=math.exp(n), tokens=1e19 / 6 / math.exp(n)).loss,
        bounds=(10, 30),
        method="bounded",
        options={"xatol": 1e-10},
    )
    assert found.loss == pytest.approx(float(best.fun), rel=1e-9)
    assert math.log(found.n_params) == pytest.approx(float(best.x), abs=1e-4)
    # the exponents of the optimum: N ~ C^(beta / (alpha + beta))
    more = allocate_compute(fit, 1e21)
    assert math.log(more.n_params / found.n_params) / math.log(100) == pytest.approx(0.28 / 0.62, rel=1e-4)
    fixed = allocate_compute(exact("NS"), 1e20, batch=1e6)
    assert fixed.batch_tokens == 1e6 and fixed.steps is not None
    assert 6 * fixed.n_params * 1e6 * fixed.steps == pytest.approx(1e20)


def test_data_stops_and_shapes() -> None:
    fit = exact("ND")
    tokens = data_needed(fit, 1e8)
    unlimited = fit.predict(n_params=1e8, tokens=1e60, allow_extrapolation=True).loss
    assert fit.predict(n_params=1e8, tokens=tokens).loss == pytest.approx(unlimited + 0.02, rel=1e-9)
    assert tokens < data_needed(fit, 1e9)
    assert early_stop_step(exact("NS"), 3.5, 3.0) == pytest.approx(2.1e3 / 0.5 ** (1 / 0.76))
    shape = suggest_shape(85e6, aspect=64)
    assert shape["n_layer"] == 12 and shape["d_model"] == 768 and shape["n_params"] == 12 * 12 * 768**2


def test_critical_batch_from_runs() -> None:
    records = [
        {"loss": loss, "batch_tokens": batch, "steps": 100 / loss * (1 + (2e4 * loss**-4) / batch)}
        for loss in (2.0, 3.0, 4.0)
        for batch in (1e2, 1e3, 1e4, 1e5)
    ]
    law = critical_batch(records)
    assert law.scale == pytest.approx(2e4, rel=1e-4) and law.alpha == pytest.approx(0.25, rel=1e-4)
    assert law(3.0) == pytest.approx(2e4 / 81, rel=1e-4) and law.measured[0][2] == pytest.approx(50, rel=1e-4)
    assert critical_batch(records[:4])(123.0) == pytest.approx(2e4 / 16, rel=1e-4)
    with pytest.raises(InputError, match="3 batch sizes"):
        critical_batch(records[:3])


def test_noise_scale_of_gradients_that_are_known() -> None:
    """The gradient by `w` of ``w . x`` is ``x``, with a mean of 1 and a deviation of 3 in each of 64 places."""
    model = nn.Linear(64, 1, bias=False)
    x = 1 + 3 * torch.randn(1600, 1, 64, generator=torch.Generator().manual_seed(0))
    data = Calibration(list(x), lambda network, batch: network(batch).mean())
    assert noise_scale(model, data, decay=0.99) == pytest.approx(9.0, rel=0.2)
    assert noise_scale(model, data, small=2, large=16, decay=0.99) == pytest.approx(9.0, rel=0.2)
    assert model.weight.grad is None
    with pytest.raises(InputError, match="small must divide large"):
        noise_scale(model, data, small=3, large=8)


def test_operations_against_a_count() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from layerwright.studies.sequence import tiny_llama

    model = tiny_llama(64, 3, 4, attn_implementation="eager")
    n = count_params(model)
    assert n == sum(p.numel() for p in model.parameters()) - 256 * 64
    assert count_params(model, embeddings=True) == n + 256 * 64
    ids = torch.zeros(2, 32, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    head = 3 * 2 * 256 * 64 * 64
    # the first block's inputs need no gradient through the embedding's products; attention counts whole there
    assert training_flops(n, 64, 3, 64, 64) + head == pytest.approx(counter.get_total_flops(), rel=0.05)
    with pytest.raises(InputError, match="all three or none"):
        training_flops(1, 1, n_layer=3)


def test_plans_of_runs_keep_to_the_budget_and_tell_more_than_equal_ones() -> None:
    rows = plan_runs(1e15, 10)
    assert len({(row["n_params"], row["tokens"]) for row in rows}) == 10
    assert sum(row["flops"] for row in rows) <= 1e15
    form, theta = LAWS["ND"], LAWS["ND"].theta(published("ND"))

    def information(n: Any, d: Any) -> float:
        slopes = form.gradient(theta, numpy.log([n, d]))[1]
        return float(numpy.linalg.slogdet(slopes.T @ slopes)[1])

    even = numpy.geomspace(1e4, 3e6, 10)
    planned = information([row["n_params"] for row in rows], [row["tokens"] for row in rows])
    assert planned > information(even, 5 * even**1.0001) + 2
    with pytest.raises(InputError, match="raise it"):
        plan_runs(1e3)


def test_files_and_their_faults(tmp_path: Path) -> None:
    rows = [{"n_params": r.n_params, "tokens": r.tokens, "loss": r.loss, "note": "x"} for r in made("ND", 8)]
    lines, table = tmp_path / "runs.jsonl", tmp_path / "runs.csv"
    lines.write_text("\n".join(map(json.dumps, rows)))
    table.write_text("n_params,tokens,loss,note\n" + "\n".join(",".join(map(str, row.values())) for row in rows))
    for path in (lines, table):
        found = RunTable.from_records(path)
        assert len(found) == 8 and found.runs[0].meta["note"] == "x"
        assert found.runs[2].compute == pytest.approx(6 * rows[2]["n_params"] * rows[2]["tokens"])
    with pytest.raises(FileNotFoundError, match="no runs at"):
        RunTable.from_records(tmp_path / "none.csv")
    table.write_text("n_params,token,loss\n1,2,3\n")
    with pytest.raises(InputError, match=r"tokens.*did you mean token"):
        RunTable.from_records(table)
    table.write_text("n_params,tokens,loss\n1,2,many\n")
    with pytest.raises(InputError, match="run 1: loss is 'many'"):
        RunTable.from_records(table)
    for row, words in (
        ({"n_params": 1, "tokens": 2, "loss": float("nan")}, "run 1: loss"),
        ({"n_params": 1, "tokens": 2, "loss": -1}, "run 1: loss"),
        ({"n_params": 0, "tokens": 2, "loss": 1}, "run 1: n_params"),
    ):
        with pytest.raises(InputError, match=words):
            RunTable.from_records([row])
    mixed = [{**rows[0], "unit": "bits"}, rows[1]]
    with pytest.raises(InputError, match="several units"):
        RunTable.from_records(mixed)
    diverged = [{**row, "vocabulary": 256} for row in rows] + [
        {"n_params": 1e6, "tokens": 1e6, "loss": 9.0, "vocabulary": 256}
    ]
    with pytest.warns(UserWarning, match="loss above that of guessing"):
        kept = RunTable.from_records(diverged)
    assert max(run.loss for run in kept.runs) <= math.log(256)


def test_bad_input() -> None:
    runs = made("ND")
    with pytest.raises(InputError, match="unknown law 'NX'"):
        fit_law(runs, "NX")
    with pytest.raises(InputError, match="5 different runs for 4 parameters"):
        fit_law(runs[:5], "ND")
    with pytest.raises(InputError, match="same n_params"):
        fit_law([Run(1e6, r.tokens, r.loss) for r in runs], "ND")
    with pytest.raises(InputError, match="steps: 30 of 30 runs"):
        fit_law([Run(r.n_params, r.tokens, r.loss) for r in runs], "NS")
    with pytest.raises(InputError, match="irreducible: got 9"):
        fit_law(runs, irreducible=9.0)
    fit = exact("ND")
    with pytest.raises(InputError, match="flops: got 0"):
        allocate_compute(fit, 0)
    with pytest.raises(InputError, match="does not divide compute"):
        allocate_compute(exact("N"), 1e10)
    with pytest.raises(InputError, match="batch: law NS"):
        allocate_compute(exact("NS"), 1e10)
    with pytest.raises(InputError, match="unknown input 'token'"):
        fit.predict(token=1)
    with pytest.raises(InputError, match="needs tokens="):
        fit.predict(n_params=1)
    with pytest.raises(InputError, match="n_params: got -1"):
        suggest_shape(-1)
