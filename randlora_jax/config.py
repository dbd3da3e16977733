"""The configuration of a RandLoRA adapter: PEFT's fields, names and defaults."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import operator
import re
import warnings
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

ALL_LINEAR = "all-linear"
_NAMES = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")


Bias = Literal["none", "all", "randlora_only"]


class Fields(TypedDict, total=False):
    """What `RandLoraConfig` takes, for type checkers; it holds narrower types."""

    r: int
    randlora_alpha: float
    projection_prng_key: int
    save_projection: bool
    sparse: bool
    very_sparse: bool
    randlora_dropout: float
    fan_in_fan_out: bool
    bias: Bias
    target_modules: Collection[str] | str | None
    exclude_modules: Collection[str] | str | None
    layers_to_transform: Collection[int] | int | None
    layers_pattern: Collection[str] | str | None
    modules_to_save: Collection[str] | None
    init_weights: bool
    task_type: str | None
    auto_mapping: Any
    base_model_name_or_path: str | None
    revision: str | None
    inference_mode: bool
    peft_version: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandLoraConfig:
    """What to adapt and how (PEFT's `RandLoraConfig`, plus `exclude_modules`).

    Lists and sets are kept as tuples, so that a config is hashable and can be static under
    `jax.jit`.

    Attributes:
      r: rank of each random basis. More rank is fewer parameters: `r * n + n * min(in, out)` a
        layer, with `n = ceil(min(in, out) / r)`.
      randlora_alpha: the update is scaled by `randlora_alpha / r`.
      projection_prng_key: seed of the bases; its low 32 bits count, as in PEFT.
      save_projection: whether checkpoints hold the bases. Without them a restore draws them again
        from the seed and verifies them.
      sparse: ternary bases, each sign with probability 1/6.
      very_sparse: ternary bases, each sign with probability 1/sqrt(D), D the smaller side of the
        shared bases (as PEFT documents it; its code uses half of that).
      randlora_dropout: rate of the dropout on the adapter's input.
      fan_in_fan_out: kernels of self-written layers are stored (out, in).
      bias: which biases train: "none", "all" or "randlora_only" (those of adapted layers).
      target_modules: whole dotted paths or suffixes at a dot; or one regular expression for the
        whole path; or "all-linear".
      exclude_modules: the same, for what is left out.
      layers_to_transform: indices of the layers to adapt, in numbered or stacked layers.
      layers_pattern: name of the list of layers that `layers_to_transform` counts.
      modules_to_save: modules that are trained whole and saved with the adapter.
      init_weights: start from a zero update; False draws lambda from a normal distribution.
      task_type, auto_mapping, base_model_name_or_path, revision, inference_mode, peft_version:
        kept as PEFT wrote them; nothing here reads them.

    Raises:
      ValueError, TypeError: on a value that cannot work, naming the field and the cure.

    Example:
      >>> config = RandLoraConfig(r=16, target_modules=["q_proj", "v_proj"])
      >>> config.scaling
      40.0
      >>> RandLoraConfig.from_dict(config.to_dict()) == config
      True
    """

    r: int = 32
    randlora_alpha: float = 640
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Bias = "none"
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: tuple[str, ...] | str | None = None
    modules_to_save: tuple[str, ...] | None = None
    init_weights: bool = True
    task_type: str | None = None
    auto_mapping: Any = dataclasses.field(default=None, hash=False)
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    peft_version: str | None = None

    if TYPE_CHECKING:

        def __init__(self, **fields: Unpack[Fields]) -> None: ...

    def __post_init__(self) -> None:
        for name in ("r", "projection_prng_key"):
            value = getattr(self, name)
            if not is_integer(value):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            object.__setattr__(self, name, int(value))
        if self.r < 1:
            raise ValueError(f"r must be at least 1, got {self.r}")
        for name in ("randlora_alpha", "randlora_dropout"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        for name in ("save_projection", "sparse", "very_sparse", "fan_in_fan_out", "init_weights"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not math.isfinite(self.randlora_alpha):
            raise ValueError(f"randlora_alpha must be finite, got {self.randlora_alpha}")
        if not 0 <= self.randlora_dropout < 1:
            raise ValueError(f"randlora_dropout must be in [0, 1), got {self.randlora_dropout}")
        if self.sparse and self.very_sparse:
            raise ValueError("sparse and very_sparse are both True: choose one of them")
        if self.bias not in ("none", "all", "randlora_only"):
            raise ValueError(f"bias must be 'none', 'all' or 'randlora_only', got {self.bias!r}")
        for name in _NAMES:
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        self._check_layers()

    def _check_layers(self) -> None:
        given = self.layers_to_transform
        if given is None:
            if self.layers_pattern is not None:
                raise ValueError(
                    f"layers_pattern={self.layers_pattern!r} needs layers_to_transform, the "
                    "indices of the layers to adapt"
                )
            return
        # A scalar of NumPy's or JAX's can look like a collection.
        several = isinstance(given, Collection) and getattr(given, "shape", None) != ()
        values: Any = given
        layers: tuple[Any, ...] = tuple(values) if several else (values,)
        if not layers or not all(is_integer(i) and i >= 0 for i in layers):
            raise ValueError(
                f"layers_to_transform must be indices of layers, 0 or more, got {given!r}"
            )
        if isinstance(self.target_modules, str) and not self.all_linear:
            raise ValueError(
                f"layers_to_transform has no effect with target_modules={self.target_modules!r}, "
                "a regular expression: write the layers into the expression, or give "
                "target_modules as a list"
            )
        indices = tuple(int(i) for i in layers)
        object.__setattr__(self, "layers_to_transform", indices if several else indices[0])

    @property
    def scaling(self) -> float:
        """`randlora_alpha / r`, by which the update is multiplied."""
        return self.randlora_alpha / self.r

    @property
    def all_linear(self) -> bool:
        """Whether `target_modules` stands for every linear layer."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def to_dict(self) -> dict[str, Any]:
        """The fields as PEFT writes them to `adapter_config.json`: lists, and `peft_type`."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if fields["exclude_modules"] is None:  # not a field of PEFT's: written only where used
            del fields["exclude_modules"]
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
        return values | {"peft_type": "RANDLORA"}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RandLoraConfig:
        """Reads what `to_dict` or PEFT wrote; keys that mean nothing here are named in a warning.

        Raises:
          ValueError: if `peft_type` is there and is not "RANDLORA".
        """
        kind = values.get("peft_type", "RANDLORA")
        if str(kind).rsplit(".", 1)[-1].upper() != "RANDLORA":
            raise ValueError(f"peft_type must be 'RANDLORA', got {kind!r}: not a RandLoRA adapter")
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known - {"peft_type"})
        if unknown:
            warnings.warn(f"RandLoraConfig ignores unknown keys: {unknown}", stacklevel=2)
        return cls(**{k: v for k, v in values.items() if k in known})

    def to_json(self) -> str:
        """`to_dict` as JSON, keys sorted, as in PEFT's `adapter_config.json`."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> RandLoraConfig:
        """Reads what `to_json` or PEFT wrote."""
        return cls.from_dict(json.loads(text))

    def replace(self, **changes: Unpack[Fields]) -> RandLoraConfig:
        """A copy with other values, checked like a new one."""
        values: Any = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return RandLoraConfig(**(values | changes))


def is_integer(value: Any) -> bool:
    """Whether it is a whole number, Python's or NumPy's or JAX's; True and False are none."""
    try:
        operator.index(value)  # any array has an `__index__`, and most raise in it
    except TypeError:
        return False
    return not isinstance(value, bool)


def _number(field: str, value: Any) -> float:
    """Checks a number; one of NumPy's or JAX's becomes Python's, which JSON can hold."""
    number = value
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        with contextlib.suppress(TypeError):  # a traced one has no value yet
            number = value.item()
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{field} must be a number, got {value!r}")
    return number


def _names(field: str, value: Any) -> tuple[str, ...] | str | None:
    """Checks a field of names: None, a regular expression, or a collection of strings."""
    if value is None:
        return None
    is_text = isinstance(value, str)
    if is_text and field == "modules_to_save":
        raise TypeError(f"modules_to_save must be a list of names, got {value!r}")
    values = (value,) if is_text else value
    if not isinstance(values, Collection) or not all(isinstance(v, str) for v in values):
        raise TypeError(f"{field} must be strings, got {value!r}")
    for pattern in values if is_text or field == "layers_pattern" else ():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{field}={value!r} is no regular expression: {error}") from None
    if is_text:
        return value
    # A set has no order: sorted, so that equal configs are equal and hash alike.
    return tuple(sorted(values) if isinstance(values, (set, frozenset)) else values)
