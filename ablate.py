"""The ablation: every part of the method, one row each, on the same models, seeds and images.

    python ablate.py --ar out/ar --mar out/mar --cdm out/cdm                 25 rows, ten minutes
    python ablate.py --ar out/ar --mar out/mar --cdm out/cdm --profile full  every row, hours
    python ablate.py --ar out/ar --only parts "steps: dpm++ 10"              some rows

`ablation` lists the rows. To try something, add a line to it; a row may change any option of
`generate` (sampling) and of sample.Refinement (refine), its hooks included. --out_dir receives
rows.jsonl, a line for each finished row and seed, table.csv and figures. To go on after a stop, run
the same command again: a result is known by all that it depends on, code and weights included.

The rivals of optimal transport are below: maps of the same `fit` interface as those of ot_refine.
"""
import csv
import functools
import inspect
import io
import json
import math
import time
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

import data as datasets
import evaluate
import ot_refine
import sample
from files import Parser, number, read_lines, run, write_text
from diffloss import ImageNoise
from evaluate import MIN_IMAGES, Judge, make_extractor, mean_std, real_images, sliced_w2, warn
from model import GUIDANCE, KINDS
from ot_refine import sq_cost
from sample import Refinement, draw_images, raster_order, tokens_of


# ---------------------------------------------------------------- the rivals: other maps

@dataclass
class Mean:
    """T(z) = z + mean of the targets - mean of the conditions."""
    shift: torch.Tensor         # (C,)

    @classmethod
    def fit(cls, c, target, reg=None):
        return cls(target.mean(0) - c.mean(0))

    def __call__(self, z):
        return z + self.shift


@dataclass
class MeanVar:
    """Mean and variance of each direction are matched, on their own."""
    mean: torch.Tensor          # (C,)
    scale: torch.Tensor         # (C,)
    to: torch.Tensor            # (C,)

    @classmethod
    def fit(cls, c, target, reg=None):
        n, m, s, t = len(c), len(target), *(len(z) * z.var(0, correction=0) for z in (c, target))
        # one more observation of each: n = 1 is a mean shift, no variance is 0
        both = (s + t) / max(n + m - 2, 1) + 1e-30
        return cls(c.mean(0), ((t + both) * n / ((s + both) * m)).sqrt(), target.mean(0))

    def __call__(self, z):
        return self.to + (z - self.mean) * self.scale


@dataclass
class EMA:
    """Every condition becomes one ideal one: a running mean over the targets, decay .99."""
    ideal: torch.Tensor         # (C,)

    @classmethod
    def fit(cls, c, target, reg=None):
        w = 0.99 ** torch.arange(len(target) - 1, -1, -1, device=c.device, dtype=c.dtype)
        return cls(w @ target / w.sum())

    def __call__(self, z):
        return self.ideal.expand_as(z)


@dataclass
class Nearest:
    """Each condition becomes the mean of its five nearest targets: a bank without transport."""
    target: torch.Tensor        # (m, C)

    @classmethod
    def fit(cls, c, target, reg=None):
        return cls(target)

    def __call__(self, z):
        near = sq_cost(z, self.target).topk(min(5, len(self.target)), largest=False).indices
        return self.target[near].mean(1)


RIVALS = {"mean": Mean, "meanvar": MeanVar, "ema": EMA, "nearest": Nearest}
ot_refine.MAPS.update(RIVALS)
ot_refine.METHODS = ("none", "default", *ot_refine.MAPS)


# ---------------------------------------------------------------- the literal algorithm, controls

def whole_trajectory(model, order, seed=0, steps=25):
    """inverse(i, c) of the paper's literal Algorithm 1: a DDIM trajectory inside each of its K
    steps, from one fixed noise a place; by default sample.revealed makes one evaluation."""
    cfg, device = model.cfg, next(model.parameters()).device
    if not cfg.inverse:
        raise ValueError("lam > 0 needs T^-1, but this model was trained with inverse=0")
    order = torch.arange(cfg.n_tokens, device=device) if order is None else order
    z = ImageNoise(-1 - seed, [0], device).randn(cfg.n_tokens, cfg.token_dim)[0]         # (N, D)

    def inverse(i, c):
        x = model.diffloss.sample(c, None, 1.0, z[i].expand(1, len(c), -1), "ddim", steps)
        return model.inverse(x, order[i].expand(len(c)))

    return inverse


def shuffled(refinement, seed, refine, y, index):
    """A control: each image is moved by the displacement of another of its class in the batch: as
    far, but not where transport leads."""
    chance = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    other = torch.empty_like(chance)
    other[y.argsort(stable=True)] = chance[y[chance].argsort(stable=True)]
    return lambda i, c, y: c + (refine(i, c, y) - c)[other.to(c.device)]


def ideal(refinement, seed, refine, y, index):
    """An oracle: each image is drawn under the ideal conditions of a real one of its class. Not
    for guidance, whose other branch would follow the images drawn."""
    K = refinement.model.cfg.num_classes
    real = {k: refinement.conditions(k, refinement.m)[0] for k in y.unique().tolist()}
    one = lambda k, j: real[k][:, (j // K + 97 * seed) % real[k].shape[1]]                # (N, C)
    c = torch.stack([one(k, j) for k, j in zip(y.tolist(), index.tolist())], 1)
    return lambda i, c_drawn, y: c[i].to(c_drawn.dtype)


# ---------------------------------------------------------------- the rows

class Row(NamedTuple):
    """One line of the ablation. Rows of equal options share their results."""
    group: str
    name: str
    refine: dict | None = None          # options of sample.Refinement, where they differ
    sampling: dict = {}                 # options of `generate`, where they differ
    model: str = "ar"
    x: float | None = None              # place on the group's axis, if it is a curve
    line: str = "refined"               # which of the group's curves
    control: Callable | None = None     # (refinement, seed, refine, y, index) -> another refine
    at_once: int = 0                    # images drawn at once; 0: --batch_size


GUIDED = dict(cfg_scale=GUIDANCE)
WHOLE = dict(K=1, eta=math.inf)
SAME = dict(method="none")              # conditions stay, but mar draws a class in one order
PARTS = {
    "none": None, "mean": dict(method="mean", **WHOLE), "gaussian": dict(method="gaussian"),
    "sinkhorn": dict(method="sinkhorn"), "gaussian, sinkhorn (default)": {},
    "default, coupled": dict(coupled=True), "displacements shuffled": {}, "ideal conditions": SAME}
CONTROLS = {"displacements shuffled": shuffled, "ideal conditions": ideal}
RIVAL = {name: dict(method=name, **WHOLE) for name in ("meanvar", "ema", "nearest")}
BIASED = {"sinkhorn, biased": dict(method="biased")}
LITERAL = dict(method="sinkhorn", K=2, eta=0.5, lam=0.1, coupled=True, inverse_of=whole_trajectory)
INVERSE = {                             # full profile only
    # lam so large and eta so small that the transport weighs 1 / 1000: half of the way to T^-1
    "inverse term alone": dict(method="mean", K=1, eta=5e-4, lam=1000.0),
    "default, lam = 0.1": dict(lam=0.1)}
SWEEPS = {                              # option of Refinement: (quick, more in full)
    "K": ((4,), (1, 2)), "eta": ((), (0.5, 2.0, 8.0)), "reg": ((0.05,), (0.2, 0.5, 1.0)),
    "rank": ((), (4, 8, 16, 64)), "m": ((25,), (10, 100, 1000)), "n_cal": ((50,), (200, 800))}
STEPS = {"ddpm": ((), (10, 25, 100)), "ddim": ((), (10,)), "dpm++": ((10,), (6, 20))}
ORDERS = {                              # of mar: (refine, more sampling, quick)
    "fresh orders": (None, {}, 0), "one random order a class": (SAME, {}, 1),
    "one random order a class + refinement": ({}, {}, 0),
    "raster": (dict(order_of=raster_order, **SAME), {}, 0),
    "raster + refinement": (dict(order_of=raster_order), {}, 1),
    "8 steps, one random order a class": (SAME, dict(num_iter=8), 0),
    "8 steps, one random order a class + refinement": ({}, dict(num_iter=8), 0)}


def ablation(full):
    """The rows, without guidance (whose effect would mix with theirs) unless their group has it."""
    rows, both = [], {"none": None, "refined": {}}

    for words, how in ((", guided", GUIDED), ("", {}))[:1 + full]:
        for kind, line in (("cdm", "none"), *((k, line) for k in ("ar", "mar") for line in both)):
            name = kind.upper() + " + refinement" * (line == "refined") + words
            rows.append(Row("generators", name, both[line], how, kind))

    parts = PARTS | RIVAL | BIASED if full else PARTS
    rows += [Row("parts", name, refine, control=CONTROLS.get(name))
             for name, refine in parts.items()]
    inverse = {"none": None, "default": {}, "literal Algorithm 1": LITERAL}
    inverse |= INVERSE if full else {}
    rows += [Row("inverse term", name, refine) for name, refine in inverse.items()]
    if full:
        rows += [Row("parts, guided", name, refine, GUIDED, control=CONTROLS.get(name))
                 for name, refine in PARTS.items() if CONTROLS.get(name) != ideal]
        rows += [Row("calibration", f"noise {s}", dict(seed=s), GUIDED) for s in range(3)]
        rows += [Row("guidance", f"{v:g} {line}", both[line], dict(cfg_scale=v), x=v, line=line)
                 for v in (1.0, 1.25, GUIDANCE, 2.0) for line in both]

    for axis, (quick, more) in SWEEPS.items():
        rows += [Row(axis, str(v), {axis: v}, x=v) for v in sorted(quick + more * full)]
    rows += [Row("images of a class at once", str(v), dict(coupled=True), GUIDED, x=v, at_once=v)
             for v in (20, 50, 100) if full or v == 20]
    for solver, (quick, more) in STEPS.items():
        for v in sorted(quick + more * full):
            how = dict(solver=solver, steps=v, **GUIDED)
            rows += [Row("steps", f"{solver} {v} {line}", both[line], how, x=v,
                         line=f"{solver}, {line}") for line in both]
    rows += [Row("orders", name, refine, GUIDED | how, "mar")
             for name, (refine, how, quick) in ORDERS.items() if full or quick]
    return rows


# ---------------------------------------------------------------- the command

MEASURES = ("fid", "kid", "sliced_w2", "accuracy", "precision", "recall", "copy_ratio",
            "seconds_per_image", "calibration_s")


def parse_args(argv=None):
    p = Parser(description="Measure every part of the method. Finished rows are kept in --out_dir: "
                           "to go on after a stop, run the same command again.")
    for kind in KINDS:
        p.add_argument(f"--{kind}", metavar="RUN", help=f"the {kind} model; without it its rows "
                                                        "are left out")
    p.add_argument("--profile", choices=("quick", "full"), default="quick", help="how many rows")
    p.add_argument("--only", nargs="+", metavar="WORD",
                   help="rows with one of these in their 'group: name'")
    p.add_argument("--seeds", type=number(int, 1), help="how many (default: quick 2, full 3)")
    p.add_argument("--n", type=number(int, MIN_IMAGES),
                   help="images a seed (default: quick 500, full 1000)")
    p.add_argument("--n_cal", type=number(int, 1), help="images that calibrate a class (default: "
                   "quick 200, full that of sample.py)")
    p.add_argument("--solver", default="ddpm", help="of the rows that are not about solvers")
    p.add_argument("--steps", type=number(int, 1, 1000), default=25, help="theirs, too")
    p.add_argument("--batch_size", type=number(int, 1), default=500, help="images drawn at once")
    p.add_argument("--out_dir", default="out/ablation", help="rows.jsonl, table.csv, figures")
    p.add_argument("--cache", default="cache", help="where trained classifiers are kept")
    p.add_argument("--data_dir", help="where the images are now (default: as in training)")
    p.add_argument("--vae", help="kl16.ckpt, for models of latents")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda ...")
    args = p.parse_args(argv)
    for k, values in {"seeds": (2, 3), "n": (500, 1000), "n_cal": (200, None)}.items():
        if getattr(args, k) is None:
            setattr(args, k, values[args.profile == "full"])
    return args


def main(argv=None):
    args = parse_args(argv)
    jobs = {kind: open_job(kind, args) for kind in KINDS if getattr(args, kind)}
    if not jobs:
        raise ValueError("which models? give --ar RUN, --mar RUN or --cdm RUN")
    check_alike(jobs)
    for job in jobs.values():
        job.model.diffloss.check(args.solver, args.steps)
    rows = [complete(r, args) for r in ablation(args.profile == "full") if r.model in jobs]
    chosen = lambda r: any(w.lower() in f"{r.group}: {r.name}".lower() for w in args.only)
    rows = [r for r in rows if not args.only or chosen(r)]
    if not rows:
        raise ValueError(f"--only {' '.join(args.only)} matches no row of the models given")
    origins = {kind: origin(job, args) for kind, job in jobs.items()}
    out, first = Path(args.out_dir), next(iter(jobs.values()))
    out.mkdir(parents=True, exist_ok=True)
    done = read_results(out / "rows.jsonl")

    real = real_images(first.dataset(), first.device)
    space = make_extractor("classifier", real, first.device, cache=args.cache)
    judge = Judge(space, real, first.device)
    floor, which = judge.floor(args.n)
    print(f"{len(rows)} rows, {args.seeds} seeds of {args.n} images; floor: FD "
          f"{floor['fid']:.2f}, {which}")
    keys = {at: [result_key(row, origins[row.model], seed, args) for seed in range(args.seeds)]
            for at, row in enumerate(rows)}
    missing = len({k for ks in keys.values() for k in ks} - set(done))
    began, new = time.time(), 0
    for at, row in enumerate(rows):
        todo = {key: seed for seed, key in enumerate(keys[at]) if key not in done}
        try:
            for key, values in measure(row, jobs[row.model], judge, args, todo) if todo else ():
                done[key], new = values, new + 1
                line = {"key": key, "seed": todo[key], "group": row.group, "name": row.name,
                        "values": values}
                with open(out / "rows.jsonl", "a") as f:
                    f.write(json.dumps(line) + "\n")
        except ValueError as error:                     # a model without T^-1: the others go on
            warn(f"{row.group}: {row.name} is left out: {error}")
            continue
        left = (time.time() - began) / max(new, 1) * (missing - new) / 60
        print(f"[{at + 1}/{len(rows)}] {line_of(row, mean_std([done[k] for k in keys[at]]))}"
              + (f", about {left:.0f} min left" if todo else " (known)"), flush=True)
        write_table(out / "table.csv", summary(rows, keys, done), floor, args)
    plot_all(out, summary(rows, keys, done), floor)
    print(f"{out / 'table.csv'}, figures: {', '.join(f.name for f in sorted(out.glob('*.png')))}")


def open_job(kind, args):
    """The job of a checkpoint; ValueError if it is of another kind."""
    flags = {"ckpt": getattr(args, kind), "device": args.device, "data_dir": args.data_dir,
             "vae": args.vae}
    job = sample.setup(sample.parse_args([f"--{k}={v}" for k, v in flags.items() if v]))
    if job.model.cfg.kind != kind:
        raise ValueError(f"--{kind} {flags['ckpt']} holds a model of kind {job.model.cfg.kind}; "
                         f"give it as --{job.model.cfg.kind}")
    job.device = next(job.model.parameters()).device
    return job


def check_alike(jobs):
    """Say how alike the models are; ValueError where they cannot be compared at all."""
    facts = {kind: job.state["data"] for kind, job in jobs.items()}
    same = ("dataset", "size", "channels", "class_names", "n_train", "n_heldout")
    if len({json.dumps([f[k] for k in same]) for f in facts.values()}) > 1:
        each = [f"{k} on {f['n_train']} images of {f['dataset']}" for k, f in facts.items()]
        raise ValueError(f"the models were trained on different data: {', '.join(each)}")
    size = [job.model.num_params for job in jobs.values()]
    seen = [job.state["step"] * job.state.get("args", {}).get("global_batch", 0)
            for job in jobs.values()]
    print("; ".join(f"{kind}: {n / 1e6:.3f}M parameters, {k} images seen"
                    for kind, n, k in zip(jobs, size, seen)))
    if max(size) > 1.05 * min(size) or max(seen) > 1.05 * min(seen):
        warn("sizes or training differ by more than 5 %: no comparison at equal budget")


def complete(row, args):
    """The row with all that it runs with."""
    how = {"solver": args.solver, "steps": args.steps, "cfg_scale": 1.0, **row.sampling}
    defaults = {f.name: f.default for f in fields(Refinement) if f.default is not MISSING}
    refine = {**defaults, "n_cal": args.n_cal, **(row.refine or {})}
    return row._replace(sampling=how, refine=None if row.refine is None else refine)


def origin(job, args):
    """What all results of a model depend on: weights, images, code."""
    return [sample.weights_digest(job.model), datasets.digest(job.state["data"], args.data_dir),
            sample.code_digest(), sample.sha256([Path(evaluate.__file__).read_bytes()])]


def result_key(row, origin, seed, args):
    """A short hash of what the result of a complete row depends on, the code of its hooks too."""
    coupled = row.control or row.refine and row.refine["coupled"]
    rival = RIVALS.get(row.refine["method"]) if row.refine else None
    size = coupled and (row.at_once or args.batch_size)
    what = [origin, row.sampling, row.refine, rival, row.control, size, args.n, seed]
    return sample.sha256([json.dumps(what, default=inspect.getsource).encode()])


def read_results(path):
    """{key: values} of the finished rows; a line that was cut off by a kill is left out."""
    records = [r for r in read_lines(path) if {"key", "values"} <= set(r)]
    if path.exists():                       # or the next row would be lost with a damaged line
        write_text(path, "".join(json.dumps(r) + "\n" for r in records))
    return {r["key"]: r["values"] for r in records}


def measure(row, job, judge, args, todo):
    """Yields (key, values) for each {key: seed} of todo."""
    names, refinement = job.state["data"]["class_names"], None
    labels = torch.arange(-(-args.n // len(names)) * len(names)) % len(names)
    index, began = torch.arange(len(labels)), time.perf_counter()
    if row.at_once > len(labels) // len(names):
        raise ValueError(f"{len(labels) // len(names)} images of a class are drawn; raise --n")
    if row.refine is not None:
        refinement = Refinement(job.model, tokens_of(job.dataset()), row.sampling, **row.refine)
        refinement.of = functools.cache(refinement.of)           # one calibration for all seeds
        for k in range(len(names)):
            refinement.of(k)
    calibration_s = time.perf_counter() - began

    for key, seed in todo.items():
        began = time.perf_counter()
        wrap = row.control and functools.partial(row.control, refinement, seed)
        with tqdm(total=len(labels), desc=row.name, leave=False, disable=None) as bar:
            images = draw_images(job.model, job.decode, labels, index, seed, row.sampling,
                                 row.at_once or args.batch_size, refinement, bar.update, wrap)
        seconds = (time.perf_counter() - began) / len(labels)
        x, values = judge(torch.from_numpy(images), labels)
        values.update(seconds_per_image=seconds, calibration_s=calibration_s)
        kept = {k: values[k] for k in MEASURES if values.get(k) is not None}
        if len(names) <= 12:                                     # which classes gain?
            kept.update({f"class {name}": sliced_w2(x[labels == k], judge.x[judge.real.labels == k])
                         for k, name in enumerate(names)})
        yield key, kept


def summary(rows, keys, done):
    """[(row, {measure: mean, measure_std: deviation}, seeds)] of the rows that have results."""
    found = [(row, [done[k] for k in keys[at] if k in done]) for at, row in enumerate(rows)]
    return [(row, mean_std(values), len(values)) for row, values in found if values]


def line_of(row, v):
    spread = f" +- {v['fid_std']:.2f}" if "fid_std" in v else ""
    return (f"{row.group + ': ' + row.name:46} FD {v['fid']:.2f}{spread}, accuracy "
            f"{v['accuracy']:.3f}, precision {v['precision']:.3f}, recall {v['recall']:.3f}, "
            f"{1000 * v['seconds_per_image']:.1f} ms/image")


def write_table(path, table, floor, args):
    """table.csv, always whole: the old one or the new."""
    names = ["group", "name", "model", "x", "seeds", "n",
             *dict.fromkeys(k for _, values, _ in table for k in values)]
    short = lambda values: {k: float(f"{v:.5g}") for k, v in values.items() if k in names}
    text = io.StringIO()
    out = csv.DictWriter(text, names, restval="", lineterminator="\n")
    out.writeheader()
    out.writerow({"group": "real", "name": "training images", "n": args.n, **short(floor)})
    for row, values, seeds in table:
        out.writerow({"group": row.group, "name": row.name, "model": row.model, "x": row.x,
                      "seeds": seeds, "n": args.n, **short(values)})
    write_text(path, text.getvalue())


# ---------------------------------------------------------------- figures, each fits a screen

def plot_all(out, table, floor):
    """A figure of bars for each group; panels of curves for steps, guidance and settings."""
    import matplotlib
    matplotlib.use("Agg")
    bars, panels = {}, {"steps": {}, "guidance": {}, "settings": {}}
    for row, v, _ in table:
        axis, line = row.group, row.line
        if row.x is None:
            bars.setdefault(axis, []).append((row.name, v))
            continue
        if axis == "steps":                                      # a panel for each solver
            axis, line = line.split(", ")
        kind = row.group if row.group in panels else "settings"
        panels[kind].setdefault(axis, {}).setdefault(line, []).append((row.x, v))
    for group, some in bars.items():
        plot_bars(out / f"{group.replace(',', '').replace(' ', '-')}.png", some, floor)
    for kind, curves in panels.items():
        plot_curves(out / f"{kind}.png", curves, floor)


def save(fig, path):
    """As a png of 64 colours, small enough for a README."""
    fig.savefig(path, dpi=80)
    fig.clear()
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(64, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def plot_bars(path, bars, floor):
    """Frechet distance of each row, and beside it the other numbers."""
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(8, 1.3 + 0.27 * len(bars)), layout="constrained")
    names, values = zip(*bars)
    ax.barh(names, [v["fid"] for v in values], xerr=[v.get("fid_std", 0) for v in values],
            height=0.7, alpha=0.5, error_kw={"elinewidth": 1})
    numbers = [[f"{v[k]:.3g}" for k in ("fid", "accuracy", "precision", "recall")] for v in values]
    for k, cells in enumerate([("FD", "accuracy", "prec.", "recall"), *numbers]):
        ax.text(1.02, k - 1, "".join(f"{cell:>9}" for cell in cells), family="monospace",
                fontsize=8, va="center", transform=ax.get_yaxis_transform())
    ax.axvline(floor["fid"], color="black", linestyle="--")
    ax.set_xlabel("Frechet distance to held-out images; dashed: that of training images")
    ax.set_ylim(len(bars) - 0.5, -1.5)
    save(fig, path)


def plot_curves(path, panels, floor):
    """A panel for each axis {axis: {line: [(x, values)]}}: Frechet distance against it."""
    import matplotlib.pyplot as plt
    if not panels:
        return
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(1 + 2.7 * columns, 2.6 * rows),
                             squeeze=False, layout="constrained")
    for ax in axes.flat[len(panels):]:
        ax.axis("off")
    for ax, (axis, lines) in zip(axes.flat, panels.items()):
        for line, points in lines.items():
            x, v = zip(*sorted(points, key=lambda p: p[0]))
            ax.errorbar(x, [p["fid"] for p in v], [p.get("fid_std", 0) for p in v], marker=".",
                        capsize=2, label=line, linestyle="--" if line == "none" else "-")
        ticks = sorted({x for points in lines.values() for x, _ in points})
        ax.set_xscale("log" if ticks[0] > 0 and ticks[-1] >= 4 * ticks[0] else "linear")
        ax.set_xticks(ticks, [f"{x:g}" for x in ticks], fontsize=7)
        ax.minorticks_off()
        ax.axhline(floor["fid"], color="black", linestyle=":", label="real images")
        ax.set(xlabel=axis, ylabel="Frechet distance")
    axes[0, 0].legend(fontsize=7)
    save(fig, path)


if __name__ == "__main__":
    run(main)
