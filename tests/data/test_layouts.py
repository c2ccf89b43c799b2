"""Data sets are read as they are distributed: identities, cameras and boxes from names and files beside the images."""

import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image
from scipy.io import savemat
from torchvision.transforms.v2.functional import pil_to_tensor

from recnb.data.images import DataError
from recnb.data.layouts import (
    MSMT17,
    SETS,
    Cifar10,
    Cifar100,
    CompCars,
    DukeMTMC,
    ICartoonDataset,
    LogoDataset,
    Market1501,
    Torchvision,
)
from recnb.data.lists import DATASETS, check_images, positives
from recnb.gallery.pictures import read_picture
from recnb.registry import ConfigError

SHARED = Path(__file__).parents[3] / "shared"
MARKET = Path("market1501/Market-1501-v15.09.15")


def picture(path: Path, size=(40, 30), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), np.uint8)).save(path)
    return path


def names_of(images) -> list[str]:
    return [Path(path).name for path in images.paths]


# --- Persons ----------------------------------------------------------------------------------------------------------


def called(images) -> list[str]:
    """What the identity of each image is called."""
    return images.names[images.labels].tolist()


@pytest.fixture
def market(tmp_path):
    folders = {
        "bounding_box_train": [
            "0007_c3s1_000451_03.jpg",
            "0002_c1s1_000451_03.jpg",
            "0002_c6s2_000801_01.jpg",
            "Thumbs.db",
        ],
        "query": ["0001_c1s1_001051_00.jpg"],
        "bounding_box_test": [
            "-1_c1s1_000401_03.jpg",
            "0000_c2s1_000151_01.jpg",
            "0001_c1s1_002301_02.jpg",
            "0001_c4s6_001501_02.jpg",
        ],
    }
    for folder, names in folders.items():
        for name in names:
            if name.endswith(".jpg"):
                picture(tmp_path / MARKET / folder / name)
            else:
                (tmp_path / MARKET / folder / name).write_text("")
    return tmp_path


def test_persons_and_cameras_are_parsed_from_names(market):
    images = Market1501(str(market), "bounding_box_train", backend="pil")
    assert names_of(images) == ["0002_c1s1_000451_03.jpg", "0002_c6s2_000801_01.jpg", "0007_c3s1_000451_03.jpg"]
    assert called(images) == ["0002", "0002", "0007"]
    assert images.cameras.tolist() == [1, 6, 3] and images.cameras.dtype == np.int64


def test_junk_is_left_out_and_distractors_stay(market):
    gallery, query = (Market1501(str(market), part) for part in ("bounding_box_test", "query"))
    assert list(zip(called(gallery), gallery.cameras.tolist(), strict=True)) == [("0000", 2), ("0001", 1), ("0001", 4)]
    assert positives(query, gallery).tolist() == [1]


@pytest.mark.parametrize("root", [".", "market1501", MARKET])
def test_where_the_folders_may_be(market, root):
    assert len(Market1501(str(market / root), "query")) == 1


def test_folders_that_are_nowhere_or_twice(market):
    with pytest.raises(
        DataError,
        match=re.escape(
            f"cls_label_path: there is neither {market}/train nor "
            f"{market}/{MARKET.name}/train; image_root is {MARKET.name}, or a"
        ),
    ):
        Market1501(str(market), "train")
    picture(market / "copy" / MARKET.name / "query" / "0001_c1s1_001051_00.jpg")
    with pytest.raises(DataError, match=r"cls_label_path: there is both .*copy/.*/query and .*market1501/.*/query; "):
        Market1501(str(market), "query")


@pytest.mark.parametrize("name", ["person.jpg", "0002c1s1.jpg", "-2_c1s1_000401_03.jpg", "0002_s1.jpg"])
def test_a_name_that_is_no_person(market, name):
    file = picture(market / MARKET / "query" / name)
    with pytest.raises(DataError, match=f"^{re.escape(str(file))}: the name does not begin with a person and a camera"):
        Market1501(str(market), "query")


def test_a_folder_of_junk_alone(tmp_path):
    picture(tmp_path / "query" / "-1_c1s1_000401_03.jpg")
    with pytest.raises(DataError, match=f"^{tmp_path}/query: holds no images of persons"):
        Market1501(str(tmp_path), "query")


def test_names_of_duke(tmp_path):
    for name in ("0005_c2_f0046985.jpg", "0005_c8_f0051341.jpg", "0012_c10_f0051341.jpg"):
        picture(tmp_path / "dukemtmc" / "DukeMTMC-reID" / "query" / name)
    images = DukeMTMC(str(tmp_path), "query")
    assert called(images) == ["0005", "0005", "0012"] and images.cameras.tolist() == [2, 8, 10]


MSMT = {"train": "0000/0000_000_01_0303morning_0008_0.jpg", "test": "0003/0003_007_15_0303noon_0008_0.jpg"}


@pytest.mark.parametrize(("prefix", "suffix"), [("", ""), ("mask_", "_v2")])
@pytest.mark.parametrize(
    ("name", "part"), [("list_train", "train"), ("list_val", "train"), ("list_query", "test"), ("list_gallery", "test")]
)
def test_lists_of_msmt(tmp_path, name, part, prefix, suffix):
    file = picture(tmp_path / f"{prefix}{part}{suffix}" / MSMT[part])
    (tmp_path / f"{name}.txt").write_text(f"{MSMT[part]} {int(MSMT[part][:4])}\n")
    images = MSMT17(str(tmp_path), f"{name}.txt")
    assert images.paths == [str(file)]
    assert (called(images), images.cameras.tolist()) == ([MSMT[part][:4]], [int(MSMT[part][14:16])])
    check_images(images)


def test_a_file_of_msmt_without_a_camera(tmp_path):
    (tmp_path / "list_train.txt").write_text(f"{MSMT['train']} 0\n0000/0000_morning.jpg 0\n")
    with pytest.raises(DataError, match=rf"^{tmp_path}/list_train\.txt line 2: the third number of a file's name"):
        MSMT17(str(tmp_path), "list_train.txt")


def test_folders_of_msmt_are_named_as_those_of_market(tmp_path):
    picture(tmp_path / "msmt17" / "MSMT17_V1" / "query" / "0004_c12_0001.jpg")
    images = MSMT17(str(tmp_path), "query")
    assert (called(images), images.cameras.tolist()) == (["0004"], [12])


# --- Vehicles, faces, logos -------------------------------------------------------------------------------------------


@pytest.fixture
def cars(tmp_path):
    for number, box in enumerate(("5 6 35 26", "0 0 40 30", "39 29 40 30")):
        picture(tmp_path / "image" / f"78/{number}.png", seed=number)
        (tmp_path / "label" / "78").mkdir(parents=True, exist_ok=True)
        (tmp_path / "label" / f"78/{number}.txt").write_text(f"4\n1\n{box}\n")
    (tmp_path / "train.txt").write_text("78/0.png 3\n78/1.png 0\n78/2.png 0\n")
    return {
        "image_root": str(tmp_path / "image"),
        "cls_label_path": str(tmp_path / "train.txt"),
        "label_root": str(tmp_path / "label"),
    }


def test_cars_are_cropped_to_their_boxes(cars):
    whole, cropped = CompCars(**cars), CompCars(**cars, bbox_crop=True)
    assert whole.boxes is None and whole.image(0).shape == (3, 30, 40)
    assert cropped.labels.tolist() == [3, 0, 0]
    assert torch.equal(cropped.image(0), whole.image(0)[:, 6:26, 5:35])
    assert torch.equal(cropped[1][0], whole.image(1))
    assert torch.equal(cropped[2][0], whole.image(2)[:, -1:, -1:])
    check_images(cropped)
    shown = read_picture(cropped.pictures[0], 100)
    assert cropped.pictures == cropped.paths and whole.pictures is whole.paths
    assert torch.equal(pil_to_tensor(shown), cropped.image(0))


def test_a_box_is_one_of_the_upright_photograph(cars, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right: 30 wide, 40 high
    path = tmp_path / "image" / "78/0.png"
    Image.open(path).save(path, exif=exif)
    (tmp_path / "label" / "78/0.txt").write_text("4\n1\n0 30 30 40\n")
    images = CompCars(**cars, bbox_crop=True)
    check_images(images)
    assert torch.equal(images.image(0), CompCars(**cars).image(0)[:, 30:40])


@pytest.mark.parametrize("box", ["5 6 41 26", "5 6 35 31", "35 6 5 26", "5 6 5 26"])
def test_a_box_that_is_not_in_its_image(cars, tmp_path, box):
    (tmp_path / "label" / "78/1.txt").write_text(f"4\n1\n{box}\n")
    images, message = CompCars(**cars, bbox_crop=True), f"the box {box} is not within the 40 x 30 pixels of the image"
    with pytest.raises(DataError, match=rf"{tmp_path}/train\.txt line 2: the image .*78/1\.png cannot .*: {message}$"):
        check_images(images)
    with pytest.raises(DataError, match=rf"train\.txt line 2: .*78/1\.png cannot be decoded: {message}$"):
        images.image(1)


@pytest.mark.parametrize(
    "text", ["4\n1\n5 6 35\n", "4\n1\n", "4\n1\n5 6 35 b\n", "4\n1\n5 6 -35 8\n", "4\n1\n\n5 6 35 8"]
)
def test_a_box_file_without_a_box(cars, tmp_path, text):
    (tmp_path / "label" / "78/1.txt").write_text(text)
    with pytest.raises(DataError, match=rf"^{tmp_path}/label/78/1\.txt line 3: '.*' is not a box; it is four whole"):
        CompCars(**cars, bbox_crop=True)


def test_boxes_that_are_not_there(cars, tmp_path):
    (tmp_path / "label" / "78/1.txt").unlink()
    with pytest.raises(DataError, match=rf"^{tmp_path}/train\.txt line 2: the file with its box, .*78/1\.txt, cannot"):
        CompCars(**cars, bbox_crop=True)
    cars.pop("label_root")
    with pytest.raises(ValueError, match="bbox_crop needs label_root"):
        CompCars(**cars, bbox_crop=True)
    assert len(CompCars(**cars)) == 3


def test_a_list_of_cartoon_faces(tmp_path):
    (tmp_path / "list.txt").write_text("a face/1.jpg\t3\nb/2.jpg\t0\n")
    images = ICartoonDataset("/images", str(tmp_path / "list.txt"))
    assert (images.paths, images.labels.tolist()) == (["/images/a face/1.jpg", "/images/b/2.jpg"], [3, 0])
    (tmp_path / "list.txt").write_text("a.jpg\t3\nb.jpg 0\n")
    with pytest.raises(DataError, match=r"list\.txt line 2: 1 columns, not 2 as on the lines before"):
        ICartoonDataset("/images", str(tmp_path / "list.txt"))


def logos(tmp_path, *rows: str):
    (tmp_path / "logos.txt").write_text("\n".join(["image_id\tclass_id\tsuper_class\tpath", *rows]))
    return LogoDataset("/logos", str(tmp_path / "logos.txt"))


def test_labels_of_logos_count_from_one(tmp_path):
    images = logos(tmp_path, "1\t1\t5\tfood/a b.jpg", "", "2\t12\t5\tfood/c.jpg")
    assert images.paths == ["/logos/food/a b.jpg", "/logos/food/c.jpg"]
    assert images.labels.tolist() == [0, 11]
    assert images.place(1) == f"{tmp_path}/logos.txt line 4"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["1\t0\t5\ta.jpg"], " line 2: the label is 0, and labels of this table count from 1"),
        (["1\tx\t5\ta.jpg"], " line 2: 'x' is not a label"),
        ([], ": the list is empty"),
        (["1\t2\t5\ta.jpg", "1 2 5 a.jpg"], " line 3: 1 columns between tabs, not 4 "),
    ],
)
def test_tables_of_logos_that_cannot_be_meant(tmp_path, rows, message):
    with pytest.raises(DataError, match=f"^{tmp_path}/logos.txt{re.escape(message)}"):
        logos(tmp_path, *rows)


# --- Torchvision's sets -----------------------------------------------------------------------------------------------


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """CIFAR-10 of 4 images a file and CIFAR-100 of 6, as their archives are unpacked."""
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    rng, folder = np.random.default_rng(0), tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for part, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        content = {"data": rng.integers(0, 255, (4, 3072), np.uint8), "labels": [part, 9, 9, 0]}
        (folder / name).write_bytes(pickle.dumps(content))
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test"):
        content = {"data": rng.integers(0, 255, (6, 3072), np.uint8), "fine_labels": [99, 98, 97, 1, 0, 0]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {i:03d}" for i in range(100)]}))
    return tmp_path


def test_pixels_and_classes_of_cifar(cifar):
    images, original = Cifar10(str(cifar)), torchvision.datasets.CIFAR10(cifar, train=True)
    assert len(images) == 20 and len(Cifar10(str(cifar), mode="test")) == 4
    assert sorted(called(images)) == sorted(original.classes[label] for label in original.targets)
    for i, path in enumerate(images.paths):
        number = int(Path(path).stem)
        assert path == str(cifar / "recnb_png/CIFAR10/train" / images.name(images.labels[i]) / f"{number:05d}.png")
        assert torch.equal(images.image(i), torch.from_numpy(original.data[number]).permute(2, 0, 1))
    check_images(images)


def test_files_are_written_once_and_whole(cifar, monkeypatch):
    folder = cifar / "recnb_png" / "CIFAR100"

    def broken(self, path):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", broken)
        with pytest.raises(DataError, match=f"image_root: the images of the set cannot be written to {folder}/train: "):
            Cifar100(str(cifar))
    assert list(folder.iterdir()) == []
    first = Cifar100(str(cifar))
    monkeypatch.setattr(Image.Image, "save", broken)
    again = Cifar100(str(cifar))
    assert again.paths == first.paths and len(first) == 6
    assert [path.name for path in folder.iterdir()] == ["train"]


def test_classes_are_divided_and_not_shared(cifar):
    train, test = (Torchvision(str(cifar), "CIFAR100", part) for part in ("train", "test"))
    assert train.names.tolist() == ["class 000", "class 001"]  # five classes occur, two are their half
    assert test.names.tolist() == ["class 097", "class 098", "class 099"]
    assert len(train) == 6 and len(test) == 6
    assert len(Torchvision(str(cifar), "CIFAR100", "train", 0.8, "test")) == 5
    assert DATASETS["CIFAR100"](str(cifar), "test").paths == test.paths


def aircraft(root: Path) -> Path:
    data = root / "fgvc-aircraft-2013b" / "data"
    variants = ["Boeing 707", "A300", "Il-76", "Concorde"]  # numbered in this order, which is not sorted
    rows = {"trainval": [("01", 3), ("02", 0), ("03", 1)], "test": [("04", 2), ("05", 0)]}
    for part, images in rows.items():
        for name, _ in images:
            picture(data / "images" / f"{name}.jpg")
        (data / f"images_variant_{part}.txt").write_text("".join(f"{n} {variants[label]}\n" for n, label in images))
    (data / "variants.txt").write_text("\n".join(variants) + "\n")
    return data / "images"


def test_files_that_a_set_keeps_stay_where_they_are(tmp_path):
    folder = aircraft(tmp_path)
    train, test = (Torchvision(str(tmp_path), "FGVCAircraft", part) for part in ("train", "test"))
    found = [list(zip(names_of(images), called(images), strict=True)) for images in (train, test)]
    assert found == [
        [("02.jpg", "Boeing 707"), ("03.jpg", "A300"), ("05.jpg", "Boeing 707")],
        [("01.jpg", "Concorde"), ("04.jpg", "Il-76")],
    ]
    assert train.paths[0] == str(folder / "02.jpg") and not (tmp_path / "recnb_png").exists()
    assert names_of(Torchvision(str(tmp_path), "FGVCAircraft", "test", 0, "trainval")) == ["02.jpg", "03.jpg", "01.jpg"]


def test_paths_are_taken_where_only_the_set_knows_them(tmp_path):
    data = tmp_path / "oxford-iiit-pet"
    (data / "annotations").mkdir(parents=True)
    for part, names in (("trainval", ["pug_1 2 2 1", "Bengal_7 1 1 1"]), ("test", ["pug_2 2 2 1", "Bengal_9 1 1 1"])):
        for name in names:
            picture(data / "images" / f"{name.split()[0]}.jpg")
        (data / "annotations" / f"{part}.txt").write_text("\n".join(names) + "\n")
    images = Torchvision(str(tmp_path), "OxfordIIITPet", train_share=1)
    assert images.paths == [str(data / "images" / f"{name}.jpg") for name in ("Bengal_7", "pug_1", "Bengal_9", "pug_2")]
    assert called(images) == ["Bengal", "Pug", "Bengal", "Pug"] and not (tmp_path / "recnb_png").exists()


def test_all_flowers_of_a_class_are_on_one_side(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.flowers102, "check_integrity", lambda *_: True)
    data = tmp_path / "flowers-102"
    for number in range(1, 7):
        picture(data / "jpg" / f"image_{number:05d}.jpg")
    savemat(data / "imagelabels.mat", {"labels": [[1, 1, 2, 2, 3, 4]]})
    savemat(data / "setid.mat", {"trnid": [[1, 3]], "valid": [[5, 6]], "tstid": [[2, 4]]})
    found = [sorted(names_of(Torchvision(str(tmp_path), "Flowers102", part))) for part in ("train", "test")]
    assert found == [[f"image_{i:05d}.jpg" for i in numbers] for numbers in ((1, 2, 3, 4), (5, 6))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"part": "val"}, ".part: 'val' is not supported; there is test, train"),
        ({"train_share": 1.5}, ".train_share: 1.5 is too large; the most is 1"),
        (
            {"set": "FGVCAircrafts"},
            ": set: torchvision has no 'FGVCAircrafts' of one label an image; did you mean 'FGVCAirc",
        ),
        (
            {"set": "CocoDetection"},
            ": set: torchvision has no 'CocoDetection' of one label an image; there is CIFAR10, CIFA",
        ),
        ({"split": "val"}, ": split: FGVCAircraft has no 'val'; there is test, trainval"),
    ],
)
def test_arguments_that_choose_nothing(tmp_path, changes, message):
    section = {"name": "Torchvision", "set": "FGVCAircraft", "image_root": str(tmp_path), **changes}
    with pytest.raises(ConfigError, match=f"^here{re.escape(message)}"):
        DATASETS.build(section, "here")


def test_sets_that_are_not_there_or_leave_nothing(tmp_path):
    with pytest.raises(DataError, match=f"image_root: torchvision does not find FGVCAircraft in {tmp_path}: Data"):
        Torchvision(str(tmp_path), "FGVCAircraft")
    aircraft(tmp_path)
    with pytest.raises(DataError, match=r"train_share: 1\.0 of 4 classes leaves none for the part test"):
        Torchvision(str(tmp_path), "FGVCAircraft", "test", 1.0)


@pytest.mark.parametrize("name", SETS)
def test_every_set_is_one_of_torchvisions_and_known_by_its_name(tmp_path, name):
    for split in SETS[name] or [None]:
        section = {"name": name, "image_root": str(tmp_path), **({"split": split} if split else {})}
        with pytest.raises(DataError, match=f"torchvision does not find {name} in {tmp_path}"):
            DATASETS.build(section, "here")


def test_a_misspelt_argument_of_a_set():
    with pytest.raises(ConfigError, match=r"here\.trainshare: Omniglot has no such .* did you mean 'train_share'"):
        DATASETS.check({"name": "Omniglot", "image_root": "/", "trainshare": 0.5}, "here")


def test_characters_of_omniglot(tmp_path, monkeypatch):
    archive = SHARED / "data" / "omniglot" / "images_background.zip"
    if not archive.is_file():
        pytest.skip(f"{archive} is not here")
    monkeypatch.setattr(torchvision.datasets.Omniglot, "_check_integrity", lambda _: True)
    root = tmp_path / "omniglot-py"
    with zipfile.ZipFile(archive) as file:
        file.extractall(root, [name for name in file.namelist() if name.split("/")[1] in ("Greek", "Latin")])
    (root / "images_evaluation").mkdir()
    (root / "images_background" / "Greek").rename(root / "images_evaluation" / "Greek")
    images = Torchvision(str(tmp_path), "Omniglot", train_share=1.0)
    names = list(dict.fromkeys(called(images)))
    assert names == [
        f"{alphabet}/character{number:02d}"
        for alphabet, count in (("Latin", 26), ("Greek", 24))
        for number in range(1, count + 1)
    ]
    assert len(images) == 20 * len(names) and images.image(0).shape == (3, 105, 105)
    parts = [Torchvision(str(tmp_path), "Omniglot", part, 0.52) for part in ("train", "test")]
    assert [part.names.tolist() for part in parts] == [names[:26], sorted(names[26:])]
    official = Torchvision(str(tmp_path), "Omniglot", "test", 0, "evaluation")
    assert official.paths == parts[1].paths == sorted(map(str, root.glob("images_evaluation/*/*/*.png")))
