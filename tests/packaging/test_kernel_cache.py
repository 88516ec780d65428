"""Compiled kernels are code: they are loaded from where nobody else can have put them, or compiled."""

import errno
import itertools
import os
import pickle
import stat
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from types import ModuleType, SimpleNamespace

import pytest

from spimpi import compiling, jit, kernel_cache
from spimpi.launch import launch

ROOT = os.geteuid() == 0
NOBODY = 65534
SOURCE = """
from spimpi.jit import kernel

@kernel("u8(u8)")
def answer(x):
    return x * 2
"""
LAID = []  # what a planted file does when it is unpickled


def laid(argument):
    LAID.append(argument)


class Planted:
    def __reduce__(self):
        return laid, ("ran",)


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    """``start(cache)`` as in a new process: what a kernel answers, loaded from how many files,
    what was said."""
    def run(cache, source=SOURCE, **environment):
        for name in ("SPIMPI_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        if cache is not None:
            environment["SPIMPI_CACHE_DIR"] = str(cache)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        forget(monkeypatch)
        LAID.clear()
        file = tmp_path / "program.py"
        file.write_text(source)
        jit._source_digest.cache_clear()
        module = ModuleType("program")
        monkeypatch.setitem(sys.modules, "program", module)
        exec(compile(source, file, "exec"), vars(module))  # noqa: S102  as an import, each time
        stats = module.answer.stats
        return module.answer(21), sum(stats.cache_hits.values()), capsys.readouterr().err

    yield run
    forget(monkeypatch)


def forget(monkeypatch):
    kernel_cache.cache_folder.cache_clear()
    kernel_cache.usable_folder.cache_clear()
    monkeypatch.setattr(compiling, "_told", compiling._Told())


def compiled(cache):
    return [path for path in cache.rglob("*") if path.suffix == kernel_cache.SUFFIX]


def test_a_kernel_is_compiled_once_and_then_loaded(start, tmp_path):
    cache = tmp_path / "cache"
    value, loaded, said = start(cache)
    assert (value, loaded) == (42, 0)
    assert said.count("\n") == 1 and "compiling kernels, once a machine" in said
    assert str(cache) in said
    assert start(cache) == (42, 1, "")
    (file,) = compiled(cache)
    assert not file.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def test_another_source_of_the_same_name_is_another_kernel(start, tmp_path):
    cache = tmp_path / "cache"
    assert start(cache)[0] == 42
    value, loaded, _ = start(cache, SOURCE.replace("x * 2", "x * 3"))
    assert (value, loaded) == (63, 0)
    assert start(cache)[:2] == (42, 1)


def plant(cache, sound=True):
    """Put a command into every compiled kernel, with the digest that it then must have."""
    content = pickle.dumps(Planted())
    for path in compiled(cache):
        digest = kernel_cache._digest(path.name, content)
        path.write_bytes(kernel_cache.MAGIC + digest + content if sound else content)
    assert compiled(cache)


def test_a_planted_command_runs_where_nothing_is_in_its_way(start, tmp_path):
    """That the tests below can fail."""
    cache = tmp_path / "cache"
    start(cache)
    plant(cache)
    start(cache)
    assert LAID == ["ran"]


def hand_over(path, uid=NOBODY):
    os.chown(path, uid, uid, follow_symlinks=False)


WAYS = {
    "the folder is everybody's": (False, lambda c, f, p: f.parent.chmod(0o777)),
    "the folder is everybody's, and sticky": (False, lambda c, f, p: f.parent.chmod(0o1777)),
    "the folder is its group's": (False, lambda c, f, p: f.parent.chmod(0o775)),
    "the folder above is everybody's": (False, lambda c, f, p: c.chmod(0o777)),
    "the folder above is its group's": (False, lambda c, f, p: c.chmod(0o775)),
    "a folder far above is everybody's": (False, lambda c, f, p: p.chmod(0o777)),
    "the file is everybody's": (False, lambda c, f, p: f.chmod(0o666)),
    "the file is its group's": (False, lambda c, f, p: f.chmod(0o664)),
    "the folder is another user's": (True, lambda c, f, p: hand_over(f.parent)),
    "the folder above is another user's": (True, lambda c, f, p: hand_over(c)),
    "a folder far above is another user's": (True, lambda c, f, p: hand_over(p)),
    "the file is another user's": (True, lambda c, f, p: hand_over(f)),
}


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_loaded_that_another_user_can_have_written(start, tmp_path, way):
    needs_root, change = WAYS[way]
    if needs_root and not ROOT:
        pytest.skip("giving a file away needs root")
    above = tmp_path / "above"
    cache = above / "between" / "cache"
    start(cache)
    plant(cache)
    (file,) = compiled(cache)
    change(cache, file, above)
    value, loaded, said = start(cache)
    assert (value, loaded, LAID) == (42, 0, [])
    if "the file" not in way:
        assert said.count("\n") == 1 and "at every start: none are kept, " in said
        assert "belongs to another user" in said or "can be written by" in said
    above.chmod(0o755)


@pytest.mark.skipif(not ROOT, reason="giving a link away needs root")
def test_a_link_of_another_user_is_not_followed(start, tmp_path):
    """In a folder such as /tmp he can point it elsewhere at any time."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    cache, link = tmp_path / "cache", tmp_path / "tmp" / "link"
    start(cache)
    link.symlink_to(cache)
    assert start(link)[:2] == (42, 1), "one's own link is fine, also in a sticky folder"
    hand_over(link)
    plant(cache)
    value, loaded, said = start(link)
    assert (value, loaded, LAID) == (42, 0, []) and "link belongs to another user" in said


def test_a_folder_in_a_sticky_one_is_made_and_used(start, tmp_path):
    shared = tmp_path / "tmp"
    shared.mkdir()
    shared.chmod(0o1777)
    assert start(shared / "mine")[1] == 0
    assert start(shared / "mine") == (42, 1, "")


def test_folders_are_not_the_groups_whatever_the_umask(start, tmp_path):
    before = os.umask(0)
    try:
        start(tmp_path / "a" / "cache")
        assert start(tmp_path / "a" / "cache") == (42, 1, "")
    finally:
        os.umask(before)


@pytest.mark.parametrize("damage", ["empty", "cut", "cut at its start", "a bit", "no kernel at all", "a link", "a FIFO"])
def test_a_damaged_file_is_compiled_anew_and_replaced(start, tmp_path, damage):
    cache = tmp_path / "cache"
    start(cache)
    (file,) = compiled(cache)
    whole = file.read_bytes()
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 8
    if damage in ("a link", "a FIFO"):
        other = file.rename(tmp_path / "elsewhere")
        file.symlink_to(other) if damage == "a link" else os.mkfifo(file)
    elif damage == "no kernel at all":
        plant(cache, sound=False)
    else:
        changed = {"empty": b"", "cut": whole[:-1], "cut at its start": whole[1:], "a bit": middle}
        file.write_bytes(changed[damage])
    value, loaded, _ = start(cache)
    assert (value, loaded, LAID) == (42, 0, [])
    assert start(cache) == (42, 1, "")


def test_one_kernels_file_is_not_anothers(start, tmp_path):
    cache = tmp_path / "cache"
    start(cache)
    (first,) = compiled(cache)
    other = SOURCE.replace("x * 2", "x * 3")
    start(cache, other)
    (second,) = set(compiled(cache)) - {first}
    second.write_bytes(first.read_bytes())
    assert start(cache, other)[:2] == (63, 0)


@pytest.mark.parametrize("cache", ["/proc/nosuch/cache", "/dev/null/cache", "/etc/hostname"])
def test_where_nothing_can_be_kept_kernels_are_compiled_in_memory(start, tmp_path, cache):
    value, loaded, said = start(cache)
    assert (value, loaded) == (42, 0)
    assert said.count("\n") == 1 and "at every start: none are kept" in said
    value, loaded, _ = start(cache, SOURCE.replace("x * 2", "x * 3"))
    assert (value, loaded) == (63, 0), "no old kernel in the place of a new one"
    left = [path for path in tmp_path.rglob("*") if path.suffix in (".nbi", ".nbc")]
    assert left == [], "numba's own cache was used"


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_kernel_that_cannot_be_written_down_is_used_all_the_same(start, tmp_path, monkeypatch, error):
    def full(*_):
        raise OSError(error, os.strerror(error))

    cache = tmp_path / "cache"
    with monkeypatch.context() as disk:
        disk.setattr(kernel_cache.os, "replace", full)
        value, loaded, said = start(cache)
    assert (value, loaded) == (42, 0)
    assert f"are not kept ({next(cache.iterdir())}: {os.strerror(error)})" in said
    assert [path for path in cache.rglob("*") if path.is_file()] == [], "a draft was left"


def test_the_folder_of_the_cache(start, tmp_path, monkeypatch):
    def folder(**environment):
        for name in ("SPIMPI_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        kernel_cache.cache_folder.cache_clear()
        return kernel_cache.cache_folder()

    assert folder(HOME="/home/a").parent.as_posix() == "/home/a/.cache/spimpi"
    assert folder(HOME="/home/a", XDG_CACHE_HOME="/x").parent.as_posix() == "/x/spimpi"
    assert folder(HOME="/home/a", XDG_CACHE_HOME="x").parent.as_posix() == "/home/a/.cache/spimpi"
    assert folder(HOME="") is None
    assert folder(HOME="", XDG_CACHE_HOME="/x").parent.as_posix() == "/x/spimpi"
    assert folder(SPIMPI_CACHE_DIR="/y", XDG_CACHE_HOME="/x").parent.as_posix() == "/y"
    monkeypatch.chdir(tmp_path)
    assert folder(SPIMPI_CACHE_DIR="y").parent == tmp_path / "y"
    monkeypatch.setattr(kernel_cache.os.path, "expanduser", lambda path: path)  # unknown user
    assert folder() is None
    monkeypatch.undo()


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    (tmp_path / "link").symlink_to("nosuch")
    (tmp_path / "other").symlink_to("link/below")
    for name in ("link", "other"):
        said = kernel_cache.prepare(tmp_path / name / "folder")
        assert said == f"{tmp_path / name}: it is a link that leads nowhere"
    (tmp_path / "nosuch").mkdir(mode=0o755)
    (tmp_path / "nosuch" / "below").mkdir(mode=0o755)
    for name in ("link", "other"):
        assert kernel_cache.prepare(tmp_path / name / "new" / "folder") == ""


def test_without_a_home_nothing_is_written_and_it_runs(start, monkeypatch, tmp_path):
    monkeypatch.setattr(kernel_cache.os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    value, loaded, said = start(None)
    assert (value, loaded) == (42, 0) and "there is no home directory" in said
    assert not (tmp_path / "~").exists()


def test_processes_that_start_at_once_get_their_kernels(start, tmp_path):
    cache = tmp_path / "cache"
    (tmp_path / "program.py").write_text(SOURCE + "\nprint(answer(21))\n")
    environment = os.environ | {"SPIMPI_CACHE_DIR": str(cache)}
    command = [sys.executable, tmp_path / "program.py"]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    assert [one.communicate(timeout=120)[0] for one in running] == [b"42\n"] * 3
    assert len(compiled(cache)) == 1 == len([p for p in cache.rglob("*") if p.is_file()])


def test_without_numba_s_compiler_it_is_refused_in_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "spimpi", "verify", "--no-trace", "--tokens", "1"],
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    said = "spimpi: spimpi's kernels need numba's compiler: unset NUMBA_DISABLE_JIT\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_a_cold_start_is_told_before_anything_slow_is_imported(tmp_path):
    code = (
        "import sys, runpy\n"
        "class Stop(BaseException): pass\n"
        "class Slow:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name in ('numpy', 'numba', 'mpi4py.MPI', 'h5py'): raise Stop(name)\n"
        "sys.meta_path.insert(0, Slow())\n"
        "try:\n"
        "    runpy.run_module('spimpi', run_name='__main__', alter_sys=True)\n"
        "except Stop as slow: print('then', slow)\n"
    )
    environment = os.environ | {"SPIMPI_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, "verify", "--no-trace"], env=environment, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert done.stderr.startswith("spimpi: compiling kernels, once a machine"), done.stderr
    assert done.stdout.startswith("then ")


def test_without_numba_nothing_is_said_of_compiling(start, monkeypatch, capsys):
    def missing(name):
        raise PackageNotFoundError(name)

    forget(monkeypatch)
    monkeypatch.setattr(kernel_cache.metadata, "version", missing)
    compiling.announce_cold_start()
    assert capsys.readouterr().err == ""


def test_ranks_other_than_0_say_nothing_of_compiling(start, tmp_path, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert launch().rank == 1
    assert start(tmp_path / "cache") == (42, 0, "")


def test_progress_is_told_every_ten_seconds(start, tmp_path, monkeypatch):
    clock = itertools.count(0, 6.0)
    monkeypatch.setattr(compiling, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    two = SOURCE + SOURCE.replace("answer", "other") + SOURCE.replace("answer", "third")
    _, _, said = start(tmp_path / "cache", two)
    lines = said.splitlines()
    assert len(lines) == 2 and lines[1].endswith("kernels: 1 done in 12 s, now program.other")
