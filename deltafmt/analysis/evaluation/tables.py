"""The table of an evaluation, for the terminal and for the HTML page."""

from __future__ import annotations

from deltafmt.analysis.evaluation.figures import Evaluation, ModelFigures
from deltafmt.analysis.tables import Table, figure, percent

ROLES = {"base": "base", "finetuned": "fine-tune", "delta": "delta"}


def table(evaluation: Evaluation) -> Table:
    """Return a row for each model, with the columns about continuations if there are any."""
    head = ["", "model", "bytes", "times smaller", "log-likelihood", "lost", "standard error"]
    head += ["same most likely token", "KL divergence", "of 1% above"]
    if evaluation.continuations:
        head += ["same continuations", "tokens before they part"]
    return Table("Predictions", note(evaluation), [head, *(_row(evaluation, model) for model in evaluation.models)])


def note(evaluation: Evaluation) -> str:
    """Return how to read the table."""
    text = (
        f"{evaluation.counted:,} predicted tokens in {evaluation.sequences:,} sequences of {evaluation.text}. "
        "Log-likelihood of a token in nats, what it lost against the fine-tune's, and the standard error of that; "
        "share of tokens whose most likely token is the fine-tune's; mean KL divergence from the fine-tune's "
        "distribution in nats, and what 1% of the tokens exceed."
    )
    if evaluation.continuations:
        longest = max(evaluation.continuations)
        text += (
            f" Greedy continuations of {len(evaluation.continuations)} prompts, up to {longest} tokens: those that the "
            "model would write as the fine-tune does, and the mean number of tokens before the two part."
        )
    return text


def _row(evaluation: Evaluation, model: ModelFigures) -> list[str]:
    lost = ["-", "-"] if model.role == "finetuned" else [signed(model.lost), figure(model.lost_error)]
    row = [ROLES[model.role], model.label, f"{model.size:,}", f"{evaluation.finetuned_bytes / model.size:.2f}"]
    row += [f"{model.log_likelihood:.4f}", *lost, percent(model.agreement), figure(model.divergence)]
    row.append(figure(model.quantiles[-1] if model.quantiles else None))
    if evaluation.continuations:
        count = len(evaluation.continuations)
        row += [f"{evaluation.same(model)} of {count}", f"{sum(model.followed) / count:.1f}"]
    return row


def signed(value: float) -> str:
    """Return a difference with four decimals, or as a power of ten if that shows nothing of it."""
    return f"{value:.4f}" if not value or abs(value) >= 5e-4 else f"{value:.1e}"
