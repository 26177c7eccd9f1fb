"""Tests of ablate.py, rivals.py and theory.py: rivals against their definitions, toys against
closed forms, observations against a teacher-forced pass, both commands at tiny size."""
import csv
import json
import re
import shlex
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ablate
import data
import evaluate
import command
import ot_refine
import rivals
import sample
import theory
from files import save_checkpoint
from model import build, preset

torch.set_num_threads(1)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny(name, **changes):
    """A model with random weights, no parameter at zero, for tokens (4, 64) of the digits."""
    torch.manual_seed(0)
    model = build(preset(name, **{**dict(token_dim=64, grid=2, num_classes=10), **changes}))
    for p in model.parameters():
        if p.abs().max() == 0:
            torch.nn.init.normal_(p, std=0.02)
    model.diffloss.x0_bound = 1.0                        # as load_model sets it
    return model.eval()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{kind: run folder} of such models, and "early": a smaller ar model."""
    facts, out = data.load("digits", size=16, patch=8).facts, {}
    for key, name, changes in (("ar", "gpt-tiny", {}), ("mar", "mar-tiny", {}),
                               ("cdm", "cdm-tiny", {}), ("early", "gpt-tiny", {"n_layer": 3})):
        m, out[key] = tiny(name, **changes), tmp_path_factory.mktemp(key)
        state = {"config": asdict(m.cfg), "model": m.state_dict(), "ema": m.state_dict(),
                 "step": 0, "data": facts}
        save_checkpoint(out[key] / "ckpt.pt", state)
    return out


def real_tokens(k, m):
    """Stands for sample.tokens_of: 30 images of each class."""
    return randn(30, 4, 64, seed=k)[:m]


# ---------------------------------------------------------------- the rivals

CLOUDS = randn(200, 5) @ randn(5, 5, seed=1) + 3, 2 * randn(90, 5, seed=2) - 1


def test_the_mean_rival_moves_the_mean_and_nothing_else():
    c, target = CLOUDS
    moved = rivals.Mean.fit(c, target)(c)
    assert torch.allclose(moved.mean(0), target.mean(0), atol=1e-5)
    assert torch.allclose(moved - moved.mean(0), c - c.mean(0), atol=1e-5)


def test_the_mean_and_variance_rival_matches_both_and_shifts_a_single_condition():
    c, target = CLOUDS
    moved = rivals.MeanVar.fit(c, target)(c)
    assert torch.allclose(moved.mean(0), target.mean(0), atol=1e-5)
    # the pooled variance counts as one observation more: 1 part in 90
    assert torch.allclose(moved.var(0), target.var(0), rtol=0.05)
    one = rivals.MeanVar.fit(c[:1], target)
    assert torch.allclose(one(c), c - c[0] + target.mean(0), atol=1e-4)
    assert rivals.MeanVar.fit(c[:1].expand(3, -1), target[:1])(c).isfinite().all()


def test_the_running_mean_weighs_later_targets_more_and_is_one_point():
    c, target = CLOUDS
    running = target[0]
    for y in target[1:]:                     # decay .99; the rest of the first target's weight,
        running = 0.99 * running + 0.01 * y  # .99^89, is what normalisation takes away
    first = 0.99 ** (len(target) - 1)
    ideal = (running - first * target[0] * 0.99) / (1 - first * 0.99)
    moved = rivals.EMA.fit(c, target)(c)
    assert moved.shape == c.shape and (moved == moved[0]).all()
    assert torch.allclose(moved[0], ideal, atol=1e-4)


def test_the_nearest_rival_averages_the_five_nearest_targets():
    c, target = CLOUDS
    far = (c[:, None] - target).square().sum(-1)
    want = torch.stack([target[row.argsort()[:5]].mean(0) for row in far])
    assert torch.allclose(rivals.Nearest.fit(c, target)(c), want, atol=1e-5)
    assert torch.allclose(rivals.Nearest.fit(c, target[:2])(c), target[:2].mean(0).expand(200, 5))


@pytest.mark.parametrize("name", rivals.RIVALS)
def test_every_rival_is_a_map_of_the_refiner_and_can_be_saved(name):
    axes, targets = torch.eye(6)[None].expand(2, 6, 6), randn(2, 40, 6, seed=3)
    make = lambda: ot_refine.Refiner(axes, targets, ot_refine.stages_of(name, 1, float("inf")))
    refiner, c = make(), randn(30, 6)
    moved = refiner(1, c)
    frozen = make().load(refiner.state())
    assert torch.equal(frozen(1, c), moved) and not torch.equal(moved, c)


# ---------------------------------------------------------------- the literal algorithm, controls

def conditions_that_reveal(model, k, m):
    """Patches x (m, N, D) of class k in its order, and conditions (m, N, C) that one patch and its
    position decide."""
    order = model.order(k)
    x = real_tokens(k, m)[:, order]
    return x, x @ randn(64, model.cfg.n_embd, seed=7) / 8 + order[:, None]


@pytest.mark.parametrize("name", ["gpt-tiny", "mar-tiny"])
def test_t_inverse_is_the_condition_that_a_patch_reveals_by_real_images_of_all_classes(
        name, monkeypatch):
    model = tiny(name)
    monkeypatch.setattr(rivals, "ideal_conditions", lambda model, x, k, order, num_iter: (
        conditions_that_reveal(model, k, len(x))[1].transpose(0, 1)))
    refinement = sample.Refinement(model, real_tokens, {}, lam=0.1, inverse_of=len)
    state = torch.get_rng_state()
    T = rivals.inverse_map(refinement)
    assert torch.equal(state, torch.get_rng_state()) and rivals.inverse_map(refinement) is T
    (x, c), order = conditions_that_reveal(model, 3, 30), model.order(3)
    # 1000 steps on 300 images: what is left is 1 % of the variance
    assert (T(x, order.expand(30, -1)) - c).square().mean() < 0.03 * c.var()


@pytest.mark.parametrize("name", ["gpt-tiny", "mar-tiny"])
def test_a_is_t_inverse_of_one_evaluation_or_of_a_whole_ddim_trajectory(name, monkeypatch):
    model, c = tiny(name), randn(7, preset(name).n_embd)
    T = rivals.InverseMap(64, model.cfg.n_embd, 4)
    monkeypatch.setattr(rivals, "inverse_map", lambda refinement: T)
    refinement = sample.Refinement(model, real_tokens, {}, seed=5)
    z = sample.ImageNoise(-6, [-1]).randn(4, 64)[0, 2].expand(7, -1)
    position = torch.full((7,), int(model.order(3, 5)[2]))
    head = model.diffloss
    with torch.no_grad():
        one = head.denoiser([900], c)(z, 900)[0]
        whole = head.sample(c, None, 1.0, z[None], solver="ddim", steps=25)
        for inverse_of, x in ((rivals.one_evaluation, one), (rivals.whole_trajectory, whole)):
            # fp32, where x0 is bounded
            assert torch.allclose(inverse_of(refinement, 3)(2, c), T(x, position), atol=1e-4)
    assert not torch.allclose(one, whole, atol=0.1)


def test_the_literal_algorithm_runs_a_trajectory_in_each_of_its_steps(monkeypatch):
    model, calls = tiny("gpt-tiny"), []
    draw = model.diffloss.sample
    monkeypatch.setattr(model.diffloss, "sample",
                        lambda *a, **k: calls.append(a[4:] or k) or draw(*a, **k))
    refinement = sample.Refinement(model, real_tokens, {"steps": 2}, **ablate.LITERAL)
    refiner = refinement.refiner(0)
    sample.draw(model, torch.zeros(6, dtype=torch.long), range(6), 0,
                lambda i, c, y: refiner(i, c), steps=2)
    inner = [call for call in calls if call == ("ddim", 25)]
    assert len(inner) == 2 * 3 and len(calls) == len(inner) + 4, "K = 2 at 3 of 4 places"


def test_the_shuffled_control_moves_images_by_the_displacements_of_their_class():
    y, c = torch.arange(60) % 3, torch.full((60, 2), 7.0)
    refine = lambda i, c, y: c + torch.arange(60.0)[:, None]
    taken = (rivals.shuffled(None, 1, refine, y, None)(0, c, y) - c)[:, 0].long()
    assert torch.equal(taken.sort().values, torch.arange(60)), "each displacement is used once"
    assert torch.equal(y[taken], y) and (taken != torch.arange(60)).sum() > 40


@pytest.mark.parametrize("name", ["gpt-tiny", "mar-tiny"])
def test_the_oracle_draws_each_image_under_the_conditions_of_a_real_one_of_its_class(name):
    model = tiny(name)
    refinement = sample.Refinement(model, real_tokens, {}, method="none")
    index = torch.arange(60)
    given = {seed: rivals.ideal(refinement, seed, None, index % 10, index) for seed in (0, 1)}
    c = torch.stack([given[0](i, randn(1), None) for i in range(4)])                 # (N, B, C)
    for k in range(10):
        order, y = model.order(k).expand(30, -1), torch.full((30,), k)
        with torch.no_grad():
            real = model.conditions(real_tokens(k, 30), y, order).transpose(0, 1)
        far = (c[:, k::10, None] - real[:, None]).abs().amax((0, 3))                 # (6, 30)
        # a batch of 30 is computed as one here as there: equal but for rounding
        assert far.amin(1).max() < 1e-4 and len(set(far.argmin(1).tolist())) == 6
    assert not torch.equal(given[1](1, randn(1), None), c[1]), "another seed, other images"


# ---------------------------------------------------------------- cheaper fixes

def eps_of(head, x_t, t, x0):
    return (head.schedule.x0_from_xt[t] * x_t - x0) / head.schedule.x0_from_eps[t]


def test_epsilon_scaling_divides_eps_by_lambda_and_is_drawn_from_no_faster_copy(monkeypatch):
    model, c, x_t = tiny("gpt-tiny"), randn(5, 64), randn(5, 64, seed=1)
    monkeypatch.setattr(sample, "fast_copy", lambda model: "a copy")
    model.diffloss.x0_bound = None
    plain = model.diffloss.denoiser([600], c)(x_t, 600)[0]
    with rivals.fixed(model, (rivals.epsilon_scaling, 1.25)):
        scaled = model.diffloss.denoiser([600], c)(x_t, 600)[0]
        assert sample.fast_copy(model) is model
    assert sample.fast_copy(model) == "a copy"
    a, b = (eps_of(model.diffloss, x_t, 600, x0) for x0 in (plain, scaled))
    assert torch.allclose(b, a / 1.25, atol=1e-5) and a.abs().mean() > 0.1


def test_late_epsilon_scaling_leaves_the_steps_of_much_noise_as_they_are():
    model, c, x_t = tiny("gpt-tiny"), randn(5, 64), randn(5, 64, seed=1)
    head, early, late = model.diffloss, 237, 83                  # sigma = .37 and .14
    head.x0_bound = None
    plain = {t: head.denoiser([t], c)(x_t, t)[0] for t in (early, late)}
    with rivals.fixed(model, (rivals.late_epsilon_scaling, 0.9)):
        scaled = {t: head.denoiser([t], c)(x_t, t)[0] for t in (early, late)}
    assert torch.equal(scaled[early], plain[early])
    a, b = (eps_of(head, x_t, late, x0[late]) for x0 in (plain, scaled))
    assert torch.allclose(b, a / 0.9, atol=1e-4) and a.abs().mean() > 0.1


def test_guidance_in_an_interval_is_guidance_below_its_noise_level_and_none_above():
    model, c, null, x_t = tiny("gpt-tiny"), randn(5, 64), randn(5, 64, seed=2), randn(5, 64, seed=1)
    head = model.diffloss
    ts = [900, 100]
    both = {t: (head.denoiser(ts, c, null, 2.0)(x_t, t)[0], head.denoiser(ts, c)(x_t, t)[0])
            for t in ts}
    with rivals.fixed(model, (rivals.guidance_interval, 0.5)):
        denoise = head.denoiser(ts, c, null, 2.0)
        assert torch.equal(denoise(x_t, 100)[0], both[100][0])
        assert torch.equal(denoise(x_t, 900)[0], both[900][1])
    assert not torch.equal(*both[100]) and not torch.equal(*both[900])


def test_autoguidance_draws_from_the_earlier_model_at_scale_0_and_from_the_model_at_scale_1():
    model, weak = tiny("gpt-tiny"), tiny("gpt-tiny")
    for p in weak.diffloss.parameters():                 # sees its conditions, and another ones
        torch.nn.init.normal_(p, std=0.2)
    model.weak = [weak]
    given = torch.arange(4), range(4), 0
    own, other = (sample.draw(m, *given, solver="dpm++", steps=3) for m in (model, weak))
    for scale, want in ((0.0, other), (1.0, own), (2.0, None)):
        with rivals.fixed(model, (rivals.autoguidance, scale)):
            x = sample.draw(model, *given, solver="dpm++", steps=3)
        # one batch of branches or two: rounding of fp32
        assert want is None or torch.allclose(x, want, atol=1e-4)
    assert not torch.allclose(x, own, atol=1e-2) and not torch.allclose(own, other, atol=1e-2)
    assert torch.equal(sample.draw(model, *given, solver="dpm++", steps=3), own), "undone"


@pytest.mark.parametrize("name", rivals.TRAININGS)
def test_a_rival_trains_on_a_spoilt_context_and_clean_targets_and_is_judged_as_any_ar(name):
    cfg = preset("gpt-tiny", token_dim=64, grid=2, num_classes=10, dropout=0.0)
    torch.manual_seed(0)
    model = rivals.TRAININGS[name](cfg)
    for p in model.diffloss.parameters():                # sees its conditions
        torch.nn.init.normal_(p, std=0.05)
    plain = build(cfg)
    plain.load_state_dict(model.state_dict())
    x, y = randn(6, 4, 64).clamp(-1, 1), torch.arange(6)
    draws = model.randomness(6, torch.Generator().manual_seed(0))
    want = plain.loss(x, y, draws)
    assert torch.equal(model.eval().loss(x, y, draws), want)
    y = model.with_null(y, draws["drop"])
    c = plain.conditions(model.context(x, y, draws), y)
    clean = plain.head_loss(x, c, draws)
    assert torch.equal(model.train().loss(x, y, draws), clean)
    assert not torch.allclose(clean, want, rtol=1e-6)
    small = {**draws, "level": 0 * draws["level"]}
    # own draws: at t = 0 the noise that is left has a size of .006
    assert torch.allclose(model.context(x, y, small), x, atol=0 if name == "noise" else 0.05)
    assert not model.context(x, y, draws).requires_grad


def test_a_rival_is_trained_by_one_command_and_resumed_as_what_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(rivals.train, "build", build)
    monkeypatch.setattr(rivals.train, "SETTINGS", dict(rivals.train.SETTINGS))
    monkeypatch.setattr("sys.argv", ["ablate.py"])
    flags = ["--out_dir", tmp_path / "run", "--steps", 2, "--patch", 8, "--set", "eval_images=8"]
    ablate.main(["train", "noise", *flags])
    args = ablate.parse_args(["better", "--ar", str(tmp_path / "run")])
    job = ablate.open_jobs(args)["ar"]
    assert job.about == "2 steps, 0.55M, trained with noise"
    with pytest.raises(ValueError, match="holds another run .rival noise -> own"):
        ablate.main(["train", "own", *flags])
    with pytest.raises(ValueError, match="train which rival"):
        ablate.main(["train", "noises"])


# ---------------------------------------------------------------- whose eyes

def test_principal_components_of_training_images_are_uncorrelated_and_of_mean_variance_1():
    images = (randn(300, 4, 4, 1).abs() * 60).clamp(0, 255).to(torch.uint8)
    space = rivals.Principal(evaluate.pixels, images, "cpu", most=5)
    x = evaluate.extract(space, images)[0]
    cov = x.T.cov()
    assert x.shape == (300, 5) and x.mean(0).abs().max() < 1e-4
    assert (cov - cov.diag().diag()).abs().max() < 1e-4 and abs(cov.diag().mean() - 1) < 1e-4
    assert torch.equal(*(rivals.random_convolutions(1)(randn(2, 1, 16, 16)) for _ in range(2)))


def test_tuning_takes_a_sixth_of_each_class_of_the_training_images_and_no_other():
    whole = data.load("digits")
    part = rivals.tuning(whole)
    train, held = ({tuple(x.flatten().tolist()) for x in s.batch(range(len(s)))[0]}
                   for s in (part.train, part.heldout))
    assert not train & held and len(part.train) + len(part.heldout) == len(whole.train)
    assert (part.heldout.labels.bincount() - whole.train.labels.bincount() / 6).abs().max() < 1
    images, labels = part.train.batch(part.train.of_class(3, 7))
    assert len(images) == 7 and (labels == 3).all() and (images[0] <= 1).all()


# ---------------------------------------------------------------- the questions

@pytest.fixture
def quick_judge(monkeypatch):
    """Random features and logits instead of a trained classifier; a small network."""
    W, V = randn(256, 16), randn(256, 10, seed=1)

    def space(images):
        x = images.flatten(1).float() / 255
        return x @ W, x @ V

    monkeypatch.setattr(evaluate, "make_extractor", lambda *a, **k: space)
    monkeypatch.setattr(rivals, "random_convolutions", lambda channels: torch.nn.Flatten())
    monkeypatch.setattr(evaluate, "kid", lambda x, y: (0.0, 0.0))    # the slowest measure


def argv(runs, out, *more, kinds=("ar",), question="parts"):
    models = [a for kind in kinds for a in (f"--{kind}", runs[kind])]
    small = ["--n", 20, "--n_cal", 8, "--seeds", 2, "--steps", 2]
    return [str(a) for a in (*question.split(), *models, *small, "--out_dir", out, *more)]


def table_of(path):
    with open(path) as f:
        return list(csv.DictReader(f))


def study(runs, out, *more, **how):
    args = ablate.parse_args(argv(runs, out, *more, **how))
    return ablate.Study(args, ablate.open_jobs(args))


def test_each_mar_row_draws_in_the_orders_that_it_names(runs, quick_judge, tmp_path, monkeypatch):
    s, seen = study(runs, tmp_path, "--n_cal", 4, kinds=("mar",)), []
    model = s.jobs["mar"].model
    generate = model.generate
    watch = lambda self, y, noise, order=None, **k: seen.append((y, order)) or generate(
        y, noise, order=order, **k)
    monkeypatch.setattr(type(model), "generate", watch)
    for row in ablate.which_order(s.jobs):
        few = row.refine and {**row.refine, "m": 25}
        row = ablate.complete(row._replace(refine=few), s.args)
        seen.clear()
        s.draw(row, s.refinement(row)[0], torch.arange(20) % 10, 0)
        if row.name.startswith("fresh"):
            assert [order for _, order in seen] == [None]
            continue
        y, order = (torch.cat(z) for z in zip(*seen))
        if "raster" in row.name:
            assert (order == torch.arange(4)).all()
        else:
            assert all(torch.equal(o, model.order(int(k)))
                       for o, k in zip(order, y)) and len(order.unique(dim=0)) > 3


def test_every_row_fits_its_model_and_every_figure_a_screen(runs):
    args = ablate.parse_args(["parts", "--ar", str(runs["ar"]), str(runs["early"]), "--mar",
                              str(runs["mar"]), "--cdm", str(runs["cdm"]), "--guide",
                              str(runs["early"])])
    jobs, used = ablate.open_jobs(args), set()
    tried = ablate.fixes_at_every_value(jobs)
    assert {row.group for row in tried} == {*ablate.FIXES}
    for name, question in ablate.QUESTIONS.items():
        rows = question(jobs, tried[::4]) if name == "cheaper" else question(jobs)
        meant = {r.name: r._replace(group="", x=None) for r in rows}
        assert len(rows) <= 40 and all(r._replace(group="", x=None) == meant[r.name] for r in rows
                                       if r.name != "none"), "a table has a line a name"
        assert len([r for r in rows if r.x is None]) <= 16
        for row in (ablate.complete(r, args) for r in rows):
            model, how = jobs[row.model].model, row.sampling
            model.diffloss.solver(how["solver"]).timesteps(how["steps"])
            if row.refine is not None:       # raises ValueError where they do not fit
                ablate.refinement_of(model, real_tokens, how, row.refine)
                used.add(row.refine["method"])
    assert used == {*ot_refine.MAPS, "none", "default", "shared"}


def test_a_result_is_known_by_all_that_it_depends_on_and_by_nothing_else(runs, quick_judge,
                                                                         tmp_path):
    s = study(runs, tmp_path, "--guide", runs["early"])
    plain_args = s.args

    def key(row, seed=0, **changes):
        s.args = type(s.args)({**vars(plain_args), **changes}, set(), {})
        return s.key(ablate.complete(row, s.args), seed)

    row = ablate.Row("g", "n", {})
    fix = lambda name, v: row._replace(fix=(getattr(rivals, name), v))
    with_ = lambda **refine: row._replace(refine=refine)
    others = [key(row), key(row, 1), key(row, n=30), key(row, n_cal=9),
              key(row, steps=9), key(row, cfg_scale=2.0), key(with_(K=3)), key(with_(seed=1)),
              key(with_(coupled=True)), key(with_(coupled=True)._replace(at_once=2)),
              key(row._replace(refine=None)), key(row._replace(recalibrate=True)),
              key(row._replace(control=rivals.shuffled)), key(with_(method="mean")),
              key(row._replace(sampling={"temperature": 2.0})),
              key(fix("epsilon_scaling", 1.1)), key(fix("epsilon_scaling", 1.2)),
              key(fix("late_epsilon_scaling", 1.1)), key(fix("guidance_interval", 1.1)),
              key(fix("autoguidance", 1.1)),
              key(with_(orders="raster")),
              *(key(with_(lam=0.1, inverse_of=x)) for x in (rivals.one_evaluation,
                                                             rivals.whole_trajectory))]
    guided, s.guide = key(fix("autoguidance", 1.1)), "another"
    others.append(key(fix("autoguidance", 1.1)))
    s.tune = True
    others.append(key(row))
    s.tune, s.origins = False, {"ar": ["another"]}
    others.append(key(row))
    assert len(set(others)) == len(others) and guided in others
    assert key(row._replace(group="h", name="m", x=1)) == key(row), "names do not matter"
    assert key(with_(K=2, eta=2.0)) == key(row), "defaults that are spelled out are the same"
    plain = row._replace(refine=None)
    assert key(plain, n_cal=9, batch_size=9) == key(plain), "nor what has no effect"


def test_a_killed_question_goes_on_where_it_was_and_repeats_nothing(runs, quick_judge, tmp_path,
                                                                    monkeypatch, capsys):
    monkeypatch.setitem(ablate.QUESTIONS, "parts", lambda jobs: [
        ablate.Row("parts", "none"), ablate.Row("parts", "mean", {"method": "mean"}),
        ablate.Row("K", "0", x=0), ablate.Row("K", "2", {"method": "mean"}, x=2)])
    draw, count = ablate.draw_images, []

    def counted(*a, **k):
        count.append(0)
        if len(count) == 4:
            raise KeyboardInterrupt
        return draw(*a, **k)

    monkeypatch.setattr(ablate, "draw_images", counted)
    with pytest.raises(KeyboardInterrupt):
        ablate.main(argv(runs, tmp_path))
    assert len(count) == 4, "two seeds of the first row, one of the second"
    with open(tmp_path / "rows.jsonl", "a") as f:
        f.write('{"key": "cut o')                                    # as a kill leaves it
    first = (tmp_path / "rows.jsonl").read_text().splitlines()[:3]

    capsys.readouterr()
    ablate.main(argv(runs, tmp_path))
    out, err = capsys.readouterr()
    assert len(count) == 5 and out.count("(known)") == 3 and "min left" in out, out
    assert "is damaged and left out" in err
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert lines[:3] == first and len(lines) == 2 * 2, "equal options share their results"

    table = table_of(tmp_path / "parts.csv")
    assert [r["name"] for r in table] == ["training images", "none", "mean", "0", "2"]
    assert table[1]["fid"] == table[3]["fid"] != table[2]["fid"] == table[4]["fid"]
    for r in table[1:]:
        assert r["seeds"] == "2" and all(float(r[k]) >= 0 for k in (
            "fid", "fid_std", "accuracy", "precision", "recall", "copy_ratio", "pixels fid"))
    for name in ("parts", "parts-curves"):
        assert 1000 < (tmp_path / f"{name}.png").stat().st_size < 60_000
    lines = (tmp_path / "parts.md").read_text().splitlines()
    assert lines[2].startswith("| none | ") and len(lines) == 2 + 4 + 1

    monkeypatch.setattr(sample, "code_digest", lambda: "another")
    ablate.main(argv(runs, tmp_path, "--any_code"))
    assert len(count) == 5
    ablate.main(argv(runs, tmp_path))
    assert len(count) == 9, "changed code may give other results"


def test_a_cheaper_fix_is_chosen_on_training_images_and_reported_on_the_others(
        runs, quick_judge, tmp_path, monkeypatch):
    fixes = {v: dict(sampling=dict(temperature=v)) for v in (0.5, 1.5, 2.5)}
    monkeypatch.setattr(ablate, "FIXES", {"temperature": fixes})
    drawn, measured = [], {0.5: 9.0, 1.5: 3.0, 2.5: 2.0}

    def measure(self, row, todo):
        drawn.append((self.tune, len(self.data.heldout), row.name, len(todo)))
        fid = measured.get(row.sampling.get("temperature"), 7.0)
        v = {k: fid for k in ("fid", "accuracy", "precision", "recall", "pixels fid")}
        v["convolutions fid"] = 9.0 if fid == 2.0 else 1.0           # good in one's eyes only
        yield from ((key, v) for key in todo)

    monkeypatch.setattr(ablate.Study, "measure", measure)
    ablate.main(argv(runs, tmp_path, question="cheaper"))
    names = [f"temperature {v}" for v in fixes]
    assert drawn == [(True, 320, name, 1) for name in names] + [
        (False, 946, name, 2) for name in ("none", "refined", names[1], f"{names[1]}, refined")]
    tuned = table_of(tmp_path / "cheaper-tune.csv")[1:]
    assert [float(r["fid"]) for r in tuned] == [9, 3, 2]


def test_only_some_rows_run_and_the_literal_algorithm_is_one_of_them(runs, quick_judge, tmp_path):
    more = ("--seeds", 1, "--only", "literal", "raster + ref", "works: CDM")
    three = dict(kinds=("ar", "mar", "cdm"), question="works parts orders")
    ablate.main(argv(runs, tmp_path, *more, **three))
    names = [r["name"] for q in ("works", "parts", "orders")
             for r in table_of(tmp_path / f"{q}.csv")[1:]]
    assert names == ["CDM", "CDM, not guided", "literal Algorithm 1", "raster + refinement"]


def test_failures_show_the_images_whose_class_suffered_most(runs, quick_judge, tmp_path, capsys):
    ablate.main(argv(runs, tmp_path, "--n", 30, "--seeds", 1, question="fails"))
    assert "of 30 images " in capsys.readouterr().out
    with Image.open(tmp_path / "fails-grid.png") as sheet:
        assert sheet.size == ((20 * 17 + 1) * 3, (2 * 17 + 1) * 3)
        first = np.array(sheet)[1::3, 1::3][1:17, 1:17]              # unrefined, the worst
    # by the fixture's judge, once more
    s = study(runs, tmp_path, "--n", 30, question="fails")
    labels, logp = torch.arange(30) % 10, []
    for row in (ablate.complete(r, s.args) for r in ablate.where_does_it_fail(s.jobs)):
        images = torch.from_numpy(s.draw(row, s.refinement(row)[0], labels, 0))
        logp.append(s.judges.main.space(images)[1].log_softmax(1)[range(30), labels])
        if row.refine is None:
            plain = images
    assert np.array_equal(first, plain[(logp[1] - logp[0]).argmin(), ..., 0])


def test_coupled_rows_see_as_many_images_of_a_class_at_once_as_they_say(runs, quick_judge,
                                                                        tmp_path, monkeypatch):
    s, sizes = study(runs, tmp_path, "--n", 60), []
    for map in (ot_refine.Sinkhorn, ot_refine.Gaussian):
        monkeypatch.setattr(map, "fit", classmethod(
            lambda cls, c, *rest, fit=map.fit: sizes.append(len(c)) or fit(c, *rest)))
    row = ablate.Row("", "3", dict(method="sinkhorn", coupled=True, K=1, m=20), x=3, at_once=3)
    draw = lambda row: s.draw(row, s.refinement(row)[0], torch.arange(60) % 10, 0)
    images = draw(ablate.complete(row, s.args))
    assert set(sizes) == {3} and len(sizes) == 20 * 3, "6 of a class, 3 refined places"
    plain = draw(ablate.complete(ablate.Row("", ""), s.args))
    assert images.shape == plain.shape == (60, 16, 16, 1) and plain.std() > 0
    blocks = draw(ablate.complete(ablate.Row("", "", at_once=3), s.args))
    assert np.abs(blocks.astype(int) - plain).max() <= 1, "batches differ by rounding"
    sizes.clear()
    draw(ablate.complete(row._replace(refine=ablate.SHARED | dict(m=20)), s.args))
    assert set(sizes) == {30} and len(sizes) == 2 * 3, "all classes in one map"


def test_a_row_that_cannot_run_is_named_and_the_others_go_on(runs, quick_judge, tmp_path, capsys):
    more = ("--seeds", 1, "--only", "coupled, 20 at", "parts: mean")
    ablate.main(argv(runs, tmp_path, *more, question="parts images"))
    err = capsys.readouterr().err
    assert "coupled, 20 at once is left out: 2 images of a class are drawn; raise --n" in err
    assert [r["name"] for r in table_of(tmp_path / "parts.csv")[1:]] == ["mean", "meanvar"]


@pytest.mark.parametrize("given, message", [
    (["parts"], "give --ar RUN, --mar RUN or --cdm RUN"),
    (["parts", "--ar", "nowhere"], "no checkpoint at nowhere"),
    (["parts", "--mar", "AR"], "holds a model of kind ar; give it as --ar"),
    (["parts", "--ar", "AR", "--only", "nothing"], "no row has nothing in its name"),
    (["orders", "--ar", "AR"], "orders: no row is of the models given"),
    (["parts", "--ar", "AR", "--sedes", "2"], "did you mean --seeds?"),
    (["part", "--ar", "AR"], "invalid choice: 'part'"),
    (["parts", "--ar", "AR", "AR", "--guide", "AR"], "AR, --guide would change nothing in parts"),
    (["parts", "--ar", "AR", "--solver", "euler"], "--solver euler does not fit"),
    (["parts", "--ar", "AR", "--n", "3"], "3 is out of range: at least 10"),
    (["parts", "--ar", "AR", "--data_dir", "nowhere"], "--data_dir would change"),
])
def test_bad_input_to_the_ablation_is_one_line_and_exit_code_2(runs, quick_judge, capsys, tmp_path,
                                                               given, message):
    given = [str(runs["ar"]) if a == "AR" else a for a in given]
    message = message.replace("AR,", f"{runs['ar']},") if "--guide" in given else message
    with pytest.raises(SystemExit) as stop:
        command.run(lambda: ablate.main([*given, "--out_dir", str(tmp_path / "o")]))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1, err


def test_every_command_of_the_text_names_questions_and_flags_that_exist():
    root = Path(ablate.__file__).parent
    page = " ".join((root / name).read_text() for name in ("README.md", "RESULTS.md", "ablate.py"))
    found = re.findall(r"python ablate\.py( [^`\n]*)", page.replace("\\\n", " "))
    assert len(found) >= 5
    for given in found:
        given = shlex.split(re.split(r"   |\.\.\.", given)[0])
        if given[0] == "train":
            assert given[1] in rivals.TRAININGS and rivals.train.parse_args(given[2:])
        else:
            assert ablate.parse_args(given).questions


def test_models_of_other_data_are_not_compared(runs, tmp_path):
    state = torch.load(runs["mar"] / "ckpt.pt", weights_only=True)
    state["data"] = {**state["data"], "n_train": 7}
    save_checkpoint(tmp_path / "ckpt.pt", state)
    with pytest.raises(ValueError, match="trained on different data: ar on 1934 .* mar on 7"):
        ablate.main(["parts", "--ar", str(runs["ar"]), "--mar", str(tmp_path)])


def test_tuning_sets_hold_no_held_out_image():
    pixels = lambda images: {x.tobytes() for x in images.images}
    whole, tuning = data.load("digits"), data.load("digits-tune")
    train, measured = pixels(tuning.train), pixels(tuning.heldout)
    assert not train & measured and not pixels(whole.heldout) & (train | measured)
    assert train | measured == pixels(whole.train), "nothing is lost"
    sets = data.load("shapes"), data.load("shapes-tune")
    first = {(s.first, s.first + s.n) for d in sets for s in (d.train, d.heldout)}
    ends = sorted(first)
    assert len(ends) == 3 and all(a[1] <= b[0] for a, b in zip(ends, ends[1:]))


# ---------------------------------------------------------------- statistics

def test_the_fit_of_a_decay_recovers_its_parameters():
    i = np.arange(16)
    for M, beta, m in ((2.0, 0.7, 1.0), (0.5, 0.3, -1.0), (-3.0, 0.9, 5.0)):
        got = theory.fit_decay((M * beta ** i + m)[None])[0]
        # the last grid of beta has a spacing of 3e-6; M and m share its error
        assert np.allclose(got, (M, beta, m, 1), atol=2e-4), got
    flat = theory.fit_decay(np.full((1, 16), 3.0))[0]
    assert flat[[0, 3]].tolist() == [0, 0], "a constant does not decay"


def test_bootstrap_intervals_cover_the_truth():
    """100 data sets of 60 noisy curves: that a 95 % interval covers 85 times or less would be a
    4-sigma event."""
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
    share, mu, t = np.array([0.5, 0.3, 0.2]), np.array([-2, 0.5, 2.5]), 300
    std, rng, n = np.array([0.4, 0.7, 0.5]), np.random.default_rng(0), 400_000
    alpha, sigma = theory.SCHEDULE.alpha[t], theory.SCHEDULE.sigma[t]
    k = rng.choice(3, n, p=share)
    x_t = alpha * (mu[k] + std[k] * rng.normal(size=n)) + sigma * rng.normal(size=n)
    cond = -(x_t - alpha * mu[k]) / (alpha ** 2 * std[k] ** 2 + sigma ** 2)
    l_cond = np.square(-(x_t - x_t.mean()) / x_t.var() - cond).mean()
    # the standard error of the mean is 0.2 %
    assert abs(l_cond / theory.toy_theorem1([t])[0, 0] - 1) < 0.01


@pytest.mark.parametrize("r", [0.4, 0.8])
def test_theorem_2_toy_decays_at_the_spectral_radius_and_only_where_x_does_not_follow_c(r):
    chain, t = theory.toy_chain(r), 400
    G, fixed = theory.toy_theorem2(chain, 24, t)
    # squared norm: beta = r^2, to the fit's grid
    assert abs(theory.fit_decay(G[None])[0, 1] ** 0.5 - r) < 1e-4
    alpha, sigma = theory.SCHEDULE.alpha[t], theory.SCHEDULE.sigma[t]
    (c, x), rng = chain.sample(200_000, 3), np.random.default_rng(1)
    mean, cov = chain.stationary()
    V = alpha ** 2 * chain.R + sigma ** 2
    apart = rng.multivariate_normal(alpha * mean, alpha ** 2 * cov + V * np.eye(4), 200_000)
    follows = alpha * x[2] + sigma * rng.normal(size=x[2].shape)
    energy = lambda x_t: np.square((alpha * c[2] - x_t) / V).sum(1).mean()
    # Monte Carlo error of about 0.1 %
    assert abs(energy(apart) / G[2] - 1) < 0.01 and abs(energy(follows) / fixed - 1) < 0.01


def test_the_linear_chain_has_the_moments_that_it_states():
    chain = theory.toy_chain(0.8, normal=False, spread=4.0)
    assert np.isclose(np.abs(np.linalg.eigvals(chain.A)).max(), 0.8)
    c, x = chain.sample(200_000, 4)
    mean, cov = chain.moments(4)[3]
    # 5 standard errors
    assert np.abs(c[3].mean(0) - mean).max() < 0.02 and np.abs(np.cov(c[3].T) - cov).max() < 0.02
    residual = c[3] - mean - (x[3] - mean) @ chain.gain(cov).T
    left = (residual - residual.mean(0)).T @ (x[3] - mean) / len(x[3])
    assert np.abs(left).max() < 0.02, "E[c | x] leaves nothing to regress on x"
    mean, cov = chain.stationary()
    assert np.allclose(chain.A @ mean + chain.b, mean)
    assert np.allclose(chain.A @ cov @ chain.A.T + chain.Q * np.eye(4), cov)


def test_proposition_1_toy_settles_at_the_spectral_radius_from_any_spread():
    for spread in (1.0, 4.0):
        w2, left = theory.toy_proposition1(theory.toy_chain(0.7, spread=spread), 16)
        assert (np.diff(w2) < 0).all() and ((0 < left) & (left < 1)).all()
        assert abs(w2[-1] / w2[-2] - 0.7) < 2e-3         # the covariance's part died as r^(2i)
    assert np.allclose(w2[1:] / w2[:-1], 0.7, atol=0.1)


@pytest.mark.parametrize("normal", [True, False])
def test_lemma_6_energy_is_propagated_plus_injected(normal):
    chain = theory.toy_chain(0.8, normal=normal, spread=4.0)
    energy, propagated, injected = theory.toy_lemma6(chain, 10)
    assert np.abs(energy[1:] - propagated - injected).max() < 1e-10
    assert (propagated > 0).all() and (injected > 0).all()
    centred = [z - z.mean(1, keepdims=True) for z in chain.sample(200_000, 3)]
    found = [np.square(c - x @ chain.gain(P).T).sum(1).mean()
             for c, x, (_, P) in zip(*centred, chain.moments(3))]
    assert np.allclose(found, energy[:3], rtol=0.01)     # Monte Carlo error of about 0.2 %


@pytest.mark.parametrize("eta, implicit", [(0.1, True), (0.5, True), (3.0, True), (0.1, False),
                                           (0.4, False)])
def test_theorem_3_toy_contracts_at_exactly_rho(eta, implicit):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 3)) * 2 + 1, rng.normal(size=(40, 3))
    w2 = theory.exact_flow(x, y, eta, 5, implicit)
    rho = 1 / (1 + 2 * eta) if implicit else abs(1 - 2 * eta)
    assert np.allclose(w2[1:] / w2[:-1], rho, rtol=1e-8)     # squares cancel to 1e-16 / rho^10


def test_exact_w2_of_a_translated_and_repeated_cloud_is_the_shift():
    x = randn(12, 3).double()
    assert abs(theory.exact_w2(x, torch.cat([x, x]) + torch.tensor([3.0, 4, 0])) - 5) < 1e-9


# ---------------------------------------------------------------- measurements

def test_noise_intensity_is_the_standard_deviation_of_white_noise():
    """On a plane, whose Laplacian is 0; the median of 16,000 values has an error of 1 %."""
    axis, level = torch.linspace(0, 1, 128), torch.tensor([0.1, 0.4])
    noise = randn(2, 1, 128, 128) * level[:, None, None, None]
    got = theory.noise_intensity(axis[:, None] + 2 * axis + noise)
    assert torch.allclose(got, level, rtol=0.05), got


def test_snr_is_20_db_for_a_tenth_of_the_amplitude():
    x0 = randn(3, 16, 4)
    got = theory.snr(torch.stack([0.9 * x0, 1.1 * x0, 0 * x0]), x0)[:, 0]
    assert torch.allclose(got, torch.tensor([20.0, 20, 0]), atol=1e-3)


@pytest.mark.parametrize("name", ["gpt-tiny", "mar-tiny", "cdm-tiny"])
def test_observed_chains_are_those_of_a_teacher_forced_pass_over_what_was_drawn(name):
    """Conditions by place, tokens by place, the sampler's x0 by position: all in their place."""
    model, n = tiny(name), 3
    kind, classes = model.cfg.kind, [2, 5]
    order = torch.tensor([2, 0, 3, 1]) if kind == "mar" else torch.arange(4)
    chain = theory.drawn(model, classes, n, {"steps": 3}, order, 0)
    x = chain.path[1][-1]                                # the last x0_hat is x0, by position
    assert chain.path[0] == [999, 500, 0] and x.shape == (6, 4, 64)
    again = theory.real_chain(model, lambda k, m: x[:n] if k == 2 else x[n:], classes, n, order)
    # one pass instead of a cache: rounding of fp32
    assert torch.allclose(chain.x, again.x, atol=1e-4)
    assert torch.allclose(chain.c, again.c, atol=1e-4) and torch.equal(chain.c, chain.before)
    assert chain.c.shape == (2, n, 1 if kind == "cdm" else 4, model.cfg.n_embd)


def test_a_refined_chain_holds_its_conditions_before_and_after():
    model, shift = tiny("gpt-tiny"), torch.linspace(-1, 1, 64)
    refiners = {k: lambda i, c: c + shift for k in (2, 5)}
    chain = theory.drawn(model, [2, 5], 3, {"steps": 2}, torch.arange(4), 0, refiners)
    moved = (chain.c - chain.before).flatten(0, 1)
    assert torch.equal(moved[:, 0], torch.zeros(6, 64)), "nothing is refined at place 0"
    assert torch.allclose(moved[:, 1:], shift.expand(6, 3, 64), atol=1e-5)


def subject(eps):
    """A Subject of 2 classes x 30 images of 2 patches whose model's eps is `eps(x_t, sigma, c)`."""
    x, c = randn(2, 30, 2, 3), randn(2, 30, 2, 5, seed=1)
    x[:, :, 0] = x[:, :3, 0].repeat(1, 10, 1)            # each first patch ten times: contexts
    sigma = lambda self, t: self.sigma[t][..., None]
    score = lambda self, x_t, t, c: -eps(x_t, sigma(self, t), c) / sigma(self, t)
    head = type("Head", (), {"score": score})()
    head.alpha, head.sigma = (torch.tensor(a, dtype=torch.float32)
                              for a in (theory.SCHEDULE.alpha, theory.SCHEDULE.sigma))
    chain = theory.Chain(x, c)
    model = type("Model", (), {"diffloss": head})()
    return theory.Subject("ar", model, torch.arange(2), 1, chain, chain, chain)


def test_a_model_that_ignores_c_obeys_theorem_1_on_real_data():
    """Two cases: eps = 0, eps = x_t. The mean residual over images is Monte Carlo: 0 within 4
    standard errors."""
    for eps in (lambda x_t, sigma, c: 0 * x_t, lambda x_t, sigma, c: x_t):
        v = theory.condition_errors(subject(eps))                                # (B, N, T, 5)
        assert np.array_equal(v[..., :2], v[..., 2:4]), "blind or not is the same for it"
        rest = (v[..., 0] - v[..., 1] - v[..., 4]).mean((1, 2))
        assert abs(rest.mean()) < 4 * rest.std() / len(rest) ** 0.5, rest.mean()


def test_the_true_conditional_score_escapes_theorem_1():
    """With c_i the patch itself, the score of a one-image context is (alpha x_i - x_t) / sigma^2:
    L_cond = 0, L_uncond = eps_c."""
    s = subject(None)
    s.targets.c = s.targets.x.clone()
    type(s.model.diffloss).score = lambda self, x_t, t, c: (
        self.alpha[t][..., None] * c - x_t) / self.sigma[t][..., None] ** 2
    v = theory.condition_errors(s)[:, 1]                 # patch 1: 3 contexts of 10 images
    assert v[..., 4].mean() > 0 and v[..., 0].mean() > 0, "the patch says more than its context"
    s.targets.x[:, :, 0] += torch.arange(30.0)[:, None] * 0.01       # now each context is unique
    s.targets.c = s.targets.x.clone()
    v = theory.condition_errors(s)[:, 1]                 # fp32 model against float64
    assert v[..., 0].max() < 1e-8 and np.allclose(v[..., 1], v[..., 4], rtol=1e-3, atol=1e-5)


def test_the_flow_of_theorem_3_is_that_of_the_refiner():
    """K Sinkhorn steps in all directions, coupled: what ot_refine.Refiner does at a place."""
    c, target = randn(2, 20, 2, 6), randn(2, 25, 2, 6, seed=1) + 1
    plain, targets = theory.Chain(None, c), theory.Chain(None, target)
    clouds, to = theory.flow(theory.Subject("ar", None, None, 1, targets, targets, plain), 1)
    stages = ot_refine.stages_of("sinkhorn", theory.K, theory.ETA)
    for k in range(2):
        axes = torch.eye(6)[None].expand(2, 6, 6)
        refiner = ot_refine.Refiner(axes, target[k, :20].transpose(0, 1), stages)
        assert torch.allclose(refiner(1, c[k, :, 1]), clouds[-1][k], atol=1e-5)
    assert torch.equal(clouds[0], c[:, :, 1]) and torch.equal(to, target[:, :20, 1])


# ---------------------------------------------------------------- the page

SMALL = ["--n", "6", "--m", "12", "--classes", "3", "--steps", "3", "--n_cal", "8"]


def test_an_untrained_model_gives_a_page_with_every_claim(runs, tmp_path, capsys):
    models = [str(a) for kind in ("ar", "mar", "cdm") for a in (f"--{kind}", runs[kind])]
    theory.main([*models, *SMALL, "--out_dir", str(tmp_path)])
    report = json.loads((tmp_path / "theory.json").read_text())["claims"]
    text, shown = (tmp_path / "theory.md").read_text(), capsys.readouterr().out
    assert list(report) == list(theory.CLAIMS)
    for name, claim in report.items():
        assert 2000 < (tmp_path / f"{name}.png").stat().st_size < 60 * 1024, name
        page = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        for part in (f"]({name}.png)", claim["claim"], claim["rule"], "| ar"):
            assert part in " ".join(page.split()), (name, part)
        assert claim["verdict"] in shown and claim["curves"]
        lines = [line for line in page.splitlines() if line[:2] == "| "]
        assert len(lines) <= 10 and max(map(len, lines)) < 150, "a small table"
        flags = [v for row in claim["rows"].values() for v in row.values() if isinstance(v, bool)]
        assert ("**does not hold**" in claim["verdict"]) == (False in flags), name
        assert "**holds**" in claim["verdict"] or False in flags
    toys = {name: [v for v in claim["rows"]["toy"].values() if isinstance(v, bool)]
            for name, claim in report.items() if "toy" in claim["rows"]}
    assert max(len(line) for line in text.splitlines() if line[:1] != "|") <= 120
    assert len(toys) == 5 and all(all(v) for v in toys.values()), toys


def test_a_claim_holds_only_where_all_its_rows_do_and_the_sentence_says_so():
    e = theory.Evidence("c", "r")
    e.judge("toy", {"bound": True, "identity": False}, number=1.0)
    e.judge("ar, i = 1", {"bound": True})
    e.judge("ar, i = 2", {"bound": False})
    e.judge("cdm", {}, number=[1.0, 0.5, 2.0])
    assert theory.verdicts(e) == {"bound": {"toy": True, "ar": False}, "identity": {"toy": False}}
    assert theory.verdict(e) == ("the bound **holds** for toy; the bound **does not hold** for ar; "
                                 "the identity **does not hold** for toy")
    assert theory.show([1.0, 0.5, 2.0]) == "1 [0.5, 2]" and theory.show(False) == "no"


def test_without_models_the_toys_are_shown_and_the_rest_is_left_out(tmp_path, capsys):
    theory.main(["--out_dir", str(tmp_path)])
    assert sorted(f.stem for f in tmp_path.glob("*.png")) == [
        "lemma6", "proposition1", "theorem1", "theorem2", "theorem3"]
    shown = capsys.readouterr().out
    assert "mar          skipped: no --mar given" in shown and "gap          left out" in shown


@pytest.mark.parametrize("given, words", [
    (["--sed", "1"], "did you mean --seed"), (["--n", "1"], "at least 4"),
    (["--classes", "1"], "at least 2"), (["--n", "many"], "not a whole number"),
    (["--claims", "theorem9"], "theorem9"), (["--ar", "nowhere"], "no checkpoint at nowhere"),
    (["--mar", "AR"], "holds a model of kind ar"),
    (["--ar", "AR", "--device", "abacus"], "abacus"),
    (["--out_dir", "FILE", "--claims", "lemma6"], "FILE")])
def test_bad_input_to_theory_is_one_line_and_exit_code_2(given, words, runs, tmp_path, capsys):
    file = tmp_path / "FILE"
    file.write_text("")
    given = [{"AR": str(runs["ar"]), "FILE": str(file)}.get(a, a) for a in given]
    more = [] if "--out_dir" in given else ["--out_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        command.run(lambda: theory.main([*given, *more]))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and words in err, err
