"""Which format the experts run in: what the user named, or with "auto" the best that fits in memory."""

from dataclasses import dataclass

from moe_offload.conversion import PackFormat, StoredExperts
from moe_offload.memory import format_bytes
from moe_offload.models.errors import OptionError, UnsupportedModelError
from moe_offload.options import Weights


@dataclass(frozen=True, slots=True)
class WeightChoice:
    """`packed` is the format that the experts are converted to; None: they are read as stored.

    `reason` is one sentence about an "auto" choice, with sizes. `notable`: the user should hear of it.
    """

    packed: PackFormat | None
    reason: str = ""
    notable: bool = False


def choose_weights(wanted: Weights, experts: StoredExperts, other_bytes: int, room: int) -> WeightChoice:
    """Decide for `wanted`; `room` bytes of memory are there for the experts and the model's other_bytes.

    auto takes the experts as stored if that fits, else int8, else int4; what fits in no way runs from disk, as stored.
    MXFP4 is as small as anything, and is only put into another order.

    Raises OptionError when `wanted` is neither the stored format nor one to convert to, UnsupportedModelError when the
    architecture's experts can only run as they are stored.
    """
    stored = ", ".join(experts.formats)
    runnable = all(layer.activation is not None for layer in experts.spec.layers)
    if wanted in ("int8", "int4"):
        if not runnable:
            raise UnsupportedModelError(
                f"the experts of {experts.spec.model_type!r} run through torch and have to stay {stored}: "
                f"weights={wanted!r} is not possible"
            )
        return WeightChoice("int8" if wanted == "int8" else "int4")
    if wanted not in ("auto", stored):
        raise OptionError(
            f"weights={wanted!r}, but the experts are stored as {stored}: give that, 'int8', 'int4' or 'auto'"
        )
    if stored == "mxfp4":
        return WeightChoice("mxfp4", "mxfp4, as stored") if runnable else WeightChoice(None)
    if wanted != "auto":
        return WeightChoice(None)
    return _automatic(experts, stored, other_bytes, room, runnable)


def _automatic(experts: StoredExperts, stored: str, other_bytes: int, room: int, runnable: bool) -> WeightChoice:
    needed = experts.nbytes + other_bytes
    if needed <= room:
        return WeightChoice(None, f"{stored}, as stored: its {format_bytes(needed)} fit in {format_bytes(room)}")
    sizes: list[tuple[PackFormat, int]] = [(each, experts.packed_bytes(each)) for each in ("int8", "int4")]
    too_large = (
        f"as stored ({stored}) the model needs {format_bytes(needed)}, and {format_bytes(room)} of memory are free"
    )
    if runnable:
        for format_, size in sizes:
            if size < experts.nbytes and size + other_bytes <= room:
                reason = f"{format_}, {format_bytes(size + other_bytes)}: {too_large}"
                return WeightChoice(format_, reason, notable=True)
    return WeightChoice(
        None, f"{stored}, as stored, from disk: {too_large}, nor does a smaller format fit", notable=True
    )
