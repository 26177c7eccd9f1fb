"""The latent cache: images encoded once by KL-16, then read by memory map as long as you train.

    manifest.json    what the cache was made for and from, class names, scale, std, shards; it is there = all is there
    index.npy        (n, 2) int32: class and split (1 = held out) of image k, in the order of the shards
    00000.npy ...    (<= SHARD, 2, 2z, h, w) float16 moments = cat(mean, logvar) of each image and of its mirror image
    00000.json       what a shard was made for, and which of its files cannot be read; it is there = the shard is whole

Every file is written beside its place and renamed, so that a killed run goes on where it was. Under torchrun each
rank encodes its own shards of the one plan (the folder must be shared); ranks wait for each other by files, because
encoding takes longer than a collective may. float16 rounds means of size 4 by .002, far below the posterior's noise.
ImageNet at 256 (1.28 million images) takes 42 GB, at 512 168 GB.

MAR's own cache, one npz per image, is read as it is. Not here: which images, and their crop (data.py).
"""
import hashlib
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from diffloss import ImageNoise
from vae import latent_scale, posterior

SHARD = 8192                     # images a shard, 270 MB at 256x256: what a kill costs at most
BOUND_STDS = 5.0


# ---------------------------------------------------------------- writing

def save_atomic(path, write):
    """write(file) beside `path`, then rename: `path` is the old file or the whole new one."""
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(tmp, "wb") as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)


def save_json(path, value):
    save_atomic(path, lambda f: f.write(json.dumps(value, indent=1).encode()))


def check_made_for(root, found, wanted):
    """ValueError in one line if the cache at root was made for something else than wanted (a dict; found may hold more)."""
    differs = [f"{k} {str(found.get(k))[:20]} -> {str(v)[:20]}" for k, v in wanted.items() if found.get(k) != v]
    if differs:
        raise ValueError(f"the latent cache {root} was made with another {', '.join(differs)} (cache -> now); "
                         "choose another --cache_dir, or delete this one to encode anew")


def files_digest(files):
    """A short hash of which files, in which order: (path, label, held out)."""
    return hashlib.sha256("\n".join(f"{Path(p).parent.name}/{Path(p).name} {y} {h}" for p, y, h in files).encode()).hexdigest()[:16]


def build(root, files, class_names, read, vae, made_for, scale=None, max_bad=0.01):
    """Encode files [(path, label, held out)] into the cache at root; returns when all ranks are done.

    read(path) -> (H, W, 3) uint8, raising OSError or ValueError for a bad file. scale: None computes 1 / std.
    Raises ValueError where shards of another cache are in the way, or more than max_bad of the files are unreadable.
    """
    root, rank, world = Path(root), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    root.mkdir(parents=True, exist_ok=True)
    parts = [files[k:k + SHARD] for k in range(0, len(files), SHARD)]
    note = lambda number: root / f"{number:05d}.json"
    for old in root.glob("[0-9]*.json"):
        check_made_for(root, json.loads(old.read_text())["made_for"], made_for)
    todo = [k for k in range(rank, len(parts), world) if not note(k).exists()]
    if rank == 0:
        print(f"encoding {len(files)} images and their mirror images into {root} ({len(parts)} shards, {world} processes)")
    with tqdm(total=sum(len(parts[k]) for k in todo), desc="encoding", unit="image", disable=rank > 0,
              mininterval=0.5 if sys.stderr.isatty() else 60) as bar:
        for k in todo:
            bad = write_shard(root / f"{k:05d}.npy", parts[k], read, vae, bar)
            save_json(note(k), {"made_for": made_for, "bad": bad})
    waiting = [note(k) for k in range(len(parts))] if rank == 0 else [root / "manifest.json"]
    while not all(file.exists() for file in waiting):                    # torchrun ends all ranks when one dies
        time.sleep(0.2)
    if rank == 0:
        finish(root, parts, class_names, vae, made_for, scale, max_bad)


def write_shard(path, files, read, vae, bar):
    """Moments of the readable files at path; returns [[position, why]] of the others."""
    device, done, bad, seen = next(vae.parameters()).device, [], [], 0
    for batch in read_ahead(files, read):
        bad += [[seen + j, image] for j, image in enumerate(batch) if isinstance(image, str)]
        good = [torch.from_numpy(image) for image in batch if not isinstance(image, str)]
        if good:
            images = torch.stack(good).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
            both = torch.stack([vae.moments(images), vae.moments(images.flip(-1))], dim=1).half().cpu()
            if not both.isfinite().all():
                raise ValueError(f"the VAE gave moments beyond float16 for images of {path}: is it the right file?")
            done.append(both)
        seen += len(batch)
        bar.update(len(batch))
    moments = torch.cat(done).numpy() if done else np.empty((0, 2), np.float16)
    save_atomic(path, lambda f: np.save(f, moments))
    return bad


def read_ahead(files, read, batch=32):
    """Lists of images in order, a line that says why in place of a bad one; threads read the next list meanwhile."""
    def attempt(path):
        try:
            return read(path)
        except (OSError, ValueError, SyntaxError) as error:
            return f"{path}: {error}"
    world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    with ThreadPoolExecutor(max(1, min(16, (os.cpu_count() or 1) // world))) as pool:
        coming = []
        for k in range(0, len(files) + batch, batch):
            ahead = [pool.submit(attempt, path) for path, _, _ in files[k:k + batch]]
            if coming:
                yield [future.result() for future in coming]
            coming = ahead


def finish(root, parts, class_names, vae, made_for, scale, max_bad):
    """Once all shards are there: count what cannot be read, measure the latents, write index and manifest."""
    bad = [json.loads((root / f"{k:05d}.json").read_text())["bad"] for k in range(len(parts))]
    for left in root.glob("*.tmp"):                                      # by killed processes
        left.unlink()
    report_unreadable([line for rows in bad for _, line in rows], sum(map(len, parts)), max_bad)
    index = np.array([(y, h) for part, rows in zip(parts, bad)
                      for j, (_, y, h) in enumerate(part) if j not in {p for p, _ in rows}], dtype=np.int32).reshape(-1, 2)
    shards = [{"file": f"{k:05d}.npy", "count": len(part) - len(rows)} for k, (part, rows) in enumerate(zip(parts, bad))]
    save_atomic(root / "index.npy", lambda f: np.save(f, index))
    facts = measure(Shards(root, shards), np.flatnonzero(index[:, 1] == 0), scale)
    save_json(root / "manifest.json", {"made_for": made_for, **facts, "count": len(index), "shards": shards, "class_names": class_names,
                                       "unreadable": sum(map(len, bad))})


def report_unreadable(lines, total, max_bad):
    """Name the files that cannot be read; too many are an error."""
    if lines:
        print(f"WARNING: {len(lines)} of {total} images cannot be read and are left out:", *lines[:10], sep="\n  ", file=sys.stderr)
    if len(lines) > max_bad * total:
        raise ValueError(f"{len(lines)} of {total} images cannot be read (first: {lines[0]}), more than "
                         f"--max_bad {max_bad:g} allows; repair or remove them")


def measure(moments, rows, scale=None, most=4096):
    """{"scale", "std", "x0_bound", "beyond"} of the scaled latents, from at most `most` of the training rows.

    beyond: share of values outside +-x0_bound.
    """
    if not len(rows):
        raise ValueError("no readable training image: nothing to measure the latents' scale on")
    some = np.unique(np.linspace(0, len(rows) - 1, most).astype(int))
    sample = torch.from_numpy(np.stack([moments(rows[k], 0) for k in some])).float()
    one_over_std = latent_scale(sample)
    scale = scale or one_over_std
    std = scale / one_over_std
    x = posterior(sample, torch.randn(sample[:, ::2].shape, generator=torch.Generator().manual_seed(0))) * scale
    # CHOICE(x0_bound): +-5 standard deviations of the data set's tokens: a normal value in two million lies beyond,
    # and a bound that wide never decides an image, only stops a young head. Alternative: off, as MAR. Flag: --x0_bound.
    return {"scale": scale, "std": std, "x0_bound": BOUND_STDS * std, "beyond": (x.abs() > BOUND_STDS * std).float().mean().item()}


# ---------------------------------------------------------------- reading

class Shards:
    """moments(k, flip) (2z, h, w) float16 of image k of a cache, by memory map."""

    def __init__(self, root, shards):
        self.arrays = [np.load(Path(root) / s["file"], mmap_mode="r") for s in shards if s["count"]]
        self.ends = np.cumsum([s["count"] for s in shards if s["count"]])
        for s, array in zip([s for s in shards if s["count"]], self.arrays):
            if len(array) != s["count"]:
                raise ValueError(f"{root}/{s['file']} holds {len(array)} images, its manifest says {s['count']}: delete the cache")

    def __call__(self, k, flip):
        shard = int(np.searchsorted(self.ends, k, side="right"))
        return self.arrays[shard][k - self.ends[shard], int(flip)]       # from the shard's end: negative


class MarFiles:
    """The same from MAR's cache: root/class/*.npz with `moments` and `moments_flip` (2z, h, w)."""

    def __init__(self, files):
        self.files = files

    def __call__(self, k, flip):
        try:
            with np.load(self.files[k]) as z:
                return z["moments_flip" if flip else "moments"]
        except Exception as error:                                       # zip, pickle, key and OS errors
            raise ValueError(f"{self.files[k]} is no latent of MAR's cache (npz with moments and moments_flip): {error}") from None


class Latents:
    """One split: batch(indices) -> scaled latents (B, z, h, w) float32, labels (B,)."""

    def __init__(self, moments, rows, labels, scale):
        self.moments, self.rows, self.scale = moments, np.asarray(rows), scale
        self.labels = torch.as_tensor(np.asarray(labels), dtype=torch.long)

    def __len__(self):
        return len(self.rows)

    def batch(self, indices, key=None):
        """key = (seed, position of the batch's first image in the run): a fresh flip and posterior noise for each visit,
        whoever computes it. Without a key: no flip, and noise that belongs to the image."""
        indices = torch.as_tensor(indices)
        rows = self.rows[indices.numpy()]
        # seeds from 0 up draw images and -1 calibrates: these streams are others
        noise = ImageNoise(-2, rows) if key is None else ImageNoise(-3 - key[0], range(key[1], key[1] + len(rows)))
        flip = noise.rand(1)[:, 0] < (0.0 if key is None else 0.5)
        moments = torch.from_numpy(np.stack([self.moments(k, f) for k, f in zip(rows, flip)])).float()
        channels, h, w = moments.shape[1:]
        return posterior(moments, noise.randn(channels // 2, h, w)) * self.scale, self.labels[indices]

    def of_class(self, y, m):
        """Indices of at most m images of class y, spread over the set."""
        found = (self.labels == y).nonzero().flatten()
        return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:m]]


def read_cache(root, wanted):
    """(training Latents, held-out Latents, class names, facts) of a complete cache, None if there is none yet.

    Raises ValueError if it was made for something else than wanted (a dict).
    """
    root = Path(root)
    if not (root / "manifest.json").exists():
        return None
    manifest = json.loads((root / "manifest.json").read_text())
    check_made_for(root, manifest["made_for"], wanted)
    moments, index = Shards(root, manifest["shards"]), np.load(root / "index.npy")
    splits = [Latents(moments, np.flatnonzero(index[:, 1] == s), index[index[:, 1] == s, 0], manifest["scale"]) for s in (0, 1)]
    facts = {k: manifest[k] for k in ("scale", "std", "x0_bound", "beyond")}
    return (*splits, manifest["class_names"], {**facts, "fingerprint": manifest["made_for"]["vae"]})
