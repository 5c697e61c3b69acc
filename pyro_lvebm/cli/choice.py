# SPDX-License-Identifier: Apache-2.0
"""Which base a table is fitted on: Gaussian, mixture or generator, by validation rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
from pyro.optim import Adam  # type: ignore[attr-defined]
from torch import Tensor

from pyro_lvebm.bases import GeneratorBase, Noise
from pyro_lvebm.cli.settings import JobSettings
from pyro_lvebm.energies import MLPEnergy, ZeroEnergy
from pyro_lvebm.evidence import log_evidence, total
from pyro_lvebm.generators import MLPGenerator
from pyro_lvebm.guides import AutoParticles
from pyro_lvebm.model import LVEBM
from pyro_lvebm.pools import TemperedPool
from pyro_lvebm.sites import Model, lvebm
from pyro_lvebm.training import Saddle

_Z_DIMS = (2, 4, 8)
"""Numbers of latent dimensions that "auto" tries."""

_STAGE = 0.4
"""Part of the steps of a fit that a generator is trained for alone, before f joins."""

_PATIENCE = 3

_MAX_FULL_DIM = 128
"""Entries of x up to which full noise is tried."""


@dataclass(frozen=True)
class Candidate:
    """A base under f = 0, and what validation rows say of it."""

    ebm: LVEBM
    name: str
    values: Tensor | None  # log p(x) of the validation rows, nats; None without any

    def described(self) -> dict[str, Any]:
        """Return it as JSON."""
        values = self.values
        return {
            "base": self.name,
            "z_dim": self.ebm.base_z.dim,
            "log_evidence": None if values is None else float(values.mean()),
            "std_error": None
            if values is None
            else float(values.std()) / math.sqrt(max(1, len(values))),
        }


def model_of(ebm: LVEBM, batch_size: int) -> Model:
    """Return the Pyro model of rows x (N, d) in minibatches."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=min(batch_size, len(x))) as i:
            lvebm("observations", ebm, obs=x[i])

    return model


def choose_base(
    x: Tensor,
    validation: Tensor | None,
    settings: JobSettings,
    *,
    ready: Callable[[], None],
    progress: bool = True,
) -> tuple[Candidate, list[Candidate]]:
    """Return the base to fit f on, and all that were compared.

    Each candidate is the model with f = 0: the Gaussian or the mixture that `LVEBM.from_data`
    finds, and generators trained by particles. The best generator is taken unless the former is
    better by more than a standard error of the paired difference: its latents carry the data.

    Args:
        x: Training rows (N, d), NaN where missing.
        validation: Rows that decide; without any, nothing is compared.
        settings: What to fit; a base or a number of latents that it names is not chosen.
        ready: Called before anything is trained, when the data are known to do.
        progress: Show progress bars.
    """
    base, seed = settings.base, settings.seed
    if base == "auto" and validation is None:
        base = "fitted"
    found: list[Candidate] = []
    if base != "generator":
        z_dim = settings.z_dim or _Z_DIMS[0]
        zero = ZeroEnergy(x.shape[1], z_dim)
        kind: Any = "auto" if base in ("auto", "fitted") else base
        fitted = LVEBM.from_data(zero, x, z_dim=z_dim, base=kind, pool=TemperedPool(seed=seed))
        count = fitted.base_x.num_components
        name = "Gaussian" if count == 1 else f"mixture of {count} Gaussians"
        found.append(Candidate(fitted, name, _evaluate(fitted, validation, seed)))
    if base in ("auto", "generator"):
        found += _generators(x, validation, settings, ready, progress)
    generators = [c for c in found if isinstance(c.ebm.base_x, GeneratorBase)]
    if not generators:
        return found[0], found
    best = max(generators, key=_mean)
    if len(generators) == len(found) or validation is None:
        return best, found
    assert found[0].values is not None and best.values is not None
    lead = found[0].values - best.values
    error = float(lead.std()) / math.sqrt(len(lead)) if len(lead) > 1 else 0.0
    loses = float(lead.mean()) > error
    return (found[0] if loses else best), found


def with_energy(chosen: Candidate, settings: JobSettings) -> LVEBM:
    """Return the LVEBM of a neural energy, zero at first, on the chosen base."""
    ebm = chosen.ebm
    energy = MLPEnergy(ebm.base_x.dim, ebm.base_z.dim, seed=settings.seed).to(ebm.base_x.loc)
    result = LVEBM(energy, ebm.base_x, ebm.base_z, TemperedPool(seed=settings.seed))
    result.expects_missing.copy_(ebm.expects_missing)
    return result


def _generators(
    x: Tensor,
    validation: Tensor | None,
    settings: JobSettings,
    ready: Callable[[], None],
    progress: bool,
) -> list[Candidate]:
    """Decoder models trained by particles, for each number of latents and kind of noise."""
    d, seed = x.shape[1], settings.seed
    if settings.z_dim is not None:
        z_dims: list[int] = [settings.z_dim]
    else:
        z_dims = [k for k in _Z_DIMS if k < d] or [1]
        z_dims = z_dims if validation is not None else z_dims[:1]
    noises: list[tuple[Noise, bool]] = [("diagonal", False)]
    if validation is not None and 1 < d <= _MAX_FULL_DIM and len(x) > 2 * d:
        noises.append(("full", True))  # the same for every z it is not as good (docs/training.md)
    found = []
    for z_dim in z_dims:
        for noise, varies in noises:
            generator = MLPGenerator(z_dim, (d,), scale=varies, seed=seed)
            ebm = LVEBM.from_data(
                ZeroEnergy(d, z_dim),
                x,
                z_dim=z_dim,
                generator=generator,
                noise=noise,
                pool=TemperedPool(seed=seed),
            )
            name = f"generator, z {z_dim}-D, {noise} noise" + " that varies with z" * varies
            ready()
            _train(ebm, x, validation, settings, name, progress)
            found.append(Candidate(ebm, name, _evaluate(ebm, validation, seed)))
    return found


def _train(
    ebm: LVEBM,
    x: Tensor,
    validation: Tensor | None,
    settings: JobSettings,
    name: str,
    progress: bool,
) -> None:
    model = model_of(ebm, settings.batch_size)
    guide = AutoParticles(model, max(2, settings.num_particles))
    saddle = Saddle(model, guide, Adam({"lr": settings.learning_rate}), seed=settings.seed)
    stopping: dict[str, Any] = {}
    if validation is not None:
        stopping = {"held_out": (validation,), "patience": _PATIENCE}
    steps = max(1, round(_STAGE * settings.num_steps))
    saddle.fit(x, num_steps=steps, progress=progress, description=name, **stopping)


def _evaluate(ebm: LVEBM, validation: Tensor | None, seed: int) -> Tensor | None:
    if validation is None:
        return None
    return log_evidence(ebm, validation, seed=seed, log_z=total([])).value.double()


def _mean(candidate: Candidate) -> float:
    return -math.inf if candidate.values is None else float(candidate.values.mean())
