# SPDX-License-Identifier: Apache-2.0

# %% [markdown]
# # When training goes wrong
#
# Training by maximum likelihood lowers the energy at the data and raises it at draws of the model,
#
# $$
# \nabla_\theta \log p_\theta(x) = -\mathbb{E}_{p_\theta(z \mid x)}[\nabla_\theta E_\theta(x, z)]
#   + \mathbb{E}_{p_\theta(x, z)}[\nabla_\theta E_\theta(x, z)] .
# $$
#
# Both expectations are taken over Markov chains: the latent particles, and the pool of negatives.
# If either lags behind $\theta$, the gradient is wrong, and the loss alone does not tell. This page
# provokes seven failures on purpose. For each it shows what one sees, why it happens, and the cure.
#
# `saddle.history` has a row for every step. Every 50 steps, and at the end of a fit, `Saddle` takes
# the means of the last 50 rows and gives a `TrainingWarning` for each symptom, once. Energies are
# in nats; seeds are fixed. Pools and networks are small here, so that the page runs quickly.

# %%
import os
import textwrap
import warnings
from contextlib import contextmanager

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.optim import SGD, Adam
from sklearn.datasets import load_wine, make_moons
from sklearn.preprocessing import StandardScaler

from pyro_lvebm import (
    LVEBM,
    AutoParticles,
    MLPEnergy,
    PersistentPool,
    Saddle,
    TemperedPool,
    TrainingWarning,
    history_figure,
    log_partition,
    lvebm,
)

SMOKE = os.environ.get("PYRO_LVEBM_SMOKE") == "1"  # few steps: runs, but shows no failure


# %% [markdown]
# A few functions serve all runs below. They build an LVEBM, train it, and print the warnings where
# a program would show them at once. `max_kl` and the schedule have their defaults unless a run says
# otherwise; `num_moves` and the pools are smaller than theirs.
#


# %%
def new_ebm(x, pool, z_dim=1, kl_penalty=None):
    pyro.clear_param_store()
    energy = MLPEnergy(x.shape[1], z_dim, hidden=(8,) if SMOKE else (64, 64), kl_penalty=kl_penalty)
    # From a mixture fitted to the data, the default, most of what follows does not go wrong.
    return LVEBM.from_data(energy, x, z_dim=z_dim, base="gaussian", pool=pool)


def plain_model(ebm):
    def model(x):
        with pyro.plate("data", len(x), subsample_size=min(128, len(x))) as i:
            lvebm("scene", ebm, obs=x[i])

    return model


def constant(progress):
    """A schedule that does not shrink; with `min_kl=0` nothing is lengthened either."""
    return 1.0


@contextmanager
def printed_warnings():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TrainingWarning)
        yield
    for w in caught:
        print(textwrap.fill(f"{w.category.__name__}: {w.message}", 100))


def train(model, *data, optim, num_steps, max_kl=None, **options):
    saddle = Saddle(model, AutoParticles(model), optim, num_moves=2, max_kl=max_kl)
    with printed_warnings():
        saddle.fit(*data, num_steps=4 if SMOKE else num_steps, progress=False, **options)
    print(f"{saddle.step_count} steps")
    return saddle


def last_rows(saddle, *columns):
    """Means over the last 50 steps."""
    return saddle.history[list(columns)].tail(50).mean().round(3).to_string()


# %% [markdown]
# ## A history without symptoms
#
# Two moons, with a tempered pool and the trust region.

# %%
rows, _ = make_moons(600, noise=0.1, random_state=0)
moons = torch.tensor(rows, dtype=torch.float32)
figure, axes = plt.subplots(figsize=(5, 2.5), layout="constrained")
axes.scatter(*moons.T, s=4)
axes.set(title="two moons", xlabel="x[0]", ylabel="x[1]")
plt.show()

# %%
good = new_ebm(moons, TemperedPool(8, 32, num_moves=4))
saddle = train(plain_model(good), moons, optim=Adam({"lr": 2e-2}), num_steps=200)
history_figure(saddle.history)

# %% [markdown]
# How to read the panels:
#
# - **mean energy**: of the data and of the model's draws. At the maximum of the likelihood the
#   gradient vanishes, and for a flexible energy the two come close, up to a gap of the order of
#   16 d / N nats that the prior of an `MLPEnergy` leaves. A gap that *grows* says that the pool
#   does not follow. On a small table a gap also says that the data at hand are fitted better than
#   others would be.
# - **log Z online**: the pool's estimate. It moves with $\theta$; in the end it should settle.
# - **effective negatives**: the ESS of the weighted pool, out of all its chains.
# - **moves** of pool and latents: MALA adapts its step size until about 57 % are accepted. Rates
#   that fall say that $\theta$ moves faster than the step size adapts.
# - **exchanges**: how often neighbouring temperatures exchange chains.
# - **size of the update** and **trust region**: $\mathrm{KL}(p_\text{old} \,\|\, p_\text{new})$ as
#   the pool sees it, and how often the update was halved to keep it under `max_kl`. Some halvings
#   are the trust region at work.
#
# ## The textbook recipe diverges
#
# Persistent chains at one temperature, moved by unadjusted Langevin (ULA), with Adam and no limit
# on the update: this is how energy-based models are often trained. `max_kl=1e12` switches the trust
# region off; with `min_kl=0` and a constant schedule, updates are as Adam made them.

# %%
textbook = new_ebm(moons, PersistentPool(256, num_moves=4))
saddle = train(
    plain_model(textbook),
    moons,
    optim=Adam({"lr": 2e-2}),
    num_steps=100,
    max_kl=1e12,
    min_kl=0,
    schedule=constant,
)
history_figure(saddle.history)

# %% [markdown]
# **What one sees.** The energies of data and negatives part, without end; log Z falls with them.
# Updates of up to millions of nats are taken. Latents accept a fifth of their moves. Nothing looks
# wrong in the acceptance of the pool: ULA has no test and accepts all. Nor in its ESS: chains of
# equal weight always have the largest.
#
# **Why.** The negatives are not where the model is. Where no negative stands, nothing raises the
# energy again, so that lowering it at the data costs nothing, and every step is worse than the
# last. In the end the loss falls without bound: it contains log Z as the pool sees it.
#
# **Cure.** A pool that mixes and a limit on the update: the defaults, as in the first run, at the
# same learning rate. Both are needed: the next section has the pool without the limit, and the last
# one the limit without the pool.
#
# ## Few effective negatives
#
# The tempered pool alone is not enough. Here is the wine table, 13 columns, with a high and
# constant learning rate, without a trust region, and without the prior that an `MLPEnergy` brings
# along.

# %%
table = StandardScaler().fit_transform(load_wine().data)
wine = torch.tensor(table, dtype=torch.float32)
wine = wine[torch.randperm(len(wine), generator=torch.Generator().manual_seed(0))]
wine, wine_test = wine[:60], wine[60:]


def train_fast(max_kl, **options):
    ebm = new_ebm(wine, TemperedPool(8, 16, num_moves=2), z_dim=2, kl_penalty=0)
    optim = Adam({"lr": 1e-1})
    model = plain_model(ebm)
    saddle = train(
        model, wine, optim=optim, num_steps=100, max_kl=max_kl, schedule=constant, **options
    )
    history = saddle.history
    print(f"lowest ESS {history.ess.min():.0f} of 128, largest KL {history.kl.max():.2f} nats")
    log_z = history.log_partition
    print(f"log Z online from {log_z.min():.1f} to {log_z.max():.1f}")
    print(last_rows(saddle, "ess", "kl", "positive_energy", "negative_energy"))
    value, error = saddle.log_evidence(wine_test)
    print(f"held-out log evidence {value:.2f} ± {error:.2f} nats per datum")


train_fast(max_kl=1e12, min_kl=0)

# %% [markdown]
# **What one sees.** Updates of hundreds of nats, an ESS that falls to two chains, and energies and
# log Z that jump by hundreds of nats and back. Means can deceive: between such updates the ESS is
# high, so there is no warning. Held-out rows lose half a nat beside the second run.
#
# **Why.** The pool holds draws of the model as it was. Weights carry them over to the model as it
# is; after a long way, few chains have nearly all the weight. The gradient is then that of a
# handful of negatives.
#
# **Cure.** Keep the trust region: an update is halved until the chains can follow. If the ESS is
# low at the default `max_kl`, take more chains or levels.

# %%
train_fast(max_kl=None)


# %% [markdown]
# ## A ladder with too few levels
#
# Eight narrow modes on a circle, and a ladder of two levels: the base, and the model. The second
# run has as many chains in all, on eight levels.
#


# %%
def ring(n, seed):
    generator = torch.Generator().manual_seed(seed)
    angle = torch.randint(8, (n,), generator=generator) * (torch.pi / 4)
    centre = torch.stack([angle.cos(), angle.sin()], -1)
    return centre + 0.03 * torch.randn(n, 2, generator=generator)


modes, modes_test = ring(600, 0), ring(300, 1)
for levels, chains in ((2, 128), (8, 32)):
    print(f"--- {levels} levels of {chains} chains")
    ebm = new_ebm(modes, TemperedPool(levels, chains, num_moves=4))
    saddle = train(plain_model(ebm), modes, optim=Adam({"lr": 1e-2}), num_steps=200)
    print(last_rows(saddle, *(f"swap_rate_{k}" for k in range(levels - 1))))
    value, error = saddle.log_evidence(modes_test)
    print(f"held-out log evidence {value:.2f} ± {error:.2f} nats per datum")

# %% [markdown]
# **What one sees.** A swap rate that falls towards zero as the model moves away from its base.
#
# **Why.** Chains at the model's temperature cross between modes by way of the base, where they are
# drawn afresh. An exchange is accepted if both chains are plausible at both temperatures. Between
# the base and eight narrow modes hardly any are, and the chains of the model are left to
# themselves, as in a `PersistentPool`.
#
# **Cure.** More levels (`num_levels`). The levels between take their temperatures by themselves.
# The number that is needed grows with the distance of the model from its base, so look again late
# in the training.
#
# ## Latents that hardly move
#
# A regression on the latent with a small, fixed noise. Its posterior is much narrower than the
# first step of the particles.

# %%
x = moons[:300]
y = x[:, 0] + 0.02 * torch.randn(len(x), generator=torch.Generator().manual_seed(1))


def regression(ebm, noise):
    def model(x, y):
        scale = noise()
        with pyro.plate("data", len(x), subsample_size=128) as i:
            _, z = lvebm("scene", ebm, obs=x[i])
            pyro.sample("y", dist.Normal(z.squeeze(-1), scale), obs=y[i])

    return model


def fixed_noise():
    return torch.tensor(0.02)


def learnt_noise():
    return pyro.param("noise", torch.tensor(1.0), constraint=constraints.positive)


for noise in (fixed_noise, learnt_noise):
    print(f"--- {noise.__name__}")
    ebm = new_ebm(x, TemperedPool(8, 16, num_moves=4))
    saddle = train(regression(ebm, noise), x, y, optim=Adam({"lr": 1e-2}), num_steps=100)
    acceptance = saddle.history["latent_acceptance_scene_z"]
    print(acceptance.groupby((acceptance.index - 1) // 25 * 25).mean().round(3).to_string())

# %% [markdown]
# **What one sees.** With the small noise, the acceptance starts at zero. Particles that do not move
# are no draws of $p_\theta(z \mid x)$, and the positive phase is that of their first positions.
#
# **Why.** The posterior is narrower than the step, either from the start, as here, or because
# $\theta$ narrows it faster than the step size adapts: downwards by at most 6 % in each move.
#
# **Cure.** See first whether the acceptance rises by itself, as it does here in the end; then the
# warning belongs to the first steps only, and training may go on. The step size adapts after every
# move, so more of them (`num_moves`; two here, eight by default) let it follow sooner. Or give the
# likelihood a scale that is learnt and starts wide, as in the second run, and the step size follows
# it down. If the acceptance falls late in the training, $\theta$ is too fast: lower the learning
# rate, or take more moves.
#
# ## Updates halved over and over
#
# The trust region takes any learning rate, but not at any price. SGD with an absurd one, and with
# one of sensible size:

# %%
for rate in (1e6, 1e-2):
    print(f"--- learning rate {rate:g}")
    ebm = new_ebm(moons, TemperedPool(8, 16, num_moves=4))
    saddle = train(plain_model(ebm), moons, optim=SGD({"lr": rate}), num_steps=100)
    print(last_rows(saddle, "halvings", "kl", "positive_energy"))

# %% [markdown]
# **What one sees.** The largest number of halvings, and a KL of zero: nearly every update is
# undone. The energy of the data stays where it was; at the lower rate it falls.
#
# **Why.** The number of halvings is limited, since each costs an evaluation of the pool. An update
# that is still too large after the last is undone. The trust region makes an update safe; it does
# not choose one.
#
# **Cure.** Lower the learning rate, a hundredfold at a time, until the mean of `halvings` is small;
# a few do no harm. With Adam, whose updates do not grow with the gradient, start between 1e-3 and
# 1e-2.
#
# ## Overfitting
#
# The wine table again, 60 rows of it, in a fit without symptoms, and without the prior that an
# `MLPEnergy` brings along (`kl_penalty=0`). The other rows are held out and evaluated every
# 40 steps.

# %%
ebm = new_ebm(wine, TemperedPool(8, 32, num_moves=4), z_dim=2, kl_penalty=0)
saddle = train(
    plain_model(ebm),
    wine,
    optim=Adam({"lr": 1e-2}),
    num_steps=600,
    held_out=(wine_test,),
    patience=4,
    evaluate_every=2 if SMOKE else 40,
)
print(saddle.history[["log_evidence", "log_evidence_se"]].dropna().round(3))
value, error = saddle.log_evidence(wine_test)
print(f"with the parameters that fit left: {value:.3f} ± {error:.3f} nats per datum")
history_figure(saddle.history)

# %% [markdown]
# **What one sees.** The log evidence of held-out rows rises, and then falls, while the energy of
# the training rows goes on falling and parts from that of the model's draws. No warning: the
# gradient is right, and it is that of the training rows.
#
# **Why.** A network with thousands of weights can tell 60 rows from everything else.
#
# **Cure.** Held-out rows: `fit(held_out=(x_held_out,), patience=4)` stops after four evaluations
# without a better one, and leaves the averaged parameters that were best. The prior that was
# switched off here holds back what few rows can make up; on 142 rows of wine it is worth half a
# nat, on 60 nothing that was measurable, and it does not replace held-out rows. The last line
# above evaluates them anew, with pools that have moved on, hence the small difference. The error
# bars are those of a mean over held-out rows, and most of them is common to all evaluations: the
# differences along the curve are known better than each value. The best of several values is a
# little too good; report the evidence of rows that were used for neither.
#
# ## Two estimates of log Z that disagree
#
# A plain persistent pool once more, now with the trust region, so that no update is large. Beside
# it, the tempered run from the top of the page. The pool's online estimate stands beside the
# annealed bracket of `log_partition`.

# %%
plain = new_ebm(moons, PersistentPool(256, num_moves=4))
saddle = train(
    plain_model(plain), moons, optim=Adam({"lr": 1e-2}), num_steps=300, schedule=constant
)
print(last_rows(saddle, "positive_energy", "negative_energy", "ess", "kl"))
for name, ebm in (("persistent", plain), ("tempered", good)):
    print(f"--- {name} pool")
    with printed_warnings():
        log_z = log_partition(
            ebm, num_particles=32 if SMOKE else 256, num_runs=4, num_refreshes=4 if SMOKE else 50
        )
    print(f"online   log Z = {float(ebm.log_partition):.4f}")
    print(f"annealed {log_z}")

# %% [markdown]
# **What one sees.** For the persistent pool the two differ by far more than the width of the
# bracket, and the energies of data and negatives have parted. Every update was small, as its own
# pool sees it. `log_partition` warns of it. For the tempered pool they agree.
#
# **Why.** The online estimate adds up what each update changes at the chains. Chains that miss the
# places where the energy has become low never see that Z has grown. The same chains measure the KL
# of an update, so the trust region is blind in the same places. The annealed estimate starts from
# exact draws of the base and needs no chains of the training.
#
# **What to trust.** The annealed one, and `lower` before `estimate`: it errs low whatever the
# energy. `upper` starts at draws of the pool, so it is a bound only as far as the pool follows the
# model; when the two estimates disagree, do not quote it, nor any density that rests on it.
#
# **Cure.** Train with a `TemperedPool`. A model trained against a wrong log Z is not saved by a
# better estimate of it afterwards: its gradient was wrong as well.
#
# ## In short
#
# | Symptom | Look at | First cure |
# |---|---|---|
# | energies and log Z run away | `positive_energy`, `negative_energy` | `TemperedPool`, `max_kl` |
# | ESS under 5 % | `ess` | lower `max_kl`; more chains or levels |
# | swap rate under 0.1 | `swap_rate_<pair>` | more levels |
# | latents accepted under 0.2 | `latent_acceptance_<site>` | more moves; wide likelihood |
# | over 15 halvings a step | `halvings` | lower learning rate |
# | held-out evidence falls | `log_evidence` | `held_out`, `patience` |
# | online and annealed log Z apart | `log_partition` | `TemperedPool`; trust the annealed one |
