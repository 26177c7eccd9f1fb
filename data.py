"""Data sets as uint8 images with labels, their order, and the manners that all programs share.

A data set has `train` and `heldout`, each with len(), of_class(y, m) and batch(indices, key) ->
images (B, ch, H, W) in [-1, 1] (or scaled latents), labels (B,). Nothing here is random at run
time: the order of an epoch is a function of (seed, epoch), so that any step can be resumed and any
number of processes can share it.

digits    2880 handwritten digits (assets/digits.npz; E. Alpaydin, C. Kaynak 1998, UCI Machine
          Learning Repository, https://doi.org/10.24432/C50P49, CC BY 4.0), grey, 16x16 or 32x32
shapes    procedural colour shapes; image k is a function of k
mnist     the idx files of MNIST, Fashion-MNIST, KMNIST ..., grey
folder    your own images: root/class/*.png, as pixels or, with a VAE, as latents
imagenet256, imagenet512   latents of KL-16 (vae.py), encoded once into a cache (latents.py)

To add a data set: a function (data_dir, size) -> train, heldout, class names, and its line in
DATASETS.
"""
import argparse
import difflib
import gzip
import hashlib
import os
import sys
import time
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

ASSETS = Path(__file__).parent / "assets"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


# ---------------------------------------------------------------- tokens

def patchify(images, patch):
    """(B, ch, H, W) -> tokens (B, N, ch * patch^2) in raster order, channel first (as in MAR)."""
    B, ch, H, W = images.shape
    x = images.reshape(B, ch, H // patch, patch, W // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, H * W // patch ** 2, ch * patch * patch)


def unpatchify(x, patch):
    """Tokens (B, N, ch * patch^2) of a square image -> (B, ch, H, W)."""
    B, N, D = x.shape
    grid, ch = round(N ** 0.5), D // patch ** 2
    x = x.reshape(B, grid, grid, ch, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(B, ch, grid * patch, grid * patch)


def to_uint8(images):
    """(B, ch, H, W) in [-1, 1] -> uint8 (B, H, W, ch), rounded to the nearest."""
    if not images.isfinite().all():
        raise ValueError("the model gave images that are not finite: is the checkpoint damaged, "
                         "or --cfg_scale or --temperature extreme?")
    images = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return images.permute(0, 2, 3, 1).cpu().numpy()


def image_grid(images, columns, gap=1):
    """uint8 (n, H, W, ch) -> one PIL picture with `columns` images a row, magnified to be seen."""
    n, H, W, ch = images.shape
    rows = -(-n // columns)
    shape = (rows * (H + gap) + gap, columns * (W + gap) + gap, ch)
    sheet = np.full(shape, 128, dtype=np.uint8)
    for k, image in enumerate(images):
        r, s = gap + k // columns * (H + gap), gap + k % columns * (W + gap)
        sheet[r:r + H, s:s + W] = image
    zoom = max(1, round(48 / H))
    picture = Image.fromarray(sheet.squeeze())
    return picture.resize((shape[1] * zoom, shape[0] * zoom), Image.NEAREST)


# ---------------------------------------------------------------- order

@lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    """The permutation of 0 .. n-1 in which epoch `epoch` visits the data."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator)


def batch_indices(step, global_batch, n, seed):
    """Which images optimiser step `step` sees (global_batch,): a pure function, nothing to save."""
    at = torch.arange(step * global_batch, (step + 1) * global_batch)
    parts = [epoch_order(n, seed, int(e))[at[at // n == e] % n] for e in (at // n).unique()]
    return torch.cat(parts)


def of_class(labels, y, m):
    """At most m indices of class y, spread over the set, where neighbours may be by one hand."""
    found = (labels == y).nonzero().flatten()
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:m]]


# ---------------------------------------------------------------- the sets

class ImageArray:
    """Images held in memory: uint8 (n, H, W, ch) and labels (n,)."""

    def __init__(self, images, labels):
        self.images, self.labels = images, torch.as_tensor(labels, dtype=torch.long)

    def __len__(self):
        return len(self.images)

    def batch(self, indices, key=None):
        indices = torch.as_tensor(indices)
        images = torch.from_numpy(self.images[indices.numpy()]).permute(0, 3, 1, 2)
        return images.float() / 127.5 - 1, self.labels[indices]

    def of_class(self, y, m):
        return of_class(self.labels, y, m)


def load_digits(data_dir, size):
    if size not in (16, 32):
        raise ValueError(f"--size {size}: the digits come in 16 or 32 pixels")
    with np.load(ASSETS / "digits.npz") as z:
        bits, labels, split = np.unpackbits(z["bitmaps"], axis=-1), z["labels"], z["split"]
    if size == 16:
        bits = bits.reshape(-1, 16, 2, 16, 2).mean((2, 4))
    images = np.round(255 * bits).astype(np.uint8)[..., None]
    return *(ImageArray(images[split == s], labels[split == s]) for s in (0, 1)), range(10)


def load_digits_tune(data_dir, size):
    """The training digits alone, a third of them to measure with: where defaults are chosen."""
    train, _, names = load_digits(data_dir, size)
    cut = len(train) * 2 // 3                         # not at random: neighbours may be by one hand
    parts = (slice(cut), slice(cut, None))
    return *(ImageArray(train.images[part], train.labels[part]) for part in parts), names


def load_mnist(data_dir, size):
    """The four idx files of MNIST's family, .gz or not; its test images are the held-out ones."""
    def find(*words):
        found = [f for f in sorted(Path(data_dir).glob("*idx*")) if any(w in f.name for w in words)]
        if len(found) != 1:
            names = ", ".join(f.name for f in found) or "none"
            raise ValueError(f"--data_dir {data_dir}: expected one file like {words[0]}-ubyte or "
                             f"{words[0]}-ubyte.gz, found {names}")
        return found[0]

    splits = []
    for words in (("train",), ("t10k", "test")):
        images = read_idx(find(*(f"{w}-images-idx3" for w in words)), 3)
        labels = read_idx(find(*(f"{w}-labels-idx1" for w in words)), 1)
        if len(images) != len(labels) or images.shape[1:] != (size, size):
            raise ValueError(f"--data_dir {data_dir}: {words[0]} has images {images.shape} and "
                             f"{len(labels)} labels; expected (n, {size}, {size}) and n (--size)")
        splits.append(ImageArray(images[..., None], labels.astype(np.int64)))
    return *splits, range(1 + max(int(s.labels.max()) for s in splits))


def read_idx(path, ndim):
    """The uint8 array of an idx file: 0, 0, type 8, ndim, then big-endian sizes, then the bytes."""
    raw = path.read_bytes()
    try:
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} is a damaged gzip file: {error}") from None
    if raw[:4] != bytes((0, 0, 8, ndim)):
        raise ValueError(f"{path} starts with {raw[:4].hex()}, expected 000008{ndim:02x}: no idx "
                         f"file of {ndim}-d bytes")
    shape = np.frombuffer(raw[4:4 + 4 * ndim].ljust(4 * ndim, b"\xff"), ">u4")
    if len(raw) != 4 + 4 * ndim + int(np.prod(shape.astype(object))):
        raise ValueError(f"{path} says that it holds {shape.tolist()}, but has {len(raw)} bytes: "
                         "it is truncated or damaged; get it again")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape)


SHAPES = ("circle", "cross", "ring", "square", "star", "triangle")


class Shapes:
    """Image k: shape k % 6 of random place, size, turn and colours, all drawn from (first + k)."""

    def __init__(self, n, size, first):
        self.n, self.size, self.first = n, size, first

    def __len__(self):
        return self.n

    def batch(self, indices, key=None):
        images, labels = zip(*(self.draw(int(k)) for k in indices))
        images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        return images.float() / 127.5 - 1, torch.tensor(labels)

    def of_class(self, y, m):
        return torch.arange(y, self.n, len(SHAPES))[:m]

    def draw(self, k):
        rng, label = np.random.default_rng(self.first + k), k % len(SHAPES)
        radius, turn = rng.uniform(0.5, 0.8), rng.uniform(-0.25, 0.25)
        centre = rng.uniform(radius - 1, 1 - radius, 2) * 0.9
        ink, paper = rng.uniform(0.45, 1, 3), rng.uniform(0, 0.35, 3)
        ink[rng.integers(3)] *= 0.3                                       # a colour, not a grey
        axis = (np.arange(self.size) + 0.5) / self.size * 2 - 1
        x, y = np.meshgrid(axis - centre[0], axis - centre[1])
        cos, sin = np.cos(turn), np.sin(turn)
        inside = signed_distance(SHAPES[label], (x * cos + y * sin) / radius,
                                 (y * cos - x * sin) / radius)
        cover = np.clip(0.5 - inside * radius * self.size / 2, 0, 1)[..., None]
        return np.round(255 * (cover * ink + (1 - cover) * paper)).astype(np.uint8), label


def signed_distance(shape, x, y):
    """About the distance from (x, y) to the outline of a shape of radius 1, negative inside."""
    r = np.hypot(x, y)
    if shape == "circle":
        return r - 0.95
    if shape == "ring":
        return np.abs(r - 0.72) - 0.23
    x, up, y = np.abs(x), y, np.abs(y)
    if shape == "square":
        return np.maximum(x, y) - 0.8
    if shape == "cross":
        return np.minimum(np.maximum(x - 0.28, y - 0.95), np.maximum(x - 0.95, y - 0.28))
    if shape == "triangle":
        return np.maximum(up - 0.6, 0.87 * x - 0.5 * up - 0.5)
    turn, part = np.pi / 5, 2 * np.pi / 5                                 # star: 5 mirrored sectors
    angle = np.abs((np.arctan2(x, -up) + turn) % part - turn)
    tip, notch = np.array([1.0, 0.0]), 0.42 * np.array([np.cos(turn), np.sin(turn)])
    normal = np.array([notch[1] - tip[1], tip[0] - notch[0]])
    normal = normal / np.hypot(*normal)
    return (r * np.cos(angle) - tip[0]) * normal[0] + r * np.sin(angle) * normal[1]


def load_shapes(data_dir, size):
    return Shapes(20_000, size, 0), Shapes(2_000, size, 10 ** 9), SHAPES


def load_shapes_tune(data_dir, size):
    return Shapes(20_000, size, 0), Shapes(2_000, size, 2 * 10 ** 9), SHAPES


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


def scan_folder(root, suffixes=SUFFIXES):
    """[(path, label)] and the class names of root/class/**/*.png, both sorted."""
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"--data_dir {root} is not a folder; expected {root}/<class>/<image>.png")
    names = sorted(d.name for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    files = [(path, label) for label, name in enumerate(names)
             for path in sorted((root / name).rglob("*")) if path.suffix.lower() in suffixes]
    filled = {label for _, label in files}
    empty = [name for label, name in enumerate(names) if label not in filled]
    if not files:
        raise ValueError(f"no images under {root}; expected {root}/<class>/*{suffixes[0]} "
                         f"(or {', '.join(suffixes[1:])})")
    if empty:
        raise ValueError(f"{root}/{empty[0]} holds no images ({len(empty)} empty class folders); "
                         "remove it or fill it")
    return files, names


def list_images(root, suffixes=SUFFIXES, heldout_share=0.1):
    """([(path, label, held out 0 or 1)], class names) of root/class/*, or of root/train/class/*
    and root/val/class/* if there is a root/train. Without root/val a share of a class is held out.
    """
    root = Path(root)
    train = root / "train" if (root / "train").is_dir() else root
    files, names = scan_folder(train, suffixes)
    held, val = heldout_mask([y for _, y in files], heldout_share), []
    if train != root and (root / "val").is_dir():
        held[:] = False
        val, val_names = scan_folder(root / "val", suffixes)
        odd = sorted(set(names) ^ set(val_names))
        if odd:
            raise ValueError(f"{root}/val must hold the class folders of {root}/train; {odd[0]} is "
                             f"in one of them only ({len(odd)} differ)")
    called = dict(imagenet_classes())
    every = [(p, y, int(h)) for (p, y), h in zip(files, held)] + [(p, y, 1) for p, y in val]
    return every, [called.get(n, n) for n in names]


def heldout_mask(labels, share):
    """Which images (n,) bool are held out: `share` of each class, spread evenly over its images."""
    labels, every = np.asarray(labels), round(1 / share)
    count = np.bincount(labels)
    order = np.argsort(labels, kind="stable")
    rank = np.empty(len(labels), dtype=int)
    rank[order] = np.arange(len(labels)) - np.repeat(np.cumsum(count) - count, count)
    held = rank % every == every - 1
    return held if held.any() else rank == count[labels] - 1       # small classes: the last of each


def load_folder(root, size, max_bad=0.01):
    """Read, crop and hold a whole folder; unreadable files are named, too many are an error."""
    files, names = list_images(root)
    images, labels, held, bad = [], [], [], []
    for path, label, h in tqdm(files, desc="reading images", leave=False, disable=len(files) < 500):
        try:
            images.append(read_image(path, size))
            labels.append(label)
            held.append(h == 1)
        except (OSError, ValueError, SyntaxError) as error:
            bad.append(f"{path}: {error}")
    report_unreadable(bad, len(files), max_bad)
    labels, held = np.array(labels), np.array(held)
    for c, name in enumerate(names):
        if not ((labels == c) & ~held).any() or not held.any():
            raise ValueError(f"class {name!r} under {root} has {(labels == c).sum()} readable "
                             "image(s): at least 2 are needed, one to train on and one to hold out")
    images = np.stack(images)
    return *(ImageArray(images[part], labels[part]) for part in (~held, held)), names


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


# ---------------------------------------------------------------- a data set by name

class Set(NamedTuple):
    load: Callable | None     # (data_dir, size) -> train, heldout, class names; None: latents
    defaults: dict = {}       # of train.py's flags and settings, where they differ
    needs_dir: bool = False


FASHION = dict(size=28, steps=6000, eval_every=1000)
IMAGENET = dict(patch=1, model="gpt-xl", steps=250_000, global_batch=2048, lr=8e-4,
                eval_every=5000, lr_schedule="constant", warmup=62_500, ema_decay=0.9999,
                optimizer="adamw")
DATASETS = {
    "digits": Set(load_digits),
    "shapes": Set(load_shapes, dict(diffusion_batch_mul=4)),
    "mnist": Set(load_mnist, FASHION, True),
    # as digits and shapes, without their held-out images: where defaults are chosen
    "digits-tune": Set(load_digits_tune),
    "shapes-tune": Set(load_shapes_tune, dict(diffusion_batch_mul=4)),
    "folder": Set(load_folder, {}, True),
    "imagenet256": Set(None, dict(IMAGENET, size=256)),
    "imagenet512": Set(None, dict(IMAGENET, size=512)),
}


@dataclass
class Data:
    """A data set and the facts of it that a checkpoint must carry."""
    name: str
    train: object
    heldout: object
    class_names: list
    size: int                       # pixels of a side
    channels: int                   # of the images
    patch: int                      # pixels (or latents) of a token's side
    x0_bound: float | None = 1.0    # tokens lie within +- this
    facts: dict = field(default_factory=dict)
    vae: object = None              # vae.KL16 where tokens are latents

    @property
    def token_dim(self):
        return (self.vae.channels if self.vae else self.channels) * self.patch ** 2

    @property
    def grid(self):
        return self.size // (self.vae.stride if self.vae else 1) // self.patch

    def decode(self, x):
        """Tokens (B, N, D) -> images (B, ch, H, W), about [-1, 1]."""
        images = unpatchify(x, self.patch)
        return self.vae.decode(images) if self.vae else images


def load(name, data_dir=None, size=None, patch=None, max_bad=0.01, vae=None, cache_dir=None,
         device="cpu", plan=False):
    """A Data by name. Raises ValueError for a bad size, path or file.

    vae: path of kl16.ckpt; then the tokens are its latents, encoded on `device` into cache_dir
    unless they are there. plan: describe only; nothing is encoded, ImageNet need not be there.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; choose one of {', '.join(DATASETS)}")
    which = DATASETS[name]
    if which.load is None or vae:
        if which.load not in (None, load_folder):
            raise ValueError(f"--vae is for imagenet256, imagenet512 and folder; {name} is small "
                             "enough for pixels")
        import latents
        return latents.load(name, data_dir, size or which.defaults.get("size", 256), patch or 1,
                            max_bad, vae, cache_dir, device, plan)
    size, patch = size or which.defaults.get("size", 16), patch or 4
    if size % patch:
        raise ValueError(f"--size {size} must be a multiple of --patch {patch}")
    if which.needs_dir and data_dir is None:
        raise ValueError(f"--dataset {name} needs --data_dir, the folder that holds it")
    options = {"max_bad": max_bad} if which.load is load_folder else {}
    train, heldout, names = which.load(data_dir, size, **options)
    names, channels = [str(n) for n in names], train.batch([0])[0].shape[1]
    for labels in (s.labels for s in (train, heldout) if isinstance(s, ImageArray)):
        if not 0 <= labels.min() <= labels.max() < len(names):
            raise ValueError(f"{name} has labels from {labels.min()} to {labels.max()}; expected 0 "
                             f"to {len(names) - 1}, its {len(names)} classes")
    facts = {"dataset": name, "size": size, "channels": channels, "patch": patch,
             "n_train": len(train), "n_heldout": len(heldout), "data_dir": data_dir,
             "class_names": names, "x0_bound": 1.0, "vae": None}
    return Data(name, train, heldout, names, size, channels, patch, facts=facts)


def decoder(facts, vae=None, device="cpu"):
    """The function tokens (B, N, D) -> images (B, ch, H, W) of a checkpoint's data facts; vae: the
    path of kl16.ckpt, for models of latents."""
    if not facts.get("vae"):
        if vae:
            raise ValueError(f"--vae {vae}: this is a model of pixels, which need none")
        return lambda x: unpatchify(x, facts["patch"])
    import latents
    kl16 = latents.open_vae(facts, vae, device)
    return lambda x: kl16.decode(unpatchify(x, facts["patch"]))


def digest(facts, data_dir=None):
    """A short hash of the files that a checkpoint's data set is read from: names, sizes and times.

    Raises ValueError if they are not there."""
    name = facts["dataset"]
    root = Path(data_dir or facts.get("data_dir") or ASSETS / "digits.npz")
    if facts.get("vae"):                 # the cache that holds the latents, by its manifest
        import latents
        root = latents.cache_of(name, data_dir, facts["size"], facts.get("cache_dir"))
        root = root / "manifest.json" if (root / "manifest.json").exists() else root
    if not root.exists():
        raise ValueError(f"the images of {name} are no longer at {root}; say where with --data_dir")
    files = sorted(f for f in root.rglob("*") if f.is_file()) if root.is_dir() else [root]
    stats = [(f.relative_to(root).as_posix(), f.stat()) for f in files]
    lines = [f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats]
    return hashlib.sha256("\n".join([name, str(root.resolve()), *lines]).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- command line

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        shown = action.default not in (None, False, argparse.SUPPRESS)
        return super()._get_help_string(action) if shown else action.help


class Flags(argparse.Namespace):
    """The parsed flags; notes which were given and which the program has looked at."""

    def __init__(self, values, given, helps):
        super().__init__(**values)
        self._given, self._helps, self._read = given, helps, set()

    def __getattribute__(self, name):
        if not name.startswith("_"):
            vars(self).get("_read", set()).add(name)
        return super().__getattribute__(name)

    def check_used(self, *later):
        """ValueError for a flag that was given and that this run has not looked at, nor will
        (later: names): it would do nothing. To be called once all is read, before any work."""
        for name in sorted(self._given - self._read - set(later)):
            raise ValueError(f"--{name} would change nothing in this run; leave it out, or see "
                             f"what it is for: {self._helps[name]}")


class Parser(argparse.ArgumentParser):
    """argparse with defaults in --help, no abbreviations, the closest match for a mistyped flag."""

    def __init__(self, **kw):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kw)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else [str(a) for a in args]
        known, unknown = super().parse_known_args(args, namespace)
        typed = {a.split("=")[0] for a in args}
        given = {a.dest for a in self._actions if typed & set(a.option_strings)}
        return Flags(vars(known), given, {a.dest: a.help for a in self._actions}), unknown

    def parse_args(self, args=None, namespace=None):
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            options = list(self._option_string_actions)
            close = difflib.get_close_matches(unknown[0].split("=")[0], options, 1)
            hint = f"did you mean {close[0]}?" if close else "see --help"
            self.error(f"unknown argument {unknown[0]}; {hint}")
        return known

    def error(self, message):
        sys.exit(bad_input(message))


def bad_input(message):
    """Say what is wrong, once: of many processes the first speaks at once. The others, who mostly
    met the same, wait for torchrun to end them, and speak if nobody did."""
    rank, local = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    time.sleep(5 * (rank > 0) + 5 * (local > 0))
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    return 2


def number(kind, low, high=float("inf")):
    """An argparse type: a finite number between low and high, both allowed."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        if not low <= value <= high or value == float("inf"):
            wanted = f"at least {low}" if high == float("inf") else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: {wanted}")
        return value
    return parse


def run(main):
    """Run a program: bad input (ValueError, OSError) is one line on stderr and exit code 2;
    TRACEBACK=1 shows where."""
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        sys.exit(bad_input(" ".join(str(error).split())))
