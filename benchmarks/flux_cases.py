"""Every kernel at FLUX.1-dev's shapes: what to run, what must come out, and the least it must move and multiply."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compose.kernels import lora_grow, lora_mix, lora_pack
from compose.kernels.choice import Tile
from compose.kernels.fold import Folder, FoldSite
from compose.kernels.fold import naive as fold_naive
from compose.kernels.lora_gate import VECTORS, form_of, lora_gate
from compose.kernels.lora_gate import naive as gate_naive
from compose.kernels.lora_grow import naive as grow_naive
from compose.kernels.lora_mix import naive as mix_naive
from compose.kernels.lora_pack import Packing, layout, product
from compose.kernels.lora_pack import naive as pack_naive
from compose.kernels.lora_rows import lora_rows
from compose.kernels.sparse_add import naive as sparse_naive
from compose.kernels.sparse_add import sparse_add_
from compose.kernels.sparse_switch import Scatter
from compose.kernels.sparse_switch import naive as switch_naive


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One operation at one shape. `run(way)` does it, the way a user would get where that is None, and returns what it
    wrote; `wanted()` is the same in float32; `reset()` puts back what is written to in place."""

    name: str
    run: Callable[[Tile | None], Tensor]
    wanted: Callable[[], Tensor]
    bytes: int
    operations: int
    ways: tuple[Tile, ...] = ()
    reset: Callable[[], object] = lambda: None


@dataclass(frozen=True, slots=True)
class Sizes:
    """Tokens of a 1024 px call (image and text), the model's width, its MLP's, and the ranks of one and eight adapters."""

    tokens: int = 4608
    text: int = 512
    width: int = 3072
    wide: int = 12288
    ranks: tuple[int, int] = (16, 128)


FULL, TOY = Sizes(), Sizes(24, 8, 32, 48, (8, 16))


class Cases:
    """Cases of one size, type and device; tensors are made when a case is asked for, and go with it."""

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
        self.sizes, self.device, self.dtype = sizes, device, dtype

    def __iter__(self) -> Iterator[Case]:
        s = self.sizes
        for rank in s.ranks:
            yield self.pack(s.tokens, rank, 4)
            for out in (s.width, s.wide):
                yield self.product(out, rank)
            yield self.shrink(s.wide + s.width, rank)
            yield self.expand(s.width, rank)
            yield self.linear(s.wide + s.width, rank)
            yield self.grown(s.wide + s.width, s.tokens, rank)
            yield self.grown(s.wide, s.tokens - s.text, rank)
        for out in (s.width, s.wide):
            yield self.base(s.width, out)
        yield self.base(s.wide + s.width, s.width)
        for tokens in (s.tokens - s.text, s.text):
            yield self.pack(tokens, s.ranks[1], 1)
        yield self.rows()
        for out in (s.width, s.wide):
            yield self.gate(out)
        yield self.fold()
        yield self.sparse_add()
        yield self.sparse_switch()
        yield self.training()

    def _randn(self, *size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, device=self.device, dtype=self.dtype) * scale

    def _ones(self, rows: int, rank: int) -> Tensor:
        return torch.ones(rows, rank, device=self.device)

    def _layer(self, inputs: int, out: int) -> tuple[Tensor, Tensor]:
        return self._randn(out, inputs, scale=inputs**-0.5), self._randn(out)

    def pack(self, tokens: int, rank: int, layers: int) -> Case:
        width = self.sizes.width
        x, down = self._randn(1, tokens, width), self._randn(layers * rank, width, scale=width**-0.5)
        row, scale = layout(width, [rank] * layers), self._ones(1, layers * rank)
        packing, size = Packing(down, row), x.itemsize
        own = (row.width, row.first, row.pitch, row.copies)

        def run(way: Tile | None) -> Tensor:
            if way is None:
                return packing.of(x, scale)
            flat = lora_pack.Layout(*own, row.places, ())
            return lora_pack._packed(x[0], down, scale, packing.places, flat, way)

        return Case(
            name=f"pack_{tokens}_r{rank}x{layers}", run=run, ways=lora_pack.TILES,
            wanted=lambda: pack_naive.pack(x.float(), down.float(), scale, row),
            bytes=size * (x.numel() + down.numel() + tokens * row.width), operations=2 * x.numel() * len(down),
        )  # fmt: skip

    def product(self, out: int, rank: int) -> Case:
        tokens, width = self.sizes.tokens, self.sizes.width
        weight, bias = self._layer(width, out)
        row = layout(width, [rank] * 4)
        packed, seat, up = (
            self._randn(tokens, row.width),
            row.seats[1],
            self._randn(out, rank, scale=rank**-0.5),
        )
        both = torch.zeros(out, seat.width, device=self.device, dtype=self.dtype)
        both[:, seat.x : seat.x + width], both[:, seat.rank : seat.rank + rank] = weight, up
        own = packed.narrow(1, seat.start, seat.width)
        return Case(
            name=f"product_{out}_r{rank}", run=lambda way: product(packed, seat, both.T, bias),
            wanted=lambda: own.float() @ both.float().T + bias.float(),
            bytes=packed.itemsize * (own.numel() + both.numel() + tokens * out), operations=2 * own.numel() * out,
        )  # fmt: skip

    def base(self, inputs: int, out: int) -> Case:
        """The layer without adapters, by the library: what the others are to be compared with."""
        x, (weight, bias) = self._randn(self.sizes.tokens, inputs), self._layer(inputs, out)
        return Case(
            name=f"base_{inputs}_{out}", run=lambda way: F.linear(x, weight, bias),
            wanted=lambda: F.linear(x.float(), weight.float(), bias.float()),
            bytes=x.itemsize * (x.numel() + weight.numel() + len(x) * out), operations=2 * x.numel() * out,
        )  # fmt: skip

    def shrink(self, inputs: int, rank: int) -> Case:
        x, down = self._randn(1, self.sizes.tokens, inputs), self._randn(rank, inputs, scale=inputs**-0.5)
        scale = self._ones(1, rank)

        def run(way: Tile | None) -> Tensor:
            return (
                lora_mix.shrink(x, down, scale)
                if way is None
                else lora_mix._shrunk(x[0], down, scale, way)[None]
            )

        return Case(
            name=f"shrink_{inputs}_r{rank}", run=run, ways=lora_mix.SHRINKS,
            wanted=lambda: mix_naive.shrink(x.float(), down.float(), scale),
            bytes=x.nbytes + down.nbytes + x[..., 0].numel() * rank * x.itemsize, operations=2 * x.numel() * rank,
        )  # fmt: skip

    def expand(self, out: int, rank: int) -> Case:
        before, hidden = self._randn(1, self.sizes.tokens, out), self._randn(1, self.sizes.tokens, rank)
        y, up = before.clone(), self._randn(out, rank, scale=rank**-0.5)

        def run(way: Tile | None) -> Tensor:
            if way is None:
                lora_mix.expand_(y, hidden, up)
            else:
                lora_mix._expanded(y, hidden, up, way)
            return y

        return Case(
            name=f"expand_{out}_r{rank}", run=run, ways=lora_mix.EXPANDS, reset=lambda: y.copy_(before),
            wanted=lambda: before.float() + hidden.float() @ up.float().T,
            bytes=2 * y.nbytes + hidden.nbytes + up.nbytes, operations=2 * y.numel() * rank,
        )  # fmt: skip

    def linear(self, inputs: int, rank: int) -> Case:
        out = self.sizes.width
        x, (weight, bias) = self._randn(1, self.sizes.tokens, inputs), self._layer(inputs, out)
        hidden, up = self._randn(1, self.sizes.tokens, rank), self._randn(out, rank, scale=rank**-0.5)

        def run(way: Tile | None) -> Tensor:
            given = (x, weight, bias, hidden, up)
            return lora_mix.linear(*given) if way is None else lora_mix._product(*given, way)

        return Case(
            name=f"linear_{inputs}_r{rank}", run=run, ways=lora_mix.LINEARS,
            wanted=lambda: F.linear(x.float(), weight.float(), bias.float()) + hidden.float() @ up.float().T,
            bytes=x.nbytes + weight.nbytes + hidden.nbytes + up.nbytes + x[..., 0].numel() * out * x.itemsize,
            operations=2 * x[..., 0].numel() * out * (inputs + rank),
        )  # fmt: skip

    def grown(self, inputs: int, tokens: int, rank: int) -> Case:
        """A layer that reads more than it writes, its shrink and expand included."""
        out = self.sizes.width
        x, (weight, bias) = self._randn(1, tokens, inputs), self._layer(inputs, out)
        both, up = lora_grow.grow(weight, rank), self._randn(out, rank, scale=rank**-0.5)
        both[out : out + rank] = self._randn(rank, inputs, scale=inputs**-0.5)
        given = (x, both[:out], bias, both, up, self._ones(1, rank))
        return Case(
            name=f"grown_{inputs}_r{rank}", ways=lora_grow.TILES,
            run=lambda way: lora_grow.grown(*given) if way is None else lora_grow._done(*given, way),
            wanted=lambda: grow_naive.grown(*(t.float() for t in given)),
            bytes=x.nbytes + both.nbytes + up.nbytes + tokens * out * x.itemsize,
            operations=2 * tokens * (inputs * (out + rank) + out * rank),
        )  # fmt: skip

    def rows(self) -> Case:
        """Eight pictures of 512 px, each with an adapter of rank 32 of its own."""
        tokens, width, rank = self.sizes.tokens // 3, self.sizes.width, 2 * self.sizes.ranks[0]
        x, before = self._randn(8, tokens, width), self._randn(8, tokens, width)
        down, up = (
            self._randn(8 * rank, width, scale=width**-0.5),
            self._randn(width, 8 * rank, scale=rank**-0.5),
        )
        scale = torch.block_diag(*[torch.ones(1, rank)] * 8).to(self.device)
        y = before.clone()

        def run(way: Tile | None) -> Tensor:
            lora_rows(y, x, down, up, scale)
            return y

        def wanted() -> Tensor:
            hidden = torch.einsum("btk,rk->btr", x.float(), down.float()) * scale[:, None]
            return before.float() + hidden @ up.float().T

        return Case(
            name="rows", run=run, wanted=wanted, reset=lambda: y.copy_(before),
            bytes=2 * y.nbytes + x.nbytes + down.nbytes + up.nbytes, operations=2 * (x.numel() + y.numel()) * rank,
        )  # fmt: skip

    def gate(self, out: int) -> Case:
        """AutoLoRA's gate over three adapters."""
        rank = self.sizes.ranks[0]
        edges = [0, rank, 2 * rank, 3 * rank]
        before, hidden = self._randn(1, self.sizes.tokens, out), self._randn(1, self.sizes.tokens, 3 * rank)
        y, up = before.clone(), self._randn(out, 3 * rank, scale=rank**-0.5)
        gate = torch.randn(len(VECTORS), out, device=self.device)
        form = form_of(up, edges)

        def run(way: Tile | None) -> Tensor:
            lora_gate(y, hidden, up, form, gate)
            return y

        return Case(
            name=f"gate_{out}", run=run, reset=lambda: y.copy_(before),
            wanted=lambda: gate_naive.lora_gate(before.float(), hidden.float(), up.float(), edges, gate),
            bytes=3 * y.nbytes + hidden.nbytes + up.nbytes + gate.nbytes, operations=2 * y.numel() * 3 * rank,
        )  # fmt: skip

    def fold(self) -> Case:
        """Four adapters into four layers."""
        width, wide, rank = self.sizes.width, self.sizes.wide, 4 * self.sizes.ranks[0]
        table, sites = torch.ones(4 * rank, device=self.device), []
        for n, (out, inputs) in enumerate(
            ((wide, width), (width, wide), (width, width), (width, wide + width))
        ):
            kept = self._randn(out, inputs, scale=0.1)
            down, up = self._randn(rank, inputs), self._randn(out, rank, scale=0.1 * rank**-0.5)
            scale = table[n * rank : (n + 1) * rank]
            sites.append(FoldSite(weight=torch.empty_like(kept), kept=kept, down=down, up=up, scale=scale))
        folder = Folder(sites)

        def run(way: Tile | None) -> Tensor:
            folder.fold()
            return sites[-1].weight

        def wanted() -> Tensor:
            site = sites[-1]
            weight = site.kept.float()
            fold_naive.fold(weight, site.kept.float(), site.down.float(), site.up.float(), site.scale)
            return weight

        moved = sum(2 * site.weight.nbytes + site.down.nbytes + site.up.nbytes for site in sites)
        work = sum(2 * site.weight.numel() * rank for site in sites)
        return Case(name="fold", run=run, wanted=wanted, bytes=moved, operations=work)

    def _entries(self, weight: Tensor) -> tuple[Tensor, Tensor, int]:
        """(places, values) of 1 % of the entries, and the bytes that writing them moves: whole sectors of 32."""
        count = max(1, weight.numel() // 100)
        index = torch.randperm(weight.numel(), device=self.device)[:count].sort().values.int()
        return index, self._randn(count), count * (4 + 2 * weight.itemsize + 2 * 32)

    def sparse_add(self) -> Case:
        before = self._randn(self.sizes.wide, self.sizes.width)
        weight, (index, value, moved) = before.clone(), self._entries(before)
        scale = torch.tensor(0.5, device=self.device)

        def run(way: Tile | None) -> Tensor:
            sparse_add_(weight, index, value, scale)
            return weight

        def wanted() -> Tensor:
            exact = before.float()
            sparse_naive.sparse_add_(exact, index, value.float(), scale)
            return exact

        return Case(
            name="sparse_add", run=run, wanted=wanted, reset=lambda: weight.copy_(before), bytes=moved,
            operations=2 * len(index),
        )  # fmt: skip

    def sparse_switch(self) -> Case:
        weight = self._randn(self.sizes.wide, self.sizes.width)
        index, value, moved = self._entries(weight)
        kept, scale = weight.view(-1)[index.long()], torch.tensor([0.5], device=self.device)
        scatter = Scatter([weight], [index])

        def run(way: Tile | None) -> Tensor:
            scatter.add(kept, value, scale)
            return weight

        def wanted() -> Tensor:
            exact = weight.float()
            switch_naive.add([exact], [index], kept.float(), value.float(), scale)
            return exact

        return Case(name="sparse_switch", run=run, wanted=wanted, bytes=moved, operations=2 * len(index))

    def training(self) -> Case:
        """A layer's forward and backward; returns the gradients of x and both factors in one row."""
        tokens, width, wide, rank = self.sizes.tokens, self.sizes.width, self.sizes.wide, self.sizes.ranks[0]
        weight, bias = self._layer(width, wide)
        given = (
            self._randn(1, tokens, width),
            self._randn(rank, width, scale=width**-0.5),
            self._randn(wide, rank, scale=rank**-0.5),
        )
        grad, scale = self._randn(1, tokens, wide), self._ones(1, rank)

        def gradients(layer: Callable[..., Tensor], *kept: Tensor) -> Tensor:
            x, down, up = (t.clone().requires_grad_() for t in kept[2:])
            layer(x, kept[0], kept[1], down, up, scale).backward(grad.to(x.dtype))
            return torch.cat([(t.grad / t.grad.norm()).flatten() for t in (x, down, up)])

        exact = (t.float() for t in (weight, bias, *given))
        size = grad.itemsize
        return Case(
            name="training", run=lambda way: gradients(lora_mix.mix_linear, weight, bias, *given),
            wanted=lambda: gradients(mix_naive.mix_linear, *exact),
            bytes=size * tokens * (3 * width + 3 * wide) + 2 * weight.nbytes,
            operations=4 * tokens * width * wide + 6 * tokens * rank * (width + wide),
        )  # fmt: skip
