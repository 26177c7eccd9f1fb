"""One map for all classes of a batch: what it finds, what it leaves to chance, how it is drawn."""
from types import SimpleNamespace

import pytest
import torch

import many
import sample
from diffloss import ImageNoise
from model import build, preset
from ot_refine import Gaussian
from sample import draw_images

torch.set_num_threads(1)
every = pytest.mark.parametrize


def batch(K, n, m=100, r=4, own=0.0, seed=0):
    """(refiners, y, c, the classes' own shifts): K classes of n conditions (K n, 6) whose targets
    were shrunk to a half, drifted by 1 and, each class of its own, by `own` times a normal."""
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    axes, y = torch.eye(6)[None, :, :r].repeat(2, 1, 1), torch.arange(K).repeat(n)
    means, shifts = 3 * randn(K, r), own * randn(K, r)
    refiners = {k: SimpleNamespace(axes=axes, targets=means[k] + randn(2, m, r)) for k in range(K)}
    c = torch.cat([means[y] + randn(K * n, r) / 2 + 1 + shifts[y], randn(K * n, 2)], 1)
    return refiners, y, c, shifts


def shared_of(refiner):
    """A Shared whose Refiners are those of refiner(k)."""
    model = build(preset("gpt-tiny", grid=2, num_classes=10, token_dim=4))
    found = many.Shared(model, None, {})
    found.refiner = refiner
    return found


def class_means(z, y):
    return torch.stack([z[y == k].mean(0) for k in y.unique()])


def moved(refiners, y, c):
    return many.shared(refiners)(1, c, y)


def test_five_images_of_forty_classes_find_the_drift_and_the_spread_that_they_share():
    refiners, y, c, _ = batch(40, 5)
    z, to = moved(refiners, y, c), torch.stack([r.targets[1].mean(0) for r in refiners.values()])
    assert torch.equal(z[:, 4:], c[:, 4:]), "directions outside of the axes stay"
    d = z[:, :4] - to[y]
    # 200 conditions: the mean is exact, a variance to 10 %, and shrinkage takes some
    assert d.mean(0).abs().max() < 1e-3 and (d.var(0) - 1).abs().max() < 0.2, d.var(0)
    # the means of five are left to chance, at 1 / sqrt(5), and not pulled to those of the targets
    spread = class_means(d, y).square().mean().sqrt()
    assert 0.35 < spread < 0.55, spread


@every("n", [5, 50])
def test_a_shift_of_a_class_of_its_own_goes_as_far_as_it_shows_above_chance(n):
    refiners, y, c, shifts = batch(40, n, own=2.0)
    to = torch.stack([r.targets[1].mean(0) for r in refiners.values()])
    left = class_means(moved(refiners, y, c)[:, :4] - to[y], y)
    # of 2 in each direction; twice .5 / sqrt(5), as the map doubles the spread, is chance
    assert left.square().mean().sqrt() < 0.25 and shifts.square().mean().sqrt() > 1.5


def test_the_weight_is_signal_over_signal_and_noise():
    K, n, r = 400, 6, 3
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    member, by_targets, by_images = torch.eye(K).repeat(n, 1), randn(K, r), 2 * randn(K * n, r)
    chance = member @ by_targets + by_images + 5
    d = chance + member @ randn(K, r)
    found = many.own_shifts(d, member, torch.tensor(1.0))
    want = (class_means(d, member.argmax(1)) - d.mean(0)) / (1 + 1 + 4 / n)
    error = (found - want).square().mean() / want.square().mean()
    assert error < 0.2 ** 2, "400 x 3 shifts tell the weight to a tenth"
    alike = many.own_shifts(chance, member, torch.tensor(1.0))
    assert alike.square().mean() < 0.02 * found.square().mean(), "by chance alone none is moved"


@every("K, n", [(1, 1), (1, 9), (5, 1)])
def test_of_one_class_or_one_image_of_each_the_mean_of_all_is_moved(K, n):
    refiners, y, c, _ = batch(K, n)
    z = moved(refiners, y, c)
    to = torch.stack([r.targets[1].mean(0) for r in refiners.values()])
    assert (z[:, :4] - to[y]).mean(0).abs().max() < 1e-3
    one = refiners[0].targets[1]
    if K == 1:
        want = Gaussian.fit(c[:, :4], (one - one.mean(0)) * (100 / 99) ** 0.5 + one.mean(0))
        assert torch.allclose(z[:, :4], want(c[:, :4]), atol=1e-4), "it is the class's own map"


def test_batches_hold_whole_classes_or_equal_parts_of_a_large_one(monkeypatch):
    refinement = shared_of(lambda k: k)
    monkeypatch.setattr(many, "shared", sorted)

    def sizes(labels, size):
        parts = list(sample.batches(labels, torch.arange(len(labels)), size, refinement))
        assert all({*labels[part].tolist()} <= {*classes} for part, classes in parts)
        return [(len(part), classes) for part, classes in parts]
    some = torch.tensor([0] * 3 + [4] * 3 + [2] * 13 + [3] * 2)
    assert sizes(some, 8) == [(3, [0]), (7, [2]), (6, [2]), (2, [3]), (3, [4])]
    assert sizes(some, 26) == [(16, [0, 2]), (5, [3, 4])]
    assert sizes(some, 52) == [(21, [0, 2, 3, 4])]


def test_shared_groups_do_not_depend_on_who_draws_them():
    nothing = SimpleNamespace(targets=torch.zeros(1, 2, 3), axes=torch.zeros(1, 3, 3))
    labels, refinement = torch.arange(47) % 10, shared_of(lambda k: nothing)
    group = refinement.groups(labels, 15)
    assert group.tolist() == [k // 3 for k in labels.tolist()]
    shares = [(group % 2 == r).nonzero()[:, 0] for r in range(2)]
    parts = [[part.tolist() for part, _ in sample.batches(labels, share, 15, refinement)]
             for share in (*shares, torch.arange(47))]
    assert sorted(parts[0] + parts[1]) == sorted(parts[2]) and len(parts[2]) == 4


@every("name", ["gpt-tiny", "mar-tiny"])
def test_shared_refinement_draws_nothing_beforehand_and_batches_of_many_classes(name, monkeypatch):
    torch.manual_seed(0)
    model = build(preset(name, grid=2, num_classes=10, token_dim=4)).eval()
    for p in model.parameters():                        # nothing hides behind a zero (adaLN-zero)
        torch.nn.init.normal_(p, std=0.1)
    tokens_of = lambda k, m: torch.randn(30, 4, 4, generator=torch.Generator().manual_seed(k))
    sampling = dict(cfg_scale=1.5, steps=2)
    refinement = many.Shared(model, tokens_of, sampling, m=30)
    drawn, own = [], sample.draw

    def draw(model, y, index, seed, *more, **options):
        drawn.append((y.tolist(), seed, options.get("order")))
        return own(model, y, index, seed, *more, **options)
    monkeypatch.setattr(sample, "draw", draw)
    labels = torch.arange(40) % 10
    images = draw_images(model, lambda x: x.numpy(), labels, torch.arange(40), 0, sampling, 20,
                         refinement)
    assert [seed for _, seed, _ in drawn] == [0, 0], "no calibration"
    assert [sorted(set(y)) for y, _, _ in drawn] == [[*range(5)], [*range(5, 10)]]
    if name == "mar-tiny":
        assert all((order == order[0]).all() for _, _, order in drawn), "places mean one position"
    y = torch.arange(40) % 10
    plain = model.generate(y, ImageNoise(0, range(40)), **sampling)
    assert not torch.allclose(torch.from_numpy(images), plain, atol=1e-2), "refined"


def test_targets_that_are_kept_for_orders_by_class_are_not_used_for_one_order(tmp_path):
    torch.manual_seed(0)
    model = build(preset("mar-tiny", grid=2, num_classes=10, token_dim=4)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    tokens_of = lambda k, m: torch.randn(30, 4, 4, generator=torch.Generator().manual_seed(k))
    make = lambda kind, folder: kind(model, tokens_of, dict(steps=2), m=30, folder=folder)
    assert not torch.equal(model.order(3), model.order(0))
    kept = [make(kind, tmp_path).targets(3) for kind in (sample.Refinement, many.Shared)]
    assert torch.equal(kept[1], make(many.Shared, None).targets(3))
    assert not torch.equal(*kept)
