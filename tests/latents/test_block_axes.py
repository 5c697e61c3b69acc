# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch
from referee import normal

from pyro_lvebm.latents.blocks import sum_other_axes
from pyro_lvebm.latents.model_at import depends_on


def test_sum_other_axes_keeps_particles_and_own_plates() -> None:
    log_prob = normal((4, 3, 2, 5), 1)  # particles, then three plates
    torch.testing.assert_close(sum_other_axes(log_prob, {-1, -2, -3}, 3), log_prob)
    torch.testing.assert_close(
        sum_other_axes(log_prob, {-3}, 3), log_prob.sum((-1, -2), keepdim=True)
    )
    torch.testing.assert_close(
        sum_other_axes(log_prob, {-2}, 3), log_prob.sum((-1, -3), keepdim=True)
    )
    row = normal((5,), 2)  # a site that has no particles and few plates
    torch.testing.assert_close(sum_other_axes(row, set(), 3), row.sum(-1, keepdim=True))
    torch.testing.assert_close(sum_other_axes(row, {-1}, 3), row)
    assert sum_other_axes(row.sum(), {-1}, 3).shape == ()


def test_dependence_is_that_of_the_graph() -> None:
    v, w = normal((3,), 1).requires_grad_(True), normal((3,), 2).requires_grad_(True)
    assert depends_on((v * w).sum(), v) and depends_on(0.0 * v, v)
    assert not depends_on(w.sum(), v)
    assert not depends_on(v.detach() * w, v) and not depends_on(v, normal((3,), 1))
