"""What the tests of packs share: a checkpoint that is smaller in fewer bits, and the weights that a pack stands for."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from moe_offload.cpu_kernels.packed_layout import ExpertRecord
from moe_offload.cpu_kernels.packing import unpack_matrix
from moe_offload.models.checkpoint import Checkpoint
from moe_offload.models.dequantize import read_matrix
from moe_offload.models.expert_weights import MatrixSet
from moe_offload.transfer.expert_pack import ExpertPack
from tests import tiny_models

# Whole blocks, so that int4 is really smaller than int8: blocks are filled up to 32 outputs.
SIZES = dict(hidden_size=64, moe_intermediate_size=64)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_models.token_ids())[0].float()  # type: ignore[no-any-return]


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Mean difference, as a share of the mean logit."""
    return float((found - expected).abs().mean() / expected.abs().mean())


def files(folder: Path) -> set[str]:
    """Kinds of files in a folder of packs: "pack", "lock", ..."""
    return {path.name.rpartition(".")[2] for path in folder.iterdir()}


def pack_in(folder: Path) -> Path:
    """The experts' pack."""
    (path,) = set(folder.glob("*.pack")) - set(dense_packs_in(folder))
    return path


def dense_packs_in(folder: Path) -> list[Path]:
    """The linears' packs, by name."""
    return sorted(folder.glob("*-dense-*.pack"))


def unpacked(pack: ExpertPack, path: str, expert: int) -> list[np.ndarray]:
    """gate, up, down as the pack has them; gate is empty where there is none."""
    record = pack.plan.section(path).content
    assert isinstance(record, ExpertRecord)
    content = pack.record(path, expert)
    layouts = (record.up_matrix, record.up_matrix, record.down_matrix)
    return [unpack_matrix(content[at:], layout) for at, layout in zip(record.offsets, layouts, strict=False)]


def detach_with_packed_weights(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """The plain transformers model, its experts' weights replaced by those that the pack stands for."""
    engine = model.offload
    pack, stored = engine._pack, engine._skeleton.weights
    where = {
        id(matrix): (path, slot)
        for path, weights in stored.items()
        for slot, matrix in enumerate((weights.gate, weights.up, weights.down))
        if matrix is not None
    }

    def read(matrix: MatrixSet, weights: str, checkpoint: Checkpoint, expert: int, dtype: torch.dtype) -> torch.Tensor:
        if id(matrix) not in where:  # a bias
            return read_matrix(matrix, weights, checkpoint, expert, dtype)  # type: ignore[arg-type]
        path, slot = where[id(matrix)]
        return torch.from_numpy(unpacked(pack, path, expert)[slot]).to(dtype)

    with monkeypatch.context() as patch:
        patch.setattr("moe_offload.models.skeleton.read_matrix", read)
        return engine.detach()
