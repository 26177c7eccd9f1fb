"""How good are the images? Frechet distance, KID, precision, recall, class accuracy, copying ...

    python evaluate.py --ckpt out/ar --refine default --seeds 0 1 2    drawn as sample.py does it
    python evaluate.py --samples s.npz --dataset digits                a file of sample.py --out
    python evaluate.py --samples s.npz --ref r.npz --features inception    FID as it is published

The metrics are pure functions of features, in float64. A feature space is any function images uint8
(n, H, W, C) -> features (n, F) float32, logits (n, K) or None. The Frechet distance of few images
is too large, by about tr(S) / n and more: each number stands beside that of training images against
the same reference, and beside KID, which is unbiased.

References: Heusel et al. 2017 (FID), Binkowski et al. 2018 (KID), Salimans et al. 2016 (Inception
score), Kynkaanniemi et al. 2019 (precision, recall), Dhariwal & Nichol 2021 (files, protocol).
"""
from command import Parser, number, pick_device, run        # first: it answers signals

import os
from typing import NamedTuple

import numpy as np
import ot
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import sample
from classifier import small, train_classifier
from data import patchify, to_uint8
from files import check_output, checked_images, read_npz, write_json
from ot_refine import sqrtm

MIN_IMAGES = 10             # the Inception score's splits; KID, precision and recall need four
MAX_REAL = 10_000           # reference images, as in the published protocol
MAX_TRAIN = 20_000          # training images: the classifier learns them in a minute or two
CHUNK = 2 ** 23             # distances held at once: 64 MiB


# ---------------------------------------------------------------- the metrics

def gaussian(x):
    """Mean (F,) and covariance (F, F) of the rows of x (n, F), in float64."""
    x = x.double()
    return x.mean(0), x.T.cov()


def frechet_distance(mu1, S1, mu2, S2):
    """W2^2 of two Gaussians: |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2). (F,), (F, F).

    The last trace is the nuclear norm of S1^(1/2) S2^(1/2): off by 1e-12 and symmetric, where the
    usual one, by eigenvalues of S1^(1/2) S2 S1^(1/2), is off by 1e-8 in each null direction.
    """
    mu1, S1, mu2, S2 = (torch.as_tensor(a).double() for a in (mu1, S1, mu2, S2))
    cross = torch.linalg.svdvals(sqrtm(S1) @ sqrtm(S2)).sum()
    return max(0., ((mu1 - mu2).square().sum() + S1.trace() + S2.trace() - 2 * cross).item())


def kid(x, y, block=1000, n_blocks=100, seed=0):
    """Unbiased squared MMD of x (n, F), y (m, F) under (x.y / F + 1)^3: mean, std over blocks."""
    gen = torch.Generator().manual_seed(seed)
    block = min(block, len(x) // 2, len(y) // 2)            # of all, blocks would be the same
    some = lambda z: z[torch.randperm(len(z), generator=gen)[:block]].double()
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3
    values = torch.empty(n_blocks, dtype=torch.float64)
    for k in range(n_blocks):
        a, b = some(x), some(y)
        # without the diagonal k(a, a), which makes the plain estimate biased
        within = sum(m.sum() - m.trace() for m in (kernel(a, a), kernel(b, b)))
        values[k] = within / (block * (block - 1)) - 2 * kernel(a, b).mean()
    return values.mean().item(), values.std(correction=0).item()


def inception_score(probs, splits=10, seed=0):
    """exp of the mean KL(p(y|x) || p(y)) of probs (n, K): mean and std over splits."""
    # shuffled: a split of a file that is sorted by class has few classes
    order = torch.randperm(len(probs), generator=torch.Generator().manual_seed(seed))
    parts, log = probs[order].double().tensor_split(splits), torch.special.xlogy
    scores = torch.stack([(log(p, p) - log(p, p.mean(0))).sum(1).mean().exp() for p in parts])
    return scores.mean().item(), scores.std(correction=0).item()


def by_distance(x, y, reduce):
    """reduce(distances (rows, m)) of the rows of x (n, F), some at a time, to those of y (m, F)."""
    x, y, parts = x.double(), y.double(), []
    for a in x.split(max(1, CHUNK // len(y))):
        size = a.square().sum(1, keepdim=True) + y.square().sum(1)
        d2 = size - 2 * a @ y.T
        d2 = torch.where(d2 > 1e-13 * size, d2, 0.)             # duplicates at 0, not at 1e-8
        parts.append(reduce(d2.sqrt()))
    return torch.cat(parts)


def radii(x, k=3):
    """Distance (n,) of each row of x (n, F), its nearest itself, to its k-th nearest other."""
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
    """Root mean square of 1-D W2 over random directions. x (n, F), y (m, F)."""
    x, y = x.double().cpu(), y.double().cpu()
    return ot.sliced_wasserstein_distance(x, y, n_projections=n_proj, seed=seed).item()


def copy_ratio(samples, seen, unseen):
    """Mean distance to the nearest image that the sampler saw, over that to the nearest real one
    that it did not. All (n, F). A copier is far below what held-out images have."""
    a, b = (by_distance(samples, x, lambda d: d.amin(1)).mean() for x in (seen, unseen))
    return (a / b).item()


# ---------------------------------------------------------------- feature spaces

def pixels(images):
    """The raw pixels in [0, 1]."""
    if images[0].numel() > 4096:
        raise ValueError(f"--features pixels: {images[0].numel()} dimensions; their covariance is "
                         "computed: at most 4096, 32x32 in colour")
    return images.flatten(1).float() / 255, None


def make_extractor(name, real, device="cpu", cache="cache"):
    """The feature space of --features."""
    if name == "pixels":
        return pixels
    if name == "inception":
        import inception
        return inception.load_inception(cache).to(device)
    if real.train_labels is None:
        raise ValueError("--features classifier learns from training images: give --dataset, or "
                         "--features inception")
    return train_classifier(real.train_images, real.train_labels, cache=cache).to(device)


@torch.no_grad()
def extract(space, images, device="cpu", batch_size=64):
    """Features (n, F) and logits (n, K) or None, both on the CPU, of images uint8 (n, H, W, C)."""
    if len(images) < MIN_IMAGES:
        raise ValueError(f"{len(images)} images; at least {MIN_IMAGES} are needed, or thousands")
    parts = torch.as_tensor(images).split(batch_size)
    parts = tqdm(parts, desc="features", leave=False, disable=len(parts) < 80 or None)
    # published features are fp32: convolutions in TF32 differ
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        x, logits = zip(*(space(part.to(device)) for part in parts))
    x, logits = torch.cat(x).cpu(), None if logits[0] is None else torch.cat(logits).cpu()
    if not x.isfinite().all():
        raise ValueError("the extractor gave non-finite features: damaged weights?")
    return x, logits


# ---------------------------------------------------------------- real images, and the Judge

class Real(NamedTuple):
    """Real images uint8 (n, H, W, C) and labels (n,) of a data set."""
    images: torch.Tensor                            # the reference: held-out images
    labels: torch.Tensor | None = None
    train_images: torch.Tensor | None = None        # for classifier, floor and copy ratio
    train_labels: torch.Tensor | None = None


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
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]


class Judge:
    """Measures images against real ones, in one feature space."""

    def __init__(self, space, real, device="cpu"):
        self.space, self.real, self.device = space, real, device
        self.x, self.logits = extract(space, real.images, device)
        self.gaussian, self.points = gaussian(self.x), shuffled(self.x)[:MAX_REAL].to(device)
        self.radius = radii(self.points)                      # most of the time
        if real.train_images is not None:
            unseen, self.others = shuffled(real.images).chunk(2)     # the others: for `floor`
            self.seen, self.unseen = (thumbnails(z).to(device) for z in (real.train_images, unseen))

    def __call__(self, images, labels=None):
        """Features (n, F) and {metric: value} of images (n, H, W, C) and labels (n,)."""
        x, logits = extract(self.space, images, self.device)
        return x, self.distances(x) | self.contents(images, labels, logits)

    def floor(self, n):
        """{metric: value} of n training images, of classes as balanced as those of samples; what
        they show: of real images that nobody was trained on."""
        order = shuffled(torch.arange(len(self.seen)))
        labels = self.real.train_labels[order]
        # the first of each class, then the second of each, and so on
        place = F.one_hot(labels).cumsum(0).gather(1, labels[:, None])[:, 0]
        some = self.real.train_images[order[place.argsort(stable=True)][:n]]
        values = self.distances(extract(self.space, some, self.device)[0])
        return values | self.contents(self.others, self.real.labels, self.logits)

    def distances(self, x):
        """{metric: value} of features x (n, F): how their distribution differs."""
        fid = frechet_distance(*gaussian(x), *self.gaussian)
        x, y = x.to(self.device), self.x.to(self.device)
        (mean, std), w2 = kid(x, y), sliced_w2(x, y)
        precision, recall = precision_recall(self.points, x, self.radius)
        return {"fid": fid, "kid": mean, "kid_std": std, "sliced_w2": w2, "precision": precision,
                "recall": recall}

    def contents(self, images, labels, logits):
        """{metric: value} of what images show, as far as there are logits and training images."""
        values, K = {}, 0 if logits is None else logits.shape[1]
        if K:
            values["is"], values["is_std"] = inception_score(logits.double().softmax(1))
        if self.real.train_images is not None:
            mine = thumbnails(images).to(self.device)
            values["copy_ratio"] = copy_ratio(mine, self.seen, self.unseen)
            # Inception's 1008 classes are not those of the labels
            if labels is not None and K == self.real.train_labels.max() + 1:
                values["accuracy"] = (logits.argmax(1) == labels).double().mean().item()
        return values


def thumbnails(images):
    """Where copies are looked for: the pixels (n, F) of at most 32x32."""
    return torch.cat([small(part).flatten(1) for part in torch.as_tensor(images).split(256)])


# ---------------------------------------------------------------- command line

ROWS = {"fid": ("Frechet distance", "lower"), "kid": ("KID", "lower"),
        "sliced_w2": ("sliced W2", "lower"), "precision": ("precision", "higher"),
        "recall": ("recall", "higher"), "is": ("Inception score", "higher"),
        "accuracy": ("class accuracy", "higher"), "copy_ratio": ("copy ratio", "as real")}


def parse_args(argv=None):
    """Our own flags, and a list of those that are for sample.py."""
    p = Parser(description="Measure images, of a checkpoint or of a file, against real ones.",
               usage="%(prog)s --ckpt RUN [flags of sample.py: --refine default --steps 10 ...]\n"
                     "       %(prog)s --samples NPZ (--dataset NAME | --ref NPZ)")
    add = p.add_argument
    add("--ckpt", metavar="RUN", help="draw from this run; compare with its held-out images")
    add("--n", type=number(int, MIN_IMAGES), default=1000,
        help="with --ckpt: images a seed, rounded up to as many of each class")
    add("--seeds", "--seed", type=number(int, 0, 2 ** 32 - 1), nargs="+", default=[0],
        metavar="SEED", help="with --ckpt: of the noise; several give mean +- deviation")
    add("--samples", metavar="NPZ", help="instead of --ckpt: a file as sample.py --out writes it")
    add("--dataset", choices=data.DATASETS, metavar="NAME",
        help="with --samples: compare with the held-out images of digits, mnist, folder ...")
    add("--ref", metavar="NPZ", help="with --samples, instead of --dataset: compare with the "
        "images, or their mean mu and covariance sigma, in this file")
    add("--data_dir", help="where the data set is (with --ckpt by default as in training)")
    add("--vae", help="kl16.ckpt, which decodes the latents of --ckpt or --dataset")
    add("--features", choices=("classifier", "pixels", "inception"), default="classifier",
        help="what is compared: features of a classifier of the data set, pixels, Inception's")
    add("--cache", default="cache", help="folder of trained classifiers and Inception's weights")
    add("--json", metavar="FILE", help="write the numbers to this file, too")
    add("--device", default="auto", help="auto, cpu, cuda ...")
    args, drawing = p.parse_known_args(argv)
    return (args, drawing) if args.ckpt else (p.parse_args(argv), [])


def from_checkpoint(args, drawing, space_of, device):
    """(what is measured, its sets of images and labels, their Judge) of --ckpt."""
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

    sets = ((torch.from_numpy(job.images(labels, seed)), labels) for seed in seeds)
    about = {"ckpt": args.ckpt, "step": job.state["step"], "seeds": seeds, "drawing": drawing}
    real = real_images(dataset, device)
    return about, sets, Judge(space_of(real), real, device)


def from_file(args, space_of, device):
    """The same of --samples."""
    if bool(args.ref) == bool(args.dataset):
        raise ValueError("samples are measured against either --ref FILE or --dataset NAME")
    given = data.flags_of(args.dataset, args) if args.dataset else {}
    args.check_used()
    arrays = checked_images(read_npz(args.samples), args.samples, "arr_0", "arr_1")
    images, labels = (None if a is None else torch.from_numpy(a) for a in arrays)
    if args.ref:
        import inception
        judge = inception.reference_judge(args.ref, images, space_of, device)
    else:
        real = real_images(data.load(args.dataset, size=images.shape[1], patch=1, device=device,
                                     **given), device)
        if labels is not None and labels.max() > real.labels.max():
            raise ValueError(f"the samples have class {labels.max()}, {args.dataset} has only 0 to "
                             f"{real.labels.max()}")
        check_shapes(images, real.images)
        judge = Judge(space_of(real), real, device)
    return {"samples": args.samples, "ref": args.ref or args.dataset}, [(images, labels)], judge


def check_shapes(images, real):
    if images.shape[1:] != real.shape[1:]:
        raise ValueError(f"the samples are {tuple(images.shape[1:])}, the real images "
                         f"{tuple(real.shape[1:])} (H, W, C): make both the same size")


def check_unseen(refinement, dataset):
    """ValueError where refinement takes its targets from the images that it is measured against."""
    targets, held = ({x.numpy().tobytes() for x in tokens_of(0, refinement.m)} for tokens_of in
                     (refinement.tokens_of, sample.tokens_of(dataset, "heldout")))
    if len(targets & held) > len(held) / 10:
        raise ValueError("the targets of refinement are held-out images, which the result is "
                         "measured against: take them from the training images")


def main(argv=None):
    args, drawing = parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("evaluate.py is one process: draw by torchrun -- sample.py --out s.npz")
    if bool(args.ckpt) == bool(args.samples):
        raise ValueError("what is to be measured? give either --ckpt RUN or --samples FILE")
    device, out = pick_device(args.device), args.json and check_output("--json", args.json)
    # each flag is looked at only where it has an effect, so that check_used refuses the others
    cache = None if args.features == "pixels" else args.cache
    space_of = lambda real: make_extractor(args.features, real, device, cache)
    about, sets, judge = (from_checkpoint(args, drawing, space_of, device) if args.ckpt else
                          from_file(args, space_of, device))

    x, values = zip(*(judge(images, labels) for images, labels in sets))
    n, dim = x[0].shape
    real = judge.real.images, judge.real.train_images
    n_ref, n_train = (0 if z is None else len(z) for z in real)
    result = {**about, "features": args.features, "dim": dim, "n_samples": n, "n_ref": n_ref,
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
    seeds, real = f"{n_seeds} x " * (n_seeds > 1), result["n_ref"] or "statistics of"
    print(f"{seeds}{n} samples against {real} images; features: {result['features']}, {dim}-d")

    def cell(row, key):
        std = f" +- {row[key + '_std']:.3g}" if key + "_std" in row else ""
        return f"{row[key]:.4g}{std}" if key in row else "-"

    print(f"{'':16}{'samples':>22}{'real vs real':>22}   better")
    for key, (title, better) in ROWS.items():
        if key in values:
            print(f"{title:16}{cell(values, key):>22}{cell(floor, key):>22}   {better}")
    print(f"real vs real: {result['n_floor']} training images against the same reference; score "
          "and accuracy: the reference's own" if floor else
          "real vs real: not computed: it needs training images (--dataset)")
    if n < 10 * dim:
        print(f"note: {n} samples for {dim} dimensions: the Frechet distance is biased upward; "
              "compare at equal N, or by KID")


if __name__ == "__main__":
    run(main)
