"""The way from photos to a recogniser: which steps there are, which are done, and what came out of them.

`start.json` in the run folder remembers what each step was given: its parameters, and a fingerprint of what it read. A
step is done where that is still so. It is written after a step has ended well, so a step that was interrupted is run
again, and finds what it had written itself.
"""

import csv
import hashlib
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from tqdm import tqdm

from recnb.cli.notebook import FailedError, execute, find
from recnb.cli.progress import duration
from recnb.registry import ConfigError, check_known
from recnb.retrieval.exchange import sealed, unsealed
from recnb.storage import ROOT, locked, sha256, write_text

LEAST = 200_000_000  # bytes that have to be free
SAMPLE = 64  # photos that tell how long the others take
SIDES = {
    "identities": ("train", "validation", "query", "gallery"),
    "to train on": ("train",),
    "to choose the epoch by": ("validation",),
    "to test on": ("query", "gallery"),
}  # of the photos, by the lists that name them
METRICS = ("recall1", "mAP")
ALSO = "the same command goes on from here"


@dataclass(frozen=True)
class Step:
    """A notebook with its parameters: `reads` is what its result depends on, `makes` the last file that it writes."""

    notebook: str
    says: str
    parameters: dict
    reads: tuple[Path, ...]
    makes: Path


def steps(source: Path, to: Path, options: dict) -> list[Step]:
    """Return the steps from a folder of photos to a recogniser, all of whose results lie in `to`."""
    data, run = to / "data", {"run": word(to)}
    trained = (to / "config.yaml", to / "metrics.json", to / "model.safetensors")
    prepare = {"source": word(source), "out_dir": word(data), "config": "auto", "options": options}
    train = {"config": word(data / "config.yaml"), "run_dir": word(to)}
    return [
        Step("01_prepare", "your photos become lists and a config", prepare, (source,), data / "config.yaml"),
        Step("02_train", "the model learns", train, (data,), to / "gallery.html"),
        Step("03_evaluate", "how good it is", run, trained, to / "evaluation" / "evaluation.json"),
        Step("04_gallery", "what it finds", run, trained, to / "04_gallery.ipynb"),
        Step("05_export", "a recogniser for other photos", run, trained, to / "export" / "index" / "index.json"),
    ]


def word(path: Path) -> str:
    """Return a path as notebooks are given it: from the project where it lies in that, so that both may move."""
    inside = Path.cwd() == ROOT and path.is_relative_to(ROOT)
    return path.relative_to(ROOT).as_posix() if inside else str(path)


@dataclass
class Journey:
    """A folder of photos, the run folder that it leads to, and the options of 01_prepare."""

    source: Path
    to: Path
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        self.source, self.to = (Path(os.path.normpath(path.absolute())) for path in (self.source, self.to))

    def go(self) -> None:
        """Run every step that is not done.

        Raises:
            ConfigError: Photos, options or the folder to write to are not what they have to be; nothing was written.
            DataError: The photos cannot be split.
            FailedError: A step has not been run to its end.
        """
        done, todo = self.kept(), steps(self.source, self.to, self.options)
        if done.get("01_prepare") != record(todo[0]):
            self.check(done)
        with locked(self.to / "data"):
            for number, step in enumerate(todo, 1):
                said, given = f"[{number}/{len(todo)}] {step.notebook}: {step.says}", record(step)
                if done.get(step.notebook) == given and step.makes.exists():
                    print(f"{said}: done before")
                    continue
                print(said, flush=True)
                self.run(step)
                if record(step) != given:
                    raise FailedError(f"{step.reads[0]}: has changed while {step.notebook} read it; {ALSO}")
                done[step.notebook] = given
                write_text(self.to / "start.json", sealed(done))

    def run(self, step: Step) -> None:
        """Run one step into an executed notebook of the run folder."""
        began = time.monotonic()
        try:
            execute(find(step.notebook), self.to / f"{step.notebook}.ipynb", step.parameters)
        except FailedError as error:
            raise FailedError(f"{error}\n  what was made before is whole; {ALSO}") from None
        print(f"  done after {duration(time.monotonic() - began)}", flush=True)

    def kept(self) -> dict:
        """Return what is remembered of earlier calls."""
        try:
            return unsealed(self.to / "start.json")
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self.to / 'start.json'}: cannot be read ({error}); take another folder with --to"
            ) from None

    def check(self, done: dict) -> None:
        """Raise ConfigError or DataError for what would stop 01_prepare; make the folder where nothing does."""
        if not self.source.exists():
            raise ConfigError(f"{self.source}: there is no such folder")
        if (self.to / "config.yaml").exists():
            raise ConfigError(
                f"--to {self.to}: holds a training on other photos or options{self.differing(done)}; "
                "take another folder with --to, or delete this one"
            )
        check_options(self.options)
        found = check_photos(self.source, self.to, self.options)
        check_folder(self.to)
        print(found, flush=True)

    def differing(self, done: dict) -> str:
        """Return in brackets what differs from the options of an earlier call."""
        before = done.get("01_prepare", {}).get("parameters", {}).get("options", {})
        names = [name for name in {**before, **self.options} if before.get(name) != self.options.get(name)]
        changes = (f"{name} {before.get(name)} -> {self.options.get(name)}" for name in names)
        return f" ({', '.join(changes)})" if names and done else ""


def record(step: Step) -> dict:
    """Return what a step is given, as start.json keeps it."""
    return {"parameters": step.parameters, "reads": fingerprint(step.reads, step.notebook != "01_prepare")}


def fingerprint(paths: tuple[Path, ...], content: bool) -> str:
    """Return a fingerprint of files, and of all files of folders: of their content, or of sizes and times alone."""
    found = hashlib.sha256()
    for path in map(str, paths):
        for file in tqdm(files_of(path), "files looked at", unit=" files", leave=False, delay=3):
            state = os.stat(file)  # noqa: PTH116 (there may be millions, and a Path takes four times as long)
            what = sha256(file) if content else (state.st_size, state.st_mtime_ns)
            found.update(f"{file[len(path) + 1 :]} {what}\n".encode("utf-8", "surrogateescape"))
    return found.hexdigest()[:32]


def files_of(path: str) -> Iterator[str]:
    """Yield a file, or the files of a folder but for hidden ones, in an order of their own; nothing where none is."""
    if os.path.isfile(path):  # noqa: PTH113
        yield path
    for folder, folders, names in os.walk(path):
        folders.sort()  # which os.walk follows
        yield from (f"{folder}{os.sep}{name}" for name in sorted(names) if not name.startswith("."))


# --- What is checked before anything is written ---------------------------------------------------------------------


def check_options(options: dict) -> None:
    """Raise ConfigError for weights or a backbone that do not exist, or a package that the last step needs."""
    from recnb.deploy.graph import check_installed

    weights, backbone = options.get("weights"), options.get("backbone")
    if isinstance(weights, str) and not Path(weights).is_file():
        raise ConfigError(f"--weights {weights}: there is no such file; give a FILE, True for the hub's or False")
    if backbone:
        from recnb.models.backbones import list_backbones

        check_known([backbone], list_backbones(), "--backbone", "network")
    check_installed()


def check_photos(source: Path, to: Path, options: dict) -> str:
    """Return a line that says how many photos there are.

    Raises:
        ConfigError: The results would lie among them.
        DataError: They cannot be split.
    """
    if to.is_relative_to(source):
        raise ConfigError(f"--to {to}: lies among the photos of {source}; choose a folder outside")
    from recnb.data import prepare, splits

    chosen = prepare.read_options(options)
    table, _ = prepare.read_source(source)
    splits.split(table, chosen.test_share, chosen.query_share, chosen.validation, chosen.seed)
    return f"{len(table):,} photos of {table.label.nunique():,} identities{time_to_read(table.path)}"


def time_to_read(paths: Sequence[str]) -> str:
    """Return about how long it takes to read all photos once, where that is more than a minute, from a few of them."""
    from recnb.data.audit import fingerprints

    some, began = paths[:: max(1, len(paths) // SAMPLE)], time.monotonic()
    fingerprints(some)
    left = (time.monotonic() - began) / len(some) * len(paths)
    return f", which take about {duration(left)} to read once" * (left > 60)


def check_folder(to: Path) -> None:
    """Make a folder; raise ConfigError where it cannot be written to, or its disk is full."""
    try:
        to.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=to):
            pass
    except OSError as error:
        raise ConfigError(f"--to {to}: cannot be written to ({error.strerror}); choose another folder") from None
    if (free := shutil.disk_usage(to).free) < LEAST:
        raise ConfigError(f"--to {to}: its disk has {free / 1e6:.0f} MB left, and {LEAST / 1e6:.0f} are needed")


# --- What came out of it ----------------------------------------------------------------------------------------------


def summary(to: Path) -> list[str]:
    """Return what a person wants to know at the end, in ten lines."""
    from recnb.runs.verdict import spoken, verdict

    counts = {said: list_counts([to / "data" / f"{name}.txt" for name in names]) for said, names in SIDES.items()}
    config = (to / "data" / "config.yaml").read_text(encoding="utf-8").splitlines()
    judged = verdict(to)
    measured = [name for name in METRICS if name in judged.rows.index]
    lines = {
        "photos": ", ".join(f"{images:,} of {names:,} {said}" for said, (images, names) in counts.items() if images),
        "left out": left_out(to / "data" / "left_out.csv"),
        "recipe": " ".join(line.removeprefix("# ") for line in takewhile(lambda line: line.startswith("#"), config)),
        **{spoken(name): before_after(judged.rows.loc[name]) for name in measured},
        "verdict": str(judged).partition(":")[0],
        "gallery": f"{word(to / 'gallery.html')} in a browser, {word(to / '04_gallery.ipynb')} in Jupyter",
        "recogniser": word(to / "export"),
        "one page": f"recnb report {word(to)}",
        "next": f"recnb identify {word(to / 'export')} PHOTO",
    }
    return ["", *(f"{name:>10}  {text}" for name, text in lines.items())]


def before_after(row) -> str:
    """Return a row of a verdict as text, with its intervals of 95 %."""
    parts = (f"{row[name]:.3f} ({row[f'{name}_low']:.3f} to {row[f'{name}_high']:.3f})" for name in ("before", "after"))
    return f"{' -> '.join(parts)}: {row.verdict}"


def list_counts(paths: list[Path]) -> tuple[int, int]:
    """Return how many images and identities list files name, those that there are."""
    lines = [line for path in paths if path.is_file() for line in path.read_text(encoding="utf-8").splitlines()]
    return len(lines), len({line.split("\t")[1] for line in lines})


def left_out(path: Path) -> str:
    """Return what 01_prepare did not use and why, the commonest reasons first."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reasons = Counter(row["reason"] for row in csv.DictReader(file))
    except (ValueError, KeyError, csv.Error) as error:
        raise ConfigError(f"{path} is damaged ({error}); 01_prepare writes it") from None
    if not reasons:
        return "nothing"
    most = "; ".join(f"{number} {reason}" for reason, number in reasons.most_common(3))
    return f"{reasons.total():,}: {most}{'; ...' * (len(reasons) > 3)} ({word(path)})"
