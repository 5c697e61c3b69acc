# SPDX-License-Identifier: Apache-2.0
"""What is refused of a generator, at the door."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_lvebm.rng import Stream, isolated_rng
from pyro_lvebm.sampling import jacobian
from pyro_lvebm.validation import COUPLED, batch_norm_in_training, close_up_to_rounding


def check_generator(
    generator: nn.Module, z_shape: torch.Size, x_shape: torch.Size, like: Tensor
) -> None:
    """Evaluate g at some z, and say what is wrong with the answers.

    Args:
        generator: g, called with z (n, *z_shape).
        z_shape: Shape of one z.
        x_shape: Shape of what it must return, without the rows.
        like: Fixes dtype and device.

    Raises:
        ValueError: If it cannot be called so, returns other shapes, NaN, or a value that is random
            or depends on other rows, or cannot be differentiated.
    """
    if name := batch_norm_in_training(generator):
        raise ValueError(
            f"{name} of the generator makes what it returns for one z depend on the others in its "
            f"batch. {COUPLED.format('generator')}"
        )
    rows = torch.tensor([0.0, -1.0, 0.5, 1.0]).to(like).reshape(4, *(1,) * len(z_shape))
    z = rows.expand(4, *z_shape).contiguous()
    try:
        with torch.no_grad(), isolated_rng(0, Stream.GENERATOR_CHECK, device=like.device):
            parts, again, alone = (_parts(generator(v)) for v in (z, z, z[[3, 1]]))
    except (TypeError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"the generator cannot be called with z of shape {tuple(z.shape)}: {error}"
        ) from error
    wanted = (4, *x_shape)
    found = [tuple(p.shape) if isinstance(p, Tensor) else type(p).__name__ for p in parts]
    if len(parts) > 2 or any(shape != wanted for shape in found):
        raise ValueError(
            "the generator must return the mean of x, or a pair of it and a log factor on the "
            f"noise, each of shape {wanted} for z of shape {tuple(z.shape)}; got {found}"
        )
    for value, twice, few in zip(parts, again, alone, strict=True):
        if value.dtype != like.dtype:
            raise ValueError(f"the generator returns {value.dtype} for z of {like.dtype}")
        if not value.isfinite().all():
            raise ValueError("the generator is NaN or infinite at z between −1 and 1")
        if not close_up_to_rounding(value, twice):
            raise ValueError(
                "the generator is random: two calls differ. Draw nothing in it; dropout needs "
                ".eval()"
            )
        if not close_up_to_rounding(value[[3, 1]], few):
            raise ValueError(
                "what the generator returns for one z depends on the others in its batch, or on "
                f"its place there. {COUPLED.format('generator')}"
            )
    _check_derivatives(generator, z.flatten(1), z_shape)


def _check_derivatives(generator: nn.Module, z: Tensor, z_shape: torch.Size) -> None:
    def mean(v: Tensor) -> Tensor:
        value: Tensor = _parts(generator(v.reshape(-1, *z_shape)))[0]
        return value.reshape(*v.shape[:-1], -1)

    try:
        jacobian(mean, z)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            "the generator cannot be differentiated twice, as the metric of p(z | x) needs: "
            f"“{str(error).splitlines()[0]}”. Use operations of torch, and do not detach z"
        ) from error


def _parts(out: object) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)
