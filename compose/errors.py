"""Errors a user can act on: what was given, what was possible, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ComposeError(Exception):
    """Base of every error that the command line shows as one line (exit code 2)."""


class RequestError(ComposeError):
    """A request that cannot be carried out as written."""


class AdapterError(ComposeError):
    """An adapter file that is unsafe, damaged, or does not fit the base."""


class LibraryError(ComposeError):
    """A library folder or database that cannot be used."""


class BaseModelError(ComposeError):
    """A base model that cannot be found or loaded."""


class BackendError(ComposeError):
    """A mix that the chosen backend cannot carry out."""


class TrainingError(ComposeError):
    """Training data or settings that cannot be used, or a run that went wrong."""


def unknown(kind: str, given: str, choices: Iterable[str]) -> str:
    """One line that names the unknown `given`, its nearest names, and the choices (at most 12 shown)."""
    names = sorted(choices)
    near = difflib.get_close_matches(given, names, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    shown = ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
    return (
        f"{kind} '{given}' is unknown{hint} Choose from {shown}"
        if hint
        else f"{kind} '{given}' is unknown; choose from {shown}"
    )
