"""The model for use: the graph from pixels to vectors, what its metadata say, and the files that it is written to.

The graph takes pixels, uint8 (B, H, W, 3) in RGB, and does all that follows resizing: channel order, normalisation,
network, neck, unit length. What remains outside, resizing and cropping, is data: in inference.yml, and in the file.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from recnb.data.images import DataError, opened, printable, read_pixels, reason
from recnb.data.lists import ImageList
from recnb.data.pipeline import output_shape, single_ops
from recnb.data.transforms import reversed_channels
from recnb.models.cutting import first_line
from recnb.models.lora import merge_lora
from recnb.models.recmodel import RecModel, vectors
from recnb.recipe.schema import adds_softmax
from recnb.registry import ConfigError, check_known
from recnb.runs.folder import Run

if TYPE_CHECKING:
    import onnx

    from recnb.deploy.example import Model

FORMATS = {"onnx": "model.onnx", "torch": "model.pt2", "fp16": "model_fp16.onnx", "int8": "model_int8.onnx"}
OUTPUTS = ("features", "backbone", "neck", "logits")
INSIDE = (v2.ToDtype, v2.Normalize, v2.Lambda)  # what the graph does; v2.Lambda: only the channel order


class Inference(nn.Module):
    """The trained model from pixels on.

    Args:
        network: the trained model.
        output: one of OUTPUTS.
        mean: of pixels 0..255, in the order of channels that the network wants.
        std: likewise.
        channel_order: that order, RGB or BGR.
        normalize: whether vectors come out at length 1.
        softmax: whether logits come out as probabilities.
        half: whether it computes in float16.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: RecModel,
        output: str,
        mean: Sequence[float],
        std: Sequence[float],
        channel_order: str = "RGB",
        normalize: bool = True,
        softmax: bool = False,
        half: bool = False,
    ):
        super().__init__()
        self.network = needed(network, output)
        self.network.to(torch.float16 if half else torch.float32)
        self.output, self.normalize, self.softmax, self.reverse = output, normalize, softmax, channel_order == "BGR"
        self.dtype = torch.float16 if half else torch.float32
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32), persistent=False)

    def forward(self, image: Tensor) -> Tensor:  # uint8 (B, H, W, 3) -> float32 (B, D)
        x = image.flip(-1) if self.reverse else image
        x = ((x.float() - self.mean) / self.std).permute(0, 3, 1, 2).to(self.dtype)
        return finished(picked(self.network, x, self.output), self.normalize, self.softmax)


def needed(network: RecModel, output: str) -> RecModel:
    """Return a copy of a model in evaluation mode without the parts that `output` does not need."""
    network = copy.deepcopy(network).eval().requires_grad_(False)
    merge_lora(network)
    if output != "logits":
        network.head = None
    if output == "backbone" or (output == "features" and network.retrieval_feature_from == "backbone"):
        network.neck, network.retrieval_feature_from = None, "features"
    return network


def picked(network: RecModel, x: Tensor, output: str) -> Tensor:  # (B, 3, H, W) -> (B, D)
    """Return an output of a model; logits are computed from what the head was trained on.

    Args:
        network: the model.
        x: (B, 3, H, W), as the evaluation prepares it.
        output: one of OUTPUTS.
    """
    out = network.parts(x)
    if output != "logits" or network.head is None:
        return vectors(out[output])
    return network.head(network.head_input(out))


def finished(x: Tensor, normalize: bool, softmax: bool) -> Tensor:
    """Return an output in float32.

    Args:
        x: (B, D).
        normalize: whether at unit length.
        softmax: whether as probabilities.
    """
    x = x.float()
    return F.normalize(x, dim=1) if normalize else x.softmax(1) if softmax else x


def trained_model(run: Run) -> RecModel:
    """Return the run's model, the chosen one of several, computing in float32 on the CPU."""
    model: Any = run.model()
    model = model.models[model.chosen] if hasattr(model, "chosen") else model
    model.precision = None
    return model


@dataclass(frozen=True)
class Exported:
    """What is exported: how its graph is made, what is trained and what inference.yml says."""

    build: Callable[..., Inference]
    trained: Callable[[Tensor], Tensor]  # (B, 3, H, W), as the evaluation prepares it -> (B, D)
    outside: v2.Transform  # what remains to be done to an image before the graph
    size: list[int]  # [height, width]
    dynamic_size: bool
    meta: dict

    @property
    def vector(self) -> bool:
        """Whether an embedding comes out, which can be indexed."""
        output = self.meta["output"]
        return output["name"] != "logits" and isinstance(output["embedding_size"], int)


def planned(run: Run, normalize: bool | None, dynamic_size: bool, arch: dict) -> Exported:
    """Return what a run's model is exported as.

    Args:
        run: the run.
        normalize: vectors of length 1; None where the evaluation compares by cosine.
        dynamic_size: whether any height and width may come.
        arch: infer_output_key and infer_add_softmax, where they shall not be the configuration's.
    """
    network = trained_model(run)
    output, softmax = chosen_output({**run.cfg["Arch"], **arch}, network)
    steps, outside, inside = preprocessing(run)
    size = image_size(run)
    with torch.inference_mode():
        shape = picked(network, torch.zeros(1, 3, *size), output).shape[1:]
    vector = len(shape) == 1 and output != "logits"
    unit = vector and (run.cfg["Global"]["feature_normalize"] if normalize is None else normalize)
    made = {
        "name": output,
        "embedding_size": shape[0] if vector else list(shape),
        "normalised": unit,
        "softmax": softmax,
    }
    return Exported(
        partial(Inference, network, output, **inside, normalize=unit, softmax=softmax),
        lambda x: finished(picked(network, x, output), unit, softmax),
        outside,
        size,
        dynamic_size,
        describe(run, steps, inside, made, dynamic_size),
    )


# ---- what inference.yml says -----------------------------------------------------------------------------------------


def chosen_output(section: dict, network: RecModel) -> tuple[str, bool]:
    """Return infer_output_key of a section Arch, and whether a softmax follows.

    Args:
        section: the section.
        network: the model that it has made.

    Raises:
        ConfigError: The model has no such output, or it cannot be meant.
    """
    key, softmax = section.get("infer_output_key") or "features", adds_softmax(section)
    check_known([key], OUTPUTS, "Arch.infer_output_key", "output")
    if softmax and key != "logits":
        raise ConfigError(
            f"Arch.infer_add_softmax: is True, and infer_output_key is {key}: a softmax over an "
            "embedding destroys its distances; write infer_add_softmax: False"
        )
    if {"neck": network.neck, "logits": network.head}.get(key, 0) is None:
        raise ConfigError(f"Arch.infer_output_key: is {key}, and the model has no {'head' if key == 'logits' else key}")
    return key, softmax


def preprocessing(run: Run) -> tuple[list[dict], v2.Transform, dict]:
    """Return what the evaluation does to images: steps before the graph as data and as a transform, and what is inside.

    Raises:
        ConfigError: Query and gallery differ, or example.py cannot do an op.
    """
    if str(run.query.transform) != str(run.gallery.transform):
        raise ConfigError(
            "DataLoader.Eval.Gallery.dataset.transform_ops: differ from those of the queries, and an "
            "exported model has one preprocessing"
        )
    ops = [op for op in single_ops(run.query.transform) if not isinstance(op, v2.Identity)]
    first = next(i for i, op in enumerate(ops) if isinstance(op, v2.ToDtype))
    outside = [op for op in ops[:first] if not isinstance(op, v2.Lambda)]
    for op in (op for op in ops if op not in outside):
        if not isinstance(op, INSIDE) or (isinstance(op, v2.Lambda) and op.lambd is not reversed_channels):
            raise ConfigError(
                f"DataLoader.Eval.Query.dataset.transform_ops: {op} cannot be exported at its place; an "
                "evaluation decodes, resizes and crops, and then normalises"
            )
    return [step(op) for op in outside], v2.Compose(outside or [v2.Identity()]), values(ops)


def image_size(run: Run) -> list[int]:
    """Return the height and the width that the evaluation's images have."""
    return [*output_shape(run.query.transform, "DataLoader.Eval")[1:]]


def step(op: v2.Transform) -> dict:
    """Return a resize or central crop as data: sizes are [height, width], resize_short the shorter side in pixels.

    Raises:
        ConfigError: It is another op, or interpolates in a way that example.py does not have.
    """
    if isinstance(op, v2.CenterCrop):
        return {"crop": list(op.size)}
    name = InterpolationMode(op.interpolation).value if isinstance(op, v2.Resize) else str(op)
    if not isinstance(op, v2.Resize) or name == "nearest":
        raise ConfigError(
            f"DataLoader.Eval.Query.dataset.transform_ops: {name} cannot be exported; example.py has "
            "central crops, and resizing that is nearest-exact, bilinear, bicubic or lanczos"
        )
    size = {"resize": list(op.size)} if len(op.size) == 2 else {"resize_short": op.size[0]}
    return {**size, "interpolation": name.removesuffix("-exact")}


def values(ops: Sequence[v2.Transform]) -> dict:
    """Return the mean and std, of pixels 0..255, and the channel order that ops on pixel values come to."""
    scale, mean, std, order = None, [0.0] * 3, [1.0] * 3, "RGB"
    for op in ops:
        if isinstance(op, v2.ToDtype) and scale is None:
            scale = 255.0 if op.scale else 1.0
            std = [scale] * 3
        elif isinstance(op, v2.Normalize):
            mean = [m + s * float(a) for m, s, a in zip(mean, std, op.mean, strict=True)]
            std = [s * float(b) for s, b in zip(std, op.std, strict=True)]
        elif isinstance(op, v2.Lambda):
            mean, std, order = mean[::-1], std[::-1], order[::-1]
    return {"channel_order": order, "mean": mean, "std": std}


def describe(run: Run, steps: list[dict], inside: dict, described: dict, dynamic_size: bool) -> dict:
    """Return the content of inference.yml.

    Args:
        run: the run that is exported.
        steps: what is done before the graph.
        inside: what is done to pixels in it.
        described: the section output.
        dynamic_size: whether any height and width may come.
    """
    if described["name"] == "logits":
        described = {**described, "labels": run.class_names}
    size = [None, None] if dynamic_size else image_size(run)
    scaled = {key: [round(value / 255, 7) for value in inside[key]] for key in ("mean", "std")}
    return {
        "input": {"name": "image", "layout": "NHWC", "dtype": "uint8", "channel_order": "RGB", "size": size},
        "preprocess": steps,
        "inside": {"channel_order": inside["channel_order"], "scale": "1/255", **scaled},
        "output": described,
        "compare": "cosine" if run.cfg["Global"]["feature_normalize"] else "dot",
    }


# ---- the files -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Show nothing of what torch and onnxruntime print and log meanwhile: what goes wrong comes as an exception."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def traced(model: nn.Module, size: Sequence[int], dynamic_size: bool = False) -> torch.export.ExportedProgram:
    """Return the graph of a model over uint8 (B, H, W, 3) for any B.

    Args:
        model: the model.
        size: (height, width) of the images.
        dynamic_size: whether any height and width may come instead.

    Raises:
        ConfigError: The model cannot be traced.
    """
    sides = {1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC} if dynamic_size else {}
    shapes = ({0: torch.export.Dim("batch", min=1), **sides},)
    try:
        with torch.no_grad(), quiet():
            return torch.export.export(
                model.eval(), (torch.zeros(2, *size, 3, dtype=torch.uint8),), dynamic_shapes=shapes, strict=True
            )
    except Exception as error:  # the tracer fails in as many ways as models can be written
        way = " with sizes that vary, so leave dynamic_size out" if dynamic_size else ""
        raise ConfigError(f"the model cannot be exported{way}: {first_line(error)}") from error


def write_onnx(program: torch.export.ExportedProgram, path: Path, meta: dict) -> None:
    """Write the graph as ONNX in one file.

    Args:
        program: the graph.
        path: the file.
        meta: the content of inference.yml, which becomes JSON in it.
    """
    import onnx

    with quiet():
        made: Any = torch.onnx.export(
            program, dynamo=True, input_names=["image"], output_names=[meta["output"]["name"]], verbose=False
        )
    proto = made.model_proto
    given = (dim.dim_param for dim in proto.graph.input[0].type.tensor_type.shape.dim)
    names = {symbol: name for symbol, name in zip(given, ("batch", "height", "width", ""), strict=True) if symbol}
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]
    onnx.helper.set_model_props(proto, {"inference": json.dumps(meta)})
    forget_makers(proto)
    onnx.save(proto, path)


def forget_makers(proto: onnx.ModelProto) -> None:
    """Take out of an ONNX model what tells of the machine and the source that it was made with."""
    for graph in (proto.graph, *proto.functions):
        graph.ClearField("metadata_props")
        for part in (*graph.node, *graph.value_info, *getattr(graph, "input", ()), *getattr(graph, "output", ())):
            if hasattr(part, "metadata_props"):
                part.ClearField("metadata_props")
            part.ClearField("doc_string")


def without_sources(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Return the program, its nodes without the lines of source that they come from."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if hasattr(module, "graph") else ():
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node"):
                node.meta.pop(key, None)
    return program


def write_int8(source: Path, path: Path, meta: dict) -> None:
    """Write an ONNX file with 8-bit weights, activations quantised as they come (onnxruntime's dynamic kind).

    Args:
        source: the ONNX file of the model in float32.
        path: the file.
        meta: as in `write_onnx`.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():
        quantize_dynamic(source, path, weight_type=QuantType.QUInt8, per_channel=True)
    proto = onnx.load(path)
    onnx.helper.set_model_props(proto, {"inference": json.dumps(meta)})
    onnx.save(proto, path)


def write_models(plan: Exported, formats: Sequence[str], folder: Path) -> dict[str, Callable]:
    """Return by name what each file computes, from uint8 (B, H, W, 3) to (B, D); the files are written.

    Args:
        plan: what is exported.
        formats: some of FORMATS.
        folder: where to.

    Raises:
        ConfigError: A format cannot hold this model.
    """
    program, runners = traced(plan.build(), plan.size, plan.dynamic_size), {}
    for name in (name for name in FORMATS if name in formats):
        path = folder / FORMATS[name]
        try:
            if name == "torch":
                torch.export.save(without_sources(program), path, extra_files={"inference.json": json.dumps(plan.meta)})
            elif name == "int8":
                write_int8(folder / FORMATS["onnx"], path, plan.meta)
            else:
                half = name == "fp16"
                graph = traced(plan.build(half=True), plan.size, plan.dynamic_size) if half else program
                write_onnx(graph, path, plan.meta)
            runners[path.name] = runner(path)
        except Exception as error:  # converters fail in as many ways as models can be written
            raise ConfigError(f"formats: {name} cannot be written for this model: {first_line(error)}") from error
    return runners


def runner(path: Path) -> Callable[[Tensor], np.ndarray]:
    """Return what a model file computes: from uint8 (B, H, W, 3) to float32 (B, D)."""
    if path.suffix == ".pt2":
        module = torch.export.load(path).module()
        return lambda x: module(x).numpy()
    session = open_model(path).session
    return lambda x: session.run(None, {"image": x.numpy()})[0]


NEEDED = ("onnx", "onnxscript", "onnxruntime")


def check_installed() -> None:
    """Raise ConfigError where a package is missing that exporting needs beyond those of recnb."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(f"exporting needs {' and '.join(missing)}: pip install 'recnb[export]'")


def open_model(path: str | Path) -> Model:
    """Return the exported ONNX model of a file, as its own example.py runs it.

    Raises:
        ConfigError: onnxruntime is not installed, or cannot run the file.
    """
    check_installed()
    from recnb.deploy.example import Model

    try:
        return Model(path)
    except Exception as error:  # onnxruntime raises whatever a broken file leads it to
        raise ConfigError(f"{path}: is no model that can be run: {first_line(error)}; export it again") from error


def embed_file(model: Model, path: str | Path, box: Sequence[int] | None = None) -> np.ndarray:
    """Return the vector of an image file by the exported model and its own preprocessing.

    Args:
        model: the exported model.
        path: the file.
        box: the part of it that is meant, (left, top, right, bottom) in pixels; None is the whole image.

    Returns:
        (D,) float32.

    Raises:
        DataError: The file cannot be read; the message names it.
    """
    try:
        if box is not None:
            return model(Image.fromarray(read_pixels(str(path), list(box)).permute(1, 2, 0).numpy()))
        with opened(str(path)) as image:
            return model(image)
    except Exception as error:  # decoders and the runtime raise whatever a broken file leads them to
        raise DataError(f"the image {printable(str(path))} {reason(error)}") from error


def embed_images(model: Model, images: ImageList) -> np.ndarray:
    """Return (N, D) float32 of a list's images, from their files, or from their boxes in them."""
    boxes = [None] * len(images) if images.boxes is None else images.boxes.tolist()
    return np.stack([embed_file(model, *image) for image in zip(images.paths, boxes, strict=True)])
