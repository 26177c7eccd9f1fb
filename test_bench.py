"""The fast paths give what the plain path gives, and bench.py runs. No test looks at a time."""
import contextlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch

import bench
import data
import sample
from diffloss import ImageNoise, Sampler, replay
from model import build, preset

torch.set_num_threads(1)


def tiny(name, **changes):
    """A small model in which nothing is hidden behind a zero (adaLN-zero). mul 3: copies that are told apart."""
    torch.manual_seed(0)
    model = build(preset(name, token_dim=4, grid=4, num_classes=10, inverse=False, buffer=0, diffusion_batch_mul=3, **changes)).eval()
    for p in model.parameters():
        if p.abs().max() == 0:
            torch.nn.init.normal_(p, std=0.05)
    return model


def relative(a, b):
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
@pytest.mark.parametrize("name", ["gpt-tiny", "mar-tiny"])
def test_sampling_equals_the_plain_path(name, cfg_scale):
    # 1e-5 of the largest value: fp32 through a whole chain, in which 1 / sqrt(abar) magnifies rounding by up to 2e4 in the first step
    model, y = tiny(name), torch.tensor([3, 1, 3])
    sampler, noise = Sampler("ddpm", 5), lambda: ImageNoise(0, range(3))
    options = {"num_iter": 6} if name == "mar-tiny" else {}
    got = model.generate(y, noise(), sampler, cfg_scale, **options)
    want = bench.Plain(model).mar(y, noise(), 5, 6, cfg_scale) if options else bench.Plain(model).ar(y, noise(), 5, cfg_scale)
    assert relative(got, want) < 1e-5, relative(got, want)


@pytest.mark.parametrize("name", ["gpt-tiny", "mar-tiny"])
def test_training_equals_the_plain_path(name):
    model = tiny(name)
    x, y = torch.randn(5, 16, 4, generator=torch.Generator().manual_seed(1)).clamp(-1, 1), torch.arange(5)
    draws = model.draw(5, torch.Generator().manual_seed(2))
    losses, grads = [], []
    for loss in (model.loss(x, y, draws)[0], bench.Plain(model).loss(x, y, draws)):
        model.zero_grad()
        loss.backward()
        losses.append(loss)
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert relative(*losses) < 1e-5
    assert grads[0].keys() == grads[1].keys()
    scale = max(g.abs().max() for g in grads[1].values())                           # per tensor some gradients are sums that cancel
    for n, g in grads[0].items():
        assert (g - grads[1][n]).abs().max() < 1e-5 * max(scale, g.abs().max()), n


def test_skipped_guidance_off_is_exact_and_a_wide_one_is_no_guidance():
    for name, options in (("mar-tiny", {"num_iter": 6}), ("gpt-tiny", {"cfg_schedule": "linear"})):
        model, y = tiny(name), torch.tensor([3, 1])
        draw = lambda scale, **kw: model.generate(y, ImageNoise(0, range(2)), Sampler("ddpm", 4, x0_bound=2.0), scale, **options, **kw)
        assert torch.equal(draw(3.0, cfg_skip=0.0), draw(3.0)) and not torch.equal(draw(3.0), draw(1.0))
        assert relative(draw(3.0, cfg_skip=9.0), draw(1.0)) < 1e-5                  # other matmul shapes
        assert not torch.equal(draw(3.0, cfg_skip=0.3), draw(3.0))
    recipe = sample.make_recipe(sample.parse_args(["--cfg_skip", "0.2"]), "cdm", 1.0)
    with pytest.raises(ValueError, match="--cfg_skip"):
        sample.Drawer(tiny("cdm-tiny"), recipe, [0])


def test_a_replayed_graph_sees_new_inputs_and_each_shape_has_its_own(monkeypatch):
    # Without a GPU: a stand-in for torch.cuda whose graphs run the captured function again, on the static tensors
    calls = []

    class Graph:
        def replay(self):
            x, y, out = self.captured
            out.copy_(x * y)

    @contextlib.contextmanager
    def capture(graph):
        yield
        graph.captured = calls[-1]

    def fn(x, y):
        calls.append((x, y, x * y))
        return calls[-1][2]

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in (("CUDAGraph", Graph), ("graph", capture), ("Stream", lambda: stream), ("current_stream", lambda: stream),
                           ("stream", lambda s: contextlib.nullcontext())):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    graphs, kept = {}, []
    for n in (2, 3, 2, 2):
        x, y = torch.randn(n), torch.randn(n)
        kept.append((replay(graphs, "key", fn, x, y), x * y))
    assert len(graphs) == 2 and len(calls) == 4, "a graph per shape, run once before and once during capture"
    for got, want in kept:
        assert torch.equal(got, want), "no result is overwritten by a later replay"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["gpt-tiny", "mar-tiny"])
def test_cuda_graphs_equal_the_eager_path(name):
    model, y = tiny(name).cuda(), torch.tensor([3, 1], device="cuda")
    options = {"num_iter": 6, "cfg_schedule": "linear"} if name == "mar-tiny" else {}
    for solver in ("ddpm", "dpm++"):
        draw = lambda: model.generate(y, ImageNoise(0, range(2), "cuda"), Sampler(solver, 5, x0_bound=2.0), 3.0, **options)
        want = draw()
        model.diffloss.graphs = {}
        assert relative(draw(), want) < 1e-4 and relative(draw(), want) < 1e-4      # TF32 is off; captured, then replayed
        model.diffloss.graphs = None


def test_every_kind_of_measurement_runs_and_says_what_it_measured(capsys, monkeypatch):
    for name in ("sampling_flops", "training_flops"):                                # tested where they live
        monkeypatch.setattr(bench, name, lambda *args: 1e9)
    monkeypatch.setattr(bench.Bench, "matmul_rate", lambda self, dtype: 1e9)
    b = bench.Bench(torch.device("cpu"), 1)
    b.sampling("sampling", "mar-tiny", 2, 3.0, 2, few={"few": (Sampler("dpm++", 3), {"cfg_skip": 0.5})}, grid=2, num_classes=10)
    b.sampling("sampling", "gpt-tiny", 1, 1.0, part=slice(0, None, 4), grid=2, num_classes=10)
    b.train((("gpt-tiny", 2, {"grid": 2}),))
    b.sinkhorn(((8, 9, 4),))
    assert [r["what"] for r in b.rows][:5] == ["mar-tiny, batch 2: plain", "mar-tiny, batch 2: this", "mar-tiny, batch 2: few",
                                               "gpt-tiny, batch 1: plain", "gpt-tiny, batch 1: this"]
    assert all(r["seconds"] > 0 and r["ratio"] > 0 for r in b.rows)
    assert [r["flops"] for r in b.rows].count(None) == 5, "not counted: skipped guidance, POT"
    assert all(float(r["note"].rpartition(" ")[2]) < 1e-3 for r in b.rows if r["bench"] == "sinkhorn"), "one plan, 100 iterations on"
    assert len(capsys.readouterr().out.splitlines()) == len(b.rows)


def test_the_command_writes_its_table_and_refuses_unknown_names(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.Bench, "matmul_rate", lambda self, dtype: 1e9)
    monkeypatch.setattr(bench.Bench, "head", lambda self: self.add("head", "one", 0.5, 2.0, note="stub"))
    monkeypatch.setattr(sys, "argv", ["bench.py", "head", "--json", str(tmp_path / "b.json")])
    data.run(bench.main)
    saved = json.loads((tmp_path / "b.json").read_text())
    assert saved["machine"]["torch"] == torch.__version__ and saved["rows"][0]["ratio"] == 2.0
    assert "| head | one | 500 ms | 2.00x |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["bench.py", "nothing"])
    with pytest.raises(SystemExit) as stop:
        data.run(bench.main)
    assert stop.value.code == 2 and "no benchmark 'nothing'" in capsys.readouterr().err
