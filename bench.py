"""How fast it is, against the plain way to write it: same modules, same weights, same noise, in one process, taken in turns.

    python bench.py                               the quick ones, a few minutes on one core
    python bench.py mar ar head train             some, by name (--help lists all)
    python bench.py all --json bench.json         everything
    python bench.py gpu --device cuda             AR-XL, MAR-B, MAR-L at batch 8 and 256, in bf16

`Plain` below is the reference: what published implementations do, in fp32; test_bench.py shows that both sides give the
same. Times are medians; a ratio is the median of the ratios of neighbouring runs, and one CPU thread is timed by what it
ran, so that a machine that others use slows both sides alike. Shares are of the matrix-multiply rate of the same process,
FLOPs those of the plain path's matrix products (plan.py).
"""
import copy
import json
import multiprocessing
import platform
import resource
import statistics
import time
from types import SimpleNamespace

import torch
import torch.nn as nn

import train as training
from data import Parser, number, run
from diffloss import DiffLoss, ImageNoise, Sampler, respaced
from model import amp, build, guidance_at, pick_device, preset
from ot_refine import RefineConfig, Refiner, plan, sinkhorn, sq_cost
from plan import memory_estimate, sampling_flops, training_flops
from sample import Drawer, Recipe


# ---------------------------------------------------------------- the plain path

class Plain:
    """Sampling and training as usually published: nothing hoisted out of a loop, nothing left out, boolean masks."""

    def __init__(self, model):
        self.model, self.net, self.cfg = model, model.diffloss.net, model.cfg

    def head(self, x_t, t, c):
        """(M, D), (M,), (M, C) -> eps, v (M, D): time embedding, projected condition and modulations in every call."""
        net = self.net
        y = net.time_embed(t) + net.cond_embed(c)
        h = net.input_proj(x_t)
        for block in net.res_blocks:
            shift, scale, gate = block.adaLN_modulation(y).chunk(3, dim=-1)
            h = h + gate * block.mlp(block.in_ln(h) * (1 + scale) + shift)
        shift, scale = net.final_layer.adaLN_modulation(y).chunk(2, dim=-1)
        return net.final_layer.linear(net.final_layer.norm_final(h) * (1 + scale) + shift).chunk(2, dim=-1)

    def trajectory(self, c, cfg_scale, noise, temperature=1.0):
        """Ancestral sampling, noise (1 + steps, M, D); c (M, C), or (2 M, C) with the null branch second: then x doubles too."""
        steps, guided = len(noise) - 1, cfg_scale is not None
        schedule = respaced(steps)
        at = lambda table, t, like: torch.as_tensor(table, device=like.device)[t].float()[:, None].expand_as(like)
        x = torch.cat([noise[0], noise[0]]) if guided else noise[0]
        for j in reversed(range(steps)):
            t = torch.full((len(x),), j, device=x.device)
            z = noise[steps - j] if j else torch.zeros_like(noise[0])
            if guided:
                half = x[:len(x) // 2]
                eps, v = self.head(torch.cat([half, half]), torch.as_tensor(schedule.timestep_map, device=x.device)[t], c)
                cond, null = eps.chunk(2)
                eps = null + cfg_scale * (cond - null)
                eps, z = torch.cat([eps, eps]), torch.cat([z, z])
            else:
                eps, v = self.head(x, torch.as_tensor(schedule.timestep_map, device=x.device)[t], c)
            frac = (v + 1) / 2
            log_var = frac * at(schedule.log_var_max, t, x) + (1 - frac) * at(schedule.log_var_min, t, x)
            x0 = at(schedule.x0_from_xt, t, x) * x - at(schedule.x0_from_eps, t, x) * eps
            mean = at(schedule.mean_x0, t, x) * x0 + at(schedule.mean_xt, t, x) * x
            x = mean + (t != 0).float()[:, None] * torch.exp(0.5 * log_var) * z * temperature
        return x.chunk(2)[0] if guided else x

    def mar_conditions(self, x, mask, y):
        """c (B, N, C): masked positions (B, N) bool are dropped, and mask tokens put in their place, by boolean indexing."""
        m, (B, N), n = self.model, mask.shape, self.cfg.n_class_tokens
        h = torch.cat([m.class_tokens(y)[:, None].expand(-1, n, -1), m.z_proj(x)], dim=1)
        h = m.z_proj_ln(h + m.encoder_pos_embed_learned)
        keep = torch.cat([torch.ones(B, n, dtype=torch.bool, device=x.device), ~mask], dim=1)
        kept = lambda z: z[keep].reshape(B, -1, z.shape[-1])
        h, everywhere = kept(h), (m.cos, m.sin) if self.cfg.rope else None
        for block in m.encoder_blocks:
            h = block(h, None, everywhere and [kept(z.expand(B, -1, -1)) for z in everywhere])
        h = m.decoder_embed(m.encoder_norm(h))
        full = m.mask_token.expand(B, n + N, -1).clone().to(h.dtype)
        full[keep] = h.reshape(-1, h.shape[-1])
        h = full + m.decoder_pos_embed_learned
        for block in m.decoder_blocks:
            h = block(h, None, everywhere)
        return m.decoder_norm(h)[:, n:] + m.diffusion_pos_embed_learned

    @torch.no_grad()
    def mar(self, y, noise, steps, num_iter, cfg_scale, progress=iter):
        """Tokens (B, N, D), guided linearly, from the noise that MAR.generate takes."""
        B, N, D = len(y), self.cfg.n_tokens, self.cfg.token_dim
        order = noise.rand(N).argsort(1)
        x, labels = torch.zeros(B, N, D, device=y.device), torch.cat([y, torch.full_like(y, self.cfg.num_classes)])
        chain = self.model.chain(num_iter)
        for i in progress(range(len(chain))):
            a, b = chain[i]
            mask = torch.ones(B, N, dtype=torch.bool, device=y.device).scatter(1, order[:, :a], False)
            now = torch.zeros_like(mask).scatter(1, order[:, a:b], True)
            raster = order[:, a:b].argsort(1)[None, ..., None].expand(1 + steps, -1, -1, D)       # of the noise, which follows `order`
            z = noise.randn(1 + steps, b - a, D).transpose(0, 1).gather(2, raster).flatten(1, 2)
            c = self.mar_conditions(torch.cat([x, x]), torch.cat([mask, mask]), labels)
            c = c[torch.cat([now, now])]                                                       # (2 B n, C)
            x[now] = self.trajectory(c, guidance_at("linear", cfg_scale, b / N), z)
        return x

    @torch.no_grad()
    def ar(self, y, noise, steps, cfg_scale, progress=iter):
        """Tokens (B, N, D), constant guidance or (1.0) none; with a KV cache, as everybody does."""
        m, B, N, guided = self.model, len(y), self.cfg.n_tokens, cfg_scale != 1.0
        twice = (lambda z: torch.cat([z, z])) if guided else (lambda z: z)
        h = m.class_emb(torch.cat([y, torch.full_like(y, self.cfg.num_classes)]) if guided else y)[:, None]
        shape, tokens = (2, len(h), self.cfg.n_head, N, self.cfg.n_embd // self.cfg.n_head), []
        caches = [torch.zeros(shape, device=y.device, dtype=h.dtype) for _ in m.blocks]
        for i in progress(range(N)):
            for block, cache in zip(m.blocks, caches):
                h = block(h, m.cos[i:i + 1], m.sin[i:i + 1], cache, i)
            z = noise.randn(1 + steps, 1, self.cfg.token_dim).transpose(0, 1)[:, :, 0]
            x = self.trajectory(m.norm(h)[:, 0], cfg_scale if guided else None, z)[:, None]
            tokens.append(x)
            h = m.x_proj(twice(x))
        return torch.cat(tokens, dim=1)

    def loss(self, x, y, draws):
        """The diffusion loss with `mul` repeated copies and all tokens through the head; mar: the unmasked ones weighed 0 afterwards.

        draws: those of model.loss; mar has drawn t and eps for masked tokens only, which are put where they belong.
        """
        m, d, (B, N, D), mul = self.model, self.model.diffloss, x.shape, self.cfg.diffusion_batch_mul
        t, eps, y = draws["t"], draws["eps"], m.with_null(y, draws["drop"])
        mask = torch.ones(B, N, dtype=torch.bool, device=x.device)
        if self.cfg.kind == "mar":
            n, order = t.shape[1], draws["order"]
            mask = mask.scatter(1, order[:, :-n], False)
            spread = lambda z, full: full.scatter(1, order[:, -n:].reshape(B, n, *(1,) * (z.dim() - 2)).expand_as(z), z)
            t, eps = spread(t, t.new_zeros(B, N, mul)), spread(eps, eps.new_zeros(B, N, mul, D))
        c = self.mar_conditions(x, mask, y) if self.cfg.kind == "mar" else m.conditions(x, y)
        c, x, w = (z.flatten(0, 1).repeat(mul, *(1,) * (z.dim() - 2)) for z in (c, x, mask.float()))       # (mul B N, ...)
        t, eps = t.flatten(0, 1).T.flatten(), eps.flatten(0, 1).transpose(0, 1).flatten(0, 1)
        # the arithmetic of the loss itself is the same
        mse, vb = DiffLoss.terms(SimpleNamespace(net=self.head, noised=d.noised, **dict(d.named_buffers())), x, c, t, eps)
        loss = mse + vb
        return (loss * w).sum() / w.sum()

    def step(self, ema, optimizer, x, y, draws, decay=0.9999):
        """One training step: a loop over tensors in the clipping, the optimiser and the average."""
        optimizer.zero_grad()
        self.loss(x, y, draws).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 3.0, foreach=False)
        optimizer.step()
        with torch.no_grad():
            for kept, new in zip(ema.parameters(), self.model.parameters()):
                kept.mul_(decay).add_(new, alpha=1 - decay)


# ---------------------------------------------------------------- measuring

class Bench:
    """One method per benchmark; each adds rows to the table."""

    def __init__(self, device, runs):
        self.device, self.runs, self.rows = device, runs, []
        # one thread of a CPU: the time that this process had, not that others had; on an idle machine it is the same
        self.clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
        self.dtype = torch.bfloat16 if amp(device)._enabled else torch.float32
        self.rate = self.matmul_rate(self.dtype)

    def seconds(self, fn):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        began = self.clock()
        fn()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock() - began

    def matmul_rate(self, dtype):
        """FLOP/s of a large product of weights (n, n) and n rows."""
        n = 8192 if self.device.type == "cuda" else 1024
        x = torch.randn(n, n, device=self.device, dtype=dtype)
        return 2 * n ** 3 / statistics.median(self.seconds(lambda: x @ x.T) for _ in range(6))

    def compare(self, bench, what, fns, runs=None, warm=True, images=None, flops=None, note=""):
        """Take the functions {name: fn} in turns; the first is the reference of the ratios. Adds a row for each of them.

        images and flops are those of one call, a number or one per function.
        """
        each = lambda value, k: value[k] if isinstance(value, (list, tuple)) else value
        times, peaks = [[] for _ in fns], [0] * len(fns)
        for run in range(-1 if warm else 0, runs or self.runs):
            for k, fn in enumerate(fns.values()):
                if self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(self.device)
                spent = self.seconds(fn)
                if run >= 0:
                    times[k].append(spent)
                if self.device.type == "cuda":
                    peaks[k] = torch.cuda.max_memory_allocated(self.device)
        for k, name in enumerate(fns):
            t = statistics.median(times[k])
            self.add(bench, f"{what}: {name}", t, statistics.median(a / b for a, b in zip(times[0], times[k])),
                     images=each(images, k) and each(images, k) / t, share=each(flops, k) and each(flops, k) / t / self.rate,
                     flops=each(flops, k), peak=peaks[k], note=each(note, k))
        return times

    def add(self, bench, what, seconds=None, ratio=None, images=None, share=None, flops=None, peak=0, note=""):
        self.rows.append(dict(bench=bench, what=what, seconds=seconds, ratio=ratio, images_per_s=images, flops=flops, share=share,
                              peak_bytes=peak, note=note))
        text = lambda value, form: form.format(value) if value else ""
        print(f"| {bench} | {what} | {text(seconds and 1e3 * seconds, '{:.4g} ms')} | {text(ratio, '{:.2f}x')} | {text(images, '{:.3g}')} "
              f"| {text(flops and flops / 1e9, '{:.3g}')} | {text(share, '{:.0%}')} "
              f"| {text(peak and peak / 2**30, '{:.2f} GiB ')}{note} |", flush=True)

    def model(self, name, **options):
        torch.manual_seed(0)
        model = build(preset(name, **options)).to(self.device).eval()
        for p in model.parameters():                                                # nothing is skipped because it is zero
            if p.abs().max() == 0:
                nn.init.normal_(p, std=0.02)
        return model

    def sampling(self, bench, name, batch, cfg_scale, num_iter=None, part=slice(None), runs=None, few=(), graphs=False, **options):
        """The plain path and ours at 100 ancestral steps, then `few`: {name: (sampler, further options of generate)}.

        part: the AR steps that are run, of all; images/s are those of the whole chain, as if its steps cost alike.
        """
        model, ddpm = self.model(name, **options), Sampler("ddpm", 100)
        is_mar, y = model.cfg.kind == "mar", torch.arange(batch, device=self.device) % 10
        noise, only = (lambda: ImageNoise(0, range(batch), self.device)), (lambda steps: steps[part])
        plain, extra = Plain(model), {"num_iter": num_iter} if is_mar else {}

        def ours(sampler=ddpm, graphs=None, **more):
            model.diffloss.graphs = graphs
            with amp(self.device):
                return model.generate(y, noise(), sampler, cfg_scale, progress=only, **extra, **more)

        fns = {"plain": lambda: plain.mar(y, noise(), 100, num_iter, cfg_scale, only) if is_mar else plain.ar(y, noise(), 100, cfg_scale, only),
               "this": ours}
        if graphs:
            kept = {}
            fns["this, CUDA graphs"] = lambda: ours(graphs=kept)
        fns |= {key: lambda sampler=sampler, more=more: ours(sampler, **more) for key, (sampler, more) in dict(few).items()}
        steps = len(model.chain(num_iter))
        share = len(range(steps)[part]) / steps
        counted = lambda sampler: sampling_flops(model.cfg, sampler.steps, num_iter, cfg_scale != 1) * batch * share
        flops = [counted(ddpm)] * (3 if graphs else 2) + [None if more or s.steps_late else counted(s) for s, more in dict(few).values()]
        return self.compare(bench, f"{name}, batch {batch}", fns, runs, images=batch * share, flops=flops, warm=share == 1 or graphs,
                            note="" if share == 1 else f"{share:.2g} of the AR steps")

    # ------------------------------------------------------------ the benchmarks

    def tiny(self):
        """Sampling, the models of the quick start: 16 tokens, 100 steps."""
        for batch in (1, 16, 128):
            for name, cfg_scale in (("gpt-tiny", 1.0), ("mar-tiny", 3.0)):
                few = {"this, dpm++ 10": (Sampler("dpm++", 10), {})}
                self.sampling("tiny", name, batch, cfg_scale, 16 if name == "mar-tiny" else None, few=few, grid=4, num_classes=10)

    def mar(self, part=slice(2, None, 4), runs=1):
        """Sampling, MAR-B, 16 AR steps (every fourth of them), guidance 3; few-step, annealed, guidance skipped near 1."""
        few = {"this, dpm++ 10": (Sampler("dpm++", 10), {}),
               "this, dpm++ 10, guidance within .25 of 1 skipped": (Sampler("dpm++", 10), {"cfg_skip": 0.25}),
               "this, annealed dpm++ 10 to 5, the same skipped": (Sampler("dpm++", 10, 5), {"cfg_skip": 0.25})}
        self.sampling("mar", "mar-b", 1, 3.0, 16, part, runs, few)

    def head(self):
        """The head of MAR-B alone, few rows (AR at batch 1): a trajectory of 100 steps, unguided."""
        d = self.model("mar-b", grid=2).diffloss
        plain, ts = Plain(SimpleNamespace(diffloss=d, cfg=None)), Sampler("ddpm", 100).timesteps()
        for rows in (1, 2, 4, 8):
            c, x = torch.randn(rows, 768, device=self.device), torch.randn(rows, 16, device=self.device)

            @torch.no_grad()
            def ours():
                net = d.denoiser(c, ts=ts)
                return [net(x, t) for t in ts]
            old = torch.no_grad()(lambda: [plain.head(x, torch.full((rows,), t, device=self.device), c) for t in ts])
            flops = 2 * 100 * rows * sum(p.numel() for p in d.net.parameters() if p.dim() > 1)
            self.compare("head", f"{rows} rows", {"plain": old, "this": ours}, flops=flops, note="100 steps")

    def ar(self, name="gpt-b"):
        """Cost of a token against its position, batch 1, 4 head steps: a static KV cache, so that it is flat."""
        model, y, spent = self.model(name), torch.zeros(1, dtype=torch.long, device=self.device), {k: [] for k in (0, 64, 128, 192, 248)}

        def stamped(steps):                                                         # 8 tokens from each of these positions
            for k in spent:
                for i in range(k, k + 8):
                    began = self.clock()
                    yield i
                    spent[k].append(self.clock() - began)
        for _ in range(self.runs):
            with amp(self.device):
                model.generate(y, ImageNoise(0, [0], self.device), Sampler("dpm++", 4), progress=stamped)
        for k, times in spent.items():
            t = statistics.median(times)
            self.add("ar", f"{name}, a token at positions {k} to {k + 7}", t, statistics.median(spent[0]) / t)

    def train(self, cases=(("gpt-tiny", 64, dict(grid=4)), ("mar-tiny", 64, dict(grid=4)), ("mar-b", 1, {}))):
        """A training step: loss, gradients, clipping, AdamW, moving average; the preset's uses of each token, dropout off to compare."""
        for name, batch, options in cases:
            model = self.model(name, dropout=0.0, num_classes=10, inverse=False, buffer=0, **options).train()
            ema, cfg = copy.deepcopy(model).requires_grad_(False), model.cfg
            args = training.parse_args(["--global_batch", str(batch), "--lr", "1e-6", "--optimizer", "adamw"])
            x, y = torch.randn(batch, cfg.token_dim, cfg.grid, cfg.grid), torch.arange(batch) % 10
            tokens = x.flatten(2).mT.contiguous().to(self.device)
            split = type("Images", (), {"__len__": lambda self: batch, "batch": lambda self, index, key: (x[index], y[index])})()
            data, world = SimpleNamespace(train=split, patch=1), SimpleNamespace(size=1, rank=0, device=self.device)
            plain, ours = Plain(model), training.make_optimizers(model, args)
            old = torch.optim.AdamW(model.parameters(), 1e-6, foreach=False, fused=False)
            draw = lambda: model.draw(batch, training.generator(self.device, args.seed, 0))     # the same draws, and mask ratio, for both
            step = {"plain": lambda: plain.step(ema, old, tokens, y.to(self.device), draw()),
                    "this": lambda: training.train_step(0, model, model, ema, ours, data, args, world)}
            self.compare("train", f"{name}, batch {batch}", step, self.runs if "tiny" in name else 2, images=batch, flops=training_flops(cfg) * batch)

    def sinkhorn(self, cases=((64, 64, 64), (256, 256, 768), (200, 1000, 768), (1024, 1024, 1280), (4096, 4096, 64))):
        """A transport plan, 100 iterations in fp32 from the cost matrix: POT's log-domain solvers against ours."""
        import ot
        for n, m, dim in cases:
            g = torch.Generator(self.device).manual_seed(0)
            cost = sq_cost(*(torch.randn(1, k, dim, generator=g, device=self.device) for k in (n, m)))
            reg, a, b = 0.05 * cost.mean(), *(torch.full((k,), 1 / k, device=self.device) for k in (n, m))

            def ours(cost=cost, reg=reg[None]):
                return plan(cost, *sinkhorn(cost, reg, n_iter=100)[:2], reg)[0]
            fns = {"ot.sinkhorn, log": lambda: ot.sinkhorn(a, b, cost[0], reg, method="sinkhorn_log", numItermax=100, stopThr=0, warn=False),
                   "ot.solve_batch, log": lambda: ot.solve_batch(cost, reg, a[None], b[None], 100, 0.0, "log_sinkhorn", grad="detach").plan[0],
                   "ot.solve_batch, kernel": lambda: ot.solve_batch(cost, reg, a[None], b[None], 100, 0.0, "sinkhorn", grad="detach").plan[0],
                   "this": ours}
            want = ours(cost.double(), reg[None].double())
            off = [f"plan off by {float((fn() - want).abs().max() / want.max()):.0e}" for fn in fns.values()]
            self.compare("sinkhorn", f"{n} x {m}, C = {dim}", fns, self.runs if n * m < 1e6 else 1, warm=False, note=off)

    def refine(self):
        """What refinement adds to sampling: tiny models whole, then one AR step of conditions as wide as MAR-B's."""
        for name in ("gpt-tiny", "mar-tiny"):
            model, fns = self.model(name, grid=4, num_classes=10), {}
            tokens_of = lambda y, m: torch.randn(m, 16, 16, generator=torch.Generator().manual_seed(y)).clamp(-1, 1)
            for sampler in (Sampler("ddpm", 25), Sampler("dpm++", 10)):
                for mode, config in (("none", {"method": "none"}), ("frozen", {}), ("coupled", {}), ("frozen, all directions", {"rank": 0}),
                                     ("coupled, all directions", {"rank": 0}), ("coupled, all directions, sinkhorn alone", {"method": "sinkhorn", "rank": 0})):
                    recipe = Recipe(sampler, cfg_scale=1.0, refine=RefineConfig(**config), orders=int("mar" in name), m=200)      # as the digits have
                    drawer = Drawer(model, recipe, range(10))
                    if mode != "none":
                        (drawer.calibrate if mode.startswith("frozen") else drawer.set_targets)(tokens_of)
                    y = torch.arange(10).repeat_interleave(20)
                    fns[f"{sampler.solver} {sampler.steps}, {mode}"] = lambda drawer=drawer: drawer(y, range(200), 0)
                self.compare("refine", f"{name}, batch 200", fns, note="ratio to the first")
                fns = {}
        groups, n, wide = 10, 20, 768
        cloud = lambda k, scale: scale * torch.randn(groups, 1, k, wide, device=self.device)
        refiner = Refiner([None, cloud(200, 1.0)], RefineConfig())
        group = torch.arange(groups, device=self.device)
        refiner.calibrate(group.repeat_interleave(200))(1, cloud(200, 1.1).reshape(-1, 1, wide), None)
        c, model = cloud(n, 1.1).reshape(-1, 1, wide), self.model("mar-b")
        noise, few = torch.randn(5, len(c), 1, 16, device=self.device), Sampler("ddpm", 4)
        x, where = torch.zeros(4, 128, 16, device=self.device), torch.arange(128, device=self.device).expand(4, -1)
        fns = {"4 of 100 guided head steps": lambda: model.diffloss.draw(c, c, 3.0, few, noise, 4),
               "4 of 400 rows of the transformer": lambda: model.step_conditions(x, where, torch.zeros(4, dtype=torch.long, device=self.device)),
               "frozen": lambda: refiner.bind(group.repeat_interleave(n), False)(1, c, None),
               "coupled": lambda: refiner.bind(group.repeat_interleave(n), True)(1, c, None)}
        with torch.no_grad(), amp(self.device):
            head, body, *refined = (statistics.median(t) for t in self.compare("refine", "MAR-B's width, one AR step of 200 images", fns, 2))
        for mode, t in zip(("frozen", "coupled"), refined):
            whole = [head * steps / 4 + body * 100 for steps in (100, 10)]
            self.add("refine", f"MAR-B's width, {mode}: share of an AR step", t, note=f"{t / whole[0]:.2%} at 100 steps, {t / whole[1]:.2%} at 10")

    def memory(self, cases=(("gpt-tiny", 64), ("mar-tiny", 64), ("cdm-tiny", 64), ("mar-b", 1))):
        """Peaks of two training steps and of sampling, in processes of their own, against estimates; growth over 1000 steps."""
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            for name, batch in cases:
                options = {"grid": 4} if "tiny" in name else {}
                same = preset(name, dropout=0.0, num_classes=10, inverse=False, buffer=0, **options)       # as in `train`
                _, weights, kept = memory_estimate(same, batch)
                peak, _ = pool.apply(training_memory, (name, batch, options, 2))
                self.add("memory", f"{name}, training, batch {batch}", peak=peak, note=f"estimated {(weights + kept) / 2**30:.2f} GiB")
                peak, held = pool.apply(sampling_memory, (name, batch, options))
                self.add("memory", f"{name}, sampling, batch {batch}, guided", peak=peak, note=f"estimated {held / 2**30:.2f} GiB")
            _, growth = pool.apply(training_memory, ("gpt-tiny", 8, {"grid": 4}, 1000))
            self.add("memory", "gpt-tiny, steps 100 to 1000", note=f"grew by {growth / 2**20:.1f} MiB")

    def gpu(self):
        """AR-XL, MAR-B and MAR-L at batch 8 and 256, guided, bf16 against plain fp32; a training step of MAR-L."""
        for name in ("gpt-xl", "mar-b", "mar-l"):
            for batch in (8, 256):
                few = {"this, dpm++ 10": (Sampler("dpm++", 10), {})}
                self.sampling("gpu", name, batch, 3.0, 64 if "mar" in name else None, slice(None, None, 8), 2, few, self.device.type == "cuda")
        self.train((("mar-l", 64, {}),))


def process_bytes():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()


def training_memory(name, batch, options, steps):
    """(bytes of the peak above the imports, bytes by which the process grew between step 100 and the last)."""
    torch.set_num_threads(1)
    began, marks = process_bytes(), []
    bench = SimpleNamespace(device=torch.device("cpu"), runs=steps, model=lambda name, **o: build(preset(name, **o)))

    def repeat(bench_name, what, fns, *_, **__):
        for k in range(steps):
            fns["this"]()
            if k == 100:
                marks.append(process_bytes())
    bench.compare = repeat
    Bench.train(bench, ((name, batch, options),))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - began, process_bytes() - (marks or [process_bytes()])[0]


def sampling_memory(name, batch, options):
    """(bytes of the peak above the imports, guided, 4 head steps, mar 2 AR steps; an estimate: the weights, and the keys and
    values of all layers (ar) or the hidden states, queries, keys, values and MLP of one layer (mar, cdm))."""
    torch.set_num_threads(1)
    began = process_bytes()
    model = build(preset(name, num_classes=10, inverse=False, buffer=0, **options)).eval()
    cfg, few = model.cfg, {"num_iter": 2} if "mar" in name else {}
    with torch.no_grad():
        model.generate(torch.arange(batch) % 10, ImageNoise(0, range(batch), "cpu"), Sampler("ddpm", 4, x0_bound=1.0), cfg_scale=3.0, **few)
    held = 4 * model.num_params + 4 * 2 * batch * cfg.n_tokens * cfg.n_embd * (2 * cfg.n_layer if cfg.kind == "ar" else 10)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - began, held


QUICK = ("tiny", "mar", "head", "train", "sinkhorn")
EVERY = (*QUICK, "ar", "refine", "memory")


def parse_args(argv=None):
    p = Parser(description="Measure the fast paths against the plain ones.")
    p.add_argument("which", nargs="*", default=list(QUICK), metavar="BENCH", help=f"{', '.join(EVERY)}, gpu, or all (default: {', '.join(QUICK)})")
    p.add_argument("--runs", type=number(int, 1), default=3, help="runs of each side, of which the median counts")
    p.add_argument("--device", default="cpu", help="cpu, cuda ...")
    p.add_argument("--threads", type=number(int, 1), default=1, help="CPU threads")
    p.add_argument("--json", metavar="FILE", help="write the table here too")
    args = p.parse_args(argv)
    for name in args.which:
        if name not in (*EVERY, "gpu", "all"):
            raise ValueError(f"no benchmark {name!r}; choose from {', '.join(EVERY)}, gpu, all")
    args.which = list(EVERY) if "all" in args.which else args.which
    return args


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(pick_device(args.device), args.runs)
    chip = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else cpu_name()
    machine = {"chip": chip, "threads": args.threads, "torch": torch.__version__, "dtype": str(bench.dtype), "matmul_flops": bench.rate,
               "matmul_flops_bf16": bench.matmul_rate(torch.bfloat16)}
    print(f"{chip}, {args.threads} thread(s), torch {torch.__version__}; matrix products: {bench.rate / 1e9:.0f} GFLOP/s in {machine['dtype'][6:]}, "
          f"{machine['matmul_flops_bf16'] / 1e9:.0f} in bfloat16\n")
    print("| bench | what | median | faster than the first | images/s | GFLOP | share of the matmul rate | peak memory, notes |\n" + "|---" * 8 + "|")
    for name in args.which:
        getattr(bench, name)()
    if args.json:
        with open(args.json, "w") as f:
            json.dump({"machine": machine, "rows": bench.rows}, f, indent=1)


def cpu_name():
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    run(main)
