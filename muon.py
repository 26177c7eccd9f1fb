"""Muon: momentum whose update of each matrix is made orthogonal, so that all directions learn at
one rate. Nothing of the method; train.py gives it the matrices of all blocks.

    W <- W (1 - lr decay) - scale lr sqrt(max(1, rows / columns)) orthogonal(momentum)

K. Jordan et al. 2024. torch.optim.Muon (since 2.9) works on one matrix at a time; here those of one
shape share their products: in bf16 on a GPU, which is enough, in fp32 on a CPU. scale: an
orthogonal update moves a weight by about lr / sqrt(columns), AdamW's by lr; 10 makes up for it.
"""
import torch


class Muon(torch.optim.Optimizer):
    """Takes matrices (2-d parameters); its state of each is {"momentum": (rows, columns)}."""

    def __init__(self, matrices, lr, weight_decay):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95,
                                    "scale": 10.0})
        self.stacks = []                                     # made in the first step

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.stacks = []                                     # the momenta are other tensors now

    def stack(self):
        """Make the stacks: (matrices of one shape, their momenta, room for their gradients), both
        (n, rows, columns): as much memory as AdamW's moments. The state views the momenta."""
        for shape in dict.fromkeys(p.shape for p in self.param_groups[0]["params"]):
            same = [p for p in self.param_groups[0]["params"] if p.shape == shape]
            momenta = torch.stack([self.state[p].get("momentum", torch.zeros_like(p))
                                   for p in same])           # zeros, or what was loaded
            for p, momentum in zip(same, momenta):
                self.state[p]["momentum"] = momentum
            self.stacks.append((same, momenta, torch.empty_like(momenta)))

    @torch.no_grad()
    def step(self):
        if not self.stacks:
            self.stack()
        group, = self.param_groups
        lr, beta = group["lr"], group["momentum"]
        for same, momenta, mixed in self.stacks:
            grads = [p.grad for p in same]
            torch._foreach_lerp_(list(momenta), grads, 1 - beta)
            torch._foreach_copy_(list(mixed), grads)
            mixed.lerp_(momenta, beta)                                       # Nesterov's
            update = orthogonal(mixed.bfloat16() if mixed.is_cuda else mixed).to(mixed.dtype)
            rate = group["scale"] * lr * max(1, same[0].shape[0] / same[0].shape[1]) ** 0.5
            torch._foreach_mul_(same, 1 - lr * group["weight_decay"])
            torch._foreach_add_(same, list(update), alpha=-rate)


def orthogonal(g, steps=5):
    """(n, rows, columns) -> singular values of .7 to 1.2, but for the tiniest: Newton-Schulz."""
    a, b, c = 3.4445, -4.7750, 2.0315                        # steepest at 0 (Jordan et al. 2024)
    x = g / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.mT if g.shape[1] > g.shape[2] else x
    for _ in range(steps):
        s = x @ x.mT
        s = torch.baddbmm(s, s, s, beta=b, alpha=c)          # b s + c s s
        x = torch.baddbmm(x, s, x, beta=a)                   # a x + s x
    return x.mT if g.shape[1] > g.shape[2] else x
