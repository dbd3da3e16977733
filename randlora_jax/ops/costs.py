"""What a product with `W + dW` costs, and which way to compute it is the cheaper.

With dW = L @ R, L (in, m) and R (m, out), it can be factored, `x.W + (x.L).R`, or merged,
`x.(W + L.R)`. Which has fewer operations depends on the number of tokens, differs between the
forward and the backward pass, and is known while tracing.
"""

from __future__ import annotations

from typing import Literal

Strategy = Literal["auto", "merged", "factored"]


def cheapest(
    tokens: int,
    in_features: int,
    out_features: int,
    m: int,
    strategy: Strategy = "auto",
    plus_kernel: bool = True,
) -> tuple[bool, bool]:
    """Whether to merge in the forward and in the backward pass: the pair of fewest operations.

    Of tokens whose number is a symbol, as `jax.export` has it, neither: that is at most three times
    the frozen layer's operations for any number, where merging is unbounded for few.
    """
    if strategy == "auto" and not isinstance(tokens, int):
        return False, False
    if strategy != "auto":
        return strategy == "merged", strategy == "merged"
    sizes = tokens, in_features, out_features, m
    flops = lambda ways: sum(product_flops(*sizes, ways[0], ways[1], plus_kernel))
    return min(((f, b) for f in (True, False) for b in (True, False)), key=flops)


def product_flops(
    tokens: int,
    in_features: int,
    out_features: int,
    m: int,
    merged_forward: bool,
    merged_backward: bool,
    plus_kernel: bool = True,
) -> tuple[int, int]:
    """Floating point operations of the forward and of the backward pass of `x.(W + dW)`.

    For m = r * n columns in the factors. The gradients are those of x and of the scales, the
    kernel being frozen. Without `plus_kernel`, of `x.dW` alone.
    """
    dense, build = tokens * in_features * out_features, m * in_features * out_features
    thin = tokens * m * (in_features + out_features)
    base = dense if plus_kernel else 0
    forward = dense + build if merged_forward else base + thin
    if merged_backward:  # dW again (it was not kept), dx, x.T @ dy and its product with V
        backward = 2 * dense + 2 * build
    else:
        # The factor that trains meets a product that is there already, but for one case: out < in
        # with a merged forward pass, where x @ V was not computed.
        again = tokens * m * in_features if out_features < in_features and merged_forward else 0
        backward = base + thin + tokens * m * min(in_features, out_features) + again
    return 2 * forward, 2 * backward
