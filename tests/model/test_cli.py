"""The command: every verb is wired, and bad input gets one sentence and exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fxfuse.cli import app
from fxfuse.doctor import Finding, examine, healthy, prognosis
from fxfuse.model_source import UnknownModel, config_of, model_of
from fxfuse.reporting.records import Report

VERBS = ("demo", "doctor", "explain", "derive", "bench", "validate")
SMALL = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL}))
    return tmp_path


def invoke(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str) -> None:
    code, said = invoke(verb, "--help")
    assert code == 0
    assert "Usage" in said


def test_without_a_verb_help_is_shown() -> None:
    _, said = invoke()
    assert all(verb in said for verb in VERBS)


@pytest.mark.parametrize("verb", ["explain", "bench", "validate"])
def test_a_model_that_is_none_gets_one_sentence(verb: str) -> None:
    code, said = invoke(verb, "no/such/model")
    assert code == 2
    assert said.startswith("fxfuse: 'no/such/model' is no folder, config file, transformers type or")
    assert "Traceback" not in said


def test_a_config_is_explained_as_table_json_and_page(folder: Path) -> None:
    code, said = invoke("explain", str(folder))
    assert code == 0
    assert "rms_norm" in said
    code, said = invoke("explain", str(folder), "--json", "--html", str(folder / "report.html"))
    assert code == 0
    assert Report.from_json(said).count("rms_norm") == 3
    assert "rms_norm" in (folder / "report.html").read_text()


def test_a_budget_that_is_none_gets_one_sentence(folder: Path) -> None:
    code, said = invoke("explain", str(folder), "--memory", "much")
    assert code == 2
    assert said.startswith("fxfuse: memory")


def test_a_config_is_found_in_a_folder_a_file_and_by_type(folder: Path) -> None:
    for source in (folder, folder / "config.json"):
        assert config_of(str(source)).hidden_size == 16
    assert config_of("llama").model_type == "llama"


def test_a_model_without_weights_is_drawn_from_its_config(folder: Path) -> None:
    model = model_of(str(folder))
    assert model.config.num_hidden_layers == 2
    model.save_pretrained(folder)
    again = model_of(str(folder))
    assert all((again.state_dict()[name] == value).all() for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not JSON"),
        ("[]", "is not the config of a known model_type"),
        ("{}", "is not the config of a known model_type"),
        ('{"model_type": "no_such_type"}', "is not the config of a known model_type"),
    ],
)
def test_a_broken_config_file_is_named(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(UnknownModel, match=sentence):
        config_of(str(path))


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match=r"has no config\.json"):
        config_of(str(tmp_path))


def test_a_model_that_is_no_language_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UnknownModel, match="does not give a causal language model"):
        model_of(str(tmp_path))


def test_a_rule_and_a_function_of_a_file_are_derived(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def gate(x, y):\n    return x * y.sigmoid()\n")
    for words in (["rms_norm"], [f"{path}:gate"], [f"{path}:gate", "--shape", "4x8", "--shape", "4x8"]):
        code, said = invoke("derive", *words)
        assert code == 0
        assert "d_x" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["no_such_rule"], "is no FILE.py:FUNCTION and no rule; rules are"),
        (["{file}:absent"], "defines no function 'absent'"),
        (["{file}:gate", "--shape", "4x8"], "give no shape, or one for each of x, y: got 1"),
        (["{file}:gate", "--shape", "4x8", "--shape", "huge"], "a shape is numbers joined by x"),
    ],
)
def test_what_cannot_be_derived_gets_one_sentence(tmp_path: Path, words: list[str], sentence: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def gate(x, y):\n    return x * y.sigmoid()\n")
    code, said = invoke("derive", *(word.format(file=path) for word in words))
    assert code == 2
    assert sentence in said


def test_doctor_finds_this_machine_healthy() -> None:
    findings = examine()
    assert healthy(findings), [finding for finding in findings if not finding.good]
    code, said = invoke("doctor")
    assert code == 0
    assert "torch" in said


def test_doctor_is_not_healthy_when_fusing_fails() -> None:
    findings = [Finding("cpu", False, "wrong by 1e-2", needed=True), Finding("gpu", False, "none")]
    assert not healthy(findings)
    assert prognosis(findings) == ["fxfuse does not work here; the lines marked NO say why."]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--plot", "frontier.svg"], "give one with --memory"),
        (["--memory", "many"], "memory takes None, 'auto', a fraction"),
        (["--memory", "1.5"], "which is no fraction"),
        (["--memory", "1000GiB", "--device", "NVIDIA H200"], "is more than NVIDIA H200 has"),
        (["--memory", "1GiB", "--optimizer", "lion"], "nothing is known of an optimizer 'lion'"),
        (["--memory", "1GiB", "--device", "abacus"], "nothing is known of a device 'abacus'"),
        (["--memory", "10KiB"], "the least possible is"),
    ],
)
def test_a_budget_that_cannot_be_gets_one_sentence(folder: Path, words: list[str], told: str) -> None:
    code, said = invoke("explain", str(folder), *words)
    assert code == 2
    assert said.startswith("fxfuse: ")
    assert told in said
    assert "Traceback" not in said


def test_a_budget_is_explained_with_its_frontier(folder: Path) -> None:
    drawn = folder / "frontier.svg"
    code, said = invoke("explain", str(folder), "--memory", "1GiB", "--batch", "2", "--seq", "32", "--json", "--plot", str(drawn),
                        "--html", str(folder / "report.html"))  # fmt: skip
    assert code == 0
    plan = Report.from_json(said).memory
    assert len(plan.blocks) == 2
    assert plan.budget == 1 << 30
    assert drawn.read_text().startswith("<svg")
    assert "<h2>Memory</h2>" in (folder / "report.html").read_text()
