"""Weights: read from files, safetensors, torch files without any code in them and Paddle's, and room for them."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from recnb.distributed.processes import own_part
from recnb.distributed.rows import Rows, on_this_rank
from recnb.models.cutting import classifiers, first_line, kind, listed
from recnb.models.paddle import converted, read_pdparams
from recnb.registry import ConfigError
from recnb.storage import check_files, replacing, resolve

HEAD = re.compile(r"(models\.\w+\.)?head\.")  # its classes are those of the data it was trained on
LOCAL_WEIGHTS = "give a local file in Arch.Backbone.pretrained, or False"


def save_weights(state: Mapping[str, Any], path: Path, apart: Mapping[str, str] | None = None) -> None:
    """Write a state dict as a .safetensors file that knows its checksum, whole or not at all.

    Args:
        state: Its tensors are written.
        path: The file.
        apart: The files beside it that hold further rows, in their order, and their SHA-256.
    """
    state = {name: value.contiguous() for name, value in state.items() if isinstance(value, Tensor)}
    rows = json.dumps(apart) if apart else ""
    with replacing(path) as temporary:
        save_file(state, temporary, {"sha256": checksum(state, rows), **({"rows": rows} if rows else {})})


def read_weights(path: str | Path, in_part: bool = False) -> dict[str, Any]:
    """Return the tensors of a .safetensors file.

    Args:
        path: The file; others beside it may hold rows of some tensors.
        in_part: Whether these tensors are `Rows`, to be read in part, and each process checks its share of their files.

    Raises:
        ConfigError: It or one of the others is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
            known = file.metadata() or {"format": ""}
    except Exception as error:  # the library has errors of its own, with no class in common
        raise ConfigError(f"{path} cannot be read as weights: {error}") from error
    text = known.get("rows", "")
    if "format" not in known and known.get("sha256") != checksum(state, text):  # others' files give their format
        raise ConfigError(f"{path} has changed since it was written; take a whole copy, or train again")
    return state | (rows_beside(Path(path), json.loads(text), in_part) if text else {})


def rows_beside(path: Path, apart: dict[str, str], in_part: bool) -> dict[str, Any]:
    """Return what `read_weights` finds in the files beside a file of weights, by their names and SHA-256."""
    check_files(path.parent, own_part(apart) if in_part else apart)
    files = [path.with_name(name) for name in apart]
    found = {name: Rows(name, files) for name in safe_open(files[0], "pt").keys()}
    return {name: rows if in_part else rows.read(range(len(rows))) for name, rows in found.items()}


def checksum(state: Mapping[str, Tensor], text: str = "") -> str:
    """Return the SHA-256 of tensors with their names, kinds and shapes, and of a text, in hexadecimal."""
    digest = hashlib.sha256(text.encode())
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def local(source: str | Path) -> Path:
    """Return the path of a file of weights as `resolve` finds it; what a URL names is downloaded once, to torch's hub.

    Raises:
        ConfigError: The text cannot be a path, or what it names cannot be downloaded.
    """
    if "://" not in str(source):
        return resolve(source)
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(str(source)).path).name
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(str(source), str(path), progress=False)
        except Exception as error:  # whatever a network or a disk does
            raise ConfigError(
                f"the weights {source} cannot be downloaded ({first_line(error)}): fetch the file elsewhere, and give "
                "its path"
            ) from error
    return path


def read_tensors(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors, .pdparams or weights-only torch file, by the names they have in a model.

    They may stand under 'state_dict' or 'model', as in a checkpoint, and begin with 'module.'.

    Raises:
        ValueError: The file is damaged, reading it could run code, or it is Paddle's, of a backbone not known there.
    """
    try:
        if path.suffix == ".pdparams":
            return converted(read_pdparams(path), model)
        state = read_weights(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{path} cannot be read as a file of weights: it is damaged, or holds other things than tensors, which are "
            "not read since that could run code; save a state_dict, best as .safetensors"
        ) from error
    except ConfigError:
        raise
    except Exception as error:  # each kind of broken file fails in its own way
        raise ValueError(f"{path} cannot be read as a file of weights: {first_line(error)}") from error
    for wrapper in ("state_dict", "model"):
        state = state.get(wrapper, state) if isinstance(state, dict) else {}
    named = state.items() if isinstance(state, dict) else ()
    return {name.removeprefix("module."): value for name, value in named if isinstance(value, Tensor)}


def _load(model: nn.Module, path: str | Path, strict: bool = True) -> list[str]:
    """Load a file into the whole model; returns the classifier's tensors that do not fit and were left out.

    Other tensors without a place, or places without a tensor, are an error unless `strict` is False.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no weights file '{path}': {LOCAL_WEIGHTS}; True takes the library's from its hub")
    read = read_tensors(Path(path), model)
    if not read:
        raise ValueError(f"'{path}' holds no state dict, bare or under 'state_dict' or 'model'")
    given = {name: value for name, value in read.items() if not name.endswith("num_batches_tracked")}
    own = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    wrong = {
        "missing": own.keys() - given.keys(),
        "unexpected": given.keys() - own.keys(),
        "of another shape": {name for name in own.keys() & given.keys() if own[name].shape != given[name].shape},
    }
    names = sorted(set().union(*wrong.values()))
    classifier = tuple(f"{name}." for name in classifiers(model))
    serious = {what: sorted(name for name in group if not name.startswith(classifier)) for what, group in wrong.items()}
    parts = [f"{len(group)} are {what} ({listed(group, 3)})" for what, group in serious.items() if group]
    if parts and strict:
        raise ValueError(
            f"'{path}' does not fit {kind(model)}: of {len(own)} tensors {', '.join(parts)}; "
            "strict: False takes the others"
        )
    model.load_state_dict({name: given[name] for name in own.keys() - set(names)}, strict=False)
    return names


def load_weights(
    model: nn.Module, path: str | Path, where: str = "Global.pretrained_model", strict: bool = True
) -> str:
    """Load what fits and return a sentence that says so; tensors that are missing or of another shape stay.

    Args:
        model: what they are loaded into.
        path: a .safetensors file, a weights-only .pth / .pt (also a checkpoint of a run), or the original's .pdparams.
        where: the key of the configuration, for the sentences.
        strict: whether a .pdparams has to fill the model, but for the head, and nothing in it may be left over.

    Raises:
        ConfigError: The file cannot be read, nothing in it fits, or, with `strict`, not all of it.
    """
    path, own = local(path), model.state_dict()
    try:
        state = read_tensors(path, model)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    if not fitting:
        first = [next((f"{k} {tuple(v.shape)}" for k, v in tensors.items()), "no tensor") for tensors in (state, own)]
        raise ConfigError(
            f"{where}: nothing in {path} fits this model (the file begins with {first[0]}, the model with {first[1]})"
        )
    others = sorted(set(own) - set(fitting))
    if strict and path.suffix == ".pdparams":
        ours = [name for name in others if not name.endswith("num_batches_tracked")]
        wrong = [name for name in (*ours, *(state.keys() - fitting.keys() - {*ours})) if not HEAD.match(name)]
        if wrong:
            raise ConfigError(
                f"{where}: {path} does not fit this model in {len(wrong)} tensors ({listed(sorted(wrong), 5)}); "
                "pretrained_strict: False, or --no-strict, takes the others"
            )
    model.load_state_dict(fitting, strict=False)
    left = f"; left as they were: {', '.join(others[:5])}{' ...' if len(others) > 5 else ''}" if others else ""
    return f"{path}: {len(fitting)} of the model's {len(own)} tensors loaded{left}"


def interpolate(start: dict[str, Tensor], trained: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Return the state dict that lies `alpha` of the way from one to another, batch statistics included.

    Between a pretrained network and what fine-tuning made of it there is often one that is better than both (WiSE-FT,
    Wortsman et al., https://arxiv.org/abs/2109.01903). Counters and other integers are those of `trained`.

    Args:
        start: the state dict of the model before training.
        trained: that of the same model afterwards.
        alpha: 0 gives `start`, 1 gives `trained`.

    Raises:
        ValueError: A tensor is missing in one of them or has another shape there.
    """
    for name in sorted(start.keys() | trained.keys()):
        shapes = [tuple(state[name].shape) if name in state else "absent" for state in (start, trained)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"'{name}' is {shapes[0]} before and {shapes[1]} after: only weights of one model can be interpolated"
            )
    return {
        name: start[name].to(value).lerp(value, alpha) if value.is_floating_point() else value.clone()
        for name, value in trained.items()
    }


def average(states: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of the state dicts of one model, batch statistics included, holding two of them at a time.

    The mean over the last epochs of a training often generalises better than any of them (Izmailov et al.,
    https://arxiv.org/abs/1803.05407). Counters and other integers are those of the last one.

    Raises:
        ValueError: A tensor is missing in one of them or has another shape there, or there is none to take the mean of.
    """
    mean: dict[str, Tensor] = {}
    for count, state in enumerate(states, 1):
        mean = interpolate(mean or state, state, 1 / count)
    if not mean:
        raise ValueError("there are no weights to take the mean of")
    return mean


def check_room(part: nn.Module, copies: int, device: torch.device, where: str) -> None:
    """Raise ConfigError where a module's weights need more memory than a device has, were it empty.

    Args:
        part: the module, which may be on the meta device.
        copies: how many tensors of its size each trainable weight takes: itself, its gradient, the optimizer's state.
        device: where it is going to be.
        where: its place in the configuration.
    """
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cuda":
        room = torch.cuda.get_device_properties(device).total_memory
    needs = sum(on_this_rank(p).nbytes * (copies if p.requires_grad else 1) for p in part.parameters())
    if needs > room:
        what = "its weights, their gradients and the optimizer's state need" if copies > 1 else "its weights need"
        raise ConfigError(
            f"{where}: {what} {needs / 2**30:,.1f} GiB of memory, and there are {room / 2**30:,.1f}; take a smaller one"
        )


def check_fits(build: Callable[[], nn.Module], where: str) -> None:
    """Raise ConfigError where no memory can hold what is built, tried on the meta device, where it takes none.

    Args:
        build: builds a module.
        where: what it is, or its place in the configuration.
    """
    part = nn.Module()  # stays where it looks, while it is built, at its numbers, of which there are none there
    with suppress(Exception), torch.device("meta"):  # what is wrong with it is told when it is built in earnest
        part = build()
    check_room(part, 1, torch.device("cpu"), where)
