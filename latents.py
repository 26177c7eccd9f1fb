"""Latents instead of pixels: images encoded once by KL-16 (vae.py), or arrays of any tokeniser.

A cache of encoded images is a folder, read by memory map:

    manifest.json    what the cache was made for and from, class names, scale, shards; it is there =
                     all is there
    index.npy        (n, 4) int64: class, split (1 = held out) and two checksums of image k, in the
                     shards' order
    00000.npy ...    (<= SHARD, 2, 2z, h, w) float16 moments = cat(mean, logvar) of each image and
                     of its mirror image
    00000.json       what a shard was made for, which of its files cannot be read, checksums; it is
                     there = the shard is whole

Every file is written beside its place and renamed, so that a killed run goes on where it was.
Under torchrun each rank encodes its own shards of the one plan (the folder must be shared); ranks
wait for each other by files, because encoding takes longer than a collective may. float16 rounds
means of size 4 by .002, far below the posterior's noise. ImageNet (1.28 million images) takes 42 GB
at 256 and 168 GB at 512. MAR's own cache, one npz per image, is read as it is.

--dataset latents takes what another tokeniser made, unscaled, as one npz file or as a folder with
one .npy of each (then read by memory map), or a cache in MAR's layout:

    latents          (N, z, h, h) float
    labels           (N,) integers from 0 up
    split            optional (N,): 1 = held out; else a tenth of each class is
    class_names      optional (classes,) strings

`load` is what data.load calls for all of these, `decoder` for a checkpoint's tokens. Not here:
which images, and their crop (sets.py).
"""
import os
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

import numpy as np
import torch
from tqdm import tqdm

import data
import sets
from diffloss import ImageNoise
from files import check_fields, read_json, read_npy, read_npz, reading, sha256, write, write_json
from vae import KL16, KL16_SCALE, latent_scale, load_kl16, posterior

SHARD = 8192                     # images a shard, 270 MB at 256x256: what a kill costs at most
BOUND_STDS = 5.0
NOTE = {"made_for": dict, "bad": list, "crc": list}          # what stands beside a shard
CROP = "halve, bicubic, centre"


# ---------------------------------------------------------------- the data set

class Planned:
    """A split of which only the size is known, for --dry-run."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n


@dataclass
class LatentData(data.Data):
    """A data set whose tokens are latents; size and channels are those of the images that they
    decode to, but for --dataset latents: of the arrays."""
    x0_bound: float | None = None
    latents: dict | None = None     # scale, std, the VAE's fingerprint ...
    vae: object = None              # the KL16 that made or decodes them
    cache_dir: str | None = None    # where they are kept

    @property
    def token_dim(self):
        return (self.vae or self).channels * self.patch ** 2

    def decode(self, x):
        """Tokens (B, N, D) -> images (B, 3, H, W), about [-1, 1]."""
        if not self.vae:
            raise ValueError("these latents have no decoder here, so that there are no images to "
                             "look at or to measure: give --vae if they are of kl16.ckpt")
        return self.vae.decode(super().decode(x))


def load(name, data_dir, size, patch, max_bad, vae, cache_dir=None, device="cpu", plan=False,
         scale=None):
    """The LatentData of a name, encoded on `device` into cache_dir unless they are there.

    data_dir: images in class folders, MAR's npz files in class folders, or a finished cache; or
    arrays. vae: the path of kl16.ckpt. plan: describe the set only; nothing is encoded, and images,
    cache and VAE need not be there. scale: of the latents, instead of their own (a checkpoint's
    model knows but its own). Raises ValueError for a bad size, path or file.
    """
    if name == "latents":
        found, channels, side = load_arrays(data_dir, patch)
        net = vae and fitting_vae(vae, channels, found[3]["scale"], device)
        if size not in (None, side, net and side * net.stride):
            raise ValueError(f"--size {size}: the latents of {data_dir} are {side} x {side}; leave "
                             "--size out (images of another size: --vae decodes to them)")
        root, size, fingerprint = None, side, None       # arrays do not say who made them
    else:
        net = vae_of(name, vae, size, patch, device, plan)
        root, channels, side = cache_of(name, data_dir, size, cache_dir), 3, size // net.stride
        fingerprint = None if vae is None else net.fingerprint()
        found = load_images(name, data_dir, size, max_bad, net, fingerprint, root, plan)
    train, heldout, names, measured = found
    if scale:
        ratio = scale / (measured["scale"] or scale)
        train.scale = heldout.scale = measured["scale"] = scale
        for key in ("std", "x0_bound"):
            measured[key] = measured[key] and measured[key] * ratio
    if not plan:
        data.check_classes(data_dir or root, train, heldout, names)

    if net:
        net.scale = measured["scale"] or net.scale
    return LatentData(name, train, heldout, names, size, channels, patch, side // patch,
                      data_dir and str(data_dir), measured["x0_bound"],
                      {**measured, "fingerprint": fingerprint}, net, root and str(root))


def vae_of(name, vae, size, patch, device, plan):
    """The KL16 that encodes the images of a set, on the meta device if it is not needed."""
    if vae is None and not plan:
        raise ValueError(f"--dataset {name} trains on latents: it needs --vae kl16.ckpt, and "
                         "--data_dir <ImageNet> with train/ and val/, or its train folder, or a "
                         "cache of latents")
    with torch.device("meta" if vae is None else "cpu"):
        net = KL16() if vae is None else load_kl16(vae, device=device)
    if size % (net.stride * patch):
        raise ValueError(f"--size {size} must be a multiple of the VAE's stride {net.stride} x "
                         f"--patch {patch}")
    return net


def load_images(name, data_dir, size, max_bad, net, fingerprint, root, plan):
    """(training, held-out Latents, class names, measured) of images, or of their cache at root."""
    # others than ImageNet take 1 / std of their own latents
    scale = KL16_SCALE if name.startswith("imagenet") else None
    if plan and (fingerprint is None or not (root / "manifest.json").exists()):
        return describe(name, data_dir, scale)
    if data_dir and is_mar_cache(data_dir):
        return load_mar_cache(data_dir, scale, (net.channels, size // net.stride))
    made_for = {"vae": fingerprint, "crop": CROP, "size": size}
    made_for |= {"read": "upright, on white"} if name == "folder" else {}
    return load_cache(root, made_for, name, data_dir, scale, net, max_bad)


def open_vae(facts, path=None, device="cpu"):
    """The KL16 at `path`; ValueError if it is not that of a checkpoint's data facts."""
    made_by = facts["vae"]
    if path is None:
        raise ValueError("this checkpoint models the latents of a VAE: give --vae kl16.ckpt to "
                         "decode them")
    if facts["dataset"] == "latents":
        return fitting_vae(path, facts["channels"], made_by["scale"], device)
    net = load_kl16(path, made_by["scale"], device)
    if made_by["fingerprint"] not in (None, net.fingerprint()):          # None: MAR's own weights
        raise ValueError(f"--vae {path} has fingerprint {net.fingerprint()[:16]}, but the "
                         f"checkpoint was trained on latents of {made_by['fingerprint'][:16]}; "
                         "give the VAE of its training")
    return net


def fitting_vae(path, channels, scale, device):
    """The KL16 at `path` for latents of unknown origin, if it has as many channels."""
    net = load_kl16(path, scale, device)
    if net.channels != channels:
        raise ValueError(f"--vae {path} has {net.channels} channels, these latents {channels}: it "
                         "cannot decode them; leave it out, and decode what sample.py --out s.npz "
                         "writes by your own decoder")
    return net


def decoder(facts, path=None, device="cpu"):
    """The function tokens (B, N, D) -> images uint8 (B, H, W, 3) of a model of latents; of arrays
    without a VAE -> latents (B, z, h, h) float32, unscaled."""
    whole = lambda x: data.unpatchify(x, facts["patch"])
    if facts["dataset"] != "latents" or path:
        net = open_vae(facts, path, device)
        return lambda x: data.to_uint8(net.decode(whole(x)))

    def unscaled(x):
        z = whole(x).float() / facts["vae"]["scale"]
        if not z.isfinite().all():
            raise ValueError("the model gave latents that are not finite: is the checkpoint "
                             "damaged, or --cfg_scale or --temperature extreme?")
        return z.cpu().numpy()
    return unscaled


def cache_of(name, data_dir, size, cache_dir):
    """The folder of the cache: data_dir itself if it is a finished one, or MAR's."""
    if data_dir and ((Path(data_dir) / "manifest.json").exists() or is_mar_cache(data_dir)):
        return Path(data_dir)
    own = ""
    if name == "folder" and data_dir:                    # v1/train and v2/train are not the same
        path = Path(data_dir).resolve()
        own = f"-{path.name}-{size}-{sha256([str(path).encode()])[:8]}"
    return Path(cache_dir or f"cache/{name}{own}")


def images_of(name, data_dir):
    """sets.list_images with the share that is held out where there is no val folder."""
    return sets.list_images(data_dir, heldout_share=0.1 if name == "folder" else 0.01)


def describe(name, data_dir, scale):
    """What is known of a set before its latents are made."""
    if data_dir:
        files, names = images_of(name, data_dir)
        n_held = sum(held for _, _, held in files)
        n_train = len(files) - n_held
    else:
        names, n_train, n_held = [n for _, n in sets.imagenet_classes()], 1_281_167, 50_000
    measured = {"scale": scale, "std": None, "x0_bound": None, "beyond": None}
    return Planned(n_train), Planned(n_held), names, measured


def load_cache(root, made_for, name, data_dir, scale, net, max_bad):
    """What read_cache gives of the cache at root, which is made if there is none."""
    images = data_dir if data_dir and Path(data_dir) != root else None
    found = None
    if images and name == "folder":
        found = images_of(name, images)
        made_for = {**made_for, "files": files_digest(found[0], images)}
    elif images:                                     # ImageNet does not change, and is slow to list
        made_for = {**made_for, "images": str(Path(images).resolve())}
    if not (root / "manifest.json").exists():
        if images is None:
            raise ValueError(f"no latent cache at {root} and no --data_dir to make it from: "
                             "expected a folder with one folder per class, or a cache")
        files, names = found or images_of(name, images)
        made_for = {**made_for, "files": files_digest(files, images)}
        read = lambda path: sets.read_image(path, made_for["size"], published=name != "folder")
        build(root, files, names, read, net, made_for, scale, max_bad)
    return read_cache(root, made_for)


# ---------------------------------------------------------------- writing

def check_made_for(root, found, wanted):
    """ValueError in one line if the cache was made for something else than `wanted` (a dict)."""
    differs = [f"{key} {str(found.get(key))[:20]} -> {str(value)[:20]}"
               for key, value in wanted.items() if found.get(key) != value]
    if differs:
        raise ValueError(f"the latent cache {root} was made with another {', '.join(differs)} "
                         "(cache -> now); choose another --cache_dir, or delete this one to encode "
                         "anew, or give it as --data_dir to take it as it is")


def files_digest(files, root):
    """A short hash of which files (path, label, held out), in which order, of their sizes and
    times: of copies with their times it is the same."""
    facts = ((p.relative_to(root), p.stat(), y, held) for p, y, held in files)
    return sha256(f"{p} {s.st_size} {s.st_mtime_ns} {y} {held}\n".encode()
                  for p, s, y, held in facts)


def build(root, files, class_names, read, vae, made_for, scale=None, max_bad=0.01):
    """Encode files [(path, label, held out)] into the cache at root; returns when all ranks have.

    read(path) -> (H, W, 3) uint8, raising OSError or ValueError for a bad file. scale: None
    computes 1 / std. Raises ValueError where shards of another cache are in the way, or more than
    max_bad of the files are unreadable.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    root.mkdir(parents=True, exist_ok=True)
    parts = [files[k:k + SHARD] for k in range(0, len(files), SHARD)]
    note = lambda number: root / f"{number:05d}.json"
    for old in root.glob("[0-9]*.json"):
        check_made_for(root, read_json(old, **NOTE)["made_for"], made_for)

    todo = [k for k in range(rank, len(parts), world) if not note(k).exists()]
    if rank == 0:
        print(f"encoding {len(files)} images and their mirror images into {root} "
              f"({len(parts)} shards, {world} processes)")
    with tqdm(total=sum(len(parts[k]) for k in todo), desc="encoding", unit="image",
              disable=rank > 0, mininterval=0.5 if sys.stderr.isatty() else 60) as bar:
        for k in todo:
            bad, crc = write_shard(root / f"{k:05d}.npy", parts[k], read, vae, bar)
            write_json(note(k), {"made_for": made_for, "bad": bad, "crc": crc})

    # torchrun ends all ranks when one dies
    waiting = [note(k) for k in range(len(parts))] if rank == 0 else [root / "manifest.json"]
    while not all(file.exists() for file in waiting):
        time.sleep(0.2)
    if rank == 0:
        finish(root, parts, class_names, made_for, scale, max_bad)


def write_shard(path, files, read, vae, bar):
    """Moments of the readable files at path; returns [[position, why]] of the others, and the
    checksums [of an image, of its mirror image]."""
    device, done, bad, seen = next(vae.parameters()).device, [], [], 0
    for batch in read_ahead(files, read):
        bad += [[seen + j, image] for j, image in enumerate(batch) if isinstance(image, str)]
        good = [torch.from_numpy(image) for image in batch if not isinstance(image, str)]
        if good:
            images = torch.stack(good).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
            both = torch.stack([vae.moments(images), vae.moments(images.flip(-1))], dim=1)
            if not both.half().isfinite().all():
                raise ValueError(f"the VAE gave moments beyond float16 for images of {path}: is it "
                                 "the right file?")
            done.append(both.half().cpu())
        seen += len(batch)
        bar.update(len(batch))
    moments = torch.cat(done).numpy() if done else np.empty((0, 2), np.float16)
    write(path, lambda f: np.save(f, moments))
    return bad, [[zlib.crc32(z) for z in pair] for pair in moments]


def read_ahead(files, read, batch=32):
    """Lists of images in order, a line that says why in place of a bad one.

    Threads read the next list meanwhile.
    """
    def attempt(path):
        try:
            return read(path)
        except (OSError, ValueError) as error:
            return str(error)

    world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    with ThreadPoolExecutor(max(1, min(16, (os.cpu_count() or 1) // world))) as pool:
        coming = []
        for k in range(0, len(files) + batch, batch):
            ahead = [pool.submit(attempt, path) for path, _, _ in files[k:k + batch]]
            if coming:
                yield [future.result() for future in coming]
            coming = ahead


def finish(root, parts, class_names, made_for, scale, max_bad):
    """Once all shards are there: name what is unreadable, measure, write index and manifest."""
    notes = [read_json(root / f"{k:05d}.json", **NOTE) for k in range(len(parts))]
    for left in root.glob("*.tmp"):                                      # by killed processes
        left.unlink()
    unreadable = [line for note in notes for _, line in note["bad"]]
    sets.report_unreadable(unreadable, sum(map(len, parts)), max_bad)

    index, shards = [], []
    for k, (part, note) in enumerate(zip(parts, notes)):
        bad = {position for position, _ in note["bad"]}
        good = [(y, held) for j, (_, y, held) in enumerate(part) if j not in bad]
        index += [(*about, *crc) for about, crc in zip(good, note["crc"], strict=True)]
        shards.append({"file": f"{k:05d}.npy", "count": len(part) - len(bad)})
    index = np.array(index, dtype=np.int64).reshape(-1, 4)
    write(root / "index.npy", lambda f: np.save(f, index))

    measured = measure(Shards(root, shards, index[:, 2:]), np.flatnonzero(index[:, 1] == 0), scale)
    write_json(root / "manifest.json",
              {"made_for": made_for, **measured, "count": len(index), "shards": shards,
               "class_names": class_names, "unreadable": len(unreadable)})


def measure(moments, rows, scale=None, most=4096):
    """measured_of the latents of at most `most` training rows."""
    if not len(rows):
        raise ValueError("no readable training image: nothing to measure the latents' scale on")
    sample = torch.from_numpy(np.stack([moments(k, 0) for k in spread(rows, most)])).float()
    generator = torch.Generator().manual_seed(0)
    z = posterior(sample, torch.randn(sample[:, ::2].shape, generator=generator))
    return measured_of(z, latent_scale(sample), scale)


def measured_of(z, one_over_std, scale=None, centre=0.0):
    """{"scale", "std", "x0_bound", "beyond"} of latents z that are to be multiplied by `scale`,
    1 / std where none is given. beyond: the share of their values outside +-x0_bound."""
    scale = scale or one_over_std
    std = scale / one_over_std
    # CHOICE(x0_bound): +-5 standard deviations of the data set's tokens: a normal value in two
    # million lies beyond, and a bound that wide never decides an image, only stops a young head.
    bound = BOUND_STDS * std + scale * abs(centre)
    return {"scale": scale, "std": std, "x0_bound": bound,
            "beyond": ((z * scale).abs() > bound).float().mean().item()}


def spread(rows, most):
    """At most `most` of the rows, from the first to the last."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, most).astype(int))]


# ---------------------------------------------------------------- reading

class Shards:
    """moments(k, flip) (2z, h, w) float16 of image k of a cache, by memory map.

    crc (n, 2): their checksums, looked at whenever one is read (8 us at 256x256)."""

    def __init__(self, root, shards, crc):
        shards = [s for s in shards if s["count"]]
        self.files, self.crc = [root / s["file"] for s in shards], crc
        self.arrays = [read_npy(file) for file in self.files]
        self.ends = np.cumsum([s["count"] for s in shards])
        for s, array in zip(shards, self.arrays):
            if array.ndim != 5 or array.dtype != np.float16 or len(array) != s["count"]:
                raise ValueError(f"{root}/{s['file']} holds {array.dtype} {array.shape}, expected "
                                 f"float16 ({s['count']}, 2, 2z, h, w): delete the cache")

    def __call__(self, k, flip):
        shard = int(np.searchsorted(self.ends, k, side="right"))
        z = self.arrays[shard][k - self.ends[shard], int(flip)]          # negative: from its end
        if zlib.crc32(z) != self.crc[k, int(flip)]:
            raise ValueError(f"{self.files[shard]} is damaged at image {k}: its checksum does not "
                             "fit; delete the cache to encode it anew")
        return z


class MarFiles:
    """The same from MAR's cache: root/class/*.npz with `moments` and `moments_flip` of a shape."""

    def __init__(self, files, shape):
        self.files, self.shape = files, shape            # (2z, h, w), or None: that of the first

    def __call__(self, k, flip):
        name = "moments_flip" if flip else "moments"
        z = read_npz(self.files[k], name)[name]
        self.shape = self.shape or z.shape
        if z.shape != self.shape or z.dtype.kind != "f" or not np.isfinite(z).all():
            raise ValueError(f"{self.files[k]} holds {z.dtype} {name} {z.shape}, expected "
                             f"{self.shape}, finite: the cache was made for another size or VAE")
        return z


class Latents:
    """One split: batch(indices) -> scaled latents (B, z, h, w) float32, labels (B,)."""

    def __init__(self, moments, rows, labels, scale):
        self.moments, self.rows, self.scale = moments, np.asarray(rows), scale
        self.labels = torch.as_tensor(np.asarray(labels), dtype=torch.long)

    def __len__(self):
        return len(self.rows)

    def batch(self, indices, key=None):
        """key = (seed, position of the batch's first image in the run): a fresh flip and posterior
        noise for each visit, whoever computes it. Without a key: no flip, and noise that belongs to
        the image."""
        indices = torch.as_tensor(indices)
        rows = self.rows[indices.numpy()]
        # seeds from 0 up draw images and -1 calibrates: these streams are others
        noise = (ImageNoise(-2, rows) if key is None
                 else ImageNoise(-3 - key[0], range(key[1], key[1] + len(rows))))
        flip = noise.rand(1)[:, 0] < (0.0 if key is None else 0.5)
        moments = np.stack([self.moments(k, f) for k, f in zip(rows, flip)])
        moments = torch.from_numpy(moments).float()                      # (B, 2z, h, w)
        channels, h, w = moments.shape[1:]
        z = posterior(moments, noise.randn(channels // 2, h, w))
        return z * self.scale, self.labels[indices]

    def of_class(self, y, m):
        return data.of_class(self.labels, y, m)


def read_cache(root, wanted):
    """(training, held-out Latents, class names, measured) of a complete cache.

    Raises ValueError if it was made for something else than wanted (a dict).
    """
    manifest = read_json(root / "manifest.json", made_for=dict, shards=list, class_names=list,
                         scale=float, std=float, x0_bound=float, beyond=float)
    check_made_for(root, manifest["made_for"], wanted)
    index, names = read_npy(root / "index.npy"), manifest["class_names"]
    with reading(root / "manifest.json", "manifest of a latent cache"):
        for shard in manifest["shards"]:
            check_fields(shard, {"file": str, "count": int})
        check_fields(dict(enumerate(names)), dict.fromkeys(range(len(names)), str))
    n = sum(shard["count"] for shard in manifest["shards"])
    if index.shape != (n, 4) or index.dtype != np.int64 or not (
            (0 <= index[:, :2]) & (index[:, :2] < (len(names), 2))).all():
        raise ValueError(f"{root}/index.npy holds {index.dtype} {index.shape}, expected int64 "
                         f"({n}, 4): a class below {len(names)}, 0 or 1, two checksums; delete the "
                         "cache to encode it anew")
    moments = Shards(root, manifest["shards"], index[:, 2:])
    splits = [Latents(moments, np.flatnonzero(index[:, 1] == split), index[index[:, 1] == split, 0],
                      manifest["scale"]) for split in (0, 1)]
    measured = {key: manifest[key] for key in ("scale", "std", "x0_bound", "beyond")}
    return (*splits, names, measured)


def is_mar_cache(root):
    return next(Path(root).glob("*/*.npz"), None) is not None


def load_mar_cache(root, scale, expected=None, heldout_share=0.01):
    """The same of MAR's root/class/*.npz; which VAE made it, it does not say. expected: channels
    and side of the latents, if they are known."""
    files, names = sets.list_images(root, (".npz",), heldout_share=heldout_share)
    label, held = (np.array([f[k] for f in files]) for k in (1, 2))
    if expected:
        expected = (2 * expected[0], expected[1], expected[1])
    moments = MarFiles([path for path, _, _ in files], expected)
    measured = measure(moments, np.flatnonzero(held == 0), scale, most=1024)
    splits = [Latents(moments, np.flatnonzero(held == split), label[held == split],
                      measured["scale"]) for split in (0, 1)]
    return (*splits, names, measured)


# ---------------------------------------------------------------- arrays of another tokeniser

class LatentArray(Latents):
    """One split of latents (N, z, h, h) that are taken as they are: batch -> scaled float32."""

    def batch(self, indices, key=None):
        indices = torch.as_tensor(indices)
        rows = self.rows[indices.numpy()]
        return read_rows(self.moments, rows) * self.scale, self.labels[indices]


def read_rows(latents, rows):
    """float32 (B, z, h, h) of some rows; ValueError for the first that is not finite."""
    with np.errstate(over="ignore"):                     # of float64: not finite, see below
        z = torch.from_numpy(np.stack([latents[k] for k in rows]).astype(np.float32))
    bad = ~z.isfinite().flatten(1).all(1)
    if bad.any():
        raise ValueError(f"latent {rows[int(bad.nonzero()[0])]} is not finite (as float32): remove "
                         "it, or make it again")
    return z


def load_arrays(path, patch, most=4096):
    """((training, held-out, class names, measured), channels, side) of arrays, or MAR's cache."""
    if path is None or not Path(path).exists():
        raise ValueError(f"--dataset latents: no --data_dir {path}; {EXPECTED}")
    if Path(path).is_dir() and is_mar_cache(path):
        found = load_mar_cache(path, None, heldout_share=0.1)
        channels, side, width = found[0].batch([0])[0].shape[1:]
    else:
        latents, labels, held, names = read_arrays(path)
        channels, side, width = latents.shape[1:]
        read_rows(latents, spread(np.arange(len(latents)), most))            # all finite?
        rows = [np.flatnonzero(held == split) for split in (0, 1)]
        if not len(rows[0]):
            raise ValueError(f"{path}: no latent is for training; its split is 1 (held out) for "
                             f"all {len(held)}")
        measured = measure_arrays(read_rows(latents, spread(rows[0], most)))
        found = (*(LatentArray(latents, r, labels[r], measured["scale"]) for r in rows), names,
                 measured)
    if side != width or side % patch:
        raise ValueError(f"{path} holds latents of {side} x {width}: expected square ones whose "
                         f"side is a multiple of --patch {patch}")
    return found, channels, side


def measure_arrays(z):
    variance = z.double().var(correction=0).item()
    if not 1e-12 < variance < float("inf"):
        raise ValueError(f"the variance of {z.numel()} latent values is {variance}: no scale can "
                         "be computed; are they constant?")
    # another tokeniser's mean may be anything
    return measured_of(z, variance ** -0.5, centre=z.double().mean().item())


EXPECTED = ("expected an npz file, or a folder with one .npy of each: latents, float (N, z, h, h); "
            "labels, N class numbers from 0 up; optional split, N x 0 or 1 (held out), and "
            "class_names; or MAR's cache, one npz per image in class folders")


def read_arrays(path):
    """latents (N, z, h, w), labels (N,), held out (N,), class names of a file or folder."""
    path, names = Path(path), ("latents", "labels", "split", "class_names")
    z = read_npz(path) if path.is_file() else {
        name: read_npy(path / f"{name}.npy") for name in names if (path / f"{name}.npy").exists()}
    latents, labels = z.get("latents"), z.get("labels")
    held, called = z.get("split"), z.get("class_names")
    n = 0 if latents is None or latents.ndim != 4 else len(latents)
    good = (n and latents.size and latents.dtype.kind == "f" and labels is not None
            and labels.shape == (n,) and labels.dtype.kind in "iu" and labels.min() >= 0)
    if good and held is not None:
        good = held.shape == (n,) and held.dtype.kind in "iub" and np.isin(held, (0, 1)).all()
    if good and called is not None:
        good = called.ndim == 1 and called.dtype.kind == "U"
    if not good:
        held = ", ".join(f"{k} {a.dtype} {a.shape}" for k, a in z.items()) or "none of them"
        raise ValueError(f"{path} holds {held}; {EXPECTED}")
    most = n if called is None else len(called)
    if labels.max() >= most:
        raise ValueError(f"{path} has labels up to {labels.max()}, but {most} "
                         + ("latents" if called is None else "class_names"))
    called = [normalize("NFC", str(y))
              for y in (range(labels.max() + 1) if called is None else called)]
    held = sets.heldout_mask(labels, 0.1) if held is None else held
    return latents, labels.astype(np.int64), held.astype(int), called
