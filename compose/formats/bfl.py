"""Names of the original (not diffusers) transformers, FLUX, FLUX.2, SD3 and Z-Image, and the diffusers sites they mean.

One module of the original may be several sites (a fused qkv); then each site owns a share of its output rows.
`#` stands for the block number. Numbers and row orders were checked against diffusers' single-file converters.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from compose.errors import AdapterError


class Split(enum.Enum):
    """Which output rows of a fused module a site owns, given the module's (rows, columns)."""

    WHOLE = "whole"
    THIRD = "third"  # fused q, k, v
    LINEAR1 = "linear1"  # q, k, v of `columns` rows each, then the feed-forward's rows
    MODULATION = "modulation"  # shift then scale becomes scale then shift where there are just these two


@dataclass(frozen=True, slots=True)
class Target:
    """A site, how its rows are split off, and its place in that split."""

    site: str
    split: Split
    order: int

    def rows(self, rows: int, columns: int | None) -> tuple[tuple[int, int], ...] | None:
        """Row ranges of a (rows, columns) module that make up this site, in order; None means all as they are.

        `columns` is None where only a bias is known. Raises AdapterError where the rows cannot be split so.
        """
        if self.split is Split.WHOLE:
            return None
        if columns is None:
            columns = self._columns(rows)
        if self.split is Split.MODULATION:
            return ((rows // 2, rows), (0, rows // 2)) if rows == 2 * columns else None
        if (self.split is Split.THIRD and rows % 3) or (self.split is Split.LINEAR1 and rows <= 3 * columns):
            raise AdapterError(f"{rows} x {columns} does not split into its projections")
        step = rows // 3 if self.split is Split.THIRD else columns
        last = self.split is Split.LINEAR1 and self.order == 3
        return ((self.order * step, rows if last else (self.order + 1) * step),)

    def _columns(self, rows: int) -> int:
        """Width told by the length of a bias: FLUX.1's linear1 has 7 times as many rows, a final modulation twice."""
        if self.split is Split.MODULATION and not self.site.endswith("norm_out.linear"):
            raise AdapterError("a bias alone does not tell how its rows are ordered")
        return rows // (7 if self.split is Split.LINEAR1 else 2)


Table = dict[str, tuple[Target, ...]]


def _table(whole: dict[str, str], fused: dict[str, tuple[str, ...]], split: dict[str, Split]) -> Table:
    table = {name: (Target(site, split.get(name, Split.WHOLE), 0),) for name, site in whole.items()}
    for name, sites in fused.items():
        table[name] = tuple(
            Target(site, split.get(name, Split.THIRD), order) for order, site in enumerate(sites)
        )
    return table


def _qkv(prefix: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}" for name in ("to_q", "to_k", "to_v"))


def _added(prefix: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj"))


_DOUBLE, _SINGLE = "transformer_blocks.#", "single_transformer_blocks.#"
_FLUX_SHARED = {
    "double_blocks.#.img_attn.proj": f"{_DOUBLE}.attn.to_out.0",
    "double_blocks.#.txt_attn.proj": f"{_DOUBLE}.attn.to_add_out",
    "double_blocks.#.img_attn.norm.query_norm": f"{_DOUBLE}.attn.norm_q",
    "double_blocks.#.img_attn.norm.key_norm": f"{_DOUBLE}.attn.norm_k",
    "double_blocks.#.txt_attn.norm.query_norm": f"{_DOUBLE}.attn.norm_added_q",
    "double_blocks.#.txt_attn.norm.key_norm": f"{_DOUBLE}.attn.norm_added_k",
    "single_blocks.#.norm.query_norm": f"{_SINGLE}.attn.norm_q",
    "single_blocks.#.norm.key_norm": f"{_SINGLE}.attn.norm_k",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_FLUX_FUSED = {
    "double_blocks.#.img_attn.qkv": _qkv(f"{_DOUBLE}.attn"),
    "double_blocks.#.txt_attn.qkv": _added(f"{_DOUBLE}.attn"),
}
_FINAL = {"final_layer.adaLN_modulation.1": Split.MODULATION}

_FLUX = _table(
    _FLUX_SHARED
    | {
        "double_blocks.#.img_mlp.0": f"{_DOUBLE}.ff.net.0.proj",
        "double_blocks.#.img_mlp.2": f"{_DOUBLE}.ff.net.2",
        "double_blocks.#.txt_mlp.0": f"{_DOUBLE}.ff_context.net.0.proj",
        "double_blocks.#.txt_mlp.2": f"{_DOUBLE}.ff_context.net.2",
        "double_blocks.#.img_mod.lin": f"{_DOUBLE}.norm1.linear",
        "double_blocks.#.txt_mod.lin": f"{_DOUBLE}.norm1_context.linear",
        "single_blocks.#.linear2": f"{_SINGLE}.proj_out",
        "single_blocks.#.modulation.lin": f"{_SINGLE}.norm.linear",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    },
    _FLUX_FUSED | {"single_blocks.#.linear1": (*_qkv(f"{_SINGLE}.attn"), f"{_SINGLE}.proj_mlp")},
    _FINAL | {"single_blocks.#.linear1": Split.LINEAR1},
)
# XLabs adapts attention processors: lora1 is the picture's stream, lora2 the text's.
_XLABS = _table(
    {
        "double_blocks.#.processor.proj_lora1": f"{_DOUBLE}.attn.to_out.0",
        "double_blocks.#.processor.proj_lora2": f"{_DOUBLE}.attn.to_add_out",
        "single_blocks.#.processor.proj": f"{_SINGLE}.proj_out",
    },
    {
        "double_blocks.#.processor.qkv_lora1": _qkv(f"{_DOUBLE}.attn"),
        "double_blocks.#.processor.qkv_lora2": _added(f"{_DOUBLE}.attn"),
        "single_blocks.#.processor.qkv": _qkv(f"{_SINGLE}.attn"),
    },
    {},
)
_FLUX2 = _table(
    _FLUX_SHARED
    | {
        "double_blocks.#.img_mlp.0": f"{_DOUBLE}.ff.linear_in",
        "double_blocks.#.img_mlp.2": f"{_DOUBLE}.ff.linear_out",
        "double_blocks.#.txt_mlp.0": f"{_DOUBLE}.ff_context.linear_in",
        "double_blocks.#.txt_mlp.2": f"{_DOUBLE}.ff_context.linear_out",
        "single_blocks.#.linear1": f"{_SINGLE}.attn.to_qkv_mlp_proj",
        "single_blocks.#.linear2": f"{_SINGLE}.attn.to_out",
        "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    },
    _FLUX_FUSED,
    _FINAL,
)
_SD3 = _table(
    {
        "joint_blocks.#.x_block.attn.proj": f"{_DOUBLE}.attn.to_out.0",
        "joint_blocks.#.x_block.attn2.proj": f"{_DOUBLE}.attn2.to_out.0",
        "joint_blocks.#.context_block.attn.proj": f"{_DOUBLE}.attn.to_add_out",
        "joint_blocks.#.x_block.mlp.fc1": f"{_DOUBLE}.ff.net.0.proj",
        "joint_blocks.#.x_block.mlp.fc2": f"{_DOUBLE}.ff.net.2",
        "joint_blocks.#.context_block.mlp.fc1": f"{_DOUBLE}.ff_context.net.0.proj",
        "joint_blocks.#.context_block.mlp.fc2": f"{_DOUBLE}.ff_context.net.2",
        "joint_blocks.#.x_block.adaLN_modulation.1": f"{_DOUBLE}.norm1.linear",
        "joint_blocks.#.context_block.adaLN_modulation.1": f"{_DOUBLE}.norm1_context.linear",
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
    {
        "joint_blocks.#.x_block.attn.qkv": _qkv(f"{_DOUBLE}.attn"),
        "joint_blocks.#.x_block.attn2.qkv": _qkv(f"{_DOUBLE}.attn2"),
        "joint_blocks.#.context_block.attn.qkv": _added(f"{_DOUBLE}.attn"),
    },
    _FINAL | {"joint_blocks.#.context_block.adaLN_modulation.1": Split.MODULATION},
)
_Z_IMAGE = _table(
    {
        f"{kind}.#.attention.out": f"{kind}.#.attention.to_out.0"
        for kind in ("layers", "noise_refiner", "context_refiner")
    },
    {
        f"{kind}.#.attention.qkv": _qkv(f"{kind}.#.attention")
        for kind in ("layers", "noise_refiner", "context_refiner")
    },
    {},
)

DOTTED: dict[str, Table] = {"flux": _FLUX | _XLABS, "flux2": _FLUX2, "sd3": _SD3, "z-image": _Z_IMAGE}
FLAT: dict[str, Table] = {
    family: {name.replace(".", "_"): targets for name, targets in table.items()}
    for family, table in DOTTED.items()
}


def lookup(template: str, number: str, table: Table) -> tuple[Target, ...]:
    """The targets of `template` with `number` put for `#`; empty if the table does not know it."""
    return tuple(
        Target(f"transformer.{target.site.replace('#', number)}", target.split, target.order)
        for target in table.get(template, ())
    )


def kohya_names() -> dict[str, tuple[str, Target]]:
    """FLUX sites (with `#`, no component) -> kohya's name and the target that says which rows: the way back."""
    return {
        target.site: (name.replace(".", "_"), target)
        for name, targets in _FLUX.items()
        if "query_norm" not in name and "key_norm" not in name
        for target in targets
    }
