"""Exports against the trained model: the folder that 05_export leaves, its example run alone, its index, refusals."""

import io
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import venv
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import yaml
from conftest import ROOT, run_notebook
from huggingface_hub import ModelCard
from PIL import Image
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from recnb import load_config
from recnb.data.images import DataError
from recnb.data.transforms import TRANSFORMS
from recnb.deploy import example, export, graph, modelcard
from recnb.deploy import graph as inference
from recnb.deploy import index as indexing
from recnb.deploy import recognizer as deploy
from recnb.models.backbones import create_backbone
from recnb.models.heads import ArcMargin
from recnb.models.necks import FC
from recnb.models.recmodel import DistillationModel, RecModel
from recnb.recipe.model import build_model
from recnb.registry import ConfigError
from recnb.retrieval.search import Index
from recnb.runs.folder import embed_picture, load_run
from recnb.storage import harmless, write_sums

# One small member of each family of backbones; sizes are the least that its strides and windows allow.
FAMILIES = {
    "lcnet_050": 64,
    "resnet18": 64,
    "resnet18d": 64,
    "mobilenetv3_small_050": 64,
    "efficientnet_b0": 64,
    "convnext_atto": 64,
    "convnextv2_atto": 64,
    "vit_tiny_patch16_224": 64,
    "deit3_small_patch16_224": 64,
    "swin_tiny_patch4_window7_224": 224,
    "swinv2_tiny_window8_256": 256,
    "regnety_002": 64,
    "hgnet_tiny": 64,
    "hgnetv2_b0": 64,
    "ghostnet_050": 64,
    "mobilevit_xxs": 64,
    "maxvit_rmlp_pico_rw_256": 256,
    "eva02_tiny_patch14_224": 56,
    "beit_base_patch16_224": 224,
    "coatnet_nano_rw_224": 224,
    "xcit_nano_12_p16_224": 64,
    "cait_xxs24_224": 224,
    "edgenext_xx_small": 64,
    "fastvit_t8": 64,
    "dla46_c": 64,
    "vgg11": 64,
    "densenet121": 64,
    "inception_v4": 128,
    "tiny_vit_5m_224": 224,
}
ALONE = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "recnb", "timm", "faiss", "yaml", "pandas"):
            raise ImportError(f"{name} is not to be had here")
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def folder(trained_run, tmp_path_factory) -> Path:
    """The export folder that the notebook leaves in a copy of the run's."""
    run = tmp_path_factory.mktemp("exported") / "run"
    shutil.copytree(trained_run, run)
    run_notebook("05_export", run, run=str(run), formats=["onnx", "torch", "int8"])
    return run / "export"


@pytest.fixture(scope="module")
def run(folder):
    return load_run(folder.parent)


@pytest.fixture
def report(folder) -> dict:
    return json.loads((folder / "parity.json").read_text())


def cosine(a, b) -> float:
    return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


def alone(folder: Path, picture, *command) -> np.ndarray:
    """What example.py prints."""
    command = command or (sys.executable, "-c", ALONE)
    result = subprocess.run([*command, folder / "example.py", picture], capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr
    return np.array(result.stdout.split(), float)


# ---- the folder ------------------------------------------------------------------------------------------------------


def test_the_folder_is_whole(folder, run):
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "SHA256SUMS",
        "example.py",
        "index",
        "inference.yml",
        "model.onnx",
        "model.pt2",
        "model_int8.onnx",
        "operating_point.json",
        "parity.json",
    ]
    assert sorted(path.name for path in folder.parent.iterdir() if path.name.startswith("export")) == [
        "export",
        "export.ipynb",
    ]
    meta = yaml.safe_load((folder / "inference.yml").read_text())
    assert meta["input"] == {
        "name": "image",
        "layout": "NHWC",
        "dtype": "uint8",
        "channel_order": "RGB",
        "size": [32, 32],
    }
    assert meta["preprocess"] == [{"resize": [32, 32], "interpolation": "bilinear"}]
    assert meta["inside"] == {
        "channel_order": "RGB",
        "scale": "1/255",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    assert meta["output"] == {"name": "features", "embedding_size": 16, "normalised": True, "softmax": False}
    assert example.Model(folder / "model_int8.onnx").meta == example.Model(folder / "model.onnx").meta == meta
    extra = {"inference.json": ""}
    torch.export.load(folder / "model.pt2", extra_files=extra)
    assert json.loads(extra["inference.json"]) == meta


def test_the_exported_models_are_the_trained_one(report, run):
    assert report["failures"] == [] and report["images"]["of"] == [len(run.query), len(run.gallery)]
    assert report["trained"]["mAP"] == pytest.approx(run.metrics["mAP"], abs=1e-6)
    rows = [row for name in ("model.onnx", "model.pt2") for row in report["model_parity"][name].values()]
    for row in [*rows, report["pipeline_parity"]["example.py"]]:
        assert row["cosine_least"] > 0.9999 and row["difference_mean"] <= row["difference_largest"] < 1e-4
        assert row["same_first_hit"] == 1 and row["recall1"] == report["trained"]["recall1"]
    assert list(report["model_parity"]["model.onnx"]) == ["batch_64", "batch_1"]
    assert report["stored_features"]["cosine_least"] > 0.9999


def test_what_int8_costs_is_measured(report, folder):
    row = report["model_parity"]["model_int8.onnx"]["batch_64"]
    assert 0.9 < row["cosine_least"] < 0.999999
    assert row["loss"]["mAP"] == pytest.approx(report["trained"]["mAP"] - row["mAP"])
    assert (folder / "model_int8.onnx").stat().st_size < 0.5 * (folder / "model.onnx").stat().st_size


def test_the_batch_of_the_graph_is_free(folder):
    proto = onnx.load(folder / "model.onnx")
    assert [dim.dim_param or dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim] == [
        "batch",
        32,
        32,
        3,
    ]
    assert proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    onnx.checker.check_model(proto)


def test_the_model_card_says_what_the_run_knows(folder, run, report):
    text = (folder / "README.md").read_text()
    for part in (
        "test_resnet",
        "ArcMargin",
        "| queries | query.txt |",
        "0.485",
        "resize [32, 32]",
        "95 % interval",
        f"{report['trained']['mAP']:.3f}",
        "Not tested on",
        "These weights: **fill in**",
    ):
        assert part in text, part
    assert ModelCard(text).data.to_dict().items() >= {"license": "other", "library_name": "onnx"}.items()
    info = deploy.Recognizer(folder).index.info
    row = info["metrics"]["mAP"]
    assert row["low"] <= row["mean"] <= row["high"] and f"{row['low']:.3f} to {row['high']:.3f}" in text
    assert row["mean"] == pytest.approx(report["trained"]["mAP"], abs=1e-3)


def test_no_text_ends_a_cell_of_the_model_card():
    assert [modelcard.cell(value) for value in ("a|b", 0.5, 3)] == [r"a\|b", "0.500", "3"]
    assert [modelcard.cell(text) for text in ("=1+1", "@x", "-a", "a-b")] == ["'=1+1", "'@x", "'-a", "a-b"]
    assert modelcard.cell("<img src=x onerror=a()>\n|") == r"&lt;img src=x onerror=a()&gt;\n\|"


def test_no_name_of_a_list_or_a_folder_is_markup_in_the_model_card(folder, run, report, tmp_path):
    lists = [replace(images, source="/x/<script>a()|b.txt") for images in run.lists()]
    named = replace(run, folder=tmp_path / "<b>run", lists=lambda: lists)
    meta = json.loads(graph.open_model(folder / "model.onnx").session.get_modelmeta().custom_metadata_map["inference"])
    text = modelcard.model_card(named, meta, report, None, ["model.onnx"])
    assert "# &lt;b&gt;run\n" in text and r"| &lt;script&gt;a()\|b.txt |" in text
    assert "<script" not in text and "<b>" not in text


def test_the_model_card_names_what_the_export_leaves_out(run):
    meta = {"compare": "cosine", "output": {"name": "features", "embedding_size": 16, "normalised": True}}
    assert "behind it" not in modelcard.output_section(meta, run)
    cfg = {
        **run.cfg,
        "PostProcess": [{"AlphaQueryExpansion": {"k": 3}}],
        "Global": {**run.cfg["Global"], "re_ranking": True},
    }
    text = modelcard.output_section(meta, replace(run, cfg=cfg))
    assert "used AlphaQueryExpansion, re_ranking behind it, which is no part of this folder" in text


def test_the_notebook_shows_figures_and_no_warnings(folder):
    executed = json.loads((folder.parent / "export.ipynb").read_text())
    shown = [output for cell in executed["cells"] for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 2
    assert ["".join(output["text"]) for output in shown if output.get("name") == "stderr"] == []
    assert (folder.parent / "export.ipynb").stat().st_size < 1_500_000


# ---- without recnb ---------------------------------------------------------------------------------------------------


def test_the_example_needs_neither_torch_nor_recnb(folder, run):
    assert sum(map(bool, (folder / "example.py").read_text().splitlines())) <= 60
    vector = alone(folder, run.query.paths[0])
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    assert cosine(vector, embed_picture(run, run.model(), run.query.paths[0])) > 0.9999


@pytest.mark.slow
def test_the_example_runs_in_an_environment_of_three_packages(folder, run, tmp_path):
    venv.create(tmp_path / "bare", with_pip=True)
    python = tmp_path / "bare" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "onnxruntime", "numpy", "pillow"], check=True)
    vector = alone(folder, run.query.paths[1], python)
    assert cosine(vector, embed_picture(run, run.model(), run.query.paths[1])) > 0.9999


@pytest.mark.parametrize("size", [(96, 96), (61, 130), (200, 33), (31, 40)])
@pytest.mark.parametrize(
    "ops",
    [
        [("ResizeImage", {"size": [40, 24]})],
        [("ResizeImage", {"size": 32, "interpolation": "bicubic"})],
        [("ResizeImage", {"resize_short": 37}), ("CropImage", {"size": 32})],
        [("ResizeImage", {"resize_short": 20}), ("CropImage", {"size": [33, 35]})],
        [("Resize", {"size": 29, "interpolation": "lanczos"}), ("CenterCrop", {"size": [32, 28]})],
    ],
)
def test_preparing_with_pillow_is_the_evaluations_resizing(ops, size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1] // 8 + 1, size[0] // 8 + 1, 3)).astype(np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    transforms = [TRANSFORMS[name](**args) for name, args in ops]
    wanted = v2.Compose(transforms)(pil_to_tensor(image)).permute(1, 2, 0).numpy().astype(int)
    given = example.prepare(image, [inference.step(op) for op in transforms])
    assert given.shape == wanted.shape and np.abs(given - wanted).max() <= 3
    assert np.abs(given - wanted).mean() < 0.3


def test_preparing_turns_and_converts_as_the_lists_do(tmp_path, run):
    grey = (np.arange(48 * 32).reshape(48, 32) * 40).astype(np.uint16)
    turned = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 32, 3)).astype(np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    turned.convert("P").save(tmp_path / "palette.png")
    turned.convert("CMYK").save(tmp_path / "cmyk.png", format="JPEG")
    turned.putalpha(Image.fromarray((grey >> 3).astype(np.uint8)))
    turned.save(tmp_path / "alpha.png")
    for name in ("turned", "grey", "palette", "cmyk", "alpha"):
        images = replace(run.query, paths=[str(tmp_path / f"{name}.png")], labels=np.zeros(1, int))
        assert (example.prepare(Image.open(images.paths[0]), []) == images.image(0).permute(1, 2, 0).numpy()).all()
    with pytest.raises(ValueError, match="cannot hold these pixels of kind F"):
        example.prepare(Image.new("F", (4, 4)), [])


# ---- the graph -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ops",
    [
        [("NormalizeImage", {})],
        [],
        [("DecodeImage", {"to_rgb": False}), ("NormalizeImage", {})],
        [("NormalizeImage", {"scale": "1.0/128", "mean": [1, 2, 3], "std": [0.5, 1, 2]})],
        [("ToTensor", {}), ("Normalize", {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.4, 0.3]})],
        [("NormalizeImage", {"mean": [0.1, 0.2, 0.3]}), ("DecodeImage", {"to_rgb": False})],
    ],
)
def test_the_graph_does_to_pixels_what_the_transforms_do(ops, run):
    transforms = [TRANSFORMS[name](**args) for name, args in ops]
    whole = v2.Compose([v2.Resize([8, 8]), *transforms, v2.ToDtype(torch.float32, scale=True)])
    images = replace(run.query, transform=whole)
    steps, outside, inside = inference.preprocessing(replace(run, lists=lambda: (images, images)))
    assert [list(entry) for entry in steps] == [["resize", "interpolation"]]
    graph = inference.Inference(RecModel(nn.Flatten()), "features", **inside, normalize=False)
    image = images.image(0)
    pixels, wanted = export.pixels_and_input(outside, whole, image)
    assert torch.allclose(graph(pixels[None])[0], wanted.flatten(), atol=1e-4)


@pytest.mark.parametrize(
    "ops, message",
    [
        ([v2.Resize([8, 8], v2.InterpolationMode.NEAREST)], "nearest cannot be exported"),
        ([v2.ToDtype(torch.float32), v2.Resize([8, 8])], "Resize.* cannot be exported at its place"),
        ([v2.Resize([8, 8]), v2.RandomHorizontalFlip()], "RandomHorizontalFlip.* cannot be exported"),
        ([v2.Resize([8, 8]), v2.Lambda(torch.neg)], "Lambda.* cannot be exported at its place"),
    ],
)
def test_what_example_py_cannot_do_is_refused(ops, message, run):
    images = replace(run.query, transform=v2.Compose([*ops, v2.ToDtype(torch.float32, scale=True)]))
    with pytest.raises(ConfigError, match=message):
        inference.preprocessing(replace(run, lists=lambda: (images, images)))
    with pytest.raises(ConfigError, match="differ from those of the queries"):
        inference.preprocessing(replace(run, lists=lambda: (images, run.gallery)))


def test_outputs_are_what_the_configuration_names():
    torch.manual_seed(0)
    model = RecModel(nn.Sequential(nn.Flatten(), nn.Linear(48, 6)), FC(6, 4), ArcMargin(4, 5)).eval()
    pixels = torch.randint(0, 256, (3, 4, 4, 3), dtype=torch.uint8)
    out = model(pixels.float().permute(0, 3, 1, 2))

    def given(output, **options):
        return inference.Inference(model, output, [0.0] * 3, [1.0] * 3, **options)(pixels)

    assert torch.allclose(given("features", normalize=False), out["neck"], atol=1e-4)
    assert torch.allclose(given("features"), nn.functional.normalize(out["neck"]), atol=1e-6)
    assert torch.allclose(given("backbone", normalize=False), out["backbone"], atol=1e-4)
    probable = given("logits", normalize=False, softmax=True)
    assert torch.allclose(probable, model.head(out["neck"]).softmax(1), atol=1e-6) and probable.shape == (3, 5)
    model.head_feature_from, model.retrieval_feature_from = "backbone", "backbone"
    model.head = ArcMargin(6, 5)
    assert torch.allclose(given("logits", normalize=False), model.head(out["backbone"]), atol=1e-6)
    kept = inference.Inference(model, "features", [0.0] * 3, [1.0] * 3)
    assert torch.allclose(kept(pixels), nn.functional.normalize(out["backbone"]), atol=1e-6)
    assert kept.network.head is None and kept.network.neck is None and model.neck is not None


def test_half_precision_and_teachers_stay_behind(config_file, run):
    cfg = load_config(config_file({"AMP.use_amp": True, "AMP.use_fp16_test": True, "AMP.dtype": "bfloat16"}))
    model = build_model(cfg)
    assert model.precision is torch.bfloat16 and model.half_evaluation
    pair = DistillationModel({"Teacher": build_model(cfg), "Student": model}, "Student")

    class Trained(type(run)):
        def model(self):
            return pair.eval()

    chosen = inference.trained_model(Trained(**vars(run)))
    assert chosen is model and chosen.precision is None


@pytest.mark.parametrize(
    "arch, message",
    [
        ({"infer_output_key": "featurs"}, "infer_output_key: there is no output 'featurs'; did you mean 'features'"),
        ({"infer_add_softmax": True}, "a softmax over an embedding destroys its distances"),
        ({"infer_add_softmax": "true", "infer_output_key": "neck"}, "a softmax over an embedding"),
        ({"infer_output_key": "logits"}, "is logits, and the model has no head"),
        ({"infer_output_key": "neck"}, "is neck, and the model has no neck"),
    ],
)
def test_outputs_that_cannot_be_meant_are_refused(arch, message):
    with pytest.raises(ConfigError, match=message):
        inference.chosen_output(arch, RecModel(nn.Flatten()))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"formats": ["onnx", "tensorflow"]}, "formats: there is no format 'tensorflow'"),
        ({"formats": ["torch"]}, "onnx must be among them"),
        ({"unknown_rate": 0.1, "false_accept_rate": 0.1}, "unknown_rate: only one of them can be chosen"),
        ({"index": "tests"}, "there is no index 'tests'; did you mean 'test'"),
        ({"normalise": False}, "there is no option 'normalise'; did you mean 'normalize'"),
        ({"false_accept_rate": 1e-9}, "false_accept_rate: 1e-09 cannot be measured on the .* searches .* at least"),
        ({"folder": str(ROOT / "tests")}, "tests: holds other things than an export"),
    ],
)
def test_wrong_arguments_end_in_a_sentence(arguments, message, run):
    with pytest.raises(ConfigError, match=message):
        export.export_model(run, **arguments)


def test_without_the_packages_there_is_one_sentence(monkeypatch, run):
    monkeypatch.setattr(graph, "find_spec", lambda name: None if name.startswith("onnx") else True)
    with pytest.raises(ConfigError, match=r"onnx and onnxscript and onnxruntime: pip install 'recnb\[export\]'"):
        export.export_model(run)


def test_the_folder_is_where_the_configuration_says(run, tmp_path):
    elsewhere = {**run.cfg, "Global": {**run.cfg["Global"], "save_inference_dir": str(tmp_path / "there")}}
    assert export.export_folder(run, None) == run.folder / "export"
    assert export.export_folder(replace(run, cfg=elsewhere), None) == tmp_path / "there"
    assert export.export_folder(replace(run, cfg=elsewhere), tmp_path / "here") == tmp_path / "here"


# ---- the proof fails -------------------------------------------------------------------------------------------------


@pytest.fixture
def forged(folder, monkeypatch):
    """Exports whose files are those of the folder, and whose ONNX model gives what a function makes of its output."""

    def write(change):
        def write_models(plan, formats, part):
            shutil.copy(folder / "model.onnx", part)
            session = onnxruntime.InferenceSession(folder / "model.onnx")
            return {"model.onnx": lambda x: change(session.run(None, {"image": x.numpy()})[0])}

        monkeypatch.setattr(export, "write_models", write_models)

    return write


def test_a_model_that_is_another_is_not_exported(forged, run, tmp_path):
    forged(lambda vectors: vectors)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "export.ipynb").write_text("being executed")
    target = export.export_model(run, ["onnx"], tmp_path / "out")
    before = (target / "parity.json").read_bytes()
    forged(lambda vectors: vectors + 0.02 * np.arange(16, dtype=np.float32) / 16)
    with pytest.raises(export.ExportError, match=r"model\.onnx, batch_64: the cosine .*out\.failed"):
        export.export_model(run, ["onnx"], tmp_path / "out")
    assert json.loads((tmp_path / "out.failed" / "parity.json").read_text())["failures"]
    assert (target / "parity.json").read_bytes() == before
    forged(lambda vectors: vectors)
    export.export_model(run, ["onnx"], target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.previous"]
    assert (target / "export.ipynb").read_text() == "being executed" and (target / "index").is_dir()


def test_metrics_that_differ_are_a_failure_by_themselves():
    row = {"cosine_least": 1.0, "mAP": 0.5, "loss": {"mAP": 0.001}}
    report = {
        "trained": {"mAP": 0.501},
        "model_parity": {"model.onnx": {"batch_1": row}, "model_int8.onnx": {"": row}},
        "pipeline_parity": {"example.py": {**row, "loss": {"mAP": 0.0}}},
    }
    assert export.failures(report) == ["model.onnx, batch_1: mAP is 0.5000 and not 0.5010"]
    row["cosine_least"] = float("nan")
    assert len(export.failures(report)) == 2


def test_an_export_that_breaks_leaves_nothing(forged, run, tmp_path):
    def broken(vectors):
        raise ZeroDivisionError

    forged(broken)
    with pytest.raises(ZeroDivisionError):
        export.export_model(run, ["onnx"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_sample_keeps_identities_whole(run):
    for most in (1, 20, 10_000):
        rows = export.sample(run.query, run.gallery, most)
        kept = [export.taken(images, part) for images, part in zip((run.query, run.gallery), rows, strict=True)]
        names = [set(images.labels.tolist()) for images in kept]
        assert names[0] == names[1] and names[0]
        assert all(
            np.isin(images.labels, list(names[0])).sum() == len(part)
            for images, part in zip((run.query, run.gallery), rows, strict=True)
        )
        assert sum(map(len, kept)) <= most or len(names[0]) == 1


# ---- the index -------------------------------------------------------------------------------------------------------


def test_the_rates_are_those_of_searches_one_by_one(run, folder):
    """Every search again, one by one, through the index alone: itself left out, or its whole identity."""
    recognizer, point = deploy.Recognizer(folder), json.loads((folder / "operating_point.json").read_text())
    known = indexing.labelled_images(run)
    vectors, names = np.load(folder / "index" / "embeddings.npy"), known.names
    counts = dict.fromkeys(("right", "unknown", "accepted"), 0)

    def mate(hit: int, asked: int) -> float:
        others = (names == names[hit]) & (known.content != known.content[asked]) & (np.arange(len(names)) != hit)
        return max(vectors[others] @ vectors[hit], default=np.nan)

    for row in known.rows["query"]:
        scores = vectors @ vectors[row]
        same = names == names[row]
        for kind, seen in (
            ("known", (known.content != known.content[row]) & ~(same & (known.cameras == known.cameras[row]))),
            ("unknown", ~same),
        ):
            order = np.flatnonzero(seen)[np.argsort(-scores[seen])][:50]
            mates = [mate(hit, row) for hit in order]
            name, sure = recognizer.decide(scores[order], names[order], np.array(mates))
            if kind == "known":
                counts["right"] += sure >= recognizer.threshold and name == names[row]
                counts["unknown"] += sure < recognizer.threshold
            else:
                counts["accepted"] += sure >= recognizer.threshold
    told, queries = point["points"]["chosen"], len(known.rows["query"])
    assert point["searches"] == {"known": queries, "unknown": queries, "identities": 9, "trained_on": False}
    for kind, key in (("right", "known_right"), ("unknown", "unknown_rate"), ("accepted", "false_accept_rate")):
        # the report leaves each identity out of the curve that judges it, so a few answers may differ
        assert counts[kind] == pytest.approx(told[key]["count"], abs=0.1 * queries), kind
        assert told[key]["low"] <= told[key]["share"] <= told[key]["high"]
    assert list(point["points"]) == ["chosen", "best balance", "false accepts 1.0%", "false accepts 0.1%"]
    assert point["threshold"] == recognizer.threshold == told["threshold"]


def test_the_index_holds_the_training_images_too(run, folder):
    index = deploy.Recognizer(folder).index
    assert set(index.columns["label"]) == {str(i) for i in range(24)}
    assert len(index) == 24 * 6 and index.info["holds"]["lists"]["training"] == 15 * 6


def test_search_finds_the_gallery_and_knows_who_is_unknown(run, folder):
    recognizer = deploy.Recognizer(folder)
    picture, label = run.gallery.paths[3], str(run.gallery.names[run.gallery.labels[3]])
    found = recognizer.search(picture, 4)
    assert list(found) == ["similarity", "accepted", "label", "path", "id"] and len(found) == 4
    assert found.similarity[0] == pytest.approx(1, abs=1e-5) and found.similarity.is_monotonic_decreasing
    assert found.label[0] == label and Path(found.path[0]).samefile(picture)
    answer = deploy.Recognizer(folder, threshold=0).identify(picture)
    assert (answer.name, answer.nearest[0].name, len(answer.nearest)) == (label, label, 3)
    assert Path(answer.nearest[0].path).samefile(picture) and answer.nearest[0].score == pytest.approx(1, abs=1e-5)
    assert str(answer) == f"{label} ({answer.probability:.0%})" and 0 < answer.probability < 1
    for same in (Image.open(picture), np.asarray(Image.open(picture).convert("RGB"))):
        assert deploy.Recognizer(folder, threshold=0).identify(same).probability == pytest.approx(answer.probability)
    again = recognizer.search(picture, 4, itself=False)
    assert again.id[:3].tolist() == found.id[1:].tolist()
    stranger = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8))
    asked = recognizer.identify(stranger)
    strict = deploy.Recognizer(folder, threshold=asked.probability + 1e-6)
    assert strict.identify(stranger).name == "unknown" and not strict.search(stranger).accepted.any()
    lax = deploy.Recognizer(folder, threshold=asked.probability - 1e-6)
    assert lax.identify(stranger).name in lax.search(stranger, 50).label[lax.search(stranger, 50).accepted].unique()


def test_items_come_and_go_and_are_kept(run, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "export")
    recognizer = deploy.Recognizer(tmp_path / "export", threshold=0)
    picture, label = run.gallery.paths[0], str(run.gallery.names[run.gallery.labels[0]])
    size = len(recognizer.index)
    assert recognizer.remove(label) == 6 and len(recognizer.index) == size - 6
    assert recognizer.identify(picture).name != label
    with pytest.raises(ValueError, match=f"no items of the label '{label}'"):
        recognizer.remove(label)
    (new,) = recognizer.add([picture], ["somebody"])
    assert recognizer.identify(picture).nearest[0].name == "somebody"
    recognizer.save()
    again = deploy.Recognizer(tmp_path / "export").search(picture, 1).iloc[0]
    assert (again.label, again.id) == ("somebody", new) and Path(again.path).samefile(picture)
    with pytest.raises(ValueError, match="1 images and 2 labels"):
        recognizer.add([picture], ["a", "b"])


def test_an_index_belongs_to_its_model(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "export")
    shutil.copy(folder / "model_int8.onnx", tmp_path / "export" / "model.onnx")
    with pytest.raises(ConfigError, match=r"model\.onnx: is missing or not as it was written"):
        deploy.Recognizer(tmp_path / "export")
    write_sums(tmp_path / "export", ["model.onnx"])
    with pytest.raises(ValueError, match="embed the gallery again"):
        deploy.Recognizer(tmp_path / "export")
    with pytest.raises(ConfigError, match="holds no index of an exported model"):
        deploy.Recognizer(tmp_path)
    with pytest.raises(DataError, match=r"the image .*missing\.png is not there"):
        deploy.Recognizer(folder).identify(tmp_path / "missing.png")


# ---- damage, and what is passed on -----------------------------------------------------------------------------------


def test_a_bit_that_turns_over_in_any_file_is_a_sentence_with_its_name(folder, tmp_path):
    target, rng = tmp_path / "export", np.random.default_rng(0)
    shutil.copytree(folder, target)
    files = [file for file in target.rglob("*") if file.is_file() and file.name != "README.md"]
    assert len(files) == 12
    for file in files:
        whole = file.read_bytes()
        for place in rng.integers(0, 8 * len(whole), 6).tolist():
            damaged = bytearray(whole)
            damaged[place // 8] ^= 1 << place % 8
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match=file.name) as error:
                deploy.Recognizer(target)
            assert "\n" not in str(error.value)
        file.unlink()
        with pytest.raises(ValueError, match=file.parent.name if file.parent != target else file.name):
            deploy.Recognizer(target)
        file.write_bytes(whole)
    (target / "README.md").write_text("filled in")
    assert deploy.Recognizer(target).curve


def test_the_checksums_are_those_of_sha256sum(folder):
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and "model.onnx: OK" in done.stdout and "index/items.csv: OK" in done.stdout


@pytest.mark.parametrize(
    "change, message",
    [
        ({"threshold": None}, "threshold: None is not between -1 and 1"),
        ({"threshold": "0.5"}, "threshold: '0.5' is not between"),
        ({"threshold": 2}, "threshold: 2 is not between"),
        ({"threshold": float("nan")}, "threshold: nan is not between"),
        ({"probability": {"score": 1.0, "margin": 0.0, "local": 0.0, "bias": float("inf")}}, "not the four numbers"),
        ({"probability": {"score": 1.0, "margin": 0.0, "bias": 0.0}}, "not the four numbers"),
        ({"image_root": None}, "image_root is None and not a folder"),
    ],
)
def test_an_index_that_cannot_be_true_is_refused(change, message, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "export")
    index = Index.load(tmp_path / "export" / "index")
    index.info |= change
    index.save(tmp_path / "export" / "index")
    with pytest.raises(ConfigError, match=rf"index\.json: .*{message}"):
        deploy.Recognizer(tmp_path / "export")


def test_an_index_of_other_vectors_or_without_names_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "export")
    whole = Index.load(folder / "index")
    narrow = Index(model=whole.model, info=whole.info).add(np.eye(8, dtype=np.float32), label=["a"] * 8, path=["b"] * 8)
    narrow.save(tmp_path / "export" / "index")
    with pytest.raises(ValueError, match="holds vectors of 8 dimensions, not 16"):
        deploy.Recognizer(tmp_path / "export")
    Index(model=whole.model, info=whole.info).add(np.eye(16, dtype=np.float32), path=["b"] * 16).save(
        tmp_path / "export" / "index"
    )
    with pytest.raises(ConfigError, match="the column label is not a text for each item"):
        deploy.Recognizer(tmp_path / "export")


def test_pictures_and_models_that_break_are_one_sentence(folder, tmp_path):
    recognizer = deploy.Recognizer(folder)
    (tmp_path / "text.jpg").write_text("no picture")
    Image.new("RGB", (64, 64)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    size = struct.pack(">II", 65535, 65535)
    small = io.BytesIO()
    Image.new("RGB", (4, 4)).save(small, "PNG")
    bomb = bytearray(small.getvalue())
    bomb[16:24] = size
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    (tmp_path / "bomb.png").write_bytes(bomb)
    for name, message in (
        ("text.jpg", "no known image format"),
        ("cut.png", "cannot be decoded"),
        ("bomb.png", "has more pixels than is safe to decode"),
        ("", "is a folder"),
    ):
        with pytest.raises(DataError, match=message) as error:
            recognizer.identify(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="9,000 x 9,000 pixels, and 64,000,000 are allowed"):
        example.prepare(Image.new("1", (9_000, 9_000)), [])
    for picture in (Image.new("F", (4, 4)), np.zeros((4, 4), np.float32)):
        with pytest.raises(DataError, match="the picture cannot be decoded"):
            recognizer.identify(picture)
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ConfigError, match=r"model\.onnx: is no model that can be run: .*; export it again"):
        graph.open_model(tmp_path / "model.onnx")


def test_the_example_ends_in_one_sentence(folder, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "model.onnx").write_bytes(b"no model")
    for words in (
        [],
        [tmp_path / "text.jpg"],
        [tmp_path / "absent.jpg"],
        [tmp_path / "text.jpg", tmp_path / "model.onnx"],
    ):
        done = subprocess.run(
            [sys.executable, folder / "example.py", *words], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 1 and "Traceback" not in done.stderr and done.stdout == ""
        assert all(str(word) in done.stderr for word in words[-1:])
        assert not words or len(done.stderr.splitlines()) == 1


def parts_of(file: Path) -> dict[str, bytes]:
    """What a file holds, unpacked where it is an archive."""
    if file.suffix != ".pt2":
        return {file.name: file.read_bytes()}
    with zipfile.ZipFile(file) as archive:
        return {f"{file.name}/{name}": archive.read(name) for name in archive.namelist()}


def test_no_file_tells_of_the_machine_that_made_it(folder, drawn):
    places = [str(place).encode() for place in (ROOT, drawn, folder.parent.parent, sys.prefix, Path.home())]
    told = [
        f"{name}: {place.decode()}"
        for file in folder.rglob("*")
        if file.is_file()
        for name, content in parts_of(file).items()
        for place in [*places, b"site-packages", b"stack_trace", b"Traceback", b"def forward", b"torchvision/"]
        if place in content and not (name == "example.py" and place == b"Traceback")
    ]
    assert told == []


def test_cells_that_a_spreadsheet_would_run_are_harmless():
    texts = ["=cmd()", "+1", "-1", "@a", "\ta", "a=b", "plain"]
    assert [*map(harmless, texts)] == ["'=cmd()", "'+1", "'-1", "'@a", "'\ta", "a=b", "plain"]


def test_the_root_of_the_images_is_told_as_little_as_can_be(tmp_path):
    home = Path.home()
    assert (
        indexing.from_here(tmp_path / "data" / "images", tmp_path / "runs" / "x" / "export") == "../../../data/images"
    )
    assert indexing.from_here(home / "photos", Path("/") / "elsewhere" / "export") == ""
    assert indexing.from_here(home / "a" / "photos", home / "b" / "export") == "../../a/photos"


def test_publishing_takes_nothing_that_it_did_not_make(tmp_path, monkeypatch):
    target = tmp_path / "photos"
    for name in ("photos.part", "photos.draft", ".photos.1.draft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    for end in ("failed", "previous"):
        (tmp_path / f"photos.{end}").mkdir()
        (tmp_path / f"photos.{end}" / "parity.json").write_text("mine")
        with pytest.raises(ConfigError, match=rf"photos\.{end}: is in the way .* not put there by one; rename it"):
            with export.published(target):
                pass
        shutil.rmtree(tmp_path / f"photos.{end}")
    for turn in range(3):
        with export.published(target) as part:
            (part / "parity.json").write_text(str(turn))
    assert (target / "parity.json").read_text() == "2"
    assert (tmp_path / "photos.previous" / "parity.json").read_text() == "1"
    (tmp_path / "photos.previous" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds notes\.txt, which no export has made"):
        with export.published(target):
            pass
    assert sorted(path.name for path in tmp_path.rglob("*.txt")) == ["mine.txt"] * 3 + ["notes.txt"]


def test_notebooks_in_an_export_stay_and_outlive_a_publishing_that_fails(tmp_path, monkeypatch):
    target, previous = tmp_path / "photos", tmp_path / "photos.previous"
    target.mkdir()
    (target / "mine.ipynb").write_text("mine")

    def full(*_):
        raise OSError(28, "No space left on device")

    for turn in range(2):
        with monkeypatch.context() as disk, pytest.raises(OSError, match="No space left"):
            disk.setattr(export, "put_aside", full)
            with export.published(target):
                pass
        assert (target / "mine.ipynb").read_text() == "mine"
        with export.published(target) as part:
            (part / "parity.json").write_text("{}")
        assert (target / "mine.ipynb").read_text() == "mine"
        assert previous.exists() is bool(turn) and not (previous / "mine.ipynb").exists()


def test_what_a_killed_export_left_goes_with_the_next(tmp_path, monkeypatch):
    target = tmp_path / "photos"
    for process, name in ((2**22 + 1, "dead"), (os.getpid(), "alive")):
        draft = tmp_path / f".photos.{name}.draft"
        (draft / "photos").mkdir(parents=True)
        (draft / export.MARK).write_text(f"process {process} on {platform.node()}")
    with export.published(target) as part:
        (part / "parity.json").write_text("{}")
        assert len(list(tmp_path.glob(".photos.*.draft"))) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [".photos.alive.draft", "photos"]


# ---- slower ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_logits_get_labels_and_no_index(run, tmp_path):
    target = export.export_model(run, folder=tmp_path / "out", infer_output_key="logits", infer_add_softmax=True)
    model = example.Model(target / "model.onnx")
    assert model(Image.open(run.query.paths[0])).sum() == pytest.approx(1, abs=1e-5)
    assert len(model.meta["output"]["labels"]) == 15 and not (target / "index").exists()
    assert "probabilities" in (target / "README.md").read_text()


@pytest.mark.slow
def test_dot_products_keep_their_lengths(run, tmp_path):
    cfg = {**run.cfg, "Global": {**run.cfg["Global"], "feature_normalize": False}}
    target = export.export_model(replace(run, cfg=cfg), ["onnx", "fp16"], tmp_path / "out", dynamic_size=True)
    recognizer = deploy.Recognizer(target)
    assert recognizer.index.distance == "dot" and not recognizer.model.meta["output"]["normalised"]
    vector = recognizer.embed(run.gallery.paths[0])
    assert vector == pytest.approx(run.gallery_features[0], abs=1e-3)
    half = json.loads((target / "parity.json").read_text())["model_parity"]["model_fp16.onnx"]["batch_1"]
    assert 0.999 < half["cosine_least"] < 1
    pixels = np.random.default_rng(0).integers(0, 256, (2, 48, 40, 3)).astype(np.uint8)
    mean, std = ([255 * x for x in recognizer.model.meta["inside"][key]] for key in ("mean", "std"))
    graph = inference.Inference(run.model(), "features", mean, std, normalize=False)
    assert recognizer.model.session.run(None, {"image": pixels})[0] == pytest.approx(
        graph(torch.from_numpy(pixels)).numpy(), abs=1e-3
    )


@pytest.mark.slow
def test_a_transformer_refuses_sizes_that_vary(caplog):
    model = RecModel(create_backbone("vit_tiny_patch16_224", stop="blocks.0", input_size=(3, 64, 64)))
    graph = inference.Inference(model, "backbone", [120.0] * 3, [60.0] * 3, normalize=False)
    with pytest.raises(ConfigError, match="with sizes that vary, so leave dynamic_size out"):
        inference.traced(graph, (64, 64), dynamic_size=True)
    assert [record for record in caplog.records if record.levelname != "DEBUG"] == []


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["middle", "flatten"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_exports_at_a_middle_layer_and_at_the_pool(name, stop, tmp_path):
    size = FAMILIES[name]
    layers = timm.create_model(name).feature_info
    layers = layers if isinstance(layers, list) else layers.info
    layer = stop if stop == "flatten" else layers[len(layers) // 2 - 1]["module"]
    model = RecModel(create_backbone(name, stop=layer, input_size=(3, size, size))).eval()
    graph = inference.Inference(model, "backbone", [120.0] * 3, [60.0] * 3, normalize=stop == "flatten")
    program = inference.traced(graph, (size, size))
    inference.write_onnx(program, tmp_path / "model.onnx", {"output": {"name": "backbone"}})
    torch.export.save(program, tmp_path / "model.pt2")
    pixels = torch.randint(0, 256, (5, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = model((pixels.float().permute(0, 3, 1, 2) - 120) / 60)["backbone"]
        given = [
            torch.export.load(tmp_path / "model.pt2").module()(pixels).numpy(),
            onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"image": pixels.numpy()})[0],
        ]
    wanted = nn.functional.normalize(wanted) if stop == "flatten" else wanted
    for values in given:
        assert values.shape == wanted.shape
        assert min(cosine(a.ravel(), b.ravel()) for a, b in zip(values, wanted.numpy(), strict=True)) > 0.9999
