"""What ablate.py compares the method with, some ten lines a rival, and who judges.

maps        dataclasses of the same `fit` interface as those of ot_refine.py, added to its MAPS
inverse     T^-1 and x_hat for lam > 0: (refinement, k) -> the inverse(i, c) of ot_refine.Refiner
controls    (refinement, seed, refine, y, index) -> another refine(i, c, y) for a batch of classes y
fixes       of sampling: (model, value) changes methods of this one model; `fixed` undoes it
trainings   subclasses of AR with another `loss`, whose checkpoints load and draw as any AR
judges      three unrelated feature spaces; a part of the training images to choose settings on
"""
import contextlib
import functools
import sys
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

import data as datasets
import evaluate
import ot_refine
import sample
import train
from diffloss import ImageNoise
from evaluate import Judge, extract, frechet_distance, gaussian
from model import AR
from ot_refine import sq_cost
from sample import ideal_conditions


# ---------------------------------------------------------------- maps

@dataclass
class Mean:
    """T(z) = z + mean of the targets - mean of the conditions."""
    shift: torch.Tensor         # (C,)

    @classmethod
    def fit(cls, c, target, reg=None):
        return cls(target.mean(0) - c.mean(0))

    def __call__(self, z):
        return z + self.shift


@dataclass
class MeanVar:
    """Mean and variance of each direction are matched, on their own."""
    mean: torch.Tensor          # (C,)
    scale: torch.Tensor         # (C,)
    to: torch.Tensor            # (C,)

    @classmethod
    def fit(cls, c, target, reg=None):
        n, m, s, t = len(c), len(target), *(len(z) * z.var(0, correction=0) for z in (c, target))
        # one more observation of each: n = 1 is a mean shift, no variance is 0
        both = (s + t) / max(n + m - 2, 1) + 1e-30
        return cls(c.mean(0), ((t + both) * n / ((s + both) * m)).sqrt(), target.mean(0))

    def __call__(self, z):
        return self.to + (z - self.mean) * self.scale


@dataclass
class EMA:
    """Every condition becomes one ideal one: a running mean over the targets, decay .99."""
    ideal: torch.Tensor         # (C,)

    @classmethod
    def fit(cls, c, target, reg=None):
        w = 0.99 ** torch.arange(len(target) - 1, -1, -1, device=c.device, dtype=c.dtype)
        return cls(w @ target / w.sum())

    def __call__(self, z):
        return self.ideal.expand_as(z)


@dataclass
class Nearest:
    """Each condition becomes the mean of its five nearest targets: a bank without transport."""
    target: torch.Tensor        # (m, C)

    @classmethod
    def fit(cls, c, target, reg=None):
        return cls(target)

    def __call__(self, z):
        near = sq_cost(z, self.target).topk(min(5, len(self.target)), largest=False).indices
        return self.target[near].mean(1)


RIVALS = {"mean": Mean, "meanvar": MeanVar, "ema": EMA, "nearest": Nearest}
ot_refine.MAPS.update(RIVALS)


# ---------------------------------------------------------------- the inverse term, lam > 0

class InverseMap(nn.Module):
    """T^-1: the condition that a patch reveals, E[c_i | x_i]. Patches x (..., D), their positions
    (...) -> (..., C).

    CHOICE(inverse): a regression of c_i on (x_i, i), over real images as a trained model sees
    them. Alternative: the paper leaves T^-1 undefined.
    """

    def __init__(self, token_dim, cond_dim, n_positions, width=128):
        super().__init__()
        self.position = nn.Embedding(n_positions, width)
        self.inp = nn.Linear(token_dim, width)
        self.net = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                 nn.Linear(width, cond_dim))

    def forward(self, x, i):
        return self.net(self.inp(x) + self.position(i))

    @classmethod
    def fit(cls, x, i, c, steps=1000, rows=256):
        """Fitted to patches x (n, D) at positions i (n,) with conditions c (n, C)."""
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            T = cls(x.shape[1], c.shape[1], int(i.max()) + 1).to(c.device)
            optimizer = torch.optim.Adam(T.parameters(), fused=True)
            for step in range(steps):
                some = torch.randint(len(x), (min(rows, len(x)),)).to(c.device)
                for group in optimizer.param_groups:
                    group["lr"] = 1e-2 * (1 - step / steps)
                optimizer.zero_grad()
                F.mse_loss(T(x[some], i[some]), c[some]).backward()
                optimizer.step()
        return T.requires_grad_(False)


@functools.lru_cache(maxsize=1)
def inverse_map(refinement, images=2000):
    """The T^-1 of a model, by reference images of all classes in the orders of their classes."""
    model, K, rows = refinement.model, refinement.model.cfg.num_classes, []
    for k in range(0, K, -(-K // images)):
        x, order = refinement.tokens_of(k, max(1, images // K)), refinement.order(k)
        c = ideal_conditions(model, x, k, order, refinement.sampling.get("num_iter"))    # (N, m, C)
        x = x.to(model.device)[:, order].transpose(0, 1)                                 # (N, m, D)
        rows.append((x.flatten(0, 1), order.repeat_interleave(x.shape[1]), c.flatten(0, 1)))
    return InverseMap.fit(*map(torch.cat, zip(*rows)))


def x0_hat(head, x_t, t, c):
    """E[x0 | x_t, c] (..., D) as a head sees it, within its bound, at steps t (...)."""
    eps, at = head.net(x_t, t, c)[0].float(), lambda table: table[t][..., None]
    return head.bounded(at(head.x0_from_xt) * x_t - at(head.x0_from_eps) * eps)


def inverse_by(x_hat):
    """(refinement, k) -> inverse(i, c): T^-1 of x_hat(head, z, c), the patches that conditions c
    (n, C) lead to from one fixed noise z (n, D) a place."""
    @functools.wraps(x_hat)
    def inverse_of(refinement, k):
        model, cfg, order = refinement.model, refinement.model.cfg, refinement.order(k)
        T, noise = inverse_map(refinement), ImageNoise(-1 - refinement.seed, [-1], model.device)
        z = noise.randn(cfg.n_tokens, cfg.token_dim)[0]                                  # (N, D)
        return lambda i, c: T(x_hat(model.diffloss, z[i].expand(len(c), -1), c),
                              order[i].expand(len(c)))
    return inverse_of


@inverse_by
def one_evaluation(head, z, c):
    """CHOICE(x_hat): one evaluation, at t = 900: nearly E[x | c], but the head's error is magnified
    6 times and not 20,000 times as at t = 999. Alternative: whole_trajectory, the literal text."""
    return x0_hat(head, z, torch.full(c.shape[:1], 900, device=c.device), c)


@inverse_by
def whole_trajectory(head, z, c):
    """The paper's literal Algorithm 1: 25 steps of DDIM inside each of its K steps."""
    return head.sample(c, None, 1.0, z[None], "ddim", 25)


# ---------------------------------------------------------------- controls

def shuffled(refinement, seed, refine, y, index):
    """Each image is moved by the displacement of another of its class in the batch: as far, but not
    where transport leads."""
    chance = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    other = torch.empty_like(chance)
    other[y.argsort(stable=True)] = chance[y[chance].argsort(stable=True)]
    return lambda i, c, y: c + (refine(i, c, y) - c)[other.to(c.device)]


def ideal(refinement, seed, refine, y, index):
    """An oracle: each image is drawn under the ideal conditions of a real one of its class. Not
    for guidance, whose other branch would follow the images drawn."""
    K = refinement.model.cfg.num_classes
    real = {k: refinement.conditions(k, refinement.m) for k in y.unique().tolist()}
    one = lambda k, j: real[k][:, (j // K + 97 * seed) % real[k].shape[1]]                # (N, C)
    c = torch.stack([one(k, j) for k, j in zip(y.tolist(), index.tolist())], 1)
    return lambda i, c_drawn, y: c[i].to(c_drawn.dtype)




# ---------------------------------------------------------------- fixes of sampling

def epsilon_scaling(model, lam, most=1.0):
    """eps / lam in each evaluation where sigma, in 0 .. 1, is at most `most` (Ning et al. 2024,
    against the exposure bias of the steps)."""
    head, own = model.diffloss, model.diffloss.denoiser

    def denoiser(*given, **options):
        inner = own(*given, **options)

        def denoise(x_t, t):
            x0, v = inner(x_t, t)
            if head.schedule.sigma[t] > most:
                return x0, v
            clean = x_t * float(head.schedule.x0_from_xt[t])         # x0 = clean - const * eps
            return head.bounded(clean + (x0 - clean) / lam), v

        return denoise

    head.denoiser = denoiser


def late_epsilon_scaling(model, lam):
    """Below sigma = .2 alone. With lam below 1 it takes away the grain that a small head leaves."""
    epsilon_scaling(model, lam, 0.2)


def guidance_interval(model, most):
    """Guidance only where sigma, in 0 .. 1, is at most `most` (Kynkaanniemi et al. 2024)."""
    head, own = model.diffloss, model.diffloss.denoiser

    def denoiser(ts, c, c_null=None, cfg_scale=1.0):
        guided, plain = own(ts, c, c_null, cfg_scale), own(ts, c)
        return lambda x_t, t: (guided if head.schedule.sigma[t] <= most else plain)(x_t, t)

    head.denoiser = denoiser


def autoguidance(model, scale):
    """An earlier checkpoint, with the class and a chain of its own, in place of the null branch
    (Karras et al. 2024)."""
    weak, head, own = model.weak[0], model.diffloss, model.generate

    def generate(y, noise, **options):
        h, i = weak.class_emb(y)[:, None], iter(range(weak.cfg.n_tokens))
        caches = weak.empty_cache(len(h), h)

        def drawn(c, c_null, cfg_scale, z, solver=None, steps=25, **options):
            nonlocal h
            run, timesteps, _ = head.solver(solver)
            good = head.denoiser(timesteps(steps), c)
            c_weak = weak.next_condition(next(i), h, caches)
            bad = weak.diffloss.denoiser(timesteps(steps), c_weak)

            def denoise(x_t, t):
                x0, v = good(x_t, t)
                return head.bounded(torch.lerp(bad(x_t, t)[0], x0, scale)), v

            x = run(denoise, z, steps, **options)
            h = weak.x_proj(x)[:, None]
            return x

        head.sample = drawn
        return own(y, noise, **options)

    model.generate = generate


@contextlib.contextmanager
def fixed(model, fix):
    """The model with a fix (function, value), or as it is."""
    fast_copy = sample.fast_copy
    try:
        if fix:
            fix[0](model, fix[1])
            sample.fast_copy = lambda model: model           # which would lack the fix
        yield
    finally:
        sample.fast_copy = fast_copy
        for part in (model, model.diffloss):
            for name in ("generate", "sample", "denoiser"):
                vars(part).pop(name, None)


# ---------------------------------------------------------------- trainings

class ContextNoise(AR):
    """The known patches carry noise of a uniform level per image, up to MOST; targets are clean."""
    MOST = 0.5

    def randomness(self, n, generator):
        at = {"generator": generator, "device": generator.device}
        shape = (n, self.cfg.n_tokens, self.cfg.token_dim)
        return {**super().randomness(n, generator), "level": torch.rand(n, 1, 1, **at),
                "noise": torch.randn(*shape, **at)}

    def context(self, x, y, draws):
        return x + self.MOST * draws["level"] * draws["noise"]

    def loss(self, x, y, draws):
        y = self.with_null(y, draws["drop"])
        # held-out losses compare with those of other runs
        known = self.context(x, y, draws) if self.training else x
        return self.head_loss(x, self.conditions(known, y), draws)

    forward = loss


class OwnDraws(ContextNoise):
    """The known patches are the head's own: its estimate in one evaluation, from the patch noised
    to a step that is uniform per image. Two parallel passes."""

    @torch.no_grad()
    def context(self, x, y, draws):
        t = (draws["level"][..., 0] * 1000).long().expand(x.shape[:2])
        x_t = self.diffloss.noised(x, t, draws["noise"])
        return x0_hat(self.diffloss, x_t, t, self.conditions(x, y))


TRAININGS = {"noise": ContextNoise, "own": OwnDraws}


def train_rival(argv):
    """train.py, with all its flags, for a model with another loss; it loads and draws as any AR."""
    if not argv or argv[0] not in TRAININGS:
        raise ValueError(f"train which rival? {' or '.join(TRAININGS)}, then flags of train.py")
    train.SETTINGS["rival"] = argv[0]        # kept in the checkpoint; another one is not resumed
    train.build = TRAININGS[argv[0]]
    sys.argv = ["train.py", *map(str, argv[1:])]
    train.main()


# ---------------------------------------------------------------- judges

class Principal:
    """A feature space: the 64 leading principal components of another, over training images, scaled
    to a mean variance of 1."""

    def __init__(self, space, images, device, most=64):
        self.space, x = space, extract(space, images, device)[0]
        mean, cov = gaussian(x)
        scale, axes = torch.linalg.eigh(cov)
        axes = axes[:, -most:] / scale[-most:].mean().sqrt()
        self.mean, self.axes = (z.float().to(device) for z in (mean, axes))

    @torch.no_grad()
    def __call__(self, images):
        return (self.space(images)[0] - self.mean) @ self.axes, None


def random_convolutions(channels, seed=0):
    """A network that was never trained."""
    layer = lambda a, b, size: [nn.Conv2d(a, b, size, padding=size // 2), nn.ReLU()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(*layer(channels, 32, 5), nn.MaxPool2d(2), *layer(32, 64, 3),
                             nn.MaxPool2d(2), *layer(64, 128, 3), nn.AdaptiveAvgPool2d(3),
                             nn.Flatten()).requires_grad_(False)


class Judges:
    """Measures images in three unrelated spaces: the classifier's, whose numbers have plain names,
    "convolutions" and "pixels"."""

    def __init__(self, real, device, cache):
        self.real, channels, one = real, real.images.shape[3], real._replace(train_images=None)
        self.main = Judge(evaluate.make_extractor("classifier", real, device, cache=cache), real,
                          device)
        net = random_convolutions(channels).to(device)
        spaces = {"convolutions": lambda x: (net(evaluate.small(x)), None),
                  "pixels": lambda x: (evaluate.small(x).flatten(1), None)}
        self.others = {name: Judge(Principal(space, real.train_images, device), one, device)
                       for name, space in spaces.items()}

    def __call__(self, images, labels):
        """{measure: value}; of the classes that few data sets have, each class's distance."""
        x, values = self.main(images, labels)
        for name, judge in self.others.items():
            more = judge(images)[1]
            values |= {f"{name} {key}": more[key] for key in more}
        classes = labels.unique().tolist()
        if len(classes) <= 12 and len(labels) >= 25 * len(classes):
            one = lambda z, y, k: gaussian(z[y == k])
            values |= {f"class {k}": frechet_distance(
                *one(x, labels, k), *one(self.main.x, self.real.labels, k)) for k in classes}
        return values

    def floor(self, n):
        """The same of n training images."""
        labels, K = self.real.train_labels, int(self.real.train_labels.max()) + 1
        place = torch.cat([torch.arange(int((labels == k).sum())) for k in range(K)])
        some = place.argsort(stable=True)[:n]                       # classes are in order
        # copying and accuracy are those of images that nobody was trained on
        return self(self.real.train_images[some], labels[some]) | self.main.floor(n)


class Part:
    """Some images of a split: what data.py calls a split, too."""

    def __init__(self, whole, index):
        self.whole, self.index, self.labels = whole, index, whole.labels[index]

    def __len__(self):
        return len(self.index)

    def batch(self, indices, key=None):
        return self.whole.batch(self.index[torch.as_tensor(indices)], key)

    def of_class(self, y, m):
        return datasets.of_class(self.labels, y, m)


def tuning(dataset):
    """The data set to choose settings on: a sixth of each class's training images stands in for the
    held-out ones, and serves for nothing else but the generator's training."""
    whole = dataset.train
    classes = [whole.of_class(k, len(whole)) for k in range(len(dataset.class_names))]
    cut = lambda keep: torch.cat([c[len(c) // 6:] if keep else c[:len(c) // 6] for c in classes])
    return replace(dataset, train=Part(whole, cut(True)), heldout=Part(whole, cut(False)))
