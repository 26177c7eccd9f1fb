"""evaluate.py: each metric against a closed form, the classifier, the Judge, the command against
bad input; at the end inception.py against recorded numbers."""
import hashlib
import json
import math
import os
import sys

import numpy as np
import ot
import pytest
import torch

import classifier
import data
import evaluate as ev
import sample
import train
from command import run

torch.set_num_threads(1)


def randn(*shape, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=gen)


# ---- the metrics

def test_frechet_distance_of_shifted_and_scaled_gaussians_is_the_closed_form():
    d = 32
    mu, eye = torch.zeros(d), torch.eye(d)
    # |shift|^2 + sum (s1 - s2)^2 for N(0, s1^2 I) and N(shift, s2^2 I); rounding of sums of 1e2
    assert ev.frechet_distance(mu, eye, mu + 3, eye) == pytest.approx(9 * d, abs=1e-10)
    found = ev.frechet_distance(mu, 4 * eye, mu + .5, 9 * eye)
    assert found == pytest.approx(.25 * d + d, abs=1e-10)
    # commuting covariances with any spectrum
    q, _ = torch.linalg.qr(randn(d, d))
    a, b = torch.logspace(-6, 2, d).double(), torch.logspace(1, -3, d).double()
    want = (a.sqrt() - b.sqrt()).square().sum().item()
    found = ev.frechet_distance(mu, (q * a) @ q.T, mu, (q * b) @ q.T)
    assert found == pytest.approx(want, rel=1e-9)
    # POT's Bures-Wasserstein distance as an independent oracle, general covariances
    m1, s1 = ev.gaussian(randn(100, 8))
    m2, s2 = ev.gaussian(randn(100, 8, seed=1) @ randn(8, 8, seed=2) + 1)
    want = ot.gaussian.bures_wasserstein_distance(m1, m2, s1, s2).item() ** 2
    assert ev.frechet_distance(m1, s1, m2, s2) == pytest.approx(want, rel=1e-8)


@pytest.mark.parametrize("n, d", [(1000, 64), (100, 256)])
def test_frechet_distance_of_a_set_to_itself_is_zero_even_with_a_singular_covariance(n, d):
    mu, S = ev.gaussian(randn(n, d) * torch.logspace(1, -3, d))
    assert ev.frechet_distance(mu, S, mu, S) < 1e-9
    # not hidden by a clamp: a shift of 1e-4 is seen as exactly |shift|^2
    assert ev.frechet_distance(mu, S, mu + 1e-4, S) == pytest.approx(d * 1e-8, abs=1e-9)


def test_frechet_distance_does_not_depend_on_the_order_of_samples_or_of_arguments():
    x, y = randn(300, 16), randn(200, 16, seed=1) * 1.5 + .3
    mixed = x[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    a, b, c = ev.gaussian(x), ev.gaussian(y), ev.gaussian(mixed)
    assert ev.frechet_distance(*a, *b) == pytest.approx(ev.frechet_distance(*b, *a), rel=1e-12)
    assert ev.frechet_distance(*a, *b) == pytest.approx(ev.frechet_distance(*c, *b), rel=1e-12)


def test_mean_and_covariance_are_exact_far_from_zero():
    x = randn(9000, 12) + 1e6                   # naive sums of squares would lose 12 of 16 digits
    mean, cov = ev.gaussian(x)
    assert (mean - x.mean(0)).abs().max() < 1e-8        # 1e-16 x 1e6, summed 9000 times
    assert (cov - x.T.cov()).abs().max() < 1e-8
    assert ev.gaussian(x.float())[1].dtype == torch.float64


def test_kid_is_the_unbiased_estimate_and_has_mean_zero_on_one_distribution():
    x, y = randn(40, 5), randn(40, 5, seed=1) + .5
    n, gen = 20, torch.Generator().manual_seed(0)       # one block: half of the smaller set
    a = x[torch.randperm(40, generator=gen)[:n]]
    b = y[torch.randperm(40, generator=gen)[:n]]

    def k(a, b):                                        # the definition, written as loops
        return (a @ b / 5 + 1) ** 3

    pairs = [(i, j) for i in range(n) for j in range(n)]
    within = sum(k(a[i], a[j]) + k(b[i], b[j]) for i, j in pairs if i != j) / (n * (n - 1))
    want = (within - 2 * sum(k(a[i], b[j]) for i, j in pairs) / n ** 2).item()
    assert ev.kid(x, y, n_blocks=1) == (pytest.approx(want, rel=1e-9), 0)

    values = torch.tensor([ev.kid(randn(60, 8, seed=2 * s), randn(60, 8, seed=2 * s + 1),
                                  n_blocks=4)[0] for s in range(200)])
    error = values.std().item() / math.sqrt(200)
    assert abs(values.mean().item()) < 4 * error, (values.mean().item(), error)
    biased = 2 * ((x.square().sum(1) / 5 + 1) ** 3).mean().item() / 30
    assert biased > 10 * error, "else the line above says nothing"


def test_inception_score_is_one_for_uniform_and_k_for_one_hot_and_ignores_the_order():
    uniform = torch.full((100, 7), 1 / 7)
    assert ev.inception_score(uniform)[0] == pytest.approx(1, abs=1e-6)         # 1/7 is a float32
    sorted_by_class = torch.eye(10).repeat_interleave(500, 0)
    mean, std = ev.inception_score(sorted_by_class)
    # a split of 500 draws 50 +- 7 of a class: it falls short of 10 by about (K - 1) K / (2 N) = .1
    assert 9.8 < mean <= 10 and std < .1, (mean, std)   # without the shuffle it would be 1
    assert ev.inception_score(torch.eye(10), splits=1)[0] == pytest.approx(10, abs=1e-9)


def test_mode_collapse_has_high_precision_and_low_recall_and_the_converse():
    real = torch.cat([randn(200, 4, seed=m) + 20 * m for m in range(5)])
    one_mode = randn(300, 4, seed=9)
    precision, recall = ev.precision_recall(real, one_mode)
    assert precision > .8 and recall < .21, (precision, recall)                 # one mode of five
    precision, recall = ev.precision_recall(one_mode, real)
    assert precision < .21 and recall > .8, (precision, recall)
    assert ev.precision_recall(real, real) == (1, 1)
    assert ev.precision_recall(real, real + 1e3) == (0, 0)
    # all the same copy of a real image: distance 0, whatever the rounding of |x|^2 - 2xy + |y|^2
    assert ev.precision_recall(real, real[:1].repeat(50, 1)) == (1, 1 / 1000)


def test_precision_and_recall_are_those_of_the_definition():
    real, fake, k = randn(80, 3), randn(70, 3, seed=1) * 1.5, 3

    def inside(p, of):                                  # brute force
        radius = torch.cdist(of, of).sort(1).values[:, k]
        return (torch.cdist(p, of) <= radius).any(1).double().mean().item()

    assert ev.precision_recall(real, fake) == (inside(fake, real), inside(real, fake))


def test_distances_in_chunks_find_the_true_nearest_neighbours(monkeypatch):
    x, y = randn(50, 6).float(), randn(400, 6, seed=1).float()
    monkeypatch.setattr(ev, "CHUNK", 3000)              # 7 rows of 400 at once, and one at the end
    rows = []
    i = ev.by_distance(x, y, lambda d: rows.append(len(d)) or d.argmin(1))
    full = torch.cdist(x.double(), y.double())
    assert (i == full.argmin(1)).all() and rows == [7] * 7 + [1]
    d = ev.by_distance(x, y, lambda d: d.amin(1))
    assert (d - full.min(1).values).abs().max() < 1e-12


def test_sliced_w2_is_the_shift_in_one_dimension_and_agrees_with_pot_at_unequal_sizes():
    x = randn(100, 1)
    assert ev.sliced_w2(x, x + 2.5) == pytest.approx(2.5, abs=1e-12)
    assert ev.sliced_w2(x, x.flip(0)) == 0
    x, y = randn(90, 7), randn(40, 7, seed=1) * 2 + 1
    direction = randn(7, 64, seed=3)
    want = ot.sliced_wasserstein_distance(x, y, projections=direction / direction.norm(dim=0))
    assert ev.sliced_w2(x, y, n_proj=64, seed=3) == pytest.approx(want.item(), rel=1e-10)


def test_the_copy_ratio_detects_copies_and_is_one_for_new_samples():
    seen, unseen, new = (randn(300, 8, seed=s) for s in range(3))
    assert abs(ev.copy_ratio(new, seen, unseen) - 1) < .1       # equal sizes: 300 samples' noise
    assert ev.copy_ratio(seen[:100] + .05 * new[:100], seen, unseen) < .2
    assert ev.copy_ratio(seen, seen, unseen) == 0


@pytest.mark.parametrize("call, message", [
    (lambda: ev.extract(ev.pixels, IMAGES[:9]), "9 images; at least 10"),
    (lambda: ev.pixels(torch.zeros(2, 64, 64, 3, dtype=torch.uint8)), "at most 4096"),
    (lambda: ev.extract(lambda x: (torch.full((len(x), 2), math.nan), None), IMAGES), "non-finite"),
])
def test_what_cannot_be_measured_is_refused_before_any_metric(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- feature spaces

@pytest.fixture(scope="module")
def real():
    """The real side of the digits, in the order that evaluate.py takes them."""
    return ev.real_images(data.load("digits"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One cache for the module: the digits' classifier is trained once."""
    return str(tmp_path_factory.mktemp("cache"))


def test_the_classifier_recognises_held_out_digits_and_comes_back_from_its_cache(real, cache):
    before = torch.random.get_rng_state()
    net = ev.make_extractor("classifier", real, cache=cache)
    x, logits = ev.extract(net, real.images)
    accuracy = (logits.argmax(1) == real.labels).double().mean()
    assert accuracy >= .985                                     # other seeds: .995 to .998
    assert x.shape == (946, 64) and x.dtype == torch.float32
    assert 32 < x.var(0).sum() < 128                            # unit variance in 64 dimensions
    again = ev.make_extractor("classifier", real, cache=cache)
    assert torch.equal(ev.extract(again, real.images)[0], x)
    assert torch.equal(before, torch.random.get_rng_state()) and len(os.listdir(cache)) == 1


def weights(x, y, cache, seed=0):
    net = ev.train_classifier(x, y, seed=seed, epochs=1, cache=cache)
    return torch.cat([p.flatten() for p in net.state_dict().values()])


def test_the_classifier_is_seeded_and_its_cache_has_a_file_for_each_data_set(real, tmp_path):
    x, y = real.train_images[::15], real.train_labels[::15]
    a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    first = weights(x, y, a)
    assert torch.equal(weights(x, y, b), first) and not torch.equal(weights(x, y, c, 1), first)
    weights(255 - x, y, a), weights(x, 9 - y, a)
    assert len(os.listdir(a)) == 3


@pytest.mark.parametrize("what, words", [
    ("damaged", "cannot be read"), ("foreign", "cannot be read"),
    ("seed", "were made for another seed"), ("code", "were made for another code")])
def test_a_cached_classifier_that_is_not_this_one_is_trained_anew_with_one_line(
        what, words, real, tmp_path, capsys, monkeypatch):
    x, y = real.train_images[::15], real.train_labels[::15]
    first = weights(x, y, tmp_path / "c", seed=int(what == "seed"))
    file, = (tmp_path / "c").iterdir()
    if what == "damaged":
        file.write_bytes(b"damaged")
    elif what == "foreign":
        torch.save({"foreign": torch.ones(3)}, file)
    elif what == "code":                                            # edited by hand
        (tmp_path / "edited.py").write_text("# without jitter")
        monkeypatch.setattr(classifier, "__file__", tmp_path / "edited.py")
        monkeypatch.setattr(classifier, "jitter", lambda x, generator: x)
    capsys.readouterr()
    again, said = weights(x, y, tmp_path / "c"), capsys.readouterr().out
    assert said.startswith(f"the weights in {file} {words}") and said.count("\n") == 1, said
    assert torch.equal(again, first) == (what in ("damaged", "foreign"))
    assert torch.equal(weights(x, y, tmp_path / "c"), again) and capsys.readouterr().out == ""


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (33, 20, 3), (64, 64, 3)])
def test_the_classifier_takes_any_size_and_any_number_of_channels(shape, tmp_path):
    x = torch.randint(256, (40, *shape), dtype=torch.uint8, generator=torch.Generator())
    features, logits = ev.train_classifier(x, torch.arange(40) % 3, epochs=1, cache=tmp_path)(x)
    assert features.shape == (40, 64) and logits.shape == (40, 3)


def test_features_are_computed_in_fp32_and_the_rest_of_the_process_keeps_its_precision():
    seen, before = [], torch.backends.cudnn.allow_tf32

    def space(images):
        seen.append(torch.backends.cudnn.allow_tf32)
        return ev.pixels(images)

    ev.extract(space, IMAGES)
    assert seen == [False] and torch.backends.cudnn.allow_tf32 == before


# ---- the real side, and the Judge

def test_real_images_are_the_first_of_each_class_so_that_they_begin_with_the_targets(monkeypatch):
    digits = data.load("digits")
    monkeypatch.setattr(ev, "MAX_TRAIN", 300)
    real = ev.real_images(digits)
    assert len(real.images) == 946 and real.train_labels.bincount().tolist() == [30] * 10
    targets = sample.tokens_of(digits)(7, 12)
    want = torch.from_numpy(data.to_uint8(digits.decode(targets)))
    assert torch.equal(real.train_images[real.train_labels == 7][:12], want)


def test_any_function_of_images_is_a_feature_space(real):
    gen = torch.Generator().manual_seed(0)
    kernel = torch.randn(8, 1, 5, 5, generator=gen)

    def random_convolution(images):
        x = images.permute(0, 3, 1, 2).float() / 255
        return torch.nn.functional.conv2d(x, kernel, stride=4).relu().flatten(1), None

    judge = ev.Judge(random_convolution, real)
    x, values = judge(real.train_images[:200].numpy(), real.train_labels[:200])
    floor = judge.floor(200)
    assert x.shape == (200, 72)
    for row in (values, floor):
        assert set(row) == {"fid", "kid", "kid_std", "sliced_w2", "precision", "recall",
                            "copy_ratio"}
    assert values["copy_ratio"] == 0 and floor["copy_ratio"] > .7, "these are training images"
    # the first 200 are classes 0 and half of 1, the floor's are of all classes alike
    assert values["fid"] > 3 * floor["fid"]


def test_the_floor_is_measured_on_balanced_classes(real):
    labels = torch.tensor([0] * 70 + [1] * 20 + [2] * 10)
    judge = ev.Judge(ev.pixels, ev.Real(real.images[:50], None, real.train_images[:100], labels))
    taken = []
    judge.space = lambda images: taken.append(images) or ev.pixels(images)
    for n, want in ((24, [8, 8, 8]), (60, [30, 20, 10])):
        taken.clear()
        judge.floor(n)
        found = [(real.train_images[:100] == x).flatten(1).all(1).nonzero()[0, 0]
                 for x in torch.cat(taken)]
        assert labels[torch.stack(found)].bincount().tolist() == want


def test_a_mean_over_seeds_has_its_deviation_and_one_seed_none():
    assert ev.mean_std([{"a": 1., "a_std": .5}]) == {"a": 1., "a_std": .5}
    two = [{"a": 1., "a_std": .5}, {"a": 3., "a_std": .5}]
    assert ev.mean_std(two) == {"a": 2., "a_std": 2 ** .5}


# ---- the command: measuring files

@pytest.fixture(scope="module")
def files(real, tmp_path_factory):
    """Digits as files; the 'samples' are held-out images moved by a pixel, or training images."""
    folder = tmp_path_factory.mktemp("files")
    some = np.random.default_rng(0).permutation(len(real.images))[:400]
    x, y, held, labels = (a.numpy() for a in real[2:4] + real[:2])
    np.savez(folder / "ref.npz", arr_0=held, arr_1=labels)
    np.savez(folder / "s.npz", arr_0=np.roll(held, 1, 2)[some], arr_1=labels[some])
    np.savez(folder / "copies.npz", arr_0=x[:800:2], arr_1=y[:800:2])
    mu, sigma = ev.gaussian(ev.pixels(real.images)[0])
    np.savez(folder / "stats.npz", mu=mu, sigma=sigma)
    np.savez(folder / "both.npz", arr_0=held, mu=mu + 1, sigma=sigma)
    return folder


def measure(capsys, *argv):
    """What the command prints, and the values that it writes."""
    out = argv[argv.index("--json") + 1]
    ev.main([str(a) for a in argv])
    return capsys.readouterr().out, json.loads(out.read_text())


def cli(capsys, *argv):
    """As the shell sees it: exit code, stdout, stderr."""
    code = 0
    try:
        run(lambda: ev.main([str(a) for a in argv]))
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_the_table_shows_every_metric_with_n_and_the_floor_and_json_holds_the_same(
        files, cache, capsys, tmp_path):
    common = ["--dataset", "digits", "--cache", cache, "--json", tmp_path / "o.json"]
    out, r = measure(capsys, "--samples", files / "s.npz", *common)
    rows = {k: title for k, (title, _) in ev.ROWS.items()}
    assert set(r["values"]) == {*rows, "kid_std", "is_std"} == set(r["floor"])
    assert "400 samples against 946 images; features: classifier, 64-d" in out
    assert "400 training images against the same reference" in out
    assert all(title in out for title in rows.values()) and f"{r['values']['fid']:.4g}" in out
    assert r["values"]["accuracy"] > .9 and r["floor"]["accuracy"] > .97
    assert r["values"]["fid"] > 1.5 * r["floor"]["fid"], "real digits, but moved (measured: twice)"
    _, r = measure(capsys, "--samples", files / "copies.npz", *common)
    assert r["values"]["copy_ratio"] == 0 and r["floor"]["copy_ratio"] > .7


def test_samples_that_are_the_reference_have_distance_zero_and_full_precision(
        files, capsys, tmp_path):
    out, r = measure(capsys, "--samples", files / "ref.npz", "--ref", files / "ref.npz",
                     "--features", "pixels", "--json", tmp_path / "o.json")
    assert r["values"]["fid"] < 1e-6 and r["values"]["sliced_w2"] == 0
    assert r["values"]["precision"] == r["values"]["recall"] == 1
    assert "note: 946 samples for 256 dimensions" in out
    assert r["floor"] == {} and "not computed: it needs training images" in out


def test_published_statistics_are_what_the_frechet_distance_is_taken_to(files, capsys, tmp_path):
    def found(ref):
        out, r = measure(capsys, "--samples", files / "s.npz", "--ref", files / f"{ref}.npz",
                         "--features", "pixels", "--json", tmp_path / "o.json")
        assert r["floor"] == {} and f"against {r['n_ref'] or 'statistics of'} images" in out
        return r["values"]

    images, statistics, both = found("ref"), found("stats"), found("both")
    assert statistics == {"fid": pytest.approx(images["fid"], rel=1e-12)}
    assert both["fid"] > 200, "the mean that is given, 1 off in 256 dimensions"
    assert {**both, "fid": 0} == {**images, "fid": 0}


IMAGES = np.full((20, 8, 8, 1), 7, np.uint8)
LABELS = np.arange(20) % 2
WANTED = "expected arr_0, images uint8"
FLAT = np.linspace(0, 1, 20 * 64).reshape(IMAGES.shape)
BAD_SAMPLES = {
    "values from 0 to 1: (arr_0 * 255).round().astype('uint8')": dict(arr_0=FLAT),
    "values from -1 to 1: ((arr_0 + 1) * 127.5).round()": dict(arr_0=FLAT * 2 - 1),
    "values from 0 to 255: arr_0.round().astype('uint8')": dict(arr_0=FLAT * 255),
    "values from 7 to 7: arr_0.astype('uint8')": dict(arr_0=IMAGES.astype(int)),
    "values from 0 to 65535: (arr_0 / 257).round()": dict(arr_0=(FLAT * 65535).astype(np.uint16)),
    "0 to 1.01: (arr_0 * 255).round().clip(0, 255).astype('uint8')": dict(arr_0=FLAT * 1.01),
    "values from 0 to 900, which no rule": dict(arr_0=FLAT * 900),
    "arr_0 is not of finite numbers": dict(arr_0=FLAT * np.nan),
    "channels come last: arr_0.transpose(0, 2, 3, 1)": dict(arr_0=np.zeros((20, 3, 8, 8), "u1")),
    "a channel is missing: arr_0[..., None]": dict(arr_0=IMAGES[..., 0]),
    f"arr_0 float32 (20, 8, 8, 1); {WANTED}": dict(arr_0=IMAGES.astype(np.float32)),
    f"arr_0 uint8 (20, 3, 8, 8); {WANTED}": dict(arr_0=np.zeros((20, 3, 8, 8), np.uint8)),
    f"arr_0 uint8 (20, 8, 8); {WANTED}": dict(arr_0=IMAGES[..., 0]),
    f"images uint8 (20, 8, 8, 1); {WANTED}": dict(images=IMAGES),
    f"arr_1 int64 (19,); {WANTED}": dict(arr_0=IMAGES, arr_1=np.zeros(19, int)),
    "3 images; at least 10": dict(arr_0=IMAGES[:3]),
    "make both the same size": dict(arr_0=np.full((20, 9, 9, 1), 7, np.uint8)),
    "not a readable npz: arr_0 holds Python objects": dict(arr_0=np.array([None, 1], object)),
}
BAD_REFS = {
    "shapes [(64,)]; expected (F,) and (F, F)": dict(mu=np.zeros(64)),
    "shapes [(2, 2), (2, 2)]; expected": dict(mu=np.zeros((2, 2)), sigma=np.zeros((2, 2))),
    "(F, F), finite": dict(mu=np.full(64, np.nan), sigma=np.eye(64)),
    "mu has 2048 entries": dict(mu=np.zeros(2048), sigma=np.zeros((2048, 2048), np.float32)),
    "expected arr_0": dict(x=IMAGES),
}
BAD_FLAGS = {
    "did you mean --samples?": ["--sampels", "x.npz"],
    "invalid choice: 'vgg'": ["--features", "vgg"],
    "--n: 5 is out of range": ["--n", "5"],
    "nowhere.npz is not a readable npz: there is no such file": ["--ref", "nowhere.npz"],
    "py is not a readable npz": ["--ref", __file__],
    "--json nowhere/o.json: expected a file in a folder": ["--json", "nowhere/o.json"],
    "learns from training images": ["--features", "classifier"],
    "no Inception weights at": ["--features", "inception", "--cache", "nowhere"],
    "unknown argument --steps": ["--steps", "5"],
    "--seeds would change nothing": ["--seeds", "1"],
    "--vae would change nothing": ["--vae", "kl16.ckpt"],
    "--data_dir would change nothing": ["--data_dir", "."],
    "--cache would change nothing": ["--cache", "c"],
    "either --ref FILE or --dataset NAME": ["--dataset", "digits"],
    "either --ckpt RUN or --samples FILE": ["--ckpt", "run"],
}


@pytest.mark.parametrize("what, message", [
    *(("samples", m) for m in BAD_SAMPLES), *(("ref", m) for m in BAD_REFS),
    *(("flags", m) for m in BAD_FLAGS)])
def test_bad_input_is_one_clear_line_and_exit_code_2(tmp_path, capsys, what, message):
    good = dict(arr_0=IMAGES)
    np.savez(tmp_path / "s.npz", **BAD_SAMPLES[message] if what == "samples" else good)
    np.savez(tmp_path / "r.npz", **BAD_REFS[message] if what == "ref" else good)
    argv = ["--samples", tmp_path / "s.npz", "--ref", tmp_path / "r.npz"]
    flags = BAD_FLAGS[message] if what == "flags" else []
    features = [] if "--features" in flags else ["--features", "pixels"]
    code, out, err = cli(capsys, *argv, *features, *flags)
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert out == ""


@pytest.mark.parametrize("fill, words", [
    (lambda f: np.save(f, IMAGES), "it is a .npy of one array"),
    (lambda f: torch.save({"a": torch.ones(3)}, f), "zip of other things than arrays"),
    (lambda f: f.write(b"\x89PNG and so on"), "starts with b'\\x89PNG a'"),
    (lambda f: (np.savez(f, arr_0=IMAGES), f.truncate(300)), "is cut off or damaged"),
    (lambda f: f.truncate(0), "starts with b''")])
def test_a_file_that_is_no_npz_is_told_in_our_words(fill, words, tmp_path, capsys):
    with open(tmp_path / "s.npz", "w+b") as f:
        fill(f)
    code, _, err = cli(capsys, "--samples", tmp_path / "s.npz", "--ref", tmp_path / "s.npz")
    assert code == 2 and words in err and "expected a file as numpy.savez(" in err, err
    assert err.count("\n") == 1


def test_images_of_0_and_1_are_measured_with_a_warning(tmp_path, capsys):
    ones = np.random.default_rng(0).integers(0, 2, (2, 20, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "s.npz", arr_0=ones[0]), np.savez(tmp_path / "r.npz", arr_0=ones[1] * 255)
    code, _, err = cli(capsys, "--samples", tmp_path / "s.npz", "--ref", tmp_path / "r.npz",
                       "--features", "pixels")
    assert code == 0 and err.count("no value of arr_0 in") == 1 and "s.npz is above 1" in err


@pytest.mark.parametrize("changed, words", [
    (lambda x, y: (x, y + 1), "the samples have class 10, digits has only 0 to 9"),
    (lambda x, y: (x.repeat(3, axis=3), y), "the samples are (16, 16, 3), the real images (16")])
def test_samples_that_the_classifier_cannot_know_are_refused(
        changed, words, files, tmp_path, capsys):
    with np.load(files / "ref.npz") as z:
        x, y = changed(z["arr_0"], z["arr_1"])
    np.savez(tmp_path / "s.npz", arr_0=x, arr_1=y)
    code, _, err = cli(capsys, "--samples", tmp_path / "s.npz", "--dataset", "digits")
    assert code == 2 and words in err and err.count("\n") == 1


# ---- the command: measuring a checkpoint

def program(module, *argv):
    """A program's main() in this process, with its own command line."""
    before, sys.argv = sys.argv, [module.__name__, *map(str, argv)]
    try:
        module.main()
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model of the digits after two steps: its images are noise, but everything runs."""
    out = tmp_path_factory.mktemp("run")
    program(train, "--steps", 2, "--global_batch", 8, "--set", "warmup=1", "--out_dir", out)
    return out


FEW = "--n", 35, "--steps", 2                           # 35 round up to 40 images, 4 of each class


def test_a_checkpoint_is_measured_on_exactly_the_images_that_sample_draws_from_it(
        trained, cache, capsys, tmp_path):
    program(sample, "--ckpt", trained, "--n", 40, "--steps", 2, "--solver", "ddim", "--seed", 1,
            "--out", tmp_path / "s.npz")
    common = ["--cache", cache, "--json", tmp_path / "o.json"]
    _, file = measure(capsys, "--samples", tmp_path / "s.npz", "--dataset", "digits", *common)
    out, ckpt = measure(capsys, "--ckpt", trained, *FEW, "--solver", "ddim", "--seeds", 1, *common)
    assert file["values"] == ckpt["values"] and file["floor"] == ckpt["floor"]
    assert "40 samples against 946 images; features: classifier" in out
    assert ckpt["step"] == 2 and ckpt["drawing"] == ["--steps", "2", "--solver", "ddim"]


def test_several_seeds_give_mean_and_deviation(trained, capsys, tmp_path):
    def values(*seeds):
        out, r = measure(capsys, "--ckpt", trained, *FEW, "--seeds", *seeds, "--features",
                         "pixels", "--json", tmp_path / "o.json")
        assert ("2 x 40 samples" in out) == (len(seeds) == 2)
        return r["values"]

    one, two, both = values(3), values(4), values(3, 4)
    for key in ev.ROWS.keys() & one.keys():
        assert both[key] == pytest.approx((one[key] + two[key]) / 2), key
        deviation = abs(one[key] - two[key]) / 2 ** .5
        assert both[key + "_std"] == pytest.approx(deviation, abs=1e-12), key


def test_refinement_is_a_flag_of_sample(trained, capsys, tmp_path):
    argv = ["--ckpt", trained, "--features", "pixels", *FEW, "--json", tmp_path / "o.json"]
    _, plain = measure(capsys, *argv)
    refine = ["--refine", "sinkhorn", "--coupled", "--m", 30]
    _, refined = measure(capsys, *argv, *refine)
    assert refined["values"]["fid"] != plain["values"]["fid"]


@pytest.mark.parametrize("argv, message", [
    (["--ckpt", "nowhere"], "no checkpoint at nowhere"),
    (["--ckpt", "RUN", "--ref", "r.npz"], "--ref would change nothing"),
    (["--ckpt", "RUN", "--num_iter", "4"], "--num_iter would change nothing"),
    (["--ckpt", "RUN", "--K", "3"], "--K would change nothing"),
    (["--ckpt", "RUN", "--seeds", "0", "0"], "--seeds 0 0: give each once"),
    (["--ckpt", "RUN", "--out", "s.npz"], "--out would change nothing"),
    (["--ckpt", "RUN", "--classes", "3"], "--classes would change nothing"),
    (["--ckpt", "RUN", "--features", "pixels", "--cache", "c"], "--cache would change nothing"),
    (["--ckpt", "RUN", "--steps", "0"], "0 is out of range"),
    (["--ckpt", "RUN", "--refnie", "default"], "did you mean --refine?"),
    (["--ckpt", "RUN", "--vae", "kl16.ckpt"], "a model of pixels"),
    ([], "either --ckpt RUN or --samples FILE"),
    (["ablate"], "unknown argument ablate"),
])
def test_bad_input_to_the_measurement_of_a_checkpoint_is_one_clear_line(
        trained, capsys, argv, message):
    code, out, err = cli(capsys, *(str(trained) if a == "RUN" else a for a in argv))
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert out == ""


# ---- inception.py: an outer file, imported by name

@pytest.fixture
def inception():
    return pytest.importorskip("inception")


def test_resizing_is_that_of_tensorflow_1(inception):
    # tf.image.resize_bilinear([[0, 1], [2, 3]], [4, 4]) of TensorFlow 1 prints exactly this
    want = [[0, .5, 1, 1], [1, 1.5, 2, 2], [2, 2.5, 3, 3], [2, 2.5, 3, 3]]
    got = inception.resize_tf1(torch.tensor([[[[0., 1], [2, 3]]]]), 4)
    assert got[0, 0].tolist() == want
    # and shrinking [[0..8]] to 2x2: the top left corners at 0 and 1.5
    got = inception.resize_tf1(torch.arange(9.).view(1, 1, 3, 3), 2)
    assert got[0, 0].tolist() == [[0, 1.5], [4.5, 6]]
    x = randn(1, 3, 299, 299).float()
    assert torch.equal(inception.resize_tf1(x, 299), x)


def test_the_inception_network_has_the_names_and_shapes_of_the_published_file(inception):
    with torch.device("meta"):
        state = inception.Inception().state_dict()
    assert len(state) == 566
    assert sum(v.numel() for v in state.values()) == 23_885_486
    # of all names and shapes of torchvision's Inception3(num_classes=1008, aux_logits=False)
    listing = "\n".join(f"{k} {list(v.shape)}" for k, v in sorted(state.items()))
    assert hashlib.sha256(listing.encode()).hexdigest() == (
        "8cdd2faeb41211e17f0fb47e66168d0cb1f981aa773b5f44e5b9cc93857fe492")


def sine_weights(net):
    """Weights from a formula, so that another implementation can be given the same."""
    state = net.state_dict()
    for n, (k, v) in enumerate(sorted(state.items())):
        if not v.is_floating_point():
            continue
        at = torch.arange(v.numel(), dtype=torch.float64)
        s = torch.sin(at * (1 + n * .01) + n).view(v.shape)
        if k.endswith("running_var"):
            s = 1 + .5 * s
        elif v.ndim > 1:
            s = 1.4 * (2 / v[0].numel()) ** .5 * s
        else:
            s = 1 + .2 * s if k.endswith("bn.weight") else .1 * s
        state[k] = s.float()
    return state


def test_the_inception_network_computes_what_torchvision_with_the_fid_pools_computes(
        inception, tmp_path, capsys):
    # recorded from torchvision 0.29: Inception3, average pools without padding, last block's max
    torch.save(sine_weights(inception.Inception()), tmp_path / inception.INCEPTION_FILE)
    net = ev.make_extractor("inception", None, cache=tmp_path)
    assert "sha256" in capsys.readouterr().err, "these are not the published weights"
    image = torch.sin(torch.arange(2 * 40 * 40 * 3).double() * .37) * 127.5 + 127.5
    image = image.to(torch.uint8).view(2, 40, 40, 3)
    x, logits = net(image)
    assert x.shape == (2, 2048) and logits.shape == (2, 1008)
    want = torch.tensor([0.09131003, 0.0, 0.28819489, 0.0, 0.0, 0.02941754])
    # 1e-4 of values of .1 to .9: sums in another order through 48 layers in fp32
    assert (x[0, [0, 320, 700, 1088, 1500, 2047]] - want).abs().max() < 1e-4
    assert x.double().sum().item() == pytest.approx(290.22067, rel=1e-3)
    want = torch.tensor([0.05541277, -0.11130813, 0.14998868])
    assert (logits[0, :3] - want).abs().max() < 1e-4
    grey = image[..., :1]
    assert torch.equal(net(grey)[0], net(grey.repeat(1, 1, 1, 3))[0])


@pytest.mark.parametrize("content", ["missing", "text", "foreign"])
def test_missing_or_foreign_inception_weights_say_where_to_get_them(inception, tmp_path, content):
    path = tmp_path / inception.INCEPTION_FILE
    if content == "text":
        path.write_text("<html>404</html>")
    if content == "foreign":
        torch.save({"model": torch.zeros(3)}, path)
    with pytest.raises((FileNotFoundError, ValueError), match=inception.INCEPTION_FILE) as e:
        inception.load_inception(tmp_path)
    if content == "missing":
        assert "https://" in str(e.value) and "sha256 6726825d" in str(e.value)
