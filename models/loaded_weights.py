"""The tensors that transformers loads itself, checked before it does.

It would cast an integer tensor to the model's dtype without a word, and tell of a wrong shape in a table in its log.
"""

from collections.abc import Collection

from transformers import PreTrainedModel

from moe_offload.models.checkpoint import Checkpoint
from moe_offload.models.compat import KeyResolver
from moe_offload.models.errors import CheckpointError

_FLOATS = ("BF16", "F16", "F32", "F64")


def check_loaded_weights(
    model: PreTrainedModel, checkpoint: Checkpoint, experts: Collection[str], *, quantised: bool
) -> None:
    """Raise CheckpointError for a tensor whose shape or dtype is not that of its parameter.

    `model` is the skeleton on meta, `experts` the keys that are not loaded. Of a `quantised` checkpoint the encoded
    tensors are left to its own quantizer.
    """
    resolve = KeyResolver(model)
    wanted = model.state_dict()
    for name, record in checkpoint.records.items():
        if name in experts:
            continue
        if quantised and record.dtype not in _FLOATS:
            continue
        resolved = resolve(name)
        parameter = wanted.get(resolved.target)
        if parameter is None:
            continue  # the architecture does not use it
        if parameter.is_floating_point() and record.dtype not in _FLOATS:
            raise CheckpointError(
                f"{record.path}: tensor {name!r} has dtype {record.dtype}, expected one of {', '.join(_FLOATS)}: "
                "the file is damaged, or its config.json lacks a quantization_config"
            )
        if not resolved.operations and record.shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{record.path}: tensor {name!r} has shape {list(record.shape)}, but config.json describes "
                f"{list(parameter.shape)}"
            )
