"""`moe-offload train-predictor`, from a model's folder to a predictor that belongs to it."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_offload import train_command
from moe_offload.cli import main
from moe_offload.predictor.network_file import read_networks
from moe_offload.predictor.trace import read_trace
from moe_offload.train_command import identify
from tests import cli_model

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cli_model.make_folder(tmp_path_factory.mktemp("train") / "model")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["alpha", "beta", "gamma", "delta", "kappa", "sigma", "omega"]
    path.write_text(" ".join(random.Random(1).choices(words, k=1500)))
    return path


@pytest.fixture(scope="module")
def trace(folder: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traced") / "t.safetensors"
    arguments = ["trace", folder, "--prompts", prompts, "-o", path, "--sequence-tokens", 64, "--projected", 16]
    assert main([str(each) for each in arguments]) == 0
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(each) for each in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_from_text(run: Run, folder: Path, prompts: Path, tmp_path: Path) -> None:
    """The file is where `load` looks for it, of this model; the trace that it was made from is gone."""
    code, out, err = run("train-predictor", folder, "--prompts", prompts, "--passes", 1, "--max-tokens", 8000)
    assert code == 0, err
    path = Path(out.strip())
    assert path.parent == tmp_path / "cache" / "moe-offload" / "predictors" and list(path.parent.iterdir()) == [path]
    _, fingerprint = identify(folder)
    info, networks = read_networks(path, fingerprint)
    assert len(networks) == info.layers and 3000 < info.tokens < 8000
    assert "gate look-ahead" in err and "this predictor" in err and "tokens to learn from" in err


def test_from_a_trace(run: Run, folder: Path, trace: Path, tmp_path: Path) -> None:
    code, out, _ = run(
        "train-predictor", folder, "--trace", trace, "-o", tmp_path / "new" / "p", "--passes", 2, "--json"
    )
    said: dict[str, Any] = json.loads(out)
    assert code == 0 and said["predictor"] == str(tmp_path / "new" / "p")
    assert said["model"] == read_trace(trace).info.model and said["passes"] and max(said["passes"]) <= 2
    ahead, learned = said["recall"]["look_ahead"], said["recall"]["learned"]
    assert all(0 < a <= b <= 1 for a, b in zip(ahead, learned, strict=True))
    assert trace.exists()


def test_text_or_a_trace(run: Run, folder: Path, trace: Path, prompts: Path) -> None:
    for extra in ((), ("--trace", trace, "--prompts", prompts)):
        code, out, err = run("train-predictor", folder, *extra)
        assert code == 2 and out == "" and "either --prompts FILE" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [("--passes", 0, "at least 1"), ("--seed", -1, "at least 0"), ("--max-tokens", 0, "at least 1")],
)
def test_values_out_of_bounds(run: Run, folder: Path, prompts: Path, option: str, value: int, words: str) -> None:
    code, _, err = run("train-predictor", folder, "--prompts", prompts, option, value)
    assert code == 2 and f"{option} {value}" in err and words in err and err.count("\n") == 1


def test_a_trace_of_another_model(run: Run, trace: Path, tmp_path: Path) -> None:
    other = cli_model.make_folder(tmp_path / "other", moe_intermediate_size=48)
    code, _, err = run("train-predictor", other, "--trace", trace, "-o", tmp_path / "p")
    assert code == 2 and "another model" in err and err.count("\n") == 1 and not (tmp_path / "p").exists()


def test_a_damaged_trace(run: Run, folder: Path, trace: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    cut.write_bytes(trace.read_bytes()[:-100])
    code, _, err = run("train-predictor", folder, "--trace", cut, "-o", tmp_path / "p")
    assert code == 2 and str(cut) in err and "make it again" in err and not (tmp_path / "p").exists()
    code, _, err = run("train-predictor", folder, "--trace", tmp_path / "none", "-o", tmp_path / "p")
    assert code == 2 and "there is no trace" in err


def test_a_trace_with_too_little(run: Run, folder: Path, prompts: Path, tmp_path: Path) -> None:
    code, _, err = run(
        "trace", folder, "--prompts", prompts, "-o", tmp_path / "t", "--sequence-tokens", 64, "--max-tokens", 64,
        "--projected", 4,
    )  # fmt: skip
    if code == 0:  # the one sequence is for training
        code, _, err = run("train-predictor", folder, "--trace", tmp_path / "t", "-o", tmp_path / "p")
        assert "trace more sequences" in err
    assert code == 2 and not (tmp_path / "p").exists()


def test_a_place_that_is_none(run: Run, folder: Path, trace: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = run("train-predictor", folder, "--trace", trace, "-o", tmp_path / "file" / "p", "--passes", 1)
    assert code == 2 and "cannot write the predictor" in err and err.count("\n") == 1
    code, _, err = run("train-predictor", folder, "--trace", trace, "-o", tmp_path)
    assert code == 2 and "is a folder" in err


def test_what_was_traced_is_kept_after_ctrl_c(
    run: Run, folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    command = ("train-predictor", folder, "--prompts", prompts, "-o", tmp_path / "p", "--passes", 1)
    with monkeypatch.context() as patch:
        patch.setattr(train_command, "train_source", interrupted)
        code, _, err = run(*command, "--sequence-tokens", 64, "--max-tokens", 8000)
        assert code == 130 and "goes on with it" in err
    (kept,) = tmp_path.glob("p*")
    monkeypatch.setattr("moe_offload.tracing._run", None)  # nothing is traced from here on
    code, out, err = run(*command, "--sequence-tokens", 64, "--max-tokens", 8000)
    assert code == 0 and out == f"{tmp_path / 'p'}\n" and not kept.exists(), err


def test_a_kept_trace_of_other_text_makes_room(
    run: Run, folder: Path, prompts: Path, trace: Path, tmp_path: Path
) -> None:
    (tmp_path / "p.trace").write_bytes(trace.read_bytes())
    code, out, err = run(
        "train-predictor", folder, "--prompts", prompts, "-o", tmp_path / "p", "--passes", 1, "--max-tokens", 8000
    )
    assert code == 0 and out and not (tmp_path / "p.trace").exists(), err


def test_ctrl_c_leaves_nothing(
    run: Run, folder: Path, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_command, "train_source", interrupted)
    code, out, err = run("train-predictor", folder, "--trace", trace, "-o", tmp_path / "p")
    assert code == 130 and out == "" and "no predictor was written" in err and not (tmp_path / "p").exists()
