"""The three generators: AR (causal), MAR (masked), CDM (whole-image diffusion); one interface for all.

    loss(x, y, draws)          [diffusion loss, loss of T^-1 (CHOICE inverse)] of tokens x (B, N, D), labels y (B,)
    draw(n, generator)         all the randomness of a training step, as a dict of (n, ...) tensors
    conditions(x, y, ...)      teacher-forced conditions c (B, N, C): what the head is given when the
                               known patches are real
    generate(y, noise, ...)    tokens (B, N, D); `refine` is called on the conditions of every AR step

What is not here: the denoising head and its samplers (diffloss.py), refinement (ot_refine.py), images.
References: MAR arXiv 2406.11838; LlamaGen arXiv 2406.06525 (AR blocks); DiT arXiv 2212.09748 (CDM blocks).
"""
import argparse
import difflib
import functools
import json
import math
import os
import pickle
import random
import warnings
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data import imagenet_classes
from diffloss import DenoisingMLP, DiffLoss, Sampler, T_TRAIN, TimeEmbedding, modulate
from ot_refine import ConditionBuffer, InverseMap
from vae import KL16_SCALE, state_problem


@dataclass
class Config:
    """Architecture, as stored in a checkpoint. `num_classes` is also the null label of guidance."""
    kind: str                       # ar, mar or cdm
    n_layer: int                    # mar: encoder and decoder have n_layer each
    n_head: int
    n_embd: int                     # C, the width of a condition
    head_depth: int = 0             # the denoising MLP; cdm has none
    head_width: int = 0
    token_dim: int = 16             # D
    grid: int = 16                  # N = grid * grid tokens in raster order
    num_classes: int = 1000
    dropout: float = 0.1
    class_dropout: float = 0.1      # share of labels replaced by the null label in training
    diffusion_batch_mul: int = 4    # each token is used so often per step, with fresh t and noise
    n_class_tokens: int = 64        # mar: copies of the class token in front of the sequence
    mask_min: float = 0.7           # mar: the training mask ratio is normal (mean 1, std mask_std), cut to [mask_min, 1]
    mask_std: float = 0.25
    rope: bool = False              # mar: 2-D RoPE in every attention, beside MAR's learned positions
    inverse: bool = False           # train T^-1 beside the model (CHOICE inverse)
    buffer: int = 0                 # keep so many conditions per class and position (CHOICE target, the alternative)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}; choose one of {', '.join(KINDS)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be divisible by n_head={self.n_head}")
        if (self.kind == "ar" or self.rope) and (self.n_embd // self.n_head) % 4:
            raise ValueError(f"head dimension n_embd / n_head = {self.n_embd // self.n_head} must be divisible by 4 for 2-D RoPE")
        if self.num_classes < 1:
            raise ValueError(f"num_classes={self.num_classes} must be at least 1")

    @property
    def n_tokens(self):
        return self.grid ** 2


KINDS = ("ar", "mar", "cdm")
# CHOICE(guidance): images are drawn with this scale unless told otherwise, one for all tiny models, from the tuning sets (README).
# Alternative: none, 1. Flag: --cfg_scale.
GUIDANCE = 1.5
PRESETS = {
    # AR sizes follow LlamaGen; the heads follow MAR's of the same size. "Ours" and "Baseline" of the paper are gpt-xl.
    "gpt-b": dict(kind="ar", n_layer=12, n_head=12, n_embd=768, head_depth=6, head_width=1024),
    "gpt-l": dict(kind="ar", n_layer=24, n_head=16, n_embd=1024, head_depth=8, head_width=1280),
    "gpt-xl": dict(kind="ar", n_layer=36, n_head=20, n_embd=1280, head_depth=12, head_width=1536),
    "mar-b": dict(kind="mar", n_layer=12, n_head=12, n_embd=768, head_depth=6, head_width=1024),
    "mar-l": dict(kind="mar", n_layer=16, n_head=16, n_embd=1024, head_depth=8, head_width=1280),
    "mar-h": dict(kind="mar", n_layer=20, n_head=16, n_embd=1280, head_depth=12, head_width=1536),
    # CDM sizes follow DiT
    "cdm-b": dict(kind="cdm", n_layer=12, n_head=12, n_embd=768),
    "cdm-l": dict(kind="cdm", n_layer=24, n_head=16, n_embd=1024),
    "cdm-xl": dict(kind="cdm", n_layer=28, n_head=16, n_embd=1152),
    # equal within 5 %, for a CPU
    "gpt-tiny": dict(kind="ar", n_layer=4, n_head=4, n_embd=64, head_depth=2, head_width=128, dropout=0.05, diffusion_batch_mul=1,
                     inverse=True, buffer=64),
    "mar-tiny": dict(kind="mar", n_layer=2, n_head=6, n_embd=72, head_depth=2, head_width=128, dropout=0.05,
                     diffusion_batch_mul=2,             # half of the tokens are masked: as many rows in the head as gpt-tiny
                     n_class_tokens=4, inverse=True, buffer=64,
                     # CHOICE(rope): 2-D RoPE beside MAR's learned positions, with which alone it is slow to find the neighbours of
                     # a patch (FD 4.0 instead of 1.7 after 2400 steps). Alternative: MAR's own, as in mar-b/l/h. Flag: --no-rope.
                     rope=True,
                     # 16 tokens drawn one a step: with MAR's .7 a context of more than 4 patches would never be trained
                     mask_min=0.0, mask_std=0.5),
    "cdm-tiny": dict(kind="cdm", n_layer=4, n_head=2, n_embd=82, dropout=0.05, diffusion_batch_mul=1),
}


def build(config):
    """The model of a Config."""
    return {"ar": AR, "mar": MAR, "cdm": CDM}[config.kind](config)


def preset(name, **changes):
    """The Config of a preset with some fields changed."""
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, 1)
        raise ValueError(f"unknown model {name!r}" + (f"; did you mean {close[0]}?" if close else f"; choose one of {', '.join(PRESETS)}"))
    return Config(**{**PRESETS[name], **changes})


def amp(device):
    """bf16 autocast on GPUs that have it; nothing elsewhere (and never fp16)."""
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast("cuda", torch.bfloat16, enabled=bf16) if device.type == "cuda" else torch.autocast("cpu", enabled=False)


def checkpoint_blocks(model):
    """Keep only each block's input for the backward pass and compute the rest there again: exact, about a third slower."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def pick_device(name):
    """The torch.device of 'auto', 'cpu', 'cuda:1' ...; ValueError if it cannot be used."""
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def set_threads(model, device, threads=0):
    """Threads on a CPU: `threads`, or 1 for small models if 0, as their matrices are too small to share.

    Measured with gpt-tiny on 2 cores: a second thread gives 1.5x on an idle machine, and costs 30x when another program
    uses the other core, as each of the 2000 small products of a step then waits for the slower thread.
    """
    if torch.device(device).type == "cpu" and (threads or model.num_params < 5e6):
        torch.set_num_threads(threads or 1)


# ---------------------------------------------------------------- checkpoints

def save_checkpoint(path, state):
    """Write a dict of plain values and tensors so that `path` is always whole: the old file or the new one."""
    tmp = Path(f"{path}.tmp")
    with open(tmp, "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)


def find_checkpoint(path):
    """A checkpoint file from a file or a run directory; ValueError if there is none."""
    path = Path(path)
    file = path / "ckpt.pt" if path.is_dir() else path
    if path.is_dir() and not file.exists() and (path / "checkpoint-last.pth").exists():
        return path / "checkpoint-last.pth"                                            # as MAR names its own
    if not file.exists():
        raise ValueError(f"no checkpoint at {file}; train one with: python train.py --out_dir {path if path.suffix == '' else path.parent}")
    return file


def read_checkpoint(path):
    """The dict that train.py saved, or MAR's weights as such a dict.

    Raises ValueError if the file is truncated, foreign or of another version.
    """
    path = find_checkpoint(path)
    if path.suffix == ".safetensors":
        return from_mar({"model": read_safetensors(path)}, path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):                   # MAR keeps its flags as one
            # a memory map, since MAR's files hold an optimiser that is of no use here
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} ({path.stat().st_size} bytes) is not a readable checkpoint; "
                         f"it may be truncated: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from None
    if isinstance(state, dict) and "config" not in state and ("model_ema" in state or "z_proj.weight" in state.get("model", state)):
        return from_mar(state, path)
    missing = {"config", "model", "ema", "step", "data"} - set(state if isinstance(state, dict) else ())
    if missing:
        raise ValueError(f"{path} is not a checkpoint of train.py: it lacks {', '.join(sorted(missing))}")
    return state


def load_model(path, device="cpu", ema=True):
    """(model in eval mode, checkpoint dict). The architecture comes from the checkpoint alone; strict names and shapes."""
    state = read_checkpoint(path)
    known = {f.name for f in fields(Config)}
    if set(state["config"]) != known:
        raise ValueError(f"{path} was written by another version: config fields {sorted(set(state['config']) ^ known)} differ")
    model = build(Config(**state["config"]))
    try:
        model.load_state_dict(state["ema" if ema else "model"])
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit its own config: {str(error).splitlines()[1].strip()}") from None
    return model.to(device).eval(), state


# ---------------------------------------------------------------- MAR's released weights

def from_mar(state, path):
    """MAR's {"model", "model_ema", ...} as a dict of train.py. The architecture is read from the tensors.

    Raises ValueError with the first tensor that is missing, foreign or of another shape.
    """
    weights = state.get("model_ema") or state.get("model", state)
    if not state.get("model_ema"):
        warnings.warn(f"{path} holds no model_ema: these are probably the raw weights, whose images are worse than the averaged "
                      "ones of the original checkpoint-last.pth", stacklevel=2)
    cfg = replace(mar_config(weights, state.get("n_head"), path), rope=bool(state.get("rope")))
    with torch.device("meta"):
        problem = state_problem(weights, build(cfg).state_dict())
    if problem:
        raise ValueError(f"{path}: {problem}; expected the weights of MAR with {cfg.n_layer} layers of width {cfg.n_embd}, complete")
    classes = [name for _, name in imagenet_classes()]
    known = cfg.num_classes == len(classes)
    data = {"dataset": f"imagenet{16 * cfg.grid}", "size": 16 * cfg.grid, "channels": 3, "patch": 1, "data_dir": None, "x0_bound": None,
            "class_names": classes if known else [str(k) for k in range(cfg.num_classes)],
            "vae": {"fingerprint": None, "scale": KL16_SCALE}}
    return {"config": asdict(cfg), "model": state.get("model", weights), "ema": weights, "step": 0, "data": data}


def mar_config(weights, n_head, path):
    """The Config of a MAR state dict; the number of heads, which no tensor shows, by MAR's sizes unless given."""
    def shape(name):
        if name not in weights:
            raise ValueError(f"{path}: tensor '{name}' is missing: no complete MAR checkpoint")
        return weights[name].shape

    def count(prefix):
        return 1 + max((int(n[len(prefix):].split(".")[0]) for n in weights if n.startswith(prefix)), default=-1)

    n_embd, token_dim = shape("z_proj.weight")
    n_tokens = shape("diffusion_pos_embed_learned")[1]
    heads = {p["n_embd"]: p["n_head"] for name, p in PRESETS.items() if name in ("mar-b", "mar-l", "mar-h")}
    if not n_head and n_embd not in heads:
        raise ValueError(f"{path}: width {n_embd} is none of MAR's ({', '.join(map(str, heads))}), and the number of heads cannot be "
                         "read from tensors; put it into the file as n_head")
    return Config(kind="mar", n_layer=count("encoder_blocks."), n_head=n_head or heads[n_embd], n_embd=n_embd,
                  head_depth=count("diffloss.net.res_blocks."), head_width=shape("diffloss.net.input_proj.weight")[0], token_dim=token_dim,
                  grid=math.isqrt(n_tokens), num_classes=shape("class_emb.weight")[0],
                  n_class_tokens=shape("encoder_pos_embed_learned")[1] - n_tokens)


def export_mar(path, state):
    """Write a mar checkpoint of train.py in MAR's layout; what MAR has not (T^-1, kept conditions) stays behind.

    The number of heads and RoPE, which no tensor shows, are kept beside the weights.
    """
    if state["config"]["kind"] != "mar":
        raise ValueError(f"only mar models have MAR's layout; this is a {state['config']['kind']} model")
    own = ("inverse.", "buffer.")
    parts = {theirs: {k: v for k, v in state[ours].items() if not k.startswith(own)} for theirs, ours in (("model", "model"), ("model_ema", "ema"))}
    save_checkpoint(path, {**parts, **{k: state["config"][k] for k in ("n_head", "rope")}})
    if state["config"]["rope"]:
        warnings.warn(f"{path}: this model has RoPE, which MAR's own code has not: only this repository can run it", stacklevel=2)


def read_safetensors(path):
    """{name: tensor} of a .safetensors file: header length (8 bytes, little endian), JSON header, raw data."""
    types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
    size, out = os.path.getsize(path), {}
    try:
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if length > size:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(f.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                f.seek(8 + length + begin)
                raw = f.read(end - begin)
                if len(raw) < end - begin:
                    raise ValueError(f"tensor '{name}' is cut off")
                out[name] = torch.frombuffer(bytearray(raw), dtype=types[entry["dtype"]]).reshape(entry["shape"]) if raw else torch.empty(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} ({size} bytes) is no readable safetensors file: {error}") from None
    return out


# ---------------------------------------------------------------- AR: causal transformer, KV cache

class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)).type_as(x) * self.weight


def rope_2d(grid, head_dim, base=10000):
    """cos and sin (1 + N, head_dim / 2): half of the pairs turn with the row, half with the column.

    Position 0 is the class token at (0, 0); patch (r, s) stands at (r + 1, s + 1).
    """
    freq = base ** (-torch.arange(0, head_dim // 2, 2, dtype=torch.float32) / (head_dim // 2))
    at = torch.arange(1, grid + 1, dtype=torch.float32)[:, None] * freq                # (grid, head_dim / 4)
    angle = torch.cat([at[:, None].expand(-1, grid, -1), at[None].expand(grid, -1, -1)], dim=-1).flatten(0, 1)
    angle = torch.cat([torch.zeros(1, head_dim // 2), angle])
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn the pairs (x[2j], x[2j+1]) of x (..., T, head_dim) by the angles of rope_2d (T, head_dim / 2)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).type_as(x)


class CausalBlock(nn.Module):
    """Pre-norm block: RMSNorm, causal attention with 2-D RoPE, SwiGLU; no biases."""

    def __init__(self, cfg):
        super().__init__()
        d, hidden = cfg.n_embd, 256 * math.ceil(8 * cfg.n_embd / 3 / 256)
        self.n_head = cfg.n_head
        self.norm1, self.norm2 = RMSNorm(d), RMSNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.w1, self.w3 = nn.Linear(d, hidden, bias=False), nn.Linear(d, hidden, bias=False)
        self.w2 = nn.Linear(hidden, d, bias=False)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, h, cos, sin, cache=None, pos=0):
        """h (B, T, d). cache = (keys, values) (B, H, 1 + N, head_dim): T new entries are written at `pos`."""
        qkv = self.qkv(self.norm1(h)).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        (q, k), v = rotate(qkv[:2], cos, sin), qkv[2]                                  # (B, H, T, head_dim)
        if cache is not None:
            end = pos + h.shape[1]
            cache[0][:, :, pos:end], cache[1][:, :, pos:end] = k, v
            k, v = cache[0][:, :, :end], cache[1][:, :, :end]
        a = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)          # no dropout of weights, as in LlamaGen
        h = h + self.drop(self.proj(a.transpose(1, 2).flatten(2)))
        n = self.norm2(h)
        return h + self.drop(self.w2(F.silu(self.w1(n)) * self.w3(n)))


class Generator(nn.Module):
    """What the three have in common: the head, the randomness of a training step, one guided draw."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        if cfg.kind != "cdm":
            self.diffloss = DiffLoss(DenoisingMLP(cfg.token_dim, cfg.n_embd, cfg.head_width, cfg.head_depth))
            if cfg.inverse:
                self.inverse = InverseMap(cfg.token_dim, cfg.n_embd, cfg.n_tokens)
            if cfg.buffer:
                self.buffer = ConditionBuffer(cfg.num_classes, cfg.n_tokens, cfg.buffer, cfg.n_embd)

    @property
    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def draw(self, n, generator, per_image):
        """t and eps for `per_image` tokens of each of n images, and which labels are dropped."""
        mul = self.cfg.diffusion_batch_mul
        device = generator.device
        return {
            "drop": torch.rand(n, generator=generator, device=device) < self.cfg.class_dropout,
            "t": torch.randint(0, T_TRAIN, (n, per_image, mul), generator=generator, device=device),
            "eps": torch.randn(n, per_image, mul, self.cfg.token_dim, generator=generator, device=device),
        }

    def with_null(self, y, drop):
        return torch.where(drop, self.cfg.num_classes, y)

    def head_loss(self, x, c, pos, y, draws):
        """[mean diffusion loss, loss of T^-1] of x (B, n, D) under c (B, n, C) at positions pos (B, n)."""
        # c is broadcast, not repeated: its projection is computed once for its `mul` uses
        loss = self.diffloss(x[:, :, None], c[:, :, None], draws["t"], draws["eps"]).mean()    # (B, n, mul)
        # CHOICE(inverse): T^-1 regresses c_i from (x_i, i) beside the model; it sees c, but c does not see it.
        # Alternative: the paper leaves it undefined. Flag: --no-inverse.
        inverse = self.inverse.loss(x, pos, c.detach()) if self.cfg.inverse else torch.zeros_like(loss)
        if self.cfg.buffer and self.training:
            self.buffer.push(c.detach(), pos, y)
        return torch.stack([loss, inverse])

    def draw_patches(self, i, n_steps, c, c_null, cfg_scale, sampler, noise, pos, refine, move_null=False):
        """Algorithm 1, lines 3-9, for the n patches at positions pos (B, n) of AR step i: refine c, then denoise."""
        B, n, _ = c.shape
        steps = sampler.steps_at(i, n_steps)
        z = noise.randn(sampler.n_noise(steps), n, self.cfg.token_dim).transpose(0, 1)  # (n_noise, B, n, D)
        if refine is not None:
            # CHOICE(guidance): only the conditional branch is refined, so that guidance multiplies the displacement, too.
            # Alternative: the null branch moves along, which leaves the displacement as it is. Flag: --move_null.
            moved = refine(i, c, lambda c, full=False: self.reveal(c, pos, z[0], sampler, full))
            c, c_null = moved, c_null + (moved - c) if move_null and c_null is not None else c_null
        return self.diffloss.draw(c, c_null, cfg_scale, sampler, z, steps)              # (B, n, D)

    def head_calls(self, sampler, num_iter=None):
        """Evaluations of the denoiser per image: one per token and diffusion step (cdm: one per diffusion step)."""
        if self.cfg.kind == "cdm":
            return sampler.steps
        steps = self.chain(num_iter)
        return sum((b - a) * sampler.steps_at(i, len(steps)) for i, (a, b) in enumerate(steps))

    def chain(self, num_iter=None):
        """[(a, b)] per AR step: the a-th to (b-1)-th tokens of the generation order appear in it."""
        N = self.cfg.n_tokens
        known = self.steps_of(num_iter or N) if self.cfg.kind == "mar" else list(range(N + 1))
        return list(zip(known[:-1], known[1:]))

    def reveal(self, c, pos, x_T, sampler, full=False):
        """a = T^-1(x_hat(c)) (B, n, C), Alg. 1 lines 4-6: the condition that the patch drawn under c reveals.

        x_hat is one evaluation of the denoiser; `full` runs the paper's whole DDIM trajectory instead.
        """
        if not self.cfg.inverse:
            raise ValueError("lam > 0 needs T^-1, but this model was trained without it; use --lam 0 or train with --inverse")
        if full:
            ddim = Sampler("ddim", sampler.steps, x0_bound=sampler.x0_bound)
            x_hat = ddim(self.diffloss.denoiser(c, ts=ddim.timesteps()), x_T[None])
        else:
            # CHOICE(x_hat): evaluated at t = 900, where alpha = 0.16: nearly E[x | c], but the head's error is
            # magnified 6 times and not 20,000 times as at t = 999. Alternative: --inverse full. Flag: --inverse.
            t = torch.full(pos.shape, 900, device=c.device)
            x_hat = self.diffloss.x0_hat(x_T, t, c, sampler.x0_bound)
        return self.inverse(x_hat, pos)


class AR(Generator):
    """c_i = transformer(class, x_0 .. x_{i-1}): raster order, one patch per AR step."""

    def __init__(self, cfg):
        super().__init__(cfg)
        d = cfg.n_embd
        self.class_emb = nn.Embedding(cfg.num_classes + 1, d)                           # the last row: no class
        self.x_proj = nn.Linear(cfg.token_dim, d)
        self.blocks = nn.ModuleList(CausalBlock(cfg) for _ in range(cfg.n_layer))
        self.norm = RMSNorm(d)
        self.drop = nn.Dropout(cfg.dropout)
        cos, sin = rope_2d(cfg.grid, d // cfg.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, p in self.named_parameters():
            if p.dim() > 1 and not name.startswith(("diffloss", "inverse")):
                nn.init.normal_(p, std=0.02)
        nn.init.zeros_(self.x_proj.bias)

    def draw(self, n, generator):
        return super().draw(n, generator, self.cfg.n_tokens)

    def conditions(self, x, y):
        """c (B, N, C) from real tokens x (B, N, D) and labels y (B,) in one parallel pass."""
        h = torch.cat([self.class_emb(y)[:, None], self.x_proj(x[:, :-1])], dim=1)      # (B, N, C)
        h = self.drop(h)
        for block in self.blocks:
            h = block(h, self.cos[:-1], self.sin[:-1])
        return self.norm(h)

    def loss(self, x, y, draws):
        y = self.with_null(y, draws["drop"])
        pos = torch.arange(self.cfg.n_tokens, device=x.device).expand(len(x), -1)
        return self.head_loss(x, self.conditions(x, y), pos, y, draws)

    forward = loss                                                                      # what DDP calls

    @torch.no_grad()
    def generate(self, y, noise, sampler, cfg_scale=1.0, cfg_schedule="constant", refine=None, progress=iter, cfg_skip=0.0, move_null=False):
        """Tokens (B, N, D) of classes y (B,): Algorithm 1, with the images' own noise (ImageNoise).

        cfg_schedule: 'constant', or 'linear' from 1 at the first patch to cfg_scale at the last.
        cfg_skip: the head does without the null branch where the scale is within this of 1; 0 is exact.
        refine: None or a function (i, c (B, 1, C), inverse) -> c; move_null: guidance's null condition moves along.
        progress wraps the range of AR steps (tqdm).
        """
        cfg, B, N = self.cfg, len(y), self.cfg.n_tokens
        guided = cfg_scale != 1.0
        labels = torch.cat([y, torch.full_like(y, cfg.num_classes)]) if guided else y
        shape = (2, len(labels), cfg.n_head, N, cfg.n_embd // cfg.n_head)
        h = self.class_emb(labels)[:, None]                                             # (B or 2B, 1, C)
        kind = y.device.type                                                            # keys and values are kept as they are computed
        dtype = torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else h.dtype
        caches = [torch.empty(shape, device=y.device, dtype=dtype) for _ in self.blocks]
        tokens = []
        for i in progress(range(N)):                                                    # Alg. 1 line 1
            for block, cache in zip(self.blocks, caches):
                h = block(h, self.cos[i:i + 1], self.sin[i:i + 1], cache, i)
            c, c_null = self.norm(h).split(B) if guided else (self.norm(h), None)       # line 2
            pos = torch.full((B, 1), i, device=y.device)
            scale = guidance_at(cfg_schedule, cfg_scale, (i + 1) / N)
            c_null = c_null if abs(scale - 1) > cfg_skip else None                      # the transformer's is needed later: its cache
            x = self.draw_patches(i, N, c, c_null, scale, sampler, noise, pos, refine, move_null)     # lines 3-9
            tokens.append(x)                                                            # line 10
            h = self.x_proj(torch.cat([x, x]) if guided else x)
        return torch.cat(tokens, dim=1)


def guidance_at(schedule, scale, share):
    """Guidance scale when `share` of the tokens are known after this step: constant, or linear from 1 (MAR)."""
    return scale if schedule == "constant" else 1 + (scale - 1) * share


# ---------------------------------------------------------------- MAR: masked autoregression

class Block(nn.Module):
    """Pre-norm ViT block (names as in MAR's checkpoints): LayerNorm eps 1e-6, qkv bias, exact GELU."""

    def __init__(self, cfg, mlp_ratio=4):
        super().__init__()
        d = cfg.n_embd
        self.norm1, self.norm2 = nn.LayerNorm(d, eps=1e-6), nn.LayerNorm(d, eps=1e-6)
        self.attn = nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(d, mlp_ratio * d), nn.Linear(mlp_ratio * d, d)
        self.n_head, self.dropout = cfg.n_head, cfg.dropout
        self.drop = nn.Dropout(cfg.dropout)

    def attention(self, h, at=None, angles=None):
        """Of all tokens of h (B, T, C) to all; with `at` (B, n), of these only. angles: cos and sin (B or 1, T, head_dim / 2) of RoPE."""
        if at is None:
            q, k, v = self.attn.qkv(h).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        else:
            (w_q, w_kv), (b_q, b_kv) = (p.tensor_split([h.shape[-1]]) for p in (self.attn.qkv.weight, self.attn.qkv.bias))
            q = F.linear(gather(h, at), w_q, b_q).unflatten(-1, (self.n_head, -1)).transpose(1, 2)           # (B, H, n, head_dim)
            k, v = F.linear(h, w_kv, b_kv).unflatten(-1, (2, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        if angles is not None:
            k = rotate(k, *(z[:, None] for z in angles))
            q = rotate(q, *((z if at is None else gather(z.expand(len(h), -1, -1), at))[:, None] for z in angles))
        a = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout * self.training)
        return self.drop(self.attn.proj(a.transpose(1, 2).flatten(2)))

    def feed_forward(self, h):
        return self.drop(self.mlp.fc2(self.drop(F.gelu(self.mlp.fc1(h)))))

    def forward(self, h, at=None, angles=None):
        """h (B, T, C) -> (B, T, C), or (B, n, C) of the tokens `at` (B, n)."""
        h = (h if at is None else gather(h, at)) + self.attention(self.norm1(h), at, angles)
        return h + self.feed_forward(self.norm2(h))


def gather(x, index):
    """Rows index (B, n) of x (B, N, C) -> (B, n, C)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def truncated_normal(u, mean=1.0, std=0.25, low=0.7, high=1.0):
    """The u-quantile (u in [0, 1)) of a normal distribution cut to [low, high]: MAR's mask ratio."""
    cdf = lambda z: 0.5 * (1 + math.erf((z - mean) / std / math.sqrt(2)))
    p = cdf(low) + u * (cdf(high) - cdf(low))
    return mean + std * math.sqrt(2) * torch.erfinv(torch.tensor(2 * p - 1, dtype=torch.float64)).item()


class MAR(Generator):
    """Any set of known patches -> conditions of all others; patches appear in random or given order, one or several per step.

    An `order` (B, N) lists positions in the order in which they become known.
    """

    def __init__(self, cfg):
        super().__init__(cfg)
        d, N, n_class = cfg.n_embd, cfg.n_tokens, cfg.n_class_tokens
        self.class_emb = nn.Embedding(cfg.num_classes, d)
        self.fake_latent = nn.Parameter(torch.zeros(1, d))                              # the null class
        self.z_proj, self.z_proj_ln = nn.Linear(cfg.token_dim, d), nn.LayerNorm(d, eps=1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, n_class + N, d))
        self.encoder_blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.encoder_norm = nn.LayerNorm(d, eps=1e-6)
        self.decoder_embed = nn.Linear(d, d)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, d))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, n_class + N, d))
        self.decoder_blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.decoder_norm = nn.LayerNorm(d, eps=1e-6)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, N, d))
        if cfg.rope:
            for name, z in zip(("cos", "sin"), rope_2d(cfg.grid, d // cfg.n_head)):     # all class tokens stand at (0, 0)
                self.register_buffer(name, torch.cat([z[:1].expand(n_class, -1), z[1:]])[None], persistent=False)
        for name, p in self.named_parameters():
            if name.startswith(("diffloss", "inverse")):
                continue
            if isinstance(self.get_submodule(name.rpartition(".")[0]), nn.Linear):
                nn.init.xavier_uniform_(p) if p.dim() > 1 else nn.init.zeros_(p)
            elif not name.endswith(("norm.weight", "norm.bias", "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias",
                                    "ln.weight", "ln.bias")):
                nn.init.normal_(p, std=0.02)

    def class_tokens(self, y):
        """(B, C) embedding of labels y; y == num_classes is the null class."""
        return torch.cat([self.class_emb.weight, self.fake_latent])[y]

    def step_conditions(self, x_known, known, y, at=None):
        """c (B, N, C) of all positions, given tokens x_known (B, n, D) at positions known (B, n); with `at` (B, m), c of these only.

        With `at`, the last block looks at all tokens but computes these alone: one block in 24 is nearly free.
        """
        B, n_class = len(y), self.cfg.n_class_tokens
        pos = torch.cat([torch.arange(n_class, device=y.device).expand(B, -1), known + n_class], dim=1)
        h = torch.cat([self.class_tokens(y)[:, None].expand(-1, n_class, -1), self.z_proj(x_known)], dim=1)
        h = self.z_proj_ln(h + gather(self.encoder_pos_embed_learned.expand(B, -1, -1), pos))
        everywhere = (self.cos, self.sin) if self.cfg.rope else None
        angles = everywhere and [gather(z.expand(B, -1, -1), pos) for z in everywhere]
        for block in self.encoder_blocks:
            h = block(h, None, angles)
        h = self.decoder_embed(self.encoder_norm(h))                                    # (B, n_class + n, C)
        full = self.mask_token.to(h.dtype).expand(B, n_class + self.cfg.n_tokens, -1)
        h = full.scatter(1, pos[..., None].expand(-1, -1, h.shape[-1]), h) + self.decoder_pos_embed_learned
        for block in self.decoder_blocks[:-1]:
            h = block(h, None, everywhere)
        if at is None:
            return self.decoder_norm(self.decoder_blocks[-1](h, None, everywhere))[:, n_class:] + self.diffusion_pos_embed_learned
        h = self.decoder_norm(self.decoder_blocks[-1](h, at + n_class, everywhere))     # (B, m, C)
        return h + gather(self.diffusion_pos_embed_learned.expand(B, -1, -1), at)

    def draw(self, n, generator):
        u = random.Random(generator.initial_seed()).random()                            # one per step, on every rank alike
        ratio = truncated_normal(u, std=self.cfg.mask_std, low=self.cfg.mask_min)
        n_known = self.cfg.n_tokens - max(1, math.ceil(ratio * self.cfg.n_tokens))
        order = torch.rand(n, self.cfg.n_tokens, generator=generator, device=generator.device).argsort(1)
        return {"order": order, **super().draw(n, generator, self.cfg.n_tokens - n_known)}

    def loss(self, x, y, draws):
        order, n = draws["order"], draws["t"].shape[1]
        known, masked = order[:, :-n], order[:, -n:]
        y = self.with_null(y, draws["drop"])
        c = self.step_conditions(gather(x, known), known, y)
        return self.head_loss(gather(x, masked), gather(c, masked), masked, y, draws)

    forward = loss

    def steps_of(self, num_iter):
        """How many tokens are known before each step, and at the end: ints (steps + 1), cosine schedule.

        num_iter beyond N would leave steps without a token; those are dropped.
        """
        N, left = self.cfg.n_tokens, [self.cfg.n_tokens]
        for s in range(num_iter - 1):
            left.append(max(1, min(left[-1] - 1, math.floor(N * math.cos(math.pi / 2 * (s + 1) / num_iter)))))
            if left[-1] == left[-2]:
                left.pop()
        return [N - n for n in left] + [N]

    def conditions(self, x, y, order=None, num_iter=None):
        """Teacher-forced c (B, N, C): position p gets its condition of the step at which `order` reaches it.

        order (B, N), default raster; num_iter steps, default N (one patch a step).
        """
        N = self.cfg.n_tokens
        if order is None:
            order = torch.arange(N, device=x.device).expand(len(x), -1)
        parts = [self.step_conditions(gather(x, order[:, :a]), order[:, :a], y, order[:, a:b]) for a, b in self.chain(num_iter)]
        return gather(torch.cat(parts, dim=1), order.argsort(1))                        # from the order's places to positions

    @torch.no_grad()
    def generate(self, y, noise, sampler, cfg_scale=1.0, cfg_schedule="linear", refine=None, progress=iter,
                 cfg_skip=0.0, move_null=False, num_iter=None, order=None, x=None, n_known=0):
        """Tokens (B, N, D) of classes y (B,) in num_iter steps (default N) of a cosine schedule.

        cfg_skip: steps whose guidance scale is within this of 1 do without the null branch; 0 is exact.
        order (B, N): default drawn from the noise. Inpainting: x (B, N, D) with its first n_known entries
        of `order` given; these stay as they are.
        """
        B, N, D = len(y), self.cfg.n_tokens, self.cfg.token_dim
        if order is None:
            order = noise.rand(N).argsort(1)
        x = torch.zeros(B, N, D, device=y.device) if x is None else x.clone()
        steps = [(max(a, n_known), b) for a, b in self.chain(num_iter) if b > n_known]
        guided = cfg_scale != 1.0
        labels = torch.cat([y, torch.full_like(y, self.cfg.num_classes)])
        for i in progress(range(len(steps))):
            a, b = steps[i]
            pos = order[:, a:b]
            scale = guidance_at(cfg_schedule, cfg_scale, b / N)
            both = guided and abs(scale - 1) > cfg_skip
            twice = (lambda z: torch.cat([z, z])) if both else (lambda z: z)
            c = self.step_conditions(twice(gather(x, order[:, :a])), twice(order[:, :a]), labels if both else y, twice(pos))
            c, c_null = c.split(B) if both else (c, None)
            patches = self.draw_patches(i, len(steps), c, c_null, scale, sampler, noise, pos, refine, move_null)
            x.scatter_(1, pos[..., None].expand(-1, -1, D), patches)
        return x


# ---------------------------------------------------------------- CDM: the conditional-diffusion baseline

class AdaLNBlock(Block):
    """Block whose norms are modulated and whose branches are gated by the condition (adaLN-zero)."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.norm1 = nn.LayerNorm(cfg.n_embd, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(cfg.n_embd, elementwise_affine=False, eps=1e-6)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.n_embd, 6 * cfg.n_embd))

    def forward(self, h, y):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(y).chunk(6, dim=-1)
        h = h + gate1 * self.attention(modulate(self.norm1(h), shift1, scale1))
        return h + gate2 * self.feed_forward(modulate(self.norm2(h), shift2, scale2))


class DenoisingTransformer(nn.Module):
    """eps and variance fraction of all tokens of an image at once: x_t (B, N, D), t (B, 1), c (B, 1, C)."""

    def __init__(self, cfg):
        super().__init__()
        d = cfg.n_embd
        self.time_embed = TimeEmbedding(d)
        self.x_proj = nn.Linear(cfg.token_dim, d)
        self.pos_embed = nn.Parameter(torch.zeros(1, cfg.n_tokens, d))
        self.blocks = nn.ModuleList(AdaLNBlock(cfg) for _ in range(cfg.n_layer))
        self.norm = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d))
        self.linear = nn.Linear(d, 2 * cfg.token_dim)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.normal_(self.pos_embed, std=0.02)
        for layer in (self.time_embed.mlp[0], self.time_embed.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (*(b.adaLN_modulation[1] for b in self.blocks), self.modulation[1], self.linear):
            nn.init.zeros_(layer.weight)

    def forward(self, x_t, t, c):
        y = self.time_embed(t) + c                                                      # (B, 1, C)
        h = self.x_proj(x_t) + self.pos_embed
        for block in self.blocks:
            h = block(h, y)
        return self.linear(modulate(self.norm(h), *self.modulation(y).chunk(2, dim=-1))).chunk(2, dim=-1)


class CDM(Generator):
    """The baseline: the whole image is one 'patch' under one fixed condition, its class."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.class_emb = nn.Embedding(cfg.num_classes + 1, cfg.n_embd)
        nn.init.normal_(self.class_emb.weight, std=0.02)
        self.diffloss = DiffLoss(DenoisingTransformer(cfg))

    def draw(self, n, generator):
        draws = super().draw(n, generator, self.cfg.n_tokens)                           # one use and one t per image
        return {"drop": draws["drop"], "t": draws["t"][:, :1, 0], "eps": draws["eps"][:, :, 0]}

    def conditions(self, x, y):
        """c (B, N, C): the class embedding, the same for every patch."""
        return self.class_emb(y)[:, None].expand(-1, self.cfg.n_tokens, -1)

    def loss(self, x, y, draws):
        c = self.class_emb(self.with_null(y, draws["drop"]))[:, None]
        loss = self.diffloss(x, c, draws["t"], draws["eps"]).mean()
        return torch.stack([loss, torch.zeros_like(loss)])

    forward = loss

    @torch.no_grad()
    def generate(self, y, noise, sampler, cfg_scale=1.0, cfg_schedule="constant", refine=None, progress=iter):
        """Tokens (B, N, D): one trajectory for the whole image; there is no chain to refine."""
        if refine is not None:
            raise ValueError("cdm has one fixed condition per image and no AR chain: nothing to refine; use an ar or mar model")
        z = noise.randn(sampler.n_noise(sampler.steps), self.cfg.n_tokens, self.cfg.token_dim).transpose(0, 1)
        c = self.class_emb(y)[:, None]
        c_null = self.class_emb(torch.full_like(y, self.cfg.num_classes))[:, None]
        for _ in progress(range(1)):
            x = sampler(self.diffloss.denoiser(c, c_null, cfg_scale), z)
        return x
