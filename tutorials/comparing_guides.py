# SPDX-License-Identifier: Apache-2.0

# %% [markdown]
# # Comparing with SVI guides: what a bound is and is not
#
# Stochastic variational inference (SVI) fits a guide $q(z \mid x)$ by its evidence lower bound
# (ELBO). Langevin particles stand for the same posterior without a family of densities. This page
# puts both in one table, on one fitted model, and says for every column what it is, which way it
# errs, and what may be concluded.
#
# Two questions are easily mixed up:
#
# - **How much does a posterior lose on a given model?** The parameters $\theta$ are fixed, and the
#   answer is $\mathrm{KL}(q \,\|\, p_\theta(z \mid x))$, the *inference gap*.
# - **Which guide trains the better model?** Each guide has a $\theta$ of its own, and the answer is
#   the log evidence of rows that no fit has seen.
#
# All numbers are in nats; seeds are fixed. The equations are in the documentation, on the pages
# "Estimators" and "Maths".

# %%
import os

import matplotlib.pyplot as plt
import pyro
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from sklearn.datasets import make_moons

from pyro_lvebm import (
    LVEBM,
    AutoAmortisedNormal,
    AutoParticles,
    AutoPerDatumMultivariateNormal,
    ImportanceWeighted,
    LaplaceApproximation,
    MLPEnergy,
    PriorProposal,
    Saddle,
    TemperedPool,
    compare_elbo,
    lvebm,
    plot_elbo,
)

SMOKE = os.environ.get("PYRO_LVEBM_SMOKE") == "1"  # few rows and steps: runs, but fits nothing
pyro.set_rng_seed(0)
pyro.clear_param_store()

# %% [markdown]
# ## Data and model
#
# Two moons, 400 rows to fit and 400 held out. The latent has two dimensions, so that a guide can
# lose something by leaving its correlation out.

# %%
rows, _ = make_moons(60 if SMOKE else 800, noise=0.1, random_state=0)
data = torch.tensor(rows, dtype=torch.float32)
x, x_test = data[: len(data) // 2], data[len(data) // 2 :]


def new_model(name):
    """An untrained LVEBM, and a Pyro model with it."""
    energy = MLPEnergy(x_dim=2, z_dim=2, hidden=(8,) if SMOKE else (64, 64))
    pool = TemperedPool(4, 16, num_moves=2) if SMOKE else None
    ebm = LVEBM.from_data(energy, x, z_dim=2, pool=pool)

    def model(x):
        with pyro.plate("data", len(x), subsample_size=min(200, len(x))) as i:
            lvebm(name, ebm, obs=x[i])

    return ebm, model


ebm, model = new_model("moons")

# %% [markdown]
# ## Training by particles
#
# The loss that `fit` returns is an energy, not an ELBO: particles are points and have no entropy.
# It is no part of any comparison below.

# %%
saddle = Saddle(model, AutoParticles(model, num_particles=2), Adam({"lr": 2e-3}), seed=0)
losses = saddle.fit(x, num_steps=5 if SMOKE else 600, progress=False)

# %% [markdown]
# ## Guides for one fixed model
#
# `saddle.fit_guide` is ordinary SVI for the latents of one model, all of whose parameters rest, and
# so do the pools: here for a mean-field Gaussian for every datum, a Gaussian with a full covariance
# for every datum, and an encoder, which is one network for all data.
#
# A guide that has not converged loses more than its family must, so each is trained until its own
# ELBO rests: windows of steps are compared on the same data and noise, and the learning rate falls
# where they gain little. The result says whether the ELBO rests, and the table marks a row that has
# not converged, or whose guide was trained at another $\theta$ than the table's. Another check
# is in the table: the Gaussians of the encoder belong to the mean-field family, which belongs to
# that of full covariances. Where a larger family shows a larger gap by more than the tolerance, its
# optimiser has lost that, and not the family.

# %%
guides = {
    "mean-field": AutoNormal(model, init_scale=0.5),
    "full covariance": AutoPerDatumMultivariateNormal(model),
    "encoder": AutoAmortisedNormal(model, hidden=(64, 64)),
}
for name, guide in guides.items():
    fit = saddle.fit_guide(guide, x, progress=False, tolerance=100.0 if SMOKE else 1e-3)
    print(f"{name}: converged {fit.converged}, {fit.num_steps} steps, gain at last {fit.gain:.1e}")

# %% [markdown]
# ## The table
#
# Beside the guides there are rows for which nothing is trained:
#
# - `ImportanceWeighted(guide, 16)`: the guide as the proposal of 16 importance samples a datum;
# - `LaplaceApproximation()`: the Gaussian at the mode of each posterior;
# - `PriorProposal()`: the prior of the latents, here $\mathrm{base}_z$. It is the floor: a guide
#   that does not beat it has learnt nothing about single data. Every table has it, as "prior";
# - the `Saddle`: annealed Langevin that starts where its particles are.

# %%
encoder = guides["encoder"]
table = compare_elbo(
    model,
    guides
    | {
        "encoder, 16 weighted": ImportanceWeighted(encoder, 16),
        "Laplace": LaplaceApproximation(),
        "prior": PriorProposal(),  # as it would be without being named
        "particles": saddle,
    },
    x,
    num_samples=8 if SMOKE else 64,
)
print(table)

# %% [markdown]
# What each column is, and which way it errs:
#
# | Column | What it is | Error |
# |---|---|---|
# | `elbo` | mean lower bound on $\log p_\theta(x_i)$ | low: $\log Z$ at its upper end |
# | `kl_gap` | what the bound loses; $\log Z$ cancels | small: $\log \hat C$ is low |
# | `_se` | Monte Carlo error over draws, for these rows | not the error over data sets |
# | `pareto_k` | tail of the importance weights, median over data | noisy; needs 25 draws |
# | `parameters` | trained numbers; for particles, stored coordinates | none |
# | `converged` | whether the ELBO of the guide rests at this $\theta$; "-" if not known | none |
# | `seconds` | time of the row, without training | depends on the machine |
#
# - Every `elbo` is a bound in expectation, *as far as the upper end of $\log Z$ holds*. All rows
#   share it, so its error moves them together and leaves differences and gaps alone.
# - A `kl_gap` within two or three standard errors of zero, of either sign, is not told from zero.
#   As gaps err small, a gap that is clearly above zero is real.
# - For the guides, for Laplace and for the prior, `kl_gap` estimates $\mathrm{KL}(q \,\|\,
#   p_\theta(z \mid x))$. For 16 weighted samples it is what *that bound* loses; the guide itself
#   has not become better. For the particles it is a divergence between paths: at least that of the
#   end of a path from the posterior, and more by what a path of 32 temperatures loses.
# - `pareto_k` describes the tail of the weights $p_\theta(x, z) / q(z)$. With $S$ draws, values
#   below $\min(1 - 1 / \log_{10} S,\, 0.7)$ are good (Vehtari et al. 2024): 0.45 for 64 draws, 0.67
#   for the 1,024 single weights of the weighted row. A large value says that $q$ lacks mass where
#   the posterior has some. The ELBO is valid all the same; importance weighting cannot repair the
#   guide.
#
# ## log Z and its verdict
#
# Whatever is called a log density rests on $\log Z$. `log_partition` anneals in both directions,
# and `verdict` says whether they agree. If it does not begin with "forward and reverse agree", do
# not quote `elbo` nor any $\log p_\theta(x)$; gaps and differences still stand, as $\log Z$ cancels
# in them. Agreement is necessary, not sufficient: a mode that base and pool both miss is missing
# from both directions.

# %%
log_z = table.log_partitions[0]
print(log_z)
print(log_z.verdict)
print(f"from below {log_z.forward:.4f}, from above {log_z.reverse:.4f}, runs {log_z.num_runs}")

# %% [markdown]
# ## Differences
#
# `differences` subtracts a row from all others, draw by draw and datum by datum. Noise that two
# rows share cancels, and $\log Z$ with it, so differences are better known than values. The error
# is again over draws, for these data: it says whether another seed would give the same order, and
# not whether another data set would.

# %%
print(table.differences("mean-field").round(4).to_string())

# %% [markdown]
# For a paper, the table as Markdown and as LaTeX:

# %%
print(table.to_markdown())
print(table.to_latex())

# %% [markdown]
# ## A forest plot
#
# `plot_elbo` draws gaps with two standard errors. The axis ends before the gap of the prior where
# it would hide the others. A gap near zero says that little is lost *on this model*; it does not
# say that the model is good.

# %%
figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
plot_elbo(table, axes)
plt.show()

# %% [markdown]
# ## Each guide with a model of its own
#
# Variational training bends the model towards what its guide can follow. A small gap after that may
# mean a good guide or a simple model, so neither `elbo` nor `kl_gap` says which *fit* is better.
# Held-out $\log p_\theta(x)$ does.
#
# With `theta="refit"` each entry is a function that returns a new `Saddle`. All start from the same
# untrained model and take the same number of steps. Afterwards the model is as it was. Here the
# fits are short; for a paper, give each its own number of steps on validation rows, more seeds, and
# rows for the table that were not used to choose anything.

# %%
fresh_ebm, fresh_model = new_model("fresh")


def rates(name):
    """A larger rate for Gaussians of single data than for networks."""
    return {"lr": 3e-2 if name.startswith(("AutoNormal", "AutoPerDatum")) else 2e-3}


def mean_field():
    return Saddle(fresh_model, AutoNormal(fresh_model, init_scale=0.5), Adam(rates))


def full_covariance():
    return Saddle(fresh_model, AutoPerDatumMultivariateNormal(fresh_model), Adam(rates))


def particles():
    return Saddle(fresh_model, AutoParticles(fresh_model, num_particles=2), Adam(rates))


builders = {"mean-field": mean_field, "full covariance": full_covariance, "particles": particles}
refitted = compare_elbo(
    fresh_model,
    builders,
    x,
    theta="refit",
    num_steps=4 if SMOKE else 400,
    held_out=(x_test,),
    num_samples=8 if SMOKE else 32,
)
print(refitted)
print(refitted.differences("particles").round(4).to_string())

# %% [markdown]
# - `held_out` uses the upper end of each model's own $\log Z$, so each value errs low. Its error
#   `held_out_se` is over held-out rows.
# - `differences` are paired by row, so what is hard for all models cancels. Their standard error is
#   over held-out rows and **does not contain the error of the two $\log Z$**, which no longer
#   cancels: compare a difference with the widths of the brackets as well. One fit for each guide
#   says nothing about seeds.
# - `seconds` are now those of the fit.
# - `elbo` and `kl_gap` are now each about another $\theta$. The difference of two `elbo` mixes a
#   better model with a tighter bound.
# - A `held_out` value is not a bound on another model's, and the ELBO on training rows is not a
#   bound on it either: they are about other parameters and other rows.

# %%
# The brackets are in the order in which the fits were made, and not in that of the rows.
for name, log_z in zip(builders, refitted.log_partitions, strict=True):
    margin = log_z.upper - log_z.estimate
    low = refitted.to_dataframe().held_out[name]
    print(f"{name}: held-out {low:.4f} with the upper end, {low + margin:.4f} with the estimate")
    print(f"    log Z: {log_z.verdict}; s.e. of the estimate {log_z.std_error:.4f}")

# %% [markdown]
# The first number errs low, by another margin for each fit; the second errs either way, by about
# the standard error of $\log Z$. Where the two put the fits in a different order, the table has not
# decided between them, however small the standard error of the paired difference. Sharper brackets
# may decide: `log_partition` takes more particles, and `target_se`.

# %% [markdown]
# ## What a reviewer may conclude
#
# From the first table, if the verdict is good:
#
# - a guide whose gap is clearly above zero loses at least about that much, per datum, on this
#   model;
# - a row with a higher ELBO has the tighter bound on *these* data under *this* $\theta$, if the
#   difference is well beyond its standard error;
# - Langevin that starts where the particles are reaches the posterior up to the gap of its row.
#
# From the second table: which fit gives new rows a higher density, as far as the difference exceeds
# its standard error, the widths of the brackets, and the spread over seeds.
#
# What neither table shows:
#
# - that a family of guides *must* lose this much: an optimiser may have stopped early;
# - that the model is right, or that its latent means something;
# - that the stored particles are themselves draws of the posterior: their row is about paths that
#   start from them;
# - anything about other data sets, sizes or numbers of latent dimensions.
