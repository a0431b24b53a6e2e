"""What an earlier run found out is used again, and only where everything that it depends on is the same."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fxfuse import backend, earlier_runs, naming, quantized_linears, rules, site_bytes, validation
from fxfuse.kernels import library
from fxfuse.validation import Verdict, judged
from tests.kernel_programs import BY_NAME


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FXFUSE_REMEMBER", "1")
    naming.name_of.cache_clear()
    yield tmp_path
    naming.name_of.cache_clear()


def name_anew(program) -> naming.Named:
    naming.name_of.cache_clear()  # as in another process
    return naming.name_of(program)


def test_a_name_is_looked_up_once(monkeypatch) -> None:
    program = BY_NAME["rms_norm"].program("bfloat16")
    first = name_anew(program)
    assert first.rule == "rms_norm"
    monkeypatch.setattr(naming, "_name_of", lambda program: pytest.fail("found out again"))
    assert name_anew(program) == first


def test_another_build_and_other_rules_find_out_anew(monkeypatch) -> None:
    program = BY_NAME["rms_norm"].program("bfloat16")
    name_anew(program)
    asked = []
    monkeypatch.setattr(naming, "_name_of", lambda program: asked.append(program) or naming.Named("another"))
    with monkeypatch.context() as patched:
        patched.setattr(earlier_runs, "build", lambda: "another build")
        assert name_anew(program).rule == "another"
    monkeypatch.setitem(rules.RULES, "mine", rules.Rule("mine", test_a_name_is_looked_up_once))
    assert name_anew(program).rule == "another"
    assert len(asked) == 2


def test_nothing_is_remembered_where_that_is_not_wanted(monkeypatch, own_folder) -> None:
    monkeypatch.setenv("FXFUSE_REMEMBER", "0")
    name_anew(BY_NAME["rms_norm"].program("bfloat16"))
    assert not (own_folder / "names").exists()


@pytest.fixture
def judging(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is judged, on a GPU that is not there; every judgement is a ratio of 1.25."""
    done: list[str] = []
    monkeypatch.setattr(validation, "_verdicts", {})
    monkeypatch.setattr(validation, "_judge", lambda trials, mode: done.append(mode) or Verdict(1.25))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "imagined")
    return done


def another_process() -> None:
    validation._verdicts.clear()


def test_a_verdict_on_a_gpu_is_used_again_and_the_report_is_told(judging) -> None:
    gpu = torch.device("cuda", 0)
    validation.taken_from_earlier_runs()
    for _ in range(2):
        assert judged(("program", "site"), lambda: iter([]), gpu, "fast") == Verdict(1.25)
        another_process()
    assert judging == ["fast"]
    assert validation.taken_from_earlier_runs() == 1
    assert validation.taken_from_earlier_runs() == 0


@pytest.mark.parametrize(("key", "device", "mode"), [
    (("program", "site"), "cuda", "full"),  # whoever asks for all of it gets all of it
    (("program", "site"), "cpu", "fast"),
    (("program", torch.bfloat16), "cuda", "fast"),  # not text: what it prints may not be all that it is
])  # fmt: skip
def test_other_verdicts_are_found_anew(key, device, mode, judging) -> None:
    for _ in range(2):
        judged(key, lambda: iter([]), torch.device(device), mode)
        another_process()
    assert judging == [mode, mode]


def test_another_site_another_program_another_device_are_other_questions(judging, monkeypatch) -> None:
    gpu = torch.device("cuda", 0)
    for key in (("program", "site"), ("program", "another"), ("another", "site")):
        judged(key, lambda: iter([]), gpu, "fast")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another")
    another_process()
    judged(("program", "site"), lambda: iter([]), gpu, "fast")
    assert len(judging) == 4


def test_a_spoiled_file_is_no_answer(own_folder: Path) -> None:
    earlier_runs.remember("names", "rms_norm", "a program")
    assert earlier_runs.recall("names", "a program") == "rms_norm"
    (file,) = (own_folder / "names").iterdir()
    for spoiled in (b'"rms_n', b"", b"\xff\xfe"):
        file.write_bytes(spoiled)
        assert earlier_runs.recall("names", "a program") is None


@pytest.mark.parametrize("call", ["os.replace", "tempfile.NamedTemporaryFile"])
def test_where_nothing_can_be_written_nothing_is_remembered(call: str, own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full, a folder that became one to read only: no reason to decline a site. No part of a file is left."""
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"fxfuse.kernels.library.{call}", fail)
    assert name_anew(BY_NAME["rms_norm"].program("bfloat16")).rule == "rms_norm"
    assert not list((own_folder / "names").iterdir())


def test_sources_that_changed_while_this_runs_are_a_build_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process runs is the old text; what a later one finds on disk, and would ask under, is the new."""
    written = earlier_runs.build.__wrapped__
    assert written() == written()
    monkeypatch.setattr(earlier_runs, "_LOADED", 0.0)  # everything was changed since
    assert written() != written()


def test_a_folder_of_somebody_elses_is_not_fallen_back_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody can make the folder in the system's temporary one first; what lies in it is run."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    no_folder = tmp_path / "a file"
    no_folder.touch()
    ours = library._made.__wrapped__(str(no_folder))
    assert ours.parent == tmp_path
    assert library._made.__wrapped__(str(no_folder)) == ours
    theirs = ours.rename(tmp_path / f"fxfuse-{os.getuid() + 1}")
    monkeypatch.setattr(library.os, "getuid", lambda: theirs.stat().st_uid + 1)
    assert library._made.__wrapped__(str(no_folder)) != theirs


def normed(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def kept_for_backward(width: int = 64) -> list[tuple[int, int]]:
    """What each site of a small function keeps, by the report, as a process finds it out that knows all verdicts."""
    torch._dynamo.reset()
    records: list = []
    of_backend = backend.new_record
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "new_record", lambda: records.append(of_backend()) or records[-1])
        x, w = (torch.randn(*shape, dtype=torch.bfloat16, requires_grad=True) for shape in ((6, width), (width,)))
        torch.compile(normed, backend="fxfuse", dynamic=True, options={"validate": "off"})(x, w)
    return [(site.saved_bytes_before, site.saved_bytes_after) for record in records for site in record.sites]


def test_saved_bytes_are_measured_once(monkeypatch) -> None:
    measured = kept_for_backward()
    assert len(measured) == 1
    assert measured[0][0] > measured[0][1] > 0
    monkeypatch.setattr(site_bytes, "REMEMBERED_ON", ("cpu",))
    assert kept_for_backward() == measured
    with monkeypatch.context() as patched:
        patched.setattr(site_bytes, "_kept", lambda *asked: pytest.fail("measured again"))
        assert kept_for_backward() == measured
    assert kept_for_backward(128) != measured
    with torch.autocast("cpu", dtype=torch.bfloat16), monkeypatch.context() as patched:
        asked: list = []
        of_build = site_bytes._kept
        patched.setattr(site_bytes, "_kept", lambda *given: asked.append(1) or of_build(*given))
        kept_for_backward()
        assert asked


def test_a_kind_of_4_bit_weight_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is not there, where one kind is wrong."""
    compared: list[tuple] = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(quantized_linears, "check_kind", lambda *kind: compared.append(kind) or ("" if kind[1] == 64 else "it differs"))

    def anew(index: int, blocksize: int, again: bool = False) -> str:
        quantized_linears._found_out.cache_clear()  # as in another process
        return quantized_linears._differs(torch.device("cuda", index), blocksize, "nf4", (128, 256), torch.bfloat16, True, again)

    assert [anew(0, 64), anew(0, 64), anew(0, 128), anew(0, 128), anew(1, 64)] == ["", "", "it differs", "it differs", ""]
    assert len(compared) == 3
    assert anew(0, 64, again=True) == ""
    assert len(compared) == 4
    monkeypatch.setattr(earlier_runs, "build", lambda: "another build")
    assert anew(0, 64) == ""
    assert len(compared) == 5
