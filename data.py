"""Data sets as uint8 images with labels, their order, and the command-line manners that all programs share.

Every data set offers `train` and `heldout`, each with len() and batch(indices) -> images (B, ch, H, W) in
[-1, 1], labels (B,). Nothing here is random at run time: the order of an epoch is a function of
(seed, epoch), so that any step can be resumed and any number of processes can share it.

digits    2880 handwritten digits (assets/digits.npz; E. Alpaydin, C. Kaynak 1998, UCI Machine Learning
          Repository, https://doi.org/10.24432/C50P49, CC BY 4.0), grey, 16x16 or 32x32
shapes    procedural colour shapes; image k is a function of k, so there are as many as you like
folder    your own images: root/class/*.png
imagenet256, imagenet512   latents of KL-16 (see vae.py)
"""
import argparse
import difflib
import os
import sys
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

ASSETS = Path(__file__).parent / "assets"
DATASETS = ("digits", "shapes", "folder", "imagenet256", "imagenet512")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


# ---------------------------------------------------------------- tokens

def patchify(images, patch):
    """(B, ch, H, W) -> tokens (B, N, ch * patch^2), raster order, channel first within a token (as in MAR)."""
    B, ch, H, W = images.shape
    x = images.reshape(B, ch, H // patch, patch, W // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, (H // patch) * (W // patch), ch * patch * patch)


def unpatchify(x, patch):
    """Tokens (B, N, ch * patch^2) of a square image -> (B, ch, H, W)."""
    B, N, D = x.shape
    grid, ch = round(N ** 0.5), D // patch ** 2
    x = x.reshape(B, grid, grid, ch, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(B, ch, grid * patch, grid * patch)


def to_uint8(images):
    """(B, ch, H, W) in [-1, 1] -> uint8 (B, H, W, ch), rounded to the nearest."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def image_grid(images, columns, gap=1):
    """uint8 (n, H, W, ch) -> one PIL picture with `columns` images a row, magnified to be seen."""
    n, H, W, ch = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (H + gap) + gap, columns * (W + gap) + gap, ch), 128, dtype=np.uint8)
    for k, image in enumerate(images):
        r, s = gap + k // columns * (H + gap), gap + k % columns * (W + gap)
        sheet[r:r + H, s:s + W] = image
    zoom = max(1, round(48 / H))
    return Image.fromarray(sheet.squeeze()).resize((sheet.shape[1] * zoom, sheet.shape[0] * zoom), Image.NEAREST)


# ---------------------------------------------------------------- order

@lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    """The permutation of 0 .. n-1 in which epoch `epoch` visits the data."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def batch_indices(step, global_batch, n, seed):
    """Which images the optimiser step `step` sees (global_batch,): a pure function, so nothing needs saving."""
    at = torch.arange(step * global_batch, (step + 1) * global_batch)
    return torch.cat([epoch_order(n, seed, int(e))[at[at // n == e] % n] for e in (at // n).unique()])


# ---------------------------------------------------------------- the sets

class ImageArray:
    """Images held in memory: uint8 (n, H, W, ch) and labels (n,)."""

    def __init__(self, images, labels):
        self.images, self.labels = images, torch.as_tensor(labels, dtype=torch.long)

    def __len__(self):
        return len(self.images)

    def batch(self, indices):
        indices = torch.as_tensor(indices)
        images = torch.from_numpy(self.images[indices.numpy()]).permute(0, 3, 1, 2)
        return images.float() / 127.5 - 1, self.labels[indices]

    def of_class(self, y, m):
        """Indices of at most m images of class y, spread over the set (neighbours in it may be by one hand)."""
        found = (self.labels == y).nonzero().flatten()
        return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:m]]


SHAPES = ("circle", "cross", "ring", "square", "star", "triangle")


class Shapes:
    """Image k: shape k % 6 of random place, size, turn and colours, all drawn from (first + k)."""

    def __init__(self, n, size, first):
        self.n, self.size, self.first = n, size, first

    def __len__(self):
        return self.n

    def batch(self, indices):
        images, labels = zip(*(self.draw(int(k)) for k in indices))
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1, torch.tensor(labels)

    def of_class(self, y, m):
        return torch.arange(y, self.n, len(SHAPES))[:m]

    def draw(self, k):
        rng = np.random.default_rng(self.first + k)
        label = k % len(SHAPES)
        radius, turn = rng.uniform(0.5, 0.8), rng.uniform(-0.25, 0.25)
        centre = rng.uniform(radius - 1, 1 - radius, 2) * 0.9
        ink, paper = rng.uniform(0.45, 1, 3), rng.uniform(0, 0.35, 3)
        ink[rng.integers(3)] *= 0.3                                       # a colour, not a grey
        axis = (np.arange(self.size) + 0.5) / self.size * 2 - 1
        x, y = np.meshgrid(axis - centre[0], axis - centre[1])
        x, y = (x * np.cos(turn) + y * np.sin(turn)) / radius, (y * np.cos(turn) - x * np.sin(turn)) / radius
        cover = np.clip(0.5 - signed_distance(SHAPES[label], x, y) * radius * self.size / 2, 0, 1)[..., None]
        return np.round(255 * (cover * ink + (1 - cover) * paper)).astype(np.uint8), label


def signed_distance(shape, x, y):
    """About the distance from (x, y) to the outline of a shape of radius 1, negative inside."""
    r = np.hypot(x, y)
    if shape == "circle":
        return r - 0.95
    if shape == "ring":
        return np.abs(r - 0.72) - 0.23
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.8
    if shape == "cross":
        return np.minimum(np.maximum(np.abs(x) - 0.28, np.abs(y) - 0.95), np.maximum(np.abs(x) - 0.95, np.abs(y) - 0.28))
    if shape == "triangle":
        return np.maximum(y - 0.6, 0.87 * np.abs(x) - 0.5 * y - 0.5)
    angle = np.abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)      # star: 5 mirrored sectors
    tip, notch = np.array([1.0, 0.0]), 0.42 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    normal = np.array([tip[1] - notch[1], notch[0] - tip[0]])
    normal = -normal / np.hypot(*normal)
    return (r * np.cos(angle) - tip[0]) * normal[0] + r * np.sin(angle) * normal[1]


def centre_crop(image, size):
    """ADM's crop: halve with a box filter while possible, bicubic to `size`, cut the centre; a PIL image -> PIL."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def scan_folder(root):
    """[(path, label)] and the class names of root/class/*.png, both sorted."""
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"--data_dir {root} is not a folder; expected {root}/<class name>/<image>.png")
    names = sorted(d.name for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    files = [(path, label) for label, name in enumerate(names)
             for path in sorted((root / name).rglob("*")) if path.suffix.lower() in SUFFIXES]
    empty = [name for label, name in enumerate(names) if not any(l == label for _, l in files)]
    if not files:
        raise ValueError(f"no images under {root}; expected {root}/<class name>/*.png (or {', '.join(SUFFIXES[1:])})")
    if empty:
        raise ValueError(f"{root}/{empty[0]} holds no images ({len(empty)} empty class folders); remove it or fill it")
    return files, names


def load_folder(root, size, max_bad, heldout_share=0.1):
    """Read, crop and hold a whole folder; unreadable files are named, and too many are an error."""
    files, names = scan_folder(root)
    images, labels, bad = [], [], []
    for path, label in tqdm(files, desc="reading images", leave=False, disable=len(files) < 500):
        try:
            with Image.open(path) as image:
                images.append(np.asarray(centre_crop(image.convert("RGB"), size)))
            labels.append(label)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            bad.append(f"{path}: {error}")
    if bad:
        print(f"WARNING: {len(bad)} of {len(files)} images cannot be read and are left out:", *bad[:10], sep="\n  ", file=sys.stderr)
        if len(bad) > max_bad * len(files):
            raise ValueError(f"{len(bad)} of {len(files)} images under {root} cannot be read (first: {bad[0]}), "
                             f"more than --max_bad {max_bad:g} allows; repair or remove them")
    images, labels = np.stack(images), np.array(labels)
    # the held-out share of each class is spread evenly over its sorted files
    rank = np.concatenate([np.arange((labels == c).sum()) for c in range(len(names))])
    every = round(1 / heldout_share)
    held = rank % every == every - 1
    if not held.any():
        held = rank == np.array([(labels == c).sum() - 1 for c in range(len(names))])[labels]
    for c, name in enumerate(names):
        if not ((labels == c) & ~held).any():
            raise ValueError(f"class {name!r} under {root} has {(labels == c).sum()} readable image(s): "
                             "at least 2 are needed, one to train on and one to hold out")
    return ImageArray(images[~held], labels[~held]), ImageArray(images[held], labels[held]), names


@dataclass
class Data:
    """A data set and the facts of it that a checkpoint must carry."""
    name: str
    train: object
    heldout: object
    class_names: list
    size: int                       # pixels of a side
    channels: int
    patch: int                      # pixels of a token's side
    x0_bound: float | None = 1.0    # tokens lie within +- this
    facts: dict = field(default_factory=dict)

    @property
    def token_dim(self):
        return self.channels * self.patch ** 2

    @property
    def grid(self):
        return self.size // self.patch


def load(name, data_dir=None, size=16, patch=4, max_bad=0.01):
    """A Data by name. Raises ValueError for a bad size, path or file."""
    if name.startswith("imagenet"):
        raise ValueError(f"--dataset {name} trains on latents of KL-16: it needs --data_dir <ImageNet>/train (1000 folders) and "
                         "--vae kl16.ckpt; the latent path is not part of this version yet. For your own images use --dataset folder")
    if size % patch:
        raise ValueError(f"--size {size} must be a multiple of --patch {patch}")
    if name == "digits":
        train, heldout, names, channels = load_digits(size)
    elif name == "shapes":
        train, heldout, names, channels = Shapes(20_000, size, 0), Shapes(2_000, size, 10 ** 9), list(SHAPES), 3
    elif name == "folder":
        if data_dir is None:
            raise ValueError("--dataset folder needs --data_dir ROOT with ROOT/<class name>/*.png")
        (train, heldout, names), channels = load_folder(data_dir, size, max_bad), 3
    else:
        raise ValueError(f"unknown data set {name!r}; choose one of {', '.join(DATASETS)}")
    facts = {"dataset": name, "size": size, "channels": channels, "patch": patch, "n_train": len(train), "n_heldout": len(heldout)}
    return Data(name, train, heldout, [str(n) for n in names], size, channels, patch, facts=facts)


def load_digits(size):
    if size not in (16, 32):
        raise ValueError(f"--size {size}: the digits come in 16 or 32 pixels")
    with np.load(ASSETS / "digits.npz") as z:
        bits, labels, split = np.unpackbits(z["bitmaps"], axis=-1), z["labels"], z["split"]
    if size == 16:
        bits = bits.reshape(-1, 16, 2, 16, 2).mean((2, 4))
    images = np.round(255 * bits).astype(np.uint8)[..., None]
    return (*(ImageArray(images[split == s], labels[split == s]) for s in (0, 1)), range(10), 1)


# ---------------------------------------------------------------- command line

class Parser(argparse.ArgumentParser):
    """argparse with defaults in --help, no abbreviations, and the closest match for a mistyped flag."""

    def __init__(self, **kw):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kw)

    def parse_args(self, args=None, namespace=None):
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            close = difflib.get_close_matches(unknown[0].split("=")[0], list(self._option_string_actions), 1)
            self.error(f"unknown argument {unknown[0]}" + (f"; did you mean {close[0]}?" if close else "; see --help"))
        return known

    def error(self, message):
        sys.exit(bad_input(message))


def bad_input(message):
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    return 2


def number(kind, low, high=float("inf")):
    """An argparse type: a number between low and high, both allowed."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole number' if kind is int else 'a number'}")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range: " + (f"at least {low}" if high == float("inf") else f"{low} to {high}"))
        return value
    return parse


def run(main):
    """Run a program: bad input (ValueError, OSError) is one line on stderr and exit code 2; TRACEBACK=1 shows where."""
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        sys.exit(bad_input(" ".join(str(error).split())))
