# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.optim import SGD, Adam, ClippedAdam, ExponentialLR, PyroOptim
from referee import assert_global_rng_untouched, normal
from safetensors import safe_open
from safetensors.torch import save_file
from small_models import data_of, plate_model, quadratic_ebm, same, snapshot
from torch import Tensor, nn

from pyro_lvebm import (
    LVEBM,
    MALA,
    AutoAmortisedNormal,
    AutoParticles,
    AutoPerDatumMultivariateNormal,
    MLPEnergy,
    PersistentPool,
    Saddle,
    TemperedPool,
    lvebm,
)
from pyro_lvebm.training import checkpoint, header

pytestmark = pytest.mark.usefixtures("brief_settling")

OPTIMISERS: dict[str, Callable[[], PyroOptim]] = {
    "Adam": lambda: Adam({"lr": 0.02, "betas": (0.8, 0.95)}),
    "ClippedAdam": lambda: ClippedAdam({"lr": 0.02, "lrd": 0.9, "clip_norm": 5.0}),
    "SGD": lambda: SGD({"lr": 1e-3, "momentum": 0.9}),
}

GUIDES: dict[str, Callable[..., Any]] = {
    "particles": lambda model: AutoParticles(model, 3),
    "AutoNormal": AutoNormal,
    "per datum": AutoPerDatumMultivariateNormal,
    "amortised": lambda model: AutoAmortisedNormal(model, hidden=(4,)),
}


def make(
    guide: str = "particles",
    optim: str = "Adam",
    *,
    pool: Callable[[], TemperedPool | PersistentPool] = lambda: TemperedPool(3, 40, num_moves=2),
    dtype: torch.dtype = torch.float64,
    x_dim: int = 3,
    size: int = 8,
    seed: int = 0,
) -> tuple[Callable[..., Any], Any, PyroOptim, LVEBM, Tensor]:
    ebm = quadratic_ebm(x_dim, 2, pool=pool(), dtype=dtype, seed=seed)
    model = plate_model(ebm, size)
    return model, GUIDES[guide](model), OPTIMISERS[optim](), ebm, data_of(ebm, 20)


def state_of(saddle: Saddle) -> dict[str, Tensor]:
    state = {f"{k}.{n}": t for k, e in enumerate(saddle.ebms) for n, t in snapshot(e).items()}
    if isinstance(saddle.guide, nn.Module):
        state |= {f"guide.{n}": t for n, t in snapshot(saddle.guide).items()}
    return state


def steps(saddle: Saddle, x: Tensor, count: int = 3) -> tuple[list[float], dict[str, Tensor]]:
    return [saddle.step(x) for _ in range(count)], state_of(saddle)


def averaged_state(saddle: Saddle) -> dict[str, Tensor]:
    with saddle.averaged():
        return state_of(saddle)


def assert_same_history(a: Saddle, b: Saddle) -> None:
    pd.testing.assert_frame_equal(a.history, b.history, check_exact=True)


def saved(path: Path, count: int = 4, **settings: Any) -> tuple[Saddle, Tensor]:
    model, guide, optim, _, x = make(**settings)
    saddle = Saddle(model, guide, optim, num_moves=2, max_kl=0.03, average_decay=0.15, seed=7)
    for _ in range(count):
        saddle.step(x)
    saddle.save(path)
    return saddle, x


# --- the run goes on ------------------------------------------------------------------------


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("optim", OPTIMISERS)
def test_the_next_steps_are_those_of_the_uninterrupted_run(
    guide: str, optim: str, tmp_path: Path
) -> None:
    """Bit for bit, in a process that knows nothing of the first run: other θ, other particles."""
    saddle, x = saved(tmp_path / "run", guide=guide, optim=optim)
    losses, state = steps(saddle, x)
    pyro.clear_param_store()
    model, new_guide, new_optim, ebm, _ = make(guide=guide, optim=optim)
    with torch.no_grad():
        ebm.f.linear += 1.0
        ebm.base_x.loc += 1.0
    ebm.pool.seed = 99
    torch.manual_seed(123)
    with assert_global_rng_untouched():
        again = Saddle.load(tmp_path / "run", model, new_guide, new_optim, x)
        assert (again.step_count, again.seed, again.max_kl, again.num_moves) == (4, 7, 0.03, 2)
        assert again.average_decay == again.average.decay == 0.15 and len(again.history) == 4
        assert steps(again, x)[0] == losses
    assert same(state, state_of(again)) and again.step_count == 7
    assert same(averaged_state(saddle), averaged_state(again))
    assert not same(state, averaged_state(again))
    assert_same_history(saddle, again)
    assert ebm.pool.seed == 0


@pytest.mark.parametrize(
    ("pool", "dtype"),
    [
        (lambda: PersistentPool(40, num_moves=2, seed=5), torch.float64),
        (lambda: PersistentPool(40, kernel=MALA(0.7), num_moves=1), torch.float32),
        (lambda: TemperedPool(2, 30, num_moves=1, seed=3), torch.float32),
    ],
)
def test_every_pool_and_dtype_goes_on(
    pool: Callable[[], TemperedPool | PersistentPool], dtype: torch.dtype, tmp_path: Path
) -> None:
    saddle, x = saved(tmp_path / "run", pool=pool, dtype=dtype)
    losses, state = steps(saddle, x)
    pyro.clear_param_store()
    model, guide, optim, _, _ = make(pool=pool, dtype=dtype)
    again = Saddle.load(tmp_path / "run", model, guide, optim, x)
    new_losses, new_state = steps(again, x)
    assert new_losses == losses and same(state, new_state)


def test_the_check_notices_an_optimiser_that_forgot(tmp_path: Path) -> None:
    """And a lost step count, and particles that were not restored."""
    saddle, x = saved(tmp_path / "run")
    losses, state = steps(saddle, x)
    for spoil in ("optimiser", "step count", "particles", "pool"):
        pyro.clear_param_store()
        model, guide, optim, ebm, _ = make()
        again = Saddle.load(tmp_path / "run", model, guide, optim, x)
        if spoil == "optimiser":
            again.optim = OPTIMISERS["Adam"]()
        elif spoil == "step count":
            again.step_count = 0
        elif spoil == "particles":
            guide.particles_scene_z += 1e-3
        else:
            ebm.pool.u = ebm.pool.u + 1e-3
        new_losses, new_state = steps(again, x)
        assert new_losses != losses and not same(state, new_state)


def test_fit_and_posterior_draws_go_on_too(tmp_path: Path) -> None:
    saddle, x = saved(tmp_path / "run")
    losses = saddle.fit(x, num_steps=3, progress=False)
    draws = saddle.sample_posterior(x, num_samples=2, num_warmup=2)
    saddle.save(tmp_path / "fitted")
    pyro.clear_param_store()
    model, guide, optim, _, _ = make()
    again = Saddle.load(tmp_path / "run", model, guide, optim, x)
    assert again.fit(x, num_steps=3, progress=False) == losses
    # Saved where the pool has caught up with θ: no refresh is owed.
    pyro.clear_param_store()
    model, guide, optim, ebm, _ = make()
    again = Saddle.load(tmp_path / "fitted", model, guide, optim, x)
    assert ebm.pool_is_fresh() and saddle.ebms[0].pool_is_fresh()
    assert torch.equal(
        again.sample_posterior(x, num_samples=2, num_warmup=2)["scene_z"], draws["scene_z"]
    )
    assert again.step(x) == saddle.step(x)


@pytest.mark.parametrize("guide", ["particles", "amortised"])
def test_a_fit_to_held_out_data_goes_on(guide: str, tmp_path: Path) -> None:
    """Evaluations, the choice of the best, the average and the history, in which gaps remain."""
    saddle, x = saved(tmp_path / "run", guide=guide)
    options: dict[str, Any] = {"num_steps": 5, "held_out": (x[:9],), "evaluate_every": 3}
    losses = saddle.fit(x, progress=False, **options)
    saddle.save(tmp_path / "fitted")
    runs = []
    for name in ("run", "fitted"):
        pyro.clear_param_store()
        model, new_guide, optim, _, _ = make(guide=guide)
        runs.append(Saddle.load(tmp_path / name, model, new_guide, optim, x))
        if name == "run":
            assert "log_evidence" not in runs[0].history and len(runs[0].history) == 4
            assert runs[0].fit(x, progress=False, **options) == losses
        assert same(state_of(saddle), state_of(runs[-1]))
        assert same(averaged_state(saddle), averaged_state(runs[-1]))
        assert_same_history(saddle, runs[-1])
    steps_of_rows = saddle.history.index.tolist()
    assert steps_of_rows == list(range(1, 10))
    evaluated = saddle.history["log_evidence"].dropna()
    assert evaluated.index.tolist() == [4, 7, 9]
    fits = []
    for run in (saddle, runs[1]):
        pyro.clear_param_store()  # guides of one class share their names in it
        fits.append(run.fit(x, progress=False, **{**options, "num_steps": 2}))
    assert fits[0] == fits[1]
    assert_same_history(saddle, runs[1])


def test_the_check_notices_an_average_or_a_history_that_was_lost(tmp_path: Path) -> None:
    saddle, x = saved(tmp_path / "run")
    expected = averaged_state(saddle)
    for spoil in ("values", "history", "count"):
        pyro.clear_param_store()
        model, guide, optim, _, _ = make()
        again = Saddle.load(tmp_path / "run", model, guide, optim, x)
        assert same(expected, averaged_state(again))
        if spoil == "history":
            again.recorder.rows.pop()
            with pytest.raises(AssertionError):
                assert_same_history(saddle, again)
            continue
        if spoil == "values":
            again.average.values = {}
        else:
            again.average.count = 0
            again.step(x)
            saddle.step(x)
            expected = averaged_state(saddle)
        assert not same(expected, averaged_state(again))


def test_saving_changes_nothing(tmp_path: Path) -> None:
    results = []
    for save in (False, True):
        pyro.clear_param_store()
        model, guide, optim, _, x = make()
        saddle = Saddle(model, guide, optim, num_moves=2)
        losses = []
        for k in range(4):
            losses.append(saddle.step(x))
            if save:
                with assert_global_rng_untouched():
                    saddle.save(tmp_path / f"run{k}")
        results.append((losses, state_of(saddle)))
    assert results[0][0] == results[1][0] and same(results[0][1], results[1][1])


def test_parameters_outside_modules_and_several_parts_are_saved(tmp_path: Path) -> None:
    """A guide list, two LVEBMs, `pyro.param`s with and without a constraint."""

    def parts() -> tuple[Callable[..., Any], Any, Tensor, Tensor]:
        a, b = quadratic_ebm(3, 2, seed=1), quadratic_ebm(2, 1, seed=2)
        x, y = data_of(a, 12), data_of(b, 12)

        def model(x: Tensor, y: Tensor) -> None:
            scale = pyro.param(
                "scale", torch.tensor(2.0).double(), constraint=dist.constraints.positive
            )
            shift = pyro.param("shift", torch.zeros(()).double())
            w = pyro.sample("w", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            with pyro.plate("data", 12, subsample_size=5) as i:
                _, z = lvebm("first", a, obs=x[i])
                lvebm("second", b, obs=y[i])
                mean = (z * w).sum(-1) + shift
                pyro.sample("t", dist.Normal(mean, scale), obs=x[i].sum(-1))

        guide = AutoGuideList(model)
        guide.append(AutoNormal(poutine.block(model, expose=["w"])))
        guide.append(AutoParticles(poutine.block(model, hide=["w"]), 2))
        return model, guide, x, y

    model, guide, x, y = parts()
    saddle = Saddle(model, guide, Adam({"lr": 0.05}), num_moves=2)
    for _ in range(3):
        saddle.step(x, y)
    saddle.save(tmp_path / "run")
    values = [pyro.param(n).item() for n in ("scale", "shift")]
    with saddle.averaged():
        averages = [pyro.param(n).item() for n in ("scale", "shift")]
    assert values[0] != 2.0 and values[1] != 0.0 and averages != values
    losses = [saddle.step(x, y) for _ in range(3)]
    after = [pyro.param(n).item() for n in ("scale", "shift")]
    state = state_of(saddle)
    pyro.clear_param_store()
    model, guide, x, y = parts()
    again = Saddle.load(tmp_path / "run", model, guide, Adam({"lr": 0.05}), x, y)
    assert [pyro.param(n).item() for n in ("scale", "shift")] == values
    with again.averaged():
        assert [pyro.param(n).item() for n in ("scale", "shift")] == averages
    assert [again.step(x, y) for _ in range(3)] == losses
    assert [pyro.param(n).item() for n in ("scale", "shift")] == after
    assert same(state, state_of(again))


def test_a_handwritten_guide_is_saved(tmp_path: Path) -> None:
    def parts() -> tuple[Callable[..., Any], Callable[..., Any], Tensor]:
        ebm = quadratic_ebm(3, 2)

        def guide(x: Tensor) -> None:
            gain = pyro.param("gain", 0.1 * torch.ones(3, 2).double())
            with pyro.plate("data", 20, subsample_size=8) as i:
                pyro.sample("scene_z", dist.Normal(x[i] @ gain, 0.7).to_event(1))

        return plate_model(ebm, 8), guide, data_of(ebm, 20)

    model, guide, x = parts()
    saddle = Saddle(model, guide, Adam({"lr": 0.05}), Trace_ELBO(), seed=1)
    saddle.step(x)
    saddle.save(tmp_path / "run")
    losses = [saddle.step(x) for _ in range(3)]
    pyro.clear_param_store()
    model, guide, x = parts()
    again = Saddle.load(tmp_path / "run", model, guide, Adam({"lr": 0.05}), x, loss=Trace_ELBO())
    assert [again.step(x) for _ in range(3)] == losses


def test_going_back_with_the_same_objects(tmp_path: Path) -> None:
    saddle, x = saved(tmp_path / "run")
    losses = [saddle.step(x) for _ in range(3)]
    again = Saddle.load(tmp_path / "run", saddle.model, saddle.guide, saddle.optim, x)
    assert [again.step(x) for _ in range(3)] == losses


def test_clearing_the_store_before_saving_loses_nothing(tmp_path: Path) -> None:
    model, guide, optim, _, x = make()
    saddle = Saddle(model, guide, optim, num_moves=2)
    saddle.step(x)
    pyro.clear_param_store()
    saddle.save(tmp_path / "run")
    losses = [saddle.step(x) for _ in range(3)]
    pyro.clear_param_store()
    model, guide, optim, _, x = make()
    again = Saddle.load(tmp_path / "run", model, guide, optim, x)
    assert [again.step(x) for _ in range(3)] == losses


# --- the file -------------------------------------------------------------------------------


def test_the_file_is_tensors_and_json(tmp_path: Path) -> None:
    """It parses as safetensors, whose header holds plain JSON; there is nothing to execute."""
    saddle, _ = saved(tmp_path / "run")
    with safe_open(tmp_path / "run", framework="pt") as file:
        metadata = file.metadata()
        keys = set(file.keys())
        theta, average, rows = map(
            file.get_tensor, ("ebm0/f.linear", "average/ebm0/f.linear", "history")
        )
    assert set(metadata) == {"saddle"}
    header = json.loads(metadata["saddle"])
    assert header["settings"] == {
        "step_count": 4,
        "num_moves": 2,
        "max_kl": 0.03,
        "average_decay": 0.15,
        "seed": 7,
    }
    assert header["average"] == 4
    assert header["history"] == ["step", *saddle.history.columns]
    assert rows.shape == (4, len(header["history"])) and rows[:, 0].tolist() == [1, 2, 3, 4]
    assert torch.equal(theta, saddle.ebms[0].f.linear)
    assert torch.equal(average, saddle.average.values[saddle.ebms[0].f.linear])
    assert {"ebm0/pool.u", "guide/particles_scene_z"} <= keys
    assert any(k.startswith("optim/") and k.endswith("exp_avg") for k in keys)
    content = (tmp_path / "run").read_bytes()
    assert b"__reduce__" not in content and not content.startswith((b"PK", b"\x80"))


def test_loading_unpickles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, x = saved(tmp_path / "run")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(f"pickle.{name}", refuse)
    monkeypatch.setattr("torch.load", refuse)
    pyro.clear_param_store()
    model, guide, optim, _, _ = make()
    assert Saddle.load(tmp_path / "run", model, guide, optim, x).step_count == 4


def test_a_file_in_a_new_folder_and_over_an_old_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "run.safetensors"
    saddle, x = saved(path)
    saddle.step(x)
    saddle.save(str(path))
    assert [p.name for p in path.parent.iterdir()] == ["run.safetensors"]
    pyro.clear_param_store()
    model, guide, optim, _, _ = make()
    assert Saddle.load(str(path), model, guide, optim, x).step_count == 5


@pytest.mark.parametrize("culprit", ["os.replace", "os.fsync"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_file(
    culprit: str, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saddle, x = saved(tmp_path / "run")
    before = (tmp_path / "run").read_bytes()
    saddle.step(x)
    state = state_of(saddle)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(culprit, fail)
        with pytest.raises(error):
            saddle.save(tmp_path / "run")
        with pytest.raises(error):
            saddle.save(tmp_path / "new")
    assert (tmp_path / "run").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert same(state, state_of(saddle))
    saddle.save(tmp_path / "run")
    assert (tmp_path / "run").read_bytes() != before


def test_state_that_json_cannot_hold_is_refused_before_writing(tmp_path: Path) -> None:
    saddle, _ = saved(tmp_path / "run")
    before = (tmp_path / "run").read_bytes()
    for optimiser in saddle.optim.optim_objs.values():
        optimiser.param_groups[0]["note"] = object()
    with pytest.raises(ValueError, match="optimiser holds state that JSON cannot store"):
        saddle.save(tmp_path / "run")
    assert (tmp_path / "run").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


# --- files that do not fit ------------------------------------------------------------------


def refuses(path: Path, message: str, **settings: Any) -> None:
    """Loading raises a ValueError, and neither θ, pool, particles nor optimiser change."""
    pyro.clear_param_store()
    model, guide, optim, ebm, x = make(**settings)
    torch.manual_seed(0)
    guide(x)
    before = snapshot(ebm), snapshot(guide)
    with pytest.raises(ValueError, match=message):
        Saddle.load(path, model, guide, optim, x)
    assert same(before[0], snapshot(ebm)) and same(before[1], snapshot(guide))
    assert optim.get_state() == {} and not optim._state_waiting_to_be_consumed
    assert math.isfinite(Saddle(model, guide, optim, num_moves=2).step(x))


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b"",
        lambda b: b"x",
        lambda b: b[:50],
        lambda b: b[:-1],
        lambda b: b[: len(b) // 2],
        lambda b: b"\xff" * 200,
        lambda b: b[:8] + b"\x00" * 40 + b[48:],
        lambda b: b.replace(b"{", b"[", 1),
        lambda b: b"not a checkpoint, but a long enough text file " * 20,
    ],
)
def test_damaged_files_are_refused(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    saved(tmp_path / "run")
    content = (tmp_path / "run").read_bytes()
    (tmp_path / "run").write_bytes(damage(content))
    refuses(tmp_path / "run", "is not a readable checkpoint")


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    refuses(tmp_path / "nothing", "no checkpoint at")
    refuses(tmp_path, "no checkpoint at")


FIRST_FORMAT = json.dumps({"format": "pyro_lvebm saddle 1", "settings": {}, "pools": []})
"""A header as it was before averages and histories were saved."""


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other"
    save_file({"weight": torch.zeros(3)}, path)
    refuses(path, "has format None; expected 'pyro_lvebm saddle 2'")
    save_file({"weight": torch.zeros(3)}, path, metadata={"saddle": FIRST_FORMAT})
    refuses(path, "has format 'pyro_lvebm saddle 1'; expected 'pyro_lvebm saddle 2'")
    save_file({"weight": torch.zeros(3)}, path, metadata={"saddle": '{"format": "pyro_lvebm 9"}'})
    refuses(path, "has format 'pyro_lvebm 9'")
    torch.save({"weight": torch.zeros(3)}, path)
    refuses(path, "is not a readable checkpoint")


WITHOUT_ROWS = {
    "format": header.FORMAT,
    "settings": dict.fromkeys(header.SETTINGS, 1),
    "pools": [],
    "optim": {"__items__": []},
    "average": 1,
    "history": ["step"],
}


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        json.dumps(WITHOUT_ROWS),
        json.dumps({**WITHOUT_ROWS, "average": "many"}),
        json.dumps({k: v for k, v in WITHOUT_ROWS.items() if k != "average"}),
        json.dumps({"format": header.FORMAT}),
        json.dumps({"format": header.FORMAT, "settings": {}, "pools": [], "optim": {"a": 1}}),
    ],
)
def test_headers_of_another_shape_are_refused(header: str, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "other", metadata={"saddle": header})
    refuses(tmp_path / "other", "checkpoint|format")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"x_dim": 2}, r"'ebm0/base_x.loc' has shape \(2,\), in the file \(3,\)"),
        (
            {"pool": lambda: TemperedPool(3, 41)},
            r"'ebm0/pool.u' has shape \(3, 41, 5\), in the file \(3, 40, 5\)",
        ),
        ({"pool": lambda: PersistentPool(120)}, "'ebm0/pool.betas' is only in the file"),
        ({"guide": "AutoNormal"}, "'guide/particles_scene_z' is only in the file"),
        ({"guide": "per datum"}, "'guide/locs.scene_z_unconstrained' is not in the file"),
    ],
)
def test_a_model_of_another_shape_is_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved(tmp_path / "run")
    refuses(tmp_path / "run", f"does not fit this model and guide.*{message}", **settings)


def test_other_data_and_other_numbers_of_particles_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "run")
    for n, count in ((19, 3), (20, 4)):
        pyro.clear_param_store()
        model, _, optim, ebm, _ = make()
        guide = AutoParticles(model, count)
        before = snapshot(ebm)
        message = rf"particles_scene_z' has shape \({count}, {n}, 2\), in the file \(3, 20, 2\)"
        with pytest.raises(ValueError, match=message):
            Saddle.load(tmp_path / "run", model, guide, optim, data_of(ebm, n))
        assert same(before, snapshot(ebm))


def test_two_lvebms_do_not_fit_a_file_of_one(tmp_path: Path) -> None:
    saved(tmp_path / "run")
    pyro.clear_param_store()
    a, b = quadratic_ebm(pool=TemperedPool(3, 40, num_moves=2)), quadratic_ebm(seed=4)

    def model(x: Tensor) -> None:
        with pyro.plate("data", 20, subsample_size=8) as i:
            lvebm("scene", a, obs=x[i])
            lvebm("other", b, obs=x[i])

    guide = AutoParticles(poutine.block(model, hide=["other_z"]), 3)
    before = snapshot(a)
    with pytest.raises(ValueError, match=r"the model has 2 LVEBMs, the file 1; .*and 22 more"):
        Saddle.load(tmp_path / "run", model, guide, Adam({"lr": 0.02}), data_of(a, 20))
    assert same(before, snapshot(a))


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "run", dtype=torch.float64)
    refuses(tmp_path / "run", "float64", dtype=torch.float32)


# --- nested optimiser state -----------------------------------------------------------------


def test_nested_state_is_taken_apart_and_put_together() -> None:
    state = {
        "a": {0: {"step": torch.tensor(3.0), "sums": [normal((2,), 1), 1.5, None]}},
        "b": {"groups": [{"betas": (0.9, 0.99), "flag": True}], 7: "text"},
    }
    tensors: dict[str, Tensor] = {}
    flat = json.loads(json.dumps(checkpoint._pull_tensors(state, "optim", tensors)))
    assert len(tensors) == 2 and all(k.startswith("optim/") for k in tensors)
    back = checkpoint._push_tensors(flat, tensors)
    assert back["a"][0]["step"] == 3.0 and torch.equal(back["a"][0]["sums"][0], normal((2,), 1))
    assert back["a"][0]["sums"][1:] == [1.5, None]
    assert back["b"] == {"groups": [{"betas": [0.9, 0.99], "flag": True}], 7: "text"}


def test_a_scheduler_goes_on_where_it_was(tmp_path: Path) -> None:
    """Pyro's schedulers hold an optimiser and a schedule; both are saved."""

    def parts() -> tuple[Any, ...]:
        model, guide, _, _, x = make()
        optim = ExponentialLR(
            {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.5}
        )
        return model, guide, optim, x

    model, guide, optim, x = parts()
    saddle = Saddle(model, guide, optim, num_moves=2)
    for _ in range(3):
        saddle.step(x)
        optim.step()
    saddle.save(tmp_path / "run")
    losses = [saddle.step(x) for _ in range(3)]
    pyro.clear_param_store()
    model, guide, optim, x = parts()
    again = Saddle.load(tmp_path / "run", model, guide, optim, x)
    assert [again.step(x) for _ in range(3)] == losses
    rates = {o.optimizer.param_groups[0]["lr"] for o in optim.optim_objs.values()}
    assert rates == {0.05 * 0.5**3}


def test_a_file_written_before_streams_had_names_loads_and_trains_on() -> None:
    """The file was written after five steps by the version before the first of these names."""
    x = torch.randn(24, 2, generator=torch.Generator().manual_seed(0))
    energy = MLPEnergy(2, 1, hidden=(8,), fourier_features=4)
    ebm = LVEBM.from_data(energy, x, z_dim=1, pool=TemperedPool(3, 16, num_moves=2))
    model = plate_model(ebm, 8)
    path = Path(__file__).parents[1] / "data" / "saddle_2.safetensors"
    guide, optim = AutoParticles(model, 2), ClippedAdam({"lr": 1e-2})
    saddle = Saddle.load(path, model, guide, optim, x)
    assert saddle.step_count == 5 and saddle.seed == 3
    assert float(ebm.log_partition) == pytest.approx(0.039455048739910126)
    assert saddle.history.loss.tolist() == pytest.approx(
        [
            88.30881118774414,
            98.21728686988354,
            110.59739853441715,
            96.69156974554062,
            98.63145673274994,
        ]
    )
    assert int(ebm.pool.refreshes) > 5
    assert math.isfinite(saddle.step(x))
