"""What a run takes before you start it: parameters, memory, FLOPs, hours; counted on the meta device, nothing is computed.

    python plan.py                          the table of the paper's models in the README
    python train.py --dry-run --model ...   the same of one run

FLOPs are those of matrix products (2 per multiply-add), by torch's own counter over the real loss and the real
sampler. Hours are FLOPs over the hardware's dense bf16 peak times UTILISATION, an assumption and no measurement.
"""
import math
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from model import build, checkpoint_blocks, preset

HARDWARE = {"8 x H100": (8 * 989e12, 80), "8 x A100": (8 * 312e12, 80), "1 x RTX 4090": (165e12, 24)}    # peak FLOP/s, GB each
UTILISATION = 0.35
IMAGENET = 1_281_167


def on_meta(cfg, recompute=False):
    with torch.device("meta"):
        model = build(cfg)
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
    model, kept = on_meta(cfg, recompute), {}

    def keep(z):
        whole = z if z._base is None else z._base                                    # views share memory; weights are counted already
        # a square per head is an attention matrix, which no fused kernel keeps; the meta device has none
        square = z.dim() in (3, 4) and z.shape[-1] == z.shape[-2] and cfg.n_head in z.shape[:2]
        if not square and not isinstance(whole, torch.nn.Parameter):
            kept[id(whole)] = whole
        return z
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda z: z):
        model.loss(*one_image(model))
    activations = sum(z.numel() * z.element_size() for z in kept.values())
    return model, 20 * model.num_params, activations * share


def counted(fn, *args):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fn(*args)
    return counter.get_total_flops()


def by_layers(cfg, count):
    """count(cfg) of a deep model from two shallow ones: FLOPs are affine in the number of layers."""
    one, two = (count(replace(cfg, n_layer=n)) for n in (1, 2))
    return one + (cfg.n_layer - 1) * (two - one)


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
    the cache), so that three counted steps give all of them exactly.
    """
    model, N = on_meta(cfg).eval(), cfg.n_tokens
    empty = lambda *shape, **kw: torch.empty(*shape, device="meta", **kw)

    def step(a):
        if cfg.kind == "mar":
            return model.step_conditions(empty(1, a, cfg.token_dim), empty(1, a, dtype=torch.long), empty(1, dtype=torch.long))
        h, cache = empty(1, 1, cfg.n_embd), empty(2, 1, cfg.n_head, N, cfg.n_embd // cfg.n_head)
        for block in model.blocks:
            h = block(h, model.cos[a:a + 1], model.sin[a:a + 1], cache, a)
        return model.x_proj(empty(1, 1, cfg.token_dim))

    at = sorted({0, N // 2, N - 1})
    cost = [counted(step, a) for a in at]
    lagrange = lambda a: sum(c * math.prod((a - z) / (x - z) for z in at if z != x) for x, c in zip(at, cost))
    return round(sum(lagrange(a) for a, _ in model.chain(num_iter)))


def sampling_flops(cfg, steps=100, num_iter=None, guided=True):
    """FLOPs of drawing one image: the whole chain with `steps` evaluations of the denoiser per patch."""
    branches = 2 if guided else 1

    def head(cfg, n=cfg.n_tokens):
        x, t, c = (torch.empty(1, *shape, device="meta") for shape in ((n, cfg.token_dim), (1,), (1, cfg.n_embd)))
        return counted(on_meta(cfg).diffloss.net, x, t, c.expand(-1, 1 if cfg.kind == "cdm" else n, -1))
    if cfg.kind == "cdm":
        return branches * steps * by_layers(cfg, head)
    small = replace(cfg, n_layer=1)
    patch = head(small, 2) - head(small, 1)                                          # the time embedding is shared in a step
    heads = cfg.n_tokens * patch + len(on_meta(small).chain(num_iter)) * (head(small, 1) - patch)
    return branches * (by_layers(cfg, lambda cfg: chain_flops(cfg, num_iter)) + steps * heads)


def reference_flops(cfg, num_iter=None):
    """FLOPs of the teacher-forced conditions of one reference image: mar takes all steps of the order, ar one pass."""
    def count(cfg):
        model = on_meta(cfg).eval()
        return counted(model.conditions, *one_image(model)[:2])
    return by_layers(cfg, (lambda cfg: chain_flops(cfg, num_iter)) if cfg.kind == "mar" else count)


def hours(flops, hardware):
    return flops / (HARDWARE[hardware][0] * UTILISATION) / 3600


def images_that_fit(cfg, gigabytes, recompute):
    """Images a pass on one GPU; a tenth of the memory is left free. bf16 halves what is kept, but not the blocks' inputs."""
    _, weights, kept = memory_estimate(cfg, 1)
    if recompute:                                                                    # the inputs, and the block at work
        kept = 2 * memory_estimate(cfg, 1, True)[2] + kept / cfg.n_layer
    return max(0, int((0.9 * gigabytes * 1e9 - weights) / (kept / 2)))


def costs(cfg, epochs=400, global_batch=2048, num_iter=None, steps=100):
    """A dict of what a run on ImageNet takes."""
    model, weights, kept = memory_estimate(cfg, 1)
    image, train = sampling_flops(cfg, steps, num_iter), training_flops(cfg)
    return {"parameters": model.num_params, "weights": weights, "kept": kept, "kept_recompute": memory_estimate(cfg, 1, True)[2],
            "step": train * global_batch, "run": train * epochs * IMAGENET, "image": image, "reference": reference_flops(cfg, num_iter)}


ROWS = [(name, size) for size in (256, 512) for name in ("cdm-xl", "gpt-xl", "mar-b", "mar-l", "mar-h")]


def main():
    print("| model | tokens | parameters | weights, gradients, AdamW, EMA | kept for an image (with --checkpoint_blocks) | images a pass on 80 GB "
          "| PFLOP a step of 2048 | 400 epochs: 8 x H100 | 8 x A100 | TFLOP an image drawn | 50,000: 8 x H100 | refined, m = 200 |")
    print("|" + "---|" * 12)
    for name, size in ROWS:
        cfg, num_iter = preset(name, grid=size // 16), 64 if name.startswith("mar") else None
        c = costs(cfg, num_iter=num_iter)
        fit = [images_that_fit(cfg, 80, recompute) for recompute in (False, True)]
        drawn = 50_000 * c["image"]
        refined = "-" if cfg.kind == "cdm" else f"{60 * hours(drawn + 200_000 * c['reference'], '8 x H100'):.0f} min"
        print(f"| {name} | {cfg.n_tokens} | {c['parameters'] / 1e6:.0f}M | {c['weights'] / 1e9:.1f} GB | {c['kept'] / 1e9:.2f} ({c['kept_recompute'] / 1e9:.2f}) GB "
              f"| {fit[0]} ({fit[1]}) | {c['step'] / 1e15:.2f} | {hours(c['run'], '8 x H100'):.0f} h | {hours(c['run'], '8 x A100'):.0f} h "
              f"| {c['image'] / 1e12:.1f} | {60 * hours(drawn, '8 x H100'):.0f} min | {refined} |", flush=True)


if __name__ == "__main__":
    main()
