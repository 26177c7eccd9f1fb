"""The ImageNet path at small size: latent cache, latents in training and sampling, MAR's weights, plans, many processes."""
import argparse
import functools
import json
import math
import os
import re
import shlex
import signal
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.run import get_args_parser, parse_args as launch_args

import data
import evaluate
import inception
import latents
import model as models
import plan
import sample
import train
import vae
from data import patchify
from diffloss import ImageNoise, Sampler, respaced_steps
from model import build, preset
from ot_refine import RefineConfig
from test_core import Golden, cli, draw, fit, gen, golden_files, make_folder, python, relative, same, tiny, tokens, torchrun, weights

SIDE = 8                                 # latents 4x4 of 4 channels


@pytest.fixture(scope="module")
def vae_files(tmp_path_factory):
    """Two small autoencoders of stride 2 with different weights."""
    root, files = tmp_path_factory.mktemp("vae"), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        files.append(root / f"vae{seed}.ckpt")
        torch.save({"model": vae.KL16(ch=32, ch_mult=(1, 1), z_channels=4).state_dict()}, files[-1])
    return files


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 5)


def load(folder, vae_file, cache, **more):
    return data.load("folder", folder, size=SIDE, patch=1, vae=vae_file, cache_dir=cache, **more)


# ================================================================ the cache

def test_the_cache_holds_the_moments_of_each_crop_and_of_its_mirror_image(tmp_path, vae_files, small_shards):
    root = make_folder(tmp_path / "f", per_class=10, size=12)
    d = load(root, vae_files[0], tmp_path / "c")
    manifest, index = json.loads((tmp_path / "c" / "manifest.json").read_text()), np.load(tmp_path / "c" / "index.npy")
    assert [s["count"] for s in manifest["shards"]] == [5, 5, 5, 5] and manifest["count"] == len(index) == 20
    assert (len(d.train), len(d.heldout), d.class_names) == (18, 2, ["cat", "dog"])
    net, moments = vae.load_kl16(vae_files[0]), latents.Shards(tmp_path / "c", manifest["shards"])
    files, _ = data.scan_folder(root)
    for k in (0, 7, 19):
        image = torch.from_numpy(data.read_image(files[k][0], SIDE)).permute(2, 0, 1)[None].float() / 127.5 - 1
        for flip, view in enumerate((image, image.flip(-1))):
            assert relative(torch.tensor(moments(k, flip)[None]).float(), net.moments(view)) < 1e-3      # float16
        assert index[k].tolist() == [files[k][1], int(k % 10 == 9)]
    assert not list((tmp_path / "c").glob("*.tmp"))


def test_a_complete_cache_is_never_encoded_again_and_needs_no_images(tmp_path, vae_files, monkeypatch):
    root = make_folder(tmp_path / "f", size=12)
    a = load(root, vae_files[0], tmp_path / "c")
    monkeypatch.setattr(latents, "build", None)
    for folder in (root, None):
        b = load(folder, vae_files[0], tmp_path / "c")
        assert torch.equal(a.train.batch([0, 3], key=(0, 0))[0], b.train.batch([0, 3], key=(0, 0))[0]) and a.x0_bound == b.x0_bound


def test_a_cache_of_another_vae_size_or_set_of_files_is_refused_in_one_line(tmp_path, vae_files):
    root = make_folder(tmp_path / "f", size=12)
    load(root, vae_files[0], tmp_path / "c")
    with pytest.raises(ValueError, match="made with another vae .* delete this one") as error:
        load(root, vae_files[1], tmp_path / "c")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="made with another size 8 -> 4"):
        data.load("folder", root, size=4, patch=1, vae=vae_files[0], cache_dir=tmp_path / "c")
    manifest = (tmp_path / "c" / "manifest.json").read_text()
    (tmp_path / "c" / "manifest.json").write_text(manifest.replace("halve, bicubic, centre", "squashed"))
    with pytest.raises(ValueError, match="made with another crop squashed -> halve"):
        load(root, vae_files[0], tmp_path / "c")
    (tmp_path / "c" / "manifest.json").write_text(manifest)
    (root / "cat" / "0.png").unlink()
    with pytest.raises(ValueError, match="made with another files"):
        load(root, vae_files[0], tmp_path / "c")
    (tmp_path / "c" / "manifest.json").unlink()                          # an unfinished cache is checked by its shards
    with pytest.raises(ValueError, match="made with another files"):
        load(root, vae_files[0], tmp_path / "c")


def test_unreadable_images_are_left_out_of_the_cache_by_name(tmp_path, vae_files, small_shards, capsys):
    root = make_folder(tmp_path / "f", per_class=10, size=12)
    (root / "cat" / "2.png").write_bytes(b"\x89PNG not really")
    with pytest.raises(ValueError, match=r"1 of 20 images.*2\.png.*--max_bad 0.01"):
        load(root, vae_files[0], tmp_path / "c")
    d = load(root, vae_files[0], tmp_path / "c", max_bad=0.2)            # goes on from the shards that are there
    assert len(d.train) + len(d.heldout) == 19 and "2.png" in capsys.readouterr().err
    assert len(d.heldout) == 2 and d.train.labels.tolist() == [0] * 8 + [1] * 9, "labels stay with their images"


def test_imagenet_uses_its_val_folder_or_holds_out_one_in_a_hundred_and_has_readable_class_names(tmp_path, vae_files):
    names = ("n01440764", "n02099601")
    make_folder(tmp_path / "in" / "train", 100, names, size=SIDE)
    make_folder(tmp_path / "in" / "val", 3, names, size=SIDE)
    whole = data.load("imagenet256", tmp_path / "in", size=SIDE, patch=1, vae=vae_files[0], cache_dir=tmp_path / "a")
    share = data.load("imagenet256", tmp_path / "in" / "train", size=SIDE, patch=1, vae=vae_files[0], cache_dir=tmp_path / "b")
    assert (len(whole.train), len(whole.heldout)) == (200, 6) and (len(share.train), len(share.heldout)) == (198, 2)
    assert whole.class_names == ["tench, Tinca tinca", "golden retriever"]
    assert whole.tokeniser.scale == vae.KL16_SCALE, "ImageNet keeps KL-16's own scale"
    os.rename(tmp_path / "in" / "val" / names[0], tmp_path / "in" / "val" / "n01443537")
    with pytest.raises(ValueError, match="same|must hold the class folders"):
        data.load("imagenet256", tmp_path / "in", size=SIDE, patch=1, vae=vae_files[0], cache_dir=tmp_path / "d")


def test_a_folder_gets_its_own_scale_and_a_bound_of_five_standard_deviations(tmp_path, vae_files):
    d = load(make_folder(tmp_path / "f", per_class=20, size=12), vae_files[0], tmp_path / "c")
    x, _ = d.train.batch(range(len(d.train)))
    # the scale is exact over the training means and variances; one draw of 2,400 values and no flips is within 3 %
    assert abs(x.std().item() - 1) < 0.05, x.std()
    assert d.x0_bound == pytest.approx(5.0, rel=1e-6) and d.facts["vae"]["beyond"] == (x.abs() > 5).float().mean().item()


def test_latents_of_a_visit_are_a_function_of_seed_and_position_however_it_is_shared_out(tmp_path, vae_files):
    d = load(make_folder(tmp_path / "f", size=12), vae_files[0], tmp_path / "c")
    index = torch.tensor([3, 3, 0, 7, 5, 1, 3, 2])
    whole, y = d.train.batch(index, key=(4, 160))
    parts = torch.cat([d.train.batch(index[j:j + 2], key=(4, 160 + j))[0] for j in range(0, 8, 2)])
    assert torch.equal(whole, parts) and y.tolist() == d.train.labels[index].tolist()
    assert not torch.equal(whole[0], whole[1]), "the same image twice in a batch is drawn twice"
    assert not torch.equal(whole, d.train.batch(index, key=(5, 160))[0])
    still = d.train.batch(index)[0]
    assert torch.equal(still[0], still[6]), "without a key the noise belongs to the image"


def test_latents_have_the_posterior_s_moments_and_are_mirrored_half_of_the_time():
    g = gen()
    pair = torch.cat([torch.randn(2, 3, 4, 4, generator=g), torch.full((2, 3, 4, 4), -2.0)], dim=1).numpy()
    d = latents.Latents(lambda k, flip: pair[int(flip)], [0], [0], scale=0.5)
    x = torch.cat([d.batch([0] * 50, key=(0, j * 50))[0] for j in range(40)])
    mirrored = (x - 0.5 * torch.from_numpy(pair[1, :3])).square().sum((1, 2, 3)) < (x - 0.5 * torch.from_numpy(pair[0, :3])).square().sum((1, 2, 3))
    assert abs(mirrored.float().mean() - 0.5) < 0.045                    # 4 standard errors of 2000 draws
    rest = x[~mirrored] - 0.5 * torch.from_numpy(pair[0, :3])
    assert abs(rest.mean()) < 0.01 and abs(rest.std() / (0.5 * math.exp(-1)) - 1) < 0.02     # 48,000 values: 0.3 %


def test_mar_s_one_npz_per_image_is_read_as_it_is(tmp_path, vae_files):
    rng, kept = np.random.default_rng(0), {}
    for name in ("n01440764", "n02099601"):
        (tmp_path / "m" / name).mkdir(parents=True)
        for k in range(3):
            kept[name, k] = rng.standard_normal((2, 8, 4, 4)).astype(np.float32)
            np.savez(tmp_path / "m" / name / f"{k}.JPEG.npz", moments=kept[name, k][0], moments_flip=kept[name, k][1])
    d = data.load("imagenet256", tmp_path / "m", size=SIDE, patch=1, vae=vae_files[0])
    assert (len(d.train), len(d.heldout), d.class_names[1]) == (4, 2, "golden retriever")
    assert np.array_equal(d.train.moments(d.train.rows[3], 1), kept["n02099601", 1][1])
    with pytest.raises(ValueError, match=r"moments \(8, 4, 4\), expected \(8, 8, 8\)"):
        data.load("imagenet256", tmp_path / "m", size=16, patch=1, vae=vae_files[0])
    (tmp_path / "m" / "n01440764" / "0.JPEG.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="no latent of MAR's cache"):
        data.load("imagenet256", tmp_path / "m", size=SIDE, patch=1, vae=vae_files[0])


@pytest.mark.parametrize("argv, words", [
    (["--dataset", "imagenet256"], "--vae kl16.ckpt"),
    (["--dataset", "digits", "--vae", "{vae}"], "small enough for pixels"),
    (["--dataset", "folder", "--vae", "{vae}", "--patch", "2", "--data_dir", "x"], "--patch 2: a latent is one token"),
    (["--dataset", "folder", "--vae", "{vae}", "--size", "9", "--data_dir", "x"], "multiple of the VAE's stride 2"),
    (["--dataset", "imagenet256", "--vae", "{vae}", "--cache_dir", "{tmp}/none"], "no latent cache at"),
    (["--dataset", "imagenet256", "--vae", "{tmp}/none.ckpt", "--data_dir", "x"], "no VAE checkpoint at"),
])
def test_bad_input_to_the_latent_path_is_one_line(argv, words, tmp_path, vae_files, monkeypatch, capsys):
    argv = [a.format(vae=vae_files[0], tmp=tmp_path) for a in argv]
    code, _, err = cli(train, ["--out_dir", tmp_path / "o", *argv], monkeypatch, capsys)
    assert code == 2 and words in err and err.count("\n") == 1, err


# ================================================================ training and sampling on latents

LATENT = ["--size", SIDE, "--model", "mar-tiny", "--lr_schedule", "constant", "--eval_every", 2]


@pytest.fixture(scope="module")
def latent_run(tmp_path_factory, vae_files):
    """(run, folder, cache) of two steps on latents, as the command line does it."""
    root = tmp_path_factory.mktemp("latent")
    folder = make_folder(root / "f", per_class=50, size=12)                 # 10 are held out, the least that can be measured against
    patch = pytest.MonkeyPatch()
    patch.setattr(train.sys, "argv", ["train.py", "--out_dir", str(root / "run"), "--dataset", "folder", "--data_dir", str(folder),
                                      "--vae", str(vae_files[0]), "--cache_dir", str(root / "c"), *map(str, LATENT), "--steps", "2",
                                      "--global_batch", "8", "--warmup", "2", "--device", "cpu", "--samples_per_class", "2"])
    train.main()
    patch.undo()
    return root / "run", folder, root / "c"


def test_training_on_latents_leaves_decoded_samples_and_resumes_bitwise(latent_run, vae_files, tmp_path, monkeypatch, capsys):
    run, folder, cache = latent_run
    state = weights(run)
    assert state["config"]["token_dim"] == 4 and state["config"]["grid"] == 4 and state["data"]["vae"]["fingerprint"]
    assert Image.open(run / "samples.png").mode == "RGB"
    flags = ["--dataset", "folder", "--data_dir", folder, "--cache_dir", cache, *LATENT, "--global_batch", 8, "--warmup", 2]
    for out, steps in (("a", 3), ("b", 1), ("b", 3)):
        fit(tmp_path / out, *flags, "--vae", vae_files[0], "--steps", steps, monkeypatch=monkeypatch, capsys=capsys)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    _, _, err = fit(tmp_path / "b", *flags, "--vae", vae_files[1], "--steps", 3, ok=False, monkeypatch=monkeypatch, capsys=capsys)
    assert "made with another vae" in err


def test_samples_are_decoded_by_the_vae_of_the_training_and_by_no_other(latent_run, vae_files, tmp_path, monkeypatch, capsys):
    run, out = latent_run[0], tmp_path / "s.npz"
    flags = ["--ckpt", run, "--n", 4, "--steps", 3, "--out", out]
    code, _, err = cli(sample, [*flags], monkeypatch, capsys)
    assert code == 2 and "--vae kl16.ckpt" in err
    code, _, err = cli(sample, [*flags, "--vae", vae_files[1]], monkeypatch, capsys)
    assert code == 2 and "has fingerprint" in err
    code, _, err = cli(sample, [*flags, "--vae", vae_files[0], "--classes", "do", "cat"], monkeypatch, capsys)
    assert code == 0, err
    with np.load(out) as z:
        assert z["arr_0"].shape == (4, SIDE, SIDE, 3) and z["arr_0"].dtype == np.uint8 and z["arr_1"].tolist() == [1, 0, 1, 0]
        images = z["arr_0"]
    m, state = models.load_model(run)
    tok = data.open_tokeniser(state["data"], vae_files[0])
    x = m.generate(torch.tensor([1, 0, 1, 0]), ImageNoise(0, range(4)), Sampler(steps=3, x0_bound=state["data"]["x0_bound"]))
    want = data.to_uint8(tok.decode(data.unpatchify(x, 1)))
    assert np.abs(images.astype(int) - want).max() <= 1                  # other batches: fp32, then rounding


def test_inpainting_and_refinement_work_on_latents(latent_run, vae_files, tmp_path, monkeypatch, capsys):
    run, folder, cache = latent_run
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:, :4] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    for more in (["--inpaint", folder / "cat" / "0.png", "--mask", tmp_path / "m.png"], ["--refine", "default", "--n_cal", 8, "--m", 8],
                 ["--refine", "sinkhorn", "--coupled", "--n", 20, "--data_dir", folder]):
        code, _, err = cli(sample, ["--ckpt", run, "--n", 4, "--steps", 2, "--out", tmp_path / "s.png", "--overwrite", "--vae", vae_files[0], *more],
                           monkeypatch, capsys)
        assert code == 0, err


@pytest.mark.parametrize("features", ["pixels", "classifier"])
def test_a_model_of_latents_is_measured_on_decoded_images_like_the_file_of_sample(latent_run, vae_files, features, tmp_path, monkeypatch, capsys):
    run, folder, cache = latent_run
    draws = ["--ckpt", run, "--vae", vae_files[0], "--n", 20, "--steps", 2]
    code, _, err = cli(sample, [*draws, "--out", tmp_path / "s.npz"], monkeypatch, capsys)
    assert code == 0, err
    real = evaluate.real_images(load(folder, vae_files[0], cache))
    assert real.images.shape == (10, SIDE, SIDE, 3) and real.train_images.shape == (90, SIDE, SIDE, 3)
    np.savez(tmp_path / "r.npz", arr_0=real.images, arr_1=real.labels)
    np.savez(tmp_path / "t.npz", arr_0=real.train_images, arr_1=real.train_labels)
    common = ["--features", features, "--cache", tmp_path / "cache", "--json"]
    evaluate.main([str(a) for a in [*draws, *common, tmp_path / "ckpt.json"]])
    assert "decoded latents" in capsys.readouterr().err
    files = ["--samples", tmp_path / "s.npz", "--ref", tmp_path / "r.npz", "--train", tmp_path / "t.npz"]
    evaluate.main([str(a) for a in [*files, *common, tmp_path / "file.json"]])
    ckpt, file = (json.loads((tmp_path / f"{k}.json").read_text()) for k in ("ckpt", "file"))
    assert ckpt["values"] == pytest.approx(file["values"], rel=1e-4, abs=1e-6), "fp32 features of the same images"
    assert ckpt["n_samples"] == 20 and ckpt["n_ref"] == 10


@pytest.mark.parametrize("flags, words", [
    ([], "give --vae kl16.ckpt"), (["--vae", 1], "has fingerprint"), (["--vae", 0, "--cache_dir", "none"], "no latent cache at none"),
    (["--vae", 0, "--refine", "default", "--refine_memory", "0.0001"], "draw with sample.py --out s.npz")])
def test_a_model_of_latents_that_cannot_be_measured_says_what_is_missing(latent_run, vae_files, flags, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    flags = [str(vae_files[a]) if isinstance(a, int) else a for a in flags]
    more = [] if "--cache_dir" in flags else ["--cache_dir", str(latent_run[2])]
    moved = weights(latent_run[0])
    models.save_checkpoint(tmp_path / "c.pt", {**moved, "data": {**moved["data"], "data_dir": None}})
    monkeypatch.setattr(evaluate.sys, "argv", ["evaluate.py", "--ckpt", "c.pt", "--n", "20", *flags, *more])
    with pytest.raises(SystemExit) as stop:
        data.run(evaluate.main)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and err.count("\n") == 1, err


def test_both_tokenisers_decode_tokens_by_the_same_rule():
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    tok = data.open_tokeniser({"patch": 2, "channels": 3})
    x = patchify(tok.encode(images), 1)
    assert torch.equal(x, patchify(images, 2)) and torch.equal(tok.decode(data.unpatchify(x, 1)), images)


# ================================================================ many processes

def small_shards_of(doomed=None):
    """Shards of 5 images; whoever has written half of shard `doomed` is killed."""
    latents.SHARD, real = 5, latents.write_shard

    def write_shard(path, *a):
        if int(path.stem) == doomed:
            real(path.with_name("half.npy"), *a)
            deadline = time.time() + 60
            while not path.with_name("00000.json").exists() and time.time() < deadline:      # the other has said what it does
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, *a)
    latents.write_shard = write_shard


def test_a_process_killed_while_caching_costs_one_shard_and_two_processes_train_as_one(tmp_path, vae_files, small_shards, monkeypatch, capsys):
    make_folder(tmp_path / "in" / "train", 10, ("n01440764", "n02099601"), size=12)
    make_folder(tmp_path / "in" / "val", 2, ("n01440764", "n02099601"), size=12)
    flags = [*LATENT, "--dataset", "imagenet256", "--data_dir", tmp_path / "in", "--vae", vae_files[0], "--global_batch", 8, "--warmup", 2,
             "--steps", 2, "--device", "cpu", "--samples_per_class", 2, "--model", "gpt-tiny", "--dropout", 0, "--buffer", 0]    # both are by rank
    job = ["train", "--out_dir", tmp_path / "two", "--cache_dir", tmp_path / "c", *flags]
    success, log = torchrun(2, *job, before=functools.partial(small_shards_of, 3))
    assert not success, log
    assert "encoding 24 images and their mirror images" in log and re.search(r"encoding: .*/14 \[.*<.*image/s\]", log), "progress and time left"
    assert (tmp_path / "c" / "00001.json").exists() and not (tmp_path / "c" / "00003.json").exists() and not (tmp_path / "c" / "manifest.json").exists()
    assert not (tmp_path / "two" / "ckpt.pt").exists(), "nobody trains before all shards are there"
    kept = (tmp_path / "c" / "00001.npy").stat().st_mtime_ns
    success, log = torchrun(2, *job, before=small_shards_of)
    assert success, log
    assert (tmp_path / "c" / "00001.npy").stat().st_mtime_ns == kept, "a whole shard is not encoded again"
    fit(tmp_path / "one", *flags, "--cache_dir", tmp_path / "d", monkeypatch=monkeypatch, capsys=capsys)
    for k in range(5):
        # batches of convolutions of another size differ in the last bit of fp32, once in a while in float16
        a, b = (np.load(tmp_path / c / f"{k:05d}.npy").astype(np.float32) for c in "cd")
        assert np.abs(a - b).max() < 2e-3, k
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert a["data"]["class_names"] == ["tench, Tinca tinca", "golden retriever"] and (a["data"]["n_train"], a["data"]["n_heldout"]) == (20, 4)
    assert max(float((a["model"][k] - b["model"][k]).abs().max()) for k in a["model"]) < 2e-5        # fp32 summation order under Adam


def test_three_processes_draw_the_file_of_one_refined_or_not(latent_run, vae_files, tmp_path, monkeypatch, capsys):
    flags = ["--ckpt", latent_run[0], "--n", 10, "--steps", 2, "--vae", vae_files[0], "--refine", "default", "--n_cal", 8, "--m", 8]
    success, log = torchrun(3, "sample", *flags, "--out", tmp_path / "three.npz")       # 2 classes: one rank draws nothing
    assert success, log
    code, _, err = cli(sample, [*flags, "--out", tmp_path / "one.npz"], monkeypatch, capsys)
    assert code == 0, err
    with np.load(tmp_path / "one.npz") as a, np.load(tmp_path / "three.npz") as b:
        assert np.array_equal(a["arr_1"], b["arr_1"])
        assert np.abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1            # other batch sizes: fp32, then rounding
    assert sorted(f.name for f in tmp_path.iterdir()) == ["one.npz", "three.npz"], "the parts are removed"


# ================================================================ MAR's weights

@pytest.fixture(scope="module", params=golden_files("mar_golden_*.npz"), ids=lambda f: f.stem)
def golden(request):
    return Golden(request.param)


def released(golden, path, **changes):
    """A file as MAR writes it: raw and averaged weights, optimiser, epoch, flags in a Namespace."""
    ema = {k[2:]: v for k, v in golden.z.items() if k.startswith("w/")}
    state = {"model": {k: torch.zeros_like(v) for k, v in ema.items()}, "model_ema": ema, "optimizer": {"state": {}, "param_groups": []},
             "epoch": 399, "scaler": {}, "args": argparse.Namespace(model="mar_base", lr=8e-4), "n_head": golden.cfg.n_head, **changes}
    torch.save({k: v for k, v in state.items() if v is not None}, path)
    return path


def test_released_weights_load_as_they_are_and_the_averaged_ones_are_taken(golden, tmp_path):
    (tmp_path / "mar").mkdir()
    released(golden, tmp_path / "mar" / "checkpoint-last.pth")
    m, state = models.load_model(tmp_path / "mar")
    same_arch = {k: v for k, v in vars(m.cfg).items() if k not in ("dropout", "class_dropout", "diffusion_batch_mul", "inverse")}
    assert same_arch == {k: getattr(golden.cfg, k) for k in same_arch}
    assert all(torch.equal(v, golden[f"w/{k}"]) for k, v in m.state_dict().items())
    assert state["data"]["x0_bound"] is None and state["data"]["vae"]["scale"] == vae.KL16_SCALE


@pytest.mark.parametrize("name", ["mar-b", "mar-l", "mar-h"])
@pytest.mark.parametrize("grid", [16, 32])
def test_the_size_of_a_released_model_is_read_from_its_tensors(name, grid):
    with torch.device("meta"):
        cfg = preset(name, grid=grid)
        state = build(cfg).state_dict()
    assert models.mar_config(state, None, "file") == cfg


def test_a_wrong_or_partial_mar_file_is_refused_by_its_first_offending_name(golden, tmp_path):
    ema = {k[2:]: v for k, v in golden.z.items() if k.startswith("w/")}
    without = lambda *names: {k: v for k, v in ema.items() if k not in names}
    for weights_, words in [(without("decoder_norm.weight"), "'decoder_norm.weight' is missing"),
                            (without("class_emb.weight"), "'class_emb.weight' is missing"),
                            ({**ema, "class_emb.weight": ema["class_emb.weight"][:, :-1]}, "'class_emb.weight' is"),
                            ({**ema, "extra": torch.ones(1)}, "'extra' is not part of the model"),
                            ({**ema, "mask_token": ema["mask_token"] * float("nan")}, "'mask_token' .* not finite")]:
        with pytest.raises(ValueError, match=words):
            models.load_model(released(golden, tmp_path / "x.pth", model_ema=weights_))
    with pytest.raises(ValueError, match="number of heads cannot be read"):
        models.load_model(released(golden, tmp_path / "x.pth", n_head=None))
    whole = released(golden, tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        models.load_model(tmp_path / "x.pth")
    torch.save({"model": {"encoder.conv_in.weight": torch.ones(1)}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="not a checkpoint of train.py"):
        models.load_model(tmp_path / "x.pth")


def write_safetensors(path, state, cut=0):
    header, raw = {"__metadata__": {"format": "pt"}}, b""
    for name, v in state.items():
        kind = {torch.float32: "F32", torch.float16: "F16"}[v.dtype]
        header[name] = {"dtype": kind, "shape": list(v.shape), "data_offsets": [len(raw), len(raw) + v.numel() * v.element_size()]}
        raw += v.contiguous().numpy().tobytes()
    text = json.dumps(header).encode()
    path.write_bytes((struct.pack("<Q", len(text)) + text + raw)[:-cut or None])
    return path


def test_safetensors_are_read_without_a_package_and_warned_about(golden, tmp_path, monkeypatch):
    state = {k[2:]: v for k, v in golden.z.items() if k.startswith("w/")}
    read = models.read_safetensors(write_safetensors(tmp_path / "m.safetensors", {**state, "half": torch.ones(3).half()}))
    assert all(torch.equal(read[k], v) for k, v in state.items()) and read["half"].dtype == torch.float16
    with torch.device("meta"):
        mar_b = preset("mar-b", n_layer=1, head_depth=1, head_width=64, grid=2, num_classes=3, n_class_tokens=2)
    torch.manual_seed(0)
    m = build(mar_b)
    with pytest.warns(UserWarning, match="no model_ema"):
        got, _ = models.load_model(write_safetensors(tmp_path / "b.safetensors", m.state_dict()))
    assert got.cfg == mar_b and all(torch.equal(v, m.state_dict()[k]) for k, v in got.state_dict().items())
    for cut in (5, 10 ** 6):
        with pytest.raises(ValueError, match="no readable safetensors"):
            models.load_model(write_safetensors(tmp_path / "c.safetensors", state, cut))


def test_our_mar_weights_come_back_from_mar_s_layout(latent_run, tmp_path, monkeypatch, capsys):
    with pytest.warns(UserWarning, match="RoPE"):
        code, out, err = cli(sample, ["--ckpt", latent_run[0], "--export", tmp_path / "mar.pth"], monkeypatch, capsys)
    assert code == 0, err
    ours, theirs = models.load_model(latent_run[0])[0], models.load_model(tmp_path / "mar.pth")[0]
    names = [k for k in ours.state_dict() if not k.startswith(("inverse.", "buffer."))]
    assert sorted(names) == sorted(theirs.state_dict()) and all(torch.equal(ours.state_dict()[k], theirs.state_dict()[k]) for k in names)
    x, y = torch.randn(3, ours.cfg.n_tokens, ours.cfg.token_dim), torch.tensor([0, 1, 1])
    assert torch.equal(ours.conditions(x, y), theirs.conditions(x, y)), "the same weights, but another architecture"


@pytest.fixture(scope="module")
def stride16(tmp_path_factory):
    """A small autoencoder of KL-16's stride."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("vae16") / "kl16.ckpt"
    torch.save({"model": vae.KL16(ch=32, ch_mult=(1,) * 5, z_channels=4).state_dict()}, file)
    return file


def write_cache(root, vae_file, labels, held, side, size):
    """A complete cache of random moments of 1000 classes, as the format says, without encoding any image."""
    root.mkdir()
    np.save(root / "index.npy", np.stack([labels, held], axis=1).astype(np.int32))
    np.save(root / "00000.npy", np.random.default_rng(0).standard_normal((len(labels), 2, 8, side, side)).astype(np.float16))
    (root / "manifest.json").write_text(json.dumps({
        "made_for": {"vae": vae.load_kl16(vae_file).fingerprint(), "crop": "halve, bicubic, centre", "size": size},
        "scale": 0.2325, "std": 1.0, "x0_bound": 5.0, "beyond": 0.0, "shards": [{"file": "00000.npy", "count": len(labels)}], "class_names": [n for _, n in data.imagenet_classes()]}))
    return root


def test_released_weights_are_refined_from_the_command_line(tmp_path, stride16, monkeypatch, capsys):
    """MAR's file, KL-16's file, a class by name, targets from the cache: as the README says it, at a tiny size."""
    torch.manual_seed(0)
    m = build(preset("mar-tiny", token_dim=4, grid=2, num_classes=1000, n_layer=1, inverse=False, buffer=0))
    (tmp_path / "mar_base").mkdir()
    ckpt = tmp_path / "mar_base" / "checkpoint-last.pth"
    torch.save({"model": {k: torch.full_like(v, float("inf")) for k, v in m.state_dict().items()}, "model_ema": m.state_dict(), "optimizer": {},
                "epoch": 799, "scaler": {}, "args": argparse.Namespace(lr=8e-4), "n_head": m.cfg.n_head}, ckpt)
    cache = write_cache(tmp_path / "c", stride16, np.repeat([0, 207], 20), np.tile([0, 1], 20), 2, 32)
    flags = ["--ckpt", ckpt, "--vae", stride16, "--classes", "golden retriever", "tench", "--num_iter", 2, "--solver", "ddpm", "--steps", 3,
             "--cfg_scale", 2.9, "--n", 8]
    refine, images = ["--refine", "default", "--rank", 8, "--m", 10, "--n_cal", 20, "--cache_dir", cache], {}
    for name, more in (("plain", []), ("refined", refine), ("again", refine)):
        code, out, err = draw([*flags, *more, "--out", tmp_path / f"{name}.npz"], monkeypatch, capsys)
        assert code == 0 and "no model_ema" not in err, err
        assert ("calibrated" in out) == (name == "refined"), "once calibrated, the maps are kept beside the checkpoint"
        with np.load(tmp_path / f"{name}.npz") as z:
            images[name] = z["arr_0"]
            assert images[name].shape == (8, 32, 32, 3) and z["arr_1"].tolist() == [207, 0] * 4
    assert (images["plain"] != images["refined"]).any() and np.array_equal(images["refined"], images["again"])
    make_folder(tmp_path / "two", 4, ("n01440764", "n02099601"), size=32)
    other = ["--data_dir", tmp_path / "two", "--cache_dir", tmp_path / "d", "--n_cal", 8, "--out", tmp_path / "x.npz"]
    code, _, err = draw([*flags, *refine[:-2], *other], monkeypatch, capsys)
    assert code == 2 and "2 classes" in err, "labels of another set of classes are other classes"


class ScriptedNoise:
    """The noise of a table (B, N, draws, D) by position, handed out in the order in which positions are filled."""

    def __init__(self, table, order):
        self.table, self.order, self.filled = table, order, 0

    def randn(self, n_noise, n, D):
        pos = self.order[:, self.filled:self.filled + n]
        self.filled += n
        return self.table[torch.arange(len(pos))[:, None], pos].transpose(1, 2)          # (B, n_noise, n, D)


def literal_mar(w, g, y, orders, table, num_iter, cfg_scale, steps, temperature, dtype):
    """MAR's sampling loop in its own terms, from the paper and its published behaviour: masks of 0 and 1, orders whose
    *last* entries are revealed first, both branches in one batch, ancestral steps in float64 tables. (B, N, D)."""
    w = {k: v.to(dtype) for k, v in w.items()}
    heads, n_class = g.n_head, g.n_class_tokens
    B, N, D = table.shape[0], table.shape[1], table.shape[3]
    norm = lambda h, name: torch.nn.functional.layer_norm(h, h.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)
    linear = lambda h, name: h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def block(h, name):
        q, k, v = linear(norm(h, f"{name}.norm1"), f"{name}.attn.qkv").reshape(len(h), h.shape[1], 3, heads, -1).permute(2, 0, 3, 1, 4)
        a = ((q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        h = h + linear(a.transpose(1, 2).reshape(h.shape), f"{name}.attn.proj")
        return h + linear(torch.nn.functional.gelu(linear(norm(h, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")

    def one_condition(x, mask, emb):                                     # one image: (N, D), (N,), (C,) -> (N, C)
        h = torch.cat([emb.expand(n_class, -1), linear(x, "z_proj")])
        h = norm(h + w["encoder_pos_embed_learned"][0], "z_proj_ln")
        keep = torch.cat([torch.ones(n_class, dtype=torch.bool), mask == 0])
        h = h[keep][None]
        for j in range(g.n_layer):
            h = block(h, f"encoder_blocks.{j}")
        full = w["mask_token"][0].expand(n_class + N, -1).clone()
        full[keep] = linear(norm(h, "encoder_norm"), "decoder_embed")[0]
        h = (full + w["decoder_pos_embed_learned"][0])[None]
        for j in range(g.n_layer):
            h = block(h, f"decoder_blocks.{j}")
        return norm(h, "decoder_norm")[0, n_class:] + w["diffusion_pos_embed_learned"][0]

    def head(x, t, c):
        freq = torch.exp(-math.log(10000) * torch.arange(128, dtype=dtype) / 128)
        silu, net = torch.nn.functional.silu, "diffloss.net."
        e = torch.cat([(t * freq).cos(), (t * freq).sin()])
        e = linear(silu(linear(e, net + "time_embed.mlp.0")), net + "time_embed.mlp.2")
        cond = silu(e + linear(c, net + "cond_embed"))
        h = linear(x, net + "input_proj")
        for j in range(g.head_depth):
            name = f"{net}res_blocks.{j}."
            shift, scale, gate = linear(cond, name + "adaLN_modulation.1").chunk(3, -1)
            inner = norm(h, name + "in_ln") * (1 + scale) + shift
            h = h + gate * linear(silu(linear(inner, name + "mlp.0")), name + "mlp.2")
        shift, scale = linear(cond, net + "final_layer.adaLN_modulation.1").chunk(2, -1)
        h = torch.nn.functional.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift
        return linear(h, net + "final_layer.linear").split(D, -1)

    f = lambda s: math.cos((s / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    full_abar = np.cumprod([1 - min(1 - f(s + 1) / f(s), 0.999) for s in range(1000)])
    used = [round(k * 999 / (steps - 1)) for k in range(steps)]
    abar = full_abar[used]
    before = np.concatenate([[1.0], abar[:-1]])
    beta = 1 - abar / before
    var = beta * (1 - before) / (1 - abar)
    low, high = np.log(np.concatenate([[var[1]], var[1:]])), np.log(beta)

    x, mask = torch.zeros(B, N, D, dtype=dtype), torch.ones(B, N)
    for step in range(num_iter):
        c = torch.stack([one_condition(x[b], mask[b], w["class_emb.weight"][y[b]]) for b in range(B)])
        c0 = torch.stack([one_condition(x[b], mask[b], w["fake_latent"][0]) for b in range(B)])
        left = math.floor(N * math.cos(math.pi / 2 * (step + 1) / num_iter))
        left = max(1, min(int(mask[0].sum()) - 1, left))
        after = torch.zeros(B, N).scatter(1, orders[:, :left], 1.0) if step < num_iter - 1 else torch.zeros(B, N)
        now = (mask - after).bool()
        scale = 1 + (cfg_scale - 1) * (N - (left if step < num_iter - 1 else 0)) / N
        z = table[now][:, 0].to(dtype)
        for j in reversed(range(steps)):
            eps, v = head(z, used[j], c[now])
            eps0, _ = head(z, used[j], c0[now])
            eps = eps0 + scale * (eps - eps0)
            x0 = z / math.sqrt(abar[j]) - math.sqrt(1 / abar[j] - 1) * eps
            mean = beta[j] * math.sqrt(before[j]) / (1 - abar[j]) * x0 + (1 - before[j]) * math.sqrt(1 - beta[j]) / (1 - abar[j]) * z
            log_var = (v + 1) / 2 * high[j] + (1 - (v + 1) / 2) * low[j]
            z = mean + (j > 0) * temperature * (0.5 * log_var).exp() * table[now][:, steps - j].to(dtype)
        x[now], mask = z, after
    return x


@torch.no_grad()
@pytest.mark.parametrize("num_iter", [None, 4])
def test_a_whole_latent_of_mar_is_that_of_its_literal_loop(golden, num_iter):
    """Same orders, same noises: masks, schedule of tokens, linear guidance and ancestral sampling all agree."""
    cfg, steps, scale, temperature = golden.cfg, 8, 2.5, 0.9
    N, y = cfg.n_tokens, golden["labels"][:2] if golden["labels"].ndim else torch.tensor([0, 1])
    orders = torch.stack([torch.randperm(N, generator=gen(k)) for k in range(2)])
    table = torch.randn(2, N, 1 + steps, cfg.token_dim, generator=gen())
    w = {k[2:]: v for k, v in golden.z.items() if k.startswith("w/")}
    want = literal_mar(w, cfg, y, orders, table, num_iter or N, scale, steps, temperature, torch.float32)
    got = golden.model.generate(y, ScriptedNoise(table, orders.flip(1)), Sampler("ddpm", steps, temperature=temperature), scale,
                                num_iter=num_iter, order=orders.flip(1))
    exact = literal_mar(w, cfg, y, orders, table, num_iter or N, scale, steps, temperature, torch.float64)
    # x0 is not bounded: the chain reaches 1e3 and more and feeds itself back; the literal loop in fp32 errs as much
    error, own = relative(got.double(), exact), relative(want.double(), exact)
    assert error < 1e-3 and error < 20 * own + 1e-4, (error, own)


# ================================================================ names of classes

def test_classes_are_found_by_number_id_name_or_part_of_a_name_and_an_exact_first_name_wins():
    names = [n for _, n in data.imagenet_classes()]
    for word, number in [("golden retriever", 207), ("207", 207), ("n02099601", 207), ("tench", 0), ("Tinca tinca", 0), ("tench, Tinca tinca", 0),
                         ("TIGER", 292), ("goldfish", 1), ("curly-coat", 206)]:
        assert sample.class_ids([word], names) == [number], word
    with pytest.raises(ValueError, match="'retriever' may be any of 205 flat-coated retriever; 206 .*: give the number"):
        sample.class_ids(["retriever"], names)
    with pytest.raises(ValueError, match="134 crane; 517 crane"):
        sample.class_ids(["crane"], names)
    with pytest.raises(ValueError, match="this checkpoint knows tench"):
        sample.class_ids(["unicorn"], names)
    assert sample.class_ids(None, names) == list(range(1000)) and sample.class_ids(["3", "7"], [str(k) for k in range(10)]) == [3, 7]


# ================================================================ what it takes

@pytest.mark.parametrize("name, options, guided", [("gpt-tiny", {}, True), ("mar-tiny", {}, False), ("mar-tiny", {"num_iter": 5}, True), ("cdm-tiny", {}, True)])
def test_flops_of_an_image_are_those_of_the_real_chain(name, options, guided):
    cfg = preset(name, token_dim=4, grid=3)

    class Blank:
        randn = rand = staticmethod(lambda *shape: torch.empty(1, *shape, device="meta"))
    with plan.FlopCounterMode(display=False) as counter:                 # on meta: the CPU's attention is not in torch's count
        plan.on_meta(cfg).eval().generate(torch.zeros(1, dtype=torch.long, device="meta"), Blank(), Sampler("ddim", 3), 2.0 if guided else 1.0, **options)
    assert plan.sampling_flops(cfg, 3, options.get("num_iter"), guided) == counter.get_total_flops()


def test_flops_and_memory_of_the_published_sizes_are_those_of_a_calculation_by_hand():
    cfg = preset("cdm-xl")
    d, N = cfg.n_embd, 256
    by_hand = cfg.n_layer * (2 * 12 * d * d * N + 4 * N * N * d + 2 * 6 * d * d)                 # blocks: matrices, attention, adaLN
    # the rest, embeddings and output, is below 1 %; DiT-XL/2 is quoted with 119 G multiply-adds
    assert plan.sampling_flops(cfg, 1, guided=False) / by_hand == pytest.approx(1, abs=0.01) and by_hand / 2e9 == pytest.approx(119, rel=0.02)
    assert plan.training_flops(cfg) == pytest.approx(3 * by_hand, rel=0.01), "backward costs twice the forward pass"
    assert plan.training_flops(cfg, recompute=True) == pytest.approx(4 * by_hand, rel=0.02)
    model, held, kept = plan.memory_estimate(preset("gpt-b"), 1)
    assert held == 20 * model.num_params and plan.memory_estimate(preset("gpt-b"), 1, recompute=True)[2] < kept / 2


@pytest.mark.parametrize("name", ["gpt-tiny", "mar-tiny", "cdm-tiny"])
def test_depth_extrapolation_of_flops_and_memory_is_exact(name, monkeypatch):
    cfg = preset(name, token_dim=4, grid=4)
    deep = plan.replace(cfg, n_layer=5, head_depth=4 if cfg.head_depth else 0)
    model = plan.on_meta(deep)
    with plan.FlopCounterMode(display=False) as counter:
        model.loss(*plan.one_image(model)).sum().backward()
    assert plan.training_flops(deep) == counter.get_total_flops()
    held = [plan.memory_estimate(deep, 3, recompute)[1:] for recompute in (False, True)]
    monkeypatch.setattr(plan, "by_layers", lambda cfg, count: count(cfg))
    assert held == [plan.memory_estimate(deep, 3, recompute)[1:] for recompute in (False, True)] and held[1][1] < held[0][1]


def test_dry_run_of_imagenet_needs_neither_data_nor_vae(tmp_path, monkeypatch, capsys):
    code, out, err = cli(train, ["--dry-run", "--dataset", "imagenet512", "--model", "mar-tiny", "--out_dir", tmp_path / "x", "--checkpoint_blocks"],
                         monkeypatch, capsys)
    assert code == 0, err
    assert "1024 tokens of 16" in out and "1281167 training" in out and "TFLOP a step" in out and "8 x H100" in out
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["gpt-tiny", "mar-tiny", "cdm-tiny"])
def test_checkpointed_blocks_give_the_same_loss_and_gradients_bitwise(name):
    x, y = tokens(4)
    found = []
    for recompute in (False, True):
        m = tiny(name, dropout=0.2).train()
        if recompute:
            models.checkpoint_blocks(m)
        torch.manual_seed(1)
        loss = m.loss(x, y, m.draw(4, gen(5))).sum()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in m.parameters())])
    assert all((a is b is None) or torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("name", ["gpt-tiny", "mar-tiny", "cdm-tiny"])
def test_512_pixels_with_1024_tokens_train_and_sample(name):
    m = tiny(name, token_dim=16, grid=32, n_embd=32, n_head=2, n_layer=1, head_depth=1 if name != "cdm-tiny" else 0, inverse=False)
    x, y = torch.randn(2, 1024, 16, generator=gen()), torch.tensor([0, 1])
    loss = m.loss(x, y, m.draw(2, gen())).sum()
    loss.backward()
    options = {"num_iter": 8} if name == "mar-tiny" else {}
    out = m.generate(y, ImageNoise(0, range(2)), Sampler(steps=1, x0_bound=5.0), **options)
    assert loss.isfinite() and out.shape == (2, 1024, 16) and out.isfinite().all()


# ================================================================ refinement of many classes

@pytest.mark.parametrize("name, method, rank", [("gpt-tiny", "default", 0), ("gpt-tiny", "default", 8), ("mar-tiny", "sinkhorn", 8), ("gpt-tiny", "mean", 0)])
def test_the_memory_rule_is_what_a_calibrated_refiner_holds(name, method, rank):
    m = tiny(name)
    refine = RefineConfig(rank=rank) if method == "default" else RefineConfig(method=method, rank=rank)
    mar = name == "mar-tiny"
    recipe = sample.Recipe(Sampler(steps=2, x0_bound=1.0), refine=refine, m=12, n_cal=9, orders=2 * mar, num_iter=5 if mar else None)
    drawer = sample.Drawer(m, recipe, [1, 4, 7])
    drawer.calibrate(lambda y, n: torch.randn(n, 16, 4, generator=gen(y)).clamp(-1, 1), 54)
    assert drawer.refiner.nbytes() == 3 * sample.refinement_bytes(m, recipe)[0]


def test_a_class_is_calibrated_alike_beside_any_other_classes():
    m = tiny("gpt-tiny")
    recipe = sample.Recipe(Sampler(steps=2, x0_bound=1.0), refine=RefineConfig(), m=12, n_cal=10)
    real, y = lambda y, n: torch.randn(n, 16, 4, generator=gen(y)).clamp(-1, 1), torch.tensor([4, 4])
    out = []
    for classes in ([4], [1, 4, 7]):
        drawer = sample.Drawer(m, recipe, classes)
        drawer.calibrate(real)
        out.append(drawer(y, [0, 1], seed=0))
    assert relative(*out) < 1e-3                                          # other batches: fp32 through 16 steps and Sinkhorn


def test_coupled_batches_never_cut_a_class():
    labels = torch.tensor([0, 1, 2]).repeat(5)
    index = torch.argsort(labels, stable=True)
    parts = sample.batches(labels, index, 11, whole=True)
    assert [labels[p].unique().tolist() for p in parts] == [[0, 1], [2]] and torch.equal(torch.cat(list(parts)), index)
    assert [labels[p].unique().tolist() for p in sample.batches(labels, index, 3, whole=True)] == [[0], [1], [2]], "a class larger than the batch stays whole"


def first_layers(self, images):
    """Instead of the whole Inception: 64 features from its first three layers at 35 pixels, logits from a part of its last."""
    x = (inception.resize_tf1(images.permute(0, 3, 1, 2).float(), 35) - 128) / 128
    x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))).mean((2, 3))
    return x, x @ self.fc.weight[:, :64].T


def shallow_inception():
    inception.Inception.forward = first_layers


def test_a_thousand_classes_from_checkpoint_to_fid_in_two_processes(tmp_path, vae_files, monkeypatch, capsys):
    """The pipeline of the published numbers at toy size: torchrun sample.py, refined in rounds of classes that fit the memory,
    then torchrun evaluate.py against a reference file with images and statistics."""
    torch.manual_seed(0)
    names = [n for _, n in data.imagenet_classes()]
    m = build(preset("mar-tiny", token_dim=4, grid=2, num_classes=1000, n_layer=1, inverse=False, buffer=0))
    made = write_cache(tmp_path / "c", vae_files[0], np.arange(1000).repeat(3), np.tile([0, 0, 1], 1000), 2, 4)
    d = data.load("imagenet256", size=4, patch=1, vae=vae_files[0], cache_dir=made)
    assert len(d.train.of_class(999, 10)) == 2 and (d.train.labels[d.train.of_class(7, 10)] == 7).all()
    models.save_checkpoint(tmp_path / "ckpt.pt", {"config": vars(m.cfg), "model": m.state_dict(), "ema": m.state_dict(), "step": 0,
                           "data": {**d.facts, "data_dir": None, "class_names": names, "x0_bound": d.x0_bound}})
    # as a user types it; `--`, else torchrun takes --n and --m for abbreviations of its own flags
    p = python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "--", "sample.py", "--ckpt", tmp_path / "ckpt.pt", "--vae", vae_files[0],
               "--steps", 1, "--num_iter", 2, "--refine", "default", "--m", 2, "--rank", 4, "--n", 1000, "--n_cal", 8, "--batch_size", 4000,
               "--refine_memory", "0.002", "--out", tmp_path / "s.npz")
    log, _ = p.communicate(timeout=300)
    assert p.returncode == 0 and re.search(r": \d\d\d of 500 classes at a time in --refine_memory 0.002 GB", log), log
    with np.load(tmp_path / "s.npz") as z:
        images, labels = z["arr_0"], z["arr_1"]
    assert images.shape == (1000, 4, 4, 3) and np.bincount(labels).tolist() == [1] * 1000 and len(np.unique(images.reshape(1000, -1), axis=0)) > 750
    assert all(np.unique(part % 10).size == 10 for part in np.split(labels, 10)), "not sorted by class"

    torch.save(inception.Inception().state_dict(), tmp_path / "inception.pth")
    rng = np.random.default_rng(0)
    ref = {"arr_0": rng.integers(0, 255, (40, 4, 4, 3), dtype=np.uint8), "mu": rng.standard_normal(64), "sigma": np.diag(rng.uniform(0.5, 2, 64))}
    np.savez(tmp_path / "VIRTUAL_imagenet256_labeled.npz", **ref)
    success, log = torchrun(2, "evaluate", "--samples", tmp_path / "s.npz", "--ref", tmp_path / "VIRTUAL_imagenet256_labeled.npz", "--features", "inception",
                            "--weights", tmp_path / "inception.pth", "--json", tmp_path / "o.json", before=shallow_inception)
    assert success and log.count("1000 samples against 40 images; features: inception") == 1, log
    assert "published FID, precision and recall are for 50,000" in log and "are not comparable with published ones" in log
    monkeypatch.setattr(inception.Inception, "forward", first_layers)
    net, values = inception.load_inception(str(tmp_path / "inception.pth")), json.loads((tmp_path / "o.json").read_text())["values"]
    fake, real = evaluate.extract(net, images), evaluate.extract(net, ref["arr_0"])
    precision, recall = evaluate.precision_recall(real.x, fake.x)
    want = {"fid": evaluate.frechet_distance(fake.mean, fake.cov, ref["mu"], ref["sigma"]), "precision": precision, "recall": recall,
            "is": evaluate.inception_score(fake.logits.double().softmax(1))[0], "kid": evaluate.kid(fake.x, real.x)[0]}
    for key, value in want.items():                                       # 1e-5: the batches of convolutions differ in size
        assert values[key] == pytest.approx(value, rel=1e-5), key


README = (Path(__file__).parent / "README_imagenet.md").read_text()


def arguments(program, flags):
    """The parsed flags of a command, as the program itself parses them."""
    return {"train": train.parse_args, "sample": sample.parse_args, "evaluate": evaluate.metrics_args}[program](shlex.split(flags))


def test_every_command_of_the_readme_is_whole_and_understood():
    found = re.findall(r"(train|sample|evaluate)\.py( --[^`\n]*)", re.sub(r"\\\n +", "", README))
    assert len(found) > 50
    jobs = re.findall(r"torchrun (--[^`\n]*)", re.sub(r"\\\n +", "", README))
    if "--shutdown-timeout" not in get_args_parser().format_help():                        # as in torch 2.6, which the README says
        jobs = [re.sub(r"--shutdown_timeout \d+", "", job) for job in jobs]
    assert len(jobs) > 48 and all(launch_args(shlex.split(job)).training_script in ("train.py", "sample.py", "evaluate.py") for job in jobs)
    for program, flags in found:
        assert "..." not in flags, flags
        args = arguments(program, flags)
        assert not getattr(args, "model", None) or args.model in models.PRESETS


def test_the_rows_of_the_readme_are_the_output_of_plan():
    lines = [next(line for line in README.splitlines() if line.startswith(f"| {name} | {(size // 16) ** 2} |")) for name, size in plan.ROWS]
    fits = [int(line.split("|")[6].split("(")[0]) for line in lines]
    assert README.endswith("\n".join([plan.HEADER, *lines]) + "\n\n" + "\n\n".join(plan.section(*row, fit) for row, fit in zip(plan.ROWS, fits)) + "\n")
    for k in (0, 2):                                                     # two of ten, since each takes seconds
        assert plan.table_row(*plan.ROWS[k]) == (lines[k], fits[k])


@pytest.mark.parametrize("name, size", plan.ROWS)
def test_the_commands_of_a_row_fit_each_other_the_model_and_the_machine(name, size):
    found = dict(plan.commands(name, size, 256))
    split = {what: re.fullmatch(r"torchrun --nproc_per_node 8 -- (\w+)\.py (.*)", command).groups() for what, command in found.items()}
    args = {what: arguments(*parts) for what, parts in split.items()}
    run = args["training"]
    stated = {k: v for k, v in vars(run).items() if f"--{k} " in found["training"]}
    defaults = {**train.IMAGENET, "model": name}
    assert {k: v for k, v in stated.items() if k in defaults} == {k: v for k, v in defaults.items() if k in stated}, "spelled out"
    assert run.dataset == f"imagenet{size}" and abs(run.steps * run.global_batch / plan.IMAGENET - 400) < 1 and run.warmup * 4 == run.steps
    assert all(run.global_batch % (8 * plan.accumulation(fit)) == 0 and run.global_batch // 8 // plan.accumulation(fit) <= fit for fit in (1, 7, 52, 300))
    model = plan.on_meta(preset(name, grid=size // 16))
    for kind in ("", ", refined")[:1 + (name != "cdm-xl")]:
        draws, judged = args["sampling" + kind], args["measuring" + kind]
        recipe = sample.make_recipe(draws, model.cfg.kind, 5.0)
        sample.Drawer(model, recipe, [])                                 # raises where they do not fit each other
        assert recipe.refined == bool(kind) and draws.n == 50 * 1000 and draws.ckpt == run.out_dir and judged.samples == draws.out
        assert not kind or sample.refinement_bytes(model, recipe)[1] < draws.refine_memory * 1e9, "at least one class fits"


@pytest.mark.parametrize("name, size", [("mar-b", 256), ("cdm-xl", 512)])
def test_the_training_command_of_a_row_describes_itself_without_data(name, size, tmp_path, monkeypatch, capsys):
    argv = shlex.split(dict(plan.commands(name, size, 64))["training"].split("train.py")[1])
    argv = [a for k, a in enumerate(argv) if not {argv[k], argv[k - 1]} & {"--data_dir", "--vae", "--accumulate"}]      # no files, one process
    code, out, err = cli(train, [*argv, "--accumulate", 32, "--dry-run"], monkeypatch, capsys)
    assert code == 0 and "1281167 training" in out and f"{(size // 16) ** 2} tokens of 16" in out and "250000 steps take about" in out, err
