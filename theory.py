"""The paper's claims, each tested twice: in a closed-form toy whose assumptions hold exactly, and
on trained models.

    python theory.py --ar out/ar --mar out/mar --cdm out/cdm        any of the three may be absent
    -> out/theory/theory.md (a page: figure, verdict, table a claim), theory.json (all numbers)

Each claim is counted as holding by a rule that is stated with it; `Evidence.judge` is the only
place that decides. Intervals are 95 % bootstrap ones. Reading order: statistics, toys (numpy,
float64), what is observed of a model, the claims, output. What is observed comes through the hooks
that a reader has, too: `on_condition` for conditions, `callback` for the sampler's x0. Scores are
given as eps = -sigma_t score, per dimension, so that noise levels compare.

Zhou, Li, Shen: Condition Errors Refinement in Autoregressive Image Generation with Diffusion Loss,
ICLR 2026.
"""
from command import Parser, number, run        # first: it answers signals

import io
import json
import time
from dataclasses import dataclass, field
from textwrap import fill

import numpy as np
import ot
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.linalg import solve_discrete_lyapunov
from scipy.optimize import linear_sum_assignment

import ot_refine
import sample
from ablate import open_job
from data import unpatchify
from files import output_folder, write_png, write_text
from diffloss import Schedule
from evaluate import frechet_distance
from model import KINDS
from ot_refine import Sinkhorn, jko_step, sq_cost
from rivals import InverseMap
from sample import Refinement, ideal_conditions, tokens_of

SCHEDULE = Schedule()
LEVELS = (50, 200, 400, 700)            # noise levels t at which scores are compared
K, ETA = 8, 0.5                         # the flow of Theorem 3; rho = 1 / (1 + 2 ETA) = 0.5
PARTICLES = 200                         # of the toys


# ---------------------------------------------------------------- statistics

def fit_decay(G):
    """Least squares of curves G (R, N) by M beta^i + m, 0 < beta < 1 -> M, beta, m, R^2 (R, 4).

    For a given beta it is a linear regression, whose R^2 is a squared correlation: so search beta
    alone, on a grid that is refined around its best point, for all curves at once. A constant
    curve has M = 0 and R^2 = 0.
    """
    G = np.asarray(G, dtype=np.float64)
    i, mean = np.arange(G.shape[1]), G.mean(1, keepdims=True)
    total = ((G - mean) ** 2).sum(1)
    flat = total <= 1e-24 * (1e-300 + mean[:, 0] ** 2)
    low, high = np.full((len(G), 1), 1e-3), np.full((len(G), 1), 1 - 1e-3)
    for _ in range(4):
        beta = low + (high - low) * np.linspace(0, 1, 41)                            # (R, 41)
        basis = beta[..., None] ** i                                                 # (R, 41, N)
        centred = basis - basis.mean(-1, keepdims=True)
        dot, size = np.einsum("rbn,rn->rb", centred, G - mean), (centred ** 2).sum(-1)
        best = (dot ** 2 / size).argmax(1)[:, None]
        pick = lambda a: np.take_along_axis(a, best, 1)[:, 0]
        step, at = (high - low) / 40, pick(beta)[:, None]
        low, high = np.maximum(at - step, 1e-3), np.minimum(at + step, 1 - 1e-3)
    scale = np.where(flat, 0, pick(dot / size))
    r2 = pick(dot) * scale / np.where(flat, 1, total)
    return np.stack([scale, pick(beta), mean[:, 0] - scale * pick(basis.mean(-1)), r2], 1)


def slope(G):
    """Least-squares slope (R,) of curves G (R, N) against i."""
    i = np.arange(G.shape[1]) - (G.shape[1] - 1) / 2
    return G @ i / (i @ i)


def bootstrap(values, statistic, n_boot=500, seed=0):
    """statistic(mean of values over axis 0) and its 95 % interval: arrays (estimate, low, high).

    values (n, ...): an entry for each image, or class, resampled with replacement.
    statistic: means (R, ...) -> (R, ...).
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    share = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), n_boot) / n
    boot = statistic((share @ values.reshape(n, -1)).reshape(n_boot, *values.shape[1:]))
    return statistic(values.mean(0)[None])[0], *np.quantile(boot, [0.025, 0.975], axis=0)


# ---------------------------------------------------------------- toys

def toy_theorem1(ts):
    """L_cond, L_uncond, eps_c (len(ts), 3) of the linear model s(x_t) = a x_t + b; c is the
    component of a 1-d mixture.

    p_t(x_t | c = k) = N(m_k, v_k), m_k = alpha mu_k, v_k = alpha^2 s_k^2 + sigma^2. L_cond
    integrates a parabola under Gaussians: closed form. The other two integrate smooth functions
    that vanish at both ends, where the trapezoid rule is exact to rounding; that L_cond = L_uncond
    + eps_c is thus a check of two ways to compute it.
    """
    share, mu = np.array([0.5, 0.3, 0.2]), np.array([-2.0, 0.5, 2.5])
    std, x, out = np.array([0.4, 0.7, 0.5]), np.linspace(-14, 14, 20_001)[:, None], []
    for t in ts:
        alpha, sigma = SCHEDULE.alpha[t], SCHEDULE.sigma[t]
        mean, var = alpha * mu, alpha ** 2 * std ** 2 + sigma ** 2
        centre = share @ mean
        a = -1 / (share @ (var + (mean - centre) ** 2))                 # the Gaussian fit of p_t
        l_cond = share @ ((a + 1 / var) ** 2 * var + (a * (mean - centre)) ** 2)
        joint = share * np.exp(-(x - mean) ** 2 / (2 * var)) / np.sqrt(2 * np.pi * var)  # (X, K)
        cond, p = -(x - mean) / var, joint.sum(1)
        marginal = (joint * cond).sum(1) / p
        l_uncond = np.trapezoid(p * (a * (x[:, 0] - centre) - marginal) ** 2, x[:, 0])
        eps_c = np.trapezoid((joint * (cond - marginal[:, None]) ** 2).sum(1), x[:, 0])
        out.append((l_cond, l_uncond, eps_c))
    return np.array(out)


@dataclass
class LinearChain:
    """c_{i+1} = A c_i + b + N(0, Q), patch x_i = c_i + N(0, R), c_0 ~ N(mean, cov).

    A chain that feeds its patches back, c_{i+1} = F c_i + B x_i + w, has A = F + B.
    """
    A: np.ndarray
    b: np.ndarray
    mean: np.ndarray
    cov: np.ndarray
    Q, R = 0.09, 0.25                            # times the unit matrix

    def stationary(self):
        """Mean (C,) and covariance (C, C) that the chain forgets its start for."""
        eye = np.eye(len(self.b))
        return np.linalg.solve(eye - self.A, self.b), solve_discrete_lyapunov(self.A, self.Q * eye)

    def moments(self, steps):
        """[(mean, covariance) of c_i], i = 0 .. steps-1."""
        out, noise = [(self.mean, self.cov)], self.Q * np.eye(len(self.b))
        for _ in range(steps - 1):
            mean, cov = out[-1]
            out.append((self.A @ mean + self.b, self.A @ cov @ self.A.T + noise))
        return out

    def gain(self, cov):
        """The regression of c on x, E[c | x] = E c + gain (x - E x), at covariance `cov` of c."""
        return cov @ np.linalg.inv(cov + self.R * np.eye(len(cov)))

    def sample(self, n, steps, seed=0):
        """c and x (steps, n, C)."""
        rng = np.random.default_rng(seed)
        c = [rng.multivariate_normal(self.mean, self.cov, n)]
        for _ in range(steps - 1):
            c.append(c[-1] @ self.A.T + self.b + self.Q ** 0.5 * rng.normal(size=c[-1].shape))
        return np.stack(c), np.stack(c) + self.R ** 0.5 * rng.normal(size=np.shape(c))


def toy_chain(r, dim=4, normal=True, spread=1.0):
    """A LinearChain of spectral radius r that starts 5 away from its stationary mean, with `spread`
    times its covariance. normal: A is r times a rotation, so that every direction decays at exactly
    r; else A is any matrix of that radius."""
    rng = np.random.default_rng(0)
    A, away, b = rng.normal(size=(dim, dim)), rng.normal(size=dim), rng.normal(size=dim)
    A = r * np.linalg.qr(A)[0] if normal else r * A / np.abs(np.linalg.eigvals(A)).max()
    mean, cov = LinearChain(A, b, b, np.eye(dim)).stationary()
    return LinearChain(A, b, mean + 5 * away / np.linalg.norm(away), spread * cov)


def toy_theorem2(chain, steps, t):
    """E || grad log p_t(x_t | c_i) ||^2 (steps,) at an x_t that does not follow c_i, and (a number)
    at one that does.

    The score is (alpha c_i - x_t) / V, V = alpha^2 R + sigma^2. With x_t from the stationary
    marginal, independent of c_i, the mean of c_i enters as || alpha A^i d / V ||^2: for A = r x
    rotation exactly M r^(2i) + m. With x_t ~ p_t(. | c_i) it is dim / V at every i: no decay.
    """
    alpha, dim, (centre, cov) = SCHEDULE.alpha[t], len(chain.b), chain.stationary()
    V = alpha ** 2 * chain.R + SCHEDULE.sigma[t] ** 2
    G = [alpha ** 2 * (np.sum((mean - centre) ** 2) + np.trace(P + cov)) + dim * V
         for mean, P in chain.moments(steps)]
    return np.array(G) / V ** 2, dim / V


def toy_proposition1(chain, steps):
    """W2 between c_i and c_{i+1} (steps - 1,), and what denoising patch i leaves of c_i:
    tr Cov(c | x) / tr Cov(c) (steps,)."""
    moments = chain.moments(steps)
    w2 = [frechet_distance(*a, *b) ** 0.5 for a, b in zip(moments, moments[1:])]
    left = [1 - np.trace(chain.gain(P) @ P) / np.trace(P) for _, P in moments]
    return np.array(w2), np.array(left)


def toy_lemma6(chain, steps):
    """Energy E || eta_i ||^2 = tr Cov(c_i | x_i) (steps,), its propagated and injected parts
    (steps - 1,) at the steps from 1 on.

    eta_i = c_i - E[c_i | x_i] is orthogonal to c_i* = E[c_i | x_i], so with J = I - gain at step
    i+1: eta_{i+1} = J A eta_i (propagated) + J A (c_i* - mean) + J w - gain v (injected), all four
    uncorrelated.
    """
    A, eye, propagated, injected = chain.A, np.eye(len(chain.b)), [], []
    covs = [P for _, P in chain.moments(steps)]
    left = [P - chain.gain(P) @ P for P in covs]                                     # Cov(c | x)
    for P, rest, after in zip(covs, left, covs[1:]):
        gain = chain.gain(after)
        J = eye - gain
        fresh = J @ (A @ (P - rest) @ A.T + chain.Q * eye) @ J.T + chain.R * gain @ gain.T
        propagated.append(np.trace(J @ A @ rest @ A.T @ J.T))
        injected.append(np.trace(fresh))
    return np.array([np.trace(P) for P in left]), np.array(propagated), np.array(injected)


def exact_flow(x, y, eta, steps, implicit=True):
    """W2 (steps + 1,) of particles x (n, C) to y (n, C) along steps with the exact optimal map, a
    permutation: JKO steps, or explicit ones c - 2 eta (c - T(c))."""
    x, y, out = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64), []
    for _ in range(steps + 1):
        cost = ot.dist(x, y)                                             # (n, n) squared distances
        row, col = linear_sum_assignment(cost)
        out.append(np.sqrt(cost[row, col].mean()))
        step = jko_step(torch.tensor(x), torch.tensor(y[col]), eta).numpy()
        x = step if implicit else x - 2 * eta * (x - y[col])
    return np.array(out)


# ---------------------------------------------------------------- what is observed of a model

@dataclass
class Chain:
    """n images of each of G classes by place: tokens x (G, n, N, D), conditions c (G, n, N, C), as
    the head was given them, and `before` refinement. A cdm has one "patch", the image: N = 1.

    path: the t's and x0_hat(t) (T, G n, N, D) of the trajectories, by position.
    """
    x: torch.Tensor
    c: torch.Tensor
    before: torch.Tensor | None = None
    path: tuple | None = None

    def flat(self):
        return self.x.flatten(0, 1), self.c.flatten(0, 1)


@dataclass
class Subject:
    """A trained model, real images seen through it (those that refinement aims at, from the
    training split, and unseen ones), and images that it drew."""
    kind: str
    model: torch.nn.Module
    order: torch.Tensor                          # (N,) the position of each place
    patch: int
    targets: Chain
    unseen: Chain
    plain: Chain
    refined: Chain | None = None

    def chains(self):
        """{name: Chain} of what is compared along the chain."""
        found = {"real": self.unseen, "plain": self.plain, "refined": self.refined}
        return {name: chain for name, chain in found.items() if chain is not None}


def real_chain(model, tokens, classes, m, order):
    """Chain of real images: as many of each class as the smallest class has, at most m."""
    x = [tokens(k, m) for k in classes]
    m = min(map(len, x))
    if m < 2:
        raise ValueError(f"a class has {m} real images; at least 2 of each class and split are "
                         "needed")
    c = [ideal_conditions(model, z[:m], k, order).cpu() for k, z in zip(classes, x)]  # (N, m, C)
    return by_patch(model, torch.cat([z[:m] for z in x]), torch.cat(c, 1), order, len(classes))


def by_patch(model, x, c, order, groups, before=None, path=None):
    """The Chain of tokens x (B, N, D) by position and conditions (N, B, C), sorted by class."""
    whole = model.cfg.kind == "cdm"
    x = x.float().cpu()
    x = x.flatten(1)[:, None] if whole else x[:, order.cpu()]
    c, before = (z if z is None else z[:1 if whole else None].transpose(0, 1).float().cpu()
                 .unflatten(0, (groups, -1)) for z in (c, before))
    return Chain(x.unflatten(0, (groups, -1)), c, before, path)


def drawn(model, classes, n, sampling, order, seed, refiners=None):
    """Chain of n images of each class; refiners {class: Refiner}: with refined conditions."""
    y, kind = torch.tensor(classes).repeat_interleave(n), model.cfg.kind
    before, after, ts, path = [], [], [], []

    def watch(i, c, refined):
        before.append(c)
        after.append(refined)

    def follow(t, x_t, x0):
        ts.append(t)
        path.append(x0)

    given = {"order": order.expand(len(y), -1)} if kind == "mar" else {}
    refine = refiners and (lambda i, c, y: torch.cat(
        [refiners[k](i, part) for k, part in zip(classes, c.split(n))]))
    x = sample.draw(model, y, range(len(y)), seed, refine, watch, callback=follow, **sampling,
                    **given)
    path, steps = torch.stack(path).float().cpu(), len(set(ts))
    if kind == "cdm":                            # its condition is the class, at every patch
        with torch.no_grad():
            before = after = list(model.conditions(x, y.to(x.device)).transpose(0, 1))
    else:                                        # (N T, B, D), by place, to (T, B, N, D)
        path = path.reshape(x.shape[1], steps, len(y), -1).permute(1, 2, 0, 3)
        path = path[:, :, order.argsort().cpu()]
    return by_patch(model, x, torch.stack(after), order, len(classes), torch.stack(before),
                    (ts[:steps], path))


def observe(kind, args):
    """The Subject of a checkpoint; ValueError if it is of another kind. A mar model runs one token
    a step, in one random order, so that for it too an AR step is a patch."""
    began = time.time()
    job = open_job(kind, args)
    model, cfg = job.model, job.model.cfg
    classes = list(range(min(args.classes, cfg.num_classes)))
    if len(classes) < 2:
        raise ValueError(f"--{kind}: the model knows one class; at least 2 are needed, as "
                         "intervals are taken over classes")
    order = model.order(0)                   # one for all classes, so that a place is a position
    sampling, seen = {"steps": args.steps}, tokens_of(job.dataset(), "train")
    real = [real_chain(model, tokens, classes, args.m, order)
            for tokens in (seen, tokens_of(job.dataset(), "heldout"))]
    plain = drawn(model, classes, args.n, sampling, order, args.seed)
    s = Subject(kind, model, order, job.state["data"]["patch"], *real, plain)
    if kind != "cdm":
        refinement = Refinement(model, seen, sampling, m=args.m, n_cal=args.n_cal, orders="one")
        refiners = {k: refinement.refiner(k) for k in classes}
        s.refined = drawn(model, classes, args.n, sampling, order, args.seed, refiners)
    print(f"{kind:12} {time.time() - began:5.1f} s  {job.path}, step {job.state['step']}: "
          f"{len(classes)} classes x {args.n} images", flush=True)
    return s


@torch.no_grad()
def eps_theta(s, x_t, t, c):
    """The model's eps = -sigma_t score(x_t, t, c) (B, D) float64, for x_t (B, D) and c (B, C)."""
    head, shape, c = s.model.diffloss, x_t.shape, c.to(s.order.device)
    x_t = x_t.float().to(c.device)
    if s.kind == "cdm":
        x_t, c = x_t.view(len(c), s.model.cfg.n_tokens, -1), c[:, None]
    t = torch.full(c.shape[:-1], t, device=c.device)
    return (-head.sigma[t][..., None] * head.score(x_t, t, c)).double().cpu().view(shape)


def noised(s, x):
    """Yields i, t, x_t (B, D) float64 = alpha x_i + sigma noise, alpha, sigma, and a permutation of
    the images, for x (B, N, D)."""
    generator = torch.Generator().manual_seed(0)
    for i in range(x.shape[1]):
        for t in LEVELS:
            alpha, sigma = s.model.diffloss.alpha[t].item(), s.model.diffloss.sigma[t].item()
            noise = torch.randn(len(x), x.shape[2], generator=generator, dtype=torch.float64)
            other = torch.randperm(len(x), generator=generator)
            yield i, t, alpha * x[:, i] + sigma * noise, alpha, sigma, other


def condition_errors(s):
    """Squared errors of eps (B, N, T, 5) of some real images: model against conditional, model
    against marginal, the same two for the model under another image's condition ("blind" to c),
    conditional against marginal = eps_c.

    The world is the target set, so both true scores are softmaxes over its patches: the marginal
    one over all at place i, the conditional one over those whose images have the same class and the
    same earlier patches.
    """
    (x, c), (G, m), n = s.targets.flat(), s.targets.x.shape[:2], s.plain.x.shape[1]
    x, rows = x.double(), torch.arange(G * m).view(G, m)[:, :n].flatten()
    sq = lambda a, b: (a - b).square().mean(-1)
    same, out = rows[:, None] // m == torch.arange(G * m) // m, []       # (B, P): equal contexts
    for i, t, x_t, alpha, sigma, other in noised(s, x[rows]):
        if i > 0 and t == LEVELS[0]:
            same &= (x[rows, None, i - 1] == x[None, :, i - 1]).all(-1)
        logits = -torch.cdist(x_t, alpha * x[:, i]).square() / (2 * sigma ** 2)         # (B, P)
        true = lambda logits: (x_t - alpha * logits.softmax(1) @ x[:, i]) / sigma
        cond, marginal = true(logits.masked_fill(~same, -torch.inf)), true(logits)
        own, blind = (eps_theta(s, x_t, t, z) for z in (c[rows, i], c[rows[other], i]))
        out.append(torch.stack([sq(own, cond), sq(own, marginal), sq(blind, cond),
                                sq(blind, marginal), sq(cond, marginal)], 1))
    return torch.stack(out, 1).unflatten(1, (-1, len(LEVELS))).numpy()


def condition_influence(s, chain):
    """RMS of eps(x_t, t, c_i) and of its change when c_i is another image's: (B, N, T, 2), x_t
    noised from x_i."""
    (x, c), out = chain.flat(), []
    for i, t, x_t, _, _, other in noised(s, x):
        own = eps_theta(s, x_t, t, c[:, i])
        change = own - eps_theta(s, x_t, t, c[other, i])
        out.append(torch.stack([own, change], 1).square().mean(-1).sqrt())
    return torch.stack(out, 1).unflatten(1, (-1, len(LEVELS))).numpy()


def divergence(x, y):
    """Debiased Sinkhorn divergence (G,) of clouds x (G, n, C), y (G, m, C), cut to one size as its
    bias depends on it; reg is .05 of the mean cost."""
    n = min(x.shape[1], y.shape[1])
    pairs = zip(x[:, :n].double(), y[:, :n].double())
    return np.array([max(1e-12, ot_refine.divergence(a, b, 0.05 * sq_cost(a, b).mean(), tol=1e-3)
                         .item()) for a, b in pairs])


def along(a, b, shift=0):
    """divergence (G, N - 1 - shift) of conditions a (G, n, N, C) at place i from those of b at
    i - shift; at place 0 all are one point: left out."""
    return np.stack([divergence(a[:, :, i], b[:, :, i - shift])
                     for i in range(1 + shift, a.shape[2])], 1)


def flow(s, i):
    """Clouds (K + 1, G, n, C) of the Sinkhorn flow at place i from drawn conditions to targets
    (G, n, C), the same number of both, so that an exact map could bring W2 to 0."""
    n = min(s.plain.c.shape[1], s.targets.c.shape[1])
    clouds, target = [s.plain.c[:, :n, i]], s.targets.c[:, :n, i]
    for _ in range(K):
        to = [Sinkhorn.fit(c, y).own(c) for c, y in zip(clouds[-1], target)]
        clouds.append(jko_step(clouds[-1], torch.stack(to), ETA))
    return torch.stack(clouds), target


def exact_w2(x, y):
    """W2 between uniform clouds x (n, C) and y (m, C), by linear programming."""
    return ot.emd2([], [], ot.dist(x.double().numpy(), y.double().numpy())) ** 0.5


def snr(x0_hat, x0):
    """10 log10( |x0|^2 / |x0_hat - x0|^2 ) in dB (T, B) of x0_hat (T, B, ...), x0 (B, ...)."""
    error = (x0_hat - x0).square().flatten(2).sum(-1).clamp_min(1e-9)
    return 10 * torch.log10(x0.square().flatten(1).sum(-1) / error)


def noise_intensity(images):
    """Noise level (B,) of images (B, ch, H, W): median absolute deviation of the Laplacian, scaled
    so that white noise of standard deviation s gives s."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    lap = F.conv2d(images.flatten(0, 1)[:, None], kernel).view(len(images), -1)
    deviation = (lap - lap.median(1, keepdim=True).values).abs().median(1).values
    return deviation / (0.6745 * 20 ** 0.5)                    # 20 = sum of the squared weights


# ---------------------------------------------------------------- the claims

@dataclass
class Evidence:
    """What is shown of one claim: panels to draw, and a row of numbers and verdicts for each place
    where it was measured."""
    claim: str
    rule: str                                    # when it counts as holding
    panels: list = field(default_factory=list)   # (title, curves, arrows, options of ax.set)
    rows: list = field(default_factory=list)     # (where, {column: value}, {word: does it hold?})

    def panel(self, title, curves, xlabel="AR step i", arrows=None, **axes):
        """curves: [(label, x, y, format)]; arrows: (start (n, 2), end (n, 2))."""
        self.panels.append((title, curves, arrows, {"xlabel": xlabel, **axes}))

    def judge(self, where, holds, **cells):
        """holds: a bool, or {word: bool} of several verdicts, {} if there is nothing to judge;
        cells: numbers or intervals (estimate, low, high) by column; _name: for theory.json only.
        """
        holds = holds if isinstance(holds, dict) else {"holds": holds}
        self.rows.append((where, cells, {word: bool(ok) for word, ok in holds.items()}))


COLOR = {"real": "k", "plain": "C3", "refined": "C0"}


def chained(subjects):
    """The subjects that have a chain: not cdm."""
    return [(kind, s) for kind, s in subjects.items() if kind != "cdm"]


def theorem1(subjects):
    e = Evidence("Theorem 1: L_cond(s) = L_uncond(s) + eps_c with eps_c >= 0 for every model s, so "
                 "that L_cond bounds L_uncond",
                 "the interval of L_cond - L_uncond is above 0 (bound), that of the residual "
                 "L_cond - L_uncond - eps_c contains 0 (identity), in the toy to 1e-10; the "
                 "proof needs a model that cannot see c: blind ones are given another image's")
    ts = np.arange(0, 1000, 20)
    L = toy_theorem1(ts) * SCHEDULE.sigma[ts, None] ** 2
    d, residual = L[:, 0] - L[:, 1], abs(L[:, 0] - L[:, 1] - L[:, 2]).max()
    e.panel("toy: 1-d mixture", [
        ("L_cond", ts, L[:, 0], "C3-"), ("L_uncond", ts, L[:, 1], "C0-"),
        ("eps_c", ts, L[:, 2], "C2-"), ("L_uncond + eps_c", ts[::5], (L[:, 1] + L[:, 2])[::5], "k.")
    ], "t", ylabel="squared error of eps")
    e.judge("toy", {"bound": d.min() >= 0, "identity": residual < 1e-10}, difference=d.mean(),
            residual_over_eps_c=residual)
    for kind, s in subjects.items():
        v = condition_errors(s)                                                  # (B, N, T, 5)
        # a cdm has one step: show its noise levels instead
        mean, i, axis = v.mean((0, 2)).T, np.arange(v.shape[1]), "AR step i"
        if kind == "cdm":
            mean, i, axis = v.mean((0, 1)).T, LEVELS, "t"
        e.panel(kind, [("L_cond", i, mean[0], "C3.-"), ("L_uncond", i, mean[1], "C0.-"),
                       ("eps_c", i, mean[4], "C2.-"), ("blind L_cond", i, mean[2], "C1x"),
                       ("blind L_uncond + eps_c", i, mean[3] + mean[4], "k:")], axis,
                ylabel="squared error of eps")
        for at, who in ((0, kind), (2, f"{kind} blind")):
            d = bootstrap(v.mean((1, 2)), lambda a: a[:, at] - a[:, at + 1])
            r = bootstrap(v.mean((1, 2)), lambda a: (a[:, at] - a[:, at + 1]) / a[:, 4] - 1)
            e.judge(who, {"bound": d[1] > 0, "identity": r[1] <= 0 <= r[2]}, difference=d,
                    residual_over_eps_c=r)
    return e


def theorem2(subjects):
    e = Evidence("Theorem 2: the influence of the condition decays, || grad log p_t(x_t | c_i) || "
                 "<= M beta^i + m with 0 < beta < 1",
                 "at every t M is above 0 and beta below .98 by their intervals, and R^2 at least "
                 ".5 (M = 0 and a large m would bound any finite chain), in the toy the fit gives "
                 "the spectral radius to 1e-4")
    curves, fitted, radii, i = [], [], (0.5, 0.7, 0.9), np.arange(24)
    for at, r in enumerate(radii):
        G, _ = toy_theorem2(toy_chain(r), len(i), 400)
        (M, square, m, _), *_ = fit_decay(G[None])                       # squared norm: beta^2
        fitted.append(square ** 0.5)
        curves += [(f"r = {r}", i, G, f"C{at}."),
                   (f"fit: {fitted[-1]:.4f}", i, M * square ** i + m, f"C{at}-")]
    e.panel("toy: linear chain", curves, ylabel="E || score ||²")
    e.judge("toy", np.abs(np.subtract(fitted, radii)).max() < 1e-4, beta_400=fitted[1])
    for kind, s in chained(subjects):
        curves = []
        for name, chain in s.chains().items():
            v = condition_influence(s, chain)                                    # (B, N, T, 2)
            fits = [bootstrap(v[:, :, at, 0], fit_decay) for at in range(len(LEVELS))]
            holds = all(low[0] > 0 and high[1] < 0.98 and best[3] >= 0.5
                        for best, low, high in fits)
            (M, beta, m, _), i = fits[1][0], np.arange(v.shape[1])
            mean = v[:, :, 1].mean(0)
            curves += [(f"{name}: G", i, mean[:, 0], COLOR[name] + "."),
                       (f"{name}: fit", i, M * beta ** i + m, COLOR[name] + "-"),
                       (f"{name}: change", i, mean[:, 1], COLOR[name] + "--")]
            e.judge(kind if name == "plain" else f"{kind} {name}", holds,
                    **{f"beta_{t}": [v[1] for v in fit] for t, fit in zip(LEVELS, fits)},
                    lowest_R2=min(fit[0][3] for fit in fits), _M_beta_m_R2=fits)
        e.panel(f"{kind}, t = {LEVELS[1]}", curves, ylabel="RMS of eps")
    return e


def proposition1(subjects):
    e = Evidence("Proposition 1: patch denoising stabilises the distribution of the condition",
                 "the divergence of consecutive steps falls: the slope of its log is below 0 by "
                 "its interval over classes, in the toy at its rate log r")
    chain, i = toy_chain(0.8, spread=4.0), np.arange(19)
    w2, left = toy_proposition1(chain, len(i) + 1)
    c = torch.from_numpy(chain.sample(PARTICLES, len(i) + 1)[0])                 # (steps, n, C)
    sampled = np.sqrt(divergence(c[:-1], c[1:]))
    rate = np.log(w2[-1] / w2[5]) / (len(w2) - 6)
    e.panel("toy: linear chain, r = 0.8", [
        ("W2, closed form", i, w2, "C2-"), (f"√S of {PARTICLES} particles", i, sampled, "k."),
        ("variance left by denoising", i, left[1:], "C1--")], yscale="log")
    e.judge("toy", (np.diff(w2) < 0).all() and abs(np.exp(rate) - 0.8) < 0.02, slope_plain=rate)
    for kind, s in chained(subjects):
        d = {name: along(chain.c, chain.c, shift=1) for name, chain in s.chains().items()}
        found = {f"slope_{k}": bootstrap(v, lambda a: slope(np.log(a))) for k, v in d.items()}
        e.panel(kind, [(name, np.arange(2, 2 + v.shape[1]), v.mean(0), COLOR[name] + ".-")
                       for name, v in d.items()], ylabel="S(c_(i-1), c_i)", yscale="log")
        e.judge(kind, found["slope_plain"][2] < 0, **found)
    return e


def lemma6(subjects):
    e = Evidence("Lemma 6: the inconsistency eta_i = c_i - E[c_i | x_i] of a step is propagated to "
                 "the next, which adds its own",
                 "the share of an image's energy that recurs at the next step has an interval "
                 "within (0, 1), in the toy the recursion is exact to 1e-10")
    i = np.arange(12)
    total, carried, fresh = toy_lemma6(toy_chain(0.8, spread=4.0), len(i))
    worst = np.abs(total[1:] - carried - fresh).max()
    e.panel("toy: linear chain", [("E || eta_i ||²", i, total, "C2-"),
                                  ("propagated + injected", i[1:], carried + fresh, "k."),
                                  ("propagated", i[1:], carried, "C1--")])
    e.judge("toy", worst < 1e-10, recurs_plain=carried[-1] / total[-1])
    for kind, s in chained(subjects):
        (x, c), order = s.targets.flat(), s.order.cpu()
        revealed = InverseMap.fit(x.flatten(0, 1), order.repeat(len(x)), c.flatten(0, 1))
        curves, found = [], {}
        for name, chain in s.chains().items():
            x, c = chain.flat()
            v = (c - revealed(x, order.expand(len(x), -1))).square().sum(-1).double().numpy()
            v = v[:, 1:]                                                 # c_0 is the class alone
            # regression of the next step's energy on this one's: covariances / variances
            pairs = np.stack([v[:, :-1], v[:, 1:], v[:, :-1] ** 2, v[:, :-1] * v[:, 1:]], 1)
            found[f"recurs_{name}"] = bootstrap(pairs, lambda m: (
                m[:, 3] - m[:, 0] * m[:, 1]).sum(1) / (m[:, 2] - m[:, 0] ** 2).sum(1).clip(1e-300))
            curves.append((name, np.arange(1, 1 + v.shape[1]), v.mean(0), COLOR[name] + ".-"))
        e.panel(kind, curves, ylabel="E || c_i - T⁻¹(x_i) ||²")
        e.judge(kind, 0 < found["recurs_plain"][1] and found["recurs_plain"][2] < 1, **found)
    return e


def theorem3(subjects):
    k, closed = np.arange(K + 1), 1 / (1 + 2 * ETA)
    e = Evidence("Theorem 3: W2(P^(k), P*) <= rho^k W2(P^(0), P*), rho = 1 / (1 + 2 eta) for "
                 f"implicit steps ({closed:g} on the models), |1 - 2 eta| for explicit ones",
                 "the mean over classes of the exact W2 is within 1.05 of the bound at every k, in "
                 "the toy equal to 1e-8")
    rng, curves, worst = np.random.default_rng(0), [], 0
    x, y = 3 + 2 * rng.normal(size=(PARTICLES, 2)), rng.normal(size=(PARTICLES, 2))
    for at, (eta, implicit) in enumerate(((.25, True), (1., True), (.1, False), (.25, False))):
        w2, rho = exact_flow(x, y, eta, K, implicit), 1 / (1 + 2 * eta) if implicit else 1 - 2 * eta
        worst = max(worst, np.abs(w2 / (w2[0] * rho ** k) - 1).max())
        curves += [(f"{'implicit' if implicit else 'explicit'}, eta {eta}", k, w2 / w2[0],
                    f"C{at}."), (None, k, rho ** k, f"C{at}-")]
    e.panel("toy: exact map (lines: rho^k)", curves, "k", ylabel="W2 / W2 at k = 0", yscale="log")
    e.judge("toy", worst < 1e-8, off_the_rate=worst)
    for kind, s in chained(subjects):
        curves, N = [("rho^k", k, closed ** k, "k-")], s.plain.c.shape[2]
        for at, i in enumerate(sorted({max(1, N // 4), max(1, N // 2), N - 1})):
            clouds, target = flow(s, i)
            w2 = np.array([[exact_w2(c, y) for c, y in zip(cloud, target)] for cloud in clouds]).T
            root = np.sqrt(np.stack([divergence(cloud, target) for cloud in clouds], 1))
            real = [exact_w2(a[:target.shape[1]], y) for a, y in zip(s.unseen.c[:, :, i], target)]
            exact = exact_flow(clouds[0, 0], target[0], ETA, K)          # of class 0
            rho, rho_root = ([f[1] for f in bootstrap(v / v[:, :1], fit_decay)] for v in (w2, root))
            w2, root = w2.mean(0), root.mean(0)
            curves += [(f"W2, i = {i}", k, w2 / w2[0], f"C{at}.-"),
                       (f"√S, i = {i}", k, root / root[0], f"C{at}x:")]
            e.judge(f"{kind}, i = {i}", (w2 <= 1.05 * closed ** k * w2[0]).all(), W2_before=w2[0],
                    W2_after=w2[-1], W2_of_real_images=np.mean(real), rho_W2=rho, rho_S=rho_root,
                    rho_exact_map=(exact[-1] / exact[0]) ** (1 / K))
        e.panel(kind, curves, "k", ylabel="relative to k = 0", yscale="log")
    return e


def trajectory(subjects):
    e = Evidence("Figure 3: refinement gives a higher SNR and less noise along the reverse "
                 "trajectory",
                 "the mean over t of the SNR of x0_hat(t) against the final x0 rises, and that of "
                 "its noise intensity falls, by the intervals of the paired differences")
    curves = [], []
    for at, (kind, s) in enumerate(subjects.items()):
        v, cells, holds = {}, {}, {}
        for name in ("plain", "refined")[:1 + (s.refined is not None)]:
            ts, path = s.chains()[name].path                 # (T, B, N, D); the last x0_hat is x0
            noise = torch.stack([noise_intensity(unpatchify(x0, s.patch)) for x0 in path[:-1]])
            v[name] = torch.stack([snr(path[:-1], path[-1]), noise]).double().numpy()
            cells.update({f"SNR_{name}": v[name][0].mean(), f"noise_{name}": v[name][1].mean()})
            for lines, values in zip(curves, v[name].mean(2)):                   # (2, T - 1, B)
                lines.append((f"{kind} {name}", ts[:-1], values,
                              f"C{at}" + ("-" if name == "refined" else "--")))
        if s.refined:
            d = (v["refined"] - v["plain"]).mean(1).T                            # (B, 2)
            cells["SNR_gain"], cells["noise_gain"] = zip(*bootstrap(d, lambda m: m))
            holds = cells["SNR_gain"][1] > 0 and cells["noise_gain"][2] < 0
        e.judge(kind, holds, **cells)
    for lines, label in zip(curves, ("SNR in dB", "noise: MAD of the Laplacian")):
        if lines:
            e.panel(label, lines, "t (sampling goes left)")
    return e


def gap(subjects):
    e = Evidence("Exposure bias: conditions met in sampling leave the teacher-forced ones along "
                 "the chain, and refinement brings them back",
                 "their divergence from unseen real images, over that of two sets of real images, "
                 "mean over steps, is above 1 for the plain chain, and refinement lowers it, by "
                 "intervals over classes")
    for kind, s in chained(subjects):
        clouds = {"plain": s.plain.c, "refined": s.refined.c, "before": s.refined.before}
        floor = along(s.unseen.c, s.targets.c)                                   # (G, N - 1)
        v = {name: np.stack([along(c, s.unseen.c), along(c, s.targets.c), floor], 1)
             for name, c in clouds.items()}
        ratio, i = lambda m, q=0: m[:, q] / m[:, 2], np.arange(1, 1 + floor.shape[1])
        over = lambda name, q=0: bootstrap(v[name], lambda m: ratio(m, q).mean(1))
        both = np.concatenate([v["plain"], v["refined"]], 1)                     # (G, 6, N - 1)
        change = bootstrap(both, lambda m: (ratio(m[:, 3:]) - ratio(m[:, :3])).mean(1))
        lines = (("plain", "plain", 0, "C3.-"), ("plain, to targets", "plain", 1, "C3:"),
                 ("refined", "refined", 0, "C0.-"), ("refined, to targets", "refined", 1, "C0:"),
                 ("refined, before", "before", 0, "C0--"))
        e.panel(kind, [(name, i, ratio(v[key].mean(0, keepdims=True), q)[0], form)
                       for name, key, q, form in lines],
                ylabel="S(drawn, unseen) / S(real, real)")
        plain = over("plain")
        e.judge(kind, plain[1] > 1 and change[2] < 0, plain=plain, refined=over("refined"),
                change=change, plain_to_targets=over("plain", 1),
                refined_to_targets=over("refined", 1), _before_it_is_refined=over("before"),
                _plain_growth_per_step=bootstrap(v["plain"], lambda m: slope(ratio(m))))
    return e


def farthest(s):
    """(i, g, project): AR step and class where drawn conditions are farthest from the targets, and
    the projection of conditions (n, C) to the plane of the targets' two leading principal axes, as
    numpy (2, n)."""
    d = along(s.plain.c, s.targets.c)
    g, i = np.unravel_index(d.argmax(), d.shape)
    target = s.targets.c[g, :, i + 1]
    axes = torch.linalg.svd(target - target.mean(0), full_matrices=False)[2][:2]
    return int(i) + 1, int(g), lambda c: (axes @ (c - target.mean(0)).T).numpy()


def pca(subjects):
    e = Evidence("Refinement moves the cloud of conditions onto the ideal one, shown where the "
                 "plain chain is farthest from it",
                 "the refined cloud is nearer than the plain one to unseen teacher-forced "
                 "conditions, by S in all dimensions")
    for kind, s in chained(subjects):
        i, g, project = farthest(s)
        far = {name: divergence(chain.c[g, None, :, i], s.unseen.c[g, None, :, i])[0]
               for name, chain in (("plain", s.plain), ("refined", s.refined))}
        for name in far:
            e.panel(f"{kind}, {name}: step {i}, class {g}", [
                ("teacher-forced", *project(s.targets.c[g, :, i]), "k+"),
                (name, *project(s.chains()[name].c[g, :, i]), COLOR[name] + ".")], "first axis")
        target = s.targets.c[g, :, i]
        share = project(target).var(1).sum() / target.var(0, correction=0).sum().item()
        e.judge(kind, far["refined"] < far["plain"], S_plain=far["plain"],
                S_refined=far["refined"], variance_in_the_plane=share)
    return e


def transport(subjects):
    e = Evidence(f"Transport lines: {K} Sinkhorn steps move conditions to the targets, shown for "
                 "12 of them in the plane of `pca`",
                 "the cloud ends nearer to the targets than it began, by exact W2")
    for kind, s in chained(subjects):
        i, g, project = farthest(s)
        clouds, target = (a[..., g, :, :] for a in flow(s, i))           # (K + 1, n, C), (n, C)
        path = np.stack([project(c[:12]).T for c in clouds])             # (K + 1, 12, 2)
        e.panel(f"{kind}: step {i}, class {g}", [("targets", *project(target), "k+"),
                                                 ("before", *project(clouds[0]), "C3."),
                                                 ("after", *project(clouds[-1]), "C0.")],
                "first axis", (path[:-1].reshape(-1, 2), path[1:].reshape(-1, 2)))
        before, after = exact_w2(clouds[0], target), exact_w2(clouds[-1], target)
        moved = (clouds[-1] - clouds[0]).norm(dim=1).mean().item()
        e.judge(kind, after < before, W2_before=before, W2_after=after, mean_way=moved)
    return e


CLAIMS = {f.__name__: f for f in (theorem1, theorem2, proposition1, lemma6, theorem3, trajectory,
                                  gap, pca, transport)}


# ---------------------------------------------------------------- output

def draw(e, path):
    """The panels in a row, legends below them, as a small PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    style = {"font.size": 7.5, "axes.titlesize": 8, "lines.markersize": 3, "lines.linewidth": 1,
             "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        size = (max(5.5, 2.75 * len(e.panels)), 3.2)
        fig, axes = plt.subplots(1, len(e.panels), figsize=size, layout="constrained",
                                 squeeze=False)
        for ax, (title, curves, arrows, options) in zip(axes[0], e.panels):
            for label, x, y, form in curves:
                ax.plot(x, y, form, label=label)
            if arrows:
                start, end = arrows
                ax.quiver(*start.T, *(end - start).T, angles="xy", scale_units="xy", scale=1,
                          width=0.004, color="0.3")
            ax.set(title=title, **options)
            ax.legend(fontsize=6.5, frameon=False, ncol=2, loc="upper center",
                      bbox_to_anchor=(0.5, -0.17))
        buffer = io.BytesIO()
        fig.savefig(buffer, dpi=100)
        plt.close(fig)
    write_png(path, Image.open(buffer).convert("RGB").quantize(32))              # a third


def show(value):
    """'0.71', '0.71 [0.65, 0.80]' for an interval, 'yes', 'no' and words as they are."""
    if isinstance(value, (str, bool)):
        return {True: "yes", False: "no"}.get(value, value)
    best, *ends = (f"{float(v):.3g}" for v in np.atleast_1d(value))
    return f"{best} [{', '.join(ends)}]" if ends else best


def table(header, rows):
    lines = [header, ["---"] * len(header), *([show(v) for v in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def verdicts(e):
    """{word: {where: does it hold?}}; of rows "ar, i = 4", "ar, i = 8" all must hold for ar."""
    out = {}
    for where, _, holds in e.rows:
        for word, ok in holds.items():
            of, who = out.setdefault(word, {}), where.split(",")[0]
            of[who] = of.get(who, True) and ok
    return out


def verdict(e):
    """One sentence: where the claim holds, and where not."""
    parts = []
    for word, of in verdicts(e).items():
        yes, no = (", ".join(k for k in of if of[k] == ok) for ok in (True, False))
        what = "it" if word == "holds" else f"the {word}"
        parts += [f"{what} **holds** for {yes}"] * bool(yes)
        parts += [f"{what} **does not hold** for {no}"] * bool(no)
    return "; ".join(parts) or "nothing to judge"


def report(evidence, args, out):
    """theory.md: verdicts, then a figure, a sentence and a table a claim; theory.json: all."""
    short, pages, claims = [], [], {}
    for name, e in evidence.items():
        columns = list(dict.fromkeys(key for _, cells, _ in e.rows[::-1] for key in cells
                                     if key[0] != "_"))
        words = verdicts(e)
        for word, of in words.items():
            short.append([f"[{name}](#{name})" + f", {word}" * (len(words) > 1),
                          *(of.get(kind, "") for kind in ("toy", *KINDS))])
        rows = [[where, *(cells.get(key, "") for key in columns),
                 *(holds.get(word, "") for word in words)] for where, cells, holds in e.rows]
        said = verdict(e)
        pages.append(f"\n## {name}\n\n{fill(e.claim + '.', 120)}\n\n![{name}]({name}.png)\n\n"
                     + fill(f"{said[0].upper() + said[1:]}. (Rule: {e.rule}.)", 120) + "\n\n"
                     + table(["", *(key.replace("_", " ") for key in columns), *words], rows))
        curves = {title: [(label, x, y) for label, x, y, _ in lines]
                  for title, lines, _, _ in e.panels}
        claims[name] = {"claim": e.claim, "rule": e.rule, "verdict": said, "curves": curves,
                        "rows": {where: {**cells, **holds} for where, cells, holds in e.rows}}
    write_text(
        out / "theory.md",
        "# The paper's claims, measured\n\n" + fill(
            "Does a claim hold in a toy that meets its assumptions, and on trained models "
            f"({args.n} drawn and at most {args.m} real images of each of {args.classes} classes, "
            f"{args.steps} evaluations a patch, no guidance)? Intervals are 95 % bootstrap ones; S "
            "is the debiased Sinkhorn divergence. All numbers: theory.json, which theory.py "
            "writes.", 120)
        + "\n\n"
        + table(["claim", "toy", *KINDS], short) + "".join(pages))
    given = {k: v for k, v in vars(args).items() if not k.startswith("_")}
    write_text(out / "theory.json", json.dumps({"args": given, "claims": claims}, indent=1,
                                               default=lambda v: np.asarray(v).tolist()))


def parse_args(argv=None):
    p = Parser(description="The paper's claims in closed-form toys and on trained models.")
    for kind in KINDS:
        p.add_argument(f"--{kind}", metavar="RUN", help=f"checkpoint or run of a {kind} model")
    p.add_argument("--claims", nargs="+", choices=CLAIMS, default=list(CLAIMS), help="which")
    p.add_argument("--out_dir", default="out/theory", help="pictures, theory.md, theory.json")
    for name, low, value, text in (
            ("n", 4, 50, "images drawn of each class"),
            ("m", 4, 100, "real images of each class and split, at most"),
            ("classes", 2, 10, "the first so many, at most"),
            ("steps", 2, 25, "evaluations of the head per patch"),
            ("n_cal", 1, 200, "images that calibrate a class"),
            ("seed", 0, 0, "of the images drawn")):
        p.add_argument(f"--{name}", type=number(int, low), default=value, help=text)
    p.add_argument("--data_dir", help="where the images are now (default: as in training)")
    p.add_argument("--vae", help="kl16.ckpt, for models of latents")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda ...")
    return p.parse_args(argv)


def main(argv=None):
    args, began, evidence = parse_args(argv), time.time(), {}
    for kind in KINDS:
        if not getattr(args, kind):
            print(f"{kind:12} skipped: no --{kind} given")
    out = output_folder(args.out_dir)
    if args.cdm and not {"theorem1", "trajectory"} & set(args.claims):
        raise ValueError(f"--cdm would change nothing: {', '.join(args.claims)} are about chains")
    subjects = {kind: observe(kind, args) for kind in KINDS if getattr(args, kind)}
    args.check_used("claims")                            # without a model most flags do nothing
    for name in args.claims:
        since, e = time.time(), CLAIMS[name](subjects)
        if not e.panels:
            print(f"{name:12} left out: it has no toy, and no model with a chain was given")
            continue
        draw(e, out / f"{name}.png")
        evidence[name] = e
        print(f"{name:12} {time.time() - since:5.1f} s  {verdict(e)}", flush=True)
    report(evidence, args, out)
    print(f"{time.time() - began:.0f} s in all -> {out / 'theory.md'}, {out / 'theory.json'}")


if __name__ == "__main__":
    run(main)
