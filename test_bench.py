"""The fast paths give what the plain path gives, and bench.py runs. No test looks at a time."""
import json
import sys
from dataclasses import replace

import pytest
import torch
from torch._inductor.graph import GraphLowering

import bench
import command
from diffloss import ImageNoise
from model import build, preset
from plan import training_flops

torch.set_num_threads(1)


def tiny(name, **changes):
    """A small model; nothing hides behind a zero (adaLN-zero). mul 3: copies that differ."""
    torch.manual_seed(0)
    model = build(preset(name, token_dim=4, grid=4, num_classes=10, diffusion_batch_mul=3,
                         **changes)).eval()
    for p in model.parameters():
        if p.abs().max() == 0:
            torch.nn.init.normal_(p, std=0.05)
    return model


def relative(a, b):
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
@pytest.mark.parametrize("name", ["gpt-tiny", "mar-tiny"])
def test_sampling_equals_the_plain_path(name, cfg_scale):
    model, y = tiny(name), torch.tensor([3, 1, 3])
    noise, options = lambda: ImageNoise(0, range(3)), dict(solver="ddpm", steps=5)
    if name == "mar-tiny":
        got = model.generate(y, noise(), cfg_scale, num_iter=6, **options)
        want = bench.Plain(model).mar(y, noise(), 5, 6, cfg_scale)
    else:
        got = model.generate(y, noise(), cfg_scale, **options)
        want = bench.Plain(model).ar(y, noise(), 5, cfg_scale)
    # fp32 through a whole chain, in which 1 / sqrt(abar) magnifies rounding by up to 2e4
    assert relative(got, want) < 1e-5, relative(got, want)


@pytest.mark.parametrize("name", ["gpt-tiny", "mar-tiny"])
def test_training_equals_the_plain_path(name):
    model, y = tiny(name), torch.arange(5)
    x = torch.randn(5, 16, 4, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    draws = model.randomness(5, torch.Generator().manual_seed(2))
    losses, grads = [], []
    for loss in (model.loss(x, y, draws), bench.Plain(model).loss(x, y, draws)):
        model.zero_grad()
        loss.backward()
        losses.append(loss)
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert relative(*losses) < 1e-5 and grads[0].keys() == grads[1].keys()
    # of the largest gradient: some tensors' are sums that cancel
    scale = max(g.abs().max() for g in grads[1].values())
    for n, g in grads[0].items():
        assert (g - grads[1][n]).abs().max() < 1e-5 * max(scale, g.abs().max()), n


@pytest.fixture
def quick(monkeypatch):
    """Costs that are tested where they live."""
    monkeypatch.setattr(bench.fast, "has_bf16", lambda device: False)
    for name in ("sampling_flops", "training_flops"):
        monkeypatch.setattr(bench, name, lambda *args: 1e9)
    monkeypatch.setattr(bench.Bench, "matmul_rate", lambda self: 1e9)


def test_every_kind_of_measurement_runs_and_says_what_it_measured(quick, tmp_path, capsys):
    b = bench.Bench(torch.device("cpu"), 1, tmp_path / "rows")
    small = dict(grid=2, num_classes=10)
    b.sampling("sampling", "mar-tiny", 2, 3.0, 3, **small)
    b.sampling("sampling", "gpt-tiny", 1, 1.0, **small)
    b.train((("gpt-tiny", 2, 2),))
    b.refine(("gpt-tiny",), 12, (("dpm++", 2),))
    lines = (tmp_path / "rows").read_text().splitlines()
    assert [json.loads(line) for line in lines] == b.rows, "each is written when it is measured"
    assert [r["what"] for r in b.rows] == [
        "mar-tiny, batch 2: plain", "mar-tiny, batch 2: this", "mar-tiny, batch 2: this, dpm++ 10",
        "gpt-tiny, batch 1: plain", "gpt-tiny, batch 1: this", "gpt-tiny, batch 1: this, dpm++ 10",
        "gpt-tiny, batch 2: plain", "gpt-tiny, batch 2: this",
        "gpt-tiny, dpm++ 2: none", "gpt-tiny, dpm++ 2: frozen", "gpt-tiny, dpm++ 2: coupled"]
    assert all(r["seconds"] > 0 and r["ratio"] > 0 for r in b.rows)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(printed) == len(b.rows)


def test_the_roofline_counts_a_kernel_by_its_bytes_or_its_flops_and_sees_the_whole_step():
    a, b = (torch.empty(n, n, device="meta", dtype=torch.bfloat16) for n in (64, 8192))
    for x, seconds in ((a, 2e-6), (b, 2 * 8192 ** 3 / 790e12)):
        with bench.Roofline() as count:
            x @ x.T
        assert (count.kernels, count.flops) == (1, 2 * len(x) ** 3)
        assert count.seconds == pytest.approx(seconds)
        assert count.limit == pytest.approx(max(3 * x.nbytes / 3e12, count.flops / 790e12))
    with bench.Roofline() as count:
        b + b[:1]
    assert count.seconds == pytest.approx((2 * 8192 ** 2 + 8192) * 2 / 3e12) and not count.limit
    few, more = (bench.roofline(name, 4, 4, solver="dpm++", steps=3)
                 for name in ("gpt-tiny", "mar-tiny"))
    assert 80 < few.kernels < more.kernels < 300 and few.flops > 0, "kernels of an AR step"


@pytest.mark.skipif(not hasattr(GraphLowering, "_update_scheduler"),
                    reason="needs a torch that can be asked what it would compile")
@pytest.mark.parametrize("trained", [False, True])
def test_what_is_compiled_is_counted_in_fused_kernels_forward_and_backward(trained):
    x, w = torch.randn(64, 64, requires_grad=trained), torch.randn(64, 64)
    count = bench.compiled(lambda x: ((x @ w) * 2 + 1).sin(), x)
    # a product, and what follows it in one kernel; backward the same
    assert count.kernels == 2 * (1 + trained) and count.flops == 2 * 64 ** 3 * (1 + trained)
    with bench.Roofline() as eager:
        ((x @ w) * 2 + 1).sin()
    assert eager.kernels == 4 and eager.flops == 2 * 64 ** 3


@pytest.mark.skipif(not hasattr(GraphLowering, "_update_scheduler"),
                    reason="needs a torch that can be asked what it would compile")
def test_a_training_step_takes_fewer_kernels_compiled_and_its_flops_are_those_of_plan(monkeypatch):
    small = replace(preset("gpt-tiny"), n_layer=1, head_depth=1)
    monkeypatch.setattr(bench, "by_layers", lambda cfg, count: count(small))
    (kernels, seconds, limit), (fewer, faster, same), flops = bench.training_roofline("gpt-tiny", 2)
    assert fewer < 0.7 * kernels and faster < 0.7 * seconds, (fewer, kernels, faster, seconds)
    assert flops == pytest.approx(2 * training_flops(small), rel=0.1)
    assert limit == pytest.approx(same, rel=0.3) and limit < faster, (limit, same)
    adamw, muon = bench.update_roofline("gpt-tiny")
    assert adamw < muon


def test_a_row_that_does_not_fit_in_memory_says_so_and_the_rest_goes_on(quick, capsys):
    def too_large():
        raise torch.OutOfMemoryError("72 GiB")
    b = bench.Bench(torch.device("cpu"), 2)
    b.compare("x", "y", {"plain": too_large, "this": lambda: sum(range(10_000))}, images=2)
    assert [r["what"] for r in b.rows] == ["y: plain", "y: this"]
    assert b.rows[0]["note"] == "does not fit in memory" and b.rows[0]["seconds"] is None
    assert b.rows[1]["seconds"] > 0 and b.rows[1]["ratio"] is None


def test_the_command_writes_its_table_and_refuses_unknown_names_and_gpu_without_one(
        quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.Bench, "mar", lambda self: self.add("mar", "one", 0.5, 2.0))
    file = tmp_path / "b.jsonl"
    monkeypatch.setattr(sys, "argv", ["bench.py", "mar", "--json", str(file)])
    command.run(bench.main)
    assert json.loads(file.read_text())["ratio"] == 2.0
    assert "| mar | one | 500 ms | 2.00x |" in capsys.readouterr().out
    for argv, words in (["nothing"], "'nothing'"), (["mar", "gpu"], "add --device cuda"):
        monkeypatch.setattr(sys, "argv", ["bench.py", *argv])
        with pytest.raises(SystemExit) as stop:
            command.run(bench.main)
        said = capsys.readouterr()
        assert stop.value.code == 2 and words in said.err and not said.out, "before any work"
