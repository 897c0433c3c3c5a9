"""The models that are simulated, by their public configurations. Parameters and bytes; no weights."""

from dataclasses import dataclass

from moe_offload.cpu_kernels.packed_layout import ExpertRecord, StoredType


@dataclass(frozen=True, slots=True)
class Shape:
    """One model.

    layers: those with experts. record: one expert. dense_params: all layers' attention, norms, routers, shared experts
    and dense blocks, read once a step. head_params: of the output head, and as many again of the embedding, which is
    not read. kv_bytes: of one position, all layers. repeats: of a token's experts in a layer, the share that the token
    before it had too; None: what independent choices give. skew: of the generator's preferences, 1 as described there.
    """

    name: str
    layers: int
    experts: int
    top_k: int
    record: ExpertRecord
    dense_params: int
    head_params: int
    kv_bytes: int
    repeats: float | None = None
    skew: float = 1.0

    @property
    def expert_bytes(self) -> int:
        """Of one record."""
        return self.record.nbytes

    @property
    def flops_per_row(self) -> int:
        """Operations of one token in one expert."""
        return 2 * 3 * self.record.hidden_size * self.record.intermediate_size

    @property
    def dense_bytes(self) -> int:
        """What the device holds besides experts and KV cache, in f16."""
        return 2 * (self.dense_params + 2 * self.head_params)

    @property
    def kind(self) -> str:
        """The cost model's name of its experts."""
        return f"{self.record.dtype} {self.record.hidden_size}x{self.record.intermediate_size}"


def _expert(hidden: int, intermediate: int, dtype: StoredType, *, bias: bool = False) -> ExpertRecord:
    return ExpertRecord(hidden, intermediate, dtype, bias=bias)


def mixtral(dtype: StoredType) -> Shape:
    """Mixtral-8x7B."""
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024
    return Shape(
        "Mixtral-8x7B", 32, 8, 2, _expert(4096, 14336, dtype), 32 * (attention + 8 * 4096), 32000 * 4096,
        kv_bytes=32 * 2 * 8 * 128 * 2, repeats=0.33, skew=0.4,
    )  # fmt: skip


def qwen3(dtype: StoredType) -> Shape:
    """Qwen3-30B-A3B."""
    attention = 2 * 2048 * 4096 + 2 * 2048 * 512
    return Shape(
        "Qwen3-30B-A3B", 48, 128, 8, _expert(2048, 768, dtype), 48 * (attention + 128 * 2048), 151936 * 2048,
        kv_bytes=48 * 2 * 4 * 128 * 2, repeats=0.40,
    )  # fmt: skip


def deepseek(dtype: StoredType) -> Shape:
    """DeepSeek-V2-Lite."""
    # 27 layers of MLA (q, kv down, kv up, o; the cache in its compressed form), the first with a dense block
    attention = 2048 * 3072 + 2048 * 576 + 512 * 4096 + 2048 * 2048
    shared = 3 * 2048 * 2816
    return Shape(
        "DeepSeek-V2-Lite", 26, 64, 6, _expert(2048, 1408, dtype),
        27 * attention + 26 * (shared + 64 * 2048) + 3 * 2048 * 10944, 102400 * 2048,
        kv_bytes=27 * (512 + 64) * 2, repeats=0.30,
    )  # fmt: skip


def gpt_oss() -> Shape:
    """gpt-oss-20b."""
    attention = 2 * 2880 * 4096 + 2 * 2880 * 512
    return Shape(
        "gpt-oss-20b", 24, 32, 4, _expert(2880, 2880, "mxfp4", bias=True), 24 * (attention + 32 * 2880),
        201088 * 2880, kv_bytes=24 * 2 * 8 * 64 * 2, repeats=0.18, skew=0.5,
    )  # fmt: skip


def moonlight(dtype: StoredType) -> Shape:
    """Moonlight-16B-A3B: DeepSeek-V2-Lite with a larger vocabulary and dense block; repeats as assumed there."""
    attention = 2048 * 3072 + 2048 * 576 + 512 * 4096 + 2048 * 2048
    shared = 3 * 2048 * 2816
    return Shape(
        "Moonlight-16B-A3B", 26, 64, 6, _expert(2048, 1408, dtype),
        27 * attention + 26 * (shared + 64 * 2048) + 3 * 2048 * 11264, 163840 * 2048,
        kv_bytes=27 * (512 + 64) * 2, repeats=0.30,
    )  # fmt: skip


def gpt_oss_120b() -> Shape:
    """gpt-oss-120b: gpt-oss-20b's layers, more of them and with more experts."""
    attention = 2 * 2880 * 4096 + 2 * 2880 * 512
    return Shape(
        "gpt-oss-120b", 36, 128, 4, _expert(2880, 2880, "mxfp4", bias=True), 36 * (attention + 128 * 2880),
        201088 * 2880, kv_bytes=36 * 2 * 8 * 64 * 2, repeats=0.18, skew=0.5,
    )  # fmt: skip


# The demo model's routing with experts of a size that is worth offloading: 6 layers of 16 experts, 4 times over.
DEMO = Shape(
    "demo routing", 24, 16, 2, _expert(2880, 2880, "mxfp4"), 24 * 26_000_000, 201088 * 2880, 24 * 2 * 8 * 64 * 2
)
SHAPES = (mixtral("int4"), qwen3("int4"), deepseek("int4"), gpt_oss(), DEMO)
MEASURED = (mixtral("bf16"), qwen3("bf16"), deepseek("bf16"))  # where expert times were measured: v100-6230r
