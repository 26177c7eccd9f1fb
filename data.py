"""Data sets as uint8 images with labels, their order, and the command-line manners that all programs share.

Every data set offers `train` and `heldout`, each with len() and batch(indices, key) -> images (B, ch, H, W) in
[-1, 1] or scaled latents (B, z, h, w), labels (B,); and the tokeniser that turns one into the other. Nothing here
is random at run time: the order of an epoch is a function of (seed, epoch), the flips and noise of latents are one
of `key`, so that any step can be resumed and any number of processes can share it.

digits    2880 handwritten digits (assets/digits.npz; E. Alpaydin, C. Kaynak 1998, UCI Machine Learning
          Repository, https://doi.org/10.24432/C50P49, CC BY 4.0), grey, 16x16 or 32x32
shapes    procedural colour shapes; image k is a function of k, so there are as many as you like
folder    your own images: root/class/*.png, as pixels or, with a VAE, as latents
imagenet256, imagenet512   latents of KL-16 (vae.py), encoded once into a cache (latents.py)
"""
import argparse
import difflib
import os
import sys
import time
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import latents
from vae import KL16, KL16_SCALE, Identity, load_kl16

ASSETS = Path(__file__).parent / "assets"
TUNING = ("digits-tune", "shapes-tune")         # as digits and shapes, without their held-out images: where defaults are chosen
DATASETS = ("digits", "shapes", *TUNING, "folder", "imagenet256", "imagenet512")
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

    def batch(self, indices, key=None):
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

    def batch(self, indices, key=None):
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


def read_image(path, size):
    """The crop of an image file, uint8 (size, size, 3)."""
    try:
        with Image.open(path) as image:
            return np.array(centre_crop(image.convert("RGB"), size))
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from None


def scan_folder(root, suffixes=SUFFIXES):
    """[(path, label)] and the class names of root/class/*.png, both sorted."""
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"--data_dir {root} is not a folder; expected {root}/<class name>/<image>.png")
    names = sorted(d.name for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    files = [(path, label) for label, name in enumerate(names)
             for path in sorted((root / name).rglob("*")) if path.suffix.lower() in suffixes]
    filled = {label for _, label in files}
    empty = [name for label, name in enumerate(names) if label not in filled]
    if not files:
        raise ValueError(f"no images under {root}; expected {root}/<class name>/*{suffixes[0]} (or {', '.join(suffixes[1:])})")
    if empty:
        raise ValueError(f"{root}/{empty[0]} holds no images ({len(empty)} empty class folders); remove it or fill it")
    return files, names


def heldout_mask(labels, share):
    """Which of the images (n,) bool are held out: `share` of each class, spread evenly over its images in order."""
    labels, every = np.asarray(labels), round(1 / share)
    count = np.bincount(labels)
    order = np.argsort(labels, kind="stable")
    rank = np.empty(len(labels), dtype=int)
    rank[order] = np.arange(len(labels)) - np.repeat(np.cumsum(count) - count, count)
    held = rank % every == every - 1
    return held if held.any() else rank == count[labels] - 1              # small classes: the last of each


def load_folder(root, size, max_bad, heldout_share=0.1):
    """Read, crop and hold a whole folder; unreadable files are named, and too many are an error."""
    files, names = scan_folder(root)
    images, labels, bad = [], [], []
    for path, label in tqdm(files, desc="reading images", leave=False, disable=len(files) < 500):
        try:
            images.append(read_image(path, size))
            labels.append(label)
        except (OSError, ValueError, SyntaxError) as error:
            bad.append(f"{path}: {error}")
    latents.report_unreadable(bad, len(files), max_bad)
    images, labels = np.stack(images), np.array(labels)
    held = heldout_mask(labels, heldout_share)
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
    tokeniser: object = None        # vae.Identity or vae.KL16: what decodes the tokens

    @property
    def token_dim(self):
        return self.tokeniser.channels

    @property
    def grid(self):
        return self.size // self.tokeniser.stride

    def decode(self, x):
        """Tokens (B, N, D) -> images (B, ch, H, W), about [-1, 1]."""
        return self.tokeniser.decode(unpatchify(x, 1))


def load(name, data_dir=None, size=16, patch=4, max_bad=0.01, vae=None, cache_dir=None, device="cpu", plan=False):
    """A Data by name. Raises ValueError for a bad size, path or file.

    vae: path of kl16.ckpt; then the tokens are its latents, encoded on `device` into cache_dir unless they are there.
    plan: describe the data set only; nothing is encoded, and ImageNet need not be there.
    """
    if vae or name.startswith("imagenet"):
        return load_latents(name, data_dir, size, patch, max_bad, vae, cache_dir, device, plan)
    if size % patch:
        raise ValueError(f"--size {size} must be a multiple of --patch {patch}")
    if name in ("digits", "digits-tune"):
        train, heldout, names, channels = load_digits(size)
        if name in TUNING:
            cut = len(train) * 2 // 3                                     # not at random: neighbours may be by one hand
            train, heldout = (ImageArray(train.images[part], train.labels[part]) for part in (slice(cut), slice(cut, None)))
    elif name in ("shapes", "shapes-tune"):
        train, heldout = Shapes(20_000, size, 0), Shapes(2_000, size, 2 * 10 ** 9 if name in TUNING else 10 ** 9)
        names, channels = list(SHAPES), 3
    elif name == "folder":
        if data_dir is None:
            raise ValueError("--dataset folder needs --data_dir ROOT with ROOT/<class name>/*.png")
        (train, heldout, names), channels = load_folder(data_dir, size, max_bad), 3
    else:
        raise ValueError(f"unknown data set {name!r}; choose one of {', '.join(DATASETS)}")
    facts = {"dataset": name, "size": size, "channels": channels, "patch": patch, "n_train": len(train), "n_heldout": len(heldout)}
    return Data(name, train, heldout, [str(n) for n in names], size, channels, patch, facts=facts, tokeniser=Identity(patch, channels))


def load_digits(size):
    if size not in (16, 32):
        raise ValueError(f"--size {size}: the digits come in 16 or 32 pixels")
    with np.load(ASSETS / "digits.npz") as z:
        bits, labels, split = np.unpackbits(z["bitmaps"], axis=-1), z["labels"], z["split"]
    if size == 16:
        bits = bits.reshape(-1, 16, 2, 16, 2).mean((2, 4))
    images = np.round(255 * bits).astype(np.uint8)[..., None]
    return (*(ImageArray(images[split == s], labels[split == s]) for s in (0, 1)), range(10), 1)


# ---------------------------------------------------------------- latents

def imagenet_classes():
    """[(folder, names)] of the 1000 classes in the standard order: ("n01440764", "tench, Tinca tinca") ..."""
    return [tuple(line.split(" ", 1)) for line in (ASSETS / "imagenet_classes.txt").read_text().splitlines()]


def open_tokeniser(facts, vae=None, device="cpu"):
    """What decodes the tokens of a checkpoint, from its data facts: Identity, or the KL16 at path `vae`, which must be
    the one that it was trained on."""
    made_by = facts.get("vae")
    if made_by is None:
        return Identity(facts["patch"], facts["channels"])
    if vae is None:
        raise ValueError("this checkpoint models the latents of a VAE: give --vae kl16.ckpt to decode them")
    tokeniser = load_kl16(vae, made_by["scale"], device)
    if made_by["fingerprint"] not in (None, tokeniser.fingerprint()):
        raise ValueError(f"--vae {vae} has fingerprint {tokeniser.fingerprint()[:16]}, but the checkpoint was trained on latents of "
                         f"{made_by['fingerprint'][:16]}; give the VAE of its training")
    return tokeniser


def list_images(root, suffixes=SUFFIXES, heldout_share=0.01):
    """([(path, label, held out)], class names) of root/class/*, or of root/train/class/* and root/val/class/* if there
    is a root/train. Without a val folder, `heldout_share` of each class is held out."""
    root = Path(root)
    train = root / "train" if (root / "train").is_dir() else root
    files, names = scan_folder(train, suffixes)
    held, val = np.zeros(len(files), dtype=bool), []
    if train != root and (root / "val").is_dir():
        val, val_names = scan_folder(root / "val", suffixes)
        if val_names != names:
            odd = sorted(set(names) ^ set(val_names))
            raise ValueError(f"{root}/val must hold the class folders of {root}/train; {odd[0]} is in one of them only ({len(odd)} differ)")
    else:
        held = heldout_mask([y for _, y in files], heldout_share)
    called = dict(imagenet_classes())
    return ([(p, y, int(h)) for (p, y), h in zip(files, held)] + [(p, y, 1) for p, y in val]), [called.get(n, n) for n in names]


class Planned:
    """A split of which only the size is known, for --dry-run."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n


def load_latents(name, data_dir, size, patch, max_bad, vae, cache_dir, device, plan):
    """The Data of a set of latents: from its cache, which is made if it is not there, or from MAR's npz files."""
    if name in ("digits", "shapes", *TUNING):
        raise ValueError(f"--vae is for imagenet256, imagenet512 and folder; {name} is small enough for pixels")
    if vae is None and not plan:
        raise ValueError(f"--dataset {name} trains on latents: it needs --vae kl16.ckpt (and --data_dir <ImageNet>, with train/ and val/, "
                         "or its train folder; or --cache_dir with latents). For your own images as pixels use --dataset folder")
    if patch != 1:
        raise ValueError(f"--patch {patch}: a latent is one token; use --patch 1 with --vae")
    with torch.device("meta" if vae is None else "cpu"):
        tokeniser = KL16() if vae is None else load_kl16(vae, device=device)
    if size % tokeniser.stride:
        raise ValueError(f"--size {size} must be a multiple of the VAE's stride {tokeniser.stride}")
    scale = KL16_SCALE if name.startswith("imagenet") else None          # others: 1 / std of their own latents
    fingerprint = None if vae is None else tokeniser.fingerprint()
    wanted = {"vae": fingerprint, "crop": "halve, bicubic, centre", "size": size}
    root = Path(cache_dir or f"cache/{name}" + (f"-{Path(data_dir).name}-{size}" if name == "folder" and data_dir else ""))
    if vae is None or plan and not (root / "manifest.json").exists():
        files, names = list_images(data_dir) if data_dir else (None, [n for _, n in imagenet_classes()])
        held = sum(h for _, _, h in files) if files else 50_000
        found = (Planned(len(files) - held if files else 1_281_167), Planned(held), names, {"scale": scale, "x0_bound": None})
    elif data_dir and is_mar_cache(data_dir):
        found = load_mar_cache(data_dir, size // tokeniser.stride, scale, tokeniser)
    else:
        if data_dir and name == "folder":                                # ImageNet does not change, and is slow to list
            files, names = list_images(data_dir, heldout_share=0.1)
            wanted["files"] = latents.files_digest(files)
        found = latents.read_cache(root, wanted)
        if found is None:
            if data_dir is None:
                raise ValueError(f"no latent cache at {root} and no --data_dir to make it from: expected a folder with one folder per class")
            files, names = list_images(data_dir, heldout_share=0.1 if name == "folder" else 0.01)
            read = lambda path: read_image(path, size)
            made_for = {**wanted, "files": latents.files_digest(files)}
            latents.build(root, files, names, read, tokeniser, made_for, scale, max_bad)
            found = latents.read_cache(root, made_for)
    train, heldout, names, measured = found
    if not len(train) or not len(heldout):
        raise ValueError(f"{len(train)} training and {len(heldout)} held-out images: at least one of each is needed")
    tokeniser.scale = measured["scale"] or tokeniser.scale
    facts = {"dataset": name, "size": size, "channels": 3, "patch": 1, "n_train": len(train), "n_heldout": len(heldout),
             "vae": {**measured, "fingerprint": fingerprint}, "cache_dir": str(root)}
    return Data(name, train, heldout, names, size, tokeniser.channels, 1, measured["x0_bound"], facts, tokeniser)


def is_mar_cache(root):
    return next(Path(root).glob("*/*.npz"), None) is not None


def load_mar_cache(root, grid, scale, tokeniser):
    """(training, held-out Latents, class names, facts) of MAR's root/class/*.npz; which VAE made it, it does not say."""
    files, names = list_images(root, suffixes=(".npz",))
    moments, label, held = latents.MarFiles([p for p, _, _ in files]), *np.array([(y, h) for _, y, h in files]).T
    shape, expected = moments(0, 0).shape, (2 * tokeniser.channels, grid, grid)
    if shape != expected:
        raise ValueError(f"{files[0][0]} holds moments {shape}, expected {expected}: the cache was made for another size or VAE")
    measured = latents.measure(moments, np.flatnonzero(held == 0), scale, most=1024)
    splits = [latents.Latents(moments, np.flatnonzero(held == s), label[held == s], measured["scale"]) for s in (0, 1)]
    return (*splits, names, measured)


# ---------------------------------------------------------------- command line

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        shown = action.default not in (None, False, argparse.SUPPRESS) or "%(default)" in (action.help or "")
        return super()._get_help_string(action) if shown else action.help


class Parser(argparse.ArgumentParser):
    """argparse with defaults in --help, no abbreviations, and the closest match for a mistyped flag."""

    def __init__(self, **kw):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kw)

    def parse_args(self, args=None, namespace=None):
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            close = difflib.get_close_matches(unknown[0].split("=")[0], list(self._option_string_actions), 1)
            self.error(f"unknown argument {unknown[0]}" + (f"; did you mean {close[0]}?" if close else "; see --help"))
        return known

    def error(self, message):
        sys.exit(bad_input(message))


def bad_input(message):
    """Say what is wrong, once: of many processes the first speaks at once. The others, who mostly met the same, wait for
    torchrun to end them (it does within a second), and speak if nobody did: one bad disk must not die in silence."""
    rank, local = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    time.sleep(5 * (rank > 0) + 5 * (local > 0))
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
