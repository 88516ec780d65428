"""The buffers that a stage's layers work in."""

import numpy as np


class Workspace:
    """Buffers for the activations of one microbatch of ``n`` rows, C-contiguous views."""

    def __init__(self, n, widths, part, head_dim, exact_arithmetic):
        hidden = widths.hidden
        n_qkv = part.layers[0].qkv.values.shape[0]
        n_ffn = part.layers[0].down.values.shape[1]
        n_attn = part.layers[0].o.values.shape[1]
        self.normed = np.empty((n, hidden), np.float32)
        self.qkv = np.empty((n, n_qkv), np.float32)
        self.attn = np.empty((n, n_attn), np.float32)
        self.resid = np.empty((n, hidden), np.float32)
        self.gate_up = np.empty((n, 2 * n_ffn), np.float32)
        self.ffn = np.empty((n, n_ffn), np.float32)
        self.delta = np.empty((n, hidden), np.float32)
        self.maxima = np.empty(n, np.uint32)
        self.words = [np.empty(n, np.uint64) for _ in range(2)]  # maxima packed, reduced
        self.exponents = np.empty(n, np.int32)
        partial = np.int64 if exact_arithmetic else np.float32
        self.sent = [np.empty((n, hidden), partial) for _ in range(2)]
        self.summed = [np.empty((n, hidden), partial) for _ in range(2)]
        self.qk_maxima = np.empty((n, 2), np.uint32)
        self.qk_words = [np.empty((n, 2), np.uint64) for _ in range(2)]
        self.qk_sums = [np.empty((n, 2), partial) for _ in range(2)]
        widest_in = max(hidden, n_attn, n_ffn)
        widest_out = max(n_qkv, 2 * n_ffn, hidden)
        if exact_arithmetic:
            self._scaled = np.empty(n * widest_in)
            self._product = np.empty(n * widest_out)

    def scaled(self, n, width):
        """Room for the scaled integers of a matmul's input."""
        return self._scaled[: n * width].reshape(n, width)

    def product(self, n, width):
        """Room for the integers of a matmul's result."""
        return self._product[: n * width].reshape(n, width)

    def first_rows(self, n):
        """The same buffers, as views of their first ``n`` rows."""
        view = object.__new__(Workspace)
        for name, value in vars(self).items():
            if isinstance(value, list):
                value = [a[:n] for a in value]
            elif not name.startswith("_"):
                value = value[:n]
            setattr(view, name, value)
        return view
