from spimpi.cli import entry

entry()
