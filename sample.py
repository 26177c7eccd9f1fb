"""Draw images from a checkpoint: where transformer, head and refinement meet (Algorithm 1).

    python sample.py                                   the run in out/, 10 images a class
    python sample.py --refine default                  the same with refined conditions
    python sample.py --classes 3 7 --n 20 --cfg_scale 2             two classes, more guided
    python sample.py --n 5000 --out s.npz              for evaluate.py: arr_0 uint8, arr_1 labels
    torchrun --nproc_per_node 8 -- sample.py --n 50000 --out s.npz    each GPU a share (mind the --)

Image k of a seed is the same at any batch size, unless maps are fitted on the batch: by --coupled,
and by --refine shared, which is for 50 images of a class and less. Refinement goes class by class,
so that its memory does not grow with them; what it fits is kept in the folder refine/ of a run.
"""
from command import Parser, gather, join, number, pick_device, run, set_threads    # first: signals

import functools
import importlib.util
import os
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

import numpy as np
import torch
from tqdm import tqdm

import data as datasets
from data import image_grid, patchify
from diffloss import ImageNoise
from files import check_output, digest_of_code, keep_or_make, weights_digest, write, write_png
from model import GUIDANCE, load_model
from ot_refine import MAPS, Refiner, check_maps, principal_axes, stages_of
from runs import find_checkpoint

SPREAD = 512            # reference images that the directions of transport are taken from
KEEP = 2 ** 30          # bytes of targets, or maps, of all classes together that a run folder keeps
LARGE = 5e7             # parameters from which a CPU may gain by bf16, a GPU by torch.compile
FAST = importlib.util.find_spec("fast")         # a copy of the project may lack it


# ---------------------------------------------------------------- one batch, the ideal conditions

def draw(model, y, index, seed, refine=None, on_condition=None, **options):
    """Tokens (B, N, D) of the images `index` (B ints) of a seed, of classes y (B,); refine,
    on_condition and options (guidance, solver, steps ...) are those of the model's `generate`."""
    noise, y = ImageNoise(seed, index, model.device), y.to(model.device)
    return fast_copy(model).generate(y, noise, refine=refine, on_condition=on_condition, **options)


def fast_copy(model):
    """What is drawn from: a large model, and any on a GPU, as fast.py makes it; else itself."""
    if not FAST or model.device.type == "cpu" and model.num_params < LARGE:
        return model
    import fast
    return fast.ready(model)


def tokens_of(dataset, split="train"):
    """The function (k, m) -> tokens (<= m, N, D) of real images of class k."""
    images = getattr(dataset, split)
    return lambda k, m: patchify(images.batch(images.of_class(k, m))[0], dataset.patch)


@torch.no_grad()
def ideal_conditions(model, x, k, order, num_iter=None, batch=256):
    """Targets (N, m, C), particles of P_c* at each place of an order (N,): teacher-forced
    conditions of real tokens x (m, N, D) of class k.
    CHOICE(target): the ideal condition is what the transformer computes from an error-free context,
    so that P_c differs from P_c* by exposure bias alone. Alternative: the paper's buffer of the
    conditions met in training, which was worse. For another P_c*, change x here.
    """
    y = torch.full((len(x),), k, device=model.device)
    parts = [fast_copy(model).conditions(a, b, order.expand(len(a), -1), num_iter).float()
             for a, b in zip(x.to(model.device).split(batch), y.split(batch))]
    return torch.cat(parts).transpose(0, 1).contiguous()


# ---------------------------------------------------------------- refinement, class by class

@dataclass(eq=False)
class Refinement:
    """How the conditions of all classes are refined: `refiner(k)` is the Refiner of class k, the
    refine(i, c, y) which `generate` calls. Frozen maps are those that coupled refinement fitted
    while it drew n_cal images of the class: its calibration.

    sampling: how images are drawn (options of `generate`), with which frozen maps are calibrated.
    origin: digests of what targets depend on beside the settings here ({"weights": ...}).
    """
    model: torch.nn.Module
    tokens_of: Callable             # (k, m) -> tokens (<= m, N, D) of real images
    sampling: dict
    method: str = "default"         # see ot_refine.stages_of, for K and eta, too
    K: int = 2
    eta: float = 2.0
    coupled: bool = False
    m: int = 500                    # reference images of a class, at most
    reg: float = 0.2                # entropic weight, as a fraction of the mean cost
    rank: int | None = None         # directions of transport; None: a quarter of C, 0: all
    n_cal: int | None = None        # images that calibrate a class; None: 2 m, 200 to 1000
    lam: float = 0.0                # weight of the inverse-process term
    inverse_of: Callable | None = None      # for lam > 0: (refinement, k) -> inverse(i, c)
    orders: str = "class"           # mar: a random order a class, "one" for all, or "raster"
    seed: int = 0                   # of the calibration's noise and of mar's orders
    folder: Path | None = None      # where targets and maps are kept
    origin: dict | None = None
    spent: float = 0.0              # seconds that axes, targets and maps took

    def __post_init__(self):
        if self.model.cfg.kind == "cdm":
            raise ValueError("--refine: a cdm model has no chain of conditions, nothing to refine; "
                             "use an ar or mar model")
        self.stages, C = stages_of(self.method, self.K, self.eta), self.model.cfg.n_embd
        self.rank = min(C, -(-C // 4) if self.rank is None else self.rank or C)
        self.say = functools.cache(print)                      # each message once
        check_maps(self.stages, self.lam, self.inverse_of)

        # what kept files were made for; `kept` adds the class
        self.targets_depend_on = {**(self.origin or {}), "code": code_digest(), "m": self.m,
                                  "rank": self.rank, "orders": [self.orders, self.seed],
                                  "num_iter": self.sampling.get("num_iter")}
        self.maps_depend_on = {**self.targets_depend_on, "stages": self.stages, "reg": self.reg,
                               "lam": [self.lam, getattr(self.inverse_of, "__qualname__", None)],
                               "sampling": self.sampling}

    def order(self, k):
        """The generation order (N,) of class k."""
        if self.orders == "raster":
            return torch.arange(self.model.cfg.n_tokens, device=self.model.device)
        return self.model.order(k if self.orders == "class" else 0, self.seed)

    def groups(self, labels, size):
        """(n,): images of labels (n,) with the same number share a map, and depend on each other if
        it is coupled: those of a class. many.Shared has others, which follow from `size`, how
        many are drawn at once."""
        return labels.unique(return_inverse=True)[1]

    def for_group(self, y):
        """refine(i, c, y) for the images of a group, whose classes are y."""
        return self.refiner(y[0].item())

    def conditions(self, k, m):
        """Ideal conditions (N, m, C) of class k by place."""
        x = self.tokens_of(k, m)
        if len(x) == 0:
            raise ValueError(f"class {k} has no reference image: refinement needs one, better 100")
        return ideal_conditions(self.model, x, k, self.order(k), self.sampling.get("num_iter"))

    @functools.cached_property
    def axes(self):
        """Directions of transport (N, C, r), by raster position, shared by all classes."""
        def make():
            n = self.model.cfg.num_classes
            some = range(0, n, -(-n // SPREAD))
            # orders may differ between classes; a position's directions do not
            found = [self.conditions(k, SPREAD // len(some))[self.order(k).argsort()] for k in some]
            return principal_axes(torch.cat(found, 1), self.rank)
        return self.kept("axes", self.targets_depend_on, make)

    def targets(self, k):
        """(N, m, r): the ideal conditions of class k in the axes of its places."""
        axes = self.axes

        def make():
            c = self.conditions(k, self.m)
            if c.shape[1] < 25:
                self.say("warning: with less than 25 reference images of a class its refined "
                         "images may be worse than unrefined ones")
            return torch.bmm(c, axes[self.order(k)])
        return self.kept("targets", self.targets_depend_on, make, k)

    def refiner(self, k):
        """The Refiner of class k; frozen: calibrated, or from the maps of an equal calibration."""
        if not self.stages:
            return Refiner(None, None, ())
        order, targets = self.order(k), self.targets(k)
        inverse = self.inverse_of(self, k) if self.lam > 0 else None
        refiner = Refiner(self.axes[order], targets, self.stages, self.reg, self.lam, inverse)
        if self.coupled:
            return refiner

        most = self.n_cal or min(max(200, 2 * targets.shape[1]), 1000)
        n = at_once(self.model, self.sampling, most)
        if n < most:
            self.say(f"{n} images calibrate a class, as {most} do not fit in memory")

        def calibrate():              # negative seeds: the noise of no image, whatever its --seed
            draw(self.model, torch.full((n,), k), range(k * n, k * n + n), -1 - self.seed,
                 refiner, **self.sampling, order=order.expand(n, -1))
            return refiner.state()
        return refiner.load(self.kept("maps", {**self.maps_depend_on, "n": n}, calibrate, k))

    def kept(self, kind, made_for, make, k=None):
        """make(), or what it gave before if the folder holds that, made for the same class k."""
        def timed():
            began, value = time.time(), make()
            self.spent += time.time() - began
            return value

        copies = 1 if k is None else self.model.cfg.num_classes
        value, self.folder = keep_or_make(self.folder, kind, {**made_for, "class": k}, timed,
                                          KEEP // copies, self.model.device, self.say)
        return value


def code_digest():
    """Of the code that references, conditions, targets and maps pass through."""
    return digest_of_code("data", "sets", "latents", "vae", "model", "mar", "diffloss", "ot_refine",
                          "sample", "fast", "many")


# ---------------------------------------------------------------- many images

def at_once(model, sampling, most=500):
    """How many images are drawn at once: `most`, or on a GPU what fits."""
    if not FAST or model.device.type == "cpu":
        return most
    import fast
    return fast.images_at_once(model, sampling, most)


def batches(labels, index, size, refinement=None):
    """Parts of index, of at most `size` images, each with its refine(i, c, y) or None. A group that
    shares a map is drawn on its own, in equal parts, as coupled maps want it."""
    if refinement is None:
        yield from ((part, None) for part in index.split(size) if len(part))
        return
    group = refinement.groups(labels, size)[index]
    for g in group.unique():
        mine = index[group == g]
        refine = refinement.for_group(labels[mine])
        yield from ((part, refine) for part in mine.tensor_split(-(-len(mine) // size)))


def draw_images(model, decode, labels, index, seed, sampling, batch_size=500, refinement=None,
                wrap=None):
    """uint8 (n, H, W, ch) of a seed's n images, of classes labels (n,): those of `index` are drawn,
    the others are left unset; None if there are none.

    decode: tokens (B, N, D) -> uint8 images, or latents: see data.decoder; sampling: options of
    `generate`; wrap(refine, y, index) -> another refine, for controls.
    """
    images, quiet = None, int(os.environ.get("RANK", 0)) > 0 or None
    bar = tqdm(total=len(index), desc=f"drawing, seed {seed}", unit="image", leave=False,
               disable=quiet)
    for part, refine in batches(labels, index, batch_size, refinement):
        y, options = labels[part], {**sampling, "refine": refine}
        if refinement:
            options["order"] = refinement.order(y[0].item()).expand(len(y), -1)
        if wrap:
            options["refine"] = wrap(refine, y, part)
        x = decode(draw(model, y, part.tolist(), seed, **options))
        images = np.empty((len(labels), *x.shape[1:]), x.dtype) if images is None else images
        images[part.numpy()] = x
        bar.update(len(part))
    bar.close()
    return images


# ---------------------------------------------------------------- command line

def parse_args(argv=None):
    p = Parser(description="Draw images from a checkpoint.")
    add = p.add_argument
    add("--ckpt", default="out", help="a run folder or a checkpoint")
    add("--vae", help="kl16.ckpt: decodes what a model of latents draws")
    add("--classes", nargs="+", metavar="CLASS", help="names or numbers (default: all)")
    add("--n", type=number(int, 1), help="images in all (default: 10 a class)")
    add("--seed", type=number(int, 0, 2 ** 32 - 1), default=0, help="of the noise")
    add("--batch_size", type=number(int, 1), help="images at once (default: 500, or what fits)")
    add("--out", help=".png or .npz (default: beside --ckpt, sample.png or sample-default.png "
                      "after --refine; .npz of latents)")
    add("--overwrite", action="store_true", help="replace --out if it exists")
    add("--device", default="auto", help="auto, cpu, cuda ...")
    add("--solver", help="ddpm (default; 25 steps and more), ddim, dpm++ (for 6 to 10 steps)")
    add("--steps", type=number(int, 1, 1000), default=25, help="evaluations of the head per patch")
    add("--temperature", type=number(float, 0, 100), default=1.0, help="of the noise")
    add("--num_iter", type=number(int, 1), help="mar: AR steps (default: one per token)")
    add("--order", choices=("random", "raster"),
        help="mar: draw all images of a class in one order (default: each in its own; refined: "
             "random)")
    add("--cfg_scale", type=number(float, 0, 1000), default=GUIDANCE,
        help="classifier-free guidance: fidelity for variety; 1 = off")
    add("--cfg_schedule", choices=("constant", "linear"),
        help="guidance along the chain (default: mar linear, else constant)")

    add = p.add_argument_group("refinement (Algorithm 1)").add_argument
    add("--refine", choices=("none", "default", "shared", *MAPS), default="none",
        help="what moves the conditions: default, a Gaussian map, then Sinkhorn steps; shared, one "
             "map for all classes of a batch; or one map alone")
    add("--coupled", action="store_true",
        help="with --refine: plans between the images of a batch, the literal algorithm; else maps "
             "that are calibrated once")
    add("--K", type=number(int, 1), default=2, help="with --refine: Sinkhorn steps a place")
    add("--eta", type=number(float, 1e-6, 1e6), default=2.0,
        help="with --refine: step size; larger: more fidelity, less variety")
    add("--m", type=number(int, 1), default=500, help="with --refine: reference images a class")
    add("--data_dir", help="with --refine: where reference images are (default: as in training)")
    return p.parse_args(argv)


def setup(args):
    """A checkpoint and how to draw from it, as the flags say, for evaluate.py, too: path, model,
    state (the checkpoint's dict), decode (tokens -> images), dataset() -> data.Data, sampling,
    refinement (or None), batch_size, images(labels, seed, index=all): draw_images.

    ValueError where the flags do not fit the checkpoint or each other. A flag is looked at only
    where it has an effect: command.Flags refuses those that nobody has looked at.
    """
    device, path = pick_device(args.device), find_checkpoint(args.ckpt)
    model, state = load_model(path, device)
    set_threads(model, device)
    facts = state["data"]
    decode = datasets.decoder(facts, args.vae, device)
    data_dir = datasets.flags_of(facts["dataset"], args).get("data_dir")
    dataset = functools.cache(lambda: datasets.again(facts, data_dir, args.vae, device))
    sampling = sampling_flags(args, model)
    job = SimpleNamespace(path=path, model=model, state=state, decode=decode, dataset=dataset,
                          sampling=sampling, batch_size=args.batch_size or at_once(model, sampling))
    job.refinement = refinement_flags(args, job, data_dir)
    if job.refinement and job.refinement.coupled and job.batch_size < 500 and not args.batch_size:
        raise ValueError("coupled images depend on how many are drawn at once, and 500 do not fit "
                         f"in memory: choose a number, such as --batch_size {job.batch_size}")

    def images(labels, seed, index=None):
        return draw_images(model, decode, labels, torch.arange(len(labels)) if index is None else
                           index, seed, sampling, job.batch_size, job.refinement)
    job.images = images
    return job


def refinement_flags(args, job, data_dir):
    """The Refinement that the flags ask for, or None."""
    order = args.order if job.model.cfg.kind == "mar" else None
    if args.refine == "none" and not order:
        return None
    how = {"method": args.refine, "orders": "raster" if order == "raster" else "class"}
    if args.refine != "none":                            # else an order alone: conditions stay
        if job.state["data"].get("cache_dir"):
            job.dataset()                    # are the latents in the cache those of the images?
        references = datasets.digest(job.state["data"], data_dir)
        how |= {"m": args.m, "folder": job.path.parent / "refine",
                "origin": {"weights": weights_digest(job.model), "references": references}}
    if args.refine not in ("none", "shared"):
        how["coupled"] = args.coupled
        if args.refine != "gaussian":
            how |= {"K": args.K, "eta": args.eta}
    make = Refinement
    if args.refine == "shared":
        import many
        make = many.Shared
    tokens = lambda k, m: tokens_of(job.dataset())(k, m)        # read when first asked for
    return make(job.model, tokens, job.sampling, **how)


def sampling_flags(args, model):
    """The options of `generate`, as far as they have an effect on this model."""
    cfg = model.cfg
    model.diffloss.solver(args.solver).timesteps(args.steps)              # are they possible?
    sampling = {"solver": args.solver, "steps": args.steps, "temperature": args.temperature,
                "cfg_scale": args.cfg_scale}
    if args.cfg_scale != 1 and cfg.class_dropout == 0:
        raise ValueError(f"--cfg_scale {args.cfg_scale:g}: this model was trained with "
                         "class_dropout=0 and has no null branch to guide by; use --cfg_scale 1")
    if args.cfg_scale != 1 and cfg.kind != "cdm":
        sampling["cfg_schedule"] = args.cfg_schedule
    if cfg.kind == "mar":
        sampling["num_iter"] = args.num_iter
        if args.num_iter and args.num_iter > cfg.n_tokens:
            raise ValueError(f"--num_iter {args.num_iter}: the model has {cfg.n_tokens} tokens, at "
                             "most one AR step each")
    return sampling


def output(args, job):
    """The checked file that is to be written."""
    latents = job.state["data"]["dataset"] == "latents" and not args.vae
    name = "sample" + f"-{args.refine}" * (args.refine != "none")
    name = args.out or job.path.parent / f"{name}.{'npz' if latents else 'png'}"
    out = check_output("--out", name, (".png", ".npz"), args.overwrite)
    if latents and out.suffix == ".png":
        raise ValueError(f"--out {out}: this model draws latents of a tokeniser that is not here, "
                         "and no picture; --out s.npz writes them unscaled for your own decoder, "
                         "--vae decodes them if they are of kl16.ckpt")
    return out


def draw_file(args, job):
    """What the flags ask for, in a file; job: that of `setup`."""
    rank, world = (int(os.environ.get(k, v)) for k, v in (("RANK", 0), ("WORLD_SIZE", 1)))
    names, out = job.state["data"]["class_names"], output(args, job)
    found = [datasets.find_class(word, names) for word in args.classes or ()] or range(len(names))
    ids = torch.tensor(list(dict.fromkeys(found)))       # each once
    n, seed = args.n or 10 * len(ids), args.seed
    if args.classes and n < len(ids):
        raise ValueError(f"--n {n}: {len(ids)} classes are asked for, at least one image each")
    args.check_used()
    if world > 1:                                        # ranks meet once, at the end of hours
        join("gloo", timedelta(days=30))

    labels = ids[torch.arange(n) % len(ids)]             # image k: its class depends on k alone
    index = labels.argsort(stable=True)                  # class by class
    # images that depend on each other are one process's
    group = job.refinement.groups(labels, job.batch_size) if job.refinement else torch.arange(n)
    owner = group % world
    shares = [index[owner[index] == r] for r in range(world)]
    mine, began = shares[rank], time.time()
    images = job.images(labels, seed, mine)
    if world > 1:
        gather(images, shares, rank)
    if rank > 0:
        return

    spent = job.refinement.spent if job.refinement else 0.0
    seconds = max(time.time() - began - spent, 1e-6)
    if out.suffix == ".npz":
        keys = ("arr_0", "arr_1") if images.dtype == np.uint8 else ("latents", "labels")
        arrays = dict(zip(keys, (images, labels.numpy())))
        write(out, lambda f: np.savez_compressed(f, **arrays))
    else:
        write_png(out, image_grid(images[index.numpy()], min(10, n // len(ids) or n)))
    what = "images" if images.dtype == np.uint8 else f"latents {images.shape[1:]}, unscaled,"
    print(f"{n} {what} in {seconds:.1f} s ({n / seconds:.1f} a second)"
          + f" after {spent:.1f} s of preparation" * (spent > 0) + f", {args.steps} steps, "
          f"guidance {args.cfg_scale:g}, refinement {args.refine} -> {out}")


def main():
    args = parse_args()
    draw_file(args, setup(args))


if __name__ == "__main__":
    run(main)
