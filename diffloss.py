"""The diffusion loss: a small denoising MLP draws a patch x_i ~ p(x | c_i).

The head of Li et al. 2024 ("MAR", arXiv 2406.11838, section 3), the diffusion it is trained with,
and the samplers. All act on tokens x (..., D) under conditions c (..., C) and know nothing of
images, transformers or refinement.

    x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps                      forward process
    loss = || eps - eps_theta ||^2 + VLB(mean detached)              arXiv 2102.09672, eq. 14-16
    x0   = (x_t - sqrt(1 - abar_t) eps_theta) / sqrt(abar_t)         what every sampler starts from
    score(x_t, t, c) = -eps_theta / sqrt(1 - abar_t)

Another objective is another class in OBJECTIVES, with its own `forward` and its own `samplers`: a
solver cannot meet an objective that it does not fit.
"""
import math
from functools import cache, lru_cache
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

T_TRAIN = 1000                                   # diffusion steps in training


# ---------------------------------------------------------------- the network

class TimeEmbedding(nn.Module):
    """Diffusion step t (...) -> (..., width): 128 cosines and 128 sines through a two-layer MLP."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        at = torch.arange(128, device=t.device, dtype=torch.float32)
        angle = t.float()[..., None] * torch.exp(-math.log(10000) * at / 128)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))


class ResBlock(nn.Module):
    """x + gate * MLP(gain * LN(x) + shift); shift, gain, gate come from the condition (adaLN)."""

    def __init__(self, width):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x, mod):
        shift, gain, gate = mod
        h = self.in_ln(x).type_as(x)            # autocast's is fp32, which would spread to all
        return torch.addcmul(x, gate, self.mlp(torch.addcmul(shift, h, gain)))


class FinalLayer(nn.Module):
    def __init__(self, width, out_dim):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, mod):
        shift, gain = mod
        return self.linear(torch.addcmul(shift, self.norm_final(x).type_as(x), gain))


class DenoisingMLP(nn.Module):
    """Noised patch x_t (..., D), step t (...) broadcastable, condition c (..., C) -> eps_theta
    (..., D), variance fraction v (..., D), in about [-1, 1]. Parameters have MAR's names."""

    def __init__(self, token_dim, cond_dim, width, depth):
        super().__init__()
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(cond_dim, width)
        self.input_proj = nn.Linear(token_dim, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * token_dim)
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
        """y = time + condition (..., width) -> (shift, gain = 1 + scale, gate) of each block,
        (shift, gain) of the last layer."""
        y = F.silu(y)                        # once: adaLN_modulation is SiLU, Linear in each block
        parts = [b.adaLN_modulation[1](y).split(y.shape[-1], dim=-1)
                 for b in (*self.res_blocks, self.final_layer)]
        return [(shift, 1 + scale, *gate) for shift, scale, *gate in parts]

    def denoise(self, x_t, mods):
        h = self.input_proj(x_t)                                         # (..., width)
        for block, mod in zip(self.res_blocks, mods):
            h = block(h, mod)
        return self.final_layer(h, mods[-1]).chunk(2, dim=-1)            # (..., D), (..., D)

    def embed_time(self, t):
        """(..., width). Training has far more rows than there are steps: embed each step once."""
        if t.numel() <= T_TRAIN:
            return self.time_embed(t)
        return F.embedding(t, self.time_embed(torch.arange(T_TRAIN, device=t.device)))

    def forward(self, x_t, t, c):
        return self.denoise(x_t, self.modulations(self.embed_time(t) + self.cond_embed(c)))

    def along(self, ts, c):
        """`forward` as a function (x_t, t: int) of one trajectory, whose steps `ts` (a list) and
        condition c (..., C) are known and embedded once. x_t may lack leading dimensions of c: the
        branches of guidance."""
        cond, time = self.cond_embed(c), self.time_embed(on_device(tuple(ts), c.device))
        time = dict(zip(ts, time))
        return lambda x_t, t: self.denoise(x_t, self.modulations(time[t] + cond))


@cache
def on_device(ts, device):
    """The ints `ts` as a tensor, sent to the device once and kept: a copy would make the host wait,
    and a CUDA graph (fast.py) goes on reading it."""
    return torch.tensor(ts, device=device)


# ---------------------------------------------------------------- the schedule

def respaced_steps(steps):
    """`steps` training steps, evenly spread over 0 .. 999 with both ends kept: int64 (steps,)."""
    if not 1 <= steps <= T_TRAIN:
        raise ValueError(f"{steps} diffusion steps asked for, but 1 to {T_TRAIN} are possible")
    k, last = np.arange(steps), T_TRAIN - 1
    return (k * last / (steps - 1)).round().astype(np.int64) if steps > 1 else np.array([last])


class Schedule:
    """Float64 tables of a diffusion in `steps` of the training steps, step j being timestep_map[j].

    Attributes (steps,): abar, alpha = sqrt(abar), sigma = sqrt(1 - abar) (in fp32 1 - abar itself
    would lose three digits at t = 0), betas, x0_from_xt and x0_from_eps (x0 = x0_from_xt x_t -
    x0_from_eps eps), mean_x0 and mean_xt (posterior mean = mean_x0 x0 + mean_xt x_t), log_var_min
    (posterior variance; the first, which is 0, replaced by the second), log_var_max (beta).
    """

    def __init__(self, steps=T_TRAIN):
        self.timestep_map = respaced_steps(steps)
        # betas of the squared cosine (2102.09672, eq. 17), clipped at .999
        full = np.cos((np.arange(T_TRAIN + 1) / T_TRAIN + 0.008) / 1.008 * np.pi / 2) ** 2
        full = np.cumprod(1 - np.minimum(1 - full[1:] / full[:-1], 0.999))
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


respaced = lru_cache(Schedule)


def backwards(steps):
    return respaced_steps(steps)[::-1].tolist()


@lru_cache
def logsnr_steps(steps):
    """`steps` training steps from t = 990 to 0, evenly spread in log(alpha / sigma): ints."""
    respaced_steps(steps)                                   # are they possible?
    lam = np.log(respaced(T_TRAIN).alpha / respaced(T_TRAIN).sigma)
    ts = [int(np.abs(lam - at).argmin()) for at in np.linspace(lam[990], lam[0], steps)]
    for j in reversed(range(steps - 1)):
        ts[j] = max(ts[j], ts[j + 1] + 1)                   # fine grids: never the same step twice
    return [min(t, T_TRAIN - 1 - j) for j, t in enumerate(ts)]


# ---------------------------------------------------------------- samplers
# run(denoise, noise, steps, temperature=1.0, callback=None) -> x0 (..., D)
#   denoise(x_t, t: int) -> x0 (..., D) within its bound, variance fraction v (..., D)
#   noise (n_noise, ..., D): noise[0] starts the trajectory, noise[j] follows the j-th evaluation
#   (after ddpm's last there is none: its last tensor is not read)
#   temperature multiplies the fresh noise or, where there is none, the initial one
#   callback(t, x_t, x0) is called after each evaluation
# A small head costs no more than this arithmetic: few operations, and float(), as torch would make
# tensors of numpy's numbers.

def ddpm(denoise, noise, steps, temperature=1.0, callback=None):
    """Ancestral sampling on a respaced schedule (arXiv 2006.11239, 2102.09672)."""
    s, x = respaced(steps), noise[0]
    for j, t in zip(reversed(range(steps)), backwards(steps)):
        x0, v = denoise(x, t)
        if callback:
            callback(t, x, x0)
        x = torch.add(x0 * float(s.mean_x0[j]), x, alpha=float(s.mean_xt[j]))
        if j > 0:
            # log std = half the log-variance, which is linear in v: log_var_min at -1, max at 1
            low, high = float(s.log_var_min[j]), float(s.log_var_max[j])
            std = (v * ((high - low) / 4) + (high + low) / 4).exp()
            x = torch.addcmul(x, std, noise[steps - j], value=temperature)
    return x


def ddim(denoise, noise, steps, temperature=1.0, callback=None):
    """The deterministic sampler of arXiv 2010.02502 on the same schedule."""
    s, x = respaced(steps), noise[0] * temperature
    prev = [1.0, *s.abar.tolist()]
    for j, t in zip(reversed(range(steps)), backwards(steps)):
        x0, _ = denoise(x, t)
        if callback:
            callback(t, x, x0)
        eps = (x * float(s.x0_from_xt[j]) - x0) / float(s.x0_from_eps[j])   # that of the bounded x0
        x = torch.add(x0 * math.sqrt(prev[j]), eps, alpha=math.sqrt(1 - prev[j]))
    return x


def dpmpp(denoise, noise, steps, temperature=1.0, callback=None):
    """DPM-Solver++(2M), second-order multistep, on a grid uniform in logSNR (arXiv 2211.01095)."""
    s, ts, x = respaced(T_TRAIN), logsnr_steps(steps), noise[0] * temperature
    lam, before, h_before = np.log(s.alpha / s.sigma), None, None
    for t, following in zip(ts, ts[1:] + [None]):
        x0, _ = denoise(x, t)
        if callback:
            callback(t, x, x0)
        if following is None:
            return x0                                    # the evaluation at t = 0 is the answer
        h = lam[following] - lam[t]
        d = x0 if before is None else torch.lerp(before, x0, float(1 + 0.5 * h / h_before))
        ratio, step = float(s.sigma[following] / s.sigma[t]), math.expm1(-h)
        x = torch.sub(x * ratio, d, alpha=float(s.alpha[following] * step))
        before, h_before = x0, h


class Solver(NamedTuple):
    run: Callable                     # one of the functions above
    timesteps: Callable               # steps -> the t's, in order, at which it calls the denoiser
    fresh: int                        # noise tensors per step, beside the initial one


# ---------------------------------------------------------------- the loss

def gaussian_kl(mean1, log_var1, mean2, log_var2):
    """KL(N(mean1, var1) || N(mean2, var2)) in nats, elementwise."""
    ratio = (log_var1 - log_var2).exp()
    return 0.5 * (log_var2 - log_var1 - 1 + ratio + (mean1 - mean2) ** 2 * (-log_var2).exp())


def discretised_nll(x, mean, log_var):
    """-log P(x) in nats under N(mean, var); x stands for a bin of width 2/255, open at the ends."""
    cdf = lambda z: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3)))
    centred, inv_std = x - mean, (-0.5 * log_var).exp()
    upper, lower = cdf(inv_std * (centred + 1 / 255)), cdf(inv_std * (centred - 1 / 255))
    p = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return -p.clamp(min=1e-12).log()


class DiffLoss(nn.Module):
    """A denoiser and its objective: the loss, the score, one guided draw.

    net(x_t, t, c) -> (eps, v), and net.along(ts, c), the same along a trajectory: any module of
    that form will do, the MLP, or a transformer (CDM).
    CHOICE(x0_bound): |x0| is kept within x0_bound, the data's range, in every step, because at
    t = 999 the schedule divides the head's error by sqrt(abar) ~ 5e-5, and young checkpoints give
    black or NaN images. Alternative: `x0_bound = None` on the head, which is MAR exactly.
    """
    objective, schedule = "eps", Schedule()
    samplers = {"ddpm": Solver(ddpm, backwards, 1), "ddim": Solver(ddim, backwards, 0),
                "dpm++": Solver(dpmpp, logsnr_steps, 0)}

    def __init__(self, net):
        super().__init__()
        self.net, self.x0_bound = net, None
        # self.alpha, self.sigma ...: the tables of the schedule in fp32, on the model's device
        for name, table in vars(self.schedule).items():
            self.register_buffer(name, torch.tensor(table, dtype=torch.float32), persistent=False)

    def noised(self, x, t, eps):
        """x_t (..., D) at steps t (...), broadcastable."""
        return self.alpha[t][..., None] * x + self.sigma[t][..., None] * eps

    def forward(self, x, c, t, eps):
        """Loss per token (...), the sum of the `terms`. eps (..., D) fp32, t (...) int64 in
        0 .. 999; x (..., D) and c (..., C) broadcast."""
        return sum(self.terms(x, c, t, eps))

    def terms(self, x, c, t, eps):
        """(mse, vb) per token (...): the squared error of eps; the variational bound in bits."""
        x_t, at = self.noised(x, t, eps), lambda table: table[t][..., None]
        eps_hat, v = (out.float() for out in self.net(x_t, t, c))
        mse = (eps - eps_hat).square().mean(-1)
        # the bound trains the variance alone: the mean is detached, so that MSE decides eps
        x0_hat = at(self.x0_from_xt) * x_t - at(self.x0_from_eps) * eps_hat.detach()
        mean_hat = at(self.mean_x0) * x0_hat + at(self.mean_xt) * x_t
        mean = at(self.mean_x0) * x + at(self.mean_xt) * x_t
        log_var = torch.lerp(at(self.log_var_min), at(self.log_var_max), (v + 1) / 2)
        kl = gaussian_kl(mean, at(self.log_var_min), mean_hat, log_var).mean(-1)
        nll = discretised_nll(x, mean_hat, log_var).mean(-1)
        return mse, torch.where(t == 0, nll, kl) / math.log(2)

    def score(self, x_t, t, c):
        """grad log p_t(x_t | c) (..., D) = -eps_theta / sigma_t."""
        return -self.net(x_t, t, c)[0].float() / self.sigma[t][..., None]

    def bounded(self, x0):
        return x0 if self.x0_bound is None else x0.clamp(-self.x0_bound, self.x0_bound)

    def denoiser(self, ts, c, c_null=None, cfg_scale=1.0):
        """denoise(x_t, t: int) -> (x0, v) under c (..., C) at the steps `ts`, for the samplers.

        With c_null (..., C) both branches run as one batch and eps = eps_null + cfg_scale (eps_c -
        eps_null); v is the conditional branch's (as in MAR).
        """
        guided = c_null is not None
        net, s = self.net.along(ts, torch.stack([c, c_null]) if guided else c), self.schedule

        def denoise(x_t, t):
            eps, v = (out.float() for out in net(x_t, t))
            if guided:
                eps, v = torch.lerp(eps[1], eps[0], cfg_scale), v[0]
            x0 = torch.sub(x_t * float(s.x0_from_xt[t]), eps, alpha=float(s.x0_from_eps[t]))
            return self.bounded(x0), v

        return denoise

    def solver(self, name=None):
        """The Solver of a name, by default the first; ValueError if it does not fit the objective.
        """
        if name not in (None, *self.samplers):
            raise ValueError(f"--solver {name} does not fit a head trained for "
                             f"{self.objective!r}; choose one of {', '.join(self.samplers)}")
        return self.samplers[name or next(iter(self.samplers))]

    def n_noise(self, solver=None, steps=25, **options):
        """How many noise tensors a trajectory of `sample` takes: the initial and the fresh ones."""
        return 1 + self.solver(solver).fresh * steps

    def sample(self, c, c_null, cfg_scale, noise, solver=None, steps=25, **options):
        """x (..., D) under c (..., C), guided if c_null is given: one trajectory of `steps`
        evaluations from noise (n_noise, ..., D). options: temperature, callback of the samplers."""
        run, timesteps, _ = self.solver(solver)
        return run(self.denoiser(timesteps(steps), c, c_null, cfg_scale), noise, steps, **options)


OBJECTIVES = {"eps": DiffLoss}                   # Config.objective picks one


# ---------------------------------------------------------------- noise

class ImageNoise:
    """One random stream per image, so that image k of a seed is the same in any batch.

    randn(*shape) -> (B, *shape) fp32; rand likewise. `index` lists the images of this batch.
    """

    def __init__(self, seed, index, device="cpu"):
        self.device = torch.device(device)
        # 0x9E3779B97F4A7C15 is 2^64 / golden ratio: far-apart seeds for neighbouring (seed, k)
        first = (int(seed) + 1) * 0x9E3779B97F4A7C15
        keys = [(first + int(k) * 0xBF58476D1CE4E5B9) % 2 ** 63 for k in index]
        self.streams = [torch.Generator(self.device).manual_seed(key) for key in keys]

    def __len__(self):
        return len(self.streams)

    def filled(self, fill, shape):
        out = torch.empty(len(self), *shape, device=self.device)
        for z, g in zip(out, self.streams):
            fill(z, generator=g)
        return out

    def randn(self, *shape):
        return self.filled(torch.Tensor.normal_, shape)

    def rand(self, *shape):
        return self.filled(torch.Tensor.uniform_, shape)
