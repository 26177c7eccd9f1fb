"""How fast it is, against the plain way to write it: same modules, weights and noise, in turns.

    python bench.py                           the quick ones, a few minutes on one core
    python bench.py mar train                 some, by name (--help lists all)
    python bench.py all --json bench.jsonl    everything
    python bench.py gpu --device cuda         AR-XL, MAR-B, MAR-L: training and sampling

`Plain` is the reference: what published implementations do, in fp32, on a GPU under bf16 autocast,
as they run there; test_bench.py shows that both sides give the same. Times are medians; a ratio is
the median over neighbouring runs, and one CPU thread is timed by what it ran, so that a machine
that others use slows both sides alike.
Shares are of the matrix-multiply rate of the same process, FLOPs those of plan.py. A row is written
as soon as it is measured; one that does not fit in memory says so, and the rest goes on.
"""
from command import Parser, number, pick_device, run        # first: it answers signals

import collections
import contextlib
import copy
import functools
import json
import math
import platform
import re
import statistics
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import fast
import train as training
from files import check_output, write_text
from diffloss import DiffLoss, ImageNoise, respaced
from model import build, guidance_at, preset
from muon import orthogonal
from plan import by_layers, on_meta, sampling_flops, training_flops
from sample import Refinement, draw


# ---------------------------------------------------------------- the plain path

class Plain:
    """Sampling and training as usually published: nothing hoisted out of a loop, boolean masks."""

    def __init__(self, model):
        self.model, self.net, self.cfg = model, model.diffloss.net, model.cfg

    def head(self, x_t, t, c):
        """(M, D), (M,), (M, C) -> eps, v (M, D): embeddings and modulations in every call."""
        net = self.net
        y = net.time_embed(t) + net.cond_embed(c)
        h = net.input_proj(x_t)
        for block in net.res_blocks:
            shift, scale, gate = block.adaLN_modulation(y).chunk(3, dim=-1)
            h = h + gate * block.mlp(block.in_ln(h) * (1 + scale) + shift)
        last = net.final_layer
        shift, scale = last.adaLN_modulation(y).chunk(2, dim=-1)
        return last.linear(last.norm_final(h) * (1 + scale) + shift).chunk(2, dim=-1)

    def trajectory(self, c, cfg_scale, noise):
        """Ancestral sampling, noise (1 + steps, M, D), c (M, C); guided (cfg_scale is not None)
        c (2 M, C) has the null branch second, and x doubles too."""
        steps, guided = len(noise) - 1, cfg_scale is not None
        schedule, x = respaced(steps), noise[0]
        at = lambda table, t: torch.as_tensor(table, device=x.device)[t].float()[:, None]
        twice = (lambda z: torch.cat([z, z])) if guided else (lambda z: z)
        x = twice(x)
        for j in reversed(range(steps)):
            t = torch.full((len(x),), j, device=x.device)
            z = twice(noise[steps - j] if j else torch.zeros_like(noise[0]))
            t_train = torch.as_tensor(schedule.timestep_map, device=x.device)[t]
            eps, v = self.head(twice(x[:len(x) // 2]) if guided else x, t_train, c)
            if guided:
                cond, null = eps.chunk(2)
                eps = twice(null + cfg_scale * (cond - null))
            frac = (v + 1) / 2
            log_var = frac * at(schedule.log_var_max, t) + (1 - frac) * at(schedule.log_var_min, t)
            x0 = at(schedule.x0_from_xt, t) * x - at(schedule.x0_from_eps, t) * eps
            mean = at(schedule.mean_x0, t) * x0 + at(schedule.mean_xt, t) * x
            x = mean + (t != 0).float()[:, None] * torch.exp(0.5 * log_var) * z
        return x[:len(noise[0])]

    def mar_conditions(self, x, mask, y):
        """c (B, N, C): masked positions (B, N) bool are dropped by boolean indexing, and mask
        tokens put in their place."""
        m, (B, N), n = self.model, mask.shape, self.cfg.n_class_tokens
        h = torch.cat([m.class_tokens(y)[:, None].expand(-1, n, -1), m.z_proj(x)], dim=1)
        h = m.z_proj_ln(h + m.encoder_pos_embed_learned)
        keep = torch.cat([torch.ones(B, n, dtype=torch.bool, device=x.device), ~mask], dim=1)
        kept = lambda z: z[keep].reshape(B, -1, z.shape[-1])
        h, everywhere = kept(h), (m.cos, m.sin) if self.cfg.rope else None
        angles = everywhere and [kept(z.expand(B, -1, -1)) for z in everywhere]
        for block in m.encoder_blocks:
            h = block(h, None, angles)
        h = m.decoder_embed(m.encoder_norm(h))
        full = m.mask_token.expand(B, n + N, -1).clone().to(h.dtype)
        full[keep] = h.reshape(-1, h.shape[-1])
        h = full + m.decoder_pos_embed_learned
        for block in m.decoder_blocks:
            h = block(h, None, everywhere)
        return m.decoder_norm(h)[:, n:] + m.diffusion_pos_embed_learned

    @torch.no_grad()
    def mar(self, y, noise, steps, num_iter, cfg_scale):
        """Tokens (B, N, D), guided linearly, from the noise that MAR.generate takes."""
        B, N, D = len(y), self.cfg.n_tokens, self.cfg.token_dim
        order, x = noise.rand(N).argsort(1), torch.zeros(B, N, D, device=y.device)
        labels = torch.cat([y, torch.full_like(y, self.cfg.num_classes)])
        noise = noise.randn(N * (1 + steps), D)
        for a, b in self.model.places(num_iter):
            mask = torch.ones(B, N, dtype=torch.bool, device=y.device)
            mask = mask.scatter(1, order[:, :a], False)
            now = torch.zeros_like(mask).scatter(1, order[:, a:b], True)
            # the noise follows the order, boolean indexing the raster
            raster = order[:, a:b].argsort(1)[None, ..., None].expand(1 + steps, -1, -1, D)
            z = noise[:, a * (1 + steps):b * (1 + steps)].unflatten(1, (1 + steps, b - a))
            z = z.transpose(0, 1).gather(2, raster).flatten(1, 2)
            c = self.mar_conditions(torch.cat([x, x]), torch.cat([mask, mask]), labels)
            c = c[torch.cat([now, now])]                                    # (2 B n, C)
            x[now] = self.trajectory(c, guidance_at("linear", cfg_scale, b / N), z)
        return x

    @torch.no_grad()
    def ar(self, y, noise, steps, cfg_scale):
        """Tokens (B, N, D), constant guidance or (1.0) none; with a KV cache, as everybody does."""
        m, B, N, guided = self.model, len(y), self.cfg.n_tokens, cfg_scale != 1.0
        twice = (lambda z: torch.cat([z, z])) if guided else (lambda z: z)
        labels = torch.cat([y, torch.full_like(y, self.cfg.num_classes)]) if guided else y
        h, tokens = m.class_emb(labels)[:, None], []
        caches, noise = m.empty_cache(len(h), h), noise.randn(N, 1 + steps, self.cfg.token_dim)
        for i in range(N):
            c = m.next_condition(i, h, caches)
            z = noise[:, i].transpose(0, 1)
            x = self.trajectory(c, cfg_scale if guided else None, z)[:, None]
            tokens.append(x)
            h = m.x_proj(twice(x))
        return torch.cat(tokens, dim=1)

    def loss(self, x, y, draws):
        """The diffusion loss with `mul` copies and all tokens through the head; mar: the unmasked
        ones weighed 0 afterwards.

        draws: those of model.loss; mar has drawn t and eps for masked tokens only, which are put
        where they belong.
        """
        m, d, (B, N, D) = self.model, self.model.diffloss, x.shape
        mul = self.cfg.diffusion_batch_mul
        t, eps, y = draws["t"], draws["eps"], m.with_null(y, draws["drop"])
        mask = torch.ones(B, N, dtype=torch.bool, device=x.device)
        if self.cfg.kind == "mar":
            n, order = t.shape[1], draws["order"]
            mask = mask.scatter(1, order[:, :-n], False)

            def spread(z, full):
                to = order[:, -n:].reshape(B, n, *(1,) * (z.dim() - 2)).expand_as(z)
                return full.scatter(1, to, z)
            t, eps = spread(t, t.new_zeros(B, N, mul)), spread(eps, eps.new_zeros(B, N, mul, D))
        c = self.mar_conditions(x, mask, y) if self.cfg.kind == "mar" else m.conditions(x, y)

        copies = lambda z: z.flatten(0, 1).repeat(mul, *(1,) * (z.dim() - 2))   # (mul B N, ...)
        c, x, w = copies(c), copies(x), copies(mask.float())
        t, eps = t.flatten(0, 1).T.flatten(), eps.flatten(0, 1).transpose(0, 1).flatten(0, 1)
        # the arithmetic of the loss itself is the same
        head = SimpleNamespace(net=self.head, noised=d.noised, **dict(d.named_buffers()))
        mse, vb = DiffLoss.terms(head, x, c, t, eps)
        return ((mse + vb) * w).sum() / w.sum()

    def step(self, ema, optimizer, x, y, draws, decay=0.9999):
        """One training step: loops over tensors in the clipping, the optimiser and the average."""
        optimizer.zero_grad()
        with training.amp(x.device):
            loss = self.loss(x, y, draws)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 3.0, foreach=False)
        optimizer.step()
        with torch.no_grad():
            for kept, new in zip(ema.parameters(), self.model.parameters()):
                kept.mul_(decay).add_(new, alpha=1 - decay)


# ---------------------------------------------------------------- counting

class Roofline(TorchDispatchMode):
    """Kernels, FLOPs and seconds of an H100 that takes for each kernel the longest of its bytes by
    3 TB/s, its bf16 FLOPs by 790 T/s and 2 us; `limit`: for its matrix products and attention
    alone, without the 2 us. For tensors without data."""
    FREE = {"empty", "new_empty", "empty_like", "detach", "_unsafe_view", "lift_fresh"}

    def __init__(self):
        super().__init__()
        self.kernels, self.flops, self.seconds, self.limit = 0, 0, 0.0, 0.0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out, name = f(*args, **(kwargs or {})), f._schema.name.split("::")[1]
        if not (f.is_view or name in self.FREE or not any(map(torch.is_tensor, tree_leaves(out)))):
            moved = [z for z in tree_leaves((args, kwargs, out)) if torch.is_tensor(z)]
            if name in ATTENTION:
                flops = ATTENTION[name](*(z.shape for z in moved))
            else:
                count = flop_registry.get(f._overloadpacket, lambda *args, **kwargs: 0)
                flops = count(*args, **(kwargs or {}), out_val=out)
            # of a table that is looked up, or a target that is written, only what is moved
            moved = moved[1:] if name in ("index", "gather", "embedding", "copy_") else moved
            # what is broadcast is read once
            self.add(sum(z.element_size() * math.prod(n for n, step in zip(z.shape, z.stride())
                                                      if step) for z in moved), flops)
        return out

    def add(self, moved, flops):
        """One kernel of so many bytes and FLOPs."""
        needed = max(moved / 3e12, flops / 790e12)
        self.kernels, self.flops = self.kernels + 1, self.flops + flops
        self.seconds += max(needed, 2e-6)
        self.limit += needed * (flops > 0)

    def attention(self, q, k, v, is_causal=False, dropout_p=0.0):
        """One fused kernel."""
        self.add(sum(z.numel() * z.element_size() for z in (q, k, v, q)),
                 4 * q.numel() * k.shape[2])
        return torch.empty_like(q)


# FLOPs of a CPU's attention, of which torch's counter does not know
ATTENTION = {"_scaled_dot_product_flash_attention_for_cpu":
             lambda q, k, *more: 4 * math.prod(q) * k[2],
             "_scaled_dot_product_flash_attention_for_cpu_backward":
             lambda grad, q, k, *more: 10 * math.prod(q) * k[2]}


def one_kernel(x, shape, weight, eps):
    """RMSNorm as what it is on CUDA; a CPU takes seven."""
    return F.layer_norm(x, shape, weight, None, eps)


@contextlib.contextmanager
def cuda_rules():
    """CUDA's autocast on CPU tensors: layer_norm computes in fp32, addcmul in the widest dtype."""
    norm, addcmul = F.layer_norm, torch.addcmul

    def widest(*args, **options):
        args = [z.to(functools.reduce(torch.promote_types, [z.dtype for z in args])) for z in args]
        return addcmul(*args, **options)
    with (patch.object(F, "layer_norm", lambda x, *a, **k: norm(x.float(), *a, **k)),
          patch.object(torch, "addcmul", widest), torch.autocast("cpu", torch.bfloat16)):
        yield


def compiled(fn, *inputs):
    """The Roofline of fn(*inputs), and of its backward pass where it has one, in the kernels that
    torch.compile fuses for a CPU. inputs: real tensors or fake ones; nothing is compiled."""
    from torch._inductor import compile_fx
    from torch._inductor.graph import GraphLowering
    total = Roofline()

    def codegen(graph):
        graph.init_wrapper_code()
        graph._update_scheduler()
        for node in graph.scheduler.nodes:
            moved, flops = int(node.get_read_write_buffers_sizes()), node.estimate_flops() or 0
            kernel = str(getattr(node.node, "python_kernel_name", None)).split(".")[-2:][0]
            if kernel in ATTENTION:
                flops = ATTENTION[kernel](*(z.get_size() for z in node.node.inputs))
            if moved:
                total.add(moved, int(flops))
        raise NotImplementedError("counted")

    def instead(gm, inputs, **options):
        with contextlib.suppress(Exception), patch.object(GraphLowering, "codegen", codegen):
            compile_fx.compile_fx_inner(gm, inputs, **options)
        run = lambda args: gm.forward(*args)
        run._boxed_call = True
        return run

    torch._dynamo.reset()
    backend = functools.partial(compile_fx.compile_fx, inner_compile=instead)
    out = torch.compile(fn, backend=backend)(*inputs)
    if torch.is_tensor(out) and out.requires_grad:
        out.sum().backward()
    return total


def fused_head(name, batch):
    """(kernels, seconds) that torch.compile saves in an evaluation of the head, as fast.py has it
    where Triton is."""
    cfg = preset(name, n_layer=1)

    def saved(depth):                           # affine from two blocks on
        with torch.no_grad():
            head = fast.low(build(replace(cfg, head_depth=depth))).diffloss.net
            mods = head.modulations(torch.zeros(2, batch, cfg.head_width, dtype=torch.bfloat16))
            x = torch.zeros(batch, cfg.token_dim)
            with Roofline() as eager:
                head.denoise(x, mods)
            fused = compiled(head.denoise, x, mods)
        return np.array([eager.kernels - fused.kernels, eager.seconds - fused.seconds])
    two, three = saved(2), saved(3)
    return two + (cfg.head_depth - 2) * (three - two)


def training_roofline(name, batch):
    """(kernels, seconds, seconds of matrix products and attention) of a training step eagerly and
    by torch.compile, without the optimiser; its FLOPs: in bf16 by CUDA's autocast, no dropout."""
    def passes(cfg):
        draws = build(replace(cfg, n_layer=1)).randomness(batch, torch.Generator().manual_seed(0))
        with FakeTensorMode() as fakes, cuda_rules():
            model = build(cfg).train()
            x, y = torch.empty(batch, cfg.n_tokens, cfg.token_dim), torch.zeros(batch).long()
            draws = {key: fakes.from_tensor(z) for key, z in draws.items()}
            with Roofline() as eager, patch.object(F, "rms_norm", one_kernel):
                model.loss(x, y, draws).sum().backward()
            fused = compiled(model.loss, x, y, draws)
        return np.array([eager.kernels, eager.seconds, eager.limit,
                         fused.kernels, fused.seconds, fused.limit, eager.flops])

    *both, flops = by_layers(preset(name, dropout=0.0), passes)
    return both[:3], both[3:], flops


def update_roofline(name):
    """Seconds of an optimiser step, AdamW's and Muon's, with clipping and the average. Fused by
    torch, they move 52 bytes a parameter, Muon 88 and its products for those of the blocks."""
    model = on_meta(preset(name))
    muon = [p for n, p in model.named_parameters() if p.dim() == 2 and "blocks." in n]
    with torch.device("meta"), Roofline() as products:
        for shape, n in collections.Counter(p.shape for p in muon).items():
            orthogonal(torch.empty(n, *shape, dtype=torch.bfloat16))
    adamw = 52 * model.num_params / 3e12
    return adamw, adamw + 36 * sum(p.numel() for p in muon) / 3e12 + products.seconds


def roofline(name, batch, num_iter, **sampling):
    """The Roofline of an AR step in the middle of the chain: guided, in bf16, without the kernels
    that fast.py fuses where Triton is."""
    count = Roofline()
    with (torch.device("meta"), torch.no_grad(), patch.object(F, "rms_norm", one_kernel),
          patch.object(F, "scaled_dot_product_attention", count.attention)):
        model = fast.low(build(preset(name)).eval())
        cfg, head, places = model.cfg, model.diffloss, model.places(num_iter)
        fast.look_ahead(model, 4096)
        a, b = places[len(places) // 2]
        y, at = torch.zeros(2 * batch, dtype=torch.long), torch.zeros(2 * batch, b).long()
        x, h = torch.zeros(2 * batch, a, cfg.token_dim), torch.zeros(2 * batch, 1, cfg.n_embd)
        h, noise = h.bfloat16(), torch.zeros(head.n_noise(**sampling), batch, b - a, cfg.token_dim)
        caches = model.empty_cache(2 * batch, h) if cfg.kind == "ar" else None
        with count:
            if cfg.kind == "ar":
                model.x_proj(x[:, :1])
                c = model.next_condition(a, h, caches)[:, None]
            else:
                c = model.step_conditions(x, at[:, :a], y, at[:, a:])
            head.sample(*c.split(batch), 3.0, noise, **sampling)
    return count


# ---------------------------------------------------------------- measuring

class Bench:
    """One method per benchmark; each writes its rows as it measures them."""

    def __init__(self, device, runs, path=None):
        self.device, self.runs, self.path, self.rows = device, runs, path, []
        # one thread of a CPU: the time that this process had, not that others had
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        self.clock = time.process_time if alone else time.perf_counter
        self.dtype = torch.bfloat16 if fast.has_bf16(device) else torch.float32
        self.rate = self.matmul_rate()

    def seconds(self, fn):
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        began = self.clock()
        fn()
        wait()
        return self.clock() - began

    def matmul_rate(self):
        """FLOP/s of a large product of square matrices, as sampling computes them."""
        n = 8192 if self.device.type == "cuda" else 1024
        x = torch.randn(n, n, device=self.device, dtype=self.dtype)
        return 2 * n ** 3 / statistics.median(self.seconds(lambda: x @ x.T) for _ in range(6))

    def compare(self, bench, what, fns, images=None, flops=None):
        """Take the functions {name: fn} in turns; the first is the reference of the ratios.

        images and flops ({name: number}) are those of one call. A row for each function.
        """
        times, peak, cuda = {name: [] for name in fns}, {}, self.device.type == "cuda"
        for turn in range(-1, self.runs):                   # the first warms up
            for name in list(times):
                if cuda:
                    torch.cuda.reset_peak_memory_stats(self.device)
                try:
                    spent = self.seconds(fns[name])
                except torch.OutOfMemoryError:
                    self.add(bench, f"{what}: {name}", note="does not fit in memory")
                    del times[name]
                    torch.cuda.empty_cache()
                    continue
                times[name] += [spent] * (turn >= 0)
                peak[name] = torch.cuda.max_memory_allocated(self.device) if cuda else 0

        first = times.get(next(iter(fns)))
        for name, spent in times.items():
            t = statistics.median(spent)
            ratio = first and statistics.median(a / b for a, b in zip(first, spent))
            self.add(bench, f"{what}: {name}", t, ratio, images and images / t,
                     flops and flops[name], peak[name])

    def add(self, bench, what, seconds=None, ratio=None, images=None, flops=None, peak=0, note=""):
        share = flops and flops / seconds / self.rate
        row = dict(bench=bench, what=what, seconds=seconds, ratio=ratio, images_per_s=images,
                   flops=flops, share=share, peak_bytes=peak, note=note)
        self.rows.append(row)
        if self.path:
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        text = lambda value, form: form.format(value) if value else ""
        cells = [bench, what, text(seconds and 1e3 * seconds, "{:.4g} ms"), text(ratio, "{:.2f}x"),
                 text(images, "{:.3g}"), text(flops and flops / 1e9, "{:.3g}"),
                 text(share, "{:.0%}"), text(peak and peak / 2**30, "{:.2f} GiB ") + note]
        print("| " + " | ".join(cells) + " |", flush=True)

    def model(self, name, **options):
        torch.manual_seed(0)
        model = build(preset(name, **options)).to(self.device).eval()
        for p in model.parameters():                        # nothing is skipped because it is zero
            if p.abs().max() == 0:
                nn.init.normal_(p, std=0.02)
        return model

    def sampling(self, bench, name, batch, cfg_scale, num_iter=None, **options):
        """The plain path and ours at 100 ancestral steps, then ours at 10 of dpm++."""
        model = self.model(name, **options)
        plain = Plain(model)
        y = torch.arange(batch, device=self.device) % model.cfg.num_classes
        noise = lambda: ImageNoise(0, range(batch), self.device)
        extra = {"num_iter": num_iter} if num_iter else {}

        def published():
            with training.amp(self.device):
                if model.cfg.kind == "mar":
                    return plain.mar(y, noise(), 100, num_iter, cfg_scale)
                return plain.ar(y, noise(), 100, cfg_scale)

        def ours(solver, steps, drawn):
            drawn.generate(y, noise(), cfg_scale, solver=solver, steps=steps, **extra)

        ways, fns, flops = {"this": model}, {"plain": published}, {}
        if fast.has_bf16(self.device):
            ways["this, bf16"] = fast.low(model)
        if self.device.type == "cuda":
            ways["this, CUDA graphs"] = fast.ready(model)
        for way, drawn in ways.items():
            fns[way] = lambda drawn=drawn: ours("ddpm", 100, drawn)
            fns[f"{way}, dpm++ 10"] = lambda drawn=drawn: ours("dpm++", 10, drawn)
        for key in fns:
            if "graphs" in key:                 # eager at first, captured when warming up
                fns[key]()
        for key in fns:
            steps = 10 if "dpm++" in key else 100
            flops[key] = batch * sampling_flops(model.cfg, steps, num_iter, cfg_scale != 1)
        self.compare(bench, f"{name}, batch {batch}", fns, batch, flops)

    # ------------------------------------------------------------ the benchmarks

    def tiny(self):
        """Sampling, the models of the quick start: 16 tokens."""
        for batch in (1, 16, 128):
            self.sampling("tiny", "gpt-tiny", batch, 1.0, grid=4, num_classes=10)
            self.sampling("tiny", "mar-tiny", batch, 3.0, 16, grid=4, num_classes=10)

    def mar(self):
        """Sampling, MAR-B at batch 1, 4 AR steps, guidance 3."""
        self.sampling("mar", "mar-b", 1, 3.0, 4)

    def train(self, cases=(("gpt-tiny", 64, 4), ("mar-tiny", 64, 4), ("mar-b", 1, 16))):
        """A training step: loss, gradients, clipping, AdamW, moving average; without dropout. On a
        GPU compiled, too."""
        for name, batch, grid in cases:
            model = self.model(name, dropout=0.0, num_classes=10, grid=grid).train()
            ema, cfg = copy.deepcopy(model).requires_grad_(False), model.cfg
            args = training.parse_args(["--global_batch", str(batch), "--lr", "1e-6", "--set",
                                        "optimizer=adamw"])
            x, y = torch.randn(batch, cfg.token_dim, grid, grid), torch.arange(batch) % 10
            tokens = x.flatten(2).mT.contiguous().to(self.device)
            split = type("Images", (), {"__len__": lambda self: batch,
                                        "batch": lambda self, index, key: (x[index], y[index])})()
            images = SimpleNamespace(train=split, patch=1)
            world = SimpleNamespace(size=1, rank=0, device=self.device)
            plain, ours = Plain(model), training.make_optimizers(model, args)
            old = torch.optim.AdamW(model.parameters(), 1e-6, foreach=False, fused=False)

            def by_hand():                      # the same draws, and mask ratio, for both
                draws = model.randomness(batch, training.stream(self.device, args.seed, 0))
                plain.step(ema, old, tokens, y.to(self.device), draws)

            def this(ddp=model):
                training.train_step(0, model, ddp, ema, ours, images, args, world)

            fns = {"plain": by_hand, "this": this}
            if self.device.type == "cuda":
                fns["this, torch.compile"] = functools.partial(this, fast.compiled(model))
            flops = dict.fromkeys(fns, training_flops(cfg) * batch)
            self.compare("train", f"{name}, batch {batch}", fns, batch, flops)

    def refine(self, names=("gpt-tiny", "mar-tiny"), n=200,
               solvers=(("ddpm", 25), ("dpm++", 10))):
        """What refinement adds to the sampling of n images of one class, of as many references."""
        modes = {"none": {"method": "none"}, "frozen": {}, "coupled": {"coupled": True}}
        for name in names:
            model = self.model(name, grid=4, num_classes=10)
            tokens_of = lambda k, m: torch.randn(n, 16, 16)
            y = torch.zeros(n, dtype=torch.long, device=self.device)
            for solver, steps in solvers:
                sampling = dict(cfg_scale=1.5, solver=solver, steps=steps)
                refiners = {mode: Refinement(model, tokens_of, sampling, **options).refiner(0)
                            for mode, options in modes.items()}
                fns = {mode: lambda refiner=refiner: draw(
                           model, y, range(n), 0, refiner, **sampling)
                       for mode, refiner in refiners.items()}
                self.compare("refine", f"{name}, {solver} {steps}", fns, n)

    def gpu(self):
        """Training of MAR-L and AR-XL, guided sampling of AR-XL, MAR-B and MAR-L: what `roofline`
        counts."""
        self.train((("mar-l", 64, 16), ("gpt-xl", 32, 16)))
        for name, batch in (("mar-b", 256), ("gpt-xl", 8), ("mar-b", 8), ("gpt-xl", 256),
                            ("mar-l", 256)):
            self.sampling("gpu", name, batch, 3.0, 64 if "mar" in name else None)

    @staticmethod
    def roofline():
        """What `gpu` may be expected to measure on an H100, counted."""
        print("\n| an AR step, counted | kernels: eager, fused | images/s: eager | graphs "
              "| graphs, fused | limit | FLOPs alone |\n" + "|---" * 7 + "|")
        for name, batch, num_iter in (("gpt-xl", 256, None), ("gpt-xl", 8, None),
                                      ("mar-b", 256, 64), ("mar-b", 8, 64), ("mar-l", 256, 64)):
            drawn = [b - a for a, b in on_meta(preset(name)).places(num_iter)]
            fewer, faster = fused_head(name, batch * drawn[len(drawn) // 2])
            for solver, steps in (("ddpm", 100), ("dpm++", 10)):
                step = roofline(name, batch, num_iter, solver=solver, steps=steps)
                kernels, fused = step.kernels - steps * fewer, step.seconds - steps * faster
                times = (max(step.seconds, 4e-6 * step.kernels), step.seconds, fused, step.limit,
                         step.flops / 790e12)
                rates = " | ".join(f"{batch / (num_iter or 256) / t:.3g}" for t in times)
                print(f"| {name}, batch {batch}, {solver} {steps} | {step.kernels}, {kernels:.0f} "
                      f"| {rates} |", flush=True)

        print("\n| training, counted | kernels | GPU, ms | of it products | AdamW, ms "
              "| images/s | of 989 TFLOP/s | Muon, ms | images/s |\n" + "|---" * 9 + "|")
        for name, batch in (("mar-l", 64), ("gpt-xl", 32)):
            (*ways, flops), updates = training_roofline(name, batch), update_roofline(name)
            for way, (kernels, seconds, limit) in zip(("eager", "torch.compile"), ways):
                adamw, muon = (max(seconds, 4e-6 * kernels) + update for update in updates)
                cells = [f"{name}, batch {batch}, {way}", f"{kernels:.0f}", f"{1e3 * seconds:.0f}",
                         f"{1e3 * limit:.0f}", f"{1e3 * updates[0]:.0f}", f"{batch / adamw:.0f}",
                         f"{flops / adamw / 989e12:.0%}", f"{1e3 * updates[1]:.0f}",
                         f"{batch / muon:.0f}"]
                print("| " + " | ".join(cells) + " |", flush=True)


# ---------------------------------------------------------------- command line

QUICK = ("tiny", "mar", "train")
EVERY = (*QUICK, "refine", "roofline")


def main():
    p = Parser(description="Measure the fast paths against the plain ones.")
    p.add_argument("which", nargs="*", metavar="BENCH",
                   help=f"{', '.join(EVERY)}, gpu, or all (default: {', '.join(QUICK)})")
    p.add_argument("--runs", type=number(int, 1), default=3, help="runs; their median counts")
    p.add_argument("--device", default="cpu", help="cpu, cuda ...")
    p.add_argument("--threads", type=number(int, 1, 1024), default=1, help="CPU threads")
    p.add_argument("--json", metavar="FILE", help="write the rows here too, a line each")
    args = p.parse_args()
    which = list(EVERY) if "all" in args.which else args.which or list(QUICK)
    for name in which:
        if name not in (*EVERY, "gpu"):
            raise ValueError(f"no benchmark {name!r}; choose from {', '.join(EVERY)}, gpu, all")
    if which == ["roofline"]:                            # counted, not timed
        args.check_used()
        return Bench.roofline()
    device = pick_device(args.device)
    if "gpu" in which and device.type != "cuda":
        raise ValueError("gpu measures models of 200 to 900M parameters on a GPU: add --device "
                         "cuda; roofline counts what it may be expected to measure")
    torch.set_num_threads(args.threads)

    path = args.json and check_output("--json", args.json)
    bench = Bench(device, args.runs, path)
    print(f"{chip(bench.device)}, {args.threads} thread(s), torch {torch.__version__}; matrix "
          f"products: {bench.rate / 1e9:.0f} GFLOP/s in {str(bench.dtype)[6:]}\n")
    print("| bench | what | median | faster than the first | images/s | GFLOP "
          "| share of the matmul rate | peak memory, notes |\n" + "|---" * 8 + "|")
    for name in which:
        getattr(bench, name)()


def chip(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return found[1] if found else platform.machine()


if __name__ == "__main__":
    run(main)
