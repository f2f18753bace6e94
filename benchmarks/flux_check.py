"""Is it right at this size? What layers give under adapters, held against float32, before anything is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compose.adapter import Adapter
from compose.kernels.lora_gate import naive as gate_naive
from compose.sites import Sites

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 4e-2, torch.float16: 2e-2}  # of the adapters' part
GROUPS = (  # layers that read one tensor, of the first block of each kind, by the number of tokens they see
    ("image", "transformer_blocks.0", ("attn.to_q", "attn.to_k", "attn.to_v")),
    ("text", "transformer_blocks.0", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    ("image", "transformer_blocks.0", ("attn.to_out.0",)),
    ("image", "transformer_blocks.0", ("ff.net.0.proj",)),
    ("image", "transformer_blocks.0", ("ff.net.2",)),
    ("text", "transformer_blocks.0", ("ff_context.net.2",)),
    ("both", "single_transformer_blocks.0", ("proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v")),
    ("both", "single_transformer_blocks.0", ("proj_out",)),
    ("image", "", ("proj_out",)),
)


class Wrong(AssertionError):
    """A layer or a kernel gives another answer than plain arithmetic."""


def check_layers(
    sites: Sites, given: Sequence[Adapter], weights: Sequence[Mapping[str, float]], tokens: Mapping[str, int],
    gate: Callable[[str], Tensor] | None = None,
) -> float:  # fmt: skip
    """Call the layers of `GROUPS` with random tensors; the largest error, as a share of what the adapters add.

    `weights`: of all rows, or one mapping a row. `tokens`: how many of each kind a row has. `gate` gives the nine
    vectors of a site's gate. Raises Wrong.
    """
    worst = 0.0
    for kind, block, leaves in GROUPS:
        names = [".".join(filter(None, ("transformer", block, leaf))) for leaf in leaves]
        weight = sites[names[0]].module.weight
        x = torch.randn(len(weights), tokens[kind], weight.shape[1], device=weight.device, dtype=weight.dtype)
        for name in names:
            base, wanted = _exact(sites[name].module, name, x, given, weights, gate)
            with torch.no_grad():
                got = sites[name].module(x).float()
            worst = max(worst, check(name, got - base, wanted - base, TOLERANCE[x.dtype]))
    return worst


def check(name: str, got: Tensor, wanted: Tensor, tolerance: float) -> float:
    """The distance, as a share of what was wanted. Raises Wrong where it is above `tolerance`, or no number."""
    error = ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()
    if not error <= tolerance:
        raise Wrong(f"{name} is wrong: {error:.2e} of {tolerance:.0e}, shape {tuple(got.shape)}")
    return error


def check_weights(
    sites: Sites, given: Sequence[Adapter], weights: Mapping[str, float], kept: Mapping[str, Tensor]
) -> float:
    """Weights folded in place are what they were (`kept`) and the adapters' products; the largest error."""
    worst = 0.0
    for name, before in kept.items():
        wanted = sum(weights[a.name] * a.deltas[name].up.float() @ a.deltas[name].down.float() for a in given)
        change = sites[name].module.weight.float() - before.float()
        half = before.dtype != torch.float32
        worst = max(worst, check(name, change, wanted, 0.1 if half else 1e-3))  # the weight itself is rounded
    return worst


def some(sites: Sites) -> Iterable[str]:
    """One site of each width."""
    return {site.shape: name for name, site in sites.items()}.values()


def _exact(
    layer: nn.Module, name: str, x: Tensor, given: Sequence[Adapter], weights: Sequence[Mapping[str, float]],
    gate: Callable[[str], Tensor] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(the layer alone, the layer under its adapters), in float32; a row at a time, since wide ones take gigabytes."""
    bias = None if layer.bias is None else layer.bias.float()
    base = F.linear(x.float(), layer.weight.float(), bias)
    total = base.clone()
    for row, own in enumerate(weights):
        hidden = [
            own.get(a.name, 0.0) * (x[row].float() @ a.deltas[name].down.float().T)
            for a in given
            if name in a.deltas
        ]
        ups = [a.deltas[name].up.float() for a in given if name in a.deltas]
        if gate is None:
            total[row] += torch.cat(hidden, -1) @ torch.cat(ups, -1).T
        else:
            edges = [0, *accumulate(up.shape[1] for up in ups)]
            stacked = torch.cat(hidden, -1), torch.cat(ups, -1)
            total[row] = gate_naive.lora_gate(base[row], *stacked, edges, gate(name))
    return base, total
