"""Compiles every kernel for compute capability 9.0, which takes no GPU, and prints what became of each as JSON."""

from __future__ import annotations

import json
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compose.kernels.fold import triton as fold
from compose.kernels.lora_gate import triton as gate
from compose.kernels.lora_grow import TILES as LIFTS
from compose.kernels.lora_grow import triton as grow
from compose.kernels.lora_mix import EXPANDS, LINEARS, SHRINKS
from compose.kernels.lora_mix import triton as mix
from compose.kernels.lora_pack import TILES as PACKS
from compose.kernels.lora_pack import triton as pack
from compose.kernels.lora_rows import triton as rows
from compose.kernels.sparse_add import triton as sparse
from compose.kernels.sparse_switch import triton as switch

HOPPER = GPUTarget("cuda", 90, 32)
ARITHMETIC = {"UPCAST": False, "PRECISION": "ieee"}
FLOATS = ("scale", "parts", "mean_up", "gram", "stats", "gate", "gains")
DENSE = (
    "K",
    "W",
    "R",
    "N",
    "stride_x",
    "stride_down",
    "stride_y",
    "stride_hidden",
    "stride_up",
    "stride_gram",
    "stride_wide",
    "part",
    "first",
    "pitch",
)


def compiled(kernel, constants: dict, warps: int, stages: int, **types: str) -> dict:
    """What the compiler made of `kernel` for bfloat16 tensors with aligned rows."""
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        signature[name] = types.get(name) or _type(name, constants)
        if name in DENSE or signature[name].startswith("*"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=HOPPER, options={"num_warps": warps, "num_stages": stages})
    text = made.asm["ptx"]
    patterns = {
        "wgmma": r"wgmma\.mma_async", "mma": r"mma\.sync", "wide_loads": r"ld\.global[^;]*v4\.b32|cp\.async\.cg",
        "bulk_loads": r"cp\.async\.bulk\.tensor", "wide_stores": r"st\.global[^;]*v4", "spilled": r"\.local",
    }  # fmt: skip
    return {"shared": made.metadata.shared} | {k: len(re.findall(p, text)) for k, p in patterns.items()}


def _type(name: str, constants: dict) -> str:
    if name in constants:
        return "constexpr"
    if name in FLOATS:
        return "*fp32"
    if name in ("edges", "index", "site_of_tile", "site_of_block", "places"):
        return "*i32"
    if name in ("x", "down", "out", "y", "hidden", "up", "bias", "wide", "weight", "value", "kept", "anchor"):
        return "*bf16"
    return {"sites": "*i64", "eps": "fp32"}.get(name, "i32")


def every() -> dict[str, dict]:
    found = {}
    for n, tile in enumerate(tile for tile in SHRINKS if tile.kind != "torch"):
        blocks = {"BLOCK_T": tile.tokens, "BLOCK_R": 128, "BLOCK_K": tile.depth, "STEPS": 24}
        constants = {"SPLITS": tile.splits, "EVEN_K": True, **blocks, **ARITHMETIC}
        out = "*bf16" if tile.splits == 1 else "*fp32"
        found[f"shrink {n}"] = compiled(mix.shrink_kernel, constants, tile.warps, tile.stages, out=out)
    for n, tile in enumerate(tile for tile in EXPANDS if tile.kind != "torch"):
        constants = {
            "STEPS_R": 2,
            "BLOCK_T": tile.tokens,
            "BLOCK_N": tile.columns,
            "BLOCK_R": 64,
            **ARITHMETIC,
        }
        found[f"expand {n}"] = compiled(mix.expand_kernel, constants, tile.warps, tile.stages)
    for n, tile in enumerate(tile for tile in LINEARS if tile.kind == "triton"):
        blocks = {"BLOCK_T": tile.tokens, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth, "BLOCK_R": 64}
        constants = {"HAS_BIAS": True, "STEPS_K": 48, "STEPS_R": 2, "GROUP": 8, **blocks, **ARITHMETIC}
        found[f"linear {n}"] = compiled(
            mix.linear_kernel, constants, tile.warps, tile.stages,
            x_desc=f"tensordesc<bf16[{tile.tokens},{tile.depth}]>",
            weight_desc=f"tensordesc<bf16[{tile.columns},{tile.depth}]>",
        )  # fmt: skip
    for n, tile in enumerate(tile for tile in LIFTS if tile.kind != "torch"):
        blocks = {"BLOCK_T": tile.tokens, "BLOCK_N": tile.columns, "BLOCK_R": 64}
        constants = {"HAS_BIAS": True, "STEPS_R": 2, **blocks, **ARITHMETIC}
        found[f"lift {n}"] = compiled(grow.lift_kernel, constants, tile.warps, tile.stages)
    row = {"COPIES": 2}
    blocks = {"BLOCK_T": 16, "BLOCK_K": 512, "BLOCK_R": 128}
    found["pack"] = compiled(pack.pack_kernel, {**row, **blocks}, 4, 3)
    for n, tile in enumerate(tile for tile in PACKS if tile.kind != "torch"):
        blocks = {"BLOCK_T": tile.tokens, "BLOCK_R": 128, "BLOCK_K": tile.depth, "STEPS": 24}
        constants = {"EVEN_K": True, **row, **blocks, **ARITHMETIC}
        found[f"pack shrink {n}"] = compiled(pack.pack_shrink_kernel, constants, tile.warps, tile.stages)
    found["sum"] = compiled(mix.sum_splits_kernel, {"SPLITS": 4, "BLOCK_T": 32, "BLOCK_R": 128}, 4, 3)
    constants = {"STEPS_R": 8, "BLOCK_T": 64, "BLOCK_N": 128, "BLOCK_R": 32, **ARITHMETIC}
    found["rows"] = compiled(rows.expand_rows_kernel, constants, 4, 2)
    constants = {"COUNT": 3, "STEPS_N": 6, "BLOCK_T": 16, "BLOCK_N": 512, "BLOCK_R": 16}
    found["stats"] = compiled(gate.stats_kernel, constants, 4, 3)
    constants = {"COUNT": 3, "BLOCK_T": 32, "BLOCK_N": 64, "BLOCK_R": 16, **ARITHMETIC}
    found["gate"] = compiled(gate.gate_kernel, constants, 4, 2)
    found["sparse add"] = compiled(sparse.add_kernel, {"BLOCK": 1024}, 8, 3)
    constants = {"ADD": True, "FIELDS": switch.FIELDS, "BLOCK": switch.BLOCK}
    found["sparse switch"] = compiled(switch.scatter_kernel, constants, 8, 3)
    found["sparse restore"] = compiled(sparse.restore_kernel, {"BLOCK": 1024}, 8, 3)
    constants = {
        "BLOCK_N": fold.BLOCK_N,
        "BLOCK_K": fold.BLOCK_K,
        "BLOCK_R": 64,
        "STEPS_R": 1,
        "PRECISION": "tf32",
    }
    found["fold"] = compiled(fold.fold_kernel, {"FIELDS": fold.FIELDS, "ALIGN": 8, **constants}, 8, 2)
    return found


if __name__ == "__main__":
    print(json.dumps(every()))
