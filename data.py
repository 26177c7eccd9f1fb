"""Data sets as images with labels, and their order.

A data set has `train` and `heldout`, each with len(), of_class(y, m) and batch(indices, key) ->
images (B, ch, H, W) in [-1, 1] (or scaled latents), labels (B,). Nothing is random at run time: an
epoch's order follows from (seed, epoch), so that any step can be resumed, by any number of
processes.

digits    2880 handwritten digits (assets/digits.npz; E. Alpaydin, C. Kaynak 1998, UCI Machine
          Learning Repository, https://doi.org/10.24432/C50P49, CC BY 4.0), grey, 16x16 or 32x32

The others are in sets.py, which is read when one is asked for, latents in latents.py. To add a data
set: a function (data_dir, size) -> train, heldout, class names, and its line in DATASETS.
"""
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable, NamedTuple
from unicodedata import normalize

import numpy as np
import torch
from PIL import Image

from files import digest_of, read_npz

ASSETS = Path(__file__).parent / "assets"


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
    z = read_npz(ASSETS / "digits.npz", "bitmaps", "labels", "split")
    bits, labels, split = np.unpackbits(z["bitmaps"], axis=-1), z["labels"], z["split"]
    if size == 16:
        bits = bits.reshape(-1, 16, 2, 16, 2).mean((2, 4))
    images = np.round(255 * bits).astype(np.uint8)[..., None]
    if tune:                             # the last third, as neighbours may be by one hand
        images, labels = images[split == 0], labels[split == 0]
        split = np.arange(len(labels)) >= len(labels) * 2 // 3
    return *(ImageArray(images[split == s], labels[split == s]) for s in (0, 1)), range(10)


# ---------------------------------------------------------------- a data set by name

class Set(NamedTuple):
    load: Callable | None       # (data_dir, size) -> train, heldout, class names; None: latents
    defaults: dict = {}         # of train.py's flags and settings, where they differ
    needs_dir: bool = False
    photos: bool = False        # files of images: a VAE may encode them, some may be unreadable


def outer(name, **options):
    """The loader `name` of sets.py."""
    def load(data_dir, size, **more):
        import sets
        return getattr(sets, name)(data_dir, size, **options, **more)
    return load


SHAPES = dict(diffusion_batch_mul=4)
FILES = dict(size=None, steps=6000, eval_every=1000)           # None: the size that they have
IMAGENET = dict(patch=1, model="gpt-xl", steps=250_000, global_batch=2048, lr=8e-4,
                eval_every=5000, lr_schedule="constant", warmup=62_500, ema_decay=0.9999,
                optimizer="adamw")
DATASETS = {
    "digits": Set(load_digits),
    "shapes": Set(outer("load_shapes"), SHAPES),
    "mnist": Set(outer("load_mnist"), FILES, True),
    "cifar10": Set(outer("load_cifar"), FILES, True),
    "cifar100": Set(outer("load_cifar", classes=100), FILES, True),
    "arrays": Set(outer("load_arrays"), FILES, True),
    # as digits and shapes, without their held-out images: where defaults are chosen
    "digits-tune": Set(partial(load_digits, tune=True)),
    "shapes-tune": Set(outer("load_shapes", tune=True), SHAPES),
    "folder": Set(outer("load_folder"), {}, True, photos=True),
    "imagenet256": Set(None, dict(IMAGENET, size=256), photos=True),
    "imagenet512": Set(None, dict(IMAGENET, size=512), photos=True),
    "latents": Set(None, dict(size=None, patch=1, steps=6000, eval_every=1000), True),
}


@dataclass
class Data:
    """A data set. `facts` is what a checkpoint carries of it."""
    name: str
    train: object
    heldout: object
    class_names: list
    size: int                       # pixels of a side; --dataset latents: latents of a side
    channels: int                   # of the images, or of these latents
    patch: int                      # pixels (or latents) of a token's side
    grid: int                       # tokens of a side
    x0_bound: float | None = 1.0    # tokens lie within +- this
    data_dir: str | None = None
    cache_dir: str | None = None    # where latents are kept
    latents: dict | None = None     # scale, std, the VAE's fingerprint ...
    vae: object = None              # vae.KL16, which made or decodes them

    def __post_init__(self):
        self.class_names = [normalize("NFC", str(name)) for name in self.class_names]

    @property
    def facts(self):
        return {"dataset": self.name, "size": self.size, "channels": self.channels,
                "patch": self.patch, "n_train": len(self.train), "n_heldout": len(self.heldout),
                "data_dir": self.data_dir, "cache_dir": self.cache_dir, "vae": self.latents,
                "class_names": self.class_names, "x0_bound": self.x0_bound}

    @property
    def token_dim(self):
        return (self.vae.channels if self.vae else self.channels) * self.patch ** 2

    def decode(self, x):
        """Tokens (B, N, D) -> images (B, ch, H, W), about [-1, 1]."""
        images = unpatchify(x, self.patch)
        if self.latents and not self.vae:
            raise ValueError("these latents have no decoder here, so that there are no images to "
                             "look at or to measure: give --vae if they are of kl16.ckpt")
        return self.vae.decode(images) if self.vae else images


def known(name):
    """The Set of a name."""
    if name not in DATASETS:
        raise ValueError(f"no data set {name!r} is known; data.DATASETS has {', '.join(DATASETS)}")
    return DATASETS[name]


def load(name, data_dir=None, size=None, patch=None, max_bad=0.01, vae=None, cache_dir=None,
         device="cpu", plan=False, scale=None):
    """A Data by name. Raises ValueError for a bad size, path or file.

    vae: path of kl16.ckpt; then the tokens are its latents, encoded on `device` into cache_dir
    unless they are there. plan: describe only; nothing is encoded, ImageNet need not be there.
    scale: of latents, instead of what this set measures (a checkpoint's model knows but its own).
    """
    which = known(name)
    if which.load is None or vae:
        if which.load and not which.photos:
            raise ValueError(f"--vae is for imagenet256, imagenet512, folder and latents; {name} "
                             "is small enough for pixels")
        import latents
        return latents.load(name, data_dir, size or which.defaults.get("size", 256), patch or 1,
                            max_bad, vae, cache_dir, device, plan, scale)
    size, patch = size or which.defaults.get("size", 16), patch or 4
    check_patch(size or patch, patch)
    if which.needs_dir and data_dir is None:
        raise ValueError(f"--dataset {name} needs --data_dir, the folder or file that holds it")
    options = {"max_bad": max_bad} if which.photos else {}
    train, heldout, names = which.load(data_dir, size, **options)
    names = [str(n) for n in names]
    check_classes(data_dir or name, train, heldout, names)
    channels, size = train.batch([0])[0].shape[1:3]
    check_patch(size, patch)
    return Data(name, train, heldout, names, size, channels, patch, size // patch,
                data_dir=data_dir)


def check_patch(size, patch):
    if size % patch:
        fit = ", ".join(str(p) for p in range(1, size) if size % p == 0)
        raise ValueError(f"a side of {size} pixels must be a multiple of --patch {patch}; those "
                         f"that fit: {fit}")


def check_classes(where, train, heldout, names):
    """ValueError unless all labels are those of a class, and each class can be trained."""
    labels = torch.cat([train.labels, heldout.labels])
    if not 0 <= labels.min() <= labels.max() < len(names):
        raise ValueError(f"{where} has labels from {labels.min()} to {labels.max()}; expected 0 to "
                         f"{len(names) - 1}, its {len(names)} classes")
    lacking = [n for n, k in zip(names, train.labels.bincount(minlength=len(names))) if k == 0]
    if lacking or not len(heldout):
        what = f"class {lacking[0]!r} of {where} has no training image" if lacking else (
            f"{where} has no held-out image")
        raise ValueError(f"{what}: at least 2 readable images of each class are needed")


def decoder(facts, vae=None, device="cpu"):
    """The function tokens (B, N, D) -> images uint8 (B, H, W, ch) of a checkpoint's data facts;
    vae: the path of kl16.ckpt, for models of latents (without one see latents.decoder)."""
    if facts.get("vae"):
        import latents
        return latents.decoder(facts, vae, device)
    if vae:
        raise ValueError(f"--vae {vae}: this is a model of pixels, which need none")
    return lambda x: to_uint8(unpatchify(x, facts["patch"]))


def digest(facts, data_dir=None):
    """A short hash of the files that a data set is read from: their paths, sizes and times."""
    root = data_dir or facts.get("data_dir") or ASSETS / "digits.npz"
    if facts.get("cache_dir"):           # the cache that holds the latents
        import latents
        root = latents.cache_of(facts["dataset"], data_dir, facts["size"], facts.get("cache_dir"))
    return f"{facts['dataset']} {digest_of(root, 'the images of ' + facts['dataset'])}"
