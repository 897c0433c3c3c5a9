"""Sizes with a unit, as people write them."""

import re
from fractions import Fraction

from moe_offload.models.errors import OptionError

_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}


def parse_size(size: str | int | None, what: str) -> int | None:
    """'8GB' -> 8000000000, '8GiB' -> 8589934592, numbers and None as they are; `what` is the option's name.

    Raises OptionError for what is no size, and below 1 byte or from 8 EiB on.
    """
    if size is None:
        return None
    if type(size) is int:
        count = size
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", str(size), re.IGNORECASE | re.ASCII)
        if match is None:
            raise OptionError(f"{what} {size} is no size: write it like 512MB, 8GB or 8GiB")
        number, unit = match.groups()
        count = int(Fraction(number) * _UNITS[(unit or "").upper()])
    if not 1 <= count < 2**63:
        raise OptionError(f"{what} {size} is out of bounds: 1 byte is the least, 8 EiB too much")
    return count
