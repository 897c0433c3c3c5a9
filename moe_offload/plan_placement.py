"""What goes where: the card's memory, the host's, the disk, for one model, context and number of sequences.

The card holds all that is no expert (but the embedding, which is looked up on the host), KV cache and expert slots; the
host what is not on the card; what the host has no room for stays on disk and is read when it is wanted.
"""

from dataclasses import dataclass

from moe_offload.plan_sizes import ModelSizes

PROGRAM_BYTES = 700 << 20  # Python, torch, transformers, compiled kernels
LEAST_SLOTS = 2  # one expert is read while another comes
SPARE_SHARE = 16  # of a card's memory beside the weights, one part is for activations


@dataclass(frozen=True, slots=True)
class Budgets:
    """gpu: bytes of the card; 0: there is none. ram: bytes of the host."""

    gpu: int
    ram: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Bytes by place. slots: experts on the card. kv_layers: whose KV cache is there. disk: experts that the host has
    no room for. lacking_gpu, lacking_ram: bytes without which nothing runs.
    """

    gpu_dense: int
    gpu_kv: int
    gpu_experts: int
    gpu_spare: int
    slots: int
    kv_layers: int
    ram_program: int
    ram_dense: int
    ram_kv: int
    ram_experts: int
    disk: int
    lacking_gpu: int = 0
    lacking_ram: int = 0

    @property
    def gpu(self) -> int:
        """All that is on the card."""
        return self.gpu_dense + self.gpu_kv + self.gpu_experts + self.gpu_spare

    @property
    def ram(self) -> int:
        """All that is in the host's memory."""
        return self.ram_program + self.ram_dense + self.ram_kv + self.ram_experts

    @property
    def runs(self) -> bool:
        """Whether the model can run at all, if only from disk."""
        return not self.lacking_gpu and not self.lacking_ram


def place(sizes: ModelSizes, budgets: Budgets, context: int, sequences: int, kv_layers: int) -> Placement:
    """The placement with so many movable layers' KV cache on the card, as many slots as fit beside it, and the rest in
    the host's memory as far as that goes.
    """
    per_layer = [sequences * layer.nbytes(context) for layer in sizes.kv]
    if not budgets.gpu:
        return _with_host(sizes, budgets, (0, 0, 0, 0, 0, 0), sizes.host_bytes, sum(per_layer))
    fixed = [size for size, layer in zip(per_layer, sizes.kv, strict=True) if not layer.movable]
    movable = [size for size, layer in zip(per_layer, sizes.kv, strict=True) if layer.movable]
    here = [*fixed, *movable[:kv_layers]]
    # the layer that is computed has a second copy: it grows by concatenation, or its past is copied in
    kv = sum(here) + max(per_layer, default=0)
    room = budgets.gpu - sizes.device_bytes - kv
    spare = max(room, 0) // SPARE_SHARE
    slots = max(min((room - spare) // sizes.slot_bytes, sizes.expert_count), 0)
    if slots < LEAST_SLOTS:
        needed = -(-LEAST_SLOTS * sizes.slot_bytes * SPARE_SHARE // (SPARE_SHARE - 1)) + SPARE_SHARE
        card = (sizes.device_bytes, kv, 0, spare, 0, kv_layers)
        return _with_host(sizes, budgets, card, sizes.embedding_bytes, sum(movable[kv_layers:]), needed - room)
    card = (sizes.device_bytes, kv, slots * sizes.slot_bytes, spare, slots, kv_layers)
    return _with_host(sizes, budgets, card, sizes.embedding_bytes, sum(movable[kv_layers:]))


def _with_host(
    sizes: ModelSizes, budgets: Budgets, card: tuple[int, int, int, int, int, int], dense: int, kv: int,
    lacking_gpu: int = 0,
) -> Placement:  # fmt: skip
    left = budgets.ram - PROGRAM_BYTES - dense - kv
    on_card = round(sizes.expert_bytes * card[4] / sizes.expert_count)
    elsewhere = sizes.expert_bytes - on_card
    ram_experts = max(min(left, elsewhere), 0)
    return Placement(
        *card, PROGRAM_BYTES, dense, kv, ram_experts, elsewhere - ram_experts, max(lacking_gpu, 0), max(-left, 0)
    )
