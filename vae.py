"""The tokeniser: images in [-1, 1] <-> the latent tokens that every generator models.

KL16      the KL-regularised autoencoder behind MAR (frozen here, never trained): 16x16 pixels -> 16 channels.
Identity  raw pixel patches for the small datasets, behind the same interface.

    posterior   q(z | image) = N(mean, exp(logvar)),  logvar clamped to [-30, 20]
    latents     x = scale * z, z ~ q                  (no shift; scale = 1 / std over the training latents)
    decode      image = D(x / scale)

A cache stores `moments` = cat(mean, logvar), so that training draws a fresh z each epoch without the encoder.
Tensor names are those of kl16.ckpt ({"model": state_dict}, 312 tensors, 66,456,019 parameters).

Not here: reading images and writing caches (data.py), anything adversarial or trainable.
References: Rombach et al., arXiv 2112.10752 (the architecture); Li et al., arXiv 2406.11838 (kl16.ckpt, 0.2325).
"""
import hashlib
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

KL16_SCALE = 0.2325        # 1 / std of kl16.ckpt's latents on ImageNet; its only home in this repository
NO_NOISE = -30.0           # the smallest logvar: what Identity writes for "this is not random"


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
    """Single-head self-attention over all positions; the four 1x1 convolutions are linear maps per position."""

    def __init__(self, n):
        super().__init__()
        self.norm = nn.GroupNorm(32, n, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(n, n, 1) for _ in range(4))

    def forward(self, x):                                     # (B, C, H, W)
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.q, self.k, self.v))  # (B, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)           # (B, 1, HW, C), scale 1 / sqrt(C)
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.conv = nn.Conv2d(n, n, 3, stride=2)

    def forward(self, x):                                     # (B, C, H, W) -> (B, C, H/2, W/2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))              # right and bottom only: as the weights were trained


class Upsample(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.conv = nn.Conv2d(n, n, 3, padding=1)

    def forward(self, x):                                     # (B, C, H, W) -> (B, C, 2H, 2W)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _middle(n):
    return nn.ModuleDict({"block_1": ResBlock(n, n), "attn_1": Attention(n), "block_2": ResBlock(n, n)})


def _run_middle(mid, h):
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
        self.mid = _middle(widths[-1])
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
        h = _run_middle(self.mid, h)
        return self.conv_out(F.silu(self.norm_out(h)))        # (B, 2z, H/stride, W/stride)


class Decoder(nn.Module):
    def __init__(self, ch, ch_mult, z_channels):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = _middle(widths[-1])
        self.up = nn.ModuleList()                             # up[0] is the finest level and runs last
        for i, (n_in, n) in enumerate(zip(widths[1:] + widths[-1:], widths)):
            level = {"block": nn.ModuleList([ResBlock(n_in, n), ResBlock(n, n), ResBlock(n, n)])}
            if i > 0:
                level["upsample"] = Upsample(n)
            self.up.append(nn.ModuleDict(level))
        self.norm_out = nn.GroupNorm(32, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):                                     # (B, z, h, w)
        h = _run_middle(self.mid, self.conv_in(z))
        for level in reversed(self.up):
            for block in level["block"]:
                h = block(h)
            if "upsample" in level:
                h = level["upsample"](h)
        return self.conv_out(F.silu(self.norm_out(h)))        # (B, 3, h * stride, w * stride)


class Tokeniser(nn.Module):
    """What KL16 and Identity share: checks, chunks, precision. Attributes: channels, stride, scale (all plain).

    Everything runs without gradients and outside autocast, in the dtype of the weights (`.to(torch.bfloat16)` is the
    user's decision); results are float32. At most `max_pixels` image pixels are in flight: KL-16's float32 activations
    peak at 4.4 kB per pixel in decode (2.8 in moments), so the default, 8 images of 256x256, takes 2.3 GB.
    """

    def __init__(self, channels, stride, in_channels, scale, max_pixels):
        super().__init__()
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale={scale} must be a positive number: 1 / std of the latents; see vae.latent_scale")
        self.channels, self.stride, self.in_channels = channels, stride, in_channels
        self.scale, self.max_pixels = float(scale), max_pixels

    def _chunked(self, fn, x, pixels):
        """fn over x in pieces of at most max_pixels image pixels (at least one image); x and the result on x's device."""
        like = next(self.parameters(), x)
        with torch.autocast(x.device.type, enabled=False):
            return torch.cat([fn(part.to(like.dtype)).float() for part in x.split(max(1, self.max_pixels // pixels))])

    @torch.no_grad()
    def moments(self, images):
        """Posterior moments: images (B, 3, H, W) in [-1, 1] -> cat(mean, logvar), (B, 2 * channels, h, w), unscaled."""
        if images.ndim != 4 or images.shape[1] != self.in_channels or not images.is_floating_point():
            raise ValueError(f"images came as {tuple(images.shape)} {images.dtype}, expected float (B, {self.in_channels}, "
                             "H, W) in [-1, 1]; for uint8 HWC: x.permute(0, 3, 1, 2).float() / 127.5 - 1")
        H, W = images.shape[2:]
        if H % self.stride or W % self.stride or not H * W:
            fit = [max(n // self.stride, 1) * self.stride for n in (H, W)]
            raise ValueError(f"image size {H}x{W} must be divisible by the stride {self.stride}; "
                             f"crop or resize, e.g. to {fit[0]}x{fit[1]}")
        return self._chunked(self._moments, images, H * W)

    def sample_moments(self, moments, generator=None):
        """Scaled latents x = scale * z, z ~ N(mean, exp(logvar)): (B, 2 * channels, h, w) -> (B, channels, h, w) float32.

        The noise is drawn on the generator's device, so a CPU generator gives the same latents on every machine.
        """
        if moments.ndim != 4 or moments.shape[1] != 2 * self.channels:
            raise ValueError(f"moments came as {tuple(moments.shape)}, expected (B, {2 * self.channels}, h, w): "
                             f"mean and logvar of {self.channels} channels; was this cache made with another VAE?")
        return self._sample(*moments.float().chunk(2, dim=1), generator) * self.scale

    def encode(self, images, generator=None):
        """Scaled latents of images: (B, 3, H, W) in [-1, 1] -> (B, channels, H / stride, W / stride)."""
        return self.sample_moments(self.moments(images), generator)

    @torch.no_grad()
    def decode(self, latents):
        """Images of scaled latents: (B, channels, h, w) -> (B, 3, h * stride, w * stride) float32, about [-1, 1], unclamped."""
        if latents.ndim != 4 or latents.shape[1] != self.channels or 0 in latents.shape[2:] or not latents.is_floating_point():
            raise ValueError(f"latents came as {tuple(latents.shape)} {latents.dtype}, expected float "
                             f"(B, {self.channels}, h, w); tokens (B, N, D) are x.transpose(1, 2).unflatten(2, (h, w))")
        h, w = latents.shape[2:]
        return self._chunked(lambda x: self._decode(x / self.scale), latents, h * w * self.stride ** 2)


class KL16(Tokeniser):
    """The autoencoder of kl16.ckpt; the defaults are the released size, other sizes serve the tests and your own VAEs."""

    def __init__(self, ch=128, ch_mult=(1, 1, 2, 2, 4), z_channels=16, scale=KL16_SCALE, max_pixels=2 ** 19):
        if ch % 32 or ch <= 0:
            raise ValueError(f"ch={ch} must be a positive multiple of 32, the number of groups; kl16.ckpt has 128")
        super().__init__(z_channels, 2 ** (len(ch_mult) - 1), 3, scale, max_pixels)
        self.encoder = Encoder(ch, ch_mult, z_channels)
        self.decoder = Decoder(ch, ch_mult, z_channels)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)
        self.eval().requires_grad_(False)

    def _moments(self, images):
        return self.quant_conv(self.encoder(images))

    def _decode(self, z):
        return self.decoder(self.post_quant_conv(z))

    def _sample(self, mean, logvar, generator):
        device = mean.device if generator is None else generator.device
        noise = torch.randn(mean.shape, generator=generator, device=device).to(mean.device)
        return posterior(torch.cat([mean, logvar], dim=1), noise)

    def fingerprint(self):
        """sha256 over all names and float32 values: what a latent cache records and compares (not the scale)."""
        digest = hashlib.sha256()
        for name, value in self.state_dict().items():
            digest.update(name.encode())
            digest.update(value.float().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()


class Identity(Tokeniser):
    """Raw pixels as tokens: patch x patch squares to channels (colour, row, column) and back, without loss or noise."""

    def __init__(self, patch, in_channels=3, scale=1.0, max_pixels=2 ** 24):
        if patch < 1:
            raise ValueError(f"patch={patch} must be at least 1")
        super().__init__(in_channels * patch ** 2, patch, in_channels, scale, max_pixels)

    def _moments(self, images):
        mean = F.pixel_unshuffle(images, self.stride)         # (B, channels * p * p, H/p, W/p)
        return torch.cat([mean, torch.full_like(mean, NO_NOISE)], dim=1)

    def _decode(self, z):
        return F.pixel_shuffle(z, self.stride)

    def _sample(self, mean, logvar, generator):
        return mean                                           # exact: exp(NO_NOISE / 2) is 3e-7, not zero

    def fingerprint(self):
        return f"identity-{self.in_channels}x{self.stride}x{self.stride}"


def posterior(moments, noise):
    """z = mean + exp(logvar / 2) noise: moments (B, 2z, h, w), noise (B, z, h, w) -> (B, z, h, w), unscaled."""
    mean, logvar = moments.chunk(2, dim=1)
    return mean + (0.5 * logvar.clamp(NO_NOISE, 20.0)).exp() * noise


def latent_scale(moments):
    """1 / std of the latents, the scale of a new dataset, from moments (B, 2z, h, w) or an iterable of such batches.

    Exact and without random draws: Var z = Var(mean) + E[exp(logvar)], over all elements, in float64.
    """
    count, total, square = 0, 0.0, 0.0
    for batch in [moments] if torch.is_tensor(moments) else moments:
        mean, logvar = batch.double().chunk(2, dim=1)
        count += mean.numel()
        total += mean.sum().item()
        square += (mean.square() + logvar.clamp(NO_NOISE, 20.0).exp()).sum().item()
    variance = square / count - (total / count) ** 2 if count else 0.0
    if not 1e-12 < variance < float("inf"):
        raise ValueError(f"the variance of {count} latent values is {variance}: no scale can be computed; "
                         "check that the images are not empty, constant or non-finite")
    return variance ** -0.5


def load_kl16(path, scale=KL16_SCALE, device="cpu"):
    """KL16 with the weights of kl16.ckpt, strictly; its size (ch, ch_mult, z_channels) is read from the tensors.

    Raises FileNotFoundError for a missing file, ValueError for a truncated, partial or foreign one (the first
    offending name), always in one line.
    """
    state = _read_state(path)
    with torch.device("meta"):                                # shapes only: nothing is initialised to be overwritten
        vae = KL16(**_infer_size(state), scale=scale)
    problem = state_problem(state, vae.state_dict())
    if problem:
        raise ValueError(f"{path}: {problem}; --vae takes kl16.ckpt in its original layout, complete (not diffusers' names, "
                         "not another autoencoder)")
    vae.load_state_dict(state, assign=True)
    return vae.float().to(device)


def _read_state(path):
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no VAE checkpoint at {path}; --vae takes the path of kl16.ckpt "
                                "(266 MB, released with MAR: see the README)")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                # torch has no common class for zip, pickle and EOF errors
        reason = str(error).strip().split("\n")[0][:160] or type(error).__name__
        raise ValueError(f"{path} ({os.path.getsize(path):,} bytes) is no readable checkpoint: it is truncated, a web page or "
                         f"a git-lfs pointer, or not a plain dict of tensors ({reason}); kl16.ckpt has about "
                         "265,900,000 bytes: download it again") from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not state or not all(torch.is_tensor(v) for v in state.values()):
        came = f"a dict with keys {list(state)[:5]}" if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path} holds {came}, expected {{'model': state_dict}} as in kl16.ckpt; "
                         "is this a generator's checkpoint (--ckpt) given as --vae?")
    return state


def _infer_size(state):
    """ch, ch_mult, z_channels of a state dict; what cannot be read is taken from kl16, so that the check names it."""
    def rows(default, *names):                                # of the first tensor that is there
        return next((state[n].shape[0] for n in names if n in state and state[n].ndim), default)
    ch = rows(128, "encoder.conv_in.weight", "encoder.conv_in.bias")
    ch = ch if ch and ch % 32 == 0 else 128
    index = [name.split(".")[2] for name in state if name.startswith("encoder.down.")]
    levels = 1 + max((int(i) for i in index if i.isdigit() and int(i) < 8), default=4)
    default = [ch * m for m in (1, 1, 2, 2, 4, 4, 4, 4)]
    widths = [rows(default[i], *(f"encoder.down.{i}.block.{j}.conv{k}.weight" for j in (0, 1) for k in (2, 1)))
              for i in range(levels)]
    z_channels = rows(rows(32, "encoder.conv_out.weight") // 2, "post_quant_conv.weight")
    return {"ch": ch, "ch_mult": tuple(max(1, width // ch) for width in widths), "z_channels": max(1, z_channels)}


def state_problem(state, expected):
    """What is wrong with a state dict, the first offending tensor named; None if names and shapes are those expected."""
    problems = []                                             # in the model's order, foreign names last
    for name, want in expected.items():
        if name not in state:
            problems.append(f"'{name}' is missing")
        elif state[name].shape != want.shape:
            problems.append(f"'{name}' is {tuple(state[name].shape)}, expected {tuple(want.shape)}")
        elif not (state[name].is_floating_point() and state[name].isfinite().all()):
            problems.append(f"'{name}' ({state[name].dtype}) is not float or not finite")
    problems += [f"'{name}' is not part of the model" for name in state if name not in expected]
    if not problems:
        return None
    return f"tensor {problems[0]} ({len(problems)} wrong in all; {len(state)} tensors came, {len(expected)} expected)"
