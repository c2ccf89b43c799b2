"""Every kind of image is decoded as Pillow's own conversion has it, or is named before training; what is left out stays
written down."""

import csv
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from recnb import build_loaders, load_config
from recnb.data import images
from recnb.data.audit import fingerprint
from recnb.data.images import DataError, faults, printable, read_rgb
from recnb.data.layouts import ImageFolder
from recnb.data.lists import ImageList, VeriWild, check_images, save_dropped, save_label_map
from recnb.gallery.pictures import read_picture

TRAIN = "DataLoader.Train.dataset"
ORIENTATION = 0x0112


def colours(height: int = 24, width: int = 32) -> Image.Image:
    """A picture whose every part differs from the others, smooth enough to survive JPEG."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(
        np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], 2).astype(np.uint8)
    )


def clear_to_the_left(size=(32, 24)) -> Image.Image:
    """An alpha channel: clear, half clear, opaque."""
    alpha = np.full(size[::-1], 255, np.uint8)
    alpha[:, :10], alpha[:, 10:20] = 0, 128
    return Image.fromarray(alpha)


def pixels(path) -> np.ndarray:
    """(H, W, 3) of the image as training has it; as the gallery and as the check before training have it too."""
    assert faults([str(path)]) == {}
    image = ImageList([str(path)], np.zeros(1, int)).image(0).permute(1, 2, 0).numpy()
    assert np.array_equal(image, np.asarray(read_picture(path, 4096)))
    return image


def saved(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


def png(width: int, height: int, depth: int, kind: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file made by hand: what Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    step = len(rows) // height
    lines = b"".join(b"\0" + rows[i : i + step] for i in range(0, len(rows), step))
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*part) for part in ((b"IHDR", head), *chunks, (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    )


# --- Decoded right ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("a.jpg", "RGB", {}),
        ("a.jpg", "RGB", {"progressive": True}),
        ("a.jpg", "L", {}),
        ("a.jpg", "CMYK", {}),
        ("a.tif", "CMYK", {}),
        ("a.png", "1", {}),
        ("a.png", "L", {}),
        ("a.png", "P", {}),
        ("a.bmp", "RGB", {}),
        ("a.gif", "P", {}),
        ("a.webp", "RGB", {}),
        ("a.tif", "YCbCr", {}),
        ("a.ppm", "RGB", {}),
        ("a.tga", "RGB", {}),
    ],
)
def test_kinds_without_alpha(tmp_path, name, mode, options):
    path = saved(colours().convert(mode), tmp_path / name, **options)
    with Image.open(path) as image:
        assert image.mode == mode or mode == "YCbCr"
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(pixels(path), expected)
    expected = np.asarray(colours().convert(mode).convert("RGB")).astype(int)
    assert mode == "1" or np.abs(pixels(path) - expected).max() < 40


def test_cmyk_of_jpeg_is_inverted_with_and_without_adobes_marker(tmp_path):
    plain = colours().convert("CMYK")
    whole = saved(plain, tmp_path / "adobe.jpg", quality=95).read_bytes()
    start = whole.index(b"\xff\xee")
    assert whole[start + 4 : start + 9] == b"Adobe"
    (tmp_path / "plain.jpg").write_bytes(whole[:start] + whole[start + 16 :])
    expected = np.asarray(plain.convert("RGB")).astype(int)
    for name in ("adobe.jpg", "plain.jpg"):
        assert np.abs(pixels(tmp_path / name) - expected).max() < 24
    assert np.array_equal(pixels(saved(plain, tmp_path / "plain.tif")), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_is_blended_onto_white(tmp_path, mode):
    image = colours().convert("L" if mode == "LA" else "RGB")
    image.putalpha(clear_to_the_left())
    path = saved(image.convert(mode) if mode != "PA" else image.quantize(64), tmp_path / "a.png")
    with Image.open(path) as stored:
        rgba = stored.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    white.alpha_composite(rgba)
    found = pixels(path)
    assert np.array_equal(found, np.asarray(white.convert("RGB")))
    assert (found[:, :10] == 255).all() and (found[:, 20:, 1].max() < 255)


def test_one_transparent_colour_becomes_white(tmp_path):
    image = Image.new("P", (4, 2), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((0, 0), 0)
    for name in ("a.png", "a.gif"):
        found = pixels(saved(image, tmp_path / name, transparency=0))
        assert found[0, 0].tolist() == [255] * 3 and found[1, 3].tolist() == [200, 100, 50]
    found = pixels(saved(Image.new("RGB", (2, 2), (1, 2, 3)), tmp_path / "b.png", transparency=(1, 2, 3)))
    assert (found == 255).all()


@pytest.mark.parametrize(("kind", "channels", "alpha"), [(0, 1, False), (2, 3, False), (4, 2, True), (6, 4, True)])
def test_16_bits_keep_their_upper_8(tmp_path, kind, channels, alpha):
    values = np.random.default_rng(0).integers(0, 2**16, (6, 8, channels)).astype(">u2")
    (tmp_path / "a.png").write_bytes(png(8, 6, 16, kind, values.tobytes()))
    high = (values >> 8).astype(np.uint8)
    grey = high[..., : channels - alpha].repeat(1 if channels > 2 else 3, 2)
    expected = Image.fromarray(np.concatenate([grey, high[..., -1:]], 2) if alpha else grey)
    if alpha:
        white = Image.new("RGBA", expected.size, "white")
        white.alpha_composite(expected)
        expected = white.convert("RGB")
    assert np.array_equal(pixels(tmp_path / "a.png"), np.asarray(expected))


@pytest.mark.parametrize("name", ["a.tif", "a.pgm", "a.jp2"])
def test_16_bit_grey_of_other_formats(tmp_path, name):
    values = np.random.default_rng(0).integers(0, 2**16, (24, 32)).astype(np.uint16)
    if name == "a.pgm":
        (tmp_path / name).write_bytes(b"P5 32 24 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(tmp_path / name)
    assert np.array_equal(pixels(tmp_path / name), (values >> 8).astype(np.uint8)[..., None].repeat(3, 2))


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_the_first_frame_of_an_animation(tmp_path, name):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    path = saved(frames[0], tmp_path / name, save_all=True, append_images=frames[1:], duration=100, loop=0)
    with Image.open(path) as image:
        assert image.n_frames == 3
    assert np.abs(pixels(path) - np.array([255, 0, 0])).max() <= 8


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_turn_of_exif(tmp_path, name, orientation):
    exif, upright = Image.Exif(), colours()
    exif[ORIENTATION] = orientation
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # Pillow's numbers of what turns it back
    stored = upright if undo is None else upright.transpose(Image.Transpose(undo))
    path = saved(stored, tmp_path / name, exif=exif, **({"lossless": True} if name == "a.webp" else {}))
    found = pixels(path)
    assert found.shape == (24, 32, 3)
    assert np.abs(found - np.asarray(upright).astype(int)).max() <= (40 if name == "a.jpg" else 0)
    assert np.abs(found - np.asarray(upright).astype(int)).mean() < 6


def test_one_pixel_and_a_name_that_says_another_format(tmp_path):
    assert pixels(saved(Image.new("RGB", (1, 1), (9, 8, 7)), tmp_path / "dot.png")).tolist() == [[[9, 8, 7]]]
    path = saved(colours(), tmp_path / "in_truth_a_png.jpg", format="PNG")
    assert np.array_equal(pixels(path), np.asarray(colours()))


def test_broken_exif_does_not_hide_the_image(tmp_path):
    path = saved(colours(), tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff", quality=95)
    assert pixels(path).shape == (24, 32, 3)


# --- Named ------------------------------------------------------------------------------------------------------------


def noise(size: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.jpg", {}),
        ("a.jpg", {"progressive": True}),
        ("a.png", {}),
        ("a.gif", {}),
        ("a.webp", {}),
        ("a.bmp", {}),
        ("a.tif", {}),
        ("a.ppm", {}),
        ("a.jp2", {}),
    ],
)
def test_truncated_files(tmp_path, name, options):
    whole = saved(noise(), tmp_path / name, **options).read_bytes()
    for length in (1, 20, len(whole) // 2, len(whole) * 9 // 10):
        (tmp_path / name).write_bytes(whole[:length])
        (why,) = faults([str(tmp_path / name)]).values()
        assert why.startswith(("cannot be decoded: ", "is empty or of no known image format"))
        with pytest.raises(DataError, match=f"{name} {why[:10]}"):
            ImageList([str(tmp_path / name)], np.zeros(1, int)).image(0)


def test_an_image_without_its_last_bytes_is_whole_or_refused_by_both(tmp_path):
    whole = saved(noise(), tmp_path / "a.jpg").read_bytes()
    table = ImageList([str(tmp_path / "a.jpg")], np.zeros(1, int))
    for cut in range(1, 40):
        (tmp_path / "a.jpg").write_bytes(whole[:-cut])
        assert faults(table.paths), cut
        with pytest.raises(DataError, match="truncated"):
            table.image(0)


def bomb(path: Path) -> Path:
    path.write_bytes(png(20_000, 20_000, 8, 0, b"\0" * 20_000))
    return path


def test_every_reader_looks_at_the_size_in_the_header_before_it_decodes(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    path.write_bytes(png(9_000, 9_000, 8, 0, b"\0" * 9_000))  # below the limits of Pillow
    says = "has more pixels than is safe to decode: it has 9,000 x 9,000, and 64,000,000 are allowed"
    assert says in faults([str(path)])[0] and says in fingerprint(str(path))[-1]
    with pytest.raises(DataError, match=says):
        ImageList([str(path)], np.zeros(1, int)).image(0)
    with pytest.raises(ValueError, match=says):
        read_picture(path, 64)
    small = saved(colours(8, 8), tmp_path / "small.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 64)
    assert faults([str(small)]) == {}
    monkeypatch.setattr(images, "MAX_PIXELS", 63)
    assert "8 x 8, and 63 are allowed" in faults([str(small)])[0]


@pytest.fixture
def faulty(tmp_path) -> dict[str, str]:
    """Faulty files below tmp_path, each with how its reason begins."""
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "text.png").write_text("no image")
    os.mkfifo(tmp_path / "pipe.png")
    bomb(tmp_path / "bomb.png")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "depth.tif")
    (tmp_path / "key.png").write_bytes(png(2, 1, 16, 0, b"\1\2\3\4", (b"tRNS", b"\1\2")))
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "half.jpg").write_bytes(saved(noise(), tmp_path / "whole.jpg").read_bytes()[:2000])
    return {
        "empty.jpg": "is empty or of no known image format",
        "folder.jpg": "is a folder or a device, no file",
        "text.png": "is empty or of no known image format",
        "pipe.png": "is a folder or a device, no file",
        "bomb.png": "has more pixels than is safe to decode: Image size (400000000 pixels) exceeds limit of "
        "178956970 pixels",
        "depth.tif": "cannot be decoded: its pixels are of kind F, which have no known range",
        "key.png": "cannot be decoded: one colour of 16 bits stands for transparent",
        "loop.jpg": "cannot be decoded: Too many levels of symbolic links",
        "absent.jpg": "is not there",
        "half.jpg": "cannot be decoded: image file is truncated",
    }


def test_one_report_names_every_faulty_image_with_its_reason(tmp_path, faulty):
    names = ["whole.jpg", *faulty]
    (tmp_path / "list.txt").write_text("".join(f"{name} 0\n" for name in names))
    table = VeriWild(str(tmp_path), str(tmp_path / "list.txt"))
    with pytest.raises(DataError) as error:
        check_images(table)
    head, *lines = str(error.value).splitlines()
    assert head == (
        "10 of 11 images cannot be used; mend them, take them out of their lists, or leave them out with "
        "Global.on_bad_image: drop"
    )
    for number, (line, name) in enumerate(zip(lines, faulty, strict=True), 2):
        assert line.startswith(f"{tmp_path}/list.txt line {number}: the image {tmp_path}/{name} {faulty[name]}")
    assert "set RECNB_MAX_PIXELS=N in the environment where you trust it" in lines[4]
    for i in range(1, len(table) - 1):
        with pytest.raises(DataError, match=f"^{table.source} line {i + 1}: the image {table.paths[i]} "):
            table.image(i)


def test_a_long_report_ends_in_a_count():
    table = ImageList([f"/absent/{i}.jpg" for i in range(50)], np.zeros(50, int))
    with pytest.raises(DataError) as error:
        check_images(table, table)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("100 of 100 images") and len(lines) == 22 and lines[-1] == "and 80 more"


def test_a_file_that_may_not_be_read(tmp_path):
    path = saved(colours(), tmp_path / "secret.png")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read any file, whatever its mode")
    assert faults([str(path)]) == {0: "cannot be decoded: Permission denied"}


def test_names_of_any_bytes(tmp_path, config_file):
    root = os.fsencode(tmp_path / "root")
    for identity in (b"caf\xe9", b"two words", b"new\nline"):
        os.makedirs(os.path.join(root, identity))  # noqa: PTH103, PTH118 (names that are no text)
        for n in (b"1 \xff.png", b"2\n.png"):
            colours().save(io.FileIO(os.path.join(root, identity, n), "w"), "PNG")  # noqa: PTH118
    table = ImageFolder(str(tmp_path / "root"))
    assert len(table) == 6 and faults(table.paths) == {}
    assert np.array_equal(table.image(0).permute(1, 2, 0), colours())
    save_label_map(table, tmp_path / "labels.csv")
    with (tmp_path / "labels.csv").open(encoding="utf-8", newline="") as file:
        assert [row[1] for row in csv.reader(file)] == ["name", "caf\\udce9", "new\nline", "two words"]
    Path(table.paths[0]).write_bytes(b"")
    with pytest.raises(DataError) as error:
        check_images(table)
    assert str(error.value).encode() and len(str(error.value).splitlines()) == 2
    assert printable("a\nb\udce9 é") == "a\\nb\\udce9 é"


def test_links_and_folders_that_are_named_like_images(tmp_path):
    saved(colours(), tmp_path / "elsewhere.png")
    (tmp_path / "root" / "a" / "folder.png").mkdir(parents=True)
    saved(colours(), tmp_path / "root" / "a" / "folder.png" / "inner.png")
    (tmp_path / "root" / "a" / "link.png").symlink_to(tmp_path / "elsewhere.png")
    (tmp_path / "root" / "b").symlink_to(tmp_path / "root" / "a")
    table = ImageFolder(str(tmp_path / "root"))
    names = sorted(str(Path(path).relative_to(tmp_path / "root")) for path in table.paths)
    assert names == ["a/folder.png/inner.png", "a/link.png", "b/folder.png/inner.png", "b/link.png"]
    assert faults(table.paths) == {}


def test_an_image_that_fails_only_in_training_is_named(config_file, drawn, tmp_path):
    copy = tmp_path / "images"
    copy.mkdir()
    for path in (drawn / "images").rglob("*.*"):
        target = copy / path.relative_to(drawn / "images")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    cfg = load_config(config_file({f"{TRAIN}.image_root": str(copy), "DataLoader.Train.loader.num_workers": 1}))
    loaders = build_loaders(cfg)
    for path in loaders.train.dataset.paths:
        Path(path).write_bytes(b"")
    with pytest.raises(DataError, match=r"train\.txt line \d+: the image .* is empty or of no known image format"):
        next(iter(loaders.train))


# --- Left out ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def some_bad(config_file, drawn, tmp_path):
    """A configuration in whose lists one identity has no image that can be used, and others lack one each."""
    (tmp_path / "bad.jpg").write_bytes(b"")
    changes = {"Global.on_bad_image": "drop"}
    for part, name, rows in (
        ("Train", "train", range(7)),
        ("Eval.Query", "query", [2]),
        ("Eval.Gallery", "gallery", [3]),
    ):
        lines = (drawn / f"{name}.txt").read_text().splitlines()
        for row in rows:
            lines[row] = f"{tmp_path / 'bad.jpg'} {lines[row].split(' ', 1)[1]}"
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
        changes |= {
            f"DataLoader.{part}.dataset.cls_label_path": str(tmp_path / f"{name}.txt"),
            f"DataLoader.{part}.dataset.allow_outside": True,
        }
    return config_file(changes)


def test_drop_leaves_bad_images_out_and_writes_them_down(some_bad, tmp_path, capsys):
    loaders = build_loaders(load_config(some_bad))
    parts = (loaders.train.dataset, loaders.query.dataset, loaders.gallery.dataset)
    assert [len(part) for part in parts] == [90 - 7, 18 - 1, 36 - 1]
    for part in parts:
        assert str(tmp_path / "bad.jpg") not in part.paths
        assert len(part.labels) == len(part.lines) == len(part)
    train = parts[0]
    assert train.names.tolist() == list(range(15))  # the numbers are those of the whole list
    assert sorted(set(train.labels.tolist())) == list(range(1, 15)) and train.place(0).endswith("train.txt line 8")
    said = capsys.readouterr().out
    assert f"{tmp_path}/train.txt: 7 images are left out (Global.on_bad_image), and 1 identities have none left" in said
    save_dropped(loaders.dropped, tmp_path / "dropped.csv")
    with (tmp_path / "dropped.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["list", "line", "path", "reason"] and len(rows) == 9
    assert rows[0] == [f"{tmp_path}/train.txt", "1", f"{tmp_path}/bad.jpg", "is empty or of no known image format"]
    assert [row[1] for row in rows[-2:]] == ["3", "4"]
    assert {label for _, labels in [next(iter(loaders.train))] for label in labels.tolist()} <= set(range(1, 15))


def test_stop_is_the_default_and_reports_all_lists_at_once(some_bad):
    cfg = load_config(some_bad, {"Global.on_bad_image": "stop"})
    with pytest.raises(DataError, match=r"^9 of \d+ images cannot be used; ") as error:
        build_loaders(cfg)
    assert all(
        f"{place}: the image" in str(error.value)
        for place in ("train.txt line 1", "train.txt line 7", "query.txt line 3", "gallery.txt line 4")
    )
    lines = some_bad.read_text().splitlines()
    some_bad.write_text("\n".join(line for line in lines if "on_bad_image" not in line))
    with pytest.raises(DataError, match=r"^9 of \d+ images"):
        build_loaders(load_config(some_bad))


def test_nothing_to_train_on_or_to_find_once_bad_images_are_dropped(some_bad, drawn, tmp_path):
    (tmp_path / "train.txt").write_text("".join(f"{tmp_path / 'bad.jpg'} {i}\n" for i in range(4)))
    with pytest.raises(DataError, match=r"train\.txt: none of the 4 images can be used; .*bad\.jpg is empty"):
        build_loaders(load_config(some_bad))
    (tmp_path / "train.txt").write_bytes((drawn / "train.txt").read_bytes())
    lines = (drawn / "query.txt").read_text().splitlines()
    own = lines[0].split()[1]
    (tmp_path / "query.txt").write_text(lines[0])
    (tmp_path / "gallery.txt").write_text(
        "\n".join(
            f"{tmp_path / 'bad.jpg'} {line.split(' ', 1)[1]}" if line.split()[1] == own else line
            for line in (drawn / "gallery.txt").read_text().splitlines()
        )
    )
    with pytest.raises(DataError, match="no query has an image of its identity"):
        build_loaders(load_config(some_bad))


# --- Remembered -------------------------------------------------------------------------------------------------------


def test_what_was_decoded_is_not_decoded_again_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "REMEMBERED", tmp_path / "cache" / "decoded.txt")
    monkeypatch.setattr(images, "PART", 10)
    paths = [str(saved(colours(), tmp_path / f"{i}.png")) for i in range(25)]
    read, seen = read_rgb, []
    monkeypatch.setattr(images, "read_rgb", lambda path, *args, **kw: seen.append(path) or read(path, *args, **kw))
    for expected in (25, 5):  # the last, shorter part is not remembered
        seen.clear()
        assert faults(paths) == {} and len(seen) == expected
    Path(paths[3]).write_bytes(b"")
    seen.clear()
    assert list(faults(paths)) == [3] and len(seen) == 15
    seen.clear()
    assert list(faults(paths)) == [3] and len(seen) == 15  # a part with a fault is decoded every time
    seen.clear()
    assert list(faults(paths, np.tile([0, 0, 4, 4], (25, 1)))) == [3] and len(seen) == 25  # with boxes it is another


def test_nothing_is_remembered_where_nothing_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(images, "REMEMBERED", tmp_path / "file" / "decoded.txt")
    monkeypatch.setattr(images, "PART", 1)
    path = saved(colours(), tmp_path / "a.png")
    assert faults([str(path)]) == {} == faults([str(path)])


def test_the_check_reads_jpeg_small_and_training_reads_it_whole(tmp_path):
    path = saved(noise(256), tmp_path / "a.jpg")
    assert read_rgb(str(path), draft=True).size == (32, 32) and read_rgb(str(path)).size == (256, 256)
    assert read_rgb(str(path), [10, 20, 110, 220], draft=True).size == (100, 200)
    whole = ImageList([str(path)], np.zeros(1, int)).image(0)
    cut = ImageList([str(path)], np.zeros(1, int), boxes=np.array([[10, 20, 110, 220]])).image(0)
    assert torch.equal(cut, whole[:, 20:220, 10:110])
    with Image.open(path) as image:
        assert np.array_equal(whole.permute(1, 2, 0), ImageOps.exif_transpose(image))
