"""`save` and `load`: a trajectory in one file."""

import json
import os
import pathlib
import zipfile
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from .._jax._tracing import is_concrete
from ._encode import UnknownContent, decode, encode, encode_fields
from ._trajectory import Trajectory

_FORMAT, _VERSION = "homoflow trajectory", 1
#: Fields whose containers are a user's or Optax's: a file cannot know them.
_LEFT_OUT = ("model", "models", "continuation")


def save(path: str | os.PathLike[str], trajectory: Trajectory) -> None:
    """Writes a trajectory, or a batch of them, to one file.

    The file is an `.npz` archive of arrays with a JSON header: it holds no code, and
    NumPy can open it. Of `model` and `models` the arrays are kept; `load` puts them into a
    model that you give. Everything else is restored as it was, to the last bit. In
    `observed` dictionaries, lists and tuples may be nested; named tuples, such as those of
    `homoflow.observe.Sharpness`, come back as dictionaries. The state of an optimizer
    (`continuation`) is not kept: gradient descent that goes on from a loaded run starts its
    optimizer anew.

    **Arguments:**

    - `path`: where to. A file that is there already is replaced once all is written.
    - `trajectory`: with known values: not inside of jit or vmap.

    **Raises:** `TypeError` if `observed` holds something else than arrays, numbers and
    text in such containers.

    ```python
    model = hf.MLP((3, 8, 1), key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    flow = hf.flow(model, (x, x[:, :1]), t1=5.0)
    hf.save("flow.npz", flow)
    same = hf.load("flow.npz", like=model)
    ```
    """
    if not is_concrete(trajectory):
        raise ValueError("`save` writes known values: call it outside of jit and vmap.")
    arrays: list[np.ndarray] = []
    try:
        header = {
            "format": _FORMAT,
            "version": _VERSION,
            "trajectory": encode_fields(trajectory, arrays, _LEFT_OUT),
            "model": _encode_model(trajectory.model, arrays),
            "models": _encode_model(trajectory.models, arrays),
        }
    except UnknownContent as error:
        raise TypeError(f"A trajectory with {error} cannot be saved.") from None
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    contents = {"header": text, **{str(i): a for i, a in enumerate(arrays)}}
    path = pathlib.Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **contents)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], like: PyTree = None) -> Trajectory:
    """The trajectory that `homoflow.save` wrote.

    **Arguments:**

    - `path`: the file.
    - `like`: a model of the same structure as the one that was trained, whatever its
        numbers: its arrays are replaced by those in the file. For a batch of runs it is a
        single model. Without it `model` and `models` are `None`.

    **Returns:** a `homoflow.Trajectory`, with arrays in the dtypes that they had.

    **Raises:** `ValueError` if the file is not one of a trajectory or is damaged, or if
    an array of `like` differs in shape or dtype from the one in the file; it says which.
    `FileNotFoundError` if there is none.
    """
    header, arrays = _read(path)
    try:
        loaded = decode(header["trajectory"], arrays)
        saved = {name: decode(header[name], arrays) for name in ("model", "models")}
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: it holds {error}.") from error
    if like is None:
        return loaded
    batch = loaded.ts.shape[:-1]
    leading = {"model": {(), batch}, "models": {(), batch, loaded.ts.shape}}
    for name, leaves in saved.items():
        if leaves is not None:
            object.__setattr__(loaded, name, _fill(name, like, leaves, leading[name]))
    return loaded


def _encode_model(model: PyTree, arrays: list[np.ndarray]) -> Any:
    """The model's arrays by their paths."""
    if model is None:
        return None
    leaves = jax.tree_util.tree_leaves_with_path(model)
    found = {_name(path): leaf for path, leaf in leaves if eqx.is_array(leaf)}
    return encode(found, arrays)


def _fill(
    what: str, like: PyTree, leaves: dict[str, Any], leading: set[tuple[int, ...]]
) -> PyTree:
    """`like` with the arrays that were saved, which may have `leading` axes more."""
    places, structure = jax.tree_util.tree_flatten_with_path(like)
    wanted = {_name(path) for path, leaf in places if eqx.is_array(leaf)}
    for problem, names in (
        ("has no array", wanted - leaves.keys()),
        ("also has the array", leaves.keys() - wanted),
    ):
        if names:
            raise ValueError(
                f"`like` is not the model of this file: its `{what}` {problem} "
                f"{sorted(names)[0]}."
            )
    filled = []
    for path, leaf in places:
        if not eqx.is_array(leaf):
            filled.append(leaf)
            continue
        array = leaves[_name(path)]
        ndim = array.ndim - leaf.ndim
        fits = ndim >= 0 and array.shape[ndim:] == leaf.shape
        if not fits or array.shape[:ndim] not in leading or array.dtype != leaf.dtype:
            raise ValueError(
                f"`like` is not the model of this file: {_name(path)} has shape "
                f"{leaf.shape} and dtype {leaf.dtype}, and in the file's `{what}` "
                f"{array.shape} and {array.dtype}."
            )
        filled.append(array)
    return jax.tree.unflatten(structure, filled)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path).lstrip(".")


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The header and the arrays of a file; `ValueError` if it is not one of ours."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            # Every entry is read: its checksum shows whether it is whole.
            contents = {name: archive[name] for name in archive.files}
        header = json.loads(contents.pop("header").tobytes())
        arrays = [contents[str(i)] for i in range(len(contents))]
        is_ours = header["format"] == _FORMAT and header["version"] <= _VERSION
    except (FileNotFoundError, PermissionError):
        raise
    except (
        AttributeError, KeyError, TypeError, ValueError, EOFError, OSError,
        zipfile.BadZipFile,
    ) as error:  # fmt: skip
        raise ValueError(
            f"{path} is not a trajectory of `homoflow.save`, or not all of it is there "
            f"({error})."
        ) from error
    if not is_ours:
        raise ValueError(
            f"{path} was written by another version of homoflow, or by another program: "
            f"format {header['format']!r}, version {header['version']}."
        )
    return header, arrays
