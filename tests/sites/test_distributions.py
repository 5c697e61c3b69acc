# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch
from referee import ALPHA, CERTAIN, mean_p_value, normal, plane_grid, variance_p_value
from shaped_models import base_law, shaped_ebm
from small_models import (
    condition,
    data_of,
    exact_joint,
    exact_posterior,
    quadratic_ebm,
    rotations,
    tiny_pool,
    warm,
    whitened,
)
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from pyro_lvebm import LVEBM, JointEnergy, QuadraticEnergy, TemperedPool
from pyro_lvebm.bases.gaussian import GaussianBase
from pyro_lvebm.model.density import Density
from pyro_lvebm.model.posterior import Posterior
from pyro_lvebm.sites import distributions as package
from pyro_lvebm.sites.distributions import LatentSite, ObservedSite, Pairing

# --- the joint ------------------------------------------------------------------------------


def test_the_joint_is_one_distribution_over_flat_events() -> None:
    ebm = shaped_ebm()
    joint = ebm.joint()
    assert isinstance(joint, JointEnergy) and isinstance(joint, dist.TorchDistribution)
    assert joint.batch_shape == () and joint.event_shape == (6,)
    assert joint.support is torch.distributions.constraints.real_vector
    value = normal((5, 6), 1)
    x, z = value[:, :4].reshape(5, 2, 2), value[:, 4:].reshape(5, 2, 1)
    torch.testing.assert_close(joint.log_prob(value), -ebm.energy(x, z))


@pytest.mark.parametrize("batch_shape", [[3], (2, 3), torch.Size([1])])
def test_the_joint_expands(batch_shape: list[int] | tuple[int, ...]) -> None:
    joint = shaped_ebm().joint().expand(batch_shape)
    batch = tuple(batch_shape)
    assert joint.batch_shape == batch
    assert joint.sample().shape == (*batch, 6)
    assert joint.sample((4,)).shape == (4, *batch, 6)
    assert joint.log_prob(normal((6,), 1)).shape == batch
    value = normal((5, *(1,) * len(batch), 6), 2)
    assert joint.log_prob(value).shape == (5, *batch)
    assert joint.expand([7, *batch]).batch_shape == (7, *batch)


def test_joint_density_has_the_gradient_of_the_energy() -> None:
    ebm = quadratic_ebm()
    value = normal((4, 5), 1).requires_grad_(True)
    (ours,) = torch.autograd.grad(ebm.joint().log_prob(value).sum(), value)
    (exact,) = torch.autograd.grad(exact_joint(ebm).log_prob(value).sum(), value)
    torch.testing.assert_close(ours, exact)


def test_draws_repeat_by_the_global_seed_and_differ_without() -> None:
    joint = warm(quadratic_ebm(), 2).joint()
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(joint.sample((5,)))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert not draws[0].requires_grad


# --- the posterior --------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("full_z", [False, True])
def test_posterior_shapes(batch: tuple[int, ...], full_z: bool) -> None:
    ebm = shaped_ebm(full_z)
    x = normal((*batch, 2, 2), 1)
    posterior = Posterior(ebm, x, num_particles=4)
    assert posterior.batch_shape == batch and posterior.event_shape == (2, 1)
    assert posterior.support.event_dim == 2
    assert posterior.sample().shape == (*batch, 2, 1)
    assert posterior.sample((5, 2)).shape == (5, 2, *batch, 2, 1)
    wide = posterior.expand([4, *batch])
    assert wide.batch_shape == (4, *batch) and wide.num_particles == 4
    z = normal((4, *batch, 2, 1), 3)
    torch.testing.assert_close(wide.log_prob(z), posterior.log_prob(z))
    flat = x.reshape(*batch, 4)
    gap = posterior.log_prob(z) - flat_posterior(ebm, flat).log_prob(z.reshape(4, *batch, 2))
    torch.testing.assert_close(gap, gap[:1].expand_as(gap))


def test_posterior_density_broadcasts_one_latent_to_all_data() -> None:
    ebm = shaped_ebm()
    x, z = normal((3, 2, 2), 1), normal((2, 1), 2)
    expected = ebm.posterior(x).log_prob(z.expand(3, 2, 1))
    torch.testing.assert_close(ebm.posterior(x).log_prob(z), expected)


def flat_posterior(ebm: LVEBM, x: Tensor) -> MultivariateNormal:
    return condition(exact_joint(ebm), [0, 1, 2, 3], x)


# --- the latent site ------------------------------------------------------------------------


@pytest.mark.parametrize("full_z", [False, True])
def test_latent_density_is_that_of_base_z(full_z: bool) -> None:
    ebm = shaped_ebm(full_z)
    site = LatentSite(ebm, Pairing())
    z = 2.0 * normal((7, 2, 1), 1)
    expected = base_law(ebm.base_z).log_prob(z.flatten(1))
    torch.testing.assert_close(site.log_prob(z), expected)
    wide = site.expand([4, 1])
    assert wide.batch_shape == (4, 1) and wide.event_shape == (2, 1)
    torch.testing.assert_close(wide.log_prob(z), expected.expand(4, 7))
    assert wide.log_prob(z[0]).shape == (4, 1)
    assert wide.support.event_dim == 2 and not wide.support.is_discrete
    assert wide.sample().shape == (4, 1, 2, 1) and wide.sample((3,)).shape == (3, 4, 1, 2, 1)
    assert not wide.has_rsample


@pytest.mark.parametrize("full_z", [False, True])
def test_kl_to_the_latent_is_exact_for_the_same_family(full_z: bool) -> None:
    """KL of Gaussian guides, against quadrature over the plane."""
    ebm = shaped_ebm(full_z)
    flat = LVEBM(
        QuadraticEnergy(4, 2).double(),
        GaussianBase(torch.zeros(4).double(), torch.ones(4).double()),
        GaussianBase(ebm.base_z.loc, ebm.base_z.scale.reshape(2, 2 if full_z else 1).squeeze(-1)),
        pool=tiny_pool(),
    )
    p = LatentSite(flat, Pairing(), torch.Size([3]))
    loc, scale = normal((3, 2), 1), 0.3 + normal((3, 2), 2).abs()
    tril = scale.diag_embed() + 0.3 * normal((3, 2, 2), 3).tril(-1)
    guides = {"diag": dist.Normal(loc, scale).to_event(1)}
    guides["full"] = dist.MultivariateNormal(loc, scale_tril=tril)
    grid, cell = plane_grid(14.0, 401)
    grid = grid[:, None]
    for kind, q in guides.items():
        log_q = q.log_prob(grid)
        log_p = base_law(flat.base_z).log_prob(grid)
        exact = cell * (log_q.exp() * (log_q - log_p)).sum(0)
        if (kind == "full") == full_z or kind == "diag":
            kl = kl_divergence(q, p)
            assert kl.shape == (3,)
            torch.testing.assert_close(kl, exact, rtol=1e-6, atol=1e-8)
        else:  # Pyro's ELBO then falls back to draws
            with pytest.raises(NotImplementedError):
                kl_divergence(q, p)


def test_kl_to_the_latent_sums_over_events_of_any_shape() -> None:
    ebm = shaped_ebm()
    loc, scale = normal((5, 2, 1), 1), 0.3 + normal((5, 2, 1), 2).abs()
    kl = kl_divergence(dist.Normal(loc, scale).to_event(2), LatentSite(ebm, Pairing()).expand([5]))
    base = ebm.base_z
    expected = kl_divergence(
        Independent(Normal(loc.flatten(1), scale.flatten(1)), 1), base_law(base).expand((5,))
    )
    torch.testing.assert_close(kl, expected)


# --- the observed site ----------------------------------------------------------------------


@pytest.mark.parametrize("full_z", [False, True])
def test_the_two_sites_add_up_to_the_exact_joint(full_z: bool) -> None:
    ebm = warm(shaped_ebm(full_z), 3)
    z, x = normal((5, 2, 1), 1), normal((5, 2, 2), 2)
    pairing = Pairing()
    total = LatentSite(ebm, pairing).log_prob(z) + ObservedSite(ebm, z, pairing).log_prob(x)
    exact = exact_joint(ebm).log_prob(torch.cat([x.flatten(1), z.flatten(1)], -1))
    error = ebm.log_partition - ebm.f.log_partition()
    assert abs(error) > 1e-4  # the pool is not exact, and its value is the one used
    torch.testing.assert_close(total, exact - error)
    # ... and it is not log p(x | z): conditioning would leave no log Z.
    conditional = condition(exact_joint(ebm), [4, 5], z.flatten(1)).log_prob(x.flatten(1))
    assert (ObservedSite(ebm, z, pairing).log_prob(x) - conditional).abs().min() > 1e-3


def test_observed_density_broadcasts_data_against_latents() -> None:
    """x (N,) against z (K, N), as under vectorised particles, and the other way round."""
    ebm = shaped_ebm()
    z, x = normal((3, 5, 2, 1), 1), normal((5, 2, 2), 2)
    site = ObservedSite(ebm, z, Pairing())
    assert site.batch_shape == (3, 5) and site.event_shape == (2, 2)
    ours = site.log_prob(x)
    each = torch.stack([ObservedSite(ebm, part, Pairing()).log_prob(x) for part in z])
    torch.testing.assert_close(ours, each)
    single = ObservedSite(ebm, z[0, 0], Pairing())
    torch.testing.assert_close(single.log_prob(x), torch.stack([single.log_prob(row) for row in x]))
    wide = ObservedSite(ebm, z[0], Pairing()).expand([4, 5])
    assert wide.batch_shape == (4, 5) and wide.z.shape == (4, 5, 2, 1)
    assert wide.log_prob(x).shape == (4, 5)
    assert wide.sample().shape == (4, 5, 2, 2)
    assert wide.support.event_dim == 2


def test_observed_draws_are_the_partners_of_the_pool() -> None:
    ebm = warm(quadratic_ebm(), 3)
    pairing = Pairing()
    z = LatentSite(ebm, pairing).expand([6]).sample()
    site = ObservedSite(ebm, z, pairing, torch.Size([6]))
    x = site.sample()
    assert torch.equal(x, pairing.x) and x.shape == (6, 3)
    x.zero_()
    z.zero_()
    assert pairing.x.abs().min() > 0 and pairing.z.abs().min() > 0  # copies went out
    # A z that the pool did not draw has other partners.
    assert not torch.equal(ObservedSite(ebm, z, pairing).sample(), pairing.x)
    # As many draws of x for one z as asked for are not all the same one.
    repeated = ObservedSite(ebm, pairing.z, pairing).sample((3,))
    assert repeated.shape == (3, 6, 3) and not torch.equal(repeated[0], repeated[1])


def pair_p_value(change: Callable[[Pairing], None]) -> float:
    """p-value that (x, z) from the two sites have the joint's second moments, over 10 pools."""
    rows = []
    for seed in range(10):
        ebm = quadratic_ebm(2, 1, pool=TemperedPool(4, 400, num_moves=2, seed=seed))
        warm(ebm, 30)
        torch.manual_seed(seed)
        pairing = Pairing()
        z = LatentSite(ebm, pairing).expand([1500]).sample()
        change(pairing)
        x = ObservedSite(ebm, z, pairing).sample()
        white = whitened(torch.cat([x, z], -1), exact_joint(ebm))
        rows.append(torch.cat([white.mean(0), (rotations(white) ** 2).mean(0)]))
    return mean_p_value(torch.stack(rows), [0.0] * 3 + [1.0] * (len(rows[0]) - 3))


def test_pairs_follow_the_joint() -> None:
    """Student's test over pools with their own seeds. False alarms: 1e-3."""
    assert pair_p_value(lambda pairing: None) > ALPHA


def test_pair_check_fails_for_partners_of_others() -> None:
    def rotate(pairing: Pairing) -> None:
        pairing.x = pairing.x.roll(1, 0)

    assert pair_p_value(rotate) < CERTAIN


def conditional_p_value() -> float:
    """p-value that x given a z of no pool follows p(x | z), 600 draws for each of 5 latents.

    Every draw is a run of its own, so that whitened draws are independent N(0, I).
    """
    ebm = quadratic_ebm(2, 2, seed=6)
    z = normal((5, 2), 1)
    torch.manual_seed(1)
    draws = ObservedSite(ebm, z, Pairing()).sample((600,))
    white = whitened(draws, condition(exact_joint(ebm), [2, 3], z))
    variance = variance_p_value(rotations(white), 1.0)
    return min(1.0, 2.0 * min(variance, mean_p_value(white, 0.0)))


def test_xgiven_z_has_the_exact_moments() -> None:
    """Chi-square and Student's test. False alarms: 1e-3."""
    assert conditional_p_value() > ALPHA


def test_conditional_check_fails_for_the_gradient_of_the_other_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def confused(density: Density, w_z: Tensor) -> object:
        def evaluate(v: Tensor) -> tuple[Tensor, Tensor]:
            u = torch.cat([w_z.expand(*v.shape[:-1], -1), v], -1)  # (z, x) for (x, z)
            value, grad = density.residual_and_grad(u)
            return value, grad[..., w_z.shape[-1] :]

        return evaluate

    monkeypatch.setattr(package, "given_z", confused)
    assert conditional_p_value() < CERTAIN


def test_conditional_draws_take_their_own_x() -> None:
    """Draws for very different x are told apart, in the order of x. False alarms: 1e-3."""
    ebm = quadratic_ebm(2, 1, seed=3)
    x = 20.0 * data_of(ebm, 8)
    law = exact_posterior(ebm, x)
    assert (law.mean.max() - law.mean.min()) > 5 * law.stddev.max()
    torch.manual_seed(2)
    draws = ebm.posterior(x).sample((100,))
    assert mean_p_value(whitened(draws, law).reshape(100, 8), 0.0) > ALPHA
    assert mean_p_value(whitened(draws.flip(1), law).reshape(100, 8), 0.0) < CERTAIN
