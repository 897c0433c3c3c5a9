"""What a pack was made from, as a name: a hash over the checkpoint that costs no pass through its weights.

Hashed are each shard's header, its size, and samples of its data at fixed places. A shard in the Hub's cache is a link
to a file that is named by the SHA-256 of its content: that name stands for the samples. A shard in which some tensors
were overwritten in place may have the same samples; one that was trained, merged or quantised otherwise has not.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from moe_offload.models.checkpoint import Checkpoint
from moe_offload.models.errors import CheckpointError
from moe_offload.models.spec import MoeSpec

_SAMPLES = 24  # per shard: a cold start from a hard disk seeks once for each
_SAMPLE_BYTES = 4096


def content_key(spec: MoeSpec, checkpoint: Checkpoint) -> str:
    """64 hexadecimal digits that tell this model's stored weights from all others.

    Raises CheckpointError when a shard cannot be read.
    """
    digest = hashlib.sha256()
    # How stored tensors are read depends on the architecture: the same bytes may hold other experts.
    _add(digest, spec.model_type, *((each.path, each.interleaved, each.transposed) for each in spec.layers))
    for path in sorted({record.path for record in checkpoint.records.values()}):
        try:
            _add_shard(digest, path)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()


def _add_shard(digest: Any, path: Path) -> None:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        _add(digest, size, hashlib.sha256(header).hexdigest())
        blob = path.resolve()
        if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
            _add(digest, blob.name)
            return
        start = 8 + length
        last = max(start, size - _SAMPLE_BYTES)
        for number in range(_SAMPLES):
            file.seek(start + (last - start) * number // (_SAMPLES - 1))
            _add(digest, hashlib.sha256(file.read(_SAMPLE_BYTES)).hexdigest())


def _add(digest: Any, *parts: object) -> None:
    for part in parts:
        digest.update(repr(part).encode() + b"\0")
