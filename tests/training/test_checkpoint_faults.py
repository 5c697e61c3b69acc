# SPDX-License-Identifier: Apache-2.0
"""Files that are damaged, or of another run: a ValueError, and nothing is changed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro.optim import SGD, AdagradRMSProp, Adam, ClippedAdam, ExponentialLR, PyroOptim, StepLR
from safetensors import safe_open
from safetensors.torch import save_file
from small_models import data_of, plate_model, quadratic_ebm, same, snapshot
from torch import Tensor

from pyro_lvebm import LVEBM, AutoParticles, MLPEnergy, PersistentPool, Saddle
from pyro_lvebm.training import checkpoint

pytestmark = pytest.mark.usefixtures("brief_settling")


def scheduled(schedule: Callable[[dict[str, Any]], PyroOptim], **settings: Any) -> PyroOptim:
    return schedule(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.02, "betas": (0.8, 0.9)}, **settings}
    )


OPTIMISERS: dict[str, Callable[[], PyroOptim]] = {
    "Adam": lambda: Adam({"lr": 0.02, "amsgrad": True}),
    "by name": lambda: Adam(lambda name: {"lr": 0.03 if "linear" in name else 0.02}),
    "ClippedAdam": lambda: ClippedAdam({"lr": 0.02, "lrd": 0.9, "clip_norm": math.inf}),
    "SGD": lambda: SGD({"lr": 1e-3, "momentum": 0.9}),
    "AdagradRMSProp": lambda: AdagradRMSProp({"eta": 0.1}),
    "ExponentialLR": lambda: scheduled(ExponentialLR, gamma=0.5),
    "StepLR": lambda: scheduled(StepLR, step_size=1),
}


def make(optim: str = "Adam") -> tuple[Saddle, LVEBM, Any, Tensor]:
    pyro.clear_param_store()
    ebm = quadratic_ebm(2, 1, pool=PersistentPool(8, num_moves=1))
    model = plate_model(ebm, 4)
    guide = AutoParticles(model, 1)
    saddle = Saddle(model, guide, OPTIMISERS[optim](), num_moves=1, seed=7)
    return saddle, ebm, guide, data_of(ebm, 6)


def write(path: Path, optim: str = "Adam") -> Saddle:
    saddle, _, _, x = make(optim)
    for _ in range(2):
        saddle.step(x)
    saddle.save(path)
    return saddle


class Fresh:
    """New parts that know their data, what is in them, and whether that has changed."""

    def __init__(self, optim: str = "Adam") -> None:
        self.saddle, self.ebm, self.guide, self.x = make(optim)
        torch.manual_seed(0)
        self.guide(self.x)
        self.before = self.state()

    def state(self) -> tuple[dict[str, Tensor], ...]:
        store = {name: value.detach() for name, value in pyro.get_param_store().items()}
        return snapshot(self.ebm), snapshot(self.guide), store

    def load(self, path: Path) -> Saddle:
        parts = self.saddle.model, self.guide, self.saddle.optim
        return Saddle.load(path, *parts, self.x)

    def is_unchanged(self) -> bool:
        optim = self.saddle.optim
        return not optim.optim_objs and all(map(same, self.before, self.state()))

    def refuses(self, path: Path, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            self.load(path)
        assert self.is_unchanged()
        assert math.isfinite(self.saddle.step(self.x))


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["saddle"])
        return header, {key: file.get_tensor(key) for key in file.keys()}


def rewrite(path: Path, header: dict[str, Any], tensors: dict[str, Tensor], sign: bool) -> None:
    """As someone who knows the format, or as a version from before files had a digest."""
    header.pop("sha256", None)
    if sign:
        header["sha256"] = checkpoint._digest(header, tensors)
    save_file(tensors, path, metadata={"saddle": json.dumps(header)})


# --- another run ----------------------------------------------------------------------------


@pytest.mark.parametrize("optim", OPTIMISERS)
def test_every_optimiser_is_taken_and_goes_on(optim: str, tmp_path: Path) -> None:
    saddle = write(tmp_path / "run", optim)
    fresh = Fresh(optim)
    loss = fresh.load(tmp_path / "run").step(fresh.x)
    pyro.clear_param_store()
    assert loss == saddle.step(fresh.x)
    assert same(snapshot(saddle.ebms[0]), snapshot(fresh.ebm))


@pytest.mark.parametrize(
    ("written", "given", "message"),
    [
        ("Adam", "SGD", "the optimiser is SGD, in the file Adam"),
        ("SGD", "Adam", "the optimiser is Adam, in the file SGD"),
        ("Adam", "ExponentialLR", "Adam under ExponentialLR, in the file Adam"),
        ("ExponentialLR", "Adam", "is Adam, in the file Adam under ExponentialLR"),
        ("ExponentialLR", "StepLR", "under StepLR, in the file Adam under ExponentialLR"),
        ("AdagradRMSProp", "Adam", "is Adam, in the file AdagradRMSProp"),
    ],
)
@pytest.mark.parametrize("says", [True, False])
def test_another_optimiser_is_refused(
    written: str, given: str, message: str, says: bool, tmp_path: Path
) -> None:
    """By its class, and by what it holds where the file is from before it said its class."""
    write(tmp_path / "run", written)
    if not says:
        header, tensors = contents(tmp_path / "run")
        del header["optimiser"]
        rewrite(tmp_path / "run", header, tensors, sign=False)
    Fresh(given).refuses(tmp_path / "run", message if says else "the optimiser's state of")


def mlp(base: Any) -> tuple[LVEBM, Any, Any]:
    pyro.clear_param_store()
    rows = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    ebm = LVEBM.from_data(
        MLPEnergy(2, 1, hidden=(4,)), rows, z_dim=1, base=base, pool=PersistentPool(8, num_moves=1)
    )
    model = plate_model(ebm, 4)
    return ebm, model, AutoParticles(model, 1)


@pytest.mark.parametrize(("written", "given"), [("gaussian", "mixture"), ("mixture", "gaussian")])
def test_another_base_is_named(written: str, given: str, tmp_path: Path) -> None:
    ebm, model, guide = mlp(written)
    x = data_of(ebm, 6)
    saddle = Saddle(model, guide, Adam({"lr": 0.01}), num_moves=1)
    saddle.step(x)
    saddle.save(tmp_path / "run")
    ebm, model, guide = mlp(given)
    before = snapshot(ebm)
    match = rf"written with a {written} base of x; build with LVEBM.from_data\(base='{written}'\)"
    with pytest.raises(ValueError, match=f"(?i){match}"):
        Saddle.load(tmp_path / "run", model, guide, Adam({"lr": 0.01}), x)
    assert same(before, snapshot(ebm)) and not list(pyro.get_param_store().keys())


# --- damage ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "sign"), [(math.nan, True), (math.inf, False)])
@pytest.mark.parametrize(
    "key",
    [
        "ebm0/f.linear",
        "ebm0/base_x.loc",
        "ebm0/pool.u",
        "guide/particles_scene_z",
        "average/ebm0/f.linear",
        "exp_avg_sq",
    ],
)
def test_tensors_that_are_not_finite_are_refused(
    key: str, sign: bool, value: float, tmp_path: Path
) -> None:
    write(tmp_path / "run")
    header, tensors = contents(tmp_path / "run")
    (name,) = [n for n in tensors if n == key or n.endswith(f"linear/state/0/{key}")]
    tensors[name].view(-1)[0] = value
    rewrite(tmp_path / "run", header, tensors, sign)
    Fresh().refuses(tmp_path / "run", "NaN or infinite")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["settings"].update(num_moves=0), "num_moves is 0; expected an integer"),
        (lambda h: h["settings"].update(step_count=math.inf), "step_count is inf"),
        (lambda h: h["settings"].update(max_kl=math.nan), "max_kl is nan"),
        (lambda h: h["settings"].pop("seed"), "'seed' is missing"),
        (lambda h: h["pools"].pop(), "the model has 1 LVEBMs, the file 0"),
        (lambda h: h["pools"][0].update(fresh="yes"), "whether a pool is fresh is 'yes'"),
        (lambda h: h["history"].reverse(), "the history has columns"),
        (lambda h: h.update(average=True), "the count of the average is True"),
        (lambda h: group_of(h).__setitem__("lr", -1.0), "Invalid learning rate"),
        (lambda h: group_of(h).__setitem__("lr", math.inf), "the learning rate is inf"),
        (lambda h: group_of(h).__setitem__("betas", [0.9]), "'betas' is .*expected 2 values"),
        (lambda h: group_of(h).__setitem__("eps", "small"), "'eps' is 'small'"),
        (lambda h: group_of(h).__setitem__("new", 1), "'new'.* is only in the file"),
        (lambda h: h.update(optim={"__items__": [["ebm0/pool.u", {"__items__": []}]]}), "fit"),
    ],
)
def test_what_the_header_says_is_looked_at(
    change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "run")
    header, tensors = contents(tmp_path / "run")
    change(header)
    rewrite(tmp_path / "run", header, tensors, sign=True)
    Fresh().refuses(tmp_path / "run", message)


class Items(dict):  # type: ignore[type-arg]
    """A dictionary whose changes go to the pairs of names and values in a header."""

    def __init__(self, pairs: list[list[Any]]) -> None:
        super().__init__({name: value for name, value in pairs if isinstance(name, str)})
        self.pairs = pairs

    def __setitem__(self, name: str, value: Any) -> None:
        for pair in self.pairs:
            if pair[0] == name:
                pair[1] = value
                return
        self.pairs.append([name, value])


def group_of(header: dict[str, Any]) -> Items:
    """Settings of the first parameter's optimiser."""
    state = Items(header["optim"]["__items__"][0][1]["__items__"])
    return Items(state["param_groups"][0]["__items__"])


def test_a_header_that_is_nested_too_deep_is_refused(tmp_path: Path) -> None:
    _, tensors = contents(write_to(tmp_path / "run"))
    deep = "[" * 100_000 + "]" * 100_000
    save_file(tensors, tmp_path / "run", metadata={"saddle": deep})
    Fresh().refuses(tmp_path / "run", "is not a readable checkpoint")


def write_to(path: Path) -> Path:
    write(path)
    return path


def test_a_flipped_bit_of_a_finite_number_is_found(tmp_path: Path) -> None:
    write(tmp_path / "run")
    content = bytearray((tmp_path / "run").read_bytes())
    content[-3] ^= 1
    (tmp_path / "run").write_bytes(content)
    Fresh().refuses(tmp_path / "run", "it is damaged, its SHA-256")


# --- many mutants ---------------------------------------------------------------------------

ODD: list[Any] = [None, True, -1, 0, 3, 2**70, 1.5, math.nan, math.inf, "", "x", [], {}, [[]]]


def damage_bytes(content: bytes, draw: np.random.Generator) -> bytes:
    """Flip, drop, double, blank or cut some bytes; half of the time near the header."""
    end = len(content) if draw.random() < 0.5 else min(len(content), 3000)
    a = int(draw.integers(end))
    b = min(len(content), a + int(draw.integers(1, 40)))
    match int(draw.integers(5)):
        case 0:
            return content[:a] + bytes([content[a] ^ 1 << int(draw.integers(8))]) + content[a + 1 :]
        case 1:
            return content[:a] + content[b:]
        case 2:
            return content[:b] + content[a:]
        case 3:
            return content[:a] + draw.bytes(b - a) + content[b:]
    return content[:a]


def damage_header(value: Any, draw: np.random.Generator) -> Any:
    """Replace, drop, double or rename something, somewhere in JSON."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.1:
        return ODD[int(draw.integers(len(ODD)))]
    value = value.copy()
    key = list(value)[int(draw.integers(len(value)))] if isinstance(value, dict) else None
    at: Any = int(draw.integers(len(value))) if key is None else key
    match int(draw.integers(10)):
        case 0:
            del value[at]
        case 1 if key is not None:
            value[key[:-1] + "~"] = value.pop(key)
        case 1:
            value.insert(at, value[at])
        case _:
            value[at] = damage_header(value[at], draw)
    return value


def damage_tensors(tensors: dict[str, Tensor], draw: np.random.Generator) -> dict[str, Tensor]:
    """Spoil, drop, rename, cast or reshape one tensor."""
    tensors = dict(tensors)
    key = sorted(tensors)[int(draw.integers(len(tensors)))]
    value = tensors.pop(key)
    match int(draw.integers(5)):
        case 0:
            pass
        case 1:
            tensors[key + "~"] = value
        case 2:
            tensors[key] = value.to([torch.float16, torch.int64, torch.bool][draw.integers(3)])
        case 3:
            tensors[key] = torch.cat([value.reshape(-1), value.reshape(-1)[:1]])
        case _:
            tensors[key] = value.clone()
            if value.is_floating_point() and value.numel():
                tensors[key].view(-1)[0] = (math.nan, math.inf)[int(draw.integers(2))]
    return tensors


def survives(fresh: Fresh, path: Path, content: bytes, seed: int) -> bool:
    """Load one mutant; whether it was taken, after which training goes on."""
    draw = np.random.default_rng(seed)
    path.write_bytes(content)
    kind = int(draw.integers(3))
    if kind == 0:
        mutant = damage_bytes(content, draw)
        path.write_bytes(mutant)
    else:
        header, tensors = contents(path)
        if kind == 1:
            header.pop("sha256")
            header = damage_header(header, draw)
        else:
            tensors = damage_tensors(tensors, draw)
        sign = bool(draw.random() < 0.5) and isinstance(header, dict)
        if sign:
            rewrite(path, header, tensors, sign)
        else:
            save_file(tensors, path, metadata={"saddle": json.dumps(header)})
    try:
        saddle = fresh.load(path)
    except ValueError:
        assert fresh.is_unchanged(), f"mutant {seed} was refused after it had changed something"
        return False
    assert kind != 0 or mutant == content, f"mutant {seed} has other bytes and was taken"
    state = [*snapshot(fresh.ebm).items(), *snapshot(fresh.guide).items()]
    bad = [name for name, value in state if not value.isfinite().all()]
    assert not bad or bad == ["pool.acceptance"], f"mutant {seed} has {bad} that are not finite"
    if saddle.num_moves < 10 and not bad:
        assert math.isfinite(saddle.step(fresh.x)), f"mutant {seed}"
    return True


def write_in_a_fit(path: Path) -> None:
    """A file of a fit that was interrupted, with what was best so far."""

    def schedule(progress: float) -> float:
        if progress > 0.5:
            raise KeyboardInterrupt
        return 1.0

    saddle, _, _, x = make("ExponentialLR")
    options: dict[str, Any] = {"held_out": (x[:4],), "patience": 3, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        saddle.fit(x, num_steps=3, schedule=schedule, checkpoint=path, **options)


def survivors(tmp_path: Path, seeds: range) -> int:
    write_in_a_fit(tmp_path / "run")
    content = (tmp_path / "run").read_bytes()
    fresh, taken = Fresh("ExponentialLR"), 0
    for seed in seeds:
        if survives(fresh, tmp_path / "mutant", content, seed):
            fresh, taken = Fresh("ExponentialLR"), taken + 1
    return taken


def test_two_hundred_mutants_are_refused_or_train_on(tmp_path: Path) -> None:
    """Some are taken: another seed, or an old file with another number in its history."""
    assert 0 < survivors(tmp_path, range(200)) < 60


@pytest.mark.slow
def test_five_thousand_mutants_are_refused_or_train_on(tmp_path: Path) -> None:
    """Slow: the rare ways in which a file may be damaged need thousands of tries."""
    assert 0 < survivors(tmp_path, range(1000, 6000)) < 1500
