"""KL-16, the autoencoder behind MAR: images in [-1, 1] <-> the latents that the generators model.

    posterior   q(z | image) = N(mean, exp(logvar)),  logvar clamped to [-30, 20]
    latents     x = scale * z, z ~ q                  (no shift; scale = 1 / std of the latents)
    decode      image = D(x / scale)

16x16 pixels become 16 channels. The network is frozen here, never trained. A cache stores the
moments cat(mean, logvar), so that training draws a fresh z each epoch without the encoder. Tensor
names are those of kl16.ckpt ({"model": state_dict}, 312 tensors, 66,456,019 parameters).

Not here: reading images and caching latents (latents.py), anything adversarial or trainable.
References: Rombach et al., arXiv 2112.10752 (architecture); Li et al., 2406.11838 (kl16.ckpt).
"""
import hashlib
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

from files import read_weights

KL16_SCALE = 0.2325              # 1 / std of kl16.ckpt's latents on ImageNet; its only home


# ---------------------------------------------------------------- the network

class ResBlock(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, n_in, eps=1e-6)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, n_out, eps=1e-6)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1)
        if n_in != n_out:
            self.nin_shortcut = nn.Conv2d(n_in, n_out, 1)

    def forward(self, x):                                     # (B, n_in, H, W)
        h = self.conv1(F.silu(self.norm1(x)))                 # (B, n_out, H, W)
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """Single-head self-attention over all positions; the 1x1 convolutions are linear maps."""

    def __init__(self, n):
        super().__init__()
        self.norm = nn.GroupNorm(32, n, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(n, n, 1) for _ in range(4))

    def forward(self, x):                                     # (B, C, H, W)
        h = self.norm(x)
        rows = lambda f: f(h).flatten(2).transpose(1, 2).unsqueeze(1)       # (B, 1, HW, C)
        h = F.scaled_dot_product_attention(rows(self.q), rows(self.k), rows(self.v))
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.conv = nn.Conv2d(n, n, 3, stride=2)

    def forward(self, x):                                     # (B, C, H, W) -> (B, C, H/2, W/2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))              # right and bottom: as it was trained


class Upsample(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.conv = nn.Conv2d(n, n, 3, padding=1)

    def forward(self, x):                                     # (B, C, H, W) -> (B, C, 2H, 2W)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def middle(n):
    return nn.ModuleDict({"block_1": ResBlock(n, n), "attn_1": Attention(n),
                          "block_2": ResBlock(n, n)})


def run_middle(mid, h):
    return mid["block_2"](mid["attn_1"](mid["block_1"](h)))


class Encoder(nn.Module):
    def __init__(self, ch, ch_mult, z_channels):
        super().__init__()
        widths, last = [ch * m for m in ch_mult], len(ch_mult) - 1
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (n_in, n) in enumerate(zip([ch] + widths, widths)):
            level = {"block": nn.ModuleList([ResBlock(n_in, n), ResBlock(n, n)])}
            if i == last:
                level["attn"] = nn.ModuleList([Attention(n), Attention(n)])
            else:
                level["downsample"] = Downsample(n)
            self.down.append(nn.ModuleDict(level))
        self.mid = middle(widths[-1])
        self.norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * z_channels, 3, padding=1)

    def forward(self, images):                                # (B, 3, H, W)
        h = self.conv_in(images)
        for level in self.down:
            for j, block in enumerate(level["block"]):
                h = block(h)
                if "attn" in level:
                    h = level["attn"][j](h)
            if "downsample" in level:
                h = level["downsample"](h)                    # (B, width, H/2^i, W/2^i)
        h = run_middle(self.mid, h)
        return self.conv_out(F.silu(self.norm_out(h)))        # (B, 2z, H/stride, W/stride)


class Decoder(nn.Module):
    def __init__(self, ch, ch_mult, z_channels):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1])
        self.up = nn.ModuleList()                             # up[0] is the finest and runs last
        for i, (n_in, n) in enumerate(zip(widths[1:] + widths[-1:], widths)):
            level = {"block": nn.ModuleList([ResBlock(n_in, n), ResBlock(n, n), ResBlock(n, n)])}
            if i > 0:
                level["upsample"] = Upsample(n)
            self.up.append(nn.ModuleDict(level))
        self.norm_out = nn.GroupNorm(32, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):                                     # (B, z, h, w)
        h = run_middle(self.mid, self.conv_in(z))
        for level in reversed(self.up):
            for block in level["block"]:
                h = block(h)
            if "upsample" in level:
                h = level["upsample"](h)
        return self.conv_out(F.silu(self.norm_out(h)))        # (B, 3, h * stride, w * stride)


# ---------------------------------------------------------------- the autoencoder

class KL16(nn.Module):
    """The autoencoder of kl16.ckpt; other sizes than the released one serve tests and your own.

    Everything runs without gradients and outside autocast, in the dtype of the weights; results are
    float32. At most `max_pixels` image pixels are in flight: float32 activations peak at 4.4 kB a
    pixel in decode (2.8 in moments), so that the default, 8 images of 256x256, takes 2.3 GB.
    """

    def __init__(self, ch=128, ch_mult=(1, 1, 2, 2, 4), z_channels=16, scale=KL16_SCALE):
        super().__init__()
        if ch % 32 or ch <= 0:
            raise ValueError(f"ch={ch} must be a positive multiple of 32, the number of groups; "
                             "kl16.ckpt has 128")
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale={scale} must be a positive number: 1 / std of the latents; "
                             "see vae.latent_scale")
        self.channels, self.stride = z_channels, 2 ** (len(ch_mult) - 1)
        self.scale, self.max_pixels = float(scale), 2 ** 19
        self.encoder = Encoder(ch, ch_mult, z_channels)
        self.decoder = Decoder(ch, ch_mult, z_channels)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)
        self.eval().requires_grad_(False)

    def chunked(self, fn, x, pixels):
        """fn over x, at most max_pixels image pixels (but at least one image) at a time."""
        parts, dtype = x.split(max(1, self.max_pixels // pixels)), self.quant_conv.weight.dtype
        with torch.autocast(x.device.type, enabled=False):
            return torch.cat([fn(part.to(dtype)).float() for part in parts])

    @torch.no_grad()
    def moments(self, images):
        """cat(mean, logvar) (B, 2z, h, w), unscaled, of images (B, 3, H, W) in [-1, 1]."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images came as {tuple(images.shape)} {images.dtype}, expected float "
                             "(B, 3, H, W) in [-1, 1]; for uint8 HWC: "
                             "x.permute(0, 3, 1, 2).float() / 127.5 - 1")
        H, W = images.shape[2:]
        if H % self.stride or W % self.stride or not H * W:
            fit = [max(n // self.stride, 1) * self.stride for n in (H, W)]
            raise ValueError(f"image size {H}x{W} must be divisible by the stride {self.stride}; "
                             f"crop or resize, e.g. to {fit[0]}x{fit[1]}")
        return self.chunked(lambda x: self.quant_conv(self.encoder(x)), images, H * W)

    def encode(self, images, generator=None):
        """Scaled latents (B, z, h, w) of images (B, 3, H, W) in [-1, 1].

        The noise is drawn on the generator's device: a CPU generator gives the same everywhere.
        """
        moments = self.moments(images)
        device = moments.device if generator is None else generator.device
        shape = (len(moments), self.channels, *moments.shape[2:])
        noise = torch.randn(shape, generator=generator, device=device)
        return posterior(moments, noise.to(moments.device)) * self.scale

    @torch.no_grad()
    def decode(self, latents):
        """Images (B, 3, H, W) float32, about [-1, 1], of scaled latents (B, z, h, w)."""
        shape = tuple(latents.shape)
        if latents.ndim != 4 or shape[1] != self.channels or 0 in shape[2:] \
                or not latents.is_floating_point():
            raise ValueError(f"latents came as {shape} {latents.dtype}, expected float "
                             f"(B, {self.channels}, h, w); tokens (B, N, D) are "
                             "x.transpose(1, 2).unflatten(2, (h, w))")
        pixels = shape[2] * shape[3] * self.stride ** 2
        inner = lambda x: self.decoder(self.post_quant_conv(x / self.scale))
        return self.chunked(inner, latents, pixels)

    def fingerprint(self):
        """sha256 over all names and float32 values: what caches and checkpoints compare."""
        digest = hashlib.sha256()
        for name, value in self.state_dict().items():
            digest.update(name.encode())
            digest.update(value.float().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()


def posterior(moments, noise):
    """z = mean + exp(logvar / 2) noise, unscaled: moments (B, 2z, h, w), noise (B, z, h, w)."""
    if moments.shape[1] != 2 * noise.shape[1]:
        raise ValueError(f"moments came as {tuple(moments.shape)}, expected mean and logvar of "
                         f"{noise.shape[1]} channels; was this cache made with another VAE?")
    mean, logvar = moments.chunk(2, dim=1)
    return mean + (0.5 * logvar.clamp(-30.0, 20.0)).exp() * noise


def latent_scale(moments):
    """1 / std of the latents, the scale of a new data set, from moments (n, 2z, h, w).

    Exact and without random draws: Var z = Var(mean) + E[exp(logvar)], over all elements.
    """
    mean, logvar = moments.double().chunk(2, dim=1)
    variance = (mean.var(correction=0) + logvar.clamp(-30.0, 20.0).exp().mean()).item()
    if not 1e-12 < variance < float("inf"):
        raise ValueError(f"the variance of {mean.numel()} latent values is {variance}: no scale "
                         "can be computed; are the images empty, constant or non-finite?")
    return variance ** -0.5


# ---------------------------------------------------------------- loading

def load_kl16(path, scale=KL16_SCALE, device="cpu"):
    """KL16 with the weights of kl16.ckpt, strictly; its size is read from the tensors.

    Raises FileNotFoundError for a missing file, ValueError for a truncated, partial or foreign one
    (the first offending name), always in one line.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no VAE checkpoint at {path}; --vae takes the path of kl16.ckpt "
                                "(266 MB, released with MAR: see README_imagenet.md)")
    state = read_weights(path, "VAE (--vae) like kl16.ckpt, of about 265,900,000 bytes")
    try:
        with torch.device("meta"):                            # shapes only: nothing is initialised
            vae = KL16(**size_of(state), scale=scale)
        problem = state_problem(state, vae.state_dict())
        if problem:
            raise ValueError(problem)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; --vae takes kl16.ckpt in its original layout, complete "
                         "(not diffusers' names, not another autoencoder)") from None
    vae.load_state_dict(state, assign=True)
    return vae.float().to(device)


def size_of(state):
    """ch, ch_mult, z_channels of a state dict; ValueError names what is missing."""
    def rows(name):
        if name not in state or not state[name].ndim:
            raise ValueError(f"tensor '{name}' is missing")
        return state[name].shape[0]
    levels = 1
    while any(name.startswith(f"encoder.down.{levels}.") for name in state):
        levels += 1
    ch = rows("encoder.conv_in.weight")
    widths = [rows(f"encoder.down.{i}.block.1.conv2.weight") for i in range(levels)]
    return {"ch": ch, "ch_mult": tuple(max(1, width // max(1, ch)) for width in widths),
            "z_channels": max(1, rows("post_quant_conv.weight"))}


def state_problem(state, expected):
    """What is wrong with a state dict, its first offending tensor named; None if nothing is."""
    problems = []                                             # in the model's order, foreign last
    for name, want in expected.items():
        if name not in state:
            problems.append(f"'{name}' is missing")
        elif state[name].shape != want.shape:
            came = tuple(state[name].shape)
            problems.append(f"'{name}' is {came}, expected {tuple(want.shape)}")
        elif not (state[name].is_floating_point() and state[name].isfinite().all()):
            problems.append(f"'{name}' ({state[name].dtype}) is not float or not finite")
    problems += [f"'{name}' is not part of the model" for name in state if name not in expected]
    if not problems:
        return None
    return (f"tensor {problems[0]} ({len(problems)} wrong in all; {len(state)} tensors came, "
            f"{len(expected)} expected)")
