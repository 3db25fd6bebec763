"""What a user can set for an evaluation."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

from kvfold.convert.planning.settings import normal_dtype, setting

TEXT, REPORT = "Text", "Report"
"""Panels of `--help`."""


def _names(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    names = [name for part in value.split(",") if (name := part.strip())]
    if not names:
        raise ValueError("is empty: name one or more, separated by commas")
    return names


def _dtype(value: str) -> str:
    return value if value == "auto" else normal_dtype(value) or value


class EvaluateSettings(BaseModel):
    """All that decides what a report says."""

    model_config = ConfigDict(extra="forbid")

    on: str = setting(..., TEXT, "Held-out text or tokens, as --calibrate of convert takes them.")
    window: int = setting(512, TEXT, "Tokens in a window.", ge=2)
    max_tokens: int = setting(65536, TEXT, "Tokens to evaluate on, from the beginning.", gt=0)
    batch: int = setting(8, TEXT, "Windows in a forward pass.", ge=1)
    device: str = setting("auto", TEXT, "auto, cpu, cuda or cuda:N.")
    dtype: Annotated[str, AfterValidator(_dtype)] = setting(
        "float32", TEXT, "float32, bfloat16, float16, or auto for the checkpoint's own."
    )
    detail: Literal["damage", "quick", "normal", "full"] = setting(
        "normal", REPORT, "How finely answers, needles and decoding are sampled; damage leaves them out."
    )
    tasks: Annotated[list[str], BeforeValidator(_names)] = setting(
        [], REPORT, "Benchmarks of lm-eval, arc_easy,hellaswag,…; needs kvfold[tasks]."
    )
    include_path: str | None = setting(None, REPORT, "Folder with task files of your own for --tasks.")
    limit: int | None = setting(None, REPORT, "Documents of each task. Default: all.", gt=0)
