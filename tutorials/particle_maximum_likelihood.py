# SPDX-License-Identifier: Apache-2.0

# %% [markdown]
# # Particle maximum likelihood for any Pyro model
#
# A model without an energy-based site has no negative phase. What remains of `Saddle` is particle
# gradient descent (Kuntz, Lim and Johansen 2023): particles follow Langevin dynamics on
# $p_\theta(z \mid y)$, and their mean gradient moves $\theta$ towards the maximum of the marginal
# likelihood
#
# $$p_\theta(y) = \int p_\theta(y, z)\, dz .$$
#
# No guide has to be chosen, and no family of densities limits the answer. This page fits two
# models: one whose maximum is known, and a Bayesian logistic regression whose weights belong to
# all data at once. It says for every number whether it is a bound. All of them are in nats; seeds
# are fixed.

# %%
import os
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.optim import SGD
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler

from pyro_lvebm import AutoParticles, Saddle, ipla, log_evidence_of, to_arviz

SMOKE = os.environ.get("PYRO_LVEBM_SMOKE") == "1"  # few rows and steps: runs, but fits nothing
pyro.set_rng_seed(0)
pyro.clear_param_store()

# %% [markdown]
# ## A model with a known maximum
#
# $z_i \sim N(\theta, 1)$ and $y_i \sim N(z_i, 1)$ for 100 data. Marginally $y_i \sim N(\theta, 2)$,
# so the maximum is at $\theta^* = \bar y$ exactly.

# %%
y = 2.0 + 2**0.5 * torch.randn(100, generator=torch.Generator().manual_seed(1))
best = float(y.mean())


def toy(y):
    theta = pyro.param("theta", torch.tensor(0.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


# %% [markdown]
# ## Three optimisers
#
# - `SGD` is particle gradient descent. The loss is a sum over the data, so a learning rate of
#   0.5 over their number is large.
# - `SGD` with a `momentum` $\mu$ needs nothing but the optimiser. It is faster, above all where the
#   likelihood is flat in some direction; in the long run its steps are in effect
#   $\gamma / (1 - \mu)$ long, so that $\theta$ also wanders further.
# - `ipla` adds noise, $\sqrt{2\gamma/N}\,\xi$ for $N$ particles and a step size $\gamma$ (the
#   interacting particle Langevin algorithm, Akyildiz et al. 2023). Then $\theta$ does not
#   converge to a point. It has a law, proportional to $p_\theta(y)^N$, which is narrow where $N$
#   is large, and whose width here is known: $\sqrt{2 / (100 N)}$.
#
# `step` leaves updates as they are. `fit` would shrink them along a schedule and end at an average,
# which suits the first two; the law of `ipla` needs a constant step size.

# %%
num_steps = 5 if SMOKE else 1500
rate = 0.2 / len(y)
optimisers = {
    "SGD, N = 16": (16, SGD({"lr": rate})),
    "SGD with momentum 0.5, N = 16": (16, SGD({"lr": rate, "momentum": 0.5})),
    "ipla, N = 16": (16, ipla(lr=rate, num_particles=16, seed=0)),
    "ipla, N = 1": (1, ipla(lr=rate, num_particles=1, seed=0)),
}
paths = {}
for name, (num_particles, optim) in optimisers.items():
    pyro.clear_param_store()
    saddle = Saddle(toy, AutoParticles(toy, num_particles), optim, num_moves=4, seed=0)
    paths[name] = np.empty(num_steps)
    for t in range(num_steps):
        saddle.step(y)
        paths[name][t] = pyro.param("theta").item()

figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for k, (name, path) in enumerate(paths.items()):
    axes[0].plot(path[:100], color=f"C{k}", label=name, lw=1)
    if name.startswith("ipla"):
        axes[1].hist(path[num_steps // 10 :], 30, density=True, color=f"C{k}", alpha=0.4)
axes[0].axhline(best, color="black", ls=":", label="maximum, mean(y)")
axes[0].set(xlabel="step", ylabel="θ", title="the first 100 steps")
axes[0].legend(fontsize="small")
grid = np.linspace(best - 0.5, best + 0.5, 200)
for num_particles, color in ((16, "C2"), (1, "C3")):
    std = (2.0 / len(y) / num_particles) ** 0.5
    density = np.exp(-0.5 * ((grid - best) / std) ** 2) / std / (2 * np.pi) ** 0.5
    axes[1].plot(grid, density, color=color, label=f"law of θ, N = {num_particles}")
axes[1].axvline(best, color="black", ls=":")
axes[1].set(xlabel="θ", ylabel="density", title="θ under ipla, without the first tenth of steps")
axes[1].legend(fontsize="small")
plt.show()

# %% [markdown]
# The spread over steps is an estimate too: successive steps are alike, and worth fewer independent
# draws than there are.

# %%
print(f"maximum of the likelihood  {best:.4f}")
for name, path in paths.items():
    kept = path[num_steps // 10 :]
    print(f"{name:30s} mean {kept.mean():.4f}, standard deviation {kept.std():.4f}")
for num_particles in (16, 1):
    std = (2.0 / len(y) / num_particles) ** 0.5
    print(f"p(y)^N has for N = {num_particles:2d}       standard deviation {std:.4f}")

# %% [markdown]
# ## What is a bound and what is not
#
# The loss is the mean of $-\log p_\theta(y, z)$ over the particles. It is an **energy, not an
# ELBO**, for particles have no density and no entropy, and it must not be compared with a loss of
# SVI. Here its negative is far from the log evidence, by the entropy of the posterior.
#
# `log_evidence_of` estimates $\log p_\theta(y_i)$ of every datum by annealing. Its exponential is
# unbiased, so the estimate errs **low** in expectation: a stochastic lower bound, which a single
# run may exceed by two standard errors. Without an energy-based site there is no $\log Z$ to add an
# error of its own. With `saddle=` it starts from Gaussians fitted to the particles.

# %%
pyro.clear_param_store()
saddle = Saddle(toy, AutoParticles(toy, 16), SGD({"lr": rate}), seed=0)
losses = saddle.fit(y, num_steps=5 if SMOKE else 200, progress=False)
theta = pyro.param("theta").item()
evidence = log_evidence_of(toy, y, saddle=saddle, num_particles=8 if SMOKE else 64)
exact = dist.Normal(theta, 2**0.5).log_prob(y).sum().item()
error = float((evidence.std_error**2).sum() ** 0.5)
print(f"θ after fit                 {theta:10.4f}")
print(f"minus the loss, no bound    {-losses[-1]:10.3f}")
print(f"log evidence, errs low      {float(evidence.value.sum()):10.3f} ± {error:.3f}")
print(f"log evidence, exact         {exact:10.3f}")

# %% [markdown]
# ## Bayesian logistic regression: a latent of all data
#
# As in Kuntz et al., the weights are latent, $w \sim N(\theta \mathbf 1, 5 I)$, the labels are
# Bernoulli, and $\theta$ is to be learnt. The data are the five features below of scikit-learn's
# breast-cancer table, standardised; the paper has another table of the same hospital, so its
# numbers are not ours.
#
# A particle is a whole vector of weights, and the plate has its full size: the Metropolis test of
# `MALA` is then exact. With a `subsample_size` a latent outside the plate would only be moved by
# noisy gradients, and `sample_posterior` refuses. Write the linear predictor as `(w * x).sum(-1)`:
# particles are a batch axis on the left of `w`, which `x @ w` has no place for.

# %%
table = load_breast_cancer()
columns = [0, 1, 4, 8, 9]
x = torch.tensor(StandardScaler().fit_transform(table.data[:, columns]), dtype=torch.float32)
labels = torch.tensor(table.target, dtype=torch.float32)
if SMOKE:
    x, labels = x[:60], labels[:60]
print([str(table.feature_names[k]) for k in columns])


def logistic(x, labels):
    theta = pyro.param("theta", torch.tensor(0.0))
    w = pyro.sample("w", dist.Normal(theta, 5**0.5).expand([x.shape[1]]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("label", dist.Bernoulli(logits=(w * x).sum(-1)), obs=labels)


pyro.clear_param_store()
saddle = Saddle(logistic, AutoParticles(logistic, 32), SGD({"lr": 0.2}), seed=0)
saddle.fit(x, labels, num_steps=5 if SMOKE else 300, progress=False)
theta = pyro.param("theta").item()
print(f"θ after fit {theta:.3f}")

# %% [markdown]
# ## A check: the marginal likelihood along θ
#
# $\theta$ is one number, so the marginal likelihood can be looked at. All labels share their
# weights and are one datum: `log_evidence_of` returns one value, $\log p_\theta(y)$ of the whole
# table. Each point errs low in expectation, with its standard error; a parabola through the points
# has its maximum near the end of the fit.

# %%
thetas = np.linspace(theta - 1.5, theta + 1.5, 3 if SMOKE else 9)
values, errors = [], []
for value in thetas:
    with torch.no_grad():
        pyro.param("theta").fill_(value)
    evidence = log_evidence_of(
        logistic, x, labels, saddle=saddle, num_particles=8 if SMOKE else 128, seed=1
    )
    values.append(evidence.value.item())
    errors.append(evidence.std_error.item())
with torch.no_grad():
    pyro.param("theta").fill_(theta)
curve = np.polynomial.Polynomial.fit(thetas, values, 2)
peak = float(curve.deriv().roots()[0])

figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
grid = np.linspace(thetas[0], thetas[-1], 100)
axes[0].plot(grid, curve(grid), color="C0", lw=1, label=f"parabola, maximum {peak:.3f}")
axes[0].errorbar(thetas, values, 2 * np.array(errors), fmt="o", ms=4, label="estimate ± 2 s.e.")
axes[0].axvline(theta, color="C1", label=f"θ after fit, {theta:.3f}")
axes[0].set(xlabel="θ", ylabel="log p(labels), nats", title="marginal likelihood, errs low")
axes[0].legend(fontsize="small")
draws = saddle.sample_posterior(x, labels, num_samples=4 if SMOKE else 50)["w"]
axes[1].boxplot(draws.flatten(0, 1).numpy(), showfliers=False)
axes[1].axhline(theta, color="C1", label="θ")
axes[1].set_xticks(range(1, 6), [str(table.feature_names[k])[5:] for k in columns], rotation=30)
axes[1].set(ylabel="weight", title="posterior draws at the fitted θ")
axes[1].legend(fontsize="small")
plt.show()
print(f"θ after fit {theta:.3f}, maximum of the parabola {peak:.3f}")
print(f"largest standard error of a point {max(errors):.4f}")

# %% [markdown]
# ## On to ArviZ
#
# `to_arviz` runs the particles on as Markov chains at frozen $\theta$. `r_hat` and `ess_bulk` say
# whether the particles agree. They are about the posterior of $w$ at this $\theta$, and say
# nothing of the error of $\theta$ itself: for that, fit again with other seeds, or look at `ipla`.

# %%
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing a major refactor")
    import arviz as az
idata = to_arviz(saddle, x, labels, num_samples=4 if SMOKE else 100, thinning=20)
print(az.summary(idata, var_names=["w"])[["mean", "sd", "mcse_mean", "ess_bulk", "r_hat"]])

# %% [markdown]
# ## When particles mix slowly
#
# $\theta$ moves as fast as its particles let it. With all thirty features of the table, many of
# which say the same, the posterior of $w$ is hundreds of times wider in some directions than in
# others, MALA takes thousands of moves across it, and $\theta$ stops short of its maximum. Signs
# are a small step size (`saddle.particles.step_size("w")`), a low `ess_bulk`, and fits that
# depend on `num_moves`. Raise `num_moves`, or write the model in coordinates of more even scale.
