# SPDX-License-Identifier: Apache-2.0
"""Comparing posteriors by their ELBOs: one θ and many posteriors, or one θ for each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_lvebm.comparison.refit import refits
from pyro_lvebm.comparison.rows import (
    ImportanceWeighted,
    Posterior,
    PriorProposal,
    RowTerms,
    convergence,
    row_terms,
)
from pyro_lvebm.comparison.table import ElboTable
from pyro_lvebm.evidence import (
    LogPartition,
    Terms,
    model_log_evidence,
    mutual_information_of,
    row_log_z,
    warn_of_unreliable,
)
from pyro_lvebm.latents import Program, Sweep
from pyro_lvebm.rng import Stream, derive_seed, isolated_rng
from pyro_lvebm.sites import Model, plates_of
from pyro_lvebm.training import Saddle
from pyro_lvebm.validation import check_at_least, warn_of_training

if TYPE_CHECKING:
    import pandas as pd

_WITH_GUIDE = (Saddle, ImportanceWeighted)


def compare_elbo(
    model: Model,
    posteriors: Mapping[str, Posterior | Callable[[], Saddle]],
    *args: Any,
    theta: Literal["fixed", "refit"] = "fixed",
    num_steps: int | None = None,
    held_out: tuple[Any, ...] | None = None,
    num_samples: int = 64,
    seed: int = 0,
    **kwargs: Any,
) -> ElboTable:
    """Compare how tightly several posteriors bound the evidence of a model.

        elbo(q)   = E_q[log p(x, z) − log q(z)] − log Z_upper
        kl_gap(q) = log Ĉ(x) − E_q[log C-density of (x, z) − log q(z)] = KL(q ‖ p_θ(z|x))

    Both are means over the data. log Z cancels in the gap. Its upper bracket end makes every elbo
    low, and Ĉ, annealed from below, makes every gap small, so claims of tightness err on the safe
    side.

    With `theta="fixed"` all posteriors belong to the present θ, and nothing is trained or changed.
    A guide's row is a plain Monte Carlo ELBO. A `Saddle` with `AutoParticles` has no density of
    its own, so its row is the ELBO of annealed Langevin from its particles: a Gaussian is fitted
    to draws of each datum's chains, and MALA carries new draws from it to the posterior. This is
    a lower bound on the space of paths (`annealed_elbo`); its gap is zero when the particles have
    converged and the path is slow enough. An `MCMC` run, such as one of NUTS, on the model with
    frozen θ and all data, gets the same with its draws in place of the particles'. Further rows
    are `ImportanceWeighted(guide)`, `LaplaceApproximation()` and `PriorProposal()`, which is
    added as "prior" where neither it nor that name is among the posteriors: a guide that does not
    beat it has learnt nothing about single data. Guides are measured as they are; train them by
    `Saddle.fit_guide`, from which the table knows whether they have converged.

    With `theta="refit"` every posterior is a function that returns a new `Saddle`. One after
    another they train the model from the same start for `num_steps`, and are compared by the
    held-out log p(x) of the θ they end with. The model is then put back to where it was.

    Args:
        model: The Pyro model; all its latents inside the same plates.
        posteriors: What to compare, by name.
        args: Arguments of model and guides.
        theta: Compare posteriors of one θ, or let each have its own.
        num_steps: Steps of each fit; only for `theta="refit"`.
        held_out: Arguments of the model for held-out data; only for `theta="refit"`.
        num_samples: Draws for each datum.
        seed: Fixes every random number.
        kwargs: Keyword arguments of model and guides.

    Returns:
        A table that prints itself, best ELBO first. Its columns are elbo and kl_gap with their
        standard errors elbo_se and kl_gap_se, in nats; pareto_k, the median over data of the
        Pareto shape k̂ of the importance weights; parameters, the trained numbers or stored
        coordinates; converged, which is True where `Saddle.fit_guide` brought the ELBO of a guide
        to rest at this θ or nothing is trained, False where it did not or θ has changed since (a
        `TrainingWarning`), and None where that is not known; and seconds. With `theta="refit"`
        there are held_out and held_out_se in place of converged, and the best held-out comes first.

    Raises:
        ValueError: If there are no posteriors, the model's latents are not all in the same
            plates, a guide has parameters of the size of one minibatch or no sites, or an
            argument is missing or belongs to the other kind of comparison.

    Source:
        docs/estimators.md; Wu et al. (2017), On the quantitative analysis of decoder-based
        generative models (bounds by annealing).
    """
    if not posteriors:
        raise ValueError("posteriors is empty; give at least one guide or Saddle by name")
    check_at_least(2, num_samples=num_samples)
    program = Program(model, args, kwargs)
    if theta == "refit":
        return _compare_refits(program, posteriors, num_steps, held_out, num_samples, seed)
    if theta != "fixed":
        raise ValueError(f"theta must be 'fixed' or 'refit'; got {theta!r}")
    if num_steps is not None or held_out is not None:
        raise ValueError("num_steps and held_out are for theta='refit'; nothing is trained here")
    seed = derive_seed(seed, Stream.TABLE)
    with program.at_rest(seed, Stream.TABLE_PROTOTYPE):
        check_not_shared(posteriors)
        _check_observed(program)
        posteriors = _with_prior(posteriors)
        states = {name: convergence(posterior, program) for name, posterior in posteriors.items()}
        _warn_of_other_theta([name for name, state in states.items() if state.other_theta])
        sweep = Sweep(program, seed)
        shift = _Shift.of(sweep)
        evidence = model_log_evidence(sweep)
        carried = mutual_information_of(sweep)
        rows, terms = {}, {}
        for name, posterior in posteriors.items():
            clock = time.perf_counter()
            # The same noise for all rows, so that their differences have less of it.
            with isolated_rng(seed, Stream.TABLE_ROWS, device=program.device):
                found = row_terms(posterior, sweep, num_samples)
            seconds = time.perf_counter() - clock
            rows[name] = _row(found, evidence, shift.to_upper)
            rows[name] |= {"converged": states[name].converged, "seconds": seconds}
            terms[name] = found.log_weights
    log_evidence, log_evidence_se = evidence.mean()
    return ElboTable(
        _frame(rows, "elbo"),
        theta,
        log_evidence + shift.to_upper,
        log_evidence_se,
        shift.log_zs,
        len(evidence.value),
        terms,
        {},
        carried,
    )


def _compare_refits(
    program: Program,
    posteriors: Mapping[str, Any],
    num_steps: int | None,
    held_out: tuple[Any, ...] | None,
    num_samples: int,
    seed: int,
) -> ElboTable:
    if num_steps is None or held_out is None:
        raise ValueError("theta='refit' needs num_steps and held_out, as in held_out=(x_test,)")
    if not isinstance(held_out, tuple):
        raise ValueError(f"held_out must be a tuple of arguments; got {type(held_out).__name__}")
    rows, terms, log_zs, num_data = {}, {}, [], 0
    log_z_se: dict[str, float] = {}
    fits = refits(program, posteriors, num_steps)
    # The same for all fits, so that their differences have less noise than they are stated to.
    seed, new_seed = (derive_seed(seed, s) for s in (Stream.TABLE, Stream.TABLE_HELD_OUT))
    noise = isolated_rng(seed, Stream.TABLE_REFITS, device=program.device)
    # Closing puts the model back at once, even if an error would keep the generator alive.
    with poutine.block(), noise, closing(fits):
        for name, saddle, seconds in fits:
            fitted = replace(program)  # looked at anew, as supports may depend on θ
            with fitted.at_rest(seed, Stream.TABLE_PROTOTYPE):
                _check_observed(fitted)
                sweep = Sweep(fitted, seed)
                new_sweep = Sweep(replace(program, args=held_out), new_seed)
                shift = _Shift.of(sweep)
                new_shift = shift
                if any(ebm.context_shape is not None for ebm in fitted.ebms):
                    new_shift = _Shift.of(new_sweep)
                log_zs += shift.log_zs
                evidence = model_log_evidence(sweep)
                new = model_log_evidence(new_sweep)
                found = row_terms(saddle, sweep, num_samples)
            held = {"held_out": new.mean()[0] + new_shift.to_upper}
            held["held_out_se"] = new._replace(
                value=new.value + new_shift.to_estimate
            ).mean_std_error()
            rows[name] = held | _row(found, evidence, shift.to_upper) | {"seconds": seconds}
            terms[name] = (new.value + new_shift.to_estimate)[None]
            log_z_se[name] = math.hypot(*(z.std_error for z in new_shift.log_zs))
            num_data = len(evidence.value)
    frame = _frame(rows, "held_out")
    return ElboTable(frame, "refit", math.nan, math.nan, log_zs, num_data, terms, log_z_se)


class _Shift(NamedTuple):
    """What to add to log densities with the pools' log Z, so that they have an annealed one."""

    to_upper: float  # the upper ends, in the mean over the rows, in nats
    to_estimate: Tensor  # the estimates, (N,) in a conditional LVEBM, else a scalar
    log_zs: list[LogPartition]

    @classmethod
    def of(cls, sweep: Sweep) -> _Shift:
        """Anneal all log Z, those of conditional LVEBMs at the contexts of a sweep."""
        found = [row_log_z(sweep, ebm) for ebm in sweep.program.ebms]
        log_zs = [log_z.bracket for log_z in found]
        warn_of_unreliable(log_zs)
        to_estimate = sum((z.correction for z in found), torch.zeros(()))
        return cls(sum(z.to_upper for z in found), to_estimate, log_zs)


def _row(found: RowTerms, evidence: Terms, shift: float) -> dict[str, Any]:
    elbo, elbo_se = found.mean()
    log_evidence, log_evidence_se = evidence.mean()
    return {
        "elbo": elbo + shift,
        "elbo_se": elbo_se,
        "kl_gap": log_evidence - elbo,
        "kl_gap_se": math.hypot(elbo_se, log_evidence_se),
        "pareto_k": float(found.pareto_k.median()),
        "parameters": found.num_parameters,
    }


def _frame(rows: dict[str, dict[str, Any]], best: str) -> pd.DataFrame:
    import pandas as pd

    frame = pd.DataFrame.from_dict(rows, orient="index")
    if "converged" in frame:
        # None would become NaN, which counts as true.
        states = [row["converged"] for row in rows.values()]
        frame["converged"] = pd.Series(states, index=frame.index, dtype=object)
    return frame.sort_values(best, ascending=False).rename_axis("posterior")


def _with_prior(posteriors: Mapping[str, Any]) -> dict[str, Any]:
    """Add the row "prior", where the user has none of that kind or name."""
    found = dict(posteriors)
    if not any(isinstance(posterior, PriorProposal) for posterior in found.values()):
        found.setdefault("prior", PriorProposal())
    return found


def _warn_of_other_theta(names: list[str]) -> None:
    if names:
        warn_of_training(
            f"the guides {names} were trained at other parameters of the model than it has now, so "
            "their rows show what training elsewhere has lost, too; the table marks them as not "
            "converged. Train them again: saddle.fit_guide(guide, ...)"
        )


def check_not_shared(posteriors: Mapping[str, Posterior]) -> None:
    """Refuse a table in which two guides have parameters in common.

    Raises:
        ValueError: If they have, as when two guides of one class were trained by `SVI` without
            `pyro.clear_param_store()` in between: Pyro's store names them by their class.
    """
    owner: dict[int, tuple[str, Any]] = {}
    for name, posterior in posteriors.items():
        guide = posterior.guide if isinstance(posterior, _WITH_GUIDE) else posterior
        for param in guide.parameters() if isinstance(guide, nn.Module) else ():
            other, its_guide = owner.setdefault(id(param), (name, guide))
            if its_guide is not guide:
                raise ValueError(
                    f"the guides '{other}' and '{name}' share parameters, because Pyro's parameter "
                    "store names guides by their class. Train them by saddle.fit_guide, or call "
                    "pyro.clear_param_store() before training the second"
                )


def _check_observed(program: Program) -> None:
    """Refuse models with observed sites that belong to no datum."""
    plates = [plates_of(node) for node in program.latents.values()]
    for name, node in program.sites.items():
        if node["is_observed"] and plates and not plates[0] <= plates_of(node):
            raise ValueError(
                f"the observed site '{name}' lies outside the plates of the latents, so its log "
                "probability belongs to no datum; compare_elbo reports nats per datum"
            )
