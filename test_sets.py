"""Tests of the data sets that users bring: `pytest test_sets.py`."""
import gzip
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import data
import sets
import train
from test_core import every
from test_programs import refused


# ================================================================ shapes

def test_shape_k_is_a_function_of_k_and_held_out_shapes_are_others():
    a, b = data.load("shapes", size=16), data.load("shapes", size=16)
    x, y = a.train.batch([5, 11, 5])
    assert torch.equal(x, b.train.batch([5, 11, 5])[0]) and torch.equal(x[0], x[2])
    assert y.tolist() == [5, 5, 5] and not torch.equal(x[0], x[1])
    seen, unseen = (part.batch(range(300))[0].flatten(1) for part in (a.train, a.heldout))
    assert torch.cdist(seen, unseen).min() > 0.1


# ================================================================ folders, MNIST's family

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


def test_the_crop_is_central_and_exact_on_multiples():
    pixels = np.random.default_rng(0).integers(0, 255, (32, 64, 3), dtype=np.uint8)
    out = np.asarray(sets.centre_crop(Image.fromarray(pixels), 16), dtype=float)
    box = pixels.astype(float).reshape(16, 2, 32, 2, 3).mean((1, 3))[:, 8:24]
    assert np.abs(out - box).max() <= 1, "one halving by BOX, the centre; rounding costs 1"


def idx(array):
    head = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    return head + array.tobytes()


def make_mnist(root, zipped=False):
    """Four idx files of 6 and 4 images of 28x28: image k is all k, its label k % 3."""
    root.mkdir()
    for name, n in (("train", 6), ("t10k", 4)):
        k = np.arange(n, dtype=np.uint8)
        images = np.tile(k[:, None, None], (1, 28, 28))
        for kind, array in (("images-idx3", images), ("labels-idx1", k % 3)):
            raw = gzip.compress(idx(array)) if zipped else idx(array)
            (root / f"{name}-{kind}-ubyte{'.gz' * zipped}").write_bytes(raw)
    return root / "train-images-idx3-ubyte"


@every("zipped", [True, False])
def test_idx_files_hold_the_right_images_and_labels_and_their_own_test_set(zipped, tmp_path):
    d = data.load("mnist", make_mnist(tmp_path / "m", zipped).parent)
    assert (len(d.train), len(d.heldout), d.class_names, d.grid) == (6, 4, ["0", "1", "2"], 7)
    x, y = d.train.batch([4, 5])
    assert x.shape == (2, 1, 28, 28) and y.tolist() == [1, 2]
    assert data.to_uint8(x)[:, 3, 9, 0].tolist() == [4, 5]


@every("damage, words", [
    (lambda f: f.write_bytes(b"\0\0\x0d\x03" + f.read_bytes()[4:]), "starts with 00000d03"),
    (lambda f: f.write_bytes(f.read_bytes()[:-100]), "truncated"),
    (lambda f: f.write_bytes(f.read_bytes()[:10]), "truncated"),
    (lambda f: f.write_bytes(f.read_bytes()[:2]), "starts with 0000"),
    (lambda f: f.write_bytes(gzip.compress(f.read_bytes())[:-40]), "damaged"),
    (lambda f: f.write_bytes(b"\x1f\x8b\x08" + bytes(99)), "damaged"),
    (lambda f: f.write_bytes(idx(np.zeros((5, 28, 28), np.uint8))), "expected .6, 28, 28."),
    (lambda f: f.write_bytes(idx(np.zeros((6, 20, 20), np.uint8))), "expected .6, 28, 28."),
    (lambda f: f.unlink(), "expected train-images-idx3-ubyte"),
    (lambda f: shutil.copy(f, f.with_name(f"{f.name}.old")), "expected train-images-idx3")])
def test_a_bad_idx_file_is_one_line(damage, words, tmp_path):
    damage(make_mnist(tmp_path / "m"))
    with pytest.raises(ValueError, match=words) as error:
        data.load("mnist", tmp_path / "m")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


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
