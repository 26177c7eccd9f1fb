"""Tests of the data sets that users bring: `pytest test_sets.py`."""
import gzip
import os
import shutil
import struct

import numpy as np
import pytest
import torch
from PIL import Image

import data
import sample
import sets
import train
from test_core import every
from test_programs import done, refused


# ================================================================ shapes

def test_shape_k_is_a_function_of_k_and_held_out_shapes_are_others():
    a, b = data.load("shapes", size=16), data.load("shapes", size=16)
    x, y = a.train.batch([5, 11, 5])
    assert torch.equal(x, b.train.batch([5, 11, 5])[0]) and torch.equal(x[0], x[2])
    assert y.tolist() == [5, 5, 5] and not torch.equal(x[0], x[1])
    seen, unseen = (part.batch(range(300))[0].flatten(1) for part in (a.train, a.heldout))
    assert torch.cdist(seen, unseen).min() > 0.1


PIXELS = np.random.default_rng(0).integers(2, 255, (40, 12, 12, 3), dtype=np.uint8)


# ================================================================ folders

def make_folder(root, per_class=6, classes=("cat", "dog")):
    for name in classes:
        (root / name).mkdir(parents=True)
        for k, image in enumerate(np.random.default_rng(0).integers(
                0, 255, (per_class, 20, 27, 3), dtype=np.uint8)):
            Image.fromarray(image).save(root / name / f"{k}.png")
    return root


def test_a_folder_holds_out_some_of_each_class_or_its_val_whose_classes_must_agree(tmp_path):
    d = data.load("folder", make_folder(tmp_path / "f", 10), size=16)
    assert d.class_names == ["cat", "dog"] and d.train.batch([0])[0].shape == (1, 3, 16, 16)
    assert [s.labels.bincount().tolist() for s in (d.train, d.heldout)] == [[9, 9], [1, 1]]
    make_folder(tmp_path / "train"), make_folder(tmp_path / "val", 2)
    d = data.load("folder", tmp_path, size=16)
    assert (len(d.train), len(d.heldout)) == (12, 4) and d.class_names == ["cat", "dog"]
    make_folder(tmp_path / "val", 1, ["emu"])
    with pytest.raises(ValueError, match="emu is in one of them only"):
        data.load("folder", tmp_path, size=16)


def test_a_corrupt_image_is_named_and_too_many_are_an_error(tmp_path, capsys):
    root = make_folder(tmp_path / "f")
    (root / "cat" / "2.png").write_bytes(b"\x89PNG not really")
    with pytest.raises(ValueError, match=r"1 of 12 images.*2\.png.*--max_bad"):
        data.load("folder", root, max_bad=0.01)
    capsys.readouterr()
    d = data.load("folder", root, max_bad=0.2)
    assert len(d.train) + len(d.heldout) == 11 and "2.png" in capsys.readouterr().err


def test_all_images_unreadable_are_an_error_whatever_is_tolerated(tmp_path):
    root = make_folder(tmp_path / "f", 2)
    for file in root.glob("*/*"):
        file.write_bytes(b"\x89PNG not really")
    with pytest.raises(ValueError, match=r"none of 4 images can be read .first: .*cat/0.png"):
        data.load("folder", root, max_bad=1)


def link(path, to):
    path.symlink_to(to, target_is_directory=True)


def test_a_folder_follows_links_ends_loops_leaves_hidden_files_and_says_what_it_leaves_out(
        tmp_path, capsys):
    root, other = make_folder(tmp_path / "f", 3), make_folder(tmp_path / "o", 4, ["emu", "more"])
    link(root / "emu", other / "emu"), link(root / "cat" / "more", other / "more")
    link(other / "more" / "back", root / "cat"), link(root / "dog" / "self", root / "dog")
    link(root / "dog" / "up", root)                    # not all classes once more, as dogs
    make_folder(root / "dog", 2, [".ipynb_checkpoints", "deep"])
    for hidden in (root / "dog" / "._0.png", root / "dog" / "deep" / ".x.png", root / ".x.png"):
        hidden.write_text("no image")
    (root / "dog" / "notes.txt").write_text("x"), (root / "beside.png").write_text("x")
    (root / "cat" / "0.png").rename(root / "cat" / "0.JFIF")
    files, names = sets.list_images(root)
    assert names == ["cat", "dog", "emu"]
    assert np.bincount([y for _, y, _ in files]).tolist() == [3 + 4, 3 + 2, 4]
    assert all(file.suffix in (".png", ".JFIF") and "/." not in str(file) for file, _, _ in files)
    said = capsys.readouterr().err
    assert said.endswith("left out: 4 hidden, 1 beside the class folders, 1 of another kind\n")
    assert said.count("\n") == 1


def test_a_class_may_be_called_train_and_a_split_leaves_out_what_is_beside_it(tmp_path, capsys):
    make_folder(tmp_path / "a", 2, ["train", "bus"])
    assert sets.list_images(tmp_path / "a")[1] == ["bus", "train"]
    for name in ("train", "val", "test"):
        make_folder(tmp_path / "b" / name, 2)
    files, names = sets.list_images(tmp_path / "b")
    assert names == ["cat", "dog"] and len(files) == 8 and "test" not in {f.parts[-3] for f, *_ in
                                                                       files}
    assert "left out: 1 beside train and val" in capsys.readouterr().err
    for name in ("Train", "VAL"):
        make_folder(tmp_path / "d" / name, 2)
    files, names = sets.list_images(tmp_path / "d")
    assert names == ["cat", "dog"] and [held for *_, held in files] == [0] * 4 + [1] * 4
    make_folder(tmp_path / "c", 2, ["train", "val"])            # no classes: not two, but an error
    with pytest.raises(ValueError, match="c/train is not a folder, or holds no images; expected"):
        sets.list_images(tmp_path / "c")


# ================================================================ image files

def saved(path, array, **options):
    """An image file of an array, or of a PIL image."""
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(path, **options)
    return path


def one_class(tmp_path, suffix, *images, **options):
    """The pixels (n, 16, 16, C) of a folder of these images, each twice."""
    folder = tmp_path / "f" / "c"
    folder.mkdir(parents=True)
    for k, image in enumerate((*images, *images)):
        saved(folder / f"{k}{suffix}", image, **options)
    d = data.load("folder", folder.parent, size=16)
    return np.concatenate([data.to_uint8(part.batch(range(len(part)))[0]) for part in
                           (d.train, d.heldout)])


RAMP = np.arange(256).reshape(16, 16)
PALETTE = Image.fromarray((RAMP % 2).astype(np.uint8), "P")
PALETTE.putpalette([10, 20, 30, 40, 50, 60])


@every("suffix, image, options, expected", [
    (".png", RAMP.astype(np.uint8), {}, RAMP[..., None]),
    (".png", np.tile(RAMP[..., None].astype(np.uint8), (1, 1, 3)), {}, RAMP[..., None]),
    (".png", (RAMP * 257).astype(np.uint16), {}, RAMP[..., None]),
    (".tif", (RAMP * 257).astype(np.uint16), {}, RAMP[..., None]),
    (".tif", (RAMP / 255).astype(np.float32), {}, RAMP[..., None]),
    (".tif", (RAMP * 257).astype(np.uint16), dict(tiffinfo={262: 0}), 255 - RAMP[..., None]),
    (".tif", (RAMP / 255).astype(np.float32), dict(tiffinfo={262: 0}), 255 - RAMP[..., None]),
    (".png", (RAMP * 257).astype(np.uint16), dict(transparency=0), RAMP[..., None] + 255 * (
        RAMP[..., None] == 0)),
    (".png", np.stack([0 * RAMP, RAMP], -1).astype(np.uint8), {}, 255 - RAMP[..., None]),
    (".png", np.stack([0 * RAMP, 255 + 0 * RAMP, 0 * RAMP, RAMP], -1).astype(np.uint8), {},
     np.stack([255 - RAMP, 255 + 0 * RAMP, 255 - RAMP], -1)),
    (".png", PALETTE, {}, np.where(RAMP[..., None] % 2, (40, 50, 60), (10, 20, 30))),
    (".png", PALETTE, dict(transparency=1), np.where(RAMP[..., None] % 2, 255, (10, 20, 30))),
    (".gif", PALETTE, dict(transparency=0), np.where(RAMP[..., None] % 2, (40, 50, 60), 255)),
    (".tif", Image.new("CMYK", (16, 16), (0, 255, 255, 0)), {}, np.full((16, 16, 3), (255, 0, 0))),
    (".png", Image.fromarray(RAMP % 2 == 1), {}, 255 * (RAMP % 2)[..., None])],
    ids=lambda v: getattr(v, "mode", None) or getattr(v, "dtype", None) and f"{v.dtype}{v.shape}")
def test_an_image_is_read_as_it_is_seen_in_grey_if_all_are(
        suffix, image, options, expected, tmp_path):
    pixels = one_class(tmp_path, suffix, image, **options)
    # alpha's product is rounded once more
    assert pixels.shape[1:] == expected.shape and np.abs(pixels - expected.astype(int)).max() <= 1


def test_one_coloured_image_makes_a_folder_coloured_and_transparency_is_said_once(tmp_path, capsys):
    clear = np.stack([RAMP] * 4, -1).astype(np.uint8)
    sets.say.cache_clear()
    assert one_class(tmp_path, ".png", clear[..., :3], clear, PIXELS[0]).shape == (6, 16, 16, 3)
    assert capsys.readouterr().err == "note: where images are transparent they become white\n"


def test_a_tiff_of_12_bits_is_scaled_by_4095(tmp_path):
    values = [0, 4095, 2048, 1024]                                  # two in three bytes
    packed = bytes(b for p, q in zip(values[::2], values[1::2])
                   for b in (p >> 4, (p & 15) << 4 | q >> 8, q & 255))
    tags = {256: 4, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(packed)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, v) for tag, v in tags.items())
    file = tmp_path / "x.tif"
    file.write_bytes(struct.pack("<2sHI", b"II", 42, 8 + len(packed)) + packed
                     + struct.pack("<H", len(tags)) + entries + bytes(4))
    assert np.asarray(sets.open_image(file))[0, :, 0].tolist() == [0, 255, 128, 64]


@every("suffix, image, words", [
    (".tif", RAMP.astype(np.int32), "mode I, values from 0 to 255; expected 8 or 16 bits"),
    (".tif", np.zeros((16, 16), np.int32), "mode I, values from 0 to 0"),
    (".tif", RAMP.astype(np.float32), "mode F, values from 0 to 255"),
    (".tif", np.full((16, 16), np.nan, np.float32), "mode F, values from nan")])
def test_an_image_whose_white_is_unknown_is_unreadable_and_says_its_mode(
        suffix, image, words, tmp_path):
    with pytest.raises(ValueError, match=f"none of 2 images.*0{suffix} cannot be read.*{words}"):
        one_class(tmp_path, suffix, image)


@every("options", [{}, dict(progressive=True)])
def test_a_cut_off_image_is_unreadable_and_of_an_animation_the_first_picture_is_taken(
        options, tmp_path, capsys):
    file = saved(tmp_path / "x.jpg", PIXELS[0].repeat(9, 0), **options)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match="x.jpg cannot be read as an image: .*truncated"):
        sets.open_image(file)
    first, second = (Image.fromarray(np.full((4, 4), v, np.uint8)) for v in (50, 90))
    sets.say.cache_clear()
    for suffix in (".gif", ".png", ".tif"):
        saved(tmp_path / f"a{suffix}", first, save_all=True, append_images=[second])
        assert np.asarray(sets.open_image(tmp_path / f"a{suffix}")).max() == 50
    assert "several pictures the first is taken" in capsys.readouterr().err


TURNS = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud,
         5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, -1),
         7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: np.rot90}


@every("suffix, grey", [(".png", False), (".tif", False), (".tif", True)])
@every("orientation", TURNS)
def test_an_image_is_turned_by_its_exif_orientation_before_the_crop_but_not_imagenet_s(
        orientation, suffix, grey, tmp_path):
    exif, image = Image.Exif(), np.random.default_rng(0).integers(0, 255, (16, 28, 3), np.uint8)
    image = image[..., :1].repeat(3, -1) if grey else image
    exif[274] = orientation
    file = saved(tmp_path / f"x{suffix}", image[..., 0] if grey else image, exif=exif)
    turned = TURNS[orientation](image)
    top, left = ((n - 16) // 2 for n in turned.shape[:2])
    assert (sets.read_image(file, 16) == turned[top:top + 16, left:left + 16]).all()
    if suffix == ".png":                          # Pillow itself turns a TIFF
        assert (sets.read_image(file, 16, published=True) == image[:, 6:22]).all()


def test_the_crop_is_central_and_exact_on_multiples():
    pixels = np.random.default_rng(0).integers(0, 255, (32, 64, 3), dtype=np.uint8)
    out = np.asarray(sets.centre_crop(Image.fromarray(pixels), 16), dtype=float)
    box = pixels.astype(float).reshape(16, 2, 32, 2, 3).mean((1, 3))[:, 8:24]
    assert np.abs(out - box).max() <= 1, "one halving by BOX, the centre; rounding costs 1"


# ================================================================ the command line

@every("argv, words", [
    ("--dataset folder --data_dir {tmp}/nowhere", "is not a folder"),
    ("--dataset folder --data_dir {tmp}/empty", "no images"),
    ("--dataset folder --data_dir {tmp}/hollow", "holds no images"),
    ("--dataset folder --data_dir {tmp}/one", "at least 2")])
def test_a_bad_folder_is_one_line_and_exit_code_2(argv, words, tmp_path):
    make_folder(tmp_path / "one", 1, ["cat"]), make_folder(tmp_path / "hollow", 2, ["cat"])
    (tmp_path / "hollow" / "dog").mkdir(), (tmp_path / "empty").mkdir()
    refused(words, train, "--out_dir", tmp_path / "out", "--steps", 0,
            *argv.format(tmp=tmp_path).split())
    assert not (tmp_path / "out").exists()


# ================================================================ the field's small sets

def idx(array):
    head = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    return head + array.tobytes()


def make_mnist(root, zipped=False, names=("train", "t10k"), side=28, first=0):
    """Four idx files of 6 and 4 images: image k is all k but for 200 in row 1, column 3, its label
    first + k % 3."""
    root.mkdir(exist_ok=True)
    for name, n in zip(names, (6, 4)):
        k = np.arange(n, dtype=np.uint8)
        images = np.tile(k[:, None, None], (1, side, side))
        images[:, 1, 3] = 200
        for kind, array in (("images-idx3", images), ("labels-idx1", first + k % 3)):
            raw = idx(array.astype(np.uint8))
            (root / f"{name}-{kind}-ubyte{'.gz' * zipped}").write_bytes(
                gzip.compress(raw) if zipped else raw)
    return root / f"{names[0]}-images-idx3-ubyte"


@every("zipped", [True, False])
def test_idx_files_hold_the_right_images_and_labels_and_their_own_test_set(zipped, tmp_path):
    d = data.load("mnist", make_mnist(tmp_path / "m", zipped).parent)
    assert (len(d.train), len(d.heldout), d.class_names, d.grid) == (6, 4, ["0", "1", "2"], 7)
    x, y = d.train.batch([4, 5])
    assert x.shape == (2, 1, 28, 28) and y.tolist() == [1, 2]
    pixels = data.to_uint8(x)[..., 0]
    assert pixels[:, 3, 9].tolist() == [4, 5] and pixels[0, 1, 3] == 200 > pixels[0, 3, 1]


def test_idx_files_of_another_size_have_it_and_unpacked_ones_may_lie_beside_their_gz(tmp_path):
    make_mnist(tmp_path / "m", True), make_mnist(tmp_path / "m", side=20)
    d = data.load("mnist", tmp_path / "m")
    assert (d.size, d.grid, len(d.train)) == (20, 5, 6)
    make_mnist(tmp_path / "m", side=29)
    with pytest.raises(ValueError, match="a side of 29 pixels must be a multiple of --patch 4"):
        data.load("mnist", tmp_path / "m")
    assert data.load("mnist", make_mnist(tmp_path / "n", side=30).parent, patch=5).grid == 6


def test_emnist_is_turned_its_letters_begin_with_a_and_one_of_its_sets_must_be_named(tmp_path):
    for name, first in (("letters", 1), ("digits", 0)):
        make_mnist(tmp_path, True, (f"emnist-{name}-train", f"emnist-{name}-test"), first=first)
    with pytest.raises(ValueError, match="2 sets .emnist-digits, emnist-letters.; say which, as"):
        data.load("mnist", tmp_path)
    d = data.load("mnist", tmp_path / "emnist-letters")
    assert d.train.labels.tolist() == [0, 1, 2, 0, 1, 2] and d.class_names == ["0", "1", "2"]
    pixels = data.to_uint8(d.train.batch([0])[0])[0, ..., 0]
    assert pixels[3, 1] == 200 > pixels[1, 3], "its files hold columns for rows"
    (tmp_path / "emnist-letters-mapping.txt").write_text("1 65 97\n2 66 98\n3 67 99\n")
    assert data.load("mnist", tmp_path / "emnist-letters").class_names == ["Aa", "Bb", "Cc"]
    (tmp_path / "emnist-letters-mapping.txt").write_text("<html>")
    with pytest.raises(ValueError, match="letters-mapping.txt is no mapping of EMNIST"):
        data.load("mnist", tmp_path / "emnist-letters")
    before = data.digest(d.facts)
    os.utime(tmp_path / "emnist-letters-test-labels-idx1-ubyte.gz", (0, 0))
    assert data.digest(d.facts) != before, "of all its files"


@every("damage, words", [
    (lambda f: f.write_bytes(b"\0\0\x0d\x03" + f.read_bytes()[4:]), "starts with 00000d03"),
    (lambda f: f.write_bytes(f.read_bytes()[:-100]), "truncated"),
    (lambda f: f.write_bytes(f.read_bytes()[:10]), "truncated"),
    (lambda f: f.write_bytes(f.read_bytes()[:2]), "starts with 0000"),
    (lambda f: f.write_bytes(gzip.compress(f.read_bytes())[:-40]), "damaged"),
    (lambda f: f.write_bytes(b"\x1f\x8b\x08" + bytes(99)), "damaged"),
    (lambda f: f.write_bytes(idx(np.zeros((5, 28, 28), np.uint8))), "5 images and 6 labels"),
    (lambda f: f.write_bytes(idx(np.zeros((6, 28, 20), np.uint8))), "28x20, expected square"),
    (lambda f: f.write_bytes(idx(np.zeros((6, 20, 20), np.uint8))), "28x28, expected 20x20"),
    (lambda f: f.with_name("t10k-labels-idx1-ubyte").write_bytes(idx(np.full(4, 7, np.uint8))),
     "labels from 0 to 7; expected 0 to 3"),
    (lambda f: f.with_name("train-labels-idx1-ubyte").write_bytes(idx(np.zeros(6, np.uint8))),
     "class '1' of .* has no training"),
    (lambda f: f.unlink(), "no train images: expected train-images-idx3-ubyte"),
    (lambda f: f.with_name("t10k-labels-idx1-ubyte").unlink(), "no test labels"),
    (lambda f: shutil.copy(f, f.with_name(f"kmnist-{f.name}")), "2 sets .*kmnist"),
    (lambda f: shutil.rmtree(f.parent), "no train images")])
def test_a_bad_idx_file_is_one_line(damage, words, tmp_path):
    damage(make_mnist(tmp_path / "m"))
    with pytest.raises(ValueError, match=words) as error:
        data.load("mnist", tmp_path / "m")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def make_cifar(root, classes=10):
    """The binary files, 10 images each: image k has label k % 10 (100: k % 10 + 20), and is all k
    but for a red pixel in row 2, column 5."""
    folder, meta, head, *parts = sets.CIFAR[classes]
    (root / folder).mkdir(parents=True)
    (root / folder / meta).write_text("".join(f"name{k}\n" for k in range(classes)) + "\n")
    labels = np.arange(classes) if classes == 100 else np.arange(10)
    for part, files in enumerate(parts):
        for name in files:
            planes = np.tile(np.arange(len(labels))[:, None, None, None], (1, 3, 32, 32)) + part
            planes[:, :, 2, 5] = 255, 0, 0
            records = np.concatenate([np.full((len(labels), head - 1), 7), labels[:, None],
                                      planes.reshape(-1, 3072)], 1)
            (root / folder / name).write_bytes(records.astype(np.uint8).tobytes())
    return root / folder


@every("name, classes, n", [("cifar10", 10, 50), ("cifar100", 100, 100)])
def test_cifar_s_binary_files_hold_the_right_images_labels_names_and_test_set(
        name, classes, n, tmp_path):
    folder = make_cifar(tmp_path, classes)
    for root in (tmp_path, folder):
        d = data.load(name, root)
        assert (len(d.train), len(d.heldout), d.size, d.channels) == (n, n // (5 if n == 50 else 1),
                                                                      32, 3)
        assert d.class_names == [f"name{k}" for k in range(classes)]
    x, y = d.train.batch([8, 9])
    pixels = data.to_uint8(x)
    assert y.tolist() == [8, 9] and pixels[:, 9, 9].tolist() == [[8] * 3, [9] * 3]
    assert pixels[0, 2, 5].tolist() == [255, 0, 0] and pixels[0, 5, 2].tolist() == [8] * 3
    assert data.to_uint8(d.heldout.batch([3])[0])[0, 9, 9].tolist() == [4] * 3, "the test file's"


@every("damage, words", [
    (lambda f: (f / "test_batch.bin").unlink(), "lacks test_batch.bin; expected the binary"),
    (lambda f: (f / "batches.meta.txt").unlink(), "lacks batches.meta.txt"),
    (lambda f: [file.rename(file.with_suffix("")) for file in f.glob("data*.bin")],
     "holds the pickled version .data_batch_1., which is not read, since a pickle may run any"),
    (lambda f: shutil.move(f, f.with_name("cifar-10-batches-py")), "holds the pickled version"),
    (lambda f: (f / "data_batch_2.bin").write_bytes((f / "data_batch_2.bin").read_bytes()[:-9]),
     "data_batch_2.bin holds 30721 bytes, no whole number of records of 3073"),
    (lambda f: (f / "test_batch.bin").write_bytes(b""), "test_batch.bin holds 0 bytes"),
    (lambda f: (f / "test_batch.bin").write_bytes(bytes([10] * 3073)),
     "labels from 0 to 10; expected 0 to 9"),
    (lambda f: (f / "batches.meta.txt").write_text("cat dog"), "labels from 0 to 9; expected 0")])
def test_a_bad_cifar_file_is_one_line(damage, words, tmp_path):
    damage(make_cifar(tmp_path))
    with pytest.raises(ValueError, match=words) as error:
        data.load("cifar10", tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


ARRAYS = dict(images=PIXELS, labels=np.arange(40) % 4)


@every("given, channels, held, names", [          # without a split: the tenth of a class's ten
    ({}, 3, [36, 37, 38, 39], "0123"), (dict(images=PIXELS[..., 0]), 1, [36, 37, 38, 39], "0123"),
    (dict(split=np.arange(40) < 5), 3, range(5), "0123"),
    (dict(class_names=list("dcba")), 3, [36, 37, 38, 39], "dcba")])
def test_arrays_have_the_size_split_and_names_of_their_file(
        given, channels, held, names, tmp_path):
    np.savez(tmp_path / "a.npz", **{**ARRAYS, **given})
    d = data.load("arrays", tmp_path / "a.npz")
    assert (d.size, d.channels, d.grid, d.class_names) == (12, channels, 3, list(names))
    kept = [k for k in range(40) if k not in held]
    for part, index in ((d.train, kept), (d.heldout, held)):
        x, y = part.batch(range(len(part)))
        assert (data.to_uint8(x) == PIXELS[list(index)][..., :channels]).all()
        assert y.tolist() == [k % 4 for k in index]


@every("given, words", [
    (dict(images=PIXELS / 255.), r"from 0.0.* to .*: .images \* 255..round...astype"),
    (dict(images=PIXELS.astype(int)), r"from 2 to 254: images.astype.'uint8'"),
    (dict(images=PIXELS.transpose(0, 3, 1, 2)), r"channels come last: images.transpose.0, 2, 3"),
    (dict(images=PIXELS[:, :, :10]), "12x10, expected square ones"),
    (dict(images=PIXELS[..., [0, 1, 2, 0]]), "expected images, images uint8"),
    (dict(images=PIXELS[:30]), "labels int64 .40,.; expected"),
    (dict(labels=ARRAYS["labels"] + 1), "labels from 1 to 4; expected 0 to 3"),
    (dict(labels=ARRAYS["labels"] / 2), "labels float64"),
    (dict(labels=ARRAYS["labels"] * 10 ** 12), "labels from 0 to 3000000000000; expected 0 to 3"),
    (dict(labels=None), "labels are missing|holds Python objects"),
    (dict(class_names=["a", "b"]), "labels from 0 to 3; expected 0 to 1"),
    (dict(class_names=np.array(["a", None])), "class_names holds Python objects"),
    (dict(class_names=list("abcde")), "class 'e' of .* has no training"),
    (dict(split=np.arange(40)), "split is int64 .40,.; expected .40,. of 0"),
    (dict(split=np.zeros(3)), "split is float64 .3,."),
    (dict(split=np.zeros(40)), "split 1 of .* holds 0 images"),
    (dict(split=ARRAYS["labels"] == 1), "class '1' of .* has no training")])
def test_a_bad_file_of_arrays_is_one_line_that_says_what_to_do(given, words, tmp_path):
    np.savez(tmp_path / "a.npz", **{**ARRAYS, **given})
    with pytest.raises(ValueError, match=words) as error:
        data.load("arrays", tmp_path / "a.npz")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_class_names_have_one_unicode_form(tmp_path):
    for name in ("caf\u00e9", "cafe\u0301"):
        np.savez(tmp_path / "a.npz", images=np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8),
                 labels=np.zeros(4, int), class_names=np.array([name]))
        assert data.load("arrays", tmp_path / "a.npz").class_names == ["caf\u00e9"]


def test_images_of_0_and_1_are_warned_of_and_a_size_that_is_not_the_file_s_is_refused(
        tmp_path, capsys):
    np.savez(tmp_path / "a.npz", images=PIXELS % 2, labels=ARRAYS["labels"])
    data.load("arrays", tmp_path / "a.npz")
    assert "no value of images" in capsys.readouterr().err
    with pytest.raises(ValueError, match="12x12, expected 16x16, as --size"):
        data.load("arrays", tmp_path / "a.npz", size=16)


def test_a_set_from_files_is_trained_without_a_size_and_no_step_announces_no_loss(tmp_path):
    np.savez(tmp_path / "a.npz", **ARRAYS)
    mine = [train, "--dataset", "arrays", "--data_dir", tmp_path / "a.npz", "--out_dir",
            tmp_path / "r", "--steps", 0, "--device", "cpu"]
    text = done(*mine)
    assert "9 tokens of 48, 36 training and 4 held-out images, 4 classes" in text
    assert "loss" not in text and not (tmp_path / "r" / "loss.png").exists()
    assert Image.open(tmp_path / "r" / "samples.png").mode == "RGB"
    mine[mine.index("--steps") + 1] = 1
    done(*mine)
    assert "nothing to train" in done(*mine, "--size", 12), "the same run"
    np.savez(tmp_path / "a.npz", **{**ARRAYS, "images": PIXELS[..., 0]})
    refused("1 channels, not those that the model was trained on", sample, "--ckpt",
            tmp_path / "r", "--refine", "default", "--device", "cpu")
