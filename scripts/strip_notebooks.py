"""Removes outputs and execution counts from notebooks, and says which had some.

python scripts/strip_notebooks.py notebooks/tour.ipynb …
"""

import sys

import nbformat


def main(names: list[str]) -> int:
    stripped = [name for name in names if strip(name)]
    for name in stripped:
        print(f"stripped: {name}")
    return int(bool(stripped))


def strip(name: str) -> bool:
    """Whether there was anything to remove."""
    notebook = nbformat.read(name, as_version=4)
    found = False
    for cell in notebook.cells:
        if cell.cell_type == "code":
            found = found or bool(cell.outputs) or cell.execution_count is not None
            cell.outputs, cell.execution_count = [], None
    if found:
        nbformat.write(notebook, name)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
