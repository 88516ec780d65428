"""Bytes, ranks and lists as people read them."""


def in_bytes(n: int) -> str:
    """A number of bytes with a binary unit: 17 B, 2.9 MiB."""
    value = float(n)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            return f"{n} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024


def counted(n: int, noun: str = "element") -> str:
    """'1 element', '3 elements'."""
    return f"{n} {noun}{'s' * int(n != 1)}"


def are(n: int, noun: str = "element") -> str:
    """'1 element is', '3 elements are'."""
    return f"{counted(n, noun)} {verb(n)}"


def verb(n: int) -> str:
    return "is" if n == 1 else "are"


SHOWN = 8  # of a list


def listed(items) -> str:
    """'0, 2', '0, 1, 2, 3, 4, 5, 6, 7, …'."""
    return ", ".join(map(str, items[:SHOWN])) + ", …" * (len(items) > SHOWN)


def ranks_text(ranks) -> str:
    """'rank 3', 'ranks 0, 2', 'ranks 0, 1, 2, 3, 4, 5, 6, 7, … (64 in all)'."""
    more = f" ({len(ranks)} in all)" * (len(ranks) > SHOWN)
    return f"rank{'s' * (len(ranks) != 1)} {listed(ranks)}{more}"
