"""The same date in every prompt, for chat templates that tell today's."""

from datetime import date

TEMPLATE_DATE = date(2025, 1, 1)
"""The date for chat templates that ask for today's. So a run that is resumed tomorrow has the same
prompts. Ours."""

_DIRECTIVES = [f"%{flag}{letter}" for letter in "aAbBcdDeFHIjmMpSuwxXyYzZ" for flag in ("", "-")]
FIXED_DATE = (
    "{%- macro strftime_now(format) %}{{ format"
    + "".join(f"|replace({part!r}, {TEMPLATE_DATE.strftime(part)!r})" for part in _DIRECTIVES)
    + " }}{%- endmacro %}\n"
)
"""Put before a template, this macro replaces transformers' function of the same name."""
