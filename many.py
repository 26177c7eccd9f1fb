"""Refinement where a class has few images: one map for all classes of a batch.

    python sample.py --refine shared --m 200 --n 50000 --out s.npz      50 images of a class at once

A map of each class's own, fitted on 50 images, brings their chance into the second moments, and its
targets' into the mean. Here the classes of a batch share all but their means:

    d = c - mean of the class's targets             what is left of a condition
    d = d - w (class's mean of d - mean of all)     w = signal / (signal + noise), one for a place
    c = mean of the class's targets + T(d)          T the Gaussian map, to what is left of targets

The signal is how far the classes' means of d lie apart beyond the noise that n images and m targets
of a class explain: the positive-part shrinkage of James and Stein (1961; Efron and Morris 1973).
It is coupled: nothing is calibrated, and nothing is kept but the targets.
"""
import torch

from ot_refine import Gaussian, exact
from sample import Refinement


class Shared(Refinement):
    """A Refinement whose groups are as many whole classes as a batch holds, at least one, and share
    a map and an order."""

    def __post_init__(self):
        self.method, self.coupled = "gaussian", True
        self.orders = "raster" if self.orders == "raster" else "one"
        super().__post_init__()

    def groups(self, labels, size):
        classes, at = labels.unique(return_inverse=True)
        return at // max(1, size // int(at.bincount().max()))

    def for_group(self, y):
        return shared({k: self.refiner(k) for k in y.unique().tolist()})


def shared(refiners):
    """refine(i, c, y) for a batch of the classes of {class: Refiner}, of which the targets (N, m,
    r) and the axes, of one generation order, are used."""
    targets, axes = [r.targets for r in refiners.values()], next(iter(refiners.values())).axes
    classes = torch.tensor(list(refiners), device=axes.device)
    means = torch.stack([t.mean(1) for t in targets])                            # (K, N, r)
    # a class's mean takes one of its m observations with it
    rest = torch.cat([(t - mean[:, None]) * (t.shape[1] / max(t.shape[1] - 1, 1)) ** 0.5
                      for t, mean in zip(targets, means)], 1)                    # (N, K m, r)
    m = rest.shape[1] / len(means)

    @torch.no_grad()
    def refine(i, c, y):
        with exact(c.device):
            member = (y[:, None] == classes).to(axes.dtype)                      # (B, K)
            full, to = c.to(axes.dtype), member @ means[:, i]
            low = full @ axes[i]
            d = low - to
            d = d - member @ own_shifts(d, member, rest[i].var(0) / m)
            d = Gaussian.fit(d, rest[i])(d)
            return (full + (d + to - low) @ axes[i].T).to(c.dtype)

    return refine


def own_shifts(d, member, noise):
    """(K, r): how far the mean of each class of d (B, r) lies from that of all, shrunk. member (B,
    K) is 1 at an image's class; noise (r,): the variance that targets give to a class's mean."""
    n, (B, K) = member.sum(0)[:, None], member.shape
    if B <= K or K == 1:                        # nothing tells a class's shift from chance
        return d.new_zeros(K, d.shape[1])
    mean = member.T @ d / n
    noise = noise + (d - member @ mean).square().sum(0) / (B - K) / n            # (K, r)
    mean = mean - mean.mean(0)
    signal = ((mean.square() / noise).sum() / (K - 1) / d.shape[1] - 1).clamp_min(0)
    return mean * signal / (signal + 1)
