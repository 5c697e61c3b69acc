# SPDX-License-Identifier: Apache-2.0

# %% [markdown]
# # Quickstart: two moons
#
# A latent-variable energy-based model (LVEBM) gives one normalised density to pairs of data $x$
# and latent $z$,
#
# $$p_\theta(x, z) = \exp(-E_\theta(x, z)) / Z_\theta .$$
#
# This page fits one to two interleaved half circles, looks at its draws, measures its evidence
# beside Gaussian mixtures, compares Langevin particles with two variational guides, and hands the
# posterior to ArviZ. For every number it says what the number is and which way its error goes.
# All of them are in nats; seeds are fixed.

# %%
import os

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from sklearn.datasets import make_moons
from sklearn.mixture import GaussianMixture

from pyro_lvebm import (
    LVEBM,
    AutoAmortisedNormal,
    AutoParticles,
    MLPEnergy,
    Saddle,
    compare_elbo,
    log_evidence,
    log_partition,
    lvebm,
    to_arviz,
)

SMOKE = os.environ.get("PYRO_LVEBM_SMOKE") == "1"  # few rows and steps: runs, but fits nothing
pyro.set_rng_seed(0)
pyro.clear_param_store()

# %% [markdown]
# ## Data
#
# Rows are observations. A third of them is held out: the fit never sees it.

# %%
rows, _ = make_moons(150 if SMOKE else 1500, noise=0.1, random_state=0)
data = torch.tensor(rows, dtype=torch.float32)
x, x_test = data[: 2 * len(data) // 3], data[2 * len(data) // 3 :]
print(f"{len(x)} rows to fit, {len(x_test)} held out")

# %% [markdown]
# ## Model
#
# The energy is a network on top of two bases,
# $E_\theta = f_\theta(x, z) - \log \mathrm{base}_x(x) - \log \mathrm{base}_z(z)$.
# `LVEBM.from_data` takes a mixture of Gaussians fitted to the data as $\mathrm{base}_x$, or one
# Gaussian where left-out rows like it as well, and a standard normal as $\mathrm{base}_z$. The last
# layer of `MLPEnergy` starts at zero, so training starts from the mixture, where
# $\log Z_\theta = 0$ exactly.
#
# In the model, `lvebm` opens two sites: `moons_z`, the latent, and `moons`, the observation. The
# plate draws a minibatch, as in any Pyro model.

# %%
energy = MLPEnergy(x_dim=2, z_dim=1, hidden=(8,) if SMOKE else (128, 128))
ebm = LVEBM.from_data(energy, x, z_dim=1)


def model(x):
    with pyro.plate("data", len(x), subsample_size=min(256, len(x))) as i:
        lvebm("moons", ebm, obs=x[i])


# %% [markdown]
# ## Training
#
# Each step of `Saddle` moves the latent particles of a minibatch by Langevin dynamics, refreshes
# the pool of model draws, and takes one optimiser step, halved while it would move the model by
# more than a trust region allows.
#
# The loss that `fit` returns is scaled to all rows. It is an **energy, not an ELBO**: particles
# are points and have no entropy. It also contains the pool's running estimate of $\log Z_\theta$,
# whose error may have either sign. Use it to see progress, and for nothing else.

# %%
saddle = Saddle(model, AutoParticles(model, num_particles=2), Adam({"lr": 2e-3}), seed=0)
losses = saddle.fit(x, num_steps=5 if SMOKE else 800, progress=False)

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.plot(np.array(losses) / len(x))
axes.set(xlabel="step", ylabel="loss, nats per datum", title="training loss (an energy)")
plt.show()

# %% [markdown]
# ## Model draws beside the data
#
# `joint()` is the distribution over $(x, z)$, concatenated. Its draws come from the pool and are
# moved on by a few Langevin steps: they are as good as the pool has converged.

# %%
torch.manual_seed(0)
draws = ebm.joint().sample((len(x),))

figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharex=True, sharey=True, layout="constrained")
axes[0].scatter(*x.T, s=4)
axes[0].set(title="data", xlabel="x[0]", ylabel="x[1]")
points = axes[1].scatter(draws[:, 0], draws[:, 1], c=draws[:, 2], s=4)
axes[1].set(title="model draws, coloured by their z", xlabel="x[0]")
figure.colorbar(points, ax=axes[1], label="z")
plt.show()

# %% [markdown]
# ## The log partition function, as a bracket
#
# Everything that is called a log density needs $\log Z_\theta$, and only estimates of it exist.
# `log_partition` anneals many particles in both directions:
#
# - `lower` comes from runs that start at exact draws of the base. Their estimates of
#   $\log Z_\theta$ are **low** in expectation, whatever the energy.
# - `upper` comes from runs that start at draws of the model. Their estimates are **high** in
#   expectation as far as the draws follow the model. They come from the pool, so a mode that the
#   pool has missed can put `upper` below the truth.
# - Each end is moved outwards by its own one-sided 99 % Monte Carlo margin.
# - `estimate` uses the particles of both directions (Bennett's acceptance ratio). It is the best
#   single number, and no bound: its error has either sign.
# - `verdict` says whether the two directions agree. If they do not, quote none of these numbers.

# %%
log_z = log_partition(ebm, seed=0)
print(log_z)
print(log_z.verdict)
print(f"online estimate of the pool, error of either sign: {float(ebm.log_partition):.4f}")

# %% [markdown]
# ## Held-out evidence
#
# `log_evidence` is $\log p_\theta(x) = \log C_\theta(x) - \log Z_\theta$ for each row, the latent
# integrated out. $\log \hat C$ is low in expectation. So
#
# - `value`, with the point estimate of $\log Z_\theta$, may err either way;
# - `lower`, with the upper end of the bracket, errs **low**, as far as that end holds. Report
#   this one.
#
# The densities of the mixtures are exact, so their only error is that of a finite held-out set.
# Taking the best of three *by its held-out value* favours them a little, and half circles blurred
# by Gaussian noise are what mixtures are good at: expect the LVEBM to come close, not to win. A
# log density belongs to its coordinates: both sides here are densities of the same $x$.

# %%
evidence = log_evidence(ebm, x_test, seed=0, log_z=log_z)
mixtures = {
    k: GaussianMixture(k, n_init=3, random_state=0).fit(x.numpy()).score(x_test.numpy())
    for k in ((2,) if SMOKE else (10, 20, 30))
}
best = max(mixtures, key=mixtures.get)
gaussian = float(ebm.base_x.log_prob(x_test).mean())
low = float(evidence.lower.mean())
print("held-out log p(x), nats per datum")
print(f"  LVEBM, errs low         {low:8.3f} ± {evidence.mean_std_error:.3f}")
print(f"  LVEBM, point estimate   {evidence.mean:8.3f} ± {evidence.mean_std_error:.3f}")
print(f"  mixture of {best:2d} Gaussians {mixtures[best]:8.3f}")
print(f"  one Gaussian            {gaussian:8.3f}")

# %% [markdown]
# The standard errors are over held-out rows (and $\log Z_\theta$). The rows are the same for all
# models, so differences between models are known better than each value.
#
# ## Guides at frozen parameters
#
# Any Pyro guide can be trained on the same model. `saddle.fit_guide` holds all its parameters and
# the pool where they are, so what follows is ordinary variational inference for the latents of one
# fixed model: a Gaussian for every datum, and a network from $x$ to a Gaussian. It ends when the
# guide's own ELBO rests. A guide that has settled on the lesser of two modes still loses more than
# its family must.

# %%
guides = {"Gaussian per datum": AutoNormal(model), "amortised Gaussian": AutoAmortisedNormal(model)}
for name, guide in guides.items():
    fit = saddle.fit_guide(guide, x, progress=False, tolerance=100.0 if SMOKE else 1e-3)
    print(f"{name}: converged {fit.converged}, {fit.num_steps} steps, ELBO {fit.elbo:.4f}")

# %% [markdown]
# ## The ELBO table
#
# One $\theta$, one bracket of $\log Z_\theta$, several posteriors.
#
# - `elbo` is a mean over the data of a lower bound on $\log p_\theta(x)$. It uses the upper end
#   of $\log Z_\theta$, so it errs **low**. All rows share that end, so its error moves them
#   together and leaves differences alone.
# - `kl_gap` is $\mathrm{KL}(q \,\|\, p_\theta(z \mid x))$, what the guide loses. $\log Z_\theta$
#   cancels. $\log \hat C$ is low in expectation, so a gap errs **low**: a restricted guide loses
#   at least about this much. A gap within two or three `kl_gap_se` of zero, of either sign, is
#   not told from zero.
# - Particles have no density. Their row is a bound on the space of paths: a Gaussian is fitted to
#   draws of each datum's particles, and MALA carries new draws from it to the posterior in 32
#   temperatures. The gap contains what that finite path loses, so the row errs **low** for the
#   particles.
# - `_se` columns are Monte Carlo errors over draws, for these data. They are not errors over data
#   sets.

# %%
table = compare_elbo(
    model,
    {"Langevin particles": saddle, **guides},
    x,
    num_samples=8 if SMOKE else 32,
)
print(table)

# %% [markdown]
# ## On to ArviZ
#
# `to_arviz` runs the particles on as Markov chains at frozen $\theta$: a chain is a particle, a
# draw a kept step. The summary is of the first three data.
#
# - `mean` and `sd` describe $p_\theta(z \mid x_i)$ under the fitted model; `mcse_mean` is the
#   Monte Carlo error of the mean, of either sign.
# - `r_hat` well above 1 says that the particles of a datum disagree: it can only be trusted to
#   find trouble, not to rule it out. `ess_bulk` is the number of independent draws that they are
#   worth.
# - The log probability of the site `moons` is not $\log p_\theta(x \mid z)$, and is not exported.
#   With `num_log_likelihood` there is a group with the marginal $\log p_\theta(x_i)$; see the page
#   on posterior analysis.

# %%
idata = to_arviz(saddle, x, num_samples=10 if SMOKE else 250, num_warmup=5 if SMOKE else 200)
summary = az.summary(idata, var_names=["moons_z"], coords={"data": [0, 1, 2]})
print(summary[["mean", "sd", "mcse_mean", "ess_bulk", "r_hat"]])

# %% [markdown]
# `idata.to_netcdf("moons.nc")` keeps the draws, and `saddle.save("moons.safetensors")` the fit:
# `Saddle.load` continues it exactly where it stopped.
