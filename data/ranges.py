"""A check that settings are within their ranges."""

import math
from typing import Any


def check_range(settings: Any, names: str, at_least: float = -math.inf, above: float = -math.inf,
                at_most: float = math.inf) -> None:
    """Raises ValueError, with name, value and what was expected, for a setting out of range.

    names: of the fields of `settings`, with spaces between. NaN and infinity are in no range.
    """
    for name in names.split():
        value = getattr(settings, name)
        expected = f"at least {at_least}" if at_least else "0 or more"
        if at_most < math.inf:
            expected = f"{at_least} to {at_most}"
        elif above > -math.inf:
            expected = f"more than {above}"
        if math.isinf(value):
            expected += ", not infinity"
        if not (math.isfinite(value) and at_least <= value <= at_most and value > above):
            raise ValueError(f"{name} {value}: expected {expected}")
