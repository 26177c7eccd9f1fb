"""Data sets as images with labels, and their order.

A data set has `train` and `heldout`, each with len(), of_class(y, m) and batch(indices, key) ->
images (B, ch, H, W) in [-1, 1] (or scaled latents, drawn by the key), labels (B,). Nothing is
random at run time: an epoch's order follows from (seed, epoch), so that any step can be resumed, by
any number of processes.

digits    2880 handwritten digits (assets/digits.npz; E. Alpaydin, C. Kaynak 1998, UCI Machine
          Learning Repository, https://doi.org/10.24432/C50P49, CC BY 4.0), grey, 16x16 or 32x32

The others are in sets.py, which is read when one is asked for, latents in latents.py. To add a data
set: a function (data_dir, size) -> train, heldout, class names, and its line in DATASETS.
"""
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable, NamedTuple

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
    grey = partial(np.pad, constant_values=128)                   # lines between them
    tiles = grey(images, ((0, -n % columns), (1, 0), (1, 0), (0, 0)))
    sheet = tiles.reshape(-1, columns, H + 1, W + 1, ch).swapaxes(1, 2)
    sheet = grey(sheet.reshape(-1, columns * (W + 1), ch), ((0, 1), (0, 1), (0, 0)))
    zoom = max(1, round(48 / H))
    return Image.fromarray(sheet.repeat(zoom, 0).repeat(zoom, 1).squeeze())


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


def load_digits(data_dir, size):
    if size not in (16, 32):
        raise ValueError(f"--size {size}: the digits come in 16 or 32 pixels")
    z = read_npz(ASSETS / "digits.npz", "bitmaps", "labels", "split")
    bits, labels, split = np.unpackbits(z["bitmaps"], axis=-1), z["labels"], z["split"]
    bits = bits.reshape(-1, size, 32 // size, size, 32 // size).mean((2, 4))
    images = np.round(255 * bits).astype(np.uint8)[..., None]
    return *(ImageArray(images[split == s], labels[split == s]) for s in (0, 1)), range(10)


# ---------------------------------------------------------------- a data set by name

class Set(NamedTuple):
    load: Callable | str | None     # (data_dir, size) -> train, heldout, class names; its name in
                                    # sets.py; None: latents
    defaults: dict = {}             # of train.py's flags and settings, where they differ
    reads: tuple = ()               # which of the flags --data_dir, --max_bad, --vae, --cache_dir


NEEDS_DIR = ("data_dir",)
PHOTOS = ("data_dir", "max_bad", "vae", "cache_dir")
SHAPES = dict(diffusion_batch_mul=4)
FILES = dict(size=None, steps=6000, eval_every=1000)           # None: the size that they have
IMAGENET = dict(patch=1, model="gpt-xl", steps=250_000, global_batch=2048, lr=8e-4,
                eval_every=5000, lr_schedule="constant", warmup=62_500, ema_decay=0.9999,
                optimizer="adamw")
DATASETS = {
    "digits": Set(load_digits),
    "shapes": Set("load_shapes", SHAPES),
    "mnist": Set("load_mnist", FILES, NEEDS_DIR),
    "cifar10": Set("load_cifar10", FILES, NEEDS_DIR),
    "cifar100": Set("load_cifar100", FILES, NEEDS_DIR),
    "arrays": Set("load_arrays", FILES, NEEDS_DIR),
    # as digits and shapes, without their held-out images: where defaults are chosen
    "digits-tune": Set("load_digits_tune"),
    "shapes-tune": Set("load_shapes_tune", SHAPES),
    "folder": Set("load_folder", {}, PHOTOS),
    "imagenet256": Set(None, dict(IMAGENET, size=256), PHOTOS),
    "imagenet512": Set(None, dict(IMAGENET, size=512), PHOTOS),
    "latents": Set(None, FILES | dict(patch=1), ("data_dir", "vae")),
}


@dataclass
class Data:
    """A data set of pixels; latents.LatentData is one of latents."""
    name: str
    train: object
    heldout: object
    class_names: list
    size: int                       # pixels of a side
    channels: int
    patch: int                      # pixels of a token's side
    grid: int                       # tokens of a side
    data_dir: str | None = None

    x0_bound = 1.0                  # tokens lie within +- this
    latents = vae = cache_dir = None

    @property
    def facts(self):
        """What a checkpoint carries of its data set."""
        return {"dataset": self.name, "size": self.size, "channels": self.channels,
                "patch": self.patch, "n_train": len(self.train), "n_heldout": len(self.heldout),
                "data_dir": self.data_dir, "cache_dir": self.cache_dir, "vae": self.latents,
                "class_names": self.class_names, "x0_bound": self.x0_bound}

    @property
    def token_dim(self):
        return self.channels * self.patch ** 2

    def decode(self, x):
        """Tokens (B, N, D) -> images (B, ch, H, W), about [-1, 1]."""
        return unpatchify(x, self.patch)


def flags_of(name, args):
    """{flag: value} of those flags that the set reads, a cache_dir only with --vae. Others are not
    looked at here, so that command.Flags refuses them."""
    if name not in DATASETS:
        raise ValueError(f"no data set {name!r} is known; data.DATASETS has {', '.join(DATASETS)}")
    return {flag: getattr(args, flag) for flag in DATASETS[name].reads
            if flag in vars(args) and (flag != "cache_dir" or args.vae)}


def load(name, data_dir=None, size=None, patch=4, max_bad=0.01, vae=None, **of_latents):
    """A Data by name. Raises ValueError for a bad size, path or file.

    vae: path of kl16.ckpt; then the tokens are its latents. of_latents: see latents.load.
    """
    which = DATASETS[name]
    loader = which.load
    if loader is None or vae:
        import latents
        return latents.load(name, data_dir, size or which.defaults.get("size", 256), patch,
                            max_bad, vae, **of_latents)
    if "data_dir" in which.reads and data_dir is None:
        raise ValueError(f"--dataset {name} needs --data_dir, the folder or file that holds it")
    if isinstance(loader, str):
        import sets
        loader = getattr(sets, loader)
    options = {"max_bad": max_bad} if "max_bad" in which.reads else {}
    train, heldout, names = loader(data_dir, size or which.defaults.get("size", 16), **options)
    names = [str(n) for n in names]
    check_classes(data_dir or name, train, heldout, names)
    channels, size = train.batch([0])[0].shape[1:3]
    if size % patch:
        fit = ", ".join(str(p) for p in range(1, size) if size % p == 0)
        raise ValueError(f"a side of {size} pixels must be a multiple of --patch {patch}; those "
                         f"that fit: {fit}")
    return Data(name, train, heldout, names, size, channels, patch, size // patch, data_dir)


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


def again(facts, data_dir, vae, device):
    """The Data that a model was trained on, by its data facts; where it is now: data_dir, vae."""
    scale = (facts.get("vae") or {}).get("scale")
    found = load(facts["dataset"], data_dir or facts.get("data_dir"), facts["size"], facts["patch"],
                 vae=vae, cache_dir=facts.get("cache_dir"), device=device, scale=scale)
    names, channels = found.class_names, found.channels
    if (names, channels) != (facts["class_names"], facts["channels"]):
        raise ValueError(f"the images are of {len(names)} classes ({names[0]} ...) and {channels} "
                         "channels, not those that the model was trained on; give the right "
                         "--data_dir")
    return found


def find_class(word, names):
    """The class number of a name, or of what sets.find_class takes for one."""
    if names.count(word) == 1:
        return names.index(word)
    import sets
    return sets.find_class(word, names)


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
