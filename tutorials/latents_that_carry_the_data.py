# SPDX-License-Identifier: Apache-2.0

# %% [markdown]
# # Latents that carry the data
#
# A latent-variable model promises two things: a density of $x$, and a $z$ that says what each $x$
# is about. Maximum likelihood asks for the first only. This page fits the same trajectories by two
# families with the same trainer, and looks at what becomes of $z$:
#
# - a *free-form energy* $f(x, z)$ on a Gaussian base, which may use $z$ or leave it alone;
# - a *generator base*, in which $x$ is made of $z$, as $x = g(z) + $ noise.
#
# Then it says what of $z$ the data identify and what they do not, and draws posteriors beside the
# ellipses of a Gaussian guide. Seeds are fixed.

# %%
import copy
import os

import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch
from pyro.optim import Adam
from scipy.integrate import odeint
from sklearn.linear_model import LinearRegression
from sklearn.neighbors import KNeighborsRegressor

from pyro_lvebm import (
    LVEBM,
    AutoParticles,
    AutoPerDatumMultivariateNormal,
    MLPEnergy,
    MLPGenerator,
    Saddle,
    TemperedPool,
    ZeroEnergy,
    compare_elbo,
    log_evidence,
    lvebm,
    mutual_information,
    plot_plane,
)

SMOKE = os.environ.get("PYRO_LVEBM_SMOKE") == "1"  # few rows and steps: runs, but fits nothing
pyro.set_rng_seed(0)

# %% [markdown]
# ## A pendulum with two factors
#
# Angles of a damped pendulum, $\ddot y = -2 \sin y - c\, \dot y$, at twenty times, measured with
# noise of 0.1. Each starts at rest with its own amplitude $a$ and has its own damping $c$. These
# two are all that differs between rows; the models do not see them.

# %%
num_rows, num_test = (40, 24) if SMOKE else (900, 450)
times = np.linspace(0.0, 6.0, 20)
draw = np.random.default_rng(0)
factors = np.c_[
    draw.uniform(0.3, 2.8, num_rows + num_test), draw.uniform(0.05, 0.6, num_rows + num_test)
]


def slope(y, _, damping):
    return [y[1], -2.0 * np.sin(y[0]) - damping * y[1]]


angles = np.stack([odeint(slope, [a, 0.0], times, (c,))[:, 0] for a, c in factors])
rows = torch.as_tensor(angles + 0.1 * draw.normal(size=angles.shape), dtype=torch.float32)
x, x_test = rows[:num_rows], rows[num_rows:]
factors_test = factors[num_rows:]

# %% [markdown]
# ## Two families, one trainer
#
# Both have two latent dimensions. The energy of the generator base is zero here, so that it is a
# decoder and nothing else, trained by particles without an encoder. A fit of 1,000 steps or more
# would end with an estimate of what the latents carry by itself, and warn where it is nothing.

# %%
pool = {"num_levels": 3, "num_chains": 16} if SMOKE else {"num_levels": 6, "num_chains": 64}
ebms = {
    "free-form energy": LVEBM.from_data(
        MLPEnergy(20, 2, hidden=(16,) if SMOKE else (64, 64)),
        x,
        z_dim=2,
        base="gaussian",
        pool=TemperedPool(**pool),
    ),
    "generator base": LVEBM.from_data(
        ZeroEnergy(20, 2), x, z_dim=2, generator=MLPGenerator(2, (20,)), pool=TemperedPool(**pool)
    ),
}


def model_of(ebm):
    def model(x):
        with pyro.plate("data", len(x), subsample_size=min(128, len(x))) as i:
            lvebm("x", ebm, obs=x[i])

    return model


for ebm in ebms.values():
    pyro.clear_param_store()
    model = model_of(ebm)
    saddle = Saddle(model, AutoParticles(model, 2), Adam({"lr": 5e-3}), num_moves=4, seed=0)
    saddle.fit(x, num_steps=5 if SMOKE else 400, progress=False)

# %% [markdown]
# ## What the latents carry
#
# $I(x; z)$ is how far posteriors are from their mean, in nats: 0 where every posterior is the
# prior. Beside it, held-out $\log p(x)$, with the upper end of $\log Z$, and how well the posterior
# mean of $z$ tells the factors of a row that was not seen, by its five nearest neighbours.


# %%
def posterior_means(ebm, x):
    torch.manual_seed(0)
    return ebm.posterior(x).sample((4 if SMOKE else 32,)).mean(0).numpy()


def r_squared(means, regression):
    cut = 2 * len(means) // 3
    scores = [
        regression.fit(means[:cut], factor[:cut]).score(means[cut:], factor[cut:])
        for factor in factors_test.T
    ]
    return "amplitude {:.2f}, damping {:.2f}".format(*scores)


few = {"num_particles": 8, "num_runs": 2} if SMOKE else {}
means = {}
for name, ebm in ebms.items():
    carried = mutual_information(ebm, x_test, num_rows=16 if SMOKE else 256)
    evidence = log_evidence(ebm, x_test, **few)
    means[name] = posterior_means(ebm, x_test)
    values = evidence.lower
    error = float(values.std()) / len(values) ** 0.5
    print(name)
    print(f"  {carried}")
    print(f"  held-out log p(x) {float(values.mean()):.2f} ± {error:.2f}")
    print(f"  R² {r_squared(means[name], KNeighborsRegressor(5))}")

# %% [markdown]
# The free-form energy leaves $z$ empty. It may: $f(x, z) = f(x)$ has the same density of $x$ as any
# energy that uses $z$, and nothing in $\log p(x)$ asks for more. Every posterior is then the prior,
# every guide is exact, and an ELBO table compares nothing. That is no fault of the training, and
# where only the density matters it does no harm.
#
# A generator has no such way out: with noise that is the same for all rows, whatever correlates the
# angles of a row has to come through $z$.

# %% [markdown]
# ## What is identified, and what is not
#
# A generator fixes $z$ up to what the prior does not see. $N(0, I)$ looks the same after any
# rotation $Q$, so $g(Qz)$ is the same model of $x$ as $g(z)$: the same evidence row by row, and
# other coordinates. A bend of the plane that keeps $N(0, I)$ is as invisible, if the network is
# rich enough. So no coordinate is "the damping", and a score that compares single coordinates with
# single factors measures the luck of the start.


# %%
class Turned(torch.nn.Module):
    def __init__(self, generator, q):
        super().__init__()
        self.generator = generator
        self.register_buffer("q", q)

    def forward(self, z):
        return self.generator(z @ self.q)


angle = torch.tensor(0.9)
q = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
ebm = ebms["generator base"]
turned = copy.deepcopy(ebm)
turned.base_x.generator = Turned(turned.base_x.generator, q)
with torch.no_grad():
    turned.base_x.linear.copy_(turned.base_x.linear @ q.T)
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    change = turned.base_x.mean(z @ q.T) - ebm.base_x.mean(z)
print(f"largest change of a decoded angle: {float(change.abs().max()):.1e}")

one = {"as fitted": means["generator base"], "turned": means["generator base"] @ q.numpy().T}
for name, found in one.items():
    correlation = np.abs(np.corrcoef(found.T, factors_test.T)[:2, 2:])
    print(f"{name:10s} |correlation| of z[0], z[1] with amplitude and damping")
    print(np.round(correlation, 2))

# %% [markdown]
# What survives a rotation is what may be reported: $I(x; z)$, the number of active dimensions,
# held-out $\log p(x)$, and whether factors can be *read* from $z$ by a regression, linear or not.
# The difference between a linear and a flexible one says how bent the plane is.

# %%
for name, regression in {
    "plane": LinearRegression(),
    "neighbours": KNeighborsRegressor(5),
}.items():
    print(f"R² by {name:10s} {r_squared(means['generator base'], regression)}")

# %% [markdown]
# ## Posteriors, and a guide beside them
#
# Draws of $p(z \mid x)$ for a few rows over the plane of decoded trajectories, with ellipses of two
# standard deviations of a Gaussian for each of these rows. Small amplitudes hide the damping: their
# posteriors are long and a little bent, so an ellipse covers only a part. The ELBO table puts a
# number to that, with the prior as its floor. Particles of these rows move, and $\theta$ stays.

# %%
order = np.argsort(factors_test[:, 0])
shown = x_test[torch.as_tensor(order[[1, len(order) // 6, len(order) // 2, -2]].copy())]
model = model_of(ebm)
pyro.clear_param_store()
saddle = Saddle(model, AutoParticles(model, 4), Adam({"lr": 1e-9}), seed=1)
saddle.fit(shown, num_steps=2 if SMOKE else 50, progress=False)
guide = AutoPerDatumMultivariateNormal(model)
saddle.fit_guide(guide, shown, progress=False, tolerance=100.0 if SMOKE else 0.05)
posteriors = {"particles": saddle, "Gaussian": guide}
print(compare_elbo(model, posteriors, shown, num_samples=4 if SMOKE else 32))

# %%
torch.manual_seed(0)
with torch.no_grad():
    clouds = ebm.posterior(shown).sample((20 if SMOKE else 200,)).numpy()
    with pyro.plate("draws", 200, dim=-2):
        found = guide(shown)["x_z"].numpy()
centred = found - found.mean(0)
covariances = np.einsum("sni,snj->nij", centred, centred) / len(found)
labels = [f"row {k}" for k in range(len(shown))]
gaussians = {"Gaussian": (found.mean(0), covariances)}
_, axes = plt.subplots(figsize=(7, 7), layout="constrained")
plot_plane(ebm, clouds, guides=gaussians, num_cells=9, labels=labels, axes=axes)
plt.show()

# %% [markdown]
# ## What to keep in mind
#
# - Look at $I(x; z)$ before you compare guides or speak of disentanglement. It is at the foot of
#   every ELBO table and at the end of every long fit.
# - A density of $x$ alone needs no latents that carry anything: a free-form energy is the better
#   density where a generator is too poor. Both together are a decoder that an energy corrects:
#   `MLPEnergy` with `generator=`, the decoder trained first.
# - Latents also carry the data where the model leaves no other way: a `ConjugateEnergy`, whose only
#   coupling is $z$, or a likelihood after an `EnergyPrior`.
# - Rotations of $z$, and bends that keep its prior, are not identified. Report what does not change
#   with them.
