"""Draw images from a checkpoint: where transformer, head and refinement meet (Algorithm 1).

    python sample.py                                        the newest run under out/, 10 images a class
    python sample.py --refine default                       the same with refined conditions
    python sample.py --classes 3 7 --n 20 --cfg_scale 2     two classes, more guided
    python sample.py --n 5000 --out s.npz                   for evaluate.py: arr_0 uint8 NHWC, arr_1 labels
    python sample.py --inpaint x.png --mask m.png           a mar model fills the white part of the mask
    python sample.py --ckpt mar_base/checkpoint-last.pth --vae kl16.ckpt --classes "golden retriever" --solver ddpm \
        --steps 100 --num_iter 64 --cfg_scale 2.9           MAR's released weights
    torchrun --nproc_per_node 8 -- sample.py --n 50000 --out s.npz   the same on 8 GPUs, each a share (mind the --)

Image k of a seed is the same at any batch size. A `Recipe` says how images are drawn, a `Drawer` draws them;
evaluate.py imports both, so that what is measured is what you draw here.
"""
import functools
import hashlib
import json
import os
import random
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import data as datasets
from data import Parser, centre_crop, image_grid, number, patchify, run, to_uint8, unpatchify
from diffloss import SOLVERS, ImageNoise, Sampler
from model import GUIDANCE, amp, export_mar, find_checkpoint, load_model, pick_device, save_checkpoint, set_threads
from ot_refine import METHODS, RefineConfig, Refiner, principal_axes


@dataclass
class Recipe:
    """How images are drawn from a model, whichever images. Two equal recipes draw the same."""
    sampler: Sampler = Sampler()
    cfg_scale: float = GUIDANCE
    cfg_schedule: str | None = None     # None: the generator's own, mar linear, else constant
    num_iter: int | None = None         # mar: AR steps; None: one per token
    refine: RefineConfig = field(default_factory=lambda: RefineConfig(method="none"))
    inverse: str = "one"                # x_hat for T^-1, only if refine.lam > 0: "one" evaluation or a "full" trajectory
    orders: int = 0                     # mar: size of the pool of generation orders; 0: a fresh one for each image
    target: str = "teacher"             # P_c*: conditions of real images, or the "buffer" collected in training
    m: int = 1000                       # reference images per class, at most
    ref_split: str = "train"
    n_cal: int = 0                      # images per class and order that calibrate frozen mode; 0: twice as many as targets, at least 200
    cfg_skip: float = 0.0               # no null branch in the head (mar: at all) where the guidance scale is within this of 1
    move_null: bool = False             # the null condition moves along with the refined one

    def calibration_images(self, m):
        """Images per class and order that calibrate frozen mode with m targets."""
        return self.n_cal or max(200, 2 * m)

    @property
    def refined(self):
        return bool(self.refine.stages())


SPREAD = 512            # reference images that the directions of a low-rank refinement are taken from


class Drawer:
    """Draws images of a model by a recipe; with refinement, after `calibrate` (frozen) or `set_targets` (coupled).

    classes: the labels that may be drawn. Raises ValueError where model and recipe do not fit each other.
    """

    def __init__(self, model, recipe, classes):
        self.model, self.recipe, self.classes, self.refiner, self.coupled = model, recipe, list(classes), None, False
        self.device, kind, N = next(model.parameters()).device, model.cfg.kind, model.cfg.n_tokens
        if recipe.num_iter and (kind != "mar" or recipe.num_iter > N):
            raise ValueError(f"--num_iter {recipe.num_iter}: this is a {kind} model of {N} tokens; only mar has a choice, "
                             "of at most one step per token")
        if recipe.cfg_skip and kind == "cdm":
            raise ValueError("--cfg_skip: the guidance of a cdm model does not change along a chain; use --cfg_scale 1 for none")
        if recipe.cfg_scale != 1 and model.cfg.class_dropout == 0:
            raise ValueError(f"--cfg_scale {recipe.cfg_scale:g}: this model was trained with --class_dropout 0, so it has no null branch to guide by; "
                             "use --cfg_scale 1")
        if recipe.move_null and (recipe.cfg_scale == 1 or not recipe.refined):
            raise ValueError(f"--move_null with --cfg_scale {recipe.cfg_scale:g} and --refine {recipe.refine.method}: it needs guidance and refinement")
        if recipe.refined and kind == "cdm":
            raise ValueError("--refine: a cdm model has one fixed condition per image and no AR chain, so there is nothing to refine")
        if recipe.refined and recipe.refine.lam > 0 and not model.cfg.inverse:
            raise ValueError("--lam above 0 needs T^-1, but this model was trained with --no-inverse")
        # CHOICE(orders): a mar condition depends on which patches are known, so refined chains draw their orders from a
        # pool of S, the raster scan first, and image k has a fixed one of them. Alternative: a larger pool. Flag: --orders.
        if recipe.refined and kind == "mar" and not recipe.orders:
            raise ValueError("--orders 0 with --refine: targets need a pool of generation orders; use --orders 1 or more")
        if recipe.refined and recipe.target == "buffer" and not model.cfg.buffer:
            raise ValueError("--target buffer: this model was trained without one; train with --buffer 64, or use --target teacher")
        self.pool = scan_orders(recipe.orders, model.cfg.grid) if kind == "mar" and recipe.orders else None

    def set_targets(self, tokens_of):
        """Particles of P_c* for every class, order and AR step. tokens_of(y, m) -> (<= m, N, D) of real images."""
        rank, C, K, axes = self.recipe.refine.rank_of(self.model.cfg.n_embd), self.model.cfg.n_embd, self.model.cfg.num_classes, None
        if self.recipe.refined and rank < C:  # of all classes that have images, so that a class is refined alike beside any others
            some = [y for y in range(K) if self.recipe.target == "buffer" or len(tokens_of(y, 1))]
            some = some[::-(-len(some) // SPREAD) or 1] or self.classes
            particles, weights = self._particles(tokens_of, some, -(-SPREAD // len(some)))
            axes = [y if y is None else principal_axes(y, weights, rank) for y in particles]
        targets, weights = self._particles(tokens_of, self.classes, self.recipe.m)
        self.refiner, self.coupled = Refiner(targets, self.recipe.refine, weights, axes), True

    def _particles(self, tokens_of, classes, m):
        if self.recipe.target == "buffer":
            targets = buffered_conditions(self.model, classes, self.pool, self.recipe.num_iter)
            return targets, torch.ones(targets[-1].shape[0], targets[-1].shape[2], device=self.device)
        return ideal_conditions(self.model, tokens_of, classes, m, self.pool, self.recipe.num_iter)

    def calibrate(self, tokens_of, batch_size=1000, progress=iter, seed=0):
        """Run the chain once, coupled, and keep what frozen mode needs to refine each image on its own; returns the images per group.

        seed: of the noise, which is never that of an image.
        """
        self.set_targets(tokens_of)
        S, n = max(self.recipe.orders, 1), self.recipe.calibration_images(self.refiner.weights.shape[1] if self.refiner.targets else 0)
        group = torch.arange(len(self.classes) * S).repeat_interleave(n)
        y = torch.tensor(self.classes)[group // S]
        index = (y * S + group % S) * n + torch.arange(len(group)) % n               # a class is calibrated alike beside any others
        together = len(group) if self.recipe.refine.pooled else max(1, batch_size // n) * n  # pooled: one problem for all groups
        for part in progress(torch.arange(len(group)).split(together)):
            refine = self.refiner.calibrate(group[part].to(self.device))
            self._draw(y[part], index[part].tolist(), -1 - seed, group[part] % S, refine)   # negative: noise that no --seed draws
        self.coupled = False
        return n

    def __call__(self, y, index, seed, inpaint=None):
        """Tokens (B, N, D) of the images `index` of the seed, of classes y (B,)."""
        slot = torch.tensor([random.Random(int(k)).randrange(max(self.recipe.orders, 1)) for k in index])
        refine = None
        if self.recipe.refined:
            if self.refiner is None:
                raise ValueError("this recipe refines: call calibrate or set_targets first")
            number = torch.tensor([self.classes.index(int(k)) for k in y])
            refine = self.refiner.bind((number * max(self.recipe.orders, 1) + slot).to(self.device), self.coupled)
        return self._draw(y, index, seed, slot, refine, inpaint)

    def _draw(self, y, index, seed, slot, refine, inpaint=None):
        recipe, noise = self.recipe, ImageNoise(seed, index, self.device)
        options = {"cfg_scale": recipe.cfg_scale}
        if recipe.cfg_schedule:
            options["cfg_schedule"] = recipe.cfg_schedule
        if recipe.cfg_skip:
            options["cfg_skip"] = recipe.cfg_skip
        if self.model.cfg.kind == "mar":
            options["num_iter"] = recipe.num_iter
        if self.pool is not None:
            options["order"] = self.pool[slot].to(self.device)
        if inpaint:
            x, fill, n_known = inpaint
            order = (noise.rand(self.model.cfg.n_tokens) + fill).argsort(1)          # known positions (below 1) come first
            options.update(x=x.expand(len(y), -1, -1), order=order, n_known=n_known)
        if refine is not None:
            whole = recipe.inverse == "full"
            options["refine"] = lambda i, c, inverse: refine(i, c, lambda c: inverse(c, full=whole))
            options["move_null"] = recipe.move_null
        with torch.no_grad(), amp(self.device):
            return self.model.generate(y.to(self.device), noise, recipe.sampler, **options)


def scan_orders(S, grid):
    """S generation orders (S, N) of grid x grid tokens: raster scans from each corner, by rows and by columns; random ones after these 8.

    A scan draws each patch beside known ones: after 2400 steps mar-tiny draws digits better so than in a random order.
    """
    rows = torch.arange(grid * grid).view(grid, grid)
    scans = [scan.flatten() for t in (rows, rows.T) for scan in (t, t.flip(0, 1), t.flip(1), t.flip(0))]
    generator = torch.Generator().manual_seed(0)
    return torch.stack((scans + [torch.randperm(grid * grid, generator=generator) for _ in range(S - 8)])[:S])


@torch.no_grad()
def ideal_conditions(model, tokens_of, classes, m, pool=None, num_iter=None, batch=256):
    """Particles of P_c*: teacher-forced conditions of at most m real images per class -> (targets, weights) of a Refiner.

    CHOICE(target): the ideal condition is what the transformer computes from an error-free context, so that P_c
    differs from P_c* by exposure bias alone. Alternative: a buffer of the conditions met in training. Flag: --target.
    The group of class number k and order s is k S + s. One (G, P_i, m, C) per AR step, None for step 0, whose condition
    depends on the class alone and has no error; weights (G, m) are zero where a class has fewer than m images.
    """
    device, S = next(model.parameters()).device, 1 if pool is None else len(pool)
    tokens = [tokens_of(y, m).to(device) for y in classes]
    for y, x in zip(classes, tokens):
        if len(x) == 0:
            raise ValueError(f"no reference image of class {y}: refinement needs at least one per class (better 100)")
    m = max(len(x) for x in tokens)                                                     # no padding where it is not needed
    weights = torch.zeros(len(classes), S, m, device=device)
    targets = [[] for _ in model.chain(num_iter)]
    for k, (y, x) in enumerate(zip(classes, tokens)):
        weights[k, :, :len(x)] = 1
        for s in range(S):
            options = {} if pool is None else {"num_iter": num_iter}
            with amp(device):
                c = torch.cat([model.conditions(part, torch.full((len(part),), y, device=device), **options,
                                                **({} if pool is None else {"order": pool[s].to(device).expand(len(part), -1)}))
                               for part in x.split(batch)]).float()                     # (m_y, N, C)
            c = F.pad(c, (0, 0, 0, 0, 0, m - len(c)))
            for i, (a, b) in enumerate(model.chain(num_iter)):
                targets[i].append((c[:, a:b] if pool is None else c[:, pool[s, a:b]]).transpose(0, 1))
    return [None, *(torch.stack(t) for t in targets[1:])], weights.flatten(0, 1)


def buffered_conditions(model, classes, pool=None, num_iter=None):
    """Particles of P_c* from the conditions that training met last, groups and steps as in `ideal_conditions`.

    They come from the raw weights under dropout and, for mar, from all masks under which a position was predicted.
    """
    kept = model.buffer.targets()[list(classes)]                                        # (K, N, m, C)
    orders = torch.arange(kept.shape[1], device=kept.device)[None] if pool is None else pool.to(kept.device)
    targets = [kept[:, orders[:, a:b]].flatten(0, 1) for a, b in model.chain(num_iter)] # (K S, P_i, m, C)
    return [None, *targets[1:]]


def reference_tokens(facts, split, data_dir=None, vae=None, cache_dir=None):
    """tokens_of(y, m) for `ideal_conditions`, from the data set that a checkpoint was trained on."""
    dataset = datasets.load(facts["dataset"], data_dir or facts["data_dir"], facts["size"], facts["patch"], vae=vae,
                            cache_dir=cache_dir or facts.get("cache_dir"))
    if dataset.class_names != facts["class_names"]:                     # labels would mean other classes
        raise ValueError(f"the reference images are of {len(dataset.class_names)} classes ({dataset.class_names[0]} ...), the checkpoint of "
                         f"{len(facts['class_names'])} ({facts['class_names'][0]} ...); give the --data_dir or --cache_dir of its training")
    images = getattr(dataset, split)

    def tokens_of(y, m):
        index = images.of_class(y, m)
        return patchify(images.batch(index)[0], facts["patch"]) if len(index) else torch.empty(0)
    return tokens_of


def refinement_bytes(model, recipe):
    """(bytes per class that a calibrated Refiner holds, bytes per class at the peak, while targets are whole conditions).

    Per token, order and class: m targets of rank r; a Sinkhorn stage keeps n_cal particles and a number
    for each of both, a Gaussian stage a matrix. The peak: all conditions (m, N, C) in fp32, twice while they are sorted by AR step.
    """
    refine, cfg, m, n = recipe.refine, model.cfg, recipe.m, recipe.calibration_images(recipe.m)
    r, unit = refine.rank_of(cfg.n_embd), torch.finfo(getattr(torch, refine.store)).bits // 8
    state = {"sinkhorn": n * (r * unit + 4) + 4 * m + 8, "gaussian": 4 * (r * r + 2 * r), "mean": 12 * r, "meanvar": 12 * r, "ema": 4 * r, "knn": 4 * m}
    held = sum(b - a for a, b in model.chain(recipe.num_iter)[1:]) * (m * r * unit + sum(state[name] for name, _ in refine.stages()))
    orders = max(recipe.orders, 1)
    return orders * held, orders * (held + 8 * m * cfg.n_tokens * cfg.n_embd)


# ---------------------------------------------------------------- command line

def parse_args(argv=None):
    p = Parser(description="Draw images from a checkpoint.")
    p.add_argument("--ckpt", help="a checkpoint file or a run directory (default: the newest under out/)")
    p.add_argument("--vae", help="kl16.ckpt, for models of latents")
    p.add_argument("--classes", nargs="+", metavar="CLASS", help="numbers, names, or parts of a name (default: all)")
    p.add_argument("--n", type=number(int, 1), help="images in all, shared out evenly (default: 10 a class)")
    p.add_argument("--seed", type=number(int, 0), default=0, help="of the noise")
    p.add_argument("--batch_size", type=number(int, 1), default=500, help="images at once")
    p.add_argument("--out", help=".png for a grid, .npz for arrays (default: sample.png beside the checkpoint)")
    p.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    p.add_argument("--export", metavar="FILE", help="mar: write the weights in the layout of MAR's checkpoints, and stop")
    p.add_argument("--refine_memory", type=number(float, 0), default=16, metavar="GB", help="memory for refinement; as many classes at a time as fit")
    p.add_argument("--inpaint", metavar="IMAGE", help="mar: an image of which the masked part is filled in")
    p.add_argument("--mask", help="white where --inpaint is to be filled")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda ...")
    add_drawing_flags(p)
    return p.parse_args(argv)


def add_drawing_flags(p):
    """The flags that make_recipe and prepare_refinement read: evaluate.py has the same."""
    p.add_argument("--solver", choices=SOLVERS, default="ddpm", help="ddpm: ancestral; ddim; dpm++: DPM-Solver++(2M)")
    p.add_argument("--steps", type=number(int, 1, 1000), default=25, help="evaluations of the denoiser per patch")
    p.add_argument("--steps_late", type=number(int, 1, 1000), help="anneal from --steps to this over the chain")
    p.add_argument("--ddim_eta", type=number(float, 0, 1), default=0.0, help="ddim: 0 deterministic, 1 as random as ddpm")
    p.add_argument("--temperature", type=number(float, 0), default=1.0, help="multiplies the noise")
    p.add_argument("--x0_bound", type=number(float, 0), help="bound of |x0|, 0 = off (default: the data's range)")
    p.add_argument("--num_iter", type=number(int, 1), help="mar: AR steps (default: one per token)")
    p.add_argument("--cfg_scale", type=number(float, 0), default=GUIDANCE, help="classifier-free guidance, 1 = off")
    p.add_argument("--cfg_schedule", choices=("constant", "linear"), help="over the chain (default: mar linear, else constant)")
    p.add_argument("--cfg_skip", type=number(float, 0), default=0.0, help="do without guidance where its scale is within this of 1, 0 = exact")
    r = p.add_argument_group("refinement", "Algorithm 1; see the README. Unset flags take the tuned setting.")
    r.add_argument("--refine", choices=("default", *METHODS), default="none", help="what moves the conditions")
    r.add_argument("--strength", type=number(float, 0), help="the dial from diversity to fidelity: multiplies eta")
    r.add_argument("--K", type=number(int, 0), help="JKO steps per AR step; 0 = none")
    r.add_argument("--eta", type=number(float, 0), help="JKO step size")
    r.add_argument("--reg", type=number(float, 1e-6), help="entropic weight over the mean cost")
    r.add_argument("--lam", type=number(float, 0), help="weight of the inverse-process term")
    r.add_argument("--inverse", choices=("one", "full"), default="one", help="x_hat for T^-1: one evaluation, or a whole trajectory")
    r.add_argument("--rank", type=number(int, 0), help="transport in so many principal directions, 0 = all (default: a quarter)")
    r.add_argument("--pooled", action="store_true", default=None, help="one transport problem for all classes")
    r.add_argument("--biased", dest="debias", action="store_false", default=None, help="entropic map without debiasing")
    r.add_argument("--explicit", dest="implicit", action="store_false", default=None, help="explicit instead of implicit JKO steps")
    r.add_argument("--move_null", action="store_true", help="the null condition of guidance moves along, so that guidance does not multiply the displacement")
    r.add_argument("--coupled", action="store_true", help="literal Algorithm 1: plans between the images of a batch")
    r.add_argument("--target", choices=("teacher", "buffer"), default="teacher",
                   help="ideal conditions: those of real images, or those that training met last (needs train.py --buffer)")
    r.add_argument("--m", type=number(int, 1), default=1000, help="reference images per class, at most")
    r.add_argument("--ref_split", choices=("train", "heldout"), default="train", help="where reference images come from")
    r.add_argument("--n_cal", type=number(int, 8), default=0, help="images per class (and order) that calibrate frozen mode (default: twice as many as reference images, at least 200)")
    r.add_argument("--orders", type=number(int, 0), help="mar: generation orders to draw from, the first the raster scan; 0 = a fresh random one per image "
                   "(default: 1 with refinement, else 0)")
    r.add_argument("--data_dir", help="folder and imagenet: where the reference images are (default: as in training)")
    r.add_argument("--cache_dir", help="models of latents: the cache with the reference latents (default: as in training)")


def make_recipe(args, kind, x0_bound):
    """The Recipe of the flags."""
    options = {k: getattr(args, k) for k in ("strength", "K", "eta", "reg", "lam", "rank", "pooled", "debias", "implicit")
               if getattr(args, k) is not None}
    refine = RefineConfig(**options) if args.refine == "default" else RefineConfig(method=args.refine, **options)
    orders = args.orders if args.orders is not None else int(kind == "mar" and bool(refine.stages()))
    bound = x0_bound if args.x0_bound is None else args.x0_bound or None
    sampler = Sampler(args.solver, args.steps, args.steps_late, args.ddim_eta, args.temperature, bound)
    return Recipe(sampler, args.cfg_scale, args.cfg_schedule, args.num_iter, refine, args.inverse, orders, args.target, args.m,
                  args.ref_split, args.n_cal, args.cfg_skip, args.move_null)


def newest_run(root="out"):
    found = sorted(Path(root).rglob("ckpt.pt"), key=lambda f: f.stat().st_mtime)
    if not found:
        raise ValueError(f"no checkpoint under {root}/; train one with: python train.py, or give --ckpt")
    return found[-1]


def class_ids(wanted, names):
    """Class numbers of names, numbers, ImageNet ids or parts of a name; ValueError names the unknown or the candidates."""
    return [find_class(word, names) for word in wanted] if wanted else list(range(len(names)))


def find_class(word, names):
    """The class number of one word; the first rule that finds any must find one only."""
    low = word.lower()
    imagenet = datasets.imagenet_classes()
    ids = [i for i, _ in imagenet] if names == [n for _, n in imagenet] else [""] * len(names)
    rules = (lambda k, name: name == word, lambda k, name: str(k) == word, lambda k, name: ids[k] == low,
             lambda k, name: name.lower().split(", ")[0] == low, lambda k, name: low in name.lower().split(", "),
             lambda k, name: low in name.lower())
    for rule in rules:
        found = [k for k, name in enumerate(names) if rule(k, name)]
        if len(found) == 1:
            return found[0]
        if found:
            more = f" and {len(found) - 12} more" if len(found) > 12 else ""
            raise ValueError(f"--classes {word!r} may be any of " + "; ".join(f"{k} {names[k]}" for k in found[:12]) + f"{more}: give the number")
    raise ValueError(f"--classes {word}: this checkpoint knows {', '.join(names[:20])}{' ...' if len(names) > 20 else ''}")


def read_inpaint(args, facts, kind, tokeniser, device):
    """(tokens (1, N, D), which to fill (N,), how many are known) of --inpaint and --mask."""
    if kind != "mar":
        raise ValueError(f"--inpaint needs a mar model: a {kind} model cannot condition on an arbitrary part of an image")
    if not args.mask:
        raise ValueError("--inpaint needs --mask, white where the image is to be filled")
    if args.refine != "none":
        raise ValueError("--inpaint cannot be refined: targets are computed for whole generation orders; use --refine none")
    mode = "L" if facts["channels"] == 1 else "RGB"
    image, mask = (np.array(centre_crop(Image.open(f).convert(m), facts["size"])) for f, m in ((args.inpaint, mode), (args.mask, "L")))
    planes = lambda a: torch.from_numpy(a).float().reshape(1, facts["size"], facts["size"], -1).permute(0, 3, 1, 2)
    x = patchify(tokeniser.encode((planes(image) / 127.5 - 1).to(device), torch.Generator().manual_seed(args.seed)), 1)
    fill = (patchify(planes(mask), tokeniser.stride) > 127).any(-1)[0].to(device)        # a token that the mask touches is filled whole
    if not fill.any():
        raise ValueError(f"--mask {args.mask} has no white pixel: nothing to fill")
    return x, fill, int((~fill).sum())


def prepare_refinement(drawer, args, state, path, tokens_of=None, keep=True):
    """Coupled: compute the targets. Frozen: load refine.pt if it was made for exactly this, else calibrate and save it.

    keep=False: no file, for some of many classes.
    """
    tokens_of = tokens_of or lazy_references(args, state)
    if args.coupled:
        return drawer.set_targets(tokens_of)
    file = path.parent / "refine.pt"
    weights = hashlib.sha256(b"".join(v.flatten()[:4096].cpu().numpy().tobytes() for v in state["ema"].values()))
    made_for = {"layout": Refiner.LAYOUT, "checkpoint": f"step {state['step']}, {weights.hexdigest()[:16]}", "classes": drawer.classes,
                "pool": drawer.pool if drawer.pool is None else drawer.pool.tolist(), **asdict(drawer.recipe)}
    made_for = json.loads(json.dumps(made_for))                                         # tuples become lists, as when read back
    if keep and file.exists():
        saved = torch.load(file, map_location=drawer.device, weights_only=True)
        differs = [k for k, v in made_for.items() if saved["made_for"].get(k) != v]
        if not differs:
            drawer.refiner = Refiner.load(saved["refiner"])
            return
        print(f"{file} was calibrated for another {', '.join(differs)}: calibrating anew")
    began = time.time()
    n = drawer.calibrate(tokens_of, args.batch_size, lambda it: tqdm(it, desc="calibrating", unit="batch", disable=None))
    if keep:
        save_checkpoint(file, {"made_for": made_for, "refiner": drawer.refiner.state_dict()})
        print(f"calibrated with {n} images per class in {time.time() - began:.0f} s -> {file} ({drawer.refiner.nbytes() / 2**20:.1f} MiB)")


def lazy_references(args, state):
    """tokens_of(y, m) that opens the data set when it is first asked, and once."""
    opened = functools.cache(lambda: reference_tokens(state["data"], args.ref_split, args.data_dir, getattr(args, "vae", None),
                                                      getattr(args, "cache_dir", None)))
    return lambda y, m: opened()(y, m)


def class_rounds(classes, model, recipe, gigabytes, chief):
    """Classes in lists that fit the memory for refinement; one list of all without refinement."""
    if not recipe.refined or not classes:
        return [classes]
    held, peak = refinement_bytes(model, recipe)
    at_once = max(1, int(gigabytes * 1e9 / peak))
    if chief and (at_once < len(classes) or len(classes) > 50):
        print(f"refinement takes {held / 1e6:.1f} MB a class ({peak / 1e6:.1f} MB while it is prepared): {min(at_once, len(classes))} of "
              f"{len(classes)} classes at a time in --refine_memory {gigabytes:g} GB; less --m, --n_cal or --rank fits more")
    return [classes[k:k + at_once] for k in range(0, len(classes), at_once)]


def batches(labels, index, size, whole):
    """Parts of index (class by class) of about `size` images; `whole`: no class is cut, since coupled plans need all of it."""
    if not whole:
        return index.split(size)
    cut, first = [], 0
    ends = (torch.nonzero(labels[index].diff()).flatten() + 1).tolist() + [len(index)]
    for end, following in zip(ends, ends[1:] + [10 ** 18]):
        if following - first > size:
            cut.append(end - first)
            first = end
    return index.split(cut)


def draw_images(model, tokeniser, recipe, labels, mine, args, state, path, rank, world):
    """uint8 (len(mine), H, W, ch): the images `mine` (class by class) of this rank, round by round; and the seconds of preparing refinement."""
    facts, chief = state["data"], rank == 0
    inpaint = read_inpaint(args, facts, model.cfg.kind, tokeniser, next(model.parameters()).device) if args.inpaint else None
    images = np.empty((len(mine), facts["size"], facts["size"], facts["channels"]), dtype=np.uint8)
    rounds = class_rounds(labels[mine].unique().tolist(), model, recipe, args.refine_memory, chief)
    alone, tokens_of, done, prepared = world == 1 and len(rounds) == 1, lazy_references(args, state), 0, 0.0
    with tqdm(total=len(mine), desc="sampling", unit="image", disable=None if chief else True) as bar:
        for classes in rounds:
            every = range(len(facts["class_names"]))
            # few classes: calibrate all of them, so that one calibration serves any --classes
            drawer = Drawer(model, recipe, every if alone and len(every) <= 50 else classes)
            if recipe.refined and classes:
                began = time.time()
                prepare_refinement(drawer, args, state, path, tokens_of, keep=alone)
                prepared += time.time() - began
            now = mine[torch.isin(labels[mine], torch.tensor(classes))]
            for part in batches(labels, now, args.batch_size, recipe.refined and args.coupled) if len(now) else ():
                x = drawer(labels[part], part.tolist(), args.seed, inpaint)
                images[done:done + len(part)] = to_uint8(tokeniser.decode(unpatchify(x, 1)))
                done += len(part)
                bar.update(len(part))
    return images, prepared


def merge(images, mine, n, out, rank, world):
    """Images (n, H, W, ch) of all ranks in their order, on rank 0; None on the others. They pass through files beside `out`."""
    if world > 1:
        np.save(f"{out}.rank{rank}.npy", images)
        np.save(f"{out}.index{rank}.npy", mine.numpy())
        dist.barrier()
        if rank > 0:
            return None
    whole = np.empty((n, *images.shape[1:]), dtype=np.uint8)
    whole[mine.numpy()] = images
    for r in range(1, world):
        whole[np.load(f"{out}.index{r}.npy")] = np.load(f"{out}.rank{r}.npy", mmap_mode="r")
    for r in range(world if world > 1 else 0):
        for kind in ("rank", "index"):
            os.remove(f"{out}.{kind}{r}.npy")
    return whole


def main():
    args = parse_args()
    device, rank, world = pick_device(args.device), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    path = find_checkpoint(args.ckpt) if args.ckpt else newest_run()
    model, state = load_model(path, device)
    set_threads(model, device)
    if args.export:
        export_mar(args.export, state)
        return print(f"{path} -> {args.export}, in the layout of MAR's checkpoints")
    facts, names = state["data"], state["data"]["class_names"]
    out = Path(args.out) if args.out else path.parent / "sample.png"
    if out.suffix not in (".png", ".npz"):
        raise ValueError(f"--out {out}: expected a name that ends in .png or .npz")
    if out.exists() and not args.overwrite:
        raise ValueError(f"{out} exists; choose another --out or add --overwrite")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
    ids = torch.tensor(class_ids(args.classes, names))
    recipe = make_recipe(args, model.cfg.kind, facts["x0_bound"])
    Drawer(model, recipe, [])                                            # do model and recipe fit each other?
    tokeniser = datasets.open_tokeniser(facts, args.vae, device)
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=30))      # ranks meet once, at the end of hours

    n = args.n or 10 * len(ids)
    labels = ids[torch.arange(n) % len(ids)]                             # image k: its class depends on k alone
    index = torch.argsort(labels, stable=True)                           # class by class, so that batches hold few classes
    # a class stays on one rank if it is calibrated or coupled; else images are dealt out evenly
    mine = index[labels[index].unique_consecutive(return_inverse=True)[1] % world == rank] if recipe.refined else index.tensor_split(world)[rank]
    began = time.time()
    images, prepared = draw_images(model, tokeniser, recipe, labels, mine, args, state, path, rank, world)
    images = merge(images, mine, n, out, rank, world)
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
    seconds = time.time() - began - prepared
    if out.suffix == ".npz":
        np.savez_compressed(out, arr_0=images, arr_1=labels.numpy())
    else:
        image_grid(images[index.numpy()], columns=max(1, min(10, n // len(ids) or n))).save(out)
    calls = model.head_calls(recipe.sampler, recipe.num_iter) * (1 if recipe.cfg_scale == 1 else 2)
    print(f"{n} images in {seconds:.1f} s ({n / seconds:.1f} images/s), {calls} denoiser calls per image -> {out}")


if __name__ == "__main__":
    run(main)
