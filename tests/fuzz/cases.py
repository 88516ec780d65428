"""A case of the campaign, and the registry of its kinds."""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """One command on inputs of which something was changed.

    ``write(folder, changes)`` makes the inputs, also with some of the changes alone;
    ``may_find_corruption``: whether exit status 1 can be the truth.
    """

    kind: str
    argv: tuple
    changes: tuple
    write: Callable[[Path, tuple], None]
    may_find_corruption: bool = False


KINDS: dict[str, tuple[int, Callable]] = {}


def kind(weight: int):
    """Register ``draw(rng, sound) -> Case`` by its name; ``weight``: how often it is drawn."""

    def register(draw):
        KINDS[draw.__name__] = (weight, draw)
        return draw

    return register


def draw(seed: int, number: int, sound: Path) -> Case:
    """Case ``number`` of a campaign: the same whenever it is asked for."""
    rng = random.Random(f"{seed}:{number}")
    weights = [weight for weight, _ in KINDS.values()]
    _, chosen = rng.choices(list(KINDS.values()), weights)[0]
    return chosen(rng, sound)


def link(sound: Path, folder: Path, *names) -> None:
    """Sound files in a case's folder, by hard links: writing through one shows in ``sound``."""
    for name in names:
        source = sound / name
        for each in source.iterdir() if source.is_dir() else (source,):
            place = folder / each.relative_to(sound)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.link(each, place)


def fresh(path: Path, data: bytes | str) -> None:
    """Write a file in the place of a link to a sound one."""
    path.unlink(missing_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode(errors="surrogatepass"))
