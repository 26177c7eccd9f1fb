"""Around the core: MAR (masked autoregression), CDM (the whole-image baseline), MAR's weights.

    MAR   any set of known patches -> conditions of all others; random or given generation orders
    CDM   no chain at all: one transformer denoises every token of an image under its class

Both offer what AR offers (model.py): draw, loss, conditions, generate. Not here: the head and its
samplers (diffloss.py), refinement (ot_refine.py).

    python mar.py export out/mar mar.pth              a checkpoint of train.py in MAR's own layout
    python mar.py inpaint x.png m.png --ckpt out/mar  the white part of m.png is drawn anew

References: MAR arXiv 2406.11838; DiT arXiv 2212.09748 (CDM's blocks). Parameter names are those of
MAR's released checkpoints, which load as they are (from_mar).
"""
from command import Parser, run        # first: it answers signals

import argparse
import math
import random
import sys
import warnings
from dataclasses import asdict, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import sets
from data import DATASETS, patchify
from diffloss import TimeEmbedding
from files import check_output, check_weights, save_checkpoint
from model import PRESETS, Config, Generator, build, guidance_at, rope_2d, rotate
from runs import read_checkpoint
from vae import KL16_SCALE, state_problem


# ---------------------------------------------------------------- MAR

def gather(x, index):
    """Rows index (B, n) of x (B, N, C) -> (B, n, C)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


class Block(nn.Module):
    """Pre-norm ViT block, named as MAR's: LayerNorm eps 1e-6, qkv with bias, exact GELU."""

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
        """Of all tokens of h (B, T, C) to all; with `at` (B, n), of these only -> (B, n, C).

        angles: RoPE's cos and sin, each (B or 1, T, head_dim).
        """
        heads = lambda z, *n: z.unflatten(-1, (*n, self.n_head, -1))
        if at is None:
            q, k, v = heads(self.attn.qkv(h), 3).permute(2, 0, 3, 1, 4)     # (B, H, T, head_dim)
        else:
            C = h.shape[-1]
            (w_q, w_kv), (b_q, b_kv) = (p.tensor_split([C]) for p in self.attn.qkv.parameters())
            q = heads(F.linear(gather(h, at), w_q, b_q)).transpose(1, 2)    # (B, H, n, head_dim)
            k, v = heads(F.linear(h, w_kv, b_kv), 2).permute(2, 0, 3, 1, 4)

        if angles is not None:
            k = rotate(k, *(z[:, None] for z in angles))
            if at is not None:
                angles = [gather(z.expand(len(h), -1, -1), at) for z in angles]
            q = rotate(q, *(z[:, None] for z in angles))

        a = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout * self.training)
        return self.drop(self.attn.proj(a.transpose(1, 2).flatten(2)))

    def feed_forward(self, h):
        return self.drop(self.mlp.fc2(self.drop(F.gelu(self.mlp.fc1(h)))))

    def forward(self, h, at=None, angles=None):
        """h (B, T, C) -> (B, T, C), or (B, n, C) of the tokens `at` (B, n)."""
        h = (h if at is None else gather(h, at)) + self.attention(self.norm1(h), at, angles)
        return h + self.feed_forward(self.norm2(h))


def truncated_normal(u, mean=1.0, std=0.25, low=0.7, high=1.0):
    """The u-quantile (0 <= u < 1) of a normal distribution cut to [low, high]: a mask ratio."""
    cdf = lambda z: 0.5 * (1 + math.erf((z - mean) / std / math.sqrt(2)))
    p = cdf(low) + u * (cdf(high) - cdf(low))
    z = torch.erfinv(torch.tensor(2 * p - 1, dtype=torch.float64)).item()
    return mean + std * math.sqrt(2) * z


class MAR(Generator):
    """Any set of known patches -> conditions of all others; one or several patches a step.

    An `order` (B, N) lists positions as they become known: place j of it is position order[:, j].
    """

    def __init__(self, cfg):
        super().__init__(cfg)
        d, N, n_class = cfg.n_embd, cfg.n_tokens, cfg.n_class_tokens
        self.class_emb = nn.Embedding(cfg.num_classes, d)
        self.fake_latent = nn.Parameter(torch.zeros(1, d))                  # the null class
        self.z_proj, self.z_proj_ln = nn.Linear(cfg.token_dim, d), nn.LayerNorm(d, eps=1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, n_class + N, d))
        self.encoder_blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.encoder_norm = nn.LayerNorm(d, eps=1e-6)
        self.decoder_embed = nn.Linear(d, d)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, d))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, n_class + N, d))
        self.decoder_blocks = nn.ModuleList(Block(cfg)
                                            for _ in range(cfg.n_decoder or cfg.n_layer))
        self.decoder_norm = nn.LayerNorm(d, eps=1e-6)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, N, d))
        if cfg.rope:                                        # every class token stands at (0, 0)
            for name, z in zip(("cos", "sin"), rope_2d(cfg.grid, d // cfg.n_head)):
                z = torch.cat([z[:1].expand(n_class, -1), z[1:]])
                self.register_buffer(name, z[None], persistent=False)
        self.reset_parameters()

    def reset_parameters(self):
        """Xavier for matrices, 0.02 for embeddings; norms and the head keep their own."""
        for name, p in self.named_parameters():
            module = self.get_submodule(name.rpartition(".")[0])
            if name.startswith("diffloss") or isinstance(module, nn.LayerNorm):
                continue
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(p) if p.dim() > 1 else nn.init.zeros_(p)
            else:
                nn.init.normal_(p, std=0.02)

    def order(self, k, seed=0):
        """The generation order (N,) that refined images of class k share.

        CHOICE(orders): a mar condition depends on which patches are known, so that refined images
        share an order, random by class. Alternative: the raster scan for all, better on the digits
        and much worse on Fashion-MNIST. Flag: --order.
        """
        generator = torch.Generator().manual_seed(1_000_003 * seed + k)
        return torch.randperm(self.cfg.n_tokens, generator=generator).to(self.device)

    def class_tokens(self, y):
        """(B, C) embedding of labels y; y == num_classes is the null class."""
        return torch.cat([self.class_emb.weight, self.fake_latent])[y]

    def step_conditions(self, x_known, known, y, at=None):
        """c (B, N, C) of all positions, given tokens x_known (B, n, D) at positions known (B, n).

        With `at` (B, m), c of these only: the last block then looks at all tokens but computes
        these alone, so that one block in 2 n_layer is nearly free.
        """
        B, N, n_class = len(y), self.cfg.n_tokens, self.cfg.n_class_tokens
        first = torch.arange(n_class, device=y.device).expand(B, -1)
        pos = torch.cat([first, known + n_class], dim=1)                    # (B, n_class + n)
        everywhere = (self.cos, self.sin) if self.cfg.rope else None
        angles = everywhere and [gather(z.expand(B, -1, -1), pos) for z in everywhere]

        y_emb = self.class_tokens(y)[:, None].expand(-1, n_class, -1)
        h = torch.cat([y_emb, self.z_proj(x_known)], dim=1)                 # (B, n_class + n, C)
        h = self.z_proj_ln(h + gather(self.encoder_pos_embed_learned.expand(B, -1, -1), pos))
        for block in self.encoder_blocks:
            h = block(h, None, angles)
        h = self.decoder_embed(self.encoder_norm(h))

        full = self.mask_token.to(h.dtype).expand(B, n_class + N, -1)
        h = full.scatter(1, pos[..., None].expand(-1, -1, h.shape[-1]), h)  # (B, n_class + N, C)
        h = h + self.decoder_pos_embed_learned
        for block in self.decoder_blocks[:-1]:
            h = block(h, None, everywhere)
        if at is None:
            h = self.decoder_norm(self.decoder_blocks[-1](h, None, everywhere))[:, n_class:]
            return h + self.diffusion_pos_embed_learned
        h = self.decoder_norm(self.decoder_blocks[-1](h, at + n_class, everywhere))
        return h + gather(self.diffusion_pos_embed_learned.expand(B, -1, -1), at)

    def randomness(self, n, generator):
        """All randomness of a training step: an order, one mask ratio for all, and the head's."""
        cfg, device = self.cfg, generator.device
        # of the step, not of the image, so that every process masks as many
        u = random.Random(generator.initial_seed()).random()
        ratio = truncated_normal(u, std=cfg.mask_std, low=cfg.mask_min)
        masked = max(1, math.ceil(ratio * cfg.n_tokens))
        order = torch.rand(n, cfg.n_tokens, generator=generator, device=device).argsort(1)
        return {"order": order, **super().randomness(n, generator, masked)}

    def loss(self, x, y, draws):
        order, n = draws["order"], draws["t"].shape[1]
        known, masked = order[:, :-n], order[:, -n:]
        y = self.with_null(y, draws["drop"])
        c = self.step_conditions(gather(x, known), known, y)
        return self.head_loss(gather(x, masked), gather(c, masked), draws)

    forward = loss                                                          # what DDP calls

    def places(self, num_iter=None, n_known=0):
        """[(a, b)] per AR step of a cosine schedule: places a .. b - 1 of the order appear in it.

        num_iter: default N, one patch a step; steps left without a patch are dropped, as are the
        first n_known places, which are known.
        """
        N = self.cfg.n_tokens
        num_iter, ends = num_iter or N, [0]
        for s in range(1, num_iter):
            left = math.floor(N * math.cos(math.pi / 2 * s / num_iter))
            ends.append(N - max(1, min(N - ends[-1] - 1, left)))
        ends = [max(end, n_known) for end in (*ends, N)]
        return [(a, b) for a, b in zip(ends, ends[1:]) if b > a]

    def conditions(self, x, y, order=None, num_iter=None):
        """Teacher-forced c (B, N, C) by place: c[:, j] is that of position order[:, j] at its step.

        order (B, N): default raster; num_iter: steps, default N (one patch a step).
        """
        if order is None:
            order = torch.arange(self.cfg.n_tokens, device=x.device).expand(len(x), -1)
        return torch.cat([self.step_conditions(gather(x, order[:, :a]), order[:, :a], y,
                                               order[:, a:b])
                          for a, b in self.places(num_iter)], dim=1)

    @torch.no_grad()
    def generate(self, y, noise, cfg_scale=1.0, refine=None, on_condition=None, cfg_schedule=None,
                 num_iter=None, order=None, x=None, fill=None, **sampling):
        """Tokens (B, N, D), by position, of classes y (B,): Algorithm 1.

        num_iter: steps of the cosine schedule, default N. order (B, N): default drawn from `noise`.
        cfg_schedule: linear (default, as in MAR: from 1 to cfg_scale with the share of known
        patches) or constant. refine(i, c (B, C), y) -> c and on_condition(i, c, refined) get each
        place i of the order on its own; nothing is refined while nothing is known.
        Inpainting: tokens x (1, N, D) that stay but where `fill` (N,) is true.
        """
        B, N, D = len(y), self.cfg.n_tokens, self.cfg.token_dim
        n_noise, n_known = self.diffloss.n_noise(**sampling), 0
        if fill is not None:
            if refine is not None or order is not None:
                raise ValueError("inpainting has its own order, the known patches first, and is "
                                 "not refined; leave out order and refine")
            order = (noise.rand(N) + fill).argsort(1)
            n_known = N - int(fill.sum())
        if order is None:
            order = noise.rand(N).argsort(1)
        x = torch.zeros(B, N, D, device=y.device) if x is None else x.expand(B, -1, -1)
        noise = noise.randn((N - n_known) * n_noise, D)

        for a, b in self.places(num_iter, n_known):                         # Alg. 1 line 1
            known, pos = order[:, :a], order[:, a:b]                        # (B, a), (B, n)
            c, c_null = self.next_condition(x, known, pos, y, cfg_scale != 1.0)          # line 2
            refined = c
            if refine and a > 0:                                            # lines 3-8
                moved = [refine(a + j, z, y) for j, z in enumerate(c.unbind(1))]
                refined = torch.stack(moved, dim=1)
            if on_condition:
                for j in range(b - a):
                    on_condition(a + j, c[:, j], refined[:, j])

            scale = guidance_at(cfg_schedule or "linear", cfg_scale, b / N)
            z, noise = noise.tensor_split([(b - a) * n_noise], dim=1)
            z = z.unflatten(1, (n_noise, b - a)).transpose(0, 1)            # (n_noise, B, n, D)
            x_i = self.diffloss.sample(refined, c_null, scale, z, **sampling)            # line 9
            x = x.scatter(1, pos[..., None].expand(-1, -1, D), x_i)         # line 10
        return x

    def next_condition(self, x, known, pos, y, guided):
        """c (B, n, C) of positions pos given x at `known`, and that of the null class or None."""
        if not guided:
            return self.step_conditions(gather(x, known), known, y, pos).float(), None
        twice = lambda z: torch.cat([z, z])
        y = torch.cat([y, torch.full_like(y, self.cfg.num_classes)])
        c = self.step_conditions(twice(gather(x, known)), twice(known), y, twice(pos))
        return c.float().chunk(2)


def read_inpaint(image, mask, how, job):
    """Options of MAR.generate that fill the white part of a mask in an image (paths); what is black
    or transparent is kept. A token that the mask touches is filled whole.

    how, job: the flags of sample.py, and what sample.setup gives for them.
    """
    model, facts, device = job.model, job.state["data"], job.model.device
    kind, size = model.cfg.kind, facts["size"]
    if kind != "mar":
        raise ValueError(f"inpainting needs a mar model: a model of kind {kind} cannot condition "
                         "on an arbitrary part of an image")
    if facts["dataset"] == "latents":
        raise ValueError("inpainting reads an image, and the tokeniser of this model's latents is "
                         "not here to encode it")
    if how.refine != "none" or how.order:
        raise ValueError("inpainting has its own order and cannot be refined, since targets belong "
                         "to whole chains; leave out --refine and --order")
    names = image, mask
    image, mask = sets.open_image(image), sets.open_image(mask, paper=0)
    if image.size != mask.size:
        raise ValueError(f"the mask {names[1]} has {mask.width}x{mask.height} pixels, the image "
                         f"{names[0]} {image.width}x{image.height}: make both the same size")

    def crop(image, mode):                                                  # (1, ch, size, size)
        pixels = np.array(sets.centre_crop(image, size).convert(mode))
        return torch.from_numpy(pixels).reshape(1, size, size, -1).permute(0, 3, 1, 2)

    x = (crop(image, "L" if facts["channels"] == 1 else "RGB") / 127.5 - 1).to(device)
    if facts["vae"]:
        import latents
        vae = latents.open_vae(facts, how.vae, device)
        x = vae.encode(x, torch.Generator().manual_seed(how.seed))
    white = patchify(crop(mask, "L"), size // model.cfg.grid) > 127         # (1, N, pixels)
    fill = white.any(-1)[0].to(device)
    if not fill.any():
        raise ValueError(f"the mask {names[1]} has no white pixel: nothing to fill")
    return {"x": patchify(x, facts["patch"]), "fill": fill}


# ---------------------------------------------------------------- CDM: the baseline

def modulate(x, shift, scale):
    return torch.addcmul(shift, x, 1 + scale)


class AdaLNBlock(Block):
    """Block whose norms are modulated and whose branches are gated by the condition (adaLN)."""

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
    """The head's network for a whole image: x_t (B, N, D), t (B, 1), c (B, 1, C) -> eps, v."""

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
        self.reset_parameters()

    def reset_parameters(self):
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.normal_(self.pos_embed, std=0.02)
        for layer in (self.time_embed.mlp[0], self.time_embed.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        # adaLN-zero: each block starts as the identity, the output as zero
        for block in self.blocks:
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.modulation[1].weight)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x_t, t, c):
        y = self.time_embed(t) + c                                          # (B, 1, C)
        h = self.x_proj(x_t) + self.pos_embed                               # (B, N, C)
        for block in self.blocks:
            h = block(h, y)
        shift, scale = self.modulation(y).chunk(2, dim=-1)
        return self.linear(modulate(self.norm(h), shift, scale)).chunk(2, dim=-1)

    def along(self, ts, c):
        """`forward` as a function (x_t (B, N, D), t: int) under c (B, 1, C), or (2, B, 1, C): the
        branches of guidance."""
        def denoise(x_t, t):
            x_t = x_t.expand(*c.shape[:-2], *x_t.shape[-2:])
            t = torch.full((1, 1), t, device=c.device)
            return [z.view(x_t.shape) for z in self(x_t.flatten(0, -3), t, c.flatten(0, -3))]
        return denoise


class CDM(Generator):
    """The baseline: the whole image is one 'patch' under one fixed condition, its class."""

    def __init__(self, cfg):
        super().__init__(cfg, DenoisingTransformer(cfg))
        self.class_emb = nn.Embedding(cfg.num_classes + 1, cfg.n_embd)      # the last: no class
        nn.init.normal_(self.class_emb.weight, std=0.02)

    def randomness(self, n, generator):
        """As for a patch, but with one use and one t per image."""
        draws = super().randomness(n, generator)
        return {"drop": draws["drop"], "t": draws["t"][:, :1, 0], "eps": draws["eps"][:, :, 0]}

    def conditions(self, x, y, order=None, num_iter=None):
        """c (B, N, C): the class embedding, the same for every patch."""
        return self.class_emb(y)[:, None].expand(-1, self.cfg.n_tokens, -1)

    def loss(self, x, y, draws):
        c = self.class_emb(self.with_null(y, draws["drop"]))[:, None]
        return self.diffloss(x, c, draws["t"], draws["eps"]).mean()

    forward = loss

    @torch.no_grad()
    def generate(self, y, noise, cfg_scale=1.0, refine=None, on_condition=None, cfg_schedule=None,
                 **sampling):
        """Tokens (B, N, D) of classes y (B,): one trajectory for the whole image, and no chain."""
        if refine is not None:
            raise ValueError("a cdm model has one fixed condition per image and no AR chain, so "
                             "there is nothing to refine; use an ar or mar model")
        n_noise = self.diffloss.n_noise(**sampling)
        z = noise.randn(n_noise, self.cfg.n_tokens, self.cfg.token_dim).transpose(0, 1)
        c = self.class_emb(y)[:, None]                                      # (B, 1, C)
        c_null = self.class_emb(torch.full_like(y, self.cfg.num_classes))[:, None]
        return self.diffloss.sample(c, c_null, cfg_scale, z, **sampling)


# ---------------------------------------------------------------- MAR's layout

# flags of MAR's main_mar.py, which its files hold as `args`, and the fields of Config that they are
FLAGS = {"mask_ratio_min": "mask_min", "label_drop_prob": "class_dropout",
         "proj_dropout": "dropout", "diffusion_batch_mul": "diffusion_batch_mul"}
MAR_CLASSES = 1000                  # MAR's table of classes has as many rows, whatever class_num is


def from_mar(state, path):
    """MAR's {"model", "model_ema", "args" ...} as a checkpoint of train.py.

    Sizes come from the tensors, what no tensor shows from MAR's flags in `args`, or from what
    export_mar puts beside. Raises ValueError with the first tensor that is missing, foreign or of
    another shape.
    """
    raw = check_weights(state.get("model", state), path, "MAR")
    weights = check_weights(state.get("model_ema") or raw, path, "MAR")
    if not state.get("model_ema"):
        warnings.warn(f"{path} holds no model_ema: these are probably the raw weights, whose "
                      "images are worse than the averaged ones of the original "
                      "checkpoint-last.pth", stacklevel=2)
    flags = mar_flags(state, path)
    cfg = replace(mar_config(weights, flags, path), rope=bool(state.get("rope")))
    known = lambda part: {name: v[:cfg.num_classes] if name == "class_emb.weight" else v
                          for name, v in part.items()}
    weights, raw = known(weights), known(state.get("model", weights))
    with torch.device("meta"):
        problem = state_problem(weights, build(cfg).state_dict())
    if problem:
        raise ValueError(f"{path}: {problem}; expected the weights of MAR with {cfg.n_layer} "
                         f"layers of width {cfg.n_embd}, complete")
    facts = state.get("data")
    return {"config": asdict(cfg), "model": raw, "ema": weights, "step": 0,
            "data": facts if isinstance(facts, dict) else data_facts(cfg, flags, path)}


def mar_flags(state, path):
    """What a file says in numbers that its tensors do not: args, and n_head beside them."""
    given = state.get("args") or {}
    given = given if isinstance(given, dict) else vars(given)
    given = {**given, "n_head": state.get("n_head") or given.get("n_head")}
    whole = ("patch_size", "vae_stride", "vae_embed_dim", "class_num", "n_head")
    flags = {k: given[k] for k in (*FLAGS, *whole) if given.get(k) is not None}
    for name, value in flags.items():
        if not isinstance(value, int if name in whole else (int, float)) or value < (name in whole):
            raise ValueError(f"{path}: its args say {name}={value!r}; expected a number as MAR's "
                             "main_mar.py takes")
    return flags


def data_facts(cfg, flags, path):
    """What MAR's flags say of the data, as a checkpoint has it; where they are silent, KL-16."""
    patch, stride = flags.get("patch_size", 1), flags.get("vae_stride", 16)
    channels, rest = divmod(cfg.token_dim, patch ** 2)
    if rest or channels != flags.get("vae_embed_dim", channels):
        raise ValueError(f"{path}: its tokens have {cfg.token_dim} values, its args say patch_size "
                         f"{patch} and vae_embed_dim {flags.get('vae_embed_dim')}")
    names = [name for _, name in sets.imagenet_classes()]
    if cfg.num_classes != len(names):
        names = [str(k) for k in range(cfg.num_classes)]
    side = cfg.grid * patch
    facts = {"dataset": f"imagenet{stride * side}", "size": stride * side, "channels": 3,
             "cache_dir": f"cache/imagenet{stride * side}"}
    if stride != 16 or facts["dataset"] not in DATASETS:             # latents of another tokeniser
        facts = {"dataset": "latents", "size": side, "channels": channels, "cache_dir": None}
    return {**facts, "patch": patch, "data_dir": None, "class_names": names, "x0_bound": None,
            "vae": {"fingerprint": None, "scale": KL16_SCALE}}


def mar_config(weights, flags, path):
    """The Config of a MAR state dict. No tensor shows n_head: unless given, that of MAR's sizes."""
    n_head = flags.get("n_head")

    def shape(name, dims):
        if name not in weights or weights[name].ndim != dims:
            raise ValueError(f"{path}: tensor '{name}' is missing: no complete MAR checkpoint")
        return weights[name].shape

    def count(prefix):
        return len({n[len(prefix):].split(".")[0] for n in weights if n.startswith(prefix)})

    n_embd, token_dim = shape("z_proj.weight", 2)
    n_tokens, rows = shape("diffusion_pos_embed_learned", 3)[1], shape("class_emb.weight", 2)[0]
    sizes = [PRESETS[name] for name in ("mar-b", "mar-l", "mar-h")]
    heads = {p["n_embd"]: p["n_head"] for p in sizes}
    if not n_head and n_embd not in heads:
        raise ValueError(f"{path}: width {n_embd} is none of MAR's ({', '.join(map(str, heads))}), "
                         "and the number of heads cannot be read from tensors; put it into the "
                         "file as n_head")
    n_layer, n_decoder = count("encoder_blocks."), count("decoder_blocks.")
    sizes = dict(n_layer=n_layer, n_decoder=n_decoder if n_decoder != n_layer else 0,
                 n_embd=n_embd, token_dim=token_dim, head_depth=count("diffloss.net.res_blocks."),
                 head_width=shape("diffloss.net.input_proj.weight", 2)[0],
                 grid=math.isqrt(n_tokens), num_classes=min(rows, flags.get("class_num") or rows),
                 n_class_tokens=shape("encoder_pos_embed_learned", 3)[1] - n_tokens,
                 **{field: flags[name] for name, field in FLAGS.items() if name in flags})
    try:
        return Config(kind="mar", n_head=n_head or heads[n_embd], **sizes)
    except ValueError as error:
        raise ValueError(f"{path} has the weights of no MAR: {error}") from None


def export_mar(path, state):
    """Write a mar checkpoint of train.py in MAR's layout.

    args are the flags that MAR's own programs need for it. What MAR's layout has no place for, and
    no tensor shows, is kept beside the weights: the number of heads, RoPE, the data.
    """
    cfg, facts = state["config"], state["data"]
    if cfg["kind"] != "mar":
        raise ValueError(f"only mar models have MAR's layout; this is a model of kind "
                         f"{cfg['kind']}: train one with --model mar-tiny")
    if cfg.get("objective", "eps") != "eps":
        raise ValueError(f"MAR's head predicts eps, this one is trained with the objective "
                         f"{cfg['objective']!r}: only this repository can run it")

    def keep(part):
        table = state[part]["class_emb.weight"]
        rest = table.new_zeros(max(0, MAR_CLASSES - len(table)), table.shape[1])
        older = ("inverse.", "buffer.")              # of this project, which MAR has not
        own = {k: v for k, v in state[part].items() if not k.startswith(older)}
        return {**own, "class_emb.weight": torch.cat([table, rest])}

    side = cfg["grid"] * facts["patch"]
    flags = {"img_size": facts["size"], "vae_stride": facts["size"] // side,
             "vae_embed_dim": cfg["token_dim"] // facts["patch"] ** 2, "patch_size": facts["patch"],
             "class_num": cfg["num_classes"], "buffer_size": cfg["n_class_tokens"],
             "diffloss_d": cfg["head_depth"], "diffloss_w": cfg["head_width"],
             "attn_dropout": cfg["dropout"], **{name: cfg[field] for name, field in FLAGS.items()}}
    save_checkpoint(path, {"model": keep("model"), "model_ema": keep("ema"),
                           "args": argparse.Namespace(**flags), "n_head": cfg["n_head"],
                           "rope": cfg["rope"], "data": facts})
    if cfg["rope"]:
        warnings.warn(f"{path}: this model has RoPE, which MAR's own code has not: only this "
                      "repository can run it", stacklevel=2)


def export(argv):
    p = Parser(prog="mar.py export",
               description="Write a mar checkpoint of train.py in the layout of MAR's own.")
    p.add_argument("ckpt", help="the checkpoint, or the folder of its run")
    p.add_argument("file", help="the file to write, such as mar.pth; never overwritten")
    args = p.parse_args(argv)
    file = check_output("file", args.file)
    if file.exists():
        raise ValueError(f"{file} exists and is never overwritten; choose another name")
    export_mar(file, read_checkpoint(args.ckpt))
    print(f"{args.ckpt} -> {file}, in the layout of MAR's checkpoints")


def inpaint(argv):
    import sample
    p = Parser(prog="mar.py inpaint", description="Fill a part of an image by a mar model. Flags "
               "of sample.py say how to draw: --ckpt RUN --classes NAME --n 4 ...")
    p.add_argument("image", help="the image")
    p.add_argument("mask", help="an image of the same size, white where it is to be filled")
    args, drawing = p.parse_known_args(argv)
    how = sample.parse_args(drawing)
    job = sample.setup(how)
    job.sampling |= read_inpaint(args.image, args.mask, how, job)
    sample.draw_file(how, job)


def main():
    does = {"export": export, "inpaint": inpaint}
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__)
    elif len(sys.argv) < 2 or sys.argv[1] not in does:
        raise ValueError(f"expected {' or '.join(does)} as the first word: see mar.py --help")
    else:
        does[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    run(main)
