"""Calibrations on disk: one small file per machine and model shape.

Virtual accelerators are not kept: calibrating one takes no time, and its profile may change with the program.
"""

import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import platformdirs

from moe_offload.scheduling.cost_model import CostModel

logger = logging.getLogger(__name__)

VERSION = 2  # of the file, and of how it is measured


def machine_key(
    cpu: str, device: str, threads: int, kinds: Sequence[tuple[str, int]], ways: str = ""
) -> dict[str, str]:
    """What measured costs depend on. cpu, device: their names. ways: how the device computes experts."""
    return {
        "cpu": cpu,
        "threads": str(threads),
        "host": platform.node(),
        "device": device,
        "ways": ways,
        "torch": version("torch"),
        "kinds": ", ".join(f"{kind}: {nbytes}" for kind, nbytes in kinds),
    }


def cached_costs(key: Mapping[str, str], make: Callable[[], CostModel], folder: Path | None = None) -> CostModel:
    """The costs that were kept under `key`, or what `make` measures, which is kept then.

    A file that cannot be read, or holds something else, is measured anew and replaced. One that cannot be written costs
    a calibration at the next start, no more.
    """
    text = json.dumps(dict(key), sort_keys=True)
    name = f"costs-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    path = (folder or Path(platformdirs.user_cache_dir("moe-offload")) / "costs") / name
    found = _read(path, text)
    if found is not None:
        return found
    costs = make()
    _write(path, text, costs)
    return costs


def _read(path: Path, key: str) -> CostModel | None:
    try:
        data = json.loads(path.read_bytes())
        if not isinstance(data, dict) or data.get("version") != VERSION or data.get("key") != key:
            raise ValueError("of another version or machine")
        return CostModel.from_dict(data.get("costs"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        logger.info("%s cannot be used (%s): this machine is measured again", path, error)
        return None


def _write(path: Path, key: str, costs: CostModel) -> None:
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps({"version": VERSION, "key": key, "costs": costs.to_dict()}))
        os.replace(fresh, path)
    except OSError as error:
        logger.info("the measured costs are not kept: %s", error)
        with suppress(OSError):
            fresh.unlink()
