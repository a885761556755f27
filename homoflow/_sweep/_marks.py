"""The marks of whole chunks: small files beside the arrays, written last."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

_ENDING = ".json"


@final
class Marks:
    """One file for each chunk, named by its number, put in place as a whole."""

    def __init__(self, url: str | os.PathLike[str], folder: str):
        self._is_remote = isinstance(url, str) and "://" in url
        self._files: Any = None
        if self._is_remote:
            import fsspec

            self._files, root = fsspec.core.url_to_fs(url)
            self._folder = f"{root.rstrip('/')}/{folder}"
        else:
            self._folder = str(Path(url) / folder)

    def read(self) -> Iterator[tuple[int, str]]:
        """The number and the text of every mark."""
        for path in self._paths():
            name = path.rsplit("/", 1)[-1]
            if name.endswith(_ENDING) and name.removesuffix(_ENDING).isdecimal():
                yield int(name.removesuffix(_ENDING)), self._text(path)

    def write(self, number: int, text: str) -> None:
        path = f"{self._folder}/{number:06d}{_ENDING}"
        if self._is_remote:
            self._files.pipe_file(path, text.encode())
            return
        aside = Path(f"{path}.partial")
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)

    def _paths(self) -> list[str]:
        if not self._is_remote:
            folder = Path(self._folder)
            return [p.as_posix() for p in folder.iterdir()] if folder.exists() else []
        try:
            return [str(path) for path in self._files.ls(self._folder, detail=False)]
        except FileNotFoundError:
            return []

    def _text(self, path: str) -> str:
        if self._is_remote:
            return self._files.cat_file(path).decode()
        return Path(path).read_text(encoding="utf-8")
