"""Faults in the running program: what ``spimpi verify`` sees of them, and what it does not.

``--inject`` strikes tensors where checks are known to look. Here the program itself is patched while
it runs (hooks.py): arguments, results and arrays in memory, at chosen moments, on real MPI ranks, in
many modes (modes.py), with a golden run and without one. A fault is one entry of a registry
(faults.py and its parts). A trial (trial.py) tells whether it struck, what it changed of logits and
text, and what the verdict was; table.py makes the tables of docs/what-pass-means.md.

    spimpi bench runtime-faults --output docs/runtime-faults.csv
"""



def measure(output: str | None = None) -> dict:
    """The tables as Markdown; ``output``: a file for all that was found (CSV). Takes minutes. Local."""
    from spimpi.bench.runtime_faults.campaign import measure

    return measure(output)
