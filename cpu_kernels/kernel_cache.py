"""Compiled kernels on disk, in the user's cache folder.

Numba's own cache will not do for three reasons, all measured. Its key covers only the file of the
function itself: after a change in an emitter it runs stale machine code. It pickles a closure's
cells, and an intrinsic's pickle differs in every process: kernels made in a factory never hit.
And it writes beside the sources, into site-packages. So a kernel gets a cache object of ours: the
folder is named by a hash of this room's sources and of the CPU's name and features, the key is
the specialisation's name. Numba's global configuration stays as it is.
"""

import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from sys import version_info
from typing import Any

import numba
import numba.core.config
import platformdirs
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator
from numba.core.ccallback import CFunc
from numba.core.sigutils import normalize_signature

from moe_offload.cpu_kernels.jit import OPTIONS, rename
from moe_offload.cpu_kernels.target import current_target

logger = logging.getLogger(__name__)

_KEPT_FOLDERS = 4  # several machines may share a home folder


def sources_hash() -> str:
    """Hash of everything that machine code depends on, save the kernel's own name."""
    target = current_target()
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    parts = numba.__version__, target.triple, target.cpu, target.features, str(target.follows_streams)
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def _cache_root() -> Path:
    settings: Any = numba.core.config
    if settings.CACHE_DIR:
        return Path(settings.CACHE_DIR) / "moe-offload-kernels"
    return Path(platformdirs.user_cache_dir("moe-offload")) / "kernels"


@cache
def cache_folder() -> Path | None:
    """This version's folder for this CPU, made and writable; None where there is no place."""
    name = sources_hash()
    places = [_cache_root(), Path(tempfile.gettempdir()) / f"moe-offload-{_user()}" / "kernels"]
    for place, root in enumerate(places):
        folder = root / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            logger.info("compiled kernels are not kept in %s: %s", root, error)
            continue
        if place and not _owned(root.parent):
            continue  # a folder in /tmp that another user made could hold another user's code
        os.utime(folder)
        _prune(root, keep=folder)
        return folder
    logger.info("compiled kernels are not kept: every start compiles anew")
    return None


def _user() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0


def _owned(folder: Path) -> bool:
    status = folder.stat()
    return status.st_uid == _user() and not status.st_mode & 0o022


def _prune(root: Path, keep: Path) -> None:
    """Drop the folders of older sources, the most recently used few excepted."""
    try:
        folders = [f for f in root.iterdir() if f.is_dir() and f != keep and len(f.name) == 16]
        folders.sort(key=lambda f: f.stat().st_mtime, reverse=True)
        for folder in folders[_KEPT_FOLDERS - 1 :]:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass  # another process prunes as well


class _Locator(_CacheLocator):
    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key
        self._py_file = __file__  # Numba names it in its warnings

    def get_cache_path(self) -> str:
        return str(self._folder)

    def get_source_stamp(self) -> str:
        return self._folder.name

    def get_disambiguator(self) -> str:
        return self._key


class _Implementation(CompileResultCacheImpl):
    def __init__(self, function: Callable[..., Any], folder: Path, key: str) -> None:
        # not the parent's: it would look for a place beside the function's file
        self._lineno = function.__code__.co_firstlineno
        self._locator = _Locator(folder, key)
        self._filename_base = f"{function.__name__}-{key}.py{version_info[0]}{version_info[1]}"


class _KernelCache(FunctionCache):
    """Numba's file cache with our folder and a key that leaves closures out."""

    def __init__(self, function: Callable[..., Any], folder: Path, key: str) -> None:
        self._key = key
        self._impl_class: Any = lambda _function: _Implementation(function, folder, key)
        parent: Any = super()
        parent.__init__(function)

    def _index_key(self, signature: Any, codegen: Any) -> Any:
        return signature, codegen.magic_tuple(), self._key

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        parent: Any = super()
        try:
            return parent.load_overload(signature, target_context)
        except Exception as error:  # a torn or foreign file must cost a compilation, no more
            logger.info("cached kernel %s is unreadable: %s", self._key, error)
            return None

    def save_overload(self, signature: Any, data: Any) -> None:
        parent: Any = super()
        try:
            parent.save_overload(signature, data)
        except OSError as error:
            logger.info("kernel %s could not be kept: %s", self._key, error)


def compile_job(function: Callable[..., Any], signature: str, key: str) -> Any:
    """A C function (`.address`, `.cache_hits`) from a factory's function, through the cache.

    `key` has to name everything the factory specialised the function by, as `specialised` does
    for the functions it calls.
    """
    rename(function, key)
    parse: Any = normalize_signature
    compiled: Any = CFunc(function, parse(signature), {}, dict(OPTIONS))
    folder = cache_folder()
    if folder is not None:
        compiled._cache = _KernelCache(function, folder, key)
    started = time.perf_counter()
    compiled.compile()
    _report(compiled.cache_hits > 0, key, started)
    return compiled


def _report(cached: bool, key: str, started: float) -> None:
    verb = "loaded" if cached else "compiled"
    logger.debug("%s kernel %s in %.2f s", verb, key, time.perf_counter() - started)


def compiled(signature: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorator for functions that Python calls: compiled on first use, through the cache."""

    def decorate(function: Callable[..., Any]) -> Any:
        return _Lazy(function, signature)

    return decorate


class _Lazy:
    """Stands for a compiled function; importing this room compiles nothing."""

    def __init__(self, function: Callable[..., Any], signature: str) -> None:
        self._function, self._signature = function, signature
        self._call: Callable[..., Any] | None = None
        self.__doc__ = function.__doc__

    def load(self) -> Callable[..., Any]:
        if self._call is None:
            dispatcher: Any = numba.njit(**OPTIONS)(self._function)
            folder = cache_folder()
            if folder is not None:
                dispatcher._cache = _KernelCache(self._function, folder, "host")
            started = time.perf_counter()
            dispatcher.compile(self._signature)
            _report(bool(dispatcher.stats.cache_hits), self._function.__qualname__, started)
            dispatcher.disable_compile()
            self._call = dispatcher
        return self._call

    def __call__(self, *args: Any) -> Any:
        return (self._call or self.load())(*args)
