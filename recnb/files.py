"""Files that are whole or absent: what is written here never exists half."""
from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    "A temporary path beside `path` that takes its place, flushed to the disk, once the block ends without an error."
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def link_or_copy(source: Path, path: Path) -> None:
    """Make `path` a hard link to `source`, or a whole copy where the file system has no hard links."""
    path.unlink(missing_ok=True)
    try:
        path.hardlink_to(source)
    except OSError:  # exFAT, many network and FUSE mounts
        with replacing(path) as temporary:
            shutil.copyfile(source, temporary)


def write_text(path: str | Path, text: str) -> None:
    "None; writes the text in UTF-8."
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content) -> None:
    "None; writes the content as indented JSON."
    write_text(path, json.dumps(content, indent=2) + "\n")
