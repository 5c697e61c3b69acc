# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pyro
import pytest
import torch
from bounded_models import CONSTRAINTS, twins
from pyro.infer import MCMC, NUTS
from referee import global_seed, normal
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint

from pyro_lvebm.bases.pairs import PairSupport, PairTransform

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=str)
def test_the_joint_is_the_same_law_in_both_coordinates(constraint: Constraint) -> None:
    """−E of (x, z) and the Jacobian of x = T(y) are −E of (y, z)."""
    plain, bounded = twins(constraint)
    joint = bounded.joint()
    transform = biject_to(joint.support)
    assert isinstance(joint.support, PairSupport) and isinstance(transform, PairTransform)
    flat = normal((4, 6, plain.dim), 1)
    pairs = transform(flat)
    k = bounded.x_shape.numel()
    assert pairs.shape == (4, 6, *joint.event_shape) and joint.event_shape == (k + 2,)
    assert joint.support.check(pairs).all()
    assert transform.forward_shape(flat.shape) == pairs.shape
    assert transform.inverse_shape(pairs.shape) == flat.shape
    torch.testing.assert_close(transform.inv(pairs), flat)
    log_det = transform.log_abs_det_jacobian(flat, pairs)
    torch.testing.assert_close(joint.log_prob(pairs) + log_det, plain.joint().log_prob(flat))
    assert not torch.allclose(joint.log_prob(pairs), plain.joint().log_prob(flat))


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=str)
def test_draws_lie_on_the_support_and_other_values_do_not(constraint: Constraint) -> None:
    _, bounded = twins(constraint)
    joint = bounded.joint()
    with global_seed(0):
        draws = joint.sample((20,))
    assert joint.support.check(draws).all()
    wrong = draws.clone()
    wrong[:10, 0] = -1.0
    wrong[10:15, -1] = torch.nan
    assert joint.support.check(wrong).tolist() == [False] * 15 + [True] * 5


def test_nuts_starts_and_stays_on_the_support() -> None:
    """Its density is exact above; here Pyro has to find the bijection, and a starting point."""
    _, bounded = twins(CONSTRAINTS[-1], 1)

    def model() -> None:
        pyro.sample("pair", bounded.joint())

    with global_seed(0), bounded.frozen():
        mcmc = MCMC(NUTS(model), num_samples=20, warmup_steps=10, disable_progbar=True)
        mcmc.run()
    draws = mcmc.get_samples()["pair"]
    assert bounded.joint().support.check(draws).all() and len(draws.unique(dim=0)) > 10


def test_without_bounds_the_joint_is_a_real_vector() -> None:
    plain, _ = twins(CONSTRAINTS[0])
    transform = biject_to(plain.joint().support)
    flat = normal((3, plain.dim), 1)
    assert torch.equal(transform(flat), flat)
