def tables(rows, clean): return {}
