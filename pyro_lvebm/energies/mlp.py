# SPDX-License-Identifier: Apache-2.0
"""A neural residual energy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pyro_lvebm.bases import GaussianBase, moments, unit_rows
from pyro_lvebm.energies.whitened import WhitenedEnergy
from pyro_lvebm.rng import Stream, isolated_rng
from pyro_lvebm.sampling import ValueAndGrad
from pyro_lvebm.validation import check_widths

WHITENED_SCALE, STANDARDISED_SCALE = 0.5, 2.0
"""Of the inputs u_x and x̃ (measured on wine, breast cancer and digits, docs/training.md)."""

FOURIER_SCALE = 0.5
"""Of the Fourier features (measured on 8 Gaussians and pinwheel, docs/training.md)."""

KL_PENALTY_PER_DIM = 8.0
"""Nats (measured on the same tables, docs/training.md)."""


class MLPEnergy(WhitenedEnergy):
    """A SiLU network on whitened and standardised coordinates, with fixed Fourier features.

        f(u) = W_k σ(… σ(W_1 φ(u) + b_1) …) + b_k,
        φ(u) = (½ u_x, t, 2 x̃, ½ sin u_x B, ½ cos u_x B)

    Here u = (u_x, u_z) is whitened by the bases, t = 2 tanh(u_z / 2), and x̃ = (x − μ) / s has the
    columns of x in units of their standard deviations s. Large differences between data lie mostly
    along x̃, small ones along u_x; a network learns first along the larger inputs. The data hold x
    in place but not z, and tanh keeps z from drifting away from its base. The last layer starts at
    zero, so an untrained LVEBM is its base and log Z = 0. The columns of B are drawn once from
    N(0, 1.5² min(1, 2/d_x)²) and never trained; they let a smooth network follow thin structures,
    and f stays Lipschitz. Halved they are learnt later than the smooth inputs, and overfit later.
    With a context c, φ has the entries of (c − m) / s too (`standardise`).

    Args:
        x_dim: Number of entries of x.
        z_dim: Number of entries of z; 0 for an energy of x alone, such as that of an
            `EnergyPrior`.
        hidden: Width of each hidden layer.
        fourier_features: Number of columns of B. None chooses 32 where x_dim + z_dim ≤ 8 and
            none above, where they overfit.
        context_dim: Number of entries of a context; 0 for an energy without contexts.
        kl_penalty: Strength of the `kl_to_base` that a `Saddle` adds to its loss, in nats, so
            that few rows do not overfit; next to nothing where rows abound. None is
            8 (x_dim + z_dim), and 0 leaves maximum likelihood. Where the model is scaled, such as
            by 1 / N, scale it likewise.
        seed: Fixes the initial weights and B.

    Raises:
        ValueError: If a size is less than 1, z_dim or `fourier_features` is negative, or
            `kl_penalty` is negative or not finite.

    Source:
        Rahimi and Recht (2007), Random features for large-scale kernel machines, section 3;
        Tancik et al. (2020), Fourier features let networks learn high frequency functions.

    Example:
        >>> import torch
        >>> energy = MLPEnergy(x_dim=3, z_dim=2, hidden=(16,), seed=0)
        >>> energy(torch.zeros(5, 3), torch.ones(5, 2)).tolist()
        [0.0, 0.0, 0.0, 0.0, 0.0]
    """

    frequencies: Tensor  # B, (x_dim, fourier_features)
    linear: Tensor  # (dim, dim + x_dim), maps (u_x, t) to the first three parts of φ
    fourier_scale: Tensor  # (), of sines and cosines in φ

    def __init__(
        self,
        x_dim: int,
        z_dim: int = 0,
        hidden: Sequence[int] = (128, 128),
        fourier_features: int | None = None,
        *,
        context_dim: int = 0,
        kl_penalty: float | None = None,
        seed: int = 0,
    ) -> None:
        if kl_penalty is None:
            kl_penalty = KL_PENALTY_PER_DIM * (x_dim + z_dim)
        super().__init__(x_dim, z_dim, kl_penalty=kl_penalty)
        if context_dim < 0:
            raise ValueError(f"context_dim must be 0 or more; got {context_dim}")
        self.context_dim = context_dim
        if context_dim:
            self.register_buffer("context_loc", torch.zeros(context_dim))
            self.register_buffer("context_scale", torch.ones(context_dim))
        check_widths(hidden)
        if fourier_features is None:
            fourier_features = 32 if self.dim <= 8 else 0
        if fourier_features < 0:
            raise ValueError(f"fourier_features must be 0 or more; got {fourier_features}")
        with isolated_rng(seed, Stream.ENERGY_WEIGHTS):
            bandwidth = 1.5 * min(1.0, 2.0 / x_dim)
            self.register_buffer("frequencies", bandwidth * torch.randn(x_dim, fourier_features))
            self.register_buffer("linear", self._linear_part())
            self.register_buffer("fourier_scale", torch.tensor(FOURIER_SCALE))
            widths = [self.linear.shape[1] + 2 * fourier_features + context_dim, *hidden]
            self.hidden = nn.ModuleList(map(nn.Linear, widths[:-1], widths[1:]))
            self.out = nn.Linear(widths[-1], 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def bind(self, base_x: GaussianBase, base_z: GaussianBase) -> None:
        """Take the coordinates of these bases; an `LVEBM` calls this when it is built.

        Raises:
            ValueError: As in `WhitenedEnergy.bind`.
        """
        super().bind(base_x, base_z)
        self.linear = self._linear_part().to(base_x.loc)

    def _linear_part(self) -> Tensor:
        scale = self.base_x.scale
        standardise = unit_rows(self.base_x.tril)  # x̃ = standardise @ u_x
        eye = torch.eye(self.x_dim).to(scale)
        linear = torch.zeros(self.dim, self.dim + self.x_dim).to(scale)
        linear[: self.x_dim, : self.x_dim] = WHITENED_SCALE * eye
        linear[self.x_dim :, self.x_dim : self.dim] = torch.eye(self.z_dim).to(scale)
        linear[: self.x_dim, self.dim :] = STANDARDISED_SCALE * standardise.T
        return linear

    def standardise(self, context: Tensor) -> None:
        """Take mean m and standard deviation s of each entry of contexts (N, context_dim).

        `check_standardise` says which contexts it takes.
        """
        self.context_loc, self.context_scale, _ = moments(context.detach())

    def check_standardise(self, context: Tensor) -> None:
        """Refuse contexts that `standardise` cannot take.

        Raises:
            ValueError: If contexts have another shape, an entry is the same in all rows, or the
                energy already belongs to an `LVEBM`, which would change with them.
        """
        if self._bound:
            raise ValueError(
                "this energy already belongs to an LVEBM, whose contexts are standardised; build a "
                "new energy for the other LVEBM"
            )
        if context.dim() != 2 or context.shape[1] != self.context_dim:
            raise ValueError(
                f"contexts have shape {tuple(context.shape)}; expected (N, {self.context_dim}), "
                "with the context_dim of this MLPEnergy"
            )
        constant = torch.nonzero(moments(context.detach()).constant).flatten().tolist()
        if constant:
            raise ValueError(f"columns {constant} of the contexts are constant; remove them")

    def _features(self, u: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """Return (u_x, t, sin u_x B, cos u_x B, c); `_first_weight` has the scales."""
        u_x, u_z = u.split([self.x_dim, self.z_dim], -1)
        of_x = self._features_of_x(u_x, context)
        return torch.cat([u_x, _bounded(u_z), *of_x], -1)

    def _features_of_x(self, u_x: Tensor, context: tuple[Tensor, ...]) -> list[Tensor]:
        """Return sin u_x B and cos u_x B, where B has columns, and c, if there is one."""
        if len(context) != bool(self.context_dim):
            what = "a context" if self.context_dim else "no context"
            raise ValueError(f"an MLPEnergy with context_dim={self.context_dim} takes {what}")
        found = []
        if self.frequencies.shape[1]:
            phase = u_x @ self.frequencies
            found += [phase.sin(), phase.cos()]
        return found + [(c - self.context_loc) / self.context_scale for c in context]

    def whitened(self, u: Tensor, *context: Tensor) -> Tensor:
        """Return f (*b,) at whitened coordinates u (*b, x_dim + z_dim), and (*b, context_dim)."""
        h = self._features(u, context)
        layers = cast(list[nn.Linear], list(self.hidden))
        h = nn.functional.silu(nn.functional.linear(h, self._first_weight(), layers[0].bias))
        for layer in layers[1:]:
            h = nn.functional.silu(layer(h))
        value: Tensor = self.out(h).squeeze(-1)
        return value

    def _first_weight(self) -> Tensor:
        """W_1 on (u_x, t, sin, cos, c): folding the scales into it spares large products.

        It is made as a transpose, because products with a few columns are four times faster so.
        """
        weight = cast(nn.Linear, self.hidden[0]).weight
        width = self.linear.shape[1]
        if weight.shape[1] == width:
            return (self.linear @ weight.T).T
        by_input, by_feature, by_context = weight.T.split(
            [width, 2 * self.frequencies.shape[1], self.context_dim]
        )
        return torch.cat([self.linear @ by_input, self.fourier_scale * by_feature, by_context]).T

    def value_and_grad(self, u: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        """Return f (*b,) and ∇f (*b, d) by writing out the chain rule, without a graph.

        This is what `autograd` computes on `whitened`, in two thirds of the time.
        """
        with torch.no_grad():
            flat = u.reshape(-1, self.dim)
            rows = tuple(c.reshape(-1, self.context_dim) for c in context)
            features, weight = self._features(flat, rows), self._first_weight()
            value, by_first = self._above(torch.addmm(self._first_bias(), features, weight.T))
            grad = by_first @ weight
            count = self.frequencies.shape[1]
            if count or self.context_dim:
                sizes = [self.dim, count, count, self.context_dim]
                _, sin, cos, _ = features.split(sizes, -1)
                grad, by_sin, by_cos, _ = grad.split(sizes, -1)
                grad = grad.clone()
                if count:
                    by_phase = (by_sin * cos).addcmul_(by_cos, sin, value=-1.0)
                    grad[:, : self.x_dim].addmm_(by_phase, self.frequencies.T)
            _through_bound(grad[:, self.x_dim :], features[:, self.x_dim : self.dim])
            return value.reshape(u.shape[:-1]), grad.reshape(u.shape)

    def given_x(self, u_x: Tensor, *context: Tensor) -> ValueAndGrad:
        """Return f and ∂f/∂u_z as a function of u_z; what layer 1 has of x is computed once."""
        with torch.no_grad():
            weight = self._first_weight()
            of_x, of_z, of_rest = weight.split(
                [self.x_dim, self.z_dim, weight.shape[1] - self.dim], -1
            )
            fixed = self._first_bias() + u_x @ of_x.T
            if rest := self._features_of_x(u_x, context):
                fixed = fixed + torch.cat(rest, -1) @ of_rest.T

        def evaluate(u_z: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                t = _bounded(u_z)
                pre = (t @ of_z.T).add_(fixed)
                value, by_first = self._above(pre.reshape(-1, pre.shape[-1]))
                grad = (by_first @ of_z).reshape(u_z.shape)
                _through_bound(grad, t)
                return value.reshape(u_z.shape[:-1]), grad

        return evaluate

    def _first_bias(self) -> Tensor:
        return cast(nn.Linear, self.hidden[0]).bias

    def _above(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """Return f (n,) and its gradient (n, width) for what enters the first σ (n, width)."""
        layers = cast(list[nn.Linear], list(self.hidden))[1:]
        slopes = []
        h, slope = _silu(pre)
        slopes = [slope]
        for layer in layers:
            h, slope = _silu(torch.addmm(layer.bias, h, layer.weight.T))
            slopes.append(slope)
        value = torch.addmv(self.out.bias, h, self.out.weight[0])
        grad = slopes.pop() * self.out.weight[0]
        for layer in reversed(layers):
            grad = (grad @ layer.weight).mul_(slopes.pop())
        return value, grad


def _silu(a: Tensor) -> tuple[Tensor, Tensor]:
    """Return σ(a) = a s and σ′(a) = s + σ (1 − s), s the sigmoid: one exponential for both."""
    s = torch.sigmoid(a)
    h = a * s
    return h, (s + h).addcmul_(h, s, value=-1.0)


def _bounded(u_z: Tensor) -> Tensor:
    """Return t = 2 tanh(u_z / 2); torch.tanh starts threads even for a few hundred entries."""
    return 4.0 * torch.sigmoid(u_z) - 2.0


def _through_bound(by_t: Tensor, t: Tensor) -> None:
    """Turn ∂f/∂t into ∂f/∂u_z, in place: dt/du_z = 1 − t² / 4."""
    by_t.addcmul_(by_t * t, t, value=-0.25)
