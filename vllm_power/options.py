"""What the user may say, validated: ``--additional-config '{"power": {...}}'`` and the checkpoint's config.json.

A checkpoint trained under a pattern carries it in config.json under ``power_attention``; it is used unless the command
line says otherwise. Where the two contradict each other, serving the model would give wrong answers without a sign, so
that is an error, unless ``override_checkpoint`` says that it is meant.
"""

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_power.dense_layers import canonical, indices
from vllm_power.pattern import NAMES, POWER, Pattern, preset

if TYPE_CHECKING:
    from vllm.config import VllmConfig

COMMAND_LINE = "--additional-config '{\"power\": {...}}'"
CHECKPOINT = "power_attention in the checkpoint's config.json"


class PatternOptions(BaseModel):
    """The pattern: what a checkpoint may store and the command line may set. A field left out has the paper's value."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    pattern: Literal["power", "sliding_window", "stride_slash", "dilated", "longnet", "full"] = Field(
        "power", description="which blocks a query sees"
    )
    block_size: int | None = Field(None, description="tokens in a block, a power of two; default 256")
    sink_blocks: int | None = Field(None, description="first blocks that every query sees")
    window_blocks: int | None = Field(None, description="latest blocks that a query sees, its own included")
    stride: int | None = Field(None, description="for stride_slash: every distance that it divides is seen")

    dense_layers: list[int] | str | dict[str, int] = Field(
        default_factory=list,
        description='layers that stay dense: [0, 27], "0-1,26-27" or {"every": 7, "keep": 2}',
    )

    @model_validator(mode="before")
    @classmethod
    def _unknown_names(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            raise ValueError(f"must be an object of options, not {values!r}")
        for key in values:
            if key not in cls.model_fields:
                raise ValueError(f"unknown option {key!r}{_nearest(key, cls.model_fields)}")
        name = values.get("pattern", POWER.name)
        if isinstance(name, str) and name not in NAMES:
            raise ValueError(f"unknown pattern {name!r}{_nearest(name, NAMES)}")
        return values

    @model_validator(mode="after")
    def _in_range(self) -> "PatternOptions":
        _ = self.effective
        return self

    @property
    def set_by_user(self) -> dict[str, Any]:
        """The fields of the pattern, and the dense layers, that were given, not defaulted."""
        given = self.model_dump(include=set(PatternOptions.model_fields), exclude_unset=True)
        return {name: value for name, value in given.items() if value is not None}

    @property
    def effective_pattern(self) -> Pattern:
        """The pattern that these options describe; a field left out has the paper's value for that pattern."""
        fields = self.set_by_user
        fields.pop("dense_layers", None)
        return preset(fields.pop("pattern", POWER.name), **fields)

    @property
    def effective(self) -> tuple[Pattern, object]:
        """The pattern and the dense layers, in a form that compares."""
        return self.effective_pattern, canonical(self.dense_layers)

    def dense_layer_indices(self, num_layers: int) -> frozenset[int]:
        """The layers of a model of ``num_layers`` that stay dense. Raises ValueError for one outside the model."""
        return indices(self.dense_layers, num_layers)


class PowerOptions(PatternOptions):
    """Everything under ``power`` in ``--additional-config``."""

    executor: Literal["auto", "cpu", "triton", "flash_attn", "reference"] = Field(
        "auto",
        description="which kernels run the plan; auto takes the fastest that was measured for the device",
    )
    reclaim: bool = Field(True, description="give KV blocks back as soon as no later query can see them")
    override_checkpoint: bool = Field(
        False, description="let the command line's pattern win over a different one in the checkpoint"
    )


def resolve(command_line: Mapping[str, Any] | None, checkpoint: Mapping[str, Any] | None) -> PowerOptions:
    """The options in force, from the ``power`` object of the command line and the checkpoint's, either perhaps None.

    Raises ValueError for an unknown or invalid option and for a contradiction between the two.
    """
    options = _parse(PowerOptions, command_line or {}, COMMAND_LINE)
    if checkpoint is None:
        return options
    stored = _parse(PatternOptions, checkpoint, CHECKPOINT)
    asked = options.set_by_user
    if not asked:
        return options.model_copy(update=stored.set_by_user)
    if options.override_checkpoint:
        return options
    merged = _parse(PowerOptions, {**stored.set_by_user, **asked}, COMMAND_LINE)
    if merged.effective != stored.effective:
        raise ValueError(
            f"two different patterns: the checkpoint was trained with {stored.effective_pattern} ({CHECKPOINT}: "
            f"{stored.set_by_user}), the command line asks for {merged.effective_pattern} ({COMMAND_LINE}: {asked}). "
            'Leave the pattern out of the command line, or say "override_checkpoint": true to serve it all the same.'
        )
    return options.model_copy(update=merged.set_by_user)


def stored_in(*configs: Any) -> Mapping[str, Any] | None:
    """What a model stores under ``power_attention``: of its Hugging Face configurations, the first that has it."""
    return next((found for config in configs if (found := getattr(config, "power_attention", None))), None)


def of_pattern(asked: Mapping[str, Any] | None, config: Any) -> PatternOptions:
    """The pattern that a transformers config and the options ``asked`` for it make, put together as the server does.

    Raises ValueError as :func:`resolve` does.
    """
    return PatternOptions(**resolve(asked, stored_in(config, config.get_text_config())).set_by_user)


def of_config(vllm_config: "VllmConfig") -> PowerOptions:
    """The options in force for an engine. Raises ValueError as :func:`resolve` does."""
    command_line = None
    if isinstance(vllm_config.additional_config, Mapping):
        command_line = vllm_config.additional_config.get("power")
    model = vllm_config.model_config
    checkpoint = None if model is None else stored_in(model.hf_config, model.hf_text_config)
    return resolve(command_line, checkpoint)


def _parse(model: type[PatternOptions], values: Mapping[str, Any], source: str) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(
            ": ".join([*map(str, problem["loc"]), problem["msg"].removeprefix("Value error, ")])
            for problem in error.errors()
        )
        raise ValueError(f"{source}: {problems}") from None


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
