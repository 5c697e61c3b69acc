# SPDX-License-Identifier: Apache-2.0

# %% [markdown]
# # After the fit: posterior analysis in ArviZ
#
# `to_arviz` hands a posterior to [ArviZ](https://python.arviz.org): as `InferenceData` to ArviZ
# 0.2x, and as `DataTree` from ArviZ 1 on, with the same groups. This page looks at chains, at
# replicates of the data, and at leave-one-out cross-validation, and says what each figure is of.
#
# The data are two moons, in two batches. The second was recorded after the sensors had been moved,
# by an offset $\mu$ that nobody wrote down. A latent-variable energy-based model (LVEBM) is fitted
# to the first batch, and $\mu$ is inferred from the second.

# %%
import os
import warnings

import arviz as az
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from sklearn.datasets import make_moons

from pyro_lvebm import (
    LVEBM,
    AutoParticles,
    MLPEnergy,
    Saddle,
    TemperedPool,
    lvebm,
    plot_energy,
    plot_latents,
    to_arviz,
)

SMOKE = os.environ.get("PYRO_LVEBM_SMOKE") == "1"  # few rows and steps: runs, but fits nothing
ARVIZ_1 = int(az.__version__.split(".")[0]) >= 1
# ArviZ 0.23 sorts in a way that pandas 3 announces to remove.
warnings.filterwarnings("ignore", message="The inplace keyword")
pyro.set_rng_seed(0)
pyro.clear_param_store()

# %% [markdown]
# ## A fit

# %%
rows, _ = make_moons(40 if SMOKE else 330, noise=0.1, random_state=0)
data = torch.tensor(rows, dtype=torch.float32)
count = 10 if SMOKE else 30
x, second = data[count:], data[:count]
truth = torch.tensor([0.25, -0.4])
moved = second + truth

energy = MLPEnergy(x_dim=2, z_dim=2, hidden=(8,) if SMOKE else (32, 32))
ebm = LVEBM.from_data(energy, x, z_dim=2, pool=TemperedPool(4, 64) if SMOKE else None)


def at_rest(x):
    with pyro.plate("data", len(x), subsample_size=min(150, len(x))) as i:
        lvebm("moons", ebm, obs=x[i])


saddle = Saddle(at_rest, AutoParticles(at_rest, num_particles=4), Adam({"lr": 3e-3}), seed=0)
losses = saddle.fit(x, num_steps=5 if SMOKE else 500, progress=False)
axes = plot_energy(ebm, (0, 1), marginal=True, num_points=10 if SMOKE else 40)
axes.scatter(*x.T, s=4, color="white")
axes.figure

# %% [markdown]
# ## Chains
#
# A chain is a particle, and a draw a Langevin step that was kept while $\theta$ was at rest.
# `coords` and `dims` give axes their names; a plate names its own. Neighbouring steps are
# correlated, so every fifth is kept.

# %%
few = x[:10]
probe = Saddle(at_rest, AutoParticles(at_rest, num_particles=4), Adam({"lr": 3e-3}), seed=1)
idata = to_arviz(
    probe,
    few,
    num_samples=20 if SMOKE else 250,
    num_warmup=5 if SMOKE else 200,
    thinning=1 if SMOKE else 5,
    num_predictive=2,
    num_prior=50,
    dims={"moons_z": ["factor"]},
    coords={"factor": ["first", "second"], "data": [f"row {i}" for i in range(10)]},
)
groups = list(idata.children if ARVIZ_1 else idata.groups())
print(groups)
z = idata["posterior"]["moons_z"]
print(dict(z.sizes))

# %% [markdown]
# `r_hat` near 1 and `ess_bulk` of some hundreds say that the chains have forgotten where they
# began; `mcse_mean` is the Monte Carlo error of the mean. Read them before anything else. They
# speak of the chains, not of the model.

# %%
chosen = {"data": ["row 0", "row 1"]}
print(az.summary(idata, var_names=["moons_z"], coords=chosen).to_string())

# %%
az.plot_trace(idata, var_names=["moons_z"], coords={"data": ["row 0"]})
plt.show()

# %% [markdown]
# The statistics of the sampler are groups too: the energy $-\log p_\theta(x_i, z)$, the acceptance
# rate and the step size, of every datum's chains, and $\log Z$ of the pool.

# %%
for name in ("energy", "acceptance_rate", "step_size", "log_partition"):
    print(name, round(float(idata["sample_stats"][name].mean()), 3))

# %% [markdown]
# `plot_latents` draws the posteriors of chosen data in one picture. Where they lie on top of each
# other, the latent says little about single rows: the energy has explained them by itself.

# %%
plot_latents(z, [0, 1, 2], labels=["row 0", "row 1", "row 2"]).figure

# %% [markdown]
# ## Replicates
#
# `posterior_predictive` has replicates $x'$ of every row, drawn from $p_\theta(x \mid z)$ with $z$
# a draw of $p_\theta(z \mid x_i)$. All together they should look like the data. `prior_predictive`
# has joint draws of the model, without data.

# %%
many = x[: 12 if SMOKE else 150]
probe = Saddle(at_rest, AutoParticles(at_rest, num_particles=2), Adam({"lr": 3e-3}), seed=4)
replicated = to_arviz(
    probe,
    many,
    num_samples=3 if SMOKE else 10,
    num_warmup=5 if SMOKE else 200,
    num_predictive=3 if SMOKE else 10,
    dims={"moons": ["coordinate"]},
    coords={"coordinate": ["first", "second"]},
)
for coordinate in ("first", "second"):
    if ARVIZ_1:
        az.plot_ppc_dist(replicated, coords={"coordinate": [coordinate]}, num_samples=6)
    else:
        az.plot_ppc(replicated, coords={"coordinate": [coordinate]}, random_seed=0)
    plt.show()

# %% [markdown]
# ## A latent of all data
#
# The offset $\mu$ belongs to all rows, so it lies outside the plate, and the plate has its full
# size: on minibatches no chain would follow the posterior. $\mu$ and the $z_i$ are particles
# alike, and take turns. $\theta$ stays where the first batch has put it.


# %%
def offset(x):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        lvebm("moons", ebm, obs=x - mu)


draws = {
    "num_samples": 10 if SMOKE else 100,
    "num_warmup": 5 if SMOKE else 200,
    "thinning": 1 if SMOKE else 3,
    "num_predictive": 0,
    "num_log_likelihood": 10 if SMOKE else 100,
}
chains = Saddle(offset, AutoParticles(offset, num_particles=4), Adam({"lr": 3e-3}), seed=2)
with_offset = to_arviz(chains, moved, **draws)
print(az.summary(with_offset, var_names=["mu"]).to_string())
print("truth:", [round(float(value), 2) for value in truth])

# %% [markdown]
# ## Leave-one-out
#
# `log_likelihood` is marginal: for each draw of $\mu$ and each row,
#
# $$
# \log p_\theta(x_i \mid \mu) = \log \int p_\theta(x_i, z_i \mid \mu)\, dz_i .
# $$
#
# `az.loo` then estimates $\sum_i \log p_\theta(x_i \mid x_{-i})$: what rows say about $\mu$ is
# taken from the others. `p_loo` is about the number of dimensions that were inferred, and $\hat k$
# below 0.7 says that the weights could be trusted. $\theta$ is not left out. It was fitted to the
# first batch, so that these rows are new to it, and the figure is a fair one; on rows of the fit
# it would be too high.

# %%
with warnings.catch_warnings():
    if SMOKE:  # chains of ten draws are too short for anything, and ArviZ says so
        warnings.simplefilter("ignore")
    loo = az.loo(with_offset, pointwise=True)
print(loo)

# %% [markdown]
# The other model has no offset. Nothing is inferred but $z_i$, and these are integrated out: all
# draws of $\log p_\theta(x_i)$ estimate one number, `elpd_loo` is their sum over rows, and `p_loo`
# is Monte Carlo error.
#
# A difference of some `dse` is clear. The error of $\log Z$ is common to both models here, as they
# share $\theta$, and cancels. Between two LVEBMs it does not: there it moves the difference by its
# own size times the number of rows, which no column shows. It is an attribute of the group.

# %%
rest = Saddle(at_rest, AutoParticles(at_rest, num_particles=4), Adam({"lr": 3e-3}), seed=3)
without = to_arviz(rest, moved, **(draws | {"num_log_likelihood": 10 if SMOKE else 50}))
with warnings.catch_warnings():
    if SMOKE:
        warnings.simplefilter("ignore")
    table = az.compare({"offset": with_offset, "at rest": without})
print(table.iloc[:, :6].to_string())
attributes = with_offset["log_likelihood"].attrs
print({name: round(float(value), 4) for name, value in attributes.items()})

# %% [markdown]
# ## Guides
#
# ArviZ takes MCMC from Pyro; `to_arviz` takes guides too. A guide gives one chain of independent
# draws of its own law. `r_hat` and `ess` are then perfect, and say nothing of how far that law is
# from the posterior: compare with the chains of the particles, or see the page on guides. The log
# likelihood belongs to $\theta$ and not to a guide, so it cannot rank guides of one $\theta$.

# %%
guide = AutoNormal(offset, init_scale=0.1)
svi = Saddle(offset, guide, Adam({"lr": 2e-2}))
fit = svi.fit_guide(guide, moved, progress=False, tolerance=100.0 if SMOKE else 1e-3)
print(f"converged {fit.converged} after {fit.num_steps} steps")
by_guide = to_arviz(svi, moved, num_samples=100 if SMOKE else 500, num_predictive=0)
for name, found in (("particles", with_offset), ("mean-field guide", by_guide)):
    mu = found["posterior"]["mu"]
    mean, sd = mu.mean(("chain", "draw")).to_numpy(), mu.std(("chain", "draw")).to_numpy()
    print(f"{name}: mean {mean.round(3)}, sd {sd.round(3)}")

# %% [markdown]
# ## Files
#
# `idata.to_netcdf("posterior.nc", engine="h5netcdf")` writes all groups to one file, and
# `az.from_netcdf` (ArviZ 0.2x) or `xarray.open_datatree` (ArviZ 1) reads them.
#
# ## What may be concluded
#
# - `summary` and `plot_trace` say whether the chains have converged, and then what the posterior is
#   *under this* $\theta$. Nothing here is the uncertainty of $\theta$.
# - Replicates that look like the data do not show that the latent means something.
# - `loo` and `compare` are about new rows from where these came from. For LVEBMs without a latent
#   of all data, and for another $\theta$, export rows that no fit has seen.
