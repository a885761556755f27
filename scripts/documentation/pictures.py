"""The pictures of the pages, drawn by the pages' own examples.

    python -m documentation.pictures page.md folder

runs the examples of a page and writes its figures, in the order in which they are made,
under the names that the page shows them by.
"""

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .examples import DOCS, PICTURES, ROOT, pages, picture_names, run

CACHE = ROOT / "build" / PICTURES


def draw_pictures() -> dict[str, Path]:
    """Every picture's place in the site, and its file; drawn if something changed."""
    wanted = {page: _folder(page) for page in pages() if picture_names(page)}
    missing = [(page, folder) for page, folder in wanted.items() if not folder.is_dir()]
    # Each page has a process of its own; the threads only wait for them.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_draw_in_process, *zip(*missing, strict=True)) if missing else ())
    return {
        f"{PICTURES}/{name}": folder / name
        for page, folder in wanted.items()
        for name in picture_names(page)
    }


def _folder(page: Path) -> Path:
    """Named after all that the pictures depend on: the page and the package."""
    state = hashlib.sha256(page.read_bytes())
    for source in sorted((ROOT / "homoflow").glob("**/*.py")):
        state.update(source.read_bytes())
    return CACHE / f"{page.stem}-{state.hexdigest()[:16]}"


def _draw_in_process(page: Path, folder: Path) -> None:
    environment = {
        **os.environ,
        "MPLBACKEND": "Agg",
        "OPENBLAS_NUM_THREADS": "1",
        # Pages share programs with each other and with the next build.
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "pictures"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts")]),
    }
    subprocess.run(
        [sys.executable, "-m", "documentation.pictures", page, folder],
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )


def draw(page: Path, folder: Path) -> None:
    """Run a page's examples and save its figures into a folder, all or none."""
    import matplotlib.pyplot as plt

    plt.rcParams |= {"savefig.dpi": 144, "savefig.facecolor": "white"}
    unfinished = folder.with_suffix(".tmp")
    unfinished.mkdir(parents=True, exist_ok=True)
    names = iter(picture_names(page))

    def save_figures() -> None:
        for number in plt.get_fignums():
            name = next(names, None)
            if name is None:
                raise ValueError(f"{page.name} draws more figures than it shows.")
            plt.figure(number).savefig(unfinished / name)
        plt.close("all")

    for _ in run(page.read_text(encoding="utf-8"), after_block=save_figures):
        pass
    if (name := next(names, None)) is not None:
        raise ValueError(f"{page.name} shows {name}, which none of its examples draws.")
    unfinished.rename(folder)


if __name__ == "__main__":
    draw(DOCS / sys.argv[1], Path(sys.argv[2]))
