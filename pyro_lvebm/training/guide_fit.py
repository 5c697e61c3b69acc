# SPDX-License-Identifier: Apache-2.0
"""Training a guide of a fitted model, all of which is held fixed, until its ELBO rests."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam, PyroOptim  # type: ignore[attr-defined]
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from tqdm.auto import tqdm

from pyro_lvebm.guides import AutoParticles, find_particles, keep_apart, root_of
from pyro_lvebm.latents import Program
from pyro_lvebm.rng import Stream, derive_seed, isolated_rng
from pyro_lvebm.sites import GivenRows, Model, all_nodes, frozen, sample_nodes, will_be_enumerated
from pyro_lvebm.training.averaging import ParameterAverage, assign
from pyro_lvebm.training.loss import Loss, total
from pyro_lvebm.training.progress import look_of_a_bar
from pyro_lvebm.validation import check_at_least, warn_of_training

_NUM_DRAWS = 4
"""Draws of a vectorised guide for each gradient."""

_WINDOW = 100
"""Steps between two looks at the ELBO, at least; as many as two passes through the data take."""

_DECAY = 0.2

_NUM_DECAYS = 2
"""The learning rate ends at `_DECAY` to this power of what it was."""

_BEFORE_DECAY = 5.0
"""Gain of a window, in units of the tolerance, at which the learning rate falls."""

_EVALUATIONS = 16
"""Paired evaluations of the ELBO at each look, at most."""

_LEAST_EVALUATIONS = 4

_CLEAR = 4.0
"""Standard errors from what decides at which a look ends early."""

_EVALUATION_DRAWS = 16
"""Draws in an evaluation for each in a gradient, where they are vectorised."""


@dataclass(frozen=True)
class GuideFit:
    """How the training of a guide by `Saddle.fit_guide` ended; energies in nats per datum.

    The ELBO has log Z of the pools, and is an energy where the guide holds `AutoParticles`.
    """

    converged: bool  # whether the ELBO rests
    num_steps: int
    elbo: float
    std_error: float  # Monte Carlo error of the ELBO
    gain: float  # of the ELBO in the last window of steps
    gain_se: float
    losses: list[float] = field(repr=False)  # of every step, in nats, scaled to all data


class Trainer(Protocol):
    """What is used of the `Saddle` that trains the guide."""

    average: ParameterAverage
    particles: AutoParticles | None
    elbo: Any

    def scaled_step(
        self, factor: float, min_kl: float | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Loss:
        """Take a step whose update is multiplied by a factor."""

    def parameters(self) -> list[Tensor]:
        """Return all parameters of model and guide."""

    def device(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
        """Return where particles and chains are."""


class HeldModel(Messenger):
    """Runs a model whose parameters, all that it has, take no gradient and are seen by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self._held: list[Tensor] = []

    def _pyro_param(self, msg: Any) -> None:
        msg["stop"] = True

    def _pyro_post_param(self, msg: Any) -> None:
        value = msg["value"]
        if not hasattr(value, "unconstrained"):
            return
        param: Tensor = value.unconstrained()
        if param.requires_grad:
            self._held.append(param.requires_grad_(False))
            msg["value"] = value.detach()
            msg["value"].unconstrained = value.unconstrained

    def release(self) -> None:
        """Let the parameters take gradients again."""
        for param in self._held:
            param.requires_grad_(True)
        self._held.clear()


def fit_guide(
    make_trainer: Callable[..., Trainer],
    model: Model,
    guide: Model,
    optim: PyroOptim | None,
    loss: ELBO | None,
    batches: Callable[[], Iterator[tuple[Any, ...]]],
    kwargs: dict[str, Any],
    max_steps: int,
    tolerance: float,
    seed: int,
    progress: bool,
    description: str,
) -> GuideFit:
    """Train a guide; see `Saddle.fit_guide`.

    Args:
        make_trainer: The class `Saddle`.
        model: The model.
        guide: The guide.
        optim: A Pyro optimiser, or None.
        loss: A Pyro ELBO, or None.
        batches: Returns arguments of the model for each step in turn, from the start.
        kwargs: Keyword arguments of model and guide.
        max_steps: Largest number of steps.
        tolerance: Gain of a window, in nats per datum, at which the ELBO rests.
        seed: Fixes every random number.
        progress: Show a progress bar.
        description: Name on it.
    """
    check_at_least(1, max_steps=max_steps)
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive; got {tolerance}")
    seed = derive_seed(seed, Stream.GUIDE_FIT)
    stream = batches()
    first = next(stream)
    with _held(model, first, kwargs, seed) as (held, program):
        keep_apart(guide)
        loss = default_loss(program, guide, seed) if loss is None else loss
        optim = Adam(_default_rates) if optim is None else optim
        trainer = make_trainer(held, guide, optim, loss, seed=seed)
        looks = _Looks(trainer, held, guide, batches, kwargs, seed, _num_data(program), tolerance)
        options = look_of_a_bar() | {"desc": description, "unit": "step"}
        with tqdm(total=max_steps, disable=not progress, **options) as bar:
            losses, gain = _train(trainer, first, stream, kwargs, looks, max_steps, tolerance, bar)
        assign(trainer.average.values)
        elbo, error = looks.elbo()
        with program.quiet(seed, Stream.PREPARATION):
            theta = model_parameters(Program(model, first, kwargs))
        own = [p for p in trainer.parameters() if not any(p is other for other in theta)]
        _RECORDS[root_of(guide)] = _Record(gain.rests, _values(theta), _values(own))
    if not gain.rests:
        last = (
            f"the last {gain.steps} changed it by {gain.mean:.2g} ± {gain.error:.2g} nats per "
            f"datum, at {gain.factor:.2g} of the learning rate"
            if math.isfinite(gain.mean)
            else "there were too few to compare it at two times"
        )
        warn_of_training(
            f"the ELBO of '{description}' does not rest after {len(losses)} steps: {last}. What "
            "the table says it loses is in part what training has left undone. Raise max_steps, or "
            "the learning rate"
        )
    return GuideFit(gain.rests, len(losses), elbo, error, gain.mean, gain.error, losses)


@contextmanager
def _held(
    model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int
) -> Iterator[tuple[Model, Program]]:
    """Hold all parameters of a model fixed inside the block."""
    keep_apart(model)
    messenger = HeldModel()
    program = Program(messenger(model), args, kwargs)
    try:
        with program.quiet(seed, Stream.PREPARATION):
            ebms = program.ebms
        with frozen(ebms):
            yield program.model, program
    finally:
        messenger.release()


class _Gain(NamedTuple):
    """What a window of steps has changed in the ELBO, in nats per datum."""

    mean: float
    error: float
    steps: int
    factor: float  # on the learning rate in the window
    rests: bool


def _train(
    trainer: Trainer,
    args: tuple[Any, ...],
    stream: Iterator[tuple[Any, ...]],
    kwargs: dict[str, Any],
    looks: _Looks,
    max_steps: int,
    tolerance: float,
    bar: Any,
) -> tuple[list[float], _Gain]:
    """Take windows of steps, ever longer while they gain, at ever smaller rates where they rest."""
    losses: list[float] = []
    factor, decays, window = 1.0, 0, looks.window
    while True:
        steps = min(window, max_steps - len(losses))
        trainer.average.decay = 1.0 - 3.0 / window
        for _ in range(steps):
            losses.append(total(trainer.scaled_step(factor, 0.0, args, kwargs)))
            args = next(stream)
        bar.update(steps)
        mean, error = looks.gain(losses[-steps:])
        if decays < _NUM_DECAYS:  # parameters still move around, which a smaller rate mends
            calm = mean < _BEFORE_DECAY * tolerance
        else:  # the losses of particles are known less well, and may only agree
            sign = 1.0 if trainer.particles is None else -1.0
            calm = mean + sign * 2.0 * error < tolerance
        calm = calm and steps == window
        rests = calm and decays == _NUM_DECAYS
        bar.set_postfix({"gain": f"{mean:.2g}", "rate": f"{factor:.2g}"}, refresh=False)
        if rests or len(losses) == max_steps:
            return losses, _Gain(mean, error, steps, factor, rests)
        if calm:
            factor, decays = factor * _DECAY, decays + 1
        elif math.isfinite(mean):  # the first look has nothing to compare with
            window += window // 2


class _Looks:
    """Looks at the ELBO of averaged parameters, with numbers of their own at each look."""

    def __init__(
        self,
        trainer: Trainer,
        model: Model,
        guide: Model,
        batches: Callable[[], Iterator[tuple[Any, ...]]],
        kwargs: dict[str, Any],
        seed: int,
        num_data: tuple[int, int],
        tolerance: float,
    ) -> None:
        self._tolerance = tolerance
        self._trainer, self._batches, self._kwargs = trainer, batches, kwargs
        self._model, self._guide = GivenRows()(model), GivenRows()(guide)
        self._elbo: Any
        self._seed, self._count, self._elbo = seed, 0, copy.copy(trainer.elbo)
        if trainer.particles is None and self._elbo.vectorize_particles:
            self._elbo.num_particles *= _EVALUATION_DRAWS
        self._size, passes = num_data
        self.window = max(_WINDOW, 2 * passes)
        self._before: dict[Tensor, Tensor] | None = None  # averages at the last look
        self._losses: list[float] = []

    def gain(self, losses: list[float]) -> tuple[float, float]:
        """Return what the ELBO has gained since the last look, and its standard error.

        The two ELBOs are of the same data and noise. Particles move by themselves, so that with
        any the losses of two windows are compared instead.
        """
        if self._trainer.particles is not None:
            now, then = ([v / self._size for v in part] for part in (losses, self._losses))
            self._losses = losses
            if len(then) < 2 or len(now) < 2:
                return math.inf, math.inf
            (a, a_se), (b, b_se) = _mean(then), _mean(now)
            return a - b, math.hypot(a_se, b_se)
        before, after = self._before, self._trainer.average.copy()
        self._before = after
        if before is None:
            return math.inf, math.inf
        self._count += 1
        gains: list[float] = []
        for number, args in enumerate(self._data()):
            old, new = (self._evaluate(at, number, args) for at in (before, after))
            gains.append(old - new)
            if len(gains) >= _LEAST_EVALUATIONS:
                mean, error = _mean(gains)
                still = mean - _CLEAR * error > _BEFORE_DECAY * self._tolerance
                if still or mean + _CLEAR * error < self._tolerance:
                    break
        return _mean(gains)

    def elbo(self) -> tuple[float, float]:
        """Return the ELBO of the averages and its standard error."""
        self._count += 1
        at = self._trainer.average.copy()
        mean, error = _mean([self._evaluate(at, n, args) for n, args in enumerate(self._data())])
        return -mean, error

    def _data(self) -> list[tuple[Any, ...]]:
        with isolated_rng(self._seed, Stream.GUIDE_FIT, self._count):
            return list(itertools.islice(self._batches(), _EVALUATIONS))

    def _evaluate(self, at: dict[Tensor, Tensor], number: int, args: tuple[Any, ...]) -> float:
        """Evaluate the loss, in nats per datum, with parameters at given values."""
        now = _values(list(at))
        assign(at)
        try:
            device = self._trainer.device(args, self._kwargs)
            key = (Stream.GUIDE_FIT, self._count, number)
            with isolated_rng(self._seed, *key, device=device), torch.no_grad():
                loss = self._elbo.loss(self._model, self._guide, *args, **self._kwargs)
        finally:
            assign(now)
        return float(loss) / self._size


def _mean(values: Sequence[float]) -> tuple[float, float]:
    x = torch.tensor(values, dtype=torch.float64)
    return float(x.mean()), float(x.std()) / math.sqrt(len(x))


def _num_data(program: Program) -> tuple[int, int]:
    """Return the number of data of the latents, and of minibatches that hold them all."""
    sizes, parts = [1], [1]
    for node in program.latents.values():
        frames = node["cond_indep_stack"]
        sizes.append(math.prod(f.full_size or f.size for f in frames))
        parts.append(math.prod(-(-(f.full_size or f.size) // f.size) for f in frames))
    return max(sizes), max(parts)


def _default_rates(name: str) -> dict[str, float]:
    """Return a smaller learning rate for networks, whose names have a divider in Pyro's store."""
    return {"lr": 3e-3 if "$$$" in name else 3e-2}


def default_loss(program: Program, guide: Model, seed: int) -> ELBO | None:
    """Return the loss for a guide that has none; see `Saddle.fit_guide` for the rule.

    Returns:
        A Pyro ELBO; None for guides with particles, whose number `Saddle` knows.
    """
    if find_particles(guide) is not None:
        return None
    with program.quiet(seed, Stream.PREPARATION):
        trace = program.trace(GivenRows()(guide))
    guide_sites = sample_nodes(trace)
    nodes = [*program.sites.values(), *guide_sites.values()]
    sequential = any(not f.vectorized for node in nodes for f in node["cond_indep_stack"])
    options: dict[str, Any] = {} if sequential else {"num_particles": _NUM_DRAWS}
    options["vectorize_particles"] = not sequential
    frames = [f for node in nodes for f in node["cond_indep_stack"] if f.vectorized]
    depths = [len(node["fn"].batch_shape) for node in nodes] + [-f.dim for f in frames]
    nesting = max([0, *depths])
    if any(will_be_enumerated(node) for node in nodes):
        return TraceEnum_ELBO(max_plate_nesting=nesting, **options)
    ordered = [n for n in guide_sites if n in program.sites]
    mean_field = ordered == [n for n in program.sites if n in guide_sites]
    if mean_field and all(node["fn"].has_rsample for node in guide_sites.values()):
        return TraceMeanField_ELBO(max_plate_nesting=nesting, **options)
    return Trace_ELBO(max_plate_nesting=nesting, **options)


class _Record(NamedTuple):
    """At which values a guide was fitted."""

    rests: bool
    theta: dict[Tensor, Tensor]  # by parameter of the model
    guide: dict[Tensor, Tensor]  # by parameter of the guide


_RECORDS: Any = WeakIdKeyDictionary()
"""The last fit of each guide by `fit_guide`, by the guide."""


class GuideState(NamedTuple):
    """What is known of a guide's training."""

    converged: bool | None  # None where it was not trained by `fit_guide`, or has changed since
    other_theta: bool  # whether it was trained at other parameters of the model than the present


def guide_state(guide: Model, program: Program) -> GuideState:
    """Return whether a guide has converged for a model as it is now."""
    record = _RECORDS.get(root_of(guide))
    if record is None or not _unchanged(record.guide):
        return GuideState(None, False)
    known = {id(p) for p in record.theta}
    same = _unchanged(record.theta) and all(id(p) in known for p in model_parameters(program))
    return GuideState(record.rests and same, not same)


def model_parameters(program: Program) -> list[Tensor]:
    """Return all parameters of a model that Pyro or an LVEBM knows, unconstrained."""
    nodes = all_nodes(program.prototype).values()
    found = [node["value"].unconstrained() for node in nodes if node["type"] == "param"]
    found += [p for ebm in program.ebms for p in ebm.theta()]
    return list({id(p): p for p in found if p is not None}.values())


def _values(params: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    return {p: p.detach().clone() for p in params}


def _unchanged(values: dict[Tensor, Tensor]) -> bool:
    return all(torch.equal(p, value) for p, value in values.items())
