"""Numbers as people read them."""


def in_bytes(n: int) -> str:
    """A number of bytes with a binary unit: 17 B, 2.9 MiB."""
    value = float(n)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            return f"{n} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
