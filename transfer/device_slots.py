"""The device memory of the expert cache: slots of one size, in slabs.

A slab is one allocation of several slots. It is the unit in which memory is given back: the KV cache grows into what
slabs leave, and a device that runs out of memory gets some of them. Slots are numbered through all slabs, so shrinking
gives up the last ones.

Lifetime: a slot's bytes are rewritten only behind `last_read(slot)`, the event behind the last launch that reads them;
the copy queue makes its stream wait for it.
"""

from moe_offload.transfer.accelerator import Accelerator, Buffer, Event, OutOfDeviceMemoryError

ALIGNMENT = 256  # bytes: of what CUDA allocates, and of the widest loads
SLAB_BYTES = 64 << 20


class DeviceSlots:
    """Up to `slots` slots of `slot_bytes` (filled up to 256) each; as many as fit within the accelerator's budget.

    Raises OutOfDeviceMemoryError when not even `least` slots fit.
    """

    def __init__(
        self, accelerator: Accelerator, slot_bytes: int, slots: int, *, least: int = 1, slab_bytes: int = SLAB_BYTES
    ) -> None:
        self.slot_bytes = -(-slot_bytes // ALIGNMENT) * ALIGNMENT
        self.per_slab = max(1, slab_bytes // self.slot_bytes)
        self._accelerator = accelerator
        self._slabs: list[Buffer] = []
        self._slots: list[Buffer] = []
        self._last_read: list[Event | None] = []
        self._parts: dict[tuple[int, int], Buffer] = {}  # every launch asks for the same: making one takes microseconds
        self.grow(slots)
        if len(self._slots) < least:
            found = len(self._slots)
            self.shrink(0)
            raise OutOfDeviceMemoryError(
                f"the expert cache needs {least} slots of {self.slot_bytes} bytes, but only {found} fit: "
                f"{accelerator.used} of {accelerator.budget} bytes of device memory are taken by the rest of the model"
            )

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def nbytes(self) -> int:
        """Device memory that the slots take."""
        return sum(slab.nbytes for slab in self._slabs)

    def buffer(self, slot: int) -> Buffer:
        """The bytes of a slot."""
        return self._slots[slot]

    def part(self, slot: int, nbytes: int) -> Buffer:
        """The first bytes of a slot: the same object until the slot is freed."""
        found = self._parts.get((slot, nbytes))
        if found is None:
            found = self._parts[slot, nbytes] = self._slots[slot].part(0, nbytes)
        return found

    def last_read(self, slot: int) -> Event | None:
        """The event behind the last launch that reads the slot; None when nothing has read it."""
        return self._last_read[slot]

    def read_until(self, slot: int, event: Event) -> None:
        """`event` is recorded behind a launch that reads the slot."""
        self._last_read[slot] = event

    def grow(self, slots: int) -> int:
        """Allocate until there are `slots` slots or the budget is used up; returns how many there are."""
        while len(self._slots) < slots:
            count = min(self.per_slab, slots - len(self._slots))
            try:
                slab = self._accelerator.allocate(count * self.slot_bytes, f"expert slots {len(self._slabs)}")
            except OutOfDeviceMemoryError:
                room = self._accelerator.budget - self._accelerator.used
                count = min(count - 1, max(0, room) // self.slot_bytes)
                if count < 1:
                    break
                try:
                    slab = self._accelerator.allocate(count * self.slot_bytes, f"expert slots {len(self._slabs)}")
                except OutOfDeviceMemoryError:  # the device has less than the budget allows
                    break
            self._slabs.append(slab)
            self._slots += [slab.part(at * self.slot_bytes, self.slot_bytes) for at in range(count)]
            self._last_read += [None] * count
        return len(self._slots)

    def after_shrinking(self, slots: int) -> int:
        """How many slots are left when at most `slots` may stay: slabs go whole."""
        left = 0
        for slab in self._slabs:
            count = slab.nbytes // self.slot_bytes
            if left + count > slots:
                break
            left += count
        return left

    def forget(self) -> None:
        """The accelerator is closed, and all its memory with it: keep none of it alive."""
        self._slabs.clear()
        self._parts.clear()
        self._slots.clear()
        self._last_read.clear()

    def shrink(self, slots: int) -> int:
        """Free slabs until at most `slots` slots are left; returns how many. What reads the freed ones must have
        passed.
        """
        left = self.after_shrinking(slots)
        if left < len(self._slots):
            self._parts.clear()
        while len(self._slots) > left:
            slab = self._slabs.pop()
            count = slab.nbytes // self.slot_bytes
            for event in self._last_read[-count:]:
                if event is not None:
                    event.synchronize()
            del self._slots[-count:], self._last_read[-count:]
            self._accelerator.free(slab)
        return len(self._slots)
