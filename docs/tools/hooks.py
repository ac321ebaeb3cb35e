"""What mkdocs does beside reading Markdown: run the code of pages, draw figures, make pages from the package, set formulas."""

from __future__ import annotations

import html
import importlib.util
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import math_core
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
TOOLS = Path(__file__).parent
sys.path[:0] = [str(TOOLS), str(ROOT / "src")]

import generated  # noqa: E402
import made  # noqa: E402
import snippets  # noqa: E402

FORMULA = re.compile(r'<(span|div) class="arithmatex">(?:\\\(|\\\[)(.*?)(?:\\\)|\\\])</\1>', re.DOTALL)
FONT = "fonts/STIXTwoMath-Regular.ttf"


def _page_made(path: str, source: str) -> Path:
    """Run the blocks of a page."""
    return made.made(path.removesuffix(".md").replace("/", "-"), TOOLS / "snippets.py", source, "files")


def _runs(path: str, source: str | None) -> bool:
    """Whether a page has blocks that are run; one that was made has no source."""
    return source is not None and generated.runs(path) and bool(snippets.blocks(Path(source).read_text()))


def on_files(files: Files, config: Any) -> Files:
    """Add the font, the figures, the gallery and the pages that are made from the package; run everything, on all cores."""
    spec = importlib.util.find_spec("ziamath")
    assert spec is not None and spec.origin is not None
    font = (Path(spec.origin).parent / FONT).read_bytes()
    files.append(File.generated(config, "assets/STIXTwoMath-Regular.ttf", content=font))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        drawing = pool.submit(made.made, "figures", TOOLS / "figures.py")
        running = {name: pool.submit(made.example, name) for name in made.EXAMPLES}
        pages_run = [
            pool.submit(_page_made, file.src_uri, file.abs_src_path)
            for file in files.documentation_pages()
            if _runs(file.src_uri, file.abs_src_path)
        ]
    for page in pages_run:
        page.result()  # the error of the first that failed
    drawn, runs = drawing.result(), {name: example.result() for name, example in running.items()}
    for figure in sorted(drawn.glob("*.svg")):
        files.append(File.generated(config, f"figures/{figure.name}", content=figure.read_bytes()))
    for folder in runs.values():
        for figure in sorted(folder.rglob("*.png")):
            files.append(File.generated(config, f"gallery/{figure.name}", content=figure.read_bytes()))
    printed = {name: (folder / "printed").read_text() for name, folder in runs.items()}
    pages = {**generated.reference(), **generated.gallery(printed), "changelog.md": (ROOT / "CHANGELOG.md").read_text()}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Put below each block what it printed; make the table of models."""
    path = page.file.src_uri
    markdown = markdown.replace("<!-- refusals -->", generated.refusals())
    if path == "coverage.md":
        return generated.coverage(markdown)
    if not _runs(path, page.file.abs_src_path):
        return _outside(markdown)
    folder = _page_made(path, page.file.abs_src_path)
    for shown in sorted(file for file in (folder / "files").iterdir() if file.suffix in {".png", ".html"}):
        beside = str(Path(path).parent / shown.name)
        files.append(File.generated(config, beside, content=shown.read_bytes()))
    return snippets.filled(markdown, json.loads((folder / "printed").read_text()))


def _outside(markdown: str) -> str:
    """Files of the repository outside docs have no page: name them without a link."""
    return re.sub(r"\[([^\]]*)\]\(\.\./[^)]*\)", r"\1", markdown)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Set formulas as MathML: no script and no network when the page is read."""
    converter = math_core.LatexToMathML()

    def formula(match: re.Match[str]) -> str:
        block = match[1] == "div"
        try:
            made = converter.convert_with_local_state(html.unescape(match[2]).strip(), displaystyle=block)
        except math_core.LatexError as error:
            raise SystemExit(f"{page.file.src_uri}: {match[2]}: {error}") from error
        return f'<span class="formula">{made}</span>' if block else made

    return FORMULA.sub(formula, content)


def on_post_page(output: str, **_: Any) -> str:
    """Lead from the logo to the start page by its file: opened from a disk, a folder shows its files."""
    return re.sub(r'href="(\.\.?)"', r'href="\1/index.html"', output)
