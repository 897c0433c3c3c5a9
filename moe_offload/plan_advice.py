"""What a model lacks on a server, and the changes that would make it fit, each alone, smallest first.

A change is as large as the ratio that it changes something by: half of the context counts as twice the memory, or half
of the bits of every expert.
"""

from collections.abc import Callable
from dataclasses import replace
from math import log2

from moe_offload.memory import format_bytes
from moe_offload.models.spec import BITS_PER_WEIGHT
from moe_offload.plan_model import MOST_BYTES, Wish, judge
from moe_offload.plan_placement import Budgets, Placement
from moe_offload.plan_sizes import PlannedModel

_STEP = 256  # positions
_LARGE = 1.0  # of changes, twice or half of something: two may be smaller
_MOST = 5  # that are said
_GB = 10**9
_SMALL = 10**7  # bytes: where less is lacking, whole gigabytes would hide it


def say_what_lacks(placement: Placement, wish: Wish) -> str:
    """One line."""
    said = []
    if placement.lacking_gpu:
        said.append(
            f"the card lacks {format_bytes(placement.lacking_gpu)} of its {format_bytes(wish.budgets.gpu)}: "
            f"{format_bytes(placement.gpu_dense)} of non-expert weights, {format_bytes(placement.gpu_kv)} of KV cache "
            "and two experts have to be there"
        )
    if placement.lacking_ram:
        said.append(
            f"the host lacks {format_bytes(placement.lacking_ram)} of its {format_bytes(wish.budgets.ram)}: "
            f"{format_bytes(placement.ram_dense)} of non-expert weights, {format_bytes(placement.ram_kv)} of KV cache "
            f"and {format_bytes(placement.ram_program)} of the program have to be there"
        )
    if placement.disk and not said:
        said.append(f"{format_bytes(placement.disk)} of experts have no place in memory and are read from disk")
    return "; ".join(said)


def changes_that_fit(model: PlannedModel, wish: Wish) -> tuple[str, ...]:
    """Sentences, the smallest change first. Where none but a larger machine is enough, with narrower experts too."""
    found = _single_changes(model, wish)
    if not found or min(ratio for ratio, _ in found) > _LARGE:
        for name in _narrower(model, wish.weights):
            ratio = log2(BITS_PER_WEIGHT[wish.weights] / BITS_PER_WEIGHT[name])
            others = _single_changes(model, replace(wish, weights=name))
            found += [
                (ratio + other, f"--weights {name} and {text}") for other, text in others if "--weights" not in text
            ]
    return tuple(text for _, text in sorted(found)[:_MOST])


def _single_changes(model: PlannedModel, wish: Wish) -> list[tuple[float, str]]:
    """How large each is, and what it is."""

    def fits(other: Wish) -> bool:
        return judge(model.sizes(other.weights), other) == "fits"

    found: list[tuple[float, str]] = []
    for name in _narrower(model, wish.weights):
        if fits(replace(wish, weights=name)):
            ratio = BITS_PER_WEIGHT[wish.weights] / BITS_PER_WEIGHT[name]
            found.append((log2(ratio), f"--weights {name} instead of {wish.weights}"))
            break
    context = _most(wish.context // _STEP, lambda n: fits(replace(wish, context=n * _STEP))) * _STEP
    if 0 < context < wish.context:
        found.append((log2(wish.context / context), f"--context {context} instead of {wish.context}"))
    batch = _most(wish.sequences - 1, lambda n: fits(replace(wish, sequences=n)))
    if batch:
        found.append((log2(wish.sequences / batch), f"--batch {batch} instead of {wish.sequences}"))
    gpu, ram = wish.budgets.gpu, wish.budgets.ram
    more = _least_memory(ram, lambda n: fits(replace(wish, budgets=Budgets(gpu, n))))
    if more:
        found.append((log2((ram + more) / ram), f"{_amount(more)} more memory (--ram {_size(ram + more)})"))
    if gpu:
        card = _least_memory(gpu, lambda n: fits(replace(wish, budgets=Budgets(n, ram))))
        if card:
            found.append((log2((gpu + card) / gpu), f"a card with {_amount(card)} more for the model"))
        if fits(replace(wish, budgets=Budgets(0, ram))):
            found.append((4.0, "the CPU alone"))
    return found


def _narrower(model: PlannedModel, weights: str) -> tuple[str, ...]:
    names = model.formats
    return names[names.index(weights) + 1 :] if weights in names else ()


def _most(highest: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `highest` that fits; 0 where none does. More never fits where less does not."""
    low, high = 0, highest
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _least_memory(have: int, fits: Callable[[int], bool]) -> int:
    """Bytes beyond `have` that make it fit, rounded up to what people buy; 0 where no amount does."""
    if not fits(MOST_BYTES):
        return 0
    low, high = have, MOST_BYTES
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    lacking = high - have
    unit = _GB if lacking > _SMALL * 10 else _SMALL // 10
    return -(-lacking // unit) * unit


def _amount(nbytes: int) -> str:
    return f"{nbytes // _GB} GB" if nbytes % _GB == 0 else f"{nbytes / 1e6:.0f} MB"


def _size(nbytes: int) -> str:
    """An option's value that is no smaller."""
    return f"{-(-nbytes // _GB)}GB" if nbytes >= 10 * _GB else f"{-(-nbytes // 10**6)}MB"
