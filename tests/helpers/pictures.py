"""Pictures of one colour, in folders and in parquet files as the Hugging Face hub writes them."""

from __future__ import annotations

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = ("daisy", "rose")


def colour(number):
    return (number % 256, number // 256, 7)


def write_image(path, number=0, size=(5, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour(number)).save(path)


def write_tree(root, *, classes=CLASSES, count=5):
    for label, name in enumerate(classes):
        for number in range(count):
            write_image(root / name / f"{number}.png", 10 * label + number)


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def png(number, size=(5, 4)):
    return encoded(Image.new("RGB", size, colour(number)))


def write_parquet(
    path, images, labels, *, names=CLASSES, paths=None, image="img", row_group_size=3, **more
):
    path.parent.mkdir(parents=True, exist_ok=True)
    paths = paths or [None] * len(images)
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows = [{"bytes": data, "path": p} for data, p in zip(images, paths, strict=True)]
    columns = {image: pa.array(rows, struct), "label": pa.array(labels, pa.int64()), **more}
    table = pa.table(columns)
    if names is not None:
        features = {
            image: {"_type": "Image"},
            "label": {"names": list(names), "_type": "ClassLabel"},
        }
        info = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": info})
    pq.write_table(table, path, row_group_size=row_group_size)
