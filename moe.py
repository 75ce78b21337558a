"""Mixture of experts: which experts see a token?

A dense MLP spends the same weights on every token. Here a router scores many small MLPs, each token visits the few with
the highest scores, and a shared expert sees every token, so that the routed ones need not all learn what is common.
Parameters grow with n_expert, the work per token only with n_active.

    s_e  = sigmoid(x . r_e)                                    score of expert e                       [DSV3 eq 15]
    A    = top n_active of s_e + b_e                           the bias chooses, it does not weigh     [DSV3 eq 16]
    g_e  = s_e / sum_{a in A} s_a  for e in A, else 0          gates of the chosen sum to one          [DSV3 eq 13]
    y    = sum_shared MLP(x) + routed_scale sum_{e in A} g_e MLP_e(x)   (the scale as released)       [DSV3 eq 12]

Left alone a router sends all tokens to the experts that happened to learn first. Two cures, which may be combined:

    b_e += bias_lr sign(mean count - count_e)                  after each optimizer step               [LossFree alg 1]
    L    = aux_alpha sum_e f_e P_e                             f: share of the visits times E, P: mean probability; 1 when
                                                               balanced                                [Switch eq 4]
The first makes an overloaded expert a little less likely to be chosen, and no gradient pulls the router away from what
predicts best. The second is such a gradient: it lowers the probability of experts in proportion to their load.

Contents:    config | router | visits | experts | dispatch | balance | MoE | bias and metrics | upcycling | demo
Shapes:      B rows, T tokens of a row, M tokens (B T flattened), D n_embd, F d_expert, E experts, A active experts,
             V visits (M A, less the dropped ones), G groups, N devices, L layers
References:
    [Switch]    Switch Transformers, arXiv:2101.03961
    [STMoE]     ST-MoE: Designing Stable and Transferable Sparse Expert Models, arXiv:2202.08906
    [Upcycle]   Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints, arXiv:2212.05055
    [DSMoE]     DeepSeekMoE, arXiv:2401.06066
    [DSV2]      DeepSeek-V2, arXiv:2405.04434
    [DSV3]      DeepSeek-V3 Technical Report, arXiv:2412.19437
    [LossFree]  Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts, arXiv:2408.15664
Run me:      python moe.py      (a skewed router, balanced by its bias; a dense MLP turned into experts)
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from dist import ALONE, World, all_max, all_sum, move, to_owners
from kernels import moe_mlp, no_autocast, takes_triton, to_autocast
from tokenizer import UsageError, run_cli


@dataclass
class MoEConfig:
    moe: bool = False              # replace the MLP of the blocks by a mixture of experts
    n_expert: int = 16             # routed experts of a block
    n_active: int = 3              # routed experts that a token visits
    n_shared_expert: int = 1       # experts that every token visits
    d_expert: int = 0              # hidden width of an expert; 0 shares d_ff among the active and shared ones
    n_dense_layer: int = 1         # first blocks that keep a dense MLP
    moe_every: int = 1             # of the others, block i has experts where this divides i + 1
    dense_layers: str = ""         # more blocks that stay dense, as in 0,5
    router: str = "sigmoid"        # scores of the router, a key of ROUTERS
    router_bias: bool = False      # a bias in the router's projection
    norm_gates: bool = True        # divide the gates of the chosen by their sum
    routed_scale: float = 1.0      # factor on the routed experts' sum
    n_group: int = 0               # groups of experts of which a token may visit few; 0 is no limit
    top_group: int = 0             # groups that a token may visit
    group_score: str = "top2"      # how a group is judged, a key of GROUP_SCORES
    bias_lr: float = 0.001         # step of the balancing bias, in units of the scores; 0 leaves the load as it falls
    bias_until: float = 0.966      # share of the run's steps after which the biases rest
    expert_act: str = "swiglu"     # activation of the experts, a key of EXPERT_ACTS
    expert_bias: bool = False      # biases in the routed experts
    aux_loss: str = "none"         # auxiliary balance loss, a key of AUX_LOSSES
    aux_alpha: float = 0.001       # its weight
    z_alpha: float = 0.0           # weight of the router z-loss, which keeps logits small
    n_device: int = 0              # devices that the next two losses balance, each with as many experts
    device_alpha: float = 0.0      # weight of the device-level balance loss
    comm_alpha: float = 0.0        # weight of the communication balance loss
    capacity: float = 0.0          # visits an expert takes of a batch, over the mean; those of later tokens are dropped; 0 drops none
    dispatch: str = "auto"         # how tokens meet experts, a key of DISPATCHES


# ---- Router (scores to a choice) ----

ROUTERS = {                        # flag --router
    "sigmoid": torch.sigmoid,                              # experts are judged one by one                [DSV3 eq 15]
    "softmax": lambda logits: logits.softmax(-1),          # experts compete for one unit of probability  [DSMoE eq 11]
    "chosen": lambda logits: logits,                       # gates: softmax over the chosen logits alone      (gpt-oss)
}

GROUP_SCORES = {                   # flag --group_score
    "top2": lambda score_MGX: score_MGX.topk(2, dim=-1).values.sum(-1),     # the two best, biased  (DeepSeek-V3's code)
    "max": lambda score_MGX: score_MGX.amax(-1),                            # the best             [DSV2 sec 2.2.2]
}


def scores(logits, cfg):
    """Scores above zero of all experts, as the balance losses and metrics want them."""
    return ROUTERS["softmax" if cfg.router == "chosen" else cfg.router](logits)


def shares(score):
    """The same, made probabilities."""
    return score / (score.sum(-1, keepdim=True) + 1e-20)


def route(logits_ME, bias_E, cfg):
    """(experts [M, A] int64, gates [M, A]). The bias enters the choice alone."""
    score_ME = ROUTERS[cfg.router](logits_ME)
    choice_ME = score_ME + bias_E                                                                        # [DSV3 eq 16]
    if cfg.n_group:
        choice_MGX = choice_ME.unflatten(-1, (cfg.n_group, -1))
        best = GROUP_SCORES[cfg.group_score](choice_MGX).topk(cfg.top_group, dim=-1, sorted=False).indices
        out_MG = torch.ones(choice_MGX.shape[:2], dtype=torch.bool, device=best.device).scatter(1, best, False)
        out_ME = out_MG.repeat_interleave(choice_MGX.shape[-1], dim=1)
        if cfg.group_score == "max":                         # DeepSeek-V2 takes all their score from the other groups
            score_ME = score_ME.masked_fill(out_ME, 0.0)
            choice_ME = score_ME + bias_E
        else:                                                # V3: a biased score may be negative, and 0 would beat it
            choice_ME = choice_ME.masked_fill(out_ME, -torch.inf)
    expert_MA = choice_ME.topk(cfg.n_active, dim=-1, sorted=not cfg.n_group).indices      # as released: gates sum in that order
    gate_MA = score_ME.gather(1, expert_MA)
    if cfg.router == "chosen":                               # equals softmax with norm_gates, where there is no bias
        gate_MA = gate_MA.softmax(-1)
    elif cfg.norm_gates:
        gate_MA = shares(gate_MA)                                                                        # [DSV3 eq 13]
    return expert_MA, gate_MA * cfg.routed_scale


# ---- Visits (who goes where, and who stays out) ----

def counts(expert_V, n_expert):
    """How often each expert occurs [E]; bincount would make a GPU wait."""
    return torch.zeros(n_expert, dtype=torch.int64, device=expert_V.device).scatter_add_(0, expert_V, torch.ones_like(expert_V))


def visits(expert_MA, n_expert, capacity=0):
    """(the visits [V] sorted by expert, as places in the flattened choice; how many each expert has [E]). With a capacity,
    what comes later in the batch than so many visits of its expert is dropped: then outputs depend on the batch."""
    by_expert, order = expert_MA.flatten().sort(stable=True)             # stable: an expert meets its tokens in their order
    count_E = counts(by_expert, n_expert)
    if capacity:
        first_E = count_E.cumsum(0) - count_E
        order = order[torch.arange(len(order), device=order.device) - first_E[by_expert] < capacity]
        count_E = count_E.clamp(max=capacity)
    return order, count_E


# ---- Experts (E small SwiGLU MLPs with stacked weights) ----

def swiglu_oss(gate, up):
    """gpt-oss: both sides bounded, the linear one around 1, and a sharper sigmoid."""
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


EXPERT_ACTS = {                    # flag --expert_act
    "swiglu": lambda gate, up: F.silu(gate) * up,          # as in a dense block
    "swiglu_oss": swiglu_oss,                              # gpt-oss
}


class Experts(nn.Module):
    ep = ALONE                             # the ranks that n_expert experts are dealt to; the weights are this one's

    def __init__(self, cfg, n_expert, d_expert, bias=False):
        super().__init__()
        self.cfg, self.n_expert, E, D = cfg, n_expert, n_expert, cfg.n_embd
        self.w_gate = nn.Parameter(torch.empty(E, d_expert, D))
        self.w_up = nn.Parameter(torch.empty(E, d_expert, D))
        self.w_down = nn.Parameter(torch.empty(E, D, d_expert))
        for name, width in (("b_gate", d_expert), ("b_up", d_expert), ("b_down", D)):
            self.register_parameter(name, nn.Parameter(torch.zeros(E, width)) if bias else None)

    def linears(self):
        return (self.w_gate, self.b_gate), (self.w_up, self.b_up), (self.w_down, self.b_down)

    def mlp(self, x, apply, gate, up, down):
        """Down(act(Gate x, Up x)) of three (weights, biases), which apply(x, weights, biases) multiplies rows by."""
        return apply(EXPERT_ACTS[self.cfg.expert_act](apply(x, *gate), apply(x, *up)), *down)

    def how(self, x):
        return dispatch_of(self.cfg, x.device, to_autocast(x).dtype).split()[0]

    def visit(self, x_VD, count_E):
        """Rows sorted by expert -> their experts' outputs. Where ranks own experts, each is sent its rows, and sends the outputs back.
        (forward goes around it where all experts are here and triton runs, which needs no sorted copy of the rows.)"""
        run = DISPATCHES[self.how(x_VD)]
        if self.ep.size == 1:
            return run(self, x_VD, count_E)
        came_VD, came_NE, back = to_owners(x_VD, count_E, self.ep)
        place = torch.arange(came_NE.shape[1], device=x_VD.device).repeat(self.ep.size).repeat_interleave(came_NE.flatten())
        order = place.argsort(stable=True)                       # from sorted by sender to sorted by expert
        y_VD = run(self, F.embedding(order, came_VD), came_NE.sum(0))
        return back(torch.zeros_like(y_VD).index_copy(0, order, y_VD))

    def forward(self, x_MD, expert_MA, gate_MA, capacity=0):
        """sum_a gate_a MLP_{expert_a}(x)."""
        (M, A), D = expert_MA.shape, x_MD.shape[1]
        visit_V, count_E = visits(expert_MA, self.n_expert, capacity)
        if self.ep.size == 1 and self.how(x_MD) == "triton":
            return moe_mlp(x_MD, visit_V, count_E, gate_MA, self.w_gate, self.w_up, self.w_down)
        out_VD = self.visit(F.embedding(visit_V // A, x_MD), count_E)      # x[visit_V // A], but its gradient adds up faster
        # back in the order of tokens each sums its own visits, whoever else is in the batch; what was dropped stays zero
        out_MAD = out_VD.new_zeros(M * A, D).index_copy(0, visit_V, out_VD).view(M, A, D)
        return (out_MAD * gate_MA[..., None]).sum(1)                       # gates are float32, and so is the sum


# ---- Dispatch (how do sorted rows meet their experts?) ----

def loop(experts, x_VD, count_E):
    """The readable one. Where gradients are wanted an expert without visits runs, too, on no rows, so that every weight has one
    on every rank."""
    x_VD, sizes, all_run = to_autocast(x_VD), count_E.tolist(), torch.is_grad_enabled() or not len(x_VD)
    # one cast of all, if all run; unbind: the gradient of w[e] would be as large as all of w, for every e
    split = lambda p: [None] * len(sizes) if p is None else (to_autocast(p) if all_run else p).unbind()
    each = zip(x_VD.split(sizes), *(zip(split(w), split(b)) for w, b in experts.linears()))
    return torch.cat([experts.mlp(x_CD, F.linear, *linears) for x_CD, *linears in each if all_run or len(x_CD)])


GROUPED_MM = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def grouped(experts, x_VD, count_E):
    """All experts in one product of jagged groups: no wait for the counts, no launch per expert."""
    end_E, empty_E11 = count_E.cumsum(0).to(torch.int32), (count_E == 0)[:, None, None]
    of_V = torch.repeat_interleave(count_E, output_size=len(x_VD)) if experts.b_gate is not None else None
    pad = lambda tensor, *by: F.pad(tensor, by) if any(by) else tensor

    def apply(x_VK, w_EJK, b_EJ):
        J, K = w_EJK.shape[1:]
        multiple = 16 // x_VK.element_size()                 # rows must begin on 16 bytes; zeros add nothing
        padded = pad(w_EJK.to(x_VK.dtype), 0, -K % multiple, 0, -J % multiple).transpose(1, 2)
        y = GROUPED_MM(pad(x_VK, 0, -K % multiple), padded, offs=end_E)
        if padded.requires_grad:                             # Blackwell leaves there what was in memory  (pytorch issue 172439)
            padded.register_hook(lambda grad: grad.masked_fill(empty_E11, 0.0))
        if y.requires_grad:
            y.register_hook(torch.Tensor.contiguous)         # an expanded gradient, as of a sum, is refused
        return y[:, :J] if b_EJ is None else y[:, :J] + b_EJ.to(y.dtype)[of_V]

    return experts.mlp(to_autocast(x_VD), apply, *experts.linears())


def fused(experts, x_VD, count_E):
    """Our kernels on rows that came sorted: a visit each, with gate 1."""
    x_VD = to_autocast(x_VD)
    place_V = torch.arange(len(x_VD), device=x_VD.device)
    return moe_mlp(x_VD, place_V, count_E, x_VD.new_ones(len(x_VD), 1), experts.w_gate, experts.w_up, experts.w_down)


DISPATCHES = {                     # flag --dispatch
    "auto": None,                  # on GPUs triton in half precision, else grouped where that runs; elsewhere loop
    "loop": loop,                  # one expert after the other: the reference
    "grouped": grouped,            # torch's grouped_mm
    "triton": fused,               # kernels.py:moe_mlp
}


def triton_lacks(cfg, device, dtype):
    """Why our kernels cannot run these experts; "" if they can."""
    if not takes_triton(device):
        return f"triton does not run on {device.type} here"
    if cfg.expert_act != "swiglu" or cfg.expert_bias:
        return "the triton kernels have SwiGLU and no biases"
    return "" if dtype.itemsize <= 4 else "the triton kernels do not take float64"


def dispatch_of(cfg, device, dtype=torch.bfloat16):
    """"loop (why)", "grouped (why)" or "triton (why)": how experts run on this device in this type."""
    device = torch.device(device)
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    gpu, lacks = f"a GPU of compute capability {major}.{minor}", triton_lacks(cfg, device, dtype)
    if cfg.dispatch == "loop":
        return "loop (--dispatch)"
    if cfg.dispatch == "triton" and not lacks:
        return "triton (--dispatch)"
    if cfg.dispatch == "auto" and major >= 8 and dtype.itemsize == 2 and not lacks:       # exact float32 gains nothing by hand
        return f"triton ({gpu})"
    also = f"; {lacks}" if lacks and (cfg.dispatch == "triton" or cfg.dispatch == "auto" and major >= 8) else ""
    if GROUPED_MM is None:
        return f"loop (this torch has no grouped_mm{also})"
    if dtype not in (torch.bfloat16, torch.float32):
        return f"loop (grouped_mm does not take {str(dtype)[6:]}{also})"
    if cfg.dispatch == "grouped":
        return "grouped (--dispatch)"
    if device.type != "cuda":
        return f"loop (on {device.type}: the reference{also})"
    return f"{'grouped' if major >= 8 else 'loop'} ({gpu}; grouped_mm wants 8.0{also})"


# ---- Balance (losses of a row: 1 when all experts are alike) ----

AUX_LOSSES = {                     # flag --aux_loss: sum_e f_e P_e, where P_e is the mean over the row of
    "none": None,
    "switch": lambda logits, score: logits.softmax(-1),                    # probabilities                  [Switch eq 6]
    "expert": lambda logits, score: score,                                 # scores as they are             [DSMoE eq 14]
    "sequence": lambda logits, score: shares(score),                       # scores, made probabilities  [DSV3 eq 19-20]
}


def balance_losses(logits_BTE, expert_BTA, cfg, cp=ALONE):
    """{name of its weight: loss [B]} of the losses that cfg turns on.

    f_e counts all n_active choices and divides by n_active, so a balanced row has 1, not n_active; "sequence" takes them as the
    scores alone would choose, without bias and groups. With a softmax router and neither of these the three of AUX_LOSSES
    agree. Sigmoid scores do not sum to one: there "expert" is their mean sum when balanced. Means are over whole rows, also where cp
    shares them."""
    (B, T, E), A, N = logits_BTE.shape, expert_BTA.shape[-1], cfg.n_device
    score_BTE, mean = scores(logits_BTE, cfg), lambda x: move(x.mean(1), cp, "sum", "sum") / cp.size
    shares_of = lambda chosen_BTA: torch.zeros_like(score_BTE[:, 0]).scatter_add_(
        1, chosen_BTA.flatten(1), score_BTE.new_full((B, T * A), E / (A * T)))
    share_of = lambda chosen_BTA: all_sum(cp, shares_of(chosen_BTA)) / cp.size
    losses, asked = {}, AUX_LOSSES[cfg.aux_loss] or cfg.device_alpha
    f_BE = share_of(expert_BTA) if asked else None                                        # [DSMoE eq 13, DSV2 eq 24]
    if AUX_LOSSES[cfg.aux_loss]:
        P_BE = mean(AUX_LOSSES[cfg.aux_loss](logits_BTE, score_BTE))
        own_BE = share_of(score_BTE.topk(A, dim=-1).indices) if cfg.aux_loss == "sequence" else f_BE         # [DSV3 eq 18]
        losses["aux_alpha"] = (own_BE * P_BE).sum(-1)                      # [Switch eq 4, DSMoE eq 12, DSV3 eq 17]
    if cfg.z_alpha:
        losses["z_alpha"] = mean(logits_BTE.logsumexp(-1).square())      # [STMoE eq 5] (ln E)^2 when all logits are 0
    if cfg.device_alpha or cfg.comm_alpha:                                 # device n holds experts n E/N ... (n + 1) E/N - 1
        P_BN = mean(shares(score_BTE)).unflatten(1, (N, -1)).sum(-1)                              # [DSV2 eq 28, 31]
    if cfg.device_alpha:
        f_BN = f_BE.unflatten(1, (N, -1)).mean(-1)                                                      # [DSV2 eq 27]
        losses["device_alpha"] = (f_BN * P_BN).sum(-1)                                                  # [DSV2 eq 26]
    if cfg.comm_alpha:                                       # a token's M devices get it once each, however many experts
        sent_BTN = logits_BTE.new_zeros(B, T, N).scatter_(2, expert_BTA // (E // N), 1.0)
        most = cfg.top_group if cfg.n_group else min(A, N)
        losses["comm_alpha"] = (mean(sent_BTN) * (N / most) * P_BN).sum(-1)                           # [DSV2 eq 29-30]
    return losses


# ---- MoE (router, routed experts, shared expert) ----

CHOICES = dict(router=ROUTERS, group_score=GROUP_SCORES, expert_act=EXPERT_ACTS, aux_loss=AUX_LOSSES, dispatch=DISPATCHES)


def validate_moe(cfg):
    """Refuse a choice that no token could make."""
    def refuse(name, rule):
        raise UsageError(f"--{name}={getattr(cfg, name)} {rule}")

    for name, table in CHOICES.items():
        if getattr(cfg, name) not in table:
            refuse(name, f"is not known; use one of {list(table)}")
    if cfg.n_expert < 1:
        refuse("n_expert", f"must be at least 1, for example {MoEConfig.n_expert}")
    if not 1 <= cfg.n_active <= cfg.n_expert:
        refuse("n_active", f"of --n_expert={cfg.n_expert}: a token visits between 1 and {cfg.n_expert} experts; "
               f"use --n_active={max(1, min(2, cfg.n_expert))}")
    for name in ("n_shared_expert", "d_expert", "n_group", "top_group", "n_device", "capacity", "bias_lr", "bias_until", "aux_alpha",
                 "z_alpha", "device_alpha", "comm_alpha"):
        if not 0 <= getattr(cfg, name) < math.inf:
            refuse(name, f"must be at least 0, for example {getattr(MoEConfig, name)}")
    for name in ("n_group", "n_device"):
        if getattr(cfg, name) and cfg.n_expert % getattr(cfg, name):
            fits = [n for n in range(1, min(cfg.n_expert, 1024) + 1) if cfg.n_expert % n == 0]
            refuse(name, f"does not divide --n_expert={cfg.n_expert}; use one of {fits}")
    if cfg.n_group:
        size = cfg.n_expert // cfg.n_group
        if not -(-cfg.n_active // size) <= cfg.top_group <= cfg.n_group:
            refuse("top_group", f"of --n_group={cfg.n_group} groups of {size}, for --n_active={cfg.n_active} experts; "
                   f"use {-(-cfg.n_active // size)} to {cfg.n_group}")
        if cfg.group_score == "top2" and size < 2:
            refuse("n_group", "leaves one expert in a group, and top2 adds two; use --n_group=0, fewer groups, or --group_score=max with "
                   "--bias_lr=0")
        if cfg.group_score == "max" and (cfg.bias_lr or cfg.router == "chosen"):
            refuse("group_score", "gives experts of other groups the score 0, against which a negative one would lose; use "
                   "--bias_lr=0 and --router=softmax, or --group_score=top2")
    if (cfg.device_alpha or cfg.comm_alpha) and not cfg.n_device:
        refuse("n_device", "leaves --device_alpha and --comm_alpha nothing to balance; use, for example, --n_device=2")
    if cfg.comm_alpha and cfg.n_group and cfg.n_group != cfg.n_device:
        refuse("n_device", f"but a token is sent to {cfg.top_group} of --n_group={cfg.n_group} groups; with --comm_alpha use "
               f"--n_device={cfg.n_group}")


def moe_layers(cfg):
    """Indices of the blocks that have experts."""
    dense = [item.strip() for item in cfg.dense_layers.split(",") if item.strip()]
    for item in dense:
        if not item.isdecimal() or len(item) > 9 or int(item) >= cfg.n_layer:
            raise UsageError(f"--dense_layers={cfg.dense_layers}: {item!r} is no block of --n_layer={cfg.n_layer}; "
                             f"use 0 to {cfg.n_layer - 1}, as in 0,5")
    if cfg.moe_every < 1:
        raise UsageError(f"--moe_every={cfg.moe_every} must be at least 1, for example 1 (every block)")
    rest = set(range(cfg.n_dense_layer, cfg.n_layer)) - {int(item) for item in dense}
    return [i for i in sorted(rest) if cfg.moe and (i + 1) % cfg.moe_every == 0]


def expert_width(cfg, d_ff):
    return cfg.d_expert or max(8, d_ff // (cfg.n_active + cfg.n_shared_expert) // 8 * 8)


def recomputing():
    """Does a backward pass run this forward pass again, for activations that a checkpoint did not keep?"""
    return torch._C._current_graph_task_id() != -1


class MoE(nn.Module):
    """Drop-in for the dense MLP of a block.                                                    [DSMoE eq 9, DSV3 eq 12]"""
    tp = cp = ALONE                        # ranks that share the hidden channels of all experts, and the rows

    def __init__(self, cfg, d_ff):
        super().__init__()
        validate_moe(cfg)
        width = expert_width(cfg, d_ff)
        self.cfg, self.aux_B, self.aux_has_graph = cfg, None, False      # aux_B: in training its weighted auxiliary losses, if any
        self.router = nn.Linear(cfg.n_embd, cfg.n_expert, bias=cfg.router_bias)
        self.experts = Experts(cfg, cfg.n_expert, width, cfg.expert_bias)
        self.shared = Experts(cfg, 1, width * cfg.n_shared_expert) if cfg.n_shared_expert else None
        self.register_buffer("bias_E", torch.zeros(cfg.n_expert))
        self.start_counting(None)

    def start_counting(self, device):
        """Nothing seen since the last update: visits of each expert; the summed entropy of scores, and dropped visits."""
        self.register_buffer("count_E", torch.zeros(self.cfg.n_expert, dtype=torch.int64, device=device), persistent=False)
        self.register_buffer("seen", torch.zeros(2, device=device), persistent=False)

    def _apply(self, fn, recurse=True):
        kept = {name: getattr(self, name) for name in ("bias_E", "count_E", "seen")}
        super()._apply(fn, recurse)
        for name, before in kept.items():                    # model.bfloat16() must not round what adds up in small steps
            if (now := getattr(self, name)).dtype != before.dtype:
                setattr(self, name, before.to(now.device))
        return self

    def __getstate__(self):
        return self.__dict__ | dict(aux_B=None)              # copies and pickles leave the graph behind

    def forward(self, x_BTD):
        x_MD = x_BTD.flatten(0, 1)
        with no_autocast(x_MD):                              # float32: near ties would flip in half precision
            w, b = self.router.weight.float(), self.router.bias
            logits_ME = F.linear(x_MD.float(), w, None if b is None else b.float())
            expert_MA, gate_MA = route(logits_ME, self.bias_E, self.cfg)
        most = min(self.cfg.capacity, self.cfg.n_expert)     # more than all visits drops nothing
        capacity = math.ceil(most * expert_MA.numel() / self.cfg.n_expert)                               # [Switch eq 3]
        y_MD = self.experts(x_MD, expert_MA, gate_MA, capacity)
        if self.shared is not None:
            y_MD = y_MD + self.shared.mlp(x_MD, lambda x, w, b: F.linear(x, w[0]), *self.shared.linears())
        self.observe(logits_ME.unflatten(0, x_BTD.shape[:2]), expert_MA.unflatten(0, x_BTD.shape[:2]), capacity)
        return y_MD.to(x_BTD.dtype).view_as(x_BTD)

    @torch.compiler.disable
    def observe(self, logits_BTE, expert_BTA, capacity):
        """In training mode, also without gradients: auxiliary losses, and what update_biases will ask for."""
        losses = balance_losses(logits_BTE, expert_BTA, self.cfg, self.cp) if self.training else {}
        aux_B = sum(getattr(self.cfg, name) * loss_B for name, loss_B in losses.items()) if losses else None
        if recomputing():                                    # seen before; its graph was wanted, though
            if losses and not self.aux_has_graph:
                raise UsageError("torch.utils.checkpoint(use_reentrant=True) loses the gradients of the experts' auxiliary losses; use "
                                 "use_reentrant=False, or --aux_loss=none")
            return
        self.aux_B, self.aux_has_graph = aux_B, aux_B is not None and aux_B.requires_grad
        if self.training:
            with torch.no_grad():
                count_E = counts(expert_BTA.flatten(), self.cfg.n_expert)
                self.count_E += count_E
                self.seen[0] += torch.special.entr(shares(scores(logits_BTE, self.cfg))).sum()
                self.seen[1] += (count_E - capacity).clamp(min=0).sum() if capacity else 0


# ---- Bias and metrics (once per optimizer step) ----

def aux_sum(model, weight_B):
    """Sum over rows and layers of a row's weight times its auxiliary losses: what Model.loss adds in training, so that
    micro-batches and ranks add up. It lets go of them, and with them of their graph. Ranks of cp each know the loss of the whole row, so
    each has its share of it; those of tp add up the gradients of the router, so each sends back its share."""
    total = 0.0
    for layer in (m for m in model.modules() if isinstance(m, MoE) and m.aux_B is not None):
        aux, layer.aux_B = (weight_B * layer.aux_B).sum() / layer.cp.size, None
        total = total + (aux if layer.tp.size == 1 else aux / layer.tp.size + (aux - aux / layer.tp.size).detach())
    return total


@torch.no_grad()
def update_biases(model, world=World(), moving=True):
    """Move every router's bias (if they are) against its load of this step, summed over micro-batches and the ranks that share the
    batch, and count anew. `model` may be a list: the parts of one that this pipeline stage holds.        [LossFree alg 1]
    Returns {} without experts, else (one copy from the device)
        max_vio         the worst layer's largest load over the mean, less one: 0 is perfect balance  [LossFree eq 4]
        min_load        the worst layer's smallest load over the mean: 0 is an expert that nobody visits
        router_entropy  of the scores, mean over tokens, as a share of ln E: 1 is undecided, 0 is sure
        dropped         share of the visits that capacity cut off
        bias_range      the widest layer's largest bias less its smallest"""
    layers = [m for part in (model if isinstance(model, list) else [model]) for m in part.modules() if isinstance(m, MoE)]
    tops = torch.full((3,), -torch.inf, dtype=torch.float64, device=world.device)        # of these the largest counts: max_vio, -min_load,
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)                      # bias_range; of these the sum: entropy, dropped, all
    if layers:
        cfg, seen = layers[0].cfg, all_sum(world.batch, torch.stack([torch.cat([m.count_E.double(), m.seen.double()]) for m in layers]))
        count_LE, total = seen[:, :-2], seen[:, :-2].sum()
        mean_L1 = count_LE.mean(1, keepdim=True)
        asleep_L1 = (mean_L1 == 0) & (total > 1)             # blocks that this step did not run have no load to speak of
        for layer, step_E in zip(layers, torch.sign(mean_L1 - count_LE).float()):
            layer.bias_E += moving * layer.cfg.bias_lr * step_E
            layer.count_E.zero_()
            layer.seen.zero_()
        load_LE = (count_LE / mean_L1).masked_fill(asleep_L1, 1.0).nan_to_num(0.0)
        bias_LE = torch.stack([m.bias_E for m in layers]).double()
        tops = torch.stack([load_LE.max() - 1, -load_LE.min(), (bias_LE.amax(1) - bias_LE.amin(1)).max()])
        entropy, dropped = seen[:, -2:].sum(0)
        sums = torch.stack([entropy * cfg.n_active / math.log(max(2, cfg.n_expert)), dropped, total])
    top = torch.cat([all_max(world.pp, tops), all_sum(world.pp, sums)]).tolist()
    if top[0] == -torch.inf:
        return {}
    visits = max(1, top[5])
    return dict(max_vio=top[0], min_load=-top[1], router_entropy=top[3] / visits, dropped=top[4] / visits, bias_range=top[2])


# ---- Upcycling (a dense MLP becomes experts that begin as it was) ----

def upcycle(dense, cfg):
    """{name in MoE: tensor} from {"w_gate.weight" [F, D], "w_up.weight", "w_down.weight" [D, F]} of a SwiGLU MLP, such that the
    experts compute what it did, whatever the router says; the router keeps its own weights.      [Upcycle sec 3, app B.7]

    Copies whose gates sum to one are one of them, whichever n_active were chosen. Ours is the cut for shared experts: an MLP is
    a sum over hidden channels, of which they take the first n_shared_expert d_expert, and the copies are of the rest. Channels
    beyond F read what others read and write nothing yet."""
    names = ["w_down.weight", "w_gate.weight", "w_up.weight"]
    if sorted(dense) != names:
        raise UsageError(f"upcycling takes the tensors {names} of a SwiGLU MLP, not {sorted(dense)}; use --act=swiglu without "
                         "--mlp_bias")
    if cfg.expert_act != "swiglu" or cfg.capacity or not cfg.routed_scale or not (cfg.norm_gates or cfg.router == "chosen"):
        raise UsageError("copies of a dense MLP add up to it where their gates sum to one and no visit is dropped: use "
                         "--norm_gates=true, --expert_act=swiglu, --capacity=0 and --routed_scale=1")
    down, gate, up = (dense[name] for name in names)
    width, each = len(gate), expert_width(cfg, len(gate))
    first = cfg.n_shared_expert * each
    if first + each < width:
        raise UsageError(f"--d_expert={each}: a routed and {cfg.n_shared_expert} shared experts hold the {width} "
                         f"channels of the dense MLP; use --d_expert={-(-width // (1 + cfg.n_shared_expert))} or more")
    channel = torch.arange(first + each, device=gate.device)
    gate, up, down = gate[channel % width], up[channel % width], down[:, channel % width] * (channel < width)
    routed = dict(w_gate=gate[first:], w_up=up[first:], w_down=down[:, first:] / cfg.routed_scale)
    if cfg.expert_bias:
        routed |= dict(b_gate=gate.new_zeros(each), b_up=gate.new_zeros(each), b_down=gate.new_zeros(len(down)))
    moe = {f"experts.{name}": torch.stack([tensor] * cfg.n_expert) for name, tensor in routed.items()}
    shared = dict(w_gate=gate[:first], w_up=up[:first], w_down=down[:, :first]) if first else {}
    return moe | {f"shared.{name}": tensor[None].clone() for name, tensor in shared.items()}


# ---- Demo ----

def demo(argv):
    if argv:
        raise UsageError(f"moe.py takes no arguments, not {' '.join(argv)}")
    torch.manual_seed(0)
    cfg = MoEConfig(n_expert=8, n_active=2, bias_lr=0.005, aux_loss="switch", aux_alpha=1.0, d_expert=48)
    cfg.n_embd = 32
    layer = MoE(cfg, d_ff=96)
    for name, p in layer.named_parameters():
        nn.init.normal_(p, std=0.2)
    skew_D = torch.randn(32)                                     # tokens share a direction, so some experts look best to all
    print(f"{cfg.n_expert} experts, {cfg.n_active} active and {cfg.n_shared_expert} shared a token, "
          f"{sum(p.numel() for p in layer.parameters()):,} parameters; dispatch: {dispatch_of(cfg, 'cpu')}\n")
    with torch.no_grad():
        for step in range(201):
            x_BTD = torch.randn(4, 128, 32) + skew_D
            layer(x_BTD)
            load_E, aux = layer.count_E / layer.count_E.sum(), layer.aux_B.mean()
            seen = update_biases(layer)
            if step % 50 == 0:
                print(f"step {step:3d}  load " + " ".join(f"{share:6.1%}" for share in load_E.tolist())
                      + f"   max_vio {seen['max_vio']:.2f}  loss {aux:.2f}")
    print("\nbias " + " ".join(f"{b:+.2f}" for b in layer.bias_E.tolist()) + "   (what balanced them; the gates never saw it)")
    gate, up, down = torch.randn(96, 32) / 6, torch.randn(96, 32) / 6, torch.randn(32, 96) / 10
    layer.load_state_dict(upcycle({"w_gate.weight": gate, "w_up.weight": up, "w_down.weight": down}, cfg), strict=False)
    apart = (layer(x_BTD) - F.linear(F.silu(x_BTD @ gate.T) * (x_BTD @ up.T), down)).abs().max()
    print(f"a dense MLP of 96 channels, upcycled: half of it shared, half of it eight times; largest difference {apart:.1e}")


if __name__ == "__main__":
    run_cli(demo)
