"""What a run takes before you start it: parameters, memory, FLOPs, hours; counted on the meta device, nothing is computed.

    python plan.py                          the paper's rows: commands and what they take (README_imagenet.md holds this output)
    python train.py --dry-run --model ...   what one run takes

FLOPs are those of matrix products (2 per multiply-add), by torch's own counter over the real loss and the real
sampler. Hours are FLOPs over the hardware's dense bf16 peak times UTILISATION, an assumption and no measurement.
"""
import math
from dataclasses import asdict, replace
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from diffloss import Sampler
from model import Config, build, checkpoint_blocks, preset

HARDWARE = {"8 x H100": (8 * 989e12, 80), "8 x A100": (8 * 312e12, 80), "1 x RTX 4090": (165e12, 24)}    # peak FLOP/s, GB each
UTILISATION = 0.35
IMAGENET = 1_281_167


def on_meta(cfg, recompute=False):
    """The model without memory, in training mode; built once, as initialising takes seconds even there."""
    return built(tuple(asdict(cfg).items()), recompute).train()


@lru_cache(maxsize=8)
def built(fields, recompute):
    with torch.device("meta"):
        model = build(Config(**dict(fields)))
    if recompute:
        checkpoint_blocks(model)
    return model


def one_image(model):
    """x, y, draws of one image on the meta device; of mar, the draw with the median number of masked tokens."""
    cfg = model.cfg
    draws = [model.draw(1, torch.Generator().manual_seed(k)) for k in range(31 if cfg.kind == "mar" else 1)]
    draws = sorted(draws, key=lambda d: d["t"].shape[1])[len(draws) // 2]
    x, y = torch.empty(1, cfg.n_tokens, cfg.token_dim, device="meta"), torch.empty(1, dtype=torch.long, device="meta")
    return x, y, {k: v.to("meta") for k, v in draws.items()}


def memory_estimate(cfg, share, recompute=False):
    """(model on the meta device, bytes of weights, gradients, Adam and EMA in fp32, bytes that autograd keeps for `share` images).

    With recompute, add what one block keeps.
    """
    def count(cfg):
        model, kept = on_meta(cfg, recompute), {}

        def keep(z):
            whole = z if z._base is None else z._base                                # views share memory; weights are counted already
            # a square per head is an attention matrix, which no fused kernel keeps; the meta device has none
            square = z.dim() in (3, 4) and z.shape[-1] == z.shape[-2] and cfg.n_head in z.shape[:2]
            if not square and not isinstance(whole, torch.nn.Parameter):
                kept[id(whole)] = whole
            return z
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda z: z):
            model.loss(*one_image(model))
        return sum(z.numel() * z.element_size() for z in kept.values())
    model = on_meta(cfg)
    return model, 20 * model.num_params, by_layers(cfg, count) * share


def empty(*shape, **options):
    return torch.empty(*shape, device="meta", **options)


def counted(fn, *args):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fn(*args)
    return counter.get_total_flops()


def by_layers(cfg, count):
    """count(cfg) of a deep model from shallow ones: FLOPs and memory are affine in the layers of the transformer and of the head."""
    small = replace(cfg, n_layer=1, head_depth=min(1, cfg.head_depth))
    one = count(small)
    total = one + (cfg.n_layer - 1) * (count(replace(small, n_layer=2)) - one)
    if cfg.head_depth > 1:
        total += (cfg.head_depth - 1) * (count(replace(small, head_depth=2)) - one)
    return total


def training_flops(cfg, recompute=False):
    """FLOPs of one image in one training step, forward and backward."""
    def count(cfg):
        model = on_meta(cfg, recompute)
        with FlopCounterMode(display=False) as counter:
            model.loss(*one_image(model)).sum().backward()
        return counter.get_total_flops()
    return by_layers(cfg, count)


def chain_flops(cfg, num_iter=None):
    """FLOPs of the transformer over the AR steps of one image.

    A step costs a quadratic in the number of known tokens (mar: attention of the encoder) or less (ar: one query on
    the cache), and mar's last block so much for each token drawn, so that four counted steps give all of them exactly.
    """
    model, N = on_meta(cfg).eval(), cfg.n_tokens

    def step(a, drawn=1):
        if cfg.kind == "mar":
            return model.step_conditions(empty(1, a, cfg.token_dim), empty(1, a, dtype=torch.long), empty(1, dtype=torch.long),
                                         empty(1, drawn, dtype=torch.long))
        h, cache = empty(1, 1, cfg.n_embd), empty(2, 1, cfg.n_head, N, cfg.n_embd // cfg.n_head)
        for block in model.blocks:
            h = block(h, model.cos[a:a + 1], model.sin[a:a + 1], cache, a)
        return model.x_proj(empty(1, 1, cfg.token_dim))

    at = sorted({0, N // 2, N - 1})
    cost = [counted(step, a) for a in at]
    lagrange = lambda a: sum(c * math.prod((a - z) / (x - z) for z in at if z != x) for x, c in zip(at, cost))
    each = counted(step, 0, 2) - cost[0] if cfg.kind == "mar" else 0                 # token drawn beyond the first
    return round(sum(lagrange(a) + (b - a - 1) * each for a, b in model.chain(num_iter)))


def sampling_flops(cfg, steps=100, num_iter=None, guided=True):
    """FLOPs of drawing one image: the whole chain with `steps` evaluations of the denoiser per patch."""
    def head(cfg, n, steps):
        c, z = empty(1, 1 if cfg.kind == "cdm" else n, cfg.n_embd), empty(1, 1, n, cfg.token_dim)
        return counted(on_meta(cfg).diffloss.draw, c, c if guided else None, 2.0, Sampler("ddim", steps), z, steps)

    def all_steps(cfg, n):                                                           # affine in the number of steps
        one, two = (head(cfg, n, k) for k in (1, 2))
        return one + (steps - 1) * (two - one)
    if cfg.kind == "cdm":
        return by_layers(cfg, lambda cfg: all_steps(cfg, cfg.n_tokens))

    def heads(cfg):
        patch = all_steps(cfg, 2) - all_steps(cfg, 1)                                # the time embedding is shared in an AR step
        return cfg.n_tokens * patch + len(on_meta(cfg).chain(num_iter)) * (all_steps(cfg, 1) - patch)
    return by_layers(cfg, lambda cfg: (2 if guided else 1) * chain_flops(cfg, num_iter) + heads(cfg))


def reference_flops(cfg, num_iter=None):
    """FLOPs of the teacher-forced conditions of one reference image: mar takes all steps of the order, ar one pass."""
    def count(cfg):
        model = on_meta(cfg).eval()
        return counted(model.conditions, *one_image(model)[:2])
    return by_layers(cfg, (lambda cfg: chain_flops(cfg, num_iter)) if cfg.kind == "mar" else count)


def hours(flops, hardware):
    return flops / (HARDWARE[hardware][0] * UTILISATION) / 3600


def images_that_fit(gigabytes, weights, kept, kept_recompute=None, n_layer=1):
    """Images a pass on one GPU; a tenth of the memory is left free. bf16 halves what is kept, but not the inputs of blocks that
    are recomputed (kept_recompute), to which one block at work is added."""
    each = kept / 2 if kept_recompute is None else kept_recompute + kept / n_layer / 2
    return max(0, int((0.9 * gigabytes * 1e9 - weights) / each))


def costs(cfg, epochs=400, global_batch=2048, num_iter=None, steps=100):
    """A dict of what a run on ImageNet takes."""
    model, weights, kept = memory_estimate(cfg, 1)
    image, train = sampling_flops(cfg, steps, num_iter), training_flops(cfg)
    return {"parameters": model.num_params, "weights": weights, "kept": kept, "kept_recompute": memory_estimate(cfg, 1, True)[2],
            "step": train * global_batch, "run": train * epochs * IMAGENET, "image": image, "reference": reference_flops(cfg, num_iter)}


# ---------------------------------------------------------------- the rows of the paper's tables

ROWS = [(name, size) for size in (256, 512) for name in ("cdm-xl", "gpt-xl", "mar-b", "mar-l", "mar-h")]
GPUS, BATCH, STEPS, DRAWN, M, N_CAL = 8, 2048, 250_000, 50_000, 200, 50
# evaluations a patch, AR steps, guidance: MAR's and the paper's; DiT's for CDM
DRAWING = {"cdm-xl": (250, None, "--cfg_scale 1.5"), "gpt-xl": (100, None, "--cfg_scale 2.9 --cfg_schedule linear"),
           "mar-b": (100, 256, "--cfg_scale 2.9"), "mar-l": (100, 256, "--cfg_scale 3.0"), "mar-h": (100, 256, "--cfg_scale 3.2")}
# FID / Inception score / precision / recall as the paper states them: without, with refinement
PAPER = {("cdm-xl", 256): ("3.26 / 259.6 / .81 / .58", None), ("gpt-xl", 256): ("2.02 / 282.6 / .80 / .59", "1.52 / 317.6 / .82 / .60"),
         ("mar-b", 256): ("2.31 / 281.7", "1.96 / 290.5"), ("mar-l", 256): ("1.78 / 296.0", "1.59 / 301.5"),
         ("mar-h", 256): ("1.55 / 303.7 / .81 / .62", "1.31 / 324.2 / .81 / .63"), ("mar-l", 512): ("1.73 / 279.9", "1.58 / 302.3")}


def accumulation(fit):
    """Micro-batches a step: the smallest power of two whose share of the batch fits."""
    return next(a for a in (1, 2, 4, 8, 16, 32, 64, 128, 256) if BATCH // GPUS // a <= fit)


def commands(name, size, fit):
    """[(what, command)] of a row: training, sampling and measuring, without and with refinement. fit: images a pass that fit."""
    run, data, torchrun = f"{name}-{size}", f"--dataset imagenet{size} --data_dir ImageNet --vae kl16.ckpt", f"torchrun --nproc_per_node {GPUS} --"
    mul = "" if name.startswith("cdm") else " --diffusion_batch_mul 4"
    steps, num_iter, guidance = DRAWING[name]
    ref = {256: "VIRTUAL_imagenet256_labeled.npz", 512: "VIRTUAL_imagenet512.npz"}[size]
    sample = (f"{torchrun} sample.py --ckpt runs/{run} --vae kl16.ckpt --n {DRAWN} --batch_size 64"
              + (f" --num_iter {num_iter}" if num_iter else "") + f" --solver ddpm --steps {steps} {guidance}")
    refine = f"--refine default --rank 32 --m {M} --n_cal {N_CAL} --refine_memory 16 --cache_dir cache/imagenet{size}"
    measure = lambda file: f"{torchrun} evaluate.py --samples {file} --ref {ref} --features inception"
    out = [("training", f"{torchrun} train.py {data} --model {name} --global_batch {BATCH} --accumulate {accumulation(fit)} --steps {STEPS} --lr 8e-4 "
                        f"--lr_schedule constant --warmup {STEPS // 4} --weight_decay 0.02 --ema_decay 0.9999{mul} --out_dir runs/{run}"),
           ("sampling", f"{sample} --out {run}.npz"), ("measuring", measure(f"{run}.npz"))]
    if not name.startswith("cdm"):
        out += [("sampling, refined", f"{sample} {refine} --out {run}-refined.npz"), ("measuring, refined", measure(f"{run}-refined.npz"))]
    return out


def wrapped(command, width=118):
    """A command in lines that end in a backslash, cut between flags, to be pasted into a shell."""
    lines, rest = [], command.replace(" --", "\n--").replace("\n-- ", " -- ").split("\n")
    for part in rest:
        if lines and len(lines[-1]) + len(part) < width:
            lines[-1] += " " + part
        else:
            lines.append(part)
    return " \\\n        ".join(lines)


HEADER = ("| model | tokens | parameters | weights, gradients, AdamW, EMA | kept for an image (with --checkpoint_blocks) | images a pass on 80 GB "
          "| training, a GPU | sampling, a GPU | PFLOP a step of 2048 | 400 epochs: 8 x H100 | 8 x A100 | TFLOP an image drawn | 50,000: 8 x H100 | 8 x A100 "
          "| refined: 8 x H100 | 8 x A100 |\n|" + "---|" * 16)


def table_row(name, size):
    """(a line of the table, images a pass that fit 80 GB)."""
    cfg, (steps, num_iter, _) = preset(name, grid=size // 16), DRAWING[name]
    c = costs(cfg, global_batch=BATCH, num_iter=num_iter, steps=steps)
    fit = images_that_fit(80, c["weights"], c["kept"])
    recomputed = images_that_fit(80, c["weights"], c["kept"], c["kept_recompute"], cfg.n_layer)
    training = c["weights"] + BATCH // GPUS // accumulation(fit) * c["kept"] / 2
    # 64 guided images: keys and values in bf16 of every layer
    sampling = 4 * c["parameters"] + (64 * 2 * 2 * cfg.n_layer * cfg.n_tokens * cfg.n_embd * 2 if cfg.kind == "ar" else 0)
    drawn = DRAWN * c["image"]
    refined = 2 * drawn + 1000 * M * c["reference"]                                  # calibration draws N_CAL = 50 of a class, too
    times = [hours(c["run"], "8 x H100"), hours(c["run"], "8 x A100")] + [hours(z, hardware) for z in (drawn, refined) for hardware in ("8 x H100", "8 x A100")]
    times = [f"{t:.0f} h" if t >= 10 else f"{t:.1f} h" for t in times]
    if cfg.kind == "cdm":
        times[-2:] = "-", "-"
    return (f"| {name} | {cfg.n_tokens} | {c['parameters'] / 1e6:.0f}M | {c['weights'] / 1e9:.1f} GB "
            f"| {c['kept'] / 1e9:.2f} ({c['kept_recompute'] / 1e9:.2f}) GB "
            f"| {fit} ({recomputed}) | {training / 1e9:.0f} GB | {sampling / 1e9:.0f} GB{'' if cfg.kind == 'cdm' else ' (+ 16)'} | {c['step'] / 1e15:.2f} "
            f"| {times[0]} | {times[1]} | {c['image'] / 1e12:.1f} | " + " | ".join(times[2:]) + " |"), fit


def section(name, size, fit):
    """The commands of a model and size as text."""
    plain, refined = PAPER.get((name, size), (None, None))
    stated = f"; the paper: {plain}" + (f", refined {refined}" if refined else "") if plain else ""
    return "\n\n".join([f"**{name}, {size}x{size}**{stated}"] + ["    " + wrapped(command) for _, command in commands(name, size, fit)])


def main():
    rows = [table_row(*row) for row in ROWS]
    print("\n".join([HEADER] + [line for line, _ in rows]), *(section(*row, fit) for row, (_, fit) in zip(ROWS, rows)), sep="\n\n")


if __name__ == "__main__":
    main()
