"""The Python examples of README and of the pages, and how they are run."""

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
PICTURES = "pictures"

_BLOCK = re.compile(r"^([ ]*)```python[^\n]*\n(.*?)^\1```", re.DOTALL | re.MULTILINE)


def python_blocks(text: str) -> list[str]:
    """The fenced Python blocks of a Markdown text, without indentation."""
    return [inspect.cleandoc("\n" + body) for _, body in _BLOCK.findall(text)]


def pages() -> list[Path]:
    """The pages that have examples."""
    return [
        page
        for page in sorted(DOCS.glob("**/*.md"))
        if python_blocks(page.read_text(encoding="utf-8"))
    ]


def run(
    text: str, after_block: Callable[[], Any] = lambda: None
) -> Iterator[dict[str, Any]]:
    """Run the blocks one by one in one namespace, which is yielded after each."""
    namespace: dict[str, Any] = {"__name__": "example"}
    for number, block in enumerate(python_blocks(text), 1):
        exec(compile(block, f"<block {number}>", "exec"), namespace)
        after_block()
        yield namespace


def picture_names(page: Path) -> list[str]:
    """The pictures that a page shows, which its own examples draw, in order."""
    links = re.findall(r"\(((?:\.\./)?pictures/[^)\s]+)\)", page.read_text("utf-8"))
    return [Path(link).name for link in links]
