"""Tests of the core's programs: `pytest test_programs.py`. Refinement class by class, sample.py,
train.py, the rules of the repository, and copies of the core, whole and changed in one place.
"""
import ast
import contextlib
import copy
import functools
import graphlib
import importlib
import io
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
import time
from pathlib import Path
from textwrap import indent

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import command
import files
import model as models
import ot_refine as R
import sample
import train
from data import patchify, unpatchify
from diffloss import ImageNoise
from muon import Muon, orthogonal
from runs import lock, read_checkpoint
from test_core import MEAN, SOLVERS, STD, clouds, every, randn, relative, tiny, tokens

ROOT = Path(__file__).parent
CORE = ("command", "files", "runs", "data", "diffloss", "model", "ot_refine", "sample", "muon",
        "train", "classifier", "evaluate")
TESTS = ("conftest", "test_core", "test_programs")
OUTER = {f.stem for f in ROOT.glob("*.py") if not f.name.startswith("test_")} - {*CORE, *TESTS}


# ================================================================ runs, and processes

def cli(module, *argv):
    """Run a program's main() in this process: (exit code, what it printed)."""
    handlers, text, code = {s: signal.getsignal(s) for s in (2, 15)}, io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text), \
            contextlib.redirect_stderr(text):
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
        try:
            command.run(module.main)
        except SystemExit as stop:
            code = stop.code or 0
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return code, text.getvalue()


def done(module, *argv):
    """What a program printed that has to succeed."""
    code, text = cli(module, *argv)
    assert code == 0, text
    return text


def refused(words, module, *argv):
    """The command is bad input: one line with these words, exit code 2."""
    code, text = cli(module, *argv)
    said = [line for line in text.splitlines() if ": error: " in line]
    assert code == 2 and len(said) == 1 and words in said[0], (code, text)


FAST = ["--global_batch", 16, "--eval_every", 2, "--device", "cpu"]
SETTINGS = ["eval_images=32", "warmup=2", "lr_schedule=constant"]
DRAW = ["--device", "cpu", "--steps", 2]                       # of sample.py
REFINE = [*DRAW, "--classes", 3, "--n", 4, "--m", 30, "--overwrite", "--refine"]


def fit(out, *more, steps=2, settings=()):
    """What train.py printed that trained `steps` steps in a small way."""
    return done(train, "--out_dir", out, *FAST, "--steps", steps, *more, "--set", *SETTINGS,
                *settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of two steps."""
    out = tmp_path_factory.mktemp("runs") / "run"
    fit(out)
    return out


@pytest.fixture
def own_run(run, tmp_path):
    """The same, to be written to."""
    return shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("refine"))


def changed(run, path, change):
    """A copy of a run's checkpoint at `path` whose dict was changed."""
    state = torch.load(run / "ckpt.pt", weights_only=True)
    change(state)
    torch.save(state, path)
    return path


def largest_difference(a, b):
    a, b = (read_checkpoint(out) for out in (a, b))
    assert a["step"] == b["step"]
    return max(float((a[part][k] - b[part][k]).abs().max())
               for part in ("model", "ema") for k in a[part])


def child(rank, world, port, module, argv, before, log):
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                      MASTER_ADDR="localhost", MASTER_PORT=str(port))
    sys.argv = [f"{module}.py", *argv]
    signal.signal(signal.SIGINT, signal.default_int_handler)   # pytest itself may run in the
    signal.signal(signal.SIGHUP, signal.SIG_DFL)               # background, or under nohup
    if before:
        before()
    command.run(importlib.import_module(module).main)


def start(log, module, *argv, before=None, rank=0, world=1, port=0):
    """A running process of a program, forked from a server that has imported everything once."""
    os.environ["PYTHONPATH"] = str(ROOT)
    multiprocessing.set_forkserver_preload(["__main__", "test_programs", "torch._dynamo"])
    args = (rank, world, port, module, [str(a) for a in argv], before, str(log))
    p = multiprocessing.get_context("forkserver").Process(target=child, args=args, daemon=True)
    p.start()
    return p


def two(log, module, *argv):
    """A program in two processes with torchrun's environment."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    both = [start(log, module, *argv, rank=r, world=2, port=port) for r in (0, 1)]
    while all(p.exitcode in (None, 0) for p in both) and any(p.is_alive() for p in both):
        time.sleep(0.05)
    assert [p.exitcode for p in both] == [0, 0], log.read_text()


def read(path):
    with np.load(path) as z:
        return z["arr_0"].astype(int), z["arr_1"].tolist()


# ================================================================ refinement, class by class

MODEL, BANK = tiny(), randn(10, 40, 16, 4).clamp(-1, 1)
slack = pytest.mark.filterwarnings("ignore:Sinkhorn")          # untrained: conditions are odd


class Counted(sample.Refinement):
    """A Refinement of MODEL in a small way, which counts what it computes."""

    def __init__(self, folder=None, cfg_scale=1.0, origin=None, **options):
        self.count = {"references": 0, "draws": 0}
        real = lambda k, m: self.add("references") or BANK[k, :m]
        super().__init__(MODEL, real, {"solver": "ddim", "steps": 2, "cfg_scale": cfg_scale},
                         folder=folder, origin={"weights": "a", "references": "b"} | (origin or {}),
                         **{"m": 30, "n_cal": 40, **options})

    def add(self, what):
        self.count[what] += 1

    def refine(self, k=3):
        draw = sample.draw
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sample, "draw", lambda *a, **kw: self.add("draws") or draw(*a, **kw))
            return self.refiner(k)(5, MODEL.conditions(*tokens(4))[:, 5])


@slack
def test_targets_and_maps_are_kept_and_used_again(tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr(sample, "ImageNoise", lambda s, *a: seeds.append(s) or ImageNoise(s, *a))
    first, again, coupled = Counted(tmp_path), Counted(tmp_path), Counted(coupled=True)
    out = first.refine()
    assert first.count["references"] > 0 and first.count["draws"] == 1
    assert torch.equal(again.refine(), out) and again.count == {"references": 0, "draws": 0}
    assert coupled.refine().isfinite().all() and coupled.count["draws"] == 0
    assert seeds == [-1], "the one calibration has noise that no image of a --seed has"


@slack
def test_maps_that_fewer_images_calibrated_as_memory_was_short_are_not_taken_for_whole_ones(
        tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(sample, "at_once", lambda model, sampling, most=500: min(most, 20))
        short = Counted(tmp_path).refine()
    assert "20 images calibrate a class, as 40 do not fit" in capsys.readouterr().out
    again = Counted(tmp_path)
    assert torch.equal(again.refine(), Counted().refine()) and again.count["draws"] == 1
    assert not torch.equal(short, Counted().refine())


@every("references, drawn", [(20, 200), (300, 600), (600, 1000)])
def test_a_calibration_draws_two_images_a_reference_within_200_and_1000(references, drawn):
    real = lambda k, m: BANK[0].repeat(20, 1, 1)[:min(m, references)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "draw", lambda model, y, *a, **kw: counts.append(len(y)))
        counts, how = [], {"solver": "ddim", "steps": 2}
        sample.Refinement(MODEL, real, how, "gaussian").refiner(3)
    assert counts == [drawn]


@slack
@every("changes, reason, references", [
    (dict(cfg_scale=2.0), "maps in .* were made for another sampling", False),
    (dict(eta=1.0), "maps in .* were made for another stages", False),
    (dict(m=20), "targets in .* were made for another m", True),
    (dict(rank=8), "axes in .* were made for another rank", True),
    (dict(origin={"weights": "c"}), "axes in .* were made for another weights", True),
    (dict(origin={"references": "c"}), "targets in .* were made for another references", True)])
def test_only_what_depends_on_a_change_is_computed_anew_and_says_why(
        changes, reason, references, tmp_path, capsys):
    Counted(tmp_path).refine(), capsys.readouterr()
    other = Counted(tmp_path, **changes)
    out = other.refine()
    assert re.search(reason, capsys.readouterr().out)
    assert other.count["draws"] == 1 and (other.count["references"] > 0) == references
    assert torch.equal(out, Counted(**changes).refine()), "what a fresh folder gives"


@slack
@every("name", ["axes", "targets-3", "maps-3"])
@every("how", ["cut", "text", "foreign", "nan"])
def test_a_damaged_file_is_said_and_computed_anew(name, how, tmp_path, capsys):
    out, file, fresh = Counted(tmp_path).refine(), tmp_path / f"{name}.pt", Counted(tmp_path)
    kept = torch.load(file, weights_only=True)
    files.tensors(kept["value"])[0].fill_(math.nan)
    torch.save(kept if how == "nan" else [1, 2], file)
    if how in ("cut", "text"):
        file.write_bytes(file.read_bytes()[:500] if how == "cut" else b"hello")
    capsys.readouterr()
    assert torch.equal(Counted(tmp_path).refine(), out)
    said = capsys.readouterr().out
    assert f"the {name.split('-')[0]} in {tmp_path} cannot be read" in said, said
    fresh.refine()
    assert fresh.count == {"references": 0, "draws": 0}, "the damaged file was replaced"


@slack
def test_a_folder_that_cannot_be_written_or_would_hold_too_much_costs_the_keeping_alone(
        tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    out = Counted(tmp_path / "file" / "refine").refine()
    assert capsys.readouterr().out.count("refinement is not kept") == 1
    assert torch.equal(out, Counted().refine())
    monkeypatch.setattr(sample, "KEEP", 10 ** 6)               # bytes of all 10 classes
    Counted(tmp_path / "refine").refine()
    kept = sorted(f.name for f in (tmp_path / "refine").iterdir())
    assert kept == ["axes.pt", "targets-3.pt"], "clouds of 40 x 16 in 16 places are more"


def test_refined_batches_hold_one_class_or_equal_parts_of_it():
    labels, every_one = torch.tensor([0] * 3 + [1] * 3 + [2] * 13 + [3] * 2), torch.arange(21)

    def sizes(index, refined):
        refinement = sample.Refinement(MODEL, None, {}) if refined else None
        if refined:
            refinement.refiner = lambda k: k
        parts = list(sample.batches(labels, index, 8, refinement))
        assert torch.cat([index[:0], *(p for p, _ in parts)]).sort().values.equal(index)
        return [(len(part), k) for part, k in parts]

    assert sizes(every_one, False) == [(8, None), (8, None), (5, None)]
    assert sizes(every_one, True) == [(3, 0), (3, 1), (7, 2), (6, 2), (2, 3)]
    assert sizes(every_one[:0], True) == sizes(every_one[:0], False) == []


@slack
@every("coupled", [False, True])
def test_a_class_is_refined_alike_beside_any_other_classes_and_in_any_batch(coupled):
    labels, how = torch.arange(24) % 3, dict(solver="ddim", steps=2, cfg_scale=1.0)

    def draw(index, size, r):
        decode = lambda x: data.to_uint8(unpatchify(x, 2))
        return sample.draw_images(MODEL, decode, labels, index, 0, how, size, r).astype(int)[index]

    refinement, mine = Counted(coupled=coupled), torch.arange(1, 24, 3)
    together = draw(torch.arange(24), 24, refinement)
    assert np.abs(together - draw(torch.arange(24), 24, None)).max() > 1
    # fp32 in other shapes, then rounding to 8 bits
    assert np.abs(draw(torch.arange(24), 8, refinement) - together).max() <= 1
    assert np.abs(draw(mine, 24, refinement) - together[mine]).max() <= 1
    apart = np.abs(draw(mine[:2], 24, refinement) - together[mine[:2]]).max() <= 1
    assert coupled or apart, "frozen: each image on its own"


# ================================================================ sample.py

@every("solver", SOLVERS)
def test_every_solver_draws_balanced_classes_and_the_same_file_at_any_batch_size(
        solver, run, tmp_path):
    for size in (3, 20):
        text = done(sample, "--ckpt", run, *DRAW, "--solver", solver, "--n", 20, "--batch_size",
                    size, "--out", tmp_path / f"{size}.npz")
        assert "2 steps, guidance 1.5, refinement none" in text
    (a, y), (b, _) = (read(tmp_path / f"{size}.npz") for size in (3, 20))
    assert a.shape == (20, 16, 16, 1) and np.bincount(y).tolist() == [2] * 10
    assert np.abs(a - b).max() <= 1, "other matmul shapes, then rounding to 8 bits"


@slack
@every("flags, moved", [("default", 255), ("gaussian --coupled", 255), ("sinkhorn --eta 1e-6", 1)])
def test_refined_images_differ_from_plain_ones_but_for_the_smallest_step(
        flags, moved, run, tmp_path):
    for k, more in enumerate(([], ["--refine", *flags.split(), "--m", 30])):
        done(sample, "--ckpt", run, *DRAW, *more, "--n", 12, "--classes", 3, 5, "--out",
             tmp_path / f"{k}.npz")
    far = np.abs(read(tmp_path / "0.npz")[0] - read(tmp_path / "1.npz")[0]).max()
    assert far <= moved and (far > 1) == (moved > 1)


@slack
def test_another_seed_fits_nothing_anew_and_another_guidance_the_maps_alone(own_run):
    def files(*more):
        done(sample, "--ckpt", own_run, *REFINE, "default", *more)
        return {f.name: f.stat().st_mtime_ns for f in (own_run / "refine").iterdir()}

    first, seed, guidance = files(), files("--seed", 1), files("--cfg_scale", 2)
    assert first == seed and sorted(first) == ["axes.pt", "maps-3.pt", "targets-3.pt"]
    assert [name for name in first if guidance[name] != first[name]] == ["maps-3.pt"]


def test_classes_and_pictures_are_as_asked_for(own_run):
    names = ["one", "tiger, Panthera tigris", "tiger shark", "2"]
    words = ("one", "0", "Tiger", "panthera tigris", "shark", "2")
    assert [data.find_class(w, names) for w in words] == [0, 0, 1, 1, 2, 3]
    with pytest.raises(ValueError, match="may be any of 1 tiger, Panthera tigris; 2 tiger shark"):
        data.find_class("tig", names)
    numbers = ["1", "10", "2", "3"]                            # as folders are sorted
    assert [data.find_class(w, numbers) for w in ("1", "2", "10")] == [0, 2, 1]
    with pytest.raises(ValueError, match="--classes 0: this checkpoint knows 1, 10, 2, 3"):
        data.find_class("0", numbers)
    one, two = "caf\u00e9", "cafe\u0301"                       # an e with its accent, or two signs
    assert data.find_class(one, ["tea", two]) == data.find_class(two, ["tea", one]) == 1
    done(sample, "--ckpt", own_run, *DRAW, "--classes", 3, 7, "--n", 5, "--out", own_run / "a.npz")
    assert read(own_run / "a.npz")[1] == [3, 7, 3, 7, 3]
    done(sample, "--ckpt", own_run / "ckpt.pt", *DRAW, "--classes", 3, 7, "--n", 6)
    assert Image.open(own_run / "sample.png").size == (3 * 52, 3 * 35), "3 a row, 3 x as large"


@slack
@every("refine", [[], ["--refine", "default", "--m", 30],
                   ["--refine", "shared", "--m", 30, "--batch_size", 4]])
def test_two_processes_draw_the_file_of_one(refine, own_run, run, tmp_path):
    flags = [*DRAW, "--n", 10, "--classes", 1, 2, 3, *refine, "--out"]
    two(tmp_path / "log", "sample", "--ckpt", own_run, *flags, tmp_path / "two.npz")
    done(sample, "--ckpt", run, *flags, tmp_path / "one.npz")
    (a, y), (b, z) = read(tmp_path / "one.npz"), read(tmp_path / "two.npz")
    assert np.abs(a - b).max() <= 1 and y == z, "other batches: fp32, then rounding"
    assert not list(tmp_path.glob("*.rank*"))


@every("argv, words", [
    ("--ckpt {tmp}/none.pt", "no checkpoint"), ("--ckpt {tmp}/cut.pt", "truncated"),
    ("--ckpt {tmp}/text.pt", "no readable checkpoint"), ("--ckpt {tmp}/foreign.pt", "lacks"),
    ("--ckpt {tmp}/plain.pt", "class_dropout=0 and has no null branch"),
    ("--classes zebra", "knows 0, 1"), ("--classes 10", "knows 0, 1"),
    ("--steps 0", "out of range"), ("--steps 1001", "out of range"),
    ("--temperature inf", "out of range"), ("--cfg_scale nan", "out of range"),
    ("--seed -1", "out of range"), ("--n 0", "out of range"), ("--n ten", "not a whole number"),
    ("--solver euler", "does not fit a head trained for 'eps'; choose one of ddpm"),
    ("--refine magic", "invalid choice"), ("--cfg_scal 2", "did you mean --cfg_scale"),
    ("--out {tmp}/x.jpg", ".png or .npz"), ("--out {tmp}/no/x.png", "a folder that can"),
    ("--out {tmp}/text.png", "--overwrite"), ("--device abacus", "cannot be used"),
    ("--classes 3 5 --n 1", "2 classes are asked for"),
    ("--vae {tmp}/text.pt", "model of pixels")])
def test_bad_input_to_sample_is_one_line_and_exit_code_2(argv, words, run, tmp_path):
    whole = (run / "ckpt.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.pt").write_text("neither"), (tmp_path / "text.png").write_text("nor")
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    changed(run, tmp_path / "plain.pt", lambda state: state["config"].update(class_dropout=0.0))
    argv = argv.format(tmp=tmp_path).split()
    refused(words, sample, *["--ckpt", run] * ("--ckpt" not in argv),
            *["--out", tmp_path / "new.png"] * ("--out" not in argv), *argv)
    assert not (tmp_path / "new.png").exists()


IDLE = {"coupled": "--coupled", "K": "--K 3", "eta": "--eta 1", "m": "--m 30",
        "data_dir": "--data_dir .", "order": "--order raster",
        "num_iter": "--num_iter 4",
        "cfg_schedule": "--cfg_scale 1 --cfg_schedule linear"}


@every("name, argv", [*IDLE.items(), ("K", "--refine gaussian --K 3"),
                      ("eta", "--refine gaussian --eta 1"), ("K", "--refine shared --K 3"),
                      ("coupled", "--refine shared --coupled"),
                      ("data_dir", "--refine gaussian --data_dir .")])
def test_a_flag_that_would_change_nothing_is_refused(name, argv, run, tmp_path):
    helps = sample.parse_args([])._helps.items()
    assert {k for k, text in helps if "with --refine" in (text or "")} <= set(IDLE)
    refused(f"--{name} would change nothing", sample, "--ckpt", run, *DRAW, "--n", 1, "--out",
            tmp_path / "x.png", *argv.split())


def test_a_folder_that_a_small_set_would_not_read_is_refused(tmp_path):
    np.savez(tmp_path / "s.npz", arr_0=np.zeros((20, 16, 16, 1), np.uint8))
    refused("--data_dir would change nothing", evaluate, "--samples", tmp_path / "s.npz",
            "--dataset", "digits", "--data_dir", tmp_path)


# ================================================================ train.py

def test_a_run_leaves_checkpoint_pictures_and_metrics_and_is_not_trained_again(own_run):
    record, = (json.loads(line) for line in (own_run / "metrics.jsonl").read_text().splitlines())
    assert record["step"] == 2 and np.isfinite(record["heldout_loss"])
    assert all(Image.open(own_run / f"{n}.png").size[0] > 100 for n in ("samples", "loss"))
    state, before = read_checkpoint(own_run), (own_run / "ckpt.pt").stat().st_mtime_ns
    assert state["data"]["class_names"] == [str(k) for k in range(10)]
    assert state["versions"]["torch"] == str(torch.__version__)
    assert "nothing to train" in fit(own_run)
    assert (own_run / "ckpt.pt").stat().st_mtime_ns == before


def test_two_and_two_steps_equal_four_bitwise(own_run, tmp_path):
    fit(tmp_path / "whole", steps=4)                           # dropout is on
    text = fit(own_run, "--threads", 1, steps=4)               # the result does not depend on it
    assert "resuming" in text and "at step 2 of 4" in text
    assert largest_difference(tmp_path / "whole", own_run) == 0
    logs = [[(r["step"], r["loss"], r["heldout_loss"]) for r in map(json.loads, (
        out / "metrics.jsonl").read_text().splitlines())] for out in (tmp_path / "whole", own_run)]
    assert logs[0] == logs[1] and len(logs[0]) == 2


def test_accumulation_two_processes_and_checkpointed_blocks_equal_one_plain_process(tmp_path):
    plain = dict(settings=["dropout=0"])                       # whose masks follow the parts
    fit(tmp_path / "a", **plain)
    fit(tmp_path / "b", "--accumulate", 4, "--checkpoint_blocks", **plain)
    two(tmp_path / "log", "train", "--out_dir", tmp_path / "c", *FAST, "--steps", 2, "--set",
        *SETTINGS, "dropout=0")
    # Adam divides by the gradient's size: 1e-5 of the rate a step is fp32's summation order
    assert largest_difference(tmp_path / "a", tmp_path / "b") < 2e-5
    assert largest_difference(tmp_path / "a", tmp_path / "c") < 2e-5
    assert "at step 2 of 3" in fit(tmp_path / "c", steps=3, **plain), "one resumes two"


def tells_of_step_3(file):
    real = train.train_step
    train.train_step = lambda step, *a: (step == 3 and file.write_text("now"), real(step, *a))[1]


@every("name", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_finishes_the_step_saves_and_exits_zero(name, tmp_path):
    log, told = tmp_path / "log", tmp_path / "told"
    p = start(log, "train", "--out_dir", tmp_path / "r", "--steps", 10 ** 5, "--eval_every",
              10 ** 5, *FAST[:2], before=functools.partial(tells_of_step_3, told))
    while not told.exists():
        time.sleep(0.05)
        assert p.is_alive(), log.read_text()
    os.kill(p.pid, name)
    p.join(120)
    assert p.exitcode == 0 and "stopped by a signal; saved" in log.read_text(), log.read_text()
    assert read_checkpoint(tmp_path / "r")["step"] > 0


def test_a_second_trainer_in_the_same_folder_is_refused_while_the_first_lives(own_run):
    before = (own_run / "ckpt.pt").read_bytes()
    first = lock(own_run)
    refused(f"another train.py, pid {os.getpid()} on", train, "--out_dir", own_run, *FAST)
    assert (own_run / "ckpt.pt").read_bytes() == before
    first.close()
    lock(own_run).close()


def dies_in_the_second_save():
    real = torch.save

    def save(state, f):
        if state["step"] == 0:
            return real(state, f)
        whole = io.BytesIO()
        real(state, whole)
        f.write(whole.getvalue()[:10 ** 6])
        f.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    torch.save = save


def test_a_kill_during_a_save_never_costs_the_previous_checkpoint(tmp_path):
    p = start(tmp_path / "log", "train", "--out_dir", tmp_path / "r", *FAST, "--steps", 2,
              before=dies_in_the_second_save)
    p.join(120)
    assert p.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert models.load_model(tmp_path / "r")[1]["step"] == 0


def test_a_full_disk_before_or_during_a_save_is_one_line_and_leaves_the_old_file(
        own_run, tmp_path, monkeypatch):
    def full(state, f):
        f.write(b"half")
        raise OSError(28, "No space left on device")

    files, again = sorted(own_run.iterdir()), [*FAST, "--steps", 4, "--set", *SETTINGS]
    monkeypatch.setattr(torch, "save", full)
    refused("step 4 could not be saved", train, "--out_dir", own_run, *again)
    assert models.load_model(own_run)[1]["step"] == 2 and sorted(own_run.iterdir()) == files
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2 ** 20}))
    refused("has 1.0 MiB free, but", train, "--out_dir", tmp_path / "o", *again)


@every("what, step, good", [("weights or held-out loss are not finite", 4, 2),
                            ("the loss is nan", 6, 4)])
def test_what_is_not_finite_stops_a_run_and_the_last_good_checkpoint_stays(
        what, step, good, own_run, monkeypatch):
    clip, real, calls = torch.nn.utils.clip_grad_norm_, train.train_step, []

    def poison(parameters, limit):                   # a gradient of step 4, which is then saved
        parameters = list(parameters)
        calls.append(clip(parameters, limit))
        if len(calls) == 2:
            parameters[0].grad.fill_(math.inf)

    if "loss is" in what:
        monkeypatch.setattr(train, "train_step", lambda step, *a: real(step, *a) * (
            math.nan if step >= 4 else 1))
    else:
        monkeypatch.setattr(train.nn.utils, "clip_grad_norm_", poison)
    code, _ = cli(train, "--out_dir", own_run, *FAST, "--steps", 8, "--set", *SETTINGS)
    assert f"{what} at about step {step}. Likely causes: a learning rate" in code, code
    assert f"Last good checkpoint: {own_run}/ckpt.pt at step {good}" in code
    assert models.load_model(own_run)[1]["step"] == good


@every("shape", [(64, 64), (192, 64), (64, 256)])
def test_muon_gives_every_direction_of_a_matrix_about_the_same_step(shape):
    g = randn(3, *shape) * torch.tensor([1e-6, 1, 1e6])[:, None, None]
    u, size, vt = torch.linalg.svd(g, full_matrices=False)
    got = u.mT @ orthogonal(g) @ vt.mT                   # diagonal: directions are kept
    values = got.diagonal(dim1=1, dim2=2)
    assert (got - torch.diag_embed(values)).abs().max() < 1e-4, "fp32"
    # a Gaussian square matrix is nearly singular: the smallest directions are not counted
    counted = values[size > 0.02 * size.norm(dim=1, keepdim=True)]
    assert len(counted) > 0.8 * values.numel() and 0.6 < counted.min() and counted.max() < 1.25


def test_muon_follows_its_formula_in_buffers_made_once_and_goes_on_bitwise_from_its_state():
    shapes = [(48, 16), (16, 16), (48, 16), (16, 40)]
    old, new = ([torch.nn.Parameter(randn(*s, seed=k)) for k, s in enumerate(shapes)] for _ in "ab")
    W, m = [p.detach().clone() for p in old], [torch.zeros(s) for s in shapes]
    muon, later = Muon(old, 0.02, 0.1), Muon(new, 0.02, 0.1)

    def step(optimizer, matrices, k):
        for j, p in enumerate(matrices):
            p.grad = randn(*p.shape, seed=100 * k + j)
        optimizer.step()

    def buffers():
        """{address: a copy of what is there}"""
        made = [z for _, *both in muon.stacks for z in both]
        return {z.data_ptr(): z.clone() for z in (*made, *(muon.state[p]["momentum"] for p in old))}

    step(later, new, 9)                              # which has buffers before it loads
    for k in range(3):
        before = buffers() if k else {}
        step(muon, old, k)
        assert not k or before.keys() == buffers().keys()
        assert not any(torch.equal(z, before[at]) for at, z in buffers().items() if k)
        for j, g in enumerate(p.grad for p in old):
            m[j] = m[j].lerp(g, 0.05)
            size = 10 * 0.02 * max(1, g.shape[0] / g.shape[1]) ** 0.5
            W[j] = W[j] * (1 - 0.02 * 0.1) - size * orthogonal(g.lerp(m[j], 0.95)[None])[0]
            assert (old[j] - W[j]).abs().max() < 1e-4, "fp32, other matmul shapes, five products"
    later.load_state_dict(copy.deepcopy(muon.state_dict()))
    for p, q in zip(new, old):
        p.data.copy_(q)
    step(muon, old, 3), step(later, new, 3)
    assert all(torch.equal(p, q) for p, q in zip(new, old))


@every("setting", ["optimizer=adamw", "optimizer=muon", "clip=0"])
def test_every_parameter_has_one_optimiser_and_moves_and_no_step_leaves_a_graph(setting):
    args = train.parse_args([*FAST, "--set", setting])
    m, dataset = tiny(token_dim=16), data.load("digits")
    optimizers, ema = train.make_optimizers(m, args), copy.deepcopy(m).requires_grad_(False)
    owned = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(map(id, owned)) == sorted(map(id, m.parameters()))
    before = [p.clone() for p in m.parameters()]
    loss = train.train_step(0, m, m, ema, optimizers, dataset, args, train.World("cpu"))
    still = [n for (n, p), b in zip(m.named_parameters(), before) if torch.equal(p, b)]
    assert not still and not loss.requires_grad
    assert all(not p.requires_grad and p.grad_fn is None for p in ema.parameters())


@every("more, words", [
    ("--lr 1", "lr 0.002 -> 1"), ("--model gpt-b", "model gpt-tiny -> gpt-b"),
    ("--dataset digits-tune", "dataset digits -> digits-tune"), ("--seed 1", "seed 0 -> 1")])
def test_resuming_with_other_flags_names_the_difference(more, words, own_run):
    refused(words, train, "--out_dir", own_run, *FAST, *more.split(), "--steps", 4, "--set",
            *SETTINGS)


@every("argv, words", [
    ("--steps many", "'many' is not a whole number"), ("--lr -1", "out of range"),
    ("--seed 4294967296", "out of range"), ("--global_bath 8", "did you mean --global_batch"),
    ("--dataset cifar", "invalid choice"), ("--model gpt-tny", "did you mean gpt-tiny"),
    ("--dataset folder", "needs --data_dir"), ("--dataset mnist", "needs --data_dir"),
    ("--size 20", "16 or 32"), ("--patch 3", "multiple of --patch"),
    ("--global_batch 10 --accumulate 4", "multiple of"), ("--device abacus", "cannot be used"),
    ("--device hpu", "--device hpu cannot be used"),
    ("--global_batch 99999999999", "out of range: 1 to 1048576"),
    ("--out_dir {tmp}/file", "cannot be written to (File exists)"),
    ("--out_dir {tmp}/file/x", "cannot be written to (Not a directory); choose another"),
    ("--compile", "--compile would change nothing"), ("--vae x", "--vae would change nothing"),
    ("--max_bad 0.5", "--max_bad would change nothing"),
    ("--data_dir .", "--data_dir would change nothing"),
    ("--cache_dir .", "--cache_dir would change nothing"),
    ("--set lerning=1", "no such setting"), ("--set ema_deca=1", "did you mean ema_decay"),
    ("--set clip=-1", "clip=-1.0 is out of range: 0 to"), ("--set ema_decay=nan", "out of range"),
    ("--set eval_images=0", "out of range: 1 to"), ("--set class_dropout=2", "at most 1"),
    ("--set dropout=much", "expected dropout=<float>"), ("--set rope=2", "0 or 1"),
    ("--set optimizer=sgd", "choose muon or adamw"), ("--set objective=flow", "choose one of eps"),
    ("--set grid=2", "grid=2 would change nothing: it follows from --dataset"),
    ("--set rope=1", "rope=True would change nothing: a model of kind ar"),
    ("--model cdm-tiny --set head_depth=3", "head_depth=3 would change nothing"),
    ("--set n_head=5", "divisible by n_head")])
def test_bad_input_to_train_is_one_line_and_exit_code_2(argv, words, tmp_path):
    (tmp_path / "file").write_text("x")
    refused(words, train, "--out_dir", tmp_path / "out", "--device", "cpu", "--steps", 0,
            *argv.format(tmp=tmp_path).split())
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_with_a_field_too_many_and_one_too_few_loads_as_it_was(run, tmp_path):
    def older(state):                                # such as T^-1 beside the model
        state["config"]["inverse"] = True
        del state["config"]["objective"]
        state["model"]["inverse.net"] = state["ema"]["inverse.net"] = torch.zeros(3)
    old, new = (models.load_model(p)[0] for p in (changed(run, tmp_path / "c.pt", older), run))
    assert old.cfg == new.cfg and old.diffloss.x0_bound == 1.0
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters()))


def test_a_gpu_that_is_not_there_is_one_line(run):
    refused("this torch sees no CUDA GPU", sample, "--ckpt", run, "--device", "cuda")


def first_moment(state, change):
    change(next(iter(state["optimizers"][0]["state"].values())))


@every("change, words", [
    (lambda s: s.update(records=[{"a": 1}]), "it lacks step, loss, heldout_loss"),
    (lambda s: s.update(records=5), "records = 5 is no list"),
    (lambda s: s.update(args=3), "args = 3 is no dict"), (lambda s: s.update(step=-5), "step = -5"),
    (lambda s: s["records"].append({"step": 9, "loss": 1.0, "heldout_loss": 1.0}), "beyond it"),
    (lambda s: s["data"].pop("n_train"), "it lacks n_train"),
    (lambda s: s["optimizers"].pop(), "holds 1 optimisers, this run has 2"),
    (lambda s: s["optimizers"][0]["state"].pop(1), "moments of AdamW are of other shapes"),
    (lambda s: s["optimizers"][1]["state"].pop(2), "moments of Muon are of other shapes"),
    (lambda s: first_moment(s, lambda z: z.pop("exp_avg_sq")), "of other shapes"),
    (lambda s: first_moment(s, lambda z: z.update(exp_avg=torch.ones(2, 2))), "of other shapes"),
    (lambda s: s["optimizers"][1]["state"].clear(), "moments of Muon are of other shapes"),
    (lambda s: s["data"].update(x0_bound=1e300), "x0_bound = 1e")])
def test_a_run_whose_contents_are_odd_is_refused_before_any_step(change, words, own_run):
    path = changed(own_run, own_run / "ckpt.pt", change)
    before = path.read_bytes()
    refused(words, train, "--out_dir", own_run, *FAST, "--steps", 4, "--set", *SETTINGS)
    assert path.read_bytes() == before


def test_a_run_without_a_step_gives_way_to_another(tmp_path):
    fit(tmp_path / "r", steps=0)
    text = done(train, "--out_dir", tmp_path / "r", *FAST[2:], "--global_batch", 8, "--steps", 2,
                "--set", *SETTINGS)
    assert "step 2:" in text
    refused("holds another run (global_batch 8 -> 16)", train, "--out_dir", tmp_path / "r", *FAST,
            "--steps", 4, "--set", *SETTINGS)


@every("change, words", [
    (lambda s: s["config"].update(n_embd=128), "its weights do not fit.*train again"),
    (lambda s: s["ema"].pop("norm.weight"), "its weights do not fit.*norm.weight"),
    (lambda s: s["ema"].update({"odd.weight": torch.zeros(1)}), "do not fit.*odd.weight"),
    (lambda s: s["ema"]["norm.weight"].fill_(math.nan), "norm.weight' is not finite.*older"),
    (lambda s: s.pop("ema"), "it lacks ema")])
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(change, words, run, tmp_path):
    with pytest.raises(ValueError, match=words) as error:
        models.load_model(changed(run, tmp_path / "c.pt", change))
    assert "\n" not in str(error.value)


# ================================================================ rules of the repository

def imports(name, top=True):
    """Modules that a file imports: at its top, or anywhere."""
    nodes, found = [ast.parse((ROOT / f"{name}.py").read_text())], set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
        elif not (top and isinstance(node, ast.FunctionDef)):
            nodes += ast.iter_child_nodes(node)
    return found


def test_the_core_imports_no_outer_file_at_its_top_and_has_no_cycle():
    assert not set().union(*map(imports, (*CORE, *TESTS))) & OUTER
    edges = {name: imports(name) & set(CORE) for name in CORE}
    list(graphlib.TopologicalSorter(edges).static_order())     # raises CycleError
    assert not set().union(*(edges[name] for name in (
        "diffloss", "ot_refine", "files", "command", "muon")))
    assert imports("ot_refine", top=False) <= {*sys.stdlib_module_names, "torch", "matplotlib"}


@every("argv, words", [("theory.py --claims theorem1 --n 9", "--n would change nothing"),
                       ("theory.py --claims gap --cdm out", "--cdm would change nothing"),
                       ("ot_refine.py --n 9", "unrecognized arguments: --n 9")])
def test_a_program_that_would_not_look_at_an_argument_does_nothing(argv, words, tmp_path):
    name, *rest = argv.split()
    ended = subprocess.run([sys.executable, ROOT / name, *rest], cwd=tmp_path, text=True,
                           capture_output=True, timeout=60)
    assert ended.returncode == 2 and words in ended.stderr and not list(tmp_path.rglob("*.png"))


def test_no_line_is_wider_than_100_columns_and_the_readme_has_at_most_200_of_120():
    wide = [f"{f.name}:{k}" for f in sorted(ROOT.glob("*.py"))
            for k, line in enumerate(f.read_text().splitlines(), 1) if len(line) > 100]
    readme = [len(line) for line in (ROOT / "README.md").read_text().splitlines()]
    assert not wide and len(readme) <= 200 and max(readme) <= 120, (wide, len(readme), max(readme))


def text(*names):
    return "\n".join((ROOT / n).read_text() for n in names if (ROOT / n).exists())


def test_the_choices_of_the_text_are_those_marked_in_the_code():
    code = text(*(f.name for f in ROOT.glob("*.py") if not f.name.startswith("test_")))
    table = re.split(r"^#+ Choices.*$", text("README.md", "RESULTS.md"), flags=re.M)[1]
    listed = re.findall(r"^\| `?(\w+)`? \|", table.split("\n## ")[0], re.M)
    assert sorted(listed) == sorted({"choice", *re.findall(r"CHOICE\((\w+)\)", code)})


def test_the_line_counts_of_the_reading_order_are_those_of_the_files_to_a_tenth():
    rows = re.findall(r"^\| ((?:\w+\.py(?:, )?)+) \| ([\d, ]+) \|", text("README.md"), re.M)
    said = {name: int(n) for names, counts in rows
            for name, n in zip(names.split(", "), counts.split(", "), strict=True)}
    assert {f"{name}.py" for name in CORE} <= set(said)
    lines = {name: text(name).count("\n") for name in said}
    assert all(abs(n / said[name] - 1) < 0.1 for name, n in lines.items()), lines


def test_every_command_of_the_text_is_understood():
    known = {"train": train.parse_args, "sample": sample.parse_args,
             "evaluate": lambda argv: sample.parse_args(evaluate.parse_args(argv)[1])}
    page = text("README.md", "RESULTS.md").replace("\\\n", " ")
    found = re.findall(r"\b(train|sample|evaluate)\.py( +-[^`\n]*)", page)
    assert len(found) >= 5
    for name, rest in found:
        argv = shlex.split(re.split(r"   |#|&&|\.\.\.|\|", rest.strip())[0])
        try:
            known[name](argv)
        except SystemExit:
            pytest.fail(f"{name}.py {shlex.join(argv)}")


# ================================================================ copies, whole and changed

def readme(number):
    """The indented block of an item of README.md's "Change one thing", as it stands there."""
    section = text("README.md").split("## Change one thing")[1].split("\n## ")[0]
    item = section.split(f"\n{number}. ")[1].split(f"\n{number + 1}. ")[0]
    return "".join(re.findall(r"^ {8}(.*\n)", item, re.M))


# what the items leave out
FLOW = '''
def euler(denoise, noise, steps, temperature=1.0, callback=None):
    x, ts = noise[0] * temperature, flow_steps(steps)
    for t, following in zip(ts, ts[1:] + [-1]):
        x0, _ = denoise(x, t)
        if callback:
            callback(t, x, x0)
        x = torch.lerp(x0, x, (following + 1) / (t + 1))
    return x


def flow_steps(steps):
    return [T_TRAIN * k // steps - 1 for k in range(steps, 0, -1)]


class Straight:
    """x_t = (1 - s) x + s eps at s = (t + 1) / 1000; the net's "eps" is the velocity eps - x."""

    def __init__(self):
        self.sigma = np.arange(1, T_TRAIN + 1) / T_TRAIN
        self.alpha, self.x0_from_xt, self.x0_from_eps = 1 - self.sigma, self.sigma ** 0, self.sigma


'''
MAP = '''
@dataclass
class Pot:
    """POT's plan, as it is (biased); a new condition moves as its nearest one does."""
    cloud: torch.Tensor
    to: torch.Tensor

    @classmethod
    def fit(cls, c, target, reg=0.2):
        import ot
        cost = sq_cost(c, target)
        plan = ot.sinkhorn([], [], cost, reg * cost.mean(), method="sinkhorn_log")
        return cls(c, plan @ target * len(c))

    def __call__(self, z):
        return z + (self.to - self.cloud)[sq_cost(z, self.cloud).argmin(1)]


MAPS["pot"] = Pot


'''
SLICED = '''
@dataclass
class Sliced:
    """Along each of 64 directions quantiles go to quantiles; a point moves by the mean of these."""
    axes: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor

    @classmethod
    def fit(cls, c, target, reg=None):
        axes = torch.randn(c.shape[1], 64, generator=torch.Generator().manual_seed(0)).to(c)
        axes, at = axes / axes.norm(dim=0), (torch.arange(len(c)).to(c) + 0.5) / len(c)
        return cls(axes, (c @ axes).sort(0)[0], (target @ axes).quantile(at, 0))

    def __call__(self, z):
        k = torch.searchsorted(self.x.T.contiguous(), (z @ self.axes).T.contiguous())
        shift = (self.y - self.x).gather(0, k.T.clamp_max(len(self.x) - 1))
        return z + len(self.axes) * (shift[:, None] * self.axes).mean(2)


MAPS["sliced"] = Sliced


'''
REGISTERS = '''        shape = (2, 1, cfg.n_head, 4, d // cfg.n_head)    # four registers
        self.registers = nn.Parameter(torch.randn(shape))
'''
CURVE = '''        if not refine:
            raise ValueError("a curve of divergences needs targets: add --refine default")
        from ot_refine import divergence, sq_cost
        import matplotlib.pyplot as plt
        r, curve = refine, []
''', '''        x = decode(draw(model, y, part.tolist(), seed, **options))
        plt.semilogy(curve)
        plt.savefig("divergence.png")
'''
LINES = {
    "maps": "# ---------------------------------------------------------------- the gradient flow",
    "noise": "# ---------------------------------------------------------------- noise",
    "drop": "        self.drop = nn.Dropout(cfg.dropout)\n\n    def forward(self, h, cos",
    "attention": "        a = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)\n",
    "draw": "        x = decode(draw(model, y, part.tolist(), seed, **options))\n"}


class Copy:
    """The core alone in a folder, to be edited; its modules stand in for ours in this test."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        folder.mkdir()
        for name in (*CORE, *TESTS):
            shutil.copy(ROOT / f"{name}.py", folder)
            monkeypatch.delitem(sys.modules, name, raising=False)
        (folder / "assets").symlink_to(ROOT / "assets")
        monkeypatch.syspath_prepend(folder)

    def edit(self, file, old, new):
        text = (self.folder / file).read_text()
        assert text.count(old) == 1, f"{file} has {text.count(old)} of {old!r}"
        (self.folder / file).write_text(text.replace(old, new))

    def add(self, file, before, snippet):
        self.edit(file, before, snippet + before)

    def __getattr__(self, module):
        return importlib.import_module(module)


@pytest.fixture
def copied(tmp_path, monkeypatch):
    return Copy(tmp_path / "copy", monkeypatch)


def test_without_the_outer_files_a_copy_trains_samples_measures_and_tests_itself(copied):
    program = ("import runpy, sys\nfor line in sys.argv[1:]:\n"
               "    sys.argv = line.split()\n    runpy.run_path(sys.argv[0], run_name='__main__')")
    how = "--steps 2 --refine default --m 30"
    picked = "teacher_forcing or kept_and_used_again or published_ones or the_plan_agrees"
    for argv in (["-c", program, "train.py --steps 2 --eval_every 2 --global_batch 16",
                  f"sample.py {how} --classes 3 --n 5", "sample.py --steps 2 --n 20 --out s.npz",
                  "evaluate.py --samples s.npz --dataset digits --features pixels",
                  f"evaluate.py --ckpt out --n 20 --features pixels --coupled {how}"],
                 ["-m", "pytest", "-q", "-k", picked, "-p", "no:cacheprovider"]):
        p = subprocess.run([sys.executable, *argv], cwd=copied.folder, text=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert p.returncode == 0, p.stdout
    assert "5 passed" in p.stdout
    p = subprocess.run([sys.executable, "train.py", "--model", "mar-tiny"], cwd=copied.folder,
                       text=True, capture_output=True, env={**os.environ, "PYTHONPATH": ""})
    assert p.returncode == 2 and p.stderr == ("train.py: error: No module named 'mar': a file of "
                                              "this project, or a package of requirements.txt, is "
                                              "missing\n")
    assert (copied.folder / "out" / "sample-default.png").exists()
    large = ("import command, types; command.set_threads(types.SimpleNamespace(num_params=6e6), "
             "'cpu')")
    p = subprocess.run([sys.executable, "-c", large], cwd=copied.folder, text=True,
                       capture_output=True, env={**os.environ, "PYTHONPATH": ""})
    assert p.returncode == 0, p.stderr



@slack
def test_change_a_data_set_from_a_table(copied, tmp_path):
    copied.add("data.py", "@dataclass\nclass Data:", readme(1))
    table = np.random.default_rng(0).integers(0, 255, (60, 65))
    table[:, 0] = np.arange(60) // 6
    np.savetxt(tmp_path / "a.csv", table, "%d", ",", header="label,pixel0")
    mine = ["--dataset", "csv", "--data_dir", tmp_path / "a.csv", "--out_dir", tmp_path / "r",
            *FAST, "--steps", 2]
    refused("cannot reshape array", copied.train, *mine)       # 28 x 28, unless --size says
    done(copied.train, *mine, "--size", 8)
    done(copied.sample, "--ckpt", tmp_path / "r", *REFINE, "default")
    assert Image.open(tmp_path / "r" / "sample-default.png").mode == "L"
    table[:, 0] %= 9
    np.savetxt(tmp_path / "a.csv", table, "%d", ",", header="label,pixel0")
    refused("class '9' of", copied.train, *mine, "--size", 8)


@slack
def test_change_flow_matching_with_an_euler_sampler(copied, tmp_path):
    copied.add("diffloss.py", LINES["noise"], FLOW + readme(2))
    done(copied.train, "--out_dir", tmp_path / "r", *FAST, "--steps", 2, "--set", "objective=flow")
    draw = [copied.sample, "--ckpt", tmp_path / "r", *REFINE, "default", "--solver"]
    refused("ddpm does not fit a head trained for 'flow'; choose one of euler", *draw, "ddpm")
    done(*draw, "euler")
    # N(MEAN, STD^2) again: the exact velocity of x_t = (1 - s) x + s eps
    s = lambda t: (t + 1) / 1000
    x0 = lambda x, t: MEAN + (1 - s(t)) * STD ** 2 * (x - (1 - s(t)) * MEAN) / (
        ((1 - s(t)) * STD) ** 2 + s(t) ** 2)
    x = copied.diffloss.euler(lambda x, t: (x0(x, t), None), randn(1, 20_000, 2), 100)
    assert (x.mean(0) - MEAN).abs().max() < 0.04 and (x.std(0) / STD - 1).abs().max() < 0.04


@slack
@every("name, snippet", [("pot", MAP), ("sliced", SLICED)])
def test_change_a_map_by_pot_or_sliced(name, snippet, copied, own_run):
    for line in readme(3).splitlines() if name == "pot" else ():        # abridged there
        assert re.split(" \\.\\.\\.|  +#", line)[0] in snippet, line
    copied.add("ot_refine.py", LINES["maps"], snippet)
    copied.add("ot_refine.py", LINES["maps"], 'MAPS["half"] = dataclass(type("Half", (), {}))\n')
    refused("the map 'half' must be one of MAPS", copied.sample, "--ckpt", own_run, *REFINE, "half")
    done(copied.sample, "--ckpt", own_run, *REFINE, name)
    x, y = clouds(400, 300)
    T = copied.ot_refine.MAPS[name].fit(x, y, 0.05)
    assert R.divergence(T(x), y, 1.0) < 0.2 * R.divergence(x, y, 1.0)


@slack
def test_change_the_ideal_distribution(copied, own_run):
    done(sample, "--ckpt", own_run, *REFINE, "default")
    change, = re.findall("say `(x = .*)`", text("README.md"))
    copied.add("sample.py", "    y = torch.full((len(x),), k, device=model.device)\n",
               f"    from torch import randn_like\n    {change}\n")
    said = done(copied.sample, "--ckpt", own_run, *REFINE, "default")
    assert "made for another code" in said, "targets that were kept are not used"


def test_targets_are_never_the_images_that_they_are_measured_against(own_run, monkeypatch):
    def held(dataset, *_):
        images = dataset.heldout
        return lambda k, m: patchify(images.batch(images.of_class(k, m))[0], dataset.patch)
    monkeypatch.setattr(sample, "tokens_of", held)
    refused("held-out", evaluate, "--ckpt", own_run, "--n", 20, "--features", "pixels", *DRAW,
            "--refine", "default", "--m", 30)


@slack
def test_change_register_tokens(copied, own_run, tmp_path):
    copied.add("model.py", LINES["drop"], REGISTERS)
    copied.edit("model.py", LINES["attention"], indent(readme(5), " " * 8))
    done(copied.train, "--out_dir", tmp_path / "r", *FAST, "--steps", 2)
    done(copied.sample, "--ckpt", tmp_path / "r", *REFINE, "default")
    refused("its weights do not fit", copied.sample, "--ckpt", own_run, *REFINE, "default")
    m, met = copied.model.load_model(tmp_path / "r")[0], []
    x = m.generate(torch.tensor([1, 4]), ImageNoise(0, range(2)), steps=2,
                   on_condition=lambda i, c, refined: met.append(c))
    assert relative(torch.stack(met, 1), m.conditions(x, torch.tensor([1, 4]))) < 1e-5, "fp32"


@slack
def test_change_a_plotted_divergence_per_ar_step(copied, own_run, monkeypatch):
    monkeypatch.chdir(own_run)
    copied.edit("sample.py", LINES["draw"], CURVE[0] + indent(readme(6), " " * 8) + CURVE[1])
    refused("add --refine default", copied.sample, "--ckpt", own_run, *DRAW, "--n", 2)
    done(copied.sample, "--ckpt", own_run, *REFINE, "default")
    assert Image.open(own_run / "divergence.png").size[0] > 100
