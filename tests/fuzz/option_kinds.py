"""The command line: options, the words of its little languages, the environment."""

from cases import Case, kind, link
from hostile import FLOATS, INTEGERS, TEXTS

NUMBERS = (*map(str, INTEGERS), *map(str, FLOATS), "9" * 5000, "1e400", "0x10", "1_000", "٣", "²", " 1", "+1", "1.0")
TOPOLOGIES = (
    "tp=1", "tp=1,tp=1", "tp=", "=1", "tp", ",", "exo", "tp=1;pp=1", "TP=1", "tp=1,pp=0", "tp=-1",
    "tp=1,pp=1,dp=1,sp=1,tp=1", "exo,exo", "tp=1" + ",pp=1" * 10_000,
)  # fmt: skip
FAULTS = (
    "bitflip", "bitflip:", ":", "bitflip:rank=0", "bitflip:rank=0,layer=0,tensor=hidden",
    "swap:rank=0,layer=0,tensor=hidden,element=0,other=0", "bitflip:rank=0,rank=0,layer=0,tensor=hidden",
    "stale:rank=0,layer=0,tensor=hidden,step=1", "miscompute:rank=0,layer=0,tensor=qkv",
    "bitflip:rank=0,tensor=tokens,bit=63", "bitflip:" + "rank=0," * 10_000, "x" * 100_000,
    "bitflip:rank=0,layer=0,tensor=hidden,bit={}", "bitflip:rank={},layer=0,tensor=hidden",
    "bitflip:rank=0,layer={},tensor=hidden", "bitflip:rank=0,layer=0,tensor=hidden,step={}",
    "bitflip:rank=0,layer=0,tensor=hidden,element={}",
)  # fmt: skip
MEMORIES = ("1", "1,2", "1e999999999", "1e-999999999", "nan", "inf", "-1", "", ",", "0", "1" * 5000, "1/3", "1e400")
PLACES = ("", ".", "/", "nosuch/x.h5", "a" * 5000, "/proc/x.h5", "/dev/full", "/dev/null", "x\nb.h5", "fifo", "\x1b[2J.h5", "x.h5", "folder", "model/config.json/x", "run.h5", "loop", "-")

VERIFY = {
    "--model": ("model", "sharded", "manifest.json", *PLACES),
    "--config": ("llama-3.2-1b", "llama", *TEXTS), "--layers": NUMBERS, "--tokens": NUMBERS,
    "--seed": NUMBERS, "--repeat": ("0", "-1", "x", "1", "1.5"), "--timeout": NUMBERS,
    "--expect-ranks": NUMBERS, "--topology": (*TOPOLOGIES, *(f"tp={n}" for n in NUMBERS)),
    "--memory": MEMORIES, "--exo-rule": ("exo", "gay", *TEXTS), "--arith": ("exact", "blas", *TEXTS),
    "--golden": ("golden.h5", *PLACES), "--manifest": ("manifest.json", *PLACES),
    "--inject": (*FAULTS, *TEXTS), "--trace": PLACES, "--journal": PLACES,
    "--trace-driver": ("parts", "gather", "mpio", "auto", *TEXTS), "--prompt": TEXTS,
    "--prompt-ids": ("1,2", "1,", ",", "-1", "64", "1 2", *NUMBERS, "1," * 10_000), "--sketch": (),
    "--overwrite": (), "--json": (), "--sync": (), "--no-trace": (), "--help": (), "--bogus": (),
}  # fmt: skip
OTHERS = {
    ("trace", "show"): {"": ("run.h5", *PLACES), "--json": ()},
    ("trace", "check"): {"": ("run.h5", *PLACES), "--json": ()},
    ("trace", "recover"): {"": ("run.h5", *PLACES), "--overwrite": ()},
    ("trace", "diff"): {"": ("run.h5", "failed.h5", *PLACES)},
    ("trace", "locate"): {"": ("run.h5", "failed.h5", *PLACES)},
    ("trace", "export"): {"": ("run.h5", *PLACES), "-o": ("x.json", "x.csv", "x.xyz", *PLACES), "--overwrite": ()},
    ("trace", "report"): {"": ("run.h5", *PLACES), "-o": ("x.html", *PLACES), "--overwrite": ()},
    ("manifest", "make"): {"": ("model", *PLACES), "-o": ("m.json", *PLACES), "--seed": NUMBERS, "--threads": NUMBERS, "--derived": (), "--expect-ranks": NUMBERS},
    ("manifest", "check"): {"": ("manifest.json", "model", *PLACES), "--threads": NUMBERS, "--json": ()},
    ("golden",): {"--model": ("model", *PLACES), "-o": ("g.h5", *PLACES), "--tokens": ("1", "0", "x"), "--prompt-ids": ("1,2", *NUMBERS)},
    ("doctor",): {"--json": (), "--expect-ranks": NUMBERS, "": TEXTS},
    ("bench",): {"": ("nosuch", *TEXTS), "--json": ()},
    ("completion",): {"": ("bash", "zsh", "fish", *TEXTS)},
    (): {"": TEXTS, "--version": (), "--help": ()},
}  # fmt: skip
ENVIRONMENT = {
    name: ("", "0", "-1", "x", "²", "1e9", "9" * 5000, "\x1b[2J")
    for name in (
        "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMI_SIZE", "PMIX_RANK",
        "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID",
        "NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "COLUMNS", "TERM", "NO_COLOR", "HOME",
    )
}  # fmt: skip
ENVIRONMENT["SLURM_STEP_TASKS_PER_NODE"] += ("4(x1000000000)", "4(x²)")


def _draw(rng, command, options, most) -> list[tuple]:
    """Options with values, as tuples; a positional word is an option of no name."""
    chosen = []
    for name in rng.choices(list(options), k=rng.randint(1, most)):
        values = options[name]
        word = rng.choice(values) if values else None
        if word is not None and "{}" in word:
            word = word.format(rng.choice(NUMBERS))
        chosen.append((name, word))
    return chosen


def _words(changes) -> list[str]:
    found = []
    for name, word in changes:
        found += [name] * bool(name) + ([word] if word is not None else [])
    return [w.replace("\0", "").encode("utf-8", "replace").decode() for w in found]


def _places(sound, folder):
    """What the words of PLACES name."""
    import os

    link(sound, folder, "model", "sharded", "manifest.json", "golden.h5", "run.h5", "failed.h5")
    os.mkfifo(folder / "fifo")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")


OF_A_TRACE = ("--trace", "--sketch", "--journal", "--sync", "--overwrite", "--trace-driver")


@kind(22)
def options_of_verify(rng, sound):
    changes = tuple(_draw(rng, "verify", VERIFY, 3))
    base = ["verify", "--prompt-ids", "1,2", "--model", "model", "--timeout", "120"]
    base += [] if any(n in OF_A_TRACE for n, _ in changes) else ["--no-trace"]
    base += [] if any(n == "--tokens" for n, _ in changes) else ["--tokens", "1"]

    def write(folder, changes):
        _places(sound, folder)

    corrupted = any(name == "--inject" for name, _ in changes)
    return Case("options_of_verify", (base, _words), changes, write, corrupted)


@kind(14)
def options_of_others(rng, sound):
    command = rng.choice(list(OTHERS))
    changes = tuple(_draw(rng, command, OTHERS[command], 3))

    def write(folder, changes):
        _places(sound, folder)

    corrupted = command == ("manifest", "check")
    corrupted |= command[:1] == ("trace",) and command != ("trace", "check")
    return Case("options_of_others", (list(command), _words), changes, write, corrupted)


@kind(6)
def environment(rng, sound):
    names = rng.sample(sorted(ENVIRONMENT), rng.choice((1, 1, 2)))
    changes = tuple((name, rng.choice(ENVIRONMENT[name])) for name in names)
    base = rng.choice((
        ("verify", "--no-trace", "--tokens", "1", "--model", "model", "--prompt-ids", "1"),
        ("doctor",), ("trace", "show", "run.h5"), ("manifest", "check", "manifest.json", "model"),
        ("verify", "--help"),
    ))  # fmt: skip

    def write(folder, changes):
        _places(sound, folder)

    return Case("environment", (list(base), lambda changes: []), changes, write)
