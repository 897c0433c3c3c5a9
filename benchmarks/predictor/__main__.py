"""How well are the next layers' experts known, by the free baselines and by a trained predictor?

    python -m benchmarks.predictor [TRACE] [--train TRACE] [--predictor FILE] [--smoke]

TRACE is of text that nothing was trained on; by default the demo model's. Baselines count over the training sequences
of another trace (--train), or of TRACE itself, whose test sequences are what everybody is measured on. Every figure is
defined in predictor/metrics.py, and given for decode and prefill apart, at distances 1, 2 and 3, with 95 % intervals
by bootstrap over sequences. What it is worth to a cache comes beside; simulated times are in `benchmarks.prefetch`.

The committed figures, an hour of two cores:

    python -m benchmarks.demo_model.trace_text train text.txt
    moe-offload trace demo --prompts text.txt --max-tokens 1500000 -o train.safetensors
    moe-offload train-predictor demo --trace train.safetensors --passes 3 -o demo.safetensors
    python -m benchmarks.predictor --train train.safetensors --predictor demo.safetensors

The trace in the repository has the projections of that training trace; one made again may differ in their last digits,
and then TRACE has to be made again too: `trace_text held-out text.jsonl`, `moe-offload trace demo --prompts text.jsonl
--like train.safetensors -o TRACE`.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.predictor.measure import CACHES, COST, LOOK_AHEAD, baselines, measure
from benchmarks.predictor.tables import DIFFERENT, PUBLISHED, show
from benchmarks.reporting import wide_console, write_result
from moe_offload.predictor.errors import PredictorError, TraceError
from moe_offload.predictor.interface import Predictor
from moe_offload.predictor.metrics import THRESHOLD
from moe_offload.predictor.network import LearnedPredictor
from moe_offload.predictor.network_file import read_networks
from moe_offload.predictor.synthetic import Routing, Size, synthetic_trace
from moe_offload.predictor.trace import TEST, TRAIN, VALIDATION, Trace, read_trace

DEMO_TRACE = Path(__file__).parents[2] / "tests" / "data" / "demo_trace.safetensors"
SMOKE = Size(layers=4, experts=16, top_k=2, sequences=40, tokens=24, prompt_tokens=20, hidden=16)


def opened(held_out: Path, train: Path | None, smoke: bool) -> tuple[Trace, Trace]:
    """The trace to measure on, and the one to count over."""
    if smoke:
        made = synthetic_trace(SMOKE, Routing(0.45, 0.35, (0.8, 0.7, 0.6)))
        return made, made
    trace = read_trace(held_out)
    return trace, trace if train is None else read_trace(train, trace.info.model)


def sequences_of(trace: Trace, fitted: Trace) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """To measure on, to count over, and to fit on what tokens of a prompt have in common."""
    tested, counted = trace.in_split(TEST), fitted.in_split(TRAIN)
    if not len(tested) or not len(counted):
        which = (
            "test sequences: trace more text" if not len(tested) else "training sequences: give another with --train"
        )
        raise TraceError(f"the trace has no {which}")
    checked = fitted.in_split(VALIDATION)
    return tested, counted, checked if len(checked) else counted


def main(
    trace: Annotated[Path, typer.Argument(help="Trace of held-out text.")] = DEMO_TRACE,
    train: Annotated[Path | None, typer.Option(help="Trace to fit the baselines on.")] = None,
    predictor: Annotated[list[Path] | None, typer.Option(help="Trained predictor; may be repeated.")] = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Of presence.")] = THRESHOLD,
    smoke: Annotated[bool, typer.Option(help="Baselines on a small synthetic trace; writes nothing.")] = False,
) -> None:
    """Measure predictors on a held-out trace; how the committed figures were made stands in this file."""
    try:
        held_out, fitted = opened(trace, train, smoke)
        tested, counted, checked = sequences_of(held_out, fitted)
        learned: list[Predictor] = []
        for path in predictor or []:
            networks = read_networks(path, held_out.info.model).networks
            learned.append(LearnedPredictor(networks, "learned" if len(predictor or []) == 1 else path.stem))
    except (TraceError, PredictorError) as error:
        raise typer.BadParameter(str(error)) from error
    measured = measure([*baselines(fitted, counted), *learned], held_out, tested, (fitted, checked), threshold)
    what = "synthetic" if held_out.info.synthetic else held_out.info.model_type
    console = wide_console()
    show(console, measured, what, threshold)
    if smoke:
        recall = measured.evaluations[LOOK_AHEAD]["decode"].at(1).recall.value
        console.print(f"smoke: look-ahead's recall at distance 1 on a synthetic trace is {recall:.3f}")
        return
    info = held_out.info
    path = write_result(
        "predictor",
        {
            "question": "how well the next layers' experts are known, on text that nothing was trained on",
            "routing": "synthetic" if info.synthetic else "real",
            "model_type": info.model_type, "layers": info.layers, "experts": info.experts, "top_k": info.top_k,
            "note": info.note, "sequences": len(tested), "counted_sequences": len(counted), "threshold": threshold,
            "published": PUBLISHED, "published_differ": DIFFERENT,
            "caches_hold_share": list(CACHES), "cost_of_loading_ahead": COST,
            **measured.to_dict(),
        },
    )  # fmt: skip
    console.print(f"written to {path.name}")


if __name__ == "__main__":
    typer.run(main)
