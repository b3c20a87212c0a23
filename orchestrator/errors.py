"""The one exception for what a user can mend: a clear line instead of a traceback, exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user gave: where, what was found, what is needed, what to do. May hold several lines."""


def nearest(word: object, known: Iterable[object]) -> str:
    """ "; did you mean X?" for the nearest known word, or an empty string when none is near.

    What a user wrote may be a number, a list or nothing at all; it is compared as it is shown.
    """
    matches = difflib.get_close_matches(str(word), [str(one) for one in known], n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""
