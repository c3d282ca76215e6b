"""What ``deltafmt pack`` says of a file that it has made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltafmt.checkpoint.weight_names import bounded
from deltafmt.pipeline.summary import left_out_line, plural, times
from deltafmt.tools import console
from deltafmt.tools.calibration_options import calibration_obj, say_calibration
from deltafmt.tools.name_arguments import names_obj, say_names
from deltafmt.tools.quantized_arguments import say_dequantized
from deltafmt.tools.targets import plan_obj, say_chosen

if TYPE_CHECKING:
    from deltafmt.methods import Method
    from deltafmt.pipeline.pack_result import PackResult

MENTIONED = 10


def result_obj(result: PackResult) -> dict[str, Any]:
    """Return what a pack did as a plain object."""
    return {
        "file": str(result.path),
        "bytes": result.size,
        "finetuned_bytes": result.finetuned_bytes,
        "ratio": round(result.ratio, 4),
        "content_id": result.content_id,
        "actions": result.actions,
        "kept_exactly": result.kept,
        "in_base_only": len(result.removed),
        "removed": result.removed,
        "taken_from_base": result.taken,
        "not_in_index": result.unlisted,
        "attached": result.attached,
        "left_out": result.left_out,
        "remarks": result.remarks,
        "base_name": result.base_name or None,
        "names": names_obj(result.names),
        "dequantized": result.dequantized.to_obj(),
        "unmatched": {"finetuned": result.unmatched, "base": result.unmatched_base},
        "architecture": result.architecture or None,
        "narrow": result.narrow,
        "resumed_tensors": result.resumed,
        "restored_files": result.restored,
        "served": {"bytes": result.served, "content_id": result.served_id} if result.served else None,
        **calibration_obj(result),
        **({"plan": plan_obj(result.choice)} if result.choice else {}),
    }


def report(result: PackResult, method: Method, finetuned: str, *, as_json: bool) -> None:
    """Say what a pack did."""
    console.warn_left_out(result.left_out)
    for line in remarks(result):
        console.warn(line)
    if as_json:
        console.say_json({"ok": True, **result_obj(result)})
        return
    if result.path is None:
        return
    resumed = f" (went on after {plural(result.resumed, 'tensor')})" if result.resumed else ""
    smaller = f"{times(result.ratio)} than {finetuned}"
    console.say(f"{result.path}: {result.size:,} bytes, {smaller}{resumed}")
    console.say(actions(result))
    say_names(result.names)
    say_dequantized(result.dequantized, ask=True)
    if result.unmatched:
        console.say(
            f"warning: {plural(len(result.unmatched), 'tensor')} of the fine-tune's layers and "
            f'{len(result.unmatched_base):,} of the base\'s have no counterpart, such as "{result.unmatched[0]}" and '
            f'"{result.unmatched_base[0]}"; --rename FROM=TO says what belongs together'
        )
    if result.architecture:
        console.say(f"the types of the models differ: {result.architecture}")
    if result.removed:
        console.say(left_out_line(result.removed))
    if result.taken:
        console.say(f"taken from the base: {plural(len(result.taken), 'tensor')}: {bounded(result.taken)}")
    _say_files(result)
    if result.choice:
        say_chosen(result.choice)
    elif result.narrow:
        console.say(narrow(result.narrow, method))
    say_calibration(result, MENTIONED)
    from deltafmt.pipeline.plan import CHOSEN

    # Whoever asked for a tensor to be stored whole knows it; other reasons may surprise.
    surprising = [f"stored whole: {name} ({reason})" for name, reason in result.kept.items() if reason not in CHOSEN]
    for line in surprising[:MENTIONED]:
        console.say(line)
    if len(surprising) > MENTIONED:
        console.say(f"and {len(surprising) - MENTIONED:,} more matrices stored whole; inspect --tensors lists them")


def _say_files(result: PackResult) -> None:
    """Say which files travel."""
    if result.served:
        smaller = times(result.finetuned_bytes / result.served)
        console.say(f"served from its first {result.served:,} bytes, {smaller}; content id {result.served_id}")
    if result.restored:
        console.say(f"restored byte for byte by unpack: {bounded(result.restored)}")
    if result.attached:
        console.say(f"attached: {bounded(result.attached, 30)}")


def remarks(result: PackResult) -> list[str]:
    """Return the remarks about the inputs, and which tensors the index does not name."""
    found = list(result.remarks)
    if result.unlisted:
        shards = ", ".join(dict.fromkeys(result.unlisted.values()))
        found.append(
            f"{plural(len(result.unlisted), 'tensor')} of {shards} that the index does not name, packed all the same "
            f"as loaders read them: {bounded(result.unlisted)}"
        )
    return found


def actions(result: PackResult) -> str:
    """Return how many tensors were stored how, such as ``57 tensors compressed, 17 small ones stored whole``."""
    large = len(result.kept)
    small = result.actions.get("replace", 0) - large
    counts = {
        f"small {'one' if small == 1 else 'ones'} stored whole": small,
        f"{'matrix' if large == 1 else 'matrices'} stored whole": large,
        "same as the base": result.actions.get("same", 0),
        "tied to another": result.actions.get("alias", 0),
    }
    added, exact = result.actions.get("add", 0), result.actions.get("exact", 0)
    first = [f"{plural(added, 'tensor')} compressed"] if added or not exact else []
    first += [f"{plural(exact, 'tensor') if not first else f'{exact:,}'} exact"] if exact else []
    return ", ".join([*first, *(f"{number:,} {words}" for words, number in counts.items() if number)])


def narrow(number: int, method: Method) -> str:
    """Return the warning about matrices of so few columns that dropping most of a row does not average out."""
    from deltafmt.methods.declare import options_of

    verb = "matrix is" if number == 1 else "matrices are"
    nm = options_of(type(method)).get("nm")
    kept, mended = ("", "") if nm is None else (f" with {nm.write(nm.of(method))}", "--nm 2:2, or ")
    return (
        f"warning: {number:,} {verb} 256 columns wide or less;{kept} the restored model will probably not work. "
        f"Use {mended}--target-ratio R"
    )
