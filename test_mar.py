"""Tests of mar.py: MAR against golden tensors and its literal loop, CDM, MAR's weights, refinement.

Names are sentences; each tolerance says where it comes from. No test asserts a time.
"""
import argparse
import ast
import json
import math
import os
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import command
import fast
import files
import mar
import model as models
import sample
import sets
import train
from data import patchify
from diffloss import DiffLoss, ImageNoise, ddpm, respaced, respaced_steps
from mar import gather
from model import PRESETS, Config, build, preset
from runs import read_checkpoint
from vae import KL16_SCALE

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "assets"))
TINY = ("mar-tiny", "cdm-tiny")
SOLVERS = sorted(DiffLoss.samplers)
torch.set_num_threads(1)        # problems this small gain nothing from a second thread


def tiny(name, **changes):
    """A small model with no parameter left at zero, so that nothing hides behind adaLN-zero."""
    torch.manual_seed(0)
    m = build(preset(name, **{"token_dim": 4, "grid": 4, "num_classes": 10, **changes})).eval()
    m.diffloss.x0_bound = 1.0
    for p in m.parameters():
        if p.abs().max() == 0:
            torch.nn.init.normal_(p, std=0.02)
    return m


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def tokens(n, m):
    x = torch.randn(n, m.cfg.n_tokens, m.cfg.token_dim, generator=gen()).clamp(-1, 1)
    return x, torch.arange(n) % m.cfg.num_classes


def relative(a, b):
    """Largest difference over the largest value."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@pytest.fixture
def program(monkeypatch, capsys):
    """Run a program's main() in this process: (exit code, stdout, stderr)."""
    def call(module, *argv):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
        code = 0
        try:
            command.run(module.main)
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return call


# ================================================================ sizes

@pytest.mark.parametrize("name, millions", [("mar-b", 208), ("mar-l", 479), ("mar-h", 943)])
def test_mar_has_the_published_parameter_counts(name, millions):
    with torch.device("meta"):
        m = build(preset(name))
    assert round(m.num_params / 1e6) in (millions, millions - 1), "published ones are rounded up"


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("gpt")])
def test_every_preset_builds_and_its_widths_divide(name):
    with torch.device("meta"):
        assert build(preset(name)).num_params > 0


def test_tiny_presets_are_equal_within_five_percent():
    sizes = {name: tiny(name, token_dim=16).num_params for name in ("gpt-tiny", *TINY)}
    assert max(sizes.values()) / min(sizes.values()) < 1.05, sizes


# ================================================================ the loss

def draws_with_context(m, n):
    """The draws of a training step; mar: of the first one that leaves some patches known."""
    steps = (m.randomness(n, gen(k)) for k in range(99))
    return next(d for d in steps if m.cfg.kind == "cdm" or d["t"].shape[1] < m.cfg.n_tokens)


@pytest.mark.parametrize("name", TINY)
def test_the_loss_reaches_every_parameter(name):
    m = tiny(name).train()
    x, y = tokens(8, m)
    draws = draws_with_context(m, 8)
    draws["drop"][:2] = True
    m.loss(x, y, draws).sum().backward()
    silent = [n for n, p in m.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not silent, silent


@pytest.mark.parametrize("name", TINY)
def test_the_loss_of_a_batch_is_the_mean_over_its_halves(name):
    """What gradient accumulation and data parallelism rest on."""
    m = tiny(name)
    x, y = tokens(8, m)
    draws = m.randomness(8, gen())
    halves = [m.loss(x[h], y[h], {k: v[h] for k, v in draws.items()})
              for h in (slice(0, 4), slice(4, 8))]
    whole = m.loss(x, y, draws)
    assert ((whole - sum(halves) / 2).abs() <= 1e-5 * whole).all(), "fp32 summation order"


def test_only_masked_tokens_enter_the_head():
    m, rows = tiny("mar-tiny"), []
    m.diffloss.net.input_proj.register_forward_hook(
        lambda layer, args, out: rows.append(out[..., 0].numel()))
    x, y = tokens(4, m)
    draws = draws_with_context(m, 4)
    m.loss(x, y, draws)
    masked = draws["t"].shape[1]
    assert rows == [4 * masked * m.cfg.diffusion_batch_mul], "each `mul` times"


def test_mask_ratio_follows_the_truncated_normal():
    from scipy.stats import truncnorm
    u = np.linspace(0.0005, 0.9995, 1000)
    got = np.array([mar.truncated_normal(v) for v in u])
    want = truncnorm.ppf(u, (0.7 - 1) / 0.25, 0, loc=1, scale=0.25)
    assert np.abs(got - want).max() < 1e-9, "both are inverse CDFs in float64"


# ================================================================ conditions and the chain

@torch.no_grad()
def test_conditions_depend_on_the_set_of_known_patches_and_not_on_their_order():
    m = tiny("mar-tiny")
    x, y = tokens(3, m)
    order = torch.stack([torch.randperm(16, generator=gen(k)) for k in range(3)])
    known, unknown = order[:, :7], order[:, 7:]
    a = m.step_conditions(gather(x, known), known, y)
    b = m.step_conditions(gather(x, known.flip(1)), known.flip(1), y)
    assert relative(a, b) < 1e-5, "fp32 summation order in attention"
    hidden = x.scatter(1, unknown[..., None].expand(-1, -1, 4), 5.0)
    seen = m.step_conditions(gather(hidden, known), known, y)
    assert torch.equal(seen, a), "masked patches are not seen"
    some = m.step_conditions(gather(x, known), known, y, unknown[:, :3])
    assert relative(some, gather(a, unknown[:, :3])) < 1e-5, "asked for some, the same conditions"


@pytest.mark.parametrize("num_iter", [None, 1, 4, 5, 16, 64])
def test_every_place_is_filled_once_and_steps_grow_as_the_cosine_says(num_iter):
    m = tiny("mar-tiny")
    steps = m.places(num_iter)
    assert [i for a, b in steps for i in range(a, b)] == list(range(16))
    assert len(steps) == min(num_iter or 16, 16)
    if num_iter == 4:
        cosine = [16 - math.floor(16 * math.cos(math.pi / 2 * s / 4)) for s in (1, 2, 3)]
        assert [b for _, b in steps] == [*cosine, 16]


def test_rope_changes_conditions_and_has_no_weights():
    m = tiny("mar-tiny")
    plain = tiny("mar-tiny", rope=False)
    plain.load_state_dict(m.state_dict())
    x, y = tokens(4, m)
    assert m.cfg.rope and not preset("mar-b").rope, "the released sizes have learned positions"
    assert (plain.conditions(x, y) - m.conditions(x, y)).abs().max() > 1e-3


@pytest.mark.parametrize("num_iter", [None, 4, 5])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_conditions_met_in_generation_equal_teacher_forcing_on_the_result(num_iter, cfg_scale):
    m, y, noise = tiny("mar-tiny"), torch.tensor([1, 4, 9]), ImageNoise(0, range(3))
    order, met = noise.rand(16).argsort(1), {}
    x = m.generate(y, noise, cfg_scale, num_iter=num_iter, order=order, solver="ddim", steps=3,
                   on_condition=lambda i, c, refined: met.setdefault(i, (c, refined)))
    assert list(met) == list(range(16)), "every place, in the order of generation"
    assert all(c is refined or torch.equal(c, refined) for c, refined in met.values())
    seen = torch.stack([c for c, _ in met.values()], dim=1)
    want = m.conditions(x, y, order, num_iter)
    assert relative(seen, want) < 1e-5, "fp32, other matrix shapes"


def test_raster_is_the_default_order_of_conditions_and_a_fresh_one_that_of_images():
    m = tiny("mar-tiny")
    x, y = tokens(3, m)
    raster = torch.arange(16).expand(3, -1)
    assert torch.equal(m.conditions(x, y), m.conditions(x, y, raster))
    fresh, given = ImageNoise(4, range(3)), ImageNoise(4, range(3))
    order = given.rand(16).argsort(1)
    assert len(order.unique(dim=0)) == 3
    short = dict(solver="ddpm", steps=2)
    assert torch.equal(m.generate(y, fresh, **short), m.generate(y, given, order=order, **short))


@pytest.mark.parametrize("num_iter", [None, 4])
def test_each_place_of_a_step_is_refined_on_its_own_and_none_while_nothing_is_known(num_iter):
    m, y = tiny("mar-tiny"), torch.tensor([1, 4, 9])
    asked, met = {}, {}

    def refine(i, c, labels):
        assert torch.equal(labels, y)
        asked[i] = c
        return c + i

    m.generate(y, ImageNoise(0, range(3)), 1.5, refine, num_iter=num_iter, solver="ddim", steps=2,
               on_condition=lambda i, c, refined: met.setdefault(i, (c, refined)))
    first = m.places(num_iter)[0][1]
    assert list(asked) == list(range(first, 16)) and list(met) == list(range(16))
    for i, (c, refined) in met.items():
        assert c.shape == (3, m.cfg.n_embd)
        assert torch.equal(refined, c + (i if i in asked else 0))
        assert i not in asked or torch.equal(asked[i], c)


def test_a_refined_condition_is_what_the_head_is_given_and_the_null_one_stays(monkeypatch):
    m, y, given = tiny("mar-tiny"), torch.tensor([1, 4, 9]), []

    def head(c, c_null, cfg_scale, noise, **sampling):
        given.append((c, c_null))
        return torch.zeros(3, c.shape[1], 4)                # zeros in every run: equal contexts

    monkeypatch.setattr(m.diffloss, "sample", head)
    for refine in (None, lambda i, c, y: c + 0.5):
        m.generate(y, ImageNoise(0, range(3)), 2.0, refine, num_iter=5)
    plain, refined = given[:5], given[5:]
    for step, ((c, null), (c_r, null_r)) in enumerate(zip(plain, refined)):
        assert torch.equal(null, null_r) and torch.equal(c_r, c + 0.5 if step else c)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("num_classes", [1, 10, 1000])
def test_the_null_class_is_num_classes_for_any_number_of_classes(name, num_classes):
    m = tiny(name, num_classes=num_classes)
    x, _ = tokens(2, m)
    null, zero = (m.conditions(x, torch.full((2,), k)) for k in (num_classes, 0))
    assert null.isfinite().all() and not torch.allclose(null, zero)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_an_untrained_model_draws_finite_images_within_the_bound(name, solver, cfg_scale):
    torch.manual_seed(0)
    m = build(preset(name, token_dim=4, grid=4, num_classes=10)).eval()
    m.diffloss.x0_bound = 1.0
    x = m.generate(torch.arange(4), ImageNoise(0, range(4)), cfg_scale, solver=solver, steps=5)
    assert x.shape == (4, 16, 4) and x.isfinite().all() and x.abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("name", TINY)
def test_image_k_of_a_seed_is_the_same_in_any_batch(name):
    m, y, short = tiny(name), torch.arange(6), dict(solver="ddpm", steps=4)
    whole = m.generate(y, ImageNoise(5, range(6)), **short)
    part = m.generate(y[3:5], ImageNoise(5, [3, 4]), **short)
    assert relative(part, whole[3:5]) < 1e-4, "other matrix shapes in a chain of 16 x 4 steps"
    other = m.generate(y[:1], ImageNoise(6, [0]), **short)
    assert not torch.allclose(whole[:1], other), "another seed, another image"


def test_cdm_has_no_chain_to_refine():
    y, noise = torch.arange(2), ImageNoise(0, range(2))
    with pytest.raises(ValueError, match="nothing to refine; use an ar or mar model"):
        tiny("cdm-tiny").generate(y, noise, refine=lambda i, c, y: c)


@pytest.mark.parametrize("num_iter", [None, 4])
def test_inpainting_leaves_the_known_part_as_it_is_and_is_never_refined(num_iter):
    m = tiny("mar-tiny")
    x, y = tokens(2, m)
    fill = torch.rand(16, generator=gen()) < 0.4
    options, seen = dict(x=x[:1], fill=fill, num_iter=num_iter, steps=4), []
    out = m.generate(y, ImageNoise(0, range(2)), **options,
                     on_condition=lambda i, c, refined: seen.append(i))
    known = x[:1, ~fill].expand(2, -1, -1)
    assert torch.equal(out[:, ~fill], known) and x.shape == out.shape
    assert not torch.isclose(out[:, fill], x[:1, fill]).all(-1).any()
    assert seen == list(range(16 - int(fill.sum()), 16)), "no condition of a known place"
    for other in ({"refine": lambda i, c, y: c}, {"order": torch.arange(16).expand(2, -1)}):
        with pytest.raises(ValueError, match="inpainting has its own order"):
            m.generate(y, ImageNoise(0, range(2)), **options, **other)


# ================================================================ golden tensors of MAR

class Golden:
    """The file's tensors by name, and the MAR that it describes with its weights loaded."""

    def __init__(self, path):
        with np.load(path) as z:
            arrays = {k: z[k] for k in z.files}
        self.z = {k: torch.from_numpy(a) if a.dtype.kind in "fiub" and a.ndim else a.item()
                  for k, a in arrays.items()}
        g = ast.literal_eval(self.z["config"])
        assert g["encoder_depth"] == g["decoder_depth"] and g["patch_size"] == 1
        self.cfg = Config(
            kind="mar", n_layer=g["encoder_depth"], n_head=g["encoder_num_heads"],
            n_embd=g["encoder_embed_dim"], head_depth=g["diffloss_d"], head_width=g["diffloss_w"],
            token_dim=g["vae_embed_dim"], grid=g["img_size"] // g["vae_stride"],
            num_classes=g["class_num"], n_class_tokens=g["buffer_size"])
        self.steps = int(g["num_sampling_steps"])
        self.weights = {k[2:]: v for k, v in self.z.items() if k.startswith("w/")}
        self.model = build(self.cfg).eval()
        self.model.load_state_dict(self.weights)

    def __getitem__(self, key):
        return self.z[key]


def golden_files():
    files = sorted(GOLDEN.glob("mar_golden_*.npz"))
    assert files, f"no mar_golden_*.npz in {GOLDEN} (GOLDEN_DIR)"
    return files


@pytest.fixture(scope="module", params=golden_files(), ids=lambda f: f.stem)
def golden(request):
    return Golden(request.param)


@torch.no_grad()
def test_golden_tokens_and_conditions(golden):
    x, y = patchify(golden["latents"], 1), golden["labels"]
    assert torch.equal(x, golden["tokens"])
    known = torch.stack([torch.nonzero(row == 0).flatten() for row in golden["mask"]])
    null = torch.full_like(y, golden.cfg.num_classes)
    for labels, want in ((y, "z_cond"), (null, "z_uncond")):
        c = golden.model.step_conditions(gather(x, known), known, labels)
        assert relative(c, golden[want]) < 1e-5, want


@torch.no_grad()
def test_golden_head_and_its_guidance_in_pairs(golden):
    head, D = golden.model.diffloss, golden.cfg.token_dim
    out = torch.cat(head.net(golden["head_x"], golden["head_t"], golden["head_c"]), dim=-1)
    assert relative(out, golden["head_out"]) < 1e-5
    # both halves of MAR's guided call share one x: rows are pairs (condition k, null k)
    half = len(golden["head_cfg_out"]) // 2
    assert torch.equal(golden["head_cfg_out"][:half, :D], golden["head_cfg_out"][half:, :D])


@torch.no_grad()
def test_golden_loss(golden):
    mse, vb = golden.model.diffloss.terms(golden["loss_target"], golden["head_c"],
                                          golden["head_t"], golden["loss_noise"])
    for got, want in ((mse, "loss_mse"), (vb, "loss_vb"), (mse + vb, "loss")):
        assert relative(got, golden[want]) < 1e-5, want


@torch.no_grad()
def test_golden_ancestral_step(golden):
    """One step of ddpm from the golden x_t: the steps before it are made to end there."""
    head, s, steps = golden.model.diffloss, respaced(golden.steps), golden.steps
    ts = s.timestep_map.tolist()
    for row, j in enumerate(golden["pstep_index"].tolist()):
        x_t, c, want, want_x0, fresh = (golden[name][row:row + 1] for name in (
            "pstep_x_t", "sample_c", "pstep_out", "pstep_x0", "pstep_noise"))
        noise = torch.zeros(1 + steps, *x_t.shape)
        noise[0] = x_t
        noise[steps - j if j else 0] += fresh if j else 0
        met = {}

        def denoise(x, t):
            k = ts.index(t)
            if k == j:
                return head.denoiser([t], c)(x_t, t)
            return (x_t - float(s.mean_xt[k]) * x) / float(s.mean_x0[k]), torch.zeros_like(x)

        out = ddpm(denoise, noise, steps, golden["temperature"],
                   lambda t, x, x0: met.update({ts.index(t): (x, x0)}))
        assert relative(met[j][1], want_x0) < 1e-5, f"x0 at step {j}"
        assert relative(met[j - 1][0] if j else out, want) < 1e-5, f"step {j}"


@torch.no_grad()
@pytest.mark.parametrize("solver, want", [("ddpm", "sample_out"), ("ddim", "ddim_out")])
def test_golden_chain(golden, solver, want):
    noise = torch.cat([golden["sample_x_T"][None], golden["sample_noise"]])
    options = {"temperature": golden["temperature"]} if solver == "ddpm" else {}
    out = golden.model.diffloss.sample(golden["sample_c"], None, 1.0, noise, solver=solver,
                                       steps=golden.steps, **options)
    assert relative(out, golden[want]) < 1e-3, "chains reach 1e3: x0 is not bounded here"


def test_golden_schedule(golden):
    assert respaced_steps(golden.steps).tolist() == golden["timestep_map"].tolist()
    difference = np.abs(respaced(golden.steps).betas - golden["betas_respaced"].numpy()).max()
    assert difference < 1e-12, "float64 on both sides"


class ScriptedNoise:
    """The noise of a table (B, N, draws, D) by position, that of one AR step after the other."""

    def __init__(self, table, order, places):
        self.table, self.order, self.places = table, order, places

    def randn(self, n, D):
        at = torch.arange(len(self.order))[:, None]
        steps = [self.table[at, self.order[:, a:b]].transpose(1, 2) for a, b in self.places]
        return torch.cat([z.flatten(1, 2) for z in steps], dim=1)


class LiteralMAR:
    """MAR's sampling in its own terms, from the paper and its published behaviour.

    Masks of 0 and 1, orders whose *last* entries are revealed first, one image at a time, ancestral
    steps by float64 tables; weights `w` by MAR's names, of the architecture g, computed in dtype.
    """

    def __init__(self, w, g, dtype):
        self.w, self.g, self.dtype = {k: v.to(dtype) for k, v in w.items()}, g, dtype

    def norm(self, h, name=None):
        affine = () if name is None else (self.w[f"{name}.weight"], self.w[f"{name}.bias"])
        return F.layer_norm(h, h.shape[-1:], *affine, eps=1e-6)

    def linear(self, h, name):
        return h @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def block(self, h, name):                                               # (T, C)
        qkv = self.linear(self.norm(h, f"{name}.norm1"), f"{name}.attn.qkv")
        q, k, v = qkv.reshape(len(h), 3, self.g.n_head, -1).permute(1, 2, 0, 3)
        a = ((q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        h = h + self.linear(a.transpose(0, 1).reshape(h.shape), f"{name}.attn.proj")
        inner = F.gelu(self.linear(self.norm(h, f"{name}.norm2"), f"{name}.mlp.fc1"))
        return h + self.linear(inner, f"{name}.mlp.fc2")

    def conditions(self, x, mask, emb):                         # (N, D), (N,), (C,) -> (N, C)
        g, w = self.g, self.w
        h = torch.cat([emb.expand(g.n_class_tokens, -1), self.linear(x, "z_proj")])
        h = self.norm(h + w["encoder_pos_embed_learned"][0], "z_proj_ln")
        keep = torch.cat([torch.ones(g.n_class_tokens, dtype=torch.bool), mask == 0])
        h = h[keep]
        for j in range(g.n_layer):
            h = self.block(h, f"encoder_blocks.{j}")
        full = w["mask_token"][0].expand(g.n_class_tokens + len(x), -1).clone()
        full[keep] = self.linear(self.norm(h, "encoder_norm"), "decoder_embed")
        h = full + w["decoder_pos_embed_learned"][0]
        for j in range(g.n_decoder or g.n_layer):
            h = self.block(h, f"decoder_blocks.{j}")
        h = self.norm(h, "decoder_norm")[g.n_class_tokens:]
        return h + w["diffusion_pos_embed_learned"][0]

    def head(self, x, t, c):                                                # -> eps, v
        net = "diffloss.net."
        freq = torch.exp(-math.log(10000) * torch.arange(128, dtype=self.dtype) / 128)
        e = torch.cat([(t * freq).cos(), (t * freq).sin()])
        e = self.linear(F.silu(self.linear(e, net + "time_embed.mlp.0")), net + "time_embed.mlp.2")
        cond = F.silu(e + self.linear(c, net + "cond_embed"))
        h = self.linear(x, net + "input_proj")
        for j in range(self.g.head_depth):
            name = f"{net}res_blocks.{j}."
            shift, scale, gate = self.linear(cond, name + "adaLN_modulation.1").chunk(3, -1)
            inner = self.norm(h, name + "in_ln") * (1 + scale) + shift
            inner = F.silu(self.linear(inner, name + "mlp.0"))
            h = h + gate * self.linear(inner, name + "mlp.2")
        shift, scale = self.linear(cond, net + "final_layer.adaLN_modulation.1").chunk(2, -1)
        h = self.norm(h) * (1 + scale) + shift
        return self.linear(h, net + "final_layer.linear").chunk(2, -1)

    def patches(self, c, c0, scale, noise, temperature):        # noise (n, 1 + steps, D)
        steps = noise.shape[1] - 1
        f = lambda s: math.cos((s / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
        full = np.cumprod([1 - min(1 - f(s + 1) / f(s), 0.999) for s in range(1000)])
        used = [round(k * 999 / (steps - 1)) for k in range(steps)]
        abar = full[used]
        before = np.concatenate([[1.0], abar[:-1]])
        beta = 1 - abar / before
        var = beta * (1 - before) / (1 - abar)
        low, high = np.log(np.concatenate([[var[1]], var[1:]])), np.log(beta)

        z = noise[:, 0].to(self.dtype)
        for j in reversed(range(steps)):
            eps, v = self.head(z, used[j], c)
            eps0, _ = self.head(z, used[j], c0)
            eps = eps0 + scale * (eps - eps0)
            x0 = z / math.sqrt(abar[j]) - math.sqrt(1 / abar[j] - 1) * eps
            mean = (beta[j] * math.sqrt(before[j]) / (1 - abar[j]) * x0
                    + (1 - before[j]) * math.sqrt(1 - beta[j]) / (1 - abar[j]) * z)
            std = (0.5 * ((v + 1) / 2 * high[j] + (1 - (v + 1) / 2) * low[j])).exp()
            z = mean + (j > 0) * temperature * std * noise[:, steps - j].to(self.dtype)
        return z

    def sample(self, y, orders, table, num_iter, cfg_scale, temperature):
        B, N, _, D = table.shape
        x, mask = torch.zeros(B, N, D, dtype=self.dtype), torch.ones(B, N)
        emb, null = self.w["class_emb.weight"], self.w["fake_latent"][0]
        for step in range(num_iter):
            c = torch.stack([self.conditions(x[b], mask[b], emb[y[b]]) for b in range(B)])
            c0 = torch.stack([self.conditions(x[b], mask[b], null) for b in range(B)])
            left = math.floor(N * math.cos(math.pi / 2 * (step + 1) / num_iter))
            left = max(1, min(int(mask[0].sum()) - 1, left)) if step < num_iter - 1 else 0
            after = torch.zeros(B, N).scatter(1, orders[:, :left], 1.0)
            now = (mask - after).bool()
            scale = 1 + (cfg_scale - 1) * (N - left) / N
            x[now] = self.patches(c[now], c0[now], scale, table[now], temperature)
            mask = after
        return x


@torch.no_grad()
@pytest.mark.parametrize("num_iter", [None, 4])
def test_a_whole_latent_of_mar_is_that_of_its_literal_loop(golden, num_iter):
    """Masks, schedule of tokens, linear guidance and ancestral sampling all agree."""
    cfg, steps, scale, temperature = golden.cfg, 8, 2.5, 0.9
    N, y = cfg.n_tokens, torch.tensor([0, 1])
    orders = torch.stack([torch.randperm(N, generator=gen(k)) for k in range(2)])
    table = torch.randn(2, N, 1 + steps, cfg.token_dim, generator=gen())
    noise = ScriptedNoise(table, orders.flip(1), golden.model.places(num_iter))
    got = golden.model.generate(y, noise, scale, num_iter=num_iter, order=orders.flip(1),
                                steps=steps, temperature=temperature)
    want, exact = (LiteralMAR(golden.weights, cfg, dtype).sample(
        y, orders, table, num_iter or N, scale, temperature)
        for dtype in (torch.float32, torch.float64))
    # x0 is not bounded: the chain reaches 1e3 and feeds itself back; the literal loop errs as much
    error, own = relative(got.double(), exact), relative(want.double(), exact)
    assert error < 1e-3 and error < 20 * own + 1e-4, (error, own)


# ================================================================ MAR's weights

def released(golden, path, **changes):
    """A file as MAR writes it: raw and averaged weights, optimiser, epoch, flags in a Namespace."""
    raw = {k: torch.zeros_like(v) for k, v in golden.weights.items()}
    state = {"model": raw, "model_ema": golden.weights, "optimizer": {"state": {}}, "epoch": 399,
             "scaler": {}, "args": argparse.Namespace(model="mar_base", lr=8e-4),
             "n_head": golden.cfg.n_head, **changes}
    torch.save({k: v for k, v in state.items() if v is not None}, path)
    return path


def test_released_weights_load_as_they_are_and_the_averaged_ones_are_taken(golden, tmp_path):
    (tmp_path / "mar").mkdir()
    released(golden, tmp_path / "mar" / "checkpoint-last.pth")
    m, state = models.load_model(tmp_path / "mar")
    assert m.cfg == golden.cfg and m.diffloss.x0_bound is None, "MAR exactly"
    assert all(torch.equal(v, golden.weights[k]) for k, v in m.state_dict().items())
    assert set(state) == {"config", "model", "ema", "step", "data"}
    assert state["data"]["vae"]["scale"] == KL16_SCALE


@pytest.mark.parametrize("name", ["mar-b", "mar-l", "mar-h"])
@pytest.mark.parametrize("grid", [16, 32])
def test_the_size_of_a_released_model_is_read_from_its_tensors(name, grid):
    with torch.device("meta"):
        cfg = preset(name, grid=grid)
        state = build(cfg).state_dict()
    assert mar.mar_config(state, {}, "file") == cfg


def test_a_wrong_or_partial_mar_file_is_refused_by_its_first_offending_name(golden, tmp_path):
    w, file = golden.weights, tmp_path / "x.pth"
    without = lambda name: {k: v for k, v in w.items() if k != name}
    bad = [(without("decoder_norm.weight"), "'decoder_norm.weight' is missing"),
           (without("class_emb.weight"), "'class_emb.weight' is missing"),
           ({**w, "class_emb.weight": w["class_emb.weight"][:, :-1]}, "'class_emb.weight' is"),
           ({**w, "extra": torch.ones(1)}, "'extra' is not part of the model"),
           ({**w, "mask_token": w["mask_token"] * math.nan}, "'model_ema.mask_token' is not fin")]
    for weights, words in bad:
        with pytest.raises(ValueError, match=words):
            models.load_model(released(golden, file, model_ema=weights))
    with pytest.raises(ValueError, match="number of heads cannot be read"):
        models.load_model(released(golden, file, n_head=None))
    whole = released(golden, file).read_bytes()
    file.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="no readable checkpoint"):
        models.load_model(file)
    torch.save({"model": {"encoder.conv_in.weight": torch.ones(1)}}, file)
    with pytest.raises(ValueError, match="not a checkpoint of train.py"):
        models.load_model(file)


def write_safetensors(path, state, cut=0):
    header, raw = {"__metadata__": {"format": "pt"}}, b""
    for name, v in state.items():
        end = len(raw) + v.numel() * v.element_size()
        header[name] = {"dtype": {torch.float32: "F32", torch.float16: "F16"}[v.dtype],
                        "shape": list(v.shape), "data_offsets": [len(raw), end]}
        raw += v.contiguous().numpy().tobytes()
    text = json.dumps(header).encode()
    path.write_bytes((struct.pack("<Q", len(text)) + text + raw)[:-cut or None])
    return path


def test_safetensors_are_read_without_a_package_and_warned_about(golden, tmp_path):
    state = {**golden.weights, "half": torch.ones(3).half(), "none": torch.empty(0, 2)}
    read = files.read_safetensors(write_safetensors(tmp_path / "m.safetensors", state))
    assert all(torch.equal(read[k], v) and read[k].dtype == v.dtype for k, v in state.items())
    for cut in (5, 10 ** 6):
        with pytest.raises(ValueError, match="no readable safetensors"):
            models.load_model(write_safetensors(tmp_path / "c.safetensors", state, cut))

    torch.manual_seed(0)
    cfg = preset("mar-b", n_layer=1, head_depth=1, head_width=64, grid=2, num_classes=3,
                 n_class_tokens=2)
    m = build(cfg)
    wrapped = {f"module.{k}": v for k, v in m.state_dict().items()}
    with pytest.warns(UserWarning, match="no model_ema"):
        got, _ = models.load_model(write_safetensors(tmp_path / "b.safetensors", wrapped))
    assert got.cfg == cfg
    assert all(torch.equal(v, m.state_dict()[k]) for k, v in got.state_dict().items())


def relative_of(path, **changes):
    """A file of MAR's family: KL-8's 4 channels, 2 x 2 latents a token, a decoder deeper than the
    encoder, a width of its own, and a table of classes with rows to spare. Its model."""
    torch.manual_seed(0)
    cfg = preset("mar-b", n_layer=1, n_decoder=3, n_head=3, n_embd=36, head_depth=1, head_width=64,
                 grid=2, num_classes=5, n_class_tokens=2, **changes)
    m = build(cfg).eval()
    for p in m.parameters():
        if p.abs().max() == 0:
            torch.nn.init.normal_(p, std=0.02)
    flags = argparse.Namespace(patch_size=2, vae_embed_dim=4, vae_stride=8, class_num=3,
                               mask_ratio_min=0.5, label_drop_prob=0.2, proj_dropout=0.3,
                               diffusion_batch_mul=1)
    torch.save({"model": m.state_dict(), "model_ema": m.state_dict(), "args": flags, "n_head": 3},
               path)
    return m


@torch.no_grad()
def test_mar_s_whole_family_loads_as_its_args_and_tensors_say(tmp_path, program):
    file = tmp_path / "kl8.pth"
    m = relative_of(file)
    got, state = models.load_model(file)
    want = {"n_layer": 1, "n_decoder": 3, "n_head": 3, "n_embd": 36, "token_dim": 16, "grid": 2,
            "num_classes": 3, "mask_min": 0.5, "class_dropout": 0.2, "dropout": 0.3,
            "diffusion_batch_mul": 1}
    assert {k: state["config"][k] for k in want} == want
    facts = {k: state["data"][k] for k in ("dataset", "size", "channels", "patch", "class_names")}
    assert facts == {"dataset": "latents", "size": 4, "channels": 4, "patch": 2,
                     "class_names": ["0", "1", "2"]}
    assert torch.equal(got.class_emb.weight, m.class_emb.weight[:3]), "others are untrained"

    x, order = torch.randn(1, 4, 16, generator=gen()), torch.tensor([[2, 0, 3, 1]])
    literal = LiteralMAR(m.state_dict(), m.cfg, torch.float64)
    for known in range(4):
        mask = torch.ones(4).scatter(0, order[0, :known], 0.0)
        c = literal.conditions(x[0].double(), mask, literal.w["class_emb.weight"][1])
        at = order[:, :known]
        ours = got.step_conditions(gather(x, at), at, torch.tensor([1]))[0]
        assert relative(ours.double(), c) < 1e-5, "float32 of four blocks"

    code, shown, err = program(sample, "--ckpt", file, "--n", 3, "--steps", 2, "--out",
                               tmp_path / "s.npz")
    assert code == 0 and "latents (4, 4, 4), unscaled" in shown, err
    with np.load(tmp_path / "s.npz") as z:
        assert z["latents"].shape == (3, 4, 4, 4)
        drawn = torch.from_numpy(z["latents"]) * KL16_SCALE
    x = sample.draw(got, torch.arange(3), range(3), 0, steps=2, cfg_scale=models.GUIDANCE,
                    solver=None)
    assert relative(patchify(drawn, 2), x) < 1e-5


def test_a_mar_file_whose_args_contradict_its_tensors_is_refused(tmp_path):
    relative_of(tmp_path / "m.pth")
    state = torch.load(tmp_path / "m.pth", weights_only=False)
    for value, words in ((3, "16 values, its args say patch_size 3 and vae_embed_dim 4"),
                         (0, "patch_size=0; expected a number"), ("2", "patch_size='2'")):
        state["args"].patch_size = value
        torch.save(state, tmp_path / "m.pth")
        with pytest.raises(ValueError, match=words):
            models.load_model(tmp_path / "m.pth")
    with pytest.raises(ValueError, match="n_decoder=2 would change nothing"):
        preset("gpt-b", n_decoder=2)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_ddp_and_compile_are_those_of_the_plain_module(prefix, runs, tmp_path):
    put = lambda weights: {prefix + k: v for k, v in weights.items()}
    state = read_checkpoint(runs["cdm-tiny"])
    torch.save({**state, "model": put(state["model"]), "ema": put(state["ema"])}, tmp_path / "c.pt")
    m = relative_of(tmp_path / "m.pth")
    mar_state = torch.load(tmp_path / "m.pth", weights_only=False)
    torch.save({**mar_state, "model": put(m.state_dict()), "model_ema": put(m.state_dict())},
               tmp_path / "n.pth")
    for plain, other in ((runs["cdm-tiny"], "c.pt"), (tmp_path / "m.pth", "n.pth")):
        want, got = (models.load_model(f)[0].state_dict() for f in (plain, tmp_path / other))
        assert list(want) == list(got) and all(torch.equal(want[k], got[k]) for k in want)


# ================================================================ from the command line

FAST = ["--global_batch", "16", "--eval_every", "2", "--device", "cpu",
        "--set", "warmup=2", "eval_images=32", "lr_schedule=constant", "dropout=0.1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of two steps of each generator, by name: its directory."""
    root, patch = tmp_path_factory.mktemp("runs"), pytest.MonkeyPatch()
    for name in TINY:
        argv = ["--model", name, "--out_dir", root / name, "--steps", 2, *FAST]
        patch.setattr(sys, "argv", ["train.py", *map(str, argv)])
        train.main()
    patch.undo()
    return {name: root / name for name in TINY}


@pytest.mark.parametrize("name", TINY)
def test_two_and_two_steps_equal_four_bitwise(name, runs, program, tmp_path, monkeypatch):
    for picture in ("plot_loss", "sample_grid"):            # slow, and drawn by `runs`
        monkeypatch.setattr(train, picture, lambda *args: None)
    shutil.copytree(runs[name], tmp_path / "b")
    for out in "ab":
        code, text, err = program(train, "--model", name, "--out_dir", tmp_path / out,
                                  "--steps", 4, *FAST)
        assert code == 0, err
    assert "resuming" in text and "step 2 of 4" in text
    a, b = (read_checkpoint(tmp_path / out) for out in "ab")
    assert a["step"] == b["step"] == 4
    assert all(torch.equal(a[part][k], b[part][k]) for part in ("model", "ema") for k in a[part])
    losses = [[json.loads(line)["heldout_loss"]
               for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]
              for out in "ab"]
    assert losses[0] == losses[1] and np.isfinite(losses[0]).all()


def test_a_run_from_before_a_field_of_config_goes_on(runs, program, tmp_path):
    state = read_checkpoint(runs["mar-tiny"])
    del state["config"]["n_decoder"]
    files.save_checkpoint(tmp_path / "ckpt.pt", state)
    code, text, err = program(train, "--model", "mar-tiny", "--out_dir", tmp_path, "--steps", 2,
                              *FAST)
    assert code == 0 and "has its 2 steps" in text, err


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", TINY)
def test_every_parameter_has_one_optimiser_and_moves(optimizer, name):
    args = train.parse_args([*FAST, f"optimizer={optimizer}"])
    m = tiny(name, token_dim=16)
    optimizers, before = train.make_optimizers(m, args), [p.clone() for p in m.parameters()]
    owned = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, owned)) == sorted(map(id, m.parameters()))
    x, y = tokens(16, m)
    draws = draws_with_context(m, 16)
    draws["drop"][:2] = True
    m.loss(x, y, draws).sum().backward()
    for o in optimizers:
        o.step()
    still = [n for (n, p), b in zip(m.named_parameters(), before) if torch.equal(p, b)]
    assert not still, still


@pytest.mark.parametrize("name", TINY)
def test_checkpointed_blocks_give_the_same_loss_and_gradients_bitwise(name):
    found = []
    for recompute in (False, True):
        m = tiny(name, dropout=0.2).train()
        if recompute:
            fast.checkpoint_blocks(m)
        x, y = tokens(4, m)
        torch.manual_seed(1)
        loss = m.loss(x, y, draws_with_context(m, 4)).sum()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in m.parameters())])
    assert all((a is b is None) or torch.equal(a, b) for a, b in zip(*found))


@pytest.fixture
def draw(runs, program, tmp_path):
    """Draw by sample.py from a run: uint8 images (n, H, W, ch) and their labels."""
    def call(name, *flags, ok=True, first=()):
        out = tmp_path / "s.npz"
        code, _, err = program(mar if first else sample, *first, "--ckpt", runs[name], "--device",
                               "cpu", "--overwrite", "--out", out, *flags)
        if not ok:
            assert code == 2 and err.count("\n") == 1, err
            return err
        assert code == 0, err
        with np.load(out) as z:
            return z["arr_0"], z["arr_1"]
    return call


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_generator_samples_with_every_solver(name, solver, draw):
    images, labels = draw(name, "--solver", solver, "--steps", 3, "--n", 20)
    assert images.shape == (20, 16, 16, 1) and images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [2] * 10, "class-balanced"


PLAIN = ["--steps", 2, "--num_iter", 5, "--n", 40, "--classes", 3, 7]
REFINED = [*PLAIN, "--m", 30, "--refine"]


@pytest.fixture
def orders(monkeypatch):
    """The order that each call of MAR.generate was given, with its labels: [(y, order or None)]."""
    given, generate = [], mar.MAR.generate

    def watched(self, y, noise, **options):
        given.append((y, options.get("order")))
        return generate(self, y, noise, **options)

    monkeypatch.setattr(mar.MAR, "generate", watched)
    return given


@pytest.mark.parametrize("how", ["default", "default --coupled", "sinkhorn"])
@pytest.mark.filterwarnings("ignore:Sinkhorn stopped")
def test_refinement_moves_the_images_of_a_class_in_its_one_random_order(how, draw, orders, runs):
    refined, labels = draw("mar-tiny", *REFINED, *how.split())
    used = {}
    for y, order in orders:                                 # calibration and images alike
        for k, row in zip(y.tolist(), order.tolist()):
            used.setdefault(k, set()).add(tuple(row))
    m = models.load_model(runs["mar-tiny"])[0]
    assert used == {k: {tuple(m.order(k).tolist())} for k in (3, 7)}
    assert len(set.union(*used.values())) == 2, "another order for each class"

    plain, _ = draw("mar-tiny", *PLAIN, "--order", "random")
    assert all((plain != refined)[labels == k].any() for k in (3, 7))


def test_unrefined_images_have_a_fresh_order_each(draw, orders):
    draw("mar-tiny", *PLAIN)
    assert orders and all(order is None for _, order in orders), "from the noise of each image"


@pytest.mark.parametrize("how", ["none", "gaussian"])
def test_the_raster_scan_is_one_order_for_all_refined_or_not(how, draw, orders):
    draw("mar-tiny", *REFINED, how, "--order", "raster") if how != "none" else draw(
        "mar-tiny", *PLAIN, "--order", "raster")
    assert orders and all((order == torch.arange(16)).all() for _, order in orders)


def test_refined_images_do_not_depend_on_the_batch(draw):
    images = [draw("mar-tiny", *REFINED, "default", "--batch_size", size)[0]
              for size in (40, 7)]
    difference = np.abs(images[0].astype(int) - images[1])
    assert difference.max() <= 1, "fp32 in other matrix shapes: a value at a rounding edge may tip"


def test_what_does_not_fit_a_generator_is_refused_in_one_line(draw):
    err = draw("cdm-tiny", "--refine", "default", ok=False)
    assert "nothing to refine" in err
    assert "--num_iter" in draw("cdm-tiny", "--num_iter", 4, ok=False)
    assert "at most one AR step each" in draw("mar-tiny", "--num_iter", 17, ok=False)


def test_inpainting_from_files(draw, tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (16, 16), dtype=np.uint8)
    mask = np.zeros((16, 16), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "x.png")
    Image.fromarray(mask).save(tmp_path / "black.png")
    mask[9:] = 255                                          # the third row of patches: in part
    Image.fromarray(mask).save(tmp_path / "m.png")
    args = ["--steps", 2, "--n", 3, "--classes", 1]

    def fill(image, mask, *more, name="mar-tiny", ok=True):
        return draw(name, *args, *more, ok=ok, first=["inpaint", tmp_path / image, tmp_path / mask])

    out = fill("x.png", "m.png")[0][..., 0]
    assert (out[:, :8] == image[:8]).all() and (out[:, 8:] != image[8:]).any((1, 2)).all()
    assert "no white pixel" in fill("x.png", "black.png", ok=False)
    clear = np.stack([np.full((16, 16), 255), mask], -1).astype(np.uint8)   # white, above clear
    Image.fromarray(clear).save(tmp_path / "clear.png")
    same = fill("x.png", "clear.png")[0][..., 0]
    assert (same == out).all(), "transparent means keep"
    Image.fromarray(np.pad(mask, 8)).save(tmp_path / "large.png")
    assert "has 32x32 pixels, the image" in fill("x.png", "large.png", ok=False)
    for names in (("x.png", "none.png"), ("none.png", "m.png")):
        assert "none.png cannot be read as an image" in fill(*names, ok=False)
    Image.fromarray(image.astype(np.uint16) * 257).save(tmp_path / "x.png")
    assert (fill("x.png", "m.png")[0][..., 0] == out).all(), "16 bits"
    assert "cannot be refined" in fill("x.png", "m.png", "--refine", "default", ok=False)
    assert "needs a mar model" in fill("x.png", "m.png", name="cdm-tiny", ok=False)


def test_an_exported_file_has_what_mar_s_programs_need_and_comes_back_whole(program, tmp_path):
    relative_of(tmp_path / "kl8.pth")
    file = tmp_path / "back.pth"
    code, _, err = program(mar, "export", tmp_path / "kl8.pth", file)
    assert code == 0, err
    (ours, first), (theirs, second) = (models.load_model(f) for f in (tmp_path / "kl8.pth", file))
    assert first["config"] == second["config"] and first["data"] == second["data"]
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
    state = torch.load(file, weights_only=False)
    # without what we keep beside, the flags alone say as much
    flags = {"img_size": 4, "vae_stride": 1, "vae_embed_dim": 4, "patch_size": 2, "class_num": 3,
             "buffer_size": 2, "diffloss_d": 1, "diffloss_w": 64, "mask_ratio_min": 0.5}
    assert flags.items() <= vars(state["args"]).items()
    assert state["model"]["class_emb.weight"].shape == (1000, 36), "as MAR's module has it"
    torch.save({k: v for k, v in state.items() if k != "data"}, file)
    assert models.load_model(file)[1]["data"] == first["data"]


# ================================================================ fine-tuning

INIT = ["--global_batch", 16, "--eval_every", 1, "--device", "cpu", "--init"]


def test_fine_tuning_starts_from_averaged_weights_and_goes_on_without_the_file(
        runs, program, tmp_path, monkeypatch):
    for picture in ("plot_loss", "sample_grid"):
        monkeypatch.setattr(train, picture, lambda *args: None)
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(runs["mar-tiny"], source)
    flags = ["--out_dir", out, *INIT, source]
    code, shown, err = program(train, *flags, "--steps", 0, "--set", "dropout=0")
    assert code == 0 and "10 of 10 classes keep their embedding" in shown, err
    old, new = read_checkpoint(source), read_checkpoint(out)
    for part in ("model", "ema"):
        assert all(torch.equal(new[part][k], v) for k, v in old["ema"].items())
    assert new["step"] == 0 and new["args"]["init"] == str(source)
    assert new["config"] == {**old["config"], "dropout": 0.0}
    assert not any(o["state"] for o in new["optimizers"]), "fresh"

    code, _, err = program(train, *flags, "--steps", 1, "--set", "dropout=0")
    assert code == 0, err
    shutil.rmtree(source)
    code, shown, err = program(train, *flags, "--steps", 2, "--set", "dropout=0")
    assert code == 0 and "resuming" in shown and read_checkpoint(out)["step"] == 2, err
    code, _, err = program(train, "--out_dir", out, "--model", "mar-tiny", "--steps", 3, *FAST)
    assert code == 2 and "another run" in err and "init" in err, err


@pytest.mark.parametrize("name", ["mar-tiny", "cdm-tiny"])
def test_classes_keep_their_embedding_by_name_and_others_start_anew(
        name, runs, program, tmp_path, monkeypatch):
    for picture in ("plot_loss", "sample_grid"):
        monkeypatch.setattr(train, picture, lambda *args: None)
    rng = np.random.default_rng(0)
    for k in ("7", "cat", "3"):                             # sorted: 3, 7, cat
        (tmp_path / "f" / k).mkdir(parents=True)
        for j in range(4):
            image = Image.fromarray(rng.integers(0, 255, (16, 16), dtype=np.uint8))
            image.save(tmp_path / "f" / k / f"{j}.png")
    monkeypatch.setattr(sets, "load_folder", grey(sets.load_folder))
    code, shown, err = program(train, "--out_dir", tmp_path / "o", "--dataset", "folder",
                               "--data_dir", tmp_path / "f", "--steps", 0, *INIT, runs[name])
    assert code == 0 and "2 of 3 classes keep their embedding" in shown, err
    old, new = (read_checkpoint(f)["ema"] for f in (runs[name], tmp_path / "o"))
    old_table, table = old.pop("class_emb.weight"), new.pop("class_emb.weight")
    assert all(torch.equal(new[k], v) for k, v in old.items())
    assert torch.equal(table[:2], old_table[[3, 7]])
    assert not (table[2] == old_table).all(1).any(), "cat is new"
    assert torch.equal(table[3:], old_table[10:]), "no class: the last row of cdm, none of mar"


def grey(load):
    def call(*args, **options):
        train, heldout, names = load(*args, **options)
        for part in (train, heldout):
            part.images = part.images[..., :1]
        return train, heldout, names
    return call


def test_weights_of_mar_are_fine_tuned_in_the_scale_that_they_know(program, tmp_path, monkeypatch):
    for picture in ("plot_loss", "sample_grid"):
        monkeypatch.setattr(train, picture, lambda *args: None)
    relative_of(tmp_path / "m.pth")
    latents = 2 * np.random.default_rng(0).standard_normal((40, 4, 4, 4))
    np.savez(tmp_path / "l.npz", latents=latents, labels=np.arange(40) % 2)
    flags = ["--dataset", "latents", "--data_dir", tmp_path / "l.npz", "--steps", 1]
    code, _, err = program(train, "--out_dir", tmp_path / "o", *flags, "--patch", 2, *INIT,
                           tmp_path / "m.pth")
    assert code == 0, err
    state = read_checkpoint(tmp_path / "o")
    assert state["data"]["vae"]["scale"] == KL16_SCALE
    std = KL16_SCALE * latents.std()
    assert state["data"]["x0_bound"] == pytest.approx(5 * std, rel=0.05), "beside the mean"
    assert (state["config"]["n_decoder"], state["config"]["num_classes"]) == (3, 2)

    fit = lambda *more: program(train, "--out_dir", tmp_path / "x", *flags, *more)
    for words, more in {
            "4 x 4 tokens of 4 values (patch 1) of latents": [*INIT, tmp_path / "m.pth"],
            "holds a model with n_layer=1, the flags ask for 12":
                ["--patch", 2, "--model", "mar-b", *INIT, tmp_path / "m.pth"],
            "holds a model with n_embd=36": ["--patch", 2, *INIT, tmp_path / "m.pth",
                                             "--set", "n_embd=72"],
            "no checkpoint at": [*INIT, tmp_path / "none.pth"]}.items():
        code, _, err = fit(*more)
        assert code == 2 and words in err and err.count("\n") == 1, err
    assert not (tmp_path / "x").exists(), "before any work"

    (tmp_path / "x").mkdir()
    for name in ("ckpt.pt", "checkpoint-last.pth"):         # weights where a run is looked for
        shutil.copy(tmp_path / "m.pth", tmp_path / "x" / name)
        code, _, err = fit("--patch", 2, "--model", "mar-tiny")
        assert code == 2 and f"--init {tmp_path / 'x' / name}" in err, err
        (tmp_path / "x" / name).unlink()


def test_our_mar_weights_come_back_from_mar_s_layout(runs, program, tmp_path):
    file = tmp_path / "mar.pth"
    with pytest.warns(UserWarning, match="RoPE"):
        code, out, err = program(mar, "export", runs["mar-tiny"], file)
    assert code == 0 and str(file) in out, err
    ours, theirs = models.load_model(runs["mar-tiny"])[0], models.load_model(file)[0]
    ours_by_name, by_name = ours.state_dict(), theirs.state_dict()
    assert sorted(ours_by_name) == sorted(by_name)
    assert all(torch.equal(z, by_name[k]) for k, z in ours_by_name.items())
    x, y = tokens(3, ours)
    assert torch.equal(ours.conditions(x, y), theirs.conditions(x, y)), "the same architecture"

    for ckpt, target, words in [(runs["mar-tiny"], file, "exists"),
                                (runs["cdm-tiny"], tmp_path / "c.pth", "only mar models"),
                                (runs["mar-tiny"], tmp_path / "no" / "m.pth", "a folder that can"),
                                (tmp_path / "none", tmp_path / "m.pth", "no checkpoint at")]:
        before = file.read_bytes()
        code, _, err = program(mar, "export", ckpt, target)
        assert code == 2 and words in err and file.read_bytes() == before

    state = read_checkpoint(runs["mar-tiny"])
    state["config"]["objective"] = "flow"
    with pytest.raises(ValueError, match="MAR's head predicts eps"):
        mar.export_mar(tmp_path / "f.pth", state)
