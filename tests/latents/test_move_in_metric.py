# SPDX-License-Identifier: Apache-2.0
"""The positive phase on sharp posteriors of a generator: it keeps them, and it finds them.

Particles move by `Saddle.step` at a learning rate of 0. The position of an exact draw of p(z | x)
in its distribution function is uniform, and independent of those of the other particles.
"""

from __future__ import annotations

from typing import Any

import pyro
import pytest
import torch
from generator_models import SHARP, Curve, LinePosterior, decoder, line_posterior, simulate
from pyro.optim import SGD
from referee import ALPHA, CERTAIN, ks_p_value, normal
from scipy import stats
from small_models import plate_model
from torch import Tensor, nn

from pyro_lvebm import LVEBM, ULA, AutoParticles, Saddle
from pyro_lvebm.latents import positive_phase
from pyro_lvebm.sampling import init_state

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


class Tilt(nn.Module):
    """An energy of a user, in the coordinates of the data, that draws z to one side."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.weight * torch.tanh(z[..., 0] + 0.5 * x[..., 1])


ROWS = 250

WIDE = 0.5
"""Noise that leaves posteriors so wide that curvature varies within one."""


def uniform_p_value(found: Tensor) -> float:
    """Kolmogorov's test of positions (K, rows), and of normal scores of pairs of particles."""
    score = torch.special.ndtri(found.clamp(1e-9, 1.0 - 1e-9))
    columns = [score[0], score[-1]]
    if len(found) > 1:
        columns += [(score[0] - score[-1]) / 2**0.5, (score[0] + score[-1]) / 2**0.5]
    return min(1.0, len(columns) * min(ks_p_value(c, stats.norm.cdf) for c in columns))


def moved(
    ebm: LVEBM, x: Tensor, start: Tensor, num_steps: int, num_moves: int = 4, **options: Any
) -> Tensor:
    """Particles (K, rows, 1) after steps from a start."""
    pyro.clear_param_store()
    model = plate_model(ebm)
    guide = AutoParticles(model, len(start))
    saddle = Saddle(model, guide, SGD({"lr": 0.0}), num_moves=num_moves, seed=1, **options)
    with ebm.frozen():
        saddle.step(x)
        rows = {"data": torch.arange(len(x))}
        guide.write("scene_z", rows, start)
        if x.isnan().any():  # exact draws of what is missing, given z
            entries = ebm.base_x.unwhiten_given(normal((*start.shape[:-1], 2), 5), start)
            guide.write("scene_missing", rows, entries)
        for _ in range(num_steps):
            saddle.step(x)
    return guide.particles("scene_z").clone()


def problem(
    missing: bool = False,
    energy: Any = None,
    sigma: float = SHARP,
    dtype: torch.dtype = torch.float64,
) -> tuple[LVEBM, Tensor, LinePosterior]:
    ebm = decoder(Curve(), 1, 2, sigma, energy=energy, dtype=dtype)
    x, z = simulate(ebm, ROWS)
    if missing:
        x[: ROWS // 2, 1] = torch.nan
    return ebm, x, line_posterior(ebm, x, z, min(6.0, 40.0 * sigma))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize(("missing", "sigma"), [(False, SHARP), (True, SHARP), (False, WIDE)])
def test_exact_draws_stay_exact(count: int, missing: bool, sigma: float) -> None:
    """False alarms: 1e-3 each."""
    ebm, x, exact = problem(missing, sigma=sigma)
    start = exact.draw(count, 2)
    assert uniform_p_value(exact.position(start)) > ALPHA
    z = moved(ebm, x, start, 3)
    assert (z != start).double().mean() > 0.9
    assert uniform_p_value(exact.position(z)) > ALPHA


def test_single_precision_will_do() -> None:
    ebm, x, exact = problem(dtype=torch.float32)
    start = exact.draw(3, 2).float()
    z = moved(ebm, x, start, 3)
    assert z.dtype is torch.float32 and uniform_p_value(exact.position(z)) > ALPHA


def test_the_check_fails_where_every_proposal_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a linear generator, which this is not."""
    ebm, x, exact = problem()

    def accept(f: Any, state: Any, law: Any, generator: Any) -> Any:
        u = (
            law.mean[..., None, :]
            + torch.empty_like(state.u).normal_(generator=generator) @ law.root.mT
        )
        return init_state(f, u), None

    monkeypatch.setattr(positive_phase, "linearised_step", accept)
    monkeypatch.setattr(positive_phase, "_SEARCHES", 0.0)  # at its mode a datum is nearly linear
    z = moved(ebm, x, exact.draw(2, 2), 1, num_moves=1)
    assert uniform_p_value(exact.position(z)) < CERTAIN


def distance(count: int, num_steps: int, **options: Any) -> float:
    """p-value after steps from draws of base_z."""
    ebm, x, exact = problem()
    z = moved(ebm, x, normal((count, ROWS, 1), 3), num_steps, **options)
    return uniform_p_value(exact.position(z))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_sharp_posteriors_are_found_from_the_base(count: int) -> None:
    """False alarms: 1e-3 each. One step is not enough."""
    assert distance(count, 20) > ALPHA
    assert distance(count, 1) < CERTAIN


def test_without_a_metric_they_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    eye = torch.eye(1).double()
    monkeypatch.setattr(positive_phase, "gauss_newton_root", lambda r, v: eye.expand(ROWS, 1, 1))
    assert distance(2, 20) < CERTAIN


def test_ula_moves_in_the_metric_too() -> None:
    """With short steps its bias is small; without the metric it would leave for infinity."""
    assert distance(2, 30, kernel=ULA(0.95)) > ALPHA


def test_an_energy_on_top_is_part_of_the_target() -> None:
    """False alarms: 1e-3. The posterior without it is another one."""
    ebm, x, exact = problem(energy=Tilt(), sigma=WIDE)
    _, _, plain = problem(sigma=WIDE)
    z = moved(ebm, x, exact.draw(3, 2), 3)
    assert uniform_p_value(exact.position(z)) > ALPHA
    assert uniform_p_value(plain.position(z)) < CERTAIN
