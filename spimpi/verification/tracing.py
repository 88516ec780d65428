"""The trace of a verification run: journals while it runs, one sealed file at its end."""

import json
from contextlib import suppress
from functools import partial
from pathlib import Path

from spimpi import __version__
from spimpi.arithmetic import EXACT, FLOAT32_BLAS
from spimpi.errors import SpimpiError
from spimpi.reduction import PATIENCE, together
from spimpi.trace.checksum import text_digest
from spimpi.trace.journals.journal import Journal
from spimpi.trace.journals.journal_files import journal_folder, own_journal, remove_journal
from spimpi.trace.schema import TensorInfo
from spimpi.trace.sealing.seal import check_can_write, choose_driver, clear_folder, prepare, seal

ENDS = {0: "verified", 1: "failed", 3: "incomplete"}


class Tracer:
    """Where and how a run is traced. Constructing it checks, and writes nothing.

    ``journals``: a folder for the journals, on each node's own disk; None: beside the trace.
    ``sync``: what is flushed, and at the end the trace, survives a loss of power.
    """

    def __init__(
        self, rank: int, path, driver: str, overwrite: bool, command: str, run_id: str,
        journals=None, sync=False,
    ):  # fmt: skip
        self.path, self.overwrite, self.command = Path(path), overwrite, command
        self.run_id, self.driver, self.journals = run_id, choose_driver(driver), journals
        self.sync, self.journal = sync, None
        if rank == 0:
            check_can_write(self.path, overwrite, journals)

    def prepare(self) -> None:
        """Make room for the journals. On rank 0, before any rank opens one."""
        prepare(self.path, self.overwrite, self.journals)

    def open(self, ctx, job, names) -> Journal:
        """Open this rank's journal. Collective over ctx.world."""
        header = {
            "run_id": self.run_id,
            "spimpi": __version__,
            "command": self.command,
            "world": ctx.world.size,
            "topology": job.grid.text(),
            "layer_sizes": list(job.grid.layer_sizes),
            "exo_rule": job.grid.rule,
            "model": job.config.name,
            "identity": job.checkpoint.identity() if ctx.rank == 0 else "",
            "seed": job.seed,
            "arithmetic": EXACT if job.exact else FLOAT32_BLAS,
            "prompts": len(job.prompts),
            "prompt_tokens": sum(job.lengths),
            "prompts_digest": text_digest(json.dumps(job.workload.prompts).encode()),
            "new_tokens": job.n_tokens,
            "injected": [str(fault) for fault in job.faults],
        }
        if job.sketch:
            header["sketches"] = True
        folder = journal_folder(self.path, self.journals)
        agreed = partial(together, ctx.world, PATIENCE)
        own = own_journal(ctx.world, agreed, folder, self.journals is not None and self.overwrite)
        with agreed():
            self.journal = Journal(
                folder, ctx.rank, header, _tensors(job, names), self.sync, own
            )
        return self.journal

    def seal(self, ctx, outcome) -> None:
        """Close the journals and make the trace of them. Collective over ctx.world."""
        self.journal.close(ENDS[outcome.exit_status])
        attributes = {
            "end_state": ENDS[outcome.exit_status],
            "verdict": str(outcome.verdict),
            "established": outcome.verdict.kinds,
            "expected_from": outcome.expected_from,
            "seconds": outcome.seconds,
            "checking_seconds": {
                stage.name: totals.seconds for stage, totals in outcome.totals.items()
            },
            "runs": outcome.completed_runs,
        }
        seal(ctx.world, self.journal, self.path, attributes, self.driver, self.overwrite)

    def give_up(self, refused: bool = False) -> None:
        """The run ended by an error: its journal stays, unless nothing was recorded yet, or the
        run was ``refused`` (it leaves nothing behind). Local."""
        if self.journal is None:
            return
        with suppress(OSError, SpimpiError):
            self.journal.close("error")
            if refused or (self.journal.count == 0 and isinstance(self.journal.path, Path)):
                remove_journal(self.journal.path)
                clear_folder(self.path, self.journal.path.parent)


def _tensors(job, names) -> list[TensorInfo]:
    """The table of tensors; -1 stands for the rows of a step."""
    config, records = job.config, job.checkpoint.tensors
    hidden, d = config.hidden_size, config.head_dim
    n_prompts = len(job.prompts)
    attn = config.n_heads * d
    activations = {
        "rotary": ((-1, d // 2), "float32"),
        "prompts": ((-1,), "int64"),
        "embed": ((-1, hidden), "float32"),
        "qkv": ((-1, attn + 2 * config.n_kv_heads * d), "float32"),
        "qk_max": ((-1, 2), "uint32"),
        "qk_sum": ((-1, 2), "int64"),
        "qk_normed": ((-1, attn + 2 * config.n_kv_heads * d), "float32"),
        "kv": ((-1, 2 * config.n_kv_heads * d), "float32"),
        "scores": ((-1, config.n_heads, -1), "float64"),
        "attn": ((-1, attn), "float32"),
        "attn_max": ((-1,), "uint32"),
        "attn_out": ((-1, hidden), "int64"),
        "resid": ((-1, hidden), "float32"),
        "gate_up": ((-1, 2 * config.intermediate_size), "float32"),
        "ffn": ((-1, config.intermediate_size), "float32"),
        "ffn_max": ((-1,), "uint32"),
        "ffn_out": ((-1, hidden), "int64"),
        "hidden": ((-1, hidden), "float32"),
        "last_rows": ((n_prompts, hidden), "float32"),
        "logits": ((n_prompts, config.vocab_size), "float32"),
        "tokens": ((n_prompts,), "int64"),
    }
    derived = job.known.manifest.derived.tensors if job.has_derived else {}
    infos = []
    for name in names:
        record = records.get(name.split(" ")[0])
        if name in activations:
            shape, dtype = activations[name]
        elif name in derived:
            shape, dtype = derived[name].shape, derived[name].stored.numpy_name
        elif record is not None:
            shape, dtype = record.shape, record.dtype
        elif name.startswith("lm_head"):
            record = records["model.embed_tokens.weight"]
            shape, dtype = record.shape, record.dtype
        else:
            shape, dtype = (-1,), "uint64"
        infos.append(TensorInfo(name, shape, dtype))
    return infos
