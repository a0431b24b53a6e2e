"""What the documents say is so: tables come from result files, links lead somewhere, commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.tables import RESULTS, regenerate
from fxfuse.rules import RULES

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_what_the_result_files_say(document: Path) -> None:
    text = document.read_text()
    assert regenerate(text, RESULTS) == text, "run: python benchmarks/tables.py"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_named_files_are_there(document: Path) -> None:
    text = document.read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (document.parent / link).exists(), link
    for named in re.findall(r"`((?:fxfuse|kernels|patterns|benchmarks|tests)/[\w/]+(?:\.py|/))`", text):
        assert (ROOT / named).exists(), named


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_says_something(document: Path) -> None:
    text = document.read_text()
    assert text.startswith("# ")
    assert len(text.splitlines()) > 15


def test_the_rule_that_is_written_as_an_example_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs/writing_a_rule.md").read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    try:
        exec(compile("\n".join(code for language, code in blocks if language == "python"), "writing_a_rule.md", "exec"), {})
        said = capsys.readouterr().out
    finally:
        del RULES["peak_norm"]
    printed = next(code for language, code in blocks if code.startswith("forward"))
    assert printed.split("(relative errors")[0] in said
    assert re.search(r"^ peak_norm +\S+ +2 ", said, re.MULTILINE), said


def test_the_readme_names_every_verb_and_only_those() -> None:
    from fxfuse.cli import app

    verbs = {command.callback.__name__ for command in app.registered_commands}
    assert set(re.findall(r"^\| `fxfuse (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE)) == verbs
