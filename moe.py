"""Mixture of experts: which experts see a token?

A dense MLP spends the same weights on every token. Here a router scores many small MLPs, each token visits the few with
the highest scores, and a shared expert sees every token, so that the routed ones need not all learn what is common.
Parameters grow with n_expert, the work per token only with n_active.

    s_e  = sigmoid(x . r_e)                                    score of expert e                       [DSV3 eq 15]
    A    = top n_active of s_e + b_e                           the bias chooses, it does not weigh     [DSV3 eq 16]
    g_e  = s_e / sum_{a in A} s_a  for e in A, else 0          gates of the chosen sum to one          [DSV3 eq 13]
    y    = sum_shared MLP(x) + routed_scale sum_{e in A} g_e MLP_e(x)                                               [DSV3 eq 12]
    b_e += bias_lr sign(mean count - count_e)                  after each optimizer step               [LossFree alg 1]

The last line keeps the experts evenly loaded without an auxiliary loss: an overloaded expert becomes a little less
likely to be chosen, and no gradient pulls the router away from what predicts best.

Contents:    config | router | experts | MoE | balance | demo
Shapes:      M tokens (B T flattened), D n_embd, F d_expert, E experts, A active experts
References:
    [DSMoE]     DeepSeekMoE, arXiv:2401.06066
    [DSV3]      DeepSeek-V3 Technical Report, arXiv:2412.19437
    [LossFree]  Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts, arXiv:2408.15664
Run me:      python moe.py      (a skewed router, balanced by its bias)
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from dist import World, all_sum
from tokenizer import UsageError, run_cli


@dataclass
class MoEConfig:
    moe: bool = False              # replace the MLP of the blocks by a mixture of experts
    n_expert: int = 8              # routed experts of a block
    n_active: int = 2              # routed experts that a token visits
    n_shared_expert: int = 1       # experts that every token visits
    d_expert: int = 0              # hidden width of an expert; 0 shares d_ff among the active and shared ones
    n_dense_layer: int = 1         # first blocks that keep a dense MLP
    router: str = "sigmoid"        # scores of the router, a key of ROUTERS
    routed_scale: float = 1.0      # factor on the routed experts' sum
    bias_lr: float = 0.001         # step of the balancing bias; 0 leaves the load as it falls


# ---- Router (scores to a choice) ----

ROUTERS = {                        # flag --router
    "sigmoid": torch.sigmoid,                              # experts are judged one by one                [DSV3 eq 15]
    "softmax": lambda logits: logits.softmax(-1),          # experts compete for one unit of probability  [DSMoE eq 5]
}


def route(logits_ME, bias_E, n_active, score="sigmoid"):
    """(experts [M, A] int64, gates [M, A] that sum to one). The bias enters the choice alone."""
    score_ME = ROUTERS[score](logits_ME)
    expert_MA = (score_ME + bias_E).topk(n_active, dim=-1).indices                                       # [DSV3 eq 16]
    gate_MA = score_ME.gather(1, expert_MA)
    return expert_MA, gate_MA / (gate_MA.sum(-1, keepdim=True) + 1e-20)                                  # [DSV3 eq 13]


# ---- Experts (E small SwiGLU MLPs with stacked weights) ----

class Experts(nn.Module):
    def __init__(self, n_expert, n_embd, d_expert):
        super().__init__()
        self.w_gate = nn.Parameter(torch.empty(n_expert, d_expert, n_embd))
        self.w_up = nn.Parameter(torch.empty(n_expert, d_expert, n_embd))
        self.w_down = nn.Parameter(torch.empty(n_expert, n_embd, d_expert))

    def forward(self, x_MD, expert_MA, gate_MA):
        """sum_a gate_a MLP_{expert_a}(x): the readable loop. An expert without tokens still runs, on none, so that every
        weight has a gradient on every rank."""
        y_MD = torch.zeros_like(x_MD, dtype=torch.promote_types(x_MD.dtype, torch.float32))      # adds up in float32
        order = expert_MA.flatten().argsort(stable=True)                   # visits sorted by expert
        counts = torch.bincount(expert_MA.flatten(), minlength=len(self.w_gate)).tolist()
        token, gate = order // expert_MA.shape[1], gate_MA.flatten()[order]
        for e, (rows, weight) in enumerate(zip(token.split(counts), gate.split(counts))):
            x_CD = x_MD[rows]
            h_CF = F.silu(F.linear(x_CD, self.w_gate[e])) * F.linear(x_CD, self.w_up[e])
            out_CD = F.linear(h_CF, self.w_down[e]) * weight[:, None]
            y_MD = y_MD.index_add(0, rows, out_CD.to(y_MD.dtype))
        return y_MD


# ---- MoE (router, routed experts, shared expert) ----

class MoE(nn.Module):
    """Drop-in for the dense MLP of a block.                                                    [DSMoE eq 9, DSV3 eq 12]"""

    def __init__(self, cfg, d_ff):
        super().__init__()
        if not 1 <= cfg.n_active <= cfg.n_expert:
            raise UsageError(f"--n_active={cfg.n_active} of --n_expert={cfg.n_expert}: a token visits between 1 and "
                             f"{cfg.n_expert} experts; use --n_active={min(2, cfg.n_expert)}")
        width = cfg.d_expert or max(8, d_ff // (cfg.n_active + cfg.n_shared_expert) // 8 * 8)
        self.n_active, self.scale, self.score, self.bias_lr = cfg.n_active, cfg.routed_scale, cfg.router, cfg.bias_lr
        self.router = nn.Linear(cfg.n_embd, cfg.n_expert, bias=False)
        self.experts = Experts(cfg.n_expert, cfg.n_embd, width)
        self.shared = Experts(1, cfg.n_embd, width * cfg.n_shared_expert) if cfg.n_shared_expert else None
        self.register_buffer("bias_E", torch.zeros(cfg.n_expert))
        self.register_buffer("count_E", torch.zeros(cfg.n_expert), persistent=False)     # visits since the last update

    def forward(self, x_BTD):
        x_MD = x_BTD.flatten(0, 1)
        with torch.autocast(x_MD.device.type, enabled=False):      # float32: near ties would flip in half precision
            logits_ME = F.linear(x_MD.float(), self.router.weight.float())
        expert_MA, gate_MA = route(logits_ME, self.bias_E, self.n_active, self.score)
        if self.training:
            self.count_E += torch.bincount(expert_MA.flatten(), minlength=len(self.bias_E))
        y_MD = self.experts(x_MD, expert_MA, gate_MA * self.scale)
        if self.shared is not None:
            w = self.shared
            y_MD = y_MD + F.linear(F.silu(F.linear(x_MD, w.w_gate[0])) * F.linear(x_MD, w.w_up[0]), w.w_down[0])
        return y_MD.to(x_BTD.dtype).view_as(x_BTD)


# ---- Balance (once per optimizer step) ----

@torch.no_grad()
def update_biases(model, world=World()):
    """Move every router's bias against its load of this step, summed over micro-batches and ranks.     [LossFree alg 1]
    Returns {max_vio}: the worst layer's largest load over the mean, less one (0 is perfect balance)."""
    layers = [m for m in model.modules() if isinstance(m, MoE)]
    if not layers:
        return {}
    count_LE = all_sum(world, torch.stack([m.count_E for m in layers]))
    mean_L1 = count_LE.mean(1, keepdim=True)
    for layer, step_E in zip(layers, torch.sign(mean_L1 - count_LE)):
        layer.bias_E += layer.bias_lr * step_E
        layer.count_E.zero_()
    return {"max_vio": (count_LE / mean_L1.clamp(min=1)).max().item() - 1}


# ---- Demo ----

def demo(argv):
    if argv:
        raise UsageError(f"moe.py takes no arguments, not {' '.join(argv)}")
    torch.manual_seed(0)
    cfg = MoEConfig(bias_lr=0.005)
    cfg.n_embd = 32
    layer = MoE(cfg, d_ff=96)
    for name, p in layer.named_parameters():
        nn.init.normal_(p, std=0.2)
    skew_D = torch.randn(32)                                     # tokens share a direction, so some experts look best to all
    print(f"{cfg.n_expert} experts, {cfg.n_active} active and {cfg.n_shared_expert} shared a token, "
          f"{sum(p.numel() for p in layer.parameters()):,} parameters\n")
    with torch.no_grad():
        for step in range(201):
            x_BTD = torch.randn(4, 128, 32) + skew_D
            layer(x_BTD)
            load_E = layer.count_E / layer.count_E.sum()
            vio = update_biases(layer)["max_vio"]
            if step % 50 == 0:
                print(f"step {step:3d}  load " + " ".join(f"{share:6.1%}" for share in load_E.tolist()) + f"   max_vio {vio:.2f}")
    print("\nbias " + " ".join(f"{b:+.2f}" for b in layer.bias_E.tolist()) + "   (what balanced them; the gates never saw it)")


if __name__ == "__main__":
    run_cli(demo)
