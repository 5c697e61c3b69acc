# SPDX-License-Identifier: Apache-2.0
"""The interacting particle Langevin algorithm: gradient descent on θ with noise of a known law."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch.optim import Optimizer

from pyro_lvebm.rng import Stream, derive_seed, generator_for
from pyro_lvebm.validation import check_at_least


def ipla(lr: float, num_particles: int, seed: int = 0) -> PyroOptim:
    """Return an optimiser that makes of `Saddle` the interacting particle Langevin algorithm.

        θ ← θ − γ (1/N) Σ_k ∇_θ U(θ, z_k) + √(2γ/N) ξ,    U(θ, z) = −log p_θ(x, z),  ξ ~ N(0, I)

    The loss of a `Saddle` with N particles is (1/N) Σ_k U(θ, z_k), so this is gradient descent on
    it with noise. Particles z_k and parameter then move on one joint law, proportional to
    exp(−Σ_k U(θ, z_k)), in which

        θ ~ p_θ(x)^N / ∫ p_θ'(x)^N dθ'

    up to a bias of the order γ: with more particles θ concentrates at the maximum of the marginal
    likelihood, with a variance near 1/N times the inverse observed information, and it can leave a
    local maximum. This holds for `step`, for `fit` with `schedule=lambda progress: 1.0`, and for
    models without LVEBM sites and without subsampling: a falling schedule, a trust region and
    noisy gradients change the law. For a parameter with a constraint it is the law of its
    unconstrained value. `fit` ends at an average, which has a smaller variance.

    Args:
        lr: γ, the step size of θ, positive; the loss is a sum over all data, not a mean.
        num_particles: N, the number of particles of the guide, at least 1.
        seed: Fixes the noise. Each parameter has a stream of its own, from this and its name.

    Raises:
        ValueError: If lr is not positive and finite, or num_particles < 1.

    Source:
        Akyildiz, Crucinio, Girolami, Johnston and Sabanis (2023), Interacting particle Langevin
        algorithm for maximum marginal likelihood estimation, arXiv 2303.13429, algorithm 1. There
        the particles take one unadjusted step each; here they move by the kernel of the `Saddle`.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_lvebm import AutoParticles, Saddle, ipla
        >>> pyro.clear_param_store()
        >>> def model(y):
        ...     theta = pyro.param("theta", torch.tensor(0.0))
        ...     with pyro.plate("data", len(y)):
        ...         z = pyro.sample("z", dist.Normal(theta, 1.0))
        ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> y = 3.0 + torch.randn(50, generator=torch.Generator().manual_seed(0))
        >>> saddle = Saddle(model, AutoParticles(model, 20), ipla(lr=0.01, num_particles=20))
        >>> losses = [saddle.step(y) for _ in range(50)]
        >>> abs(pyro.param("theta").item() - y.mean().item()) < 0.2
        True
    """
    if not 0.0 < lr < math.inf:
        raise ValueError(f"lr must be positive and finite; got {lr}")
    check_at_least(1, num_particles=num_particles)

    def settings(name: str) -> dict[str, Any]:
        # One torch optimiser for each parameter: with one seed for all, parameters of the same
        # shape would share their noise. Names, for the order of parameters is not fixed.
        stream = derive_seed(seed, Stream.PARAMETER_NOISE, name)
        return {"lr": lr, "num_particles": num_particles, "seed": stream}

    return PyroOptim(NoisySGD, settings)


class NoisySGD(Optimizer):
    """Gradient descent with noise: θ ← θ − γ ∇ + √(2γ/N) ξ, for the parameters of one stream.

    The noise of a step is fixed by the seed, the position of the parameter and the number of its
    steps, which is the whole state.
    """

    def __init__(self, params: Any, lr: float, num_particles: int, seed: int) -> None:
        super().__init__(params, {"lr": lr, "num_particles": num_particles, "seed": seed})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step on every parameter with a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            gamma, n = group["lr"], group["num_particles"]
            for i, theta in enumerate(group["params"]):
                if theta.grad is None:
                    continue
                t = self.state[theta].get("step", 0)
                key = (Stream.PARAMETER_NOISE, i, t)
                generator = generator_for(group["seed"], *key, device=theta.device)
                xi = torch.empty_like(theta).normal_(generator=generator)
                theta.add_(theta.grad, alpha=-gamma).add_(xi, alpha=math.sqrt(2.0 * gamma / n))
                self.state[theta]["step"] = t + 1
        return loss
