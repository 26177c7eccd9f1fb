"""Train AR, MAR or CDM: one GPU, a CPU, or many under torchrun.

    python train.py                                     digits on a CPU, minutes
    python train.py --dataset folder --data_dir photos  your own images
    python train.py --dataset imagenet256 --data_dir ImageNet --vae kl16.ckpt --model mar-b
    torchrun --nproc_per_node 8 -- train.py ...         the same on 8 GPUs; the batch is shared out

To resume, run the same command again. Every random number of step s follows from (seed, s), so that
a resumed run equals an uninterrupted one, bitwise on a CPU (a GPU adds in any order), and two
processes equal one (but for dropout's masks, which follow from the process).
It leaves in --out_dir: ckpt.pt, metrics.jsonl, samples.png and, after a step, loss.png.
"""
# first: it answers signals
from command import Parser, closest, join, number, on_signal, pick_device, run, set_threads

import copy
import functools
import math
import os
import sys
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data as datasets
from data import DATASETS, batch_indices, image_grid, patchify, to_uint8
from files import (NAMES, check_run, check_space, finite, has_steps, lock, plot_loss,
                   read_checkpoint, save_run, tensors, write_png, write_records)
from model import GUIDANCE, PRESETS, Config, build, preset
from sample import draw

# Rarely set: these and the fields of model.Config, by --set NAME=VALUE. See also DATASETS.
SETTINGS = dict(
    optimizer="muon",           # or adamw; muon needs half the steps on the small sets
    lr_schedule="cosine",       # or constant, after the warm-up
    warmup=200,                 # steps of linear warm-up
    weight_decay=0.02,          # on matrices: AdamW's outside the head, and all of Muon's
    clip=3.0,                   # gradient norm limit, 0 = off
    ema_decay=0.999,            # of the averaged weights, which are those that sample
    eval_images=1024,           # held-out images in the held-out loss, at most
)
# all orders take longer to learn than one: digits, 2400 steps .101 held out, 6000 .093 (gpt .090)
PATIENT = {"mar-tiny": dict(steps=6000)}
CHOICES = {"optimizer": ("muon", "adamw"), "lr_schedule": ("cosine", "constant")}
# what may differ when a run is resumed
FREE = {"steps", "accumulate", "device", "threads", "compile", "dry_run", "eval_every", "out_dir",
        "max_bad", "data_dir", "vae", "cache_dir", "checkpoint_blocks", "eval_images", "set"}


def parse_args(argv=None):
    p = Parser(description="Train a generator. To resume, run the same command again.")
    add = p.add_argument
    add("--dataset", choices=DATASETS, default="digits", help="what to train on")
    add("--data_dir", help="where it is: the folder of images ROOT/<class>/*.png, of ImageNet, of "
                           "mnist's or cifar's files; the npz of arrays; latents: an npz with "
                           "latents (N, z, h, h), labels [, split, class_names], or such .npy")
    add("--vae", help="kl16.ckpt: train on its latents (imagenet, or a folder); latents: show them")
    add("--cache_dir", help="with --vae: where latents are kept (default: cache/...)")
    add("--size", type=number(int, 4, 2048), default=16, help="pixels of a side, unless files say")
    add("--patch", type=number(int, 1, 64), default=4, help="pixels, or latents, of a token's side")
    add("--max_bad", type=number(float, 0, 1), default=0.01,
        help="folders of images: share of unreadable ones that is tolerated")
    add("--model", default="gpt-tiny", help=f"one of {', '.join(PRESETS)}")
    add("--init", metavar="FILE", help="fine-tune: start from model and weights of another run, of "
                                       "an export, MAR's .pth or .safetensors")
    add("--out_dir", default="out", help="where the run lives")
    add("--steps", type=number(int, 0), default=2400, help="optimiser steps in all")
    add("--global_batch", type=number(int, 1, 2 ** 20), default=64,
        help="images per step, all processes")
    add("--accumulate", type=number(int, 1), default=1,
        help="parts that a process's batch is cut into: less memory, the same result")
    add("--lr", type=number(float, 0, 10), default=2e-3, help="peak learning rate")
    add("--seed", type=number(int, 0, 2 ** 32 - 1), default=0, help="of weights, data order, noise")
    add("--eval_every", type=number(int, 1), default=400, help="steps between checkpoints")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--threads", type=number(int, 0, 1024), default=0, help="of a CPU; 0: 1 for small models")
    add("--compile", action="store_true", help="torch.compile (CUDA)")
    add("--checkpoint_blocks", action="store_true", help="less memory, exact, a third slower")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE",
        help="any other setting of train.SETTINGS or model.Config, such as dropout=0")
    add("--dry-run", action="store_true", help="print what the run would take, and stop")

    argv = sys.argv[1:] if argv is None else argv
    early, _ = p.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    which = DATASETS[early.dataset]
    defaults = {**SETTINGS, **PATIENT.get(early.model, {}), **which.defaults}
    if which.load and "vae" in which.reads and early.vae:
        defaults.update(size=256, patch=1)
    p.set_defaults(**{k: defaults.pop(k) for k in [*defaults] if k in vars(early)})
    args = p.parse_args(argv)
    args.settings, args.architecture = parse_settings(args.set, defaults)
    return args


def parse_settings(pairs, values):
    """(training settings, fields of Config) of NAME=VALUE pairs, over the default values."""
    kinds = {f.name: f.type for f in fields(Config)} | {k: type(v) for k, v in SETTINGS.items()}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name not in kinds:
            raise ValueError(f"--set {pair}: no such setting; {closest(name, kinds)}")
        if name in ("token_dim", "grid", "num_classes"):
            raise ValueError(f"--set {pair} would change nothing: it follows from --dataset, "
                             "--size and --patch")
        kind, choices = kinds[name], CHOICES.get(name, (value,))
        try:
            values[name] = {"0": False, "1": True}[value] if kind is bool else kind(value)
        except (ValueError, KeyError):
            what = "0 or 1" if kind is bool else f"<{kind.__name__}>"
            raise ValueError(f"--set {pair}: expected {name}={what}") from None
        if value not in choices:
            raise ValueError(f"--set {pair}: choose {' or '.join(choices)}")
    settings = {k: values.pop(k) for k in SETTINGS}
    for name, value in settings.items():
        low, high = {"ema_decay": (0, 1), "eval_images": (1, 2 ** 30)}.get(name, (0, 2 ** 30))
        if not isinstance(value, str) and not low <= value <= high:              # nor NaN
            raise ValueError(f"--set {name}={value} is out of range: {low} to {high}")
    return settings, values


class World:
    """Rank and size under torchrun, or 0 of 1 alone; the device of this process."""

    def __init__(self, device):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(device)
        if self.size > 1:
            join("nccl" if self.device.type == "cuda" else "gloo", timedelta(minutes=10))

    def mean(self, *values):
        """The mean of each value over the ranks, as floats."""
        total = torch.tensor([float(v) for v in values], device=self.device)
        if self.size > 1:
            dist.all_reduce(total)
        return [v / self.size for v in total.tolist()]


def generator(device, *key):
    """A random stream that is a function of its key."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(seed)


# ---------------------------------------------------------------- optimisers

def learning_rate(step, args):
    warmup = args.settings["warmup"]
    if step < warmup:
        return args.lr * (step + 1) / warmup
    if args.settings["lr_schedule"] == "constant":
        return args.lr
    done = (step - warmup) / max(args.steps - warmup, 1)
    return args.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizers(model, args):
    """[AdamW (.9, .95)], without decay on vectors and the head (as in MAR). Muon takes the matrices
    of all blocks from it, those of the head's residual blocks too, and decays them."""
    decay, muon = args.settings["weight_decay"], args.settings["optimizer"] == "muon"
    matrices, decayed, plain = [], [], []
    for n, p in model.named_parameters():
        if muon and p.dim() == 2 and "blocks." in n:
            matrices.append(p)
        elif p.dim() < 2 or n.startswith("diffloss.") or "embed_learned" in n:
            plain.append(p)
        else:
            decayed.append(p)
    groups = [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    return [adamw, Muon(matrices, args.lr, decay)] if matrices else [adamw]


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each matrix is made orthogonal: all directions learn at one rate.

        W <- W (1 - lr decay) - scale lr sqrt(max(1, rows / columns)) orthogonal(momentum)

    K. Jordan et al. 2024. torch.optim.Muon (since 2.9) works on one matrix at a time; here those of
    one shape share their products: in bf16 on a GPU, which is enough, in fp32 on a CPU. scale: an
    orthogonal update moves a weight by about lr / sqrt(columns), AdamW's by lr; 10 makes up for it.
    """

    def __init__(self, matrices, lr, weight_decay):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95,
                                    "scale": 10.0})

    @torch.no_grad()
    def step(self):
        group, = self.param_groups
        lr, beta = group["lr"], group["momentum"]
        for shape in dict.fromkeys(p.shape for p in group["params"]):
            same = [p for p in group["params"] if p.shape == shape]
            for p in same:
                self.state[p] = self.state[p] or {"momentum": torch.zeros_like(p)}
            grads, kept = [p.grad for p in same], [self.state[p]["momentum"] for p in same]
            torch._foreach_lerp_(kept, grads, 1 - beta)
            mixed = torch.stack(grads).lerp_(torch.stack(kept), beta)        # (n, rows, columns)
            update = orthogonal(mixed.bfloat16() if mixed.is_cuda else mixed).to(mixed.dtype)
            update *= -group["scale"] * lr * max(1, shape[0] / shape[1]) ** 0.5
            torch._foreach_mul_(same, 1 - lr * group["weight_decay"])
            torch._foreach_add_(same, list(update))


def orthogonal(g, steps=5):
    """(n, rows, columns) -> singular values of .7 to 1.2, but for the tiniest: Newton-Schulz."""
    a, b, c = 3.4445, -4.7750, 2.0315                        # steepest at 0 (Jordan et al. 2024)
    x = g / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.mT if g.shape[1] > g.shape[2] else x
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if g.shape[1] > g.shape[2] else x


# ---------------------------------------------------------------- one step

def train_step(step, model, ddp, ema, optimizers, dataset, args, world):
    """One optimiser step on this rank's share of the batch; its diffusion loss (0-d tensor)."""
    share, device = args.global_batch // world.size, world.device
    mine = slice(world.rank * share, (world.rank + 1) * share)
    index = batch_indices(step, args.global_batch, len(dataset.train), args.seed)[mine]
    # draws of the whole batch: the same however it is shared out
    draws = model.randomness(args.global_batch, generator(device, args.seed, step))
    draws = {name: z[mine].chunk(args.accumulate) for name, z in draws.items()}
    torch.manual_seed(hash((args.seed, step, world.rank)))                   # dropout

    total = 0.0
    for j, part in enumerate(index.chunk(args.accumulate)):
        first = step * args.global_batch + mine.start + j * len(part)
        x, y = dataset.train.batch(part, key=(args.seed, first))
        x = patchify(x, dataset.patch)
        if device.type != "cpu":             # pinned: the host goes on while the GPU fetches it
            x, y = (z.contiguous().pin_memory().to(device, non_blocking=True) for z in (x, y))
        last = j == args.accumulate - 1
        with amp(device), nullcontext() if last or world.size == 1 else ddp.no_sync():
            given = {name: z[j] for name, z in draws.items()}
            loss = ddp(x, y, given) / args.accumulate
            loss.backward()
        total = total + loss.detach()

    if args.settings["clip"]:
        nn.utils.clip_grad_norm_(model.parameters(), args.settings["clip"])
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    decay = min(args.settings["ema_decay"], (1 + step) / (10 + step))        # young: forgets fast
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    return total


def amp(device):
    """bf16 autocast on GPUs that have it; nothing elsewhere (and never fp16)."""
    # emulated bf16 (T4, V100, RTX 20) is slower than fp32
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


@torch.no_grad()
def heldout_loss(ema, dataset, args, device, batch=128):
    """Mean diffusion loss of the averaged weights on held-out images, always the same."""
    n, total = min(args.settings["eval_images"], len(dataset.heldout)), 0.0
    for k in range(0, n, batch):
        x, y = dataset.heldout.batch(torch.arange(k, min(k + batch, n)))
        x, draws = patchify(x, dataset.patch), ema.randomness(len(y), generator(device, k))
        with amp(device):
            total += ema.loss(x.to(device), y.to(device), draws).item() * len(y)
    return total / n


def checkpoint_blocks(model):
    """Keep only each block's input for the backward pass: exact, about a third slower."""
    for module in model.modules():
        for block in module if isinstance(module, nn.ModuleList) else ():
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def parallel(model, args, world):
    """What computes the loss, as the flags say: the model itself, in DDP, compiled."""
    if args.checkpoint_blocks:
        checkpoint_blocks(model)
    if world.size > 1:
        own = [world.device.index] if world.device.type == "cuda" else None
        model = DDP(model, own, gradient_as_bucket_view=True)
    if args.compile:
        import fast
        model = fast.compiled(model)
    return model


# ---------------------------------------------------------------- runs

def settings_of(args):
    """All flags and settings of a run, but the architecture, as a dict."""
    flags = {k: v for k, v in vars(args).items() if not k.startswith("_")}
    del flags["architecture"]
    return flags.pop("settings") | flags


def resume(path, model, ema, optimizers, dataset, args):
    """Load a checkpoint of this very run: (step, records); ValueError names whatever differs."""
    state = read_checkpoint(path)
    check_run(state, path)

    def decisive(args, config, data):
        flags = {k: v for k, v in args.items() if k not in FREE}
        return {**flags, **config, "classes": data["class_names"], "images": data["n_train"],
                "latents": [(data.get("vae") or {}).get("fingerprint"),
                            f"scale {(data.get('vae') or {}).get('scale') or 1:.5g}"]}

    absent = {f.name: f.default for f in fields(Config)}             # in an older checkpoint
    old = decisive(state["args"], absent | state["config"], state["data"])
    new = decisive(settings_of(args), asdict(model.cfg), dataset.facts)
    changed = [f"{k} {str(old.get(k))[:60]} -> {str(v)[:60]}" for k, v in new.items()
               if old.get(k) != v]
    if changed:
        raise ValueError(f"{path} holds another run ({'; '.join(changed)}); repeat its flags to "
                         "resume it or choose another --out_dir")

    if len(state["optimizers"]) != len(optimizers):
        raise ValueError(f"{path} holds {len(state['optimizers'])} optimisers, this run has "
                         f"{len(optimizers)}; it may be damaged")
    try:
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            load_moments(optimizer, saved, state["step"])
    except (RuntimeError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} does not fit the run that it names: {error}") from None
    return state["step"], state["records"]


def load_moments(optimizer, saved, step):
    """Load the state of an optimiser after `step` steps; its settings follow from the flags.
    ValueError if it is not that of each parameter."""
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, own in zip(optimizer.param_groups, groups):
        group.update(own)
    names = {"momentum"} if isinstance(optimizer, Muon) else {"step", "exp_avg", "exp_avg_sq"}
    for p in [p for group in optimizer.param_groups for p in group["params"]]:
        held = optimizer.state.get(p, {})
        if set(held) != (names if step else set()) or not all(
                z.shape in (p.shape, ()) and z.is_floating_point() for z in held.values()):
            raise ValueError(f"the moments of {type(optimizer).__name__} are of other shapes")


def save(path, model, ema, optimizers, step, records, dataset, args):
    """Checkpoint and metrics, unless something is not finite: then the old checkpoint stays."""
    state = {"config": asdict(model.cfg), "model": model.state_dict(), "ema": ema.state_dict(),
             "optimizers": [o.state_dict() for o in optimizers], "step": step, "records": records,
             "args": settings_of(args), "data": dataset.facts,
             "versions": {"torch": str(torch.__version__), "numpy": np.__version__}}
    if not all(map(finite, tensors(state))) or not math.isfinite(
            records[-1]["heldout_loss"] if records else 0):
        raise SystemExit(diverged("weights or held-out loss are not finite", step, path, args))
    save_run(path, state)


def diverged(what, step, path, args):
    return (f"{what} at about step {step}. Likely causes: a learning rate that is too high (--lr "
            f"{args.lr:g}; try a third), bad pixels or latents, a failing GPU. Last good "
            f"checkpoint: {path} at step {read_checkpoint(path)['step']}")


def sample_grid(path, ema, dataset, args, columns=10):
    """One row per class (the first 20), from the averaged weights; its path, or why not."""
    if dataset.latents and not dataset.vae:
        return "no samples.png, as these latents have no decoder here (see sample.py --vae)"
    y = torch.arange(min(len(dataset.class_names), 20)).repeat_interleave(columns)
    scale = GUIDANCE if ema.cfg.class_dropout else 1.0
    x = draw(ema, y, range(len(y)), args.seed, cfg_scale=scale)
    write_png(path, image_grid(to_uint8(dataset.decode(x)), columns))
    return path


def main():
    args, start = parse_args(), None
    world = World(args.device)
    if args.init:
        import finetune
        start = finetune.Start(args)
    dataset = datasets.load(args.dataset, size=args.size, patch=args.patch, device=world.device,
                            plan=args.dry_run, scale=start and start.scale,
                            **datasets.flags_of(args.dataset, args))
    args.size = dataset.size
    shape = {"token_dim": dataset.token_dim, "grid": dataset.grid,
             "num_classes": len(dataset.class_names)}
    cfg = (start.config(dataset, shape) if start else
           preset(args.model, **args.architecture | shape))
    share, rest = divmod(args.global_batch, world.size * args.accumulate)
    if rest:
        raise ValueError(f"--global_batch {args.global_batch} must be a multiple of processes x "
                         f"--accumulate = {world.size} x {args.accumulate}")
    args.check_used("steps", "lr", "seed", "eval_every", "out_dir", "checkpoint_blocks",
                    "compile" if world.device.type == "cuda" else "threads")

    torch.manual_seed(args.seed)                         # the same weights on every rank
    with torch.device("meta" if args.dry_run else "cpu"):
        model = build(cfg)
    if start and not args.dry_run:
        start.fill(model, dataset.class_names)
    if world.rank == 0:
        print(f"{args.model} on {args.dataset}: {model.num_params / 1e6:.3g}M parameters, "
              f"{cfg.n_tokens} tokens of {cfg.token_dim}, {len(dataset.train)} training and "
              f"{len(dataset.heldout)} held-out images, {len(dataset.class_names)} classes")
    if args.dry_run:
        import plan
        print(settings_of(args), cfg, sep="\n")
        plan.describe(cfg, share, args.global_batch, args.steps, args.checkpoint_blocks)
    else:
        with lock(Path(args.out_dir)) if world.rank == 0 else nullcontext():
            train(model.to(world.device), dataset, args, world)
    if world.size > 1:
        dist.destroy_process_group()


def begin(path, parts, dataset, args, world):
    """(step, records) of the checkpoint at `path`; where there is none, or one without a step, a
    first one is saved, to show that saving works. parts: model, ema, optimizers."""
    chief = world.rank == 0
    found = chief and has_steps(path)
    if chief:
        # in fp32: weights, their average, and a moment or two of each gradient
        moments = sum(p.numel() * (1 if isinstance(o, Muon) else 2) for o in parts[2]
                      for group in o.param_groups for p in group["params"])
        check_space(path, 4 * (2 * parts[0].num_params + moments))
        if not found:
            save(path, *parts, 0, [], dataset, args)
    world.mean(0)            # all read one file: a run that is just ending might still replace it
    step, records = resume(path, *parts, dataset, args)
    if found:
        write_records(path, records)                     # a kill may have come between the two
        print(f"resuming {path} at step {step} of {args.steps}" if step < args.steps else
              f"{path} has its {step} steps: nothing to train. Raise --steps to go on")
    return step, records


def train(model, dataset, args, world):
    """Train to --steps, from the checkpoint in --out_dir if there is one."""
    set_threads(model, world.device, args.threads)
    model.diffloss.x0_bound = dataset.x0_bound
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizers = make_optimizers(model, args)
    chief, parts, stop = world.rank == 0, (model, ema, optimizers), []
    out = Path(args.out_dir)
    path = next((out / name for name in NAMES if (out / name).exists()), out / "ckpt.pt")
    first, records = begin(path, parts, dataset, args, world)
    ddp = parallel(model, args, world)

    losses, next_read, stopping = deque(maxlen=20), first, 0
    last_step, last_time = first, time.perf_counter()                        # of the last reading
    with on_signal(stop.append), tqdm(                   # finish the step, save, exit 0
            range(first, args.steps), initial=first, total=args.steps, desc="training",
            unit="step", disable=None if chief else True, dynamic_ncols=True) as bar:
        for step in bar:
            losses.append(train_step(step, model, ddp, ema, optimizers, dataset, args, world))
            done = step + 1
            due = done == args.steps or done % args.eval_every == 0
            # to read the loss waits for a GPU: once a second, where many processes agree to stop,
            # too; one alone meets a signal at once
            if not due and done < next_read and not (stop and world.size == 1):
                continue

            seconds = max(time.perf_counter() - last_time, 1e-6) / (done - last_step)  # of a step
            loss, stopping, seconds = world.mean(torch.stack([*losses]).mean(), len(stop), seconds)
            if not math.isfinite(loss):
                raise SystemExit(diverged(f"the loss is {loss}", done, path, args) if chief else 1)
            next_read, rate = done + max(1, int(1 / seconds)), args.global_batch / seconds
            bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s")
            if chief and (due or stopping):
                held = heldout_loss(ema, dataset, args, world.device)
                records.append({"step": done, "loss": loss, "heldout_loss": held,
                                "lr": learning_rate(step, args), "images_per_s": round(rate, 1)})
                save(path, *parts, done, records, dataset, args)
                bar.write(f"step {done}: loss {loss:.4f}, held out {held:.4f}, {rate:.0f} images/s")
            if stopping:
                break
            last_step, last_time = done, time.perf_counter()
            if due:
                losses.clear()

    if chief and stopping:
        print(f"stopped by a signal; saved {path}; to resume, run the same command again")
    elif chief:
        if records:
            plot_loss(out / "loss.png", records)
        picture = sample_grid(out / "samples.png", ema, dataset, args)
        print(f"{path}, {picture}; more images: python sample.py --ckpt {out}")


if __name__ == "__main__":
    run(main)
