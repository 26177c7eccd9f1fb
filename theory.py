"""The paper's claims, each tested twice: in a closed-form toy whose assumptions hold exactly, and on trained models.

    python evaluate.py theory --ar out/gpt --mar out/mar --cdm out/cdm       any of the three may be absent
    -> out/theory/<claim>.png, theory.md (pictures and captions), theory.json (all numbers)

A caption says what was measured, with 95 % bootstrap intervals, and whether the claim holds there, by a rule that is
stated with it: `Evidence.judge` is the only place that writes "holds" or "DOES NOT HOLD".

Reading order: statistics, toys (numpy, float64), what is observed of a model, the claims, output. Scores are given as
eps = -sigma_t score, per dimension, so that noise levels compare.
Zhou, Li, Shen: Condition Errors Refinement in Autoregressive Image Generation with Diffusion Loss, ICLR 2026.
"""
import io
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import ot
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.linalg import solve_discrete_lyapunov
from scipy.optimize import linear_sum_assignment

import data as datasets
from data import Parser, number, unpatchify
from diffloss import ImageNoise, Sampler, Schedule
from model import KINDS, amp, load_model, pick_device, set_threads
from ot_refine import METHODS, RefineConfig, Refiner, energy, jko_step
from sample import Drawer, Recipe, reference_tokens

LEVELS = (50, 200, 400, 700)                     # noise levels t at which scores are compared
K, ETA = 8, 0.5                                  # the flow of Theorem 3; closed form rho = 1 / (1 + 2 ETA) = 0.5


# ---------------------------------------------------------------- statistics

def fit_decay(G, levels=4):
    """Least squares of curves G (R, N) by M beta^i + m, i = 0 .. N-1, 0 < beta < 1 -> columns M, beta, m, R^2 (R, 4).

    For a given beta it is a linear regression, whose R^2 is a squared correlation: so search beta alone, on a grid that
    is refined around its best point, for all curves at once (bootstrap). A constant curve has M = 0 and R^2 = 0.
    """
    G = np.asarray(G, dtype=np.float64)
    i, mean = np.arange(G.shape[1]), G.mean(1, keepdims=True)
    total = ((G - mean) ** 2).sum(1)
    flat = total <= 1e-24 * (1e-300 + mean[:, 0] ** 2)
    low, high = np.full((len(G), 1), 1e-3), np.full((len(G), 1), 1 - 1e-3)
    for _ in range(levels):
        beta = low + (high - low) * np.linspace(0, 1, 41)                               # (R, 41)
        basis = beta[..., None] ** i                                                    # (R, 41, N)
        centred = basis - basis.mean(-1, keepdims=True)
        dot = np.einsum("rbn,rn->rb", centred, G - mean)
        best = (dot ** 2 / (centred ** 2).sum(-1)).argmax(1)[:, None]
        pick = lambda a: np.take_along_axis(a, best, 1)[:, 0]
        step, at = (high - low) / 40, pick(beta)[:, None]
        low, high = np.maximum(at - step, 1e-3), np.minimum(at + step, 1 - 1e-3)
    scale = pick(dot) / pick((centred ** 2).sum(-1))
    r2 = np.where(flat, 0, pick(dot) * scale / np.where(flat, 1, total))
    scale = np.where(flat, 0, scale)
    return np.stack([scale, pick(beta), mean[:, 0] - scale * pick(basis.mean(-1)), r2], 1)


def slope(G):
    """Least-squares slope (R,) of curves G (R, N) against i."""
    i = np.arange(G.shape[1]) - (G.shape[1] - 1) / 2
    return G @ i / (i @ i)


def bootstrap(values, statistic, n_boot, seed=0):
    """statistic(mean of values over axis 0) with its 95 % percentile interval: three arrays (estimate, low, high).

    values (n, ...): one entry per image (or class), resampled with replacement. statistic: means (R, ...) -> (R, ...).
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    share = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), n_boot) / n   # (n_boot, n)
    boot = statistic((share @ values.reshape(n, -1)).reshape(n_boot, *values.shape[1:]))
    return statistic(values.mean(0)[None])[0], *np.quantile(boot, [0.025, 0.975], axis=0)


def show(interval):
    """'0.71 [0.65, 0.80]'."""
    return "{:.3g} [{:.3g}, {:.3g}]".format(*map(float, interval))


# ---------------------------------------------------------------- toys

def toy_theorem1(ts):
    """L_cond, L_uncond, eps_c (len(ts), 3) of the linear model s(x_t) = a x_t + b; c is the component of a 1-d mixture.

    p_t(x_t | c = k) = N(m_k, v_k) with m_k = alpha mu_k, v_k = alpha^2 s_k^2 + sigma^2. L_cond integrates a parabola
    under Gaussians: closed form. The other two integrate smooth functions that vanish at both ends, where the
    trapezoid rule is exact to rounding; that L_cond = L_uncond + eps_c is thus a check of two ways to compute it.
    """
    share, mu, std = np.array([0.5, 0.3, 0.2]), np.array([-2.0, 0.5, 2.5]), np.array([0.4, 0.7, 0.5])
    x, schedule, out = np.linspace(-14, 14, 20_001)[:, None], Schedule(), []            # (X, 1)
    for t in ts:
        mean, var = schedule.alpha[t] * mu, schedule.alpha[t] ** 2 * std ** 2 + schedule.sigma[t] ** 2
        centre = share @ mean
        a = -1 / (share @ (var + (mean - centre) ** 2))                                 # the Gaussian fit of p_t
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
    """c_{i+1} = A c_i + b + N(0, Q), patch x_i = H c_i + N(0, R), c_0 ~ N(mean, cov).

    A chain that feeds its patches back, c_{i+1} = F c_i + B x_i + w, is of this form with A = F + B H.
    """
    A: np.ndarray
    b: np.ndarray
    Q: np.ndarray
    H: np.ndarray
    R: np.ndarray
    mean: np.ndarray
    cov: np.ndarray

    def stationary(self):
        """Mean (C,) and covariance (C, C) that the chain forgets its start for."""
        return np.linalg.solve(np.eye(len(self.b)) - self.A, self.b), solve_discrete_lyapunov(self.A, self.Q)

    def moments(self, steps):
        """[(mean, covariance) of c_i], i = 0 .. steps-1."""
        out = [(self.mean, self.cov)]
        for _ in range(steps - 1):
            out.append((self.A @ out[-1][0] + self.b, self.A @ out[-1][1] @ self.A.T + self.Q))
        return out

    def gain(self, cov):
        """The regression of c on x, E[c | x] = E c + gain (x - E x), at covariance `cov` of c."""
        return cov @ self.H.T @ np.linalg.inv(self.H @ cov @ self.H.T + self.R)

    def sample(self, n, steps, seed=0):
        """c and x (steps, n, C)."""
        rng = np.random.default_rng(seed)
        draw = lambda cov: rng.multivariate_normal(np.zeros(len(cov)), cov, n)
        c = [self.mean + draw(self.cov)]
        for _ in range(steps - 1):
            c.append(c[-1] @ self.A.T + self.b + draw(self.Q))
        return np.stack(c), np.stack([ci @ self.H.T + draw(self.R) for ci in c])


def toy_chain(r, dim=4, normal=True, spread=1.0, seed=0):
    """A LinearChain of spectral radius r that starts 5 away from its stationary mean, with `spread` times its covariance.

    normal: A is r times a rotation, so that every direction decays at exactly r; else A is any matrix of that radius.
    """
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(dim, dim))
    A = r * np.linalg.qr(A)[0] if normal else r * A / np.abs(np.linalg.eigvals(A)).max()
    eye, away = np.eye(dim), rng.normal(size=dim)
    chain = LinearChain(A, rng.normal(size=dim), 0.09 * eye, eye, 0.25 * eye, np.zeros(dim), eye)
    mean, cov = chain.stationary()
    chain.mean, chain.cov = mean + 5 * away / np.linalg.norm(away), spread * cov
    return chain


def toy_theorem2(chain, steps, t):
    """E || grad log p_t(x_t | c_i) ||^2 (steps,) at an x_t that does not follow c_i, and (a number) at one that does.

    The score is V^-1 (alpha H c_i - x_t), V = alpha^2 R + sigma^2. With x_t from the stationary marginal, independent
    of c_i, the mean of c_i enters as || alpha V^-1 H A^i d ||^2: for A = r x rotation exactly M r^(2i) + m. With
    x_t ~ p_t(. | c_i) it is tr V^-1 at every i: nothing decays.
    """
    alpha, sigma = Schedule().alpha[t], Schedule().sigma[t]
    V = alpha ** 2 * chain.R + sigma ** 2 * np.eye(len(chain.R))
    inverse, (centre, cov) = np.linalg.inv(V), chain.stationary()
    spread = alpha ** 2 * chain.H @ cov @ chain.H.T + V                                 # of x_t
    out = [np.sum((alpha * inverse @ chain.H @ (m - centre)) ** 2)
           + np.trace(inverse @ (alpha ** 2 * chain.H @ P @ chain.H.T + spread) @ inverse) for m, P in chain.moments(steps)]
    return np.array(out), np.trace(inverse)


def gaussian_w2(mean1, cov1, mean2, cov2):
    """W2 between two Gaussians (Bures): a float."""
    def root(S):
        w, q = np.linalg.eigh(S)
        return (q * np.sqrt(np.clip(w, 0, None))) @ q.T
    cross = np.linalg.svd(root(cov1) @ root(cov2), compute_uv=False).sum()
    return np.sqrt(max(0.0, np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * cross))


def toy_proposition1(chain, steps):
    """W2 between c_i and c_{i+1} (steps - 1,), and what denoising patch i leaves of c_i: tr Cov(c | x) / tr Cov(c) (steps,)."""
    moments = chain.moments(steps)
    w2 = [gaussian_w2(*a, *b) for a, b in zip(moments, moments[1:])]
    left = [1 - np.trace(chain.gain(P) @ chain.H @ P) / np.trace(P) for _, P in moments]
    return np.array(w2), np.array(left)


def toy_lemma6(chain, steps):
    """Energy E || eta_i ||^2 = tr Cov(c_i | x_i) (steps,) and its recursion: propagated and injected (steps - 1,).

    eta_i = c_i - E[c_i | x_i] is orthogonal to c_i* = E[c_i | x_i], so with J = I - gain H at step i+1
    eta_{i+1} = J A eta_i (propagated) + J A (c_i* - mean) + J w - gain v (injected), all four uncorrelated.
    """
    covs, out, propagated, injected = [P for _, P in chain.moments(steps)], [], [], []
    left = lambda P: P - chain.gain(P) @ chain.H @ P                                    # Cov(c | x)
    for P, after in zip(covs, covs[1:] + [None]):
        out.append(np.trace(left(P)))
        if after is not None:
            gain = chain.gain(after)
            J = np.eye(len(P)) - gain @ chain.H
            fresh = J @ (chain.A @ (P - left(P)) @ chain.A.T + chain.Q) @ J.T + gain @ chain.R @ gain.T
            propagated.append(np.trace(J @ chain.A @ left(P) @ chain.A.T @ J.T))
            injected.append(np.trace(fresh))
    return np.array(out), np.array(propagated), np.array(injected)


def exact_flow(x, y, eta, steps, implicit=True):
    """W2 (steps + 1,) of particles x (n, C) to y (n, C) along JKO steps with the exact optimal map, a permutation."""
    x, y, out = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64), []
    for _ in range(steps + 1):
        cost = ot.dist(x, y)                                                            # (n, n) squared distances
        row, col = linear_sum_assignment(cost)
        out.append(np.sqrt(cost[row, col].mean()))
        x = jko_step(x, y[col], eta, implicit=implicit)
    return np.array(out)


# ---------------------------------------------------------------- what is observed of a trained model

@dataclass
class Chain:
    """n images of each of G classes in the order of generation: tokens x (G, n, N, D), conditions c (G, n, N, C).

    A cdm has one "patch", the image: N = 1. path: t's and x0_hat(t) (T, G n, N, D) of the trajectories, in space order.
    """
    x: torch.Tensor
    c: torch.Tensor
    path: tuple | None = None

    def flat(self):
        return self.x.flatten(0, 1), self.c.flatten(0, 1)


@dataclass
class Subject:
    """A trained model, real images seen through it (`reference`: --ref_split, `other`: the other split), and its own."""
    kind: str
    model: torch.nn.Module
    order: torch.Tensor                          # (N,) the position of the i-th patch
    patch: int
    reference: Chain
    other: Chain
    plain: Chain
    refined: Chain | None = None

    def chains(self):
        """{name: Chain} of what is compared along the chain: real images of the other split, drawn, drawn refined."""
        found = {"real": self.other, "plain": self.plain, "refined": self.refined}
        return {name: chain for name, chain in found.items() if chain is not None}


@dataclass(frozen=True)
class Traced(Sampler):
    """A Sampler that keeps the trace of every call in `log`: one list of (t, x_t, x0_hat) per AR step."""
    log: list = field(default_factory=list)

    def __call__(self, denoise, noise, steps=None, trace=None):
        self.log.append([])
        return super().__call__(denoise, noise, steps, self.log[-1])


def as_chain(kind, x, c, groups, path=None):
    """Lists of x (B, N, D) and c (B, N, C), sorted by class -> Chain on the CPU; a cdm's image becomes one patch."""
    x, c = (torch.cat(parts).float().cpu() for parts in (x, c))
    if kind == "cdm":
        x, c = x.flatten(1)[:, None], c[:, :1]
    return Chain(x.unflatten(0, (groups, -1)), c.unflatten(0, (groups, -1)), path)


@torch.no_grad()
def teacher_forced(model, tokens_of, classes, m, order):
    """Chain of real images: as many of each class as the smallest class has, at most m."""
    tokens = [tokens_of(y, m) for y in classes]
    m, xs, cs = min(len(x) for x in tokens), [], []
    if m < 2:
        raise ValueError(f"a class has {m} real images; the theory checks need at least 2 of each class and split")
    for y, x in zip(classes, tokens):
        x, labels = x[:m].to(order.device), torch.full((m,), y, device=order.device)
        options = {"order": order.expand(m, -1)} if model.cfg.kind == "mar" else {}
        with amp(order.device):
            cs.append(model.conditions(x, labels, **options)[:, order])
        xs.append(x[:, order])
    return as_chain(model.cfg.kind, xs, cs, len(classes))


@torch.no_grad()
def drawn(model, classes, n, sampler, order, seed, refiner=None, batch=500):
    """Chain of n images of each class; with a calibrated Refiner the conditions are the refined ones."""
    number, xs, cs, paths = torch.arange(len(classes)).repeat_interleave(n), [], [], []
    for index in torch.arange(len(number)).split(batch):
        group, seen, traced = number[index].to(order.device), [], Traced(**vars(sampler))
        refine = refiner.bind(group) if refiner is not None else lambda i, c, inverse: c

        def watch(i, c, inverse):
            seen.append(refine(i, c, inverse))
            return seen[-1]

        options = {"cdm": {}, "ar": {"refine": watch}, "mar": {"refine": watch, "order": order.expand(len(index), -1)}}
        y = torch.tensor(list(classes), device=order.device)[group]
        with amp(order.device):
            x = model.generate(y, ImageNoise(seed, index.tolist(), order.device), traced, **options[model.cfg.kind])
            cs.append(torch.cat(seen, 1) if seen else model.conditions(x, y))
        path = torch.cat([torch.stack([x0 for _, _, x0 in log]) for log in traced.log], 2)      # (T, B, N, D)
        xs.append(x[:, order])
        paths.append(path[:, :, order.argsort()].float().cpu())
    return as_chain(model.cfg.kind, xs, cs, len(classes), ([t for t, _, _ in traced.log[0]], torch.cat(paths, 1)))


def observe(kind, run_dir, args):
    """The Subject of a checkpoint; ValueError if it is of another kind. A mar model runs one token per step in one
    order, so that for it too an AR step is a patch."""
    began = time.time()
    model, state = load_model(run_dir, pick_device(args.device))
    set_threads(model, pick_device(args.device))
    if model.cfg.kind != kind:
        raise ValueError(f"--{kind} {run_dir} holds a model of kind {model.cfg.kind}; give it as --{model.cfg.kind}")
    facts = state["data"]
    classes = range(min(args.classes, len(facts["class_names"])))
    if len(classes) < 2:
        raise ValueError(f"--{kind} {run_dir} knows one class; at least 2 are needed, as intervals are taken over classes")
    tokens_of = {split: reference_tokens(facts, split, args.data_dir) for split in ("train", "heldout")}
    sampler = Sampler(steps=args.steps, x0_bound=facts["x0_bound"])
    recipe = Recipe(sampler, cfg_scale=1.0, refine=RefineConfig(method="none" if kind == "cdm" else args.refine), orders=int(kind == "mar"),
                    m=args.m, ref_split=args.ref_split, n_cal=args.n_cal)
    drawer = Drawer(model, recipe, classes)
    order = (torch.arange(model.cfg.n_tokens) if drawer.pool is None else drawer.pool[0]).to(drawer.device)
    real = {split: teacher_forced(model, tokens, classes, args.m, order) for split, tokens in tokens_of.items()}
    s = Subject(kind, model, order, facts["patch"], real.pop(args.ref_split), *real.values(),
                drawn(model, classes, args.n, sampler, order, args.seed))
    if recipe.refined:
        drawer.calibrate(tokens_of[args.ref_split])
        s.refined = drawn(model, classes, args.n, sampler, order, args.seed, drawer.refiner)
    print(f"{kind:12} {time.time() - began:5.1f} s  {run_dir}, step {state['step']}: {len(classes)} classes x {args.n} images", flush=True)
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


def noised(s, x, seed):
    """Yields i, t, x_t (B, D) float64 = alpha x_i + sigma noise, alpha, sigma, and a permutation of the images, for x (B, N, D)."""
    generator = torch.Generator().manual_seed(seed)
    for i in range(x.shape[1]):
        for t in LEVELS:
            alpha, sigma = s.model.diffloss.alpha[t].item(), s.model.diffloss.sigma[t].item()
            noise = torch.randn(len(x), x.shape[2], generator=generator, dtype=torch.float64)
            yield i, t, alpha * x[:, i] + sigma * noise, alpha, sigma, torch.randperm(len(x), generator=generator)


def condition_errors(s, n, seed):
    """Squared errors of eps (B, N, T, 5) of n images per class: model against conditional, model against marginal,
    the same two for the model under another image's condition ("blind" to c), conditional against marginal = eps_c.

    The world is the reference set, so both true scores are softmaxes over its patches: the marginal one over all at
    position i, the conditional one over those whose images have the same class and the same earlier patches.
    """
    (x, c), (G, m), sq = s.reference.flat(), s.reference.x.shape[:2], lambda a, b: (a - b).square().mean(-1)
    x, rows = x.double(), torch.arange(G * m).view(G, m)[:, :n].flatten()
    same, out = rows[:, None] // m == torch.arange(G * m) // m, []                      # (B, P): equal contexts
    for i, t, x_t, alpha, sigma, shuffle in noised(s, x[rows], seed):
        if i > 0 and t == LEVELS[0]:
            same &= (x[rows, None, i - 1] == x[None, :, i - 1]).all(-1)
        logits = -torch.cdist(x_t, alpha * x[:, i]).square() / (2 * sigma ** 2)         # (B, P)
        true = lambda logits: (x_t - alpha * logits.softmax(1) @ x[:, i]) / sigma
        cond, marginal = true(logits.masked_fill(~same, -torch.inf)), true(logits)
        own, blind = eps_theta(s, x_t, t, c[rows, i]), eps_theta(s, x_t, t, c[rows[shuffle], i])
        out.append(torch.stack([sq(own, cond), sq(own, marginal), sq(blind, cond), sq(blind, marginal), sq(cond, marginal)], 1))
    return torch.stack(out, 1).unflatten(1, (-1, len(LEVELS))).numpy()


def condition_influence(s, chain, seed):
    """RMS of eps(x_t, t, c_i) and of its change when c_i is another image's: (B, N, T, 2), x_t noised from x_i."""
    (x, c), out = chain.flat(), []
    for i, t, x_t, _, _, shuffle in noised(s, x, seed):
        own = eps_theta(s, x_t, t, c[:, i])
        out.append(torch.stack([own, own - eps_theta(s, x_t, t, c[shuffle, i])], 1).square().mean(-1).sqrt())
    return torch.stack(out, 1).unflatten(1, (-1, len(LEVELS))).numpy()


def divergence(x, y):
    """Debiased Sinkhorn divergence (G,) of clouds x (G, n, C), y (G, m, C), cut to one size as its bias depends on it."""
    n = min(x.shape[1], y.shape[1])
    return energy(x[:, :n].double(), y[:, :n].double(), 0.05, n_iter=1000, tol=1e-3).clamp_min(1e-12).numpy()


def along(a, b, shift=0):
    """divergence (G, N - 1 - shift) of conditions of chain a at step i from those of b at i - shift; c_0 is one point: left out."""
    return np.stack([divergence(a.c[:, :, i], b.c[:, :, i - shift]) for i in range(1 + shift, a.c.shape[2])], 1)


def flow(s, i):
    """Clouds (K + 1, G, n, C) of the refiner's Sinkhorn flow at AR step i from drawn conditions to targets (G, n, C), the
    same number of both, so that an exact map could bring W2 to 0."""
    n = min(s.plain.c.shape[1], s.reference.c.shape[1])
    c, target = s.plain.c[:, :n, i], s.reference.c[:, :n, i]
    refiner = Refiner([None] * i + [target[:, None]], RefineConfig(method="sinkhorn", K=K, eta=ETA, rank=0, n_iter=1000, min_particles=1))
    refiner.trace = []
    last = refiner.bind(torch.arange(len(c)).repeat_interleave(n), coupled=True)(i, c.flatten(0, 1)[:, None])
    return torch.stack([note["c"] for note in refiner.trace] + [last.view_as(c)]), target


def exact_w2(x, y):
    """W2 between uniform clouds x (n, C) and y (m, C), by linear programming."""
    return ot.emd2([], [], ot.dist(x.double().numpy(), y.double().numpy())) ** 0.5


def snr(x0_hat, x0):
    """10 log10( |x0|^2 / |x0_hat - x0|^2 ) in dB (T, B) of x0_hat (T, B, ...) against x0 (B, ...)."""
    return 10 * torch.log10(x0.square().flatten(1).sum(-1) / (x0_hat - x0).square().flatten(2).sum(-1).clamp_min(1e-9))


def noise_intensity(images):
    """Noise level (B,) of images (B, ch, H, W): median absolute deviation of the Laplacian, scaled so that white noise
    of standard deviation s gives s."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    lap = F.conv2d(images.flatten(0, 1)[:, None], kernel).view(len(images), -1)
    deviation = (lap - lap.median(1, keepdim=True).values).abs().median(1).values
    return deviation / (0.6745 * 20 ** 0.5)                                             # 20 = sum of the squared weights


# ---------------------------------------------------------------- the claims: (subjects {kind: Subject}, args) -> Evidence

@dataclass
class Evidence:
    """What is shown of one claim: panels to draw, sentences, numbers, and where it holds."""
    name: str
    claim: str
    rule: str
    panels: list = field(default_factory=list)
    text: list = field(default_factory=list)
    holds: dict = field(default_factory=dict)
    numbers: dict = field(default_factory=dict)

    def panel(self, title, curves, arrows=None, **axes):
        """curves: [(label, x, y, format)]; arrows: (start (n, 2), end (n, 2)); axes: what ax.set takes."""
        self.panels.append((title, curves, arrows, axes))

    def judge(self, where, holds, text, **numbers):
        self.holds[where], self.numbers[where] = bool(holds), numbers
        self.text.append(f"**{where}**: {text} Here it {VERDICT[bool(holds)]}.")

    @property
    def caption(self):
        return " ".join([f"{self.claim} It counts as holding if {self.rule}.", *self.text])


VERDICT = {True: "holds", False: "DOES NOT HOLD"}
COLOR = {"real": "k", "plain": "C3", "refined": "C0"}


def listed(numbers, key):
    """'real 1.2 [1.1, 1.3], plain ...' of numbers {name: {key: interval}}."""
    return ", ".join(f"{name} {show(v[key])}" for name, v in numbers.items())


def theorem1(subjects, args):
    e = Evidence("theorem1", "Theorem 1: L_cond(s) = L_uncond(s) + eps_c with eps_c >= 0 for every model s, hence L_cond bounds L_uncond.",
                 "the interval of L_cond - L_uncond is above 0 (bound), that of the residual contains 0 (identity); toy: to 1e-10")
    ts = np.arange(0, 1000, 20)
    L = toy_theorem1(ts) * Schedule().sigma[ts, None] ** 2
    worst = np.abs(L[:, 0] - L[:, 1] - L[:, 2]).max()
    e.panel("toy: 1-d mixture", [("L_cond", ts, L[:, 0], "C3-"), ("L_uncond", ts, L[:, 1], "C0-"), ("eps_c", ts, L[:, 2], "C2-"),
                                 ("L_uncond + eps_c", ts[::5], (L[:, 1] + L[:, 2])[::5], "k.")], xlabel="t", ylabel="squared error of eps")
    e.judge("toy", worst < 1e-10 and (L[:, 0] >= L[:, 1]).all(), f"a linear model of a Gaussian mixture; largest residual over t {worst:.1e}. "
            "The proof needs a model that cannot see c: the conditional score itself has L_cond = 0 and L_uncond = eps_c.",
            t=ts, L_cond=L[:, 0], L_uncond=L[:, 1], eps_c=L[:, 2], residual=worst)
    for kind, s in subjects.items():
        v = condition_errors(s, args.n, args.seed)                                      # (B, N, T, 5)
        # a cdm has one step: show its noise levels instead
        mean, i, axis, other = v.mean((0, 2)), np.arange(v.shape[1]), "AR step i", "t"
        if kind == "cdm":
            mean, i, axis, other = v.mean((0, 1)), LEVELS, "t", "images"
        e.panel(kind, [("L_cond", i, mean[:, 0], "C3.-"), ("L_uncond", i, mean[:, 1], "C0.-"), ("eps_c", i, mean[:, 4], "C2.-"),
                       ("blind L_cond", i, mean[:, 2], "C1x"), ("blind L_uncond + eps_c", i, mean[:, 3] + mean[:, 4], "k:")],
                xlabel=axis, ylabel=f"squared error of eps, mean over {other}")
        for at, who in ((0, kind), (2, f"{kind}, blind")):
            gap = bootstrap(v.mean((1, 2)), lambda a: a[:, at] - a[:, at + 1], args.n_boot)
            rest = bootstrap(v.mean((1, 2)), lambda a: (a[:, at] - a[:, at + 1] - a[:, 4]) / a[:, 4], args.n_boot)
            share = ((v[..., at] - v[..., at + 1]).mean(0) > 0).mean()
            e.judge(f"{who}: bound", gap[1] > 0, f"L_cond - L_uncond = {show(gap)}, positive at {share:.0%} of the steps and noise "
                    "levels.", difference=gap, L_cond=v[..., at].mean(0), L_uncond=v[..., at + 1].mean(0), eps_c=v[..., 4].mean(0), t=LEVELS)
            e.judge(f"{who}: identity", rest[1] <= 0 <= rest[2], f"(L_cond - L_uncond - eps_c) / eps_c = {show(rest)}"
                    + (", under another image's condition, so that the model cannot see c" if at else "")
                    + (" (wider than 0.5: too few images to tell)." if rest[2] - rest[1] > 0.5 else "."), residual_over_eps_c=rest)
    return e


def theorem2(subjects, args):
    e = Evidence("theorem2", "Theorem 2: || grad log p_t(x_t given c_i) || <= M beta^i + m with 0 < beta < 1. (M = 0 and a large m bound any "
                 "finite chain; what is tested is the decay.)", "at every t the intervals have M > 0 and beta < 0.98, and R^2 >= 0.5; toy: "
                 "the fit gives the spectral radius r to 1e-4")
    curves, fitted, general, radii, i = [], [], [], (0.5, 0.7, 0.9), np.arange(24)
    for at, r in enumerate(radii):
        G, _ = toy_theorem2(toy_chain(r), len(i), 400)
        (M, square, m, _), *_ = fit_decay(G[None])                                      # squared norm: beta^2
        fitted.append(square ** 0.5)
        general.append(fit_decay(toy_theorem2(toy_chain(r, normal=False), len(i), 400)[0][None])[0, 1] ** 0.5)
        curves += [(f"r = {r}", i, G, f"C{at}."), (f"fit: {fitted[-1]:.4f}", i, M * square ** i + m, f"C{at}-")]
    e.panel("toy: linear chain", curves, xlabel="AR step i", ylabel="E || score ||²")
    e.judge("toy", np.abs(np.subtract(fitted, radii)).max() < 1e-4, "linear chain c_i, x Gaussian given c: fitted beta "
            f"{', '.join(f'{b:.4f}' for b in fitted)} for r = .5, .7, .9 (A normal; {', '.join(f'{b:.2f}' for b in general)} if not). This is "
            "at an x_t that does not follow c_i; at x_t ~ p_t(. given c_i) the squared norm is tr V^-1 at every i and nothing decays.",
            r=radii, fitted=fitted, fitted_not_normal=general)
    for kind, s in chained(subjects):
        curves, numbers, met, words = [], {}, {}, []
        for name, chain in s.chains().items():
            v = condition_influence(s, chain, args.seed)                                # (B, N, T, 2)
            fits = [[bootstrap(v[:, :, at, q], fit_decay, args.n_boot) for q in (0, 1)] for at in range(len(LEVELS))]
            met[name] = all(low[0] > 0 and high[1] < 0.98 and best[3] >= 0.5 for (best, low, high), _ in fits)
            numbers[name] = {"t": LEVELS, "G": v[..., 0].mean(0).T, "influence": v[..., 1].mean(0).T, "M_beta_m_R2": [f for f, _ in fits],
                             "influence_M_beta_m_R2": [f for _, f in fits]}
            M, beta, m, _ = fits[1][0][0]
            i, mean = np.arange(v.shape[1]), v[:, :, 1].mean(0)
            curves += [(f"{name}: G", i, mean[:, 0], COLOR[name] + "."), (None, i, M * beta ** i + m, COLOR[name] + "-"),
                       (f"{name}: change", i, mean[:, 1], COLOR[name] + "--")]
            described = lambda fit: f"beta {show(f[1] for f in fit)}, M {show(f[0] for f in fit)}, m {fit[0][2]:.3g}, R^2 {fit[0][3]:.2f}"
            words += [f"{name}, t = {t}: {described(fits[at][0])}" for at, t in enumerate(LEVELS) if name != "real" and at in (1, 2)]
        e.panel(f"{kind}, t = {LEVELS[1]}", curves, xlabel="AR step i", ylabel="RMS of eps")
        change, by = numbers["plain"]["influence_M_beta_m_R2"][1], ", ".join(name for name, ok in met.items() if ok)
        e.judge(kind, met["plain"], "G(i, t) = RMS of the model's eps under c_i at x_t noised from patch i. " + "; ".join(words) + ". Change "
                f"of eps if c_i is another image's (dashed), plain, t = {LEVELS[1]}: {described(change)}. Rule met by: {by or 'none'}.",
                **numbers)
    return e


def proposition1(subjects, args):
    e = Evidence("proposition1", "Proposition 1: patch denoising stabilises the distribution of the condition.",
                 "the distance between consecutive steps falls, with a slope of its log below 0 by the interval; toy: at every step, at rate r")
    chain, i, n = toy_chain(0.8, spread=4.0), np.arange(19), args.toy_particles
    w2, left = toy_proposition1(chain, len(i) + 1)
    c = torch.from_numpy(chain.sample(n, len(i) + 1)[0])                                # (steps, n, C)
    sampled = np.sqrt(divergence(c[:-1], c[1:]))
    rate = np.exp(slope(np.log(w2[None, 5:])))[0]
    e.panel("toy: linear chain, r = 0.8", [("W2, closed form", i, w2, "C2-"), (f"√S_reg of {n} particles", i, sampled, "k.")],
            xlabel="AR step i", ylabel="distance of c_i and c_(i+1)", yscale="log")
    e.judge("toy", (np.diff(w2) < 0).all() and abs(rate - 0.8) < 0.02 and (left < 1).all(), "jointly Gaussian (x, c): W2 falls by a factor "
            f"{rate:.3f} per step (r = 0.8), and denoising a patch leaves {left[0]:.0%} (first) to {left[-1]:.0%} (last) of the variance "
            "of its condition.", w2=w2, sampled=sampled, rate=rate, variance_left=left)
    for kind, s in chained(subjects):
        d = {name: along(chain, chain, shift=1) for name, chain in s.chains().items()}  # (G, N - 2)
        numbers = {name: {"divergence": v.mean(0), "slope": bootstrap(v, lambda a: slope(np.log(a)), args.n_boot)} for name, v in d.items()}
        e.panel(kind, [(name, np.arange(2, 2 + v.shape[1]), v.mean(0), COLOR[name] + ".-") for name, v in d.items()],
                xlabel="AR step i", ylabel="S_reg(c_(i-1), c_i)", yscale="log")
        e.judge(kind, numbers["plain"]["slope"][2] < 0, "debiased Sinkhorn divergence of consecutive steps within a class (intervals over "
                f"classes); slope of its log per step: {listed(numbers, 'slope')}.", **numbers)
    return e


def lemma6(subjects, args):
    e = Evidence("lemma6", "Lemma 6: the inconsistency eta_i = c_i - E[c_i given x_i] of one step is propagated to the next, which adds its "
                 "own.", "the share of an image's energy that recurs at the next step has an interval within (0, 1); toy: recursion to 1e-10")
    chain, i = toy_chain(0.8, spread=4.0), np.arange(12)
    total, carried, fresh = toy_lemma6(chain, len(i))
    worst = np.abs(total[1:] - carried - fresh).max()
    e.panel("toy: linear chain", [("E || eta_i ||²", i, total, "C2-"), ("propagated + injected", i[1:], carried + fresh, "k."),
                                  ("propagated", i[1:], carried, "C1--")], xlabel="AR step i", ylabel="energy")
    e.judge("toy", worst < 1e-10, f"propagated + injected energy equals tr Cov(c_i given x_i) to {worst:.1e}; in the end "
            f"{carried[-1] / total[-1]:.0%} is propagated.", energy=total, propagated=carried, injected=fresh)
    for kind, s in chained(subjects):
        if not s.model.cfg.inverse:
            print(f"lemma6       {kind} left out: it was trained without T^-1")
            continue
        curves, numbers = [], {}
        for name, chain in s.chains().items():
            x, c = chain.flat()
            with torch.no_grad():
                ideal = s.model.inverse(x.to(s.order.device), s.order.expand(len(x), -1)).cpu()
            v = (c - ideal).square().sum(-1).double().numpy()[:, 1:]                    # (B, N - 1): c_0 is the class alone
            # regression of the next step's energy on this one's over images: sum of covariances / sum of variances
            pairs = np.stack([v[:, :-1], v[:, 1:], v[:, :-1] ** 2, v[:, :-1] * v[:, 1:]], 1)
            share = lambda m: (m[:, 3] - m[:, 0] * m[:, 1]).sum(1) / (m[:, 2] - m[:, 0] ** 2).sum(1).clip(1e-300)
            numbers[name] = {"by_step": v.mean(0), "energy": bootstrap(v, lambda m: m.mean(1), args.n_boot),
                             "recurs": bootstrap(pairs, share, args.n_boot)}
            curves.append((name, np.arange(1, 1 + v.shape[1]), v.mean(0), COLOR[name] + ".-"))
        e.panel(kind, curves, xlabel="AR step i", ylabel="E || c_i - T⁻¹(x_i) ||²")
        _, low, high = numbers["plain"]["recurs"]
        e.judge(kind, 0 < low and high < 1, "energy by the model's learned T^-1 (at least the true one), mean over steps: "
                f"{listed(numbers, 'energy')}; share that recurs: {listed(numbers, 'recurs')}.", **numbers)
    return e


def theorem3(subjects, args):
    k, closed = np.arange(K + 1), 1 / (1 + 2 * ETA)
    e = Evidence("theorem3", "Theorem 3: W2(P^(k), P*) <= rho^k W2(P^(0), P*), rho = 1 / (1 + 2 eta) for implicit and |1 - 2 eta| for "
                 "explicit steps.", "the mean over classes of the exact W2 is within the bound at every k, with 5 % slack; toy: equal to 1e-8")
    rng, n, curves, worst = np.random.default_rng(args.seed), args.toy_particles // 5, [], 0
    x, y = 3 + 2 * rng.normal(size=(n, 2)), rng.normal(size=(n, 2))
    for at, (eta, implicit) in enumerate(((0.25, True), (1.0, True), (0.1, False), (0.25, False))):
        w2, rho = exact_flow(x, y, eta, K, implicit), 1 / (1 + 2 * eta) if implicit else 1 - 2 * eta
        worst = max(worst, np.abs(w2 / (w2[0] * rho ** k) - 1).max())
        curves += [(f"{'implicit' if implicit else 'explicit'}, eta {eta}", k, w2 / w2[0], f"C{at}."), (None, k, rho ** k, f"C{at}-")]
    e.panel("toy: exact map (lines: rho^k)", curves, xlabel="k", ylabel="W2 / W2 at k = 0", yscale="log")
    e.judge("toy", worst < 1e-8, f"{n} particles, exact map: W2 follows rho^k to {worst:.1e} for eta .25, 1 (implicit) and .1, .25 "
            "(explicit).", worst=worst)
    for kind, s in chained(subjects):
        curves, words, numbers, met, N = [("rho^k", k, closed ** k, "k-")], [], {}, [], s.plain.c.shape[2]
        for at, i in enumerate(sorted({max(1, N // 4), max(1, N // 2), N - 1})):
            clouds, target = flow(s, i)
            w2 = np.array([[exact_w2(c, y) for c, y in zip(cloud, target)] for cloud in clouds]).T              # (G, K + 1)
            root = np.sqrt(np.stack([divergence(cloud, target) for cloud in clouds], 1))
            real = np.mean([exact_w2(a[:target.shape[1]], y) for a, y in zip(s.other.c[:, :, i], target)])
            ideal = exact_flow(clouds[0, 0], target[0], ETA, K)
            fit, fit_root = (bootstrap(v / v[:, :1], fit_decay, args.n_boot) for v in (w2, root))
            w2, root = w2.mean(0), root.mean(0)
            met.append((w2 <= 1.05 * closed ** k * w2[0]).all())
            numbers[f"step {i}"] = {"w2": w2, "root_divergence": root, "w2_between_real_clouds": real, "w2_by_exact_map_in_class_0": ideal,
                                    "M_rho_m_R2": fit, "root_divergence_M_rho_m_R2": fit_root}
            curves += [(f"W2, i = {i}", k, w2 / w2[0], f"C{at}.-"), (f"√S_reg, i = {i}", k, root / root[0], f"C{at}x:")]
            words.append(f"i = {i}: W2 {w2[0]:.3g} -> {w2[-1]:.3g} (of two clouds of real images {real:.3g}), fitted rho "
                         f"{show(f[1] for f in fit)} above a floor of {fit[0][2]:.2f} W2(0); √S_reg has rho {show(f[1] for f in fit_root)}, "
                         f"floor {fit_root[0][2]:.2f}; with the exact map W2 falls by a factor {(ideal[-1] / ideal[0]) ** (1 / K):.4f} "
                         "per step (class 0)")
        e.panel(kind, curves, xlabel="k", ylabel="relative to k = 0", yscale="log")
        e.judge(kind, all(met), f"the refiner's entropic map (reg {RefineConfig().reg:g}), eta = {ETA}, rho = {closed:.2f}, from drawn conditions to as many "
                f"targets. {'; '.join(words)}.", **numbers)
    return e


def trajectory(subjects, args):
    e = Evidence("trajectory", "Figure 3: refinement gives a higher SNR and less noise along the reverse trajectory.",
                 "the mean over t of the SNR rises and that of the noise intensity falls, by the intervals of the paired differences")
    curves = [], []
    for at, (kind, s) in enumerate(subjects.items()):
        v, numbers = {}, {}
        for name in ("plain", "refined")[:1 + (s.refined is not None)]:
            ts, path = getattr(s, name).path                                            # (T, B, N, D); the last x0_hat is x0
            noise = torch.stack([noise_intensity(unpatchify(x0, s.patch)) for x0 in path[:-1]])
            v[name] = torch.stack([snr(path[:-1], path[-1]), noise]).double().numpy()   # (2, T - 1, B)
            numbers[name] = {"t": ts[:-1], "snr": v[name][0].mean(1), "noise": v[name][1].mean(1)}
            for q in (0, 1):
                curves[q].append((f"{kind} {name}", ts[:-1], v[name][q].mean(1), f"C{at}" + ("-" if name == "refined" else "--")))
        levels = ", ".join(f"{name} {a[0].mean():.2f} dB and {a[1].mean():.4f}" for name, a in v.items())
        if "refined" not in v:
            e.text.append(f"**{kind}**: SNR and noise intensity, mean over t: {levels}.")
            e.numbers[kind] = numbers
            continue
        up, down = zip(*bootstrap((v["refined"] - v["plain"]).mean(1).T, lambda m: m, args.n_boot))
        e.judge(kind, up[1] > 0 and down[2] < 0, "SNR of x0_hat(t) against the final x0, and noise intensity of the image of all x0_hat(t), "
                f"mean over t: {levels}; refined - plain {show(up)} dB and {show(down)}.", snr_gain=up, noise_gain=down, **numbers)
    for title, lines, label in zip(("SNR along the trajectory", "noise intensity"), curves, ("dB", "MAD of the Laplacian")):
        if lines:
            e.panel(title, lines, xlabel="t (sampling goes left)", ylabel=label)
    return e


def gap(subjects, args):
    e = Evidence("gap", "Exposure bias: conditions met in sampling leave the teacher-forced ones along the chain, and refinement brings them "
                 "back.", "the mean gap of the plain chain is above 1 and refinement lowers it, by intervals over classes, to unseen images")
    for kind, s in chained(subjects):
        floor = along(s.other, s.reference)                                             # (G, N - 1)
        v = {name: np.stack([along(chain, s.reference), along(chain, s.other), floor], 1)
             for name, chain in s.chains().items() if name != "real"}
        ratio, curves, numbers, i = lambda m, q: m[:, q] / m[:, 2], [], {}, np.arange(1, 1 + floor.shape[1])
        over = lambda a, statistic: bootstrap(a, statistic, args.n_boot)
        for name, a in v.items():
            seen, unseen = a.mean(0)[:2] / a.mean(0)[2]
            curves += [(f"{name}, to targets", i, seen, COLOR[name] + ".-"), (f"{name}, to unseen", i, unseen, COLOR[name] + "--")]
            numbers[name] = {"divergences": a.mean(0), "targets": over(a, lambda m: ratio(m, 0).mean(1)),
                             "unseen": over(a, lambda m: ratio(m, 1).mean(1)), "slope": over(a, lambda m: slope(ratio(m, 1)))}
        e.panel(kind, curves, xlabel="AR step i", ylabel="S(drawn, real) / S(real, real)")
        words, ok, change = [f"{key} {listed(numbers, key)}" for key in ("targets", "unseen", "slope")], numbers["plain"]["unseen"][1] > 1, {}
        if s.refined is None:
            words.append("refinement was not run, so only the first half of the rule counts")
        else:
            both = np.concatenate([v["plain"], v["refined"]], 1)                        # (G, 6, N - 1)
            change = {"change": over(both, lambda m: (ratio(m[:, 3:], 1) - ratio(m[:, :3], 1)).mean(1))}
            words, ok = [*words, f"refined - plain {show(change['change'])}"], ok and change["change"][2] < 0
        e.judge(kind, ok, "debiased Sinkhorn divergence of drawn from teacher-forced conditions over that of the two splits, mean over steps, "
                f"to the targets of refinement and to unseen images, and slope of the latter per step: {'; '.join(words)}.",
                **numbers, **change)
    return e


def chained(subjects):
    """The subjects that have a chain: not cdm."""
    return [(kind, s) for kind, s in subjects.items() if kind != "cdm"]


def farthest(s):
    """(i, g, project): AR step and class where drawn conditions are farthest from the targets, and the projection of
    conditions (n, C) to the plane of the targets' two leading principal axes, as numpy (2, n)."""
    d = along(s.plain, s.reference)
    g, i = np.unravel_index(d.argmax(), d.shape)
    target = s.reference.c[g, :, i + 1]
    axes = torch.linalg.svd(target - target.mean(0), full_matrices=False)[2][:2]
    return int(i) + 1, int(g), lambda c: (axes @ (c - target.mean(0)).T).numpy()


def pca(subjects, args):
    e = Evidence("pca", "Refinement moves the cloud of conditions onto the ideal one.",
                 "the refined cloud is nearer than the plain one to unseen teacher-forced conditions, by S_reg in all dimensions")
    for kind, s in chained(subjects):
        if s.refined is None:
            continue
        i, g, project = farthest(s)
        at = lambda chain: chain.c[g, :, i]
        clouds = {"teacher-forced": project(at(s.reference)), "plain": project(at(s.plain)), "refined": project(at(s.refined))}
        ends = np.concatenate(list(clouds.values()), 1)
        frame = {f"{axis}lim": (1.1 * a.min() - 0.1 * a.max(), 1.1 * a.max() - 0.1 * a.min()) for axis, a in zip("xy", ends)}
        for name in ("plain", "refined"):
            e.panel(f"{kind}, {name}", [("teacher-forced", *clouds["teacher-forced"], "k+"), (name, *clouds[name], COLOR[name] + ".")],
                    xlabel="first axis", ylabel="second axis", **frame)
        far = {name: float(divergence(at(chain)[None], at(s.other)[None])[0]) for name, chain in (("plain", s.plain), ("refined", s.refined))}
        total = lambda a: np.square(a - a.mean(-1, keepdims=True)).sum()
        share = total(clouds["teacher-forced"]) / total(at(s.reference).numpy().T)
        e.judge(kind, far["refined"] < far["plain"], f"AR step {i}, class {g}, where the plain chain is farthest from the targets; the plane "
                f"holds {share:.0%} of their variance. Divergence from unseen real images: plain {far['plain']:.3g}, refined "
                f"{far['refined']:.3g}.", step=i, label=g, share=share, **far)
    return e


def transport(subjects, args):
    e = Evidence("transport", f"Transport lines: {K} steps of the refiner move 12 conditions to the targets, seen in the plane of `pca`.",
                 "the cloud ends nearer to the targets than it began, by exact W2")
    for kind, s in chained(subjects):
        i, g, project = farthest(s)
        clouds, target = (a[..., g, :, :] for a in flow(s, i))                          # (K + 1, n, C), (n, C)
        path = np.stack([project(c[:12]).T for c in clouds])                            # (K + 1, 12, 2)
        e.panel(f"{kind}, step {i}, class {g}", [("targets", *project(target), "k+"), ("before", *project(clouds[0]), "C3."),
                                                 ("after", *project(clouds[-1]), "C0.")],
                arrows=(path[:-1].reshape(-1, 2), path[1:].reshape(-1, 2)), xlabel="first axis", ylabel="second axis")
        before, after, moved = exact_w2(clouds[0], target), exact_w2(clouds[-1], target), (clouds[-1] - clouds[0]).norm(dim=1).mean()
        e.judge(kind, after < before, f"W2 {before:.3g} -> {after:.3g}; a condition moves by {moved:.3g} on average.",
                before=before, after=after, moved=moved)
    return e


CLAIMS = {f.__name__: f for f in (theorem1, theorem2, proposition1, lemma6, theorem3, trajectory, gap, pca, transport)}


# ---------------------------------------------------------------- output

def draw(e, path):
    """The panels in a row, legends below them, as a small PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    style = {"font.size": 7.5, "axes.titlesize": 8, "lines.markersize": 3, "lines.linewidth": 1, "axes.spines.top": False,
             "axes.spines.right": False}
    with plt.rc_context(style):
        fig, axes = plt.subplots(1, len(e.panels), figsize=(max(5.5, 2.75 * len(e.panels)), 3.2), layout="constrained", squeeze=False)
        for ax, (title, curves, arrows, options) in zip(axes[0], e.panels):
            for label, x, y, form in curves:
                ax.plot(x, y, form, label=label)
            if arrows:
                start, end = arrows
                ax.quiver(*start.T, *(end - start).T, angles="xy", scale_units="xy", scale=1, width=0.004, color="0.3")
            ax.set(title=title, **options)
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.legend(fontsize=6.5, frameon=False, ncol=2, loc="upper center", bbox_to_anchor=(0.5, -0.17))
        buffer = io.BytesIO()
        fig.savefig(buffer, dpi=100)
        plt.close(fig)
    Image.open(buffer).convert("RGB").quantize(64).save(path, optimize=True)            # a third of the bytes


SIZES = [  # flag, at least, full, with --fast, meaning
    ("n", 4, 50, 8, "images drawn per class"), ("m", 4, 100, 12, "real images per class and split, at most"),
    ("classes", 2, 10, 3, "classes, the first so many"), ("steps", 2, 25, 3, "denoiser evaluations per patch"),
    ("n_cal", 8, 200, 8, "images per class that calibrate the refiner"), ("n_boot", 10, 500, 50, "bootstrap resamples"),
    ("toy_particles", 20, 500, 60, "particles of the toys")]


def parse_args(argv):
    p = Parser(prog="evaluate.py theory", description="The paper's claims in closed-form toys and on trained models.")
    for kind in KINDS:
        p.add_argument(f"--{kind}", metavar="RUN", help=f"checkpoint or run directory of a model of kind {kind}")
    p.add_argument("--claims", nargs="+", choices=CLAIMS, default=list(CLAIMS), help="which to test")
    p.add_argument("--out_dir", default="out/theory", help="pictures, theory.md, theory.json")
    p.add_argument("--fast", action="store_true", help="small sizes, to see that everything runs; no evidence")
    p.add_argument("--seed", type=number(int, 0), default=0, help="of the images and noise")
    p.add_argument("--ref_split", choices=("train", "heldout"), default="train",
                   help="real images that refinement aims at; the other split is unseen")
    p.add_argument("--refine", choices=METHODS, default="gaussian+sinkhorn", help="what the refined chain is refined by")
    p.add_argument("--data_dir", help="folder data sets: where the images are (default: as in training)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda ...")
    for name, low, full, fast, text in SIZES:
        p.add_argument(f"--{name}", type=number(int, low), help=f"{text} ({full}, with --fast {fast})")
    args = p.parse_args(argv)
    for name, _, full, fast, _ in SIZES:
        if getattr(args, name) is None:
            setattr(args, name, fast if args.fast else full)
    return args


def report(evidence, args, out):
    """theory.md: a table of verdicts, then pictures and captions; theory.json: everything."""
    table = [f"| {e.name} | {', '.join(f'{where} {VERDICT[ok]}' for where, ok in e.holds.items())} |" for e in evidence]
    text = [f"\n## {e.name}\n\n![{e.name}]({e.name}.png)\n\n{e.caption}" for e in evidence]
    (out / "theory.md").write_text("\n".join(["# The paper's claims, measured\n", "| claim | verdict |", "|---|---|", *table, *text, ""]))
    claims = {e.name: {"claim": e.claim, "rule": e.rule, "holds": e.holds, "caption": e.caption, "numbers": e.numbers} for e in evidence}
    plain = lambda value: value.tolist() if hasattr(value, "tolist") else list(value)    # arrays and numpy numbers
    (out / "theory.json").write_text(json.dumps({"args": vars(args), "claims": claims}, indent=1, default=plain, allow_nan=False))


def main(argv=None):
    args, began, evidence = parse_args(argv), time.time(), []
    for kind in KINDS:
        if not getattr(args, kind):
            print(f"{kind:12} skipped: no --{kind} given")
    subjects = {kind: observe(kind, getattr(args, kind), args) for kind in KINDS if getattr(args, kind)}
    out = Path(args.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    for name in args.claims:
        since = time.time()
        e = CLAIMS[name](subjects, args)
        if not e.panels:
            print(f"{name:12} left out: it has no toy, and no model with a chain was given (or --refine none)")
            continue
        draw(e, out / f"{name}.png")
        evidence.append(e)
        print(f"{name:12} {time.time() - since:5.1f} s  {', '.join(f'{where} {VERDICT[ok]}' for where, ok in e.holds.items())}", flush=True)
    report(evidence, args, out)
    print(f"{time.time() - began:.0f} s in all -> {out / 'theory.md'}, {out / 'theory.json'}")


def run(argv=None):
    """The sub-command by itself: bad input is one line on stderr and exit code 2."""
    datasets.run(lambda: main(argv))
