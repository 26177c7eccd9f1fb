"""The folder of a run: its checkpoint, found, read, checked, saved and gone on from; its lock, its
metrics, the figure of its loss. Nothing of the method.

A checkpoint is a dict of plain values and tensors: config (fields of model.Config), model, ema (the
averaged weights), data (facts of the data set), step; and, for the run to go on, optimizers,
records (a dict for each line of metrics.jsonl), args.
"""
import contextlib
import fcntl
import json
import math
import os
import platform
import shutil
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch

from files import (check_fields, check_weights, finite, output_folder, plain_names,
                   read_safetensors, read_torch, save_checkpoint, sweep, tensors, write, write_text)

NAMES = ("ckpt.pt", "checkpoint-last.pth")          # of a run, of MAR's runs
FIELDS = {"config": dict, "model": dict, "ema": dict, "data": dict, "step": int}
FACTS = {"dataset": str, "size": int, "patch": int, "channels": int, "class_names": list}
MAYBE = {"x0_bound": float, "data_dir": str, "cache_dir": str, "vae": dict}     # or None
# flags that may differ when a run goes on
FREE = {"steps", "accumulate", "device", "threads", "compile", "dry_run", "eval_every", "out_dir",
        "max_bad", "data_dir", "vae", "cache_dir", "checkpoint_blocks", "eval_images", "set"}


# ---------------------------------------------------------------- reading a checkpoint

def checkpoint_of(folder):
    """Where the checkpoint of a run's folder is, or will be."""
    files = [Path(folder) / name for name in NAMES]
    return next((file for file in files if file.exists()), files[0])


def find_checkpoint(path):
    """A checkpoint file from a file or a run directory; ValueError if there is none."""
    path = Path(path)
    file = checkpoint_of(path) if path.is_dir() else path
    if not file.exists():
        raise ValueError(f"no checkpoint at {file}; train one with: python train.py --out_dir "
                         f"{path if path.suffix == '' else path.parent}")
    return file


def read_checkpoint(path):
    """The dict that train.py saved, or MAR's released weights as such a dict.

    Raises ValueError if the file is damaged, foreign or not finite.
    """
    path = find_checkpoint(path)
    if path.suffix == ".safetensors":
        import mar
        return mar.from_mar({"model": plain_names(read_safetensors(path))}, path)
    state = read_torch(path)
    known = plain_names(state) if isinstance(state, dict) else {}
    known |= {k: plain_names(known[k]) for k in ("model", "ema", "model_ema") if k in known}
    inner = known.get("model") if isinstance(known.get("model"), dict) else known
    if "config" not in known and ("model_ema" in known or "z_proj.weight" in inner):
        import mar
        return mar.from_mar(known, path)
    try:
        check_fields(known, FIELDS)
        facts = known["data"]
        check_fields(facts, FACTS | {k: v for k, v in MAYBE.items() if facts.get(k) is not None})
        check_fields(facts.get("vae") or {"scale": 1.0}, {"scale": float})
        if not 0 < (facts.get("x0_bound") or 1.0) < 1e9:
            raise ValueError(f"x0_bound = {facts['x0_bound']}")
    except ValueError as error:
        raise ValueError(f"{path} is not a checkpoint of train.py: {error}") from None
    for part in ("model", "ema"):
        check_weights(known[part], path, "generator")
    return known


def check_fits(cfg, facts, n_tensors):
    """ValueError unless a model.Config agrees with the data facts and the number of tensors that
    stand beside it in a file."""
    deep, names = max(cfg.n_layer, cfg.n_decoder, cfg.head_depth), facts["class_names"]
    if deep > n_tensors or len(names) != cfg.num_classes or not all(
            isinstance(name, str) for name in names):
        raise ValueError(f"{deep} layers and {cfg.num_classes} classes in {n_tensors} tensors with "
                         f"the names of {len(names)} classes")
    size, patch = facts["size"], facts["patch"]
    if not facts.get("vae") and (patch < 1 or size != cfg.grid * patch
                                 or cfg.token_dim != facts["channels"] * patch ** 2):
        raise ValueError(f"{cfg.grid} x {cfg.grid} tokens of {cfg.token_dim} for images of {size} "
                         f"pixels in patches of {patch}")


def has_steps(path):
    """Is there a checkpoint that would be lost if a run began at `path` anew?"""
    if not path.exists():
        return False
    state = read_checkpoint(path)
    return state["step"] != 0 or "records" not in state


def read_run(path):
    """The dict of a checkpoint that a run can go on from; ValueError if it is none."""
    state = read_checkpoint(path)
    if not {"optimizers", "records", "args"} <= set(state):
        raise ValueError(f"{path} holds weights, but no run that could be resumed (no optimiser); "
                         f"to fine-tune them: --init {path}, with another --out_dir")
    try:
        check_fields(state, {"optimizers": list, "records": list, "args": dict})
        check_fields(state["data"], {"n_train": int})
        for record in state["records"]:
            check_fields(record, {"step": int, "loss": float, "heldout_loss": float})
        if not 0 <= max(r["step"] for r in [*state["records"], state]) <= state["step"]:
            raise ValueError(f"step = {state['step']}, with records beyond it")
    except ValueError as error:
        raise ValueError(f"{path} holds no run that could be resumed: {error}") from None
    return state


# ---------------------------------------------------------------- a run that is trained

def settings_of(args):
    """All flags and settings of a run, but the architecture, as a dict."""
    return {k: v for k, v in vars(args).items() if k[0] != "_" and k != "architecture"}


def decisive(args, config, facts):
    """By name, what makes two runs the same."""
    vae = facts.get("vae") or {}
    return {**{k: v for k, v in args.items() if k not in FREE}, **config,
            "classes": facts["class_names"], "images": facts["n_train"],
            "latents": [vae.get("fingerprint"), f"scale {vae.get('scale') or 1:.5g}"]}


def moments(optimizer):
    """{parameter: {name: shape}}: what an optimiser keeps of each after its first step."""
    names = {"AdamW": ("step", "exp_avg", "exp_avg_sq"),
             "Muon": ("momentum",)}[type(optimizer).__name__]
    return {p: {name: () if name == "step" else p.shape for name in names}
            for group in optimizer.param_groups for p in group["params"]}


def load_moments(optimizer, saved, step):
    """Load what an optimiser kept after `step` steps; ValueError unless it is whole. Its settings
    follow from the flags."""
    optimizer.load_state_dict({**optimizer.state_dict(), "state": saved})
    for p, shapes in moments(optimizer).items():
        held = {name: z.shape for name, z in optimizer.state.get(p, {}).items()}
        if held != (shapes if step else {}):
            raise ValueError(f"the moments of {type(optimizer).__name__} are of other shapes")


class Folder:
    """--out_dir of a run, and what is saved there: model, ema, optimizers, the data's facts, the
    flags; `records` of its held-out loss; `step`, the last one that was saved."""

    def __init__(self, args, model, ema, optimizers, facts):
        self.path, self.args, self.facts = checkpoint_of(args.out_dir), settings_of(args), facts
        self.model, self.ema, self.optimizers = model, ema, optimizers
        self.step, self.records = None, []

    def begin(self, world):
        """Load the checkpoint and return its step. Where there is none, or one without a step, a
        first one is saved, to show that saving works. The caller holds the lock."""
        if world.rank == 0:
            self.check_space()
            if not has_steps(self.path):
                self.save(0)
        world.mean(0)        # all read one file: a run that is just ending might still replace it
        self.resume()
        if world.rank == 0 and self.step:
            self.write_records()                         # a kill may have come between the two
            steps = self.args["steps"]
            print(f"resuming {self.path} at step {self.step} of {steps}" if self.step < steps else
                  f"{self.path} has its {steps} steps: nothing to train. Raise --steps to go on")
        return self.step

    def check_space(self):
        """ValueError where a checkpoint and its successor could not be saved. What killed trainers
        have left goes."""
        path = self.path.resolve()
        sweep(path, alone=True)
        numbers = 2 * self.model.num_params + sum(
            math.prod(shape) for o in self.optimizers for kept in moments(o).values()
            for shape in kept.values())
        need, what = 1.03 * 4 * numbers + 2 ** 17, "the next checkpoint"     # names, pictures
        if not path.exists():
            need, what = 2 * need, "a checkpoint and its successor"
        free = shutil.disk_usage(path.parent).free
        if free < need:
            raise ValueError(f"--out_dir {path.parent} has {free / 2**20:.1f} MiB free, but must "
                             f"have {need / 2**20:.1f} MiB for {what}")

    def save(self, step, **measured):
        """Checkpoint and metrics, with what was measured at this step, unless something is not
        finite: then the old checkpoint stays."""
        self.records += [{"step": step, **measured}] if measured else []
        state = {"config": asdict(self.model.cfg), "model": self.model.state_dict(),
                 "ema": self.ema.state_dict(), "data": self.facts, "step": step,
                 "optimizers": [o.state_dict() for o in self.optimizers],
                 "records": self.records, "args": self.args,
                 "versions": {"torch": str(torch.__version__), "numpy": np.__version__}}
        if not all(map(finite, tensors(state))) or not math.isfinite(
                self.records[-1]["heldout_loss"] if self.records else 0):
            raise SystemExit(self.diverged("weights or held-out loss are not finite", step))
        try:
            save_checkpoint(self.path, state)
        except ValueError as error:
            good = "none yet" if self.step is None else f"that of step {self.step}"
            raise ValueError(f"step {step} could not be saved: {error}; the last good checkpoint "
                             f"is {good}") from None
        self.step = step
        self.write_records()

    def write_records(self):
        write_text(self.path.with_name("metrics.jsonl"),
                   "".join(json.dumps(record) + "\n" for record in self.records))

    def diverged(self, what, step):
        return (f"{what} at about step {step}. Likely causes: a learning rate that is too high "
                f"(--lr {self.args['lr']:g}; try a third), bad pixels or latents, a failing GPU. "
                f"Last good checkpoint: {self.path} at step {self.step}")

    def resume(self):
        """Load the checkpoint of this very run; ValueError names whatever differs."""
        state, config = read_run(self.path), self.model.cfg
        absent = {f.name: f.default for f in fields(config)}         # in an older checkpoint
        old = decisive(state["args"], absent | state["config"], state["data"])
        new = decisive(self.args, asdict(config), self.facts)
        changed = [f"{k} {str(old.get(k))[:60]} -> {str(v)[:60]}" for k, v in new.items()
                   if old.get(k) != v]
        if changed:
            raise ValueError(f"{self.path} holds another run ({'; '.join(changed)}); repeat its "
                             "flags to resume it or choose another --out_dir")
        if len(state["optimizers"]) != len(self.optimizers):
            raise ValueError(f"{self.path} holds {len(state['optimizers'])} optimisers, this run "
                             f"has {len(self.optimizers)}; it may be damaged")
        try:
            self.model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"]):
                load_moments(optimizer, saved["state"], state["step"])
        except (RuntimeError, LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{self.path} does not fit the run that it names: {error}") from None
        self.step, self.records = state["step"], state["records"]


def plot_loss(path, records):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(5, 3), layout="constrained")
    for key, label in (("loss", "training"), ("heldout_loss", "held out, averaged weights")):
        ax.plot([r["step"] for r in records], [r[key] for r in records], label=label, marker=".")
    ax.set(xlabel="step", ylabel="diffusion loss", yscale="log")
    ax.legend()
    write(path, lambda f: fig.savefig(f, dpi=110))
    plt.close(fig)


def lock(out):
    """An open file whose lock this process holds, so that no other trains in `out`; any death of
    the process releases it."""
    file = open(output_folder(out) / ".lock", "a+b", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        raise ValueError(f"another train.py, {file.read().decode()}, runs in {out}; stop it, or "
                         "choose another --out_dir") from None
    file.truncate(0)
    with contextlib.suppress(OSError):                                       # a full disk
        file.write(f"pid {os.getpid()} on {platform.node()}".encode())
    return file
