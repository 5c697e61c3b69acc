# SPDX-License-Identifier: Apache-2.0
"""Saddle: stochastic variational inference whose latents are Langevin particles."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO, SVI, Trace_ELBO
from pyro.infer.util import zero_grads
from pyro.optim import PyroOptim
from torch import Tensor, nn
from tqdm.auto import trange

from pyro_lvebm.ascent import bounded_step, check_finite, restore_last_good
from pyro_lvebm.checkpoint import SETTINGS, read_checkpoint, write_checkpoint
from pyro_lvebm.guides import check_guide, find_particles
from pyro_lvebm.langevin import MALA, Kernel
from pyro_lvebm.local_energy import latent_blocks
from pyro_lvebm.model import LVEBM
from pyro_lvebm.positive import move_block
from pyro_lvebm.posterior import PosteriorDraws, draw_posterior
from pyro_lvebm.rng import generator_for, isolated_rng
from pyro_lvebm.rollback import unchanged_on_error, undo_particles
from pyro_lvebm.tracing import (
    Node,
    all_nodes,
    at_minibatch,
    energy_modules,
    frozen,
    plate_nesting,
    subsample_nodes,
    vectorise,
)
from pyro_lvebm.validation import DataError

_SETTLING_REFRESHES = 10


class Saddle(SVI):
    """Maximum likelihood of a Pyro model with LVEBM sites, as a saddle over distributions.

        L(θ, q, r) = E_{data, q(z|x)}[−E_θ] + H(q) + E_r[E_θ] − H(r),    max over θ, q; min over r

    One `step` moves the latent particles of a minibatch by Langevin on p_θ(z | x) (the positive
    phase), lets each LVEBM refresh its pool of negatives on p_θ(x, z) (the negative phase), and
    takes one optimiser step on θ, halved until KL(p_old ‖ p_new) ≤ `max_kl` as the pools see it.
    With any other guide in place of `AutoParticles` it is SVI for the same model.

    The global random generator is left as it was; everything drawn in a step, by Pyro too, is
    fixed by `seed` and the number of steps so far.

    Args:
        model: A Pyro model.
        guide: `AutoParticles(model)`, or any Pyro guide, or an `AutoGuideList` with both.
        optim: A Pyro optimiser.
        loss: A Pyro ELBO; by default `Trace_ELBO`, vectorised over the particles if there are
            any. With particles its value is an energy, not an ELBO: a delta has no entropy.
        kernel: Langevin kernel of the positive phase; `MALA()` by default.
        num_moves: Langevin steps of the positive phase in each step.
        max_kl: Radius of the trust region, in nats.
        seed: Fixes every random number.

    Raises:
        ValueError: If the guide holds more than one `AutoParticles`, or a number is out of range.

    Source:
        Tang et al., Particle Dynamics for Latent-Variable Energy-Based Models, arXiv 2510.15447;
        the tempered pool and the trust region are this package's (docs/maths.md).

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
        loss: ELBO | None = None,
        *,
        kernel: Kernel | None = None,
        num_moves: int = 8,
        max_kl: float = 0.02,
        seed: int = 0,
    ) -> None:
        if num_moves < 1:
            raise ValueError(f"num_moves must be at least 1; got {num_moves}")
        if not max_kl > 0:
            raise ValueError(f"max_kl must be positive; got {max_kl}")
        self.particles = find_particles(guide)
        self._own_loss = loss is None
        if loss is None:
            count = 1 if self.particles is None else self.particles.num_particles
            loss = Trace_ELBO(num_particles=count, vectorize_particles=count > 1)
        self.elbo = loss
        super().__init__(model, guide, optim, loss)
        self.kernel: Kernel = MALA() if kernel is None else kernel
        self.num_moves, self.max_kl, self.seed = num_moves, max_kl, seed
        self.step_count = 0
        self.halvings = 0
        self.acceptance: dict[str, float] = {}
        self._nesting: int | None = None
        self._ebms: list[LVEBM] = []
        self._loose_params: dict[str, Tensor] = {}
        self._last_good: dict[Tensor, Tensor] = {}

    @property
    def ebms(self) -> list[LVEBM]:
        """The LVEBMs of the model, known after the first step."""
        return self._ebms

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Move particles and pools, and take one optimiser step.

        Args:
            args: Arguments of the model and the guide.
            kwargs: Keyword arguments of the model and the guide.

        Returns:
            The loss, in nats, scaled to all data, before the update.

        Raises:
            ValueError: If the loss or a gradient is NaN or infinite. θ is then back at the last
                values whose loss was finite, and particles and pools are as before the step.
        """
        return self._step(1.0, args, kwargs)

    def fit(
        self,
        *args: Any,
        num_steps: int,
        progress: bool = True,
        description: str = "Saddle",
        **kwargs: Any,
    ) -> list[float]:
        """Take `num_steps` steps, with updates that shrink along a half cosine to 1/50.

        Args:
            args: Arguments of the model and the guide.
            num_steps: Number of steps.
            progress: Show a progress bar with the loss, and with log Z and ESS of the pool.
            description: Name on the progress bar.
            kwargs: Keyword arguments of the model and the guide.

        Returns:
            The loss of every step.

        Raises:
            ValueError: As in `step`.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1; got {num_steps}")
        losses = []
        with trange(num_steps, disable=not progress, desc=description, unit="step") as bar:
            for t in bar:
                factor = 0.51 + 0.49 * math.cos(math.pi * t / num_steps)
                losses.append(self._step(factor, args, kwargs))
                if progress and t % 10 == 0:
                    bar.set_postfix(self._status(losses), refresh=False)
        self._settle()
        return losses

    def _settle(self) -> None:
        """Let the pools catch up with the last θ, unless θ was held fixed."""
        for ebm in self._ebms:
            if any(p.requires_grad for p in ebm.f.parameters()):
                for _ in range(_SETTLING_REFRESHES):
                    ebm.pool.refresh(ebm)
                ebm.mark_pool(fresh=True)

    def sample_posterior(
        self,
        *args: Any,
        num_samples: int,
        num_warmup: int = 200,
        thinning: int = 1,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Run the particles of all data on as Markov chains at frozen θ.

        The stored particles are the starting points and do not change.

        Args:
            args: Arguments of the model and the guide.
            num_samples: Draws to keep of each particle.
            num_warmup: Steps before the first of them, in which step sizes adapt.
            thinning: Steps from one draw to the next.
            kwargs: Keyword arguments of the model and the guide.

        Returns:
            For each site, (num_particles, num_samples, *batch_shape, *event_shape): ArviZ's
            order, a particle being a chain.

        Raises:
            ValueError: If the guide has no `AutoParticles`, or a number is out of range.
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
        with isolated_rng(self.seed, 2, self.step_count, device=self._device(args, kwargs)):
            self._inspect(args, kwargs)
            return draw_posterior(
                self.model,
                self.guide,
                self.particles,
                self.kernel,
                args,
                kwargs,
                num_samples=num_samples,
                num_warmup=num_warmup,
                thinning=thinning,
                seed=self.seed,
            )

    def save(self, path: str | Path) -> None:
        """Write θ, particles, pools, optimiser and step count to one file.

        Tensors are stored as safetensors, everything else as JSON in its header. The file appears
        whole or not at all; one that exists is replaced.

        Raises:
            ValueError: If no step has been taken yet, or the optimiser holds state that is
                neither tensor nor JSON.
        """
        if self._nesting is None:
            raise ValueError("nothing to save: take a step first")
        settings = {name: getattr(self, name) for name in SETTINGS}
        write_checkpoint(
            Path(path), settings, self._modules(), self._loose_params, self._ebms, self.optim
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: PyroOptim,
        *args: Any,
        loss: ELBO | None = None,
        kernel: Kernel | None = None,
        **kwargs: Any,
    ) -> Saddle:
        """Build a Saddle and give it the state that `save` wrote; no code in the file is run.

        Args:
            path: File written by `save`.
            model: The same model as then, with LVEBMs of the same shapes; they are filled.
            guide: A guide like the one saved; it is filled.
            optim: An optimiser like the one saved.
            args: Arguments of the model, on which it is run once to find its parts.
            loss: As in the constructor.
            kernel: As in the constructor.
            kwargs: Keyword arguments of the model.

        Returns:
            A Saddle whose next step is the one that the saved Saddle would have taken.

        Raises:
            ValueError: If the file is unreadable, or does not fit the model and guide; these are
                then unchanged.
        """
        checkpoint = read_checkpoint(Path(path))
        settings = checkpoint.settings
        saddle = cls(
            model,
            guide,
            optim,
            loss,
            kernel=kernel,
            num_moves=settings["num_moves"],
            max_kl=settings["max_kl"],
            seed=settings["seed"],
        )
        with isolated_rng(saddle.seed, 4, device=saddle._device(args, kwargs)):
            saddle._inspect(args, kwargs)
        checkpoint.restore(saddle._modules(), saddle._loose_params, saddle._ebms, optim)
        saddle.step_count = settings["step_count"]
        return saddle

    def _modules(self) -> dict[str, nn.Module]:
        """The modules whose state is that of the Saddle."""
        modules: dict[str, nn.Module] = {f"ebm{i}": ebm for i, ebm in enumerate(self._ebms)}
        if isinstance(self.guide, nn.Module):
            modules["guide"] = self.guide
        return modules

    def _status(self, losses: list[float]) -> dict[str, str]:
        recent = losses[-50:]
        status = {"loss": f"{sum(recent) / len(recent):.4g}"}
        if self._ebms:
            pool = self._ebms[0].pool
            status["log Z"] = f"{float(pool.log_partition):.3f}"
            status["ESS"] = f"{float(pool.ess):.0f}/{len(pool.log_weights)}"
        return status

    @staticmethod
    def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        return tensors[0].device if tensors else torch.device("cpu")

    def _inspect(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Learn the plates and LVEBMs of the model once, and refuse guides that cannot work."""
        if self._nesting is not None:
            return
        with torch.no_grad(), poutine.block():
            model_trace = poutine.trace(self.model).get_trace(*args, **kwargs)
            check_guide(self.guide, model_trace)
            guide_trace = poutine.trace(self.guide).get_trace(*args, **kwargs)
        self._ebms = energy_modules(model_trace)
        owned = {id(p) for m in self._modules().values() for p in m.parameters()}
        params = {
            name: node["value"].unconstrained()
            for trace in (model_trace, guide_trace)
            for name, node in trace.nodes.items()
            if node["type"] == "param"
        }
        self._loose_params = {n: p for n, p in params.items() if id(p) not in owned}
        self._nesting = max(plate_nesting(model_trace), plate_nesting(guide_trace))
        if self._own_loss:
            # Spares Pyro a guess, which would run model and guide once more and log a message.
            extra = int(self.elbo.vectorize_particles and self.elbo.num_particles > 1)
            self.elbo.max_plate_nesting = self._nesting + extra

    def _step(self, factor: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        device = self._device(args, kwargs)
        with isolated_rng(self.seed, 0, self.step_count, device=device):
            self._inspect(args, kwargs)
            with unchanged_on_error(self._ebms) as undo:
                choices = self._positive_phase(undo, device, args, kwargs)
                loss = self._ascend(factor, choices, args, kwargs)
        self.step_count += 1
        return loss

    def _positive_phase(
        self,
        undo: list[Callable[[], None]],
        device: torch.device,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> dict[str, Node]:
        """Move the particles of one minibatch; return the nodes that fix it."""
        guide = self.particles
        if guide is None:
            return {}
        assert self._nesting is not None
        generator = generator_for(self.seed, 1, self.step_count, device=device)
        vectorised = vectorise(self.guide, guide.num_particles, self._nesting)
        with poutine.block(), frozen(self._ebms), torch.no_grad():
            guide_trace = poutine.trace(vectorised).get_trace(*args, **kwargs)
            blocks, trace = latent_blocks(
                self.model, guide, guide_trace, self._nesting, args, kwargs
            )
            for block in blocks:
                undo.append(undo_particles(guide, block.indices, [c.name for c in block.columns]))
                rate = move_block(block, guide, self.kernel, self.num_moves, generator)
                for column in block.columns:
                    self.acceptance[column.name] = float(rate)
        return subsample_nodes(trace)

    def _ascend(
        self,
        factor: float,
        choices: dict[str, Node],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> float:
        """Take one optimiser step on the loss of the chosen minibatch."""
        guide = at_minibatch(self.guide, choices) if choices else self.guide
        model = at_minibatch(self.model, choices) if choices else self.model
        with warnings.catch_warnings(), poutine.trace(param_only=True) as capture:
            warnings.filterwarnings("ignore", message="Encountered (NaN|\\+?-?inf)")
            try:
                loss = float(self.loss_and_grads(model, guide, *args, **kwargs))
            except DataError:
                raise
            except ValueError as error:
                restore_last_good(self._last_good)
                raise ValueError(
                    f"the loss could not be computed at step {self.step_count}; parameters are "
                    f"back at the last values with a finite loss: {error}"
                ) from error
        params = list({n["value"].unconstrained() for n in all_nodes(capture.trace).values()})
        try:
            check_finite(loss, params, self._last_good, self.step_count)
            self._last_good, self.halvings = bounded_step(
                self.optim,
                params,
                factor=factor,
                ebms=self._ebms,
                max_kl=self.max_kl,
                step=self.step_count,
            )
        finally:
            zero_grads(params)
        return loss
