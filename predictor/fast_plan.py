"""The chain of stages that computes a network for so many tokens, for any source of the same form."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_offload.cpu_kernels import matrix_block as word
from moe_offload.cpu_kernels.matrices import Matrix, MatrixKernel
from moe_offload.cpu_kernels.matrix_block import COUNTERS as MATRIX_COUNTERS
from moe_offload.cpu_kernels.stages import Chain, Stage
from moe_offload.cpu_kernels.team import aligned_bytes
from moe_offload.predictor import fast_stages
from moe_offload.predictor.fast_weights import GROUP, SourceWeights
from moe_offload.predictor.network import input_size
from moe_offload.predictor.trace import DISTANCES, Select

SELECTS = {"linear": fast_stages.LINEAR, "sigmoid": fast_stages.SIGMOID, "softmax": fast_stages.SOFTMAX}
_LANES = 16  # rows of f32 begin on cache lines


class Form(NamedTuple):
    """What networks share a chain by."""

    hidden: int
    experts: int
    top_k: int
    projected: int
    units: int
    depth: int
    select: Select

    @classmethod
    def of(cls, weights: SourceWeights, experts: int, top_k: int) -> "Form":
        """A source's."""
        return cls(
            weights.hidden_size, experts, top_k, weights.projected, weights.units, weights.depth,
            weights.select,
        )  # fmt: skip


class Kernels:
    """The compiled products, shared by all plans."""

    def __init__(self) -> None:
        self._kernels: dict[tuple[int, bool], MatrixKernel] = {}

    def find(self, cols: int, packed: bool) -> MatrixKernel:
        """For matrices of so many inputs, int8 or f32."""
        key = cols, packed
        if key not in self._kernels:
            self._kernels[key] = MatrixKernel(cols, "int8" if packed else "f32", GROUP)
        return self._kernels[key]


class Plan:
    """Buffers and chain for `tokens` tokens. `places` wants a source's addresses, in their order, and then x, x's step
    from token to token in bytes, the length of sequences, and what came before them (0: not known).
    """

    def __init__(self, form: Form, tokens: int, threads: int, kernels: Kernels) -> None:
        experts, units, projected = form.experts, form.units, form.projected
        outputs = DISTANCES * experts
        self._kept: list[Any] = []
        self._threads, self._kernels, self._tokens = threads, kernels, tokens
        self._spare = np.zeros(1, np.int64)  # where there is no place
        inputs = input_size(experts, projected) if units else outputs
        self.inputs = self._rows(max(inputs, outputs + DISTANCES * experts + experts + 1))
        self.scores, self.probabilities = self._rows(outputs), np.zeros((tokens, outputs), np.float32)
        self.activated = self._rows(max(units, 1))
        self.known = np.zeros(tokens, np.int64)
        state_at = input_size(experts, projected) - 2 * projected
        row = int(self.inputs.strides[0])
        base = int(self.inputs.ctypes.data)
        first = [Matrix(0, outputs)] + ([Matrix(0, projected)] if projected else [])
        outs = [(base, row), (base + 4 * state_at, row)][: len(first)]
        stage, places = self._matrices(form.hidden, True, first, 0, 0, outs)
        stages = [stage]
        stages.append(self._look(form, 4 * state_at, base, row))
        look = stages[-1].block
        if units:
            gate_up = self._rows(2 * units)
            step = int(gate_up.strides[0])
            at = int(gate_up.ctypes.data)
            out, out_step = int(self.activated.ctypes.data), int(self.activated.strides[0])
            stage, more = self._matrices(
                inputs, True, [Matrix(0, units)] * 2, base, row, [(at, step), (at + 4 * units, step)]
            )
            stages += [stage, self._activate(at, at + 4 * units, step, units, out, out_step)]
            places += more
            for _ in range(form.depth):
                stage, more = self._matrices(units, True, [Matrix(0, units)], out, out_step, [(at, step)])
                stages += [stage, self._activate(at, 0, step, units, at, step)]
                places += more
                residual = [Matrix(0, units, add=out, add_step=out_step)]
                stage, more = self._matrices(units, True, residual, at, step, [(out, out_step)])
                stages.append(stage)
                places += more
            residual = [Matrix(0, outputs, add=base, add_step=row)]
            scores = [(int(self.scores.ctypes.data), int(self.scores.strides[0]))]
            stage, more = self._matrices(units, False, residual, out, out_step, scores)
            stages.append(stage)
            places_of_out = more[:1]
        else:
            places_of_out = [int(self._spare.ctypes.data)]
        finish = self._finish(form, base, row)
        stages.append(finish)
        tail = (finish.block + at for at in (fast_stages.BIAS, fast_stages.SLOPE, fast_stages.SHIFT))
        call = (
            stages[0].block + word.X,
            stages[0].block + word.X_STEP,
            look + fast_stages.LENGTH,
            look + fast_stages.KEEP,
        )
        self.places = np.array([*places, look + fast_stages.SELECTION, *places_of_out, *tail, *call], np.int64)
        self.chain = Chain(stages)

    def _rows(self, width: int) -> NDArray[np.float32]:
        """[T, width] on cache lines."""
        width = -(-width // _LANES) * _LANES
        rows = aligned_bytes(4 * self._tokens * width).view(np.float32).reshape(self._tokens, width)
        self._kept.append(rows)
        return rows

    def _matrices(
        self, cols: int, packed: bool, matrices: Sequence[Matrix], x: int, x_step: int, outs: Sequence[tuple[int, int]]
    ) -> tuple[Stage, list[int]]:
        """A stage, and the places of its matrices' weights and biases."""
        kernel = self._kernels.find(cols, packed)
        memory = aligned_bytes(kernel.block_bytes(len(matrices), self._tokens, self._threads))
        block = int(memory.ctypes.data)
        cuts = kernel.fill(block, matrices, self._tokens, x, x_step, outs, self._threads)
        self._kept += [memory, cuts]
        entries = [block + word.BYTES + word.ENTRY_BYTES * at for at in range(len(matrices))]
        places = [entry + offset for entry in entries for offset in (word.WEIGHTS, word.BIAS)]
        return Stage(kernel.job, block, MATRIX_COUNTERS // word.LINE), places

    def _stage(self, job: Any, words: dict[int, int]) -> Stage:
        memory = aligned_bytes(fast_stages.BYTES)
        self._kept.append(memory)
        values = memory.view(np.int64)
        values[fast_stages.TOKENS // 8] = self._tokens
        for at, value in words.items():
            values[at // 8] = value
        return Stage(int(job.address), int(memory.ctypes.data), fast_stages.COUNTERS)

    def _look(self, form: Form, state: int, base: int, row: int) -> Stage:
        words = {
            fast_stages.INPUTS: base, fast_stages.INPUTS_STEP: row, fast_stages.EXPERTS_OF_LOOK: form.experts,
            fast_stages.SELECT: SELECTS[form.select], fast_stages.PROJECTED: form.projected, fast_stages.STATE: state,
        }  # fmt: skip
        return self._stage(fast_stages.look_job(), words)

    def _activate(self, gate: int, up: int, step: int, units: int, out: int, out_step: int) -> Stage:
        words = {
            fast_stages.GATE: gate, fast_stages.UP: up, fast_stages.STEP: step, fast_stages.UNITS: units,
            fast_stages.OUT: out, fast_stages.OUT_STEP: out_step,
        }  # fmt: skip
        return self._stage(fast_stages.activate_job(), words)

    def _finish(self, form: Form, base: int, row: int) -> Stage:
        top = np.zeros((self._tokens, form.top_k + 1), np.float32)
        self._kept.append(top)
        words = {
            fast_stages.SCORES: int(self.scores.ctypes.data), fast_stages.SCORES_STEP: int(self.scores.strides[0]),
            fast_stages.LOOK: 0 if form.units else base, fast_stages.LOOK_STEP: row,
            fast_stages.EXPERTS: form.experts, fast_stages.CHOICES: form.top_k,
            fast_stages.KNOWN: int(self.known.ctypes.data),
            fast_stages.PROBABILITIES: int(self.probabilities.ctypes.data), fast_stages.TOP: int(top.ctypes.data),
        }  # fmt: skip
        return self._stage(fast_stages.finish_job(), words)
