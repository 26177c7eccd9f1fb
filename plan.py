"""What a run takes before you start it: parameters, memory, FLOPs, hours. Nothing is computed.

    python plan.py                          the paper's rows: what they take, and their commands
    python train.py --dry-run --model ...   what one run takes

README_imagenet.md holds the first one's output. FLOPs are those of matrix products (2 a
multiply-add), by torch's own counter over the real loss and the real sampler on the meta device.
Hours are FLOPs over the dense bf16 peak times UTILISATION, an assumption and no measurement.
"""
from command import Parser, run        # first: it answers signals

import math
from dataclasses import asdict, replace
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from model import Config, build, preset

HARDWARE = {"8 x H100": 8 * 989e12, "8 x A100": 8 * 312e12, "1 x RTX 4090": 165e12}    # FLOP/s
UTILISATION = 0.35
IMAGENET = 1_281_167


# ---------------------------------------------------------------- counting

def on_meta(cfg, recompute=False):
    """The model without memory, in training mode; built once, as that takes seconds even there.

    recompute: as train.py --checkpoint_blocks.
    """
    return built(tuple(asdict(cfg).items()), recompute).train()


@lru_cache(maxsize=8)
def built(fields, recompute):
    with torch.device("meta"):
        model = build(Config(**dict(fields)))
    if recompute:
        from fast import checkpoint_blocks
        checkpoint_blocks(model)
    return model


def empty(*shape, **options):
    return torch.empty(*shape, device="meta", **options)


def one_image(model):
    """x, y, draws of one image; of mar, the draw with the median number of masked tokens."""
    cfg = model.cfg
    seeds = range(31 if cfg.kind == "mar" else 1)
    draws = [model.randomness(1, torch.Generator().manual_seed(k)) for k in seeds]
    draws = sorted(draws, key=lambda d: d["t"].shape[1])[len(draws) // 2]
    x, y = empty(1, cfg.n_tokens, cfg.token_dim), empty(1, dtype=torch.long)
    return x, y, {name: z.to("meta") for name, z in draws.items()}


def by_layers(cfg, count):
    """count(cfg) of a deep model from shallow ones: FLOPs and memory are affine in the layers of
    the transformer, of its decoder if they are others, and of the head."""
    small = replace(cfg, n_layer=1, head_depth=min(1, cfg.head_depth),
                    n_decoder=min(1, cfg.n_decoder))
    one = count(small)
    total = one + (cfg.n_layer - 1) * (count(replace(small, n_layer=2)) - one)
    if cfg.n_decoder > 1:
        total += (cfg.n_decoder - 1) * (count(replace(small, n_decoder=2)) - one)
    if cfg.head_depth > 1:
        total += (cfg.head_depth - 1) * (count(replace(small, head_depth=2)) - one)
    return total


def counted(fn, *args, **options):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fn(*args, **options)
    return counter.get_total_flops()


def hours(flops, hardware):
    return flops / (HARDWARE[hardware] * UTILISATION) / 3600


# ---------------------------------------------------------------- training

def memory_estimate(cfg, share, recompute=False):
    """(model on the meta device, bytes of weights, gradients, Adam and EMA in fp32, bytes that
    autograd keeps for `share` images). With recompute, add what one block keeps."""
    def count(cfg):
        model, kept = on_meta(cfg, recompute), {}

        def keep(z):
            whole = z if z._base is None else z._base       # views share memory
            # a square per head is an attention matrix, which no fused kernel keeps
            square = z.dim() in (3, 4) and z.shape[-1] == z.shape[-2] and cfg.n_head in z.shape[:2]
            if not square and not isinstance(whole, torch.nn.Parameter):
                kept[id(whole)] = whole
            return z
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda z: z):
            model.loss(*one_image(model))
        return sum(z.numel() * z.element_size() for z in kept.values())
    model = on_meta(cfg)
    return model, 20 * model.num_params, by_layers(cfg, count) * share


def training_flops(cfg, recompute=False):
    """FLOPs of one image in one training step, forward and backward."""
    def count(cfg):
        model = on_meta(cfg, recompute)
        with FlopCounterMode(display=False) as counter:
            model.loss(*one_image(model)).sum().backward()
        return counter.get_total_flops()
    return by_layers(cfg, count)


def images_that_fit(gigabytes, weights, kept):
    """Images a pass on one GPU: bf16 halves what is kept; a tenth of the memory is left free."""
    return max(0, int((0.9 * gigabytes * 1e9 - weights) / (kept / 2)))


# ---------------------------------------------------------------- sampling

def chain_flops(cfg, num_iter=None):
    """FLOPs of the transformer over the AR steps of one image.

    A step costs a quadratic in the number of known tokens (mar: attention of the encoder) or less
    (ar: one query on the cache), and mar's last block so much for each token drawn, so that four
    counted steps give all of them exactly.
    """
    model, N = on_meta(cfg).eval(), cfg.n_tokens

    def step(a, drawn=1):
        if cfg.kind == "mar":
            x, known = empty(1, a, cfg.token_dim), empty(1, a, dtype=torch.long)
            at = empty(1, drawn, dtype=torch.long)
            return model.step_conditions(x, known, empty(1, dtype=torch.long), at)
        h = empty(1, 1, cfg.n_embd)
        model.next_condition(a, h, model.empty_cache(1, h))
        return model.x_proj(empty(1, 1, cfg.token_dim))

    at = sorted({0, N // 2, N - 1})
    cost = [counted(step, a) for a in at]

    def lagrange(a):
        weight = lambda x: math.prod((a - z) / (x - z) for z in at if z != x)
        return sum(c * weight(x) for x, c in zip(at, cost))

    # what a token drawn beyond the first adds
    each = counted(step, 0, 2) - cost[0] if cfg.kind == "mar" else 0
    return round(sum(lagrange(a) + (b - a - 1) * each for a, b in model.places(num_iter)))


def sampling_flops(cfg, steps=100, num_iter=None, guided=True):
    """FLOPs of drawing one image: the whole chain, `steps` evaluations of the denoiser a patch."""
    def head(cfg, n, steps):
        c = empty(1, 1 if cfg.kind == "cdm" else n, cfg.n_embd)
        noise = empty(1, 1, n, cfg.token_dim)
        sample = on_meta(cfg).diffloss.sample
        return counted(sample, c, c if guided else None, 2.0, noise, solver="ddim", steps=steps)

    def all_steps(cfg, n):                                  # affine in the number of steps
        one, two = (head(cfg, n, k) for k in (1, 2))
        return one + (steps - 1) * (two - one)
    if cfg.kind == "cdm":
        return by_layers(cfg, lambda cfg: all_steps(cfg, cfg.n_tokens))

    def heads(cfg):                             # the time embedding is shared in an AR step
        patch = all_steps(cfg, 2) - all_steps(cfg, 1)
        ar_steps = len(on_meta(cfg).places(num_iter))
        return cfg.n_tokens * patch + ar_steps * (all_steps(cfg, 1) - patch)
    branches = 2 if guided else 1
    return by_layers(cfg, lambda cfg: branches * chain_flops(cfg, num_iter) + heads(cfg))


def reference_flops(cfg, num_iter=None):
    """FLOPs of the teacher-forced conditions of one image: ar one pass, mar all steps."""
    if cfg.kind == "mar":
        return by_layers(cfg, lambda cfg: chain_flops(cfg, num_iter))

    def count(cfg):
        model = on_meta(cfg).eval()
        return counted(model.conditions, *one_image(model)[:2])
    return by_layers(cfg, count)


def refinement_bytes(cfg, m, n_cal, rank=None, stages=2):
    """(bytes that the refinement of one class holds, bytes at the peak) by the default method.

    m targets and n_cal fitted conditions in `rank` directions (None: a quarter, as sample.py), at
    every place but the first; a Gaussian stage keeps a matrix, a Sinkhorn stage the conditions that
    it was fitted on and a number for each of both. The peak: whole target conditions, in fp32.
    """
    N, C = cfg.n_tokens, cfg.n_embd
    r = rank or -(-C // 4)
    gaussian = r * r + 2 * r
    sinkhorn = n_cal * r + n_cal + m + 1
    held = 4 * (N * m * r + (N - 1) * (gaussian + stages * sinkhorn))
    return held, held + 4 * N * m * C


def shared_bytes(cfg, m, classes):
    """(held, peak) of `--refine shared` for a batch of so many classes: their m targets, as they
    are and as what is left of them, and means; the peak adds one class's whole conditions."""
    N, C = cfg.n_tokens, cfg.n_embd
    held = 4 * N * -(-C // 4) * classes * (2 * m + 1)
    return held, held + 4 * N * m * C


def describe(cfg, share, global_batch, steps, recompute=False):
    """Print what a training run takes, `share` images a pass, and then drawing and refinement."""
    gib = lambda n: f"{n / 2**30:.2f} GiB" if n >= 2 ** 27 else f"{n / 2**20:.3g} MiB"
    time = lambda h: f"{h:.3g} h" if h >= 0.1 else f"{3600 * h:.2g} s"
    on_all = lambda flops: ", ".join(f"{time(hours(flops, name))} on {name}" for name in HARDWARE)
    model, weights, kept = memory_estimate(cfg, share, recompute)
    print(f"memory of a process: {gib(weights)} weights, gradients, AdamW and EMA + about "
          f"{gib(kept)} activations at {share} images a pass (half of it under bf16)")

    step = training_flops(cfg, recompute) * global_batch
    print(f"training: {step / 1e12:.4g} TFLOP a step; {steps} steps take about "
          f"{on_all(step * steps)}")
    num_iter = min(64, cfg.n_tokens) if cfg.kind == "mar" else None
    image = sampling_flops(cfg, num_iter=num_iter)
    in_steps = f" in {num_iter} AR steps" if num_iter else ""
    print(f"sampling, guided, 100 evaluations a patch{in_steps}: {image / 1e12:.4g} TFLOP; "
          f"50,000 images take about {on_all(50_000 * image)} (at {UTILISATION:.0%} of the peak, "
          "an assumption)")
    if cfg.kind == "cdm":
        return
    held, peak = refinement_bytes(cfg, 500, 1000)
    print(f"refinement, frozen, 500 reference images of a class and 1000 that calibrate: "
          f"{gib(held)} for the class at work, {gib(peak)} at the peak")
    held, peak = shared_bytes(cfg, M, CLASSES)
    references = M * reference_flops(cfg, num_iter)
    print(f"refinement, shared, {M} reference images of a class, {CLASSES} classes at once: "
          f"{gib(held)}, {gib(peak)} at the peak; the references of a class take "
          f"{references / 1e12:.3g} TFLOP, as much as {references / image:.3g} images")


# ---------------------------------------------------------------- the rows of the paper's tables

ROWS = [(name, size) for size in (256, 512)
        for name in ("cdm-xl", "gpt-xl", "mar-b", "mar-l", "mar-h")]
GPUS, BATCH, STEPS, WARMUP, DRAWN = 8, 2048, 250_000, 62_500, 50_000
M, TOGETHER, CLASSES = 200, 50, 10       # reference images a class; a refined batch: 10 times 50
AT_ONCE = {256: CLASSES * TOGETHER, 512: 3 * TOGETHER}           # what 80 GB hold of gpt-xl
# evaluations a patch, AR steps, guidance: MAR's and the paper's; DiT's for CDM
DRAWING = {"cdm-xl": (250, None, "--cfg_scale 1.5"),
           "gpt-xl": (100, None, "--cfg_scale 2.9 --cfg_schedule linear"),
           "mar-b": (100, 256, "--cfg_scale 2.9"),
           "mar-l": (100, 256, "--cfg_scale 3.0"),
           "mar-h": (100, 256, "--cfg_scale 3.2")}
# FID / Inception score / precision / recall as the paper states them: without, with refinement
PAPER = {("cdm-xl", 256): ("3.26 / 259.6 / .81 / .58", None),
         ("gpt-xl", 256): ("2.02 / 282.6 / .80 / .59", "1.52 / 317.6 / .82 / .60"),
         ("mar-b", 256): ("2.31 / 281.7", "1.96 / 290.5"),
         ("mar-l", 256): ("1.78 / 296.0", "1.59 / 301.5"),
         ("mar-h", 256): ("1.55 / 303.7 / .81 / .62", "1.31 / 324.2 / .81 / .63"),
         ("mar-l", 512): ("1.73 / 279.9", "1.58 / 302.3")}


def accumulation(fit):
    """Micro-batches a step: the smallest power of two whose share of the batch fits."""
    return next(a for a in (1, 2, 4, 8, 16, 32, 64, 128, 256) if BATCH // GPUS // a <= fit)


def commands(name, size, fit):
    """[(what, command)] of a row: training, sampling and measuring, without and with refinement.

    fit: images a pass that fit.
    """
    run, torchrun = f"{name}-{size}", f"torchrun --nproc_per_node {GPUS} --"
    steps, num_iter, guidance = DRAWING[name]
    ref = {256: "VIRTUAL_imagenet256_labeled.npz", 512: "VIRTUAL_imagenet512.npz"}[size]
    train = (f"{torchrun} train.py --dataset imagenet{size} --data_dir ImageNet --vae kl16.ckpt "
             f"--model {name} --global_batch {BATCH} --accumulate {accumulation(fit)} "
             f"--steps {STEPS} --lr 8e-4 --out_dir runs/{run}")
    sample = (f"{torchrun} sample.py --ckpt runs/{run} --vae kl16.ckpt --n {DRAWN}"
              + (f" --num_iter {num_iter}" if num_iter else "")
              + f" --solver ddpm --steps {steps} {guidance}")
    measure = f"python evaluate.py --ref {ref} --features inception --samples"
    out = [("training", train), ("sampling", f"{sample} --batch_size 64 --out {run}.npz"),
           ("measuring", f"{measure} {run}.npz")]
    if not name.startswith("cdm"):
        refine = f"--refine shared --m {M} --batch_size {AT_ONCE[size]}"
        out += [("sampling, refined", f"{sample} {refine} --out {run}-refined.npz"),
                ("measuring, refined", f"{measure} {run}-refined.npz")]
    return out


def wrapped(command, width=108):
    """A command in lines that end in a backslash, cut between flags, to be pasted into a shell."""
    lines, rest = [], command.replace(" --", "\n--").replace("\n-- ", " -- ").split("\n")
    for part in rest:
        if lines and len(lines[-1]) + len(part) < width:
            lines[-1] += " " + part
        else:
            lines.append(part)
    return " \\\n        ".join(lines)


MEMORY = ("| memory | tokens | parameters | state | an image | a pass | training | sampling "
          "| refining: held | peak |\n|" + "---|" * 10)
TIME = ("| time | tokens | PFLOP a step | run: H100 | A100 | TFLOP an image | 50,000: H100 | A100 "
        "| refined: H100 | A100 |\n|" + "---|" * 10)


def table_rows(name, size):
    """(a line of the table of memory, a line of that of time, images a pass that fit 80 GB)."""
    cfg, (steps, num_iter, _) = preset(name, grid=size // 16), DRAWING[name]
    model, weights, kept = memory_estimate(cfg, 1)
    fit = images_that_fit(80, weights, kept)
    training = weights + BATCH // GPUS // accumulation(fit) * kept / 2
    # 64 guided images: keys and values in bf16 of every layer
    cache = 64 * 2 * 2 * cfg.n_layer * cfg.n_tokens * cfg.n_embd * 2 if cfg.kind == "ar" else 0
    sampling = 4 * model.num_params + cache
    refining = " | ".join(f"{z / 1e9:.2f} GB"
                          for z in shared_bytes(cfg, M, AT_ONCE[size] // TOGETHER))
    memory = (f"| {name} | {cfg.n_tokens} | {model.num_params / 1e6:.0f}M | {weights / 1e9:.1f} GB "
              f"| {kept / 1e9:.2f} GB | {fit} | {training / 1e9:.0f} GB | {sampling / 1e9:.0f} GB "
              f"| {'- | -' if cfg.kind == 'cdm' else refining} |")

    step, image = training_flops(cfg) * BATCH, sampling_flops(cfg, steps, num_iter)
    runs = [step * 400 * IMAGENET / BATCH, DRAWN * image]
    if cfg.kind != "cdm":
        runs.append(DRAWN * image + 1000 * M * reference_flops(cfg, num_iter))
    times = [hours(flops, machine) for flops in runs for machine in ("8 x H100", "8 x A100")]
    times = [f"{t:.0f} h" if t >= 10 else f"{t:.1f} h" for t in times] + ["-", "-"]
    time = (f"| {name} | {cfg.n_tokens} | {step / 1e15:.2f} | {times[0]} | {times[1]} "
            f"| {image / 1e12:.1f} | {' | '.join(times[2:6])} |")
    return memory, time, fit


def section(name, size, fit):
    """The commands of a model and size as text."""
    plain, refined = PAPER.get((name, size), (None, None))
    title = f"**{name}, {size}x{size}**" + (f"; the paper: {plain}" if plain else "")
    title += f", refined {refined}" if refined else ""
    return "\n\n".join([title] + [f"    {wrapped(c)}" for _, c in commands(name, size, fit)])


def report(rows):
    """All that is printed, of [(memory, time, fit)]."""
    memory = "\n".join([MEMORY] + [memory for memory, _, _ in rows])
    time = "\n".join([TIME] + [time for _, time, _ in rows])
    sections = [section(*row, fit) for row, (_, _, fit) in zip(ROWS, rows)]
    return "\n\n".join([memory, time, *sections])


def main():
    Parser(description="What the rows of the paper's tables take, and their commands.").parse_args()
    print(report([table_rows(*row) for row in ROWS]))


if __name__ == "__main__":
    run(main)
