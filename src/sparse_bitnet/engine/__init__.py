"""Write with a whole model: natively on a CPU (`decoder`, which needs no transformers), on a GPU by `cuda_graphs`."""
