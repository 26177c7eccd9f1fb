"""The data sets that users bring, and their files: formats that a reader of the method can skip.

shapes            procedural colour shapes; image k is a function of k
mnist             the idx files of MNIST, Fashion-MNIST, KMNIST, EMNIST
folder, ImageNet  class folders of images

Each loader gives train, heldout, class names; data.DATASETS says which flags it takes.
"""
import gzip
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data import ASSETS, ImageArray, heldout_mask

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


# ---------------------------------------------------------------- shapes

def bar(x, y):
    return np.maximum(np.abs(x) - 0.28, np.abs(y) - 0.95)


def star(x, y):
    turn, part = np.pi / 5, 2 * np.pi / 5                                 # 5 mirrored sectors
    angle = np.abs((np.arctan2(np.abs(x), -y) + turn) % part - turn)
    r, normal = np.hypot(x, y), np.array([0.42 * np.sin(turn), 1 - 0.42 * np.cos(turn)])
    across, along = normal / np.hypot(*normal)                            # of a side from (1, 0)
    return (r * np.cos(angle) - 1) * across + r * np.sin(angle) * along


# about the distance from (x, y) to the outline of a shape of radius 1, negative inside
SHAPES = {
    "circle": lambda x, y: np.hypot(x, y) - 0.95,
    "cross": lambda x, y: np.minimum(bar(x, y), bar(y, x)),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.72) - 0.23,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.8,
    "star": star,
    "triangle": lambda x, y: np.maximum(y - 0.6, 0.87 * np.abs(x) - 0.5 * y - 0.5)}


class Shapes(ImageArray):
    """Image k: shape k % 6 of random place, size, turn and colours, all drawn from (first + k)."""

    def __init__(self, n, size, first):
        self.n, self.size, self.first = n, size, first
        super().__init__(self, torch.arange(n) % len(SHAPES))       # images[k] draws image k

    def __getitem__(self, indices):
        return np.stack([self.draw(int(k)) for k in indices])

    def of_class(self, y, m):
        return torch.arange(y, self.n, len(SHAPES))[:m]

    def draw(self, k):
        rng, distance = np.random.default_rng(self.first + k), list(SHAPES.values())[k % 6]
        radius, turn = rng.uniform(0.5, 0.8), rng.uniform(-0.25, 0.25)
        centre = rng.uniform(radius - 1, 1 - radius, 2) * 0.9
        ink, paper = rng.uniform(0.45, 1, 3), rng.uniform(0, 0.35, 3)
        ink[rng.integers(3)] *= 0.3                                       # a colour, not a grey
        axis = (np.arange(self.size) + 0.5) / self.size * 2 - 1
        x, y = np.meshgrid(axis - centre[0], axis - centre[1])
        cos, sin = np.cos(turn), np.sin(turn)
        inside = distance((x * cos + y * sin) / radius, (y * cos - x * sin) / radius)
        cover = np.clip(0.5 - inside * radius * self.size / 2, 0, 1)[..., None]
        return np.round(255 * (cover * ink + (1 - cover) * paper)).astype(np.uint8)


def load_shapes(data_dir, size, tune=False):
    return Shapes(20_000, size, 0), Shapes(2_000, size, 10 ** 9 * (1 + tune)), SHAPES


# ---------------------------------------------------------------- MNIST's family

def load_mnist(data_dir, size):
    """The four idx files of MNIST's family, .gz or not; its test images are the held-out ones."""
    def find(kind):
        found = sorted(Path(data_dir).glob(f"*{kind}-ubyte*"), key=lambda f: "train" not in f.name)
        if ["train" in f.name for f in found] != [True, False]:
            raise ValueError(f"--data_dir {data_dir}: expected train-{kind}-ubyte and t10k-{kind}-"
                             f"ubyte, .gz or not, found {[f.name for f in found]}")
        return found

    splits = []
    for image_file, label_file in zip(find("images-idx3"), find("labels-idx1")):
        images, labels = read_idx(image_file, 3), read_idx(label_file, 1)
        if images.shape != (len(labels), size, size):
            raise ValueError(f"{image_file} holds images {images.shape}, expected ({len(labels)}, "
                             f"{size}, {size}): as many as labels, of --size")
        splits.append(ImageArray(images[..., None], labels.astype(np.int64)))
    return *splits, range(1 + max(int(s.labels.max()) for s in splits))


def read_idx(path, ndim):
    """The uint8 array of an idx file: 0, 0, type 8, ndim, then big-endian sizes, then the bytes."""
    raw, start = path.read_bytes(), 4 + 4 * ndim
    try:
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        if raw[:4] != bytes((0, 0, 8, ndim)):
            raise ValueError(f"it starts with {raw[:4].hex()}")
        shape = np.frombuffer(raw[4:start], ">u4")
        return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is no idx file of {ndim}-d bytes, or is truncated or damaged: "
                         f"{error}") from None


# ---------------------------------------------------------------- folders of images

def centre_crop(image, size):
    """ADM's crop: halve with a box filter while possible, bicubic to `size`, cut the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    shape = round(image.width * scale), round(image.height * scale)
    image = image.resize(shape, Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_image(path, size):
    """The crop of an image file, uint8 (size, size, 3)."""
    try:
        with Image.open(path) as image:
            return np.array(centre_crop(image.convert("RGB"), size))
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from None


def list_images(root, suffixes=SUFFIXES, heldout_share=0.1):
    """([(path, label, held out 0 or 1)], class names) of root/class/**/*.png, or of root/train/...
    and root/val/... if there is a root/train. Without root/val a share of each class is held out.
    """
    root, files = Path(root), []
    split = [p for p in (root / "train", root / "val") if p.is_dir()]
    parts = split if root / "train" in split else [root]
    for held, part in enumerate(parts):
        folders = sorted(d for d in part.glob("[!.]*") if d.is_dir())
        for folder in folders or [part]:
            found = sorted(f for f in folder.rglob("*") if f.suffix.lower() in suffixes)
            if not folders or not found:
                raise ValueError(f"{folder} is not a folder, or holds no images; expected {part}/"
                                 f"<class>/<image>, where an image ends in {', '.join(suffixes)}")
            files += [(f, folder.name, held) for f in found]

    train, val = ({name for _, name, h in files if h == held} for held in (0, 1))
    if val and train != val:
        raise ValueError(f"{root}/train and {root}/val must hold the same class folders; "
                         f"{min(train ^ val)} is in one of them only")
    called, number = dict(imagenet_classes()), {name: y for y, name in enumerate(sorted(train))}
    labels, held = [number[name] for _, name, _ in files], [h for _, _, h in files]
    held = held if val else heldout_mask(labels, heldout_share).astype(int)
    paths = [f for f, _, _ in files]
    return [*zip(paths, labels, held)], [called.get(name, name) for name in number]


def load_folder(root, size, max_bad=0.01):
    """Read, crop and hold a whole folder; unreadable files are named, too many are an error."""
    files, names = list_images(root)
    images, facts, bad = [], [], []
    for path, *about in tqdm(files, "reading images", leave=False, disable=len(files) < 500):
        try:
            images.append(read_image(path, size))
            facts.append(about)
        except (OSError, ValueError, SyntaxError) as error:
            bad.append(f"{path}: {error}")
    report_unreadable(bad, len(files), max_bad)
    images, (labels, held) = np.stack(images), np.array(facts).T
    trained = set(labels[held == 0])
    if len(trained) < len(names) or not held.any():
        few = [name for y, name in enumerate(names) if y not in trained] or names
        raise ValueError(f"class {few[0]!r} under {root} needs at least 2 readable images: one to "
                         "train on, one to hold out")
    return *(ImageArray(images[held == part], labels[held == part]) for part in (0, 1)), names


def report_unreadable(lines, total, max_bad):
    """Name the files that cannot be read; too many are an error."""
    if lines:
        print(f"WARNING: {len(lines)} of {total} images cannot be read and are left out:",
              *lines[:10], sep="\n  ", file=sys.stderr)
    if len(lines) > max_bad * total or len(lines) == total:
        raise ValueError(f"{len(lines)} of {total} images cannot be read (first: {lines[0]}), more "
                         f"than --max_bad {max_bad:g} allows; repair or remove them")


def imagenet_classes():
    """[(folder, names)] of the 1000 classes in order: ("n01440764", "tench, Tinca tinca") ..."""
    lines = (ASSETS / "imagenet_classes.txt").read_text().splitlines()
    return [tuple(line.split(" ", 1)) for line in lines]
