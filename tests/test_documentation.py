"""README.md and docs/ name files, modules and symbols that exist, and link to pages that exist."""

import ast
import re

import pytest
import tiny

PAGES = [tiny.ROOT / "README.md", *sorted((tiny.ROOT / "docs").glob("*.md"))]
ROOMS = sorted(
    {path.parent.name for path in tiny.ROOT.glob("*/*") if path.suffix in (".py", ".sh")} | {"docs", "assets"}
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)|src=\"([^\"]+)\"", page.read_text())
    for link in filter(None, map("".join, links)):
        assert link.startswith("https://") or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_modules_exist(page):
    text = page.read_text()
    paths = re.findall(rf"(?<![\w/.])((?:{'|'.join(ROOMS)})/[\w./-]*\w\.(?:py|sh|md|png|jsonl))", text)
    modules = [name.replace(".", "/") + ".py" for name in re.findall(r"-m ([a-z0-9_]+\.[a-z0-9_.]+)", text)]
    missing = {path for path in [*paths, *modules] if not (tiny.ROOT / path).is_file()}
    assert not missing


def test_symbols_are_where_the_map_says():
    """`path.py`, `Symbol`: a class, function or constant of that file, or a class's attribute or method."""
    pairs = []
    for page in PAGES:
        for path, symbols in re.findall(r"`([\w/]+\.py)`((?:,? (?:and )?`\w[\w.]*`)+)", page.read_text()):
            pairs += [(path, symbol) for symbol in re.findall(r"`([\w.]+)`", symbols) if not symbol.endswith(".py")]
    assert len(pairs) > 15
    for path, symbol in pairs:
        names = defined(ast.parse((tiny.ROOT / path).read_text()))
        assert symbol in names, f"{path} does not define {symbol}"


def defined(tree):
    """Names of a module, and Class.name of what its classes define."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{name}" for name in defined(node)}
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(target, ast.Name):
                names.add(target.id)
    return names
