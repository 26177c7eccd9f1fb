"""How good are the images: Frechet distance, KID, precision, recall, class accuracy, copying ...

    python evaluate.py --ckpt out/ar --refine default --seeds 0 1 2    drawn as sample.py does it
    python evaluate.py --samples s.npz --ref r.npz --features inception    FID as it is published
    python evaluate.py --samples s.npz --dataset digits

Reading order: the metrics, pure functions of features in float64; the feature spaces; the Judge,
which holds real images and measures others against them; files; the command. A feature space is

    images uint8 (n, H, W, C) -> features (n, F) float32, logits (n, K) or None

so that no metric knows what a pixel is, and a new space is a function. The Frechet distance of few
images is too large, by about tr(S) / n and more: each number stands beside that of real images
against real ones (the floor), and beside KID, which is unbiased.

References: Heusel et al. 2017 (FID), Binkowski et al. 2018 (KID), Salimans et al. 2016 (Inception
score), Kynkaanniemi et al. 2019 (precision, recall), Dhariwal & Nichol 2021 (files, protocol).
"""
import difflib
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data
import sample
from data import Parser, image_grid, number, patchify, run, to_uint8
from model import pick_device

MIN_IMAGES = 10             # the Inception score's splits; precision and recall need four
MAX_REAL = 10_000           # reference images, as in the published protocol
MAX_TRAIN = 20_000          # training images: the classifier learns them in a minute or two
CHUNK = 2 ** 23             # distances held at once: 64 MiB


def warn(message):
    print(f"warning: {message}", file=sys.stderr)


# ---- the metrics ---------------------------------------------------------------------------------

def gaussian(x):
    """Mean (F,) and covariance (F, F) of the rows of x (n, F), in float64."""
    mean = sum(part.double().sum(0) for part in x.split(4096)) / len(x)
    centred = (part.double() - mean for part in x.split(4096))
    return mean, sum(part.T @ part for part in centred) / (len(x) - 1)


def frechet_distance(mu1, S1, mu2, S2):
    """W2^2 of two Gaussians: |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2). (F,), (F, F).

    The last trace is the nuclear norm of S1^(1/2) S2^(1/2). The usual eigenvalues of R S2 R turn
    rounding of 1e-16 into 1e-8 in each null direction; so it is 1e-12, and exactly symmetric.
    """
    mu1, S1, mu2, S2 = (torch.as_tensor(a).double() for a in (mu1, S1, mu2, S2))

    def root(S):
        w, q = torch.linalg.eigh(S)
        return (q * w.clamp(min=0).sqrt()) @ q.T

    cross = torch.linalg.svdvals(root(S1) @ root(S2)).sum()
    return max(0., ((mu1 - mu2).square().sum() + S1.trace() + S2.trace() - 2 * cross).item())


def kid(x, y, block=1000, n_blocks=100, seed=0):
    """Unbiased squared MMD of x (n, F), y (m, F) under (x.y / F + 1)^3: mean, std over blocks.

    A block takes at most half of the smaller set, or all blocks would be the same.
    """
    if min(len(x), len(y)) < 4:
        raise ValueError(f"KID needs at least 4 samples a side, got {len(x)} and {len(y)}")
    gen = torch.Generator().manual_seed(seed)
    block = min(block, min(len(x), len(y)) // 2)

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    values = torch.empty(n_blocks, dtype=torch.float64)
    for k in range(n_blocks):
        a = x[torch.randperm(len(x), generator=gen)[:block]].double()
        b = y[torch.randperm(len(y), generator=gen)[:block]].double()
        # without the diagonal k(a, a), which makes the plain estimate biased
        within = sum(m.sum() - m.trace() for m in (kernel(a, a), kernel(b, b)))
        values[k] = within / (block * (block - 1)) - 2 * kernel(a, b).mean()
    return values.mean().item(), values.std(correction=0).item()


def inception_score(probs, splits=10, seed=0):
    """exp of the mean KL(p(y|x) || p(y)) of probs (n, K): mean and std over splits.

    Shuffled first: a file sorted by class has a few classes a split, which gives 60 for 300.
    """
    if len(probs) < splits:
        raise ValueError(f"the Inception score takes {splits} splits of {len(probs)} samples")
    order = torch.randperm(len(probs), generator=torch.Generator().manual_seed(seed))
    parts, log = probs[order].double().tensor_split(splits), torch.special.xlogy
    scores = torch.stack([(log(p, p) - log(p, p.mean(0))).sum(1).mean().exp() for p in parts])
    return scores.mean().item(), scores.std(correction=0).item()


def distances(x, y):
    """Euclidean distances of x (n, F) and y (m, F), some rows at a time: yields (rows, m)."""
    y = y.double()
    y2 = y.square().sum(1)
    for a in x.split(max(1, CHUNK // len(y))):
        a = a.double()
        size = a.square().sum(1, keepdim=True) + y2
        d2 = size - 2 * a @ y.T
        yield torch.where(d2 > 1e-13 * size, d2, 0.).sqrt()     # duplicates at 0, not at 1e-8


def nearest(x, y):
    """Distance and index (n,), (n,) of the nearest row of y (m, F) to each row of x (n, F)."""
    best = [d.min(1) for d in distances(x, y)]
    return torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])


def precision_recall(real, fake, k=3):
    """Precision: share of fake (m, F) inside the manifold of real (n, F); recall: the converse.

    A manifold is the union of balls about its points, each to its point's k-th nearest neighbour.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall need more than k={k} samples, "
                         f"got {len(real)} and {len(fake)}")

    def inside(points, of):
        # k + 1: every point is its own nearest neighbour
        radius = torch.cat([d.topk(k + 1, largest=False).values[:, -1] for d in distances(of, of)])
        found = torch.cat([(d <= radius).any(1) for d in distances(points, of)])
        return found.double().mean().item()

    return inside(fake, real), inside(real, fake)


def sliced_w2(x, y, n_proj=256, seed=0):
    """Root mean square of 1-D W2 over random directions, exact at any sizes. x (n, F), y (m, F)."""
    n, m, gen = len(x), len(y), torch.Generator().manual_seed(seed)
    direction = torch.randn(x.shape[1], n_proj, dtype=torch.float64, generator=gen)
    direction = (direction / direction.norm(dim=0)).to(x.device)
    px, py = ((z.double() @ direction).sort(0).values for z in (x, y))      # (n, P), (m, P)

    # both quantile functions are steps: they jump at i/n and j/m, in whole units of 1/(nm)
    edge = torch.cat([torch.arange(n + 1) * m, torch.arange(m + 1) * n]).unique().to(x.device)
    width = edge.diff().double() / (n * m)
    gap = px[edge[:-1] // m] - py[edge[:-1] // n]
    return (width @ gap.square()).mean().sqrt().item()


def copy_ratio(samples, seen, unseen):
    """Mean distance to the nearest image that the sampler saw, over that to the nearest of real
    ones that it did not. All (n, F). A copier is far below what held-out images have."""
    return (nearest(samples, seen)[0].mean() / nearest(samples, unseen)[0].mean()).item()


def class_accuracy(logits, labels):
    """Share of samples recognised as the class that they were asked for. (n, K), (n,)."""
    return (logits.argmax(1) == labels).double().mean().item()


def within_class_spread(x, labels):
    """Root mean square distance of x (n, F) to the mean of its class, averaged over classes."""
    groups = [x[labels == y].double() for y in labels.unique()]
    spread = [g.var(0).sum().sqrt() for g in groups if len(g) > 1]
    return torch.stack(spread).mean().item() if spread else None


# ---- feature spaces ------------------------------------------------------------------------------

def pixels(images):
    """The raw pixels in [0, 1]."""
    if images[0].numel() > 4096:
        raise ValueError(f"--features pixels: {images[0].numel()} dimensions, at most 4096 are "
                         "possible (32x32 in colour), as a covariance is computed")
    return images.flatten(1).float() / 255, None


class Classifier(nn.Module):
    """A small conv net for any image size: 64 features, of unit variance over the training set."""

    def __init__(self, channels, num_classes, width=16):
        super().__init__()

        def conv(a, b):
            return [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]

        self.body = nn.Sequential(
            *conv(channels, width), *conv(width, width), nn.MaxPool2d(2, ceil_mode=True),
            *conv(width, 2 * width), *conv(2 * width, 2 * width), nn.AdaptiveMaxPool2d(3),
            nn.Flatten(), nn.Linear(18 * width, 64, bias=False))
        self.norm = nn.BatchNorm1d(64, affine=False)    # fixes the scale: FDs of two seeds compare
        self.head = nn.Linear(64, num_classes)

    def forward(self, images, augment=None):
        x = small(images)
        if augment is not None:
            x = jitter(x, augment)
        x = self.norm(self.body(x))
        return x, self.head(F.relu(x))


def small(images):
    """uint8 (n, H, W, C) -> (n, C, h, w) in [-1, 1], at most 32x32."""
    x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    return F.interpolate(x, size=(32, 32), mode="area") if max(x.shape[2:]) > 32 else x


def thumbnails(images):
    """Where copies are looked for: the pixels (n, F) of at most 32x32."""
    return torch.cat([small(part).flatten(1) for part in torch.as_tensor(images).split(256)])


def jitter(x, generator):
    """Small random shifts, turns and scalings of x (n, C, H, W), each image its own."""
    most = torch.tensor([[.15], [.1], [.12], [.12]])
    angle, scale, dx, dy = (torch.rand(4, len(x), generator=generator) * 2 - 1) * most
    cos, sin = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
    theta = torch.stack([torch.stack([cos, -sin, dx], 1), torch.stack([sin, cos, dy], 1)], 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def train_classifier(images, labels, seed=0, epochs=10, cache="cache"):
    """The Classifier of images uint8 (n, H, W, C) and labels (n,) from 0 up: seeded, on the CPU.

    Kept in the folder `cache` (None: not) under a hash of images, labels and settings.
    """
    images, labels = torch.as_tensor(images), torch.as_tensor(labels).long()
    digest = hashlib.sha256(json.dumps(["version 2", seed, epochs, *images.shape]).encode())
    digest.update(images.contiguous().numpy().tobytes() + labels.numpy().tobytes())
    path = cache and os.path.join(cache, f"classifier-{digest.hexdigest()[:16]}.pt")

    with torch.random.fork_rng(devices=[]):             # the caller's random state stays
        torch.manual_seed(seed)
        net = Classifier(images.shape[3], int(labels.max()) + 1)
    if path and os.path.isfile(path):
        try:
            net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
            return net.eval().requires_grad_(False)
        except Exception as e:                          # zip, pickle, keys, shapes
            warn(f"{path} is unreadable ({type(e).__name__}): training it again")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)            # layers so small: two threads on two busy cores took 10x
    gen = torch.Generator().manual_seed(seed)
    per_epoch = max(1, len(images) // 64)               # equal batches: one image has no variance
    opt = torch.optim.AdamW(net.parameters(), weight_decay=.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, total_steps=epochs * per_epoch)
    for _ in tqdm(range(epochs), desc="training the classifier", leave=False, disable=None):
        for i in torch.randperm(len(images), generator=gen).tensor_split(per_epoch):
            loss = F.cross_entropy(net(images[i], augment=gen)[1], labels[i])
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
    torch.set_num_threads(threads)
    if path:
        os.makedirs(cache, exist_ok=True)
        torch.save(net.state_dict(), f"{path}.{os.getpid()}")
        os.replace(f"{path}.{os.getpid()}", path)       # never a half-written cache
    return net.eval().requires_grad_(False)


def make_extractor(name, real, device="cpu", weights=None, cache="cache"):
    """The feature space of --features."""
    if name == "pixels":
        return pixels
    if name == "inception":
        import inception
        return inception.load_inception(weights).to(device)
    if real.train_labels is None:
        raise ValueError("--features classifier learns from labelled training images: give "
                         "--train t.npz with arr_0 and arr_1, or --dataset")
    return train_classifier(real.train_images, real.train_labels, cache=cache).to(device)


@torch.no_grad()
def extract(space, images, device="cpu", batch_size=64):
    """Features (n, F) and logits (n, K) or None, both on the CPU, of images uint8 (n, H, W, C)."""
    rows, parts = [], torch.as_tensor(images).split(batch_size)
    # published features are fp32: convolutions in TF32 differ
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for part in tqdm(parts, desc="features", leave=False, disable=len(parts) < 80 or None):
            rows.append([None if a is None else a.cpu() for a in space(part.to(device))])
    x, logits = (None if r[0] is None else torch.cat(r) for r in zip(*rows))
    if not x.isfinite().all():
        raise ValueError("the extractor gave non-finite features: damaged weights?")
    return x, logits


# ---- real images, and the Judge ------------------------------------------------------------------

class Real(NamedTuple):
    """Real images uint8 (n, H, W, C) and labels (n,); images or gaussian must be there."""
    images: torch.Tensor = None             # the reference: held-out images
    labels: torch.Tensor = None
    train_images: torch.Tensor = None       # for classifier, floor and copy ratio
    train_labels: torch.Tensor = None
    gaussian: tuple = None                  # published mu, sigma: they define the Frechet distance
    notes: tuple = ()                       # what a reader must know of them


@torch.no_grad()
def real_images(dataset, device="cpu"):
    """The Real of a data set: the first images of each class in the order of `of_class`, which is
    that of refinement's targets. Of latents: the images that they decode to."""
    found, notes, K = [], [], len(dataset.class_names)
    for split, most in ((dataset.heldout, MAX_REAL), (dataset.train, MAX_TRAIN)):
        index = torch.cat([split.of_class(y, max(1, most // K)) for y in range(K)])
        images, labels = [], []
        for part in index.split(256):               # an image is 48 times as large as its latent
            x, y = split.batch(part)
            images.append(to_uint8(dataset.decode(patchify(x, dataset.patch).to(device))))
            labels.append(y)
        found += [torch.from_numpy(np.concatenate(images)), torch.cat(labels)]
        if len(index) < len(split):
            what = "held-out" if split is dataset.heldout else "training"
            notes.append(f"{len(index)} of {len(split)} {what} images are used")
    if dataset.vae:
        notes.append("the real images are decoded latents: what the VAE loses is not counted; to "
                     "compare with published numbers measure a file with --ref")
    if len(found[0]) < MIN_IMAGES:
        raise ValueError(f"{dataset.name} has {len(found[0])} held-out images; at least "
                         f"{MIN_IMAGES} are needed")
    return Real(*found, notes=tuple(notes))


def place_in_class(labels):
    """How many images of its class come before each image: (n,)."""
    place = torch.empty_like(labels)
    for y in labels.unique():
        place[labels == y] = torch.arange(int((labels == y).sum()))
    return place


class Judge:
    """Measures images against real ones, in one feature space.

    judge(images, labels, m)  -> features (n, F), {metric: value}
    judge.floor(n, m)         -> {metric: value} of n real images, and in words: of which
    m: refinement took its targets from the first m training images of each class (None: it did not)
    """

    def __init__(self, space, real, device="cpu", seed=0):
        self.space, self.real, self.device, self.seed = space, real, device, seed
        self.x = self.logits = self.seen = self.unseen = self.other = None
        if real.images is not None:
            self.x, self.logits = extract(space, real.images, device)
            if real.train_images is not None:
                unseen, self.other = self.shuffled(real.images).chunk(2)
                self.seen, self.unseen = thumbnails(real.train_images), thumbnails(unseen)
        self.gaussian = real.gaussian or gaussian(self.x)

    def __call__(self, images, labels=None, m=None):
        x, logits = extract(self.space, images, self.device)
        if x.shape[1:] != self.gaussian[0].shape:
            raise ValueError(f"mu has {len(self.gaussian[0])} entries, the features {x.shape[1]}: "
                             "statistics belong to the extractor that made them")
        return x, {**self.compare(x, self.x, self.gaussian), **self.describe(x, logits, labels),
                   **self.copying(images, m)}

    def floor(self, n, m=None):
        if self.x is None:
            return {}, "not computed: the reference has no images"
        train, labels = self.real.train_images, self.real.train_labels
        if train is None:
            x, y = self.shuffled(self.x).chunk(2)
            stats, which = gaussian(y), f"one half of the reference ({len(x)} images), the other"
        else:
            i = self.shuffled(torch.arange(len(train)))
            if labels is not None:                      # classes as balanced as those of samples
                i = i[place_in_class(labels[i]).argsort(stable=True)]
            x, y = extract(self.space, train[i[:n]], self.device)[0], self.x
            stats, which = self.gaussian, f"{len(x)} training images against the same reference"
        return {**self.compare(x, y, stats), **self.copying(self.other, m),
                **self.describe(self.x, self.logits, self.real.labels)}, which

    def compare(self, x, y, stats):
        """Features x (n, F) against real ones y (m, F), None where only their stats are known."""
        values = {"fid": frechet_distance(*gaussian(x), *stats)}
        if y is not None:
            x, y = x.to(self.device), y.to(self.device)
            values["kid"], values["kid_std"] = kid(x, y, seed=self.seed)
            values["sliced_w2"] = sliced_w2(x, y, seed=self.seed)
            some = self.shuffled(y)[:MAX_REAL]
            values["precision"], values["recall"] = precision_recall(some, x)
        return values

    def describe(self, x, logits, labels):
        """The metrics that need no reference."""
        values, known = {}, self.real.train_labels
        if logits is not None:
            probs = logits.double().softmax(1)
            values["is"], values["is_std"] = inception_score(probs, seed=self.seed)
            # Inception's 1008 classes are not those of the labels
            if labels is not None and known is not None and logits.shape[1] == known.max() + 1:
                values["accuracy"] = class_accuracy(logits, labels)
        if labels is not None:
            values["spread"] = within_class_spread(x, labels)
        return values

    def copying(self, images, m):
        """copy_ratio: training images, or half of the held-out ones; bank_ratio: refinement's
        targets, or other training images, where these are a tenth or more."""
        if self.seen is None:
            return {}
        x, values = thumbnails(images), {}
        values["copy_ratio"] = copy_ratio(x, self.seen, self.unseen)
        bank = place_in_class(self.real.train_labels) < m if m else torch.ones(1)
        if bank.double().mean() < 0.9:
            values["bank_ratio"] = copy_ratio(x, self.seen[bank], self.seen[~bank])
        return values

    def shuffled(self, x):
        gen = torch.Generator().manual_seed(self.seed)
        return x[torch.randperm(len(x), generator=gen).to(x.device)]


# ---- files ---------------------------------------------------------------------------------------

def read_npz(path, flag):
    """The arrays of an npz file as a dict."""
    if not os.path.isfile(path):
        raise ValueError(f"no {flag} file at {path}")
    try:
        with np.load(path, allow_pickle=False) as z:
            return dict(z)
    except Exception as e:                              # truncated, foreign, pickled objects
        why = " ".join(str(e).split())[:150]
        raise ValueError(f"{flag} file {path} is not a readable npz: {why}") from None


def read_images(z, path):
    """arr_0 and arr_1 as ADM writes them: images uint8 (n, H, W, C), labels (n,) or None."""
    if "arr_0" not in z:
        raise ValueError(f"{path} holds {sorted(z)}; expected arr_0, images uint8 (N, H, W, C)")
    x, y = z["arr_0"], z.get("arr_1")
    if x.dtype != np.uint8:
        raise ValueError(f"{path}: arr_0 is {x.dtype}; expected uint8: from [-1, 1], "
                         "(x * 127.5 + 127.5).round().clip(0, 255)")
    if x.ndim != 4 or x.shape[3] not in (1, 3) or 0 in x.shape[1:]:
        turned = x.ndim == 4 and x.shape[1] in (1, 3)
        hint = "; this looks like (N, C, H, W): transpose(0, 2, 3, 1)" if turned else ""
        raise ValueError(f"{path}: arr_0 has shape {x.shape}; expected (N, H, W, 1 or 3){hint}")
    if len(x) < MIN_IMAGES:
        raise ValueError(f"{path}: {len(x)} images; at least {MIN_IMAGES} are needed, and "
                         "thousands for a number worth quoting")
    if y is not None and (y.shape != (len(x),) or y.dtype.kind not in "iu" or y.min() < 0):
        raise ValueError(f"{path}: arr_1 is {y.dtype} {y.shape}; expected {len(x)} class numbers "
                         "from 0 up, one for each image")
    return torch.from_numpy(x), None if y is None else torch.from_numpy(y.astype(np.int64))


def read_real(ref, train=None):
    """The Real of --ref (statistics, images or both) and --train."""
    z = read_npz(ref, "--ref")
    stats = tuple(torch.from_numpy(z[k]) for k in ("mu", "sigma") if k in z)
    if not stats and "arr_0" not in z:
        raise ValueError(f"{ref} holds {sorted(z)}; expected mu and sigma (statistics), "
                         "or arr_0 (images), or all three")
    if stats and [a.shape for a in stats] != [stats[0].shape, stats[0].shape * 2]:
        shapes = ", ".join(f"{k} {z[k].shape}" for k in ("mu", "sigma") if k in z)
        raise ValueError(f"{ref}: expected mu (F,) and sigma (F, F), got {shapes}")
    if not all(a.isfinite().all() for a in stats):
        raise ValueError(f"{ref}: mu or sigma is not finite")
    images = read_images(z, ref) if "arr_0" in z else (None, None)
    seen = read_images(read_npz(train, "--train"), train) if train else (None, None)
    return Real(*images, *seen, gaussian=stats or None)


def check_fit(real, images, labels):
    """The Real, or ValueError where it cannot be compared with these images."""
    for name, x in (("reference", real.images), ("training images", real.train_images)):
        if x is not None and x.shape[1:] != images.shape[1:]:
            raise ValueError(f"the samples are {tuple(images.shape[1:])}, the {name} "
                             f"{tuple(x.shape[1:])} (H, W, C): make both the same size")
    known = real.train_labels
    if labels is not None and known is not None and labels.max() > known.max():
        raise ValueError(f"the samples have class {labels.max()}, the training images only 0 to "
                         f"{known.max()}")
    return real


# ---- python evaluate.py --------------------------------------------------------------------------

ROWS = {"fid": ("Frechet distance", "lower"), "kid": ("KID x 1000", "lower"),
        "sliced_w2": ("sliced W2", "lower"), "precision": ("precision", "higher"),
        "recall": ("recall", "higher"), "is": ("Inception score", "higher"),
        "accuracy": ("class accuracy", "higher"), "spread": ("within-class spread", "as real"),
        "copy_ratio": ("copy ratio", "as real"), "bank_ratio": ("copy ratio, targets", "as real")}


def parse_args(argv=None):
    """Our own flags, and a list of those that are for sample.py."""
    p = Parser(description="Measure images, of a checkpoint or of a file, against real ones.",
               epilog="With --ckpt, flags of sample.py that say how to draw may be added: "
                      "--refine default --steps 10 ... (see sample.py --help).")
    add = p.add_argument
    add("--ckpt", help="draw from this checkpoint or run, compare with its held-out images")
    add("--n", type=number(int, MIN_IMAGES), default=1000,
        help="--ckpt: images a seed, rounded up to equally many of each class")
    add("--seeds", type=number(int, 0, 2 ** 32 - 1), nargs="+", default=[0], metavar="SEED",
        help="--ckpt: of the noise; several give mean +- deviation")
    add("--samples", metavar="NPZ", help="measure a file of sample.py --out, or of its layout")
    add("--ref", metavar="NPZ", help="--samples: real images, or their mu and sigma, or both")
    add("--train", metavar="NPZ", help="--ref: labelled images that the model was trained on")
    add("--dataset", choices=data.DATASETS, help="--samples: instead of --ref and --train")
    add("--data_dir", help="folder of the data set (--ckpt: default as in training)")
    add("--features", choices=("classifier", "pixels", "inception"),
        help="what the metrics see (default: with --ref inception, else classifier)")
    add("--weights", default="cache/pt_inception-2015-12-05-6726825d.pth",
        help="--features inception: its weights")
    add("--cache", default="cache", help="folder that keeps trained classifiers")
    add("--json", metavar="FILE", help="also write the numbers there")
    add("--grid", metavar="PNG", help="also draw images, each above its nearest training image")
    add("--vae", help="kl16.ckpt, which decodes the latents of --ckpt or --dataset")
    add("--device", default="auto", help="auto, cpu, cuda ...")

    args, drawing = p.parse_known_args(argv)
    if not args.ckpt:
        return p.parse_args(argv), []
    for a in drawing:                                   # --seed is --seeds here
        close = difflib.get_close_matches(a.split("=")[0], p._option_string_actions, 1, 0.85)
        if close:
            p.error(f"unknown argument {a}; did you mean {close[0]}?")
    return args, drawing


def from_checkpoint(args, drawing, device):
    """(what is measured, its sets of images and labels, a function that gives the Real, m)."""
    ours = {k: getattr(args, k) for k in ("ckpt", "device", "vae", "data_dir")}
    how = sample.parse_args([*(f"--{k}={v}" for k, v in ours.items() if v), *drawing])
    if how.inpaint:
        raise ValueError("--inpaint: images that are given in part are not measured")
    job = sample.setup(how)
    dataset, n, seeds = job.dataset(), args.n, args.seeds
    how.check_used()
    if job.refinement:
        check_unseen(job.refinement, dataset)
    m = job.refinement.m if job.refinement and job.refinement.stages else None
    about = {"ckpt": args.ckpt, "step": job.state["step"], "seeds": seeds, "drawing": drawing}
    sets = (draw(job, n, len(dataset.class_names), seed) for seed in seeds)
    return about, sets, lambda: real_images(dataset, device), m


def check_unseen(refinement, dataset):
    """ValueError where refinement takes its targets from the images that it is measured against."""
    held = sample.tokens_of(dataset, "heldout")
    for k in range(min(3, len(dataset.class_names))):
        targets = {x.numpy().tobytes() for x in refinement.tokens_of(k, refinement.m)}
        real = [x.numpy().tobytes() for x in held(k, refinement.m)]
        if sum(x in targets for x in real) > len(real) / 10:
            raise ValueError("the targets of refinement are held-out images, which the result is "
                             "measured against: take them from the training images")


def draw(job, n, K, seed):
    """Images uint8 (n, H, W, C) and labels (n,), image k that of sample.py; n is rounded up."""
    labels = torch.arange(-(-n // K) * K) % K
    with tqdm(total=len(labels), desc=f"sampling, seed {seed}", leave=False, disable=None) as bar:
        images = job.images(labels, torch.arange(len(labels)), seed, bar.update)
    return torch.from_numpy(images), labels


def from_file(args, device):
    """The same of --samples."""
    if bool(args.ref) == bool(args.dataset):
        raise ValueError("what are the samples to be measured against? give either --ref FILE or "
                         "--dataset NAME")
    images, labels = read_images(read_npz(args.samples, "--samples"), args.samples)
    if args.ref:
        real = read_real(args.ref, args.train)
        real_side = lambda: check_fit(real, images, labels)
    else:
        dataset = data.load(args.dataset, args.data_dir, size=images.shape[1], patch=1,
                            vae=args.vae, device=device)
        real_side = lambda: check_fit(real_images(dataset, device), images, labels)
    about = {"samples": args.samples, "ref": args.ref or args.dataset}
    return about, [(images, labels)], real_side, None


def main(argv=None):
    args, drawing = parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("evaluate.py is one process: draw by torchrun ... sample.py --out s.npz, "
                         "then measure by python evaluate.py --samples s.npz")
    if bool(args.ckpt) == bool(args.samples):
        raise ValueError("what is to be measured? give either --ckpt RUN or --samples FILE")
    device = pick_device(args.device)
    source = from_checkpoint(args, drawing, device) if args.ckpt else from_file(args, device)
    about, sets, real_side, m = source
    # each flag is looked at only where it has an effect, so that check_used refuses the others
    features = args.features or ("inception" if not args.ckpt and args.ref else "classifier")
    weights = args.weights if features == "inception" else None
    cache = args.cache if features == "classifier" else None
    out = {"json": args.json, "grid": args.grid}
    args.check_used()
    for flag, path in out.items():
        if path and (not Path(path).parent.is_dir() or Path(path).is_dir()):
            raise ValueError(f"--{flag} {path}: expected a file in a folder that exists")

    real = real_side()
    if out["grid"] and real.train_images is None:
        raise ValueError("--grid shows nearest training images: give --train or --dataset")
    judge = Judge(make_extractor(features, real, device, weights, cache), real, device)
    first, rows = None, []
    for images, labels in sets:
        x, values = judge(images, labels, m)
        first = first or (images, labels)
        rows.append(values)
    floor, which = judge.floor(len(x), m)
    result = {**about, "features": features, "dim": x.shape[1], "n_samples": len(x),
              "n_ref": None if judge.x is None else len(judge.x), "values": mean_std(rows),
              "floor": floor, "floor_is": which}
    result["notes"] = [*real.notes, *caveats(result, labels)]
    print_table(result, len(rows))
    if out["json"]:
        Path(out["json"]).write_text(json.dumps(result, indent=1))
    if out["grid"]:
        neighbour_grid(out["grid"], *first, real)


def mean_std(rows):
    """{key: mean, key_std: deviation} over dicts of several seeds; one dict as it is."""
    if len(rows) == 1:
        return rows[0]
    columns = {k: [r[k] for r in rows] for k in rows[0] if not k.endswith("_std")}
    return {**{k: float(np.mean(v)) for k, v in columns.items()},
            **{k + "_std": float(np.std(v, ddof=1)) for k, v in columns.items()}}


def caveats(result, labels):
    """Sentences that a reader must know before quoting the numbers."""
    n, dim, n_ref = result["n_samples"], result["dim"], result["n_ref"]
    if n_ref and n_ref > MAX_REAL:
        yield f"precision and recall: {MAX_REAL} of the {n_ref} reference images"
    if n < 10 * dim:
        yield (f"{n} samples for {dim} dimensions: the Frechet distance is biased upward; compare "
               "at equal N, or by KID")
    if result["features"] == "inception" and n != 50_000:
        yield f"{n} samples: published FID, precision and recall are for 50000"
    count = torch.zeros(1) if labels is None else labels.bincount()
    if count.min() != count.max():
        yield f"classes are not balanced: {count.min()} to {count.max()} samples of a class"


def print_table(result, n_seeds):
    def cell(row, key):
        scale = 1000 if key == "kid" else 1
        std = f" +- {row[key + '_std'] * scale:.3g}" if key + "_std" in row else ""
        return "-" if row.get(key) is None else f"{row[key] * scale:.4g}{std}"

    values, floor, n_ref = result["values"], result["floor"], result["n_ref"]
    print(f"{n_seeds} x " * (n_seeds > 1) + f"{result['n_samples']} samples against "
          f"{f'{n_ref} images' if n_ref else 'statistics'}; "
          f"features: {result['features']}, {result['dim']}-d")
    print(f"{'':22}{'samples':>18}{'real vs real':>18}   better")
    for key, (title, better) in ROWS.items():
        if values.get(key) is not None:
            print(f"{title:22}{cell(values, key):>18}{cell(floor, key):>18}   {better}")
    print(f"real vs real: {result['floor_is']}"
          + "; score, accuracy and spread: the reference's own" * bool(floor)
          + f"; +- of the samples: over {n_seeds} seeds" * (n_seeds > 1))
    for note in result["notes"]:
        print(f"note: {note}")


def neighbour_grid(path, images, labels, real):
    """Thirty images, by class, each above its nearest training image."""
    some = torch.linspace(0, len(images) - 1, min(30, len(images) // 10 * 10)).long()
    some = some if labels is None else some[labels[some].argsort(stable=True)]
    near = nearest(thumbnails(images[some]), thumbnails(real.train_images))[1]
    pairs = torch.stack([images[some], real.train_images[near]])
    rows = pairs.unflatten(1, (-1, 10)).transpose(0, 1).flatten(0, 2)       # ten above ten ...
    image_grid(rows.numpy(), 10).save(path)
    print(f"{path}: {len(some)} samples, each above its nearest training image")


if __name__ == "__main__":
    run(main)
