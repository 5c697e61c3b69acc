# SPDX-License-Identifier: Apache-2.0
"""Saddle: stochastic variational inference whose latents are Langevin particles."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pyro.infer import ELBO, SVI, Trace_ELBO
from pyro.optim import PyroOptim
from torch import Tensor, nn

from pyro_lvebm.energies import check_at_rest
from pyro_lvebm.evidence import missed_log_z, model_log_evidence
from pyro_lvebm.guides import find_particles, keep_apart, needs_rows
from pyro_lvebm.latents import (
    ChainSettings,
    Moves,
    PosteriorDraws,
    Program,
    Sweep,
    draw_posterior,
    move_minibatch,
)
from pyro_lvebm.model import LVEBM, warn_of_falling
from pyro_lvebm.rng import Stream, derive_seed, device_of, generator_for, isolated_rng
from pyro_lvebm.sampling import MALA, Kernel, RoughEnergyError
from pyro_lvebm.sites import GivenRows, Node, SamePlates, announce_theta, at_minibatch, frozen
from pyro_lvebm.training.anatomy import Anatomy, check_precision, inspect
from pyro_lvebm.training.averaging import ParameterAverage, assign
from pyro_lvebm.training.carried import LONG_FIT, end_line, record_carried
from pyro_lvebm.training.checkpoint import (
    Parts,
    read_checkpoint,
    store_unchanged_on_error,
    write_checkpoint,
)
from pyro_lvebm.training.course import BestSoFar, Course, course_of
from pyro_lvebm.training.fit import (
    Schedule,
    check_batches,
    check_columns_seen,
    check_fit,
    endless,
    factor_of,
    half_cosine,
    noted,
)
from pyro_lvebm.training.guide_fit import GuideFit, fit_guide
from pyro_lvebm.training.header import SETTINGS
from pyro_lvebm.training.history import History
from pyro_lvebm.training.loss import Loss, add, as_numbers, check_loss, total
from pyro_lvebm.training.optimiser import check_needs_no_closure
from pyro_lvebm.training.penalties import Penalty, add_penalties
from pyro_lvebm.training.progress import step_bar
from pyro_lvebm.training.step import (
    ascend,
    check_not_replayed,
    pool_snapshot,
    records_snapshot,
    unchanged_on_error,
)
from pyro_lvebm.training.trust_region import TrustRegion
from pyro_lvebm.validation import check_at_least

if TYPE_CHECKING:
    import pandas as pd

LOG_Z_ERROR = 0.01
"""Nats, stated by a pool: noise of log Z is common to all data, and hides which step was best."""


class Saddle(SVI):
    """Maximum likelihood of a Pyro model with LVEBM sites, as a saddle over distributions.

        L(θ, q, r) = E_{data, q(z|x)}[−E_θ] + H(q) + E_r[E_θ] − H(r),    max over θ, q; min over r

    One `step` moves the latent particles of a minibatch by Langevin on p_θ(z | x) (the positive
    phase), lets each LVEBM refresh its pool of negatives on p_θ(x, z) (the negative phase), and
    takes one optimiser step on θ, halved until KL(p_old ‖ p_new) ≤ `max_kl` as the pools see it.
    With any other guide in place of `AutoParticles` it is SVI for the same model. Without an LVEBM
    there is no r, and it is particle gradient descent on −log p_θ(x). Penalties on the energies
    are added to the loss (`MLPEnergy` brings one along); `evaluate_loss` has none. An exponential
    average of all parameters is kept beside them, for evaluation (`averaged`).

    The global random generator is left as it was; everything drawn in a step, by Pyro too, is
    fixed by `seed` and the number of steps so far.

    Args:
        model: A Pyro model.
        guide: `AutoParticles(model)`, or any Pyro guide, or an `AutoGuideList` with both.
        optim: A Pyro optimiser.
        loss: A Pyro ELBO, or a function of model, guide and arguments as in `SVI`; by default
            `Trace_ELBO`, vectorised over the particles if there are several. With particles its
            value is an energy, not an ELBO: a delta has no entropy.
        kernel: Langevin kernel of the positive phase; `MALA()` by default.
        num_moves: Langevin steps of the positive phase in each step.
        max_kl: Radius of the trust region, in nats; by default 0.02 max(1, √(d / 8)) for an LVEBM
            in d dimensions.
        penalties: Penalties on the energies, such as `energy_l2(1.0)`, added to the loss beside
            those that an energy brings along (`kl_penalty` of an `MLPEnergy`).
        average_decay: Decay of the average of the parameters, in [0, 1).
        seed: Fixes every random number.

    Raises:
        ValueError: If the guide holds more than one `AutoParticles`, a number is out of range, or
            the optimiser needs a closure, as LBFGS does, or the loss has no value.

    Source:
        Tang et al., Particle Dynamics for Latent-Variable Energy-Based Models, arXiv 2510.15447;
        the tempered pool and the trust region are this package's (docs/maths.md). Without an
        LVEBM: Kuntz, Lim and Johansen (2023), Particle algorithms for maximum likelihood training
        of latent variable models.

    Example:
        >>> import pyro, torch
        >>> from pyro.optim import ClippedAdam
        >>> from pyro_lvebm import LVEBM, AutoParticles, QuadraticEnergy, Saddle, lvebm
        >>> data = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
        >>> ebm = LVEBM.from_data(QuadraticEnergy(3, 2), data, z_dim=2)
        >>> def model(x):
        ...     with pyro.plate("data", len(x), subsample_size=16) as i:
        ...         lvebm("scene", ebm, obs=x[i])
        >>> saddle = Saddle(model, AutoParticles(model), ClippedAdam({"lr": 1e-2}), seed=0)
        >>> losses = saddle.fit(data, num_steps=3, progress=False)
        >>> len(losses)
        3
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: PyroOptim,
        loss: ELBO | Callable[..., Any] | None = None,
        *,
        kernel: Kernel | None = None,
        num_moves: int = 8,
        max_kl: float | None = None,
        penalties: Sequence[Penalty] = (),
        average_decay: float = 0.99,
        seed: int = 0,
    ) -> None:
        check_at_least(1, num_moves=num_moves)
        if max_kl is not None and not max_kl > 0:
            raise ValueError(f"max_kl must be positive; got {max_kl}")
        check_needs_no_closure(optim)
        check_loss(loss)
        self.particles = find_particles(guide)
        self._own_loss = loss is None
        if loss is None:
            count = 1 if self.particles is None else self.particles.num_particles
            loss = Trace_ELBO(num_particles=count, vectorize_particles=count > 1)
        self.elbo: Any = loss
        super().__init__(model, guide, optim, loss)
        # Once and for all: a compiled loss knows model and guide by their identity.
        rows = GivenRows(needed=needs_rows(guide))
        self._guarded = rows(guide), GivenRows(needed=rows.needed)(model)
        self.kernel: Kernel = MALA() if kernel is None else kernel
        self.num_moves, self.max_kl, self.seed = num_moves, max_kl, seed
        self.penalties, self.average_decay = tuple(penalties), average_decay
        self.average = ParameterAverage(average_decay)
        self.step_count = 0
        self.halvings = 0
        self.acceptance: dict[str, float] = {}
        self._anatomy: Anatomy | None = None
        self.recorder = History()
        self.last_good: dict[Tensor, Tensor] = {}  # of the parameters, should the next step fail
        self._course: Course | None = None  # of the last fit, if it can go on

    @property
    def ebms(self) -> list[LVEBM]:
        """The LVEBMs of the model, known after the first step."""
        return [] if self._anatomy is None else list(self._anatomy.ebms.values())

    @property
    def history(self) -> pd.DataFrame:
        """What happened at every step, indexed by the number of steps; energies in nats.

        Columns: `loss`, with penalties; `positive_energy` and `negative_energy`, the means of E_θ
        over the minibatch and over the weighted negatives; `log_partition` and `log_partition_se`,
        log Z online; `ess`, of the pool; `acceptance_<level>` and `swap_rate_<pair>` of the pool;
        `latent_acceptance_<site>`; `kl`, of the update in nats; `halvings` and `lengthening` of
        it; `log_evidence` and `log_evidence_se`, where `fit` evaluated held-out data;
        `mutual_information` and `mutual_information_se` at the end of a long fit, what the latents
        carry. In a model with several LVEBMs the columns of all but the first end in `@<site>`.
        """
        return self.recorder.frame()

    def step(self, *args: Any, **kwargs: Any) -> Loss:
        """Move particles and pools, and take one optimiser step.

        Args:
            args: Arguments of the model and the guide.
            kwargs: Keyword arguments of the model and the guide.

        Returns:
            The loss with its penalties, in nats, scaled to all data, before the update. A tuple
            where the loss is one, as in `SVI`; penalties are then in its first part.

        Raises:
            ValueError: If the guide was made for another number of rows, or the loss or a
                gradient is NaN or infinite. θ is then back at the last values whose loss was
                finite, and particles and pools are as before the step.
        """
        return self.scaled_step(1.0, 0.0, args, kwargs)

    def fit(
        self,
        *args: Any,
        num_steps: int,
        batches: Iterable[Sequence[Any]] | None = None,
        schedule: Schedule = half_cosine,
        min_kl: float | None = None,
        held_out: tuple[Any, ...] | None = None,
        patience: int | None = None,
        evaluate_every: int = 100,
        checkpoint: str | Path | None = None,
        every: int = 100,
        resume: bool = False,
        progress: bool = True,
        description: str = "Saddle",
        **kwargs: Any,
    ) -> list[Loss]:
        """Take up to `num_steps` steps; then give the parameters their averages.

        With `held_out`, the log evidence of held-out data is estimated before the first step and
        every `evaluate_every` steps (`log_evidence`), and the averages that were best at it are
        the ones the parameters have in the end, even if a step fails. A fit that is interrupted
        from the keyboard ends at its averages as well; the interrupt goes on.

        After 1,000 steps or more that trained an LVEBM with particles, what the latents carry,
        I(x; z), is estimated from about 128 rows, written under the progress bar and into the
        history, and there is a `TrainingWarning` if it is next to nothing. `mutual_information`
        estimates it better.

        Args:
            args: Arguments of the model and the guide.
            num_steps: Number of steps.
            batches: Arguments of the model for each step in turn, such as a `DataLoader` of rows
                and their ids, gone through again and again; `args` are then empty. An epoch is
                `len(batches)` steps.
            schedule: Maps the part of the fit that is done, from 0 to 1, to a factor on each
                update. By default it falls along a half cosine to 1/50; `lambda progress: 1.0`,
                with `min_kl=0`, leaves all updates but those halved as the optimiser made them.
            min_kl: An update that moves the LVEBMs by less than this many nats, times the square of
                the schedule's factor, is made up to eight times longer, so that a small learning
                rate is no slow one. By default half of the radius of the trust region; 0
                leaves short updates as they are, as `step` does.
            held_out: Arguments of the model for held-out data, as a tuple; keyword arguments are
                those of the training data. A plate needs as many rows as it subsamples: use
                `subsample_size=min(256, len(x))`.
            patience: Stop after this many evaluations without a better one. None takes all steps.
                A loaded `Saddle` that fits on starts a new schedule, and its patience anew, unless
                it resumes.
            evaluate_every: Steps from one evaluation to the next.
            checkpoint: A file to `save` to every so many steps, at an interrupt from the keyboard,
                and at the end, with how far the fit is. A process that is killed loses one
                interval at most.
            every: Steps from one such save to the next.
            resume: Go on with the fit of the file that this `Saddle` was loaded from, to the same
                `num_steps` and with the same other arguments: steps, averages and losses are to
                the bit those of a fit that was never broken off, if `batches` are the same again (a
                `DataLoader` that shuffles is not, unless its sampler has a seed). Where the fit
                had ended nothing is done; a new `Saddle` starts at the beginning.
            progress: Show a progress bar with the loss, and with log Z and ESS of the pool.
            description: Name on the progress bar.
            kwargs: Keyword arguments of the model and the guide.

        Returns:
            The loss of every step, also of those before it was broken off.

        Raises:
            ValueError: As in `step` and `log_evidence`; if an entry of x is missing in all rows and
                θ is trained; if a number is out of range, `patience`
                is given without `held_out`, or `batches` beside other arguments; if `batches`
                end early or are not tuples or lists of arguments; if the schedule gives a factor
                that is negative or not finite; if there is no fit to resume, or it had other
                arguments.
            OSError: If the checkpoint cannot be written.
        """
        check_fit(args, num_steps, batches, min_kl, held_out, patience, evaluate_every, every)
        settings = {
            "num_steps": num_steps,
            "evaluate_every": evaluate_every,
            "patience": patience,
            "min_kl": min_kl,
            "held_out": held_out is not None,
        }
        course = self._course = course_of(self._course, resume, self.step_count, settings)
        losses: list[Loss] = [*self.recorder.losses(since=course.start)]
        if course.ended is not None:
            return losses
        done = self.step_count - course.start
        stream = itertools.repeat(args) if batches is None else endless(batches)
        args = next(stream)
        if batches is None and any(e.is_trained for e in self._learn(args, kwargs).ebms.values()):
            check_columns_seen(args)
        stream = itertools.islice(itertools.chain([args], stream), done, None)
        if held_out is not None and course.best is None:
            value = self._evaluate(held_out, args, kwargs)
            start = {p: p.detach().clone() for p in self.parameters()} | self.average.copy()
            pools = pool_snapshot(self.ebms)
            course.best = BestSoFar(value, start, pools, evaluated=self.step_count)

        def look() -> None:
            if held_out is not None and course.best is not None and course.is_due(self.step_count):
                value = self._evaluate(held_out, args, kwargs)
                course.best.offer(value, self.average, self.ebms, self.step_count)

        try:
            look()  # the fit may have been broken off between a step and its evaluation
            with step_bar(num_steps, progress, description, done) as bar:
                for t in bar:
                    if course.is_stuck():
                        break
                    factor = factor_of(schedule, t / num_steps)
                    losses.append(self.scaled_step(factor, min_kl, next(stream), kwargs))
                    if progress and t % 10 == 0:
                        bar.set_postfix(self._status(losses), refresh=False)
                    look()
                    if checkpoint is not None and (t + 1) % every == 0 and t + 1 < num_steps:
                        self.save(checkpoint)
            if checkpoint is not None:
                self.save(checkpoint)
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            if interrupted and checkpoint is not None and self.step_count > course.start:
                with noted(error):
                    self.save(checkpoint)
            # Averages of a fit that diverged are worse than what the failed step went back to.
            if losses and (course.best is not None or interrupted):
                self._end_at_averages(course.best)
                self._course = None
                which = "their averages" if course.best is None else "the averages that were best"
                error.add_note(f"fit: after {len(losses)} steps, parameters now have {which}")
            raise
        self._end_at_averages(course.best)
        _settle_at_averages(self.ebms, LOG_Z_ERROR)
        course.best, course.ended = None, self.step_count
        self.recorder.look(self.step_count)
        if self.step_count - course.start >= LONG_FIT:
            self._look_at_latents(args, kwargs, description if progress else None)
        if checkpoint is not None:
            self.save(checkpoint)
        for ebm in self.ebms:
            warn_of_falling(ebm)
        return losses

    def fit_guide(
        self,
        guide: Callable[..., Any],
        *args: Any,
        optim: PyroOptim | None = None,
        loss: ELBO | None = None,
        batches: Iterable[Sequence[Any]] | None = None,
        max_steps: int = 20_000,
        tolerance: float = 1e-3,
        seed: int = 0,
        progress: bool = True,
        description: str | None = None,
        **kwargs: Any,
    ) -> GuideFit:
        """Train another guide for the model as it is now, until its own ELBO rests.

        Every parameter of the model is held fixed: those of its LVEBMs, whose pools rest, and all
        that Pyro knows of it besides (`pyro.param`, `pyro.module`, `PyroModule`). Steps go in
        windows of 100, or of two passes through the data if that is more. After each, the ELBO of
        the averaged parameters is compared with that of the last window, on the same data and
        noise. Where it gains less than five times `tolerance` the learning rate falls to a fifth,
        twice at most; else the windows grow by a half. At the last rate the ELBO rests if it gains
        less than `tolerance` by two standard errors. The guide then has its averaged parameters.

        Args:
            guide: Any Pyro guide: a module, such as an autoguide, or a function with `pyro.param`.
                It may hold `AutoParticles`, whose losses are then compared, as they move.
            args: Arguments of the model and the guide.
            optim: A Pyro optimiser; by default Adam, with rate 3e-3 for networks (parameters of
                `nn.Module`s) and 3e-2 for all others.
            loss: A Pyro ELBO. By default, that of `Saddle` for guides with particles;
                `TraceEnum_ELBO` where sites are to be enumerated; `TraceMeanField_ELBO` where the
                guide has the sites of the model in their order and can be reparameterised; else
                `Trace_ELBO`. The last three take four draws under a vectorised plate, or one where
                a plate is a loop.
            batches: Arguments of the model for each step in turn, as in `fit`.
            max_steps: Largest number of steps.
            tolerance: Gain of a window, in nats per datum, below which the ELBO rests.
            seed: Fixes every random number.
            progress: Show a progress bar.
            description: Name on it and in the warning; that of the guide's class by default.
            kwargs: Keyword arguments of the model and the guide.

        Returns:
            Whether the ELBO rests, after how many steps, and the ELBO with its standard error.
            If it does not rest there is a `TrainingWarning`, and `compare_elbo` marks the row.

        Raises:
            ValueError: If a number is out of range, or as in `step`.

        Example:
            >>> import pyro, torch
            >>> from pyro.infer.autoguide import AutoNormal
            >>> from pyro.optim import Adam
            >>> from pyro_lvebm import LVEBM, AutoParticles, QuadraticEnergy, Saddle, lvebm
            >>> x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
            >>> ebm = LVEBM.from_data(QuadraticEnergy(2, 1), x, z_dim=1)
            >>> def model(x):
            ...     with pyro.plate("data", len(x)):
            ...         lvebm("s", ebm, obs=x)
            >>> saddle = Saddle(model, AutoParticles(model), Adam({"lr": 1e-2}))
            >>> saddle.fit_guide(AutoNormal(model), x, tolerance=0.05, progress=False).converged
            True
        """
        check_batches(args, batches)
        return fit_guide(
            Saddle,
            self.model,
            guide,
            optim,
            loss,
            lambda: itertools.repeat(args) if batches is None else endless(batches),
            kwargs,
            max_steps,
            tolerance,
            seed,
            progress,
            description or str(getattr(guide, "__name__", type(guide).__name__)),
        )

    def _look_at_latents(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], description: str | None
    ) -> None:
        """Record what the latents of a trained energy carry; write it where there is a name."""
        if self.particles is None or not any(ebm.is_trained for ebm in self.ebms):
            return
        program, device = Program(self.model, args, kwargs), self.device(args, kwargs)
        found = record_carried(self.recorder, program, self.seed, self.step_count, device)
        if found is not None and description is not None:
            end_line(description, found)

    def _end_at_averages(self, best: BestSoFar | None) -> None:
        """Give parameters and pools the best averages, or the last where nothing was held out."""
        if best is not None:
            best.put_back(self.average)
        assign(self.average.values)
        self.last_good = {}  # the averages are meant, and no failing step goes back behind them

    def _evaluate(
        self, held_out: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> float:
        """Record the log evidence of held-out data; an energy too rough to anneal has the worst."""
        self.prepare(args, kwargs)
        try:
            value, error = self.log_evidence(*held_out, **kwargs)
        except RoughEnergyError as failure:
            text = f"held-out data could not be evaluated: {failure}"
            self.recorder.warn("evaluation", self.step_count, text)
            value, error = -math.inf, math.nan
        self.recorder.record(self.step_count, log_evidence=value, log_evidence_se=error)
        return value

    def _status(self, losses: list[Loss]) -> dict[str, str]:
        """What the progress bar shows beside the number of steps."""
        recent = losses[-50:]
        status = {"loss": f"{sum(map(total, recent)) / len(recent):.4g}"}
        if self.ebms:
            pool = self.ebms[0].pool
            status["log Z"] = f"{float(pool.log_partition):.3f}"
            status["ESS"] = f"{float(pool.ess):.0f}/{len(pool.log_weights)}"
        return status

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give all parameters their averages inside the block, with pools that follow them.

        After the block, parameters and pools are as they were.
        """
        with self._averaged(self.ebms):
            yield

    @contextmanager
    def _averaged(self, ebms: list[LVEBM], log_z_error: float | None = None) -> Iterator[None]:
        put_back = pool_snapshot(ebms)
        with self.average.swapped_in():
            try:
                _settle_at_averages(ebms, log_z_error)
                yield
            finally:
                put_back()

    def log_evidence(self, *args: Any, **kwargs: Any) -> tuple[float, float]:
        """Estimate the mean log evidence of data under the averaged parameters, in nats per datum.

            mean_i log ∫ p_θ̄(x_i, z) dz

        Latents are annealed as in `compare_elbo`, with few particles; log Z is that of the pools
        after they have followed θ̄, or a larger one found by annealing. A `TemperedPool` follows
        until it states a standard error of 0.01 nats, for 80 refreshes at most. This is a quick
        estimate to steer by. To publish, use the functions `log_evidence` and `log_partition`,
        which bracket log Z.

        Args:
            args: Arguments of the model, with the data to evaluate.
            kwargs: Keyword arguments of the model.

        Returns:
            The mean, and its standard error over the data. Latents in no plate belong to all
            data at once, which are then one datum, without a standard error.

        Raises:
            ValueError: If the model's latents do not all lie in the same plates, or lie outside
                one that subsamples.
        """
        device = self.device(args, kwargs)
        seed = derive_seed(self.seed, Stream.HELD_OUT_EVALUATION)
        sweep = Sweep(Program(self.model, args, kwargs), seed)
        with sweep.program.quiet(seed, Stream.EVIDENCE_PROTOTYPE, device=device):
            ebms = sweep.program.ebms
            with self._averaged(ebms, LOG_Z_ERROR), frozen(ebms):
                terms = model_log_evidence(sweep, num_particles=16, num_runs=2)
                missed = sum(missed_log_z(sweep, ebm) for ebm in ebms)
        return terms.mean()[0] - missed, terms.mean_std_error()

    def sample_posterior(
        self,
        *args: Any,
        num_samples: int,
        num_warmup: int = 200,
        thinning: int = 1,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Run the particles of all data on as Markov chains at frozen θ.

        The stored particles are the starting points and do not change. Latents in different
        plates, such as weights and latents of single data, take turns, given each other.

        Args:
            args: Arguments of the model and the guide.
            num_samples: Draws to keep of each particle.
            num_warmup: Steps before the first of them, in which step sizes and metrics adapt.
            thinning: Steps from one draw to the next.
            kwargs: Keyword arguments of the model and the guide.

        Returns:
            For each site, (num_particles, num_samples, *batch_shape, *event_shape): ArviZ's
            order, a particle being a chain. Where the model is given rows, as in
            `pyro.plate(..., subsample=ids)`, these are the data, in their order.

        Raises:
            ValueError: If the guide has no `AutoParticles`; a latent lies outside a plate that
                subsamples, or latents lie in different plates and one subsamples; or a number is
                out of range.
        """
        return self.draw_posterior(
            *args, num_samples=num_samples, num_warmup=num_warmup, thinning=thinning, **kwargs
        ).samples

    def draw_posterior(
        self,
        *args: Any,
        num_samples: int,
        num_warmup: int = 200,
        thinning: int = 1,
        **kwargs: Any,
    ) -> PosteriorDraws:
        """As `sample_posterior`, with the energies and acceptance rates of the chains."""
        if self.particles is None:
            raise ValueError(
                "the guide has no AutoParticles to run on as chains; draw from another guide with "
                "pyro.infer.Predictive(model, guide=guide, num_samples=...)"
            )
        self.prepare(args, kwargs)
        program, device = Program(self.model, args, kwargs), self.device(args, kwargs)
        settings = ChainSettings(num_samples, num_warmup, thinning)
        with program.at_rest(self.seed, Stream.POSTERIOR_START, self.step_count, device=device):
            return draw_posterior(
                program, self.guide, self.particles, self.kernel, settings, self.seed
            )

    def save(self, path: str | Path) -> None:
        """Write θ, particles, pools, optimiser and step count to one file.

        Tensors are stored as safetensors, everything else as JSON in its header. The file appears
        whole or not at all; one that exists is replaced, and keeps its mode. A symbolic link
        stays one.

        Raises:
            ValueError: If no step has been taken yet, or the optimiser holds state that is
                neither tensor nor JSON.
            OSError: If the file cannot be written, as on a full disk; the old one is then there
                still.
        """
        if self._anatomy is None:
            raise ValueError("nothing to save: take a step first")
        settings = {name: getattr(self, name) for name in SETTINGS}
        write_checkpoint(Path(path), settings, self._parts(self._anatomy))

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: PyroOptim,
        *args: Any,
        loss: ELBO | Callable[..., Any] | None = None,
        kernel: Kernel | None = None,
        penalties: Sequence[Penalty] = (),
        **kwargs: Any,
    ) -> Saddle:
        """Build a Saddle and give it the state that `save` wrote; no code in the file is run.

        Args:
            path: File written by `save`.
            model: The same model as then, with LVEBMs of the same shapes and `kl_penalty`; they are
                filled.
            guide: A guide like the one saved; it is filled.
            optim: An optimiser like the one saved.
            args: Arguments of the model, on which it is run once to find its parts.
            loss: As in the constructor.
            kernel: As in the constructor.
            penalties: As in the constructor.
            kwargs: Keyword arguments of the model.

        Returns:
            A Saddle whose next step is the one that the saved Saddle would have taken.

        Raises:
            ValueError: If the file is unreadable or damaged, or does not fit the model, the guide
                or the optimiser; these, and Pyro's parameter store, are then unchanged.
        """
        checkpoint = read_checkpoint(Path(path))
        settings = checkpoint.settings
        saddle = cls(
            model,
            guide,
            optim,
            loss,
            kernel=kernel,
            penalties=penalties,
            **{name: settings[name] for name in SETTINGS if name != "step_count"},
        )
        with store_unchanged_on_error():
            anatomy = saddle._learn(args, kwargs)
            for site, ebm in anatomy.ebms.items():
                announce_theta(site, ebm)  # an optimiser may have settings by name
            saddle._course = checkpoint.restore(saddle._parts(anatomy))
        saddle.step_count = settings["step_count"]
        return saddle

    def _parts(self, anatomy: Anatomy) -> Parts:
        return Parts(
            self._modules(),
            anatomy.loose_params,
            self.ebms,
            self.optim,
            self.average,
            self.recorder,
            self._course,
        )

    def _modules(self) -> dict[str, nn.Module]:
        """The modules whose state is that of the Saddle."""
        modules: dict[str, nn.Module] = {f"ebm{i}": ebm for i, ebm in enumerate(self.ebms)}
        if isinstance(self.guide, nn.Module):
            modules["guide"] = self.guide
        return modules

    def parameters(self) -> list[Tensor]:
        """Return all parameters of model and guide, known after the first step."""
        loose = [] if self._anatomy is None else list(self._anatomy.loose_params.values())
        owned = [p for module in self._modules().values() for p in module.parameters()]
        return list({id(p): p for p in [*owned, *loose]}.values())

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Anatomy:
        """Learn the parts of model and guide once.

        Pools of energies that nothing here will train catch up with them, if they never have.
        """
        anatomy = self._learn(args, kwargs)
        for ebm in self.ebms:
            check_at_rest(ebm.f)
            if not ebm.is_trained and not ebm.pool.refreshes:
                ebm.settle()
        return anatomy

    def _learn(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Anatomy:
        """Learn the parts once, and leave the pools alone."""
        for part in (self.model, self.guide):
            keep_apart(part)
        if self._anatomy is None:
            with isolated_rng(self.seed, Stream.PREPARATION, device=device_of(args, kwargs)):
                program = Program(self.model, args, kwargs)
                anatomy = inspect(program, self.guide, self.elbo)
            check_precision(anatomy.ebms, anatomy.loose_params, self.guide)
            self._anatomy = anatomy
            if self._own_loss:
                # Spares Pyro a guess, which would run model and guide once more and log a message.
                extra = int(self.elbo.vectorize_particles and self.elbo.num_particles > 1)
                self.elbo.max_plate_nesting = self._anatomy.nesting + extra
        return self._anatomy

    def device(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
        """Return where particles and chains are, which is not where a loader left the data."""
        return self.ebms[0].base_x.loc.device if self.ebms else device_of(args, kwargs)

    def scaled_step(
        self, factor: float, min_kl: float | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Loss:
        """Take a `step` whose update is multiplied by a factor, and lengthened as in `fit`."""
        anatomy = self.prepare(args, kwargs)
        check_not_replayed(self.elbo, self.ebms, self.particles is not None)
        device = self.device(args, kwargs)
        if trains_on := anatomy.check_frozen():
            self.recorder.warn("frozen", self.step_count, trains_on)
        region = TrustRegion(self.max_kl, min_kl, factor)
        with (
            isolated_rng(self.seed, Stream.MINIBATCH, self.step_count, device=device),
            unchanged_on_error(self.ebms) as undo,
        ):
            choices = self._positive_phase(undo, args, kwargs)

            def loss_and_grads() -> Loss:
                self._negative_phase()
                return self._loss_and_grads(choices, args, kwargs)

            ascent = ascend(
                loss_and_grads, self.optim, self.ebms, region, self.last_good, self.step_count, undo
            )
            undo.append(records_snapshot(self))
            self.average.update(list(ascent.before))
            self.last_good, self.halvings = ascent.before, ascent.halvings
            self.step_count += 1
            row = {"loss": total(ascent.loss), "kl": ascent.kl, "halvings": float(ascent.halvings)}
            row["lengthening"] = ascent.lengthening
            row |= {f"latent_acceptance_{name}": rate for name, rate in self.acceptance.items()}
            self.recorder.record_step(self.step_count, row, ascent.positive, anatomy.ebms)
        self.recorder.look_now_and_then(self.step_count)
        return ascent.loss

    def _positive_phase(
        self,
        undo: list[Callable[[], None]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> dict[str, Node]:
        """Move the particles of one minibatch on p_θ(z | x); return the nodes that fix it."""
        if self.particles is None:
            return {}
        device = self.device(args, kwargs)
        stream = generator_for(self.seed, Stream.POSITIVE_PHASE, self.step_count, device=device)
        program = Program(self.model, args, kwargs, self.prepare(args, kwargs).nesting)
        with frozen(self.ebms):
            choices, self.acceptance = move_minibatch(
                program,
                self.guide,
                self.particles,
                Moves(self.kernel, self.num_moves, stream),
                undo,
                lambda: self._guide_noise(device),
            )
        return choices

    def _negative_phase(self) -> None:
        """Refresh the pools that θ has left behind, on p_θ(x, z).

        Reading a log density with log Z would do the same, so that plain SVI trains θ rightly. A
        pool that takes contexts does it there, where the model has those of the minibatch.
        """
        for ebm in self.ebms:
            if not ebm.pool.takes_contexts:
                ebm.follow()

    def _loss_and_grads(
        self, choices: dict[str, Node], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Loss:
        """Run model and guide on the chosen minibatch; leave gradients of loss and penalties."""
        guide, model = self._guarded
        if choices:
            guide, model = at_minibatch(guide, choices), at_minibatch(model, choices)
        with SamePlates(), self._guide_noise(self.device(args, kwargs)):
            loss = as_numbers(self.loss_and_grads(model, guide, *args, **kwargs))
        return add(loss, add_penalties(self.penalties, self.ebms))

    def _guide_noise(self, device: torch.device) -> AbstractContextManager[None]:
        """Seed the draws of a guide that holds more than particles, the same twice in each step."""
        if self.particles is None or self.particles is self.guide:
            return nullcontext()
        return isolated_rng(self.seed, Stream.GUIDE_DRAWS, self.step_count, device=device)


def _settle_at_averages(ebms: list[LVEBM], log_z_error: float | None) -> None:
    """Let pools follow averaged parameters, with other noise than the steps that may come next.

    An evaluation and the end of a fit at its averages have the same.
    """
    for ebm in ebms:
        seed = ebm.pool.seed
        ebm.pool.seed = derive_seed(seed, Stream.AVERAGED_POOL)
        try:
            ebm.settle(log_z_error)
        finally:
            ebm.pool.seed = seed
