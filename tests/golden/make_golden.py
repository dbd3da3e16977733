"""Writes the golden files of this folder from PEFT's RandLoRA: `python make_golden.py`.

Needs torch >= 2.12 (older releases draw other dense bases) and peft; the tests that read the files
need neither. Running it twice gives the same bytes. What it writes:

- `operation.safetensors`, `operation.json`: single layers, entries `<case>/<array>`: `A`, `B` (as
  shared by the model, so perhaps larger than the layer), `lambda`, `gamma`, `weight` (out, in),
  `bias` (where the layer has one), `x`, `y`, `delta` (out, in), `probe`, and `grad_lambda`,
  `grad_gamma`, `grad_x`, the gradients of `sum(y * probe)`.
- `torch_bases.json`: sha256 of the bases, as float32 little-endian bytes in C order.
- `adapter_*/`: adapters as `save_pretrained` writes them, for `lin2(relu(lin1(relu(lin0(x)))))`;
  `io.safetensors` holds the base's parameters before training, `x`, the adapted model's `y`, and
  the bases that PEFT used as `randlora_A` and `randlora_B`.

`published.json` is kept by hand: numbers of one small layer that PEFT was seen to give. Nothing is
written where the installed PEFT gives others.
"""

import argparse
import hashlib
import json
import math
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import RandLoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

MODES = ("dense", "sparse", "very_sparse")

FIELDS = "name in_features out_features r mode randlora_alpha projection_prng_key bias larger_layer"
# larger_layer: (in, out) of another layer, so that the shared bases have to be sliced.
OPERATION_CASES = (
    ("in_lt_out", 12, 20, 4, "dense", 8, 0, False, None),
    ("in_lt_out_ragged", 11, 19, 4, "dense", 10, 1, True, None),
    ("in_gt_out", 20, 12, 4, "dense", 8, 2, True, None),
    ("in_gt_out_ragged", 23, 13, 5, "sparse", 7, 3, False, None),
    ("square", 16, 16, 4, "sparse", 4, 4, True, None),
    ("square_ragged", 15, 15, 4, "very_sparse", 9, 5, False, None),
    ("r_over_min_in_lt_out", 7, 18, 9, "dense", 9, 6, False, None),
    ("r_over_min_in_gt_out", 18, 7, 9, "very_sparse", 20, 7, True, None),
    ("r_one_in_lt_out", 9, 14, 1, "sparse", 2, 8, True, None),
    ("r_one_in_gt_out", 14, 9, 1, "dense", 1, 9, False, None),
    ("slices_in_lt_out", 8, 14, 3, "dense", 7, 10, True, (21, 17)),
    ("slices_in_gt_out", 14, 8, 3, "very_sparse", 6, 11, False, (17, 21)),
    ("slices_square", 10, 10, 4, "sparse", 8, 12, True, (13, 26)),
    ("default_scaling", 20, 27, 32, "dense", 640, 13, False, None),
)

# max_dim, min_dim, r, seed; only the low 32 bits of a seed count. Each is drawn in every mode.
BASES_CASES = ((10, 6, 4, 0), (20, 20, 7, 1), (300, 129, 32, 2**32 + 5), (33, 5, 8, 123456789))

ADAPTERS = {
    "adapter_projection": {"target_modules": ["lin0", "lin1", "lin2"]},
    "adapter_seed": {
        "target_modules": ["lin0", "lin1", "lin2"],
        "save_projection": False,
        "projection_prng_key": 7,
    },
    "adapter_sparse": {"target_modules": "lin[12]", "sparse": True, "r": 3},
    # bias="all" also trains the bias of lin1, which is no target. lin2 is trained as a whole; its
    # bias is written under three names, of which `lin2.bias` is the one that counts.
    "adapter_bias": {"target_modules": ["lin0"], "bias": "all", "modules_to_save": ["lin2"]},
    "adapter_bias_only": {
        "target_modules": ["lin0", "lin1"],
        "bias": "randlora_only",
        "modules_to_save": ["lin2"],
    },
}


class MLP(nn.Module):
    """in < out, in = out and in > out in one model, so that the bases have to be sliced."""

    def __init__(self):
        super().__init__()
        self.lin0, self.lin1, self.lin2 = nn.Linear(10, 20), nn.Linear(20, 20), nn.Linear(20, 8)

    def forward(self, x):
        return self.lin2(torch.relu(self.lin1(torch.relu(self.lin0(x)))))


def adapted_linear(in_features, out_features, r, mode, alpha, seed, bias=False, larger=None):
    """PEFT's layer around a new nn.Linear, with its A and B."""
    layers = nn.ModuleDict({"layer": nn.Linear(in_features, out_features, bias=bias)})
    if larger is not None:
        layers["larger"] = nn.Linear(*larger)
    config = RandLoraConfig(
        r=r,
        target_modules=list(layers),
        randlora_alpha=alpha,
        projection_prng_key=seed,
        sparse=mode == "sparse",
        very_sparse=mode == "very_sparse",
    )
    layer = get_peft_model(layers, config).get_submodule("base_model.model.layer")
    return layer, layer.randlora_A["default"], layer.randlora_B["default"]


def sha256(tensor):
    return hashlib.sha256(tensor.numpy().astype("<f4").tobytes()).hexdigest()


def write_json(path, content):
    path.write_text(json.dumps(content, indent=1) + "\n")


def mismatches(published):
    """What the installed PEFT computes otherwise than `published`, in words."""
    found = []
    for mode in MODES:
        layer, A, B = adapted_linear(6, 10, 4, mode, 4, 0)
        lambda_, gamma = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
        with torch.no_grad():
            layer.base_layer.weight.zero_()
            lambda_.copy_(torch.arange(8).reshape(4, 2) / 10)
            gamma.copy_((torch.arange(12).reshape(2, 6) + 1) / 100)
            delta = layer.get_delta_weight("default")
            output = layer(torch.arange(6) / 6)
        computed = {
            "A_hash": sha256(A)[:16],
            "B_hash": sha256(B)[:16],
            "A[:, 0, :2]": A[:, 0, :2],
            "B[0]": B[0],
            "|A|": A.abs().max(),
            "|B|": B.abs().max(),
            "delta[0]": delta[0],
            "sum(delta)": delta.sum(),
            "output[:3]": output[:3],
        }
        for name, expected in published[mode].items():
            if name.endswith("hash"):
                same = computed[name] == expected
            else:
                # Sums depend on their order, so the last bits may differ between machines.
                same = torch.allclose(computed[name], torch.tensor(expected), rtol=1e-5, atol=1e-7)
            if not same:
                found.append(f"{mode} {name}: {computed[name]}, published {expected}")
    return found


def write_operation(folder):
    tensors, cases = {}, []
    for case in OPERATION_CASES:
        name, in_features, out_features, r, mode, alpha, seed, bias, larger = case
        torch.manual_seed(seed)
        layer, A, B = adapted_linear(in_features, out_features, r, mode, alpha, seed, bias, larger)
        lambda_, gamma = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
        nn.init.normal_(lambda_)
        nn.init.normal_(gamma, std=1 / math.sqrt(max(in_features, out_features)))
        x = torch.randn(5, in_features, requires_grad=True)
        probe = torch.randn(5, out_features)
        y = layer(x)
        grads = torch.autograd.grad((y * probe).sum(), (lambda_, gamma, x))
        arrays = {"A": A, "B": B, "lambda": lambda_, "gamma": gamma, "x": x, "probe": probe}
        arrays |= {"y": y, "delta": layer.get_delta_weight("default")}
        arrays |= dict(zip(("grad_lambda", "grad_gamma", "grad_x"), grads, strict=True))
        arrays |= dict(layer.base_layer.named_parameters())
        assert all(array.isfinite().all() for array in arrays.values()), name
        tensors |= {f"{name}/{key}": array.detach().contiguous() for key, array in arrays.items()}
        scaling = {"scaling": layer.scaling["default"]}
        cases.append(dict(zip(FIELDS.split(), case, strict=True)) | scaling)
    save_file(tensors, folder / "operation.safetensors")
    write_json(folder / "operation.json", cases)


def write_bases(folder):
    entries = []
    for max_dim, min_dim, r, seed in BASES_CASES:
        for mode in MODES:
            _, A, B = adapted_linear(min_dim, max_dim, r, mode, r, seed)
            entry = {"max_dim": max_dim, "min_dim": min_dim, "r": r, "projection_prng_key": seed}
            entries.append(entry | {"mode": mode, "A": sha256(A), "B": sha256(B)})
    write_json(folder / "torch_bases.json", entries)


def write_adapter(folder, options):
    torch.manual_seed(0)
    base = MLP()
    io = {name: value.clone() for name, value in base.state_dict().items()}
    config = RandLoraConfig(**{"r": 4, "randlora_alpha": 8, **options})
    model = get_peft_model(base, config)
    with torch.no_grad():
        # Stands for training: everything that an optimiser would move has moved.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape))
        io["x"] = torch.randn(6, 10)
        io["y"] = model(io["x"])
    io["randlora_A"] = model.base_model.randlora_A["default"]
    io["randlora_B"] = model.base_model.randlora_B["default"]
    model.save_pretrained(folder)
    save_file(io, folder / "io.safetensors")
    (folder / "README.md").unlink(missing_ok=True)
    # PEFT writes sets in arbitrary order.
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text())
    for key in ("target_modules", "modules_to_save"):
        if isinstance(content[key], list):
            content[key].sort()
    path.write_text(json.dumps(content, indent=2, sort_keys=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent)
    folder = parser.parse_args().output_dir
    torch.set_num_threads(1)  # the order of sums must not depend on the machine
    published = json.loads((Path(__file__).parent / "published.json").read_text())
    if found := mismatches(published):
        raise SystemExit("PEFT does not give the published numbers:\n" + "\n".join(found))
    folder.mkdir(parents=True, exist_ok=True)
    write_operation(folder)
    write_bases(folder)
    for name, options in ADAPTERS.items():
        write_adapter(folder / name, options)


if __name__ == "__main__":
    main()
