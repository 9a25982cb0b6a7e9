"""The Triton backend. Its functions are the ops' that it has kernels for, with the plan before their arguments."""

from __future__ import annotations


def missing() -> str | None:
    """Why the kernels cannot run here although Triton can be imported, or None."""
    return None
