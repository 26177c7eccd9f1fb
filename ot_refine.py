"""Condition refinement: a Wasserstein gradient flow from the conditions met in sampling to the ideal ones.

At one step of an autoregressive sampler the conditions c of all samples are particles of a distribution P_c, and
teacher-forced conditions of real images, `target`, are particles of the ideal P_c*. K steps of the JKO scheme for
    F(P_c) = W2^2(P_c, P_c*) + lam * E || c - T^-1(x) ||^2
move the first towards the second. One step needs a transport map T from P_c to P_c*: the debiased map of entropic
optimal transport (`sinkhorn`), the map between Gaussians (`gaussian`), or a rival (`mean`, `meanvar`, `ema`, `knn`).

What it is not: an OT library (squared Euclidean cost, balanced, dense plans), or a sampler (`Refiner.bind` returns a
function that a sampler calls with the conditions of AR step i). It needs torch only and can be copied alone.

Everything is batched: (G, n, C) is G separate transport problems ("groups") of n particles of dimension C, whose
weights (G, n) are zero on padding. Work is in fp32 at least, outside autocast and TF32.

Zhou, Li, Shen: Condition Errors Refinement in Autoregressive Image Generation with Diffusion Loss, ICLR 2026 (Alg. 1)
Cuturi 2013 (Sinkhorn); Schmitzer 2019 (stabilised kernel); Feydy et al. 2019 (debiased divergence, averaged update);
Pooladian & Niles-Weed 2021 (out-of-sample entropic maps); Jordan, Kinderlehrer, Otto 1998 (JKO scheme)
"""
import contextlib
import functools
import warnings
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

METHODS = ("none", "sinkhorn", "gaussian", "gaussian+sinkhorn", "mean", "meanvar", "ema", "knn")


@dataclass
class RefineConfig:
    """What to transport with, how far and how precisely; raises ValueError, in one place, on what makes no sense."""
    method: str = "gaussian+sinkhorn"  # one of METHODS; "gaussian+sinkhorn": the whole Gaussian map, then K Sinkhorn steps
    K: int = 2                  # JKO steps per AR step (Alg. 1 line 3); 0 leaves every condition bitwise as it is
    eta: float | tuple = 2.0    # JKO step size, one number or K of them; 0 leaves every condition bitwise as it is
    strength: float = 1.0       # multiplies eta: the dial from diversity to fidelity; gaussian+sinkhorn at 0 is Gaussian only
    reg: float = 0.2            # entropic weight as a fraction of the mean cost between conditions and targets
    lam: float = 0.0            # weight of || c - T^-1(x) ||^2
    m: int = 0                  # targets to keep per group, the first of those given; 0 = all
    debias: bool = True         # subtract the self-transport; False shows the entropic shrinkage of the cloud
    implicit: bool = True       # JKO step: implicit (stable for every eta) or explicit (eta < 1)
    rank: int | None = None     # transport in so many leading principal directions of the targets; None = a quarter of them, 0 = all
    pooled: bool = False        # one transport problem for all groups instead of one per group
    window: tuple = (0.0, 1.0)  # refine AR step i of N when window[0] <= i / N < window[1]
    n_iter: int = 100           # Sinkhorn iterations, at most
    tol: float | None = 0.05    # L1 error of the marginals to stop at (moves T by 5 %, its own noise is larger); None = exactly n_iter, no host synchronisation
    shrink: float = 0.5         # covariance shrinkage of the Gaussian map, times the optimum for one matrix
    ema_decay: float = 0.99     # `ema`: decay of the running mean over the targets in the order given
    neighbors: int = 5          # `knn`: how many nearest targets are averaged
    min_particles: int = 8      # coupled: a group with fewer conditions in the batch is left as it is, with a warning
    store: str = "float32"      # how clouds are kept: float32 or float16 (bfloat16 would round distances to 1 %)

    def __post_init__(self):
        etas = self.eta if isinstance(self.eta, (tuple, list)) else (self.eta,) * self.K
        self.eta = tuple(self.eta) if isinstance(self.eta, list) else self.eta
        self.window = tuple(self.window)
        checks = [
            (self.method in METHODS, "method", f"one of {', '.join(METHODS)}"),
            (self.K >= 0, "K", "at least 0"),
            (len(etas) == self.K, "eta", f"one number or K={self.K} of them"),
            (all(e >= 0 for e in etas), "eta", "at least 0"),
            (self.strength >= 0, "strength", "at least 0"),
            (self.implicit or all(e * self.strength < 1 for e in etas), "eta",
             "below 1 after `strength` for explicit steps (they diverge); try eta=0.5"),
            (self.reg > 0, "reg", "above 0; try 0.2"),
            (self.lam >= 0, "lam", "at least 0"),
            (self.m >= 0, "m", "at least 0 (0 = all)"),
            (self.rank is None or self.rank >= 0, "rank", "at least 0 (0 = all), or None for a quarter"),
            (len(self.window) == 2 and 0 <= self.window[0] <= self.window[1] <= 1, "window", "0 <= first <= last <= 1"),
            (self.n_iter >= 1 and (self.tol is None or self.tol > 0), "n_iter and tol", "n_iter >= 1, tol None or above 0"),
            (0 <= self.shrink, "shrink", "at least 0; try 0.5"),
            (0 < self.ema_decay < 1, "ema_decay", "between 0 and 1"),
            (self.neighbors >= 1 and self.min_particles >= 1, "neighbors and min_particles", "at least 1"),
            (self.store in ("float32", "float16"), "store", "float32 or float16"),
        ]
        for ok, names, want in checks:
            if not ok:
                got = ", ".join(f"{n}={getattr(self, n)!r}" for n in names.split(" and "))
                raise ValueError(f"RefineConfig: {got}, expected {want}")

    def stages(self):
        """[(map, eta)] to go through at each AR step, in order; eta None applies the whole map; [] does nothing."""
        etas = self.eta if isinstance(self.eta, tuple) else (self.eta,) * self.K
        if self.method == "none" or not any(etas):
            return []
        first = [("gaussian", None)] if self.method == "gaussian+sinkhorn" else []
        return first + [(self.method.split("+")[-1], e * self.strength) for e in etas if e * self.strength > 0]

    def rank_of(self, dim):
        """In how many of `dim` directions transport happens."""
        return min(dim, -(-dim // 4) if self.rank is None else self.rank or dim)


# ---------------------------------------------------------------------------- entropic optimal transport

@contextlib.contextmanager
def _exact(x):
    """fp32 products as fp32: no autocast, no TF32 (costs are divided by a small reg, then exponentiated)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(x.device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _precise(fn):
    @functools.wraps(fn)
    def wrapped(x, *args, **kwargs):
        with _exact(x):
            return fn(x, *args, **kwargs)
    return wrapped


_warned = set()


def _warn_once(key, message):
    if key not in _warned:
        _warned.add(key)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def _weights(w, like):
    """(G, n) non-negative weights, or None for uniform -> weights that sum to 1 in each group."""
    if w is None:
        return torch.full(like.shape[:2], 1 / like.shape[1], dtype=like.dtype, device=like.device)
    w = w.to(like)
    return w / w.sum(-1, keepdim=True)


def _from_middle(x, y, a, b):
    """x and y counted from the weighted mean of y, with padding moved there, and this origin (G, 1, C)."""
    origin = (b[..., None] * y).sum(1, keepdim=True).detach()
    return (x - origin).masked_fill(a[..., None] == 0, 0), (y - origin).masked_fill(b[..., None] == 0, 0), origin


def sq_cost(x, y):
    """Squared distances (G, n, m) between x (G, n, C) and y (G, m, C)."""
    # Far from the origin |x|^2 + |y|^2 - 2xy cancels: count from the mean of y, where OT's clouds are.
    center = y.detach().mean(1, keepdim=True)
    x, y = x - center, y - center
    norms = x.square().sum(-1)[:, :, None] + y.square().sum(-1)[:, None, :]
    return torch.baddbmm(norms, x, y.mT, alpha=-2).clamp_min(0)


def sinkhorn_log(cost, reg, a=None, b=None, g=None, n_iter=100):
    """The algorithm of `sinkhorn`, in the log domain and nothing else: slow, and what the fast one is tested against."""
    a, b, reg = _weights(a, cost), _weights(b, cost.mT), reg[:, None]
    g = torch.zeros_like(b) if g is None else g
    softmin = lambda cost, h, w: -reg * torch.logsumexp(w.log()[:, None] + (h[:, None] - cost) / reg[:, None], -1)
    f = softmin(cost, g, b)                                                         # (G, n): rows exact
    for _ in range(n_iter):
        g = softmin(cost.mT, f, a)                                                  # (G, m): columns exact
        f = softmin(cost, g, b)
    return f, g


@_precise
def sinkhorn(cost, reg, a=None, b=None, g=None, n_iter=100, tol=None, block=10):
    """Entropic OT: min over plans P with marginals a, b of <P, cost> + reg KL(P | a b).

    cost (G, n, m); reg (G,) absolute, in units of cost; a (G, n), b (G, m) weights, zero on padding, None = uniform;
    g (G, m) warm start. Returns potentials f (G, n), g (G, m) and err (G,), the L1 error of the column marginal; rows
    are exact. Convention: P = a b exp((f + g - cost) / reg), for uniform weights exp(..) / (n m).
    tol stops all groups once every err is below it, looked at every `block` iterations, and warns once if n_iter is not
    enough; tol=None runs n_iter iterations and never waits for the device, so that it can be captured in a graph.

    The iterates are those of `sinkhorn_log`, as scalings u, v of a kernel that is exponentiated once per `block`
    (Schmitzer 2019): two matrix-vector products per iteration instead of two passes of exponentials.
    """
    a, b, reg = _weights(a, cost), _weights(b, cost.mT), reg[:, None]
    # Padding takes no part: a potential of -inf there (0 on return), so that it cannot hide a row's or column's maximum.
    g = (torch.zeros_like(b) if g is None else g / reg).masked_fill(b == 0, -torch.inf)
    scaled = cost / reg[:, None]
    for start in range(0, n_iter, block):
        # Shift rows, then columns, to a maximum of exactly 1: no row or column underflows as a whole, none overflows.
        kernel = g[:, None] - scaled                                                # (G, n, m)
        top = kernel.amax(2, keepdim=True).masked_fill_(a[:, :, None] == 0, torch.inf)
        shift = kernel.sub_(top).amax(1, keepdim=True).clamp_min_(-1e30)
        kernel.sub_(shift).exp_()
        u, v, err = _scale(kernel, shift[:, 0].exp(), a, b, min(block, n_iter - start))
        f, g = u.log() - top[:, :, 0], g - shift[:, 0] + v.log()
        if tol is not None and err.max() <= tol:
            break
    else:
        if tol is not None:
            _warn_once("sinkhorn", f"Sinkhorn stopped after n_iter={n_iter} with marginal error {err.max():.1e} > tol={tol:.1e} "
                       f"in {int((err > tol).sum())} of {len(err)} groups ({cost.shape[1]} x {cost.shape[2]}, mean cost up to "
                       f"{(a[:, :, None] * b[:, None] * scaled).sum((1, 2)).max():.0f} reg); raise n_iter, reg or tol. Not repeated.")
    return reg * f.masked_fill(a == 0, 0), reg * g.masked_fill(b == 0, 0), err


def _scale(kernel, v, a, b, n_iter):
    """n_iter Sinkhorn iterations on u, v of the plan diag(a u) kernel diag(b v) -> u (G, n), v (G, m), err (G,)."""
    # Row vectors from the left, for the transpose too: torch's batched matrix times column is 10 times slower on a CPU.
    # The floor acts when a potential moves by 69 reg or more within one block: the next block then goes on from there.
    transposed, a, b, v = kernel.mT, a[:, None], b[:, None], v[:, None]             # views: (G, m, n), (G, 1, n), (G, 1, m)
    row = torch.bmm(b * v, transposed).clamp_min_(1e-30)                            # (G, 1, n) = kernel (b v)
    for _ in range(n_iter):
        col = torch.bmm(a / row, kernel).clamp_min_(1e-30)                          # (G, 1, m), then u = 1 / row, v = 1 / col
        row = torch.bmm(b / col, transposed).clamp_min_(1e-30)
    u, v = 1 / row, 1 / col
    err = (b * (v * torch.bmm(a * u, kernel) - 1).abs()).sum(-1)
    return u[:, 0], v[:, 0], err[:, 0]


@_precise
def sinkhorn_self(cost, reg, a=None, h=None, n_iter=50, tol=None):
    """Entropic OT of a cloud to itself: P = a a exp((h + h' - cost) / reg), cost (G, n, n) -> h (G, n), err (G,).

    The averaged update h <- (h + softmin(h)) / 2 keeps the symmetry and needs about ten iterations where the
    alternating one needs hundreds (Feydy et al. 2019). Since the diagonal of cost is 0, a exp(2 h / reg) <= 1: scalings
    u = exp(h / reg) of one fixed kernel never leave [1 / sqrt(n), sqrt(n)], and nothing has to be stabilised.
    """
    a, reg = _weights(a, cost), reg[:, None]
    kernel = (-cost / reg[:, None]).exp_()
    u = torch.ones_like(a) if h is None else (h / reg).clamp(-10, 10).exp()         # h may be that of a far larger reg
    for it in range(n_iter):
        mass = torch.bmm((a * u)[:, None], kernel)[:, 0]                            # (G, n), symmetric: rows = columns
        if tol is not None and it % 5 == 4 and (a * (u * mass - 1).abs()).sum(-1).max() <= tol:
            break
        u = (u / mass.clamp_min(1e-30)).sqrt().masked_fill(a == 0, 1)               # far padding, that nothing reaches, would overflow
    err = (a * (u * torch.bmm((a * u)[:, None], kernel)[:, 0] - 1).abs()).sum(-1)
    if tol is not None and err.max() > tol:
        _warn_once("self", f"self-transport stopped after n_iter={n_iter} with marginal error {err.max():.1e} > tol={tol:.1e}; "
                   "raise n_iter, reg or tol. Not repeated.")
    return reg * u.log(), err


def plan(cost, f, g, reg, a=None, b=None):
    """The coupling (G, n, m) of potentials f (G, n) and g (G, m); its rows sum to a, its columns to b."""
    a, b = _weights(a, cost).log(), _weights(b, cost.mT).log()                      # -inf on padding, whatever the cost is there
    return (a[:, :, None] + b[:, None, :] + (f[:, :, None] + g[:, None, :] - cost) / reg[:, None, None]).exp()


def _dual(cost, f, g, reg, a, b):
    """Dual value <a, f> + <b, g> - reg (mass - 1) (G,). With f, g constants its gradient in cost is the plan: that of OT."""
    return (a * f).sum(-1) + (b * g).sum(-1) - reg * (plan(cost, f, g, reg, a, b).sum((1, 2)) - 1)


@_precise
def sinkhorn_divergence(x, y, reg, a=None, b=None, n_iter=1000, tol=1e-6):
    """S_reg(x, y) = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2 (G,), non-negative, zero only for equal clouds.

    x (G, n, C), y (G, m, C); reg absolute, a number or (G,). Differentiable in x and y (envelope theorem). Equals
    `ot.solve_sample(x, y, reg=reg, debias=True).value` of POT. Feydy et al. 2019.
    """
    a, b = _weights(a, x), _weights(b, y)
    reg = torch.as_tensor(reg, dtype=x.dtype, device=x.device).expand(len(x))
    x, y, _ = _from_middle(x, y, a, b)
    xy, xx, yy = sq_cost(x, y), sq_cost(x, x), sq_cost(y, y)
    with torch.no_grad():
        f, g, _ = sinkhorn(xy, reg, a, b, n_iter=n_iter, tol=tol)
        p, _ = sinkhorn_self(xx, reg, a, n_iter=n_iter, tol=tol)
        q, _ = sinkhorn_self(yy, reg, b, n_iter=n_iter, tol=tol)
    return _dual(xy, f, g, reg, a, b) - (_dual(xx, p, p, reg, a, a) + _dual(yy, q, q, reg, b, b)) / 2


@_precise
def barycentric_map(x, y, reg, a=None, b=None, debias=True, n_iter=100, tol=1e-3, warm=None):
    """The debiased entropic map T(x_j) = x_j + [sum_l P_xy(j, l) y_l - sum_l P_xx(j, l) x_l] / a_j  (Alg. 1 line 7).

    T(x) - x = -(1 / (2 a)) dS_reg / dx. x (G, n, C), y (G, m, C), reg (G,) absolute; warm: potentials {"g", "h"} of a
    similar problem. Returns T(x) (G, n, C) and {"f", "g", "h", "err"}. debias=False leaves the second sum out and x too.
    """
    a, b, warm = _weights(a, x), _weights(b, y), warm or {}
    g = warm.get("g")
    if g is None:  # start from the exact potential of a translation, so that where the clouds lie costs no iterations
        mean_x, mean_y = (a[..., None] * x).sum(1, keepdim=True), (b[..., None] * y).sum(1, keepdim=True)
        g = 2 * ((y - mean_y) * (mean_y - mean_x)).sum(-1)
    cost = sq_cost(x, y)
    f, g, err = sinkhorn(cost, reg, a, b, g, n_iter, tol)
    to = _attend(cost, g, reg, b, y)
    if not debias:
        return to, {"f": f, "g": g, "err": err}
    cost = sq_cost(x, x)
    h, _ = sinkhorn_self(cost, reg, a, warm.get("h"), n_iter, tol)
    return x + to - _attend(cost, h, reg, a, x), {"f": f, "g": g, "h": h, "err": err}


def _attend(cost, h, reg, w, values):
    """sum_l softmax_l((h_l - cost_jl) / reg + log w_l) values_l: a plan's rows, normalised, times the points (G, n, C)."""
    return torch.bmm(((h[:, None] - cost) / reg[:, None, None] + w.log()[:, None]).softmax(-1), values)


def _mean_cost(x, y, a, b):
    """Mean of || x - y ||^2 under a x b (G,), without the matrix; the smallest normal number where all points coincide."""
    mean = (a[..., None] * x).sum(1), (b[..., None] * y).sum(1)
    spread = [(w[..., None] * (p - q[:, None]).square()).sum((1, 2)) for p, w, q in zip((x, y), (a, b), mean)]
    return (spread[0] + spread[1] + (mean[0] - mean[1]).square().sum(-1)).clamp_min(torch.finfo(x.dtype).tiny * 1e4)


# ---------------------------------------------------------------------------- maps: fit on clouds, apply to new points
# fit_*(x (G, n, C), y (G, m, C), a (G, n), b (G, m), cfg, warm) -> state: a dict of tensors (G, ...); `_fit` adds T(x)
# apply_*(state, c (G, n, C), cfg) -> T(c) (G, n, C), each point on its own: what it returns never depends on the others
# The caller has moved the origin to the middle of the targets, where squared distances do not cancel.

def fit_sinkhorn(x, y, a, b, cfg, warm=None):
    reg = cfg.reg * _mean_cost(x, y, a, b)
    to, pot = barycentric_map(x, y, reg, a, b, cfg.debias, cfg.n_iter, cfg.tol, warm)
    return {"to": to, "x": x, "a": a, "y": y, "b": b, "reg": reg} | {name: pot[name] for name in ("g", "h") if name in pot}


def freeze_sinkhorn(s):
    """All of a state of `fit_sinkhorn` that `apply_sinkhorn` needs: the points, and what does not depend on c."""
    reg = s["reg"][:, None]
    bias = lambda h, y, w: (h - y.square().sum(-1)) / reg + w.log()                 # (h_l - |y_l|^2) / reg + log w_l (G, n)
    frozen = {"y": s["y"], "bias_y": bias(s["g"], s["y"], s["b"]), "reg": s["reg"]}
    if "h" in s:
        frozen |= {"x": s["x"], "bias_x": bias(s["h"], s["x"], s["a"]), "n": (s["a"] > 0).sum(-1).to(reg)}
    return frozen


def apply_sinkhorn(s, c, cfg):
    # CHOICE(coupling): frozen mode evaluates the entropic maps out of sample: every image is
    # refined alone, by what calibration kept; alternative: the literal batch-coupled solve; `bind(group, coupled=True)`
    s = freeze_sinkhorn(s) if "g" in s else s
    scaled = c * (2 / s["reg"])[:, None, None]                                      # 2 c y / reg - |c|^2 / reg + bias = log of the kernel
    to = torch.bmm(torch.baddbmm(s["bias_y"][:, None], scaled, s["y"].mT).softmax(-1), s["y"])
    if "x" not in s:
        return to
    # T_cc(c): the self-transport of the calibration cloud with c added. a exp(2 h / reg) <= 1 bounds the exponentials
    # by sqrt(n), so nothing overflows; far from the cloud they vanish, u -> sqrt(n + 1) and T_cc(c) -> c.
    n = s["n"][:, None, None]                                                       # (G, 1, 1)
    row = n.log() - (c * scaled).sum(-1, keepdim=True) / 2
    e = torch.baddbmm(s["bias_x"][:, None], scaled, s["x"].mT).add_(row).exp_()
    total = e.sum(-1, keepdim=True)                                                 # (G, n, 1)
    u = 2 * (n + 1) / (total + (total.square() + 4 * (n + 1)).sqrt())               # solves u (total + u) = n + 1
    # c + to - (e x + u c) / (total + u), and c - u c / (total + u) = c total / (total + u)
    return to + (c * total - torch.bmm(e, s["x"])) / (total + u)


def fit_gaussian(x, y, a, b, cfg, warm=None):
    """The exact map of N(mean_x, S) to N(mean_y, T), mean_y + A (c - mean_x) with A S A = T, A symmetric; in float64.

    Both covariances are shrunk (`_shrunk`) towards a common shape, each keeping its scale, so that scale is corrected
    from few particles, directions from many, and a group of one condition, or of one target, gets a pure mean shift.
    """
    dtype, (x, y, a, b) = x.dtype, (t.double() for t in (x, y, a, b))
    (mx, x, n), (my, y, m) = _centered(x, a), _centered(y, b)
    span = torch.cat([x, y], 1)                                                     # (G, n + m, C)
    basis = torch.linalg.qr(span.mT)[0] if span.shape[1] < span.shape[2] else None  # (G, C, r): all that is known
    x, y = (x, y) if basis is None else (x @ basis, y @ basis)
    s, t, eye = x.mT @ x, y.mT @ y, torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)     # (G, r, r) scatter
    pooled = (s + t) / (n + m - 2).clamp_min(1e-9)
    pooled = pooled + (1e-3 * _trace(pooled) + 1e-30) / len(eye) * eye              # invertible at any n and m
    s, t = _shrunk(s, n, pooled, cfg.shrink), _shrunk(t, m, pooled, cfg.shrink)
    root = torch.linalg.cholesky(s)                                                 # A = L^-T (L^T T L)^1/2 L^-1
    w, v = torch.linalg.eigh(root.mT @ t @ root)
    inner = (v * w.clamp_min(0).sqrt()[:, None]) @ v.mT
    matrix = torch.linalg.solve_triangular(root.mT, inner, upper=True)
    matrix = torch.linalg.solve_triangular(root.mT, matrix.mT, upper=True)          # inner and A are symmetric
    if basis is not None:
        full = torch.eye(basis.shape[1], dtype=x.dtype, device=x.device)
        matrix = full + basis @ (matrix - eye) @ basis.mT                           # elsewhere nothing is known: identity
    return {"mean_x": mx[:, 0].to(dtype), "mean_y": my[:, 0].to(dtype), "matrix": matrix.to(dtype)}


def _centered(x, a):
    """Mean (G, 1, C), centred points times sqrt(n a) (scatter = x^T x) and effective count n = 1 / sum a^2 (G, 1, 1)."""
    mean, n = (a[..., None] * x).sum(1, keepdim=True), 1 / a.square().sum(-1)[:, None, None]
    return mean, (x - mean) * (n * a[..., None]).sqrt(), n


def _trace(s):
    return s.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]


def _shrunk(scatter, n, pooled, shrink):
    """Covariance of a scatter matrix of n points, shrunk towards the pooled one rescaled to its own trace.

    The weight is `shrink` times the least-squares optimum for a Gaussian sample, E|cov - Sigma|^2 / |cov - prior|^2
    with E|cov - Sigma|^2 = (tr^2 Sigma + tr Sigma^2) / (n - 1) (Ledoit & Wolf 2004, here with a fixed prior). The pooled
    one counts as one more point in the trace. At n = 1 the weight is 1 and the covariance the pooled one.
    """
    cov = scatter / (n - 1).clamp_min(1e-9)
    prior = pooled * (_trace(scatter) + _trace(pooled)) / (n * _trace(pooled))
    noise = (_trace(pooled).square() + pooled.square().sum((1, 2), keepdim=True)) / (n - 1).clamp_min(1e-9)
    weight = shrink * noise / (cov - prior).square().sum((1, 2), keepdim=True).clamp_min(1e-300)
    weight = torch.where(n < 1 + 1e-6, torch.ones_like(n), weight.clamp(1e-3, 1))
    return (1 - weight) * cov + weight * prior


def fit_mean(x, y, a, b, cfg, warm=None):
    mean_x, mean_y = (a[..., None] * x).sum(1), (b[..., None] * y).sum(1)
    return {"mean_x": mean_x, "mean_y": mean_y, "scale": torch.ones_like(mean_x)}


def fit_meanvar(x, y, a, b, cfg, warm=None):
    (mx, x, n), (my, y, m) = _centered(x, a), _centered(y, b)
    s, t, n, m = x.square().sum(1), y.square().sum(1), n[:, 0], m[:, 0]             # (G, C) sums of squares, (G, 1) counts
    # The pooled variance counts as one more observation of each, so that, as in the Gaussian map, n = 1 is a mean shift.
    pooled = (s + t) / (n + m - 2).clamp_min(1e-6) + torch.finfo(x.dtype).tiny
    return {"mean_x": mx[:, 0], "mean_y": my[:, 0], "scale": ((t + pooled) * n / ((s + pooled) * m)).sqrt()}


def apply_affine(s, c, cfg):
    c = c - s["mean_x"][:, None]
    return s["mean_y"][:, None] + (torch.bmm(c, s["matrix"]) if "matrix" in s else c * s["scale"][:, None])


def fit_ema(x, y, a, b, cfg, warm=None):
    w = b * cfg.ema_decay ** torch.arange(y.shape[1] - 1, -1, -1, device=y.device, dtype=y.dtype)
    return {"ideal": (w[..., None] * y).sum(1) / w.sum(-1, keepdim=True)}


def apply_ema(s, c, cfg):
    return s["ideal"][:, None].expand_as(c)


def fit_knn(x, y, a, b, cfg, warm=None):
    return {"y": y, "b": b}


def apply_knn(s, c, cfg):
    cost = sq_cost(c, s["y"]).masked_fill((s["b"] == 0)[:, None], torch.inf)
    near, which = cost.topk(min(cfg.neighbors, cost.shape[-1]), largest=False)      # (G, n, k)
    w = near.isfinite().to(c)
    return torch.zeros_like(cost).scatter_(-1, which, w / w.sum(-1, keepdim=True)) @ s["y"]


MAPS = {"sinkhorn": (fit_sinkhorn, apply_sinkhorn), "gaussian": (fit_gaussian, apply_affine), "mean": (fit_mean, apply_affine),
        "meanvar": (fit_meanvar, apply_affine), "ema": (fit_ema, apply_ema), "knn": (fit_knn, apply_knn)}


def _fit(method, x, y, a, b, cfg, warm=None):
    state = MAPS[method][0](x, y, a, b, cfg, warm)
    return (state.pop("to") if "to" in state else MAPS[method][1](state, x, cfg)), state


@_precise
def fit(x, y, cfg, a=None, b=None, method=None):
    """Fit the map `method` (None: cfg.method) from conditions x (G, n, C) to targets y (G, m, C) with weights a, b.

    Returns T(x) and a state for `apply`: a dict of tensors of leading dimension G. Raises ValueError on points that are
    not finite, empty groups and unequal dimensions.
    """
    _check_cloud("conditions", x, a)
    _check_cloud("targets", y, b)
    if x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2]:
        raise ValueError(f"conditions {tuple(x.shape)} and targets {tuple(y.shape)} must agree in groups and dimension")
    a, b = _weights(a, x), _weights(b, y)
    x, y, origin = _from_middle(x, y, a, b)
    to, state = _fit(method or cfg.method, x, y, a, b, cfg)
    return to + origin, state | {"origin": origin}


@_precise
def apply(c, state, group, cfg, method=None):
    """T(c) for new conditions c (B, C) of groups `group` (B,), each on its own, by a state of `fit`."""
    rows = _Rows(group)
    state = {name: v[rows.present] for name, v in state.items()}
    origin = state.pop("origin")
    return rows.back(MAPS[method or cfg.method][1](state, rows.pad(c[:, None]) - origin, cfg) + origin, 1)[:, 0]


def _check_cloud(name, x, w):
    if not x.isfinite().all():
        raise ValueError(f"{int((~x.isfinite()).sum())} of {x.numel()} values of the {name} are not finite: "
                         "look for the NaN upstream (learning rate, half-precision overflow, a young checkpoint)")
    if x.shape[1] == 0 or (w is not None and (w.sum(-1) <= 0).any()):
        empty = list(range(len(x))) if x.shape[1] == 0 else (w.sum(-1) <= 0).nonzero()[:, 0].tolist()
        raise ValueError(f"groups {empty} have no {name}: give every group at least one, or leave these groups out")


# ---------------------------------------------------------------------------- the gradient flow

def jko_step(c, to, eta, lam=0.0, a=None, implicit=True):
    """One JKO step of F from c with the map `to` = T_k(c) and a = T^-1(x) held fixed, all (..., C)  (Alg. 1 line 8).

    Implicit: the minimiser (c + 2 eta (T + lam a)) / (1 + 2 eta (1 + lam)); with lam = 0 and the exact map W2 shrinks
    by 1 / (1 + 2 eta). Explicit: the gradient step, |1 - 2 eta|. eta None is the whole map (implicit, eta infinite).
    """
    if eta == 0:
        return c
    pull = to + lam * a if lam > 0 else to
    if eta is None:
        return pull / (1 + lam)
    if implicit:
        return (c + 2 * eta * pull) / (1 + 2 * eta * (1 + lam))
    return c - 2 * eta * ((1 + lam) * c - pull)


def energy(c, y, reg, lam=0.0, a=None, w=None, b=None, **kwargs):
    """F = W2^2(P_c, P_c*) + lam E || c - a ||^2 per group (G,); W2^2 is estimated by S_reg, reg relative to the mean cost.

    c, a (G, n, C); y (G, m, C); weights w (G, n), b (G, m).
    """
    w, b = _weights(w, c), _weights(b, y)
    value = sinkhorn_divergence(c, y, reg * _mean_cost(c, y, w, b), w, b, **kwargs)
    return value + lam * (w * (c - a).square().sum(-1)).sum(-1) if lam > 0 else value


class _Rows:
    """The rows of a batch sorted into groups: (B, P, C) <-> (G' P, n, C), one transport problem per group and slot."""

    def __init__(self, group):
        self.present, back, count = group.unique(return_inverse=True, return_counts=True)
        order = back.argsort(stable=True)
        place = torch.arange(len(group), device=group.device) - (count.cumsum(0) - count)[back[order]]
        self.width = int(count.max())
        self.where = torch.empty_like(back)
        self.where[order] = back[order] * self.width + place                        # (B,) in the flattened (G', n)
        # Padding repeats a group's first row, so that it is finite; its weight is zero.
        self.index = order[count.cumsum(0) - count][:, None].repeat(1, self.width).flatten()
        self.index[self.where] = torch.arange(len(group), device=group.device)
        self.weight = torch.zeros(len(count) * self.width, device=group.device)
        self.weight[self.where] = 1.0
        self.weight, self.count, self.batch_count = self.weight.view(-1, self.width), count, count[back]

    def pad(self, c):
        c = c[self.index].unflatten(0, (-1, self.width))                            # (G', n, P, C)
        return c.transpose(1, 2).flatten(0, 1)                                      # (G' P, n, C)

    def back(self, x, slots):
        x = x.unflatten(0, (-1, slots)).transpose(1, 2).flatten(0, 1)               # (G' n, P, C)
        return x[self.where]                                                        # (B, P, C)


class Refiner:
    """Moves the conditions of each AR step to the distribution of the ideal ones (Alg. 1 lines 3 to 8).

    targets: a list over AR steps of (G, P_i, m, C), ideal conditions of G groups (a class, or a class and an order) in
    the P_i token slots of the step (1 for AR, several for MAR), or None at a step that is not to be refined (the first
    step of a chain has no sampled context, hence no error). weights (G, m): zero where a group has fewer than m. axes: a
    list over AR steps of (C, r), the directions to transport in if cfg.rank asks for some; default: `principal_axes` of
    the targets, so that a group's map depends on the other groups that are there.

        refiner = Refiner(targets, cfg)
        refine = refiner.calibrate(group)           # run a chain with it: refined, and what it needs is recorded
        refine = refiner.bind(group)                # from then on each image is refined on its own (frozen)
        refine = refiner.bind(group, coupled=True)  # the literal algorithm: plans between the images of the batch
        c = refine(i, c)                            # (B, P_i, C) -> the same shape and dtype, at AR step i
    """
    # CHOICE(target): P_c* = teacher-forced conditions at the same step and group, so that refinement undoes exposure bias;
    # alternative: a FIFO of conditions collected in training; the caller's choice of `targets`
    # CHOICE(classes): a group never exchanges mass with another, so that transport keeps the class; alternative: one
    # problem for all; cfg.pooled
    # CHOICE(orders): a group may be a (class, order) pair, since a MAR condition depends on which patches are known;
    # alternative: orders pooled in one group; the caller's choice of `group`
    # CHOICE(guidance): the caller passes conditional rows only: null conditions have no ideal distribution by class;
    # alternative: the null condition moves along with the conditional one; the caller's choice

    LAYOUT = 2                                  # of state_dict: a file of another one has to be calibrated anew

    def __init__(self, targets, cfg, weights=None, axes=None):
        self.cfg, self.trace = cfg, None        # trace: set to a list, and coupled steps append what plots need
        self.n_steps = len(targets)
        self.targets, self.basis, self.origin = {}, {}, {}
        store = getattr(torch, cfg.store)
        for i, y in enumerate(targets):
            if y is None or not cfg.window[0] <= i / self.n_steps < cfg.window[1] or not cfg.stages():
                continue
            if y.ndim != 4:
                raise ValueError(f"targets[{i}] has shape {tuple(y.shape)}, expected (groups, slots, m, C)")
            y = y[:, :, :cfg.m or None]
            ones = torch.ones(y.shape[0], y.shape[2], device=y.device)
            self.weights = ones if weights is None else weights[:, :y.shape[2]].float()
            _check_cloud(f"targets of step {i}", y.flatten(1, 2), None if weights is None else self.weights)
            y = y if y.dtype == torch.float64 else y.float()
            if cfg.rank_of(y.shape[-1]) < y.shape[-1]:
                # CHOICE(space): transport in the leading principal directions of the step's targets, the complement is
                # left untouched: as good as all, memory and time fall; alternative: all directions; cfg.rank=0
                self.basis[i] = principal_axes(y, self.weights, cfg.rank_of(y.shape[-1])) if axes is None else axes[i]
                y = y @ self.basis[i]
            # CHOICE(pooling): one problem per group, or one for all (a condition holds its class; needs a smaller reg);
            # alternative: pooled clouds, for many classes; cfg.pooled
            y = y.transpose(0, 1).flatten(1, 2)[None] if cfg.pooled else y          # (G, P, m, C) or (1, P, G m, C)
            w = self.weights.view(len(y), 1, -1, 1).to(y)
            self.origin[i] = (w * y).sum(2, keepdim=True) / w.sum(2, keepdim=True)  # (G, P, 1, C): distances cancel far from the origin
            y = (y - self.origin[i]) * (w > 0)
            self.targets[i] = y if y.dtype == torch.float64 else y.to(store)
            _check_cloud(f"targets of step {i} as {cfg.store}", self.targets[i], None)
        self.states = {}                        # {i: [state of stage k]}, filled by calibrate
        self.done = {}                          # {i: (G,) calibrated?}

    def bind(self, group, coupled=False):
        """group (B,) in [0, G) of each row of the batch -> refine(i, c (B, P_i, C), inverse=None).

        inverse(c) -> a (B, P_i, C) is T^-1(x_hat(c)) of Alg. 1 lines 4-6, called in each of the K steps if lam > 0.
        Frozen (default) needs `calibrate` before, and any batch will do. Coupled needs many rows per group: the noise of
        n samples is transported away with the error (n = 1 goes towards the mean of the targets), so groups of less than
        cfg.min_particles stay as they are, with a warning. Raises ValueError for groups that are unknown or not calibrated.
        """
        rows, share = self._rows(group)
        short = rows.count < self.cfg.min_particles
        if not coupled:
            for i in self.targets:
                ok = self.done[i][rows.present] if i in self.done else torch.zeros_like(rows.present, dtype=torch.bool)
                if not ok.all():
                    raise ValueError(f"step {i}: groups {rows.present[~ok].tolist()} are not calibrated: run a chain with "
                                     "refine = refiner.calibrate(group) that has them, or bind(group, coupled=True)")
        elif self.targets and short.any():
            _warn_once("few", f"coupled refinement leaves {int(short.sum())} of {len(short)} groups as they are: they have "
                       f"{int(rows.count.min())} or more conditions in the batch, min_particles={self.cfg.min_particles}; "
                       "use frozen mode or larger batches per group. Not repeated.")
        keep = (rows.batch_count < self.cfg.min_particles)[:, None, None] if coupled and short.any() else None
        return functools.partial(self._refine, rows, share, "coupled" if coupled else "frozen", keep)

    def calibrate(self, group):
        """As bind(coupled=True), and records what frozen mode needs. Groups may be covered in several calls (chunks).

        Raises ValueError on too few conditions in a group, and on missing groups if pooled (one problem, one call).
        """
        rows, share = self._rows(group)
        if self.cfg.pooled and self.targets and len(group.unique()) < len(self.weights):
            raise ValueError(f"pooled calibration met {len(group.unique())} of {len(self.weights)} groups: give all in one call")
        if rows.count.min() < self.cfg.min_particles:
            raise ValueError(f"calibration has a group of {int(rows.count.min())} conditions, expected at least "
                             f"min_particles={self.cfg.min_particles} in each (100 or more are better): use a larger batch")
        return functools.partial(self._refine, rows, share, "record", None)

    def _rows(self, group):
        n_groups = len(self.weights) if self.targets else 1 + int(group.max())
        if group.ndim != 1 or group.min() < 0 or group.max() >= n_groups:
            raise ValueError(f"group must be (B,) in [0, {n_groups}), got shape {tuple(group.shape)}, "
                             f"{int(group.min())} to {int(group.max())}: no targets for the others")
        if not self.targets:
            return _Rows(group), None
        w = self.weights / self.weights.sum(-1, keepdim=True)                       # (G, m)
        if not self.cfg.pooled:
            rows = _Rows(group)
            return rows, w[rows.present]
        # One problem: targets count by the share of their class in the batch, else transport would change classes.
        share = torch.bincount(group, minlength=n_groups).to(w) / len(group)
        return _Rows(torch.zeros_like(group)), (w * share[:, None]).view(1, -1)

    @torch.no_grad()
    def _refine(self, rows, b, mode, keep, i, c, inverse=None):
        """Alg. 1 lines 3-8 at AR step i for c (B, P, C)."""
        if i not in self.targets:
            return c
        cfg, slots, dtype = self.cfg, c.shape[1], torch.float64 if c.dtype == torch.float64 else torch.float32
        present = lambda v: v if len(rows.present) == len(v) else v[rows.present]   # a copy only where groups are missing
        y = present(self.targets[i]).flatten(0, 1).to(dtype)                        # (G' P, m, r)
        axes = self.basis.get(i)                                                    # (C, r), or None
        dim = y.shape[-1] if axes is None else len(axes)
        if c.ndim != 3 or c.shape[1:] != (self.targets[i].shape[1], dim):
            raise ValueError(f"step {i}: conditions {tuple(c.shape)}, expected (B, {self.targets[i].shape[1]}, {dim}) as in the targets")
        if cfg.lam > 0 and inverse is None:
            raise ValueError(f"lam={cfg.lam} needs inverse=, a function c -> T^-1(x_hat(c)); or set lam=0")
        with _exact(c):
            full, origin = c.to(dtype), present(self.origin[i]).flatten(0, 1).to(dtype)
            down = lambda v: rows.pad(v if axes is None else v @ axes.to(dtype)) - origin
            up = lambda v: full + (v - low if axes is None else (v - low) @ axes.to(dtype).mT)
            z = down(full)                                                          # (G' P, n, r)
            low = rows.back(z, slots)
            a, b = rows.weight.to(dtype).repeat_interleave(slots, 0), b.to(dtype).repeat_interleave(slots, 0)
            a, state = a / a.sum(-1, keepdim=True), None
            for k, (method, eta) in enumerate(cfg.stages()):                        # Alg. 1 line 3
                # CHOICE(inverse): a = T^-1 of the denoiser's one-evaluation x0 under the current c, from the caller;
                # alternative: a whole trajectory per k, the paper's literal text; the caller's --inverse
                ideal = down(inverse(up(rows.back(z, slots)).to(c.dtype)).to(dtype)) if cfg.lam > 0 else None
                if mode == "frozen":
                    state = {n: present(v).flatten(0, 1).to(dtype) for n, v in self.states[i][k].items()} | {"y": y}
                    to = MAPS[method][1](state, z, cfg)
                else:
                    if mode == "record" and dtype == torch.float32:
                        z = z.to(getattr(torch, cfg.store)).to(dtype)               # fit to what is stored
                    if mode == "record" or k == 0:
                        _check_cloud(f"conditions of step {i}", z, None)
                    to, state = _fit(method, z, y, a, b, cfg, state)                # line 7
                    self._note(i, k, mode, rows, slots, state, z, to, ideal, y, a, b, origin)
                z = jko_step(z, to, eta, cfg.lam, ideal, cfg.implicit)              # line 8
            out = up(rows.back(z, slots)).to(c.dtype)
        if mode == "record":
            self.done.setdefault(i, torch.zeros(len(self.targets[i]), dtype=torch.bool, device=c.device))[rows.present] = True
        return out if keep is None else torch.where(keep, c, out)

    def _note(self, i, k, mode, rows, slots, state, z, to, ideal, y, a, b, origin):
        """Record one fitted stage for frozen mode ("record") and for plots (`trace`)."""
        if mode == "record":
            state = freeze_sinkhorn(state) if "g" in state else state
            stages = self.states.setdefault(i, [])
            if len(stages) == k:
                stages.append({})
            for name, v in state.items():
                if name == "y":                 # targets are kept once per step, not per stage
                    continue
                v = v.unflatten(0, (-1, slots)).to(getattr(torch, self.cfg.store) if name == "x" else v.dtype)
                old = stages[k].get(name, v.new_zeros(len(self.targets[i]), *v.shape[1:]))
                if name in ("x", "bias_x"):     # (G, P, n, ...): chunks may differ in n
                    pad = lambda t, n: F.pad(t, [0, 0] * (t.ndim - 3) + [0, n - t.shape[2]], value=0 if name == "x" else -torch.inf)
                    width = max(old.shape[2], v.shape[2])
                    old, v = pad(old, width), pad(v, width)
                old[rows.present] = v
                stages[k][name] = old
        if self.trace is not None:
            entry = {"i": i, "k": k, "c": z + origin, "target": y + origin, "to": to + origin, "weight": a, "state": state}
            entry["divergence"] = energy(z, y, self.cfg.reg, w=a, b=b, tol=1e-3)
            entry["energy"] = energy(z, y, self.cfg.reg, self.cfg.lam, ideal, a, b, tol=1e-3)
            self.trace.append(entry)

    def nbytes(self):
        """Bytes of targets and frozen state: what a GPU must hold to refine."""
        parts = [*self.targets.values(), *(v for s in self.states.values() for stage in s for v in stage.values())]
        return sum(v.numel() * v.element_size() for v in parts)

    def state_dict(self):
        """Plain dict of tensors, numbers and strings: torch.save it, torch.load(weights_only=True) it."""
        return {"cfg": asdict(self.cfg), "n_steps": self.n_steps, "targets": self.targets, "basis": self.basis, "origin": self.origin,
                "weights": getattr(self, "weights", None), "states": self.states, "done": self.done}

    @classmethod
    def load(cls, saved):
        """The refiner of a state_dict, calibrated as it was."""
        self = cls([], RefineConfig(**saved["cfg"]))
        self.n_steps, self.weights = saved["n_steps"], saved["weights"]
        for name in ("targets", "basis", "origin", "states", "done"):
            setattr(self, name, saved[name])
        return self


def principal_axes(y, w, rank):
    """The `rank` leading principal axes (C, r) of targets y (G, P, m, C) with weights w (G, m), all groups and slots in one cloud."""
    w = (w / w.sum())[:, None, :, None].to(y)
    y = y - (w * y).sum((0, 2)).mean(0)
    cov = torch.einsum("gpmc,gpmd->cd", (w * y).double(), y.double())
    return torch.linalg.eigh(cov)[1][:, -rank:].flip(-1).to(y)


class ConditionBuffer(nn.Module):
    """The paper's other source of targets: conditions collected during training, per class and position.

    A ring of `m` per (class, position): FIFO if decay = 0, else each entry is an exponential moving average of those
    that fell on it. store (num_classes + 1, n_positions, m, C) float16; count (num_classes + 1, n_positions), how many
    came; the last class is the null class of guidance, kept only so that no row of a batch needs sorting out.
    """

    def __init__(self, num_classes, n_positions, m, cond_dim, decay=0.0):
        super().__init__()
        self.decay = decay
        self.register_buffer("store", torch.zeros(num_classes + 1, n_positions, m, cond_dim, dtype=torch.float16))
        self.register_buffer("count", torch.zeros(num_classes + 1, n_positions, dtype=torch.long))

    @torch.no_grad()
    def push(self, c, pos, y):
        """Adds conditions c (B, n, C) of positions pos (B, n) and classes y (B,)."""
        key, order = (y[:, None] * self.store.shape[1] + pos).flatten().sort(stable=True)       # (B n,)
        c = c.flatten(0, 1)[order].float()
        rank = torch.arange(len(key), device=key.device) - torch.searchsorted(key, key)         # within its run of equal keys
        store, count, m = self.store.flatten(0, 1), self.count.flatten(), self.store.shape[2]
        place = count[key] + rank
        keep = self.decay * (place >= m)[:, None]
        store[key, place % m] = (keep * store[key, place % m] + (1 - keep) * c).half()
        count.index_add_(0, key, torch.ones_like(key))

    def targets(self):
        """Particles (num_classes, n_positions, m, C) fp32; ValueError if some class or position has seen fewer than m."""
        short = self.count[:-1] < self.store.shape[2]
        if short.any():
            k, i = short.nonzero()[0].tolist()
            raise ValueError(f"the buffer of class {k}, position {i} holds {int(self.count[k, i])} of {self.store.shape[2]} "
                             "conditions: train longer, or with a smaller --buffer")
        return self.store[:-1].float()


class InverseMap(nn.Module):
    """T^-1: the condition that a patch reveals, E[c_i given x_i], learned by regression beside the model.

    x (..., D) clean patches, i (...) their positions in [0, n_positions) -> (..., C).
    """

    def __init__(self, token_dim, cond_dim, n_positions, width=128):
        super().__init__()
        self.position = nn.Embedding(n_positions, width)
        self.inp = nn.Linear(token_dim, width)
        self.net = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, cond_dim))

    def forward(self, x, i):
        return self.net(self.inp(x) + self.position(i))

    def loss(self, x, i, c):
        """Mean squared error against the conditions c (..., C), which get no gradient."""
        return F.mse_loss(self(x, i).float(), c.detach().float())
