# SPDX-License-Identifier: Apache-2.0

# %% [markdown]
# # Regression with missing inputs
#
# A regression of $y$ on $x$, where a quarter of the entries of $x$ is missing. Rows with a hole can
# be dropped, which throws observations away, or filled with means, which pretends to know. A model
# of $x$ does neither: the missing entries are latents, drawn from what the rest of their row *and
# the response* say of them, and the posterior of the regression weights averages over them.
#
# Here the model of $x$ is an LVEBM, a component of a larger Pyro model, so that the inputs need
# not be Gaussian. The posterior of the weights is compared with that of NUTS on the same model, and
# with the two shortcuts.
#
# Seeds are fixed. Entries are missing completely at random; what follows is right wherever whether
# an entry is missing depends on observed values only.

# %%
import os

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from pyro.optim import Adam

from pyro_lvebm import LVEBM, AutoParticles, MLPEnergy, Saddle, TemperedPool, lvebm

SMOKE = os.environ.get("PYRO_LVEBM_SMOKE") == "1"  # few rows and steps: runs, but fits nothing
pyro.set_rng_seed(0)
pyro.clear_param_store()

# %% [markdown]
# ## Data
#
# The second input is close to a parabola in the first, so the cloud is bent: no Gaussian fits it,
# and a mean fills a hole badly. The response is linear in both, with noise of a known size. About
# half of the rows lose one of their two inputs.

# %%
num_rows, noise = (30 if SMOKE else 80), 0.3
true_weights = torch.tensor([1.0, -1.0])
generator = torch.Generator().manual_seed(1)
first, *noises = torch.randn(3, num_rows, generator=generator)
second = 0.5 * (first**2 - 1.0) + 0.8 * first + 0.2 * noises[0]
complete = torch.stack([first, second], -1)
y = complete @ true_weights + noise * noises[1]
which = torch.randint(2, (num_rows, 1), generator=generator)
broken = torch.rand(num_rows, 1, generator=generator) < 0.5
missing = broken & (torch.arange(2) == which)
x = torch.where(missing, torch.nan, complete)
print(f"{missing.float().mean():.0%} of the entries are missing, in {missing.any(1).sum()} rows")

# %% [markdown]
# ## Model
#
# `lvebm` returns the completed inputs, which the regression uses like any other value. The sites
# are `weights`, outside the plate, and for every row `inputs_z`, the latent of the LVEBM, and
# `inputs_missing`, the missing entries.

# %%
energy = MLPEnergy(x_dim=2, z_dim=1, hidden=(8,) if SMOKE else (32,))
pool = TemperedPool(4, 16, num_moves=2) if SMOKE else TemperedPool(6, 64)
ebm = LVEBM.from_data(energy, x, z_dim=1, pool=pool)


def model(x, y):
    weights = pyro.sample("weights", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        inputs, _ = lvebm("inputs", ebm, obs=x)
        pyro.sample("y", dist.Normal((inputs * weights).sum(-1), noise), obs=y)


# %% [markdown]
# ## Training
#
# All latents are particles, in two blocks: those of the rows, and the weights. In each step they
# take turns; the weights move on the energy of all rows.

# %%
guide = AutoParticles(model, num_particles=8)
saddle = Saddle(model, guide, Adam({"lr": 1e-2}), num_moves=4, seed=0)
losses = saddle.fit(x, y, num_steps=5 if SMOKE else 250, progress=False)

# %% [markdown]
# ## The posterior at frozen $\theta$
#
# `sample_posterior` runs the particles on as Markov chains, which again take turns. The step sizes
# and metrics adapt in the warm-up. ArviZ says how many independent draws the chains are worth, and
# what that leaves as the Monte Carlo error of a mean.

# %%
draws = saddle.sample_posterior(
    x, y, num_samples=10 if SMOKE else 250, num_warmup=10 if SMOKE else 100
)
weights = draws["weights"]  # (particles, draws, 2)

# %% [markdown]
# NUTS samples the same model, with all its latents at once: the weights, and one $z$ and two
# entries of $x$ for every row. Inside `ebm.frozen()` neither $\theta$ nor the pool moves.

# %%
with ebm.frozen():
    kernel = NUTS(model, max_plate_nesting=1)
    mcmc = MCMC(
        kernel,
        num_samples=6 if SMOKE else 200,
        warmup_steps=4 if SMOKE else 80,
        disable_progbar=True,
    )
    mcmc.run(x, y)
nuts = mcmc.get_samples()["weights"][None]

# %% [markdown]
# ## The shortcuts
#
# With complete inputs the posterior of the weights is a Gaussian in closed form. It is computed on
# the rows without a hole, on rows filled with the means of the columns, and, for reference, on the
# inputs before anything was removed.


# %%
def closed_form(inputs, y):
    precision = inputs.T @ inputs / noise**2 + torch.eye(2) / 4.0
    mean = torch.linalg.solve(precision, inputs.T @ y / noise**2)
    return mean, torch.linalg.inv(precision).diagonal().sqrt()


whole = ~missing.any(1)
filled = torch.where(missing, x.nanmean(0), x)
table = []
for name, chains in {"particles": weights, "NUTS": nuts}.items():
    data = az.convert_to_dataset({"w": chains.numpy()})
    mean, sd = chains.flatten(0, 1).mean(0), chains.flatten(0, 1).std(0)
    table.append((name, mean, sd, az.mcse(data).w.values, az.ess(data).w.values))
for name, inputs, response in (
    ("complete rows only", x[whole], y[whole]),
    ("means filled in", filled, y),
    ("nothing missing", complete, y),
):
    table.append((name, *closed_form(inputs, response), np.zeros(2), np.full(2, np.inf)))
columns = ["mean", "sd", "mc_se", "ess"]
frame = pd.DataFrame(
    {
        (name, f"w{k + 1}"): [float(value[k]) for value in values]
        for name, *values in table
        for k in range(2)
    },
    index=columns,
).T
print(frame.round(3).to_string())

# %% [markdown]
# - *Particles* and *NUTS* sample one posterior by different means. Their difference is to be read
#   against both Monte Carlo errors: beyond three of them together, one has not converged.
# - *Complete rows only* is right, and wide: whatever the broken rows say is gone.
# - *Means filled in* is narrow and wrong: a filled value is taken for an observation, and what it
#   hides is ascribed to the other input.
# - *Nothing missing* is what could be known at best.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
last = draws["inputs_missing"][:, -1]  # completed rows, one set for each particle
holes = missing.any(1)
left.plot(*complete[~holes].T, "k.", markersize=4, label="complete rows")
left.plot(*last[:, holes].flatten(0, 1).T, ".", color="C0", markersize=3, label="drawn")
left.plot(*filled[holes].T, "x", color="C3", markersize=5, label="means filled in")
left.set(xlabel="first input", ylabel="second input", title="What stands in the holes")
left.legend()
for place, (_, mean, sd, *_) in enumerate(reversed(table)):
    for k, marker in enumerate("os"):
        right.errorbar(
            abs(mean[k]), place + 0.12 - 0.24 * k, xerr=2.0 * sd[k], fmt=marker, color=f"C{k}"
        )
right.axvline(1.0, color="0.7", zorder=0)
right.set_yticks(range(len(table)), [row[0] for row in reversed(table)])
right.set(xlabel="|weight|, mean and two standard deviations", title="Posterior of the weights")
right.plot([], [], "o", color="C0", label="first")
right.plot([], [], "s", color="C1", label="second")
right.legend()
plt.show()

# %% [markdown]
# ## What to keep in mind
#
# - The comparison with NUTS says that the chains sample *this model*. Whether the model of the
#   inputs is right is another question: compare held-out log evidence, as in "Quickstart".
# - $\theta$ was fitted to these rows and then held, so the posterior does not know how uncertain
#   the model of the inputs is. With many rows that is little.
# - Blocks that take turns mix slowly where each of them is pinned by the other. NUTS moves all
#   latents at once and does not have that trouble; $\hat R$ over the particles shows it.
# - A posterior with several modes, such as two places for a missing entry that $y$ cannot tell
#   apart, is trouble for both: chains stay where they are.
