"""What a run takes before you start it: parameters, memory, FLOPs, hours; counted on the meta device, nothing is computed.

    python plan.py                          the table of the paper's models in the README
    python train.py --dry-run --model ...   the same of one run

FLOPs are those of matrix products (2 per multiply-add), by torch's own counter over the real loss and the real
sampler. Hours are FLOPs over the hardware's dense bf16 peak times UTILISATION, an assumption and no measurement.
"""
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from diffloss import Sampler
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
    """(model on the meta device, bytes of weights, gradients, Adam and EMA in fp32, bytes that autograd keeps for `share` images)."""
    model, kept = on_meta(cfg, recompute), {}

    def keep(z):
        whole = z if z._base is None else z._base                                    # views share memory; weights are counted already
        if not isinstance(whole, torch.nn.Parameter):
            kept[id(whole)] = whole
        return z
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda z: z):
        model.loss(*one_image(model))
    activations = sum(z.numel() * z.element_size() for z in kept.values())
    return model, 20 * model.num_params, activations * share


def training_flops(cfg, recompute=False):
    """FLOPs of one image in one training step, forward and backward."""
    model = on_meta(cfg, recompute)
    with FlopCounterMode(display=False) as count:
        model.loss(*one_image(model)).sum().backward()
    return count.get_total_flops()


class Blank:
    """Noise without content, for a chain that is only counted."""
    randn = staticmethod(lambda *shape: torch.empty(1, *shape, device="meta"))
    rand = randn


def sampling_flops(cfg, steps=100, num_iter=None, guided=True):
    """FLOPs of drawing one image: the whole chain with `steps` evaluations of the denoiser per patch."""
    options = {"num_iter": num_iter} if cfg.kind == "mar" else {}

    def count(n_layer, n):
        model = on_meta(replace(cfg, n_layer=n_layer)).eval()
        with FlopCounterMode(display=False) as counter:
            model.generate(torch.zeros(1, dtype=torch.long, device="meta"), Blank(), Sampler("ddim", n), 2.0 if guided else 1.0, **options)
        return counter.get_total_flops()
    if cfg.kind == "cdm":
        return count(cfg.n_layer, 1) * steps
    one = count(1, 1)                                                                # affine in layers and in evaluations
    return one + (cfg.n_layer - 1) * (count(2, 1) - one) + (steps - 1) * (count(1, 2) - one)


def reference_flops(cfg, num_iter=None):
    """FLOPs of the teacher-forced conditions of one reference image, which refinement needs."""
    model, options = on_meta(cfg).eval(), {"num_iter": num_iter} if cfg.kind == "mar" else {}
    with FlopCounterMode(display=False) as count, torch.no_grad():
        model.conditions(*one_image(model)[:2], **options)
    return count.get_total_flops()


def hours(flops, hardware):
    return flops / (HARDWARE[hardware][0] * UTILISATION) / 3600


def images_that_fit(cfg, gigabytes, recompute):
    """Images a pass on one GPU under bf16, which halves what is kept; a tenth of the memory is left free."""
    _, weights, activations = memory_estimate(cfg, 1, recompute)
    return max(0, int((0.9 * gigabytes * 1e9 - weights) / (activations / 2)))


def costs(cfg, epochs=400, global_batch=2048, num_iter=None, steps=100):
    """A dict of what a run on ImageNet takes."""
    model, weights, kept = memory_estimate(cfg, 1)
    image, train = sampling_flops(cfg, steps, num_iter), training_flops(cfg)
    return {"parameters": model.num_params, "weights": weights, "kept": kept, "kept_recompute": memory_estimate(cfg, 1, True)[2],
            "step": train * global_batch, "run": train * epochs * IMAGENET, "image": image, "reference": reference_flops(cfg, num_iter)}


ROWS = [(name, size) for size in (256, 512) for name in ("cdm-xl", "gpt-xl", "mar-b", "mar-l", "mar-h")]


def main():
    print("| model | tokens | parameters | weights, gradients, AdamW, EMA | kept a 1-image pass (with --checkpoint_blocks) | images a pass on 80 GB "
          "| FLOPs a step of 2048 | 400 epochs on 8 x H100 | 8 x A100 | FLOPs an image | 50,000 images on 8 x H100 | with refinement, m = 200 |")
    print("|" + "---|" * 12)
    for name, size in ROWS:
        cfg, num_iter = preset(name, grid=size // 16), 64 if name.startswith("mar") else None
        c = costs(cfg, num_iter=num_iter)
        fit = [images_that_fit(cfg, 80, recompute) for recompute in (False, True)]
        drawn = 50_000 * c["image"]
        refined = "-" if cfg.kind == "cdm" else f"{hours(drawn + 200_000 * c['reference'], '8 x H100'):.1f} h"
        print(f"| {name} | {cfg.n_tokens} | {c['parameters'] / 1e6:.0f}M | {c['weights'] / 1e9:.1f} GB | {c['kept'] / 1e9:.2f} ({c['kept_recompute'] / 1e9:.2f}) GB "
              f"| {fit[0]} ({fit[1]}) | {c['step'] / 1e15:.2f} P | {hours(c['run'], '8 x H100'):.0f} h | {hours(c['run'], '8 x A100'):.0f} h "
              f"| {c['image'] / 1e12:.1f} T | {hours(drawn, '8 x H100'):.1f} h | {refined} |", flush=True)


if __name__ == "__main__":
    main()
