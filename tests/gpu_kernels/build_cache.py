"""Where compiled kernels are kept between test runs: a folder of this user's among the temporary ones."""

import os
import stat
import tempfile
from collections.abc import Callable
from functools import cache
from hashlib import blake2b
from pathlib import Path


@cache
def folder() -> Path:
    """One folder for all runs; a fresh one where something else has taken its name: objects in it are executed."""
    path = Path(tempfile.gettempdir()) / f"moe-offload-kernels-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
        return path
    return Path(tempfile.mkdtemp(prefix="moe-offload-kernels-"))


def cached(suffix: str, key: object, make: Callable[[Path], None]) -> Path:
    """The file that `make` writes; made once for each key. Whoever comes second at the same time makes it too."""
    path = folder() / (blake2b(repr(key).encode(), digest_size=16).hexdigest() + suffix)
    if not path.exists():
        beside = Path(tempfile.mkdtemp(dir=folder())) / path.name
        try:
            make(beside)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
            beside.parent.rmdir()
    return path
