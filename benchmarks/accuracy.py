"""What do the weight formats cost in quality? The demo model on its held-out files, format by format.

    python -m benchmarks.accuracy

Everything is held against transformers' own model in f32 by the code of `moe-offload verify`: perplexity, first
choices, errors of logits. Rows are the engine (experts and linears in the format, each precision of activations), and,
to tell the search for int4's scales from plain absmax rounding, transformers with weights that were rounded either way.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import moe_offload
from benchmarks.demo_model.batches import encode_all
from benchmarks.demo_model.corpus import BOS, EOS, load_corpus
from benchmarks.reporting import progress, wide_console, write_result
from moe_offload.cpu_kernels.packed_layout import PackedMatrix
from moe_offload.cpu_kernels.packing import pack_matrix, unpack_matrix
from moe_offload.layer_stream import LayerStream
from moe_offload.model_folder import DEMO_FOLDER
from moe_offload.verify_model import Verified, compare
from moe_offload.verify_reference import load_reference

GROUP = 32
WINDOW = 1024  # the demo model's context
DECODED = 16  # tokens of each window that are given one by one
GOAL = 0.1  # percent of perplexity that int8 may cost

Model = tuple[str, Callable[[], PreTrainedModel]]


def searched(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """int4 as the engine packs it."""
    rows, cols = weights.shape
    layout = PackedMatrix(rows, cols, "int4", GROUP)
    packed = np.zeros(layout.nbytes, np.uint8)
    pack_matrix(weights, layout, packed)
    return unpack_matrix(packed, layout)


def absmax(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """int4 with each group's largest magnitude taken for 7."""
    rows, cols = weights.shape
    padded = np.pad(weights, ((0, 0), (0, -cols % GROUP))).reshape(rows, -1, GROUP)
    scale = (np.abs(padded).max(axis=2, keepdims=True) / 7).astype(np.float16).astype(np.float32)
    rounded = np.rint(np.divide(padded, scale, out=np.zeros_like(padded), where=scale > 0)).clip(-8, 7) * scale
    kept: NDArray[np.float32] = rounded.reshape(rows, -1)[:, :cols].astype(np.float32)
    return kept


def plain_model(dtype: torch.dtype) -> Any:
    """The demo model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(DEMO_FOLDER, dtype=dtype, experts_implementation="eager")


@torch.no_grad()
def rounded_model(rounding: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> Any:
    """The demo model in f32 with the same weights rounded that the engine rounds: experts, projections, output head."""
    model = plain_model(torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3:
            parameter.copy_(torch.stack([torch.from_numpy(rounding(expert.numpy())) for expert in parameter]))
        elif name.endswith("_proj.weight"):
            parameter.copy_(torch.from_numpy(rounding(parameter.numpy())))
    head = rounding(model.lm_head.weight.numpy())  # may be tied: the embedding stays as it is
    model.lm_head.weight = torch.nn.Parameter(torch.from_numpy(head))
    return model


def models(packs: str, quick: bool) -> Iterator[Model]:
    """What is compared: a name, and what loads it."""

    def engine(**options: Any) -> Callable[[], PreTrainedModel]:
        return lambda: moe_offload.load("demo", device="cpu", pack_dir=packs, **options)

    yield "as stored, f32 arithmetic", engine(dtype="float32")
    yield "as stored (bf16)", engine()
    yield "transformers, bf16", lambda: plain_model(torch.bfloat16)
    for weights in ("int8", "int4"):
        for activations in ("auto",) if quick else ("auto", "int16", "int8", "f32"):
            options = dict(weights=weights, dense=weights, activations=activations, dtype="float32")
            yield f"{weights}, activations {activations}", engine(**options)
    yield "int4, other linears int8", engine(weights="int4", dtype="float32")
    yield "int4 weights by search, transformers, f32", lambda: rounded_model(searched)
    yield "int4 weights by absmax, transformers, f32", lambda: rounded_model(absmax)


def windows(tokens: int, smoke: bool) -> list[torch.Tensor]:
    """Held-out files as sequences [1, T]."""
    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO_FOLDER)
    documents = load_corpus().held_out
    if smoke:
        documents, tokens = documents[:2], 512
    stream = torch.from_numpy(encode_all(tokenizer, (BOS + each.text + EOS for each in documents))).long()[:tokens]
    parts: tuple[torch.Tensor, ...] = stream.split(256 if smoke else WINDOW)  # type: ignore[no-untyped-call]
    return [part[None] for part in parts if len(part) > 1]


def score(sequences: list[torch.Tensor], quick: bool) -> dict[str, Verified]:
    """Each model's agreement with the reference, by name."""
    progress("running the reference")
    reference = load_reference(DEMO_FOLDER, dtype=torch.float32)
    with LayerStream(reference) as stream:
        stream.run(sequences)
        logits = [stream.logits(number) for number in range(len(sequences))]
    reference.close()
    found: dict[str, Verified] = {}
    with tempfile.TemporaryDirectory() as packs:
        for name, load in models(packs, quick):
            progress(f"scoring {name}")
            model = load()
            found[name] = compare(logits.__getitem__, model, sequences, decode_tokens=DECODED)
            engine: Any = getattr(model, "offload", None)
            if engine is not None:
                engine.close()
    return found


def main(
    tokens: Annotated[int, typer.Option(min=256, help="Held-out tokens to score.")] = 40_000,
    smoke: Annotated[bool, typer.Option(help="A quick run on few tokens; writes nothing.")] = False,
) -> None:
    """Compare the formats with the reference."""
    sequences = windows(tokens, smoke)
    found = score(sequences, smoke)
    first = next(iter(found.values())).all
    table = Table(
        title=f"The demo model against transformers in f32 (perplexity {first.reference_perplexity:.3f}), "
        f"{first.tokens} held-out tokens in windows of {sequences[0].shape[1]}, {DECODED} of each one by one"
    )
    for column in ("weights", "perplexity", "change", "same first choice", "mean error", "largest", "KL divergence"):
        table.add_column(column, justify="left" if column == "weights" else "right")
    for name, each in found.items():
        part = each.all
        table.add_row(
            name, f"{part.perplexity:.3f}", f"{part.change:+.3f} ± {part.change_error:.3f} %", f"{part.top1:.2f} %",
            f"{part.mean_error:.4f}", f"{part.max_error:.3f}", f"{part.divergence:.6f}",
        )  # fmt: skip
    wide_console().print(table)
    cost = found["int8, activations auto"].all.change
    verdict = "not judged, a smoke run" if smoke else "met" if cost <= GOAL else "MISSED"
    progress(f"goal: int8 costs at most {GOAL} % of perplexity: {verdict} ({cost:+.3f} %)")
    if not smoke:
        rows = [
            {
                "name": name,
                "percent": each.all.change,
                **asdict(each.all),
                "decode": each.decode and asdict(each.decode),
            }
            for name, each in found.items()
        ]
        write_result(
            "accuracy",
            {
                "tokens": first.tokens, "window": WINDOW, "decoded": DECODED, "group": GROUP, "goal_percent": GOAL,
                "reference": "transformers, f32, eager experts", "rows": rows,
            },
        )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
