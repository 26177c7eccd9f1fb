"""Files and flags: what users give to the programs, and what the programs leave behind.

Nothing of the method is here. Files are written whole or not at all, read safely, and what is wrong
with one is a line that names it. A flag that would change nothing is an error. `run` turns bad
input into one line and exit code 2.
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
    """The arrays of an npz file as a dict; ValueError if it is another kind of file, or damaged."""
    def refuse(why):
        raise ValueError(f"{path} is not a readable npz: {why}; expected a file as numpy.savez("
                         "FILE, NAME=ARRAY, ...) writes it") from None

    if not os.path.isfile(path):
        refuse("there is no such file")
    with open(path, "rb") as f:
        start = f.read(6)
    if start[:2] != b"PK":
        refuse("it is a .npy of one array" if start == b"\x93NUMPY" else f"it starts with {start}")
    arrays, name = {}, "its list of arrays"
    try:
        with np.load(path, allow_pickle=False) as z:
            for name in z:
                arrays[name] = z[name]
    except Exception as e:                              # zip, zlib, struct, header, pickled
        refuse(f"{name} " + ("holds Python objects, which may run code" if "allow_pickle" in str(e)
                             else "is cut off or damaged"))
    if not all(isinstance(a, np.ndarray) for a in arrays.values()):
        refuse("it is a zip of other things than arrays")
    return arrays


def checked_images(z, path, images, labels):
    """Of the arrays z of a file: the images z[images], uint8 (n, H, W, 1 or 3), and their labels
    z[labels], whole numbers (n,) from 0 up, as int64, or None if there are none."""
    x, y = z.get(images), z.get(labels)
    good = x is not None and x.dtype == np.uint8 and x.ndim == 4 and x.shape[3] in (1, 3) and x.size
    if good and y is not None:
        good = y.shape == (len(x),) and y.dtype.kind in "iu" and y.min() >= 0
    if not good:
        found = ", ".join(f"{k} {a.dtype} {a.shape}" for k, a in z.items()) or "nothing"
        raise ValueError(f"{path} holds {found}; expected {images}, images uint8 (N, H, W, 1 or "
                         f"3), and, if there are labels, {labels}, N class numbers from 0 up"
                         + ("" if x is None else how_to_uint8(x, images)))
    if x.max() <= 1:
        print(f"warning: no value of {images} in {path} is above 1, where 255 is white: are these "
              "images of 0 and 1, to be multiplied by 255?", file=sys.stderr)
    return x, None if y is None else y.astype(np.int64)


def how_to_uint8(x, name):
    """What has to be done to the array x of images, by the range of its values and its shape."""
    todo, kind = "", x.dtype.kind
    if x.dtype != np.uint8 and (kind not in "iufb" or not x.size or not np.isfinite(x).all()):
        return f"; {name} is not of finite numbers"
    if x.dtype != np.uint8:
        low, high = float(x.min()), float(x.max())
        ways = {(0, 1): f"({name} * 255).round()", (-1, 1): f"(({name} + 1) * 127.5).round()",
                (0, 255): f"{name}" if kind in "iu" else f"{name}.round()",
                **({(0, 65535): f"({name} / 257).round()"} if kind in "iu" else {})}
        fits = [way for (a, b), way in ways.items() if a <= low and high <= b]
        todo += f"; {name} has values from {low:g} to {high:g}" + (
            f": {fits[0]}.astype('uint8')" if fits else ", which no rule turns into 0 to 255")
    if x.ndim == 3:
        todo += f"; a channel is missing: {name}[..., None]"
    elif x.ndim == 4 and x.shape[3] not in (1, 3) and x.shape[1] in (1, 3):
        todo += f"; channels come last: {name}.transpose(0, 2, 3, 1)"
    return todo


def walk(folder, seen=None):
    """The files under a folder, and its hidden entries as they are, in order. Links are followed,
    each folder once, so that a loop ends."""
    seen = set() if seen is None else seen
    if os.path.realpath(folder) not in seen:
        seen.add(os.path.realpath(folder))
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            deeper = entry.is_dir(follow_symlinks=False) or (
                entry.is_symlink() and os.path.isdir(entry))
            if deeper and not entry.name.startswith("."):
                yield from walk(entry.path, seen)
            else:
                yield Path(entry)


def sha256(parts):
    """A short hash of byte strings."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()[:16]


def digest_of(root, what):
    """A short hash of a file, of all files of a folder, or of those whose path begins so: their
    paths, sizes and times."""
    root = Path(root).resolve()
    files = walk(root) if root.is_dir() else sorted(root.parent.glob(f"{root.name}*"))
    files = [root] if root.is_file() else [f for f in files if f.is_file() and f.name[0] != "."]
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


LESS = ("train.py: raise --accumulate, or add --checkpoint_blocks; sample.py, evaluate.py: lower "
        "--batch_size, or --m with --refine")


def run(main):
    """Run a program: bad input (ValueError, OSError) and a lack of memory are one line on stderr
    and exit code 2; TRACEBACK=1 shows where."""
    try:
        main()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        full = (isinstance(error, (MemoryError, torch.OutOfMemoryError))
                or "not enough memory" in str(error))                        # torch's, of a CPU
        if os.environ.get("TRACEBACK") or isinstance(error, RuntimeError) and not full:
            raise
        error = f"out of memory ({str(error).split('.')[0]}); {LESS}" if full else error
        # of many processes the first speaks at once; the others, who mostly met the same, wait for
        # torchrun to end them, and speak if nobody did
        rank, local = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
        time.sleep(5 * (rank > 0) + 5 * (local > 0))
        message = " ".join(str(error).split())
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)
