"""How good are the images: Frechet distance, KID, precision, recall, class accuracy, copying ...

    python evaluate.py --ckpt out/ar --refine default --seeds 0 1 2    drawn as sample.py does it
    python evaluate.py --samples s.npz --ref r.npz --features inception    FID as it is published
    python evaluate.py --samples s.npz --dataset digits

The metrics are pure functions of features, in float64. A feature space is a function

    images uint8 (n, H, W, C) -> features (n, F) float32, logits (n, K) or None

The Judge holds real images and measures others against them. The Frechet distance of few images is
too large, by about tr(S) / n and more: each number stands beside that of training images against
the same reference (the floor), and beside KID, which is unbiased.

References: Heusel et al. 2017 (FID), Binkowski et al. 2018 (KID), Salimans et al. 2016 (Inception
score), Kynkaanniemi et al. 2019 (precision, recall), Dhariwal & Nichol 2021 (files, protocol).
"""
from command import Parser, number, pick_device, run        # first: it answers signals

import inspect
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data
import sample
from data import patchify, to_uint8
from files import check_output, checked_images, read_npz, read_weights, sha256, write, write_json
from ot_refine import sqrtm

MIN_IMAGES = 10             # the Inception score's splits; KID, precision and recall need four
MAX_REAL = 10_000           # reference images, as in the published protocol
MAX_TRAIN = 20_000          # training images: the classifier learns them in a minute or two
CHUNK = 2 ** 23             # distances held at once: 64 MiB


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
    cross = torch.linalg.svdvals(sqrtm(S1) @ sqrtm(S2)).sum()
    return max(0., ((mu1 - mu2).square().sum() + S1.trace() + S2.trace() - 2 * cross).item())


def kid(x, y, block=1000, n_blocks=100, seed=0):
    """Unbiased squared MMD of x (n, F), y (m, F) under (x.y / F + 1)^3: mean, std over blocks."""
    gen = torch.Generator().manual_seed(seed)
    block = min(block, len(x) // 2, len(y) // 2)            # of all, blocks would be the same
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3
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

    Shuffled first: a file sorted by class has few classes a split, which gives 60 for 300.
    """
    order = torch.randperm(len(probs), generator=torch.Generator().manual_seed(seed))
    parts, log = probs[order].double().tensor_split(splits), torch.special.xlogy
    scores = torch.stack([(log(p, p) - log(p, p.mean(0))).sum(1).mean().exp() for p in parts])
    return scores.mean().item(), scores.std(correction=0).item()


def by_distance(x, y, reduce):
    """reduce(distances (rows, m)) of the rows of x (n, F), some at a time, to those of y (m, F)."""
    y, parts = y.double(), []
    for a in x.split(max(1, CHUNK // len(y))):
        a = a.double()
        size = a.square().sum(1, keepdim=True) + y.square().sum(1)
        d2 = size - 2 * a @ y.T
        d2 = torch.where(d2 > 1e-13 * size, d2, 0.)             # duplicates at 0, not at 1e-8
        parts.append(reduce(d2.sqrt()))
    return torch.cat(parts)


def radii(x, k=3):
    """Distance (n,) of each row of x (n, F) to its k-th nearest other."""
    # k + 1: every point is its own nearest neighbour
    return by_distance(x, x, lambda d: d.topk(k + 1, largest=False).values[:, -1])


def precision_recall(real, fake, radius=None):
    """Precision: share of fake (m, F) inside the manifold of real (n, F); recall: the converse.

    A manifold is the union of balls about its points, each to its point's third nearest neighbour.
    radius (n,): radii(real), if they are known.
    """
    def inside(points, of, radius):
        return by_distance(points, of, lambda d: (d <= radius).any(1)).double().mean().item()

    radius = radii(real) if radius is None else radius
    return inside(fake, real, radius), inside(real, fake, radii(fake))


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
    """Mean distance to the nearest image that the sampler saw, over that to the nearest real one
    that it did not. All (n, F). A copier is far below what held-out images have."""
    a, b = (by_distance(samples, x, lambda d: d.amin(1)).mean() for x in (seen, unseen))
    return (a / b).item()


def class_accuracy(logits, labels):
    """Share of samples recognised as the class that they were asked for. (n, K), (n,)."""
    return (logits.argmax(1) == labels).double().mean().item()


# ---- feature spaces ------------------------------------------------------------------------------

def pixels(images):
    """The raw pixels in [0, 1]."""
    if images[0].numel() > 4096:
        raise ValueError(f"--features pixels: {images[0].numel()} dimensions, at most 4096 are "
                         "possible (32x32 in colour), as a covariance is computed")
    return images.flatten(1).float() / 255, None


class Classifier(nn.Module):
    """A small conv net for any image size: 64 features, of unit variance over the training set."""

    def __init__(self, channels, num_classes):
        super().__init__()
        conv = lambda a, b: [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b),
                             nn.ReLU()]
        self.body = nn.Sequential(
            *conv(channels, 16), *conv(16, 16), nn.MaxPool2d(2, ceil_mode=True),
            *conv(16, 32), *conv(32, 32), nn.AdaptiveMaxPool2d(3),
            nn.Flatten(), nn.Linear(9 * 32, 64, bias=False))
        self.norm = nn.BatchNorm1d(64, affine=False)    # fixes the scale: FDs of two seeds compare
        self.head = nn.Linear(64, num_classes)

    def forward(self, images, augment=None):
        x = small(images) if augment is None else jitter(small(images), augment)
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
    """The Classifier of images uint8 (n, H, W, C) and labels (n,) from 0 up: seeded, on the CPU,
    kept in the folder `cache` under a hash of all that it depends on, its code too."""
    code = [inspect.getsource(part) for part in (Classifier, small, jitter, train_classifier)]
    digest = sha256([json.dumps([code, seed, epochs, *images.shape]).encode(),
                     images.numpy().tobytes(), labels.numpy().tobytes()])
    path = Path(cache, f"classifier-{digest}.pt")
    with torch.random.fork_rng(devices=[]):             # the caller's random state stays
        torch.manual_seed(seed)
        net = Classifier(images.shape[3], int(labels.max()) + 1)
    if path.exists():
        weights = read_weights(path, "classifier (delete it to train it again)")
        try:
            net.load_state_dict(weights)
        except RuntimeError:
            raise ValueError(f"{path} holds other weights: delete it to train it again") from None
        return net.eval().requires_grad_(False)

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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, lambda f: torch.save(net.state_dict(), f))
    except (OSError, ValueError) as error:
        print(f"{error}: the classifier is not kept")
    return net.eval().requires_grad_(False)


def make_extractor(name, real, device="cpu", weights=None, cache="cache"):
    """The feature space of --features."""
    if name == "pixels":
        return pixels
    if name == "inception":
        import inception
        return inception.load_inception(weights).to(device)
    if real.train_labels is None:
        raise ValueError("--features classifier learns from training images: give --dataset")
    return train_classifier(real.train_images, real.train_labels, cache=cache).to(device)


@torch.no_grad()
def extract(space, images, device="cpu", batch_size=64):
    """Features (n, F) and logits (n, K) or None, both on the CPU, of images uint8 (n, H, W, C)."""
    if len(images) < MIN_IMAGES:
        raise ValueError(f"{len(images)} images; at least {MIN_IMAGES} are needed, and thousands "
                         "for a number worth quoting")
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
    """Real images uint8 (n, H, W, C) and labels (n,): of a data set; of --ref, what it holds."""
    images: torch.Tensor | None             # the reference: held-out images
    labels: torch.Tensor | None = None
    train_images: torch.Tensor | None = None        # for classifier, floor and copy ratio
    train_labels: torch.Tensor | None = None
    statistics: tuple | None = None         # published mu, sigma: they define the Frechet distance


@torch.no_grad()
def real_images(dataset, device="cpu"):
    """The Real of a data set: of large ones MAX_REAL held-out and MAX_TRAIN training images,
    equally many of each class; of latents what they decode to."""
    found, K = [], len(dataset.class_names)
    for split, most in ((dataset.heldout, MAX_REAL), (dataset.train, MAX_TRAIN)):
        index = torch.cat([split.of_class(y, max(1, most // K)) for y in range(K)])
        tokens = (patchify(split.batch(part)[0], dataset.patch) for part in index.split(256))
        images = [torch.from_numpy(to_uint8(dataset.decode(x.to(device)))) for x in tokens]
        found += [torch.cat(images), split.labels[index]]
    if dataset.vae:
        print("note: the real images are decoded latents: what the VAE loses is not counted")
    return Real(*found)


def shuffled(x):
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order.to(x.device)]


class Judge:
    """Measures images against real ones, in one feature space.

    judge(images, labels) -> features (n, F), {metric: value}
    judge.floor(n)        -> {metric: value} of n training images
    """

    def __init__(self, space, real, device="cpu"):
        self.space, self.real, self.device = space, real, device
        if real.images is not None:
            self.x, self.logits = extract(space, real.images, device)
            self.some = shuffled(self.x.to(device))[:MAX_REAL]
            self.radius = radii(self.some)                  # most of the time
        if real.train_images is not None:
            unseen, self.floor_images = shuffled(real.images).chunk(2)
            self.seen, self.unseen = thumbnails(real.train_images), thumbnails(unseen)
        self.gaussian = real.statistics or gaussian(self.x)

    def __call__(self, images, labels=None):
        x, logits = extract(self.space, images, self.device)
        if x.shape[1:] != self.gaussian[0].shape:
            raise ValueError(f"mu has {len(self.gaussian[0])} entries, the features {x.shape[1]}: "
                             "statistics belong to the extractor that made them")
        return x, self.measure(x, logits, labels, images)

    def floor(self, n):
        # of classes as balanced as those of samples
        order = shuffled(torch.arange(len(self.seen)))
        labels = self.real.train_labels[order]
        place = F.one_hot(labels).cumsum(0).gather(1, labels[:, None])[:, 0]
        some = self.real.train_images[order[place.argsort(stable=True)][:n]]
        x = extract(self.space, some, self.device)[0]
        return self.measure(x, self.logits, self.real.labels, self.floor_images)

    def measure(self, x, logits, labels, images):
        """{metric: value}, as far as the reference and the feature space allow."""
        real, K = self.real, 0 if logits is None else logits.shape[1]
        values = {"fid": frechet_distance(*gaussian(x), *self.gaussian)}
        if real.images is not None:
            x, y = x.to(self.device), self.x.to(self.device)
            values["kid"], values["kid_std"] = kid(x, y)
            values["sliced_w2"] = sliced_w2(x, y)
            values["precision"], values["recall"] = precision_recall(self.some, x, self.radius)
        if logits is not None:
            values["is"], values["is_std"] = inception_score(logits.double().softmax(1))
        if real.train_images is not None:
            values["copy_ratio"] = copy_ratio(thumbnails(images), self.seen, self.unseen)
            # Inception's 1008 classes are not those of the labels
            if labels is not None and K == real.train_labels.max() + 1:
                values["accuracy"] = class_accuracy(logits, labels)
        return values


# ---- python evaluate.py --------------------------------------------------------------------------

ROWS = {"fid": ("Frechet distance", "lower"), "kid": ("KID x 1000", "lower"),
        "sliced_w2": ("sliced W2", "lower"), "precision": ("precision", "higher"),
        "recall": ("recall", "higher"), "is": ("Inception score", "higher"),
        "accuracy": ("class accuracy", "higher"), "copy_ratio": ("copy ratio", "as real")}


def parse_args(argv=None):
    """Our own flags, and a list of those that are for sample.py."""
    p = Parser(description="Measure images, of a checkpoint or of a file, against real ones.",
               epilog="With --ckpt, flags of sample.py that say how to draw may be added: "
                      "--refine default --steps 10 ... (see sample.py --help).")
    add = p.add_argument
    add("--ckpt", help="draw from this checkpoint or run, compare with its held-out images")
    add("--n", type=number(int, MIN_IMAGES), default=1000,
        help="--ckpt: images a seed, rounded up to as many of each class")
    add("--seeds", "--seed", type=number(int, 0, 2 ** 32 - 1), nargs="+", default=[0],
        metavar="SEED", help="--ckpt: of the noise; several give mean +- deviation")
    add("--samples", metavar="NPZ", help="measure a file of sample.py --out, or of its layout")
    add("--ref", metavar="NPZ", help="--samples: real images, or their mu and sigma, or both")
    add("--dataset", choices=data.DATASETS,
        help="--samples: instead of --ref; with class accuracy, copy ratio, a floor")
    add("--data_dir", help="folder of the data set (--ckpt: default as in training)")
    add("--features", choices=("classifier", "pixels", "inception"),
        help="what the metrics see (default: with --ref inception, else classifier)")
    add("--weights", default="cache/pt_inception-2015-12-05-6726825d.pth", help="of inception")
    add("--cache", default="cache", help="folder that keeps trained classifiers")
    add("--json", metavar="FILE", help="also write the numbers there")
    add("--vae", help="kl16.ckpt, which decodes the latents of --ckpt or --dataset")
    add("--device", default="auto", help="auto, cpu, cuda ...")

    args, drawing = p.parse_known_args(argv)
    return (args, drawing) if args.ckpt else (p.parse_args(argv), [])


def from_checkpoint(args, drawing, device):
    """(what is measured, its sets of images and labels, the Real)."""
    ours = {k: getattr(args, k) for k in ("ckpt", "device", "vae", "data_dir")}
    how = sample.parse_args([*(f"--{k}={v}" for k, v in ours.items() if v), *drawing])
    job, seeds = sample.setup(how), args.seeds
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {' '.join(map(str, seeds))}: give each once")
    dataset = job.dataset()
    K = len(dataset.class_names)
    labels = torch.arange(-(-args.n // K) * K) % K
    how.check_used()
    args.check_used()
    if job.refinement:
        check_unseen(job.refinement, dataset)

    def draw(seed):
        every, title = torch.arange(len(labels)), f"sampling, seed {seed}"
        with tqdm(total=len(labels), desc=title, leave=False, disable=None) as bar:
            return torch.from_numpy(job.images(labels, every, seed, tick=bar.update)), labels

    about = {"ckpt": args.ckpt, "step": job.state["step"], "seeds": seeds, "drawing": drawing}
    return about, map(draw, seeds), real_images(dataset, device)


def check_unseen(refinement, dataset):
    """ValueError where refinement takes its targets from the images that it is measured against."""
    targets, held = ({x.numpy().tobytes() for x in tokens_of(0, refinement.m)} for tokens_of in
                     (refinement.tokens_of, sample.tokens_of(dataset, "heldout")))
    if len(targets & held) > len(held) / 10:
        raise ValueError("the targets of refinement are held-out images, which the result is "
                         "measured against: take them from the training images")


def from_file(args, device):
    """The same of --samples."""
    if bool(args.ref) == bool(args.dataset):
        raise ValueError("samples are measured against either --ref FILE or --dataset NAME")
    given = data.flags_of(args.dataset, args) if args.dataset else {}
    args.check_used()
    arrays = checked_images(read_npz(args.samples), args.samples, "arr_0", "arr_1")
    images, labels = (None if a is None else torch.from_numpy(a) for a in arrays)
    if args.ref:
        import inception
        held, statistics = inception.read_reference(args.ref)
        real = Real(held, statistics=statistics)
    else:
        dataset = data.load(args.dataset, size=images.shape[1], patch=1, device=device, **given)
        real = real_images(dataset, device)
        if labels is not None and labels.max() >= len(dataset.class_names):
            raise ValueError(f"the samples have class {labels.max()}, {args.dataset} has only 0 to "
                             f"{len(dataset.class_names) - 1}")
    if real.images is not None and real.images.shape[1:] != images.shape[1:]:
        raise ValueError(f"the samples are {tuple(images.shape[1:])}, the real images "
                         f"{tuple(real.images.shape[1:])} (H, W, C): make both the same size")
    about = {"samples": args.samples, "ref": args.ref or args.dataset}
    return about, [(images, labels)], real


def main(argv=None):
    args, drawing = parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("evaluate.py is one process: draw by torchrun -- sample.py --out s.npz")
    if bool(args.ckpt) == bool(args.samples):
        raise ValueError("what is to be measured? give either --ckpt RUN or --samples FILE")
    device, out = pick_device(args.device), args.json and check_output("--json", args.json)
    # each flag is looked at only where it has an effect, so that check_used refuses the others
    features = args.features or ("inception" if not args.ckpt and args.ref else "classifier")
    weights = args.weights if features == "inception" else None
    cache = args.cache if features == "classifier" else None
    about, sets, real = (from_checkpoint(args, drawing, device) if args.ckpt else
                         from_file(args, device))

    judge = Judge(make_extractor(features, real, device, weights, cache), real, device)
    x, values = zip(*(judge(images, labels) for images, labels in sets))
    n, dim = x[0].shape
    n_ref, n_train = (0 if z is None else len(z) for z in (real.images, real.train_images))
    result = {**about, "features": features, "dim": dim, "n_samples": n, "n_ref": n_ref,
              "values": mean_std(values), "floor": judge.floor(n) if n_train else {},
              "n_floor": min(n, n_train)}
    print_table(result, len(values))
    if out:
        write_json(out, result)


def mean_std(rows):
    """{key: mean, key_std: deviation} over dicts of several seeds; one dict as it is."""
    if len(rows) == 1:
        return rows[0]
    columns = {k: [r[k] for r in rows] for k in rows[0] if not k.endswith("_std")}
    return {**{k: float(np.mean(v)) for k, v in columns.items()},
            **{k + "_std": float(np.std(v, ddof=1)) for k, v in columns.items()}}


def print_table(result, n_seeds):
    values, floor, n, dim = (result[k] for k in ("values", "floor", "n_samples", "dim"))
    seeds = f"{n_seeds} x " * (n_seeds > 1)
    against = f"{result['n_ref']} images" if result["n_ref"] else "statistics"
    print(f"{seeds}{n} samples against {against}; features: {result['features']}, {dim}-d")

    def cell(row, key):
        scale = 1000 if key == "kid" else 1
        std = f" +- {row[key + '_std'] * scale:.3g}" if key + "_std" in row else ""
        return f"{row[key] * scale:.4g}{std}" if key in row else "-"

    print(f"{'':22}{'samples':>18}{'real vs real':>18}   better")
    for key, (title, better) in ROWS.items():
        if key in values:
            print(f"{title:22}{cell(values, key):>18}{cell(floor, key):>18}   {better}")
    print(f"real vs real: {result['n_floor']} training images against the same reference; score "
          "and accuracy: the reference's own" if floor else
          "real vs real: not computed: it needs training images (--dataset)")
    if n < 10 * dim:
        print(f"note: {n} samples for {dim} dimensions: the Frechet distance is biased upward; "
              "compare at equal N, or by KID")


if __name__ == "__main__":
    run(main)
