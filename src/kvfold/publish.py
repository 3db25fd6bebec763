"""What a checkpoint's card says: from its kvfold.json, its report, and what the Hub knows of its source."""

from pathlib import Path

from kvfold.convert.publishing import card, hub
from kvfold.evaluation import report as reports


def facts_for(out: Path, repo: str, report_dir: Path, licence: str | None, base_model: str | None) -> card.Facts:
    """All that the card of `out` in the repository `repo` is made from.

    Raises:
        UserError: no report measured this checkpoint, no licence is known, or a name is none.
    """
    record = card.read_record(out)
    report, model, plot = reports.for_card(report_dir, out)
    source = str(record["source"])
    if base_model is not None:
        hub.refuse_name(base_model)
    elif not Path(source).exists() and hub.is_name(source):
        base_model = source
    return card.Facts(
        out=out,
        repo_id=repo,
        base_model=base_model,
        licence=card.Licence(licence) if licence else hub.licence_of(out, source, base_model),
        report=report,
        model=model,
        table=reports.markdown({**report, "models": [{**model, "name": repo.split("/")[-1]}]}),
        legend=reports.LEGEND,
        plot=plot,
    )
