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
from command import (Parser, World, check_memory, number, on_signal, parse_settings, run,
                     set_threads)

import argparse
import copy
import math
import sys
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import data as datasets
from data import DATASETS, batch_indices, image_grid, patchify, to_uint8
from files import write_png
from model import GUIDANCE, PRESETS, Config, build, preset
from muon import Muon
from runs import Folder, lock, plot_loss, settings_of
from sample import FAST, LARGE, draw

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
LIMITS = {**dict.fromkeys(SETTINGS, (0, 2 ** 30)), "optimizer": ("muon", "adamw"),
          "lr_schedule": ("cosine", "constant"), "ema_decay": (0, 1), "eval_images": (1, 2 ** 30)}
# all orders take longer to learn than one: digits, 2400 steps .101 held out, 6000 .093 (gpt .090)
PATIENT = {"mar-tiny": dict(steps=6000)}


def parse_args(argv=None):
    p = Parser(description="Train a generator. To resume, run the same command again.")
    add = p.add_argument
    add("--dataset", choices=DATASETS, metavar="NAME", default="digits",
        help=f"what to train on: {', '.join(DATASETS)}")
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
    add("--threads", type=number(int, 0, 1024), default=0,
        help="CPU threads; 0: one for small models, else all")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="CUDA: train faster, after a minute or two (default: from 50M parameters on)")
    add("--checkpoint_blocks", action="store_true",
        help="compute activations again in the backward pass: less memory, exact, a third slower")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE",
        help="any other setting of train.SETTINGS or model.Config, such as dropout=0")
    add("--dry-run", action="store_true", help="print what the run would take, and stop")

    # data set and model decide the defaults of other flags: these two are read first
    argv = sys.argv[1:] if argv is None else argv
    early, _ = p.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    which = DATASETS[early.dataset]
    defaults = {**SETTINGS, **PATIENT.get(early.model, {}), **which.defaults}
    if which.load and "vae" in which.reads and early.vae:
        defaults.update(size=256, patch=1)
    p.set_defaults(**{k: defaults.pop(k) for k in [*defaults] if k in vars(early)})
    args = p.parse_args(argv)
    kinds = {f.name: f.type for f in fields(Config)} | {k: type(v) for k, v in SETTINGS.items()}
    values = defaults | parse_settings(args.set, kinds, LIMITS)
    for name in {"token_dim", "grid", "num_classes"} & set(values):
        raise ValueError(f"--set {name}={values[name]} would change nothing: it follows from "
                         "--dataset, --size and --patch")
    vars(args).update({name: values.pop(name) for name in SETTINGS}, architecture=values)
    return args


# ---------------------------------------------------------------- optimisers

def learning_rate(step, args):
    """Linear warm-up to --lr, then half a cosine down to 2 % of it."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    if args.lr_schedule == "constant":
        return args.lr
    done = (step - args.warmup) / max(args.steps - args.warmup, 1)
    return args.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizers(model, args):
    """[AdamW (.9, .95)], without decay on vectors and the head (as in MAR). Muon takes the matrices
    of all blocks from it, those of the head's residual blocks too, and decays them."""
    decay, muon = args.weight_decay, args.optimizer == "muon"
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


# ---------------------------------------------------------------- one step

def stream(device, *key):
    """Random numbers that are a function of their key."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(seed)


def train_step(step, model, ddp, ema, optimizers, dataset, args, world):
    """One optimiser step on this rank's share of the batch; its diffusion loss (0-d tensor)."""
    share, device = args.global_batch // world.size, world.device
    mine = slice(world.rank * share, (world.rank + 1) * share)
    index = batch_indices(step, args.global_batch, len(dataset.train), args.seed)[mine]
    # draws of the whole batch: the same however it is shared out
    draws = model.randomness(args.global_batch, stream(device, args.seed, step))
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

    if args.clip:
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    decay = min(args.ema_decay, (1 + step) / (10 + step))                    # young: forgets fast
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
    n, total = min(args.eval_images, len(dataset.heldout)), 0.0
    for k in range(0, n, batch):
        x, y = dataset.heldout.batch(torch.arange(k, min(k + batch, n)))
        x, draws = patchify(x, dataset.patch), ema.randomness(len(y), stream(device, k))
        with amp(device):
            total += ema.loss(x.to(device), y.to(device), draws).item() * len(y)
    return total / n


def parallel(model, args, world):
    """What computes the loss: the model itself; of many processes in DDP; on CUDA compiled, if
    the flags say so or it is large."""
    large = FAST and world.device.type == "cuda" and model.num_params > LARGE
    if args.checkpoint_blocks:
        import fast
        fast.checkpoint_blocks(model)
    if world.size > 1:
        own = [world.device.index] if world.device.type == "cuda" else None
        model = DDP(model, own, gradient_as_bucket_view=True)
    if large if args.compile is None else args.compile:
        import fast
        model = fast.compiled(model)
    return model


# ---------------------------------------------------------------- the loop

def train(model, dataset, args, world):
    """Train to --steps, from the checkpoint in --out_dir if there is one."""
    set_threads(model, world.device, args.threads)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizers = make_optimizers(model, args)
    folder = Folder(args, model, ema, optimizers, dataset.facts)
    first = folder.begin(world)
    ddp = parallel(model, args, world)

    chief, losses, stop, stopping = world.rank == 0, deque(maxlen=20), [], 0
    last_read, last_time, next_read = first, time.perf_counter(), first
    with on_signal(stop.append), tqdm(                   # finish the step, save, exit 0
            range(first, args.steps), initial=first, total=args.steps, desc="training",
            unit="step", disable=None if chief else True, dynamic_ncols=True) as bar:
        for step in bar:
            losses.append(train_step(step, model, ddp, ema, optimizers, dataset, args, world))
            done = step + 1
            due = done == args.steps or done % args.eval_every == 0
            # to read the loss waits for a GPU: once a second, where many processes agree to stop,
            # too; one alone meets a signal at once
            if not (due or done >= next_read or stop and world.size == 1):
                continue

            seconds = max(time.perf_counter() - last_time, 1e-6) / (done - last_read)  # of a step
            loss, stopping, seconds = world.mean(torch.stack([*losses]).mean(), len(stop), seconds)
            if not math.isfinite(loss):
                raise SystemExit(folder.diverged(f"the loss is {loss}", done) if chief else 1)
            rate, next_read = args.global_batch / seconds, done + max(1, int(1 / seconds))
            bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s")
            if chief and (due or stopping):
                held = heldout_loss(ema, dataset, args, world.device)
                folder.save(done, loss=loss, heldout_loss=held, lr=learning_rate(step, args),
                            images_per_s=round(rate, 1))
                bar.write(f"step {done}: loss {loss:.4f}, held out {held:.4f}, {rate:.0f} images/s")
            if stopping:
                break
            if due:
                losses.clear()
            last_read, last_time = done, time.perf_counter()

    if chief and stopping:
        print(f"stopped by a signal; saved {folder.path}; to resume, run the same command again")
    elif chief:
        pictures(folder, ema, dataset, args)


def pictures(folder, ema, dataset, args):
    """The loss over the steps and images of every class, beside the checkpoint."""
    out = Path(args.out_dir)
    if folder.records:
        plot_loss(out / "loss.png", folder.records)
    picture = sample_grid(out / "samples.png", ema, dataset, args)
    print(f"{folder.path}, {picture}; more images: python sample.py --ckpt {out}")


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

    with torch.device("meta"):
        model = build(cfg)
    if not args.dry_run:
        check_memory(4 * model.num_params)
        torch.manual_seed(args.seed)                     # the same weights on every rank
        model = build(cfg)
    model.diffloss.x0_bound = dataset.x0_bound
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
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run(main)
