"""Lines and tables that the trace commands print."""

import sys

from spimpi.printable import printable


class Output:
    """Rich on a terminal, whose width it keeps; elsewhere aligned plain text, never wrapped."""

    def __init__(self):
        self.console = None
        if sys.stdout.isatty():
            from rich.console import Console

            self.console = Console(highlight=False)

    def line(self, text: str, style: str | None = None) -> None:
        text = printable(text)
        if self.console:
            self.console.print(text, style=style, markup=False)
        else:
            print(text)

    def table(self, columns, rows, right=()) -> None:
        rows = [tuple(printable(cell) for cell in row) for row in rows]
        if self.console:
            self._rich_table(columns, rows, right)
            return
        lines = ([columns] if columns else []) + rows
        if not lines:
            return
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            cells = (
                cell.rjust(width) if i in right else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            print("  ".join(cells).rstrip())

    def _rich_table(self, columns, rows, right) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=bool(columns))
        for i, name in enumerate(columns or rows[0]):
            side = "right" if i in right else "left"
            table.add_column(name if columns else "", justify=side, overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        self.console.print(table)

