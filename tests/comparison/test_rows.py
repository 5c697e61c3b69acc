# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import (
    draw_x,
    full_covariance_guide,
    initialise,
    make_model,
    make_quadratic,
    mean_field_guide,
    z_p_value,
)
from pyro.infer import MCMC, NUTS, Trace_ELBO
from referee import ALPHA, CERTAIN, bracket, normal
from scipy import stats
from torch import Tensor

from pyro_lvebm import (
    LVEBM,
    AutoParticles,
    ElboTable,
    ImportanceWeighted,
    LaplaceApproximation,
    PriorProposal,
    TemperedPool,
    compare_elbo,
)
from pyro_lvebm.comparison.table import mean_over_data
from pyro_lvebm.evidence import programs as model_evidence
from pyro_lvebm.sampling.weights import pareto_k

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

N = 120


@pytest.fixture(scope="module")
def ebm() -> LVEBM:
    return make_quadratic(pool=TemperedPool(4, 16, seed=0))


@pytest.fixture(scope="module")
def x(ebm: LVEBM) -> Tensor:
    return draw_x(ebm, N, seed=1)


@pytest.fixture(scope="module")
def guides(ebm: LVEBM, x: Tensor) -> dict[str, Any]:
    model = make_model(ebm, 50)
    return {
        "mean field": mean_field_guide(model, ebm, x),
        "full covariance": full_covariance_guide(model, ebm, x),
    }


@pytest.fixture(autouse=True)
def exact_log_z(monkeypatch: pytest.MonkeyPatch, ebm: LVEBM) -> None:
    """log Z cancels in every gap, and its closed form makes the elbo comparable too."""
    log_z = float(ebm.f.log_partition().detach())
    monkeypatch.setattr(model_evidence, "log_partition", lambda *args, **kwargs: bracket(log_z))
    ebm.pool.log_partition = torch.tensor(log_z, dtype=ebm.pool.u.dtype)


def prior_elbo(ebm: LVEBM, x: Tensor) -> Tensor:
    """E over base_z of log base_x − f − log Z for every datum, by many draws, with its error."""
    generator = torch.Generator().manual_seed(7)
    z = torch.randn(40_000, ebm.base_z.dim, generator=generator, dtype=x.dtype)
    z = ebm.base_z.unwhiten(z)
    with torch.no_grad():
        terms = [-ebm.f(row.expand(len(z), -1), z) for row in x]
        value = torch.stack([t.mean() for t in terms]) + ebm.base_x.log_prob(x)
    return value - ebm.f.log_partition().detach()


def table_of(ebm: LVEBM, x: Tensor, rows: dict[str, Any], **options: Any) -> ElboTable:
    pyro.clear_param_store()
    return compare_elbo(make_model(ebm, 50), rows, x, **options)


def test_laplace_is_exact_for_gaussian_posteriors(ebm: LVEBM, x: Tensor) -> None:
    """Its weights are then constant and equal to the closed form of the log evidence."""
    table = table_of(ebm, x, {"Laplace": LaplaceApproximation()})
    row = table.rows.loc["Laplace"]
    exact = float(ebm.f.log_evidence(x).detach().mean())
    assert row["elbo"] == pytest.approx(exact, abs=1e-4)
    assert row["elbo_se"] < 1e-4 and row["parameters"] == 0 and row["pareto_k"] == -math.inf


def test_prior_row_is_the_elbo_of_the_base(ebm: LVEBM, x: Tensor) -> None:
    """False alarm ALPHA; with the closed form off by a tenth of a nat the check fails."""
    row = table_of(ebm, x, {"prior": PriorProposal()}, num_samples=400).rows.loc["prior"]
    expected = float(prior_elbo(ebm, x).mean())
    assert z_p_value(row["elbo"], row["elbo_se"], expected) > ALPHA
    assert z_p_value(row["elbo"], row["elbo_se"], expected - 0.5) < CERTAIN
    assert row["kl_gap"] > 0.1  # the prior is no posterior


def test_importance_weights_tighten_a_guide(ebm: LVEBM, x: Tensor, guides: dict[str, Any]) -> None:
    """L_1 < L_4 < L_64 ≤ log p(x), each step by more than five standard errors of the difference.

    The same guide may stand in several rows.
    """
    guide = guides["mean field"]
    rows = {"1": guide, "4": ImportanceWeighted(guide, 4), "64": ImportanceWeighted(guide, 64)}
    table = table_of(ebm, x, rows)
    assert list(table.rows.index) == ["64", "4", "1", "prior"]
    for better, worse in (("4", "1"), ("64", "4")):
        difference = table.differences(worse).loc[better]
        assert difference["difference"] > 5.0 * difference["std_error"]
    top = table.rows.loc["64"]
    exact = float(ebm.f.log_evidence(x).detach().mean())
    assert stats.norm.sf((top["elbo"] - exact) / top["elbo_se"]) > ALPHA
    assert (table.rows["parameters"][:3] == table.rows["parameters"].iloc[0]).all()


def test_the_bound_of_one_importance_sample_is_the_elbo(ebm: LVEBM, x: Tensor) -> None:
    with pytest.raises(ValueError, match="num_particles must be at least 2; got 1"):
        ImportanceWeighted(PriorProposal(), 1)  # type: ignore[arg-type]


def test_draws_of_nuts_make_a_row(ebm: LVEBM, x: Tensor) -> None:
    """NUTS finds the posterior, so its gap is zero within error; false alarm ALPHA."""
    few = x[:10]
    model = make_model(ebm)
    with torch.random.fork_rng(), ebm.frozen():
        torch.manual_seed(0)
        kernel = NUTS(model, max_tree_depth=4)
        mcmc = MCMC(kernel, num_samples=60, warmup_steps=30, disable_progbar=True)
        mcmc.run(few)
    pyro.clear_param_store()
    table = compare_elbo(model, {"NUTS": mcmc, "prior": PriorProposal()}, few, num_samples=200)
    row = table.rows.loc["NUTS"]
    assert row["parameters"] == 60 * 10 * ebm.base_z.dim
    # A Gaussian fitted to 60 draws, annealed on 32 temperatures, loses a few thousandths.
    assert abs(row["kl_gap"]) < 0.02 + 3.5 * row["kl_gap_se"]
    assert table.rows.loc["prior", "kl_gap"] > 10.0 * abs(row["kl_gap"])


def test_mcmc_without_the_latents_is_refused(ebm: LVEBM, x: Tensor) -> None:
    def other() -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))

    with torch.random.fork_rng():
        mcmc = MCMC(NUTS(other), num_samples=2, warmup_steps=1, disable_progbar=True)
        mcmc.run()
    with pytest.raises(ValueError, match=r"no draws of the latents \['scene_z'\]"):
        table_of(ebm, x[:10], {"NUTS": mcmc})


def test_particles_alone_are_refused(ebm: LVEBM, x: Tensor) -> None:
    model = make_model(ebm, 50)
    guide = AutoParticles(model, 2)
    initialise(guide, x)
    with pytest.raises(ValueError, match="pass the Saddle"):
        table_of(ebm, x, {"particles": guide})


@pytest.mark.parametrize("name", ["mean field", "full covariance"])
def test_guide_rows_are_those_of_pyro_with_ten_thousand_draws(
    ebm: LVEBM, x: Tensor, guides: dict[str, Any], name: str
) -> None:
    """Trace_ELBO over 100 losses of 100 draws; false alarm ALPHA for each guide."""
    row = table_of(ebm, x, {name: guides[name]}, num_samples=200).rows.loc[name]
    model = make_model(ebm)  # all data at once
    elbo = Trace_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad(), torch.random.fork_rng(), pyro.poutine.block(), ebm.frozen():
        torch.manual_seed(3)
        found = np.array([-elbo.loss(model, guides[name], x) / N for _ in range(100)])
    error = math.hypot(found.std(ddof=1) / 10.0, row["elbo_se"])
    assert z_p_value(row["elbo"], error, float(found.mean())) > ALPHA
    assert z_p_value(row["elbo"] + 8.0 * error, error, float(found.mean())) < CERTAIN


def test_pareto_shape_of_known_tails() -> None:
    """Weights u^(−k) have the shape k; the estimate is within 0.15 of it at 4,000 draws."""
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(4000, 40, generator=generator)
    for k in (0.3, 0.7, 1.2):
        found = pareto_k(-k * u.log())
        assert abs(float(found.mean()) - k) < 0.15
    assert torch.isinf(pareto_k(torch.zeros(100, 2))).all()
    assert torch.isnan(pareto_k(torch.randn(24, 2, generator=generator))).all()


def test_mean_over_data_has_the_error_of_its_draws() -> None:
    """Chi-square of 200 replicates with unequal data; false alarm 2 · ALPHA."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.1, 1.0, 3.0])
    pairs = [
        mean_over_data(scale * torch.randn(50, 3, generator=generator) + scale) for _ in range(200)
    ]
    z = np.array([(value - float(scale.mean())) / error for value, error in pairs])
    assert stats.chi2.sf((z**2).sum(), 200) > ALPHA < stats.chi2.cdf((z**2).sum(), 200)


def test_paired_differences_have_less_noise_than_their_rows(
    ebm: LVEBM, x: Tensor, guides: dict[str, Any]
) -> None:
    """Rows share their noise; the difference is that of the columns, with a smaller error."""
    table = table_of(ebm, x, guides)
    found = table.differences("mean field").loc["full covariance"]
    rows = table.rows
    expected = rows.loc["full covariance", "elbo"] - rows.loc["mean field", "elbo"]
    assert found["difference"] == pytest.approx(expected, rel=1e-6)
    assert found["difference"] > 5.0 * found["std_error"] > 0.0
    assert found["std_error"] < 1.01 * math.hypot(*rows["elbo_se"].drop("prior"))
    assert list(table.differences().index) == ["mean field", "prior"]  # the best is the reference
    with pytest.raises(ValueError, match="no row 'encoder'"):
        table.differences("encoder")


def test_noise_that_rows_share_cancels_in_their_difference() -> None:
    terms = {"first": normal((50, 8), 1), "shifted": normal((50, 8), 1) - 0.25}
    frame = pd.DataFrame({"elbo": {n: float(t.mean()) for n, t in terms.items()}})
    table = ElboTable(frame, "fixed", 0.0, 0.0, [], 8, terms, {})
    found = table.differences("first").loc["shifted"]
    assert found.tolist() == pytest.approx([-0.25, 0.0], abs=1e-6)


def test_a_table_in_markdown_and_latex(ebm: LVEBM, x: Tensor, guides: dict[str, Any]) -> None:
    table = table_of(ebm, x, {"A_1 & B": guides["mean field"], "prior": PriorProposal()})
    head, rule, *lines = table.to_markdown().splitlines()
    assert head == "| posterior | ELBO | KL gap | Pareto k̂ | parameters | converged | seconds |"
    assert rule.count("---") == 7 and len(lines) == 2
    row = table.rows.loc["prior"]
    assert f"| {row['elbo']:.4f} ± {row['elbo_se']:.4f} |" in lines[1]
    latex = table.to_latex()
    assert r"A\_1 \& B &" in latex and latex.count(r"\\") == 3 and r"$\pm$" in latex
    assert latex.startswith(r"\begin{tabular}{lrrrrrr}") and latex.endswith(r"\end{tabular}")
    assert "±" not in latex and r"\toprule" in latex and r"\bottomrule" in latex


def test_a_posterior_that_is_not_gaussian_keeps_a_gap_under_laplace() -> None:
    """A bimodal posterior: one Gaussian at one mode misses log 2; false alarm ALPHA."""

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z * z, 0.1), obs=y)

    y = torch.full((20,), 1.5)
    table = compare_elbo(model, {"Laplace": LaplaceApproximation()}, y, num_samples=200)
    row = table.rows.loc["Laplace"]
    assert row["kl_gap"] == pytest.approx(math.log(2.0), abs=0.1)
    assert row["kl_gap"] > 5.0 * row["kl_gap_se"]


def test_arguments_of_the_other_comparison_are_refused(ebm: LVEBM, x: Tensor) -> None:
    rows = {"prior": PriorProposal()}
    for options, match in (
        ({"theta": "free"}, "theta must be 'fixed' or 'refit'"),
        ({"num_steps": 3}, "are for theta='refit'"),
        ({"held_out": (x,)}, "are for theta='refit'"),
        ({"theta": "refit"}, "needs num_steps and held_out"),
        ({"theta": "refit", "num_steps": 2, "held_out": x}, "held_out must be a tuple"),
        ({"num_samples": 1}, "num_samples must be at least 2"),
    ):
        with pytest.raises(ValueError, match=match):
            table_of(ebm, x, rows, **options)
