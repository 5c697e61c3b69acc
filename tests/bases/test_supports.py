# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pyro.distributions.constraints as pyro_constraints
import pytest
import torch
from referee import normal
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyro_lvebm.bases.supports import Support
from pyro_lvebm.validation import DataError

BOUNDS = constraints.interval(torch.tensor([-1.0, 2.0]), torch.tensor([0.5, 7.0]))
COLUMNS = [constraints.positive, constraints.real, constraints.unit_interval]

ELEMENTWISE: list[tuple[Constraint, tuple[int, ...]]] = [
    (constraints.real, (2, 3)),
    (constraints.positive, (3,)),
    (constraints.nonnegative, (1,)),
    (constraints.greater_than(-2.0), (2, 2)),
    (constraints.less_than(4.0), (3,)),
    (constraints.unit_interval, (2, 3)),
    (constraints.interval(-1.0, 3.0), (1,)),
    (constraints.half_open_interval(0.0, 2.0), (2,)),
    (BOUNDS, (2,)),
    (BOUNDS, (3, 2)),
    (constraints.independent(constraints.positive, 1), (3,)),
    (constraints.stack(COLUMNS, dim=-1), (3,)),
    (constraints.cat(COLUMNS, dim=-1, lengths=[2, 1, 2]), (2, 5)),
    (pyro_constraints.softplus_positive, (2,)),
]
COUPLED: list[tuple[Constraint, tuple[int, ...]]] = [
    (constraints.simplex, (2,)),
    (constraints.simplex, (4,)),
    (constraints.simplex, (2, 3)),
    (pyro_constraints.ordered_vector, (3,)),
    (pyro_constraints.positive_ordered_vector, (3,)),
    (constraints.corr_cholesky, (3, 3)),
]


def names(cases: list[tuple[Constraint, tuple[int, ...]]]) -> list[str]:
    return [f"{c}{list(shape)}".replace("\n", "") for c, shape in cases]


def free_entries(support: Support, x: Tensor) -> Tensor:
    """As many entries of x (*event) as there are unconstrained ones, flattened."""
    if support.unconstrained_shape == support.event_shape:
        return x.flatten()
    if "Simplex" in str(support):
        return x[..., :-1].flatten()
    rows, columns = torch.tril_indices(*support.event_shape, -1)
    return x[rows, columns]


@pytest.mark.parametrize(
    ("constraint", "shape"), ELEMENTWISE + COUPLED, ids=names(ELEMENTWISE + COUPLED)
)
def test_the_bijection_and_its_jacobian(constraint: Constraint, shape: tuple[int, ...]) -> None:
    support = Support(constraint, torch.Size(shape)).map_tensors(lambda t: t.double())
    y = normal((2, 3, *support.unconstrained_shape), 1)
    x = support.constrain(y)
    assert x.shape == (2, 3, *shape) and support.constraint.check(x).all()
    torch.testing.assert_close(support.unconstrain(x), y)
    log_det = support.log_abs_det(y, x)
    assert log_det.shape == (2, 3)

    def flat(v: Tensor) -> Tensor:
        return free_entries(support, support.constrain(v.reshape(support.unconstrained_shape)))

    for index in ((0, 0), (1, 2)):
        jacobian = torch.autograd.functional.jacobian(flat, y[index].flatten())
        expected = torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(log_det[index], expected)
        assert support.is_real == torch.equal(jacobian, torch.eye(len(jacobian)).double())
        diagonal = torch.equal(jacobian, jacobian.diag().diag())
        assert support.elementwise == (diagonal and len(jacobian) == math.prod(shape))
        if support.elementwise:
            each = support.log_derivatives(y, x)[index].flatten()
            torch.testing.assert_close(each.exp(), jacobian.diagonal().abs())


@pytest.mark.parametrize(("constraint", "shape"), ELEMENTWISE, ids=names(ELEMENTWISE))
def test_elementwise_supports(constraint: Constraint, shape: tuple[int, ...]) -> None:
    support = Support(constraint, torch.Size(shape))
    assert support.elementwise and support.unconstrained_shape == shape
    assert support.constraint.event_dim == len(shape)


@pytest.mark.parametrize(("constraint", "shape"), COUPLED, ids=names(COUPLED))
def test_supports_that_tie_entries_together(constraint: Constraint, shape: tuple[int, ...]) -> None:
    assert not Support(constraint, torch.Size(shape)).elementwise


@pytest.mark.parametrize("dropped", range(4))
def test_on_the_simplex_it_does_not_matter_which_entry_has_no_axis(dropped: int) -> None:
    support = Support(constraints.simplex, torch.Size([4]))
    y = normal((3,), 2)
    jacobian = torch.autograd.functional.jacobian(support.constrain, y)
    kept = jacobian[[k for k in range(4) if k != dropped]]
    log_det = support.log_abs_det(y, support.constrain(y))
    torch.testing.assert_close(log_det, torch.linalg.slogdet(kept).logabsdet)


@pytest.mark.parametrize(
    ("constraint", "shape", "message"),
    [
        ("positive", (2,), "must be one of torch.distributions.constraints.*got str"),
        (constraints.boolean, (2,), "no bijection.*Boolean.*dequantise"),
        (constraints.nonnegative_integer, (2,), "no bijection.*dequantise"),
        (constraints.positive_definite, (2, 2), "no bijection.*PositiveDefinite"),
        (constraints.dependent, (2,), "no bijection.*Dependent"),
        (pyro_constraints.sphere, (3,), "no bijection.*Sphere"),
        (constraints.simplex, (), "needs x with 1 event axes"),
        (constraints.simplex, (1,), "no usable bijection to x of shape \\(1,\\)"),
        (constraints.corr_cholesky, (3,), "needs x with 2 event axes"),
        (constraints.stack(COLUMNS, dim=-1), (2,), "does not fit x of shape \\(2,\\)"),
        (constraints.stack(COLUMNS, dim=0), (3,), "needs a negative dim.*dim=0"),
        (
            constraints.cat([constraints.simplex, constraints.real], -1, [3, 1]),
            (4,),
            "parts that constrain single entries",
        ),
        (BOUNDS, (3,), "does not fit x of shape \\(3,\\)"),
    ],
)
def test_supports_without_a_bijection(
    constraint: Any, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Support(constraint, torch.Size(shape))


NAN = math.nan


@pytest.mark.parametrize(
    ("constraint", "row", "message"),
    [
        (constraints.positive, [1.0, 0.0], r"1 of 6 entries.*x\[2, 1\] = 0, lie on the boundary"),
        (constraints.nonnegative, [0.0, 0.0], r"2 of 6 entries.*x\[2, 0\] = 0, .* boundary"),
        (constraints.positive, [-3.5, NAN], r"x\[2, 0\] = -3.5, lie outside"),
        (constraints.unit_interval, [0.0, 0.5], "on the boundary"),
        (constraints.unit_interval, [0.5, 1.0], "on the boundary"),
        (constraints.unit_interval, [0.5, 1.5], "outside"),
        (constraints.interval(-1.0, 3.0), [3.0, 0.0], "on the boundary of support Interval"),
        (constraints.less_than(4.0), [4.0, 0.0], "on the boundary"),
        (constraints.less_than(4.0), [5.0, 0.0], "outside"),
        (
            constraints.stack([constraints.real, constraints.positive], -1),
            [0.0, 0.0],
            r"x\[2, 1\] = 0, lie on the boundary of support Cat\(Real\(\), GreaterThan",
        ),
        (constraints.simplex, [1.0, 0.0], r"1 of 3 rows.*x\[2\] = 1, 0, lie on the boundary"),
        (constraints.simplex, [0.4, 0.5], r"x\[2\] = 0.4, 0.5, lie outside support Simplex"),
        (constraints.simplex, [1.5, -0.5], "outside support Simplex"),
        (constraints.simplex, [NAN, 0.5], "ties the entries of an x together"),
        (constraints.simplex, [1 - 1e-6, 1e-6], "float32 does not resolve.*float64"),
        (pyro_constraints.ordered_vector, [0.3, 0.2], "outside support OrderedVector"),
    ],
)
def test_data_without_unconstrained_coordinates(
    constraint: Constraint, row: list[float], message: str
) -> None:
    support = Support(constraint, torch.Size([2]))
    good = support.constrain(normal((2, *support.unconstrained_shape), 3).float())
    support.check(good)
    with pytest.raises(DataError, match=message):
        support.check(torch.cat([good, torch.tensor([row])]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("constraint", "shape"), ELEMENTWISE + COUPLED[:4])
def test_inner_values_pass(
    constraint: Constraint, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Also zero on an interval around it, and values six standard deviations out."""
    support = Support(constraint, torch.Size(shape)).map_tensors(lambda t: t.to(dtype))
    y = 2.0 * normal((500, *support.unconstrained_shape), 4).to(dtype).clamp(-3, 3)
    support.check(support.constrain(y))
    if str(support).startswith("Interval(lower_bound=-1"):
        support.check(torch.zeros(3, 1, dtype=dtype))


def test_values_under_the_mask_are_not_looked_at() -> None:
    support = Support(constraints.positive, torch.Size([2]))
    x, seen = torch.tensor([[1.0, -1.0]]), torch.tensor([[True, False]])
    support.check(x, seen)
    with pytest.raises(DataError, match="outside"):
        support.check(x, ~seen)


def test_in_float64_a_simplex_resolves_what_float32_does_not() -> None:
    support = Support(constraints.simplex, torch.Size([2]))
    row = torch.tensor([[1 - 1e-6, 1e-6]], dtype=torch.float64)
    support.check(row)
    with pytest.raises(DataError, match="float64 does not resolve"):
        support.check(torch.tensor([[1.0 - 1e-16, 1e-17]], dtype=torch.float64))
    # The entry that stick-breaking sees last is what matters.
    support.check(row.flip(-1).float())


def test_bounds_that_are_tensors_are_mapped_without_changing_the_original() -> None:
    support = Support(BOUNDS, torch.Size([2]))
    wide = support.map_tensors(lambda t: t.double())
    assert wide.constrain(torch.zeros(2).double()).dtype == torch.float64
    assert support.constrain(torch.zeros(2)).dtype == torch.float32
    assert str(wide) == str(support) and BOUNDS.lower_bound.dtype == torch.float32
    other = constraints.interval(BOUNDS.lower_bound, BOUNDS.upper_bound + 1.0)
    assert str(Support(other, torch.Size([2]))) != str(support)


@pytest.mark.parametrize(
    ("constraint", "shape"), ELEMENTWISE + COUPLED, ids=names(ELEMENTWISE + COUPLED)
)
def test_supports_are_copied_and_pickled(constraint: Constraint, shape: tuple[int, ...]) -> None:
    support = Support(constraint, torch.Size(shape))
    y = normal(tuple(support.unconstrained_shape), 5).float()
    for other in (copy.deepcopy(support), pickle.loads(pickle.dumps(support))):
        assert torch.equal(other.constrain(y), support.constrain(y))
        assert str(other) == str(support)
