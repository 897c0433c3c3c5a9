"""What a host takes for the parts of a model: by a server profile's rates, or as measured on this machine.

`Took` says which resource was the scarce one beside the seconds, so that a plan can name it.
"""

from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from moe_offload.decode_linear import MOST_TOKENS
from moe_offload.plan_sizes import ExpertLayers, ModelSizes
from moe_offload.transfer.server_profile import ServerProfile

MEMORY, COMPUTE, LINK, CARD_MEMORY, CARD_COMPUTE, DISK, HOST = (
    "CPU memory bandwidth", "CPU compute", "link to the card", "GPU memory bandwidth", "GPU compute", "disk",
    "program between the layers",
)  # fmt: skip

# Of a Zen 4 core, for hosts that nobody measured: seconds of a step, of a layer by how it decodes, and of a module.
STEP_SECONDS = 700e-6
LAYER_SECONDS = {"whole": 25e-6, "layer": 150e-6}
MODULE_SECONDS = 28e-6
_MOST_FUSED = 64  # tokens of a step that goes through the fused layers
_BYTES = {"f32": 4.0, "bf16": 2.0, "f16": 2.0, "fp8": 1.0}  # of a weight, of formats without scales


class Took(NamedTuple):
    """Seconds, and the resource that they were spent on."""

    seconds: float
    resource: str


class HostRates(Protocol):
    """The CPU's side of a prediction."""

    @property
    def read_gbs(self) -> float:
        """What memory gives at most."""
        ...

    def experts(self, group: ExpertLayers, active: float, rows: float) -> Took:
        """One layer's job: so many experts with so many tokens each."""
        ...

    def dense(self, sizes: ModelSizes, tokens: int) -> Took:
        """All that is no expert, in all layers."""
        ...

    def attention(self, nbytes: float, flops: float) -> Took:
        """Keys and values that are read, and what is multiplied with them."""
        ...

    def between(self, sizes: ModelSizes) -> Took:
        """What the program itself takes in a step."""
        ...


def larger(read: float, multiply: float) -> Took:
    """Reading hides multiplying, or the reverse."""
    return Took(read, MEMORY) if read >= multiply else Took(multiply, COMPUTE)


@dataclass(frozen=True, slots=True)
class ProfileHost:
    """A host by its profile. What the program takes between layers is that of a Zen 4."""

    profile: ServerProfile

    @property
    def read_gbs(self) -> float:
        return self.profile.host_read_gbs

    def experts(self, group: ExpertLayers, active: float, rows: float) -> Took:
        profile = self.profile
        for table in profile.expert_tables:
            if table.describes(group.nbytes, group.flops_per_row):
                one, some = _at(table.seconds, 1.0), _at(table.seconds, rows)
                return Took(profile.host_job_seconds + active * some, MEMORY if some < 2 * one else COMPUTE)
        read, multiply = group.nbytes / (profile.host_read_gbs * 1e9), rows * group.flops_per_row / profile.host_flops
        each = larger(read, multiply)
        return Took(profile.host_job_seconds + active * (profile.host_expert_seconds + each.seconds), each.resource)

    def dense(self, sizes: ModelSizes, tokens: int) -> Took:
        flops = 2.0 * sizes.dense_params * tokens
        return larger(sizes.dense_bytes / (self.profile.host_read_gbs * 1e9), flops / self.profile.host_flops)

    def attention(self, nbytes: float, flops: float) -> Took:
        return larger(nbytes / (self.profile.host_read_gbs * 1e9), flops / self.profile.host_flops)

    def between(self, sizes: ModelSizes) -> Took:
        layer = LAYER_SECONDS.get(sizes.step, MODULE_SECONDS * sizes.modules)
        return Took(STEP_SECONDS + sizes.num_layers * layer, HOST)


def _at(seconds: object, rows: float) -> float:
    table: list[float] = seconds  # type: ignore[assignment]
    last = len(table) - 1
    if rows >= last:
        return float(table[last]) * rows / last
    low = int(rows)
    return float(table[low]) + (rows - low) * float(table[low + 1] - table[low])


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds of one expert among others, by tokens; measured at `rows`, straight lines between."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, rows: float) -> float:
        """Before the first point as there, behind the last in proportion."""
        if rows <= self.rows[0]:
            return self.seconds[0]
        if rows >= self.rows[-1]:
            return self.seconds[-1] * rows / self.rows[-1]
        place = bisect_left(self.rows, rows)
        low, high = self.rows[place - 1], self.rows[place]
        share = (rows - low) / (high - low)
        return self.seconds[place - 1] + share * (self.seconds[place] - self.seconds[place - 1])


@dataclass(frozen=True, slots=True)
class MeasuredHost:
    """This machine, as `plan_calibration` measured it for one model's experts.

    curves: by (hidden, inner, format): the job's start is in them. linear_gbs, linear_flops: of linears in their own
    format, through our kernels; torch_gbs, torch_flops: as torch runs them. step, layer, module: seconds that the
    program itself takes: a step, a fused layer, a module of transformers.
    """

    threads: int
    read_gbs: float
    curves: dict[str, Curve]
    linear_gbs: float
    linear_flops: float
    torch_gbs: float
    torch_flops: float
    step: float
    layer: float
    module: float

    def experts(self, group: ExpertLayers, active: float, rows: float) -> Took:
        seconds = active * self.curves[kind_of(group)].at(rows)
        reading = active * group.nbytes / (self.read_gbs * 1e9)
        return Took(seconds, MEMORY if seconds < 2 * reading else COMPUTE)

    def dense(self, sizes: ModelSizes, tokens: int) -> Took:
        ours = sizes.dense not in _BYTES or tokens <= (MOST_TOKENS if sizes.step == "modules" else _MOST_FUSED)
        gbs, flops = (self.linear_gbs, self.linear_flops) if ours else (self.torch_gbs, self.torch_flops)
        return larger(sizes.dense_bytes / (gbs * 1e9), 2.0 * sizes.dense_params * tokens / flops)

    def attention(self, nbytes: float, flops: float) -> Took:
        return larger(nbytes / (self.read_gbs * 1e9), flops / self.torch_flops)

    def between(self, sizes: ModelSizes) -> Took:
        layer = self.module * sizes.modules if sizes.step == "modules" else self.layer
        if sizes.step == "layer":
            layer = max(layer, LAYER_SECONDS["layer"])
        return Took(self.step + sizes.num_layers * layer, HOST)


def kind_of(group: ExpertLayers) -> str:
    """A name of experts that are alike."""
    return f"{group.weights} {group.hidden}x{group.inner}"
