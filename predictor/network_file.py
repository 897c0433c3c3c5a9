"""Trained predictors on disk: one safetensors file, written beside its place and renamed.

Metadata "moe_offload_predictor" holds `NetworkInfo` as JSON. Tensors of source s, f32: s.projection, s.offset, s.gate,
s.gate_bias, s.up, s.up_bias, s.out, s.out_bias, s.slope, s.shift; of its block b: s.b.inner, s.b.inner_bias, s.b.down.
Shapes: network.py.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_offload.predictor.errors import PredictorError
from moe_offload.predictor.network import Block, Floats, SourceNetwork, input_size
from moe_offload.predictor.tensor_file import map_tensors, write_tensors
from moe_offload.predictor.trace import DISTANCES

FORMAT = 1
KEY = "moe_offload_predictor"
_BLOCK = ("inner", "inner_bias", "down")
_LARGEST = 1 << 16  # of any size in the heading


@dataclass(frozen=True, slots=True)
class NetworkInfo:
    """What a predictor is of, and how it came about.

    model: as of `TraceInfo`. tokens: that it was trained on. recall: on validation sequences, tokens one at a time,
    mean over layers, by distance: of gate look-ahead and of this predictor.
    """

    format: int
    model: str
    model_type: str
    layers: int
    experts: int
    top_k: int
    hidden_size: int
    projected: int
    tokens: int
    note: str = ""
    recall: dict[str, list[float]] = field(default_factory=dict)


class NetworkFile(NamedTuple):
    """A predictor that was read."""

    info: NetworkInfo
    networks: tuple[SourceNetwork, ...]


def write_networks(path: Path, info: NetworkInfo, networks: Sequence[SourceNetwork]) -> None:
    """Write a predictor. Raises PredictorError when it cannot be written; then nothing is left behind."""
    tensors: dict[str, Floats] = {}
    for source, network in enumerate(networks):
        for name, value in network._asdict().items():
            if name != "blocks":
                tensors[f"{source}.{name}"] = value
        for number, block in enumerate(network.blocks):
            tensors |= {f"{source}.{number}.{name}": value for name, value in block._asdict().items()}
    specs = {name: ("F32", value.shape) for name, value in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, specs, {KEY: json.dumps(asdict(info))}, lambda name, put: put(tensors[name]))
    except OSError as error:
        raise PredictorError(
            f"cannot write the predictor {path}: {error.strerror or error}; give another place with -o"
        ) from error


def read_networks(path: Path, model: str | None = None) -> NetworkFile:
    """Read a predictor. model: the fingerprint of the model that it has to be of.

    Raises PredictorError when it is no predictor, damaged, of another version or of another model.
    """
    try:
        metadata, mapped = map_tensors(path)
        info = _info(path, metadata)
        if model is not None and info.model != model:
            raise PredictorError(
                f"{path} predicts another model ({info.model_type}, {info.model[:16]}), not this one "
                f"({model[:16]}): moe-offload train-predictor makes one for it"
            )
        tensors = {name: value.copy() for name, value in mapped.items()}
    except FileNotFoundError as error:
        raise PredictorError(f"there is no predictor {path}: moe-offload train-predictor makes one") from error
    except PredictorError:
        raise
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise PredictorError(f"{path} is no predictor, or a damaged one ({error}): train it again") from error
    networks = tuple(_network(path, info, source, tensors) for source in range(info.layers))
    if tensors:
        raise PredictorError(f"{path} holds what no predictor has ({', '.join(sorted(tensors)[:3])}): train it again")
    return NetworkFile(info, networks)


def _info(path: Path, metadata: dict[str, str]) -> NetworkInfo:
    if KEY not in metadata:
        raise PredictorError(f"{path} is no predictor: its heading does not say so")
    values = json.loads(metadata[KEY])
    if values.get("format") != FORMAT:
        raise PredictorError(f"{path} has format {values.get('format')}, this version reads {FORMAT}: train it again")
    info = NetworkInfo(**values)
    counts = (info.layers, info.experts, info.top_k, info.hidden_size, info.projected, info.tokens)
    if any(type(count) is not int or count < 1 for count in counts) or max(counts[:-1]) > _LARGEST:
        raise PredictorError(f"{path} has an impossible heading: train it again")
    if info.top_k > info.experts or type(info.model) is not str or type(info.model_type) is not str:
        raise PredictorError(f"{path} has an impossible heading: train it again")
    return info


def _network(path: Path, info: NetworkInfo, source: int, tensors: dict[str, Floats]) -> SourceNetwork:
    """Takes the source's tensors out of `tensors`."""
    try:
        units = len(tensors[f"{source}.gate_bias"])
        wanted = {
            "projection": (info.projected, info.hidden_size), "offset": (info.projected,),
            "gate": (units, input_size(info.experts, info.projected)), "gate_bias": (units,),
            "up": (units, input_size(info.experts, info.projected)), "up_bias": (units,),
            "out": (DISTANCES, info.experts, units), "out_bias": (DISTANCES, info.experts),
            "slope": (2, DISTANCES), "shift": (2, DISTANCES),
        }  # fmt: skip
        found = {name: _take(tensors, f"{source}.{name}", shape) for name, shape in wanted.items()}
        blocks: list[Block] = []
        while f"{source}.{len(blocks)}.inner" in tensors:
            of_block = {"inner": (units, units), "inner_bias": (units,), "down": (units, units)}
            blocks.append(Block(**{n: _take(tensors, f"{source}.{len(blocks)}.{n}", s) for n, s in of_block.items()}))
    except (KeyError, TypeError, ValueError) as error:
        raise PredictorError(f"{path} lacks or garbles {error} of a predictor: train it again") from error
    return SourceNetwork(**found, blocks=tuple(blocks))


def _take(tensors: dict[str, Floats], name: str, shape: tuple[int, ...]) -> Floats:
    value = tensors.pop(name)
    if value.shape != shape or value.dtype != np.float32 or not np.isfinite(value).all():
        raise ValueError(name)
    return value
