"""Nested training: each pass trains a prefix of the tokens, so that one model works at many sizes.

A pass (a micro-batch, forward and backward) draws its size. Sizes come in blocks: each size once in a random order, so
that all of them train equally long, whenever the run ends. Which it is depends on the seed and the number of the pass
alone, so that a resumed run trains the same sizes. A pass costs what its prefix costs.
"""

from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager
from fractions import Fraction

import numpy as np
from torch import nn

from tokenformer.elastic.sizes import layers_of, num_present, prefix
from tokenformer.errors import UserError
from tokenformer.modules import KINDS
from tokenformer.training.recipe import MOST_COMPILED_SIZES

# Told apart from the seeds of everything else that is drawn by step.
_STREAM = 0x6E657374
# To train a weight on a token: a product and a sum in the forward pass, and twice that in the backward pass.
FLOPS_PER_WEIGHT = 6


class Nesting:
    """The sizes of a nested run.

    Args:
        model: a TokenFormer at its full size; the meta device will do.
        shares: of the tokens, the last one 1.
        draw: `sizes`, `kinds` or `any`, as `training.nested_draw` of a recipe has it.
        seed: of the run.
        passes: micro-batches of an optimizer step.

    Raises:
        UserError: the model has no Pattention layers of the kinds qkv, output and ffn.
    """

    def __init__(self, model: nn.Module, shares: list[float], draw: str, seed: int, passes: int = 1) -> None:
        self.shares, self.draw, self.seed, self.passes = sorted(shares), draw, seed, passes
        self.counts: dict[str, int] = {}
        # Parameters that go with one token of each layer of a kind.
        self.parameters: dict[str, int] = defaultdict(int)
        for layer in layers_of(model).values():
            if layer.kind in KINDS:
                self.counts[layer.kind] = num_present(layer)
                self.parameters[layer.kind] += layer.in_features + layer.out_features
        if not self.counts:
            raise UserError("training.nested: the model has no parameter tokens, so no prefixes of them; leave it out")
        self._saved = [0]  # parameters left out by the passes before each pass, all together

    @property
    def few_sizes(self) -> bool:
        """Whether the sizes are few enough to compile the model for each."""
        return self.draw == "sizes" and len(self.shares) <= MOST_COMPILED_SIZES

    def sizes(self, share: float) -> dict[str, int]:
        """Tokens by kind of layer at a share of them; at least one of each."""
        # A decimal fraction of a count is meant as written: 0.7 of 10 is 7, though 0.7 * 10 is 7.000000000000001.
        exact = Fraction(str(share))
        return {kind: max(1, round(exact * count)) for kind, count in self.counts.items()}

    def drawn(self, number: int) -> dict[str, int]:
        """Tokens by kind of layer of a pass, counted from 0."""
        if self.draw == "sizes":
            return self.sizes(self._share(number, 0))
        if self.draw == "kinds":
            return {
                kind: self.sizes(self._share(number, place))[kind] for place, kind in enumerate(self.counts, start=1)
            }
        generator = np.random.default_rng([_STREAM, self.seed, 0, number])
        least = self.sizes(self.shares[0])
        return {kind: int(generator.integers(least[kind], count + 1)) for kind, count in self.counts.items()}

    def _share(self, number: int, stream: int) -> float:
        block, place = divmod(number, len(self.shares))
        order = np.random.default_rng([_STREAM, self.seed, stream, block]).permutation(len(self.shares))
        return self.shares[order[place]]

    def at(self, model: nn.Module, sizes: Mapping[str, int]) -> AbstractContextManager[None]:
        """Run `model` at these sizes."""
        return prefix(model, **sizes)

    def left_out(self, sizes: Mapping[str, int]) -> int:
        """Parameters that a pass at these sizes does not touch."""
        return sum(self.parameters[kind] * (count - sizes[kind]) for kind, count in self.counts.items())

    def mean_left_out(self) -> float:
        """Of a pass, over all that can be drawn."""
        if self.draw == "any":
            least = self.sizes(self.shares[0])
            return self.left_out(least) / 2
        return sum(self.left_out(self.sizes(share)) for share in self.shares) / len(self.shares)

    def left_out_before(self, number: int) -> int:
        """Parameters that the first `number` passes do not touch, added up."""
        while len(self._saved) <= number:
            self._saved.append(self._saved[-1] + self.left_out(self.drawn(len(self._saved) - 1)))
        return self._saved[number]
