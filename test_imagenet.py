"""The ImageNet path at small size: KL-16, the latent cache, training and drawing on latents, a
thousand classes, many processes, and what plan.py says that it takes."""
import argparse
import ast
import functools
import importlib
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.run import get_args_parser, parse_args as launch_args

import data
import evaluate
import command
import files
import latents
import many
import mar
import model as models
import plan
import sample
import sets
import train
import vae
from model import build, preset
from runs import read_checkpoint
from vae import KL16, KL16_SCALE, latent_scale, load_kl16

ROOT = Path(__file__).parent
GOLDEN = Path(os.environ.get("GOLDEN_DIR", ROOT / "assets"))
TINY = ("gpt-tiny", "mar-tiny", "cdm-tiny")
SIDE = 8                                                    # latents 4x4 of 4 channels
torch.set_num_threads(1)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def relative(a, b):
    """Largest difference over the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def refused(call, *words):
    """The call raises ValueError (or FileNotFoundError) in one line that holds the words."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        call()
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message, message


# ================================================================ KL-16

def tiny_vae(**changes):
    """Stride 2, with both kinds of residual shortcut."""
    torch.manual_seed(0)
    return KL16(**{"ch": 32, "ch_mult": (1, 2), "z_channels": 4, **changes})


def tiny_images(n=3, size=8):
    return torch.rand(n, 3, size, size, generator=gen()) * 2 - 1


def saved(path, state):
    torch.save({"model": state}, path)
    return str(path)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("vae_golden_*.npz")), ids=lambda f: f.stem)
def test_the_vae_gives_the_golden_moments_and_images(path, tmp_path):
    with np.load(path) as z:
        g = {k: torch.from_numpy(z[k]) for k in z.files if k != "config"}
        net = KL16(**ast.literal_eval(str(z["config"]))).double()
    weights = {k[2:]: v for k, v in g.items() if k.startswith("w/")}
    net.load_state_dict({k: v.double() for k, v in weights.items()})       # names and shapes agree
    assert (net.moments(g["image"]) - g["moments"]).abs().max() < 1e-5
    # the golden z is unscaled: decoded = D(z)
    assert (net.decode(g["z"].double() * net.scale) - g["decoded"]).abs().max() < 1e-5

    loaded = load_kl16(saved(tmp_path / "kl16.ckpt", weights))    # its size from the tensors
    assert loaded.scale == KL16_SCALE and loaded.quant_conv.weight.dtype == torch.float32
    assert (loaded.moments(g["image"]) - g["moments"]).abs().max() < 5e-5, "float32"


def test_kl16_has_the_released_tensors_and_parameters():
    with torch.device("meta"):
        net = KL16()
    state = net.state_dict()
    assert len(state) == 312 and sum(v.numel() for v in state.values()) == 66_456_019
    attention = sorted({n.rsplit(".", 2)[0] for n in state if n.endswith(".q.weight")})
    assert attention == ["decoder.mid.attn_1", "encoder.down.4.attn.0", "encoder.down.4.attn.1",
                         "encoder.mid.attn_1"]
    shortcut = sorted({n.rsplit(".", 2)[0] for n in state if ".nin_shortcut." in n})
    assert shortcut == ["decoder.up.1.block.0", "decoder.up.3.block.0", "encoder.down.2.block.0",
                        "encoder.down.4.block.0"]
    assert (net.channels, net.stride, net.scale) == (16, 16, 0.2325)


def test_the_scale_has_one_home():
    for path in ROOT.glob("*.py"):
        if path.name != "vae.py" and not path.name.startswith("test"):
            assert "0.2325" not in path.read_text(), f"{path.name}: import vae.KL16_SCALE"


def test_scale_multiplies_the_latents_and_cancels_in_decode():
    images, one, two = tiny_images(), tiny_vae(scale=1.0), tiny_vae(scale=0.5)
    x = one.encode(images, gen(1))
    assert x.shape == (3, 4, 4, 4) and x.dtype == torch.float32
    assert torch.allclose(two.encode(images, gen(1)), 0.5 * x)
    assert torch.allclose(two.decode(0.5 * x), one.decode(x), atol=1e-6)
    assert one.decode(one.encode(torch.zeros(1, 3, 6, 10))).shape == (1, 3, 6, 10)


def test_draws_of_the_posterior_have_its_moments():
    mean, logvar = torch.full((1, 4, 100, 100), 3.0), torch.full((1, 4, 100, 100), -1.0)
    noise = torch.randn(1, 4, 100, 100, generator=gen())
    z = vae.posterior(torch.cat([mean, logvar], 1), noise)
    assert abs(z.mean() - 3.0) < 0.015, "5 standard errors of 40,000 draws"
    assert abs(z.std() / math.exp(-0.5) - 1) < 0.02
    clamped = lambda at: vae.posterior(torch.cat([mean, torch.full_like(mean, at)], 1), noise)
    assert clamped(1e4).isfinite().all() and (clamped(-1e4) - 3.0).abs().max() < 1e-5


def test_images_are_taken_in_pieces_that_bound_the_memory_and_change_nothing():
    whole, parts, sizes = tiny_vae(), tiny_vae(), []
    parts.max_pixels = 2 * 8 * 8
    parts.encoder.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    images, x = tiny_images(5), torch.randn(5, 4, 4, 4, generator=gen())
    # other batches: fp32
    assert torch.allclose(parts.moments(images), whole.moments(images), atol=1e-5)
    assert sizes == [2, 2, 1]
    assert torch.allclose(parts.decode(x), whole.decode(x), atol=1e-5)
    assert whole.decode(x[:0]).shape == (0, 3, 8, 8) and len(whole.moments(images[:0])) == 0


def test_the_vae_is_frozen_and_ignores_autocast_and_train_mode():
    net, images = tiny_vae(), tiny_images()
    want = net.moments(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = net.moments(images)
    assert inside.dtype == torch.float32 and torch.equal(inside, want)
    assert torch.equal(net.train().moments(images), want)
    assert not any(p.requires_grad for p in net.parameters())
    assert not net.decode(torch.randn(1, 4, 4, 4, requires_grad=True)).requires_grad
    low = tiny_vae().to(torch.bfloat16).moments(images)
    assert low.dtype == torch.float32 and torch.allclose(low, want, atol=0.1), "8 bits of weights"


@pytest.mark.parametrize("call, words", [
    (lambda: tiny_vae().encode(torch.zeros(1, 3, 9, 8)), ("9x8", "stride 2", "8x8")),
    (lambda: tiny_vae().encode(torch.zeros(1, 1, 8, 8)), ("(1, 1, 8, 8)", "(B, 3, H, W)")),
    (lambda: tiny_vae().encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), ("uint8", "127.5")),
    (lambda: tiny_vae().decode(torch.zeros(1, 3, 4, 4)), ("(1, 3, 4, 4)", "(B, 4, h, w)")),
    (lambda: tiny_vae().decode(torch.zeros(1, 16, 4)), ("(1, 16, 4)", "transpose")),
    (lambda: vae.posterior(torch.zeros(1, 32, 4, 4), torch.zeros(1, 4, 4, 4)), ("(1, 32, 4, 4)",)),
    (lambda: KL16(ch=48), ("ch=48", "32")),
    (lambda: tiny_vae(scale=0.0), ("scale=0.0",)),
    (lambda: latent_scale(torch.full((2, 8, 2, 2), -40.0)), ("variance", "constant")),
    (lambda: latent_scale(torch.full((2, 8, 2, 2), float("nan"))), ("variance",))])
def test_wrong_input_to_the_vae_says_what_came_and_what_was_expected(call, words):
    refused(call, *words)


def test_the_latents_scale_is_one_over_std_without_random_draws():
    mean, logvar = (torch.randn(200, 4, 8, 8, generator=gen(k)) for k in (0, 1))
    moments = torch.cat([mean * 3 + 1, logvar], 1)
    x = vae.posterior(moments, torch.randn(200, 4, 8, 8, generator=gen(2))) * latent_scale(moments)
    assert abs(x.std() - 1) < 0.02, "51,200 draws"


def test_a_vae_comes_back_from_its_file_with_its_fingerprint(tmp_path):
    net, images = tiny_vae(), tiny_images()
    path = saved(tmp_path / "vae.ckpt", net.state_dict())
    loaded = load_kl16(path, scale=0.7)
    assert loaded.scale == 0.7 and (loaded.channels, loaded.stride) == (4, 2)
    assert torch.equal(loaded.moments(images), net.moments(images))
    assert loaded.fingerprint() == net.fingerprint() and not loaded.training
    assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())
    wrapped = {f"module.{n}": v for n, v in net.state_dict().items()}
    assert load_kl16(saved(path, wrapped)).fingerprint() == net.fingerprint(), "names of DDP"
    half = load_kl16(saved(path, {n: v.half() for n, v in net.state_dict().items()}))
    assert half.moments(images).dtype == torch.float32
    assert half.fingerprint() != net.fingerprint(), "other values"


def without(name):
    return lambda state: {n: v for n, v in state.items() if n != name}


@pytest.mark.parametrize("change, words", [
    (without("encoder.mid.attn_1.q.bias"),
     ("'encoder.mid.attn_1.q.bias' is missing", "(1 wrong in all")),
    (without("encoder.conv_in.weight"), ("'encoder.conv_in.weight' is missing",)),
    (without("encoder.down.1.block.0.conv2.weight"),
     ("'encoder.down.1.block.0.conv2.weight' is missing",)),
    (lambda s: {n: v for n, v in s.items() if n.startswith("encoder.")}, ("is missing",)),
    (lambda s: {**s, "loss.logvar": torch.zeros(1)}, ("'loss.logvar' is not part",)),
    (lambda s: {**s, "encoder.conv_in.bias": torch.zeros(31)}, ("is (31,), expected (32,)",)),
    (lambda s: {**s, "encoder.conv_in.weight": torch.zeros(40, 3, 3, 3)}, ("ch=40",)),
    (lambda s: {**s, "quant_conv.bias": s["quant_conv.bias"] * float("nan")}, ("not finite",)),
    (lambda s: {"encoder.down_blocks.0.conv1.weight": torch.zeros(1)}, ("missing", "diffusers")),
    (lambda s: {"step": 3, "model_ema": {}}, ("['step', 'model_ema']", "--vae")),
    (lambda s: {}, ("expected the state dict of a VAE",))])
def test_a_partial_or_foreign_vae_is_refused_by_its_first_offending_name(change, words, tmp_path):
    path = saved(tmp_path / "other.ckpt", change(tiny_vae().state_dict()))
    refused(lambda: load_kl16(path), path, *words)


@pytest.mark.parametrize("content", ["truncated", "empty", "web page", "code"])
def test_a_truncated_or_unsafe_vae_file_is_refused_in_one_line(content, tmp_path):
    path = Path(saved(tmp_path / "kl16.ckpt", tiny_vae().state_dict()))
    whole = path.read_bytes()
    if content == "code":                                   # weights_only: nothing is executed
        torch.save({"model": os.path.join}, path)
    else:
        path.write_bytes({"truncated": whole[:len(whole) // 2], "empty": b"",
                          "web page": b"<html>404</html>"}[content])
    refused(lambda: load_kl16(path), "no readable VAE", f"{path.stat().st_size:,} bytes")
    refused(lambda: load_kl16(tmp_path / "nowhere.ckpt"), "kl16.ckpt")


# ================================================================ the cache

def make_folder(root, per_class=6, classes=("cat", "dog"), size=12):
    rng = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for k in range(per_class):
            image = rng.integers(0, 255, (size, size + 7, 3), dtype=np.uint8)
            Image.fromarray(image).save(root / name / f"{k}.png")
    return root


@pytest.fixture(scope="module")
def vae_files(tmp_path_factory):
    """Two small autoencoders of stride 2 with different weights."""
    root, files = tmp_path_factory.mktemp("vae"), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = KL16(ch=32, ch_mult=(1, 1), z_channels=4).state_dict()
        files.append(Path(saved(root / f"vae{seed}.ckpt", state)))
    return files


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 5)


def load(folder, vae_file, cache=None, name="folder", size=SIDE, **more):
    return data.load(name, folder, size=size, patch=1, vae=vae_file, cache_dir=cache, **more)


def test_the_cache_holds_the_moments_of_each_crop_and_of_its_mirror_image(
        tmp_path, vae_files, small_shards, monkeypatch):
    root, cache = make_folder(tmp_path / "f", per_class=10), tmp_path / "c"
    d = load(root, vae_files[0], cache)
    manifest = json.loads((cache / "manifest.json").read_text())
    index = np.load(cache / "index.npy")
    assert [s["count"] for s in manifest["shards"]] == [5, 5, 5, 5] and len(index) == 20
    assert (len(d.train), len(d.heldout), d.class_names) == (18, 2, ["cat", "dog"])
    assert (d.token_dim, d.grid) == (4, 4) and d.decode(torch.zeros(2, 16, 4)).shape == (2, 3, 8, 8)

    net, moments = load_kl16(vae_files[0]), latents.Shards(cache, manifest["shards"], index[:, 2:])
    files = sorted(root.rglob("*.png"))
    for k in (0, 7, 19):
        image = torch.from_numpy(sets.read_image(files[k], SIDE)).permute(2, 0, 1)[None]
        for flip, view in enumerate((image, image.flip(-1))):
            got = torch.tensor(moments(k, flip)[None]).float()
            assert relative(got, net.moments(view.float() / 127.5 - 1)) < 1e-3, "float16"
        assert index[k, :2].tolist() == [k // 10, int(k % 10 == 9)]
    assert not list(cache.glob("*.tmp"))

    # complete: never encoded again; the folder of the images, or the cache's own, is enough
    monkeypatch.setattr(latents, "build", None)
    for folder, where in ((root, cache), (None, cache), (cache, None)):
        again = load(folder, vae_files[0], where)
        x, y = (z.train.batch([0, 3], key=(0, 0))[0] for z in (d, again))
        assert torch.equal(x, y) and d.x0_bound == again.x0_bound


def test_a_cache_of_another_vae_size_or_set_of_files_is_refused_in_one_line(tmp_path, vae_files):
    root, cache = make_folder(tmp_path / "f"), tmp_path / "c"
    load(root, vae_files[0], cache)
    refused(lambda: load(root, vae_files[1], cache), "made with another vae", "delete this one")
    refused(lambda: load(root, vae_files[0], cache, size=4), "made with another size 8 -> 4")
    manifest = (cache / "manifest.json").read_text()
    (cache / "manifest.json").write_text(manifest.replace("halve, bicubic, centre", "squashed"))
    refused(lambda: load(root, vae_files[0], cache), "made with another crop squashed -> halve")
    (cache / "manifest.json").write_text(manifest)
    (root / "cat" / "0.png").unlink()
    refused(lambda: load(root, vae_files[0], cache), "made with another files")
    (cache / "manifest.json").unlink()                      # an unfinished one: by its shards
    refused(lambda: load(root, vae_files[0], cache), "made with another files")


def test_folders_of_one_name_have_caches_of_their_own_and_replaced_images_are_never_stale(
        tmp_path, vae_files, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [make_folder(tmp_path / version / "train") for version in ("v1", "v2")]
    for file in folders[1].rglob("*.png"):
        Image.open(file).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(file)
    one, two = (load(folder, vae_files[0]) for folder in folders)
    assert one.cache_dir != two.cache_dir
    assert not torch.equal(one.train.batch([0])[0], two.train.batch([0])[0])
    again = load("v1/train", vae_files[0])                  # the same place in other words
    assert again.cache_dir == one.cache_dir

    file = folders[0] / "cat" / "0.png"                     # replaced by one of as many bytes
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10 ** 9))
    refused(lambda: load(folders[0], vae_files[0]), "made with another files", "delete this one",
            "give it as --data_dir")
    (Path(one.cache_dir) / "manifest.json").unlink()        # nor does an unfinished one go on
    refused(lambda: load(folders[0], vae_files[0]), "made with another files")

    # ImageNet is not listed each time: its place counts
    names = ("n01440764", "n02099601")
    a, b = (make_folder(tmp_path / place / "train", 100, names, SIDE) for place in "ab")
    load(a, vae_files[0], "c", "imagenet256")
    refused(lambda: load(b, vae_files[0], "c", "imagenet256"), "made with another images")
    assert len(load("c", vae_files[0], None, "imagenet256").train) == 198, "as it is"


def test_unreadable_images_are_left_out_of_the_cache_by_name(
        tmp_path, vae_files, small_shards, capsys):
    root = make_folder(tmp_path / "f", per_class=10)
    (root / "cat" / "2.png").write_bytes(b"\x89PNG not really")
    refused(lambda: load(root, vae_files[0], tmp_path / "c"), "1 of 20 images", "2.png",
            "--max_bad 0.01")
    d = load(root, vae_files[0], tmp_path / "c", max_bad=0.2)       # goes on from its shards
    assert len(d.heldout) == 2 and "2.png" in capsys.readouterr().err
    assert d.train.labels.tolist() == [0] * 8 + [1] * 9, "labels stay with their images"


def test_a_class_whose_only_training_image_cannot_be_read_is_an_error_as_with_pixels(
        tmp_path, vae_files):
    root = make_folder(tmp_path / "f", 2)
    (root / "dog" / "0.png").write_bytes(b"\x89PNG not really")
    for vae, patch in ((vae_files[0], 1), (None, 4)):
        refused(lambda: data.load("folder", root, 8, patch, 0.5, vae, cache_dir=tmp_path / "c"),
                "class 'dog'", "has no training image: at least 2 readable images")


def test_photos_are_encoded_as_they_are_seen_and_imagenet_as_published(tmp_path, vae_files):
    exif, root = Image.Exif(), tmp_path / "f" / "n01440764"
    exif[274] = 6
    root.mkdir(parents=True)
    image = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    for k in range(2):
        Image.fromarray(image).save(root / f"{k}.png", exif=exif)
    net = load_kl16(vae_files[0])
    for name, seen in (("folder", np.rot90(image, -1)), ("imagenet256", image)):
        load(tmp_path / "f", vae_files[0], tmp_path / name, name)
        wanted = net.moments(torch.tensor(seen.copy()).permute(2, 0, 1)[None] / 127.5 - 1)
        got = np.load(tmp_path / name / "00000.npy")[0, 0]
        assert relative(torch.tensor(got).float(), wanted[0]) < 1e-3, "float16"


def test_imagenet_uses_its_val_folder_or_holds_out_one_in_a_hundred_and_has_readable_names(
        tmp_path, vae_files):
    names, root = ("n01440764", "n02099601"), tmp_path / "in"
    make_folder(root / "train", 100, names, SIDE)
    make_folder(root / "val", 3, names, SIDE)
    whole = load(root, vae_files[0], tmp_path / "a", "imagenet256")
    share = load(root / "train", vae_files[0], tmp_path / "b", "imagenet256")
    assert (len(whole.train), len(whole.heldout)) == (200, 6)
    assert (len(share.train), len(share.heldout)) == (198, 2)
    assert whole.class_names == ["tench, Tinca tinca", "golden retriever"]
    assert whole.vae.scale == KL16_SCALE, "ImageNet keeps KL-16's own scale"
    os.rename(root / "val" / names[0], root / "val" / "n01443537")
    refused(lambda: load(root, vae_files[0], tmp_path / "d", "imagenet256"), "n01440764")


def test_a_folder_gets_its_own_scale_and_a_bound_of_five_standard_deviations(tmp_path, vae_files):
    d = load(make_folder(tmp_path / "f", per_class=20), vae_files[0], tmp_path / "c")
    x, _ = d.train.batch(range(len(d.train)))
    # exact over the training means and variances; one draw of 2,400 values is within 3 %
    assert abs(x.std() - 1) < 0.05, x.std()
    assert d.x0_bound == pytest.approx(5.0, rel=1e-6)
    assert d.facts["vae"]["beyond"] == (x.abs() > 5).float().mean().item()


def test_latents_of_a_visit_follow_from_seed_and_position_however_it_is_shared_out(
        tmp_path, vae_files):
    train = load(make_folder(tmp_path / "f"), vae_files[0], tmp_path / "c").train
    index = torch.tensor([3, 3, 0, 7, 5, 1, 3, 2])
    whole, y = train.batch(index, key=(4, 160))
    parts = [train.batch(index[j:j + 2], key=(4, 160 + j))[0] for j in range(0, 8, 2)]
    assert torch.equal(whole, torch.cat(parts)) and torch.equal(y, train.labels[index])
    assert not torch.equal(whole[0], whole[1]), "the same image twice in a batch is drawn twice"
    assert not torch.equal(whole, train.batch(index, key=(5, 160))[0])
    still = train.batch(index)[0]
    assert torch.equal(still[0], still[6]), "without a key the noise belongs to the image"


def test_latents_have_the_posterior_s_moments_and_are_mirrored_half_of_the_time():
    mean = torch.randn(2, 3, 4, 4, generator=gen())
    pair = torch.cat([mean, torch.full_like(mean, -2.0)], dim=1).numpy()
    d = latents.Latents(lambda k, flip: pair[int(flip)], [0], [0], scale=0.5)
    x = torch.cat([d.batch([0] * 50, key=(0, j * 50))[0] for j in range(40)])
    off = [(x - 0.5 * m).square().sum((1, 2, 3)) for m in mean]
    mirrored = off[1] < off[0]
    assert abs(mirrored.float().mean() - 0.5) < 0.045, "4 standard errors of 2,000 draws"
    rest = x[~mirrored] - 0.5 * mean[0]                     # 48,000 values: 0.3 %
    assert abs(rest.mean()) < 0.01 and abs(rest.std() / (0.5 * math.exp(-1)) - 1) < 0.02


def test_mar_s_one_npz_per_image_is_read_as_it_is(tmp_path, vae_files):
    rng, kept, root = np.random.default_rng(0), {}, tmp_path / "m"
    for name in ("n01440764", "n02099601"):
        (root / name).mkdir(parents=True)
        for k in range(3):
            kept[name, k] = rng.standard_normal((2, 8, 4, 4)).astype(np.float32)
            both = dict(zip(("moments", "moments_flip"), kept[name, k]))
            np.savez(root / name / f"{k}.JPEG.npz", **both)
    d = load(root, vae_files[0], name="imagenet256")
    assert (len(d.train), len(d.heldout), d.class_names[1]) == (4, 2, "golden retriever")
    assert np.array_equal(d.train.moments(d.train.rows[3], 1), kept["n02099601", 1][1])
    refused(lambda: load(root, vae_files[0], name="imagenet256", size=16),
            "moments (8, 4, 4), expected (8, 8, 8)")
    (root / "n01440764" / "0.JPEG.npz").write_bytes(b"PK")
    refused(lambda: load(root, vae_files[0], name="imagenet256"), "not a readable npz: its list")


@pytest.mark.parametrize("given, words", [
    (dict(name="imagenet256"), ("needs --vae kl16.ckpt",)),
    (dict(name="folder", vae=0, size=8, patch=3, data_dir="x"), ("stride 2 x --patch 3",)),
    (dict(name="folder", vae=0, size=9, data_dir="x"), ("multiple of the VAE's stride 2",)),
    (dict(name="imagenet256", vae=0, cache_dir="none"), ("no latent cache at none",)),
    (dict(name="imagenet256", vae="none.ckpt", data_dir="x"), ("no VAE checkpoint at",))])
def test_bad_input_to_the_latent_path_is_one_line(given, words, vae_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if given.get("vae") == 0:
        given = {**given, "vae": vae_files[0]}
    refused(lambda: data.load(**given), *words)


# ================================================================ training and sampling on latents

TRAIN = ["--size", SIDE, "--model", "mar-tiny", "--eval_every", 2, "--global_batch", 8,
         "--device", "cpu"]


def call(module, argv, monkeypatch, capsys):
    """Run a program's main() in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *map(str, argv)])
    code = 0
    try:
        command.run(module.main)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code or 0, captured.out, captured.err


def images_in(path):
    with np.load(path) as z:
        return z["arr_0"].astype(int), z["arr_1"]


@pytest.fixture(scope="module")
def latent_run(tmp_path_factory, vae_files):
    """(run, folder, cache) of two steps on latents, as the command line does it."""
    root = tmp_path_factory.mktemp("latent")
    # 10 are held out, the least that can be measured against
    run, folder, cache = root / "run", make_folder(root / "f", per_class=50), root / "c"
    flags = ["--dataset", "folder", "--data_dir", folder, "--cache_dir", cache]
    with pytest.MonkeyPatch.context() as patch:
        argv = ["--out_dir", run, *flags, "--vae", vae_files[0], *TRAIN, "--steps", 2]
        patch.setattr("sys.argv", ["train.py", *map(str, argv)])
        train.main()
    return run, folder, cache


def test_training_on_latents_leaves_decoded_samples_and_resumes_bitwise(
        latent_run, vae_files, tmp_path, monkeypatch, capsys):
    run, folder, cache = latent_run
    state = read_checkpoint(run)
    assert state["config"]["token_dim"] == 4 and state["config"]["grid"] == 4
    assert state["data"]["vae"]["fingerprint"] and Image.open(run / "samples.png").mode == "RGB"

    flags = ["--dataset", "folder", "--data_dir", folder, "--cache_dir", cache, *TRAIN,
             "--set", "lr_schedule=constant"]
    fit = lambda out, vae_file, steps: call(train, ["--out_dir", tmp_path / out, "--vae", vae_file,
                                                    *flags, "--steps", steps], monkeypatch, capsys)
    for out, steps in (("a", 3), ("b", 1), ("b", 3)):
        code, _, err = fit(out, vae_files[0], steps)
        assert code == 0, err
    a, b = (read_checkpoint(tmp_path / out) for out in "ab")
    assert all(torch.equal(a[part][k], b[part][k]) for part in ("model", "ema") for k in a[part])
    code, _, err = fit("b", vae_files[1], 3)
    assert code == 2 and "made with another vae" in err


def test_samples_are_decoded_by_the_vae_of_the_training_and_by_no_other(
        latent_run, vae_files, tmp_path, monkeypatch, capsys):
    run, out = latent_run[0], tmp_path / "s.npz"
    flags = ["--ckpt", run, "--n", 4, "--steps", 3, "--out", out]
    for vae_file, words in ((None, "--vae kl16.ckpt"), (vae_files[1], "has fingerprint")):
        more = ["--vae", vae_file] if vae_file else []
        for module in (sample, evaluate):
            argv = [*flags, *more] if module is sample else [*flags[:2], "--steps", 3, *more]
            code, _, err = call(module, argv, monkeypatch, capsys)
            assert code == 2 and words in err and err.count("\n") == 1, err
    argv = [*flags, "--vae", vae_files[0], "--classes", "do", "cat"]
    code, _, err = call(sample, argv, monkeypatch, capsys)
    assert code == 0, err
    images, labels = images_in(out)
    assert images.shape == (4, SIDE, SIDE, 3) and labels.tolist() == [1, 0, 1, 0]

    m, state = models.load_model(run)
    x = sample.draw(m, torch.tensor([1, 0, 1, 0]), range(4), 0, solver="ddpm", steps=3,
                    cfg_scale=models.GUIDANCE)
    net = latents.open_vae(state["data"], vae_files[0])
    want = data.to_uint8(net.decode(data.unpatchify(x, 1)))
    assert np.abs(images - want).max() <= 1, "other batches: fp32, then rounding"


def test_inpainting_and_refinement_work_on_latents(
        latent_run, vae_files, tmp_path, monkeypatch, capsys):
    run, folder, cache = latent_run
    mask = np.zeros((12, 19), np.uint8)                 # as large as the image
    mask[:, :9] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    base = ["--ckpt", run, "--vae", vae_files[0], "--n", 4, "--steps", 2, "--overwrite"]
    coupled = ["--refine", "default", "--coupled", "--m", 30, "--n", 40, "--data_dir"]
    for name, more in {"inpaint": ["inpaint", folder / "cat/0.png", tmp_path / "m.png"],
                       "frozen": ["--refine", "default", "--m", 30], "plain": [],
                       # references from another place: the images, or the cache itself
                       "folder": [*coupled, folder], "cache": [*coupled, cache]}.items():
        out = tmp_path / f"{name}.npz"
        module = mar if name == "inpaint" else sample
        code, _, err = call(module, [*more, *base, "--out", out], monkeypatch, capsys)
        assert code == 0, err
    shown = {name: images_in(tmp_path / f"{name}.npz")[0]
             for name in ("frozen", "plain", "folder", "cache")}
    assert (shown["frozen"] != shown["plain"]).any()
    assert np.array_equal(shown["folder"], shown["cache"])


@pytest.mark.parametrize("module", [sample, evaluate])
def test_a_kept_refinement_of_latents_still_looks_at_the_images_of_the_references(
        module, latent_run, vae_files, tmp_path, monkeypatch, capsys):
    shutil.copytree(latent_run[0], tmp_path / "run")
    flags = ["--ckpt", tmp_path / "run", "--vae", vae_files[0], "--n", 10, "--steps", 1,
             "--refine", "gaussian", "--m", 30]
    call(sample, flags, monkeypatch, capsys)
    assert (tmp_path / "run/refine/maps-0.pt").exists()
    other = make_folder(tmp_path / "other")
    for folder, words in ((other, "made with another files"), ("nowhere", "is not a folder")):
        argv = [*flags, "--data_dir", folder, *["--overwrite"] * (module is sample)]
        code, _, err = call(module, argv, monkeypatch, capsys)
        assert code == 2 and words in err and err.count("\n") == 1, err


def test_a_model_of_latents_is_measured_on_decoded_images_like_the_file_of_sample(
        latent_run, vae_files, tmp_path, monkeypatch, capsys):
    run, folder, cache = latent_run
    draws = ["--ckpt", run, "--vae", vae_files[0], "--n", 20, "--steps", 2]
    code, _, err = call(sample, [*draws, "--out", tmp_path / "s.npz"], monkeypatch, capsys)
    assert code == 0, err
    held = load(folder, vae_files[0], cache)
    real = data.to_uint8(held.decode(data.patchify(held.heldout.batch(range(10))[0], 1)))
    np.savez(tmp_path / "r.npz", arr_0=real, arr_1=held.heldout.labels.numpy())

    values = {}
    for name, argv in (("ckpt", draws), ("file", ["--samples", tmp_path / "s.npz",
                                                  "--ref", tmp_path / "r.npz"])):
        out = tmp_path / f"{name}.json"
        code, _, err = call(evaluate, [*argv, "--features", "pixels", "--json", out], monkeypatch,
                            capsys)
        assert code == 0, err
        values[name] = json.loads(out.read_text())["values"]
    for key in ("fid", "precision", "recall"):
        assert values["ckpt"][key] == pytest.approx(values["file"][key], rel=1e-6), key


# ================================================================ latents of any tokeniser

def some_latents(n=40, z=4, side=4, classes=2):
    """{"latents", "labels"}, as a user brings them: of mean 1 and standard deviation 3."""
    rng = np.random.default_rng(0)
    latents = (3 * rng.standard_normal((n, z, side, side)) + 1).astype(np.float16)
    return {"latents": latents, "labels": np.arange(n) % classes}


def write_latents(path, arrays, layout="file"):
    if layout == "file":
        np.savez(path.with_suffix(".npz"), **arrays)
        return path.with_suffix(".npz")
    path.mkdir()
    for name, array in arrays.items():
        np.save(path / f"{name}.npy", array)
    return path


@pytest.mark.parametrize("layout", ["file", "folder"])
def test_the_model_gets_the_scaled_values_of_arrays_as_tokens_of_patch_squared(tmp_path, layout):
    arrays = some_latents()
    d = data.load("latents", write_latents(tmp_path / "l", arrays, layout), patch=2)
    held = np.isin(np.arange(40), (18, 19, 38, 39))         # each tenth of both classes
    z = arrays["latents"][~held].astype(np.float64)
    assert (len(d.train), len(d.heldout), d.class_names) == (36, 4, ["0", "1"])
    assert (d.grid, d.token_dim, d.size, d.channels) == (2, 16, 4, 4)
    assert isinstance(d.train.moments, np.memmap) == (layout == "folder")
    assert d.facts["vae"]["scale"] == pytest.approx(1 / z.std(), rel=1e-6), "float32 sums"
    assert d.x0_bound == pytest.approx(5 + z.mean() / z.std(), rel=1e-6), "5 std beside the mean"

    for split, rows in ((d.train, ~held), (d.heldout, held)):
        x, y = split.batch(range(len(split)), key=(0, 0))
        x = data.patchify(x, d.patch)
        want = torch.from_numpy((arrays["latents"][rows] / z.std()).astype(np.float32))
        # token 1 is the upper right corner, channel first
        assert torch.allclose(x[:, 1], want[:, :, :2, 2:].flatten(1), rtol=1e-6)
        assert y.tolist() == arrays["labels"][rows].tolist()
    refused(lambda: d.decode(x), "no decoder here")


def test_arrays_may_bring_their_split_and_names_and_mar_s_cache_is_read_without_its_vae(tmp_path):
    arrays = some_latents()
    arrays |= {"split": np.arange(40) >= 30, "class_names": np.array(["cat", "dog"])}
    d = data.load("latents", write_latents(tmp_path / "l", arrays), patch=1)
    assert (len(d.train), len(d.heldout), d.class_names) == (30, 10, ["cat", "dog"])
    assert np.array_equal(d.heldout.rows, range(30, 40))
    for k in range(20):
        (tmp_path / "m" / "ab"[k % 2]).mkdir(parents=True, exist_ok=True)
        both = np.random.default_rng(k).standard_normal((2, 8, 4, 4)).astype(np.float32)
        np.savez(tmp_path / "m" / "ab"[k % 2] / f"{k}.npz", **dict(zip(("moments", "moments_flip"),
                                                                       both)))
    d = data.load("latents", tmp_path / "m", patch=2)
    assert (len(d.train), len(d.heldout), d.token_dim, d.grid) == (18, 2, 16, 2)
    assert d.facts["vae"]["scale"] != KL16_SCALE, "its own"


def changed(**changes):
    return lambda: {k: v for k, v in {**some_latents(), **changes}.items() if v is not None}


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape)


def with_nan(dtype):
    latents = some_latents()["latents"].astype(dtype)
    latents[7, 1, 2, 3] = np.nan
    return latents


@pytest.mark.parametrize("make, words", [
    (changed(labels=None), ("holds latents float16 (40, 4, 4, 4); expected", "labels")),
    (changed(latents=None), ("holds labels int64 (40,); expected an npz file",)),
    (changed(latents=np.zeros((40, 4, 16), np.float32)), ("latents float32 (40, 4, 16)",)),
    (changed(latents=np.zeros((40, 4, 4, 4), np.uint8)), ("latents uint8",)),
    (changed(labels=np.arange(39)), ("labels int64 (39,)",)),
    (changed(labels=np.zeros(40)), ("labels float64",)),
    (changed(labels=np.arange(40) % 2 - 1), ("from 0 up",)),
    (changed(split=np.arange(40)), ("split int64 (40,)", "0 or 1")),
    (changed(split=np.ones(40, int)), ("no latent is for training",)),
    (changed(split=np.arange(40) % 2), ("class '1'", "no training image")),
    (changed(labels=np.full(40, 10 ** 12)), ("labels up to 1000000000000, but 40 latents",)),
    (changed(class_names=np.array(["cat"])), ("labels up to 1, but 1 class_names",)),
    (changed(latents=with_nan(np.float32)), ("latent 7 is not finite",)),
    (changed(latents=np.full((40, 4, 4, 4), 1e300)), ("latent 0 is not finite",)),
    (changed(latents=np.ones((40, 4, 4, 4))), ("variance", "constant")),
    (changed(latents=normal(40, 4, 4, 6)), ("latents of 4 x 6: expected square",)),
    (changed(latents=normal(40, 4, 3, 3)), ("multiple of --patch 2",))])
def test_bad_arrays_are_one_line_that_says_what_came(make, words, tmp_path):
    path = write_latents(tmp_path / "l", make())
    refused(lambda: data.load("latents", path, patch=2), *words)


def test_a_missing_or_damaged_file_of_latents_and_a_size_are_one_line(tmp_path):
    path = write_latents(tmp_path / "l", some_latents(), "folder")
    refused(lambda: data.load("latents", path, size=16), "--size 16", "are 4 x 4")
    refused(lambda: data.load("latents"), "no --data_dir", "expected an npz")
    refused(lambda: data.load("latents", tmp_path / "none"), "none; expected an npz")
    (path / "latents.npy").write_bytes((path / "latents.npy").read_bytes()[:300])
    refused(lambda: data.load("latents", path), "is no readable npy")
    (tmp_path / "l.npz").write_bytes(b"PK")
    refused(lambda: data.load("latents", tmp_path / "l.npz"), "not a readable npz")


@pytest.fixture(scope="module")
def array_run(tmp_path_factory):
    """(run, file of latents) of two steps on 2 x 2 latents a token."""
    root = tmp_path_factory.mktemp("arrays")
    file = write_latents(root / "l", some_latents(200))
    with pytest.MonkeyPatch.context() as patch:
        argv = ["--out_dir", root / "run", "--dataset", "latents", "--data_dir", file, "--patch", 2,
                *TRAIN[2:], "--steps", 2, "--set", "lr_schedule=constant"]
        patch.setattr("sys.argv", ["train.py", *map(str, argv)])
        train.main()
    return root / "run", file


def test_a_model_of_arrays_resumes_bitwise_and_shows_a_picture_only_where_a_vae_fits(
        array_run, vae_files, tmp_path, monkeypatch, capsys):
    run, file = array_run
    state = read_checkpoint(run)
    assert (state["config"]["token_dim"], state["config"]["grid"]) == (16, 2)
    assert state["data"]["vae"]["fingerprint"] is None and not (run / "samples.png").exists()

    flags = ["--dataset", "latents", "--patch", 2, *TRAIN[2:], "--set", "lr_schedule=constant"]
    fit = lambda out, steps, *more, file=file: call(
        train, ["--out_dir", tmp_path / out, "--data_dir", file, *flags, "--steps", steps, *more],
        monkeypatch, capsys)
    for out, steps, more in (("a", 3, ()), ("b", 1, ()), ("b", 3, ("--vae", vae_files[0]))):
        code, shown, err = fit(out, steps, *more)
        assert code == 0, err
        assert ("no samples.png" in shown) == (more == ())
    a, b = (read_checkpoint(tmp_path / out) for out in "ab")
    assert all(torch.equal(a[part][k], b[part][k]) for part in ("model", "ema") for k in a[part])
    assert Image.open(tmp_path / "b" / "samples.png").mode == "RGB"

    arrays = some_latents(200)                              # as many others are another run
    other = write_latents(tmp_path / "o", {**arrays, "latents": arrays["latents"] * 2})
    code, _, err = fit("b", 4, file=other)
    assert code == 2 and "scale" in err, err
    other = write_latents(tmp_path / "z", some_latents(200, z=16))
    code, _, err = fit("c", 1, "--vae", vae_files[0], file=other)
    assert code == 2 and "has 4 channels, these latents 16" in err, err


def test_a_model_of_arrays_draws_unscaled_latents_for_a_decoder_of_its_own_or_decodes(
        array_run, vae_files, tmp_path, monkeypatch, capsys):
    run, file = array_run
    flags = ["--ckpt", run, "--n", 6, "--steps", 3]
    code, _, err = call(sample, [*flags, "--out", tmp_path / "s.png"], monkeypatch, capsys)
    assert code == 2 and "for your own decoder" in err and err.count("\n") == 1, err
    code, shown, err = call(sample, flags, monkeypatch, capsys)
    shutil.move(run / "sample.npz", tmp_path / "s.npz")
    assert code == 0 and "6 latents (4, 4, 4), unscaled" in shown, err
    with np.load(tmp_path / "s.npz") as z:
        drawn = dict(z)
    assert drawn["labels"].tolist() == [0, 1] * 3 and drawn["latents"].dtype == np.float32

    m, state = models.load_model(run)
    x = sample.draw(m, torch.tensor([0, 1] * 3), range(6), 0, steps=3, cfg_scale=models.GUIDANCE,
                    solver=None)
    scale = state["data"]["vae"]["scale"]
    want = data.unpatchify(x, 2) / scale
    assert np.allclose(drawn["latents"], want, atol=1e-4), "other batches: fp32"
    # what was drawn is what the model can be given: round trip
    back = data.load("latents", tmp_path / "s.npz", patch=2, scale=scale)
    again = torch.cat([split.batch(range(len(split)))[0] for split in (back.train, back.heldout)])
    order = [*back.train.rows, *back.heldout.rows]
    assert torch.allclose(data.patchify(again, 2), x[order], atol=1e-4)

    more = ["--vae", vae_files[0], "--out", tmp_path / "i.npz"]
    code, _, err = call(sample, [*flags, *more], monkeypatch, capsys)
    assert code == 0, err
    net = load_kl16(vae_files[0], scale=1.0)
    want = data.to_uint8(net.decode(torch.from_numpy(drawn["latents"])))
    assert np.abs(images_in(tmp_path / "i.npz")[0] - want).max() <= 1, "rounding"


def test_a_model_of_arrays_is_refined_with_its_own_scale_and_measured_where_a_vae_decodes(
        array_run, vae_files, tmp_path, monkeypatch, capsys):
    run, file = array_run
    arrays = some_latents(200)                              # references of another scale
    other = write_latents(tmp_path / "o", {**arrays, "latents": arrays["latents"] / 4})
    real, seen = sample.ideal_conditions, []
    monkeypatch.setattr(sample, "ideal_conditions", lambda model, x, *a: (seen.append(x), real(
        model, x, *a))[1])
    drawn = {}
    for name, more in {"plain": [], "refined": ["--refine", "default", "--coupled", "--m", 30],
                       "other": ["--refine", "default", "--coupled", "--m", 30, "--data_dir",
                                 other]}.items():
        code, _, err = call(sample, ["--ckpt", run, "--n", 40, "--steps", 2, *more, "--out",
                                     tmp_path / f"{name}.npz"], monkeypatch, capsys)
        assert code == 0, err
        with np.load(tmp_path / f"{name}.npz") as z:
            drawn[name] = z["latents"]
    assert (drawn["plain"] != drawn["refined"]).any()
    half = len(seen) // 2
    assert all(torch.allclose(a, 4 * b, rtol=1e-3, atol=1e-4)           # float16 was divided
               for a, b in zip(seen[:half], seen[half:])), "both by the scale of the training"

    judged = ["--ckpt", run, "--n", 20, "--steps", 2, "--features", "pixels"]
    code, _, err = call(evaluate, judged, monkeypatch, capsys)
    assert code == 2 and "no decoder here" in err and err.count("\n") == 1, err
    code, shown, err = call(evaluate, [*judged, "--vae", vae_files[0]], monkeypatch, capsys)
    assert code == 0 and "Frechet distance" in shown, err
    code, _, err = call(evaluate, ["--samples", tmp_path / "plain.npz", "--dataset", "latents",
                                   "--data_dir", file], monkeypatch, capsys)
    assert code == 2 and "latents float32 (40, 4, 4, 4)" in err, err


def test_latents_of_images_may_be_tokens_of_several_too(
        latent_run, vae_files, tmp_path, monkeypatch, capsys):
    _, folder, cache = latent_run
    whole, cut = (data.load("folder", folder, size=SIDE, patch=patch, vae=vae_files[0],
                            cache_dir=cache) for patch in (1, 2))
    assert (cut.grid, cut.token_dim) == (2, 16) and (whole.grid, whole.token_dim) == (4, 4)
    x = cut.heldout.batch([0, 3])[0]
    assert torch.equal(cut.decode(data.patchify(x, 2)), whole.decode(data.patchify(x, 1)))
    flags = ["--dataset", "folder", "--data_dir", folder, "--cache_dir", cache, *TRAIN, "--patch",
             2, "--vae", vae_files[0]]
    code, _, err = call(train, ["--out_dir", tmp_path / "r", *flags, "--steps", 1], monkeypatch,
                        capsys)
    assert code == 0, err
    code, _, err = call(sample, ["--ckpt", tmp_path / "r", "--vae", vae_files[0], "--n", 4,
                                 "--steps", 2, "--out", tmp_path / "s.npz"], monkeypatch, capsys)
    assert code == 0 and images_in(tmp_path / "s.npz")[0].shape == (4, SIDE, SIDE, 3), err


# ================================================================ many processes

def child(rank, world, port, module, argv, before, log):
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                      LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    sys.argv = [f"{module}.py", *argv]
    if before:
        before()
    command.run(importlib.import_module(module).main)


def processes(world, module, *argv, before=None):
    """(success, output) of a program in `world` processes with torchrun's environment; when one
    dies the others are ended, as torchrun does. They are forked from a server that has imported
    everything once."""
    context = multiprocessing.get_context("forkserver")
    multiprocessing.set_forkserver_preload(["__main__", "test_imagenet", "torch._dynamo"])
    with socket.socket() as s, tempfile.TemporaryDirectory() as logs:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
        s.close()
        files = [f"{logs}/{rank}" for rank in range(world)]
        running = [context.Process(target=child, args=(rank, world, port, module,
                                                       [str(a) for a in argv], before, file))
                   for rank, file in enumerate(files)]
        for p in running:
            p.start()
        while any(p.is_alive() for p in running) and not any(p.exitcode for p in running):
            time.sleep(0.05)
        for p in running:
            p.kill() if p.is_alive() else None
            p.join()
        return (all(p.exitcode == 0 for p in running),
                "".join(Path(file).read_text() for file in files))


def small_shards_of(doomed=None):
    """Shards of 5 images; whoever has written half of shard `doomed` is killed."""
    latents.SHARD, real = 5, latents.write_shard

    def write_shard(path, *a):
        if int(path.stem) == doomed:
            real(path.with_name("half.npy"), *a)
            deadline = time.time() + 60
            while not path.with_name("00002.json").exists() and time.time() < deadline:
                time.sleep(0.05)                            # until the other is done with its first
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, *a)
    latents.write_shard = write_shard


def test_a_process_killed_while_caching_costs_one_shard_and_two_processes_train_as_one(
        tmp_path, vae_files, small_shards, monkeypatch, capsys):
    names, cache = ("n01440764", "n02099601"), tmp_path / "c"
    make_folder(tmp_path / "in" / "train", 10, names)
    make_folder(tmp_path / "in" / "val", 2, names)
    flags = ["--dataset", "imagenet256", "--data_dir", tmp_path / "in", "--vae", vae_files[0],
             *TRAIN, "--model", "gpt-tiny", "--steps", 2,
             "--set", "dropout=0"]                          # whose masks are by rank
    job = ["train", "--out_dir", tmp_path / "two", "--cache_dir", cache, *flags]
    success, log = processes(2, *job, before=functools.partial(small_shards_of, 3))
    assert not success and "encoding 24 images and their mirror images" in log, log
    assert re.search(r"encoding: .*/14 \[.*<.*image/s\]", log), "progress and time left"
    assert (cache / "00001.json").exists() and not (cache / "00003.json").exists(), log
    assert not (cache / "manifest.json").exists()
    assert not (tmp_path / "two" / "ckpt.pt").exists(), "nobody trains before all shards are there"

    kept = (cache / "00001.npy").stat().st_mtime_ns
    success, log = processes(2, *job, before=small_shards_of)
    assert success, log
    assert (cache / "00001.npy").stat().st_mtime_ns == kept, "a whole shard is not encoded again"
    argv = ["--out_dir", tmp_path / "one", "--cache_dir", tmp_path / "d", *flags]
    code, _, err = call(train, argv, monkeypatch, capsys)
    assert code == 0, err
    for k in range(5):
        # batches of convolutions of another size differ in the last bit of fp32, rarely of float16
        a, b = (np.load(folder / f"{k:05d}.npy").astype(np.float32)
                for folder in (cache, tmp_path / "d"))
        assert np.abs(a - b).max() < 2e-3, k
    a, b = (read_checkpoint(tmp_path / name) for name in ("one", "two"))
    assert a["data"]["class_names"] == ["tench, Tinca tinca", "golden retriever"]
    assert (a["data"]["n_train"], a["data"]["n_heldout"]) == (20, 4)
    # the order of fp32 sums, under Adam
    assert max(float((a["model"][k] - b["model"][k]).abs().max()) for k in a["model"]) < 2e-5


def test_three_processes_draw_the_file_of_one_refined_or_not(
        latent_run, vae_files, tmp_path, monkeypatch, capsys):
    flags = ["--ckpt", latent_run[0], "--n", 40, "--steps", 2, "--vae", vae_files[0]]
    for more in ([], ["--refine", "default", "--coupled", "--m", 8]):
        one, three = tmp_path / "one.npz", tmp_path / "three.npz"
        # 2 classes: a rank that draws whole classes may draw nothing
        success, log = processes(3, "sample", *flags, *more, "--out", three, "--overwrite")
        assert success, log
        argv = [*flags, *more, "--out", one, "--overwrite"]
        code, _, err = call(sample, argv, monkeypatch, capsys)
        assert code == 0, err
        (a, y), (b, z) = images_in(one), images_in(three)
        assert np.array_equal(y, z)
        assert np.abs(a - b).max() <= 1, "other batch sizes: fp32, then rounding"
        assert sorted(f.name for f in tmp_path.iterdir()) == ["one.npz", "three.npz"]


# ================================================================ names of classes

def test_imagenet_classes_are_the_standard_thousand_in_order():
    ids, names = zip(*sets.imagenet_classes())
    assert len(ids) == 1000 and list(ids) == sorted(set(ids)), "sorted ids are the class order"
    assert all(re.fullmatch(r"n\d{8}", i) for i in ids) and all(n == n.strip() for n in names)
    for k, name in {0: "tench", 1: "goldfish", 88: "macaw", 207: "golden retriever", 281: "tabby",
                    387: "lesser panda", 417: "balloon", 979: "valley", 985: "daisy",
                    999: "toilet tissue"}.items():
        assert names[k].split(", ")[0] == name, k


def test_classes_are_found_by_number_id_name_or_part_of_a_name():
    names = [n for _, n in sets.imagenet_classes()]
    for word, k in {"golden retriever": 207, "207": 207, "n02099601": 207, "tench": 0,
                    "Tinca tinca": 0, "tench, Tinca tinca": 0, "TIGER": 292, "goldfish": 1,
                    "curly-coat": 206}.items():
        assert data.find_class(word, names) == k, word
    for word, words in {"retriever": "may be any of 205 flat-coated retriever; 206",
                        "crane": "134 crane; 517 crane",
                        "unicorn": "this checkpoint knows tench"}.items():
        refused(lambda: data.find_class(word, names), words)
    assert data.find_class("7", [str(k) for k in range(10)]) == 7


# ================================================================ what it takes

@pytest.mark.parametrize("name, options, guided", [
    ("gpt-tiny", {}, True), ("mar-tiny", {}, False), ("mar-tiny", {"num_iter": 5}, True),
    ("cdm-tiny", {}, True)])
def test_flops_of_an_image_are_those_of_the_real_chain(name, options, guided):
    cfg, y = preset(name, token_dim=4, grid=3), torch.zeros(1, dtype=torch.long, device="meta")

    class Blank:
        randn = rand = staticmethod(lambda *shape: torch.empty(1, *shape, device="meta"))
    # on meta: the CPU's attention is not in torch's count
    got = plan.counted(plan.on_meta(cfg).eval().generate, y, Blank(), 2.0 if guided else 1.0,
                       solver="ddim", steps=3, **options)
    assert plan.sampling_flops(cfg, 3, options.get("num_iter"), guided) == got


def test_flops_and_memory_of_the_published_sizes_are_those_of_a_calculation_by_hand():
    cfg = preset("cdm-xl")
    d, N = cfg.n_embd, 256
    # matrices, attention, adaLN of the blocks; the rest is below 1 %
    by_hand = cfg.n_layer * (2 * 12 * d * d * N + 4 * N * N * d + 2 * 6 * d * d)
    assert by_hand / 2e9 == pytest.approx(119, rel=0.02), "as DiT-XL/2 is quoted"
    assert plan.sampling_flops(cfg, 1, guided=False) == pytest.approx(by_hand, rel=0.01)
    assert plan.training_flops(cfg) == pytest.approx(3 * by_hand, rel=0.01), "backward costs twice"
    model, held, _ = plan.memory_estimate(preset("gpt-b"), 1)
    assert held == 20 * model.num_params


@pytest.mark.parametrize("name", TINY)
def test_depth_extrapolation_of_flops_and_memory_is_exact(name, monkeypatch):
    cfg = preset(name, token_dim=4, grid=4)
    deep = plan.replace(cfg, n_layer=5, head_depth=4 if cfg.head_depth else 0)
    found = []
    for _ in range(2):
        found.append((plan.training_flops(deep), plan.memory_estimate(deep, 3)[1:]))
        monkeypatch.setattr(plan, "by_layers", lambda cfg, count: count(cfg))
    assert found[0] == found[1]


def test_dry_run_of_imagenet_needs_neither_data_nor_vae(tmp_path, monkeypatch, capsys):
    argv = ["--dry-run", "--dataset", "imagenet512", "--model", "mar-tiny",
            "--out_dir", tmp_path / "x"]
    code, out, err = call(train, argv, monkeypatch, capsys)
    assert code == 0, err
    for words in ("1024 tokens of 16", "1281167 training", "TFLOP a step", "8 x H100"):
        assert words in out, out
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", TINY)
def test_512_pixels_with_1024_tokens_train_and_sample(name):
    torch.manual_seed(0)
    m = build(preset(name, grid=32, n_embd=32, n_head=2, n_layer=1, num_classes=10,
                     **({} if name == "cdm-tiny" else {"head_depth": 1})))
    x, y = torch.randn(2, 1024, 16, generator=gen()), torch.tensor([0, 1])
    loss = m.loss(x, y, m.randomness(2, gen())).sum()
    loss.backward()
    m.diffloss.x0_bound = 5.0
    options = {"num_iter": 8} if name == "mar-tiny" else {}
    out = sample.draw(m.eval(), y, range(2), 0, solver="ddpm", steps=1, cfg_scale=1.5, **options)
    assert loss.isfinite() and out.shape == (2, 1024, 16) and out.isfinite().all()


# ================================================================ a thousand classes

@pytest.mark.parametrize("name, rank", [("gpt-tiny", None), ("gpt-tiny", 8), ("mar-tiny", 8)])
def test_the_memory_rule_is_what_the_refiner_of_a_class_holds(name, rank):
    torch.manual_seed(0)
    m = build(preset(name, token_dim=4, grid=3, num_classes=10)).eval()
    m.diffloss.x0_bound = 1.0
    real = lambda k, n: torch.randn(n, 9, 4, generator=gen(k)).clamp(-1, 1)
    refinement = sample.Refinement(m, real, dict(cfg_scale=1.0, solver="dpm++", steps=2), m=30,
                                   n_cal=40, rank=rank)
    refiner = refinement.refiner(4)
    held = {z.untyped_storage().data_ptr(): z.untyped_storage().nbytes()     # maps share targets
            for z in (refiner.targets, *files.tensors(refiner.state()))}
    assert sum(held.values()) == plan.refinement_bytes(m.cfg, 30, 40, rank)[0]
    refinement = many.Shared(m, real, {}, m=30)
    targets = sum(refinement.refiner(k).targets.nbytes for k in range(5))   # and what is left
    means = 4 * 5 * 9 * refinement.rank
    assert rank or 2 * targets + means == plan.shared_bytes(m.cfg, 30, 5)[0]


def thousand_classes(root, net):
    """The model, and the Data of a cache of random latents (2x2) of three images of each class."""
    names, cache, size = [n for _, n in sets.imagenet_classes()], root / "c", 2 * net.stride
    cache.mkdir()
    index = np.stack([np.arange(1000).repeat(3), np.tile([0, 0, 1], 1000)], axis=1)
    moments = np.random.default_rng(0).standard_normal((3000, 2, 8, 2, 2)).astype(np.float16)
    crc = [[zlib.crc32(z) for z in pair] for pair in moments]
    np.save(cache / "index.npy", np.concatenate([index, crc], 1))
    np.save(cache / "00000.npy", moments)
    made_for = {"vae": net.fingerprint(), "crop": latents.CROP, "size": size}
    (cache / "manifest.json").write_text(json.dumps(
        {"made_for": made_for, "scale": 0.2325, "std": 1.0, "x0_bound": 5.0, "beyond": 0.0,
         "shards": [{"file": "00000.npy", "count": 3000}], "class_names": names}))
    torch.manual_seed(0)
    m = build(preset("mar-tiny", token_dim=4, grid=2, n_layer=1))
    vae_file = saved(root / "kl16.ckpt", net.state_dict())
    return m, vae_file, load(None, vae_file, cache, "imagenet256", size=size)


def test_a_thousand_classes_are_drawn_and_refined_class_by_class_under_torchrun(tmp_path):
    m, vae_file, d = thousand_classes(tmp_path, KL16(ch=32, ch_mult=(1, 1), z_channels=4))
    assert len(d.train.of_class(999, 10)) == 2
    assert (d.train.labels[d.train.of_class(7, 10)] == 7).all()
    state = {"config": vars(m.cfg), "model": m.state_dict(), "ema": m.state_dict(), "step": 0,
             "data": d.facts}
    files.save_checkpoint(tmp_path / "ckpt.pt", state)
    # as a user types it; `--`, else torchrun takes --n and --m for abbreviations of its own flags
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2,
               "--", "sample.py", "--ckpt", tmp_path, "--vae", vae_file, "--steps", 1,
               "--num_iter", 2, "--refine", "default", "--coupled", "--m", 2, "--n", 2000,
               "--out", tmp_path / "s.npz"]
    p = subprocess.run([*map(str, command)], cwd=ROOT, text=True, capture_output=True, timeout=300,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert p.returncode == 0, p.stderr
    images, labels = images_in(tmp_path / "s.npz")
    assert images.shape == (2000, 4, 4, 3) and (np.bincount(labels) == 2).all()
    assert len(np.unique(images.reshape(2000, -1), axis=0)) > 1500
    assert all(len(np.unique(part)) == 100 for part in np.split(labels, 20)), "not sorted by class"


def test_mar_s_weights_are_refined_by_name_of_class_from_a_cache_as_the_readme_says(
        tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)                                # of KL-16's stride, as MAR's file has it
    net = KL16(ch=32, ch_mult=(1,) * 5, z_channels=4)
    m, vae_file, _ = thousand_classes(tmp_path, net)
    (tmp_path / "mar_base").mkdir()
    torch.save({"model": {k: v * 0 for k, v in m.state_dict().items()}, "epoch": 799,
                "model_ema": m.state_dict(), "args": argparse.Namespace(lr=8e-4), "rope": True,
                "n_head": m.cfg.n_head}, tmp_path / "mar_base" / "checkpoint-last.pth")
    monkeypatch.setitem(data.DATASETS, "imagenet32", data.Set(None, {"size": 32}, data.PHOTOS))
    # fewer classes stand for the directions of all
    monkeypatch.setattr(sample, "SPREAD", 8)
    flags = ["--ckpt", tmp_path / "mar_base", "--vae", vae_file, "--num_iter", 2, "--n", 8,
             "--classes", "golden retriever", "tench", "--solver", "ddpm", "--steps", 3,
             "--cfg_scale", 2.9]
    shown, refine = {}, ["--refine", "default", "--coupled", "--m", 2, "--data_dir"]
    for name, more in (("plain", []), ("refined", [*refine, tmp_path / "c"])):
        argv = [*flags, *more, "--out", tmp_path / f"{name}.npz"]
        code, _, err = call(sample, argv, monkeypatch, capsys)
        assert code == 0 and "no model_ema" not in err, err
        shown[name], labels = images_in(tmp_path / f"{name}.npz")
        assert labels.tolist() == [207, 0] * 4
    assert (shown["plain"] != shown["refined"]).any()
    two = make_folder(tmp_path / "two", 2, ("n01440764", "n02099601"), 32)
    load(two, vae_file, tmp_path / "d", "imagenet256", size=32)
    argv = [*flags, *refine, tmp_path / "d", "--out", tmp_path / "x.npz"]
    code, _, err = call(sample, argv, monkeypatch, capsys)
    assert code == 2 and "of 2 classes" in err, "their labels mean others"


# ================================================================ README_imagenet.md

README = (ROOT / "README_imagenet.md").read_text()


def arguments(program, flags):
    """The parsed flags of a command, as the program itself parses them."""
    if program == "evaluate":
        args, drawing = evaluate.parse_args(shlex.split(flags))
        assert not drawing or args.ckpt
        return args
    return {"train": train, "sample": sample}[program].parse_args(shlex.split(flags))


def test_every_command_of_the_readme_is_whole_and_understood():
    text = re.sub(r"\\\n +", "", README)
    found = re.findall(r"(train|sample|evaluate)\.py( --[^`\n]*)", text)
    jobs = re.findall(r"torchrun (--[^`\n]*)", text)
    assert len(found) > 50 and len(jobs) > 25
    for program, flags in found:
        args = arguments(program, flags)
        assert "..." not in flags and getattr(args, "model", None) in (None, *models.PRESETS)
    # an older torch has no --shutdown_timeout, which the README says
    if "--shutdown-timeout" not in get_args_parser().format_help():
        jobs = [re.sub(r"--shutdown_timeout \d+", "", job) for job in jobs]
    for job in jobs:
        assert launch_args(shlex.split(job)).training_script in ("train.py", "sample.py")
    assert max(map(len, README.splitlines())) <= 120


def test_the_rows_of_the_readme_are_the_output_of_plan():
    lines = README.splitlines()
    rows = []
    for name, size in plan.ROWS:
        memory, time = (line for line in lines
                        if line.startswith(f"| {name} | {(size // 16) ** 2} |"))
        rows.append((memory, time, int(memory.split("|")[6])))
    assert README.endswith(plan.report(rows) + "\n")
    for k in (0, 2):                                        # two of ten, as each takes seconds
        assert plan.table_rows(*plan.ROWS[k]) == rows[k]


@pytest.mark.parametrize("name, size", plan.ROWS)
def test_the_commands_of_a_row_fit_each_other_and_the_machine(name, size):
    args = {}
    for what, command in plan.commands(name, size, 256):
        program, flags = re.fullmatch(r"(?:torchrun --nproc_per_node 8 --|python) (\w+)\.py (.*)",
                                      command).groups()
        args[what] = arguments(program, flags)
    run = args["training"]
    assert run.dataset == f"imagenet{size}" and run.model == name
    assert run.warmup * 4 == run.steps and run.optimizer == "adamw"
    assert abs(run.steps * run.global_batch / plan.IMAGENET - 400) < 1, "epochs"
    for fit in (1, 7, 52, 300):
        share = run.global_batch / 8 / plan.accumulation(fit)
        assert share == int(share) and share <= fit
    for kind in ("", ", refined")[:1 + (name != "cdm-xl")]:
        drawn, judged = args["sampling" + kind], args["measuring" + kind]
        assert drawn.n == 50 * 1000 and drawn.ckpt == run.out_dir and judged.samples == drawn.out
        assert drawn.refine == ("shared" if kind else "none") and not drawn.coupled
        assert not kind or drawn.batch_size % plan.TOGETHER == 0 and drawn.m == plan.M


def test_plan_and_train_describe_a_row_without_data(tmp_path, monkeypatch, capsys):
    command = dict(plan.commands("mar-b", 256, 64))["training"].split("train.py")[1]
    drop = ("--data_dir", "--vae", "--accumulate")          # no files, one process
    argv = shlex.split(command)
    argv = [a for k, a in enumerate(argv) if not {argv[k], argv[k - 1]} & set(drop)]
    code, out, err = call(train, [*argv, "--accumulate", 32, "--dry-run"], monkeypatch, capsys)
    assert code == 0 and "1281167 training" in out and "256 tokens of 16" in out, err
    code, _, err = call(plan, ["--modle"], monkeypatch, capsys)
    assert code == 2 and "unknown argument --modle" in err and err.count("\n") == 1
