"""The text of a kernel's source with its headers in it.

CuPy keeps compiled kernels by the text that it is given, and a header that is found at compile time is not part of it:
after an update it would go on with the old one.
"""

import hashlib
import re
from functools import cache
from importlib import resources

_INCLUDE = re.compile(r'^#include "([\w.]+)"\n', re.MULTILINE)


@cache
def read_source(name: str) -> str:
    """The file `name` of this folder, with each `#include "..."` replaced by that file, once."""
    return _expanded(name, set())


def source_names() -> list[str]:
    """All sources that have kernels."""
    return sorted(each.name for each in resources.files(__package__).iterdir() if each.name.endswith(".cu"))


def sources_key() -> str:
    """Changes with any of the sources."""
    text = "".join(read_source(name) for name in source_names())
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _expanded(name: str, seen: set[str]) -> str:
    seen.add(name)
    text = resources.files(__package__).joinpath(name).read_text()
    parts, at = [f'#line 1 "{name}"\n'], 0
    for found in _INCLUDE.finditer(text):
        parts.append(text[at : found.start()])
        if found[1] not in seen:
            parts.append(_expanded(found[1], seen))
        at = found.end()
        parts.append(f'#line {text.count(chr(10), 0, at) + 1} "{name}"\n')
    return "".join((*parts, text[at:]))
