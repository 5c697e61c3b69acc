# SPDX-License-Identifier: Apache-2.0

# %% [markdown]
# # An energy prior for your own decoder
#
# You have a decoder: a network, or a law of physics, that says how data follow from a latent $z$,
# with a likelihood of any kind. What you rarely have is the prior of $z$. A standard normal is a
# habit; the aggregate of the posteriors is then often something else, and the model draws data
# that look like nothing observed. An energy prior
#
# $$ p_\theta(z) = \frac{\exp(-f_\theta(z))\, N(z; 0, I)}{Z_\theta} $$
#
# learns that law together with the decoder. It is one sample site of Pyro.
#
# Here counts of twelve detectors follow from one hidden position, and positions keep to two places.
# With one latent dimension quadrature checks everything. Seeds are fixed.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.optim import Adam

from pyro_lvebm import (
    AutoParticles,
    AutoPerDatumMultivariateNormal,
    EnergyPrior,
    MLPEnergy,
    Saddle,
    TemperedPool,
    compare_elbo,
    energy_prior,
    log_evidence_of,
)

SMOKE = os.environ.get("PYRO_LVEBM_SMOKE") == "1"  # few rows and steps: runs, but fits nothing
pyro.set_rng_seed(0)
pyro.clear_param_store()

# %% [markdown]
# ## Data and decoder
#
# A detector at $c_k$ counts $n_k \sim \mathrm{Poisson}(0.1 + a\, e^{-(y - c_k)^2 / 2 w^2})$ for a
# source at position $y$. We know that law, but not the gain $a$ and the width $w$, and nothing of
# where sources are.

# %%
num_rows, num_test = (30, 12) if SMOKE else (300, 200)
centres = torch.linspace(-4.0, 4.0, 12)
generator = torch.Generator().manual_seed(0)


def rates(position, gain, width):
    return 0.1 + gain * torch.exp(-0.5 * ((position - centres) / width) ** 2)


at_left = torch.rand(num_rows + num_test, 1, generator=generator) < 0.6
noise = torch.randn(num_rows + num_test, 1, generator=generator)
position = torch.where(at_left, -2.0 + 0.3 * noise, 1.5 + 0.6 * noise)
counts = torch.poisson(rates(position, 2.0, 0.8), generator=generator)
train, test = counts[:num_rows], counts[num_rows:]

# %% [markdown]
# ## Two models that differ in the prior
#
# `energy_prior("z", prior)` stands where `pyro.sample("z", ...)` would. Location and scale of the
# positions are parameters, so that the normal prior is the best of all normal ones.

# %%
prior = EnergyPrior(
    MLPEnergy(1, hidden=(8,) if SMOKE else (32, 32)),
    z_dim=1,
    pool=TemperedPool(4, 16, num_moves=2) if SMOKE else TemperedPool(6, 64),
)


def decode(z, n, name):
    loc = pyro.param(f"{name}_loc", torch.tensor(0.0))
    scale = pyro.param(f"{name}_scale", torch.tensor(2.0), dist.constraints.positive)
    gain = pyro.param(f"{name}_gain", torch.tensor(1.0), dist.constraints.positive)
    width = pyro.param(f"{name}_width", torch.tensor(1.0), dist.constraints.positive)
    pyro.sample("n", dist.Poisson(rates(loc + scale * z, gain, width)).to_event(1), obs=n)


def with_energy(n):
    with pyro.plate("data", len(n), subsample_size=min(128, len(n))) as i:
        decode(energy_prior("z", prior), n[i], "energy")


def with_normal(n):
    with pyro.plate("data", len(n), subsample_size=min(128, len(n))) as i:
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        decode(z, n[i], "normal")


# %% [markdown]
# ## Training
#
# Particles of $z$ for every datum move on $p_\theta(z \mid n)$; the prior has a pool of negatives
# and a trust region of its own, the decoder needs neither.

# %%
saddles = {}
for name, model in {"normal": with_normal, "energy": with_energy}.items():
    guide = AutoParticles(model, num_particles=4)
    saddles[name] = Saddle(model, guide, Adam({"lr": 1e-2}), num_moves=4, seed=0)
    saddles[name].fit(train, num_steps=6 if SMOKE else 300, progress=False)

# %% [markdown]
# ## Which prior predicts better?
#
# Held-out $\log p(n)$ of both models, by annealing the latent of every row. The energy prior pays
# for its $\log Z$ at the upper end of the bracket, so that its number errs on the low side. Rows
# are the same, so that the error of the difference is that of paired rows.

# %%
evidence = {
    name: log_evidence_of(saddle.model, test, num_particles=16 if SMOKE else 64)
    for name, saddle in saddles.items()
}
for name, found in evidence.items():
    print(f"{name:8s} {float(found.lower.mean()):.3f} nats a row")
better = evidence["energy"].lower - evidence["normal"].lower
print(f"better   {float(better.mean()):.3f} ± {float(better.std()) / len(better) ** 0.5:.3f}")
print(evidence["energy"].log_partition)

# %% [markdown]
# By quadrature over $z$, as a check of that annealing:

# %%
grid = torch.linspace(-6.0, 6.0, 2001)[:, None]
cell = float(grid[1] - grid[0])
with torch.no_grad():
    log_prior = prior.base_x.log_prob(grid) - prior.residual(grid)
    log_prior = log_prior - torch.logsumexp(log_prior, 0) - np.log(cell)
    loc, scale, gain, width = (
        pyro.param(f"energy_{part}") for part in ("loc", "scale", "gain", "width")
    )
    law = dist.Poisson(rates(loc + scale * grid, gain, width)).to_event(1)
    exact = torch.logsumexp(law.log_prob(test[:, None]) + log_prior, 1) + np.log(cell)
error = evidence["energy"].value - exact
print(f"annealed minus quadrature: {float(error.mean()):.4f}")

# %% [markdown]
# ## Guides
#
# The ELBO table works as with any LVEBM: particles, a Gaussian of each datum's own, and, as the row
# "prior", the base of the energy prior. Few counts leave posteriors with two modes. A Gaussian
# that starts in the lesser one stays there, and so does a particle, as Langevin moves do not cross
# what lies between; the annealing behind the row of the particles repairs most of it.

# %%
saddle = saddles["energy"]
gaussian = AutoPerDatumMultivariateNormal(with_energy)
saddle.fit_guide(gaussian, train, progress=False, tolerance=100.0 if SMOKE else 1e-2)
rows = {"particles": saddle, "Gaussian": gaussian}
print(compare_elbo(with_energy, rows, train, num_samples=4 if SMOKE else 16))

# %% [markdown]
# ## What the prior has learnt
#
# Left, the law of positions under both models beside the places of the sources, which neither has
# seen. Right, draws of counts: `energy_prior` draws from the pool, and the decoder goes on from
# there.

# %%
with torch.no_grad():
    place = (loc + scale * grid)[:, 0]
    learnt = (log_prior - scale.log()).exp()
    normal = dist.Normal(pyro.param("normal_loc"), pyro.param("normal_scale"))
    prior.settle()
    with pyro.plate("draws", 500):
        z = energy_prior("draw", prior)
        drawn = dist.Poisson(rates(loc + scale * z, gain, width)).sample()
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
left.hist(position[:, 0].numpy(), 40, density=True, color="0.8", label="sources")
left.plot(place, learnt, label="energy prior")
left.plot(place, normal.log_prob(place).exp().detach(), label="normal prior")
left.set(xlabel="position", ylabel="density", xlim=(-5, 5))
left.legend()
right.plot(centres, train.mean(0), "k.", label="data")
right.plot(centres, drawn.mean(0), label="draws")
right.set(xlabel="detector", ylabel="mean count")
right.legend()
plt.show()

# %% [markdown]
# ## What to keep in mind
#
# - A prior can only be learnt as far as data tell positions apart: the energy prior is the law of
#   $z$ after the likelihood has blurred it.
# - Decoder and prior share what they explain: location and scale of $z$ above are free, and so are
#   rotations in more dimensions. Held-out evidence compares models; pictures of $z$ do not.
# - With few rows a flexible prior overfits like any density. `MLPEnergy` has a penalty for that,
#   and `fit(held_out=...)` stops at the best step.
# - The prior may also be learnt on top of a decoder that is held fixed: then it cannot be worse
#   than where it starts, beyond the noise of the rows it is judged by.
