"""What evaluate.py sees images with: a small network, trained on the data set itself."""
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from files import read_kept, save_kept, sha256


def small(images):
    """uint8 (n, H, W, C) -> (n, C, h, w) in [-1, 1], at most 32x32."""
    x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    return F.interpolate(x, size=(32, 32), mode="area") if max(x.shape[2:]) > 32 else x


class Classifier(nn.Module):
    """A small conv net for any image size: 64 features, of unit variance over the training set."""

    def __init__(self, channels, num_classes):
        super().__init__()
        conv = lambda a, b: [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b),
                             nn.ReLU()]
        self.body = nn.Sequential(
            *conv(channels, 16), *conv(16, 16), nn.MaxPool2d(2, ceil_mode=True),
            *conv(16, 32), *conv(32, 32), nn.AdaptiveMaxPool2d(3),
            nn.Flatten(), nn.Linear(9 * 32, 64, bias=False))
        self.norm = nn.BatchNorm1d(64, affine=False)    # fixes the scale: FDs of two seeds compare
        self.head = nn.Linear(64, num_classes)

    def forward(self, images, augment=None):
        x = small(images) if augment is None else jitter(small(images), augment)
        x = self.norm(self.body(x))
        return x, self.head(F.relu(x))


def jitter(x, generator):
    """Small random shifts, turns and scalings of x (n, C, H, W), each image its own."""
    most = torch.tensor([[.15], [.1], [.12], [.12]])
    angle, scale, dx, dy = (torch.rand(4, len(x), generator=generator) * 2 - 1) * most
    cos, sin = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
    theta = torch.stack([torch.stack([cos, -sin, dx], 1), torch.stack([sin, cos, dy], 1)], 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def train_classifier(images, labels, seed=0, epochs=10, cache="cache"):
    """The Classifier of images uint8 (n, H, W, C) and labels (n,) from 0 up: seeded, on the CPU,
    kept in the folder `cache` beside what it depends on, this file too."""
    made_for = {"code": sha256([Path(__file__).read_bytes()]), "seed": seed, "epochs": epochs}
    parts = [images.numpy().tobytes(), labels.numpy().tobytes(), str(images.shape).encode()]
    path = Path(cache, f"classifier-{sha256(parts)}.pt")
    with torch.random.fork_rng(devices=[]):             # the caller's random state stays
        torch.manual_seed(seed)
        net = Classifier(images.shape[3], int(labels.max()) + 1)
    if path.exists():
        try:
            net.load_state_dict(read_kept(path, made_for, "cpu"))
            return net.eval().requires_grad_(False)
        except ValueError as error:
            print(f"the weights in {path} {error}: training anew")

    fit(net, images, labels, seed, epochs)
    try:
        save_kept(path, made_for, net.state_dict())
    except (OSError, ValueError) as error:
        print(f"{error}: the classifier is not kept")
    return net.eval().requires_grad_(False)


def fit(net, images, labels, seed, epochs):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)            # layers so small: two threads on two busy cores took 10x
    gen = torch.Generator().manual_seed(seed)
    per_epoch = max(1, len(images) // 64)               # equal batches: one image has no variance
    opt = torch.optim.AdamW(net.parameters(), weight_decay=.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, total_steps=epochs * per_epoch)
    for _ in tqdm(range(epochs), desc="training the classifier", leave=False, disable=None):
        for i in torch.randperm(len(images), generator=gen).tensor_split(per_epoch):
            loss = F.cross_entropy(net(images[i], augment=gen)[1], labels[i])
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
    torch.set_num_threads(threads)
