# SPDX-License-Identifier: Apache-2.0
"""An LVEBM in a folder that says what it is: settings as JSON, numbers as safetensors."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyro.distributions.constraints
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyro_lvebm.bases import GaussianBase, GeneratorBase, MixtureBase, Support
from pyro_lvebm.energies import (
    ConjugateEnergy,
    MLPEnergy,
    QuadraticEnergy,
    WhitenedEnergy,
    ZeroEnergy,
)
from pyro_lvebm.generators import ConvGenerator, MLPGenerator
from pyro_lvebm.pools import ContextPool, PersistentPool, Pool, TemperedPool
from pyro_lvebm.sampling import MALA, ULA

FORMAT = "pyro_lvebm lvebm 1"

DESCRIPTION, NUMBERS = "model.json", "model.safetensors"


@dataclass(frozen=True)
class Description:
    """What a folder says of its LVEBM besides numbers.

    Attributes:
        columns: Names of the entries of x, flattened; empty if there are none.
        transforms: What was done to data before they became x, in this order, as JSON.
        versions: Of the packages that wrote it.
    """

    columns: tuple[str, ...] = ()
    transforms: tuple[dict[str, Any], ...] = ()
    versions: dict[str, str] = field(default_factory=dict)


@dataclass
class Parts:
    """The parts of an LVEBM, to be put together."""

    energy: nn.Module
    base_x: GaussianBase
    base_z: GaussianBase
    pool: Pool
    context_shape: torch.Size | None
    context: Tensor | None
    tensors: dict[str, Tensor]
    fresh: bool


_GENERATORS: dict[type, Callable[[Any], dict[str, Any]]] = {
    MLPGenerator: lambda g: {
        "z_dim": g.z_dim,
        "x_shape": list(g.x_shape),
        "hidden": [layer.out_features for layer in g.hidden],
        "scale": g.scale,
    },
    ConvGenerator: lambda g: {
        "z_dim": g.z_dim,
        "x_shape": list(g.x_shape),
        "channels": g.channels,
    },
}

_ENERGIES: dict[type, Callable[[Any], dict[str, Any]]] = {
    MLPEnergy: lambda f: {
        "x_dim": f.x_dim,
        "z_dim": f.z_dim,
        "hidden": [layer.out_features for layer in f.hidden],
        "fourier_features": f.frequencies.shape[1],
        "context_dim": f.context_dim,
        "kl_penalty": f.kl_penalty,
    },
    ConjugateEnergy: lambda f: {
        "x_dim": f.x_dim,
        "z_dim": f.z_dim,
        "hidden": list(f.hidden),
        "fourier_features": f.frequencies.shape[1],
        "kl_penalty": f.kl_penalty,
    },
    QuadraticEnergy: lambda f: {
        "x_dim": f.x_dim,
        "z_dim": f.z_dim,
        "context_dim": 0 if f.by_context is None else len(f.by_context),
    },
    ZeroEnergy: lambda f: {"x_dim": f.x_dim, "z_dim": f.z_dim},
}

_KERNELS: dict[str, type] = {"MALA": MALA, "ULA": ULA}

_POOLS: dict[type, Callable[[Any], dict[str, Any]]] = {
    TemperedPool: lambda p: {
        "num_levels": p.num_levels,
        "num_chains": p.num_chains,
        "kernel": _kernel(p.kernel),
    },
    PersistentPool: lambda p: {"num_chains": p.num_chains, "kernel": _kernel(p.kernel)},
    ContextPool: lambda p: {"num_levels": p.num_levels, "num_contexts": p.num_contexts},
}


def _kernel(kernel: Any) -> dict[str, Any]:
    return {"class": type(kernel).__name__, "target_acceptance": kernel.target_acceptance}


def write_lvebm(
    ebm: Any,
    folder: Path,
    *,
    columns: Sequence[str],
    transforms: Sequence[Mapping[str, Any]],
    overwrite: bool,
) -> None:
    """Write an LVEBM; `LVEBM.save` says how."""
    tensors = {
        name: value
        for name, value in ebm.state_dict().items()
        if not name.startswith(("f.base_x.", "f.base_z."))  # they are those of the LVEBM
    }
    names = list(columns)
    if names and len(names) != ebm.x_shape.numel():
        raise ValueError(f"{len(names)} columns are named; x has {ebm.x_shape.numel()} entries")
    held = ebm.context is not None
    shape = ebm._held_shape if held else ebm.context_shape
    described: dict[str, Any] = {
        "format": FORMAT,
        "energy": _described(ebm.f, _ENERGIES, "energy"),
        "base_x": _describe_base(ebm.base_x, "base_x", tensors),
        "base_z": _describe_base(ebm.base_z, "base_z", tensors),
        "pool": _described(ebm.pool, _POOLS, "pool")
        | {"site": ebm.pool.site, "fresh": ebm.pool_is_fresh()},
        "context_shape": None if shape is None else list(shape),
        "held_context": held,
        "dtype": str(ebm.base_x.loc.dtype).removeprefix("torch."),
        "columns": names,
        "transforms": [dict(transform) for transform in transforms],
        "versions": {name: version(name) for name in ("pyro-lvebm", "torch", "pyro-ppl")},
    }
    described["pool"]["settings"] |= {"num_moves": ebm.pool.num_moves, "seed": ebm.pool.seed}
    try:
        text = json.dumps(described, indent=2, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"transforms must be JSON: {error}") from error
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"'{folder}' is a file; a model is a folder")
    for name in (DESCRIPTION, NUMBERS):
        if not overwrite and os.path.lexists(folder / name):
            raise ValueError(
                f"'{folder / name}' exists; give overwrite=True to replace it, or another folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors refuses tensors that share memory, so every tensor is written as its own copy.
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    _replace(folder / NUMBERS, lambda path: save_file(plain, path))
    _replace(folder / DESCRIPTION, lambda path: Path(path).write_text(text + "\n", "utf-8"))


def _replace(path: Path, write: Callable[[str], Any]) -> None:
    """Write a file whole or not at all, in the place of a link rather than where it points."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = str(Path(folder) / path.name)
        write(temporary)
        os.replace(temporary, path)


def _described(
    part: Any, known: dict[type, Callable[[Any], dict[str, Any]]], role: str
) -> dict[str, Any]:
    describe = known.get(type(part))
    if describe is None:
        kind = type(part)
        raise ValueError(
            f"the {role} is a {kind.__module__}.{kind.__qualname__}, whose code a model file "
            f"cannot hold; it holds {', '.join(k.__name__ for k in known)}. Save the state of a "
            "fit by Saddle.save, or of the LVEBM by torch.save(ebm.state_dict(), path), and build "
            "the LVEBM in code before it is loaded"
        )
    return {"class": type(part).__name__, "settings": describe(part)}


def _describe_base(base: GaussianBase, role: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if type(base) not in (GaussianBase, MixtureBase, GeneratorBase):
        kind = type(base)
        raise ValueError(
            f"{role} is a {kind.__module__}.{kind.__qualname__}, whose code a model file cannot "
            "hold; use Saddle.save, or a Gaussian, a MixtureBase or a GeneratorBase"
        )
    own: dict[str, Any] = {}
    if isinstance(base, GeneratorBase):
        own = {
            "z_shape": list(base.z_shape),
            "noise": base.noise,
            "noise_penalty": base.noise_penalty,
            "generator": None,
        }
        if base.generator is not None:
            own["generator"] = _described(base.generator, _GENERATORS, "generator")
    return own | {
        "class": type(base).__name__,
        "event_shape": list(base.event_shape),
        "diagonal": base.diagonal,
        "support": _describe_support(base.support.core, f"{role}.support", tensors),
    }


def _describe_support(constraint: Any, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A constraint as JSON, with its tensors among those of the file."""
    name = _constraint_name(constraint)
    result: dict[str, Any] = {"constraint": name}
    for key, value in vars(constraint).items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}.{key}"] = value
            result[key] = {"tensor": f"{prefix}.{key}"}
        elif isinstance(value, Constraint):
            result[key] = _describe_support(value, f"{prefix}.{key}", tensors)
        elif isinstance(value, list) and all(isinstance(part, Constraint) for part in value):
            result[key] = [
                _describe_support(part, f"{prefix}.{key}.{k}", tensors)
                for k, part in enumerate(value)
            ]
        else:
            result[key] = value
    return result


_MODULES = (constraints, pyro.distributions.constraints)


def _constraint_name(constraint: Any) -> str:
    for module in _MODULES:
        for name, value in vars(module).items():
            if not name.startswith("_") and (value is type(constraint) or value is constraint):
                return name
        for name, value in vars(module).items():
            if isinstance(value, Constraint) and type(value) is type(constraint):
                return name
    kind = type(constraint)
    raise ValueError(
        f"support {constraint} is a {kind.__module__}.{kind.__qualname__}, which a model file "
        "cannot hold; use Saddle.save, and build the LVEBM in code before it is loaded"
    )


def read_lvebm(folder: Path) -> tuple[Parts, Description]:
    """Read the parts of an LVEBM that `write_lvebm` wrote; nothing in a file is executed.

    Raises:
        ValueError: If files are missing, damaged or of another kind.
    """
    for name in (DESCRIPTION, NUMBERS):
        if not (folder / name).is_file():
            raise ValueError(
                f"no model in '{folder}': {name} is not there; expected a folder of LVEBM.save"
            )
    try:
        described = json.loads((folder / DESCRIPTION).read_text("utf-8"))
        with safe_open(folder / NUMBERS, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"'{folder}' holds no readable model: {error}") from error
    found = described.get("format") if isinstance(described, dict) else None
    if found != FORMAT:
        raise ValueError(f"'{folder}' has format {found!r}; expected {FORMAT!r}")
    try:
        return _parts(described, tensors), Description(
            tuple(str(name) for name in described["columns"]),
            tuple(dict(transform) for transform in described["transforms"]),
            {str(k): str(v) for k, v in described["versions"].items()},
        )
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, ValueError) as error:
        raise ValueError(f"'{folder}' is no model that LVEBM.save wrote: {error!r}") from error


def _parts(described: dict[str, Any], tensors: dict[str, Tensor]) -> Parts:
    dtype = getattr(torch, str(described["dtype"]))
    base_x, base_z = (_base(described[role], role, tensors) for role in ("base_x", "base_z"))
    energies = {kind.__name__: kind for kind in _ENERGIES}
    pools = {kind.__name__: kind for kind in _POOLS}
    energy = energies[described["energy"]["class"]](**described["energy"]["settings"])
    energy.to(dtype)
    if isinstance(energy, WhitenedEnergy):
        energy.bind(base_x.coordinates(), base_z)
    settings = dict(described["pool"]["settings"])
    if "kernel" in settings:
        kernel = settings["kernel"]
        made = _KERNELS[kernel["class"]](target_acceptance=kernel["target_acceptance"])
        settings["kernel"] = made
    pool = pools[described["pool"]["class"]](**settings)
    pool.site = str(described["pool"]["site"])
    shape = described["context_shape"]
    context_shape = None if shape is None else torch.Size(shape)
    context = tensors["context"] if described["held_context"] else None
    kept = {k: v for k, v in tensors.items() if ".support." not in k}
    return Parts(
        energy,
        base_x,
        base_z,
        pool,
        context_shape,
        context,
        kept,
        bool(described["pool"]["fresh"]),
    )


def _base(described: dict[str, Any], role: str, tensors: dict[str, Tensor]) -> GaussianBase:
    loc, scale = tensors[f"{role}.loc"], tensors[f"{role}.scale"]
    constraint = _constraint(described["support"], tensors)
    support = Support(constraint, torch.Size(described["event_shape"]))
    shape = support.unconstrained_shape
    scale = scale.reshape(shape) if described["diagonal"] else scale
    base = GaussianBase(loc.reshape(shape), scale, support)
    if described["class"] == "GaussianBase":
        return base
    if described["class"] == "GeneratorBase":
        network = described["generator"]
        if network is not None:
            kinds = {kind.__name__: kind for kind in _GENERATORS}
            network = kinds[network["class"]](**network["settings"])
        return GeneratorBase(
            base,
            network,
            torch.Size(described["z_shape"]),
            described["noise"],
            noise_penalty=described.get("noise_penalty"),
        )
    if described["class"] != "MixtureBase":
        raise ValueError(f"{role} is a {described['class']}")
    parts = (tensors[f"{role}.{name}"] for name in ("log_weights", "means", "trils"))
    return MixtureBase(base, *parts)


def _constraint(described: Mapping[str, Any], tensors: dict[str, Tensor]) -> Any:
    name = str(described["constraint"])
    for module in _MODULES:
        if not name.startswith("_") and hasattr(module, name):
            break
    else:
        raise ValueError(f"no constraint is called {name!r}")
    made = getattr(module, name)
    settings = {
        key: _setting(value, tensors) for key, value in described.items() if key != "constraint"
    }
    if isinstance(made, Constraint) and not settings:
        return made
    kind = made if isinstance(made, type) else type(made)
    if not issubclass(kind, Constraint):
        raise ValueError(f"{name!r} is no constraint")
    constraint = kind.__new__(kind)
    vars(constraint).update(settings)
    return constraint


def _setting(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        return (
            tensors[value["tensor"]] if value.keys() == {"tensor"} else _constraint(value, tensors)
        )
    if isinstance(value, list):
        return [_setting(part, tensors) if isinstance(part, dict) else part for part in value]
    return value
