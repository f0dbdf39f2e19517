"""A check that settings are within their ranges."""

import math
from typing import Any

LARGEST_COUNT, LARGEST_FLOAT = 2**31 - 1, 3.4e38
"""The largest whole number of 32 bits with a sign, and about the largest float32."""


def check_range(settings: Any, names: str, at_least: float = -math.inf, above: float = -math.inf,
                at_most: float = math.inf) -> None:
    """Raises ValueError, with name, value and what was expected, for a setting out of range.

    names: of the fields of `settings`, with spaces between. NaN and infinity are in no range, nor
    is what has no place in 32 bits.
    """
    for name in names.split():
        value = getattr(settings, name)
        most = min(at_most, LARGEST_COUNT if isinstance(value, int) else LARGEST_FLOAT)
        if at_least <= value <= most and value > above:
            continue
        is_bounded = at_most < math.inf or most < value < math.inf
        if above > -math.inf:
            expected = f"more than {above}, at most {most}" if is_bounded else f"more than {above}"
        elif is_bounded:
            expected = f"{at_least} to {most}"
        else:
            expected = f"at least {at_least}" if at_least else "0 or more"
        if abs(value) == math.inf:
            expected += ", not infinity"
        raise ValueError(f"{name} {value}: expected {expected}")
