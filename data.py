"""Data sets as uint8 images with labels, their order, and the manners that all programs share.

A data set has `train` and `heldout`, each with len(), of_class(y, m) and batch(indices, key) ->
images (B, ch, H, W) in [-1, 1] (or scaled latents), labels (B,). Nothing is random at run time: an
epoch's order follows from (seed, epoch), so that any step can be resumed, by any number of
processes.

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
import zlib
from dataclasses import dataclass, field
from functools import lru_cache, partial
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


def image_grid(images, columns):
    """uint8 (n, H, W, ch) -> one PIL picture with `columns` images a row, magnified to be seen."""
    n, H, W, ch = images.shape
    rows = -(-n // columns)
    tiles = np.full((rows * columns, H + 1, W + 1, ch), 128, np.uint8)      # a grey line between
    tiles[:n, 1:, 1:] = images
    sheet = tiles.reshape(rows, columns, H + 1, W + 1, ch).swapaxes(1, 2)
    sheet = sheet.reshape(rows * (H + 1), columns * (W + 1), ch)
    sheet = np.pad(sheet, ((0, 1), (0, 1), (0, 0)), constant_values=128)
    zoom = max(1, round(48 / H))
    picture = Image.fromarray(sheet.squeeze())
    return picture.resize((sheet.shape[1] * zoom, sheet.shape[0] * zoom), Image.NEAREST)


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
        return len(self.labels)

    def batch(self, indices, key=None):
        indices = torch.as_tensor(indices)
        images = torch.from_numpy(self.images[indices.numpy()]).permute(0, 3, 1, 2)
        return images.float() / 127.5 - 1, self.labels[indices]

    def of_class(self, y, m):
        return of_class(self.labels, y, m)


def load_digits(data_dir, size, tune=False):
    if size not in (16, 32):
        raise ValueError(f"--size {size}: the digits come in 16 or 32 pixels")
    with np.load(ASSETS / "digits.npz") as z:
        bits, labels, split = np.unpackbits(z["bitmaps"], axis=-1), z["labels"], z["split"]
    if size == 16:
        bits = bits.reshape(-1, 16, 2, 16, 2).mean((2, 4))
    images = np.round(255 * bits).astype(np.uint8)[..., None]
    if tune:                             # the last third, as neighbours may be by one hand
        images, labels = images[split == 0], labels[split == 0]
        split = np.arange(len(labels)) >= len(labels) * 2 // 3
    return *(ImageArray(images[split == s], labels[split == s]) for s in (0, 1)), range(10)


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


def heldout_mask(labels, share):
    """Which images (n,) bool are held out: `share` of each class, spread evenly over its images."""
    labels, every = np.asarray(labels), round(1 / share)
    classes = [np.flatnonzero(labels == y) for y in np.unique(labels)]
    held = np.concatenate([at[every - 1::every] for at in classes])
    if not len(held):                                   # small classes: the last of each
        held = [at[-1] for at in classes]
    return np.isin(np.arange(len(labels)), held)


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


# ---------------------------------------------------------------- a data set by name

class Set(NamedTuple):
    load: Callable | None     # (data_dir, size) -> train, heldout, class names; None: latents
    defaults: dict = {}       # of train.py's flags and settings, where they differ
    needs_dir: bool = False


IMAGENET = dict(patch=1, model="gpt-xl", steps=250_000, global_batch=2048, lr=8e-4,
                eval_every=5000, lr_schedule="constant", warmup=62_500, ema_decay=0.9999,
                optimizer="adamw")
DATASETS = {
    "digits": Set(load_digits),
    "shapes": Set(load_shapes, dict(diffusion_batch_mul=4)),
    "mnist": Set(load_mnist, dict(size=28, steps=6000, eval_every=1000), True),
    # as digits and shapes, without their held-out images: where defaults are chosen
    "digits-tune": Set(partial(load_digits, tune=True)),
    "shapes-tune": Set(partial(load_shapes, tune=True), dict(diffusion_batch_mul=4)),
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
    labels = torch.cat([train.labels, heldout.labels])
    if not 0 <= labels.min() <= labels.max() < len(names):
        raise ValueError(f"{name} has labels from {labels.min()} to {labels.max()}; expected 0 to "
                         f"{len(names) - 1}, its {len(names)} classes")
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
    """A short hash of the files that a data set is read from: their paths, sizes and times."""
    root = Path(data_dir or facts.get("data_dir") or ASSETS / "digits.npz")
    if facts.get("vae"):                 # the cache that holds the latents
        import latents
        root = latents.cache_of(facts["dataset"], data_dir, facts["size"], facts.get("cache_dir"))
    root = root.resolve()
    files = [f for f in (root, *sorted(root.rglob("*"))) if f.is_file()]
    if not files:
        raise ValueError(f"the images of {facts['dataset']} are no longer at {root}; say where "
                         "with --data_dir")
    lines = [f"{f} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files]
    return hashlib.sha256("\n".join([facts["dataset"], *lines]).encode()).hexdigest()[:16]


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
        raise ValueError(message)


def number(kind, low, high=float("inf")):
    """An argparse type: a finite number between low and high, both allowed."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number")
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
        # of many processes the first speaks at once; the others, who mostly met the same, wait for
        # torchrun to end them, and speak if nobody did
        rank, local = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
        time.sleep(5 * (rank > 0) + 5 * (local > 0))
        message = " ".join(str(error).split())
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)
