# SPDX-License-Identifier: Apache-2.0
"""Whether an energy grows outwards, as Langevin dynamics and a finite Z need."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyro_lvebm.model import LVEBM, check_unconditional
from pyro_lvebm.rng import Stream, generator_for
from pyro_lvebm.sampling import standard_normal
from pyro_lvebm.validation import check_at_least, warn_of_training

if TYPE_CHECKING:
    import pandas as pd

_RELATIVE_STEP = 1e-3
"""Of finite differences, at 1 + |u|: long enough for single precision."""

_POWER_STEPS = 8

_GROWTH = 1.5

_MAX_OFFENDERS = 5


@dataclass(frozen=True)
class Dissipativity:
    """What probes say of ⟨∇E(u), u⟩ ≥ ½ a |u|² − b and of the smoothness of f, whitened."""

    a: float  # smallest ⟨∇E(u), u⟩ / |u|² found at the largest radius
    b: float  # smallest b ≥ 0 with ⟨∇E(u), u⟩ ≥ ½ a |u|² − b at all probes; NaN if a ≤ 0
    lipschitz: float  # largest |∇f(u) − ∇f(v)| / |u − v| found
    frame: pd.DataFrame  # columns radius, a, lipschitz: what was found at each radius
    offending_x: Tensor  # (k, *x_shape), points from where on the energy falls outwards
    offending_z: Tensor  # (k, *z_shape)

    @property
    def is_dissipative(self) -> bool:
        """Whether no probe contradicts it: a > 0, and all values are finite."""
        return self.a > 0.0 and len(self.offending_x) == 0

    @property
    def is_smooth(self) -> bool:
        """Whether the Lipschitz estimate of ∇f stops growing with the radius."""
        found = self.frame["lipschitz"].to_numpy()
        return bool(found[-1] <= _GROWTH * found[: (len(found) + 1) // 2].max())

    @property
    def verdict(self) -> str:
        """What was found, in one sentence."""
        radius = self.frame["radius"].iloc[-1]
        if self.is_dissipative:
            return (
                f"no probe up to radius {radius:g} contradicts ⟨∇E, u⟩ ≥ {0.5 * self.a:.3g} |u|² − "
                f"{self.b:.3g}; |∇f(u) − ∇f(v)| reaches {self.lipschitz:.3g} |u − v|"
                + ("" if self.is_smooth else ", and grows with the radius: keep to MALA")
            )
        points = ", ".join(
            f"(x = {_short(x)}, z = {_short(z)})"
            for x, z in zip(self.offending_x, self.offending_z, strict=True)
        )
        return (
            "the energy is not dissipative: from these points outwards it falls, or is not finite: "
            f"{points}. Z may be infinite, and chains may run away. Make f bounded or Lipschitz: "
            "bound its inputs (2 tanh(z / 2)), drop powers above the first, or add a penalty that "
            "grows faster"
        )

    def __str__(self) -> str:
        return self.verdict


def check_dissipativity(
    ebm: LVEBM,
    *,
    max_radius: float = 1e4,
    num_radii: int = 13,
    num_rays: int = 64,
    seed: int = 0,
) -> Dissipativity:
    """Probe whether the gradient of E points outwards far from the base, and warn if it does not.

        ⟨∇E(u), u⟩ ≥ ½ a |u|² − b,    ∇E(u) = u + ∇f(u)

    in coordinates u whitened by the base: with a > 0 and a Lipschitz gradient, Z is finite and
    Langevin dynamics converge. A Lipschitz f always has it. At radii from 1 to `max_radius`, in
    equal ratios, the left side is evaluated along random rays, and at each radius the worst of
    them is turned by L-BFGS to where ⟨∇E(u), u⟩ / |u|² is smallest; a is that at the largest
    radius. Half of it leaves room for terms of E that grow as |u|, which b takes up. For a
    quadratic energy a is the smallest eigenvalue of the Hessian of E, up to |c| / `max_radius` from
    a linear term cᵀu. The Lipschitz constant of ∇f is the largest
    ratio of differences found by power iteration at all probes. Probes refute, and never prove: a
    may be smaller elsewhere, and b and the Lipschitz constant larger.

    Args:
        ebm: The LVEBM; unchanged. For an energy alone, `LVEBM(energy, base_x, base_z)`.
        max_radius: Largest distance from the centre, in standard deviations of the base.
        num_radii: Number of radii, at least 2.
        num_rays: Random rays.
        seed: Fixes the rays.

    Returns:
        a, b and the Lipschitz constant, and up to five offending points in the coordinates of the
        data: on the smallest sphere from which on a ≤ 0, or where E or its gradient is not
        finite.

    Raises:
        ValueError: If the LVEBM is conditional, or a number is out of range.

    Warns:
        TrainingWarning: If the energy is not dissipative, with the offending points.

    Source:
        Raginsky, Rakhlin and Telgarsky (2017), Non-convex learning via stochastic gradient
        Langevin dynamics, assumptions A.2 and A.3; docs/maths.md.

    Example:
        >>> import torch
        >>> from pyro_lvebm import LVEBM, QuadraticEnergy, check_dissipativity
        >>> energy = QuadraticEnergy(1, 1)
        >>> x = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
        >>> ebm = LVEBM.from_data(energy, x, z_dim=1)
        >>> energy.set_precision(torch.diag(torch.tensor([3.0, 0.5])))
        >>> result = check_dissipativity(ebm)
        >>> result.is_dissipative, round(result.a, 3), round(result.lipschitz, 3)
        (True, 0.5, 2.0)
    """
    import pandas as pd

    check_unconditional(ebm, "check_dissipativity")
    if not max_radius > 1.0:
        raise ValueError(f"max_radius must exceed 1; got {max_radius}")
    check_at_least(2, num_radii=num_radii)
    check_at_least(1, num_rays=num_rays)
    like = ebm.base_x.loc
    generator = generator_for(seed, Stream.DISSIPATIVITY, device=like.device)
    rays = standard_normal((num_rays, ebm.dim), like, generator)
    rays = rays / rays.norm(dim=1, keepdim=True)
    radii = torch.logspace(0.0, math.log10(max_radius), num_radii).to(like)
    with ebm.frozen():
        probes = [_worst_first(ebm, float(radius), rays) for radius in radii]
        u = torch.stack(probes)  # (radii, rays + 1, d)
        outward, finite = _outward(ebm, u)
        lipschitz = _lipschitz(ebm, u, generator)
    ratio = (outward / u.square().sum(-1)).amin(1)
    a = float(ratio[-1])
    b = float((0.5 * a * u.square().sum(-1) - outward).max().clamp(min=0.0))
    frame = pd.DataFrame(
        {name: part.cpu().numpy() for name, part in (("radius", radii), ("a", ratio))}
        | {"lipschitz": lipschitz.cpu().numpy()}
    )
    bad = u[_offending(outward, finite, ratio)][:_MAX_OFFENDERS]
    result = Dissipativity(
        a, b if a > 0.0 else math.nan, float(lipschitz.max()), frame, *ebm.unwhiten(bad)
    )
    if not result.is_dissipative:
        warn_of_training(result.verdict)
    return result


def _outward(ebm: LVEBM, u: Tensor) -> tuple[Tensor, Tensor]:
    """⟨∇E(u), u⟩ (*b,), −∞ where E or its gradient is not finite, and whether they are."""
    f, grad = ebm.residual_and_grad(u)
    finite = torch.isfinite(f) & torch.isfinite(grad).all(-1)
    value = ((ebm.base.energy_and_grad(u)[1] + grad) * u).sum(-1)
    return torch.where(finite, value, -torch.inf), finite


def _worst_first(ebm: LVEBM, radius: float, rays: Tensor) -> Tensor:
    """Probes (rays + 1, d) at a radius: the worst direction that L-BFGS finds, then the rays."""
    from scipy.optimize import minimize

    outward, finite = _outward(ebm, radius * rays)
    worst = radius * rays[outward.argmin()]
    if not finite.all():
        return torch.cat([-worst[None], radius * rays])

    def objective(v: np.ndarray) -> tuple[float, np.ndarray]:
        """⟨∇E(u), u⟩ / |u|² at u along v, and its gradient in v."""
        length = float(np.linalg.norm(v))
        unit = v / length
        u = radius * torch.from_numpy(unit).to(rays)
        # The gradient of ⟨∇E(u), u⟩ is ∇E(u) + Hu, with the Hessian H by a difference along u.
        step = _RELATIVE_STEP
        at = torch.stack([u, (1 + step) * u, (1 - step) * u])
        grads = ebm.residual_and_grad(at)[1] + ebm.base.energy_and_grad(at)[1]
        here, further, nearer = (g.cpu().double().numpy() for g in grads)
        slope = (here + 0.5 * (further - nearer) / step) / radius
        tangent = slope - (slope @ unit) * unit
        return float(here @ unit) / radius, tangent / length

    start, options = (worst / radius).cpu().double().numpy(), {"ftol": 1e-12, "gtol": 1e-9}
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options).x
    turned = radius * torch.from_numpy(found / np.linalg.norm(found)).to(rays)
    better, _ = _outward(ebm, torch.stack([turned, worst]))
    first = turned if better[0] <= better[1] else worst
    return torch.cat([first[None], radius * rays])


def _lipschitz(ebm: LVEBM, u: Tensor, generator: torch.Generator) -> Tensor:
    """Largest |∇f(u + w) − ∇f(u − w)| / |2 w| found at each radius (R,), for u (R, n, d)."""
    step = _RELATIVE_STEP * (1.0 + u.norm(dim=-1, keepdim=True))
    w = standard_normal(tuple(u.shape), u, generator)
    largest = u.new_zeros(len(u))
    for _ in range(_POWER_STEPS):
        w = step * w / w.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(u.dtype).tiny)
        difference = ebm.residual_and_grad(u + w)[1] - ebm.residual_and_grad(u - w)[1]
        size = (difference.norm(dim=-1) / (2.0 * step.squeeze(-1))).nan_to_num(nan=torch.inf)
        largest = torch.maximum(largest, size.amax(1))
        # Where f is flat there is no direction to follow, and the old one is as good.
        usable = difference.isfinite().all(-1) & (size > 0)
        w = torch.where(usable[..., None], difference, w)
    return largest


def _offending(outward: Tensor, finite: Tensor, ratio: Tensor) -> Tensor:
    """Which probes (R, n) are not finite, or lie where the energy begins to fall for good."""
    outside = (ratio <= 0.0).flip(0).cummin(0).values.flip(0)
    falls = torch.zeros_like(finite)
    if outside.any():
        first = int(outside.int().argmax())
        falls[first] = outward[first] <= 0.0
    return falls | ~finite


def _short(value: Tensor) -> str:
    entries = [f"{entry:.3g}" for entry in value.flatten().tolist()]
    return f"[{', '.join(entries[:4])}{', …' if len(entries) > 4 else ''}]"
