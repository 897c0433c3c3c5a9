"""A loaded model's logits held against the reference's, on the same sequences.

Most of a sequence is given as a prompt; its last tokens one by one with the keys and values of what came before, which
is what a generation does and what other kernels run. The reference has no cache: it sees every sequence at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_offload.models.errors import MoeOffloadError
from moe_offload.verify_metrics import Agreement, Comparison

Progress = Callable[[int, int], None]  # tokens that are compared, tokens in all


@dataclass(frozen=True, slots=True)
class Verified:
    """What `compare` found: over all tokens, and over those that came as a prompt and one by one."""

    all: Agreement
    prompt: Agreement
    decode: Agreement | None  # None where no token came alone


@torch.inference_mode()
def compare(
    reference: Callable[[int], torch.Tensor],
    model: PreTrainedModel,
    sequences: Sequence[torch.Tensor],
    *,
    decode_tokens: int = 0,
    progress: Progress | None = None,
) -> Verified:
    """Compare a model on sequences [1, T] with the logits [1, T, V] that `reference` gives for each one's number.

    decode_tokens: of each sequence so many, at its end, are given one by one.

    Raises MoeOffloadError when the reference's logits are no numbers.
    """
    prompt, decode = Comparison(), Comparison()
    done, total = 0, sum(ids.shape[1] for ids in sequences)
    for number, ids in enumerate(sequences):
        expected = reference(number)[0]
        if bool(expected.isnan().any()):
            raise MoeOffloadError(
                "the reference's own logits are no numbers: its dtype overflows, try --reference-dtype f32, or its "
                "weights are damaged"
            )
        length = ids.shape[1]
        first = length - min(decode_tokens, length - 1)
        output = model(input_ids=ids[:, :first], use_cache=first < length)
        prompt.add(expected[:first], _rows(output), ids[0, 1 : first + 1])
        for at in range(first, length):
            output = model(input_ids=ids[:, at : at + 1], past_key_values=output.past_key_values, use_cache=True)
            decode.add(expected[at : at + 1], _rows(output), ids[0, at + 1 : at + 2])
            if progress is not None:
                progress(done + at + 1, total)
        done += length
        if progress is not None:
            progress(done, total)
    every = Comparison()
    every.merge(prompt)
    every.merge(decode)
    return Verified(every.result(), prompt.result(), decode.result() if decode.tokens else None)


def _rows(output: Any) -> torch.Tensor:
    """The logits [T, V] of a model's output for one sequence."""
    logits: torch.Tensor = output.logits[0].float().cpu()
    return logits
