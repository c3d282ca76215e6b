"""What an error of the library means for somebody at the command line: the option that would help."""

from __future__ import annotations

import shlex

from deltafmt.errors import DeltafmtError, Remedy

# By the keyword argument that a remedy names; VALUE stands for the remedy's value.
_SENTENCES = {
    "allow_architecture": "--allow-architecture accepts them all the same",
    "base_version": "--base-version V says which",
    "base": "--base FOLDER names the base",
    "calibration": "--calibration FILE names a text for the fine-tune to read",
    "code": "--code write writes it all the same, --code leave leaves code out",
    "encoding": "--encoding VALUE can",
    "exclude": "--exclude VALUE stores the tensor whole",
    "finetuned": "NAME=VALUE gives it another name",
    "force": "--force replaces it",
    "limits": "--VALUE raises the limit",
    "missing": "--missing same takes from the base what is lacking, --missing removed leaves it out",
    "no_attach": "--no-attach VALUE leaves it out",
    "out": "-o - writes to standard output",
    "profile": "--profile VALUE allows it",
    "quantized": "--quantized VALUE takes the stored bytes as they are",
    "tensors_only": "--tensors-only leaves such files out",
    "to": "--to version-folder or --to trl names one",
    "version": "--model-version V says which",
    "rename": "--rename 'FROM=TO' or --strip-prefix PREFIX says what belongs together",
}


def message_of(error: DeltafmtError) -> str:
    """Return an error's message with the option that would help, as in ``x.deltafmt exists; --force replaces it``."""
    return str(error) if error.remedy is None else f"{error}; {sentence(error.remedy)}"


def sentence(remedy: Remedy) -> str:
    """Return what the command line's user can do."""
    return _SENTENCES[remedy.option].replace("VALUE", shlex.quote(str(remedy.value)))
