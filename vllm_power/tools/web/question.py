"""What the planner is asked: a model's shape, a workload, GPUs and a pattern, validated."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from vllm_power.options import MODES, PowerOptions, resolve
from vllm_power.pattern import Pattern, PatternName, RowRule
from vllm_power.tools.web import gpus, shapes
from vllm_power.tools.web.drawing import MAX_TOKENS, Drawing
from vllm_power.tools.web.shapes import MOST_LAYERS, Shape

LEAST_BYTES = 1 / 8  # a number has at least a bit


class Question(Shape):
    """A model, a workload and a GPU. Any field of the shape beats the one of the preset ``model``.

    context: tokens of a prompt. output: tokens of its answer. concurrency: requests at a time. weight_bytes, kv_bytes:
    of one number. gpus: how many share the model (tensor parallelism). chunk: most tokens of a step
    (``--max-num-batched-tokens``). The pattern's fields are those of the options; left out, the paper's values. mode:
    how the model is served, which sets ``dense_tail``, ``decode`` and ``dense_layers`` where they are left out.
    """

    model: str | None = None
    context: int = Field(131_072, ge=1, le=MAX_TOKENS // 2)
    output: int = Field(1_024, ge=1, le=MAX_TOKENS // 2)
    concurrency: int = Field(8, ge=1, le=65_536)
    weight_bytes: float = Field(2, ge=LEAST_BYTES, le=4, allow_inf_nan=False)
    kv_bytes: float = Field(2, ge=LEAST_BYTES, le=4, allow_inf_nan=False)
    gpu: str = "H200 SXM"
    gpus: int = Field(1, ge=1, le=1024)
    chunk: int = Field(8_192, ge=1, le=1 << 20)
    mode: Literal["trained", "training_free"] = "trained"
    dense_tail: int = Field(0, ge=0, le=MAX_TOKENS)
    decode: Literal["pattern", "dense"] = "pattern"
    pattern: PatternName = "power"
    block_size: int | None = None
    sink_blocks: int | None = None
    window_blocks: int | None = None
    stride: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        known = shapes.known()
        values = dict(values)
        if values.get("model") is None:
            missing = [
                name
                for name, field in Shape.model_fields.items()
                if field.is_required() and name not in values
            ]
            if missing:
                raise ValueError(f"name a model ({', '.join(known)}) or give its {', '.join(missing)}")
        elif values["model"] not in known:
            raise ValueError(f"unknown model {values['model']!r}: one of {', '.join(known)}")
        else:
            values = {**known[values["model"]].model_dump(exclude_defaults=True), **values}
        sizes = [str(values.get(name, 0)) for name in ("layers", "window_layers")]
        if values.get("mode") in MODES and all(map(str.isdecimal, sizes)):
            layers, windows = map(int, sizes)
            if 0 < layers <= MOST_LAYERS and windows <= layers:
                values = {**fields_of(resolve({"mode": values["mode"]}, None), layers, windows), **values}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.gpu not in gpus.known():
            raise ValueError(f"unknown GPU {self.gpu!r}: one of {', '.join(gpus.known())}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads ({self.kv_heads}) must divide heads ({self.heads})")
        if self.experts_per_token > self.experts:
            raise ValueError(f"a token cannot use {self.experts_per_token} of {self.experts} experts")
        if self.pattern_layers < 0:
            raise ValueError(
                f"{self.dense_layers} dense layers and {self.window_layers} with a window are more than the "
                f"{self.layers} layers of the model"
            )
        _ = self.effective_pattern
        return self

    @property
    def rows(self) -> RowRule:
        """Which rows see everything."""
        return RowRule(self.dense_tail, self.decode == "dense")

    @property
    def effective_pattern(self) -> Pattern:
        """The pattern asked for. Raises ValueError if a number is out of range or it would take too long."""
        names = ("block_size", "sink_blocks", "window_blocks", "stride")
        fields = {name: value for name in names if (value := getattr(self, name)) is not None}
        try:
            return Drawing(
                pattern=self.pattern, tokens=self.context + self.output, **fields
            ).effective_pattern
        except ValidationError as error:
            problems = [problem["msg"].removeprefix("Value error, ") for problem in error.errors()]
            raise ValueError("; ".join(problems)) from None

    @property
    def pattern_layers(self) -> int:
        """Layers that run the pattern."""
        return self.layers - self.dense_layers - self.window_layers


def fields_of(asked: PowerOptions, layers: int, window_layers: int = 0) -> dict[str, Any]:
    """How a model of ``layers`` layers is served under these options, as fields of a question.

    Layers with a window keep it, also if the options name them; as many are named as if they were spread evenly.
    """
    dense = len(asked.dense_layer_indices(layers))
    return {
        "mode": asked.mode,
        "dense_tail": asked.dense_tail,
        "decode": asked.decode,
        "dense_layers": round(dense * (layers - window_layers) / layers),
    }
