"""Files and flags: what users give to the programs, and what the programs leave behind.

Nothing of the method is here. Files are written whole or not at all, read safely, and what is wrong
with one is a line that names it. A flag that would change nothing is an error. `run` turns bad input
into one line and exit code 2.
"""
import argparse
import difflib
import fcntl
import hashlib
import json
import os
import pickle
import platform
import shutil
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch


# ---------------------------------------------------------------- files

def write(path, fill):
    """fill(file) beside `path`, then rename: `path` is always whole, the old file or the new."""
    tmp = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(tmp, "wb") as f:
            fill(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)                                          # where it failed


def write_text(path, text):
    write(path, lambda f: f.write(text.encode()))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1))


def read_npz(path):
    """The arrays of an npz file as a dict."""
    try:
        with np.load(path, allow_pickle=False) as z:
            return dict(z)
    except Exception as e:                              # missing, truncated, foreign, pickled
        why = " ".join(str(e).split())[:150]
        raise ValueError(f"{path} is not a readable npz: {why}") from None


def sha256(parts):
    """A short hash of byte strings."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()[:16]


def digest_of(root, what):
    """A short hash of a file, or of all files of a folder: their paths, sizes and times."""
    root = Path(root).resolve()
    files = [f for f in (root, *sorted(root.rglob("*"))) if f.is_file()]
    if not files:
        raise ValueError(f"{what} are no longer at {root}; say where with --data_dir")
    return sha256(f"{f} {f.stat().st_size} {f.stat().st_mtime_ns}\n".encode() for f in files)


def tensors(value):
    """All tensors in nested dicts, lists and tuples."""
    if torch.is_tensor(value):
        return [value]
    inner = value.values() if isinstance(value, dict) else value
    return [z for v in inner if not isinstance(v, str) for z in tensors(v)]


# ---------------------------------------------------------------- checkpoints

def save_checkpoint(path, state):
    """Write plain values and tensors."""
    write(path, lambda f: torch.save(state, f))


def find_checkpoint(path):
    """A checkpoint file from a file or a run directory; ValueError if there is none."""
    path = Path(path)
    files = [path / "ckpt.pt", path / "checkpoint-last.pth"] if path.is_dir() else [path]
    for file in files:                                                       # MAR names its own so
        if file.exists():
            return file
    raise ValueError(f"no checkpoint at {files[0]}; train one with: python train.py --out_dir "
                     f"{path if path.suffix == '' else path.parent}")


def plain_names(weights):
    """Weights by the names that they have without DDP and torch.compile, if it is a dict."""
    if not isinstance(weights, dict):
        return weights
    return {name.replace("_orig_mod.", "").removeprefix("module.") if isinstance(name, str)
            else name: value for name, value in weights.items()}


def read_checkpoint(path):
    """The dict that train.py saved, or MAR's released weights as such a dict.

    Raises ValueError if the file is truncated, foreign or not finite.
    """
    path = find_checkpoint(path)
    if path.suffix == ".safetensors":
        import mar
        return mar.from_mar({"model": plain_names(mar.read_safetensors(path))}, path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):         # MAR's flags are one
            state = torch.load(path, map_location="cpu", weights_only=True,
                               mmap=zipfile.is_zipfile(path))
    except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, AttributeError,
            ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} ({path.stat().st_size} bytes) is not a readable checkpoint; "
                         f"it may be truncated: {reason}") from None
    known = plain_names(state) if isinstance(state, dict) else {}
    known |= {k: plain_names(known[k]) for k in ("model", "ema", "model_ema") if k in known}
    inner = known.get("model") if isinstance(known.get("model"), dict) else known
    if "config" not in known and ("model_ema" in known or "z_proj.weight" in inner):
        import mar
        return mar.from_mar(known, path)
    parts = ("config", "model", "ema", "data")
    missing = {"step"} - set(known) | {k for k in parts if not isinstance(known.get(k), dict)}
    if missing:
        raise ValueError(f"{path} is not a checkpoint of train.py: it lacks "
                         f"{', '.join(sorted(missing))}")
    return known


# ---------------------------------------------------------------- the folder of a run

def check_space(out, need):
    """ValueError where a checkpoint and its successor could not be saved: `need` bytes in all."""
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    if free < need or not os.access(out, os.W_OK):
        raise ValueError(f"--out_dir {out} has {free / 2**20:.0f} MiB free, but must be writable "
                         f"and have {need / 2**20:.0f} MiB for a checkpoint and its successor")


def lock(out):
    """An open file whose lock this process holds, so that no other trains in `out`; any death of
    the process releases it."""
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / ".lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        raise ValueError(f"another train.py, {file.read()}, runs in {out}; stop it, or choose "
                         "another --out_dir") from None
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {platform.node()}")
    file.flush()
    return file


# ---------------------------------------------------------------- flags

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        shown = action.default not in (None, False, argparse.SUPPRESS)
        return super()._get_help_string(action) if shown else action.help


class Flags(argparse.Namespace):
    """The parsed flags; notes which were given and which the program has looked at."""

    def __init__(self, values, given, helps):
        super().__init__(**values)
        self._given, self._helps, self._read = given, helps, set()

    def __getattribute__(self, name):
        if not name.startswith("_"):
            vars(self).get("_read", set()).add(name)
        return super().__getattribute__(name)

    def check_used(self, *later):
        """ValueError for a flag that was given and that this run has not looked at, nor will
        (later: names): it would do nothing. To be called once all is read, before any work."""
        for name in sorted(self._given - self._read - set(later)):
            raise ValueError(f"--{name} would change nothing in this run; leave it out, or see "
                             f"what it is for: {self._helps[name]}")


class Parser(argparse.ArgumentParser):
    """argparse with defaults in --help, no abbreviations, the closest match for a mistyped flag."""

    def __init__(self, **kw):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kw)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else [str(a) for a in args]
        known, unknown = super().parse_known_args(args, namespace)
        typed = {a.split("=")[0] for a in args}
        given = {a.dest for a in self._actions if typed & set(a.option_strings)}
        return Flags(vars(known), given, {a.dest: a.help for a in self._actions}), unknown

    def parse_args(self, args=None, namespace=None):
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            options = list(self._option_string_actions)
            close = difflib.get_close_matches(unknown[0].split("=")[0], options, 1)
            hint = f"did you mean {close[0]}?" if close else "see --help"
            self.error(f"unknown argument {unknown[0]}; {hint}")
        return known

    def error(self, message):
        raise ValueError(message)


def number(kind, low, high=float("inf")):
    """An argparse type: a finite number between low and high, both allowed."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number")
        if not low <= value <= high or value == float("inf"):
            wanted = f"at least {low}" if high == float("inf") else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: {wanted}")
        return value
    return parse


def run(main):
    """Run a program: bad input (ValueError, OSError) is one line on stderr and exit code 2;
    TRACEBACK=1 shows where."""
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        # of many processes the first speaks at once; the others, who mostly met the same, wait for
        # torchrun to end them, and speak if nobody did
        rank, local = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
        time.sleep(5 * (rank > 0) + 5 * (local > 0))
        message = " ".join(str(error).split())
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)
