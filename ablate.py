"""The evidence: the questions that a sceptic would ask, one command each.

    python ablate.py parts --ar out/fashion                 what does the work?
    python ablate.py cheaper --ar out/fashion out/longer    would a cheaper fix do the same?
    python ablate.py train noise --dataset mnist ...        train.py with a rival's objective

QUESTIONS lists them: functions that return rows. To try something, add a row; it may change any
option of `generate` (sampling) and of sample.Refinement (refine), and use what rivals.py has.
--out_dir receives rows.jsonl, a line for each finished row and seed, and of each question a table
(.csv, .md) and a figure. To go on after a stop, run the same command again: a result is known by
all that it depends on.
"""
from command import Parser, number, run        # first: it answers signals

import csv
import functools
import inspect
import io
import json
import math
import re
import sys
import time
from dataclasses import MISSING, fields
from typing import Callable, NamedTuple

import torch
from PIL import Image

import data as datasets
import evaluate
import rivals
import sample
from data import image_grid
from evaluate import MIN_IMAGES, extract, mean_std
from files import (add_line, digest_of_code, output_folder, read_lines, sha256, weights_digest,
                   write_png, write_text)
from many import Shared
from model import GUIDANCE, KINDS
from rivals import (Judges, autoguidance, epsilon_scaling, fixed, guidance_interval, ideal,
                    late_epsilon_scaling, one_evaluation, shuffled, tuning, whole_trajectory)
from sample import Refinement, draw_images, tokens_of


# ---------------------------------------------------------------- the questions

class Row(NamedTuple):
    """One line of a table. Rows of equal options share their results."""
    group: str                          # of a figure: the axis, if x is given
    name: str
    refine: dict | None = None          # options of sample.Refinement, where they differ
    sampling: dict = {}                 # options of `generate`, where they differ
    model: str = "ar"
    x: float | None = None              # place on the group's axis, if it is a curve
    line: str = "refined"               # which of the group's curves
    control: Callable | None = None
    fix: tuple | None = None            # (function, value)
    at_once: int = 0                    # images of a class drawn at once; 0: as --batch_size allows
    recalibrate: bool = False           # each seed has a calibration of its own


SPEED = "images a second"               # the axis of a frontier, measured and not given
FREE = dict(cfg_scale=1.0)
WHOLE = dict(K=1, eta=math.inf)
SHARED = dict(method="shared", coupled=True)
SAME = dict(method="none")              # conditions stay, but mar draws a class in one order
BOTH = {"none": None, "refined": {}}
MAIN = {"none": None, "mean": dict(method="mean", **WHOLE), "gaussian": dict(method="gaussian"),
        "sinkhorn": dict(method="sinkhorn"), "gaussian, sinkhorn (default)": {},
        "default, coupled": dict(coupled=True)}
LITERAL = dict(method="sinkhorn", K=2, eta=0.5, coupled=True, lam=0.1, inverse_of=whole_trajectory)
MORE = {"sinkhorn, biased": dict(method="biased"),
        **{name: dict(method=name, **WHOLE) for name in ("meanvar", "ema", "nearest")},
        # lam so large and eta so small that the transport weighs 1 / 1000: half of the way to T^-1
        "inverse term alone": dict(method="mean", K=1, eta=5e-4, lam=1000.0,
                                   inverse_of=one_evaluation),
        "default, lam = 0.1": dict(lam=0.1, inverse_of=one_evaluation),
        "literal Algorithm 1": LITERAL}
SWEEPS = {"K": (1, 2, 4), "eta": (0.5, 2.0, 8.0), "reg": (0.05, 0.2, 0.5, 1.0),
          "rank": (4, 8, 16, 64)}
FIXES = {                               # family: {value: what differs}
    "temperature": {v: dict(sampling=dict(temperature=v)) for v in (0.95, 1.05, 1.1)},
    "guidance scale": {v: dict(sampling=dict(cfg_scale=v)) for v in (1.0, 1.25, 1.5, 2.0)},
    "guidance below sigma": {v: dict(fix=(guidance_interval, v)) for v in (0.6, 0.9)},
    "epsilon scaling": {v: dict(fix=(epsilon_scaling, v)) for v in (1.005, 1.01, 1.02)},
    "autoguidance": {v: dict(fix=(autoguidance, v), sampling=FREE) for v in (1.25, 1.5, 2.0)}}
ORDERS = {                              # of mar: (refine, more sampling)
    "fresh orders": (None, {}), "one random order a class": (SAME, {}),
    "one random order a class + refinement": ({}, {}),
    "raster": (dict(orders="raster", **SAME), {}),
    "raster + refinement": (dict(orders="raster"), {}),
    "8 steps, one random order a class": (SAME, dict(num_iter=8)),
    "8 steps, one random order a class + refinement": ({}, dict(num_iter=8))}


def does_it_work(jobs):
    """Does it work? Each seed has a calibration of its own."""
    return [Row("works", kind.upper() + ", refined" * (line != "none") + words, refine, how, kind,
                recalibrate=True)
            for words, how in (("", {}), (", not guided", FREE)) for kind in KINDS
            for line, refine in BOTH.items() if kind != "cdm" or line == "none"]


def in_whose_eyes(jobs):
    """In whose eyes?"""
    names = "none", "gaussian, sinkhorn (default)", "default, coupled"       # for others: parts
    return [Row("eyes", name, MAIN[name]) for name in names]


def what_does_the_work(jobs):
    """What does the work?"""
    rows = [Row("parts", name, refine) for name, refine in (MAIN | MORE).items()]
    rows.insert(5, Row("parts", "displacements shuffled", {}, control=shuffled))  # after default
    rows += [Row("parts", "ideal conditions, not guided", SAME, FREE, control=ideal)]
    return rows + [Row(axis, f"{axis} {v:g}", {axis: v}, x=v)
                   for axis in SWEEPS for v in SWEEPS[axis]]


def fixes_at_every_value(jobs):
    """Every fix of sampling at every value: where those of `cheaper` are chosen (--tune)."""
    return [Row(family, f"{family} {v:g}", x=v, line="none", **how)
            for family, values in FIXES.items() for v, how in values.items()
            if family != "autoguidance" or jobs["ar"].model.weak[0]]


def would_a_cheaper_fix_do(jobs, chosen=()):
    """Would a cheaper fix do the same? Each alone at its best, with refinement, other trainings."""
    rows = [Row("cheaper", name, refine) for name, refine in BOTH.items()]
    alone = [row._replace(group="cheaper", x=None) for row in chosen]
    rows += alone + [row._replace(name=f"{row.name}, refined", refine={}) for row in alone]
    others = [name for name in jobs if name not in KINDS]
    return rows + [Row("cheaper", f"{jobs[name].about}{', refined' * (line != 'none')}", refine,
                       model=name) for name in others for line, refine in BOTH.items()]


def does_it_fade(jobs):
    """Does it fade as models get better? Every run of --ar: those that took the steps of the first
    by their size, the first and the others by their steps."""
    rows, runs = [], [(name, job, job.state["step"], job.model.num_params)
                      for name, job in jobs.items() if job.model.cfg.kind == "ar"]
    for name, job, steps, size in runs:
        axes = {"million parameters": size / 1e6} if steps == runs[0][2] else {}
        if size == runs[0][3] or not axes:
            axes["steps of training"] = steps
        rows += [Row(axis, f"{job.about}, {line}", refine, model=name, x=x, line=line)
                 for axis, x in axes.items() for line, refine in BOTH.items()]
    return rows


def how_few_steps(jobs):
    """How few steps?"""
    return [Row(SPEED, f"{solver} {v}, {line}", refine, dict(solver=solver, steps=v), x=v,
                line=f"{solver}, {line}")
            for solver in ("dpm++", "ddpm", "ddim") for v in (10, 6, 25, 4, 100)
            for line, refine in BOTH.items()]


def how_many_images(jobs):
    """How many images a class? The means of few are those of the class's targets."""
    axes = {"images of a class at once": (50, 20, 250, 5, 100, 500),
            "calibration images": (100, 1000, 200, 500, 50, 2000),
            "targets": (10, 100, 25, 1000, 5000)}
    at_once, calibrate, targets = axes
    rows = [Row(axis, "none", x=v, line="none") for axis in axes
            for v in (min(axes[axis]), max(axes[axis]))]
    for name, refine, values in (("coupled", dict(coupled=True), (50, 20, 250, 100, 500)),
                                 ("shared", SHARED, axes[at_once]),
                                 ("shared, 200 references", SHARED | dict(m=200), (50, 20, 5)),
                                 ("shared, 50 references", SHARED | dict(m=50), (50, 20, 5))):
        rows += [Row(at_once, f"{name}, {v} at once", refine, x=v, at_once=v, line=name)
                 for v in values]
    rows += [Row(calibrate, f"{v} calibrate", dict(n_cal=v), x=v) for v in axes[calibrate]]
    return rows + [Row(targets, f"{v} targets", dict(m=v, n_cal=1000), x=v) for v in axes[targets]]


def where_does_it_fail(jobs):
    """Where does it fail? Classes; and a grid, see `failures`."""
    return [Row("fails", name, refine) for name, refine in BOTH.items()]


def how_near(jobs):
    """How near can it come? Drawn so faithfully that, unrefined, it lacks variety."""
    dials = dict(sampling=dict(cfg_scale=1.75, temperature=0.95), fix=(late_epsilon_scaling, 0.9))
    refined = {"none": None, "refined": {}, "2000 targets": dict(m=2000),
               "2000 targets, coupled": dict(m=2000, coupled=True)}
    return [Row("near", name + words, refine, **how) for name, refine in refined.items()
            for words, how in (("", {}), (", faithful", dials))]


def which_order(jobs):
    """Which order for MAR?"""
    return [Row("orders", name, refine, how, "mar") for name, (refine, how) in ORDERS.items()]


QUESTIONS = {"works": does_it_work, "eyes": in_whose_eyes, "parts": what_does_the_work,
             "cheaper": would_a_cheaper_fix_do, "better": does_it_fade, "steps": how_few_steps,
             "images": how_many_images, "fails": where_does_it_fail, "near": how_near,
             "orders": which_order}


# ---------------------------------------------------------------- the command

def parse_args(argv=None):
    p = Parser(description="Answer questions about the method. Finished rows are kept in "
               "--out_dir: to go on after a stop, run the same command again.",
               epilog=f"ablate.py train {'|'.join(rivals.TRAININGS)} ... is train.py with all its "
                      "flags, for a rival's objective.")
    add = p.add_argument
    add("questions", nargs="+", choices=QUESTIONS, metavar="QUESTION", help=", ".join(QUESTIONS))
    add("--ar", nargs="+", metavar="RUN",
        help="the ar model; more runs are for `cheaper` (other trainings) and `better`")
    for kind in KINDS[1:]:
        add(f"--{kind}", metavar="RUN", help=f"the {kind} model")
    add("--guide", metavar="RUN", help="cheaper: an earlier ar run, for autoguidance")
    add("--only", nargs="+", metavar="WORD", help="rows with one of these in their 'group: name'")
    add("--seeds", type=number(int, 1), default=3, help="how many")
    add("--n", type=number(int, MIN_IMAGES), default=5000, help="images a seed")
    add("--n_cal", type=number(int, 1),
        help="images that calibrate a class, unless the row says it (default: that of sample.py)")
    add("--tune", action="store_true", help="measure against a sixth of the training images, to "
        "choose settings (`cheaper` does so by itself)")
    add("--any_code", action="store_true", help="take results of other versions of the code, too")
    add("--solver", default="dpm++", help="of the rows that are not about solvers")
    add("--steps", type=number(int, 1, 1000), default=10, help="theirs, too")
    add("--cfg_scale", type=number(float, 0, 1000), default=GUIDANCE, help="theirs, too")
    add("--batch_size", type=number(int, 1), default=500, help="images drawn at once")
    add("--out_dir", default="out/ablation", help="rows.jsonl, tables, figures")
    add("--cache", default="cache", help="where trained classifiers are kept")
    add("--data_dir", help="where the images are now (default: as in training)")
    add("--vae", help="kl16.ckpt, for models of latents")
    add("--device", default="auto", help="auto, cpu, cuda ...")
    return p.parse_args(argv)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        return rivals.train_rival(argv[1:])
    args = parse_args(argv)
    jobs = open_jobs(args)
    # before any work
    rows = [row for question in args.questions
            for row in select(question, QUESTIONS[question](jobs), args)]
    idle = [f"--{name}" for name in jobs if name not in {row.model for row in rows}]
    idle += ["--guide"] * (bool(args.guide) and "cheaper" not in args.questions)
    if idle:
        raise ValueError(f"{', '.join(idle)} would change nothing in {' '.join(args.questions)}; "
                         "leave it out")
    study = Study(args, jobs, args.tune)
    for question in args.questions:
        rows = QUESTIONS[question](jobs)
        if question == "cheaper":
            tuned = study if args.tune else Study(args, jobs, tune=True)
            table = tuned.answer("cheaper-tune", fixes_at_every_value(jobs), seeds=1)
            rows = would_a_cheaper_fix_do(jobs, best_of_each_group(table))
        study.answer(question, rows, args.seeds)
        if question == "fails":
            failures(study)


def best_of_each_group(table):
    """Rows: of each group the one whose three distances have the least product."""
    score = lambda v: math.prod(v[f"{prefix}fid"] for prefix in SPACES.values())
    return {row.group: row for row, _, _ in sorted(table, key=lambda r: -score(r[1]))}.values()


def select(question, rows, args):
    """The rows whose model is given and that --only does not leave out, complete; ValueError if
    there are none."""
    words = [w.lower() for w in args.only or [""]]
    rows = [complete(r, args) for r in rows if getattr(args, r.model.split()[0])
            and any(w in f"{r.group}: {r.name}".lower() for w in words)]
    if not rows:
        which = f"has {' or '.join(words)} in its name" if args.only else "is of the models given"
        raise ValueError(f"{question}: no row {which}; see --help for --ar, --mar, --cdm, --only")
    return rows


def open_jobs(args):
    """{"ar", "mar", "cdm" or a further "ar RUN": what sample.setup gives, and `about`}."""
    runs, jobs = args.ar or [], {}
    for name, path in [*zip(["ar"], runs), *((f"ar {r}", r) for r in runs[1:]),
                       *((k, getattr(args, k)) for k in KINDS[1:] if getattr(args, k))]:
        job = jobs[name] = open_job(name.split()[0], args, path)
        rival = job.state.get("args", {}).get("rival")
        job.about = (f"{job.state['step']} steps, {job.model.num_params / 1e6:.2f}M"
                     + f", trained with {rival}" * bool(rival))
        job.model.diffloss.solver(args.solver).timesteps(args.steps)         # are they possible?
        job.model.weak = [open_job("ar", args, args.guide).model] if args.guide else [None]
    if not jobs:
        raise ValueError("which models? give --ar RUN, --mar RUN or --cdm RUN")
    check_alike(jobs)
    return jobs


def open_job(kind, args, path=None):
    """The job of a checkpoint; ValueError if it is of another kind."""
    flags = {"ckpt": path or getattr(args, kind), "device": args.device, "data_dir": args.data_dir,
             "vae": args.vae}
    how = sample.parse_args([f"--{k}={v}" for k, v in flags.items() if v])
    job = sample.setup(how)
    job.dataset()
    how.check_used()
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
    print("; ".join(f"{name}: {job.about}" for name, job in jobs.items()))
    alike = [job for name, job in jobs.items() if name in KINDS]
    for what in ([j.model.num_params for j in alike], [j.state["step"] for j in alike]):
        if alike and max(what) > 1.05 * min(what):
            print("warning: sizes or training differ by more than 5 %: no comparison at equal "
                  "budget", file=sys.stderr)


def complete(row, args):
    """The row with all that it runs with."""
    how = {"solver": args.solver, "steps": args.steps, "cfg_scale": args.cfg_scale, **row.sampling}
    defaults = {f.name: f.default for f in fields(Refinement) if f.default is not MISSING}
    refine = {**defaults, "n_cal": args.n_cal, **(row.refine or {})}
    return row._replace(sampling=how, refine=None if row.refine is None else refine)


def refinement_of(model, tokens, sampling, how):
    """The Refinement of a row's options."""
    return (Shared if how["method"] == "shared" else Refinement)(model, tokens, sampling, **how)


class Study:
    """Rows of some models, measured against the held-out images or, to tune, `tuning`'s."""

    def __init__(self, args, jobs, tune=False):
        self.args, self.jobs, self.tune, first = args, jobs, tune, next(iter(jobs.values()))
        self.data = tuning(first.dataset()) if tune else first.dataset()
        self.device, self.last = first.device, (None, None, 0.0)
        self.out = output_folder(args.out_dir)
        # a CPU's own seconds: other programs' do not count
        self.clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        real = evaluate.real_images(self.data, self.device)
        self.judges = Judges(real, self.device, args.cache)
        self.floor = self.judges.floor(args.n)
        weights = {name: weights_digest(job.model) for name, job in jobs.items()}
        self.guide = args.guide and weights_digest(first.model.weak[0])
        files = datasets.digest(first.state["data"], args.data_dir)
        self.origins = {name: [digest, files] for name, digest in weights.items()}
        self.code = sha256([sample.code_digest().encode(),
                            digest_of_code("evaluate", "classifier").encode()])
        self.done = read_results(self.out / "rows.jsonl", None if args.any_code else self.code)

    def key(self, row, seed):
        """A short hash of what the result of a complete row depends on, its hooks' code too."""
        args, fix = self.args, row.fix
        coupled = row.control or row.refine and row.refine["coupled"]
        rival = rivals.RIVALS.get(row.refine["method"]) if row.refine else None
        size = coupled and (row.at_once or args.batch_size)
        fix = fix and [*fix, self.guide if fix[0] is autoguidance else None]
        what = [self.origins[row.model], row.sampling, row.refine, rival, row.control, fix, size,
                row.refine and row.recalibrate, args.n, seed, self.tune]
        return sha256([json.dumps(what, default=inspect.getsource).encode()])

    def answer(self, question, rows, seeds):
        """Measure what is missing of the rows; a table and figures; [(row, values, seeds)]."""
        rows = select(question, rows, self.args)
        keys = [[self.key(row, seed) for seed in range(seeds)] for row in rows]
        missing = len({k for ks in keys for k in ks} - set(self.done))
        print(f"{question}: {len(rows)} rows, {seeds} seeds of {self.args.n} images, {missing} to "
              f"be measured; floor: FD {self.floor['fid']:.2f}")
        began, new, table = time.time(), 0, []
        for row, ks in zip(rows, keys):
            todo = {key: seed for seed, key in enumerate(ks) if key not in self.done}
            try:
                for key, values in self.measure(row, todo) if todo else ():
                    self.done[key], new = values, new + 1
                    line = {"key": key, "seed": todo[key], "group": row.group, "name": row.name,
                            "tune": self.tune, "n": self.args.n, "code": self.code,
                            "values": values}
                    add_line(self.out / "rows.jsonl", line)
            except ValueError as error:                 # too few images for it: the others go on
                print(f"warning: {row.group}: {row.name} is left out: {error}", file=sys.stderr)
                continue
            table.append((row, mean_std([self.done[k] for k in ks]), seeds))
            left = (time.time() - began) / max(new, 1) * (missing - new) / 60
            print(f"[{len(table)}/{len(rows)}] {line_of(*table[-1][:2])}"
                  + (f", about {left:.0f} min left" if todo else " (known)"), flush=True)
            write_csv(self.out / f"{question}.csv", table, self.floor, self.args.n)
            write_text(self.out / f"{question}.md", markdown(question, table, self.floor))
        plot_all(self.out, question, table, self.floor)
        return table

    def refinement(self, row, seed=0):
        """(the Refinement of a row with its calibrations made, or None, and seconds), as the last
        row had it if nothing differs."""
        how = row.refine and {**row.refine, **({"seed": seed} if row.recalibrate else {})}
        made_for = row.model, row.fix, row.sampling, how
        if self.last[0] == made_for:
            return self.last[1:]
        began, found = self.clock(), None
        if how:
            model = self.jobs[row.model].model
            found = refinement_of(model, tokens_of(self.data), row.sampling, how)
            found.refiner = functools.cache(found.refiner)       # one calibration for all seeds
            for k in range(len(self.data.class_names)):
                found.refiner(k)
        self.last = made_for, found, self.clock() - began
        return self.last[1:]

    def measure(self, row, todo):
        """Yields (key, values) for each {key: seed} of todo."""
        job, K = self.jobs[row.model], len(self.data.class_names)
        labels = torch.arange(-(-self.args.n // K) * K) % K
        if row.at_once > len(labels) // K:
            raise ValueError(f"{len(labels) // K} images of a class are drawn; raise --n")
        for key, seed in todo.items():
            with fixed(job.model, row.fix):
                refinement, calibration_s = self.refinement(row, seed)
                began = self.clock()
                drawn = self.draw(row, refinement, labels, seed)
            seconds = self.clock() - began
            values = self.judges(torch.from_numpy(drawn), labels)
            values.update(images_per_s=len(labels) / seconds, calibration_s=calibration_s)
            yield key, {k: float(f"{v:.6g}") for k, v in values.items() if "_std" not in k}

    def draw(self, row, refinement, labels, seed):
        """uint8 (n, H, W, ch) of a row and seed; at_once images of each class in a batch, if it
        says so."""
        job, K, whole = self.jobs[row.model], len(self.data.class_names), torch.arange(len(labels))
        size = row.at_once * K or self.args.batch_size
        blocks = whole.split(size) if row.at_once else [whole]
        if row.at_once and row.refine and row.refine["method"] == "shared":
            refinement.groups = lambda labels, size: whole // size           # a block shares a map
        wrap = row.control and functools.partial(row.control, refinement, seed)
        parts = [draw_images(job.model, job.decode, labels, index, seed, row.sampling, size,
                             refinement, wrap) for index in blocks]
        for index, part in zip(blocks[1:], parts[1:]):
            parts[0][index.numpy()] = part[index.numpy()]
        return parts[0]


def failures(study, columns=20):
    """A picture of images that refinement made worse: those of seed 0 whose log-probability of
    their class, by the classifier, fell most; unrefined above, refined below."""
    rows = [complete(row, study.args) for row in where_does_it_fail(study.jobs)]
    K, space = len(study.data.class_names), study.judges.main.space
    labels, found = torch.arange(-(-study.args.n // K) * K) % K, []
    for row in rows:
        drawn = study.draw(row, study.refinement(row)[0], labels, 0)
        logits = extract(space, drawn, study.device)[1].log_softmax(1)
        found.append((drawn, logits.gather(1, labels[:, None])[:, 0]))
    (before, p), (after, q) = found
    worst = (q - p).argsort()[:columns].numpy()
    sheet = torch.cat([torch.from_numpy(z[worst]) for z in (before, after)]).numpy()
    write_png(study.out / "fails-grid.png", image_grid(sheet, columns))
    print(f"{study.out / 'fails-grid.png'}; of {len(p)} images {int((q < p - 1).sum())} lost more "
          f"than 1 nat of their class, {int((q > p + 1).sum())} gained as much")


def read_results(path, code=None):
    """{key: values} of the rows that `code` measured (None: any); a line that was cut off by a kill
    is left out."""
    records = [r for r in read_lines(path) if {"key", "code", "values"} <= set(r)]
    whole = "".join(json.dumps(r) + "\n" for r in records)
    if path.exists() and path.read_text(errors="replace") != whole:
        write_text(path, whole)             # or the next row would be lost with a damaged line
    return {r["key"]: r["values"] for r in records if code in (None, r["code"])}


# ---------------------------------------------------------------- tables

SHORT = {"fid": "FD", "accuracy": "class accuracy", "precision": "precision", "recall": "recall",
         "convolutions fid": "FD, convolutions", "pixels fid": "FD, pixels"}
COST = {"images_per_s": "images a second", "calibration_s": "calibration, s"}
COLUMNS = {
    "eyes": {"fid": "FD", "kid": "KID", "sliced_w2": "sliced W2", "precision": "precision",
             "recall": "recall", "accuracy": "class accuracy", "copy_ratio": "copy ratio"},
    "steps": SHORT | COST, "cheaper": SHORT | COST}
SPACES = {"classifier": "", "convolutions": "convolutions ", "pixels": "pixels "}


def line_of(row, v):
    spread = f" +- {v['fid_std']:.2f}" if "fid_std" in v else ""
    return (f"{row.group + ': ' + row.name:46} FD {v['fid']:.2f}{spread} (convolutions "
            f"{v['convolutions fid']:.3f}, pixels {v['pixels fid']:.3f}), accuracy "
            f"{v['accuracy']:.3f}, precision {v['precision']:.3f}, recall {v['recall']:.3f}")


def cell(v, key, digits=None):
    digits = digits or {"fid": 2, "images_per_s": 0, "calibration_s": 0}.get(key, 3)
    spread = f" +- {v[key + '_std']:.{digits}f}" if key == "fid" and "fid_std" in v else ""
    return f"{v[key]:.{digits}f}{spread}" if key in v else "-"


def markdown(question, table, floor):
    """The table as RESULTS.md shows it: a line a row, the floor last; `eyes`: a line a space and
    row; `fails`: a line a class."""
    every = {row.name: v for row, v, _ in table} | {"as many training images": floor}
    columns = COLUMNS.get(question, SHORT)
    if question == "fails":
        classes = [k for k in floor if k.startswith("class ")]
        lines = [["", *every], *([k, *(cell(v, k, 2) for v in every.values())] for k in classes)]
    elif question == "eyes":
        lines = [["eyes", "", *columns.values()],
                 *([space, name, *(cell(v, prefix + k) for k in columns)]
                   for space, prefix in SPACES.items() for name, v in every.items())]
    else:
        lines = [["", *columns.values()],
                 *([name, *(cell(v, k) for k in columns)] for name, v in every.items())]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_csv(path, table, floor, n):
    """All measures of all rows."""
    about = lambda row, seeds: {"group": row.group, "name": row.name, "model": row.model,
                                "x": row.x, "seeds": seeds, "n": n}
    lines = [about(Row("real", "training images", model=""), 1) | floor]
    lines += [about(row, seeds) | values for row, values, seeds in table]
    # deviations of what is itself a detail or a cost would be a third of the file
    lines = [{k: v for k, v in line.items() if not re.match("(class|images|calibration).*_std", k)}
             for line in lines]
    text = io.StringIO()
    out = csv.DictWriter(text, dict.fromkeys(k for line in lines for k in line), restval="",
                         lineterminator="\n")
    out.writeheader()
    out.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in line.items()}
                  for line in lines)
    write_text(path, text.getvalue())


# ---------------------------------------------------------------- figures, each fits a screen

def plot_all(out, question, table, floor):
    """Bars of the rows without x; a panel of curves for each group of the others."""
    import matplotlib
    matplotlib.use("Agg")
    bars, panels = [(row.name, v) for row, v, _ in table if row.x is None], {}
    for row, v, _ in table:
        if row.x is not None:
            x = v["images_per_s"] if row.group == SPEED else row.x
            panels.setdefault(row.group, {}).setdefault(row.line, []).append((x, v))
    if bars:
        plot_bars(out / f"{question}.png", bars, floor)
    if panels:
        plot_curves(out / f"{question}{'-curves' * bool(bars)}.png", panels, floor)


def save(fig, path):
    """As a png of 32 colours, small enough for a README."""
    buffer = io.BytesIO()
    fig.savefig(buffer, dpi=80)
    fig.clear()
    picture = Image.open(buffer).convert("RGB").quantize(
        32, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)     # keeps rare colours
    write_png(path, picture)


def plot_bars(path, bars, floor):
    """Frechet distance of each row in the three spaces, up to four times that of the first, and
    beside it the other numbers; a row that differs by its refinement alone lies, darker, on the one
    that it refines."""
    import matplotlib.pyplot as plt
    rows = {}
    for name, v in bars:
        plain = "none" if name == "refined" else name.replace(", refined", "")
        rows.setdefault(plain, []).append((v, plain != name))
    fig, axes = plt.subplots(1, 3, figsize=(11, 1.4 + 0.3 * len(rows)), layout="constrained",
                             sharey=True)
    for ax, (space, prefix) in zip(axes, SPACES.items()):
        key = f"{prefix}fid"
        most = min(1.05 * max(v[key] for _, v in bars), 4 * bars[0][1][key])
        for at, found in enumerate(rows.values()):
            for v, refined in found:
                ax.barh(at, v[key], xerr=v.get(f"{key}_std", 0), height=0.4 if refined else 0.8,
                        color="C0", alpha=0.9 if refined else 0.4, error_kw={"elinewidth": 1})
                if v[key] > most:
                    ax.text(0.97 * most, at, f"{v[key]:.3g}", va="center", ha="right")
        ax.axvline(floor[key], color="black", linestyle="--")
        ax.set(xlabel=f"FD, {space}", xlim=(0, most))
    ax.set_yticks(range(len(rows)), rows)
    cells = [[" > ".join(f"{v[k]:.3f}"[1:] for v, _ in found) for k in ("accuracy", "precision",
                                                                       "recall")]
             for found in rows.values()]
    width = 2 + max(len(c) for c in (*cells[0], "precision"))
    for at, line in enumerate([("accuracy", "precision", "recall"), *cells], start=-1):
        ax.text(1.02, at, "".join(f"{cell:>{width}}" for cell in line), family="monospace",
                fontsize=7, va="center", transform=ax.get_yaxis_transform())
    if len(bars) > len(rows):
        axes[0].text(0.02, -1, "dark: refined", transform=axes[0].get_yaxis_transform())
    ax.set_ylim(len(rows) - 0.5, -1.5)
    save(fig, path)


def plot_curves(path, panels, floor):
    """A row for each axis {axis: {line: [(x, values)]}}: Frechet distance in the three spaces."""
    import matplotlib.pyplot as plt
    fig, rows = plt.subplots(len(panels), 3, figsize=(11, 0.6 + 2.2 * len(panels)), squeeze=False,
                             layout="constrained")
    for axes, (axis, lines) in zip(rows, panels.items()):
        ticks = sorted({x for points in lines.values() for x, _ in points})
        for ax, (space, prefix) in zip(axes, SPACES.items()):
            key = f"{prefix}fid"
            for line, points in lines.items():
                x, v = zip(*sorted(points, key=lambda p: p[0]))
                ax.errorbar(x, [p[key] for p in v], [p.get(f"{key}_std", 0) for p in v],
                            marker=".", capsize=2, label=line,
                            linestyle="--" if "none" in line else "-")
            ax.set_xscale("log" if ticks[0] > 0 and ticks[-1] >= 4 * ticks[0] else "linear")
            shown = ticks if axis != SPEED else [
                x for x in (1, 2, 5, 10, 20, 50, 100, 200, 500) if ticks[0] <= x <= ticks[-1]]
            ax.set_xticks(shown, [f"{x:{'g' if x > 99 else '.2g'}}" for x in shown], fontsize=7)
            ax.xaxis.minorticks_off()
            ax.axhline(floor[key], color="black", linestyle=":", label="real images")
            values = [p[key] for points in lines.values() for _, p in points]
            log = max(values) > 5 * min(values)
            ax.set(xlabel=axis, ylabel=f"FD, {space}", yscale="log" if log else "linear")
            ax.set_ylim(None if log else 0)
            if log:
                low, high = ax.get_ylim()
                marks = (m * 10.0 ** e for e in range(-3, 3) for m in (1, 2, 5))
                ax.set_yticks([m for m in marks if low <= m <= high])
                ax.yaxis.set_major_formatter("{x:g}")
                ax.yaxis.minorticks_off()
        axes[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    save(fig, path)


if __name__ == "__main__":
    run(main)
