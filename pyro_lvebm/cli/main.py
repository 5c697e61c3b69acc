# SPDX-License-Identifier: Apache-2.0
"""The command line: `python -m pyro_lvebm` with `fit`, `demo`, `score`, `sample` and `impute`.

Only the standard library is imported before a command is known: torch takes seconds.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pyro_lvebm.cli.settings import BASES, JobSettings

if TYPE_CHECKING:
    import pandas as pd

    from pyro_lvebm.cli.job import JobResult
    from pyro_lvebm.cli.saved import Saved
    from pyro_lvebm.data import Frame, Table

OUTPUTS = {
    "model.safetensors": "the fit, to read with Saddle.load",
    "model": "a folder: the model, to read with LVEBM.load, score, sample and impute",
    "summary.json": "held-out log p(x), log Z bracket, baselines, seconds, seed, versions",
    "rows.csv": "of every row: part, log p(x) with its standard error, posterior of z",
    "elbo_table.csv": "ELBO and KL gap of every posterior, with standard errors",
    "figure.png": "data, model draws, ELBO table, training, log Z, held-out comparison",
    "latents.png": "E[x | z] over the latent plane with posteriors, of a generator with z in 2-D",
    "posterior.nc": "posterior draws for ArviZ",
}
"""Results of a fit, in the order in which they are written."""


_DEMO_VALIDATION = 0.1


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="pyro_lvebm",
        description="Fit a latent-variable energy-based model (LVEBM) by Langevin particles and "
        "compare it with variational guides.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    written = "Written to the output folder, each as soon as it exists:\n" + "\n".join(
        f"  {name:18s}  {what}" for name, what in OUTPUTS.items()
    )
    fit = commands.add_parser(
        "fit",
        help="fit an LVEBM to your own table of observations",
        description="Fit an LVEBM to a table of real numbers (rows = observations), print the "
        "ELBO table and the held-out log p(x) beside baselines. Cells that are empty or NA are "
        "missing.",
        epilog=written,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_data(fit)
    fit.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
    fit.add_argument(
        "--dequantise",
        type=_names,
        default=(),
        metavar="NAMES",
        help="columns, or all, whose values are spread by noise over what they were rounded to",
    )
    fit.add_argument(
        "--allow-repeats", action="store_true", help="fit columns whose values repeat as they are"
    )
    fit.add_argument(
        "--held-out",
        type=float,
        default=0.2,
        metavar="FRACTION",
        help="fraction of rows held out for evaluation (default: %(default)s)",
    )
    fit.add_argument(
        "--validation",
        type=float,
        default=0.1,
        metavar="FRACTION",
        help="fraction of the other rows that decides when to stop; 0 takes all steps "
        "(default: %(default)s)",
    )
    demo = commands.add_parser(
        "demo",
        help="fit an LVEBM to the handwritten digits of scikit-learn",
        description="The job of `fit` on 1,797 handwritten digits (64 dimensions), dequantised "
        "and logit-transformed; 360 of them are held out, and 144 decide when to stop.",
        epilog=written,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("demo"),
        metavar="DIR",
        help="output folder (default: %(default)s)",
    )
    for command, base in ((fit, "auto"), (demo, "generator")):
        command.add_argument(
            "--z-dim",
            type=_z_dim,
            default=2,
            metavar="N",
            help="number of latent dimensions, or auto (default: %(default)s)",
        )
        command.add_argument(
            "--base",
            choices=BASES,
            default=base,
            help="what the energy stands on; auto is decided by the validation rows "
            "(default: %(default)s)",
        )
        for name, default, what in (
            (
                "--steps",
                JobSettings.num_steps,
                "training steps, or fewer where validation rows stop them",
            ),
            (
                "--guide-steps",
                JobSettings.guide_steps,
                "training steps of every guide at most; it stops where its ELBO rests",
            ),
        ):
            command.add_argument(
                name, type=int, default=default, metavar="N", help=f"{what} (default: %(default)s)"
            )
        command.add_argument(
            "--resume",
            action="store_true",
            help="go on with the fit in the output folder, by the same command",
        )
        _add_common(command)
    for name, what in (
        ("score", "log p(x) of the rows of a table under a saved model"),
        ("sample", "rows drawn from a saved model"),
        ("impute", "the rows of a table with missing cells drawn from a saved model"),
    ):
        command = commands.add_parser(name, help=what, description=f"Write {what}, as .csv.")
        command.add_argument(
            "model", type=Path, metavar="MODEL", help="folder of a fit, or of LVEBM.save"
        )
        if name != "sample":
            _add_data(command)
        if name != "score":
            rows = name == "sample"
            command.add_argument(
                "--rows" if rows else "--draws",
                dest="number",
                type=int,
                default=1000 if rows else 1,
                metavar="N",
                help=f"{'rows' if rows else 'draws of each row'} (default: %(default)s)",
            )
        command.add_argument(
            "--out", type=Path, metavar="FILE", help="where to write; standard output if not given"
        )
        _add_common(command)
    return parser


def _add_data(command: argparse.ArgumentParser) -> None:
    command.add_argument("data", type=Path, metavar="DATA", help=".csv, .tsv, .npy or .npz file")
    frame = command.add_argument_group("how the table is read; by default the file decides")
    frame.add_argument(
        "--sep", type=_separator, metavar="C", help="what separates columns, such as ';' or tab"
    )
    frame.add_argument("--decimal", default=".", metavar="C", help="decimal mark (default: .)")
    frame.add_argument(
        "--header",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether the first row names columns",
    )
    frame.add_argument(
        "--index", metavar="NAME", help="column that labels rows and is no dimension, or none"
    )
    frame.add_argument(
        "--columns", type=_names, default=(), metavar="NAMES", help="columns to take, by commas"
    )
    frame.add_argument(
        "--drop", type=_names, default=(), metavar="NAMES", help="columns to leave out"
    )
    frame.add_argument(
        "--thousands", metavar="C", help="mark between thousands, as the comma of 1,234.5"
    )
    frame.add_argument(
        "--comment", metavar="C", help="lines that begin so are left out, as '#'; none takes all"
    )
    frame.add_argument("--encoding", metavar="NAME", help="encoding of the text, as latin-1")


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="fixes every random number (default: %(default)s)",
    )
    command.add_argument("--force", action="store_true", help="replace what is there already")
    command.add_argument("--quiet", action="store_true", help="no progress, nor what was read")


def _names(text: str) -> tuple[str, ...]:
    """Names by commas, as a row of a .csv, so that quotes may hold a comma."""
    import csv

    return tuple(name.strip() for name in next(csv.reader([text])) if name.strip())


def _z_dim(text: str) -> int | None:
    """A number, or None for "auto"."""
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"a number or auto, not {text!r}") from error


def _separator(text: str) -> str:
    return {"\\t": "\t", "tab": "\t"}.get(text, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Bad input is reported on standard error with 2. An interrupt from the keyboard ends with 130
    and SIGTERM with 143, after what is fitted so far has been saved.
    """
    args = build_parser().parse_args(argv)
    before = _written(args)
    try:
        with _terminable():
            if args.command in ("fit", "demo"):
                print(_fit(args))
            else:
                _use(args)
    except BrokenPipeError:  # whoever reads standard output, such as `head`, has enough
        sys.stdout = open(os.devnull, "w")  # or Python complains again when it ends
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        how, now = "nothing kept", _written(args)
        if now is not None and (now != before or args.resume):
            how = f"the fit so far is in {args.out}/, and --resume goes on"
        elif now is not None:
            how += f" of this fit; {args.out}/ is as it was"
        print(f"interrupted: {how}", file=sys.stderr)
        return 143 if isinstance(error, _Terminated) else 130
    return 0


def _written(args: argparse.Namespace) -> tuple[int, int] | None:
    """What tells the fit in the output folder from another, or None if there is none."""
    if args.command not in ("fit", "demo"):
        return None
    try:
        found = (args.out / "model.safetensors").stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a fit as an interrupt from the keyboard does."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Raise `_Terminated` at SIGTERM inside the block, where signals can be handled."""
    import signal
    import threading

    def stop(*_: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fit(args: argparse.Namespace) -> str:
    """Fit a table or the digits, and return what to print of it."""
    from pyro_lvebm.cli.job import run_job
    from pyro_lvebm.cli.output import OutputFolder
    from pyro_lvebm.data import load_digits_data, logit_of_levels, split_of_digits, split_table

    settings = JobSettings(
        z_dim=args.z_dim,
        num_steps=args.steps,
        guide_steps=args.guide_steps,
        seed=args.seed,
        base=args.base,
    )
    digits, transforms = None, []
    if args.command == "demo":
        digits = load_digits_data(args.seed)
        data = split_of_digits(digits, args.seed, _DEMO_VALIDATION)
        transforms = [logit_of_levels(digits.num_levels)]
    else:
        table = _read(args)
        table, transforms = _prepared(table, args)
        data = split_table(table, args.held_out, args.validation, args.seed)
    out = OutputFolder(args.out, list(OUTPUTS), force=args.force, resume=args.resume)
    result = run_job(
        data,
        out,
        settings,
        transforms=transforms,
        digits=digits,
        resume=args.resume,
        progress=not args.quiet,
    )
    return _report(result, args.out)


def _read(args: argparse.Namespace) -> Table:
    """Read the table, and say what was taken for what."""
    from pyro_lvebm.data import read_table

    table = read_table(args.data, _frame(args))
    if not args.quiet:
        print("\n  ".join(table.notes), file=sys.stderr)
    return table


def _for_model(args: argparse.Namespace, model: Saved) -> Table:
    """Read the table, and say which of its columns the model does not know."""
    table = _read(args)
    if unknown := model.unknown(table):
        listed = ", ".join(map(repr, unknown[:12])) + ", …" * (len(unknown) > 12)
        noun = f"columns {listed} are" if len(unknown) > 1 else f"column {listed} is"
        print(f"warning: {noun} not in the model, and ignored", file=sys.stderr)
    return table


def _frame(args: argparse.Namespace) -> Frame:
    from pyro_lvebm.data import Frame

    return Frame(
        args.sep,
        args.decimal,
        args.header,
        args.index,
        args.columns,
        args.drop,
        args.encoding,
        args.thousands,
        args.comment,
    )


def _prepared(table: Table, args: argparse.Namespace) -> tuple[Table, list[dict[str, object]]]:
    """Spread what is to be spread, and refuse what repeats; warnings become lines."""
    from dataclasses import replace

    from pyro_lvebm.data import apply, check_repeats, dequantisation

    transforms: list[dict[str, object]] = []
    if args.dequantise:
        transforms = [dequantisation(table, args.dequantise)]
        values = apply(transforms, table.values, table.names, args.seed)
        table = replace(table, values=values)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_repeats(table, allow=args.allow_repeats)
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    return table, transforms


def _use(args: argparse.Namespace) -> None:
    """Score, sample or impute with a saved model."""
    from pyro_lvebm.cli import saved

    if args.out is not None and os.path.lexists(args.out) and not args.force:
        raise ValueError(f"{args.out} exists; --force replaces it")
    model = saved.load_model(args.model)
    if args.command == "sample":
        frame = saved.sample(model, args.number, args.seed)
    elif args.command == "score":
        frame = saved.score(model, _for_model(args, model), args.seed)
    else:
        frame = saved.impute(model, _for_model(args, model), args.number, args.seed)
    _write(frame, args.out)


def _write(frame: pd.DataFrame, out: Path | None) -> None:
    from pyro_lvebm.cli.output import whole

    if out is None:
        frame.to_csv(sys.stdout, index=False)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole(out) as path:
        frame.to_csv(path, index=False)


def _report(result: JobResult, out: Path) -> str:
    evidence = result.evidence
    lines = [
        "",
        str(result.table),
        "",
        f"Held-out log p(x), nats per datum, {len(evidence.value)} rows, "
        "± standard error over rows",
        f"  {'LVEBM (upper end of log Z)':34s} {float(evidence.lower.double().mean()):10.3f} "
        f"± {evidence.mean_std_error:.3f}",
    ]
    for row in result.baselines.itertuples():
        lines.append(f"  {row.baseline:34s} {row.log_evidence:10.3f} ± {row.std_error:.3f}")
    lines += [f"  ({note})" for note in result.notes]
    total = sum(result.seconds.values())
    lines += [f"  {evidence.log_partition}", "", f"Wrote {out}/ in {total:.0f} s."]
    return "\n".join(lines)
