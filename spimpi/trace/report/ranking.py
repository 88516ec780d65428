"""Which of several runs is the worst, and what all of them together are."""

from spimpi.trace.report import words
from spimpi.trace.report.facts import Run

CORRUPTED, DIFFERENT, INCOMPLETE, SOUND = range(4)
COUNTED = {
    CORRUPTED: "{} corrupted", DIFFERENT: "{} verified, and different from the first run",
    INCOMPLETE: "{} incomplete, or not comparable with the first run", SOUND: "{} verified",
}  # fmt: skip


def severity(run: Run, found) -> int:
    """What is wrong with a run, the least number the worst. ``found``: its difference from the
    first run, or why there is none; None for the first run itself."""
    if run.located.verdict == "corrupted":
        return CORRUPTED
    if found is not None and not isinstance(found, str) and found.first >= 0:
        return DIFFERENT
    incomplete = run.located.exit_status or (found is not None and isinstance(found, str))
    if incomplete or (found is not None and found.exit_status):
        return INCOMPLETE
    return SOUND


def place(run: Run, found) -> tuple:
    """Sorts runs, the worst first; equally bad ones stay in their order."""
    return severity(run, found), -run.located.n_roots, -run.located.n_failed


def overall(runs: list[Run], differences: list, worst: int) -> dict:
    """What the page's title and its top say. ``worst``: which run is."""
    kinds = [severity(run, found) for run, found in zip(runs, [None, *differences])]
    word, class_, mark = {
        CORRUPTED: words.VERDICTS["corrupted"], DIFFERENT: words.DIFFERENT,
        INCOMPLETE: words.VERDICTS["incomplete"], SOUND: words.VERDICTS["verified"],
    }[min(kinds)]  # fmt: skip
    counts = [(kind, kinds.count(kind)) for kind in COUNTED]
    sentence = "; ".join(COUNTED[kind].format(n) for kind, n in counts if n)
    run = runs[worst]
    return {
        "word": word, "class_": class_, "mark": mark, "name": run.path.name,
        "sentence": f"Of {len(runs)} runs {sentence}.",
        "worst": f"The worst: {run.path.name} ({words.origin(run)})" if min(kinds) < SOUND else "",
        "first": words.place(run.first) if run.first else "",
    }  # fmt: skip
