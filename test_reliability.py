"""Nothing lost, nothing silent: `pytest test_reliability.py`.

Kills at random and at the worst places, disks that fill, signals, damaged and foreign files. With
RELIABILITY=full in the environment the same tests make hundreds of trials, in about ten minutes on
two cores; the seeds are fixed, a failure names its trial.
"""
import functools
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import command
import evaluate
import inception
import files
import latents
import sample
import train
import vae
from runs import read_checkpoint
from test_core import every
from test_programs import (DRAW, FAST, REFINE, SETTINGS, cli, done, fit,
                           largest_difference, own_run, refused, run, slack, start)

FULL = os.environ.get("RELIABILITY") == "full"
assert run and own_run                                         # fixtures, used by name


# ================================================================ kills

RUN = [*FAST[:2], "--device", "cpu", "--steps", 9, "--eval_every", 3, "--set", *SETTINGS]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody killed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    finish(out, out.with_name("log"))
    return out


def finish(out, log):
    """Train to the end in a process of its own, whose products nothing that ran before has set."""
    p = start(log, "train", "--out_dir", out, *RUN)
    p.join(120)
    assert p.exitcode == 0, log.read_text()


def dies_at(call, count, late):
    """Kills its process at a call of os.replace or os.fsync, before it or after."""
    real, calls = getattr(os, call), []

    def counted(*args):
        calls.append(args)
        if len(calls) == count and not late:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*args)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
    setattr(os, call, counted)


def records(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: r[k] for k in ("step", "loss", "heldout_loss")} for r in map(json.loads, lines)]


def check_killed(out, trial):
    """A killed run's folder: the checkpoint is whole, the records are its own or lack the last."""
    if (out / "ckpt.pt").exists():
        state = read_checkpoint(out)
        steps = [r["step"] for r in state["records"]]
        assert steps == list(range(3, state["step"] + 1, 3)), trial
        if (out / "metrics.jsonl").exists():
            assert [r["step"] for r in records(out)] in (steps, steps[:-1]), trial
    for name in ("ckpt.pt", "metrics.jsonl", "loss.png", "samples.png"):
        assert len(list(out.glob(f"{name}.*.tmp"))) <= 1, "debris of the last kill alone"


def check_finished(out, whole):
    assert largest_difference(out, whole) == 0 and records(out) == records(whole)
    assert not list(out.glob("*.tmp"))


def test_a_run_killed_at_any_moment_goes_on_bitwise_and_its_records_agree(whole, tmp_path):
    rng, out, log, ended = random.Random(0), tmp_path / "r", tmp_path / "log", 0
    for trial in range(1, 81 if FULL else 3):
        log.unlink(missing_ok=True)
        p = start(log, "train", "--out_dir", out, *RUN)
        while trial % 4 and p.is_alive() and not (log.exists() and log.read_text()):
            time.sleep(0.01)                                   # one of four dies in its start
        p.join(rng.uniform(0.0, 1.5))
        p.kill()
        p.join()
        assert p.exitcode in (0, -signal.SIGKILL), log.read_text()
        check_killed(out, trial)
        if p.exitcode == 0:                                    # it was faster than the kill
            check_finished(out, whole)
            shutil.rmtree(out)
            ended += 1
    finish(out, log)
    check_finished(out, whole)
    if FULL:
        print(f"{trial} random kills, of which {ended} came when all was done")


AIMED = [("fsync", 3, False), ("replace", 2, True), ("replace", 3, False), ("replace", 2, False),
         ("fsync", 2, True)]


def test_a_run_killed_at_the_worst_moments_of_a_save_goes_on_bitwise(whole, tmp_path):
    out, log = tmp_path / "r", tmp_path / "log"
    for trial, at in enumerate(AIMED * (4 if FULL else 1)):
        p = start(log, "train", "--out_dir", out, *RUN, before=functools.partial(dies_at, *at))
        p.join(120)
        assert p.exitcode in (0, -signal.SIGKILL), log.read_text()
        check_killed(out, (trial, at))
        if p.exitcode == 0:
            check_finished(out, whole)
            shutil.rmtree(out)
    finish(out, log)
    check_finished(out, whole)


def test_what_killed_writers_left_is_removed_and_what_living_ones_write_is_not(tmp_path):
    path, host = tmp_path / "a[1].json", os.uname().nodename
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = [f"{path}.{host}-{dead.pid}.tmp", f"{path}.elsewhere-1.tmp", f"{path}.{host}-1.tmp"]
    for name in names:
        Path(name).write_text("half")
    files.write_json(path, {})
    assert [Path(name).exists() for name in names] == [False, True, True]
    files.sweep(path, alone=True)
    assert [f.name for f in tmp_path.iterdir()] == ["a[1].json"]


def test_a_symbolic_link_keeps_pointing_where_the_file_is(own_run, tmp_path):
    (own_run / "ckpt.pt").rename(tmp_path / "elsewhere.pt")
    (own_run / "ckpt.pt").symlink_to(tmp_path / "elsewhere.pt")
    fit(own_run, steps=4)
    assert (own_run / "ckpt.pt").is_symlink()
    assert read_checkpoint(tmp_path / "elsewhere.pt")["step"] == 4


# ================================================================ disks that fill

class Full(io.FileIO):
    """A file on a disk that has `room` bytes left."""
    room = 0

    def write(self, text):
        if len(text) > Full.room:
            raise OSError(28, "No space left on device")
        Full.room -= len(text)
        return super().write(text)


def limited(part):
    """open() that gives files of such a name little room to be written."""
    return lambda path, mode="r", **options: (
        Full(path, mode) if mode == "wb" and part in str(path) else open(path, mode, **options))


def commands(run, folder):
    """{what it writes: (the command, the file that is there before)}"""
    ckpt = ["--ckpt", run, *DRAW, "--n", 12]
    return {"checkpoint": ([train, "--out_dir", run, *FAST, "--steps", 4, "--set", *SETTINGS],
                           run / "ckpt.pt"),
            "npz": ([sample, *ckpt, "--overwrite", "--out", folder / "a.npz"], folder / "a.npz"),
            "png": ([sample, *ckpt, "--overwrite", "--out", folder / "a.png"], folder / "a.png"),
            "json": ([evaluate, *ckpt, "--features", "pixels", "--json", folder / "a.json"],
                     folder / "a.json")}


@every("what", ["checkpoint", "npz", "png", "json"])
def test_a_full_disk_is_one_line_that_names_the_file_and_the_old_file_stays(
        what, own_run, tmp_path, monkeypatch):
    argv, file = commands(own_run, tmp_path)[what]
    if what != "checkpoint":
        file.write_bytes(b"old")
    old, names = file.read_bytes(), {*tmp_path.rglob("*")}
    monkeypatch.setattr(files, "open", limited(""), raising=False)
    for room in (0, 300) + (10 ** 6,) * (what == "checkpoint"):
        Full.room = room
        first = file.with_name("metrics.jsonl") if what == "checkpoint" and room < 300 else file
        refused(f"{first} cannot be written (No space left on device)", *argv)
        assert file.read_bytes() == old and {*tmp_path.rglob("*")} == names, room
    if what == "checkpoint":
        Full.room = 10 ** 6
        refused("; the last good checkpoint is that of step 2", *argv)


@slack
def test_refinement_works_on_a_full_disk_and_says_that_it_is_not_kept(own_run, monkeypatch):
    done(sample, "--ckpt", own_run, *REFINE, "default", "--out", own_run / "a.npz")
    shutil.rmtree(own_run / "refine")
    monkeypatch.setattr(files, "open", limited("/refine/"), raising=False)
    Full.room = 1000
    text = done(sample, "--ckpt", own_run, *REFINE, "default", "--out", own_run / "b.npz")
    assert text.count("is not kept") == 1 and "No space left" in text
    a, b = (files.read_npz(own_run / f"{name}.npz")["arr_0"] for name in "ab")
    assert np.array_equal(a, b) and not list((own_run / "refine").iterdir())


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 24 MiB; skips where this machine does not let us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True)
    if not mounted or mounted.returncode:
        pytest.skip("this machine lets us mount no tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_real_disk_that_fills_costs_no_checkpoint_and_holds_no_debris(small_disk):
    rng, out, ended = random.Random(0), small_disk / "r", []
    done(train, "--out_dir", out, *RUN)
    kept = {f.name: f.read_bytes() for f in out.iterdir()}
    for trial in range(60 if FULL else 2):
        (small_disk / "filler").write_bytes(b"")
        free = shutil.disk_usage(small_disk).free
        leave = 0 if trial == 0 else int(rng.uniform(0, 16) * 2 ** 20)
        (small_disk / "filler").write_bytes(bytes(max(0, free - leave)))
        code, text = cli(train, "--out_dir", out, *RUN[:5], 12, *RUN[6:])
        assert "Traceback" not in text and not list(small_disk.rglob("*.tmp")), (leave, text)
        assert code == 0 or code == 2 and text.count(": error: ") == 1, (leave, code, text)
        assert read_checkpoint(out)["step"] == (12 if "step 12:" in text else 9), leave
        ended.append(code)
        (small_disk / "filler").unlink()
        for name, value in kept.items():
            (out / name).write_bytes(value)
    assert ended[0] == 2
    if FULL:
        print(f"{len(ended)} fills, {ended.count(2)} of them too full")


@every("module, flag, value, words", [
    (sample, "--out", "{tmp}/no/a.npz", "a folder that can be written to (No such file"),
    (sample, "--out", "{tmp}/file/a.npz", "a folder that can be written to (Not a dir"),
    (sample, "--out", "{tmp}/folder.npz", "is a folder"),
    (evaluate, "--json", "{tmp}/no/a.json", "a folder that can be written to (No such file"),
    (evaluate, "--json", "{tmp}", "is a folder")])
def test_where_output_will_go_is_checked_before_the_work(module, flag, value, words, run, tmp_path,
                                                         monkeypatch):
    monkeypatch.setattr(sample, "draw", None)                  # work would be a TypeError
    (tmp_path / "file").write_text(""), (tmp_path / "folder.npz").mkdir()
    refused(words, module, "--ckpt", run, *DRAW, flag, value.format(tmp=tmp_path))


# ================================================================ signals, and the terminal

def waits(file, module, name):
    """A function of a module tells of its call in a file, and takes for ever."""
    def wait(*args, **options):
        file.write_text("now")
        for _ in range(6000):          # not one long sleep: another thread may take the signal
            time.sleep(0.1)
    setattr(sys.modules[module], name, wait)


def told(file, p, log):
    while not file.exists():
        time.sleep(0.02)
        assert p.is_alive(), log.read_text()


@every("module, at, name", [
    ("train", ("data", "load"), signal.SIGTERM), ("train", ("train", "build"), signal.SIGHUP),
    ("train", ("train", "Folder"), signal.SIGINT), ("sample", ("sample", "draw"), signal.SIGINT),
    ("evaluate", ("evaluate", "Judge"), signal.SIGTERM)])
def test_a_signal_with_nothing_to_save_ends_a_program_with_one_line(
        module, at, name, run, tmp_path):
    log, file, out = tmp_path / "log", tmp_path / "told", tmp_path / "out.npz"
    argv = {"train": ["--out_dir", tmp_path / "r", *RUN],
            "sample": ["--ckpt", run, *DRAW, "--out", out],
            "evaluate": ["--ckpt", run, "--n", 20, "--features", "pixels", *DRAW]}[module]
    p = start(log, module, *argv, before=functools.partial(waits, file, *at))
    told(file, p, log)
    os.kill(p.pid, name)
    p.join(20)
    last = log.read_text().splitlines()[-1]
    assert p.exitcode == 128 + name and last == f"{module}.py: stopped by {name.name}", last
    assert "Traceback" not in log.read_text() and not out.exists()


@every("name", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_the_libraries_are_imported_is_one_line(name, tmp_path):
    told = tmp_path / "told"
    (tmp_path / "numpy.py").write_text(f"import time; open({str(told)!r}, 'w'); time.sleep(60)")
    usual = lambda: [signal.signal(s, signal.SIG_DFL) for s in (signal.SIGTERM, signal.SIGHUP)] + [
        signal.signal(signal.SIGINT, signal.default_int_handler)]
    p = subprocess.Popen([sys.executable, train.__file__], cwd=tmp_path, preexec_fn=usual,
                         env=os.environ | {"PYTHONPATH": str(tmp_path)}, stderr=subprocess.PIPE)
    while not told.exists():
        time.sleep(0.02)
        assert p.poll() is None
    p.send_signal(name)
    said = p.communicate(timeout=20)[1].decode()
    assert (p.returncode, said) == (128 + name, f"train.py: stopped by {name.name}\n")


def test_a_signal_that_a_library_swallows_ends_a_program_all_the_same(tmp_path):
    code = """import command, os, signal, time
command.PATIENCE = 0.3
def main():
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(60)
    except BaseException:
        time.sleep(60)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
command.run(main)"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30,
                           cwd=Path(train.__file__).parent)
    assert ended.returncode == 128 + signal.SIGHUP and ended.stderr == "-c: stopped by SIGHUP\n"


@every("closed", ["2>&-", ">&-", ">&- 2>&-"])
def test_a_program_whose_output_is_closed_works_on(closed, run, tmp_path):
    argv = ["sample.py", "--ckpt", run, *DRAW, "--n", 2, "--out", tmp_path / "out.png"]
    line = f"{sys.executable} {' '.join(map(str, argv))} {closed}"
    ended = subprocess.run(line, shell=True, cwd=Path(train.__file__).parent, timeout=60)
    assert ended.returncode == 0 and (tmp_path / "out.png").exists()


def slow_steps(file, seconds=0.2):
    real = train.train_step

    def step(number, *args):
        if number == 3:
            file.write_text("now")
        time.sleep(seconds)
        return real(number, *args)
    train.train_step = step


def test_two_processes_look_for_signals_every_second(tmp_path):
    log, file = tmp_path / "log", tmp_path / "told"
    argv = ["--out_dir", tmp_path / "r", *FAST[:2], "--device", "cpu", "--steps", 10 ** 4,
            "--eval_every", 10 ** 4, "--set", *SETTINGS]
    port = free_port()
    both = [start(log, "train", *argv, rank=r, world=2, port=port,
                  before=functools.partial(slow_steps, file)) for r in (0, 1)]
    told(file, both[0], log)
    began = time.time()
    os.kill(both[1].pid, signal.SIGTERM)                       # to one of them: both stop
    for p in both:
        p.join(30)
    # 20 steps, as often as it was before, take 4 s; a second, a step and the save, less than 3
    assert [p.exitcode for p in both] == [0, 0] and time.time() - began < 3.5, log.read_text()
    assert 3 < read_checkpoint(tmp_path / "r")["step"] < 20


def free_port():
    import socket
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def under_nohup(file):
    """SIGHUP is ignored, the reader of the output is gone, as after `nohup train.py | head -0`."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    slow_steps(file, 0.02)


def test_training_goes_on_when_its_reader_is_gone_and_a_hangup_is_to_be_ignored(tmp_path):
    log, file, out = tmp_path / "log", tmp_path / "told", tmp_path / "r"
    p = start(log, "train", "--out_dir", out, *RUN, before=functools.partial(under_nohup, file))
    told(file, p, log)
    os.kill(p.pid, signal.SIGHUP)
    p.join(60)
    assert p.exitcode == 0 and read_checkpoint(out)["step"] == 9
    assert (out / "samples.png").exists() and log.read_text() == ""


def waits_two_seconds():
    command.timedelta = lambda minutes: timedelta(seconds=minutes)


def test_a_process_whose_partner_never_comes_says_so(tmp_path):
    log = tmp_path / "log"
    p = start(log, "train", "--out_dir", tmp_path / "r", *RUN, world=2, port=free_port(),
              before=waits_two_seconds)
    p.join(60)
    said = log.read_text()
    assert p.exitcode == 2 and "another process of this run ended, or did not answer" in said, said
    assert "Traceback" not in said


def takes_the_lock_late(newer):
    real = train.lock

    def lock(out):
        time.sleep(1.5)                                        # the run before is just ending
        shutil.copy(newer / "ckpt.pt", out / "ckpt.pt")
        return real(out)
    train.lock = lock


def test_processes_go_on_from_one_checkpoint_though_it_is_replaced_meanwhile(whole, tmp_path):
    log, out, port = tmp_path / "log", tmp_path / "r", free_port()
    done(train, "--out_dir", out, *RUN[:5], 3, *RUN[6:])
    late = functools.partial(takes_the_lock_late, whole)
    both = [start(log, "train", "--out_dir", out, *RUN[:5], 12, *RUN[6:], rank=r, world=2,
                  port=port, before=late if r == 0 else None) for r in (0, 1)]
    for p in both:
        p.join(40)
    # before, the second went on from step 3 and both waited for each other for ever
    assert [p.exitcode for p in both] == [0, 0], log.read_text()


@every("module, argv, words", [
    (train, "--device meta", "--device meta cannot be used"),
    (sample, "--device meta", "--device meta cannot be used"),
    (train, "--set n_embd=1048576", "out of memory: "),
    (train, "--set n_head=0", "n_head=0 is out of range"),
    (train, "--threads 2000", "out of range"),
    (sample, "--n 100000000000000", "out of range: at most 2147483647"),
    (sample, "--cfg_scale 1e38", "out of range"),
    (train, "--seed 99999999999999999999", "out of range")])
def test_a_number_too_large_and_a_device_without_numbers_are_one_line(module, argv, words, run,
                                                                       tmp_path):
    own = {train: ["--out_dir", tmp_path / "r"],
           sample: ["--ckpt", run, "--out", tmp_path / "a.npz"]}
    refused(words, module, *own[module], *argv.split())


def test_a_clock_that_stands_still_divides_nothing_by_zero(own_run, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    fit(own_run, steps=4)
    done(sample, "--ckpt", own_run, *DRAW, "--n", 1)


def speaks_ascii():
    sys.stdout.reconfigure(encoding="ascii")


def test_a_name_that_the_terminal_cannot_show_is_escaped(tmp_path):
    p = start(tmp_path / "log", "train", "--out_dir", tmp_path / "Größe", *RUN[:5], 0,
              before=speaks_ascii)
    p.join(60)
    assert p.exitcode == 0 and r"Gr\xf6\xdfe/ckpt.pt" in (tmp_path / "log").read_text()


# ================================================================ damaged and foreign files

def save_state(path, state):
    torch.save(state, path)
    return path


def safetensors(path, state):
    header, raw = {}, b""
    for name, v in state.items():
        header[name] = {"dtype": "F32", "shape": list(v.shape),
                        "data_offsets": [len(raw), len(raw) + 4 * v.numel()]}
        raw += v.numpy().tobytes()
    return safetensors_of(path, [header, raw])


def safetensors_of(path, parts):
    header, raw = parts
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw)
    return path


def open_run(path):
    """What sample.py does with a checkpoint before it draws."""
    return sample.setup(sample.parse_args(["--ckpt", str(path), "--device", "cpu"]))


def opened_cache(root):
    train_set, heldout, names, _ = latents.read_cache(root, {"size": 4})
    return torch.cat([part.batch(range(len(part)), (0, 0))[0] for part in (train_set, heldout)])


SMALL_VAE = dict(ch=32, ch_mult=(1, 1), z_channels=4)
NOTHING = torch.zeros(1).expand(10 ** 12)                      # 4 TB, if anyone looked at it
ODD = [None, -1, 0, 10 ** 12, 2 ** 63, 1e300, math.nan, "x", "", [], {}, {1: 2}, [[]], True, b"x",
       torch.tensor(math.nan), torch.zeros(3), torch.zeros(2, 2).to_sparse(),
       torch.empty(3, device="meta"), NOTHING, {"a": {"b": None}}]


def nodes(value, way=()):
    """The ways to all values in nested dicts and lists."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(
        value, list) else ()
    for key in keys:
        yield (*way, key)
        yield from nodes(value[key], (*way, key))


def changed_value(value, rng, odd):
    """The same with one node replaced, removed, or called by a number."""
    value = json.loads(value) if isinstance(value, str) else _copy(value)
    # every level alike, not every node: most are far down
    ways = list(nodes(value))
    depth = rng.choice(sorted({len(way) for way in ways}))
    *way, key = rng.choice([way for way in ways if len(way) == depth])
    place = functools.reduce(lambda v, k: v[k], way, value)
    how = rng.choice(["replace"] * 4 + ["remove", "rename"])
    if how == "replace":
        place[key] = rng.choice(odd)
    else:
        old = place.pop(key)
        if how == "rename" and isinstance(place, dict):
            place[rng.choice([7, "x"] if odd is ODD else ["x"])] = old
    return value, (how, *way, key)


def _copy(value):
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, (list, tuple)) else value


def changed_bytes(raw, rng):
    """The same with a flipped bit, cut, grown, with a hole, or with a part twice."""
    raw, how = bytearray(raw), rng.choice(["flip", "flip", "flip", "cut", "grow", "hole", "twice"])
    at, n = rng.randrange(len(raw)), rng.randrange(1, 200)
    if how == "flip":
        raw[at] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del raw[at:]
    elif how == "grow":
        raw += bytes(n)
    elif how == "hole":
        raw[at:at + n] = bytes(len(raw[at:at + n]))
    else:
        raw[at:at] = raw[at:at + n]
    return bytes(raw), (how, at)


@pytest.fixture(scope="module")
def samples(run, tmp_path_factory):
    """A file of every kind that the programs read."""
    root, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    state = torch.load(run / "ckpt.pt", weights_only=True)
    save_state(root / "checkpoint.pt", state)
    torch.save(state, root / "old.pt", _use_new_zipfile_serialization=False)
    save_state(root / "vae.ckpt", {"model": vae.KL16(**SMALL_VAE).state_dict()})
    safetensors(root / "x.safetensors", {"a": torch.randn(3, 4), "b": torch.ones(5)})
    images = rng.integers(0, 255, (20, 4, 4, 1), dtype=np.uint8)
    np.savez_compressed(root / "images.npz", arr_0=images, arr_1=np.arange(20) % 3)
    x = rng.normal(size=(50, 5))
    np.savez(root / "ref.npz", mu=x.mean(0), sigma=np.cov(x.T))
    cache = root / "cache"
    paths = [(Path(str(k)), k % 2, int(k > 7)) for k in range(10)]
    for path, _, _ in paths:
        (root / path).write_bytes(b"")
    read = lambda path: images.repeat(3, -1)[int(str(path))]
    latents.build(cache, paths, ["cat", "dog"], read, vae.KL16(**SMALL_VAE), {"size": 4})
    return root


KINDS = {"checkpoint.pt": open_run, "old.pt": open_run, "vae.ckpt": vae.load_kl16,
         "x.safetensors": files.read_safetensors,
         "images.npz": inception.read_reference, "ref.npz": inception.read_reference,
         **{f"cache/{name}": lambda path: opened_cache(path.parent)
            for name in ("manifest.json", "index.npy", "00000.npy")},
         "cache/00000.json": lambda path: files.read_json(path, **latents.NOTE)}


def trial(read, path, where):
    """True if the file loads, False if one line refuses it; anything else is a failure."""
    began = time.time()
    try:
        read(path)
        return True
    except ValueError as error:
        text = str(error)
        known = path.name in text or path.parent.name in text
        assert "\n" not in text and known and len(text) < 700, (where, text)
        return False
    except BaseException as error:
        raise AssertionError(f"{path.name} {where}: {type(error).__name__}: {error}") from error
    finally:
        assert time.time() - began < 20, where


def copy_of(samples, kind, tmp_path):
    if "cache" in kind:
        shutil.copytree(samples / "cache", tmp_path / "cache")
    else:
        shutil.copy(samples / kind, tmp_path)
    return tmp_path / kind


@every("kind", KINDS)
def test_a_file_with_damaged_bytes_loads_as_it_was_or_is_refused_in_one_line(
        kind, samples, tmp_path):
    path, rng, loads = copy_of(samples, kind, tmp_path), random.Random(kind), 0
    whole, checked = path.read_bytes(), kind in ("checkpoint.pt", "vae.ckpt", "images.npz",
                                                 "ref.npz", "cache/00000.npy")
    values = lambda: _values(KINDS[kind](path))
    want = values() if checked else None
    for k in range(200 if FULL else 12):
        raw, where = changed_bytes(whole, rng)
        path.write_bytes(raw)
        if trial(KINDS[kind], path, where):
            loads += 1
            if checked:                                        # it met padding, a date, a comment
                same = all(np.array_equal(a, b) for a, b in zip(values(), want, strict=True))
                assert same, f"{where}: other numbers load"
    path.write_bytes(whole)
    assert trial(KINDS[kind], path, "whole")
    if FULL:
        print(f"{kind}: {k + 1} damaged, {loads} load as they were" if checked else
              f"{kind}: {k + 1} damaged, {loads} load")


def _values(found):
    if isinstance(found, SimpleNamespace):                     # a run
        found = files.tensors(found.state)
    if isinstance(found, torch.nn.Module):
        found = list(found.state_dict().values())
    found = [found] if torch.is_tensor(found) else found
    flat = [z for v in found if v is not None for z in (v if isinstance(v, tuple) else (v,))]
    return [z.numpy().copy() if torch.is_tensor(z) else np.array(z) for z in flat]


def covariance(change):
    sigma = np.diag([3.0, 1.0, 1.0])
    change(sigma)
    return {"mu": np.zeros(3), "sigma": sigma}


FOREIGN = {
    "an indefinite sigma": (covariance(lambda s: s.__setitem__((2, 2), -0.1)), "no covariance"),
    "an asymmetric sigma": (covariance(lambda s: s.__setitem__((0, 2), 0.1)), "no covariance"),
    "a huge sigma": (covariance(lambda s: s.__setitem__((0, 0), 1e300)), "finite"),
    "words": ({"mu": np.array(["a"]), "sigma": np.array([["b"]])}, "expected numbers"),
    "a negative label": ({"arr_0": np.zeros((2, 4, 4, 1), np.uint8), "arr_1": np.array(
        [0, -1])}, "class numbers from 0 up")}


@every("what", FOREIGN)
def test_numbers_that_no_reference_or_samples_can_have_are_refused(what, tmp_path):
    arrays, words = FOREIGN[what]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=words):
        inception.read_reference(tmp_path / "a.npz")


@slack
@every("name", ["axes.pt", "targets-3.pt", "maps-3.pt"])
def test_a_flipped_bit_in_a_kept_refinement_is_said_and_computed_anew(name, own_run):
    done(sample, "--ckpt", own_run, *REFINE, "default", "--out", own_run / "a.npz")
    file = own_run / "refine" / name
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 4
    file.write_bytes(raw)
    text = done(sample, "--ckpt", own_run, *REFINE, "default", "--out", own_run / "b.npz")
    assert f"the {name.split('-')[0].removesuffix('.pt')} in" in text and "checksum" in text
    a, b = (files.read_npz(own_run / f"{n}.npz")["arr_0"] for n in "ab")
    assert np.array_equal(a, b)


@slack
@every("name", ["axes", "targets-3", "maps-3"])
@every("value", [None, "x", {}, torch.zeros(3), {0: [("no map", {})]}])
def test_a_foreign_value_in_a_kept_refinement_is_said_and_computed_anew(name, value, refined):
    file = refined / "refine" / f"{name}.pt"
    whole = file.read_bytes()
    save_state(file, torch.load(file, weights_only=True) | {"value": value})
    text = done(sample, "--ckpt", refined, *REFINE, "default", "--out", refined / "b.npz")
    assert f"the {name.split('-')[0]} in" in text and file.read_bytes() == whole
    a, b = (files.read_npz(refined / f"{n}.npz")["arr_0"] for n in "ab")
    assert np.array_equal(a, b)


@pytest.fixture(scope="module")
def refined(run, tmp_path_factory):
    """A run whose refinement of one class is kept, and images of it in a.npz."""
    out = shutil.copytree(run, tmp_path_factory.mktemp("refined") / "run",
                          ignore=shutil.ignore_patterns("refine"))
    done(sample, "--ckpt", out, *REFINE, "default", "--out", out / "a.npz")
    return out


REWRITE = {"checkpoint.pt": (lambda path: torch.load(path, weights_only=True), save_state),
           "vae.ckpt": (lambda path: torch.load(path, weights_only=True), save_state),
           "x.safetensors": (lambda path: [json.loads(path.read_bytes()[8:].split(b"}}")[0]
                                                      + b"}}"), bytes(68)], safetensors_of),
           **{f"cache/{name}": (lambda path: path.read_text(),
                                lambda path, value: path.write_text(json.dumps(value)))
              for name in ("manifest.json", "00000.json")}}


@every("kind", REWRITE)
def test_a_whole_file_with_a_foreign_value_loads_or_is_refused_in_one_line(
        kind, samples, tmp_path):
    path, rng, loads = copy_of(samples, kind, tmp_path), random.Random(kind), 0
    load, save = REWRITE[kind]
    whole, odd = load(path), ODD if kind.endswith(("pt", "ckpt")) else ODD[:14]
    odd = [v for v in odd if kind.endswith(("pt", "ckpt")) or not isinstance(v, bytes)]
    for k in range(300 if FULL else 25):
        value, where = changed_value(whole, rng, odd)
        if where[0] == "replace" and kind == "x.safetensors" and where[1:] == (1,):
            continue
        try:
            save(path, value)
        except (TypeError, RuntimeError, NotImplementedError, ValueError):
            continue                                           # the format cannot hold it
        loads += trial(KINDS[kind], path, where)
    if FULL:
        print(f"{kind}: {k + 1} with a foreign value, {loads} load")
