# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pyro
import torch
from pyro.infer.autoguide import AutoNormal
from referee import global_seed, normal
from small_models import tiny_pool

from pyro_lvebm import LVEBM, MLPGenerator, ZeroEnergy
from pyro_lvebm.cli.choice import model_of
from pyro_lvebm.cli.plane import has_plane, plane_figure, telling_data


def clouds(num_data: int, seed: int = 0) -> np.ndarray:
    """Posterior draws (200, N, 2) of data along a line, of one Gaussian each."""
    draw = np.random.default_rng(seed)
    centres = np.linspace(-1.8, 1.8, num_data)[:, None] * np.ones(2)
    return centres + 0.1 * draw.normal(size=(200, num_data, 2))


def test_a_posterior_of_two_modes_is_among_those_that_are_shown() -> None:
    draws = clouds(40)
    draws[:100, 17] += 0.8
    chosen = telling_data(draws)
    assert chosen[0] == 17 and len(chosen) == len(set(chosen)) == 5
    centres = draws.mean(0)[chosen]
    gaps = np.linalg.norm(centres[:, None] - centres, axis=-1) + 9.0 * np.eye(5)
    assert gaps.min() > 0.7


def test_one_row_far_out_is_drawn_all_the_same() -> None:
    """Where there is nothing else to show."""
    assert telling_data(clouds(1) + 5.0) == [0]
    x = normal((60, 3), 1).float()
    ebm = LVEBM.from_data(
        ZeroEnergy(3, 2), x, z_dim=2, generator=MLPGenerator(2, (3,), (4,)), pool=tiny_pool()
    )
    model = model_of(ebm, 60)
    pyro.clear_param_store()
    guide = AutoNormal(model)
    with torch.no_grad(), global_seed(0):
        guide(x)
    assert has_plane(ebm)
    draws = np.full((20, 60, 2), 9.0) + 0.1 * np.random.default_rng(0).normal(size=(20, 60, 2))
    figure = plane_figure(ebm, model, x, draws, {"mean field": guide}, 0, None, range(101, 161))
    plane, row = (part.axes for part in figure.subfigs)
    assert len(plane) == 1 and len(row) == 1
    shown = int(np.abs(draws.mean(0)).max(1).argmin())
    assert row[0].get_title() == f"row {101 + shown}"


def test_only_a_generator_of_a_plane_has_a_picture() -> None:
    x = normal((60, 3), 1).float()
    flat = LVEBM.from_data(ZeroEnergy(3, 2), x, z_dim=2, base="gaussian", pool=tiny_pool())
    line = LVEBM.from_data(ZeroEnergy(3, 1), x, z_dim=1, generator="linear", pool=tiny_pool())
    assert not has_plane(flat) and not has_plane(line)
