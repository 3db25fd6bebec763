"""What `kvfold plan` tells of a source, as JSON data."""

from typing import Any

from kvfold.convert.planning.conversion_plan import ConversionPlan
from kvfold.convert.planning.parameters import source_parameters
from kvfold.convert.planning.plan import cache_dtype, make_plan
from kvfold.convert.planning.quick import hide_torch
from kvfold.convert.planning.settings import ConvertSettings
from kvfold.convert.source.fetch import fetch_config


def tell(
    source: str, settings: ConvertSettings, batch: int, priced: bool, device_flops: float | None
) -> tuple[ConversionPlan, dict[str, Any]]:
    """The plan for a local folder or a Hub id, and its record with `batch` sequences in the cache table; where it is `priced`,
    also what the conversion takes. For a process that ends behind it: see `hide_torch`.

    Raises UserError when there is no plan. One with refusals comes back, without a price.
    """
    config = fetch_config(source, settings.revision)
    if not priced:
        hide_torch(config)
    plan = make_plan(config, settings)
    dtype, parameters = cache_dtype(config, settings), source_parameters(config, plan.spec)
    record = plan.record(batch, dtype, parameters)
    if priced and not plan.refusals:
        from kvfold.convert.planning.cost import estimate

        record["cost"] = estimate(plan, parameters, dtype, device_flops)
    return plan, record
