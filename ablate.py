"""The ablation: every part of the method, one row each, same models, seeds and number of images.

    python evaluate.py ablate --ar out/ar --mar out/mar --cdm out/cdm                   quick profile, ten minutes
    python evaluate.py ablate --ar out/ar --mar out/mar --cdm out/cdm --profile full    5 seeds, three hours
    python evaluate.py ablate --ar out/ar --only reg strength                           some rows

The defaults were chosen on models of the data sets digits-tune and shapes-tune, which know no held-out image.

`ablation` lists the rows; add a line to try something. --out_dir receives rows.jsonl (a line per finished row and seed:
to go on after a stop, run the same command again), table.csv and figures. A row is known again by its recipe, model and
settings, not by the code: after a change of code choose another --out_dir.
"""
import csv
import functools
import hashlib
import json
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple, Optional

import torch
from PIL import Image

from data import Parser, number
from diffloss import ImageNoise, Sampler
from evaluate import MIN_IMAGES, Judge, Run, make_extractor, mean_std, real_images, warn
from model import GUIDANCE, KINDS, amp, pick_device
from ot_refine import RefineConfig
from sample import Drawer, Recipe, reference_tokens


class Row(NamedTuple):
    """One line of the ablation. Rows of equal recipes share their results."""
    group: str
    name: str
    model: str                                   # ar, mar or cdm
    recipe: Recipe                               # x0_bound, and n_cal where it is 0, are filled in when it runs
    coupled: bool = False
    x: Optional[float] = None                    # place on the group's axis, if it is a curve
    line: str = "refined"                        # which of the group's curves
    mixed: int = 0                               # classes per batch; 0: batches go class by class
    apart: int = 0                               # held-out images of a class that are left out of the reference
    calibration: int = 0                         # seed of the calibration's noise
    drawer: type = Drawer                        # or a control, below


class Shuffled(Drawer):
    """A control: gives the displacements of a refined image to another of its class in the batch: as far, but not where transport leads."""

    def _draw(self, y, index, seed, slot, refine, inpaint=None):
        by_class = y.argsort(stable=True)
        chance = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed % 2 ** 32))
        other = torch.empty_like(by_class)
        other[by_class] = chance[y[chance].argsort(stable=True)]
        moved = lambda i, c, inverse: c + (refine(i, c, inverse) - c)[other]
        return super()._draw(y, index, seed, slot, moved, inpaint)


class Ideal(Drawer):
    """An oracle: draws every patch under its ideal condition, the teacher-forced one of a real image, an image of its own each."""

    def __call__(self, y, index, seed, inpaint=None):
        model, sampler, scale = self.model, self.recipe.sampler, self.recipe.cfg_scale
        real = {k: self.tokens_of(k, 10 ** 9) for k in y.unique().tolist()}
        x = torch.stack([real[k][(j // len(self.classes) + 97 * seed) % len(real[k])] for j, k in zip(index, y.tolist())]).to(self.device)
        conditions = lambda y: model.conditions(x, y.to(self.device))                # mar: in raster order
        noise = ImageNoise(seed, index, self.device).randn(sampler.n_noise(sampler.steps), model.cfg.n_tokens, model.cfg.token_dim)
        with torch.no_grad(), amp(self.device):
            null = conditions(torch.full_like(y, model.cfg.num_classes)) if scale != 1 else None
            return model.diffloss.draw(conditions(y), null, scale, sampler, noise.transpose(0, 1), sampler.steps)


def refined(sampler=Sampler(), cfg_scale=1.0, inverse="one", orders=0, m=1000, ref_split="train", n_cal=0, target="teacher", move_null=False, **config):
    return Recipe(sampler, cfg_scale, refine=RefineConfig(**config), inverse=inverse, orders=orders, m=m,
                  ref_split=ref_split, n_cal=n_cal, target=target, move_null=move_null)


def plain(sampler=Sampler(), cfg_scale=1.0, orders=0):
    """No refinement. The parts are compared without guidance, whose effect would mix with theirs; `guided` has it."""
    return Recipe(sampler, cfg_scale, orders=orders)


def ablation(full):
    """The rows. To try something, add a line; --only NAME runs it alone."""
    paper = dict(method="sinkhorn", K=2, eta=0.5, lam=0.1, inverse="full")
    rows = [
        Row("generators", "CDM", "cdm", plain()),
        Row("generators", "AR", "ar", plain()),
        Row("generators", "AR + refinement", "ar", refined()),
        Row("generators", "MAR", "mar", plain()),
        Row("generators", "MAR, one order", "mar", plain(orders=1)),
        Row("generators", "MAR, one order + refinement", "mar", refined(orders=1)),
        Row("parts", "none", "ar", plain()),
        *(Row("parts", method, "ar", refined(method=method)) for method in ("mean", "meanvar", "ema", "knn")),
        Row("parts", "gaussian", "ar", refined(strength=0)),
        Row("parts", "sinkhorn", "ar", refined(method="sinkhorn")),
        Row("parts", "sinkhorn, biased", "ar", refined(method="sinkhorn", debias=False)),
        Row("parts", "sinkhorn, coupled", "ar", refined(method="sinkhorn"), coupled=True),
        Row("parts", "gaussian+sinkhorn", "ar", refined()),
        Row("parts", "gaussian+sinkhorn, coupled", "ar", refined(), coupled=True),
        Row("parts", "displacements shuffled", "ar", refined(), drawer=Shuffled),
        *(Row("ideal conditions", f"{kind.upper()}, ideal conditions", kind, plain(), drawer=Ideal) for kind in ("ar", "mar")),
        # lam so large and eta so small that the transport weighs 1 / 1000: half of the way to T^-1(x_hat)
        Row("parts", "inverse term alone", "ar", refined(method="mean", K=1, eta=5e-4, lam=1000.0)),
        Row("parts", "inverse term added", "ar", refined(lam=0.1)),
        Row("parts", "literal Algorithm 1", "ar", refined(**paper), coupled=True),
        Row("parts", "literal Algorithm 1, frozen", "ar", refined(**paper)),
        Row("targets", "40 training images", "ar", refined(m=40), apart=40),
        Row("targets", "40 held-out images", "ar", refined(m=40, ref_split="heldout")),
        Row("targets", "64 conditions of the training buffer", "ar", refined(target="buffer")),
        Row("targets", "64 training images", "ar", refined(m=64)),
        Row("targets", "pooled, reg 0.05", "ar", refined(pooled=True, reg=0.05)),
    ]
    if full:
        rows += [Row("targets", "pooled", "ar", refined(pooled=True))]
        rows += [Row("generators", f"MAR, {n} iterations, one order{' + refinement' * r}", "mar",
                     replace(refined(orders=1) if r else plain(orders=1), num_iter=n)) for n in (4, 8) for r in (0, 1)]
        rows += [Row("generators", f"MAR, one order, guidance 2{' + refinement' * r}", "mar",
                     refined(cfg_scale=2.0, orders=1) if r else plain(cfg_scale=2.0, orders=1)) for r in (0, 1)]
        rows += [Row("generators", "MAR, one order + refinement, coupled", "mar", refined(orders=1), coupled=True)]
        rows += [Row("generators", f"MAR, 4 orders{' + refinement' * r}", "mar", refined(orders=4) if r else plain(orders=4)) for r in (0, 1)]
        rows += guided()
    return rows + curves(full)


def guided():
    """The rows that matter most again, with the guidance that images are drawn with by default."""
    none, default = (functools.partial(draw, cfg_scale=GUIDANCE) for draw in (plain, refined))
    few = [("ddpm", 100), ("ddpm", 10), ("ddim", 10), ("dpm++", 10), ("dpm++", 6), ("dpm++", 5)]
    rows = [("none", "ar", none()), ("default", "ar", default()), ("default, coupled", "ar", default(), True), ("gaussian", "ar", default(strength=0)),
            ("sinkhorn", "ar", default(method="sinkhorn")), ("strength 0.25", "ar", default(strength=0.25)), ("K = 4", "ar", default(K=4)),
            ("all directions", "ar", default(rank=0)), ("null moves along", "ar", default(move_null=True)), ("pooled, reg 0.05", "ar", default(pooled=True, reg=0.05)),
            *((method, "ar", default(method=method)) for method in ("mean", "meanvar", "knn")),
            *((f"{solver} {n} {how}", "ar", draw(Sampler(solver, n))) for solver, n in few for how, draw in (("none", none), ("default", default))),
            ("scale 1.25, ddpm 100 none", "ar", plain(Sampler("ddpm", 100), 1.25)),         # the best of what is not refined
            ("temperature 1.2 none", "ar", none(Sampler(temperature=1.2))),                  # variety by noise; the best for this scale
            ("scale 1.25, dpm++ 10 none", "ar", plain(Sampler("dpm++", 10), 1.25)),
            ("scale 1.25, dpm++ 10 default", "ar", refined(Sampler("dpm++", 10), 1.25)),
            ("CDM", "cdm", none()), ("MAR", "mar", none()), ("MAR, one order", "mar", none(orders=1)),
            ("MAR, one order + refinement", "mar", default(orders=1)), ("MAR, one order + refinement, coupled", "mar", default(orders=1), True)]
    return [*(Row("guided", *row) for row in rows),
            Row("guided", "displacements shuffled", "ar", default(), drawer=Shuffled),
            Row("guided", "ideal conditions", "ar", none(), drawer=Ideal),
            *(Row("guided", f"default, calibration {s}", "ar", default(), calibration=s) for s in range(1, 5)),
            *(Row("guided", f"MAR, one order + refinement, calibration {s}", "mar", default(orders=1), calibration=s) for s in range(1, 3))]


SWEEPS = {                                                    # axis: (quick, more in full, recipe of a value)
    "K": ((1, 4), (0, 2, 8), lambda v: refined(K=v)),
    "K, sinkhorn alone": ((), (1, 2, 4), lambda v: refined(method="sinkhorn", K=v)),
    "reg": ((0.05, 0.2), (0.02, 0.1, 0.5, 1), lambda v: refined(reg=v)),
    "lam": ((0, 0.1), (0.3, 1), lambda v: refined(lam=float(v))),
    "m": ((25, 200), (10, 50, 100), lambda v: refined(m=v)),
    "n_cal": ((50, 100), (25, 200, 400, 800), lambda v: refined(n_cal=v)),
    "strength": ((0, 0.25, 1, 4), (0.1, 0.5, 2), lambda v: refined(strength=float(v))),     # times eta = 2
    "rank": ((8, 64), (4, 16, 32), lambda v: refined(rank=v)),
}
STEPS = {"ddpm": ((10, 25), (6, 100)), "ddim": ((), (10, 100)), "dpm++": ((6, 10), (20,))}


def curves(full):
    """The rows that vary one thing; values in the default of the others, such as K = 1, cost nothing again."""
    rows = [Row(axis, str(v), "ar", recipe(v), x=v) for axis, (quick, more, recipe) in SWEEPS.items() for v in sorted(quick + more * full)]
    rows += [Row("calibration", f"calibration {s}", "ar", refined(), calibration=s) for s in range(5) if full]
    rows += [Row("classes per batch", str(v), "ar", refined(), True, v, mixed=v) for v in ((1, 2, 5, 10) if full else (1, 5))]
    for v in (1.0, 1.25, 1.5, 2.0, 3.0) if full else (1.0, 1.5):
        rows += [Row("guidance", f"{v:g} none", "ar", plain(cfg_scale=v), x=v, line="none"),
                 Row("guidance", f"{v:g} refined", "ar", refined(cfg_scale=v), x=v)]
    for solver, (quick, more) in STEPS.items():
        for v in sorted(quick + more * full):
            rows += [Row("steps", f"{solver} {v} none", "ar", plain(Sampler(solver, v)), x=v, line=f"{solver}, none"),
                     Row("steps", f"{solver} {v} refined", "ar", refined(Sampler(solver, v)), x=v, line=f"{solver}, refined")]
    return rows


MEASURES = ("fid", "kid", "sliced_w2", "accuracy", "precision", "recall", "spread", "copy_ratio", "bank_ratio", "floor", "bank_floor",
            "seconds_per_image", "calibration_s", "peak_mb", "calls")


def parse_args(argv):
    p = Parser(prog="evaluate.py ablate", description="Measure every part of the method. Finished rows are kept in --out_dir and not "
               "repeated: to go on after a stop, run the same command again.")
    for kind in KINDS:
        p.add_argument(f"--{kind}", metavar="RUN", help=f"checkpoint or run of the {kind} model; without it its rows are left out")
    p.add_argument("--profile", choices=["quick", "full"], default="quick", help="quick: at most 15 minutes on 2 cores; full: every row")
    p.add_argument("--seeds", type=number(int, 1), help="how many (default: quick 2, full 5)")
    p.add_argument("--n", type=number(int, MIN_IMAGES), help="images per seed (default: quick 500, full 1000)")
    p.add_argument("--n_cal", type=number(int, 8), help="images per class that calibrate frozen mode (default: quick 200, full 400)")
    p.add_argument("--only", nargs="+", metavar="WORD", help="groups or rows with one of these words in their name")
    p.add_argument("--batch_size", type=number(int, 1), default=500, help="images drawn at once")
    p.add_argument("--out_dir", default=os.path.join("out", "ablation"), help="rows.jsonl, table.csv and figures go here")
    p.add_argument("--cache", default="cache", help="where trained classifiers are kept")
    p.add_argument("--data_dir", help="folder data sets: where the images are (default: as in training)")
    p.add_argument("--vae", help="kl16.ckpt, for models of latents")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda ...")
    args = p.parse_args(argv)
    for k, (quick, full) in {"seeds": (2, 5), "n": (500, 1000), "n_cal": (200, 400)}.items():
        setattr(args, k, getattr(args, k) or (full if args.profile == "full" else quick))
    return args


def main(argv):
    args = parse_args(argv)
    device, out = pick_device(args.device), Path(args.out_dir)
    runs = {kind: Run(getattr(args, kind), device, args.data_dir, args.vae) for kind in KINDS if getattr(args, kind)}
    if not runs:
        raise ValueError("which models? give --ar RUN, --mar RUN or --cdm RUN")
    check_runs(runs)
    rows = [r for r in ablation(args.profile == "full") if r.model in runs]
    rows = [r for r in rows if not args.only or any(w.lower() in f"{r.group}: {r.name}".lower() for w in args.only)]
    if not rows:
        raise ValueError(f"--only {' '.join(args.only)} matches no row of the models given")
    out.mkdir(parents=True, exist_ok=True)
    real = real_images(next(iter(runs.values())).dataset)
    judge = Judge(make_extractor("classifier", real, device, cache=args.cache), real, device, own_classes=True)
    floor, which = judge.floor(args.n)
    print(f"{args.n} images a seed; floor: FD {floor['fid']:.2f}, {which}")
    done, began, first = read_results(out / "rows.jsonl"), time.time(), None
    for at, row in enumerate(rows):
        keys = {result_key(row, runs[row.model], seed, args): seed for seed in range(args.seeds)}
        todo = {key: seed for key, seed in keys.items() if key not in done}
        first = at if todo and first is None else first
        try:
            for key, values in measure_row(row, runs[row.model], judge, floor["fid"], args, todo):
                done[key] = values
                with open(out / "rows.jsonl", "a") as f:
                    f.write(json.dumps({"key": key, "seed": todo[key], "group": row.group, "name": row.name, "values": values}) + "\n")
        except ValueError as error:                           # a model without T^-1, too few particles: the others go on
            warn(f"{row.group}: {row.name} is left out: {error}")
            continue
        left = "" if first is None else f", about {(time.time() - began) / (at + 1 - first) * (len(rows) - at - 1) / 60:.0f} min left"
        print(f"[{at + 1}/{len(rows)}] {line_of(row, mean_std([done[k] for k in keys]))}{left if todo else ' (known)'}", flush=True)
        write_table(out / "table.csv", summary(rows, runs, args, done), floor, args)
    plot_all(out, summary(rows, runs, args, done), floor)
    print(f"{out / 'table.csv'}, figures: {', '.join(str(f) for f in sorted(out.glob('*.png')))}")


def check_runs(runs):
    """Say how alike the models are; ValueError where they cannot be compared at all."""
    for kind, run in runs.items():
        if run.kind != kind:
            raise ValueError(f"--{kind} {run.path} holds a model of kind {run.kind}; give it as --{run.kind}")
    facts = [{k: run.facts[k] for k in ("dataset", "size", "channels", "class_names", "n_train", "n_heldout")} for run in runs.values()]
    if any(f != facts[0] for f in facts):
        each = ", ".join(f"{k} on {f['n_train']} images of {f['dataset']} {f['size']}" for k, f in zip(runs, facts))
        raise ValueError(f"the models were trained on different data: {each}")
    size = {k: run.model.num_params for k, run in runs.items()}
    seen = {k: run.state["step"] * run.state.get("args", {}).get("global_batch", 0) for k, run in runs.items()}
    print("; ".join(f"{k}: {size[k] / 1e6:.3f}M parameters, {seen[k]} images seen" for k in runs))
    for what, numbers in (("parameters", size), ("training images seen", seen)):
        if max(numbers.values()) > 1.05 * min(numbers.values()):
            warn(f"the models differ by more than 5 % in {what}: generators are not compared at equal budget")


def fill(recipe, run, args):
    """The recipe as it runs."""
    return replace(recipe, n_cal=recipe.n_cal or args.n_cal, sampler=replace(recipe.sampler, x0_bound=run.facts["x0_bound"]))


@functools.cache
def digest(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def result_key(row, run, seed, args):
    """What the result of a row and seed depends on, as a short hash."""
    recipe = fill(row.recipe, run, args)
    what = asdict(recipe)
    if not recipe.refined:                                    # K=0 and none are one row
        what = {k: what[k] for k in ("sampler", "cfg_scale", "cfg_schedule", "num_iter", "orders")}
    elif row.coupled:
        what["coupled"] = [args.batch_size, row.mixed]
    if row.drawer is not Drawer:
        what["drawer"] = [row.drawer.__name__, args.batch_size]
    what["run"] = digest(run.path)
    return hashlib.sha256(json.dumps([what, row.apart, args.n, seed, row.calibration]).encode()).hexdigest()[:16]


def read_results(path):
    """{key: values} of the finished rows; a line that was cut off by a kill is left out."""
    done, text = {}, path.read_text() if path.exists() else ""
    if text and not text.endswith("\n"):
        path.write_text(text + "\n")                          # or the next row would be lost with the line that was cut off
    for line in text.splitlines():
        try:
            record = json.loads(line)
            done[record["key"]] = record["values"]
        except (ValueError, KeyError, TypeError):
            warn(f"{path}: a damaged line is left out; its row is measured again")
    return done


def measure_row(row, run, judge, floor, args, todo):
    """Yields (key, values) for each {key: seed} of todo; floor: the Frechet distance of real images."""
    if not todo:
        return
    recipe, device = fill(row.recipe, run, args), judge.device
    drawer = run.drawer(recipe, row.drawer)
    if recipe.refined or row.drawer is not Drawer:
        drawer.tokens_of = tokens_of = reference_tokens(run.facts, recipe.ref_split, run.data_dir)
    judge = judge.against(judge.real.with_targets(recipe, row.apart))
    peak_mb(device, reset=True)
    began = time.perf_counter()
    if recipe.refined:
        everything = len(drawer.classes) * max(recipe.orders, 1) * recipe.n_cal       # pooled: one problem, one batch
        if row.coupled:
            drawer.set_targets(tokens_of)
        else:
            drawer.calibrate(tokens_of, everything if recipe.refine.pooled else max(args.batch_size, recipe.n_cal), seed=row.calibration)
    calibration_s = time.perf_counter() - began
    own = {}
    if judge.real.apart is not None or len(judge.copy_tests()) > 1:
        own = judge.floor(args.n)[0]                          # a smaller reference, a part of the images as targets
    calls = run.model.head_calls(recipe.sampler, recipe.num_iter) * (1 if recipe.cfg_scale == 1 else 2)
    for key, seed in todo.items():
        batch = max(1, args.n // len(drawer.classes)) if row.mixed else args.batch_size
        images, labels, seconds = run.draw(drawer, args.n, seed, batch, row.mixed)
        peak = peak_mb(device)
        values = {**judge(images, labels)[1], "floor": own.get("fid", floor), "bank_floor": own.get("bank_ratio"), "seconds_per_image": seconds / len(images),
                  "calibration_s": calibration_s, "peak_mb": peak, "calls": calls}
        yield key, {k: values[k] for k in MEASURES if values.get(k) is not None}


def peak_mb(device, reset=False):
    """Peak memory in MiB since the last reset: of the GPU, or of this process (Linux; elsewhere since its start)."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
    except OSError:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 1024)


def summary(rows, runs, args, done):
    """[(row, {measure: mean, measure_std: std}, seeds)] of the rows that have results."""
    found = [(row, [done[k] for k in (result_key(row, runs[row.model], s, args) for s in range(args.seeds)) if k in done]) for row in rows]
    return [(row, mean_std(values), len(values)) for row, values in found if values]


def line_of(row, v):
    cell = lambda k, f: f"{v[k]:{f}}" + (f" +- {v[k + '_std']:{f}}" if k + "_std" in v else "")
    return (f"{row.group + ': ' + row.name:44} FD {cell('fid', '.2f'):14} accuracy {cell('accuracy', '.3f'):15} precision {v['precision']:.3f} "
            f"recall {v['recall']:.3f} copy {v['copy_ratio']:.2f}  {1000 * v['seconds_per_image']:.1f} ms/image, calibration {v['calibration_s']:.0f} s")


def write_table(path, table, floor, args):
    names = ["group", "name", "model", "x", "seeds", "n", *(n for m in MEASURES for n in (m, m + "_std"))]
    with open(path, "w", newline="") as f:
        out = csv.DictWriter(f, names, restval="", extrasaction="ignore", lineterminator="\n")
        out.writeheader()
        out.writerow({"group": "real", "name": "training images", "n": args.n, **rounded({k: v for k, v in floor.items() if k in MEASURES})})
        for row, values, seeds in table:
            out.writerow({"group": row.group, "name": row.name, "model": row.model, "x": row.x, "seeds": seeds, "n": args.n, **rounded(values)})


def rounded(values):
    return {k: float(f"{v:.5g}") for k, v in values.items()}


# ---------------------------------------------------------------- figures

def plot_all(out, table, floor):
    import matplotlib
    matplotlib.use("Agg")
    bars = [(row, v) for row, v, _ in table if row.x is None]
    curves = {}
    for row, v, _ in table:
        if row.x is not None:
            curves.setdefault(row.group, {}).setdefault(row.line, []).append((row.x, v))
    unrefined = next((v["fid"] for row, v, _ in table if row.model == "ar" and row.name in ("AR", "none")), None)
    for name, some in (("fd", [b for b in bars if b[0].group != "guided"]), ("guided", [b for b in bars if b[0].group == "guided"])):
        if some:
            plot_bars(out / f"{name}.png", some, floor)
    if "strength" in curves:
        plot_dial(out / "strength.png", curves["strength"]["refined"], table, floor)
    if "steps" in curves:
        plot_curves(out / "steps.png", {"denoiser evaluations per patch": curves.pop("steps")}, floor)
    if curves:
        plot_curves(out / "sensitivity.png", curves, floor, unrefined)


def save(fig, path):
    """As a png of 64 colours, small enough for a README."""
    fig.savefig(path, dpi=80, bbox_inches="tight")
    fig.clear()
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(64, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def plot_bars(path, bars, floor):
    import matplotlib.pyplot as plt
    groups = list(dict.fromkeys(row.group for row, _ in bars))
    bars = sorted(bars, key=lambda bar: groups.index(bar[0].group))
    fig, ax = plt.subplots(figsize=(8, max(2.2, 1.2 + 0.24 * len(bars))), layout="constrained")
    values, at = [v["fid"] for _, v in bars], range(len(bars))
    ax.barh(at, values, xerr=[v.get("fid_std", 0) for _, v in bars], height=0.75, alpha=0.5, error_kw={"elinewidth": 1},
            color=[f"C{groups.index(row.group)}" for row, _ in bars])
    log = max(values) > 15 * floor["fid"]
    ax.set_xlim(0.3 * floor["fid"] if log else 0, None)
    ax.set_xscale("log" if log else "linear")
    for k, (_, v) in enumerate(bars):
        numbers = (f"{v['fid']:.2f}", f"{v['accuracy']:.3f}", f"{v['precision']:.2f}", f"{v['recall']:.2f}")
        for column, text in enumerate(numbers):
            ax.text(1.03 + 0.11 * column, k, text, va="center", fontsize=8, transform=ax.get_yaxis_transform())
    for column, text in enumerate(("FD", "accuracy", "precision", "recall")):
        ax.text(1.03 + 0.11 * column, -1, text, fontsize=8, rotation=30, transform=ax.get_yaxis_transform())
    ax.axvline(floor["fid"], color="black", linestyle="--", label=f"real training images: {floor['fid']:.2f}")
    ax.set(xlabel="Frechet distance to held-out images (lower is better)")
    ax.set_yticks(at, [row.name for row, _ in bars], fontsize=8)
    ax.invert_yaxis()
    fig.legend(fontsize=8, loc="outside lower left")
    save(fig, path)


def plot_curves(path, curves, floor, plain=None):
    """One panel for each axis: Frechet distance against it."""
    import matplotlib.pyplot as plt
    columns = min(4, len(curves))
    rows = -(-len(curves) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(max(5, 2.6 * columns), 2.6 * rows + (rows == 1) * 0.9), layout="constrained", squeeze=False)
    for ax, (axis, lines) in zip(axes.flat, curves.items()):
        for line, points in lines.items():
            x, v = zip(*sorted(points, key=lambda p: p[0]))
            ax.errorbar(x, [p["fid"] for p in v], yerr=[p.get("fid_std", 0) for p in v], marker=".", capsize=2, label=line,
                        linestyle="--" if "none" in line else "-")
        values = sorted({p[0] for points in lines.values() for p in points})
        if values[0] > 0 and values[-1] >= 4 * values[0]:
            ax.set_xscale("log")
        elif len(values) > 3:
            ax.set_xscale("symlog", linthresh=values[1])      # a sweep from 0
        ax.set_xticks(values, [f"{v:g}" for v in values], fontsize=7)
        ax.minorticks_off()
        ax.axhline(floor["fid"], color="black", linestyle=":", label="real images")
        if plain is not None and len(lines) == 1:
            ax.axhline(plain, color="grey", linestyle="--", label="no refinement")
        ax.set_xlabel(axis)
        if len(lines) > 3:                                    # a tall legend needs room above the curves
            ax.set_ylim(top=ax.get_ylim()[0] + 1.4 * (ax.get_ylim()[1] - ax.get_ylim()[0]))
        if len(lines) > 1 or ax is axes.flat[0]:
            ax.legend(fontsize=7, ncols=1 + (len(lines) > 3))
    for ax in axes.flat[len(curves):]:
        ax.axis("off")
    for ax in axes[:, 0]:
        ax.set_ylabel("Frechet distance")
    save(fig, path)


def plot_dial(path, points, table, floor):
    """Strength turns diversity (recall) into fidelity (class accuracy)."""
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(5, 3.5), layout="constrained")
    points = sorted(points, key=lambda p: p[0])
    ax.plot([v["recall"] for _, v in points], [v["accuracy"] for _, v in points], marker="o", label="gaussian, then sinkhorn: strength")
    for k, (x, v) in enumerate(points):                       # neighbours above and below, else their names overlap
        ax.annotate(f"{x:g}", (v["recall"], v["accuracy"]), fontsize=8, xytext=(4, -11 if k % 2 else 5), textcoords="offset points")
    ax.margins(x=0.15)
    for row, v, _ in table:
        if (row.group, row.name) in (("parts", "none"), ("generators", "AR")):
            ax.plot(v["recall"], v["accuracy"], "ks", label="no refinement" if row.group == "parts" else None)
    ax.plot(floor["recall"], floor["accuracy"], "k*", markersize=10, label="real images")
    ax.set(xlabel="recall", ylabel="class accuracy")
    ax.legend(fontsize=8)
    save(fig, path)
