# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conditional_models import linear_ebm, model_of
from latent_models import Model, bent_ebm, blocks_of, mean_model
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from referee import ALPHA, CERTAIN, mean_p_value, normal
from small_models import data_of, exact_joint, plate_model, quadratic_ebm, warm
from torch import Tensor

from pyro_lvebm import LVEBM, AutoParticles, MLPEnergy, lvebm
from pyro_lvebm.latents import energy as package
from pyro_lvebm.latents.blocks import LatentBlock
from pyro_lvebm.latents.energy import as_problems
from pyro_lvebm.sites.traces import energy_modules, frozen


def at(block: LatentBlock, num_particles: int = 5, seed: int = 9) -> Tensor:
    """Some v away from the particles, for another number of them."""
    return 1.5 * normal((num_particles, *block.v.shape[1:]), seed, block.v.dtype)


def evaluate(block: LatentBlock, v: Tensor) -> tuple[Tensor, Tensor]:
    with frozen(energy_modules(block.at.program.trace(block.at.program.model))):
        return block.f(v)


def log_density(block: LatentBlock, v: Tensor) -> Tensor:
    """offset + log N(v; 0, I) - f(v): the log density of the model in v."""
    base = -0.5 * (v**2).sum(-1) - 0.5 * v.shape[-1] * math.log(2 * math.pi)
    return block.offset + base - evaluate(block, v)[0]


EBMS = {
    "quadratic": quadratic_ebm,
    "bent": lambda: bent_ebm(False),
    "bent, full base_z": lambda: bent_ebm(True),
}


# --- the fast path and the traced path ------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "conditional", "generator"])
def test_some_rows_of_an_lvebm_alone_have_the_energies_that_they_have_among_all(kind: str) -> None:
    if kind == "conditional":
        ebm, x, c = linear_ebm()
        (block,), _ = blocks_of(model_of(ebm), x, c)
    else:
        x = normal((12, 3), 1).float()
        generator = "linear" if kind == "generator" else None
        ebm = LVEBM.from_data(MLPEnergy(3, 1, (8,)), x, z_dim=1, generator=generator)
        torch.nn.init.normal_(ebm.f.out.weight, generator=torch.Generator().manual_seed(0))
        (block,), _ = blocks_of(plate_model(ebm), x)
    v, rows = at(block), torch.tensor([4, 1, 9])
    assert block.of_rows is not None
    f, r = block.of_rows(rows)
    with frozen([ebm]):
        for part, whole in zip(f(v[:, rows]), block.f(v), strict=True):
            torch.testing.assert_close(part, whole[:, rows])
    assert (r is None) is (kind != "generator")
    if r is not None:
        torch.testing.assert_close(r(v[:, rows]), block.residuals(v)[:, rows])


def test_rows_do_not_stand_alone_beside_another_site() -> None:
    ebm = quadratic_ebm(2, 1)
    model = regression(ebm, normal((1,), 2), 0.5)
    (block,), _ = blocks_of(model, data_of(ebm, 6), normal((6,), 3))
    assert block.of_rows is None


@pytest.mark.parametrize("kind", EBMS)
@pytest.mark.parametrize("size", [None, 4])
def test_the_fast_path_is_the_traced_path(
    kind: str, size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values, gradients and the whole log density agree, and the latter is that of a trace."""
    ebm = warm(EBMS[kind](), 3)
    x = data_of(ebm, 10)
    model = plate_model(ebm, size)
    (fast,), _ = blocks_of(model, x)
    monkeypatch.setattr(package, "_own_part", lambda *_: None)
    (traced,), trace = blocks_of(model, x)
    rows = x[traced.indices["data"]]
    assert torch.equal(fast.v, traced.v) and fast.v.shape == (3, size or 10, 2)
    assert traced.offset.shape == () and fast.offset.shape == (size or 10,)
    v = at(fast)
    (f, grad), (g, traced_grad) = evaluate(fast, v), evaluate(traced, v)
    torch.testing.assert_close(grad, traced_grad)
    # The fast path keeps all that does not depend on z in its offset.
    torch.testing.assert_close(fast.offset - f, traced.offset - g)
    z = ebm.base_z.unwhiten(v)
    rows = rows.expand(5, *rows.shape)
    log_p = -ebm.energy(rows, z) - ebm.log_partition + ebm.base_z.log_det
    torch.testing.assert_close(log_density(fast, v), log_p.detach())
    # At the particles themselves it is what the model's trace says.
    trace.compute_log_prob()
    total = sum(trace.nodes[n]["unscaled_log_prob"] for n in ("scene", "scene_z"))
    torch.testing.assert_close(log_density(traced, traced.v), (total + ebm.base_z.log_det).detach())


def test_the_log_density_is_the_closed_form() -> None:
    ebm = warm(quadratic_ebm(), 5)
    x = data_of(ebm, 6)
    (block,), _ = blocks_of(plate_model(ebm), x)
    v = at(block)
    z = ebm.base_z.unwhiten(v)
    exact = exact_joint(ebm).log_prob(torch.cat([x.expand(5, 6, 3), z], -1))
    error = ebm.log_partition - ebm.f.log_partition().detach()
    torch.testing.assert_close(log_density(block, v), exact.detach() - error + ebm.base_z.log_det)


def test_a_scale_common_to_all_sites_changes_nothing() -> None:
    ebm = warm(quadratic_ebm(), 3)
    x = data_of(ebm, 4)
    (plain,), _ = blocks_of(plate_model(ebm), x)
    (scaled,), _ = blocks_of(poutine.scale(plate_model(ebm), scale=0.5), x)
    v = at(plain)
    torch.testing.assert_close(log_density(scaled, v), log_density(plain, v))


def test_a_datum_whose_sites_are_masked_follows_its_prior() -> None:
    ebm = warm(quadratic_ebm(), 3)
    x, keep = data_of(ebm, 4), torch.tensor([True, False, True, True])
    (plain,), _ = blocks_of(plate_model(ebm), x)
    (masked,), _ = blocks_of(poutine.mask(plate_model(ebm), mask=keep), x)
    v = at(plain)
    forces = [evaluate(block, v)[1] + v for block in (plain, masked)]
    torch.testing.assert_close(forces[1][:, keep], forces[0][:, keep])
    torch.testing.assert_close(forces[1][:, ~keep], v[:, ~keep])  # of N(0, I), in whitened z


# --- models with more than the two sites ----------------------------------------------------


def regression(ebm: LVEBM, w: Tensor, s: float, size: int | None = None) -> Model:
    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=size) as i:
            _, z = lvebm("scene", ebm, obs=x[i])
            pyro.sample("y", dist.Normal(z @ w, s), obs=y[i])

    return model


@pytest.mark.parametrize("size", [None, 4])
def test_a_latent_that_feeds_another_site_has_that_site_in_its_energy(size: int | None) -> None:
    ebm = warm(quadratic_ebm(), 3)
    x, y, w = data_of(ebm, 9), normal((9,), 1), torch.tensor([1.5, -0.5]).double()
    (block,), _ = blocks_of(regression(ebm, w, 0.4, size), x, y)
    i = block.indices["data"]
    v = at(block)
    z = ebm.base_z.unwhiten(v)

    def expected(v: Tensor) -> Tensor:
        z = ebm.base_z.unwhiten(v)
        log_y = dist.Normal(z @ w, 0.4).log_prob(y[i])
        joint = exact_joint(ebm).log_prob(torch.cat([x[i].expand(5, len(i), 3), z], -1))
        error = ebm.log_partition - ebm.f.log_partition()
        return joint - error + log_y + ebm.base_z.log_det

    torch.testing.assert_close(log_density(block, v), expected(v).detach())
    v.requires_grad_(True)
    (grad,) = torch.autograd.grad(expected(v).sum(), v)
    torch.testing.assert_close(-evaluate(block, v.detach())[1] - v.detach(), grad)
    # Without y the gradient would be another one.
    (alone,), _ = blocks_of(plate_model(ebm, size), x)
    assert (evaluate(alone, v.detach())[1] - evaluate(block, v.detach())[1]).abs().max() > 0.1
    assert z.shape == (5, len(i), 2)


@pytest.mark.parametrize("size", [None, 4])
def test_a_site_that_does_not_use_the_latent_leaves_the_fast_path(size: int | None) -> None:
    """It is a constant of its datum, which belongs to the log density all the same."""
    ebm = warm(quadratic_ebm(), 3)
    x, y = data_of(ebm, 9), normal((9,), 1)

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=size) as i:
            lvebm("scene", ebm, obs=x[i])
            pyro.sample("y", dist.Normal(x[i].sum(-1), 0.4), obs=y[i])

    (block,), _ = blocks_of(model, x, y)
    (alone,), _ = blocks_of(plate_model(ebm, size), x)
    i = block.indices["data"]
    v = at(block)
    assert torch.equal(i, alone.indices["data"])
    for ours, theirs in zip(evaluate(block, v), evaluate(alone, v), strict=True):
        assert torch.equal(ours, theirs)
    log_y = dist.Normal(x[i].sum(-1), 0.4).log_prob(y[i])
    torch.testing.assert_close(block.offset - alone.offset, log_y)


def test_two_latents_in_one_plate_are_one_block() -> None:
    """Their columns lie side by side, and each site counts once."""
    a, b = warm(quadratic_ebm(3, 2, seed=1), 3), warm(quadratic_ebm(2, 1, seed=2), 3)
    x, y = data_of(a, 6), data_of(b, 6)

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", 6):
            lvebm("first", a, obs=x)
            lvebm("second", b, obs=y)

    (block,), _ = blocks_of(model, x, y)
    assert [c.name for c in block.columns] == ["first_z", "second_z"]
    v = at(block)
    assert v.shape == (5, 6, 3)
    expected = torch.zeros(5, 6).double()
    for ebm, data, part in ((a, x, v[..., :2]), (b, y, v[..., 2:])):
        pair = torch.cat([data.expand(5, *data.shape), ebm.base_z.unwhiten(part)], -1)
        error = ebm.log_partition - ebm.f.log_partition().detach()
        expected += exact_joint(ebm).log_prob(pair).detach() - error + ebm.base_z.log_det
    torch.testing.assert_close(log_density(block, v), expected)


def test_a_latent_on_the_half_line_has_its_jacobian() -> None:
    """Gamma prior, normal likelihood: log p(z, y) + log dz/dv, with z = exp(v)."""

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Gamma(2.0, 1.5))
            pyro.sample("y", dist.Normal(z, 0.3), obs=y)

    y = normal((7,), 1).abs()
    (block,), _ = blocks_of(model, y)
    v = at(block)
    z = v.squeeze(-1).exp()
    expected = dist.Gamma(2.0, 1.5).log_prob(z) + dist.Normal(z, 0.3).log_prob(y) + z.log()
    torch.testing.assert_close(log_density(block, v), expected.double())
    values = block.constrain(v)
    torch.testing.assert_close(values["z"], z)
    joined, log_det = block.join(values)
    torch.testing.assert_close(joined, v)
    torch.testing.assert_close(log_det, z.log())


def test_split_and_join_are_inverse_for_events_of_any_shape() -> None:
    ebm = warm(bent_ebm(True), 2)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            lvebm("scene", ebm, obs=x)
            rates = torch.ones(3, 2).double()
            pyro.sample("rate", dist.Gamma(rates, 1.0).to_event(2))
            pyro.sample("share", dist.Dirichlet(torch.ones(3).double()))

    (block,), _ = blocks_of(model, data_of(ebm, 4))
    assert [(c.name, c.dim) for c in block.columns] == [("scene_z", 2), ("rate", 6), ("share", 2)]
    v = at(block)
    values = block.constrain(v)
    assert {n: tuple(t.shape) for n, t in values.items()} == {
        "scene_z": (5, 4, 2, 1),
        "rate": (5, 4, 3, 2),
        "share": (5, 4, 3),
    }
    assert (values["rate"] > 0).all()
    joined, log_det = block.join(values)
    torch.testing.assert_close(joined, v)
    torch.testing.assert_close(values["scene_z"], ebm.base_z.unwhiten(v[..., :2]))
    # The Jacobian of the first two, and of the simplex's own chart, by autograd.
    share = v[0, 0, 8:].clone()
    chart = block.columns[2].transform
    jacobian = torch.autograd.functional.jacobian(lambda s: chart(s)[..., :2], share)
    expected = ebm.base_z.log_det + v[0, 0, 2:8].sum() + jacobian.det().abs().log()
    torch.testing.assert_close(log_det[0, 0], expected)


# --- plates ---------------------------------------------------------------------------------


def nested(ebm: LVEBM, w: Tensor, size: int | None = None) -> Model:
    """z in the outer plate, five measurements of each in an inner one."""

    def model(x: Tensor, y: Tensor) -> None:
        inner = pyro.plate("inner", y.shape[1], dim=-1)
        with pyro.plate("outer", len(x), dim=-2, subsample_size=size) as i:
            _, z = lvebm("scene", ebm, obs=x[i][:, None])
            with inner:
                pyro.sample("y", dist.Normal(z @ w, 0.7), obs=y[i])

    return model


@pytest.mark.parametrize("size", [None, 2])
def test_sites_in_an_inner_plate_are_summed(size: int | None) -> None:
    ebm = warm(quadratic_ebm(), 3)
    x, y, w = data_of(ebm, 4), normal((4, 5), 1), torch.tensor([1.5, -0.5]).double()
    (block,), _ = blocks_of(nested(ebm, w, size), x, y)
    i = block.indices["outer"]
    assert set(block.indices) == {"outer"} and block.v.shape == (3, size or 4, 1, 2)
    v = at(block)
    z = ebm.base_z.unwhiten(v)
    log_y = dist.Normal(z @ w, 0.7).log_prob(y[i]).sum(-1, keepdim=True)
    pair = torch.cat([x[i][:, None].expand(5, len(i), 1, 3), z], -1)
    error = ebm.log_partition - ebm.f.log_partition().detach()
    expected = exact_joint(ebm).log_prob(pair) - error + log_y + ebm.base_z.log_det
    torch.testing.assert_close(log_density(block, v), expected.detach())


def test_a_latent_inside_two_plates_belongs_to_both() -> None:
    ebm = warm(quadratic_ebm(), 3)
    x = data_of(ebm, 12).reshape(4, 3, 3)

    def model(x: Tensor) -> None:
        with (
            pyro.plate("outer", 4, dim=-2),
            pyro.plate("inner", 3, dim=-1, subsample_size=2) as i,
        ):
            lvebm("scene", ebm, obs=x[:, i])

    (block,), _ = blocks_of(model, x)
    assert set(block.indices) == {"outer", "inner"} and block.v.shape == (3, 4, 2, 2)
    assert block.offset.shape == (4, 2)
    v = at(block)
    rows = x[:, block.indices["inner"]].expand(5, 4, 2, 3)
    exact = exact_joint(ebm).log_prob(torch.cat([rows, ebm.base_z.unwhiten(v)], -1))
    error = ebm.log_partition - ebm.f.log_partition().detach()
    torch.testing.assert_close(log_density(block, v), exact.detach() - error + ebm.base_z.log_det)


def mean_density(v: Tensor, y: Tensor, scale: float) -> Tensor:
    log_y = dist.Normal(v, 1.0).log_prob(y).sum(-1)
    return dist.Normal(0.0, 2.0).log_prob(v.squeeze(-1)) + scale * log_y


def test_a_latent_without_a_plate_is_one_block_of_its_own() -> None:
    y = normal((12,), 1)
    (block,), _ = blocks_of(mean_model(12), y)
    assert block.v.shape == (3, 1) and block.indices == {} and not block.is_global
    v = at(block)
    torch.testing.assert_close(log_density(block, v), mean_density(v, y, 1.0))


def test_a_latent_above_a_subsampled_plate_is_global() -> None:
    """Its energy is scaled up, so that over minibatches it is unbiased. False alarms: 1e-3."""
    y = normal((12,), 1)
    (block,), _ = blocks_of(mean_model(4), y)
    assert block.is_global
    v = at(block)
    draws = []
    for seed in range(200):
        (block,), _ = blocks_of(mean_model(4), y, seed=seed)
        draws.append(log_density(block, v))
    exact = mean_density(v, y, 1.0)
    assert mean_p_value(torch.stack(draws), exact) > ALPHA
    assert mean_p_value(torch.stack(draws) * 0.9, exact) < CERTAIN


def test_a_global_energy_keeps_one_minibatch() -> None:
    y = normal((12,), 1)
    (block,), trace = blocks_of(mean_model(4), y)
    v = at(block)
    rows = y[trace.nodes["data"]["value"]]
    torch.testing.assert_close(log_density(block, v), mean_density(v, rows, 3.0))


def test_local_and_global_latents_are_two_blocks_that_see_each_other() -> None:
    ebm = warm(quadratic_ebm(), 3)
    x, y = data_of(ebm, 6), normal((6,), 1)

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        with pyro.plate("data", 6, subsample_size=3) as i:
            _, z = lvebm("scene", ebm, obs=x[i])
            pyro.sample("y", dist.Normal((z * w).sum(-1), 0.5), obs=y[i])

    blocks, _ = blocks_of(model, x, y)
    shared, local = sorted(blocks, key=lambda b: not b.is_global)
    assert [c.name for c in shared.columns] == ["w"] and shared.v.shape == (3, 2)
    assert [c.name for c in local.columns] == ["scene_z"] and local.v.shape == (3, 3, 2)
    assert shared.is_global and not local.is_global

    def local_gradient(w: Tensor, v: Tensor) -> Tensor:
        v = v.clone().requires_grad_(True)
        z = ebm.base_z.unwhiten(v)
        i = local.indices["data"]
        pair = torch.cat([x[i].expand(3, 3, 3), z], -1)
        log_p = exact_joint(ebm).log_prob(pair)
        log_p = log_p + dist.Normal((z * w[:, None]).sum(-1), 0.5).log_prob(y[i])
        return torch.autograd.grad(log_p.sum(), v)[0]

    v = at(local, 3)
    before = evaluate(local, v)[1]
    torch.testing.assert_close(-before - v, local_gradient(shared.v, v))
    moved = at(shared, 3)
    shared.fix(moved)
    after = evaluate(local, v)[1]
    torch.testing.assert_close(-after - v, local_gradient(moved, v))
    assert (after - before).abs().max() > 0.01


def test_latents_of_another_guide_are_held() -> None:
    ebm = warm(quadratic_ebm(), 3)
    x, y = data_of(ebm, 6), normal((6,), 1)

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        with pyro.plate("data", 6):
            _, z = lvebm("scene", ebm, obs=x)
            pyro.sample("y", dist.Normal((z * w).sum(-1), 0.5), obs=y)

    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["w"])))
    guide.append(AutoParticles(poutine.block(model, hide=["w"]), 3))
    (block,), trace = blocks_of(model, x, y, guide=guide)
    assert [c.name for c in block.columns] == ["scene_z"]
    w = trace.nodes["w"]["value"].reshape(3, 1, 2)
    assert w.unique().numel() == 6
    v = at(block, 3)
    z = ebm.base_z.unwhiten(v)
    pair = torch.cat([x.expand(3, 6, 3), z], -1)
    log_y = dist.Normal((z * w).sum(-1), 0.5).log_prob(y)
    log_p = exact_joint(ebm).log_prob(pair) + log_y
    constant = log_density(block, v) - log_p.detach()
    torch.testing.assert_close(constant, constant[:1, :1].expand(3, 6))


@pytest.mark.parametrize(
    ("size", "mixed", "message"),
    [
        (3, False, r"'total' depends on the latent 'scene_z' and lies outside its plate.*'data'"),
        (None, True, r"'total' mixes the 3 particles.*z\[\.\.\., 0\]"),
    ],
)
def test_sites_outside_the_plate_that_no_particles_can_follow(
    size: int | None, mixed: bool, message: str
) -> None:
    ebm = warm(quadratic_ebm(), 2)

    def model(x: Tensor) -> None:
        with pyro.plate("data", 6, subsample_size=size) as i:
            _, z = lvebm("scene", ebm, obs=x[i])
        total = z.sum() if mixed else z.sum((-2, -1))[..., None]
        pyro.sample("total", dist.Normal(total, 1.0), obs=torch.zeros(()).double())

    with pytest.raises(ValueError, match=message):
        blocks_of(model, data_of(ebm, 6))


def test_a_site_outside_the_plate_may_depend_on_a_parameter() -> None:
    ebm = warm(quadratic_ebm(), 2)

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.param("w", torch.ones(2).double())
        pyro.sample("prior", dist.Normal(w, 1.0).to_event(1), obs=torch.zeros(2).double())
        with pyro.plate("data", 6):
            _, z = lvebm("scene", ebm, obs=x)
            pyro.sample("y", dist.Normal(z @ w, 1.0), obs=y)

    (block,), _ = blocks_of(model, data_of(ebm, 6), normal((6,), 1))
    assert torch.isfinite(evaluate(block, at(block))[0]).all()


# --- small parts ----------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(6,), (2, 3), ()])
def test_as_problems_makes_problems_of_data(batch: tuple[int, ...]) -> None:
    """Each value goes back to the run, problem and particle that it came from."""
    shift = normal(batch, 1)

    def f(v: Tensor) -> tuple[Tensor, Tensor]:
        assert v.shape[1:-1] == batch
        return (v**2).sum(-1) + shift, 2 * v

    n = shift.numel()
    v = normal((2, n, 4, 3), 2)
    value, grad = as_problems(f, torch.Size(batch))(v)
    torch.testing.assert_close(value, (v**2).sum(-1) + shift.reshape(1, n, 1))
    torch.testing.assert_close(grad, 2 * v)
