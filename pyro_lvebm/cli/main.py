# SPDX-License-Identifier: Apache-2.0
"""The command line: `python -m pyro_lvebm fit` and `demo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pyro_lvebm.cli.data import load_digits_data, read_observations, split
from pyro_lvebm.cli.job import JobResult, JobSettings, run_job
from pyro_lvebm.rng import Stream

_OUTPUTS = """\
Written to the output folder:
  figure.png          data, model draws (reconstructions for the digits), ELBO table
  elbo_table.csv      ELBO and KL gap of every posterior, with standard errors
  summary.json        held-out log p(x), log Z bracket, baselines, seconds, seed, versions
  posterior.nc        posterior draws for ArviZ
  model.safetensors   the fitted model, to read with Saddle.load
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="pyro_lvebm",
        description="Fit a latent-variable energy-based model (LVEBM) by Langevin particles and "
        "compare it with variational guides.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    fit = commands.add_parser(
        "fit",
        help="fit an LVEBM to your own table of observations",
        description="Fit an LVEBM to a table of real numbers (rows = observations), print the "
        "ELBO table and the held-out log p(x) beside baselines.",
        epilog=_OUTPUTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    fit.add_argument("data", type=Path, metavar="DATA", help=".csv, .npy or .npz file")
    fit.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
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
        "and logit-transformed; 360 of them are held out.",
        epilog=_OUTPUTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("demo"),
        metavar="DIR",
        help="output folder (default: %(default)s)",
    )
    for command, z_dim in ((fit, 2), (demo, 4)):
        command.add_argument(
            "--z-dim",
            type=int,
            default=z_dim,
            metavar="N",
            help="number of latent dimensions (default: %(default)s)",
        )
        command.add_argument(
            "--steps",
            type=int,
            default=JobSettings.num_steps,
            metavar="N",
            help="training steps, or fewer where validation rows stop them (default: %(default)s)",
        )
        command.add_argument(
            "--guide-steps",
            type=int,
            default=JobSettings.guide_steps,
            metavar="N",
            help="training steps of every guide at most; it stops where its ELBO rests "
            "(default: %(default)s)",
        )
        command.add_argument(
            "--seed",
            type=int,
            default=0,
            metavar="N",
            help="fixes every random number (default: %(default)s)",
        )
        command.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; bad input is reported on standard error with exit status 2."""
    args = build_parser().parse_args(argv)
    try:
        settings = JobSettings(
            z_dim=args.z_dim, num_steps=args.steps, guide_steps=args.guide_steps, seed=args.seed
        )
        digits = validation = None
        if args.command == "demo":
            digits = load_digits_data(args.seed)
            train, test = digits.train, digits.test
        else:
            train, test = split(read_observations(args.data), args.held_out, args.seed)
            if args.validation:
                train, validation = split(
                    train, args.validation, args.seed, Stream.VALIDATION_SPLIT
                )
        result = run_job(
            train,
            test,
            args.out,
            settings,
            validation=validation,
            digits=digits,
            progress=not args.quiet,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(_report(result, args.out))
    return 0


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
    total = sum(result.seconds.values())
    lines += [f"  {evidence.log_partition}", "", f"Wrote {out}/ in {total:.0f} s."]
    return "\n".join(lines)
