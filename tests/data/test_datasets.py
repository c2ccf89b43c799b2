"""Lists and folders become tables with the right labels, pictures of any kind become RGB, and no mistake passes."""

import csv
import re

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from recnb import build_loaders, build_model, load_config
from recnb.data.images import DataError
from recnb.data.layouts import ImageFolder
from recnb.data.lists import (
    ImageList,
    ImageNetDataset,
    VeriWild,
    check_images,
    drop_repeated,
    own_index,
    positives,
    read_csv,
    save_dropped,
    save_label_map,
    write_csv,
)
from recnb.recipe.data import evaluation_images, training_images
from recnb.recipe.lint import seen
from recnb.recipe.resolved import resolved
from recnb.recipe.schema import lookup
from recnb.registry import ConfigError

TRAIN = "DataLoader.Train.dataset"


def picture(path, colour=(200, 100, 50), size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def listed(tmp_path, text: str | bytes, name: str = "list.txt"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def table(paths, labels, cameras=None) -> ImageList:
    return ImageList(list(map(str, paths)), np.array(labels), None if cameras is None else np.array(cameras))


# --- List files -------------------------------------------------------------------------------------------------------


def test_a_list_of_paths_and_labels(tmp_path):
    images = VeriWild("/images", str(listed(tmp_path, "a/1.jpg 3\nb/2.jpg\t12\n  c/3.jpg   0  \n")))
    assert images.paths == ["/images/a/1.jpg", "/images/b/2.jpg", "/images/c/3.jpg"]
    assert images.labels.tolist() == [3, 12, 0] and images.labels.dtype == np.int64
    assert images.cameras is None
    assert len(images) == 3


def test_a_list_with_cameras(tmp_path):
    images = VeriWild("/images", str(listed(tmp_path, "1.jpg 3 0\n2.jpg 3 2\n")))
    assert images.cameras.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("my cat 1.jpg 4\n", {}),
        ("my cat 1.jpg\t4\n", {"delimiter": "\t"}),
        ("my cat 1.jpg 4\n", {"delimiter": None}),
        ("my cat 1.jpg,4\n", {"delimiter": ","}),
        ("my cat 1.jpg, 4\n", {"delimiter": ","}),
    ],
)
def test_paths_with_spaces(tmp_path, text, arguments):
    images = ImageNetDataset("/images", str(listed(tmp_path, text)), **arguments)
    assert (images.paths, images.labels.tolist()) == (["/images/my cat 1.jpg"], [4])


@pytest.mark.parametrize(
    ("text", "arguments", "names"),
    [
        ("a.jpg Pear\nb.jpg Äpfel\nc.jpg Pear\n", {}, ["Pear", "Äpfel", "Pear"]),
        ("a.jpg 7-Up 3\nb.jpg 100% 0\n", {}, ["7-Up", "100%"]),
        ("a.jpg 7\nb.jpg Pear\n", {"names": True}, ["7", "Pear"]),
        ("a.jpg 007\nb.jpg 7\n", {"names": True}, ["007", "7"]),
        ("my a.jpg\tRed, ripe\t3\nb.jpg\t洋葱 2\t0\n", {"delimiter": "\t"}, ["Red, ripe", "洋葱 2"]),
    ],
)
def test_labels_may_be_names(tmp_path, text, arguments, names):
    images = VeriWild("/images", str(listed(tmp_path, text)), **arguments)
    assert [images.name(label) for label in images.labels] == names and images.names.tolist() == sorted(set(names))
    assert images.labels.dtype == np.int64


def test_line_ends_blank_lines_and_other_scripts(tmp_path):
    text = b"\xef\xbb\xbf" + "车/红旗.jpg 1\r\n\r\n   \r\nnaïve/é.jpg 2".encode()
    images = VeriWild("/images", str(listed(tmp_path, text)))
    assert images.paths == ["/images/车/红旗.jpg", "/images/naïve/é.jpg"]
    assert [images.place(i) for i in range(2)] == [f"{tmp_path / 'list.txt'} line {n}" for n in (1, 4)]


def test_line_ends_of_old_macs(tmp_path):
    images = VeriWild("/images", str(listed(tmp_path, "a.jpg 1\rb.jpg 2\r")))
    assert images.paths == ["/images/a.jpg", "/images/b.jpg"] and images.lines.tolist() == [1, 2]


def test_text_that_cannot_be_decoded_far_down_a_list(tmp_path):
    path = listed(tmp_path, b"a.jpg 1\n" * 5000 + b"\n" + "车.jpg 2\n".encode("gbk") + b"a.jpg 1\n" * 5000)
    with pytest.raises(DataError, match=f"^{path} line 5002: is not UTF-8 text"):
        VeriWild("/images", str(path))


def test_absolute_paths_stay_where_they_are_allowed(tmp_path):
    path = str(listed(tmp_path, "/elsewhere/1.jpg 0\n"))
    assert VeriWild("/images", path, allow_outside=True).paths == ["/elsewhere/1.jpg"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": the list is empty"),
        ("\n  \n", ": the list is empty"),
        ("a.jpg 1\nb.jpg\n", " line 2: 1 columns, not 2 as on the lines before"),
        ("a.jpg 1 2 3\n", " line 1: 4 columns, not 2 or 3 "),
        ("a.jpg 1 0\n\nb.jpg 1\n", " line 3: 2 columns, not 3 as on the lines before"),
        ("a.jpg 1\nb.jpg one\n", " line 2: 'one' is not a label; labels and cameras are whole numbers from 0"),
        (
            "a.jpg 1\nb.jpg Pear\n",
            " line 2: 'Pear' is not a label; labels and cameras are whole numbers from 0, and labels",
        ),
        ("a.jpg Pear\nb.jpg 7\n", " line 2: the label '7' is a number, and those before it are names; correct it, or"),
        ("a.jpg ٣\n", " line 1: '٣' is not a label"),
        ("a.jpg 1_000\n", " line 1: '1_000' is not a label"),
        ("a.jpg +3\n", " line 1: '+3' is not a label"),
        ("a.jpg Pe\x07ar\n", r" line 1: 'Pe\x07ar' is no name, which is text without control signs"),
        ("a.jpg 1.5\n", " line 1: '1.5' is not a label"),
        ("a.jpg -1\n", " line 1: '-1' is not a label"),
        ("a.jpg 99999999999999999999\n", " line 1: '99999999999999999999' is not a label"),
        ("a.jpg 1 left\n", " line 1: 'left' is not a label; labels and cameras are whole numbers"),
        ("a.jpg 1\n车.jpg 2\n".encode("gbk"), " line 2: is not UTF-8 text"),
    ],
)
def test_lists_that_cannot_be_meant(tmp_path, text, message):
    path = listed(tmp_path, text)
    with pytest.raises(DataError, match=f"^{re.escape(str(path) + message)}"):
        VeriWild("/images", str(path))


def test_a_second_mark_of_byte_order_is_seen_in_the_path_that_it_spoils(tmp_path):
    picture(tmp_path / "a.png")
    images = VeriWild(str(tmp_path), str(listed(tmp_path, "\ufeff\ufeffa.png 3\n")))
    with pytest.raises(DataError, match=r"\\ufeffa\.png is not there"):
        check_images(images)


def test_a_root_that_is_a_loop_of_links_is_told_before_training(config_file, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    cfg = load_config(config_file({f"{TRAIN}.image_root": str(tmp_path / "loop")}))
    with pytest.raises(DataError, match=r"loop/.* Too many levels of symbolic links"):
        build_loaders(cfg)


def test_a_third_column_is_not_a_label_of_an_imagenet_list(tmp_path):
    path = listed(tmp_path, "a.jpg\n")
    with pytest.raises(DataError, match="line 1: 1 columns, not 2 "):
        ImageNetDataset("/images", str(path))


def test_a_list_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=f"cls_label_path: there is no file {tmp_path}/absent.txt"):
        VeriWild("/images", f"{tmp_path}/absent.txt")


def test_errors_name_the_section_of_the_file(config_file, tmp_path):
    path = listed(tmp_path, "a.jpg -1\n")
    cfg = load_config(config_file({f"{TRAIN}.cls_label_path": str(path)}))
    with pytest.raises(DataError, match=f"^{re.escape(f'{TRAIN}: {path} line 1: ')}"):
        build_loaders(cfg)


# --- Folders ----------------------------------------------------------------------------------------------------------


def test_one_folder_per_identity(tmp_path):
    for name in ("cat/1.jpg", "cat/more/2.PNG", "Ångström/3.jpeg", "dog/4.webp"):
        picture(tmp_path / name)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "loose.txt").write_text("no identity")
    images = ImageFolder(str(tmp_path))
    called = images.names[images.labels]
    assert sorted(zip((p.removeprefix(f"{tmp_path}/") for p in images.paths), called, strict=True)) == [
        ("cat/1.jpg", "cat"),
        ("cat/more/2.PNG", "cat"),
        ("dog/4.webp", "dog"),
        ("Ångström/3.jpeg", "Ångström"),
    ]


@pytest.mark.parametrize("files", [[], ["1.jpg"]])
def test_a_root_without_identities(tmp_path, files):
    for name in files:
        picture(tmp_path / name)
    with pytest.raises(DataError, match=f"image_root: {tmp_path} has no folders with images"):
        ImageFolder(str(tmp_path))


@pytest.fixture
def folders(config_file, tmp_path):
    """A configuration over folders in which query, gallery and training images share some identities only."""
    sets = {"Train": "abc", "Eval.Query": "bd", "Eval.Gallery": "abcd"}
    changes = {"Global.class_num": None}
    for part, identities in sets.items():
        for identity in identities:
            for n in range(3):
                picture(tmp_path / part / identity / f"{n}.png")
        changes[f"DataLoader.{part}.dataset"] = {
            "name": "ImageFolder",
            "image_root": str(tmp_path / part),
            "transform_ops": [{"ResizeImage": {"size": 32}}],
        }
    changes["DataLoader.Train.sampler.batch_size"] = 6
    return load_config(config_file(changes))


def test_folders_of_query_and_gallery_are_labelled_alike(folders):
    query, gallery = evaluation_images(folders)
    for images in (query, gallery):
        assert [images.names[label] for label in images.labels] == [p.split("/")[-2] for p in images.paths]
    assert query.names.tolist() == gallery.names.tolist() == ["a", "b", "c", "d"]
    assert query.labels.tolist() == [1, 1, 1, 3, 3, 3]


def test_folders_are_numbered_in_sorted_order(folders):
    images = training_images(folders)
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert images.names.tolist() == ["a", "b", "c"]


def test_loaders_over_folders(folders):
    loaders = build_loaders(folders)
    images, labels = next(iter(loaders.train))
    assert images.shape == (6, 3, 32, 32) and sorted(labels.tolist()) == [0, 0, 1, 1, 2, 2]
    assert [len(part.dataset) for part in (loaders.query, loaders.gallery)] == [6, 12]


# --- Labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("class_num", "relabel", "labels", "names"),
    [
        (None, None, [1, 0, 0, 2], [3, 7, 40]),
        (50, None, [7, 3, 3, 40], range(41)),
        (41, None, [7, 3, 3, 40], range(41)),
        (3, True, [1, 0, 0, 2], [3, 7, 40]),
        (None, False, [7, 3, 3, 40], range(41)),
    ],
)
def test_how_sparse_labels_are_numbered(config_file, tmp_path, class_num, relabel, labels, names):
    path = listed(tmp_path, "a.jpg 7\nb.jpg 3\nc.jpg 3\nd.jpg 40\n")
    changes = {f"{TRAIN}.cls_label_path": str(path), f"{TRAIN}.relabel": relabel, "Global.class_num": class_num}
    images = training_images(load_config(config_file(changes)))
    assert images.labels.tolist() == labels
    assert images.names.tolist() == list(names)


def test_the_labels_of_identities_are_saved(config_file, tmp_path):
    path = listed(tmp_path, "a.jpg 7\nb.jpg 3\nc.jpg 3\nd.jpg 40\n")
    save_label_map(
        training_images(load_config(config_file({f"{TRAIN}.cls_label_path": str(path)}))),
        tmp_path / "run" / "labels.csv",
    )
    assert (tmp_path / "run" / "labels.csv").read_text() == "label,name\n0,3\n1,7\n2,40\n"
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["labels.csv"]


def test_names_of_any_kind_are_saved(tmp_path):
    images = ImageList([], np.array([]), names=np.array(["a, b", 'the "c"', "车"]))
    save_label_map(images, tmp_path / "labels.csv")
    with (tmp_path / "labels.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [["label", "name"], ["0", "a, b"], ["1", 'the "c"'], ["2", "车"]]


@pytest.mark.parametrize(("label", "class_num", "relabel"), [(40, 40, None), (4 * 10**12, 40, None), (40, 2, True)])
def test_a_label_out_of_range(config_file, tmp_path, label, class_num, relabel):
    path = listed(tmp_path, f"a.jpg 7\nb.jpg 3\nd.jpg {label}\n")
    changes = {f"{TRAIN}.cls_label_path": str(path), f"{TRAIN}.relabel": relabel, "Global.class_num": class_num}
    message = (
        rf"^{path} line 3: label \d+ is out of range: Global.class_num is {class_num}, the list has 3 "
        f"identities up to {label}; correct Global.class_num or leave it out$"
    )
    with pytest.raises(DataError, match=message):
        training_images(load_config(config_file(changes)))


# --- Pictures ---------------------------------------------------------------------------------------------------------


def test_every_missing_or_unreadable_image_is_found_at_the_start(tmp_path):
    picture(tmp_path / "good.jpg")
    (tmp_path / "text.jpg").write_text("no image")
    path = listed(tmp_path, "good.jpg 0\nabsent.jpg 1\ntext.jpg 2\n")
    with pytest.raises(DataError) as error:
        check_images(VeriWild(str(tmp_path), str(path)))
    assert str(error.value) == (
        "2 of 3 images cannot be used; mend them, take them out of their lists, or leave them out with "
        f"Global.on_bad_image: drop\n{path} line 2: the image {tmp_path / 'absent.jpg'} is not there\n"
        f"{path} line 3: the image {tmp_path / 'text.jpg'} is empty or of no known image format"
    )


@pytest.mark.parametrize("part", ["Train", "Eval.Query", "Eval.Gallery"])
def test_loaders_check_the_images_of_every_part(config_file, drawn, tmp_path, part):
    name = part.split(".")[-1].lower()
    path = listed(tmp_path, (drawn / f"{name}.txt").read_text() + "absent.jpg 16 1\n")
    cfg = load_config(config_file({f"DataLoader.{part}.dataset.cls_label_path": str(path)}))
    with pytest.raises(DataError, match=r"list\.txt line \d+: the image .*absent\.jpg is not there"):
        build_loaders(cfg)


def test_a_truncated_image_is_an_error_and_never_another_image(tmp_path):
    whole = picture(tmp_path / "whole.jpg", size=(200, 200)).read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    images = VeriWild(str(tmp_path), str(listed(tmp_path, "whole.jpg 0\nhalf.jpg 0\n")))
    with pytest.raises(DataError, match=r"list\.txt line 2: the image .*half\.jpg cannot be decoded: "):
        list(torch.utils.data.DataLoader(images))


def test_the_rotation_of_a_photograph_is_applied(tmp_path):
    upright = Image.new("RGB", (20, 10), "red")
    upright.paste("blue", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    upright.save(tmp_path / "turned.png", exif=exif)
    image = table([tmp_path / "turned.png"], [0]).image(0)
    assert image.shape == (3, 20, 10)
    assert image[:, 2, 5].tolist() == [0, 0, 255] and image[:, 17, 5].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_pictures_of_any_mode_become_rgb(tmp_path, mode):
    grey = Image.linear_gradient("L").resize((16, 16))
    picture = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    picture.save(tmp_path / "picture.tif")
    with Image.open(tmp_path / "picture.tif") as stored:
        assert stored.mode == mode
    image = table([tmp_path / "picture.tif"], [0]).image(0)
    assert image.shape == (3, 16, 16) and image.dtype == torch.uint8
    assert (image.int() - torch.from_numpy(np.array(grey)).int()).abs().max() <= 2


def test_numbers_without_a_range_are_no_picture(tmp_path):
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "depth.tif")
    with pytest.raises(DataError, match=r"depth\.tif cannot be decoded: its pixels are of kind F, which have no known"):
        table([tmp_path / "depth.tif"], [0]).image(0)


def test_an_item_is_an_image_and_a_label(drawn):
    images = VeriWild(str(drawn / "images"), str(drawn / "train.txt"))
    image, label = images[7]
    assert image.shape == (3, 48, 48) and image.dtype == torch.uint8
    assert label == 1 and type(label) is int


# --- Query and gallery ------------------------------------------------------------------------------------------------


def test_an_images_own_place_in_the_gallery(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "here")
    query = table([tmp_path / "here/a.jpg", tmp_path / "here/b.jpg", tmp_path / "link/c.jpg"], [0, 0, 0])
    gallery = table([tmp_path / "here/c.jpg", tmp_path / "here/../here/a.jpg"], [0, 0])
    assert own_index(query, gallery).tolist() == [1, -1, 0]


def test_how_many_images_a_query_can_find():
    gallery = table(["a", "b", "c", "d"], [0, 0, 1, 1], [0, 1, 0, 0])
    query = table(["a", "e", "c", "f"], [0, 0, 1, 2], [0, 2, 0, 0])
    assert positives(query, gallery).tolist() == [1, 2, 0, 0]
    query.cameras = gallery.cameras = None
    assert positives(query, gallery).tolist() == [1, 2, 1, 0]


def test_a_photograph_of_two_identities_does_not_count_against_either():
    gallery, query = table(["both", "a"], [1, 0]), table(["both"], [0])
    assert positives(query, gallery).tolist() == [1]


def evaluated(config_file, tmp_path, query: str, gallery: str) -> dict:
    lists = {"Query": listed(tmp_path, query, "query.txt"), "Gallery": listed(tmp_path, gallery, "gallery.txt")}
    return load_config(
        config_file({f"DataLoader.Eval.{part}.dataset.cls_label_path": str(path) for part, path in lists.items()})
    )


def test_evaluation_lists_are_labelled_alike(config_file, tmp_path):
    query, gallery = evaluation_images(evaluated(config_file, tmp_path, "a.jpg 90\n", "b.jpg 7\nc.jpg 90\n"))
    assert (query.labels.tolist(), gallery.labels.tolist()) == ([1], [0, 1])
    assert query.names.tolist() == gallery.names.tolist() == [7, 90]


def test_a_name_has_one_number_in_all_lists(config_file, tmp_path):
    changes = {f"{TRAIN}.cls_label_path": str(listed(tmp_path, "a.jpg Pear\nb.jpg Leek\n", "train.txt"))}
    for part, text in {
        "Query": "c.jpg Apple\nd.jpg Pear\n",
        "Gallery": "e.jpg Apple\nf.jpg Zander\ng.jpg Pear\n",
    }.items():
        changes[f"DataLoader.Eval.{part}.dataset.cls_label_path"] = str(listed(tmp_path, text, f"{part}.txt"))
    cfg = load_config(config_file({"Global.class_num": None, **changes}))
    train = training_images(cfg)
    lists = [train, *evaluation_images(cfg, train.names)]
    assert [images.labels.tolist() for images in lists] == [[1, 0], [2, 1], [2, 3, 1]]
    assert lists[1].names.tolist() == lists[2].names.tolist() == ["Leek", "Pear", "Apple", "Zander"]


def test_numbers_in_one_list_and_names_in_the_other(config_file, tmp_path):
    with pytest.raises(DataError, match=r"query\.txt and of .*gallery\.txt are numbers in one and names in the other"):
        evaluation_images(evaluated(config_file, tmp_path, "a.jpg 1\n", "b.jpg Pear\n"))


@pytest.mark.parametrize(
    ("query", "gallery"),
    [("a.jpg 1\n", "b.jpg 2\n"), ("a.jpg 1\n", "a.jpg 1\nb.jpg 2\n"), ("a.jpg 1 0\n", "b.jpg 1 0\nc.jpg 2 1\n")],
)
def test_queries_that_can_find_nothing(config_file, tmp_path, query, gallery):
    message = rf"query\.txt: no query has an image of its identity in {tmp_path}/gallery\.txt"
    with pytest.raises(DataError, match=message):
        evaluation_images(evaluated(config_file, tmp_path, query, gallery))


def test_cameras_in_one_list_only(config_file, tmp_path):
    cfg = evaluated(config_file, tmp_path, "a.jpg 1\n", "b.jpg 1 0\n")
    message = rf"gallery\.txt has a third column, the camera, and {tmp_path}/query\.txt has none: give it in both lists"
    with pytest.raises(DataError, match=message):
        evaluation_images(cfg)


# --- Loaders ----------------------------------------------------------------------------------------------------------


def test_loaders_of_a_configuration(config_file):
    loaders = build_loaders(load_config(config_file()))
    images, labels = next(iter(loaders.train))
    assert images.shape == (8, 3, 32, 32) and images.dtype == torch.float32
    assert np.unique(labels, return_counts=True)[1].tolist() == [2, 2, 2, 2]
    assert torch.cat([labels for _, labels in loaders.gallery]).tolist() == loaders.gallery.dataset.labels.tolist()
    assert len(loaders.query.dataset) == 18 and len(loaders.gallery.dataset) == 36


def test_loaders_without_evaluation(config_file):
    loaders = build_loaders(load_config(config_file({"DataLoader.Eval": ..., "Global.eval_during_train": False})))
    assert loaders.query is None and loaders.gallery is None


def test_a_share_of_the_training_identities_is_held_out_for_validation(config_file):
    def loaders(seed=0):
        return build_loaders(load_config(config_file({"DataLoader.Validation": {"share": 0.2, "seed": seed}})))

    found = loaders()
    train, held = (seen(loader.dataset) for loader in (found.train, found.validation.query))
    assert (len(train), len(held)) == (12, 3) and not train & held
    assert train | held == seen(build_loaders(load_config(config_file())).train.dataset)
    assert found.train.dataset.labels.max() == 11, "the classes that are left are numbered anew"
    assert found.validation.query is found.validation.gallery, "one list: its images are embedded once"
    assert positives(*[found.validation.query.dataset] * 2).all()
    assert str(found.validation.query.dataset.transform) == str(found.query.dataset.transform)
    assert loaders().validation.query.dataset.paths == found.validation.query.dataset.paths
    assert loaders(1).validation.query.dataset.paths != found.validation.query.dataset.paths
    cfg = load_config(config_file({"DataLoader.Validation": {"share": 0.2}}))
    assert build_model(cfg).head.class_num == resolved(cfg)["Arch"]["Head"]["class_num"] == 12


def test_validation_lists_of_their_own(config_file, drawn):
    lists = lookup(load_config(config_file()), "DataLoader.Eval")
    found = build_loaders(load_config(config_file({"DataLoader.Validation": lists})))
    assert len(found.validation.query.dataset) == 18 and len(found.validation.gallery.dataset) == 36
    assert [*found.parts] == ["train", "query", "gallery", "validation query", "validation gallery"]
    one = build_loaders(load_config(config_file({"DataLoader.Validation": {"Gallery": lists["Gallery"]}})))
    assert one.validation.query is one.validation.gallery
    assert build_loaders(load_config(config_file())).validation is None


def test_a_classifier_is_validated_with_a_list(config_file):
    train = lookup(load_config(config_file()), "DataLoader.Train")
    one = {"dataset": train["dataset"], "sampler": {"batch_size": 8}, "loader": {"num_workers": 0}}
    found = build_loaders(
        load_config(
            config_file({"DataLoader.Eval": one, "DataLoader.Validation": one, "Metric.Eval": [{"TopkAcc": {}}]})
        )
    )
    assert found.validation.query is found.validation.gallery and len(found.validation.query.dataset) == 90


@pytest.mark.parametrize(
    ("lines", "share", "leaves"),
    [
        ("a.jpg 1\nb.jpg 1\nc.jpg 2\nd.jpg 2\ne.jpg 3\nf.jpg 3\n", 0.3, "2 to train on and 1 with"),
        ("a.jpg 1\nb.jpg 1\nc.jpg 2\nd.jpg 2\ne.jpg 3\nf.jpg 3\n", 0.7, "1 to train on and 2 with"),
        ("a.jpg 1\nb.jpg 2\nc.jpg 3\nd.jpg 4\ne.jpg 5\nf.jpg 6\n", 0.5, "3 to train on and 0 with"),
        ("a.jpg 1\nb.jpg 2\n", 0.1, "2 to train on and 0 with"),
    ],
)
def test_too_few_identities_to_hold_any_out(config_file, tmp_path, lines, share, leaves):
    changes = {f"{TRAIN}.cls_label_path": str(listed(tmp_path, lines)), "DataLoader.Validation": {"share": share}}
    with pytest.raises(DataError, match=rf"DataLoader\.Validation\.share: .*{leaves}.*; both need two"):
        build_loaders(load_config(config_file(changes)))


def test_settings_for_workers_are_left_out_where_there_are_none(config_file):
    changes = {"DataLoader.Train.loader": {"num_workers": 0, "prefetch_factor": 4, "use_shared_memory": True}}
    assert build_loaders(load_config(config_file(changes))).train.prefetch_factor is None


def test_training_images_may_have_another_size_than_evaluation_images(config_file):
    changes = {f"{TRAIN}.transform_ops.0.ResizeImage.size": 24}
    assert next(iter(build_loaders(load_config(config_file(changes))).train))[0].shape == (8, 3, 24, 24)


def test_fewer_identities_than_a_batch_needs(config_file, drawn, tmp_path):
    lines = (drawn / "train.txt").read_text().splitlines()[:18]
    cfg = load_config(config_file({f"{TRAIN}.cls_label_path": str(listed(tmp_path, "\n".join(lines)))}))
    message = (
        "DataLoader.Train.sampler: a batch of 8 needs 4 identities (sample_per_id 2), the training list has 3; "
        "lower batch_size or raise sample_per_id"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_loaders(cfg)


def test_rows_of_one_image_count_once_in_whatever_spelling(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    for name in ("a/1.png", "a/2.png"):
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "3.png").symlink_to("a/2.png")
    names = ["a/1.png", "a/2.png", "a/../a/1.png", "link/2.png", "./a/1.png", "3.png"]
    (tmp_path / "list.txt").write_text("".join(f"{name} {i} 0\n" for i, name in enumerate(names)))
    table = VeriWild(str(tmp_path), str(tmp_path / "list.txt"))
    drop_repeated(table)
    assert table.labels.tolist() == [0, 1] and table.lines.tolist() == [1, 2]
    assert "list.txt: 4 rows name an image that the list has already, and are left out" in capsys.readouterr().out
    assert table.dropped[0][1:] == (3, str(tmp_path / "a" / "1.png"), f"is the image of {tmp_path}/list.txt line 1")
    assert own_index(table, table).tolist() == [0, 1]


def test_two_boxes_of_a_file_are_two_images():
    boxes = np.array([[0, 0, 4, 4], [4, 0, 8, 4], [0, 0, 4, 4]])
    table = ImageList(["a.png"] * 3, np.array([0, 1, 0]), boxes=boxes)
    drop_repeated(table)
    assert table.boxes.tolist() == boxes[:2].tolist() and own_index(table, table).tolist() == [0, 1]


def test_what_a_spreadsheet_would_run_is_text_in_tables_that_are_handed_on(tmp_path):
    save_dropped([("list.txt", 1, "=cmd()", "-1 is no size")], tmp_path / "dropped.csv")
    assert (tmp_path / "dropped.csv").read_text().splitlines()[1] == "list.txt,1,'=cmd(),'-1 is no size"
    save_dropped([("list.txt", 1, "a\r=cmd()", "b\n=cmd()")], tmp_path / "dropped.csv")
    with (tmp_path / "dropped.csv").open(newline="") as file:
        assert [*csv.reader(file)][1] == ["list.txt", "1", r"a\r=cmd()", "b\n=cmd()"]
    names = ["=cmd()", "'+1", "plain", "\t"]
    images = ImageList(["a.png"] * 4, np.arange(4), names=np.array(names, dtype=object))
    save_label_map(images, tmp_path / "labels.csv")
    assert "0,'=cmd()\n1,''+1\n2,plain\n" in (tmp_path / "labels.csv").read_text()
    assert read_csv(tmp_path / "labels.csv")["name"].tolist() == names
    board = pd.DataFrame({"mAP": [-0.5, None], "epochs": pd.array([3, None], dtype="Int64")}, index=["=run", "-b"])
    write_csv(board.rename_axis("run"), tmp_path / "leaderboard.csv", index=True)
    assert (tmp_path / "leaderboard.csv").read_text() == "run,mAP,epochs\n'=run,-0.5,3\n'-b,,\n"
