"""evaluate.py, inception.py, ablate.py: each metric against a closed form, the extractors against known facts, the
commands against bad input, the ablation against a kill."""
import csv
import hashlib
import json
import math
import os
import subprocess
import sys

import numpy as np
import ot
import pytest
import torch

import ablate
import data
import evaluate as ev
import inception
import model as models
import sample
import train
from test_core import torchrun

MAIN = os.path.dirname(os.path.abspath(__file__))

def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gaussian(x):
    m = ev.moments_of(x)
    return m.mean, m.cov


# ---- metrics

def test_frechet_distance_of_shifted_and_scaled_gaussians_is_the_closed_form():
    d = 32
    mu, eye = torch.zeros(d), torch.eye(d)
    # |shift|^2 + sum (s1 - s2)^2 for N(0, s1^2 I) and N(shift, s2^2 I); 1e-10: float64 rounding of sums of 1e2
    assert ev.frechet_distance(mu, eye, mu + 3, eye) == pytest.approx(9 * d, abs=1e-10)
    assert ev.frechet_distance(mu, 4 * eye, mu + .5, 9 * eye) == pytest.approx(.25 * d + d, abs=1e-10)
    # commuting covariances with any spectrum
    q, _ = torch.linalg.qr(randn(d, d))
    a, b = torch.logspace(-6, 2, d).double(), torch.logspace(1, -3, d).double()
    want = (a.sqrt() - b.sqrt()).square().sum().item()
    assert ev.frechet_distance(mu, (q * a) @ q.T, mu, (q * b) @ q.T) == pytest.approx(want, rel=1e-9)
    # POT's Bures-Wasserstein distance as an independent oracle, general covariances
    (m1, s1), (m2, s2) = gaussian(randn(100, 8)), gaussian(randn(100, 8, seed=1) @ randn(8, 8, seed=2) + 1)
    want = ot.gaussian.bures_wasserstein_distance(m1, m2, s1, s2).item() ** 2
    assert ev.frechet_distance(m1, s1, m2, s2) == pytest.approx(want, rel=1e-8)


@pytest.mark.parametrize("n, d", [(1000, 64), (100, 256)])
def test_frechet_distance_of_a_set_to_itself_is_zero_even_with_a_singular_covariance(n, d):
    mu, S = gaussian(randn(n, d) * torch.logspace(1, -3, d))
    assert ev.frechet_distance(mu, S, mu, S) < 1e-9          # the specification asks for 1e-6
    # not hidden by a clamp: a shift of 1e-4 is seen as exactly |shift|^2
    assert ev.frechet_distance(mu, S, mu + 1e-4, S) == pytest.approx(d * 1e-8, abs=1e-9)


def test_frechet_distance_does_not_depend_on_the_order_of_samples_or_of_arguments():
    x, y = randn(300, 16), randn(200, 16, seed=1) * 1.5 + .3
    a, b, c = gaussian(x), gaussian(y), gaussian(x[torch.randperm(300)])
    assert ev.frechet_distance(*a, *b) == pytest.approx(ev.frechet_distance(*b, *a), rel=1e-12)
    assert ev.frechet_distance(*a, *b) == pytest.approx(ev.frechet_distance(*c, *b), rel=1e-12)


def test_moments_are_the_same_streamed_merged_or_at_once_and_far_from_zero():
    x = randn(1000, 12) + 1e6                                 # naive sums of squares would lose 12 of 16 digits
    whole = x.mean(0), x.T.cov()
    streamed = ev.Moments(12)
    for chunk in x.split([1, 0, 7, 500, 492]):
        streamed.update(chunk)
    merged = ev.Moments(12).merge(ev.Moments(12).update(x[:3])).merge(ev.Moments(12)).merge(ev.Moments(12).update(x[3:]))
    for m in (streamed, merged):
        assert m.n == 1000
        assert (m.mean - whole[0]).abs().max() < 1e-8         # 1e-16 x 1e6, summed 1000 times
        assert (m.cov - whole[1]).abs().max() < 1e-8
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        ev.Moments(3).update(x[:1, :3]).cov


def test_kid_is_the_unbiased_estimate_and_has_mean_zero_on_one_distribution():
    x, y = randn(40, 5), randn(40, 5, seed=1) + .5
    k = lambda a, b: (a @ b / 5 + 1) ** 3                     # the definition, written as loops
    n, gen = 20, torch.Generator().manual_seed(0)             # one block: half of the smaller set
    a, b = x[torch.randperm(40, generator=gen)[:n]], y[torch.randperm(40, generator=gen)[:n]]
    pairs = [(i, j) for i in range(n) for j in range(n)]
    want = (sum(k(a[i], a[j]) + k(b[i], b[j]) for i, j in pairs if i != j) / (n * (n - 1))
            - 2 * sum(k(a[i], b[j]) for i, j in pairs) / n ** 2).item()
    assert ev.kid(x, y, n_blocks=1) == (pytest.approx(want, rel=1e-9), 0)
    values = torch.tensor([ev.kid(randn(60, 8, seed=2 * s), randn(60, 8, seed=2 * s + 1), n_blocks=4)[0] for s in range(200)])
    error = values.std().item() / math.sqrt(200)
    assert abs(values.mean().item()) < 4 * error, (values.mean().item(), error)
    assert error < .02                                        # else the line above says nothing: bias would be .1
    biased = 2 * ((x.square().sum(1) / 5 + 1) ** 3).mean().item() / 30
    assert biased > 10 * error


def test_inception_score_is_one_for_uniform_and_k_for_one_hot_predictions_and_ignores_the_order():
    assert ev.inception_score(torch.full((100, 7), 1 / 7))[0] == pytest.approx(1, abs=1e-6)      # 1/7 is a float32
    sorted_by_class = torch.eye(10).repeat_interleave(500, 0)
    mean, std = ev.inception_score(sorted_by_class)
    # each split of 500 draws 50 +- 7 of a class: the score falls short of 10 by about (K - 1) / (2 N) x K = .1
    assert 9.8 < mean <= 10 and std < .1, (mean, std)         # without the shuffle it would be 1
    assert ev.inception_score(torch.eye(10), splits=1)[0] == pytest.approx(10, abs=1e-9)
    with pytest.raises(ValueError, match="10 splits"):
        ev.inception_score(torch.eye(10)[:5])


def test_mode_collapse_has_high_precision_and_low_recall_and_the_converse():
    real = torch.cat([randn(200, 4, seed=m) + 20 * m for m in range(5)])
    one_mode = randn(300, 4, seed=9)
    precision, recall = ev.precision_recall(real, one_mode)
    assert precision > .8 and recall < .21, (precision, recall)                  # one mode of five
    precision, recall = ev.precision_recall(one_mode, real)
    assert precision < .21 and recall > .8, (precision, recall)
    assert ev.precision_recall(real, real) == (1, 1)
    assert ev.precision_recall(real, real + 1e3) == (0, 0)
    # all samples the same image, a copy of a real one: distance exactly 0, whatever the rounding of |x|^2 - 2xy + |y|^2
    copies = real[:1].repeat(50, 1)
    assert ev.precision_recall(real, copies) == (1, 1 / 1000)


def test_precision_and_recall_are_those_of_the_definition_and_of_any_chunking():
    real, fake, k = randn(80, 3), randn(70, 3, seed=1) * 1.5, 3
    def inside(p, of):                                        # brute force
        d = torch.cdist(of, of).sort(1).values[:, k]
        return (torch.cdist(p, of) <= d).any(1).double().mean().item()
    assert ev.precision_recall(real, fake, k) == (inside(fake, real), inside(real, fake))
    with pytest.raises(ValueError, match="more than k=3"):
        ev.precision_recall(real[:3], fake)


def test_distances_in_chunks_find_the_true_nearest_neighbours(monkeypatch):
    x, y = randn(50, 6).float(), randn(400, 6, seed=1).float()
    monkeypatch.setattr(ev, "CHUNK", 3000)                    # 7 rows of 400 distances at once, and one at the end
    d, i = ev.nearest(x, y)
    full = torch.cdist(x.double(), y.double())
    assert (i == full.argmin(1)).all() and (d - full.min(1).values).abs().max() < 1e-12
    assert [len(d) for _, d in ev._distances(x, y)] == [7] * 7 + [1]


def test_sliced_w2_is_the_shift_in_one_dimension_and_agrees_with_pot_at_unequal_sizes():
    x = randn(100, 1)
    assert ev.sliced_w2(x, x + 2.5) == pytest.approx(2.5, abs=1e-12)
    assert ev.sliced_w2(x, x[torch.randperm(100)]) == 0
    x, y = randn(90, 7), randn(40, 7, seed=1) * 2 + 1
    direction = torch.randn(7, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    want = ot.sliced_wasserstein_distance(x, y, projections=direction / direction.norm(dim=0)).item()
    assert ev.sliced_w2(x, y, n_proj=64, seed=3) == pytest.approx(want, rel=1e-10)


def test_the_copy_ratio_detects_copies_and_leaves_new_samples_at_the_floor():
    bank, other, heldout, new = (randn(300, 8, seed=s) for s in range(4))
    ratio, floor = ev.copy_ratio(new, bank, other, heldout)
    assert abs(ratio - 1) < .1 and abs(floor - 1) < .1, (ratio, floor)           # equal sizes: 1 up to 300 samples' noise
    ratio, _ = ev.copy_ratio(bank[:100] + .05 * new[:100], bank, other, heldout)
    assert ratio < .2 * floor, ratio
    assert ev.copy_ratio(bank, bank, other) == (0, None)


def test_class_accuracy_and_within_class_spread_have_their_closed_forms():
    logits = torch.eye(4)
    assert ev.class_accuracy(logits, torch.tensor([0, 1, 2, 0])) == .75
    labels = torch.tensor([0, 1]).repeat_interleave(20_000)
    x = randn(40_000, 9) * torch.where(labels == 0, 1, 2)[:, None] + 100 * labels[:, None]
    # root of 9 and of 36, averaged; the class means do not count; 1 %: 20,000 samples of 9 dimensions are good to .2 %
    assert ev.within_class_spread(x, labels) == pytest.approx(4.5, rel=.01)
    assert ev.within_class_spread(x[:2], torch.tensor([0, 1])) is None


@pytest.mark.parametrize("call, message", [
    (lambda: ev.frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(4), torch.eye(4)), "sizes differ"),
    (lambda: ev.kid(torch.zeros(3, 2), torch.zeros(9, 2)), "at least 4 samples"),
    (lambda: ev.pixels(torch.zeros(2, 64, 64, 3, dtype=torch.uint8)), "at most 4096"),
])
def test_metrics_refuse_what_they_cannot_measure(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- extractors

def test_resizing_is_that_of_tensorflow_1():
    # tf.image.resize_bilinear([[0, 1], [2, 3]], [4, 4]) of TensorFlow 1 prints exactly this
    want = [[0, .5, 1, 1], [1, 1.5, 2, 2], [2, 2.5, 3, 3], [2, 2.5, 3, 3]]
    got = inception.resize_tf1(torch.tensor([[[[0., 1], [2, 3]]]]), 4)
    assert got[0, 0].tolist() == want
    # and shrinking [[0..8]] to 2x2: the top left corners at 0 and 1.5
    got = inception.resize_tf1(torch.arange(9.).view(1, 1, 3, 3), 2)
    assert got[0, 0].tolist() == [[0, 1.5], [4.5, 6]]
    x = torch.rand(1, 3, 299, 299)
    assert torch.equal(inception.resize_tf1(x, 299), x)


def test_the_inception_network_has_the_names_and_shapes_of_the_published_file():
    with torch.device("meta"):
        state = inception.Inception().state_dict()
    assert len(state) == 566
    assert sum(v.numel() for v in state.values()) == 23_885_486
    # digest of all names and shapes of torchvision's Inception3(num_classes=1008, aux_logits=False), the file's layout
    listing = "\n".join(f"{k} {list(v.shape)}" for k, v in sorted(state.items()))
    assert hashlib.sha256(listing.encode()).hexdigest() == "8cdd2faeb41211e17f0fb47e66168d0cb1f981aa773b5f44e5b9cc93857fe492"


def sine_weights(net):
    """Weights from a formula, so that another implementation of the network can be given the same."""
    state = net.state_dict()
    for n, (k, v) in enumerate(sorted(state.items())):
        if v.is_floating_point():
            s = torch.sin(torch.arange(v.numel(), dtype=torch.float64) * (1 + n * .01) + n).view(v.shape)
            s = (1 + .5 * s if k.endswith("running_var") else 1.4 * (2 / v[0].numel()) ** .5 * s if v.ndim > 1
                 else 1 + .2 * s if k.endswith("bn.weight") else .1 * s)
            state[k] = s.float()
    return state


def test_the_inception_network_computes_what_torchvision_with_the_fid_pools_computes(tmp_path, capsys):
    # recorded from torchvision 0.29 (Inception3, average pools without padding, last block's pool max), equal bit for bit
    net = inception.Inception().eval()
    path = tmp_path / "w.pth"
    torch.save(sine_weights(net), path)
    net = inception.load_inception(str(path))
    assert "sha256" in capsys.readouterr().err                # these are not the published weights, and it says so
    image = (torch.sin(torch.arange(2 * 40 * 40 * 3).double() * .37) * 127.5 + 127.5).to(torch.uint8).view(2, 40, 40, 3)
    f = ev.extract(net, image)
    assert f.x.shape == (2, 2048) and f.logits.shape == (2, 1008)
    want = torch.tensor([0.09131003, 0.0, 0.28819489, 0.0, 0.0, 0.02941754])
    # 1e-4 of values of .1 to .9: sums in another order through 48 layers in fp32
    assert (f.x[0, [0, 320, 700, 1088, 1500, 2047]] - want).abs().max() < 1e-4
    assert f.x.double().sum().item() == pytest.approx(290.22067, rel=1e-3)
    assert (f.logits[0, :3] - torch.tensor([0.05541277, -0.11130813, 0.14998868])).abs().max() < 1e-4
    grey = image[..., :1]
    assert torch.equal(net(grey)[0], net(grey.repeat(1, 1, 1, 3))[0])


@pytest.mark.parametrize("content", ["missing", "text", "foreign"])
def test_missing_or_foreign_inception_weights_say_where_to_get_them(tmp_path, content):
    path = tmp_path / "w.pth"
    if content == "text":
        path.write_text("<html>404</html>")
    if content == "foreign":
        torch.save({"model": torch.zeros(3)}, path)
    with pytest.raises((FileNotFoundError, ValueError), match="pt_inception-2015-12-05-6726825d.pth") as e:
        inception.load_inception(str(path))
    assert content != "missing" or "https://" in str(e.value) and "sha256 6726825d" in str(e.value)


def digits():
    """The real side of the 16x16 digits, in the order that evaluate.py takes them (one order, one cached classifier)."""
    return ev.real_images(data.load("digits", size=16))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One cache for the module: the digits' classifier is trained once."""
    return str(tmp_path_factory.mktemp("cache"))


def test_the_classifier_recognises_held_out_digits_and_comes_back_from_its_cache_bit_for_bit(cache):
    real = digits()
    x, y = real.train_images, real.train_labels
    before = torch.random.get_rng_state()
    net = ev.train_classifier(x, y, epochs=4, cache=cache)
    f = ev.extract(net, real.images, real.labels)
    assert ev.class_accuracy(f.logits, f.labels) >= .97, ev.class_accuracy(f.logits, f.labels)   # the default 10 epochs: .995 to .998
    assert f.x.shape == (946, 64) and f.x.dtype == torch.float32
    assert 32 < f.cov.trace() < 128                           # unit variance in 64 dimensions, roughly
    again = ev.train_classifier(x, y, epochs=4, cache=cache)
    assert torch.equal(ev.extract(again, real.images).x, f.x)
    assert torch.equal(before, torch.random.get_rng_state()) and len(os.listdir(cache)) == 1


def test_the_classifier_is_seeded_its_cache_names_its_data_and_a_damaged_cache_is_replaced(tmp_path, capsys):
    x, y = digits().train_images[::15], digits().train_labels[::15]
    train = lambda x, seed=0, cache=None: torch.cat([p.flatten() for p in ev.train_classifier(
        x, y, seed=seed, epochs=1, cache=cache).state_dict().values()])
    assert torch.equal(train(x), train(x)) and not torch.equal(train(x), train(x, seed=1))
    first = train(x, cache=str(tmp_path))
    train(255 - x, cache=str(tmp_path)), train(x, seed=1, cache=str(tmp_path))
    assert len(os.listdir(tmp_path)) == 3
    for f in tmp_path.iterdir():
        f.write_bytes(b"damaged")
    assert torch.equal(train(x, cache=str(tmp_path)), first) and "training it again" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (33, 20, 3), (64, 64, 3)])
def test_the_classifier_takes_any_size_and_any_number_of_channels(shape):
    x = np.random.default_rng(0).integers(0, 256, (40, *shape), dtype=np.uint8)
    net = ev.train_classifier(x, np.arange(40) % 3, epochs=1, cache=None)
    features, logits = net(torch.as_tensor(x))
    assert features.shape == (40, 64) and logits.shape == (40, 3)


# ---- the command

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Digits as files: training images, held-out images, and 'samples' that are held-out ones moved by a pixel."""
    d = tmp_path_factory.mktemp("files")
    real, rng = digits(), np.random.default_rng(0)
    x, y, held, labels = real.train_images, real.train_labels, real.images, real.labels
    some, bank = rng.permutation(len(held))[:400], np.arange(len(x)) % 2 == 0
    np.savez(d / "train.npz", arr_0=x, arr_1=y, bank=bank)
    np.savez(d / "ref.npz", arr_0=held, arr_1=labels)
    np.savez(d / "s.npz", arr_0=np.roll(held, 1, 2)[some], arr_1=labels[some])
    np.savez(d / "copies.npz", arr_0=x[bank][:800:2], arr_1=y[bank][:800:2])
    f = ev.extract(ev.pixels, held)
    np.savez(d / "stats.npz", mu=f.mean, sigma=f.cov)
    return d


def run(capsys, *argv):
    ev.main([str(a) for a in argv])
    return capsys.readouterr().out


def cli(capsys, *argv):
    """As the shell sees it: exit code, stdout, stderr."""
    code = 0
    try:
        data.run(lambda: ev.main([str(a) for a in argv]))
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_the_table_shows_every_metric_with_n_and_the_floor_and_json_holds_the_same(files, cache, capsys, tmp_path):
    common = "--ref", files / "ref.npz", "--train", files / "train.npz", "--features", "classifier", "--cache", cache
    out = run(capsys, "--samples", files / "s.npz", *common, "--json", tmp_path / "o.json")
    r = json.loads((tmp_path / "o.json").read_text())
    assert set(r["values"]) == {*ev.ROWS, "kid_std", "is_std"} == set(r["floor"])
    assert "400 samples against 946 images" in out and "400 training images against the same reference" in out
    assert all(title in out for title, _ in ev.ROWS.values())
    assert f"{r['values']['fid']:.4g}" in out
    assert r["values"]["accuracy"] > .9 and r["floor"]["accuracy"] > .97
    assert r["values"]["fid"] > 1.5 * r["floor"]["fid"]       # real digits, but moved by a pixel (measured 2)
    run(capsys, "--samples", files / "copies.npz", *common, "--json", tmp_path / "o.json")
    r = json.loads((tmp_path / "o.json").read_text())
    for kind in ("copy_ratio", "bank_ratio"):                 # these samples are targets
        assert r["values"][kind] == 0 and r["floor"][kind] > .7


def test_samples_that_are_the_reference_have_distance_zero_and_full_precision(files, capsys, tmp_path):
    run(capsys, "--samples", files / "ref.npz", "--ref", files / "ref.npz", "--features", "pixels", "--json", tmp_path / "o.json")
    r = json.loads((tmp_path / "o.json").read_text())
    assert r["values"]["fid"] < 1e-6 and r["values"]["sliced_w2"] == 0
    assert r["values"]["precision"] == r["values"]["recall"] == 1
    assert any("biased upward" in w for w in r["warnings"]) and any("not balanced" in w for w in r["warnings"])


def test_published_statistics_alone_give_the_same_frechet_distance_as_the_images(files, capsys, tmp_path):
    fid = []
    for ref in ("ref", "stats"):
        run(capsys, "--samples", files / "s.npz", "--ref", files / f"{ref}.npz", "--features", "pixels", "--json", tmp_path / "o.json")
        r = json.loads((tmp_path / "o.json").read_text())
        fid.append(r["values"]["fid"])
    assert fid[0] == pytest.approx(fid[1], rel=1e-12)
    assert r["n_ref"] is None and "precision" not in r["values"] and r["floor"] == {}


def test_two_ranks_give_the_numbers_of_one(files, capsys, tmp_path):
    argv = ["--samples", files / "s.npz", "--ref", files / "ref.npz", "--features", "pixels", "--json"]
    run(capsys, *argv, tmp_path / "one.json")
    success, log = torchrun(2, "evaluate", *argv, tmp_path / "two.json")
    assert success, log
    assert log.count("samples against") == 1                  # one table, not two
    one, two = (json.loads((tmp_path / f"{k}.json").read_text()) for k in ("one", "two"))
    for key, value in one["values"].items():                  # 1e-9: only the order of the sums differs
        assert two["values"][key] == pytest.approx(value, rel=1e-9), key


IMAGES = np.zeros((20, 8, 8, 1), np.uint8)
BAD_SAMPLES = {
    "float32; expected uint8": dict(arr_0=IMAGES.astype(np.float32)),
    "transpose": dict(arr_0=np.zeros((20, 3, 8, 8), np.uint8)),
    "expected (N, H, W, 1 or 3)": dict(arr_0=IMAGES[..., 0]),
    "3 images; at least 10": dict(arr_0=IMAGES[:3]),
    "expected arr_0": dict(images=IMAGES),
    "expected 20 class numbers": dict(arr_0=IMAGES, arr_1=np.zeros(19, int)),
    "make both the same size": dict(arr_0=np.zeros((20, 9, 9, 1), np.uint8)),
    "not a readable npz": dict(arr_0=np.array([None, 1], object)),
}
BAD_REFS = {
    "mu (F,) and sigma (F, F)": dict(mu=np.zeros(64)),
    "not finite": dict(mu=np.full(64, np.nan), sigma=np.eye(64)),
    "mu has 2048 entries": dict(mu=np.zeros(2048), sigma=np.zeros((2048, 2048), np.float32)),
    "expected mu and sigma": dict(x=IMAGES),
}
BAD_FLAGS = {
    "did you mean --samples?": ["--sampels", "x.npz"],
    "invalid choice: 'vgg'": ["--features", "vgg"],
    "--batch_size: 0 is out of range": ["--batch_size", "0"],
    "no --ref file": ["--ref", "nowhere.npz"],
    "not a readable npz": ["--ref", __file__],
    "no such directory": ["--json", "nowhere/o.json"],
    "give --train": ["--features", "classifier"],
    "no Inception weights at": ["--features", "inception", "--weights", "nowhere.pth"],
    "--steps says how to draw": ["--steps", "5"],
    "--ckpt and --refine": ["--failures", "f.png"],
    "give --train or --dataset": ["--grid", "g.png"],
    "one of them": ["--dataset", "digits"],
    "not both": ["--ckpt", "run"],
}


@pytest.mark.parametrize("what, message", [*(("samples", m) for m in BAD_SAMPLES), *(("ref", m) for m in BAD_REFS),
                                           *(("flags", m) for m in BAD_FLAGS)])
def test_bad_input_is_one_clear_line_and_exit_code_2(tmp_path, capsys, what, message):
    np.savez(tmp_path / "samples.npz", **BAD_SAMPLES[message] if what == "samples" else dict(arr_0=IMAGES))
    np.savez(tmp_path / "ref.npz", **BAD_REFS[message] if what == "ref" else dict(arr_0=IMAGES))
    argv = ["--samples", str(tmp_path / "samples.npz"), "--ref", str(tmp_path / "ref.npz"), "--features", "pixels"]
    code, out, err = cli(capsys, *argv, *(BAD_FLAGS[message] if what == "flags" else []))
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert out == ""


def test_a_mistyped_command_is_one_line_from_the_shell_too():
    out = subprocess.run([sys.executable, os.path.join(MAIN, "evaluate.py"), "metricks"], capture_output=True, text=True)
    assert out.returncode == 2 and "did you mean metrics?" in out.stderr and out.stderr.count("\n") == 1, out.stderr


def test_labels_of_classes_that_the_classifier_never_saw_are_refused(tmp_path, capsys):
    x = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "train.npz", arr_0=x, arr_1=np.arange(20) % 2)
    np.savez(tmp_path / "s.npz", arr_0=x, arr_1=np.arange(20) % 3)
    _, _, err = cli(capsys, "--samples", f"{tmp_path}/s.npz", "--ref", f"{tmp_path}/s.npz", "--train", f"{tmp_path}/train.npz",
                    "--features", "classifier", "--cache", tmp_path)
    assert "class 2, the training split only 0 to 1" in err


# ---- measuring a checkpoint

def program(module, *argv):
    """A program's main() in this process, with its own command line."""
    before, sys.argv = sys.argv, [module.__name__, *map(str, argv)]
    try:
        module.main()
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny AR model after two steps on three classes of 60 stripes; samples are noise, but everything runs, and fast."""
    from PIL import Image
    out, root, rng = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("stripes"), np.random.default_rng(0)
    for y, name in enumerate(("across", "down", "slanted")):
        (root / name).mkdir()
        for k in range(60):
            r, s = np.mgrid[:16, :16] + rng.integers(8, size=2)[:, None, None]
            x = 128 + 100 * np.sin((r, s, r + s)[y] * rng.uniform(.6, 1))[..., None] + rng.normal(0, 10, (16, 16, 3))
            Image.fromarray(x.clip(0, 255).astype(np.uint8)).save(root / name / f"{k:02}.png")
    program(train, "--dataset", "folder", "--data_dir", root, "--steps", 2, "--global_batch", 8, "--warmup", 1, "--out_dir", out)
    return out


FEW = "--n", 20, "--steps", 2                                 # 20 round up to 21 images, 7 of each class
HELD = 18                                                     # held-out images


def test_a_checkpoint_is_measured_on_exactly_the_images_that_sample_draws_from_it(trained, cache, capsys, tmp_path):
    program(sample, "--ckpt", trained, "--n", 21, "--steps", 2, "--solver", "ddim", "--out", tmp_path / "s.npz", "--seed", 1)
    run(capsys, "--samples", tmp_path / "s.npz", "--dataset", "folder", "--data_dir", ev.Run(trained, torch.device("cpu")).facts["data_dir"],
        "--cache", cache, "--json", tmp_path / "file.json")
    out = run(capsys, "--ckpt", trained, *FEW, "--solver", "ddim", "--seeds", 1, "--cache", cache, "--json", tmp_path / "ckpt.json")
    file, ckpt = (json.loads((tmp_path / f"{k}.json").read_text()) for k in ("file", "ckpt"))
    assert file["values"] == ckpt["values"] and file["floor"] == ckpt["floor"]
    assert f"21 samples against {HELD} images; features: classifier" in out and "21 training images against" in out
    assert ckpt["recipe"]["sampler"]["solver"] == "ddim" and ckpt["step"] == 2


def test_several_seeds_give_mean_and_deviation(trained, cache, capsys, tmp_path):
    def values(*seeds):
        out = run(capsys, "--ckpt", trained, *FEW, "--seeds", *seeds, "--cache", cache, "--json", tmp_path / "o.json")
        assert ("2 x 21 samples" in out) == (len(seeds) == 2)
        return json.loads((tmp_path / "o.json").read_text())["values"]
    one, two, both = values(3), values(4), values(3, 4)
    for key in ev.ROWS.keys() & one.keys():
        assert both[key] == pytest.approx((one[key] + two[key]) / 2), key
        assert both[key + "_std"] == pytest.approx(abs(one[key] - two[key]) / 2 ** .5, abs=1e-12), key


def test_targets_taken_from_held_out_images_are_no_part_of_the_reference_and_have_their_own_copy_ratio(trained, cache, capsys, tmp_path):
    argv = ["--ckpt", trained, *FEW, "--refine", "mean", "--n_cal", 8, "--cache", cache, "--json", tmp_path / "o.json"]
    run(capsys, *argv, "--m", 2, "--ref_split", "heldout")
    r = json.loads((tmp_path / "o.json").read_text())
    assert r["n_ref"] == HELD - 3 * 2
    assert r["values"]["bank_ratio"] > 0 and r["floor"]["bank_ratio"] > 0
    run(capsys, *argv, "--m", 20)
    r = json.loads((tmp_path / "o.json").read_text())
    assert r["n_ref"] == HELD and r["values"]["bank_ratio"] > 0, "targets from the training split leave the reference whole"
    run(capsys, *argv)
    assert "bank_ratio" not in json.loads((tmp_path / "o.json").read_text())["values"], "all training images are targets"
    code, _, err = cli(capsys, *argv, "--ref_split", "heldout")
    assert code == 2 and f"takes all {HELD} held-out images" in err and "try --m 3" in err


def test_the_floor_is_measured_on_balanced_classes():
    labels = torch.tensor([0] * 70 + [1] * 20 + [2] * 10)
    i = ev.balanced(labels, 100, 24, torch.Generator().manual_seed(0))
    assert labels[i].bincount().tolist() == [8, 8, 8] and len(i.unique()) == 24
    assert labels[ev.balanced(labels, 100, 60, torch.Generator().manual_seed(0))].bincount().tolist() == [30, 20, 10]


def test_the_grid_puts_each_sample_above_its_nearest_training_image(files, capsys, tmp_path):
    run(capsys, "--samples", files / "copies.npz", "--ref", files / "ref.npz", "--train", files / "train.npz", "--features", "pixels",
        "--grid", tmp_path / "g.png")
    from PIL import Image
    picture = np.asarray(Image.open(tmp_path / "g.png"))[::3, ::3]               # zoom 3; gap 1
    tile = lambda r, c: picture[1 + 17 * r:17 + 17 * r, 1 + 17 * c:17 + 17 * c]
    assert picture.shape == (6 * 17 + 1, 10 * 17 + 1)
    for r in range(0, 6, 2):                                  # these samples are training images: they find themselves
        for c in range(10):
            assert np.array_equal(tile(r, c), tile(r + 1, c)) and tile(r, c).max() > 100


def test_failures_are_the_images_that_refinement_made_worst_with_the_unrefined_one_above(trained, cache, capsys, tmp_path):
    out = run(capsys, "--ckpt", trained, *FEW, "--refine", "gaussian", "--n_cal", 8, "--cache", cache, "--failures", tmp_path / "f.png")
    from PIL import Image
    picture = np.asarray(Image.open(tmp_path / "f.png"))[::3, ::3]
    assert "log p(true class)" in out and picture.shape[1] == 171 and picture.shape[0] in (35, 69)
    source = ev.Run(trained, torch.device("cpu"))
    plain = source.draw(source.drawer(sample.Recipe(sample.Sampler(steps=2, x0_bound=1.0))), 20, 0, 500)[0]
    shown = [any(np.array_equal(picture[1 + 17 * r:17 + 17 * r, 1:17], image) for image in plain) for r in (0, 1)]
    assert shown == [True, False], "the upper row shows unrefined images"


def test_batches_hold_as_many_classes_as_asked_for():
    class Recorder:
        classes, seen, coupled = list(range(6)), [], False

        def __call__(self, y, index, seed):
            self.seen.append((y.tolist(), index))
            return torch.zeros(len(y), 16, 16)
    source = ev.Run.__new__(ev.Run)
    source.dataset = data.load("digits")
    for mixed, want in ((0, 1), (1, 1), (2, 2), (3, 3), (6, 6)):
        drawer = Recorder()
        drawer.seen = []
        images, labels, _ = source.draw(drawer, 58, 0, 10, mixed)                # 58 rounds up to 60: ten of each class
        assert images.shape == (60, 16, 16, 1) and np.bincount(labels).tolist() == [10] * 6
        assert all(len(set(y)) == want for y, _ in drawer.seen), (mixed, drawer.seen)
        assert sorted(k for _, index in drawer.seen for k in index) == list(range(60))
        assert all(k % 6 == c for y, index in drawer.seen for c, k in zip(y, index)), "image k is the same in any batch"


# ---- the ablation

def ablation_argv(trained, cache, out):
    return ["ablate", "--ar", trained, "--n", 20, "--n_cal", 8, "--seeds", 2, "--cache", cache, "--out_dir", out]


@pytest.fixture
def two_rows(monkeypatch):
    few = sample.Sampler(steps=2)
    monkeypatch.setattr(ablate, "ablation", lambda full: [
        ablate.Row("parts", "none", "ar", ablate.plain(few)),
        ablate.Row("parts", "mean", "ar", ablate.refined(few, method="mean")),
        ablate.Row("K", "0", "ar", ablate.refined(few, K=0), x=0),               # the same draws as `none`
        ablate.Row("strength", "1", "ar", ablate.refined(few, method="mean"), x=1)])


def test_a_killed_ablation_goes_on_where_it_was_and_repeats_nothing(trained, cache, capsys, tmp_path, two_rows, monkeypatch):
    draw, count = ablate.Run.draw, []

    def counted(*a, **k):
        count.append(0)
        if len(count) == 4:
            raise KeyboardInterrupt
        return draw(*a, **k)
    monkeypatch.setattr(ablate.Run, "draw", counted)
    argv = ablation_argv(trained, cache, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(capsys, *argv)
    with open(tmp_path / "rows.jsonl", "a") as f:
        f.write('{"key": "cut o')                             # as a kill leaves it
    assert len(count) == 4                                    # two seeds of the first row, one of the second
    first = (tmp_path / "rows.jsonl").read_text().splitlines()[:3]
    out = run(capsys, *argv)
    assert len(count) == 5 and out.count("(known)") == 3, out                    # only the missing seed was drawn
    assert (tmp_path / "rows.jsonl").read_text().splitlines()[:3] == first
    run(capsys, *argv)
    assert len(count) == 5
    table = list(csv.DictReader(open(tmp_path / "table.csv")))
    assert [r["name"] for r in table] == ["training images", "none", "mean", "0", "1"]
    assert table[1]["sliced_w2"] == table[3]["sliced_w2"] and table[2]["sliced_w2"] == table[4]["sliced_w2"]
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2 * 2 + 1, "equal recipes share their results"
    for r in table[1:]:
        assert all(float(r[k]) >= 0 for k in ("fid", "fid_std", "accuracy", "precision", "recall", "spread", "floor", "copy_ratio"))
        assert r["seeds"] == "2" and float(r["calls"]) == 32 and float(r["peak_mb"]) > 50 and float(r["seconds_per_image"]) > 0
    for name in ("fd", "strength", "sensitivity"):
        assert 1000 < (tmp_path / f"{name}.png").stat().st_size < 60_000


def test_another_setting_is_another_result(trained, cache, capsys, tmp_path):
    source = ev.Run(trained, torch.device("cpu"))
    args = ablate.parse_args([])
    row = ablate.Row("", "", "ar", ablate.refined())
    key = lambda row, seed=0, **changes: ablate.result_key(row, source, seed, type(args)(**{**vars(args), **changes}))
    others = [key(row), key(row, 1), key(row, n=20), key(row, n_cal=9), key(row._replace(coupled=True)), key(row._replace(apart=3)),
              key(row._replace(coupled=True, mixed=2)), key(row._replace(recipe=ablate.refined(K=3))), key(row._replace(calibration=1)),
              key(row._replace(drawer=ablate.Shuffled)), key(row._replace(recipe=ablate.refined(move_null=True))), key(row._replace(recipe=ablate.plain())), key(row._replace(recipe=ablate.refined(m=10))),
              key(row._replace(recipe=ablate.plain(cfg_scale=2.0)))]
    assert len(set(others)) == len(others)
    assert key(row._replace(group="g", name="n", x=1)) == key(row), "names do not matter"
    assert key(row._replace(recipe=ablate.plain())) == key(row._replace(recipe=ablate.refined(K=0)), n_cal=9)


@pytest.mark.parametrize("name", ["digits", "shapes"])
def test_tuning_sets_hold_no_held_out_image(name):
    whole, tuning = data.load(name), data.load(name + "-tune")
    of = lambda images: {x.numpy().tobytes() for part in torch.arange(len(images)).split(500) for x in images.batch(part)[0]}
    train, reference, unseen = of(tuning.train), of(tuning.heldout), of(whole.heldout)
    assert not train & reference and not unseen & (train | reference)
    assert train <= of(whole.train) and min(len(reference), len(train)) > 600
    if name == "digits":
        assert len(train | reference) == len(of(whole.train)), "nothing is lost"


def test_the_shuffled_control_moves_images_by_the_displacements_of_their_class(monkeypatch):
    seen = {}
    monkeypatch.setattr(sample.Drawer, "_draw", lambda self, y, index, seed, slot, refine, inpaint=None: seen.update(refine=refine))
    y = torch.arange(60) % 3
    drawer = ablate.Shuffled(models.build(models.preset("gpt-tiny", token_dim=16, grid=4, num_classes=3)), sample.Recipe(), range(3))
    drawer._draw(y, list(range(60)), -1, None, lambda i, c, inverse: c + torch.arange(60.)[:, None, None])
    c = torch.full((60, 1, 2), 7.0)
    taken = (seen["refine"](0, c, None) - c)[:, 0, 0].long()
    assert torch.equal(taken.sort().values, torch.arange(60)), "each displacement is used once"
    assert torch.equal(y[taken], y) and (taken != torch.arange(60)).sum() > 40


@pytest.mark.parametrize("name", ["gpt-tiny", "mar-tiny"])
def test_the_oracle_draws_each_patch_under_the_condition_of_a_real_image_of_its_class(name, monkeypatch):
    model = models.build(models.preset(name, token_dim=16, grid=4, num_classes=3)).eval()
    drawer = ablate.Ideal(model, sample.Recipe(sample.Sampler(steps=2), cfg_scale=1.5), range(3))
    real = torch.randn(3, 40, 16, 16)
    drawer.tokens_of = lambda y, m: real[y]
    monkeypatch.setattr(model.diffloss, "draw", lambda c, c_null, *rest: (c, c_null))
    y, index = torch.arange(30) % 3, list(range(30))
    (c, null), (other, _) = drawer(y, index, 0), drawer(y, index, 1)
    with torch.no_grad():
        ideal = torch.stack([model.conditions(real[k], torch.full((40,), k)) for k in range(3)])
        unknown = model.conditions(real[2], torch.full((40,), 3))
    near = (c[:, None] - ideal[y]).abs().amax((2, 3))                                   # (30, 40)
    assert near.amin(1).max() < 1e-4 and len(set(zip(y.tolist(), near.argmin(1).tolist()))) == 30, "30 different images"
    assert (null[2] - unknown).abs().amax((1, 2)).min() < 1e-4
    assert not torch.equal(c, other), "another seed, other images"


def test_every_row_fits_its_model_and_the_full_profile_holds_the_quick_one(trained):
    quick, full = ablate.ablation(False), ablate.ablation(True)
    names = [(r.group, r.name) for r in full]
    assert len(set(names)) == len(names) and {(r.group, r.name) for r in quick} <= set(names)
    used = {method for r in full for method, _ in r.recipe.refine.stages()}
    assert used == {"sinkhorn", "gaussian", "mean", "meanvar", "ema", "knn"}
    assert {r.model for r in full} == {"ar", "mar", "cdm"} and any(r.coupled for r in full)
    for kind, name in (("ar", "gpt-tiny"), ("mar", "mar-tiny"), ("cdm", "cdm-tiny")):
        model = models.build(models.preset(name, token_dim=16, grid=4, num_classes=10))
        for r in full:
            if r.model == kind:
                sample.Drawer(model, r.recipe, range(10))               # raises ValueError where they do not fit


def test_a_row_that_cannot_run_is_named_and_the_others_go_on(trained, cache, capsys, tmp_path, monkeypatch):
    few = sample.Sampler(steps=2)
    monkeypatch.setattr(ablate, "ablation", lambda full: [
        ablate.Row("parts", "too many targets", "ar", ablate.refined(few, method="mean", ref_split="heldout", m=500)),
        ablate.Row("parts", "pooled", "ar", ablate.refined(few, method="mean", pooled=True)),
        ablate.Row("targets", "held out", "ar", ablate.refined(few, method="mean", ref_split="heldout", m=2))])
    argv = ablation_argv(trained, cache, tmp_path) + ["--seeds", 1, "--batch_size", 16]
    code, out, err = cli(capsys, *argv)
    assert code == 0 and "too many targets is left out: --ref_split heldout" in err
    table = list(csv.DictReader(open(tmp_path / "table.csv")))
    assert [r["name"] for r in table[1:]] == ["pooled", "held out"]
    assert table[1]["floor"] == table[0]["fid"] != table[2]["floor"], "a smaller reference has another floor"
    assert float(table[2]["bank_ratio"]) > 0 and float(table[2]["bank_floor"]) > 0


@pytest.mark.parametrize("argv, message", [
    ([], "give --ar RUN, --mar RUN or --cdm RUN"),
    (["--ar", "nowhere"], "no checkpoint at nowhere"),
    (["--mar", "RUN"], "holds a model of kind ar; give it as --ar"),
    (["--ar", "RUN", "--only", "nothing"], "--only nothing matches no row"),
    (["--ar", "RUN", "--sedes", "2"], "did you mean --seeds?"),
    (["--ar", "RUN", "--profile", "slow"], "invalid choice: 'slow'"),
])
def test_bad_input_to_the_ablation_is_one_clear_line(trained, capsys, tmp_path, argv, message):
    code, out, err = cli(capsys, "ablate", *(str(trained) if a == "RUN" else a for a in argv), "--out_dir", tmp_path / "o")
    assert code == 2 and message in err and err.count("\n") == 1, err


@pytest.mark.parametrize("argv, message", [
    (["--ckpt", "nowhere"], "no checkpoint at nowhere"),
    (["--ckpt", "RUN", "--ref", "r.npz"], "leave --ref, --train and --dataset out"),
    (["--ckpt", "RUN", "--num_iter", "4"], "only mar has a choice"),
    (["--ckpt", "RUN", "--n", "5"], "5 is out of range: at least 10"),
    (["--ckpt", "RUN", "--failures", "f.png"], "--failures compares refined with unrefined"),
    (["--ckpt", "RUN", "--refnie", "default"], "did you mean --refine?"),
    (["--samples", "s.npz"], "give --ref FILE or --dataset NAME"),
    ([], "give --samples FILE or --ckpt RUN"),
])
def test_bad_input_to_the_measurement_of_a_checkpoint_is_one_clear_line(trained, capsys, argv, message):
    code, out, err = cli(capsys, *(str(trained) if a == "RUN" else a for a in argv))
    assert code == 2 and message in err and err.count("\n") == 1, err


PEAK = """
import torch, ablate
cpu = torch.device("cpu")
x = torch.ones(300, 2 ** 18); del x                       # a higher peak before the reset, which must not count
before = ablate.peak_mb(cpu, reset=True)
x = torch.ones(100, 2 ** 18)                              # 100 MiB
high = ablate.peak_mb(cpu); del x
print(before, high, ablate.peak_mb(cpu, reset=True))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can reset the peak")
def test_peak_memory_is_that_of_what_ran_since_the_reset():
    """In a process of its own: in one that has run other tests, freed memory serves the new tensor and no peak rises."""
    out = subprocess.run([sys.executable, "-c", PEAK], cwd=MAIN, capture_output=True, text=True, check=True).stdout
    before, high, after = map(float, out.split())
    assert before + 80 < high < before + 200 and after < high, out
