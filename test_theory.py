"""Tests of theory.py: the toys against closed forms, the fits against known parameters, the command at tiny size."""
import json
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch

import data
import theory
from model import build, preset, save_checkpoint

torch.set_num_threads(1)


# ---------------------------------------------------------------- statistics

def test_the_fit_of_a_decay_recovers_its_parameters():
    i = np.arange(16)
    for M, beta, m in ((2.0, 0.7, 1.0), (0.5, 0.3, -1.0), (-3.0, 0.9, 5.0)):
        got = theory.fit_decay((M * beta ** i + m)[None])[0]
        assert np.allclose(got, (M, beta, m, 1), atol=2e-4), got            # the last grid of beta has a spacing of 3e-6; M and m share its error
    assert theory.fit_decay(np.full((1, 16), 3.0))[0, [0, 3]].tolist() == [0, 0], "a constant does not decay"


def test_bootstrap_intervals_cover_the_truth():
    """100 data sets of 60 noisy curves: a 95 % interval that covers 85 times or less would be a 4-sigma event."""
    rng, i, truth = np.random.default_rng(0), np.arange(12), np.array([2.0, 0.6, 1.0])
    covered = np.zeros(3)
    for _ in range(100):
        curves = truth[0] * truth[1] ** i + truth[2] + rng.normal(size=(60, 12)) * 0.5
        _, low, high = theory.bootstrap(curves, theory.fit_decay, 100)
        covered += (low[:3] <= truth) & (truth <= high[:3])
    assert (covered > 85).all(), covered


def test_the_slope_of_a_line_is_its_slope():
    assert np.allclose(theory.slope(np.array([[1.0, 3, 5, 7], [2, 2, 2, 2]])), [2, 0])


# ---------------------------------------------------------------- toys

def test_theorem_1_is_an_identity_on_a_gaussian_mixture():
    """L_cond by its closed form, the others by quadrature that is exact to rounding."""
    L = theory.toy_theorem1(range(0, 1000, 37))
    assert (L >= 0).all() and np.abs((L[:, 0] - L[:, 1] - L[:, 2]) / L[:, 0]).max() < 1e-10


def test_theorem_1_toy_agrees_with_monte_carlo():
    share, mu, std, t = np.array([0.5, 0.3, 0.2]), np.array([-2, 0.5, 2.5]), np.array([0.4, 0.7, 0.5]), 300
    schedule, rng, n = theory.Schedule(), np.random.default_rng(0), 400_000
    alpha, sigma = schedule.alpha[t], schedule.sigma[t]
    k = rng.choice(3, n, p=share)
    x_t = alpha * (mu[k] + std[k] * rng.normal(size=n)) + sigma * rng.normal(size=n)
    cond = -(x_t - alpha * mu[k]) / (alpha ** 2 * std[k] ** 2 + sigma ** 2)
    l_cond = np.square(-(x_t - x_t.mean()) / x_t.var() - cond).mean()
    assert abs(l_cond / theory.toy_theorem1([t])[0, 0] - 1) < 0.01          # the standard error of the mean is 0.2 %


@pytest.mark.parametrize("r", [0.4, 0.8])
def test_theorem_2_toy_decays_at_the_spectral_radius_and_only_where_x_does_not_follow_c(r):
    chain, t = theory.toy_chain(r), 400
    G, fixed = theory.toy_theorem2(chain, 24, t)
    assert abs(theory.fit_decay(G[None])[0, 1] ** 0.5 - r) < 1e-4           # squared norm: beta = r^2, to the fit's grid
    alpha, sigma = theory.Schedule().alpha[t], theory.Schedule().sigma[t]
    (c, x), rng = chain.sample(200_000, 3), np.random.default_rng(1)
    mean, cov = chain.stationary()
    V = (alpha ** 2 * chain.R + sigma ** 2 * np.eye(4))
    apart = rng.multivariate_normal(alpha * mean, alpha ** 2 * cov + V, 200_000)
    energy = lambda x_t: np.square((alpha * c[2] - x_t) @ np.linalg.inv(V)).sum(1).mean()
    assert abs(energy(apart) / G[2] - 1) < 0.01                             # Monte Carlo error of about 0.1 %
    assert abs(energy(alpha * x[2] + sigma * rng.normal(size=x[2].shape)) / fixed - 1) < 0.01


def test_the_linear_chain_has_the_moments_that_it_states():
    chain = theory.toy_chain(0.8, normal=False, spread=4.0)
    c, x = chain.sample(200_000, 4)
    mean, cov = chain.moments(4)[3]
    assert np.abs(c[3].mean(0) - mean).max() < 0.02 and np.abs(np.cov(c[3].T) - cov).max() < 0.02    # 5 standard errors
    residual = c[3] - mean - (x[3] - mean) @ chain.gain(cov).T
    assert np.abs(residual.T @ x[3] / len(x[3]) - residual.mean(0)[:, None] * x[3].mean(0)).max() < 0.02, "E[c | x] leaves nothing to regress on x"
    mean, cov = chain.stationary()
    assert np.allclose(chain.A @ mean + chain.b, mean) and np.allclose(chain.A @ cov @ chain.A.T + chain.Q, cov)


def test_w2_between_gaussians_has_its_closed_forms():
    eye, zero = np.eye(3), np.zeros(3)
    assert np.isclose(theory.gaussian_w2(zero, eye, np.array([3.0, 4, 0]), eye), 5)
    assert np.isclose(theory.gaussian_w2(zero, 4 * eye, zero, 9 * eye), 3 ** 0.5)
    S = np.random.default_rng(0).normal(size=(3, 3))
    assert theory.gaussian_w2(zero, S @ S.T, zero, S @ S.T) < 1e-6          # the root of rounding errors of 1e-15


def test_proposition_1_toy_settles_at_the_spectral_radius_from_any_spread():
    for spread in (1.0, 4.0):
        w2, left = theory.toy_proposition1(theory.toy_chain(0.7, spread=spread), 16)
        assert (np.diff(w2) < 0).all() and ((0 < left) & (left < 1)).all()
        assert abs(w2[-1] / w2[-2] - 0.7) < 2e-3                            # the covariance's part has died out as r^(2i)
    assert np.allclose(w2[1:] / w2[:-1], 0.7, atol=0.1)


@pytest.mark.parametrize("normal", [True, False])
def test_lemma_6_energy_is_propagated_plus_injected(normal):
    chain = theory.toy_chain(0.8, normal=normal, spread=4.0)
    energy, propagated, injected = theory.toy_lemma6(chain, 10)
    assert np.abs(energy[1:] - propagated - injected).max() < 1e-10 and (propagated > 0).all() and (injected > 0).all()
    c, x = chain.sample(200_000, 3)
    residual = [np.square(ci - ci.mean(0) - (xi - xi.mean(0)) @ chain.gain(P).T).sum(1).mean() for ci, xi, (_, P) in zip(c, x, chain.moments(3))]
    assert np.allclose(residual, energy[:3], rtol=0.01)                     # Monte Carlo error of about 0.2 %


@pytest.mark.parametrize("eta, implicit", [(0.1, True), (0.5, True), (3.0, True), (0.1, False), (0.4, False)])
def test_theorem_3_toy_contracts_at_exactly_rho(eta, implicit):
    rng = np.random.default_rng(0)
    w2 = theory.exact_flow(rng.normal(size=(40, 3)) * 2 + 1, rng.normal(size=(40, 3)), eta, 5, implicit)
    rho = 1 / (1 + 2 * eta) if implicit else abs(1 - 2 * eta)
    assert np.allclose(w2[1:] / w2[:-1], rho, rtol=1e-8)                    # squared distances cancel to 1e-16 / rho^10


def test_exact_w2_of_a_translated_and_repeated_cloud_is_the_shift():
    x = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert abs(theory.exact_w2(x, torch.cat([x, x]) + torch.tensor([3.0, 4, 0])) - 5) < 1e-9


# ---------------------------------------------------------------- measurements

def test_noise_intensity_is_the_standard_deviation_of_white_noise():
    """On a plane, whose Laplacian is 0; the median of 16,000 values has an error of 1 %."""
    axis = torch.linspace(0, 1, 128)
    noise = torch.randn(2, 1, 128, 128, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 0.4])[:, None, None, None]
    got = theory.noise_intensity(axis[:, None] + 2 * axis + noise)
    assert torch.allclose(got, torch.tensor([0.1, 0.4]), rtol=0.05), got


def test_snr_is_20_db_for_a_tenth_of_the_amplitude():
    x0 = torch.randn(3, 16, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(theory.snr(torch.stack([0.9 * x0, 1.1 * x0, 0 * x0]), x0)[:, 0], torch.tensor([20.0, 20, 0]), atol=1e-3)


def subject(eps):
    """A Subject of 2 classes x 30 images of 2 patches whose model's eps is `eps(x_t, sigma, c)`."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 30, 2, 3, generator=g)
    x[:, :, 0] = x[:, :3, 0].repeat(1, 10, 1)                               # each first patch ten times: contexts that are shared
    head = type("Head", (torch.nn.Module,), {"score": lambda self, x_t, t, c: -eps(x_t, self.sigma[t][..., None], c) / self.sigma[t][..., None]})()
    schedule = theory.Schedule()
    head.alpha, head.sigma = (torch.tensor(a, dtype=torch.float32) for a in (schedule.alpha, schedule.sigma))
    chain = theory.Chain(x, torch.randn(2, 30, 2, 5, generator=g))
    return theory.Subject("ar", type("Model", (), {"diffloss": head})(), torch.arange(2), 1, chain, chain, chain)


def test_a_model_that_ignores_c_obeys_theorem_1_on_real_data():
    """Two cases: eps = 0, eps = x_t. The mean residual over images is Monte Carlo: 0 within 4 standard errors."""
    for eps in (lambda x_t, sigma, c: 0 * x_t, lambda x_t, sigma, c: x_t):
        v = theory.condition_errors(subject(eps), 30, 0)                    # (B, N, T, 5)
        assert np.array_equal(v[..., :2], v[..., 2:4]), "blind or not is the same for it"
        rest = (v[..., 0] - v[..., 1] - v[..., 4]).mean((1, 2))
        assert abs(rest.mean()) < 4 * rest.std() / len(rest) ** 0.5, rest.mean()


def test_the_true_conditional_score_escapes_theorem_1():
    """With c_i the patch itself, the conditional score of a one-image context is (x_t - alpha x_i) / sigma: L_cond = 0, L_uncond = eps_c."""
    s = subject(None)
    s.reference.c = s.reference.x.clone()
    head = s.model.diffloss
    type(head).score = lambda self, x_t, t, c: -(x_t - self.alpha[t][..., None] * c) / self.sigma[t][..., None] ** 2
    v = theory.condition_errors(s, 30, 0)[:, 1]                             # patch 1: 3 images x 10 per context
    assert v[..., 4].mean() > 0 and v[..., 0].mean() > 0, "ten images share a context, so the patch says more than the context"
    s.reference.x[:, :, 0] += torch.arange(30.0)[:, None] * 0.01            # now every context is unique
    s.reference.c = s.reference.x.clone()
    v = theory.condition_errors(s, 30, 0)[:, 1]
    assert v[..., 0].max() < 1e-8 and np.allclose(v[..., 1], v[..., 4], rtol=1e-3, atol=1e-5)    # fp32 model against float64


# ---------------------------------------------------------------- the whole command

@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """{kind: run directory} of tiny models with no parameter at zero, for 16x16 digits in 4 tokens of 64."""
    facts, runs = data.load("digits", size=16, patch=8), {}
    for name in ("gpt-tiny", "mar-tiny", "cdm-tiny"):
        torch.manual_seed(0)
        m = build(preset(name, token_dim=64, grid=2, num_classes=10))
        for p in m.parameters():
            if p.abs().max() == 0:
                torch.nn.init.normal_(p, std=0.02)
        out = runs[m.cfg.kind] = tmp_path_factory.mktemp(m.cfg.kind)
        about = {**facts.facts, "data_dir": None, "class_names": facts.class_names, "x0_bound": facts.x0_bound}
        save_checkpoint(out / "ckpt.pt", {"config": asdict(m.cfg), "model": m.state_dict(), "ema": m.state_dict(), "step": 0, "data": about})
    return runs


def test_an_untrained_model_gives_every_figure_caption_and_number(untrained, tmp_path, capsys):
    theory.main(["--fast", "--out_dir", str(tmp_path)] + [a for kind, run in untrained.items() for a in (f"--{kind}", str(run))])
    report, text, shown = json.loads((tmp_path / "theory.json").read_text()), (tmp_path / "theory.md").read_text(), capsys.readouterr().out
    assert list(report["claims"]) == list(theory.CLAIMS)
    for name, claim in report["claims"].items():
        assert 2000 < (tmp_path / f"{name}.png").stat().st_size < 60 * 1024, name
        assert f"]({name}.png)" in text and claim["caption"] in text and f"{name:12}" in shown
        assert claim["rule"] in claim["caption"] and any(where.startswith("ar") for where in claim["numbers"])
        for where, ok in claim["holds"].items():
            assert f"**{where}**" in claim["caption"]
        assert claim["caption"].count("DOES NOT HOLD") == list(claim["holds"].values()).count(False), "captions say what the numbers say"
        assert where != "toy" or name in ("theorem1", "theorem2", "proposition1", "lemma6", "theorem3")
    toys = {name: claim["holds"]["toy"] for name, claim in report["claims"].items() if "toy" in claim["holds"]}
    assert len(toys) == 5 and all(toys.values()), toys


def test_without_models_the_toys_are_shown_and_the_rest_is_left_out(tmp_path, capsys):
    theory.main(["--fast", "--out_dir", str(tmp_path)])
    assert sorted(f.stem for f in tmp_path.glob("*.png")) == ["lemma6", "proposition1", "theorem1", "theorem2", "theorem3"]
    shown = capsys.readouterr().out
    assert "mar          skipped: no --mar given" in shown and "gap          left out" in shown


@pytest.mark.parametrize("argv, words", [
    (["--sed", "1"], "did you mean --seed"), (["--n", "1"], "at least 4"), (["--classes", "1"], "at least 2"), (["--n", "many"], "not a whole number"),
    (["--claims", "theorem9"], "theorem9"), (["--ref_split", "test"], "heldout"), (["--ar", "nowhere"], "no checkpoint at nowhere"),
    (["--mar", "AR"], "holds a model of kind ar"), (["--ar", "AR", "--device", "abacus"], "abacus"), (["--out_dir", "FILE", "--claims", "lemma6"], "FILE")])
def test_bad_input_to_theory_is_one_line_and_exit_code_2(argv, words, untrained, tmp_path, capsys):
    file = tmp_path / "FILE"
    file.write_text("")
    argv = [{"AR": str(untrained["ar"]), "FILE": str(file)}.get(a, a) for a in argv]
    with pytest.raises(SystemExit) as stop:
        theory.run(argv if "--out_dir" in argv else [*argv, "--out_dir", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and words in err, err
