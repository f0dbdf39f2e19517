"""A check that settings are within their ranges."""

import math
from typing import Any

LARGEST_COUNT = 2**31 - 1


def check_range(settings: Any, names: str, at_least: float = -math.inf, above: float = -math.inf,
                at_most: float = math.inf) -> None:
    """Raises ValueError, with name, value and what was expected, for a setting out of range.

    names: of the fields of `settings`, with spaces between. NaN and infinity are in no range, nor
    are whole numbers beyond 32 bits.
    """
    for name in names.split():
        value = getattr(settings, name)
        most = min(at_most, LARGEST_COUNT) if isinstance(value, int) else at_most
        is_bounded = at_most < math.inf or value > most
        if above > -math.inf:
            expected = f"more than {above}" + f", at most {most}" * is_bounded
        elif is_bounded:
            expected = f"{at_least} to {most}"
        else:
            expected = f"at least {at_least}" if at_least else "0 or more"
        if math.isinf(value):
            expected += ", not infinity"
        if not (math.isfinite(value) and at_least <= value <= most and value > above):
            raise ValueError(f"{name} {value}: expected {expected}")
