"""Links of the pages, and the pages that messages and docstrings name, lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [file for folder in ("megavar", "examples", "tools", "conf") for file in (ROOT / folder).rglob("*.*")]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def check(target: str, source: Path) -> None:
    name, _, anchor = target.partition("#")
    file = (source.parent / name) if name else source
    assert file.exists(), f"{source.name} links to {target}"
    assert not anchor or anchor in anchors(file), f"{source.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_pages_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", page.read_text())
    for target in (one or other for one, other in links):
        if not re.match(r"https?:", target):
            check(target, page)


def test_pages_that_the_code_names_exist():
    named = {
        (target, file)
        for file in SOURCES
        if file.suffix in (".py", ".yaml")
        for target in re.findall(r"docs/[\w-]+\.md(?:#[\w-]+)?", file.read_text())
    }
    assert ("docs/troubleshooting.md#refused-settings", ROOT / "megavar" / "runs" / "manifest.py") in named
    for target, _ in named:
        check(target, ROOT / "README.md")


def test_every_page_is_listed_in_the_readme():
    text = (ROOT / "README.md").read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"docs/{page.name}" not in text] == []
