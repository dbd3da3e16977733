"""What a product with `W + dW` costs, and which way to compute it is the cheaper.

With dW = L @ R, L (in, m) and R (m, out), it can be factored, `x.W + (x.L).R`, or merged,
`x.(W + L.R)`. Which has fewer operations depends on the number of tokens, differs between the
forward and the backward pass, and is known while tracing. Few tokens are multiplied by the vectors
that one of the two factors is made of: as many operations, without the factor.
"""

from __future__ import annotations

from typing import Literal

Way = Literal["merged", "factored", "vectors"]
# "unmerged" is the cheaper of the two that are not merged.
Strategy = Literal["auto", "unmerged", "merged", "factored", "vectors"]


def cheapest(
    tokens: int,
    in_features: int,
    out_features: int,
    rank: tuple[int, int],
    strategy: Strategy = "auto",
    plus_kernel: bool = True,
    adapters: int = 1,
) -> tuple[Way, Way]:
    """The way of the forward and that of the backward pass: the pair of fewest operations.

    Of ways with as many operations, the one with fewer bytes. Of tokens whose number is a symbol,
    as `jax.export` has it, both are factored: that is at most three times the frozen layer's
    operations for any number, where merging is unbounded for few.

    Args:
      rank: r and n.
      adapters: whose updates are summed.
    """
    if strategy != "auto" and strategy != "unmerged":
        return strategy, strategy
    if not isinstance(tokens, int):
        return "factored", "factored"
    r, n = rank
    few: Way = "vectors" if vectors_pay(tokens, r, n, adapters) else "factored"
    if strategy == "unmerged":
        return few, few

    def flops(ways: tuple[Way, Way]) -> int:
        return sum(product_flops(tokens, in_features, out_features, r * n, *ways, plus_kernel))

    ways: tuple[Way, Way] = ("merged", few)
    pairs: list[tuple[Way, Way]] = [(f, b) for f in ways for b in ways]
    return min(pairs, key=flops)


def vectors_pay(tokens: int, r: int, n: int, adapters: int = 1) -> bool:
    """Whether vectors move fewer bytes than the factor U, and need no more operations.

    Each number of U (m, min) is written and read again; the vectors' intermediate has min(r, n)
    numbers where U has m = r * n, for each token and adapter. To make U takes two operations for
    each of its numbers and adapter, and then it serves all adapters at once.
    """
    fewer_bytes = adapters * tokens * min(r, n) < r * n
    return fewer_bytes and 2 * adapters * tokens <= 2 * tokens + 2 * adapters


def product_flops(
    tokens: int,
    in_features: int,
    out_features: int,
    m: int,
    forward: Way,
    backward: Way,
    plus_kernel: bool = True,
) -> tuple[int, int]:
    """Floating point operations of the forward and of the backward pass of `x.(W + dW)`.

    For m = r * n columns in the factors. The gradients are those of x and of the scales, the
    kernel being frozen. Without `plus_kernel`, of `x.dW` alone. Vectors take as many as factors.
    """
    dense, build = tokens * in_features * out_features, m * in_features * out_features
    thin = tokens * m * (in_features + out_features)
    base = dense if plus_kernel else 0
    merged = forward == "merged"
    first = dense + build if merged else base + thin
    if backward == "merged":  # dW again (it was not kept), dx, x.T @ dy and its product with V
        second = 2 * dense + 2 * build
    else:
        # The factor that trains meets a product that is there already, but for one case: out < in
        # with a merged forward pass, where x @ V was not computed.
        again = tokens * m * in_features if out_features < in_features and merged else 0
        second = base + thin + tokens * m * min(in_features, out_features) + again
    return 2 * first, 2 * second
