"""Files that are whole or absent, and folders that one process at a time writes to.

A run folder's lock is the operating system's, held on the file `.lock`, so it ends with its owner however that ends.
Between hosts it holds where the shared file system passes locks on: NFS 4 does, NFS 3 with its lock service running;
mounts with `nolock`, `local_lock=flock` (NFS) or `localflock` (Lustre) keep locks within each host. Where there is no
flock at all, filelock warns and the existence of the file is the lock: one left by a host that crashed has to be
deleted by hand.
"""

import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from recnb.registry import ConfigError

PATIENCE = 20.0  # seconds that an owner of a lock has to end


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, flushed to disk, once the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # a write that finds the disk full names none
            error.filename = str(path)
        raise
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
    """Write the text in UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content) -> None:
    """Write the content as indented JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")


FORMULA = re.compile(r"'*[=+\-@\t]")  # how a text begins that a spreadsheet runs, or that was kept from it


def harmless(cell):
    """Return what stands in a cell of a table, a text that a spreadsheet would run with an apostrophe before it."""
    if not isinstance(cell, str):
        return cell
    text = cell.replace("\r", "\\r")  # no writer of CSV puts it in quotes, and readers take it for the end of a line
    return f"'{text}" if FORMULA.match(text) else text


def as_meant(cell: str) -> str:
    """Return the text that `harmless` has made a cell of."""
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell


def sha256(path: str | Path, length: int | None = None) -> str:
    """Return the SHA-256 of a file or of its first bytes, in hexadecimal; it is read in parts, whatever its size."""
    digest, left = hashlib.sha256(), Path(path).stat().st_size if length is None else length
    with Path(path).open("rb") as file:
        while part := file.read(min(left, 1 << 20)):
            digest.update(part)
            left -= len(part)
    return digest.hexdigest()


SEAL = re.compile(rb"\n# ([0-9a-f]{64}) is the SHA-256 of what stands before\n")
SEAL_LENGTH = 105  # bytes


def seal(path: Path) -> None:
    """Append a file's SHA-256 to it; a torch file reads as before, for its directory is looked for from the end."""
    with path.open("ab") as file:
        file.write(f"\n# {sha256(path)} is the SHA-256 of what stands before\n".encode())


def check_seal(path: Path) -> None:
    """Raise ConfigError unless a file ends with the SHA-256 of its content, as `seal` has written it."""
    whole = max(path.stat().st_size - SEAL_LENGTH, 0)
    with path.open("rb") as file:
        file.seek(whole)
        found = SEAL.fullmatch(file.read())
    if not found or found[1].decode() != sha256(path, whole):
        raise ConfigError(
            f"{path}: is not a checkpoint of a run, or has changed since it was written; take an earlier one, or "
            "delete it to begin anew"
        )


SUMS = "SHA256SUMS"


def write_sums(folder: Path, names: Iterable[str]) -> None:
    """Write the checksums of some of a folder's files, as `sha256sum -c` reads them, with one of their own below."""
    lines = "".join(f"{sha256(folder / name)}  {name}\n" for name in names)
    write_text(folder / SUMS, f"{lines}# {hashlib.sha256(lines.encode()).hexdigest()} are the lines above\n")


def check_sums(folder: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """Return the SHA-256 of each file that a folder's checksums name.

    Args:
        folder: The folder.
        names: Those of the files that are to be verified; None: all.

    Raises:
        ConfigError: The checksums or one of the files are missing or have changed; the message names which.
    """
    text = (folder / SUMS).read_bytes() if (folder / SUMS).is_file() else b""
    lines, _, own = text.rpartition(b"# ")
    if own != f"{hashlib.sha256(lines).hexdigest()} are the lines above\n".encode():
        raise ConfigError(f"{folder / SUMS}: is missing or damaged; make the folder again, or take a whole copy")
    wanted = {name: digest for digest, _, name in (line.partition("  ") for line in lines.decode().splitlines())}
    check_files(folder, wanted if names is None else {name: wanted[name] for name in names if name in wanted})
    return wanted


def check_files(folder: Path, wanted: Mapping[str, str]) -> None:
    """Raise ConfigError, which names the file, unless all have the SHA-256 that stands with their names."""
    for name, digest in wanted.items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise ConfigError(
                f"{folder / name}: is missing or not as it was written; make the folder again, or take a whole copy"
            )


class LockedError(RuntimeError):
    """Another process writes to this run folder."""


def me() -> str:
    """Return what a lock says of this process."""
    return f"process {os.getpid()} on {platform.node()}"


def owner(folder: Path) -> str:
    """Return who holds the folder's lock, or held it when it was killed; empty where nobody does."""
    try:
        return (folder / ".owner").read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock within the block; the same process may take it again.

    Raises:
        LockedError: Its owner lives on after some seconds; a kernel ends a little later than what started it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", thread_local=False, is_singleton=True)
    acquire(lock, folder)
    outermost = lock.lock_counter == 1
    try:
        if outermost:
            if left := owner(folder):
                print(f"{folder}: took over the lock of {left}, which has ended")
                for draft in folder.rglob(".*.[0-9]*.part"):  # what `replacing` was killed in
                    draft.unlink()
            write_text(folder / ".owner", me())
        yield
    finally:
        if outermost:
            (folder / ".owner").unlink(missing_ok=True)
        lock.release()


def acquire(lock: FileLock, folder: Path) -> None:
    """Take the lock, waiting for an owner that is about to end; raise LockedError where it does not end."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{folder}: waiting up to {PATIENCE:.0f} s for {owner(folder) or 'another process'} to end")
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            raise LockedError(
                f"{folder}: {owner(folder) or 'another process'} is writing to this run folder; use "
                "another folder, or wait until it has ended"
            ) from None


# configs/ and notebooks/ lie beside the package in a clone and inside it in an installed wheel. ROOT is what relative
# paths start from: the clone, or the working directory where the package is installed.
PACKAGE = Path(__file__).resolve().parent
ROOT = Path.cwd() if (PACKAGE / "configs").is_dir() else PACKAGE.parent
SHIPPED = ("configs", "notebooks")


def resolve(path: str | Path) -> Path:
    """Return the path itself if it exists from here, otherwise the same path below ROOT.

    What an installed wheel ships, such as `configs/demo.yaml`, is found in the package. Raise ConfigError for text that
    cannot be a path.
    """
    try:
        if "\0" in str(path):
            raise OSError("it holds a zero byte")
        path = Path(path).expanduser()
        if path.exists() or path.is_absolute():
            return path
        shipped = path.parts[:1] and path.parts[0] in SHIPPED and (PACKAGE / path).exists()
        return (PACKAGE if shipped else ROOT) / path
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of someone who is not known
        raise ConfigError(
            f"{str(path)[:100]!r} cannot be a path: {getattr(error, 'strerror', None) or error}"
        ) from None


def from_root(path: str | Path) -> str:
    """Return a path as it stands below ROOT, where it can be found after the project has moved, or else absolute."""
    absolute = Path(os.path.normpath(Path(path).absolute()))
    return absolute.relative_to(ROOT).as_posix() if absolute.is_relative_to(ROOT) else str(absolute)
