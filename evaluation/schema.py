"""What report.json holds. Other programs read it: a change that they would notice raises `SCHEMA_VERSION`."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from kvfold.convert.source.jsonfile import checked, read_json
from kvfold.errors import UserError

SCHEMA_VERSION: Literal[2] = 2
Interval = tuple[float, float] | None
"""95% bootstrap interval over windows; None for a single window."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=False)


class NeedleCell(_Strict):
    """`recall` and `blind` (without the needle in the context) are shares of the value's tokens, `depth` of the haystack."""

    length: int
    depth: float
    recall: float
    blind: float
    gain_nats: float


class Needles(_Strict):
    key_tokens: int
    value_tokens: int
    trials: int
    cells: list[NeedleCell]


class Agreement(_Strict):
    """Tokens by which a model's greedy answers follow the source's, at most the whole answer: `mean` and `median` over prompts,
    the share that `never_leaves`, and `still`, the share that has not left after 1, 2, … tokens. `answer_tokens` is the mean
    length of the source's answers, which may end before `Greedy.tokens`."""

    prompts: int
    prompt_tokens: int
    answer_tokens: float
    mean: float
    mean_interval: Interval
    median: float
    never_leaves: float
    still: list[float]


class Greedy(_Strict):
    """Greedy answers beside the source's, in `dtype`. Of the source itself: those that it would give in another dtype, None
    where that does not fit into memory.

    `chat` are the same passages as a user's turn, None for a tokenizer without a chat template.
    """

    dtype: str
    tokens: int
    text: Agreement
    chat: Agreement | None


class Speed(_Strict):
    """None where memory did not suffice; peak memory is only known on CUDA."""

    context: int
    batch: int
    tokens_per_second: float | None
    cache_bytes: int | None
    peak_memory_bytes: int | None


class Metric(_Strict):
    value: float
    stderr: float | None


class Task(_Strict):
    """One task of lm-eval: its version, how many documents, and its metrics as lm-eval names them."""

    version: str
    samples: int
    metrics: dict[str, Metric]


class Measured(_Strict):
    """What is measured on the source and on every folded model. NLL in nats per token."""

    path: str = Field(pattern=r"^[^\x00]*$")
    nll: float
    perplexity: float
    bits_per_byte: float | None
    cache_numbers_per_token_per_layer: float = Field(gt=0)
    cache_bytes_per_token: float = Field(gt=0)
    parameters: int
    greedy: Greedy | None
    needles: Needles | None
    speed: list[Speed]
    tasks: dict[str, Task]


class Folded(Measured):
    """`damage_by_position` has one mean for each stretch of `Report.position_edges`; `conversion` is what kvfold.json says."""

    damage_nats: float
    damage_interval: Interval
    kl: float
    kl_interval: Interval
    top1_agreement: float
    top1_interval: Interval
    damage_by_position: list[float]
    attention_errors: list[float]
    stage: Literal["closed form", "healed", "uptrained", "unknown"]
    conversion: dict[str, Any] | None


class Measurement(BaseModel):
    """The settings of an evaluation, of which these are shown."""

    model_config = ConfigDict(extra="allow")

    on: str
    dtype: str


class Report(_Strict):
    """`tokens` are predicted tokens; `position_edges` cut the positions of a window, counted in tokens of context."""

    schema_version: Literal[2]
    version: str
    settings: Measurement
    device: str
    tokens: int
    bytes_per_token: float | None
    position_edges: list[int] = Field(min_length=2)
    source: Measured
    models: list[Folded] = Field(min_length=1)


def read_report(folder: Path) -> dict[str, Any]:
    """The report.json in `folder`. Raises UserError when there is none, or none that this version reads."""
    file = folder / "report.json"
    if not file.is_file():
        raise UserError(f"{file} does not exist: measure first, with kvfold evaluate OUT --on TEXT")
    data = read_json(file, "evaluate again")
    checked(Report, data, str(file), "evaluate again")
    return data
