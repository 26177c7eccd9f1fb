"""Files: what users give to the programs, and what the programs leave. Nothing of the method.

Every file is written by `write`, whole or not at all, and read by the reader of its kind
(read_torch, read_npz, read_npy, read_json, read_lines, read_safetensors), which names a file that
is damaged or foreign in one line (ValueError). Checkpoints and the folder of a run: runs.py.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import platform
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch


# ---------------------------------------------------------------- writing

def write(path, fill):
    """fill(file) beside `path`, then rename: `path` is whole at any time, the old file or the new.

    A symbolic link keeps its place. ValueError where nothing can be written or the disk is full;
    nothing is left of the attempt, and the old file stays.
    """
    name, tmp = path, None
    try:
        path = Path(path).resolve()
        sweep(path)
        tmp = Path(f"{path}.{platform.node()}-{os.getpid()}.tmp")
        with open(tmp, "wb") as f:
            fill(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as error:
        # torch's zip writer hides the disk's error behind a RuntimeError of its own
        reason = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(reason, OSError):
            raise
        raise ValueError(f"{name} cannot be written ({reason.strerror or reason}); what it held "
                         "before is untouched") from None
    finally:
        if tmp:
            tmp.unlink(missing_ok=True)                                      # where it failed


def sweep(path, alone=False):
    """Remove what killed writers of `path` have left beside it: those of this machine that live no
    more; alone: all, where nobody else may write it."""
    for old in path.parent.glob(f"{re.sub('[][*?]', '?', path.name)}.*-*.tmp"):
        host, _, pid = old.name[len(path.name) + 1:-4].rpartition("-")
        if alone or host == platform.node() and not Path(f"/proc/{pid}").exists():
            old.unlink(missing_ok=True)


def write_text(path, text):
    write(path, lambda f: f.write(text.encode()))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1))


def save_checkpoint(path, state):
    """Write plain values and tensors."""
    write(path, lambda f: torch.save(state, f))


def write_png(path, picture):
    """A PIL image, as small as can be without a loss."""
    write(path, lambda f: picture.save(f, "png", optimize=True))


def add_line(path, record):
    """Add a JSON line to a file; OSError with its name where the disk is full."""
    try:
        with open(path, "a") as f:
            f.write(json.dumps(record) + "\n")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def check_output(flag, path, suffixes=(), overwrite=True):
    """The Path of a file that is to be written at the end; ValueError now if it cannot be."""
    path = Path(path)
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"{flag} {path}: expected a name that ends in {' or '.join(suffixes)}")
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder; expected a file in it")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; choose another {flag} or add --overwrite")
    try:
        try_to_write(path)
    except OSError as error:
        raise ValueError(f"{flag} {path}: expected a file in a folder that can be written to "
                         f"({error.strerror})") from None
    return path


def output_folder(path):
    """The Path of --out_dir, made if need be; ValueError if nothing can be written there."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        try_to_write(path / "file")
    except OSError as error:
        raise ValueError(f"--out_dir {path} cannot be written to ({error.strerror}); choose "
                         "another folder") from None
    return path


def try_to_write(path):
    """Write a file beside `path` and remove it; OSError if that cannot be."""
    beside = Path(f"{path.resolve()}.{platform.node()}-{os.getpid()}.tmp")
    try:
        beside.write_bytes(b"can it be written to?")
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


# ---------------------------------------------------------------- reading

@contextlib.contextmanager
def reading(path, what):
    """Whatever goes wrong inside is a ValueError in one line: which file, what was expected."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}, expected to be a {what}, cannot be read: "
                         f"{error.strerror or error}") from None
    except Exception as error:              # zip, pickle, JSON, numpy, torch: no common class
        # torch's own advice is to load the file unsafely
        why = " ".join(str(error).split()).split("WeightsUnpickler error: ")[-1].split(". ")[0]
        why = why[:200] or type(error).__name__
        raise ValueError(f"{path} ({os.path.getsize(path):,} bytes) is no readable {what}; it may "
                         f"be truncated or damaged: {why}") from None


def open_zip(path):
    """A ZipFile that lists as many parts as its last bytes say: zipfile does not look."""
    z = zipfile.ZipFile(path)
    with open(path, "rb") as f:
        f.seek(-22, os.SEEK_END)
        listed = int.from_bytes(f.read()[10:12], "little")
        if not listed or listed not in (len(z.namelist()), 0xFFFF):
            raise ValueError("its list of parts is damaged")
    return z


def read_torch(path, what="checkpoint", device="cpu"):
    """What torch.save wrote: plain values and finite, dense tensors; nothing in it is executed.

    A flipped bit is found: torch writes a CRC-32 of each part, and never looks at it. That takes
    0.6 s a GB, and the numbers 0.2 s.
    """
    with reading(path, what):
        with open(path, "rb") as f:
            zipped = f.read(4) == b"PK\x03\x04" or zipfile.is_zipfile(path)      # else: before 1.6
        if zipped:
            with open_zip(path) as z:
                if any(part.compress_type for part in z.infolist()):
                    raise ValueError("its parts are compressed")                 # not by torch
                damaged = z.testzip()
            if damaged:
                raise ValueError(f"the checksum of {damaged} does not fit")
        with torch.serialization.safe_globals([argparse.Namespace]):         # MAR's flags are one
            state = torch.load(path, map_location=device, weights_only=True, mmap=zipped)
        for name, z in named_tensors(state):
            plain = z.layout == torch.strided and not z.is_meta and not z.is_quantized
            if not plain or z.numel() * z.element_size() > z.untyped_storage().nbytes():
                raise ValueError(f"'{name}' {tuple(z.shape)} is no plain tensor")
            if not finite(z):
                raise ValueError(f"'{name}' is not finite; go back to an older one")
    return state


def named_tensors(value, name=""):
    """(name, tensor) of all tensors in nested dicts, lists and tuples."""
    if torch.is_tensor(value):
        yield name, value
    elif isinstance(value, (dict, list, tuple)):
        for key, v in value.items() if isinstance(value, dict) else enumerate(value):
            yield from named_tensors(v, f"{name}.{key}" if name else str(key))


def finite(z):
    """Neither NaN nor infinity in a tensor; isfinite().all() takes 40 times as long."""
    return not (z.is_floating_point() and z.numel()) or bool(
        torch.stack(z.detach().aminmax()).isfinite().all())


def tensors(value):
    return [z for _, z in named_tensors(value)]


def read_weights(path, what):
    """{name: tensor} of a state dict, or of one under "model"."""
    state = read_torch(path, what)
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    return check_weights(plain_names(state), path, what)


def plain_names(weights):
    """Weights by the names that they have without DDP and torch.compile, if it is a dict."""
    if not isinstance(weights, dict):
        return weights
    return {name.replace("_orig_mod.", "").removeprefix("module.") if isinstance(name, str)
            else name: value for name, value in weights.items()}


def check_weights(state, path, what):
    """A state dict as it is; ValueError if it is anything else than names with tensors."""
    if not isinstance(state, dict) or not state or not all(
            isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()):
        came = f"keys {list(state)[:5]}" if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path} holds {came[:200]}, expected the state dict of a {what}: names "
                         "with tensors")
    return state


def read_npz(path, *expected):
    """The arrays of an npz file as a dict, or those that are expected (zipfile looks at their
    checksums); ValueError if it is another kind of file, or damaged."""
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
        open_zip(path).close()
        with np.load(path, allow_pickle=False) as z:
            for name in expected or z:
                arrays[name] = z[name]
    except KeyError:
        refuse(f"it lacks {name}")
    except Exception as e:                              # zip, zlib, struct, header, pickled
        refuse(f"{name} " + ("holds Python objects, which may run code" if "allow_pickle" in str(e)
                             else "is cut off or damaged"))
    if not all(isinstance(a, np.ndarray) for a in arrays.values()):
        refuse("it is a zip of other things than arrays")
    return arrays


def read_npy(path):
    """The array of an npy file, by memory map."""
    with reading(path, "npy"):
        return np.lib.format.open_memmap(path, mode="r")


def read_json(path, **expected):
    """The dict of a JSON file that has these keys, of these types."""
    with reading(path, f"JSON with {', '.join(expected)}"):
        value = json.loads(Path(path).read_bytes())
        check_fields(value, expected)
    return value


def check_fields(value, expected):
    """ValueError unless a dict has all fields `expected`: {name: type}, a float may be whole."""
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} came, expected {', '.join(expected)}")
    missing = [str(name) for name in expected if name not in value]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    for name, kind in expected.items():
        kinds = (int, float) if kind is float else kind
        if not isinstance(value[name], kinds) or isinstance(value[name], bool) != (kind is bool):
            raise ValueError(f"{name} = {str(value[name])[:40]} is no {kind.__name__}")
        if kind is float and not math.isfinite(value[name]):
            raise ValueError(f"{name} is {value[name]}")


def read_lines(path):
    """The dicts of a file of JSON lines, as far as they are whole; warns of those that are not."""
    found = []
    for k, line in enumerate(Path(path).read_bytes().splitlines() if Path(path).exists() else ()):
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            print(f"warning: {path}: line {k + 1} is damaged and left out", file=sys.stderr)
    return found


def read_safetensors(path):
    """{name: tensor} of a .safetensors file.

    Its layout: the header's length (8 bytes, little endian), a JSON header, raw data.
    """
    types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
             "BF16": torch.bfloat16, "I64": torch.int64}
    out = {}
    with reading(path, "safetensors file"), open(path, "rb") as f:
        size, length = os.path.getsize(path), int.from_bytes(f.read(8), "little")
        if length > size - 8:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            (begin, end), shape = entry["data_offsets"], entry["shape"]
            dtype = types[entry["dtype"]]
            needed = math.prod(shape) * dtype.itemsize
            if not 0 <= begin <= end <= size - 8 - length or end - begin != needed:
                raise ValueError(f"tensor '{name}' {shape} has bytes {begin} to {end} of "
                                 f"{size - 8 - length}, expected {needed}")
            f.seek(8 + length + begin)
            raw = bytearray(f.read(end - begin))
            out[name] = (torch.frombuffer(raw, dtype=dtype).reshape(shape) if raw
                         else torch.empty(shape, dtype=dtype))
    return out


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
        slack = 0.05 if kind == "f" else 0                       # of resampling and rounding
        fits = [way if a <= low and high <= b else f"{way}.clip(0, 255)"
                for (a, b), way in ways.items() if a - slack <= low and high <= b + slack]
        todo += f"; {name} has values from {low:g} to {high:g}" + (
            f": {fits[0]}.astype('uint8')" if fits else ", which no rule turns into 0 to 255")
    if x.ndim == 3:
        todo += f"; a channel is missing: {name}[..., None]"
    elif x.ndim == 4 and x.shape[3] not in (1, 3) and x.shape[1] in (1, 3):
        todo += f"; channels come last: {name}.transpose(0, 2, 3, 1)"
    return todo


def walk(folder, seen=None):
    """The files under a folder, and its hidden entries as they are, in order. Links are followed,
    each folder once, and none up to a folder that holds this one: loops end."""
    if seen is None:
        above = (*Path(folder).absolute().parents, *Path(folder).resolve().parents)
        seen = set(map(os.path.realpath, above))
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


def digest_of_code(*names):
    """A short hash of modules of this project, as far as they are there."""
    found = [Path(__file__).with_name(f"{name}.py") for name in names]
    return sha256(file.read_bytes() for file in found if file.exists())


def weights_digest(model):
    """A short hash of a model's weights."""
    return sha256(v.detach().cpu().contiguous().view(torch.uint8).numpy().data
                  for v in model.state_dict().values())


# ---------------------------------------------------------------- results that are kept

def keep_or_make(folder, kind, made_for, make, most, device, say):
    """(make(), or what it gave before if a file in `folder` was made for the same; the folder, or
    None if nothing can be kept). Tensors in dicts and lists; more than `most` bytes are not kept.
    """
    where = "" if made_for["class"] is None else f"-{made_for['class']}"
    file = folder and folder / f"{kind}{where}.pt"
    if file and file.exists():
        try:
            return read_kept(file, made_for, device), folder
        except ValueError as error:
            say(f"the {kind} in {folder} {error}: computing anew")
    value = make()
    if file and sum(z.nbytes for z in tensors(value)) <= most:
        try:
            save_kept(file, made_for, value)
        except (OSError, ValueError) as error:
            say(f"{error}: the refinement is not kept")
            folder = None
    return value, folder


def save_kept(path, made_for, value):
    """Tensors in dicts and lists, beside all that they were made for, plain values by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, {"made_for": {**made_for, "shapes": shapes(value)}, "value": value})


def read_kept(path, made_for, device):
    """What `save_kept` wrote; ValueError if that was made for anything else."""
    try:
        saved = read_torch(path, "kept result", device)
        made_for = {**made_for, "shapes": shapes(saved["value"])}
        differs = [name for name in made_for if saved["made_for"].get(name) != made_for[name]]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"cannot be read ({error})") from None
    if differs:
        raise ValueError(f"were made for another {', '.join(differs)}")
    return saved["value"]


def shapes(value):
    """[(name, type, shape)] of its tensors: a foreign value has others."""
    return [(name, str(z.dtype), tuple(z.shape)) for name, z in named_tensors(value)]
