# SPDX-License-Identifier: Apache-2.0
"""Where a pool must move, nothing may be traced: a graph that is replayed refreshes no pool."""

from __future__ import annotations

import torch


def check_not_traced() -> None:
    """Refuse to be recorded into a graph by `torch.jit.trace` or `torch.compile`.

    A graph that is replayed holds the log Z and the negatives of the one time that it was recorded,
    and θ moves away from both.

    Raises:
        ValueError: If the caller is being traced or compiled.
    """
    # Dynamo runs code that raises again, uncompiled: what is then left of it is its callback.
    frames = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
    callback = getattr(frames, "get_eval_frame_callback", lambda: None)
    if torch.jit.is_tracing() or torch.compiler.is_compiling() or callback():
        raise ValueError(
            "log Z is read in a loss that is traced or compiled, and θ can change: the graph would "
            "be replayed with the log Z and the negatives of now, without ever refreshing the "
            "pool. Use a loss that runs the model in every step, such as Trace_ELBO for "
            "JitTrace_ELBO, or freeze θ first: ebm.requires_grad_(False)"
        )
