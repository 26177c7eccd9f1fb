"""Fine-tuning: train.py --init FILE starts from the weights of another run, an export, MAR's file.

The architecture is the file's, its averaged weights are taken, step and optimiser are new. Classes
whose names the file knows keep their embedding, others start anew, "no class" keeps its own.
Latents are scaled as the file's were. A run that goes on needs the file no more.
"""
import os
from dataclasses import replace
from pathlib import Path

from model import PRESETS, load_model, preset
from runs import find_checkpoint, has_steps

# fields of Config that decide how a model is trained, not what it is
TRAINING = ("dropout", "class_dropout", "diffusion_batch_mul", "mask_min", "mask_std")


class Start:
    """The weights of --init, or those of the run in --out_dir that started from them."""

    def __init__(self, args):
        self.args, own = args, Path(args.out_dir) / "ckpt.pt"
        self.path = find_checkpoint(own if has_steps(own) else args.init)
        self.model, state = load_model(self.path)
        self.facts = state["data"]
        self.latents = self.facts.get("vae")
        self.scale = (self.latents or {}).get("scale")
        self.named = args.model if "model" in args._given else None
        args.model = self.named or f"the model of {args.init}"

    def config(self, dataset, shape):
        """The Config of the run: the file's, for as many classes as the data have (shape) and with
        what --set says of training. ValueError where flags or data contradict the file."""
        cfg, asked = self.model.cfg, dict(self.args.architecture)
        changes = {name: asked.pop(name) for name in TRAINING if name in asked}
        if self.named:
            preset(self.named)                           # is there one?
            asked = {**{k: v for k, v in PRESETS[self.named].items() if k not in TRAINING}, **asked}
        for name, value in asked.items():
            if value != getattr(cfg, name):
                raise ValueError(f"--init {self.path} holds a model with "
                                 f"{name}={getattr(cfg, name)}, the flags ask for {value}: its "
                                 f"architecture cannot change; leave out --model, --set {name}")
        ours = (cfg.grid, cfg.token_dim, self.facts["patch"])
        theirs = (dataset.grid, dataset.token_dim, dataset.patch)
        if ours != theirs or bool(self.latents) != bool(dataset.latents):
            words = [f"{grid} x {grid} tokens of {dim} values (patch {patch}) of "
                     + ("latents" if latents else "pixels") for (grid, dim, patch), latents in
                     ((ours, self.latents), (theirs, dataset.latents))]
            raise ValueError(f"--init {self.path} models {words[0]}, the data are {words[1]}: give "
                             "--size, --patch and --vae as the file has them")
        made = [(z or {}).get("fingerprint") for z in (self.latents, dataset.latents)]
        if all(made) and made[0] != made[1]:
            raise ValueError(f"--init {self.path} models the latents of the VAE {made[0][:16]}, "
                             f"the data are those of {made[1][:16]}: give the VAE of its training")
        return replace(cfg, num_classes=shape["num_classes"], **changes)

    def fill(self, model, names):
        """Put the weights into the model of the run, whose classes have these names."""
        weights, old = self.model.state_dict(), self.facts["class_names"]
        theirs = weights["class_emb.weight"]
        table = model.state_dict()["class_emb.weight"].clone()
        kept = [name for name in names if name in old]
        for name in kept:
            table[names.index(name)] = theirs[old.index(name)]
        table[len(names):] = theirs[len(old):]           # "no class", where it is a row
        model.load_state_dict({**weights, "class_emb.weight": table})
        if os.environ.get("RANK", "0") == "0":
            print(f"the weights of {self.path}: {len(kept)} of {len(names)} classes keep their "
                  "embedding, the others start anew")
