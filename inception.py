"""FID as it is published: Inception-v3 (graph of 2015-12-05), its resize and weights; the files of
samples and references that evaluate.py measures.

A feature space of evaluate.py: images uint8 (N, H, W, C) -> pool features (N, 2048), logits
(N, 1008) without bias. Names and shapes are those of the PyTorch state dict that FID programs share
(566 tensors, 95.5 MB), loaded strictly; the weights are not included. It is not torchvision's
Inception: 1008 logits, average pools that ignore the padding, a max pool in the last block, and an
input resized as TensorFlow 1 did, without the half-pixel shift.

Szegedy et al. 2015 (arXiv 1512.00567); the state dict: github.com/mseitzer/pytorch-fid, Apache-2.0
"""
import functools
import hashlib
import os
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

from evaluate import Judge, Real, check_shapes, frechet_distance, gaussian
from files import checked_images, read_npz, read_weights

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 + INCEPTION_FILE)
INCEPTION_SHA256 = "6726825d"   # the first digits


def resize_tf1(x, size):
    """Bilinear as TensorFlow 1 did it: source = destination * in / out, no half-pixel shift.
    x (N, C, H, W) float -> (N, C, size, size)."""
    for dim in (2, 3):
        n = x.shape[dim]
        source = torch.arange(size, device=x.device, dtype=torch.float32) * (n / size)
        low = source.long().clamp(max=n - 1)
        frac = (source - low).view((-1, 1) if dim == 2 else (-1,))
        a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1))
        x = a + (b - a) * frac
    return x


class ConvBN(nn.Module):
    def __init__(self, c_in, c_out, kernel, stride=1, same=True):
        super().__init__()
        kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = [k // 2 for k in kernel] if same and stride == 1 else 0
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


# An Inception block is a fork: a list of chains whose ends are concatenated. A chain is a list of
# layers (name, channels, kernel[, stride]), pools and forks. The names are those of the published
# state dict. TensorFlow's average pool ignores the padding.
_POOLS = {"avg": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
          "max": lambda x: F.max_pool2d(x, 3, 1, 1), "shrink": lambda x: F.max_pool2d(x, 3, 2)}


def _dbl(a, b, stride=1):
    return [("branch3x3dbl_1", a, 1), ("branch3x3dbl_2", b, 3), ("branch3x3dbl_3", b, 3, stride)]


def _block_a(pool):                                                              # 35 x 35
    return [[("branch1x1", 64, 1)], [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)], _dbl(64, 96),
            ["avg", ("branch_pool", pool, 1)]]


def _block_c(c):                                                                 # 17 x 17
    return [[("branch1x1", 192, 1)],
            [("branch7x7_1", c, 1), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1))],
            [("branch7x7dbl_1", c, 1), ("branch7x7dbl_2", c, (7, 1)), ("branch7x7dbl_3", c, (1, 7)),
             ("branch7x7dbl_4", c, (7, 1)), ("branch7x7dbl_5", 192, (1, 7))],
            ["avg", ("branch_pool", 192, 1)]]


def _block_e(pool):                                                              # 8 x 8
    def fork(name):
        return [[(name + "a", 384, (1, 3))], [(name + "b", 384, (3, 1))]]
    return [[("branch1x1", 320, 1)], [("branch3x3_1", 384, 1), fork("branch3x3_2")],
            [*_dbl(448, 384)[:2], fork("branch3x3dbl_3")], [pool, ("branch_pool", 192, 1)]]


BLOCKS = {"5b": _block_a(32), "5c": _block_a(64), "5d": _block_a(64),
          "6a": [[("branch3x3", 384, 3, 2)], _dbl(64, 96, 2), ["shrink"]],       # 35 -> 17
          "6b": _block_c(128), "6c": _block_c(160), "6d": _block_c(160), "6e": _block_c(192),
          "7a": [[("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],          # 17 -> 8
                 [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)),
                  ("branch7x7x3_3", 192, (7, 1)), ("branch7x7x3_4", 192, 3, 2)], ["shrink"]],
          "7b": _block_e("avg"), "7c": _block_e("max")}


class Mixed(nn.Module):
    def __init__(self, c_in, fork):
        super().__init__()
        self.fork, self.c_out = fork, self._add(fork, c_in)

    def _add(self, fork, c_in):
        """Registers the layers; returns the width after them."""
        width = 0
        for chain in fork:
            c = c_in
            for step in chain:
                if isinstance(step, list):
                    c = self._add(step, c)
                elif isinstance(step, tuple):
                    self.add_module(step[0], ConvBN(c, *step[1:]))
                    c = step[1]
            width += c
        return width

    def forward(self, x, fork=None):
        def run(h, step):
            if isinstance(step, list):
                return self(h, step)
            return _POOLS[step](h) if isinstance(step, str) else getattr(self, step[0])(h)
        return torch.cat([functools.reduce(run, chain, x) for chain in fork or self.fork], 1)


class Inception(nn.Module):
    """images uint8 (N, H, W, 1 or 3) -> features (N, 2048), logits (N, 1008)."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3, same=False)
        c = 192
        for name, fork in BLOCKS.items():
            block = Mixed(c, fork)
            self.add_module("Mixed_" + name, block)
            c = block.c_out
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images):
        x = images.permute(0, 3, 1, 2).float()
        x = x.expand(-1, 3, -1, -1)                                              # grey becomes RGB
        x = (resize_tf1(x, 299) - 128) / 128                                     # (N, 3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))        # (N, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))        # (N, 192, 71, 71)
        x = F.max_pool2d(x, 3, 2)                                                # (N, 192, 35, 35)
        for name in BLOCKS:
            x = getattr(self, "Mixed_" + name)(x)     # at last (N, 2048, 8, 8)
        x = x.mean((2, 3))
        return x, x @ self.fc.weight.T     # the published score omits the bias


def load_inception(folder):
    """The network with the published weights, whose file is in `folder`.

    FileNotFoundError, ValueError: the file is missing, or not that file."""
    path = os.path.join(folder, INCEPTION_FILE)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no Inception weights at {path}: download {INCEPTION_URL} "
                                f"(95.5 MB, sha256 {INCEPTION_SHA256}...) to there; or use "
                                "--features classifier or pixels")
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if not digest.startswith(INCEPTION_SHA256):
        print(f"warning: {path} has sha256 {digest[:8]}..., the published weights "
              f"{INCEPTION_SHA256}...: the numbers are not comparable with published ones",
              file=sys.stderr)
    state, net = read_weights(path, INCEPTION_FILE), Inception().eval().requires_grad_(False)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not the state dict {INCEPTION_FILE}: {why}") from None
    return net


def read_reference(path):
    """What a reference file holds, as ADM's do: images uint8 (n, H, W, C) or None, and published
    statistics, the mean mu (F,) and covariance sigma (F, F) of features, or None."""
    z = read_npz(path)
    found = [z[k] for k in ("mu", "sigma") if k in z]
    for a in found:
        if a.dtype.kind not in "fiu":
            raise ValueError(f"{path} holds {a.dtype} {a.shape}, expected numbers")
    if found:
        found, shapes = [torch.from_numpy(a.astype(float)) for a in found], [a.shape for a in found]
        if (shapes != [shapes[0][:1], shapes[0][:1] * 2]
                or not all(a.numel() and a.abs().max() < 1e30 for a in found)):
            raise ValueError(f"{path}: mu and sigma have shapes {shapes}; expected (F,) and "
                             "(F, F), finite")
        sigma = found[1]
        size, least = sigma.abs().max(), torch.linalg.eigvalsh(sigma)[0]
        if (sigma - sigma.T).abs().max() > 1e-4 * size or least < -1e-4 * size:
            raise ValueError(f"{path}: sigma is no covariance: it must be symmetric, and its least "
                             f"eigenvalue, {least:.3g}, not negative")
    images = None
    if "arr_0" in z or not found:
        images = torch.from_numpy(checked_images(z, path, "arr_0", "arr_1")[0])
    return images, tuple(found) or None


def reference_judge(path, images, space_of, device):
    """The Judge of evaluate.py --ref, for samples uint8 (n, H, W, C)."""
    held, statistics = read_reference(path)
    if held is not None:
        check_shapes(images, held)
    real = Real(held)
    space = space_of(real)
    return Published(space, real, statistics, device) if statistics else Judge(space, real, device)


class Published(Judge):
    """A Judge whose Frechet distance is that to published mu (F,), sigma (F, F); real: without
    labels, perhaps without images."""

    def __init__(self, space, real, statistics, device="cpu"):
        self.space, self.real, self.device = space, real, device
        if real.images is not None:
            super().__init__(space, real, device)
        self.gaussian = statistics

    def distances(self, x):
        mu = self.gaussian[0]
        if x.shape[1:] != mu.shape:
            raise ValueError(f"mu has {len(mu)} entries, the features {x.shape[1]}: statistics "
                             "belong to the extractor that made them")
        if self.real.images is not None:
            return super().distances(x)
        return {"fid": frechet_distance(*gaussian(x), *self.gaussian)}
