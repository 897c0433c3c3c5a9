"""`moe-offload profiles`: what is listed, what is saved, and what is said of files that are damaged."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload import saved_profiles
from moe_offload.cli import main
from moe_offload.transfer import profile_file
from moe_offload.transfer.find_device import open_accelerator, parse_device
from moe_offload.transfer.profile_file import check_name, read_profile, write_profile
from moe_offload.transfer.server_profile import PROFILES, ServerProfile, find_profile, find_server


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(profile_file, "profile_folder", lambda: tmp_path / "profiles")
    return tmp_path / "profiles"


def saved(name: str = "mine", **changes: Any) -> ServerProfile:
    plain: dict[str, Any] = dict(name=name, expert_tables=(), simulated=False, threads=4)
    return dataclasses.replace(PROFILES["t4"], **(plain | changes))


def cardless(name: str = "mine") -> ServerProfile:
    return saved(name, device="", precision="", memory_bytes=0, memory_gbs=0.0, flops=0.0, link_gbs=0.0)


def test_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profiles"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    for name, profile in PROFILES.items():
        assert f" {name} " in said.out
        assert profile.description.split(",")[0] in said.out
    assert said.out.count("simulated") == len(PROFILES)
    assert all(len(line) <= 100 for line in said.out.splitlines())


def test_every_number_has_its_source() -> None:
    texts = {"name", "description", "sources", "device", "precision", "simulated", "threads"}
    numbers = {each.name for each in dataclasses.fields(ServerProfile)} - texts
    for profile in PROFILES.values():
        sourced = {field for source in profile.sources for field in source.fields}
        assert numbers - sourced <= ({"expert_tables"} if not profile.expert_tables else set()), profile.name
        assert sourced <= numbers
        assert all(source.text for source in profile.sources)


def test_sources_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profiles", "show", "p40"]) == 0
    said = capsys.readouterr().out
    assert "346 GB/s" in said and "E5-2690 v4" in said and "link_gbs" in said


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    write_profile(saved())
    assert main(["profiles", "--json"]) == 0
    said = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert list(said) == [*PROFILES, "mine"]
    assert said["p40"]["simulated"] and not said["mine"]["simulated"]
    assert said["p40"]["memory_gbs"] == PROFILES["p40"].memory_gbs
    assert all(each["sources"] for each in said.values())


def test_save_measures_this_machine(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(saved_profiles, "SECONDS", 0.02)
    monkeypatch.setattr(saved_profiles, "_MIB", 16)
    monkeypatch.setattr(saved_profiles, "_SHAPE", (64, 96))
    monkeypatch.setattr(saved_profiles, "card_of_this_machine", lambda memory, report: None)
    assert main(["profiles", "save", "here", "--threads", "1"]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(folder / "here.json")
    assert [path.name for path in folder.iterdir()] == ["here.json"]
    profile = find_server("here")
    assert profile.host_read_gbs > 0 and profile.host_flops > 0 and profile.threads == 1
    assert not profile.has_card and not profile.simulated
    sourced = {field for source in profile.sources for field in source.fields}
    assert {"host_read_gbs", "host_flops", "host_memory_bytes", "disk_gbs"} <= sourced
    assert main(["profiles"]) == 0
    assert "(saved)" in capsys.readouterr().out


def test_a_saved_one_is_a_virtual_device() -> None:
    write_profile(saved())
    accelerator = open_accelerator(parse_device("virtual:mine"))
    assert accelerator is not None
    with accelerator:
        assert accelerator.budget == PROFILES["t4"].memory_bytes


def test_without_a_card_it_is_no_device() -> None:
    write_profile(cardless())
    assert find_server("mine").host_read_gbs == PROFILES["t4"].host_read_gbs
    with pytest.raises(ValueError, match="has no card"):
        find_profile("mine")


@pytest.mark.parametrize(
    ("name", "said"),
    [("a b", "cannot name"), ("../x", "cannot name"), ("p40", "is a profile of this program"), ("x" * 65, "1 to 64")],
)
def test_names_that_cannot_be(name: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profiles", "save", name]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not folder.exists()


def test_an_unknown_name_has_close_ones(capsys: pytest.CaptureFixture[str]) -> None:
    write_profile(saved("cellar"))
    assert main(["profiles", "show", "celar"]) == 2
    error = capsys.readouterr().err
    assert "did you mean cellar" in error and "v100-6230r" in error
    assert main(["profiles", "show", "gtx1080"]) == 2
    assert "did you mean gtx1080ti" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: b"{", "no JSON"),
        (lambda content: b"[]", "of version None"),
        (lambda content: content | {"version": 2}, "of version 2"),
        (lambda content: content | {"profile": 5}, "holds no profile"),
        (lambda content: _with(content, host_read_gbs="fast"), "host_read_gbs is 'fast'"),
        (lambda content: _with(content, host_read_gbs=-1), "host_read_gbs is -1"),
        (lambda content: _with(content, host_read_gbs=0), "host_read_gbs is 0"),
        (lambda content: _with(content, memory_bytes=1.5), "memory_bytes is 1.5"),
        (lambda content: _with(content, memory_bytes=0), "0 all of them"),
        (lambda content: _with(content, name="other"), "called 'other'"),
        (lambda content: _with(content, sources=[1]), "no source"),
    ],
)
def test_damaged_files_are_one_line(damage: Any, said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_profile(saved())
    content = damage(json.loads(path.read_bytes()))
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert main(["profiles", "show", "mine"]) == 2
    error = capsys.readouterr().err
    assert said in error and "mine.json" in error and error.count("\n") == 1
    assert main(["profiles"]) == 0  # the others are still there
    captured = capsys.readouterr()
    assert "p40" in captured.out and captured.err.startswith("note:")
    with pytest.raises(ValueError, match="mine.json"):
        open_accelerator(parse_device("virtual:mine"))


def _with(content: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return content | {"profile": content["profile"] | changes}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=80)
@given(key=st.sampled_from([each.name for each in dataclasses.fields(ServerProfile)]), value=JSON)
def test_whatever_a_file_holds_it_is_a_profile_or_one_line(
    key: str, value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        here = tmp_path_factory.mktemp("fuzz")
        patch.setattr(profile_file, "profile_folder", lambda: here)
        path = write_profile(saved())
        content = json.loads(path.read_bytes())
        content["profile"][key] = value
        path.write_text(json.dumps(content))
        try:
            assert read_profile("mine").name == "mine"
        except ValueError as error:
            assert "mine.json" in str(error) and "\n" not in str(error)


def test_what_is_read_is_what_was_written() -> None:
    for profile in (saved(), cardless("bare")):
        write_profile(profile)
        assert read_profile(profile.name) == profile
        write_profile(dataclasses.replace(profile, host_read_gbs=1.5))
        assert read_profile(profile.name).host_read_gbs == 1.5
    for name in ("a", "A1._-", "9"):
        check_name(name)


def test_a_full_disk_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(saved_profiles, "measure_machine", lambda name, threads, report: saved(name))
    folder.parent.joinpath("profiles").write_text("in the way")
    assert main(["profiles", "save", "here"]) == 2
    assert "cannot be kept" in capsys.readouterr().err
