"""Train AR, MAR or CDM: one GPU, a CPU, or many under torchrun.

    python train.py                                     digits on a CPU, minutes
    python train.py --dataset folder --data_dir photos  your own images
    python train.py --dataset imagenet256 --data_dir ImageNet --vae kl16.ckpt --model mar-b     latents, encoded once
    torchrun --nproc_per_node 8 train.py ...            the same on 8 GPUs; --global_batch is shared out

To resume, run the same command again. Every random number of step s follows from (seed, s), so that a resumed
run equals an uninterrupted one, and 2 processes x batch 8 equal 1 process x batch 16.
What it leaves in --out_dir: ckpt.pt, metrics.jsonl, loss.png, samples.png.
"""
import copy
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import data as datasets
from data import Parser, batch_indices, number, patchify, run
from diffloss import ImageNoise, Sampler
from model import GUIDANCE, PRESETS, amp, build, checkpoint_blocks, pick_device, preset, read_checkpoint, save_checkpoint, set_threads
from plan import HARDWARE, UTILISATION, hours, memory_estimate, sampling_flops, training_flops

SMALL = dict(model="gpt-tiny", steps=2400, global_batch=64, lr=2e-3, lr_schedule="cosine", warmup=200,
             ema_decay=0.999, weight_decay=0.02, optimizer="muon", size=16, patch=4, eval_every=400)
IMAGENET = dict(model="gpt-xl", steps=250_000, global_batch=2048, lr=8e-4, lr_schedule="constant", warmup=62_500,
                ema_decay=0.9999, weight_decay=0.02, optimizer="adamw", patch=1, eval_every=5000)
SHAPES = {**SMALL, "diffusion_batch_mul": 4}
DEFAULTS = {"digits": SMALL, "digits-tune": SMALL, "shapes": SHAPES, "shapes-tune": SHAPES, "folder": SMALL,
            "imagenet256": {**IMAGENET, "size": 256}, "imagenet512": {**IMAGENET, "size": 512}}
LATENT = dict(size=256, patch=1)                 # any folder with a VAE
# All orders take longer to learn than one: after 2400 steps on the digits the held-out loss is .101, where gpt-tiny has .090, after 6000 .093
PATIENT = {"mar-tiny": dict(steps=6000)}         # on the small data sets


def parse_args(argv=None):
    p = Parser(description="Train a generator. Defaults are those of --dataset (and --model); to resume, run the same command again.")
    p.add_argument("--dataset", choices=datasets.DATASETS, default="digits", help="what to train on; imagenet256/512 need --data_dir and --vae")
    p.add_argument("--data_dir", help="folder of images (folder: ROOT/<class>/*.png; imagenet: its train folder)")
    p.add_argument("--vae", help="kl16.ckpt: train on its latents (imagenet256/512, and folder if given)")
    p.add_argument("--cache_dir", help="where the latents are kept, on a disk that all nodes share (default: cache/<dataset>)")
    p.add_argument("--size", type=number(int, 4, 2048), help="pixels of a side")
    p.add_argument("--patch", type=number(int, 1, 64), help="pixels of a token's side")
    p.add_argument("--max_bad", type=number(float, 0, 1), default=0.01, help="share of unreadable images that is tolerated")
    p.add_argument("--model", help=f"one of {', '.join(PRESETS)}")
    p.add_argument("--dropout", type=number(float, 0, 0.9), help="dropout in the transformer (default: the preset's)")
    p.add_argument("--class_dropout", type=number(float, 0, 1), default=0.1, help="share of labels dropped, for guidance")
    p.add_argument("--diffusion_batch_mul", type=number(int, 1, 64), help="uses of each token per step, with fresh t and noise (default: the preset's; shapes 4)")
    p.add_argument("--inverse", action="store_true", default=None, help="train T^-1 beside the model (default: the preset's)")
    p.add_argument("--no-inverse", dest="inverse", action="store_false", default=None, help="do not train T^-1")
    p.add_argument("--no-rope", dest="rope", action="store_false", default=None, help="mar: learned positions alone, as in MAR (default: the preset's)")
    p.add_argument("--buffer", type=number(int, 0), help="conditions kept per class and position for sample.py --target buffer (default: the preset's)")
    p.add_argument("--x0_bound", type=number(float, 0), help="bound of |x0| in sampling, 0 = off (default: the data's range)")
    p.add_argument("--out_dir", default="out", help="where the run lives")
    p.add_argument("--steps", type=number(int, 0), help="optimiser steps in all (mar-tiny on the small data sets: 6000)")
    p.add_argument("--global_batch", type=number(int, 1), help="images per optimiser step over all processes")
    p.add_argument("--accumulate", type=number(int, 1), default=1, help="micro-batches per optimiser step and process")
    p.add_argument("--optimizer", choices=("adamw", "muon"), help="muon: orthogonalised updates of the blocks' matrices, AdamW for the rest")
    p.add_argument("--lr", type=number(float, 0), help="peak learning rate")
    p.add_argument("--lr_schedule", choices=("constant", "cosine"), help="after the warm-up")
    p.add_argument("--warmup", type=number(int, 0), help="steps of linear warm-up")
    p.add_argument("--weight_decay", type=number(float, 0), help="AdamW's, on matrices outside the head")
    p.add_argument("--clip", type=number(float, 0), default=3.0, help="gradient norm limit")
    p.add_argument("--ema_decay", type=number(float, 0, 1), help="of the averaged weights, which are those that sample")
    p.add_argument("--seed", type=number(int, 0), default=0, help="of weights, data order and noise")
    p.add_argument("--eval_every", type=number(int, 1), help="steps between held-out loss and checkpoint")
    p.add_argument("--eval_images", type=number(int, 1), default=1024, help="held-out images in the held-out loss, at most")
    p.add_argument("--samples_per_class", type=number(int, 1), default=10, help="images a class in samples.png")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    p.add_argument("--threads", type=number(int, 0), default=0, help="CPU threads, 0 = 1 for small models, else all")
    p.add_argument("--compile", action="store_true", help="torch.compile, CUDA only")
    p.add_argument("--checkpoint_blocks", action="store_true", help="recompute blocks in the backward pass: less memory, exact, slower")
    p.add_argument("--dry-run", action="store_true", help="print the resolved configuration, sizes and memory, and stop")
    known, _ = p.parse_known_args(argv) if "-h" not in (argv or sys.argv) and "--help" not in (argv or sys.argv) else (None, None)
    name, model, latent = (known.dataset, known.model, known.vae) if known else ("digits", None, None)
    patient = PATIENT.get(model, {}) if not name.startswith("imagenet") else {}
    p.set_defaults(**{**DEFAULTS[name], **(LATENT if latent and name == "folder" else {}), **patient})
    return p.parse_args(argv)


class World:
    """Rank and size under torchrun, or 0 of 1 alone; the device of this process."""

    def __init__(self, device):
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.device = pick_device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.size > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def mean(self, value):
        """Mean over the ranks of a float or 0-d tensor, as a float."""
        value = torch.as_tensor(value, dtype=torch.float32, device=self.device).detach().clone()
        if self.size > 1:
            dist.all_reduce(value)
        return value.item() / self.size


def generator(device, *key):
    """A random stream that is a function of its key."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(seed)


def learning_rate(step, args):
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    if args.lr_schedule == "constant":
        return args.lr
    done = (step - args.warmup) / max(args.steps - args.warmup, 1)
    return args.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizers(model, args):
    """[AdamW (.9, .95)], without decay on vectors and on the head (as in MAR); `muon` takes the blocks' matrices from it."""
    muon = lambda name, p: args.optimizer == "muon" and p.dim() == 2 and "blocks." in name
    decayed = lambda name, p: p.dim() > 1 and not name.startswith(("diffloss.", "inverse.")) and "embed_learned" not in name
    named = list(model.named_parameters())
    rest = [(n, p) for n, p in named if not muon(n, p)]
    groups = [{"params": [p for n, p in rest if decayed(n, p)], "weight_decay": args.weight_decay},
              {"params": [p for n, p in rest if not decayed(n, p)], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    matrices = [p for n, p in named if muon(n, p)]
    return [adamw, Muon(matrices, args.lr, args.weight_decay)] if matrices else [adamw]


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each matrix is made orthogonal, so that all its directions are learned at one rate.

    W <- W (1 - lr decay) - scale lr sqrt(max(1, rows / columns)) orthogonal(momentum)   (K. Jordan et al. 2024, Muon)
    The digits need half the steps of AdamW for the same held-out loss. torch.optim.Muon (since 2.9) works in bf16, which
    is slow on most CPUs, and on one matrix at a time; here matrices of one shape share their products, in fp32.
    `scale`: an orthogonal update moves each weight by about 1 / sqrt(columns) of lr, AdamW's by lr; 10 makes up for it.
    """

    def __init__(self, matrices, lr, weight_decay, momentum=0.95, scale=10.0):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "scale": scale})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, beta = group["lr"] * group["scale"], group["momentum"]
            for shape in dict.fromkeys(p.shape for p in group["params"]):
                matrices = [p for p in group["params"] if p.shape == shape]
                grads = torch.stack([p.grad for p in matrices])                          # (n, rows, columns)
                average = torch.stack([self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in matrices])
                average.lerp_(grads, 1 - beta)
                update = orthogonal(grads.lerp(average, beta)) * max(1, shape[0] / shape[1]) ** 0.5
                for p, a, u in zip(matrices, average, update):
                    self.state[p]["momentum"].copy_(a)
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(u, alpha=lr)


def orthogonal(g, steps=5):
    """(n, rows, columns) -> the same with singular values of .7 to 1.2, but for the tiniest: a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315                                                    # steepest at 0 (Jordan et al. 2024)
    x = g / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.mT if g.shape[1] > g.shape[2] else x
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if g.shape[1] > g.shape[2] else x


def train_step(step, model, ddp, ema, optimizers, dataset, args, world):
    """One optimiser step on this rank's share of the global batch; returns the diffusion loss of the share (0-d tensor)."""
    share, device = args.global_batch // world.size, world.device
    mine = slice(world.rank * share, (world.rank + 1) * share)
    index = batch_indices(step, args.global_batch, len(dataset.train), args.seed)[mine]
    draws = model.draw(args.global_batch, generator(device, args.seed, step))        # of the whole batch: the same
    draws = {name: z[mine].chunk(args.accumulate) for name, z in draws.items()}      # however it is shared out
    torch.manual_seed(hash((args.seed, step, world.rank)))                           # dropout
    total = 0.0
    for j, part in enumerate(index.chunk(args.accumulate)):
        x, y = dataset.train.batch(part, key=(args.seed, step * args.global_batch + mine.start + j * len(part)))
        x, y = patchify(x, dataset.patch).to(device, non_blocking=True), y.to(device, non_blocking=True)
        last = j == args.accumulate - 1
        with amp(device), nullcontext() if last or world.size == 1 else ddp.no_sync():
            loss = ddp(x, y, {name: z[j] for name, z in draws.items()}) / args.accumulate
            loss.sum().backward()
        total = total + loss[0].detach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    decay = min(args.ema_decay, (1 + step) / (10 + step))                            # young averages forget quickly
    with torch.no_grad():                                                            # else the average would keep every step's graph
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        for kept, new in zip(ema.buffers(), model.buffers()):                        # the condition buffer, not averaged
            kept.copy_(new)
    return total


@torch.no_grad()
def heldout_loss(ema, dataset, args, device, batch=128):
    """Mean diffusion loss of the averaged weights on held-out images, always the same ones with the same noise."""
    n, total = min(args.eval_images, len(dataset.heldout)), 0.0
    for k in range(0, n, batch):
        x, y = dataset.heldout.batch(torch.arange(k, min(k + batch, n)))
        with amp(device):
            loss = ema.loss(patchify(x, dataset.patch).to(device), y.to(device), ema.draw(len(y), generator(device, k)))
        total += loss[0].item() * len(y)
    return total / n


def checkpoint(model, ema, optimizers, step, dataset, args):
    return {"config": asdict(model.cfg), "model": model.state_dict(), "ema": ema.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
            "step": step, "args": vars(args),
            "data": {**dataset.facts, "data_dir": args.data_dir, "class_names": dataset.class_names, "x0_bound": dataset.x0_bound},
            "versions": {"torch": str(torch.__version__), "numpy": np.__version__, "python": sys.version.split()[0]}}


def resume(path, model, ema, optimizers, dataset, args):
    """Load a checkpoint of this very run and return its step; ValueError names whatever differs."""
    state = read_checkpoint(path)
    free = {"steps", "accumulate", "device", "threads", "compile", "dry_run", "eval_every", "eval_images", "samples_per_class", "out_dir",
            "max_bad", "data_dir", "vae", "cache_dir", "checkpoint_blocks"}
    changed = [f"--{k} {state['args'].get(k)} -> {v}" for k, v in vars(args).items() if k not in free and state["args"].get(k) != v]
    if asdict(model.cfg) != state["config"] and not changed:
        changed = [f"{k} {state['config'].get(k)} -> {v}" for k, v in asdict(model.cfg).items() if state["config"].get(k) != v]
    if dataset.class_names != state["data"]["class_names"] or dataset.facts["n_train"] != state["data"]["n_train"]:
        changed.append(f"the data: {state['data']['n_train']} images of {len(state['data']['class_names'])} classes "
                       f"-> {dataset.facts['n_train']} of {len(dataset.class_names)}")
    if (dataset.facts.get("vae") or {}).get("fingerprint") != (state["data"].get("vae") or {}).get("fingerprint"):
        changed.append("another VAE than that of the latents so far")
    if changed:
        raise ValueError(f"{path} holds another run ({'; '.join(changed)}); repeat its flags to resume it or choose another --out_dir")
    model.load_state_dict(state["model"])
    ema.load_state_dict(state["ema"])
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    return state["step"]


def describe(cfg, dataset, args, world):
    """Print what will be trained and what it takes; returns the bytes of weights and optimiser."""
    share = args.global_batch // world.size // args.accumulate
    model, weights, activations = memory_estimate(cfg, share, args.checkpoint_blocks)
    half = " (about half of it under bf16)" if world.device.type == "cuda" else ""
    if args.dry_run:
        print(json.dumps({**vars(args), "config": asdict(cfg), "data": dataset.facts}, indent=2))
    print(f"{args.model} on {args.dataset}: {model.num_params / 1e6:.3g}M parameters, {cfg.n_tokens} tokens of "
          f"{cfg.token_dim} per image, {len(dataset.train)} training and {len(dataset.heldout)} held-out images, "
          f"{len(dataset.class_names)} classes")
    print(f"memory per process: {weights / 2**30:.2f} GiB weights, gradients, AdamW and EMA + about {activations / 2**30:.2f} GiB "
          f"activations at {share} images a pass{half}")
    if args.dry_run:
        step = training_flops(cfg, args.checkpoint_blocks) * args.global_batch
        num_iter = min(64, cfg.n_tokens) if cfg.kind == "mar" else None
        image = sampling_flops(cfg, num_iter=num_iter)
        each = lambda flops: ", ".join(f"{hours(flops, name):.3g} h on {name}" for name in HARDWARE)
        print(f"training: {step / 1e12:.4g} TFLOP a step; {args.steps} steps take about {each(step * args.steps)}")
        print(f"sampling, guided, 100 evaluations a patch{f', {num_iter} AR steps' if num_iter else ''}: {image / 1e12:.4g} TFLOP an image; "
              f"50,000 take about {each(50_000 * image)} (at {UTILISATION:.0%} of the peak: an assumption)")
    return weights


def check_out_dir(out, bytes_needed):
    """Fail before training where the run could not be saved."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".write_test").write_bytes(b"x")
        (out / ".write_test").unlink()
    except OSError as error:
        raise ValueError(f"--out_dir {out} cannot be written: {error.strerror or error}") from None
    free = shutil.disk_usage(out).free
    if free < 2 * bytes_needed:
        raise ValueError(f"--out_dir {out} has {free / 2**30:.1f} GiB free, but a checkpoint and its successor need "
                         f"{2 * bytes_needed / 2**30:.1f} GiB; free some space or choose another --out_dir")


def read_metrics(path, step):
    """The records up to `step`: those of a run that was killed after its last checkpoint are repeated."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [r for r in map(json.loads, lines) if r["step"] <= step]


def plot_loss(path, records):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(5, 3), layout="constrained")
    for key, label in (("loss", "training"), ("heldout_loss", "held out, averaged weights")):
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        ax.plot(*zip(*points), label=label, marker=".")
    ax.set(xlabel="step", ylabel="diffusion loss", yscale="log")
    ax.legend()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def sample_grid(path, ema, dataset, args, device):
    """One row per class (the first 20), from the averaged weights."""
    columns = args.samples_per_class
    y = torch.arange(min(len(dataset.class_names), 20)).repeat_interleave(columns)
    bound = dataset.x0_bound if args.x0_bound is None else args.x0_bound or None
    with amp(device):
        x = ema.generate(y.to(device), ImageNoise(args.seed, range(len(y)), device), Sampler(x0_bound=bound),
                         GUIDANCE if ema.cfg.class_dropout else 1.0)
    images = datasets.to_uint8(dataset.decode(x))
    datasets.image_grid(images, columns).save(path)


def main():
    args = parse_args()
    dataset = datasets.load(args.dataset, args.data_dir, args.size, args.patch, args.max_bad, args.vae, args.cache_dir,
                            pick_device(args.device), plan=args.dry_run)
    options = {k: getattr(args, k) for k in ("dropout", "class_dropout", "diffusion_batch_mul", "inverse", "rope", "buffer")
               if getattr(args, k) is not None}
    cfg = preset(args.model, token_dim=dataset.token_dim, grid=dataset.grid, num_classes=len(dataset.class_names), **options)
    world = World(args.device)
    if args.global_batch % (world.size * args.accumulate):
        raise ValueError(f"--global_batch {args.global_batch} must be a multiple of processes x --accumulate = {world.size} x {args.accumulate}")
    if args.compile and world.device.type != "cuda":
        raise ValueError("--compile is for CUDA; on a CPU it gains little")
    if args.dry_run:
        return describe(cfg, dataset, args, world)
    torch.manual_seed(args.seed)                                                     # the same weights on every rank
    model = build(cfg).to(world.device)
    set_threads(model, world.device, args.threads)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    if args.checkpoint_blocks:
        checkpoint_blocks(model)
    optimizers = make_optimizers(model, args)
    out, chief = Path(args.out_dir), world.rank == 0
    if chief:
        check_out_dir(out, describe(cfg, dataset, args, world))
    train(model, ema, optimizers, dataset, args, world, out, chief)
    if world.size > 1:
        dist.destroy_process_group()


def train(model, ema, optimizers, dataset, args, world, out, chief):
    path, first = out / "ckpt.pt", 0
    if path.exists():
        first = resume(path, model, ema, optimizers, dataset, args)
        if chief:
            print(f"resuming {path} at step {first} of {args.steps}" if first < args.steps else
                  f"{path} has its {first} steps: nothing to train. Raise --steps to go on, or choose another --out_dir")
    elif chief:
        save_checkpoint(path, checkpoint(model, ema, optimizers, 0, dataset, args))   # shows now that saving works
    records = read_metrics(out / "metrics.jsonl", first)
    ddp = torch.compile(model) if args.compile else model
    ddp = DDP(ddp, device_ids=[world.device.index] if world.device.type == "cuda" else None) if world.size > 1 else ddp

    stop = []                                                                        # signals: finish the step, save, exit 0
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, frame: stop.append(number))
    began, since, losses, saved = time.time(), time.time(), [], first
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc="training", unit="step",
               disable=None if chief else True, dynamic_ncols=True)
    for step in bar:
        losses.append(train_step(step, model, ddp, ema, optimizers, dataset, args, world))
        ended, done = step + 1 == args.steps, step + 1
        if step % 20 == 19 or ended or done % args.eval_every == 0:                  # the only points where the host waits
            loss, stopping = world.mean(torch.stack(losses).mean()), world.mean(len(stop)) > 0
            if not math.isfinite(loss):
                raise SystemExit(1 if not chief else                                 # one message, not one from every rank
                                 f"the loss is {loss} at about step {done}. Likely causes: a learning rate that is too high "
                                 f"(--lr {args.lr:g}; try a third), bad pixels or latents, a failing GPU. "
                                 f"Last good checkpoint: {path} at step {saved}")
            rate = args.global_batch / (time.time() - since) * len(losses)
            bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s")
            if ended or done % args.eval_every == 0 or stopping:
                if chief:
                    record = {"step": done, "loss": loss, "heldout_loss": heldout_loss(ema, dataset, args, world.device),
                              "lr": learning_rate(step, args), "images_per_s": round(rate, 1)}
                    records.append(record)
                    save_checkpoint(path, checkpoint(model, ema, optimizers, done, dataset, args))
                    (out / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
                    bar.write("step {step}: loss {loss:.4f}, held out {heldout_loss:.4f}, {images_per_s:.0f} images/s".format(**record))
                saved = done
            if stopping:
                bar.close()
                if chief:
                    print(f"stopped by a signal; saved {path} at step {done}; to resume, run the same command again")
                return
            losses, since = [], time.time()
    if chief:
        if first < args.steps:
            print(f"trained {args.steps - first} steps in {time.time() - began:.0f} s")
        if records:
            plot_loss(out / "loss.png", records)
        sample_grid(out / "samples.png", ema, dataset, args, world.device)
        print(f"{path}, {out / 'samples.png'}, {out / 'loss.png'}; more images: python sample.py --ckpt {out}")


if __name__ == "__main__":
    run(main)
