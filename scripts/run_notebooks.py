"""Execute every notebook and refuse committed outputs.

    python scripts/run_notebooks.py [--into FOLDER] [notebooks/one.ipynb ...]

As many at a time as there are processors. The notebooks themselves are left as they are;
with `--into` they are written with their outputs into a folder.
"""

import argparse
import functools
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbclient
import nbformat
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Execute notebooks.")
    parser.add_argument(
        "--into", type=Path, help="keep the executed ones in this folder"
    )
    parser.add_argument("notebooks", type=Path, nargs="*")
    options = parser.parse_args(arguments)
    # Kernels side by side: OpenBLAS's threads would wait for each other.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    paths = options.notebooks or sorted(ROOT.glob("notebooks/*.ipynb"))
    # Each notebook has a process of its own; the threads only wait for them.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        passed = list(pool.map(functools.partial(_passes, into=options.into), paths))
    return int(not all(passed))


def _passes(path: Path, into: Path | None) -> bool:
    start = time.perf_counter()
    problem = _problem(path, into)
    seconds = time.perf_counter() - start
    print(f"{path.name}: {problem or 'ok'} ({seconds:.0f} s)", flush=True)
    return problem is None


def _problem(path: Path, into: Path | None) -> str | None:
    notebook = nbformat.read(path, as_version=4)
    if any(cell.get("outputs") for cell in notebook.cells):
        return "has outputs: strip them before committing"
    try:
        nbclient.NotebookClient(
            notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}
        ).execute()
    except CellExecutionError as error:
        return str(error)
    if into is not None:
        into.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, into / path.name)
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
