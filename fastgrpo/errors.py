"""The errors that end a run for a reason its user can act upon."""

from __future__ import annotations


class RunError(RuntimeError):
    """One line that says what happened and what to do. The command line prints it without a traceback."""


class OtherProcessFailed(RunError):
    """Another process of the run raised; it says what, this one ends with it."""
