"""Writes the tree of architecture.md: a line for each file of the package and the recipes, from its docstring.

python docs/tree.py
"""

import ast
import re
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
FOLDERS = ("trl_tinylora", "recipes")
OPENING, CLOSING = "<!-- tree -->", "<!-- /tree -->"
# A full stop after which a new sentence starts; "et al., " and "e.g. the" do not.
END_OF_SENTENCE = re.compile(r"(?<=[.])\s+(?=[A-Z`])")


def first_sentence(path: Path) -> str:
    """
    What a module's docstring says first.

    Args:
        path (`pathlib.Path`): A Python file.
    Returns:
        `str`: One line.
    Raises:
        ValueError: If it has no docstring.
    """
    document = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not document:
        raise ValueError(f"{path} has no docstring: say in one line what it holds")
    return END_OF_SENTENCE.split(" ".join(document.split("\n\n")[0].split()))[0].rstrip(".:")


def tree() -> str:
    """Every Python file of the package and the recipes as a nested list with links; folders by their `__init__.py`."""
    lines = []
    for folder in FOLDERS:
        lines += _folder(ROOT / folder, 0)
    return "\n".join(lines)


def renewed(page: str) -> str:
    """
    The page with its tree renewed; one that is current comes back as it was.

    Args:
        page (`str`): Text of architecture.md.
    Returns:
        `str`
    Raises:
        ValueError: If a marker is missing.
    """
    before, opening, rest = page.partition(OPENING)
    _, closing, after = rest.partition(CLOSING)
    if not (opening and closing):
        raise ValueError(f"{PAGE} lacks the markers {OPENING} and {CLOSING}")
    return f"{before}{OPENING}\n{tree()}\n{CLOSING}{after}"


def _folder(folder: Path, depth: int) -> list[str]:
    """A folder's line and those of what is in it: files before folders, without folders that hold no Python."""
    files = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
    folders = [path for path in sorted(folder.iterdir()) if path.is_dir() and any(path.rglob("*.py"))]
    about = folder / "__init__.py"
    said = f": {first_sentence(about)}" if about.is_file() else ""
    lines = [f"{'  ' * depth}- **{folder.name}/**{said}"]
    for path in files:
        lines.append(f"{'  ' * (depth + 1)}- [{path.name}](../{path.relative_to(ROOT)}): {first_sentence(path)}")
    for path in folders:
        lines += _folder(path, depth + 1)
    return lines


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
