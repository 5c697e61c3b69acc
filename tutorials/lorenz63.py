# SPDX-License-Identifier: Apache-2.0

# %% [markdown]
# # A physical system: the Lorenz attractor
#
# The equations of Lorenz (1963) are a caricature of convection in a fluid layer,
#
# $$\dot X = \sigma (Y - X), \quad \dot Y = X (\rho - Z) - Y, \quad \dot Z = X Y - \beta Z ,$$
#
# with $\sigma = 10$, $\rho = 28$, $\beta = 8/3$. Their trajectories are chaotic, but the
# fraction of time that they spend in a region of space is the same for almost every start: the
# attractor carries an invariant measure. This page fits a density to noisy measurements of the
# state, draws new states from it, tests them against held-out ones, and compares its log evidence
# with that of a mixture of Gaussians.
#
# Capital letters are the state. The model has $x = (X, Y, Z)$ as its datum and a latent variable
# $z$ of one dimension, which is something else. Seeds are fixed.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import torch
from pyro.optim import Adam
from scipy.integrate import solve_ivp
from scipy.spatial.distance import cdist
from scipy.stats import ks_2samp
from sklearn.mixture import GaussianMixture

from pyro_lvebm import LVEBM, AutoParticles, MLPEnergy, Saddle, log_evidence, log_partition, lvebm

SMOKE = os.environ.get("PYRO_LVEBM_SMOKE") == "1"  # few rows and steps: runs, but fits nothing
NAMES = ("X", "Y", "Z")
pyro.set_rng_seed(0)
pyro.clear_param_store()

# %% [markdown]
# ## Data
#
# One trajectory, integrated by an explicit Runge–Kutta method of order 8. After a transient, in
# which it falls onto the attractor, the state is recorded at every tenth point of a grid of step
# 0.01. Each coordinate is measured with an independent normal error of standard deviation 0.5.
# The attractor itself has volume zero and thus no density; the measurements have one, that of the
# invariant measure blurred by the error.
#
# A random fifth of the rows is held out for the comparison. Of the others, a tenth decides when
# training stops. Rows of one trajectory are not independent. At 0.1 time units their neighbours are
# far away compared with the error, but standard errors below, which take rows as independent, are
# approximate for that reason.


# %%
def velocity(_, state):
    X, Y, Z = state.tolist()
    return 10 * (Y - X), X * (28 - Z) - Y, X * Y - 8 / 3 * Z


rng = np.random.default_rng(0)
num_rows = 500 if SMOKE else 5000
times = 20 + 0.01 * np.arange(0, 10 * num_rows, 10)  # the first 20 time units are the transient
path = solve_ivp(
    velocity, (0, times[-1]), (1, 1, 20), method="DOP853", t_eval=times, rtol=1e-8, atol=1e-8
)
rows = rng.permutation(path.y.T + 0.5 * rng.normal(size=(num_rows, 3)))
data = torch.tensor(rows, dtype=torch.float32)
x, x_val, x_test = data.split([num_rows * 18 // 25, num_rows * 2 // 25, num_rows // 5])
print(f"{len(x)} rows to fit, {len(x_val)} for stopping, {len(x_test)} held out")

# %% [markdown]
# ## Model and training
#
# `LVEBM.from_data` starts from a mixture fitted to the data; the network learns what is left. The
# plate draws a minibatch. `Saddle` moves two Langevin particles for each latent.
#
# With `held_out`, `fit` estimates the mean log evidence of the stopping rows every now and then,
# and keeps the parameters that were best at it. It stops when `patience` estimates in a row bring
# no improvement.

# %%
ebm = LVEBM.from_data(MLPEnergy(3, 1, hidden=(8,) if SMOKE else (128, 128)), x, z_dim=1)


def model(x):
    with pyro.plate("data", len(x), subsample_size=min(256, len(x))) as i:
        lvebm("lorenz", ebm, obs=x[i])


saddle = Saddle(model, AutoParticles(model, 2), Adam({"lr": 3e-3}), seed=0)
losses = saddle.fit(
    x,
    num_steps=6 if SMOKE else 800,
    held_out=(x_val,),
    patience=3,
    evaluate_every=3 if SMOKE else 100,
    progress=False,
)

# %% [markdown]
# `saddle.history` has a row for every step. On the left is what `fit` stops by. In the middle is
# the pool's running estimate of $\log Z_\theta$, which starts at zero because the untrained model
# is the mixture; on the right its effective sample size, which falls as the model moves away from
# that mixture.

# %%
history = saddle.history
evaluated = history.dropna(subset="log_evidence")
print(evaluated[["log_evidence", "log_evidence_se"]].round(3))

figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
axes[0].errorbar(
    evaluated.index, evaluated.log_evidence, yerr=evaluated.log_evidence_se, fmt="o-", capsize=3
)
axes[0].set(title="stopping rows", ylabel="log evidence ± se, nats per datum")
axes[1].plot(history.log_partition)
axes[1].set(title="log Z of the pool", ylabel="nats")
axes[2].plot(history.ess)
axes[2].set(title="effective sample size of the pool", ylabel="chains", ylim=(0, None))
for ax in axes:
    ax.set_xlabel("step")
plt.show()

# %% [markdown]
# ## New states beside measured ones
#
# `ebm.pool.draw` resamples the weighted chains of the pool and moves the copies on by Langevin
# steps; `ebm.unwhiten` takes them to the coordinates of the data. Many draws at once would share
# chains, and the tests below want independent ones, so the pool is refreshed between small batches.
#
# A mixture of Gaussians with full covariances is fitted to the same rows. The stopping rows choose
# its number of components, as they choose the step at which the LVEBM is best.

# %%
torch.manual_seed(0)
batches = []
for _ in range(20):
    for _ in range(1 if SMOKE else 8):
        ebm.pool.refresh(ebm)
    batches.append(ebm.pool.draw(ebm, len(x_test) // 20))
draws, _ = ebm.unwhiten(torch.cat(batches))

mixture = max(
    (
        GaussianMixture(k, n_init=3, reg_covar=1e-3, random_state=0).fit(x.double())
        for k in ((2, 5) if SMOKE else (5, 10, 15, 20, 30))
    ),
    key=lambda candidate: candidate.score(x_val),
)
mixture_draws, _ = mixture.sample(len(x_test))
print(f"mixture of {mixture.n_components} Gaussians")


def attractor(ax, rows, title, **colour):
    points = ax.scatter(*np.asarray(rows).T, s=7, alpha=0.6, linewidths=0, **colour)
    ax.set_title(title, y=0.95)
    ax.set(xlim=(-20, 20), ylim=(-27, 27), zlim=(0, 50))
    ax.set(xticks=(-15, 0, 15), yticks=(-20, 0, 20), zticks=(0, 25, 50))
    ax.set(xlabel="X", ylabel="Y", zlabel="Z")
    ax.view_init(elev=10, azim=-50)
    ax.set_box_aspect((1, 1, 0.8), zoom=0.82)  # leaves room for the label of the vertical axis
    return points


samples = {"held-out rows": x_test, "LVEBM": draws, "mixture of Gaussians": mixture_draws}
figure, axes = plt.subplots(
    1, 3, figsize=(12, 3.8), subplot_kw={"projection": "3d"}, layout="constrained"
)
for ax, (title, sample) in zip(axes, samples.items(), strict=True):
    attractor(ax, sample, title)
plt.show()

figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
for j, ax in enumerate(axes):
    bins = np.linspace(float(data[:, j].min()), float(data[:, j].max()), 35)
    ax.hist(x_test[:, j], bins, density=True, color="0.8", label="held-out rows")
    for colour, title in (("C0", "LVEBM"), ("C1", "mixture of Gaussians")):
        ax.hist(
            np.asarray(samples[title])[:, j],
            bins,
            density=True,
            histtype="step",
            color=colour,
            linewidth=1.5,
            label=title,
        )
    ax.set(xlabel=NAMES[j])
axes[0].set(ylabel="density")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
plt.show()

# %% [markdown]
# ## Can a test tell them apart?
#
# The test of Kolmogorov and Smirnov compares one coordinate at a time, and is blind to how the
# coordinates go together. The energy distance (Székely and Rizzo, 2004) compares the samples in
# three dimensions; permutations of the labels give its p-value. Training rows against held-out
# rows show what two samples of one distribution look like.
#
# A p-value is that of independent draws. With four of them in a row of the table, one below 0.05
# is not rare under equality; one below 0.05 / 4 is. A large one does not say that two
# distributions are equal, only that samples of this size do not tell them apart.
#
# A little probability in the wrong place escapes these tests. The distance of each sample's points
# to the nearest training row, in the units of the state, shows it: stray draws are farther away
# than any held-out row.


# %%
def energy_test(a, b, num_permutations=999):
    both = np.concatenate([a, b])
    both = both / both.std(0)
    distances = cdist(both, both)
    signs = np.repeat([1.0, -1.0], [len(a), len(b)])  # of equal size
    permuted = [rng.permutation(signs) for _ in range(num_permutations)]
    signs = np.stack([signs, *permuted], 1)
    statistic = -(signs * (distances @ signs)).sum(0) / len(a) ** 2
    return (statistic >= statistic[0]).mean()  # the observed labelling counts as one of them


p_values = {}
for title, sample in {"training rows": x[: len(x_test)], **samples}.items():
    if title == "held-out rows":
        continue
    pair = x_test.numpy(), np.asarray(sample)
    p_values[title] = {
        f"KS {name}": ks_2samp(pair[0][:, j], pair[1][:, j]).pvalue for j, name in enumerate(NAMES)
    }
    p_values[title]["energy distance"] = energy_test(*pair)
print("p-values against held-out rows")
print(pd.DataFrame(p_values).T.round(3))

print("distance to the nearest training row")
for title, sample in samples.items():
    nearest = cdist(sample, x).min(1)
    print(f"  {title:20s} median {np.median(nearest):5.2f}, largest {nearest.max():5.2f}")

# %% [markdown]
# ## Held-out evidence
#
# `log_partition` brackets $\log Z_\theta$ by annealing from the base, which errs low, and back from
# model draws, which errs high as far as the draws follow the model. `log_evidence` integrates $z$
# out for each row. Its `lower` uses the upper end of the bracket and errs low; `value` uses the
# point estimate and may err either way. The density of the mixture is exact.
#
# Here $z$ has one dimension, so a sum over a fine grid does the same integral and checks it. It
# rests on the same $\log Z_\theta$.
#
# The standard errors are over held-out rows, with that of $\log Z_\theta$ where it enters. The rows
# are the same for all models and most of their spread is common, so the last line, the mean of the
# differences row by row, is known better than each mean. The mixture is a strong rival: a few
# Gaussians cover a blurred surface in three dimensions well. Expect the LVEBM to come close, not to
# win.

# %%
log_z = log_partition(ebm, seed=0)
print(log_z)
evidence = log_evidence(ebm, x_test, seed=0, log_z=log_z)

step = 0.05
grid = torch.arange(-6, 6, step)


def log_joint(x):
    """Return log p(x_i, z) + log Z for all rows and all z of the grid."""
    with torch.no_grad():
        return torch.stack([-ebm.energy(x, z.expand(len(x), 1)) for z in grid], 1)


by_grid = log_joint(x_test).logsumexp(1) + np.log(step) - log_z.estimate
gaussian = ebm.base_x.log_prob(x_test)
of_mixture = torch.tensor(mixture.score_samples(x_test))


def line(title, values, std_error=0.0):
    """Print a mean with its standard error: over rows, and `std_error` of log Z."""
    error = np.hypot(float(values.std()) / len(values) ** 0.5, std_error)
    print(f"  {title:28s} {float(values.mean()):8.3f} ± {error:.3f}")


print("held-out log p(x), nats per datum")
line("LVEBM, errs low", evidence.lower, log_z.std_error)
line("LVEBM, point estimate", evidence.value, log_z.std_error)
line("LVEBM, z on a grid", by_grid, log_z.std_error)
line(f"mixture of {mixture.n_components} Gaussians", of_mixture)
line("one Gaussian", gaussian)
line("LVEBM − mixture, row by row", evidence.value - of_mixture, log_z.std_error)

# %% [markdown]
# ## What z has learnt
#
# Nothing says what $z$ has to mean. Below, each training row is coloured by its posterior mean: on
# the left from `saddle.sample_posterior`, which runs the particles of training on as Markov
# chains at frozen parameters, on the right from the grid. Colours run over the central 98 % of the
# values on the right. Where colours change smoothly, $z$ is a coordinate along the attractor;
# where they jump, it tells parts of it apart.
#
# The posterior of $z$ can have several modes, and a Langevin particle seldom leaves the one that
# it is in. The correlation of the means of the two particles of a datum shows how much that
# matters: it would be close to one if both had seen the whole posterior. That is an error of these
# posterior means, and not of the evidence above, for which $z$ is annealed.

# %%
chains = saddle.sample_posterior(
    x, num_samples=10 if SMOKE else 100, num_warmup=5 if SMOKE else 100
)["lorenz_z"]
by_particle = chains.mean(1)[..., 0]  # (particles, rows)
weights = log_joint(x).softmax(1)
mean = weights @ grid
variance = weights @ grid.square() - mean.square()
by_particles = by_particle.mean(0)
print(f"correlation of the two particles' means: {np.corrcoef(*by_particle)[0, 1]:.2f}")
print(f"correlation of their mean with the grid: {np.corrcoef(by_particles, mean)[0, 1]:.2f}")
share = float(mean.var() / (mean.var() + variance.mean()))
print(f"share of the variance of z that is between data: {share:.2f}")

low, high = np.quantile(mean, (0.01, 0.99))
figure, axes = plt.subplots(
    1, 2, figsize=(10, 4), subplot_kw={"projection": "3d"}, layout="constrained"
)
for ax, title, values in (
    (axes[0], "particles", by_particles),
    (axes[1], "grid", mean),
):
    points = attractor(ax, x, title, c=values, cmap="viridis", vmin=low, vmax=high)
figure.colorbar(points, ax=axes, label="posterior mean of z", shrink=0.7, extend="both")
plt.show()

# %% [markdown]
# `saddle.save("lorenz63.safetensors")` keeps the fit. Called without `obs`, `lvebm("lorenz", ebm)`
# draws a state, so that the fitted density can be the prior of the state in a larger Pyro model.
