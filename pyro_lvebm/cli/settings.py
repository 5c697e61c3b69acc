# SPDX-License-Identifier: Apache-2.0
"""What a user may choose about a fit; `--help` prints its defaults, without torch."""

from __future__ import annotations

from dataclasses import dataclass

BASES = ("auto", "gaussian", "mixture", "generator")
"""What f stands on; "auto" is chosen by validation rows."""


@dataclass(frozen=True)
class JobSettings:
    """What a user may choose about a fit."""

    z_dim: int | None = 2  # None is chosen by validation rows
    num_steps: int = 1500
    guide_steps: int = 12000  # at most, for each guide
    batch_size: int = 512
    num_particles: int = 2
    learning_rate: float = 3e-3
    seed: int = 0
    base: str = "auto"  # or "gaussian", "mixture", "generator"

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        from pyro_lvebm.validation import check_at_least

        if self.base not in BASES:
            raise ValueError(f"base must be one of {', '.join(BASES)}; got {self.base!r}")
        names = ("num_steps", "guide_steps", "batch_size", "num_particles")
        check_at_least(1, **{name: getattr(self, name) for name in names})
        if self.z_dim is not None:
            check_at_least(1, z_dim=self.z_dim)
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive; got {self.learning_rate}")
