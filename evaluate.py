"""How good are the samples: FID, KID, Inception score, precision, recall, sliced W2, class accuracy, copying.

    python evaluate.py --ckpt out --refine default --seeds 0 1 2       draw from a checkpoint, measure against its held-out images
    python evaluate.py --ckpt runs/mar-b --vae kl16.ckpt ...           a model of latents: against decoded held-out latents
    python evaluate.py --samples s.npz --ref r.npz                     one set of samples against one of real images
    torchrun --nproc_per_node 8 -- evaluate.py --samples s.npz --ref r.npz   the same numbers, each rank a share of the images
    python evaluate.py ablate --ar out/ar --mar out/mar --cdm out/cdm  the ablation: tables and figures (see ablate.py)
    python evaluate.py theory --ar out/ar --mar out/mar --cdm out/cdm  the paper's claims, measured (see theory.py)

Reading order: the metrics (pure functions of features, float64), the extractors (images -> features), the Judge (real
images that samples are measured against), files and checkpoints, the table and its pictures. An extractor is
    images uint8 (N, H, W, C) -> features (N, F) float32, logits (N, K) or None
so that a metric never knows what a pixel is. FID is biased upward at small N, by about tr(S)/N and more: every number is
printed with its N and beside the same number for real images against real images (the floor), and KID, unbiased.

References: FID Heusel et al. 2017; KID Binkowski et al. 2018; Inception score Salimans et al. 2016; precision
and recall Kynkaanniemi et al. 2019; file formats and protocol Dhariwal & Nichol 2021 (ADM).
"""
import copy
import difflib
import hashlib
import importlib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data as datasets
from data import Parser, image_grid, number, run, to_uint8
from inception import INCEPTION_FILE, load_inception
from model import find_checkpoint, load_model, pick_device, set_threads
from ot_refine import RefineConfig
from sample import Drawer, add_drawing_flags, batches, make_recipe, prepare_refinement, refinement_bytes

MIN_IMAGES = 10                 # ten splits of the Inception score, the fourth neighbour of precision and recall
MAX_REAL = 10_000               # reference images in precision and recall, as in the published protocol
CHUNK = 2 ** 25                 # distances held at once: 256 MiB in float64


def rank():
    return int(os.environ.get("RANK", 0))


def warn(message):
    if rank() == 0:
        print(f"warning: {message}", file=sys.stderr)


# ---- the metrics -----------------------------------------------------------------------------------------

class Moments:
    """Count, mean and covariance of a stream of rows (n, F), float64, exact under any chunking and split across ranks.

    Chan's update: sums of squares are kept about the running mean, so nothing cancels however far the mean is from 0.
    """

    def __init__(self, dim):
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, x):
        if len(x):
            x = x.to("cpu", torch.float64)
            d = x - x.mean(0)
            self._add(len(x), x.mean(0), d.T @ d)
        return self

    def merge(self, other):
        if other.n:
            self._add(other.n, other.mean, other.scatter)
        return self

    def _add(self, n, mean, scatter):
        total, delta = self.n + n, mean - self.mean
        self.scatter += scatter + torch.outer(delta, delta) * (self.n * n / total)
        self.mean += delta * (n / total)
        self.n = total

    @property
    def cov(self):
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.n}")
        return self.scatter / (self.n - 1)


def frechet_distance(mu1, S1, mu2, S2):
    """W2^2 between two Gaussians: |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2). mu (F,), S (F, F) -> float.

    The last trace is the nuclear norm of S1^(1/2) S2^(1/2): the same number as eigh(S1), then the square roots of
    eigvalsh(R S2 R), but those roots turn rounding of 1e-16 into 1e-8 in each null direction (measured 6e-6 for
    FID(x, x) with 500 samples of 1024 dimensions; here 1e-12, and exactly symmetric).
    """
    mu1, S1, mu2, S2 = (torch.as_tensor(a).to(torch.float64) for a in (mu1, S1, mu2, S2))
    if mu1.shape != mu2.shape or S1.shape != S2.shape or S1.shape != mu1.shape * 2:
        raise ValueError(f"sizes differ: means {tuple(mu1.shape)} and {tuple(mu2.shape)}, "
                         f"covariances {tuple(S1.shape)} and {tuple(S2.shape)}")

    def root(S):
        w, q = torch.linalg.eigh(S)
        return (q * w.clamp(min=0).sqrt()) @ q.T

    cross = torch.linalg.svdvals(root(S1) @ root(S2)).sum()
    return max(0., ((mu1 - mu2).square().sum() + S1.trace() + S2.trace() - 2 * cross).item())


def kid(x, y, block=1000, n_blocks=100, seed=0):
    """Unbiased squared MMD with the kernel (x.y / F + 1)^3: mean and std over random blocks. x (n, F), y (m, F).

    Half of the smaller set at most enters one block, or the blocks would all be the same and their std 0.
    """
    if min(len(x), len(y)) < 4:
        raise ValueError(f"KID needs at least 4 samples on each side, got {len(x)} and {len(y)}")
    gen = torch.Generator().manual_seed(seed)
    block = min(block, min(len(x), len(y)) // 2)

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    values = torch.empty(n_blocks, dtype=torch.float64)
    for k in range(n_blocks):
        a = x[torch.randperm(len(x), generator=gen)[:block]].double()
        b = y[torch.randperm(len(y), generator=gen)[:block]].double()
        # the diagonal k(a, a) is what makes the plain estimate biased
        within = sum(m.sum() - m.trace() for m in (kernel(a, a), kernel(b, b)))
        values[k] = within / (block * (block - 1)) - 2 * kernel(a, b).mean()
    return values.mean().item(), values.std(correction=0).item()


def inception_score(probs, splits=10, seed=0):
    """exp of the mean KL(p(y|x) || p(y)): mean and std over splits. probs (N, K).

    Samples are shuffled first: files sorted by class give splits of a few classes each, 60 where 300 is right.
    """
    if len(probs) < splits:
        raise ValueError(f"the Inception score in {splits} splits needs as many samples, got {len(probs)}")
    order = torch.randperm(len(probs), generator=torch.Generator().manual_seed(seed))
    scores = torch.stack([(torch.special.xlogy(p, p) - torch.special.xlogy(p, p.mean(0))).sum(1).mean().exp()
                          for p in probs[order].double().tensor_split(splits)])
    return scores.mean().item(), scores.std(correction=0).item()


def _distances(x, y):
    """All Euclidean distances between x (n, F) and y (m, F), a chunk of rows at a time: (first row, (chunk, m))."""
    y = y.double()
    y2 = y.square().sum(1)
    step = max(1, CHUNK // len(y))
    for i in range(0, len(x), step):
        a = x[i:i + step].double()
        size = a.square().sum(1, keepdim=True) + y2
        d2 = size - 2 * a @ y.T
        yield i, torch.where(d2 > 1e-13 * size, d2, 0.).sqrt()                   # duplicates are at 0, not at 1e-8


def nearest(x, y):
    """Distance and index of the nearest row of y (m, F) to each row of x (n, F): (n,), (n,)."""
    best = [d.min(1) for _, d in _distances(x, y)]
    return torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])


def precision_recall(real, fake, k=3):
    """Precision: share of fake inside the manifold of real; recall: the converse. real (n, F), fake (m, F).

    A manifold is the union of balls about its points, each reaching to its point's k-th nearest neighbour.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall need more than k={k} samples, got {len(real)} and {len(fake)}")

    def inside(points, of):
        # k + 1: every point is its own nearest neighbour
        radius = torch.cat([d.topk(k + 1, largest=False).values[:, -1] for _, d in _distances(of, of)])
        return torch.cat([(d <= radius).any(1) for _, d in _distances(points, of)]).double().mean().item()

    return inside(fake, real), inside(real, fake)


def sliced_w2(x, y, n_proj=256, seed=0):
    """Root of the mean squared 1-D W2 over random directions, exact for unequal sizes. x (n, F), y (m, F)."""
    n, m = len(x), len(y)
    direction = torch.randn(x.shape[1], n_proj, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    direction = (direction / direction.norm(dim=0)).to(x.device)
    px, py = (x.double() @ direction).sort(0).values, (y.double() @ direction).sort(0).values    # (n, P), (m, P)
    # both quantile functions are steps: they jump at i/n and j/m, in whole units of 1/(nm)
    edge = torch.cat([torch.arange(n + 1) * m, torch.arange(m + 1) * n]).unique().to(x.device)
    width = edge.diff().double() / (n * m)
    gap = px[edge[:-1] // m] - py[edge[:-1] // n]
    return (width @ gap.square()).mean().sqrt().item()


def copy_ratio(samples, reference, other, heldout=None):
    """Mean distance to the nearest image of `reference`, over that to the nearest of `other`; and the floor.

    reference: images that the sampler saw (training set, or refinement targets); other: real images that it did not.
    The floor is the same ratio for held-out images, below 1 where `reference` is the larger set; a copier is far
    below it. All (N, F) -> ratio, floor (None without heldout).
    """
    def ratio(x):
        return (nearest(x, reference)[0].mean() / nearest(x, other)[0].mean()).item()
    return ratio(samples), None if heldout is None else ratio(heldout)


def class_accuracy(logits, labels):
    """Share of samples recognised as the class they were asked for. logits (N, K), labels (N,)."""
    return (logits.argmax(1) == labels).double().mean().item()


def within_class_spread(x, labels):
    """Root mean squared distance of a sample to its class mean, averaged over classes with two or more. x (N, F)."""
    groups = [x[labels == y].double() for y in labels.unique()]
    spread = [g.var(0).sum().sqrt() for g in groups if len(g) > 1]
    return torch.stack(spread).mean().item() if spread else None


# ---- extractors: images uint8 (N, H, W, C) -> features (N, F), logits (N, K) or None ---------------------

def pixels(images):
    """The raw pixels in [0, 1]."""
    dim = images[0].numel()
    if dim > 4096:
        raise ValueError(f"--features pixels: {dim} dimensions, whose covariance takes {8e-9 * dim ** 2:.0f} GB; "
                         f"at most 4096 (32x32 in colour); use --features inception")
    return images.flatten(1).float() / 255, None


class Classifier(nn.Module):
    """A small conv net for any image size: 64 features of unit variance over the training images, and logits."""

    def __init__(self, channels, num_classes, width):
        super().__init__()
        def conv(a, b):
            return [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.body = nn.Sequential(*conv(channels, width), *conv(width, width), nn.MaxPool2d(2, ceil_mode=True),
                                  *conv(width, 2 * width), *conv(2 * width, 2 * width), nn.AdaptiveMaxPool2d(3),
                                  nn.Flatten(), nn.Linear(18 * width, 64, bias=False))
        self.norm = nn.BatchNorm1d(64, affine=False)          # fixes the scale, so that FDs of two seeds compare
        self.head = nn.Linear(64, num_classes)

    def forward(self, images, augment=None):
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        if max(x.shape[2:]) > 32:
            x = F.interpolate(x, size=(32, 32), mode="area")
        if augment is not None:
            x = _jitter(x, augment)
        x = self.norm(self.body(x))
        return x, self.head(F.relu(x))


def _jitter(x, generator):
    """Small random shifts, turns and scalings of x (N, C, H, W), an own one for each image."""
    angle, scale, dx, dy = (torch.rand(4, len(x), generator=generator) * 2 - 1) * torch.tensor([[.15], [.1], [.12], [.12]])
    cos, sin = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
    theta = torch.stack([torch.stack([cos, -sin, dx], 1), torch.stack([sin, cos, dy], 1)], 1)    # (N, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def train_classifier(images, labels, seed=0, epochs=10, batch_size=64, lr=4e-3, width=16, cache="cache"):
    """The classifier of a training split: images uint8 (N, H, W, C), labels (N,) from 0 up. Seeded, fp32, CPU.

    Cached in `cache` (None: not) under a hash of data and settings: another split, seed or setting is another file.
    """
    images, labels = torch.as_tensor(images), torch.as_tensor(labels).long()
    num_classes = int(labels.max()) + 1
    settings = dict(seed=seed, epochs=epochs, batch_size=batch_size, lr=lr, width=width, version=1)
    digest = hashlib.sha256(json.dumps([settings, list(images.shape)]).encode())
    digest.update(images.contiguous().numpy().tobytes() + labels.numpy().tobytes())
    path = cache and os.path.join(cache, f"classifier-{digest.hexdigest()[:16]}.pt")
    with torch.random.fork_rng(devices=[]):                   # initial weights come from the seed, the caller's state stays
        torch.manual_seed(seed)
        net = Classifier(images.shape[3], num_classes, width)
    if path and os.path.isfile(path):
        try:
            net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
            return net.eval().requires_grad_(False)
        except Exception as e:
            warn(f"the cached classifier {path} is unreadable ({' '.join(str(e).split())[:80]}): training it again")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                  # layers this small: two threads on two busy cores took 10x longer
    gen = torch.Generator().manual_seed(seed)
    per_epoch = max(1, len(images) // batch_size)             # batches of equal size: one of a single image has no variance
    opt = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=epochs * per_epoch)
    for _ in tqdm(range(epochs), desc="training the classifier", leave=False, disable=rank() > 0 or None):
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
        os.replace(f"{path}.{os.getpid()}", path)             # atomic: never a half-written cache
    return net.eval().requires_grad_(False)


# ---- from images to one row of numbers -------------------------------------------------------------------

class Features(NamedTuple):
    """What the metrics need of a set of images; x is None where only published statistics are known."""
    mean: torch.Tensor                                                           # (F,) float64
    cov: torch.Tensor                                                            # (F, F) float64
    x: Optional[torch.Tensor] = None                                             # (N, F)
    logits: Optional[torch.Tensor] = None                                        # (N, K)
    labels: Optional[torch.Tensor] = None                                        # (N,)

    def pick(self, i):
        """The same of a subset of the images."""
        m = moments_of(self.x[i])
        return Features(m.mean, m.cov, *(None if a is None else a[i] for a in self[2:]))


def moments_of(x):
    m = Moments(x.shape[1])
    for chunk in x.split(4096):
        m.update(chunk)
    return m


@torch.no_grad()
def extract(extractor, images, labels=None, batch_size=64, device="cpu"):
    """Features of images uint8 (N, H, W, C). Under torchrun each rank does every world-th image; rank 0 returns the
    whole in the original order, so that no number depends on the number of ranks; the others return None."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    images = torch.as_tensor(images)
    mine = torch.arange(rank() if world > 1 else 0, len(images), world)
    rows = []
    for i in tqdm(mine.split(batch_size), desc="features", leave=False, disable=rank() > 0 or len(mine) < 5000):
        rows.append([None if a is None else a.cpu() for a in extractor(images[i].to(device))])
    x, logits = (None if r[0] is None else torch.cat(r) for r in zip(*rows))
    if not torch.isfinite(x).all():
        raise ValueError("the extractor gave non-finite features: damaged weights?")
    m = moments_of(x)
    if world > 1:
        parts = [None] * world if rank() == 0 else None
        dist.gather_object((m, mine, x, logits), parts)
        if rank() > 0:
            return None
        moments, order, *rest = zip(*parts)
        order = torch.cat(order).argsort()
        x, logits = (None if r[0] is None else torch.cat(r)[order] for r in rest)
        m = Moments(x.shape[1])
        for part in moments:
            m.merge(part)
    return Features(m.mean, m.cov, x, logits, None if labels is None else torch.as_tensor(labels).long())


def compare(a, b, seed=0, device="cpu"):
    """The metrics of images `a` against real images `b` (Features): dict of floats."""
    out = {"fid": frechet_distance(a.mean, a.cov, b.mean, b.cov)}
    if b.x is not None:
        x, y = a.x.to(device), b.x.to(device)
        out["kid"], out["kid_std"] = kid(x, y, seed=seed)
        out["sliced_w2"] = sliced_w2(x, y, seed=seed)
        subset = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:MAX_REAL]
        out["precision"], out["recall"] = precision_recall(y[subset], x)
    return out


def describe(a, seed=0, own_classes=True):
    """The metrics that need no reference: dict. own_classes: logits and labels count the same classes."""
    out = {}
    if a.logits is not None:
        out["is"], out["is_std"] = inception_score(a.logits.double().softmax(1), seed=seed)
    if a.labels is not None:
        out["spread"] = within_class_spread(a.x, a.labels)
        if a.logits is not None and own_classes:
            out["accuracy"] = class_accuracy(a.logits, a.labels)
    return out


# ---- the real side ---------------------------------------------------------------------------------------

@dataclass
class Real:
    """Real images uint8 (N, H, W, C) and labels (N,); any may be None, but not both images and mu."""
    images: Optional[np.ndarray] = None          # the reference: held-out images
    labels: Optional[np.ndarray] = None
    mu: Optional[np.ndarray] = None              # published statistics, which then define the FID
    sigma: Optional[np.ndarray] = None
    train_images: Optional[np.ndarray] = None    # classifier, floor, copy ratio
    train_labels: Optional[np.ndarray] = None
    place: dict = field(default_factory=dict)    # {split: (N,) place of an image in the order in which targets are taken}
    bank: Optional[tuple] = None                 # (split, mask (N,)): the images that refinement took its targets from
    apart: Optional[torch.Tensor] = None         # mask (N,): held-out images that are no part of the reference

    def with_targets(self, recipe, apart=0):
        """The same for images drawn by a recipe: its targets are known, and none of them is in the reference."""
        if recipe.refined and recipe.ref_split == "heldout":
            apart = recipe.m
        mask = self.place["heldout"] < apart
        if mask.all():
            raise ValueError(f"--ref_split heldout with --m {recipe.m} takes all {len(mask)} held-out images as targets and leaves "
                             f"none to measure with; try --m {max(1, len(mask) // (2 * len(np.unique(self.labels))))}")
        bank = (recipe.ref_split, self.place[recipe.ref_split] < recipe.m) if recipe.refined else None
        return replace(self, bank=bank, apart=mask if apart else None)


def real_images(dataset):
    """The Real of a data set: the first images of every class in the order of `of_class`, MAX_REAL of a split at most.

    Of latents, no images are kept: the real ones are what the VAE decodes from them.
    """
    sets, place, latent = {}, {}, dataset.facts.get("vae")
    device = next(dataset.tokeniser.parameters(), torch.empty(0)).device
    for split in ("heldout", "train"):
        images = getattr(dataset, split)
        index = [images.of_class(y, MAX_REAL // len(dataset.class_names)) for y in range(len(dataset.class_names))]
        parts = [images.batch(part) for part in torch.cat(index).split(256)]         # decoded, an image is 48 times its latent
        x = np.concatenate([to_uint8(dataset.tokeniser.decode(x.to(device)) if latent else x) for x, _ in parts])
        sets[split], place[split] = (x, torch.cat([y for _, y in parts]).numpy()), torch.cat([torch.arange(len(i)) for i in index])
    if len(sets["heldout"][0]) < MIN_IMAGES:
        raise ValueError(f"{dataset.name} has {len(sets['heldout'][0])} held-out images; at least {MIN_IMAGES} are needed")
    (images, labels), (train_images, train_labels) = sets.values()
    return Real(images, labels, train_images=train_images, train_labels=train_labels, place=place)


def balanced(labels, N, n, generator):
    """Indices of n of N images at random, the classes as balanced as samples are (labels (N,), None: just at random)."""
    order = torch.randperm(N, generator=generator)
    if labels is not None:
        place = torch.empty_like(order)
        for y in labels.unique():
            found = order[labels[order] == y]
            place[found] = torch.arange(len(found))
        order = order[place[order].argsort(stable=True)]
    return order[:n]


class Judge:
    """An extractor and the real images: what every set of samples is measured against."""

    def __init__(self, net, real, device="cpu", seed=0, own_classes=False):
        self.net, self.real, self.device, self.seed, self.own_classes = net, real, device, seed, own_classes
        self.heldout, self.train = (None if x is None else extract(net, x, y, device=device) for x, y in (
            (real.images, real.labels), (real.train_images, real.train_labels)))

    def against(self, real):
        """The same judge with other targets (Real.with_targets)."""
        other = copy.copy(self)
        other.real = real
        return other

    @property
    def reference(self):
        ref = self.heldout if self.real.apart is None else self.heldout.pick(~self.real.apart)
        if self.real.mu is None:
            return ref
        stats = [torch.as_tensor(a, dtype=torch.float64) for a in (self.real.mu, self.real.sigma)]
        return Features(*stats, *(() if ref is None else ref[2:]))

    def __call__(self, images, labels=None):
        """(Features, {metric: value}) of samples; (None, None) on ranks above 0."""
        fake = extract(self.net, images, labels, device=self.device)
        if rank() > 0:
            return None, None
        ref = self.reference
        if len(ref.mean) != len(fake.mean):
            raise ValueError(f"mu has {len(ref.mean)} entries, the features {len(fake.mean)}: statistics belong to the extractor "
                             "that made them")
        values = {**compare(fake, ref, self.seed, self.device), **describe(fake, self.seed, self.own_classes)}
        x = self.space(images, fake)
        return fake, {**values, **{name: copy_ratio(x, a, b)[0] for name, a, b, _ in self.copy_tests()}}

    def floor(self, n):
        """The same numbers for real images, as many as the samples (n) if there are so many; and in words, which."""
        ref = self.reference
        if ref.x is None:
            return {}, "not computed: the reference has no images"
        gen = torch.Generator().manual_seed(self.seed)
        if self.train is None:
            a, b = (ref.pick(i) for i in torch.randperm(len(ref.x), generator=gen).chunk(2))
            which = f"one half of the reference ({len(a.x)} images) against the other"
        else:
            a, b = self.train.pick(balanced(self.train.labels, len(self.train.x), n, gen)), ref
            which = f"{len(a.x)} training images against the same reference"
        values = {**compare(a, b, self.seed, self.device), **describe(ref, self.seed, self.own_classes)}
        return {**values, **{name: copy_ratio(x, a, b)[0] for name, a, b, x in self.copy_tests()}}, which

    def space(self, images, features):
        """Where copies are looked for: pixels where they are few, else features."""
        return pixels(torch.as_tensor(images))[0] if images[0].size <= 4096 else features.x

    def copy_tests(self):
        """[(name, what may have been copied, what cannot have been, real images for the floor)].

        copy_ratio: nearest training image over nearest of half of the held-out ones; the floor: their other half.
        bank_ratio: nearest target of the refinement over nearest other image of the split that it is from; the floor:
        images of the other split. Only where the targets leave a tenth of their split or more.
        """
        if self.train is None or self.heldout is None:
            return []
        sets = {"train": self.space(self.real.train_images, self.train), "heldout": self.space(self.real.images, self.heldout)}
        a, b = torch.randperm(len(self.heldout.x), generator=torch.Generator().manual_seed(self.seed)).chunk(2)
        tests = [("copy_ratio", sets["train"], sets["heldout"][a], sets["heldout"][b])]
        split, mask = self.real.bank or (None, torch.zeros(1, dtype=torch.bool))
        if 0 < mask.float().mean() < 0.9:
            far = sets["heldout" if split == "train" else "train"]
            tests.append(("bank_ratio", sets[split][mask], sets[split][~mask], far))
        return tests


# ---- files and checkpoints -------------------------------------------------------------------------------

def read_npz(path, what):
    """The arrays of an npz file as a dict."""
    if not os.path.isfile(path):
        raise ValueError(f"no {what} file at {path}")
    try:
        with np.load(path, allow_pickle=False) as z:
            return {k: z[k] for k in z.files}
    except Exception as e:                                    # truncated, foreign, pickled objects
        raise ValueError(f"{what} file {path} is not a readable npz: {' '.join(str(e).split())[:150]}") from None


def read_images(z, path):
    """arr_0 and arr_1 of an npz in ADM's format: uint8 (N, H, W, C), and int64 (N,) or None."""
    if "arr_0" not in z:
        raise ValueError(f"{path} holds {sorted(z)}; expected arr_0, the images as uint8 (N, H, W, C)")
    x, y = z["arr_0"], z.get("arr_1")
    if x.dtype != np.uint8:
        raise ValueError(f"{path}: arr_0 is {x.dtype}; expected uint8: from [-1, 1], (x * 127.5 + 127.5).round().clip(0, 255)")
    if x.ndim != 4 or x.shape[3] not in (1, 3) or 0 in x.shape[1:]:
        hint = "; this looks like (N, C, H, W): transpose(0, 2, 3, 1)" if x.ndim == 4 and x.shape[1] in (1, 3) else ""
        raise ValueError(f"{path}: arr_0 has shape {x.shape}; expected (N, H, W, 1 or 3){hint}")
    if len(x) < MIN_IMAGES:
        raise ValueError(f"{path}: {len(x)} images; at least {MIN_IMAGES} are needed, and thousands for a number worth quoting")
    if y is not None and (y.shape != (len(x),) or y.dtype.kind not in "iu" or y.min() < 0):
        raise ValueError(f"{path}: arr_1 is {y.dtype} {y.shape}; expected {len(x)} class numbers from 0 up, one for each image")
    return x, None if y is None else y.astype(np.int64)


def read_real(ref, train=None):
    """The Real of --ref and --train: statistics, images, or both."""
    z = read_npz(ref, "--ref")
    mu, sigma = z.get("mu"), z.get("sigma")
    if mu is None and sigma is None and "arr_0" not in z:
        raise ValueError(f"{ref} holds {sorted(z)}; expected mu and sigma (statistics), or arr_0 (images), or all three")
    if mu is not None or sigma is not None:
        if mu is None or sigma is None or mu.ndim != 1 or sigma.shape != mu.shape * 2:
            raise ValueError(f"{ref}: expected mu (F,) and sigma (F, F), got " + " and ".join(
                f"{k} {z[k].shape}" if k in z else f"no {k}" for k in ("mu", "sigma")))
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError(f"{ref}: mu or sigma is not finite")
    real = Real(*(read_images(z, ref) if "arr_0" in z else (None, None)), mu, sigma)
    if train:
        z = read_npz(train, "--train")
        real.train_images, real.train_labels = read_images(z, train)
        if "bank" in z:
            if len(z["bank"]) != len(real.train_images):
                raise ValueError(f"{train}: bank has {len(z['bank'])} entries for {len(real.train_images)} images")
            real.bank = "train", torch.as_tensor(z["bank"]).bool()
    return real


def make_extractor(name, real, device, weights=None, cache="cache", seed=0):
    """The callable of --features."""
    if name == "pixels":
        return pixels
    if name == "inception":
        return load_inception(weights).to(device)
    if real.train_labels is None:
        raise ValueError("--features classifier learns from a labelled training split: give --train t.npz with arr_0 and arr_1, "
                         "or --dataset")
    if dist.is_initialized() and rank() > 0:
        dist.barrier()                                        # rank 0 trains, the others read its cache
    net = train_classifier(real.train_images, real.train_labels, seed=seed, cache=cache)
    if dist.is_initialized() and rank() == 0:
        dist.barrier()
    return net.to(device)


class Run:
    """A checkpoint and the data set that it was trained on."""

    def __init__(self, path, device, data_dir=None, vae=None, cache_dir=None):
        self.path = find_checkpoint(path)
        self.model, self.state = load_model(self.path, device)
        set_threads(self.model, device)
        self.facts, self.kind, self.data_dir = self.state["data"], self.model.cfg.kind, data_dir
        if vae and not self.facts.get("vae"):
            raise ValueError(f"--vae {vae}: {self.path} is a model of pixels, which need none")
        tokeniser = datasets.open_tokeniser(self.facts, vae, device)     # refuses another VAE than that of the training
        self.dataset = datasets.load(self.facts["dataset"], data_dir or self.facts["data_dir"], self.facts["size"], self.facts["patch"],
                                     vae=vae, cache_dir=cache_dir or self.facts.get("cache_dir"), device=device)
        self.dataset.tokeniser = tokeniser
        if self.dataset.class_names != self.facts["class_names"]:
            raise ValueError(f"{self.path} was trained on {len(self.facts['class_names'])} classes ({self.facts['class_names'][0]} ...), "
                             f"its data set now has {len(self.dataset.class_names)}; give the right --data_dir")

    def drawer(self, recipe, kind=Drawer):
        return kind(self.model, recipe, range(len(self.dataset.class_names)))

    def draw(self, drawer, n, seed, batch_size, mixed=0):
        """Images uint8 (n, H, W, C), labels and seconds; n is rounded up to balanced classes, image k is that of sample.py.

        mixed: so many classes share a batch evenly, which matters to coupled refinement; 0: batches go class by class.
        """
        K = len(drawer.classes)
        slot = torch.arange(-(-n // K) * K) % K
        parts = batches(slot, slot.argsort(stable=True), batch_size, drawer.coupled) if not mixed else [
            part for k in range(0, K, mixed) for part in ((slot >= k) & (slot < k + mixed)).nonzero().flatten().split(batch_size)]
        images, labels = None, torch.tensor(drawer.classes)[slot]
        began = time.perf_counter()
        for part in tqdm(parts, desc=f"sampling, seed {seed}", unit="batch", leave=False, disable=None):
            x = to_uint8(self.dataset.decode(drawer(labels[part], part.tolist(), seed)))
            images = np.empty((len(slot), *x.shape[1:]), np.uint8) if images is None else images
            images[part.numpy()] = x
        return images, labels.numpy(), time.perf_counter() - began


# ---- python evaluate.py: a table, and pictures -----------------------------------------------------------

ROWS = {"fid": ("Frechet distance", "lower"), "kid": ("KID x 1000", "lower"), "sliced_w2": ("sliced W2", "lower"),
        "precision": ("precision", "higher"), "recall": ("recall", "higher"), "is": ("Inception score", "higher"),
        "accuracy": ("class accuracy", "higher"), "spread": ("within-class spread", "as real"),
        "copy_ratio": ("copy ratio", "as real"), "bank_ratio": ("copy ratio, targets", "as real")}


def metrics_args(argv):
    p = Parser(prog="evaluate.py", description="Measure samples, from a file or drawn from a checkpoint, against real images. "
               "Other commands: evaluate.py ablate --help, evaluate.py theory --help.")
    p.add_argument("--ckpt", help="draw from this checkpoint or run; the real side is its data set's held-out images")
    p.add_argument("--n", type=number(int, MIN_IMAGES), default=1000, help="--ckpt: images per seed, rounded up to balanced classes")
    p.add_argument("--seeds", type=number(int, 0), nargs="+", default=[0], metavar="SEED", help="--ckpt: of the noise; several: mean +- std")
    p.add_argument("--samples", help="npz: arr_0 uint8 (N, H, W, C), and arr_1 (N,) labels where known")
    p.add_argument("--ref", help="npz: mu and sigma (published statistics) and/or arr_0, arr_1 (real images)")
    p.add_argument("--train", help="npz of training images (arr_0, arr_1; optionally bank): classifier, floor, copy ratio")
    p.add_argument("--dataset", choices=datasets.DATASETS, help="instead of --ref and --train: held-out and training split of a data set")
    p.add_argument("--size", type=number(int, 4, 2048), default=16, help="--dataset: pixels of a side")
    p.add_argument("--features", choices=["inception", "pixels", "classifier"], help="what the metrics see "
                   "(default: classifier with --ckpt or --dataset, else inception)")
    p.add_argument("--weights", default=os.path.join("cache", INCEPTION_FILE), help="of Inception")
    p.add_argument("--batch_size", type=number(int, 1), default=500, help="images drawn at once")
    p.add_argument("--seed", type=number(int, 0), default=0, help="of subsets, projections, splits, classifier")
    p.add_argument("--cache", default="cache", help="where trained classifiers are kept")
    p.add_argument("--json", metavar="PATH", help="also write the numbers there")
    p.add_argument("--grid", metavar="PNG", help="also draw samples above their nearest training images")
    p.add_argument("--failures", metavar="PNG", help="--ckpt --refine: also draw the images that refinement made worst, unrefined above")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda ...")
    p.add_argument("--vae", help="kl16.ckpt, where latents are to be decoded: models of them, or --dataset imagenet256/512")
    p.add_argument("--refine_memory", type=number(float, 0), default=16, metavar="GB", help="--ckpt --refine: what the targets may take")
    known = set(vars(p.parse_args([]))) | {"data_dir", "cache_dir"}
    add_drawing_flags(p)
    args = p.parse_args(argv)
    if (args.ckpt is None) == (args.samples is None):
        raise ValueError("what is to be measured? give --samples FILE or --ckpt RUN" + (", not both" if args.ckpt else ""))
    if args.ckpt and (args.ref or args.train or args.dataset):
        raise ValueError("--ckpt is measured against the data set that it was trained on; leave --ref, --train and --dataset out")
    if args.samples and bool(args.ref) == bool(args.dataset):
        raise ValueError("what are the samples to be measured against? give --ref FILE or --dataset NAME, one of them")
    for k, value in {} if args.ckpt else vars(args).items():
        if k not in known and value != p.get_default(k):
            raise ValueError(f"--{k} says how to draw, but --samples are drawn already; give --ckpt instead")
    if args.vae and args.ref:
        raise ValueError("--vae decodes latents, but --samples and --ref are images already: leave it out")
    if args.grid and args.samples and not (args.train or args.dataset):
        raise ValueError("--grid shows nearest training images: give --train or --dataset")
    if args.failures and args.refine == "none":
        raise ValueError("--failures compares refined with unrefined images: give --ckpt and --refine")
    for flag in ("json", "grid", "failures"):
        if not Path(getattr(args, flag) or ".").parent.is_dir():
            raise ValueError(f"--{flag} {getattr(args, flag)}: there is no such directory")
    args.features = args.features or ("inception" if args.ref else "classifier")
    return args


def run_metrics(argv):
    args = metrics_args(argv)
    device = pick_device(args.device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if args.ckpt:
            raise ValueError("--ckpt draws in one process; under torchrun measure a file of sample.py --out s.npz with --samples")
        dist.init_process_group("gloo")                       # only features travel, and those from the CPU
    torch.backends.cudnn.allow_tf32 = False                   # published features are fp32
    source, drawer = Run(args.ckpt, device, args.data_dir, args.vae, args.cache_dir) if args.ckpt else None, None
    if source:
        recipe = make_recipe(args, source.kind, source.facts["x0_bound"])
        drawer, real = source.drawer(recipe), real_images(source.dataset).with_targets(recipe)
        if recipe.refined:
            check_memory(args, drawer)
            prepare_refinement(drawer, args, source.state, source.path)
        sets = (source.draw(drawer, args.n, seed, args.batch_size)[:2] for seed in args.seeds)
    else:
        sets = [read_images(read_npz(args.samples, "--samples"), args.samples)]
        real = read_real(args.ref, args.train) if args.ref else real_images(datasets.load(
            args.dataset, args.data_dir, args.size, 1, vae=args.vae, cache_dir=args.cache_dir, device=device))
        check_fit(*sets[0], real, args)
    judge = Judge(make_extractor(args.features, real, device, args.weights, args.cache, args.seed), real, device, args.seed,
                  args.features == "classifier")              # Inception's 1008 logits are not the data set's classes
    first, rows = None, []
    for images, labels in sets:
        fake, values = judge(images, labels)
        first, rows = first or (images, labels, fake), [*rows, values]
    if rank() == 0:
        report(args, judge, first[2], rows, {} if source is None else {
            "checkpoint": str(source.path), "step": source.state["step"], "seeds": args.seeds, "recipe": asdict(recipe)})
        if args.grid:
            neighbour_grid(args.grid, *first, judge)
        if args.failures:
            failure_grid(args, source, recipe, drawer, judge)
    if dist.is_initialized():
        dist.destroy_process_group()


def check_memory(args, drawer):
    """ValueError where the targets of all classes at once take more than --refine_memory."""
    need = len(drawer.classes) * refinement_bytes(drawer.model, drawer.recipe)[1] / 1e9
    if need > args.refine_memory:
        raise ValueError(f"refining {len(drawer.classes)} classes at once takes {need:.3g} GB, more than --refine_memory {args.refine_memory:g}: "
                         "draw with sample.py --out s.npz, which takes as many classes at a time as fit, and measure --samples s.npz")


def check_fit(images, labels, real, args):
    """ValueError where samples and real images cannot be compared."""
    for name, x in (("reference", real.images), ("training images", real.train_images)):
        if x is not None and x.shape[1:] != images.shape[1:]:
            raise ValueError(f"the samples are {images.shape[1:]}, the {name} {x.shape[1:]} (H, W, C): make both the same size")
    if args.features == "classifier" and labels is not None and real.train_labels is not None:
        if labels.max() > real.train_labels.max():
            raise ValueError(f"{args.samples} has class {labels.max()}, the training split only 0 to {real.train_labels.max()}")


def mean_std(rows):
    """{key: mean, key_std: std} over dicts; one dict as it is."""
    keys = [k for k in rows[0] if not k.endswith("_std")]
    if len(rows) == 1:
        return rows[0]
    return {k: v for key in keys for k, v in ((key, float(np.mean([r[key] for r in rows]))),
                                              (key + "_std", float(np.std([r[key] for r in rows], ddof=1))))}


def report(args, judge, fake, rows, drawn):
    """Print the table and write --json."""
    n_ref = None if judge.reference.x is None else len(judge.reference.x)
    floor, which = judge.floor(len(fake.x))
    result = {"samples": args.samples, "ref": args.ref or args.dataset, **drawn, "features": args.features, "dim": len(fake.mean),
              "seed": args.seed, "n_samples": len(fake.x), "n_ref": n_ref, "values": mean_std(rows), "floor": floor,
              "floor_is": which, "warnings": caveats(args, fake)}
    print_table(result, len(rows))
    if args.json:
        with open(args.json, "w") as f:
            json.dump(result, f, indent=1)


def caveats(args, fake):
    """What a reader must know before quoting the numbers: list of sentences."""
    (n, dim), out = fake.x.shape, []
    if n < 10 * dim:
        out.append(f"{n} samples for {dim} dimensions: the Frechet distance is biased upward; compare at equal N, or by KID")
    if args.vae and not args.ref:
        out.append("the real images are decoded latents: what the VAE loses is not counted; for numbers to compare with published ones give --ref")
    if args.features == "inception" and n != 50_000:
        out.append(f"{n} samples: published FID, precision and recall are for 50,000")
    if fake.labels is not None:
        count = fake.labels.bincount()
        if count.min() != count.max():
            out.append(f"classes are not balanced: {count.min()} to {count.max()} samples of a class")
    return out


def print_table(result, n_seeds):
    def cell(row, key):
        scale = 1000 if key == "kid" else 1
        std = f" +- {row[key + '_std'] * scale:.3g}" if key + "_std" in row else ""
        return "-" if row.get(key) is None else f"{row[key] * scale:.4g}{std}"

    values, floor, n_ref = result["values"], result["floor"], result["n_ref"]
    print(f"{f'{n_seeds} x ' if n_seeds > 1 else ''}{result['n_samples']} samples against {f'{n_ref} images' if n_ref else 'statistics'}; "
          f"features: {result['features']}, {result['dim']}-d; seed {result['seed']}")
    print(f"{'':22}{'samples':>18}{'real vs real':>18}   better")
    for key, (title, better) in ROWS.items():
        if values.get(key) is not None:
            print(f"{title:22}{cell(values, key):>18}{cell(floor, key):>18}   {better}")
    print(f"real vs real: {result['floor_is']}" + ("; score, accuracy and spread: the reference's own" if floor else "")
          + (f"; +- of the samples: std over {n_seeds} seeds" if n_seeds > 1 else ""))
    for note in result["warnings"]:
        warn(note)


def neighbour_grid(path, images, labels, fake, judge, columns=10, rows=3):
    """Some samples, by class, and below each its nearest training image."""
    index = np.unique(np.linspace(0, len(images) - 1, columns * rows).astype(int))
    index = index if labels is None else index[np.argsort(labels[index], kind="stable")]
    x, t = (judge.space(*pair) for pair in ((images, fake), (judge.real.train_images, judge.train)))
    near = judge.real.train_images[nearest(x[index], t)[1].numpy()]
    pairs_grid(path, images[index], near, columns)
    print(f"{path}: {len(index)} samples, each above its nearest training image")


def pairs_grid(path, above, below, columns):
    sheets = [a[i:i + columns] for i in range(0, len(above), columns) for a in (above, below)]
    pad = [np.concatenate([s, np.full((columns - len(s), *s.shape[1:]), 128, np.uint8)]) for s in sheets]
    image_grid(np.concatenate(pad), columns).save(path)


def failure_grid(args, source, recipe, drawer, judge, columns=10, rows=2):
    """The same seed without refinement above with it. The rule: the largest drops of log p(true class) of the classifier."""
    plain = source.drawer(replace(recipe, refine=RefineConfig(method="none"), move_null=False))
    (before, labels, _), (after, _, _) = (source.draw(d, args.n, args.seeds[0], args.batch_size) for d in (plain, drawer))
    net = make_extractor("classifier", judge.real, judge.device, cache=args.cache, seed=args.seed)
    logits = [extract(net, x, labels, device=judge.device).logits for x in (before, after)]
    drop = torch.stack([z.log_softmax(1)[torch.arange(len(labels)), labels] for z in logits]).diff(dim=0)[0].neg()
    right = [z.argmax(1).numpy() == labels for z in logits]
    worst = drop.argsort(descending=True)[:min(columns * rows, max(1, int((drop > 0).sum())))].numpy()
    pairs_grid(args.failures, before[worst], after[worst], columns)
    print(f"{args.failures}: where refinement lowered the classifier's log p(true class) most, unrefined above refined: {len(worst)} of the "
          f"{int((drop > 0).sum())} images (of {len(labels)}) that it lowered, by {drop[worst[0]]:.2g} to {drop[worst[-1]]:.2g} nats. "
          f"Of all images {(right[0] & ~right[1]).sum()} are no longer recognised, {(~right[0] & right[1]).sum()} are newly recognised")


# ---- the commands ----------------------------------------------------------------------------------------

COMMANDS = {"metrics": run_metrics,                           # name -> function of argv; no name means metrics
            "ablate": lambda argv: importlib.import_module("ablate").main(argv),       # it imports this file
            "theory": lambda argv: importlib.import_module("theory").main(argv)}


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv.pop(0) if argv and not argv[0].startswith("-") else "metrics"
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, 1)
        raise ValueError(f"unknown command {command}; " + (f"did you mean {close[0]}?" if close else f"one of {', '.join(COMMANDS)}"))
    COMMANDS[command](argv)


if __name__ == "__main__":
    run(main)
