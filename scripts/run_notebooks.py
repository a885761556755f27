"""Execute every notebook and refuse committed outputs.

    python scripts/run_notebooks.py [notebooks/one.ipynb ...]

The notebooks themselves are left as they are.
"""

import sys
import time
from pathlib import Path

import nbclient
import nbformat
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent


def main(names: list[str]) -> int:
    paths = [Path(name) for name in names] or sorted(ROOT.glob("notebooks/*.ipynb"))
    failed = 0
    for path in paths:
        start = time.perf_counter()
        problem = _problem(path)
        failed += problem is not None
        seconds = time.perf_counter() - start
        print(f"{path.name}: {problem or 'ok'} ({seconds:.0f} s)", flush=True)
    return int(failed > 0)


def _problem(path: Path) -> str | None:
    notebook = nbformat.read(path, as_version=4)
    if any(cell.get("outputs") for cell in notebook.cells):
        return "has outputs: strip them before committing"
    try:
        nbclient.NotebookClient(
            notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}
        ).execute()
    except CellExecutionError as error:
        return str(error)
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
