"""Drawing fast: the same model in bf16, its trajectories and AR steps as CUDA graphs. And training:
compiled, or in less memory.

    ready(model)             what sample.py draws from on a GPU, or on a CPU with bf16 if the model
                             is large
    images_at_once(model)    how many of them on a GPU
    compiled(model)          what train.py trains on CUDA, if it is large
    checkpoint_blocks(model) train.py --checkpoint_blocks

Nothing here belongs to the method. Weights are rounded to bf16 once, so that nothing is cast on the
way; x_t, the schedule, refinement and the noise stay fp32. Some 80 kernels an evaluation of the
head take longer to launch than to run: a CUDA graph launches those of a whole trajectory at once.
Each graph is checked against the eager path before it is used, and wherever one fails, or differs,
drawing goes on without and says so in one line.
"""
import contextlib
import copy
import functools
import importlib.util
import sys
import weakref
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from diffloss import on_device

READY = weakref.WeakKeyDictionary()     # model -> (state of its weights, what is drawn from)


def ready(model):
    """A model that draws what `model` draws, faster; made anew when the weights have changed."""
    device = next(model.parameters()).device
    if device.type == "cpu" and not has_bf16(device):
        return model
    state = [device, model.diffloss.x0_bound, *(p._version for p in model.parameters())]
    if READY.get(model, (None,))[0] != state:
        fast = low(model) if has_bf16(device) else copy.deepcopy(model)
        READY[model] = state, graphed(fast) if device.type == "cuda" else fast
    return READY[model][1]


def has_bf16(device):
    """Does the device compute in bf16? Emulated (T4, V100, RTX 20, most CPUs) it is slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return "avx512_bf16" in cpu_flags()


def exact_products():
    """Let oneDNN compute a CPU's fp32 products where it does so exactly: on AMD cores with AVX-512
    twice as fast as MKL. Cores with AMX round those of some shapes to bf16; of others, one product
    shows it."""
    if "amx_bf16" in cpu_flags():
        return
    x, w = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).split([64, 448])
    torch.set_float32_matmul_precision("medium")
    if (F.linear(x, w).double() - F.linear(x.double(), w.double())).abs().max() > 1e-3:
        torch.set_float32_matmul_precision("highest")


def cpu_flags():
    info = Path("/proc/cpuinfo")
    return info.read_text() if info.exists() else ""


class Linear(nn.Linear):
    """A layer that takes fp32, such as tokens and noise, into bf16."""

    def forward(self, x):
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


def low(model):
    """A copy of a model with weights in bf16; its tables stay fp32, but for those of RoPE."""
    model = copy.deepcopy(model).requires_grad_(False)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    for p in model.parameters():
        p.data = p.data.bfloat16()
    for name in {"cos", "sin"} & set(vars(model)["_buffers"]):
        setattr(model, name, getattr(model, name).bfloat16())
    look_ahead(model, 1024)
    return model


def look_ahead(model, rows):
    """Let a denoising MLP compute its modulations, which do not depend on x_t, for as many steps
    ahead as make so many rows: with few rows their weights, 3/5 of all, are not read once a step.
    """
    net = model.diffloss.net
    if model.cfg.kind != "cdm":
        net.along = functools.partial(along, net, rows)


def along(net, rows, ts, c):
    """What DenoisingMLP.along gives."""
    ahead, ready = max(1, rows // c.shape[:-1].numel()), {}
    cond, time = net.cond_embed(c), net.time_embed(on_device(tuple(ts), c.device))

    def denoise(x_t, t):
        if t not in ready:
            j = ts.index(t)
            ready.clear()
            y = time[j:j + ahead].view(-1, *(1,) * (c.dim() - 1), time.shape[-1]) + cond
            # per block (shift, gain, gate) of `ahead` steps -> per step those of all blocks
            mods = [zip(*(part.unbind(0) for part in mod)) for mod in net.modulations(y)]
            ready.update(zip(ts[j:j + ahead], zip(*mods)))
        return net.denoise(x_t, ready[t])

    return denoise


# ---------------------------------------------------------------- memory

def width(model):
    """Bytes of a number in what is drawn from."""
    return 2 if has_bf16(next(model.parameters()).device) else 4


def weight_bytes(model):
    """Of the copy that `ready` will make."""
    return width(model) * sum(p.numel() for p in model.parameters())


def image_bytes(model, cfg_scale=1.0, **sampling):
    """About how many bytes drawing takes for each image of a batch.

    Keys and values of all layers (ar) or what one layer computes (mar, cdm: some 14 C a token; of
    mar twice, as graphs have memory of their own) and modulations of the head, for both branches
    of guidance; noise of all trajectories, twice; of latents ten times the fp32 pixels, for their
    way through the VAE.
    """
    cfg, head, size = model.cfg, model.diffloss, width(model)
    branches, tokens = 1 + (cfg_scale != 1), cfg.n_tokens + cfg.n_class_tokens * (cfg.kind == "mar")
    layers = {"ar": 2 * cfg.n_layer, "mar": 28, "cdm": 14}[cfg.kind]
    kept = layers * tokens * cfg.n_embd * size
    mods = 3 * cfg.head_depth * cfg.head_width * size * 2
    noise = head.n_noise(**sampling)
    pixels = 10 * 4 * 3 * 256 * cfg.n_tokens * (cfg.token_dim == 16)
    return branches * (kept + mods) + 2 * 4 * noise * cfg.n_tokens * cfg.token_dim + pixels


def images_at_once(model, sampling, most=500):
    """How many images are drawn at once by default: what 70 % of the GPU's free memory holds."""
    free = torch.cuda.mem_get_info(model.device)[0] - weight_bytes(model)
    return min(most, max(1, int(0.7 * free / image_bytes(model, **sampling))))


# ---------------------------------------------------------------- CUDA graphs

def graphed(model):
    """The same model, whose head draws a trajectory as one CUDA graph; each step of the transformer
    is one, too. Weights may change in place, but not move."""
    head, graphs = model.diffloss, Graphs(next(model.parameters()).device)
    sample, fused = head.sample, fusion(head)
    look_ahead(model, 4096)                     # eight steps at batch 256

    def draw(c, c_null, cfg_scale, noise, callback=None, **options):
        if callback:                            # Python, which wants to see every evaluation
            return sample(c, c_null, cfg_scale, noise, callback=callback, **options)

        def trajectory(noise, c, scale=1.0, c_null=None):
            return sample(c, c_null, scale, noise, **options)

        given = [noise, c]
        if c_null is not None:                  # a tensor, as it changes along the chain
            given += [torch.full((), cfg_scale, device=c.device), c_null]
        return graphs(repr(options), trajectory, given, fused)
    head.sample = draw

    if model.cfg.kind == "ar":
        step, new_cache, kept = model.next_condition, model.empty_cache, {}

        def cache(rows, like):                  # graphs know where it lies, so that it is kept
            if rows not in kept:
                kept.clear()
                graphs.forget()
                kept[rows] = new_cache(rows, like)
            return kept[rows]

        model.empty_cache = cache
        model.next_condition = lambda i, h, caches: graphs(i, lambda h: step(i, h, caches), [h])
    if model.cfg.kind == "mar":
        step = model.next_condition

        def conditions(x, known, pos, y, guided):
            # both branches of guidance as one tensor; a graph for each number of known patches
            both = lambda *z: torch.cat([c for c in step(*z, guided) if c is not None])
            c = graphs(guided, both, [x, known, pos, y])
            return c.chunk(2) if guided else (c, None)
        model.next_condition = conditions
    return model


def fusion(head, least=1024):
    """fn -> the same with the kernels of the head's blocks fused by torch.compile (4 a block, not
    6), which takes half a minute: for widths from `least`, where there is Triton. Else None."""
    net = head.net
    width = getattr(getattr(net, "input_proj", None), "out_features", 0)
    if width < least or not importlib.util.find_spec("triton"):
        return None
    plain, compiled = net.denoise, torch.compile(net.denoise)

    def fused(fn):
        def run(*inputs):
            net.denoise = compiled
            try:
                return fn(*inputs)
            finally:
                net.denoise = plain
        return run
    return fused


class Graphs:
    """Functions as CUDA graphs: eager when a key and shapes are first met, captured and checked
    against the eager result when they are met again, and replayed from then on."""

    def __init__(self, device):
        self.device, self.off = device, set()
        self.forget()

    def forget(self):
        self.met, self.kept, self.pool = set(), {}, []

    def __call__(self, key, fn, inputs, fused=None):
        """fn(*inputs), a tensor. fn must not wait for the device; tensors that it reads beside its
        inputs must stay where they are. fused(fn): what is tried before fn itself."""
        key = (key, *((tuple(z.shape), z.dtype) for z in inputs))
        if key in self.kept:
            return self.kept[key](*inputs)
        out = fn(*inputs)
        ways = {"compiled kernels": fused and fused(fn), "CUDA graphs": fn}
        ways = {what: way for what, way in ways.items() if way and what not in self.off}
        if key in self.met and "CUDA graphs" in ways:
            for what, way in ways.items():
                graph = self.checked(what, way, inputs, out)
                if graph:
                    self.kept[key] = graph
                    return out
            return fn(*inputs)                  # what the trials wrote into a cache is undone
        self.met.add(key)
        return out

    def checked(self, what, fn, inputs, want):
        """fn as a graph that gives what eager mode gave, or None and a line that says why not."""
        try:
            graph = capture(fn, inputs, self.device, self.pool)
            error = float((graph(*inputs) - want).norm() / want.norm())
            if error < 0.1:                     # bf16 along a chain; a wrong one is off by 1
                return graph
            reason = f"off by {error:.0%}"
        except Exception as error:              # of torch, CUDA, Triton, a compiler
            reason = (str(error).splitlines() or [type(error).__name__])[0][:150]
        self.off.add(what)
        print(f"{what} are given up ({reason}): drawing goes on without, slower", file=sys.stderr)
        return None


def capture(fn, inputs, device, pool):
    """fn as a CUDA graph: a function of tensors like `inputs`. Graphs of one `pool` share memory,
    as each result is copied before the next graph runs."""
    static = [torch.zeros_like(z) for z in inputs]          # others than those of the check
    with torch.cuda.device(device):
        pool += [] if pool else [torch.cuda.graph_pool_handle()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):           # outside the graph: workspaces, tables, compiling
            fn(*static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool[0], stream=side):
            out = fn(*static)

    def replay(*inputs):
        for z, new in zip(static, inputs):
            z.copy_(new)
        graph.replay()
        return out.clone()
    return replay


# ---------------------------------------------------------------- training

def checkpoint_blocks(model):
    """Keep only each block's input for the backward pass: exact, about a third slower."""
    for module in model.modules():
        for block in module if isinstance(module, nn.ModuleList) else ():
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def compiled(ddp):
    """ddp by torch.compile, or itself, after one line, where that fails (no Triton, no compiler).

    DDP is inside, so that the model is cut at its buckets and the gradients of one are summed while
    those of the next are computed. ar is compiled once, mar for none, one and many known patches.
    """
    ways = [torch.compile(ddp), ddp]

    def call(*args):
        try:
            return ways[0](*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:                       # of Dynamo, Inductor, Triton, a compiler
            if len(ways) == 1:
                raise
            print(f"torch.compile is off: {(str(error).splitlines() or [type(error).__name__])[0]}")
            del ways[0]
            return ddp(*args)
    call.no_sync = getattr(ddp, "no_sync", contextlib.nullcontext)
    return call
