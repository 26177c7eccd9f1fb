"""Tests of the core's mathematics: `pytest test_core.py`. Names are sentences; tolerances say where
they come from. Data, the AR model, the head and ot_refine, against closed forms and POT; the
programs and the rules of the repository are in test_programs.py.
"""
import contextlib
import functools
import math
import warnings

import numpy as np
import ot
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import data
import ot_refine as R
from data import batch_indices, patchify, unpatchify
from diffloss import DenoisingMLP, DiffLoss, ImageNoise, Schedule, respaced
from model import PRESETS, build, preset
from ot_refine import MAPS, Refiner

SOLVERS = sorted(DiffLoss.samplers)
every = pytest.mark.parametrize
torch.set_num_threads(1)        # problems this small gain nothing from a second thread


def tiny(**changes):
    """A small AR model with no parameter left at zero, so that nothing hides behind adaLN-zero."""
    torch.manual_seed(0)
    m = build(preset("gpt-tiny", **{"token_dim": 4, "grid": 4, "num_classes": 10, **changes}))
    m.diffloss.x0_bound = 1.0
    for p in m.parameters():
        if p.abs().max() == 0:
            torch.nn.init.normal_(p, std=0.02)
    return m.eval()


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tokens(n=3):
    return randn(n, 16, 4).clamp(-1, 1), torch.arange(n) % 10


@contextlib.contextmanager
def settings_kept():
    """How torch multiplies stays as it was, or what follows would differ in the last bit from what
    another process computes."""
    parts = [p.matmul for p in (torch.backends.cuda, torch.backends.mkldnn) if hasattr(
        p, "matmul") and hasattr(p.matmul, "fp32_precision")]
    kept, before = torch.get_float32_matmul_precision(), [p.fp32_precision for p in parts]
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(kept)
        for part, value in zip(parts, before):
            part.fp32_precision = value


def relative(a, b):
    """Largest difference over the largest value."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())


# ================================================================ data

def test_tokens_and_images_are_the_same_thing_and_images_that_are_not_finite_are_never_written():
    images = torch.rand(2, 3, 8, 8)
    x = patchify(images, 2)
    assert x.shape == (2, 16, 12) and torch.equal(unpatchify(x, 2), images)
    assert torch.equal(x[0, 1].view(3, 2, 2), images[0, :, 0:2, 2:4]), "raster, channel first"
    x = torch.tensor([-1.0, -0.5, 0.0039, 2.0]).view(1, 1, 2, 2)
    assert data.to_uint8(x).flatten().tolist() == [0, 64, 128, 255]
    with pytest.raises(ValueError, match="not finite"):
        data.to_uint8(x * math.nan)


def test_digits_are_the_published_ones():
    large, small = (data.load("digits", size=size) for size in (32, 16))
    assert (len(small.train), len(small.heldout), len(small.class_names)) == (1934, 946, 10)
    x, y = small.train.batch(torch.arange(1934))
    assert x.shape == (1934, 1, 16, 16) and (x.min(), x.max()) == (-1, 1)
    assert y.bincount().min() > 150, "every class is well filled"
    halved = torch.nn.functional.avg_pool2d(large.train.batch(torch.arange(1934))[0], 2)
    assert (x - halved).abs().max() < 1.001 / 255, "means of 2x2 pixels, rounded to 8 bits"


def test_an_epoch_visits_every_image_once_and_any_step_is_reproducible():
    seen = torch.cat([batch_indices(s, 8, 50, seed=3) for s in range(25)])       # four epochs
    for e in range(4):
        assert seen[e * 50:(e + 1) * 50].sort().values.tolist() == list(range(50))
    assert not torch.equal(seen[:50], seen[50:100])
    assert torch.equal(batch_indices(17, 8, 50, seed=3), seen[17 * 8:18 * 8])


# ================================================================ the AR model

@every("name", [name for name in PRESETS if PRESETS[name]["kind"] == "ar"])
def test_every_preset_builds_and_the_blocks_of_gpt_xl_have_731_million_parameters(name):
    with torch.device("meta"):
        blocks = build(preset(name)).blocks
    millions = round(sum(p.numel() for p in blocks.parameters()) / 1e6)
    assert (millions == 731) == (name == "gpt-xl"), millions


def test_the_loss_reaches_every_parameter_and_a_batch_s_is_the_mean_over_its_halves():
    m, (x, y) = tiny(), tokens(8)
    draws = m.randomness(8, torch.Generator().manual_seed(0))
    draws["drop"][:2] = True
    whole = m.loss(x, y, draws)
    halves = [m.loss(x[h], y[h], {k: v[h] for k, v in draws.items()})
              for h in (slice(0, 4), slice(4, 8))]
    assert relative(sum(halves) / 2, whole) < 1e-5, "fp32 summation order"
    whole.sum().backward()
    silent = [n for n, p in m.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not silent, silent


def test_conditions_see_only_earlier_patches():
    m, (x, y) = tiny(), tokens(2)
    c = m.conditions(x, y)
    for j in (0, 7, 15):
        other = x.clone()
        other[:, j] += 1
        d = (m.conditions(other, y) - c).abs().amax((0, 2))
        assert d[:j + 1].max() == 0 and (j == 15 or d[j + 1:].min() > 1e-6), f"{j} reached {d}"


@every("cfg_scale", [1.0, 2.0])
def test_conditions_met_in_generation_equal_teacher_forcing_on_the_result(cfg_scale):
    """The KV cache equals the full forward pass, refined or not."""
    m, y, met = tiny(), torch.tensor([1, 4, 9]), {}
    for refine in (None, lambda i, c, y: c + 0.1):
        x = m.generate(y, ImageNoise(0, range(3)), cfg_scale, refine, solver="ddim", steps=3,
                       on_condition=lambda i, c, refined: met.update({i: (c, refined)}))
        seen = torch.stack([met[i][0] for i in range(16)], 1)
        assert relative(seen, m.conditions(x, y)) < 1e-5, "fp32, another summation order"
        moved = torch.stack([b - a for a, b in met.values()], 1)
        assert moved[:, 0].abs().max() == 0, "nothing is known at place 0"
        assert (moved[:, 1:] - (0.1 if refine else 0)).abs().max() < 1e-6, "fp32"


def test_the_head_is_given_the_refined_condition_the_same_null_one_and_the_scale_of_its_place(
        monkeypatch):
    m, met = tiny(), []
    monkeypatch.setattr(m.diffloss, "sample", lambda *a, **k: met.append(a) or torch.zeros(2, 4))
    go = functools.partial(m.generate, torch.tensor([1, 4]), ImageNoise(0, range(2)))
    go(2.0), go(2.0, lambda i, c, y: c + 0.5, cfg_schedule="linear"), go(1.0)
    # the patches are all zeros, so that contexts are equal
    for i, (a, b, c) in enumerate(zip(met[:16], met[16:32], met[32:])):
        assert torch.equal(b[0], a[0] + 0.5 * (i > 0)) and torch.equal(b[1], a[1])
        assert c[1] is None, "without guidance there is no null branch"
        assert (a[2], c[2]) == (2.0, 1.0) and b[2] == pytest.approx(1 + (i + 1) / 16)


def test_image_k_of_a_seed_is_the_same_in_any_batch():
    m, y = tiny(), torch.arange(6)
    whole = m.generate(y, ImageNoise(5, range(6)), 2.0, steps=4)
    part = m.generate(y[3:5], ImageNoise(5, [3, 4]), 2.0, steps=4)
    assert relative(part, whole[3:5]) < 1e-4, "other matmul shapes, a chain of 16 x 4 steps"
    other = m.generate(y[:1], ImageNoise(6, [0]), 2.0, steps=4)
    assert not torch.allclose(whole[:1], other), "another seed, another image"


@every("num_classes", [1, 10, 1000])
def test_the_null_class_is_num_classes_for_any_number_of_classes(num_classes):
    m, (x, _) = tiny(num_classes=num_classes), tokens(2)
    null, zero = (m.conditions(x, torch.full((2,), k)) for k in (num_classes, 0))
    assert null.isfinite().all() and not torch.allclose(null, zero)
    dropped = m.with_null(torch.zeros(2, dtype=torch.long), torch.tensor([True, False]))
    assert dropped.tolist() == [num_classes, 0]


@every("changes, words", [
    ({"n_head": 5}, "divisible by n_head"), ({"num_classes": 0}, "at least 1"),
    ({"kind": "gan"}, "choose one of ar"), ({"n_embd": 24}, "2-D RoPE"),
    ({"objective": "flow"}, "choose one of eps"), ({"name": "gpt-tniy"}, "did you mean gpt-tiny")])
def test_a_bad_architecture_is_refused_with_the_remedy(changes, words):
    with pytest.raises(ValueError, match=words):
        preset(**{"name": "gpt-tiny", **changes})


# ================================================================ the head and its samplers

MEAN, STD, FULL = torch.tensor([0.8, -1.5]), torch.tensor([0.5, 1.2]), Schedule()


def gaussian_eps(x_t, t):
    """The exact eps of data N(MEAN, STD^2) at step t, and the variance of x_t."""
    a, s = float(FULL.alpha[t]), float(FULL.sigma[t])
    var = (a * STD) ** 2 + s ** 2
    return s * (x_t - a * MEAN) / var, var


def draw_gaussian(solver, steps, n, **options):
    """n draws of a sampler that is given the exact x0 and the exact reverse variance."""
    run, _, fresh = DiffLoss.samplers[solver]
    s = respaced(steps)

    def denoise(x_t, t):
        eps, var = gaussian_eps(x_t, t)
        x0 = x_t * float(FULL.x0_from_xt[t]) - eps * float(FULL.x0_from_eps[t])
        if solver != "ddpm":
            return x0, None
        # Var[x_{j-1} | x_j]: the posterior's, and what is left of x0's uncertainty
        j = s.timestep_map.tolist().index(t)
        low, high, mean_x0 = (float(z[j]) for z in (s.log_var_min, s.log_var_max, s.mean_x0))
        reverse = math.exp(low) + mean_x0 ** 2 * STD ** 2 * float(FULL.sigma[t]) ** 2 / var
        return x0, (2 * (reverse.log() - low) / (high - low) - 1).expand_as(x0)

    return run(denoise, randn(1 + fresh * steps, n, 2), steps, **options)


@every("solver, steps", [("ddpm", 250), ("ddim", 250), ("dpm++", 25)])
def test_every_sampler_recovers_mean_and_variance_of_a_gaussian(solver, steps):
    x = draw_gaussian(solver, steps, 20_000)
    # the standard error of 20,000 draws is .008, the discretisation's bias about .01
    assert (x.mean(0) - MEAN).abs().max() < 0.04, x.mean(0)
    assert (x.std(0) / STD - 1).abs().max() < 0.04, x.std(0)
    assert (draw_gaussian(solver, steps, 5000, temperature=0.5).std(0) < 0.8 * STD).all()


def test_the_second_order_solver_converges_faster_than_the_first_order_one():
    exact = draw_gaussian("ddim", 1000, 2000)
    ddim, dpmpp = ((draw_gaussian(k, 12, 2000) - exact).norm() for k in ("ddim", "dpm++"))
    assert dpmpp < 0.5 * ddim, (dpmpp, ddim)


def head():
    torch.manual_seed(0)
    net = DenoisingMLP(4, 8, 16, 2)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return DiffLoss(net)


def test_guidance_extrapolates_from_the_null_branch_and_x0_is_kept_within_its_bound():
    d, x, c, null, t = head(), randn(5, 4), randn(5, 8), randn(5, 8, seed=1), torch.full((5,), 999)
    (e, v), (e0, _) = d.net(x, t, c), d.net(x, t, null)
    x0, var = d.denoiser([999], c, null, 2.5)(x, 999)
    want = d.x0_from_xt[999] * x - d.x0_from_eps[999] * (e0 + 2.5 * (e - e0))
    assert relative(x0, want) < 1e-5 and relative(var, v) < 1e-5, "fp32; v is the conditional one"
    assert x0.abs().max() > 100, "at t = 999 the head's error is divided by sqrt(abar) ~ 5e-5"
    free, d.x0_bound = d.x0_from_xt[999] * x - d.x0_from_eps[999] * e, 0.7
    for other in (null, None):
        kept = d.denoiser([999], c, other, 1.0)(x, 999)[0]
        assert relative(kept, free.clamp(-0.7, 0.7)) < 1e-5, "fp32, other matmul shapes"


@every("shape", [(1,), (5,), (3, 4), (700,)])
def test_a_trajectory_s_denoiser_gives_what_the_plain_head_gives(shape):
    d, ts = head(), DiffLoss.samplers["ddpm"].timesteps(7)
    c, x = randn(2, *shape, 8), randn(7, *shape, 4)
    for c in (c[0], c):                              # of one branch, of both
        along = d.net.along(ts, c)
        for t, x_t in zip(ts, x):
            for got, want in zip(along(x_t, t), d.net(x_t, torch.tensor(t), c)):
                assert relative(got, want) < 1e-5, f"t = {t}: fp32, other matmul shapes"
    many = torch.arange(1500) % 1000                 # beyond 1000 a table is looked up
    assert relative(d.net.embed_time(many), d.net.time_embed(many)) < 1e-5


@every("solver", SOLVERS)
@every("steps", [1, 2, 9, 1000])
def test_timesteps_and_callback_are_those_of_the_denoiser_s_calls(solver, steps):
    met, told, (run, timesteps, fresh) = [], [], DiffLoss.samplers[solver]
    half = lambda x, t: (met.append((t, x)), (x / 2, torch.zeros_like(x)))[1]
    noise = randn(1 + fresh * steps, 1, 2)
    run(half, noise, steps, callback=lambda t, x_t, x0: told.append((t, x_t, x0)))
    assert timesteps(steps) == [t for t, _ in met] and len(set(timesteps(steps))) == steps
    assert torch.equal(met[0][1], noise[0])
    assert all(t == s and torch.equal(x, y) and torch.equal(x0, x / 2)
               for (t, x), (s, y, x0) in zip(met, told, strict=True))


def test_score_is_the_gradient_of_the_log_density():
    d = DiffLoss(lambda x_t, t, c: gaussian_eps(x_t, int(t[0])))
    x, (a, s) = randn(6, 2, dtype=torch.float64), (float(FULL.alpha[400]), float(FULL.sigma[400]))
    law = torch.distributions.Normal(a * MEAN.double(), ((a * STD.double()) ** 2 + s ** 2).sqrt())
    want, = torch.autograd.grad(law.log_prob(x.requires_grad_()).sum(), x)
    got = d.score(x.detach(), torch.full((6,), 400), None)
    assert relative(got, want) < 1e-5, "the schedule's tables are fp32"


def test_the_loss_of_the_exact_denoiser_is_its_closed_form():
    """The error of eps is the posterior's variance; the bound is a KL of two Gaussians."""
    t, x, eps = torch.full((50_000,), 400), MEAN + STD * randn(50_000, 2), randn(50_000, 2, seed=1)
    best = DiffLoss(lambda x_t, t, c: (gaussian_eps(x_t, int(t[0]))[0], torch.zeros(x.shape)))
    a, s = float(FULL.alpha[400]), float(FULL.sigma[400])
    want = ((a * STD) ** 2 / ((a * STD) ** 2 + s ** 2)).mean()
    mse = best.terms(x, None, t, eps)[0].mean()
    assert abs(mse / want - 1) < 0.03, "100,000 squares of a Gaussian: .0045, six times over"
    low, high, shift = best.log_var_min[400], best.log_var_max[400], best.mean_x0[400]
    shift = shift * best.x0_from_eps[400]            # of the mean, where eps is wrong by 1
    law = lambda mean, log_var: torch.distributions.Normal(mean, (log_var / 2).exp())
    for v, log_var, wrong in ((-1.0, low, 0.0), (1.0, high, 0.0), (-1.0, low, 1.0)):
        oracle = DiffLoss(lambda x_t, t, c: (eps + wrong, torch.full(x.shape, v)))
        mse, vb = oracle.terms(x, None, t, eps)
        laws = law(torch.tensor(0.0), low), law(wrong * shift, log_var)
        want = torch.distributions.kl_divergence(*laws) / math.log(2)
        assert (mse - wrong).abs().max() < 1e-5 and (vb - want).abs().max() < 1e-5, "fp32"


@every("solver, steps, words", [("euler", 5, "does not fit a head trained for 'eps'"),
                                ("ddpm", 1001, "1 to 1000"), ("dpm++", 1001, "1 to 1000")])
def test_a_solver_that_does_not_fit_the_objective_or_impossible_steps_are_refused(
        solver, steps, words):
    with pytest.raises(ValueError, match=words):
        head().solver(solver).timesteps(steps)


# ================================================================ ot_refine: transport

def clouds(n=30, m=24, C=5, dtype=torch.float64):
    x, y = randn(n, C, seed=1, dtype=torch.float64), randn(m, C, seed=2, dtype=torch.float64)
    return (x * torch.linspace(0.5, 1.5, C) + 1).to(dtype), (1.2 * y).to(dtype)


@pytest.fixture
def converged(monkeypatch):
    """Sinkhorn iterations that go on to 1e-13, not to 5 %."""
    ours, self_ = R.sinkhorn, R.sinkhorn_self
    monkeypatch.setattr(R, "sinkhorn",
                        lambda cost, reg, g=None, *_: ours(cost, reg, g, 20_000, 1e-13))
    monkeypatch.setattr(R, "sinkhorn_self", lambda cost, reg, *_: self_(cost, reg, 20_000, 1e-13))


def own(T, c):
    return getattr(T, "own", T)(c)


def test_the_plan_agrees_with_pot_and_has_the_right_marginals():
    x, y = clouds()
    cost = R.sq_cost(x, y)
    assert (cost - torch.cdist(x, y).square()).abs().max() < 1e-12, "float64"
    P = R.plan(cost, *R.sinkhorn(cost, 0.5, n_iter=3000, tol=1e-12), 0.5)
    # both stop at 1e-12; a plan's entries inherit it times a condition number of order 10
    assert (P.sum(1) - 1 / 30).abs().max() < 1e-12 and (P.sum(0) - 1 / 24).abs().max() < 1e-11
    want = ot.solve(cost, reg=0.5, reg_type="KL", max_iter=5000, tol=1e-13).plan
    assert (P - want).abs().max() < 1e-10


def test_the_divergence_agrees_with_pot_to_2e_9_and_is_zero_for_equal_clouds():
    x, y = clouds()
    want = ot.solve_sample(x, y, reg=4.0, debias=True, max_iter=20_000, tol=1e-11).value
    assert abs(R.divergence(x, y, 4.0, 5000, 1e-12) - want) < 2e-9, "what POT reaches"
    assert R.divergence(x, x.flip(0), 4.0, 5000, 1e-12).abs() < 1e-12, "float64"


def test_the_map_is_the_gradient_of_the_divergence(converged):
    x, y = clouds(n=12, m=10)
    T = MAPS["sinkhorn"].fit(x, y, 0.1)
    grad, = torch.autograd.grad(R.divergence(x.requires_grad_(), y, T.reg), x)
    x, h = x.detach(), torch.zeros_like(x)
    assert (T.own(x) - x + 12 / 2 * grad).abs().max() < 1e-9, "the stop at 1e-13, times n / reg"
    h[3, 2] = 1e-5
    slope = (R.divergence(x + h, y, T.reg) - R.divergence(x - h, y, T.reg)) / 2e-5
    assert abs(slope - grad[3, 2]) < 1e-7, "a central difference: h^2 and 1e-13 / h"


@every("name", MAPS)
def test_maps_are_equivariant_to_permutation_translation_and_rotation(name, converged):
    (x, y), to = clouds(n=20), lambda x, y: own(MAPS[name].fit(x, y, 0.1), x)
    shift, Q = 10 * x[3], torch.linalg.qr(randn(5, 5, dtype=torch.float64))[0]
    # the stop at 1e-13 times the conditioning, in float64
    assert (to(x.flip(0), y) - to(x, y).flip(0)).abs().max() < 1e-9
    assert (to(x + shift, y + shift) - to(x, y) - shift).abs().max() < 1e-9
    assert (to(x @ Q, y @ Q) - to(x, y) @ Q).abs().max() < 1e-9


@every("name", MAPS)
def test_equal_clouds_are_a_fixed_point_of_debiased_maps_and_the_biased_one_shrinks_them(
        name, converged):
    x = clouds(n=200)[0]
    to = own(MAPS[name].fit(x, x.flip(0), 0.5), x)
    if name == "biased":
        assert to.var(0).sum() < 0.7 * x.var(0).sum(), "the entropic blur of reg = .5"
    else:
        assert (to - x).abs().max() < 1e-9, "the stop at 1e-13 times the conditioning"


def test_the_gaussian_map_is_exact_between_gaussians_and_as_long_as_their_w2():
    x, y = clouds(40_000, 40_000, 3)
    y = y @ randn(3, 3, dtype=torch.float64)
    T = MAPS["gaussian"].fit(x, y)
    # the least shrinkage is 1e-3, of either covariance: relative gaps of that order
    assert relative(T(x).T.cov(), y.T.cov()) < 5e-3 and (T(x).mean(0) - y.mean(0)).norm() < 1e-9
    want = ot.gaussian.bures_wasserstein_distance(x.mean(0), y.mean(0), x.T.cov(), y.T.cov())
    assert (T(x) - x).square().sum(1).mean().sqrt() == pytest.approx(want.item(), rel=5e-3)
    assert (T.A - T.A.T).abs().max() < 1e-12 and torch.linalg.eigvalsh(T.A).min() > 0


def exact_w2(x, y):
    return ot.emd2(ot.unif(len(x)), ot.unif(len(y)), ot.dist(x.numpy(), y.numpy())) ** 0.5


def test_the_divergence_tends_to_the_exact_w2():
    x, y = clouds(400, 400, 2)
    S = R.divergence(x, y, 0.05 * R.sq_cost(x, y).mean(), 3000, 1e-8).sqrt()
    assert abs(S / exact_w2(x, y) - 1) < 0.05, "the entropic bias at this reg"


@every("eta", [0.5, 2.0])
def test_w2_shrinks_by_exactly_rho_under_the_exact_map(eta):
    x, y = clouds(40, 40)
    P = ot.emd(ot.unif(40), ot.unif(40), ot.dist(x.numpy(), y.numpy()))
    moved = R.jko_step(x, torch.from_numpy(40 * P) @ y, eta)
    assert abs(exact_w2(moved, y) / exact_w2(x, y) - 1 / (1 + 2 * eta)) < 1e-10, "a geodesic"


@every("lam", [0.0, 0.3])
def test_a_jko_step_is_the_minimiser_that_its_docstring_states(lam):
    (x, to), eta = clouds(m=30), 0.7
    a, z = to.flip(0), R.jko_step(x, to, eta, lam, to.flip(0)).requires_grad_()
    far = lambda p: (z - p).square().sum()
    objective = far(x) / (2 * eta) + far(to) + lam * far(a)
    assert torch.autograd.grad(objective, z)[0].abs().max() < 1e-12, "float64"
    whole = R.jko_step(x, to, float("inf"), lam, a)
    assert (whole - (to + lam * a) / (1 + lam)).abs().max() < 1e-12
    assert R.jko_step(x, to, 0, lam, a) is x


@every("lam", [0.0, 0.3])
def test_divergence_and_energy_fall_at_every_step(lam, converged):
    x, y = clouds(40, 30)
    a, reg, F = 0.5 * x, 0.1 * R.sq_cost(x, y).mean(), []
    for _ in range(6):
        F.append(R.divergence(x, y, reg) + lam * (x - a).square().sum(1).mean())
        T = MAPS["sinkhorn"].fit(x, y, reg / R.sq_cost(x, y).mean())
        x = R.jko_step(x, T.own(x), 0.5, lam, a)
    assert all(after < before for before, after in zip(F, F[1:])), F


@every("name", MAPS)
def test_single_constant_repeated_and_huge_points_stay_finite(name):
    x, y = clouds(dtype=torch.float32)
    same, one = x[:1].expand_as(x), own(MAPS[name].fit(x[:1], y, 0.2), x[:1])
    assert (one - y.mean(0)).abs().max() < (2 if name == "biased" else 1e-3), "a mean shift"
    for c, target in ((x, y[:1]), (x[:1], y[:1]), (same, same), (same, y), (x, same[:7]),
                      (torch.cat([x, x]), y), (0 * x, 0 * y)):
        T = MAPS[name].fit(c, target, 0.2)
        assert T(x).isfinite().all() and own(T, c).isfinite().all()
    want = own(MAPS[name].fit(x, y, 0.2), x)
    for scale in (1e8, 1e-8):                        # reg is relative: rounding, times 1 / reg
        got = own(MAPS[name].fit(x * scale, y * scale, 0.2), x * scale) / scale
        assert (got - want).abs().max() < 1e-3


def test_sinkhorn_that_does_not_converge_warns_once():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")                 # as Python has it
        for seed in range(3):
            R.sinkhorn(R.sq_cost(*clouds()) + seed, 1.0, n_iter=1, tol=1e-12)
    assert [str(w.message) for w in said] == ["Sinkhorn stopped after n_iter=1, its marginals not "
                                              "yet met to 1e-12: raise reg"]


def test_the_frozen_map_is_the_documented_formula_and_each_point_s_own():
    (x, y), z = clouds(), clouds(n=31)[0][30:]
    T = MAPS["sinkhorn"].fit(x, y, 0.1)
    e = torch.exp((T.h - (z - x).square().sum(1)) / T.reg)
    u = ((e.sum().square() + 4 * 31).sqrt() - e.sum()) / 2
    assert abs(u * (e.sum() + u) - 31) < 1e-9, "the weight with which z joins its own cloud"
    to = torch.softmax((T.g - (z - y).square().sum(1)) / T.reg, 0) @ y
    for got in (T(z), T(torch.cat([z, x]))[:1]):
        assert (got - (z + to - (e @ x + u * z) / (e.sum() + u))).abs().max() < 1e-12, "float64"
    assert (T(z + 1e4) - y.mean(0)).norm() < 10, "far away it goes to the targets, its own cloud"


@every("name", MAPS)
@every("n, m", [(40, 30), (1, 30), (40, 1), (1, 1)])
@every("reg", [0.005, 0.2, 5.0])
@every("far", [0, 1000])
def test_maps_in_fp32_are_those_of_float64_to_rounding_wherever_clouds_lie(name, n, m, reg, far):
    x, y = ((z + far).float() for z in clouds(n, m))
    z = torch.cat([x[:1], randn(9, 5) + far, randn(9, 5) + far + 20])
    T = MAPS[name].fit(x.double(), y.double(), reg)
    low = MAPS[name](**{field: value.float() for field, value in vars(T).items()})
    for point, f, g in (z, T, low), (x, getattr(T, "own", T), getattr(low, "own", low)):
        # 20 roundings of a coordinate; of squares counted from the origin it would be 1000 far
        assert (g(point) - f(point.double())).abs().max() < 20 * 6e-8 * (far + 40)


# ================================================================ ot_refine: the Refiner

def refiner(n=40, m=30, C=6, rank=6, **options):
    """A Refiner of two places in `rank` of C directions, and conditions (n, C) for it."""
    axes = torch.linalg.qr(randn(2, C, C))[0][:, :, :rank]
    return (Refiner(axes, torch.bmm(randn(2, m, C, seed=1), axes), **options),
            1.3 * randn(n, C, seed=2) + 0.5)


def frozen(r, c):
    for i in range(2):
        r(i, c)
    r.frozen = True
    return r


@every("off", [("none",), ("default", 0), ("default", 2, 0.0), ("gaussian", 0)])
@every("kept", [True, False])
def test_nothing_to_do_returns_the_conditions_bitwise(off, kept):
    r, c = refiner(stages=R.stages_of(*off))
    r.frozen = kept
    assert r(1, c) is c
    assert R.stages_of() == (("gaussian", math.inf), ("sinkhorn", 2.0), ("sinkhorn", 2.0))


@every("method", ["default", *MAPS])
def test_refined_conditions_are_nearer_to_their_targets_and_frozen_ones_are_each_their_own(method):
    r, c = refiner(200, 150, stages=R.stages_of(method))
    coupled, target, z = r(1, c), r.targets[1] @ r.axes[1].T, c
    for name, eta in R.stages_of(method):                         # Algorithm 1, lines 3 to 8
        z = R.jko_step(z, own(MAPS[name].fit(z, target, 0.2), z), eta)
    assert (z - coupled).abs().max() < 1e-4, "fp32 in turned axes, times the exponents of 1 / reg"
    before, after = (R.divergence(z, target, 1.0, tol=1e-4) for z in (c, coupled))
    assert after < 0.5 * before, (before, after)
    kept = frozen(r, c)(1, c)
    gap = (kept - coupled).square().mean() / (coupled - c).square().mean()
    assert gap < 0.25 ** 2, "a point counts twice in its cloud: of the order of its weight"
    assert (r(1, c[7:8]) - kept[7:8]).abs().max() < 1e-4


def test_directions_outside_the_axes_are_left_and_the_axes_are_those_of_the_largest_variance():
    r, c = refiner(rank=2)
    moved, axes = r(0, c) - c, r.axes[0]
    assert moved.abs().max() > 0.1
    assert (moved - moved @ axes @ axes.T).abs().max() < 1e-5, "fp32 of values up to 5"
    Q = torch.linalg.qr(randn(2, 5, 5, dtype=torch.float64))[0]
    x = randn(2, 4000, 5, dtype=torch.float64) * torch.tensor([3, 0.1, 2, 0.1, 0.1])
    axes, wanted = R.principal_axes(x @ Q.mT + 7, 2), Q[:, :, [0, 2]]
    # perturbation theory: .1 / 2 / sqrt(4000) in each of a few entries
    assert (axes @ axes.mT - wanted @ wanted.mT).abs().max() < 0.01


def test_bf16_comes_back_as_bf16_and_is_computed_in_fp32():
    r, c = refiner()
    out = r(0, c.bfloat16())
    assert out.dtype == torch.bfloat16 and torch.equal(out, r(0, c.bfloat16().float()).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(r(0, c.bfloat16()), out), "autocast must not reach the solver"


def test_the_state_survives_saving(tmp_path):
    r, c = refiner()
    out = frozen(r, c)(1, c)
    torch.save(r.state(), tmp_path / "maps.pt")
    again = refiner()[0].load(torch.load(tmp_path / "maps.pt", weights_only=True))
    assert again.frozen and torch.equal(again(1, c), out)


def test_the_inverse_term_pulls_and_is_asked_in_every_step():
    seen = []
    pull = lambda i, c: seen.append((i, c.clone())) or torch.full_like(c, 5.0)
    r, c = refiner(stages=R.stages_of("sinkhorn", 3), lam=1e6, inverse=pull)
    assert (r(1, c) - 5).abs().max() < 1e-4, "lam = 1e6 dominates: c goes to a"
    assert [i for i, _ in seen] == [1, 1, 1] and relative(seen[0][1], c) < 1e-6
    assert not torch.allclose(seen[1][1], c)
    with pytest.raises(ValueError, match="lam=0.1 needs inverse"):
        refiner(lam=0.1)


def test_a_map_without_fit_and_conditions_that_are_not_finite_are_refused(monkeypatch):
    monkeypatch.setitem(MAPS, "shift", type("Shift", (), {"__call__": lambda self, z: z}))
    with pytest.raises(ValueError, match="'shift' must be one of MAPS.*fit.c, target, reg."):
        refiner(stages=(("shift", 1.0),))
    r, c = refiner()
    c[3, 2] = float("nan")
    with pytest.raises(ValueError, match="conditions at place 1 are not finite"):
        r(1, c)


@every("interface", ["old", "new"])
def test_the_solver_computes_in_fp32_and_gives_torch_its_settings_back(interface):
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has only the older interface to TF32")
    with settings_kept():
        if interface == "old":
            torch.set_float32_matmul_precision("high")
        else:
            matmul.fp32_precision = "tf32"
        with pytest.raises(KeyError), R.exact(torch.device("cpu")):
            assert matmul.fp32_precision == "ieee"
            raise KeyError
        assert matmul.fp32_precision == "tf32"
        assert interface == "new" or torch.get_float32_matmul_precision() == "high"


def test_frozen_refinement_makes_no_gpu_wait():
    class NoWait(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            waits = ("local_scalar_dense", "nonzero", "masked_select", "unique", "equal")
            assert not any(word in str(func) for word in waits), func
            return func(*args, **(kwargs or {}))

    r, c = refiner(rank=3)
    frozen(r, c)
    with NoWait():
        r(1, c)
    r.frozen = False
    with pytest.raises(AssertionError, match="local_scalar_dense"), NoWait():
        r(1, c)


def test_the_lesson_prints_divergences_that_fall_and_leaves_its_picture(tmp_path, capsys):
    R.lesson(K=2, path=tmp_path / "lesson.png")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:5]]
    debiased, biased, exact = np.array(rows, dtype=float).T[1:]
    assert (np.diff(debiased) < 0).all() and debiased[2] < biased[2]
    assert exact == pytest.approx(exact[0] * np.array([1, 4 / 9, 16 / 81]), rel=1e-3)
    assert Image.open(tmp_path / "lesson.png").size[0] > 500
