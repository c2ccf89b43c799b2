"""Chapter: an index outside of this process, as files that are checked, and as Parquet for other engines."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def sealed(state: dict) -> str:
    """Return the text of a JSON file whose first key is the SHA-256 of all that follows it."""
    text = json.dumps(state)
    return f'{{"checksum": "{hashlib.sha256(text.encode()).hexdigest()}", {text[1:]}'


def unsealed(path: Path) -> dict:
    """Return what a file of `sealed` text holds; ValueError where a byte of it has changed since it was written."""
    found = re.fullmatch(rb'\{"checksum": "([0-9a-f]{64})", (.*)', path.read_bytes(), re.DOTALL)
    if not found or hashlib.sha256(b"{" + found[2]).hexdigest().encode() != found[1]:
        raise ValueError(f"{path.name} is damaged, or of an earlier version, which had no checksum")
    return json.loads(b"{" + found[2])


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def arrow() -> tuple[Any, Any, Any]:
    """Return pyarrow and its modules for Parquet and for many files; ValueError where it is not installed."""
    try:
        import pyarrow
        from pyarrow import dataset, parquet
    except ImportError:
        raise ValueError("Parquet needs pyarrow: pip install 'recnb[parquet]'") from None
    return pyarrow, parquet, dataset


def write_parquet(
    path: str | Path,
    ids: np.ndarray,
    vectors: Iterable[np.ndarray],
    columns: Mapping[str, Sequence],
    model: str | None = None,
    note: str = "",
) -> Path:
    """Write a Parquet file, a part at a time, and return its path: id, the columns, and vector, of a fixed size.

    Args:
        path: the file.
        ids: (N,) int64.
        vectors: (N, D), in parts.
        columns: N values each.
        model: the fingerprint of the model that made the vectors, for the file's metadata.
        note: text for the metadata.

    Raises:
        ValueError: There are no vectors, or pyarrow is not installed.
    """
    pa, parquet, _ = arrow()
    parts = iter(vectors)
    first = next(parts, None)
    if first is None:
        raise ValueError(f"{path}: there are no vectors to write")
    rest = {name: pa.array(values) for name, values in columns.items()}
    kind = pa.list_(pa.from_numpy_dtype(first.dtype), first.shape[1])
    fields = [("id", pa.int64()), *((name, values.type) for name, values in rest.items()), ("vector", kind)]
    schema, start = pa.schema(fields, {"model": model or "", "note": note}), 0
    with parquet.ParquetWriter(path, schema) as writer:
        for part in itertools.chain([first], parts):
            rows = slice(start, start := start + len(part))
            array = pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), type=kind)
            writer.write_table(pa.table([pa.array(ids[rows]), *(c[rows] for c in rest.values()), array], schema=schema))
    return Path(path)


def read_parquet(path: str | Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any], str | None]:
    """Return ids (N,), vectors (N, D), the columns and the model of a Parquet file, or of a folder of them."""
    _, _, dataset = arrow()
    table = dataset.dataset(path, format="parquet", exclude_invalid_files=True).to_table()
    vectors = table["vector"].combine_chunks()
    flat = vectors.flatten().to_numpy()
    columns = {name: table[name].to_pylist() for name in table.column_names if name not in ("id", "vector")}
    model = (table.schema.metadata or {}).get(b"model", b"").decode() or None
    return table["id"].to_numpy(), flat.reshape(len(vectors), -1), columns, model
