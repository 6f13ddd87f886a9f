"""The paper's experiments: one of them as a dataclass, its training, its resumption, and many as a sweep on Dask."""
