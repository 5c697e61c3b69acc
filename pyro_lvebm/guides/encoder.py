# SPDX-License-Identifier: Apache-2.0
"""What amortised guides share: an encoder for the latent sites of the one LVEBM in a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from pyro_lvebm.bases import Completion, GaussianBase, moments
from pyro_lvebm.guides.encoder_inputs import (
    SiteInputs,
    check_observed,
    features,
    law_of_entries,
    read_inputs,
)
from pyro_lvebm.guides.networks import zero_network
from pyro_lvebm.guides.plates import KnownRows, open_plates
from pyro_lvebm.model import expand_context
from pyro_lvebm.sites import LatentSite, MissingSite
from pyro_lvebm.validation import DataError, check_widths


class AmortisedGuide(AutoGuide):
    """Skeleton of an encoder for the latent sites of the one LVEBM in a model.

    A subclass says how many outputs its encoder has (`_num_outputs`) and what they mean (`_law`),
    in coordinates whitened by base_z. The last layer starts at zero, so q starts where all
    outputs are zero. Where entries of x are missing, a second network of the same kind gives
    their law first, in coordinates whitened by base_x given the observed entries. Where the LVEBM
    is conditional, both see the contexts too, standardised by those of the first minibatch.
    """

    prototype_trace: Any  # a `Trace`; None before the first call
    context_loc: Tensor  # mean of each entry of a flattened context; only where there are contexts
    context_scale: Tensor  # and its standard deviation

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        observations: Callable[..., Tensor] | None = None,
        hidden: Sequence[int] = (128, 128),
        seed: int = 0,
    ) -> None:
        check_widths(hidden)
        super().__init__(model)
        self._observations = (lambda x, *_, **__: x) if observations is None else observations
        self._hidden, self._seed = tuple(hidden), seed
        self._rows = KnownRows()

    @staticmethod
    def _num_outputs(dim: int) -> int:
        """Return the number of outputs for a latent with `dim` entries."""
        raise NotImplementedError

    @staticmethod
    def _law(outputs: Tensor, base: GaussianBase) -> dist.TorchDistribution:
        """Return q (*b,) over events of base_z, for outputs (*b, num_outputs)."""
        raise NotImplementedError

    @staticmethod
    def _of_missing(missing: Tensor) -> Tensor:
        """Return which outputs (*b, num_outputs) are about missing entries (*b, d) alone."""
        raise NotImplementedError

    def _read_plates(self, *args: Any, **kwargs: Any) -> SiteInputs:
        """Learn the latent site and its plates from a run of the model, and return its inputs."""
        before = self.prototype_trace, dict(self._prototype_frames)
        super()._setup_prototype(*args, **kwargs)
        sites = dict(self.prototype_trace.iter_stochastic_nodes())
        names = [n for n, s in sites.items() if isinstance(s["fn"], LatentSite)]
        missing = [n for n, s in sites.items() if isinstance(s["fn"], MissingSite)]
        expected = [[n, n.removesuffix("_z") + "_missing"][: len(sites)] for n in names]
        if [*names, *missing] not in expected or len(sites) != len(names) + len(missing):
            # A trained encoder must not be taken for one that was never built.
            self.prototype_trace, self._prototype_frames = before
            raise ValueError(
                f"{type(self).__name__} needs a model whose only latents are the z of one LVEBM "
                f"and its missing entries; got {sorted(sites)}. Hide the others with poutine.block"
            )
        self._name, self._missing = names[0], missing[0] if missing else None
        self._site = sites[self._name]
        try:
            inputs = self._inputs({}, args, kwargs)
            self._rows_of(inputs, args, kwargs)
        except DataError:
            self.prototype_trace, self._prototype_frames = before
            raise
        return inputs

    def _inputs(
        self, rows: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> SiteInputs:
        """Return what the model gives the site at these rows, by plate."""
        if self._missing is None and self._site["fn"].ebm.context_shape is None:
            return SiteInputs(rows=rows)
        return read_inputs(self.model, self._name, self._missing, rows, args, kwargs)

    def _rows_of(self, inputs: SiteInputs, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the observations (*b, *x_shape) of the minibatch."""
        x = self._observations(*args, **kwargs)
        for frame in self._site["cond_indep_stack"]:
            axis = x.dim() - len(self._site["fn"].ebm.x_shape) + frame.dim
            indices = inputs.rows.get(frame.name)
            if indices is not None and len(indices) != x.shape[axis]:
                x = x.index_select(axis, indices)
        if inputs.observed is not None:
            check_observed(x, inputs.observed, type(self).__name__)
        return x

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        context = self._read_plates(*args, **kwargs).context
        ebm = self._site["fn"].ebm
        base_x, base_z, num_contexts = ebm.base_x, ebm.base_z, 0
        if context is not None:
            flat = context.detach().reshape(-1, ebm.context_shape.numel())
            num_contexts = flat.shape[1]
            loc, scale, constant = moments(flat)
            self.register_buffer("context_loc", loc)
            # An entry may be constant in one minibatch, as that of a rare class.
            self.register_buffer("context_scale", torch.where(constant, 1.0, scale))
        self.encoder = self._network(base_x.dim + num_contexts, base_z.dim).to(base_x.loc)
        if self._missing is not None:
            num_inputs = 2 * base_x.dim + num_contexts
            self.completer = self._network(num_inputs, base_x.dim).to(base_x.loc)

    def _network(self, num_inputs: int, dim: int) -> nn.Module:
        """Return a network with the outputs of a law in `dim` dimensions, all of them zero."""
        return zero_network([num_inputs, *self._hidden, self._num_outputs(dim)], self._seed)

    def _follow_rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the plates of these arguments; the encoder is for any number of rows."""
        if self.master is not None:
            self._rows.check(self, args, kwargs)  # the plates are those of the list
        elif self._rows.changed(self, args, kwargs):
            self._read_plates(*args, **kwargs)

    def encode(self, x: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        """Return q(z | x), of batch shape (*b,), for complete x (*b, *x_shape).

        Where the LVEBM is conditional it is q(z | x, c), for contexts (*b, *context_shape).

        Raises:
            ValueError: If entries of x are NaN, or there is a context and should be none, or the
                other way round.
        """
        if x.isnan().any():
            raise DataError(
                "x has NaN, and q(z | x) is that of complete rows. Where entries are missing, the "
                "guide itself draws them and z, if they were missing at its first call too: then "
                "every minibatch must open the site of missing entries (observed=...)"
            )
        return self._law_of_z(x, context)

    def _law_of_z(self, x: Tensor, context: Tensor | None) -> dist.TorchDistribution:
        ebm = self._site["fn"].ebm
        outputs = self.encoder(self._beside(ebm.base_x.whiten(x), context))
        return self._law(outputs, ebm.base_z)

    def _beside(self, seen: Tensor, context: Tensor | None) -> Tensor:
        """Return what is seen of x (*b, n) with the standardised contexts beside it."""
        batch = seen.shape[:-1]
        given = expand_context(context, self._site["fn"].ebm.context_shape, batch)
        flat = [(c.reshape(*batch, -1) - self.context_loc) / self.context_scale for c in given]
        return torch.cat([seen, *flat], -1)

    def encode_missing(self, x: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        """Return q(x_m | x_o), of batch shape (*b,), for x (*b, *x_shape) with NaN.

        It is the law of the site `{name}_missing`, over events of the shape of x. Where x is
        observed, it is that of the site itself. Where the LVEBM is conditional it is
        q(x_m | x_o, c), for contexts (*b, *context_shape).
        """
        return self._law_of_missing(self._completion(x), context)

    def _completion(self, x: Tensor) -> Completion:
        return Completion(self._site["fn"].ebm.base_x, x, ~x.isnan())

    def _law_of_missing(
        self, completion: Completion, context: Tensor | None
    ) -> dist.TorchDistribution:
        outputs = self.completer(self._beside(features(completion), context))
        zeros = completion.mean.new_zeros(completion.dim)
        standard = GaussianBase(zeros, zeros + 1.0)
        # At observed entries all outputs are zero: the standard normal that the site has there.
        law = self._law(outputs * self._of_missing(~completion.observed), standard)
        return law_of_entries(law, completion)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample the latent of every row of the minibatch."""
        rows = self._rows.given(self, args, kwargs)
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        self._follow_rows(args, kwargs)
        plates = open_plates(self, rows, args, kwargs)
        frames = self._site["cond_indep_stack"]
        inputs = self._inputs({f.name: plates[f.name]._indices for f in frames}, args, kwargs)
        x, context = self._rows_of(inputs, args, kwargs), inputs.context
        with ExitStack() as stack:
            for frame in frames:
                stack.enter_context(plates[frame.name])
            if self._missing is None:
                return {self._name: pyro.sample(self._name, self.encode(x, context))}
            completion = self._completion(x)
            entries = pyro.sample(self._missing, self._law_of_missing(completion, context))
            whole = completion.complete(entries)
            z = pyro.sample(self._name, self._law_of_z(whole, context))
            return {self._missing: entries, self._name: z}
