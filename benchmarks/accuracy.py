"""What do the weight formats cost in quality? Perplexity of the demo model on its held-out files, format by format.

Through the engine (experts and linears both in the format, each precision of activations), and, to tell the search
for int4's scales from plain absmax rounding, through transformers with weights that were rounded either way.
"""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_offload
from benchmarks.demo_model.batches import encode_all
from benchmarks.demo_model.corpus import BOS, EOS, load_corpus
from benchmarks.demo_model.evaluate import token_losses
from benchmarks.reporting import progress, write_result
from moe_offload.cpu_kernels.packed_layout import PackedMatrix
from moe_offload.cpu_kernels.packing import pack_matrix, unpack_matrix
from moe_offload.model_folder import DEMO_FOLDER

GROUP = 32
HELD_OUT = Path(__file__).parents[1] / "tests" / "data" / "held_out_sched.txt"


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


@torch.no_grad()
def rounded_model(rounding: Callable[[Any], Any]) -> Any:
    """The demo model in f32 with the same weights rounded that the engine rounds: experts, projections, output head."""
    model = AutoModelForCausalLM.from_pretrained(DEMO_FOLDER, dtype=torch.float32, experts_implementation="eager")
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3:
            parameter.copy_(torch.stack([torch.from_numpy(rounding(expert.numpy())) for expert in parameter]))
        elif name.endswith("_proj.weight"):
            parameter.copy_(torch.from_numpy(rounding(parameter.numpy())))
    head = rounding(model.lm_head.weight.numpy())  # may be tied: the embedding stays as it is
    model.lm_head.weight = torch.nn.Parameter(torch.from_numpy(head))
    return model


def main(
    tokens: Annotated[int, typer.Option(min=256, help="Held-out tokens to score.")] = 120_000,
    smoke: Annotated[bool, typer.Option(help="A quick run on one file; writes nothing.")] = False,
) -> None:
    """Compare the formats' perplexities."""
    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO_FOLDER)
    if smoke:
        text = tokenizer.bos_token + HELD_OUT.read_text(encoding="utf-8")
        stream = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])[:512]
    else:
        texts = (BOS + item.text + EOS for item in load_corpus().held_out)
        stream = torch.from_numpy(encode_all(tokenizer, texts)).long()[:tokens]
    losses: dict[str, float] = {}

    def score(name: str, model: Any) -> None:
        progress(f"scoring {name}")
        losses[name] = float(token_losses(model, stream).double().mean())

    score("bf16, transformers", AutoModelForCausalLM.from_pretrained(DEMO_FOLDER, dtype=torch.bfloat16))
    with tempfile.TemporaryDirectory() as packs:
        for weights in ("int8", "int4"):
            for activations in ("auto", "int16", "int8", "f32"):
                model = moe_offload.load(
                    "demo", weights=weights, dense=weights, activations=activations, pack_dir=packs, dtype="float32"
                )
                score(f"{weights}, activations {activations}", model)
                model.offload.close()
    score("int4 weights by search, f32 arithmetic", rounded_model(searched))
    score("int4 weights by absmax, f32 arithmetic", rounded_model(absmax))

    base = math.exp(losses["bf16, transformers"])
    table = Table(title=f"Perplexity of the demo model, {len(stream) - 1} held-out tokens")
    for column in ("weights", "perplexity", "against bf16"):
        table.add_column(column, justify="left" if column == "weights" else "right")
    rows = []
    for name, loss in losses.items():
        change = 100 * (math.exp(loss) / base - 1)
        rows.append({"name": name, "loss": loss, "perplexity": math.exp(loss), "percent": change})
        table.add_row(name, f"{math.exp(loss):.3f}", f"{change:+.2f} %")
    Console().print(table)
    if not smoke:
        write_result("accuracy", {"tokens": len(stream) - 1, "group": GROUP, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
