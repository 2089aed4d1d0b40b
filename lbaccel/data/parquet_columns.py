"""Which column of a parquet file holds the images, and which one their classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from lbaccel.data.opening import some
from lbaccel.documents import OutOfBounds, json_of
from lbaccel.errors import InputError


class Columns(NamedTuple):
    """Names of the two columns, and the class names that the file gives."""

    image: str
    label: str
    classes: tuple[str, ...] | None


def find_columns(schema: pa.Schema, path: Path) -> Columns:
    """The image and the label column: by the hub's features, else by their types.

    Of several label columns `label` or `fine_label` counts, of several image columns `image` or
    `img`.

    Raises:
        InputError: there is none, or several of which none has such a name.

    >>> image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    >>> find_columns(pa.schema({"picture": image, "kind": pa.int64()}), Path("train-0.parquet"))
    Columns(image='picture', label='kind', classes=None)
    """
    features = _features(schema)
    structs = [f.name for f in schema if pa.types.is_struct(f.type) and _has_bytes(f.type)]
    image = _choose(
        [n for n in structs if features.get(n, {}).get("_type") == "Image"] or structs,
        ("image", "img"),
        path=path,
        schema=schema,
        rule="one image column, a struct {bytes, path}",
    )
    integers = [f.name for f in schema if pa.types.is_integer(f.type)]
    label = _choose(
        [n for n in integers if features.get(n, {}).get("_type") == "ClassLabel"] or integers,
        ("label", "fine_label"),
        path=path,
        schema=schema,
        rule="one label column of whole numbers",
    )
    names = features.get(label, {}).get("names")
    return Columns(image, label, tuple(map(str, names)) if names else None)


def _features(schema: pa.Schema) -> Mapping[str, Any]:
    try:
        info = json_of(
            (schema.metadata or {}).get(b"huggingface", b"{}"), "the 'huggingface' entry"
        )
        return {k: v for k, v in info["info"]["features"].items() if isinstance(v, dict)}
    except OutOfBounds:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}  # absent, or not as the hub writes it: the types of the columns decide


def _has_bytes(struct: pa.StructType) -> bool:
    index = struct.get_field_index("bytes")
    if index < 0:
        return False
    kind = struct.field(index).type
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _choose(
    found: list[str], preferred: tuple[str, str], *, path: Path, schema: pa.Schema, rule: str
) -> str:
    best = found if len(found) == 1 else [name for name in preferred if name in found]
    if best:
        return best[0]
    columns = ", ".join(f"{f.name} ({f.type})" for f in schema)
    raise InputError(
        f"{path} needs {rule}; it has {len(found)} among its columns: {columns}. Keep one, or "
        f"name it {preferred[0]!r}."
    )


def other_columns(path: Path, here: Columns, first: Columns) -> str:
    """A sentence on how the columns of a file differ from those of the first one."""
    found = [
        f"its {what} is {mine!r}, there {theirs!r}"
        for what, mine, theirs in (
            ("image column", here.image, first.image),
            ("label column", here.label, first.label),
        )
        if mine != theirs
    ]
    if here.classes != first.classes:
        mine, theirs = here.classes or (), first.classes or ()
        strange = sorted(set(mine) ^ set(theirs))
        found.append(
            f"it has {len(mine)} class names, there are {len(theirs)} there, "
            + (f"only one has {some(strange)}" if strange else "in other order")
        )
    return (
        f"{path} differs from the first training file: {'; '.join(found)}. All files of a set need "
        "the same columns and classes: take this one out, or write it anew."
    )
