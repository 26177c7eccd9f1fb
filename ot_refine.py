"""Condition refinement (Algorithm 1, lines 3-8): one class, one place of the chain, one function.

At place i of the generation order the conditions c (n, C) of images of one class are particles of
a distribution P_c; `target` (m, C), those of real images of that class there, are particles of the
ideal P_c*. K steps of a Wasserstein gradient flow (JKO) move the first to the second:

    T = Gaussian.fit(c, target, reg)     the exact map between two Gaussians
    T = Sinkhorn.fit(c, target, reg)     the debiased map of entropic optimal transport
    T(c)                                 moves any condition, each on its own
    T.own(c)                             optional: moves the very cloud that T was fitted on
    c = jko_step(c, T(c), eta)

A map is a dataclass of tensors, so that it can be saved; yours goes into MAPS. This file needs
torch only; `python ot_refine.py` is a lesson in two dimensions.

Zhou, Li, Shen (ICLR 2026, arXiv 2602.07022); Cuturi 2013 (Sinkhorn); Feydy et al. 2019 (debiased
divergence, averaged update); Pooladian & Niles-Weed 2021 (entropic maps); Jordan, Kinderlehrer,
Otto 1998 (JKO).
"""
import contextlib
import math
import warnings
from dataclasses import dataclass, is_dataclass
from pathlib import Path

import torch


# ---------------------------------------------------------------- entropic optimal transport

def sq_cost(x, y):
    """Squared distances (n, m) of the rows of x (n, C) and y (m, C).

    Counted from the middle of y: far from the origin |x|^2 + |y|^2 - 2xy would cancel.
    """
    middle = y.detach().mean(0)
    x, y = x - middle, y - middle
    xx, yy = x.square().sum(1, keepdim=True), y.square().sum(1)
    return (torch.addmm(yy, x, y.T, alpha=-2) + xx).clamp_min(0)


def softmin(cost, h):
    """-log mean_l exp(h_l - cost_jl) (n,): half of a Sinkhorn iteration, in units of reg."""
    return math.log(len(h)) - torch.logsumexp(h - cost, dim=1)


def sinkhorn(cost, reg, g=None, n_iter=100, tol=0.05):
    """Entropic OT: min over plans P with uniform marginals of <P, cost> + reg KL(P | uniform).

    cost (n, m), reg absolute, g (m,) a start. Potentials f (n,), g (m,) of the plan
    P = exp((f + g - cost) / reg) / (n m), whose rows are exact. tol: the mean relative error of its
    columns, looked at every tenth time, as a look makes a GPU wait; T is off by about as much.
    """
    cost, g = cost / reg, torch.zeros_like(cost[0]) if g is None else g / reg
    for k in range(n_iter):
        f = softmin(cost, g)                                       # rows exact
        before, g = g, softmin(cost.T, f)                          # columns exact
        # by this factor the columns were off before
        if k % 10 == 0 and ((before - g).exp() - 1).abs().mean() < tol:
            break
    else:
        warn(n_iter, tol)
    return reg * softmin(cost, g), reg * g


def warn(n_iter, tol):
    warnings.warn(f"Sinkhorn stopped after n_iter={n_iter}, its marginals not yet met to "
                  f"{tol:.0e}: raise reg", RuntimeWarning, stacklevel=3)


def sinkhorn_self(cost, reg, n_iter=50, tol=0.05):
    """The potential h (n,) of a cloud with itself, P = exp((h + h' - cost) / reg) / n^2.

    The averaged update h <- (h + softmin(h)) / 2 needs ten iterations where the alternating one
    needs hundreds (Feydy 2019). As the diagonal of cost is 0, u = exp(h / reg) stays within
    1 / sqrt(n) and sqrt(n): one fixed kernel will do.
    """
    kernel, u = (-cost / reg).exp(), torch.ones_like(cost[0])
    for k in range(1, n_iter + 1):
        mass = u * (kernel @ u) / len(u)                           # of each row; 1 in the end
        if k % 5 == 0 and (mass - 1).abs().mean() < tol:
            break
        u = u / mass.sqrt()
    else:
        warn(n_iter, tol)
    return reg * u.log()


def plan(cost, f, g, reg):
    """The coupling (n, m) of potentials f (n,), g (m,): rows sum to 1 / n, columns to 1 / m."""
    return ((f[:, None] + g - cost) / reg).exp() / cost.numel()


def attend(z, points, h, reg):
    """Rows of a plan, normalised, times the points: softmax_l((h_l - |z - p_l|^2) / reg) p_l."""
    middle = points.mean(0)
    z, p = z - middle, points - middle                     # |z|^2 is the same for all l: left out
    return (torch.addmm(h - p.square().sum(1), z, p.T, alpha=2) / reg).softmax(1) @ points


def divergence(x, y, reg, n_iter=1000, tol=1e-6):
    """S_reg(x, y) = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2 (a 0-d tensor), zero for equal clouds.

    x (n, C), y (m, C), reg absolute. Its gradient in x is -2 / n (T(x) - x), T the debiased map.
    Equals `ot.solve_sample(x, y, reg=reg, debias=True).value` of POT. Feydy et al. 2019.
    """
    reg = torch.as_tensor(reg, dtype=x.dtype, device=x.device).clamp_min(1e-30)  # equal points: 0

    def entropic(x, y):                    # f, g are constant: the gradient in cost is the plan's
        cost = sq_cost(x, y)
        f, g = (sinkhorn(cost.detach(), reg, None, n_iter, tol) if x is not y else
                [sinkhorn_self(cost.detach(), reg, n_iter, tol)] * 2)
        return f.mean() + g.mean() - reg * (plan(cost, f, g, reg).sum() - 1)

    with exact(x.device):
        return entropic(x, y) - (entropic(x, x) + entropic(y, y)) / 2


# ---------------------------------------------------------------- the maps

@dataclass
class Sinkhorn:
    """The debiased entropic map T(z) = z + sum_l P(z, y_l) y_l - sum_l P(z, c_l) c_l  (line 7).

    On the cloud that it is fitted on `own` gives T(c) - c = -n/2 dS_reg/dc, the gradient of the
    divergence; with few points even two samples of one distribution are pulled together a little.
    CHOICE(classes): c and target are of one class, so that transport never mixes classes.
    """
    target: torch.Tensor        # (m, C)
    g: torch.Tensor             # (m,) its potential
    cloud: torch.Tensor         # (n, C) the conditions that it was fitted on
    h: torch.Tensor             # (n,) the potential of the cloud with itself
    reg: torch.Tensor           # () absolute

    @classmethod
    def fit(cls, c, target, reg=0.2):
        """The map of conditions c (n, C) to targets (m, C); reg is a fraction of the mean cost."""
        cost = sq_cost(c, target)
        reg = reg * cost.mean().clamp_min(1e-30)                   # 0 where all points coincide
        # start from the potential of the shift of the means: their distance costs no iterations
        shift = 2 * (target - target.mean(0)) @ (target.mean(0) - c.mean(0))
        g = sinkhorn(cost, reg, shift)[1]
        return cls(target, g, c, sinkhorn_self(sq_cost(c, c), reg), reg)

    def __call__(self, z):
        """T(z) (B, C) of any z (B, C), each on its own: z joins the cloud, with a weight u.

        Its row in the plan of cloud and z has e_l u / (n + 1) on c_l, u^2 / (n + 1) on z itself;
        they sum to 1. Far from the cloud the last sum is z. Left out of it, z would keep its whole
        offset from the cloud.
        """
        n, e = len(self.cloud), ((self.h - sq_cost(z, self.cloud)) / self.reg).exp()
        total = e.sum(1, keepdim=True)
        u = ((total.square() + 4 * (n + 1)).sqrt() - total) / 2    # of u (sum e + u) = n + 1
        itself = torch.addcmul(e @ self.cloud, u, z) / (total + u)
        return z + attend(z, self.target, self.g, self.reg) - itself

    def own(self, c):
        """T(c) of the very cloud that it was fitted on: the rows of its own plans."""
        itself = attend(c, self.cloud, self.h, self.reg)
        return c + attend(c, self.target, self.g, self.reg) - itself


class Biased(Sinkhorn):
    """The map without its second plan: the cloud shrinks to its entropic blur."""

    def __call__(self, z):
        return attend(z, self.target, self.g, self.reg)

    own = __call__


@dataclass
class Gaussian:
    """T(z) = to + A (z - mean), A S A = R: the exact map of N(mean, S) to N(to, R), A symmetric."""
    mean: torch.Tensor          # (C,)
    A: torch.Tensor             # (C, C)
    to: torch.Tensor            # (C,)

    @classmethod
    def fit(cls, c, target, reg=None):
        """By the means and shrunk covariances of c (n, C) and target (m, C), in float64."""
        x, y = c.double() - c.double().mean(0), target.double() - target.double().mean(0)
        xx, yy, n, m = x.T @ x, y.T @ y, len(x), len(y)
        both = (xx + yy) / max(n + m - 2, 1)
        both.diagonal().add_(both.diagonal().mean() * 1e-3 + 1e-30)        # invertible at any n, m
        root = sqrtm(shrunk(xx, n, both))                                  # S^(1/2)
        inverse = torch.linalg.inv(root)
        A = inverse @ sqrtm(root @ shrunk(yy, m, both) @ root) @ inverse
        return cls(c.mean(0), A.to(c.dtype), target.mean(0))

    def __call__(self, z):
        return torch.addmm(self.to, z - self.mean, self.A)


def shrunk(scatter, n, both):
    """The covariance (C, C) of n points, moved towards the shape of `both` at its own scale: by
    half of the optimum of a Gaussian sample (Ledoit & Wolf 2004), little where n is large, wholly
    at n = 1, so that a map fitted on one condition is a shift of the mean."""
    prior = both * (scatter.trace() + both.trace()) / (n * both.trace())
    if n == 1:
        return prior
    cov = scatter / (n - 1)
    noise = (both.trace().square() + both.square().sum()) / (n - 1)
    weight = 0.5 * noise / (cov - prior).square().sum().clamp_min(1e-300)
    return torch.lerp(cov, prior, weight.clamp(1e-3, 1))             # a little: invertible


def sqrtm(S):
    w, v = torch.linalg.eigh(S)
    return (v * w.clamp_min(0).sqrt()) @ v.T


MAPS = {"gaussian": Gaussian, "sinkhorn": Sinkhorn, "biased": Biased}


# ---------------------------------------------------------------- the gradient flow

def jko_step(c, to, eta, lam=0.0, a=0.0):
    """argmin over c' of |c' - c|^2 / (2 eta) + |c' - to|^2 + lam |c' - a|^2  (Alg. 1 line 8).

    (c + 2 eta (to + lam a)) / (1 + 2 eta (1 + lam)), all (n, C), for any eta > 0; inf is the whole
    map. With lam = 0 and the exact map W2 shrinks by exactly 1 / (1 + 2 eta) per step.
    """
    if eta == 0:
        return c
    keep = 1 / (2 * eta)
    if lam == 0:
        return torch.lerp(c, to, 1 / (keep + 1))                           # the same in one kernel
    return (keep * c + to + lam * a) / (keep + 1 + lam)


def stages_of(method="default", K=2, eta=2.0):
    """((map, eta), ...) that a condition goes through. default: the whole Gaussian map, then K
    Sinkhorn steps; gaussian: its whole map; another map: K steps of it; none, K = 0, eta = 0: ().
    """
    if method == "none" or K == 0 or eta == 0:
        return ()
    whole = (("gaussian", math.inf),)
    special = {"gaussian": whole, "default": (*whole, *(("sinkhorn", eta),) * K)}
    return special.get(method, ((method, eta),) * K)


def check_maps(stages, lam=0.0, inverse=None):
    """ValueError unless all maps of the stages can be fitted, applied and kept."""
    for name, _ in stages:
        T = MAPS.get(name)
        # "in dir": hasattr(T, "__call__") is true of every class
        if not (is_dataclass(T) and hasattr(T, "fit") and "__call__" in dir(T)):
            raise ValueError(f"the map {name!r} must be one of MAPS, {', '.join(MAPS)}: a "
                             "dataclass of tensors with a classmethod fit(c, target, reg) and a "
                             "__call__(z)")
    if lam > 0 and inverse is None:
        raise ValueError(f"lam={lam} needs inverse(i, c), T^-1 of the patch drawn under c")


def principal_axes(targets, rank):
    """The `rank` leading axes of each row of targets (N, M, C) -> (N, C, rank), in float64.

    CHOICE(space): transport in a quarter of the directions, the same for all classes: as good as
    all, cheaper, and a class does not depend on which others are drawn. Alternative: all of them,
    `rank=0` of sample.Refinement.
    """
    centred = (y.double() - y.double().mean(0) for y in targets)
    axes = [torch.linalg.eigh(x.T @ x)[1][:, -rank:].to(targets.dtype) for x in centred]
    return torch.stack(axes)


class Refiner:
    """refine(i, c, y) -> c' (n, C): conditions c of one class at place i, moved to its targets (y,
    their class, is not looked at).

    axes (N, C, r); targets (N, m, r), in these axes; the rest of a condition stays as it is. reg:
    see Sinkhorn.fit. For lam > 0 inverse(i, c) -> a (n, C) is T^-1(x_hat(c)): the paper's name for
    the condition that a patch reveals, not the inverse of the map T.
    CHOICE(coupling): each map is fitted on the very conditions that it moves: the literal, coupled
    Algorithm 1. The maps are kept; a Refiner that has loaded those of an earlier draw (`load`), its
    calibration, is frozen: it applies them, each condition on its own. Flag: --coupled.
    """

    def __init__(self, axes, targets, stages=stages_of(), reg=0.2, lam=0.0, inverse=None):
        check_maps(stages, lam, inverse)
        self.axes, self.targets, self.stages, self.reg = axes, targets, stages, reg
        self.lam, self.inverse, self.maps, self.frozen = lam, inverse, {}, False

    @torch.no_grad()
    def __call__(self, i, c, y=None):
        if not self.stages:
            return c
        with exact(c.device):
            full, axes = c.to(self.axes.dtype), self.axes[i]
            z = low = full @ axes                                              # (n, r)
            lift = lambda z: torch.addmm(full, z - low, axes.T)                # back to (n, C)
            if not self.frozen:
                self.maps[i] = []                                  # one for each stage, to come
                if not z.isfinite().all():
                    raise ValueError(f"conditions at place {i} are not finite: is the checkpoint "
                                     "damaged?")

            for k, (name, eta) in enumerate(self.stages):                      # Alg. 1 line 3
                a = self.inverse(i, lift(z)) @ axes if self.lam > 0 else 0.0   # lines 4-6
                to = self.maps[i][k](z) if self.frozen else self.fitted(name, i, z)  # line 7
                z = jko_step(z, to, eta, self.lam, a)                          # line 8
            return lift(z).to(c.dtype)

    def fitted(self, name, i, z):
        """T(z) of a map that is fitted on z (n, r) itself, and kept."""
        T = MAPS[name].fit(z, self.targets[i], self.reg)
        self.maps[i].append(T)
        return getattr(T, "own", T)(z)

    def state(self):
        """{place: [{name: tensor} of each stage's map]}: what frozen mode needs, to be saved."""
        return {i: [vars(T) for T in maps] for i, maps in self.maps.items()}

    def load(self, state):
        """The same Refiner with the maps of a `state()`, frozen."""
        self.maps = {i: [MAPS[name](**kept) for (name, _), kept in zip(self.stages, maps)]
                     for i, maps in state.items()}
        self.frozen = True
        return self


# ---------------------------------------------------------------- precision

@contextlib.contextmanager
def exact(device):
    """fp32 products as fp32, no autocast and no TF32: costs are divided by a small reg, then
    exponentiated. Follows whichever of torch's two interfaces to TF32 is there."""
    matmul = torch.backends.cuda.matmul
    parts = (matmul, torch.backends.mkldnn.matmul) if hasattr(matmul, "fp32_precision") else ()
    before = [part.fp32_precision for part in parts] or torch.get_float32_matmul_precision()

    def use(values):
        if not parts:
            torch.set_float32_matmul_precision(values)
        for part, value in zip(parts, values):
            part.fp32_precision = value

    use(["ieee"] * 2 if parts else "highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        use(before)


# ---------------------------------------------------------------- a lesson

def lesson(K=8, eta=0.25, reg=0.2, path="out/lesson.png"):
    """Two clouds in the plane: K steps with the debiased and with the biased map, the divergence
    after each beside the rate of the exact map, and a picture of the way."""
    torch.set_num_threads(1)               # products this small lose by a second one
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    c = draw(300, 2) @ torch.tensor([[0.5, 0.3], [0.0, 0.4]])
    turn = 6.28 * torch.rand(300, 1, generator=generator)
    target = torch.cat([turn.cos(), turn.sin()], 1) * 1.2 + 0.08 * draw(300, 2) + 2.5

    flows = {"debiased": [c], "biased": [c]}
    for flow, T in zip(flows.values(), (Sinkhorn, Biased)):
        for _ in range(K):
            flow.append(jko_step(flow[-1], T.fit(flow[-1], target, reg).own(flow[-1]), eta))

    far = lambda z: divergence(z, target, reg=0.05, tol=1e-3).item()
    print(f"{len(c)} particles, K = {K} steps of eta = {eta}, reg = {reg} of the mean "
          f"cost; rate of the exact map 1 / (1 + 2 eta) = {1 / (1 + 2 * eta):.3f}")
    print("step  divergence: debiased   biased   exact map, rate^2k")
    for k, (a, b) in enumerate(zip(*flows.values())):
        print(f"{k:4}  {far(a):20.4f} {far(b):8.4f} {far(c) / (1 + 2 * eta) ** (2 * k):20.4f}")

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(10, 5), layout="constrained", sharex=True, sharey=True)
    for ax, (name, flow) in zip(axes, flows.items()):
        ax.plot(*torch.stack(flow)[:, :60].permute(2, 0, 1), color="0.7", linewidth=0.7)
        ax.plot(*target.T, "k+", markersize=5, label="target")
        ax.plot(*flow[0].T, "C3.", label="before")
        ax.plot(*flow[-1].T, "C0.", label=f"after {len(flow) - 1} steps")
        ax.set(title=f"{name} map", aspect="equal")
    axes[0].legend()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=100)
    print(path)


if __name__ == "__main__":
    import argparse
    argparse.ArgumentParser(description="A lesson in two clouds; no options.").parse_args()
    lesson()
