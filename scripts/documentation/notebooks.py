"""Notebooks as pages: their text and code, and outputs where they have been executed.

`./scripts/docs notebooks` executes them into `build/notebooks`. A page shows the outputs
of a notebook there if its cells are those of the one in `notebooks/`.
"""

import base64
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from .examples import ROOT

SOURCES = ROOT / "notebooks"
EXECUTED = ROOT / "build" / "notebooks"


class Page(NamedTuple):
    markdown: str
    pictures: dict[str, bytes]


def page_of(name: str) -> Page:
    """The notebook of this name as Markdown, and the pictures that it shows."""
    cells = _cells(SOURCES / name)
    executed = _cells(EXECUTED / name) if (EXECUTED / name).exists() else []
    if [_source(cell) for cell in executed] == [_source(cell) for cell in cells]:
        cells = executed
    parts, pictures = [], {}
    for cell in cells:
        if cell["cell_type"] == "markdown":
            parts.append(_source(cell))
            continue
        parts.append(f"```python\n{_source(cell)}\n```")
        for output in cell.get("outputs", ()):
            parts.append(_shown(output, Path(name).stem, pictures))
    title, *rest = parts
    heading, _, remainder = title.partition("\n")
    return Page("\n\n".join([heading, _note(name), remainder, *rest]), pictures)


def _note(name: str) -> str:
    return (
        '!!! note ""\n'
        f"    A notebook: `notebooks/{name}` in the repository, where it can be run."
    )


def _cells(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def _source(cell: dict[str, Any]) -> str:
    return _text(cell["source"])


def _text(lines: str | list[str]) -> str:
    return lines if isinstance(lines, str) else "".join(lines)


def _shown(output: dict[str, Any], stem: str, pictures: dict[str, bytes]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        name = f"{stem}-{len(pictures) + 1}.png"
        pictures[name] = base64.b64decode(_text(data["image/png"]))
        return f"![Output of the cell above]({name})"
    if "text/markdown" in data:
        return _text(data["text/markdown"])
    text = _text(output.get("text") or data.get("text/plain", ""))
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).rstrip()
    return f"```text\n{text}\n```" if text else ""
