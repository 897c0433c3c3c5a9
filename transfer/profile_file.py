"""Profiles of real machines, one JSON file each, in the user's data folder.

A file says all of a `ServerProfile`'s numbers and where they are from. It is written beside its place and renamed, so
that nobody reads half of one; whatever is not exactly what this version writes is refused with its name.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import platformdirs

from moe_offload.transfer.server_profile import PROFILES, ServerProfile
from moe_offload.transfer.server_sources import Source

VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_TEXTS = ("name", "description", "device", "precision")
_WHOLE = ("memory_bytes", "host_memory_bytes", "threads")
_MAY_BE_ZERO = ("threads", "jitter", "link_latency", "launch_seconds", "kernel_seconds", "wait_seconds",
                "host_expert_seconds", "host_job_seconds")  # fmt: skip
_CARD = ("memory_bytes", "memory_gbs", "flops", "link_gbs")  # zero where there is none
_NUMBERS = tuple(
    each.name for each in fields(ServerProfile) if each.name not in (*_TEXTS, "sources", "expert_tables", "simulated")
)


def profile_folder() -> Path:
    """Where saved profiles are; it need not be there yet."""
    return Path(platformdirs.user_data_dir("moe-offload")) / "profiles"


def saved_names() -> list[str]:
    """Names of all saved profiles, readable or not."""
    with suppress(OSError):
        return sorted(path.stem for path in profile_folder().glob("*.json") if _NAME.fullmatch(path.stem))
    return []


def check_name(name: str) -> None:
    """Raises ValueError for what cannot name a saved profile."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot name a profile: 1 to 64 letters, digits, dots, dashes and underscores, a letter or digit "
            "first"
        )
    if name in PROFILES:
        raise ValueError(f"{name!r} is a profile of this program: take another name")


def write_profile(profile: ServerProfile) -> Path:
    """Keep a profile, in the place of one of that name. Raises ValueError for its name, OSError for the disk."""
    check_name(profile.name)
    target = profile_folder() / f"{profile.name}.json"
    content = {name: value for name, value in asdict(profile).items() if name not in ("expert_tables", "simulated")}
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        fresh.write_text(json.dumps({"version": VERSION, "profile": content}, indent=1) + "\n")
        os.replace(fresh, target)
    finally:
        with suppress(OSError):
            fresh.unlink()
    return target


def read_profile(name: str) -> ServerProfile:
    """The saved profile of that name. Raises ValueError for a file that `write_profile` did not write."""
    path = profile_folder() / f"{name}.json"
    again = f"save it again (moe-offload profiles save {name}) or delete it"
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"the profile {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the profile {path} is damaged, it is no JSON: {again}") from error
    version = data.get("version") if isinstance(data, dict) else None
    if version != VERSION:
        raise ValueError(f"the profile {path} is of version {version!r:.20}, and this program reads {VERSION}: {again}")
    try:
        return _profile(data.get("profile"), name)
    except ValueError as error:
        raise ValueError(f"the profile {path} is damaged ({error}): {again}") from error


def _profile(content: object, name: str) -> ServerProfile:
    if not isinstance(content, dict):
        raise ValueError("it holds no profile")
    if content.get("name") != name:
        raise ValueError(f"it is called {content.get('name')!r:.80}")
    values: dict[str, Any] = {key: _text(content, key) for key in _TEXTS}
    values |= {key: _number(content, key) for key in _NUMBERS}
    card = [values[key] > 0 for key in _CARD]
    if any(card) and not all(card):
        raise ValueError(f"{', '.join(_CARD)} are of a card, above 0 all of them, or 0 all of them without one")
    sources = content.get("sources")
    if not isinstance(sources, list):
        raise ValueError("sources is no list")
    return ServerProfile(**values, sources=tuple(map(_source, sources)), simulated=False)


def _text(content: Mapping[str, Any], key: str) -> str:
    value = content.get(key)
    if not isinstance(value, str) or len(value) > 1000:
        raise ValueError(f"{key} is {value!r:.40}, no text")
    return value


def _number(content: Mapping[str, Any], key: str) -> float:
    value = content.get(key)
    kinds = int if key in _WHOLE else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 <= value < 1e18 or not math.isfinite(value):
        raise ValueError(f"{key} is {value!r:.40}, not a number from 0 to 1e18")
    if value == 0 and key not in (*_MAY_BE_ZERO, *_CARD):
        raise ValueError(f"{key} is 0, it has to be above")
    return value


def _source(value: object) -> Source:
    if isinstance(value, list) and len(value) == 2:
        names, text = value
        if isinstance(names, list) and all(isinstance(each, str) for each in names) and isinstance(text, str):
            return Source(tuple(names), text)
    raise ValueError(f"{value!r:.60} is no source")
