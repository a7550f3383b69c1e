"""The user's options, validated: ``--additional-config '{"power": {...}}'`` and the checkpoint's config.json.

A checkpoint trained under a pattern has it in config.json under ``power_attention``; it is used unless the command line
sets another. If the two contradict each other, the server would silently give wrong answers, so this is an error unless
``override_checkpoint`` is set.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_power.pattern import NAMES, POWER, Pattern, PatternName, RowRule, preset

if TYPE_CHECKING:
    from vllm.config import VllmConfig

NAME = "POWER"  # the backend's name in vLLM's registry; users write it in any case
TESTED = ((0, 32), (0, 33))  # versions of vLLM

COMMAND_LINE = "--additional-config '{\"power\": {...}}'"
CHECKPOINT = "power_attention in the checkpoint's config.json"

# What each mode sets if neither the command line nor the checkpoint does.
MODES: dict[str, dict[str, Any]] = {
    "trained": {"dense_tail": 0, "decode": "pattern", "dense_layers": [], "dense_requests": False},
    "training_free": {
        "dense_tail": 128,
        "decode": "dense",
        "dense_layers": {"every": 7, "keep": 2},
        "dense_requests": True,
    },
}


class PatternOptions(BaseModel):
    """The pattern: what a checkpoint may store and the command line may set. Unset fields have the paper's values."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    pattern: PatternName = Field("power", description="which blocks a query sees")
    block_size: int | None = Field(None, description="tokens in a block, a power of two; default 256")
    sink_blocks: int | None = Field(None, description="first blocks that every query sees")
    window_blocks: int | None = Field(None, description="latest blocks that a query sees, its own included")
    stride: int | None = Field(None, description="for stride_slash: every distance that it divides is seen")

    dense_layers: list[int] | str | dict[str, int] = Field(
        default_factory=list,
        description='layers that stay dense: [0, 27], "0-1,26-27" or {"every": 7, "keep": 2}',
    )
    dense_tail: int = Field(0, description="last tokens of the prompt that see every earlier token")
    decode: Literal["pattern", "dense"] = Field(
        "pattern", description='what generated tokens see: the pattern, or with "dense" every earlier token'
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
        """The fields that were given, not defaulted: of the pattern, the dense layers and the dense rows."""
        given = self.model_dump(include=set(PatternOptions.model_fields), exclude_unset=True)
        return {name: value for name, value in given.items() if value is not None}

    @property
    def effective_pattern(self) -> Pattern:
        """The pattern that these options describe. Unset fields have the paper's values for that pattern."""
        fields = self.set_by_user
        for other in ("dense_layers", "dense_tail", "decode"):
            fields.pop(other, None)
        return preset(fields.pop("pattern", POWER.name), **fields)

    @property
    def rows(self) -> RowRule:
        """Which rows see everything."""
        return RowRule(self.dense_tail, self.decode == "dense")

    @property
    def effective(self) -> tuple[Pattern, object, RowRule]:
        """The pattern, the dense layers and the row rule, in a comparable form."""
        return self.effective_pattern, canonical(self.dense_layers), self.rows

    def dense_layer_indices(self, num_layers: int) -> frozenset[int]:
        """The layers of a model of ``num_layers`` that stay dense. Raises ValueError for one outside the model."""
        return indices(self.dense_layers, num_layers)


class PowerOptions(PatternOptions):
    """Everything under ``power`` in ``--additional-config``."""

    mode: Literal["auto", "trained", "training_free"] = Field(
        "auto",
        description="trained: the pattern in every row. training_free: for a checkpoint that was not trained for it, "
        'dense_tail 128, decode "dense" and dense_layers {"every": 7, "keep": 2} unless set. auto: trained if the '
        "checkpoint carries power_attention",
    )
    executor: Literal["auto", "cpu", "triton", "flash_attn", "reference"] = Field(
        "auto",
        description="which kernels run the plan; auto takes the fastest that was measured for the device",
    )
    share_dense_rows: bool = Field(
        False,
        description="let prompts of other lengths reuse cached pages of dense rows: a chat's last answer need not be "
        "prefilled again, but answers then depend on what is cached",
    )
    dense_requests: bool = Field(
        False,
        description='serve requests that ask for dense attention, "vllm_xargs": {"power": "dense"}; default true in '
        "mode training_free. In mode trained it makes decode slower, and the KV cache must hold the longest sequence "
        "without reclamation",
    )
    reclaim: bool = Field(True, description="give KV blocks back as soon as no later query can see them")
    override_checkpoint: bool = Field(
        False, description="let the command line's pattern win over a different one in the checkpoint"
    )

    @property
    def rows(self) -> RowRule:
        """Which rows see everything, also in requests that ask for it."""
        return replace(super().rows, on_request=self.dense_requests)

    def dense_layer_indices(self, num_layers: int) -> frozenset[int]:
        """As in :class:`PatternOptions`. But if the default of a mode would make every layer of a small model dense, no
        layer is dense."""
        found = super().dense_layer_indices(num_layers)
        is_default = self.dense_layers == MODES[self.mode]["dense_layers"] if self.mode in MODES else False
        return frozenset() if is_default and len(found) == num_layers else found


def resolve(command_line: Mapping[str, Any] | None, checkpoint: Mapping[str, Any] | None) -> PowerOptions:
    """The effective options, from the ``power`` object of the command line and the checkpoint's; both may be None.

    The result's mode is "trained" or "training_free", and what that mode sets is in its fields.
    Raises ValueError for an unknown or invalid option and for a contradiction between the two.
    """
    options = _parse(PowerOptions, command_line or {}, COMMAND_LINE)
    if checkpoint is not None:
        options = _with_checkpoint(options, _parse(PatternOptions, checkpoint, CHECKPOINT))
    mode = options.mode
    if mode == "auto":
        mode = "training_free" if checkpoint is None else "trained"
    missing = {name: value for name, value in MODES[mode].items() if name not in options.model_fields_set}
    return options.model_copy(update={**missing, "mode": mode})


def _with_checkpoint(options: PowerOptions, stored: PatternOptions) -> PowerOptions:
    asked = options.set_by_user
    if not asked:
        return options.model_copy(update=stored.set_by_user)
    if options.override_checkpoint:
        return options
    merged = _parse(PowerOptions, {**stored.set_by_user, **asked}, COMMAND_LINE)
    if merged.effective[:2] != stored.effective[:2] or any(
        merged.set_by_user[name] != value
        for name, value in stored.set_by_user.items()
        if name in ("dense_tail", "decode")
    ):
        raise ValueError(
            f"two different patterns: the checkpoint was trained with {stored.effective_pattern} ({CHECKPOINT}: "
            f"{stored.set_by_user}), the command line asks for {merged.effective_pattern} ({COMMAND_LINE}: {asked}). "
            'Remove the pattern from the command line, or set "override_checkpoint": true to serve it anyway.'
        )
    return options.model_copy(update=merged.set_by_user)


def stored_in(*configs: Any) -> Mapping[str, Any] | None:
    """What a model stores under ``power_attention``: from the first of its Hugging Face configs that has it."""
    return next((found for config in configs if (found := getattr(config, "power_attention", None))), None)


def of_pattern(asked: Mapping[str, Any] | None, config: Any) -> PatternOptions:
    """The pattern that a transformers config and the options ``asked`` result in, merged as the server merges them.

    Raises ValueError as :func:`resolve` does.
    """
    asked = {"mode": "trained", **(asked or {})}
    return PatternOptions(**resolve(asked, stored_in(config, config.get_text_config())).set_by_user)


def of_config(vllm_config: "VllmConfig") -> PowerOptions:
    """The effective options of an engine, parsed once per configuration. Raises ValueError as :func:`resolve` does."""
    # Cached by the ids of the sources, which are kept alive so that no other object gets the same id. vLLM's
    # configurations accept no extra fields and are not hashable. A draft model's configuration is a copy of the
    # target's with another model.
    sources = (vllm_config.additional_config, vllm_config.model_config)
    key = (id(sources[0]), id(sources[1]))
    if key not in _parsed:
        if len(_parsed) >= MOST_PARSED:
            _parsed.pop(next(iter(_parsed)))
        _parsed[key] = (sources, resolve(asked_of(vllm_config), _stored(vllm_config)))
    return _parsed[key][1]


MOST_PARSED = 16  # configurations of a process: a target's, its draft model's, and copies of them
_parsed: dict[tuple[int, int], tuple[Any, PowerOptions]] = {}


def asked_of(vllm_config: "VllmConfig") -> Mapping[str, Any] | None:
    """The object ``power`` of the command line's ``--additional-config``, if it has one."""
    given = vllm_config.additional_config
    return given.get("power") if isinstance(given, Mapping) else None


def why_mode(vllm_config: "VllmConfig") -> str:
    """Why the mode is what it is, for the log line at startup."""
    if (asked_of(vllm_config) or {}).get("mode", "auto") != "auto":
        return "the option mode"
    carries = "no " if _stored(vllm_config) is None else ""
    return f"the checkpoint carries {carries}power_attention"


def _stored(vllm_config: "VllmConfig") -> Mapping[str, Any] | None:
    model = vllm_config.model_config
    return None if model is None else stored_in(model.hf_config, model.hf_text_config)


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


# --- dense layers: a list of indices, ranges as text, or the first k of every n (the paper, for RULER) -------------

DenseLayers = Sequence[int] | str | Mapping[str, int]

MOST = 10_000  # more layers than any model has: a larger number is a mistake, and must not fill the memory


def indices(value: DenseLayers, num_layers: int) -> frozenset[int]:
    """The indices that ``value`` names in a model of ``num_layers`` layers.

    [0, 27] and "0,27" name layers, "0-1,26-27" names ranges including both ends, and {"every": 7, "keep": 2} names the
    first two of every seven. Raises ValueError for any other form, and for an index outside the model.
    """
    if isinstance(value, Mapping):
        every, keep = _every(value)
        return frozenset(index for index in range(num_layers) if index % every < keep)
    _check_size(value)
    named = frozenset(_ranges(value) if isinstance(value, str) else value)
    outside = sorted(index for index in named if not 0 <= index < num_layers)
    if outside:
        more = f" and {len(outside) - 8} more" if len(outside) > 8 else ""
        raise ValueError(
            f"dense_layers names layer {', '.join(map(str, outside[:8]))}{more}; the model has {num_layers} layers, "
            f"0 to {num_layers - 1}"
        )
    return named


def canonical(value: Any) -> frozenset[int] | tuple[int, int]:
    """A form in which two ways of naming the same layers are equal. Raises ValueError if ``value`` is invalid."""
    if isinstance(value, Mapping):
        return _every(value)
    if isinstance(value, Sequence):
        _check_size(value)
    if isinstance(value, str):
        return frozenset(_ranges(value))
    if isinstance(value, Sequence) and all(type(index) is int for index in value):
        return frozenset(value)
    raise ValueError(
        f'dense_layers must be like [0, 27], "0-1,26-27" or {{"every": 7, "keep": 2}}, not {value!r}'
    )


def _check_size(value: str | Sequence[int]) -> None:
    """Raise ValueError if there are more characters or numbers than any model's layers need."""
    if len(value) > MOST:
        raise ValueError(f"dense_layers has {len(value):,} characters or numbers: at most {MOST:,}")


def _every(value: Mapping[str, int]) -> tuple[int, int]:
    if set(value) != {"every", "keep"} or not all(type(number) is int for number in value.values()):
        raise ValueError(f'dense_layers must be like {{"every": 7, "keep": 2}}, not {dict(value)!r}')
    if not 0 <= value["keep"] <= value["every"] or value["every"] < 1:
        raise ValueError(f"dense_layers cannot keep {value['keep']} of every {value['every']} layers")
    return value["every"], value["keep"]


def _ranges(text: str) -> list[int]:
    named: list[int] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, _, last = part.partition("-")
        if not first.isdigit() or (last and not last.isdigit()) or part.endswith("-"):
            raise ValueError(f'dense_layers: {part!r} is neither a layer nor a range like "26-27"')
        if int(last or first) < int(first):
            raise ValueError(f"dense_layers: the range {part} runs backwards")
        if int(last or first) > MOST:
            raise ValueError(f"dense_layers: {part} names layers that no model has")
        named.extend(range(int(first), int(last or first) + 1))
        if len(named) > MOST:
            raise ValueError(f"dense_layers names more than {MOST:,} layers")
    return named
