"""Tests of the whole project: `pytest`. Names are sentences; each tolerance says where it comes from.

Mathematics is tested against closed forms, golden tensors and POT; behaviour through the public functions and the
command line. No test asserts a time.
"""
import ast
import copy
import functools
import glob
import importlib
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import ot
import pytest
import torch
from PIL import Image
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import data
import diffloss
import model as models
import ot_refine as R
import sample
import train
import vae
from data import batch_indices, patchify, unpatchify
from diffloss import DenoisingMLP, DiffLoss, ImageNoise, Sampler, Schedule, respaced, respaced_steps
from model import PRESETS, Config, build, gather, preset
from ot_refine import RefineConfig, Refiner
from vae import KL16, KL16_SCALE, Identity, latent_scale, load_kl16

ROOT = Path(__file__).parent
GOLDEN = Path(os.environ.get("GOLDEN_DIR", ROOT / "assets"))
TINY = ("gpt-tiny", "mar-tiny", "cdm-tiny")
torch.set_num_threads(1)        # problems this small gain nothing from a second thread, and lose on a busy machine


def tiny(name, **changes):
    """A small model with no parameter left at zero, so that nothing is hidden behind adaLN-zero."""
    torch.manual_seed(0)
    m = build(preset(name, **{"token_dim": 4, "grid": 4, "num_classes": 10, **changes})).eval()
    for p in m.parameters():
        if p.abs().max() == 0:
            torch.nn.init.normal_(p, std=0.02)
    return m


def tokens(n=3, m=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    d, k = (m.cfg.token_dim, m.cfg.n_tokens) if m else (4, 16)
    return torch.randn(n, k, d, generator=g).clamp(-1, 1), torch.arange(n) % 10


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def relative(a, b):
    """Largest difference over the largest value."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def cli(module, argv, monkeypatch, capsys):
    """Run a program's main() in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
    code = 0
    try:
        data.run(module.main)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# ================================================================ data

def test_tokens_and_images_are_the_same_thing():
    images = torch.rand(2, 3, 8, 8)
    x = patchify(images, 2)
    assert x.shape == (2, 16, 12)
    assert torch.equal(unpatchify(x, 2), images)
    assert torch.equal(x[0, 1].view(3, 2, 2), images[0, :, 0:2, 2:4]), "raster order, channel first"


@pytest.mark.parametrize("size", [16, 32])
def test_digits_are_the_published_ones(size):
    d = data.load("digits", size=size)
    assert (len(d.train), len(d.heldout), len(d.class_names)) == (1934, 946, 10)
    x, y = d.train.batch(torch.arange(1934))
    assert x.shape == (1934, 1, size, size) and x.min() == -1 and x.max() == 1
    assert y.bincount().min() > 150, "every class is well filled"


def test_shape_k_is_a_function_of_k_and_heldout_shapes_are_others():
    a, b = data.load("shapes", size=16), data.load("shapes", size=16)
    x, y = a.train.batch([5, 11, 5])
    assert torch.equal(x, b.train.batch([5, 11, 5])[0]) and torch.equal(x[0], x[2])
    assert y.tolist() == [5, 5, 5] and not torch.equal(x[0], x[1])
    train, held = a.train.batch(range(600))[0].flatten(1), a.heldout.batch(range(600))[0].flatten(1)
    assert torch.cdist(train, held).min() > 0.1


def test_an_epoch_visits_every_image_once_and_any_step_is_reproducible():
    n, batch = 50, 8
    seen = torch.cat([batch_indices(s, batch, n, seed=3) for s in range(25)])      # 200 draws: 4 epochs
    for e in range(4):
        assert seen[e * n:(e + 1) * n].sort().values.tolist() == list(range(n))
    assert not torch.equal(seen[:n], seen[n:2 * n])
    assert torch.equal(batch_indices(17, batch, n, seed=3), seen[17 * batch:18 * batch])


def make_folder(root, per_class=6, classes=("cat", "dog"), size=20):
    rng = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for k in range(per_class):
            Image.fromarray(rng.integers(0, 255, (size, size + 7, 3), dtype=np.uint8)).save(root / name / f"{k}.png")
    return root


def test_own_images_keep_their_class_names_and_hold_some_out(tmp_path):
    d = data.load("folder", make_folder(tmp_path / "f"), size=16)
    assert d.class_names == ["cat", "dog"] and len(d.train) + len(d.heldout) == 12 and len(d.heldout) >= 2
    assert d.train.batch([0])[0].shape == (1, 3, 16, 16)


def test_a_corrupt_image_is_named_and_too_many_are_an_error(tmp_path, capsys):
    root = make_folder(tmp_path / "f")
    (root / "cat" / "2.png").write_bytes(b"\x89PNG not really")
    with pytest.raises(ValueError, match=r"1 of 12 images.*2\.png"):
        data.load("folder", root, max_bad=0.01)
    d = data.load("folder", root, max_bad=0.2)
    assert len(d.train) + len(d.heldout) == 11
    assert "2.png" in capsys.readouterr().err


def test_the_crop_is_central_and_exact_on_multiples():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (32, 64, 3), dtype=np.uint8))
    out = np.asarray(data.centre_crop(image, 16), dtype=float)
    box = np.asarray(image, dtype=float).reshape(16, 2, 32, 2, 3).mean((1, 3))[:, 8:24]
    assert np.abs(out - box).max() <= 1, "one halving by BOX, then the centre; rounding to integers costs 1"


# ================================================================ presets

@pytest.mark.parametrize("name, millions", [("mar-b", 208), ("mar-l", 479), ("mar-h", 943)])
def test_mar_has_the_published_parameter_counts(name, millions):
    with torch.device("meta"):
        m = build(preset(name))
    assert round(m.num_params / 1e6) in (millions, millions - 1), m.num_params     # published figures are rounded up


def test_the_blocks_of_ar_xl_have_731_million_parameters():
    with torch.device("meta"):
        m = build(preset("gpt-xl"))
    assert round(sum(p.numel() for p in m.blocks.parameters()) / 1e6) == 731


def test_tiny_presets_are_equal_within_five_percent():
    models = {name: tiny(name, token_dim=16) for name in TINY}
    for left_out in (0, 1):                                     # with T^-1, which cdm has not, and without
        sizes = {name: m.num_params - left_out * sum(p.numel() for p in getattr(m, "inverse", torch.nn.Module()).parameters())
                 for name, m in models.items()}
        assert max(sizes.values()) / min(sizes.values()) < 1.05, sizes


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_its_widths_divide(name):
    with torch.device("meta"):
        assert build(preset(name)).num_params > 0


# ================================================================ generators

@pytest.mark.parametrize("name", TINY)
def test_the_loss_reaches_every_parameter(name):
    m = tiny(name).train()
    x, y = tokens(8, m)
    draws = next(d for d in (m.draw(8, gen(k)) for k in range(99)) if name != "mar-tiny" or d["t"].shape[1] < 16)     # mar: some patch is known
    draws["drop"][:2] = True
    m.loss(x, y, draws).sum().backward()
    silent = [n for n, p in m.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not silent, silent


@pytest.mark.parametrize("name", TINY)
def test_the_loss_of_a_batch_is_the_mean_over_its_halves(name):
    """What gradient accumulation and data parallelism rest on."""
    m = tiny(name)
    x, y = tokens(8, m)
    draws = m.draw(8, gen())
    whole = m.loss(x, y, draws)
    halves = [m.loss(x[h], y[h], {k: v[h] for k, v in draws.items()}) for h in (slice(0, 4), slice(4, 8))]
    assert ((whole - sum(halves) / 2).abs() <= 1e-5 * whole).all()                        # fp32 summation order


def test_ar_conditions_see_only_earlier_patches():
    m = tiny("gpt-tiny")
    x, y = tokens(2, m)
    c = m.conditions(x, y)
    for j in (0, 7, 15):
        changed = x.clone()
        changed[:, j] += 1
        d = (m.conditions(changed, y) - c).abs().amax((0, 2))
        assert d[:j + 1].max() == 0 and (j == 15 or d[j + 1:].min() > 1e-6), f"patch {j} reached {d}"


@pytest.mark.parametrize("name, options", [("gpt-tiny", {}), ("mar-tiny", {}), ("mar-tiny", {"num_iter": 5})])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_conditions_met_in_generation_equal_teacher_forcing_on_the_result(name, options, cfg_scale):
    """The KV cache equals the full forward; MAR's steps equal its teacher forcing with the same order."""
    m = tiny(name)
    y, noise = torch.tensor([1, 4, 9]), ImageNoise(0, range(3))
    order = noise.rand(16).argsort(1)
    met = {}
    watch = lambda i, c, inverse: met.setdefault(i, c.clone())
    extra = {"order": order} if name.startswith("mar") else {}
    x = m.generate(y, noise, Sampler("ddim", 3, x0_bound=1.0), cfg_scale, refine=watch, **options, **extra)
    full = m.conditions(x, y, order, **options) if extra else m.conditions(x, y)
    seen = torch.cat([met[i] for i in sorted(met)], dim=1)
    want = gather(full, order) if extra else full
    assert relative(seen, want) < 1e-5                                              # fp32, other summation order


@pytest.mark.parametrize("name", ["gpt-tiny", "mar-tiny"])
def test_the_null_condition_moves_along_with_the_refined_one_only_if_asked(name, monkeypatch):
    m, y = tiny(name), torch.tensor([1, 4, 9])
    met = []
    monkeypatch.setattr(m.diffloss, "draw", lambda c, c_null, *rest: met.append((c, c_null)) or torch.zeros(3, c.shape[1], m.cfg.token_dim))
    for refine, move_null in ((None, False), (0.5, False), (0.5, True)):
        hook = refine and (lambda i, c, inverse: c + refine)
        m.generate(y, ImageNoise(0, range(3)), Sampler("ddim", 3), 2.0, refine=hook, move_null=move_null)
    n = len(met) // 3
    for (c, null), (c1, null1), (c2, null2) in zip(met[:n], met[n:], met[2 * n:]):      # the patches are all zeros: equal contexts
        assert torch.equal(c1, c + 0.5) and torch.equal(c2, c1) and torch.equal(null1, null)
        assert (null2 - null - 0.5).abs().max() < 1e-6
    m.generate(y, ImageNoise(0, range(3)), Sampler("ddim", 3), 1.0, refine=lambda i, c, inverse: c + 0.5, move_null=True)
    assert met[-1][1] is None, "without guidance there is no null condition to move"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_are_kept_in_the_dtype_in_which_they_are_computed(dtype):
    m, caches = tiny("gpt-tiny"), []
    m.blocks[0].register_forward_pre_hook(lambda block, args: caches.extend(a for a in args if torch.is_tensor(a) and a.dim() == 5))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        x = m.generate(torch.tensor([1, 4]), ImageNoise(0, range(2)), Sampler("ddim", 2, x0_bound=1.0), 2.0)
    assert len(caches) == 16 and all(cache.dtype == dtype for cache in caches) and x.isfinite().all()


def test_mar_conditions_depend_on_the_set_of_known_patches_not_on_their_order():
    m = tiny("mar-tiny")
    x, y = tokens(3, m)
    known = torch.stack([torch.randperm(16, generator=gen(k))[:7] for k in range(3)])
    a = m.step_conditions(gather(x, known), known, y)
    b = m.step_conditions(gather(x, known.flip(1)), known.flip(1), y)
    assert relative(a, b) < 1e-5                                                    # fp32 summation order in attention
    hidden = x.clone()
    unknown = torch.stack([torch.tensor([p for p in range(16) if p not in row]) for row in known])
    hidden.scatter_(1, unknown[..., None].expand(-1, -1, 4), 5.0)
    assert torch.equal(m.step_conditions(gather(hidden, known), known, y), a), "masked patches are not seen"


@pytest.mark.parametrize("num_iter", [1, 4, 16, 64])
def test_mar_fills_every_token_exactly_once(num_iter):
    known = tiny("mar-tiny").steps_of(min(num_iter, 16))
    assert known[0] == 0 and known[-1] == 16 and all(b > a for a, b in zip(known, known[1:]))


def test_mar_mask_ratio_follows_the_truncated_normal():
    u = np.linspace(0.0005, 0.9995, 1000)
    r = np.array([models.truncated_normal(v) for v in u])
    from scipy.stats import truncnorm
    want = truncnorm.ppf(u, (0.7 - 1) / 0.25, 0, loc=1, scale=0.25)
    assert np.abs(r - want).max() < 1e-9                                            # both are inverse CDFs in float64


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("num_classes", [1, 10, 1000])
def test_the_null_class_is_num_classes_for_any_number_of_classes(name, num_classes):
    m = tiny(name, num_classes=num_classes)
    x, _ = tokens(2, m)
    null, zero = (m.conditions(x, torch.full((2,), k)) for k in (num_classes, 0))
    assert null.isfinite().all() and not torch.allclose(null, zero)
    dropped = m.with_null(torch.zeros(4, dtype=torch.long), torch.tensor([True, False, True, False]))
    assert dropped.tolist() == [num_classes, 0, num_classes, 0]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("solver", diffloss.SOLVERS)
@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_an_untrained_model_draws_finite_images_within_the_bound(name, solver, cfg_scale):
    torch.manual_seed(0)
    m = build(preset(name, token_dim=4, grid=4, num_classes=10)).eval()
    x = m.generate(torch.arange(4), ImageNoise(0, range(4)), Sampler(solver, 5, x0_bound=1.0), cfg_scale)
    assert x.shape == (4, 16, 4) and x.isfinite().all() and x.abs().max() <= 1.0 + 1e-6


@pytest.mark.parametrize("name", TINY)
def test_image_k_of_a_seed_is_the_same_in_any_batch(name):
    m = tiny(name)
    y, s = torch.arange(6), Sampler("ddpm", 4, x0_bound=1.0)
    whole = m.generate(y, ImageNoise(5, range(6)), s)
    part = m.generate(y[3:5], ImageNoise(5, [3, 4]), s)
    assert relative(part, whole[3:5]) < 1e-4                                        # other matmul shapes, a chain of 16 x 4 steps
    assert not torch.allclose(whole[:1], m.generate(y[:1], ImageNoise(6, [0]), s)), "another seed, another image"


def test_inpainting_leaves_the_known_part_as_it_is():
    m = tiny("mar-tiny")
    x, y = tokens(2, m)
    order = torch.randperm(16, generator=gen()).expand(2, -1)
    out = m.generate(y, ImageNoise(0, range(2)), Sampler(steps=4, x0_bound=1.0), order=order, x=x, n_known=9, num_iter=4)
    assert torch.equal(gather(out, order[:, :9]), gather(x, order[:, :9]))
    assert not torch.isclose(gather(out, order[:, 9:]), gather(x, order[:, 9:])).all(-1).any()


def test_a_bad_architecture_is_refused_with_the_remedy():
    for changes, words in [({"n_head": 5}, "divisible by n_head"), ({"num_classes": 0}, "at least 1"), ({"kind": "gan"}, "choose one of")]:
        with pytest.raises(ValueError, match=words):
            preset("gpt-tiny", **changes)
    with pytest.raises(ValueError, match="did you mean gpt-tiny"):
        preset("gpt-tniy")


# ================================================================ diffusion

GAUSS_MEAN, GAUSS_STD = torch.tensor([0.8, -1.5]), torch.tensor([0.5, 1.2])


def gaussian_denoiser(schedule=None):
    """The exact eps of data N(mean, std^2), and the exact reverse variance between neighbours of a schedule."""
    full = Schedule()

    def denoise(x_t, t):
        a, s2 = full.alpha[t], full.sigma[t] ** 2
        var = a ** 2 * GAUSS_STD ** 2 + s2
        eps = full.sigma[t] * (x_t - a * GAUSS_MEAN) / var
        if schedule is None:
            return eps, torch.zeros_like(eps)
        j = int(np.flatnonzero(schedule.timestep_map == t)[0])
        # Var[x_{j-1} | x_j] for this prior: the posterior's plus what is left of x0's uncertainty
        x0_var = GAUSS_STD ** 2 * s2 / var
        reverse = np.exp(schedule.log_var_min[j]) + schedule.mean_x0[j] ** 2 * x0_var
        low, high = schedule.log_var_min[j], schedule.log_var_max[j]
        return eps, (2 * (reverse.log() - low) / (high - low) - 1).expand_as(eps)
    return denoise


@pytest.mark.parametrize("solver, steps, eta", [("ddpm", 250, 0), ("ddim", 250, 0), ("ddim", 1000, 1), ("dpm++", 25, 0), ("dpm++", 100, 0)])
def test_every_sampler_recovers_mean_and_variance_of_a_gaussian(solver, steps, eta):
    s, n = Sampler(solver, steps, eta=eta), 20_000
    noise = torch.randn(s.n_noise(steps), n, 2, generator=gen()) if steps < 1000 else torch.randn(s.n_noise(steps), 4000, 2, generator=gen())
    x = s(gaussian_denoiser(respaced(steps) if solver == "ddpm" else None), noise)
    # 0.03: the standard error of 20,000 draws is 0.008, the discretisation's bias is of the order of 0.01
    assert (x.mean(0) - GAUSS_MEAN).abs().max() < 0.04, x.mean(0)
    assert (x.std(0) / GAUSS_STD - 1).abs().max() < 0.04, x.std(0)


def test_the_second_order_solver_converges_faster_than_the_first_order_one():
    z = torch.randn(1, 2000, 2, generator=gen())
    exact = Sampler("ddim", 1000)(gaussian_denoiser(), z)
    error = {k: (Sampler(k, 12)(gaussian_denoiser(), z) - exact).square().mean().sqrt() for k in ("ddim", "dpm++")}
    assert error["dpm++"] < 0.5 * error["ddim"], error


def test_temperature_scales_the_noise_that_a_solver_has():
    z = torch.randn(101, 5000, 2, generator=gen())
    for solver in diffloss.SOLVERS:
        d = gaussian_denoiser(respaced(100) if solver == "ddpm" else None)
        hot, cold = (Sampler(solver, 100, temperature=t)(d, z).std(0) for t in (1.0, 0.5))
        assert (cold < 0.8 * hot).all(), (solver, hot, cold)


def test_guidance_extrapolates_eps_from_the_null_branch_and_keeps_the_conditional_variance():
    torch.manual_seed(0)
    net = DenoisingMLP(4, 8, 16, 2)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    d = DiffLoss(net)
    x, c, c0, t = torch.randn(5, 4), torch.randn(5, 8), torch.randn(5, 8), torch.full((5,), 300)
    (e, v), (e0, _) = net(x, t, c), net(x, t, c0)
    eps, var = d.denoiser(c, c0, 2.5)(x, 300)
    assert torch.allclose(eps, e0 + 2.5 * (e - e0), atol=1e-5) and torch.allclose(var, v, atol=1e-6)
    assert torch.allclose(d.denoiser(c, c0, 1.0)(x, 300)[0], e, atol=1e-6), "scale 1 is the conditional branch"


def test_the_time_table_of_training_equals_the_embedding_of_each_step():
    torch.manual_seed(0)
    net = DenoisingMLP(4, 8, 16, 1)
    t = torch.randint(0, 1000, (1500,), generator=gen())
    assert relative(net.embed_time(t), net.time_embed(t)) < 1e-5                    # fp32, other matmul shapes


@pytest.mark.parametrize("shape", [(1,), (5,), (3, 4), (700,)])
def test_modulations_computed_ahead_give_what_the_plain_head_gives(shape):
    torch.manual_seed(0)
    net = DenoisingMLP(4, 8, 16, 2)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    d, ts = DiffLoss(net), Sampler("ddpm", 7).timesteps()
    c, c0, x = torch.randn(*shape, 8), torch.randn(*shape, 8), torch.randn(7, *shape, 4)
    for null, scale in ((None, 1.0), (c0, 2.0)):
        plain, fast = d.denoiser(c, null, scale), d.denoiser(c, null, scale, ts)
        for t, x_t in zip(ts, x):
            for got, want in zip(fast(x_t, t), plain(x_t, t)):
                assert relative(got, want) < 1e-5, (t, relative(got, want))         # fp32, other matmul shapes


def test_timesteps_are_those_at_which_a_sampler_calls_the_denoiser():
    for solver in diffloss.SOLVERS:
        for steps in (1, 2, 9, 100):
            s, met = Sampler(solver, steps, x0_bound=1.0), []
            s(lambda x, t: (met.append(t), (x, x))[1], torch.zeros(s.n_noise(steps), 1, 2))
            assert s.timesteps() == met, (solver, steps)


def test_annealing_takes_the_stated_number_of_steps():
    s = Sampler(steps=20, steps_late=5)
    assert [s.steps_at(i, 16) for i in (0, 15)] == [20, 5] and s.steps_at(0, 1) == 20
    m, calls = tiny("gpt-tiny"), []
    m.diffloss.net.input_proj.register_forward_hook(lambda *a: calls.append(1))
    m.generate(torch.arange(2), ImageNoise(0, range(2)), Sampler(steps=6, steps_late=2, x0_bound=1.0))
    assert len(calls) == m.head_calls(Sampler(steps=6, steps_late=2))


def test_score_is_the_gradient_of_log_density():
    d = DiffLoss(lambda x_t, t, c: gaussian_denoiser()(x_t, int(t[0])))
    x = torch.randn(6, 2, generator=gen(), dtype=torch.float64, requires_grad=True)
    t = torch.full((6,), 400)
    a, s = Schedule().alpha[400], Schedule().sigma[400]
    log_p = torch.distributions.Normal(a * GAUSS_MEAN.double(), (a ** 2 * GAUSS_STD.double() ** 2 + s ** 2).sqrt()).log_prob(x).sum()
    want, = torch.autograd.grad(log_p, x)
    assert relative(d.score(x.detach(), t, None), want) < 1e-5                      # schedule tables are fp32


def test_only_tokens_that_count_enter_the_head():
    m, rows = tiny("mar-tiny"), []
    m.diffloss.net.input_proj.register_forward_hook(lambda mod, args, out: rows.append(out[..., 0].numel()))
    x, y = tokens(4, m)
    draws = next(d for d in (m.draw(4, gen(k)) for k in range(99)) if d["t"].shape[1] < 16)
    m.loss(x, y, draws)
    assert rows == [4 * draws["t"].shape[1] * m.cfg.diffusion_batch_mul], "the masked tokens, each `mul` times"


# ================================================================ golden tensors of MAR

def golden_files(pattern):
    files = sorted(GOLDEN.glob(pattern))
    assert files, f"no {pattern} in {GOLDEN} (GOLDEN_DIR)"
    return files


class Golden:
    """The file's tensors by name, and the MAR it describes with its weights loaded."""

    def __init__(self, path):
        with np.load(path) as z:
            self.z = {k: torch.from_numpy(z[k]) if z[k].dtype.kind in "fiub" and z[k].ndim else z[k].item() for k in z.files}
        g = ast.literal_eval(self.z["config"])
        assert g["encoder_depth"] == g["decoder_depth"] and g["patch_size"] == 1
        self.cfg = Config(kind="mar", n_layer=g["encoder_depth"], n_head=g["encoder_num_heads"], n_embd=g["encoder_embed_dim"],
                          head_depth=g["diffloss_d"], head_width=g["diffloss_w"], token_dim=g["vae_embed_dim"],
                          grid=g["img_size"] // g["vae_stride"], num_classes=g["class_num"], n_class_tokens=g["buffer_size"])
        self.steps = int(g["num_sampling_steps"])
        self.model = build(self.cfg).eval()
        self.model.load_state_dict({k[2:]: v for k, v in self.z.items() if k.startswith("w/")})

    def __getitem__(self, key):
        return self.z[key]


@pytest.fixture(scope="module", params=golden_files("mar_golden_*.npz"), ids=lambda f: f.stem)
def golden(request):
    return Golden(request.param)


@torch.no_grad()
def test_golden_tokens_and_conditions(golden):
    x = patchify(golden["latents"], 1)
    assert torch.equal(x, golden["tokens"])
    known = torch.stack([torch.nonzero(row == 0).flatten() for row in golden["mask"]])
    for y, want in ((golden["labels"], "z_cond"), (torch.full_like(golden["labels"], golden.cfg.num_classes), "z_uncond")):
        c = golden.model.step_conditions(gather(x, known), known, y)
        assert relative(c, golden[want]) < 1e-5, want


@torch.no_grad()
def test_golden_head_with_and_without_guidance(golden):
    x, t, c = golden["head_x"], golden["head_t"], golden["head_c"]
    out = torch.cat(golden.model.diffloss.net(x, t, c), dim=-1)
    assert relative(out, golden["head_out"]) < 1e-5
    # both halves of MAR's guided call: the rows are pairs (condition k, null k), one shared x
    half = len(golden["head_cfg_out"]) // 2
    D = golden.cfg.token_dim
    assert relative(golden["head_cfg_out"][:half, :D], golden["head_cfg_out"][half:, :D]) == 0


@torch.no_grad()
def test_golden_loss(golden):
    mse, vb = golden.model.diffloss.terms(golden["loss_target"], golden["head_c"], golden["head_t"], golden["loss_noise"])
    assert relative(mse, golden["loss_mse"]) < 1e-5
    assert relative(vb, golden["loss_vb"]) < 1e-5
    assert relative(mse + vb, golden["loss"]) < 1e-5


def test_golden_schedule(golden):
    assert respaced_steps(golden.steps).tolist() == golden["timestep_map"].tolist()
    assert np.abs(respaced(golden.steps).betas - golden["betas_respaced"].numpy()).max() < 1e-12   # float64 on both sides


@torch.no_grad()
def test_golden_ancestral_step(golden):
    d, s = golden.model.diffloss, Sampler("ddpm", golden.steps, temperature=golden["temperature"])
    schedule = respaced(golden.steps)
    for row, j in enumerate(golden["pstep_index"].tolist()):
        x_t, c = golden["pstep_x_t"][row:row + 1], golden["sample_c"][row:row + 1]
        x0, v = s.predict(d.denoiser(c), x_t, schedule, j, None)
        x = s.ancestral(x_t, x0, v, schedule, j, golden["pstep_noise"][row:row + 1])
        assert relative(x0, golden["pstep_x0"][row:row + 1]) < 1e-5, f"x0 at step {j}"
        assert relative(x, golden["pstep_out"][row:row + 1]) < 1e-5, f"step {j}"


@torch.no_grad()
@pytest.mark.parametrize("solver, want", [("ddpm", "sample_out"), ("ddim", "ddim_out")])
def test_golden_chain(golden, solver, want):
    noise = torch.cat([golden["sample_x_T"][None], golden["sample_noise"]])
    temperature = golden["temperature"] if solver == "ddpm" else 1.0
    out = Sampler(solver, golden.steps, temperature=temperature)(golden.model.diffloss.denoiser(golden["sample_c"]), noise)
    assert relative(out, golden[want]) < 1e-3                                       # chains reach 1e3: x0 is not bounded here


# ================================================================ training

FAST = ["--global_batch", 16, "--eval_every", 2, "--warmup", 2, "--device", "cpu", "--eval_images", 32, "--samples_per_class", 2]


ALIKE = ["--dropout", 0, "--buffer", 0]      # what does depend on how a batch is shared out: dropout masks, the buffer's share


def fit(out, *more, monkeypatch, capsys, ok=True):
    code, stdout, err = cli(train, ["--out_dir", out, *FAST, *more], monkeypatch, capsys)
    assert not ok or code == 0, err
    return code, stdout, err


def weights(out):
    return models.read_checkpoint(out)


def same(a, b):
    return all(torch.equal(a[part][k], b[part][k]) for part in ("model", "ema") for k in a[part])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A short run of each generator, by name: its directory."""
    root = tmp_path_factory.mktemp("runs")
    patch = pytest.MonkeyPatch()
    for name in TINY:
        patch.setattr(sys, "argv", ["train.py", "--out_dir", str(root / name), *map(str, FAST), "--steps", "2", "--model", name])
        train.main()
    patch.undo()
    return {name: root / name for name in TINY}


@pytest.mark.parametrize("name", TINY)
def test_a_run_leaves_checkpoint_pictures_and_metrics(name, runs):
    out = runs[name]
    assert Image.open(out / "samples.png").size[0] > 100 and Image.open(out / "loss.png").size[0] > 100
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [2] and all(np.isfinite(r["heldout_loss"]) for r in records)
    state = weights(out)
    assert state["data"]["class_names"] == [str(k) for k in range(10)] and state["versions"]["torch"] == str(torch.__version__)


@pytest.mark.parametrize("name", TINY)
def test_two_and_two_steps_equal_four_bitwise(name, tmp_path, monkeypatch, capsys):
    common = dict(monkeypatch=monkeypatch, capsys=capsys)
    fit(tmp_path / "a", "--model", name, "--dropout", 0.1, "--lr_schedule", "constant", "--steps", 4, **common)
    fit(tmp_path / "b", "--model", name, "--dropout", 0.1, "--lr_schedule", "constant", "--steps", 2, **common)
    _, out, _ = fit(tmp_path / "b", "--model", name, "--dropout", 0.1, "--lr_schedule", "constant", "--steps", 4, **common)
    assert "resuming" in out and "step 2 of 4" in out
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert a["step"] == b["step"] == 4 and same(a, b)
    heldout = [[json.loads(line)["heldout_loss"] for line in (tmp_path / d / "metrics.jsonl").read_text().splitlines()] for d in "ab"]
    assert heldout[0] == heldout[1]


def test_gradient_accumulation_equals_one_batch(tmp_path, monkeypatch, capsys):
    for name, parts in (("a", 1), ("b", 4)):
        fit(tmp_path / name, "--steps", 2, "--accumulate", parts, *ALIKE, monkeypatch=monkeypatch, capsys=capsys)
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    # Adam divides by the gradient's size: 1e-5 of the learning rate per step is fp32's summation order
    assert max(float((a["model"][k] - b["model"][k]).abs().max()) for k in a["model"]) < 2e-5


def python(*argv, env=None, **kw):
    return subprocess.Popen([sys.executable, *map(str, argv)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}, **kw)


def fork_server():
    """Where the tests' processes come from: forked from a server that has imported everything once, which takes a new interpreter
    5 s each time."""
    os.environ.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    # the first optimiser imports torch._dynamo, for seconds
    multiprocessing.set_forkserver_preload(["__main__", "torch._dynamo", "matplotlib.pyplot", "test_core", "test_imagenet", "evaluate"])
    return multiprocessing.get_context("forkserver")


def program(module, argv, before=None, log=None):
    """What such a process runs: a program, after before(); output to the file log."""
    if log:
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.argv = [f"{module}.py", *argv]
    if before:
        before()
    data.run(importlib.import_module(module).main)


def start(log, module, *argv, before=None):
    """A running process of a program."""
    p = fork_server().Process(target=program, args=(module, [str(a) for a in argv], before, str(log)))
    p.start()
    return p


def torchrun(n, module, *argv, before=None, restarts=0):
    """(success, output of all processes, life by life and rank by rank) of `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun
    --nproc_per_node n --max-restarts restarts -- module.py argv`; before() is called first in each process.

    The agent, its rendezvous, restarts and signals are torchrun's own; only the start of the processes is cheaper.
    """
    fork_server()
    handlers = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)}
    with tempfile.TemporaryDirectory() as logs:
        config = LaunchConfig(1, 1, n, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="test", max_restarts=restarts, monitor_interval=0.1,
                              start_method="forkserver", logs_specs=DefaultLogsSpecs(logs, redirects=Std.ALL))
        try:
            elastic_launch(config, program)(module, [str(a) for a in argv], before)
            success = True
        except ChildFailedError:
            success = False
        finally:
            for name, handler in handlers.items():
                signal.signal(name, handler)
        return success, "".join(f.read_text() for f in sorted(Path(logs).rglob("std*.log")))


def test_two_processes_equal_one_and_another_world_size_may_resume(tmp_path, monkeypatch, capsys):
    flags = ["--model", "mar-tiny", "--lr_schedule", "constant", *FAST, *ALIKE]
    fit(tmp_path / "one", *flags, "--steps", 2, monkeypatch=monkeypatch, capsys=capsys)
    success, log = torchrun(2, "train", "--out_dir", tmp_path / "two", *flags, "--steps", 2)
    assert success, log
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max(float((a["model"][k] - b["model"][k]).abs().max()) for k in a["model"]) < 2e-5     # as above
    fit(tmp_path / "two", *flags, "--steps", 3, monkeypatch=monkeypatch, capsys=capsys)
    assert weights(tmp_path / "two")["step"] == 3


def dies_in_steps(*steps):
    """In life k of the job, rank 2 is killed when it begins step steps[k] and the checkpoint of the step before is written."""
    doomed, real = steps[int(os.environ["TORCHELASTIC_RESTART_COUNT"])], train.train_step

    def train_step(step, *a):
        if os.environ["RANK"] == "2" and step == doomed:
            record = Path(a[-2].out_dir) / "metrics.jsonl"                           # is written after the checkpoint
            while not record.exists() or f'"step": {step},' not in record.read_text():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(step, *a)
    train.train_step = train_step


def test_a_job_of_four_whose_process_is_killed_restarts_itself_and_ends_with_two_as_if_never_interrupted(tmp_path, monkeypatch, capsys):
    flags = ["--lr_schedule", "constant", *FAST, *ALIKE, "--eval_every", 1, "--eval_images", 8, "--steps", 4]
    fit(tmp_path / "one", *flags, monkeypatch=monkeypatch, capsys=capsys)
    success, log = torchrun(4, "train", "--out_dir", tmp_path / "r", *flags, before=functools.partial(dies_in_steps, 1, 3), restarts=1)
    assert not success and "at step 1 of 4" in log, f"torchrun starts all four again, and they resume: {log}"
    assert weights(tmp_path / "r")["step"] == 3
    success, log = torchrun(2, "train", "--out_dir", tmp_path / "r", *flags)
    assert success and "at step 3 of 4" in log, log
    a, b = weights(tmp_path / "one"), weights(tmp_path / "r")
    for part in ("model", "ema"):                                                    # twice the tolerance of above: 4 steps
        assert max(float((a[part][k] - b[part][k]).abs().max()) for k in a[part]) < 4e-5
    steps = [json.loads(line)["step"] for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4], "no step is recorded twice"


def fails_on_rank_1():
    real, data.time.sleep = time.sleep, lambda seconds: real(seconds / 10)           # the wait for torchrun, which will not come
    if os.environ["RANK"] == "1":
        sys.argv += ["--data_dir", "elsewhere", "--dataset", "folder"]


@pytest.mark.parametrize("before, words", [(None, "must be a multiple of processes x --accumulate = 3 x 1"), (fails_on_rank_1, "elsewhere is not a folder")])
def test_an_error_of_all_processes_is_said_once_and_that_of_one_is_not_lost(before, words, tmp_path):
    flags = ["--steps", 1, "--global_batch", 8 if before is None else 9, "--device", "cpu", "--model", "gpt-tiny"]
    success, log = torchrun(3, "train", "--out_dir", tmp_path / "r", *flags, before=before)
    assert not success and log.count(words) == 1, log


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_signal_finishes_the_step_saves_and_exits_zero(name, tmp_path):
    p = start(tmp_path / "log", "train", "--out_dir", tmp_path / "r", *FAST, "--steps", 100_000, "--eval_every", 100_000)
    while not (tmp_path / "r" / "ckpt.pt").exists():
        time.sleep(0.1)
        assert p.is_alive(), (tmp_path / "log").read_text()
    time.sleep(1.0)
    os.kill(p.pid, name)
    p.join(300)
    assert p.exitcode == 0 and "stopped by a signal" in (tmp_path / "log").read_text(), (tmp_path / "log").read_text()
    assert weights(tmp_path / "r")["step"] > 0


def dies_in_the_second_save():
    real = torch.save

    def save(state, f):
        if state["step"] == 0:
            return real(state, f)
        whole = io.BytesIO()
        real(state, whole)
        f.write(whole.getvalue()[:len(whole.getvalue()) // 2])
        f.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    torch.save = save


def test_a_kill_during_a_save_never_costs_the_previous_checkpoint(tmp_path):
    p = start(tmp_path / "log", "train", "--out_dir", tmp_path / "r", *FAST, "--steps", 2, before=dies_in_the_second_save)
    p.join(300)
    assert p.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert weights(tmp_path / "r")["step"] == 0, "the step-0 checkpoint is whole"


def test_a_non_finite_loss_names_the_step_the_causes_and_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    nan = lambda step, *a: torch.tensor(float("nan"))
    real = train.train_step
    monkeypatch.setattr(train, "train_step", lambda step, *a: nan(step) if step >= 3 else real(step, *a))
    monkeypatch.setattr(sys, "argv", ["train.py", "--out_dir", str(tmp_path / "r"), *map(str, FAST), "--steps", "10"])
    with pytest.raises(SystemExit) as stop:
        data.run(train.main)
    assert "nan at about step 4" in str(stop.value) and "--lr" in str(stop.value) and "at step 2" in str(stop.value)
    assert all(v.isfinite().all() for v in weights(tmp_path / "r")["model"].values())


def test_mar_tiny_trains_longer_on_the_small_data_sets_unless_told_otherwise():
    steps = lambda *argv: train.parse_args(list(argv)).steps
    assert steps() == steps("--model", "cdm-tiny") == 2400 and steps("--model", "mar-tiny") == steps("--dataset", "shapes", "--model", "mar-tiny") == 6000
    assert steps("--model", "mar-tiny", "--steps", "7") == 7 and steps("--dataset", "imagenet256", "--model", "mar-tiny") == 250_000


def test_the_pool_of_orders_begins_with_the_eight_raster_scans():
    pool = sample.scan_orders(11, 4)
    assert (pool.sort(1).values == torch.arange(16)).all() and len(pool.unique(dim=0)) == 11
    assert pool[0].equal(torch.arange(16)) and pool[1].equal(torch.arange(16).flip(0))
    assert torch.isin(pool[:8].view(8, 4, 4).diff(dim=2).abs(), torch.tensor([1, 4])).all(), "each draws whole rows or columns"
    assert sample.scan_orders(3, 4).equal(pool[:3]), "an order does not depend on the size of the pool"


def test_guidance_is_on_by_default_and_an_error_for_a_model_without_a_null_branch():
    parser = data.Parser()
    sample.add_drawing_flags(parser)
    assert sample.make_recipe(parser.parse_args([]), "ar", 1.0) == sample.Recipe(Sampler(x0_bound=1.0), models.GUIDANCE)
    sample.Drawer(tiny("gpt-tiny", class_dropout=0.0), sample.Recipe(cfg_scale=1.0), [0])
    with pytest.raises(ValueError, match="--class_dropout 0.*--cfg_scale 1"):
        sample.Drawer(tiny("gpt-tiny", class_dropout=0.0), sample.Recipe(), [0])


@pytest.mark.parametrize("name", ["gpt-tiny", "mar-tiny"])
def test_buffer_targets_are_the_conditions_kept_for_each_class_position_and_order(name):
    m = tiny(name, buffer=5, num_classes=3)
    c = torch.randn(7, 16, m.cfg.n_embd, generator=gen())
    for y in range(3):
        m.buffer.push(c + y, torch.arange(16).expand(7, -1), torch.full((7,), y))
    mar = name == "mar-tiny"
    recipe = sample.Recipe(refine=RefineConfig(method="mean", rank=0), target="buffer", orders=2 * mar, num_iter=5 if mar else None)
    drawer = sample.Drawer(m, recipe, [2, 0])
    drawer.set_targets(None)
    order = drawer.pool if mar else torch.arange(16)[None]
    for i, (a, b) in enumerate(m.chain(recipe.num_iter)):
        if i == 0:
            assert 0 not in drawer.refiner.targets, "the first condition depends on the class alone"
            continue
        for k, y in enumerate([2, 0]):
            for s, o in enumerate(order):
                got = (drawer.refiner.targets[i] + drawer.refiner.origin[i])[k * len(order) + s]        # (P, m, C), the last 5 of 7
                want = (c + y)[2:, o[a:b]].transpose(0, 1)
                assert relative(got.sort(1)[0], want.sort(1)[0]) < 2e-3, "kept in half precision"


@pytest.mark.parametrize("shape", [(64, 64), (192, 64), (64, 256)])
def test_muon_gives_every_direction_of_a_matrix_about_the_same_step(shape):
    g = torch.randn(3, *shape, generator=gen()) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
    u, size, vt = torch.linalg.svd(g, full_matrices=False)
    got = u.mT @ train.orthogonal(g) @ vt.mT                                        # diagonal if the directions are kept
    values = got.diagonal(dim1=1, dim2=2)
    assert (got - torch.diag_embed(values)).abs().max() < 1e-4                      # fp32
    counted = values[size > 0.02 * size.square().sum(-1, keepdim=True).sqrt()]      # a Gaussian square matrix is nearly singular
    assert len(counted) > 0.8 * values.numel() and 0.6 < counted.min() and counted.max() < 1.25, (counted.min(), counted.max())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("model", ["gpt-tiny", "mar-tiny", "cdm-tiny"])
def test_every_parameter_has_one_optimiser_and_moves(optimizer, model, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, FAST), "--optimizer", optimizer])
    args, dataset, m = train.parse_args(), data.load("digits"), build(preset(model, grid=4, num_classes=10))
    for p in m.parameters():                                                        # zeros pass no gradient on
        torch.nn.init.normal_(p, std=0.02) if not p.any() else None
    optimizers, before, ema = train.make_optimizers(m, args), [p.clone() for p in m.parameters()], copy.deepcopy(m).requires_grad_(False)
    owned = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(map(id, owned)) == sorted(map(id, m.parameters()))
    world = type("W", (), {"size": 1, "rank": 0, "device": torch.device("cpu")})
    train.train_step(0, m, m, ema, optimizers, dataset, args, world)
    still = [n for (n, p), b in zip(m.named_parameters(), before) if torch.equal(p, b)]
    assert not still, still


def test_no_step_leaves_a_graph_behind(monkeypatch):
    """An average that tracks gradients grows by one graph node per step and tensor until memory is full."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, FAST)])
    args, dataset, m = train.parse_args(), data.load("digits"), build(preset("gpt-tiny", grid=4, num_classes=10))
    ema = copy.deepcopy(m).requires_grad_(False)
    world = type("W", (), {"size": 1, "rank": 0, "device": torch.device("cpu")})
    loss = train.train_step(0, m, m, ema, train.make_optimizers(m, args), dataset, args, world)
    assert not loss.requires_grad and all(p.grad_fn is None and not p.requires_grad for p in ema.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(ema.parameters(), m.parameters()))


def test_a_finished_run_is_not_trained_again(runs, monkeypatch, capsys):
    before = (runs["gpt-tiny"] / "ckpt.pt").stat().st_mtime_ns
    _, out, _ = fit(runs["gpt-tiny"], "--steps", 2, monkeypatch=monkeypatch, capsys=capsys)
    assert "nothing to train" in out and (runs["gpt-tiny"] / "ckpt.pt").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", PRESETS)
def test_dry_run_describes_every_preset_without_training(name, tmp_path, monkeypatch, capsys):
    code, out, err = cli(train, ["--dry-run", "--model", name, "--out_dir", tmp_path / "x", "--global_batch", 4], monkeypatch, capsys)
    assert code == 0, err
    assert "parameters" in out and "GiB" in out and not (tmp_path / "x").exists()


def test_no_rope_gives_mar_s_own_positions(tmp_path, monkeypatch, capsys):
    fit(tmp_path, "--model", "mar-tiny", "--no-rope", *FAST, "--steps", 1, monkeypatch=monkeypatch, capsys=capsys)
    plain, state = models.load_model(tmp_path)
    turned = build(models.replace(plain.cfg, rope=True)).eval()
    turned.load_state_dict(plain.state_dict())                                          # RoPE has no weights of its own
    x, y = torch.randn(4, plain.cfg.n_tokens, plain.cfg.token_dim, generator=gen(0)), torch.tensor([0, 1, 2, 3])
    assert not plain.cfg.rope and (plain.conditions(x, y) - turned.conditions(x, y)).abs().max() > 1e-3
    assert tiny("mar-tiny").cfg.rope and not preset("mar-b").rope


# ================================================================ sampling

def draw(argv, monkeypatch, capsys):
    return cli(sample, [*argv, "--device", "cpu"], monkeypatch, capsys)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("solver", diffloss.SOLVERS)
def test_every_generator_samples_with_every_solver(name, solver, runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "s.npz"
    code, text, err = draw(["--ckpt", runs[name], "--solver", solver, "--steps", 3, "--n", 20, "--cfg_scale", 1.5, "--out", out], monkeypatch, capsys)
    assert code == 0, err
    with np.load(out) as z:
        assert z["arr_0"].shape == (20, 16, 16, 1) and z["arr_0"].dtype == np.uint8
        assert np.bincount(z["arr_1"]).tolist() == [2] * 10, "class-balanced"
    calls = 3 * 2 * (1 if name == "cdm-tiny" else 16)
    assert f"{calls} denoiser calls per image" in text


def test_the_same_seed_gives_the_same_file_at_any_batch_size(runs, tmp_path, monkeypatch, capsys):
    arrays = []
    for size in (3, 20):
        out = tmp_path / f"{size}.npz"
        draw(["--ckpt", runs["gpt-tiny"], "--steps", 3, "--n", 20, "--batch_size", size, "--out", out], monkeypatch, capsys)
        arrays.append(np.load(out)["arr_0"].astype(int))
    assert np.abs(arrays[0] - arrays[1]).max() <= 1                                 # a value at a rounding edge may tip


@pytest.mark.parametrize("name", ["gpt-tiny", "mar-tiny"])
@pytest.mark.parametrize("flags", [["--refine", "default"], ["--refine", "sinkhorn", "--pooled", "--batch_size", 20], ["--refine", "gaussian", "--rank", 8],
                                   ["--refine", "default", "--coupled"], ["--refine", "sinkhorn", "--lam", 0.1], ["--refine", "mean", "--K", 0]],
                         ids=lambda f: " ".join(map(str, f)))
@pytest.mark.filterwarnings("ignore:Sinkhorn stopped", "ignore:self-transport stopped")
def test_refinement_from_the_command_line(name, flags, runs, tmp_path, monkeypatch, capsys):
    """Refined images differ from plain ones; K = 0 gives them bitwise."""
    common, images = ["--ckpt", runs[name], "--steps", 2, "--n", 100, "--m", 16, "--n_cal", 10], []
    common += ["--orders", 1, "--num_iter", 5] if name == "mar-tiny" else []
    for more in ([], flags):
        out = tmp_path / f"{len(more)}.npz"
        code, _, err = draw([*common, *more, "--out", out], monkeypatch, capsys)
        assert code == 0, err
        images.append(np.load(out)["arr_0"])
    assert (images[0] == images[1]).all() == ("--K" in flags)


def test_classes_are_chosen_by_name_or_number(runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "s.npz"
    draw(["--ckpt", runs["mar-tiny"], "--steps", 2, "--classes", 3, 7, "--n", 6, "--num_iter", 4, "--out", out], monkeypatch, capsys)
    assert sorted(np.load(out)["arr_1"].tolist()) == [3, 3, 3, 7, 7, 7]


def test_inpainting_from_files(runs, tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 255, (16, 16), dtype=np.uint8), np.zeros((16, 16), dtype=np.uint8)
    mask[8:] = 255
    Image.fromarray(image).save(tmp_path / "x.png")
    Image.fromarray(mask).save(tmp_path / "m.png")
    args = ["--inpaint", tmp_path / "x.png", "--mask", tmp_path / "m.png", "--n", 3, "--classes", 1, "--steps", 2, "--out", tmp_path / "o.npz"]
    code, _, err = draw(["--ckpt", runs["mar-tiny"], *args], monkeypatch, capsys)
    assert code == 0, err
    out = np.load(tmp_path / "o.npz")["arr_0"][..., 0]
    assert (out[:, :8] == image[:8]).all() and (out[:, 8:] != image[8:]).any()


# ================================================================ README

def test_the_choices_of_the_readme_are_those_of_the_code():
    marked = {name for f in ROOT.glob("*.py") if not f.name.startswith("test_") for name in re.findall(r"CHOICE\((\w+)\): ", f.read_text())}
    table = (ROOT / "README.md").read_text().split("## Choices")[1].split("## ")[0]
    assert marked == set(re.findall(r"^\| (\w+) \|", table, re.M)) - {"choice"}


def test_every_flag_in_a_command_of_the_readme_exists():
    lines = re.findall(r"python (train|sample)\.py ([^\n`#]*)", (ROOT / "README.md").read_text())
    assert len(lines) > 8
    for program, flags in lines:
        source = (ROOT / f"{program}.py").read_text()
        for flag in re.findall(r"--[\w-]+", flags):
            assert f'"{flag}"' in source or flag == "--help", f"{program}.py {flag}"


# ================================================================ bad input

def bad_train(tmp):
    one = make_folder(tmp / "one", 1, ("cat",))
    (tmp / "empty").mkdir()
    (tmp / "hollow" / "cat").mkdir(parents=True)
    (tmp / "file").write_text("x")
    return {
        "wrong type": (["--steps", "many"], "'many' is not a whole number"),
        "out of range": (["--dropout", "2"], "out of range"),
        "negative": (["--lr", "-1"], "out of range"),
        "mistyped flag": (["--global_bath", "8"], "did you mean --global_batch"),
        "unknown data set": (["--dataset", "cifar"], "invalid choice"),
        "unknown model": (["--model", "gpt-tny"], "did you mean gpt-tiny"),
        "imagenet needs more": (["--dataset", "imagenet256"], "--vae"),
        "no data_dir": (["--dataset", "folder"], "needs --data_dir"),
        "missing folder": (["--dataset", "folder", "--data_dir", tmp / "nowhere"], "is not a folder"),
        "empty folder": (["--dataset", "folder", "--data_dir", tmp / "empty"], "no images"),
        "hollow class": (["--dataset", "folder", "--data_dir", tmp / "hollow"], "no images"),
        "one image": (["--dataset", "folder", "--data_dir", one], "at least 2"),
        "digits at 20": (["--size", "20"], "16 or 32"),
        "patch does not divide": (["--dataset", "shapes", "--size", "18"], "multiple of --patch"),
        "batch does not divide": (["--global_batch", "10", "--accumulate", "4"], "multiple of"),
        "compile on a CPU": (["--compile", "--device", "cpu"], "for CUDA"),
        "unknown device": (["--device", "abacus"], "cannot be used"),
        "out_dir is a file": (["--out_dir", tmp / "file"], "cannot be written"),
        "out_dir under a file": (["--out_dir", tmp / "file" / "x"], "cannot be written"),
        "read-only out_dir": (["--out_dir", "/proc/nowhere"], "cannot be written"),
    }


def test_bad_input_to_train_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    for name, (argv, words) in bad_train(tmp_path).items():
        argv = argv if "--out_dir" in argv else [*argv, "--out_dir", tmp_path / "o"]
        code, _, err = cli(train, [*argv, "--steps", 0] if "--steps" not in argv else argv, monkeypatch, capsys)
        assert code == 2 and words in err and len(err.strip().splitlines()) == 1, f"{name}: {code} {err!r}"


def test_a_full_disk_is_an_error_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.shutil, "disk_usage", lambda p: type("U", (), {"free": 1000})())
    code, _, err = cli(train, ["--out_dir", tmp_path / "o", "--steps", 0], monkeypatch, capsys)
    assert code == 2 and "GiB free" in err


def test_resuming_with_other_flags_or_data_names_the_difference(runs, monkeypatch, capsys):
    for more, words in ((["--lr", 1], "--lr 0.002 -> 1"), (["--model", "mar-tiny"], "--model gpt-tiny -> mar-tiny"), (["--dataset", "shapes"], "another run")):
        code, _, err = fit(runs["gpt-tiny"], "--steps", 2, *more, monkeypatch=monkeypatch, capsys=capsys, ok=False)
        assert code == 2 and words in err, err


def bad_sample(tmp, runs):
    whole = (runs["gpt-tiny"] / "ckpt.pt").read_bytes()
    (tmp / "cut.pt").write_bytes(whole[:len(whole) // 2])
    (tmp / "text.pt").write_text("not a checkpoint")
    torch.save({"model": {}}, tmp / "foreign.pt")
    state = models.read_checkpoint(runs["gpt-tiny"])
    state["config"]["num_classes"] = 7
    torch.save(state, tmp / "classes.pt")
    black = tmp / "black.png"
    Image.new("L", (16, 16)).save(black)
    gpt, mar = ["--ckpt", runs["gpt-tiny"]], ["--ckpt", runs["mar-tiny"]]
    return {
        "missing": (["--ckpt", tmp / "none.pt"], "no checkpoint"),
        "truncated": (["--ckpt", tmp / "cut.pt"], "truncated"),
        "text": (["--ckpt", tmp / "text.pt"], "not a readable checkpoint"),
        "foreign": (["--ckpt", tmp / "foreign.pt"], "lacks"),
        "class count": (["--ckpt", tmp / "classes.pt"], "does not fit"),
        "unknown class": ([*gpt, "--classes", "zebra"], "knows 0, 1"),
        "class out of range": ([*gpt, "--classes", "10"], "knows 0, 1"),
        "steps": ([*gpt, "--steps", "0"], "out of range"),
        "too many steps": ([*gpt, "--steps", "1001"], "out of range"),
        "solver": ([*gpt, "--solver", "euler"], "invalid choice"),
        "mistyped": ([*gpt, "--cfg_scal", "2"], "did you mean --cfg_scale"),
        "n": ([*gpt, "--n", "0"], "out of range"),
        "suffix": ([*gpt, "--out", tmp / "x.jpg"], ".png or .npz"),
        "folder": ([*gpt, "--out", tmp / "no" / "x.png"], "no folder"),
        "exists": ([*gpt, "--out", black], "--overwrite"),
        "null branch without guidance": ([*gpt, "--refine", "mean", "--cfg_scale", "1", "--move_null"], "needs guidance and refinement"),
        "null branch without refinement": ([*gpt, "--move_null"], "needs guidance and refinement"),
        "num_iter for AR": ([*gpt, "--num_iter", "4"], "only mar"),
        "num_iter too large": ([*mar, "--num_iter", "17"], "at most one step per token"),
        "inpaint with AR": ([*gpt, "--inpaint", black, "--mask", black], "needs a mar model"),
        "no mask": ([*mar, "--inpaint", black], "needs --mask"),
        "empty mask": ([*mar, "--inpaint", black, "--mask", black], "nothing to fill"),
        "missing image": ([*mar, "--inpaint", tmp / "q.png", "--mask", black], "No such file"),
        "broken image": ([*mar, "--inpaint", tmp / "text.pt", "--mask", black], "cannot identify"),
        "device": ([*gpt, "--device", "abacus"], "cannot be used"),
    }


def test_bad_input_to_sample_is_one_line_and_exit_code_2(runs, tmp_path, monkeypatch, capsys):
    for name, (argv, words) in bad_sample(tmp_path, runs).items():
        argv = argv if "--out" in argv else [*argv, "--out", tmp_path / "new.png"]
        code, _, err = cli(sample, argv, monkeypatch, capsys)
        assert code == 2 and words in err and len(err.strip().splitlines()) == 1, f"{name}: {code} {err!r}"
        assert not (tmp_path / "new.png").exists()

# ================================================================ ot_refine: condition refinement

MAPS = [m for m in R.METHODS if m not in ("none", "gaussian+sinkhorn")]


def clouds(G=2, n=30, m=24, C=5, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(G, n, C, generator=g, dtype=torch.float64) * torch.linspace(.5, 1.5, C, dtype=torch.float64) + 1
    return x.to(dtype), (1.2 * torch.randn(G, m, C, generator=g, dtype=torch.float64)).to(dtype)


def weighted(G, n, seed):
    w = torch.rand(G, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + .2
    return w / w.sum(-1, keepdim=True)


def cfg(**kw):
    return RefineConfig(**({"method": "sinkhorn", "K": 3, "eta": .5, "reg": .1, "rank": 0, "n_iter": 2000, "tol": 1e-9} | kw))


def ot_map(x, y):
    """The exact map between two uniform clouds of equal size, by the network simplex."""
    plan = ot.emd(ot.unif(len(x)), ot.unif(len(y)), ot.dist(x.numpy(), y.numpy()))
    return torch.from_numpy(plan * len(x)) @ y


def exact_w2(x, y):
    return ot.emd2(ot.unif(len(x)), ot.unif(len(y)), ot.dist(x.numpy(), y.numpy())) ** .5


# ------------------------------------------------------------------ the solver

def test_plan_agrees_with_pot_and_has_the_right_marginals():
    x, y = clouds()
    a, b = weighted(2, 30, 1), weighted(2, 24, 2)
    cost, reg = R.sq_cost(x, y), torch.tensor([.5, 2.], dtype=torch.float64)
    f, g, err = R.sinkhorn(cost, reg, a, b, n_iter=3000, tol=1e-12)
    P = R.plan(cost, f, g, reg, a, b)
    # both stop at a marginal error of 1e-12; a plan's entries inherit it times a condition number of order 10
    assert (P.sum(2) - a).abs().max() < 1e-12 and (P.sum(1) - b).abs().max() < 1e-11, err
    for i in range(2):
        want = ot.solve(cost[i], a[i], b[i], reg=reg[i].item(), reg_type="KL", max_iter=5000, tol=1e-13)
        assert (P[i] - want.plan).abs().max() < 1e-10, (P[i] - want.plan).abs().max()


def test_divergence_agrees_with_pot_to_2e9():
    x, y = clouds()
    a, b = weighted(2, 30, 1), weighted(2, 24, 2)
    ours = R.sinkhorn_divergence(x, y, 4.0, a, b, n_iter=5000, tol=1e-12)
    for i in range(2):
        want = ot.solve_sample(x[i], y[i], a[i], b[i], reg=4.0, debias=True, max_iter=20000, tol=1e-11).value
        assert abs(ours[i] - want) < 2e-9, (ours[i], want)     # what POT reaches: its self-transport alternates, hence is slow


@pytest.mark.parametrize("reg,dtype,tol", [(.2, torch.float64, 1e-9), (.02, torch.float64, 1e-9), (.002, torch.float64, 1e-8),
                                           (.05, torch.float32, 2e-4), (.002, torch.float32, 5e-3)])
def test_stabilised_iterates_are_those_of_the_log_domain(reg, dtype, tol):
    # An outlier in each cloud makes whole rows and columns of exp(-cost / reg) vanish. Same iterates, so only rounding
    # differs: potentials of size cost carry a relative error of machine epsilon, divided by reg: tol is that times 10.
    x, y = clouds(dtype=dtype)
    x[:, 0] += 20
    y[:, 0] -= 15
    cost = R.sq_cost(x, y)
    reg = reg * cost.mean((1, 2))
    for n_iter in (1, 10, 37):
        f, g, _ = R.sinkhorn(cost, reg, n_iter=n_iter)
        f2, g2 = R.sinkhorn_log(cost, reg, n_iter=n_iter)
        gap = max(((f - f2).abs().amax(1) / reg).max(), ((g - g2).abs().amax(1) / reg).max())
        assert gap < tol, (n_iter, gap)


def test_fixed_iterations_give_the_result_of_the_tolerance():
    x, y = clouds()
    cost, reg = R.sq_cost(x, y), torch.ones(2, dtype=torch.float64)
    f, g, err = R.sinkhorn(cost, reg, n_iter=1000, tol=1e-12)
    f2, g2, _ = R.sinkhorn(cost, reg, n_iter=1000)
    assert (R.plan(cost, f, g, reg) - R.plan(cost, f2, g2, reg)).abs().max() < 1e-11     # the tolerance, over n
    f3, g3, err3 = R.sinkhorn(cost, reg, g=g, n_iter=1)                                 # warm start: already there
    assert err3.max() < 1e-11, err3


def test_solver_that_does_not_converge_warns_once_with_numbers():
    x, y = clouds()
    R._warned.clear()
    with pytest.warns(RuntimeWarning, match=r"n_iter=1 with marginal error .* > tol=1.0e-12 in 2 of 2 groups"):
        R.sinkhorn(R.sq_cost(x, y), torch.ones(2), n_iter=1, tol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        R.sinkhorn(R.sq_cost(x, y), torch.ones(2), n_iter=1, tol=1e-12)


def test_fixed_iterations_never_ask_the_device_for_a_value():
    class NoSync(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert not any(n in str(func) for n in ("local_scalar_dense", "nonzero", "unique", "is_nonzero", "equal", "masked_select")), func
            return func(*args, **(kwargs or {}))
    x, y = clouds(dtype=torch.float32)
    a, b = R._weights(None, x), R._weights(None, y)
    refiner, group, c = make_refiner(method="gaussian+sinkhorn", rank=3, K=2)
    refine = frozen(refiner, group, c)
    with NoSync():
        for method in MAPS:
            R._fit(method, x, y, a, b, cfg(tol=None, n_iter=20))
        refine(0, c)                                                                    # and frozen refinement as a whole
    with pytest.raises(AssertionError, match="local_scalar_dense"), NoSync():
        R._fit("sinkhorn", x, y, a, b, cfg())


def test_padding_is_invisible_to_the_solver_even_where_it_would_win_every_maximum():
    x, y = clouds(G=1, dtype=torch.float32)
    a, b = torch.ones(1, 30), torch.ones(1, 24)
    y = y + 30                                                                          # 1e3 to 1e4 reg away
    x[:, 20:], y[:, 14:], a[:, 20:], b[:, 14:] = y[:, :10], x[:, :10], 0, 0
    cost = R.sq_cost(x, y)
    reg = torch.tensor([.5])
    f, g, err = R.sinkhorn(cost, reg, a, b, n_iter=40)
    f2, g2, err2 = R.sinkhorn(cost[:, :20, :14], reg, n_iter=40)
    # potentials of 1e4 in fp32 carry 1e-3
    assert (f[:, :20] - f2).abs().max() < 5e-3 and (err - err2).abs() < 5e-3 and f.isfinite().all() and g.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("junk", [0.0, 40.0, 1e4])
def test_masked_groups_equal_separate_solves(dtype, junk):
    x, y = (z + 20 for z in clouds(G=2, n=30, m=24, dtype=dtype))                       # zeros, too, are far from the clouds
    a, b = torch.ones(2, 30), torch.ones(2, 24)
    a[0, 19:], b[1, 11:] = 0, 0
    x[0, 19:], y[1, 11:] = junk, -junk                                                  # junk on padding must not matter
    close = 1e-7 if dtype == torch.float64 else 2e-4                                    # summation order, and sinkhorn's 1e-9 stop; 20 in fp32
    tight = dict(tol=1e-9) if dtype == torch.float64 else dict(reg=.5, tol=None, n_iter=200)
    for method in MAPS:
        to, _ = R.fit(x, y, cfg(method=method, **tight), a, b)
        to0, _ = R.fit(x[:1, :19], y[:1], cfg(method=method, **tight))
        to1, _ = R.fit(x[1:], y[1:, :11], cfg(method=method, **tight))
        if method == "ema":                                                             # age counts padding: same order
            to1 = to[1:]
        assert (to[0, :19] - to0[0]).abs().max() < close and (to[1] - to1[0]).abs().max() < close, method
        assert to.isfinite().all(), method
    S = R.sinkhorn_divergence(x, y, 1.0, a, b, n_iter=500, tol=1e-5)
    parts = R.sinkhorn_divergence(x[:1, :19], y[:1], 1.0, n_iter=500, tol=1e-5), R.sinkhorn_divergence(x[1:], y[1:, :11], 1.0, n_iter=500, tol=1e-5)
    assert (S - torch.cat(parts)).abs().max() < 1e-3 * S.max()


# ------------------------------------------------------------------ the maps

def test_barycentric_map_is_the_gradient_of_the_divergence():
    x, y = clouds(n=12, m=10)
    a = weighted(2, 12, 3)
    x.requires_grad_()
    kw = dict(n_iter=5000, tol=1e-13)
    S = R.sinkhorn_divergence(x, y, 1.0, a, **kw)
    grad, = torch.autograd.grad(S.sum(), x)
    to, _ = R.barycentric_map(x.detach(), y, torch.ones(2, dtype=torch.float64), a, **kw)
    gap = (to - x + grad / (2 * a[..., None])).abs().max()
    assert gap < 1e-9, gap                                                              # 1e-13 stop, amplified by 1 / a
    h, (i, j) = 1e-5, (3, 2)                                                            # and of the value itself
    moved = [x.detach().clone(), x.detach().clone()]
    moved[0][0, i, j] += h
    moved[1][0, i, j] -= h
    slope = (R.sinkhorn_divergence(moved[0], y, 1.0, a, **kw) - R.sinkhorn_divergence(moved[1], y, 1.0, a, **kw))[0] / (2 * h)
    assert abs(slope - grad[0, i, j]) < 1e-7, (slope, grad[0, i, j])                    # central difference: h^2 and 1e-13 / h


@pytest.mark.parametrize("method", MAPS)
def test_maps_are_equivariant_to_permutation_translation_and_rotation(method):
    x, y = clouds(n=20)
    c, perm, shift = cfg(method=method), torch.randperm(20), torch.randn(5, dtype=torch.float64) * 10
    to = R.fit(x, y, c)[0]
    assert (R.fit(x[:, perm], y, c)[0] - to[:, perm]).abs().max() < 1e-7, "permutation"   # 1e-9 stop times conditioning
    assert (R.fit(x + shift, y + shift, c)[0] - to - shift).abs().max() < 1e-7, "translation"
    if method != "meanvar":                                                             # variances are per coordinate
        Q = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
        assert (R.fit(x @ Q, y @ Q, c)[0] - to @ Q).abs().max() < 1e-7, "rotation"


@pytest.mark.parametrize("method", ["sinkhorn", "gaussian", "mean", "meanvar"])
def test_equal_distributions_are_a_fixed_point(method):
    x, _ = clouds()
    to, _ = R.fit(x, x[:, torch.randperm(30)], cfg(method=method, tol=1e-11, n_iter=5000))
    # the 1e-11 stop in L1 over n times the conditioning; the Gaussian's ridge is 1e-3 in both covariances: cancels
    assert (to - x).abs().max() < 1e-7, (to - x).abs().max()


def test_without_debiasing_the_cloud_shrinks_and_with_it_it_does_not():
    x, _ = clouds(n=200)
    for debias in (True, False):
        to = R.fit(x, x, cfg(reg=.5, debias=debias))[0]
        ratio = (to.var(1).sum() / x.var(1).sum()).item()
        assert (abs(ratio - 1) < 1e-6) if debias else ratio < .7, (debias, ratio)


def test_gaussian_map_is_exact_between_gaussians_and_reaches_their_w2():
    g = torch.Generator().manual_seed(0)
    x, y = clouds(G=1, n=40000, m=40000, C=3)
    mix = torch.randn(3, 3, generator=g, dtype=torch.float64)
    y = y @ mix
    to, state = R.fit(x, y, cfg(method="gaussian", shrink=0))
    cov = lambda v: np.cov(v[0].T.numpy())
    # weight 1e-3 is the least shrinkage: relative gaps of that order
    assert np.abs(cov(to) - cov(y)).max() < 5e-3 * np.abs(cov(y)).max()
    want = ot.gaussian.bures_wasserstein_distance(x[0].mean(0).numpy(), y[0].mean(0).numpy(), cov(x), cov(y))
    got = (to - x).square().sum(-1).mean().sqrt().item()
    assert abs(got - want) < 5e-3 * want, (got, want)
    auto = R.fit(x, y, cfg(method="gaussian"))[0]                                       # shrinkage vanishes as 1 / n
    assert (auto - to).abs().max() < .05 * x.std(), (auto - to).abs().max()


def test_divergence_of_gaussians_tends_to_their_exact_w2():
    x, y = clouds(G=1, n=400, m=400, C=2)
    S = R.sinkhorn_divergence(x, y, .05 * R.sq_cost(x, y).mean(), n_iter=3000, tol=1e-8)[0].sqrt().item()
    W = exact_w2(x[0], y[0])
    assert abs(S - W) < .05 * W, (S, W)                                                 # entropic and sampling bias at this reg


@pytest.mark.parametrize("method", MAPS)
def test_states_apply_to_new_points_as_they_were_fitted(method):
    x, y = clouds()
    c = cfg(method=method)
    to, state = R.fit(x, y, c)
    group = torch.tensor([1, 0, 1, 1])
    points = torch.stack([x[1, 3], x[0, 4], x[1, 5], x[1, 29]])
    got = R.apply(points, state, group, c)
    want = torch.stack([to[1, 3], to[0, 4], to[1, 5], to[1, 29]])
    # sinkhorn adds the point to its own cloud a second time, which changes its self-transport by about 1 / n
    tol = .25 if method == "sinkhorn" else 1e-9
    assert (got - want).abs().max() < tol, (method, (got - want).abs().max())
    alone = torch.cat([R.apply(points[j:j + 1], state, group[j:j + 1], c) for j in range(4)])
    assert (got - alone).abs().max() < 1e-12, "a point must not depend on its neighbours"


def test_frozen_map_is_the_documented_formula():
    x, y = clouds(G=1)
    _, s = R.fit(x, y, cfg())
    c = torch.randn(5, dtype=torch.float64) + 1
    reg, n = s["reg"][0], x.shape[1]
    t_ct = torch.softmax((s["g"][0] - (c - y[0]).square().sum(-1)) / reg, 0) @ y[0]
    e = torch.exp((s["h"][0] - (c - x[0]).square().sum(-1)) / reg)
    u = (torch.sqrt(e.sum() ** 2 + 4 * (n + 1)) - e.sum()) / 2
    assert abs(u * (e.sum() + u) - (n + 1)) < 1e-9
    want = c + t_ct - (e @ x[0] + u * c) / (e.sum() + u)
    got = R.apply(c[None], s, torch.tensor([0]), cfg())[0]
    assert (got - want).abs().max() < 1e-12, (got, want)                                # same formula, float64 rounding
    far = R.apply(c[None] + 1e4, s, torch.tensor([0]), cfg())[0]
    assert (far - t_ct).isfinite().all() and ((far - y[0].mean(0)).norm() < 10), "T_cc(c) = c far away: c goes to the targets"


def test_knn_and_ema_are_what_they_say():
    x, y = clouds(G=1)
    near = (x[0, 0] - y[0]).square().sum(-1).argsort()[:3]
    assert (R.fit(x, y, cfg(method="knn", neighbors=3))[0][0, 0] - y[0, near].mean(0)).abs().max() < 1e-12
    run = y[0, 0]
    for v in y[0, 1:]:
        run = .5 * run + .5 * v
    # the running mean gives the first element the weight left over, the closed form normalises: 2^-24 apart
    assert (R.fit(x, y, cfg(method="ema", ema_decay=.5))[0][0, 7] - run).abs().max() < 1e-6


# ------------------------------------------------------------------ the flow

def test_w2_shrinks_by_exactly_rho_under_the_exact_map():
    x, y = clouds(G=1, n=40, m=40)
    x, y = x[0], y[0]
    for eta, implicit, rho in ((.5, True, 1 / 2), (2., True, 1 / 5), (.2, False, .6), (.8, False, .6)):
        moved = R.jko_step(x, ot_map(x, y), eta, implicit=implicit)
        got = exact_w2(moved, y) / exact_w2(x, y)
        if implicit or eta < .5:                # displacement interpolation: geodesic, exact up to rounding
            assert abs(got - rho) < 1e-10, (eta, implicit, got)
        else:                                   # past the target: the straight plan is no longer optimal, only a bound
            assert got <= rho + 1e-10, (eta, got)


def test_implicit_step_is_the_minimiser_and_explicit_is_the_gradient():
    x, y = clouds(G=1, m=30)
    x, to, a, eta, lam = x[0], y[0], y[0].flip(0), .7, .3
    objective = lambda z: ((z - to).square().sum() + lam * (z - a).square().sum() + (z - x).square().sum() / (2 * eta))
    z = R.jko_step(x, to, eta, lam, a).requires_grad_()
    assert torch.autograd.grad(objective(z), z)[0].abs().max() < 1e-12
    z = x.clone().requires_grad_()
    grad, = torch.autograd.grad((z - to).square().sum() + lam * (z - a).square().sum(), z)
    assert (R.jko_step(x, to, eta, lam, a, implicit=False) - (x - eta * grad)).abs().max() < 1e-12
    assert R.jko_step(x, to, 0, lam, a) is x


@pytest.mark.parametrize("lam", [0., .3])
def test_divergence_and_energy_decrease_at_every_step(lam):
    x, y = clouds(G=2, n=40, m=30)
    refiner = Refiner([y[:, None]], cfg(K=6, lam=lam))
    refiner.trace = []
    group = torch.arange(2).repeat_interleave(40)
    a = .5 * x.flatten(0, 1)[:, None]
    refiner.bind(group, coupled=True)(0, x.flatten(0, 1)[:, None], (lambda c: a) if lam else None)
    F = torch.stack([t["energy"] for t in refiner.trace])
    S = torch.stack([t["divergence"] for t in refiner.trace])
    assert F.shape == (6, 2) and (F[1:] < F[:-1]).all(), F
    assert lam or (S[1:] < S[:-1]).all(), S


# ------------------------------------------------------------------ Refiner

def make_refiner(P=1, G=3, n=20, m=16, C=6, steps=2, dtype=torch.float32, **kw):
    g = torch.Generator().manual_seed(0)
    targets = [torch.randn(G, P, m, C, generator=g).to(dtype) + 3 * torch.arange(G)[:, None, None, None] for _ in range(steps)]
    group = torch.arange(G).repeat(n)
    c = (1.3 * torch.randn(G * n, P, C, generator=g) + 3 * group[:, None, None] + .5).to(dtype)
    return Refiner(targets, cfg(**({"tol": 1e-4, "n_iter": 500} | kw))), group, c


def frozen(refiner, group, c):
    refine = refiner.calibrate(group)
    for i in range(refiner.n_steps):
        refine(i, c)
    return refiner.bind(group)


@pytest.mark.parametrize("off", [dict(method="none"), dict(K=0), dict(eta=0.), dict(eta=(0., 0., 0.)), dict(strength=0.),
                                 dict(window=(0., 0.)), dict(method="gaussian+sinkhorn", K=0)])
@pytest.mark.parametrize("coupled", [True, False])
def test_nothing_to_do_returns_the_conditions_bitwise(off, coupled):
    refiner, group, c = make_refiner(**off)
    assert refiner.bind(group, coupled=coupled)(0, c) is c


@pytest.mark.parametrize("method", R.METHODS)
@pytest.mark.parametrize("pooled,rank,P", [(False, 0, 1), (True, 0, 1), (False, 3, 2), (True, 3, 2), (False, None, 1)])
def test_every_method_runs_coupled_and_frozen_and_keeps_shape(method, pooled, rank, P):
    refiner, group, c = make_refiner(P=P, method=method, pooled=pooled, rank=rank, K=2)
    out = refiner.bind(group, coupled=True)(1, c)
    assert out.shape == c.shape and out.dtype == c.dtype and out.isfinite().all()
    refine = frozen(refiner, group, c)
    all_at_once, one = refine(1, c), refiner.bind(group[7:8])(1, c[7:8])
    # fp32 sums in another order; a plan's exponents (up to 1 / reg = 10) amplify 1e-7
    assert (all_at_once[7:8] - one).abs().max() < 1e-4, "image 7 depends on its neighbours"
    if method not in ("none", "knn", "ema"):
        before, after = (c - 3 * group[:, None, None]).mean().abs(), (out - 3 * group[:, None, None]).mean().abs()
        assert after < before, (before, after)


def test_coupled_groups_and_slots_are_separate_problems():
    refiner, group, c = make_refiner(P=2, dtype=torch.float64, tol=1e-10, n_iter=3000)
    perm = torch.randperm(len(group), generator=torch.Generator().manual_seed(1))
    group, c = group[perm], c[perm]
    keep = torch.ones(len(group), dtype=torch.bool)
    keep[(group == 1).nonzero()[:7, 0]] = False                                         # unequal group sizes
    group, c = group[keep], c[keep]
    out = refiner.bind(group, coupled=True)(0, c)
    target = refiner.targets[0] + refiner.origin[0]
    for y in range(3):
        for p in range(2):
            z = c[group == y, p][None]
            for k in range(3):
                z = R.jko_step(z, R.fit(z, target[y:y + 1, p], refiner.cfg)[0], .5)
            assert (out[group == y, p] - z[0]).abs().max() < 1e-6, (y, p)               # 1e-10 stops at other iterations


def test_frozen_mode_is_close_to_coupled_in_sample():
    refiner, group, c = make_refiner(n=150, m=100)
    coupled = refiner.bind(group, coupled=True)(0, c)
    gap = (frozen(refiner, group, c)(0, c) - coupled).square().mean().sqrt() / (coupled - c).square().mean().sqrt()
    assert gap < .25, gap                                                               # own weight twice: O(1 / n_effective)


def test_calibration_in_chunks_equals_calibration_at_once():
    refiner, group, c = make_refiner()
    whole = frozen(refiner, group, c)(1, c)
    parts, _, _ = make_refiner()
    for ids in ([0], [1, 2]):
        rows = sum(group == y for y in ids).bool()
        refine = parts.calibrate(group[rows][:-1] if ids == [0] else group[rows])
        for i in range(2):
            refine(i, c[rows][:-1] if ids == [0] else c[rows])
    got = parts.bind(group)(1, c)
    assert (got - whole)[group > 0].abs().max() < 1e-3, "stops at other iterations (tol=1e-4), otherwise the same"
    assert got.isfinite().all()


def test_state_survives_saving_and_half_storage(tmp_path):
    for store in ("float32", "float16"):
        refiner, group, c = make_refiner(method="gaussian+sinkhorn", rank=4, store=store)
        refine = frozen(refiner, group, c)
        torch.save(refiner.state_dict(), tmp_path / "r.pt")
        again = Refiner.load(torch.load(tmp_path / "r.pt", weights_only=True))
        assert torch.equal(again.bind(group)(1, c), refine(1, c)) and again.cfg == refiner.cfg
        assert again.nbytes() == refiner.nbytes() > 0
        out = refine(1, c)
        reference = out if store == "float32" else reference
        # 11 bits of clouds of size up to 9: points move by up to .004; their influence on a plan is of that order
        assert (out - reference).abs().max() < .05, (out - reference).abs().max()


def test_a_cloud_that_reaches_its_one_target_within_a_step_stays_finite():
    refiner = Refiner([None, torch.zeros(1, 1, 20, 4)], RefineConfig(method="sinkhorn", K=3, eta=100., rank=0))
    c = torch.randn(30, 1, 4, generator=torch.Generator().manual_seed(0))
    for refine in (refiner.bind(torch.zeros(30, dtype=torch.long), coupled=True), frozen(refiner, torch.zeros(30, dtype=torch.long), c)):
        assert refine(1, c).abs().max() < .01 * c.abs().max()                           # reg falls a thousandfold from k to k + 1


def test_low_rank_leaves_the_complement_untouched():
    refiner, group, c = make_refiner(rank=2)
    out = refiner.bind(group, coupled=True)(0, c)
    axes = refiner.basis[0]
    moved = (out - c)[:, 0]
    assert (moved - moved @ axes @ axes.T).abs().max() < 1e-5 and moved.abs().max() > .1    # fp32, values up to 10
    assert (axes.T @ axes - torch.eye(2)).abs().max() < 1e-5
    assert [RefineConfig(rank=r).rank_of(d) for r, d in ((None, 64), (None, 6), (0, 64), (5, 64), (80, 64))] == [16, 2, 64, 5, 64]


def test_pooled_targets_follow_the_class_shares_of_the_batch():
    refiner, group, c = make_refiner(pooled=True, reg=.02, K=8, eta=4.)
    only = group == 2                                                                   # a batch of one class
    out = refiner.bind(group[only], coupled=True)(0, c[only])
    assert (out.mean() - 6).abs() < .3, out.mean()                                      # not pulled to classes 0 and 1


def test_inverse_term_is_called_in_every_step_and_pulls():
    refiner, group, c = make_refiner(lam=1e6, K=3, rank=0)
    calls = []
    def inverse(now):
        calls.append(now.clone())
        return torch.zeros_like(now) + 5
    out = refiner.bind(group, coupled=True)(0, c, inverse)
    assert len(calls) == 3 and torch.equal(calls[0], c) and not torch.equal(calls[1], c)
    assert (out - 5).abs().max() < 1e-2, "lam dominates: c goes to a"
    with pytest.raises(ValueError, match="lam=.*needs inverse"):
        refiner.bind(group, coupled=True)(0, c)


def test_strength_is_a_dial_from_the_gaussian_map_to_the_whole_transport():
    outs = {}
    for s in (0., 1., 100.):
        refiner, group, c = make_refiner(method="gaussian+sinkhorn", K=2, strength=s)
        outs[s] = refiner.bind(group, coupled=True)(0, c)
    refiner, group, c = make_refiner()
    spread = R.sinkhorn_divergence(*(t.view(20, 3, 6).transpose(0, 1) for t in (outs[0.], outs[100.])), 1.0).mean()
    assert spread > .01 and not torch.equal(outs[0.], c)
    y = refiner.targets[0][:, 0]
    S = [R.energy(outs[s].view(20, 3, 6).transpose(0, 1), y, .1, tol=1e-3).mean().item() for s in (0., 1., 100.)]
    assert S[0] > S[1] > S[2], S


def test_few_particles_are_left_alone_when_coupled_and_refined_when_frozen():
    refiner, group, c = make_refiner()
    refine = frozen(refiner, group, c)
    R._warned.clear()
    with pytest.warns(RuntimeWarning, match="min_particles=8"):
        one = refiner.bind(group[:1], coupled=True)
    assert torch.equal(one(0, c[:1]), c[:1])
    assert not torch.equal(refiner.bind(group[:1])(0, c[:1]), c[:1])
    with pytest.raises(ValueError, match="calibration has a group of 1 conditions"):
        refiner.calibrate(group[:1])


@pytest.mark.parametrize("method", MAPS)
@pytest.mark.parametrize("n,m", [(1, 16), (16, 1), (1, 1)])
def test_one_condition_or_one_target_is_well_defined(method, n, m):
    x, y = clouds(n=n, m=m, dtype=torch.float32)
    to, state = R.fit(x, y, cfg(method=method, tol=1e-4))
    assert to.isfinite().all() and R.apply(x[:, 0], state, torch.arange(2), cfg(method=method)).isfinite().all()
    if method in ("gaussian", "mean", "meanvar"):                                       # a pure mean shift, no collapse
        shift = y.mean(1, keepdim=True) - x.mean(1, keepdim=True)
        assert (to - x - shift).abs().max() < 5e-3, (to - x - shift).abs().max()        # the ridge of 1e-3
    if method == "sinkhorn" and n == 1:
        assert (to[:, 0] - y.mean(1)).abs().max() < 1e-4


@pytest.mark.parametrize("method", MAPS)
def test_identical_points_and_huge_or_tiny_scales_stay_finite(method):
    x, y = clouds(dtype=torch.float32)
    same = x[:, :1].expand_as(x)
    c = cfg(method=method, tol=1e-2)
    for p, q in ((same, same), (same, y), (x, same[:, :7]), (torch.cat([x, x], 1), y), (x * 0, y * 0)):
        assert R.fit(p, q, c)[0].isfinite().all()
    for scale in (1e8, 1e-8):
        to = R.fit(x * scale, y * scale, c)[0] / scale
        # reg is relative, so that only fp32 rounding and the stop at 1e-2 differ
        assert (to - R.fit(x, y, c)[0]).abs().max() < .02, (method, scale)


def test_bf16_comes_back_as_bf16_and_is_computed_in_fp32():
    refiner, group, c = make_refiner()
    out = refiner.bind(group, coupled=True)(0, c.bfloat16())
    assert out.dtype == torch.bfloat16
    want = refiner.bind(group, coupled=True)(0, c.bfloat16().float())
    assert torch.equal(out, want.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(refiner.bind(group, coupled=True)(0, c.bfloat16()), out), "autocast must not reach the solver"


def test_bad_inputs_are_explained():
    refiner, group, c = make_refiner()
    y = torch.randn(3, 1, 16, 6)
    bad = c.clone()
    bad[3, 0, 2] = float("nan")
    with pytest.raises(ValueError, match="1 of 360 values of the conditions of step 0 are not finite"):
        refiner.bind(group, coupled=True)(0, bad)
    with pytest.raises(ValueError, match="1 of 120 values|1 of 360 values"):
        refiner.calibrate(group)(0, bad)
    with pytest.raises(ValueError, match="targets of step 0 are not finite"):
        Refiner([y * float("nan")], cfg())
    with pytest.raises(ValueError, match=r"groups \[1\] have no targets of step 0"):
        Refiner([y], cfg(), weights=torch.tensor([1., 0., 1.])[:, None].expand(3, 16))
    with pytest.raises(ValueError, match=r"in \[0, 3\)"):
        refiner.bind(group + 1, coupled=True)
    with pytest.raises(ValueError, match="not calibrated"):
        refiner.bind(group)
    with pytest.raises(ValueError, match="expected .B, 1, 6."):
        refiner.bind(group, coupled=True)(0, c[..., :5])
    with pytest.raises(ValueError, match="must agree in groups and dimension"):
        R.fit(*clouds(C=5)[:1], clouds(C=4)[1], cfg())


@pytest.mark.parametrize("bad", [dict(method="sinkhron"), dict(K=-1), dict(eta=-1.), dict(eta=(.1, .2)), dict(reg=0.), dict(lam=-1.),
                                 dict(rank=-1), dict(window=(.5, .2)), dict(n_iter=0), dict(tol=0.), dict(strength=-1.),
                                 dict(implicit=False, eta=1.), dict(shrink=-1.), dict(ema_decay=1.), dict(neighbors=0), dict(store="fp8")])
def test_config_refuses_what_makes_no_sense_and_says_what_came(bad):
    with pytest.raises(ValueError, match="RefineConfig: .*, expected"):
        cfg(**bad)


def test_inverse_map_learns_the_conditional_mean_and_stops_the_gradient():
    torch.manual_seed(0)
    net = R.InverseMap(4, 6, 3, width=32)
    mix, opt = torch.randn(3, 4, 6), torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(300):
        x, i = torch.randn(64, 3, 4), torch.arange(3)
        c = torch.einsum("bpd,pdc->bpc", x, mix).requires_grad_()
        loss = net.loss(x, i, c)
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert c.grad is None and loss < .3 * c.var(), (loss, c.var())                      # linear maps by a small MLP, 300 steps


def test_the_buffer_keeps_the_latest_conditions_of_each_class_and_position():
    buffer, g = R.ConditionBuffer(3, 2, 4, 5), gen()
    seen = {(k, i): [] for k in range(3) for i in range(2)}
    for _ in range(6):
        c, y = torch.randn(9, 2, 5, generator=g).half().float(), torch.randint(0, 4, (9,), generator=g)    # 3: the null class
        pos = torch.stack([torch.randperm(2, generator=g) for _ in range(9)])
        buffer.push(c, pos, y)
        for b in range(9):
            for j in range(2):
                if y[b] < 3:
                    seen[int(y[b]), int(pos[b, j])].append(c[b, j])
    for (k, i), rows in seen.items():
        assert buffer.count[k, i] == len(rows)
        got = {tuple(r) for r in buffer.targets()[k, i].tolist()}
        assert got == {tuple(r.tolist()) for r in rows[-4:]}, "float16 holds the inputs exactly"


def test_a_buffer_that_is_not_full_says_so():
    with pytest.raises(ValueError, match="holds 0 of 4"):
        R.ConditionBuffer(3, 2, 4, 5).targets()


# ================================================================ vae: KL-16

VAE_GOLDEN = sorted(glob.glob(os.path.join(GOLDEN, "vae_golden_*.npz")))
TINY_VAE = {"ch": 32, "ch_mult": (1, 2), "z_channels": 4}         # stride 2, with both kinds of residual shortcut


def tiny_vae(**kwargs):
    torch.manual_seed(0)
    return KL16(**{**TINY_VAE, **kwargs})


def tiny_images(n=3, size=8, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def save_checkpoint(path, state):
    torch.save({"model": state}, path)
    return str(path)


# ---- golden tensors ----

def golden_vae(path):
    z = np.load(path)
    weights = {k[2:]: torch.from_numpy(z[k]).double() for k in z.files if k.startswith("w/")}
    model = KL16(**ast.literal_eval(str(z["config"]))).double()
    model.load_state_dict(weights)                            # strict: names and shapes are those of the file
    return model, weights, {k: torch.from_numpy(z[k]) for k in ("image", "moments", "z", "decoded")}


@pytest.mark.parametrize("path", VAE_GOLDEN, ids=os.path.basename)
def test_golden_vae_moments(path):
    model, _, g = golden_vae(path)
    error = (model.moments(g["image"]) - g["moments"]).abs().max().item()
    assert error < 1e-5, f"moments differ from {path} by {error:.2e}"


@pytest.mark.parametrize("path", VAE_GOLDEN, ids=os.path.basename)
def test_golden_vae_decode_takes_the_golden_z_times_the_scale(path):
    model, _, g = golden_vae(path)                            # the golden z is unscaled: decoded = D(z)
    error = (model.decode(g["z"].double() * model.scale) - g["decoded"]).abs().max().item()
    assert error < 1e-5, f"decoded images differ from {path} by {error:.2e}"


@pytest.mark.parametrize("path", VAE_GOLDEN, ids=os.path.basename)
def test_golden_vae_names_and_size_are_inferred_from_a_checkpoint(path, tmp_path):
    model, weights, g = golden_vae(path)
    assert sorted(model.state_dict()) == sorted(weights), "tensor names"
    loaded = load_kl16(save_checkpoint(tmp_path / "kl16.ckpt", weights))
    assert loaded.scale == KL16_SCALE and next(loaded.parameters()).dtype == torch.float32
    error = (loaded.moments(g["image"]) - g["moments"]).abs().max().item()
    assert error < 5e-5, f"a float32 model loaded from a checkpoint differs from {path} by {error:.2e}"


# ---- the released size ----

def test_kl16_has_the_released_tensors_and_parameters():
    with torch.device("meta"):
        model = KL16()
    state = model.state_dict()
    assert len(state) == 312, f"{len(state)} tensors, kl16.ckpt has 312"
    count = sum(v.numel() for v in state.values())
    assert count == 66_456_019, f"{count:,} parameters, kl16.ckpt has 66,456,019"
    attention = sorted({n.rsplit(".", 2)[0] for n in state if n.endswith(".q.weight")})
    assert attention == ["decoder.mid.attn_1", "encoder.down.4.attn.0", "encoder.down.4.attn.1", "encoder.mid.attn_1"]
    shortcut = sorted({n.rsplit(".", 2)[0] for n in state if ".nin_shortcut." in n})
    assert shortcut == ["decoder.up.1.block.0", "decoder.up.3.block.0", "encoder.down.2.block.0", "encoder.down.4.block.0"]
    assert (model.channels, model.stride, model.scale) == (16, 16, 0.2325)


def test_the_scale_has_one_home():
    for path in glob.glob(os.path.join(ROOT, "*.py")):
        name = os.path.basename(path)
        if name != "vae.py" and not name.startswith("test"):
            assert "0.2325" not in open(path, encoding="utf-8").read(), f"{name} repeats 0.2325: import vae.KL16_SCALE"


# ---- interface ----

@pytest.mark.parametrize("tok, channels, stride", [
    (tiny_vae(), 4, 2), (Identity(2), 12, 2), (Identity(4, in_channels=1), 16, 4)], ids=["kl16", "identity", "grey"])
def test_both_tokenisers_share_one_interface(tok, channels, stride):
    images = tiny_images()[:, :tok.in_channels]
    moments = tok.moments(images)
    draw = lambda: torch.Generator().manual_seed(5)
    x = tok.encode(images, draw())
    assert (tok.channels, tok.stride) == (channels, stride)
    assert moments.shape == (3, 2 * channels, 8 // stride, 8 // stride)
    assert x.shape == (3, channels, 8 // stride, 8 // stride) and x.dtype == torch.float32
    assert torch.equal(x, tok.sample_moments(moments, draw())), "encode is moments, then sample_moments"
    assert tok.decode(x).shape == images.shape
    assert isinstance(tok.fingerprint(), str) and tok.encode(images).shape == x.shape


@pytest.mark.parametrize("make", [tiny_vae, lambda **kw: Identity(2, **kw)], ids=["kl16", "identity"])
def test_scale_multiplies_the_latents_and_cancels_in_decode(make):
    images, one, two = tiny_images(), make(scale=1.0), make(scale=0.5)
    x = one.encode(images, torch.Generator().manual_seed(1))
    assert torch.allclose(two.encode(images, torch.Generator().manual_seed(1)), 0.5 * x)
    assert torch.allclose(two.decode(0.5 * x), one.decode(x), atol=1e-6)
    with pytest.raises(ValueError, match="scale"):
        make(scale=0.0)


def test_posterior_samples_have_the_moments():
    tok = tiny_vae()
    mean, logvar = torch.full((1, 4, 100, 100), 3.0), torch.full((1, 4, 100, 100), -1.0)
    z = tok.sample_moments(torch.cat([mean, logvar], 1), torch.Generator().manual_seed(0)) / tok.scale
    assert abs(z.mean().item() - 3.0) < 0.015, f"mean {z.mean():.4f}: 5 standard errors of 40,000 draws"
    assert abs(z.std().item() / np.exp(-0.5) - 1) < 0.02, f"std {z.std():.4f}"
    extreme = torch.cat([mean, torch.full_like(mean, 1e4)], 1)
    assert tok.sample_moments(extreme).isfinite().all(), "logvar is clamped to [-30, 20]"
    quiet = tok.sample_moments(torch.cat([mean, torch.full_like(mean, -1e4)], 1)) / tok.scale
    assert (quiet - 3.0).abs().max() < 1e-5


def test_identity_is_exact_and_ordered_colour_row_column():
    images = torch.arange(2 * 3 * 4 * 6).float().reshape(2, 3, 4, 6)
    tok = Identity(2)
    x = tok.encode(images)
    assert torch.equal(tok.decode(x), images)
    assert torch.equal(x[1, :, 1, 2].reshape(3, 2, 2), images[1, :, 2:4, 4:6])


@pytest.mark.parametrize("make", [tiny_vae, lambda **kw: Identity(2, **kw)], ids=["kl16", "identity"])
def test_chunks_bound_the_batch_and_change_nothing(make):
    whole, parts = make(), make(max_pixels=2 * 8 * 8)
    sizes = []
    inner = parts._moments
    parts._moments = lambda x: (sizes.append(len(x)), inner(x))[1]
    images = tiny_images(5)
    moments = parts.moments(images)
    assert sizes == [2, 2, 1]
    assert torch.allclose(moments, whole.moments(images), atol=1e-5)
    x = torch.randn(5, whole.channels, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(parts.decode(x), whole.decode(x), atol=1e-5)
    assert whole.decode(x[:0]).shape == (0, 3, 8, 8) and whole.moments(images[:0]).shape[0] == 0


def test_the_vae_is_frozen_and_ignores_autocast_and_train_mode():
    tok, images = tiny_vae(), tiny_images()
    reference = tok.moments(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = tok.moments(images)
    assert inside.dtype == torch.float32 and torch.equal(inside, reference)
    assert torch.equal(tok.train().moments(images), reference)
    assert not any(p.requires_grad for p in tok.parameters())
    x = torch.randn(1, 4, 4, 4, requires_grad=True)
    assert not tok.decode(x).requires_grad
    low = tiny_vae().to(torch.bfloat16).moments(images)
    assert low.dtype == torch.float32 and torch.allclose(low, reference, atol=0.1), "bf16 weights, float32 results"


def test_images_of_any_size_that_the_stride_divides():
    tok = tiny_vae()
    assert tok.decode(tok.encode(torch.zeros(1, 3, 6, 10))).shape == (1, 3, 6, 10)


@pytest.mark.parametrize("call, words", [
    (lambda: tiny_vae().encode(torch.zeros(1, 3, 9, 8)), ("9x8", "stride 2", "8x8")),
    (lambda: Identity(4).encode(torch.zeros(1, 3, 8, 10)), ("8x10", "stride 4", "8x8")),
    (lambda: tiny_vae().encode(torch.zeros(1, 1, 8, 8)), ("(1, 1, 8, 8)", "(B, 3, H, W)")),
    (lambda: tiny_vae().encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), ("uint8", "127.5")),
    (lambda: tiny_vae().decode(torch.zeros(1, 3, 4, 4)), ("(1, 3, 4, 4)", "(B, 4, h, w)")),
    (lambda: tiny_vae().decode(torch.zeros(1, 16, 4)), ("(1, 16, 4)", "transpose")),
    (lambda: tiny_vae().sample_moments(torch.zeros(1, 32, 4, 4)), ("(1, 32, 4, 4)", "(B, 8, h, w)")),
    (lambda: KL16(ch=48), ("ch=48", "32")),
    (lambda: Identity(0), ("patch=0",))])
def test_wrong_inputs_say_what_came_and_what_was_expected(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), str(error.value)


def test_latent_scale_is_one_over_std_without_random_draws():
    g = torch.Generator().manual_seed(0)
    moments = torch.cat([torch.randn(200, 4, 8, 8, generator=g) * 3 + 1, torch.randn(200, 4, 8, 8, generator=g)], 1)
    scale = latent_scale(moments)
    assert latent_scale(iter(moments.split(7))) == pytest.approx(scale, rel=1e-12)
    x = tiny_vae(scale=scale).sample_moments(moments, g)
    assert abs(x.std().item() - 1) < 0.02, f"std of scaled latents {x.std():.4f}; 51,200 draws"
    pixels = tiny_images(20)
    assert latent_scale(Identity(2).moments(pixels)) == pytest.approx(1 / pixels.std(correction=0).item(), rel=1e-5)
    for bad in (torch.full((2, 8, 2, 2), -40.0), torch.full((2, 8, 2, 2), float("nan")), []):
        with pytest.raises(ValueError, match="variance"):
            latent_scale(bad)


# ---- loading ----

def test_a_checkpoint_loads_strictly_with_its_size_read_from_the_tensors(tmp_path):
    tok, images = tiny_vae(), tiny_images()
    path = save_checkpoint(tmp_path / "vae.ckpt", tok.state_dict())
    loaded = load_kl16(path, scale=0.7)
    assert loaded.scale == 0.7 and (loaded.channels, loaded.stride) == (4, 2)
    assert torch.equal(loaded.moments(images), tok.moments(images))
    assert loaded.fingerprint() == tok.fingerprint()
    assert not any(p.requires_grad or p.is_meta for p in loaded.parameters()) and not loaded.training
    half = load_kl16(save_checkpoint(path, {n: v.half() for n, v in tok.state_dict().items()}))
    assert half.moments(images).dtype == torch.float32 and half.fingerprint() != tok.fingerprint()


def drop(name):
    return lambda state: {n: v for n, v in state.items() if n != name}


@pytest.mark.parametrize("change, words", [
    (drop("encoder.mid.attn_1.q.bias"), ("'encoder.mid.attn_1.q.bias' is missing", "(1 wrong in all")),
    (drop("encoder.conv_in.weight"), ("'encoder.conv_in.weight' is missing",)),
    (drop("encoder.down.1.block.0.conv2.weight"), ("'encoder.down.1.block.0.conv2.weight' is missing",)),
    (lambda s: {n: v for n, v in s.items() if n.startswith("encoder.")}, ("'decoder.conv_in.weight' is missing",)),
    (lambda s: {**s, "loss.logvar": torch.zeros(1)}, ("'loss.logvar' is not part",)),
    (lambda s: {**s, "encoder.conv_in.bias": torch.zeros(31)}, ("'encoder.conv_in.bias' is (31,), expected (32,)",)),
    (lambda s: {**s, "encoder.conv_in.weight": torch.zeros(40, 3, 3, 3)}, ("'encoder.conv_in.weight' is (40, 3, 3, 3), expected",)),
    (lambda s: {**s, "quant_conv.bias": s["quant_conv.bias"] * float("nan")}, ("'quant_conv.bias'", "not finite")),
    (lambda s: {"encoder.down_blocks.0.resnets.0.conv1.weight": torch.zeros(1)}, ("'encoder.conv_in.weight' is missing", "diffusers")),
    (lambda s: {"step": 3, "model_ema": {}}, ("['step', 'model_ema']", "--ckpt")),
    (lambda s: {}, ("expected {'model': state_dict}",))])
def test_a_partial_or_foreign_checkpoint_is_refused_by_its_first_offending_name(change, words, tmp_path):
    path = save_checkpoint(tmp_path / "other.ckpt", change(tiny_vae().state_dict()))
    with pytest.raises(ValueError) as error:
        load_kl16(path)
    assert all(w in str(error.value) for w in words) and path in str(error.value), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["truncated", "empty", "web page", "code"])
def test_a_truncated_or_unsafe_file_is_refused_in_one_line(content, tmp_path):
    path = save_checkpoint(tmp_path / "kl16.ckpt", tiny_vae().state_dict())
    whole = open(path, "rb").read()
    if content == "code":                                     # weights_only: nothing in the file is executed
        torch.save({"model": os.path.join}, path)
    else:
        open(path, "wb").write({"truncated": whole[:len(whole) // 2], "empty": b"", "web page": b"<html>404</html>"}[content])
    with pytest.raises(ValueError, match="no readable checkpoint") as error:
        load_kl16(path)
    assert "\n" not in str(error.value) and f"{os.path.getsize(path):,} bytes" in str(error.value)


def test_a_missing_checkpoint_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="kl16.ckpt"):
        load_kl16(str(tmp_path / "nowhere.ckpt"))


# ---- class names ----

def test_imagenet_classes_are_the_standard_thousand_in_order():
    lines = open(os.path.join(ROOT, "assets", "imagenet_classes.txt"), encoding="utf-8").read().splitlines()
    ids, names = zip(*(line.split(" ", 1) for line in lines))
    assert len(lines) == 1000 and list(ids) == sorted(set(ids)), "sorted synset ids are the class order"
    assert all(len(i) == 9 and i[0] == "n" and i[1:].isdigit() for i in ids) and all(n == n.strip() for n in names)
    for index, name in {0: "tench", 1: "goldfish", 88: "macaw", 207: "golden retriever", 281: "tabby", 387: "lesser panda",
                        417: "balloon", 979: "valley", 985: "daisy", 999: "toilet tissue"}.items():
        assert names[index].split(", ")[0] == name, f"class {index} is {names[index]}, expected {name}"
