"""The data sets that users bring, and their files: formats that a reader of the method can skip.

shapes             procedural colour shapes; image k is a function of k
mnist              the idx files of MNIST, Fashion-MNIST, KMNIST, EMNIST
cifar10, cifar100  the binary version
arrays             an npz of images and labels
folder, ImageNet   class folders of images

Each loader gives train, heldout, class names; data.DATASETS says which flags it takes. A test split
of a set's own is what is held out.
"""
import functools
import gzip
import os
import re
import sys
import zlib
from collections import Counter
from pathlib import Path
from unicodedata import normalize

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from data import ASSETS, ImageArray, load_digits
from files import checked_images, read_npz, walk

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@functools.cache
def say(message):
    """Print a note, each once, and by the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(message, file=sys.stderr)


def heldout_mask(labels, share):
    """Which images (n,) bool are held out: `share` of each class, spread evenly over its images."""
    labels, every = np.asarray(labels), round(1 / share)
    classes = [np.flatnonzero(labels == y) for y in np.unique(labels)]
    held = np.concatenate([at[every - 1::every] for at in classes])
    if not len(held):                                   # small classes: the last of each
        held = [at[-1] for at in classes]
    return np.isin(np.arange(len(labels)), held)


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


def load_shapes(data_dir, size, first_heldout=10 ** 9):
    return Shapes(20_000, size, 0), Shapes(2_000, size, first_heldout), SHAPES


# ---------------------------------------------------------------- without the held-out images

load_shapes_tune = functools.partial(load_shapes, first_heldout=2 * 10 ** 9)


def load_digits_tune(data_dir, size):
    """The digits' training images; of these the last third, as neighbours may be by one hand."""
    whole, _, names = load_digits(data_dir, size)
    cut = len(whole) * 2 // 3
    return *(ImageArray(whole.images[part], whole.labels[part])
             for part in (slice(cut), slice(cut, None))), names


# ---------------------------------------------------------------- the field's small sets

def image_array(images, labels, source, size):
    """The ImageArray of images uint8 (n, H, W, C) and labels (n,) that were read from `source`;
    ValueError unless they are square, of `size` if that is given, and as many as labels."""
    n, H, W, _ = images.shape
    if n != len(labels) or n == 0:
        raise ValueError(f"{source} holds {n} images and {len(labels)} labels")
    if H != W or size not in (None, H):
        raise ValueError(f"{source} holds images of {H}x{W}, expected " + (
            f"{size}x{size}, as --size or the training images have it" if size else "square ones"))
    return ImageArray(images, labels.astype(np.int64))


IDX = re.compile(r"(?:(.+)-)?(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(?:\.gz)?")


def find_idx(data_dir):
    """({("train" or "test", "images" or "labels"): file}, what their names begin with, or None) of
    the idx files in a folder, or of those whose path begins with data_dir."""
    root, found = Path(data_dir), {}
    root, only = (root, None) if root.is_dir() else (root.parent, root.name)
    for path in sorted(root.glob("*"), reverse=True):                # an unpacked one beats its .gz
        named = IDX.fullmatch(path.name)
        if named and only in (None, named[1]):
            split = "train" if named[2] == "train" else "test"
            found.setdefault(named[1], {})[split, named[3]] = path
    if len(found) > 1:
        names = sorted(name or "" for name in found)
        raise ValueError(f"--data_dir {data_dir} holds {len(found)} sets ({', '.join(names)}); say "
                         f"which, as in --data_dir {root / names[-1]}")
    name, files = found.popitem() if found else (None, {})
    missing = [f"{s} {kind}" for s in ("train", "test") for kind in ("images", "labels")
               if (s, kind) not in files]
    if missing:
        raise ValueError(f"--data_dir {data_dir} has no {missing[0]}: expected train-images-idx3-"
                         "ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-"
                         f"ubyte, .gz or not, found {sorted(p.name for p in files.values())}")
    return files, name


def load_mnist(data_dir, size):
    """The four idx files of MNIST's family, .gz or not; its test images are the held-out ones.

    EMNIST's are published transposed, and its letters have labels from 1: both are put right, and
    its classes named by its mapping file. Other sets' names are in no file of theirs.
    """
    files, name = find_idx(data_dir)
    emnist, splits = (name or "").startswith("emnist"), []
    for split in ("train", "test"):
        images, labels = read_idx(files[split, "images"], 3), read_idx(files[split, "labels"], 1)
        images = images.swapaxes(1, 2) if emnist else images
        labels = labels.astype(np.int64) - (name == "emnist-letters")          # 1 to 26
        splits.append(image_array(images[..., None], labels, files[split, "images"], size))
        size = images.shape[1]
    names = range(len(np.unique(np.concatenate([s.labels for s in splits]))))
    mapping = files["train", "labels"].with_name(f"{name}-mapping.txt")
    if emnist and mapping.exists():
        names = read_mapping(mapping)
    return *splits, names


def read_mapping(path):
    """The names of EMNIST's classes: a line a class, its label and the codes of its characters."""
    try:
        lines = [[int(code) for code in line.split()] for line in path.read_text().splitlines()]
        return ["".join(map(chr, line[1:])) for line in lines if line]
    except (ValueError, OverflowError):
        raise ValueError(f"{path} is no mapping of EMNIST: expected lines of a label and character "
                         "codes, such as 10 65 97") from None


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


CIFAR = {10: ("cifar-10-batches-bin", "batches.meta.txt", 1,
              [f"data_batch_{k}.bin" for k in range(1, 6)], ["test_batch.bin"]),
         100: ("cifar-100-binary", "fine_label_names.txt", 2, ["train.bin"], ["test.bin"])}


def load_cifar(data_dir, size, classes):
    """CIFAR-10 or -100, binary: records of a label (100: a coarse one first), 3 planes of 32x32."""
    folder, meta, head, *parts = CIFAR[classes]
    root = Path(data_dir)
    root = root / folder if (root / folder).is_dir() else root
    pickled = [name for name in ("cifar-10-batches-py", "cifar-100-python", "data_batch_1", "meta")
               if (root / name).exists()]
    for name in [meta, *parts[0], *parts[1]]:
        if not (root / name).is_file():
            raise ValueError(f"{root} lacks {name}" + (
                f" and holds the pickled version ({pickled[0]}), which is not read, since a "
                "pickle may run any code" if pickled else "") + "; expected the binary version, "
                f"{folder} of cifar-{classes}-binary.tar.gz (cs.toronto.edu/~kriz/cifar.html)")
    splits = []
    for part in parts:
        data = b"".join(whole_records(root / name, head + 3072) for name in part)
        data = np.frombuffer(data, np.uint8).reshape(-1, head + 3072)
        images = data[:, head:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        splits.append(image_array(np.ascontiguousarray(images), data[:, head - 1], root, size))
    return *splits, (root / meta).read_text().split()


load_cifar10, load_cifar100 = (functools.partial(load_cifar, classes=k) for k in CIFAR)


def whole_records(path, length):
    raw = path.read_bytes()
    if not raw or len(raw) % length:
        raise ValueError(f"{path} holds {len(raw)} bytes, no whole number of records of {length}: "
                         "it is truncated, or another file")
    return raw


def load_arrays(data_dir, size):
    """An npz: images uint8 (N, H, W) or (N, H, W, C), labels (N,) from 0 up, and, if they are
    there, class_names (K,) and split (N,): 0 to train on, 1 held out (else a tenth a class)."""
    z = read_npz(data_dir)
    if "images" in z and z["images"].ndim == 3:
        z["images"] = z["images"][..., None]
    images, labels = checked_images(z, data_dir, "images", "labels")
    if labels is None:
        raise ValueError(f"{data_dir} holds {', '.join(z)}: labels are missing, the class number "
                         "of each image")
    held = z["split"] if "split" in z else heldout_mask(labels, 0.1)
    if held.shape != labels.shape or not np.isin(held, (0, 1)).all():
        raise ValueError(f"{data_dir}: split is {held.dtype} {held.shape}; expected {labels.shape} "
                         "of 0 (to train on) and 1 (held out)")
    names = z.get("class_names", np.arange(len(np.unique(labels)))).astype(str)
    if names.ndim != 1:
        raise ValueError(f"{data_dir}: class_names is {names.shape}; expected a name a class")
    return *(image_array(images[held == s], labels[held == s],
                         f"split {s} of {data_dir}", size) for s in (0, 1)), [
        normalize("NFC", name) for name in names]


# ---------------------------------------------------------------- an image file

def open_image(path, paper=255, published=False):
    """An image file as it is seen, RGB: turned as its EXIF orientation says, transparent parts in
    the grey of the paper (0 to 255). 16 bits and floats in [0, 1] are scaled to 8 bits.

    published: as ADM reads ImageNet, where orientation and transparency do not count. Raises
    ValueError if it cannot be read whole, or its values have no known white.
    """
    try:
        with Image.open(path) as image:
            if published:
                return image.convert("RGB")
            if getattr(image, "is_animated", False):
                say("note: of image files with several pictures the first is taken")
            tags, image.filename = getattr(image, "tag_v2", {}), ""     # of TIFF; see below
            bits, inverted = tags.get(258, (16,))[0], tags.get(262) == 0
            # a file without a name is not mapped: Pillow 13 would map turned TIFFs as if upright
            return in_rgb(ImageOps.exif_transpose(image), paper, bits, inverted)
    except Exception as error:                          # Pillow has no class for what it may meet
        why = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()
        raise ValueError(f"{path} cannot be read as an image: {why[0]}") from None


def in_rgb(image, paper, bits=16, inverted=False):
    """An image of any mode as 8-bit RGB, see open_image. Of more than 8 bits, which Pillow leaves
    as they are: bits: of a value, up to 16; inverted: whether 0 is white."""
    if image.mode == "F" or image.mode.startswith("I"):
        # what 32-bit integers call white nobody knows
        values, white = np.asarray(image).astype(float), {"F": 1, "I": -1}.get(image.mode,
                                                                             2 ** bits - 1)
        if not (0 <= values.min() and values.max() <= white):               # nor NaN
            raise ValueError(f"mode {image.mode}, values from {values.min():g} to "
                             f"{values.max():g}; expected 8 or 16 bits, or floats from 0 to 1")
        light = 1 - values / white if inverted else values / white
        grey = np.where(values == image.info.get("transparency"), paper, light * 255)
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if paper == 255 and image.getextrema()[3][0] < 255:
            say("note: where images are transparent they become white")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*3 * [paper], 255)), image)
    return image.convert("RGB")


def centre_crop(image, size):
    """ADM's crop: halve with a box filter while possible, bicubic to `size`, cut the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    shape = round(image.width * scale), round(image.height * scale)
    image = image.resize(shape, Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_image(path, size, published=False):
    """The crop of an image file, uint8 (size, size, 3); see open_image."""
    return np.array(centre_crop(open_image(path, published=published), size))


# ---------------------------------------------------------------- folders of images

def list_images(root, suffixes=SUFFIXES, heldout_share=0.1):
    """([(path, label, held out 0 or 1)], class names) of root/class/**/*.png, or of root/train/...
    and root/val/... if there is a root/train. Without root/val a share of each class is held out.
    Links are followed; what is left out is counted in one line.
    """
    root, files, left = Path(root), [], Counter()
    parts = split_folders(root)
    for held, part in enumerate(parts):
        folders = [p for p in visible(part, left) if p.is_dir()]
        left["beside the class folders"] += sum(not p.is_dir() for p in visible(part))
        for folder in folders or [part]:
            found = [] if folder == part else [*images_under(folder, suffixes, left)]
            if not found:
                raise ValueError(f"{folder} is not a folder, or holds no images; expected {part}/"
                                 f"<class>/<image>, where an image ends in {', '.join(suffixes)}")
            files += [(f, normalize("NFC", folder.name), held) for f in found]
    if parts != [root]:
        left["beside train and val"] = sum(p not in parts for p in visible(root, left))
    if +left:
        what = ", ".join(f"{n} {where}" for where, n in (+left).items())
        say(f"note: files and folders under {root} that are left out: {what}")

    train, val = ({name for _, name, h in files if h == held} for held in (0, 1))
    if val and train != val:
        raise ValueError(f"{parts[0]} and {parts[1]} must hold the same class folders; "
                         f"{min(train ^ val)} is in one of them only")
    called, number = dict(imagenet_classes()), {name: y for y, name in enumerate(sorted(train))}
    labels, held = [number[name] for _, name, _ in files], [h for _, _, h in files]
    held = held if val else heldout_mask(labels, heldout_share).astype(int)
    paths = [f for f, _, _ in files]
    return [*zip(paths, labels, held)], [called.get(name, name) for name in number]


def visible(folder, left=None):
    """The entries of a folder in order but for hidden ones, which are counted."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    shown = [p for p in entries if not p.name.startswith(".")]
    if left is not None:
        left["hidden"] += len(entries) - len(shown)
    return shown


def split_folders(root):
    """[root/train, root/val], as far as they are there, or [root] if it is no split: a class may
    be called "train", beside other classes."""
    named = {p.name.lower(): p for p in visible(root) if p.is_dir()}
    alone = named.keys() <= {"train", "val", "valid", "validation", "test"}
    if "train" in named and (alone or any(p.is_dir() for p in visible(named["train"]))):
        return [named[name] for name in ("train", "val") if name in named]
    return [root]


def images_under(folder, suffixes, left):
    """The image files of a class; what else it holds is counted."""
    for file in walk(folder):
        if file.suffix.lower() in suffixes and not file.name.startswith("."):
            yield file
        else:
            left["hidden" if file.name.startswith(".") else "of another kind"] += 1


def load_folder(root, size, max_bad=0.01):
    """Read, crop and hold a whole folder, grey if all its images are; unreadable files are named,
    too many are an error."""
    files, names = list_images(root)
    images, facts, bad = [], [], []
    for path, *about in tqdm(files, "reading images", leave=False, disable=len(files) < 500):
        try:
            images.append(read_image(path, size))
            facts.append(about)
        except ValueError as error:
            bad.append(str(error))
    report_unreadable(bad, len(files), max_bad)
    images, (labels, held) = np.stack(images), np.array(facts).T
    if (images == images[..., :1]).all():
        images = images[..., :1]
    return *(ImageArray(images[held == part], labels[held == part]) for part in (0, 1)), names


def report_unreadable(lines, total, max_bad):
    """Name the files that cannot be read; too many are an error."""
    if lines:
        print(f"WARNING: {len(lines)} of {total} images cannot be read and are left out:",
              *lines[:10], sep="\n  ", file=sys.stderr)
    if len(lines) == total:
        raise ValueError(f"none of {total} images can be read (first: {lines[0]})")
    if len(lines) > max_bad * total:
        raise ValueError(f"{len(lines)} of {total} images cannot be read (first: {lines[0]}), more "
                         f"than --max_bad {max_bad:g} allows; repair or remove them")


def imagenet_classes():
    """[(folder, names)] of the 1000 classes in order: ("n01440764", "tench, Tinca tinca") ..."""
    lines = (ASSETS / "imagenet_classes.txt").read_text().splitlines()
    return [tuple(line.split(" ", 1)) for line in lines]


def find_class(word, names):
    """The class number of a name, number, ImageNet id or part of a name; the first rule that finds
    any must find one only. Classes called 1, 2, 3 are meant by name alone."""
    if re.fullmatch("n[0-9]{8}", word):
        word = dict(imagenet_classes()).get(word, word)
    form = lambda text: normalize("NFC", text)             # some letters have two
    word, low = form(word), form(word).lower()
    rules = (lambda k, name: name == word, lambda k, name: str(k) == word,
             lambda k, name: low in name.lower().split(", "), lambda k, name: low in name.lower())
    for rule in rules[:1] if all(name.isdecimal() for name in names) else rules:
        found = [k for k, name in enumerate(names) if rule(k, form(name))]
        if len(found) == 1:
            return found[0]
        if found:
            which = "; ".join(f"{k} {names[k]}" for k in found[:12])
            raise ValueError(f"--classes {word!r} may be any of {which} ({len(found)} classes): "
                             "give the number")
    raise ValueError(f"--classes {word}: this checkpoint knows {', '.join(names[:20])} "
                     f"({len(names)} classes)")
