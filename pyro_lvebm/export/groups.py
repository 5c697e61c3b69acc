# SPDX-License-Identifier: Apache-2.0
"""Named arrays as groups of either generation of ArviZ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from pyro_lvebm.comparison import ElboTable
from pyro_lvebm.sites import Node

SAMPLE_DIMS = ("chain", "draw")


@dataclass
class Axes:
    """Names and coordinates of the axes of every variable.

    Args:
        dims: For a variable, names of its last axes, such as those of its event.
        coords: For the name of an axis, its labels.
    """

    dims: Mapping[str, Sequence[str]] = field(default_factory=dict)
    coords: Mapping[str, Sequence[Any] | np.ndarray] = field(default_factory=dict)
    _used: set[str] = field(default_factory=set)

    def dataset(
        self,
        values: Mapping[str, Tensor | np.ndarray],
        sites: Mapping[str, Node | None],
        lead: tuple[str, ...] = (),
    ) -> Any:
        """Return an `xarray.Dataset` of some variables.

        Args:
            values: Arrays (*lead, *batch, *event) by name; they are not copied.
            sites: By name, the site whose plates name the batch axes; None for no site.
            lead: Names of the first axes.

        Raises:
            ValueError: If there are more names than axes, or a coordinate is of another length.
        """
        import xarray as xr

        variables, lengths = {}, dict[str, int]()
        for name, value in values.items():
            array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
            names = (*lead, *self._names(name, array.ndim - len(lead), sites.get(name)))
            variables[name] = (names, array)
            lengths |= dict(zip(names, array.shape, strict=True))
        coords = {axis: self._labels(axis, length) for axis, length in lengths.items()}
        return xr.Dataset(variables, coords)

    def _names(self, name: str, count: int, site: Node | None) -> list[str]:
        plates = [] if site is None else plate_names(site)[:count]
        rest = range(count - len(plates))
        names = plates + [f"{name}_dim_{axis}" for axis in rest]
        own = list(self.dims.get(name, ()))
        if len(own) > count:
            raise ValueError(
                f"dims names {len(own)} axes of '{name}', which has {count} after chain and draw"
            )
        self._used |= {name, *names[: count - len(own)], *own}
        return names[: count - len(own)] + own

    def _labels(self, axis: str, length: int) -> np.ndarray:
        if axis in SAMPLE_DIMS or axis not in self.coords:
            return np.arange(length)
        labels = np.asarray(self.coords[axis])
        if labels.shape != (length,):
            raise ValueError(
                f"coords has labels of shape {labels.shape} for '{axis}', which has {length} places"
            )
        return labels

    def check_used(self) -> None:
        """Refuse names that belong to nothing, which are typing errors.

        Raises:
            ValueError: If there are any.
        """
        for what, given in (("dims", self.dims), ("coords", self.coords)):
            unknown = sorted(set(given) - self._used)
            if unknown:
                raise ValueError(
                    f"{what} names {unknown}, which are not in the export; it has "
                    f"{sorted(self._used)}"
                )


def plate_names(site: Node) -> list[str]:
    """Return the plates of a site, left to right, or nothing where other axes are among them."""
    frames = sorted(site["cond_indep_stack"], key=lambda frame: frame.dim)
    names = [frame.name for frame in frames if frame.vectorized]
    return names if len(names) == len(site["fn"].batch_shape) else []


def table_dataset(table: ElboTable) -> Any:
    """Return an ELBO table, and the brackets of its log Z, as an `xarray.Dataset`."""
    import xarray as xr

    brackets = ("estimate", "std_error", "lower", "upper")
    return xr.Dataset(
        {  # converged is 1, 0, or NaN where it is not known
            name: ("posterior", column.to_numpy(float if column.dtype == object else None))
            for name, column in table.rows.items()
        }
        | {
            f"log_partition_{name}": (
                "log_partition",
                np.array([getattr(log_z, name) for log_z in table.log_partitions]),
            )
            for name in brackets
        },
        coords={"posterior": [str(name) for name in table.rows.index]},
        attrs={
            "theta": table.theta,
            "num_data": table.num_data,
            "log_evidence": table.log_evidence,
            "log_evidence_se": table.log_evidence_se,
        },
    )


def as_arviz(groups: dict[str, Any], attrs: dict[str, Any]) -> Any:
    """Return datasets by group as the installed generation of ArviZ has them."""
    # Imported here, for ArviZ 0.23 warns once a day on import, which would reach every user of
    # this package, also those who export nothing.
    import arviz as az

    if int(az.__version__.split(".")[0]) >= 1:
        import xarray as xr

        tree = xr.DataTree.from_dict(groups)
        tree.attrs.update(attrs)
        return tree
    return az.InferenceData(attrs=attrs, warn_on_custom_groups=False, **groups)
