# SPDX-License-Identifier: Apache-2.0
"""Does an energy rise far from the base? A probe that costs three evaluations."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_lvebm.energies import MLPEnergy, QuadraticEnergy, ZeroEnergy
from pyro_lvebm.model.density import Density
from pyro_lvebm.rng import Stream, generator_for
from pyro_lvebm.sampling import standard_normal
from pyro_lvebm.validation import warn_of_training

_RADII = (30.0, 300.0)

_NUM_RAYS = 64


def falling_rays(density: Density) -> Tensor:
    """Return points u (n, dim) beyond which E falls along the ray from the centre.

    Both ways along every axis, and in random directions, E is less at 30 standard deviations of the
    base than at its centre, and less again at 300. Such an energy has no finite Z, as far as it can
    be seen. None found is no proof; `check_dissipativity` looks harder.

    Args:
        density: The density; with contexts, that at one.
    """
    like = density.base_x.loc
    axes = torch.eye(density.dim).to(like)
    generator = generator_for(0, Stream.RAYS, device=like.device)
    others = standard_normal((_NUM_RAYS, density.dim), like, generator)
    rays = torch.cat([axes, -axes, others / others.norm(dim=1, keepdim=True)])
    with torch.no_grad():
        centre, near, far = (
            density.base.energy(radius * rays) + density.residual(radius * rays)
            for radius in (0.0, *_RADII)
        )
    return _RADII[0] * rays[(near < centre) & (far < near)]


def warn_of_falling(density: Density) -> None:
    """Warn if a user's energy falls without a bound; the package's own are known to rise."""
    own = isinstance(density.f, MLPEnergy | QuadraticEnergy | ZeroEnergy)
    if own or density.context_shape is not None:
        return
    points = falling_rays(density)
    if len(points):
        x, z = density.unwhiten(points[:1])
        warn_of_training(
            f"the energy falls from x = {x[0].tolist()}, z = {z[0].tolist()} outwards, so Z may be "
            "infinite, and chains may run away. Make f bounded or Lipschitz: bound its inputs, "
            "drop powers above the first, or add a penalty that grows faster; "
            "check_dissipativity(ebm) tells more"
        )
