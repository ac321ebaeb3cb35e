"""The documentation is true: its code runs, and the names, files and pages that it mentions exist."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import generated
import pytest
import snippets

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"

PAGES = {str(path.relative_to(DOCS)): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
RUN = [name for name, text in PAGES.items() if snippets.blocks(text) and generated.runs(name)]
QUICK = {"index.md", "worked.md", "statements.md", "migration.md", "troubleshooting.md"}
"""The pages that take little time. `make docs` runs all, and `.ci/run` makes them."""


@pytest.mark.parametrize("name", sorted(QUICK))
def test_the_code_of_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert name in RUN
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    outputs = snippets.run(PAGES[name], tmp_path)
    assert any(outputs)
    shown = snippets.filled(PAGES[name], outputs)
    assert shown.count("```text") == PAGES[name].count("```text") + sum(map(bool, outputs))


def test_continuous_integration_runs_every_page() -> None:
    assert "make docs" in (ROOT / ".ci" / "run").read_text().splitlines()


def test_a_block_that_fails_is_not_passed_over(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with 2"):
        snippets.run("```console\n$ pathlift norm nothing:there\n```\n", tmp_path)
    with pytest.raises(ZeroDivisionError):
        snippets.run("```python\n1 / 0\n```\n", tmp_path)


@pytest.mark.hunt
def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert set(PAGES) <= listed
    assert listed - set(PAGES) == {*generated.reference(), "gallery.md", "changelog.md"}


def test_names_that_pages_point_to_exist() -> None:
    for page, text in PAGES.items():
        for path in re.findall(r"\]\[(pathlift\.[\w.]+)\]", text):
            if path.startswith("pathlift.lightning"):
                pytest.importorskip("lightning")
            parts = path.split(".")
            thing = importlib.import_module("pathlift")
            for depth, part in enumerate(parts[1:], 2):
                if not hasattr(thing, part):
                    importlib.import_module(".".join(parts[:depth]))
                thing = getattr(thing, part)
            assert thing is not None, (page, path)


def test_links_between_pages_lead_to_pages_and_headings() -> None:
    for page, text in PAGES.items():
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*\.md)(?:#([\w-]+))?\)", text):
            path = ((DOCS / page).parent / target).resolve()
            if path.name in {"gallery.md", "changelog.md"}:
                continue
            assert path.exists(), (page, target)
            if anchor:
                headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
                slugs = {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-") for heading in headings}
                assert anchor in slugs, (page, target, anchor)


def test_the_functions_of_the_theorems_are_where_the_table_says() -> None:
    rows = re.findall(r"`((?:[a-z_0-9]+/)*[a-z_0-9]+\.py)`(?:: `(\w+)`)?", PAGES["statements.md"])
    assert len(rows) > 12
    for file, function in rows:
        source = (ROOT / "src" / "pathlift" / file).read_text()
        assert not function or re.search(rf"^def {function}\(", source, re.MULTILINE), (file, function)


def test_the_table_of_models_has_every_model_once() -> None:
    page = generated.coverage(PAGES["coverage.md"])
    counts = re.findall(r"^\| \w+ \| \w+ \| (\d+) \| (\d+) \|", PAGES["coverage.md"], re.MULTILINE)
    assert page.count("<tr><td>") == sum(int(models) for models, _ in counts)
    assert page.count("<td>supported</td>") == sum(int(supported) for _, supported in counts)


def test_the_table_of_refusals_is_that_of_the_rules() -> None:
    table = generated.refusals()
    assert "`gelu`" in table and "`softmax`" in table and table.count("\n") > 10


@pytest.mark.hunt
def test_the_reference_has_every_public_name_and_type() -> None:
    pages = generated.reference()
    for name in importlib.import_module("pathlift.public").__all__:
        assert f"::: pathlift.public.{name}\n" in pages["reference/pathlift.md"]
    everything = "".join(pages.values())
    assert all(f".{name}\n" in everything for name in ("PathNorm", "PruneReport", "Inputs", "Other", "Samples", "Graph"))


def test_the_version_is_one() -> None:
    version = importlib.import_module("pathlift").__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"version = {{{version}}}" in PAGES["citation.md"]
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert 'path = "src/pathlift/version.py"' in (ROOT / "pyproject.toml").read_text()
