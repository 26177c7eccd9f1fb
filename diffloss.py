"""The diffusion loss: a small denoising MLP draws a patch x_i ~ p(x | c_i).

What it is: the head of Li et al. 2024 ("MAR", arXiv 2406.11838, section 3), the Gaussian diffusion
it is trained with, and the samplers. What it is not: it knows nothing of images, transformers or
refinement; everything here acts on tokens x (..., D) under conditions c (..., C).

    x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps                      forward process
    loss = || eps - eps_theta ||^2 + VLB(mean detached)              Improved DDPM, arXiv 2102.09672, eq. 14-16
    x0   = (x_t - sqrt(1 - abar_t) eps_theta) / sqrt(abar_t)         what every sampler starts from
    score(x_t, t, c) = -eps_theta / sqrt(1 - abar_t)

Samplers: ancestral DDPM on a respaced schedule (arXiv 2006.11239, 2102.09672), DDIM (2010.02502),
DPM-Solver++(2M) on a grid that is uniform in logSNR (2211.01095).
"""
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

T_TRAIN = 1000                                   # diffusion steps in training


# ---------------------------------------------------------------- the network

class TimeEmbedding(nn.Module):
    """Diffusion step t (M,) -> (M, width): 128 cosines and 128 sines through a two-layer MLP."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        freq = torch.exp(-math.log(10000) * torch.arange(128, device=t.device, dtype=torch.float32) / 128)
        angle = t.float()[..., None] * freq
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))


def modulate(x, shift, scale):
    return torch.addcmul(shift, x, 1 + scale)


class ResBlock(nn.Module):
    """x + gate * MLP(modulate(LN(x), shift, scale)); shift, scale and gate come from the condition (adaLN)."""

    def __init__(self, width):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x, mod):
        shift, gain, gate = mod                                          # gain = 1 + scale
        return torch.addcmul(x, gate, self.mlp(torch.addcmul(shift, self.in_ln(x), gain)))


class FinalLayer(nn.Module):
    def __init__(self, width, out_dim):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, mod):
        shift, gain = mod
        return self.linear(torch.addcmul(shift, self.norm_final(x), gain))


class DenoisingMLP(nn.Module):
    """eps_theta and the variance fraction of one patch, given the noised patch, t and its condition.

    x_t (..., D), t (...) broadcastable, c (..., C) -> eps (..., D), v (..., D) with v in about [-1, 1].
    Parameter names are those of MAR's released checkpoints.
    """

    def __init__(self, token_dim, cond_dim, width, depth):
        super().__init__()
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(cond_dim, width)
        self.input_proj = nn.Linear(token_dim, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * token_dim)
        self.reset_parameters()

    def reset_parameters(self):
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        for layer in (self.time_embed.mlp[0], self.time_embed.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        # adaLN-zero: each block starts as the identity, the output as zero
        for block in (*self.res_blocks, self.final_layer):
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def modulations(self, y):
        """y = time embedding + projected condition (..., width) -> each block's (shift, 1 + scale, gate), the last without gate."""
        y = F.silu(y)                                                    # once: adaLN_modulation is SiLU, Linear in each block
        mods = [block.adaLN_modulation[1](y) for block in (*self.res_blocks, self.final_layer)]
        parts = [mod.chunk(3, dim=-1) for mod in mods[:-1]] + [mods[-1].chunk(2, dim=-1)]
        return [(shift, 1 + scale, *gate) for shift, scale, *gate in parts]

    def denoise(self, x_t, mods):
        h = self.input_proj(x_t)                                         # (..., width)
        for block, mod in zip(self.res_blocks, mods):
            h = block(h, mod)
        return self.final_layer(h, mods[-1]).chunk(2, dim=-1)            # (..., D), (..., D)

    def embed_time(self, t):
        """(..., width). Training asks for far more rows than there are steps: embed each step once and look it up."""
        if t.numel() <= T_TRAIN:
            return self.time_embed(t)
        return F.embedding(t, self.time_embed(torch.arange(T_TRAIN, device=t.device)))

    def forward(self, x_t, t, c):
        return self.denoise(x_t, self.modulations(self.embed_time(t) + self.cond_embed(c)))

    def along(self, ts, c, rows=1024):
        """forward as a function (x_t, t) of one trajectory whose steps `ts` (a list, in order) and condition are known.

        x_t may lack leading dimensions of c: two branches of guidance (2, M, C) share one x_t (M, D), and what is done to it
        before the first modulation.

        The modulations are 3/5 of the arithmetic and do not depend on x_t: they are computed for as many steps ahead as
        make `rows` rows, in one matrix product. With few rows per step this reads the weights once instead of once per
        step (what it gains: bench.py); with many it changes nothing. c is projected once, as is each t.
        """
        ahead = max(1, rows // c.shape[:-1].numel())
        cond, time = self.cond_embed(c), self.time_embed(on_device(tuple(ts), c.device))
        ready = {}

        def denoise(x_t, t):
            if t not in ready:
                j = ts.index(t)
                ready.clear()
                y = time[j:j + ahead].view(-1, *(1,) * (c.dim() - 1), time.shape[-1]) + cond       # (ahead, ..., width)
                # per block (shift, gain, gate) of `ahead` steps -> per step those of all blocks
                mods = [zip(*(part.unbind(0) for part in mod)) for mod in self.modulations(y)]
                ready.update(zip(ts[j:j + ahead], zip(*mods)))
            return self.denoise(x_t, ready[t])

        return denoise


@lru_cache
def on_device(ts, device):
    """The ints `ts` (a tuple) as a tensor, sent to the device once and not in every AR step: a copy would make the host wait."""
    return torch.tensor(ts, device=device)


# ---------------------------------------------------------------- the schedule

def cosine_betas(n=T_TRAIN):
    """beta_t (n,) float64 of the squared-cosine schedule (Improved DDPM, eq. 17), clipped at 0.999."""
    abar = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - abar[1:] / abar[:-1], 0.999)


def respaced_steps(steps, n=T_TRAIN):
    """`steps` training steps, evenly spread over 0 .. n-1 with both ends kept: int64 (steps,)."""
    if not 1 <= steps <= n:
        raise ValueError(f"{steps} diffusion steps asked for, but 1 to {n} are possible")
    return np.array([round(i * (n - 1) / max(steps - 1, 1)) for i in range(steps)], dtype=np.int64)


class Schedule:
    """Float64 tables of a diffusion whose step j is the training step `timestep_map[j]`.

    Attributes (n,): abar, alpha = sqrt(abar), sigma = sqrt(1 - abar) (in fp32 1 - abar itself would lose
    three digits at t = 0), betas, x0_from_xt and x0_from_eps (x0 = x0_from_xt x_t - x0_from_eps eps),
    mean_x0 and mean_xt (posterior mean = mean_x0 x0 + mean_xt x_t), log_var_min (posterior variance,
    first entry replaced by the second, as it is 0), log_var_max (beta).
    """

    def __init__(self, timestep_map=None):
        full = np.cumprod(1 - cosine_betas())
        self.timestep_map = np.arange(T_TRAIN) if timestep_map is None else np.asarray(timestep_map)
        self.abar = full[self.timestep_map]
        self.alpha, self.sigma = self.abar ** 0.5, (1 - self.abar) ** 0.5
        prev = np.append(1.0, self.abar[:-1])
        self.betas = 1 - self.abar / prev
        self.x0_from_xt, self.x0_from_eps = self.abar ** -0.5, (1 / self.abar - 1) ** 0.5
        self.mean_x0 = self.betas * prev ** 0.5 / (1 - self.abar)
        self.mean_xt = (1 - prev) * (1 - self.betas) ** 0.5 / (1 - self.abar)
        var = self.betas * (1 - prev) / (1 - self.abar)
        self.log_var_min = np.log(np.append(var[1], var[1:]) if len(var) > 1 else self.betas)
        self.log_var_max = np.log(self.betas)


@lru_cache
def respaced(steps):
    return Schedule(respaced_steps(steps))


# ---------------------------------------------------------------- the loss

def gaussian_kl(mean1, log_var1, mean2, log_var2):
    """KL(N(mean1, var1) || N(mean2, var2)) in nats, elementwise."""
    return 0.5 * (log_var2 - log_var1 - 1 + (log_var1 - log_var2).exp() + (mean1 - mean2) ** 2 * (-log_var2).exp())


def discretised_nll(x, mean, log_var):
    """-log P(x) in nats under N(mean, var), where x stands for a bin of width 2/255 (the outermost: open)."""
    cdf = lambda z: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3)))
    centred, inv_std = x - mean, (-0.5 * log_var).exp()
    upper, lower = cdf(inv_std * (centred + 1 / 255)), cdf(inv_std * (centred - 1 / 255))
    p = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return -p.clamp(min=1e-12).log()


class DiffLoss(nn.Module):
    """A denoiser with the training schedule: the loss, the score, the one-evaluation estimate of x0.

    net(x_t, t, c) -> (eps, v). Any module of that form will do: the MLP above, or a whole transformer (CDM).
    """

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.graphs = None                                               # CUDA: {} captures each trajectory of `draw` as one graph
        schedule = Schedule()
        for name in ("alpha", "sigma", "x0_from_xt", "x0_from_eps", "mean_x0", "mean_xt", "log_var_min", "log_var_max"):
            self.register_buffer(name, torch.tensor(getattr(schedule, name), dtype=torch.float32), persistent=False)

    def noised(self, x, t, eps):
        """x_t (..., D) at steps t (...), broadcastable."""
        return self.alpha[t][..., None] * x + self.sigma[t][..., None] * eps

    def forward(self, x, c, t, eps):
        """Loss per token (...) = mse + vb; eps (..., D) fp32, t (...) int64 in 0 .. 999; x (..., D) and c (..., C) broadcast."""
        mse, vb = self.terms(x, c, t, eps)
        return mse + vb

    def terms(self, x, c, t, eps):
        """(mse, vb) per token (...): the squared error of eps, and the variational bound in bits."""
        x_t = self.noised(x, t, eps)
        eps_hat, v = (out.float() for out in self.net(x_t, t, c))
        mse = (eps - eps_hat).square().mean(-1)
        at = lambda table: table[t][..., None]
        # the bound trains the variance alone: the mean is detached, so that MSE decides eps
        x0_hat = at(self.x0_from_xt) * x_t - at(self.x0_from_eps) * eps_hat.detach()
        mean_hat = at(self.mean_x0) * x0_hat + at(self.mean_xt) * x_t
        mean = at(self.mean_x0) * x + at(self.mean_xt) * x_t
        frac = (v + 1) / 2
        log_var = frac * at(self.log_var_max) + (1 - frac) * at(self.log_var_min)
        kl = gaussian_kl(mean, at(self.log_var_min), mean_hat, log_var).mean(-1)
        nll = discretised_nll(x, mean_hat, log_var).mean(-1)
        return mse, torch.where(t == 0, nll, kl) / math.log(2)

    def score(self, x_t, t, c):
        """grad log p_t(x_t | c) (..., D) = -eps_theta / sigma_t."""
        return -self.net(x_t, t, c)[0].float() / self.sigma[t][..., None]

    def x0_hat(self, x_t, t, c, x0_bound=None):
        """E[x0 | x_t, c] (..., D) as the denoiser sees it, within +-x0_bound if given."""
        x0 = self.x0_from_xt[t][..., None] * x_t - self.x0_from_eps[t][..., None] * self.net(x_t, t, c)[0].float()
        return x0 if x0_bound is None else x0.clamp(-x0_bound, x0_bound)

    def denoiser(self, c, c_null=None, cfg_scale=1.0, ts=None):
        """A function (x_t, t: int) -> (eps, v) under c (M, C), for the samplers below.

        With c_null (M, C) both branches run as one batch and eps = eps_null + cfg_scale (eps_c - eps_null);
        v is the conditional branch's (as in MAR). ts: the steps at which it will be called, in order, if they are
        known: the same function, faster (DenoisingMLP.along).
        """
        guided = c_null is not None and (torch.is_tensor(cfg_scale) or cfg_scale != 1.0)
        if ts and hasattr(self.net, "along"):
            net = self.net.along(ts, torch.stack([c, c_null]) if guided else c)
        else:
            both = torch.cat([c, c_null]) if guided else c

            def net(x_t, t):
                x_t = torch.cat([x_t, x_t]) if guided else x_t
                out = self.net(x_t, torch.full(x_t.shape[:1] + (1,) * (x_t.dim() - 2), t, device=x_t.device), both)
                return [z.unflatten(0, (2, -1)) for z in out] if guided else out

        def denoise(x_t, t):
            eps, v = (out.float() for out in net(x_t, t))
            return (torch.lerp(eps[1], eps[0], cfg_scale), v[0]) if guided else (eps, v)

        return denoise

    def draw(self, c, c_null, cfg_scale, sampler, noise, steps):
        """x (..., D) under c (..., C), guided if c_null is given: one trajectory of `steps` evaluations from noise (n_noise, ..., D)."""
        def trajectory(noise, scale, c, c_null=None):
            return sampler(self.denoiser(c, c_null, scale, sampler.timesteps(steps)), noise, steps)

        given = (c,) if c_null is None else (c, c_null)
        if self.graphs is None:
            return trajectory(noise, cfg_scale, *given)
        scale = torch.full((), cfg_scale, device=c.device)                # a tensor, as it changes along the chain
        return replay(self.graphs, (sampler, steps), trajectory, noise, scale, *given)


def replay(graphs, key, fn, *inputs):
    """fn(*inputs) on CUDA as one graph, captured when `key` and the inputs' shapes are first met and kept in the dict `graphs`.

    About 40 kernels per evaluation of a small head take longer to launch than to run; a graph launches them all at once.
    fn must not wait for the device. Weights may change in place, but not move; fn runs twice when it is captured.
    """
    key = (key, *(z.shape for z in inputs), torch.is_autocast_enabled("cuda"))
    if key not in graphs:
        static, side = [z.clone() for z in inputs], torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):                                    # outside the graph: workspaces, tables, cuBLAS
            fn(*static)
        torch.cuda.current_stream().wait_stream(side)
        torch.clear_autocast_cache()                                     # bf16 copies of weights are to live in the graph,
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fn(*static)
        torch.clear_autocast_cache()                                     # and there only
        graphs[key] = graph, static, out
    graph, static, out = graphs[key]
    for z, new in zip(static, inputs):
        z.copy_(new)
    graph.replay()
    return out.clone()


# ---------------------------------------------------------------- samplers

class ImageNoise:
    """One random stream per image, so that image k of a seed is the same in any batch.

    randn(*shape) -> (B, *shape) fp32; rand likewise. `index` lists the images of this batch.
    """

    def __init__(self, seed, index, device="cpu"):
        self.device = torch.device(device)
        # 0x9E3779B97F4A7C15 is 2^64 / golden ratio: far-apart seeds for neighbouring (seed, k)
        key = lambda k: ((int(seed) + 1) * 0x9E3779B97F4A7C15 + int(k) * 0xBF58476D1CE4E5B9) % (1 << 63)
        self.streams = [torch.Generator(self.device).manual_seed(key(k)) for k in index]

    def __len__(self):
        return len(self.streams)

    def randn(self, *shape):
        return torch.stack([torch.randn(shape, generator=g, device=self.device) for g in self.streams])

    def rand(self, *shape):
        return torch.stack([torch.rand(shape, generator=g, device=self.device) for g in self.streams])


@lru_cache
def logsnr_steps(steps):
    """`steps` training steps from t = 990 down to 0, evenly spread in lam = log(alpha / sigma): a list of ints."""
    lam = np.log(respaced(T_TRAIN).alpha / respaced(T_TRAIN).sigma)
    grid = np.linspace(lam[990], lam[0], steps) if steps > 1 else lam[[990]]
    ts = [int(np.abs(lam - value).argmin()) for value in grid]
    for j in reversed(range(steps - 1)):
        ts[j] = max(ts[j], ts[j + 1] + 1)                                # fine grids: never the same step twice
    return ts


SOLVERS = ("ddpm", "ddim", "dpm++")


@dataclass(frozen=True)
class Sampler:
    """How a patch is drawn from its condition.

    solver: ddpm (ancestral), ddim (eta = 0 deterministic, 1 ancestral-like), dpm++ (DPM-Solver++(2M)).
    steps: evaluations of the denoiser per patch; steps_late: if given, the number falls linearly over
      the AR chain from `steps` to this (DiSA, arXiv 2505.20297: late patches are nearly determined).
    temperature: multiplies the fresh noise of ddpm and ddim (eta > 0), and the initial noise of the
      deterministic solvers, which have no other.
    x0_bound: |x0| <= x0_bound in every step; None reproduces MAR exactly.
    """
    solver: str = "ddpm"
    steps: int = 25
    steps_late: int | None = None
    eta: float = 0.0
    temperature: float = 1.0
    x0_bound: float | None = None

    def __post_init__(self):
        if self.solver not in SOLVERS:
            raise ValueError(f"unknown solver {self.solver!r}; choose one of {', '.join(SOLVERS)}")
        for steps in (self.steps, self.steps if self.steps_late is None else self.steps_late):
            respaced_steps(steps)

    def steps_at(self, i, n):
        """Evaluations per patch at AR step i of n."""
        if self.steps_late is None or n < 2:
            return self.steps
        return round(self.steps + (self.steps_late - self.steps) * i / (n - 1))

    @property
    def deterministic(self):
        return self.solver == "dpm++" or (self.solver == "ddim" and self.eta == 0)

    def n_noise(self, steps):
        """How many noise tensors a trajectory of `steps` takes: the initial one, and one per step if random."""
        return 1 if self.deterministic else 1 + steps

    def timesteps(self, steps=None):
        """The training steps t, in order, at which a trajectory calls the denoiser."""
        steps = self.steps if steps is None else steps
        return logsnr_steps(steps) if self.solver == "dpm++" else respaced_steps(steps)[::-1].tolist()

    def __call__(self, denoise, noise, steps=None, trace=None):
        """x0 (M, D) by `steps` calls of denoise(x_t, t) -> (eps, v).

        noise (n_noise, M, D): noise[0] starts the trajectory, noise[1 + j] is the fresh noise of step j.
        trace: a list that receives (t, x_t, x0_hat) of each step.
        """
        steps = self.steps if steps is None else steps
        x = noise[0] * (self.temperature if self.deterministic else 1.0)
        run = {"ddpm": self.ddpm, "ddim": self.ddim, "dpm++": self.dpm_solver}[self.solver]
        return run(denoise, x, noise[1:], steps, trace)

    def predict(self, denoise, x, schedule, j, trace):
        """x0 and the variance fraction at step j of the schedule."""
        # A small head takes no longer than the sampler's own arithmetic, so that every sampler here is written in as few
        # operations as torch allows, and numbers are Python's (numpy's become tensors first, which costs as much as the product).
        eps, v = denoise(x, int(schedule.timestep_map[j]))
        x0 = torch.sub(x * float(schedule.x0_from_xt[j]), eps, alpha=float(schedule.x0_from_eps[j]))
        if self.x0_bound is not None:
            # CHOICE(x0_bound): |x0| is kept within the data's range, because at t = 999 the schedule
            # divides the head's error by sqrt(abar) ~ 5e-5 and young checkpoints give black or NaN images.
            # Alternative: no bound, which is MAR exactly. Flag: --x0_bound (0 = off).
            x0 = x0.clamp(-self.x0_bound, self.x0_bound)
        if trace is not None:
            trace.append((int(schedule.timestep_map[j]), x, x0))
        return x0, v

    def ddpm(self, denoise, x, noise, steps, trace):
        schedule = respaced(steps)
        for j in reversed(range(steps)):
            x0, v = self.predict(denoise, x, schedule, j, trace)
            x = self.ancestral(x, x0, v, schedule, j, noise[steps - 1 - j] if j > 0 else None)
        return x

    def ancestral(self, x, x0, v, schedule, j, noise):
        """x at step j - 1 from x and x0 at step j; no noise at j = 0."""
        x = torch.add(x0 * float(schedule.mean_x0[j]), x, alpha=float(schedule.mean_xt[j]))
        if j == 0:
            return x
        # log std = half the log-variance, which is linear in v, from log_var_min at v = -1 to log_var_max at v = 1
        low, high = float(schedule.log_var_min[j]), float(schedule.log_var_max[j])
        return torch.addcmul(x, (v * ((high - low) / 4) + (high + low) / 4).exp(), noise, value=self.temperature)

    def ddim(self, denoise, x, noise, steps, trace):
        schedule = respaced(steps)
        prev = np.append(1.0, schedule.abar[:-1])
        for j in reversed(range(steps)):
            x0, _ = self.predict(denoise, x, schedule, j, trace)
            # consistent with the bounded x0
            eps = (x * float(schedule.x0_from_xt[j]) - x0) / float(schedule.x0_from_eps[j])
            sigma = self.eta * math.sqrt((1 - prev[j]) / (1 - schedule.abar[j]) * schedule.betas[j])
            x = torch.add(x0 * math.sqrt(prev[j]), eps, alpha=math.sqrt(max(1 - prev[j] - sigma ** 2, 0.0)))
            if j > 0 and sigma > 0:
                x = torch.add(x, noise[steps - 1 - j], alpha=self.temperature * sigma)
        return x

    def dpm_solver(self, denoise, x, noise, steps, trace):
        # Second-order multistep in data prediction. The last evaluation, at t = 0, is itself the answer.
        schedule, ts = respaced(T_TRAIN), logsnr_steps(steps)
        alpha, sigma, lam = schedule.alpha, schedule.sigma, np.log(schedule.alpha / schedule.sigma)
        before, h_before = None, None
        for t, s in zip(ts, ts[1:] + [None]):
            x0, _ = self.predict(denoise, x, schedule, t, trace)
            if s is None:
                return x0
            h = lam[s] - lam[t]
            d = x0 if before is None else torch.lerp(before, x0, float(1 + 0.5 * h / h_before))
            x = torch.sub(x * float(sigma[s] / sigma[t]), d, alpha=float(alpha[s] * math.expm1(-h)))
            before, h_before = x0, h
