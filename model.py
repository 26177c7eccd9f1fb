"""The generators: AR (causal) here, MAR and CDM in mar.py; one interface for all three.

    loss(x, y, draws)          the diffusion loss of tokens x (B, N, D) under labels y (B,)
    randomness(n, generator)   of a training step: a dict of (n, ...) tensors
    conditions(x, y, order)    teacher-forced conditions c (B, N, C) by place: what the head is
                               given when the known patches are real
    generate(y, noise, ...)    tokens (B, N, D): Algorithm 1; `refine` moves each condition

Place i is an index in the generation order, a position one in the raster. An order (B, N) lists
positions as they become known; AR has but the raster scan and does not look at it.
Not here: the denoising head and its samplers (diffloss.py), refinement (ot_refine.py).
References: LlamaGen arXiv 2406.06525 (the blocks); MAR arXiv 2406.11838 (diffusion loss).
"""
import math
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

from diffloss import OBJECTIVES, T_TRAIN, DenoisingMLP
from command import closest
from files import check_fields
from runs import check_fits, read_checkpoint

# CHOICE(guidance): only the conditional branch is refined, so that guidance multiplies the
# displacement, too. This scale is from the tuning sets. Alternative: none, 1. Flag: --cfg_scale.
GUIDANCE = 1.5
KINDS = ("ar", "mar", "cdm")


@dataclass
class Config:
    """Architecture, as stored in a checkpoint. `num_classes` is also the null label of guidance."""
    kind: str                       # ar, mar or cdm
    n_layer: int                    # mar: of the encoder, and of the decoder unless n_decoder is
    n_head: int
    n_embd: int                     # C, the width of a condition
    head_depth: int = 0             # the denoising MLP; cdm has none
    head_width: int = 0
    token_dim: int = 16             # D
    grid: int = 16                  # N = grid * grid tokens in raster order
    num_classes: int = 1000
    dropout: float = 0.1
    class_dropout: float = 0.1      # share of labels replaced by the null label in training
    diffusion_batch_mul: int = 4    # uses of each token per step, with fresh t and noise
    n_class_tokens: int = 64        # mar: copies of the class token in front of the sequence
    mask_min: float = 0.7           # mar: the training mask ratio is normal (mean 1, mask_std),
    mask_std: float = 0.25          # cut to [mask_min, 1]
    rope: bool = False              # mar: 2-D RoPE in every attention, beside learned positions
    objective: str = "eps"          # what the head is trained for: one of diffloss.OBJECTIVES
    n_decoder: int = 0              # mar: layers of the decoder; 0: n_layer

    def __post_init__(self):
        check_fields(asdict(self), {f.name: f.type for f in fields(self)})
        least = dict.fromkeys(
            ("n_head", "n_embd", "token_dim", "grid", "diffusion_batch_mul", "num_classes"), 1)
        most = dict.fromkeys(("dropout", "class_dropout", "mask_min"), 1)
        known = {"kind": KINDS, "objective": OBJECTIVES}
        for name, value in asdict(self).items():
            if name in known and value not in known[name]:
                raise ValueError(f"{name}={value!r}; choose one of {', '.join(known[name])}")
            low, high = least.get(name, 0), most.get(name, 2 ** 20)
            if name not in known and not low <= value <= high:
                raise ValueError(f"{name}={value} is out of range: at least {low}, at most {high}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be divisible by n_head={self.n_head}")
        if (self.kind == "ar" or self.rope) and self.n_embd // self.n_head % 4:
            raise ValueError(f"n_embd / n_head = {self.n_embd // self.n_head} must be divisible by "
                             "4 for 2-D RoPE")

    @property
    def n_tokens(self):
        return self.grid ** 2


def sizes(n_layer, n_head, n_embd, head_depth=0, head_width=0):
    return locals()


# AR sizes follow LlamaGen ("Ours" and "Baseline" of the paper are gpt-xl), the heads MAR's of the
# same size; CDM sizes follow DiT. The tiny ones are equal within 5 % and run on a CPU.
PRESETS = {
    "gpt-b": dict(kind="ar", **sizes(12, 12, 768, 6, 1024)),
    "gpt-l": dict(kind="ar", **sizes(24, 16, 1024, 8, 1280)),
    "gpt-xl": dict(kind="ar", **sizes(36, 20, 1280, 12, 1536)),
    "mar-b": dict(kind="mar", **sizes(12, 12, 768, 6, 1024)),
    "mar-l": dict(kind="mar", **sizes(16, 16, 1024, 8, 1280)),
    "mar-h": dict(kind="mar", **sizes(20, 16, 1280, 12, 1536)),
    "cdm-b": dict(kind="cdm", **sizes(12, 12, 768)),
    "cdm-l": dict(kind="cdm", **sizes(24, 16, 1024)),
    "cdm-xl": dict(kind="cdm", **sizes(28, 16, 1152)),
    "gpt-tiny": dict(kind="ar", **sizes(4, 4, 64, 2, 128), dropout=0.05, diffusion_batch_mul=1),
    "mar-tiny": dict(kind="mar", **sizes(2, 6, 72, 2, 128), dropout=0.05,
                     diffusion_batch_mul=2,     # half of the tokens are masked: gpt-tiny's rows
                     n_class_tokens=4,
                     # CHOICE(rope): 2-D RoPE beside MAR's learned positions, with which alone it
                     # is slow to find the neighbours of a patch (FD 4.0 instead of 1.7 after 2400
                     # steps). Alternative: MAR's own, as in mar-b/l/h. Flag: --set rope=0.
                     rope=True,
                     # with MAR's .7 a context of more than 4 of 16 patches would never be trained
                     mask_min=0.0, mask_std=0.5),
    "cdm-tiny": dict(kind="cdm", **sizes(4, 2, 82), dropout=0.05, diffusion_batch_mul=1),
}
OF_MAR = ("n_class_tokens", "mask_min", "mask_std", "rope", "n_decoder")
UNREAD = {"ar": OF_MAR, "cdm": (*OF_MAR, "head_depth", "head_width"), "mar": ()}    # by each kind


def preset(name, **changes):
    """The Config of a preset with some fields changed."""
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}; {closest(name, PRESETS)}")
    kind = PRESETS[name]["kind"]
    for field in changes.keys() & UNREAD[kind]:
        raise ValueError(f"{field}={changes[field]} would change nothing: a model of kind {kind} "
                         "does not read it")
    return Config(**{**PRESETS[name], **changes})


def build(config):
    """The model of a Config."""
    if config.kind == "ar":
        return AR(config)
    import mar
    return mar.MAR(config) if config.kind == "mar" else mar.CDM(config)


# ---------------------------------------------------------------- the causal transformer

def rope_2d(grid, head_dim):
    """cos and sin (1 + N, head_dim) for `rotate`: half of the pairs turn with the row, half with
    the column. Position 0 is the class token at (0, 0); patch (r, s) stands at (r + 1, s + 1).
    """
    freq = 10000 ** (-torch.arange(0, head_dim // 2, 2, dtype=torch.float32) / (head_dim // 2))
    at = torch.arange(1, grid + 1, dtype=torch.float32)[:, None] * freq      # (grid, head_dim / 4)
    rows, columns = at[:, None].expand(-1, grid, -1), at[None].expand(grid, -1, -1)
    angle = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    angle = torch.cat([torch.zeros(1, head_dim // 2), angle])
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, cos], -1).flatten(1), torch.stack([-sin, sin], -1).flatten(1)


def rotate(x, cos, sin):
    """Turn the pairs (a, b) = (x[2j], x[2j+1]) of x (..., T, head_dim) by tables (T, head_dim) of
    rope_2d, to (a cos - b sin, b cos + a sin): without complex numbers, which torch.compile cannot
    fuse."""
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin).type_as(x)


class CausalBlock(nn.Module):
    """Pre-norm block: RMSNorm, causal attention with 2-D RoPE, SwiGLU; no biases."""

    def __init__(self, cfg):
        super().__init__()
        d, hidden = cfg.n_embd, 256 * math.ceil(8 * cfg.n_embd / 3 / 256)
        self.n_head = cfg.n_head
        self.norm1, self.norm2 = nn.RMSNorm(d, 1e-5), nn.RMSNorm(d, 1e-5)
        self.qkv, self.proj = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.w1, self.w3 = nn.Linear(d, hidden, bias=False), nn.Linear(d, hidden, bias=False)
        self.w2 = nn.Linear(hidden, d, bias=False)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, h, cos, sin, cache=None, at=0):
        """h (B, T, C). cache = keys, values (B, H, N, head_dim); then T is 1, its place `at`."""
        qkv = self.qkv(self.norm1(h)).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        (q, k), v = rotate(qkv[:2], cos, sin), qkv[2]                        # (B, H, T, head_dim)
        if cache is not None:
            cache[0][:, :, at:at + 1], cache[1][:, :, at:at + 1] = k, v
            k, v = cache[0][:, :, :at + 1], cache[1][:, :, :at + 1]
        # no dropout of attention weights, as in LlamaGen
        a = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        h = h + self.drop(self.proj(a.transpose(1, 2).flatten(2)))
        n = self.norm2(h)
        return h + self.drop(self.w2(F.silu(self.w1(n)) * self.w3(n)))


class Generator(nn.Module):
    """What the generators share: the head, the randomness of a training step."""

    def __init__(self, cfg, net=None):
        super().__init__()
        self.cfg = cfg
        net = net or DenoisingMLP(cfg.token_dim, cfg.n_embd, cfg.head_width, cfg.head_depth)
        self.diffloss = OBJECTIVES[cfg.objective](net)

    @property
    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    @property
    def device(self):
        return next(self.parameters()).device

    def randomness(self, n, generator, per_image=None):
        """t and eps for `per_image` (all) tokens of each of n images, and which labels are dropped.
        """
        at = {"generator": generator, "device": generator.device}
        uses = (n, per_image or self.cfg.n_tokens, self.cfg.diffusion_batch_mul)
        return {"drop": torch.rand(n, **at) < self.cfg.class_dropout,
                "t": torch.randint(0, T_TRAIN, uses, **at),
                "eps": torch.randn(*uses, self.cfg.token_dim, **at)}

    def with_null(self, y, drop):
        return torch.where(drop, self.cfg.num_classes, y)

    def head_loss(self, x, c, draws):
        """The mean diffusion loss of tokens x (B, n, D) under conditions c (B, n, C)."""
        # c is broadcast, not repeated: its projection is computed once for its `mul` uses
        return self.diffloss(x[:, :, None], c[:, :, None], draws["t"], draws["eps"]).mean()

    def order(self, k, seed=0):
        """The generation order (N,) that refined images of class k share: the raster scan."""
        return torch.arange(self.cfg.n_tokens, device=self.device)

    def places(self, num_iter=None):
        """[(a, b)] per AR step: places a .. b-1 of the generation order appear in it."""
        return [(i, i + 1) for i in range(self.cfg.n_tokens)]


def guidance_at(schedule, scale, share):
    """Guidance when `share` of the tokens are known after this step: constant or linear from 1."""
    return scale if schedule == "constant" else 1 + (scale - 1) * share


class AR(Generator):
    """c_i = transformer(class, x_0 .. x_{i-1}): raster order, one patch per AR step."""

    def __init__(self, cfg):
        super().__init__(cfg)
        d = cfg.n_embd
        self.class_emb = nn.Embedding(cfg.num_classes + 1, d)               # the last row: no class
        self.x_proj = nn.Linear(cfg.token_dim, d)
        self.blocks = nn.ModuleList(CausalBlock(cfg) for _ in range(cfg.n_layer))
        self.norm = nn.RMSNorm(d, 1e-5)
        self.drop = nn.Dropout(cfg.dropout)
        for name, table in zip(("cos", "sin"), rope_2d(cfg.grid, d // cfg.n_head)):
            self.register_buffer(name, table, persistent=False)
        for name, p in self.named_parameters():
            if p.dim() > 1 and not name.startswith("diffloss"):
                nn.init.normal_(p, std=0.02)
        nn.init.zeros_(self.x_proj.bias)

    def conditions(self, x, y, order=None, num_iter=None):
        """c (B, N, C) of real tokens x (B, N, D) and labels y (B,), in one parallel pass."""
        h = self.drop(torch.cat([self.class_emb(y)[:, None], self.x_proj(x[:, :-1])], dim=1))
        for block in self.blocks:
            h = block(h, self.cos[:-1], self.sin[:-1])
        return self.norm(h)

    def loss(self, x, y, draws):
        return self.head_loss(x, self.conditions(x, self.with_null(y, draws["drop"])), draws)

    forward = loss                                                           # what DDP calls

    def empty_cache(self, rows, like):
        """Keys and values (2, rows, H, N, head_dim) of each block, on the device of `like`."""
        cfg = self.cfg
        shape = (2, rows, cfg.n_head, cfg.n_tokens, cfg.n_embd // cfg.n_head)
        return [like.new_empty(shape) for _ in self.blocks]

    def next_condition(self, i, h, caches):
        """c (B, C) of patch i. h (B, 1, C) embeds the one new token of the context: the class at
        i = 0, then patch i - 1."""
        for block, cache in zip(self.blocks, caches):
            h = block(h, self.cos[i:i + 1], self.sin[i:i + 1], cache, i)
        return self.norm(h)[:, 0]

    @torch.no_grad()
    def generate(self, y, noise, cfg_scale=1.0, refine=None, on_condition=None,
                 cfg_schedule=None, order=None, **sampling):
        """Algorithm 1: tokens (B, N, D) of classes y (B,), with the images' own noise (ImageNoise).

        refine(i, c (B, C), y) -> c (B, C) moves the conditions of place i; on_condition(i, c,
        refined) sees them before and after. cfg_schedule: constant (default), or linear from 1 to
        cfg_scale along the chain. sampling: solver, steps, temperature, callback of the head.
        """
        N, guided = self.cfg.n_tokens, cfg_scale != 1.0
        twice = (lambda z: torch.cat([z, z])) if guided else (lambda z: z)
        n_noise = self.diffloss.n_noise(**sampling)
        labels = torch.cat([y, torch.full_like(y, self.cfg.num_classes)]) if guided else y
        h = self.class_emb(labels)[:, None]                                  # (B or 2B, 1, C)
        caches, tokens = self.empty_cache(len(h), h), []
        z = noise.randn(N, n_noise, self.cfg.token_dim).permute(1, 2, 0, 3)  # (N, n_noise, B, D)

        for i in range(N):                                                   # Alg. 1 line 1
            c = self.next_condition(i, h, caches).float()                           # line 2
            c, c_null = c.chunk(2) if guided else (c, None)
            # place 0 knows the class alone: nothing has drifted
            refined = refine(i, c, y) if refine and i > 0 else c             # lines 3-8
            if on_condition:
                on_condition(i, c, refined)

            scale = guidance_at(cfg_schedule or "constant", cfg_scale, (i + 1) / N)
            x_i = self.diffloss.sample(refined, c_null, scale, z[i], **sampling)    # line 9
            tokens.append(x_i)                                               # line 10
            h = self.x_proj(twice(x_i))[:, None]
        return torch.stack(tokens, dim=1)


# ---------------------------------------------------------------- checkpoints

def load_model(path, device="cpu"):
    """(model in eval mode, checkpoint dict); ValueError if the weights do not fit. A field of
    Config that the file lacks takes its default; one that Config lacks is dropped, its weights too.
    """
    state = read_checkpoint(path)
    known = {f.name for f in fields(Config)}
    try:
        cfg = Config(**{k: v for k, v in state["config"].items() if k in known})
        check_fits(cfg, state["data"], len(state["ema"]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} has a damaged config: {error}") from None
    gone = tuple(f"{k}." for k in state["config"] if k not in known)
    weights = {k: v for k, v in state["ema"].items() if not k.startswith(gone)}
    try:
        with torch.device("meta"):              # no memory is taken before it is known to be needed
            build(cfg).load_state_dict(weights, assign=True)
        model = build(cfg)
        model.load_state_dict(weights)
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        raise ValueError(f"{path} was written by another version of this project, its weights do "
                         f"not fit: {str(error).splitlines()[1].strip()}; train again, or use the "
                         "version that wrote it") from None
    model.diffloss.x0_bound = state["data"].get("x0_bound")
    return model.to(device).eval(), state
