"""Former names of fields, which earlier versions used in code and in saved reports."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

FORMER = {
    "gated": "held_out_score",
    "gated_error": "held_out_error",
    "gated_dense": "held_out_dense",
    "gated_floor": "held_out_floor",
    "chosen_by": "search_score",
    "shared": "undivided_because",
}


class FormerNames:
    """A record with fields that had other names. The former names still work, with a `DeprecationWarning`."""

    if not TYPE_CHECKING:  # type checkers know the present names only

        def __getattr__(self, name: str) -> Any:
            now = FORMER.get(name)
            if now is None or (now not in dir(type(self)) and now not in vars(self)):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
            warnings.warn(f"{name} is now {now}.", DeprecationWarning, stacklevel=2)
            return getattr(self, now)
