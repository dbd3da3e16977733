"""The update and its gradients against PEFT itself, run side by side on the same random layers."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from randlora_jax import delta_weight


def update(A, B, lambda_, gamma, *, in_features, out_features, scaling):
    """The library's update of a kernel, (in, out): the one place that knows how it is called."""
    return delta_weight(A, B, lambda_, gamma, in_features, out_features, scaling)


# in, out, r, alpha, (in, out) of a larger layer that shares the bases
SHAPES = [
    pytest.param(17, 31, 4, 8, None, id="in<out"),
    pytest.param(31, 17, 4, 8, None, id="in>out"),
    pytest.param(29, 29, 6, 7, None, id="square"),
    pytest.param(24, 40, 8, 12, None, id="in<out, r divides"),
    pytest.param(40, 24, 8, 12, None, id="in>out, r divides"),
    pytest.param(13, 37, 1, 3, None, id="in<out, r=1"),
    pytest.param(37, 13, 1, 3, None, id="in>out, r=1"),
    pytest.param(11, 53, 19, 19, None, id="in<out, r above in"),
    pytest.param(53, 11, 19, 5, None, id="in>out, r above out"),
    pytest.param(15, 23, 5, 10, (47, 41), id="in<out, slices of the bases"),
    pytest.param(23, 15, 4, 10, (19, 61), id="in>out, slices of the bases"),
    pytest.param(18, 18, 7, 640, (33, 18), id="square, slice of B alone"),
    pytest.param(131, 257, 32, 640, None, id="default rank and alpha"),
]


def peft_layer(in_features, out_features, r, alpha, larger, mode):
    """PEFT's layer, with random scales in place of its starting values."""
    layers = torch.nn.ModuleDict({"layer": torch.nn.Linear(in_features, out_features, bias=False)})
    if larger is not None:
        layers["larger"] = torch.nn.Linear(*larger)
    config = peft.RandLoraConfig(
        r=r,
        target_modules=list(layers),
        randlora_alpha=alpha,
        projection_prng_key=in_features,
        sparse=mode == "sparse",
        very_sparse=mode == "very_sparse",
    )
    layer = peft.get_peft_model(layers, config).get_submodule("base_model.model.layer")
    torch.nn.init.normal_(layer.randlora_lambda["default"])
    torch.nn.init.normal_(layer.randlora_gamma["default"])
    return layer


def array(tensor):
    return jnp.asarray(tensor.detach().numpy())


def relative_error(ours, theirs):
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("mode", ["dense", "sparse", "very_sparse"])
@pytest.mark.parametrize("in_features, out_features, r, alpha, larger", SHAPES)
def test_update_output_and_gradients_are_those_of_peft(
    in_features, out_features, r, alpha, larger, mode
):
    torch.manual_seed(1000 * in_features + out_features)
    layer = peft_layer(in_features, out_features, r, alpha, larger, mode)
    theirs = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
    x = torch.randn(9, in_features, requires_grad=True)
    probe = torch.randn(9, out_features)
    y = layer(x)
    gradients = torch.autograd.grad((y * probe).sum(), (*theirs, x))

    A, B = array(layer.randlora_A["default"]), array(layer.randlora_B["default"])
    kernel = array(layer.base_layer.weight).T
    features = {"in_features": in_features, "out_features": out_features}

    def output(lambda_, gamma, x):
        return x @ (kernel + update(A, B, lambda_, gamma, **features, scaling=alpha / r))

    def loss(lambda_, gamma, x):
        return (output(lambda_, gamma, x) * array(probe)).sum()

    ours = *map(array, theirs), array(x)
    # Devices that shorten float32 products by default must not do so here.
    with jax.default_matmul_precision("highest"):
        delta = update(A, B, *ours[:2], **features, scaling=alpha / r)
        our_output = output(*ours)
        our_gradients = jax.grad(loss, argnums=(0, 1, 2))(*ours)

    assert delta.dtype == jnp.float32
    assert relative_error(delta, layer.get_delta_weight("default").T) < 1e-5
    assert relative_error(our_output, y) < 1e-5
    for our_gradient, gradient in zip(our_gradients, gradients, strict=True):
        assert relative_error(our_gradient, gradient) < 1e-5
